"""What is timed: shapes, layouts and the arrays of one case."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np

from cupy_headnorm._arrays import dtypes as dtype_table
from cupy_headnorm._rules import options
from cupy_headnorm.bench.clocks import Timer
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
        itemsize = dtype_table.from_name(self.dtype, "dtype").itemsize
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
    norm = HeadNorm(weight, kind=cast(options.Kind, case.kind))
    return Workload(case, on, inputs, results, plain, weight, norm)


def plain_pairs(
    case: Case, on: Timer, random: np.random.Generator, buffers: int | None = None
) -> list[tuple[Any, Any]]:
    """Return contiguous pairs of all that `case` reads, the first of each filled."""
    dtype = dtype_table.from_name(case.dtype, "dtype")
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
    return values.astype(dtype_table.from_name(case.dtype, "dtype").numpy)


def _laid_out(x: Any, case: Case, on: Timer) -> Any:
    """Return the values of `x` in the layout of `case`."""
    dtype = dtype_table.from_name(case.dtype, "dtype")
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
