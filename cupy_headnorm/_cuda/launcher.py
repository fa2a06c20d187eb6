"""A kernel with all but its addresses, and the function that queues it."""

from __future__ import annotations

import ctypes
import operator
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cupy_headnorm._cuda import environment

Run = Callable[[int, tuple[int, ...]], None]
"""Queue a kernel on a stream, over the arrays at these addresses."""


class Launch(NamedTuple):
    """A kernel with everything but its addresses: `runner` adds those."""

    function: int
    """CUfunction, loaded on `device`."""
    blocks: int
    threads: int
    device: int
    params: Any
    """The kernel's parameter, a ctypes structure."""
    words: struct.Struct
    """The fields of `params` that hold addresses, in 8 bytes each, and what lies between them."""
    offset: int
    """Bytes of `params` before `words`."""
    config: Any
    spec: Any
    """With `config` what the plan needs to know for the same launch over another length."""


_thread = threading.local()


def runner(launch: Launch, sources: Mapping[int, int]) -> Run:
    """
    Return a function that queues `launch`, for the thread that asks for it.

    The parameters are packed here, once; a call writes its addresses over the last call's.

    Parameters
    ----------
    launch : Launch
    sources : Mapping of int to int
        For each of `launch.words` that is an address: its place in a call's tuple of addresses.
        Other words stay as they are.
    """
    params, arguments, start = packed(launch)
    write, at, address = launch.words.pack_into, launch.offset, ctypes.addressof(arguments)
    kept = launch.words.unpack_from(params, at)
    # With an address for each word there is nothing to keep, and nothing to put beside them.
    kept, words = (() if len(sources) == len(kept) else kept), len(kept)
    places = (len(kept) + sources[i] if i in sources else i for i in range(words))
    pick: Callable[[tuple[int, ...]], tuple[int, ...]] = operator.itemgetter(*places)
    function, blocks, threads, device = launch[:4]
    in_use = False

    def launch_here(stream: int, addresses: tuple[int, ...]) -> None:
        nonlocal in_use
        if in_use:
            # Between any two steps Python may run a signal's handler or a finalizer: this is in
            # one, and the parameters are those of the call below it.
            runner(launch, sources)(stream, addresses)
            return
        in_use = True
        try:
            write(params, at, *pick(kept + addresses))
            start(function, blocks, 1, 1, threads, 1, 1, 0, stream, address, 0)
        finally:
            in_use = False

    vars(launch_here).update(keeps=arguments)  # their address is in use
    return on_its_device(launch_here, device)


def packed(launch: Launch) -> tuple[Any, Any, Callable[..., None]]:
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


def on_its_device(launch_here: Run, device: int) -> Run:
    """Return `launch_here`, with `device` made current around it where there is another one."""
    from cupy.cuda import runtime

    if runtime.getDeviceCount() == 1:
        return launch_here
    current_device = runtime.getDevice

    def launch_there(stream: int, addresses: tuple[int, ...]) -> None:
        if current_device() == device:
            launch_here(stream, addresses)
        else:
            _on_device(device, lambda: launch_here(stream, addresses))

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
