"""The arguments of a norm that are no arrays: every rule, each with its error."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._arrays.messages import shown as shown

Kind = Literal["rms", "layer"]
Rounding = Literal["once", "before_weight", "every_op", "rstd"]

DEFAULT_EPS: dict[str, float] = {"rms": 1e-6, "layer": 1e-5}
"""Qwen3 and Gemma use 1e-6, torch's and Cohere's LayerNorm 1e-5."""

KINDS: tuple[Kind, ...] = get_args(Kind)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

MAX_AXES = 64
"""An array has no more in NumPy, CuPy and torch."""
Choice = TypeVar("Choice", bound=str)


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
    """It names the dtype of a model's own result: see `check_result`."""


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


def check_result(opts: NormOptions, x: DType, weight: Layout | None, bias: Layout | None) -> None:
    """
    Refuse a call of a model's norm whose own result has another dtype than x.

    ``opts.result`` is ``"x"``, ``"promoted"`` (of x, weight and bias, as torch promotes a product)
    or ``"weight"``.
    """
    own = x
    if opts.result == "weight":
        own = weight.dtype if weight else x
    elif opts.result == "promoted":
        for parameter in (weight, bias):
            own = dtypes.promoted(own, parameter.dtype) if parameter else own
    if own is not x:
        raise TypeError(
            f"x has dtype {x} and the weight {weight and weight.dtype}, of which the model itself "
            f"makes {own}; needs x of {own}, or rounding={opts.rounding!r} given explicitly for a "
            f"result of {x}"
        )
