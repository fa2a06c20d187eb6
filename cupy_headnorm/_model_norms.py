"""Which head norms a model has: its config.json and tensor headers, read by rows of `models`."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import _dtypes, checkpoint
from cupy_headnorm._model_config import Fields, short
from cupy_headnorm.checkpoint import CheckpointError
from cupy_headnorm.models import BY_MODEL_TYPE, Family, Role, Rope

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype, as safetensors spells it, and shape by name."""

ARGUMENTS = "HeadNorm.from_safetensors(path, key, kind=, eps=, weight_offset=, rounding=)"


class UnknownModelError(CheckpointError):
    """Nothing is known of a model, or of one tensor of it, and it looks like a head norm."""


class ModelNorm(NamedTuple):
    """One norm of a model: where its tensors lie and what the model computes with them."""

    name: str
    """
    The module's, as on disk or in memory: ``model.layers.0.self_attn.q_norm``; an unweighted
    norm's is what its module is called, or would be.
    """
    tower: str
    """``"text"``, ``"vision"``, ``"audio"``, ``"transformer"``, or words of the name's prefix."""
    layer: int
    role: str
    weights: tuple[str, ...]
    """Tensors: one; several where each head has its own; none."""
    biases: tuple[str, ...]
    kind: str
    eps: float
    weight_offset: float
    rounding: str
    result: str
    num_heads: int | None
    """The model's, if known; where all heads share the weight any number is served."""
    head_dim: int
    heads_axis: int
    shape: tuple[int, ...]
    """Of the weight as it is read; ``()`` without one."""
    dtype: str
    """As safetensors spells it; ``""`` without a weight."""
    rope: Rope
    notes: tuple[str, ...]


class Refused(NamedTuple):
    """A norm that is not served, or a tensor that looks like one."""

    name: str
    tower: str
    layer: int
    role: str
    """Empty where `models` has no such role."""
    shape: tuple[int, ...]
    dtype: str
    reason: str
    unknown: bool = False
    """Nothing is known of it; arguments could say it all."""


class ModelNorms(NamedTuple):
    """All that was found, by tower and layer."""

    model_type: str
    norms: tuple[ModelNorm, ...]
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]

    def keyed(self) -> dict[tuple[int, str], ModelNorm | Refused]:
        """
        Return norms by layer and role.

        The roles of the text tower, or of the only one, are ``"q"``, ``"k"``, ...; those of
        others carry its name: ``"vision_q"``.
        """
        found = [*self.norms, *(norm for norm in self.refused if norm.role)]
        one = len({norm.tower for norm in found}) == 1
        keyed: dict[tuple[int, str], ModelNorm | Refused] = {}
        for norm in found:
            role = norm.role if one or norm.tower in _MAIN else f"{norm.tower}_{norm.role}"
            other = keyed.setdefault((norm.layer, role), norm)
            if other is not norm:
                raise CheckpointError(
                    f"{other.name} and {norm.name} are both {role} of layer {norm.layer}; "
                    "needs one of them"
                )
        return keyed


