"""How a kernel is laid over the rows: pure arithmetic, no GPU needed."""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_headnorm._cuda import compiler
from cupy_headnorm._cuda.compiler import DeviceLimits
from cupy_headnorm._cuda.launcher import Launch
from cupy_headnorm._plans import geometry, specialisation
from cupy_headnorm._plans.geometry import FEW_AXES, MAX_VALUES_PER_LANE, WARP, LaunchConfig
from cupy_headnorm._plans.specialisation import ARRAYS, Real, Struct, fields
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec

GROUP_THREADS = 256
"""A block has no more where rows share it."""
GROUP_WARPS = 40
"""A multiprocessor has room for so many warps of such blocks at least, which leaves a thread 48
registers. Layer, bfloat16, head_dim 160, 64 MB, H100: 1.00 of copy speed, without the cap 0.96."""
GROUP_WARPS_VALUES = 12
"""`GROUP_WARPS` is for lanes of so many values at most; with more, a bias or narrower accesses the
compiler spills."""
MOST_BLOCKS = 16
"""Any GPU has room for so many blocks on a multiprocessor."""
MAX_STEP = 2**31 - 1
"""Kernels for few axes take no longer steps in bytes."""
MAX_HEAD_DIM = 2**31 - 2**17
"""The kernels count inside a row in 32 bits, up to a tile past its end."""
AXES = (1, FEW_AXES, 8)
"""Kernels are compiled for a grid of rows of so many axes.
Contiguous arrays have 1, slices of model tensors 3 at most. Fewer are faster: 1 token x 32 heads x
128, bfloat16, H100: 1.42 us with room for 8, 1.38 for 3, 1.36 for 1; 64 tokens 2.48, 2.39, 2.32."""


def _access(call: NormCall, vector: int, names: tuple[str, str]) -> int:
    """Return the most elements at once that the named arrays' alignment allows, up to a vector."""
    spec = call.spec
    dtypes = (spec.x, spec.x, spec.weight, spec.bias)
    for name, dtype, alignment in zip(ARRAYS, dtypes, call.alignments, strict=True):
        if name in names and dtype is not None:
            size = f"the size of its {dtype} elements"
            vector = geometry.widest_access(vector, alignment, dtype.itemsize, f"{name} has", size)
    return vector


def _in_elements(config: LaunchConfig, spec: NormSpec) -> tuple[int, int]:
    """Return the elements of a vector and of an access."""
    return config.vector_bytes // spec.x.itemsize, config.access_bytes // spec.x.itemsize


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
    """Raise ValueError where one launch as `config` says cannot run over the memory of a call."""
    vector, access = _in_elements(config, call.spec)
    widest = _access(call, vector, ("x", "out"))
    if access > widest:
        raise ValueError(
            f"access_bytes is {config.access_bytes}; needs {widest * call.spec.x.itemsize} at most "
            f"for rows aligned to {call.alignments[:2]} bytes (x, out)"
        )
    if call.spec.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {call.spec.head_dim}; needs {MAX_HEAD_DIM} at most on a GPU")
    if len(call.axes) > AXES[-1]:
        raise ValueError(
            f"x and out have {len(call.axes)} axes that no common stride joins; "
            f"needs {AXES[-1]} at most"
        )
    geometry.check_blocks(config.blocks(call.rows), f"x has {call.rows} rows,")


class Memory(NamedTuple):
    """What a kernel is compiled for beside the spec and the geometry: how the arrays lie."""

    axes: int
    """It is one of `AXES`."""
    narrow: bool
    """Whether 32 bits hold the number of rows and all steps in bytes."""
    parameter_access: int
    """One load moves so many elements of weight or bias."""


def memory_of(call: NormCall, config: LaunchConfig) -> Memory:
    """Return which kernel fits the memory of a call."""
    steps = [step for axis in _stepped(call.axes) for step in axis[1:]]
    narrow = call.rows <= geometry.MAX_FEW_ROWS and max(map(abs, steps)) <= MAX_STEP
    axes = next(n for n in AXES if len(call.axes) <= n and (n != FEW_AXES or narrow))
    vector, _ = _in_elements(config, call.spec)
    return Memory(axes, narrow and axes <= FEW_AXES, _access(call, vector, ("weight", "bias")))


def _stepped(axes: Sequence[RowAxis]) -> list[RowAxis]:
    """
    Return axes, innermost first, with the steps of ``headnorm::RowAxis`` for strides.

    Each but the innermost one goes back over the axis inside of it.
    """
    inner = axes[-1]
    found = [inner]
    for axis in reversed(axes[:-1]):
        back = (inner.size * stride for stride in inner[1:])
        found.append(RowAxis(axis.size, *map(operator.sub, axis[1:], back)))
        inner = axis
    return found


