"""
One call from array to array.

`apply` runs a call whose like this thread has run before: it glances at the arrays (`quick` has the
libraries that can be glanced at), finds parameters that are `ready` on the device, looks the call
up by what was `seen`, and launches. Everything else goes step by step: views, checks, a plan, and
the call is remembered.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from cupy_headnorm._arrays import find, layout
from cupy_headnorm._arrays.find import quick
from cupy_headnorm._arrays.layout import Device, is_dense
from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._arrays.views import ArrayView, Library
from cupy_headnorm._calls import host, lengths
from cupy_headnorm._calls.parameters import Norm, Parameters
from cupy_headnorm._cuda import compiler, environment, memory
from cupy_headnorm._plans import head_norm
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._rules import norm as norm_rules
from cupy_headnorm._rules.norm import NormCall
from cupy_headnorm._rules.options import NormOptions


class _Call(NamedTuple):
    """A call that this thread has run before."""

    run: Callable[[int, int, int, int, int], None]
    """Launches, from the addresses of x, out, weight and bias, and a stream."""
    make: Any
    """A function of x that makes the result, where none is given; else None."""
    reach: tuple[tuple[int, int], ...]
    """Of x, out, and a function's weight and bias: first byte and byte after the last, from the
    address."""
    alignment: int
    """That the result's address needs, where none is given."""


class _Family(NamedTuple):
    """A call whose like over any other number of tokens can be derived from it."""

    call: _Call
    launch: head_norm.Launch
    tokens: int
    steps: tuple[int, int]
    """Bytes from one token to the next in x and out."""
    out_key: tuple[Any, ...]
    """The result's, as `_result_key` has it."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], _Call] = {}
        self.families: dict[tuple[Any, ...], _Family] = {}


_thread = _Thread()
_MAX_CALLS = 1024
"""In each cache, which starts over when it meets more. One takes 2 KiB: 2 MiB a thread. A server
that decodes batches of 1 to 256 in two layouts has half as many."""


@untraced
def apply(norm: Norm, x: Any, weight: Any = None, bias: Any = None, out: Any = None) -> Any:
    """Run a norm on any array, with a weight beside it or the one it holds."""
    library = quick.get(type(x))
    if library is None or (seen := library.glance(x)) is None:
        return step_by_step(norm, x, weight, bias, out)
    x_address, x_key = seen
    out_key: tuple[Any, ...] | None
    key: tuple[Any, ...]
    if norm.held is None:
        parameters = _glance_parameters(norm, library, weight, bias)
    else:
        parameters = norm.ready.get(x_key[0])
    if parameters is None:
        return step_by_step(norm, x, weight, bias, out)
    stream = library.stream(x_key[0])  # that on which a result is made, too
    if out is x:
        out_address, out_key = x_address, x_key
        key = (parameters.identity, x_key)
    elif out is None:
        if not library.allocates_in_graphs:
            memory.refuse_allocation(stream)
        out_address, out_key = 0, None
        key = (parameters.identity, x_key, None)
    else:
        seen = library.glance(out) if quick.get(type(out)) is library else None
        if seen is None:
            return step_by_step(norm, x, weight, bias, out)
        out_address, out_key = seen
        key = (parameters.identity, x_key, out_key)
    call, result = _thread.calls.get(key), None
    if call is None:
        call, result = _of_other_length(library, key, x, x_key, out_key)
        if call is None:
            return step_by_step(norm, x, weight, bias, out)
    if out is None:
        if result is None:
            result = call.make(x)
        out_address = library.address(result)
        if not out_address or out_address & (call.alignment - 1):
            return step_by_step(norm, x, weight, bias, None)
    elif (out is not x or norm.held is None) and _may_overlap(
        call, x_address, out_address, parameters, in_place=out_key == x_key
    ):
        return step_by_step(norm, x, weight, bias, out)
    call.run(x_address, out_address, parameters.weight_address, parameters.bias_address, stream)
    if out is None:
        return result
    library.wrote((out,))
    return out


def _glance_parameters(norm: Norm, library: Library, weight: Any, bias: Any) -> Parameters | None:
    """Look at a function's weight and bias; None where they need more than a look."""
    addresses = [0, 0]
    keys: list[tuple[Any, ...] | None] = [None, None]
    for i, array in enumerate((weight, bias)):
        if array is not None:
            seen = library.glance(array) if quick.get(type(array)) is library else None
            if seen is None:
                return None
            addresses[i], keys[i] = seen
    return Parameters((norm.options, *keys), addresses[0], addresses[1])


