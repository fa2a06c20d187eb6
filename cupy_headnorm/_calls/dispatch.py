"""
One call from array to array, of one norm or of q, k and v.

`hit` runs a call whose like this thread has run before: it glances at the arrays (`quick` has the
libraries that can be glanced at), takes what the operation holds on their device, looks the call up
by what was seen, and launches. `lane` and `lane_beside` are the same, written out for the calls
that matter most: one array, and a norm that holds its weight or takes it with the call. All else
goes `step_by_step`: views, checks, a plan, and the call is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from cupy_headnorm._arrays import find, layout
from cupy_headnorm._arrays.find import quick
from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._arrays.views import ArrayView
from cupy_headnorm._calls import operands, remembered
from cupy_headnorm._calls.operands import (
    GIVEN,
    IN_PLACE,
    NEW,
    WITH_WEIGHT,
    Beside,
    Given,
    Operation,
)
from cupy_headnorm._calls.parameters import HeldNorm, Norm
from cupy_headnorm._calls.remembered import thread
from cupy_headnorm._cuda import compiler, environment, launcher, memory
from cupy_headnorm._cuda.launcher import Launch
from cupy_headnorm._plans import head_norm
from cupy_headnorm._plans.geometry import LaunchConfig


@untraced
def lane(norm: HeldNorm, x: Any, out: Any) -> Any:
    """Run a norm that holds its weight on one array."""
    library = quick.get(type(x))
    if library is not None and (seen := library.glance(x)) is not None:
        address, key = seen
        bound = norm.ready.get(key[0])
        if bound is not None:
            stream = library.stream(key[0])  # that on which a result is made, too
            identity, (weight, bias), _ = bound
            if out is x:
                call = thread.calls.get((identity, IN_PLACE, key))
                if call is not None:
                    call[0](stream, (address, weight, bias))
                    library.wrote((x,))
                    return x
            elif out is None:
                if not library.allocates_in_graphs:
                    memory.refuse_allocation(stream)
                call = thread.calls.get((identity, NEW, key))
                if call is not None:
                    result = call.makes[0](x)
                    target = library.address(result)
                    if target and not target & (call.alignments[0] - 1):
                        call[0](stream, (address, target, weight, bias))
                        return result
            elif quick.get(type(out)) is library and (seen := library.glance(out)) is not None:
                target, of_out = seen
                call = thread.calls.get((identity, GIVEN, key, of_out))
                if call is not None and remembered.lie_apart(call, address, target):
                    call[0](stream, (address, target, weight, bias))
                    library.wrote((out,))
                    return out
    results = None if out is None else (out,)
    return run(norm, Given((x,), _NOTHING_BESIDE, results, ()))[0]


_NOTHING_BESIDE = (None, None)


@untraced
def lane_beside(norm: Norm, x: Any, weight: Any, bias: Any, out: Any) -> Any:
    """Run a norm on one array, with the weight and bias that come with the call."""
    library = quick.get(type(x))
    if (
        library is not None
        and weight is not None
        and bias is None
        and (seen := library.look((x, weight))) is not None
    ):
        addresses, keys = seen
        stream = library.stream(keys[0][0])
        if out is x:
            call = thread.calls.get((norm.identity, WITH_WEIGHT | IN_PLACE, *keys))
            if call is not None and remembered.lie_apart(call, *addresses):
                call[0](stream, addresses)
                library.wrote((x,))
                return x
        elif out is None:
            if not library.allocates_in_graphs:
                memory.refuse_allocation(stream)
            call = thread.calls.get((norm.identity, WITH_WEIGHT | NEW, *keys))
            if call is not None:
                result = call.makes[0](x)
                target = library.address(result)
                if target and not target & (call.alignments[0] - 1):
                    call[0](stream, (*addresses, target))
                    return result
    results = None if out is None else (out,)
    return run(norm, Given((x,), (weight, bias), results))[0]


@untraced
def run(operation: Operation, given: Given) -> tuple[Any, ...]:
    """Run any call; return its results."""
    results = hit(operation, given)
    return step_by_step(operation, given) if results is None else results


def hit(operation: Operation, given: Given) -> tuple[Any, ...] | None:
    """Run a call whose like this thread has run before; None where there is none."""
    library = quick.get(type(given.parts[0]))
    if library is None:
        return None
    seen = operands.glance(operation, library, given)
    if seen is None:
        return None
    key, addresses, bound = seen
    stream = library.stream(key[2][0])  # that on which results are made, too
    if given.out is None and not library.allocates_in_graphs:
        memory.refuse_allocation(stream)
    call, results, out = thread.calls.get(key), None, given.out
    if call is None:
        call, results = remembered.derive(operation, library, given, seen)
        if call is None:
            return None
    elif out is not None and len(addresses) > 1 and remembered.may_overlap(call, seen, given):
        return None
    if out is not None:
        call.run(stream, addresses + bound.addresses)
        library.wrote(out)
        return out
    results = remembered.made(call, given) if results is None else results
    for result, alignment in zip(results, call.alignments, strict=True):
        target = library.address(result)
        if not target or target & (alignment - 1):
            return None
        addresses += (target,)
    call.run(stream, addresses + bound.addresses)
    return results


Make = Callable[[Any], Any] | None


class _Plan(NamedTuple):
    call: Any
    """As `Operation.describe` gives it."""
    launch: Launch | None
    """None where the reference runs, or nothing."""


plans: dict[tuple[Any, ...], _Plan] = {}
"""Those of all threads."""


def step_by_step(
    operation: Operation,
    given: Given,
    *,
    config: LaunchConfig | None = None,
    dry: bool = False,
) -> tuple[Any, ...]:
    """
    Run a call with every check, plan it where that is new, and remember it.

    `dry` stops short of the arithmetic, with all prepared for it.
    """
    parts = _views(operation.names, given.parts)
    first = parts[0]
    library, device = first.library, first.layout.device
    on_gpu = device.kind == "cuda"
    if on_gpu:
        environment.import_cupy()
    stream = library.stream(device.index) if on_gpu else 0
    beside = operation.lying_beside(first, given, stream)
    results, outs, makes = _results(operation, given, parts, stream)
    plan = _planned(operation, beside, parts, outs, stream, config)
    if given.out is not None:
        _check_overlaps(operation, parts, outs, beside)
    if plan.launch is not None:
        runs = launcher.runners(plan.launch, operation.form(given).sources)
        launch = runs(plan.launch)
        arrays = (*parts, *beside.given, *(outs if given.results == GIVEN else ()))
        seen = None
        if config is None and quick.get(type(given.parts[0])) is library:
            seen = operands.glance(operation, library, given)
        if seen is not None:
            planned = remembered.Planned(
                plan.launch, launch, runs, makes, arrays, outs,
                operation.axes_before_heads(beside, first.layout),
            )  # fmt: skip
            remembered.remember(operation, library, given, seen, planned)
    if dry:
        return ()
    if plan.launch is not None:
        new = outs if given.results == NEW else ()
        addresses = tuple([v.pointer if v else 0 for v in (*arrays, *new, *beside.held)])
        launch(stream, addresses)
        library.launched(arrays, device.index, stream)
    elif not on_gpu:
        operation.on_host(
            plan.call, beside, tuple(v.as_numpy() for v in parts), tuple(v.as_numpy() for v in outs)
        )
    if given.out is None:
        return tuple(map(library.deliver, results, parts))
    library.wrote(results)
    return results


def prepare(operation: Operation, calls: Iterable[Given], *, asked: bool) -> None:
    """Do all of some calls but their arithmetic; `asked` tells whether a caller named the `out`."""
    for given in calls:
        try:
            step_by_step(operation, given, dry=True)
        except (TypeError, ValueError):
            # Parts may be arrays that cannot be written; then there is nothing to prepare.
            if asked or given.results != IN_PLACE:
                raise


def _views(names: tuple[str, ...], parts: tuple[Any, ...]) -> tuple[ArrayView, ...]:
    first = find.view(parts[0], names[0])
    others = (
        find.view_beside(first, array, name, of=names[0])
        for name, array in zip(names[1:], parts[1:], strict=True)
    )
    return (first, *others)


def _results(
    operation: Operation, given: Given, parts: tuple[ArrayView, ...], stream: int
) -> tuple[tuple[Any, ...], tuple[ArrayView, ...], tuple[Make, ...]]:
    """Make the results, or view those given; the last is what makes more of them."""
    first, library = parts[0], parts[0].library
    if given.out is None:
        if first.layout.device.kind == "cuda" and not library.allocates_in_graphs:
            memory.refuse_allocation(stream)
        made = [library.empty_like(view) for view in parts]
        results = tuple(result for result, _ in made)
        outs = tuple(find.view(result, "result") for result in results)
        return results, outs, tuple(make for _, make in made)
    outs = tuple(
        view
        if out is part and library.takes_out
        else find.view_beside(first, out, "out", of=operation.names[0])
        for out, part, view in zip(given.out, given.parts, parts, strict=True)
    )
    for name, out in zip(operation.names, outs, strict=True):
        if not out.writeable:
            raise ValueError(f"{operation.out_of(name)} is read-only; needs a writeable array")
    return given.out, outs, ()


def _check_overlaps(
    operation: Operation,
    parts: tuple[ArrayView, ...],
    outs: tuple[ArrayView, ...],
    beside: Beside,
) -> None:
    """Refuse an `out` that shares bytes with anything but the part that it is the result of."""
    views = dict(zip(operation.names, parts, strict=True))
    targets = dict(zip(operation.names, outs, strict=True))
    for name, out in targets.items():
        others = {operation.out_of(n): view for n, view in targets.items() if n != name}
        layout.check_overlaps(
            {**views, **others, **beside.views}, out, name, operation.out_of(name)
        )


def _planned(
    operation: Operation,
    beside: Beside,
    parts: tuple[ArrayView, ...],
    outs: tuple[ArrayView, ...],
    stream: int,
    config: LaunchConfig | None,
) -> _Plan:
    layouts = (tuple(v.layout for v in parts), tuple(v.layout for v in outs))
    key = (operation.names, beside.arguments, *layouts, config)
    plan = plans.get(key)
    if plan is None:
        call = operation.describe(beside, *layouts)
        for name, out in zip(operation.names, outs, strict=True):
            layout.check_out_layout(out.layout, operation.out_of(name))
        device, launch = parts[0].layout.device, None
        if device.kind == "cuda":
            launch = operation.prepare(call, device.index, stream, config)
        elif config is not None:
            raise ValueError("x is in host memory; a launch configuration needs CUDA memory")
        plan = _Plan(call, launch)
        remembered.store(plans, key, plan)
    return plan


def plan(norm: Norm, x: Any) -> LaunchConfig:
    """Return the geometry for a result laid out like `x`; that of an H100 for host memory."""
    first = find.view(x, "x")
    beside = norm.lying_beside(first, Given((x,), _NOTHING_BESIDE, None), 0)
    call = norm.describe(beside, (first.layout,), (first.layout,))
    if first.layout.device.kind == "cpu":
        return head_norm.plan(call)
    return head_norm.plan(call, compiler.limits(first.layout.device.index))
