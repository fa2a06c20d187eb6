"""A kernel with all but its addresses, and the function that queues it."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from cupy_headnorm._cuda import environment

Run = Callable[[int, tuple[int, ...]], None]
"""Queue a kernel on a stream, with the addresses of a call."""
Runs = Callable[["Launch"], Run]
"""Make such functions, of a launch over any length."""
Sources = tuple[tuple[int, int], ...]
"""Of each word of a launch that is an address: its place, and that of the address in a call."""


class Launch(NamedTuple):
    """A kernel with everything but its addresses: `runner` adds those."""

    function: int
    """CUfunction, loaded on `device`."""
    blocks: int
    threads: int
    device: int
    params: Any
    """The kernel's parameter, a ctypes structure."""
    offset: int
    """Bytes of `params` before its words, of 8 bytes each, of which some are addresses."""
    total: int
    """How many rows or groups there are: the word of `params` at `total_offset`, in bytes."""
    total_offset: int
    config: Any
    spec: Any
    """With `config` what the plan needs to know for the same launch over another length."""

    def over(self, blocks: int, total: int) -> Launch:
        """Return the launch of so many blocks over so many rows or groups."""
        return Launch(self[0], blocks, *self[2:6], total, *self[7:])


_thread = threading.local()


_LAUNCHER = """
def launcher(words, start, address):
    in_use = False

    def run_of(launch):
        function, blocks, threads, *_ = launch
        total = launch.total

        def launch_here(stream, addresses):
            nonlocal in_use
            if in_use:
                # Between any two steps Python may run a signal's handler or a finalizer: this is in
                # one, and the parameters are those of the call below it.
                runner(launch, sources)(stream, addresses)
                return
            in_use = True
            try:
                {writes}
                start(function, blocks, 1, 1, threads, 1, 1, 0, stream, address, 0)
            finally:
                in_use = False

        return launch_here

    return run_of
"""
"""
The text of a function whose `writes` bring a call's addresses and its total to a launch's words.

There is a statement for each of them. Packing all words anew, or a loop, takes 1 us more, of 10
that a call on q and k takes on an H200's host; a function for the writes alone 0.1.
"""


@functools.lru_cache(maxsize=256)
def _launcher(sources: Sources, first: int, total: int) -> Callable[..., Runs]:
    """Return the function of the text, for words that start at `first` and a total at `total`."""
    writes = [f"words[{total}] = total"]
    writes += [f"words[{first + word}] = addresses[{place}]" for word, place in sources]
    made: dict[str, Any] = {"runner": runner, "sources": sources}
    exec(compile(_LAUNCHER.format(writes="; ".join(writes)), __file__, "exec"), made)
    launcher: Callable[..., Runs] = made["launcher"]
    return launcher


def runner(launch: Launch, sources: Sources) -> Run:
    """Return a function that queues `launch`, for the thread that asks for it."""
    return runners(launch, sources)(launch)


def runners(launch: Launch, sources: Sources) -> Runs:
    """
    Return what makes such functions, of `launch` and of the same launch over other lengths.

    All of them share the parameters, which are packed here, once: a call writes its total and its
    addresses over the last call's.
    """
    memory, start, only_device = packed(launch)
    words = memoryview(memory).cast("Q")
    first, total = ((_HEAD + at) // 8 for at in (launch.offset, launch.total_offset))
    run_of = _launcher(sources, first, total)(words, start, words[0] - _HEAD)
    if only_device:
        return run_of
    return lambda launch: on_its_device(run_of(launch), launch.device)


_HEAD = 16
"""Bytes before a launch's parameters, of which 8 are their address, as the driver wants it."""


def packed(launch: Launch) -> tuple[bytearray, Callable[..., None], bool]:
    """
    Return a copy of a launch's parameters behind their address, and the driver's own launch.

    The last tells whether no other device could be current.
    """
    memory = bytearray(_HEAD)
    memory += launch.params
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[:8] = (address + _HEAD).to_bytes(8, sys.byteorder)
    known = _thread.__dict__.setdefault("devices", {})
    if launch.device not in known:
        from cupy.cuda import driver, runtime

        # A thread's first launch on a device needs the device's context current there.
        _on_device(launch.device, lambda: None)
        known[launch.device] = driver.launchKernel, runtime.getDeviceCount() == 1
    return memory, *known[launch.device]


def on_its_device(launch_here: Run, device: int) -> Run:
    """Return `launch_here`, with `device` made current around it where another one is."""
    from cupy.cuda import runtime

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
