"""Models in folders as people have them: whose norm is what, and what contradicts itself."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from cupy_headnorm import CheckpointError, HeadNorm, QKNorm
from cupy_headnorm.checkpoint import files, survey
from cupy_headnorm.checkpoint.norms import UnknownModelError
from cupy_headnorm.models import BY_MODEL_TYPE
from cupy_headnorm.pretrained import head_norms

LAYER = "model.layers.{}.self_attn."
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 3e-6,
}  # fmt: skip
STABLELM = {
    "model_type": "stablelm", "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 12,
    "num_key_value_heads": 2, "layer_norm_eps": 1e-5, "qk_layernorm": True,
}  # fmt: skip
LLAMA4 = {
    "model_type": "llama4_text", "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "use_qk_norm": True,
}  # fmt: skip


def filled(*shape, start=0.5, dtype=np.float32):
    """Return values that differ from one another."""
    return np.linspace(start, start + 1, int(np.prod(shape))).reshape(shape).astype(dtype)


def layers(prefix=LAYER, q=(16,), k=(16,), rows=(64, 32), count=2, dtype=np.float32):
    """Return the norms and projections of some layers, each with values of its own."""
    tensors = {}
    for layer in range(count):
        at = prefix.format(layer)
        for role, shape, length in zip("qk", (q, k), rows, strict=True):
            start = layer + (role == "k") / 2
            if shape is not None:
                tensors[f"{at}{role}_norm.weight"] = filled(*shape, start=start, dtype=dtype)
            if length:
                tensors[f"{at}{role}_proj.weight"] = np.zeros((length, 48), dtype)
    return tensors


def norms_of_heads(heads, key="model.layers.0.self_attn.q_layernorm", dim=8):
    return {f"{key}.norms.{head}.weight": filled(dim, start=head) for head in heads}


@pytest.fixture
def model(tmp_path):
    """Write a model's folder: `model(config, tensors)`."""

    def write(config, tensors, name=files.SINGLE):
        (tmp_path / files.CONFIG).write_text(json.dumps(config))
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        return tmp_path

    return write


def described(config, tensors):
    """Find the norms of tensors that are there by name only."""
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int8): "I8"}
    headers = {name: (names[array.dtype], array.shape) for name, array in tensors.items()}
    return survey.find(config, headers)


def one(config, tensors, key=(0, "q")):
    return described(config, tensors).keyed()[key]


# What is served


def test_every_norm_of_a_model_with_the_models_arithmetic(model):
    tensors = layers(dtype=ml_dtypes.bfloat16)
    folder = model(QWEN3, tensors)
    norms = head_norms(folder)
    assert list(norms) == [(0, "q"), (0, "k"), (1, "q"), (1, "k")]
    assert (len(norms), norms.model_type, norms.refused, norms.notes) == (4, "qwen3", (), ())
    for layer, role in norms:
        norm, name = norms[layer, role], f"{LAYER.format(layer)}{role}_norm"
        np.testing.assert_array_equal(norm.weight, tensors[f"{name}.weight"])
        assert (norm.kind, norm.eps, norm.rounding) == ("rms", 3e-6, "before_weight")
        assert (norm.num_heads, norm.head_dim, norm.weight_offset) == (None, 16, 0)
        assert norms.described[layer, role].name == name
    assert norms.described[0, "q"].num_heads == 4
    assert norms.described[0, "k"].num_heads == 2
    assert "4 head norms of qwen3" in repr(norms)


def test_the_mapping_says_what_it_lacks(model):
    norms = head_norms(model(QWEN3, layers()))
    for key in ((2, "q"), (0, "v"), 0, "q", None):
        assert key not in norms
        assert norms.get(key) is None
        with pytest.raises(KeyError, match=re.escape(repr(key))):
            norms[key]
    with pytest.raises(TypeError):
        norms[0, "q"] = norms[0, "k"]


def test_defaults_of_the_config_class(model):
    # Gemma 3's config.json may omit all but its name: 8 heads of 256, 4 of them keys'.
    tensors = layers(q=(256,), k=(256,), rows=(2048, 1024), count=1)
    norms = head_norms(model({"model_type": "gemma3_text"}, tensors))
    assert (norms[0, "q"].eps, norms[0, "q"].weight_offset) == (1e-6, 1.0)
    assert norms.described[0, "q"].heads_axis == -3
    assert (norms.described[0, "q"].num_heads, norms.described[0, "k"].num_heads) == (8, 4)
    # A null is no value: the keys have as many heads as the queries.
    config = {**QWEN3, "model_type": "dots1", "num_key_value_heads": None}
    assert one(config, layers(rows=(64, 64)), (0, "k")).num_heads == 4


class Watched:
    """`safetensors.safe_open`, noting the tensors of which data is read."""

    read: list[str] = []

    def __init__(self, *arguments, **keywords):
        self.file = self.opened(*arguments, **keywords)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        self.read.append(name)
        return self.file.get_tensor(name)

    def get_slice(self, name):
        class Slice:
            get_shape = self.file.get_slice(name).get_shape
            get_dtype = self.file.get_slice(name).get_dtype

        return Slice()


@pytest.fixture
def read(monkeypatch):
    """The names of the tensors that are read from now on."""
    monkeypatch.setattr(Watched, "opened", staticmethod(safetensors.safe_open), raising=False)
    monkeypatch.setattr(Watched, "read", [])
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    return Watched.read


