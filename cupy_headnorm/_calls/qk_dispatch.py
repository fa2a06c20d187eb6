"""
One call on queries, keys and values, step by step: views, checks, a plan, and it is remembered.

With `_qk_known`, to which a call goes first, it is `_dispatch` for several norms and their rotary
embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import reference
from cupy_headnorm._arrays import find, layout
from cupy_headnorm._arrays.views import ArrayView
from cupy_headnorm._calls.dispatch import store
from cupy_headnorm._calls.qk_known import NO_ROPE, Arrays, remember
from cupy_headnorm._calls.tables import RopeCall, Tables
from cupy_headnorm._cuda import environment, memory
from cupy_headnorm._plans import qk_norm_rope
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm._rules import parts as part_rules
from cupy_headnorm._rules.options import NormOptions
from cupy_headnorm._rules.parts import PartNorm, PartsCall
from cupy_headnorm.headnorm import HeadNorm


class _Plan(NamedTuple):
    call: PartsCall
    launch: qk_norm_rope.PartsLaunch | None
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
    heads_axis = option_rules.checked_heads_axis(heads_axis)
    if len(parts) != len(norms):
        raise TypeError(
            "v is given and there is no v_norm; needs q and k only"
            if len(parts) > len(norms)
            else "no v is given; needs one for v_norm"
        )
    names = tuple(norms)
    q = find.view(parts[0], "q")
    library, device = q.library, q.layout.device
    views = {"q": q}
    for name, array in zip(names[1:], parts[1:], strict=True):
        views[name] = find.view_beside(q, array, name, of="q")
    on_gpu = device.kind == "cuda"
    if on_gpu:
        environment.import_cupy()
    stream = library.stream(device.index) if on_gpu else 0
    bound = {name: norm._part_beside(q) for name, norm in norms.items()}
    rope = tables.describe(names, q, positions, cos, sin, stream)
    makes: Sequence[Any] = (None,) * len(parts)
    if out is None:
        if on_gpu and not library.allocates_in_graphs:
            memory.refuse_allocation(stream)
        results, makes = zip(*(library.empty_like(v) for v in views.values()), strict=True)
        outs = {n: find.view(r, "result") for n, r in zip(names, results, strict=True)}
    else:
        results = out
        outs = {
            name: views[name]
            if target is array and library.takes_out
            else find.view_beside(q, target, "out", of="q")
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
        call = part_rules.describe(described, layouts, of_outs, turning, heads_axis)
        for name, view in outs.items():
            layout.check_out_layout(view.layout, f"out of {name}")
        runs = on_gpu and call.tokens and any(part.num_heads for part in call.parts)
        launch = qk_norm_rope.prepare(call, device.index, stream) if runs else None
        plan = _Plan(call, launch)
        store(_plans, key, plan)
    if out is not None:
        beside: dict[str, ArrayView | None] = {} if rope is None else {**rope.views}
        for name, (_, weight, bias) in bound.items():
            beside |= {f"the weight of {name}": weight, f"the bias of {name}": bias}
        _check_overlaps(views, outs, beside)
    if plan.launch is not None:
        run = qk_norm_rope.runner(plan.launch)
        remember(
            norms, tables, library, arrays, heads_axis, plan.launch, run, makes, views, outs, rope
        )
    if dry:
        return ()
    if plan.launch is not None:
        held = [part for _, *of_part in bound.values() for part in of_part]
        run(
            stream,
            [view.pointer for view in views.values()],
            [view.pointer for view in outs.values()],
            [0 if view is None else view.pointer for view in held],
            NO_ROPE if rope is None else rope.addresses,
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


def _check_overlaps(
    views: Mapping[str, ArrayView],
    outs: Mapping[str, ArrayView],
    beside: Mapping[str, ArrayView | None],
) -> None:
    """Refuse an `out` that shares bytes with anything but the part that it is the result of."""
    for name, out in outs.items():
        others = {f"out of {other}": view for other, view in outs.items() if other != name}
        layout.check_overlaps({**views, **others, **beside}, out, name, f"out of {name}")


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
