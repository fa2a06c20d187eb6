"""
How many dims of a head a model's rotary embedding rotates: what its config says, and what counts.

A config has many words for a share of head_dim, and few modules read one. Sources are lines of
``transformers/models/<name>/`` in transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupy_headnorm.models.records import Family

_SHARES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen3_next", "qwen4_exp", "qwen4_exp_text"), ("partial_rotary_factor",)),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), ("partial_rotary_factor",)),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), ("partial_rotary_factor",)),
    **dict.fromkeys(
        ("stablelm", "persimmon", "fuyu", "phi", "glm4_moe", "sarvam_moe"),
        ("partial_rotary_factor",),
    ),
    **dict.fromkeys(("minimax_m3_vl", "minimax_m3_vl_text", "bamba"), ("partial_rotary_factor",)),
    **dict.fromkeys(("laguna", "neomme"), ("partial_rotary_factor",)),
    # configuration_minimax_m2:100
    "minimax_m2": ("partial_rotary_factor", "rotary_dim"),
    # configuration_step3p7:257
    **dict.fromkeys(("step3p7", "step3p5"), ("partial_rotary_factor", "partial_rotary_factors")),
}
"""Whose modules rotate the first dims alone, and the fields that say how many, in their order."""

_BY_LAYER_TYPE = {"laguna", "neomme", "step3p7", "step3p5"}
"""Whose partial_rotary_factor needs parameters by layer type, without which the other field is
read: step3p7:472."""
_IN_PARAMETERS = {"laguna", "neomme", "bamba"}
"""Whose classes have a share of their own, so that none beside the parameters counts."""

_SHARE = {
    "bamba": 0.5,  # configuration_bamba:92
    # configuration_neomme:74
    "neomme": {"full_attention": 0.25},
    # rotary_dim alone, which is 64 in the class, is not looked at: minimax_m3_vl:309
    **dict.fromkeys(("minimax_m3_vl", "minimax_m3_vl_text"), 1.0),
}
"""Shares where the config has none, in place of the rows' own; some by layer type."""
_ROTARY_DIM = dict.fromkeys(("minimax_m3_vl", "minimax_m3_vl_text"), 64)
"""The config classes' own rotary_dim."""

_IN_VLLM = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
"""Fields that vLLM rotates by, whatever the type: its transformers_utils/config.py."""

FIELDS = (*_IN_VLLM, "partial_rotary_factors", "rotary_dim")
"""All fields that say a share to some engine."""

_ROTARY_HEAD = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "sarvam_mla"), 64
    ),
    **dict.fromkeys(("longcat_flash", "mistral4", "bailing_hybrid"), 64),
    "minicpm3": 32,
}
"""Whose heads have a part of qk_rope_head_dim dims, all rotated (MLA); and the classes' own."""

_INTERLEAVED = {"deepseek_v2", "longcat_flash", "bailing_hybrid"}
_INTERLEAVED_UNLESS = {
    "axk1", "deepseek_v3", "glm4_moe_lite", "mistral4", "sarvam_mla", "youtu"
}  # fmt: skip
"""The same with pairs of neighbours; these unless their config's rope_interleave is false."""

_HEAD_DIM = {
    # of all layers, and of full_attention: configuration_gemma4:170, embedding_gemma2:95
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), (256, 512)),
    **dict.fromkeys(("diffusion_gemma", "diffusion_gemma_text"), (256, 512)),
    **dict.fromkeys(("embedding_gemma2", "embedding_gemma2_text"), (256, 512)),
}
"""The config classes' own head_dim, where the rows have none."""

_ALSO_HEAD_DIM = {
    **dict.fromkeys(("hunyuan_vl", "hunyuan_vl_text", "zamba2"), "attention_head_dim"),
}
"""Another name of head_dim: the config classes' attribute_map."""

_HIDDEN_TIMES = {"zamba2": 2}
"""Whose heads share more than hidden_size: configuration_zamba2:114."""

_NULL_IS_HIDDEN = {"afmoe"}
"""Whose config class has a head_dim and takes null: hidden_size // num_attention_heads."""


