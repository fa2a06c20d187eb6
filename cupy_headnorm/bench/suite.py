"""The suite: its cases, and the numbers to reach that its results are held against."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

from cupy_headnorm._rules.options import KINDS
from cupy_headnorm.bench.clocks import Timer
from cupy_headnorm.bench.costs import (
    CUPY_IN_PLACE,
    FUNCTION,
    FUNCTIONAL,
    LAUNCH,
    TORCH_IN_PLACE,
    TORCH_NEW,
)
from cupy_headnorm.bench.providers import PROVIDERS, is_peer
from cupy_headnorm.bench.record import Results, Timing, Verdict
from cupy_headnorm.bench.workloads import HOST_CASE, LAYOUTS, QK_CASE, Case, cases

Measured = Iterator[tuple[float, str]]
"""Numbers, and where each was found."""

_BYTES = 0.99 * 64e6
"""The size of x: 64 MB, rounded down to whole tokens."""
PLAIN = (64, 96, 128, 192, 256, 512, 1024, 4096)
UNEVEN = (72, 80, 100, 112, 160)
ODD = (33, 37, 73, 111, 127, 129, 255, 1001)
UNLISTED = (40, 88, 120, 320)
_ROW_BYTES = 64
_OUT_OF_PLACE, _IN_PLACE_OR_PACKED = LAYOUTS[:1], LAYOUTS[1:-1]
_PEERS = [name for name in PROVIDERS if is_peer(name)]
_ROTATED = ("ours", "ours-positions")


def case_of(timing: Timing) -> Case:
    """Return the case of a timing."""
    fields: Any = timing
    return Case(*(fields[name] for name in Case._fields))


def _on_gpu(results: Results) -> Iterator[tuple[Case, str, Timing]]:
    """Yield what was timed on a GPU: the case, the provider and the timing itself."""
    for timing in [] if results.timer == "numpy" else results.timings:
        yield case_of(timing), timing["provider"], timing


def _shares(results: Results, fits: Callable[[Case], bool]) -> Measured:
    for case, provider, timing in _on_gpu(results):
        if provider == "ours" and case.nbytes / 2 >= _BYTES and fits(case):
            yield timing["share"], str(case)


def _plain(kind: str, layouts: Collection[str]) -> Callable[[Case], bool]:
    return lambda case: case.kind == kind and case.head_dim in PLAIN and case.layout in layouts


def _uneven(case: Case) -> bool:
    return case.head_dim in UNEVEN and case.layout in _OUT_OF_PLACE


def _odd(case: Case) -> bool:
    odd = case.layout in ("contiguous", "in-place") and case.head_dim not in PLAIN + UNEVEN
    long = case.head_dim * case.element.itemsize >= _ROW_BYTES
    return long and (odd or case.layout == "misaligned")


def _qk_shares(results: Results, tokens: int, *providers: str) -> Measured:
    for case, provider, timing in _on_gpu(results):
        if case == QK_CASE._replace(tokens=tokens) and provider in providers:
            yield timing["share"], f"{provider}, {case}"


def _one_token(results: Results, case: Case, ours: Collection[str], *others: str) -> Measured:
    spent = {name: timing["microseconds"] for at, name, timing in _on_gpu(results) if at == case}
    for own in spent.keys() & ours:
        for name in spent.keys() & others:
            yield spent[own] / spent[name], f"{own} {spent[own]} us, {name} {spent[name]}"


def _host(results: Results, ours: str, theirs: str) -> Measured:
    spent = {row["call"]: row["microseconds"] for row in results.host}
    if ours in spent and theirs in spent:
        yield spent[ours] / spent[theirs], f"{spent[ours]} us, {theirs} {spent[theirs]}"


def _once(results: Results, *names: str) -> Measured:
    for name in names:
        if name in results.once:
            yield results.once[name], name.replace("_", " ")


def _times_faster(results: Results, fast: str, slow: str) -> Measured:
    once = results.once
    if fast in once and slow in once:
        yield once[slow] / once[fast], slow.replace("_", " ")


_MISSES = [f"plan_miss_{name}_microseconds" for name in ("torch", "cupy", "sequences")]
_REFERENCE = ("reference_milliseconds", "whole_array_milliseconds")
_SENSES = {">=": ("at least", min, operator.ge), "<=": ("at most", max, operator.le)}
"""How it is said, which of some numbers is the worst, and whether that one is enough."""

TARGETS: tuple[tuple[Any, ...], ...] = (
    ("rms, out of place: share of a copy", ">=", 0.98, _shares, _plain("rms", _OUT_OF_PLACE)),
    ("rms, in place or packed: share", ">=", 0.94, _shares, _plain("rms", _IN_PLACE_OR_PACKED)),
    ("layer, out of place: share", ">=", 0.97, _shares, _plain("layer", _OUT_OF_PLACE)),
    ("layer, in place or packed: share", ">=", 0.93, _shares, _plain("layer", _IN_PLACE_OR_PACKED)),
    ("head_dim 72, 80, 100, 112, 160: share", ">=", 0.97, _shares, _uneven),
    ("other head_dim, misaligned: share", ">=", 0.80, _shares, _odd),
    ("1 token: times a copy", "<=", 1.30, _one_token, HOST_CASE, ["ours"], "copy"),
    ("1 token: times any peer", "<=", 1.0, _one_token, HOST_CASE, ["ours"], *_PEERS),
    ("host, in place on torch: times cuLaunchKernel", "<=", 1.8, _host, TORCH_IN_PLACE, LAUNCH),
    ("host, in place on torch: times F.rms_norm", "<=", 0.6, _host, TORCH_IN_PLACE, FUNCTIONAL),
    ("host, new result on torch: times F.rms_norm", "<=", 1.0, _host, TORCH_NEW, FUNCTIONAL),
    ("host, in place on CuPy: times Function(...)", "<=", 1.3, _host, CUPY_IN_PLACE, FUNCTION),
    ("plan miss: us", "<=", 40, _once, *_MISSES),
    ("first call, cold: ms", "<=", 400, _once, "first_call_cold_milliseconds"),
    ("first call, disk cache: ms", "<=", 80, _once, "first_call_disk_cache_milliseconds"),
    ("import: ms", "<=", 80, _once, "import_milliseconds"),
    ("reference, 1 GiB: extra MiB", "<=", 16, _once, "reference_extra_mebibytes"),
    ("reference: times faster than whole arrays", ">=", 2.0, _times_faster, *_REFERENCE),
    ("q and k, 16,384 tokens: share", ">=", 0.94, _qk_shares, 16384, *_ROTATED),
    ("q and k, 4,096 tokens: share", ">=", 0.92, _qk_shares, 4096, *_ROTATED),
    ("q and k, not turned: share", ">=", 0.96, _qk_shares, 16384, "ours-plain"),
    ("q and k, 1 token: times a copy", "<=", 1.45, _one_token, QK_CASE, _ROTATED, "copy"),
    ("q and k, 1 token: times two norms", "<=", 1.0, _one_token, QK_CASE, _ROTATED, "ours-two"),
)
"""For each number to reach: its name in files, its limit, the function that finds it, of what."""


def judge(results: Results) -> list[Verdict]:
    """Return a row for each target: ``measured`` is the worst that was found, ``where`` which."""
    rows: list[Verdict] = []
    for what, sense, limit, measure, *given in TARGETS:
        words, worst, meets = _SENSES[sense]
        measured, where = worst(measure(results, *given), default=(None, None))
        row: Verdict = {
            "what": what,
            "needed": f"{words} {limit:g}",
            "measured": None if measured is None else round(measured, 3),
            "where": where,
            "met": None if measured is None else meets(measured, limit),
        }
        rows.append(row)
    return rows


_EVERY = ("float16", "bfloat16", "float32")
_OURS_ALONE = (
    (PLAIN, _EVERY, KINDS, LAYOUTS[:-1]),
    (UNEVEN, _EVERY, KINDS, ["contiguous"]),
    (ODD + UNLISTED, _EVERY, ["rms"], ["contiguous"]),
    ((37, 111), _EVERY[:2], KINDS, ["in-place"]),
    ((64, 72, 128, 160, 256), _EVERY, ["rms"], ["misaligned"]),
)
"""Cases of 64 MB, for shares: head_dims, dtypes, kinds and layouts, each with each."""


def suite(on: Timer) -> Iterator[tuple[Case, list[str] | None]]:
    """Yield the fixed set of cases, each with its providers; None is all that were found."""
    on_gpu = on.name != "numpy"
    compared: list[dict[str, Any]] = [{"kind": KINDS, "tokens": [1, 16, 256, 4096]}]
    if on_gpu:
        tokens = [4**i for i in range(7)] + [8192, 32768]
        compared = [{"tokens": tokens}, {"kind": ["layer"], "tokens": [1, 8192]}]
    for fields in compared:
        for case in cases(HOST_CASE, **fields):
            yield case, None
    for head_dims, dtypes, kinds, layouts in _OURS_ALONE if on_gpu else ():
        for case in cases(
            HOST_CASE, 64, head_dim=head_dims, dtype=dtypes, kind=kinds, layout=layouts
        ):
            yield case, ["ours"]
    for case in cases(QK_CASE, tokens=[1, 32, 4096, 16384] if on_gpu else [1, 32]):
        yield case, None
