"""The results of a bench: one record, which is written to a file and read from one."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any, TypedDict

from cupy_headnorm._rules import options


class Timing(TypedDict):
    """Device time of one provider on one case."""

    tokens: int
    num_heads: int
    num_kv_heads: int
    """It is 0 but for the kind ``qk-rope``."""
    head_dim: int
    dtype: str
    kind: str
    layout: str
    provider: str
    microseconds: float
    gigabytes_per_second: float
    """Counted are x, or q and k, read once, and the result, written once."""
    share: float
    """The speed as a part of the ceiling, the better of a copy and an in-place multiply."""


class HostTime(TypedDict):
    """Host time of one kind of call for one token."""

    call: str
    microseconds: float


class Verdict(TypedDict):
    """What was measured of a number to reach; None where nothing was."""

    what: str
    needed: str
    measured: float | None
    where: str | None
    met: bool | None


@dataclasses.dataclass
class Results:
    """All that a bench measured; a file holds the same names, and others may be there too."""

    device: str
    """Name of the GPU or processor."""
    date: str
    """As in ISO 8601."""
    command: str
    """What was run."""
    timer: str
    """Whose arrays were timed: ``torch`` or ``cupy`` on a GPU, ``numpy`` on the host."""
    versions: dict[str, str]
    """The versions of all that has a part in the numbers."""
    timings: list[Timing] = dataclasses.field(default_factory=list)
    host: list[HostTime] = dataclasses.field(default_factory=list)
    once: dict[str, float] = dataclasses.field(default_factory=dict)
    """Numbers that are measured once; a name ends in the unit."""
    targets: list[Verdict] = dataclasses.field(default_factory=list)
    unavailable: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why a provider, or a cost, was not measured."""


_TYPES: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("text", (str,)),
    str | None: ("text or null", (str, type(None))),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    float | None: ("a number or null", (int, float, type(None))),
    bool | None: ("true, false or null", (bool, type(None))),
    list: ("a list", (list,)),
    dict: ("names with values", (dict,)),
}
"""For each annotation its name, and what JSON may have read for it."""
_LATER: dict[str, type] = {"targets": list, "num_kv_heads": int}
"""What older files lack; it is an empty list, or 0."""


def write(results: Results, path: Path) -> None:
    """Write results as JSON."""
    text = json.dumps(dataclasses.asdict(results), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> Results:
    """Read results that `write` wrote; ValueError where the file holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); needs a file of --json") from error
    try:
        _check(found, Results, "")
    except ValueError as error:
        raise ValueError(f"{path} {error}, as a file of --json or --suite") from None
    return Results(**{field.name: found[field.name] for field in dataclasses.fields(Results)})


def _check(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError where a part of a file is not of the annotation `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    needed, types = _TYPES.get(kind) or _TYPES[origin or dict]
    finite = type(value) not in (int, float) or abs(value) <= sys.float_info.max
    if not finite or type(value) not in types:
        raise ValueError(f"holds {where or 'only'} {options.shown(value)}; needs {needed}")
    if origin is list:
        for i, entry in enumerate(value):
            _check(entry, args[0], f"{where}[{i}]")
        return
    kinds = {}
    if origin is dict:
        kinds = dict.fromkeys(value, args[1])
    elif kind not in _TYPES:
        kinds = typing.get_type_hints(kind)
        for name in _LATER.keys() & kinds.keys():
            value.setdefault(name, _LATER[name]())
        missing = [name for name in kinds if name not in value]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}{where and f' in {where}'}; needs it")
    for name in kinds:
        _check(value[name], kinds[name], f"{where}.{name}".lstrip("."))
