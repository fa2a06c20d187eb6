"""From a kernel's source and macros to a function loaded on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from cupy_headnorm._cuda import driver, environment, memory, source
from cupy_headnorm._cuda.once import made_once


class DeviceLimits(NamedTuple):
    """What a plan needs to know about a device. The defaults are an H100's."""

    max_threads_per_block: int = 1024


def options_of(macros: dict[str, str]) -> tuple[str, ...]:
    """Return the compiler's options for a specialisation's macros."""
    # Contraction off: a multiply and an add fuse only where the source says so, or two
    # specialisations could round one row differently.
    return ("--fmad=false", *(f"-D{k}={v}" for k, v in macros.items()))


_functions: dict[tuple[Any, ...], Any] = {}
_limits: dict[int, DeviceLimits] = {}


def limits(index: int) -> DeviceLimits:
    """Return what a plan needs to know about CUDA device `index`."""
    found = _limits.get(index)
    if found is None:
        attributes = environment.import_cupy().cuda.Device(index).attributes
        found = _limits[index] = DeviceLimits(attributes["MaxThreadsPerBlock"])
    return found


def loaded(key: tuple[Any, ...], stream: int, make: Callable[[], Any]) -> Any:
    """Return the function of `key`, which `make` compiles and loads where it is new."""
    function = _functions.get(key)
    if function is None:
        memory.refuse_capture(stream, "the kernel for this layout is not loaded yet")
        function = made_once(_functions, key, make)
    return function


def compiled(file: str, options: tuple[str, ...], empty: Any, threads: int, index: int) -> Any:
    """Compile a specialisation for CUDA device `index`, and load it by a launch over no rows."""
    cupy = environment.import_cupy()
    name = next(o.partition("=")[2] for o in options if o.startswith("-DHN_NAME="))
    kernel = cupy.RawKernel(source.pasted(file), name, options=options)
    with environment.explained(), driver.beside_captures(), cupy.cuda.Device(index):
        function = kernel.kernel
        stream = memory.side_stream()
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(empty))
        cupy.cuda.driver.launchKernel(
            function.ptr, 1, 1, 1, threads, 1, 1, 0, stream.ptr, ctypes.addressof(parameters), 0
        )
        stream.synchronize()
        return function