def test_a_norm_is_read_when_it_is_asked_for_and_once(model, read):
    folder = model(QWEN3, layers())
    norms = head_norms(folder)
    assert (0, "q") in norms
    assert len(list(norms)) == len(norms.described) == 4
    assert read == []
    first = norms[1, "k"]
    assert norms[1, "k"] is first
    assert read == ["model.layers.1.self_attn.k_norm.weight"]
    HeadNorm.from_pretrained(folder, "model.layers.0.self_attn.q_norm")
    assert read[1:] == ["model.layers.0.self_attn.q_norm.weight"]


# Where things lie


@pytest.mark.parametrize(
    "prefix",
    ["model.layers.{}.", "language_model.model.layers.{}.", "model.language_model.layers.{}.",
     "thinker.model.layers.{}.", "layers.{}."],
)  # fmt: skip
def test_prefixes_of_old_and_new_releases(model, prefix):
    folder = model(
        {"model_type": "gemma3", "text_config": {**QWEN3, "model_type": "gemma3_text"}},
        layers(f"{prefix}self_attn."),
    )
    norms = head_norms(folder)
    assert len(norms) == 4
    assert norms.described[1, "k"].name == f"{prefix.format(1)}self_attn.k_norm"
    for asked in ("model.layers.1.", "model.language_model.layers.1."):
        norm = HeadNorm.from_pretrained(folder, f"{asked}self_attn.k_norm")
        np.testing.assert_array_equal(norm.weight, norms[1, "k"].weight)


def test_one_norm_under_two_prefixes_is_refused(model):
    folder = model(
        {**QWEN3, "model_type": "gemma3_text"},
        layers() | layers("language_model.model.layers.{}.self_attn."),
    )
    with pytest.raises(CheckpointError) as error:
        head_norms(folder)
    told = str(error.value)
    assert "model.layers.0.self_attn.q_norm" in told.split(" and ")[0]
    assert "model.layers.0.self_attn.q_norm are both q of layer 0; needs one of them" in told
    assert told.count("language_model.") == 1


def test_one_norm_under_two_names_is_refused():
    tensors = layers() | {"model.layers.0.self_attn.index_q_norm.weight": filled(16)}
    tensors["model.layers.0.self_attn.indexer.q_norm.weight"] = filled(16)
    config = {**QWEN3, "model_type": "minimax_m3_vl_text", "index_head_dim": 16}
    with pytest.raises(
        CheckpointError, match=r"index_q_norm are both index_q of layer 0; needs one"
    ):
        described(config, tensors)


def test_towers_are_told_apart():
    vision = {"model_type": "glm_ocr_vision", "hidden_size": 64, "num_heads": 4}
    text = {**QWEN3, "model_type": "gemma3_text"}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    tensors = layers("model.language_model.layers.{}.self_attn.")
    tensors |= {
        f"model.visual.blocks.{layer}.attn.{role}_norm.weight": filled(16)
        for layer in range(3)
        for role in "qk"
    }
    found = described(config, tensors)
    keyed = found.keyed()
    assert [key for key in keyed if key[0] == 0] == [
        (0, "q"), (0, "k"), (0, "vision_q"), (0, "vision_k")
    ]  # fmt: skip
    assert (keyed[2, "vision_q"].tower, keyed[0, "q"].tower) == ("vision", "text")
    assert keyed[0, "vision_q"].rounding == "before_weight"
    assert keyed[0, "q"].rounding == "once"
    # The only tower's roles are plain.
    alone = {name: array for name, array in tensors.items() if "visual" in name}
    assert next(iter(described(config, alone).keyed())) == (0, "q")
    # A tower that nobody knows is named, and hinders no other one.
    config["vision_config"] = {"model_type": "seer"}
    found = described(config, tensors)
    assert list(found.keyed()) == [(0, "q"), (0, "k"), (1, "q"), (1, "k")]
    assert len(found.refused) == 6
    assert "nothing is known of seer; HeadNorm.from_safetensors(" in found.refused[0].reason


