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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm._cuda import environment

_ROTATION_BYTES = 512 * 1024 * 1024
"""Of all buffers together: ten times an H100's L2."""
_SETS = 64
_CALLS = 12
"""In a graph at least, so that its own launch does not count."""
_REPLAYS = 15
_HOST_SECONDS = 1.0
"""On the host no call is repeated for longer than this."""

Call = Callable[[int], Any]
"""Works on the buffers of that number and returns the result."""


def _replays(
    replay: Callable[[], None], event: Callable[[], Any], elapsed: Callable[..., float], stream: Any
) -> float:
    """Return the median of the milliseconds between two events around a replay."""
    replay()
    times = []
    for _ in range(_REPLAYS):
        start, stop = event(), event()
        start.record(stream)
        replay()
        stop.record(stream)
        stop.synchronize()
        times.append(elapsed(start, stop))
    return statistics.median(times)


class _OnGpu(ABC):
    """What both GPU timers share."""

    rounds = 3
    """
    The median of which counts: for some milliseconds a GPU may be 4 % slower. Of 300 times of one
    round each on an H100 1 to 4 were, others each time.
    """

    def rotation(self, nbytes: int) -> int:
        """Return how many sets of `nbytes` to walk through."""
        return int(np.clip(_ROTATION_BYTES // max(nbytes, 1), 2, _SETS))

    def microseconds(self, call: Call, buffers: int) -> float:
        """Return the device time of ``call(i)``, i walking through the buffers."""
        count = max(buffers, _CALLS)
        for i in range(buffers):
            call(i)
        calls = (call(i % buffers) for i in range(count))
        return self._milliseconds(calls) * 1e3 / count

    @abstractmethod
    def _milliseconds(self, calls: Iterator[Any]) -> float:
        """Return the device time of a graph of `calls`, each of which runs when it is next."""


class Gpu(_OnGpu):
    """Times calls on CuPy arrays, on a stream of its own."""

    name = "cupy"

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def __enter__(self) -> Gpu:
        self.stream.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stream.__exit__(*raised)

    def array(self, values: np.ndarray) -> Any:
        """Copy `values` to the device."""
        return self.xp.array(values)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """Return new memory."""
        return self.xp.empty(shape, dtype.numpy)

    def host(self, array: Any) -> np.ndarray:
        """Return `array` as float64 on the host."""
        values: np.ndarray = array.get()
        return values.astype(np.float64)

    def copy(self, to: Any, source: Any) -> None:
        """Copy contiguous bytes with the driver's own copy."""
        device_to_device = 3  # cudaMemcpyDeviceToDevice
        self.xp.cuda.runtime.memcpyAsync(
            to.data.ptr, source.data.ptr, source.nbytes, device_to_device, self.stream.ptr
        )

    def multiply(self, array: Any) -> None:
        """Read and write every element in place."""
        self.xp.multiply(array, array.dtype.type(1), out=array)

    def _milliseconds(self, calls: Iterator[Any]) -> float:
        stream, cuda = self.stream, self.xp.cuda
        stream.synchronize()
        stream.begin_capture()
        try:
            for _ in calls:
                pass
        finally:
            graph = stream.end_capture()
        return _replays(lambda: graph.launch(stream), cuda.Event, cuda.get_elapsed_time, stream)


class TorchGpu(_OnGpu):
    """Times calls on torch tensors, on a stream of its own, in inference mode."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch  # annotated in part
        self._stream = self._torch.cuda.Stream()
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> TorchGpu:
        self._entered.enter_context(self._torch.inference_mode())
        self._entered.enter_context(self._torch.cuda.stream(self._stream))
        return self

    def __exit__(self, *raised: object) -> None:
        self._entered.close()

    def array(self, values: np.ndarray) -> Any:
        """Copy `values` to the device."""
        return as_torch(values).to("cuda")

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """Return new memory."""
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype.name), device="cuda")

    def host(self, array: Any) -> np.ndarray:
        """Return `array` as float64 on the host."""
        values: np.ndarray = array.double().cpu().numpy()
        return values

    def copy(self, to: Any, source: Any) -> None:
        """Copy contiguous bytes: torch asks the driver's own copy."""
        to.copy_(source)

    def multiply(self, array: Any) -> None:
        """Read and write every element in place."""
        array.mul_(1)

    def _milliseconds(self, calls: Iterator[Any]) -> float:
        cuda, stream = self._torch.cuda, self._stream
        stream.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            # Results are kept, so that each call writes to memory of its own: the graph's pool
            # would hand the same block out again, and its writes would stay in the L2.
            kept = list(calls)
        spent = _replays(
            graph.replay,
            lambda: cuda.Event(enable_timing=True),
            lambda start, stop: start.elapsed_time(stop),
            stream,
        )
        del kept
        return spent


class Host:
    """Times calls on NumPy arrays by the clock."""

    name = "numpy"
    rounds = 1
    xp = np

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def rotation(self, nbytes: int) -> int:
        """Return how many sets of buffers to walk through."""
        return 2

    def array(self, values: np.ndarray) -> Any:
        """Copy `values`."""
        return values.copy()

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """Return new memory."""
        return np.empty(shape, dtype.numpy)

    def host(self, array: Any) -> np.ndarray:
        """Return `array`, of NumPy or torch, as float64."""
        return np.asarray(array if isinstance(array, np.ndarray) else array.double(), np.float64)

    def copy(self, to: Any, source: Any) -> None:
        """Copy an array."""
        np.copyto(to, source)

    def multiply(self, array: Any) -> None:
        """Read and write every element in place."""
        np.multiply(array, array.dtype.type(1), out=array)

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


Timer = Gpu | TorchGpu | Host


def as_torch(values: np.ndarray) -> Any:
    """Return a torch tensor over the memory of `values`."""
    import torch

    # NumPy cannot hand bfloat16 to torch, but its bits.
    bits = torch.from_numpy(values.view(f"i{values.itemsize}"))
    return bits.view(getattr(torch, values.dtype.name))


def backend() -> Gpu | Host:
    """Return the GPU's timer where a GPU can be used, else the host's."""
    return Host() if environment.environment().reason else Gpu()


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
    return backend() if environment.environment().reason or torch_on_gpu() else TorchGpu()
