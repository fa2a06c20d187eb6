"""
A million calls on a GPU, and faults around the others: memory, cache folder, processes, interrupts.

Processes are started from texts: what is tested is a whole process, its exit included. Those that
need no GPU are in tests/test_faults.py.
"""

import contextlib
import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import test_streams
from test_streams import CUPY, DIM, HEADS, TORCH, WAYS, forget, normal, synchronize
from tolerances import assert_alike

import cupy_headnorm
from cupy_headnorm import (
    HeadNorm,
    QKNorm,
    Rope,
    _dtypes,
    _interop,
    _qk_dispatch,
    reference,
    rms_norm,
)

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", exc_type=ImportError)

library, path, taken, spin = (
    test_streams.library,
    test_streams.path,
    test_streams.taken,
    test_streams.spin,
)

CALLS, THREADS, DTYPES = 1_000_000, 8, (_dtypes.FLOAT16, _dtypes.BFLOAT16)
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
        _qk_dispatch._thread.calls.clear()
        _qk_dispatch._plans.clear()
    synchronize()
    taken.clear()
    with no_more_memory(library):
        before = library.allocated()
        with pytest.raises(OUT_OF_MEMORY[library.name]):
            call(x)
        gc.collect()
        assert library.allocated() == before
        if kind == "norm":
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
        patch.setattr(cupy.cuda, "Memory", full)
        for _ in range(2):
            with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="MemoryAllocation"):
                norm(x)
    assert norm._held.on_device == {}
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
    assert norm._held.on_device == {}
    # Whoever gets the memory next may write there at once.
    junk = [_interop.upload(np.full(DIM, np.nan, np.float32), 0) for _ in range(64)]
    for library, y in found.items():
        assert_alike(library.host(y), right, slack=4 * np.abs(right).max() * (kind == "qk"))
        again = library.host(call(*arrays[library]))
        np.testing.assert_array_equal(again, library.host(y))
    del junk


# Processes.
RESULT = """
import hashlib, json, os, signal, sys, threading, time
import cupy
import numpy as np
from cupy_headnorm import GPUUnavailableError, HeadNorm, QKNorm, _kernels, rms_norm
HEAD_DIMS = (64, 96, 128, 160, 192)

def values(head_dim):
    return np.sin(np.arange(6 * head_dim, dtype=np.float32)).reshape(3, 2, head_dim)

def digest(head_dims=HEAD_DIMS, array=cupy.asarray):
    found = hashlib.sha256()
    for head_dim in head_dims:
        y = HeadNorm(np.ones(head_dim, np.float32))(array(values(head_dim)))
        found.update(getattr(y, "get", lambda: y)().tobytes())
    return found.hexdigest()

cupy.zeros(1)
"""
"""A digest of results: one kernel of ours for each head_dim, and none of CuPy."""
KERNELS = 5

SPIN = f"""
kernel = cupy.RawKernel(r'''{test_streams.SPIN}''', "spin")
def spin(stream, cycles=1_000_000_000):
    kernel((1,), (1,), (np.int64(cycles),), stream=stream)
"""


@pytest.fixture(scope="module")
def right():
    """Return the function `digest` of this process."""
    scope = {}
    exec(RESULT, scope)
    return scope["digest"]


def environment(cache=None):
    roots = (str(Path(cupy_headnorm.__file__).parent.parent), os.environ.get("PYTHONPATH"))
    added = {} if cache is None else {"CUPY_CACHE_DIR": str(cache)}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), **added}


def assert_well_ended(code, said):
    assert code == 0, said
    for word in ("Traceback", "Exception ignored", "terminate called"):
        assert word not in said, said


