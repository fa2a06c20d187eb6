"""Model types of vision and audio towers."""

from __future__ import annotations

from cupy_headnorm.models import records
from cupy_headnorm.models.records import CAST_FIRST, QK, V_OF_K, Family, ModelRope

# Towers beside a text model, and encoders of video and audio.
VISION_AND_AUDIO = (
    # sapiens2:331, :461, :478; keys' heads differ by layer
    Family(
        ("sapiens2",),
        records.pair(
            *QK,
            ("attention", "attn"),
            heads="",
            heads_axis=-3,
            head_dim=("hidden",),
            **CAST_FIRST,
        ),
        rope=ModelRope(note="on patches only"),
        defaults=records.sizes(16, hidden=1024, rms_norm_eps=1e-6, use_qk_norm=True),
        flag="use_qk_norm",
        tower="vision",
    ),
    # gemma4:204, :920, :938
    Family(
        ("gemma4_vision",),
        (*records.pair(*QK, projected=False), V_OF_K),
        rope=ModelRope(note="each half of the dims rotates by a coordinate of its own"),
        defaults=records.sizes(12, 12, 64, rms_norm_eps=1e-6),
        tower="vision",
    ),
    # glm_ocr:354, :370; glm5_next:1621
    Family(
        ("glm_ocr_vision", "glm5_next_vision"),
        records.pair(*QK, "attn", heads="num_heads", head_dim=(), projected=False, **CAST_FIRST),
        rope=ModelRope(note="in float32, by two coordinates"),
        defaults={"num_heads": 16, "rms_norm_eps": 1e-5},
        tower="vision",
    ),
    # dots3_note:1358
    Family(
        ("dots3_note_vision_encoder",),
        records.pair(
            *QK,
            "attn",
            heads="num_attention_heads",
            head_dim=("hidden",),
            projected=False,
            **CAST_FIRST,
        ),
        rope=ModelRope(note="in float32, by two coordinates"),
        defaults=records.sizes(24, hidden=1536, rms_norm_eps=1e-5),
        tower="vision",
    ),
    # lfm3_vl:212, :227
    Family(
        ("lfm3_vl_vision",),
        records.pair(
            ("q_norm", "q_layernorm"),
            ("k_norm", "k_layernorm"),
            eps="norm_eps",
            head_dim=("hidden",),
            **CAST_FIRST,
        ),
        rope=ModelRope(note="in float32, by two coordinates"),
        defaults=records.sizes(16, 8, hidden=1024, norm_eps=1e-5),
        tower="vision",
    ),
    # pe_audio:389, :406; pe_video:313; pe_audio_video:326
    *(
        Family(
            names,
            records.pair(*QK, **CAST_FIRST),
            rope=ModelRope(style="interleaved"),
            defaults=records.sizes(14, head_dim=128, rms_norm_eps=1e-5),
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
        records.pair(
            *QK, ("self_attn", "attn"), kind="layer", bias=True, eps=1e-5, heads="", head_dim=()
        ),
        rope=ModelRope(partial=0.5),
        tower="audio",
    ),
)
