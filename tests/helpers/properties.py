"""
What must hold for any drawn call: see strategies.py.

It is equal to the oracle, or refused as it must be; and of the buffer's bytes those of `out`, and
no others, change.
"""

import re

import ml_dtypes
import numpy as np
import qk_cases
import strategies
from cases import function
from norm_strategies import of_length
from oracle import norm as norm_oracle
from qk_cases import MAX_POSITION
from qk_strategies import qk_norm
from tolerances import CANCELLING, assert_close

from cupy_headnorm import HeadNorm
from cupy_headnorm._plans.head_norm import AXES


def attempt(call, refusals, unchanged):
    """
    Run a call; return None if it is refused as it must be, with nothing written.

    `refusals` are those that are right: the error's type, an expression for its message, and
    whether one of them is needed, or may be.
    """
    try:
        found = call()
    except (TypeError, ValueError) as error:
        wanted = [(kind, text) for kind, text, _ in refusals]
        unchanged()
        if not any(type(error) is kind and re.search(text, str(error)) for kind, text in wanted):
            raise AssertionError(f"refused; needs {wanted or 'a result'}") from error
        return None
    needed = [(kind.__name__, text) for kind, text, must in refusals if must]
    assert not needed, f"is not refused; needs one of {needed}"
    return found


def only_written(before, after, named):
    """Check that bytes which `named` does not name are as they were."""
    changed = np.flatnonzero((before != after) & ~named)
    assert not changed.size, f"bytes {changed[:8]} are written"


def same_place(a, b):
    steps = zip(a.shape, a.strides, b.strides, strict=True)
    return a.offset == b.offset and all(n < 2 or x == y for n, x, y in steps)


def overlaps(case, inputs, outs):
    """Yield the refusals of `outs`, pairs of an out and of what it may be; judged by bytes."""
    named = {name: case.places[name].named(case.size) for name in {*inputs, *dict(outs)}}
    for out, own in outs:
        if (named[out] > 1).any():
            yield ValueError, "overlap themselves; needs one place for each element", True
        for name in [*inputs, *(other for other, _ in outs if other != out)]:
            if name == own and same_place(case.places[name], case.places[out]):
                continue
            if (named[name].astype(bool) & named[out].astype(bool)).any():
                yield ValueError, "overlaps .*; needs .*separate memory", True


def norm_refusals(memory, case):
    found = [] if case.refusal is None else [(*case.refusal, True)]
    if case.fault in ("dtype of x", "dtype of out", "shape of out", "stride of x"):
        return found
    x = case.places["x"]
    inputs = [n for n in ("x", "weight", "bias") if n in case.places]
    inputs = ["x"] if case.held else inputs
    if "out" in case.places:
        found += overlaps(case, inputs, [("out", "x")])
    if memory.backend.kernels:
        if any(p.offset % p.dtype.itemsize for p in case.places.values()):
            found.append((ValueError, "has rows aligned to", 0 not in x.shape))
        if sum(n > 1 for n in x.shape[:-1]) > AXES[-1]:
            found.append((ValueError, "axes that no common stride joins; needs 8 at most", False))
    return found


def by_row(case, array, heads_at):
    """Return an array's rows as (..., heads, head_dim)."""
    head_dim = case.key.head_dim
    if heads_at is None:
        return array.reshape(*array.shape[:-1], case.heads, head_dim)
    return np.moveaxis(array, heads_at, -2)


def holds_for_norm(memory, case):
    rng = np.random.default_rng(case.seed)
    before = rng.integers(0, 256, case.size, np.uint8)
    for name, place in case.places.items():
        array = place.of(before)
        if name == "x" and case.fault != "dtype of x":
            array[...] = strategies.values(rng, case.kinds, place.shape, place.dtype)
        elif name in ("weight", "bias"):
            array[...] = strategies.parameter(rng, case.parameter, place.shape, place.dtype)
    for length in case.lengths:
        holds_for_one_norm(memory, of_length(case, length), before)


