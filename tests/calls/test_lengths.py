"""
Random calls in a row: whatever is remembered or derived does what a call step by step does.

A few layouts, each with lengths of its own and others drawn for every call; torch's host memory
stands in for a GPU's, as stand_in.py says. Each call runs twice on the same bytes, once after all
that came before and once with nothing remembered: results, all memory and errors must be the same.
"""

import random

import numpy as np
import pytest
import qk_stand_in
import stand_in

from cupy_headnorm import HeadNorm, QKNorm, Rope
from cupy_headnorm._calls import remembered

torch = pytest.importorskip("torch")
slow = stand_in.slow
D, HEADS, CALLS = 8, (3, 2), 150
ROPE = Rope.of_theta(1e4, D, max_position=40)


@pytest.fixture
def derived(monkeypatch, slow):
    """Stand in for the GPU, of QKNorm too, and list the calls that are derived."""
    found = []
    qk_stand_in.take_for_kernel(monkeypatch)
    derive = remembered.derive

    def listing(*arguments):
        call, result = derive(*arguments)
        if call is not None:
            found.append(call)
        return call, result

    monkeypatch.setattr(remembered, "derive", listing)
    return found


class Drawn:
    """Arrays of one layout, of which `layout` decides all but the lengths that `lengths` draws."""

    def __init__(self, seed, lengths):
        self.layout, self.lengths = random.Random(seed), lengths
        axes = self.layout.choice([1, 1, 2, 2, 3])
        fixed = [self.layout.choice([None, 1, 1, 2, 3]) for _ in range(axes)]
        fixed[self.layout.randrange(axes)] = None
        self.tokens = [lengths.choice([0, 1, 2, 3, 4, 5, 6]) if n is None else n for n in fixed]
        self.heads_axis = self.layout.choice([-2, -2, -3])

    def rarely(self):
        return self.lengths.random() < 0.04

    def whole(self, *shape):
        """An array, or a slice of a larger one, or one in another order, or one without strides."""
        way = self.layout.random()
        if way < 0.1 and len(shape) > 3:
            return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        if way < 0.15:
            return torch.randn(1, *shape[1:]).expand(shape)
        larger = [n + self.layout.choice([0, 0, 0, 0, 1, 2]) for n in shape[:-1]]
        return torch.randn(*larger, D)[tuple(slice(n) for n in shape)]

    def heads(self, count, tokens=None):
        tokens = self.tokens if tokens is None else tokens
        if self.heads_axis == -2:
            return self.whole(*tokens, count, D)
        if self.layout.random() < 0.5:
            return self.whole(*tokens, count, D).transpose(-2, -3)
        return self.whole(*tokens[:-1], count, tokens[-1], D)

    def parts(self):
        if self.layout.random() < 0.4:
            gap, more = self.layout.choice([0, 0, 1]), self.layout.choice([0, 2])
            packed = torch.randn(*self.tokens, sum(HEADS) + gap + more, D)
            first = HEADS[0] + gap - (1 if self.rarely() else 0)
            found = [packed[..., : HEADS[0], :], packed[..., first : first + HEADS[1], :]]
            return found if self.heads_axis == -2 else [x.transpose(-2, -3) for x in found]
        others = list(self.tokens)
        if self.rarely():
            others[self.lengths.randrange(len(others))] = self.lengths.choice([1, 2, 3])
        return [self.heads(HEADS[0]), self.heads(HEADS[1], others)]

    def rotation(self):
        shape = list(self.tokens)
        if self.layout.random() < 0.3:
            shape = shape[self.layout.randrange(len(shape)) :]
        if self.layout.random() < 0.3:
            shape[self.layout.randrange(len(shape))] = 1
        if self.rarely():
            shape[0] += 1
        if self.layout.random() < 0.5:
            return {"positions": torch.randint(-3, 45, (*shape, 2))[..., 0]}
        both = torch.randn(*shape, 2 * D)
        return {"cos": both[..., :D], "sin": both[..., D:]}

    def out(self, parts):
        way = self.layout.random()
        if way < 0.3:
            return None
        if way < 0.6:
            return tuple(parts)
        if way < 0.8:
            return tuple(self.whole(*part.shape) for part in parts)
        sizes = [part.numel() for part in parts]
        memory, starts = torch.randn(sum(sizes) + 5 * D), [0]
        for size in sizes:
            starts.append(max(0, starts[-1] + size + self.lengths.choice([0, 0, D, -D])))
        return tuple(
            memory[start:][: part.numel()].view(part.shape)
            for start, part in zip(starts, parts, strict=False)
        )


def outcome(call, arrays):
    """Return results or an error, and all memory; the memory is as before again."""
    storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in arrays}
    before = {at: storage.clone() for at, storage in storages.items()}
    try:
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        found = [(y.shape, y.stride(), y.clone().numpy().tobytes()) for y in results]
    except (TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    after = [np.array(storage, np.uint8).tobytes() for storage in storages.values()]
    for at, storage in storages.items():
        storage.copy_(before[at])
    return found, after


def same_as_alone(call, arrays, monkeypatch):
    found = outcome(call, arrays)
    with monkeypatch.context() as patch:
        stand_in.forget_calls(patch)
        alone = outcome(call, arrays)
    assert found == alone
    return isinstance(alone[0], str)


@pytest.mark.parametrize("seed", range(4))
def test_any_calls_of_q_and_k_in_a_row(derived, seed, monkeypatch):
    lengths, refused = random.Random(seed), 0
    layouts = [lengths.random() for _ in range(5)]
    torch.manual_seed(seed)
    norms = [HeadNorm(np.arange(1, D + 1, dtype=np.float32)) for _ in "qk"]
    norm = QKNorm(*norms, rope=ROPE if seed % 2 else None)
    for _ in range(CALLS):
        drawn = Drawn(lengths.choice(layouts), lengths)
        parts = drawn.parts()
        beside = drawn.rotation() if seed % 2 else {}
        out = drawn.out(parts)

        def call(parts=parts, beside=beside, axis=drawn.heads_axis, out=out):
            return norm(*parts, **beside, heads_axis=axis, out=out)

        refused += same_as_alone(call, [*parts, *beside.values(), *(out or ())], monkeypatch)
    assert derived
    assert refused < CALLS / 2


@pytest.mark.parametrize("seed", range(4))
def test_any_calls_of_a_norm_in_a_row(derived, seed, monkeypatch):
    lengths, refused = random.Random(seed), 0
    layouts = [lengths.random() for _ in range(5)]
    torch.manual_seed(seed)
    weight = np.random.default_rng(seed).standard_normal((HEADS[0], D)[seed % 2 :])
    norm = HeadNorm(weight.astype(np.float32), kind=("rms", "layer")[seed // 2])
    for _ in range(CALLS):
        drawn = Drawn(lengths.choice(layouts), lengths)
        x = drawn.heads(HEADS[0])
        out = drawn.out([x])

        def call(x=x, axis=drawn.heads_axis, out=out):
            return norm(x, heads_axis=axis, out=out and out[0])

        refused += same_as_alone(call, [x, *(out or ())], monkeypatch)
    assert derived
    assert refused < CALLS / 2
