"""
Frequencies of rotary embeddings: the types that transformers has, step by step in float32.

The numbers are those of transformers 5.23, ``modeling_rope_utils.py:134`` to ``:663``. Powers,
which no standard fixes, are taken in float64 and rounded: of torch's own, on a CPU, one in 50 is a
unit in the last place off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


def powers(theta: float, dim: int, *, count: int | None = None) -> np.ndarray:
    """Return ``theta ** (2 i / dim)`` in float32, for all i below dim / 2 or `count` of them."""
    if not theta > 0:
        raise ValueError(f"theta is {theta}; needs a number above 0")
    count = -(-dim // 2) if count is None else count
    exponents = np.arange(0, 2 * count, 2).astype(np.float32) / np.float32(dim)
    return (float(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)


def inverse_frequency(
    params: Mapping[str, Any],
    theta: float,
    head_dim: int,
    partial: float,
    max_position: int | None,
) -> tuple[np.ndarray, float]:
    """
    Return a layer's frequencies and what its cosines and sines are multiplied by.

    Parameters
    ----------
    params : Mapping
        ``rope_type``, one of `ROPE_TYPES`, and the fields that go with it.
    theta : float
    head_dim : int
    partial : float
        Share of head_dim that is rotated.
    max_position : int, optional
        The config's max_position_embeddings: YaRN's factor follows from it where none is given.

    Returns
    -------
    tuple of numpy.ndarray and float
        One float32 number a pair of dims: as many as half the rotated dims, rounded up, but half
        of head_dim for ``"proportional"``, the last of them zero.

    Raises
    ------
    ValueError
        The type needs a field that is missing, or no dim rotates.
    """
    rope_type = params["rope_type"]
    factor: Any = params.get("factor")
    if rope_type == "proportional":
        return _proportional(theta, head_dim, partial, 1.0 if factor is None else factor), 1.0
    # The dims of an odd part are rounded up to pairs; its exponents are not.
    dim = int(head_dim * partial)
    if dim < 1:
        raise ValueError(f"{partial} of head_dim {head_dim} is {dim} dims; needs 1 or more")
    powers_of_theta = powers(theta, dim)
    frequencies: np.ndarray = 1 / powers_of_theta
    if rope_type == "default":
        return frequencies, 1.0
    original: Any = params.get("original_max_position_embeddings")
    if factor is None and rope_type == "yarn" and original and max_position is not None:
        factor = max_position / original
    needed = {"factor": factor}
    if rope_type != "linear":
        needed["original_max_position_embeddings"] = original
    if rope_type == "llama3":
        needed |= {name: params.get(name) for name in ("low_freq_factor", "high_freq_factor")}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"RoPE of type {rope_type!r} has no {missing[0]}; needs one")
    if rope_type == "linear":
        return frequencies / np.float32(factor), 1.0
    if rope_type == "llama3":
        return _llama3(frequencies, factor, original, params), 1.0
    frequencies = _yarn(powers_of_theta, theta, dim, factor, original, params)
    return frequencies, _yarn_scaling(factor, params)


def _proportional(theta: float, head_dim: int, partial: float, factor: float) -> np.ndarray:
    """Return frequencies of all dims, the last of them zero: these dims turn by no angle."""
    angles = int(partial * head_dim // 2)
    frequencies = np.zeros(head_dim // 2, np.float32)
    frequencies[:angles] = 1 / powers(theta, head_dim, count=angles)
    return frequencies / np.float32(factor)


def _llama3(
    frequencies: np.ndarray, factor: float, original: int, params: Mapping[str, Any]
) -> np.ndarray:
    """Divide the low frequencies by `factor`, keep the high ones, and blend between."""
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    # torch divides a number by a tensor as the tensor's reciprocal times the number.
    wavelength = (1 / frequencies) * np.float32(2 * math.pi)
    scaled = np.where(wavelength > original / low, frequencies / np.float32(factor), frequencies)
    smooth = (1 / wavelength) * np.float32(original)
    smooth = (smooth - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * scaled / np.float32(factor) + smooth * scaled
    medium = ~(wavelength < original / high) & ~(wavelength > original / low)
    return np.where(medium, smoothed, scaled)


def _yarn(
    powers_of_theta: np.ndarray,
    theta: float,
    dim: int,
    factor: float,
    original: int,
    params: Mapping[str, Any],
) -> np.ndarray:
    """Divide by `factor` the frequencies that rotate too slowly within the original length."""
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (params.get("beta_fast") or 32, params.get("beta_slow") or 1)
    )
    if params["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    pairs = np.arange(len(powers_of_theta), dtype=np.float32)
    keep = 1 - np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = 1 / (np.float32(factor) * powers_of_theta)
    frequencies: np.ndarray = interpolated * (1 - keep) + 1 / powers_of_theta * keep
    return frequencies


def _yarn_scaling(factor: float, params: Mapping[str, Any]) -> float:
    def mscale(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scaling: float | None = params.get("attention_factor")
    if scaling is not None:
        return scaling
    over, under = params.get("mscale"), params.get("mscale_all_dim")
    return mscale(over) / mscale(under) if over and under else mscale(1)
