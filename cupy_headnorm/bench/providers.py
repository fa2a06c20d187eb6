"""Who can normalize here: our norms, their peers, and the copy they are all measured against."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import ops
from cupy_headnorm._rules import options
from cupy_headnorm.bench import clocks
from cupy_headnorm.bench.clocks import Call, Timer, as_torch
from cupy_headnorm.bench.workloads import NORM, QK_ROPE, Arrays, Workload
from cupy_headnorm.qknorm import QKNorm


def _copy(work: Workload) -> Call:
    return lambda i: work.on.copy(to=work.plain[i][1], source=work.plain[i][0])


def _multiply(work: Workload) -> Call:
    return lambda i: work.on.multiply(work.plain[i][0])


def _ours(work: Workload) -> Call:
    (norm,), xs, results = work.norms, work.xs, [result for (result,) in work.results]
    if work.on.name == "numpy" and not work.case.in_place:
        return lambda i: norm(xs[i])  # as the others there, who take no `out`
    return lambda i: norm(xs[i], out=results[i])


def _ours_one_row(work: Workload) -> Call:
    (norm,), (weight,), xs = work.norms, work.weights, work.xs
    config = dataclasses.replace(norm.plan(xs[0]), rows_per_block=1)
    return lambda i: ops.launch(config, xs[i], weight, kind=norm.kind, out=work.results[i][0])


def _ours_both(work: Workload, *given: str) -> Call:
    """Take q and k in one call; they rotate by what is `given`, or not at all."""
    qk = work.qk if given else QKNorm(*work.norms)
    inputs, results, beside = work.inputs, work.results, {n: getattr(work, n) for n in given}
    return lambda i: qk(*inputs[i], **beside, out=results[i])


def _ours_two(work: Workload) -> Call:
    (q_norm, k_norm), xs, ys = work.norms, work.inputs, work.results
    return lambda i: (q_norm(xs[i][0], out=ys[i][0]), k_norm(xs[i][1], out=ys[i][1]))


def whole_array(x: np.ndarray, weight: np.ndarray, kind: str) -> np.ndarray:
    """Normalize as a NumPy user would write it, in float32."""
    wide = x.astype(np.float32, copy=False)
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    eps = np.float32(options.DEFAULT_EPS[kind])
    y: np.ndarray = wide * (1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps))
    y = y * weight.astype(np.float32, copy=False)
    return y.astype(x.dtype, copy=False)


def _naive(work: Workload) -> Call:
    xs, (weight,) = work.xs, work.weights
    return lambda i: whole_array(xs[i], weight, work.case.kind)


def _functional(work: Workload) -> Call:
    from torch.nn import functional

    function = functional.layer_norm if work.case.kind == "layer" else functional.rms_norm
    given = {"weight": as_torch(work.weights[0]), "eps": work.norms[0].eps}
    return _as_model(work, partial(function, normalized_shape=(work.case.head_dim,), **given))


def _modules(work: Workload, make: Callable[..., Any], shape: Any) -> list[Any]:
    """Build a module for each weight: of its dtype, on its device, with its values."""
    import torch

    modules = []
    # Outside inference mode, as a model is loaded: torch.compile guards on it.
    with torch.inference_mode(False):
        for norm, weight in zip(work.norms, work.weights, strict=True):
            values = as_torch(weight)
            module = make(shape, eps=norm.eps).to(values.device, values.dtype)
            module.requires_grad_(False).eval().weight.copy_(values)
            modules.append(module)
    return modules


def _in_model(work: Workload) -> Any:
    """Return what a model does to x, or to q and k between their projections and the softmax."""
    if work.case.kind == "layer":
        from transformers.models.cohere.modeling_cohere import CohereLayerNorm

        # Cohere keeps a weight for every head; here all are the same.
        return _modules(work, CohereLayerNorm, (work.case.num_heads, work.case.head_dim))[0]
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    norms = _modules(work, Qwen3RMSNorm, work.case.head_dim)
    if work.qk is None:
        return norms[0]
    q_norm, k_norm = norms

    def rotated(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return apply_rotary_pos_emb(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)

    return rotated


def _as_model(work: Workload, function: Callable[..., Any]) -> Call:
    """Call `function` as a model does; q and k are a batch of one, heads first when they rotate."""
    if work.qk is None:
        tensors = [as_torch(x) for x in work.xs]
        return lambda i: function(tensors[i])

    def batch_of_one(arrays: Arrays) -> Arrays:
        return tuple(as_torch(array).unsqueeze(0) for array in arrays)

    inputs = [batch_of_one(arrays) for arrays in work.inputs]
    tables = batch_of_one((work.cos, work.sin))
    return lambda i: tuple(y[0].transpose(0, 1) for y in function(*inputs[i], *tables))


def _eager(work: Workload) -> Call:
    return _as_model(work, _in_model(work))


def _compiled(work: Workload) -> Call:
    import torch

    # Past eight shapes of one function dynamo would silently run it eagerly.
    torch.compiler.reset()
    return _as_model(work, torch.compile(_in_model(work), dynamic=False))


def _liger(work: Workload) -> Call:
    from liger_kernel.transformers.layer_norm import LigerLayerNorm
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    make = LigerLayerNorm if work.case.kind == "layer" else LigerRMSNorm
    return _as_model(work, *_modules(work, make, work.case.head_dim))


class Provider(NamedTuple):
    """Something to measure."""

    label: str
    build: Callable[[Workload], Call]
    timers: tuple[str, ...]
    """Names of the timers it belongs to; it is not missed under others."""
    modules: tuple[str, ...] = ()
    unrotated: bool = False
    """Whether it leaves out the RoPE of q and k."""


GPU, ANY = ("cupy", "torch"), ("numpy", "cupy", "torch")
CEILINGS = ("copy", "multiply")
_TRANSFORMERS = ("torch", "transformers")
PROVIDERS = {
    "copy": Provider("device copy", _copy, ANY),
    "multiply": Provider("in-place multiply", _multiply, ANY),
    "ours": Provider("ours", _ours, ANY),
    "ours-row": Provider("ours, one block per row", _ours_one_row, GPU),
    "naive": Provider("naive NumPy", _naive, ("numpy",)),
    "functional": Provider("torch.nn.functional", _functional, ANY, ("torch",)),
    "eager": Provider("transformers, eager", _eager, GPU, _TRANSFORMERS),
    "compile": Provider("transformers, torch.compile", _compiled, GPU, _TRANSFORMERS),
    "liger": Provider("Liger", _liger, GPU, ("torch", "liger_kernel.transformers.rms_norm")),
}
"""They normalize x; tables have their order."""
QK_PROVIDERS = {
    **{name: PROVIDERS[name] for name in CEILINGS},
    "ours": PROVIDERS["ours"]._replace(build=lambda work: _ours_both(work, "cos", "sin")),
    "ours-positions": Provider(
        "ours, by positions", lambda work: _ours_both(work, "positions"), ANY
    ),
    "ours-plain": Provider("ours, not rotated", _ours_both, ANY, unrotated=True),
    "ours-two": Provider("ours, two norms, not rotated", _ours_two, ANY, unrotated=True),
    # These return memory of their own, as in the model.
    "eager": PROVIDERS["eager"]._replace(timers=ANY),
    "compile": PROVIDERS["compile"],
}
"""They normalize q and k; names that `PROVIDERS` has too are labelled as there."""
OPS = {NORM: PROVIDERS, QK_ROPE: QK_PROVIDERS}


def is_peer(name: str) -> bool:
    """Tell whether a provider is a norm, but none of this library."""
    return name not in CEILINGS and name.partition("-")[0] != "ours"


def one_line(error: Exception) -> str:
    """Say what an error says, in the room of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def find(
    on: Timer, wanted: list[str] | None = None, providers: dict[str, Provider] = PROVIDERS
) -> tuple[list[str], dict[str, str]]:
    """
    Return the providers that can be measured, and the reasons of those that cannot.

    Without `wanted` those that another machine would be needed for are not mentioned.
    """
    found, unavailable = [], {}
    for name, provider in providers.items():
        if not wanted or name in wanted:
            reason = _missing(provider, on)
            if not reason:
                found.append(name)
            elif wanted or on.name in provider.timers:
                unavailable[name] = reason
    return found, unavailable