def find(config: Mapping[str, Any], tensors: Tensors, *, full_width: bool = False) -> ModelNorms:
    """
    Find every head norm of a model.

    Parameters
    ----------
    config : mapping
        What config.json holds.
    tensors : mapping
        Dtype, as safetensors spells it, and shape by name: of files, or of a module's state dict.
    full_width : bool, optional
        Give norms over all heads together as norms of one head, instead of refusing them.

    Raises
    ------
    CheckpointError
        A shape contradicts config.json or a projection; a head of a list is missing.
    UnknownModelError
        No part of the model is known, and there are tensors that look like head norms.
    """
    top = _type_of(config)
    norms: list[ModelNorm] = []
    refused: list[Refused] = []
    strangers: list[Refused] = []
    notes: list[str] = []
    known = False
    flags: dict[str, Any] = {}
    for group in _groups(tensors):
        tower = _tower(config, group)
        taken: set[str] = set()
        if tower.family is not None:
            known = True
            reader = _Reader(group, tower, tensors)
            own = list(reader.norms(full_width))
            norms += [norm for norm in own if isinstance(norm, ModelNorm)]
            refused += [norm for norm in own if isinstance(norm, Refused)]
            if reader.flag:
                flags.setdefault(tower.family.flag, reader.flag)
                if own:
                    flags[tower.family.flag] = None
            if tower.family.refused and not own:
                notes.append(f"{tower.model_type}: {tower.family.refused}")
            taken = reader.taken
        what = f"{'such a norm of ' * (tower.family is not None)}{tower.model_type}"
        strangers += [
            Refused(
                re.sub(r"(\.norms\.\d+)?\.\w+$", "", name), group.label or "text", layer, "",
                tuple(tensors[name][1]), tensors[name][0],
                f"nothing is known of {what}; {ARGUMENTS} would say it", unknown=True,
            )
            for layer, rests in group.layers.items()
            for rest, name in rests.items()
            if name not in taken and _LOOKS.fullmatch(rest)
        ]  # fmt: skip
    if strangers and not known:
        raise UnknownModelError(
            f"nothing is known of {top}, and these tensors look like head norms: "
            f"{_listed(strangers)}; needs kind, eps, weight_offset and rounding: {ARGUMENTS}"
        )
    notes += [
        f"config.json's {flag} is {value}; no tensor of a norm is there"
        for flag, value in flags.items()
        if value
    ]
    if not known:
        notes.append(f"nothing is known of {top}, and no tensor looks like a head norm")
    elif not (norms or refused or strangers or notes):
        notes.append(f"no tensor of a head norm of {top} is there")
    refused += dict.fromkeys(strangers)
    found = ModelNorms(top, tuple(norms), tuple(refused), tuple(dict.fromkeys(notes)))
    found.keyed()  # refuses two norms in one place
    return found


class Survey(NamedTuple):
    """A model's folder: what is in it, and where."""

    config: dict[str, Any]
    tensors: Tensors
    where: Mapping[str, Path]
    """The file that holds each tensor."""
    found: ModelNorms


def survey(folder: Any, *, variant: str | None = None, full_width: bool = False) -> Survey:
    """Read a folder's config and headers and `find` its norms; errors are those of all three."""
    config = checkpoint.config(folder)
    tensors, where = checkpoint.survey(folder, variant=variant)
    return Survey(config, tensors, where, find(config, tensors, full_width=full_width))


def read(
    folder: Any, key: str, *, variant: str | None = None, full_width: bool = False
) -> tuple[ModelNorm, np.ndarray | None, np.ndarray | None]:
    """
    Read one norm of a model: what the model computes, its weight and its bias.

    Parameters
    ----------
    folder : path-like
        With config.json and the tensors.
    key : str
        The module's name, on disk or in memory: prefixes may differ where one norm fits.
    variant : str, optional
        Part of the files' names, such as ``"fp16"``.
    full_width : bool, optional
        Read a norm over all heads together as a norm of one head.

    Raises
    ------
    CheckpointError
        The key is not found, or the norm is refused; beside the errors of `survey`.
    UnknownModelError
        Nothing is known of the model or of this norm.
    TypeError
        The key is no string.
    """
    if not isinstance(key, str):
        raise TypeError(f"key is {key!r}; needs a norm's name")
    _, tensors, where, found = survey(folder, variant=variant, full_width=full_width)
    every = {norm.name: norm for norm in reversed((*found.norms, *found.refused))}
    norm = every.get(key) or _under_another_prefix(every, key)
    if norm is None and f"{key}.weight" in tensors:
        raise UnknownModelError(
            f"{folder} has {key}.weight, of which nothing is known; {ARGUMENTS} would say it"
        )
    if norm is None:
        near = difflib.get_close_matches(key, list(every), n=3, cutoff=0.5) or list(every)[-3:]
        what = f"needs one of its, such as {', '.join(near)}" if near else "; ".join(found.notes)
        raise CheckpointError(f"{folder} has no head norm {key}; {what}")
    served = serve(norm)
    return served, *load(where, served)


def serve(norm: ModelNorm | Refused) -> ModelNorm:
    """Return a norm; CheckpointError with the reason if it is refused."""
    if isinstance(norm, Refused):
        kind = UnknownModelError if norm.unknown else CheckpointError
        raise kind(f"{norm.name} is refused: {norm.reason}")
    return norm


