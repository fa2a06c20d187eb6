"""What a call means: every rule on kinds, shapes, strides and dtypes, each with its error."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from cupy_headnorm import _dtypes
from cupy_headnorm._dtypes import DType
from cupy_headnorm._layout import Layout, Placed, overlap, overlaps_itself

Kind = Literal["rms", "layer"]
Rounding = Literal["once", "before_weight", "every_op", "rstd"]

DEFAULT_EPS: dict[str, float] = {"rms": 1e-6, "layer": 1e-5}
"""By kind. Qwen3 and Gemma use 1e-6, torch's and Cohere's LayerNorm 1e-5."""

KINDS: tuple[Kind, ...] = get_args(Kind)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

MAX_AXES = 64
"""Of an array, in NumPy, CuPy and torch."""

Shape = tuple[int, ...]
Choice = TypeVar("Choice", bound=str)

_SHOWN = 80
"""Characters of a value that a message shows at most."""


class NormOptions(NamedTuple):
    """The arguments of a norm that are no arrays, checked. Build one with `options`."""

    kind: Kind
    eps: float
    num_heads: int | None
    head_dim: int | None
    heads_axis: int
    weight_offset: float
    rounding: Rounding
    result: str = "x"
    """Dtype of a model's own result: see `check_result`."""


class NormSpec(NamedTuple):
    """What one compiled kernel computes."""

    kind: Kind
    x: DType
    weight: DType | None
    bias: DType | None
    head_dim: int
    rounding: Rounding

    @property
    def name(self) -> str:
        """The kernel's name in a profiler: ``head_norm_rms_bf16_f32_d128``."""
        parts = ["head_norm", self.kind, self.x.short]
        parts.append(self.weight.short if self.weight else "unweighted")
        if self.bias:
            parts.append(f"bias_{self.bias.short}")
        parts.append(f"d{self.head_dim}")
        if self.rounding != "once":
            parts.append(self.rounding)
        return "_".join(parts)


class RowAxis(NamedTuple):
    """One axis of the grid of rows: its length and each array's stride along it, in bytes."""

    size: int
    x: int
    out: int
    weight: int
    bias: int


class NormCall(NamedTuple):
    """A validated call: which kernel, over which rows."""

    spec: NormSpec
    axes: tuple[RowAxis, ...]
    """Outermost first, neighbours merged where every array allows it."""
    rows: int
    eps: float
    weight_offset: float
    alignments: tuple[int, int, int, int]
    """Largest power of two, at most 16, dividing every row's address in x, out, weight, bias."""


def shown(value: Any) -> str:
    """Return a value's repr as a message shows it: in one line, and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_of(value: Any, allowed: tuple[Choice, ...], name: str) -> Choice:
    """Check one of some words. Arrays compare element by element, so only words are compared."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; needs one of {allowed}")
    return allowed[allowed.index(value)]


def integer(value: Any, name: str) -> int:
    """Check an integer, a Python or a NumPy one."""
    try:
        return operator.index(value)
    except Exception:  # arrays raise what their library chose
        raise TypeError(f"{name} is {shown(value)}; needs an integer") from None


def count(value: Any, name: str) -> int | None:
    """Check a number of things, 1 or more, or None."""
    if value is None:
        return None
    number = integer(value, name)
    if number < 1:
        raise ValueError(f"{name} is {number}; needs 1 or more")
    return number


