"""The results of a bench as tables and as a plot."""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cupy_headnorm._cuda import driver
from cupy_headnorm.bench import text
from cupy_headnorm.bench.providers import CEILINGS, PROVIDERS, QK_PROVIDERS
from cupy_headnorm.bench.record import HostTime, Results, Timing, Verdict
from cupy_headnorm.bench.suite import case_of
from cupy_headnorm.bench.workloads import Case

_PROVIDERS = {**PROVIDERS, **QK_PROVIDERS}

# Okabe and Ito's colours, told apart by every kind of eye; ours is the vermilion.
_COLOURS = {
    "ours": "#D55E00",
    "ours-row": "#E69F00",
    "naive": "#999999",
    "functional": "#0072B2",
    "eager": "#CC79A7",
    "compile": "#009E73",
    "liger": "#56B4E9",
    "ours-positions": "#E69F00",
    "ours-plain": "#56B4E9",
    "ours-two": "#999999",
}


def show(results: Results, whole: bool = True) -> None:
    """Print what was measured: numbers to reach first, and all timings if `whole`."""
    print("\n".join(_told(results, whole)))


def _told(results: Results, whole: bool) -> Iterator[str]:
    yield from text.wrapped(f"{results.device}, {results.date}")
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield from text.wrapped(versions)
    if results.targets:
        yield "\nNumbers to reach: the worst of each"
        columns = ("what", "needed", "measured", "verdict", "where")
        yield from text.table(columns, map(_target, results.targets), right=("measured",))
    if results.host:
        yield "\nHost time a call, 1 token"
        rows = sorted(results.host, key=lambda row: row["microseconds"])
        times = [(f"{row['microseconds']:,.2f}", row["call"]) for row in rows]
        yield from text.table(("us", "call"), times, right=("us",))
    if results.once:
        yield ""
        once = [(f"{value:,}", name.replace("_", " ")) for name, value in results.once.items()]
        yield from text.table(("once", "what"), once, right=("once",))
    if results.unavailable:
        yield ""
    for name, reason in results.unavailable.items():
        yield from text.wrapped(f"{_label(name)}: not available: {reason}", "  ", "")
    if results.timings and whole:
        yield "\nDevice time; share: of the better of a copy and an in-place multiply"
        yield from _timings(results.timings)
    elif results.timings:
        yield f"\n{len(results.timings)} device times: --all prints them"


def _label(provider: str) -> str:
    return _PROVIDERS[provider].label if provider in _PROVIDERS else provider


def _timings(timings: list[Timing]) -> Iterator[str]:
    """Yield a line for each provider, below one for the case."""
    before = None
    yield f"{'us':>12}{'GB/s':>10}{'share':>8}"
    for timing in timings:
        case = case_of(timing)
        if case != before:
            yield str(case)
        before = case
        yield (
            f"{timing['microseconds']:12,.2f}{timing['gigabytes_per_second']:10,.1f}"
            f"{timing['share']:8.3f}  {_label(timing['provider'])}"
        )


def _target(row: Verdict) -> tuple[str, ...]:
    measured = "" if row["measured"] is None else f"{row['measured']:g}"
    verdict = {True: "met", False: "missed", None: "not measured"}[row["met"]]
    return row["what"], row["needed"], measured, verdict, row["where"] or ""


def check_plot(path: Path) -> None:
    """Raise, before anything is measured, where `plot` could not write `path`."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot is {path}; needs a name that ends in .png or .svg")
    _needs("matplotlib", "--plot")


def _needs(library: str, what: str) -> None:
    try:
        importlib.import_module(library)
    except ImportError as error:
        remedy = driver.install_command("bench")
        raise RuntimeError(f"{what} needs {library}: {remedy}") from error


def plot(results: Results, path: Path) -> None:
    """Draw times the ceiling's time against tokens, and the host's time of each call."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    case, lines = _lines(results.timings)
    drawings = [partial(_times, case=case, lines=lines)] if lines else []
    drawings += [partial(_bars, host=results.host)] if results.host else []
    if not drawings:
        raise ValueError("the results hold neither device nor host times; needs one to plot")
    with rc_context({"font.size": 11, "svg.hashsalt": "cupy-headnorm"}):
        figure = Figure(figsize=(6.2 * len(drawings), 4.6), layout="constrained", dpi=150)
        for number, draw in enumerate(drawings):
            axes = figure.add_subplot(1, len(drawings), number + 1)
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes)
        figure.suptitle(f"{results.device}, {results.date[:10]}")
        # Without a date in the file, equal results make equal files.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(timings: list[Timing]) -> tuple[Case | None, dict[str, list[tuple[int, float]]]]:
    """Return the case that was timed at the most numbers of tokens, and its points by provider."""
    groups: dict[Case, list[Timing]] = defaultdict(list)
    for timing in timings:
        groups[case_of(timing)._replace(tokens=0)].append(timing)
    if not groups:
        return None, {}
    case = max(groups, key=lambda c: len({t["tokens"] for t in groups[c]}))
    providers = Counter(timing["tokens"] for timing in groups[case])
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for timing in sorted(groups[case], key=lambda t: t["tokens"]):
        if providers[timing["tokens"]] == 1 < max(providers.values()):
            continue  # measured for a number to reach, not to compare
        times = 1 / max(timing["share"], 1e-4)
        points[timing["provider"]].append((timing["tokens"], times))
    return case, {n: points[n] for n in _PROVIDERS if n in points and n not in CEILINGS}


def _times(axes: Any, case: Any, lines: dict[str, list[Any]]) -> None:
    special: dict[str, dict[str, Any]] = {"ours": {"linewidth": 3, "markersize": 6, "zorder": 4}}
    axes.axhline(1, color="#000000", linestyle="--", linewidth=1, label="copy or multiply")
    for name, points in lines.items():
        style = {"color": _COLOURS.get(name, "#000000"), "linewidth": 1.4, "marker": "o"}
        style |= {"markersize": 3.5, "label": _label(name), "zorder": 2, **special.get(name, {})}
        axes.plot(*zip(*points, strict=True), **style)
    counts = sorted({tokens for points in lines.values() for tokens, _ in points})
    # Every second of many: labels of neighbours would touch.
    shown = counts if len(counts) < 7 else counts[::2]
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{count:,}" for count in shown])
    largest = max(times for points in lines.values() for _, times in points)
    marks = [mark for mark in (1, 2, 5, 10, 20, 50, 100, 200, 500) if mark <= 1.2 * largest]
    axes.set_yscale("log")
    axes.set_yticks(marks, [f"{mark}" for mark in marks])
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel="times the time of a copy")
    size = f"{case.heads} heads x {case.head_dim}"
    axes.set_title(f"Device time: {case.kind}, {case.dtype}, {size}", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0, 0.6))


def _bars(axes: Any, host: list[HostTime]) -> None:
    rows = sorted(host, key=lambda row: -row["microseconds"])
    calls, times = [row["call"] for row in rows], [row["microseconds"] for row in rows]
    ours = [call.startswith("ours") for call in calls]
    bars = axes.barh(calls, times, color=[_COLOURS["ours"] if own else "#999999" for own in ours])
    axes.bar_label(bars, [f"{spent:.1f}" for spent in times], padding=3, fontsize=9)
    for label, own in zip(axes.get_yticklabels(), ours, strict=True):
        label.set_fontweight("bold" if own else "normal")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.margins(x=0.12)
    axes.set_xlabel("microseconds")
    axes.set_title("Host time a call, 1 token", fontsize=11)
