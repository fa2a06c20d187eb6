"""
QKNorm on every library: against float64, in any layout, and its bits.

The same tests run the reference on the host and the kernel on a GPU. test_qk_refusals.py has
what is refused, test_qk_calls.py remembered calls, test_qk_streams.py streams and graphs.
"""

import copy
import math
import pickle

import numpy as np
import pytest
from cases import Layout, random
from qk_cases import AROUND, COVERING, MAX_POSITION, Case, D, H, check, held, qk_norm
from stand_in import forget_calls

from cupy_headnorm import HeadNorm, QKNorm, Rope
from cupy_headnorm._arrays.dtypes import BFLOAT16, FLOAT16, FLOAT32
from cupy_headnorm._plans import qk_norm_rope


def run(library, qk, parts, beside, **more):
    parts = [library.array(part) for part in parts]
    beside = {name: library.array(array) for name, array in beside.items()}
    return [library.host(y) for y in qk(*parts, **beside, **more)]


@pytest.fixture
def forgotten(monkeypatch):
    """Forget all calls and plans."""
    forget_calls(monkeypatch)


@pytest.mark.parametrize("case", list(dict.fromkeys(AROUND + COVERING)), ids=str)
def test_matches_float64(library, case, rng, forgotten, monkeypatch):
    parts, norms, beside = made = case.made(rng, beyond=3 if library.on_gpu else 0)
    qk = qk_norm(case, norms)
    given = [library.array(part) for part in parts]
    rotation = {name: library.array(array) for name, array in beside.items()}
    found = [library.host(y) for y in qk(*given, **rotation)]
    check(case, found, made)
    for array, values in zip([*given, *rotation.values()], [*parts, *beside.values()], strict=True):
        np.testing.assert_array_equal(library.host(array), values)
    if library.on_gpu:
        # As with many tokens, when a group of threads walks several heads.
        monkeypatch.setattr(qk_norm_rope, "FEW_THREADS", -1)
        forget_calls(monkeypatch)
        for y, right in zip(run(library, qk, parts, beside), found, strict=True):
            np.testing.assert_array_equal(y, right)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_without_rope_equals_norms_one_by_one(library, kind, dtype, rng):
    case = Case(dtype.name, by=None, kind=kind, bias="own x", rounding="once", v=True, tokens=33)
    parts, norms, _ = case.made(rng)
    norms = [held(case, norm) for norm in norms]
    for y, norm, x in zip(run(library, QKNorm(*norms), parts, {}), norms, parts, strict=True):
        np.testing.assert_array_equal(y, library.host(norm(library.array(x))))


@pytest.mark.parametrize("rounding", ["once", "before_weight", "every_op"])
@pytest.mark.parametrize("head_dim", [128, 33])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_weights_and_products_below_the_normal_numbers(
    library, kind, head_dim, rounding, dtype, rng
):
    """What one kernel flushes the other does too, whatever instruction multiplies."""
    least = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}.get(dtype.name)
    least = least or 2.0**-1022
    numbers = least * 2.0 ** rng.integers(-9, 9, head_dim) * rng.choice([-1, 1], head_dim)
    x = random(rng, (100, 4, head_dim), dtype)
    for weight in (numbers.astype(dtype.numpy), (numbers * 0.37).astype(dtype.numpy)):
        norm = HeadNorm(weight, kind=kind, rounding=rounding)
        found = run(library, QKNorm(norm, norm), [x, x], {})
        right = library.host(norm(library.array(x)))
        for y in found:
            assert y.tobytes() == right.tobytes()


def parts_of(shape, strides, offsets, heads_axis=-2):
    """Return a layout for each part, `shape` and `strides` without the heads' numbers."""
    return [
        Layout("", tuple(n if size is None else size for size in shape), strides, at, heads_axis)
        for n, at in zip(H, offsets, strict=True)
    ]


