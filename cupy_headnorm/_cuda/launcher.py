"""Parameters packed once, and a launch on their device."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from cupy_headnorm._cuda import environment

_thread = threading.local()


def packed(launch: Any) -> tuple[Any, Any, Callable[..., None]]:
    """Return a copy of a launch's parameters, what points to it, and the driver's own launch."""
    from cupy.cuda import driver

    params = type(launch.params).from_buffer_copy(launch.params)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    ready = _thread.__dict__.setdefault("ready", set())
    if launch.device not in ready:
        # A thread's first launch on a device needs the device's context current there.
        _on_device(launch.device, lambda: None)
        ready.add(launch.device)
    return params, arguments, driver.launchKernel


def on_its_device(launch_here: Callable[..., None], device: int) -> Callable[..., None]:
    """Return `launch_here`, with `device` made current around it where there is another one."""
    from cupy.cuda import runtime

    if runtime.getDeviceCount() == 1:
        return launch_here
    current_device = runtime.getDevice

    def launch_there(*arguments: int) -> None:
        if current_device() == device:
            launch_here(*arguments)
        else:
            _on_device(device, lambda: launch_here(*arguments))

    return launch_there


def _on_device(index: int, function: Callable[[], None]) -> None:
    """Run `function` with CUDA device `index` current."""
    runtime = environment.import_cupy().cuda.runtime
    before = runtime.getDevice()
    runtime.setDevice(index)
    try:
        function()
    finally:
        if before != index:
            runtime.setDevice(before)