def real(value: Any, name: str) -> float:
    """Check a finite number; -0 becomes 0, which equals it, so that equal numbers are the same."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except OverflowError:  # an integer
        number = math.inf
    except Exception:
        raise TypeError(f"{name} is {shown(value)}; needs a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; needs a finite number")
    return number + 0.0


def checked_heads_axis(value: Any) -> int:
    """Check the axis of the heads as far as can be without x."""
    axis = integer(value, "heads_axis")
    if not -MAX_AXES <= axis < MAX_AXES:
        raise ValueError(
            f"heads_axis is {axis}; needs one of the {MAX_AXES} axes an array may have"
        )
    if axis == -1:
        raise ValueError("heads_axis is -1, the axis of head_dim; needs another, such as -2 or -3")
    return axis


def options(
    kind: Kind,
    *,
    eps: float | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    heads_axis: int = -2,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
) -> NormOptions:
    """Check the arguments that are no arrays."""
    kind = one_of(kind, KINDS, "kind")
    rounding = one_of(rounding, ROUNDINGS, "rounding")
    if rounding == "rstd" and kind != "rms":
        raise ValueError(f"rounding is 'rstd' and kind {kind!r}; needs kind 'rms'")
    eps = DEFAULT_EPS[kind] if eps is None else real(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps is {eps}; needs 0 or more")
    return NormOptions(
        kind,
        eps,
        count(num_heads, "num_heads"),
        count(head_dim, "head_dim"),
        checked_heads_axis(heads_axis),
        real(weight_offset, "weight_offset"),
        rounding,
    )


def check_parameters(opts: NormOptions, weight: object, bias: object) -> None:
    """Check which parameters there are; None stands for one that is not."""
    if weight is None and opts.weight_offset != 0:
        raise ValueError(f"weight_offset is {opts.weight_offset}; needs a weight to be added to")
    if opts.rounding == "rstd" and (weight is not None or bias is not None):
        given = "bias" if weight is None else "weight"
        raise ValueError(
            f"rounding is 'rstd' and a {given} is given; needs neither weight nor bias"
        )


def check_result(opts: NormOptions, x: DType, weight: DType | None, bias: DType | None) -> None:
    """
    Refuse a call of a model's norm whose own result has another dtype than x.

    ``opts.result`` is ``"x"``, ``"promoted"`` (of x, weight and bias, as torch promotes a product)
    or ``"weight"``.
    """
    own = x
    if opts.result == "weight":
        own = weight or x
    elif opts.result == "promoted":
        for parameter in (weight, bias):
            own = own if parameter is None else _dtypes.promoted(own, parameter)
    if own is not x:
        raise TypeError(
            f"x has dtype {x} and the weight {weight}, of which the model itself makes {own}; "
            f"needs x of {own}, or rounding={opts.rounding!r} given explicitly for a result of {x}"
        )


class Geometry(NamedTuple):
    """Heads as far as the arguments and parameters tell; x decides what is still None."""

    num_heads: int | None
    head_dim: int | None
    read_as_flat: bool
    """head_dim came from splitting a 1-D weight by num_heads: see `_head_axis`."""


@functools.lru_cache(maxsize=1024)
def geometry(
    num_heads: int | None, head_dim: int | None, weight: Shape | None, bias: Shape | None
) -> Geometry:
    """
    Find num_heads and head_dim, and check the parameters' shapes against them.

    head_dim is the argument; else the last axis of a 2-D parameter; else that of a flat one
    split by num_heads; else the length of a 1-D one.
    """
    shapes = {n: s for n, s in (("weight", weight), ("bias", bias)) if s is not None}
    if not shapes:
        return Geometry(num_heads, head_dim, read_as_flat=False)
    for name, shape in shapes.items():
        if len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(
                f"{name} has shape {shape}; needs (head_dim,), (num_heads, head_dim) "
                "or (num_heads * head_dim,)"
            )
    read_as_flat = False
    if head_dim is None:
        name, shape = max(shapes.items(), key=lambda item: len(item[1]))  # a 2-D one, if any
        head_dim = shape[-1]
        if len(shape) == 1 and num_heads is not None and num_heads > 1:
            head_dim, rest = divmod(shape[0], num_heads)
            if rest:
                raise ValueError(
                    f"{name} has shape {shape}, which num_heads={num_heads} does not divide; "
                    f"needs head_dim={shape[0]} beside it if all heads share the {name}"
                )
            read_as_flat = True
    if num_heads is None:
        for name, shape in sorted(shapes.items(), key=lambda item: -len(item[1])):  # 2-D first
            heads, rest = (shape[0], 0) if len(shape) == 2 else divmod(shape[0], head_dim)
            if rest or heads == 0:
                raise ValueError(
                    f"{name} has shape {shape}; needs ({head_dim},), (num_heads, {head_dim}) "
                    f"or a multiple of head_dim={head_dim}"
                )
            if len(shape) == 2 or heads > 1:
                num_heads = heads
                break
    for name, shape in shapes.items():
        allowed: set[Shape] = {(head_dim,)}
        if num_heads is not None:
            allowed |= {(num_heads, head_dim), (num_heads * head_dim,)}
        if shape not in allowed:
            needed = " or ".join(str(s) for s in sorted(allowed, key=lambda s: (len(s), s)))
            raise ValueError(f"{name} has shape {shape}; needs {needed}")
    return Geometry(num_heads, head_dim, read_as_flat)


def _head_axis(
    shape: Shape, num_heads: int | None, head_dim: int, heads_axis: int, *, read_as_flat: bool
) -> tuple[bool, int | None]:
    """Tell whether x is flat and, if heads matter, which of its axes (split, if flat) is theirs."""
    outer = len(shape) - 1
    if heads_axis != -2 and not (-len(shape) <= heads_axis < outer):
        raise ValueError(
            f"heads_axis is {heads_axis} and x has shape {shape}; needs one of its {outer} axes "
            "before head_dim"
        )
    if shape[-1] == head_dim:
        if num_heads is None or num_heads == 1:
            return False, None
        there = shape[heads_axis] if outer else 1
        if there != num_heads:
            raise ValueError(
                f"x has shape {shape}, {there} heads on axis {heads_axis}; needs "
                f"num_heads={num_heads} there, or for flat input a last axis of "
                f"{num_heads * head_dim} = num_heads * head_dim (head_dim={head_dim} here)"
            )
        return False, heads_axis % len(shape)
    if num_heads is None:
        raise ValueError(
            f"x has shape {shape}; needs a last axis of head_dim={head_dim}, "
            "or num_heads given for flat input"
        )
    if read_as_flat:
        # A weight of 128 with 32 heads may be shared, or flat with 4 elements a head. Only x in
        # heads of 4 tells; read as flat, any other would silently be normalized in wrong groups.
        length = num_heads * head_dim
        raise ValueError(
            f"x has shape {shape}, and a 1-D weight of {length} with num_heads={num_heads} can "
            f"mean two things; needs head_dim={length} (all heads share the weight) or "
            f"head_dim={head_dim} (it is flat)"
        )
    if shape[-1] != num_heads * head_dim:
        raise ValueError(
            f"x has shape {shape}; needs a last axis of head_dim={head_dim} "
            f"or num_heads * head_dim = {num_heads * head_dim}"
        )
    if heads_axis != -2:
        raise ValueError(
            f"heads_axis is {heads_axis} and x of shape {shape} is flat; needs -2, or x unflattened"
        )
    return True, outer


def check_last_stride(layout: Layout, name: str) -> None:
    """Refuse an array whose last axis has gaps."""
    if layout.shape[-1] > 1 and layout.size and layout.strides[-1] != layout.dtype.itemsize:
        raise ValueError(
            f"{name} has a stride of {layout.strides[-1]} bytes on its last axis; needs "
            f"{layout.dtype.itemsize}, neighbouring elements"
        )


def parameter_stride(layout: Layout | None, name: str, head_dim: int) -> int:
    """Return the bytes from one head's parameters to the next head's: 0 where all share them."""
    if layout is None:
        return 0
    check_last_stride(layout, name)
    if len(layout.shape) == 2:
        return layout.strides[0]
    return 0 if layout.shape[0] == head_dim else head_dim * layout.dtype.itemsize


def _merged(axes: list[RowAxis]) -> tuple[RowAxis, ...]:
    """Order axes as the result lies in memory and merge neighbours that step as one."""
    merged: list[RowAxis] = []
    for inner in sorted((a for a in axes if a.size != 1), key=lambda a: -abs(a.out)):
        outer = merged[-1] if merged else None
        if outer and all(o == i * inner.size for o, i in zip(outer[1:], inner[1:], strict=True)):
            merged[-1] = RowAxis(outer.size * inner.size, *inner[1:])
        else:
            merged.append(inner)
    return tuple(merged) or (RowAxis(1, 0, 0, 0, 0),)


def describe(
    opts: NormOptions, x: Layout, weight: Layout | None, bias: Layout | None, out: Layout
) -> NormCall:
    """
    Validate a call and reduce it to rows.

    Raises
    ------
    ValueError
        A shape, stride or count does not fit.
    TypeError
        A dtype or device does not fit.
    """
    if not x.shape:
        raise ValueError("x has shape (); needs (..., num_heads, head_dim)")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {out.shape}; needs that of x, {x.shape}")
    if out.dtype is not x.dtype:
        raise TypeError(f"out has dtype {out.dtype}; needs that of x, {x.dtype}")
    for name, layout in (("weight", weight), ("bias", bias), ("out", out)):
        if layout is not None and layout.device != x.device:
            raise TypeError(f"{name} is on {layout.device}; needs the device of x, {x.device}")
    heads = geometry(opts.num_heads, opts.head_dim, weight and weight.shape, bias and bias.shape)
    head_dim = x.shape[-1] if heads.head_dim is None else heads.head_dim
    if head_dim == 0:
        raise ValueError(f"x has shape {x.shape}; needs a head_dim of 1 or more")
    check_parameters(opts, weight, bias)
    check_result(opts, x.dtype, weight and weight.dtype, bias and bias.dtype)
    check_last_stride(x, "x")
    check_last_stride(out, "out")
    weight_stride = parameter_stride(weight, "weight", head_dim)
    bias_stride = parameter_stride(bias, "bias", head_dim)

    flat, heads_axis = _head_axis(
        x.shape, heads.num_heads, head_dim, opts.heads_axis, read_as_flat=heads.read_as_flat
    )
    axes = [
        RowAxis(n, sx, so, *((weight_stride, bias_stride) if axis == heads_axis else (0, 0)))
        for axis, (n, sx, so) in enumerate(
            zip(x.shape[:-1], x.strides[:-1], out.strides[:-1], strict=True)
        )
    ]
    if flat:
        step = head_dim * x.dtype.itemsize
        axes.append(RowAxis(x.shape[-1] // head_dim, step, step, weight_stride, bias_stride))
    rows = math.prod(axis.size for axis in axes)
    axes_merged = _merged(axes) if rows else ()

    def alignment(layout: Layout | None, strides: list[int]) -> int:
        return math.gcd(layout.alignment, *strides) if layout else 16

    return NormCall(
        NormSpec(
            opts.kind,
            x.dtype,
            weight and weight.dtype,
            bias and bias.dtype,
            head_dim,
            opts.rounding,
        ),
        axes_merged,
        rows,
        opts.eps,
        opts.weight_offset,
        (
            alignment(x, [axis.x for axis in axes_merged]),
            alignment(out, [axis.out for axis in axes_merged]),
            alignment(weight, [axis.weight for axis in axes_merged]),
            alignment(bias, [axis.bias for axis in axes_merged]),
        ),
    )


def tokens_axis(
    opts: NormOptions, x: Layout, out: Layout, weight: Layout | None, bias: Layout | None
) -> int | None:
    """
    Return the innermost of `leads` up to which a plan serves other lengths too; None without one.

    It does where those axes hold no heads and come outermost in `out`: a kernel then meets their
    lengths nowhere but in the number of rows.
    """
    if 0 in x.shape:
        return None
    heads = geometry(opts.num_heads, opts.head_dim, weight and weight.shape, bias and bias.shape)
    flat = heads.head_dim is not None and x.shape[-1] != heads.head_dim
    matter = heads.num_heads not in (None, 1) and not flat
    for lead in leads(x.shape[:-1], x.strides, out.strides):
        if matter and opts.heads_axis % len(x.shape) <= lead:
            continue
        one_token = out._replace(shape=out.shape[lead + 1 :], strides=out.strides[lead + 1 :])
        first, end = one_token.extent(0)
        if abs(out.strides[lead]) >= end - first:
            return lead
    return None


def leads(shape: tuple[int, ...], *strides: tuple[int, ...]) -> list[int]:
    """
    Return the axes, innermost first, up to which all step as one in arrays of these strides.

    The last of them is the outermost axis that is longer than 1.
    """
    found: list[int] = []
    for i, length in enumerate(shape):
        if found and (length < 2 or any(s[i - 1] != length * s[i] for s in strides)):
            break
        if length > 1:
            found.insert(0, i)
    return found


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
