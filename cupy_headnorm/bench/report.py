"""
The results of a bench: as tables, as a file and as a plot.

Results are a dict of plain lists, strings and numbers:

- ``device``: name of the GPU or processor; ``date``: ISO 8601; ``command``: what was run.
- ``timer``: whose arrays were timed, ``torch`` or ``cupy`` on a GPU, ``numpy`` on the host.
- ``versions``: name to version of all that has a part in the numbers.
- ``timings``: a list of ``tokens``, ``num_heads``, ``head_dim``, ``dtype``, ``kind``, ``layout``,
  ``num_kv_heads`` (0 but of kind ``qk-rope``), ``provider``, ``microseconds`` (device time a call),
  ``gigabytes_per_second`` (x, or q and k, read once, the result written once) and ``share`` of the
  ceiling, the better of a copy and an in-place multiply.
- ``host``: a list of ``call`` and ``microseconds`` of the host for one token.
- ``once``: name to number; the name ends in the unit.
- ``targets``: a list of ``what``, ``needed``, ``measured``, ``where`` and ``met``.
- ``unavailable``: provider to the reason why it was not measured.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from cupy_headnorm._cuda import driver
from cupy_headnorm._rules import options
from cupy_headnorm.bench import qk_providers
from cupy_headnorm.bench.providers import CEILINGS, PROVIDERS
from cupy_headnorm.bench.suite import Results, case_of
from cupy_headnorm.bench.workloads import Case

_PROVIDERS = {**PROVIDERS, **qk_providers.PROVIDERS}
_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,), "text or null": (str, type(None)), "an integer": (int,),
    "a number": (int, float), "a number or null": (int, float, type(None)),
    "true, false or null": (bool, type(None)), "a list": (list,), "names with values": (dict,),
}  # fmt: skip
_CONTAINERS: dict[type, str] = {list: "a list", dict: "names with values"}
_SHAPE = {
    **dict.fromkeys(("device", "date", "command", "timer"), "text"),
    "versions": {...: "text"},
    "timings": [
        {
            **dict.fromkeys(("tokens", "num_heads", "num_kv_heads", "head_dim"), "an integer"),
            **dict.fromkeys(("dtype", "kind", "layout", "provider"), "text"),
            **dict.fromkeys(("microseconds", "gigabytes_per_second", "share"), "a number"),
        }
    ],
    "host": [{"call": "text", "microseconds": "a number"}],
    "once": {...: "a number"},
    "targets": [
        {
            **dict.fromkeys(("what", "needed"), "text"),
            "measured": "a number or null",
            "where": "text or null",
            "met": "true, false or null",
        }
    ],
    "unavailable": {...: "text"},
}
"""What a file holds, by name, or of any name, or of each of a list. Others may be there too."""
_LATER: dict[str, type] = {"targets": list, "num_kv_heads": int}
"""What older files have not: an empty list, or 0."""

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


def console() -> Any:
    """Return rich's console; RuntimeError, with the command that mends it, without rich."""
    try:
        from rich.console import Console
    except ImportError as error:
        remedy = driver.install_command("bench")
        raise RuntimeError(f"the table needs rich: {remedy}") from error
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = 120  # a file or a pipe is not 80 columns wide
    return made


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for number, column in enumerate(columns):
        text = number == 0 or column == "where"
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    return table


def show(results: Results, console: Any) -> None:
    """Print what was measured on a console."""
    console.print(f"{results['device']}, {results['date']}", markup=False)
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    console.print(told, markup=False)
    if results["timings"]:
        console.print("\nDevice time; share: of the better of a copy and an in-place multiply")
        console.print(_timings(results["timings"]))
    for name, reason in results["unavailable"].items():
        console.print(f"{_label(name)}: not available: {reason}", markup=False)
    if results["host"]:
        console.print("\nHost time a call, 1 token")
        table = _table("call", "us")
        for row in sorted(results["host"], key=lambda row: row["microseconds"]):
            table.add_row(row["call"], f"{row['microseconds']:,.2f}")
        console.print(table)
    if results["once"]:
        console.print()
        table = _table("once", "")
        for name, value in results["once"].items():
            table.add_row(name.replace("_", " "), f"{value:,}")
        console.print(table)
    if results["targets"]:
        console.print("\nNumbers to reach: the worst of each")
        console.print(_targets(results["targets"]))


def _label(provider: str) -> str:
    return _PROVIDERS[provider].label if provider in _PROVIDERS else provider


def _timings(timings: list[dict[str, Any]]) -> Any:
    table = _table(
        "tokens x heads x dim", "dtype", "kind", "layout", "provider", "us", "GB/s", "share"
    )
    before = None
    for timing in timings:
        case = case_of(timing)
        described = (case.size, case.dtype, case.kind, case.layout)
        shown = ("", "", "", "") if case == before else described
        before = case
        table.add_row(
            *shown,
            _label(timing["provider"]),
            f"{timing['microseconds']:,.2f}",
            f"{timing['gigabytes_per_second']:,.1f}",
            f"{timing['share']:.3f}",
        )
    return table


def _targets(targets: list[dict[str, Any]]) -> Any:
    table = _table("what", "needed", "measured", "", "where")
    verdicts = {True: "met", False: "[bold red]missed[/]", None: "not measured"}
    for row in targets:
        measured = "" if row["measured"] is None else f"{row['measured']:g}"
        table.add_row(
            row["what"], row["needed"], measured, verdicts[row["met"]], row["where"] or ""
        )
    return table


