"""
Faults around a call that need no GPU: forks, workers, interrupts, memory, and sanitize.py itself.

Compilers that fail stand in for NVRTC. tests/gpu/test_endurance.py and tests/gpu/test_processes.py
have the same with a GPU, and what takes one.
"""

import _thread
import contextlib
import fnmatch
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import sanitize
from processes import run
from sanitize import SELECTED, TOOLS, Run

from cupy_headnorm import GPUUnavailableError, HeadNorm, QKNorm, Rope, reference, rms_norm
from cupy_headnorm._arrays import dtypes
from cupy_headnorm._calls import host
from cupy_headnorm._cuda import compiler as cuda_compiler
from cupy_headnorm._cuda import environment, once
from cupy_headnorm._cuda.compiler import DeviceLimits
from cupy_headnorm._plans import head_norm
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec

D = 64


FORK = """
import os, signal, threading, warnings
import numpy as np
from cupy_headnorm import HeadNorm, QKNorm, Rope

warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads, which is the point
norm = HeadNorm(np.ones(64, np.float32))
qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, 64, max_position=16))
x = np.sin(np.arange(2**22, dtype=np.float32)).reshape(-1, 2, 64)  # shared by several threads
q, k, positions = x[:9], x[:9, :1], np.arange(9)

def calls():
    return [norm(x), norm(q), *qk(q, k, positions=positions)]

right, stop = calls(), threading.Event()

def work():
    while not stop.is_set():
        calls()

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(5):
    child = os.fork()
    if not child:
        signal.alarm(20)  # ends it if it waits for a thread that it does not have
        same = all(map(np.array_equal, calls(), right))
        os._exit(0 if same else 1)
    print(os.waitpid(child, 0)[1])
stop.set()
for thread in threads:
    thread.join()
print(all(map(np.array_equal, calls(), right)))
"""


def test_forks_beside_threads_that_call():
    assert run(FORK) == ["0"] * 5 + ["True"]


FORK_AFTER_CUDA = """
import os, sys, types
import numpy as np
from cupy_headnorm import GPUUnavailableError, HeadNorm
from cupy_headnorm._arrays import find
from cupy_headnorm._cuda import environment

parent, survives = os.getpid(), False

def device():
    if os.getpid() != parent and not survives:
        raise RuntimeError("cudaErrorInitializationError: initialization error")

sys.modules["cupy"] = cupy = types.ModuleType("cupy")
runtime = types.SimpleNamespace(getDeviceCount=lambda: 1, getDevice=device)
cupy.cuda = types.SimpleNamespace(runtime=runtime)
seen = dict.fromkeys((int, str), "library")
find.quick.update(seen)

def told():
    try:
        return f"{environment.import_cupy() is cupy}, {find.quick == seen}"
    except GPUUnavailableError as error:
        return f"{error}, {find.quick}"

for survives in (False, True):
    child = os.fork()
    if not child:
        sum_of_four = HeadNorm()(np.ones((1, 1, 4))).sum()
        print(len(find.quick), told(), told(), round(sum_of_four), sep="|")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
print(told())
"""


def test_cuda_is_looked_at_after_a_fork():
    """Where it was used before, calls are refused; else remembered ones are there again."""
    lost, survived, in_parent = run(FORK_AFTER_CUDA)
    empty, *refused, result = lost.split("|")
    assert (empty, result) == ("0", "4")
    for told in refused:
        assert told == (
            "CUDA was used before this process was forked, and does not work in it "
            "(cudaErrorInitializationError: initialization error); needs: multiprocessing's start "
            "method spawn or forkserver, {}"
        )
    assert survived.split("|")[:3] == ["0", "True, True", "True, True"]
    assert in_parent == "True, True"


