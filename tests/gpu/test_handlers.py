"""
Signals' handlers and finalizers that call a norm, or unload one, in the middle of another call.

Python runs them between any two steps of a thread. Host memory stands in for a GPU's, as
stand_in.py says; tests/gpu/test_processes.py has one on a GPU.
"""

import contextlib
import gc
import itertools
import signal
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import qk_stand_in
import stand_in
from processes import run
from qk_cases import MAX_POSITION, D
from stand_in import expected, tensor

from cupy_headnorm import HeadNorm, reference
from cupy_headnorm._arrays import libraries
from cupy_headnorm._calls import (
    dispatch,
    host,
    remembered,
    uploads,
)
from cupy_headnorm._calls import (
    parameters as norm_parameters,
)
from cupy_headnorm._calls import (
    tables as rope_tables,
)
from cupy_headnorm._cuda import compiler, environment, launcher, once
from cupy_headnorm._plans import head_norm
from cupy_headnorm.headnorm import inside

torch = pytest.importorskip("torch")
slow = stand_in.slow


@pytest.fixture(autouse=True)
def limit():
    """Let what waits for ever fail."""

    def give_up(*_):
        raise TimeoutError("a call waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Victim:
    """What a finalizer can be called for."""


class Struck:
    """The first `strike` runs `work` as Python would: in a handler, or in a finalizer."""

    def __init__(self, how):
        self.how, self.work, self.results = how, None, []

    def strike(self):
        if self.work is None:
            return
        work, self.work = self.work, None
        if self.how == "signal":
            before = signal.signal(signal.SIGUSR1, lambda *_: self.results.append(work()))
            signal.raise_signal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, before)
        else:
            victim = Victim()
            weakref.finalize(victim, lambda: self.results.append(work()))
            del victim


@pytest.fixture(params=["signal", "finalizer"])
def struck(request):
    return Struck(request.param)


@pytest.fixture
def compiled(slow, monkeypatch):
    """Let kernels be compiled, and list those that were launched; `compiled.during` runs then."""
    found = SimpleNamespace(during=lambda: None, count=0, launched=[])
    launch_of, runners_of = head_norm.prepare, launcher.runners

    def compile_one(call):
        found.count += 1
        found.during()
        return launch_of(call)

    def runners(launch, sources):
        run_of = runners_of(launch, sources)

        def listed(launch):
            found.launched.append(launch)
            return run_of(launch)

        return listed

    monkeypatch.setattr(compiler, "_functions", {})
    monkeypatch.setattr(
        head_norm,
        "prepare",
        lambda call, *_: compiler.loaded((call,), 0, lambda: compile_one(call)),
    )
    monkeypatch.setattr(launcher, "runners", runners)
    return found


@pytest.fixture
def uploaded(slow, monkeypatch):
    """List weak references to what was uploaded; `uploaded.during` runs while it is."""
    found = SimpleNamespace(during=lambda: None, alive=lambda: [r for r in refs if r() is not None])
    refs, upload = [], uploads.upload

    def listing(array, index):
        view = upload(array, index)
        refs.append(weakref.ref(view.owner))
        found.during()
        return view

    monkeypatch.setattr(uploads, "upload", listing)
    return found


@pytest.mark.parametrize("shape", [(5, 4, 64), (5, 3, 64)], ids=["the same kernel", "another"])
def test_a_call_while_a_kernel_is_compiled(shape, compiled, struck, rng):
    weight = tensor(rng, 64)
    norm, x, inner = HeadNorm(weight), tensor(rng, 5, 4, 64), tensor(rng, *shape)
    compiled.during, struck.work = struck.strike, lambda: norm(inner)
    np.testing.assert_array_equal(norm(x), expected(x, weight))
    np.testing.assert_array_equal(struck.results, [expected(inner, weight)])
    kept = compiler._functions.values()
    assert compiled.count == 2
    assert len(kept) == (1 if x.shape == inner.shape else 2)
    # A kernel that is not kept is unloaded under whoever launches it.
    assert all(any(launch is one for one in kept) for launch in compiled.launched)


def test_a_call_while_its_weight_is_uploaded(uploaded, struck, rng):
    weight = tensor(rng, 64)
    norm, x, inner = HeadNorm(weight), tensor(rng, 5, 4, 64), tensor(rng, 5, 4, 64)
    uploaded.during, struck.work = struck.strike, lambda: norm(inner)
    np.testing.assert_array_equal(norm(x), expected(x, weight))
    np.testing.assert_array_equal(struck.results, [expected(inner, weight)])
    (kept,) = inside(norm)._held.on_device.values()
    assert inside(norm).ready[0].views[0] is kept[0]
    assert len(uploaded.alive()) == 1, "of two copies one is let go"


@pytest.mark.parametrize("first", ["call", "load"])
def test_unloading_while_the_weight_is_uploaded(first, uploaded, struck, rng):
    weight, x = tensor(rng, 64), tensor(rng, 5, 4, 64)
    norm = HeadNorm(weight)
    uploaded.during, struck.work = struck.strike, norm.unload
    if first == "call":
        np.testing.assert_array_equal(norm(x), expected(x, weight))
    else:
        norm.load(0)
    assert struck.results == [None]
    assert not inside(norm).devices
    assert not inside(norm).ready
    assert not uploaded.alive()
    np.testing.assert_array_equal(norm(x), expected(x, weight))
    assert len(uploaded.alive()) == 1


