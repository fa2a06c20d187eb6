"""
``python -m cupy_headnorm bench``: our norm beside a copy of the same bytes and its peers.

`clocks` has the clocks, `workloads` the arrays, `providers` and `qk_providers` all that is timed,
`costs` what there is beside device time, `suite` the suite and the numbers to reach, `report`
tables, files and plots.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cupy_headnorm._arrays import dtypes as dtype_table
from cupy_headnorm._cuda import environment
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm._version import __version__
from cupy_headnorm.bench import (
    costs,
    qk_providers,
    report,
    workloads,
)
from cupy_headnorm.bench import (
    providers as bench_providers,
)
from cupy_headnorm.bench import (
    suite as bench_suite,
)
from cupy_headnorm.bench.clocks import Timer, timer
from cupy_headnorm.bench.providers import CEILINGS, PROVIDERS, Provider
from cupy_headnorm.bench.suite import Results, suite
from cupy_headnorm.bench.workloads import LAYOUTS, Case, cases


class _Op(NamedTuple):
    prepare: Callable[[Case, Timer], Any]
    providers: Mapping[str, Provider]
    ours: tuple[str, ...]


_OPS = {
    "norm": _Op(workloads.prepare, bench_providers.PROVIDERS, bench_providers.OURS),
    qk_providers.KIND: _Op(qk_providers.prepare, qk_providers.PROVIDERS, qk_providers.OURS),
}


def count(text: str) -> int:
    """Read an argument that is 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; needs 1 or more")
    return number


def _size(text: str) -> float:
    size = float(text)
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{size} is given; needs a finite number above 0")
    return size


_CASES = {
    "op": "norm",
    "tokens": [1, 64, 1024, 8192],
    "megabytes": None,
    "num_heads": [32],
    "num_kv_heads": [8],
    "head_dim": [128],
    "dtype": ["bfloat16"],
    "kind": ["rms"],
    "layout": ["contiguous"],
}
"""Options that choose cases, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run` reads."""
    parser.add_argument(
        "--op",
        choices=tuple(_OPS),
        help="qk-rope: q and k of one packed buffer, normalized and turned in place",
    )
    dtypes = [dtype.name for dtype in dtype_table.DTYPES]
    parser.add_argument("--tokens", type=count, nargs="+")
    parser.add_argument("--megabytes", type=_size, help="size of x, instead of --tokens")
    parser.add_argument("--num-heads", type=count, nargs="+")
    parser.add_argument("--num-kv-heads", type=count, nargs="+", help="of qk-rope")
    parser.add_argument("--head-dim", type=count, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=dtypes)
    parser.add_argument("--kind", nargs="+", choices=tuple(option_rules.DEFAULT_EPS))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS)
    parser.set_defaults(**_CASES)
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help=f"default: all found of {', '.join(PROVIDERS)}; "
        f"of qk-rope: {', '.join(qk_providers.PROVIDERS)}",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--host", action="store_true", help="host times, first calls, imports, memory alone"
    )
    what.add_argument(
        "--suite",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FOLDER",
        help="all of a fixed set, held against the numbers to reach, into FOLDER/<device>.json",
    )
    what.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="read a file of --json or --suite instead of measuring",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .png or .svg")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Measure, or read, what was `chosen`; print it, write it, draw it."""
    console = report.console()
    _check_options(chosen)
    _check_places(chosen)
    if chosen.source is not None:
        results = report.read(chosen.source)
    else:
        results = _measured(chosen, command, console)
    report.show(results, console)
    files = [] if chosen.json is None else [chosen.json]
    if chosen.suite is not None:
        files.append(chosen.suite / f"{_slug(results['device'])}.json")
    for path in files:
        report.write(results, path)
        console.print(f"\nwritten to {path}", markup=False)
    if chosen.plot is not None:
        report.plot(results, chosen.plot)


def _check_options(chosen: argparse.Namespace) -> None:
    """Raise where an option would say nothing."""
    given = [name for name, default in _CASES.items() if getattr(chosen, name) != default]
    if chosen.source is not None:
        what, unread = "--from", [*given, *(["providers"] if chosen.providers else [])]
    elif chosen.host or chosen.suite is not None:
        what, unread = "--host" if chosen.host else "--suite", given
    elif chosen.op == "norm":
        what, unread = "--op norm", [name for name in given if name == "num_kv_heads"]
    else:
        what, unread = f"--op {chosen.op}", [name for name in given if name in ("kind", "layout")]
    if not unread and {"tokens", "megabytes"} <= set(given):
        what, unread = "--megabytes", ["tokens"]
    if unread:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
        raise ValueError(f"{what} is given with {options}; needs it without")


