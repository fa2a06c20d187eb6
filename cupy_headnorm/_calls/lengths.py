"""Which calls on queries, keys and values differ in the number of tokens alone: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._rules import heads as head_rules
from cupy_headnorm._rules.options import NormOptions


def tokens_axis(
    opts: NormOptions, x: Layout, out: Layout, weight: Layout | None, bias: Layout | None
) -> int | None:
    """
    Return the innermost of `leads` up to which a plan serves other lengths too; None without one.

    It does where those axes hold no heads and come outermost in `out`: a kernel then meets their
    lengths nowhere but in the number of rows.
    """
    if 0 in x.shape:
        return None
    heads = head_rules.geometry(
        opts.num_heads, opts.head_dim, weight and weight.shape, bias and bias.shape
    )
    flat = heads.head_dim is not None and x.shape[-1] != heads.head_dim
    matter = heads.num_heads not in (None, 1) and not flat
    for lead in leads(x.shape[:-1], x.strides, out.strides):
        if matter and opts.heads_axis % len(x.shape) <= lead:
            continue
        one_token = out._replace(shape=out.shape[lead + 1 :], strides=out.strides[lead + 1 :])
        first, end = one_token.extent(0)
        if abs(out.strides[lead]) >= end - first:
            return lead
    return None


def leads(shape: tuple[int, ...], *strides: tuple[int, ...]) -> list[int]:
    """
    Return the axes, innermost first, up to which all step as one in arrays of these strides.

    The last of them is the outermost axis that is longer than 1.
    """
    found: list[int] = []
    for i, length in enumerate(shape):
        if found and (length < 2 or any(s[i - 1] != length * s[i] for s in strides)):
            break
        if length > 1:
            found.insert(0, i)
    return found


class Walk(NamedTuple):
    """How one array steps over the tokens of a call."""

    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    """Strides; 0 along an axis of length 1, which is broadcast where q's is longer."""
    rest: tuple[Any, ...]
    """All else that is seen of the array."""
    broadcasts: bool
    """Whether an axis may be 1 long where q's is longer."""


_APART: dict[str, tuple[int, ...]] = {"table": (-1,), "positions": (), "rows of positions": (0,)}
"""Axes that are not the tokens'; those of a part are the heads' and the last."""
_LEAST = {"table": 1, "positions": 0, "rows of positions": 2}
"""Axes that there must be. Of (3,) with sections nobody knows whether it is one position of each
row, or one row of 3 tokens: step by step that is an error."""


def walks_of(keys: Sequence[tuple[Any, ...]], roles: Sequence[str], heads_axis: int) -> list[Walk]:
    """
    Return each array's walk from what a glance tells of it; none where their axes do not fit.

    A role is "part", "table" (of cosines or sines), "positions" or "rows of positions".
    """
    axes = len(keys[0][1]) - 2
    tables = {key[1] for key, role in zip(keys, roles, strict=True) if role == "table"}
    if axes < 1 or not -axes - 2 <= heads_axis <= axes or len(tables) > 1:
        return []
    found = []
    for (index, shape, strides, *rest), role in zip(keys, roles, strict=True):
        is_part = role == "part"
        if len(shape) < (axes + 2 if is_part else _LEAST[role]):
            return []
        apart = [i % len(shape) for i in ((heads_axis, -1) if is_part else _APART[role])]
        own = [i for i in range(len(shape)) if i not in apart]
        missing = axes - len(own)
        if missing < 0:
            return []
        found.append(
            Walk(
                (1,) * missing + tuple(shape[i] for i in own),
                (0,) * missing + tuple(strides[i] if shape[i] != 1 else 0 for i in own),
                (index, *rest, *((shape[i], strides[i]) for i in apart)),
                not is_part,
            )
        )
    return found


def common_leads(walks: Sequence[Walk]) -> list[int]:
    """Return the axes of the tokens, innermost first, up to which all arrays step as one."""
    lengths = walks[0].lengths if walks else ()
    found = leads(lengths, *(walk.steps for walk in walks))
    if not found:
        return []
    for walk in walks:
        for length, wanted in zip(walk.lengths[: found[0] + 1], lengths, strict=False):
            if length != wanted and not (walk.broadcasts and length == 1):
                return []
    return found


def family(walks: Sequence[Walk], lead: int) -> tuple[Any, ...]:
    """Return all that is seen of the arrays but for the lengths of their axes up to `lead`."""
    return (
        lead,
        *((walk.lengths[lead + 1 :], walk.steps[lead:], walk.rest) for walk in walks),
    )
