"""A million calls on a GPU, those that find no memory, and memory that is freed under work."""

import contextlib
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import streams
from streams import CUPY, DIM, HEADS, TORCH, WAYS, forget, normal, synchronize
from tolerances import assert_alike

from cupy_headnorm import HeadNorm, QKNorm, Rope, rms_norm
from cupy_headnorm._arrays import dtypes
from cupy_headnorm._calls import uploads
from cupy_headnorm.headnorm import inside

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", exc_type=ImportError)

# The fixtures of streams.py that these tests take.
library, path, taken, spin = streams.library, streams.path, streams.taken, streams.spin


CALLS, THREADS, DTYPES = 1_000_000, 8, (dtypes.FLOAT16, dtypes.BFLOAT16)
WARM = CALLS // 10
DEVICE_GROWTH = 4 * 2**20
"""Bytes, two of the pieces of 2 MiB that a driver hands out. No pool has blocks below 512 bytes:
one lost in a hundred calls would be 5 MB."""
HOST_GROWTH = 8 * 2**20
"""Bytes, 8 a call: the smallest object of Python takes 16, a tuple 48."""


class Flipped:
    """
    One thread's arrays of 1 and -1, and a turn of calls on them.

    With eps=0 and weights of -1 a call in place flips every sign: the inverse root is within some
    units of float32 of 1, which 16 bits do not hold. So the bits tell after any number of calls
    whether one was lost, or done twice, or on another's array.
    """

    def __init__(self, library, dtype, number):
        rng = np.random.default_rng(number)

        def signs(*shape):
            return (rng.integers(0, 2, shape) * 2 - 1).astype(dtype.numpy)

        self.library, self.flips = library, {}
        norm = HeadNorm(np.full(DIM, -1, np.float32), eps=0)
        qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, DIM, max_position=4))
        weight = library.array(np.full(DIM, -1, np.float32))
        xs = [self._made(signs(tokens, HEADS, DIM)) for tokens in (1, 2, 3, 5)]
        q, k = self._made(signs(2, HEADS, DIM)), self._made(signs(2, 1, DIM))
        qkv = self._made(signs(2, (HEADS + 2) * DIM))
        positions = library.array(np.zeros(2, np.int64))  # turned by nothing

        def in_place(call, *arrays):
            def flip():
                call()
                for array in arrays:
                    self.flips[id(array)][2] += 1

            return flip

        turn = [in_place(lambda x=x: norm(x, out=x), x) for x in xs] * 2
        turn += [in_place(lambda x=x: rms_norm(x, weight, eps=0, out=x), x) for x in xs[:3]]
        turn += [lambda: norm(xs[0]), lambda: norm(xs[3], out=None)]
        turn += [in_place(lambda: qk(q, k, positions=positions, out=(q, k)), q, k)]
        turn += [lambda: qk(q, k, positions=positions)]
        packed = {"num_heads": HEADS, "num_kv_heads": 1, "positions": positions}
        turn += [in_place(lambda: qk.packed(qkv, **packed), qkv)]
        self.turn = turn

    def _made(self, values):
        array = self.library.array(values)
        self.flips[id(array)] = [array, values, 0]
        return array

    def check(self):
        for array, values, count in self.flips.values():
            expected = -values if count % 2 else values.copy()
            if values.ndim == 2:  # the last head of the packed buffer holds values, which stay
                expected[:, -DIM:] = values[:, -DIM:]
            np.testing.assert_array_equal(self.library.host(array), expected)


def memory():
    """Return bytes in use: resident, of the device, of torch's arrays, of CuPy's."""
    synchronize()
    gc.collect()
    free, total = cupy.cuda.runtime.memGetInfo()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return np.array([resident, total - free, TORCH.allocated(), CUPY.allocated()])