def run(code, cache=None, *, may_complain=False):
    """Run a text in a process that must end well, and return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_well_ended(done.returncode, "" if may_complain and not done.returncode else done.stderr)
    return done.stdout.splitlines()


def assert_whole(cache):
    """Assert that the folder has each kernel once, whole, and nothing half-written."""
    files = sorted(cache.glob("*.cubin"))
    assert len(files) == KERNELS
    for file in files:
        found, cubin = file.read_bytes()[:40], file.read_bytes()[40:]
        assert hashlib.sha1(cubin).hexdigest() == found.decode()
    assert not list(cache.glob("tmp*"))


def test_sixteen_processes_fill_one_cache_at_once(tmp_path, right):
    cache = tmp_path / "cache"
    code = f"{RESULT}\nprint('ready', flush=True)\nsys.stdin.readline()\nprint(digest())"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=environment(cache), text=True, **pipes) for _ in range(16)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 16
        assert not list(cache.glob("*.cubin"))
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (printed, said) in zip(processes, ends, strict=True):
        assert_well_ended(process.returncode, said)
        assert printed == f"{right()}\n"
    assert_whole(cache)


def test_garbage_in_the_cache_is_compiled_again(tmp_path, right, rng):
    cache = tmp_path / "cache"
    code = f"{RESULT}\nprint(digest())"
    assert run(code, cache) == [right()]
    assert_whole(cache)
    spoil = (
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: rng.bytes(len(data)),
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    )
    for file, spoilt in zip(sorted(cache.glob("*.cubin")), spoil, strict=True):
        file.write_bytes(spoilt(file.read_bytes()))
    (cache / "garbage").write_bytes(rng.bytes(1000))
    assert run(code, cache) == [right()]
    assert_whole(cache)


READ_ONLY = """
import ctypes

class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

class Capabilities(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

# Root may write anywhere, unless it gives that up: CAP_DAC_OVERRIDE is 1.
libc, header, held = ctypes.CDLL(None), Header(0x20080522, 0), (Capabilities * 2)()
libc.capget(ctypes.byref(header), held)
held[0].effective &= ~(1 << 1)
libc.capset(ctypes.byref(header), held)
try:
    open(os.path.join(os.environ["CUPY_CACHE_DIR"], "probe"), "w").close()
    sys.exit("the folder can be written")
except PermissionError:
    pass
print(digest())
for _ in range(2):
    try:
        digest([224])
    except GPUUnavailableError as error:
        print(error)
print(digest())
print(digest([224], np.asarray))
"""


def test_a_cache_that_cannot_be_written_is_read(tmp_path, right):
    cache = tmp_path / "cache"
    code = f"{RESULT}\nprint(digest())"
    assert run(code, cache) == [right()]
    cache.chmod(0o555)
    try:
        first, error, again, second, on_host = run(RESULT + READ_ONLY, cache)
    finally:
        cache.chmod(0o755)
    assert first == second == right()
    for told in (error, again):
        assert told.startswith(f"the kernel cache {cache} cannot be written (")
        assert told.endswith("needs: CUPY_CACHE_DIR set to a writeable folder")
    assert on_host == right([224], np.asarray)
    assert_whole(cache)


FORK = """
import torch

norm = HeadNorm(np.ones(64, np.float32))
qk = QKNorm(norm, norm)
x = cupy.asarray(values(64))
tensor = torch.from_numpy(values(64)).cuda()

calls = {
    "cupy": lambda: norm(x),
    "cupy in place": lambda: norm(x, out=x),
    "cupy, a new norm": lambda: HeadNorm(np.ones(64, np.float32))(x),
    "cupy, a new kernel": lambda: rms_norm(x[..., :40], out=x[..., :40]),
    "qk": lambda: qk(x, x),
    "torch in place": lambda: norm(tensor, out=tensor),
    "torch, a new kernel": lambda: rms_norm(tensor[..., :40], out=tensor[..., :40]),
}
for name, call in calls.items():
    if "new" not in name:
        call(), call()
cupy.cuda.runtime.deviceSynchronize()

def in_child(work):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(writer, "w") as file:
                json.dump(work(), file)
        finally:
            os._exit(0)
    os.close(writer)
    for _ in range(300):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hung"
    with os.fdopen(reader) as file:
        return json.loads(file.read() or '"died"')

def on_gpu():
    found = {}
    for _ in range(2):
        for name, call in calls.items():
            try:
                call()
                found[name] = "no error"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    found["host"] = digest(array=np.asarray)
    return found

before = digest()
print(json.dumps(in_child(lambda: digest(array=np.asarray))))
print(json.dumps(in_child(on_gpu)))
for call in calls.values():
    call()
print(json.dumps([before, digest()]))
"""


def test_a_forked_child_is_told_and_its_parent_unhurt(right):
    """CUDA does not survive a fork."""
    of_host, of_gpu, of_parent = map(json.loads, run(RESULT + FORK))
    on_host = right(array=np.asarray)
    assert of_host == on_host
    assert of_gpu.pop("host") == on_host
    assert len(of_gpu) == 7
    for name, told in of_gpu.items():
        assert told.startswith("GPUUnavailableError: CUDA was used before this process was"), name
        assert "spawn" in told
    assert of_parent == [right()] * 2


def test_spawned_workers(rng):
    weight, values = rng.standard_normal(DIM).astype(np.float32), normal(rng)
    norm = HeadNorm(weight)
    xs = [cupy.asarray(part) for part in np.split(values, 4)]
    norm(xs[0])  # this process has loaded what they must load again
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(norm, xs))
    for y, part in zip(found, np.split(values, 4), strict=True):
        assert isinstance(y, cupy.ndarray)
        assert_alike(y.get(), reference.rms_norm(part, weight))


LEAVING = {
    "cupy": """
stream = cupy.cuda.Stream(non_blocking=True)
x = cupy.asarray(values(64))
with stream:
    norm(x), qk(x, x)
    stream.synchronize()
    spin(stream)
    y = norm(x), norm(x, out=x), qk(x, x)
print(stream.done)
""",
    "torch": """
import torch
from types import SimpleNamespace
stream = torch.cuda.Stream()
x = torch.from_numpy(values(64)).cuda()
torch.cuda.synchronize()
with torch.cuda.stream(stream):
    norm(x), qk(x, x)
    stream.synchronize()
    spin(SimpleNamespace(ptr=stream.cuda_stream))
    y = norm(x), norm(x, out=x), qk(x, x)
print(stream.query())
""",
    "DLPack": """
class Another:
    def __init__(self, array):
        self.array = array
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)
    def __dlpack_device__(self):
        return self.array.__dlpack_device__()
    def __array_namespace__(self):
        return cupy
