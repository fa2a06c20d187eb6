"""
Calls that this thread has run before, and what is derived from them: the same over other tokens.

A remembered call is found by the key of what a glance tells of its arrays. Their addresses may be
others each time; where results go to arrays of the caller, those must not share bytes with any
other array of the call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_headnorm._arrays.layout import is_dense
from cupy_headnorm._arrays.views import ArrayView, Library
from cupy_headnorm._calls import lengths
from cupy_headnorm._calls.operands import GIVEN, IN_PLACE, NEW, Given, Operation, Seen
from cupy_headnorm._cuda import launcher
from cupy_headnorm._cuda.launcher import Launch, Run, Runs


class Call(NamedTuple):
    """A call that this thread has run before."""

    run: Run
    makes: tuple[Any, ...]
    """Make the results from the parts, where none are given."""
    alignments: tuple[int, ...]
    """That the results' addresses need, where none are given."""
    reach: tuple[tuple[int, int], ...]
    """Of each array of the caller: first byte and byte after the last, from its address."""
    places: tuple[int, ...]
    """Of each array of the caller, from the first one: these were seen not to overlap."""
    steps: tuple[int, ...]
    """Bytes from one token to the next in each array, over the axes that step as one; 0 where
    there are none."""
    length: int
    """Of those axes together."""


