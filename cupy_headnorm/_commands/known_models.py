"""What the registry says of a model: found by its name, and in words."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cupy_headnorm.models import BY_MODEL_TYPE
from cupy_headnorm.models.names import NAMES, SETS_FLAG, WITHOUT
from cupy_headnorm.models.records import Family, Role

SUPPORTED, REFUSED, NONE = "supported", "refused", "no norms of heads"

_FULL = (
    "where one weight spans all heads they are normalized together, not each on its own; "
    "HeadNorm.from_pretrained(folder, key, num_heads=1) does that, as one head"
)
WEIGHTS: Mapping[str, str] = {
    "shared": "one for all heads",
    "per head": "one a head",
    "flat": "one a head, flat",
    "list": "one a head, each a tensor",
    "none": "none",
}
ROUNDINGS: Mapping[str, str] = {
    "once": "the result is rounded once",
    "before_weight": "the normalized value is rounded, and its product with the weight",
    "every_op": "the normalized value, its product with the weight and the sum are rounded",
    "rstd": "the inverse root is rounded, and its product with x",
}
_MAKERS = {"meta", "c4ai", "nvidia"}
"""Words before a name on the hub: Meta-Llama-3-8B."""
_BEHIND = re.compile(
    r"(?:e|\d+x)?\d+(?:\.\d+)?[bmkt]|a\d+(?:\.\d+)?[bm]|\d+e"  # sizes: 0.6B, 8x7B, A3B, 16E
    r"|v0\.?\d+|v1(?:\.\d+)?|0\d|\d{4,8}"  # versions and dates: v0.1, 2507
    r"|base|chat|instruct|it|pt|hf|sft|dpo|thinking|reasoning|preview|turbo|distilled|diffusers"
    r"|mini|micro|medium|large|dev|schnell|[ti]2[iv]|\d+p"
    r"|gguf|mlx|awq|gptq|exl[23]|bnb|nvfp4|mxfp[48]|(?:bf|fp|int)\d+|\d+bit|i?q\d\w*|[klms]|dynamic"
)
"""Words behind a name that say nothing of its norms."""
_ACTIVE = re.compile(r"a\d+(?:\.\d+)?[bm]")
"""How much of a mixture of experts is active, A3B: there may be a type of its own for those."""


class Known(NamedTuple):
    """A model type that is known."""

    model_type: str
    names: tuple[str, ...]
    family: Family | None
    """Its row; None where it has no norms of heads."""

    @property
    def roles(self) -> list[Role]:
        """What is supported."""
        if self.family is None or self.family.refused:
            return []
        return [role for role in self.family.roles if not role.refused and role.weight != "full"]

    @property
    def norms(self) -> list[str]:
        """Names of the roles that are supported."""
        return list(dict.fromkeys(role.name for role in self.roles))

    @property
    def refusals(self) -> Mapping[str, list[str]]:
        """Why what is refused is, with the names of the roles: none where it is all of them."""
        if self.family is None:
            return {}
        if self.family.refused:
            return {self.family.refused: []}
        found: dict[str, list[str]] = {}
        for role in self.family.roles:
            reason = role.refused or (_FULL if role.weight == "full" else "")
            if reason:
                found.setdefault(reason, []).append(role.name)
        return found

    @property
    def state(self) -> str:
        return NONE if self.family is None else SUPPORTED if self.roles else REFUSED


class Match(NamedTuple):
    """A name that was asked for, as we write it."""

    name: str
    known: Known

    @property
    def state(self) -> str:
        """The answer in short: a release without the norms of its family has none."""
        return NONE if SETS_FLAG.get(self.name) is False else self.known.state

    @property
    def short(self) -> str:
        """The state in a cell of a table: of which roles, and whether config.json decides."""
        family = self.known.family
        if self.state != SUPPORTED or family is None:
            return self.state
        decides = f" ({family.flag})" if family.flag and self.name not in SETS_FLAG else ""
        return f"{self.state}: {', '.join(self.known.norms)}{decides}"


def every() -> list[Known]:
    """Return all types that are known, in the order of the registry."""
    rows = [Known(name, NAMES.get(name, ()), row) for name, row in BY_MODEL_TYPE.items()]
    return rows + [Known(name, names, None) for name, names in WITHOUT.items()]


def find(asked: str) -> list[Match]:
    """Return what a name means; nothing where nobody knows it."""
    index = _index()
    words = _words(asked)
    active = any(map(_ACTIVE.fullmatch, words))
    while words:
        key = _key(words)
        if active and f"{key}moe" in index:
            key += "moe"
        if key in index:
            return list(index[key])
        if not _BEHIND.fullmatch(words.pop()):
            break
    return []


def beginning(asked: str) -> list[Match]:
    """Return names that go on where this one ends: GLM-4.5 of GLM."""
    key = _name_key(asked)
    longer = [name for name in _index() if key and name.startswith(key) and name != key]
    return _each(longer)


def near(asked: str) -> list[Match]:
    """Return the names most like this one: where it begins, and of its letters."""
    index = _index()
    words = _words(asked)
    begins = (_key(words[:length]) for length in range(len(words), 0, -1))
    found = [next((key for key in begins if key in index), "")]
    named = [key for key, found in index.items() if any(m.name in m.known.names for m in found)]
    for keys in (named, list(index)):
        like = difflib.get_close_matches(_name_key(asked), keys, n=4)
        if like:
            break
    return _each(filter(None, (*found, *like)))


def _each(keys: Iterable[str]) -> list[Match]:
    """Return one match a name, sorted; of a type that has names no other."""
    found = [match for key in keys for match in _index()[key]]
    named = {match.known.model_type for match in found if match.name in match.known.names}
    kept = {
        (match.name.casefold(), match.known.model_type): match
        for match in found
        if match.name in match.known.names or match.known.model_type not in named
    }
    return [kept[key] for key in sorted(kept)]


@functools.cache
def _index() -> Mapping[str, Sequence[Match]]:
    index: dict[str, list[Match]] = {}
    for known in every():
        for name in (*known.names, known.model_type):
            matches = index.setdefault(_key(_split(name)), [])
            if known not in (match.known for match in matches):
                matches.append(Match(name, known))
    return index


def _split(name: str) -> list[str]:
    """Return a name's words, in small letters: ``Command R+`` and ``command-r-plus`` alike."""
    last = re.sub(r"\.(gguf|safetensors)$", "", name.casefold().strip("/").rpartition("/")[2])
    words = re.split(r"[\s_:-]+", last)
    return ["+" if word == "plus" else word for word in words if word]


