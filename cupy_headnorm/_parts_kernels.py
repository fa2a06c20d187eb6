"""From a planned call on queries, keys and values to a running kernel."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
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


_NAMES = ("x", "out", "weight", "bias")
_WORDS = 2 * len(_NAMES)
"""Of 8 bytes: a part's addresses, then its strides."""
_ARRAYS = struct.Struct("4Q4q" * PARTS + "3Q")
"""``headnorm::PartsParams`` from its parts up to the addresses of cosines, sines and positions."""


class _Part(ctypes.Structure):
    """``headnorm::Part``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _NAMES),
        *((f"head_{name}", ctypes.c_int64) for name in _NAMES),
    ]


class _Axis(ctypes.Structure):
    """``headnorm::TokenAxis``."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("multiplier", ctypes.c_uint32),
        ("shift", ctypes.c_uint32),
        ("x", ctypes.c_int64 * PARTS),
        ("out", ctypes.c_int64 * PARTS),
        ("position", ctypes.c_int64),
        ("table", ctypes.c_int64),
    ]


def _params_type(real: type[ctypes.c_float | ctypes.c_double], axes: int) -> type[ctypes.Structure]:
    class Scalars(ctypes.Structure):
        _fields_ = [
            ("groups", ctypes.c_int64),
            *((name, ctypes.c_int32) for name in ("heads_per_group", "groups_per_block")),
            *((name, ctypes.c_int32 * PARTS) for name in ("groups_end", "num_heads", "turned")),
            *((name, real * PARTS) for name in ("eps", "weight_offset")),
        ]

    class Params(Scalars):
        """``headnorm::PartsParams``."""

        _fields_ = [
            ("unused", ctypes.c_uint8 * (-ctypes.sizeof(Scalars) % _PART_ALIGNMENT)),
            ("part", _Part * PARTS),
            *((name, ctypes.c_uint64) for name in ("cosines", "sines", "positions")),
            *((name, ctypes.c_int64) for name in ("position_row", "table_row", "max_position")),
            ("axis", _Axis * axes),
        ]

    return Params


_PART_ALIGNMENT = 16
_PARAMS = {
    (name, axes): _params_type(real, axes)
    for name, real in (("float32", ctypes.c_float), ("float64", ctypes.c_double))
    for axes in _parts_launch.AXES
}


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
            part, array = call.parts[i], params.part[i]
            groups += config.groups_of(part.num_heads)
            array.head_x, array.head_out, array.head_weight, array.head_bias = part[1:5]
            params.num_heads[i], params.turned[i] = part.num_heads, part.turned
            params.eps[i], params.weight_offset[i] = part.eps, part.weight_offset
        params.groups_end[i] = groups
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
    spec: PartsSpec


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
    return PartsLaunch(function.ptr, blocks, config.threads, index, params, config, call.spec)


def over_tokens(launch: PartsLaunch, before: int, after: int) -> PartsLaunch | None:
    """
    Return `launch` with `after` tokens for every `before`, its outermost axis being longer.

    None where that takes another kernel.
    """
    config, params = launch.config, type(launch.params).from_buffer_copy(launch.params)
    groups = params.groups // before * after
    heads = groups // params.groups_end[PARTS - 1] * sum(params.num_heads)
    if not _parts_launch.serves(config, launch.spec, heads, groups):
        return None
    params.groups = groups
    return launch._replace(blocks=-(-groups // config.groups_per_block), params=params)


def runner(launch: PartsLaunch) -> Callable[..., None]:
    """
    Return a function that queues `launch`, for the thread that asks for it.

    Its arguments are a stream, and addresses: of each part's x, of each part's out, of the weight
    and bias of each part in turn, and of cosines, sines and positions.
    """
    params, arguments, start = _kernels.packed(launch)
    at = type(params).part.offset
    write, packed_once = _ARRAYS.pack_into, list(_ARRAYS.unpack_from(params, at))
    address = ctypes.addressof(arguments)
    function, blocks, threads, device = launch[:4]
    in_use = False

    def launch_here(
        stream: int,
        x: Sequence[int],
        out: Sequence[int],
        parameters: Sequence[int],
        tables: Sequence[int],
    ) -> None:
        nonlocal in_use
        words = packed_once.copy()
        end = len(x) * _WORDS
        words[0:end:_WORDS], words[1:end:_WORDS] = x, out
        words[2:end:_WORDS], words[3:end:_WORDS] = parameters[::2], parameters[1::2]
        words[-3:] = tables
        if in_use:  # as in _kernels.runner
            runner(launch)(stream, x, out, parameters, tables)
            return
        in_use = True
        try:
            write(params, at, *words)
            start(function, blocks, 1, 1, threads, 1, 1, 0, stream, address, 0)
        finally:
            in_use = False

    vars(launch_here).update(keeps=arguments)  # their address is in use
    return _kernels.on_its_device(launch_here, device)
