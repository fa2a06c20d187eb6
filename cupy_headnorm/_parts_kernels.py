"""From a planned call on queries, keys and values to a running kernel."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from cupy_headnorm import _kernels, _launch, _parts_launch
from cupy_headnorm._parts import PARTS, PartsCall, PartsSpec, TokenAxis
from cupy_headnorm._parts_launch import PartsConfig


def macros(spec: PartsSpec, config: PartsConfig) -> dict[str, str]:
    """Return the ``HN_*`` macros of one specialisation of ``qk_norm_rope.cu``."""
    rope = spec.rope
    name = spec.name
    if config.access != config.vector:
        name += f"_access{config.access}"
    found = {
        "HN_NAME": name,
        "HN_KIND": spec.kind,
        "HN_ROUNDING": spec.rounding,
        "HN_X": spec.x.cuda,
        "HN_WEIGHT": spec.weight.cuda if spec.weight else "headnorm::None",
        "HN_BIAS": spec.bias.cuda if spec.bias else "headnorm::None",
        "HN_OFFSET": str(spec.offset).lower(),
        "HN_ALIKE": str(spec.alike).lower(),
        "HN_HEAD_DIM": str(spec.head_dim),
        "HN_VEC": str(config.vector),
        "HN_ACCESS": str(config.access),
        "HN_PARAMETER_ACCESS": str(config.parameter_access),
        "HN_LANES": str(config.lanes),
        "HN_VECTORS": str(config.vectors),
        "HN_FOLD": str(config.fold),
        "HN_THREADS": str(config.threads),
        "HN_BLOCKS": str(_parts_launch.blocks(spec, config)),
        "HN_AXES": str(config.axes),
        "HN_ROPE": "none",
        "HN_ROPE_FIRST": "false",
        "HN_ROTARY_DIM": "0",
        "HN_EVERY_OP": "false",
        "HN_TABLE": "float",
        "HN_WHOLE_ROWS": "false",
        "HN_TABLE_ACCESS": "1",
        "HN_POSITION": "headnorm::None",
        "HN_SECTIONS": "none",
        "HN_SECTION_SIZES": "0",
    }
    if rope is not None:
        sections = "none"
        if rope.sections:
            sections = "interleaved" if rope.interleaved_sections else "chunks"
        found |= {
            "HN_ROPE": rope.style.replace(" ", "_"),
            "HN_ROPE_FIRST": str(rope.first).lower(),
            "HN_ROTARY_DIM": str(rope.rotary_dim),
            "HN_EVERY_OP": str(rope.every_op).lower(),
            "HN_TABLE": rope.table.cuda,
            "HN_WHOLE_ROWS": str(rope.whole_rows).lower(),
            "HN_TABLE_ACCESS": str(config.table_access),
            "HN_POSITION": rope.position.cuda if rope.position else "headnorm::None",
            "HN_SECTIONS": sections,
            "HN_SECTION_SIZES": ",".join(map(str, rope.sections)) or "0",
        }
    return found


def compile_options(spec: PartsSpec, config: PartsConfig) -> tuple[str, ...]:
    """Return the compiler's options for one specialisation of ``qk_norm_rope.cu``."""
    return _kernels.options_of(macros(spec, config))


class _Place(ctypes.Structure):
    """``headnorm::PartPlace``."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("x", "out", "weight", "bias")]


class _Heads(ctypes.Structure):
    """``headnorm::PartHeads``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("x", "out", "weight", "bias")),
        *((name, ctypes.c_int32) for name in ("count", "groups_end", "turned")),
    ]


