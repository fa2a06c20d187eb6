"""
QKNorm on every library: against float64, in any layout, its refusals and its bits.

The same tests run the reference on the host and the kernel on a GPU. tests/test_qk_calls.py has
remembered calls, streams and graphs.
"""

import copy
import math
import pickle

import numpy as np
import pytest
from cases import Layout, random
from qk_cases import AROUND, COVERING, MAX_POSITION, Case, check

from cupy_headnorm import (
    HeadNorm,
    QKNorm,
    Rope,
    _layout,
    _parts,
    _parts_launch,
    _qk_dispatch,
    _spec,
)
from cupy_headnorm import rope as rotary
from cupy_headnorm._dtypes import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64
from cupy_headnorm._parts import PartNorm
from cupy_headnorm._turning import Turning

GPU = _layout.Device("cuda", 0)


def held(parameters, head_dim):
    weight, bias, options = parameters
    return HeadNorm(weight, bias, head_dim=head_dim, **options)


def run(library, qk, parts, beside, **more):
    parts = [library.array(part) for part in parts]
    beside = {name: library.array(array) for name, array in beside.items()}
    return [library.host(y) for y in qk(*parts, **beside, **more)]


@pytest.fixture
def forgotten(monkeypatch):
    """Forget all calls and plans."""
    monkeypatch.setattr(_qk_dispatch, "_thread", _qk_dispatch._Thread())
    monkeypatch.setattr(_qk_dispatch, "_plans", {})


@pytest.mark.parametrize("case", list(dict.fromkeys(AROUND + COVERING)), ids=str)
def test_matches_float64(library, case, rng, forgotten, monkeypatch):
    parts, norms, beside = made = case.made(rng)
    qk = QKNorm(*(held(norm, case.head_dim) for norm in norms), rope=case.rope())
    given = [library.array(part) for part in parts]
    turning = {name: library.array(array) for name, array in beside.items()}
    found = [library.host(y) for y in qk(*given, **turning)]
    check(case, found, made)
    for array, values in zip([*given, *turning.values()], [*parts, *beside.values()], strict=True):
        np.testing.assert_array_equal(library.host(array), values)
    if library.on_gpu:
        # As with many tokens, when a group of threads walks several heads.
        monkeypatch.setattr(_parts_launch, "FEW_THREADS", -1)
        _qk_dispatch._plans.clear()
        _qk_dispatch._thread.calls.clear()
        for y, right in zip(run(library, qk, parts, beside), found, strict=True):
            np.testing.assert_array_equal(y, right)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_without_rope_equals_norms_one_by_one(library, kind, dtype, rng):
    case = Case(dtype.name, by=None, kind=kind, bias="own x", rounding="once", v=True, tokens=33)
    parts, norms, _ = case.made(rng)
    norms = [held(norm, case.head_dim) for norm in norms]
    for y, norm, x in zip(run(library, QKNorm(*norms), parts, {}), norms, parts, strict=True):
        np.testing.assert_array_equal(y, library.host(norm(library.array(x))))


# Where q, k and v of 3, 2 and 2 heads lie in one buffer.
H, D, TOKEN = (3, 2, 2), 64, 7 * 64


def parts_of(shape, strides, offsets, heads_axis=-2, name=""):
    """Return a layout for each part, `shape` and `strides` without the heads' numbers."""
    return [
        Layout(name, tuple(n if size is None else size for size in shape), strides, at, heads_axis)
        for n, at in zip(H, offsets, strict=True)
    ]


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