def test_the_towers_own_type_comes_first_then_the_one_around_it():
    nested = {"model_type": "gemma3", "text_config": {**QWEN3, "model_type": "qwen3"}}
    assert one(nested, layers()).rounding == "before_weight"
    nested["text_config"]["model_type"] = "some_text"
    assert one(nested, layers()).weight_offset == 1
    thinker = {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": QWEN3}}
    assert one(thinker, layers("thinker.model.layers.{}.self_attn.")).eps == 3e-6


def test_a_name_that_is_no_norms_lists_near_ones(model):
    folder = model(QWEN3, layers())
    with pytest.raises(
        CheckpointError,
        match=r"has no head norm model.layers.7.self_attn.q_norm; needs one of its, such as "
        r"model.layers.\d.self_attn.q_norm",
    ):
        HeadNorm.from_pretrained(folder, "model.layers.7.self_attn.q_norm")
    with pytest.raises(CheckpointError, match=r"no head norm self_attn.q_norm; needs one of its"):
        HeadNorm.from_pretrained(folder, "self_attn.q_norm")
    for key in (None, 3, b"q_norm", ["q_norm"]):
        with pytest.raises(TypeError, match=re.escape(f"key is {key!r}; needs a norm's name")):
            HeadNorm.from_pretrained(folder, key)


def test_a_name_of_another_tower_is_no_norms(model):
    folder = model({**QWEN3, "vision_config": {"model_type": "seer"}}, layers())
    for tower in ("visual", "mtp", "model.vision_tower"):
        with pytest.raises(CheckpointError, match=f"no head norm {tower}.layers.0"):
            HeadNorm.from_pretrained(folder, f"{tower}.layers.0.self_attn.q_norm")


def test_a_text_config_of_another_name_and_a_tower_saved_alone():
    assert one({"model_type": "seer", "llm_config": QWEN3}, layers()).eps == 3e-6
    vision = {"model_type": "glm_ocr_vision", "hidden_size": 64, "num_heads": 4}
    tensors = {f"blocks.0.attn.{role}_norm.weight": filled(16) for role in "qk"}
    assert one(vision, tensors).rounding == "before_weight"


def test_a_folder_that_is_none_is_told_of_its_config():
    for read in (head_norms, lambda folder: HeadNorm.from_pretrained(folder, "q_norm")):
        with pytest.raises(
            CheckpointError,
            match=r"^Qwen/Qwen3-8B is no folder, .*snapshot_download\('Qwen/Qwen3-8B'\)",
        ):
            read("Qwen/Qwen3-8B")
        with pytest.raises(CheckpointError, match="^/no/such/folder does not exist; needs a model"):
            read("/no/such/folder")


def test_a_tensor_that_the_index_does_not_name_is_read(model):
    folder = model(QWEN3, layers(), "a.safetensors")
    named = {"model.layers.0.self_attn.q_norm.weight": "a.safetensors"}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": named}))
    norms = head_norms(folder)
    assert len(norms) == 4
    np.testing.assert_array_equal(norms[1, "k"].weight, filled(16, start=1.5))
    norm = HeadNorm.from_pretrained(folder, norms.described[1, "k"].name)
    np.testing.assert_array_equal(norm.weight, norms[1, "k"].weight)


def test_a_shard_whose_name_no_file_can_have(model):
    folder = model(QWEN3, layers(), "a.safetensors")
    named = {"model.layers.0.self_attn.q_norm.weight": "a" * 300}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": named}))
    with pytest.raises(CheckpointError, match="cannot be read .File name too long"):
        head_norms(folder)


def test_a_variant(model):
    folder = model(QWEN3, layers(dtype=np.float16), "model.fp16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"needs model.safetensors or model.safetensors.index"
    ):
        head_norms(folder)
    norms = head_norms(folder, variant="fp16")
    assert norms[0, "q"].weight.dtype == np.float16
    assert repr(norms[0, "q"]) == repr(
        HeadNorm.from_pretrained(folder, "model.layers.0.self_attn.q_norm", variant="fp16")
    )


def test_diffusers_folders(model):
    config = {
        "_class_name": "FluxTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 16
    }  # fmt: skip
    tensors = {
        f"{stack}.0.attn.norm_{role}.weight": filled(16)
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for role in "qk"
    }
    norms = head_norms(model(config, tensors, "diffusion_pytorch_model.safetensors"))
    assert list(norms) == [(0, "q"), (0, "k"), (0, "single_q"), (0, "single_k")]
    assert norms[0, "single_k"].eps == 1e-6


# One module a head


def test_heads_are_stacked_in_the_order_of_their_numbers(model):
    tensors = norms_of_heads(range(12))
    tensors |= norms_of_heads(range(2), "model.layers.0.self_attn.k_layernorm")
    norms = head_norms(model(STABLELM, tensors))
    weight = norms[0, "q"].weight
    assert weight.shape == (12, 8)
    # By name norms.10 would come before norms.2.
    np.testing.assert_array_equal(weight[:, 0], np.arange(12))
    assert norms.described[0, "q"].shape == (12, 8)
    assert (norms[0, "q"].num_heads, norms[0, "k"].num_heads) == (12, 2)
    assert norms[0, "q"].kind == "layer"


def test_one_head_of_a_list_is_a_list(model):
    config = {**STABLELM, "num_key_value_heads": 1}
    tensors = norms_of_heads(range(12))
    tensors |= norms_of_heads(range(1), "model.layers.0.self_attn.k_layernorm")
    assert head_norms(model(config, tensors))[0, "k"].weight.shape == (1, 8)


def test_a_missing_head_is_refused():
    with pytest.raises(
        CheckpointError,
        match=r"q_layernorm.norms.11.weight is there and .*q_layernorm.norms.10.weight is not",
    ):
        described(STABLELM, norms_of_heads([*range(10), 11]))
    with pytest.raises(CheckpointError, match=r"shape \(11, 8\), and config.json says num_attent"):
        described(STABLELM, norms_of_heads(range(11)))


def test_heads_that_differ_are_refused():
    tensors = norms_of_heads(range(12))
    tensors["model.layers.0.self_attn.q_layernorm.norms.3.weight"] = filled(7)
    with pytest.raises(
        CheckpointError, match=r"F32 \(7,\) and F32 \(8,\); needs one dtype and shape"
    ):
        described(STABLELM, tensors)


def test_a_list_beside_a_whole_weight_is_refused():
    tensors = norms_of_heads(range(12))
    tensors["model.layers.0.self_attn.q_layernorm.weight"] = filled(12, 8)
    with pytest.raises(
        CheckpointError, match=r"q_layernorm.weight and .*norms.0.weight are both there; needs one"
    ):
        described(STABLELM, tensors)


# Geometry


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((4, 16), "needs (head_dim,)"),
        ((64,), "needs (head_dim,)"),  # full width
        ((15,), "needs (head_dim,)"),
        ((0,), "needs (head_dim,)"),
        ((), "needs (head_dim,)"),
    ],
)
def test_a_weight_that_fits_neither_shape(shape, said):
    with pytest.raises(CheckpointError) as error:
        described(QWEN3, layers(q=shape))
    told = str(error.value)
    assert f"model.layers.0.self_attn.q_norm.weight has shape {shape}" in told
    assert "num_attention_heads = 4 and head_dim = 16" in told
    assert said in told


