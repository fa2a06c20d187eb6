"""The command models: what is known of a model that is not downloaded yet."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from cupy_headnorm._commands import known_models, models_page
from cupy_headnorm._commands.known_models import NONE, REFUSED, SUPPORTED, Known, Match
from cupy_headnorm.bench.text import wrapped
from cupy_headnorm.checkpoint.files import short
from cupy_headnorm.models.records import Family, Role

_WIDTH = 80
_COLUMNS = (22, 5, 6, 13)
"""Widths in the list of all, where a longer model type has a line of its own."""
_WIDEST_NORMS = 24
_KEPT = "\xa0"
"""A space at which no line ends."""
_MOST_NEAR = 12
"""Names that go on where one ends."""


def run(chosen: argparse.Namespace) -> None:
    """Print what is known; of a name that nobody knows near ones, with exit status 1."""
    if chosen.markdown:
        print(models_page.markdown(), end="")
    elif chosen.name is None:
        print("\n".join(_listing()))
    else:
        print("\n".join(_answers(chosen.name)))


def _answers(asked: str) -> Iterator[str]:
    found, longer = known_models.find(asked), known_models.beginning(asked)
    if not (found or longer):
        sys.exit(f"cupy_headnorm: {_unknown(asked)}")
    for place, match in enumerate(found):
        yield from [""] if place else []
        yield from _answer(match)
    if not found:
        yield "Names that begin so"
        yield ""
        yield from _table(
            ("name", "model type", "norms of heads"),
            *((match.name, match.known.model_type, match.short) for match in longer),
        )
        return
    others = [m.name for m in longer if m.name in m.known.names and m not in found][:_MOST_NEAR]
    if others:
        yield ""
        yield from _labelled([("see also", _joined(others))])


def _unknown(asked: str) -> str:
    names = ", ".join(match.name for match in known_models.near(asked))
    near = f"; near names: {names}" if names else ""
    return (
        f"no model {short(asked)} is known{near}; python -m cupy_headnorm inspect MODEL_DIR says "
        "what a folder holds"
    )


def _answer(match: Match) -> Iterator[str]:
    """Say what is known of one model type."""
    name, known = match
    model_type = f"model type {known.model_type}"
    title = model_type if name == known.model_type else f"{name} ({model_type})"
    yield f"{title}: {match.state}"
    yield ""
    if known.family is None:
        yield from _labelled(
            [("why", "no module of transformers' model of this type normalizes heads")]
        )
        return
    condition = known_models.condition(known, name)
    if match.state == NONE:
        rest = [f"releases of {known.model_type} that set it have norms of heads"]
        yield from _labelled([("why", "; ".join([condition, *rest]))])
        return
    if known.roles:
        yield from _table(
            ("norm", "kind", "weight", "offset", "eps", "rounding"),
            *_rows(known.roles),
        )
        yield ""
    yield from _labelled(_remarks(known, known.family, condition))


def _rows(roles: Sequence[Role]) -> Iterator[tuple[str, ...]]:
    """Yield one row for the roles that are alike but in name."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for role in roles:
        eps = role.eps if isinstance(role.eps, str) else f"{role.eps:g}"
        weight = known_models.WEIGHTS[role.weight] + (", bias" if role.bias else "")
        row: tuple[str, ...] = (role.kind, weight, f"{role.weight_offset:g}", eps, role.rounding)
        alike.setdefault(row, []).append(role.name)
    for row, names in alike.items():
        first, *others = textwrap.wrap(", ".join(dict.fromkeys(names)), _WIDEST_NORMS)
        yield first, *row
        yield from ((other, *[""] * len(row)) for other in others)


def _remarks(known: Known, family: Family, condition: str) -> Iterator[tuple[str, str]]:
    if condition:
        yield "config", condition
    if family.tower in ("vision", "audio"):
        yield (
            "part",
            f"norms of the {family.tower} tower alone; its text model has a type of its own",
        )
    if any(role.weight_offset for role in known.roles):
        yield "offset", "the model adds it to the weight"
    fields = {role.eps for role in known.roles if isinstance(role.eps, str)}
    for field in sorted(fields & family.defaults.keys()):
        yield "eps", f"{family.defaults[field]:g} where config.json has no {field}"
    for rounding in dict.fromkeys(role.rounding for role in known.roles):
        yield "rounding", f"{rounding}: {known_models.ROUNDINGS[rounding]}"
    if known.roles:
        yield "RoPE", known_models.rope_in_words(family)
        if family.rope.note:
            yield "note", family.rope.note
    for reason, roles in known.refusals.items():
        names = ", ".join(dict.fromkeys(roles))
        yield "refused" if known.roles else "why", f"{names}: {reason}" if names else reason
    below = "/transformer" if family.tower == "transformer" else ""
    yield "next", f"python -m cupy_headnorm inspect MODEL_DIR{below}"


def _listing() -> Iterator[str]:
    """Say what is known of every model type, by family."""
    for title, members in known_models.sections().items():
        yield f"{title}: {len(members)} model types"
        yield ""
        if members[0].state == SUPPORTED:
            yield from _supported(known_models.families(members))
        elif members[0].state == REFUSED:
            for reason, refused in known_models.by_reason(members).items():
                yield from _wrapped(reason)
                yield from _wrapped(", ".join(map(_named, refused)), "  ")
        else:
            yield from _wrapped(", ".join(map(_named, members)), "  ")
        yield ""
    yield "python -m cupy_headnorm models NAME says more of one"


def _supported(families: Sequence[Sequence[Known]]) -> Iterator[str]:
    yield _row("model type", "kind", "offset", "rounding", "RoPE")
    for members in families:
        first, *others = members
        own_line = len(first.model_type) > _COLUMNS[0]
        yield from [first.model_type] if own_line else []
        yield _row("" if own_line else first.model_type, *known_models.facts(first))
        names = dict.fromkeys(name for known in members for name in known.names)
        yield from _wrapped(_joined(names), "  ")
        if others:
            yield from _wrapped(f"also {', '.join(known.model_type for known in others)}", "  ")
        if first.norms != ["q", "k"]:
            yield from _wrapped(f"norms of {', '.join(first.norms)}", "  ")
        if first.family and first.family.flag:
            yield f"  where config.json's {first.family.flag} says so"


def _row(*cells: str) -> str:
    return "  ".join(cell.ljust(w) for cell, w in zip(cells, (*_COLUMNS, 0), strict=True)).rstrip()


def _named(known: Known) -> str:
    return known.model_type + (f" ({_joined(known.names)})" if known.names else "")


def _joined(names: Iterable[str]) -> str:
    """Return names as a list; a line may end between two of them, not within one."""
    return ", ".join(name.replace(" ", _KEPT) for name in names)


def _table(*rows: Sequence[str]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _labelled(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield labels with the text beside them."""
    rows = list(rows)
    width = max((len(label) for label, _ in rows), default=0) + 2
    last = ""
    for label, text in rows:
        yield from _wrapped(text, " " * width, ("" if label == last else label).ljust(width))
        last = label


def _wrapped(text: str, indent: str = "", first: str | None = None) -> list[str]:
    """Return lines of no more than the width, where no word is longer; none is broken."""
    return [line.replace(_KEPT, " ") for line in wrapped(text, indent, first, _WIDTH)]
