"""Results against float64, on every library: the reference on the host, the kernel on the GPU."""

import ml_dtypes
import numpy as np
import pytest
from cases import (
    AROUND,
    DEFAULT,
    HEAD_DIMS,
    LAYOUTS,
    Case,
    Layout,
    covering_specs,
    expected_layout,
    function,
    random,
)
from oracle import norm as oracle
from tolerances import (
    FLIPS_NEED,
    TELLING,
    assert_alike,
    assert_close,
    assert_same_rounding,
    mismatch,
)

import cupy_headnorm
from cupy_headnorm._arrays import dtypes


def run(library, case, x, weight, bias, **more):
    arrays = [None if a is None else library.array(a) for a in (x, weight, bias)]
    return library.host(function(case.kind)(*arrays, **case.options, **more))


def check(library, case, rng):
    x, weight, bias = case.arrays(rng)
    exact, slack, product = oracle(case.kind, x, weight, bias, **case.options)
    rounded_before = 0 if case.rounding == "once" else product
    assert_close(run(library, case, x, weight, bias), exact, slack, case.x.name, rounded_before)


@pytest.mark.parametrize("case", AROUND, ids=str)
def test_norm_matches_float64(library, case, rng):
    check(library, case, rng)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_any_head_dim(library, kind, head_dim, rng):
    tokens = 5 if head_dim < 20000 else 1
    check(library, Case(kind=kind, head_dim=head_dim, tokens=tokens), rng)
    check(library, Case(kind, dtypes.FLOAT32, head_dim=head_dim, tokens=tokens), rng)


@pytest.mark.parametrize("spec", covering_specs(), ids=lambda spec: spec.name)
def test_every_pair_of_choices(library, spec, rng):
    case = Case(
        spec.kind,
        spec.x,
        spec.weight,
        spec.bias,
        spec.rounding,
        per_head=True,
        head_dim=spec.head_dim,
        tokens=5 if spec.head_dim < 16384 else 1,
        weight_offset=1.0,
    )
    check(library, case, rng)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("x", [dtypes.FLOAT16, dtypes.BFLOAT16], ids=str)