def write(results: Results, path: Path) -> None:
    """Write results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Results:
    """
    Read results that `write` wrote.

    Raises
    ------
    ValueError
        The file holds something else.
    """
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); needs a file of --json") from error
    try:
        _check(results, _SHAPE, "")
    except ValueError as error:
        raise ValueError(f"{path} {error}, as a file of --json or --suite") from None
    return results


def _check(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError where a part of a file is not as `shape` has it; see `_SHAPE`."""
    needed = shape if isinstance(shape, str) else _CONTAINERS[type(shape)]
    finite = type(value) not in (int, float) or abs(value) <= sys.float_info.max
    if not finite or type(value) not in _TYPES[needed]:
        raise ValueError(f"holds {where or 'only'} {options.shown(value)}; needs {needed}")
    if isinstance(shape, list):
        for i, entry in enumerate(value):
            _check(entry, shape[0], f"{where}[{i}]")
    elif isinstance(shape, dict):
        for name in _LATER.keys() & shape.keys():
            value.setdefault(name, _LATER[name]())
        missing = [name for name in shape if name is not ... and name not in value]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}{where and f' in {where}'}; needs it")
        for name in value if ... in shape else shape:
            _check(value[name], shape.get(..., shape.get(name)), f"{where}.{name}".lstrip("."))


def check_plot(path: Path) -> None:
    """Raise, before anything is measured, where `plot` could not write `path`."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot is {path}; needs a name that ends in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        remedy = driver.install_command("bench")
        raise RuntimeError(f"--plot needs matplotlib: {remedy}") from error


def plot(results: Results, path: Path) -> None:
    """Draw bandwidth against tokens, with the ceiling, and the host's time of each call."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    case, lines = _lines(results["timings"])
    drawings = [partial(_bandwidth, case=case, lines=lines)] if lines else []
    drawings += [partial(_bars, host=results["host"])] if results["host"] else []
    if not drawings:
        raise ValueError("the results hold neither device nor host times; needs one to plot")
    with rc_context({"font.size": 11, "svg.hashsalt": "cupy-headnorm"}):
        figure = Figure(figsize=(6.2 * len(drawings), 4.6), layout="constrained", dpi=150)
        for number, draw in enumerate(drawings):
            axes = figure.add_subplot(1, len(drawings), number + 1)
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes)
        figure.suptitle(f"{results['device']}, {results['date'][:10]}")
        # Without a date in the file, equal results make equal files.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(timings: list[dict[str, Any]]) -> tuple[Case | None, dict[str, list[tuple[int, float]]]]:
    """Return the case that was timed at the most numbers of tokens, and its points by provider."""
    groups: dict[Case, list[dict[str, Any]]] = defaultdict(list)
    for timing in timings:
        groups[case_of(timing)._replace(tokens=0)].append(timing)
    if not groups:
        return None, {}
    case = max(groups, key=lambda c: len({t["tokens"] for t in groups[c]}))
    providers = Counter(timing["tokens"] for timing in groups[case])
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    ceiling = {}
    # The largest share last: it says the most exactly what it is a share of.
    for timing in sorted(groups[case], key=lambda t: (t["tokens"], t["share"])):
        tokens, speed = timing["tokens"], timing["gigabytes_per_second"]
        if providers[tokens] == 1 < max(providers.values()):
            continue  # measured for a number to reach, not to compare
        ceiling[tokens] = speed / max(timing["share"], 1e-4)
        points[timing["provider"]].append((tokens, speed))
    lines = {n: points[n] for n in _PROVIDERS if n in points and n not in CEILINGS}
    return case, lines | {"ceiling": list(ceiling.items())}


def _bandwidth(axes: Any, case: Any, lines: dict[str, list[Any]]) -> None:
    for name, points in lines.items():
        tokens, speeds = zip(*points, strict=True)
        style = {"color": _COLOURS.get(name, "#000000"), "linewidth": 1.4, "marker": "o"}
        style.update(markersize=3.5, label=_label(name), zorder=2)
        if name == "ours":
            style.update(linewidth=3, markersize=6, zorder=4)
        elif name == "ceiling":
            style.update(linestyle="--", marker="", label="copy or multiply", zorder=3)
        axes.plot(tokens, speeds, **style)
    counts = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xscale("log", base=2)
    # Every second of many: labels of neighbours would touch.
    shown = counts if len(counts) < 7 else counts[::2]
    axes.set_xticks(shown, [f"{count:,}" for count in shown])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("GB/s, read and written")
    size = f"{case.heads} heads x {case.head_dim}"
    axes.set_title(f"Bandwidth: {case.kind}, {case.dtype}, {size}", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _bars(axes: Any, host: list[dict[str, Any]]) -> None:
    rows = sorted(host, key=lambda row: -row["microseconds"])
    ours = [row["call"].startswith("ours") for row in rows]
    colours = [_COLOURS["ours"] if own else "#999999" for own in ours]
    bars = axes.barh(
        [row["call"] for row in rows], [row["microseconds"] for row in rows], color=colours
    )
    axes.bar_label(bars, [f"{row['microseconds']:.1f}" for row in rows], padding=3, fontsize=9)
    for label, own in zip(axes.get_yticklabels(), ours, strict=True):
        label.set_fontweight("bold" if own else "normal")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.margins(x=0.12)
    axes.set_xlabel("microseconds")
    axes.set_title("Host time a call, 1 token", fontsize=11)
