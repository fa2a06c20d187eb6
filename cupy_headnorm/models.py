"""
What models do to their heads: data, one row a family; `_model_norms` applies it.

A row says what transformers' own module computes, to the rounding step, and where its tensors lie.
Sources are lines of ``transformers/models/<name>/modeling_<name>.py`` in transformers 5.23.0, of
types that came later in 5.24.0, and of diffusers 0.42.1 for the diffusion transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class ModelRope(NamedTuple):
    """
    The rotary embedding beside a norm, as far as the family tells.

    Its angles are in each model's config, from which `cupy_headnorm.Rope` is made.
    """

    order: str = "after norm"
    """``"after norm"``, ``"before norm"`` or ``"none"``."""
    style: str = "half"
    """``"half"`` (NeoX), ``"interleaved"`` (GPT-J), ``"half flipped"``: the other sign."""
    partial: float = 1.0
    """
    Share of head_dim that is rotated, first dims first, where the config does not say. A config's
    share beside ``rope_type: proportional`` is none: all dims turn, some by no angle.
    """
    note: str = ""


class Role(NamedTuple):
    """
    One tensor of an attention that is normalized head by head.

    Several of one name in a family are alternatives: the tensors' names and shapes tell.
    """

    name: str
    """``"q"``, ``"k"``, ``"v"``, ``"index_k"``, ..."""
    stems: tuple[str, ...]
    """
    Modules below the layer, ``self_attn.q_norm``: the library's own name first, then those that
    are found on disk only.
    """
    heads: str = "num_attention_heads"
    """Config field with the number of heads; empty where only the projection tells."""
    kind: str = "rms"
    weight: str = "shared"
    """
    ``"shared"`` (head_dim,), ``"per head"`` (num_heads, head_dim), ``"flat"`` of as many,
    ``"list"`` one module a head, ``"none"``, or ``"full"``: (num_heads * head_dim,) over all heads,
    refused unless one head is asked for.
    """
    bias: bool = False
    eps: str | float = "rms_norm_eps"
    """Config field, or the module's constant."""
    weight_offset: float = 0.0
    rounding: str = "once"
    result: str = "x"
    """Dtype of the model's own result: ``"x"``, ``"promoted"`` with the weight's, ``"weight"``."""
    heads_axis: int = -2
    """Axis of the heads in what the module is given; of no account where it has one head only."""
    head_dim: tuple[str, ...] = ("head_dim",)
    """
    Config fields, any of which may hold, and ``"hidden"``: hidden_size // num_attention_heads where
    config.json gives none of them. Empty where only the weight tells, or without one the norms
    beside it.
    """
    projection: str = ""
    """Module whose rows are num_heads * head_dim, to check against: ``self_attn.q_proj``."""
    projection_factor: int = 1
    """Rows of it a row of a head: 2 where a gate is projected along."""
    layers: str = ""
    """
    Where no tensor tells which layers have it: a config field with a truth a layer (or one for
    all), or ``"role:k"``, the layers where that role has a tensor; empty for all layers.
    """
    tensor: str = "weight"
    """Name of the weight in its module."""
    refused: str = ""
    """Why it is not served."""


class Family(NamedTuple):
    """Model types that do the same."""

    model_types: tuple[str, ...]
    """
    ``model_type`` of config.json, or of the nested config of that tower; ``_class_name`` of
    diffusers. A type whose config nests the text tower's is in the row of that tower.
    """
    roles: tuple[Role, ...] = ()
    rope: ModelRope = ModelRope()
    defaults: Mapping[str, Any] = {}
    """
    Config fields that a config.json may omit, with the config class' own values. Without one here
    num_key_value_heads is num_attention_heads.
    """
    flag: str = ""
    """Config field that says whether there are norms; tensors win over it."""
    tower: str = "text"
    """``"text"`` or another main one, ``"vision"``, ``"audio"``, ``"transformer"`` (diffusers)."""
    aliases: Mapping[str, str] = {}
    """Other names that a config.json has for a field, the config class' attribute_map."""
    refused: str = ""
    """Why no norm of it is served."""


def _pair(
    q: str | tuple[str, ...],
    k: str | tuple[str, ...],
    /,
    attention: str | tuple[str, ...] = "self_attn",
    *,
    projected: bool = True,
    **shared: Any,
) -> tuple[Role, Role]:
    """Return the roles q and k that differ in name and number of heads only."""
    attentions = (attention,) if isinstance(attention, str) else attention

    def stems(names: str | tuple[str, ...]) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else names
        return tuple(f"{attention}.{name}" for attention in attentions for name in names)

    def role(name: str, names: str | tuple[str, ...], **fields: Any) -> Role:
        projection = f"{attentions[0]}.{name}_proj" if projected else ""
        return Role(name, stems(names), projection=projection, **fields)

    k_fields = {"heads": "num_key_value_heads", **shared, "projection_factor": 1}
    return role("q", q, **shared), role("k", k, **k_fields)


def _named(prefix: str, roles: Iterable[Role]) -> tuple[Role, ...]:
    """Return the roles under other names: ``second_q``."""
    return tuple(role._replace(name=f"{prefix}_{role.name}") for role in roles)


def _alike(
    members: Mapping[str | tuple[str, ...], Mapping[str, Any]], **shared: Any
) -> tuple[Family, ...]:
    """Return the families that differ in their configs' defaults only."""
    return tuple(
        Family((names,) if isinstance(names, str) else names, defaults=defaults, **shared)
        for names, defaults in members.items()
    )


