"""Models' own norms, built by transformers, beside ours, loaded from their checkpoints."""

import json
import re
import sys

import numpy as np
import pytest
from oracle import norm as oracle
from tolerances import (
    FLIPS,
    FLIPS_NEED,
    FLIPS_RECORDED,
    TELLING,
    assert_alike,
    assert_same_rounding,
    mismatch,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

import families  # noqa: E402  they import torch
import parity  # noqa: E402

from cupy_headnorm import HeadNorm, cli  # noqa: E402
from cupy_headnorm.checkpoint import CheckpointError  # noqa: E402
from cupy_headnorm.checkpoint.tensors import read_tensor  # noqa: E402
from cupy_headnorm.pretrained import head_norms  # noqa: E402

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
# The scope brings the tests of a family together, so that one worker makes its model.
BY_FAMILY = pytest.mark.parametrize("family", families.FAMILIES, scope="session")
SHARED_AND_PER_HEAD = ["qwen3", "persimmon", "cohere", "stablelm", "chameleon", "xlstm"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", parity.DTYPES)
@BY_FAMILY
def test_model_and_headnorm_round_alike(tiny, family, dtype, device):
    model = tiny(family, dtype)
    norms = head_norms(model.folder)
    assert model.norms
    for key in model.norms:
        found = parity.measure(model, norms, key, dtype, device)
        assert found.right < FLIPS, f"{key}: {found.right:.4%} differ"
        assert found.wrong > TELLING, f"{key}: {found.what} differs in {found.wrong:.4%} only"


@pytest.mark.parametrize("device", DEVICES)
@BY_FAMILY
def test_model_in_float32(tiny, family, device):
    model = tiny(family, "float32")
    norms = head_norms(model.folder)
    for key, real in model.norms.items():
        norm = norms[key]
        x = real.input(2**16, torch.float32, device)
        expected = real(x)
        y = norm(x, heads_axis=real.heads_axis)

        def beside(values, real=real):
            """Lay a parameter of several heads out beside the input."""
            if values is None or values.size == real.head_dim:
                return values
            values = values.reshape(real.heads, real.head_dim)
            return values if real.heads_axis == -2 else values[:, None]

        _, slack, _ = oracle(
            norm.kind, x.cpu().numpy(), beside(norm.weight), beside(norm.bias),
            eps=norm.eps, weight_offset=norm.weight_offset,
        )  # fmt: skip
        assert_alike(y.cpu().numpy(), expected.cpu().numpy(), slack)


@BY_FAMILY
def test_registry_knows_where_the_heads_are(tiny, family):
    """The layout that the model's own forward pass was seen to have."""
    model = tiny(family)
    described = head_norms(model.folder).described
    # Towers whose forward pass was not run have norms too.
    assert model.norms.keys() <= described.keys()
    for key, real in model.norms.items():
        known = described[key]
        assert known.head_dim == real.head_dim
        assert known.heads_axis == real.heads_axis
        assert known.num_heads in (None, real.heads or 1)  # None: the config does not say


@BY_FAMILY
def test_a_norm_is_found_by_its_name_on_disk_and_in_memory(tiny, family):
    model = tiny(family)
    norms = head_norms(model.folder)
    for key, real in model.norms.items():
        on_disk = norms.described[key].name
        names = {on_disk}
        if on_disk.endswith(re.search(r"\w+\.\d+\..+", real.name)[0]):
            names.add(real.name)  # but for the prefix they are one
        own = real.module.state_dict()
        for name in names:
            norm = HeadNorm.from_pretrained(model.folder, name)
            for part in ("kind", "eps", "weight_offset", "rounding", "num_heads", "head_dim"):
                assert getattr(norm, part) == getattr(norms[key], part)
            for part in ("weight", "bias"):
                values = getattr(norm, part)
                stored = [value for path, value in own.items() if path.endswith(part)]
                assert (values is None) == (not stored)
                assert (
                    not stored
                    or values.tobytes() == torch.cat(stored).view(torch.int16).numpy().tobytes()
                )


@pytest.mark.parametrize("family", families.REFUSED)
def test_what_is_not_ours_is_refused_by_name(tiny, family, capsys):
    model = tiny(family)
    norms = head_norms(model.folder)
    assert not norms
    refused = [one for one in norms.refused if one.role]
    assert {one.layer for one in refused} == {0, 1}
    for one in refused:
        with pytest.raises(CheckpointError, match=re.escape(one.name)) as raised:
            norms[one.layer, one.role]
        assert one.reason
        assert one.reason in str(raised.value)
    assert cli.main(["inspect", str(model.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not told["norms"]
    assert {one["reason"] for one in told["refused"]} == {one.reason for one in refused}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["olmo2", "olmoe"])
def test_a_norm_over_all_heads_is_served_as_one_head(tiny, family, device):
    model = tiny(family)
    for real in model.norms.values():
        assert real.heads is None
        x = real.input(FLIPS_NEED, torch.bfloat16, device)
        norm = HeadNorm.from_pretrained(model.folder, real.name, num_heads=1)
        assert_same_rounding(parity.bits(norm(x)), parity.bits(real(x)))
        _, other = parity.wrong(norm)
        assert mismatch(parity.bits(other(x)), parity.bits(real(x))) > TELLING


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_a_norm_by_length_is_one_by_mean_square(tiny, dtype, device):
    """What the registry says of Dory where it refuses it."""
    model = tiny("dory", dtype)
    for real in model.norms.values():
        weight = np.full(real.head_dim, real.head_dim**-0.5, np.float32)
        norm = HeadNorm(weight, eps=1e-6 / real.head_dim)
        x = real.input(FLIPS_NEED, getattr(torch, dtype), device)
        assert_same_rounding(parity.bits(norm(x)), parity.bits(real(x)))


@pytest.mark.parametrize(
    ("family", "name"),
    [("lara_mini", "linear_attn.out_norm"), ("hy_v4_vl", "self_attn.kv_a_layernorm")],
)
def test_what_is_beside_a_norm_is_refused_by_its_name_on_disk(tiny, family, name):
    norms = head_norms(tiny(family).folder)
    assert norms
    assert any(one.name.endswith(name) and one.role for one in norms.refused)


@BY_FAMILY
def test_inspect_names_every_role(tiny, family, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no word is broken
    model = tiny(family)
    assert cli.main(["inspect", str(model.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["norms"]
    found = {(layer, one["role"]) for one in told for layer in one["layers"]}
    assert found == head_norms(model.folder).keys() >= model.norms.keys()
    assert cli.main(["inspect", str(model.folder)]) == 0
    words = capsys.readouterr().out.split()
    assert {role for _, role in found} <= set(words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("family", SHARED_AND_PER_HEAD)
def test_two_halves_of_the_heads_are_the_whole(tiny, family, dtype, device):
    """Tensor parallelism: each rank norms its own heads, with the whole norm's bits."""
    model = tiny(family, dtype)
    norms = head_norms(model.folder)
    for key, real in model.norms.items():
        axis, half = real.heads_axis, real.heads // 2
        x = real.input(2**16, getattr(torch, dtype), device)
        whole = norms[key](x, heads_axis=axis)
        halves = [
            norms[key].heads(start, start + half)(x.narrow(axis, start, half), heads_axis=axis)
            for start in (0, half)
        ]
        assert torch.equal(torch.cat(halves, axis), whole)
        swapped = norms[key].heads(0, half)(x.narrow(axis, half, half), heads_axis=axis)
        per_head = norms[key].weight.size > real.head_dim
        assert torch.equal(swapped, whole.narrow(axis, half, half)) == (not per_head)


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_prints_the_table(installed, capsys, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "rich.table", None)
    parity.main(["qwen3", "--json"])
    lines = json.loads(capsys.readouterr().out)
    found = [(line["family"], line["role"], line["dtype"]) for line in lines]
    assert found == [("qwen3", role, dtype) for dtype in parity.DTYPES for role in ("k", "q")]
    assert all(line["mismatch"] < 100 * FLIPS for line in lines)
    assert all(line["mismatch_wrong"] > 100 * TELLING for line in lines)
    parity.main(["qwen3"])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [tuple(row[:3]) for row in shown[1:]] == found


@pytest.mark.parametrize("layer", [0, 5, 17])
@pytest.mark.parametrize("role", ["q", "k"])
def test_gemma3_as_recorded(real, library, role, layer):
    """A trained model: what `head_norms` loads gives the recorded outputs."""
    norms = head_norms(real)
    name = norms.described[layer, role].name
    x = read_tensor(real / "activations.safetensors", f"{name}.input")
    recorded = read_tensor(real / "activations.safetensors", f"{name}.output")
    axis = norms.described[layer, role].heads_axis

    def share(norm):
        return mismatch(library.host(norm(library.array(x), heads_axis=axis)), recorded)

    assert share(norms[layer, role]) < FLIPS_RECORDED
    assert share(parity.wrong(norms[layer, role])[1]) > TELLING
