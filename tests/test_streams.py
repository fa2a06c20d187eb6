"""
Order, on a GPU: streams, graphs, threads and devices, on each of the three paths of a call.

A spinning kernel keeps one stream busy. What is queued behind it on that stream comes after what
was written there; what strays to another stream comes before, and is seen.
"""

import contextlib
import ctypes
import gc
import itertools
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from libraries import CuPyLibrary, TorchLibrary
from tolerances import RELATIVE, assert_alike

from cupy_headnorm import (
    CaptureError,
    HeadNorm,
    _dispatch,
    _interop,
    _kernels,
    layer_norm,
    reference,
    rms_norm,
)

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", exc_type=ImportError)

TOKENS, OTHER_TOKENS, HEADS, DIM = 64, 48, 4, 128
SHAPE = (TOKENS, HEADS, DIM)


class TorchStreams(TorchLibrary):
    allocates_in_graphs = True

    def __init__(self):
        super().__init__("cuda")

    def stream(self, default=False):
        return torch.cuda.default_stream() if default else torch.cuda.Stream()

    def on(self, stream):
        return torch.cuda.stream(stream)

    def handle(self, stream):
        return stream.cuda_stream

    def done(self, stream):
        return stream.query()

    def write(self, x, values):
        x.copy_(values)

    def allocated(self):
        return torch.cuda.memory_allocated()

    def counted(self, call, *arguments):
        """Return the result of a call, and how often it asked for memory."""
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        y = call(*arguments)
        return y, torch.cuda.memory_stats()["allocation.all.allocated"] - before

    @contextlib.contextmanager
    def capture(self):
        """Capture into a graph; what is yielded replays it afterwards."""
        # A norm in a cycle that is collected meanwhile would be freed, which a capture forbids.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph.replay

    def to_device_1(self, values):
        return self.array(values).to("cuda:1")

    @contextlib.contextmanager
    def stream_of_device_1(self):
        """Make a new stream the current one of device 1, while device 0 stays current."""
        before = torch.cuda.current_stream(1)
        stream = torch.cuda.Stream(1)
        try:
            torch.cuda.set_stream(stream)
            torch.cuda.set_device(0)
            yield stream
        finally:
            torch.cuda.set_stream(before)
            torch.cuda.set_device(0)


class CuPyStreams(CuPyLibrary):
    allocates_in_graphs = False

    def stream(self, default=False):
        return cupy.cuda.Stream.null if default else cupy.cuda.Stream(non_blocking=True)

    def on(self, stream):
        return stream

    def handle(self, stream):
        return stream.ptr

    def done(self, stream):
        return stream.done

    def write(self, x, values):
        x[...] = values

    def allocated(self):
        return cupy.get_default_memory_pool().used_bytes()

    def counted(self, call, *arguments):
        class Hook(cupy.cuda.MemoryHook):
            name = "Hook"
            count = 0

            def malloc_preprocess(self, **_):
                self.count += 1

        with Hook() as hook:
            return call(*arguments), hook.count

    @contextlib.contextmanager
    def capture(self):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            try:
                yield lambda: graph.launch(stream)
            finally:
                graph = stream.end_capture()

    def to_device_1(self, values):
        with cupy.cuda.Device(1):
            return cupy.array(values)

    @contextlib.contextmanager
    def stream_of_device_1(self):
        with cupy.cuda.Device(1):
            stream = cupy.cuda.Stream(non_blocking=True)
            stream.use()
        try:
            yield stream
        finally:
            with cupy.cuda.Device(1):
                cupy.cuda.Stream.null.use()


TORCH, CUPY = TorchStreams(), CuPyStreams()
OTHER = {"torch": CUPY, "cupy": TORCH}


@pytest.fixture(params=[TORCH, CUPY], ids=lambda library: library.name)
def library(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["default", "other"])
def stream(library, request):
    """The default stream of a library, or one of its others."""
    return library.stream(default=request.param)


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


