"""NumPy, CuPy, JAX and everything that speaks DLPack: one adapter each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cupy_headnorm._arrays import dlpack, dtypes
from cupy_headnorm._arrays.dtypes import NUMBERS, Allowed
from cupy_headnorm._arrays.layout import CPU, Device, Layout, alignment_of, dense_like
from cupy_headnorm._arrays.messages import shown
from cupy_headnorm._arrays.views import ArrayView, Plain, view_of
from cupy_headnorm._cuda import environment


class NumPy(Plain):
    name = "numpy"

    def view(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> ArrayView:
        if type(x) not in (np.ndarray, np.memmap):
            raise TypeError(
                f"{role} is a {type(x).__name__}, whose meaning a norm would drop; "
                "needs a plain numpy.ndarray"
            )
        pointer = x.ctypes.data
        dtype = dtypes.from_numpy(x.dtype, role, allowed)
        layout = Layout(x.shape, x.strides, dtype, CPU, alignment_of(pointer))
        return ArrayView(pointer, layout, x.flags.writeable, x, self)

    def empty_like(self, view: ArrayView) -> tuple[Any, None]:
        return dense_like(view.as_numpy(), partial(np.empty_like, subok=False)), None

    def stream(self, index: int, /) -> int:
        raise NotImplementedError("host memory has no stream")

    def to_host(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> np.ndarray:
        self.view(x, role, allowed)
        return np.asarray(x)

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        return values


class CuPy(Plain):
    name = "cupy"

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.plain = (cupy.ndarray,)
        self._current_stream = cupy.cuda.get_current_stream
        self._current_device = cupy.cuda.runtime.getDevice

    def glance(self, x: Any, /) -> tuple[int, tuple[Any, ...]] | None:
        memory = x.data
        address = memory.ptr
        if not address:
            return None
        return address, (memory.device_id, x.shape, x.strides, x.dtype, address & 15)

    def address(self, x: Any) -> int:
        address: int = x.data.ptr
        return address

    def view(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> ArrayView:
        if type(x) is not self._cupy.ndarray:
            raise TypeError(
                f"{role} is a {type(x).__name__}, whose meaning a norm would drop; "
                "needs a plain cupy.ndarray"
            )
        pointer = x.data.ptr
        dtype = dtypes.from_numpy(x.dtype, role, allowed)
        device = Device("cuda", x.data.device_id)
        layout = Layout(x.shape, x.strides, dtype, device, alignment_of(pointer))
        return ArrayView(pointer, layout, True, x, self)

    def empty_like(self, view: ArrayView) -> tuple[Any, Callable[[Any], Any]]:
        cupy, index = self._cupy, view.layout.device.index
        with cupy.cuda.Device(index):
            result = dense_like(view.owner, cupy.empty_like)
        if not result.flags.c_contiguous:
            return result, lambda x: self.empty_like(self.view(x, "x"))[0]
        new, dtype, current_device = cupy.ndarray, result.dtype, self._current_device

        def another(x: Any) -> Any:
            # On an H100's host: cupy.ndarray 2.1 us, cupy.empty 2.5, cupy.empty_like 4.8.
            if current_device() == index:
                return new(x.shape, dtype)
            with cupy.cuda.Device(index):
                return new(x.shape, dtype)

        return result, another

    def stream(self, index: int, /) -> int:
        handle: int = self._current_stream(index).ptr
        return handle

    def to_host(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> np.ndarray:
        self.view(x, role, allowed)
        values: np.ndarray = x.get()
        return values

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        with self._cupy.cuda.Device(like.layout.device.index):
            return self._cupy.asarray(values)


class DLPack(Plain):
    """Any other producer: read through a capsule, results through its namespace."""

    name = "DLPack"
    takes_out = False

    def __init__(self) -> None:
        self._in_flight: dict[object, tuple[Any, Any]] = {}

    def view(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> ArrayView:
        if role == "out":
            raise TypeError(
                f"out is a {type(x).__name__}, which may forbid writing; "
                "needs a NumPy, CuPy or torch array"
            )
        place = x.__dlpack_device__()
        try:
            kind, index = place
        except (TypeError, ValueError):
            raise TypeError(
                f"__dlpack_device__ of {role} returned {shown(place)}; needs a pair, of "
                "DLPack's device type and an index"
            ) from None
        on_cuda = kind in (dlpack.CUDA, dlpack.CUDA_MANAGED)
        # DLPack's name for the legacy default stream is 1.
        stream = (self.stream(index) or 1) if on_cuda else None
        try:
            capsule = x.__dlpack__(stream=stream, max_version=(1, 3))
        except TypeError:  # a producer from before DLPack 1.0
            capsule = None
        if capsule is None:
            capsule = x.__dlpack__(stream=stream)
        raw = dlpack.read_capsule(capsule, role)
        dtype = dtypes.from_dlpack(*raw.dtype, role, allowed)
        view = view_of(raw, dtype, role, (x, capsule), self)
        if role in RESULTS_OF:
            self._check_way_back(x, view, role)
        return view

    def _check_way_back(self, x: Any, view: ArrayView, role: str) -> None:
        namespace = getattr(x, "__array_namespace__", None)
        if namespace is None or not hasattr(namespace(), "from_dlpack"):
            raise TypeError(
                f"{role} is a {type(x).__name__} without a namespace that has from_dlpack, for the "
                f"result; needs numpy.from_dlpack({role}) or cupy.from_dlpack({role}) instead"
            )
        if view.layout.device.kind == "cpu" and view.layout.dtype.name == "bfloat16":
            raise TypeError(
                f"{role} is a bfloat16 {type(x).__name__} on the host, where NumPy makes the "
                "result and cannot hand bfloat16 on; needs another dtype, or a torch or NumPy array"
            )

    def empty_like(self, view: ArrayView) -> tuple[Any, None]:
        shape, dtype = view.layout.shape, view.layout.dtype.numpy
        if view.layout.device.kind == "cpu":
            return np.empty(shape, dtype), None
        cupy = environment.import_cupy()
        with cupy.cuda.Device(view.layout.device.index):
            return cupy.empty(shape, dtype), None

    def deliver(self, result: Any, like: ArrayView) -> Any:
        from_dlpack = like.owner[0].__array_namespace__().from_dlpack
        if like.layout.device.kind == "cpu":
            return from_dlpack(result)
        # The consumer waits for the device's current stream, on which the kernel was queued.
        with environment.import_cupy().cuda.Device(like.layout.device.index):
            return from_dlpack(result)

    def stream(self, index: int, /) -> int:
        handle: int = environment.import_cupy().cuda.get_current_stream(index).ptr
        return handle

    def launched(self, owners: tuple[Any, ...], index: int, stream: int) -> None:
        # Nobody else keeps the producers' memory from being reused while the kernel reads it. The
        # last call's is let go by the next one.
        cupy = environment.import_cupy()
        with cupy.cuda.Device(index):
            event = cupy.cuda.Event(disable_timing=True)
            cupy.cuda.runtime.eventRecord(event.ptr, stream)
        # Without a lock: a deleter may run anything, and so may a signal's handler.
        self._in_flight[object()] = event, owners
        for key, (earlier, _) in self._in_flight.copy().items():
            if not earlier.done:
                break
            self._in_flight.pop(key, None)

    def wrote(self, arrays: tuple[Any, ...], /) -> None:
        raise NotImplementedError("out is refused when it is viewed")

    def to_host(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> np.ndarray:
        view = self.view(x, role, allowed)
        if view.layout.device.kind == "cuda":
            values: np.ndarray = environment.import_cupy().from_dlpack(x).get()
            return values
        return view.as_numpy()

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        result, _ = self.empty_like(like)
        if isinstance(result, np.ndarray):
            return self.deliver(values, like)
        result.set(values)
        return self.deliver(result, like)


class JAX(DLPack):
    """Eager JAX arrays, which are never written; JAX itself takes what NumPy made."""

    name = "jax"

    def __init__(self, jax: Any) -> None:
        super().__init__()
        self._jax = jax

    def view(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> ArrayView:
        self._refuse(x, role, allowed)
        return super().view(x, role, allowed)

    def _refuse(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> None:
        if role == "out":
            raise TypeError(
                "out is a jax.Array, which is immutable: JAX may share its memory; "
                "needs a call without out"
            )
        if x.is_deleted():
            raise TypeError(f"{role} is a jax.Array that was deleted or donated; needs its memory")
        devices = len(x.sharding.device_set)
        if devices > 1:
            raise TypeError(
                f"{role} is a jax.Array on {devices} devices; needs one on a single device, "
                f"such as the data of each of {role}.addressable_shards"
            )
        dtypes.from_numpy(x.dtype, role, allowed)

    def _check_way_back(self, x: Any, view: ArrayView, role: str) -> None:
        if view.layout.dtype.name == "float64" and not self._jax.config.jax_enable_x64:
            raise TypeError(
                f"{role} is float64 while jax_enable_x64 is off, where JAX makes every result "
                "float32; needs jax.enable_x64(True) around the call, or another dtype"
            )

    def deliver(self, result: Any, like: ArrayView) -> Any:
        if like.layout.device.kind == "cpu":
            return self.from_host(result, like)
        return super().deliver(result, like)

    def to_host(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> np.ndarray:
        self._refuse(x, role, allowed)
        return np.asarray(x)

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        # NumPy cannot hand on bfloat16 by DLPack, nor does DLPack tell JAX's host devices apart.
        x, _ = like.owner
        return self._jax.device_put(values, x.sharding)


RESULTS_OF = {"x", "q", "k", "v"}
"""Roles of arrays that results are made like."""
