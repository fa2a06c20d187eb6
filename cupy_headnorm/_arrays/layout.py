"""Where an array's bytes lie: shape, strides, device, and whether two arrays share bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupy_headnorm._arrays.dtypes import DType

_OVERLAP_WORK: Any = 10_000  # NumPy's annotations know two special numbers alone
"""Steps `np.shares_memory` may take on one pair: 6 ms at worst, at 0.6 us a step. Slices of model
tensors need under 100."""


@dataclass(frozen=True, slots=True)
class Device:
    """The host, ``Device("cpu", 0)``, or a CUDA device by its index."""

    kind: str
    index: int

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu", 0)


class Layout(NamedTuple):
    """All that a plan depends on about one array; hashable, so that it is a key."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes."""
    dtype: DType
    device: Device
    alignment: int
    """Largest power of two, at most 16, that divides the address."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def extent(self, pointer: int) -> tuple[int, int]:
        """Return the first byte used and the byte after the last."""
        low = high = pointer
        for length, stride in zip(self.shape, self.strides, strict=True):
            if length == 0:
                return pointer, pointer
            if stride > 0:
                high += (length - 1) * stride
            else:
                low += (length - 1) * stride
        return low, high + self.dtype.itemsize


class Placed(Protocol):
    """An array as far as overlap is concerned."""

    @property
    def pointer(self) -> int:
        """Address of the first element."""

    @property
    def layout(self) -> Layout:
        """Where the others lie."""


def alignment_of(pointer: int) -> int:
    """Return the largest power of two, at most 16, that divides `pointer`."""
    return (pointer | 16) & -(pointer | 16)


def layout_of(array: np.ndarray, dtype: DType) -> Layout:
    """Describe a NumPy array whose table row is `dtype`."""
    return Layout(array.shape, array.strides, dtype, CPU, alignment_of(array.ctypes.data))


class _Memory:
    """An ``__array_interface__`` over an address; holds `owner` as long as the array lives."""

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def as_numpy(pointer: int, layout: Layout, owner: object, writeable: bool) -> np.ndarray:
    """
    Return a NumPy view of existing memory; nothing is read.

    For host memory it is an ordinary array. For device memory it is good for one thing,
    asking `np.shares_memory` about addresses.
    """
    if layout.size == 0:
        return np.empty(layout.shape, layout.dtype.numpy)
    interface = {
        "version": 3,
        "data": (pointer, not writeable),
        "shape": layout.shape,
        "strides": layout.strides,
        # bfloat16 has no type string of its own: go through an integer of its width.
        "typestr": f"<u{layout.dtype.itemsize}",
    }
    return np.asarray(_Memory(interface, owner)).view(layout.dtype.numpy)


def _shares(a: np.ndarray, b: np.ndarray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True  # undecided within the bound: refuse rather than risk a wrong answer


def overlaps_itself(layout: Layout) -> bool:
    """Tell whether two different indices of an array name a common byte, exactly."""
    if layout.size == 0:
        return False
    axes = sorted((abs(s), n) for n, s in zip(layout.shape, layout.strides, strict=True) if n > 1)
    reach = layout.dtype.itemsize
    for stride, n in axes:
        if stride < reach:
            break
        reach += stride * (n - 1)
    else:
        return False
    if axes[0][0] == 0:
        return True
    # Not nested: two indices that first differ on axis k can be moved so that one is at 0 there
    # and the other above 0, all earlier axes at 0.
    # Any address will do that leaves room on both sides.
    array = as_numpy(1 << 62, layout, None, writeable=False)
    for axis, n in enumerate(layout.shape):
        if n > 1:
            tail = array[(0,) * axis]
            if _shares(tail[:1], tail[1:]):
                return True
    return False


def overlap(a_pointer: int, a: Layout, b_pointer: int, b: Layout) -> bool:
    """Tell whether two arrays share a byte, exactly; disjoint ranges cost two comparisons."""
    a_low, a_high = a.extent(a_pointer)
    b_low, b_high = b.extent(b_pointer)
    if a_high <= b_low or b_high <= a_low:
        return False
    return _shares(
        as_numpy(a_pointer, a, None, writeable=False), as_numpy(b_pointer, b, None, writeable=False)
    )


def dense_like(array: Any, empty_like: Any) -> Any:
    """
    Return new memory in the order of axes of `array`, or in C order.

    Keeping the order of an expanded or overlapping array can put its last axis elsewhere than
    last; then it is C order.
    """
    kept = empty_like(array)
    if kept.ndim and kept.size and kept.shape[-1] > 1 and kept.strides[-1] != kept.itemsize:
        return empty_like(array, order="C")
    return kept


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """
    Tell whether `strides`, in any unit, are those of memory without gaps in some order of axes.

    An axis of length 1 counts too: its stride, which no address depends on, must be one that an
    order of axes gives it.
    """
    axes = sorted(zip(strides, shape, strict=True))
    step = next((stride for stride, length in axes if length > 1), 1)
    for stride, length in axes:
        if stride != step:
            return False
        step *= max(length, 1)
    return True


@functools.lru_cache(maxsize=1024)
def dense_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return strides that `is_dense` holds for, in elements, in the order of axes of `strides`."""
    if is_dense(shape, strides):
        return strides
    found, step, last = [1] * len(shape), 1, len(shape) - 1
    # The last axis stays innermost; of equal strides the later axis is further in.
    for axis in (last, *sorted(range(last), key=lambda i: (strides[i], -i))):
        found[axis] = step
        step *= max(shape[axis], 1)
    return tuple(found)


def check_out_layout(out: Layout, name: str = "out") -> None:
    """Refuse an `out` in which two indices name one byte."""
    if overlaps_itself(out):
        raise ValueError(
            f"{name} has shape {out.shape} and strides {out.strides} bytes, which overlap "
            "themselves; needs one place for each element"
        )


def check_overlaps(
    inputs: Mapping[str, Placed | None], out: Placed, of: str = "x", name_of_out: str = "out"
) -> None:
    """Refuse an `out` that shares bytes with an input, unless it is `of` itself."""
    for name, array in inputs.items():
        if array is None or (name == of and _is_in_place(array, out)):
            continue
        if overlap(array.pointer, array.layout, out.pointer, out.layout):
            raise ValueError(
                f"{name_of_out} overlaps {name} in part; needs {name} itself or separate memory"
                if name == of
                else f"{name_of_out} overlaps {name}; needs separate memory"
            )


def _is_in_place(x: Placed, out: Placed) -> bool:
    # The stride of one entry says nothing.
    steps = zip(x.layout.shape, x.layout.strides, out.layout.strides, strict=True)
    return x.pointer == out.pointer and all(n < 2 or a == b for n, a, b in steps)
