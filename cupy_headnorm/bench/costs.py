"""What a norm costs beside device time: host time a call, first calls, imports, memory."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupy_headnorm import reference
from cupy_headnorm._cuda.environment import import_cupy
from cupy_headnorm._rules.options import DEFAULT_EPS
from cupy_headnorm.bench import clocks, providers, workloads
from cupy_headnorm.bench.clocks import Timer
from cupy_headnorm.bench.record import HostTime
from cupy_headnorm.bench.workloads import HOST_CASE, QK_CASE, Case, Workload
from cupy_headnorm.headnorm import HeadNorm

LAUNCH = "cuLaunchKernel alone, three pointers"
FUNCTION = "CuPy Function(...), three pointers"
TORCH_IN_PLACE, TORCH_NEW = "ours, in place on torch", "ours, new result on torch"
CUPY_IN_PLACE, CUPY_NEW = "ours, in place on CuPy", "ours, new result on CuPy"
FUNCTIONAL = "F.rms_norm"

_CALLS = 300
"""Calls without a synchronization: the host waits where a launch queue ends, at about 1,000."""
_BATCHES = 9
_MISSES = 200

# Only the host is timed: the kernel need not do anything.
_THREE_POINTERS = 'extern "C" __global__ void three_pointers(void*, void*, void*) {}'

_IMPORT = """
import time
start = time.perf_counter()
import cupy_headnorm
print((time.perf_counter() - start) * 1e3)
"""

_FIRST_CALL = """
import time, cupy, numpy
cupy.zeros(1)
x = cupy.zeros((1, 32, 128), numpy.float16)
weight = numpy.ones(128, numpy.float16)
cupy.cuda.Device().synchronize()
start = time.perf_counter()
import cupy_headnorm
cupy_headnorm.HeadNorm(weight)(x, out=x)
cupy.cuda.Device().synchronize()
print((time.perf_counter() - start) * 1e3)
"""


def host_times(names: list[str], on: Timer, unavailable: dict[str, str]) -> list[HostTime]:
    """Return the host's microseconds for each kind of call; add reasons of providers that fail."""
    with on:
        if on.name == "torch":  # its stream says nothing about CuPy's
            on.enter_context(clocks.Gpu())
        work = workloads.prepare(HOST_CASE, on, buffers=1)
        rows = [_host_row(label, call, on) for label, call in _own_calls(work)]
        for name in names:
            if name == "functional" or not providers.is_peer(name):
                continue
            provider = providers.PROVIDERS[name]
            try:
                rows.append(_host_row(provider.label, partial(provider.build(work), 0), on))
            except Exception as error:
                unavailable.setdefault(name, f"{providers.one_line(error)} at a host call")
    return rows


def _synchronize(on: Timer) -> None:
    if on.name != "numpy":
        import_cupy().cuda.Device().synchronize()


def _host_row(label: str, call: Callable[[], Any], on: Timer) -> HostTime:
    timer = timeit.Timer(call, setup=partial(_synchronize, on))
    timer.timeit(_CALLS)
    spent = statistics.median(timer.repeat(_BATCHES, _CALLS)) / _CALLS
    return {"call": label, "microseconds": round(spent * 1e6, 3)}


