"""How a kernel is laid over the rows: pure arithmetic, no GPU needed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from cupy_headnorm._spec import NormCall, NormSpec, integer

WARP = 32
GROUP_THREADS = 256
"""Threads a block at most where rows share it; the kernels are compiled for this bound."""
GROUP_BLOCKS = 5
"""Blocks of so many threads that a multiprocessor has room for at least, which leaves a thread 48
registers. Layer, bfloat16, head_dim 160, 64 MB, H100: 1.00 of copy speed, without the cap 0.96."""
GROUP_BLOCKS_VALUES = 12
"""Values of a lane at most for `GROUP_BLOCKS`; with more, a bias or narrower accesses the compiler
spills."""
MAX_BLOCKS = 2**31 - 1
MAX_HEAD_DIM = 2**31 - 2**17
"""The kernels count inside a row in 32 bits, up to a tile past its end."""
FEW_AXES = 3
"""As kFewAxes in headnorm/rows.cuh."""
AXES = (1, FEW_AXES, 8)
"""Axes of the grid of rows that kernels are compiled for.
Contiguous arrays have 1, slices of model tensors 3 at most. Fewer are faster: 1 token x 32 heads x
128, bfloat16, H100: 1.42 us with room for 8, 1.38 for 3, 1.36 for 1; 64 tokens 2.48, 2.39, 2.32."""
MAX_FEW_ROWS = 2**31 - 1
"""With few axes, but for one alone. Kernels for more count rows in 64 bits."""

SHARED_ROW_BYTES = 1024
"""Up to here rows share a block. One block per row is bound by block launch, at about 1.66 rows
per ns on an H100: 28 % of copy speed at 256 bytes, 98.2 % at 1 KiB against 98.7 % shared."""

MAX_VALUES_PER_LANE = 32
"""Values a lane of a whole-block row keeps in registers; more spill at 1,024 threads a block."""


class DeviceLimits(NamedTuple):
    """What a plan needs to know about a device. The defaults are an H100's."""

    max_threads_per_block: int = 1024


@dataclass(frozen=True)
class LaunchConfig:
    """
    Which threads own which elements, and how many rows share a block.

    The first three fields depend on dtype and head_dim alone: they fix the order of additions,
    and with it a row's bits.
    """

    vector_bytes: int
    """Bytes of neighbouring elements that a lane owns together."""
    lanes: int
    """Threads that share a row: a power of two."""
    vectors_per_lane: int
    """Vectors a lane holds in registers at once; a longer row is walked in tiles."""
    rows_per_block: int
    """1 is one block per (token, head) row."""
    access_bytes: int
    """Bytes moved by one load or store: `vector_bytes`, less where memory is misaligned."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, integer(getattr(self, field.name), field.name))

    @property
    def threads(self) -> int:
        """Threads a block: whole warps, since the shuffles need them."""
        return -(-self.lanes * self.rows_per_block // WARP) * WARP

    def blocks(self, rows: int) -> int:
        """Blocks that cover `rows`."""
        return -(-rows // self.rows_per_block)


def _power_of_two_up_to(value: float) -> int:
    power = 1
    while power * 2 <= value:
        power *= 2
    return power


def _vector_choices(head_dim: int, itemsize: int) -> list[int]:
    """Return the vector lengths that divide head_dim, widest first, 16 bytes at most."""
    return [n for n in (8, 4, 2, 1) if n * itemsize <= 16 and head_dim % n == 0]


def row_geometry(head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """
    Choose (vector_bytes, lanes, vectors_per_lane) from the length of a row.

    A lane wants 16 to 32 useful bytes, 64 in long rows, or too few are in flight. float16 rows of
    64 MB on an H100, as vector elements x lanes x vectors, ratio to a copy: head_dim 96 8x8x2 0.99,
    2x16x3 0.93; 192 8x16x2 0.99, 2x32x3 0.93; 1024 8x64x2 0.99, 8x128x1 0.975; 4096 8x128x4 0.99,
    8x512x1 0.89.
    """
    row_bytes = head_dim * itemsize
    choices = _vector_choices(head_dim, itemsize)
    if row_bytes > SHARED_ROW_BYTES:
        per_lane = 32 if row_bytes < 8192 else 64
        lanes = min(max(_power_of_two_up_to(row_bytes / per_lane), 2 * WARP), 1024)
    else:
        # 2-byte loads need more lanes to cover sectors: head_dim 37 1x8x5 0.87, 73 1x16x5 0.87.
        per_lane = 8 if choices[0] * itemsize < 4 else 16
        lanes = min(_power_of_two_up_to(max(row_bytes / per_lane, 1)), WARP)

    def used(vector: int) -> float:
        return head_dim / (_vectors(head_dim, vector, lanes) * lanes * vector)

    # Idle slots cost less than narrow loads, up to a point: float16 rms, ratio to a copy, head_dim
    # 96 8x8x2 (75 % used) 0.99, 2x16x3 (all used) 0.93; 72 4x8x3 (75 %) 1.00, 8x8x2 (56 %) 0.98.
    # With layer, bfloat16, 8x8x2 at head_dim 80 (62 %) is down to 0.92.
    vector = next((v for v in choices if used(v) >= 0.7), max(choices, key=used))
    count = _vectors(head_dim, vector, lanes)
    if lanes > WARP:
        # 1,024 threads leave 64 registers each, 512 leave 128.
        limit = MAX_VALUES_PER_LANE // (2 if itemsize == 8 else 1) // (2 if lanes > 512 else 1)
        if count * vector > limit:
            count = max(1, limit // 2 // vector)  # walking tiles takes registers too
    return vector * itemsize, lanes, count


def _vectors(head_dim: int, vector: int, lanes: int) -> int:
    return -(-head_dim // (vector * lanes))


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
    if rest or vector not in _vector_choices(spec.head_dim, spec.x.itemsize):
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


def memory(call: NormCall, config: LaunchConfig) -> Memory:
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
    vector_bytes, lanes, vectors = row_geometry(spec.head_dim, spec.x.itemsize)
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


def division(divisor: int) -> tuple[int, int]:
    """Return (multiplier, shift) of headnorm/rows.cuh for dividing numbers below 2^31."""
    shift = (divisor - 1).bit_length()
    return (((1 << 32) * ((1 << shift) - divisor)) // divisor + 1) & 0xFFFFFFFF, shift
