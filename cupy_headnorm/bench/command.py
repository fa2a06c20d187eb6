"""
``python -m cupy_headnorm bench``: our norms beside a copy of the same bytes and their peers.

`arguments` has the options, `clocks` the clocks, `workloads` and `providers` all that is timed,
`costs` what there is beside device time, `suite` the fixed cases and the numbers to reach, `record`
what was measured, as an object and in files, `report` tables and plots.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cupy_headnorm._cuda import environment
from cupy_headnorm._version import __version__
from cupy_headnorm.bench import arguments, costs, record, report, workloads
from cupy_headnorm.bench.clocks import Call, Timer, timer
from cupy_headnorm.bench.providers import CEILINGS, OPS, disagreement, find, is_peer, one_line
from cupy_headnorm.bench.record import Results, Timing
from cupy_headnorm.bench.suite import judge, suite
from cupy_headnorm.bench.workloads import NORM, Case


def run(chosen: argparse.Namespace, command: str) -> None:
    """Measure, or read, what was `chosen`; print it, write it, draw it."""
    arguments.check(chosen)
    if chosen.source is not None:
        results = record.read(chosen.source)
    else:
        results = _measured(chosen, command)
    report.show(results, whole=chosen.whole or not results.targets)
    for path in (chosen.json, chosen.suite and chosen.suite / f"{_slug(results.device)}.json"):
        if path is not None:
            record.write(results, path)
            print(f"\nwritten to {path}")
    if chosen.plot is not None:
        report.plot(results, chosen.plot)


def _slug(device: str) -> str:
    """Make ``NVIDIA H100 80GB HBM3`` a file's name: ``h100-80gb-hbm3``."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower())).removeprefix("nvidia-")


def version(package: str) -> str:
    """Return the version of an installed package; empty without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _device_and_versions() -> tuple[str, dict[str, str]]:
    found = environment.environment()
    if found.devices:
        current = environment.import_cupy().cuda.runtime.getDevice()
        device = found.devices[current].split(",")[0]
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
        device = model.group(1) if model else platform.processor() or platform.machine()
    packages = ("numpy", "torch", "triton", "transformers", "liger-kernel")
    versions = {"cupy_headnorm": __version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in packages}
    versions |= {"cupy": found.cupy, "nvrtc": found.nvrtc, "driver": found.driver}
    return device, {name: number for name, number in versions.items() if number}


def _measured(chosen: argparse.Namespace, command: str) -> Results:
    on = timer()
    if chosen.suite is not None:  # without the folder: results are published
        only = f" --providers {' '.join(chosen.providers)}" if chosen.providers else ""
        command = f"python -m cupy_headnorm bench --suite{only}"
    device, versions = _device_and_versions()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = Results(device, date, command, on.name, versions)
    steps = list(_steps(chosen, on, results))
    for number, step in enumerate(steps, 1):
        if sys.stderr.isatty():  # a thread that draws a bar would take its time from the calls
            print(f"\rmeasuring {number} of {len(steps)} ", end="", file=sys.stderr, flush=True)
        step()
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if chosen.suite is not None:
        results.targets = judge(results)
    return results


def _steps(chosen: argparse.Namespace, on: Timer, results: Results) -> Iterator[Callable[[], None]]:
    """Yield all that is to be measured, each of which adds itself to the results."""
    found = {}
    for op in arguments.ops(chosen):
        found[op], reasons = find(on, chosen.providers, OPS[op])
        results.unavailable |= reasons
    whole, of_norm, on_gpu = chosen.suite is not None, chosen.op == NORM, on.name != "numpy"
    described = suite(on) if whole else zip(arguments.cases(chosen), itertools.repeat(None))
    for case, providers in [] if chosen.host else described:
        names = [name for name in found[case.op] if providers is None or name in providers]
        yield partial(_rows, results.timings, measure, case, names, on, results.unavailable)
    if of_norm:
        yield partial(_rows, results.host, costs.host_times, found[NORM], on, results.unavailable)
    for is_wanted, cost, *given in (
        (on_gpu and of_norm, costs.plan_misses, on),
        (on_gpu and (chosen.host or whole), costs.first_calls),
        (chosen.host or whole, costs.import_times),
        (chosen.host or whole, costs.gpu_memory, on),
        (whole, costs.reference_costs),
    ):
        if is_wanted:
            yield partial(_once, results, cost, *given)


def _rows(rows: list[Any], measured: Callable[..., list[Any]], *given: Any) -> None:
    rows += measured(*given)


def _once(results: Results, cost: Callable[..., dict[str, float]], *given: Any) -> None:
    try:
        results.once.update(cost(*given))
    except Exception as error:  # minutes of timings are worth more than the last numbers
        results.unavailable[cost.__name__] = one_line(error)


def measure(case: Case, names: list[str], on: Timer, unavailable: dict[str, str]) -> list[Timing]:
    """
    Time providers on one case and return a row for each.

    A peer that raises or that disagrees with us gets no row but an entry in `unavailable`; one that
    cannot work in place is left out where it would have to.
    """
    timed: dict[str, tuple[Call, list[float]]] = {}
    with on:
        work = workloads.prepare(case, on)
        buffers = len(work.plain)
        for name in dict.fromkeys([*CEILINGS, *names]):
            if case.op == NORM and case.in_place and is_peer(name):
                continue
            try:
                call = OPS[case.op][name].build(work)
                reason = disagreement(name, call, work)
                if not reason:
                    timed[name] = call, [on.microseconds(call, buffers)]
            except Exception as error:
                if not is_peer(name):
                    raise
                reason = f"{one_line(error)} at {case}"
            if reason:
                unavailable.setdefault(name, reason)
        for _ in range(on.rounds - 1):
            for call, times in timed.values():
                times.append(on.microseconds(call, buffers))
    spent = {name: statistics.median(times) for name, (_, times) in timed.items()}
    ceiling = min(spent[name] for name in CEILINGS)
    rows: list[Any] = [
        case._asdict()
        | {
            "provider": name,
            "microseconds": round(microseconds, 3),
            "gigabytes_per_second": round(case.nbytes / microseconds / 1e3, 1),
            "share": round(ceiling / microseconds, 4),
        }
        for name, microseconds in spent.items()
        if name in names
    ]
    return rows
