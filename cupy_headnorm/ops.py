"""The norms as functions: docstrings and the choice of backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cupy_headnorm import _interop, _kernels, _launch, _spec, reference
from cupy_headnorm._arrays import ArrayView
from cupy_headnorm._launch import LaunchConfig
from cupy_headnorm._layout import Device
from cupy_headnorm._spec import NormCall, NormOptions

__all__ = ["launch", "layer_norm", "rms_norm"]


def rms_norm(
    x,
    weight=None,
    bias=None,
    /,
    *,
    eps=1e-6,
    num_heads=None,
    head_dim=None,
    heads_axis=-2,
    weight_offset=0.0,
    rounding="once",
    out=None,
):
    r"""
    Normalize each attention head by its root mean square.

    .. math:: y_{hd} = x_{hd} \bigl(\tfrac1D \textstyle\sum_k x_{hk}^2 + \epsilon\bigr)^{-1/2}
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
        ``(num_heads * head_dim,)``. Library and device of `x`, any of the four dtypes.
        Default: no scaling.
    bias : array, optional
        As `weight`. Default: none.
    eps : float, optional
        Added to the mean square before the root; finite, 0 or more. Default: ``1e-6``.
    num_heads : int, optional
        Needed for flat `x`, unless a weight of shape ``(num_heads, head_dim)`` tells it. 1 is not
        checked: heads of one and flat input look the same.
    head_dim : int, optional
        Default: the last axis of a 2-D weight; else that of a flat weight split by `num_heads`;
        else the length of a 1-D weight; else the last axis of `x`.
    heads_axis : int, optional
        Axis of the heads in `x`: ``-3`` for ``(batch, heads, tokens, head_dim)``. Default: ``-2``.
    weight_offset : float, optional
        Added to the weight in float32 (1.0 for Gemma 3 and Qwen3-Next). Default: ``0.0``.
    rounding : {"once", "before_weight"}, optional
        ``"once"`` rounds the result to the dtype of `x` once. ``"before_weight"`` also rounds the
        normalized value before the weight, as Qwen3 and Llama do. Default: ``"once"``.
    out : array, optional
        Written in place of a new array: shape, dtype, library and device of `x`, strides of its
        own. `x` itself works in place; any other overlap raises. Default: a new array.

    Returns
    -------
    array
        Shape, dtype, device and library of `x`; `out` if it was given.

    Raises
    ------
    TypeError
        An array is of a dtype, library, device or kind that is not served.
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
    opts = _spec.options(
        "rms",
        eps=eps,
        num_heads=num_heads,
        head_dim=head_dim,
        heads_axis=heads_axis,
        weight_offset=weight_offset,
        rounding=rounding,
    )
    return apply(opts, x, weight, bias, out=out)


def layer_norm(
    x,
    weight=None,
    bias=None,
    /,
    *,
    eps=1e-5,
    num_heads=None,
    head_dim=None,
    heads_axis=-2,
    weight_offset=0.0,
    rounding="once",
    out=None,
):
    r"""
    Normalize each attention head to zero mean and unit variance.

    .. math:: y_{hd} = (x_{hd} - \mu_h) (\sigma_h^2 + \epsilon)^{-1/2} (o + w_{hd}) + b_{hd},
        \quad \mu_h = \tfrac1D \textstyle\sum_k x_{hk},
        \quad \sigma_h^2 = \tfrac1D \textstyle\sum_k (x_{hk} - \mu_h)^2

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
    opts = _spec.options(
        "layer",
        eps=eps,
        num_heads=num_heads,
        head_dim=head_dim,
        heads_axis=heads_axis,
        weight_offset=weight_offset,
        rounding=rounding,
    )
    return apply(opts, x, weight, bias, out=out)


def launch(
    config: LaunchConfig,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    /,
    *,
    kind: str = "rms",
    out: Any = None,
    **options: Any,
) -> Any:
    """
    Run a norm in a geometry of your own choosing, to measure or to learn.

    `x` is in CUDA memory; `options` are those of `rms_norm`. Other geometries add in another order,
    so results may differ from those of the library's own choice in the last bit.
    """
    opts = _spec.options(kind, **options)
    return apply(opts, x, weight, bias, out=out, config=config)


Held = Callable[[ArrayView], tuple[ArrayView | None, ArrayView | None]]
"""From the view of x to those of a norm's own weight and bias on its device."""


