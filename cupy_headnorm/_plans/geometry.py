"""How rows are laid over threads: pure arithmetic that kernels share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cupy_headnorm._rules.options import integer

WARP = 32
MAX_BLOCKS = 2**31 - 1
FEW_AXES = 3
"""This is kFewAxes in headnorm/rows.cuh."""
MAX_FEW_ROWS = 2**31 - 1
"""Kernels for few axes, but for one alone, count no more. Those for more count in 64 bits."""

SHARED_ROW_BYTES = 1024
"""Rows share a block up to this length. One block per row is bound by block launch, at about 1.66
rows per ns on an H100: 28 % of copy speed at 256 bytes, 98.2 % at 1 KiB against 98.7 % shared."""

MAX_VALUES_PER_LANE = 32
"""A lane of a whole-block row keeps so many in registers; more spill at 1,024 threads a block."""


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
    """Vectors a lane holds in registers at once; a longer row is gone through in tiles."""
    rows_per_block: int
    """1 is one block per (token, head) row."""
    access_bytes: int
    """Bytes moved by one load or store: `vector_bytes`, less where memory is misaligned."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, integer(getattr(self, field.name), field.name))

    @property
    def threads(self) -> int:
        """Return the threads of a block: whole warps, since the shuffles need them."""
        return -(-self.lanes * self.rows_per_block // WARP) * WARP

    def blocks(self, rows: int) -> int:
        """Return how many blocks cover `rows`."""
        return -(-rows // self.rows_per_block)


def _power_of_two_up_to(value: int) -> int:
    return 1 << value.bit_length() - 1


def vector_choices(head_dim: int, itemsize: int) -> list[int]:
    """Return the vector lengths that divide head_dim, widest first, 16 bytes at most."""
    return [n for n in (8, 4, 2, 1) if n * itemsize <= 16 and head_dim % n == 0]


def row_geometry(head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """
    Choose (elements of a vector, lanes, vectors of a lane) from the length of a row.

    A lane wants 16 to 32 useful bytes, 64 in the longest rows, or too few are in flight. 64 MB of
    16-bit rows, as vector elements x lanes x vectors, ratio to a copy: head_dim 1024 8x64x2 0.99,
    8x128x1 0.975 (H100); 4096 8x256x2 0.989, 8x128x4 0.960 (H200), 8x512x1 0.89 (H100).
    """
    row_bytes = head_dim * itemsize
    choices = vector_choices(head_dim, itemsize)
    if row_bytes > SHARED_ROW_BYTES:
        per_lane = 32 if row_bytes < 16384 else 64
        lanes = min(max(_power_of_two_up_to(row_bytes // per_lane), 2 * WARP), 1024)
    else:
        # 2-byte loads need more lanes to cover sectors: head_dim 37 1x8x5 0.87, 73 1x16x5 0.87.
        per_lane = 8 if choices[0] * itemsize < 4 else 16
        lanes = min(_power_of_two_up_to(max(row_bytes // per_lane, 1)), WARP)

    def used(vector: int) -> float:
        return head_dim / (_vectors(head_dim, vector, lanes) * lanes * vector)

    # Loads of 8 bytes are as good as those of 16, and no slot is better idle. Loads of 4 are worse
    # than idle slots, up to a point. bfloat16, rms and layer, ratio to a copy (H200): head_dim 96
    # 4x8x3 (all used) 0.996 and 0.993, 8x8x2 (75 %) 0.996 and 0.986; float16 rms (H100): 96 8x8x2
    # 0.99, 2x16x3 (all) 0.93; 72 4x8x3 (75 %) 1.00, 8x8x2 (56 %) 0.98. Layer of 80 as 8x8x2 (62 %)
    # is down to 0.92. 256 4x32x2 0.991 and 0.969, 8x32x1 0.982 and 0.966.
    full = [v for v in choices if used(v) == 1 and v * itemsize >= 8]
    if lanes == WARP and itemsize == 2:
        full.reverse()
    vector = next((v for v in (*full, *choices) if used(v) >= 0.7), max(choices, key=used))
    count = _vectors(head_dim, vector, lanes)
    if lanes > WARP:
        # 1,024 threads leave 64 registers each, 512 leave 128.
        limit = MAX_VALUES_PER_LANE // (2 if itemsize == 8 else 1) // (2 if lanes > 512 else 1)
        if count * vector > limit:
            count = max(1, limit // 2 // vector)  # walking tiles takes registers too
    return vector, lanes, count


def _vectors(head_dim: int, vector: int, lanes: int) -> int:
    return -(-head_dim // (vector * lanes))


def widest_access(
    vector: int, alignment: int, itemsize: int, arrays: str, size: str = "an element's size"
) -> int:
    """
    Return the most elements at once, up to a vector, that an alignment allows.

    `arrays` begins the message where it allows none, and `size` ends it.
    """
    if alignment < itemsize:
        raise ValueError(f"{arrays} rows aligned to {alignment} bytes; needs {itemsize}, {size}")
    while min(vector * itemsize, 16) > alignment:
        vector //= 2
    return vector


def check_blocks(blocks: int, told: str) -> None:
    """Refuse more blocks than a launch can have; `told` begins the message."""
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{told} {blocks} blocks; needs {MAX_BLOCKS} at most")


def division(divisor: int) -> tuple[int, int]:
    """
    Return (multiplier, shift) of headnorm/rows.cuh for dividing numbers below 2^31.

    Of a larger divisor (0, 0): only kernels that divide in 64 bits meet one.
    """
    if divisor >= 2**31:
        return 0, 0
    shift = (divisor - 1).bit_length()
    return (((1 << 32) * ((1 << shift) - divisor)) // divisor + 1) & 0xFFFFFFFF, shift
