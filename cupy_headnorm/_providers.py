"""Who can normalize here: our norm, its peers, and the copy they are all measured against."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import _dtypes, _spec, _timing, ops
from cupy_headnorm._timing import Call, Timer
from cupy_headnorm.headnorm import HeadNorm

LAYOUTS = ("contiguous", "in-place", "packed-qkv", "packed-qkv-in-place", "misaligned")
_BLOCK = 1024 * 1024 // 2
"""Random elements; larger arrays repeat them, so that making inputs costs no time."""


class Case(NamedTuple):
    """One thing to measure."""

    tokens: int
    num_heads: int
    head_dim: int
    dtype: str
    kind: str
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes read and written: x once, the result once."""
        itemsize = _dtypes.from_name(self.dtype, "dtype").itemsize
        return 2 * self.tokens * self.num_heads * self.head_dim * itemsize

    @property
    def in_place(self) -> bool:
        """Whether the result replaces x."""
        return self.layout.endswith("in-place")

    def __str__(self) -> str:
        size = f"{self.tokens} x {self.num_heads} x {self.head_dim}"
        return f"{size} {self.dtype} {self.kind} {self.layout}"


class Workload(NamedTuple):
    """The memory of a case: the same buffers for every provider."""

    case: Case
    on: Timer
    inputs: list[Any]
    results: list[Any]
    """`inputs` themselves where the case is in place."""
    plain: list[tuple[Any, Any]]
    """Contiguous pairs of the size of x, for the ceiling."""
    weight: Any
    norm: HeadNorm