def holds_for_one_norm(memory, case, before):
    memory.write(before)
    kind, places = case.key.kind, case.places

    def call():
        arrays = {
            name: memory.array(place, case.fault != "read-only out" or name != "out")
            for name, place in places.items()
        }
        x, out = arrays["x"], arrays.get("out")
        if case.in_place and case.fault != "read-only out":
            out = x
        if case.held:
            held = [places[n].of(before) if n in places else None for n in ("weight", "bias")]
            found = HeadNorm(*held, kind=kind, **case.options)(
                x, heads_axis=case.heads_axis, out=out
            )
        else:
            found = function(kind)(
                x, arrays.get("weight"), arrays.get("bias"),
                heads_axis=case.heads_axis, out=out, **case.options,
            )  # fmt: skip
        assert out is None or found is out
        return found

    def unchanged():
        only_written(before, memory.read(case.size), np.zeros(case.size, bool))

    found = attempt(call, norm_refusals(memory, case), unchanged)
    if found is None:
        return
    found = memory.library.host(found)
    after = memory.read(case.size)
    written = np.zeros(case.size, bool)
    if "out" in places:
        written = places["out"].named(case.size).astype(bool)
        found = places["out"].of(after)
    only_written(before, after, written)
    x = places["x"].of(before)
    parameters = []
    for name in ("weight", "bias"):
        array = places[name].of(before) if name in places else None
        if array is not None and array.size != case.key.head_dim:
            array = array.reshape(case.heads, case.key.head_dim)
        parameters.append(None if array is None else array.reshape(-1, case.key.head_dim))
    options = {n: case.options[n] for n in ("eps", "weight_offset", "rounding")}
    assert found.shape == x.shape
    found, x = (by_row(case, array, case.heads_at) for array in (found, x))
    close_to_oracle(kind, found, x, *parameters, options)


def close_to_oracle(kind, found, x, weight, bias, options):
    exact, slack, product = norm_oracle(kind, x, weight, bias, **options)
    wide, name = exact.dtype, x.dtype.name
    values = x.astype(wide)
    with np.errstate(all="ignore"):
        centred = values - (values.mean(-1, keepdims=True) if kind == "layer" else 0)
        spread = np.sqrt((centred * centred).mean(-1, keepdims=True) + options["eps"])
        size = np.abs(values).mean(-1, keepdims=True)
        if kind == "layer":
            # The mean errs by CANCELLING of the values' size, and what is squared with it.
            off = CANCELLING[name] * size / spread
            slack = slack + np.where(np.isfinite(off), np.abs(exact) * off * size / spread, 0)
            # Values all alike, or nearly, and no eps: 0 / 0, or what is left of rounding the mean.
            lost = ~(off < 0.1) & np.isfinite(size) & (size > 0) & (options["eps"] == 0)
            exact, found = np.where(lost, 0, exact), np.where(lost, 0, found).astype(x.dtype)
    before = 0
    if options["rounding"] != "once":
        # Below the smallest normal number a step is as large as there.
        scale = 1 if weight is None else np.abs(weight.astype(wide)) + 2
        before = np.maximum(product, 2 * float(ml_dtypes.finfo(x.dtype).tiny) * scale)
    assert_close(found, exact, slack, name, before)


def holds_for_qk(memory, case):
    rng = np.random.default_rng(case.seed)
    before = rng.integers(0, 256, case.size, np.uint8)
    for name in ("q", "k", "v"):
        if (place := case.places.get(name)) is not None and place.dtype == case.case.dtype.numpy:
            place.of(before)[...] = strategies.values(rng, case.kinds, place.shape, place.dtype)
    for name in ("cos", "sin"):
        if place := case.places.get(name):
            place.of(before)[...] = rng.uniform(-1, 1, place.shape).astype(place.dtype)
    if (place := case.places.get("positions")) and place.dtype.kind == "i":
        # Kernels clamp positions; on the host those outside of the tables are a fault.
        beyond = 3 if memory.backend.kernels or rng.random() < 0.1 else 0
        drawn = rng.integers(-beyond, MAX_POSITION + beyond, place.shape)
        ends = rng.choice([np.iinfo(place.dtype).min, np.iinfo(place.dtype).max], place.shape)
        at_ends = rng.random(place.shape) < 0.1 * bool(beyond)
        place.of(before)[...] = np.where(at_ends, ends, drawn)
    heads = [case.places[name].shape[case.heads_at] for name in "qk"]
    qk, norms = qk_norm(case.case, rng, heads, case.eps)
    for _ in case.lengths:
        holds_for_one_qk(memory, case, qk, norms, before)


