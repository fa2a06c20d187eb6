"""From a planned call to a running kernel. The only user of `cupy.RawKernel`."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, NamedTuple

from cupy_headnorm import _driver, _interop, _launch, _source
from cupy_headnorm._launch import DeviceLimits, LaunchConfig
from cupy_headnorm._spec import NormCall, NormSpec


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


def macros(spec: NormSpec, config: LaunchConfig) -> dict[str, str]:
    """Return the ``HN_*`` macros of one specialisation of ``head_norm.cu``."""
    itemsize = spec.x.itemsize
    name = spec.name
    if config.access_bytes != config.vector_bytes:
        name += f"_access{config.access_bytes}"
    return {
        "HN_NAME": name,
        "HN_KIND": spec.kind,
        "HN_ROUNDING": spec.rounding,
        "HN_X": spec.x.cuda,
        "HN_WEIGHT": spec.weight.cuda if spec.weight else "headnorm::None",
        "HN_BIAS": spec.bias.cuda if spec.bias else "headnorm::None",
        "HN_HEAD_DIM": str(spec.head_dim),
        "HN_VEC": str(config.vector_bytes // itemsize),
        "HN_ACCESS": str(config.access_bytes // itemsize),
        "HN_LANES": str(config.lanes),
        "HN_VECTORS": str(config.vectors_per_lane),
        "HN_THREADS": str(config.lanes if config.lanes > _launch.WARP else _launch.GROUP_THREADS),
    }


def compile_options(spec: NormSpec, config: LaunchConfig) -> tuple[str, ...]:
    """Return the compiler's options for one specialisation."""
    # Contraction off: a multiply and an add fuse only where the source says so, or two
    # specialisations could round one row differently.
    return ("--fmad=false", *(f"-D{k}={v}" for k, v in macros(spec, config).items()))


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


def _params_type(real: type) -> type[ctypes.Structure]:
    class Params(ctypes.Structure):
        """``headnorm::Params``."""

        _fields_ = [
            ("x", ctypes.c_uint64),
            ("out", ctypes.c_uint64),
            ("weight", ctypes.c_uint64),
            ("bias", ctypes.c_uint64),
            ("rows", ctypes.c_int64),
            ("axis", _Axis * _launch.MAX_AXES),
            ("axes", ctypes.c_int32),
            ("rows_per_block", ctypes.c_int32),
            ("eps", real),
            ("weight_offset", real),
        ]

    return Params


_PARAMS = {"float32": _params_type(ctypes.c_float), "float64": _params_type(ctypes.c_double)}


def _params(call: NormCall, config: LaunchConfig) -> Any:
    params = _PARAMS[call.spec.x.accumulate.name]()
    params.rows = call.rows
    params.rows_per_block = config.rows_per_block
    params.eps = call.eps
    params.weight_offset = call.weight_offset
    params.axes = len(call.axes)
    for place, axis in zip(params.axis, reversed(call.axes), strict=False):
        divider = _launch.division(axis.size) if axis.size < 2**31 else (0, 0)
        place.size, place.x, place.out, place.weight, place.bias = axis
        place.multiplier, place.shift = divider
    return params


class Launch(NamedTuple):
    """A kernel with everything but its pointers: run it with `run`."""

    function: int
    """CUfunction, loaded on `device`."""
    blocks: int
    threads: int
    params: Any
    device: int
    name: str
    config: LaunchConfig


_functions: dict[tuple[Any, ...], Any] = {}
_limits: dict[int, DeviceLimits] = {}
_compiling = threading.Lock()
_thread = threading.local()


def limits(index: int) -> DeviceLimits:
    """Return what `_launch.plan` needs to know about CUDA device `index`."""
    found = _limits.get(index)
    if found is None:
        attributes = _interop.import_cupy().cuda.Device(index).attributes
        found = _limits[index] = DeviceLimits(
            attributes["MaxThreadsPerBlock"], attributes["MultiProcessorCount"]
        )
    return found


