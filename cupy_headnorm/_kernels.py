"""From a planned call to a running kernel. The only user of `cupy.RawKernel` but the bench."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cupy_headnorm import _driver, _interop, _launch, _source
from cupy_headnorm._launch import DeviceLimits, LaunchConfig, Memory
from cupy_headnorm._once import made_once
from cupy_headnorm._spec import NormCall, NormSpec, RowAxis


class CaptureError(RuntimeError):
    """A call would compile, load or allocate while its stream is captured into a CUDA graph."""


class Environment(NamedTuple):
    """What the machine offers; `reason` is empty where the GPU can be used."""

    reason: str
    remedy: str
    cupy: str
    nvrtc: str
    driver: str
    devices: tuple[str, ...]
    cache: str


def environment() -> Environment:
    """Look at driver, CuPy, devices, NVRTC and cache folder. Never raises."""
    version = _driver.cuda_version()
    driver = "" if version is None else f"CUDA {version // 1000}.{version % 1000 // 10}"
    found = Environment("", "", "", "", driver, (), "")
    try:
        cupy = _interop.import_cupy()
    except _driver.GPUUnavailableError as error:
        reason, _, remedy = str(error).rpartition("; needs")
        return found._replace(reason=reason, remedy=remedy.lstrip(": "))
    found = found._replace(cupy=cupy.__version__, cache=_cache_folder())
    try:
        found = found._replace(nvrtc="{}.{}".format(*cupy.cuda.nvrtc.getVersion()))
    except Exception as error:
        return found._replace(
            reason=f"NVRTC does not load ({error})", remedy=_driver.install_command()
        )
    try:
        runtime = cupy.cuda.runtime
        names = []
        for index in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(index)
            names.append(
                f"{properties['name'].decode()}, sm_{properties['major']}{properties['minor']}, "
                f"{properties['totalGlobalMem'] / 2**30:.0f} GiB"
            )
    except Exception as error:
        return found._replace(
            reason=f"no CUDA device ({error})",
            remedy="an NVIDIA GPU and a driver that `nvidia-smi` can talk to",
        )
    return found._replace(devices=tuple(names))


def _cache_folder() -> str:
    default = os.path.join(os.path.expanduser("~"), ".cupy", "kernel_cache")
    return os.environ.get("CUPY_CACHE_DIR", default)


def macros(spec: NormSpec, config: LaunchConfig, memory: Memory) -> dict[str, str]:
    """Return the ``HN_*`` macros of one specialisation of ``head_norm.cu``."""
    itemsize = spec.x.itemsize
    vector = config.vector_bytes // itemsize
    shared_block = config.lanes <= _launch.WARP
    capped = (
        shared_block
        and not spec.bias
        and config.access_bytes == config.vector_bytes
        and vector * config.vectors_per_lane <= _launch.GROUP_BLOCKS_VALUES
    )
    name = spec.name
    if config.access_bytes != config.vector_bytes:
        name += f"_access{config.access_bytes}"
    if (spec.weight or spec.bias) and memory.parameter_access != vector:
        name += f"_parameter_access{memory.parameter_access}"
    if memory.axes > 1:
        name += f"_axes{memory.axes}"
    return {
        "HN_NAME": name,
        "HN_KIND": spec.kind,
        "HN_ROUNDING": spec.rounding,
        "HN_X": spec.x.cuda,
        "HN_WEIGHT": spec.weight.cuda if spec.weight else "headnorm::None",
        "HN_BIAS": spec.bias.cuda if spec.bias else "headnorm::None",
        "HN_HEAD_DIM": str(spec.head_dim),
        "HN_VEC": str(vector),
        "HN_ACCESS": str(config.access_bytes // itemsize),
        "HN_PARAMETER_ACCESS": str(memory.parameter_access),
        "HN_LANES": str(config.lanes),
        "HN_VECTORS": str(config.vectors_per_lane),
        "HN_THREADS": str(_launch.GROUP_THREADS if shared_block else config.lanes),
        "HN_BLOCKS": str(_launch.GROUP_BLOCKS if capped else 1),
        "HN_AXES": str(memory.axes),
    }


def compile_options(spec: NormSpec, config: LaunchConfig, memory: Memory) -> tuple[str, ...]:
    """Return the compiler's options for one specialisation."""
    return options_of(macros(spec, config, memory))