def test_a_head_dim_that_the_config_gives_is_the_only_one():
    tensors = layers(q=(12,), k=(12,), rows=(0, 0))
    with pytest.raises(CheckpointError, match=r"heads = 4 and head_dim = 16; qwen3 needs"):
        described(QWEN3, tensors)
    # Without one it is hidden_size // num_attention_heads.
    del (config := dict(QWEN3))["head_dim"]
    assert one(config, tensors).head_dim == 12


@pytest.mark.parametrize("shape", [(64,), (3, 16), (4, 8), (4, 16, 1)])
def test_a_weight_a_head_that_does_not_fit(shape):
    config = {
        "model_type": "cohere", "hidden_size": 64, "num_attention_heads": 4, "use_qk_norm": True
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"cohere needs \(num_heads, head_dim\)"):
        described(config, layers(q=shape, k=(4, 16), rows=(0, 0)))
    assert one(config, layers(q=(4, 16), k=(4, 16), rows=(0, 0))).num_heads == 4


def test_num_heads_is_checked_against_the_projection():
    with pytest.raises(
        CheckpointError,
        match=r"q_proj.weight has 128 rows, 8 heads of 16, and .*q_norm is of 4 by .*num_att",
    ):
        described(QWEN3, layers(rows=(128, 32)))
    with pytest.raises(CheckpointError, match=r"k_proj.weight has 40 rows, 2.5 heads of 16"):
        described(QWEN3, layers(rows=(64, 40)))
    # Where only the projection says how many there are.
    for rows, heads in ((40, "2.5"), (0, "0")):
        tensors = layers(count=1)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((rows, 48), np.float32)
        with pytest.raises(CheckpointError, match=f"{heads} heads of 16; needs whole heads$"):
            described({**QWEN3, "model_type": "gemma4_text"}, tensors)
    # Where a gate is projected along, a head has twice the rows.
    gated = {**QWEN3, "model_type": "qwen3_next"}
    assert one(gated, layers(rows=(128, 32))).num_heads == 4
    with pytest.raises(CheckpointError, match=r"64 rows, 2 heads of 32, and .* is of 4"):
        described(gated, layers(rows=(64, 32)))


def test_the_config_decides_where_there_is_no_projection_to_compare():
    norm = one(QWEN3, layers(rows=(0, 32)))
    assert norm.num_heads == 4
    assert norm.notes == ("config.json decides num_heads: no q_proj to check against",)
    assert one(QWEN3, layers(rows=(0, 32)), (0, "k")).notes == ()
    packed = layers(rows=(0, 32))
    packed["model.layers.0.self_attn.q_proj.weight"] = np.zeros((999, 1), np.int8)
    assert one(QWEN3, packed).notes == ("config.json decides num_heads: q_proj is packed",)


def test_heads_and_head_dims_that_differ_by_layer():
    # Gemma 4's full attention layers have a head_dim of their own, which no single field says.
    tensors = layers(count=1) | {
        name.replace("layers.0", "layers.1"): array
        for name, array in layers(q=(32,), k=(32,), rows=(128, 32), count=1).items()
    }
    found = described({**QWEN3, "model_type": "gemma4_text"}, tensors).keyed()
    assert [(found[at].num_heads, found[at].head_dim) for at in found] == [
        (4, 16), (2, 16), (2, 16), (4, 32), (1, 32), (1, 32)
    ]  # fmt: skip
    # A list in the config holds a value a layer.
    listed = {**QWEN3, "num_attention_heads": [4, 2], "num_key_value_heads": [2, 1]}
    rows = layers(count=1) | {
        name.replace("layers.0", "layers.1"): array
        for name, array in layers(rows=(32, 16), count=1).items()
    }
    assert [norm.num_heads for norm in described(listed, rows).norms] == [4, 2, 2, 1]
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.q_proj.weight has 64 rows"):
        described(listed, layers())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'; needs 1 to 2147483647"),
        ({"num_attention_heads": True}, "num_attention_heads is True; needs 1 to 2147483647"),
        ({"num_attention_heads": [4]}, "num_attention_heads is of 1 layers; needs a value for lay"),
        ({"head_dim": -16}, "head_dim is -16; needs 1 to 2147483647"),
        ({"head_dim": 16.0}, "head_dim is 16.0; needs 1 to 2147483647"),
        ({"head_dim": 10**4000}, f"head_dim is 1{'0' * 59}; needs 1 to 2147483647"),
        ({"rms_norm_eps": 10**400}, f"rms_norm_eps is 1{'0' * 59}; needs a number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; needs a number"),
        ({"text_config": "qwen3"}, "text_config is 'qwen3'; needs an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; needs a number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; needs a number"),
    ],
)
def test_a_config_with_no_numbers_where_they_belong(changes, said):
    with pytest.raises(CheckpointError, match=re.escape(f"config.json's {said}")):
        described({**QWEN3, **changes}, layers())


