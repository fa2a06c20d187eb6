"""A kernel with all but its addresses, and the function that queues it."""

from __future__ import annotations

import ctypes
import functools
import operator
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from cupy_headnorm._cuda import environment

Run = Callable[[int, tuple[int, ...]], None]
"""Queue a kernel on a stream, over the arrays at these addresses."""
Sources = tuple[tuple[int, int], ...]
Pick = Callable[[tuple[int, ...]], tuple[int, ...]]


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


@functools.lru_cache(maxsize=256)
def picker(words: int, sources: Sources) -> Pick:
    """
    Return what puts together a launch's words.

    Parameters
    ----------
    words : int
        How many there are.
    sources : tuple of (int, int)
        For each word that is an address: its place among the words, and that of the address among
        those of a call. The other words stay as they are.

    Returns
    -------
    Callable
        Of the words that stay, followed by a call's addresses. Where an address is given for each
        word, of the addresses alone.
    """
    found = dict(sources)
    before = 0 if len(found) == words else words
    return operator.itemgetter(*(before + found[i] if i in found else i for i in range(words)))


def runner(launch: Launch, sources: Sources) -> Run:
    """
    Return a function that queues `launch`, for the thread that asks for it.

    The parameters are packed here, once; a call writes its addresses over the last call's, at the
    places that `sources` tells, as `picker` has them.
    """
    params, arguments, start = packed(launch)
    write, at, address = launch.words.pack_into, launch.offset, ctypes.addressof(arguments)
    kept = launch.words.unpack_from(params, at)
    pick = picker(len(kept), sources)
    kept = () if len(sources) == len(kept) else kept
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
