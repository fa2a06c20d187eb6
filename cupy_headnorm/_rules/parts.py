"""
What a call on queries, keys and values means: every rule, each with its error.

Their heads lie in arrays of their own, *parts*, and share tokens. A token has one row of cosines
and sines for all its heads, given with the call or looked up by position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._rules import heads, rotary
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm._rules.axes import TokenAxis, merged
from cupy_headnorm._rules.norm import NormSpec
from cupy_headnorm._rules.options import Kind, NormOptions, Rounding
from cupy_headnorm._rules.rotary import RopeSpec, Rotation, Steps


class PartNorm(NamedTuple):
    """The norm of one part: checked options and where its parameters lie."""

    options: NormOptions
    weight: Layout | None
    bias: Layout | None


class PartsSpec(NamedTuple):
    """What one compiled kernel computes."""

    kind: Kind
    x: DType
    weight: DType | None
    bias: DType | None
    head_dim: int
    rounding: Rounding
    offset: bool
    all_parts_alike: bool
    """All parts rotate, and all or none have a weight, and a bias."""
    rope: RopeSpec | None

    @property
    def norm(self) -> NormSpec:
        """What is computed without the rotary embedding."""
        return NormSpec(*self[:6])

    @property
    def name(self) -> str:
        """The kernel's name in a profiler."""
        words = self.norm.words("qk_norm")
        words += ["offset"] * self.offset + ["unlike"] * (not self.all_parts_alike)
        return "_".join(words + ([self.rope.name] if self.rope else []))


class Part(NamedTuple):
    """One part of a call; strides from head to head in bytes."""

    num_heads: int
    x: int
    out: int
    weight: int
    bias: int
    eps: float
    weight_offset: float
    rotated: bool


class PartsCall(NamedTuple):
    """A validated call."""

    spec: PartsSpec
    parts: tuple[Part, ...]
    axes: tuple[TokenAxis, ...]
    """Outermost first, neighbours merged where every array allows it."""
    tokens: int
    table_row: int
    """Bytes from one position's cosines to the next's."""
    position_row: int
    """Bytes from one row of positions to the next."""
    max_position: int
    alignment: int
    """Largest power of two, at most 16, that divides the address of each row of x and out."""
    parameters: tuple[tuple[DType, int], ...]
    """Dtype and such alignment of each weight and bias."""
    table_alignment: int


def describe(
    norms: Mapping[str, PartNorm],
    x: Mapping[str, Layout],
    out: Mapping[str, Layout],
    rotation: Rotation | None,
    heads_axis: int,
) -> PartsCall:
    """
    Validate a call and reduce it to tokens and heads.

    `norms`, `x` and `out` go by part: ``q``, ``k`` and, if there is one, ``v``.

    Raises
    ------
    ValueError
        A shape, stride or count does not fit.
    TypeError
        A dtype or device does not fit.
    """
    q = x["q"]
    heads_axis = option_rules.checked_heads_axis(heads_axis)
    head_dim = _head_dim(norms, q)
    spec = _spec_of(norms, q.dtype, head_dim)
    for name in x:
        _check_part(name, x[name], out[name], q, head_dim, heads_axis)
    parts = tuple(_part(name, norms[name], x[name], out[name], head_dim, heads_axis) for name in x)
    tokens_shape = _without_heads(q.shape, heads_axis)
    none = (0,) * len(tokens_shape)
    steps = Steps(none, none)
    tables = []
    if rotation is not None:
        rope = rotary.rope_spec(rotation, head_dim, q)
        spec = spec._replace(
            rope=rope, all_parts_alike=spec.all_parts_alike and all(rotation.rotated)
        )
        parts = tuple(p._replace(rotated=t) for p, t in zip(parts, rotation.rotated, strict=True))
        tables = [rotation.cos, rotation.sin]
        for name, layout in zip(("cos", "sin"), tables, strict=True):
            heads.check_last_stride(layout, name)
        steps = rotary.steps(rotation, tokens_shape)
    axes = [
        TokenAxis(
            size,
            tuple(_without_heads(layout.strides, heads_axis)[axis] for layout in x.values()),
            tuple(_without_heads(out[name].strides, heads_axis)[axis] for name in x),
            steps.position[axis],
            steps.table[axis],
        )
        for axis, size in enumerate(tokens_shape)
    ]
    tokens = math.prod(tokens_shape)
    axes_merged = merged(axes, TokenAxis(1)) if tokens else ()
    strides = [s for axis in axes_merged for s in (*axis.x, *axis.out)]
    # The stride of one head says nothing: NumPy makes it an element's where x's is 0.
    strides += [s for part in parts if part.num_heads > 1 for s in (part.x, part.out)]
    parameters = tuple(
        (layout.dtype, math.gcd(layout.alignment, stride))
        for norm, part in zip(norms.values(), parts, strict=True)
        for layout, stride in ((norm.weight, part.weight), (norm.bias, part.bias))
        if layout is not None
    )
    return PartsCall(
        spec,
        parts,
        axes_merged,
        tokens,
        steps.table_row,
        steps.position_row,
        steps.max_position,
        math.gcd(*(v.alignment for v in (*x.values(), *out.values())), *strides),
        parameters,
        math.gcd(
            16, *(v.alignment for v in tables), steps.table_row, *(a.table for a in axes_merged)
        ),
    )