TOKEN = 7 * D
"""Elements of a token where q, k and v of `H` heads lie in one buffer."""
PACKED = (0, 3 * D, 5 * D)
LAYOUTS = {
    "contiguous": parts_of((5, None, D), (3 * D, D, 1), (0, 15 * D, 30 * D)),
    "packed": parts_of((5, None, D), (TOKEN, D, 1), PACKED),
    "packed in two batches": parts_of((2, 5, None, D), (6 * TOKEN, TOKEN, D, 1), PACKED),
    "misaligned": parts_of((5, None, D), (TOKEN, D, 1), [n + 1 for n in PACKED]),
    "odd strides": parts_of((5, None, D), (8 * D + 3, D + 1, 1), (0, 3 * D + 3, 5 * D + 5)),
    "heads before tokens": parts_of(
        (2, None, 5, D), (5 * TOKEN, 5 * D, D, 1), [5 * n for n in PACKED], -3
    ),
    "transposed": parts_of((2, None, 5, D), (5 * TOKEN, D, TOKEN, 1), PACKED, -3),
    "heads first": parts_of((None, 5, D), (D, TOKEN, 1), PACKED, 0),
    "one token": parts_of((1, None, D), (TOKEN, D, 1), PACKED),
    "expanded batch": parts_of((4, 5, None, D), (0, TOKEN, D, 1), PACKED),
    "expanded heads": parts_of((5, None, D), (TOKEN, 0, 1), PACKED),
    "reversed tokens": parts_of((5, None, D), (-TOKEN, D, 1), [n + 4 * TOKEN for n in PACKED]),
    "reversed heads": [
        part._replace(offset=part.offset + (n - 1) * D)
        for n, part in zip(H, parts_of((5, None, D), (TOKEN, -D, 1), PACKED), strict=True)
    ],
    "other orders of axes": [
        Layout("", (2, 5, n, D), strides, at)
        for n, strides, at in zip(
            H,
            ((5 * TOKEN, TOKEN, D, 1), (TOKEN, 2 * TOKEN, D, 1), (5 * TOKEN, TOKEN, D, 1)),
            PACKED,
            strict=True,
        )
    ],
    "many axes": parts_of(
        (2, 1, 3, 2, 2, None, D), (16000, 7, 5200, 2500, 1100, 2 * D + 8, 1), (0, 408, 680)
    ),
}


@pytest.fixture(params=LAYOUTS)
def laid(request, library):
    """A layout of q, k and v, and the elements of their buffer."""
    if "reversed" in request.param and not library.negative_strides:
        pytest.skip("torch knows no negative strides")
    layouts = LAYOUTS[request.param]
    return layouts, max(layout.elements for layout in layouts)


def rotations_of(rng, shape, dtype):
    """Return the ways to turn tokens of a shape: what is given beside q, k and v."""
    return {
        "positions": {"positions": rng.integers(0, MAX_POSITION, shape)},
        "cos and sin": {n: random(rng, (*shape, D), dtype) for n in ("cos", "sin")},
    }


def three(rng, dtype, **options):
    """Return a QKNorm of q, k and v for `H` heads."""
    weights = [HeadNorm(random(rng, (n, D), dtype), **options) for n in H[:2]]
    rope = Rope.of_theta(1e4, D, max_position=MAX_POSITION, rounding="once")
    return QKNorm(*weights, HeadNorm(head_dim=D, **options), rope=rope)


@pytest.mark.parametrize("way", ["positions", "cos and sin"])
def test_bits_do_not_depend_on_strides_and_nothing_else_is_written(library, laid, way, dtype, rng):
    layouts, elements = laid
    heads_axis, shape = layouts[0].heads_axis, layouts[0].shape
    tokens = list(shape[:-1])
    del tokens[heads_axis + 1 if heads_axis < 0 else heads_axis]
    qk = three(rng, dtype)
    values = random(rng, elements, dtype)
    buffer = library.array(values)
    parts = [library.lay(buffer, layout) for layout in layouts]
    dense = [library.array(np.ascontiguousarray(library.host(part))) for part in parts]
    beside = rotations_of(rng, tokens, dtype)[way]
    beside = {name: library.array(array) for name, array in beside.items()}
    beside["heads_axis"] = heads_axis
    expected = [library.host(y) for y in qk(*dense, **beside)]

    def same(results):
        for y, right in zip(results, expected, strict=True):
            np.testing.assert_array_equal(library.host(y), right)

    same(qk(*parts, **beside))
    np.testing.assert_array_equal(library.host(buffer), values)
    if any(0 in layout.strides for layout in layouts):
        with pytest.raises(ValueError, match="which overlap themselves; needs one place for each"):
            qk(*parts, **beside, out=tuple(parts))
        np.testing.assert_array_equal(library.host(buffer), values)
        return
    elsewhere = library.array(np.full(elements + 5, np.nan, dtype.numpy))
    outs = tuple(library.lay(elsewhere, layout) for layout in layouts)
    results = qk(*parts, **beside, out=outs)
    assert all(result is out for result, out in zip(results, outs, strict=True))
    same(outs)
    size = sum(math.prod(layout.shape) for layout in layouts)
    assert np.count_nonzero(~np.isnan(library.host(elsewhere).astype(float))) == size
    results = qk(*parts, **beside, out=parts)  # a list is as good as a tuple
    assert all(result is part for result, part in zip(results, parts, strict=True))
    same(parts)
    named = np.zeros(elements, bool)
    for layout in layouts:
        np.lib.stride_tricks.as_strided(named[layout.offset :], layout.shape, layout.strides)[:] = 1
    np.testing.assert_array_equal(library.host(buffer)[~named], values[~named])


