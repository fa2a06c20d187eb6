"""Calls of HeadNorm, or of a function, drawn for the property tests: see strategies.py."""

import math
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from strategies import (
    ELEMENTS,
    GUARD,
    KINDS,
    SPOILT,
    Buffer,
    Place,
    alignment_of,
    off_boundaries,
    shifts,
    shown,
    sizes,
    strides,
)

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType


class NormKey(NamedTuple):
    """Kernels of HeadNorm, but for the number of axes."""

    kind: str
    x: DType
    weight: DType | None
    bias: DType | None
    head_dim: int
    rounding: str = "once"
    offset: bool = False
    """Of the weight."""
    access: int | None = None
    """Elements that x and out are aligned to; None for as many as a lane owns together."""
    aligned: bool = True
    """Weight and bias to 16 bytes, or one of them to no more than an element."""

    @property
    def alignment(self):
        """Bytes that x and out are aligned to."""
        return alignment_of(self.head_dim, self.x.itemsize, self.access)


NORM_KEYS = (
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128, offset=True, access=4),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128, access=2),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 128, access=1, aligned=False),
    NormKey("layer", BFLOAT16, FLOAT32, FLOAT32, 96, aligned=False),
    NormKey("layer", BFLOAT16, BFLOAT16, BFLOAT16, 128, "every_op", offset=True),
    NormKey("layer", BFLOAT16, BFLOAT16, None, 16384),
    NormKey("rms", BFLOAT16, BFLOAT16, None, 256, "before_weight", offset=True, access=1),
    NormKey("rms", BFLOAT16, FLOAT32, None, 1024, offset=True),
    NormKey("rms", BFLOAT16, FLOAT64, None, 73),
    NormKey("rms", BFLOAT16, None, None, 256, "rstd"),
    NormKey("rms", FLOAT16, FLOAT16, None, 64),
    NormKey("rms", FLOAT16, FLOAT16, None, 64, offset=True, access=1),
    NormKey("layer", FLOAT16, FLOAT16, FLOAT16, 80, offset=True),
    NormKey("layer", FLOAT16, FLOAT16, None, 512, "before_weight", access=2),
    NormKey("rms", FLOAT16, FLOAT32, BFLOAT16, 160, "every_op", offset=True),
    NormKey("rms", FLOAT16, FLOAT64, FLOAT16, 1),
    NormKey("rms", FLOAT16, None, None, 72, "rstd"),
    NormKey("rms", FLOAT16, None, None, 4099),
    NormKey("rms", FLOAT16, FLOAT16, None, 2048, access=1),
    NormKey("rms", FLOAT32, FLOAT32, None, 128),
    NormKey("rms", FLOAT32, FLOAT32, None, 128, offset=True, access=1),
    NormKey("layer", FLOAT32, BFLOAT16, FLOAT64, 100, access=2),
    NormKey("layer", FLOAT32, None, None, 3),
    NormKey("layer", FLOAT32, FLOAT32, FLOAT32, 513, offset=True),
    NormKey("rms", FLOAT32, None, FLOAT32, 37, "every_op"),
    NormKey("rms", FLOAT32, FLOAT32, None, 20000),
    NormKey("rms", FLOAT64, FLOAT64, None, 64),
    NormKey("rms", FLOAT64, FLOAT64, FLOAT32, 64, "before_weight", offset=True, access=1),
    NormKey("layer", FLOAT64, FLOAT32, BFLOAT16, 33, offset=True, aligned=False),
)


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
    """Of x's rows, of `KINDS`."""
    parameter: str
    """The kind of weight and bias."""
    seed: int
    """Of all values."""
    lengths: tuple[int | None, ...]
    """Of the calls that follow one another, on the `outermost` axis; None for all of it."""
    fault: str | None
    refusal: tuple[type, str] | None
    """What a fault is refused with."""

    __repr__ = shown


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
            other = out._replace(dtype=dtypes.from_name(name, "out").numpy)
            yield "dtype of out", placed(out=other), (TypeError, "out has dtype")
    if out is not None and backend.read_only:
        yield "read-only out", {}, (ValueError, "out is read-only; needs a writeable array")


