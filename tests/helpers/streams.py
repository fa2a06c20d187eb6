"""
Streams, graphs and memory of torch and CuPy on a GPU, and the three paths of a call there.

A spinning kernel keeps one stream busy. What is queued behind it on that stream comes after what
was written there; what strays to another stream comes before, and is seen.
"""

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from libraries import CuPyLibrary, TorchLibrary
from stand_in import forget_calls

from cupy_headnorm import HeadNorm, reference, rms_norm
from cupy_headnorm._calls import dispatch, remembered
from cupy_headnorm._plans import head_norm, qk_norm_rope

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
        # A graph in a cycle that is collected meanwhile would be freed, which a capture forbids.
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

    def listing(module, name, way):
        function = getattr(module, name)

        def listed(*arguments, **options):
            ways.append(way)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, listed)

    forget_calls(monkeypatch)
    listing(dispatch, "step_by_step", "step by step")
    listing(head_norm, "over", "derived")
    listing(qk_norm_rope, "over", "derived")
    return ways


def forget(*, plans=True):
    """Forget this thread's calls, and the plans of all."""
    remembered.thread.calls.clear()
    remembered.thread.lengths.clear()
    if plans:
        dispatch.plans.clear()


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
