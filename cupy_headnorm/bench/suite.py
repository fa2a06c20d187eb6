"""The suite: its cases, and the numbers to reach that its results are held against."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cupy_headnorm.bench import costs
from cupy_headnorm.bench.clocks import Timer
from cupy_headnorm.bench.providers import CEILINGS, is_ours
from cupy_headnorm.bench.record import Results, Timing, Verdict
from cupy_headnorm.bench.workloads import LAYOUTS, QK_CASE, Case, cases

Measured = Iterator[tuple[float, str]]
"""Numbers, and where each was found."""

_BYTES = 0.99 * 64e6
"""Of x: 64 MB, rounded down to whole tokens."""
PLAIN = (64, 96, 128, 192, 256, 512, 1024, 4096)
UNEVEN = (72, 80, 100, 112, 160)
ODD = (33, 37, 73, 111, 127, 129, 255, 1001)
UNLISTED = (40, 88, 120, 320)
_ROW_BYTES = 64


class Target(NamedTuple):
    """One number to reach, by all that `measured` yields."""

    what: str
    limit: float
    at_least: bool
    measured: Callable[[Results], Measured]


def case_of(timing: Timing) -> Case:
    """Return the case of a timing."""
    return Case(
        timing["tokens"], timing["num_heads"], timing["head_dim"], timing["dtype"], timing["kind"],
        timing["layout"], timing["num_kv_heads"],
    )  # fmt: skip


def _on_gpu(results: Results) -> list[Timing]:
    return [] if results.timer == "numpy" else results.timings


def _shares(fits: Callable[[Case], bool]) -> Callable[[Results], Measured]:
    def measured(results: Results) -> Measured:
        for timing in _on_gpu(results):
            case = case_of(timing)
            if timing["provider"] == "ours" and case.nbytes / 2 >= _BYTES and fits(case):
                yield timing["share"], str(case)

    return measured


def _out_of_place(kind: str) -> Callable[[Results], Measured]:
    return _shares(lambda c: c.kind == kind and c.head_dim in PLAIN and c.layout == "contiguous")


def _in_place_or_packed(kind: str) -> Callable[[Results], Measured]:
    return _shares(
        lambda c: (
            c.kind == kind and c.head_dim in PLAIN and (c.in_place or c.layout.startswith("packed"))
        )
    )


def _odd(case: Case) -> bool:
    row_bytes = case.nbytes // 2 // case.tokens // case.num_heads
    odd = case.layout in ("contiguous", "in-place") and case.head_dim not in PLAIN + UNEVEN
    return row_bytes >= _ROW_BYTES and (odd or case.layout == "misaligned")


def _qk_shares(tokens: int, *providers: str) -> Callable[[Results], Measured]:
    def measured(results: Results) -> Measured:
        for timing in _on_gpu(results):
            case, name = case_of(timing), timing["provider"]
            if case == QK_CASE._replace(tokens=tokens) and name in providers:
                yield timing["share"], f"{name}, {case}"

    return measured


def _one_token(
    against: Callable[[str], bool], case: Case = costs.HOST_CASE, ours: tuple[str, ...] = ("ours",)
) -> Callable[[Results], Measured]:
    """Compare the device time of one token with that of each provider that `against` names."""

    def measured(results: Results) -> Measured:
        spent = {
            timing["provider"]: timing["microseconds"]
            for timing in _on_gpu(results)
            if case_of(timing) == case
        }
        for own, (name, microseconds) in itertools.product(ours, spent.items()):
            if own in spent and against(name):
                yield spent[own] / microseconds, f"{own} {spent[own]} us, {name} {microseconds}"

    return measured


def _host(ours: str, theirs: str) -> Callable[[Results], Measured]:
    def measured(results: Results) -> Measured:
        spent = {row["call"]: row["microseconds"] for row in results.host}
        if ours in spent and theirs in spent:
            yield spent[ours] / spent[theirs], f"{spent[ours]} us, {theirs} {spent[theirs]}"

    return measured


def _once(*names: str, per: str = "") -> Callable[[Results], Measured]:
    def measured(results: Results) -> Measured:
        once = results.once
        for name in names:
            if name in once and (not per or per in once):
                yield once[name] / (once[per] if per else 1), name.replace("_", " ")

    return measured


def _is_peer(name: str) -> bool:
    return name not in CEILINGS and not is_ours(name)


_TURNED = ("ours", "ours-positions")
_MISSES = tuple(f"plan_miss_{name}_microseconds" for name in ("torch", "cupy", "sequences"))

TARGETS = (
    Target("rms, out of place: share of a copy", 0.98, True, _out_of_place("rms")),
    Target("rms, in place or packed: share", 0.94, True, _in_place_or_packed("rms")),
    Target("layer, out of place: share", 0.97, True, _out_of_place("layer")),
    Target("layer, in place or packed: share", 0.93, True, _in_place_or_packed("layer")),
    Target(
        "head_dim 72, 80, 100, 112, 160: share",
        0.97,
        True,
        _shares(lambda c: c.head_dim in UNEVEN and c.layout == "contiguous"),
    ),
    Target("other head_dim, misaligned: share", 0.80, True, _shares(_odd)),
    Target("1 token: times a copy", 1.30, False, _one_token(lambda name: name == "copy")),
    Target("1 token: times any peer", 1.0, False, _one_token(_is_peer)),
    Target(
        "host, in place on torch: times cuLaunchKernel",
        1.8,
        False,
        _host(costs.TORCH_IN_PLACE, costs.LAUNCH),
    ),
    Target(
        "host, in place on torch: times F.rms_norm",
        0.6,
        False,
        _host(costs.TORCH_IN_PLACE, costs.FUNCTIONAL),
    ),
    Target(
        "host, new result on torch: times F.rms_norm",
        1.0,
        False,
        _host(costs.TORCH_NEW, costs.FUNCTIONAL),
    ),
    Target(
        "host, in place on CuPy: times Function(...)",
        1.3,
        False,
        _host(costs.CUPY_IN_PLACE, costs.FUNCTION),
    ),
    Target("plan miss: us", 40, False, _once(*_MISSES)),
    Target("first call, cold: ms", 400, False, _once("first_call_cold_milliseconds")),
    Target("first call, disk cache: ms", 80, False, _once("first_call_disk_cache_milliseconds")),
    Target("import: ms", 80, False, _once("import_milliseconds")),
    Target("reference, 1 GiB: extra MiB", 16, False, _once("reference_extra_mebibytes")),
    Target(
        "reference: times faster than whole arrays",
        2.0,
        True,
        _once("whole_array_milliseconds", per="reference_milliseconds"),
    ),
    Target("q and k, 16,384 tokens: share", 0.94, True, _qk_shares(16384, *_TURNED)),
    Target("q and k, 4,096 tokens: share", 0.92, True, _qk_shares(4096, *_TURNED)),
    Target("q and k, not turned: share", 0.96, True, _qk_shares(16384, "ours-plain")),
    Target(
        "q and k, 1 token: times a copy",
        1.45,
        False,
        _one_token(lambda name: name == "copy", QK_CASE, _TURNED),
    ),
    Target(
        "q and k, 1 token: times two norms",
        1.0,
        False,
        _one_token(lambda name: name == "ours-two", QK_CASE, _TURNED),
    ),
)


def judge(results: Results) -> list[Verdict]:
    """Return a row for each target: ``measured`` is the worst that was found, ``where`` which."""
    rows: list[Verdict] = []
    for target in TARGETS:
        needed = f"{'at least' if target.at_least else 'at most'} {target.limit:g}"
        found = list(target.measured(results))
        measured, where = (min if target.at_least else max)(found, default=(None, None))
        met = None
        if measured is not None:
            met = measured >= target.limit if target.at_least else measured <= target.limit
            measured = round(measured, 3)
        rows.append(
            {
                "what": target.what,
                "needed": needed,
                "measured": measured,
                "where": where,
                "met": met,
            }
        )
    return rows


def suite(on: Timer) -> Iterator[tuple[Case, list[str] | None]]:
    """Yield the fixed set of cases, each with its providers; None is all that were found."""
    one = ([32], [128], ["bfloat16"])
    if on.name == "numpy":
        for case in cases([1, 16, 256, 4096], *one, ["rms", "layer"], ["contiguous"]):
            yield case, None
        for tokens in (1, 32):
            yield QK_CASE._replace(tokens=tokens), None
        return
    for case in cases([4**i for i in range(7)] + [8192, 32768], *one, ["rms"], ["contiguous"]):
        yield case, None
    for case in cases([1, 8192], *one, ["layer"], ["contiguous"]):
        yield case, None
    every = ["float16", "bfloat16", "float32"]
    for head_dims, dtypes, kinds, layouts in (
        (PLAIN, every, ["rms", "layer"], LAYOUTS[:-1]),
        (UNEVEN, every, ["rms", "layer"], ["contiguous"]),
        (ODD + UNLISTED, every, ["rms"], ["contiguous"]),
        ((37, 111), every[:2], ["rms", "layer"], ["in-place"]),
        ((64, 72, 128, 160, 256), every, ["rms"], ["misaligned"]),
    ):
        for case in cases([], [32], head_dims, dtypes, kinds, layouts, megabytes=64):
            yield case, ["ours"]
    for tokens in (1, 32, 4096, 16384):
        yield QK_CASE._replace(tokens=tokens), None