def test_unloading_between_an_upload_and_its_use(uploaded, struck, monkeypatch, rng):
    weight, x = tensor(rng, 64), tensor(rng, 5, 4, 64)
    norm, parameters = HeadNorm(weight), norm_parameters._bound

    def later(*arguments):
        struck.strike()
        return parameters(*arguments)

    monkeypatch.setattr(norm_parameters, "_bound", later)
    struck.work = norm.unload
    np.testing.assert_array_equal(norm(x), expected(x, weight))
    assert struck.results == [None]
    assert not inside(norm).devices
    assert not inside(norm).ready
    assert not uploaded.alive()


@pytest.fixture
def qk_device(monkeypatch):
    stand_in.take_for_gpu(monkeypatch, stand_in.torch_adapter(), torch.Tensor, torch.nn.Parameter)
    qk_stand_in.take_for_kernel(monkeypatch)
    stand_in.forget_calls(monkeypatch)


def qk_call(rng):
    """Return a QKNorm whose weights are loaded, a call of it, and the right result."""
    qk = qk_stand_in.made(rng)
    qk.load(0)
    parts = [tensor(rng, 5, n, D) for n in (3, 2)]
    at = torch.from_numpy(rng.integers(0, MAX_POSITION, 5))
    right = qk(*(part.numpy() for part in parts), positions=at.numpy())
    return qk, lambda: qk(*parts, positions=at), right


def assert_same(found, right):
    for y, values in zip(found, right, strict=True):
        np.testing.assert_allclose(y.numpy(), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("work", ["call", "unload"])
@pytest.mark.parametrize("when", ["made", "remembered"])
def test_while_tables(when, work, qk_device, struck, monkeypatch, rng):
    qk, call, right = qk_call(rng)
    tables, made_once, saw = qk._tables, once.made_once, rope_tables.Tables.saw

    def making(kept, key, make):
        def interrupted():
            struck.strike()
            return make()

        return made_once(kept, key, interrupted)

    def seeing(*arguments):
        struck.strike()
        saw(*arguments)

    if when == "made":
        monkeypatch.setattr(rope_tables, "made_once", making)
    else:
        monkeypatch.setattr(rope_tables.Tables, "saw", seeing)
    struck.work = call if work == "call" else qk.unload
    assert_same(call(), right)
    if work == "call":
        assert_same(struck.results[0], right)
        ((_, ready),) = tables.ready.items()
        ((_, seen),) = tables.seen.items()
        assert seen[0] is ready[0]
    else:
        assert struck.results == [None]
        assert tables.ready == tables.seen == {}
    assert_same(call(), right)


def at_each_step(begin, most=5000):
    """
    Interrupt a call before each line of Python that it runs, once more for every line.

    `begin` returns the call, what interrupts it, and what checks both afterwards.
    """
    before = sys.gettrace()
    for wanted in range(most):
        call, interrupt, check = begin()
        lines = itertools.count()

        def trace(frame, event, _, interrupt=interrupt, lines=lines, wanted=wanted):
            if event == "line" and next(lines) == wanted:
                interrupt()
            return trace

        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
        if next(lines) <= wanted:
            return wanted
        check()
    raise AssertionError("a call of more lines than that")


@pytest.mark.parametrize("work", ["call", "unload", "load"])
def test_at_each_step_of_a_call(work, compiled, uploaded, monkeypatch, rng):
    weight, x = tensor(rng, 64), tensor(rng, 3, 2, 64)
    right = expected(x, weight)

    def begin():
        stand_in.forget_calls(monkeypatch)
        compiler._functions.clear()
        norm, results = HeadNorm(weight), []

        def call():
            results.append(norm(x))

        def check():
            for y in results:
                np.testing.assert_array_equal(y, right)
            assert len(results) == (2 if work == "call" else 1)
            held, ready = inside(norm)._held.on_device, inside(norm).ready
            assert len(held) <= 1
            for index, parameters in ready.items():
                assert parameters.views[0] is held[index][0]
            np.testing.assert_array_equal(norm(x), right)
            norm.unload()
            assert not inside(norm).devices
            assert not inside(norm).ready

        interrupt = {"call": call, "unload": norm.unload, "load": lambda: norm.load(0)}[work]
        return call, interrupt, check

    assert at_each_step(begin) > 100
    gc.collect()
    assert not uploaded.alive()


@pytest.mark.parametrize("in_place", [False, True])
def test_at_each_step_of_a_call_in_several_threads(in_place, monkeypatch, rng):
    values = rng.standard_normal((64, 4, 64)).astype(np.float32)
    right = reference.rms_norm(values)
    monkeypatch.setattr(host, "_CHUNK_BYTES", 16384)
    monkeypatch.setattr(host, "_THREAD_CHUNKS", 1)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: range(4))

    def begin():
        xs, results = iter([values.copy(), values.copy()]), []

        def call():
            x = next(xs)
            results.append(reference.rms_norm(x, out=x if in_place else None))

        def check():
            assert len(results) == 2
            for y in results:
                np.testing.assert_array_equal(y, right)

        return call, call, check

    assert at_each_step(begin) > 100