@st.composite
def drawn_norm_case(draw, backend, keys):
    """Draw a call of HeadNorm, or of a function."""
    key, spoilt = draw(st.sampled_from(keys)), draw(SPOILT)
    head_dim, dtype, itemsize = key.head_dim, key.x.numpy, key.x.itemsize
    whole, unit = alignment_of(head_dim, itemsize), key.alignment
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
    # What alone is off the boundaries of 16 bytes: an address, or the stride of an array's rows.
    misaligned = draw(st.sampled_from(sorted(forms))) if forms and not key.aligned else None
    by_stride = misaligned is not None and heads > 1 and draw(st.integers(0, 2)) < 2
    if by_stride:
        forms[misaligned] = "own"
    own, flat_form = "own" in forms.values(), "flat" in forms.values()
    per_head = own or flat_form
    give_heads = draw(st.booleans()) or (flat and not per_head)
    give_dim = draw(st.booleans()) or flat_form or (flat and not own) or (give_heads and not own)
    options = {
        "eps": draw(st.sampled_from((1e-6, 1e-5, 0.0, 1e-12, 1.0)) | st.floats(1e-12, 10)),
        "num_heads": heads if give_heads else None,
        "head_dim": head_dim if give_dim else None,
        "rounding": key.rounding,
        "weight_offset": draw(st.sampled_from((1.0, -0.5))) if key.offset else 0.0,
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
    # The same of `whole` bytes: every address, or one stride of x or of out.
    off = draw(st.sampled_from((None, "x", "out"))) if unit < whole else None
    if off == "out" or (off and where != "absent"):
        where = "apart"
    shift, between = (0, whole) if off else (shift, unit)
    if backend.odd_addresses and draw(st.integers(0, 49)) == 49:
        shift += 1
    written = where in ("in place", "the same place")
    packed = draw(st.integers(2, 3)) if where == "beside" else 1
    steps = strides(draw, shape, dtype, between, backend, distinct=written, packed=packed)
    if 1 in shape[:-1] and where != "beside" and draw(st.booleans()):
        # What the stride of one entry is, nobody may ask.
        odd = itemsize * draw(st.integers(0, 99))
        steps = (*(odd if n == 1 else s for n, s in zip(shape, steps, strict=True)),)
        steps = (*steps[:-1], itemsize)
    if off == "x":
        steps, more = off_boundaries(shape, steps, unit)
        shift += more
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
        steps = strides(draw, shape, dtype, between, backend, distinct=True)
        shift = between * draw(st.integers(0, 3))
        if off == "out":
            steps, shift = off_boundaries(shape, steps, unit)
        places["out"] = buffer.place(shape, steps, dtype, shift)
    held = has_parameters and key.aligned and draw(st.booleans())
    for name, form in forms.items():
        of = getattr(key, name)
        size = {"shared": (head_dim,), "own": (heads, head_dim), "flat": (heads * head_dim,)}[form]
        step = 16 if key.aligned or by_stride else of.itemsize
        steps = strides(draw, size, of.numpy, step, backend)
        at = of.itemsize if name == misaligned else step * draw(st.integers(0, 3))
        if name == misaligned and by_stride:
            steps, at = off_boundaries(size, steps, of.itemsize)
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
    lead = outermost(case)
    lengths = [(None,), (None, None)]
    if lead is not None:
        # The stride of one entry is off nothing.
        n = draw(st.integers(2 if off else 1, shape[lead]))
        lengths += [(n, None), (None, n, None)]
    return case._replace(lengths=draw(st.sampled_from(lengths)))


def outermost(case):
    """Return the outermost axis of tokens that is longer than 1, if there is one."""
    shape = case.places["x"].shape[:-1]
    found = [axis for axis, n in enumerate(shape) if n > 1 and axis != case.heads_at]
    return found[0] if found and 0 not in shape else None


def of_length(case, length):
    """Return the same call on the first `length` tokens."""
    if length is None:
        return case
    axis = outermost(case)
    places = {
        name: place.cut(axis, 0, length) if name in ("x", "out") else place
        for name, place in case.places.items()
    }
    return case._replace(places=places)
