"""Overlap rules against brute force: every byte of every index."""

import itertools

import numpy as np
import pytest

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.layout import (
    CPU,
    Layout,
    alignment_of,
    as_numpy,
    overlap,
    overlaps_itself,
)


def layout(shape, strides):
    return Layout(shape, tuple(2 * s for s in strides), dtypes.FLOAT16, CPU, 2)


def addresses(pointer, of):
    indices = itertools.product(*(range(n) for n in of.shape))
    return [
        pointer + sum(i * s for i, s in zip(index, of.strides, strict=True)) for index in indices
    ]


STRIDES = (-9, -4, -3, -1, 0, 1, 2, 3, 4, 5, 7, 12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2), (1, 4), (2, 2, 3), (3, 1, 2), (0, 2)])
def test_overlaps_itself_is_exact(shape):
    seen = set()
    for strides in itertools.product(STRIDES, repeat=len(shape)):
        of = layout(shape, strides)
        places = addresses(0, of)
        expected = len(set(places)) < len(places)
        assert overlaps_itself(of) == expected, (shape, strides)
        seen.add(expected)
    assert seen == ({False} if 0 in shape else {False, True})


@pytest.mark.parametrize("shift", range(-14, 15))
def test_overlap_of_two_is_exact(shift):
    base = 1 << 40
    for strides in itertools.product((-6, 2, 3, 6, 8), (1, 2)):
        a, b = layout((3, 2), strides), layout((2, 2), (8, 1))
        expected = bool(set(addresses(base, a)) & set(addresses(base + 2 * shift, b)))
        assert overlap(base, a, base + 2 * shift, b) == expected, (strides, shift)


def test_extent_is_that_of_the_bytes():
    of = layout((3, 2), (-4, 1))
    places = addresses(100, of)
    assert of.extent(100) == (min(places), max(places) + 2)
    assert layout((0, 2), (4, 1)).extent(100) == (100, 100)


@pytest.mark.parametrize("pointer", [1, 2, 6, 8, 24, 16, 48, 1 << 40])
def test_alignment(pointer):
    expected = max(n for n in (1, 2, 4, 8, 16) if pointer % n == 0)
    assert alignment_of(pointer) == expected


def test_as_numpy_is_the_same_memory(dtype):
    memory = np.arange(24).astype(dtype.numpy).reshape(4, 6)
    view = memory[::-2, 1:4]
    of = Layout(view.shape, view.strides, dtype, CPU, 2)
    again = as_numpy(view.ctypes.data, of, memory, writeable=True)
    np.testing.assert_array_equal(again, view)
    again[0, 0] = 99
    assert memory[3, 1] == 99
    assert not as_numpy(view.ctypes.data, of, memory, writeable=False).flags.writeable


def test_overlap_is_decided_in_bounded_work():
    """Strides made to be hard are refused rather than searched for."""
    strides = tuple(2 * (10**9 + step) for step in np.random.default_rng(0).integers(0, 10**8, 8))
    hard = Layout((11,) * 8, strides, dtypes.FLOAT16, CPU, 2)
    array = as_numpy(1 << 62, hard, None, writeable=False)
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(array[:1], array[1:], max_work=10_000)
    assert overlaps_itself(hard)