def prepare(case: Case, on: Timer, buffers: int | None = None) -> Workload:
    """Make the arrays of `case`, as many sets as outgrow the L2 unless told."""
    dtype = _dtypes.from_name(case.dtype, "dtype")
    shape = (case.tokens, case.num_heads, case.head_dim)
    random = np.random.default_rng(0)

    def values(size: int) -> np.ndarray:
        return random.standard_normal(size, np.float32)

    block = on.array(values(min(math.prod(shape), _BLOCK)).astype(dtype.numpy))
    plain = []
    for _ in range(buffers or on.rotation(case.nbytes)):
        x, y = on.empty(shape, dtype), on.empty(shape, dtype)
        flat = x.reshape(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part[:] = block[: len(part)]
        plain.append((x, y))
    inputs = [_laid_out(x, case, on) for x, _ in plain]
    results = inputs if case.in_place else [y for _, y in plain]
    # Near 1, so that rows normalized in place again and again stay in range.
    size = case.head_dim
    host_weight = (random.uniform(0.9, 1.1, size) * random.choice((-1, 1), size)).astype(
        dtype.numpy
    )
    weight = on.array(host_weight)
    return Workload(case, on, inputs, results, plain, weight, HeadNorm(weight, kind=case.kind))


def _laid_out(x: Any, case: Case, on: Timer) -> Any:
    """Return the values of `x` in the layout of `case`."""
    dtype = _dtypes.from_name(case.dtype, "dtype")
    if case.layout.startswith("packed-qkv"):
        # 4 query heads to a key and a value head, as in Qwen3-8B: the slice of the queries.
        packed = case.num_heads + 2 * max(1, case.num_heads // 4)
        view = on.empty((case.tokens, packed, case.head_dim), dtype)[:, : case.num_heads]
    elif case.layout == "misaligned":
        # Rows a multiple of 16 bytes apart, each one element behind such a boundary.
        pitch = -(-(case.head_dim + 1) * dtype.itemsize // 16) * 16 // dtype.itemsize
        view = on.empty((case.tokens, case.num_heads, pitch), dtype)[..., 1 : case.head_dim + 1]
    else:
        return x
    view[:] = x
    return view


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
        config, work.inputs[i], work.weight, kind=work.case.kind, out=work.results[i]
    )


def whole_array(x: np.ndarray, weight: np.ndarray, kind: str) -> np.ndarray:
    """Normalize as a NumPy user would write it, in float32."""
    wide = x.astype(np.float32, copy=False)
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    eps = np.float32(_spec.DEFAULT_EPS[kind])
    y = wide * (1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps))
    return (y * weight.astype(np.float32, copy=False)).astype(x.dtype, copy=False)


def _naive(work: Workload) -> Call:
    return lambda i: whole_array(work.inputs[i], work.weight, work.case.kind)


def _tensors(work: Workload) -> tuple[list[Any], Any]:
    """Return inputs and weight as torch tensors over the same memory."""
    if work.on.name == "numpy":
        return [_timing.as_torch(x) for x in work.inputs], _timing.as_torch(work.weight)
    return work.inputs, work.weight


def _functional(work: Workload) -> Call:
    from torch.nn import functional

    inputs, weight = _tensors(work)
    shape, eps = (work.case.head_dim,), _spec.DEFAULT_EPS[work.case.kind]
    if work.case.kind == "layer":
        return lambda i: functional.layer_norm(inputs[i], shape, weight, None, eps)
    return lambda i: functional.rms_norm(inputs[i], shape, weight, eps)


def _module(work: Workload, make: Callable[..., Any], shape: Any) -> Any:
    """Build a module in the case's dtype, on its device, with its weight."""
    import torch

    _, weight = _tensors(work)
    # Outside inference mode, as a model is loaded: torch.compile guards on it.
    with torch.inference_mode(False):
        module = make(shape, eps=_spec.DEFAULT_EPS[work.case.kind])
        module = module.to(weight.device, weight.dtype).requires_grad_(False).eval()
        module.weight.copy_(weight)
    return module


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
    module = torch.compile(_eager_module(work), dynamic=False)
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
    build: Callable[[Workload], Call]
    timers: tuple[str, ...]
    """Names of the timers it belongs to; it is not missed under others."""
    modules: tuple[str, ...] = ()
    in_place: bool = False
    """Whether it can replace x: the others return memory of their own."""


_GPU, _ANY = ("cupy", "torch"), ("numpy", "cupy", "torch")
CEILINGS = ("copy", "multiply")
OURS = ("ours", "ours-row")
PROVIDERS = {
    "copy": Provider("device copy", _copy, _ANY, in_place=True),
    "multiply": Provider("in-place multiply", _multiply, _ANY, in_place=True),
    "ours": Provider("ours", _ours, _ANY, in_place=True),
    "ours-row": Provider("ours, one block per row", _ours_one_row, _GPU, in_place=True),
    "naive": Provider("naive NumPy", _naive, ("numpy",)),
    "functional": Provider("torch.nn.functional", _functional, _ANY, ("torch",)),
    "eager": Provider("transformers, eager", _eager, _GPU, ("torch", "transformers")),
    "compile": Provider("transformers, torch.compile", _compiled, _GPU, ("torch", "transformers")),
    "liger": Provider("Liger", _liger, _GPU, ("torch", "liger_kernel.transformers.rms_norm")),
}
"""In the order of tables."""


def one_line(error: Exception) -> str:
    """Say what an error says, in the room of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def find(on: Timer, wanted: list[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """
    Return the providers that can be measured, and the reasons of those that cannot.

    Without `wanted` those that another machine would be needed for are not mentioned.

    Raises
    ------
    ValueError
        A wanted provider is unknown.
    """
    for name in wanted or ():
        if name not in PROVIDERS:
            raise ValueError(f"provider {name!r} is not known; needs one of {', '.join(PROVIDERS)}")
    found, unavailable = [], {}
    for name, provider in PROVIDERS.items():
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
        return _timing.torch_on_gpu() or "takes torch tensors; CuPy arrays are timed"
    return ""


def disagreement(call: Call, work: Workload) -> str:
    """Return how far a provider's result is from ours; empty where it is near enough."""
    eps = _dtypes.from_name(work.case.dtype, "dtype").eps
    expected = work.norm(work.inputs[0])
    result = call(0)
    for part in (slice(None, 64), slice(-1, None)):
        ours, theirs = work.on.host(expected[part]), work.on.host(result[part])
        error = np.abs(theirs - ours).max() / np.abs(ours).max()
        # Two roundings, and what float32 sums in another order are apart.
        if not error <= 2 * eps + 1e-6:
            return f"disagrees with ours by {error:.2g} of the largest value at {work.case}"
    return ""
