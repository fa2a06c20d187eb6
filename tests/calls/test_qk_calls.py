"""
What QKNorm's second call looks at, and what it trusts.

On the host torch's memory stands in for a GPU's and NumPy for the kernel; on a GPU they are the
real ones.
"""

import itertools
import weakref

import numpy as np
import pytest
import qk_stand_in
from cases import random
from qk_cases import MAX_POSITION, D, H
from qk_stand_in import made
from tolerances import assert_alike

from cupy_headnorm import HeadNorm, QKNorm, Rope
from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.dtypes import FLOAT32
from cupy_headnorm._calls import uploads
from cupy_headnorm.rope import embedding

torch = pytest.importorskip("torch")
device, slow = qk_stand_in.device, qk_stand_in.slow


def tensor(rng, device, *shape):
    return torch.from_numpy(random(rng, shape, FLOAT32)).to(device)


def whole(rng, device, *tokens):
    return [tensor(rng, device, *tokens, n, D) for n in H[:2]]


def positions(rng, device, *shape):
    found = rng.integers(-2, MAX_POSITION + 2, shape)
    return {"positions": torch.from_numpy(found).to(device)}


def cosines(rng, device, *shape):
    return {n: tensor(rng, device, *shape, D) for n in ("cos", "sin")}


def both(rng, device):
    return whole(rng, device, 5)


def rotation(rng, device, way):
    beside = {"positions": positions, "cos and sin": cosines}
    return beside[way](rng, device, 5) if way else {}


def right(qk, parts, beside, **options):
    """Return what the host makes of the same values."""
    beside = {name: array.cpu().numpy() for name, array in beside.items()}
    if "positions" in beside:  # NumPy refuses what the kernel clamps
        beside["positions"] = np.clip(beside["positions"], 0, qk.rope.max_position - 1)
    return qk(*(part.cpu().numpy() for part in parts), **beside, **options)


def same(found, expected):
    for y, values in zip(found, expected, strict=True):
        assert_alike(y.cpu().numpy(), values, slack=4 * np.abs(values).max())


WAYS = ["positions", "cos and sin", None]


@pytest.mark.parametrize("way", WAYS)
def test_the_second_call_only_looks(device, slow, way, rng):
    qk = made(rng, rotates=way is not None)
    for calls in range(3):
        parts, beside = both(rng, device), rotation(rng, device, way)
        expected = right(qk, parts, beside)
        slow.clear()
        outs = tuple(map(torch.empty_like, parts))
        same(qk(*parts, **beside), expected)
        assert qk(*parts, **beside, out=outs)[1] is outs[1]
        same(outs, expected)
        results = qk(*parts, **beside, out=tuple(parts))
        assert results[0] is parts[0]
        same(parts, expected)
        # In place is known from out of place: only addresses differ.
        assert len(slow) == (0 if calls else 2)


@pytest.mark.parametrize("way", WAYS)
def test_slices_of_one_buffer_at_other_places(device, slow, way, rng):
    """q and k as one wants them beside each other, then apart, then overlapping."""
    qk, beside = made(rng, rotates=way is not None), rotation(rng, device, way)
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


def of_torch(slow):
    """Count the calls that went step by step, without those of `right`."""
    return sum(isinstance(arrays.parts[0], torch.Tensor) for arrays in slow)


def packed(rng, device, *tokens):
    heads = tensor(rng, device, *tokens, 8, D)
    return [heads[..., 1:4, :], heads[..., 5:7, :]]


def heads_first(rng, device, *tokens):
    """The same heads as models rotate them: between the tokens and their last axis."""
    return [part.transpose(-2, -3) for part in whole(rng, device, *tokens)]


LENGTHS = {
    "tokens": (lambda n: (n,), lambda n: (n,)),
    "a sequence": (lambda n: (1, n), lambda n: (1, n)),
    "a sequence, positions alone": (lambda n: (1, n), lambda n: (n,)),
    "a batch of one token": (lambda n: (n, 1), lambda n: (n, 1)),
    "a batch of one position": (lambda n: (n, 1), lambda n: (1,)),
    "a batch of other sizes": (lambda n: (n, 3), lambda n: (1, 3)),
    "sequences": (lambda n: (2, n), lambda n: (2, n)),
}
"""Of the tokens, and of what they are rotated by."""


