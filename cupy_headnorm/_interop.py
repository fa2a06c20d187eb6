"""
Any array in, an `ArrayView` out; results in the producer's library, on the producer's stream.

Libraries are found in `sys.modules` and never imported: whoever holds a tensor has imported its
library already. Nothing here copies an element.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

import numpy as np

from cupy_headnorm import _dlpack, _driver, _dtypes, _spec
from cupy_headnorm._arrays import ArrayView, Library, Plain, view_of
from cupy_headnorm._dtypes import NUMBERS, Rows
from cupy_headnorm._layout import CPU, Device, Layout, alignment_of, dense_like
from cupy_headnorm._torch import Torch, untraced


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
    if _before_fork is not None:
        _check_fork(cupy)
    return cupy


_before_fork: dict[type, Library] | None = None
"""In the child of a fork, what `quick` held, until CUDA is seen to work there; else None."""


def _forked() -> None:
    """Let every call go step by step: what its like has loaded before the fork may be lost."""
    global _before_fork
    _before_fork = {**(_before_fork or {}), **quick}
    quick.clear()


os.register_at_fork(after_in_child=_forked)


def _check_fork(cupy: Any) -> None:
    """Raise GPUUnavailableError in the child of a process that had used CUDA."""
    global _before_fork
    try:
        cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.runtime.getDevice()
    except Exception as error:
        if "InitializationError" not in str(error):
            return  # nothing that a fork does: whoever needs the device explains it
        raise _driver.GPUUnavailableError(
            f"CUDA was used before this process was forked, and does not work in it ({error}); "
            "needs: multiprocessing's start method spawn or forkserver"
        ) from error
    quick.update(_before_fork or {})
    _before_fork = None


class _NumPy(Plain):
    name = "numpy"

    def view(self, x: Any, role: str, rows: Rows = NUMBERS) -> ArrayView:
        if type(x) not in (np.ndarray, np.memmap):
            raise TypeError(
                f"{role} is a {type(x).__name__}, whose meaning a norm would drop; "
                "needs a plain numpy.ndarray"
            )
        pointer = x.ctypes.data
        dtype = _dtypes.from_numpy(x.dtype, role, rows)
        layout = Layout(x.shape, x.strides, dtype, CPU, alignment_of(pointer))
        return ArrayView(pointer, layout, x.flags.writeable, x, self)

    def empty_like(self, view: ArrayView) -> tuple[Any, None]:
        return dense_like(view.as_numpy(), partial(np.empty_like, subok=False)), None

    def stream(self, index: int, /) -> int:
        raise NotImplementedError("host memory has no stream")

    def to_host(self, x: Any, role: str, rows: Rows = NUMBERS) -> np.ndarray:
        self.view(x, role, rows)
        return np.asarray(x)

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        return values


class _CuPy(Plain):
    name = "cupy"

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
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

    def view(self, x: Any, role: str, rows: Rows = NUMBERS) -> ArrayView:
        if type(x) is not self._cupy.ndarray:
            raise TypeError(
                f"{role} is a {type(x).__name__}, whose meaning a norm would drop; "
                "needs a plain cupy.ndarray"
            )
        pointer = x.data.ptr
        dtype = _dtypes.from_numpy(x.dtype, role, rows)
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

    def to_host(self, x: Any, role: str, rows: Rows = NUMBERS) -> np.ndarray:
        self.view(x, role, rows)
        values: np.ndarray = x.get()
        return values

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        with self._cupy.cuda.Device(like.layout.device.index):
            return self._cupy.asarray(values)


class _DLPack(Plain):
    """Any other producer: read through a capsule, results through its namespace."""

    name = "DLPack"
    takes_out = False

    def __init__(self) -> None:
        self._in_flight: dict[object, tuple[Any, Any]] = {}

    def view(self, x: Any, role: str, rows: Rows = NUMBERS) -> ArrayView:
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
                f"__dlpack_device__ of {role} returned {_spec.shown(place)}; needs a pair, of "
                "DLPack's device type and an index"
            ) from None
        on_cuda = kind in (_dlpack.CUDA, _dlpack.CUDA_MANAGED)
        # DLPack's name for the legacy default stream is 1.
        stream = (self.stream(index) or 1) if on_cuda else None
        try:
            capsule = x.__dlpack__(stream=stream, max_version=(1, 3))
        except TypeError:  # a producer from before DLPack 1.0
            capsule = None
        if capsule is None:
            capsule = x.__dlpack__(stream=stream)
        raw = _dlpack.read_capsule(capsule, role)
        dtype = _dtypes.from_dlpack(*raw.dtype, role, rows)
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
        cupy = import_cupy()
        with cupy.cuda.Device(view.layout.device.index):
            return cupy.empty(shape, dtype), None

    def deliver(self, result: Any, like: ArrayView) -> Any:
        from_dlpack = like.owner[0].__array_namespace__().from_dlpack
        if like.layout.device.kind == "cpu":
            return from_dlpack(result)
        # The consumer waits for the device's current stream, on which the kernel was queued.
        with import_cupy().cuda.Device(like.layout.device.index):
            return from_dlpack(result)

    def stream(self, index: int, /) -> int:
        handle: int = import_cupy().cuda.get_current_stream(index).ptr
        return handle

    def launched(self, owners: tuple[Any, ...], index: int, stream: int) -> None:
        # Nobody else keeps the producers' memory from being reused while the kernel reads it. The
        # last call's is let go by the next one.
        cupy = import_cupy()
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

    def to_host(self, x: Any, role: str, rows: Rows = NUMBERS) -> np.ndarray:
        view = self.view(x, role, rows)
        if view.layout.device.kind == "cuda":
            values: np.ndarray = import_cupy().from_dlpack(x).get()
            return values
        return view.as_numpy()

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        result, _ = self.empty_like(like)
        if isinstance(result, np.ndarray):
            return self.deliver(values, like)
        result.set(values)
        return self.deliver(result, like)


class _JAX(_DLPack):
    """Eager JAX arrays, which are never written; JAX itself takes what NumPy made."""

    name = "jax"

    def __init__(self, jax: Any) -> None:
        super().__init__()
        self._jax = jax

    def view(self, x: Any, role: str, rows: Rows = NUMBERS) -> ArrayView:
        self._refuse(x, role, rows)
        return super().view(x, role, rows)

    def _refuse(self, x: Any, role: str, rows: Rows = NUMBERS) -> None:
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
        _dtypes.from_numpy(x.dtype, role, rows)

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

    def to_host(self, x: Any, role: str, rows: Rows = NUMBERS) -> np.ndarray:
        self._refuse(x, role, rows)
        return np.asarray(x)

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        # NumPy cannot hand on bfloat16 by DLPack, nor does DLPack tell JAX's host devices apart.
        x, _ = like.owner
        return self._jax.device_put(values, x.sharding)


RESULTS_OF = {"x", "q", "k", "v"}
"""Roles of arrays that results are made like."""

_NUMPY = _NumPy()
_DLPACK = _DLPack()
_found: MutableMapping[type, Library] = weakref.WeakKeyDictionary()
"""Of the types met, none of which lives longer for it: programs make classes in loops."""
quick: dict[type, Library] = {}
"""The types of arrays that are looked at by `Library.glance`, once one of each was seen."""


@untraced
def library_of(x: Any, role: str) -> Library:
    """Return the library whose array `x` is; TypeError where it is none."""
    library = _found.get(type(x))
    if library is None:
        library = _found[type(x)] = _find(x, role)
    return library


def _find(x: Any, role: str) -> Library:
    # Another thread may be importing one of them: it has no arrays then.
    cupy: Any = sys.modules.get("cupy")
    torch: Any = sys.modules.get("torch")
    jax: Any = sys.modules.get("jax")
    if isinstance(x, np.ndarray):
        return _NUMPY
    if isinstance(x, getattr(cupy, "ndarray", ())):
        if cupy.cuda.runtime.is_hip:
            raise TypeError(f"{role} is a CuPy array of a ROCm build; needs CuPy for CUDA")
        return _once(_CuPy, cupy, (cupy.ndarray,))
    if isinstance(x, getattr(torch, "Tensor", ())):
        return _once(Torch, torch, (torch.Tensor, torch.nn.Parameter))
    if isinstance(x, getattr(getattr(jax, "core", None), "Tracer", ())):
        raise TypeError(
            f"{role} is a {type(x).__name__}, without memory: the call is inside jax.jit or "
            "another transform of JAX; needs an eager call, outside of it"
        )
    is_class = isinstance(x, type)  # whose methods want an instance
    if not is_class and hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        if isinstance(x, getattr(jax, "Array", ())):
            return _found.setdefault(jax.Array, _JAX(jax))
        return _DLPACK
    raise TypeError(
        f"{role} is a {type(x).__name__}; needs a NumPy, CuPy or torch array, "
        "or any object with __dlpack__ and __dlpack_device__"
    )


def _once(adapter: Callable[[Any], Library], module: Any, plain: tuple[type, ...]) -> Library:
    """Make the adapter of a library whose `plain` types are looked at, or return the one made."""
    known = quick if _before_fork is None else _before_fork
    library = known.get(plain[0])
    if library is None:
        library = known.setdefault(plain[0], adapter(module))
    for kind in plain:
        known[kind] = library
    return library


def view(x: Any, role: str, rows: Rows = NUMBERS) -> ArrayView:
    """Describe any array."""
    return library_of(x, role).view(x, role, rows)


def view_beside(
    x: ArrayView, array: Any, role: str, rows: Rows = NUMBERS, *, of: str = "x"
) -> ArrayView:
    """Describe `array`, which must come from the library of `x`, called `of`."""
    library = library_of(array, role)
    if library is not x.library:
        raise TypeError(
            f"{role} is a {type(array).__name__} ({library.name}); "
            f"needs the library of {of}, {x.library.name}"
        )
    return library.view(array, role, rows)


def upload(values: np.ndarray, index: int) -> ArrayView:
    """Copy `values` to CUDA device `index` and wait, so that any stream may read the copy."""
    cupy = import_cupy()
    with _driver.beside_captures(), cupy.cuda.Device(index):
        copy = _allocated(cupy, values.shape, values.dtype, index)
        stream = side_stream()
        copy.set(values, stream=stream)
        stream.synchronize()
    return view(copy, "parameter")


def upload_pieces(
    shape: tuple[int, ...],
    dtype: np.dtype,
    pieces: Iterable[tuple[int, np.ndarray, np.ndarray]],
    index: int,
) -> tuple[ArrayView, ArrayView]:
    """
    Copy two arrays of one shape as `upload` does, some rows of both at a time.

    Of each piece the number of its first row comes first. The host needs to hold no more than one.
    """
    cupy = import_cupy()
    with _driver.beside_captures(), cupy.cuda.Device(index):
        first, second = (_allocated(cupy, shape, dtype, index) for _ in range(2))
        stream = side_stream()
        for start, *piece in pieces:
            for copy, values in zip((first, second), piece, strict=True):
                copy[start : start + len(values)].set(values, stream=stream)
            stream.synchronize()  # the next piece may take this one's memory
    return view(first, "parameter"), view(second, "parameter")


def _allocated(cupy: Any, shape: tuple[int, ...], dtype: np.dtype, index: int) -> Any:
    """
    Return a new array on CUDA device `index`, which is the current one.

    The memory comes from cudaMalloc and not from CuPy's pool: cudaFree waits for the device, a
    pool would hand the bytes out again under a kernel still running on another library's stream.
    """
    size = max(math.prod(shape) * dtype.itemsize, 1)
    owner, address = _Owner(), cupy.cuda.runtime.malloc(size)
    weakref.finalize(owner, _free, address).atexit = False
    memory = cupy.cuda.UnownedMemory(address, size, owner, index)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


class _Owner:
    """Of memory: who lets the last reference go lets `_free` run."""


def _free(address: int) -> None:
    # CuPy's own memory would end the capture of another thread, and a collector may run this in any
    # thread. In the child of a fork there is nothing to free.
    with contextlib.suppress(Exception), _driver.beside_captures():
        import_cupy().cuda.runtime.free(address)


def side_stream() -> Any:
    """
    Return a new stream of the current device that waits for no other, nor any for it.

    The default stream would do for work of our own, but for another thread that captures a graph:
    work on the default stream breaks the capture of every blocking stream.
    """
    return import_cupy().cuda.Stream(non_blocking=True)


def synchronize(index: int) -> None:
    """Wait for all work on CUDA device `index`."""
    import_cupy().cuda.Device(index).synchronize()


def is_capturing(stream: int) -> bool:
    """Tell whether `stream` is being captured into a CUDA graph."""
    # The legacy default stream cannot be; asking about it while another is captured is an error.
    # Whoever has another one has imported CuPy.
    return stream != 0 and bool(sys.modules["cupy"].cuda.runtime.streamIsCapturing(stream))