def turning_of(rng, shape, dtype, width=D):
    """Return one way to turn for each test's arrays: of each token."""
    return {
        "positions": {"positions": rng.integers(0, MAX_POSITION, shape)},
        "cos and sin": {n: random(rng, (*shape, width), dtype) for n in ("cos", "sin")},
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
    beside = turning_of(rng, tokens, dtype)[way]
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
    limits = np.iinfo(integer)
    norm = HeadNorm(random(rng, D, FLOAT32))
    rope = Rope.of_theta(1e4, D, max_position=MAX_POSITION, sections=sections)
    qk = QKNorm(norm, norm, rope=rope)
    parts = [random(rng, (6, n, D), FLOAT32) for n in H[:2]]
    wrong = np.array([limits.min, -1, 0, MAX_POSITION - 1, MAX_POSITION, limits.max], integer)
    right = np.array([0, 0, 0, *[MAX_POSITION - 1] * 3], integer)
    if sections:
        wrong, right = (np.stack([p, p[::-1], np.roll(p, 2)]) for p in (wrong, right))
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
        wide = library.array(np.concatenate([values, values[..., :5]], -1))
        qk.packed(wide[..., : 8 * D], num_heads=4, num_kv_heads=2, positions=positions)
        np.testing.assert_array_equal(library.host(wide)[..., : 8 * D], whole)
        np.testing.assert_array_equal(library.host(wide)[..., 8 * D :], values[..., :5])


# Refusals. Each changes one thing of a call that is right.
def f(*shape, dtype=np.float32):
    return np.linspace(-1, 1, math.prod(shape)).reshape(shape).astype(dtype)


RIGHT = {"q": f(5, 3, D), "k": f(5, 2, D), "positions": np.arange(5)}
COS = {"positions": None, "cos": f(5, D), "sin": f(5, D)}
REFUSED = {
    "k of other tokens": ({"k": f(4, 2, D)}, r"k has shape \(4, 2, 64\) and q \(5, 3, 64\); needs"),
    "k of other axes": ({"k": f(1, 5, 2, D)}, r"k has shape \(1, 5, 2, 64\) and q .*as many axes"),
    "k of another dtype": ({"k": f(5, 2, D, dtype=np.float16)}, "k has dtype float16; needs that"),
    "k of another head_dim": ({"k": f(5, 2, 32)}, r"k has shape \(5, 2, 32\); needs a last axis o"),
    "q of another head_dim": ({"q": f(5, 3, 32)}, r"q has shape \(5, 3, 32\); needs a last axis o"),
    "integers": ({"q": np.ones((5, 3, D), int)}, "has dtype int64; needs float16, bfloat16, float"),
    "integers as k": ({"k": np.ones((5, 2, D), int)}, "k has dtype int64; needs float16, bfloat16"),
    "one axis": ({"q": f(D), "k": f(D)}, r"q has shape \(64,\) and heads_axis is -2; needs heads"),
    "heads_axis too far": ({"heads_axis": -4}, r"q has shape \(5, 3, 64\) and heads_axis is -4; n"),
    "heads_axis on head_dim": ({"heads_axis": -1}, "heads_axis is -1, the axis of head_dim"),
    "heads_axis on head_dim, from the front": ({"heads_axis": 2}, r"and heads_axis is 2; needs"),
    "heads_axis no integer": ({"heads_axis": "2"}, "heads_axis is '2'; needs an integer"),
    "v without v_norm": ({"v": f(5, 2, D)}, "v is given and there is no v_norm; needs q and k onl"),
    "float positions": ({"positions": f(5)}, "positions has dtype float32; needs int32 or int64"),
    "int16 positions": ({"positions": np.arange(5, dtype="i2")}, "positions has dtype int16; need"),
    "positions of other tokens": ({"positions": np.arange(4)}, r"positions has shape \(4,\); need"),
    "positions of more axes": ({"positions": np.ones((1, 5), int)}, r"positions has shape \(1, 5"),
    "nothing to turn by": ({"positions": None}, "given to turn by: nothing; needs positions alone"),
    "positions, cos and sin": (COS | {"positions": np.arange(5)}, "given to turn by: positions, c"),
    "positions and cos": ({"cos": f(5, D)}, "given to turn by: positions, cos; needs positions"),
    "cos without sin": (COS | {"sin": None}, "given to turn by: cos; needs positions alone, or"),
    "sin without cos": (COS | {"cos": None}, "given to turn by: sin; needs positions alone, or"),
    "cos of wrong dtype": (
        COS | {n: f(5, D, dtype=np.float16) for n in ("cos", "sin")},
        "cos has dtype float16 and sin float16; needs that of q, float32, or float32 of both",
    ),
    "sin of another dtype": (COS | {"sin": f(5, D, dtype=float)}, "cos has dtype float32 and sin"),
    "integer cos": (COS | {"cos": np.ones((5, D), int)}, "cos has dtype int64; needs float16, bfl"),
    "cos of wrong width": (
        COS | {"cos": f(5, 48), "sin": f(5, 48)},
        r"cos has shape \(5, 48\); needs a last axis of 64 or 32, for rotary_dim=64",
    ),
    "sin of another width": (COS | {"sin": f(5, 32)}, r"cos has shape \(5, 64\) and sin \(5, 32\)"),
    "cos of other tokens": (
        COS | {"cos": f(4, D), "sin": f(4, D)},
        r"cos has shape \(4, 64\); needs \(5,\) of q's tokens and a last axis of its own, or what",
    ),
    "cos with heads": (COS | {n: f(5, 1, D) for n in ("cos", "sin")}, r"cos has shape \(5, 1, 64"),
    "out no tuple": ({"out": "q"}, r"out is a .*; needs a tuple of 2 arrays"),
    "out of one": ({"out": ("q",)}, "out is a tuple; needs a tuple of 2 arrays"),
    "out of another shape": ({"out": ("q", f(5, 3, D))}, r"out of k has shape \(5, 3, 64\); needs"),
    "out of another dtype": (
        {"out": (f(5, 3, D, dtype=np.float16), "k")},
        "out of q has dtype float16; needs that of q, float32",
    ),
    "out crosswise": ({"q": f(5, 2, D), "out": ("k", "q")}, "out of q overlaps k; needs"),
    "one out for both": ({"q": f(5, 2, D), "out": ("q", "q")}, "out of q overlaps (k|out of k)"),
    "out is cos": (COS | {"q": f(5, D, 1), "k": f(5, D, 1)}, "needs a last axis of head_dim=64"),
}  # fmt: skip


def turner(**options):
    norm = HeadNorm(f(D) + 2)
    return QKNorm(norm, norm, rope=Rope.of_theta(1e4, D, max_position=16, **options))


def call(qk, given, **more):
    names = [name for name in ("q", "k", "v") if name in given]
    rest = {name: array for name, array in given.items() if name not in names}
    return qk(*(given[name] for name in names), **rest, **more)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(library, name):
    changes, message = REFUSED[name]
    qk = turner()
    right = {n: library.array(array) for n, array in RIGHT.items()}
    both = {n: library.array(array) for n, array in (RIGHT | COS).items() if array is not None}
    given = RIGHT | changes
    given |= {n: library.array(a) for n, a in given.items() if isinstance(a, np.ndarray)}
    if isinstance(given.get("out"), tuple):
        given["out"] = tuple(
            given[a] if isinstance(a, str) else library.array(a) for a in given["out"]
        )
    elif "out" in given:
        given["out"] = given[given["out"]]
    arrays = [a for n, a in given.items() if n not in ("out", "heads_axis") and a is not None]
    arrays += given["out"] if isinstance(given.get("out"), tuple) else ()
    before = [library.host(array).copy() for array in arrays]
    outs = tuple(library.array(RIGHT[n]) for n in "qk")
    for _ in range(3):  # also after right calls like it that are remembered
        with pytest.raises((TypeError, ValueError), match=message):
            call(qk, given)
        for array, values in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(library.host(array), values)
        first, again = call(qk, right), call(qk, both, out=outs)
        call(qk, right, out=outs), call(qk, both)
        assert library.host(first[0]).any()
        assert again[0] is outs[0]


def test_missing_v_sections_and_no_rope(library):
    q, k, v, positions = (
        library.array(a) for a in (f(5, 3, D), f(5, 2, D), f(5, 2, D), np.arange(5))
    )
    norm = HeadNorm(head_dim=D)
    with pytest.raises(TypeError, match="no v is given; needs one for v_norm"):
        QKNorm(norm, norm, norm)(q, k)
    with pytest.raises(TypeError, match="out is a tuple; needs a tuple of 3 arrays"):
        QKNorm(norm, norm, norm)(q, k, v, out=(q, k))
    with pytest.raises(ValueError, match="positions is given and there is no rope"):
        QKNorm(norm, norm)(q, k, positions=positions)
    with pytest.raises(
        ValueError, match=r"positions have shape \(5,\); needs \(3, \.\.\.\), a row"
    ):
        turner(sections=(16, 8, 8))(q, k, positions=positions)
    wide = QKNorm(HeadNorm(), HeadNorm(), rope=Rope.of_theta(1e4, 66, max_position=4))
    with pytest.raises(ValueError, match="rotary_dim is 66; needs head_dim=64 at most"):
        wide(q, k, positions=positions)
    per_head = HeadNorm(f(4, D))
    with pytest.raises(ValueError, match=r"q has shape \(5, 3, 64\), 3 heads; needs num_heads=4"):
        QKNorm(per_head, norm)(q, k)
    one = HeadNorm(f(D), num_heads=1)
    with pytest.raises(ValueError, match=r"k has shape \(5, 2, 64\), 2 heads; needs num_heads=1"):
        QKNorm(norm, one)(q, k)
    QKNorm(norm, HeadNorm(f(1, D)))(q, k)


def test_refused_layouts_and_overlaps(library):
    qk, positions = turner(), library.array(np.arange(5))
    buffer = library.array(f(5, 8 * D))
    before = library.host(buffer).copy()
    heads = buffer.reshape(5, 8, D)
    wide, k = library.array(f(5, 3, 2 * D)), library.array(f(5, 2, D))
    with pytest.raises(ValueError, match="q has a stride of 8 bytes on its last axis; needs 4"):
        qk(wide[..., ::2], k, positions=positions)
    with pytest.raises(ValueError, match="out of q has a stride of 8 bytes on its last axis"):
        qk(library.array(f(5, 3, D)), k, positions=positions, out=(wide[..., ::2], k))
    cos = library.array(f(5, 2 * D))[:, ::2]
    with pytest.raises(ValueError, match="cos has a stride of 8 bytes on its last axis"):
        qk(heads[:, :3], k, cos=cos, sin=cos)
    q, new = heads[:, :3], library.array(f(5, 3, D))
    with pytest.raises(ValueError, match="out of q overlaps q in part; needs q itself or sep"):
        qk(q, k, positions=positions, out=(heads[:, 1:4], k))
    for out in ((q, heads[:, 2:4]), (new, heads[:, 2:4])):
        with pytest.raises(ValueError, match="out of . overlaps"):
            qk(q, heads[:, 2:4], positions=positions, out=out)
    with pytest.raises(ValueError, match="out of q overlaps cos"):  # with its own cosines
        qk(new, k, cos=heads[:, 0], sin=heads[:, 1], out=(heads[:, :3], k))
    for width, counts in (
        (7 * D, {"num_heads": 4, "num_kv_heads": 2}),
        (8 * D, {"num_heads": 4, "num_kv_heads": 3}),
    ):
        with pytest.raises(
            ValueError, match=rf"qkv has shape \(5, {width}\); needs a last axis of"
        ):
            qk.packed(buffer[:, :width], **counts, positions=positions)
    for counts, message in (
        ({"num_heads": 0, "num_kv_heads": 2}, "num_heads is 0; needs 1 or more"),
        ({"num_heads": 4, "num_kv_heads": 2.0}, "num_kv_heads is 2.0; needs an integer"),
        ({"num_heads": None, "num_kv_heads": 2}, "num_heads is None; needs an integer"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            qk.packed(buffer, **counts, positions=positions)
    with pytest.raises(TypeError, match="qkv is a list; needs a NumPy, CuPy or torch array"):
        qk.packed([1.0], num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="qkv has a stride of 8|q has a stride of 8"):
        qk.packed(
            library.array(f(5, 16 * D))[:, ::2], num_heads=4, num_kv_heads=2, positions=positions
        )
    np.testing.assert_array_equal(library.host(buffer), before)


def test_refused_norms():
    a, per_head = HeadNorm(f(D)), f(3, D)
    for norms, message in (
        ((a, f(D)), "k_norm is a ndarray; needs a HeadNorm"),
        (
            (a, HeadNorm(f(D), kind="layer")),
            "the norm of k has kind 'layer'; needs that of q, 'rms'",
        ),
        ((a, HeadNorm(f(D), rounding="every_op")), "the norm of k has rounding 'every_op'; needs"),
        ((a, HeadNorm(head_dim=D, rounding="rstd")), "the norm of k has rounding 'rstd'; needs"),
        ((a, HeadNorm(f(32))), "the norms of q and k have head_dim 64 and 32; needs one"),
        ((a, a, HeadNorm(head_dim=32)), "the norms of q and v have head_dim 64 and 32; needs one"),
        ((a, HeadNorm(f(D, dtype=np.float16))), "dtypes of weight are float32 of q, float16 of k"),
        ((HeadNorm(per_head, f(D)), HeadNorm(f(D), f(D, dtype=np.float16))), "dtypes of bias are"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            QKNorm(*norms)
    with pytest.raises(ValueError, match="rotary_dim is 66; needs at most head_dim, which is 64"):
        QKNorm(a, a, rope=Rope.of_theta(1e4, 66, max_position=4))
    with pytest.raises(TypeError, match=r"rope is a dict; needs a cupy_headnorm.Rope"):
        QKNorm(a, a, rope={})
    with pytest.raises(ValueError, match="rotary_dim is 33; needs an even number"):
        Rope.of_theta(1e4, 33, max_position=4)
    plain = HeadNorm(head_dim=D, rounding="every_op")  # says nothing without a weight
    x = f(5, 3, D)
    expected = HeadNorm()(x)
    for y in QKNorm(plain, HeadNorm(head_dim=D), plain)(x, x, x):
        np.testing.assert_array_equal(y, expected)


def test_other_libraries_and_read_only_results():
    torch = pytest.importorskip("torch")
    q, k = f(5, 3, D), f(5, 2, D)
    with pytest.raises(TypeError, match=r"k is a Tensor \(torch\); needs the library of q, numpy"):
        turner()(q, torch.from_numpy(k), positions=np.arange(5))
    with pytest.raises(TypeError, match="positions is a list; needs a NumPy, CuPy or torch array"):
        turner()(q, k, positions=[0, 1, 2, 3, 4])
    k.flags.writeable = False
    with pytest.raises(ValueError, match="out of k is read-only; needs a writeable array"):
        turner()(q, k, positions=np.arange(5), out=(q, k))
    np.testing.assert_array_equal(q, f(5, 3, D))
    turner().warmup(q, k, positions=np.arange(5))
    with pytest.raises(ValueError, match="k requires grad and grad mode is on"):
        turner()(
            torch.ones(5, 3, D), torch.ones(5, 2, D).requires_grad_(), positions=torch.arange(5)
        )


@pytest.mark.gpu
def test_arrays_of_two_devices_are_refused():
    torch = pytest.importorskip("torch")
    cpu = {n: torch.from_numpy(a) for n, a in (RIGHT | COS).items() if a is not None}
    cpu["positions"] = torch.arange(5)
    qk, cuda = turner(), {n: a.cuda() for n, a in cpu.items()}
    tables = {n: a for n, a in cuda.items() if n != "positions"}
    for name, given in (
        ("k", {n: cuda[n] for n in RIGHT}), ("positions", {n: cuda[n] for n in RIGHT}),
        ("cos", tables), ("sin", tables),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name} is on cpu; needs the device of q, cuda:0"):
            call(qk, given | {name: cpu[name]})
    with pytest.raises(TypeError, match="is on cpu; needs"):
        call(qk, {n: cuda[n] for n in RIGHT}, out=(cuda["q"], cpu["k"]))


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


def planned(dtype, head_dim):
    """Return the geometry of q and k that turn, on a GPU."""
    x = _layout.Layout((1, 1, head_dim), (0, 0, dtype.itemsize), dtype, GPU, 16)
    row = _layout.Layout((1, 2), (0, dtype.itemsize), dtype, GPU, 16)
    norm = PartNorm(_spec.options("rms", head_dim=head_dim), None, None)
    turning = Turning("half", False, 2, True, (), False, (True, True), row, row, None)
    parts = {"q": x, "k": x}
    return _parts_launch.plan(_parts.describe(dict.fromkeys("qk", norm), parts, parts, turning, -2))


PROMISED = {dtype: 3072 if dtype is FLOAT64 else 4096 for dtype in DTYPES}
"""Of a head, in QKNorm's docstring."""


@pytest.mark.parametrize("row", DTYPES, ids=str)
def test_heads_of_any_promised_length_fit_a_gpu(row):
    for head_dim in range(2, PROMISED[row] + 1):
        planned(row, head_dim)  # refuses what does not fit


@pytest.mark.parametrize(
    ("row", "head_dim", "message"),
    [
        (FLOAT16, 16384, "takes 65536 bytes of shared memory to turn; needs 49152 at most"),
        (FLOAT64, 3073, "takes 53248 bytes of shared memory to turn; needs 49152 at most"),
        (BFLOAT16, 4097, "head_dim is 4097; needs .* at most for bfloat16"),
    ],
    ids=str,
)
def test_a_head_too_long_for_a_gpu_is_refused_there_alone(row, head_dim, message, rng):
    with pytest.raises(ValueError, match=message):
        planned(row, head_dim)
    q = rng.standard_normal((2, 1, head_dim)).astype(row.numpy)
    norm = HeadNorm(head_dim=head_dim)
    rope = Rope.of_theta(1e4, 64, max_position=4)
    y, _ = QKNorm(norm, norm, rope=rope)(q, q, positions=np.arange(2))
    cos, sin = rope.at(np.arange(2), row.numpy)
    expected = rotary.apply(norm(q), cos[:, None], sin[:, None], rotary_dim=64)
    np.testing.assert_array_equal(y, expected)
