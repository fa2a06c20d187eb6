"""
Calls on queries, keys and values that this thread has run before, and the like over other tokens.

`known` glances at the arrays, looks the call up by what was seen, and launches; `remember` lets it
find a call that went step by step.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cupy_headnorm._arrays.find import quick
from cupy_headnorm._arrays.layout import is_dense
from cupy_headnorm._arrays.views import ArrayView, Library
from cupy_headnorm._calls import lengths
from cupy_headnorm._calls.dispatch import store
from cupy_headnorm._calls.tables import RopeCall, Tables
from cupy_headnorm._cuda import memory
from cupy_headnorm._plans import qk_norm_rope
from cupy_headnorm.headnorm import HeadNorm

NO_ROPE = (0, 0, 0)
"""Addresses of cosines, sines and positions."""


class Arrays(NamedTuple):
    """What a caller gave."""

    parts: tuple[Any, ...]
    positions: Any
    cos: Any
    sin: Any
    out: tuple[Any, ...] | None

    @property
    def in_place(self) -> bool:
        """Whether each part is its own `out`."""
        return self.out is not None and all(map(operator.is_, self.out, self.parts))

    def each(self) -> list[Any]:
        """Return all that are there, those of `out` last if they are others."""
        beside = [a for a in (self.positions, self.cos, self.sin) if a is not None]
        return [*self.parts, *beside, *(() if self.in_place else self.out or ())]


class Known(NamedTuple):
    """A call that this thread has run before."""

    run: Callable[..., None]
    """Launches, from a stream and the addresses of the kernel's parameters."""
    makes: tuple[Any, ...]
    """Make the results, where none are given."""
    alignments: tuple[int, ...]
    """That the results' addresses need, where none are given."""
    reach: tuple[tuple[int, int], ...]
    """Of each array of the caller: first byte and byte after the last, from its address."""
    places: tuple[int, ...]
    """Of each array of the caller, from the first one: these were seen not to overlap."""
    steps: tuple[int, ...]
    """Bytes of each from one token to the next, along the axes that may be longer or shorter; 0
    where there are none."""
    length: int
    """Of those axes together."""

    def made(self, arrays: Arrays) -> tuple[Any, ...]:
        """Return new results."""
        return tuple(make(x) for make, x in zip(self.makes, arrays.parts, strict=True))


