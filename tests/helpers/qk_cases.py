"""Queries, keys and values that QKNorm is tested on, and its results in float64, written apart."""

import functools
from typing import NamedTuple

import ml_dtypes
import numpy as np
from allpairspy import AllPairs
from cases import random
from oracle import norm as norm_oracle
from tolerances import ABSOLUTE, CANCELLING, EPS, FLIPS_FEW

from cupy_headnorm import HeadNorm, QKNorm, Rope
from cupy_headnorm._arrays.dtypes import DTYPES, FLOAT32
from cupy_headnorm.rope import numpy as rope_numpy

MAX_POSITION = 40
H, D = (3, 2, 2), 64  # heads of q, k and v, and head_dim, where they lie in one buffer
BY_NAME = {dtype.name: dtype for dtype in DTYPES}


class Case(NamedTuple):
    """q, k and v of two sequences. The default is Qwen3's, small."""

    x: str = "bfloat16"
    head_dim: int = 128
    by: str | None = "int64"
    """What rotates: positions of a dtype or of sections, cos and sin of a width and dtype, none."""
    style: str = "half"
    every_op: bool = True
    first: bool = False
    table: str = "x"
    partial: bool = False
    kind: str = "rms"
    rounding: str = "before_weight"
    weight: str | None = "shared x"
    bias: str | None = None
    offset: float = 0.0
    heads: tuple[int, int] = (5, 2)
    tokens: int = 7
    v: bool = False

    def __str__(self):
        changed = {n: v for n, v in self._asdict().items() if v != self._field_defaults[n]}
        return ",".join(f"{n}={v}" for n, v in changed.items()) or "default"

    @property
    def rotary_dim(self):
        known = {2: 2, 10: 4, 33: 32, 36: 32, 64: 16, 100: 50, 160: 40}
        partial = known.get(self.head_dim, self.head_dim // 4)
        return partial if self.partial or self.head_dim % 2 else self.head_dim

    @property
    def dtype(self):
        return BY_NAME[self.x]

    @property
    def by_positions(self):
        return self.by in ("int32", "int64") or "sections" in (self.by or "")

    @property
    def table_width(self):
        """Cosines of a token, where they are given."""
        return self.rotary_dim if "whole" in self.by else self.rotary_dim // 2

    @property
    def of_table(self):
        """The dtype of cosines and sines, in the tables or as given."""
        name = self.by.split()[-1] if "half" in self.by or "whole" in self.by else self.table
        name = "x" if name == "float32" and self.x == "float64" else name
        return self.dtype if name == "x" else FLOAT32

    def rope(self):
        if self.by is None:
            return None
        half = self.rotary_dim // 2
        sections = (half - half // 4 * 2, half // 4, half // 4)
        return Rope.of_theta(
            1e4,
            self.rotary_dim,
            max_position=MAX_POSITION,
            style=self.style,
            order="before norm" if self.first else "after norm",
            rounding="every_op" if self.every_op else "once",
            table=self.table,
            sections=sections if "sections" in self.by else (),
            interleaved_sections=self.by == "interleaved sections",
        )

    def parameter(self, rng, what, num_heads):
        if what is None:
            return None
        shape, name = what.split()
        size = (num_heads, self.head_dim) if shape == "own" else self.head_dim
        return (rng.standard_normal(size) + 1).astype((BY_NAME.get(name) or self.dtype).numpy)

    def norm(self, rng, num_heads):
        weight, bias = (self.parameter(rng, p, num_heads) for p in (self.weight, self.bias))
        if weight is not None:
            weight.flat[0] = -0.0
        options = {"kind": self.kind, "eps": 1e-5, "rounding": self.rounding}
        options["weight_offset"] = self.offset if self.weight else 0.0
        return (weight, bias, options)

    def made(self, rng, beyond=0):
        """Return parts, norms and rotations, in NumPy; positions `beyond` both ends of tables."""
        heads = (*self.heads, self.heads[1])[: 2 + self.v]
        parts = [random(rng, (2, self.tokens, n, self.head_dim), self.dtype) for n in heads]
        norms = [self.norm(rng, n) for n in self.heads]
        if self.v:
            norms.append((None, None, norms[0][2] | {"weight_offset": 0.0}))
        beside = {}
        if self.by_positions:
            shape = {
                "int32": (self.tokens,), "int64": (2, self.tokens),
                "chunks of sections": (3, 1, self.tokens),
                "interleaved sections": (3, 2, self.tokens),
            }[self.by]  # fmt: skip
            positions = rng.integers(-beyond, MAX_POSITION + beyond, shape)
            beside["positions"] = positions.astype(np.int32 if "32" in self.by else np.int64)
        elif self.by:
            width = self.table_width
            shape = {
                "whole x": (self.tokens, width), "half x": (2, self.tokens, width),
                "whole float32": (1, self.tokens, width), "half float32": (1, width),
            }[self.by]  # fmt: skip
            for name in ("cos", "sin"):
                beside[name] = rng.uniform(-1, 1, shape).astype(self.of_table.numpy)
        return parts, norms, beside


def held(case, parameters):
    """Return the HeadNorm of what `Case.norm` made."""
    weight, bias, options = parameters
    return HeadNorm(weight, bias, head_dim=case.head_dim, **options)


rope_of = functools.cache(Case.rope)


def qk_norm(case, norms):
    """Return the QKNorm of what `Case.norm` made for each part."""
    return QKNorm(*(held(case, norm) for norm in norms), rope=rope_of(case))


# The oracle. Each step returns its values, rounded as the step is, and a bound of their error.
def factors(case, rope, beside):
    """Return cosines and sines of each element that rotates, as (2 or 1, tokens or 1, 1, width)."""
    half = case.rotary_dim // 2
    if "positions" in beside:
        found = []
        positions = np.clip(beside["positions"], 0, MAX_POSITION - 1)
        for table in rope.tables(case.of_table.numpy):
            rows = positions if rope.sections else positions[np.newaxis]
            sizes = rope.sections or (half,)
            columns = []
            for i in range(half):
                row = i % len(sizes)
                if not rope.interleaved_sections:
                    row = next(r for r in range(len(sizes)) if i < sum(sizes[: r + 1]))
                elif i >= len(sizes) * sizes[row]:
                    row = 0
                columns.append(table[rows[row], i])
            found.append(np.stack(columns, -1))
    else:
        found = [beside["cos"], beside["sin"]]
    if found[0].shape[-1] == half:
        pair = [e // 2 if case.style == "interleaved" else e % half for e in range(2 * half)]
        found = [table[..., pair] for table in found]
    return [table[..., np.newaxis, :] for table in found]


def rotated(case, x, error, tables):
    wide, width = error.dtype, case.rotary_dim

    def rounded(values):
        return values.astype(x.dtype).astype(wide) if case.every_op else values

    elements = np.arange(width)
    other = elements ^ 1 if case.style == "interleaved" else (elements + width // 2) % width
    sign = np.where((elements < other) != (case.style == "half flipped"), -1, 1)
    cos, sin = (rounded(table.astype(wide)) for table in tables)
    values, e = x[..., :width].astype(wide), error[..., :width]
    a, b = rounded(values * cos), rounded(sign * values[..., other] * sin)
    y, bound = x.astype(wide), error.copy()
    y[..., :width] = a + b
    size = np.abs(a) + np.abs(b)
    bound[..., :width] = np.abs(cos) * e + np.abs(sin) * e[..., other] + CANCELLING[case.x] * size
    if case.every_op:
        bound[..., :width] += EPS[case.x] * size
    return y, bound


def normed(case, parameters, x, error):
    weight, bias, options = parameters
    kind, options = options["kind"], {n: v for n, v in options.items() if n != "kind"}
    exact, slack, product = norm_oracle(kind, x, weight, bias, **options)
    values, scale = x.astype(exact.dtype), 1
    if weight is not None:
        scale = np.abs(weight.astype(exact.dtype) + options["weight_offset"])
    if kind == "layer":
        values = values - values.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((values * values).mean(-1, keepdims=True) + options["eps"])
    n = np.abs(values * inverse)
    spread = error + error.mean(-1, keepdims=True) + n * (n * error).mean(-1, keepdims=True)
    bound = inverse * scale * spread + CANCELLING[case.x] * (np.abs(exact) + slack)
    return exact, bound + (EPS[case.x] * product if options["rounding"] != "once" else 0)


def expected(case, parts, norms, beside):
    """Yield each part's exact result, not rounded at the end, and the bound of an error."""
    rope = rope_of(case)
    tables = factors(case, rope, beside) if rope else None
    wide = np.longdouble if case.x == "float64" else np.float64
    eps = EPS[case.x]
    # Below the smallest normal number a step is as large as there.
    tiny = float(ml_dtypes.finfo(case.dtype.numpy).tiny)
    for i, (x, parameters) in enumerate(zip(parts, norms, strict=True)):
        steps = [lambda y, e, p=parameters: normed(case, p, y, e)]
        if rope and i < 2:
            steps.insert(0 if case.first else 1, lambda y, e: rotated(case, y, e, tables))
        y, error = x, np.zeros(x.shape, wide)
        for n, step in enumerate(steps):
            if n:  # what the step before is rounded to may fall to the other side
                y, error = y.astype(x.dtype), error + eps * np.maximum(np.abs(y), tiny)
            y, error = step(y, error)
            error = error + 2 * eps * tiny
        yield y, error + 0.6 * eps * np.abs(y) + 4 * ABSOLUTE[case.x]


def check(case, found, made):
    """Compare with the oracle: each value by its bound, and how many are not the very value."""
    parts = made[0]
    for x, actual, (y, bound) in zip(parts, found, expected(case, *made), strict=True):
        assert actual.dtype == x.dtype
        assert actual.shape == x.shape
        assert (np.abs(actual.astype(y.dtype) - y) <= bound).all()
        if case.dtype.itemsize == 2:
            flips = np.count_nonzero(actual != y.astype(x.dtype))
            assert flips <= max(2, FLIPS_FEW * x.size)


DEFAULT = Case()
CHOICES = {
    "x": tuple(BY_NAME),
    "head_dim": (2, 10, 33, 36, 64, 80, 96, 100, 128, 160, 256, 512, 1024, 2048),
    "by": (
        "int64", "int32", "chunks of sections", "interleaved sections", "whole x", "whole float32",
        "half x", "half float32", None,
    ),
    "style": rope_numpy.STYLES,
    "every_op": (True, False),
    "first": (False, True),
    "table": ("x", "float32"),
    "partial": (False, True),
    "kind": ("rms", "layer"),
    "rounding": ("once", "before_weight", "every_op"),
    "weight": ("shared x", "shared float32", "own x", "own float64", None),
    "bias": (None, "shared x", "own float32"),
    "offset": (0.0, 1.0),
    "heads": ((5, 2), (1, 1), (33, 3), (2, 7)),
    "tokens": (7, 0, 1, 300),
    "v": (False, True),
}  # fmt: skip


def served(row):
    case = Case(*row)
    few = case.tokens <= 7 or (case.head_dim <= 160 and case.heads[0] <= 5)
    return few and not (case.every_op and case.table == "float32" and len(row) > 6)


AROUND = [DEFAULT] + [
    DEFAULT._replace(**{name: value} | ({"every_op": False} if value == "float32" else {}))
    for name, values in CHOICES.items()
    for value in values
    if value != getattr(DEFAULT, name)
]
AROUND += [
    DEFAULT._replace(x=x, every_op=e, first=f) for x in BY_NAME for e in (0, 1) for f in (0, 1)
]
COVERING = [Case(*row) for row in AllPairs(list(CHOICES.values()), filter_func=served)]