def test_two_threads_whose_finalizers_want_what_the_other_makes(compiled, uploaded, rng):
    weight, x = tensor(rng, 64), [tensor(rng, n, 2, 64) for n in range(3, 7)]
    first, second = HeadNorm(), HeadNorm(weight)
    compiling, uploading, results = threading.Event(), threading.Event(), {}

    def during_compile():
        compiled.during = lambda: None
        compiling.set()
        uploading.wait(1)  # which one lock forbids
        results["in first"] = second(x[2])

    def during_upload():
        uploaded.during = lambda: None
        uploading.set()
        results["in second"] = first(x[3])

    def work_first():
        results["first"] = first(x[0])

    def work_second():
        compiling.wait(20)
        results["second"] = second(x[1])

    compiled.during, uploaded.during = during_compile, during_upload
    threads = [threading.Thread(target=work, daemon=True) for work in (work_first, work_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "they wait for each other"
    np.testing.assert_array_equal(results["first"], expected(x[0]))
    np.testing.assert_array_equal(results["second"], expected(x[1], weight))
    np.testing.assert_array_equal(results["in first"], expected(x[2], weight))


def test_calls_from_finalizers_of_forgotten_calls(slow, monkeypatch, rng):
    """A cache that starts over lets calls go, whose finalizers call and are remembered."""
    norm, runners, results = HeadNorm(), launcher.runners, []
    more = [tensor(rng, 2, heads, 64) for heads in range(20, 30)]

    def call_another():
        if more:
            x = more.pop()
            results.append((norm(x), x))

    def watched(launch, sources):
        run_of = runners(launch, sources)

        def watching(launch):
            found = run_of(launch)
            weakref.finalize(found, call_another).atexit = False
            return found

        return watching

    monkeypatch.setattr(launcher, "runners", watched)
    monkeypatch.setattr(remembered, "MAX_CALLS", 2)
    for heads in range(1, 15):
        x = tensor(rng, 2, heads, 64)
        results.append((norm(x), x))
    assert not more
    for y, x in results:
        np.testing.assert_array_equal(y, expected(x))
    assert max(map(len, (dispatch.plans, remembered.thread.calls))) <= 3


class Events:
    """Stands in for CuPy where events are asked for; `during` runs when one is looked at."""

    def __init__(self):
        self.made, self.during, events = [], lambda: None, self

        class Event:
            def __init__(self, disable_timing):
                self.ptr, self.passed = 0, False
                events.made.append(self)

            @property
            def done(self):
                events.during()
                return self.passed

        self.cuda = SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(),
            Event=Event,
            runtime=SimpleNamespace(eventRecord=lambda *_: None),
        )


@pytest.mark.parametrize("when", ["looked at", "let go"])
def test_launches_while_earlier_ones_are(when, struck, monkeypatch):
    """What a producer's memory is kept by until its kernel has run."""
    events, library = Events(), libraries.DLPack()
    monkeypatch.setattr(environment, "import_cupy", lambda: events)
    owners = [Victim() for _ in range(5)]
    alive = [weakref.ref(owner) for owner in owners]

    def launch():
        library.launched((owners.pop(0),), 0, 0)

    launch()
    launch()
    events.made[0].passed = True
    struck.work = launch
    if when == "looked at":
        events.during = struck.strike
    else:
        weakref.finalize(alive[0](), struck.strike)
    launch()
    assert struck.results == [None]
    assert [ref() is not None for ref in alive] == [False, True, True, True, True]
    assert len(library._in_flight) == 3
    for event in events.made:
        event.passed = True
    launch()
    assert [ref() is not None for ref in alive] == [False] * 4 + [True]


FORK = """
import os, signal, threading, warnings
from cupy_headnorm._cuda.once import made_once

warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads, which is the point
making, made, kept = threading.Event(), threading.Event(), {}

def make():
    making.set()
    made.wait(20)
    return "of the parent"

thread = threading.Thread(target=made_once, args=(kept, "kernel", make))
thread.start()
making.wait(20)
child = os.fork()
if not child:
    signal.alarm(10)  # ends it if it waits for a thread that it does not have
    print(made_once(kept, "kernel", lambda: "of the child"), flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
made.set()
thread.join()
print(kept["kernel"])
"""


def test_a_fork_while_another_thread_makes_something():
    assert run(FORK) == ["of the child", "0", "of the parent"]


def test_one_thread_makes_while_others_wait():
    kept, started, go = {}, threading.Event(), threading.Event()

    def make():
        assert not started.is_set(), "a second one makes it too"
        started.set()
        assert go.wait(20)
        return object()

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(once.made_once, kept, "kernel", make) for _ in range(4)]
        assert started.wait(20)
        go.set()
        assert {id(one.result(20)) for one in asked} == {id(kept["kernel"])}