def load(where: Mapping[str, Path], norm: ModelNorm) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read the weight and the bias of a norm; `survey` says where they are."""

    def array(names: tuple[str, ...]) -> np.ndarray | None:
        if _one_each(norm.name, names):
            return checkpoint.read_heads(where, names)
        return checkpoint.read_one(where, names[0]) if names else None

    return array(norm.weights), array(norm.biases)


def _one_each(name: str, tensors: tuple[str, ...]) -> bool:
    """Tell whether each head has a module of its own below `name`."""
    return bool(tensors) and tensors[0].startswith(f"{name}.norms.")


def without_layer(name: str) -> str:
    """Return a module's name with a star for its layer."""
    place = _PLACE.fullmatch(name)
    return f"{name[: place.start('layer')]}*{name[place.end('layer') :]}" if place else name


def ranges(layers: list[int]) -> str:
    """Write layers as ``"0-4, 6-10, 12"``."""
    told = []
    for _, run in itertools.groupby(enumerate(sorted(layers)), lambda at: at[1] - at[0]):
        numbers = [layer for _, layer in run]
        told.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(told)


def _listed(strangers: list[Refused]) -> str:
    alike: dict[str, list[int]] = {}
    for norm in dict.fromkeys(strangers):
        told = f"{without_layer(norm.name)} {norm.dtype} {norm.shape}"
        alike.setdefault(told, []).append(norm.layer)
    listed = [f"{told} in layers {ranges(layers)}" for told, layers in alike.items()]
    more = [f"{len(listed) - _MOST_LISTED} more"] if len(listed) > _MOST_LISTED else []
    return ", ".join(listed[:_MOST_LISTED] + more)


_MAIN = ("text", "transformer")
_PLACE = re.compile(
    r"(?:(?P<prefix>.+)\.)?(?P<stack>\w*layers?|\w*blocks?|\w*refiner|h)"
    r"\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<rest>.+)"
)
_LOOKS = re.compile(
    r"(?:.*[._])?(?:(?:q|k|v|qk|query|key|value)_?(?:rms_?|layer_?|l2_?)?(?:norm|ln)"
    r"|(?:layer_?)?norm_(?:added_)?(?:q|k|v))"
    r"(?:\.norms\.\d+)?\.(?:weight|gamma|scale|temp)"
)
_PLAIN_WORDS = {
    "", "model", "base_model", "module", "backbone", "transformer", "language_model", "text_model",
    "thinker", "llm",
}  # fmt: skip
"""Of prefixes: they tell nothing."""
_PLAIN_STACKS = {"layers", "layer", "blocks", "block", "h", "transformer_blocks"}
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "depth", "n_layer", "n_layers")
_MOST_LAYERS = 10_000
_MOST_LISTED = 8
_WHOLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Dtypes that no quantization packs: a projection's rows are rows."""


class _Group(NamedTuple):
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


def _groups(tensors: Tensors) -> list[_Group]:
    """Return the groups of layers, the main ones first, and one without tensors if none is."""
    found: dict[tuple[str, str], _Group] = {}
    for name in tensors:
        # Names are shown: one that could steer a terminal is no norm's.
        place = _PLACE.fullmatch(name) if name.isprintable() else None
        if place:
            at = (place["prefix"] or "", place["stack"])
            group = found.setdefault(at, _Group(*at, {}))
            group.layers.setdefault(int(place["layer"]), {})[place["rest"]] = name
    if all(group.sense for group in found.values()):
        found["", ""] = _Group("", "layers", {})
    return sorted(found.values(), key=lambda group: (bool(group.sense), group.label != ""))


def _type_of(config: Mapping[str, Any]) -> str:
    """Return a config's model type; diffusers writes the class's name instead."""
    name = str(config.get("model_type") or config.get("_class_name") or "a config without a type")
    return name if name.isprintable() else repr(name)


class _Tower(NamedTuple):
    """A part of the model: its own config, and the row that says what it does."""

    family: Family | None
    config: Mapping[str, Any]
    model_type: str


