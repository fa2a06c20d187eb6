"""Weights, biases and tables in memory of CUDA devices, which stays until nobody holds it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.layout import CPU, Device
from cupy_headnorm._arrays.views import ArrayView
from cupy_headnorm._cuda import driver, environment, memory
from cupy_headnorm._cuda.memory import Owner
from cupy_headnorm._cuda.once import made_once
from cupy_headnorm._rules import options as option_rules

View = ArrayView | None


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


class Held:
    """
    A norm's weight and bias in each memory where they were needed.

    No norm is referred to from here: one that is let go is freed at once, and with it its memory,
    for which cudaFree waits until the device is idle. A collector would do that at any moment.
    """

    def __init__(self, weight: np.ndarray | None, bias: np.ndarray | None) -> None:
        self._arrays = (weight, bias)
        self.on_host: tuple[View, View] = (_viewed(weight, "weight"), _viewed(bias, "bias"))
        self.on_device: dict[int, tuple[View, View]] = {}

    def refuse_capture(self, x: ArrayView) -> None:
        """Raise CaptureError where the first upload to the device of `x` would be captured."""
        device = x.layout.device
        if device.index not in self.on_device:
            stream = x.library.stream(device.index)
            memory.refuse_capture(stream, f"the weight is not on {device} yet")

    def on(self, index: int) -> tuple[View, View]:
        """Return both on a CUDA device, uploaded if need be."""
        return made_once(self.on_device, index, lambda: self._uploaded(index))

    def _uploaded(self, index: int) -> tuple[View, View]:
        weight, bias = self._arrays
        if weight is not None:
            # Adding an offset, though it be 0, makes 0 of -0. A kernel that adds none, and
            # multiplies two elements at once, has to give the same bits.
            weight = np.where(weight == 0, weight.dtype.type(0), weight)
        on_device = (None if array is None else upload(array, index) for array in (weight, bias))
        return next(on_device), next(on_device)

    def unload(self, forget: Sequence[Callable[[], None]]) -> None:
        """Wait for the work in flight and free every device copy; `forget` lets others go too."""
        # An upload that another thread is at, or this one when a signal's handler came, is still
        # put into `loaded`: the call that asked for it lets go of it last.
        loaded, self.on_device = self.on_device, {}
        for let_go in forget:
            let_go()
        for index in loaded.copy():
            memory.synchronize(index)


def _viewed(array: np.ndarray | None, name: str) -> View:
    return None if array is None else find.view(array, name)


def snapshot(array: Any, role: str) -> np.ndarray | None:
    """Return a read-only copy of an array of any library on the host; None of None."""
    if array is None:
        return None
    library = find.library_of(array, role)
    values = np.array(library.to_host(array, role), order="C", copy=True, subok=False)
    values.flags.writeable = False
    return values


def device_of(device: Any) -> Device:
    """Read a device as torch, CuPy and people write it."""
    if device is None:
        return Device("cuda", environment.import_cupy().cuda.runtime.getDevice())
    if hasattr(device, "__index__"):
        return Device("cuda", option_rules.integer(device, "device"))
    kind, index = getattr(device, "type", None), getattr(device, "index", None)
    if kind is None and hasattr(device, "id"):  # cupy.cuda.Device
        kind, index = "cuda", device.id
    if isinstance(device, str):
        kind, _, number = device.partition(":")
        index = int(number) if number.isdecimal() else None
        if number and index is None:
            kind = None
    if kind == "cpu":
        return CPU
    if kind == "cuda":
        return device_of(None) if index is None else Device("cuda", index)
    raise ValueError(
        f"device is {option_rules.shown(device)}; needs an index, 'cpu', 'cuda' or 'cuda:<index>'"
    )