ONE_LIBRARY_AFTER_A_FORK = """
import os, torch
from cupy_headnorm._arrays import find
from cupy_headnorm._cuda import environment
from cupy_headnorm.ops import rms_norm

x, weight = torch.ones(3, 2, 8), torch.nn.Parameter(torch.ones(8), requires_grad=False)
for first in x, weight:
    child = os.fork()
    if not child:
        rms_norm(first)
        environment._forked()
        print(rms_norm(x, weight).shape == x.shape, find.quick, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_after_a_fork_a_library_is_the_same_one():
    """A tensor and a parameter, of which one kind was met before the fork."""
    pytest.importorskip("torch")
    assert run(ONE_LIBRARY_AFTER_A_FORK) == ["True {}", "True {}"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers(method, rng):
    norm = HeadNorm(rng.standard_normal(D).astype(np.float32))
    qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, D, max_position=16))
    call = partial(qk, positions=np.arange(5))
    parts = [rng.standard_normal((5, n, D)).astype(np.float16) for n in (2, 1, 2, 1)]
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        of_norm = list(pool.map(norm, parts))
        of_qk = list(pool.map(call, parts[::2], parts[1::2]))
    for found, x in zip(of_norm, parts, strict=True):
        np.testing.assert_array_equal(found, norm(x))
    for found, q, k in zip(of_qk, parts[::2], parts[1::2], strict=True):
        for y, expected in zip(found, call(q, k), strict=True):
            np.testing.assert_array_equal(y, expected)


class Compiler:
    """Stands in for CuPy: its next compilations do what `outcomes` say."""

    def __init__(self, monkeypatch, outcomes):
        self.outcomes, self.compiled, self.launched = list(outcomes), [], []
        stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(),
            Stream=lambda non_blocking: stream,
            driver=SimpleNamespace(launchKernel=lambda *a: self.launched.append(a)),
        )
        monkeypatch.setattr(environment, "import_cupy", lambda: self)
        monkeypatch.setattr(cuda_compiler, "_functions", {})
        monkeypatch.setattr(cuda_compiler, "_limits", {0: DeviceLimits()})
        found = environment.Environment("", "", "14.2.0", "13.0", "CUDA 13.0", ("a GPU",), "/cache")
        monkeypatch.setattr(environment, "environment", lambda: found)

    def RawKernel(self, source, name, options):
        compiler = self

        class Kernel:
            @property
            def kernel(self):
                compiler.compiled.append(name)
                outcome = compiler.outcomes.pop(0) if compiler.outcomes else None
                if outcome is not None:
                    raise outcome
                return SimpleNamespace(ptr=len(compiler.compiled))

        return Kernel()


def prepare(head_dim=D):
    spec = NormSpec("rms", dtypes.FLOAT32, None, None, head_dim, "once", False)
    axes = (RowAxis(5, 4 * head_dim, 4 * head_dim, 0, 0),)
    return head_norm.prepare(NormCall(spec, axes, 5, 1e-6, 0.0, (16, 16, 16, 16)), 0, 0)


@pytest.mark.parametrize(
    ("outcome", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (MemoryError(), MemoryError, None),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"), RuntimeError, "CUDA_ERROR_OUT_OF_MEMORY"),
        (PermissionError(13, "no", "/cache/x"), GPUUnavailableError, "cache /cache cannot be wri"),
        (OSError(28, "no space left", "/cache/x"), GPUUnavailableError, "cache /cache cannot be"),
        (IsADirectoryError(21, "is", "/cache/x"), GPUUnavailableError, "cache /cache cannot be w"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, BaseException) else "",
)
def test_a_compile_that_failed_is_tried_again(outcome, raised, message, monkeypatch):
    compiler = Compiler(monkeypatch, [outcome, outcome])
    for _ in range(2):
        with pytest.raises(raised, match=message):
            prepare()
        assert cuda_compiler._functions == {}
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(once._making.acquire, blocking=False).result()
            pool.submit(once._making.release).result()
    launch = prepare()
    assert launch.function == 3, "the third compilation's"
    assert prepare().function == launch.function
    assert len(compiler.compiled) == 3
    assert len(compiler.launched) == 1, "over no rows, when it was loaded"


def test_an_interrupt_while_a_kernel_is_loaded(monkeypatch):
    """After its compilation, in the launch over no rows."""
    compiler = Compiler(monkeypatch, [])
    interrupts = [KeyboardInterrupt]

    def launch(*arguments):
        if interrupts:
            raise interrupts.pop()

    compiler.cuda.driver.launchKernel = launch
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert cuda_compiler._functions == {}
    assert prepare().function == 2


def test_who_waits_for_a_compile_that_is_interrupted_compiles():
    """Two threads want one kernel; the first one's compile is interrupted while the other waits."""
    compiling, waited = threading.Event(), threading.Event()
    key = (object(),)

    def interrupted():
        compiling.set()
        assert waited.wait(20)
        raise KeyboardInterrupt

    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(cuda_compiler.loaded, key, 0, interrupted)
            assert compiling.wait(20)
            second = pool.submit(cuda_compiler.loaded, key, 0, lambda: "kernel")
            with pytest.raises(TimeoutError):
                second.result(0.05)
            waited.set()
            assert second.result(20) == "kernel"
            assert isinstance(first.exception(20), KeyboardInterrupt)
    finally:
        cuda_compiler._functions.pop(key, None)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_out_of_memory_for_the_result_is_the_librarys_error(library, rng):
    values = rng.standard_normal((1, 4, D)).astype(np.float32)
    norm = HeadNorm(rng.standard_normal(D).astype(np.float32))
    tokens = 2**41  # 2 PiB of results: more than there are addresses for
    if library == "numpy":
        x, error = np.broadcast_to(values, (tokens, 4, D)), MemoryError
        ours = values
    else:
        torch = pytest.importorskip("torch")
        ours = torch.from_numpy(values)
        x, error = ours.expand(tokens, -1, -1), RuntimeError
    for call in (norm, rms_norm, lambda x: QKNorm(norm, norm)(x[:, :1], x[:, 1:])):
        with pytest.raises(error, match="(?i)allocate|memory"):
            call(x)
    np.testing.assert_array_equal(np.asarray(norm(ours)), norm(values))


