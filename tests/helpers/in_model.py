"""
QKNorm beside a model's own path, on what the attention of a random Qwen3-0.6B really sees.

    python tests/helpers/in_model.py [--device cpu|cuda] [--layers N]

Queries, keys, cosines, sines and positions of layer 0 are caught in a forward pass: prefill of
4,096 tokens and decoding of 1 token in batches of 1 and 32. Times are of replayed graphs (device)
and of calls until they return (host); on a CPU there is the host's alone.
"""

import argparse
import statistics
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from cupy_headnorm import HeadNorm, QKNorm, Rope
from cupy_headnorm.bench import clocks

CASES = {"prefill 1 x 4,096": (1, 4096), "decode 1 x 1": (1, 1), "decode 32 x 1": (32, 1)}


def model_of(layers, device):
    """Return Qwen3-0.6B in all but its trained weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    # As from_pretrained leaves it: angles are float32's.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.normal_(norm.weight, 1, 0.3)
    return model


def caught(model, batch, tokens):
    """Return q, k, cos, sin and positions as layer 0 has them, decoding after 100 tokens."""
    attention, found = model.model.layers[0].self_attn, {}
    hooks = [
        getattr(attention, f"{n}_norm").register_forward_pre_hook(
            lambda module, given, n=n: found.__setitem__(n, given[0])
        )
        for n in "qk"
    ]
    hooks.append(
        attention.register_forward_pre_hook(
            lambda module, given, named: found.update(
                cos=named["position_embeddings"][0],
                sin=named["position_embeddings"][1],
                positions=named["position_ids"],
            ),
            with_kwargs=True,
        )
    )
    device = next(model.parameters()).device
    text = torch.randint(model.config.vocab_size, (batch, tokens + 100 * (tokens == 1)))
    with torch.no_grad():
        given = {"input_ids": text.to(device)}
        if tokens == 1:
            past = model(given["input_ids"][:, :-1], use_cache=True).past_key_values
            given = {"input_ids": given["input_ids"][:, -1:], "past_key_values": past}
        model(**given)
    for hook in hooks:
        hook.remove()
    return found


def device_time(call):
    """Return microseconds a call in a replayed graph."""
    with clocks.TorchGpu() as on:
        return on.microseconds(lambda _: call(), buffers=1)


def host_time(call, device):
    """Return microseconds until a call returns."""
    times = []
    for _ in range(9):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            call()
        times.append((time.perf_counter() - began) * 1e6 / 20)
    return statistics.median(times)


def main():
    """Print a row for each case and path."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, default=28)
    chosen = parser.parse_args()
    model = model_of(chosen.layers, chosen.device)
    attention = model.model.layers[0].self_attn
    own = {"eps": model.config.rms_norm_eps, "rounding": "before_weight"}
    q_norm, k_norm = (HeadNorm(getattr(attention, f"{n}_norm").weight, **own) for n in "qk")
    qk = QKNorm(q_norm, k_norm, rope=Rope.of_theta(1e6, 128, max_position=8192))
    for name, (batch, tokens) in CASES.items():
        found = caught(model, batch, tokens)
        q, k, cos, sin, positions = (found[n] for n in ("q", "k", "cos", "sin", "positions"))
        positions = positions.expand(batch, -1)

        def theirs(q=q, k=k, cos=cos, sin=sin):
            normed = (attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2))
            return apply_rotary_pos_emb(*normed, cos, sin)

        def given(q=q, k=k, cos=cos, sin=sin):
            return qk(q, k, cos=cos, sin=sin)

        def looked_up(q=q, k=k, positions=positions):
            return qk(q, k, positions=positions)

        with torch.no_grad():
            expected = [x.transpose(1, 2) for x in theirs()]
            for path, call in (("modules", theirs), ("cos, sin", given), ("positions", looked_up)):
                results = expected if path == "modules" else call()
                differ = sum(
                    (a != b).sum().item() for a, b in zip(results, expected, strict=True)
                ) / sum(x.numel() for x in expected)
                times = [f"host {host_time(call, chosen.device):9.1f} us"]
                if chosen.device == "cuda":
                    times.append(f"device {device_time(call):8.2f} us")
                print(f"{name:18} {path:10} {', '.join(times)}, {differ:8.4%} differ", flush=True)


if __name__ == "__main__":
    main()
