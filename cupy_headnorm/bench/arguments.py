"""The options of ``bench``, and all that is refused of them before anything is measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from cupy_headnorm._arrays.dtypes import DTYPES
from cupy_headnorm._rules.options import KINDS
from cupy_headnorm.bench import report, workloads
from cupy_headnorm.bench.providers import OPS, PROVIDERS, QK_PROVIDERS
from cupy_headnorm.bench.workloads import HOST_CASE, LAYOUTS, NORM, QK_CASE, Case

_CASES = {
    "op": NORM,
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `command.run` reads."""
    parser.add_argument(
        "--op",
        choices=tuple(OPS),
        help="qk-rope: q and k of one packed buffer, normalized and rotated in place",
    )
    parser.add_argument("--tokens", type=count, nargs="+")
    parser.add_argument("--megabytes", type=_size, help="size of x, instead of --tokens")
    parser.add_argument("--num-heads", type=count, nargs="+")
    parser.add_argument("--num-kv-heads", type=count, nargs="+", help="of qk-rope")
    parser.add_argument("--head-dim", type=count, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=[dtype.name for dtype in DTYPES])
    parser.add_argument("--kind", nargs="+", choices=KINDS)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS)
    parser.set_defaults(**_CASES)
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help=f"default: all found of {', '.join(PROVIDERS)}; of qk-rope: {', '.join(QK_PROVIDERS)}",
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
    parser.add_argument(
        "--all",
        dest="whole",
        action="store_true",
        help="print all timings of --suite or --from too, not the numbers to reach alone",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .png or .svg")


def check(chosen: argparse.Namespace) -> None:
    """Raise before minutes are spent on what was not meant or could not be written."""
    given = [name for name, default in _CASES.items() if getattr(chosen, name) != default]
    if chosen.providers:
        given.append("providers")
    for is_chosen, what, unread in (
        (chosen.source is not None, "--from", {*_CASES, "providers"}),
        (chosen.host, "--host", {*_CASES}),
        (chosen.suite is not None, "--suite", {*_CASES}),
        (chosen.op == NORM, f"--op {NORM}", {"num_kv_heads"}),
        (chosen.op != NORM, f"--op {chosen.op}", {"kind", "layout"}),
        (chosen.megabytes is not None, "--megabytes", {"tokens"}),
    ):
        told = ", ".join(f"--{name.replace('_', '-')}" for name in given if name in unread)
        if is_chosen and told:
            raise ValueError(f"{what} is given with {told}; needs it without")
    for name, folder in (
        ("suite", chosen.suite),
        ("json", chosen.json and chosen.json.parent),
        ("plot", chosen.plot and chosen.plot.parent),
    ):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} would write to {folder}; needs a folder that is there")
    if chosen.plot is not None:
        report.check_plot(chosen.plot)
    known = list(dict.fromkeys(name for op in ops(chosen) for name in OPS[op]))
    for name in chosen.providers or ():
        if name not in known:
            raise ValueError(f"provider {name!r} is not known; needs one of {', '.join(known)}")


def ops(chosen: argparse.Namespace) -> list[str]:
    """Return the operations that are measured."""
    return [chosen.op] if chosen.suite is None else list(OPS)


def cases(chosen: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that options describe."""
    base, fields = HOST_CASE, ["num_heads", "head_dim", "dtype", "kind", "layout", "tokens"]
    if chosen.op != NORM:
        base, fields = QK_CASE, ["num_heads", "head_dim", "dtype", "num_kv_heads", "tokens"]
    if chosen.megabytes is not None:
        fields.remove("tokens")
    varied = {name: getattr(chosen, name) for name in fields}
    return workloads.cases(base, chosen.megabytes, **varied)
