"""
Which calls differ in the number of tokens alone: pure arithmetic on what a glance tells.

An array steps over the tokens of a call by its *token strides*. Where all arrays step over the
axes up to one, the *lead*, as over a single axis, a kernel meets the lengths of these axes in the
number of tokens alone: one plan supports all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_headnorm._arrays.views import ArrayView


class Role(NamedTuple):
    """What an array is in a call, as far as its axes go."""

    apart: tuple[int, ...] | None
    """Axes that are not the tokens'; None where none of them is."""
    least: int
    """Axes that there must be."""
    broadcasts: bool
    """Whether an axis may be 1 long, or missing, where that of the first part is longer."""


PARAMETER = Role(None, 0, broadcasts=True)
TABLE = Role((-1,), 1, broadcasts=True)
POSITIONS = Role((), 0, broadcasts=True)
# Of (3,) with sections nobody knows whether it is one position of each row, or one row of 3 tokens:
# step by step that is an error.
ROWS_OF_POSITIONS = Role((0,), 2, broadcasts=True)


class TokenStrides(NamedTuple):
    """How one array steps over the tokens of a call."""

    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    """0 along an axis of length 1, which is broadcast where that of the first part is longer."""
    rest: tuple[Any, ...]
    """All else that is seen of the array."""
    broadcasts: bool


@functools.lru_cache(maxsize=256)
def _axes_of(role: Role, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens' axes of an array, and the others."""
    every = tuple(range(ndim))
    apart = every if role.apart is None else tuple(i % ndim for i in role.apart if ndim)
    return tuple(i for i in every if i not in apart), apart


def token_strides(keys: Sequence[tuple[Any, ...]], roles: Sequence[Role]) -> list[TokenStrides]:
    """Return those of each array, from what a glance tells; none where their axes do not fit."""
    first, apart = len(keys[0][1]), roles[0].apart or ()
    axes = first - len(apart)
    if axes < 1 or not all(-first <= axis < first for axis in apart):
        return []
    found, table = [], None
    for (index, shape, strides, *rest), role in zip(keys, roles, strict=True):
        if len(shape) < role.least:
            return []
        if role is TABLE:
            if table is not None and table != shape:
                return []
            table = shape
        own, others = _axes_of(role, len(shape))
        missing = axes - len(own)
        if missing < 0 or (missing and not role.broadcasts):
            return []
        lengths = tuple([shape[i] for i in own])
        steps = tuple([strides[i] if shape[i] != 1 else 0 for i in own])
        if missing:
            lengths, steps = (1,) * missing + lengths, (0,) * missing + steps
        about = (index, *rest, *[(shape[i], strides[i]) for i in others])
        found.append(TokenStrides(lengths, steps, about, role.broadcasts))
    return found


def leads(arrays: Sequence[TokenStrides]) -> list[int]:
    """
    Return the axes of the tokens, innermost first, up to which all arrays step as one.

    The last of them is the outermost axis that is longer than 1.
    """
    lengths = arrays[0].lengths if arrays else ()
    found: list[int] = []
    for i, length in enumerate(lengths):
        if found:
            if length < 2:
                break
            for array in arrays:
                if array.strides[i - 1] != length * array.strides[i]:
                    break
            else:
                found.insert(0, i)
                continue
            break
        if length > 1:
            found.append(i)
    if not found:
        return []
    together = lengths[: found[0] + 1]
    for array in arrays:
        if array.lengths[: found[0] + 1] != together:
            for length, wanted in zip(array.lengths, together, strict=False):
                if length != wanted and not (array.broadcasts and length == 1):
                    return []
    return found


def but_for_lengths(arrays: Sequence[TokenStrides], lead: int) -> tuple[Any, ...]:
    """Return all that is seen of the arrays but for the lengths of their axes up to `lead`."""
    return (lead, *((a.lengths[lead + 1 :], a.strides[lead:], a.rest) for a in arrays))


def in_bytes(views: Sequence[ArrayView], roles: Sequence[Role]) -> list[TokenStrides]:
    """Return the token strides of views, whose strides are bytes whatever their library counts."""
    return token_strides([(0, v.layout.shape, v.layout.strides) for v in views], roles)


def is_outermost(lead: int, results: Sequence[ArrayView], strides: Sequence[TokenStrides]) -> bool:
    """
    Tell whether in each result a token's piece ends where the next one's begins, or before.

    Then the kernel meets the length of the axes up to `lead` nowhere but in the number of tokens,
    and no result overlaps itself, however many there are.
    """
    for view, steps in zip(results, strides, strict=True):
        first, end = view.layout.extent(0)
        if end - first > math.prod(steps.lengths[: lead + 1]) * abs(steps.strides[lead]):
            return False
    return True