class Lengths(NamedTuple):
    """A call from which its like over any other number of tokens can be derived."""

    call: Call
    launch: Launch
    runs: dict[int, Runs]
    """What makes such calls, by `Given.form`."""
    results: tuple[Any, ...]
    """What `lengths.but_for_lengths` says of them, where none are given."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], Call] = {}
        self.lengths: dict[tuple[Any, ...], Lengths] = {}


thread = _Thread()
MAX_CALLS = 1024
"""In each cache, which starts over when it meets more. One takes 2 KiB: 2 MiB a thread. A server
that decodes batches of 1 to 256 in two layouts has half as many."""


def store(cache: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    """Keep a value in a bounded cache."""
    if len(cache) >= MAX_CALLS:
        cache.clear()
    cache[key] = value


def may_overlap(call: Call, seen: Seen, given: Given, *, new: bool = False) -> bool:
    """
    Tell whether what is written may share bytes with another array of the call.

    The places of a `new` call are those of `seen`, of which nothing is known yet.
    """
    key, addresses, _ = seen
    first, places = addresses[0], () if new else call.places
    if not new and places == tuple([address - first for address in addresses]):
        return False
    count, last = len(given.parts), len(addresses)
    ranges = [(a + low, a + high) for a, (low, high) in zip(addresses, call.reach, strict=False)]
    outs = 0 if given.results == IN_PLACE else last - count
    for i in range(outs, outs + count):
        low, high = ranges[i]
        for j, (start, end) in enumerate(ranges):
            if start >= high or low >= end or outs <= j <= i:  # two results are compared once
                continue
            if _side_by_side(call, ranges, i, j) or _as_before(places, addresses, i, j):
                continue
            part_of_i = j == i - outs
            if not (part_of_i and addresses[i] == addresses[j] and key[2 + i] == key[2 + j]):
                return True
    return False


def lie_apart(call: Call, x: int, other: int) -> bool:
    """Tell whether the first two arrays of a call share no byte, as far as two looks tell."""
    (low, high), (first, end) = call.reach[:2]
    return x + high <= other + first or other + end <= x + low or call.places[1] == other - x


def _as_before(places: tuple[int, ...], addresses: tuple[int, ...], i: int, j: int) -> bool:
    """Tell whether two arrays lie as far apart as when they were seen not to overlap."""
    return bool(places) and addresses[j] - addresses[i] == places[j] - places[i]


def _side_by_side(call: Call, ranges: Sequence[tuple[int, int]], i: int, j: int) -> bool:
    """
    Tell whether two arrays are slices of one buffer, of which each token has a piece.

    With the step from token to token as wide as the buffer's rows::

        token 0   | i i i i . j j . |
        token 1   | i i i i . j j . |     no piece reaches into the next token's
    """
    step = call.steps[i]
    if step != call.steps[j]:
        return False
    width = abs(step)
    more = (call.length - 1) * width
    (first, end), (later, later_end) = ranges[i], ranges[j]
    if later < first:
        first, end, later, later_end = later, later_end, first, end
    return end - more <= later and later_end - more - first <= width


def derive(
    operation: Operation, library: Library, given: Given, seen: Seen
) -> tuple[Call | None, tuple[Any, ...] | None]:
    """
    Derive a call from one that differs in the number of tokens alone, and remember it.

    Returns it, and the results that were made on the way where none are given.
    """
    (key, addresses, _), form = seen, operation.form(given)
    strides = form.arrays.token_strides(key[2:])
    for lead in lengths.leads(strides):
        known = thread.lengths.get(_key_of_lengths(key, given, strides, lead))
        if known is not None:
            break
    else:
        return None, None
    length = math.prod(strides[0].lengths[: lead + 1])
    launch = operation.over(known.launch, known.call.length, length) if length else None
    if launch is None:
        return None, None
    results = None
    if given.results == NEW:
        # What their library makes decides the strides: look, before they are relied on. It may be
        # of parts without the odd stride along an axis of length 1 of these.
        results = made(known.call, given)
        looked = library.look(results)
        if looked is None or not all(is_dense(*key[1:3]) for key in looked[1]):
            return None, None
        of_results = form.results.token_strides(looked[1])
        if (
            lead not in lengths.leads([strides[0], *of_results])
            or lengths.but_for_lengths(of_results, lead) != known.results
        ):
            return None, None
    runs = known.runs.get(given.form)
    if runs is None:
        runs = known.runs[given.form] = launcher.runners(launch, form.sources)
    call = _over_length(known.call, runs(launch), length, addresses)
    if given.results != NEW and len(addresses) > 1 and may_overlap(call, seen, given, new=True):
        return None, None
    store(thread.calls, key, call)
    return call, results


def _apart(given: Given, of_arrays: Sequence[Any]) -> Sequence[Any]:
    """
    Return an entry for each array and result: one in place has that of its part.

    A call in place is derived from one whose results lie apart in the same layout, and that from
    the former: a kernel meets no difference.
    """
    in_place = given.results == IN_PLACE
    return (*of_arrays, *of_arrays[: len(given.parts)]) if in_place else of_arrays


def _key_of_lengths(
    key: tuple[Any, ...], given: Given, strides: Sequence[lengths.TokenStrides], lead: int
) -> tuple[Any, ...]:
    identity, form = key[:2]
    if form & IN_PLACE:
        form ^= IN_PLACE | GIVEN
    return (identity, form, lead, *_apart(given, lengths.but_for_lengths(strides, lead)))


def _over_length(call: Call, run: Run, length: int, addresses: tuple[int, ...]) -> Call:
    """Return a call over another number of tokens, with the reach and places of its arrays."""
    more, first, steps = length - call.length, addresses[0], call.steps[: len(addresses)]
    reach = tuple(
        [
            (low, high + more * step) if step >= 0 else (low + more * step, high)
            for (low, high), step in zip(call.reach, steps, strict=False)
        ]
    )
    places = tuple([address - first for address in addresses])
    return Call(run, call.makes, call.alignments, reach, places, steps, length)


def made(call: Call, given: Given) -> tuple[Any, ...]:
    """Return new results."""
    if len(call.makes) == 1:
        return (call.makes[0](given.parts[0]),)
    return tuple([make(x) for make, x in zip(call.makes, given.parts, strict=True)])


class Planned(NamedTuple):
    """A call that went step by step, for `remember`."""

    launch: Launch
    run: Run
    runs: Runs
    makes: tuple[Any, ...]
    views: tuple[ArrayView, ...]
    """Of `Given.arrays`."""
    results: tuple[ArrayView, ...]
    axes_before_heads: int | None
    """Of the tokens' axes, where one of them is the heads'; None where none is."""


def remember(
    operation: Operation, library: Library, given: Given, seen: Seen, planned: Planned
) -> None:
    """Let a call be found again, and derived over other numbers of tokens where layouts allow."""
    key, outs, count = seen[0], planned.results, len(planned.results)
    keys, views, form = key[2:], planned.views, operation.form(given)
    arrays = form.arrays
    if given.results == NEW:
        looked = library.look(tuple(view.owner for view in outs))
        keys += () if looked is None else looked[1]
        views, arrays = views + outs, form.both
    strides = arrays.token_strides(keys) if len(keys) == len(views) else []
    of_results = slice(count) if given.results == IN_PLACE else slice(-count, None)
    leads = lengths.leads(strides)
    in_bytes = arrays.in_bytes(views) if leads else []
    most = planned.axes_before_heads
    fits = (
        lead
        for lead in leads
        if (most is None or lead < most) and lengths.is_outermost(lead, outs, in_bytes[of_results])
    )
    lead = next(fits, None)
    apart, given_arrays = _apart(given, planned.views), len(planned.views)
    steps, length = (0,) * len(apart), 1
    if lead is not None:
        steps = tuple(s.strides[lead] for s in _apart(given, in_bytes[:given_arrays]))
        length = math.prod(strides[0].lengths[: lead + 1])
    call = Call(
        planned.run,
        planned.makes,
        tuple(view.layout.alignment for view in outs),
        tuple(view.layout.extent(0) for view in apart),
        tuple(view.pointer - planned.views[0].pointer for view in planned.views),
        steps,
        length,
    )
    store(thread.calls, key, call)
    if lead is not None:
        of_key = _key_of_lengths(key, given, strides[:given_arrays], lead)
        results = lengths.but_for_lengths(strides[of_results], lead)
        store(
            thread.lengths,
            of_key,
            Lengths(call, planned.launch, {given.form: planned.runs}, results),
        )
