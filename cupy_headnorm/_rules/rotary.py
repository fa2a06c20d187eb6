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
from cupy_headnorm._rules import heads


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
    """Which parts rotate."""
    cos: Layout
    sin: Layout
    positions: Layout | None
    """None where cos and sin are the tokens' own."""


class RopeSpec(NamedTuple):
    """What a kernel knows of a rotary embedding when it is compiled; it begins as `Rotation`."""

    style: str
    first: bool
    rotary_dim: int
    every_op: bool
    sections: tuple[int, ...]
    interleaved_sections: bool
    table: DType
    whole_rows: bool
    """Cosines and sines have an entry for each element, not for each pair."""
    position: DType | None
    """None where cosines and sines are the tokens' own."""

    @property
    def name(self) -> str:
        """Return a part of a kernel's name: ``rope_half_d128_bf16``."""
        words = ["rope", self.style.replace(" ", "_"), f"d{self.rotary_dim}", self.table.short]
        words += ["before"] * self.first + ["rounded_once"] * (not self.every_op)
        words += [f"positions_{self.position.short}"] if self.position else []
        words += ["sections"] * bool(self.sections)
        return "_".join(words)


NO_ROPE = RopeSpec("none", False, 0, False, (), False, dtypes.FLOAT32, False, None)
"""What a kernel that rotates nothing is compiled for."""


class Lookup(NamedTuple):
    """What leads from a position to its cosines and sines; zeros where they are the tokens' own."""

    table_row: int = 0
    """Bytes from one position's cosines to the next's."""
    position_row: int = 0
    """Bytes from one row of positions to the next."""
    max_position: int = 0
    """The number of positions in the tables."""
    alignment: int = 16
    """The largest power of two, at most 16, that divides the address of each row of the tables."""


def rope_spec(rotation: Rotation, head_dim: int, q: Layout) -> RopeSpec:
    """Check devices, dtypes and widths, and return what a kernel is compiled for."""
    cos, sin, positions = rotation.cos, rotation.sin, rotation.positions
    rotary_dim = rotation.rotary_dim
    if rotary_dim > head_dim:
        raise ValueError(f"rotary_dim is {rotary_dim}; needs head_dim={head_dim} at most")
    for name, layout in (("cos", cos), ("sin", sin), ("positions", positions)):
        heads.check_device(layout, name, q, "q")
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
    for name, layout in (("cos", cos), ("sin", sin)):
        heads.check_last_stride(layout, name)
    position = positions.dtype if positions else None
    return RopeSpec(*rotation[:6], cos.dtype, width == rotary_dim, position)


def strides(
    rotation: Rotation | None, tokens: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], Lookup]:
    """
    Check that every token has its cosines and sines, and return where they are.

    The strides, in bytes, are those of positions and those of cosines and sines along the tokens'
    axes: cosines and sines are looked up by position, or are the tokens' own.
    """
    none = (0,) * len(tokens)
    if rotation is None:
        return none, none, Lookup()
    cos, sin, positions = rotation.cos, rotation.sin, rotation.positions
    # The stride of one entry says nothing, nor do those of no entries.
    between = zip(cos.shape, cos.strides, sin.strides, strict=True)
    if cos.size and any(n > 1 and of_cos != of_sin for n, of_cos, of_sin in between):
        raise ValueError(
            f"cos has strides {cos.strides} bytes and sin {sin.strides}; needs the same of both"
        )
    aligned = math.gcd(cos.alignment, sin.alignment)
    if positions is None:
        of_tables = _broadcast("cos", cos, tokens, 1)
        return none, of_tables, Lookup(alignment=math.gcd(aligned, *of_tables))
    steps = (step for n, step in zip(positions.shape, positions.strides, strict=True) if n > 1)
    aligned_to = math.gcd(positions.alignment, *steps)
    if aligned_to % positions.dtype.itemsize:
        raise ValueError(
            f"positions are aligned to {aligned_to} bytes; needs {positions.dtype.itemsize}, the "
            f"size of {positions.dtype}"
        )
    position_row, rows = 0, len(rotation.sections)
    if rows:
        least = 2 if tokens else 1  # (3,) may be meant as one position for each of 3 tokens
        if len(positions.shape) < least or positions.shape[0] != rows:
            raise ValueError(
                f"positions have shape {positions.shape}; needs ({rows}, ...), a row for "
                f"each of the sections, of {tokens} or what broadcasts to it"
            )
        position_row = positions.strides[0]
        positions = positions._replace(shape=positions.shape[1:], strides=positions.strides[1:])
    of_positions = _broadcast("positions", positions, tokens, 0)
    table_row = cos.strides[0]
    lookup = Lookup(table_row, position_row, cos.shape[0], math.gcd(aligned, table_row))
    return of_positions, none, lookup


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
