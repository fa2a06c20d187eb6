"""
A tiny model of each family that normalizes its heads: the real class, saved as the real one is.

A row says which class and which sizes. Where the heads lie in a module's input, and how many there
are, is seen in a forward pass of the model itself; nothing is asked of our own registry.
"""

import copy
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

BATCH, TOKENS = 2, 11
MOST_HEADS = 4  # fewer than tokens: an input's axes tell themselves
SIZES = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": MOST_HEADS, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 64, "sliding_window": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_dense_layers": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "index_head_dim": 128,
    "index_n_heads": 4, "index_topk": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "hc_lowrank": 8, "hc_mult": 2,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
    "rms_norm_eps": 3e-5, "layer_norm_eps": 3e-5, "norm_eps": 3e-5,
}  # fmt: skip
"""Given to a config class as far as it has the fields; no module's own constant is such an eps."""


WORDS = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) + 3


def read(model, **beside):
    model(input_ids=WORDS, **beside)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def look(model, patches=4):
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    patch = tower.config.temporal_patch_size * 3 * tower.config.patch_size**2
    tower(normal(patches**2, patch), grid_thw=torch.tensor([[1, patches, patches]]))


class Row(NamedTuple):
    model: str
    """Class of ``transformers.models.<package>.modeling_<package>``."""
    config: dict[str, Any] = {}
    """
    Beside SIZES; a dict within it is given SIZES too. A model_type is of a type that has a config
    class of its own and the model of another.
    """
    roles: dict[str, str] = {"q": "layers.*.self_attn.q_norm", "k": "layers.*.self_attn.k_norm"}
    """Role: how the module's name ends, with a star for the layer."""
    package: str = ""
    """The row's own name, where it is left empty."""
    run: Callable[[torch.nn.Module], Any] = read
    """Runs the model, or as much of it as has the norms."""
    since: str = ""
    """Release known to round as we do, where an older one was seen to round otherwise."""


def pair(q, k, within="layers.*.self_attn."):
    return {"q": within + q, "k": within + k}


