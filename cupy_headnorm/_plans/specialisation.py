"""A specialisation of a kernel: what all plans share of its macros and its parameter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

from cupy_headnorm._rules.norm import NormSpec

ARRAYS = ("x", "out", "weight", "bias")
NONE = "headnorm::None"
"""The kernels' element type of an array that there is not."""
Real = type[ctypes.c_float | ctypes.c_double]
Struct = type[ctypes.Structure]


def macros(spec: NormSpec, name: str) -> dict[str, str]:
    """Return the ``HN_*`` macros that say what is computed."""
    return {
        "HN_NAME": name,
        "HN_KIND": spec.kind,
        "HN_ROUNDING": spec.rounding,
        "HN_X": spec.x.cuda,
        "HN_WEIGHT": spec.weight.cuda if spec.weight else NONE,
        "HN_BIAS": spec.bias.cuda if spec.bias else NONE,
        "HN_HEAD_DIM": str(spec.head_dim),
    }


def fields(of: Any, *names: str) -> list[tuple[str, Any]]:
    """Return fields of one ctypes type."""
    return [(name, of) for name in names]


def by_accumulate(
    make: Callable[[Real, int], Struct], axes: Iterable[int]
) -> dict[tuple[str, int], Struct]:
    """Return a kernel's parameter types by the name of the type it adds in and by its axes."""
    reals: dict[str, Real] = {"float32": ctypes.c_float, "float64": ctypes.c_double}
    return {(name, n): make(real, n) for name, real in reals.items() for n in axes}


def of_no_rows(params: Struct) -> Any:
    """
    Return a parameter over no rows, to load a kernel by.

    CUDA loads a function lazily, at its first launch, which a capture forbids.
    """
    empty: Any = params()
    for axis in empty.axis:
        axis.size = 1
    return empty
