"""A norm's checked options, and the weight and bias that go with them in one memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cupy_headnorm import _spec
from cupy_headnorm._arrays import ArrayView
from cupy_headnorm._spec import Kind, NormOptions
from cupy_headnorm._torch import untraced


@dataclass(frozen=True, slots=True)
class Parameters:
    """Weight and bias in one memory."""

    identity: object
    """Of options and layouts: equal for all parameters that share their plans."""
    weight_address: int
    bias_address: int
    views: tuple[ArrayView | None, ArrayView | None] = (None, None)


@functools.lru_cache(maxsize=4096)
def identity(*_: Any) -> object:
    """Return what stands for the arguments: it hashes in a tenth of their time."""
    return object()


def parameters(
    options: NormOptions, weight: ArrayView | None, bias: ArrayView | None
) -> Parameters:
    """Bind views of a weight and a bias to the options they are used with."""
    return Parameters(
        identity(options, weight and weight.layout, bias and bias.layout),
        weight.pointer if weight else 0,
        bias.pointer if bias else 0,
        (weight, bias),
    )


class Norm:
    """Checked options and, for a norm that holds its parameters, the way to them."""

    __slots__ = ("held", "options", "ready")

    def __init__(
        self, options: NormOptions, held: Callable[[Norm, ArrayView], Parameters] | None = None
    ) -> None:
        self.options = options
        self.held = held
        self.ready: dict[int, Parameters] = {}
        """Those on CUDA devices, by index. `held` fills it."""


@functools.lru_cache(maxsize=256, typed=True)
def _of_options(kind: Kind, **options: Any) -> Norm:
    return Norm(_spec.options(kind, **options))


_IMMUTABLE = {bool, float, int, str, type(None)}


@untraced
def of_options(kind: Kind, **options: Any) -> Norm:
    """Return the norm of a function's arguments, checked once where they cannot change."""
    if _IMMUTABLE.issuperset(map(type, (kind, *options.values()))):
        return _of_options(kind, **options)
    return Norm(_spec.options(kind, **options))
