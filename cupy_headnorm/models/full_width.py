"""Model types whose norms span the whole width or a rank: refused by name."""

from __future__ import annotations

from cupy_headnorm.models import records
from cupy_headnorm.models.records import (
    CAST_FIRST,
    EITHER,
    FULL,
    GATE,
    GATED,
    INDEX_K,
    LORA,
    QK,
    RANK,
    Family,
    ModelRope,
    Role,
    Rotary,
)

# Models that normalize all heads of a token together.
FULL_WIDTH = (
    # olmo2:50, :213, :227; olmo3:161; flex_olmo:225
    *records.alike(
        {
            "olmo2": records.sizes(32, hidden=4096, rms_norm_eps=1e-5),
            "olmo3": records.sizes(32, hidden=4096, rms_norm_eps=1e-5),
            "flex_olmo": records.sizes(32, hidden=4096, rms_norm_eps=1e-6),
        },
        # cos and sin stay in float32, and so does all until the cast: olmo2:154. A config's
        # rope_theta goes to the full layers, the sliding ones keep the class's: olmo3:117
        rotary={
            "olmo2": Rotary(table="float32"),
            "olmo3": Rotary(5e5, "float32", full_alone=True, sliding_theta=5e5),
            "flex_olmo": Rotary(5e5, "float32"),
        },
        roles=records.pair(*QK, **FULL),
    ),
    # olmo_hybrid:49, :192, :630, :744
    Family(
        ("olmo_hybrid",),
        (*records.pair(*QK, **FULL), GATED._replace(stems=("linear_attn.o_norm",))),
        rotary=Rotary(table="float32"),
        defaults=records.sizes(30, hidden=3840, rms_norm_eps=1e-6),
    ),
    # olmoe:222, :238; clip_qkv clamps after it
    Family(
        ("olmoe",),
        records.pair(*QK, **FULL, **CAST_FIRST),
        defaults=records.sizes(16, hidden=2048, rms_norm_eps=1e-5),
    ),
    # minimax_m2:292, :306; the old rotary_dim is a number of dims
    Family(
        ("minimax_m2",),
        records.pair(*QK, **FULL, **CAST_FIRST),
        # configuration_minimax_m2:100
        rotary=Rotary(5e6, shares=("partial_rotary_factor", "rotary_dim")),
        defaults=records.sizes(48, 8, 128, rms_norm_eps=1e-6),
    ),
    # minimax:135, :263: on the output of lightning attention
    Family(
        ("minimax",),
        (Role("out", ("self_attn.norm",), eps=1e-6, **FULL, **CAST_FIRST),),
        defaults=records.sizes(32, 8, hidden=4096),
    ),
    # bitnet:176, :211: on the output
    Family(
        ("bitnet",),
        (Role("out", ("self_attn.attn_sub_norm",), **FULL, **CAST_FIRST),),
        defaults=records.sizes(20, hidden=2560, rms_norm_eps=1e-5),
    ),
    # esmc:43, :206, :219
    Family(
        ("esmc",),
        records.pair(*QK, kind="layer", eps=1e-5, heads="num_attention_heads", **FULL),
        defaults=records.sizes(40, hidden=2560),
    ),
    # internvl:46, :120, :135; qianfan_ocr:69, :143
    Family(
        ("internvl_vision", "qianfan_ocr_vision"),
        records.pair(
            *QK,
            "attention",
            heads="num_attention_heads",
            eps=1e-6,
            weight="full",
            head_dim=("hidden",),
            **CAST_FIRST,
        ),
        rope=ModelRope("none"),
        defaults=records.sizes(16, hidden=1024, use_qk_norm=False),
        flag="use_qk_norm",
        tower="vision",
    ),
    # janus:284, :300
    Family(
        ("janus_vision_model",),
        records.pair(
            *QK,
            kind="layer",
            bias=True,
            heads="num_attention_heads",
            eps=1e-5,
            weight="full",
            head_dim=("hidden",),
        ),
        rope=ModelRope("none"),
        defaults=records.sizes(16, hidden=1024, use_qk_norm=False),
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
LOW_RANK = (
    # deepseek_v3:380, :392 and its like
    Family(
        ("axk1", "deepseek_v3", "glm4_moe_lite", "sarvam_mla", "youtu"),
        LORA,
        rotary=Rotary(part=64, neighbours="rope_interleave"),
    ),
    Family(
        ("mistral4",),
        LORA,
        rotary=Rotary(part=64, neighbours="rope_interleave", own_parameters=True),
    ),
    Family(("deepseek_v2",), LORA, rotary=Rotary(part=64, neighbours="always")),
    Family(("minicpm3",), LORA, rotary=Rotary(part=32)),
    # longcat_flash:341, :349; two attentions a layer
    Family(
        ("longcat_flash",),
        tuple(
            Role(f"{half}_{role.name}", (role.stems[0].replace("attn", f"attn.{i}"),), refused=RANK)
            for i, half in enumerate(("first", "second"))
            for role in LORA
        ),
        rotary=Rotary(part=64, neighbours="always"),
    ),
    # deepseek_v32:174, :215; axk2:210, :250
    Family(
        ("deepseek_v32", "axk2"),
        (INDEX_K, *LORA),
        rope=ModelRope(note="rotates the first qk_rope_head_dim dims of the indexer's k"),
        rotary=Rotary(refused="an indexer's dims rotate"),
        defaults={"index_head_dim": 128},
    ),
    # glm_moe_dsa:180, :215; mistral_large4:204, :246
    Family(
        ("glm_moe_dsa", "mistral_large4", "mistral_large4_text"),
        (INDEX_K, *LORA),
        rope=ModelRope(
            style="interleaved", note="rotates the first qk_rope_head_dim dims of the indexer's k"
        ),
        rotary=Rotary(refused="an indexer's dims rotate"),
        defaults={"index_head_dim": 128},
    ),
    # hy_v4:183, :228; hy_v4_vl:132, :178; k takes the norm's dtype, float32, and its own again
    # behind it
    Family(
        ("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
        (INDEX_K._replace(eps="rms_norm_eps"), *LORA),
        rope=ModelRope(note="rotates the last qk_rope_head_dim dims of the indexer's k"),
        rotary=Rotary(refused="an indexer's dims rotate"),
        defaults={"index_head_dim": 128, "rms_norm_eps": 1e-5},
    ),
    # dots3_note:213, :250, :496, :548
    Family(
        ("dots3_note", "dots3_note_text"),
        (
            INDEX_K,
            Role(
                "k_rope",
                ("self_attn.k_rope_only_layernorm",),
                "",
                heads_axis=-3,
                head_dim=("qk_rope_head_dim",),
                **CAST_FIRST,
            ),
            *LORA,
        ),
        rope=ModelRope(
            style="interleaved", note="rotates the first qk_rope_head_dim dims of the indexer's k"
        ),
        rotary=Rotary(refused="an indexer's dims rotate"),
        defaults={"index_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5},
    ),
    # glm5_next:374, :658, :800, :835
    Family(
        ("glm5_next", "glm5_next_text"),
        (INDEX_K, *LORA, GATED._replace(stems=("self_attn.o_norm",))),
        rope=ModelRope("none"),
        defaults={"index_head_dim": 128},
    ),
    # kimi_linear:75, :603
    Family(
        ("kimi_linear",),
        (*LORA, GATED._replace(stems=("self_attn.o_norm",))),
        rotary=Rotary(refused="it has none"),
    ),
    # bailing_hybrid:76, :680
    Family(
        ("bailing_hybrid",),
        (*LORA, GATED._replace(stems=("self_attn.o_norm",))),
        rotary=Rotary(part=64, neighbours="always"),
    ),
)

MIXER = (Role("out", ("mixer.norm", "mamba.norm", "mamba_decoder.mamba.norm"), refused=GATE),)

# What is left: norms of outputs, and rows that have no norm to offer but say why.
OTHERS = (
    # diffllama:242, :308
    Family(
        ("diffllama",),
        (Role("out", ("self_attn.groupnorm",), weight="none", head_dim=EITHER),),
        defaults=records.sizes(32, hidden=2048),
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
    Family(("mamba2", "nemotron_h"), MIXER, rotary=Rotary(refused="it has none")),
    Family(("falcon_h1",), MIXER),
    # configuration_bamba:92
    Family(
        ("bamba",),
        MIXER,
        rotary=Rotary(shares=("partial_rotary_factor",), shares_in_parameters=True, share=0.5),
    ),
    # granitemoehybrid:1057
    Family(
        ("granitemoehybrid",),
        MIXER,
        rotary=Rotary(only_with=("position_embedding_type", "rope")),
    ),
    # zamba2:1142, configuration_zamba2:114
    Family(
        ("zamba2",),
        MIXER,
        rotary=Rotary(only_with=("use_mem_rope", True), hidden_times=2),
        aliases={"attention_head_dim": "head_dim"},
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
        records.pair(*QK, kind="layer", weight="full"),
        refused=(
            "its language model normalizes all heads together, and the norms of its atoms have no "
            "weight: HeadNorm(head_dim=..., eps=1e-6) is theirs"
        ),
    ),
)
