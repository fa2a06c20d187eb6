"""
Any call is equal to the oracle, or refused with nothing written.

Calls are drawn by strategies.py. The arrays of a call lie in one buffer: of its bytes those of
`out`, and no others, may change. On a GPU the kernels of the keys are compiled beforehand, and none
while calls are drawn.
"""

import collections
import functools
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import host
import host_build
import ml_dtypes
import numpy as np
import pytest
import qk_cases
import strategies
from hypothesis import HealthCheck, Phase, given, seed, settings
from libraries import CuPyLibrary, NumPyLibrary, TorchLibrary
from oracle import norm as norm_oracle
from strategies import MEMORY, NORM_KEYS, QK_KEYS, Backend
from tolerances import ABSOLUTE, CANCELLING, EPS, assert_close

import cupy_headnorm
from cupy_headnorm import (
    HeadNorm,
    QKNorm,
    _dispatch,
    _dtypes,
    _kernels,
    _launch,
    _parts,
    _parts_kernels,
    _parts_launch,
    _qk_dispatch,
    _source,
    _spec,
)
from cupy_headnorm._launch import AXES
from cupy_headnorm._layout import CPU, Layout
from cupy_headnorm._parts import Turning
from cupy_headnorm._spec import NormCall, NormSpec, RowAxis

CASES = 250
"""Drawn for each library and each of the two kernels."""
SHARES = 7
"""Of the cases on a GPU, each a test of its own: two for each of 14 workers."""


# Buffers.
class Numpy:
    """A buffer that NumPy's arrays lie in."""

    backend = Backend("numpy", read_only=True)

    def __init__(self):
        self.library = NumPyLibrary()
        memory = np.zeros(MEMORY + 64, np.uint8)
        self.memory = memory[-memory.ctypes.data % 64 :][:MEMORY]

    def write(self, values):
        self.memory[: values.size] = values

    def read(self, size):
        return self.memory[:size].copy()

    def array(self, place, writeable=True):
        found = place.of(self.memory)
        found.flags.writeable = writeable
        return found


class TorchOnHost(Numpy):
    backend = Backend("torch-cpu", negative_strides=False, odd_addresses=False)

    def __init__(self):
        import torch

        super().__init__()
        self.library = TorchLibrary("cpu")
        self.bytes = torch.from_numpy(self.memory)

    def array(self, place, writeable=True):
        import torch

        size = place.dtype.itemsize
        flat = self.bytes.view(getattr(torch, place.dtype.name))
        steps = [stride // size for stride in place.strides]
        return flat.as_strided(place.shape, steps, place.offset // size)


class TorchOnCuda(TorchOnHost):
    backend = TorchOnHost.backend._replace(name="torch-cuda", kernels=True)

    def __init__(self):
        import torch

        self.library = TorchLibrary("cuda")
        self.bytes = torch.zeros(MEMORY, dtype=torch.uint8, device="cuda")

    def write(self, values):
        import torch

        self.bytes[: values.size].copy_(torch.from_numpy(values))

    def read(self, size):
        return self.bytes[:size].cpu().numpy()


class CuPy:
    backend = Backend("cupy", kernels=True)

    def __init__(self):
        import cupy

        self.library = CuPyLibrary()
        self.memory = cupy.zeros(MEMORY, np.uint8)

    def write(self, values):
        self.memory[: values.size].set(values)

    def read(self, size):
        return self.memory[:size].get()

    def array(self, place, writeable=True):
        import cupy

        return cupy.ndarray(
            place.shape, place.dtype, self.memory.data + place.offset, strides=place.strides
        )


class Kernels(Numpy):
    """NumPy's arrays, on which the kernels run."""

    backend = Numpy.backend._replace(name="kernels-on-host", kernels=True)


ON_GPU = [CuPy, TorchOnCuda]


def name_of(memory):
    return memory.backend.name


# The kernels.
def norm_calls(key):
    """Return a call for each of a key's kernels."""
    itemsize = key.x.itemsize
    access = strategies.vector_of(key.head_dim, itemsize)
    access = access if key.access is None else key.access * itemsize
    alignments = [access, access, 16, 16]
    for i, of in ((2, key.weight), (3, key.bias)):
        alignments[i] = 16 if key.aligned or of is None else of.itemsize
    for axes in AXES:
        rows = (RowAxis(2, 0, 0, 0, 0),) * axes
        yield NormCall(NormSpec(*key[:6]), rows, 2**axes, 1e-6, 0.0, tuple(alignments))


def norm_kernel(call):
    config = _launch.plan(call)
    return _kernels.compile_options(call.spec, config, _launch.memory(call, config))


def dense(shape, dtype, alignment):
    """Return the layout of a contiguous array."""
    strides = [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape))]
    return Layout(tuple(shape), tuple(strides), dtype, CPU, alignment)