@pytest.mark.parametrize("target", ["new", "in place", "given"])
@pytest.mark.parametrize("beside", [positions, cosines, None])
@pytest.mark.parametrize("parts", [whole, packed, heads_first])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_another_number_of_tokens_is_no_new_plan(device, slow, lengths, parts, beside, target, rng):
    qk = made(rng, rotates=beside is not None)
    of_tokens, of_beside = LENGTHS[lengths]
    heads_axis = -3 if parts is heads_first else -2
    if parts is heads_first and lengths == "tokens":
        heads_axis = 0
    for n in (7, 4, 20, 2, 7):
        arrays = parts(rng, device, *of_tokens(n))
        rotation = {} if beside is None else beside(rng, device, *of_beside(n))
        expected = right(qk, arrays, rotation, heads_axis=heads_axis)
        out = {
            "new": None,
            "in place": tuple(arrays),
            "given": tuple(map(torch.empty_like, arrays)),
        }
        found = qk(*arrays, **rotation, heads_axis=heads_axis, out=out[target])
        same(found, expected)
    # Slices of one buffer are told apart token by token, not 3 tokens by 3.
    exactly = (lengths, parts, target) == ("a batch of other sizes", packed, "in place") and beside
    assert of_torch(slow) == (4 if exactly else 1)


def test_no_result_has_an_odd_stride(device, slow, rng):
    """The first part of a batch, after the whole of one and before it."""
    qk = made(rng, rotates=False)
    for batch, n in ((2, 5), (1, 4), (1, 3), (2, 4), (1, 4)):
        parts = [part[:batch, :n] for part in whole(rng, device, 3, 9)]
        parts = [part.contiguous() if batch > 1 else part for part in parts]
        results = qk(*parts)
        same(results, right(qk, parts, {}))
        expected = [(n * heads * D, heads * D, D, 1) for heads in H[:2]]
        assert [y.stride() for y in results] == expected
    assert of_torch(slow) == 2


def test_lengths_that_are_another_plan(device, slow, rng):
    """Nothing is derived where an axis inside of another one has the other length."""
    qk = made(rng)
    for n in (5, 3, 5, 3):
        apart = [part[:, :n] for part in whole(rng, device, 2, 6)]
        broadcast = whole(rng, device, 2, n)
        inside = [part.transpose(0, 1) for part in whole(rng, device, n, 2)]
        expanded = [part.expand(n, *part.shape[1:]) for part in whole(rng, device, 1)]
        for parts, rotation in (
            (apart, positions(rng, device, 2, n)),
            (broadcast, positions(rng, device, n)),
            (inside, positions(rng, device, 2, n)),
            (expanded, positions(rng, device, n)),
            ([expanded[0].contiguous(), expanded[1]], positions(rng, device, n)),
            ([expanded[0], expanded[1].contiguous()], positions(rng, device, 1)),
        ):
            same(qk(*parts, **rotation), right(qk, parts, rotation))
    assert of_torch(slow) == 9