class _Family(NamedTuple):
    """A call whose like over any other number of tokens can be derived from it."""

    call: Known
    launch: qk_norm_rope.PartsLaunch
    results: tuple[Any, ...]
    """What `_qk_lengths.family` says of them, where none are given."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], Known] = {}
        self.families: dict[tuple[Any, ...], _Family] = {}


_thread = _Thread()


def _glances(
    norms: Mapping[str, HeadNorm],
    tables: Tables,
    library: Library,
    arrays: Arrays,
    heads_axis: int,
) -> tuple[tuple[Any, ...], int, list[int], list[int], list[Any]] | None:
    """
    Look at a call's arrays; None where they need more than a look.

    Returns a key of all that its plan depends on, the device's index, the addresses of the arrays,
    those of the norms' weights and biases and of the tables, and what keeps the latter's memory
    until the launch, whoever unloads it meanwhile.
    """
    addresses, keys = [], []
    for array in arrays.each():
        seen = library.glance(array) if quick.get(type(array)) is library else None
        if seen is None:
            return None
        addresses.append(seen[0])
        keys.append(seen[1])
    index, _, _, dtype, _ = keys[0]
    held: list[int] = []
    keeps: list[Any] = []
    identities = []
    for norm in norms.values():
        parameters = norm._norm.ready.get(index)
        if parameters is None:
            return None
        held += (parameters.weight_address, parameters.bias_address)
        identities.append(parameters.identity)
        keeps.append(parameters)
    if arrays.positions is not None:
        of_tables = tables.seen.get((index, dtype))
        if of_tables is None:
            return None
        held += (of_tables[0].pointer, of_tables[1].pointer)
        keeps.append(of_tables)
    # As many arrays may be others: cos and sin without out, or out without cos and sin.
    given = (arrays.positions is None, 0 if arrays.out is None else 1 + arrays.in_place)
    key = (*identities, tables.identity, *given, heads_axis, *keys)
    return key, index, addresses, held, keeps


def known(
    norms: Mapping[str, HeadNorm], tables: Tables, arrays: Arrays, heads_axis: int
) -> tuple[Any, ...] | None:
    """Run a call whose like this thread has run before; None where there is none."""
    library = quick.get(type(arrays.parts[0]))
    if library is None:
        return None
    seen = _glances(norms, tables, library, arrays, heads_axis)
    if seen is None:
        return None
    key, index, addresses, held, _ = seen
    count = len(arrays.parts)
    stream = library.stream(index)  # that on which results are made, too
    if arrays.out is None and not library.allocates_in_graphs:
        memory.refuse_allocation(stream)
    call, results = _thread.calls.get(key), None
    if call is None:
        call, results = _of_other_length(library, tables, arrays, heads_axis, key, addresses)
        if call is None:
            return None
    if arrays.out is None:
        results = call.made(arrays) if results is None else results
        targets = [library.address(result) for result in results]
        for address, alignment in zip(targets, call.alignments, strict=True):
            if not address or address & (alignment - 1):
                return None
    else:
        results = arrays.out
        targets = addresses[:count] if arrays.in_place else addresses[-count:]
        if _may_overlap(call, addresses, count, in_place=arrays.in_place):
            return None
    of_tables: tuple[int, ...] = NO_ROPE
    if arrays.positions is not None:
        of_tables = (*held[2 * count :], addresses[count])
    elif arrays.cos is not None:
        of_tables = (addresses[count], addresses[count + 1], 0)
    call.run(stream, addresses[:count], targets, held[: 2 * count], of_tables)
    if arrays.out is not None:
        library.wrote(results)
    return results


def _may_overlap(call: Known, addresses: list[int], count: int, *, in_place: bool) -> bool:
    """Tell whether what is written may share bytes with another array of the call."""
    first = addresses[0]
    places = tuple(address - first for address in addresses)
    if places == call.places:
        return False
    ranges = [
        (place + low, place + high) for place, (low, high) in zip(places, call.reach, strict=True)
    ]
    written = range(count) if in_place else range(len(ranges) - count, len(ranges))
    return any(
        ranges[i][0] < high
        and low < ranges[i][1]
        and not (call.places and places[j] - places[i] == call.places[j] - call.places[i])
        and not _side_by_side(call, ranges, i, j)
        for i in written
        for j, (low, high) in enumerate(ranges)
        if i != j
    )


def _side_by_side(call: Known, ranges: list[tuple[int, int]], i: int, j: int) -> bool:
    """Tell whether two arrays are slices of one buffer, of which each token has a piece."""
    step = call.steps[i]
    if step != call.steps[j]:
        return False
    more = (call.length - 1) * abs(step)
    of_first_token = [(low, high - more) for low, high in (ranges[i], ranges[j])]
    (first, end), (later_first, later_end) = sorted(of_first_token)
    return end <= later_first and later_end - first <= abs(step)


def _roles(tables: Tables, arrays: Arrays) -> list[str]:
    """Return what `_qk_lengths.walks_of` has to know of each array of the caller."""
    rows = "rows of positions" if tables.rope and tables.rope.sections else "positions"
    beside = [
        role
        for array, role in ((arrays.positions, rows), (arrays.cos, "table"), (arrays.sin, "table"))
        if array is not None
    ]
    of_parts = ["part"] * len(arrays.parts)
    return [*of_parts, *beside, *([] if arrays.in_place or arrays.out is None else of_parts)]


def _of_other_length(
    library: Library,
    tables: Tables,
    arrays: Arrays,
    heads_axis: int,
    key: tuple[Any, ...],
    addresses: list[int],
) -> tuple[Known | None, tuple[Any, ...] | None]:
    """
    Derive a call from one that differs in the number of tokens alone, and remember it.

    Returns it, and the results that were made on the way where none are given.
    """
    roles = _roles(tables, arrays)
    walks = lengths.walks_of(key[-len(roles) :], roles, heads_axis)
    for lead in lengths.common_leads(walks):
        family = _thread.families.get((*key[: -len(roles)], *lengths.family(walks, lead)))
        if family is not None:
            break
    else:
        return None, None
    length, known = math.prod(walks[0].lengths[: lead + 1]), family.call
    launch = qk_norm_rope.over_tokens(family.launch, known.length, length) if length else None
    if launch is None:
        return None, None
    results = None
    if arrays.out is None:
        # What their library makes decides the strides: look, before they are relied on.
        results = known.made(arrays)
        of_results = _walks_of_results(library, results, heads_axis, new=True)
        if (
            not of_results
            or lead not in lengths.common_leads([walks[0], *of_results])
            or lengths.family(of_results, lead) != family.results
        ):
            return None, None
    more = length - known.length
    call = known._replace(
        run=qk_norm_rope.runner(launch),
        reach=tuple(
            (first + more * min(step, 0), end + more * max(step, 0))
            for (first, end), step in zip(known.reach, known.steps, strict=True)
        ),
        places=(),
        length=length,
    )
    if arrays.out is not None:
        if _may_overlap(call, addresses, len(arrays.parts), in_place=arrays.in_place):
            return None, None
        call = call._replace(places=tuple(address - addresses[0] for address in addresses))
    store(_thread.calls, key, call)
    return call, results


def _walks_of_results(
    library: Library, results: tuple[Any, ...], heads_axis: int, *, new: bool = False
) -> list[lengths.Walk]:
    """Look at results; none where they need more than a look, or new ones are not dense."""
    keys = []
    for result in results:
        seen = library.glance(result)
        if seen is None or (new and not is_dense(*seen[1][1:3])):
            return []
        keys.append(seen[1])
    return lengths.walks_of(keys, ["part"] * len(keys), heads_axis)


def remember(
    norms: Mapping[str, HeadNorm],
    tables: Tables,
    library: Library,
    arrays: Arrays,
    heads_axis: int,
    launch: qk_norm_rope.PartsLaunch,
    run: Callable[..., None],
    makes: Sequence[Any],
    parts: Mapping[str, ArrayView],
    outs: Mapping[str, ArrayView],
    rope: RopeCall | None,
) -> None:
    """Let `known` find this call, if a glance at its arrays tells that it is the same again."""
    if quick.get(type(arrays.parts[0])) is not library:
        return
    beside: list[ArrayView] = []
    if rope is not None and rope.positions is not None:
        beside = [rope.positions]
        q = library.glance(arrays.parts[0])
        if q is None:
            return
        tables.saw(q[1][3], rope.cos, rope.sin)
    elif rope is not None:
        beside = [rope.cos, rope.sin]
    seen = _glances(norms, tables, library, arrays, heads_axis)
    if seen is None:
        return
    others = () if arrays.out is None or arrays.in_place else outs.values()
    placed = [*parts.values(), *beside, *others]
    key = seen[0]
    roles = _roles(tables, arrays)
    walks = lengths.walks_of(key[-len(roles) :], roles, heads_axis)
    of_results = _walks_of_results(library, tuple(v.owner for v in outs.values()), heads_axis)
    leads = lengths.common_leads([*walks, *of_results]) if walks and of_results else []
    written = tuple(outs.values())
    in_bytes = _walks_in_bytes(written, ["part"] * len(written), heads_axis) if leads else []
    steps, length = (0,) * len(placed), 1
    lead = next((lead for lead in leads if _is_outermost(lead, written, in_bytes)), None)
    if lead is not None:
        steps = tuple(w.steps[lead] for w in _walks_in_bytes(placed, roles, heads_axis))
        length = math.prod(walks[0].lengths[: lead + 1])
    call = Known(
        run,
        tuple(makes),
        tuple(view.layout.alignment for view in outs.values()),
        tuple(view.layout.extent(0) for view in placed),
        tuple(view.pointer - placed[0].pointer for view in placed),
        steps,
        length,
    )
    store(_thread.calls, key, call)
    if lead is not None:
        family = _Family(call, launch, lengths.family(of_results, lead))
        family_key = (*key[: -len(roles)], *lengths.family(walks, lead))
        store(_thread.families, family_key, family)


def _walks_in_bytes(
    views: Sequence[ArrayView], roles: Sequence[str], heads_axis: int
) -> list[lengths.Walk]:
    layouts = [(0, view.layout.shape, view.layout.strides) for view in views]
    return lengths.walks_of(layouts, roles, heads_axis)


def _is_outermost(lead: int, results: Sequence[ArrayView], walks: Sequence[lengths.Walk]) -> bool:
    """
    Tell whether in each result a token's piece ends where the next one's begins, or before.

    Then the kernel meets the length of the axes up to `lead` nowhere but in the number of tokens,
    and no result overlaps itself, however many there are.
    """
    for view, walk in zip(results, walks, strict=True):
        first, end = view.layout.extent(0)
        if end - first > math.prod(walk.lengths[: lead + 1]) * abs(walk.steps[lead]):
            return False
    return True
