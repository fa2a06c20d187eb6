"""Transformers' rotary embeddings and attention, and configs that give each kind of them."""

import importlib
import importlib.util
import inspect
import json
import re
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
from transformers import MODEL_MAPPING, AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {"hidden_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 40960}
BASE = {**SIZES, "head_dim": 128, "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
OLMO3 = {
    "model_type": "olmo3", **SIZES, "rope_theta": 5e5, "num_hidden_layers": 4,
    "rope_scaling": {**YARN, "attention_factor": 1.2},
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}  # fmt: skip
GEMMA3 = {"model_type": "gemma3", "text_config": {
    "model_type": "gemma3_text", "hidden_size": 2560, "max_position_embeddings": 40960,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}}  # fmt: skip
GEMMA4 = {
    "model_type": "gemma4_text", **SIZES, "head_dim": 256, "global_head_dim": 512,
    "num_hidden_layers": 12, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"
        },
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip
QWEN3_VL = {"model_type": "qwen3_vl_text", **BASE, "rope_scaling": {
    "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"
}}  # fmt: skip


def qwen3(**scaling):
    return {"model_type": "qwen3", **BASE, "rope_scaling": scaling or None}, 0


# name: (config.json in the form that models were released with, layer)
CASES = {
    "qwen3": qwen3(),
    "yarn": qwen3(**YARN),
    "yarn mscale": qwen3(**YARN, truncate=False, mscale=1.0, mscale_all_dim=0.8),
    # The blend would begin before the first dim, and end behind the last.
    "yarn from the first dim": qwen3(**YARN | {"original_max_position_embeddings": 128}),
    "yarn to the last dim": (
        qwen3(**YARN | {"original_max_position_embeddings": 1000})[0] | {"rope_theta": 8.7}, 0,
    ),
    "linear": qwen3(type="linear", factor=3.0),
    "gemma3 sliding": (GEMMA3, 0),
    "gemma3 full": (GEMMA3, 5),
    "gemma4 sliding": (GEMMA4, 6),
    "gemma4 full": (GEMMA4, 5),
    "olmo3 sliding": (OLMO3, 0),
    "olmo3 full": (OLMO3, 3),
    "glm4_moe": ({"model_type": "glm4_moe", **BASE, "partial_rotary_factor": 0.5}, 0),
    "stablelm": ({"model_type": "stablelm", **SIZES, "rope_theta": 1e4}, 0),
    "minimax_m2": ({"model_type": "minimax_m2", **BASE, "rotary_dim": 64}, 0),
    "cohere": ({"model_type": "cohere", **SIZES, "rope_theta": 75e6}, 0),
    "llama4": ({"model_type": "llama4_text", **BASE, "rope_scaling": LLAMA3}, 0),
    "apertus": ({"model_type": "apertus", **SIZES, "rope_theta": 12e6, "rope_scaling": LLAMA3}, 0),
    "hunyuan": (
        {"model_type": "hunyuan_v1_dense", **BASE, "rope_theta": 1e4,
         "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}}, 0,
    ),
    "nanochat": ({"model_type": "nanochat", **SIZES, "rope_theta": 1e4}, 0),
}  # fmt: skip


class Theirs:
    """Transformers' config, module and rotary embedding of one layer."""

    def __init__(self, raw, layer):
        fields = json.loads(json.dumps({k: v for k, v in raw.items() if k != "model_type"}))
        self.whole = CONFIG_MAPPING[raw["model_type"]](**fields)
        config = self.whole.get_text_config()
        self.text = config
        package = type(config).__module__.split(".")[2]  # Fuyu's is Persimmon's
        name = f"transformers.models.{package}.modeling_{package}"
        if importlib.util.find_spec(name) is None:  # Sarvam's models are GLM-4's and DeepSeek-V3's
            name = MODEL_MAPPING[type(config)].__module__
        self.module = importlib.import_module(name)
        self.rotary = next(
            value
            for name, value in vars(self.module).items()
            if name.endswith("RotaryEmbedding") and "Vision" not in name
            if inspect.signature(value).parameters.get("config")
        )(config)
        kind = (getattr(config, "layer_types", None) or [None] * (layer + 1))[layer]
        prefix, self.kind = "", ()
        if hasattr(self.rotary, f"{kind}_inv_freq"):
            prefix, self.kind = f"{kind}_", (kind,)
        self.frequencies = numpy_of(getattr(self.rotary, f"{prefix}inv_freq"))
        self.scaling = getattr(self.rotary, f"{prefix}attention_scaling")

    def cos_sin(self, dtype, positions):
        out = self.rotary(torch.empty(0, dtype=dtype), positions, *self.kind)
        return (out.real, out.imag) if torch.is_tensor(out) else out

    def apply(self, q, cos, sin):
        if hasattr(self.module, "apply_rotary_emb"):  # Llama 4, tokens before heads
            turns = torch.complex(cos, sin)
            q = q.transpose(1, 2)
            return self.module.apply_rotary_emb(q, q, turns)[0].transpose(1, 2)
        function = self.module.apply_rotary_pos_emb
        if "k" not in inspect.signature(function).parameters:  # Gemma 4
            return function(q, cos, sin)
        turned = q[..., : cos.shape[-1]]  # StableLM's function is given no more
        return torch.cat((function(turned, turned, cos, sin)[0], q[..., cos.shape[-1] :]), -1)

    def rotate(self, q, cos, sin):
        """
        Rotate whole heads, ``(1, heads, tokens, head_dim)``, as the attention does.

        RuntimeError where the model's own function cannot. MLA's leaves neighbours in halves.
        """
        if "rotary_ndims" in inspect.getsource(
            self.module
        ):  # the attention cuts them: stablelm:281
            rotated = self.apply(q[..., : cos.shape[-1]], cos, sin)
            return torch.cat((rotated, q[..., cos.shape[-1] :]), -1)
        if hasattr(self.module, "apply_rotary_emb"):
            tokens_first = not hasattr(self.text, "qk_rope_head_dim")  # Llama 4, not DeepSeek V2
            q = q.transpose(1, 2) if tokens_first else q
            out = self.module.apply_rotary_emb(q, q, torch.complex(cos, sin))[0]
            return out.transpose(1, 2) if tokens_first else out
        if self.leaves_halves:
            return self.module.apply_rotary_pos_emb_interleave(q, q, cos, sin)[0]
        function = self.module.apply_rotary_pos_emb
        if "k" not in inspect.signature(function).parameters:  # Gemma 4
            return function(q, cos, sin)
        return function(q, q, cos, sin)[0]

    @property
    def leaves_halves(self):
        """Whether dims 2 i and 2 i + 1 are a pair that goes to i and i + rotary_dim / 2."""
        interleave = hasattr(self.module, "apply_rotary_pos_emb_interleave")
        return interleave and getattr(self.text, "rope_interleave", True)


def numpy_of(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def halved(cos):
    """Return one value a frequency, of a model's own form: pairs side by side, or halves."""
    pairs, halves = (cos[..., 0::2], cos[..., 1::2]), np.split(cos, 2, -1)
    for first, second in (pairs, halves):
        if np.array_equal(first, second):
            return np.ascontiguousarray(first)
    return cos


def saved(config):
    return json.loads(config.to_json_string(use_diff=False))


class Attention(NamedTuple):
    """What one layer of a model was given, and what it gave its attention function."""

    parts: dict[str, torch.Tensor]
    """By role, ``(1, tokens, heads, head_dim)``: the projections' results."""
    results: dict[str, torch.Tensor]
    """The same, normalized and turned."""
    positions: torch.Tensor
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None
    """As the model handed them to the layer; None where it turns nothing."""


class _Seen(Exception):
    """Ends a forward pass at the layer that was asked for."""


def _attend(module, query, key, value, *_, **__):
    """Stand for the attention function: what is asked for has happened before it."""
    if hasattr(module, "seen"):
        module.seen.update(q=query, k=key, v=value)
        raise _Seen
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register("parity", _attend)


def attention(tiny, layer, count, *, rows=0, most=4096, device="cpu", seed=0):
    """
    Run a tiny model's own forward pass as far as a layer's attention function.

    The layer's projections are made to give random values, at least `count` of q and k together,
    at random positions below `most`, in `rows` rows if the model's have rows. Every fourth token is
    so quiet that eps decides its result.
    """
    stack, index = re.fullmatch(r"(.*?)\.?layers\.(\d+)\..*", tiny.norms[layer, "q"].name).groups()
    # Read as a user does: a model that is cast has its frequencies in bfloat16, a read one has not.
    whole = type(tiny.model).from_pretrained(tiny.folder, dtype=tiny.model.dtype).eval()
    model = whole.get_submodule(stack).to(device)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "parity"
    attention = model.layers[int(index)].self_attn
    attention.seen = {}
    q, k = tiny.norms[layer, "q"], tiny.norms[layer, "k"]
    tokens = -(-count // ((q.heads + k.heads) * q.head_dim))
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for role, heads in (("q", q.heads), ("k", k.heads), ("v", k.heads)):
        x = 2 * torch.randn(1, tokens, heads, q.head_dim, generator=generator)
        x[:, 3::4] *= 2**-9
        parts[role] = x.to(device, tiny.model.dtype)
        projection = getattr(attention, f"{role}_proj")
        projection.register_forward_hook(lambda *_, x=parts[role]: x.flatten(-2))
    shape = (rows, 1, tokens) if rows else (1, tokens)
    positions = torch.randint(most, shape, generator=generator).to(device)
    turns = []

    def look(_, given, named):
        turns.append(named["position_embeddings"] if "position_embeddings" in named else given[1])

    attention.register_forward_pre_hook(look, with_kwargs=True)
    words = torch.zeros(1, tokens, dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            model(input_ids=words, position_ids=positions, use_cache=False)
    except _Seen:
        (cos_sin,) = turns
    else:
        raise AssertionError(f"{type(attention).__name__} calls no attention function")
    if torch.is_tensor(cos_sin):  # Llama 4's complex numbers
        cos_sin = cos_sin.real.contiguous(), cos_sin.imag.contiguous()
    results = {role: x.transpose(1, 2) for role, x in attention.seen.items()}
    return Attention(parts, results, positions, cos_sin)