@pytest.fixture(scope="module")
def spin():
    """Keep a stream busy for about 20 ms: whatever is queued elsewhere runs first."""
    torch.cuda.init()
    kernel = cupy.RawKernel(SPIN, "spin")

    def busy(handle, cycles=40_000_000):
        kernel((1,), (1,), (np.int64(cycles),), stream=SimpleNamespace(ptr=handle))

    busy(0, cycles=1)
    synchronize()
    return busy


def synchronize():
    cupy.cuda.runtime.deviceSynchronize()


def in_thread(function, *arguments):
    """Run `function` in a thread that is new, and gone afterwards."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


WAYS = {"first": ["step by step"], "remembered": [], "other length": ["derived"]}
"""The paths of a call, and what is listed of each by `taken`."""


@pytest.fixture(params=WAYS)
def path(request):
    return request.param


@pytest.fixture
def taken(monkeypatch):
    """Forget all calls, and list how those that follow leave the path of a remembered one."""
    ways = []
    step_by_step, over_rows = _dispatch.step_by_step, _kernels.over_rows

    def stepping(*arguments, **options):
        ways.append("step by step")
        return step_by_step(*arguments, **options)

    def deriving(*arguments):
        ways.append("derived")
        return over_rows(*arguments)

    monkeypatch.setattr(_dispatch, "_thread", _dispatch._Thread())
    monkeypatch.setattr(_dispatch, "_plans", {})
    monkeypatch.setattr(_dispatch, "step_by_step", stepping)
    monkeypatch.setattr(_kernels, "over_rows", deriving)
    return ways


def forget(*, plans=True):
    """Forget this thread's calls, and the plans of all."""
    _dispatch._thread.calls.clear()
    _dispatch._thread.families.clear()
    if plans:
        _dispatch._plans.clear()


@pytest.fixture(params=["norm", "function"])
def kind(request):
    return request.param


@pytest.fixture(params=["new", "in place", "given"])
def result(request):
    return request.param


@pytest.fixture
def call(library, kind, result, rng):
    return Call(library, kind, result, rng)


class Call:
    """A norm that holds its weight, or a function beside one, with one kind of result."""

    def __init__(self, library, kind, result, rng):
        self.library, self.result = library, result
        self.weight = rng.standard_normal(DIM).astype(np.float32)
        if kind == "norm":
            self.norm = HeadNorm(self.weight)
        else:
            weight = library.array(self.weight)
            self.norm = lambda x, out: rms_norm(x, weight, out=out)

    def __call__(self, x, out):
        return self.norm(x, out={"new": None, "in place": x, "given": out}[self.result])

    def expected(self, values):
        return reference.rms_norm(values, self.weight)

    def lead_to(self, path, taken, *, planned=False):
        """Let the next call of SHAPE take `path`, with everything loaded."""
        forget()
        tokens = OTHER_TOKENS if path == "other length" else TOKENS
        self(*(zeros(self.library, tokens) for _ in range(2)))
        if path == "first":
            forget(plans=not planned)
        synchronize()
        taken.clear()


def zeros(library, tokens=TOKENS):
    return library.array(np.zeros((tokens, HEADS, DIM), np.float32))


def normal(rng, shape=SHAPE):
    return rng.standard_normal(shape).astype(np.float32)


def reserve(library, x):
    """Have memory and the kernels of a test's own work at hand on this stream: asking may wait."""
    made = [x + x for _ in range(4)]
    library.write(made[0], made[1])


def elsewhere(library):
    """Return the other library, on a stream of its own: an adapter may ask the wrong one."""
    other = OTHER[library.name]
    return other, other.stream()


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
    loaded = dict(_kernels._functions)
    with library.capture() as replay:
        y = capture(x, out)
    assert _kernels._functions == loaded
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
    loaded = dict(_kernels._functions)
    with library.capture() as replay:
        for out in (x, y):
            with pytest.raises(
                CaptureError, match="the kernel for this layout is not loaded yet while the str"
            ):
                layer_norm(x, out=out)
            with pytest.raises(CaptureError, match=r"weight is not on cuda:0 yet .*warmup\(x\)"):
                norm(x, out=out)
        y += y
    assert _kernels._functions == loaded
    assert norm._held.on_device == {}
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
    (function,) = (f for key, f in _kernels._functions.items() if key[0].head_dim == head_dim)
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, "cuFuncIsLoaded"):
        pytest.skip("needs a driver of CUDA 12.4, which tells")
    state = ctypes.c_int(-1)
    assert driver.cuFuncIsLoaded(ctypes.byref(state), ctypes.c_void_p(function.ptr)) == 0
    return state.value == 1


