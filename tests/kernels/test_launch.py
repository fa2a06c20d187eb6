"""The plan over a wide grid of rows: what must hold for every kernel that could be launched."""

from types import SimpleNamespace

import numpy as np
import pytest
from cases import covering_specs

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.layout import Device, Layout
from cupy_headnorm._cuda import compiler
from cupy_headnorm._cuda.compiler import DeviceLimits
from cupy_headnorm._plans import geometry, head_norm, qk_norm_rope
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._rules import parts as part_rules
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec
from cupy_headnorm._rules.options import options
from cupy_headnorm._rules.rotary import Rotation

HEAD_DIMS = [*range(1, 300), 320, 384, 511, 512, 513, 576, 640, 768, 1000, 1001, 1024, 1025, 1536]
HEAD_DIMS += [2047, 2048, 4095, 4096, 4099, 8192, 16384, 20000, 65536, 100003, 10_000_001]


def call(head_dim, dtype, rows=1000, alignments=(16, 16, 16, 16), axes=None, weight=None):
    spec = NormSpec("rms", dtype, weight, None, head_dim, "once", False)
    return NormCall(spec, axes or (RowAxis(rows, 0, 0, 0, 0),), rows, 1e-6, 0.0, alignments)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_plan_covers_the_row_and_the_rows(head_dim, dtype):
    for rows in (1, 2, 31, 32, 33, 4096, 10**6):
        config = head_norm.plan(call(head_dim, dtype, rows))
        elements = config.vector_bytes // dtype.itemsize
        assert head_dim % elements == 0, "a vector lies wholly inside or outside the row"
        assert config.vector_bytes <= 16
        assert config.lanes & (config.lanes - 1) == 0
        assert config.threads % 32 == 0
        assert config.threads >= config.lanes * config.rows_per_block
        assert config.threads <= 1024
        assert config.rows_per_block == 1 or config.lanes <= 32, "a shared block sums in warps"
        assert config.blocks(rows) * config.rows_per_block >= rows
        assert (config.blocks(rows) - 1) * config.rows_per_block < rows
        tile = elements * config.lanes * config.vectors_per_lane
        assert tile >= head_dim or config.lanes > 32, "only whole blocks walk a row in tiles"
        assert tile * 2 <= head_dim * 4 + 4, "no more than half of the slots are idle"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_order_of_additions_depends_on_dtype_and_head_dim_alone(head_dim, dtype):
    configs = [
        head_norm.plan(call(head_dim, dtype, rows, alignments))
        for rows in (1, 7, 10**6)
        for alignments in ((16, 16, 16, 16), (dtype.itemsize, 16, 16, 16), (16, 8, 8, 8))
    ]
    assert len({(c.vector_bytes, c.lanes, c.vectors_per_lane) for c in configs}) == 1


def test_rows_of_1_kib_and_less_share_a_block_and_longer_ones_get_one():
    for head_dim in (64, 128, 256, 512):
        config = head_norm.plan(call(head_dim, dtypes.BFLOAT16, 10**6))
        assert config.rows_per_block > 1
    for head_dim in (513, 1024, 4096):
        config = head_norm.plan(call(head_dim, dtypes.BFLOAT16, 10**6))
        assert config.rows_per_block == 1
        assert config.lanes >= 64


def test_every_number_of_rows_has_one_geometry():
    """Otherwise no call over other tokens could be derived from one that is planned."""
    for head_dim in (64, 128, 4096):
        few, many = (head_norm.plan(call(head_dim, dtypes.BFLOAT16, n)) for n in (1, 10**6))
        assert few == many


@pytest.mark.parametrize("alignment", [2, 4, 8, 16])
def test_access_is_as_wide_as_the_alignment(alignment):
    config = head_norm.plan(call(128, dtypes.FLOAT16, alignments=(16, alignment, 16, 16)))
    assert config.access_bytes == alignment
    assert config.vector_bytes == 16


@pytest.mark.parametrize(("alignment", "elements"), [(16, 8), (8, 1)])
def test_a_parameter_is_read_as_wide_as_its_own_alignment(alignment, elements):
    wide = call(128, dtypes.FLOAT16, alignments=(16, 16, alignment, 16), weight=dtypes.FLOAT64)
    config = head_norm.plan(wide)
    assert config.access_bytes == 16
    assert head_norm.memory_of(wide, config).parameter_access == elements


def test_many_rows_on_several_axes_take_the_kernel_that_counts_in_64_bits():
    few = (RowAxis(10, 64, 64, 0, 0), RowAxis(10, 6, 6, 0, 0))
    last = 2**31 - 1
    for axes, rows, room, narrow in (
        (few[:1], last, 1, True),
        (few[:1], last + 1, 1, False),
        (few, last, 3, True),
        (few, last + 1, 8, False),
    ):
        many = call(1, dtypes.FLOAT16, rows, axes=axes)
        assert head_norm.memory_of(many, head_norm.plan(many))[:2] == (room, narrow)


