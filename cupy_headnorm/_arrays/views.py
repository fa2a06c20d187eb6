"""What the library sees of an array, and what it asks of an array's library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from cupy_headnorm._arrays import dlpack, dtypes
from cupy_headnorm._arrays.dtypes import NUMBERS, Allowed
from cupy_headnorm._arrays.layout import CPU, Device, Layout, alignment_of, as_numpy


class AnyArray(Protocol):
    """An array of any library, as far as type checkers can tell: JAX's has no ``__dlpack__``."""

    @property
    def shape(self) -> Any:
        """Lengths of the axes."""

    @property
    def dtype(self) -> Any:
        """Type of the elements, as the library has it."""


Array = TypeVar("Array", bound=AnyArray)
"""The type of an array and of what is made like it."""


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


Looked = tuple[tuple[int, ...], tuple[tuple[Any, ...], ...]]


class Library(Protocol):
    """What the library asks of NumPy, CuPy, torch and everything that speaks DLPack."""

    name: str
    takes_out: bool
    """Whether a caller may give arrays of it as `out`."""
    plain: tuple[type, ...]
    """The types of arrays that are glanced at."""
    allocates_in_graphs: bool
    """Whether new memory may be asked for while its stream is captured into a CUDA graph."""

    def view(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> ArrayView:
        """
        Describe `x`; TypeError or ValueError, naming `role`, where it cannot be used.

        It may have the `allowed` dtypes.
        """

    def glance(self, x: Any, /) -> tuple[int, tuple[Any, ...]] | None:
        """
        Return the address of CUDA memory and all else that a plan depends on, for a look-up.

        The first of the rest is the device's index. None where only `view` can tell, or refuse.
        Asked of arrays whose types `find.quick` has alone.
        """

    def look(self, arrays: tuple[Any, ...], /) -> Looked | None:
        """Glance at several arrays, of any types; return their addresses, and the rest of each."""

    def address(self, x: Any) -> int:
        """Return the address of a result that the library made."""

    def empty_like(self, view: ArrayView) -> tuple[Any, Callable[[Any], Any] | None]:
        """
        Return new memory for a result, and what makes more of it from an array like the viewed one.

        The last axis has stride 1.
        """

    def deliver(self, result: Any, like: ArrayView) -> Any:
        """Turn what `empty_like` gave into the producer's array."""

    def stream(self, index: int, /) -> int:
        """Return the handle of the current stream on CUDA device `index`."""

    def launched(self, owners: tuple[Any, ...], index: int, stream: int) -> None:
        """Take note that work reading the memory of `owners` was queued on a device's `stream`."""

    def wrote(self, arrays: tuple[Any, ...], /) -> None:
        """Take note that `arrays`, given by the caller, were written."""

    def to_host(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> np.ndarray:
        """Copy (or view) `x` as a NumPy array; refuses what `view` does, but not gradients."""

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        """Bring `values` to the library and device of `like`."""


class Plain(Library):
    """Defaults for a library whose arrays are written where they lie."""

    takes_out = True
    plain: tuple[type, ...] = ()
    allocates_in_graphs = False

    def glance(self, x: Any, /) -> tuple[int, tuple[Any, ...]] | None:
        """Tell nothing: only `view` can."""
        return None

    def look(self, arrays: tuple[Any, ...], /) -> Looked | None:
        """Glance at one after the other."""
        addresses, keys = [], []
        for array in arrays:
            if type(array) not in self.plain or (seen := self.glance(array)) is None:
                return None
            addresses.append(seen[0])
            keys.append(seen[1])
        return tuple(addresses), tuple(keys)

    def address(self, x: Any) -> int:
        """Return the address that `view` finds."""
        return self.view(x, "result").pointer

    def deliver(self, result: Any, like: ArrayView) -> Any:
        """Return `result`: it is the producer's already."""
        return result

    def launched(self, owners: tuple[Any, ...], index: int, stream: int) -> None:
        """Do nothing: the library orders reuse of its memory by its own streams."""

    def wrote(self, arrays: tuple[Any, ...], /) -> None:
        """Do nothing: the library keeps no account of writes."""


def view_at(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: dtypes.DType,
    device: Device,
    role: str,
    owner: Any,
    library: Library,
    writeable: bool = True,
) -> ArrayView:
    """Return a view of memory at an address; `strides` are bytes."""
    layout = Layout(shape, strides, dtype, device, alignment_of(pointer))
    if pointer == 0 and layout.size:
        raise TypeError(f"{role} has {layout.size} elements at a null pointer; needs memory")
    return ArrayView(pointer, layout, writeable, owner, library)


def view_of(
    raw: dlpack.Tensor, dtype: dtypes.DType, role: str, owner: Any, library: Library
) -> ArrayView:
    """Turn what DLPack tells into a view; TypeError for memory that is not supported."""
    kind, index = raw.device
    if kind in (dlpack.CUDA, dlpack.CUDA_MANAGED):
        device = Device("cuda", index)
    elif kind in (dlpack.CPU, dlpack.CUDA_HOST):
        device = CPU
    else:
        name = dlpack.DEVICE_NAMES.get(kind, f"DLPack device type {kind}")
        raise TypeError(f"{role} is in {name} memory; needs host or CUDA memory")
    strides = tuple(s * dtype.itemsize for s in raw.strides)
    writeable = not raw.read_only
    return view_at(raw.pointer, raw.shape, strides, dtype, device, role, owner, library, writeable)
