"""What is timed: shapes, layouts and the arrays of one case."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm.bench.clocks import Timer
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.qknorm import QKNorm
from cupy_headnorm.rope import Rope

Arrays = tuple[Any, ...]
"""One set of buffers: x alone, or q and k."""
NORM, QK_ROPE = "norm", "qk-rope"
"""What is timed: one norm of x, or the norms and RoPE of q and k."""
LAYOUTS = ("contiguous", "in-place", "packed-qkv", "packed-qkv-in-place", "misaligned")
_BLOCK = 1024 * 1024 // 2
"""Random elements; larger arrays repeat them, so that making inputs costs no time."""
_THETA, _MAX_POSITION = 1e6, 40960  # Qwen3-8B's
_FIRST = 1000
"""Position of the first token: at 0 nothing would rotate."""


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
    def op(self) -> str:
        """Return `QK_ROPE` if that is its kind, else `NORM`."""
        return QK_ROPE if self.kind == QK_ROPE else NORM

    @property
    def element(self) -> DType:
        """Return the row of `dtype` in the table of dtypes."""
        return dtypes.from_name(self.dtype, "dtype")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of x, or of q and k together."""
        return self.tokens, self.num_heads + self.num_kv_heads, self.head_dim

    @property
    def nbytes(self) -> int:
        """Count bytes read and written: x, or q and k, once, the result once."""
        return 2 * math.prod(self.shape) * self.element.itemsize

    @property
    def in_place(self) -> bool:
        """Tell whether the result replaces x."""
        return self.layout.endswith("in-place")

    @property
    def heads(self) -> str:
        """Show the numbers of heads: ``32``, or ``32+8`` of q and k."""
        return f"{self.num_heads}+{self.num_kv_heads}" if self.num_kv_heads else f"{self.num_heads}"

    @property
    def size(self) -> str:
        """Show tokens, heads and head_dim."""
        return f"{self.tokens} x {self.heads} x {self.head_dim}"

    def __str__(self) -> str:
        return f"{self.size} {self.dtype} {self.kind} {self.layout}"


HOST_CASE = Case(1, 32, 128, "bfloat16", "rms", "contiguous")
"""One token of Qwen3-8B's queries: the device is done with it before the host."""
QK_CASE = Case(1, 32, 128, "bfloat16", QK_ROPE, "packed-qkv-in-place", num_kv_heads=8)
"""One token of Qwen3-8B's attention."""


def cases(base: Case, megabytes: float | None = None, **fields: Iterable[Any]) -> Iterator[Case]:
    """
    Yield `base`, of one token, with every combination of `fields`, the last changing fastest.

    `megabytes` sets the tokens so that what is read has that many.
    """
    for values in itertools.product(*fields.values()):
        case = base._replace(**dict(zip(fields, values, strict=True)))
        if megabytes is not None:
            case = case._replace(tokens=max(1, int(megabytes * 2e6 / case.nbytes)))
        yield case


class Workload(NamedTuple):
    """The memory of a case: the same buffers for every provider."""

    case: Case
    on: Timer
    inputs: list[Arrays]
    """Where there are q and k, they are slices of one packed buffer with v behind them."""
    results: list[Arrays]
    """`inputs` themselves where the case is in place."""
    plain: list[tuple[Any, Any]]
    """Contiguous pairs of the size of all inputs together, for the ceiling."""
    weights: Arrays
    norms: tuple[HeadNorm, ...]
    qk: Any = None
    """The `QKNorm` of q and k."""
    positions: Any = None
    cos: Any = None
    """``(tokens, head_dim)``, the same for all buffers, as for all layers of a model."""
    sin: Any = None

    @property
    def xs(self) -> list[Any]:
        """Return the first array of each set; for one norm that is x."""
        return [arrays[0] for arrays in self.inputs]

    def expected(self, unrotated: bool = False) -> Arrays:
        """Return new results of ours to hold a provider's against."""
        if self.qk is None or unrotated:
            return tuple(norm(x) for norm, x in zip(self.norms, self.inputs[0], strict=True))
        results: Arrays = self.qk(*self.inputs[0], cos=self.cos, sin=self.sin)
        return results


def prepare(case: Case, on: Timer, buffers: int | None = None) -> Workload:
    """Make the arrays of `case`, as many sets as outgrow the L2 unless told."""
    random, dtype = np.random.default_rng(0), case.element.numpy
    block = random.standard_normal(min(math.prod(case.shape), _BLOCK), np.float32)
    values = on.array(np.resize(block.astype(dtype), case.shape))
    plain = []
    for _ in range(buffers or on.rotation(case.nbytes)):
        plain.append((on.empty(case.shape, case.element), on.empty(case.shape, case.element)))
        plain[-1][0][:] = values
    inputs = [_parts(_laid_out(x, case, on), case) for x, _ in plain]
    results = inputs if case.in_place else [_parts(y, case) for _, y in plain]
    # Weights near 1: rows normalized in place again and again stay in range.
    size = case.head_dim
    near = [random.uniform(0.9, 1.1, size) * random.choice((-1, 1), size) for _ in inputs[0]]
    weights = tuple(on.array(values.astype(dtype)) for values in near)
    options: dict[str, Any] = {"kind": case.kind}
    if case.op == QK_ROPE:
        options = {"rounding": "before_weight"}
    norms = tuple(HeadNorm(weight, **options) for weight in weights)
    work = Workload(case, on, inputs, results, plain, weights, norms)
    if case.op == NORM:
        return work
    last = _FIRST + case.tokens
    rope = Rope.of_theta(_THETA, case.head_dim, max_position=max(last, _MAX_POSITION))
    positions = np.arange(_FIRST, last)
    cos, sin = (on.array(np.concatenate((half, half), -1)) for half in rope.at(positions, dtype))
    qk = QKNorm(*norms, rope=rope)
    return work._replace(qk=qk, positions=on.array(positions), cos=cos, sin=sin)


def _laid_out(x: Any, case: Case, on: Timer) -> Any:
    """Return the values of `x` in the layout of `case`."""
    tokens, heads, head_dim = case.shape
    if case.layout.startswith("packed-qkv"):
        # Without a number of its own, 4 query heads to a key and a value head, as in Qwen3-8B.
        kv_heads = case.num_kv_heads or max(1, heads // 4)
        packed = (tokens, case.num_heads + 2 * kv_heads, head_dim)
        view = on.empty(packed, case.element)[:, :heads]
    elif case.layout == "misaligned":
        # Rows a multiple of 16 bytes apart, each one element behind such a boundary.
        chunk = 16 // case.element.itemsize
        pitch = -(-(head_dim + 1) // chunk) * chunk
        view = on.empty((tokens, heads, pitch), case.element)[..., 1 : head_dim + 1]
    else:
        return x
    view[:] = x
    return view


def _parts(x: Any, case: Case) -> Arrays:
    """Return x alone, or its heads of q and those of k."""
    return (x[:, : case.num_heads], x[:, case.num_heads :]) if case.num_kv_heads else (x,)