def _own_calls(work: Workload) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield our calls, and what is below them."""
    (norm,), (x,), (own_weight,) = work.norms, work.inputs[0], work.weights
    if work.on.name == "numpy":
        yield from _of_ours(norm, x, "NumPy")
        if "functional" in providers.find(work.on)[0]:
            tensor = clocks.as_torch(x)
            yield "ours, new result on torch, host memory", partial(norm, tensor)
            yield FUNCTIONAL, _functional(tensor, clocks.as_torch(own_weight))
        return
    cupy = import_cupy()
    array, weight = x, own_weight
    if work.on.name == "torch":
        array, weight = cupy.from_dlpack(x), cupy.from_dlpack(own_weight)
    kernel = cupy.RawKernel(_THREE_POINTERS, "three_pointers")
    pointers = (array.data.ptr, weight.data.ptr, array.data.ptr)
    values = (ctypes.c_void_p * 3)(*pointers)
    addresses = (ctypes.c_void_p * 3)(*(ctypes.addressof(values) + 8 * i for i in range(3)))
    stream, prepared = cupy.cuda.get_current_stream().ptr, ctypes.addressof(addresses)
    launch = cupy.cuda.driver.launchKernel
    grid, block = (1, 1, 1), (128, 1, 1)
    yield LAUNCH, partial(launch, kernel.kernel.ptr, *grid, *block, 0, stream, prepared, 0)
    yield FUNCTION, partial(kernel.kernel, grid, block, pointers)
    yield from _of_ours(norm, array, "CuPy")
    if work.on.name == "torch":
        from torch.utils.dlpack import from_dlpack

        yield from _of_ours(norm, x, "torch")
        yield FUNCTIONAL, _functional(x, own_weight)

        def through_dlpack() -> Any:
            view = cupy.from_dlpack(x)
            result = cupy.empty_like(view)
            kernel((1,), (128,), (view, weight, result))
            return from_dlpack(result)

        yield "from_dlpack, RawKernel, from_dlpack", through_dlpack


def _of_ours(norm: HeadNorm, x: Any, library: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield f"ours, in place on {library}", partial(norm, x, out=x)
    yield f"ours, new result on {library}", partial(norm, x)


def _functional(x: Any, weight: Any) -> Callable[[], Any]:
    from torch.nn import functional

    return partial(functional.rms_norm, x, (HOST_CASE.head_dim,), weight, DEFAULT_EPS["rms"])


def plan_misses(on: Timer) -> dict[str, float]:
    """Return microseconds of calls in place with a new number of tokens, their kernels loaded."""
    spent = {}
    libraries: list[Timer] = [clocks.Gpu(), on] if on.name == "torch" else [on]
    # Layouts are known across libraries: each has numbers of its own, which nobody else uses.
    for library, first in zip(libraries, (1101, 1501), strict=False):
        lengths = range(first, first + _MISSES)
        spent[library.name] = _new_lengths(library, HOST_CASE, lengths)
    spent["sequences"] = _new_lengths(on, HOST_CASE, lengths, sequences=2)
    spent["q_and_k"] = _new_lengths(on, QK_CASE, lengths)
    return {f"plan_miss_{name}_microseconds": found for name, found in spent.items()}


def _new_lengths(on: Timer, case: Case, lengths: range, sequences: int = 0) -> float:
    """Return the median of microseconds of a call over each of `lengths`, after one of `stop`."""
    times = []
    with on:
        work = workloads.prepare(case._replace(tokens=2 * lengths.stop), on, buffers=1)
        _calls_of_length(work, lengths.stop, sequences)()
        for call in [_calls_of_length(work, length, sequences) for length in lengths]:
            _synchronize(on)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        _synchronize(on)
    return round(statistics.median(times) * 1e6, 3)


def _calls_of_length(work: Workload, length: int, sequences: int) -> Callable[[], Any]:
    """Return a call in place over `length` tokens, or over `sequences` of as many each."""
    parts = tuple(part[: length * max(sequences, 1)] for part in work.inputs[0])
    if work.qk is not None:
        return partial(work.qk, *parts, positions=work.positions[:length], out=parts)
    (x,) = parts
    if sequences:
        x = x.reshape(sequences, length, *x.shape[1:])
    return partial(work.norms[0], x, out=x)


def _in_new_process(code: str, bytecode: str, **environment: str) -> float:
    """Return the number that `code` prints, with compiled modules in the folder `bytecode`."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, "PYTHONPYCACHEPREFIX": bytecode}
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=inherited | environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"a new process failed: {' '.join(done.stderr.split())[-300:]}")
    return float(done.stdout.split()[-1])


_folder = partial(tempfile.TemporaryDirectory, prefix="cupy-headnorm-")


def first_calls() -> dict[str, float]:
    """Return milliseconds up to the first result, above importing CuPy and one `cupy.zeros`."""
    spent: dict[str, list[float]] = {"cold": [], "disk_cache": []}
    with _folder() as bytecode:
        _in_new_process(_IMPORT, bytecode)  # pip compiles the modules it installs
        for _ in range(3):
            with _folder() as kernels:
                for times in spent.values():
                    times.append(_in_new_process(_FIRST_CALL, bytecode, CUPY_CACHE_DIR=kernels))
    return {
        f"first_call_{name}_milliseconds": round(statistics.median(times), 1)
        for name, times in spent.items()
    }


def import_times() -> dict[str, float]:
    """Return milliseconds of the import in a new process, with NumPy's and without."""
    codes = {
        "import_milliseconds": _IMPORT,
        "import_beside_numpy_milliseconds": f"import numpy\n{_IMPORT}",
    }
    with _folder() as bytecode:
        _in_new_process(_IMPORT, bytecode)
        return {
            name: round(statistics.median(_in_new_process(code, bytecode) for _ in range(5)), 1)
            for name, code in codes.items()
        }


def reference_costs(tokens: int = 2**16) -> dict[str, float]:
    """Return extra memory and time of the reference, and of whole arrays: by default on 1 GiB."""
    block = np.random.default_rng(0).standard_normal((min(tokens, 1024), 32, 128), np.float32)
    x = np.resize(block, (tokens, 32, 128))
    weight = block[0, 0].copy()
    tracemalloc.start()
    result = reference.rms_norm(x, weight)
    extra = tracemalloc.get_traced_memory()[1] - result.nbytes
    tracemalloc.stop()
    del result
    calls = {
        "reference_milliseconds": lambda: reference.rms_norm(x, weight),
        "whole_array_milliseconds": lambda: providers.whole_array(x, weight, "rms"),
    }
    return {"reference_extra_mebibytes": round(extra / 2**20, 2)} | {
        name: round(1e3 * statistics.median(timeit.repeat(call, number=1, repeat=3)), 1)
        for name, call in calls.items()
    }


def gpu_memory(on: Timer) -> dict[str, float]:
    """Return bytes that a call on torch tensors takes beside its result."""
    if on.name != "torch":
        return {}
    import torch

    with on:
        work = workloads.prepare(HOST_CASE._replace(tokens=8192), on, buffers=1)
        (norm,), (x,) = work.norms, work.xs
        norm(x)
        _synchronize(on)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = norm(x)
        peak = torch.cuda.max_memory_allocated()
    return {"gpu_extra_bytes": peak - before - result.nbytes}