def test_a_plan_miss_spares_another_threads_capture():
    """Compiling and uploading use no default stream, which would break a blocking stream's."""
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


def test_a_threads_first_work_may_be_a_norm(library, call, taken, rng):
    """A new thread has no CUDA context current, and no call to remember."""
    values = normal(rng)
    x, out = library.array(values), zeros(library)
    call.lead_to("remembered", taken)
    y = in_thread(call, x, out)
    assert taken == ["step by step"]
    synchronize()
    assert_alike(library.host(y), call.expected(values))


THREADS, ROUNDS = 4, 50


@pytest.fixture
def slow_launches(monkeypatch):
    """Let other threads run between a call's parameters and its launch."""
    launch = cupy.cuda.driver.launchKernel

    def slow(*arguments):
        time.sleep(1e-5)
        launch(*arguments)

    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", slow)


@pytest.mark.parametrize("kind", ["norm", "function"])
def test_threads_on_streams_of_their_own(kind, spin, slow_launches, taken, rng):
    """One norm and one layout for all: nothing but the threads keeps their parameters apart."""
    calls = {library: Call(library, kind, "in place", rng) for library in (TORCH, CUPY)}
    values = normal(rng, (2 * THREADS, 2, *SHAPE))
    together = threading.Barrier(2 * THREADS)

    def work(number):
        library = (TORCH, CUPY)[number % 2]
        norm = calls[library].norm
        stream = library.stream()
        with library.on(stream):
            sources = [library.array(part) for part in values[number]]
            right = [library.host(norm(source, out=None)) for source in sources]
            x = library.array(values[number][0])
            together.wait(20)
            for n in range(ROUNDS):
                spin(library.handle(stream), cycles=500_000)
                library.write(x, sources[n % 2])
                y = norm(x, out=None)
                norm(x, out=x)
                stream.synchronize()
                np.testing.assert_array_equal(library.host(y), right[n % 2])
                np.testing.assert_array_equal(library.host(x), right[n % 2])
        for part, bits in zip(values[number], right, strict=True):
            assert_alike(bits, calls[library].expected(part))

    with ThreadPoolExecutor(2 * THREADS) as pool:
        list(pool.map(work, range(2 * THREADS)))
    # In each thread the first of each result, and no more.
    assert taken.count("step by step") <= 2 * 2 * THREADS


def test_threads_leave_nothing_behind(library, taken):
    norms = [HeadNorm(np.ones(DIM, np.float32), eps=eps) for eps in (1e-6, 1e-5)]

    def work():
        for norm, tokens in itertools.product(norms, (TOKENS, OTHER_TOKENS, 5)):
            norm(norm(zeros(library, tokens)), out=zeros(library, tokens))
        return [weakref.ref(call.run) for call in _dispatch._thread.calls.values()]

    def sizes():
        return {
            (module.__name__, name): len(value)
            for module in (_dispatch, _interop, _kernels)
            for name, value in vars(module).items()
            if isinstance(value, dict | list | set) and not name.startswith("__")
        }

    in_thread(work)
    before = sizes()
    left = [call for _ in range(20) for call in in_thread(work)]
    synchronize()
    gc.collect()
    assert sizes() == before
    assert len(left) >= 20 * 6
    assert not any(call() for call in left)


