"""
Calls drawn for the property tests: everything free but the kernels they run.

A kernel is compiled for dtypes, head_dim, kind, rounding, the number of axes and how the memory is
aligned. `NORM_KEYS` and `QK_KEYS` fix all of that but the axes, of which there are three kinds, so
that at most 200 kernels serve any number of drawn calls.

All arrays of a call lie in one buffer of bytes, apart or not, so that whatever else is written
shows.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import qk_cases
from hypothesis import assume
from hypothesis import strategies as st

from cupy_headnorm import _dtypes
from cupy_headnorm._dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType

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


class NormKey(NamedTuple):
    """Kernels of HeadNorm, but for the number of axes."""

    kind: str
    x: DType
    weight: DType | None
    bias: DType | None
    head_dim: int
    rounding: str = "once"
    access: int | None = None
    """Elements that x and out are aligned to; None for as many as a lane owns together."""
    aligned: bool = True
    """Weight and bias to 16 bytes, or one of them to no more than an element."""


NORM_KEYS = (
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128, access=4),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128, access=2),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128, access=1, aligned=False),
    NormKey("layer", BFLOAT16, FLOAT32, FLOAT32, 96, aligned=False),
    NormKey("layer", BFLOAT16, BFLOAT16, BFLOAT16, 128, "every_op"),
    NormKey("layer", BFLOAT16, BFLOAT16, None, 16384),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 256, "before_weight", access=1),
    NormKey("rms", BFLOAT16, FLOAT32, None, 1024),
    NormKey("rms", BFLOAT16, FLOAT64, None, 73),
    NormKey("rms", BFLOAT16, None, None, 256, "rstd"),
    NormKey("rms", FLOAT16, FLOAT16, None, 64),
    NormKey("rms", FLOAT16, FLOAT16, None, 64, access=1),
    NormKey("layer", FLOAT16, FLOAT16, FLOAT16, 80),
    NormKey("layer", FLOAT16, FLOAT16, None, 512, "before_weight", access=2),
    NormKey("rms", FLOAT16, FLOAT32, BFLOAT16, 160, "every_op"),
    NormKey("rms", FLOAT16, FLOAT64, FLOAT16, 1),
    NormKey("rms", FLOAT16, None, None, 72, "rstd"),
    NormKey("rms", FLOAT16, None, None, 4099),
    NormKey("rms", FLOAT16, FLOAT16, None, 2048, access=1),
    NormKey("rms", FLOAT32, FLOAT32, None, 128),
    NormKey("rms", FLOAT32, FLOAT32, None, 128, access=1),
    NormKey("layer", FLOAT32, BFLOAT16, FLOAT64, 100, access=2),
    NormKey("layer", FLOAT32, None, None, 3),
    NormKey("layer", FLOAT32, FLOAT32, FLOAT32, 513),
    NormKey("rms", FLOAT32, None, FLOAT32, 37, "every_op"),
    NormKey("rms", FLOAT32, FLOAT32, None, 20000),
    NormKey("rms", FLOAT64, FLOAT64, None, 64),
    NormKey("rms", FLOAT64, FLOAT64, FLOAT32, 64, "before_weight", access=1),
    NormKey("layer", FLOAT64, FLOAT32, BFLOAT16, 33, aligned=False),
)


class QKKey(NamedTuple):
    """Kernels of QKNorm, but for the number of axes."""

    case: qk_cases.Case
    """Its heads and tokens are drawn anew."""
    access: int | None = None
    """As in `NormKey`."""
    table_access: int | None = None
    """The same of cosines and sines that are given."""


def _qk(access=None, table_access=None, **changes):
    return QKKey(qk_cases.DEFAULT._replace(**changes), access, table_access)


QK_KEYS = (
    _qk(),
    _qk(by="int32", partial=True, v=True),
    _qk(access=1),
    _qk(by=None, weight="own x", v=True),
    _qk(by=None, kind="layer", bias="own x", rounding="once", access=2),
    _qk(by="whole x"),
    _qk(by="whole x", access=4, table_access=1, head_dim=64),
    _qk(by="half x", style="interleaved", rounding="every_op", bias="shared x"),
    _qk(by="half float32", every_op=False, table="float32", table_access=2),
    _qk(by="whole float32", every_op=False, table="float32", first=True, weight="own float32"),
    _qk(by="chunks of sections", head_dim=64, weight="shared float32", offset=1.0),
    _qk(by="interleaved sections", rounding="once", weight="own float32"),
    _qk(head_dim=256, every_op=False, table="float32", first=True),
    _qk(x="float16", head_dim=80, style="half flipped", first=True),
    _qk(x="float16", head_dim=96, kind="layer", weight="own x", bias="own float32", access=1),
    _qk(x="float16", head_dim=33, by="half x", style="interleaved", table_access=1),
    _qk(x="float16", head_dim=2, by="int32", weight=None),
    _qk(x="float16", head_dim=160, every_op=False, weight="shared float32", rounding="once"),
    _qk(x="float16", head_dim=2048, by="int32", partial=True),
    _qk(x="float32", head_dim=128, rounding="once", first=True, kind="layer"),
    _qk(x="float32", head_dim=64, style="interleaved", by="whole x", access=1, weight="own x"),
    _qk(x="float32", head_dim=100, partial=True, offset=1.0, v=True, rounding="every_op"),
    _qk(x="float32", head_dim=10, by="half x", every_op=False, table_access=1, bias="own float32"),
    _qk(x="float32", head_dim=512, by=None, weight="own x"),
    _qk(x="float64", head_dim=64, weight="own float64"),
    _qk(x="float64", head_dim=36, by="half x", style="half flipped", access=1, kind="layer"),
    _qk(x="float64", head_dim=128, every_op=False, weight=None, first=True, v=True, by="int32"),
)  # fmt: skip


# Values. What is promised: 0, and 1e-15 to 1e18 in size; infinities and NaN stay in their row.
LARGEST = {"float16": 6e4, "bfloat16": 1e18, "float32": 1e18, "float64": 1e18}
KINDS = ("normal", "scaled", "spread", "zeros", "one", "near a mean", "infinite", "nan")
QK_KINDS = ("normal", "steady", "zeros", "one", "infinite", "nan")


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
    elif kind == "steady":
        rows *= 10 ** rng.uniform(-1, 2, (*shape[:-1], 1))
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


class NormCase(NamedTuple):
    """One call of a norm."""

    key: NormKey
    places: dict[str, Place]
    """x, weight, bias and out, those that there are."""
    size: int
    """Of the buffer."""
    heads: int
    heads_at: int | None
    """Which axis of x is that of the heads; None if x is flat."""
    in_place: bool
    """`out` is x itself."""
    held: bool
    """By a HeadNorm; else a function is called."""
    options: dict[str, Any]
    heads_axis: int
    kinds: tuple[str, ...]
    parameter: str
    seed: int
    lengths: tuple[int | None, ...]
    """Of the calls that follow one another, on the longest axis; None for all of it."""
    fault: str | None
    refusal: tuple[type, str] | None
    """What a fault is refused with."""

    def __repr__(self):
        return "\n    ".join(f"{k}={v!r}" for k, v in self._asdict().items())


def vector_of(head_dim, itemsize):
    """Return the bytes a lane owns together."""
    from cupy_headnorm import _launch

    return _launch.row_geometry(head_dim, itemsize)[0]


def _faults(backend, case):
    """Yield the ways to spoil a call: a name, the changes, and what it must be refused with."""
    x, out = case.places["x"], case.places.get("out")
    weight = case.places.get("weight")
    options = case.options

    def placed(**changes):
        return {"places": {**case.places, **changes}}

    def opted(**changes):
        return {"options": {**options, **changes}}

    yield "eps", opted(eps=-1e-6), (ValueError, "eps is")
    yield "eps is infinite", opted(eps=math.inf), (ValueError, "eps is")
    yield "heads_axis", {"heads_axis": -1}, (ValueError, "heads_axis is -1")
    axes = len(x.shape)
    yield "heads_axis of another array", {"heads_axis": axes}, (ValueError, "heads_axis is")
    yield "rounding", opted(rounding="twice"), (ValueError, "rounding is 'twice'")
    if case.heads > 1 or case.heads_at is not None:
        more = opted(num_heads=case.heads + 1, head_dim=case.key.head_dim)
        yield "num_heads", more, (ValueError, "has shape .*; needs")
    yield "num_heads of none", opted(num_heads=0), (ValueError, "num_heads is 0")
    if case.key.weight is None:
        yield "offset", opted(weight_offset=1.0), (ValueError, "weight_offset is 1.0; needs")
    else:
        yield "rstd", opted(rounding="rstd"), (ValueError, "rounding is 'rstd'")
        if case.key.head_dim > 1:
            longer = weight._replace(shape=(*weight.shape[:-1], weight.shape[-1] + 1))
            yield "length of weight", placed(weight=longer), (ValueError, "has shape .*; needs")
    integers = x._replace(dtype=np.dtype(f"i{x.dtype.itemsize}"))
    given = {"out": integers} if case.in_place else {}
    yield "dtype of x", placed(x=integers, **given), (TypeError, "x has dtype")
    # Every other element of one row, if it stays in the buffer.
    apart = (*x.strides[:-1], 2 * x.dtype.itemsize)
    spaced = x._replace(strides=apart, shape=(*(1 for _ in x.shape[:-1]), x.shape[-1]))
    if x.shape[-1] > 1 and not case.in_place and x.offset + spaced.reach[1] <= case.size:
        yield "stride of x", placed(x=spaced), (ValueError, "on its last axis|has shape")
    if out is not None and not case.in_place:
        longer = out._replace(shape=(1, *out.shape), strides=(0, *out.strides))
        yield "shape of out", placed(out=longer), (ValueError, "out has shape")
        if out.dtype.itemsize == 2:
            name = {"float16": "bfloat16", "bfloat16": "float16"}[out.dtype.name]
            other = out._replace(dtype=_dtypes.from_name(name, "out").numpy)
            yield "dtype of out", placed(out=other), (TypeError, "out has dtype")
    if out is not None and backend.read_only:
        yield "read-only out", {}, (ValueError, "out is read-only; needs a writeable array")


@st.composite
def norm_cases(draw, backend, keys=NORM_KEYS):
    """Draw a call of HeadNorm, or of a function."""
    key, spoilt = draw(st.sampled_from(keys)), draw(SPOILT)
    head_dim, dtype, itemsize = key.head_dim, key.x.numpy, key.x.itemsize
    whole = vector_of(head_dim, itemsize)
    unit = whole if key.access is None else key.access * itemsize
    # Tokens and heads.
    budget = max(1, ELEMENTS // head_dim)
    many = 9 if backend.kernels or draw(st.booleans()) else 5
    heads = draw(st.sampled_from((1, 2, 3, 5)).filter(lambda n: n <= budget))
    tokens = sizes(draw, many, budget // heads)
    has_parameters = bool(key.weight or key.bias)
    flat = draw(st.integers(0, 5)) == 5
    empty = draw(st.integers(0, 29))
    if empty == 29 and tokens:
        tokens[0] = 0
    if flat:
        shape, heads_at = (*tokens, heads * head_dim), None
    else:
        heads_at = draw(st.integers(0, len(tokens)))
        if draw(st.booleans()):
            heads_at = len(tokens)
        shape = (*tokens[:heads_at], heads, *tokens[heads_at:], head_dim)
    # Parameters: (head_dim,), (heads, head_dim) or flat.
    forms = {
        name: draw(st.sampled_from(("shared", "own", "flat")))
        for name, of in (("weight", key.weight), ("bias", key.bias))
        if of
    }
    own, flat_form = "own" in forms.values(), "flat" in forms.values()
    per_head = own or flat_form
    give_heads = draw(st.booleans()) or (flat and not per_head)
    give_dim = draw(st.booleans()) or flat_form or (flat and not own) or (give_heads and not own)
    options = {
        "eps": draw(st.sampled_from((1e-6, 1e-5, 0.0, 1e-12, 1.0)) | st.floats(1e-12, 10)),
        "num_heads": heads if give_heads else None,
        "head_dim": head_dim if give_dim else None,
        "rounding": key.rounding,
        "weight_offset": draw(st.sampled_from((0.0, 1.0, -0.5))) if key.weight else 0.0,
    }
    heads_axis = -2
    if heads_at is not None:
        heads_axis = heads_at - len(shape) if draw(st.booleans()) else heads_at
    # Places.
    buffer = Buffer(draw)
    where = draw(
        st.sampled_from(("absent", "in place", "apart", "beside", "the same place", "shifted"))
    )
    shift = shifts(draw, unit, whole)
    if backend.odd_addresses and draw(st.integers(0, 49)) == 49:
        shift += 1
    written = where in ("in place", "the same place")
    packed = draw(st.integers(2, 3)) if where == "beside" else 1
    steps = strides(draw, shape, dtype, unit, backend, distinct=written, packed=packed)
    if 1 in shape[:-1] and where != "beside" and draw(st.booleans()):
        # What the stride of one entry is, nobody may ask.
        odd = itemsize * draw(st.integers(0, 99))
        steps = (*(odd if n == 1 else s for n, s in zip(shape, steps, strict=True)),)
        steps = (*steps[:-1], itemsize)
    places = {}
    if where in ("beside", "shifted"):
        # A slice of one buffer beside another: interleaved, disjoint, or overlapping in part.
        row = -(-shape[-1] * itemsize // unit) * unit
        one = row * (shape[-2] if len(shape) > 1 else 1)
        delta = draw(
            st.sampled_from((one, -one, 2 * one, row, -row, row // 2 // unit * unit, unit, -unit))
        )
        x = buffer.place(shape, steps, dtype, shift, slack=abs(delta))
        places["out"] = x._replace(offset=x.offset + delta)
    else:
        x = buffer.place(shape, steps, dtype, shift)
    places["x"] = x
    if written:
        places["out"] = x
    elif where == "apart":
        steps = strides(draw, shape, dtype, unit, backend, distinct=True)
        places["out"] = buffer.place(shape, steps, dtype, unit * draw(st.integers(0, 3)))
    misaligned = draw(st.sampled_from(sorted(forms))) if forms and not key.aligned else None
    held = has_parameters and key.aligned and draw(st.booleans())
    for name, form in forms.items():
        of = getattr(key, name)
        size = {"shared": (head_dim,), "own": (heads, head_dim), "flat": (heads * head_dim,)}[form]
        step = 16 if key.aligned else of.itemsize
        steps = strides(draw, size, of.numpy, step, backend)
        at = of.itemsize if name == misaligned else 0
        if not key.aligned and name != misaligned:
            at = of.itemsize * draw(st.integers(0, 3))
        place = buffer.place(size, steps, of.numpy, at)
        if "out" in places and not held and draw(st.integers(0, 19)) == 19:
            # In the result's bytes.
            low, high = place.reach
            near = (places["out"].offset + low) // 16 * 16 + at
            if near + low >= GUARD and near + high + GUARD <= buffer.size:
                place = place._replace(offset=near)
        places[name] = place
    usual = ("normal", "scaled", "spread", "zeros", "one", "near a mean")
    kinds = draw(st.sampled_from((("normal",), usual, KINDS)))
    if key.rounding == "rstd" and dtype.name == "float16":
        # Their inverse root is a normal number of float16.
        kinds, options["eps"] = ("normal", "near a mean"), max(options["eps"], 1e-6)
    case = NormCase(
        key, places, buffer.end, heads, heads_at, where == "in place", held, options, heads_axis,
        kinds, draw(st.sampled_from(("near one", "wide", "sparse"))),
        draw(st.integers(0, 2**32 - 1)), (None,), None, None,
    )  # fmt: skip
    if spoilt:
        faults = list(_faults(backend, case))
        name, changes, refusal = draw(st.sampled_from(faults))
        return case._replace(**changes, fault=name, refusal=refusal)
    lead = longest(case)
    lengths = [(None,), (None, None)]
    if lead is not None:
        n = draw(st.integers(1, shape[lead]))
        lengths += [(n, None), (None, n, None)]
    return case._replace(lengths=draw(st.sampled_from(lengths)))


def longest(case):
    """Return the outermost axis of tokens that is longer than 1, if there is one."""
    shape = case.places["x"].shape[:-1]
    found = [axis for axis, n in enumerate(shape) if n > 1 and axis != case.heads_at]
    return found[0] if found and 0 not in shape else None


def of_length(case, length):
    """Return the same call on the first `length` tokens."""
    if length is None:
        return case
    axis = longest(case)
    places = {
        name: place.cut(axis, 0, length) if name in ("x", "out") else place
        for name, place in case.places.items()
    }
    return case._replace(places=places)


class QKCase(NamedTuple):
    """One call of QKNorm."""

    key: QKKey
    places: dict[str, Place]
    """Of q, k and v, "out of q" and so on, cos, sin, positions, and of a packed buffer."""
    size: int
    in_place: bool
    heads_axis: int
    eps: tuple[float, float]
    kinds: tuple[str, ...]
    seed: int
    lengths: tuple[None, ...]
    """As many calls follow one another."""
    fault: str | None
    refusal: tuple[type, str] | None

    __repr__ = NormCase.__repr__

    @property
    def case(self):
        return self.key.case

    @property
    def heads_at(self):
        """Which axis is that of the heads."""
        return self.heads_axis % len(self.places["q"].shape)

    @property
    def parts(self):
        return ("q", "k", "v") if self.case.v else ("q", "k")

    @property
    def outs(self):
        """Names of what is written, where that is given."""
        names = [f"out of {name}" for name in self.parts]
        return names if names[0] in self.places else []


def _beside(draw, tokens):
    """Draw a shape that broadcasts to that of the tokens."""
    shape = [1 if draw(st.integers(0, 4)) == 4 else n for n in tokens]
    return shape[draw(st.sampled_from((0, 0, 0, 1, len(shape)))) :]


def _qk_faults(case):
    """Yield the ways to spoil a call, as `_faults`."""
    q, k = case.places["q"], case.places["k"]

    def without(*names, **more):
        return {"places": {n: p for n, p in case.places.items() if n not in names} | more}

    if "qkv" in case.places:
        return
    yield "heads_axis", {"heads_axis": -1}, (ValueError, "heads_axis is -1")
    yield "another dtype", without(k=k._replace(dtype=np.dtype("i2"))), (TypeError, "k has dtype")
    fewer = k._replace(shape=k.shape[1:], strides=k.strides[1:])
    yield "fewer axes", without(k=fewer), (ValueError, "needs as many axes as q|needs heads on")
    if case.case.v:
        yield "no v", without("v", "out of v"), (TypeError, "no v is given|needs a tuple of 3")
    else:
        yield "v", without(v=q), (TypeError, "v is given and there is no v_norm")
    if case.outs and not case.in_place:
        yield "one out", without("out of k"), (TypeError, "out is a tuple; needs a tuple of")
    turned_by = [n for n in ("positions", "cos", "sin") if n in case.places]
    if turned_by:
        yield "nothing to turn by", without(*turned_by), (ValueError, "given to turn by: nothing")
    else:
        yield "positions", without(positions=q), (ValueError, "there is no rope")
    if "positions" in case.places:
        positions = case.places["positions"]
        floats = positions._replace(dtype=np.dtype(f"f{positions.dtype.itemsize}"))
        yield "positions of floats", without(positions=floats), (TypeError, "positions has dtype")
        many = (*positions.shape[:1], *(1 for _ in q.shape), *positions.shape[1:])
        more = positions._replace(shape=many, strides=(8,) * len(many))
        if 0 not in many and positions.offset + more.reach[1] <= case.size:
            yield "shape of positions", without(positions=more), (ValueError, "broadcasts to it")
    if "cos" in case.places:
        cos = case.places["cos"]
        wider = cos._replace(shape=(*cos.shape[:-1], cos.shape[-1] + 1))
        yield "width of cos", without(cos=wider), (ValueError, "cos has shape")
        yield "cos alone", without("sin"), (ValueError, "given to turn by: cos;")


@st.composite
def qk_calls(draw, backend, keys=QK_KEYS):
    """Draw a call of QKNorm."""
    key, spoilt = draw(st.sampled_from(keys)), draw(SPOILT)
    of = key.case
    head_dim, dtype, itemsize = of.head_dim, of.dtype.numpy, of.dtype.itemsize
    whole = vector_of(head_dim, itemsize)
    unit = whole if key.access is None else key.access * itemsize
    budget = max(2, ELEMENTS // head_dim)
    how = draw(st.sampled_from(("packed", "one buffer", "apart")))
    # No heads: where the arrays' addresses do not matter.
    fewest = draw(st.integers(0, 15)) < 15 or how == "packed" or key.access is not None
    fewest = 1 if fewest or "own" in f"{of.weight}{of.bias}" else 0
    heads = [draw(st.integers(fewest, min(5, budget // 2))) for _ in "qk"]
    tokens = sizes(draw, 8 if backend.kernels else 5, budget // max(1, sum(heads)))
    heads = [*heads, heads[1]]
    if draw(st.integers(0, 29)) == 29 and tokens:
        tokens[0] = 0
    heads_at = len(tokens)
    if how != "packed" and draw(st.booleans()):
        heads_at = draw(st.integers(0, len(tokens)))
    shape = (*tokens[:heads_at], 0, *tokens[heads_at:], head_dim)

    def of_heads(n):
        return (*shape[:heads_at], n, *shape[heads_at + 1 :])

    buffer, places = Buffer(draw), {}
    names = ("q", "k", "v") if of.v else ("q", "k")
    where = draw(
        st.sampled_from(("absent", "in place", "apart", "the same places", "swapped", "shifted"))
    )
    where = "in place" if how == "packed" else where
    written = where in ("in place", "the same places")

    def slices(distinct, shift):
        """Return places of q, k and v in one buffer."""
        whole_shape = of_heads(sum(heads))
        steps = strides(draw, whole_shape, dtype, unit, backend, distinct=distinct)
        qkv = buffer.place(whole_shape, steps, dtype, shift, slack=unit)
        ends = np.cumsum([0, *heads])
        return [qkv.cut(heads_at, int(ends[i]), int(ends[i + 1])) for i in range(3)]

    def apart(distinct, shift):
        found = []
        for n in heads:
            steps = strides(draw, of_heads(n), dtype, unit, backend, distinct=distinct)
            found.append(buffer.place(of_heads(n), steps, dtype, shift, slack=unit))
            shift = unit * draw(st.integers(0, 3))
        return found

    shift = shifts(draw, unit, whole)
    if how == "packed":
        width = sum(heads) * head_dim
        steps = strides(draw, (*tokens, width), dtype, unit, backend, distinct=True)
        qkv = places["qkv"] = buffer.place((*tokens, width), steps, dtype, shift)
        by_head = qkv._replace(
            shape=of_heads(sum(heads)), strides=(*steps[:-1], head_dim * itemsize, itemsize)
        )
        ends = np.cumsum([0, *heads])
        parts = [by_head.cut(heads_at, int(ends[i]), int(ends[i + 1])) for i in range(3)]
    else:
        parts = (slices if how == "one buffer" else apart)(written, shift)
    places |= dict(zip(names, parts, strict=False))
    if where == "shifted":
        outs = [part._replace(offset=part.offset + unit) for part in parts]
    elif where == "swapped":
        outs = [parts[1], parts[0], parts[2]] if heads[0] == heads[1] else parts
    elif where == "apart":
        outs = draw(st.sampled_from((slices, apart)))(True, unit * draw(st.integers(0, 3)))
    else:
        outs = parts if written else []
    places |= {f"out of {n}": out for n, out in zip(names, outs, strict=False)}
    # What turns.
    by = of.by or ""
    if by in ("int32", "int64") or "sections" in by:
        positions = np.dtype(np.int32 if by == "int32" else np.int64)
        front = [3] if "sections" in by else []
        beside = (*front, *_beside(draw, tokens))
        size = positions.itemsize
        # The last stride is free too.
        steps = strides(draw, (*beside, 1), positions, size, backend)[:-1]
        places["positions"] = buffer.place(beside, steps, positions)
    elif by:
        table = of.of_table.numpy
        width = of.rotary_dim if "whole" in by else of.rotary_dim // 2
        most = min(16, whole // itemsize * table.itemsize)
        step = most if key.table_access is None else key.table_access * table.itemsize
        beside = (*_beside(draw, tokens), width)
        steps = strides(draw, beside, table, step, backend)
        at = shifts(draw, step, most)
        places["cos"] = buffer.place(beside, steps, table, at)
        places["sin"] = buffer.place(beside, steps, table, step * draw(st.integers(0, 3)))
    kinds = draw(st.sampled_from((("normal",), ("normal", "zeros", "one"), QK_KINDS)))
    heads_axis = heads_at - len(shape) if how == "packed" or draw(st.booleans()) else heads_at
    eps = [draw(st.sampled_from((1e-5, 1e-6, 1e-3))) for _ in "qk"]
    case = QKCase(
        key, places, buffer.end, written and where == "in place", heads_axis, tuple(eps), kinds,
        draw(st.integers(0, 2**32 - 1)), (None,), None, None,
    )  # fmt: skip
    if spoilt:
        faults = list(_qk_faults(case))
        if faults:
            name, changes, refusal = draw(st.sampled_from(faults))
            return case._replace(**changes, fault=name, refusal=refusal)
    return case._replace(lengths=draw(st.sampled_from(((None,), (None, None)))))
