"""A specialisation of a kernel: what all plans share of its macros and its parameter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from cupy_headnorm._cuda import compiler
from cupy_headnorm._cuda.launcher import Launch
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
        "HN_OFFSET": str(spec.offset).lower(),
        "HN_HEAD_DIM": str(spec.head_dim),
    }


def fields(of: Any, *names: str) -> list[tuple[str, Any]]:
    """Return fields of one ctypes type."""
    return [(name, of) for name in names]


def real_of(spec: NormSpec) -> Real:
    """Return the type that a kernel adds in."""
    return ctypes.c_double if spec.x.accumulate.name == "float64" else ctypes.c_float


def loaded(
    launch: Launch,
    file: str,
    key: tuple[Any, ...],
    macros: Callable[[], dict[str, str]],
    stream: int,
) -> Launch:
    """
    Return `launch` with its function, compiled and loaded where `key` is new on its device.

    CaptureError where it is new while `stream` is captured.
    """

    def make() -> Any:
        # Over no rows: CUDA loads a function lazily, at its first launch, which a capture forbids.
        empty: Any = type(launch.params)()
        for axis in empty.axis:
            axis.size = 1
        options = compiler.options_of(macros())
        return compiler.compiled(file, options, empty, launch.threads, launch.device)

    function = compiler.loaded((*key, launch.device), stream, make)
    return launch._replace(function=function.ptr)
