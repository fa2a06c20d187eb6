"""Who can normalize and turn q and k here: `QKNorm`, its parts, and a model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._rules import options
from cupy_headnorm.bench import providers, workloads
from cupy_headnorm.bench.clocks import Call, Timer
from cupy_headnorm.bench.providers import ANY, CEILINGS, GPU, Provider
from cupy_headnorm.bench.workloads import Case
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.qknorm import QKNorm
from cupy_headnorm.rope import Rope

KIND = "qk-rope"
CASE = Case(1, 32, 128, "bfloat16", KIND, "packed-qkv-in-place", num_kv_heads=8)
"""One token of Qwen3-8B's attention."""

_THETA, _MAX_POSITION = 1e6, 40960  # Qwen3-8B's
_FIRST = 1000
"""Position of the first token: at 0 nothing would turn."""
_EPS = options.DEFAULT_EPS["rms"]

Parts = tuple[Any, Any]
"""Of q and of k."""


class Workload(NamedTuple):
    """The memory of a case: the same buffers for every provider."""

    case: Case
    on: Timer
    inputs: list[Parts]
    """Slices of one packed buffer with v behind them."""
    plain: list[tuple[Any, Any]]
    """Contiguous pairs of the size of q and k together, for the ceiling."""
    weights: Parts
    norms: tuple[HeadNorm, HeadNorm]
    qk: QKNorm
    positions: Any
    cos: Any
    """Of each token, ``(tokens, head_dim)``: one for all buffers, as for a model's layers."""
    sin: Any

    @property
    def tolerance(self) -> int:
        """
        In eps of x's dtype.

        A compiler keeps all but the last rounding in float32, two of the norm and one of the
        product for each of the two values that go into a result.
        """
        return 3

    def expected(self, name: str) -> Parts:
        """Return new results of ours to hold a provider's against."""
        if name in _UNTURNED:
            (q_norm, k_norm), (q, k) = self.norms, self.inputs[0]
            return q_norm(q), k_norm(k)
        results: Parts = self.qk(*self.inputs[0], cos=self.cos, sin=self.sin)
        return results


def prepare(case: Case, on: Timer, buffers: int | None = None) -> Workload:
    """Make the arrays of `case`, as many sets as outgrow the L2 unless told."""
    random = np.random.default_rng(0)
    dtype = dtypes.from_name(case.dtype, "dtype")
    plain = workloads.plain_pairs(case, on, random, buffers)
    turned, heads = case.num_heads + case.num_kv_heads, case.num_heads + 2 * case.num_kv_heads
    inputs = []
    for x, _ in plain:
        packed = on.empty((case.tokens, heads, case.head_dim), dtype)
        packed[:, :turned] = x
        inputs.append((packed[:, : case.num_heads], packed[:, case.num_heads : turned]))
    weights = [on.array(workloads.random_weight(case, random)) for _ in "qk"]
    q_norm, k_norm = (HeadNorm(weight, eps=_EPS, rounding="before_weight") for weight in weights)
    last = _FIRST + case.tokens
    rope = Rope.of_theta(_THETA, case.head_dim, max_position=max(last, _MAX_POSITION))
    positions = np.arange(_FIRST, last)
    halves = rope.at(positions, dtype.numpy)
    cos, sin = (on.array(np.concatenate((half, half), -1)) for half in halves)
    return Workload(
        case, on, inputs, plain, (weights[0], weights[1]), (q_norm, k_norm),
        QKNorm(q_norm, k_norm, rope=rope), on.array(positions), cos, sin,
    )  # fmt: skip


def _ours(work: Workload) -> Call:
    qk, inputs, cos, sin = work.qk, work.inputs, work.cos, work.sin
    return lambda i: qk(*inputs[i], cos=cos, sin=sin, out=inputs[i])


def _ours_positions(work: Workload) -> Call:
    qk, inputs, positions = work.qk, work.inputs, work.positions
    return lambda i: qk(*inputs[i], positions=positions, out=inputs[i])


def _ours_plain(work: Workload) -> Call:
    qk, inputs = QKNorm(*work.norms), work.inputs
    return lambda i: qk(*inputs[i], out=inputs[i])


def _ours_two(work: Workload) -> Call:
    (q_norm, k_norm), inputs = work.norms, work.inputs

    def call(i: int) -> Parts:
        q, k = inputs[i]
        return q_norm(q, out=q), k_norm(k, out=k)

    return call


def _in_model(work: Workload, function: Callable[..., Any]) -> Call:
    """Call `function` as a model does: a batch of one, heads before tokens when they turn."""
    inputs = [
        tuple(providers.tensor(part, work.on).unsqueeze(0) for part in parts)
        for parts in work.inputs
    ]
    cos, sin = (providers.tensor(table, work.on).unsqueeze(0) for table in (work.cos, work.sin))

    def call(i: int) -> Parts:
        q, k = function(*inputs[i], cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return call


def _attention(work: Workload) -> Callable[..., Any]:
    """Return what Qwen3's attention does to q and k between its projections and its softmax."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    q_norm, k_norm = (
        providers.torch_module(
            Qwen3RMSNorm, work.case.head_dim, _EPS, providers.tensor(weight, work.on)
        )
        for weight in work.weights
    )

    def turned(q: Any, k: Any, cos: Any, sin: Any) -> Parts:
        parts = q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2)
        results: Parts = apply_rotary_pos_emb(*parts, cos, sin)
        return results

    return turned


def _eager(work: Workload) -> Call:
    return _in_model(work, _attention(work))


def _compiled(work: Workload) -> Call:
    import torch

    # Past eight shapes of one function dynamo would silently run it eagerly.
    torch.compiler.reset()
    return _in_model(work, torch.compile(_attention(work), dynamic=False))


_TRANSFORMERS = ("torch", "transformers")
_UNTURNED = ("ours-plain", "ours-two")
OURS = ("ours", "ours-positions", *_UNTURNED)
PROVIDERS = {
    **{name: providers.PROVIDERS[name] for name in CEILINGS},
    "ours": Provider("ours", _ours, ANY, in_place=True),
    "ours-positions": Provider("ours, by positions", _ours_positions, ANY, in_place=True),
    "ours-plain": Provider("ours, not turned", _ours_plain, ANY, in_place=True),
    "ours-two": Provider("ours, two norms, not turned", _ours_two, ANY, in_place=True),
    # These return memory of their own, as in the model.
    "eager": Provider("transformers, eager", _eager, ANY, _TRANSFORMERS, in_place=True),
    "compile": Provider(
        "transformers, torch.compile", _compiled, GPU, _TRANSFORMERS, in_place=True
    ),
}
"""In the order of tables; names that `providers` has too are labelled as there."""
