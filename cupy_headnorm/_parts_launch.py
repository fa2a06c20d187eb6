"""How the kernel of queries, keys and values is laid over their heads: pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from cupy_headnorm import _launch
from cupy_headnorm._launch import WARP
from cupy_headnorm._parts import PartsCall, PartsSpec

AXES = (2, _launch.FEW_AXES, 8)
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
    vector_bytes, lanes, vectors = _launch.row_geometry(spec.head_dim, itemsize)
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
    few = groups <= _launch.MAX_FEW_ROWS
    if len(call.axes) + 1 > AXES[-1]:
        raise ValueError(
            f"the tokens have {len(call.axes)} axes that no common stride joins; "
            f"needs {AXES[-1] - 1} at most"
        )
    # One axis of tokens counts in 32 bits too: its groups are an axis beside it.
    axes = next(n for n in AXES if len(call.axes) < n and (few or n == AXES[-1]))
    blocks = -(-groups // groups_per_block)
    if blocks > _launch.MAX_BLOCKS:
        raise ValueError(
            f"{call.tokens} tokens take {blocks} blocks; needs {_launch.MAX_BLOCKS} at most"
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
    counted = groups <= _launch.MAX_FEW_ROWS or config.axes == AXES[-1]
    return alike and counted and -(-groups // config.groups_per_block) <= _launch.MAX_BLOCKS


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
