"""A norm's checked options, and the weight and bias that go with them in one memory."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._arrays.views import ArrayView
from cupy_headnorm._calls import host, lengths
from cupy_headnorm._calls.lengths import Role
from cupy_headnorm._calls.operands import (
    GIVEN,
    Beside,
    Form,
    Given,
    Operation,
    Words,
    sources,
)
from cupy_headnorm._calls.uploads import Held, View
from cupy_headnorm._cuda.launcher import Launch, Sources
from cupy_headnorm._plans import head_norm
from cupy_headnorm._rules import heads as head_rules
from cupy_headnorm._rules import norm as norm_rules
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm._rules.norm import NormCall
from cupy_headnorm._rules.options import Kind, NormOptions, Rounding

if TYPE_CHECKING:  # one norm needs no rules of several, which take 2 ms to import
    from cupy_headnorm._rules.parts import PartNorm

Layouts = tuple[Layout, ...]
Arrays = tuple[np.ndarray, ...]


class Parameters(NamedTuple):
    """Weight and bias in one memory."""

    identity: object
    """Of options and layouts: equal for all parameters that share their plans."""
    addresses: tuple[int, ...]
    """Of weight and bias, 0 where there is none; empty where a call brings its own."""
    views: tuple[ArrayView | None, ArrayView | None] = (None, None)


@functools.lru_cache(maxsize=4096)
def identity(*_: Any) -> object:
    """Return what stands for the arguments: it hashes in a tenth of their time."""
    return object()


def _bound(options: NormOptions, views: tuple[ArrayView | None, ArrayView | None]) -> Parameters:
    """Bind views of a weight and a bias to the options they are used with."""
    layouts = (view and view.layout for view in views)
    addresses = tuple(view.pointer if view else 0 for view in views)
    return Parameters(identity(options, *layouts), addresses, views)


class Norm(Operation):
    """
    A norm whose weight and bias come with each call: the operation of one array.

    See `operands.Operation` for what its methods do.
    """

    names = ("x",)
    beside = ("weight", "bias")

    def __init__(self, options: NormOptions) -> None:
        self.forms: dict[int, Form] = {}
        self.options = options
        self.identity = identity(options)
        self._parameters = Parameters(self.identity, ())

    def bind(self, given: Given, key: tuple[Any, ...]) -> Parameters | None:
        return self._parameters

    def roles(self, given: Given) -> tuple[Role, ...]:
        beside = [lengths.PARAMETER for array in given.beside if array is not None]
        return (_X, *beside, *([_X] if given.results == GIVEN else ()))

    def out_of(self, name: str) -> str:
        return "out"

    def lying_beside(self, first: ArrayView, given: Given, stream: int) -> Beside:
        weight, bias = (
            None if array is None else find.view_beside(first, array, name)
            for array, name in zip(given.beside, self.beside, strict=True)
        )
        return self._lying(weight, bias, tuple(v for v in (weight, bias) if v is not None), ())

    def _lying(self, weight: View, bias: View, given: Any, held: Any) -> Beside:
        arguments = (self.options, weight and weight.layout, bias and bias.layout)
        return Beside(arguments, {"weight": weight, "bias": bias}, given, held)

    def describe(self, beside: Beside, parts: Layouts, results: Layouts) -> NormCall:
        options, weight, bias = beside.arguments
        return norm_rules.describe(options, parts[0], weight, bias, results[0])

    def axes_before_heads(self, beside: Beside, x: Layout) -> int | None:
        options, weight, bias = beside.arguments
        return head_rules.axes_before_heads(options, weight, bias, x)

    def prepare(self, call: NormCall, index: int, stream: int, config: Any) -> Launch | None:
        return head_norm.prepare(call, index, stream, config) if call.rows else None

    def over(self, launch: Launch, before: int, after: int) -> Launch | None:
        return head_norm.over(launch, before, after)

    def sources(self, given: Given) -> Sources:
        parameters = zip(given.beside, _PARAMETERS, strict=True)
        there = tuple(word for array, word in parameters if array is not None)
        return sources(Words((head_norm.X,), (head_norm.OUT,), there, ()), given.results)

    def on_host(self, call: NormCall, beside: Beside, parts: Arrays, outs: Arrays) -> None:
        weight, bias = (view and view.as_numpy() for view in beside.views.values())
        host.apply(call, parts[0], weight, bias, outs[0])


class HeldNorm(Norm):
    """A norm that holds its weight and bias, in each memory where they were needed."""

    def __init__(self, options: NormOptions, held: Held) -> None:
        super().__init__(options)
        self._held = held
        self._others: dict[int, HeldNorm] = {}
        self._told: list[weakref.ref[Any]] = []
        self.ready: dict[int, Parameters] = {}
        """What is held on CUDA devices, by index."""

    def for_heads_axis(self, heads_axis: Any) -> HeldNorm:
        """Return the same norm for heads on another axis."""
        axis = option_rules.checked_heads_axis(heads_axis)
        if axis == self.options.heads_axis:
            return self
        found = self._others.get(axis)
        if found is None:
            made = HeldNorm(self.options._replace(heads_axis=axis), self._held)
            found = self._others.setdefault(axis, made)
        return found

    def with_result_dtype(self, result: str) -> HeldNorm:
        """Return the same norm, which refuses x whose dtype is not the model's own result's."""
        return HeldNorm(self.options._replace(result=result), self._held)

    @property
    def devices(self) -> set[int]:
        """Indices of the CUDA devices that weight and bias were uploaded to."""
        return set(self._held.on_device)

    @property
    def part(self) -> PartNorm:
        """The norm as one of several, as it lies in host memory."""
        from cupy_headnorm._rules.parts import PartNorm

        weight, bias = self._held.on_host
        return PartNorm(self.options, weight and weight.layout, bias and bias.layout)

    def in_memory_of(self, x: ArrayView) -> Parameters:
        """Return weight and bias in the memory of `x`, uploaded if need be."""
        device = x.layout.device
        if device.kind == "cpu":
            return _bound(self.options, self._held.on_host)
        found = self.ready.get(device.index)
        if found is None:
            self._held.refuse_capture(x)
            views = self._held.on(device.index)
            found = self.ready[device.index] = _bound(self.options, views)
            if self._held.on_device.get(device.index) is not views:  # unloaded meanwhile
                self.ready.pop(device.index, None)
        return found

    def load(self, index: int) -> None:
        """Upload to a CUDA device, once."""
        self._held.on(index)

    def tell_of_unloading(self, holder: Any) -> None:
        """Let `holder.forget` be called when weight and bias are unloaded, while it lives."""
        self._told = [ref for ref in self._told if ref() is not None] + [weakref.ref(holder)]

    def unload(self) -> None:
        """Wait for the work in flight and free every device copy."""
        self._held.unload([norm.forget for norm in (self, *self._others.values())])

    def forget(self) -> None:
        """Let go of what was held on devices, and let others who knew it."""
        self.ready.clear()
        for ref in self._told:
            holder = ref()
            if holder is not None:
                holder.forget()

    def bind(self, given: Given, key: tuple[Any, ...]) -> Parameters | None:
        return self.ready.get(key[0])

    def lying_beside(self, first: ArrayView, given: Given, stream: int) -> Beside:
        weight, bias = self.in_memory_of(first).views
        return self._lying(weight, bias, (), (weight, bias))

    def sources(self, given: Given) -> Sources:
        return sources(Words((head_norm.X,), (head_norm.OUT,), (), _PARAMETERS), given.results)


_PARAMETERS = (head_norm.WEIGHT, head_norm.BIAS)
_X = Role((-1,), 1, broadcasts=False)


class _MayChange(Exception):
    """An option is of a type whose values may change."""


_IMMUTABLE = {bool, float, int, str, type(None)}


def _made(
    kind: Kind,
    eps: float,
    num_heads: int | None,
    head_dim: int | None,
    heads_axis: int,
    weight_offset: float,
    rounding: Rounding,
) -> Norm:
    return Norm(
        option_rules.options(
            kind,
            eps=eps,
            num_heads=num_heads,
            head_dim=head_dim,
            heads_axis=heads_axis,
            weight_offset=weight_offset,
            rounding=rounding,
        )
    )


@functools.lru_cache(maxsize=256, typed=True)
def _known(*options: Any) -> Norm:
    if not _IMMUTABLE.issuperset(map(type, options)):
        raise _MayChange
    return _made(*options)


@untraced
def of_options(*options: Any) -> Norm:
    """Return the norm of a function's arguments, checked once where they cannot change."""
    try:
        return _known(*options)
    except (_MayChange, TypeError):  # an option that has no hash, or is wrong
        pass
    return _made(*options)