def parts_calls(key):
    """Return a call for each of a key's kernels."""
    case, itemsize = key.case, key.case.dtype.itemsize
    whole = strategies.vector_of(case.head_dim, itemsize)
    access = whole if key.access is None else key.access * itemsize
    qk, _ = qk_norm(case, np.random.default_rng(0), (1, 1), (1e-5, 1e-5))
    norms = {name: norm._part() for name, norm in qk.norms.items()}
    layouts = dict.fromkeys(norms, dense((2, 1, case.head_dim), case.dtype, access))
    turning = None
    if qk.rope is not None:
        rope, table = qk.rope, _dtypes.from_numpy(case.of_table.numpy, "table")
        positions, tables = None, None
        if case.by.startswith(("half", "whole")):
            width = rope.rotary_dim if "whole" in case.by else rope.rotary_dim // 2
            most = min(16, whole // itemsize * table.itemsize)
            step = most if key.table_access is None else key.table_access * table.itemsize
            tables = dense((width,), table, step)
        else:
            of = _dtypes.INT32 if case.by == "int32" else _dtypes.INT64
            positions = dense((*(3,) * bool(rope.sections), 2), of, of.itemsize)
            tables = dense((rope.max_position, rope.rotary_dim // 2), table, 16)
        turning = Turning(
            rope.style, rope.order == "before norm", rope.rotary_dim, rope.rounding == "every_op",
            rope.sections, rope.interleaved_sections, tuple(name != "v" for name in norms),
            tables, tables, positions,
        )  # fmt: skip
    call = _parts.describe(norms, layouts, layouts, turning, -2)
    call = call._replace(parameters=tuple((dtype, 16) for dtype, _ in call.parameters))
    return [call._replace(axes=call.axes * (axes - 1)) for axes in (2, 3, 8)]


def rows_of(call):
    """Return how many rows, or heads of all parts together, a call has."""
    if isinstance(call, NormCall):
        return call.rows
    return call.tokens * sum(part.num_heads for part in call.parts)


def parts_kernel(call):
    return _parts_kernels.compile_options(call.spec, _parts_launch.plan(call))


@functools.cache
def kernels():
    """Return the files and compiler's options of all that drawn calls may run."""
    norms = [norm_kernel(call) for key in NORM_KEYS for call in norm_calls(key)]
    parts = [parts_kernel(call) for key in QK_KEYS for call in parts_calls(key)]
    found = [("head_norm.cu", options) for options in norms]
    found += [("qk_norm_rope.cu", options) for options in parts]
    return tuple(dict.fromkeys(found))


def test_drawn_calls_need_few_kernels():
    assert 100 < len(kernels()) <= 200


@pytest.fixture(scope="session")
def compiled_beforehand():
    """Compile and load the kernels of all keys."""
    import cupy

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
    # They share a cache on disk: each worker begins with kernels that no other begins with.
    todo = collections.deque(kernels())
    todo.rotate(-len(todo) * worker // workers)

    def into_cache(kernel):
        file, options = kernel
        cupy.cuda.Device(0).use()  # a new thread has no context yet
        name = next(o.partition("=")[2] for o in options if o.startswith("-DHN_NAME="))
        return cupy.RawKernel(_source.pasted(file), name, options=options).kernel

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // workers)) as pool:
        list(pool.map(into_cache, todo))
    for key in NORM_KEYS:
        for call in norm_calls(key):
            _kernels.prepare(call, 0, 0)
    for key in QK_KEYS:
        for call in parts_calls(key):
            _parts_kernels.prepare(call, 0, 0)


def built_for_the_host():
    """Return the keys of whose kernels one that is compiled for the host can do the work."""
    kernels = host_build.specialisations()

    def served(file, macros):
        try:
            return host.served_by(kernels, file, macros, 900)
        except host.NotBuilt:
            return None

    def norm_macros(call):
        config = _launch.plan(call)
        return _kernels.macros(call.spec, config, _launch.memory(call, config))

    def parts_macros(call):
        return _parts_kernels.macros(call.spec, _parts_launch.plan(call))

    return {
        "head_norm": [
            key
            for key in NORM_KEYS
            if all(served("head_norm.cu", norm_macros(call)) for call in norm_calls(key))
        ],
        "qk_norm_rope": [
            key
            for key in QK_KEYS
            if all(served("qk_norm_rope.cu", parts_macros(call)) for call in parts_calls(key))
        ],
    }


@pytest.fixture
def only_these_kernels(kernel, monkeypatch):
    """Fail where a call needs a kernel that is not among those of the keys."""

    def refuse(file, options, *_):
        raise AssertionError(f"{file} would be compiled with {options}, which no key has")

    monkeypatch.setattr(_kernels, "compiled", refuse)
    # On the host nothing is compiled: look at what would be.
    allowed = frozenset(kernels())

    def looking(describe):
        def described(*arguments):
            call = describe(*arguments)
            if not rows_of(call):
                return call
            try:
                options = options_of(call)
            except ValueError:  # no kernel serves it
                return call
            if (f"{kernel}.cu", options) not in allowed:
                refuse(f"{kernel}.cu", options)
            return call

        return described

    monkeypatch.setattr(_dispatch, "_plans", {})
    monkeypatch.setattr(_qk_dispatch, "_plans", {})
    module, options_of = (_spec, norm_kernel) if kernel == "head_norm" else (_parts, parts_kernel)
    monkeypatch.setattr(module, "describe", looking(module.describe))


# The properties.
def attempt(call, refusals, unchanged):
    """Run a call; return None if it is refused as it must be, with nothing written."""
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
    """Return refusals of `outs`, pairs of an out and of what it may be; judged by bytes."""
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
        holds_for_one_norm(memory, strategies.of_length(case, length), before)


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
            function = {"rms": cupy_headnorm.rms_norm, "layer": cupy_headnorm.layer_norm}[kind]
            found = function(
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


def qk_norm(case, rng, heads, eps):
    """Return a QKNorm and, for each part, weight, bias and options."""
    norms = [case.norm(rng, n) for n in heads]
    norms = [(w, b, options | {"eps": e}) for (w, b, options), e in zip(norms, eps, strict=True)]
    if case.v:
        norms.append((None, None, norms[0][2] | {"weight_offset": 0.0}))
    held = [HeadNorm(w, b, head_dim=case.head_dim, **options) for w, b, options in norms]
    return QKNorm(*held, rope=rope_of(case)), norms


rope_of = functools.cache(qk_cases.Case.rope)


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
        drawn = rng.integers(-3, qk_cases.MAX_POSITION + 3, place.shape)
        ends = rng.choice([np.iinfo(place.dtype).min, np.iinfo(place.dtype).max], place.shape)
        place.of(before)[...] = np.where(rng.random(place.shape) < 0.1, ends, drawn)
    heads = [case.places[name].shape[case.heads_at] for name in "qk"]
    qk, norms = qk_norm(case.case, rng, heads, case.eps)
    for _ in case.lengths:
        holds_for_one_qk(memory, case, qk, norms, before)


def qk_refusals(memory, case):
    if case.refusal is not None:
        yield *case.refusal, True
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

    found = attempt(call, list(qk_refusals(memory, case)), unchanged)
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
    rope = rope_of(case)
    wide = np.longdouble if case.x == "float64" else np.float64
    eps = EPS[case.x]
    tiny = float(ml_dtypes.finfo(case.dtype.numpy).tiny)
    with np.errstate(all="ignore"):
        tables = qk_cases.factors(case, rope, beside) if rope else None
        for i, (x, parameters, actual) in enumerate(zip(parts, norms, found, strict=True)):
            assert actual.dtype == x.dtype
            steps = [lambda y, e, p=parameters: qk_cases.normed(case, p, y, e)]
            if rope and i < 2:
                turn = [lambda y, e: qk_cases.turned(case, y, e, tables)]
                steps = turn + steps if case.first else steps + turn
            y, error = x, np.zeros(x.shape, wide)
            for n, step in enumerate(steps):
                if n:  # what the step before is rounded to may fall to the other side
                    y, error = y.astype(x.dtype), error + eps * np.maximum(np.abs(y), tiny)
                y, error = step(y, error)
                error = error + 2 * eps * tiny
            finite = np.isfinite(y)
            actual = actual.astype(wide)
            np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, y))
            bound = error + 0.6 * eps * np.abs(y) + 4 * ABSOLUTE[case.x]
            off = np.where(finite & (np.abs(actual - y) > bound), np.abs(actual - y) / bound, 0)
            assert not off.any(), f"error of part {i} is {off.max():.3g} times the bound"


# The runs.
def run(memory, kernel, count, start, record_property, keys=None):
    """Let a kernel's property hold for `count` drawn calls, the same ones for each `start`."""
    drawn, all_keys, property_ = PROPERTIES[kernel]
    counted = collections.Counter()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn(memory.backend, keys or all_keys))
    def holds(case):
        property_(memory, case)
        counted["cases"] += 1
        counted["refused"] += bool(case.fault)

    try:
        holds()
    finally:
        record_property("cases", counted["cases"])
    assert counted["cases"] >= count
    assert counted["refused"]


# What was found, each shrunk.
def test_the_stride_of_a_single_head_says_nothing():
    """
    k of one head, ``buffer[:, :128][:, np.newaxis]``, has a stride of 0; its new result of 2 bytes.

    That was taken for the alignment of rows, and the kernel for single elements ran.
    """
    (key,) = (key for key in QK_KEYS if key == strategies._qk(by=None, weight="own x", v=True))
    qk, _ = qk_norm(key.case, np.random.default_rng(0), (2, 1), (1e-5, 1e-5))
    norms = {name: norm._part() for name, norm in qk.norms.items()}
    q, k = (dense((3, n, 128), key.case.dtype, 16) for n in (2, 1))
    x = {"q": q, "k": k._replace(strides=(256, 0, 2)), "v": k._replace(strides=(256, 0, 2))}
    out = {"q": q, "k": k._replace(strides=(256, 2, 2)), "v": k._replace(strides=(256, 2, 2))}
    found = _parts.describe(norms, x, out, None, -2)
    assert found.alignment == 16
    assert _parts_launch.plan(found).access == 8


PROPERTIES = {
    "head_norm": (strategies.norm_cases, NORM_KEYS, holds_for_norm),
    "qk_norm_rope": (strategies.qk_calls, QK_KEYS, holds_for_qk),
}


@pytest.mark.parametrize("memory", [Numpy, TorchOnHost], ids=name_of)
@pytest.mark.parametrize("kernel", PROPERTIES)
def test_any_call_on_the_host(memory, kernel, only_these_kernels, one_thread, record_property):
    run(memory(), kernel, CASES, 0, record_property)


@pytest.mark.parametrize("kernel", PROPERTIES)
def test_any_call_of_the_kernels_on_the_host(kernel, record_property):
    host.require()
    keys = built_for_the_host()[kernel]
    assert len(keys) > 5
    with host.device():
        run(Kernels(), kernel, CASES, 0, record_property, keys)


@pytest.mark.gpu
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("memory", ON_GPU, ids=name_of)
@pytest.mark.parametrize("kernel", PROPERTIES)
def test_any_call_on_a_gpu(
    memory, kernel, share, compiled_beforehand, only_these_kernels, record_property, request
):
    tests = SHARES * len(ON_GPU) * len(PROPERTIES)
    cases = int(request.config.getoption("--cases", None) or tests * CASES)
    run(memory(), kernel, -(-cases // tests), share, record_property)
