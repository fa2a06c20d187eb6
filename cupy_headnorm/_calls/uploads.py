"""From host arrays to memory of a CUDA device that stays until nobody holds it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.views import ArrayView
from cupy_headnorm._cuda import driver, environment, memory
from cupy_headnorm._cuda.memory import Owner


def upload(values: np.ndarray, index: int) -> ArrayView:
    """Copy `values` to CUDA device `index` and wait, so that any stream may read the copy."""
    cupy = environment.import_cupy()
    with driver.beside_captures(), cupy.cuda.Device(index):
        copy = _allocated(cupy, values.shape, values.dtype, index)
        stream = memory.side_stream()
        copy.set(values, stream=stream)
        stream.synchronize()
    return find.view(copy, "parameter")


def upload_pieces(
    shape: tuple[int, ...],
    dtype: np.dtype,
    pieces: Iterable[tuple[int, np.ndarray, np.ndarray]],
    index: int,
) -> tuple[ArrayView, ArrayView]:
    """
    Copy two arrays of one shape as `upload` does, some rows of both at a time.

    Of each piece the number of its first row comes first. The host needs to hold no more than one.
    """
    cupy = environment.import_cupy()
    with driver.beside_captures(), cupy.cuda.Device(index):
        first, second = (_allocated(cupy, shape, dtype, index) for _ in range(2))
        stream = memory.side_stream()
        for start, *piece in pieces:
            for copy, values in zip((first, second), piece, strict=True):
                copy[start : start + len(values)].set(values, stream=stream)
            stream.synchronize()  # the next piece may take this one's memory
    return find.view(first, "parameter"), find.view(second, "parameter")


def _allocated(cupy: Any, shape: tuple[int, ...], dtype: np.dtype, index: int) -> Any:
    """
    Return a new array on CUDA device `index`, which is the current one.

    The memory comes from cudaMalloc and not from CuPy's pool: cudaFree waits for the device, a
    pool would hand the bytes out again under a kernel still running on another library's stream.
    """
    size = max(math.prod(shape) * dtype.itemsize, 1)
    owner, address = Owner(), cupy.cuda.runtime.malloc(size)
    weakref.finalize(owner, memory.free, address).atexit = False
    pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, size, owner, index), 0)
    return cupy.ndarray(shape, dtype, pointer)
