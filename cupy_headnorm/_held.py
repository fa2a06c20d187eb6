"""A norm's own weight and bias, in each memory where they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_headnorm import _interop, _kernels, _spec
from cupy_headnorm._arrays import ArrayView
from cupy_headnorm._layout import CPU, Device
from cupy_headnorm._once import made_once
from cupy_headnorm._parameters import Norm, Parameters, parameters


class Held:
    """
    A norm's weight and bias in each memory where they were needed.

    No norm is referred to from here: one that is let go is freed at once, and with it its memory,
    for which cudaFree waits until the device is idle. A collector would do that at any moment.
    """

    def __init__(self, weight: np.ndarray | None, bias: np.ndarray | None) -> None:
        self._arrays = (weight, bias)
        self.on_host = tuple(
            None if array is None else _interop.view(array, name)
            for array, name in ((weight, "weight"), (bias, "bias"))
        )
        self.on_device: dict[int, tuple[ArrayView | None, ...]] = {}

    def __call__(self, norm: Norm, x: ArrayView) -> Parameters:
        device = x.layout.device
        if device.kind == "cpu":
            return parameters(norm.options, *self.on_host)
        found = norm.ready.get(device.index)
        if found is None:
            if device.index not in self.on_device:
                stream = x.library.stream(device.index)
                _kernels.refuse_capture(stream, f"the weight is not on {device} yet")
            held = self._loaded(device.index)
            found = norm.ready[device.index] = parameters(norm.options, *held)
            if self.on_device.get(device.index) is not held:  # unloaded meanwhile
                norm.ready.pop(device.index, None)
        return found

    def _loaded(self, index: int) -> tuple[ArrayView | None, ...]:
        """Return the arrays on a CUDA device, uploaded if need be."""
        return made_once(self.on_device, index, lambda: self._uploaded(index))

    def _uploaded(self, index: int) -> tuple[ArrayView | None, ...]:
        weight, bias = self._arrays
        if weight is not None:
            # Adding an offset, though it be 0, makes 0 of -0. A kernel that adds none, and
            # multiplies two elements at once, has to give the same bits.
            weight = np.where(weight == 0, weight.dtype.type(0), weight)
        return tuple(
            None if array is None else _interop.upload(array, index) for array in (weight, bias)
        )

    def load(self, index: int) -> None:
        """Upload to a CUDA device, once."""
        self._loaded(index)

    def unload(self, norms: dict[int, Norm]) -> None:
        """Wait for the work in flight and free every device copy, those of `norms` too."""
        # An upload that another thread is at, or this one when a signal's handler came, is still
        # put into `held`: the call that asked for it lets go of it last.
        held, self.on_device = self.on_device, {}
        for norm in tuple(norms.values()):
            norm.ready.clear()
        for index in held.copy():
            _interop.synchronize(index)


def snapshot(array: Any, role: str) -> np.ndarray | None:
    """Return a read-only copy of an array of any library on the host; None of None."""
    if array is None:
        return None
    library = _interop.library_of(array, role)
    values = np.array(library.to_host(array, role), order="C", copy=True, subok=False)
    values.flags.writeable = False
    return values


def device_of(device: Any) -> Device:
    """Read a device as torch, CuPy and people write it."""
    if device is None:
        return Device("cuda", _interop.import_cupy().cuda.runtime.getDevice())
    if hasattr(device, "__index__"):
        return Device("cuda", _spec.integer(device, "device"))
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
        f"device is {_spec.shown(device)}; needs an index, 'cpu', 'cuda' or 'cuda:<index>'"
    )