def _may_overlap(call: _Call, x: int, out: int, parameters: Parameters, *, in_place: bool) -> bool:
    """Tell whether an input and `out` may share bytes, other than x and out in place."""
    of_x, of_out, of_weight, of_bias = call.reach
    weight, bias = parameters.weight_address, parameters.bias_address
    first, end = out + of_out[0], out + of_out[1]
    return (
        (x + of_x[0] < end and first < x + of_x[1] and not (in_place and x == out))
        or (weight + of_weight[0] < end and first < weight + of_weight[1])
        or (bias + of_bias[0] < end and first < bias + of_bias[1])
    )


def _family_key(
    identity: object, x_key: tuple[Any, ...], out_key: tuple[Any, ...] | None, lead: int
) -> tuple[Any, ...]:
    """Return all that is seen of a call, but for the lengths of its axes up to `lead`."""
    index, shape, strides, *rest = x_key
    of_result = None if out_key is None else _result_key(shape, out_key, lead)
    return (identity, index, len(shape), shape[lead + 1 :], strides[lead:], *rest, of_result)


def _result_key(shape: tuple[int, ...], out_key: tuple[Any, ...], lead: int) -> tuple[Any, ...]:
    """Return what a family's key says of the result."""
    index, out_shape, strides, *rest = out_key
    return (index, out_shape == shape, strides[lead:], *rest)


def _of_other_length(
    library: Library,
    key: tuple[Any, ...],
    x: Any,
    x_key: tuple[Any, ...],
    out_key: tuple[Any, ...] | None,
) -> tuple[_Call | None, Any]:
    """
    Derive a call from one that differs in the number of tokens alone, and remember it.

    Returns it, and the result that was made on the way where none is given.
    """
    shape, strides = x_key[1:3]
    out_strides = strides if out_key is None or out_key[1] != shape else out_key[2]
    for lead in lengths.leads(shape[:-1], strides, out_strides):
        family = _thread.families.get(_family_key(key[0], x_key, out_key, lead))
        if family is not None:
            break
    else:
        return None, None
    tokens = math.prod(shape[: lead + 1])
    if tokens < 2:
        return None, None
    rows = family.launch.params.rows // family.tokens * tokens
    launch = head_norm.over_rows(family.launch, rows)
    if launch is None:
        return None, None
    result = None
    if out_key is None:
        # What its library makes of x decides the strides: look, before they are relied on.
        result = family.call.make(x)
        seen = library.glance(result)
        if seen is None or _result_key(shape, seen[1], lead) != family.out_key:
            return None, None
        if lead not in lengths.leads(shape[:-1], strides, seen[1][2]):
            return None, None
        # `make` may be of an x without the odd stride along an axis of length 1 that this one has.
        if not is_dense(shape, seen[1][2]):
            return None, None
    more = tokens - family.tokens
    grown = tuple(
        (first + more * min(step, 0), end + more * max(step, 0))
        for (first, end), step in zip(family.call.reach[:2], family.steps, strict=True)
    )
    reach = (*grown, *family.call.reach[2:])
    call = family.call._replace(run=head_norm.runner(launch), reach=reach)
    store(_thread.calls, key, call)
    return call, result