def test_a_bias_that_should_be_there_or_should_not():
    tensors = layers(rows=(0, 0))
    tensors["model.layers.0.self_attn.q_norm.bias"] = filled(16)
    with pytest.raises(
        CheckpointError, match=r"has weight and bias; qwen3 needs weight alone, or H"
    ):
        described(QWEN3, tensors)
    phi = {**QWEN3, "model_type": "phi", "hidden_size": 64, "qk_layernorm": True}
    alone = {"model.layers.0.self_attn.q_layernorm.weight": filled(16)}
    with pytest.raises(CheckpointError, match=r"has weight; phi needs weight and bias"):
        described(phi, alone)
    both = alone | {"model.layers.0.self_attn.q_layernorm.bias": filled(16)}
    assert one(phi, both).biases == ("model.layers.0.self_attn.q_layernorm.bias",)
    del both["model.layers.0.self_attn.q_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"has bias; phi needs weight and bias"):
        described(phi, both)


@pytest.mark.parametrize(
    ("bias", "said"),
    [(filled(8), r"shape \(16,\) and .*bias \(8,\)"), (filled(4, 16), r"and .*bias \(4, 16\)")],
)
def test_a_bias_of_another_shape_than_its_weight(bias, said):
    phi = {**QWEN3, "model_type": "phi", "hidden_size": 64, "qk_layernorm": True}
    at = "model.layers.0.self_attn.q_layernorm"
    with pytest.raises(CheckpointError, match=f"{said}; needs one shape"):
        described(phi, {f"{at}.weight": filled(16), f"{at}.bias": bias})
    (norm,) = described(
        phi, {f"{at}.weight": filled(16), f"{at}.bias": np.zeros(16, np.int8)}
    ).refused
    assert norm.reason.startswith("its dtype is I8; needs float16")


# Over all heads


MOLMO = {**QWEN3, "model_type": "molmo2_text", "num_key_value_heads": 1}


@pytest.mark.parametrize(("q", "refused"), [((16,), False), ((64,), True)])
def test_a_k_of_one_head_is_what_q_is(q, refused):
    # (16,) is both one head's and the full width of k.
    found = described(MOLMO, layers(q=q, rows=(64, 16)))
    assert (len(found.refused), len(found.norms)) == ((4, 0) if refused else (0, 4))


def test_a_k_of_one_head_is_what_the_registry_says():
    config = {**QWEN3, "num_key_value_heads": 1}
    assert len(described({**config, "model_type": "olmo2"}, layers(q=(64,), rows=(64, 16))).refused)
    keys = layers(q=None, rows=(64, 16))
    assert len(described({**config, "model_type": "olmo2"}, keys).refused) == 2
    assert len(described({**config, "model_type": "qwen3"}, keys).norms) == 2


@pytest.mark.parametrize("part", ["scale", "gamma"])
def test_a_weight_of_another_name(part, model, tmp_path):
    """The advice for a norm of which nothing is known is a call that reads it."""
    key = "model.layers.0.self_attn.q_norm"
    folder = model({**QWEN3, "model_type": "nobody"}, {f"{key}.{part}": filled(16)})
    with pytest.raises(
        CheckpointError, match="nothing is known .*from_safetensors.path, key, kind="
    ):
        HeadNorm.from_pretrained(folder, key)
    norm = HeadNorm.from_safetensors(folder, key, kind="rms", eps=1e-6)
    np.testing.assert_array_equal(norm.weight, filled(16))
    norm = HeadNorm.from_pretrained(folder, key, kind="rms", eps=1e-6, rounding="once")
    np.testing.assert_array_equal(norm.weight, filled(16))


def test_repr_tells_the_arithmetic(model):
    folder = model({**QWEN3, "rms_norm_eps": 3e-6}, layers())
    key = "model.layers.0.self_attn.q_norm"
    norm = HeadNorm.from_pretrained(folder, key, eps=1e-5)
    told = f"{str(folder)!r}, {key!r}, kind='rms', eps=1e-05, weight_offset=0.0, "
    assert repr(norm) == f"HeadNorm.from_pretrained({told}rounding='before_weight')"
    again = eval(repr(norm))
    assert repr(again) == repr(norm)
    assert "eps=3e-06, " in repr(head_norms(folder)[0, "q"])


def test_a_key_that_is_no_pair_is_told_what_keys_are(model):
    norms = head_norms(model(QWEN3, layers()))
    with pytest.raises(KeyError, match=r"0; needs \(layer, role\), such as \(0, 'q'\) or \(0, 'k'"):
        norms[0]
    assert norms.get(0) is None


def test_a_norm_over_all_heads_is_refused_or_read_as_one_head(model):
    config = {**QWEN3, "model_type": "olmo2"}
    tensors = layers(q=(64,), k=(32,))
    folder = model(config, tensors)
    norms = head_norms(folder)
    assert len(norms) == 0
    assert [norm.role for norm in norms.refused] == ["q", "k", "q", "k"]
    why = r"q_norm is refused: olmo2 normalizes 4 heads together, .*num_heads=1. does that, as one"
    with pytest.raises(CheckpointError, match=why):
        norms[0, "q"]
    assert (0, "q") not in norms
    with pytest.raises(CheckpointError, match=why):
        HeadNorm.from_pretrained(folder, "model.layers.0.self_attn.q_norm")
    norm = HeadNorm.from_pretrained(folder, "model.layers.0.self_attn.q_norm", num_heads=1)
    assert (norm.head_dim, norm.num_heads) == (64, 1)
    x = filled(3, 64, start=-2)
    whole = x / np.sqrt((x * x).mean(-1, keepdims=True) + 3e-6)
    expected = whole * tensors["model.layers.0.self_attn.q_norm.weight"]
    np.testing.assert_allclose(norm(x[:, None])[:, 0], expected, rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"olmo2 needs \(num_heads \* head_dim,\)"):
        described(config, layers(q=(40,), k=(32,)))


# Flags


def test_tensors_win_over_flags():
    config = {**QWEN3, "model_type": "glm4_moe", "use_qk_norm": False}
    assert one(config, layers()).notes == (
        "config.json's use_qk_norm is False; the tensors are there and win",
    )
    config["use_qk_norm"] = True
    assert one(config, layers()).notes == ()
    found = described(config, layers(q=None, k=None))
    assert found.norms == ()
    assert found.notes == ("config.json's use_qk_norm is True; no tensor of a norm is there",)
    # One layer that has them is enough.
    tensors = layers() | layers("mtp.layers.{}.self_attn.", q=None, k=None)
    assert described(config, tensors).notes == ()
    config["use_qk_norm"] = False
    assert described(config, layers(q=None, k=None)).notes == (
        "no tensor of a head norm of glm4_moe is there",
    )


# Without weights


def attentions(count=8):
    return {
        f"model.layers.{layer}.self_attn.q_proj.weight": np.zeros((64, 48), np.float32)
        for layer in range(count)
    }


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"no_rope_layers": [1, 0, 1, 0, 0, 0, 0, 1]}, [0, 2, 7]),
        ({}, [0, 1, 2, 4, 5, 6]),  # each fourth has none
        ({"no_rope_layers": []}, [0, 1, 2, 4, 5, 6]),
        ({"no_rope_layer_interval": 2}, [0, 2, 4, 6]),
        ({"use_qk_norm": False}, []),
    ],
)
def test_norms_without_weights_are_where_the_config_says(model, changes, where):
    folder = model({**LLAMA4, **changes}, attentions())
    norms = head_norms(folder)
    assert list(norms) == [(layer, role) for layer in where for role in "qk"]
    if where:
        norm = norms[0, "q"]
        assert (norm.weight, norm.head_dim, norm.rounding) == (None, 16, "once")
        name = norms.described[0, "q"].name
        assert name == "model.layers.0.self_attn.qk_norm"
        assert HeadNorm.from_pretrained(folder, name).head_dim == 16
        assert norms.described[0, "k"].rope.order == "before norm"