def options_of(macros: dict[str, str]) -> tuple[str, ...]:
    """Return the compiler's options for a specialisation's macros."""
    # Contraction off: a multiply and an add fuse only where the source says so, or two
    # specialisations could round one row differently.
    return ("--fmad=false", *(f"-D{k}={v}" for k, v in macros.items()))


class _Axis(ctypes.Structure):
    """``headnorm::RowAxis``."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("x", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("weight", ctypes.c_int64),
        ("bias", ctypes.c_int64),
        ("multiplier", ctypes.c_uint32),
        ("shift", ctypes.c_uint32),
    ]


def _params_type(real: type[ctypes.c_float | ctypes.c_double], axes: int) -> type[ctypes.Structure]:
    class Params(ctypes.Structure):
        """``headnorm::Params``."""

        _fields_ = [
            ("x", ctypes.c_uint64),
            ("out", ctypes.c_uint64),
            ("weight", ctypes.c_uint64),
            ("bias", ctypes.c_uint64),
            ("rows", ctypes.c_int64),
            ("axis", _Axis * axes),
            ("rows_per_block", ctypes.c_int32),
            ("eps", real),
            ("weight_offset", real),
        ]

    return Params


_PARAMS = {
    (name, axes): _params_type(real, axes)
    for name, real in (("float32", ctypes.c_float), ("float64", ctypes.c_double))
    for axes in _launch.AXES
}


def _params(call: NormCall, config: LaunchConfig, axes: int) -> Any:
    params = _PARAMS[call.spec.x.accumulate.name, axes]()
    params.rows = call.rows
    params.rows_per_block = config.rows_per_block
    params.eps = call.eps
    params.weight_offset = call.weight_offset
    unneeded = [RowAxis(1, 0, 0, 0, 0)] * (axes - len(call.axes))
    for place, axis in zip(params.axis, (*unneeded, *reversed(call.axes)), strict=True):
        divider = _launch.division(axis.size) if axis.size < 2**31 else (0, 0)
        place.size, place.x, place.out, place.weight, place.bias = axis
        place.multiplier, place.shift = divider
    return params


_ADDRESSES = struct.Struct("4Q")
"""Of x, out, weight and bias: the first fields of ``headnorm::Params``."""


class Launch(NamedTuple):
    """A kernel with everything but its addresses: `runner` adds those."""

    function: int
    """CUfunction, loaded on `device`."""
    blocks: int
    threads: int
    device: int
    params: Any
    config: LaunchConfig


_functions: dict[tuple[Any, ...], Any] = {}
_limits: dict[int, DeviceLimits] = {}
_thread = threading.local()


def limits(index: int) -> DeviceLimits:
    """Return what `_launch.plan` needs to know about CUDA device `index`."""
    found = _limits.get(index)
    if found is None:
        attributes = _interop.import_cupy().cuda.Device(index).attributes
        found = _limits[index] = DeviceLimits(attributes["MaxThreadsPerBlock"])
    return found


def prepare(call: NormCall, index: int, stream: int, config: LaunchConfig | None = None) -> Launch:
    """
    Plan `call` on CUDA device `index`, and compile and load its kernel where that is new.

    Raises
    ------
    CaptureError
        It is new while `stream` is captured.
    """
    if config is None:
        config = _launch.plan(call, limits(index))
    else:
        _launch.check_config(config, call.spec, limits(index))
        _launch.check_call(call, config)
    memory = _launch.memory(call, config)
    function = _function(call.spec, config, memory, index, stream)
    return Launch(
        function.ptr,
        config.blocks(call.rows),
        config.threads,
        index,
        _params(call, config, memory.axes),
        config,
    )


def _function(spec: NormSpec, config: LaunchConfig, memory: Memory, index: int, stream: int) -> Any:
    # rows_per_block is a run-time argument: every number of rows runs one kernel.
    key = (spec, config.vector_bytes, config.lanes, config.vectors_per_lane, config.access_bytes)

    def make() -> Any:
        # CUDA loads a function lazily, at its first launch, which a capture forbids: launch it
        # here over no rows.
        empty = _PARAMS[spec.x.accumulate.name, memory.axes](rows=0, rows_per_block=1)
        for axis in empty.axis:
            axis.size = 1
        options = compile_options(spec, config, memory)
        return compiled("head_norm.cu", options, empty, config.threads, index)

    return loaded((*key, memory, index), stream, make)


def loaded(key: tuple[Any, ...], stream: int, make: Callable[[], Any]) -> Any:
    """Return the function of `key`, which `make` compiles and loads where it is new."""
    function = _functions.get(key)
    if function is None:
        refuse_capture(stream, "the kernel for this layout is not loaded yet")
        function = made_once(_functions, key, make)
    return function


def compiled(file: str, options: tuple[str, ...], empty: Any, threads: int, index: int) -> Any:
    """Compile a specialisation for CUDA device `index`, and load it by a launch over no rows."""
    cupy = _interop.import_cupy()
    name = next(o.partition("=")[2] for o in options if o.startswith("-DHN_NAME="))
    kernel = cupy.RawKernel(_source.pasted(file), name, options=options)
    with explained(), _driver.beside_captures(), cupy.cuda.Device(index):
        function = kernel.kernel
        stream = _interop.side_stream()
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(empty))
        cupy.cuda.driver.launchKernel(
            function.ptr, 1, 1, 1, threads, 1, 1, 0, stream.ptr, ctypes.addressof(parameters), 0
        )
        stream.synchronize()
        return function


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what CuPy says about a missing piece into our error, with the command that mends it."""
    try:
        yield
    except (TypeError, ValueError):
        raise
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        raise _driver.GPUUnavailableError(explanation) from error


