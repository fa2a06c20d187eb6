"""
One call on queries, keys and values, from arrays to arrays.

`known` runs a call whose like this thread has run before: it glances at the arrays, looks the call
up by what was seen, and launches. Everything else goes `step_by_step`: views, checks, a plan, and
the call is remembered. It is `_dispatch` for several norms and their rotary embedding.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import _interop, _kernels, _parts, _parts_kernels, _spec, reference
from cupy_headnorm._arrays import ArrayView, Library
from cupy_headnorm._dispatch import store
from cupy_headnorm._interop import quick
from cupy_headnorm._parts import PartNorm, PartsCall
from cupy_headnorm._rope_tables import RopeCall, Tables
from cupy_headnorm._spec import NormOptions
from cupy_headnorm.headnorm import HeadNorm

_NO_ROPE = (0, 0, 0)
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


class _Known(NamedTuple):
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


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], _Known] = {}


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
    call = _thread.calls.get(key)
    if call is None:
        return None
    count = len(arrays.parts)
    stream = library.stream(index)
    if arrays.out is None:
        if not library.allocates_in_graphs:
            _kernels.refuse_allocation(stream)
        results = tuple(make(x) for make, x in zip(call.makes, arrays.parts, strict=True))
        targets = [library.address(result) for result in results]
        for address, alignment in zip(targets, call.alignments, strict=True):
            if not address or address & (alignment - 1):
                return None
    else:
        results = arrays.out
        targets = addresses[:count] if arrays.in_place else addresses[-count:]
        if _may_overlap(call, addresses, count, in_place=arrays.in_place):
            return None
    of_tables: tuple[int, ...] = _NO_ROPE
    if arrays.positions is not None:
        of_tables = (*held[2 * count :], addresses[count])
    elif arrays.cos is not None:
        of_tables = (addresses[count], addresses[count + 1], 0)
    call.run(stream, addresses[:count], targets, held[: 2 * count], of_tables)
    if arrays.out is not None:
        library.wrote(results)
    return results


def _may_overlap(call: _Known, addresses: list[int], count: int, *, in_place: bool) -> bool:
    """Tell whether what is written may share bytes with another array of the call."""
    first = addresses[0]
    if tuple(address - first for address in addresses) == call.places:
        return False
    ranges = [
        (address + low, address + high)
        for address, (low, high) in zip(addresses, call.reach, strict=True)
    ]
    written = range(count) if in_place else range(len(ranges) - count, len(ranges))
    return any(
        ranges[i][0] < high and low < ranges[i][1]
        for i in written
        for j, (low, high) in enumerate(ranges)
        if i != j
    )


class _Plan(NamedTuple):
    call: PartsCall
    launch: _parts_kernels.PartsLaunch | None
    """None where the reference runs, or nothing."""


_plans: dict[tuple[Any, ...], _Plan] = {}
"""Those of all threads."""


def step_by_step(
    norms: Mapping[str, HeadNorm],
    tables: Tables,
    arrays: Arrays,
    heads_axis: int,
    *,
    dry: bool = False,
) -> tuple[Any, ...]:
    """
    Run a call with every check, plan it where that is new, and remember it.

    `dry` stops short of the arithmetic, with all prepared for it.
    """
    parts, positions, cos, sin, out = arrays
    heads_axis = _spec.checked_heads_axis(heads_axis)
    if len(parts) != len(norms):
        raise TypeError(
            "v is given and there is no v_norm; needs q and k only"
            if len(parts) > len(norms)
            else "no v is given; needs one for v_norm"
        )
    names = tuple(norms)
    q = _interop.view(parts[0], "q")
    library, device = q.library, q.layout.device
    views = {"q": q}
    for name, array in zip(names[1:], parts[1:], strict=True):
        views[name] = _interop.view_beside(q, array, name, of="q")
    on_gpu = device.kind == "cuda"
    if on_gpu:
        _interop.import_cupy()
    stream = library.stream(device.index) if on_gpu else 0
    bound = {name: norm._part_beside(q) for name, norm in norms.items()}
    rope = tables.describe(names, q, positions, cos, sin, stream)
    makes: Sequence[Any] = (None,) * len(parts)
    if out is None:
        if on_gpu and not library.allocates_in_graphs:
            _kernels.refuse_allocation(stream)
        results, makes = zip(*(library.empty_like(v) for v in views.values()), strict=True)
        outs = {n: _interop.view(r, "result") for n, r in zip(names, results, strict=True)}
    else:
        results = out
        outs = {
            name: views[name]
            if target is array and library.takes_out
            else _interop.view_beside(q, target, "out", of="q")
            for name, target, array in zip(names, results, parts, strict=True)
        }
        for name, view in outs.items():
            if not view.writeable:
                raise ValueError(f"out of {name} is read-only; needs a writeable array")
    described = {
        name: PartNorm(options, weight and weight.layout, bias and bias.layout)
        for name, (options, weight, bias) in bound.items()
    }
    layouts = {name: view.layout for name, view in views.items()}
    of_outs = {name: view.layout for name, view in outs.items()}
    turning = None if rope is None else rope.turning
    key = (
        *described.items(),
        tuple(layouts.values()),
        tuple(of_outs.values()),
        turning,
        heads_axis,
    )
    plan = _plans.get(key)
    if plan is None:
        call = _parts.describe(described, layouts, of_outs, turning, heads_axis)
        for view in outs.values():
            _spec.check_out_layout(view.layout)
        runs = on_gpu and call.tokens and any(part.num_heads for part in call.parts)
        launch = _parts_kernels.prepare(call, device.index, stream) if runs else None
        plan = _Plan(call, launch)
        store(_plans, key, plan)
    if out is not None:
        beside: dict[str, ArrayView | None] = {} if rope is None else {**rope.views}
        for name, (_, weight, bias) in bound.items():
            beside |= {f"the weight of {name}": weight, f"the bias of {name}": bias}
        _check_overlaps(views, outs, beside)
    if plan.launch is not None:
        run = _parts_kernels.runner(plan.launch)
        _remember(norms, tables, library, arrays, heads_axis, run, makes, views, outs, rope)
    if dry:
        return ()
    if plan.launch is not None:
        held = [part for _, *of_part in bound.values() for part in of_part]
        run(
            stream,
            [view.pointer for view in views.values()],
            [view.pointer for view in outs.values()],
            [0 if view is None else view.pointer for view in held],
            _NO_ROPE if rope is None else rope.addresses,
        )
        tables_read = () if rope is None else rope.views.values()
        library.launched((*views.values(), *tables_read), device.index, stream)
    elif not on_gpu:
        _on_host(bound, views, outs, rope, heads_axis)
    if out is None:
        return tuple(
            library.deliver(result, view)
            for result, view in zip(results, views.values(), strict=True)
        )
    library.wrote(results)
    return results


def _remember(
    norms: Mapping[str, HeadNorm],
    tables: Tables,
    library: Library,
    arrays: Arrays,
    heads_axis: int,
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
        index, _, _, dtype, _ = q[1]
        tables.seen[index, dtype] = (rope.cos, rope.sin)
    elif rope is not None:
        beside = [rope.cos, rope.sin]
    seen = _glances(norms, tables, library, arrays, heads_axis)
    if seen is None:
        return
    others = () if arrays.out is None or arrays.in_place else outs.values()
    placed = [*parts.values(), *beside, *others]
    call = _Known(
        run,
        tuple(makes),
        tuple(view.layout.alignment for view in outs.values()),
        tuple(view.layout.extent(0) for view in placed),
        tuple(view.pointer - placed[0].pointer for view in placed),
    )
    store(_thread.calls, seen[0], call)


def _check_overlaps(
    views: Mapping[str, ArrayView],
    outs: Mapping[str, ArrayView],
    beside: Mapping[str, ArrayView | None],
) -> None:
    """Refuse an `out` that shares bytes with anything but the part that it is the result of."""
    for name, out in outs.items():
        others = {f"out of {other}": view for other, view in outs.items() if other != name}
        _spec.check_overlaps({**views, **others, **beside}, out, name, f"out of {name}")


def _on_host(
    norms: Mapping[str, tuple[NormOptions, ArrayView | None, ArrayView | None]],
    views: Mapping[str, ArrayView],
    outs: Mapping[str, ArrayView],
    rope: RopeCall | None,
    heads_axis: int,
) -> None:
    """Run a validated call in NumPy."""
    turn, turned, turns_first = None, (False,) * len(norms), False
    if rope is not None:
        turn = rope.in_numpy(len(views["q"].layout.shape), heads_axis)
        turned, turns_first = rope.turning.turned, rope.turning.first
    for (name, (opts, weight, bias)), this_turns in zip(norms.items(), turned, strict=True):
        function: Callable[..., np.ndarray]
        function = reference.rms_norm if opts.kind == "rms" else reference.layer_norm
        x = views[name].as_numpy()
        if turn is not None and this_turns and turns_first:
            x = turn(x)
        y = function(
            x,
            *(None if view is None else view.as_numpy() for view in (weight, bias)),
            eps=opts.eps,
            num_heads=opts.num_heads,
            head_dim=opts.head_dim,
            heads_axis=heads_axis,
            weight_offset=opts.weight_offset,
            rounding=opts.rounding,
        )
        if turn is not None and this_turns and not turns_first:
            y = turn(y)
        np.copyto(outs[name].as_numpy(), y)
