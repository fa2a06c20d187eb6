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
from cupy_headnorm._rules.options import NormOptions
from cupy_headnorm._rules.rotary import Lookup, RopeSpec, Rotation


class PartNorm(NamedTuple):
    """The norm of one part: checked options and where its parameters lie."""

    options: NormOptions
    weight: Layout | None
    bias: Layout | None


class PartsSpec(NamedTuple):
    """What one compiled kernel computes."""

    norm: NormSpec
    all_parts_alike: bool
    """All parts rotate, and all or none have a weight, and a bias."""
    rope: RopeSpec | None

    @property
    def name(self) -> str:
        """Return the kernel's name in a profiler."""
        words = self.norm.words("qk_norm")
        words += ["unlike"] * (not self.all_parts_alike)
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
    """The outermost comes first; neighbours are merged where every array allows it."""
    tokens: int
    lookup: Lookup
    alignment: int
    """The largest power of two, at most 16, that divides the address of each row of x and out."""
    parameters: tuple[tuple[DType, int], ...]
    """The dtype and such an alignment of each weight and bias."""


def describe(
    norms: Mapping[str, PartNorm],
    x: Mapping[str, Layout],
    out: Mapping[str, Layout],
    rotation: Rotation | None,
    heads_axis: int,
) -> PartsCall:
    """
    Validate a call and reduce it to tokens and heads.

    `norms`, `x` and `out` go by part: ``q``, ``k`` and, if there is one, ``v``. TypeError where a
    dtype or device does not fit, ValueError where a shape, stride or count does not.
    """
    q = x["q"]
    heads_axis = option_rules.checked_heads_axis(heads_axis)
    head_dim = next(iter(_head_dims(norms).values()), q.shape[-1] if q.shape else 0)
    if head_dim == 0:
        raise ValueError(f"q has shape {q.shape}; needs (..., num_heads, head_dim)")
    spec = _spec_of(norms, q.dtype, head_dim)
    for name in x:
        _check_part(name, x[name], out[name], q, head_dim, heads_axis)
    parts = tuple(_part(name, norms[name], x[name], out[name], head_dim, heads_axis) for name in x)
    if rotation is not None:
        rope = rotary.rope_spec(rotation, head_dim, q)
        all_parts_alike = spec.all_parts_alike and all(rotation.rotated)
        spec = spec._replace(rope=rope, all_parts_alike=all_parts_alike)
        rotated = zip(parts, rotation.rotated, strict=True)
        parts = tuple(part._replace(rotated=of_part) for part, of_part in rotated)
    shape = _without_heads(q.shape, heads_axis)
    of_positions, of_tables, lookup = rotary.strides(rotation, shape)
    of_x = zip(*(_without_heads(x[name].strides, heads_axis) for name in x), strict=True)
    of_out = zip(*(_without_heads(out[name].strides, heads_axis) for name in x), strict=True)
    by_axis = zip(shape, of_x, of_out, of_positions, of_tables, strict=True)
    axes = [TokenAxis(*of_axis) for of_axis in by_axis]
    tokens = math.prod(shape)
    axes_merged = merged(axes, TokenAxis(1)) if tokens else ()
    steps = [step for axis in axes_merged for step in (*axis.x, *axis.out)]
    # The stride of one head says nothing: NumPy makes it an element's where x's is 0.
    steps += [step for part in parts if part.num_heads > 1 for step in (part.x, part.out)]
    parameters = tuple(
        (layout.dtype, math.gcd(layout.alignment, stride))
        for norm, part in zip(norms.values(), parts, strict=True)
        for layout, stride in ((norm.weight, part.weight), (norm.bias, part.bias))
        if layout is not None
    )
    alignment = math.gcd(*(v.alignment for v in (*x.values(), *out.values())), *steps)
    return PartsCall(spec, parts, axes_merged, tokens, lookup, alignment, parameters)


def _check_part(
    name: str, x: Layout, out: Layout, q: Layout, head_dim: int, heads_axis: int
) -> None:
    """Check one part, beside q, and its result."""
    shape = x.shape
    heads.check_same("dtype", x, name, q, "q")
    heads.check_device(x, name, q, "q")
    if len(shape) != len(q.shape):
        raise heads.layout_error(
            f"{name} has shape {shape} and q {q.shape}; needs as many axes as q"
        )
    if len(shape) < 2 or not -len(shape) <= heads_axis < len(shape) - 1:
        raise heads.layout_error(
            f"{name} has shape {shape} and heads_axis is {heads_axis}; needs heads on one axis "
            "and head_dim on the last"
        )
    if shape[-1] != head_dim:
        found, rest = divmod(shape[-1], head_dim)
        flat = "" if rest or not found else f": reshape it to (..., {found}, {head_dim})"
        raise heads.layout_error(
            f"{name} has shape {shape}; needs a last axis of head_dim={head_dim}{flat}"
        )
    if _without_heads(shape, heads_axis) != _without_heads(q.shape, heads_axis):
        raise heads.layout_error(
            f"{name} has shape {shape} and q {q.shape}; needs the same tokens, as they differ on "
            f"other axes than heads_axis={heads_axis}{_other_axis(shape, q.shape, heads_axis)}"
        )
    heads.check_same("shape", out, f"out of {name}", x, name)
    heads.check_device(out, f"out of {name}", x, "q")
    heads.check_same("dtype", out, f"out of {name}", x, name)
    heads.check_last_stride(x, name)
    heads.check_last_stride(out, f"out of {name}")


