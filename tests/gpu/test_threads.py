"""Threads that call at once, and unload, on a GPU."""

import gc
import itertools
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import streams
from streams import (
    CUPY,
    DIM,
    OTHER_TOKENS,
    SHAPE,
    TOKENS,
    TORCH,
    Call,
    in_thread,
    normal,
    synchronize,
    zeros,
)
from tolerances import assert_alike

from cupy_headnorm import HeadNorm, reference
from cupy_headnorm._arrays import find
from cupy_headnorm._calls import dispatch, remembered
from cupy_headnorm._plans import head_norm
from cupy_headnorm.headnorm import inside

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)

# The fixtures of streams.py that these tests take.
library = streams.library
spin = streams.spin
taken = streams.taken
kind = streams.kind
result = streams.result
call = streams.call


def test_a_threads_first_work_may_be_a_norm(library, call, taken, rng):
    """A new thread has no CUDA context current, and no call to remember."""
    values = normal(rng)
    x, out = library.array(values), zeros(library)
    call.lead_to("remembered", taken)
    y = in_thread(call, x, out)
    assert taken == ["step by step"]
    synchronize()
    assert_alike(library.host(y), call.expected(values))


THREADS, ROUNDS = 4, 50


@pytest.fixture
def slow_launches(monkeypatch):
    """Let other threads run between a call's parameters and its launch."""
    launch = cupy.cuda.driver.launchKernel

    def slow(*arguments):
        time.sleep(1e-5)
        launch(*arguments)

    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", slow)


@pytest.mark.parametrize("kind", ["norm", "function"])
def test_threads_on_streams_of_their_own(kind, spin, slow_launches, taken, rng):
    """One norm and one layout for all: nothing but the threads keeps their parameters apart."""
    calls = {library: Call(library, kind, "in place", rng) for library in (TORCH, CUPY)}
    values = normal(rng, (2 * THREADS, 2, *SHAPE))
    together = threading.Barrier(2 * THREADS)

    def work(number):
        library = (TORCH, CUPY)[number % 2]
        norm = calls[library].norm
        stream = library.stream()
        with library.on(stream):
            sources = [library.array(part) for part in values[number]]
            right = [library.host(norm(source, out=None)) for source in sources]
            x = library.array(values[number][0])
            together.wait(20)
            for n in range(ROUNDS):
                spin(library.handle(stream), cycles=500_000)
                library.write(x, sources[n % 2])
                y = norm(x, out=None)
                norm(x, out=x)
                stream.synchronize()
                np.testing.assert_array_equal(library.host(y), right[n % 2])
                np.testing.assert_array_equal(library.host(x), right[n % 2])
        for part, bits in zip(values[number], right, strict=True):
            assert_alike(bits, calls[library].expected(part))

    with ThreadPoolExecutor(2 * THREADS) as pool:
        list(pool.map(work, range(2 * THREADS)))
    # In each thread the first of each result, and no more.
    assert taken.count("step by step") <= 2 * 2 * THREADS


def test_threads_leave_nothing_behind(library, taken):
    norms = [HeadNorm(np.ones(DIM, np.float32), eps=eps) for eps in (1e-6, 1e-5)]

    def work():
        for norm, tokens in itertools.product(norms, (TOKENS, OTHER_TOKENS, 5)):
            norm(norm(zeros(library, tokens)), out=zeros(library, tokens))
        return [weakref.ref(call.run) for call in remembered.thread.calls.values()]

    def sizes():
        return {
            (module.__name__, name): len(value)
            for module in (dispatch, find, head_norm)
            for name, value in vars(module).items()
            if isinstance(value, dict | list | set) and not name.startswith("__")
        }

    in_thread(work)
    before = sizes()
    left = [call for _ in range(20) for call in in_thread(work)]
    synchronize()
    gc.collect()
    assert sizes() == before
    assert len(left) >= 20 * 6
    assert not any(call() for call in left)


def test_unloading_under_calls_of_other_threads(rng):
    """Two norms: memory that was freed too early is soon the other's weight."""
    values = normal(rng)
    weights = rng.standard_normal((2, DIM)).astype(np.float32)
    norms = [HeadNorm(weight) for weight in weights]
    right = [reference.rms_norm(values, weight) for weight in weights]
    stop = threading.Event()

    def work(number):
        library, rounds = (TORCH, CUPY)[number % 2], 0
        with library.on(library.stream()):
            x = library.array(values)
            while not stop.is_set():
                for norm, expected in zip(norms, right, strict=True):
                    assert_alike(library.host(norm(x)), expected)
                    rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, number) for number in range(4)]
        try:
            for n in range(200):
                norms[n % 2].unload()
                time.sleep(1e-3)
        finally:
            stop.set()
        assert all(done.result() > 4 for done in working)
    for norm in norms:
        norm.unload()
        assert not inside(norm).devices