@pytest.mark.parametrize("given", ["yes", [1, 0], [1, 0, None, 1, 1, 1, 1, 1], {"0": 1}])
def test_layers_that_the_config_does_not_say(given):
    with pytest.raises(CheckpointError, match=r"no_rope_layers is .* for layer \d; needs 1 or 0"):
        described({**LLAMA4, "no_rope_layers": given}, attentions())


def test_values_are_normalized_where_keys_are():
    # A layer that shares another's keys and values has neither norm.
    tensors = layers()
    for name in ("k_norm.weight", "k_proj.weight"):
        del tensors[f"model.layers.1.self_attn.{name}"]
    config = {**QWEN3, "model_type": "gemma3n_text"}
    assert list(described(config, tensors).keyed()) == [(0, "q"), (0, "k"), (0, "v"), (1, "q")]


def test_a_layer_beyond_the_models_own_is_noted():
    found = described({**QWEN3, "num_hidden_layers": 1}, layers()).keyed()
    assert found[0, "q"].notes == ()
    assert found[1, "q"].notes == ("layer 1 is beyond config.json's 1: it predicts ahead",)


def test_a_hostile_number_of_layers():
    with pytest.raises(CheckpointError, match=r"says 1000000000 layers; needs 1000 at most"):
        described({**LLAMA4, "num_hidden_layers": 10**9}, attentions())
    # No number of a layer or a head is longer than that either.
    key = "model.layers.0.self_attn.q_layernorm"
    assert (
        described(QWEN3, {f"layers.{'9' * 5000}.self_attn.q_norm.weight": filled(16)}).norms == ()
    )
    assert described(STABLELM, {f"{key}.norms.{'9' * 5000}.weight": filled(8)}).norms == ()


# MLX


def written_by_mlx(folder, config, tensors):
    (folder / files.CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / files.SINGLE, metadata={"format": "mlx"})
    return folder


SUMS = ["qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp",
        "qwen4_exp_text", "step3p5", "step3p7", "t5gemma2_text"]  # fmt: skip


