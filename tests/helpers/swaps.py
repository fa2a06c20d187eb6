"""How far a model's logits may move where its norms are computed by somebody else."""

import contextlib

import torch
from tolerances import EPS, FLIPS_FEW, RELATIVE


def norms(model):
    """The modules that normalize heads, found without our help."""
    names = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "qk_norm")
    return [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@contextlib.contextmanager
def disturbed(model, share, step, seed):
    """Move a share of what every norm returns by one step up or down."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module, arguments, result):
        chosen = torch.rand(result.shape, generator=generator) < share
        signs = torch.randint(0, 2, result.shape, generator=generator) * 2 - 1
        factor = 1 + (chosen * signs * step).to(result.device)
        return (result.float() * factor).to(result.dtype)

    hooks = [module.register_forward_hook(disturb) for module in norms(model)]
    yield
    for hook in hooks:
        hook.remove()


def rounding_of(model, ids, draws=8):
    """
    Return how far a model's own logits move where its norms are rounded otherwise.

    In float32 every value of a norm may be off by the bound of two evaluations of one formula; in
    bfloat16 the same value comes out but for a few flips, of which one in a hundred values is many
    times what is seen. No finer bound holds: every layer passes on what it got.
    """
    share, step = {
        torch.float32: (1.0, 2 * RELATIVE["float32"]),
        torch.bfloat16: (FLIPS_FEW, EPS["bfloat16"]),
    }[model.dtype]
    expected = logits(model, ids)
    moved = 0.0
    for seed in range(draws):
        with disturbed(model, share, step, seed):
            moved = max(moved, (logits(model, ids) - expected).abs().max().item())
    assert 0 < moved < 0.1 * expected.abs().max().item()  # or it would allow anything
    return moved
