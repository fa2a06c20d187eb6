"""The layers of a model, by the names of its tensors, and which part of its config is theirs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cupy_headnorm.checkpoint.files import CheckpointError, short
from cupy_headnorm.models import BY_MODEL_TYPE
from cupy_headnorm.models.records import Family

PLACE = re.compile(
    r"(?:(?P<prefix>.+)\.)?(?P<stack>\w*layers?|\w*blocks?|\w*refiner|h)"
    r"\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<rest>.+)"
)
"""The name of what lies in a numbered layer: ``model.layers.0.self_attn.q_norm.weight``."""

MAIN_TOWERS = ("text", "transformer")

_PLAIN_WORDS = {
    "", "model", "base_model", "module", "backbone", "transformer", "language_model", "text_model",
    "thinker", "llm",
}  # fmt: skip
"""Of prefixes: they tell nothing."""
_PLAIN_STACKS = {"layers", "layer", "blocks", "block", "h", "transformer_blocks"}

_DEEPEST = 32
"""Modules within one another; models have 10."""
_MOST_FIELDS = 1000
"""Of a config and of each one in it; models have 150."""


class Group(NamedTuple):
    """Layers that are numbered together: ``model.layers``, ``visual.blocks``."""

    prefix: str
    stack: str
    layers: dict[int, dict[str, str]]
    """For each layer the tensors' full names by what comes after the number."""

    @property
    def words(self) -> list[str]:
        """Modules on the way to the layers."""
        return self.prefix.split(".")

    @property
    def sense(self) -> str:
        """``"vision"``, ``"audio"`` or, for the model's main part, ``""``."""
        return next(filter(None, map(_sense, self.words)), "")

    @property
    def label(self) -> str:
        """Words that tell these layers from a model's main ones: ``"vision"``, ``"single"``."""
        plain = _PLAIN_WORDS | ({"encoder", "decoder"} if self.sense else set())
        words = [_sense(word) or word for word in self.words if word not in plain]
        if self.stack not in _PLAIN_STACKS:
            words.append(re.sub("_?(transformer_)?(layers?|blocks?)$", "", self.stack))
        return "_".join(word for word, _ in itertools.groupby(words) if word)

    def module(self, layer: int, stem: str) -> str:
        """Return the full name of a module of a layer."""
        before = f"{self.prefix}." if self.prefix else ""
        return f"{before}{self.stack}.{layer}.{stem}"


def _sense(word: str) -> str:
    for sense, signs in (("vision", ("vision", "visual")), ("audio", ("audio",))):
        if any(sign in word.lower() for sign in signs):
            return sense
    return ""


def groups_of(names: Iterable[str]) -> list[Group]:
    """Return the groups of layers, the main ones first; one without tensors where none is main."""
    found: dict[tuple[str, str], Group] = {}
    for name in names:
        # Names are shown: one that could steer a terminal is no norm's. Each of its modules is
        # looked for in config.json.
        shown = name.isprintable() and name.count(".") <= _DEEPEST
        place = PLACE.fullmatch(name) if shown else None
        if place:
            at = (place["prefix"] or "", place["stack"])
            group = found.setdefault(at, Group(*at, {}))
            group.layers.setdefault(int(place["layer"]), {})[place["rest"]] = name
    if all(group.sense for group in found.values()):
        found["", ""] = Group("", "layers", {})
    return sorted(found.values(), key=lambda group: (bool(group.sense), group.label != ""))


def model_type_of(config: Mapping[str, Any]) -> str:
    """Return a config's model type; diffusers writes the class's name instead."""
    name = config.get("model_type") or config.get("_class_name") or "a config without a type"
    told = name[:100] if isinstance(name, str) else short(name, 100)
    return (told if told.isprintable() else ascii(told))[:100]


class Tower(NamedTuple):
    """A part of the model: its own config, and the row that says what it does."""

    family: Family | None
    config: Mapping[str, Any]
    model_type: str


class _Fields(NamedTuple):
    """What is looked up in a config, or in one within it, for each module of each group."""

    places: Mapping[str, int]
    """Of each field its place among them: the first one that fits is taken."""
    senses: Mapping[str, str]
    """For each sense the first field that is named for it and is not null."""
    has_senses: bool
    """Whether a field is named for a sense, null or not."""
    model_type: str


def _fields_of(config: Mapping[str, Any]) -> _Fields:
    if len(config) > _MOST_FIELDS:
        raise CheckpointError(
            f"config.json has {len(config)} fields in one place; needs {_MOST_FIELDS} at most"
        )
    named = {name: sense for name in config if name.endswith("_config") and (sense := _sense(name))}
    given = [(sense, name) for name, sense in named.items() if config[name] is not None]
    places = {name: place for place, name in enumerate(config)}
    return _Fields(places, dict(reversed(given)), bool(named), model_type_of(config))


class Towers:
    """The towers of a model, by its config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._known: dict[int, _Fields] = {}
        """By identity of a config: a look at all of its fields for each group has no end."""

    def of(self, group: Group) -> Tower:
        """Return the tower of a group of layers: by its own model type, else its parent's."""
        path = [self._config]
        if "talker" not in group.words:
            self._descend(path, "thinker_config")
        for word in filter(None, group.words):
            self._descend(path, f"{word}_config", word, sense=_sense(word))
        if not group.sense:
            self._descend(path, "text_config", "llm_config")
        # A model of one tower, saved alone, calls its layers what it likes.
        alone = len(path) == 1 and not self._fields(self._config).has_senses
        for around in reversed(path):
            model_type = self._fields(around).model_type
            family = BY_MODEL_TYPE.get(model_type)
            if family and (
                alone or group.sense == ("" if family.tower in MAIN_TOWERS else family.tower)
            ):
                return Tower(family, path[-1], model_type)
        return Tower(None, path[-1], self._fields(path[-1]).model_type)

    def _fields(self, config: Mapping[str, Any]) -> _Fields:
        known = self._known.get(id(config))
        if known is None:
            known = self._known[id(config)] = _fields_of(config)
        return known

    def _descend(self, path: list[Mapping[str, Any]], *names: str, sense: str = "") -> None:
        """Go to the first config within the last one that has one of the names, or the sense."""
        fields = self._fields(path[-1])
        fits = {*names, fields.senses.get(sense, "")} & fields.places.keys()
        for name in sorted(fits, key=fields.places.__getitem__):
            nested = path[-1][name]
            if isinstance(nested, Mapping):
                path.append(nested)
                return
            if name.endswith("_config") and nested is not None:
                raise CheckpointError(f"config.json's {name} is {short(nested)}; needs an object")


def main_tower(config: Mapping[str, Any]) -> Tower:
    """Return the tower of a model's text, or its decoder's; without one, what the model is."""
    decoder = isinstance(config.get("decoder"), Mapping)
    found = Towers(config).of(Group("decoder" if decoder else "", "layers", {}))
    if found.family is None:
        model_type = model_type_of(config)
        if model_type in BY_MODEL_TYPE:
            return Tower(BY_MODEL_TYPE[model_type], config, model_type)
    return found
