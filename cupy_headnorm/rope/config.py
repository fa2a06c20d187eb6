"""
Rotary embeddings of models: what the config of a layer, and its model type, say of them.

Sources are lines of ``transformers/models/<name>/modeling_<name>.py`` in transformers 5.23.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cupy_headnorm import models
from cupy_headnorm.models import records
from cupy_headnorm.rope import dims
from cupy_headnorm.rope.frequencies import ROPE_TYPES, inverse_frequency

ROUNDED_ONCE = {
    # cos and sin stay in float32, and so does all until the cast: olmo2:154, beam:138, lfm3:146
    **dict.fromkeys(("olmo2", "olmo3", "flex_olmo", "olmo_hybrid"), "float32"),
    **dict.fromkeys(("beam", "lfm3"), "float32"),
    # complex numbers of float32: llama4:225
    **dict.fromkeys(("llama4", "llama4_text"), "float32"),
    # cos and sin are rounded to x's dtype first; then all is float32: cohere:175, hunyuan_vl:460
    **dict.fromkeys(("cohere", "hunyuan_vl", "hunyuan_vl_text"), "x"),
}
"""Model types that round once, with the dtype of their tables; all others round every op."""

_THETA = {
    **dict.fromkeys(("apertus", "apertus1p5_text"), 12e6),
    "sarvam_moe": 8e6,
    **dict.fromkeys(("cohere", "flex_olmo", "llama4_text", "muse_glimmer_assistant"), 5e5),
    **dict.fromkeys(("olmo3", "qwen3_vl_text", "qwen3_vl_moe_text"), 5e5),
    **dict.fromkeys(("gemma3_text", "gemma3n_text", "t5gemma2_text"), 1e6),
    **dict.fromkeys(("t5gemma2_decoder", "lfm2", "lfm2_moe", "qwen3_omni_moe_text"), 1e6),
    **dict.fromkeys(("minimax_m2", "minimax_m3_vl_text"), 5e6),
    "hy_v3": 11_158_840.0,
}
"""The config classes' own rope_theta, where it is not 10,000."""

_SLIDING_THETA = {
    # a config's rope_theta goes to the full layers, the sliding ones keep 5e5: olmo3:117
    "olmo3": 5e5,
    **dict.fromkeys(("gemma3_text", "gemma3n_text", "t5gemma2_text"), 1e4),
    "t5gemma2_decoder": 1e4,
    **dict.fromkeys(("step3p7", "step3p5"), None),
}
"""Whose scaling, if flat, is that of full_attention only, and the other layers' theta."""

_SLIDING_PATTERN = {"gemma3_text": 6, "t5gemma2_text": 6, "t5gemma2_decoder": 6}
"""Of so many layers the last is full_attention, where layer_types is missing."""

_INTERLEAVED_SECTIONS = {
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text"), (24, 20, 20)),
    "qwen3_omni_moe_talker_text": (24, 20, 20),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), (11, 11, 10)),
}
"""Whose M-RoPE interleaves, whatever the config says, with their own sections."""

_OWN_PARAMETERS = {
    "apertus", "apertus1p5", "apertus1p5_text", "beam", "laguna", "lfm3", "mellum", "mistral4",
    "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "diffusion_gemma",
    "diffusion_gemma_text", "embedding_gemma2", "embedding_gemma2_text",
}  # fmt: skip
"""Whose config classes make up more than a theta where there are no rope_parameters."""

_ELSEWHERE = {
    "deepseek_v4": "the last dims turn",
    **dict.fromkeys(("kimi_linear", "mamba2", "nemotron_h"), "it has none"),
    **dict.fromkeys(("deepseek_v32", "axk2", "glm_moe_dsa", "hy_v4"), "an indexer's dims turn"),
    **dict.fromkeys(("hy_v4_vl", "hy_v4_vl_text"), "an indexer's dims turn"),
    **dict.fromkeys(("dots3_note", "dots3_note_text"), "an indexer's dims turn"),
    **dict.fromkeys(("mistral_large4", "mistral_large4_text"), "an indexer's dims turn"),
}
"""Whose rotary embedding is not of the first dims of q and k."""

_ONLY_WITH = {
    "granitemoehybrid": ("position_embedding_type", "rope"),  # granitemoehybrid:1057
    "zamba2": ("use_mem_rope", True),  # zamba2:1142
}
"""Who has a rotary embedding only if a field of the config says so."""

_ONLY_SLIDING = {"afmoe", "flint", "kolibri1", "exaone4", "exaone4_5", "exaone_moe", "lara_mini"}
"""Whose full layers turn nothing: afmoe:359, flint:281, exaone4:233, exaone_moe:183."""
_OWN_THETAS = {"muse_spark", "muse_spark_text", "muse_glimmer", "muse_glimmer_text"}
"""Whose layers without a theta of their own turn nothing: muse_spark:663, muse_glimmer:512."""

