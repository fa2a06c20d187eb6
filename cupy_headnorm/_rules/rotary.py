"""
What a call's rotary embedding means: its cosines and sines, given or by position, and the errors.

Pairs of each head's first dims rotate by the cosines and sines of the head's token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.dtypes import DType
from cupy_headnorm._arrays.layout import Layout


class Rotation(NamedTuple):
    """A rotary embedding beside a call: what it is, and the arrays that it is read from."""

    style: str
    first: bool
    """The norm comes after it."""
    rotary_dim: int
    every_op: bool
    sections: tuple[int, ...]
    interleaved_sections: bool
    rotated: tuple[bool, ...]
    """By part."""
    cos: Layout
    sin: Layout
    positions: Layout | None
    """None where cos and sin are the tokens' own."""


class RopeSpec(NamedTuple):
    """What a kernel knows of a rotary embedding when it is compiled."""

    style: str
    first: bool
    """The norm comes after it."""
    rotary_dim: int
    every_op: bool
    table: DType
    whole_rows: bool
    """Cosines and sines have an entry for each element, not for each pair."""
    position: DType | None
    """None where cosines and sines are the tokens' own."""
    sections: tuple[int, ...]
    interleaved_sections: bool

    @property
    def name(self) -> str:
        """Part of a kernel's name: ``rope_half_d128_bf16``."""
        words = ["rope", self.style.replace(" ", "_"), f"d{self.rotary_dim}", self.table.short]
        words += ["before"] * self.first + ["rounded_once"] * (not self.every_op)
        words += [f"positions_{self.position.short}"] if self.position else []
        words += ["sections"] * bool(self.sections)
        return "_".join(words)


class Steps(NamedTuple):
    """Where the kernel finds a token's cosines and sines; all in bytes."""

    table: tuple[int, ...]
    """Along the tokens' axes, where cosines and sines are the tokens' own."""
    position: tuple[int, ...]
    """Along the tokens' axes, where cosines and sines are looked up by position."""
    table_row: int = 0
    """From one position's cosines to the next's."""
    position_row: int = 0
    """From one row of positions to the next."""
    max_position: int = 0
    """Number of positions in the tables."""


def rope_spec(rotation: Rotation, head_dim: int, q: Layout) -> RopeSpec:
    """Check devices, dtypes and widths, and return what a kernel is compiled for."""
    cos, sin, positions = rotation.cos, rotation.sin, rotation.positions
    rotary_dim = rotation.rotary_dim
    if rotary_dim > head_dim:
        raise ValueError(f"rotary_dim is {rotary_dim}; needs head_dim={head_dim} at most")
    for name, layout in (("cos", cos), ("sin", sin), ("positions", positions)):
        if layout is not None and layout.device != q.device:
            raise TypeError(f"{name} is on {layout.device}; needs the device of q, {q.device}")
    if cos.dtype is not sin.dtype or cos.dtype not in (q.dtype, dtypes.FLOAT32):
        raise TypeError(
            f"cos has dtype {cos.dtype} and sin {sin.dtype}; needs that of q, {q.dtype}, or "
            "float32 of both"
        )
    if cos.shape != sin.shape:
        raise ValueError(f"cos has shape {cos.shape} and sin {sin.shape}; needs the same")
    width = cos.shape[-1] if cos.shape else 0
    if width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"cos has shape {cos.shape}; needs a last axis of {rotary_dim} or {rotary_dim // 2}, "
            f"for rotary_dim={rotary_dim}"
        )
    return RopeSpec(
        rotation.style,
        rotation.first,
        rotary_dim,
        rotation.every_op,
        cos.dtype,
        width == rotary_dim,
        None if positions is None else positions.dtype,
        rotation.sections,
        rotation.interleaved_sections,
    )


def steps(rotation: Rotation, tokens: tuple[int, ...]) -> Steps:
    """Check that every token has its cosines and sines, and return where they are."""
    none = (0,) * len(tokens)
    cos, sin, positions = rotation.cos, rotation.sin, rotation.positions
    # The stride of one entry says nothing, nor do those of no entries.
    strides = zip(cos.shape, cos.strides, sin.strides, strict=True)
    if cos.size and any(n > 1 and of_cos != of_sin for n, of_cos, of_sin in strides):
        raise ValueError(
            f"cos has strides {cos.strides} bytes and sin {sin.strides}; needs the same of both"
        )
    if positions is None:
        return Steps(_broadcast("cos", cos, tokens, 1), none)
    position_row = 0
    between = zip(positions.shape, positions.strides, strict=True)
    aligned = math.gcd(positions.alignment, *(stride for n, stride in between if n > 1))
    if aligned % positions.dtype.itemsize:
        raise ValueError(
            f"positions are aligned to {aligned} bytes; needs {positions.dtype.itemsize}, the size "
            f"of {positions.dtype}"
        )
    if rotation.sections:
        rows = len(rotation.sections)
        least = 2 if tokens else 1  # (3,) may be meant as one position for each of 3 tokens
        if len(positions.shape) < least or positions.shape[0] != rows:
            raise ValueError(
                f"positions have shape {positions.shape}; needs ({rows}, ...), a row for "
                f"each of the sections, of {tokens} or what broadcasts to it"
            )
        position_row = positions.strides[0]
        positions = positions._replace(shape=positions.shape[1:], strides=positions.strides[1:])
    return Steps(
        none,
        _broadcast("positions", positions, tokens, 0),
        table_row=cos.strides[0],
        position_row=position_row,
        max_position=cos.shape[0],
    )


def _broadcast(name: str, layout: Layout, tokens: tuple[int, ...], last: int) -> tuple[int, ...]:
    """Return strides along the tokens' axes; `last` axes of the array are its own."""
    own = layout.shape[: len(layout.shape) - last]
    strides = layout.strides[: len(own)]
    missing = len(tokens) - len(own)
    if missing < 0 or any(
        n not in (1, wanted) for n, wanted in zip(own, tokens[missing:], strict=True)
    ):
        raise ValueError(
            f"{name} has shape {layout.shape}; needs {tokens} of q's tokens"
            f"{' and a last axis of its own' if last else ''}, or what broadcasts to it"
        )
    return (0,) * missing + tuple(
        0 if n == 1 else stride for n, stride in zip(own, strides, strict=True)
    )
