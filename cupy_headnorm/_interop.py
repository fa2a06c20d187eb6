"""
Any array in, an `ArrayView` out; results in the producer's library, on the producer's stream.

Libraries are found in `sys.modules` and never imported: whoever holds a tensor has imported its
library already. Nothing here copies an element.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupy_headnorm import _dlpack, _driver, _dtypes
from cupy_headnorm._layout import CPU, Device, Layout, alignment_of, as_numpy, dense_like


def import_cupy() -> Any:
    """Return the cupy module; GPUUnavailableError, with the command that mends it, without one."""
    try:
        import cupy
    except ImportError as error:
        raise _driver.GPUUnavailableError(
            f"CuPy is not usable ({error}); needs: {_driver.install_command()}"
        ) from error
    except Exception as error:
        # Since 14.1 the import makes the kernel cache folder, with an OSError where it cannot.
        raise _driver.GPUUnavailableError(
            f"importing CuPy failed ({type(error).__name__}: {error}); needs a writeable cache "
            "folder: set CUPY_CACHE_DIR to one"
        ) from error
    return cupy


class ArrayView(NamedTuple):
    """What the rest of the library sees of an array."""

    pointer: int
    layout: Layout
    writeable: bool
    owner: Any
    """The array itself, or what else keeps its memory alive."""
    library: Library

    def as_numpy(self) -> np.ndarray:
        """Return host memory as a NumPy array, without a copy."""
        if type(self.owner) is np.ndarray:
            return self.owner
        return as_numpy(self.pointer, self.layout, self.owner, self.writeable)


class Library(Protocol):
    """What the library asks of NumPy, CuPy, torch and everything that speaks DLPack."""

    name: str

    def view(self, x: Any, role: str) -> ArrayView:
        """Describe `x`; TypeError or ValueError, naming `role`, where it cannot be used."""

    def empty_like(self, view: ArrayView) -> Any:
        """Return new memory for a result: the last axis has stride 1."""

    def deliver(self, result: Any, like: ArrayView) -> Any:
        """Turn what `empty_like` gave into the producer's array."""

    def stream(self, index: int) -> int:
        """Return the handle of the current stream on CUDA device `index`."""

    def launched(self, owners: tuple[Any, ...], stream: int) -> None:
        """Take note that work reading the memory of `owners` was queued on `stream`."""

    def wrote(self, out: Any) -> None:
        """Take note that `out`, given by the caller, was written."""

    def to_host(self, x: Any, role: str) -> np.ndarray:
        """Copy (or view) `x` as a NumPy array; refuses what `view` does, but not gradients."""

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        """Bring `values` to the library and device of `like`."""


class _Plain:
    """Defaults for a library whose arrays are written where they lie."""

    def deliver(self, result: Any, like: ArrayView) -> Any:
        return result

    def launched(self, owners: tuple[Any, ...], stream: int) -> None:
        pass

    def wrote(self, out: Any) -> None:
        pass


class _NumPy(_Plain):
    name = "numpy"

    def view(self, x: Any, role: str) -> ArrayView:
        if type(x) not in (np.ndarray, np.memmap):
            raise TypeError(
                f"{role} is a {type(x).__name__}, whose meaning a norm would drop; "
                "needs a plain numpy.ndarray"
            )
        pointer = x.ctypes.data
        dtype = _dtypes.from_numpy(x.dtype, role)
        layout = Layout(x.shape, x.strides, dtype, CPU, alignment_of(pointer))
        return ArrayView(pointer, layout, x.flags.writeable, x, self)

    def empty_like(self, view: ArrayView) -> Any:
        return dense_like(view.as_numpy(), partial(np.empty_like, subok=False))

    def stream(self, index: int) -> int:
        raise NotImplementedError("host memory has no stream")

    def to_host(self, x: Any, role: str) -> np.ndarray:
        self.view(x, role)
        return np.asarray(x)

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        return values


