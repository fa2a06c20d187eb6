"""Valid little checkpoints of several families, as trees and lengths to be changed and written."""

import copy
import json
import struct

import numpy as np

from cupy_headnorm.checkpoint import files as checkpoint_files

KEYS = [f"model.layers.0.self_attn.{name}" for name in ("q_norm", "k_norm", "q_layernorm")]


def tensors_of(prefix, layers, q, k, names=("q_norm", "k_norm"), rows=(64, 32), dtype="BF16"):
    """Return dtypes and shapes of some layers' norms and projections."""
    tensors = {}
    for layer in range(layers):
        at = f"{prefix}layers.{layer}.self_attn."
        for name, shape, length in zip(names, (q, k), rows, strict=True):
            heads = [f".norms.{head}" for head in range(shape[0])] if len(shape) == 2 else [""]
            for head in heads:
                tensors[f"{at}{name}{head}.weight"] = (dtype, shape[-1:])
            tensors[f"{at}{name[0]}_proj.weight"] = ("I8", (length, 2))
    return tensors


TEXT = {
    "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "rope_scaling": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}  # fmt: skip
VISION = {"model_type": "siglip_vision_model", "hidden_size": 8, "num_hidden_layers": 1}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
WHOLE = (16,), (16,)
SEEDS = {
    "qwen3": (TEXT | {"rope_scaling": YARN}, tensors_of("model.", 2, *WHOLE)),
    "qwen3_vl": (
        {
            "model_type": "qwen3_vl", "vision_config": {"model_type": "qwen3_vl"},
            "text_config": TEXT | {
                "model_type": "qwen3_vl_text",
                "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
            },
        },
        tensors_of("model.language_model.", 1, *WHOLE),
    ),
    "gemma3": (
        {
            "model_type": "gemma3", "vision_config": VISION,
            "text_config": TEXT | SLIDING | {"model_type": "gemma3_text"},
        },
        tensors_of("language_model.model.", 2, *WHOLE)
        | {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": ("F16", (4, 4))},
    ),
    "stablelm": (
        TEXT | {
            "model_type": "stablelm", "qk_layernorm": True, "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
        },
        tensors_of("model.", 1, (4, 16), (2, 16), ("q_layernorm", "k_layernorm"), dtype="F32"),
    ),
    "cohere": (
        TEXT | {"model_type": "cohere", "use_qk_norm": True, "layer_norm_eps": 1e-5},
        {"model.layers.0.self_attn.q_norm.weight": ("F16", (4, 16)),
         "model.layers.0.self_attn.k_norm.weight": ("F16", (2, 16))},
    ),
    "llama4": (
        TEXT | {
            "model_type": "llama4_text", "use_qk_norm": True, "no_rope_layers": [1, 0],
            "rope_scaling": LLAMA3,
        },
        {"model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 2))},
    ),
    "olmo2": (TEXT | {"model_type": "olmo2"}, tensors_of("model.", 2, (64,), (32,))),
    "unknown": ({"model_type": "nobody"}, tensors_of("model.", 1, *WHOLE, dtype="F64")),
}  # fmt: skip
SIZES = {"I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def header_of(tensors):
    """Return the header of a file with these tensors, and the length of its data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return header, end


def file_of(header, data, length=None):
    """Return a safetensors file; `length` is what it says of its header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length % 2**64) + header + data


def seeded(name, sharded):
    """Return a checkpoint as trees and lengths: what is mutated, and written by `write`."""
    config, tensors = copy.deepcopy(SEEDS[name])
    names = list(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    files = SHARDS if sharded else (checkpoint_files.SINGLE,)
    index = {
        "metadata": {"total_size": 4096},
        "weight_map": {n: f for f, part in zip(files, parts, strict=True) for n in part},
    }
    shards = {f: header_of({n: tensors[n] for n in p}) for f, p in zip(files, parts, strict=True)}
    return config, (index if sharded else None), shards


def write(folder, config, index, shards):
    (folder / checkpoint_files.CONFIG).write_bytes(encoded(config))
    if index is not None:
        (folder / checkpoint_files.INDEX).write_bytes(encoded(index))
    for name, (header, size) in shards.items():
        (folder / name).write_bytes(file_of(header, b"\x3c" * size))


def encoded(tree):
    return tree if isinstance(tree, bytes) else json.dumps(tree).encode()
