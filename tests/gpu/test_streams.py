"""Order, on a GPU: streams and graphs, on each of the three paths of a call."""

import ctypes
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import streams
from streams import (
    CUPY,
    DIM,
    OTHER_TOKENS,
    TORCH,
    WAYS,
    Call,
    elsewhere,
    in_thread,
    normal,
    reserve,
    synchronize,
    zeros,
)
from tolerances import RELATIVE, assert_alike

from cupy_headnorm import CaptureError, HeadNorm, layer_norm, reference
from cupy_headnorm._cuda import compiler
from cupy_headnorm.headnorm import inside

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)

# The fixtures of streams.py that these tests take.
library = streams.library
stream = streams.stream
spin = streams.spin
path = streams.path
taken = streams.taken
kind = streams.kind
result = streams.result
call = streams.call


def test_a_call_runs_after_what_its_stream_was_given_before(
    library, stream, path, call, taken, spin, rng
):
    values = normal(rng)
    source, x, out = library.array(values), zeros(library), zeros(library)
    call.lead_to(path, taken)
    other, others_stream = elsewhere(library)
    with other.on(others_stream), library.on(stream):
        reserve(library, x)
        synchronize()
        spin(library.handle(stream))
        library.write(x, source)
        y = call(x, out)
        assert not library.done(stream), "the call waited for the GPU"
    # On any other stream the norm would have read zeros while the spinning kernel ran.
    synchronize()
    assert taken == WAYS[path]
    assert_alike(library.host(y), call.expected(values))


def test_what_its_stream_is_given_next_runs_after_a_call(
    library, stream, path, call, taken, spin, rng
):
    values = normal(rng)
    x, out = library.array(values), zeros(library)
    call.lead_to(path, taken)
    other, others_stream = elsewhere(library)
    busy = [(other, others_stream)]
    if library.handle(stream):
        busy.append((library, library.stream(default=True)))
    with other.on(others_stream), library.on(stream):
        reserve(library, x)
        synchronize()
        for owner, elsewhere_stream in busy:
            spin(owner.handle(elsewhere_stream))
        y = call(x, out)
        doubled = y + y
        stream.synchronize()
        # A norm on one of those would still be waiting.
        assert not any(owner.done(elsewhere_stream) for owner, elsewhere_stream in busy)
    synchronize()
    assert taken == WAYS[path]
    assert_alike(library.host(doubled), 2 * call.expected(values))


def test_a_remembered_call_follows_its_stream(library, spin, rng):
    """One call, on one stream after another."""
    values = normal(rng)
    norm = HeadNorm(np.full(DIM, 2, np.float32))
    x, source = zeros(library), library.array(values)
    norm.warmup(x)
    streams = [library.stream() for _ in range(3)] + [library.stream(default=True)]
    for stream in streams * 2:
        with library.on(stream):
            reserve(library, x)
            library.write(x, x - x)
            synchronize()
            spin(library.handle(stream))
            library.write(x, source)
            norm(x, out=x)
        synchronize()
        assert_alike(library.host(x), 2 * reference.rms_norm(values))


def test_nothing_but_the_result_is_allocated(library, path, call, taken):
    if os.environ.get("HEADNORM_NO_POOLS"):
        pytest.skip("needs pools that count")
    x, out = zeros(library), zeros(library)
    call.lead_to(path, taken)
    gc.collect()
    before = library.allocated()
    y, count = library.counted(call, x, out)
    assert library.allocated() - before == (y.nbytes if call.result == "new" else 0)
    assert count == (call.result == "new")
    assert taken == WAYS[path]


def test_unload_waits_for_work_in_flight(spin, rng):
    values, weight = normal(rng), rng.standard_normal(DIM).astype(np.float32)
    norm = HeadNorm(weight)
    x = cupy.asarray(values)
    stream = cupy.cuda.Stream(non_blocking=True)
    norm.warmup(x)
    synchronize()
    with stream:
        spin(stream.ptr)
        y = norm(x)
        norm.unload()
        assert stream.done
        assert_alike(y.get(), reference.rms_norm(values, weight))