def _tower(config: Mapping[str, Any], group: _Group) -> _Tower:
    """Return the tower that a group of layers is of: by its own model type, else its parent's."""
    path = [config]

    def descend(*names: str, sense: str = "") -> None:
        for name, nested in path[-1].items():
            named = name.endswith("_config")
            if not (name in names or (sense and named and _sense(name) == sense)):
                continue
            if isinstance(nested, Mapping):
                path.append(nested)
                return
            if named and nested is not None:
                raise CheckpointError(f"config.json's {name} is {short(nested)}; needs an object")

    if "talker" not in group.words:
        descend("thinker_config")
    for word in filter(None, group.words):
        descend(f"{word}_config", word, sense=_sense(word))
    if not group.sense:
        descend("text_config", "llm_config")
    # A model of one tower, saved alone, calls its layers what it likes.
    alone = len(path) == 1 and not any(_sense(name) for name in config if name.endswith("_config"))
    for around in reversed(path):
        model_type = _type_of(around)
        family = BY_MODEL_TYPE.get(model_type)
        if family and (alone or group.sense == ("" if family.tower in _MAIN else family.tower)):
            return _Tower(family, path[-1], model_type)
    return _Tower(None, path[-1], _type_of(path[-1]))


def _under_another_prefix(
    every: Mapping[str, ModelNorm | Refused], key: str
) -> ModelNorm | Refused | None:
    """Return the one norm that differs from `key` in its prefix, of the same tower."""

    def place(name: str) -> tuple[str, ...] | None:
        found = _PLACE.fullmatch(name)
        if not found:
            return None
        label = _Group(found["prefix"] or "", found["stack"], {}).label
        return label, found["stack"], found["layer"], found["rest"]

    wanted = place(key)
    fits = [norm for name, norm in every.items() if wanted and place(name) == wanted]
    return fits[0] if len(fits) == 1 else None


