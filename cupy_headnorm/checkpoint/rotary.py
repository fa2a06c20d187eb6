"""
The dims of a head, and how many of them are rotated: what a config says, and what of it counts.

A config has many words for a share of head_dim, and few modules read one. Sources are lines of
``transformers/models/<name>/`` in transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cupy_headnorm.checkpoint import layers
from cupy_headnorm.models.records import Family

_IN_VLLM = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
"""Fields that vLLM rotates by, whatever the type: its transformers_utils/config.py."""

_FIELDS = (*_IN_VLLM, "partial_rotary_factors", "rotary_dim")
"""All fields that say a share to some engine."""


UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Any field may hold anything; these are raised where one of no use is used."""


class Layer(NamedTuple):
    """One layer of a model: the config of its text tower, its type and that type's row."""

    text: Mapping[str, Any]
    model_type: str
    family: Family
    layer: int

    def get(self, name: str) -> Any:
        """Return a field, the class's own where it is missing, the layer's own of a list."""
        value = self.text.get(name, self.family.defaults.get(name))
        if not isinstance(value, (list, tuple)):
            return value
        if not 0 <= self.layer < len(value):
            raise ValueError(
                f"layer is {self.layer}; needs 0 to {len(value) - 1}, as {name} have it"
            )
        return value[self.layer]


def of_layer(config: Mapping[str, Any], layer: int) -> Layer:
    """Find a layer's tower in the config of a model."""
    tower = layers.main_tower(config)
    if tower.family is None:
        raise ValueError(
            f"model_type is {tower.model_type!r}; needs one that cupy_headnorm.models has, or "
            "Rope(...) with its arguments"
        )
    return Layer(tower.config, tower.model_type, tower.family, layer)


def parameters(of: Layer, layer_type: str | None) -> dict[str, Any]:
    """Return the layer's parameters, with rope_type, truncate and by_type."""
    text, layer = of.text, of.layer
    params = dict(text.get("rope_scaling") or text.get("rope_parameters") or {})
    # transformers looks for it in the outer mapping, so that it counts only if that is flat
    # (modeling_rope_utils:475).
    truncate = params.get("truncate", True)
    scaled = text.get("rope_scaling_layers")  # molmo2:662
    by_type = any(isinstance(value, Mapping) for value in params.values())
    if by_type:
        if layer_type not in params:
            raise ValueError(
                f"layer {layer} is of type {layer_type!r}; needs one of {tuple(params)}, "
                "which rope_parameters have"
            )
        if params[layer_type] is None:
            raise ValueError(f"layer {layer} ({layer_type}) has no rotary embedding; needs one")
        params = dict(params[layer_type])
    elif (of.family.rotary.full_alone and layer_type == "sliding_attention") or (
        scaled is not None and layer not in scaled
    ):
        params = {name: params[name] for name in ("rope_theta",) if name in params}
    rope_type: Any = params.get("rope_type", params.get("type", "default"))
    # Qwen2-VL's and HunyuanOCR's names for sections: qwen2_vl:131, hunyuan_vl:217.
    params["rope_type"] = {"mrope": "default", "xdrope": "dynamic"}.get(rope_type, rope_type)
    original = params.get("original_max_position_embeddings")
    if not by_type:
        original = text.get("original_max_position_embeddings") or original
    params["original_max_position_embeddings"] = original or text.get("max_position_embeddings")
    params["truncate"] = truncate
    params["by_type"] = by_type
    return params