def _explanation(error: Exception) -> str | None:
    found = environment()
    if found.reason:
        return f"{found.reason}; needs: {found.remedy}"
    text = str(error)
    if "cannot open source file" in text or "could not open source file" in text:
        return (
            f"CUDA headers not found ({text.splitlines()[0]}); needs: {_driver.install_command()}"
        )
    if isinstance(error, OSError):
        return (
            f"the kernel cache {found.cache or 'of CuPy'} cannot be written ({error}); "
            "needs: CUPY_CACHE_DIR set to a writeable folder"
        )
    return None


def over_rows(launch: Launch, rows: int) -> Launch | None:
    """
    Return `launch` over another number of rows, its outermost axis being longer or shorter.

    None where that takes another kernel.
    """
    if len(launch.params.axis) == _launch.FEW_AXES and rows > _launch.MAX_FEW_ROWS:
        return None
    _launch.check_rows(rows, launch.config)
    params = type(launch.params).from_buffer_copy(launch.params)
    params.rows = rows
    return launch._replace(blocks=launch.config.blocks(rows), params=params)


def runner(launch: Launch) -> Callable[[int, int, int, int, int], None]:
    """
    Return a function that queues `launch`, for the thread that asks for it.

    Its arguments are the addresses of the first elements of x, out, weight and bias, and a stream.
    The parameters are packed here, once; a call writes the addresses over the last call's.
    """
    params, arguments, start = packed(launch)
    write, address = _ADDRESSES.pack_into, ctypes.addressof(arguments)
    function, blocks, threads, device = launch[:4]
    in_use = False

    def launch_here(x: int, out: int, weight: int, bias: int, stream: int) -> None:
        nonlocal in_use
        if in_use:
            # Between any two steps Python may run a signal's handler or a finalizer: this is in
            # one, and the parameters are those of the call below it.
            runner(launch)(x, out, weight, bias, stream)
            return
        in_use = True
        try:
            write(params, 0, x, out, weight, bias)
            start(function, blocks, 1, 1, threads, 1, 1, 0, stream, address, 0)
        finally:
            in_use = False

    vars(launch_here).update(keeps=arguments)  # their address is in use
    return on_its_device(launch_here, device)


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
    runtime = _interop.import_cupy().cuda.runtime
    before = runtime.getDevice()
    runtime.setDevice(index)
    try:
        function()
    finally:
        if before != index:
            runtime.setDevice(before)


def refuse_capture(
    stream: int,
    what: str,
    needed: str = "a call of warmup(x) before, with an array of the same layout",
) -> None:
    """Raise CaptureError where `stream` is being captured."""
    if _interop.is_capturing(stream):
        raise CaptureError(f"{what} while the stream is captured into a graph; needs {needed}")


def refuse_allocation(stream: int) -> None:
    """Raise CaptureError where a new result would come from a pool that knows nothing of graphs."""
    refuse_capture(stream, "a result without out would be allocated", "out")
