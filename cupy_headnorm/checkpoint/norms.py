"""Norms of a model as they are found: what each computes and where it is, or why it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cupy_headnorm.checkpoint.files import CheckpointError
from cupy_headnorm.checkpoint.layers import MAIN_TOWERS
from cupy_headnorm.models.records import ModelRope

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype, as safetensors spells it, and shape by name."""

ARGUMENTS = "HeadNorm.from_safetensors(path, key, kind=, eps=, weight_offset=, rounding=)"
"""What reads a norm of which nothing is known."""


_LOOKS = re.compile(
    r"(?:.*[._])?(?:(?:q|k|v|qk|query|key|value)_?(?:rms_?|layer_?|l2_?)?(?:norm|ln)"
    r"|(?:layer_?)?norm_(?:added_)?(?:q|k|v))"
    r"(?:\.norms\.\d+)?\.(?:weight|gamma|scale|temp)"
)
"""Tensors of a layer that look like a head norm's."""


def looks_like_a_norm(name: str) -> bool:
    """Tell whether a tensor's name is one that a head norm's has."""
    return _LOOKS.fullmatch(name) is not None


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
    """The model's, if known; where all heads share the weight any number is supported."""
    head_dim: int
    heads_axis: int
    shape: tuple[int, ...]
    """Shape of the weight as it is read; ``()`` without one."""
    dtype: str
    """Dtype as safetensors spells it; ``""`` without a weight."""
    rope: ModelRope
    notes: tuple[str, ...]
    model_type: str
    """Its tower's, as config.json calls it."""


class Refused(NamedTuple):
    """A norm that is not supported, or a tensor that looks like one."""

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


Found = ModelNorm | Refused


class ModelNorms(NamedTuple):
    """All that was found, by tower and layer."""

    model_type: str
    norms: tuple[ModelNorm, ...]
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]

    def keyed(self) -> dict[tuple[int, str], Found]:
        """
        Return norms by layer and role.

        The roles of the text tower, or of the only one, are ``"q"``, ``"k"``, ...; those of
        others carry its name: ``"vision_q"``.
        """
        found: list[Found] = [*self.norms]
        found += [norm for norm in self.refused if norm.role]
        one = len({norm.tower for norm in found}) == 1
        keyed: dict[tuple[int, str], Found] = {}
        for norm in found:
            role = norm.role if one or norm.tower in MAIN_TOWERS else f"{norm.tower}_{norm.role}"
            other = keyed.setdefault((norm.layer, role), norm)
            if other is not norm:
                raise CheckpointError(
                    f"{other.name} and {norm.name} are both {role} of layer {norm.layer}; "
                    "needs one of them"
                )
        return keyed


class UnknownModelError(CheckpointError):
    """Nothing is known of a model, or of one tensor of it, and it looks like a head norm."""


def supported(norm: Found) -> ModelNorm:
    """Return a norm; CheckpointError with the reason if it is refused."""
    if isinstance(norm, Refused):
        kind = UnknownModelError if norm.unknown else CheckpointError
        raise kind(f"{norm.name} is refused: {norm.reason}")
    return norm


def one_each(name: str, tensors: tuple[str, ...]) -> bool:
    """Tell whether each head has a module of its own below `name`."""
    return bool(tensors) and tensors[0].startswith(f"{name}.norms.")


def refuse(norm: ModelNorm, reason: str, *, unknown: bool = False) -> Refused:
    """Return a norm as one that is not supported, with the reason."""
    at = norm.name, norm.tower, norm.layer, norm.role
    return Refused(*at, norm.shape, norm.dtype, reason, unknown)


_Shape = tuple[int, ...]
_Geometry = tuple[int | None, int] | None
"""num_heads and head_dim; None where a shape does not fit."""


def _for_all_heads(shape: _Shape, heads: int | None, dims: set[int]) -> _Geometry:
    if len(shape) != 1 or (dims and shape[0] not in dims):
        return None
    return heads, shape[0]


def _of_each_head(shape: _Shape, heads: int | None, dims: set[int]) -> _Geometry:
    if len(shape) != 2 or heads not in (None, shape[0]) or (dims and shape[1] not in dims):
        return None
    return shape[0], shape[1]


def _one_after_the_other(shape: _Shape, heads: int | None, dims: set[int]) -> _Geometry:
    if not heads or len(shape) != 1 or shape[0] % heads:
        return None
    return _of_each_head((heads, shape[0] // heads), heads, dims)


def _as_one_head(shape: _Shape, heads: int | None, dims: set[int]) -> _Geometry:
    return _for_all_heads(shape, 1, {heads * dim for dim in dims} if heads else set())


FORMS: dict[str, tuple[str, Callable[[_Shape, int | None, set[int]], _Geometry]]] = {
    "shared": ("(head_dim,)", _for_all_heads),
    "per head": ("(num_heads, head_dim)", _of_each_head),
    "list": ("(head_dim,) for each of num_heads", _of_each_head),
    "flat": ("(num_heads * head_dim,)", _one_after_the_other),
    "full": ("(num_heads * head_dim,)", _as_one_head),
}
"""The shape that each `Role.weight` needs, and what reads it."""
