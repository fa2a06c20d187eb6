"""
What models do to their heads: data, one row a family; `checkpoint.reader` applies it.

A row says what transformers' own module computes, to the rounding step, and where its tensors lie.
Sources are lines of ``transformers/models/<name>/modeling_<name>.py`` in transformers 5.23.0, of
types that came later in 5.24.0, and of diffusers 0.42.1 for the diffusion transformers.
"""

from __future__ import annotations

from cupy_headnorm.models import records
from cupy_headnorm.models.records import (
    CAST_FIRST,
    EITHER,
    GATED,
    ONE_PLUS,
    QK,
    RANK,
    V_OF_K,
    Family,
    ModelRope,
    Role,
    Rotary,
)

# Text models whose heads are normalized one by one.
HEADS = (
    # qwen3:49, :229, :244; qwen3_moe:146; qwen3_vl:492; qwen3_vl_moe:254; qwen3_omni_moe:1454
    *records.alike(
        {
            "qwen3": records.sizes(32, 32, 128, rms_norm_eps=1e-6),
            "qwen3_moe": records.sizes(32, 4, hidden=2048, rms_norm_eps=1e-6),
            ("qwen3_vl", "qwen3_vl_text"): records.sizes(32, 32, 128, rms_norm_eps=1e-6),
            ("qwen3_vl_moe", "qwen3_vl_moe_text"): records.sizes(
                16, 16, hidden=2048, rms_norm_eps=1e-6
            ),
            ("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"): records.sizes(
                28, 4, hidden=2048, rms_norm_eps=1e-6
            ),
        },
        # modeling files of each: the rows of M-RoPE interleave
        rotary={
            "qwen3_vl": Rotary(5e5, sections=(24, 20, 20)),
            "qwen3_vl_moe": Rotary(5e5, sections=(24, 20, 20)),
            "qwen3_omni_moe": Rotary(1e6, sections=(24, 20, 20)),
        },
        roles=records.pair(*QK, head_dim=EITHER, **CAST_FIRST),
    ),
    # qwen3_omni_moe:2460 and, by inheritance, :1454; in the wave decoder q_norm is nothing, :3540
    Family(
        ("qwen3_omni_moe_talker_text",),
        records.pair(*QK, head_dim=EITHER, **CAST_FIRST),
        rotary=Rotary(sections=(24, 20, 20)),
        defaults=records.sizes(16, 2, hidden=1024, rms_norm_eps=1e-6),
    ),
    Family(
        ("qwen3_omni_moe_talker_code_predictor",),
        records.pair(*QK, **CAST_FIRST),
        defaults=records.sizes(16, 8, 128, rms_norm_eps=1e-6),
    ),
    # qwen3_next:126, :242, :253, :269: q_proj holds a gate beside each head, q is half a slice
    *records.alike(
        {
            "qwen3_next": records.sizes(16, 2, 256, rms_norm_eps=1e-6),
            ("qwen3_5", "qwen3_5_text"): records.sizes(16, 4, 256, rms_norm_eps=1e-6),
            ("qwen3_5_moe", "qwen3_5_moe_text"): records.sizes(16, 2, 256, rms_norm_eps=1e-6),
        },
        rotary={
            "qwen3_next": Rotary(shares=("partial_rotary_factor",)),
            "qwen3_5": Rotary(shares=("partial_rotary_factor",), sections=(11, 11, 10)),
            "qwen3_5_moe": Rotary(shares=("partial_rotary_factor",), sections=(11, 11, 10)),
        },
        roles=(*records.pair(*QK, projection_factor=2, **ONE_PLUS), GATED),
        rope=ModelRope(partial=0.25),
    ),
    # qwen4_exp:141, :687, :710, :741, :836, :861; the indexer's k is a mean of keys, normalized
    Family(
        ("qwen4_exp", "qwen4_exp_text"),
        (
            *records.pair(*QK, projection_factor=2, **ONE_PLUS),
            *(
                Role(
                    f"index_{name}",
                    (f"self_attn.indexer.{name}_layernorm",),
                    heads,
                    head_dim=("indexer_head_dim",),
                    **ONE_PLUS,
                )
                for name, heads in (("q", "indexer_n_heads"), ("k", "indexer_kv_heads"))
            ),
            GATED,
        ),
        rotary=Rotary(shares=("partial_rotary_factor",), sections=(11, 11, 10)),
        defaults=records.sizes(16, 2, 256, rms_norm_eps=1e-6),
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
        records.pair(*QK, heads_axis=-3, **ONE_PLUS),
        rotary=Rotary(1e6, full_alone=True, sliding_theta=1e4, pattern=6),
        defaults=records.sizes(8, 4, 256, rms_norm_eps=1e-6),
    ),
    # gemma3n:129, :1182, :1213
    Family(
        ("gemma3n", "gemma3n_text"),
        (*records.pair(*QK), V_OF_K),
        rotary=Rotary(1e6, full_alone=True, sliding_theta=1e4),
        defaults=records.sizes(8, 2, 256, rms_norm_eps=1e-6),
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
        (*records.pair(*QK, heads="", head_dim=()), V_OF_K._replace(heads="")),
        rope=ModelRope(note="full attention layers rotate all dims, most of them by no angle"),
        rotary=Rotary(own_parameters=True),
        # configuration_gemma4:170
        defaults=records.sizes(head_dim=256, global_head_dim=512, rms_norm_eps=1e-6),
    ),
    # embedding_gemma2:49, :346, :364
    Family(
        ("embedding_gemma2", "embedding_gemma2_text"),
        (
            *records.pair(*QK, heads="", head_dim=(), heads_axis=-3),
            V_OF_K._replace(heads="", heads_axis=-3),
        ),
        rotary=Rotary(own_parameters=True),
        # configuration_embedding_gemma2:95
        defaults=records.sizes(head_dim=256, global_head_dim=512, rms_norm_eps=1e-6),
    ),
    # cohere:50, :203, :254
    Family(
        ("cohere",),
        records.pair(*QK, kind="layer", weight="per head", eps="layer_norm_eps", head_dim=EITHER),
        rope=ModelRope(style="interleaved"),
        # cos and sin are rounded to x's dtype, then all is float32: cohere:175
        rotary=Rotary(5e5, table="x"),
        defaults=records.sizes(64, hidden=8192, layer_norm_eps=1e-5, use_qk_norm=False),
        flag="use_qk_norm",
    ),
    # stablelm:156, :246, :275
    Family(
        ("stablelm",),
        records.pair(
            "q_layernorm",
            "k_layernorm",
            kind="layer",
            weight="list",
            eps="layer_norm_eps",
            heads_axis=-3,
            head_dim=("hidden",),
        ),
        rope=ModelRope(partial=0.25),
        rotary=Rotary(shares=("partial_rotary_factor",)),
        defaults=records.sizes(32, 32, hidden=2560, layer_norm_eps=1e-5, qk_layernorm=False),
        flag="qk_layernorm",
    ),
    # persimmon:208, :252; q, k and v are slices of one projection
    Family(
        ("persimmon", "fuyu"),
        records.pair(
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
        rotary=Rotary(shares=("partial_rotary_factor",)),
        defaults=records.sizes(64, hidden=4096, layer_norm_eps=1e-5, qk_layernorm=True),
        flag="qk_layernorm",
    ),
    # phi:171, :194
    Family(
        ("phi",),
        records.pair(
            "q_layernorm",
            "k_layernorm",
            kind="layer",
            bias=True,
            eps="layer_norm_eps",
            heads_axis=-3,
            head_dim=("hidden",),
        ),
        rope=ModelRope(partial=0.5),
        rotary=Rotary(shares=("partial_rotary_factor",)),
        defaults=records.sizes(32, hidden=2048, layer_norm_eps=1e-5, qk_layernorm=False),
        flag="qk_layernorm",
    ),
    # chameleon:187, :280, :301; rms_norm_eps is for other norms
    Family(
        ("chameleon",),
        records.pair(
            *QK,
            kind="layer",
            weight="per head",
            bias=True,
            eps=1e-5,
            rounding="every_op",
            result="promoted",
            head_dim=("hidden",),
        ),
        defaults=records.sizes(32, 32, hidden=4096),
    ),
    # lara_mini:52, :238, :254
    Family(
        ("lara_mini",),
        (
            *records.pair(*QK),
            GATED._replace(stems=("linear_attn.norm", "linear_attn.out_norm")),
        ),
        rope=ModelRope(note="on sliding attention layers only"),
        rotary=Rotary(unrotated="full beside sliding"),
        defaults=records.sizes(16, 4, 128, rms_norm_eps=1e-6),
    ),
    # glm4_moe:200, :219; its layer of multi-token prediction is the last of the layers
    Family(
        ("glm4_moe",),
        records.pair(*QK, head_dim=EITHER, **CAST_FIRST),
        rope=ModelRope(partial=0.5),
        rotary=Rotary(shares=("partial_rotary_factor",)),
        defaults=records.sizes(96, 8, hidden=4096, rms_norm_eps=1e-5, use_qk_norm=False),
        flag="use_qk_norm",
    ),
    # its model is glm4_moe's, but for the share that rotates; released files keep their first names
    Family(
        ("sarvam_moe",),
        records.pair(
            ("q_norm", "query_layernorm"),
            ("k_norm", "key_layernorm"),
            ("self_attn", "attention"),
            **CAST_FIRST,
        ),
        rotary=Rotary(8e6, shares=("partial_rotary_factor",)),
        defaults=records.sizes(64, 4, 64, rms_norm_eps=1e-6, use_qk_norm=True),
        flag="use_qk_norm",
    ),
    # hunyuan_v1_dense:178, :197; hunyuan_v1_moe:177; hunyuan_vl:518, :539
    *records.alike(
        {
            ("hunyuan_v1_dense", "hunyuan_v1_moe"): records.sizes(32, rms_norm_eps=1e-5),
            ("hunyuan_vl", "hunyuan_vl_text"): records.sizes(32, rms_norm_eps=1e-5),
        },
        # hunyuan_v1_dense:298; cos and sin are rounded first: hunyuan_vl:460
        rotary={
            "hunyuan_v1_dense": Rotary(alpha=True),
            "hunyuan_vl": Rotary(table="x", alpha=True, wide_sections=True),
        },
        roles=records.pair(
            "query_layernorm",
            "key_layernorm",
            heads_axis=-3,
            head_dim=("head_dim", "attention_head_dim"),
            **CAST_FIRST,
        ),
        rope=ModelRope("before norm"),
        aliases={"attention_head_dim": "head_dim"},
    ),
    # lfm2:217, :231; lfm2_moe:302; the layers of convolutions have none
    *records.alike(
        {
            "lfm2": records.sizes(32, 8, hidden=2560, norm_eps=1e-5),
            "lfm2_moe": records.sizes(32, 8, hidden=2048, norm_eps=1e-5),
        },
        rotary={"lfm2": Rotary(1e6), "lfm2_moe": Rotary(1e6)},
        roles=records.pair(
            "q_layernorm", "k_layernorm", eps="norm_eps", head_dim=EITHER, **CAST_FIRST
        ),
    ),
    # lfm3:235, :255
    Family(
        ("lfm3",),
        records.pair(*QK, eps="norm_eps", **CAST_FIRST),
        rope=ModelRope(note="full attention layers rotate all dims, half of them by no angle"),
        rotary=Rotary(table="float32", own_parameters=True),  # lfm3:146
        defaults=records.sizes(16, 4, 128, norm_eps=1e-5),
        aliases={"rms_norm_eps": "norm_eps"},
    ),
    # dots1:209, :224; doge:269, :283; mellum:226, :241
    *records.alike(
        {
            "dots1": records.sizes(32, 32, hidden=4608, rms_norm_eps=1e-6),
            "doge": records.sizes(8, hidden=1024, rms_norm_eps=1e-6),
            "mellum": records.sizes(32, 4, 128, rms_norm_eps=1e-6),
        },
        rotary={"mellum": Rotary(own_parameters=True)},
        roles=records.pair(*QK, head_dim=EITHER, **CAST_FIRST),
    ),
    # apertus:222, :239; apertus1p5:494, :512; hy_v3:224, :241, which does not read its json's
    # qk_norm; muse_glimmer_assistant:157, :186
    *records.alike(
        {
            ("apertus", "apertus1p5", "apertus1p5_text"): records.sizes(
                32, hidden=4096, rms_norm_eps=1e-5
            ),
            "hy_v3": records.sizes(64, 8, 128, rms_norm_eps=1e-5),
            "muse_glimmer_assistant": records.sizes(32, 8, 128, rms_norm_eps=1e-5),
        },
        rotary={
            "apertus": Rotary(12e6, own_parameters=True),
            "hy_v3": Rotary(11_158_840.0),
            "muse_glimmer_assistant": Rotary(5e5),
        },
        roles=records.pair(*QK, head_dim=EITHER, heads_axis=-3, **CAST_FIRST),
    ),
    # exaone4:209, :228; exaone4_5:412; exaone_moe:159; kolibri1:158, :177
    *records.alike(
        {
            ("exaone4", "exaone4_5"): records.sizes(32, 32, hidden=4096, rms_norm_eps=1e-5),
            "exaone_moe": records.sizes(32, 32, hidden=4096, rms_norm_eps=1e-5),
            "kolibri1": records.sizes(48, 4, 128, rms_norm_eps=1e-6),
        },
        # exaone4:233, exaone_moe:183
        rotary=dict.fromkeys(
            ("exaone4", "exaone_moe", "kolibri1"), Rotary(unrotated="full beside sliding")
        ),
        roles=records.pair(*QK, head_dim=EITHER, heads_axis=-3, **CAST_FIRST),
        rope=ModelRope(note="none on full attention layers beside sliding ones"),
    ),
    # afmoe:91, :335, :355; beam:47, :227, :247; flint:45, :260, :276
    Family(
        ("afmoe",),
        records.pair(*QK),
        rope=ModelRope(note="on sliding attention layers only"),
        rotary=Rotary(unrotated="full", null_is_hidden=True),  # afmoe:359
        defaults=records.sizes(16, head_dim=128, rms_norm_eps=1e-5),
    ),
    Family(
        ("beam",),
        records.pair(*QK),
        rope=ModelRope(note="none on layers without rope_parameters"),
        rotary=Rotary(table="float32", own_parameters=True),  # beam:138, :154
        defaults=records.sizes(48, 8, 128, rms_norm_eps=1e-6),
    ),
    Family(
        ("flint",),
        records.pair(*QK),
        rotary=Rotary(unrotated="full"),  # flint:281
        defaults=records.sizes(32, 4, 128, rms_norm_eps=1e-6),
    ),
    # laguna:326, :352, :373
    Family(
        ("laguna",),
        records.pair(*QK, heads="", **CAST_FIRST),
        rope=ModelRope(note="the share that rotates differs between kinds of layers"),
        rotary=Rotary(
            shares=("partial_rotary_factor",),
            shares_by_type=True,
            shares_in_parameters=True,
            own_parameters=True,
        ),
        defaults=records.sizes(head_dim=128, rms_norm_eps=1e-6),
    ),
    # inkling:215, :235; relative positions instead of an embedding
    Family(
        ("inkling_mm_model", "inkling_text"),
        records.pair(
            *QK,
            ("self_attn", "attn"),
            heads="",
            head_dim=("head_dim", "swa_head_dim"),
            **CAST_FIRST,
        ),
        rope=ModelRope("none"),
        defaults=records.sizes(head_dim=128, swa_head_dim=128, rms_norm_eps=1e-6),
    ),
    # minimax_m3_vl:140, :414, :431, :537, :549
    Family(
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        (
            *records.pair(*QK, **ONE_PLUS),
            Role(
                "index_q",
                ("self_attn.indexer.q_norm", "self_attn.index_q_norm"),
                "index_n_heads",
                head_dim=("index_head_dim",),
                projection="self_attn.indexer.q_proj",
                **ONE_PLUS,
            ),
            Role(
                "index_k",
                ("self_attn.indexer.k_norm", "self_attn.index_k_norm"),
                "",
                head_dim=("index_head_dim",),
                projection="self_attn.indexer.k_proj",
                **ONE_PLUS,
            ),
        ),
        rope=ModelRope(partial=0.5),
        # the class's rotary_dim alone is not looked at: minimax_m3_vl:309
        rotary=Rotary(5e6, shares=("partial_rotary_factor",), share=1.0),
        defaults=records.sizes(
            64, 4, 128, rms_norm_eps=1e-6, index_n_heads=4, index_head_dim=128, rotary_dim=64
        ),
    ),
    # step3p7:501, :697, :714; released configs say use_qk_norm false beside norms
    Family(
        ("step3p7", "step3p5"),
        records.pair(*QK, heads="", **ONE_PLUS),
        rope=ModelRope(note="the share that rotates differs by layer"),
        # step3p7:472, configuration_step3p7:257
        rotary=Rotary(
            shares=("partial_rotary_factor", "partial_rotary_factors"),
            shares_by_type=True,
            full_alone=True,
        ),
        defaults=records.sizes(head_dim=128, rms_norm_eps=1e-5),
        flag="use_qk_norm",
    ),
    # molmo2:266, :291; qk_norm_type is "qwen3", or "olmo": over all heads
    Family(
        ("molmo2", "molmo2_text"),
        (
            *records.pair(*QK, **CAST_FIRST),
            *records.pair(*QK, weight="full", **CAST_FIRST),
        ),
        defaults=records.sizes(32, 8, 128, rms_norm_eps=1e-6),
        aliases={"layer_norm_eps": "rms_norm_eps"},
    ),
    # mllama:417, :433; layers of cross attention only
    Family(
        ("mllama", "mllama_text_model"),
        records.pair(*QK, "cross_attn", heads_axis=-3, head_dim=("hidden",), **CAST_FIRST),
        rope=ModelRope("none"),
        defaults=records.sizes(32, 8, hidden=4096, rms_norm_eps=1e-5),
    ),
    # idefics:335, :565, :609; idefics/perceiver.py:116, :158
    Family(
        ("idefics",),
        (
            *records.pair(
                "q_layer_norm",
                "k_layer_norm",
                "cross_attn",
                heads_axis=-3,
                refused=(
                    "IdeficsRMSNorm rounds to its weight's dtype where that is float16 or "
                    "bfloat16, not to x's, and its result has that dtype"
                ),
            ),
            *records.pair(
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
        # complex numbers of float32: llama4:225
        rotary=Rotary(5e5, table="float32", unrotated="every nth"),
        defaults=records.sizes(
            40, 8, 128, rms_norm_eps=1e-5, use_qk_norm=True, no_rope_layer_interval=4
        ),
        flag="use_qk_norm",
    ),
    # nanochat:44, :203, :222
    Family(
        ("nanochat",),
        records.pair(*QK, weight="none", heads_axis=-3, head_dim=EITHER),
        rope=ModelRope("before norm", "half flipped"),
        defaults=records.sizes(6, hidden=768, rms_norm_eps=1e-6),
    ),
    # muse_spark:105, :380, :399, :426; muse_glimmer:312, :330
    Family(
        ("muse_spark", "muse_spark_text"),
        (
            *records.pair("qk_norm", "qk_norm", weight="none", heads_axis=-3),
            Role("out", ("self_attn.o_norm",), weight="none"),
        ),
        rope=ModelRope(
            note="none on some layers; q is multiplied by qk_scale_factor after its norm"
        ),
        rotary=Rotary(unrotated="without theta"),  # muse_spark:663
        defaults=records.sizes(128, 16, 64, rms_norm_eps=1e-5),
    ),
    Family(
        ("muse_glimmer", "muse_glimmer_text"),
        records.pair("qk_norm", "qk_norm", weight="none", heads_axis=-3),
        rope=ModelRope(
            note="none on some layers; q is multiplied by qk_scale_factor after its norm"
        ),
        rotary=Rotary(unrotated="without theta"),  # muse_glimmer:512
        defaults=records.sizes(32, 2, 128, rms_norm_eps=1e-5),
    ),
    # neomme:42, :315, :335
    Family(
        ("neomme",),
        records.pair(*QK, weight="none", eps="norm_eps", heads_axis=-3),
        rope=ModelRope(note="the share that rotates differs between kinds of layers"),
        # neomme:167, configuration_neomme:74
        rotary=Rotary(
            shares=("partial_rotary_factor",),
            shares_by_type=True,
            shares_in_parameters=True,
            share={"full_attention": 0.25},
            alternating=True,
        ),
        defaults=records.sizes(16, 4, 64, norm_eps=1e-6),
    ),
    # timesfm2_5:282, :301
    Family(
        ("timesfm2_5",),
        records.pair(*QK, heads_axis=-3, **CAST_FIRST),
        rope=ModelRope("before norm", note="q is scaled by softplus(scaling) after its norm"),
        defaults=records.sizes(16, 16, 80, rms_norm_eps=1e-6),
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
            Role("q_lora", ("self_attn.q_a_norm", "attn.q_norm"), refused=RANK),
        ),
        rope=ModelRope(
            style="interleaved", partial=0.125, note="the last dims rotate, not the first"
        ),
        rotary=Rotary(refused="the last dims rotate"),
        defaults=records.sizes(64, 1, 512, rms_norm_eps=1e-6, index_head_dim=128),
    ),
)
