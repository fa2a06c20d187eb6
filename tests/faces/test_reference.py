"""The reference's own promises: signatures, memory, and rows longer than a chunk."""

import inspect
import threading
import tracemalloc

import numpy as np
import pytest
from cases import LAYOUTS
from libraries import NumPyLibrary
from oracle import norm as oracle
from tolerances import assert_alike, assert_close

from cupy_headnorm import ops, reference
from cupy_headnorm._calls import host


@pytest.mark.parametrize("name", reference.__all__)
def test_signatures_are_those_of_the_functions(name):
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (getattr(ops, name), getattr(reference, name))
    )
    assert ours == theirs
    only, either, keyword = (
        getattr(inspect.Parameter, kind)
        for kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
    )
    kinds = {name: kind for name, kind, _ in ours}
    assert list(kinds.items())[:3] == [("x", only), ("weight", either), ("bias", either)]
    assert set(list(kinds.values())[3:]) == {keyword}, "options are keyword-only"


@pytest.mark.parametrize("kind", reference.__all__)
def test_functions_on_numpy_are_the_reference(kind, rng, dtype):
    x = rng.standard_normal((5, 3, 64)).astype(dtype.numpy)
    weight = rng.standard_normal((3, 64))
    for options in ({}, {"weight_offset": 1.0, "rounding": "before_weight", "eps": 0.1}):
        np.testing.assert_array_equal(
            getattr(ops, kind)(x, weight, weight, **options),
            getattr(reference, kind)(x, weight, weight, **options),
        )


@pytest.mark.parametrize("kind", reference.__all__)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1 << 16, 2, 128), np.float16),  # many chunks of rows
        ((3, 1 << 22), np.float32),  # rows of many chunks
        ((1, 3 << 22), np.float64),
        ((1 << 21, 1), np.float32),
    ],
)
def test_extra_memory_is_16_mib_at_most(kind, shape, dtype, rng):
    x = rng.standard_normal(shape, np.float32).astype(dtype)
    weight = np.ones(shape[-1], dtype)
    out = np.empty_like(x)
    tracemalloc.start()
    try:
        getattr(reference, kind)(x, weight, weight, rounding="before_weight", out=out)
        assert tracemalloc.get_traced_memory()[1] <= 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_longer_than_a_chunk(kind, in_place, rng, monkeypatch):
    monkeypatch.setattr(host, "_CHUNK_BYTES", 1024)
    x = (rng.standard_normal((5, 3, 1000)) + 3).astype(np.float32)
    weight = rng.standard_normal((3, 1000)).astype(np.float32)
    exact, slack, _ = oracle(kind, x, weight, x[0], eps=1e-6)
    out = x.copy()
    norm = {"rms": reference.rms_norm, "layer": reference.layer_norm}[kind]
    y = norm(out if in_place else x, weight, x[0].copy(), eps=1e-6, out=out)
    assert_close(y, exact, slack, "float32")


@pytest.mark.parametrize("chunk", [256, 600, 5000])
def test_chunks_cut_rows_anywhere(chunk, rng, monkeypatch):
    x = rng.standard_normal((3, 5, 4, 7, 16)).astype(np.float32)[:, ::2, :, ::3]
    weight = rng.standard_normal((3, 16)).astype(np.float32)
    whole = reference.rms_norm(x, weight)
    monkeypatch.setattr(host, "_CHUNK_BYTES", chunk)
    np.testing.assert_array_equal(reference.rms_norm(x, weight), whole)


def test_other_arrays_are_refused():
    with pytest.raises(TypeError, match="x is a list; the reference needs numpy.ndarray"):
        reference.rms_norm([1.0])
    with pytest.raises(TypeError, match="weight is a list; the reference needs numpy.ndarray"):
        reference.rms_norm(np.ones((3, 64)), [1.0])
    with pytest.raises(TypeError, match="x is a MaskedArray; the reference needs numpy.ndarray"):
        reference.rms_norm(np.ma.masked_array(np.ones((3, 64))))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_strides(layout, rng):
    buffer = rng.standard_normal(layout.elements).astype(np.float32)
    x = NumPyLibrary().lay(buffer, layout)
    weight = rng.standard_normal((3, 64)).astype(np.float32)
    y = reference.rms_norm(x, weight, heads_axis=layout.heads_axis)
    np.testing.assert_array_equal(y, ops.rms_norm(x, weight, heads_axis=layout.heads_axis))
    assert y.shape == x.shape


@pytest.mark.parametrize("kind", reference.__all__)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_misaligned_memory_gives_the_same_bits(kind, dtype, rng):
    """NumPy's own sums of misaligned numbers differ above 8192 elements."""
    x = rng.standard_normal((20, 10_007)).astype(dtype)
    memory = np.zeros(x.nbytes + 1, np.uint8)
    misaligned = memory[1:].view(dtype).reshape(x.shape)
    misaligned[...] = x
    assert not misaligned.flags.aligned
    norm = getattr(reference, kind)
    np.testing.assert_array_equal(norm(misaligned), norm(x))


def test_scale_of_the_input_does_not_matter(rng):
    x = rng.standard_normal((5, 3, 64)).astype(np.float32)
    np.testing.assert_array_equal(
        reference.rms_norm(x, eps=0), reference.rms_norm(x * np.float32(1024), eps=0)
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("head_dim", [64, 65, 256, 257, 340, 341, 512, 513])
def test_the_largest_promised_values_stay_in_range(kind, head_dim):
    """1e18 of either sign: the squares of 341 are more than float32 has."""
    x = np.full((2, head_dim), 1e18, np.float32)
    x[0, ::2] *= -1
    x[1, 0] *= -1  # twice as far from the mean
    exact, slack, _ = oracle(kind, x, eps=1e-5)
    norm = {"rms": reference.rms_norm, "layer": reference.layer_norm}[kind]
    assert_close(norm(x, eps=1e-5), exact, slack, "float32")


def test_layer_norm_ignores_a_shift(rng):
    x = rng.integers(-8, 9, (5, 3, 64)).astype(np.float32)
    _, slack, _ = oracle("layer", x + 16, eps=1e-5)
    assert_alike(reference.layer_norm(x + 16), reference.layer_norm(x), slack)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_threads_give_the_same_bits(kind, rng, monkeypatch):
    x = rng.standard_normal((999, 4, 64)).astype(np.float32)
    x[7, 1, 3], x[500, 2, 0] = np.inf, np.nan
    weight, bias = rng.standard_normal((2, 4, 64)).astype(np.float32)
    norm = {"rms": reference.rms_norm, "layer": reference.layer_norm}[kind]
    alone = norm(x, weight, bias)
    monkeypatch.setattr(host, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: range(4))
    normalize, together, here = host._normalize, threading.Barrier(2), threading.local()

    def meeting(*arguments):
        if not hasattr(here, "met"):
            here.met = True
            together.wait(30)  # or there is but one thread
        normalize(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(host, "_normalize", meeting)
        patched.setattr(host, "_MAX_THREADS", 2)
        np.testing.assert_array_equal(norm(x, weight, bias), alone)
    norm(x, weight, bias, out=x)
    np.testing.assert_array_equal(x, alone)
