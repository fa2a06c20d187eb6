"""The norms of one group of layers, read by its family's row of `models`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cupy_headnorm._arrays import dtypes
from cupy_headnorm.checkpoint import tensors as checkpoint_tensors
from cupy_headnorm.checkpoint.config import Fields
from cupy_headnorm.checkpoint.files import CheckpointError, short
from cupy_headnorm.checkpoint.layers import Group
from cupy_headnorm.checkpoint.norms import (
    ARGUMENTS,
    FORMS,
    Found,
    ModelNorm,
    Tensors,
    one_each,
    refuse,
)
from cupy_headnorm.models.records import Family, Role

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "depth", "n_layer", "n_layers")
_MOST_LAYERS = 1000
"""config.json alone tells of no more, in a few bytes; models have 126."""
_WHOLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Dtypes that no quantization packs: a projection's rows are rows."""
_Fits = Mapping[str, list[tuple[Role, Found]]]
"""The roles of one layer by their name, each with the norm that it finds."""


class Reader:
    """Reads one group of layers by one family's row."""

    def __init__(
        self,
        group: Group,
        family: Family,
        config: Mapping[str, Any],
        model_type: str,
        tensors: Tensors,
        counted: bool,
    ) -> None:
        self.group = group
        self.counted = counted
        """Whether the layers are all that config.json counts, or those that tensors name."""
        self.family = family
        self.model_type = model_type
        self.tensors = tensors
        self.fields = Fields(config, family)
        self.flag = self.fields.get(family.flag) if family.flag else None
        """Whether there are norms, where config.json or its class says so."""
        self.num_layers = next(filter(None, map(self.fields.count, _LAYER_COUNTS)), None)
        """Layers of the tower, where config.json says it."""
        self.taken: set[str] = set()
        """Names of the tensors that a role claims."""
        self.tower = group.label or family.tower
        self.attentions = {stem.rpartition(".")[0] for r in family.roles for stem in r.stems}
        """Modules of a layer that may hold norms."""

    def norms(self, full_width: bool) -> Iterator[Found]:
        """Yield every norm, by layer and role."""
        roles = self.family.roles
        # A norm without a weight asks others of its layer.
        order = sorted(roles, key=lambda role: role.weight == "none")
        for layer in self._layers():
            fits: dict[str, list[tuple[Role, Found]]] = {}
            misfits: dict[str, CheckpointError] = {}
            for role in order:
                try:
                    norm = self._norm(role, layer, fits)
                except CheckpointError as error:
                    misfits.setdefault(role.name, error)
                else:
                    if norm is not None:
                        fits.setdefault(role.name, []).append((role, norm))
            for name, misfit in misfits.items():
                if name not in fits:
                    raise misfit
            # Of one key-value head a weight for all heads looks like one a head: others decide.
            sure = {found[0][0].weight for found in fits.values() if len(found) == 1}
            for name in dict.fromkeys(role.name for role in roles if role.name in fits):
                role, norm = next((f for f in fits[name] if f[0].weight in sure), fits[name][0])
                if role.weight == "full" and isinstance(norm, ModelNorm) and not full_width:
                    heads = self.fields.count(role.heads, layer) or "all"
                    norm = refuse(
                        norm,
                        f"{self.model_type} normalizes {heads} heads together, not each on its "
                        "own; HeadNorm.from_pretrained(folder, key, num_heads=1) does that, as "
                        "one head",
                    )
                yield norm

    def _layers(self) -> list[int]:
        found = set(self.group.layers)
        unweighted = any(role.weight == "none" for role in self.family.roles)
        if unweighted and self.counted and self.num_layers is not None:
            if self.num_layers > _MOST_LAYERS:
                raise CheckpointError(
                    f"config.json says {self.num_layers} layers; needs {_MOST_LAYERS} at most"
                )
            found |= set(range(self.num_layers))
        return sorted(found)

    def _norm(self, role: Role, layer: int, fits: _Fits) -> Found | None:
        """Return one norm if this layer has it."""
        family, model_type = self.family, self.model_type
        if role.weight == "none":
            if not self._unweighted_here(role, layer):
                return None
            stem, named = role.stems[0], {}
        else:
            stems = {
                stem: named for stem in role.stems if (named := self._tensors_of(role, stem, layer))
            }
            if not stems:
                return None
            if len(stems) > 1:
                names = " and ".join(self.group.module(layer, stem) for stem in stems)
                raise CheckpointError(f"{names} are both {role.name} of layer {layer}; needs one")
            ((stem, named),) = stems.items()
        weights, biases = tuple(named.get(role.tensor, ())), tuple(named.get("bias", ()))
        self.taken |= {*weights, *biases}
        name = self.group.module(layer, stem)
        dtype, shape = self._stored(name, weights)
        norm = ModelNorm(
            name, self.tower, layer, role.name, weights, biases, role.kind, eps=0.0,
            weight_offset=role.weight_offset, rounding=role.rounding, result=role.result,
            num_heads=None, head_dim=0, heads_axis=role.heads_axis, shape=shape, dtype=dtype,
            rope=family.rope, notes=(), model_type=model_type,
        )  # fmt: skip
        if reason := family.refused or role.refused:
            return refuse(norm, f"{model_type}: {reason}")
        bias_dtype, bias_shape = self._stored(name, biases)
        for stored in filter(None, (dtype, bias_dtype)):
            if stored == checkpoint_tensors.LACKING:
                return refuse(norm, "the index names its tensor, and the file lacks it")
            if stored not in dtypes.BY_SAFETENSORS:
                return refuse(norm, f"its dtype is {stored}; needs {dtypes.NEEDED}")
        if role.weight != "none" and (not weights or bool(biases) != role.bias):
            has = " and ".join(tensor for tensor in (role.tensor, "bias") if tensor in named)
            wanted = f"{role.tensor} and bias" if role.bias else f"{role.tensor} alone"
            raise CheckpointError(
                f"{norm.name} has {has}; {model_type} needs {wanted}, or {ARGUMENTS}"
            )
        if biases and bias_shape != shape:
            raise CheckpointError(
                f"{weights[0]} has shape {short(shape)} and {biases[0]} {short(bias_shape)}; "
                "needs one shape"
            )
        notes: list[str] = []
        if self.flag is not None and not self.flag:
            notes.append(
                f"config.json's {family.flag} is {short(self.flag)}; the tensors are there and win"
            )
        if self.num_layers is not None and layer >= self.num_layers and not self.group.label:
            notes.append(
                f"layer {layer} is beyond config.json's {self.num_layers}: it predicts ahead"
            )
        num_heads, head_dim = self._geometry(role, norm, fits, notes)
        return norm._replace(
            eps=self.fields.eps(role),
            num_heads=num_heads,
            head_dim=head_dim,
            rope=self.fields.rope(family.rope, layer, head_dim),
            notes=tuple(notes),
        )

    def _tensors_of(self, role: Role, stem: str, layer: int) -> dict[str, list[str]]:
        """Return the names of a module's weights and biases: one each, or one a head."""
        rests = self.group.layers.get(layer, {})
        named = {}
        for tensor in (role.tensor, "bias"):
            whole, heads = f"{stem}.{tensor}", checkpoint_tensors.heads_of(rests, stem, tensor)
            if whole in rests and heads:
                raise CheckpointError(
                    f"{rests[whole]} and {rests[heads[0]]} are both there; needs one of them"
                )
            if whole in rests or heads:
                named[tensor] = [rests[rest] for rest in heads or [whole]]
        return named

    def _stored(self, name: str, tensors: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a norm's weight or bias, stacked where each head has one."""
        if not tensors:
            return "", ()
        stored = sorted({self.tensors[tensor] for tensor in tensors})
        if len(stored) > 1:
            told = " and ".join(f"{dtype} {short(tuple(shape))}" for dtype, shape in stored)
            raise CheckpointError(
                f"{tensors[0]} and its like are {told}; needs one dtype and shape"
            )
        dtype, shape = stored[0]
        return dtype, ((len(tensors), *shape) if one_each(name, tensors) else tuple(shape))

    def _unweighted_here(self, role: Role, layer: int) -> bool:
        """Tell whether a layer has a norm without tensors: config.json says it."""
        rests = self.group.layers.get(layer, {})
        if rests and not any(rest.startswith(tuple(self.attentions)) for rest in rests):
            return False
        if self.flag is not None and not self.flag:
            return False
        field, _, other = role.layers.partition(":")
        if field == "role":
            others = [each for each in self.family.roles if each.name == other]
            return any(
                self._tensors_of(each, stem, layer) for each in others for stem in each.stems
            )
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
        self, role: Role, norm: ModelNorm, fits: _Fits, notes: list[str]
    ) -> tuple[int | None, int]:
        """Return num_heads and head_dim; whatever says them must say the same."""
        dims = self.fields.head_dims(role, norm.layer)
        heads = self.fields.count(role.heads, norm.layer)
        if role.weight == "none":
            beside = None if dims else self._beside(role, fits)
            if beside is not None:
                return beside
            if not dims:
                raise CheckpointError(
                    f"{norm.name} has no weight, and config.json says no head_dim; needs "
                    f"{' or '.join(role.head_dim)}"
                )
            head_dim = next(iter(dims.values()))
            return self._checked(role, norm, heads, head_dim, notes), head_dim
        needed, form = FORMS[role.weight]
        found = form(norm.shape, heads, set(dims.values())) if all(norm.shape) else None
        if found is None:
            said = [f"{rule} = {dim}" for rule, dim in dims.items()] or ["no head_dim"]
            raise CheckpointError(
                f"{norm.weights[0]} has shape {short(norm.shape)}, and config.json says "
                f"{role.heads} = {heads} and {' or '.join(said)}; {self.model_type} needs {needed}"
            )
        num_heads, head_dim = found
        return self._checked(role, norm, num_heads, head_dim, notes), head_dim

    def _beside(self, role: Role, fits: _Fits) -> tuple[int | None, int] | None:
        """Return what a norm of the same layer says of one that has no weight."""
        other = role.layers.removeprefix("role:")
        for name in (other, *fits):
            for _, found in fits.get(name, ()):
                if isinstance(found, ModelNorm):
                    return (found.num_heads if other else None), found.head_dim
        return None

    def _checked(
        self, role: Role, norm: ModelNorm, heads: int | None, head_dim: int, notes: list[str]
    ) -> int | None:
        """Return the number of heads, compared with the rows of the projection that makes them."""
        name = role.projection and self.group.module(norm.layer, f"{role.projection}.weight")
        dtype, shape = self.tensors.get(name, ("", ()))
        if dtype not in _WHOLE or len(shape) != 2:
            what = role.projection.rpartition(".")[2] or "projection"
            packed = dtype not in ("", checkpoint_tensors.LACKING)
            why = f"{what} is packed" if packed else f"no {what} to check against"
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