V = {**pair("q_norm", "k_norm"), "v": "layers.*.self_attn.v_norm"}
LAYERNORM = pair("q_layernorm", "k_layernorm")
QUERY_LAYERNORM = pair("query_layernorm", "key_layernorm")
ONE_MODULE = pair("qk_norm", "qk_norm")
INDEX_K = {"index_k": "layers.*.self_attn.indexer.k_norm"}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONV = {"layer_types": ["conv", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
MLA = {"num_key_value_heads": MOST_HEADS}
VISION = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_heads": 2, "num_key_value_heads": 2, "depth": 1, "image_size": 32, "patch_size": 16,
    "out_hidden_size": 256, "rms_norm_eps": 3e-5, "norm_eps": 3e-5, "deepstack_visual_indexes": [0],
}  # fmt: skip


def seeing(**text_config):
    return {"text_config": text_config, "vision_config": VISION}


FAMILIES = {
    # LayerNorm
    "cohere": Row("CohereForCausalLM", {"use_qk_norm": True}),
    "stablelm": Row("StableLmForCausalLM", {"qk_layernorm": True}, LAYERNORM),
    "persimmon": Row("PersimmonForCausalLM", {}, LAYERNORM),
    "fuyu": Row(
        "FuyuForCausalLM", {"text_config": {"model_type": "persimmon", "head_dim": 64}}, LAYERNORM
    ),
    "phi": Row("PhiForCausalLM", {"qk_layernorm": True}, LAYERNORM),
    "chameleon": Row(
        "ChameleonForConditionalGeneration",
        {
            "vocabulary_map": {"<image>": 100},
            "vq_config": {
                "embed_dim": 8, "num_embeddings": 4, "latent_channels": 8, "resolution": 8,
                "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
            },
        },
    ),
    "deepseek_v32": Row("DeepseekV32ForCausalLM", MLA, INDEX_K),
    "glm_moe_dsa": Row("GlmMoeDsaForCausalLM", MLA, INDEX_K),
    "axk2": Row("AXK2ForCausalLM", MLA, INDEX_K),
    "hy_v4": Row("HYV4ForCausalLM", MLA, INDEX_K),
    "hy_v4_vl": Row(
        "HYV4VLForConditionalGeneration",
        seeing(**MLA, rope_parameters={"rope_type": "default", "mrope_section": [8, 4, 4]}),
        INDEX_K,
    ),
    "glm5_next": Row(
        "Glm5NextTextModel",
        {
            **MLA, "linear_num_heads": 2, "linear_head_dim": 32, "index_kpool": 4,
            "qk_rope_head_dim": 0, "head_dim": 0,
            **LINEAR,
        },
        INDEX_K,
    ),
    "mistral_large4": Row(
        "MistralLarge4ForConditionalGeneration",
        {"text_config": MLA, "vision_config": {**VISION, "model_type": "pixtral"}}, INDEX_K,
    ),
    # weight * cast(n)
    "qwen3": Row("Qwen3ForCausalLM"),
    "qwen3_moe": Row("Qwen3MoeForCausalLM", {"head_dim": 128}),
    "qwen3_vl": Row("Qwen3VLForConditionalGeneration", seeing()),
    "qwen3_vl_moe": Row("Qwen3VLMoeForConditionalGeneration", seeing()),
    "qwen3_omni_moe": Row(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            **seeing(head_dim=128),
            "audio_config": {
                "encoder_layers": 1, "d_model": 64, "encoder_ffn_dim": 32,
                "encoder_attention_heads": 2, "output_dim": 256, "downsample_hidden_size": 8,
            },
        },
    ),
    "glm4_moe": Row("Glm4MoeForCausalLM", {"use_qk_norm": True, "head_dim": 128}),
    "sarvam_moe": Row("Glm4MoeForCausalLM", {"model_type": "sarvam_moe"}, package="glm4_moe"),
    "hunyuan_v1_dense": Row("HunYuanDenseV1ForCausalLM", {}, QUERY_LAYERNORM),
    "hunyuan_v1_moe": Row("HunYuanMoEV1ForCausalLM", {}, QUERY_LAYERNORM),
    "hunyuan_vl": Row(
        "HunYuanVLForConditionalGeneration",
        seeing(
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 16, 16, 16],
            }
        ),
        QUERY_LAYERNORM,
    ),
    "hy_v3": Row("HYV3ForCausalLM"),
    "lfm2": Row("Lfm2ForCausalLM", CONV, LAYERNORM),
    "lfm2_moe": Row("Lfm2MoeForCausalLM", CONV, LAYERNORM),
    "lfm3": Row("Lfm3ForCausalLM", CONV),
    "dots1": Row("Dots1ForCausalLM"),
    "exaone4": Row("Exaone4ForCausalLM", SLIDING),
    "exaone4_5": Row("Exaone4_5_ForConditionalGeneration", seeing(model_type="exaone4")),
    "exaone_moe": Row("ExaoneMoeForCausalLM"),
    "kolibri1": Row("Kolibri1ForCausalLM"),
    "apertus": Row("ApertusForCausalLM"),
    "apertus1p5": Row(
        "Apertus1p5ForConditionalGeneration",
        {
            "text_config": {},
            "vision_config": {
                "codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32,
                "channel_multiplier": [1], "num_res_blocks": 1,
            },
            "audio_config": {
                "model_type": "wavtokenizer_encoder", "codebook_size": 16, "codebook_dim": 8,
                "hidden_size": 8, "num_filters": 4, "upsampling_ratios": [2],
            },
            "image_token_offset": 40, "audio_token_offset": 56,
        },
    ),
    "doge": Row("DogeForCausalLM"),
    "mellum": Row("MellumForCausalLM"),
    "laguna": Row("LagunaForCausalLM"),
    "inkling": Row(
        "InklingForConditionalGeneration",
        {
            **seeing(
                swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=64,
                layer_types=["hybrid_sliding", "hybrid"],
            ),
            "audio_config": {"text_hidden_size": 256},
        },
    ),
    "molmo2": Row(
        "Molmo2ForConditionalGeneration",
        {
            "text_config": {},
            "vision_config": {**VISION, "image_size": [32, 32], "num_position_embeddings": 4},
            "adapter_config": {
                "vision_feature_layer": [-1], "hidden_size": 64, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 32,
                "text_hidden_size": 256,
            },
        },
    ),
    "mllama": Row(
        "MllamaForCausalLM", {"cross_attention_layers": [1]},
        pair("q_norm", "k_norm", "layers.*.cross_attn."),
        run=lambda model: read(model, cross_attention_states=normal(BATCH, TOKENS, 256)),
    ),
    "muse_glimmer_assistant": Row(
        "MuseGlimmerAssistantModel", {"target_layer_ids": [0]},
        run=lambda model: model(normal(BATCH, TOKENS, 256), normal(BATCH, TOKENS, 256)),
    ),
    "timesfm2_5": Row("TimesFm2_5Model", run=lambda model: model(normal(BATCH, 32 * TOKENS))),
    "sapiens2": Row(
        "Sapiens2Model", {"image_size": 32}, pair("q_norm", "k_norm", "layer.*.attention."),
        run=lambda model: model(normal(BATCH, 3, 32, 32)),
    ),
    "glm_ocr": Row(
        "GlmOcrForConditionalGeneration", seeing(),
        pair("q_norm", "k_norm", "visual.blocks.*.attn."), run=look,
    ),
    "lfm3_vl": Row(
        "Lfm3VlForConditionalGeneration",
        {
            **seeing(model_type="lfm3", **CONV), "projector_hidden_size": 64,
            "vision_config": {**VISION, "layer_types": ["full_attention"]},
        },
        {
            **pair("q_norm", "k_norm", "language_model.layers.*.self_attn."),
            "vision_q": "vision_tower.layers.*.self_attn.q_norm",
            "vision_k": "vision_tower.layers.*.self_attn.k_norm",
        },
        run=lambda model: (read(model), look(model)),
    ),
    "xlstm": Row(
        "xLSTMForCausalLM", {"num_heads": 2, "use_bias": True},
        {"out": "blocks.*.mlstm_layer.multihead_norm"},
    ),
    # cast(weight * n)
    "afmoe": Row("AfmoeForCausalLM", {"global_attn_every_n_layers": 2}),
    "beam": Row("BeamForCausalLM"),
    "flint": Row("FlintForCausalLM"),
    "lara_mini": Row(
        "LaraMiniForCausalLM",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "linear_attention"],
        },
    ),
    "gemma3n": Row("Gemma3nForCausalLM", {"num_kv_shared_layers": 0}, V),
    "gemma4": Row("Gemma4ForCausalLM", SLIDING, V),
    "gemma4 seeing": Row(
        "Gemma4ForConditionalGeneration",
        {"text_config": SLIDING, "vision_config": {**VISION, "head_dim": 64}},
        {
            **pair("q_norm", "k_norm", "language_model.layers.*.self_attn."),
            "v": "language_model.layers.*.self_attn.v_norm",
            **{
                f"vision_{role}": f"vision_tower.encoder.layers.*.self_attn.{role}_norm"
                for role in ("q", "k", "v")
            },
        },
        "gemma4",
        lambda model: (
            read(model),
            model.model.vision_tower(
                normal(BATCH, 9, 3 * 16 * 16),
                torch.cartesian_prod(torch.arange(3), torch.arange(3)).repeat(BATCH, 1, 1),
            ),
        ),
    ),
    "gemma4_unified": Row("Gemma4UnifiedForCausalLM", SLIDING, V),
    "diffusion_gemma": Row(
        "DiffusionGemmaEncoderTextModel", {**SLIDING, "top_k_experts": 2}, V
    ),
    "embedding_gemma2": Row("EmbeddingGemma2TextModel", SLIDING, V),
    "deepseek_v4": Row(
        "DeepseekV4ForCausalLM",
        {
            "o_lora_rank": 32, "o_groups": 2, "index_head_dim": 64,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {
                "heavily_compressed_attention": 2, "compressed_sparse_attention": 2,
            },
        },
        {
            "q": "layers.*.self_attn.q_b_norm", "kv": "layers.*.self_attn.kv_norm",
            "compressed_kv": "layers.*.self_attn.compressor.kv_norm",
            "index_kv": "layers.*.self_attn.compressor.indexer.kv_norm",
        },
        since="5.23",
    ),
    # cast((1 + weight) * n)
    "gemma3": Row("Gemma3ForCausalLM", SLIDING),
    "gemma3 seeing": Row("Gemma3ForConditionalGeneration", seeing(), package="gemma3"),
    "t5gemma2": Row(
        "T5Gemma2ForConditionalGeneration",
        {"encoder": {"text_config": SIZES, "vision_config": VISION}, "decoder": SIZES},
        {
            f"{stack}_{role}": f"{stack}.{within}layers.*.self_attn.{role}_norm"
            for stack, within in (("encoder", "text_model."), ("decoder", ""))
            for role in ("q", "k")
        },
        run=lambda model: read(model, decoder_input_ids=WORDS),
    ),
    "qwen3_next": Row("Qwen3NextForCausalLM", LINEAR),
    "qwen3_5": Row("Qwen3_5ForConditionalGeneration", seeing(**LINEAR)),
    "qwen3_5_moe": Row("Qwen3_5MoeForCausalLM", LINEAR),
    "qwen4_exp": Row(
        "Qwen4ExpForCausalLM",
        {
            **LINEAR, "indexer_n_heads": 4,
            "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 4,
            "indexer_compress_ratio": 2, "hc_count": 2,
        },
        {
            **pair("q_norm", "k_norm"),
            "index_q": "layers.*.self_attn.indexer.q_layernorm",
            "index_k": "layers.*.self_attn.indexer.k_layernorm",
        },
    ),
    "minimax_m3_vl": Row(
        "MiniMaxM3SparseForConditionalGeneration",
        {
            **seeing(
                dense_intermediate_size=64, shared_intermediate_size=64, index_head_dim=64,
                rotary_dim=64, layer_types=["full_attention", "minimax_m3_sparse"],
            ),
            "projector_hidden_size": 64,
        },
        {
            **pair("q_norm", "k_norm"),
            "index_q": "layers.*.self_attn.indexer.q_norm",
            "index_k": "layers.*.self_attn.indexer.k_norm",
        },
    ),
    "step3p7": Row("Step3p7ForConditionalGeneration", seeing()),
    # no weight
    "llama4": Row("Llama4ForCausalLM", {"no_rope_layers": [1, 0]}, ONE_MODULE),
    "nanochat": Row("NanoChatForCausalLM"),
    "muse_spark": Row(
        "MuseSparkTextModel", {"moe_hidden_size": 64},
        {**ONE_MODULE, "out": "layers.*.self_attn.o_norm"},
    ),
    "muse_glimmer": Row("MuseGlimmerTextModel", {}, ONE_MODULE),
    "neomme": Row("NeoMMEModel"),
}  # fmt: skip
REFUSED = {
    # over all heads
    "olmo2": Row("Olmo2ForCausalLM"),
    "olmo3": Row("Olmo3ForCausalLM"),
    "olmoe": Row("OlmoeForCausalLM"),
    "flex_olmo": Row("FlexOlmoForCausalLM"),
    "minimax_m2": Row("MiniMaxM2ForCausalLM"),
    # over two heads
    "diffllama": Row("DiffLlamaForCausalLM", {}, {"out": "layers.*.self_attn.groupnorm"}),
    # arithmetic of their own
    "dory": Row("DoryForCausalLM", {"n_input_layers": 1, "n_output_layers": 1}),
    "zaya": Row("ZayaForCausalLM", {"num_experts_per_tok": 1}, run=lambda model: None),
    "idefics": Row(
        "IdeficsForVisionText2Text",
        {
            "qk_layer_norms": True, "use_resampler": False,
            "vision_config": {
                "embed_dim": 64, "image_size": 32, "patch_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "intermediate_size": 32,
            },
        },
        run=lambda model: None,
    ),
}  # fmt: skip
"""Families with norms that are not ours to serve."""
ROWS = FAMILIES | REFUSED