AT_THE_END = """
import atexit, os, sys, threading, time
import numpy as np
from cupy_headnorm import HeadNorm, QKNorm
from cupy_headnorm._calls import host

host.os.sched_getaffinity = lambda _: range(4)
x = np.sin(np.arange(2**22, dtype=np.float32)).reshape(-1, 2, 64)  # for two threads
norm = HeadNorm(np.ones(64, np.float32))
right = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 1e-6)

def calls():
    here = x.copy()
    for y in norm(x), norm(here, out=here), *QKNorm(norm, norm)(x, x):
        print(np.abs(y - right).max() < 1e-5, flush=True)

def later():
    threading.main_thread().join()
    calls()

{}
"""
ENDS = {
    "atexit": "atexit.register(calls)",
    "atexit, after calls": "calls()\natexit.register(calls)",
    "after the main thread": "threading.Thread(target=later).start()",
    "after the main thread, after calls": "calls()\nthreading.Thread(target=later).start()",
}


@pytest.mark.parametrize("end", ENDS)
def test_large_calls_at_the_end_of_a_process(end):
    """When Python starts no more threads, or none through an executor."""
    assert run(AT_THE_END.format(ENDS[end])) == ["True"] * (8 if "after calls" in end else 4)


@pytest.fixture
def in_threads(monkeypatch):
    """Let calls of 64 rows and more take four threads."""
    monkeypatch.setattr(host, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(host, "_THREAD_CHUNKS", 1)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: range(4))


@pytest.mark.parametrize("started", range(4))
def test_where_no_more_threads_start(started, in_threads, monkeypatch, rng):
    x = rng.standard_normal((640, D)).astype(np.float32)
    start, tried = _thread.start_new_thread, []

    def limited(*arguments):
        tried.append(arguments)
        if len(tried) > started:
            raise RuntimeError("can't start new thread")
        return start(*arguments)

    monkeypatch.setattr(_thread, "start_new_thread", limited)
    y = reference.rms_norm(x, num_heads=1)
    assert len(tried) == min(started + 1, 3)
    with monkeypatch.context() as patch:
        patch.setattr(host, "_MAX_THREADS", 1)
        np.testing.assert_array_equal(y, reference.rms_norm(x, num_heads=1))


@pytest.mark.parametrize("fails", ["here", "beside"])
def test_who_fails_is_heard_when_all_have_ended(fails, in_threads, monkeypatch, rng):
    """An interrupt of the thread that called, or no memory in another: nobody writes later."""
    x = rng.standard_normal((640, D)).astype(np.float32)
    normalize, caller, working = host._normalize, threading.get_ident(), []
    error = KeyboardInterrupt if fails == "here" else MemoryError
    both = threading.Barrier(2)

    def failing(*arguments):
        here = threading.get_ident()
        first = here not in working
        working.append(here)
        if first and len(set(working)) <= 2:
            both.wait(20)
        if (here == caller) == (fails == "here"):
            raise error
        time.sleep(0.05)
        normalize(*arguments)

    monkeypatch.setattr(host, "_MAX_THREADS", 2)
    monkeypatch.setattr(host, "_normalize", failing)
    with pytest.raises(error):
        reference.rms_norm(x, num_heads=1, out=x)
    done, values = len(working), x.copy()
    assert done <= 4, "the others go on"
    time.sleep(0.3)
    assert len(working) == done
    np.testing.assert_array_equal(x, values)


