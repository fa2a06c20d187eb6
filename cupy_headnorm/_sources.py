"""Norms as files have them: only who reads one imports this."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cupy_headnorm._described import Read, Source
from cupy_headnorm.checkpoint import norms, survey, tensors
from cupy_headnorm.checkpoint.norms import ModelNorm


def from_safetensors(path: str | os.PathLike[str], key: str, arguments: Mapping[str, Any]) -> Read:
    """Read a norm's tensors from a file or a folder with shards."""
    weight, bias = tensors.read_norm(path, key)
    return Read(weight, bias, arguments, Source("from_safetensors", os.fspath(path), key))


def from_pretrained(
    model_dir: str | os.PathLike[str], key: str, variant: str | None, given: Mapping[str, Any]
) -> Read:
    """Read a norm of a model as the model computes it; what is `given` and not None wins."""
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
