"""What files say of a norm: its weight and bias, its arguments, and where they were read from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cupy_headnorm.checkpoint.norms import ModelNorm


class Source(NamedTuple):
    """The constructor that read a norm from a file, and what it was given."""

    constructor: str
    path: str
    key: str
    overrides: Mapping[str, Any] | None = None
    variant: str | None = None

    def told(self, words: list[str]) -> str:
        """Write the call; `words` are the arguments where `overrides` are not kept."""
        if self.overrides is not None:
            given = {} if self.variant is None else {"variant": self.variant}
            words = [f"{name}={value!r}" for name, value in (given | dict(self.overrides)).items()]
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


def from_safetensors(path: str | os.PathLike[str], key: str, arguments: Mapping[str, Any]) -> Read:
    """Read a norm's tensors from a file or a folder with shards."""
    from cupy_headnorm.checkpoint import tensors

    weight, bias = tensors.read_norm(path, key)
    return Read(weight, bias, arguments, Source("from_safetensors", os.fspath(path), key))


def from_pretrained(
    model_dir: str | os.PathLike[str], key: str, variant: str | None, given: Mapping[str, Any]
) -> Read:
    """Read a norm of a model as the model computes it; what is `given` and not None wins."""
    from cupy_headnorm.checkpoint import (  # the registry: only checkpoints need it
        norms,
        survey,
        tensors,
    )

    overrides = {name: value for name, value in given.items() if value is not None}
    source = Source("from_pretrained", os.fspath(model_dir), key, overrides, variant)
    full_width = given["num_heads"] == 1
    try:
        found = survey.read(model_dir, key, variant=variant, full_width=full_width)
    except norms.UnknownModelError:
        if not {"kind", "eps", "rounding"} <= overrides.keys():
            raise
        weight, bias = tensors.read_norm(model_dir, key, variant=variant)
        return Read(weight, bias, overrides, source)
    return of_model(*found, source, overrides)


def of_model(
    described: ModelNorm,
    weight: Any,
    bias: Any,
    source: Source | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Read:
    """Say how to build the norm that a model's is `described` to be."""
    shared = described.shape in ((), (described.head_dim,))
    arguments = {
        "kind": described.kind,
        "eps": described.eps,
        "num_heads": None if shared else described.num_heads,
        "head_dim": described.head_dim,
        "weight_offset": described.weight_offset if weight is not None else 0.0,
        "rounding": described.rounding,
    }
    overrides = overrides or {}
    result = "x" if "rounding" in overrides else described.result
    return Read(weight, bias, arguments | dict(overrides), source, result)