# sanitize.py: what would make its silence mean nothing.
def test_what_is_selected_is_there(request):
    """In a run of the whole suite."""
    by_test = {}
    for item in request.session.items:
        test, _, parameters = item.nodeid.rpartition("/")[2].partition("[")
        by_test.setdefault(test, []).append(parameters.removesuffix("]"))
    if not SELECTED.keys() <= by_test.keys():
        pytest.skip("needs all files")
    count = 0
    for test, patterns in SELECTED.items():
        found = [[p for p in by_test[test] if re.fullmatch(one, p)] for one in patterns]
        assert all(found), f"an expression for {test} fits none"
        count += len(set().union(*found))
    assert count <= sanitize.MAX_TESTS
    selected = [item for item in request.session.items if sanitize.is_selected(item.nodeid)]
    assert len(selected) == count
    assert all(item.get_closest_marker("gpu") for item in selected)
    for tool in TOOLS.values():
        for test in tool.tests:
            assert sanitize.is_selected(test)
            assert test in {item.nodeid for item in selected}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_planted_fault_is_planted(tool, tmp_path):
    root = sanitize.plant(tool, tmp_path)
    file = TOOLS[tool].file
    planted, text = ((base / "kernels" / file).read_text() for base in (root, sanitize.ROOT))
    assert planted != text
    assert planted.replace(TOOLS[tool].wrong, TOOLS[tool].right) == text


def test_a_copy_of_the_checkout_runs_its_own_kernels(tmp_path):
    root = sanitize.plant("memcheck", tmp_path)
    asked = "from cupy_headnorm._cuda import source; print(source.kernels_folder())"
    done = subprocess.run([sys.executable, "-c", asked], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == str(root.resolve() / "kernels")


RIGHT = {
    "passed": ["a", "b"],
    "failed": [],
    "skipped": [],
    "launches": {"head_norm_rms_f32_d64": 3, "qk_norm_rms_f32_d64": 2},
    "kernels": str(sanitize.ROOT / "kernels"),
}
CLEAN = Run("memcheck", ("a", "b"), 1.0, 0, "2 passed\n========= ERROR SUMMARY: 0 errors\n", RIGHT)
RACES = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)\n"
SPOILT = {
    "findings": ({"output": "========= ERROR SUMMARY: 2 errors\n"}, "2 findings"),
    "a warning": ({"output": RACES.format(1, 0, 1)}, "1 findings"),
    "no summary": ({"output": "2 passed\n"}, "no summary of the tool"),
    "a crash": ({"report": None, "code": 139}, "pytest did not end"),
    "a failed test": (
        {"report": RIGHT | {"passed": ["a"], "failed": ["b"]}, "code": 1},
        "failed: b",
    ),
    "a skipped test": ({"report": RIGHT | {"passed": ["a"], "skipped": ["b"]}}, "skipped: b"),
    "a lost test": ({"report": RIGHT | {"passed": ["a"]}}, "1 tests did not run"),
    "no launch": ({"report": RIGHT | {"launches": {}}}, "no kernel of ours was launched"),
    "another name": ({"report": RIGHT | {"launches": {"norm": 1}}}, "not checked, by its name: no"),
    "other kernels": ({"report": RIGHT | {"kernels": "/a/kernels"}}, "ran the kernels of /a/kern"),
    "an exit code": ({"code": 86}, "exit code 86"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_no_spoilt_run_counts_as_clean(name):
    changes, message = SPOILT[name]
    assert sanitize.problems(CLEAN) == []
    assert sanitize.problems(CLEAN._replace(output=RACES.format(0, 0, 0))) == []
    told = sanitize.problems(CLEAN._replace(**changes))
    assert fnmatch.filter(told, f"{message}*"), told
