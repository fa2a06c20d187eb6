"""
What a call on queries, keys and values means: every rule, each with its error.

Their heads lie in arrays of their own, *parts*, and share tokens. A token has one row of cosines
and sines for all its heads, given with the call or looked up by position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from cupy_headnorm import _dtypes, _spec
from cupy_headnorm._dtypes import DType
from cupy_headnorm._layout import Layout
from cupy_headnorm._spec import NormOptions, Shape

PARTS = 3
"""As kParts in headnorm/parts.cuh."""


class PartNorm(NamedTuple):
    """The norm of one part: checked options and where its parameters lie."""

    options: NormOptions
    weight: Layout | None
    bias: Layout | None


class RopeSpec(NamedTuple):
    """What a kernel knows of a rotary embedding when it is compiled."""

    style: str
    first: bool
    """The norm comes after it."""
    rotary_dim: int
    every_op: bool
    table: DType
    whole_rows: bool
    """Cosines and sines have an entry for each element, not for each pair."""
    position: DType | None
    """None where cosines and sines are the tokens' own."""
    sections: tuple[int, ...]
    interleaved_sections: bool

    @property
    def name(self) -> str:
        """Part of a kernel's name: ``rope_half_d128_bf16``."""
        words = ["rope", self.style.replace(" ", "_"), f"d{self.rotary_dim}", self.table.short]
        words += ["before"] * self.first + ["rounded_once"] * (not self.every_op)
        words += [f"positions_{self.position.short}"] if self.position else []
        words += ["sections"] * bool(self.sections)
        return "_".join(words)


class PartsSpec(NamedTuple):
    """What one compiled kernel computes."""

    kind: str
    x: DType
    weight: DType | None
    bias: DType | None
    head_dim: int
    rounding: str
    offset: bool
    alike: bool
    """All parts turn, and all or none have a weight, and a bias."""
    rope: RopeSpec | None

    @property
    def name(self) -> str:
        """The kernel's name in a profiler."""
        words = ["qk_norm", self.kind, self.x.short]
        words.append(self.weight.short if self.weight else "unweighted")
        words += [f"bias_{self.bias.short}"] if self.bias else []
        words.append(f"d{self.head_dim}")
        words += [self.rounding] if self.rounding != "once" else []
        words += ["offset"] * self.offset + ["unlike"] * (not self.alike)
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
    turned: bool


class TokenAxis(NamedTuple):
    """One axis of the tokens: its length and strides in bytes."""

    size: int
    x: tuple[int, ...]
    out: tuple[int, ...]
    position: int
    table: int


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


class Turning(NamedTuple):
    """A rotary embedding beside a call: what it is, and the arrays that it is read from."""

    style: str
    first: bool
    rotary_dim: int
    every_op: bool
    sections: tuple[int, ...]
    interleaved_sections: bool
    turned: tuple[bool, ...]
    """By part."""
    cos: Layout
    sin: Layout
    positions: Layout | None
    """None where cos and sin are the tokens' own."""


