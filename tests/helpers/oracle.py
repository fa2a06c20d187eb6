"""The norms in float64 (longdouble for float64), written apart from the library."""

import numpy as np


def norm(kind, x, weight=None, bias=None, *, eps, weight_offset=0.0, rounding="once"):
    """
    Normalize NumPy `x` of shape (..., head_dim); weight and bias broadcast against it.

    Returns
    -------
    exact : array of float64 or longdouble
        Not rounded at the end; in between as `rounding` says.
    slack : array
        Sum of the sizes of terms that may have cancelled.
    product : array
        Size of the normalized value times the weight: what a second rounding is relative to;
        twice that where a third one follows.
    """
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    narrow = np.float64 if x.dtype == np.float64 else np.float32
    values = x.astype(wide)
    head_dim = x.shape[-1]
    slack = np.zeros(np.broadcast_shapes(x.shape), wide)
    with np.errstate(all="ignore"):
        mean = wide(0)
        if kind == "layer":
            mean = values.sum(-1, keepdims=True) / head_dim
        centred = values - mean
        square = (centred * centred).sum(-1, keepdims=True) / head_dim
        inverse = 1 / np.sqrt(square + wide(narrow(eps)))
        y = centred * inverse
        if kind == "layer":
            slack = slack + (np.abs(values).sum(-1, keepdims=True) / head_dim) * inverse
        if rounding == "rstd":
            y = centred * inverse.astype(x.dtype).astype(wide)
        if rounding in ("before_weight", "every_op"):
            y = y.astype(x.dtype).astype(wide)
        if weight is not None:
            # A float64 weight is narrowed beside a narrower x, and the offset added there.
            scale = (weight.astype(narrow) + narrow(weight_offset)).astype(wide)
            y = y * scale
            slack = slack * np.abs(scale)
        product = np.abs(y)
        if bias is not None:
            if rounding == "every_op":
                y = y.astype(x.dtype).astype(wide)
                product = 2 * product
            b = bias.astype(narrow).astype(wide)
            slack = slack + np.abs(y) + np.abs(b)
            y = y + b
    return y, np.where(np.isfinite(slack), slack, 0), product
