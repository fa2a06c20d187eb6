"""What is tested: a default, the axes that vary around it one at a time, and covering lists."""

from typing import NamedTuple

import numpy as np
from allpairspy import AllPairs

import cupy_headnorm
from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm._rules.norm import NormSpec
from cupy_headnorm._rules.options import ROUNDINGS


class Case(NamedTuple):
    """A norm on random rows. The default is Qwen3's, small."""

    kind: str = "rms"
    x: DType = dtypes.BFLOAT16
    weight: DType | None = dtypes.BFLOAT16
    bias: DType | None = None
    rounding: str = "once"
    per_head: bool = False
    head_dim: int = 128
    num_heads: int = 3
    tokens: int = 11
    weight_offset: float = 0.0
    eps: float = 1e-6
    scale: float = 1.0
    mean: float = 0.0

    def __str__(self):
        changed = {n: v for n, v in self._asdict().items() if v != self._field_defaults[n]}
        return ",".join(f"{n}={v}" for n, v in changed.items()) or "default"

    def arrays(self, rng):
        """Return x, weight and bias as NumPy arrays."""
        shape = (self.tokens, self.num_heads, self.head_dim)
        x = (rng.standard_normal(shape) * self.scale + self.mean).astype(self.x.numpy)
        size = shape[1:] if self.per_head else shape[2:]
        weight = bias = None
        if self.weight:
            weight = (rng.standard_normal(size) + 1).astype(self.weight.numpy)
        if self.bias:
            bias = rng.standard_normal(size).astype(self.bias.numpy)
        return x, weight, bias

    @property
    def options(self):
        offset = self.weight_offset if self.weight else 0.0
        return {"eps": self.eps, "weight_offset": offset, "rounding": self.rounding}


DEFAULT = Case()

# 1 to 40: fewer elements than a warp; 64 to 512: models, with 72, 80, 100, 112, 160 from vision and
# StableLM; 37, 73, 111, 257, 1001: odd, so element by element; 513: the first row of a whole block;
# 4099 > 4096; 5125 from vLLM's tests; 20000 and up: longer than registers hold.
HEAD_DIMS = (1, 2, 3, 5, 8, 16, 31, 32, 33, 37, 40, 64, 65, 72, 73, 80, 96, 100, 111, 112, 127, 128)
HEAD_DIMS += (129, 160, 192, 255, 256, 257, 320, 511, 512, 513, 576, 640, 768, 1000, 1001, 1024)
HEAD_DIMS += (1025, 2048, 4096, 4099, 5125, 8192, 16384, 20000, 65536, 100003)

AROUND = [DEFAULT]
AROUND += [DEFAULT._replace(x=x) for x in dtypes.DTYPES]
AROUND += [DEFAULT._replace(weight=w) for w in (None, *dtypes.DTYPES)]
AROUND += [DEFAULT._replace(bias=b) for b in dtypes.DTYPES]
AROUND += [DEFAULT._replace(per_head=True, bias=dtypes.FLOAT32)]
AROUND += [DEFAULT._replace(weight=None, bias=dtypes.FLOAT32)]
AROUND += [DEFAULT._replace(weight_offset=1.0)]
AROUND += [DEFAULT._replace(x=x, bias=x, rounding=r) for x in dtypes.DTYPES for r in ROUNDINGS[:3]]
# No row, one, around a block of 8 rows, many.
AROUND += [DEFAULT._replace(tokens=n) for n in (0, 1, 2, 7, 8, 9, 1000)]
AROUND += [DEFAULT._replace(num_heads=n) for n in (1, 2, 31, 32, 33)]
AROUND += [DEFAULT._replace(eps=e) for e in (0.0, 1e-12, 1e-5, 1.0)]
# The promised range of values: 1e-15 to 1e18.
AROUND += [
    DEFAULT._replace(x=x, scale=s, eps=0.0)
    for x in (dtypes.BFLOAT16, dtypes.FLOAT32)
    for s in (1e-13, 1e17)
]
AROUND += [Case(x=dtypes.FLOAT32, head_dim=4096, scale=1e17)]
# Padding lanes must not enter the variance (quack's N = 769 with x near 1000).
AROUND += [Case(x=dtypes.FLOAT32, head_dim=769, mean=1000.0)]
AROUND += [
    c._replace(kind="layer", eps=1e-5 if c.eps == 1e-6 else c.eps)
    for c in AROUND
    if c.rounding != "rstd"
]
AROUND += [DEFAULT._replace(x=x, weight=None, rounding="rstd") for x in dtypes.DTYPES]
AROUND = list(dict.fromkeys(AROUND))