def test_tables_and_positions_of_any_strides(library, rng):
    """Slices of longer rows, every other position, one sequence's for a batch."""
    norm = HeadNorm(random(rng, D, FLOAT32))
    qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, 32, max_position=MAX_POSITION))
    q, k = (library.array(random(rng, (2, 5, n, D), BFLOAT16)) for n in H[:2])
    tables = [library.array(random(rng, (6, 80), BFLOAT16)) for _ in range(2)]
    positions = library.array(rng.integers(0, MAX_POSITION, (2, 10)))
    for cut in (lambda t: t[:5, 8:40], lambda t: t[1:, 1:17], lambda t: t[None, :5, :32]):
        cos, sin = map(cut, tables)
        dense = [library.array(np.ascontiguousarray(library.host(t))) for t in (cos, sin)]
        found, right = qk(q, k, cos=cos, sin=sin), qk(q, k, cos=dense[0], sin=dense[1])
        for y, expected in zip(found, right, strict=True):
            np.testing.assert_array_equal(library.host(y), library.host(expected))
    for cut in (lambda p: p[:, ::2], lambda p: p[:1, 5:], lambda p: p[1, 1::2], lambda p: p[:, :1]):
        part = cut(positions)
        whole = np.ascontiguousarray(np.broadcast_to(library.host(part), (2, 5)))
        found = qk(q, k, positions=part)
        for y, expected in zip(found, qk(q, k, positions=library.array(whole)), strict=True):
            np.testing.assert_array_equal(library.host(y), library.host(expected))


@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("sections", [(), (16, 8, 8)])
def test_positions_outside_of_the_table_are_clamped(library, integer, sections, rng):
    """By the kernel; on the host they are refused."""
    limits = np.iinfo(integer)
    norm = HeadNorm(random(rng, D, FLOAT32))
    rope = Rope.of_theta(1e4, D, max_position=MAX_POSITION, sections=sections)
    qk = QKNorm(norm, norm, rope=rope)
    parts = [random(rng, (6, n, D), FLOAT32) for n in H[:2]]
    wrong = np.array([limits.min, -1, 0, MAX_POSITION - 1, MAX_POSITION, limits.max], integer)
    right = np.array([0, 0, 0, *[MAX_POSITION - 1] * 3], integer)
    if sections:
        wrong, right = (np.stack([p, p[::-1], np.roll(p, 2)]) for p in (wrong, right))
    if not library.on_gpu:
        with pytest.raises(ValueError, match=f"positions hold {limits.max}; needs 0 to 39"):
            run(library, qk, parts, {"positions": wrong})
        return
    found = run(library, qk, parts, {"positions": wrong})
    for y, expected in zip(found, run(library, qk, parts, {"positions": right}), strict=True):
        np.testing.assert_array_equal(y, expected)