_LONGEST_HEAD = 1 << 16
"""Dims: of a norm without a weight config.json alone says how many."""


@contextlib.contextmanager
def of_any_values() -> Iterator[None]:
    """
    Raise ValueError where a field of a config is of no use: a list for a number, or zero.

    Any field may hold anything, and what it leads to is seen where it is used. Frequencies that
    are not finite `rope.Rope` refuses.
    """
    try:
        with np.errstate(all="ignore"):
            yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if type(error) is ValueError and "; needs" in str(error):
            raise
        raise ValueError(
            f"the config's rotary embedding cannot be read ({type(error).__name__}: "
            f"{error!s:.200}); needs fields as transformers writes them"
        ) from error


def turns(config: Mapping[str, Any], layer: int) -> bool:
    """Tell whether a layer of a model that has a rotary embedding applies it."""
    with of_any_values():
        return _turns(config, layer)


def _turns(config: Mapping[str, Any], layer: int) -> bool:
    text, model_type, _ = _text(config)
    if model_type.startswith("llama4"):
        own = text.get("no_rope_layers")  # true where there is one: llama4:329
        interval = text.get("no_rope_layer_interval", 4)
        if own:
            return bool(_of_layer(own, layer, "no_rope_layers"))
        return bool((layer + 1) % interval)
    only_sliding = model_type in _ONLY_SLIDING and (
        model_type in ("afmoe", "flint")
        or text.get("sliding_window", "the class has one") is not None
    )
    for needed, name in (
        (only_sliding, "layer_types"),
        (model_type in _OWN_THETAS, "layer_rope_theta"),
    ):
        if needed and not text.get(name):
            raise ValueError(
                f"the config of {model_type} has no {name}; needs them, since some of its layers "
                "turn nothing"
            )
    layer_type = _of_layer(text.get("layer_types") or "sliding_attention", layer, "layer_types")
    params, thetas = text.get("rope_parameters") or {}, text.get("layer_rope_theta")
    if layer_type in params and params[layer_type] is None:  # beam:138
        return False
    if thetas and not _of_layer(thetas, layer, "layer_rope_theta"):  # muse_spark:663
        return False
    return not only_sliding or layer_type == "sliding_attention"


def read(
    config: Mapping[str, Any], layer: int, head_dim: int | None, max_position: int | None
) -> tuple[dict[str, Any], int]:
    """Return the fields of `rope.Rope` for one layer of a model, and the layer's head_dim."""
    text, model_type, family = _text(config)
    _refuse_unserved(text, model_type, family)

    def field(name: str) -> Any:
        return _of_layer(text.get(name, family.defaults.get(name)), layer, name)

    layer_type = field("layer_types")
    pattern = text.get("sliding_window_pattern") or _SLIDING_PATTERN.get(model_type)
    if layer_type is None and pattern:
        layer_type = "sliding_attention" if (layer + 1) % pattern else "full_attention"
    if model_type in _OWN_PARAMETERS and not (
        text.get("rope_scaling") or text.get("rope_parameters")
    ):
        raise ValueError(
            f"the config of {model_type} has no rope_parameters; needs them, since its class has "
            "more of its own than a rope_theta"
        )
    params = _parameters(text, model_type, layer, layer_type)
    sliding = model_type in _SLIDING_THETA and layer_type == "sliding_attention"
    theta = params.get("rope_theta")
    if theta is None and sliding:
        theta = text.get("rope_local_base_freq", _SLIDING_THETA[model_type])
    if theta is None:
        theta = field("rope_theta")
    if text.get("layer_rope_theta"):  # in the model a truth value: muse_spark:645
        own = field("layer_rope_theta")
        theta = own and (params.get("rope_theta") or own)
    if theta is None and (text.get("rope_parameters") or model_type in _THETA):
        theta = _THETA.get(model_type, 1e4)
    if not theta:
        raise ValueError(f"layer {layer} of {model_type} has rope_theta {theta}; needs a number")

    head_dim = dims.head_dim(text, model_type, family, layer, layer_type, head_dim)
    if not 1 <= head_dim <= _LONGEST_HEAD:
        raise ValueError(f"head_dim is {head_dim}; needs 1 to {_LONGEST_HEAD}")
    told = {name: field(name) for name in dims.FIELDS}
    in_params = params.get("partial_rotary_factor") is not None
    if in_params:
        told["partial_rotary_factor"] = params["partial_rotary_factor"]
    partial = dims.share(
        told, text, model_type, family, layer_type, head_dim,
        proportional=params["rope_type"] == "proportional", by_type=params["by_type"],
        in_params=in_params,
    )  # fmt: skip
    if params["rope_type"] == "dynamic" and params.get("alpha") and "hunyuan" in model_type:
        # Called dynamic, it depends on no length: hunyuan_v1_dense:298.
        theta *= params["alpha"] ** (head_dim / (head_dim - 2))
        params["rope_type"] = "default"
    if params["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"RoPE of {model_type} is of type {params['rope_type']!r}; needs one of {ROPE_TYPES}, "
            "or a Rope by hand, whose calls are given cos and sin"
        )
    longest = text.get("max_position_embeddings", params.get("original_max_position_embeddings"))
    frequencies, scaling = inverse_frequency(params, theta, head_dim, partial, longest)
    sections, interleaved = _sections(params, model_type, len(frequencies))
    if max_position is None:
        max_position = field("max_position_embeddings")
        if max_position is None:
            raise ValueError(f"{model_type} has no max_position_embeddings; needs max_position=")
    fields = {
        "rotary_dim": 2 * len(frequencies),
        "inverse_frequency": tuple(frequencies.tolist()),
        "max_position": max_position,
        "style": dims.style(text, model_type, family),
        "order": family.rope.order,
        "rounding": "once" if model_type in ROUNDED_ONCE else "every_op",
        "table": ROUNDED_ONCE.get(model_type, "x"),
        "sections": sections,
        "interleaved_sections": interleaved,
        "attention_scaling": scaling,
    }
    return fields, head_dim