def _missing(provider: Provider, on: Timer) -> str:
    if on.name not in provider.timers:
        return f"runs on a {'GPU' if on.name == 'numpy' else 'CPU'} only"
    for module in provider.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = module.partition(".")[0].replace("_", "-")
            return f"{error}; needs: pip install {package}"
        except Exception as error:
            return one_line(error)
    if on.name == "cupy" and provider.modules:
        return clocks.torch_on_gpu() or "takes torch tensors; CuPy arrays are timed"
    return ""


def disagreement(name: str, call: Call, work: Workload) -> str:
    """Return how far a provider's result is from ours; empty where it is near enough."""
    if name in CEILINGS:
        return ""  # nothing is normalized
    expected, result = work.expected(OPS[work.case.op][name].unrotated), call(0)
    results = result if isinstance(result, tuple) else (result,)
    # Two roundings of a norm may differ. With RoPE a compiler keeps all but the last in float32,
    # two of the norm and one of the product for each of the two values that go into a result.
    # And float32 sums in another order are apart.
    tolerance = (2 if work.qk is None else 3) * work.case.element.eps + 1e-6
    for own, other in zip(expected, results, strict=True):
        for part in (slice(None, 64), slice(-1, None)):
            ours, theirs = work.on.host(own[part]), work.on.host(other[part])
            error = np.abs(theirs - ours).max() / np.abs(ours).max()
            if not error <= tolerance:
                return f"disagrees with ours by {error:.2g} of the largest value at {work.case}"
    return ""