def replays_right(library, call, capture, rng):
    """Capture what `capture` does with x and out; replay it over new values."""
    x, out = zeros(library), zeros(library)
    loaded = dict(compiler._functions)
    with library.capture() as replay:
        y = capture(x, out)
    assert compiler._functions == loaded
    for _ in range(2):
        values = normal(rng)
        library.write(x, library.array(values))
        synchronize()
        replay()
        synchronize()
        assert_alike(library.host(y), call.expected(values))


def test_torchs_graphs(path, kind, result, taken, rng):
    call = Call(TORCH, kind, result, rng)
    call.lead_to(path, taken, planned=True)
    replays_right(TORCH, call, call, rng)
    assert taken == WAYS[path]


@pytest.mark.parametrize("result", ["in place", "given"])
def test_cupys_graphs(path, kind, result, taken, rng):
    call = Call(CUPY, kind, result, rng)
    call.lead_to(path, taken, planned=True)
    replays_right(CUPY, call, call, rng)
    assert taken == WAYS[path]


def test_cupys_graphs_take_no_new_result(path, kind, taken, rng):
    call = Call(CUPY, kind, "new", rng)
    call.lead_to(path, taken, planned=True)

    def capture(x, out):
        with pytest.raises(CaptureError, match="a result without out would be allocated"):
            call(x, out)
        return call.norm(x, out=x)

    replays_right(CUPY, call, capture, rng)


def test_a_graph_of_several_calls(library, taken, rng):
    """In place, out of place and of another length, each on parameters of its own."""
    norm = HeadNorm(np.full(DIM, 2, np.float32))
    x, y = zeros(library), zeros(library)
    norm.warmup(x)
    norm.warmup(x, out=y)
    taken.clear()
    with library.capture() as replay:
        norm(x, out=y)
        norm(x[:OTHER_TOKENS], out=x[:OTHER_TOKENS])
        norm(x[OTHER_TOKENS:], out=x[OTHER_TOKENS:])
    assert taken == ["derived", "derived"]
    values = normal(rng)
    library.write(x, library.array(values))
    synchronize()
    replay()
    synchronize()
    assert_alike(library.host(y), 2 * reference.rms_norm(values))
    np.testing.assert_array_equal(library.host(x), library.host(y))


UNLOADED = {"torch": 136, "cupy": 152}
"""Lengths of heads whose kernels no other test loads."""


def test_nothing_is_loaded_while_capturing(library, taken):
    head_dim = UNLOADED[library.name]
    x, y = (library.array(np.ones((8, 4, head_dim), np.float32)) for _ in range(2))
    norm = HeadNorm(np.ones(head_dim, np.float32))
    y += y
    synchronize()
    loaded = dict(compiler._functions)
    with library.capture() as replay:
        for out in (x, y):
            with pytest.raises(
                CaptureError, match="the kernel for this layout is not loaded yet while the str"
            ):
                layer_norm(x, out=out)
            with pytest.raises(CaptureError, match=r"weight is not on cuda:0 yet .*warmup\(x\)"):
                norm(x, out=out)
        y += y
    assert compiler._functions == loaded
    assert not inside(norm).devices
    replay()
    synchronize()
    # The capture went on, without the norms.
    assert (library.host(x) == 1).all()
    assert (library.host(y) == 4).all()
    norm.warmup(x)
    # By another name: a graph that is dropped during a capture breaks it.
    with library.capture() as again:
        norm(x, out=x)
    library.write(x, y)
    synchronize()
    again()
    synchronize()
    np.testing.assert_allclose(library.host(x), 1, rtol=RELATIVE["float32"])


WARMED = {"torch": 168, "cupy": 184}