def _of_layer(value: Any, layer: int, name: str) -> Any:
    """Return the layer's own of a field that may have a value a layer."""
    if not isinstance(value, (list, tuple)):
        return value
    if not 0 <= layer < len(value):
        raise ValueError(f"layer is {layer}; needs 0 to {len(value) - 1}, as {name} have it")
    return value[layer]


def _text(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, records.Family]:
    """Return the text tower's config, its model type and that type's row of the registry."""
    text, names = config, [config.get("model_type", "")]
    for key in ("thinker_config", "text_config", "llm_config", "decoder"):
        if isinstance(text.get(key), Mapping):
            text = text[key]
            of_text = f"{names[0]}_text"
            of_text = of_text if of_text in models.BY_MODEL_TYPE else names[0]
            names.insert(0, text.get("model_type", of_text))
    for name in names:
        if name in models.BY_MODEL_TYPE:
            return text, name, models.BY_MODEL_TYPE[name]
    raise ValueError(
        f"model_type is {' in '.join(repr(name) for name in names)}; needs one that "
        "cupy_headnorm.models has, or Rope(...) with its arguments"
    )


def _refuse_unserved(text: Mapping[str, Any], model_type: str, family: records.Family) -> None:
    why = family.refused or _ELSEWHERE.get(model_type, "")
    flag, value = _ONLY_WITH.get(model_type, ("", None))
    if flag and text.get(flag) != value:
        why = f"it has none unless its config's {flag} is {value!r}"
    if family.rope.order == "none":
        why = "it has none"
    elif family.tower != "text":  # a picture's positions are coordinates, one for each pair
        why = f"its {family.tower} tower turns by no table of a config"
    if why:
        raise ValueError(
            f"no rotary embedding of {model_type} is served: {why}; "
            "needs a Rope by hand, whose calls are given cos and sin, or none"
        )


def _parameters(
    text: Mapping[str, Any], model_type: str, layer: int, layer_type: str | None
) -> dict[str, Any]:
    """Return the layer's parameters, with rope_type, truncate and by_type."""
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
    elif (model_type in _SLIDING_THETA and layer_type == "sliding_attention") or (
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


def _sections(
    params: Mapping[str, Any], model_type: str, half: int
) -> tuple[tuple[int, ...], bool]:
    """Return how many of `half` frequencies take each row of the positions; do rows take turns."""
    sections = tuple(params.get("mrope_section") or params.get("xdrope_section") or ())
    interleaved = model_type in _INTERLEAVED_SECTIONS
    if interleaved and not sections:
        # The first row takes what the others, clipped, leave.
        rows = enumerate(_INTERLEAVED_SECTIONS[model_type])
        others = [len(range(half)[row : 3 * size : 3]) for row, size in rows][1:]
        sections = (half - sum(others), *others)
    if model_type == "neomme":  # rows and columns take turns: neomme:167
        sections, interleaved = (half // 2,) * 2, True
    if sections and model_type.startswith("hunyuan_vl"):
        raise ValueError(
            f"sections of {model_type} are {sections} of twice as many dims: the dims of a pair "
            "turn by different angles; needs a Rope by hand, whose calls are given cos and sin"
        )
    return sections, interleaved
