"""Queries and keys as models give them to their attention function, beside `QKNorm`."""

import json

import numpy as np
import pytest
from allpairspy import AllPairs
from oracle import norm as oracle
from tolerances import ANGLE, FLIPS, FLIPS_ROTATED, ROTATED, TELLING, assert_alike, mismatch

from cupy_headnorm import CheckpointError, HeadNorm, QKNorm
from cupy_headnorm._arrays import dtypes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

import parity  # noqa: E402  it imports torch
from rotary import attention  # noqa: E402

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
BY_FAMILY = pytest.mark.parametrize("family", parity.QK_FAMILIES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", parity.DTYPES)
@BY_FAMILY
def test_attention_is_given_what_qknorm_gives(tiny, family, dtype, device):
    model = tiny(family, dtype)
    layers = list(parity.layers(model))
    assert layers
    for layer, qk in layers:
        found = parity.measure_qk(model, layer, qk, device)
        assert found.positions < FLIPS_ROTATED, f"layer {layer}: {found.positions:.4%} differ"
        assert found.given < FLIPS, f"layer {layer}: {found.given:.4%} differ"
        assert found.v < FLIPS
        assert found.rounding > TELLING * found.turned, f"{found.what} is not told from ours"
        assert found.order > TELLING * found.turned


@pytest.mark.parametrize("device", DEVICES)
@BY_FAMILY
def test_attention_in_float32(tiny, family, device):
    model = tiny(family, "float32")
    layers = list(parity.layers(model))
    assert layers
    for layer, qk in layers:
        rope = qk.rope
        real = attention(
            model, layer, 2**16, rows=len(rope.sections), most=parity.MOST, device=device
        )
        parts = {name: real.parts[name] for name in qk.norms}
        cos, sin = real.cos_sin
        by_position = qk(*parts.values(), positions=real.positions)
        as_given = qk(*parts.values(), cos=cos, sin=sin)
        positions = real.positions.cpu().numpy()
        if rope.sections:
            positions = positions.max(0)
        angles = positions[..., None] * np.array(rope.inverse_frequency)
        for i, name in enumerate(qk.norms):
            expected = real.results[name].cpu().numpy()
            sizes, slack = pairs_of(qk, name, parts[name].cpu().numpy())
            assert_alike(as_given[i].cpu().numpy(), expected, slack)
            if name != "v":
                both = (angles, angles)
                wide = (
                    np.stack(both, -1).reshape(*positions.shape, -1)
                    if rope.style == "interleaved"
                    else np.concatenate(both, -1)
                )
                slack[..., : rope.rotary_dim] += (
                    ANGLE * wide[:, :, None] * sizes[..., : rope.rotary_dim]
                )
            assert_alike(by_position[i].cpu().numpy(), expected, slack)


def pairs_of(qk, name, x):
    """Return, of each result, the sum of both terms' sizes and the slack of `assert_alike`."""
    norm, rope = qk.norms[name], qk.rope
    last = rope.order == "before norm" and name != "v"  # the weight comes after the pair
    exact, slack, _ = oracle(
        norm.kind, x, None if last else norm.weight, norm.bias,
        eps=norm.eps, weight_offset=norm.weight_offset,
    )  # fmt: skip
    sizes = np.abs(exact) + slack
    if name == "v":
        return sizes, slack
    half = rope.rotary_dim // 2
    other = np.arange(rope.rotary_dim)
    other = other ^ 1 if rope.style == "interleaved" else (other + half) % rope.rotary_dim
    turned = sizes[..., : rope.rotary_dim]
    sizes[..., : rope.rotary_dim] = turned + turned[..., other]
    if last and norm.weight is not None:
        sizes *= np.abs(norm.weight.astype(np.float64) + norm.weight_offset)
    return sizes, ROTATED * sizes


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("family", ["exaone4", "afmoe", "flint", "lara_mini"])
def test_a_layer_that_turns_nothing(tiny, family, dtype):
    model = tiny(family, dtype)
    qk = QKNorm.from_pretrained(model.folder, 1)
    assert qk.rope is None
    real = attention(model, 1, 2**20)
    for name, y in zip("qk", qk(real.parts["q"], real.parts["k"]), strict=True):
        assert mismatch(parity.bits(y), parity.bits(real.results[name])) < FLIPS


@pytest.mark.parametrize("family", ["beam", "muse_spark", "muse_glimmer"])
def test_a_layer_whose_config_has_no_angles_turns_nothing(tiny, family):
    # The models go on to scale q.
    model = tiny(family, "bfloat16")
    qk = QKNorm.from_pretrained(model.folder, 1)
    assert qk.rope is None
    real = attention(model, 1, 2**16)
    _, k = qk(real.parts["q"], real.parts["k"])
    assert mismatch(parity.bits(k), parity.bits(real.results["k"])) < FLIPS


def test_a_layer_without_queries_is_refused(tiny):
    model = tiny("deepseek_v4", "bfloat16")
    with pytest.raises(CheckpointError, match="has no norm of k in layer 0; needs one of its"):
        QKNorm.from_pretrained(model.folder, 0)


TOKENS, HEADS, KV_HEADS = 5, 3, 2
HEAD_DIMS = (33, 37, 80, 100, 128, 160, 256, 512, 1024)
NAMES = [dtype.name for dtype in dtypes.DTYPES]
CHOICES = [
    HEAD_DIMS, [None, *NAMES], [None, *NAMES], NAMES, ["rms", "layer"],
    ["once", "before_weight", "every_op"], ["shared", "per head", "keys per head"],
    ["new", "in place", "packed"], [False, True],
]  # fmt: skip
PAIRS = [tuple(row) for row in AllPairs(CHOICES)]
PAIRS += [
    (dim, None, None, x, "rms", "rstd", "shared", "new", False)
    for dim, x in ((33, "bfloat16"), (128, "float16"))
]


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: "-".join(map(str, case)))
def test_without_rope_the_norms_one_by_one(library, rng, case):
    head_dim, weight, bias, dtype, kind, rounding, per_head, out, with_v = case
    by_name = {one.name: one.numpy for one in dtypes.DTYPES}

    def norm(heads, per_head, **options):
        shape = (heads, head_dim) if per_head else (head_dim,)
        given = [
            None if name is None else (rng.standard_normal(shape) + 1).astype(by_name[name])
            for name in (weight, bias)
        ]
        if weight is None and bias is None:
            options["head_dim"] = head_dim
        if weight is None:
            options.pop("weight_offset", None)
        return HeadNorm(*given, kind=kind, rounding=rounding, **options)

    norms = [
        norm(HEADS, per_head == "per head", eps=1e-6, weight_offset=1.0),
        norm(KV_HEADS, per_head != "shared", eps=1e-3),
    ]
    if with_v:
        norms.append(HeadNorm(head_dim=head_dim, kind=kind, rounding=rounding, eps=1e-5))
    heads = HEADS + 2 * KV_HEADS
    values = rng.standard_normal((TOKENS, heads, head_dim)).astype(by_name[dtype])
    buffer = library.array(values)
    stops = (HEADS, HEADS + KV_HEADS, heads)

    def parts(array):
        starts = (0, *stops[:2])
        return tuple(array[:, a:b] for a, b, _ in zip(starts, stops, norms, strict=False))

    expected = [library.host(one(x)) for one, x in zip(norms, parts(buffer), strict=True)]
    qk = QKNorm(*norms)
    if out == "packed":
        flat = buffer.reshape(TOKENS, -1)
        assert qk.packed(flat, num_heads=HEADS, num_kv_heads=KV_HEADS) is flat
        found = parts(buffer)
        if not with_v:
            assert library.host(buffer)[:, stops[1] :].tobytes() == values[:, stops[1] :].tobytes()
    else:
        given = parts(buffer)
        found = qk(*given, out=given if out == "in place" else None)
    for y, one in zip(found, expected, strict=True):
        assert np.ascontiguousarray(library.host(y)).tobytes() == one.tobytes()
    untouched = library.host(buffer).tobytes() == values.tobytes()
    assert untouched == (out == "new")


def test_the_command_prints_the_table(capsys):
    parity.main(["--qk", "gemma3", "--json"])
    lines = json.loads(capsys.readouterr().out)
    found = [(line["family"], line["layer"], line["dtype"]) for line in lines]
    assert found == [("gemma3", layer, dtype) for dtype in parity.DTYPES for layer in (0, 1)]
    assert all(line["mismatch"] < 100 * FLIPS_ROTATED for line in lines)
    parity.main(["--qk", "gemma3"])
    shown = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert shown[1:] == [[family, str(layer), dtype] for family, layer, dtype in found]