def head_dim(
    text: Mapping[str, Any],
    model_type: str,
    family: Family,
    layer: int,
    layer_type: str | None,
    given: int | None,
) -> int:
    """Return the dims of a head, or of the part of it that is rotated; `given` is the norm's."""
    rotary_head = _rotary_head(text, model_type)
    if rotary_head is not None:
        if given not in (None, rotary_head):
            raise ValueError(
                f"head_dim is {given}; needs {rotary_head}, the qk_rope_head_dim of {model_type}, "
                "whose heads have a part that is rotated, and one that is not"
            )
        return rotary_head
    if given is not None:
        return given
    # Keys are numbers, some with zeros in front: transformers writes "05" beside "11".
    per_layer = {int(key): own for key, own in (text.get("per_layer_config") or {}).items()}
    found: int | None = per_layer.get(layer, {}).get("head_dim")
    if found is None and layer_type == "full_attention":
        found = text.get("global_head_dim")
        if found is None and model_type in _HEAD_DIM:
            found = _HEAD_DIM[model_type][1]
    for name in ("head_dim", _ALSO_HEAD_DIM.get(model_type, "head_dim")):
        found = text.get(name) if found is None else found
    own = family.defaults.get("head_dim", _HEAD_DIM.get(model_type, (None,))[0])
    if found is None and own is not None and model_type not in _NULL_IS_HIDDEN:
        if "head_dim" in text:
            raise ValueError(
                f"head_dim is null, which the config class of {model_type} in transformers "
                "refuses; needs a number in the config, or head_dim="
            )
        return int(own)
    if found is None and own is not None and "head_dim" not in text:
        return int(own)
    if found is None:
        try:
            hidden = text["hidden_size"] * _HIDDEN_TIMES.get(model_type, 1)
            return int(hidden // text["num_attention_heads"])
        except KeyError as missing:
            raise ValueError(
                f"config has neither head_dim nor {missing}; needs head_dim="
            ) from None
    return found


def _rotary_head(text: Mapping[str, Any], model_type: str) -> int | None:
    """Return the size of the part of a head that is rotated as a whole; None without one."""
    if model_type not in _ROTARY_HEAD:
        return None
    return int(text.get("qk_rope_head_dim", _ROTARY_HEAD[model_type]))


def style(text: Mapping[str, Any], model_type: str, family: Family) -> str:
    """Return which dims of a head are a pair, as `rope.Rope` names it."""
    unless = model_type in _INTERLEAVED_UNLESS and text.get("rope_interleave", True)
    return "interleaved" if unless or model_type in _INTERLEAVED else family.rope.style


def share(
    told: Mapping[str, Any],
    text: Mapping[str, Any],
    model_type: str,
    family: Family,
    layer_type: str | None,
    width: int,
    *,
    proportional: bool,
    by_type: bool,
    in_params: bool,
) -> float:
    """
    Return the share of `width` dims that a layer of a model rotates in transformers.

    `told` are the values of `FIELDS`. There may be parameters of the layer's type (`by_type`), and
    partial_rotary_factor may be in the parameters (`in_params`) or beside them.
    ValueError where a field that the model's module does not read says another share: transformers
    goes on without it or fails, vLLM goes by it.
    """
    told = {**told, "rotary_dim": told["rotary_dim"] or _ROTARY_DIM.get(model_type)}
    shares = {
        name: float(value) / width if name == "rotary_dim" else float(value)
        for name, value in told.items()
        if value is not None
    }
    counting: tuple[str, ...] = ("partial_rotary_factor",)
    if not proportional:
        counting = _counting(model_type, by_type=by_type, in_params=in_params)
    found = next((shares[name] for name in counting if name in shares), None)
    if found is None:
        own: Any = _SHARE.get(model_type, family.rope.partial)
        found = own.get(layer_type, 1.0) if isinstance(own, Mapping) else own
    if not 0 < found <= 1:
        raise ValueError(f"{found} of head_dim {width} shall turn; needs a share, of 1 at most")
    # Where a part of the head is rotated, a share may be one of the whole head.
    widths = [width]
    if model_type in _ROTARY_HEAD:
        widths += [text[name] for name in ("head_dim", "linear_head_dim") if text.get(name)]
        widths.append(width + (text.get("qk_nope_head_dim") or 0))
    for name, value in shares.items():
        if name not in counting and int(found * width) not in [int(value * w) for w in widths]:
            reader = "in vLLM" if name in _IN_VLLM else "by its name"
            raise ValueError(
                f"{name} is {told[name]!r:.40}, {int(value * width)} of {width} dims {reader}, but "
                f"{model_type} in transformers does not rotate by it, and without it "
                f"{int(found * width)}; needs a config without it, or a Rope by hand"
            )
    return found


def _counting(model_type: str, *, by_type: bool, in_params: bool) -> tuple[str, ...]:
    """Return the fields that a type's module rotates by, in their order."""
    unread = set()
    if model_type in _BY_LAYER_TYPE:
        unread.add("partial_rotary_factors" if by_type else "partial_rotary_factor")
    if model_type in _IN_PARAMETERS and not in_params:
        unread.add("partial_rotary_factor")
    return tuple(name for name in _SHARES.get(model_type, ()) if name not in unread)
