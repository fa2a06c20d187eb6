"""The arrays of a call, as the caller gave them, and what a glance tells of them."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._arrays.views import ArrayView, Library
from cupy_headnorm._calls.lengths import Arrays, Role
from cupy_headnorm._cuda.launcher import Launch, Sources

NEW, GIVEN, IN_PLACE = 0, 1, 2
"""Where results go: to new arrays, to others than the parts, or to the parts themselves."""
_FIRST_BESIDE = 4
WITH_WEIGHT, BY_POSITIONS = _FIRST_BESIDE, _FIRST_BESIDE
"""Bits of calls with the first of what may lie beside the parts alone."""


class Given:
    """
    What a caller gave: the parts, what lies beside them, and where results go.

    Attributes
    ----------
    parts : tuple of arrays
        ``(x,)``, or q, k and v.
    beside : tuple
        As many entries as the operation has names for; None for an array that is not there.
    out : tuple of arrays or None
    results : int
        `NEW`, `GIVEN` or `IN_PLACE`.
    arrays : tuple of arrays
        All that are there: parts, what lies beside, and `out` where it is others.
    form : int
        Which those are, in bits above those of `results`: part of the key of a remembered call.
    """

    __slots__ = ("arrays", "beside", "form", "out", "parts", "results")

    def __init__(
        self,
        parts: tuple[Any, ...],
        beside: tuple[Any, ...],
        out: tuple[Any, ...] | None,
        there: tuple[Any, ...] | None = None,
        bits: int = 0,
    ) -> None:
        """Take `there` and `bits` of what lies beside from a caller that knows them."""
        self.parts, self.beside, self.out = parts, beside, out
        if there is None:
            there = tuple([array for array in beside if array is not None])
            bits = sum(_FIRST_BESIDE << i for i, a in enumerate(beside) if a is not None)
        if out is None:
            self.arrays, self.results, self.form = parts + there, NEW, bits | NEW
        elif out is parts or all(map(operator.is_, out, parts)):
            self.arrays, self.results, self.form = parts + there, IN_PLACE, bits | IN_PLACE
        else:
            self.arrays, self.results, self.form = parts + there + out, GIVEN, bits | GIVEN


class Bound(Protocol):
    """What an operation holds on one device: weights, biases and tables."""

    @property
    def identity(self) -> object:
        """Stands for the operation's options and all layouts of what it holds."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """Those of what it holds, in the order of `Words.held`."""


class Beside(NamedTuple):
    """What lies beside the parts of a call, given or held, in their memory."""

    arguments: tuple[Any, ...]
    """All that `Operation.describe` needs to know: hashable, since plans go by it."""
    views: dict[str, ArrayView | None]
    """By the name that errors have; no result may share bytes with one."""
    given: tuple[ArrayView, ...]
    """Those that the caller gave, in the order of `Given.beside`."""
    held: tuple[ArrayView | None, ...]
    """The others, in the order of `Bound.addresses`."""
    rope: Any = None
    """The rotary embedding, as `tables.Tables.describe` gives it."""


Seen = tuple[tuple[Any, ...], tuple[int, ...], Bound]
"""
What a glance tells of a call.

A key of all that its plan depends on: an identity, the form, and an entry for each array; the
arrays' addresses; and what is held, kept until the launch whoever unloads it meanwhile.
"""


class Form(NamedTuple):
    """What calls that are given the same arrays have in common."""

    arrays: Arrays
    """`Given.arrays`."""
    results: Arrays
    """New results, which have the roles of the parts."""
    both: Arrays
    """`Given.arrays`, and new results after them."""
    sources: Sources


class Operation(Protocol):
    """What a call computes: of one norm, or of queries, keys and values."""

    names: tuple[str, ...]
    """Of the parts."""
    beside: tuple[str, ...]
    """Of what may lie beside them."""
    forms: dict[int, Form]
    """What `form` has returned, by `Given.form`."""

    def bind(self, given: Given, key: tuple[Any, ...]) -> Bound | None:
        """
        Return what is held on the device of the first part, of which a glance told `key`.

        None where it is not there yet.
        """

    def out_of(self, name: str) -> str:
        """Return what errors call the result of a part."""

    def lying_beside(self, first: ArrayView, given: Given, stream: int) -> Beside:
        """View what lies beside the parts, given or held, in the memory of the first one."""

    def describe(
        self, beside: Beside, parts: tuple[Layout, ...], results: tuple[Layout, ...]
    ) -> Any:
        """Validate a call and reduce it to rows or tokens."""

    def prepare(self, call: Any, index: int, stream: int, config: Any) -> Launch | None:
        """Plan a call on a device, and load its kernel; None where there is nothing to do."""

    def over(self, launch: Launch, before: int, after: int) -> Launch | None:
        """Return a launch with `after` tokens for every `before`; None where it is another."""

    def form(self, given: Given) -> Form:
        """Return what calls have in common with this one that are given the same arrays."""
        found = self.forms.get(given.form)
        if found is None:
            roles = self.roles(given)
            of_results = roles[: len(given.parts)]
            found = self.forms[given.form] = Form(
                Arrays(roles), Arrays(of_results), Arrays((*roles, *of_results)),
                self.sources(given),
            )  # fmt: skip
        return found

    def roles(self, given: Given) -> tuple[Role, ...]:
        """Return what each of `Given.arrays` is."""

    def sources(self, given: Given) -> Sources:
        """Return where a launch takes the addresses from: of arrays, new results, what is held."""

    def axes_before_heads(self, beside: Beside, first: Layout) -> int | None:
        """Return how many axes come before the heads', where a role has that with the tokens'."""

    def on_host(
        self, call: Any, beside: Beside, parts: tuple[np.ndarray, ...], outs: tuple[np.ndarray, ...]
    ) -> None:
        """Run a validated call in NumPy."""


class Words(NamedTuple):
    """Places of addresses among the words of a launch."""

    parts: tuple[int, ...]
    results: tuple[int, ...]
    given: tuple[int, ...]
    """Those of what the caller gave beside the parts."""
    held: tuple[int, ...]
    """Those of `Bound.addresses`."""


def sources(words: Words, results: int) -> Sources:
    """Return where each word comes from: a call's arrays, new results, then what is held."""
    beside = (*words.parts, *words.given)
    first = 0 if results == IN_PLACE else len(beside)
    after = first + len(words.results) if first else len(beside)
    return (
        *((word, place) for place, word in enumerate(beside)),
        *((word, first + place) for place, word in enumerate(words.results)),
        *((word, after + place) for place, word in enumerate(words.held)),
    )


def glance(operation: Operation, library: Library, given: Given) -> Seen | None:
    """Look at a call's arrays; None where they need more than a look."""
    looked = library.look(given.arrays)
    if looked is None:
        return None
    addresses, keys = looked
    bound = operation.bind(given, keys[0])
    if bound is None:
        return None
    return (bound.identity, given.form, *keys), addresses, bound