@pytest.mark.parametrize("warming", ["here", "in a thread"])
def test_who_warms_up_spares_other_threads_from_loading(library, warming, taken, rng):
    """A thread that never called may capture: CUDA loads lazily, but never here."""
    head_dim = WARMED[library.name] + (warming == "here") * 32
    weight = rng.standard_normal(head_dim).astype(np.float32)
    norm, values = HeadNorm(weight), normal(rng, (16, 4, head_dim))
    x = library.array(values)

    def capture():
        with library.capture() as replay:
            norm(x, out=x)
        return replay

    if warming == "here":
        norm.warmup(x)
        replay = in_thread(capture)
    else:
        in_thread(norm.warmup, x)
        replay = capture()
    assert _is_loaded(head_dim)
    library.write(x, library.array(values))
    synchronize()
    replay()
    synchronize()
    assert_alike(library.host(x), reference.rms_norm(values, weight))


LOADED = {"torch": 232, "cupy": 248}


def test_warmup_loads_what_cuda_loads_lazily(library):
    head_dim = LOADED[library.name]
    norm = HeadNorm(np.ones(head_dim, np.float32))
    norm.warmup(library.array(np.ones((16, 4, head_dim), np.float32)))
    assert _is_loaded(head_dim)


def _is_loaded(head_dim):
    """Ask the driver whether the kernel for `head_dim` is on the GPU."""
    (function,) = (f for key, f in compiler._functions.items() if key[0].head_dim == head_dim)
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, "cuFuncIsLoaded"):
        pytest.skip("needs a driver of CUDA 12.4, which tells")
    state = ctypes.c_int(-1)
    assert driver.cuFuncIsLoaded(ctypes.byref(state), ctypes.c_void_p(function.ptr)) == 0
    return state.value == 1


def test_a_plan_miss_spares_another_threads_capture():
    """CUDA's global mode, in which torch captures, forbids every thread to ask for memory."""
    prepared, captured = threading.Event(), threading.Event()

    def other_thread():
        stream = TORCH.stream()
        with TORCH.on(stream):
            x = TORCH.array(np.ones((8, 4, 264), np.float32))
            prepared.set()
            assert captured.wait(60)
            HeadNorm(np.full(264, 3, np.float32))(x, out=x)
        return x, stream  # CUDA takes nothing back meanwhile

    norm = HeadNorm(np.full(DIM, 2, np.float32))
    x = TORCH.array(np.ones((8, 4, DIM), np.float32))
    norm.warmup(x)
    with ThreadPoolExecutor(1) as pool:
        missing = pool.submit(other_thread)
        assert prepared.wait(60)
        synchronize()
        with TORCH.capture() as replay:
            captured.set()
            other, _ = missing.result(60)
            norm(x, out=x)
        replay()
        synchronize()
    np.testing.assert_allclose(TORCH.host(x), 2, rtol=RELATIVE["float32"])
    np.testing.assert_allclose(TORCH.host(other), 3, rtol=RELATIVE["float32"])


def test_a_plan_miss_spares_the_capture_of_a_blocking_stream():
    """Compiling and uploading use no default stream, which would break it."""
    captured = threading.Event()

    def other_thread():
        with cupy.cuda.Stream(non_blocking=True) as stream:
            x = cupy.ones((8, 4, 144), np.float32)
            assert captured.wait(60)
            HeadNorm(np.ones(144, np.float32)).warmup(x)
            stream.synchronize()

    norm = HeadNorm(np.full(DIM, 2, np.float32))
    blocking = cupy.cuda.Stream()
    with blocking, ThreadPoolExecutor(1) as pool:
        x = cupy.ones((8, 4, DIM), np.float32)
        norm.warmup(x)
        missing = pool.submit(other_thread)
        synchronize()
        blocking.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
        captured.set()
        missing.result(60)
        norm(x, out=x)
        graph = blocking.end_capture()
        graph.launch(blocking)
        blocking.synchronize()
        np.testing.assert_allclose(x.get(), 2, rtol=RELATIVE["float32"])