class _Axis(ctypes.Structure):
    """``headnorm::TokenAxis``."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("x", ctypes.c_int64 * PARTS),
        ("out", ctypes.c_int64 * PARTS),
        ("position", ctypes.c_int64),
        ("table", ctypes.c_int64),
        ("multiplier", ctypes.c_uint32),
        ("shift", ctypes.c_uint32),
    ]


def _params_type(real: type[ctypes.c_float | ctypes.c_double], axes: int) -> type[ctypes.Structure]:
    class Params(ctypes.Structure):
        """``headnorm::PartsParams``."""

        _fields_ = [
            ("part", _Place * PARTS),
            *((name, ctypes.c_uint64) for name in ("cosines", "sines", "positions")),
            *(
                (name, ctypes.c_int64)
                for name in ("groups", "position_row", "table_row", "max_position")
            ),
            ("heads", _Heads * PARTS),
            ("axis", _Axis * axes),
            ("heads_per_group", ctypes.c_int32),
            ("groups_per_block", ctypes.c_int32),
            ("eps", real * PARTS),
            ("weight_offset", real * PARTS),
        ]

    return Params


_PARAMS = {
    (name, axes): _params_type(real, axes)
    for name, real in (("float32", ctypes.c_float), ("float64", ctypes.c_double))
    for axes in _parts_launch.AXES
}

_ADDRESSES = struct.Struct(f"{4 * PARTS + 3}Q")
"""Of each part's x, out, weight and bias, then of cosines, sines and positions: the first fields of
``headnorm::PartsParams``."""


def _params(call: PartsCall, config: PartsConfig) -> Any:
    params = _PARAMS[call.spec.x.accumulate.name, config.axes]()
    params.position_row = call.position_row
    params.table_row = call.table_row
    params.max_position = call.max_position
    params.heads_per_group = config.heads_per_group
    params.groups_per_block = config.groups_per_block
    groups = 0
    for i in range(PARTS):
        if i < len(call.parts):
            part, heads = call.parts[i], params.heads[i]
            groups += config.groups_of(part.num_heads)
            heads.x, heads.out, heads.weight, heads.bias = part[1:5]
            heads.count, heads.turned = part.num_heads, part.turned
            params.eps[i], params.weight_offset[i] = part.eps, part.weight_offset
        params.heads[i].groups_end = groups
    params.groups = call.tokens * groups
    none = (0,) * len(call.parts)
    unneeded = [TokenAxis(1, none, none, 0, 0)] * (config.axes - 1 - len(call.axes))
    of_groups = TokenAxis(groups, none, none, 0, 0)
    axes = (of_groups, *unneeded, *reversed(call.axes))
    for place, axis in zip(params.axis, axes, strict=True):
        place.size, place.position, place.table = axis.size, axis.position, axis.table
        place.x[: len(axis.x)], place.out[: len(axis.out)] = axis.x, axis.out
        if axis.size < 2**31:
            place.multiplier, place.shift = _launch.division(axis.size)
    return params


class PartsLaunch(NamedTuple):
    """A kernel with everything but its addresses: `runner` adds those."""

    function: int
    """CUfunction, loaded on `device`."""
    blocks: int
    threads: int
    device: int
    params: Any
    config: PartsConfig


def prepare(
    call: PartsCall, index: int, stream: int, config: PartsConfig | None = None
) -> PartsLaunch:
    """
    Plan `call` on CUDA device `index`, and compile and load its kernel where that is new.

    Raises
    ------
    CaptureError
        It is new while `stream` is captured.
    """
    config = _parts_launch.plan(call) if config is None else config
    options = compile_options(call.spec, config)

    def make() -> Any:
        empty = _PARAMS[call.spec.x.accumulate.name, config.axes]()
        for axis in empty.axis:
            axis.size = 1
        return _kernels.compiled("qk_norm_rope.cu", options, empty, config.threads, index)

    function = _kernels.loaded((call.spec, options, index), stream, make)
    params = _params(call, config)
    blocks = -(-params.groups // config.groups_per_block)
    return PartsLaunch(function.ptr, blocks, config.threads, index, params, config)


def runner(launch: PartsLaunch) -> Callable[..., None]:
    """
    Return a function that queues `launch`, for the thread that asks for it.

    Its arguments are a stream and the addresses of `_ADDRESSES`.
    """
    params, arguments, start = _kernels.packed(launch)
    write, address = _ADDRESSES.pack_into, ctypes.addressof(arguments)
    function, blocks, threads, device = launch[:4]

    def launch_here(stream: int, *addresses: int) -> None:
        # Nothing of Python runs between these two: a finalizer could make the same call.
        write(params, 0, *addresses)
        start(function, blocks, 1, 1, threads, 1, 1, 0, stream, address, 0)

    vars(launch_here).update(keeps=arguments)  # their address is in use
    return _kernels.on_its_device(launch_here, device)