def covering_specs():
    """Return specialisations in which every pair of choices occurs: at most 81."""
    dims = (1, 37, 64, 80, 96, 100, 128, 160, 256, 512, 1001, 4096, 16384, 100003)
    names = [None, *(dtype.name for dtype in dtypes.DTYPES)]
    roundings = [name for name in ROUNDINGS if name != "rstd"]
    choices = [("rms", "layer"), names[1:], names, names, dims, roundings, [False, True]]
    by_name = {dtype.name: dtype for dtype in dtypes.DTYPES} | {None: None}
    return [
        NormSpec(
            kind,
            by_name[x],
            by_name[weight],
            by_name[bias],
            head_dim,
            rounding,
            offset and weight is not None,
        )
        for kind, x, weight, bias, head_dim, rounding, offset in AllPairs(choices)
    ] + [NormSpec("rms", dtype, None, None, 128, "rstd", False) for dtype in dtypes.DTYPES[:2]]


class Layout(NamedTuple):
    """A way for x to lie in memory, strides in elements."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    heads_axis: int = -2

    def __str__(self):
        return self.name

    @property
    def elements(self):
        """Length of the buffer that holds it."""
        high = sum((n - 1) * max(s, 0) for n, s in zip(self.shape, self.strides, strict=True))
        return self.offset + high + 1 if 0 not in self.shape else 1

    def of(self, library):
        """Return the layout, walked forwards where the library knows no negative strides."""
        if library.negative_strides or min(self.strides) >= 0:
            return self
        return self._replace(strides=tuple(abs(s) for s in self.strides), offset=0)

    @property
    def overlaps(self):
        return "expanded" in self.name or "overlapping" in self.name


H, D = 3, 64  # heads and head_dim of every layout
LAYOUTS = [
    Layout("contiguous", (5, H, D), (H * D, D, 1)),
    Layout("one-row", (1, H, D), (H * D, D, 1)),
    Layout("queries-of-packed-qkv", (5, H, D), (9 * D, D, 1)),
    Layout("keys-of-packed-qkv", (5, H, D), (9 * D, D, 1), offset=H * D),
    Layout("every-second-head", (5, H, D), (6 * D, 2 * D, 1)),
    Layout("heads-before-tokens", (2, H, 5, D), (5 * H * D, D, H * D, 1), heads_axis=-3),
    Layout("heads-first", (H, 5, D), (5 * D, D, 1), heads_axis=0),
    Layout("heads-slowest", (5, H, D), (D, 5 * D, 1)),
    Layout("reversed-tokens", (5, H, D), (-H * D, D, 1), offset=4 * H * D),
    Layout("reversed-heads", (5, H, D), (H * D, -D, 1), offset=(H - 1) * D),
    Layout("expanded-batch", (4, 5, H, D), (0, H * D, D, 1)),
    Layout("expanded-heads", (5, H, D), (D, 0, 1)),
    Layout("overlapping-windows", (5, H, D), (D // 2, D // 4, 1)),
    Layout("misaligned", (5, H, D), (H * D, D, 1), offset=1),
    Layout("odd-stride", (5, H, D), (H * (D + 3), D + 3, 1)),
    Layout("aligned-to-4-elements", (5, H, D), (H * (D + 4), D + 4, 1), offset=4),
    Layout("five-axes", (2, 3, 2, H, D), (3000, 1000, 480, 70, 1)),
    Layout("nine-axes-that-merge", (1, 2, 1, 2, 1, 2, 1, H, D), (9, 768, 9, 384, 9, 192, 9, D, 1)),
    Layout("flat", (5, H * D), (H * D, 1)),
    Layout("flat-slice", (5, H * D), (700, 1), offset=8),
    Layout("flat-one-token", (H * D,), (1,)),
    Layout("no-token", (0, H, D), (H * D, D, 1)),
    Layout("no-batch", (0, 5, H, D), (5 * H * D, H * D, D, 1)),
]


def function(kind):
    return {"rms": cupy_headnorm.rms_norm, "layer": cupy_headnorm.layer_norm}[kind]


def random(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype.numpy)


def expected_layout(layout, x, weight):
    """Return x as (..., head_dim) and the weight broadcast against it."""
    if layout.name.startswith("flat"):
        x = x.reshape(*layout.shape[:-1], H, D)
        return x, weight
    shape = [1] * len(layout.shape)
    shape[layout.heads_axis], shape[-1] = H, D
    return x, np.asarray(weight).reshape(shape)