def _sizes(
    heads: int | None = None,
    kv: int | None = None,
    head_dim: int | None = None,
    hidden: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return config fields by their names, those that are given."""
    named = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "hidden_size": hidden,
        **fields,
    }
    return {name: value for name, value in named.items() if value is not None}


_QK = ("q_norm", "k_norm")
_EITHER = ("head_dim", "hidden")

_CAST_FIRST: dict[str, Any] = {"rounding": "before_weight", "result": "promoted"}
"""weight * cast(n): qwen3:49, and 40 copies of it."""
_ONE_PLUS: dict[str, Any] = {"weight_offset": 1.0}
"""cast(n * (1 + weight)), the weight stored less one: gemma3:135, and 6 copies of it."""

_GATE = "a gate is part of the norm, multiplied in before the result is rounded"
_RANK = "normalizes the rank of a low-rank projection, before there are heads"

_GATED = Role("linear_out", ("linear_attn.norm",), refused=_GATE)
"""Gated DeltaNet: qwen3_next:58, :623; this weight is not stored less one."""
_LORA = (
    Role("q_lora", ("self_attn.q_a_layernorm",), refused=_RANK),
    Role("kv_lora", ("self_attn.kv_a_layernorm",), refused=_RANK),
)
_INDEX_K = Role(
    "index_k",
    ("self_attn.indexer.k_norm", "attention.indexer.k_norm"),
    "",
    kind="layer",
    bias=True,
    eps=1e-6,
    head_dim=("index_head_dim",),
    projection="self_attn.indexer.wk",
)
"""Sparse attention's indexer, one head: deepseek_v32:174, :216."""
_V_OF_K = Role(
    "v",
    ("self_attn.v_norm",),
    "num_key_value_heads",
    weight="none",
    head_dim=(),
    layers="role:k",
)
"""Without a weight; layers that use another layer's keys and values have neither norm."""

# Text models whose heads are normalized one by one.
_HEADS = (
    # qwen3:49, :229, :244; qwen3_moe:146; qwen3_vl:492; qwen3_vl_moe:254; qwen3_omni_moe:1454
    *_alike(
        {
            "qwen3": _sizes(32, 32, 128, rms_norm_eps=1e-6),
            "qwen3_moe": _sizes(32, 4, hidden=2048, rms_norm_eps=1e-6),
            ("qwen3_vl", "qwen3_vl_text"): _sizes(32, 32, 128, rms_norm_eps=1e-6),
            ("qwen3_vl_moe", "qwen3_vl_moe_text"): _sizes(16, 16, hidden=2048, rms_norm_eps=1e-6),
            ("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"): _sizes(
                28, 4, hidden=2048, rms_norm_eps=1e-6
            ),
        },
        roles=_pair(*_QK, head_dim=_EITHER, **_CAST_FIRST),
    ),
    # qwen3_omni_moe:2460 and, by inheritance, :1454; in the wave decoder q_norm is nothing, :3540
    Family(
        ("qwen3_omni_moe_talker_text",),
        _pair(*_QK, head_dim=_EITHER, **_CAST_FIRST),
        defaults=_sizes(16, 2, hidden=1024, rms_norm_eps=1e-6),
    ),
    Family(
        ("qwen3_omni_moe_talker_code_predictor",),
        _pair(*_QK, **_CAST_FIRST),
        defaults=_sizes(16, 8, 128, rms_norm_eps=1e-6),
    ),
    # qwen3_next:126, :242, :253, :269: q_proj holds a gate beside each head, q is half a slice
    *_alike(
        {
            "qwen3_next": _sizes(16, 2, 256, rms_norm_eps=1e-6),
            ("qwen3_5", "qwen3_5_text"): _sizes(16, 4, 256, rms_norm_eps=1e-6),
            ("qwen3_5_moe", "qwen3_5_moe_text"): _sizes(16, 2, 256, rms_norm_eps=1e-6),
        },
        roles=(*_pair(*_QK, projection_factor=2, **_ONE_PLUS), _GATED),
        rope=ModelRope(partial=0.25),
    ),
    # qwen4_exp:141, :687, :710, :741, :836, :861; the indexer's k is a mean of keys, normalized
    Family(
        ("qwen4_exp", "qwen4_exp_text"),
        (
            *_pair(*_QK, projection_factor=2, **_ONE_PLUS),
            *(
                Role(
                    f"index_{name}",
                    (f"self_attn.indexer.{name}_layernorm",),
                    heads,
                    head_dim=("indexer_head_dim",),
                    **_ONE_PLUS,
                )
                for name, heads in (("q", "indexer_n_heads"), ("k", "indexer_kv_heads"))
            ),
            _GATED,
        ),
        defaults=_sizes(16, 2, 256, rms_norm_eps=1e-6),
    ),
    # gemma3:135, :327, :345; t5gemma2:54, :265, :344, where the decoder's sees both their keys
    Family(
        (
            "gemma3",
            "gemma3_text",
            "t5gemma2",
            "t5gemma2_encoder",
            "t5gemma2_text",
            "t5gemma2_decoder",
        ),
        _pair(*_QK, heads_axis=-3, **_ONE_PLUS),
        defaults=_sizes(8, 4, 256, rms_norm_eps=1e-6),
    ),
    # gemma3n:129, :1182, :1213
    Family(
        ("gemma3n", "gemma3n_text"),
        (*_pair(*_QK), _V_OF_K),
        defaults=_sizes(8, 2, 256, rms_norm_eps=1e-6),
    ),
    # gemma4:204, :1177, :1214; gemma4_unified:357; diffusion_gemma:300: full attention layers have
    # a head_dim, and may have a number of keys, of their own; their values may be the raw keys
    Family(
        (
            "gemma4",
            "gemma4_text",
            "gemma4_unified",
            "gemma4_unified_text",
            "diffusion_gemma",
            "diffusion_gemma_text",
        ),
        (*_pair(*_QK, heads="", head_dim=()), _V_OF_K._replace(heads="")),
        rope=ModelRope(note="full attention layers turn all dims, most of them by no angle"),
        defaults=_sizes(rms_norm_eps=1e-6),
    ),
    # embedding_gemma2:49, :346, :364
    Family(
        ("embedding_gemma2", "embedding_gemma2_text"),
        (
            *_pair(*_QK, heads="", head_dim=(), heads_axis=-3),
            _V_OF_K._replace(heads="", heads_axis=-3),
        ),
        defaults=_sizes(rms_norm_eps=1e-6),
    ),
    # cohere:50, :203, :254
    Family(
        ("cohere",),
        _pair(*_QK, kind="layer", weight="per head", eps="layer_norm_eps", head_dim=_EITHER),
        rope=ModelRope(style="interleaved"),
        defaults=_sizes(64, hidden=8192, layer_norm_eps=1e-5, use_qk_norm=False),
        flag="use_qk_norm",
    ),
    # stablelm:156, :246, :275
    Family(
        ("stablelm",),
        _pair(
            "q_layernorm",
            "k_layernorm",
            kind="layer",
            weight="list",
            eps="layer_norm_eps",
            heads_axis=-3,
            head_dim=("hidden",),
        ),
        rope=ModelRope(partial=0.25),
        defaults=_sizes(32, 32, hidden=2560, layer_norm_eps=1e-5, qk_layernorm=False),
        flag="qk_layernorm",
    ),
    # persimmon:208, :252; q, k and v are slices of one projection
    Family(
        ("persimmon", "fuyu"),
        _pair(
            "q_layernorm",
            "k_layernorm",
            kind="layer",
            bias=True,
            eps="layer_norm_eps",
            heads="num_attention_heads",
            head_dim=("hidden",),
            projected=False,
        ),
        rope=ModelRope(partial=0.5),
        defaults=_sizes(64, hidden=4096, layer_norm_eps=1e-5, qk_layernorm=True),
        flag="qk_layernorm",
    ),
    # phi:171, :194
    Family(
        ("phi",),
        _pair(
            "q_layernorm",
            "k_layernorm",
            kind="layer",
            bias=True,
            eps="layer_norm_eps",
            heads_axis=-3,
            head_dim=("hidden",),
        ),
        rope=ModelRope(partial=0.5),
        defaults=_sizes(32, hidden=2048, layer_norm_eps=1e-5, qk_layernorm=False),
        flag="qk_layernorm",
    ),
    # chameleon:187, :280, :301; rms_norm_eps is for other norms
    Family(
        ("chameleon",),
        _pair(
            *_QK,
            kind="layer",
            weight="per head",
            bias=True,
            eps=1e-5,
            rounding="every_op",
            result="promoted",
            head_dim=("hidden",),
        ),
        defaults=_sizes(32, 32, hidden=4096),
    ),
    # lara_mini:52, :238, :254
    Family(
        ("lara_mini",),
        (
            *_pair(*_QK),
            _GATED._replace(stems=("linear_attn.norm", "linear_attn.out_norm")),
        ),
        rope=ModelRope(note="on sliding attention layers only"),
        defaults=_sizes(16, 4, 128, rms_norm_eps=1e-6),
    ),
    # glm4_moe:200, :219; its layer of multi-token prediction is the last of the layers
    Family(
        ("glm4_moe",),
        _pair(*_QK, head_dim=_EITHER, **_CAST_FIRST),
        rope=ModelRope(partial=0.5),
        defaults=_sizes(96, 8, hidden=4096, rms_norm_eps=1e-5, use_qk_norm=False),
        flag="use_qk_norm",
    ),
    # its model is glm4_moe's, but for the share that turns; released files keep their first names
    Family(
        ("sarvam_moe",),
        _pair(
            ("q_norm", "query_layernorm"),
            ("k_norm", "key_layernorm"),
            ("self_attn", "attention"),
            **_CAST_FIRST,
        ),
        defaults=_sizes(64, 4, 64, rms_norm_eps=1e-6, use_qk_norm=True),
        flag="use_qk_norm",
    ),
    # hunyuan_v1_dense:178, :197; hunyuan_v1_moe:177; hunyuan_vl:518, :539
    Family(
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hunyuan_vl_text"),
        _pair(
            "query_layernorm",
            "key_layernorm",
            heads_axis=-3,
            head_dim=("head_dim", "attention_head_dim"),
            **_CAST_FIRST,
        ),
        rope=ModelRope("before norm"),
        defaults=_sizes(32, rms_norm_eps=1e-5),
    ),
    # lfm2:217, :231; lfm2_moe:302; the layers of convolutions have none
    *_alike(
        {
            "lfm2": _sizes(32, 8, hidden=2560, norm_eps=1e-5),
            "lfm2_moe": _sizes(32, 8, hidden=2048, norm_eps=1e-5),
        },
        roles=_pair("q_layernorm", "k_layernorm", eps="norm_eps", head_dim=_EITHER, **_CAST_FIRST),
    ),
    # lfm3:235, :255
    Family(
        ("lfm3",),
        _pair(*_QK, eps="norm_eps", **_CAST_FIRST),
        rope=ModelRope(note="full attention layers turn all dims, half of them by no angle"),
        defaults=_sizes(16, 4, 128, norm_eps=1e-5),
        aliases={"rms_norm_eps": "norm_eps"},
    ),
    # dots1:209, :224; doge:269, :283; mellum:226, :241
    *_alike(
        {
            "dots1": _sizes(32, 32, hidden=4608, rms_norm_eps=1e-6),
            "doge": _sizes(8, hidden=1024, rms_norm_eps=1e-6),
            "mellum": _sizes(32, 4, 128, rms_norm_eps=1e-6),
        },
        roles=_pair(*_QK, head_dim=_EITHER, **_CAST_FIRST),
    ),
    # apertus:222, :239; apertus1p5:494, :512; hy_v3:224, :241, which does not read its json's
    # qk_norm; muse_glimmer_assistant:157, :186
    *_alike(
        {
            ("apertus", "apertus1p5", "apertus1p5_text"): _sizes(
                32, hidden=4096, rms_norm_eps=1e-5
            ),
            "hy_v3": _sizes(64, 8, 128, rms_norm_eps=1e-5),
            "muse_glimmer_assistant": _sizes(32, 8, 128, rms_norm_eps=1e-5),
        },
        roles=_pair(*_QK, head_dim=_EITHER, heads_axis=-3, **_CAST_FIRST),
    ),
    # exaone4:209, :228; exaone4_5:412; exaone_moe:159; kolibri1:158, :177
    *_alike(
        {
            ("exaone4", "exaone4_5"): _sizes(32, 32, hidden=4096, rms_norm_eps=1e-5),
            "exaone_moe": _sizes(32, 32, hidden=4096, rms_norm_eps=1e-5),
            "kolibri1": _sizes(48, 4, 128, rms_norm_eps=1e-6),
        },
        roles=_pair(*_QK, head_dim=_EITHER, heads_axis=-3, **_CAST_FIRST),
        rope=ModelRope(note="none on full attention layers beside sliding ones"),
    ),
    # afmoe:91, :335, :355; beam:47, :227, :247; flint:45, :260, :276
    Family(
        ("afmoe",),
        _pair(*_QK),
        rope=ModelRope(note="on sliding attention layers only"),
        defaults=_sizes(16, head_dim=128, rms_norm_eps=1e-5),
    ),
    Family(
        ("beam",),
        _pair(*_QK),
        rope=ModelRope(note="none on layers without rope_parameters"),
        defaults=_sizes(48, 8, 128, rms_norm_eps=1e-6),
    ),
    Family(("flint",), _pair(*_QK), defaults=_sizes(32, 4, 128, rms_norm_eps=1e-6)),
    # laguna:326, :352, :373
    Family(
        ("laguna",),
        _pair(*_QK, heads="", **_CAST_FIRST),
        rope=ModelRope(note="the share that turns differs between kinds of layers"),
        defaults=_sizes(head_dim=128, rms_norm_eps=1e-6),
    ),
    # inkling:215, :235; relative positions instead of an embedding
    Family(
        ("inkling_mm_model", "inkling_text"),
        _pair(
            *_QK,
            ("self_attn", "attn"),
            heads="",
            head_dim=("head_dim", "swa_head_dim"),
            **_CAST_FIRST,
        ),
        rope=ModelRope("none"),
        defaults=_sizes(head_dim=128, swa_head_dim=128, rms_norm_eps=1e-6),
    ),
    # minimax_m3_vl:140, :414, :431, :537, :549
    Family(
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        (
            *_pair(*_QK, **_ONE_PLUS),
            Role(
                "index_q",
                ("self_attn.indexer.q_norm", "self_attn.index_q_norm"),
                "index_n_heads",
                head_dim=("index_head_dim",),
                projection="self_attn.indexer.q_proj",
                **_ONE_PLUS,
            ),
            Role(
                "index_k",
                ("self_attn.indexer.k_norm", "self_attn.index_k_norm"),
                "",
                head_dim=("index_head_dim",),
                projection="self_attn.indexer.k_proj",
                **_ONE_PLUS,
            ),
        ),
        rope=ModelRope(partial=0.5),
        defaults=_sizes(64, 4, 128, rms_norm_eps=1e-6, index_n_heads=4, index_head_dim=128),
    ),
    # step3p7:501, :697, :714; released configs say use_qk_norm false beside norms
    Family(
        ("step3p7", "step3p5"),
        _pair(*_QK, heads="", **_ONE_PLUS),
        rope=ModelRope(note="the share that turns differs by layer"),
        defaults=_sizes(head_dim=128, rms_norm_eps=1e-5),
        flag="use_qk_norm",
    ),
    # molmo2:266, :291; qk_norm_type is "qwen3", or "olmo": over all heads
    Family(
        ("molmo2", "molmo2_text"),
        (
            *_pair(*_QK, **_CAST_FIRST),
            *_pair(*_QK, weight="full", **_CAST_FIRST),
        ),
        defaults=_sizes(32, 8, 128, rms_norm_eps=1e-6),
        aliases={"layer_norm_eps": "rms_norm_eps"},
    ),
    # mllama:417, :433; layers of cross attention only
    Family(
        ("mllama", "mllama_text_model"),
        _pair(*_QK, "cross_attn", heads_axis=-3, head_dim=("hidden",), **_CAST_FIRST),
        rope=ModelRope("none"),
        defaults=_sizes(32, 8, hidden=4096, rms_norm_eps=1e-5),
    ),
    # idefics:335, :565, :609; idefics/perceiver.py:116, :158
    Family(
        ("idefics",),
        (
            *_pair(
                "q_layer_norm",
                "k_layer_norm",
                "cross_attn",
                heads_axis=-3,
                refused=(
                    "IdeficsRMSNorm rounds to its weight's dtype where that is float16 or "
                    "bfloat16, not to x's, and its result has that dtype"
                ),
            ),
            *_pair(
                "q_layer_norm",
                "k_layer_norm",
                "0",
                kind="layer",
                bias=True,
                eps=1e-5,
                heads="",
                heads_axis=-3,
                head_dim=(),
            ),
        ),
        rope=ModelRope("none"),
    ),
    # llama4:105, :331, :355; without no_rope_layers each no_rope_layer_interval-th has none
    Family(
        ("llama4", "llama4_text"),
        tuple(
            Role(
                name,
                ("self_attn.qk_norm",),
                heads,
                weight="none",
                layers="no_rope_layers",
            )
            for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
        ),
        rope=ModelRope("before norm", "interleaved"),
        defaults=_sizes(40, 8, 128, rms_norm_eps=1e-5, use_qk_norm=True, no_rope_layer_interval=4),
        flag="use_qk_norm",
    ),
    # nanochat:44, :203, :222
    Family(
        ("nanochat",),
        _pair(*_QK, weight="none", heads_axis=-3, head_dim=_EITHER),
        rope=ModelRope("before norm", "half flipped"),
        defaults=_sizes(6, hidden=768, rms_norm_eps=1e-6),
    ),
    # muse_spark:105, :380, :399, :426; muse_glimmer:312, :330
    Family(
        ("muse_spark", "muse_spark_text"),
        (
            *_pair("qk_norm", "qk_norm", weight="none", heads_axis=-3),
            Role("out", ("self_attn.o_norm",), weight="none"),
        ),
        rope=ModelRope(
            note="none on some layers; q is multiplied by qk_scale_factor after its norm"
        ),
        defaults=_sizes(128, 16, 64, rms_norm_eps=1e-5),
    ),
    Family(
        ("muse_glimmer", "muse_glimmer_text"),
        _pair("qk_norm", "qk_norm", weight="none", heads_axis=-3),
        rope=ModelRope(
            note="none on some layers; q is multiplied by qk_scale_factor after its norm"
        ),
        defaults=_sizes(32, 2, 128, rms_norm_eps=1e-5),
    ),
    # neomme:42, :315, :335
    Family(
        ("neomme",),
        _pair(*_QK, weight="none", eps="norm_eps", heads_axis=-3),
        rope=ModelRope(note="the share that turns differs between kinds of layers"),
        defaults=_sizes(16, 4, 64, norm_eps=1e-6),
    ),
    # timesfm2_5:282, :301
    Family(
        ("timesfm2_5",),
        _pair(*_QK, heads_axis=-3, **_CAST_FIRST),
        rope=ModelRope("before norm", note="q is scaled by softplus(scaling) after its norm"),
        defaults=_sizes(16, 16, 80, rms_norm_eps=1e-6),
    ),
    # deepseek_v4:45, :66, :402, :513, :798, :829, :832. What is q_norm on disk is no norm of heads
    Family(
        ("deepseek_v4",),
        (
            Role(
                "q",
                ("self_attn.q_b_norm",),
                weight="none",
                rounding="rstd",
                heads_axis=-3,
                projection="self_attn.q_b_proj",
            ),
            Role(
                "kv",
                ("self_attn.kv_norm", "attn.kv_norm", "attn.norm"),
                "",
                projection="self_attn.kv_proj",
            ),
            Role("compressed_kv", ("self_attn.compressor.kv_norm", "attn.compressor.norm"), ""),
            Role(
                "index_kv",
                ("self_attn.compressor.indexer.kv_norm", "attn.indexer.compressor.norm"),
                "",
                head_dim=("index_head_dim",),
            ),
            Role("q_lora", ("self_attn.q_a_norm", "attn.q_norm"), refused=_RANK),
        ),
        rope=ModelRope(
            style="interleaved", partial=0.125, note="the last dims turn, not the first"
        ),
        defaults=_sizes(64, 1, 512, rms_norm_eps=1e-6, index_head_dim=128),
    ),
)

_FULL: dict[str, Any] = {"weight": "full", "head_dim": _EITHER}
"""Over all heads at once, before they are told apart."""

# Models that normalize all heads of a token together.
_FULL_WIDTH = (
    # olmo2:50, :213, :227; olmo3:161; flex_olmo:225
    *_alike(
        {
            ("olmo2", "olmo3"): _sizes(32, hidden=4096, rms_norm_eps=1e-5),
            "flex_olmo": _sizes(32, hidden=4096, rms_norm_eps=1e-6),
        },
        roles=_pair(*_QK, **_FULL),
    ),
    # olmo_hybrid:49, :192, :630, :744
    Family(
        ("olmo_hybrid",),
        (*_pair(*_QK, **_FULL), _GATED._replace(stems=("linear_attn.o_norm",))),
        defaults=_sizes(30, hidden=3840, rms_norm_eps=1e-6),
    ),
    # olmoe:222, :238; clip_qkv clamps after it
    Family(
        ("olmoe",),
        _pair(*_QK, **_FULL, **_CAST_FIRST),
        defaults=_sizes(16, hidden=2048, rms_norm_eps=1e-5),
    ),
    # minimax_m2:292, :306; the old rotary_dim is a number of dims
    Family(
        ("minimax_m2",),
        _pair(*_QK, **_FULL, **_CAST_FIRST),
        defaults=_sizes(48, 8, 128, rms_norm_eps=1e-6),
    ),
    # minimax:135, :263: on the output of lightning attention
    Family(
        ("minimax",),
        (Role("out", ("self_attn.norm",), eps=1e-6, **_FULL, **_CAST_FIRST),),
        defaults=_sizes(32, 8, hidden=4096),
    ),
    # bitnet:176, :211: on the output
    Family(
        ("bitnet",),
        (Role("out", ("self_attn.attn_sub_norm",), **_FULL, **_CAST_FIRST),),
        defaults=_sizes(20, hidden=2560, rms_norm_eps=1e-5),
    ),
    # esmc:43, :206, :219
    Family(
        ("esmc",),
        _pair(*_QK, kind="layer", eps=1e-5, heads="num_attention_heads", **_FULL),
        defaults=_sizes(40, hidden=2560),
    ),
    # internvl:46, :120, :135; qianfan_ocr:69, :143
    Family(
        ("internvl_vision", "qianfan_ocr_vision"),
        _pair(
            *_QK,
            "attention",
            heads="num_attention_heads",
            eps=1e-6,
            weight="full",
            head_dim=("hidden",),
            **_CAST_FIRST,
        ),
        rope=ModelRope("none"),
        defaults=_sizes(16, hidden=1024, use_qk_norm=False),
        flag="use_qk_norm",
        tower="vision",
    ),
    # janus:284, :300
    Family(
        ("janus_vision_model",),
        _pair(
            *_QK,
            kind="layer",
            bias=True,
            heads="num_attention_heads",
            eps=1e-5,
            weight="full",
            head_dim=("hidden",),
        ),
        rope=ModelRope("none"),
        defaults=_sizes(16, hidden=1024, use_qk_norm=False),
        flag="use_qk_norm",
        tower="vision",
    ),
    # blt:358, :371
    Family(
        ("blt", "blt_local_encoder", "blt_local_decoder"),
        tuple(Role(name, (f"{name}_norm",)) for name in "qk"),
        refused="normalizes hidden states before their projection, where there are no heads",
    ),
)

# Models that normalize low-rank projections, and some of them an indexer's keys.
_LOW_RANK = (
    # deepseek_v3:380, :392 and its like
    Family(
        (
            "axk1",
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe_lite",
            "minicpm3",
            "mistral4",
            "sarvam_mla",
            "youtu",
        ),
        _LORA,
    ),
    # longcat_flash:341, :349; two attentions a layer
    Family(
        ("longcat_flash",),
        tuple(
            Role(
                f"{half}_{role.name}", (role.stems[0].replace("attn", f"attn.{i}"),), refused=_RANK
            )
            for i, half in enumerate(("first", "second"))
            for role in _LORA
        ),
    ),
    # deepseek_v32:174, :215; axk2:210, :250
    Family(
        ("deepseek_v32", "axk2"),
        (_INDEX_K, *_LORA),
        rope=ModelRope(note="turns the first qk_rope_head_dim dims of the indexer's k"),
        defaults={"index_head_dim": 128},
    ),
    # glm_moe_dsa:180, :215; mistral_large4:204, :246
    Family(
        ("glm_moe_dsa", "mistral_large4", "mistral_large4_text"),
        (_INDEX_K, *_LORA),
        rope=ModelRope(
            style="interleaved", note="turns the first qk_rope_head_dim dims of the indexer's k"
        ),
        defaults={"index_head_dim": 128},
    ),
    # hy_v4:183, :228; hy_v4_vl:132, :178; k takes the norm's dtype, float32, and its own again
    # behind it
    Family(
        ("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
        (_INDEX_K._replace(eps="rms_norm_eps"), *_LORA),
        rope=ModelRope(note="turns the last qk_rope_head_dim dims of the indexer's k"),
        defaults={"index_head_dim": 128, "rms_norm_eps": 1e-5},
    ),
    # dots3_note:213, :250, :496, :548
    Family(
        ("dots3_note", "dots3_note_text"),
        (
            _INDEX_K,
            Role(
                "k_rope",
                ("self_attn.k_rope_only_layernorm",),
                "",
                heads_axis=-3,
                head_dim=("qk_rope_head_dim",),
                **_CAST_FIRST,
            ),
            *_LORA,
        ),
        rope=ModelRope(
            style="interleaved", note="turns the first qk_rope_head_dim dims of the indexer's k"
        ),
        defaults={"index_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5},
    ),
    # glm5_next:374, :658, :800, :835
    Family(
        ("glm5_next", "glm5_next_text"),
        (_INDEX_K, *_LORA, _GATED._replace(stems=("self_attn.o_norm",))),
        rope=ModelRope("none"),
        defaults={"index_head_dim": 128},
    ),
    # kimi_linear:75, :603; bailing_hybrid:76, :680
    Family(
        ("kimi_linear", "bailing_hybrid"),
        (*_LORA, _GATED._replace(stems=("self_attn.o_norm",))),
    ),
)

# What is left: norms of outputs, and rows that serve no norm but say why.
_OTHERS = (
    # diffllama:242, :308
    Family(
        ("diffllama",),
        (Role("out", ("self_attn.groupnorm",), weight="none", head_dim=_EITHER),),
        defaults=_sizes(32, hidden=2048),
        refused=(
            "its groupnorm takes the outputs of two heads as one; "
            "HeadNorm(head_dim=2 * head_dim, eps=rms_norm_eps) is that norm"
        ),
    ),
    # xlstm:946, :954, :1091, its own module where the package xlstm is not installed
    Family(
        ("xlstm",),
        tuple(
            Role(
                "out",
                ("mlstm_layer.multihead_norm",),
                "num_heads",
                kind="layer",
                weight="flat",
                bias=bias,
                eps="norm_eps",
                rounding=rounding,
                result="promoted",
                head_dim=(),
            )
            for bias, rounding in ((False, "before_weight"), (True, "every_op"))
        ),
        rope=ModelRope("none"),
        defaults={"num_heads": 8, "norm_eps": 1e-6},
    ),
    # mamba2:105, :430; bamba:637; granitemoehybrid:557; nemotron_h:441; zamba2:697; falcon_h1:640
    Family(
        ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2", "falcon_h1"),
        (Role("out", ("mixer.norm", "mamba.norm", "mamba_decoder.mamba.norm"), refused=_GATE),),
    ),
    # zaya:259, :377, :395
    Family(
        ("zaya",),
        (Role("k", ("self_attn.qk_norm",), "num_key_value_heads", tensor="temp"),),
        refused=(
            "ZayaQKNorm divides by the larger of the row's length and its dtype's machine epsilon, "
            "in x's dtype, and multiplies k by a temperature"
        ),
    ),
    # inkling2:432, :465, and in 5.24.0 :423, :432, where q_l2_clip is q_proj.norm;
    # inkling2_loop:466, :475; there is a norm of v too, without a weight
    Family(
        ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
        (
            Role(
                "q",
                ("self_attn.q_proj.norm", "self_attn.q_l2_clip", "attn.q_l2_clip"),
                "",
                tensor="scale",
            ),
        ),
        refused="its L2Clip shortens only the rows that are longer than a threshold",
    ),
    # dory:44, :250, :251: both without a weight; sqk scales q after its rotary embedding, :258
    Family(
        ("dory",),
        (Role("q", ("self_attn", "mixer"), tensor="sqk"),),
        refused=(
            "DoryL2Norm divides by the length of a row, not by the root of its mean square; "
            "HeadNorm(weight, eps=1e-6 / head_dim), with float32 weights of head_dim ** -0.5, is "
            "that norm"
        ),
    ),
    # esmfold2:108, :299
    Family(
        ("esmfold2",),
        _pair(*_QK, kind="layer", weight="full"),
        refused=(
            "its language model normalizes all heads together, and the norms of its atoms have no "
            "weight: HeadNorm(head_dim=..., eps=1e-6) is theirs"
        ),
    ),
)

# Towers beside a text model, and encoders of video and audio.
_VISION_AND_AUDIO = (
    # sapiens2:331, :461, :478; keys' heads differ by layer
    Family(
        ("sapiens2",),
        _pair(
            *_QK,
            ("attention", "attn"),
            heads="",
            heads_axis=-3,
            head_dim=("hidden",),
            **_CAST_FIRST,
        ),
        rope=ModelRope(note="on patches only"),
        defaults=_sizes(16, hidden=1024, rms_norm_eps=1e-6, use_qk_norm=True),
        flag="use_qk_norm",
        tower="vision",
    ),
    # gemma4:204, :920, :938
    Family(
        ("gemma4_vision",),
        (*_pair(*_QK, projected=False), _V_OF_K),
        rope=ModelRope(note="each half of the dims turns by a coordinate of its own"),
        defaults=_sizes(12, 12, 64, rms_norm_eps=1e-6),
        tower="vision",
    ),
    # glm_ocr:354, :370; glm5_next:1621
    Family(
        ("glm_ocr_vision", "glm5_next_vision"),
        _pair(*_QK, "attn", heads="num_heads", head_dim=(), projected=False, **_CAST_FIRST),
        rope=ModelRope(note="in float32, by two coordinates"),
        defaults={"num_heads": 16, "rms_norm_eps": 1e-5},
        tower="vision",
    ),
    # dots3_note:1358
    Family(
        ("dots3_note_vision_encoder",),
        _pair(
            *_QK,
            "attn",
            heads="num_attention_heads",
            head_dim=("hidden",),
            projected=False,
            **_CAST_FIRST,
        ),
        rope=ModelRope(note="in float32, by two coordinates"),
        defaults=_sizes(24, hidden=1536, rms_norm_eps=1e-5),
        tower="vision",
    ),
    # lfm3_vl:212, :227
    Family(
        ("lfm3_vl_vision",),
        _pair(
            ("q_norm", "q_layernorm"),
            ("k_norm", "k_layernorm"),
            eps="norm_eps",
            head_dim=("hidden",),
            **_CAST_FIRST,
        ),
        rope=ModelRope(note="in float32, by two coordinates"),
        defaults=_sizes(16, 8, hidden=1024, norm_eps=1e-5),
        tower="vision",
    ),
    # pe_audio:389, :406; pe_video:313; pe_audio_video:326
    *(
        Family(
            names,
            _pair(*_QK, **_CAST_FIRST),
            rope=ModelRope(style="interleaved"),
            defaults=_sizes(14, head_dim=128, rms_norm_eps=1e-5),
            tower=tower,
        )
        for names, tower in (
            (("pe_audio", "pe_audio_encoder", "pe_audio_video_encoder"), "audio"),
            (("pe_video_encoder",), "text"),
        )
    ),
    # nemotron3_5_transcribe:285, :298
    Family(
        (
            "nemotron3_5_transcribe_audio",
            "nemotron3_5_transcribe_asr_audio",
            "nemotron3_5_transcribe_word_timestamp",
        ),
        _pair(
            *_QK, ("self_attn", "attn"), kind="layer", bias=True, eps=1e-5, heads="", head_dim=()
        ),
        rope=ModelRope(partial=0.5),
        tower="audio",
    ),
)


def _joint(
    attention: str = "attn", *, added: tuple[str, ...] = (), **shared: Any
) -> tuple[Role, ...]:
    """Return q and k of a diffusion transformer, and those of the text added to the image."""
    shared = {
        "heads": "num_attention_heads",
        "head_dim": ("attention_head_dim",),
        "eps": 1e-6,
        **shared,
    }
    roles = [
        Role(name, (f"{attention}.norm_{name}",), projection=f"{attention}.to_{name}", **shared)
        for name in "qk"
    ]
    roles += [
        Role(
            f"added_{name}",
            (f"{attention}.norm_added_{name}",),
            projection=f"{attention}.add_{name}_proj",
            **shared,
        )
        for name in added
    ]
    return tuple(roles)


def _self_and_cross(**shared: Any) -> tuple[Role, ...]:
    """Return q and k of a layer's self-attention, ``attn1``, and of its cross-attention."""
    return (*_joint("attn1", **shared), *_named("cross", _joint("attn2", **shared)))


_DIFFUSERS: dict[str, Any] = {"rounding": "before_weight", "result": "weight"}
"""diffusers.models.normalization.RMSNorm rounds to its weight's dtype, and multiplies in it."""
_TORCH: dict[str, Any] = {"rounding": "once"}
"""torch.nn.RMSNorm, of torch 2.8 and later; earlier ones rounded before the weight."""

# Diffusion transformers, named by their classes in diffusers.
_DIFFUSION = (
    # attention_processor.py, JointAttnProcessor2_0
    Family(
        ("SD3Transformer2DModel",),
        (
            *_joint(added=("q", "k"), heads_axis=-3, **_DIFFUSERS),
            *_named("second", _joint("attn2", heads_axis=-3, **_DIFFUSERS)),
        ),
        rope=ModelRope("none"),
        defaults=_sizes(18, attention_head_dim=64) | {"qk_norm": None},
        flag="qk_norm",
        tower="transformer",
    ),
    # transformer_flux.py:98 and its like
    *_alike(
        {
            (
                "FluxTransformer2DModel",
                "ChromaTransformer2DModel",
                "BriaTransformer2DModel",
                "LongCatImageTransformer2DModel",
                "OvisImageTransformer2DModel",
            ): _sizes(24, attention_head_dim=128),
            "Flux2Transformer2DModel": _sizes(48, attention_head_dim=128),
        },
        roles=_joint(added=("q", "k"), **_TORCH),
        rope=ModelRope(style="interleaved"),
        tower="transformer",
    ),
    # transformer_hunyuan_video.py:71
    *_alike(
        {
            ("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"): _sizes(
                24, attention_head_dim=128, qk_norm="rms_norm"
            ),
            "HunyuanImageTransformer2DModel": _sizes(
                28, attention_head_dim=128, qk_norm="rms_norm"
            ),
            "HunyuanVideo15Transformer3DModel": _sizes(
                16, attention_head_dim=128, qk_norm="rms_norm"
            ),
        },
        roles=_joint(added=("q", "k"), **_DIFFUSERS),
        rope=ModelRope(style="interleaved", note="on the image only"),
        flag="qk_norm",
        tower="transformer",
    ),
    # transformer_qwenimage.py:532
    Family(
        ("QwenImageTransformer2DModel",),
        _joint(added=("q", "k"), **_DIFFUSERS),
        rope=ModelRope(style="interleaved"),
        defaults=_sizes(24, attention_head_dim=128),
        tower="transformer",
    ),
    # transformer_lumina2.py:102, :174; transformer_z_image.py:104, :209
    *(
        Family(
            (name,),
            _joint(attention, heads="", head_dim=(), eps=1e-5, **_DIFFUSERS),
            rope=ModelRope(style="interleaved"),
            tower="transformer",
        )
        for name, attention in (
            ("Lumina2Transformer2DModel", "attn"),
            ("ZImageTransformer2DModel", "attention"),
        )
    ),
    # transformer_cosmos.py:172
    Family(
        ("CosmosTransformer3DModel",),
        _self_and_cross(eps=1e-5, heads_axis=-3, **_DIFFUSERS),
        rope=ModelRope(note="in self-attention only"),
        defaults=_sizes(32, attention_head_dim=128),
        tower="transformer",
    ),
    # transformer_mochi.py, normalization.py:573
    Family(
        ("MochiTransformer3DModel",),
        _joint("attn1", added=("q", "k"), eps=1e-5),
        rope=ModelRope(style="interleaved", note="on the video only"),
        defaults=_sizes(24, attention_head_dim=128, qk_norm="rms_norm"),
        flag="qk_norm",
        tower="transformer",
    ),
    # transformer_prx.py:122, :224
    Family(
        ("PRXTransformer2DModel",),
        _joint(
            "attention", added=("k",), heads="num_heads", head_dim=(), heads_axis=-3, **_DIFFUSERS
        ),
        rope=ModelRope(style="interleaved", note="on the image only"),
        defaults={"num_heads": 28},
        tower="transformer",
    ),
    # transformer_kandinsky.py:306, :358: eps None is float32's own, x being float32 there
    Family(
        ("Kandinsky5Transformer3DModel",),
        tuple(
            Role(
                f"{prefix}{name}",
                (f"{attention}.{module}_norm",),
                "",
                eps=2.0**-23,
                head_dim=(),
                projection=f"{attention}.to_{module}",
            )
            for prefix, attention in (("", "self_attention"), ("cross_", "cross_attention"))
            for name, module in (("q", "query"), ("k", "key"))
        ),
        rope=ModelRope(style="interleaved", note="in self-attention only"),
        tower="transformer",
    ),
    # transformer_krea2.py:37; weights stay float32
    Family(
        ("Krea2Transformer2DModel",),
        _joint(heads="", eps=1e-5, **_ONE_PLUS),
        rope=ModelRope(style="interleaved"),
        defaults={"attention_head_dim": 128},
        tower="transformer",
    ),
    # attention_processor.py, CogVideoXAttnProcessor2_0
    Family(
        ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        _joint("attn1", kind="layer", bias=True, heads_axis=-3),
        rope=ModelRope(style="interleaved", note="on the video only"),
        defaults=_sizes(30, attention_head_dim=64),
        tower="transformer",
    ),
    # transformer_cogview4.py:146; transformer_glm_image.py; transformer_cogview3plus.py
    Family(
        ("CogView4Transformer2DModel", "GlmImageTransformer2DModel"),
        _joint("attn1", kind="layer", weight="none", eps=1e-5, heads_axis=-3),
        rope=ModelRope(note="on the image only"),
        defaults=_sizes(64, attention_head_dim=40),
        tower="transformer",
    ),
    Family(
        ("CogView3PlusTransformer2DModel",),
        _joint("attn1", kind="layer", weight="none", heads_axis=-3),
        rope=ModelRope("none"),
        defaults=_sizes(64, attention_head_dim=40),
        tower="transformer",
    ),
    # attention_processor.py, AuraFlowAttnProcessor2_0; normalization.py:84; the same norm is on the
    # text that joint blocks add
    Family(
        ("AuraFlowTransformer2DModel",),
        _joint(kind="layer", weight="none", eps=1e-5),
        rope=ModelRope("none"),
        defaults=_sizes(12, attention_head_dim=256),
        tower="transformer",
    ),
    # transformer_wan.py and its like
    *_alike(
        {
            (
                "WanTransformer3DModel",
                "WanVACETransformer3DModel",
                "WanAnimateTransformer3DModel",
                "ChronoEditTransformer3DModel",
                "HeliosTransformer3DModel",
            ): _sizes(40, attention_head_dim=128, eps=1e-6),
            "SkyReelsV2Transformer3DModel": _sizes(16, attention_head_dim=128, eps=1e-6),
        },
        roles=_self_and_cross(weight="full", eps="eps", **_TORCH),
        rope=ModelRope(style="interleaved", note="in self-attention only"),
        tower="transformer",
    ),
    # transformer_ltx.py
    Family(
        ("LTXVideoTransformer3DModel",),
        _self_and_cross(weight="full", eps=1e-5, **_TORCH),
        rope=ModelRope(style="interleaved", note="in self-attention only"),
        defaults=_sizes(32, attention_head_dim=64),
        tower="transformer",
    ),
)

FAMILIES = (*_HEADS, *_FULL_WIDTH, *_LOW_RANK, *_OTHERS, *_VISION_AND_AUDIO, *_DIFFUSION)

BY_MODEL_TYPE: Mapping[str, Family] = {
    name: family for family in FAMILIES for name in family.model_types
}
