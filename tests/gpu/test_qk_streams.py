"""QKNorm on a GPU: streams, graphs and threads. For one norm: test_streams.py, test_threads.py."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import qk_stand_in
import streams
from cases import random
from qk_cases import MAX_POSITION, D, H
from qk_stand_in import made
from streams import CUPY, TORCH, forget, synchronize

from cupy_headnorm import CaptureError, HeadNorm, QKNorm, Rope
from cupy_headnorm._arrays.dtypes import FLOAT32
from cupy_headnorm._cuda import compiler

pytestmark = pytest.mark.gpu
slow, spin = qk_stand_in.slow, streams.spin


@pytest.fixture(params=[TORCH, CUPY], ids=lambda library: library.name)
def owner(request):
    return request.param


def values_of(rng, tokens=64, head_dim=D):
    parts = [random(rng, (tokens, n, head_dim), FLOAT32) for n in H[:2]]
    return [*parts, rng.integers(0, MAX_POSITION, tokens)]


def on_gpu(owner, qk, values):
    q, k, positions = map(owner.array, values)
    results = [owner.host(y) for y in qk(q, k, positions=positions)]
    synchronize()
    return results


@pytest.mark.parametrize("target", ["in place", "given", "new"])
def test_graphs(owner, target, rng):
    qk = made(rng)
    q, k, positions = map(owner.array, values_of(rng))
    outs = tuple(owner.array(np.zeros(part.shape, np.float32)) for part in (q, k))
    qk.warmup(q, k, positions=positions)
    qk.warmup(q, k, positions=positions, out=outs)
    synchronize()
    loaded = dict(compiler._functions)
    gc.collect()
    with owner.capture() as replay:
        if target == "new" and not owner.allocates_in_graphs:
            with pytest.raises(CaptureError, match="a result without out would be allocated"):
                qk(q, k, positions=positions)
            target = "in place"
        out = {"in place": (q, k), "given": outs, "new": None}[target]
        results = qk(q, k, positions=positions, out=out)
    assert compiler._functions == loaded
    for _ in range(2):
        values = values_of(rng)
        for array, new in zip((q, k, positions), values, strict=True):
            owner.write(array, owner.array(new))
        synchronize()
        replay()
        synchronize()
        for y, expected in zip(results, on_gpu(owner, qk, values), strict=True):
            np.testing.assert_array_equal(owner.host(y), expected)


UNLOADED = {"torch": 104, "cupy": 120}
"""Lengths of heads whose kernels no other test loads."""


def test_nothing_is_loaded_while_capturing(owner, rng):
    head_dim = UNLOADED[owner.name]
    norm = HeadNorm(np.ones(head_dim, np.float32))
    qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, head_dim, max_position=MAX_POSITION))
    values = values_of(rng, head_dim=head_dim)
    q, k, positions = map(owner.array, values)
    q += q
    synchronize()

    def missing(what, **options):
        nonlocal q
        loaded = dict(compiler._functions)
        gc.collect()
        with owner.capture() as replay:
            with pytest.raises(CaptureError, match=what):
                qk(q, k, **options, out=(q, k))
            q += q
        assert compiler._functions == loaded
        replay()
        synchronize()

    missing("weight is not on cuda:0 yet while the stream is captured", positions=positions)
    qk.load()
    missing("the tables are not on cuda:0 yet while the stream is cap", positions=positions)
    cos, sin = (owner.array(random(rng, (64, head_dim), FLOAT32)) for _ in range(2))
    missing("the kernel for this layout is not loaded yet while the st", cos=cos, sin=sin)
    qk.warmup(q, k, positions=positions)
    for array, new in zip((q, k), values, strict=False):
        owner.write(array, owner.array(new))
    synchronize()
    gc.collect()
    with owner.capture() as again:
        qk(q, k, positions=positions, out=(q, k))
    again()
    synchronize()
    for y, expected in zip((q, k), on_gpu(owner, qk, values), strict=True):
        np.testing.assert_array_equal(owner.host(y), expected)


@pytest.mark.parametrize("first", [True, False], ids=["first", "remembered"])
@pytest.mark.parametrize("default", [True, False], ids=["default", "other"])
def test_a_call_runs_after_what_its_stream_was_given_before(owner, default, first, spin, slow, rng):
    qk, values = made(rng), values_of(rng)
    expected = on_gpu(owner, qk, values)
    sources = [owner.array(part) for part in values]
    arrays = [owner.array(np.zeros_like(part)) for part in values]
    if first:
        forget(plans=False)
    stream = owner.stream(default=default)
    with owner.on(stream):
        reserved = [part + part for part in (*arrays, *arrays)]  # asking for memory may wait
        owner.write(arrays[0], sources[0] * 0)
        del reserved
        synchronize()
        spin(owner.handle(stream))
        for array, source in zip(arrays, sources, strict=True):
            owner.write(array, source)
        results = qk(*arrays[:2], positions=arrays[2])
        assert not owner.done(stream), "the call waited for the GPU"
        doubled = [y + y for y in results]
    synchronize()
    for y, right_one in zip(doubled, expected, strict=True):
        np.testing.assert_array_equal(owner.host(y), 2 * right_one)


def test_threads_on_streams_of_their_own(owner, spin, slow, rng):
    qk = made(rng)
    given = [[values_of(rng) for _ in range(2)] for _ in range(4)]
    expected = [[on_gpu(owner, qk, values) for values in pair] for pair in given]

    def work(number):
        stream = owner.stream()
        with owner.on(stream):
            sources = [[owner.array(part) for part in values] for values in given[number]]
            arrays = [owner.array(np.zeros_like(part)) for part in given[number][0]]
            for n in range(40):
                spin(owner.handle(stream), cycles=300_000)
                for array, source in zip(arrays, sources[n % 2], strict=True):
                    owner.write(array, source)
                fresh = qk(*arrays[:2], positions=arrays[2])
                qk(*arrays[:2], positions=arrays[2], out=tuple(arrays[:2]))
                stream.synchronize()
                for results in (fresh, arrays[:2]):
                    for y, right_one in zip(results, expected[number][n % 2], strict=True):
                        np.testing.assert_array_equal(owner.host(y), right_one)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_unload_waits_for_work_in_flight(owner, spin, rng):
    qk, values = made(rng), values_of(rng)
    expected = on_gpu(owner, qk, values)
    arrays = [owner.array(part) for part in values]
    stream = owner.stream()
    synchronize()
    with owner.on(stream):
        spin(owner.handle(stream))
        results = qk(*arrays[:2], positions=arrays[2])
        qk.unload()
        assert owner.done(stream)
    for y, right_one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(owner.host(y), right_one)