def test_unloading_under_calls_of_other_threads(rng):
    """Two norms: memory that was freed too early is soon the other's weight."""
    values = normal(rng)
    weights = rng.standard_normal((2, DIM)).astype(np.float32)
    norms = [HeadNorm(weight) for weight in weights]
    right = [reference.rms_norm(values, weight) for weight in weights]
    stop = threading.Event()

    def work(number):
        library, rounds = (TORCH, CUPY)[number % 2], 0
        with library.on(library.stream()):
            x = library.array(values)
            while not stop.is_set():
                for norm, expected in zip(norms, right, strict=True):
                    assert_alike(library.host(norm(x)), expected)
                    rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, number) for number in range(4)]
        try:
            for n in range(200):
                norms[n % 2].unload()
                time.sleep(1e-3)
        finally:
            stop.set()
        assert all(done.result() > 4 for done in working)
    for norm in norms:
        norm.unload()
        assert norm._held.on_device == {}


SHIFTS = [(0, 1), (1, 0), (1, 1), (4, 2), (3, None), (2, 6)]
"""Elements of 2 bytes that x and out begin after the start of their memory."""


@pytest.mark.parametrize("shifts", SHIFTS, ids=str)
def test_another_alignment_is_another_plan(library, shifts, taken, rng):
    """The remembered kernel would read past what its address allows, which stops the GPU."""
    values = rng.standard_normal((16, 4, DIM)).astype(np.float16)
    norm = HeadNorm(rng.standard_normal(DIM).astype(np.float32))

    def shifted(by):
        flat = library.array(np.zeros(values.size + 16, np.float16))
        x = flat[by : by + values.size].reshape(values.shape)
        library.write(x, library.array(values))
        return x

    x_shift, out_shift = shifts
    right = library.host(norm(shifted(0)))
    norm(shifted(0), out=shifted(0))
    # The plans are made per alignment in bytes up to 16: 8 elements on, all is known again.
    for further, ways in ((0, ["step by step"]), (0, []), (8, [])):
        taken.clear()
        x = shifted(x_shift + further)
        out = None if out_shift is None else shifted(out_shift + further)
        np.testing.assert_array_equal(library.host(norm(x, out=out)), right)
        assert taken == ways


def test_overlap_is_refused_when_the_call_is_remembered(library, taken, rng):
    memory = library.array(normal(rng, (12, 4, DIM)))
    before = library.host(memory)
    norm = HeadNorm(np.ones(DIM, np.float32))
    norm(memory[:4], out=memory[8:])
    for first in (2, 1):
        with pytest.raises(ValueError, match="out overlaps x in part"):
            norm(memory[:4], out=memory[first : first + 4])
    taken.clear()
    norm(memory[:4], out=memory[4:8])  # side by side is apart
    assert taken == []
    after = library.host(memory)
    np.testing.assert_array_equal(after[:4], before[:4])
    assert_alike(after[4:8], reference.rms_norm(before[:4]))
    np.testing.assert_array_equal(after[8:], after[4:8])


class Subclass(torch.Tensor):
    pass


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


REFUSED = {
    "gradient": (lambda x: x.clone().requires_grad_(), "requires grad and grad mode is on"),
    "negated": (torch._neg_view, "a lazily negated view"),
    "subclass": (lambda x: x.as_subclass(Subclass), "a Subclass, a subclass of torch.Tensor"),
    "sparse": (lambda x: x.to_sparse(), "of layout torch.sparse_coo"),
    "meta": (lambda x: x.to("meta"), "on the meta device, without memory"),
    "fake": (fake, "a FakeTensor, a subclass of torch.Tensor"),
    "functional": (torch._to_functional_tensor, "functional, without memory of its own"),
    "integer": (lambda x: x.int(), "has dtype int32"),
}


def remembered(taken):
    """Return a norm and arrays whose calls are remembered, and a check that they still are."""
    norm = HeadNorm(np.full(DIM, 2, np.float32))
    values = np.full(SHAPE, 3, np.float32)
    x, y, weight = (TORCH.array(part) for part in (values, values, np.ones(DIM, np.float32)))
    calls = (
        lambda: norm(x),
        lambda: norm(x, out=y),
        lambda: norm(x.clone(), out=None),
        lambda: norm(x[0])[None],
        lambda: norm(y, out=y),
        lambda: 2 * rms_norm(x, weight),
        lambda: 2 * rms_norm(x, weight, out=y),
    )
    for call in calls:
        call()

    def check():
        taken.clear()
        for call in calls:
            np.testing.assert_allclose(TORCH.host(call()), 2, rtol=2 * RELATIVE["float32"])
        assert taken == []

    check()
    return norm, x, y, weight, check