def describe(
    norms: Mapping[str, PartNorm],
    x: Mapping[str, Layout],
    out: Mapping[str, Layout],
    turning: Turning | None,
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
    first = x["q"]
    heads_axis = _spec.checked_heads_axis(heads_axis)
    tokens_shape: Shape = ()
    head_dim = _head_dim(norms, first)
    spec = _spec_of(norms, first.dtype, head_dim)
    for name, layout in x.items():
        _check_beside(name, layout, first)
        shape = layout.shape
        if len(shape) < 2 or not -len(shape) <= heads_axis < len(shape) - 1:
            raise ValueError(
                f"{name} has shape {shape} and heads_axis is {heads_axis}; needs heads on one axis "
                "and head_dim on the last"
            )
        if shape[-1] != head_dim:
            raise ValueError(f"{name} has shape {shape}; needs a last axis of head_dim={head_dim}")
        tokens = _without_heads(shape, heads_axis)
        tokens_shape = tokens if name == "q" else tokens_shape
        if tokens != tokens_shape:
            raise ValueError(
                f"{name} has shape {shape} and q {first.shape}; needs the same tokens, as they "
                f"differ on other axes than heads_axis={heads_axis}"
            )
        if out[name].shape != shape:
            raise ValueError(
                f"out of {name} has shape {out[name].shape}; needs that of {name}, {shape}"
            )
        if out[name].device != layout.device:
            raise TypeError(
                f"out of {name} is on {out[name].device}; needs the device of q, {layout.device}"
            )
        if out[name].dtype is not layout.dtype:
            raise TypeError(
                f"out of {name} has dtype {out[name].dtype}; needs that of {name}, {layout.dtype}"
            )
        _spec.check_last_stride(layout, name)
        _spec.check_last_stride(out[name], f"out of {name}")
    parts = tuple(_part(name, norms[name], x[name], out[name], head_dim, heads_axis) for name in x)
    table_strides = position_strides = (0,) * len(tokens_shape)
    table_row = position_row = max_position = 0
    if turning is not None:
        rope = _rope_spec(turning, head_dim, first)
        spec = spec._replace(rope=rope, alike=spec.alike and all(turning.turned))
        parts = tuple(p._replace(turned=t) for p, t in zip(parts, turning.turned, strict=True))
        for name, layout in (("cos", turning.cos), ("sin", turning.sin)):
            _spec.check_last_stride(layout, name)
        if turning.cos.strides != turning.sin.strides:
            raise ValueError(
                f"cos has strides {turning.cos.strides} bytes and sin {turning.sin.strides}; "
                "needs the same of both"
            )
        if turning.positions is None:
            table_strides = _broadcast("cos", turning.cos, tokens_shape, 1)
        else:
            max_position, table_row = turning.cos.shape[0], turning.cos.strides[0]
            positions = turning.positions
            if turning.sections:
                rows = len(turning.sections)
                if not positions.shape or positions.shape[0] != rows:
                    raise ValueError(
                        f"positions have shape {positions.shape}; needs ({rows}, ...), a row for "
                        "each of the sections"
                    )
                position_row = positions.strides[0]
                positions = positions._replace(
                    shape=positions.shape[1:], strides=positions.strides[1:]
                )
            position_strides = _broadcast("positions", positions, tokens_shape, 0)
    axes = [
        TokenAxis(
            size,
            tuple(_without_heads(layout.strides, heads_axis)[axis] for layout in x.values()),
            tuple(_without_heads(out[name].strides, heads_axis)[axis] for name in x),
            position_strides[axis],
            table_strides[axis],
        )
        for axis, size in enumerate(tokens_shape)
    ]
    tokens = math.prod(tokens_shape)
    merged = _merged(axes) if tokens else ()
    strides = [s for a in merged for s in (*a.x, *a.out)] + [s for p in parts for s in (p.x, p.out)]
    parameters = tuple(
        (layout.dtype, math.gcd(layout.alignment, stride))
        for norm, part in zip(norms.values(), parts, strict=True)
        for layout, stride in ((norm.weight, part.weight), (norm.bias, part.bias))
        if layout is not None
    )
    tables = [] if turning is None else [turning.cos, turning.sin]
    return PartsCall(
        spec,
        parts,
        merged,
        tokens,
        table_row,
        position_row,
        max_position,
        math.gcd(*(v.alignment for v in (*x.values(), *out.values())), *strides),
        parameters,
        math.gcd(16, *(v.alignment for v in tables), table_row, *(a.table for a in merged)),
    )


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


def _geometry(norm: PartNorm) -> _spec.Geometry:
    opts, weight, bias = norm
    return _spec.geometry(
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
        _spec.check_result(
            norm.options, x, norm.weight and norm.weight.dtype, norm.bias and norm.bias.dtype
        )
    rounding = next(
        (n.options.rounding for n in norms.values() if n.weight or n.bias), options.rounding
    )
    return PartsSpec(
        options.kind,
        x,
        weights[0] if weights else None,
        biases[0] if biases else None,
        head_dim,
        rounding,
        any(norm.options.weight_offset for norm in norms.values()),
        len(weights) in (0, len(norms)) and len(biases) in (0, len(norms)),
        None,
    )


def _check_beside(name: str, layout: Layout, q: Layout) -> None:
    if layout.dtype is not q.dtype:
        raise TypeError(f"{name} has dtype {layout.dtype}; needs that of q, {q.dtype}")
    if layout.device != q.device:
        raise TypeError(f"{name} is on {layout.device}; needs the device of q, {q.device}")
    if len(layout.shape) != len(q.shape):
        raise ValueError(
            f"{name} has shape {layout.shape} and q {q.shape}; needs as many axes as q"
        )


def _part(
    name: str, norm: PartNorm, x: Layout, out: Layout, head_dim: int, heads_axis: int
) -> Part:
    num_heads = x.shape[heads_axis]
    wanted = _geometry(norm).num_heads
    if wanted not in (None, num_heads) and not (wanted == 1 and norm.options.num_heads is None):
        raise ValueError(
            f"{name} has shape {x.shape}, {num_heads} heads; needs num_heads={wanted}, as its norm"
        )
    weight = _spec.parameter_stride(norm.weight, f"weight of {name}", head_dim)
    bias = _spec.parameter_stride(norm.bias, f"bias of {name}", head_dim)
    one = wanted == 1  # a weight (1, head_dim) is shared, and has no second row
    return Part(
        num_heads,
        x.strides[heads_axis],
        out.strides[heads_axis],
        0 if one else weight,
        0 if one else bias,
        norm.options.eps,
        norm.options.weight_offset,
        turned=False,
    )


def _rope_spec(turning: Turning, head_dim: int, q: Layout) -> RopeSpec:
    cos, sin, positions = turning.cos, turning.sin, turning.positions
    rotary_dim = turning.rotary_dim
    if rotary_dim > head_dim:
        raise ValueError(f"rotary_dim is {rotary_dim}; needs head_dim={head_dim} at most")
    for name, layout in (("cos", cos), ("sin", sin), ("positions", positions)):
        if layout is not None and layout.device != q.device:
            raise TypeError(f"{name} is on {layout.device}; needs the device of q, {q.device}")
    if cos.dtype is not sin.dtype or cos.dtype not in (
        q.dtype,
        q.dtype.accumulate,
        _dtypes.FLOAT32,
    ):
        raise TypeError(
            f"cos has dtype {cos.dtype} and sin {sin.dtype}; needs that of q, {q.dtype}, or "
            "float32 of both"
        )
    if cos.shape != sin.shape:
        raise ValueError(f"cos has shape {cos.shape} and sin {sin.shape}; needs the same")
    width = cos.shape[-1] if cos.shape else 0
    if width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"cos has shape {cos.shape}; needs a last axis of {rotary_dim} or {rotary_dim // 2}, "
            f"for rotary_dim={rotary_dim}"
        )
    return RopeSpec(
        turning.style,
        turning.first,
        rotary_dim,
        turning.every_op,
        cos.dtype,
        width == rotary_dim,
        None if positions is None else positions.dtype,
        turning.sections,
        turning.interleaved_sections,
    )


def _broadcast(name: str, layout: Layout, tokens: Shape, last: int) -> tuple[int, ...]:
    """Return strides along the tokens' axes; `last` axes of the array are its own."""
    own = layout.shape[: len(layout.shape) - last]
    strides = layout.strides[: len(own)]
    missing = len(tokens) - len(own)
    if missing < 0 or any(
        n not in (1, wanted) for n, wanted in zip(own, tokens[missing:], strict=True)
    ):
        raise ValueError(
            f"{name} has shape {layout.shape}; needs {tokens} of q's tokens"
            f"{' and a last axis of its own' if last else ''}, or what broadcasts to it"
        )
    return (0,) * missing + tuple(
        0 if n == 1 else stride for n, stride in zip(own, strides, strict=True)
    )


def _merged(axes: list[TokenAxis]) -> tuple[TokenAxis, ...]:
    """Order axes as q's result lies in memory and merge neighbours that step as one."""
    merged: list[TokenAxis] = []
    for inner in sorted((a for a in axes if a.size != 1), key=lambda a: -abs(a.out[0])):
        outer = merged[-1] if merged else None
        if outer and all(
            o == i * inner.size
            for o, i in zip(
                (*outer.x, *outer.out, outer.position, outer.table),
                (*inner.x, *inner.out, inner.position, inner.table),
                strict=True,
            )
        ):
            merged[-1] = inner._replace(size=outer.size * inner.size)
        else:
            merged.append(inner)
    none = (0,) * len(axes[0].x) if axes else (0,)
    return tuple(merged) or (TokenAxis(1, none, none, 0, 0),)
