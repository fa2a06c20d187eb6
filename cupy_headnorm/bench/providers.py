"""Who can normalize here: our norm, its peers, and the copy they are all measured against."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import ops
from cupy_headnorm._arrays import dtypes
from cupy_headnorm._rules import options
from cupy_headnorm.bench import clocks
from cupy_headnorm.bench.clocks import Call, Timer
from cupy_headnorm.bench.workloads import Workload


def _copy(work: Workload) -> Call:
    return lambda i: work.on.copy(to=work.plain[i][1], source=work.plain[i][0])


def _multiply(work: Workload) -> Call:
    return lambda i: work.on.multiply(work.plain[i][0])


def _ours(work: Workload) -> Call:
    norm, inputs, results = work.norm, work.inputs, work.results
    if work.on.name == "numpy" and not work.case.in_place:
        return lambda i: norm(inputs[i])  # as the others there, who take no `out`
    return lambda i: norm(inputs[i], out=results[i])


def _ours_one_row(work: Workload) -> Call:
    config = dataclasses.replace(work.norm.plan(work.inputs[0]), rows_per_block=1)
    return lambda i: ops.launch(
        config, work.inputs[i], work.weight, kind=work.norm.kind, out=work.results[i]
    )


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
    return lambda i: whole_array(work.inputs[i], work.weight, work.case.kind)


def tensor(array: Any, on: Timer) -> Any:
    """Return an array of a timer as a torch tensor over the same memory."""
    return clocks.as_torch(array) if on.name == "numpy" else array


def _tensors(work: Workload) -> tuple[list[Any], Any]:
    return [tensor(x, work.on) for x in work.inputs], tensor(work.weight, work.on)


def _functional(work: Workload) -> Call:
    from torch.nn import functional

    inputs, weight = _tensors(work)
    shape, eps = (work.case.head_dim,), options.DEFAULT_EPS[work.case.kind]
    if work.case.kind == "layer":
        return lambda i: functional.layer_norm(inputs[i], shape, weight, None, eps)
    return lambda i: functional.rms_norm(inputs[i], shape, weight, eps)


def _module(work: Workload, make: Callable[..., Any], shape: Any) -> Any:
    return torch_module(
        make, shape, options.DEFAULT_EPS[work.case.kind], tensor(work.weight, work.on)
    )


def torch_module(make: Callable[..., Any], shape: Any, eps: float, weight: Any) -> Any:
    """Build a module of a weight's dtype, on its device, with its values."""
    import torch

    # Outside inference mode, as a model is loaded: torch.compile guards on it.
    with torch.inference_mode(False):
        made = make(shape, eps=eps)
        made = made.to(weight.device, weight.dtype).requires_grad_(False).eval()
        made.weight.copy_(weight)
    return made


def _eager_module(work: Workload) -> Any:
    if work.case.kind == "layer":
        from transformers.models.cohere.modeling_cohere import CohereLayerNorm

        # Cohere keeps a weight for every head; here all are the same.
        return _module(work, CohereLayerNorm, (work.case.num_heads, work.case.head_dim))
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    return _module(work, Qwen3RMSNorm, work.case.head_dim)


def _eager(work: Workload) -> Call:
    module, (inputs, _) = _eager_module(work), _tensors(work)
    return lambda i: module(inputs[i])


def _compiled(work: Workload) -> Call:
    import torch

    # Past eight shapes of one module dynamo would silently run it eagerly.
    torch.compiler.reset()
    module: Callable[..., Any] = torch.compile(_eager_module(work), dynamic=False)
    inputs, _ = _tensors(work)
    return lambda i: module(inputs[i])


def _liger(work: Workload) -> Call:
    from liger_kernel.transformers.layer_norm import LigerLayerNorm
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    make = LigerLayerNorm if work.case.kind == "layer" else LigerRMSNorm
    module, (inputs, _) = _module(work, make, work.case.head_dim), _tensors(work)
    return lambda i: module(inputs[i])


class Provider(NamedTuple):
    """Something to measure."""

    label: str
    build: Callable[[Any], Call]
    """From a `Workload` of its operation."""
    timers: tuple[str, ...]
    """Names of the timers it belongs to; it is not missed under others."""
    modules: tuple[str, ...] = ()
    in_place: bool = False
    """Whether it has a part where x is replaced: it does so, or is held against those that do."""


GPU, ANY = ("cupy", "torch"), ("numpy", "cupy", "torch")
CEILINGS = ("copy", "multiply")
OURS = ("ours", "ours-row")
PROVIDERS = {
    "copy": Provider("device copy", _copy, ANY, in_place=True),
    "multiply": Provider("in-place multiply", _multiply, ANY, in_place=True),
    "ours": Provider("ours", _ours, ANY, in_place=True),
    "ours-row": Provider("ours, one block per row", _ours_one_row, GPU, in_place=True),
    "naive": Provider("naive NumPy", _naive, ("numpy",)),
    "functional": Provider("torch.nn.functional", _functional, ANY, ("torch",)),
    "eager": Provider("transformers, eager", _eager, GPU, ("torch", "transformers")),
    "compile": Provider("transformers, torch.compile", _compiled, GPU, ("torch", "transformers")),
    "liger": Provider("Liger", _liger, GPU, ("torch", "liger_kernel.transformers.rms_norm")),
}
"""In the order of tables."""


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
        if wanted and name not in wanted:
            continue
        if on.name not in provider.timers:
            if wanted:
                unavailable[name] = f"runs on a {'GPU' if on.name == 'numpy' else 'CPU'} only"
            continue
        reason = _missing(provider, on)
        if reason:
            unavailable[name] = reason
        else:
            found.append(name)
    return found, unavailable


def _missing(provider: Provider, on: Timer) -> str:
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


def disagreement(name: str, call: Call, work: Any) -> str:
    """Return how far a provider's result is from ours; empty where it is near enough."""
    eps = dtypes.from_name(work.case.dtype, "dtype").eps
    expected, result = work.expected(name), call(0)
    results = result if isinstance(result, tuple) else (result,)
    for own, other in zip(expected, results, strict=True):
        for part in (slice(None, 64), slice(-1, None)):
            ours, theirs = work.on.host(own[part]), work.on.host(other[part])
            error = np.abs(theirs - ours).max() / np.abs(ours).max()
            # And what float32 sums in another order are apart.
            if not error <= work.tolerance * eps + 1e-6:
                return f"disagrees with ours by {error:.2g} of the largest value at {work.case}"
    return ""