@pytest.mark.parametrize("model_type", SUMS)
def test_a_weight_that_may_hold_the_sum_is_refused_by_name(tmp_path, rng, model_type):
    # MLX's conversions hold 1 + weight, to which 1 was added again: 2.95 off.
    stored = 1 + filled(16, start=-0.2) / 8
    key = "model.layers.0.self_attn.q_norm"
    config = {**QWEN3, "model_type": model_type}
    folder = written_by_mlx(tmp_path, config, {f"{key}.weight": stored})
    said = (
        f"MLX wrote its file, and may have stored 1 + weight, to which {model_type} adds 1 again; "
        "needs HeadNorm.from_safetensors(path, key, kind='rms', eps=3e-06, rounding='once', "
        "weight_offset=) with 0 for stored sums"
    )
    norms = head_norms(folder)
    assert list(norms) == []
    assert norms.refused[0].reason.startswith(said)
    for read in (lambda: norms[0, "q"], lambda: HeadNorm.from_pretrained(folder, key)):
        with pytest.raises(UnknownModelError, match=re.escape(f"{key} is refused: {said}")):
            read()
    with pytest.raises(CheckpointError, match="MLX wrote its file"):
        QKNorm.from_pretrained(folder, 0)
    known = {"kind": "rms", "eps": 3e-6, "rounding": "once", "weight_offset": 0.0}
    x = rng.standard_normal((5, 4, 16)).astype(np.float32)
    exact = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 3e-6) * stored
    for read in (HeadNorm.from_safetensors, HeadNorm.from_pretrained):
        np.testing.assert_allclose(read(folder, key, **known)(x), exact, rtol=1e-6)


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "minimax_m3_vl_text", "qwen3", "gemma3n_text"]
)
def test_a_weight_that_mlx_keeps_as_it_is_is_read(tmp_path, model_type):
    config = {**QWEN3, "model_type": model_type}
    norms = head_norms(written_by_mlx(tmp_path, config, layers()))
    assert norms[0, "q"].weight_offset == (model_type in ("gemma3_text", "minimax_m3_vl_text"))
    assert (norms[0, "q"].weight == filled(16, start=0)).all()


def test_only_files_of_mlx_are_refused(tmp_path):
    tensors = layers(rows=(None, None))
    shards = {name: f"{'.k_norm' in name}.safetensors" for name in tensors}
    for kind, metadata in ((True, {"format": "mlx"}), (False, None)):
        own = {name: tensors[name] for name, shard in shards.items() if str(kind) in shard}
        save_file(own, tmp_path / f"{kind}.safetensors", metadata=metadata)
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": shards}))
    (tmp_path / files.CONFIG).write_text(json.dumps({**QWEN3, "model_type": "qwen3_next"}))
    norms = head_norms(tmp_path)
    assert list(norms) == [(0, "q"), (1, "q")]
    assert [(norm.layer, norm.role) for norm in norms.refused] == [(0, "k"), (1, "k")]


# Rotary embeddings


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({}, (0.25, 0.25)),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, (0.5, 0.5)),
        (
            {
                "layer_types": ["full", "sliding"],
                "rope_parameters": {
                    "full": {"partial_rotary_factor": 0.5},
                    "sliding": {"partial_rotary_factor": 1.0},
                },
            },
            (0.5, 1.0),
        ),
        ({"rope_parameters": {"a": {"partial_rotary_factor": 0.5}, "b": {}}}, (0.25, 0.25)),
        ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
         (0.25, 0.25)),
        ({"partial_rotary_factor": 0.75}, (0.75, 0.75)),
        ({"partial_rotary_factor": [0.75, 0.5]}, (0.75, 0.5)),
        ({"rotary_pct": 0.125}, (0.25, 0.25)),  # which its module does not read
        ({"rotary_dim": 8}, (0.25, 0.25)),
        ({"rotary_dim": 10**400}, (0.25, 0.25)),
        ({"rope_scaling": None, "partial_rotary_factor": None, "rotary_dim": None}, (0.25, 0.25)),
        ({"partial_rotary_factor": "half"}, (0.25, 0.25)),
    ],
)  # fmt: skip
def test_the_share_of_dims_that_turns(fields, shares):
    config = {**QWEN3, "model_type": "qwen3_next", **fields}  # 0.25 where nothing says it
    found = described(config, layers(rows=(128, 32))).keyed()
    assert tuple(found[layer, "q"].rope.partial for layer in range(2)) == shares


# What is not known, and what is refused


def test_an_unknown_model_says_what_it_has_and_what_would_help(model):
    folder = model({**QWEN3, "model_type": "newcomer"}, layers(count=3))
    key = "model.layers.0.self_attn.q_norm"
    with pytest.raises(UnknownModelError) as error:
        head_norms(folder)
    for said in (
        "nothing is known of newcomer",
        "model.layers.*.self_attn.q_norm F32 (16,) in layers 0-2",
        "model.layers.*.self_attn.k_norm F32 (16,) in layers 0-2",
        "HeadNorm.from_safetensors(path, key, kind=, eps=, weight_offset=, rounding=)",
    ):
        assert said in str(error.value)
    with pytest.raises(UnknownModelError, match="nothing is known of newcomer"):
        HeadNorm.from_pretrained(folder, key)
    told = HeadNorm.from_pretrained(folder, key, kind="layer", eps=1e-3, rounding="once")
    assert (told.kind, told.eps, told.head_dim) == ("layer", 1e-3, 16)


