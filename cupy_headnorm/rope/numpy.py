"""The rotary embedding in NumPy, step by step as the kernel has it."""

from __future__ import annotations

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._rules import options

STYLES = ("half", "interleaved", "half flipped")
ORDERS = ("after norm", "before norm")
ROUNDINGS = ("every_op", "once")
TABLES = ("x", "float32")


def apply(
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    style: str = "half",
    rounding: str = "every_op",
    rotary_dim: int | None = None,
) -> np.ndarray:
    """
    Rotate heads in NumPy, as the kernel does.

    Parameters
    ----------
    x : numpy.ndarray
        ``(..., head_dim)``, float16, bfloat16, float32 or float64.
    cos, sin : numpy.ndarray
        Broadcast against ``(..., rotary_dim / 2)`` or ``(..., rotary_dim)``; an axis of length 1
        stands for the heads. Of full width each dim takes its own, in the model's own order. If
        every op is rounded they are rounded to x's dtype first.
    style, rounding, rotary_dim
        As `Rope` has them; all of head_dim if `rotary_dim` is not given.

    Returns
    -------
    numpy.ndarray
        Of x's shape and dtype. The arithmetic is float32's, float64's for float64.

    Raises
    ------
    TypeError
        An array is no plain NumPy array; a dtype is none of the four.
    ValueError
        `rotary_dim` is odd, below 2 or above head_dim; a style or rounding is unknown; `cos` or
        `sin` has another width.
    """
    for name, array in (("x", x), ("cos", cos), ("sin", sin)):
        if type(array) not in (np.ndarray, np.memmap):
            raise TypeError(f"{name} is a {type(array).__name__}; needs a plain numpy.ndarray")
    dtype = dtypes.from_numpy(x.dtype, "x")
    wide, head_dim = dtype.accumulate.numpy, x.shape[-1]
    width = checked_rotary_dim(head_dim if rotary_dim is None else rotary_dim)
    if width > head_dim:
        raise ValueError(f"rotary_dim is {width}; needs at most head_dim, which is {head_dim}")
    style = options.one_of(style, STYLES, "style")
    rounding = options.one_of(rounding, ROUNDINGS, "rounding")

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype.numpy).astype(wide) if rounding == "every_op" else values

    def per_dim(values: np.ndarray, name: str) -> np.ndarray:
        dtypes.from_numpy(values.dtype, name)
        if values.shape[-1] not in (width // 2, width):
            raise ValueError(
                f"{name} is {values.shape[-1]} wide; "
                f"needs {width // 2} or {width}, for rotary_dim {width}"
            )
        if values.shape[-1] != width:
            pairs = (values[..., np.newaxis],) * 2
            values = (
                np.concatenate(pairs, -1).reshape(*values.shape[:-1], width)
                if style == "interleaved"
                else np.concatenate((values, values), -1)
            )
        return rounded(values.astype(wide))

    rotated = x[..., :width].astype(wide)
    other = np.empty_like(rotated)
    if style == "interleaved":
        other[..., 0::2], other[..., 1::2] = -rotated[..., 1::2], rotated[..., 0::2]
    else:
        other[..., : width // 2] = -rotated[..., width // 2 :]
        other[..., width // 2 :] = rotated[..., : width // 2]
    if style == "half flipped":
        other = -other
    with np.errstate(all="ignore"):  # infinities and NaN follow IEEE without a warning
        y = rounded(rotated * per_dim(cos, "cos")) + rounded(other * per_dim(sin, "sin"))
        out = x.copy()
        out[..., :width] = y.astype(dtype.numpy)
    return out


def checked_rotary_dim(value: object) -> int:
    """Check a number of dims that rotate."""
    rotary_dim = options.integer(value, "rotary_dim")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; needs an even number, 2 or more")
    return rotary_dim