def _check_part(
    name: str, x: Layout, out: Layout, q: Layout, head_dim: int, heads_axis: int
) -> None:
    """Check one part, beside q, and its result."""
    shape = x.shape
    if x.dtype is not q.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; needs that of q, {q.dtype}")
    if x.device != q.device:
        raise TypeError(f"{name} is on {x.device}; needs the device of q, {q.device}")
    if len(shape) != len(q.shape):
        raise ValueError(f"{name} has shape {shape} and q {q.shape}; needs as many axes as q")
    if len(shape) < 2 or not -len(shape) <= heads_axis < len(shape) - 1:
        raise ValueError(
            f"{name} has shape {shape} and heads_axis is {heads_axis}; needs heads on one axis "
            "and head_dim on the last"
        )
    if shape[-1] != head_dim:
        raise ValueError(f"{name} has shape {shape}; needs a last axis of head_dim={head_dim}")
    if _without_heads(shape, heads_axis) != _without_heads(q.shape, heads_axis):
        raise ValueError(
            f"{name} has shape {shape} and q {q.shape}; needs the same tokens, as they "
            f"differ on other axes than heads_axis={heads_axis}"
        )
    if out.shape != shape:
        raise ValueError(f"out of {name} has shape {out.shape}; needs that of {name}, {shape}")
    if out.device != x.device:
        raise TypeError(f"out of {name} is on {out.device}; needs the device of q, {x.device}")
    if out.dtype is not x.dtype:
        raise TypeError(f"out of {name} has dtype {out.dtype}; needs that of {name}, {x.dtype}")
    heads.check_last_stride(x, name)
    heads.check_last_stride(out, f"out of {name}")


def _without_heads(values: tuple[int, ...], heads_axis: int) -> tuple[int, ...]:
    """Return what belongs to the tokens: all but the axes of heads and head_dim."""
    at = heads_axis % len(values)
    return (*values[:at], *values[at + 1 : -1])


def _head_dim(norms: Mapping[str, PartNorm], q: Layout) -> int:
    for norm in norms.values():
        found = _geometry(norm)
        if found.head_dim is not None:
            return found.head_dim
    if not q.shape or q.shape[-1] == 0:
        raise ValueError(f"q has shape {q.shape}; needs (..., num_heads, head_dim)")
    return q.shape[-1]


def _geometry(norm: PartNorm) -> heads.Geometry:
    opts, weight, bias = norm
    return heads.geometry(
        opts.num_heads, opts.head_dim, weight and weight.shape, bias and bias.shape
    )


def check_norms(norms: Mapping[str, PartNorm]) -> None:
    """Refuse norms that one kernel cannot run together."""
    first = norms["q"]
    dims = {name: _geometry(norm).head_dim for name, norm in norms.items()}
    for name, norm in norms.items():
        if norm.options.kind != first.options.kind:
            raise ValueError(
                f"the norm of {name} has kind {norm.options.kind!r}; needs that of q, "
                f"{first.options.kind!r}"
            )
        # Without weight and bias nothing follows the first rounding.
        plain = norm.weight is None and norm.bias is None
        if norm.options.rounding == "rstd" or first.options.rounding == "rstd":
            plain = False
        if norm.options.rounding != first.options.rounding and not plain:
            raise ValueError(
                f"the norm of {name} has rounding {norm.options.rounding!r}; needs that of q, "
                f"{first.options.rounding!r}"
            )
        for other, head_dim in dims.items():
            if None not in (dims[name], head_dim) and head_dim != dims[name]:
                raise ValueError(
                    f"the norms of {name} and {other} have head_dim {dims[name]} and {head_dim}; "
                    "needs one"
                )
    for role in ("weight", "bias"):
        found = {n: getattr(norm, role).dtype for n, norm in norms.items() if getattr(norm, role)}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{dtype} of {name}" for name, dtype in found.items())
            raise TypeError(f"dtypes of {role} are {told}; needs one for all")


def _spec_of(norms: Mapping[str, PartNorm], x: DType, head_dim: int) -> PartsSpec:
    weights = [norm.weight.dtype for norm in norms.values() if norm.weight]
    biases = [norm.bias.dtype for norm in norms.values() if norm.bias]
    options = norms["q"].options
    for norm in norms.values():
        option_rules.check_result(
            norm.options, x, norm.weight and norm.weight.dtype, norm.bias and norm.bias.dtype
        )
    return PartsSpec(
        options.kind,
        x,
        weights[0] if weights else None,
        biases[0] if biases else None,
        head_dim,
        options.rounding,
        any(norm.options.weight_offset for norm in norms.values()),
        len(weights) in (0, len(norms)) and len(biases) in (0, len(norms)),
        None,
    )


def _part(
    name: str, norm: PartNorm, x: Layout, out: Layout, head_dim: int, heads_axis: int
) -> Part:
    num_heads = x.shape[heads_axis]
    wanted = _geometry(norm).num_heads
    # A weight (1, head_dim) serves any number of heads, as in `HeadNorm`. num_heads=1 does not: x
    # without an axis of heads, which `HeadNorm` takes then, would have its tokens taken for heads.
    if wanted not in (None, num_heads) and not (wanted == 1 and norm.options.num_heads is None):
        raise ValueError(
            f"{name} has shape {x.shape}, {num_heads} heads; needs num_heads={wanted}, as its norm"
        )
    weight = heads.parameter_stride(norm.weight, f"weight of {name}", head_dim)
    bias = heads.parameter_stride(norm.bias, f"bias of {name}", head_dim)
    one = wanted == 1  # then there is no second row
    return Part(
        num_heads,
        x.strides[heads_axis],
        out.strides[heads_axis],
        0 if one else weight,
        0 if one else bias,
        norm.options.eps,
        norm.options.weight_offset,
        rotated=False,
    )