class Real(NamedTuple):
    """A model's own norm of one role, and where its forward pass has the heads."""

    name: str
    module: torch.nn.Module
    heads: int | None
    """None where the input has no axis of heads: one head."""
    heads_axis: int
    head_dim: int

    def __call__(self, x):
        """Run the model's module, on the device of x; the model itself stays where it is."""
        with torch.no_grad():
            # Some flatten the heads they have normalized.
            return copy.deepcopy(self.module).to(x.device)(x).reshape(x.shape)

    def input(self, count, dtype, device="cpu", seed=0):
        """
        Return at least `count` seeded values, laid out as the model lays its own.

        Every fourth token is so quiet that eps decides its result.
        """
        heads = self.heads or 1
        tokens = -(-count // (heads * self.head_dim))
        generator = torch.Generator().manual_seed(seed)
        x = 2 * torch.randn(1, tokens, heads, self.head_dim, generator=generator)
        x[:, 3::4] *= 2**-9
        x = x.to(dtype).to(device)
        if self.heads is None:
            return x[:, :, 0]
        return x.transpose(1, 2) if self.heads_axis == -3 else x


class Tiny(NamedTuple):
    """A tiny model, its checkpoint, and its norms by layer and role."""

    model: torch.nn.Module
    folder: Path
    norms: dict[tuple[int, str], Real]


def model_class(name):
    """Return the real class, or the reason why it is not here."""
    row = ROWS[name]
    package = row.package or name
    here, since = (
        tuple(map(int, version.split(".")[:2]))
        for version in (transformers.__version__, row.since or "0.0")
    )
    if here < since:
        return f"transformers {transformers.__version__} rounds otherwise than {row.since}"
    kind = row.config.get("model_type")
    if kind and kind not in transformers.CONFIG_MAPPING:
        return f"transformers {transformers.__version__} has no {kind}"
    try:
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        return getattr(module, row.model)
    except (ImportError, AttributeError):
        return f"transformers {transformers.__version__} has no {row.model}"


def tiny(name, dtype, folder):
    """Save the family's model in `dtype` below `folder`."""
    base, seen = _base(name)
    model = copy.deepcopy(base).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    folder = Path(folder) / name.replace(" ", "-") / dtype
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    norms = {
        key: Real(name, model.get_submodule(name), *layout) for key, (name, layout) in seen.items()
    }
    return Tiny(model, folder, norms)


@functools.cache
def _base(name):
    """Build the model, and see its norms at work: {(layer, role): (module's name, layout)}."""
    row = ROWS[name]
    torch.manual_seed(0)
    made = model_class(name)
    given = dict(row.config)
    kind = given.pop("model_type", None)
    config = _config(transformers.CONFIG_MAPPING[kind] if kind else made.config_class, given)
    config._attn_implementation = "eager"
    model = made(config).eval()
    patterns = {
        role: re.compile(r"(?:.*\.)?" + re.escape(end).replace(r"\*", r"(\d+)"))
        for role, end in row.roles.items()
    }
    found, calls = {}, {}
    for path, module in model.named_modules():
        roles = {role: match for role, p in patterns.items() if (match := p.fullmatch(path))}
        for role, match in roles.items():
            found[int(match[1]), role] = path
        if not roles:
            continue
        module.register_forward_pre_hook(
            lambda _, given, path=path: calls.setdefault(path, []).append(tuple(given[0].shape))
        )
        with torch.no_grad():  # weights start at one, or at zero where one is added; biases at zero
            for parameter in module.parameters():
                parameter += 0.5 * torch.randn(parameter.shape)
    with torch.no_grad():
        row.run(model)
    for path in found.values():
        model.get_submodule(path)._forward_pre_hooks.clear()
    seen = {}
    for (layer, role), path in sorted(found.items()):
        # One module for queries and keys is called for them in turn.
        same = [r for r in row.roles if found.get((layer, r)) == path]
        if path in calls:
            seen[layer, role] = path, _layout(calls[path][same.index(role)])
    assert name in REFUSED or {role for _, role in seen} == set(row.roles), (name, seen.keys())
    return model, seen


def _layout(shape):
    """Return number of heads, their axis and head_dim of an input."""
    axes = [axis for axis in (-3, -2) if len(shape) >= -axis + 1 and shape[axis] <= MOST_HEADS]
    assert len(axes) < 2, shape
    return (shape[axes[0]] if axes else None), (axes[0] if axes else -2), shape[-1]


def _config(config_class, given):
    values = {name: size for name, size in SIZES.items() if name in _fields(config_class)} | given
    if "text_config" in given:
        part = config_class.sub_configs["text_config"]
        if kind := given["text_config"].get("model_type"):
            part = transformers.CONFIG_MAPPING[kind]
        any_config = part is transformers.AutoConfig  # takes what it is given
        sizes = {n: size for n, size in SIZES.items() if any_config or n in _fields(part)}
        values["text_config"] = sizes | given["text_config"]
    return config_class(**values)


def _fields(config_class):
    named = {name for c in config_class.__mro__ for name in getattr(c, "__annotations__", {})}
    return named | set(inspect.signature(config_class.__init__).parameters)