def test_packed(library, dtype, rng):
    weights = [HeadNorm(random(rng, (n, D), dtype)) for n in (4, 2)]
    rope = Rope.of_theta(1e4, D, max_position=MAX_POSITION)
    values = random(rng, (2, 5, 8 * D), dtype)
    positions = library.array(np.arange(5))
    split = [values.reshape(2, 5, 8, D)[:, :, a:b] for a, b in ((0, 4), (4, 6), (6, 8))]
    for norms in (weights, [*weights, HeadNorm(head_dim=D)]):
        qk = QKNorm(*norms, rope=rope)
        given = [library.array(part) for part in split[: len(norms)]]
        expected = [library.host(y) for y in qk(*given, positions=positions)]
        whole = np.concatenate([*expected, *split[len(norms) :]], 2).reshape(values.shape)
        qkv = library.array(values)
        assert qk.packed(qkv, num_heads=4, num_kv_heads=2, positions=positions) is qkv
        np.testing.assert_array_equal(library.host(qkv), whole)
        by_head = library.array(values.reshape(2, 5, 8, D))
        counts = {"num_heads": 4, "num_kv_heads": 2}
        assert qk.packed(by_head, **counts, positions=positions) is by_head
        np.testing.assert_array_equal(library.host(by_head).reshape(values.shape), whole)
        wide = library.array(np.concatenate([values, values[..., :5]], -1))
        qk.packed(wide[..., : 8 * D], num_heads=4, num_kv_heads=2, positions=positions)
        np.testing.assert_array_equal(library.host(wide)[..., : 8 * D], whole)
        np.testing.assert_array_equal(library.host(wide)[..., 8 * D :], values[..., :5])


@pytest.mark.parametrize("shape", [(0, 8 * D), (3, 0, 8 * D), (0, 3, 8 * D)])
@pytest.mark.parametrize("by", ["nothing", "positions", "rows of positions", "cos and sin"])
def test_packed_of_no_tokens(library, shape, by, rng):
    """NumPy and CuPy give an array of no elements strides of 0."""
    norm = HeadNorm(random(rng, D, FLOAT32))
    sections = (16, 8, 8) if by == "rows of positions" else ()
    rope = Rope.of_theta(1e4, D, max_position=MAX_POSITION, sections=sections)
    beside = {
        "nothing": {},
        "positions": {"positions": np.zeros(shape[:-1], np.int64)},
        "rows of positions": {"positions": np.zeros((3, *shape[:-1]), np.int64)},
        "cos and sin": {n: np.zeros((*shape[:-1], D), np.float32) for n in ("cos", "sin")},
    }[by]
    beside = {n: library.array(array) for n, array in beside.items()}
    if "sin" in beside:  # strides of its own
        longer = np.zeros((*(max(n, 1) for n in shape[:-1]), D), np.float32)
        beside["sin"] = library.array(longer)[tuple(slice(n) for n in shape[:-1])]
    for norms in ((norm, norm), (norm, norm, HeadNorm(head_dim=D))):
        qk = QKNorm(*norms, rope=rope if beside else None)
        qkv = library.array(np.zeros(shape, np.float32))
        assert qk.packed(qkv, num_heads=4, num_kv_heads=2, **beside) is qkv
    plain = QKNorm(HeadNorm(), HeadNorm())  # head_dim is that of the buffer
    assert plain.packed(qkv, num_heads=4, num_kv_heads=2) is qkv


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("head_dim", [64, 100, 128, 256, 1024])
def test_a_heads_bits_depend_on_the_head_alone(library, style, head_dim, dtype, rng):
    """Not on other tokens and heads, nor on where it lies; on a GPU the group of heads differs."""
    tokens = (3000 if head_dim <= 128 else 900) if library.on_gpu else 24
    rope = Rope.of_theta(1e4, head_dim, max_position=MAX_POSITION, style=style)
    norm = HeadNorm(random(rng, head_dim, dtype), rounding="every_op")
    qk = QKNorm(norm, norm, rope=rope)
    heads = (33, 2) if library.on_gpu else (5, 2)
    q, k = (random(rng, (tokens, n, head_dim), dtype) for n in heads)
    positions = rng.integers(0, MAX_POSITION, tokens)
    whole = run(library, qk, (q, k), {"positions": positions})

    def same(found, rows, of_q=slice(None), of_k=slice(None)):
        for y, right, part in zip(found, whole, (of_q, of_k), strict=True):
            np.testing.assert_array_equal(y, right[rows, part])

    for rows in (slice(0, 1), slice(17, 18), slice(5, 20), slice(0, tokens)):
        beside = {"positions": positions[rows]}
        same(run(library, qk, (q[rows], k[rows]), beside), rows)
        one = slice(1, 2)  # a head alone, beside no key
        found = run(library, qk, (q[rows, one], k[rows, :0]), beside)
        same(found, rows, one, slice(0, 0))
    rows, beside = slice(3, 20), {"positions": library.array(positions[3:20])}
    inside = [library.array(part[rows]) for part in (q, k)]
    qk(*inside, **beside, out=tuple(inside))
    same(map(library.host, inside), rows)
    shifted = []
    for part in (q[rows], k[rows]):
        buffer = np.concatenate([part.reshape(-1)[:1], part.reshape(-1)])
        strides = (part.shape[1] * head_dim, head_dim, 1)
        shifted.append(library.lay(library.array(buffer), Layout("", part.shape, strides, 1)))
    same(map(library.host, qk(*shifted, **beside)), rows)