@pytest.mark.parametrize("rounding", ["once", "before_weight", "every_op"])
def test_rounding_is_the_one_asked_for(library, kind, x, rounding, rng):
    case = Case(kind, x, x, x, head_dim=128, tokens=FLIPS_NEED // 128 // 4, num_heads=4)
    case = case._replace(rounding=rounding)
    values, weight, bias = case.arrays(rng)
    y = run(library, case, values, weight, bias)
    exact, *_ = oracle(kind, values, weight, bias, **case.options)
    assert_same_rounding(y, exact.astype(x.numpy))
    for other in {"once", "before_weight", "every_op"} - {rounding}:
        wrong, *_ = oracle(kind, values, weight, bias, **case.options | {"rounding": other})
        assert mismatch(y, wrong.astype(x.numpy)) > TELLING


@pytest.mark.parametrize("x", [dtypes.FLOAT16, dtypes.BFLOAT16], ids=str)
def test_rounding_of_the_inverse_root(library, x, rng):
    case = Case("rms", x, None, head_dim=128, tokens=FLIPS_NEED // 128 // 4, num_heads=4)
    values, *_ = case.arrays(rng)
    y = run(library, case._replace(rounding="rstd"), values, None, None)
    exact, *_ = oracle("rms", values, eps=1e-6, rounding="rstd")
    assert_same_rounding(y, exact.astype(x.numpy))
    wrong, *_ = oracle("rms", values, eps=1e-6)
    assert mismatch(y, wrong.astype(x.numpy)) > TELLING


@pytest.mark.parametrize("head_dim", [33, 96, 100, 128, 256, 513, 1000, 2048, 20000])
def test_equal_values_are_no_distance_from_their_mean(library, head_dim, dtype, rng):
    """Were the mean a unit in the last place off, 1234.567 would give 0.08."""
    constants = rng.uniform(1, 2000, (200, 1, 1)) * 10.0 ** rng.integers(-3, 2, (200, 1, 1))
    constants[0] = 1234.567
    x = np.repeat(constants.astype(dtype.numpy), head_dim, -1)
    bias = random(rng, head_dim, dtype)
    y = library.host(cupy_headnorm.layer_norm(library.array(x), None, library.array(bias)))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_any_strides(library, layout, kind, rng, dtype):
    layout = layout.of(library)
    x = library.lay(library.array(random(rng, layout.elements, dtype)), layout)
    weight, bias = random(rng, (3, 64), dtypes.FLOAT32), random(rng, (3, 64), dtype)
    y = function(kind)(x, library.array(weight), library.array(bias), heads_axis=layout.heads_axis)
    assert y.shape == x.shape
    host_x, host_weight = expected_layout(layout, library.host(x), weight)
    _, host_bias = expected_layout(layout, library.host(x), bias)
    eps = 1e-6 if kind == "rms" else 1e-5
    exact, slack, _ = oracle(kind, host_x, host_weight, host_bias, eps=eps)
    assert_close(library.host(y).reshape(exact.shape), exact, slack, dtype.name)


@pytest.mark.parametrize("layout", [v for v in LAYOUTS if not v.overlaps], ids=str)
def test_out_has_strides_of_its_own_and_nothing_else_is_written(library, layout, rng):
    layout = layout.of(library)
    x = rng.standard_normal(layout.shape).astype(np.float32)
    weight = rng.standard_normal((3, 64)).astype(np.float32)
    buffer = library.array(np.full(layout.elements + 5, np.nan, np.float32))
    out = library.lay(buffer, layout)
    result = cupy_headnorm.rms_norm(
        library.array(x), library.array(weight), heads_axis=layout.heads_axis, out=out
    )
    assert result is out
    expected = cupy_headnorm.reference.rms_norm(x, weight, heads_axis=layout.heads_axis)
    assert_alike(library.host(out), expected)
    written = np.count_nonzero(~np.isnan(library.host(buffer)))
    assert written == x.size, "NaN marks what no index of out names"


def test_in_place_gives_the_same_bits(library, dtype, rng):
    x = random(rng, (37, 3, 96), dtype)
    weight = library.array(random(rng, (3, 96), dtype))
    fresh = library.host(cupy_headnorm.rms_norm(library.array(x), weight))
    inside = library.array(x)
    pointer = library.pointer(inside)
    assert cupy_headnorm.rms_norm(inside, weight, out=inside) is inside
    assert library.pointer(inside) == pointer
    np.testing.assert_array_equal(library.host(inside), fresh)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("head_dim", [37, 64, 80, 128, 256, 1024, 4099])
def test_a_rows_bits_depend_on_the_row_alone(library, kind, head_dim, dtype, rng):
    rows = random(rng, (53, 2, head_dim), dtype)
    weight = library.array(random(rng, head_dim, dtype))
    norm = function(kind)
    whole = library.host(norm(library.array(rows), weight))
    for start, stop in ((0, 1), (17, 18), (5, 40), (52, 53)):
        part = library.host(norm(library.array(rows[start:stop]), weight))
        np.testing.assert_array_equal(part, whole[start:stop])
    for _ in range(3):
        np.testing.assert_array_equal(library.host(norm(library.array(rows), weight)), whole)
    # Off by one element, every access is as narrow as can be.
    buffer = np.concatenate([rows[:1, :1, :1].reshape(1), rows.reshape(-1)])
    layout = Layout("shifted", rows.shape, (2 * head_dim, head_dim, 1), offset=1)
    shifted = library.lay(library.array(buffer), layout)
    np.testing.assert_array_equal(library.host(norm(shifted, weight)), whole)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_do_not_depend_on_strides(library, kind, layout, rng):
    layout = layout.of(library)
    x = library.lay(library.array(rng.standard_normal(layout.elements).astype(np.float32)), layout)
    if layout.name.startswith("flat"):
        x = x.reshape(*layout.shape[:-1], 3, 64)
    packed = library.array(np.ascontiguousarray(library.host(x)))
    y, expected = function(kind)(x), function(kind)(packed)
    np.testing.assert_array_equal(library.host(y), library.host(expected))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinities_and_nan_stay_in_their_row(library, kind, bad, dtype, rng):
    x = random(rng, (16, 3, 64), dtype)
    spoilt = x.copy()
    spoilt[7, 1, 5] = bad
    clean = library.host(function(kind)(library.array(x)))
    y = library.host(function(kind)(library.array(spoilt)))
    others = np.ones((16, 3), bool)
    others[7, 1] = False
    np.testing.assert_array_equal(y[others], clean[others])
    with np.errstate(all="ignore"):
        exact, *_ = oracle(kind, spoilt, eps=1e-6 if kind == "rms" else 1e-5)
    np.testing.assert_array_equal(y[7, 1].astype(float), exact[7, 1].astype(float))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_zero_rows(library, kind, dtype):
    x = np.zeros((2, 3, 64), dtype.numpy)
    assert not library.host(function(kind)(library.array(x))).astype(float).any()
    assert np.isnan(library.host(function(kind)(library.array(x), eps=0)).astype(float)).all()


def test_input_is_not_written(library, rng):
    x = rng.standard_normal((5, 3, 64)).astype(np.float32)
    weight = rng.standard_normal(64).astype(np.float32)
    given, given_weight = library.array(x), library.array(weight)
    cupy_headnorm.rms_norm(given, given_weight, given_weight)
    np.testing.assert_array_equal(library.host(given), x)
    np.testing.assert_array_equal(library.host(given_weight), weight)


def test_read_only_input_is_read():
    x = np.ones((2, 3, 8), np.float32)
    x.flags.writeable = False
    assert cupy_headnorm.rms_norm(x, x[0, 0]).flags.writeable


def test_flat_equals_split(library, rng):
    x = rng.standard_normal((5, 3 * 64)).astype(np.float16)
    weight = library.array(rng.standard_normal((3, 64)).astype(np.float32))
    flat = library.host(cupy_headnorm.rms_norm(library.array(x), weight))
    split = library.host(cupy_headnorm.rms_norm(library.array(x.reshape(5, 3, 64)), weight))
    np.testing.assert_array_equal(flat.reshape(split.shape), split)


def test_flat_weight_equals_2d_weight(library, rng):
    x = library.array(rng.standard_normal((5, 3, 64)).astype(np.float16))
    weight = rng.standard_normal((3, 64)).astype(np.float32)
    by_head = cupy_headnorm.rms_norm(x, library.array(weight), library.array(weight))
    flat = cupy_headnorm.rms_norm(
        x, library.array(weight.reshape(-1)), library.array(weight.reshape(-1)), num_heads=3
    )
    np.testing.assert_array_equal(library.host(flat), library.host(by_head))


def test_offset_is_formed_in_float32(library, rng):
    """Adding 1 in bfloat16 instead changes 27 % of the outputs: fault 9 of test_contract.py."""
    case = DEFAULT._replace(tokens=FLIPS_NEED // 128 // 3 + 1, weight_offset=1.0)
    x, *_ = case.arrays(rng)
    weight = (rng.standard_normal(128) / 3).astype(ml_dtypes.bfloat16)  # Gemma's are about so
    y = run(library, case, x, weight, None)
    exact, *_ = oracle("rms", x, weight, eps=1e-6, weight_offset=1.0)
    assert_same_rounding(y, exact.astype(x.dtype))
    rounded = (weight + ml_dtypes.bfloat16(1)).astype(ml_dtypes.bfloat16)
    wrong, *_ = oracle("rms", x, rounded, eps=1e-6)
    assert mismatch(y, wrong.astype(x.dtype)) > TELLING


def test_bias_is_added_before_the_rounding(library, rng):
    """Rounding first and adding after changes 29 % of the outputs: fault 9 of test_contract.py."""
    case = Case("layer", bias=dtypes.BFLOAT16, tokens=FLIPS_NEED // 128 // 3 + 1, eps=1e-5)
    x, weight, bias = case.arrays(rng)
    y = run(library, case, x, weight, bias)
    exact, *_ = oracle("layer", x, weight, bias, eps=1e-5)
    assert_same_rounding(y, exact.astype(x.dtype))
    early, *_ = oracle("layer", x, weight, eps=1e-5)
    wrong = (early.astype(x.dtype).astype(float) + bias.astype(float)).astype(x.dtype)
    assert mismatch(y, wrong) > TELLING
