"""
Clocks: graphs replayed over rotated buffers on a GPU, the wall clock on the host.

On a GPU a time is the median over replays of a graph of calls, so that launching is not in the
number. The calls walk through up to 64 sets of buffers, 512 MB of them where a call moves 8 MB or
more; the sets of a call that moves less than 0.8 MB fit an H100's L2, for everyone alike. The
ceiling is the better of a device-to-device copy and an in-place multiply of as many contiguous
bytes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import numpy as np

from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm._cuda import environment

_ROTATION_BYTES = 512 * 1024 * 1024
"""All buffers together have so many: ten times an H100's L2."""
_SETS = 64
_CALLS = 12
"""A graph has so many at least, so that its own launch does not count."""
_REPLAYS = 15
_HOST_SECONDS = 1.0
"""On the host no call is repeated for longer than this."""

Call = Callable[[int], Any]
"""It works on the buffers of that number and returns the result."""


class _Arrays(contextlib.ExitStack):
    """Makes arrays of one library, and copies them; it is entered before and left after."""

    name: str
    """The library: ``numpy`` on the host, ``cupy`` or ``torch`` on a GPU."""
    rounds = 1
    xp: Any = np

    def array(self, values: np.ndarray) -> Any:
        """Copy `values`."""
        return self.xp.array(values)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """Return new memory."""
        return self.xp.empty(shape, dtype.numpy)

    def host(self, array: Any) -> np.ndarray:
        """Return `array`, of any of the libraries, as float64 on the host."""
        if hasattr(array, "double"):  # NumPy cannot read torch's bfloat16
            array = array.double().cpu()
        return np.asarray(array.get() if hasattr(array, "get") else array, np.float64)

    def copy(self, to: Any, source: Any) -> None:
        """Copy contiguous bytes; torch uses the driver's own copy."""
        to[:] = source

    def multiply(self, array: Any) -> None:
        """Read and write every element in place."""
        self.xp.multiply(array, array.dtype.type(1), out=array)


class Host(_Arrays):
    """Times calls on NumPy arrays by the clock."""

    name = "numpy"

    def rotation(self, nbytes: int) -> int:
        """Return how many sets of buffers to walk through."""
        return 2

    def microseconds(self, call: Call, buffers: int) -> float:
        """Return the time of ``call(i)``, i walking through the buffers."""
        for i in range(buffers):
            call(i)
        began = time.perf_counter()
        call(0)
        # A millisecond of calls between two looks at the clock.
        number = int(np.clip(1e-3 / (time.perf_counter() - began), 1, 1000))
        times: list[float] = []
        while len(times) < 3 or (
            len(times) < _REPLAYS and time.perf_counter() - began < _HOST_SECONDS
        ):
            start = time.perf_counter()
            for i in range(number):
                call((len(times) + i) % buffers)
            times.append((time.perf_counter() - start) * 1e6 / number)
        return statistics.median(times)


class _OnGpu(_Arrays):
    rounds = 3
    """
    Their median counts: for some milliseconds a GPU may be 4 % slower. Of 300 times of one round
    each on an H100 1 to 4 were, others each time.
    """
    stream: Any
    _event: Callable[[], Any]
    _elapsed: Callable[[Any, Any], float]
    _captured: Callable[[Iterator[Any]], Callable[[], Any]]
    """It records calls, each of which runs when it is next, and returns the replay."""

    def rotation(self, nbytes: int) -> int:
        """Return how many sets of `nbytes` to walk through."""
        return int(np.clip(_ROTATION_BYTES // max(nbytes, 1), 2, _SETS))

    def microseconds(self, call: Call, buffers: int) -> float:
        """Return the device time of ``call(i)``, i walking through the buffers."""
        count, times = max(buffers, _CALLS), []
        for i in range(buffers):
            call(i)
        self.stream.synchronize()
        replay = self._captured(call(i % buffers) for i in range(count))
        replay()
        for _ in range(_REPLAYS):
            start, stop = self._event(), self._event()
            start.record(self.stream)
            replay()
            stop.record(self.stream)
            stop.synchronize()
            times.append(self._elapsed(start, stop))
        return statistics.median(times) * 1e3 / count


class Gpu(_OnGpu):
    """Times calls on CuPy arrays, on a stream of its own."""

    name = "cupy"

    def __init__(self) -> None:
        super().__init__()
        self.xp = environment.import_cupy()
        self._event, self._elapsed = self.xp.cuda.Event, self.xp.cuda.get_elapsed_time
        self.stream = self.xp.cuda.Stream(non_blocking=True)

    def __enter__(self) -> Self:
        self.enter_context(self.stream)
        return self

    def copy(self, to: Any, source: Any) -> None:
        """Copy contiguous bytes with the driver's own copy."""
        runtime, kind = self.xp.cuda.runtime, 3  # cudaMemcpyDeviceToDevice
        runtime.memcpyAsync(to.data.ptr, source.data.ptr, source.nbytes, kind, self.stream.ptr)

    def _captured(self, calls: Iterator[Any]) -> Callable[[], Any]:
        self.stream.begin_capture()
        try:
            for _ in calls:
                pass
        finally:
            graph = self.stream.end_capture()
        return partial(graph.launch, self.stream)


class TorchGpu(_OnGpu):
    """Times calls on torch tensors, on a stream of its own, in inference mode."""

    name = "torch"

    def __init__(self) -> None:
        super().__init__()
        import torch

        self.xp = torch
        self._event = partial(self.xp.cuda.Event, enable_timing=True)
        self._elapsed = self.xp.cuda.Event.elapsed_time
        self.stream = self.xp.cuda.Stream()

    def __enter__(self) -> Self:
        self.enter_context(self.xp.inference_mode())
        self.enter_context(self.xp.cuda.stream(self.stream))
        return self

    def array(self, values: np.ndarray) -> Any:
        """Copy `values` to the device."""
        return as_torch(values).to("cuda")

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """Return new memory."""
        return self.xp.empty(shape, dtype=getattr(self.xp, dtype.name), device="cuda")

    def multiply(self, array: Any) -> None:
        """Read and write every element in place."""
        array.mul_(1)

    def _captured(self, calls: Iterator[Any]) -> Callable[[], Any]:
        graph = self.xp.cuda.CUDAGraph()
        with self.xp.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            # Results are kept, so that each call writes to memory of its own: the graph's pool
            # would hand the same block out again, and its writes would stay in the L2.
            kept = list(calls)
        return lambda: (graph.replay(), kept)


Timer = Gpu | TorchGpu | Host


def as_torch(array: Any) -> Any:
    """Return a torch tensor over the memory of a NumPy array; anything else as it is."""
    import torch

    if not isinstance(array, np.ndarray):
        return array
    # NumPy cannot hand bfloat16 to torch, but its bits.
    bits = torch.from_numpy(array.view(f"i{array.itemsize}"))
    return bits.view(getattr(torch, array.dtype.name))


def torch_on_gpu() -> str:
    """Return why torch cannot use the GPU; empty where it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed; needs: pip install torch"
    except Exception as error:
        return f"torch does not import ({error})"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def timer() -> Timer:
    """Return the timer that the most providers run under: torch's, else CuPy's, else the host's."""
    if environment.environment().reason:
        return Host()
    return Gpu() if torch_on_gpu() else TorchGpu()
