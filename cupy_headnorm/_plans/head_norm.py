"""How a kernel is laid over the rows: pure arithmetic, no GPU needed."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

from cupy_headnorm._cuda import compiler
from cupy_headnorm._cuda.compiler import DeviceLimits
from cupy_headnorm._cuda.launcher import Launch
from cupy_headnorm._plans import geometry
from cupy_headnorm._plans.geometry import (
    FEW_AXES,
    MAX_BLOCKS,
    MAX_FEW_ROWS,
    MAX_VALUES_PER_LANE,
    WARP,
    LaunchConfig,
)
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec

GROUP_THREADS = 256
"""Threads a block at most where rows share it; the kernels are compiled for this bound."""
GROUP_BLOCKS = 5
"""Blocks of so many threads that a multiprocessor has room for at least, which leaves a thread 48
registers. Layer, bfloat16, head_dim 160, 64 MB, H100: 1.00 of copy speed, without the cap 0.96."""
GROUP_BLOCKS_VALUES = 12
"""Values of a lane at most for `GROUP_BLOCKS`; with more, a bias or narrower accesses the compiler
spills."""
MAX_HEAD_DIM = 2**31 - 2**17
"""The kernels count inside a row in 32 bits, up to a tile past its end."""
AXES = (1, FEW_AXES, 8)
"""Axes of the grid of rows that kernels are compiled for.
Contiguous arrays have 1, slices of model tensors 3 at most. Fewer are faster: 1 token x 32 heads x
128, bfloat16, H100: 1.42 us with room for 8, 1.38 for 3, 1.36 for 1; 64 tokens 2.48, 2.39, 2.32."""


def _widest_access(call: NormCall, vector: int, names: tuple[str, str]) -> int:
    """Return the most elements at once that the named arrays' alignment allows, up to a vector."""
    spec = call.spec
    dtypes = {"x": spec.x, "out": spec.x, "weight": spec.weight, "bias": spec.bias}
    alignments = dict(zip(dtypes, call.alignments, strict=True))
    for name in names:
        dtype, alignment = dtypes[name], alignments[name]
        if dtype is None:
            continue
        if alignment < dtype.itemsize:
            raise ValueError(
                f"{name} has rows aligned to {alignment} bytes; needs {dtype.itemsize}, "
                f"the size of its {dtype} elements"
            )
        while min(vector * dtype.itemsize, 16) > alignment:
            vector //= 2
    return vector


def check_config(config: LaunchConfig, spec: NormSpec, limits: DeviceLimits) -> None:
    """Raise ValueError where the kernel could not run `spec` as `config` says."""
    vector, rest = divmod(config.vector_bytes, spec.x.itemsize)
    lanes, rows = config.lanes, config.rows_per_block
    if rest or vector not in geometry.vector_choices(spec.head_dim, spec.x.itemsize):
        raise ValueError(
            f"vector_bytes is {config.vector_bytes}; needs 1, 2, 4 or 8 {spec.x} elements in 16 "
            f"bytes at most, a number that divides head_dim={spec.head_dim}"
        )
    if lanes < 1 or lanes & (lanes - 1) or lanes > limits.max_threads_per_block:
        raise ValueError(
            f"lanes is {lanes}; needs a power of two up to {limits.max_threads_per_block}"
        )
    if not 1 <= config.vectors_per_lane * vector <= 2 * MAX_VALUES_PER_LANE:
        raise ValueError(
            f"vectors_per_lane is {config.vectors_per_lane} of {vector} elements; "
            f"needs 1 to {2 * MAX_VALUES_PER_LANE} elements a lane"
        )
    most = 1 if lanes > WARP else GROUP_THREADS // lanes
    if not 1 <= rows <= most:
        raise ValueError(f"rows_per_block is {rows} with lanes={lanes}; needs 1 to {most}")
    access, rest = divmod(config.access_bytes, spec.x.itemsize)
    if rest or access not in (1, 2, 4, 8) or vector % access:
        raise ValueError(
            f"access_bytes is {config.access_bytes}; needs a divisor of "
            f"vector_bytes={config.vector_bytes} that holds whole {spec.x} elements"
        )