def qk_refusals(memory, case, before):
    if case.refusal is not None:
        yield *case.refusal, True
    if (place := case.places.get("positions")) and not memory.backend.kernels:
        positions = place.of(before)
        if place.dtype.kind == "i" and ((positions < 0) | (positions >= MAX_POSITION)).any():
            yield ValueError, "positions hold .*; needs 0 to", True
    longer = sum(n > 1 for n in case.places["q"].shape[:-1])
    if memory.backend.kernels and longer >= AXES[-1]:
        yield ValueError, "axes that no common stride joins; needs 7 at most", False
    if "qkv" in case.places:
        outs, inputs = [(name, name) for name in case.parts], []
    else:
        outs, inputs = list(zip(case.outs, case.parts, strict=False)), case.parts
    if case.fault is None:
        turned_by = [n for n in ("positions", "cos", "sin") if n in case.places]
        yield from overlaps(case, [*inputs, *turned_by], outs) if outs else ()
    elif outs:
        yield ValueError, "overlaps .*; needs .*separate memory|overlap themselves", False


def holds_for_one_qk(memory, case, qk, norms, before):
    memory.write(before)
    places = case.places

    def call():
        arrays = {name: memory.array(place) for name, place in places.items()}
        beside = {n: arrays[n] for n in ("positions", "cos", "sin") if n in places}
        if "qkv" in places:
            heads = {"num_heads": places["q"].shape[-2], "num_kv_heads": places["k"].shape[-2]}
            assert qk.packed(arrays["qkv"], **heads, **beside) is arrays["qkv"]
            return ()
        parts = [arrays[name] for name in "qkv" if name in arrays]
        out = tuple(arrays[name] for name in case.outs if name in arrays) or None
        if case.in_place:
            out = tuple(arrays[name] for name in case.parts if name in arrays)
        found = qk(*parts, **beside, heads_axis=case.heads_axis, out=out)
        assert out is None or all(a is b for a, b in zip(found, out, strict=True))
        return found

    def unchanged():
        only_written(before, memory.read(case.size), np.zeros(case.size, bool))

    found = attempt(call, list(qk_refusals(memory, case, before)), unchanged)
    if found is None:
        return
    found = [memory.library.host(y) for y in found]
    after = memory.read(case.size)
    outs = case.parts if "qkv" in places else case.outs
    written = np.zeros(case.size, bool)
    for name in outs:
        written |= places[name].named(case.size).astype(bool)
    only_written(before, after, written)
    if outs:
        found = [places[name].of(after) for name in outs]
    parts = [places[name].of(before) for name in case.parts]
    assert [y.shape for y in found] == [x.shape for x in parts]
    beside = {n: places[n].of(before) for n in ("positions", "cos", "sin") if n in places}
    found, parts = ([np.moveaxis(a, case.heads_at, -2) for a in of] for of in (found, parts))
    close_to_qk_oracle(case.case, found, parts, norms, beside)


def close_to_qk_oracle(case, found, parts, norms, beside):
    with np.errstate(all="ignore"):
        expected = qk_cases.expected(case, parts, norms, beside)
        for i, (actual, (y, bound)) in enumerate(zip(found, expected, strict=True)):
            assert actual.dtype == case.dtype.numpy
            finite, actual = np.isfinite(y), actual.astype(y.dtype)
            np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, y))
            off = np.where(finite & (np.abs(actual - y) > bound), np.abs(actual - y) / bound, 0)
            assert not off.any(), f"error of part {i} is {off.max():.3g} times the bound"
