"""
QKNorm's second calls, streams, graphs and threads.

A second call looks at little and trusts the rest. On the host torch's memory stands in for a GPU's
and NumPy for the kernel; on a GPU they are the real ones.
"""

import gc
import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from cases import random
from qk_cases import MAX_POSITION
from test_qknorm import D, H
from tolerances import assert_alike

from cupy_headnorm import (
    CaptureError,
    HeadNorm,
    QKNorm,
    Rope,
    _interop,
    _kernels,
    _layout,
    _parts_kernels,
    _qk_dispatch,
    qknorm,
    reference,
)
from cupy_headnorm import rope as rotary
from cupy_headnorm._dtypes import FLOAT32, INT64

torch = pytest.importorskip("torch")


class Runner:
    """Does what the kernel does with the same addresses and strides."""

    def __init__(self, call):
        self.call = call

    def laid(self, address, shape, strides, dtype):
        strides = (*strides, dtype.itemsize)
        layout = SimpleNamespace(size=1, shape=tuple(shape), strides=strides, dtype=dtype)
        return _layout.as_numpy(address, layout, None, writeable=True)

    def tables(self, positions, addresses):
        call, rope, sizes = self.call, self.call.spec.rope, [axis.size for axis in self.call.axes]
        for address in addresses:
            if positions:
                strides = [axis.position for axis in call.axes]
                at = self.laid(positions, (*sizes, 1), strides, INT64)[..., 0]
                shape = (call.max_position, rope.rotary_dim // 2)
                rows = self.laid(address, shape, (call.table_row,), rope.table)
                yield rows[np.clip(at, 0, call.max_position - 1)]
            else:
                shape = (*sizes, rope.rotary_dim)
                yield self.laid(address, shape, [a.table for a in call.axes], rope.table)

    def __call__(self, stream, *addresses):
        assert stream == 7
        call, spec = self.call, self.call.spec
        *of_parts, cos, sin, positions = addresses
        tables = list(self.tables(positions, (cos, sin))) if spec.rope else []
        for i, part in enumerate(call.parts):
            shape = (*(axis.size for axis in call.axes), part.num_heads, spec.head_dim)
            x, out, weight, _ = of_parts[4 * i : 4 * i + 4]
            x = self.laid(x, shape, (*(axis.x[i] for axis in call.axes), part.x), spec.x)
            out = self.laid(out, shape, (*(axis.out[i] for axis in call.axes), part.out), spec.x)
            weight = self.laid(weight, shape[-2:], (part.weight,), spec.weight)
            y = reference.rms_norm(x, weight, eps=part.eps, rounding=spec.rounding)
            out[...] = rotary.apply(y, *(t[..., np.newaxis, :] for t in tables)) if tables else y


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of torch's tensors that are a GPU's, or are taken for it."""
    if request.param == "cuda":
        return "cuda"
    dispatch = importlib.import_module("test_dispatch")
    library = dispatch.HostAsCuda(torch)
    for kind in (torch.Tensor, torch.nn.Parameter):
        monkeypatch.setitem(_interop.quick, kind, library)
        monkeypatch.setitem(_interop._found, kind, library)
    monkeypatch.setattr(
        _interop, "upload", lambda array, _: dispatch._on_device(_interop.view(array, "x"))
    )
    monkeypatch.setattr(_interop, "synchronize", lambda index: None)
    monkeypatch.setattr(_kernels, "refuse_capture", lambda stream, what: None)
    monkeypatch.setattr(_parts_kernels, "prepare", lambda call, *_: call)
    monkeypatch.setattr(_parts_kernels, "runner", Runner)
    return "cpu"


@pytest.fixture
def slow(monkeypatch):
    """Forget all calls, and list those that go step by step."""
    monkeypatch.setattr(_qk_dispatch, "_thread", _qk_dispatch._Thread())
    monkeypatch.setattr(_qk_dispatch, "_plans", {})
    seen = []
    step_by_step = qknorm.step_by_step

    def listing(norms, tables, arrays, *rest, **options):
        seen.append(arrays)
        return step_by_step(norms, tables, arrays, *rest, **options)

    monkeypatch.setattr(qknorm, "step_by_step", listing)
    return seen


def made(rng, *, theta=1e4, eps=1e-6, max_position=MAX_POSITION, turns=True):
    rope = Rope.of_theta(theta, D, max_position=max_position) if turns else None
    return QKNorm(*(HeadNorm(random(rng, D, FLOAT32), eps=eps) for _ in "qk"), rope=rope)


def tensor(rng, device, *shape):
    return torch.from_numpy(random(rng, shape, FLOAT32)).to(device)


def both(rng, device, tokens=5):
    return [tensor(rng, device, tokens, n, D) for n in H[:2]]


def turning(rng, device, way, tokens=5):
    if way == "positions":
        positions = torch.from_numpy(rng.integers(-2, MAX_POSITION + 2, tokens))
        return {"positions": positions.to(device)}
    return {n: tensor(rng, device, tokens, D) for n in ("cos", "sin")} if way else {}


def right(qk, parts, beside):
    """Return what the host makes of the same values."""
    beside = {name: array.cpu().numpy() for name, array in beside.items()}
    return qk(*(part.cpu().numpy() for part in parts), **beside)


def same(found, expected):
    for y, values in zip(found, expected, strict=True):
        assert_alike(y.cpu().numpy(), values, slack=4 * np.abs(values).max())


WAYS = ["positions", "cos and sin", None]


@pytest.mark.parametrize("way", WAYS)
def test_the_second_call_only_looks(device, slow, way, rng):
    qk = made(rng, turns=way is not None)
    for calls in range(3):
        parts, beside = both(rng, device), turning(rng, device, way)
        expected = right(qk, parts, beside)
        slow.clear()
        outs = tuple(map(torch.empty_like, parts))
        same(qk(*parts, **beside), expected)
        assert qk(*parts, **beside, out=outs)[1] is outs[1]
        same(outs, expected)
        results = qk(*parts, **beside, out=tuple(parts))
        assert results[0] is parts[0]
        same(parts, expected)
        assert len(slow) == (0 if calls else 3)


@pytest.mark.parametrize("way", WAYS)
def test_slices_of_one_buffer_at_other_places(device, slow, way, rng):
    """q and k as one wants them beside each other, then apart, then overlapping."""
    qk, beside = made(rng, turns=way is not None), turning(rng, device, way)
    for first_q, first_k, apart in (
        (0, 3, 1),
        (3, 0, 1),
        (0, 6, 1),
        (4, 2, 1),
        (0, 2, 0),
        (1, 1, 0),
    ):
        qkv = tensor(rng, device, 5, 8, D)
        parts = qkv[:, first_q : first_q + 3], qkv[:, first_k : first_k + 2]
        expected, before = right(qk, parts, beside), qkv.clone()
        for _ in range(2):
            same(qk(*parts, **beside), expected)
        if apart:
            qk(*parts, **beside, out=parts)
            same(parts, expected)
            continue
        for _ in range(2):
            with pytest.raises(ValueError, match="out of q overlaps k; needs separate memory"):
                qk(*parts, **beside, out=parts)
            with pytest.raises(ValueError, match="out of q overlaps k; needs separate memory"):
                qk(*parts, **beside, out=(parts[0], torch.empty_like(parts[1])))
        assert torch.equal(qkv, before)


def test_results_moved_onto_each_other_or_what_turns(device, slow, rng):
    qk, parts = made(rng), both(rng, device)
    memory = tensor(rng, device, 100 * D)
    q_out, k_out = memory[: 15 * D].view(5, 3, D), memory[20 * D : 30 * D].view(5, 2, D)
    cos, sin = memory[40 * D : 45 * D].view(5, D), memory[50 * D : 55 * D].view(5, D)
    beside = {"cos": cos, "sin": sin}
    same(qk(*parts, **beside, out=(q_out, k_out)), right(qk, parts, beside))
    before = memory.clone()
    for start in (12, 36, 49):
        moved = memory[start * D : (start + 10) * D].view(5, 2, D)
        with pytest.raises(ValueError, match="out of . overlaps .*; needs separate memory"):
            qk(*parts, **beside, out=(q_out, moved))
    assert torch.equal(memory, before)
    elsewhere = memory[60 * D : 70 * D].view(5, 2, D)
    same(qk(*parts, **beside, out=(q_out, elsewhere)), right(qk, parts, beside))


def test_norms_and_tables_are_those_of_the_call(device, slow, rng):
    """Other weights, eps or tables of one layout make another call, and stay apart."""
    parts, beside = both(rng, device), turning(rng, device, "positions")
    norms = [
        made(rng),
        made(rng),
        made(rng, eps=1.0),
        made(rng, theta=100.0),
        made(rng, max_position=MAX_POSITION // 2),
    ]
    norms.append(QKNorm(*norms[0].norms.values(), rope=norms[3].rope))
    norms.append(QKNorm(*reversed(norms[0].norms.values()), rope=norms[0].rope))
    for _, qk in itertools.product(range(2), norms):
        same(qk(*parts, **beside), right(qk, parts, beside))
    assert len([arrays for arrays in slow if arrays.parts[0] is parts[0]]) == len(norms)
    norms[0].unload()
    for qk in norms:
        same(qk(*parts, **beside), right(qk, parts, beside))


def test_other_layouts_of_as_many_bytes(device, slow, rng):
    qk = made(rng)
    buffer = tensor(rng, device, 5 * 3 * D + 1)
    positions = turning(rng, device, "positions", 6)["positions"]
    k = tensor(rng, device, 5, 2, D)
    for q in (
        buffer[:-1].view(5, 3, D),
        buffer[1:].view(5, 3, D),
        buffer[:-1].view(3, 5, D).transpose(0, 1),
    ):
        for at in (positions[:5], positions[1:], positions[:5].int().long()):
            same(qk(q, k, positions=at), right(qk, (q, k), {"positions": at}))
    batch = [tensor(rng, device, 2, 5, n, D) for n in H[:2]]
    for beside in (
        {"positions": positions[None, :5]},
        {"positions": positions[:2, None]},
        {n: tensor(rng, device, 1, 5, D) for n in ("cos", "sin")},
    ):
        for _ in range(2):
            same(qk(*batch, **beside), right(qk, batch, beside))
    with pytest.raises(TypeError, match="positions has dtype int16; needs int32 or int64"):
        qk(q, k, positions=positions[:5].short())
    with pytest.raises(ValueError, match="needs the same tokens"):
        qk(q, k[:4], positions=positions[:5])


def test_what_the_first_call_refuses_the_second_does_too(device, slow, rng):
    qk, (q, k), beside = made(rng), both(rng, device), turning(rng, device, "cos and sin")
    for _ in range(2):
        qk(q, k, **beside), qk(q, k, **beside, out=(q, k))
    with torch.no_grad():
        qk(q.clone().requires_grad_(), k, **beside)
    for name, array in (("q", q), ("k", k), *beside.items()):
        given = {"q": q, "k": k} | beside | {name: array.clone().requires_grad_()}
        q_given, k_given = given.pop("q"), given.pop("k")
        with pytest.raises(ValueError, match=f"{name} requires grad and grad mode is on"):
            qk(q_given, k_given, **given)
    with pytest.raises(ValueError, match="out requires grad and grad mode is on"):
        qk(q, k, **beside, out=(q, k.clone().requires_grad_()))
    with pytest.raises(TypeError, match="k is a lazily negated view"):
        qk(q, torch._neg_view(k), **beside)
    version = q._version
    qk(q, k, **beside, out=(q, k))
    assert (q._version, k._version > 0) == (version + 1, True)


def test_a_weight_of_one_row_is_shared(device, slow, rng):
    """There is no second row to read."""
    one, parts = random(rng, (1, D), FLOAT32), both(rng, device)
    norms = HeadNorm(one), HeadNorm(one[0])
    same(QKNorm(*norms)(*parts), [norms[1](part.cpu().numpy()) for part in parts])


def test_a_call_is_not_taken_for_another_of_as_many_arrays(device, slow):
    """Results where cos and sin were, and the other way round."""
    norm = HeadNorm(np.ones(2, np.float32))
    qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, 2, max_position=4))
    q, k, cos, sin = (
        torch.ones(shape, device=device) for shape in ((2, 4, 2), (2, 4, 2), (2, 2), (2, 2))
    )
    positions = torch.arange(2, device=device)
    for _ in range(2):
        qk(q, k, cos=cos, sin=sin)
        with pytest.raises(ValueError, match="given to turn by: nothing"):
            qk(q, k, out=(cos, sin))
        qk(q, k, positions=positions, out=(q, k))
        others = tuple(torch.ones(2, 4, 2, device=device) for _ in "qk")
        qk(q, k, positions=positions, out=others)
        with pytest.raises(ValueError, match="given to turn by: positions, cos, sin"):
            qk(q, k, positions=positions, cos=others[0], sin=others[1])
        qk(q, k, positions=positions)
        for function in (qk, qk.warmup):
            with pytest.raises(TypeError, match="heads_axis is -2.0; needs an integer"):
                function(q, k, positions=positions, heads_axis=-2.0)


# Order, on a GPU. What the tests of one norm have is used again.
@pytest.fixture(params=["TORCH", "CUPY"])
def owner(request):
    return getattr(importlib.import_module("test_streams"), request.param)


@pytest.fixture
def spin():
    streams = importlib.import_module("test_streams")
    kernel = streams.cupy.RawKernel(streams.SPIN, "spin")

    def busy(handle, cycles=40_000_000):
        kernel((1,), (1,), (np.int64(cycles),), stream=SimpleNamespace(ptr=handle))

    busy(0, cycles=1)
    synchronize()
    return busy


def synchronize():
    importlib.import_module("cupy").cuda.runtime.deviceSynchronize()


def values_of(rng, tokens=64, head_dim=D):
    parts = [random(rng, (tokens, n, head_dim), FLOAT32) for n in H[:2]]
    return [*parts, rng.integers(0, MAX_POSITION, tokens)]


def on_gpu(owner, qk, values):
    q, k, positions = map(owner.array, values)
    results = [owner.host(y) for y in qk(q, k, positions=positions)]
    synchronize()
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["in place", "given", "new"])
def test_graphs(owner, target, rng):
    qk = made(rng)
    q, k, positions = map(owner.array, values_of(rng))
    outs = tuple(owner.array(np.zeros(part.shape, np.float32)) for part in (q, k))
    qk.warmup(q, k, positions=positions)
    qk.warmup(q, k, positions=positions, out=outs)
    synchronize()
    loaded = dict(_kernels._functions)
    gc.collect()
    with owner.capture() as replay:
        if target == "new" and not owner.allocates_in_graphs:
            with pytest.raises(CaptureError, match="a result without out would be allocated"):
                qk(q, k, positions=positions)
            target = "in place"
        out = {"in place": (q, k), "given": outs, "new": None}[target]
        results = qk(q, k, positions=positions, out=out)
    assert _kernels._functions == loaded
    for _ in range(2):
        values = values_of(rng)
        for array, new in zip((q, k, positions), values, strict=True):
            owner.write(array, owner.array(new))
        synchronize()
        replay()
        synchronize()
        for y, expected in zip(results, on_gpu(owner, qk, values), strict=True):
            np.testing.assert_array_equal(owner.host(y), expected)


UNLOADED = {"torch": 104, "cupy": 120}
"""Lengths of heads whose kernels no other test loads."""


@pytest.mark.gpu
def test_nothing_is_loaded_while_capturing(owner, rng):
    head_dim = UNLOADED[owner.name]
    norm = HeadNorm(np.ones(head_dim, np.float32))
    qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, head_dim, max_position=MAX_POSITION))
    values = values_of(rng, head_dim=head_dim)
    q, k, positions = map(owner.array, values)
    q += q
    synchronize()

    def missing(what, **options):
        nonlocal q
        loaded = dict(_kernels._functions)
        gc.collect()
        with owner.capture() as replay:
            with pytest.raises(CaptureError, match=what):
                qk(q, k, **options, out=(q, k))
            q += q
        assert _kernels._functions == loaded
        replay()
        synchronize()

    missing("weight is not on cuda:0 yet while the stream is captured", positions=positions)
    qk.load()
    missing("the tables are not on cuda:0 yet while the stream is cap", positions=positions)
    cos, sin = (owner.array(random(rng, (64, head_dim), FLOAT32)) for _ in range(2))
    missing("the kernel for this layout is not loaded yet while the st", cos=cos, sin=sin)
    qk.warmup(q, k, positions=positions)
    for array, new in zip((q, k), values, strict=False):
        owner.write(array, owner.array(new))
    synchronize()
    gc.collect()
    with owner.capture() as again:
        qk(q, k, positions=positions, out=(q, k))
    again()
    synchronize()
    for y, expected in zip((q, k), on_gpu(owner, qk, values), strict=True):
        np.testing.assert_array_equal(owner.host(y), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False], ids=["first", "remembered"])
@pytest.mark.parametrize("default", [True, False], ids=["default", "other"])
def test_a_call_runs_after_what_its_stream_was_given_before(owner, default, first, spin, slow, rng):
    qk, values = made(rng), values_of(rng)
    expected = on_gpu(owner, qk, values)
    sources = [owner.array(part) for part in values]
    arrays = [owner.array(np.zeros_like(part)) for part in values]
    if first:
        _qk_dispatch._thread.calls.clear()
    stream = owner.stream(default=default)
    with owner.on(stream):
        reserved = [part + part for part in (*arrays, *arrays)]  # asking for memory may wait
        owner.write(arrays[0], sources[0] * 0)
        del reserved
        synchronize()
        spin(owner.handle(stream))
        for array, source in zip(arrays, sources, strict=True):
            owner.write(array, source)
        results = qk(*arrays[:2], positions=arrays[2])
        assert not owner.done(stream), "the call waited for the GPU"
        doubled = [y + y for y in results]
    synchronize()
    for y, right_one in zip(doubled, expected, strict=True):
        np.testing.assert_array_equal(owner.host(y), 2 * right_one)


@pytest.mark.gpu
def test_threads_on_streams_of_their_own(owner, spin, slow, rng):
    qk = made(rng)
    given = [[values_of(rng) for _ in range(2)] for _ in range(4)]
    expected = [[on_gpu(owner, qk, values) for values in pair] for pair in given]

    def work(number):
        stream = owner.stream()
        with owner.on(stream):
            sources = [[owner.array(part) for part in values] for values in given[number]]
            arrays = [owner.array(np.zeros_like(part)) for part in given[number][0]]
            for n in range(40):
                spin(owner.handle(stream), cycles=300_000)
                for array, source in zip(arrays, sources[n % 2], strict=True):
                    owner.write(array, source)
                fresh = qk(*arrays[:2], positions=arrays[2])
                qk(*arrays[:2], positions=arrays[2], out=tuple(arrays[:2]))
                stream.synchronize()
                for results in (fresh, arrays[:2]):
                    for y, right_one in zip(results, expected[number][n % 2], strict=True):
                        np.testing.assert_array_equal(owner.host(y), right_one)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.gpu
def test_unload_waits_for_work_in_flight(owner, spin, rng):
    qk, values = made(rng), values_of(rng)
    expected = on_gpu(owner, qk, values)
    arrays = [owner.array(part) for part in values]
    stream = owner.stream()
    synchronize()
    with owner.on(stream):
        spin(owner.handle(stream))
        results = qk(*arrays[:2], positions=arrays[2])
        qk.unload()
        assert owner.done(stream)
    for y, right_one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(owner.host(y), right_one)