class _CuPy(_Plain):
    name = "cupy"

    def view(self, x: Any, role: str) -> ArrayView:
        pointer = x.data.ptr
        dtype = _dtypes.from_numpy(x.dtype, role)
        device = Device("cuda", x.data.device_id)
        layout = Layout(x.shape, x.strides, dtype, device, alignment_of(pointer))
        return ArrayView(pointer, layout, True, x, self)

    def empty_like(self, view: ArrayView) -> Any:
        cupy = import_cupy()
        with cupy.cuda.Device(view.layout.device.index):
            if isinstance(view.owner, cupy.ndarray):
                return dense_like(view.owner, cupy.empty_like)
            return cupy.empty(view.layout.shape, view.layout.dtype.numpy)

    def stream(self, index: int) -> int:
        return import_cupy().cuda.get_current_stream(index).ptr

    def to_host(self, x: Any, role: str) -> np.ndarray:
        self.view(x, role)
        return x.get()

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        cupy = import_cupy()
        with cupy.cuda.Device(like.layout.device.index):
            return cupy.asarray(values)


class _Torch:
    name = "torch"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._kinds = (torch.Tensor, torch.nn.Parameter)
        self._api = _dlpack.exchange_api(torch.Tensor)

    def view(self, x: Any, role: str) -> ArrayView:
        self._refuse(x, role)
        dtype = _dtypes.from_name(str(x.dtype).removeprefix("torch."), role)
        raw = self._api.view(x) if self._api else self._through_capsule(x)
        return _view_of(raw, dtype, role, x, self)

    def _refuse(self, x: Any, role: str) -> None:
        """Refuse tensors whose memory is not what they mean; the exchange API checks nothing."""
        torch = self._torch
        if type(x) not in self._kinds:
            raise TypeError(
                f"{role} is a {type(x).__name__}, a subclass of torch.Tensor; "
                "needs a plain tensor or Parameter"
            )
        if (
            torch._C._functorch.is_functorch_wrapped_tensor(x)
            or torch._is_functional_tensor(x)
            or x.layout is not torch.strided
            or x.is_quantized
            or x.is_meta
            or x.is_neg()
            or x.is_conj()
            or x._is_zerotensor()
            or self._is_dual(x)
        ):
            raise TypeError(f"{role} is {self._reason(x)}; needs a strided tensor with memory")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{role} requires grad and grad mode is on, but this norm has no backward; "
                f"needs torch.no_grad() around the call, or {role}.detach()"
            )

    def _reason(self, x: Any) -> str:
        torch = self._torch
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return "inside a torch.func transform"
        if torch._is_functional_tensor(x):
            return "functional, without memory of its own"
        if x.layout is not torch.strided:
            return f"of layout {x.layout}"
        if x.is_quantized:
            return "quantized"
        if x.is_meta:
            return "on the meta device, without memory"
        if x.is_neg():
            return "a lazily negated view (resolve_neg() makes it plain)"
        if x.is_conj():
            return "a lazily conjugated view (resolve_conj() makes it plain)"
        return "a zero tensor without memory" if x._is_zerotensor() else "a forward-mode AD dual"

    def _is_dual(self, x: Any) -> bool:
        forward_ad = self._torch.autograd.forward_ad
        return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None

    def _through_capsule(self, x: Any) -> _dlpack.Tensor:
        """Describe a tensor of a torch before 2.11, which has no C exchange API."""
        x = x.detach()
        if x.device.type != "cuda":
            return _dlpack.read_capsule(x.__dlpack__())
        with self._torch.cuda.device(x.device):
            return _dlpack.read_capsule(x.__dlpack__(stream=-1))

    def empty_like(self, view: ArrayView) -> Any:
        torch = self._torch
        result = torch.empty_like(view.owner, requires_grad=False)
        if result.dim() and result.numel() and result.shape[-1] > 1 and result.stride(-1) != 1:
            return torch.empty_like(view.owner, memory_format=torch.contiguous_format)
        return result

    def deliver(self, result: Any, like: ArrayView) -> Any:
        return result

    def stream(self, index: int) -> int:
        if self._api:
            return self._api.stream(index)
        return self._torch.cuda.current_stream(index).cuda_stream

    def launched(self, owners: tuple[Any, ...], stream: int) -> None:
        pass

    def wrote(self, out: Any) -> None:
        # Autograd must know, or a later backward uses the overwritten values without an error:
        # also under no_grad, where torch's own in-place functions tell it too.
        if not (self._torch.is_inference_mode_enabled() or out.is_inference()):
            self._torch.autograd.graph.increment_version(out)

    def to_host(self, x: Any, role: str) -> np.ndarray:
        with self._torch.no_grad():
            self._refuse(x, role)
            return self.view(x.detach().cpu(), role).as_numpy()

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        # NumPy cannot hand bfloat16 to torch, so torch makes the memory and NumPy fills it.
        host = self._torch.empty(values.shape, dtype=like.owner.dtype)
        np.copyto(self.view(host, "result").as_numpy(), values)
        return host.to(like.owner.device)


