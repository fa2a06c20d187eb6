"""The numbers to reach: what the results of a suite are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cupy_headnorm import _costs, _providers
from cupy_headnorm._providers import Case

Results = dict[str, Any]
Measured = Iterator[tuple[float, str]]
"""Numbers, and where each was found."""

_BYTES = 0.99 * 64e6
"""Of x: 64 MB, rounded down to whole tokens."""
PLAIN = (64, 96, 128, 192, 256, 512, 1024, 4096)
UNEVEN = (72, 80, 100, 112, 160)
ODD = (33, 37, 73, 111, 127, 129, 255, 1001)
_ROW_BYTES = 64


class Target(NamedTuple):
    """One number to reach, by all that `measured` yields."""

    what: str
    limit: float
    at_least: bool
    measured: Callable[[Results], Measured]


def case_of(timing: dict[str, Any]) -> Case:
    """Return the case of a timing."""
    return Case(**{field: timing[field] for field in Case._fields})


def _on_gpu(results: Results) -> list[dict[str, Any]]:
    return [] if results["timer"] == "numpy" else results["timings"]


def _shares(fits: Callable[[Case], bool]) -> Callable[[Results], Measured]:
    def measured(results: Results) -> Measured:
        for timing in _on_gpu(results):
            case = case_of(timing)
            if timing["provider"] == "ours" and case.nbytes / 2 >= _BYTES and fits(case):
                yield timing["share"], str(case)

    return measured


def _out_of_place(kind: str) -> Callable[[Results], Measured]:
    return _shares(lambda c: c.kind == kind and c.head_dim in PLAIN and c.layout == "contiguous")


def _elsewhere(kind: str) -> Callable[[Results], Measured]:
    return _shares(
        lambda c: (
            c.kind == kind and c.head_dim in PLAIN and (c.in_place or c.layout.startswith("packed"))
        )
    )


def _odd(case: Case) -> bool:
    row_bytes = case.nbytes // 2 // case.tokens // case.num_heads
    odd = case.layout == "contiguous" and case.head_dim not in PLAIN + UNEVEN
    return row_bytes >= _ROW_BYTES and (odd or case.layout == "misaligned")


def _one_token(against: Callable[[str], bool]) -> Callable[[Results], Measured]:
    """Compare the device time of one token with that of each provider that `against` names."""

    def measured(results: Results) -> Measured:
        spent = {
            timing["provider"]: timing["microseconds"]
            for timing in _on_gpu(results)
            if case_of(timing) == _costs.HOST_CASE
        }
        for name, microseconds in spent.items():
            if "ours" in spent and against(name):
                yield spent["ours"] / microseconds, f"{spent['ours']} us, {name} {microseconds}"

    return measured


def _host(ours: str, theirs: str) -> Callable[[Results], Measured]:
    def measured(results: Results) -> Measured:
        spent = {row["call"]: row["microseconds"] for row in results["host"]}
        if ours in spent and theirs in spent:
            yield spent[ours] / spent[theirs], f"{spent[ours]} us, {theirs} {spent[theirs]}"

    return measured


def _once(*names: str, per: str = "") -> Callable[[Results], Measured]:
    def measured(results: Results) -> Measured:
        once = results["once"]
        for name in names:
            if name in once and (not per or per in once):
                yield once[name] / (once[per] if per else 1), name.replace("_", " ")

    return measured


def _is_peer(name: str) -> bool:
    return name not in _providers.CEILINGS + _providers.OURS


_MISSES = ("plan_miss_torch_microseconds", "plan_miss_cupy_microseconds")

TARGETS = (
    Target("rms, out of place: share of a copy", 0.98, True, _out_of_place("rms")),
    Target("rms, in place or packed: share", 0.94, True, _elsewhere("rms")),
    Target("layer, out of place: share", 0.97, True, _out_of_place("layer")),
    Target("layer, in place or packed: share", 0.93, True, _elsewhere("layer")),
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
        _host(_costs.TORCH_IN_PLACE, _costs.LAUNCH),
    ),
    Target(
        "host, in place on torch: times F.rms_norm",
        0.6,
        False,
        _host(_costs.TORCH_IN_PLACE, _costs.FUNCTIONAL),
    ),
    Target(
        "host, new result on torch: times F.rms_norm",
        1.0,
        False,
        _host(_costs.TORCH_NEW, _costs.FUNCTIONAL),
    ),
    Target(
        "host, in place on CuPy: times Function(...)",
        1.3,
        False,
        _host(_costs.CUPY_IN_PLACE, _costs.FUNCTION),
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
)


def judge(results: Results) -> list[dict[str, Any]]:
    """
    Return a row for each target: ``what``, ``needed``, ``measured``, ``where`` and ``met``.

    ``measured`` is the worst that was found, ``where`` says which; both are None, as ``met`` is,
    where nothing was measured.
    """
    rows = []
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
