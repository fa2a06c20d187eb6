"""
What the calls drawn for the property tests are made of: where arrays lie, and what they hold.

Everything of a call is free but the kernels that it runs, since each must be compiled: the
`NORM_KEYS` of norm_strategies.py and the `QK_KEYS` of qk_strategies.py fix dtypes, head_dim, kind,
rounding and alignment, but not the number of axes. Those two files draw the calls, properties.py
says what must hold for each, and test_properties.py runs it:

* a new choice of a kernel is a key (`test_drawn_calls_need_few_kernels` counts what they take),
* a new freedom of a call is drawn by `drawn_norm_case` or `drawn_qk_case`,
* a new refusal is a fault, which `_faults` or `_qk_faults` yields.

All arrays of a call lie in one buffer of bytes, apart or not, so that whatever else is written
shows.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from cupy_headnorm._plans import geometry

MEMORY = 1 << 20
"""Bytes of the buffer at most."""
GUARD = 32
"""Of them between two arrays at least, and at both ends."""
ELEMENTS = 3000
"""Of an array of more than one row, about."""


class Backend(NamedTuple):
    """What an array library can describe, and whether a kernel runs."""

    name: str
    negative_strides: bool = True
    odd_addresses: bool = True
    """Elements at any byte."""
    read_only: bool = False
    kernels: bool = False


class Place(NamedTuple):
    """Where an array lies in a buffer of bytes; offset and strides in bytes."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def reach(self):
        """First byte and byte after the last, from the first element."""
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        if 0 in self.shape:
            return 0, 0
        return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + self.dtype.itemsize

    def of(self, memory):
        """Return the array in a NumPy buffer."""
        return np.ndarray(self.shape, self.dtype, memory, self.offset, self.strides)

    def named(self, size):
        """Return how often each of `size` bytes belongs to an element."""
        at = np.full((), self.offset)
        for n, stride in zip(self.shape, self.strides, strict=True):
            at = at[..., np.newaxis] + np.arange(n) * stride
        count = np.bincount(at.ravel(), minlength=size)
        return sum(np.roll(count, byte) for byte in range(self.dtype.itemsize))

    def cut(self, axis, start, stop):
        """Return the part from `start` to `stop` on one axis."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        start = start if start < stop else 0  # where there is nothing, it may be past the buffer
        return self._replace(offset=self.offset + start * self.strides[axis], shape=shape)


# Values. What is promised: 0, and 1e-15 to 1e18 in size; infinities and NaN stay in their row.
LARGEST = {"float16": 6e4, "bfloat16": 1e18, "float32": 1e18, "float64": 1e18}
KINDS = ("normal", "scaled", "spread", "zeros", "one", "near a mean", "infinite", "nan")


def _rows(rng, kind, shape, name):
    """Return float64 rows of one kind, in the promised range."""
    large = LARGEST[name]
    rows = rng.standard_normal(shape)
    if kind == "scaled":
        low, high = (-3, 3) if name == "float16" else (-13, 17)
        rows *= 10 ** rng.uniform(low, high, (*shape[:-1], 1))
    elif kind == "spread":
        low = -7 if name == "float16" else -15
        rows = np.sign(rows) * 10 ** rng.uniform(low, np.log10(large), shape)
    elif kind == "zeros":
        rows[...] = 0
    elif kind == "one":
        rows *= np.arange(shape[-1]) == rng.integers(shape[-1], size=(*shape[:-1], 1))
    elif kind == "near a mean":
        rows = rows + 10 ** rng.uniform(0, 2.5, (*shape[:-1], 1))
    elif kind in ("infinite", "nan"):
        at = np.arange(shape[-1]) == rng.integers(shape[-1], size=(*shape[:-1], 1))
        rows = np.where(at, np.copysign(np.inf, rows) if kind == "infinite" else np.nan, rows)
    with np.errstate(invalid="ignore"):
        finite = np.clip(rows, -large, large)
        finite = np.where(np.abs(finite) < 1e-15, 0, finite)
    return np.where(np.isinf(rows), rows, finite)


def values(rng, kinds, shape, dtype):
    """Return an array whose rows are of the given kinds, in turn."""
    rows = np.stack([_rows(rng, kind, shape, dtype.name) for kind in kinds])
    turn = rng.integers(len(kinds), size=(1, *shape[:-1], 1))
    return np.take_along_axis(rows, turn, 0)[0].astype(dtype)


def parameter(rng, kind, shape, dtype):
    """Return a weight or a bias."""
    found = rng.standard_normal(shape)
    if kind == "wide":
        found *= 10 ** rng.uniform(-3, 1, shape)
    elif kind == "sparse":
        found *= rng.random(shape) < 0.5
    elif kind == "near one":
        found = 1 + 0.1 * found
    return found.astype(dtype)


SPOILT = st.sampled_from((False,) * 5 + (True,))
"""Whether a call is one that must be refused."""


# Layouts.
def sizes(draw, most, budget):
    """Draw lengths of `most` axes at most, of `budget` entries together."""
    found = []
    for _ in range(draw(st.sampled_from((1, 1, 2, 2, 3, 4, 0, most)))):
        n = draw(st.integers(1, max(1, min(budget, 40 if not found else 7))))
        budget //= n
        found.append(n)
    return found


def strides(draw, shape, dtype, unit, backend, *, distinct=False, packed=1):
    """
    Draw strides in bytes: neighbours on the last axis, multiples of `unit` bytes on the others.

    `distinct` is for arrays that are written: then most have a place for each element. `packed` is
    the number of arrays like this that lie beside each other, second axis from the right.
    """
    *outer, last = shape
    found = [0] * len(outer)
    step = -(-last * dtype.itemsize // unit) * unit
    how = draw(st.sampled_from(("dense", "dense", "free")))
    order = list(range(len(outer)))
    if how == "free":
        order = draw(st.permutations(order))
    kinds = ["next", "next", "padded", "padded", "apart"]
    kinds += ["back"] * (2 * backend.negative_strides)
    if not distinct or draw(st.integers(0, 9)) == 9:
        kinds += ["same", "windows"]
    for axis in reversed(order):
        kind = "next" if how == "dense" else draw(st.sampled_from(kinds))
        stride = step
        if kind == "padded":
            stride += unit * draw(st.integers(1, 5))
        elif kind == "apart":
            stride *= draw(st.integers(2, 3))
        elif kind == "back":
            stride = -stride
        elif kind == "same":
            stride = 0
        elif kind == "windows":
            stride = unit * draw(st.integers(1, 9))
        found[axis] = stride
        step = max(step, abs(stride) * max(1, outer[axis]))
        if axis == order[-1]:
            step *= packed
    return (*found, dtype.itemsize)


class Buffer:
    """Hands out places in a buffer of bytes, apart from each other."""

    def __init__(self, draw):
        self.draw = draw
        self.size = 0

    def place(self, shape, steps, dtype, shift=0, slack=0):
        """Return a place at a multiple of 16 bytes and `shift`, with `slack` bytes around it."""
        place = Place(0, tuple(shape), tuple(steps), dtype)
        # An empty array has the room of one row, so that slices of it are in the buffer.
        low, high = place._replace(shape=tuple(max(1, n) for n in shape)).reach
        guard = GUARD + 16 * self.draw(st.integers(0, 2)) + slack
        offset = -(-(self.size + guard - low) // 16) * 16 + shift
        self.size = offset + high + slack
        assume(self.end <= MEMORY)
        return place._replace(offset=offset)

    @property
    def end(self):
        return self.size + GUARD


def shifts(draw, unit, whole):
    """
    Draw where an array begins, in bytes after a multiple of 16.

    At a multiple of `unit` and, if that is less than `whole`, at no multiple of more.
    """
    step = unit if unit == whole else 2 * unit
    return (0 if unit == whole else unit) + step * draw(st.integers(0, max(0, 16 // step - 1)))


def alignment_of(head_dim, itemsize, access=None):
    """Return the bytes of `access` elements; where that is None, of what a lane owns together."""
    if access is None:
        access, *_ = geometry.row_geometry(head_dim, itemsize)
    return access * itemsize


def shown(case):
    """Return what a report shows of a drawn case: a field a line."""
    return "\n    ".join(f"{name}={value!r}" for name, value in case._asdict().items())


def off_boundaries(shape, steps, unit):
    """
    Return strides and a shift that lie on boundaries of `unit` bytes, and `steps` on those of more.

    The stride of the axis that is outermost in memory alone, so that elements stay apart; the shift
    where no axis is longer than 1.
    """
    counted = [axis for axis, n in enumerate(shape[:-1]) if n > 1]
    if not counted:
        return steps, unit
    at = max(counted, key=lambda axis: abs(steps[axis]))
    step = steps[at] + (unit if steps[at] >= 0 else -unit)
    return (*steps[:at], step, *steps[at + 1 :]), 0