def _words(asked: str) -> list[str]:
    words = _split(asked)
    return words[1:] if len(words) > 1 and words[0] in _MAKERS else words


def _key(words: Iterable[str]) -> str:
    return "".join(c for word in words for c in word if c.isalnum() or c == "+")


def _name_key(asked: str) -> str:
    """Return a name's key without the words behind it."""
    words = _words(asked)
    while len(words) > 1 and _BEHIND.fullmatch(words[-1]):
        words.pop()
    return _key(words)


def rope_of(family: Family) -> str:
    """Return order, style and share of the rotary embedding."""
    rope, share = family.rope, _share(family)
    if rope.order == "none":
        return "none"
    return f"{rope.order}, {rope.style}" + (f", {share:g}" if share != 1 else "")


def rope_in_words(family: Family) -> str:
    """Return order, style and share of the rotary embedding, in a sentence's part."""
    rope, share = family.rope, _share(family)
    if rope.order == "none":
        return "none"
    whole = "all dims" if share == 1 else f"{share:g} of the dims"
    return f"{rope.order}, {rope.style}; rotates {whole}, unless config.json says otherwise"


def _share(family: Family) -> float:
    share = family.rotary.share
    return share if isinstance(share, float) else family.rope.partial


def facts(known: Known) -> tuple[str, str, str, str]:
    """Return kind, offset, rounding and RoPE of what is supported."""

    def cell(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    assert known.family is not None
    return (
        cell(role.kind for role in known.roles),
        cell(f"{role.weight_offset:g}" for role in known.roles),
        cell(role.rounding for role in known.roles),
        rope_of(known.family),
    )


def condition(known: Known, name: str = "") -> str:
    """Say when the norms are there, where config.json decides; nothing where they always are."""
    family = known.family
    if family is None or not family.flag:
        return ""
    if name in SETS_FLAG:
        sets = "sets" if SETS_FLAG[name] else "does not set"
        return f"{name}'s own config.json {sets} {family.flag}"
    missing = "there" if family.defaults.get(family.flag) else "not there"
    absent = f", {missing} where it is missing" if family.flag in family.defaults else ""
    return (
        f"config.json's {family.flag} says whether the norms are there{absent}; their tensors win "
        "over it"
    )


_TOWERS = {"text": "text", "vision": "vision and audio", "audio": "vision and audio"}


def sections() -> Mapping[str, list[Known]]:
    """Return all types by what is said of them: supported ones by the part of a model too."""
    found: dict[str, list[Known]] = {}
    order = ("text", "vision and audio", "diffusion")
    for title in (*(f"Supported, {part}" for part in order), "Refused", "No norms of heads"):
        found[title] = []
    for known in every():
        title = known.state.capitalize()
        if known.state == SUPPORTED and known.family:
            title = f"Supported, {_TOWERS.get(known.family.tower, 'diffusion')}"
        found[title].append(known)
    return found


def families(members: Iterable[Known]) -> list[list[Known]]:
    """Return types of one row together."""
    found: dict[int, list[Known]] = {}
    for known in members:
        found.setdefault(id(known.family), []).append(known)
    return list(found.values())


def by_reason(members: Iterable[Known]) -> Mapping[str, list[Known]]:
    """Return types that are refused for the same reasons together, by these."""
    found: dict[str, list[Known]] = {}
    for known in members:
        reasons = (
            f"{', '.join(dict.fromkeys(roles))}: {reason}" if roles else reason
            for reason, roles in known.refusals.items()
        )
        found.setdefault("; ".join(reasons), []).append(known)
    return found
