"""A trained Gemma 3: recorded activations before and after its own norms (`pytest --real DIR`)."""

import json

import pytest
from tolerances import FLIPS_RECORDED, TELLING, mismatch

from cupy_headnorm import HeadNorm
from cupy_headnorm.checkpoint.tensors import read_tensor


@pytest.mark.parametrize("role", ["q_norm", "k_norm"])
@pytest.mark.parametrize("layer", [0, 5, 17])
def test_gemma3_to_the_last_bit(real, library, layer, role):
    config = json.loads((real / "config.json").read_text())
    key = f"model.layers.{layer}.self_attn.{role}"
    right = {"weight_offset": 1.0, "eps": config["rms_norm_eps"]}
    x = read_tensor(real / "activations.safetensors", f"{key}.input")
    recorded = read_tensor(real / "activations.safetensors", f"{key}.output")

    def share(**options):
        norm = HeadNorm.from_safetensors(real, key, **options)
        return mismatch(library.host(norm(library.array(x), heads_axis=-3)), recorded)

    assert share(**right) < FLIPS_RECORDED
    assert share(**right | {"rounding": "before_weight"}) > TELLING
    assert share(**right | {"kind": "layer"}) > TELLING
    assert share(eps=right["eps"]) > TELLING
    norm = HeadNorm.from_safetensors(real, key, **right)
    y = library.host(norm.forward_reference(library.array(x)))
    assert mismatch(y, recorded) < FLIPS_RECORDED
