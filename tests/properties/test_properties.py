"""
Any call is equal to the oracle, or refused with nothing written.

strategies.py says where calls come from, properties.py what must hold for each. On a GPU the
kernels of the keys are compiled beforehand, and none while calls are drawn.
"""

import collections
import os
import re
from concurrent.futures import ThreadPoolExecutor

import host
import numpy as np
import pytest
import qk_cases
from drawn_kernels import (
    KEYS,
    calls_of,
    dense,
    kernel_of,
    kernels,
    keys_built_for_the_host,
    rows_of,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from memories import ON_GPU, Kernels, Numpy, TorchOnHost, name_of
from norm_strategies import drawn_norm_case
from properties import holds_for_norm, holds_for_qk
from qk_strategies import drawn_qk_case, qk_norm

from cupy_headnorm._calls import dispatch
from cupy_headnorm._cuda import compiler as cuda_compiler
from cupy_headnorm._cuda import source
from cupy_headnorm._plans import head_norm, qk_norm_rope
from cupy_headnorm._rules import norm as norm_rules
from cupy_headnorm._rules import parts
from cupy_headnorm.headnorm import inside

CASES = 250
"""Drawn for each library and each of the two kernels."""
SHARES = 7
"""Of the cases on a GPU, each a test of its own: two for each of 14 workers."""


def test_drawn_calls_need_few_kernels():
    assert 100 < len(kernels()) <= 200


@pytest.fixture(scope="session")
def compiled_beforehand():
    """Compile and load the kernels of all keys."""
    import cupy

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
    # They share a cache on disk: each worker begins with kernels that no other begins with.
    todo = collections.deque(kernels())
    todo.rotate(-len(todo) * worker // workers)

    def into_cache(kernel):
        file, options = kernel
        cupy.cuda.Device(0).use()  # a new thread has no context yet
        name = next(o.partition("=")[2] for o in options if o.startswith("-DHN_NAME="))
        return cupy.RawKernel(source.pasted(file), name, options=options).kernel

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // workers)) as pool:
        list(pool.map(into_cache, todo))
    for file, module in (("head_norm.cu", head_norm), ("qk_norm_rope.cu", qk_norm_rope)):
        for key in KEYS[file]:
            for call in calls_of(key):
                module.prepare(call, 0, 0)


@pytest.fixture
def only_these_kernels(kernel, monkeypatch):
    """Fail where a call needs a kernel that is not among those of the keys."""

    def refuse(file, options, *_):
        raise AssertionError(f"{file} would be compiled with {options}, which no key has")

    monkeypatch.setattr(cuda_compiler, "compiled", refuse)
    # On the host nothing is compiled: look at what would be.
    allowed = frozenset(kernels())

    def looking(describe):
        def described(*arguments):
            call = describe(*arguments)
            if not rows_of(call):
                return call
            try:
                needed = kernel_of(call)
            except ValueError:  # no kernel serves it
                return call
            if needed not in allowed:
                refuse(*needed)
            return call

        return described

    monkeypatch.setattr(dispatch, "plans", {})
    module = norm_rules if kernel == "head_norm" else parts
    monkeypatch.setattr(module, "describe", looking(module.describe))


# The runs.
PROPERTIES = {
    "head_norm": (drawn_norm_case, holds_for_norm),
    "qk_norm_rope": (drawn_qk_case, holds_for_qk),
}


def run(memory, kernel, count, start, record_property, keys=None):
    """Let a kernel's property hold for `count` drawn calls, the same ones for each `start`."""
    drawn, holds_for = PROPERTIES[kernel]
    counted = collections.Counter()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn(memory.backend, keys or KEYS[f"{kernel}.cu"]))
    def holds(case):
        holds_for(memory, case)
        counted["cases"] += 1
        counted["refused"] += bool(case.fault)

    try:
        holds()
    finally:
        record_property("cases", counted["cases"])
    assert counted["cases"] >= count
    assert counted["refused"] or count < CASES


# What was found, each shrunk.
def test_the_stride_of_a_single_head_says_nothing():
    """
    k of one head, ``buffer[:, :128][:, np.newaxis]``, has a stride of 0; its new result of 2 bytes.

    That was taken for the alignment of rows, and the kernel for single elements ran.
    """
    case = qk_cases.DEFAULT._replace(by=None, weight="own x", v=True)
    qk, _ = qk_norm(case, np.random.default_rng(0), (2, 1), (1e-5, 1e-5))
    norms = {name: inside(norm).part for name, norm in qk.norms.items()}
    q, k = (dense((3, n, 128), case.dtype, 16) for n in (2, 1))
    x = {"q": q, "k": k._replace(strides=(256, 0, 2)), "v": k._replace(strides=(256, 0, 2))}
    out = {"q": q, "k": k._replace(strides=(256, 2, 2)), "v": k._replace(strides=(256, 2, 2))}
    found = parts.describe(norms, x, out, None, -2)
    assert found.alignment == 16
    assert qk_norm_rope.plan(found).access == 8


@pytest.mark.parametrize("memory", [Numpy, TorchOnHost], ids=name_of)
@pytest.mark.parametrize("kernel", PROPERTIES)
def test_any_call_on_the_host(memory, kernel, only_these_kernels, one_thread, record_property):
    run(memory(), kernel, CASES, 0, record_property)


@pytest.mark.parametrize("kernel", PROPERTIES)
def test_any_call_of_the_kernels_on_the_host(kernel, compiler, record_property):
    keys = keys_built_for_the_host(f"{kernel}.cu")
    assert len(keys) > 5
    with host.device():
        run(Kernels(), kernel, CASES, 0, record_property, keys)


@pytest.mark.gpu
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("memory", ON_GPU, ids=name_of)
@pytest.mark.parametrize("kernel", PROPERTIES)
def test_any_call_on_a_gpu(
    memory, kernel, share, compiled_beforehand, only_these_kernels, record_property, request
):
    tests = SHARES * len(ON_GPU) * len(PROPERTIES)
    cases = int(request.config.getoption("--cases") or tests * CASES)
    run(memory(), kernel, -(-cases // tests), share, record_property)