class _DLPack:
    """Any other producer: read through a capsule, results through its namespace."""

    name = "DLPack"

    def __init__(self) -> None:
        self._in_flight: deque[tuple[Any, Any]] = deque()
        self._lock = threading.Lock()

    def view(self, x: Any, role: str) -> ArrayView:
        if role == "out":
            raise TypeError(
                f"out is a {type(x).__name__}, which may forbid writing; "
                "needs a NumPy, CuPy or torch array"
            )
        kind, index = x.__dlpack_device__()
        on_cuda = kind in (_dlpack.CUDA, _dlpack.CUDA_MANAGED)
        # DLPack's name for the legacy default stream is 1.
        stream = (self.stream(index) or 1) if on_cuda else None
        try:
            capsule = x.__dlpack__(stream=stream, max_version=(1, 3))
        except TypeError:  # a producer from before DLPack 1.0
            capsule = x.__dlpack__(stream=stream)
        raw = _dlpack.read_capsule(capsule)
        dtype = _dtypes.from_dlpack(*raw.dtype, role)
        view = _view_of(raw, dtype, role, (x, capsule), self)
        if role == "x":
            self._check_way_back(x, view)
        return view

    def _check_way_back(self, x: Any, view: ArrayView) -> None:
        namespace = getattr(x, "__array_namespace__", None)
        if namespace is None or not hasattr(namespace(), "from_dlpack"):
            raise TypeError(
                f"x is a {type(x).__name__} without a namespace that has from_dlpack, for the "
                "result; needs numpy.from_dlpack(x) or cupy.from_dlpack(x) instead"
            )
        if view.layout.device.kind == "cpu" and view.layout.dtype.name == "bfloat16":
            raise TypeError(
                f"x is a bfloat16 {type(x).__name__} on the host, where NumPy makes the result and "
                "cannot hand bfloat16 on; needs another dtype, or a torch or NumPy array"
            )

    def empty_like(self, view: ArrayView) -> Any:
        shape, dtype = view.layout.shape, view.layout.dtype.numpy
        if view.layout.device.kind == "cpu":
            return np.empty(shape, dtype)
        cupy = import_cupy()
        with cupy.cuda.Device(view.layout.device.index):
            return cupy.empty(shape, dtype)

    def deliver(self, result: Any, like: ArrayView) -> Any:
        return like.owner[0].__array_namespace__().from_dlpack(result)

    def stream(self, index: int) -> int:
        return import_cupy().cuda.get_current_stream(index).ptr

    def launched(self, owners: tuple[Any, ...], stream: int) -> None:
        # Nobody else keeps the producer's memory from being reused while the kernel reads it.
        cupy = import_cupy()
        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, stream)
        with self._lock:
            self._in_flight.append((event, owners))
            while self._in_flight and self._in_flight[0][0].done:
                self._in_flight.popleft()

    def wrote(self, out: Any) -> None:
        raise NotImplementedError("out is refused when it is viewed")

    def to_host(self, x: Any, role: str) -> np.ndarray:
        view = self.view(x, role)
        if view.layout.device.kind == "cuda":
            return import_cupy().from_dlpack(x).get()
        return view.as_numpy()

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        result = self.empty_like(like)
        if isinstance(result, np.ndarray):
            return self.deliver(values, like)
        result.set(values)
        return self.deliver(result, like)