def check_call(call: NormCall, config: LaunchConfig) -> None:
    """Raise ValueError where one launch as `config` says cannot serve the memory of a call."""
    itemsize = call.spec.x.itemsize
    widest = itemsize * _widest_access(call, config.vector_bytes // itemsize, ("x", "out"))
    if config.access_bytes > widest:
        raise ValueError(
            f"access_bytes is {config.access_bytes}; needs {widest} at most for rows aligned to "
            f"{call.alignments[:2]} bytes (x, out)"
        )
    if call.spec.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {call.spec.head_dim}; needs {MAX_HEAD_DIM} at most on a GPU")
    if len(call.axes) > AXES[-1]:
        raise ValueError(
            f"x and out have {len(call.axes)} axes that no common stride joins; "
            f"needs {AXES[-1]} at most"
        )
    check_rows(call.rows, config)


class Memory(NamedTuple):
    """What a kernel is compiled for beside the spec and the geometry: how the arrays lie."""

    axes: int
    """One of `AXES`."""
    parameter_access: int
    """Elements of weight and bias moved by one load."""


def memory_of(call: NormCall, config: LaunchConfig) -> Memory:
    """Say which kernel serves the memory of a call."""
    few_rows = call.rows <= MAX_FEW_ROWS
    axes = next(n for n in AXES if len(call.axes) <= n and (n != FEW_AXES or few_rows))
    vector = config.vector_bytes // call.spec.x.itemsize
    return Memory(axes, _widest_access(call, vector, ("weight", "bias")))


def check_rows(rows: int, config: LaunchConfig) -> None:
    """Raise ValueError where a launch cannot have as many blocks."""
    if config.blocks(rows) > MAX_BLOCKS:
        raise ValueError(
            f"x has {rows} rows, {config.blocks(rows)} blocks; needs {MAX_BLOCKS} at most"
        )


def plan(call: NormCall, limits: DeviceLimits = DeviceLimits()) -> LaunchConfig:
    """Choose how to run `call`."""
    spec = call.spec
    vector_bytes, lanes, vectors = geometry.row_geometry(spec.head_dim, spec.x.itemsize)
    # Blocks of 128 threads were as fast as 256 (H100, 64 MB). Smaller ones do not help where
    # multiprocessors idle either: 1 token x 32 heads x 128, bfloat16, 16 lanes a row: 1.54 us with
    # 8 rows a block, 1.58 with 2, 1.60 with 1 (a copy 1.21).
    rows_per_block = 4 * WARP // lanes if lanes <= WARP else 1
    config = LaunchConfig(
        vector_bytes,
        lanes,
        vectors,
        rows_per_block,
        spec.x.itemsize * _widest_access(call, vector_bytes // spec.x.itemsize, ("x", "out")),
    )
    check_config(config, spec, limits)
    check_call(call, config)
    return config


def macros(spec: NormSpec, config: LaunchConfig, memory: Memory) -> dict[str, str]:
    """Return the ``HN_*`` macros of one specialisation of ``head_norm.cu``."""
    itemsize = spec.x.itemsize
    vector = config.vector_bytes // itemsize
    shared_block = config.lanes <= geometry.WARP
    capped = (
        shared_block
        and not spec.bias
        and config.access_bytes == config.vector_bytes
        and vector * config.vectors_per_lane <= GROUP_BLOCKS_VALUES
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
        "HN_THREADS": str(GROUP_THREADS if shared_block else config.lanes),
        "HN_BLOCKS": str(GROUP_BLOCKS if capped else 1),
        "HN_AXES": str(memory.axes),
    }


def compile_options(spec: NormSpec, config: LaunchConfig, memory: Memory) -> tuple[str, ...]:
    """Return the compiler's options for one specialisation."""
    return compiler.options_of(macros(spec, config, memory))


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
    for axes in AXES
}


def _params(call: NormCall, config: LaunchConfig, axes: int) -> Any:
    params = _PARAMS[call.spec.x.accumulate.name, axes]()
    params.rows = call.rows
    params.rows_per_block = config.rows_per_block
    params.eps = call.eps
    params.weight_offset = call.weight_offset
    unneeded = [RowAxis(1, 0, 0, 0, 0)] * (axes - len(call.axes))
    for place, axis in zip(params.axis, (*unneeded, *reversed(call.axes)), strict=True):
        divider = geometry.division(axis.size) if axis.size < 2**31 else (0, 0)
        place.size, place.x, place.out, place.weight, place.bias = axis
        place.multiplier, place.shift = divider
    return params


_WORDS = struct.Struct("4Q")
"""The addresses of x, out, weight and bias: the first fields of ``headnorm::Params``."""
X, OUT, WEIGHT, BIAS = range(4)
"""Places among the words of a launch."""


def prepare(call: NormCall, index: int, stream: int, config: LaunchConfig | None = None) -> Launch:
    """
    Plan `call` on CUDA device `index`, and compile and load its kernel where that is new.

    Raises
    ------
    CaptureError
        It is new while `stream` is captured.
    """
    if config is None:
        config = plan(call, compiler.limits(index))
    else:
        check_config(config, call.spec, compiler.limits(index))
        check_call(call, config)
    memory = memory_of(call, config)
    function = _function(call.spec, config, memory, index, stream)
    params = _params(call, config, memory.axes)
    blocks = config.blocks(call.rows)
    return Launch(function.ptr, blocks, config.threads, index, params, _WORDS, 0, config, call.spec)


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
        return compiler.compiled("head_norm.cu", options, empty, config.threads, index)

    return compiler.loaded((*key, memory, index), stream, make)


def over(launch: Launch, before: int, after: int) -> Launch | None:
    """
    Return `launch` with `after` tokens for every `before`, its outermost axis being longer.

    None where that takes another kernel.
    """
    rows = launch.params.rows // before * after
    if len(launch.params.axis) == geometry.FEW_AXES and rows > geometry.MAX_FEW_ROWS:
        return None
    check_rows(rows, launch.config)
    params = type(launch.params).from_buffer_copy(launch.params)
    params.rows = rows
    return launch._replace(blocks=launch.config.blocks(rows), params=params)
