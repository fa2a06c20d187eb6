"""How the kernel of queries, keys and values is laid over their heads: pure arithmetic."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

from cupy_headnorm._cuda.launcher import Launch
from cupy_headnorm._plans import geometry, parts_params, specialisation
from cupy_headnorm._plans.geometry import WARP
from cupy_headnorm._plans.specialisation import NONE
from cupy_headnorm._rules.axes import PARTS, TokenAxis
from cupy_headnorm._rules.norm import NormSpec
from cupy_headnorm._rules.parts import PartsCall, PartsSpec
from cupy_headnorm._rules.rotary import NO_ROPE

AXES = (2, geometry.FEW_AXES, 8)
"""Kernels are compiled for so many axes: those of the tokens, and one for the groups of a token."""
ANY_HEAD_DIM = {2: 8192, 4: 16384, 8: 8192}
"""Heads of any length up to here fit a block of threads, by itemsize. Those of 16,384 16-bit
elements do too."""
GROUP_THREADS = 64
"""A block has so many. 16,384 tokens of 32 and 8 heads of 128, bfloat16, on an H200, share of copy
speed with cosines given / by positions / not rotated: 64 0.925 / 0.919 / 0.974, 128 0.919 / 0.915 /
0.972, 256 0.48 / 0.88 / 0.94."""
SHARED_BYTES = 48 * 1024
"""Any GPU gives a block so much shared memory."""
FOLDED_VALUES = 16
"""A lane that does the work of two has no more. Then the two elements of a pair lie in one lane,
and half as many instructions go to a head. 16,384 tokens of 32 and 8 heads of 128, bfloat16, RoPE,
on an H100: 0.95 of copy speed, not folded 0.90."""
HEADS_PER_GROUP = {"none": 1, "given": 2, "positions": 4}
"""One group does so many, cosines and sines in registers, where there are heads enough. For the
same tokens, by 1, 2, 4, 8 heads: without RoPE 0.97, 0.96, 0.95, 0.93; cosines given 0.95, 0.95,
0.94, 0.92; by positions 0.87, 0.93, 0.94, 0.92."""
MAX_HEADS = 2**31 - 1 - max(HEADS_PER_GROUP.values())
"""A token has no more in all parts: the kernel counts in 32 bits, up to a group past the end."""
FEW_THREADS = 3 * 132 * 2048
"""Up to so many lanes of all heads together each head has a group of its own: an H100 has room for
a third of them at once. By positions with 1 / 2 heads a group: 1 token 1.74 / 1.97 us, 1,024 tokens
10.0 / 10.3, 4,096 tokens 34.3 / 32.5."""


class PartsConfig(NamedTuple):
    """Which threads own which elements of a head, and how many heads they do."""

    vector: int
    """Neighbouring elements that a lane owns together."""
    lanes: int
    vectors: int
    """A lane has so many."""
    fold: int
    """One lane does the work of so many of ``head_norm.cu``, adding in their order."""
    access: int
    """One load or store moves so many elements of x or out."""
    parameter_access: int
    table_access: int
    heads_per_group: int
    groups_per_block: int
    axes: int

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return -(-self.lanes * self.groups_per_block // WARP) * WARP

    def blocks(self, groups: int) -> int:
        """Return how many blocks cover `groups`."""
        return -(-groups // self.groups_per_block)


def plan(call: PartsCall) -> PartsConfig:
    """Choose how to run `call`; ValueError where one kernel cannot."""
    rope = call.spec.rope
    vector, lanes, vectors, fold = _row(call.spec.norm)
    heads_per_group = _heads_per_group(call.spec, call.tokens * _heads(call), lanes)

    def access(itemsize: int, alignment: int, arrays: str) -> int:
        return geometry.widest_access(vector, alignment, itemsize, arrays)

    of_parameters = [
        access(dtype.itemsize, alignment, "weights or biases have")
        for dtype, alignment in call.parameters
    ]
    of_tables = 1
    if rope is not None:
        of_tables = access(rope.table.itemsize, call.lookup.alignment, "cos and sin have")
    config = PartsConfig(
        vector=vector,
        lanes=lanes,
        vectors=vectors,
        fold=fold,
        access=access(call.spec.norm.x.itemsize, call.alignment, "q, k, v or out have"),
        parameter_access=min(of_parameters, default=1),
        table_access=of_tables,
        heads_per_group=heads_per_group,
        groups_per_block=GROUP_THREADS // lanes if lanes <= WARP else 1,
        axes=_axes(call, heads_per_group),
    )
    _check(call, config)
    return config


def _row(spec: NormSpec) -> tuple[int, int, int, int]:
    """Return the elements of a vector, lanes, vectors of a lane, and what each lane folds."""
    vector, lanes, vectors = geometry.row_geometry(spec.head_dim, spec.x.itemsize)
    if vector * lanes * vectors < spec.head_dim:
        most = ANY_HEAD_DIM[spec.x.itemsize]
        raise ValueError(f"head_dim is {spec.head_dim}; needs {most} at most for {spec.x}")
    if 2 <= lanes <= WARP and 2 * vectors * vector <= FOLDED_VALUES:
        return vector, lanes // 2, vectors * 2, 2
    return vector, lanes, vectors, 1


def _heads(call: PartsCall) -> int:
    """Return how many heads a token has, as many as the kernel can count."""
    heads = sum(part.num_heads for part in call.parts)
    if heads > MAX_HEADS:
        each = " + ".join(str(part.num_heads) for part in call.parts)
        raise ValueError(
            f"q, k and v have {each} heads, {heads} in all; needs {MAX_HEADS} at most on a GPU"
        )
    return heads


def _axes(call: PartsCall, heads_per_group: int) -> int:
    """Return for how many axes the kernel is compiled."""
    if len(call.axes) + 1 > AXES[-1]:
        raise ValueError(
            f"the tokens have {len(call.axes)} axes that no common stride joins; "
            f"needs {AXES[-1] - 1} at most"
        )
    # One axis of tokens counts in 32 bits too: its groups are an axis beside it.
    few = call.tokens * _ends(call, heads_per_group)[-1] <= geometry.MAX_FEW_ROWS
    return next(n for n in AXES if len(call.axes) < n and (few or n == AXES[-1]))


def _ends(call: PartsCall, heads_per_group: int) -> list[int]:
    """Return how many groups a token's heads take up to the end of each part."""
    return list(accumulate(-(-part.num_heads // heads_per_group) for part in call.parts))


def _check(call: PartsCall, config: PartsConfig) -> None:
    """Raise ValueError where one launch has not as many blocks, or a block not the memory."""
    blocks = config.blocks(call.tokens * _ends(call, config.heads_per_group)[-1])
    geometry.check_blocks(blocks, f"{call.tokens} tokens take")
    norm = call.spec.norm
    row = config.lanes * config.vectors * config.vector
    shared = 2 * row * config.groups_per_block * norm.x.itemsize
    if call.spec.rope and shared > SHARED_BYTES:
        raise ValueError(
            f"head_dim is {norm.head_dim}, which takes {shared} bytes of shared memory to rotate; "
            f"needs {SHARED_BYTES} at most"
        )


def _heads_per_group(spec: PartsSpec, heads: int, lanes: int) -> int:
    many = heads * lanes > FEW_THREADS and lanes <= WARP
    return HEADS_PER_GROUP[_rotated_by(spec)] if many else 1


def _rotated_by(spec: PartsSpec) -> str:
    """Return the key of `HEADS_PER_GROUP`; given cosines count as looked up if they are widened."""
    if spec.rope is None:
        return "none"
    return "given" if spec.rope.position is None and spec.rope.every_op else "positions"


def macros(spec: PartsSpec, config: PartsConfig) -> dict[str, str]:
    """Return the ``HN_*`` macros of one specialisation of ``qk_norm_rope.cu``."""
    rope = spec.rope or NO_ROPE
    name = spec.name
    if config.access != config.vector:
        name += f"_access{config.access}"
    sections = "none"
    if rope.sections:
        sections = "interleaved" if rope.interleaved_sections else "chunks"
    return specialisation.macros(spec.norm, name) | {
        "HN_ALIKE": str(spec.all_parts_alike).lower(),
        "HN_VEC": str(config.vector),
        "HN_ACCESS": str(config.access),
        "HN_PARAMETER_ACCESS": str(config.parameter_access),
        "HN_LANES": str(config.lanes),
        "HN_VECTORS": str(config.vectors),
        "HN_FOLD": str(config.fold),
        "HN_THREADS": str(config.threads),
        "HN_AXES": str(config.axes),
        "HN_ROPE": rope.style.replace(" ", "_"),
        "HN_ROPE_FIRST": str(rope.first).lower(),
        "HN_ROTARY_DIM": str(rope.rotary_dim),
        "HN_EVERY_OP": str(rope.every_op).lower(),
        "HN_TABLE": rope.table.cuda,
        "HN_WHOLE_ROWS": str(rope.whole_rows).lower(),
        "HN_TABLE_ACCESS": str(config.table_access),
        "HN_POSITION": rope.position.cuda if rope.position else NONE,
        "HN_SECTIONS": sections,
        "HN_SECTION_SIZES": ",".join(map(str, rope.sections)) or "0",
    }


def _params(call: PartsCall, config: PartsConfig) -> Any:
    ends = _ends(call, config.heads_per_group)
    real = specialisation.real_of(call.spec.norm)
    params: Any = parts_params.params_type(real, config.axes)(
        groups=call.tokens * ends[-1],
        heads_per_group=config.heads_per_group,
        groups_per_block=config.groups_per_block,
        groups_end=(*ends, *ends[-1:] * (PARTS - len(ends))),
        position_row=call.lookup.position_row,
        table_row=call.lookup.table_row,
        max_position=call.lookup.max_position,
    )
    for i, part in enumerate(call.parts):
        array = params.part[i]
        array.head_x, array.head_out, array.head_weight, array.head_bias = part[1:5]
        params.num_heads[i], params.rotated[i] = part.num_heads, part.rotated
        params.eps[i], params.weight_offset[i] = part.eps, part.weight_offset
    unneeded = [TokenAxis(1)] * (config.axes - 1 - len(call.axes))
    axes = (TokenAxis(ends[-1]), *unneeded, *reversed(call.axes))
    for place, axis in zip(params.axis, axes, strict=True):
        place.size, place.position, place.table = axis.size, axis.position, axis.table
        place.x[: len(axis.x)], place.out[: len(axis.out)] = axis.x, axis.out
        place.multiplier, place.shift = geometry.division(axis.size)
    return params


def launch_of(call: PartsCall, config: PartsConfig, index: int) -> Launch:
    """Return the launch of `call` on CUDA device `index`, but for its function."""
    params = _params(call, config)
    groups, fields = params.groups, type(params)
    of_token = (call.spec, _heads(call), groups // call.tokens)
    return Launch(
        0, config.blocks(groups), config.threads, index, params, fields.part.offset,
        groups, fields.groups.offset, config, of_token,
    )  # fmt: skip


def prepare(call: PartsCall, index: int, stream: int, config: PartsConfig | None = None) -> Launch:
    """Plan `call` on CUDA device `index`; see `specialisation.loaded`."""
    config = plan(call) if config is None else config
    spec = call.spec
    key = (*spec, config._replace(heads_per_group=0))  # a run-time argument
    launch = launch_of(call, config, index)
    return specialisation.loaded(
        launch, "qk_norm_rope.cu", key, lambda: macros(spec, config), stream
    )


def over(launch: Launch, before: int, after: int) -> Launch | None:
    """
    Return `launch` with `after` tokens for every `before`, its outermost axis being longer.

    None where that takes another kernel.
    """
    config, (spec, heads, groups_of_token) = launch.config, launch.spec
    groups = launch.total // before * after
    heads *= groups // groups_of_token
    alike = config.heads_per_group == _heads_per_group(spec, heads, config.lanes)
    counted = groups <= geometry.MAX_FEW_ROWS or config.axes == AXES[-1]
    blocks = config.blocks(groups)
    if not alike or not counted or blocks > geometry.MAX_BLOCKS:
        return None
    return launch.over(blocks, groups)
