"""
Every tolerance of the test-suite, derived.

A result is one rounding away from exact, plus the float32 error in front of that rounding:

* the rounding: half a unit, 0.5 eps, of the result's dtype. 0.6 leaves 0.1 eps for the arithmetic,
  which is 2**13 (float16) and 2**16 (bfloat16) times finer. A second rounding would add 0.5 eps
  and fails.
* float32 and float64: the sum of D squares in a tree of depth d errs by d / 2 eps at most, halved
  by the root; root, reciprocal root (2 ulp in CUDA), two products and the sum with the bias add
  half an eps or two each. 8 eps covers d = 8 and them; 4.6 was the worst seen.
* below the smallest normal number half a subnormal step, 2**-25 for float16; what the kernels
  flush to zero, 2**-126, for the others.
* where terms cancel (a bias, or x near its mean) the error is that of the terms: 8 eps of the
  accumulating dtype of each.
* a value rotated by a rotary embedding is two products of numbers that are 8 eps off and their sum,
  cos and sin being at most one and, where each library takes its own, an eps apart: 1.5 eps and
  one; if the norm comes last its root moves by those 1.5 eps too. 12 eps of the pair, ROTATED times
  the 8. Frequencies an eps apart give angles an eps off each: ANGLE of the 8, times the angle.
* a rounding in the middle ("before_weight") may fall to the other side: one eps of the product.
"""

import numpy as np

RELATIVE = {
    "float16": 0.6 * 2.0**-10,
    "bfloat16": 0.6 * 2.0**-7,
    "float32": 8 * 2.0**-23,
    "float64": 8 * 2.0**-52,
}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
ABSOLUTE = {
    "float16": 2.0**-25,
    "bfloat16": 2.0**-126,
    "float32": 2.0**-126,
    "float64": 2.0**-1022,
}
CANCELLING = {"float16": 8 * 2.0**-23, "bfloat16": 8 * 2.0**-23, "float32": 8 * 2.0**-23}
CANCELLING["float64"] = 8 * 2.0**-52

ROTATED = 12 / 8
ANGLE = 1 / 8

FLIPS = 5e-4
"""Share of values on which two float32 evaluations of one formula may round to different sides."""
TELLING = 0.1
"""Share of values that another rounding or formula changes at least: 20 to 44 % were seen."""
FLIPS_ROTATED = 1e-3
"""The same where each library has cos and sin of its own, at positions below 4096: a float32
frequency in 50 is an eps off, and its angle 2**-11 at most, a unit of a float16 cosine. 0.031 % was
the worst seen; 0.003 % of it with the model's frequencies."""
FLIPS_RECORDED = 2e-4
"""The same on recorded activations of 10,000 to 40,000 values: 0 or 1 of them was seen."""
FLIPS_FEW = 1e-2
"""The same on a few thousand values, where one flip weighs much."""
FLIPS_NEED = 2**20
"""Values to count flips on: one in 2**20 is 0.0001 %."""


def assert_close(actual, exact, slack, dtype, rounded_before=0):
    """Assert that `actual` is `exact` (float64 or better), rounded to `dtype` once.

    `rounded_before` is the product that was rounded in the middle, where one was.
    """
    actual = np.asarray(actual)
    assert actual.dtype.name == dtype
    assert actual.shape == exact.shape
    actual = actual.astype(exact.dtype)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, exact))
    bound = RELATIVE[dtype] * np.abs(exact) + ABSOLUTE[dtype] + CANCELLING[dtype] * slack
    bound = bound + EPS[dtype] * rounded_before
    error = np.abs(actual - exact)
    with np.errstate(invalid="ignore", divide="ignore"):
        worst = np.nanmax(np.where(finite, error / bound, 0), initial=0)
    assert worst <= 1, f"error is {worst:.3g} times the bound"


def assert_alike(actual, expected, slack=0):
    """Assert that two evaluations of one formula agree: each may be off by the bound."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    name, wide = actual.dtype.name, np.longdouble
    bound = RELATIVE[name] * np.abs(expected.astype(wide)) + ABSOLUTE[name]
    bound = bound + CANCELLING[name] * slack
    assert (np.abs(actual.astype(wide) - expected.astype(wide)) <= 2 * bound).all()


def mismatch(actual, expected):
    """Return the share of values that differ."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    return np.count_nonzero(actual != expected) / actual.size


def assert_same_rounding(actual, expected):
    """Assert that two arrays are one formula with one set of roundings, but for flips."""
    assert actual.size >= FLIPS_NEED
    share = mismatch(actual, expected)
    assert share < FLIPS, f"{share:.4%} of the values differ"


# What the demo prints, in eps of each value: one rounding may be half an eps off and a hair.
EPS_ONE_ROUNDING = 0.51
EPS_TWO_ROUNDINGS = 1.02
# float32 arithmetic, counted from 1/64 of the row's largest value where terms cancel.
EPS_FLOAT32 = 8 * 64