def test_steps_that_32_bits_do_not_hold_take_such_a_kernel_too():
    """A step of an outer axis is what is left of its stride behind the axis inside of it."""
    last = 2**31 - 1
    for step, narrow in ((last, True), (-last, True), (last + 1, False), (-last - 1, False)):
        for i in range(1, 5):
            axis = RowAxis(2, *(step if i == of else 2 for of in range(1, 5)))
            outer = RowAxis(3, *(2 * stride for stride in axis[1:]))  # steps of 0
            far = RowAxis(3, *(axis[of] * 2 + (step if i == of else 2) for of in range(1, 5)))
            for axes, room in (((axis,), 1), ((outer, axis), 3), ((far, axis), 3)):
                many = call(1, dtypes.FLOAT16, 6, axes=axes)
                found = head_norm.memory_of(many, head_norm.plan(many))
                assert found[:2] == (room if narrow else {1: 1, 3: 8}[room], narrow)


def test_memory_not_aligned_to_its_elements_is_refused():
    with pytest.raises(ValueError, match="x has rows aligned to 2 bytes; needs 4, the size of its"):
        head_norm.plan(call(128, dtypes.FLOAT32, alignments=(2, 16, 16, 16)))


def test_too_many_axes_are_refused():
    axes = tuple(RowAxis(2, 10**i, 10**i, 0, 0) for i in range(9))
    with pytest.raises(ValueError, match="9 axes that no common stride joins; needs 8 at most"):
        head_norm.plan(call(128, dtypes.FLOAT32, 512, axes=axes))


def test_too_many_blocks_are_refused():
    rows = 2**31
    with pytest.raises(ValueError, match="2147483648 blocks; needs 2147483647 at most"):
        head_norm.plan(call(4096, dtypes.FLOAT32, rows))


GOOD = LaunchConfig(16, 16, 1, 8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector_bytes": 32}, "vector_bytes is 32; needs 1, 2, 4 or 8 float16 elements in 16"),
        ({"vector_bytes": 3}, "vector_bytes is 3; needs"),
        ({"vector_bytes": 12}, "vector_bytes is 12; needs"),
        ({"lanes": 12}, "lanes is 12; needs a power of two up to 1024"),
        ({"lanes": 2048, "rows_per_block": 1}, "lanes is 2048; needs a power of two"),
        ({"vectors_per_lane": 0}, "vectors_per_lane is 0 of 8 elements; needs 1 to 64"),
        ({"vectors_per_lane": 9}, "vectors_per_lane is 9 of 8 elements"),
        ({"rows_per_block": 0}, "rows_per_block is 0 with lanes=16; needs 1 to 16"),
        ({"rows_per_block": 17}, "rows_per_block is 17 with lanes=16; needs 1 to 16"),
        ({"lanes": 64, "rows_per_block": 2}, "rows_per_block is 2 with lanes=64; needs 1 to 1"),
        ({"access_bytes": 32}, "access_bytes is 32; needs a divisor of vector_bytes=16"),
        ({"access_bytes": 1}, "access_bytes is 1; needs a divisor"),
    ],
)
def test_a_config_of_ones_own_is_checked(change, message):
    spec = NormSpec("rms", dtypes.FLOAT16, None, None, 128, "once", False)
    head_norm.check_config(GOOD, spec, DeviceLimits())
    config = LaunchConfig(**{**GOOD.__dict__, **change})
    with pytest.raises(ValueError, match=message):
        head_norm.check_config(config, spec, DeviceLimits())


def test_a_config_of_ones_own_is_held_to_the_memory():
    misaligned = call(128, dtypes.FLOAT16, alignments=(2, 16, 16, 16))
    with pytest.raises(ValueError, match=r"access_bytes is 16; needs 2 at most for rows aligned"):
        head_norm.check_call(misaligned, GOOD)
    head_norm.check_call(misaligned, LaunchConfig(16, 16, 1, 8, 2))


def test_a_row_too_long_to_count_in_32_bits_is_refused():
    with pytest.raises(ValueError, match="head_dim is 2147483647; needs 2147352576 at most"):
        head_norm.plan(call(2**31 - 1, dtypes.FLOAT16, 1))