def _other_axis(shape: tuple[int, ...], of_q: tuple[int, ...], heads_axis: int) -> str:
    """Name the axis on which alone two parts differ, where their heads may be meant to lie."""
    differ = [i - len(shape) for i in range(len(shape) - 1) if shape[i] != of_q[i]]
    one = len(differ) == 1 and differ[0] != heads_axis
    return f"; heads_axis={differ[0]} takes those that differ for heads" if one else ""


def _without_heads(values: tuple[int, ...], heads_axis: int) -> tuple[int, ...]:
    """Return what belongs to the tokens: all but the axes of heads and head_dim."""
    at = heads_axis % len(values)
    return (*values[:at], *values[at + 1 : -1])


def _head_dims(norms: Mapping[str, PartNorm]) -> dict[str, int]:
    """Return head_dim by part, of the norms that tell it."""
    found = {name: heads.geometry_of(*norm).head_dim for name, norm in norms.items()}
    return {name: head_dim for name, head_dim in found.items() if head_dim is not None}


def check_norms(norms: Mapping[str, PartNorm]) -> None:
    """Refuse norms that one kernel cannot run together."""
    first = norms["q"].options
    for name, (options, weight, bias) in norms.items():
        # Without weight and bias nothing follows the first rounding.
        plain = weight is None and bias is None and "rstd" not in (options.rounding, first.rounding)
        for what in ("kind",) if plain else ("kind", "rounding"):
            found, needed = getattr(options, what), getattr(first, what)
            if found != needed:
                raise ValueError(
                    f"the norm of {name} has {what} {found!r}; needs that of q, {needed!r}"
                )
    dims = _head_dims(norms)
    for name, head_dim in dims.items():
        one = next(iter(dims))
        if head_dim != dims[one]:
            raise ValueError(
                f"the norms of {one} and {name} have head_dim {dims[one]} and {head_dim}; needs one"
            )
    for role in ("weight", "bias"):
        dtypes = {n: getattr(norm, role).dtype for n, norm in norms.items() if getattr(norm, role)}
        if len(set(dtypes.values())) > 1:
            told = ", ".join(f"{dtype} of {name}" for name, dtype in dtypes.items())
            raise TypeError(f"dtypes of {role} are {told}; needs one for all")


def _spec_of(norms: Mapping[str, PartNorm], x: DType, head_dim: int) -> PartsSpec:
    """Return what is computed beside a rotary embedding."""
    for norm in norms.values():
        option_rules.check_result(norm.options, x, norm.weight, norm.bias)
    weights = [norm.weight.dtype for norm in norms.values() if norm.weight]
    biases = [norm.bias.dtype for norm in norms.values() if norm.bias]
    options = norms["q"].options
    weight, bias = (found[0] if found else None for found in (weights, biases))
    offset = any(norm.options.weight_offset for norm in norms.values())
    return PartsSpec(
        NormSpec(options.kind, x, weight, bias, head_dim, options.rounding, offset),
        len(weights) in (0, len(norms)) and len(biases) in (0, len(norms)),
        None,
    )


def _part(
    name: str, norm: PartNorm, x: Layout, out: Layout, head_dim: int, heads_axis: int
) -> Part:
    """Check that a part has the heads of its norm, and return where they are."""
    options, weight, bias = norm
    num_heads = x.shape[heads_axis]
    wanted = heads.geometry_of(*norm).num_heads
    # A weight (1, head_dim) fits any number of heads, as in `HeadNorm`. num_heads=1 does not: x
    # without an axis of heads, which `HeadNorm` takes then, would have its tokens taken for heads.
    if wanted not in (None, num_heads) and not (wanted == 1 and options.num_heads is None):
        raise ValueError(
            f"{name} has shape {x.shape}, {num_heads} heads; needs num_heads={wanted}, as its norm"
        )
    weight_step = heads.parameter_stride(weight, f"weight of {name}", head_dim)
    bias_step = heads.parameter_stride(bias, f"bias of {name}", head_dim)
    if wanted == 1:
        weight_step = bias_step = 0  # there is no second row
    steps = (x.strides[heads_axis], out.strides[heads_axis], weight_step, bias_step)
    return Part(num_heads, *steps, options.eps, options.weight_offset, rotated=False)