def test_pickle_copy_repr(rng):
    qk = three(rng, FLOAT16)
    parts = [random(rng, (4, n, D), FLOAT16) for n in H]
    expected = qk(*parts, positions=np.arange(4))
    for twin in (pickle.loads(pickle.dumps(qk)), copy.copy(qk), copy.deepcopy(qk)):
        assert twin.rope == qk.rope
        assert list(twin.norms) == ["q", "k", "v"]
        for y, right in zip(twin(*parts, positions=np.arange(4)), expected, strict=True):
            np.testing.assert_array_equal(y, right)
    assert repr(qk) == (
        f"QKNorm({', '.join(map(repr, qk.norms.values()))}, rope=<half, rotary_dim=64, after norm>)"
    )
    assert "rope" not in repr(QKNorm(HeadNorm(), HeadNorm()))
    rope = Rope.of_theta(1e4, 64, max_position=4, sections=(16, 8, 8))
    qk = QKNorm(HeadNorm(), HeadNorm(), rope=rope)
    assert "rope=<half, rotary_dim=64, after norm, sections=(16, 8, 8)>" in repr(qk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by", ["int32", "int64", "whole x"])
def test_forward_reference_returns_to_the_library(library, by, dtype, rng):
    case = Case(x=dtype, by=by, v=True)
    parts, norms, beside = case.made(rng)
    qk = qk_norm(case, norms)
    right = qk(*parts, **beside)
    arrays = map(library.array, parts)
    found = qk.forward_reference(*arrays, **{n: library.array(a) for n, a in beside.items()})
    for y, expected in zip(found, right, strict=True):
        assert isinstance(y, type(library.array(expected)))
        np.testing.assert_array_equal(library.host(y), expected)


def test_the_host_makes_no_tables(rng, monkeypatch):
    """Those of a long context are gigabytes, of which a call reads few rows."""
    norm = HeadNorm(head_dim=64)
    q, positions = rng.standard_normal((3, 2, 64)).astype(np.float32), np.array([0, 5, 10**9 - 1])
    qk = QKNorm(norm, norm, rope=Rope.of_theta(1e4, 64, max_position=10**9))
    for name in ("tables", "_pieces"):
        monkeypatch.delattr(Rope, name)
    rotated, _ = qk(q, q, positions=positions)
    cos, sin = qk.rope.at(positions, np.float32)
    np.testing.assert_array_equal(rotated, qk(q, q, cos=cos, sin=sin)[0])


def test_the_stride_of_one_row_says_nothing(rng):
    rope = Rope.of_theta(1e4, 64, max_position=8)
    norm = HeadNorm(head_dim=64)
    qk, q = QKNorm(norm, norm, rope=rope), rng.standard_normal((1, 5, 2, 64))
    cos, sin = (table[np.newaxis] for table in rope.at(np.arange(5), np.float64))
    longer = np.zeros((1, 8, 32))
    longer[:, :5] = sin
    assert longer.strides[0] != cos.strides[0]
    for y, right in zip(
        qk(q, q, cos=cos, sin=longer[:, :5]), qk(q, q, cos=cos, sin=sin), strict=True
    ):
        np.testing.assert_array_equal(y, right)