class _Reader:
    """Reads one group of layers by one family's row."""

    def __init__(self, group: _Group, tower: _Tower, tensors: Tensors) -> None:
        self.group = group
        self.tower = tower
        self.tensors = tensors
        self.fields = Fields(tower.config, tower.family)
        flag = tower.family.flag
        self.flag = self.fields.get(flag) if flag else None
        """Whether there are norms, where config.json or its class says so."""
        self.count = next(filter(None, map(self.fields.count, _LAYER_COUNTS)), None)
        """Layers of the tower, where config.json says it."""
        self.taken: set[str] = set()
        """Names of the tensors that a role claims."""
        self.label = group.label or tower.family.tower
        self.attentions = {stem.rpartition(".")[0] for r in tower.family.roles for stem in r.stems}

    def norms(self, full_width: bool) -> Iterator[ModelNorm | Refused]:
        """Yield every norm, by layer and role."""
        roles = self.tower.family.roles
        # A norm without a weight asks others of its layer.
        order = sorted(roles, key=lambda role: role.weight == "none")
        for layer in self._layers():
            fits: dict[str, list[tuple[Role, ModelNorm | Refused]]] = {}
            misfits: dict[str, CheckpointError] = {}
            for role in order:
                try:
                    norm = self._norm(role, layer, fits)
                except CheckpointError as error:
                    misfits.setdefault(role.name, error)
                else:
                    if norm is not None:
                        fits.setdefault(role.name, []).append((role, norm))
            for name, error in misfits.items():
                if name not in fits:
                    raise error
            # Of one key-value head a weight for all heads looks like one a head: others decide.
            sure = {found[0][0].weight for found in fits.values() if len(found) == 1}
            for name in dict.fromkeys(role.name for role in roles if role.name in fits):
                role, norm = next((f for f in fits[name] if f[0].weight in sure), fits[name][0])
                if role.weight == "full" and isinstance(norm, ModelNorm) and not full_width:
                    heads = self.fields.count(role.heads, layer) or "all"
                    norm = _refuse(
                        norm,
                        f"{self.tower.model_type} normalizes {heads} heads together, not each on "
                        "its own; num_heads=1 serves that, as one head",
                    )
                yield norm

    def _layers(self) -> list[int]:
        found = set(self.group.layers)
        unweighted = any(role.weight == "none" for role in self.tower.family.roles)
        if unweighted and not self.group.label and self.count is not None:
            if self.count > _MOST_LAYERS:
                raise CheckpointError(
                    f"config.json says {self.count} layers; needs {_MOST_LAYERS} at most"
                )
            found |= set(range(self.count))
        return sorted(found)

    def _norm(
        self, role: Role, layer: int, fits: Mapping[str, list[tuple[Role, ModelNorm | Refused]]]
    ) -> ModelNorm | Refused | None:
        """Return one norm if this layer has it."""
        family, model_type = self.tower.family, self.tower.model_type
        if role.weight == "none":
            if not self._unweighted_here(role, layer):
                return None
            stem, parts = role.stems[0], {}
        else:
            stems = {
                stem: parts for stem in role.stems if (parts := self._parts(role, stem, layer))
            }
            if not stems:
                return None
            if len(stems) > 1:
                names = " and ".join(self.group.module(layer, stem) for stem in stems)
                raise CheckpointError(f"{names} are both {role.name} of layer {layer}; needs one")
            ((stem, parts),) = stems.items()
        weights, biases = tuple(parts.get(role.tensor, ())), tuple(parts.get("bias", ()))
        self.taken |= {*weights, *biases}
        name = self.group.module(layer, stem)
        dtype, shape = self._stored(name, weights)
        norm = ModelNorm(
            name, self.label, layer, role.name, weights, biases,
            role.kind, 0.0, role.weight_offset, role.rounding, role.result, None, 0,
            role.heads_axis, shape, dtype, family.rope, (),
        )  # fmt: skip
        if reason := family.refused or role.refused:
            return _refuse(norm, f"{model_type}: {reason}")
        bias_dtype, bias_shape = self._stored(name, biases)
        for stored in filter(None, (dtype, bias_dtype)):
            if stored not in _dtypes.BY_SAFETENSORS:
                return _refuse(norm, f"its dtype is {stored}; needs {_dtypes.NEEDED}")
        if role.weight != "none" and (not weights or bool(biases) != role.bias):
            has = " and ".join(part for part in (role.tensor, "bias") if part in parts)
            wanted = f"{role.tensor} and bias" if role.bias else f"{role.tensor} alone"
            raise CheckpointError(
                f"{norm.name} has {has}; {model_type} needs {wanted}, or {ARGUMENTS}"
            )
        if biases and bias_shape != shape:
            raise CheckpointError(
                f"{weights[0]} has shape {shape} and {biases[0]} {bias_shape}; needs one shape"
            )
        notes: list[str] = []
        if self.flag is not None and not self.flag:
            notes.append(
                f"config.json's {family.flag} is {self.flag}; the tensors are there and win"
            )
        if self.count is not None and layer >= self.count and not self.group.label:
            notes.append(f"layer {layer} is beyond config.json's {self.count}: it predicts ahead")
        num_heads, head_dim = self._geometry(role, norm, fits, notes)
        return norm._replace(
            eps=self.fields.eps(role),
            num_heads=num_heads,
            head_dim=head_dim,
            rope=self.fields.rope(family.rope, layer, head_dim),
            notes=tuple(notes),
        )

    def _parts(self, role: Role, stem: str, layer: int) -> dict[str, list[str]]:
        """Return the names of a module's weights and biases: one each, or one a head."""
        rests = self.group.layers.get(layer, {})
        parts = {}
        for part in (role.tensor, "bias"):
            found = [rest for rest in (f"{stem}.{part}",) if rest in rests]
            heads = checkpoint.heads_of(rests, stem, part)
            if found and heads:
                raise CheckpointError(
                    f"{rests[found[0]]} and {rests[heads[0]]} are both there; needs one of them"
                )
            if found or heads:
                parts[part] = [rests[rest] for rest in found or heads]
        return parts

    def _stored(self, name: str, weights: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a norm's weight, stacked where each head has its own."""
        if not weights:
            return "", ()
        stored = sorted({self.tensors[weight] for weight in weights})
        if len(stored) > 1:
            told = " and ".join(f"{dtype} {tuple(shape)}" for dtype, shape in stored)
            raise CheckpointError(
                f"{weights[0]} and its like are {told}; needs one dtype and shape"
            )
        dtype, shape = stored[0]
        return dtype, ((len(weights), *shape) if _one_each(name, weights) else tuple(shape))

    def _unweighted_here(self, role: Role, layer: int) -> bool:
        """Tell whether a layer has a norm without tensors: config.json says it."""
        rests = self.group.layers.get(layer, {})
        if rests and not any(rest.startswith(tuple(self.attentions)) for rest in rests):
            return False
        if self.flag is not None and not self.flag:
            return False
        field, _, other = role.layers.partition(":")
        if field == "role":
            others = [each for each in self.tower.family.roles if each.name == other]
            return any(self._parts(each, stem, layer) for each in others for stem in each.stems)
        if field == "no_rope_layers" and not self.fields.get(field):
            # transformers makes its own list where there is none.
            return (layer + 1) % (self.fields.count("no_rope_layer_interval") or 1) != 0
        here = self.fields.get(field, layer) if field else True
        if type(here) not in (bool, int):
            raise CheckpointError(
                f"config.json's {field} is {short(here)} for layer {layer}; needs 1 or 0"
            )
        return bool(here)

    def _geometry(
        self,
        role: Role,
        norm: ModelNorm,
        fits: Mapping[str, list[tuple[Role, ModelNorm | Refused]]],
        notes: list[str],
    ) -> tuple[int | None, int]:
        """Return num_heads and head_dim; whatever says them must say the same."""
        dims = self.fields.head_dims(role, norm.layer)
        heads = self.fields.count(role.heads, norm.layer)
        shape = norm.shape
        if role.weight == "none":
            other = role.layers.removeprefix("role:")
            beside = [n for name in (other, *fits) for _, n in fits.get(name, ())]
            beside = [n for n in beside if isinstance(n, ModelNorm)]
            if beside and not dims:
                return (beside[0].num_heads if other else None), beside[0].head_dim
            if not dims:
                raise CheckpointError(
                    f"{norm.name} has no weight, and config.json says no head_dim; needs "
                    f"{' or '.join(role.head_dim)}"
                )
            head_dim = next(iter(dims.values()))
            return self._checked(role, norm, heads, head_dim, notes), head_dim
        allowed, num_heads = set(dims.values()), heads
        if role.weight == "full":
            allowed = {heads * dim for dim in allowed} if heads else set()
            num_heads = 1
        elif role.weight == "flat" and heads and len(shape) == 1 and shape[0] % heads == 0:
            shape = (heads, shape[0] // heads)
        one_each = role.weight not in ("shared", "full")
        if one_each and shape:
            num_heads = shape[0]
        if (
            len(shape) != 1 + one_each
            or 0 in shape
            or (allowed and shape[-1] not in allowed)
            or (one_each and heads not in (None, num_heads))
        ):
            said = [f"{rule} = {dim}" for rule, dim in dims.items()] or ["no head_dim"]
            raise CheckpointError(
                f"{norm.weights[0]} has shape {norm.shape}, and config.json says "
                f"{role.heads} = {heads} and {' or '.join(said)}; {self.tower.model_type} needs "
                f"{_SHAPES[role.weight]}"
            )
        return self._checked(role, norm, num_heads, shape[-1], notes), shape[-1]

    def _checked(
        self, role: Role, norm: ModelNorm, heads: int | None, head_dim: int, notes: list[str]
    ) -> int | None:
        """Return the number of heads, compared with the rows of the projection that makes them."""
        name = role.projection and self.group.module(norm.layer, f"{role.projection}.weight")
        dtype, shape = self.tensors.get(name, ("", ()))
        if dtype not in _WHOLE or len(shape) != 2:
            what = role.projection.rpartition(".")[2] or "projection"
            why = f"{what} is packed" if dtype else f"no {what} to check against"
            if heads is not None and role.weight != "full":
                notes.append(f"config.json decides num_heads: {why}")
            return heads
        rows = head_dim * role.projection_factor
        found, rest = divmod(shape[0], rows)
        if rest or not found or heads not in (None, found):
            other = f", and {norm.name} is of {heads} by its shape or config.json's {role.heads}"
            raise CheckpointError(
                f"{name} has {shape[0]} rows, {shape[0] / rows:g} heads of {rows}"
                f"{'; needs whole heads' if heads is None else f'{other}; needs one number'}"
            )
        return found


_SHAPES = {
    "shared": "(head_dim,)",
    "per head": "(num_heads, head_dim)",
    "list": "(head_dim,) for each of num_heads",
    "flat": "(num_heads * head_dim,)",
    "full": "(num_heads * head_dim,)",
}


def _refuse(norm: ModelNorm, reason: str) -> Refused:
    return Refused(norm.name, norm.tower, norm.layer, norm.role, norm.shape, norm.dtype, reason)