class _Plan(NamedTuple):
    call: NormCall
    launch: _kernels.Launch | None
    """None where the reference runs, or nothing."""


_plans: dict[tuple[Any, ...], _Plan] = {}
_MAX_PLANS = 4096
"""A plan is about 1 KiB; a server that meets more layouts than this starts over."""


def apply(
    opts: NormOptions,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    out: Any = None,
    held: Held | None = None,
    config: LaunchConfig | None = None,
    dry: bool = False,
) -> Any:
    """
    Run a norm on any array, with a weight beside it or one `held` by a HeadNorm.

    `dry` stops short of the arithmetic, with all prepared for it.
    """
    x_view = _interop.view(x, "x")
    library, device = x_view.library, x_view.layout.device
    on_gpu = device.kind == "cuda"
    if on_gpu:
        _interop.import_cupy()
    stream = library.stream(device.index) if on_gpu else 0
    if held is None:
        weight_view = None if weight is None else _interop.view_beside(x_view, weight, "weight")
        bias_view = None if bias is None else _interop.view_beside(x_view, bias, "bias")
    else:
        weight_view, bias_view = held(x_view)
    if out is None:
        if on_gpu and library.name != "torch":
            _kernels.refuse_capture(stream, "a result without out would be allocated")
        result = library.empty_like(x_view)
        out_view = _interop.view(result, "out")
    else:
        result = out
        out_view = _interop.view_beside(x_view, out, "out")
        if not out_view.writeable:
            raise ValueError("out is read-only; needs a writeable array")
    plan = _planned(opts, x_view, weight_view, bias_view, out_view, stream, config)
    if out is not None:
        inputs = {"x": x_view}
        if held is None:
            inputs.update(weight=weight_view, bias=bias_view)
        for name, view in inputs.items():
            if view is not None:
                _spec.check_overlap(
                    name, view.pointer, view.layout, out_view.pointer, out_view.layout
                )
    if dry:
        return None
    if plan.launch is not None:
        _kernels.run(
            plan.launch,
            x_view.pointer,
            out_view.pointer,
            weight_view.pointer if weight_view else 0,
            bias_view.pointer if bias_view else 0,
            stream,
        )
        owners = (x_view, weight_view, bias_view) if held is None else (x_view,)
        library.launched(owners, device.index, stream)
    elif not on_gpu:
        reference.apply(
            plan.call, *(v and v.as_numpy() for v in (x_view, weight_view, bias_view, out_view))
        )
    if out is None:
        return library.deliver(result, x_view)
    library.wrote(out)
    return out


def _planned(
    opts: NormOptions,
    x: ArrayView,
    weight: ArrayView | None,
    bias: ArrayView | None,
    out: ArrayView,
    stream: int,
    config: LaunchConfig | None,
) -> _Plan:
    layouts = (x.layout, weight and weight.layout, bias and bias.layout, out.layout)
    key = (opts, config, *layouts)
    plan = _plans.get(key)
    if plan is None:
        call = _spec.describe(opts, *layouts)
        _spec.check_out_layout(out.layout)
        plan = _Plan(call, _prepared(call, x.layout.device, stream, config))
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _prepared(
    call: NormCall, device: Device, stream: int, config: LaunchConfig | None
) -> _kernels.Launch | None:
    if device.kind == "cpu":
        if config is not None:
            raise ValueError("x is in host memory; a launch configuration needs CUDA memory")
        return None
    if call.rows == 0:
        return None
    _kernels.refuse_capture(stream, "this layout is not planned yet")
    return _kernels.prepare(call, device.index, config)


def plan(opts: NormOptions, x: Any, held: Held) -> LaunchConfig:
    """Return the geometry for a result laid out like `x`; that of an H100 for host memory."""
    x_view = _interop.view(x, "x")
    device = x_view.layout.device
    weight, bias = held(x_view)
    call = _spec.describe(
        opts, x_view.layout, weight and weight.layout, bias and bias.layout, x_view.layout
    )
    if device.kind == "cpu":
        return _launch.plan(call)
    return _launch.plan(call, _kernels.limits(device.index))
