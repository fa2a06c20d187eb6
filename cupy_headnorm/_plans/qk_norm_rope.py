"""How the kernel of queries, keys and values is laid over their heads: pure arithmetic."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

from cupy_headnorm._cuda import compiler
from cupy_headnorm._cuda.launcher import Launch
from cupy_headnorm._plans import geometry
from cupy_headnorm._plans.geometry import WARP
from cupy_headnorm._rules.axes import PARTS, TokenAxis
from cupy_headnorm._rules.parts import PartsCall, PartsSpec

AXES = (2, geometry.FEW_AXES, 8)
"""Axes that kernels are compiled for: those of the tokens, and one for the groups of a token."""
ANY_HEAD_DIM = {2: 4096, 4: 16384, 8: 8192}
"""By itemsize: heads of any length up to here fit a block of threads. Of 16-bit ones 8,192 and
16,384 do too."""
GROUP_THREADS = 128
SHARED_BYTES = 48 * 1024
"""Of shared memory that any GPU gives a block."""
GROUP_BLOCKS = 6
"""Blocks of so many threads that a multiprocessor has room for at least, which leaves a thread 80
registers, where cosines are given and every operation is rounded. Others would spill."""
FOLDED_VALUES = 16
"""Of a lane at most that does the work of two. Then the two elements of a pair lie in one lane, and
half as many instructions go to a head. 16,384 tokens of 32 and 8 heads of 128, bfloat16, RoPE, on
an H100: 0.95 of copy speed, not folded 0.90."""
HEADS_PER_GROUP = {"none": 1, "given": 2, "positions": 4}
"""That one group walks, cosines and sines in registers, where there are heads enough. In that case,
by 1, 2, 4, 8 heads: without RoPE 0.97, 0.96, 0.95, 0.93; cosines given 0.95, 0.95, 0.94, 0.92; by
positions 0.87, 0.93, 0.94, 0.92."""
MAX_HEADS = 2**31 - 1 - max(HEADS_PER_GROUP.values())
"""Of a token, in all parts: the kernel counts them in 32 bits, up to a group past the last one."""
FEW_THREADS = 3 * 132 * 2048
"""Up to so many lanes of all heads together each head has a group of its own: an H100 has room for
a third of them at once. By positions with 1 / 2 heads a group: 1 token 1.74 / 1.97 us, 1,024 tokens
10.0 / 10.3, 4,096 tokens 34.3 / 32.5."""


class PartsConfig(NamedTuple):
    """Which threads own which elements of a head, and how many heads they walk."""

    vector: int
    """Neighbouring elements that a lane owns together."""
    lanes: int
    vectors: int
    """Of a lane."""
    fold: int
    """Lanes of ``head_norm.cu`` whose work one lane does, adding in their order."""
    access: int
    """Elements of x and out moved by one load or store."""
    parameter_access: int
    table_access: int
    heads_per_group: int
    groups_per_block: int
    axes: int

    @property
    def threads(self) -> int:
        """Threads a block."""
        return -(-self.lanes * self.groups_per_block // WARP) * WARP

    def groups_of(self, num_heads: int) -> int:
        """Return how many groups walk the heads of one part of a token."""
        return -(-num_heads // self.heads_per_group)


def plan(call: PartsCall) -> PartsConfig:
    """Choose how to run `call`; ValueError where one kernel cannot."""
    spec = call.spec
    itemsize = spec.x.itemsize
    vector_bytes, lanes, vectors = geometry.row_geometry(spec.head_dim, itemsize)
    vector = vector_bytes // itemsize
    if vector * lanes * vectors < spec.head_dim:
        raise ValueError(
            f"head_dim is {spec.head_dim}; needs {ANY_HEAD_DIM[itemsize]} at most for {spec.x}"
        )
    fold = 1
    if 2 <= lanes <= WARP and 2 * vectors * vector <= FOLDED_VALUES:
        fold, lanes, vectors = 2, lanes // 2, vectors * 2
    heads = sum(part.num_heads for part in call.parts)
    if heads > MAX_HEADS:
        each = " + ".join(str(part.num_heads) for part in call.parts)
        raise ValueError(
            f"q, k and v have {each} heads, {heads} in all; needs {MAX_HEADS} at most on a GPU"
        )
    heads_per_group = _heads_per_group(spec, call.tokens * heads, lanes)
    groups_per_block = GROUP_THREADS // lanes if lanes <= WARP else 1
    of_parameters = [
        _access("weights or biases", found, vector, dtype.itemsize)
        for dtype, found in call.parameters
    ]
    of_tables = 1
    if spec.rope:
        table = spec.rope.table
        of_tables = _access("cos and sin", call.table_alignment, vector, table.itemsize)
    config = PartsConfig(
        vector,
        lanes,
        vectors,
        fold,
        _access("q, k, v or out", call.alignment, vector, itemsize),
        min(of_parameters, default=1),
        of_tables,
        heads_per_group,
        groups_per_block,
        0,
    )
    groups = call.tokens * sum(config.groups_of(part.num_heads) for part in call.parts)
    few = groups <= geometry.MAX_FEW_ROWS
    if len(call.axes) + 1 > AXES[-1]:
        raise ValueError(
            f"the tokens have {len(call.axes)} axes that no common stride joins; "
            f"needs {AXES[-1] - 1} at most"
        )
    # One axis of tokens counts in 32 bits too: its groups are an axis beside it.
    axes = next(n for n in AXES if len(call.axes) < n and (few or n == AXES[-1]))
    blocks = -(-groups // groups_per_block)
    if blocks > geometry.MAX_BLOCKS:
        raise ValueError(
            f"{call.tokens} tokens take {blocks} blocks; needs {geometry.MAX_BLOCKS} at most"
        )
    shared = 2 * lanes * vectors * vector * groups_per_block * itemsize
    if spec.rope and shared > SHARED_BYTES:
        raise ValueError(
            f"head_dim is {spec.head_dim}, which takes {shared} bytes of shared memory to turn; "
            f"needs {SHARED_BYTES} at most"
        )
    return config._replace(axes=axes)


def serves(config: PartsConfig, spec: PartsSpec, heads: int, groups: int) -> bool:
    """Tell whether a call's configuration is that of another number of heads, of all tokens."""
    alike = config.heads_per_group == _heads_per_group(spec, heads, config.lanes)
    counted = groups <= geometry.MAX_FEW_ROWS or config.axes == AXES[-1]
    return alike and counted and -(-groups // config.groups_per_block) <= geometry.MAX_BLOCKS


def _heads_per_group(spec: PartsSpec, heads: int, lanes: int) -> int:
    many = heads * lanes > FEW_THREADS and lanes <= WARP
    return HEADS_PER_GROUP[_turned_by(spec)] if many else 1


def _turned_by(spec: PartsSpec) -> str:
    """Return the key of `HEADS_PER_GROUP`; given cosines count as looked up if they are widened."""
    if spec.rope is None:
        return "none"
    return "given" if spec.rope.position is None and spec.rope.every_op else "positions"


def blocks(spec: PartsSpec, config: PartsConfig) -> int:
    """Return how many blocks a multiprocessor must have room for: that caps the registers."""
    small = config.vector * config.vectors <= FOLDED_VALUES and config.access == config.vector
    given = _turned_by(spec) == "given"
    capped = small and given and spec.x.itemsize == 2 and not spec.bias and config.lanes <= WARP
    return GROUP_BLOCKS if capped else 1


def _access(names: str, alignment: int, vector: int, itemsize: int) -> int:
    """Return the most elements at once that an alignment allows, up to a vector."""
    if alignment < itemsize:
        raise ValueError(
            f"{names} have rows aligned to {alignment} bytes; needs {itemsize}, an element's size"
        )
    while min(vector * itemsize, 16) > alignment:
        vector //= 2
    return vector


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
        "HN_BLOCKS": str(blocks(spec, config)),
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
    return compiler.options_of(macros(spec, config))


_NAMES = ("x", "out", "weight", "bias")
_WORDS = struct.Struct("4Q4q" * PARTS + "3Q")
"""``headnorm::PartsParams`` from its parts up to the addresses of cosines, sines and positions."""
PART_WORDS = tuple(range(8 * part, 8 * part + 4) for part in range(PARTS))
"""Places of each part's x, out, weight and bias among the words of a launch; its strides follow."""
COS, SIN, POSITIONS = range(8 * PARTS, 8 * PARTS + 3)


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
    for axes in AXES
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
            place.multiplier, place.shift = geometry.division(axis.size)
    return params


def prepare(call: PartsCall, index: int, stream: int, config: PartsConfig | None = None) -> Launch:
    """
    Plan `call` on CUDA device `index`, and compile and load its kernel where that is new.

    Raises
    ------
    CaptureError
        It is new while `stream` is captured.
    """
    config = plan(call) if config is None else config
    options = compile_options(call.spec, config)

    def make() -> Any:
        empty = _PARAMS[call.spec.x.accumulate.name, config.axes]()
        for axis in empty.axis:
            axis.size = 1
        return compiler.compiled("qk_norm_rope.cu", options, empty, config.threads, index)

    function = compiler.loaded((call.spec, options, index), stream, make)
    params = _params(call, config)
    blocks = -(-params.groups // config.groups_per_block)
    at = type(params).part.offset
    return Launch(
        function.ptr, blocks, config.threads, index, params, _WORDS, at, config, call.spec
    )


def over(launch: Launch, before: int, after: int) -> Launch | None:
    """
    Return `launch` with `after` tokens for every `before`, its outermost axis being longer.

    None where that takes another kernel.
    """
    config, params = launch.config, type(launch.params).from_buffer_copy(launch.params)
    groups = params.groups // before * after
    heads = groups // params.groups_end[PARTS - 1] * sum(params.num_heads)
    if not serves(config, launch.spec, heads, groups):
        return None
    params.groups = groups
    return launch._replace(blocks=-(-groups // config.groups_per_block), params=params)