def test_an_unknown_model_without_norms_is_no_error(model):
    norms = head_norms(model({"model_type": "llama"}, layers(q=None, k=None)))
    assert len(norms) == 0
    assert norms.notes == ("nothing is known of llama, and no tensor looks like a head norm",)
    with pytest.raises(CheckpointError, match=r"no head norm model.layers.0.x; nothing is known"):
        HeadNorm.from_pretrained(norms._folder, "model.layers.0.x")


def test_a_config_without_a_type():
    with pytest.raises(UnknownModelError, match="nothing is known of a config without a type"):
        described({"model_type": None}, layers())
    with pytest.raises(UnknownModelError, match=r"nothing is known of \['qwen3'\]"):
        described({"model_type": ["qwen3"]}, layers())


def test_names_that_could_steer_a_terminal():
    with pytest.raises(UnknownModelError, match=r"^nothing is known of 'new\\ncomer\\x1b\[31m',"):
        described({"model_type": "new\ncomer\x1b[31m"}, layers())
    tensors = layers() | {"model.layers.0.\x1b[31mself_attn.v_norm.weight": filled(16)}
    assert described(QWEN3, tensors).refused == ()


def test_many_unclaimed_tensors_are_not_all_listed():
    tensors = {f"h.0.{letter}.q_norm.weight": filled(16) for letter in "abcdefghij"}
    with pytest.raises(UnknownModelError, match=r"h.\*.h.q_norm F32 \(16,\) in layers 0, 2 more;"):
        described({"model_type": "newcomer"}, tensors)


@pytest.mark.parametrize(
    "rest",
    ["attn.q_ln", "attention.norm_k", "self_attn.query_layernorm", "attn.norm_added_q",
     "self_attn.qk_norm", "attention.self.layer_norm_q", "q_rms_norm", "self_attn.v_norm"],
)  # fmt: skip
def test_what_looks_like_a_head_norm(rest):
    with pytest.raises(UnknownModelError, match=re.escape(rest)):
        described({"model_type": "newcomer"}, {f"h.0.{rest}.weight": filled(16)})


@pytest.mark.parametrize(
    "name",
    ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_a_layernorm",
     "model.layers.0.self_attn.q_proj", "model.layers.0.seq_norm", "q_norm"],
)  # fmt: skip
def test_what_does_not(name):
    assert described({"model_type": "newcomer"}, {f"{name}.weight": filled(16)}).refused == ()


def test_a_norm_beside_those_of_the_row_is_named(model):
    tensors = layers() | {"model.layers.0.self_attn.v_norm.weight": filled(16)}
    folder = model(QWEN3, tensors)
    norms = head_norms(folder)
    assert len(norms) == 4
    (unclaimed,) = norms.refused
    assert unclaimed.name == "model.layers.0.self_attn.v_norm"
    assert unclaimed.reason.startswith("nothing is known of such a norm of qwen3; HeadNorm.from")
    with pytest.raises(UnknownModelError, match="v_norm is refused: nothing is known of such"):
        HeadNorm.from_pretrained(folder, unclaimed.name)
    # A module a head is one norm.
    heads = norms_of_heads(range(3), "model.layers.0.self_attn.v_norm")
    assert [norm.name for norm in described(QWEN3, layers() | heads).refused] == [unclaimed.name]
    with pytest.raises(UnknownModelError, match=r"has .*q_proj.weight, of which nothing is known"):
        HeadNorm.from_pretrained(folder, "model.layers.0.self_attn.q_proj")


def test_a_family_that_is_refused_says_why(model):
    tensors = {"model.layers.0.self_attn.qk_norm.temp": filled(2)}
    config = {"model_type": "zaya", "num_key_value_heads": 2}
    folder = model(config, tensors)
    norms = head_norms(folder)
    why = BY_MODEL_TYPE["zaya"].refused
    assert [norm.reason for norm in norms.refused] == [f"zaya: {why}"]
    assert norms.notes == ()
    assert described(config, layers(q=None, k=None)).notes == (f"zaya: {why}",)
    with pytest.raises(CheckpointError, match=re.escape(f"qk_norm is refused: zaya: {why}")):
        norms[0, "k"]
    with pytest.raises(CheckpointError, match=re.escape(why)):
        HeadNorm.from_pretrained(folder, "model.layers.0.self_attn.qk_norm")


def test_a_dtype_that_is_refused():
    headers = {"model.layers.0.self_attn.q_norm.weight": ("F8_E4M3", (16,))}
    (norm,) = survey.find(QWEN3, headers).refused
    assert norm.reason == "its dtype is F8_E4M3; needs float16, bfloat16, float32 or float64"


def test_layers_for_prediction_are_no_layers_of_the_model():
    config = {**QWEN3, "model_type": "qwen3_next"}
    tensors = layers(rows=(128, 32)) | layers("mtp.layers.{}.self_attn.", rows=(128, 32), count=1)
    keyed = described(config, tensors).keyed()
    assert list(keyed)[-2:] == [(0, "mtp_q"), (0, "mtp_k")]
    assert keyed[0, "q"].name.startswith("model.")