def test_division_by_multiplication_is_exact(rng):
    divisors = [*range(1, 66), 127, 128, 1000, 2**16 - 1, 2**16, 2**16 + 1, 2**30 + 1, 2**31 - 1]
    divisors += [int(d) for d in rng.integers(1, 2**31, 100)]
    for divisor in divisors:
        multiplier, shift = geometry.division(divisor)
        near = np.arange(-2, 3) + np.arange(1, 20)[:, None] * divisor
        numbers = np.concatenate(
            [near.reshape(-1), rng.integers(0, 2**31, 1000), [0, 1, 2**31 - 1]]
        )
        numbers = numbers[(numbers >= 0) & (numbers < 2**31)].astype(np.uint64)
        high = (numbers * np.uint64(multiplier)) >> np.uint64(32)
        total = high + numbers
        assert (total < 2**32).all(), "the kernel adds in 32 bits"
        np.testing.assert_array_equal(total >> np.uint64(shift), numbers // np.uint64(divisor))


@pytest.mark.parametrize("size", [1, 3, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31])
def test_every_length_of_31_bits_has_a_multiplier(size):
    """Kernels of few axes divide by nothing else, those of more in 64 bits."""
    rows = call(1, dtypes.FLOAT16, size, axes=(RowAxis(size, 64, 64, 0, 0),))
    part = Layout((size, 1, 2), (64, 4, 2), dtypes.FLOAT16, Device("cuda", 0), 4)
    parts, norm = dict.fromkeys("qk", part), part_rules.PartNorm(options("rms"), None, None)
    tokens = part_rules.describe(dict.fromkeys("qk", norm), parts, parts, None, -2)
    memory = head_norm.memory_of(rows, head_norm.plan(rows))
    for params in (
        head_norm._params(rows, memory._replace(axes=3)),
        qk_norm_rope._params(tokens, qk_norm_rope.plan(tokens)),
    ):
        axis = params.axis[len(params.axis) - 1]
        assert axis.size == size
        divider = geometry.division(size) if size < 2**31 else (0, 0)
        assert (axis.multiplier, axis.shift) == divider


def parts_call(tokens, *, rotated):
    """Return a call on 32 and 8 heads of 128."""
    x, table, rows = dtypes.BFLOAT16, dtypes.FLOAT32, dtypes.INT64
    device = Device("cuda", 0)
    layouts = {
        name: Layout((tokens, heads, 128), (heads * 256, 256, 2), x, device, 16)
        for name, heads in (("q", 32), ("k", 8))
    }
    norm, rotation = part_rules.PartNorm(options("rms"), None, None), None
    if rotated:
        tables = [Layout((100, 64), (256, 4), table, device, 16)] * 2
        positions = Layout((tokens,), (8,), rows, device, 16)
        rotation = Rotation("half", False, 128, True, (), False, (True, True), *tables, positions)
    return part_rules.describe(dict.fromkeys("qk", norm), layouts, layouts, rotation, -2)


@pytest.mark.parametrize("rotated", [True, False], ids=["by positions", "not rotated"])
@pytest.mark.parametrize("before", [2, 2500, 2600, 2**26])
def test_a_launch_over_other_tokens_is_the_one_that_is_planned(before, rotated, monkeypatch):
    """There is none where a plan has another kernel, another geometry, or an error."""
    monkeypatch.setattr(compiler, "loaded", lambda *_: SimpleNamespace(ptr=1))

    def planned_over(tokens):
        return qk_norm_rope.prepare(parts_call(tokens, rotated=rotated), index=0, stream=0)

    known, derived = planned_over(before), []
    for after in (2, 3, 2500, 2534, 2535, 2600, 2**20, 2**26, 2**28, 2**34, 2**36):
        found = qk_norm_rope.over(known, before, after)
        try:
            planned = planned_over(after)
        except ValueError:
            assert found is None
            continue
        if found is None:
            assert planned.config != known.config
            continue
        derived.append(after)
        assert found.config._replace(axes=0) == planned.config._replace(axes=0)
        assert found.config.axes >= planned.config.axes
        assert (found.blocks, found.total) == (planned.blocks, planned.total)
        assert found.total == planned.params.groups
        assert found.total_offset == type(planned.params).groups.offset == 0
        rest = slice(type(found.params).groups.size, type(found.params).axis.offset)
        assert bytes(found.params)[rest] == bytes(planned.params)[rest]
    assert (
        derived
        == {
            (True, True): [2, 3, 2500, 2534],
            (True, False): [2535, 2600, 2**20, 2**26],
            (False, True): [2, 3, 2500, 2534, 2535, 2600, 2**20],
            (False, False): [2, 3, 2500, 2534, 2535, 2600, 2**20, 2**26, 2**28],
        }[rotated, before < 2600 if rotated else before < 2**26]
    )


def test_the_covering_list_is_small_and_covers():
    specs = covering_specs()
    assert len(specs) <= 81
    assert len({spec.name for spec in specs}) == len(specs)
    pairs = {(spec.x.name, spec.weight and spec.weight.name) for spec in specs}
    assert len(pairs) == 20