def _check_places(chosen: argparse.Namespace) -> None:
    """Raise before minutes are spent on results that could not be written."""
    for name, folder in (
        ("suite", chosen.suite),
        ("json", chosen.json and chosen.json.parent),
        ("plot", chosen.plot and chosen.plot.parent),
    ):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} would write to {folder}; needs a folder that is there")
    if chosen.plot is not None:
        report.check_plot(chosen.plot)


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
    whole = chosen.suite is not None
    names, unavailable = _found(on, list(_OPS) if whole else [chosen.op], chosen.providers)
    device, versions = _device_and_versions()
    results: Results = {
        "device": device,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Without the folder: results are published.
        "command": command if chosen.suite is None else _suite_command(chosen),
        "timer": on.name,
        "timings": [],
        "host": [],
        "once": {},
        "targets": [],
        "unavailable": unavailable,
    }
    steps: list[Callable[[], None]] = []
    for case, providers in [] if chosen.host else _chosen_cases(chosen, on):
        known = names[_op(case)]
        wanted = known if providers is None else [n for n in known if n in providers]
        steps.append(partial(_time, results, case, wanted, on))
    of_norm, on_gpu = chosen.op == "norm", on.name != "numpy"
    if of_norm:
        steps.append(partial(_host, results, names["norm"], on))
    for is_wanted, cost in (
        (on_gpu and of_norm, partial(costs.plan_misses, on)),
        (on_gpu and (chosen.host or whole), costs.first_calls),
        (chosen.host or whole, costs.import_times),
        (chosen.host or whole, partial(costs.gpu_memory, on)),
        (whole, costs.reference_costs),
    ):
        if is_wanted:
            steps.append(partial(_once, results, cost))
    # A thread that redraws the bar would take its time from the calls.
    for step in track(
        steps,
        "measuring",
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    ):
        step()
    if chosen.suite is not None:
        results["targets"] = bench_suite.judge(results)
    return results


def _suite_command(chosen: argparse.Namespace) -> str:
    only = f" --providers {' '.join(chosen.providers)}" if chosen.providers else ""
    return f"python -m cupy_headnorm bench --suite{only}"


def _op(case: Case) -> str:
    return case.kind if case.kind in _OPS else "norm"


def _found(
    on: Timer, ops: list[str], wanted: list[str] | None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the providers of each op that can be measured, and the reasons of the others."""
    known = list(dict.fromkeys(name for op in ops for name in _OPS[op].providers))
    for name in wanted or ():
        if name not in known:
            raise ValueError(f"provider {name!r} is not known; needs one of {', '.join(known)}")
    names: dict[str, list[str]] = {}
    unavailable: dict[str, str] = {}
    for op in ops:
        names[op], reasons = bench_providers.find(on, wanted, _OPS[op].providers)
        unavailable |= reasons
    return names, unavailable


def _time(results: Results, case: Case, names: list[str], on: Timer) -> None:
    results["timings"] += measure(case, names, on, results["unavailable"])


def _once(results: Results, cost: Callable[[], dict[str, float]]) -> None:
    try:
        results["once"].update(cost())
    except Exception as error:  # minutes of timings are worth more than the last numbers
        name = getattr(cost, "func", cost).__name__
        results["unavailable"][name] = bench_providers.one_line(error)


def _host(results: Results, names: list[str], on: Timer) -> None:
    results["host"], failed = costs.host_times(on, names)
    results["unavailable"] = failed | results["unavailable"]


def measure(
    case: Case, names: list[str], on: Timer, unavailable: dict[str, str]
) -> list[dict[str, Any]]:
    """
    Time providers on one case and return a row for each.

    A peer that raises or that disagrees with us gets no row but an entry in `unavailable`; one that
    cannot work in place is left out where it would have to.
    """
    op = _OPS[_op(case)]
    with on:
        work = op.prepare(case, on)
        buffers = len(work.plain)
        calls = {name: op.providers[name].build(work) for name in CEILINGS}
        times = {name: [on.microseconds(call, buffers)] for name, call in calls.items()}
        for name in names:
            provider = op.providers[name]
            if name not in CEILINGS and (provider.in_place or not case.in_place):
                try:
                    call = provider.build(work)
                    reason = bench_providers.disagreement(name, call, work)
                    if reason:
                        unavailable.setdefault(name, reason)
                    else:
                        times[name] = [on.microseconds(call, buffers)]
                        calls[name] = call
                except Exception as error:
                    if name in op.ours:
                        raise
                    reason = f"{bench_providers.one_line(error)} at {case}"
                    unavailable.setdefault(name, reason)
        for _ in range(on.rounds - 1):
            for name, call in calls.items():
                times[name].append(on.microseconds(call, buffers))
    spent = {name: statistics.median(each) for name, each in times.items()}
    ceiling = min(spent[name] for name in CEILINGS)
    return [
        {
            **case._asdict(),
            "provider": name,
            "microseconds": round(microseconds, 3),
            "gigabytes_per_second": round(case.nbytes / microseconds / 1e3, 1),
            "share": round(ceiling / microseconds, 4),
        }
        for name, microseconds in spent.items()
        if name in names
    ]


def _chosen_cases(chosen: argparse.Namespace, on: Timer) -> Iterator[tuple[Case, list[str] | None]]:
    if chosen.suite is not None:
        yield from suite(on)
        return
    kinds, layouts, kv_heads = chosen.kind, chosen.layout, [0]
    if chosen.op != "norm":
        kinds, layouts, kv_heads = [chosen.op], [qk_providers.CASE.layout], chosen.num_kv_heads
    for case in cases(
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