def plan(call: NormCall, limits: DeviceLimits = DeviceLimits()) -> LaunchConfig:
    """Choose how to run `call`."""
    spec = call.spec
    itemsize = spec.x.itemsize
    vector, lanes, vectors = geometry.row_geometry(spec.head_dim, itemsize)
    # Blocks of 128 threads were as fast as 256 (H100, 64 MB). Smaller ones do not help where
    # multiprocessors idle either: 1 token x 32 heads x 128, bfloat16, 16 lanes a row: 1.54 us with
    # 8 rows a block, 1.58 with 2, 1.60 with 1 (a copy 1.21).
    rows_per_block = 4 * WARP // lanes if lanes <= WARP else 1
    config = LaunchConfig(
        vector * itemsize,
        lanes,
        vectors,
        rows_per_block,
        itemsize * _access(call, vector, ("x", "out")),
    )
    check_config(config, spec, limits)
    check_call(call, config)
    return config


def macros(spec: NormSpec, config: LaunchConfig, memory: Memory) -> dict[str, str]:
    """Return the ``HN_*`` macros of one specialisation of ``head_norm.cu``."""
    vector, access = _in_elements(config, spec)
    shared_block = config.lanes <= WARP
    capped = (
        shared_block
        and not spec.bias
        and access == vector
        and vector * config.vectors_per_lane <= GROUP_WARPS_VALUES
    )
    name = spec.name
    if access != vector:
        name += f"_access{config.access_bytes}"
    if (spec.weight or spec.bias) and memory.parameter_access != vector:
        name += f"_parameter_access{memory.parameter_access}"
    if memory.axes > 1:
        name += f"_axes{memory.axes}"
    return specialisation.macros(spec, name) | {
        "HN_VEC": str(vector),
        "HN_ACCESS": str(access),
        "HN_PARAMETER_ACCESS": str(memory.parameter_access),
        "HN_LANES": str(config.lanes),
        "HN_VECTORS": str(config.vectors_per_lane),
        "HN_ROWS": str(config.rows_per_block),
        "HN_THREADS": str(config.threads),
        "HN_BLOCKS": str(min(GROUP_WARPS * WARP // config.threads, MOST_BLOCKS) if capped else 1),
        "HN_AXES": str(memory.axes),
        "HN_INDEX": "int" if memory.narrow else "long long",
    }


@functools.cache
def _params_type(real: Real, axes: int, narrow: bool) -> Struct:
    index = ctypes.c_int32 if narrow else ctypes.c_int64

    class Axis(ctypes.Structure):
        """``headnorm::RowAxis``."""

        _fields_ = [
            *fields(index, "size", *ARRAYS),
            *fields(ctypes.c_uint32, "multiplier", "shift"),
        ]

    class Params(ctypes.Structure):
        """``headnorm::Params``."""

        _fields_ = [
            *fields(ctypes.c_uint64, *ARRAYS),
            ("rows", ctypes.c_int64),
            ("axis", Axis * axes),
            *fields(real, "eps", "weight_offset"),
        ]

    return Params


def _params(call: NormCall, memory: Memory) -> Any:
    params: Any = _params_type(specialisation.real_of(call.spec), memory.axes, memory.narrow)(
        rows=call.rows, eps=call.eps, weight_offset=call.weight_offset
    )
    unneeded = [RowAxis(1)] * (memory.axes - len(call.axes))
    for place, axis in zip(params.axis, _stepped((*call.axes, *unneeded)), strict=True):
        place.size, place.x, place.out, place.weight, place.bias = axis
        place.multiplier, place.shift = geometry.division(axis.size)
    return params


X, OUT, WEIGHT, BIAS = range(4)
"""These are places among the words of a launch: the first fields of ``headnorm::Params``."""


def launch_of(call: NormCall, config: LaunchConfig, memory: Memory, index: int) -> Launch:
    """Return the launch of `call` on CUDA device `index`, but for its function."""
    params = _params(call, memory)
    blocks, rows_at = config.blocks(call.rows), type(params).rows.offset
    return Launch(
        0, blocks, config.threads, index, params, 0, call.rows, rows_at, config, call.spec
    )  # fmt: skip


def prepare(call: NormCall, index: int, stream: int, config: LaunchConfig | None = None) -> Launch:
    """Plan `call` on CUDA device `index`; see `specialisation.loaded`."""
    if config is None:
        config = plan(call, compiler.limits(index))
    else:
        check_config(config, call.spec, compiler.limits(index))
        check_call(call, config)
    spec, memory = call.spec, memory_of(call, config)
    launch = launch_of(call, config, memory, index)
    return specialisation.loaded(
        launch, "head_norm.cu", (spec, config, memory), lambda: macros(spec, config, memory), stream
    )


def over(launch: Launch, before: int, after: int) -> Launch | None:
    """
    Return `launch` with `after` tokens for every `before`, its outermost axis being longer.

    None where that takes another kernel.
    """
    rows = launch.total // before * after
    if len(launch.params.axis) <= FEW_AXES and rows > geometry.MAX_FEW_ROWS:
        return None
    blocks = launch.config.blocks(rows)
    geometry.check_blocks(blocks, f"x has {rows} rows,")
    return launch.over(blocks, rows)