def _view_of(
    raw: _dlpack.Tensor, dtype: _dtypes.DType, role: str, owner: Any, library: Library
) -> ArrayView:
    kind, index = raw.device
    if kind in (_dlpack.CUDA, _dlpack.CUDA_MANAGED):
        device = Device("cuda", index)
    elif kind in (_dlpack.CPU, _dlpack.CUDA_HOST):
        device = CPU
    else:
        name = _dlpack.DEVICE_NAMES.get(kind, f"DLPack device type {kind}")
        raise TypeError(f"{role} is in {name} memory; needs host or CUDA memory")
    strides = tuple(s * dtype.itemsize for s in raw.strides)
    layout = Layout(raw.shape, strides, dtype, device, alignment_of(raw.pointer))
    if raw.pointer == 0 and layout.size:
        raise TypeError(f"{role} has {layout.size} elements at a null pointer; needs memory")
    return ArrayView(raw.pointer, layout, not raw.read_only, owner, library)


_NUMPY = _NumPy()
_CUPY = _CuPy()
_DLPACK = _DLPack()
_found: dict[type, Library] = {np.ndarray: _NUMPY}


def library_of(x: Any, role: str) -> Library:
    """Return the library whose array `x` is; TypeError where it is none."""
    library = _found.get(type(x))
    if library is None:
        library = _found[type(x)] = _find(x, role)
    return library


def _find(x: Any, role: str) -> Library:
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if isinstance(x, np.ndarray):
        return _NUMPY
    if cupy is not None and isinstance(x, cupy.ndarray):
        if cupy.cuda.runtime.is_hip:
            raise TypeError(f"{role} is a CuPy array of a ROCm build; needs CuPy for CUDA")
        return _CUPY
    if torch is not None and isinstance(x, torch.Tensor):
        known = _found.get(torch.Tensor)
        return known if known is not None else _found.setdefault(torch.Tensor, _Torch(torch))
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _DLPACK
    raise TypeError(
        f"{role} is a {type(x).__name__}; needs a NumPy, CuPy or torch array, "
        "or any object with __dlpack__ and __dlpack_device__"
    )


def view(x: Any, role: str) -> ArrayView:
    """Describe any array."""
    return library_of(x, role).view(x, role)


def view_beside(x: ArrayView, array: Any, role: str) -> ArrayView:
    """Describe `array`, which must come from the library of `x`."""
    library = library_of(array, role)
    if library is not x.library:
        raise TypeError(
            f"{role} is a {type(array).__name__} ({library.name}); "
            f"needs the library of x, {x.library.name}"
        )
    return library.view(array, role)


def upload(values: np.ndarray, index: int) -> ArrayView:
    """
    Copy `values` to CUDA device `index` and wait, so that any stream may read the copy.

    The memory comes from cudaMalloc and not from CuPy's pool: cudaFree waits for the device, a
    pool would hand the bytes out again under a kernel still running on another library's stream.
    """
    cupy = import_cupy()
    with cupy.cuda.Device(index) as device:
        memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(max(values.nbytes, 1)), 0)
        copy = cupy.ndarray(values.shape, values.dtype, memory)
        copy.set(values)
        device.synchronize()
    return _CUPY.view(copy, "parameter")


def synchronize(index: int) -> None:
    """Wait for all work on CUDA device `index`."""
    import_cupy().cuda.Device(index).synchronize()


def is_capturing(stream: int) -> bool:
    """Tell whether `stream` is being captured into a CUDA graph."""
    # The legacy default stream cannot be; asking about it while another is captured is an error.
    return stream != 0 and bool(import_cupy().cuda.runtime.streamIsCapturing(stream))