@pytest.mark.parametrize("refused", REFUSED)
def test_what_first_calls_refuse_remembered_ones_do(refused, taken):
    make, message = REFUSED[refused]
    norm, x, y, weight, check = remembered(taken)
    bad, bad_weight = make(x), make(weight)
    for call in (
        lambda: norm(bad),
        lambda: norm(bad, out=bad),
        lambda: norm(bad, out=y),
        lambda: norm(x, out=bad),
        lambda: rms_norm(x, bad_weight),
        lambda: rms_norm(bad, weight, out=y),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    synchronize()
    assert (x == 3).all()
    check()


def in_dual_level(norm, x):
    with torch.autograd.forward_ad.dual_level():
        norm(torch.autograd.forward_ad.make_dual(x, x))


def under_fake_mode(norm, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        norm(x)


def under_make_fx(norm, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(lambda t: norm(t))(x)


TRACED = {
    "vmap": (
        lambda norm, x: torch.func.vmap(lambda t: norm(t))(x),
        "inside a torch.func transform",
    ),
    "grad": (
        lambda norm, x: torch.func.grad(lambda t: norm(t).sum())(x),
        "inside a torch.func transform",
    ),
    "dual": (in_dual_level, "a forward-mode AD dual"),
    "fake mode": (under_fake_mode, "traced by .*FakeTensorMode"),
    "make_fx": (under_make_fx, "traced by make_fx"),
    "jit": (lambda norm, x: torch.jit.trace(lambda t: norm(t), x), "traced by torch.jit.trace"),
}


@pytest.mark.parametrize("traced", TRACED)
def test_remembered_calls_are_refused_where_they_would_be_lost(traced, taken):
    trace, message = TRACED[traced]
    norm, x, _, _, check = remembered(taken)
    with pytest.raises(TypeError, match=message):
        trace(norm, x)
    check()


class Devices:
    """CUDA's current device as the launches see it: 1, while all arrays are on 0."""

    def __init__(self, monkeypatch):
        self.current = 1
        self.events = []
        self.broken = False
        self._launch = cupy.cuda.driver.launchKernel
        runtime, driver = cupy.cuda.runtime, cupy.cuda.driver
        monkeypatch.setattr(runtime, "getDeviceCount", lambda: 2)
        monkeypatch.setattr(runtime, "getDevice", lambda: self.current)
        monkeypatch.setattr(runtime, "setDevice", self._set)
        monkeypatch.setattr(driver, "launchKernel", self._start)

    def _set(self, index):
        self.events.append(index)
        self.current = index

    def _start(self, *arguments):
        self.events.append("launch")
        if self.broken:
            raise RuntimeError("the launch failed")
        self._launch(*arguments)


def test_the_device_of_the_arrays_is_made_current(library, path, call, taken, monkeypatch, rng):
    """The logic, on one GPU: CuPy and torch themselves do not see what is patched here."""
    call.lead_to("remembered", taken)  # the library is met and the kernel loaded
    devices = Devices(monkeypatch)
    call.lead_to(path, taken)
    values = normal(rng)
    x, out = library.array(values), zeros(library)
    devices.events.clear()
    y = call(x, out)
    assert taken == WAYS[path]
    assert devices.events == [0, "launch", 1]
    synchronize()
    assert_alike(library.host(y), call.expected(values))
    devices.events.clear()
    devices.broken = True
    with pytest.raises(RuntimeError, match="the launch failed"):
        call(x, out)
    assert devices.events == [0, "launch", 1], "the device that was current is so again"
    devices.events.clear()
    devices.broken, devices.current = False, 0
    call(x, out)
    assert devices.events == ["launch"], "nothing is switched where the device is current"


needs_two_gpus = pytest.mark.two_gpus


@pytest.fixture
def second_device():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a second CUDA device")


@needs_two_gpus
@pytest.mark.parametrize("producer", ["torch", "cupy", "another"])
def test_a_device_that_is_not_current(second_device, producer, rng):
    values = normal(rng, (16, 4, DIM))
    norm = HeadNorm(np.ones(DIM, np.float32))
    x = {"torch": TORCH, "cupy": CUPY, "another": CUPY}[producer].to_device_1(values)
    if producer == "another":
        x = Another(x, cupy)
    for _ in range(2):
        y = norm(x)
    host = y.cpu().numpy() if producer == "torch" else y.get()
    assert_alike(host, reference.rms_norm(values))
    assert cupy.cuda.runtime.getDevice() == 0
    norm.unload()
    assert_alike(HeadNorm().forward_reference(values), reference.rms_norm(values))


@needs_two_gpus
def test_a_stream_of_a_device_that_is_not_current(
    second_device, library, path, result, taken, spin, rng
):
    values = normal(rng)
    call = Call(library, "norm", result, rng)
    x, out, source = (library.to_device_1(values) for _ in range(3))
    # What is known on device 0 is not known on device 1.
    call.lead_to("remembered", taken)
    tokens = OTHER_TOKENS if path == "other length" else TOKENS
    call(x[:tokens], out[:tokens])
    assert taken == ["step by step"]
    if path == "first":
        forget()
    with library.stream_of_device_1() as stream:
        with cupy.cuda.Device(1), torch.cuda.device(1):  # which leave the streams as they are
            library.write(x, source - source)
            reserve(library, x)
            spin(0, cycles=1)
            synchronize()
            spin(library.handle(stream))
            library.write(x, source)
        assert cupy.cuda.runtime.getDevice() == 0
        taken.clear()
        y = call(x, out)
        assert taken == WAYS[path]
        assert cupy.cuda.runtime.getDevice() == 0
        stream.synchronize()
    assert_alike(library.host(y), call.expected(values))


class Another:
    """CuPy memory behind nothing but DLPack and a namespace."""

    def __init__(self, array, namespace):
        self.array = array
        self.namespace = namespace

    def __dlpack__(self, *, stream=None, **options):
        with self.array.device:
            return self.array.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return self.namespace


def test_another_dlpack_producer_on_the_gpu(rng):
    values = rng.standard_normal((64, 4, 128)).astype(ml_dtypes.bfloat16)
    x = cupy.asarray(values)
    plain = rms_norm(x).get()
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with stream:
            for _ in range(3):
                y = rms_norm(Another(x, cupy))
            np.testing.assert_array_equal(y.get(), plain)
            stream.synchronize()
            rms_norm(Another(x, cupy))
            in_flight = len(_interop._DLPACK._in_flight)
            assert in_flight <= 1, "capsules are let go once their kernel has run"
    assert HeadNorm().forward_reference(Another(x, cupy)).shape == x.shape


def test_weights_of_another_producer_are_kept_too(spin, rng):
    """A producer that exports a temporary: nothing but its capsule keeps the memory."""

    class Temporary(Another):
        def __dlpack__(self, **options):
            copy = self.array.copy()
            self.exported = weakref.ref(copy)
            return copy.__dlpack__(**options)

    values = cupy.asarray(normal(rng))
    x, weight = Temporary(values, cupy), Temporary(values[0, 0], cupy)
    rms_norm(x, weight)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        spin(stream.ptr)
        rms_norm(x, weight)
        assert not stream.done
        assert x.exported() is not None
        assert weight.exported() is not None
        stream.synchronize()


def test_another_producers_work_is_queued_on_cupys_stream(spin, rng):
    values = normal(rng)
    source, x = cupy.asarray(values), zeros(CUPY)
    norm = HeadNorm(np.ones(DIM, np.float32))
    norm(Another(x, cupy))
    stream = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream()), stream:
        reserve(CUPY, x)
        synchronize()
        spin(stream.ptr)
        x[...] = source
        y = norm(Another(x, cupy))
        assert not stream.done
        stream.synchronize()
        assert_alike(y.get(), reference.rms_norm(values))
