"""What a call means: every rule on kinds, shapes, strides and dtypes, each with its error."""

from __future__ import annotations

import math
from typing import NamedTuple

from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._rules import heads as head_rules
from cupy_headnorm._rules import options
from cupy_headnorm._rules.axes import RowAxis, merged
from cupy_headnorm._rules.heads import Geometry
from cupy_headnorm._rules.options import Kind, NormOptions, Rounding


class NormSpec(NamedTuple):
    """What one compiled kernel computes."""

    kind: Kind
    x: DType
    weight: DType | None
    bias: DType | None
    head_dim: int
    rounding: Rounding
    offset: bool
    """Whether a weight has one; nothing is added to it else."""

    def words(self, kernel: str) -> list[str]:
        """Return what the name of `kernel` tells of the norm."""
        words = [kernel, self.kind, self.x.short]
        words.append(self.weight.short if self.weight else "unweighted")
        words += [f"bias_{self.bias.short}"] if self.bias else []
        words.append(f"d{self.head_dim}")
        words += [self.rounding] if self.rounding != "once" else []
        return words + ["offset"] * self.offset

    @property
    def name(self) -> str:
        """Return the kernel's name in a profiler: ``head_norm_rms_bf16_f32_d128``."""
        return "_".join(self.words("head_norm"))


class NormCall(NamedTuple):
    """A validated call: which kernel, over which rows."""

    spec: NormSpec
    axes: tuple[RowAxis, ...]
    """The outermost comes first; neighbours are merged where every array allows it."""
    rows: int
    eps: float
    weight_offset: float
    alignments: tuple[int, ...]
    """The largest power of two, at most 16, that divides each row's address, by array."""


def describe(
    opts: NormOptions, x: Layout, weight: Layout | None, bias: Layout | None, out: Layout
) -> NormCall:
    """
    Validate a call and reduce it to rows.

    TypeError where a dtype or device does not fit, ValueError where a shape, stride or count does
    not.
    """
    heads, head_dim = _checked(opts, x, weight, bias, out)
    weight_stride = head_rules.parameter_stride(weight, "weight", head_dim)
    bias_stride = head_rules.parameter_stride(bias, "bias", head_dim)
    flat, heads_axis = head_rules.head_axis(x.shape, heads, head_dim, opts.heads_axis)
    outer = zip(x.shape[:-1], x.strides[:-1], out.strides[:-1], strict=True)
    axes = [
        RowAxis(*of_axis, *((weight_stride, bias_stride) if i == heads_axis else (0, 0)))
        for i, of_axis in enumerate(outer)
    ]
    if flat:
        step = head_dim * x.dtype.itemsize
        axes.append(RowAxis(x.shape[-1] // head_dim, step, step, weight_stride, bias_stride))
    rows = math.prod(axis.size for axis in axes)
    axes_merged = merged(axes, RowAxis(1)) if rows else ()
    dtypes = (x.dtype, weight and weight.dtype, bias and bias.dtype)
    return NormCall(
        NormSpec(opts.kind, *dtypes, head_dim, opts.rounding, opts.weight_offset != 0),
        axes_merged,
        rows,
        opts.eps,
        opts.weight_offset,
        tuple(
            math.gcd(layout.alignment, *(axis[i] for axis in axes_merged)) if layout else 16
            for i, layout in enumerate((x, out, weight, bias), 1)
        ),
    )


def _checked(
    opts: NormOptions, x: Layout, weight: Layout | None, bias: Layout | None, out: Layout
) -> tuple[Geometry, int]:
    """Check the arrays, and return what is known of the heads, and head_dim."""
    if not x.shape:
        raise ValueError("x has shape (); needs (..., num_heads, head_dim)")
    head_rules.check_same("shape", out, "out", x, "x")
    head_rules.check_same("dtype", out, "out", x, "x")
    for name, layout in (("weight", weight), ("bias", bias), ("out", out)):
        head_rules.check_device(layout, name, x, "x")
    heads = head_rules.geometry_of(opts, weight, bias)
    head_dim = x.shape[-1] if heads.head_dim is None else heads.head_dim
    if head_dim == 0:
        raise ValueError(f"x has shape {x.shape}; needs a head_dim of 1 or more")
    options.check_parameters(opts, weight, bias)
    options.check_result(opts, x.dtype, weight, bias)
    head_rules.check_last_stride(x, "x")
    head_rules.check_last_stride(out, "out")
    return heads, head_dim