def head_dim(of: Layer, layer_type: str | None, given: int | None) -> int:
    """Return the dims of a head, or of the part of it that is rotated; `given` is the norm's."""
    text, family, model_type = of.text, of.family, of.model_type
    if family.rotary.part:
        part = int(text.get("qk_rope_head_dim", family.rotary.part))
        if given not in (None, part):
            raise ValueError(
                f"head_dim is {given}; needs {part}, the qk_rope_head_dim of {model_type}, "
                "whose heads have a part that is rotated, and one that is not"
            )
        return part
    if given is not None:
        return given
    # Keys are numbers, some with zeros in front: transformers writes "05" beside "11".
    per_layer = {int(key): own for key, own in (text.get("per_layer_config") or {}).items()}
    found: int | None = per_layer.get(of.layer, {}).get("head_dim")
    if found is None and layer_type == "full_attention":
        found = text.get("global_head_dim")
        if found is None:
            found = family.defaults.get("global_head_dim")
    for name in ("head_dim", *(n for n, known in family.aliases.items() if known == "head_dim")):
        found = text.get(name) if found is None else found
    own = family.defaults.get("head_dim")
    if found is None and own is not None:
        if "head_dim" not in text:
            return int(own)
        if not family.rotary.null_is_hidden:
            raise ValueError(
                f"head_dim is null, which the config class of {model_type} in transformers "
                "refuses; needs a number in the config, or head_dim="
            )
    if found is None:
        try:
            hidden = text["hidden_size"] * family.rotary.hidden_times
            return int(hidden // text["num_attention_heads"])
        except KeyError as missing:
            raise ValueError(
                f"config has neither head_dim nor {missing}; needs head_dim="
            ) from None
    return found


def style(of: Layer) -> str:
    """Return which dims of a head are a pair, as `rope.Rope` names it."""
    neighbours = of.family.rotary.neighbours
    told = neighbours == "rope_interleave" and of.text.get("rope_interleave", True)
    return "interleaved" if told or neighbours == "always" else of.family.rope.style


def share(of: Layer, params: Mapping[str, Any], layer_type: str | None, width: int) -> float:
    """
    Return the share of `width` dims that a layer of a model rotates in transformers.

    `params` are the layer's parameters. ValueError where a field that the model's module does not
    read says another share: transformers goes on without it or fails, vLLM goes by it.
    """
    text, rotary = of.text, of.family.rotary
    told = {name: of.get(name) for name in _FIELDS}
    told["rotary_dim"] = told["rotary_dim"] or of.family.defaults.get("rotary_dim")
    in_params = params.get("partial_rotary_factor") is not None
    if in_params:
        told["partial_rotary_factor"] = params["partial_rotary_factor"]
    shares = {
        name: float(value) / width if name == "rotary_dim" else float(value)
        for name, value in told.items()
        if value is not None
    }
    counting: tuple[str, ...] = ("partial_rotary_factor",)
    if params["rope_type"] != "proportional":
        unread = set()
        if rotary.shares_by_type:
            by_type = params["by_type"]
            unread.add("partial_rotary_factors" if by_type else "partial_rotary_factor")
        if rotary.shares_in_parameters and not in_params:
            unread.add("partial_rotary_factor")
        counting = tuple(name for name in rotary.shares if name not in unread)
    found = next((shares[name] for name in counting if name in shares), None)
    if found is None:
        own = of.family.rope.partial if rotary.share is None else rotary.share
        found = own.get(layer_type or "", 1.0) if isinstance(own, Mapping) else own
    if not 0 < found <= 1:
        raise ValueError(f"{found} of head_dim {width} shall rotate; needs a share, of 1 at most")
    # Where a part of the head is rotated, a share may be one of the whole head.
    widths = [width]
    if rotary.part:
        widths += [text[name] for name in ("head_dim", "linear_head_dim") if text.get(name)]
        widths.append(width + (text.get("qk_nope_head_dim") or 0))
    for name, value in shares.items():
        if name not in counting and int(found * width) not in [int(value * w) for w in widths]:
            reader = "in vLLM" if name in _IN_VLLM else "by its name"
            raise ValueError(
                f"{name} is {told[name]!r:.40}, {int(value * width)} of {width} dims {reader}, but "
                f"{of.model_type} in transformers does not rotate by it, and without it "
                f"{int(found * width)}; needs a config without it, or a Rope by hand"
            )
    return found
