"""The page of models, in Markdown: what the command models prints, with every name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cupy_headnorm._commands import known_models
from cupy_headnorm._commands.known_models import SUPPORTED, Known, Match

_INTRODUCTION = """\
# Models

Find a model by its name, or by the `model_type` in its config.json (for diffusers, the
`_class_name`). In a terminal, `python -m cupy_headnorm models NAME` says more of one model, and
`python -m cupy_headnorm inspect MODEL_DIR` reads the norms of a folder that you have.

- **Supported**: `HeadNorm` computes the model's norms as the model does, to the rounding step.
- **Refused**: the model has norms that `HeadNorm` cannot compute; the reason is given.
- **No norms of heads**: there is nothing to normalize.
- A name that is not on this page is not known. Its folder may still be read: give `kind`, `eps`,
  `weight_offset` and `rounding` yourself.

The columns of the tables:

| column | meaning |
|---|---|
| kind | `rms` is RMSNorm, `layer` is LayerNorm |
| offset | what the model adds to the weight, `weight_offset` |
| rounding | where the model rounds, see below |
| RoPE | whether the rotary embedding comes before or after the norm; its pairs: `half` (a dim and \
the one half of the dims away), `interleaved` (neighbours), `half flipped` (the other sign); which \
share of the dims is rotated where it is not all of them and config.json does not say |

| rounding | what is rounded to the dtype of `x` |
|---|---|
"""


def markdown() -> str:
    """
    Return the page of models in Markdown.

    Returns
    -------
    str
        Tables by model type, and one by name. The same registry gives the same text.
    """
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION + "\n".join(
        f"| `{rounding}` | {words} |" for rounding, words in known_models.ROUNDINGS.items()
    )
    yield from _by_name()
    for title, members in known_models.sections().items():
        yield ""
        yield f"## {title}"
        yield ""
        if members[0].state == SUPPORTED:
            yield from _supported(known_models.families(members))
        elif members[0].family is not None:
            reasons = known_models.by_reason(members).items()
            rows = ((_types(refused), _names(refused), why) for why, refused in reasons)
            yield from _table(("model types", "names", "why"), rows)
        else:
            yield "No module of transformers' models of these types normalizes heads."
            yield ""
            header = ("model type", "names")
            yield from _table(header, ((_types([known]), _names([known])) for known in members))


def _by_name() -> Iterator[str]:
    every = (Match(name, known) for known in known_models.every() for name in known.names)
    yield ""
    yield "## By name"
    yield ""
    yield "A field in brackets is one of config.json that says whether the norms are there."
    yield ""
    rows = ((m.name, f"`{m.known.model_type}`", m.short) for m in sorted(every, key=_place))
    yield from _table(("name", "model type", "norms of heads"), rows)


def _place(match: Match) -> tuple[str, str]:
    return match.name.casefold(), match.known.model_type


def _supported(families: Sequence[Sequence[Known]]) -> Iterator[str]:
    rows = []
    for members in families:
        kind, offset, rounding, rope = known_models.facts(members[0])
        notes = [known_models.condition(members[0]), *_notes(members[0])]
        norms = ", ".join(members[0].norms)
        row = (_types(members), _names(members), norms, kind, offset, rounding, rope)
        rows.append((*row, "; ".join(filter(None, notes))))
    header = ("model types", "names", "norms of", "kind", "offset", "rounding", "RoPE", "notes")
    yield from _table(header, rows)


def _notes(known: Known) -> Iterator[str]:
    if known.family:
        yield f"RoPE: {known.family.rope.note}" if known.family.rope.note else ""
    for reason, roles in known.refusals.items():
        yield f"refused, {', '.join(dict.fromkeys(roles))}: {reason}"


def _types(members: Iterable[Known]) -> str:
    return ", ".join(f"`{known.model_type}`" for known in members)


def _names(members: Iterable[Known]) -> str:
    return ", ".join(dict.fromkeys(name for known in members for name in known.names))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"