stream = cupy.cuda.Stream(non_blocking=True)
x = Another(cupy.asarray(values(64)))
with stream:
    norm(x), qk(x, x)
    stream.synchronize()
    spin(stream)
    y = norm(x), qk(x, x)
print(stream.done)
""",
}


@pytest.mark.parametrize("producer", LEAVING)
def test_leaving_with_work_in_flight(producer):
    norms = "norm = HeadNorm(np.ones(64, np.float32))\nqk = QKNorm(norm, norm)\n"
    assert run(RESULT + SPIN + norms + LEAVING[producer]) == ["False"]


INTERRUPTS = 14
INTERRUPT = f"""
signal.signal(signal.SIGINT, signal.default_int_handler)
struck = []
for n in range({INTERRUPTS}):
    head_dim = 200 + 8 * n
    before = len(_kernels._functions)

    def strike():
        while not _kernels._compiling.locked():
            time.sleep(1e-4)
        time.sleep(0.01 * n)
        os.kill(os.getpid(), signal.SIGINT)

    striking = threading.Thread(target=strike)
    striking.start()
    try:
        digest([head_dim])
        striking.join()
        time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    striking.join()
    struck.append(len(_kernels._functions) == before)
    assert not _kernels._compiling.locked()
    print(digest([head_dim]))
print(sum(struck))
"""


def test_a_compile_that_is_interrupted_is_done_again(tmp_path, right):
    # One that strikes a finalizer is reported and lost.
    *found, struck = run(RESULT + INTERRUPT, tmp_path / "cache", may_complain=True)
    assert found == [right([200 + 8 * n]) for n in range(INTERRUPTS)]
    assert int(struck) > 1, "the others were too late to interrupt anything"
