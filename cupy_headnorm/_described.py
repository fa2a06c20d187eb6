"""What a norm tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm._calls.parameters import HeldNorm
from cupy_headnorm._rules import options
from cupy_headnorm._rules.heads import Geometry
from cupy_headnorm._rules.options import Kind, NormOptions, Rounding


class Source(NamedTuple):
    """The constructor that read a norm from a file, and what it was given."""

    constructor: str
    path: str
    key: str
    overrides: Mapping[str, Any] | None = None
    variant: str | None = None

    def told(self, words: list[str], arithmetic: dict[str, Any]) -> str:
        """
        Write a call that reads such a norm again.

        Where the file's config.json decides, the `arithmetic` that it came to is said too;
        elsewhere `words` are the arguments.
        """
        if self.overrides is not None:
            given = {} if self.variant is None else {"variant": self.variant}
            given |= {n: v for n, v in self.overrides.items() if n not in arithmetic} | arithmetic
            words = [f"{name}={value!r}" for name, value in given.items()]
        return (
            f"HeadNorm.{self.constructor}({', '.join([repr(self.path), repr(self.key), *words])})"
        )


class Read(NamedTuple):
    """All that `headnorm.built` needs to build a norm."""

    weight: Any
    bias: Any
    arguments: Mapping[str, Any]
    """HeadNorm's own."""
    source: Source | None
    result: str = "x"
    """As `NormOptions.result`."""


class Described:
    """A norm's weight, bias and arguments, to be read."""

    _norm: HeldNorm
    _weight: np.ndarray | None
    _bias: np.ndarray | None
    _geometry: Geometry
    _source: Source | None
    """Where it was read from."""

    @property
    def _options(self) -> NormOptions:
        return self._norm.options

    @property
    def weight(self) -> np.ndarray | None:
        """The weight as it was given or stored, without the offset; read-only."""
        return self._weight

    @property
    def bias(self) -> np.ndarray | None:
        """The bias as it was given or stored; read-only."""
        return self._bias

    @property
    def kind(self) -> Kind:
        """``"rms"`` or ``"layer"``."""
        return self._options.kind

    @property
    def eps(self) -> float:
        """Added to the mean square or variance."""
        return self._options.eps

    @property
    def num_heads(self) -> int | None:
        """Heads, where the arguments tell; None for a norm of any number."""
        return self._geometry.num_heads

    @property
    def head_dim(self) -> int | None:
        """Elements a head, where the arguments tell; None if x decides."""
        return self._geometry.head_dim

    @property
    def weight_offset(self) -> float:
        """Added to the weight in float32."""
        return self._options.weight_offset

    @property
    def rounding(self) -> Rounding:
        """Where results are rounded."""
        return self._options.rounding

    @property
    def size(self) -> int:
        """Number of elements of weight and bias."""
        return sum(array.size for array in (self._weight, self._bias) if array is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias: what each loaded device holds."""
        return sum(array.nbytes for array in (self._weight, self._bias) if array is not None)

    def __repr__(self) -> str:
        defaults = options.options(self.kind)
        shown: dict[str, Any] = {} if self.kind == "rms" else {"kind": self.kind}
        shown["eps"] = self.eps
        for name in ("num_heads", "head_dim", "weight_offset", "rounding"):
            value = getattr(self._options, name)
            if value != getattr(defaults, name):
                shown[name] = value
        words = [f"{name}={value!r}" for name, value in shown.items()]
        if self._source is not None:
            arithmetic = ("kind", "eps", "weight_offset", "rounding")
            return self._source.told(words, {n: getattr(self._options, n) for n in arithmetic})
        for name, array in (("bias", self._bias), ("weight", self._weight)):
            if array is not None:
                told = f"<{array.dtype} {array.shape}>"
                words.insert(0, told if name == "weight" else f"bias={told}")
        return f"HeadNorm({', '.join(words)})"

    def _arguments(self) -> dict[str, Any]:
        o = self._options
        return {
            "kind": o.kind,
            "eps": o.eps,
            "num_heads": o.num_heads,
            "head_dim": o.head_dim,
            "weight_offset": o.weight_offset,
            "rounding": o.rounding,
        }
