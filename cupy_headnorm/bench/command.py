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
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from cupy_headnorm._cuda import environment
from cupy_headnorm._version import __version__
from cupy_headnorm.bench import arguments, costs, record, report, workloads
from cupy_headnorm.bench import providers as bench_providers
from cupy_headnorm.bench import suite as bench_suite
from cupy_headnorm.bench.clocks import Timer, timer
from cupy_headnorm.bench.providers import CEILINGS, OPS
from cupy_headnorm.bench.record import Results, Timing
from cupy_headnorm.bench.suite import suite
from cupy_headnorm.bench.workloads import NORM, QK_CASE, Case


def run(chosen: argparse.Namespace, command: str) -> None:
    """Measure, or read, what was `chosen`; print it, write it, draw it."""
    console = report.console()
    arguments.check(chosen)
    if chosen.source is not None:
        results = record.read(chosen.source)
    else:
        results = _measured(chosen, command, console)
    report.show(results, console)
    files = [] if chosen.json is None else [chosen.json]
    if chosen.suite is not None:
        files.append(chosen.suite / f"{_slug(results.device)}.json")
    for path in files:
        record.write(results, path)
        console.print(f"\nwritten to {path}", markup=False)
    if chosen.plot is not None:
        report.plot(results, chosen.plot)


def _slug(device: str) -> str:
    """Turn ``NVIDIA H100 80GB HBM3`` into ``h100-80gb-hbm3``."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return "-".join(word for word in words if word != "nvidia")


def version(package: str) -> str:
    """Return the version of an installed package; empty without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _device_and_versions() -> tuple[str, dict[str, str]]:
    found = environment.environment()
    device = platform.processor() or platform.machine()
    if found.devices:
        current = environment.import_cupy().cuda.runtime.getDevice()
        device = found.devices[current].split(",")[0]
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
        device = model.group(1) if model else device
    versions = {"cupy_headnorm": __version__, "python": platform.python_version()}
    packages = ("numpy", "torch", "triton", "transformers", "liger-kernel")
    versions.update({package: version(package) for package in packages})
    versions.update(cupy=found.cupy, nvrtc=found.nvrtc, driver=found.driver)
    return device, {name: number for name, number in versions.items() if number}


def _measured(chosen: argparse.Namespace, command: str, console: Any) -> Results:
    from rich.progress import track

    on = timer()
    names, unavailable = _found(on, arguments.ops(chosen), chosen.providers)
    device, versions = _device_and_versions()
    results = Results(
        device=device,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Without the folder: results are published.
        command=command if chosen.suite is None else _suite_command(chosen),
        timer=on.name,
        versions=versions,
        unavailable=unavailable,
    )
    # A thread that redraws the bar would take its time from the calls.
    for step in track(
        list(_steps(chosen, on, names, results)),
        "measuring",
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    ):
        step()
    if chosen.suite is not None:
        results.targets = bench_suite.judge(results)
    return results


def _suite_command(chosen: argparse.Namespace) -> str:
    only = f" --providers {' '.join(chosen.providers)}" if chosen.providers else ""
    return f"python -m cupy_headnorm bench --suite{only}"


def _found(
    on: Timer, ops: list[str], wanted: list[str] | None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the providers of each op that can be measured, and the reasons of the others."""
    names: dict[str, list[str]] = {}
    unavailable: dict[str, str] = {}
    for op in ops:
        names[op], reasons = bench_providers.find(on, wanted, OPS[op])
        unavailable |= reasons
    return names, unavailable


def _steps(
    chosen: argparse.Namespace, on: Timer, names: dict[str, list[str]], results: Results
) -> Iterator[Callable[[], None]]:
    """Yield all that is to be measured, each of which adds itself to the results."""
    for case, providers in [] if chosen.host else _chosen_cases(chosen, on):
        known = names[case.op]
        wanted = known if providers is None else [n for n in known if n in providers]
        yield partial(_time, results, case, wanted, on)
    of_norm, on_gpu = chosen.op == NORM, on.name != "numpy"
    whole = chosen.suite is not None
    if of_norm:
        yield partial(_host, results, names[NORM], on)
    for is_wanted, cost in (
        (on_gpu and of_norm, partial(costs.plan_misses, on)),
        (on_gpu and (chosen.host or whole), costs.first_calls),
        (chosen.host or whole, costs.import_times),
        (chosen.host or whole, partial(costs.gpu_memory, on)),
        (whole, costs.reference_costs),
    ):
        if is_wanted:
            yield partial(_once, results, cost)


def _chosen_cases(chosen: argparse.Namespace, on: Timer) -> Iterator[tuple[Case, list[str] | None]]:
    """Yield cases, each with its providers; None is all that were found."""
    if chosen.suite is not None:
        yield from suite(on)
        return
    kinds, layouts, kv_heads = chosen.kind, chosen.layout, [0]
    if chosen.op != NORM:
        kinds, layouts, kv_heads = [chosen.op], [QK_CASE.layout], chosen.num_kv_heads
    for case in workloads.cases(
        chosen.tokens,
        chosen.num_heads,
        chosen.head_dim,
        chosen.dtype,
        kinds,
        layouts,
        chosen.megabytes,
        kv_heads,
    ):
        yield case, None


def _time(results: Results, case: Case, names: list[str], on: Timer) -> None:
    results.timings += measure(case, names, on, results.unavailable)


def _once(results: Results, cost: Callable[[], dict[str, float]]) -> None:
    try:
        results.once.update(cost())
    except Exception as error:  # minutes of timings are worth more than the last numbers
        name = getattr(cost, "func", cost).__name__
        results.unavailable[name] = bench_providers.one_line(error)


def _host(results: Results, names: list[str], on: Timer) -> None:
    results.host, failed = costs.host_times(on, names)
    results.unavailable = failed | results.unavailable


def measure(case: Case, names: list[str], on: Timer, unavailable: dict[str, str]) -> list[Timing]:
    """
    Time providers on one case and return a row for each.

    A peer that raises or that disagrees with us gets no row but an entry in `unavailable`; one that
    cannot work in place is left out where it would have to.
    """
    providers = OPS[case.op]
    with on:
        work = workloads.prepare(case, on)
        buffers = len(work.plain)
        calls = {name: providers[name].build(work) for name in CEILINGS}
        times = {name: [on.microseconds(call, buffers)] for name, call in calls.items()}
        for name in names:
            provider = providers[name]
            if name not in CEILINGS and (provider.in_place or not case.in_place):
                try:
                    call = provider.build(work)
                    reason = bench_providers.disagreement(provider, call, work)
                    if reason:
                        unavailable.setdefault(name, reason)
                    else:
                        times[name] = [on.microseconds(call, buffers)]
                        calls[name] = call
                except Exception as error:
                    if bench_providers.is_ours(name):
                        raise
                    reason = f"{bench_providers.one_line(error)} at {case}"
                    unavailable.setdefault(name, reason)
        for _ in range(on.rounds - 1):
            for name, call in calls.items():
                times[name].append(on.microseconds(call, buffers))
    spent = {name: statistics.median(each) for name, each in times.items()}
    ceiling = min(spent[name] for name in CEILINGS)
    return [
        cast(
            Timing,
            {
                **case._asdict(),
                "provider": name,
                "microseconds": round(microseconds, 3),
                "gigabytes_per_second": round(case.nbytes / microseconds / 1e3, 1),
                "share": round(ceiling / microseconds, 4),
            },
        )
        for name, microseconds in spent.items()
        if name in names
    ]
