"""Faults planted in the text of one kernel each: what runs kernels on the host must find them."""

import host
import host_build
import numpy as np
import pytest
from cases import function
from host_build import ANY, NORMS, WHOLE
from host_cases import FAR, far_apart, kernel_of, last_rows, options, parameters, reserved
from oracle import norm as oracle
from tolerances import assert_close

import cupy_headnorm

pytestmark = pytest.mark.usefixtures("compiler")


def faulty(norm, rng, *changes, count=5, orders=host.ORDERS):
    """Return what a changed kernel makes of a few rows, and what float64 does."""
    built = host.planted(norm.specialisation(), *changes)
    x = rng.standard_normal((count, norm.spec.head_dim)).astype(norm.spec.x.numpy)
    weight, bias = parameters(norm._replace(axes=1), rng, x.shape)
    given = options(norm)
    exact, *rest = oracle(norm.spec.kind, x, weight, bias, **given)
    with host.device(built, orders=orders):
        y = function(norm.spec.kind)(x, weight, bias, **given)
    return y, exact, rest[0]


def test_a_kernel_without_a_fault_passes(rng):
    y, exact, slack = faulty(kernel_of(host_build.BLOCK, WHOLE), rng)
    assert_close(y, exact, slack, "float16")


PAST_THE_TAIL = (
    "kEveryLaneFull || element < kHeadDim;",
    "kEveryLaneFull || element <= kHeadDim;",
)


def test_an_index_one_past_the_tail_is_found(rng):
    with pytest.raises(host.Finding, match=r"AddressSanitizer(.|\n)*READ(.|\n)*vec\.cuh:\d+"):
        faulty(kernel_of(host_build.ODD, ANY), rng, PAST_THE_TAIL, count=1)


def test_an_index_one_past_the_tail_is_found_between_rows(rng):
    """What lies behind a row of a slice is memory of the array it is cut from."""
    norm = kernel_of(host_build.ODD, ANY)
    built = host.planted(norm.specialisation(), PAST_THE_TAIL)
    x = rng.standard_normal((4, 2 * norm.spec.head_dim + 3)).astype(norm.spec.x.numpy)
    _, bias = parameters(norm, rng, (1, norm.spec.head_dim))
    with host.device(built), pytest.raises(host.Finding, match="use-after-poison"):
        cupy_headnorm.rms_norm(x[:, : norm.spec.head_dim], None, bias[0], rounding="every_op")


BARRIER = "    __syncthreads();\n    return warp_sum<kWarps>(", "    return warp_sum<kWarps>("


@pytest.mark.parametrize("how", [WHOLE, ANY])
def test_a_missing_barrier_is_found(how, rng):
    with pytest.raises(host.Finding, match="give different bits"):
        faulty(kernel_of(host_build.BLOCK, how), rng, BARRIER)


@pytest.mark.parametrize("order", host.ORDERS)
def test_a_missing_barrier_gives_wrong_numbers_in_any_one_order(order, rng):
    """What was not written yet is NaN."""
    y, *_ = faulty(kernel_of(host_build.BLOCK, WHOLE), rng, BARRIER, orders=[order])
    assert np.isnan(y).any()


def test_shared_sums_used_again_without_a_barrier_are_found(rng):
    """ExLlamaV2's LayerNorm: a warp that is ahead overwrites the mean that another one reads."""
    used_twice = ("mean_of<G>(differences, partial[2])", "mean_of<G>(differences, partial[0])")
    with pytest.raises(host.Finding, match="give different bits"):
        faulty(kernel_of(host_build.ODD_BLOCK, ANY), rng, used_twice)


def test_a_missing_barrier_of_a_warp_is_found(rng):
    """It stands between the lanes that stage for others and the lanes that take it."""
    taken = "          row_barrier<G::kLanes>();\n        }\n      }\n      const int first"
    change = (taken, taken.partition("\n")[2])
    y, *_ = faulty(kernel_of(host_build.QWEN3, ANY), rng, change)
    assert np.isnan(y.astype(np.float32)).all()


EXISTS = "(kNoneIdle || local_row < HN_ROWS) && row < static_cast<Count>(p.rows);"


@pytest.mark.parametrize("spec", [host_build.QWEN3, host_build.BLOCK], ids=lambda s: s.name)
def test_a_shuffle_over_lanes_that_left_is_found(spec, rng):
    """Idle lanes leave: of rows that do not fill a warp, or of a block (its upper half here)."""
    leave = " if (!row_exists) return;"
    if spec == host_build.BLOCK:
        leave = " if (threadIdx.x >= 80) return;"
    with pytest.raises(host.Finding, match=r"divergence .* waits for its .* has ended"):
        faulty(kernel_of(spec, WHOLE), rng, (EXISTS, EXISTS + leave))


def test_a_barrier_that_some_warps_miss_is_found(rng):
    change = (
        "    __syncthreads();\n    return",
        "    if (threadIdx.x < 64) __syncthreads();\n    return",
    )
    missed = r"thread 0 waits for its block at .*reduce\.cuh:\d+, thread 64 has ended"
    with pytest.raises(host.Finding, match=missed):
        faulty(kernel_of(host_build.BLOCK, WHOLE), rng, change)


def test_a_vector_loaded_from_a_misaligned_row_is_found(rng):
    norm = kernel_of(host_build.TAIL, ANY)
    change = (
        "tile_of_lane[j].template load_if<G::kAccess>(there, row + first);",
        "tile_of_lane[j].template load_if<G::kVec>(there, row + first);",
    )
    built = host.planted(norm.specialisation(), change)
    x = rng.standard_normal(1 + norm.spec.head_dim).astype(np.float32)[1:]
    weight, bias = parameters(norm._replace(axes=1), rng, x.shape)
    with host.device(built), pytest.raises(host.Finding, match="misaligned address"):
        cupy_headnorm.layer_norm(x, weight, bias)


@pytest.mark.parametrize("step", [FAR, -FAR])
def test_an_offset_of_32_bits_is_found(step, rng):
    """The rows are where they are said to be, and a wrong address is nobody's."""
    norm = kernel_of(host_build.QWEN3, WHOLE, wide=True)
    change = ("    x += steps * axis.x;", "    x += static_cast<int>(steps * axis.x);")
    built = host.planted(norm.specialisation(), change)
    x = far_apart(reserved(3 * FAR + 2**16), norm, step)
    x[...] = 1
    weight, _ = parameters(norm, rng, x.shape)
    with host.device(built), pytest.raises(host.Finding, match="SEGV on unknown address"):
        cupy_headnorm.rms_norm(x, weight, out=x)


def test_a_row_number_of_32_bits_is_found(rng):
    norm = kernel_of(host_build.ONE_ELEMENT, ANY)
    change = (
        "static_cast<Count>(blockIdx.x) * HN_ROWS",
        "static_cast<int>(blockIdx.x) * HN_ROWS",
    )
    with pytest.raises(host.Finding, match="signed integer overflow"):
        last_rows(host.planted(norm.specialisation(), change), rng)


def test_a_fault_that_finds_no_text_fails():
    with pytest.raises(LookupError, match=r"0 times in head_norm\.cu: 'no such text'"):
        host.planted(NORMS[0].specialisation(), ("no such text", ""))
