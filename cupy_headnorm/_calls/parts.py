"""The operation of a call on queries, keys and values: each has its norm, all share tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._arrays.views import ArrayView
from cupy_headnorm._calls import host, lengths
from cupy_headnorm._calls.lengths import Role
from cupy_headnorm._calls.operands import (
    BY_POSITIONS,
    GIVEN,
    Beside,
    Form,
    Given,
    Operation,
    Words,
    sources,
)
from cupy_headnorm._calls.parameters import Arrays, HeldNorm, Layouts, Parameters, identity
from cupy_headnorm._calls.tables import Pair, RopeCall, Tables
from cupy_headnorm._cuda.launcher import Launch, Sources
from cupy_headnorm._plans import qk_norm_rope
from cupy_headnorm._plans.parts_params import COS, PART_WORDS, POSITIONS, SIN
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm._rules import parts as part_rules
from cupy_headnorm._rules.parts import PartNorm, PartsCall


class _Bound(NamedTuple):
    """
    What the norms and tables hold on one device, kept in memory by being here.

    Who unloads them lets go of this too: `Parts.forget`.
    """

    identity: object
    addresses: tuple[int, ...]
    parameters: list[Parameters]
    tables: Pair | None


class Parts(Operation):
    """
    What `QKNorm` does to heads on one axis.

    See `operands.Operation` for what its methods do.
    """

    beside = ("positions", "cos", "sin")

    def __init__(self, norms: Mapping[str, HeldNorm], tables: Tables, heads_axis: int) -> None:
        self.forms: dict[int, Form] = {}
        self._heads_axis = option_rules.checked_heads_axis(heads_axis)
        self.names = tuple(norms)
        self._norms = dict(norms)
        self._tables = tables
        self._part = Role((self._heads_axis, -1), 2, broadcasts=False)
        self._bound: dict[tuple[Any, ...], _Bound] = {}
        for norm in norms.values():
            norm.tell_of_unloading(self)

    def given(self, q: Any, k: Any, v: Any, positions: Any, cos: Any, sin: Any, out: Any) -> Given:
        """Check how many arrays a caller gave, and take them."""
        parts, count = (q, k) if v is None else (q, k, v), len(self.names)
        if len(parts) != count:
            raise TypeError(
                "v is given and there is no v_norm; needs q and k only, and positions by keyword "
                "(positions=...)"
                if len(parts) > count
                else "no v is given; needs one for v_norm"
            )
        if out is not None:
            if not isinstance(out, (tuple, list)) or len(out) != count:
                found = f", not of {len(out)}" if isinstance(out, (tuple, list)) else ""
                raise TypeError(
                    f"out is a {type(out).__name__}; needs a tuple of {count} arrays{found}"
                )
            out = tuple(out)
        beside = (positions, cos, sin)
        if cos is None and sin is None and positions is not None:
            return Given(parts, beside, out, (positions,), BY_POSITIONS)
        return Given(parts, beside, out)

    def forget(self) -> None:
        """Let go of what a norm or the tables held, which they have unloaded."""
        self._bound = {}

    def bind(self, given: Given, key: tuple[Any, ...]) -> _Bound | None:
        place = (key[0], key[3], given.beside[0] is None)
        return self._bound.get(place) or self._bind(*place)

    def _bind(self, index: int, dtype: Any, without_positions: bool) -> _Bound | None:
        parameters = [norm.ready.get(index) for norm in self._norms.values()]
        tables = None if without_positions else self._tables.seen.get((index, dtype))
        ready = [found for found in parameters if found is not None]
        if len(ready) < len(parameters) or (tables is None and not without_positions):
            return None
        addresses: tuple[int, ...] = sum((p.addresses for p in ready), ())
        if tables is not None:
            addresses = (*addresses, tables.cos.pointer, tables.sin.pointer)
        of_norms = (p.identity for p in ready)
        stands_for = identity(*of_norms, self._tables.identity, self._heads_axis)
        bound, kept = _Bound(stands_for, addresses, ready, tables), self._bound
        kept[index, dtype, without_positions] = bound
        still = [norm.ready.get(index) for norm in self._norms.values()]
        # By what they are: equality would compare the arrays that they hold.
        unloaded = any(a is not b for a, b in zip(still, parameters, strict=True))
        if unloaded or (tables and self._tables.seen.get((index, dtype)) is not tables):
            kept.clear()  # unloaded meanwhile
        return bound

    def roles(self, given: Given) -> tuple[Role, ...]:
        rope = self._tables.rope
        in_rows = rope is not None and rope.sections
        positions = lengths.ROWS_OF_POSITIONS if in_rows else lengths.POSITIONS
        of_beside = zip(given.beside, (positions, lengths.TABLE, lengths.TABLE), strict=True)
        parts = [self._part] * len(given.parts)
        beside = [role for array, role in of_beside if array is not None]
        return (*parts, *beside, *(parts if given.results == GIVEN else ()))

    def out_of(self, name: str) -> str:
        return f"out of {name}"

    def lying_beside(self, first: ArrayView, given: Given, stream: int) -> Beside:
        bound = {name: norm.in_memory_of(first) for name, norm in self._norms.items()}
        positions, cos, sin = given.beside
        rope = self._tables.describe(self.names, first, positions, cos, sin, stream)
        norms = tuple(
            PartNorm(norm.options, *(view and view.layout for view in found.views))
            for norm, found in zip(self._norms.values(), bound.values(), strict=True)
        )
        views: dict[str, ArrayView | None] = {} if rope is None else {**rope.views}
        for name, found in bound.items():
            weight, bias = found.views
            views |= {f"the weight of {name}": weight, f"the bias of {name}": bias}
        held = sum((found.views for found in bound.values()), ())
        of_caller: tuple[ArrayView, ...] = ()
        if rope is not None and rope.positions is not None:
            of_caller, held = (rope.positions,), (*held, rope.cos, rope.sin)
        elif rope is not None:
            of_caller = (rope.cos, rope.sin)
        arguments = (norms, None if rope is None else rope.rotation, self._heads_axis)
        return Beside(arguments, views, of_caller, held, rope)

    def describe(self, beside: Beside, parts: Layouts, results: Layouts) -> PartsCall:
        norms, rotation, heads_axis = beside.arguments
        of_norms, xs, outs = (
            dict(zip(self.names, of_all, strict=True)) for of_all in (norms, parts, results)
        )
        return part_rules.describe(of_norms, xs, outs, rotation, heads_axis)

    def axes_before_heads(self, beside: Beside, q: Layout) -> int | None:
        return None  # a part's role sets the heads' axis apart

    def prepare(self, call: PartsCall, index: int, stream: int, config: Any) -> Launch | None:
        if not call.tokens or not any(part.num_heads for part in call.parts):
            return None
        return qk_norm_rope.prepare(call, index, stream, config)

    def over(self, launch: Launch, before: int, after: int) -> Launch | None:
        return qk_norm_rope.over(launch, before, after)

    def sources(self, given: Given) -> Sources:
        of_parts = PART_WORDS[: len(self.names)]
        there = zip(given.beside, (POSITIONS, COS, SIN), strict=True)
        of_caller = tuple(word for array, word in there if array is not None)
        held = tuple(word for part in of_parts for word in part[2:])
        if given.beside[0] is not None:
            held = (*held, COS, SIN)
        parts, results = (tuple(part[i] for part in of_parts) for i in range(2))
        return sources(Words(parts, results, of_caller, held), given.results)

    def on_host(self, call: PartsCall, beside: Beside, parts: Arrays, outs: Arrays) -> None:
        if call.tokens == 0:
            return
        rope: RopeCall | None = beside.rope
        rotate = None if rope is None else rope.in_numpy(call)
        views = [None if view is None else view.as_numpy() for view in beside.held]
        parameters = [tuple(views[2 * i : 2 * i + 2]) for i in range(len(parts))]
        host.apply_parts(call, parts, parameters, outs, rotate)
