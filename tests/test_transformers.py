"""The real modules of transformers and torch: their arithmetic, to the rounding step."""

import numpy as np
import pytest
from oracle import norm as oracle
from tolerances import FLIPS_FEW, FLIPS_NEED, TELLING, assert_alike, assert_same_rounding, mismatch

from cupy_headnorm import HeadNorm

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, DIM = 8, 128
TOKENS = FLIPS_NEED // (HEADS * DIM)


def bits(tensor):
    return tensor.detach().cpu().view(torch.int16).numpy()


def cohere():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    return CohereLayerNorm((HEADS, DIM), eps=1e-5)


def stablelm():
    from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead

    return StableLmLayerNormPerHead(DIM, HEADS, eps=1e-5)


def of(family, name, *arguments, **options):
    from importlib import import_module

    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)(*arguments, **options)


# name: (module, our arguments, arguments that must not fit)
FAMILIES = {
    "qwen3": (
        lambda: of("qwen3", "Qwen3RMSNorm", DIM, eps=1e-6),
        {"rounding": "before_weight"},
        {"rounding": "once"},
    ),
    "olmo2": (
        lambda: of("olmo2", "Olmo2RMSNorm", DIM, eps=1e-6),
        {"rounding": "once"},
        {"rounding": "before_weight"},
    ),
    "gemma3": (
        lambda: of("gemma3", "Gemma3RMSNorm", DIM, eps=1e-6),
        {"weight_offset": 1.0},
        {"weight_offset": 1.0, "rounding": "before_weight"},
    ),
    "cohere": (cohere, {"kind": "layer"}, {"kind": "layer", "rounding": "before_weight"}),
    "stablelm": (stablelm, {"kind": "layer"}, {"kind": "layer", "rounding": "before_weight"}),
    "persimmon": (
        lambda: torch.nn.LayerNorm(DIM, eps=1e-5),
        {"kind": "layer"},
        {"kind": "layer", "rounding": "before_weight"},
    ),
    "llama4": (lambda: of("llama4", "Llama4TextL2Norm", eps=1e-5), {"eps": 1e-5}, {"eps": 1e-2}),
}


def randomized(module, dtype, device):
    generator = torch.Generator().manual_seed(0)
    module = module.to(dtype).to(device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            values = values * 0.5 + (0.0 if "bias" in name else 1.0)
            parameter.copy_(values.to(dtype))
    return module


def parameters(module):
    named = dict(module.named_parameters())
    if any(name.startswith("norms.") for name in named):
        return torch.stack([named[f"norms.{h}.weight"] for h in range(HEADS)]), None
    return named.get("weight"), named.get("bias")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_module_and_headnorm_round_alike(family, dtype, device, rng):
    make, right, wrong = FAMILIES[family]
    module = randomized(make(), getattr(torch, dtype), device)
    x = torch.from_numpy(rng.standard_normal((1, TOKENS, HEADS, DIM)) * 2)
    x = x.to(getattr(torch, dtype)).to(device)
    with torch.no_grad():
        # StableLM's module wants heads before tokens, as its attention has them.
        expected = module(x.transpose(1, 2)).transpose(1, 2) if family == "stablelm" else module(x)
        assert expected.dtype == x.dtype
        weight, bias = parameters(module)
        assert_same_rounding(bits(HeadNorm(weight, bias, **right)(x)), bits(expected))
        assert mismatch(bits(HeadNorm(weight, bias, **wrong)(x)), bits(expected)) > TELLING


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_module_in_float32(family, device, rng):
    make, right, _ = FAMILIES[family]
    module = randomized(make(), torch.float32, device)
    x = torch.from_numpy(rng.standard_normal((1, 64, HEADS, DIM)).astype(np.float32)).to(device)
    with torch.no_grad():
        expected = module(x.transpose(1, 2)).transpose(1, 2) if family == "stablelm" else module(x)
        weight, bias = parameters(module)
        norm = HeadNorm(weight, bias, **right)
        y = norm(x)
    _, slack, _ = oracle(
        norm.kind, x.cpu().numpy(), norm.weight, norm.bias,
        eps=norm.eps, weight_offset=norm.weight_offset,
    )  # fmt: skip
    assert_alike(y.cpu().numpy(), expected.cpu().numpy(), slack)


@pytest.mark.parametrize("device", DEVICES)
def test_qwen3_attention_queries_as_the_model_lays_them_out(device, rng):
    """The view of a projection, (batch, tokens, heads, head_dim), normed and transposed."""
    module = randomized(of("qwen3", "Qwen3RMSNorm", DIM), torch.bfloat16, device)
    norm = HeadNorm(module.weight, rounding="before_weight")
    hidden = torch.randn(2, 16, 3 * HEADS * DIM, device=device).to(torch.bfloat16)
    queries = hidden[..., : HEADS * DIM].unflatten(-1, (HEADS, DIM))
    with torch.no_grad():
        expected = module(queries)
        assert mismatch(bits(norm(queries)), bits(expected)) < FLIPS_FEW
        assert torch.equal(
            norm(queries.transpose(1, 2), heads_axis=-3), norm(queries).transpose(1, 2)
        )
