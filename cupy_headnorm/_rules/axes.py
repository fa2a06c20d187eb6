"""The axes of rows or tokens that a kernel goes along, and how neighbours become one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

PARTS = 3
"""This is kParts in headnorm/parts.cuh."""


class RowAxis(NamedTuple):
    """One axis of the grid of rows: its length and each array's stride along it, in bytes."""

    size: int
    x: int = 0
    out: int = 0
    weight: int = 0
    bias: int = 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Return all strides, that of the result first."""
        return (self.out, self.x, self.weight, self.bias)


class TokenAxis(NamedTuple):
    """One axis of the tokens: its length and strides in bytes."""

    size: int
    x: tuple[int, ...] = (0,) * PARTS
    out: tuple[int, ...] = (0,) * PARTS
    position: int = 0
    table: int = 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Return all strides, that of q's result first."""
        return (*self.out, *self.x, self.position, self.table)


Axis = TypeVar("Axis", RowAxis, TokenAxis)


def merged(axes: Iterable[Axis], only: Axis) -> tuple[Axis, ...]:
    """
    Order axes as the result lies in memory and merge neighbours that step as one.

    `only` stands for them where no axis is longer than 1.
    """
    found: list[Axis] = []
    for inner in sorted((a for a in axes if a.size != 1), key=lambda a: -abs(a.strides[0])):
        outer = found[-1] if found else None
        if outer and all(
            o == i * inner.size for o, i in zip(outer.strides, inner.strides, strict=True)
        ):
            found[-1] = inner._replace(size=outer.size * inner.size)
        else:
            found.append(inner)
    return tuple(found) or (only,)