def prepare(call: NormCall, index: int, config: LaunchConfig | None = None) -> Launch:
    """Plan `call` on CUDA device `index`, and compile and load its kernel where that is new."""
    if config is None:
        config = _launch.plan(call, limits(index))
    else:
        _launch.check_config(config, call.spec, limits(index))
        _launch.check_call(call, config)
    function = _function(call.spec, config, index)
    return Launch(
        function.ptr,
        config.blocks(call.rows),
        config.threads,
        _params(call, config),
        index,
        call.spec.name,
        config,
    )


def _function(spec: NormSpec, config: LaunchConfig, index: int) -> Any:
    # rows_per_block is a run-time argument: every number of rows runs one kernel.
    key = (spec, config.vector_bytes, config.lanes, config.vectors_per_lane, config.access_bytes)
    key = (*key, index)
    function = _functions.get(key)
    if function is None:
        with _compiling:
            function = _functions.get(key)
            if function is None:
                function = _functions[key] = _compile(spec, config, index)
    return function


def _compile(spec: NormSpec, config: LaunchConfig, index: int) -> Any:
    cupy = _interop.import_cupy()
    kernel = cupy.RawKernel(
        _source.pasted("head_norm.cu"),
        macros(spec, config)["HN_NAME"],
        options=compile_options(spec, config),
    )
    try:
        with cupy.cuda.Device(index):
            function = kernel.kernel
            # CUDA loads a function lazily, at its first launch, which a capture forbids: launch
            # it here over no rows.
            empty = _PARAMS[spec.x.accumulate.name](rows=0, axes=1, rows_per_block=1)
            empty.axis[0].size = 1
            stream = _interop.side_stream()
            _start(function.ptr, 1, config.threads, empty, stream.ptr)
            stream.synchronize()
            return function
    except Exception as error:
        raise explained(error) from error


def explained(error: Exception) -> Exception:
    """Turn what CuPy says about a missing piece into our error, with the command that mends it."""
    found = environment()
    if found.reason:
        return _driver.GPUUnavailableError(f"{found.reason}; needs: {found.remedy}")
    text = str(error)
    if "cannot open source file" in text or "could not open source file" in text:
        return _driver.GPUUnavailableError(
            f"CUDA headers not found ({text.splitlines()[0]}); needs: {_driver.install_command()}"
        )
    if isinstance(error, OSError):
        return _driver.GPUUnavailableError(
            f"the kernel cache {found.cache or 'of CuPy'} cannot be written ({error}); "
            "needs: CUPY_CACHE_DIR set to a writeable folder"
        )
    return error


def _start(function: int, blocks: int, threads: int, params: Any, stream: int) -> None:
    from cupy.cuda import driver

    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    driver.launchKernel(
        function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0
    )


def run(launch: Launch, x: int, out: int, weight: int, bias: int, stream: int) -> None:
    """Queue `launch` on `stream`, the addresses being those of each array's first element."""
    runtime = _interop.import_cupy().cuda.runtime
    params = type(launch.params).from_buffer_copy(launch.params)
    params.x, params.out, params.weight, params.bias = x, out, weight, bias
    current = runtime.getDevice()
    ready = _thread.__dict__.setdefault("ready", set())
    if current == launch.device and current in ready:
        _start(launch.function, launch.blocks, launch.threads, params, stream)
        return
    # A thread's first launch on a device makes the device's context current there.
    runtime.setDevice(launch.device)
    ready.add(launch.device)
    try:
        _start(launch.function, launch.blocks, launch.threads, params, stream)
    finally:
        if current != launch.device:
            runtime.setDevice(current)


def refuse_capture(stream: int, what: str) -> None:
    """Raise CaptureError where `stream` is being captured."""
    if _interop.is_capturing(stream):
        raise CaptureError(
            f"{what} while the stream is captured into a graph; needs a call of warmup(x) before, "
            "with an array of the same layout"
        )
