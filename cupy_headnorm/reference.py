"""
The norms in NumPy: same names, signatures, arithmetic and roundings as the kernels.

They run wherever the library is called on host memory, and are public because a reference that
nobody can call convinces nobody. Rows are worked on in chunks that stay in the cache, by up to
four threads, so the extra memory is a few MiB whatever the input.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays import layout as layouts
from cupy_headnorm._arrays.layout import Layout, dense_like, layout_of
from cupy_headnorm._calls import host
from cupy_headnorm._rules import norm, options
from cupy_headnorm._rules.options import NormOptions, Rounding

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(
    x: np.ndarray,
    /,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    eps: float = 1e-6,
    num_heads: int | None = None,
    head_dim: int | None = None,
    heads_axis: int = -2,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """See `cupy_headnorm.rms_norm`; takes NumPy arrays only."""
    opts = options.options(
        "rms",
        eps=eps,
        num_heads=num_heads,
        head_dim=head_dim,
        heads_axis=heads_axis,
        weight_offset=weight_offset,
        rounding=rounding,
    )
    return _norm(opts, x, weight, bias, out)


def layer_norm(
    x: np.ndarray,
    /,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    eps: float = 1e-5,
    num_heads: int | None = None,
    head_dim: int | None = None,
    heads_axis: int = -2,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """See `cupy_headnorm.layer_norm`; takes NumPy arrays only."""
    opts = options.options(
        "layer",
        eps=eps,
        num_heads=num_heads,
        head_dim=head_dim,
        heads_axis=heads_axis,
        weight_offset=weight_offset,
        rounding=rounding,
    )
    return _norm(opts, x, weight, bias, out)


class _Placed(NamedTuple):
    pointer: int
    layout: Layout


def _placed(array: np.ndarray, name: str) -> _Placed:
    if type(array) not in (np.ndarray, np.memmap):
        raise TypeError(f"{name} is a {type(array).__name__}; the reference needs numpy.ndarray")
    layout = layout_of(array, dtypes.from_numpy(array.dtype, name))
    return _Placed(array.ctypes.data, layout)


def _norm(
    opts: NormOptions,
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    out: np.ndarray | None,
) -> np.ndarray:
    of_x = _placed(x, "x")
    of_weight = None if weight is None else _placed(weight, "weight")
    of_bias = None if bias is None else _placed(bias, "bias")
    result = dense_like(x, partial(np.empty_like, subok=False)) if out is None else out
    of_result = _placed(result, "out")
    if not result.flags.writeable:
        raise ValueError("out is read-only; needs a writeable array")
    call = norm.describe(
        opts,
        of_x.layout,
        of_weight and of_weight.layout,
        of_bias and of_bias.layout,
        of_result.layout,
    )
    layouts.check_out_layout(of_result.layout)
    layouts.check_overlaps({"x": of_x, "weight": of_weight, "bias": of_bias}, of_result)
    host.apply(call, x, weight, bias, result)
    return result