def test_lengths_that_do_not_fit_are_refused_after_others_did(device, slow, rng):
    qk = made(rng)
    for beside in (positions, cosines):
        for n in (5, 4):
            qk(*whole(rng, device, n), **beside(rng, device, n))
    assert of_torch(slow) == 2
    q, k = whole(rng, device, 6)
    cos = cosines(rng, device, 6)["cos"]
    for parts, rotation, heads_axis, message in (
        ((q, k[:5]), positions(rng, device, 6), -2, "needs the same tokens"),
        ((q, k[:1]), positions(rng, device, 6), -2, "needs the same tokens"),
        ((q, k), positions(rng, device, 5), -2, "positions has shape"),
        ((q, k), positions(rng, device, 1, 1, 6), -2, "positions has shape"),
        ((q, k), {"cos": cos}, -2, "given to rotate by: cos; needs positions alone"),
        (
            (q, k),
            positions(rng, device, 6) | {"cos": cos},
            -2,
            "given to rotate by: positions, cos",
        ),
        ((q, k), {}, -2, "given to rotate by: nothing"),
        ((q, k), positions(rng, device, 6), -1, "heads_axis is -1, the axis of head_dim"),
        ((q, k), positions(rng, device, 6), 1 - 2**40, "needs one of the 64 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            qk(*parts, **rotation, heads_axis=heads_axis)


def test_results_that_overlap_at_another_length(device, slow, rng):
    """Of 3 tokens they lie beside each other, of 5 they do not."""
    qk, memory = made(rng), tensor(rng, device, 100 * D)

    def outs(n):
        starts = 0, 3 * H[0]
        return tuple(
            memory[start * D : (start + n * heads) * D].view(n, heads, D)
            for start, heads in zip(starts, H, strict=False)
        )

    for _ in range(2):
        for n in (3, 2):
            parts, rotation = whole(rng, device, n), positions(rng, device, n)
            same(qk(*parts, **rotation, out=outs(n)), right(qk, parts, rotation))
        before = memory.clone()
        with pytest.raises(ValueError, match="out of q overlaps out of k"):
            qk(*whole(rng, device, 5), **positions(rng, device, 5), out=outs(5))
        assert torch.equal(memory, before)
    assert of_torch(slow) == 3, (
        "2 tokens are derived from 3, and whatever overlaps goes step by step"
    )


@pytest.mark.parametrize("beside", [positions, cosines])
def test_a_packed_buffer_that_moves(device, slow, beside, rng):
    """Its slices stay beside each other, what rotates them is anywhere."""
    qk, kept = made(rng), []
    for of_tokens, of_beside in (((5,), (5,)), ((3,), (3,)), ((2, 3), (1, 3))):
        rotation = beside(rng, device, *of_beside)
        for _ in range(3):
            parts = packed(rng, device, *of_tokens)
            expected = right(qk, parts, rotation)
            qk(*parts, **rotation, out=tuple(parts))
            same(parts, expected)
            kept.append(parts)
    assert of_torch(slow) == 2, "5 tokens, from which 3 are derived, and 2 times 3"


def test_results_moved_onto_each_other_or_what_rotates(device, slow, rng):
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
    parts, beside = both(rng, device), rotation(rng, device, "positions")
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
    rows = positions(rng, device, 6)["positions"]
    k = tensor(rng, device, 5, 2, D)
    for q in (
        buffer[:-1].view(5, 3, D),
        buffer[1:].view(5, 3, D),
        buffer[:-1].view(3, 5, D).transpose(0, 1),
    ):
        for at in (rows[:5], rows[1:], rows[:5].int().long()):
            same(qk(q, k, positions=at), right(qk, (q, k), {"positions": at}))
    batch = [tensor(rng, device, 2, 5, n, D) for n in H[:2]]
    for beside in (
        {"positions": rows[None, :5]},
        {"positions": rows[:2, None]},
        {n: tensor(rng, device, 1, 5, D) for n in ("cos", "sin")},
    ):
        for _ in range(2):
            same(qk(*batch, **beside), right(qk, batch, beside))
    with pytest.raises(TypeError, match="positions has dtype int16; needs int32 or int64"):
        qk(q, k, positions=rows[:5].short())
    with pytest.raises(ValueError, match="needs the same tokens"):
        qk(q, k[:4], positions=rows[:5])


@pytest.mark.parametrize("way", WAYS[:2])
def test_the_axis_of_the_heads_is_that_of_the_call(device, slow, way, rng):
    """As many tokens as heads: nothing but heads_axis tells which of them rotate alike."""
    qk, beside = made(rng), rotation(rng, device, way)
    parts = [tensor(rng, device, 4, 5, 5, D) for _ in "qk"]
    expected = {axis: right(qk, parts, beside, heads_axis=axis) for axis in (-2, -3)}
    assert not np.allclose(expected[-2][0], expected[-3][0])
    slow.clear()
    for axis in (-2, -3, -2, -3):
        same(qk(*parts, **beside, heads_axis=axis), expected[axis])
    assert len(slow) == 2


def test_what_the_first_call_refuses_the_second_does_too(device, slow, rng):
    qk, (q, k), beside = made(rng), both(rng, device), rotation(rng, device, "cos and sin")
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
        with pytest.raises(ValueError, match="given to rotate by: nothing"):
            qk(q, k, out=(cos, sin))
        qk(q, k, positions=positions, out=(q, k))
        others = tuple(torch.ones(2, 4, 2, device=device) for _ in "qk")
        qk(q, k, positions=positions, out=others)
        with pytest.raises(ValueError, match="given to rotate by: positions, cos, sin"):
            qk(q, k, positions=positions, cos=others[0], sin=others[1])
        qk(q, k, positions=positions)
        for function in (qk, qk.warmup):
            with pytest.raises(TypeError, match="heads_axis is -2.0; needs an integer"):
                function(q, k, positions=positions, heads_axis=-2.0)


@pytest.mark.parametrize("device", ["stand-in"], indirect=True)
def test_an_unload_between_look_and_launch_leaves_the_memory(device, slow, monkeypatch, rng):
    """Another thread's, which here comes where the stream is asked for."""
    kept, upload, upload_pieces = [], uploads.upload, uploads.upload_pieces

    def keep(*views):
        kept.extend(weakref.ref(view.owner) for view in views)
        return views

    monkeypatch.setattr(uploads, "upload", lambda *given: keep(upload(*given))[0])
    monkeypatch.setattr(uploads, "upload_pieces", lambda *given: keep(*upload_pieces(*given)))
    qk, parts, beside = made(rng), both(rng, device), rotation(rng, device, "positions")
    expected = right(qk, parts, beside)
    qk(*parts, **beside)
    slow.clear()
    adapter = find.quick[torch.Tensor]
    stream, alive = adapter.stream, []

    def unloading(index):
        qk.unload()
        alive.extend(ref() is not None for ref in kept)
        return stream(index)

    monkeypatch.setattr(adapter, "stream", unloading)
    same(qk(*parts, **beside), expected)
    assert not slow
    assert alive == [True] * 4
    assert all(ref() is None for ref in kept)


def test_tables_come_in_pieces(device, slow, monkeypatch, rng):
    """The host never holds the whole: that of 10,485,760 positions has 5 GiB."""
    sizes, pieces = [], Rope._pieces

    def counted(rope, dtype):
        for start, *piece in pieces(rope, dtype):
            sizes.append(sum(table.size for table in piece))
            yield start, *piece

    monkeypatch.delattr(Rope, "tables")
    monkeypatch.setattr(Rope, "_pieces", counted)
    monkeypatch.setattr(embedding, "_CHUNK", 3 * D // 2)
    qk, parts, beside = made(rng), both(rng, device), rotation(rng, device, "positions")
    expected = right(qk, parts, beside)
    same(qk(*parts, **beside), expected)
    assert len(sizes) > 2
    assert max(sizes) == 2 * 3 * D // 2
    assert sum(sizes) == MAX_POSITION * D


def test_tables_that_are_too_long_are_not_made(device, slow, rng):
    qk = made(rng, max_position=2**31 // D + 1)
    with pytest.raises(ValueError, match=f"needs {2**31 // D} at most for tables .*max_position="):
        qk(*both(rng, device), **rotation(rng, device, "positions"))


def test_inner_lengths_tell_families_apart(device, slow, rng):
    qk, rows = made(rng), positions(rng, device, 2, 6)["positions"]
    for n in (3, 5, 2):
        memory = whole(rng, device, 2, 6)
        parts = [part[:, :n] for part in memory]
        after = [part[:, n:].clone() for part in memory]
        expected = right(qk, parts, {"positions": rows[:, :n]})
        same(qk(*parts, positions=rows[:, :n], out=tuple(parts)), expected)
        assert all(torch.equal(a[:, n:], b) for a, b in zip(memory, after, strict=True))


def test_results_whose_heads_lie_apart_by_their_length(device, slow, rng):
    """As many bytes from token to token, but from head to head as many as there are tokens."""
    qk = made(rng, rotates=False)
    for n in (3, 5, 2):
        parts = [tensor(rng, device, h, 6, D)[:, :n].transpose(0, 1) for h in H[:2]]
        same(qk(*parts), right(qk, parts, {}))


def test_slices_a_token_apart_overlap(device, slow, rng):
    qk = made(rng, rotates=False)
    a, b = tensor(rng, device, 6, 8, D), tensor(rng, device, 6, 8, D)
    for n in (5, 4):
        parts = a[:n, :3], b[:n, :2]
        qk(*parts, out=parts)
        before = a.clone()
        parts = a[:n, :3], a[1 : 1 + n, :2]
        with pytest.raises(ValueError, match="out of q overlaps k"):
            qk(*parts, out=parts)
        assert torch.equal(a, before)


def test_parts_that_are_broadcast_are_refused_after_expanded_ones(device, slow, rng):
    qk = made(rng, rotates=False)
    q, k = whole(rng, device, 5)
    outs = tuple(map(torch.empty_like, (q, k)))
    qk(q, k[:1].expand(5, *k.shape[1:]), out=outs)
    with pytest.raises(ValueError, match="needs the same tokens"):
        qk(q[:4], k[:1], out=(outs[0][:4], outs[1][:4]))
    q, k = whole(rng, device, 1, 5)
    qk(q, k)
    for n in (5, 4):
        with pytest.raises(ValueError, match="needs as many axes as q"):
            qk(q[:, :n], k[0, :n], out=(q[:, :n].clone(), k[0, :n].clone()))
        qk(q, k, out=tuple(map(torch.clone, (q, k))))


def test_results_whose_inner_axis_lies_outermost(device, slow, rng):
    """The results' order is that of the kernel's axes."""
    qk = made(rng, rotates=False)
    for n in (5, 3, 6):
        parts = whole(rng, device, n, 2)
        outs = tuple(
            torch.empty(2, 6, *part.shape[2:], device=device)[:, :n].transpose(0, 1)
            for part in parts
        )
        same(qk(*parts, out=outs), right(qk, parts, {}))
        outs = tuple(map(torch.empty_like, parts))
        inside = [
            torch.empty(2, 6, *part.shape[2:], device=device)[:, :n].transpose(0, 1).copy_(part)
            for part in parts
        ]
        same(qk(*inside, out=outs), right(qk, parts, {}))
        same(qk(*inside), right(qk, parts, {}))
    rows = tensor(rng, device, 2, 6, 5, D)
    for n in (5, 3, 5, 3):
        parts = rows[:, :n, :3], rows[:, :n, 3:]
        dense = tuple(torch.empty(part.shape, device=device) for part in parts)
        same(qk(*parts, out=dense), right(qk, parts, {}))


def test_no_token_after_some(device, slow, rng):
    qk = made(rng, rotates=False)
    for n in (5, 0, 4, 0):
        parts = whole(rng, device, n, 3)
        assert [len(y) for y in qk(*parts)] == [n, n]


SECTIONS = (D // 8, D // 8, D // 4)


def with_sections(rng):
    norm = HeadNorm(random(rng, D, FLOAT32))
    rope = Rope.of_theta(1e4, D, max_position=MAX_POSITION, sections=SECTIONS)
    return QKNorm(norm, norm, rope=rope)


def test_rows_of_positions_are_no_tokens(device, slow, rng):
    qk = with_sections(rng)
    for n in (5, 3, 5):
        qk(*whole(rng, device, 3, n), **positions(rng, device, 3, 3, n))
    assert of_torch(slow) == 2, "rows of 3 times 5 and of 3 times 3 lie otherwise"
    parts = whole(rng, device, 5)
    qk(*parts, **positions(rng, device, 3, 1))
    for n in (5, 4, 3):
        parts, rotation = whole(rng, device, n), positions(rng, device, 3)
        with pytest.raises(ValueError, match="a row for each of the sections"):
            qk(*parts, **rotation)


def test_cos_and_sin_of_other_shapes_are_refused_after_equal_ones(device, slow, rng):
    qk, (q, k) = made(rng), whole(rng, device, 4)
    one = cosines(rng, device, 1)
    qk(q, k, **one)
    for cos in (one["cos"][0], one["cos"].expand(4, D)):
        for parts in ((q, k), (q[:3], k[:3])):
            with pytest.raises(ValueError, match="sin has shape|cos has shape"):
                qk(*parts, cos=cos, sin=one["sin"])


@pytest.mark.parametrize("known", [False, True])
def test_arrays_without_axes_are_refused(device, slow, known, rng):
    qk, (q, k), at = made(rng), whole(rng, device, 5), positions(rng, device, 5)
    if known:
        qk(q, k, **at)
        qk(q, k, **cosines(rng, device, 5))
    scalar = tensor(rng, device)
    for call in (
        lambda: qk(q, scalar, **at),
        lambda: qk(scalar, k, **at),
        lambda: qk(q, k, **at, out=(q, scalar)),
        lambda: qk(q, k, cos=scalar, sin=scalar),
        lambda: with_sections(rng)(q, k, **positions(rng, device)),
    ):
        with pytest.raises(ValueError, match="needs"):
            call()


def test_what_overlaps_itself_is_refused_after_fewer_tokens_did_not(device, slow, rng):
    """Heads lie outermost, 5 tokens apart; or those of k alone do."""
    qk, memory = made(rng, rotates=False), tensor(rng, device, 40 * D)

    def heads_apart(n):
        (q, k), (q_heads, _) = whole(rng, device, n), H[:2]
        return [(q, k), (memory.as_strided((n, q_heads, D), (D, 5 * D, 1)), k.clone())]

    def tokens_apart(n):
        parts, (_, heads) = whole(rng, device, n, 3), H[:2]
        apart = memory.as_strided((n, 3, heads, D), (heads * D, 5 * heads * D, D, 1))
        return [parts, (parts[0].clone(), apart)]

    for made_of in (heads_apart, tokens_apart):
        qk(*made_of(5)[0], out=made_of(5)[1])
        before = memory.clone()
        parts, outs = made_of(6)
        with pytest.raises(ValueError, match="overlap themselves"):
            qk(*parts, out=outs)
        assert torch.equal(memory, before)


def test_positions_are_not_taken_for_cos(device, slow, rng):
    """Two arrays beside, of the same layouts as cos and sin."""
    qk, (q, k) = made(rng), whole(rng, device, 5)
    rotation = cosines(rng, device, 5)
    qk(q, k, **rotation)
    with pytest.raises(ValueError, match="given to rotate by: positions, sin"):
        qk(q, k, positions=rotation["cos"], sin=rotation["sin"])