def store(cache: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    """Keep a value in a bounded cache."""
    if len(cache) >= _MAX_CALLS:
        cache.clear()
    cache[key] = value


class _Plan(NamedTuple):
    call: NormCall
    launch: head_norm.Launch | None
    """None where the reference runs, or nothing."""


_plans: dict[tuple[Any, ...], _Plan] = {}
"""Those of all threads."""


def step_by_step(
    norm: Norm,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    out: Any = None,
    *,
    config: LaunchConfig | None = None,
    dry: bool = False,
) -> Any:
    """
    Run a norm with every check, plan it where that is new, and remember the call.

    `dry` stops short of the arithmetic, with all prepared for it.
    """
    x_view = find.view(x, "x")
    library, device = x_view.library, x_view.layout.device
    on_gpu = device.kind == "cuda"
    if on_gpu:
        environment.import_cupy()
    stream = library.stream(device.index) if on_gpu else 0
    inputs: dict[str, ArrayView | None] = {"x": x_view}
    if norm.held is None:
        for name, array in (("weight", weight), ("bias", bias)):
            inputs[name] = None if array is None else find.view_beside(x_view, array, name)
        weight_view, bias_view = inputs["weight"], inputs["bias"]
    else:
        weight_view, bias_view = norm.held(norm, x_view).views
    make = None
    if out is None:
        if on_gpu and not library.allocates_in_graphs:
            memory.refuse_allocation(stream)
        result, make = library.empty_like(x_view)
        out_view = find.view(result, "out")
    elif out is x and library.takes_out:
        out_view = x_view
    else:
        out_view = find.view_beside(x_view, out, "out")
    if out is not None and not out_view.writeable:
        raise ValueError("out is read-only; needs a writeable array")
    plan = _planned(norm.options, x_view, weight_view, bias_view, out_view, stream, config)
    if out is not None:
        layout.check_overlaps(inputs, out_view)
    if plan.launch is not None:
        run = head_norm.runner(plan.launch)
        if config is None:
            views = (x_view, out_view, weight_view, bias_view)
            _remember(norm, (x, weight, bias, out), views, plan.launch, run, make)
    if dry:
        return None
    if plan.launch is not None:
        weight_address = weight_view.pointer if weight_view else 0
        bias_address = bias_view.pointer if bias_view else 0
        run(x_view.pointer, out_view.pointer, weight_address, bias_address, stream)
        library.launched(tuple(inputs.values()), device.index, stream)
    elif not on_gpu:
        host.apply(
            plan.call,
            x_view.as_numpy(),
            weight_view and weight_view.as_numpy(),
            bias_view and bias_view.as_numpy(),
            out_view.as_numpy(),
        )
    if out is None:
        return library.deliver(result, x_view)
    library.wrote((out,))
    return out


def _remember(
    norm: Norm,
    arrays: tuple[Any, Any, Any, Any],
    views: tuple[ArrayView, ArrayView, ArrayView | None, ArrayView | None],
    launch: head_norm.Launch,
    run: Callable[[int, int, int, int, int], None],
    make: Callable[[Any], Any] | None,
) -> None:
    """Let `apply` find this call, if a glance at its arrays tells that it is the same again."""
    x, weight, bias, out = arrays
    x_view, out_view, weight_view, bias_view = views
    library = quick.get(type(x))
    if library is None or (out is not None and quick.get(type(out)) is not library):
        return
    seen, out_seen = library.glance(x), library.glance(out_view.owner)
    if seen is None or out_seen is None:
        return
    if norm.held is None:
        found = _glance_parameters(norm, library, weight, bias)
    else:
        found = norm.ready.get(seen[1][0])
    if found is None:
        return
    identity, x_key, out_key = found.identity, seen[1], out_seen[1]
    reach = tuple((0, 0) if view is None else view.layout.extent(0) for view in views)
    call = _Call(run, make, reach, out_view.layout.alignment)
    key = (identity, x_key) if out is x else (identity, x_key, None if out is None else out_key)
    store(_thread.calls, key, call)
    x_layout, out_layout = x_view.layout, out_view.layout
    lead = lengths.tokens_axis(
        norm.options,
        x_layout,
        out_layout,
        weight_view and weight_view.layout,
        bias_view and bias_view.layout,
    )
    if lead is not None:
        family = _Family(
            call,
            launch,
            math.prod(x_layout.shape[: lead + 1]),
            (x_layout.strides[lead], out_layout.strides[lead]),
            _result_key(x_key[1], out_key, lead),
        )
        family_key = _family_key(identity, x_key, None if out is None else out_key, lead)
        store(_thread.families, family_key, family)


def _planned(
    options: NormOptions,
    x: ArrayView,
    weight: ArrayView | None,
    bias: ArrayView | None,
    out: ArrayView,
    stream: int,
    config: LaunchConfig | None,
) -> _Plan:
    layouts = (x.layout, weight and weight.layout, bias and bias.layout, out.layout)
    key = (options, config, *layouts)
    plan = _plans.get(key)
    if plan is None:
        call = norm_rules.describe(options, *layouts)
        layout.check_out_layout(out.layout)
        plan = _Plan(call, _prepared(call, x.layout.device, stream, config))
        store(_plans, key, plan)
    return plan


def _prepared(
    call: NormCall, device: Device, stream: int, config: LaunchConfig | None
) -> head_norm.Launch | None:
    if device.kind == "cpu":
        if config is not None:
            raise ValueError("x is in host memory; a launch configuration needs CUDA memory")
        return None
    if call.rows == 0:
        return None
    return head_norm.prepare(call, device.index, stream, config)


def plan(
    options: NormOptions, x: ArrayView, weight: ArrayView | None, bias: ArrayView | None
) -> LaunchConfig:
    """Return the geometry for a result laid out like `x`; that of an H100 for host memory."""
    call = norm_rules.describe(
        options, x.layout, weight and weight.layout, bias and bias.layout, x.layout
    )
    if x.layout.device.kind == "cpu":
        return head_norm.plan(call)
    return head_norm.plan(call, compiler.limits(x.layout.device.index))
