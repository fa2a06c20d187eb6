"""Model types of diffusion models."""

from __future__ import annotations

from typing import Any

from cupy_headnorm.models import records
from cupy_headnorm.models.records import ONE_PLUS, Family, ModelRope, Role


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
    return (*_joint("attn1", **shared), *records.named("cross", _joint("attn2", **shared)))


_DIFFUSERS: dict[str, Any] = {"rounding": "before_weight", "result": "weight"}
"""diffusers.models.normalization.RMSNorm rounds to its weight's dtype, and multiplies in it."""
_TORCH: dict[str, Any] = {"rounding": "once"}
"""torch.nn.RMSNorm, of torch 2.8 and later; earlier ones rounded before the weight."""

# Diffusion transformers, named by their classes in diffusers.
DIFFUSION = (
    # attention_processor.py, JointAttnProcessor2_0
    Family(
        ("SD3Transformer2DModel",),
        (
            *_joint(added=("q", "k"), heads_axis=-3, **_DIFFUSERS),
            *records.named("second", _joint("attn2", heads_axis=-3, **_DIFFUSERS)),
        ),
        rope=ModelRope("none"),
        defaults=records.sizes(18, attention_head_dim=64) | {"qk_norm": None},
        flag="qk_norm",
        tower="transformer",
    ),
    # transformer_flux.py:98 and its like
    *records.alike(
        {
            (
                "FluxTransformer2DModel",
                "ChromaTransformer2DModel",
                "BriaTransformer2DModel",
                "LongCatImageTransformer2DModel",
                "OvisImageTransformer2DModel",
            ): records.sizes(24, attention_head_dim=128),
            "Flux2Transformer2DModel": records.sizes(48, attention_head_dim=128),
        },
        roles=_joint(added=("q", "k"), **_TORCH),
        rope=ModelRope(style="interleaved"),
        tower="transformer",
    ),
    # transformer_hunyuan_video.py:71
    *records.alike(
        {
            (
                "HunyuanVideoTransformer3DModel",
                "HunyuanVideoFramepackTransformer3DModel",
            ): records.sizes(24, attention_head_dim=128, qk_norm="rms_norm"),
            "HunyuanImageTransformer2DModel": records.sizes(
                28, attention_head_dim=128, qk_norm="rms_norm"
            ),
            "HunyuanVideo15Transformer3DModel": records.sizes(
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
        defaults=records.sizes(24, attention_head_dim=128),
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
        defaults=records.sizes(32, attention_head_dim=128),
        tower="transformer",
    ),
    # transformer_mochi.py, normalization.py:573
    Family(
        ("MochiTransformer3DModel",),
        _joint("attn1", added=("q", "k"), eps=1e-5),
        rope=ModelRope(style="interleaved", note="on the video only"),
        defaults=records.sizes(24, attention_head_dim=128, qk_norm="rms_norm"),
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
        _joint(heads="", eps=1e-5, **ONE_PLUS),
        rope=ModelRope(style="interleaved"),
        defaults={"attention_head_dim": 128},
        tower="transformer",
    ),
    # attention_processor.py, CogVideoXAttnProcessor2_0
    Family(
        ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        _joint("attn1", kind="layer", bias=True, heads_axis=-3),
        rope=ModelRope(style="interleaved", note="on the video only"),
        defaults=records.sizes(30, attention_head_dim=64),
        tower="transformer",
    ),
    # transformer_cogview4.py:146; transformer_glm_image.py; transformer_cogview3plus.py
    Family(
        ("CogView4Transformer2DModel", "GlmImageTransformer2DModel"),
        _joint("attn1", kind="layer", weight="none", eps=1e-5, heads_axis=-3),
        rope=ModelRope(note="on the image only"),
        defaults=records.sizes(64, attention_head_dim=40),
        tower="transformer",
    ),
    Family(
        ("CogView3PlusTransformer2DModel",),
        _joint("attn1", kind="layer", weight="none", heads_axis=-3),
        rope=ModelRope("none"),
        defaults=records.sizes(64, attention_head_dim=40),
        tower="transformer",
    ),
    # attention_processor.py, AuraFlowAttnProcessor2_0; normalization.py:84; the same norm is on the
    # text that joint blocks add
    Family(
        ("AuraFlowTransformer2DModel",),
        _joint(kind="layer", weight="none", eps=1e-5),
        rope=ModelRope("none"),
        defaults=records.sizes(12, attention_head_dim=256),
        tower="transformer",
    ),
    # transformer_wan.py and its like
    *records.alike(
        {
            (
                "WanTransformer3DModel",
                "WanVACETransformer3DModel",
                "WanAnimateTransformer3DModel",
                "ChronoEditTransformer3DModel",
                "HeliosTransformer3DModel",
            ): records.sizes(40, attention_head_dim=128, eps=1e-6),
            "SkyReelsV2Transformer3DModel": records.sizes(16, attention_head_dim=128, eps=1e-6),
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
        defaults=records.sizes(32, attention_head_dim=64),
        tower="transformer",
    ),
)
