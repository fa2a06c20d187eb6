"""Who can normalize here: our norm, its peers, and the copy they are all measured against."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

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
    num_kv_heads: int = 0
    """Heads of k, where q and k are normalized together."""

    @property
    def nbytes(self) -> int:
        """Bytes read and written: x, or q and k, once, the result once."""
        itemsize = _dtypes.from_name(self.dtype, "dtype").itemsize
        return 2 * self.tokens * (self.num_heads + self.num_kv_heads) * self.head_dim * itemsize

    @property
    def in_place(self) -> bool:
        """Whether the result replaces x."""
        return self.layout.endswith("in-place")

    @property
    def heads(self) -> str:
        """Numbers of heads: ``32``, or ``32+8`` of q and k."""
        return f"{self.num_heads}+{self.num_kv_heads}" if self.num_kv_heads else f"{self.num_heads}"

    @property
    def size(self) -> str:
        """Tokens, heads and head_dim."""
        return f"{self.tokens} x {self.heads} x {self.head_dim}"

    def __str__(self) -> str:
        return f"{self.size} {self.dtype} {self.kind} {self.layout}"


def cases(
    tokens: Iterable[int],
    heads: Iterable[int],
    head_dims: Iterable[int],
    dtypes: Iterable[str],
    kinds: Iterable[str],
    layouts: Iterable[str],
    megabytes: float | None = None,
    kv_heads: Iterable[int] = (0,),
) -> Iterator[Case]:
    """Yield every combination; `megabytes` sets the tokens so that what is read has that many."""
    for fields in itertools.product(heads, head_dims, dtypes, kinds, layouts, kv_heads):
        case = Case(1, *fields)
        counts = tokens if megabytes is None else [max(1, int(megabytes * 2e6 / case.nbytes))]
        for number in counts:
            yield case._replace(tokens=number)


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

    @property
    def tolerance(self) -> int:
        """In eps of x's dtype: two roundings may differ."""
        return 2

    def expected(self, _: str) -> tuple[Any, ...]:
        """Return new results of ours to hold a provider's against; the same for all here."""
        return (self.norm(self.inputs[0]),)


def prepare(case: Case, on: Timer, buffers: int | None = None) -> Workload:
    """Make the arrays of `case`, as many sets as outgrow the L2 unless told."""
    random = np.random.default_rng(0)
    plain = plain_pairs(case, on, random, buffers)
    inputs = [_laid_out(x, case, on) for x, _ in plain]
    results = inputs if case.in_place else [y for _, y in plain]
    weight = on.array(random_weight(case, random))
    norm = HeadNorm(weight, kind=cast(_spec.Kind, case.kind))
    return Workload(case, on, inputs, results, plain, weight, norm)


def plain_pairs(
    case: Case, on: Timer, random: np.random.Generator, buffers: int | None = None
) -> list[tuple[Any, Any]]:
    """Return contiguous pairs of all that `case` reads, the first of each filled."""
    dtype = _dtypes.from_name(case.dtype, "dtype")
    shape = (case.tokens, case.num_heads + case.num_kv_heads, case.head_dim)
    size = min(math.prod(shape), _BLOCK)
    block = on.array(random.standard_normal(size, np.float32).astype(dtype.numpy))
    plain = []
    for _ in range(buffers or on.rotation(case.nbytes)):
        x, y = on.empty(shape, dtype), on.empty(shape, dtype)
        flat = x.reshape(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part[:] = block[: len(part)]
        plain.append((x, y))
    return plain


def random_weight(case: Case, random: np.random.Generator) -> np.ndarray:
    """Return weights near 1: rows normalized in place again and again stay in range."""
    size = case.head_dim
    values: np.ndarray = random.uniform(0.9, 1.1, size) * random.choice((-1, 1), size)
    return values.astype(_dtypes.from_name(case.dtype, "dtype").numpy)


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
        config, work.inputs[i], work.weight, kind=work.norm.kind, out=work.results[i]
    )


def whole_array(x: np.ndarray, weight: np.ndarray, kind: str) -> np.ndarray:
    """Normalize as a NumPy user would write it, in float32."""
    wide = x.astype(np.float32, copy=False)
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    eps = np.float32(_spec.DEFAULT_EPS[kind])
    y: np.ndarray = wide * (1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps))
    y = y * weight.astype(np.float32, copy=False)
    return y.astype(x.dtype, copy=False)


def _naive(work: Workload) -> Call:
    return lambda i: whole_array(work.inputs[i], work.weight, work.case.kind)


def tensor(array: Any, on: Timer) -> Any:
    """Return an array of a timer as a torch tensor over the same memory."""
    return _timing.as_torch(array) if on.name == "numpy" else array


def _tensors(work: Workload) -> tuple[list[Any], Any]:
    return [tensor(x, work.on) for x in work.inputs], tensor(work.weight, work.on)


def _functional(work: Workload) -> Call:
    from torch.nn import functional

    inputs, weight = _tensors(work)
    shape, eps = (work.case.head_dim,), _spec.DEFAULT_EPS[work.case.kind]
    if work.case.kind == "layer":
        return lambda i: functional.layer_norm(inputs[i], shape, weight, None, eps)
    return lambda i: functional.rms_norm(inputs[i], shape, weight, eps)


def _module(work: Workload, make: Callable[..., Any], shape: Any) -> Any:
    return torch_module(
        make, shape, _spec.DEFAULT_EPS[work.case.kind], tensor(work.weight, work.on)
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
        return _timing.torch_on_gpu() or "takes torch tensors; CuPy arrays are timed"
    return ""


def disagreement(name: str, call: Call, work: Any) -> str:
    """Return how far a provider's result is from ours; empty where it is near enough."""
    eps = _dtypes.from_name(work.case.dtype, "dtype").eps
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
