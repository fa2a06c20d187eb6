"""
Which calls differ in the number of tokens alone: pure arithmetic on what a glance tells.

An array steps over the tokens of a call by its *token strides*. Where all arrays step over the
axes up to one, the *lead*, as over a single axis, a kernel meets the lengths of these axes in the
number of tokens alone: one plan supports all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
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


class _Reading(NamedTuple):
    """Where one array has the tokens' axes."""

    own: Callable[[tuple[int, ...]], tuple[int, ...]]
    others: Callable[[tuple[int, ...]], tuple[int, ...]]
    missing: tuple[int, ...]
    """0 for each axis that the first part has beside."""
    broadcasts: bool


def _taking(axes: Sequence[int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Return a function that takes some axes, in order, out of a tuple for all."""
    if not axes:
        return operator.itemgetter(slice(0))
    if axes[-1] - axes[0] == len(axes) - 1:
        return operator.itemgetter(slice(axes[0], axes[-1] + 1))
    return operator.itemgetter(*axes)


class Arrays:
    """The arrays of a call: by their roles, and by numbers of axes that were met before."""

    def __init__(self, roles: Sequence[Role]) -> None:
        self.roles = tuple(roles)
        self._tables = [i for i, role in enumerate(self.roles) if role == TABLE]
        self._known: dict[tuple[int, ...], tuple[_Reading, ...]] = {}

    def token_strides(self, keys: Sequence[tuple[Any, ...]]) -> list[TokenStrides]:
        """Return those of each array, from what a glance tells; none where axes do not fit."""
        ndims = tuple([len(key[1]) for key in keys])
        readings = self._known.get(ndims)
        if readings is None:
            readings = self._known[ndims] = self._readings(ndims)
        if self._tables and len({keys[i][1] for i in self._tables}) > 1:
            return []
        found = []
        for key, (own, others, missing, broadcasts) in zip(keys, readings, strict=False):
            shape, strides = key[1:3]
            lengths, steps = own(shape), own(strides)
            if 1 in lengths:
                steps = tuple([0 if n == 1 else s for n, s in zip(lengths, steps, strict=True)])
            if missing:
                lengths, steps = (*[1 for _ in missing], *lengths), missing + steps
            rest = (key[0], key[3:], others(shape), others(strides))
            found.append(TokenStrides(lengths, steps, rest, broadcasts))
        return found

    def in_bytes(self, views: Sequence[ArrayView]) -> list[TokenStrides]:
        """Return the token strides of views in bytes, whatever their library counts in."""
        return self.token_strides([(0, v.layout.shape, v.layout.strides) for v in views])

    def _readings(self, ndims: tuple[int, ...]) -> tuple[_Reading, ...]:
        found, first = [], ndims[0]
        apart = self.roles[0].apart or ()
        tokens = first - len(apart)
        if tokens < 1 or not all(-first <= axis < first for axis in apart):
            return ()
        for role, ndim in zip(self.roles, ndims, strict=True):
            every = range(ndim)
            others = every if role.apart is None else [i % ndim for i in role.apart if ndim]
            own = [i for i in every if i not in others]
            missing = tokens - len(own)
            if ndim < role.least or missing < 0 or (missing and not role.broadcasts):
                return ()
            taken = _taking(own), _taking(sorted(others))
            found.append(_Reading(*taken, (0,) * missing, role.broadcasts))
        return tuple(found)


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
    """Return for each array all that is seen but for the lengths of its axes up to `lead`."""
    return tuple([(a.lengths[lead + 1 :], a.strides[lead:], a.rest) for a in arrays])


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