@pytest.mark.alone  # it looks at the memory of the whole device
@pytest.mark.skipif(bool(os.environ.get("HEADNORM_NO_POOLS")), reason="needs pools that count")
def test_a_million_calls_leave_nothing_behind(capsys, record_property):
    gate = threading.Barrier(THREADS + 1, timeout=300)
    calls = []

    def work(number):
        library = (TORCH, CUPY)[number % 2]
        stream = library.stream()
        try:
            with library.on(stream):
                flipped = Flipped(library, DTYPES[number // 2 % 2], number)
                for wanted in (WARM, CALLS):
                    turns = -(-wanted // THREADS // len(flipped.turn))
                    gate.wait()
                    for _ in range(turns):
                        for call in flipped.turn:
                            call()
                    stream.synchronize()
                    gate.wait()
                    gate.wait()  # while memory is looked at
                calls.append(turns * len(flipped.turn))
                flipped.check()
        except BaseException:
            gate.abort()
            raise

    seen = []
    with ThreadPoolExecutor(THREADS) as pool:
        working = [pool.submit(work, number) for number in range(THREADS)]
        with contextlib.suppress(threading.BrokenBarrierError):
            for _ in range(2):
                gate.wait()
                began = time.perf_counter()
                gate.wait()
                seconds = time.perf_counter() - began
                seen.append(memory())
                gate.wait()
    errors = [done.exception() for done in working]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert sum(calls) >= CALLS
    resident, device, of_torch, of_cupy = (seen[1] - seen[0]).tolist()
    told = (
        f"{sum(calls):,} calls of {THREADS} threads in {seconds:.1f} s; grown: resident "
        f"{resident:,} of {seen[1][0]:,} bytes, device {device:,}, torch {of_torch}, CuPy {of_cupy}"
    )
    record_property("endurance", told)
    with capsys.disabled():
        print(f"\n{told}")
    assert (of_torch, of_cupy) == (0, 0)
    assert device < DEVICE_GROWTH
    assert resident < HOST_GROWTH


# Out of memory.
OUT_OF_MEMORY = {"torch": torch.cuda.OutOfMemoryError, "cupy": cupy.cuda.memory.OutOfMemoryError}


def repeated(library, values, tokens):
    """Return one token's values as those of many: its result takes memory that it does not."""
    x = library.array(values)
    if library is TORCH:
        return x.expand(tokens, -1, -1)
    return cupy.broadcast_to(x, (tokens, *x.shape[1:]))


@contextlib.contextmanager
def no_more_memory(library):
    """Let a library have little more than it has now."""
    spare = 48 * 2**20
    gc.collect()
    if library is TORCH:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + spare)
        try:
            yield
        finally:
            pool.set_limit(size=0)


@pytest.mark.skipif(bool(os.environ.get("HEADNORM_NO_POOLS")), reason="needs pools with a limit")
@pytest.mark.parametrize("kind", ["norm", "qk"])
def test_out_of_memory_for_the_result_is_the_librarys_error(library, path, kind, taken, rng):
    norm = HeadNorm(rng.standard_normal(DIM).astype(np.float32))
    qk = QKNorm(norm, norm)

    def call(x, out=None):
        if kind == "norm":
            return norm(x, out=out)
        parts = x[:, :1], x[:, 1:]  # there is memory for the first one
        return qk(*parts, out=None if out is None else parts)

    values = normal(rng, (1, HEADS, DIM))
    tokens = 2**16  # 128 MiB of results
    x, small = repeated(library, values, tokens), library.array(values)
    call(repeated(library, values, 5 if path == "other length" else tokens))
    call(small, out=small)
    library.write(small, library.array(values))
    if path == "first":
        forget()
    synchronize()
    taken.clear()
    with no_more_memory(library):
        before = library.allocated()
        with pytest.raises(OUT_OF_MEMORY[library.name]):
            call(x)
        gc.collect()
        assert library.allocated() == before
        assert taken == WAYS[path]
        call(small, out=small)
    assert_alike(library.host(small), norm(values))
    found = call(x)
    for y in (found,) if kind == "norm" else found:
        heads = slice(None) if kind == "norm" else slice(1) if y is found[0] else slice(1, None)
        for token in (0, tokens // 2, tokens - 1):
            assert_alike(library.host(y[token]), norm(values)[0, heads])


def test_a_result_larger_than_the_gpu(library, rng):
    norm = HeadNorm(rng.standard_normal(DIM).astype(np.float32))
    values = normal(rng, (1, HEADS, DIM))
    x = repeated(library, values, 2**28)  # 512 GiB of results
    for _ in range(2):
        with pytest.raises(OUT_OF_MEMORY[library.name]):
            norm(x)
        assert_alike(library.host(norm(library.array(values))), norm(values))


def test_out_of_memory_for_a_weight_is_tried_again(library, rng, monkeypatch):
    norm, values = HeadNorm(rng.standard_normal(DIM).astype(np.float32)), normal(rng)
    x = library.array(values)

    def full(size):
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda.runtime, "malloc", full)
        for _ in range(2):
            with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="MemoryAllocation"):
                norm(x)
    assert not inside(norm).devices
    assert_alike(library.host(norm(x)), norm(values))


@pytest.mark.parametrize("kind", ["norm", "qk"])
def test_unload_waits_for_work_on_streams_of_others(kind, spin, rng):
    """Each library's stream is busy; who unloads is another thread, on neither."""
    weight, values = rng.standard_normal(DIM).astype(np.float32), normal(rng)
    norm = HeadNorm(weight)
    qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, DIM, max_position=len(values)))
    at = np.arange(len(values))

    def call(x, positions):
        if kind == "norm":
            return norm(x)
        return qk(x[:, :2], x[:, 2:], positions=positions)[1]

    right = call(values, at)
    streams = {library: library.stream() for library in (TORCH, CUPY)}
    arrays = {library: (library.array(values), library.array(at)) for library in streams}
    for library, stream in streams.items():
        with library.on(stream):
            call(*arrays[library])
    synchronize()
    found = {}
    for library, stream in streams.items():
        with library.on(stream):
            spin(library.handle(stream))
            found[library] = call(*arrays[library])
    assert not any(library.done(stream) for library, stream in streams.items())
    unload = norm.unload if kind == "norm" else qk.unload
    with ThreadPoolExecutor(1) as pool:
        pool.submit(unload).result()
    assert all(library.done(stream) for library, stream in streams.items())
    assert not inside(norm).devices
    # Whoever gets the memory next may write there at once.
    junk = [uploads.upload(np.full(DIM, np.nan, np.float32), 0) for _ in range(64)]
    for library, y in found.items():
        assert_alike(library.host(y), right, slack=4 * np.abs(right).max() * (kind == "qk"))
        again = library.host(call(*arrays[library]))
        np.testing.assert_array_equal(again, library.host(y))
    del junk
