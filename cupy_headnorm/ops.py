"""The norms as functions."""

from __future__ import annotations

from typing import Any

from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._arrays.views import AnyArray, Array
from cupy_headnorm._calls import dispatch
from cupy_headnorm._calls.operands import Given
from cupy_headnorm._calls.parameters import Norm, of_options
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._rules.options import Kind, Rounding
from cupy_headnorm._rules.options import options as checked_options

__all__ = ["launch", "layer_norm", "rms_norm"]


@untraced
def rms_norm(
    x: Array,
    /,
    weight: AnyArray | None = None,
    bias: AnyArray | None = None,
    *,
    eps: float = 1e-6,
    num_heads: int | None = None,
    head_dim: int | None = None,
    heads_axis: int = -2,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    out: Array | None = None,
) -> Array:
    r"""
    Normalize each attention head by its root mean square.

    .. math:: y_{hd} = x_{hd} \bigl(\tfrac1D \sum_k x_{hk}^2 + \epsilon\bigr)^{-1/2}
        (o + w_{hd}) + b_{hd}

    Parameters
    ----------
    x : array
        Shape ``(..., num_heads, head_dim)``, or flat ``(..., num_heads * head_dim)``; dtype
        float16, bfloat16, float32 or float64. The last axis has stride 1, the other strides are
        free. NumPy, CuPy, torch, or anything with ``__dlpack__`` and ``__array_namespace__``.
        CUDA memory is normalized by the kernel, host memory by NumPy; nothing is moved.
    weight : array, optional
        Shape ``(head_dim,)`` for one weight shared by all heads, ``(num_heads, head_dim)`` or flat
        ``(num_heads * head_dim,)``. Library and device of `x`, any of the four dtypes; the last
        axis has stride 1. Default: no scaling.
    bias : array, optional
        As `weight`. Default: none.
    eps : float, optional
        Added to the mean square before the root; finite, 0 or more. Default: ``1e-6``.
    num_heads : int, optional
        Needed for flat `x`, unless a weight of shape ``(num_heads, head_dim)``, or a flat one and
        `head_dim`, tells it. 1 is for `x` of any shape whose last axis is head_dim.
    head_dim : int, optional
        Default: the last axis of a 2-D weight; else that of a flat weight split by `num_heads`;
        else the length of a 1-D weight; else the last axis of `x`.
    heads_axis : int, optional
        Axis of the heads in `x`: ``-3`` for ``(batch, heads, tokens, head_dim)``. Default: ``-2``.
    weight_offset : float, optional
        Added to the weight in float32 (1.0 for Gemma 3 and Qwen3-Next). Default: ``0.0``.
    rounding : {"once", "before_weight", "every_op", "rstd"}, optional
        Where results are rounded to the dtype of `x`:

        - ``"once"``: the result alone. Gemma 3, Qwen3-Next, OLMo 2, Command-R+.
        - ``"before_weight"``: the normalized value too, before the weight. Qwen3, GLM-4.5.
        - ``"every_op"``: also the product with the weight, before the bias. Chameleon.
        - ``"rstd"``: the inverse root, and its product with `x`; RMS without weight and bias.
          DeepSeek-V4's queries.

        Default: ``"once"``.
    out : array, optional
        Written in place of a new array: shape, dtype, library and device of `x`, strides of its
        own, 1 on the last axis. `x` itself works in place; any other overlap raises. Default: a
        new array.

    Returns
    -------
    array
        Shape, dtype, device and library of `x`; `out` if it was given.

    Raises
    ------
    TypeError
        An array is of a dtype, library, device or kind that is not supported.
    ValueError
        A shape, stride, count or number does not fit, `out` overlaps, or a torch tensor requires
        grad while grad mode is on.
    GPUUnavailableError
        `x` is in CUDA memory and CuPy or NVRTC is missing.
    CaptureError
        The stream is captured into a CUDA graph and the call is not warmed.

    See Also
    --------
    layer_norm : The same, with the mean removed.
    HeadNorm : Holds weight and epsilon.

    Notes
    -----
    Arithmetic is float32 (float64 for float64) for 1e-15 <= abs(x) <= 1e18 or 0. Infinities and
    NaN follow IEEE and stay in their row; eps 0 on a row of zeros gives NaN. The kernel flushes
    float32 subnormals to zero. A row's bits depend on its values, dtype, head_dim and kind alone.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_headnorm import rms_norm
    >>> x = np.array([[[3.0, 4.0], [1.0, 1.0]]], dtype=np.float32)  # 1 token, 2 heads
    >>> rms_norm(x).round(4)
    array([[[0.8485, 1.1314],
            [1.    , 1.    ]]], dtype=float32)
    >>> rms_norm(x, eps=-1)
    Traceback (most recent call last):
    ValueError: eps is -1.0; needs 0 or more
    """
    norm = of_options("rms", eps, num_heads, head_dim, heads_axis, weight_offset, rounding)
    result: Array = dispatch.lane_beside(norm, x, weight, bias, out)
    return result


@untraced
def layer_norm(
    x: Array,
    /,
    weight: AnyArray | None = None,
    bias: AnyArray | None = None,
    *,
    eps: float = 1e-5,
    num_heads: int | None = None,
    head_dim: int | None = None,
    heads_axis: int = -2,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    out: Array | None = None,
) -> Array:
    r"""
    Normalize each attention head to zero mean and unit variance.

    .. math:: y_{hd} = (x_{hd} - \mu_h) (\sigma_h^2 + \epsilon)^{-1/2} (o + w_{hd}) + b_{hd},
        \quad \mu_h = \tfrac1D \sum_k x_{hk},
        \quad \sigma_h^2 = \tfrac1D \sum_k (x_{hk} - \mu_h)^2

    Parameters
    ----------
    x, weight, bias, num_heads, head_dim, heads_axis, weight_offset, rounding, out
        As in `rms_norm`.
    eps : float, optional
        Added to the variance before the root; finite, 0 or more. Default: ``1e-5``.

    Returns
    -------
    array
        Shape, dtype, device and library of `x`; `out` if it was given.

    Raises
    ------
    TypeError, ValueError, GPUUnavailableError, CaptureError
        As in `rms_norm`.

    Notes
    -----
    The variance is that of the population and taken in two passes, so a mean far from zero costs
    the precision of the mean and no more.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_headnorm import layer_norm
    >>> layer_norm(np.array([[1.0, 2.0, 3.0]])).round(4)
    array([[-1.2247,  0.    ,  1.2247]])
    """
    norm = of_options("layer", eps, num_heads, head_dim, heads_axis, weight_offset, rounding)
    result: Array = dispatch.lane_beside(norm, x, weight, bias, out)
    return result


def launch(
    config: LaunchConfig,
    x: Array,
    /,
    weight: AnyArray | None = None,
    bias: AnyArray | None = None,
    *,
    kind: Kind = "rms",
    out: Array | None = None,
    **options: Any,
) -> Array:
    """
    Run a norm in a geometry of your own choosing, to measure or to learn.

    `x` is in CUDA memory; `options` are those of `rms_norm`. Other geometries add in another order,
    so results may differ from those of the library's own choice in the last bit.
    """
    if not isinstance(config, LaunchConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; needs a LaunchConfig, as HeadNorm.plan(x) "
            "returns one"
        )
    norm = Norm(checked_options(kind, **options))
    given = Given((x,), (weight, bias), None if out is None else (out,))
    result: Array = dispatch.step_by_step(norm, given, config=config)[0]
    return result
