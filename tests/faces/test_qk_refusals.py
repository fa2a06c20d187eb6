"""What QKNorm refuses, on every library."""

import math

import numpy as np
import pytest
from qk_cases import D

from cupy_headnorm import HeadNorm, QKNorm, Rope
from cupy_headnorm._arrays import layout
from cupy_headnorm._arrays.dtypes import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64
from cupy_headnorm._plans import qk_norm_rope
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm._rules import parts as part_rules
from cupy_headnorm._rules.parts import PartNorm
from cupy_headnorm._rules.rotary import Rotation
from cupy_headnorm.rope import numpy as rope_numpy

GPU = layout.Device("cuda", 0)


def f(*shape, dtype=np.float32):
    """Return values from -1 to 1."""
    return np.linspace(-1, 1, math.prod(shape)).reshape(shape).astype(dtype)


RIGHT = {"q": f(5, 3, D), "k": f(5, 2, D), "positions": np.arange(5)}
COS = {"positions": None, "cos": f(5, D), "sin": f(5, D)}
# Each changes one thing of a call that is right.
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
    "v without v_norm": ({"v": f(5, 2, D)}, r"there is no v_norm; .* by keyword \(positions="),
    "float positions": ({"positions": f(5)}, "positions has dtype float32; needs int32 or int64"),
    "int16 positions": ({"positions": np.arange(5, dtype="i2")}, "positions has dtype int16; need"),
    "positions of other tokens": ({"positions": np.arange(4)}, r"positions has shape \(4,\); need"),
    "positions of more axes": ({"positions": np.ones((1, 5), int)}, r"positions has shape \(1, 5"),
    "nothing to rotate by": ({"positions": None}, "to rotate by: nothing; needs positions alone"),
    "positions, cos and sin": (COS | {"positions": np.arange(5)}, "to rotate by: positions, c"),
    "positions and cos": ({"cos": f(5, D)}, "given to rotate by: positions, cos; needs positions"),
    "cos without sin": (COS | {"sin": None}, "given to rotate by: cos; needs positions alone, or"),
    "sin without cos": (COS | {"cos": None}, "given to rotate by: sin; needs positions alone, or"),
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


def rotator(**options):
    norm = HeadNorm(f(D) + 2)
    return QKNorm(norm, norm, rope=Rope.of_theta(1e4, D, max_position=16, **options))


def call(qk, given, **more):
    names = [name for name in ("q", "k", "v") if name in given]
    rest = {name: array for name, array in given.items() if name not in names}
    return qk(*(given[name] for name in names), **rest, **more)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(library, name):
    changes, message = REFUSED[name]
    qk = rotator()
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


@pytest.mark.parametrize(
    ("offset", "step", "aligned"), [(4, 8, 4), (1, 8, 1), (0, 12, 4), (0, 9, 1)]
)
def test_positions_off_their_boundaries(offset, step, aligned):
    """Their load is one of 8 bytes, which a GPU refuses there for good."""
    memory = np.zeros(80, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :]
    positions = np.ndarray((5,), np.int64, memory, offset, (step,))
    with pytest.raises(
        ValueError, match=f"positions are aligned to {aligned} bytes; needs 8, the size of int64"
    ):
        rotator()(f(5, 3, D), f(5, 2, D), positions=positions)
    alone = np.ndarray((1,), np.int64, memory, 0, (step,))
    rotator()(f(5, 3, D), f(5, 2, D), positions=alone)


def overlapping():
    """Return rows of which each begins inside of the one before."""
    return np.lib.stride_tricks.as_strided(np.zeros(12 * D, np.float32), (5, 8 * D), (4 * D, 4))


BUFFERS = {
    "no shape": (lambda: object(), "qkv is a object; needs a NumPy, CuPy or torch array"),
    "none": (lambda: None, "qkv is a NoneType; needs a NumPy, CuPy or torch array"),
    "a matrix": (lambda: f(5, 8 * D).view(np.matrix), "qkv is a matrix, whose meaning a norm"),
    "masked": (lambda: np.ma.masked_array(f(5, 8 * D)), "qkv is a MaskedArray, whose meaning"),
    "no axis": (lambda: np.array(1, np.float32), r"qkv has shape \(\); needs a last axis of 512"),
    "integers": (lambda: np.ones((5, 8 * D), int), "qkv has dtype int64; needs float16, bfloat16"),
    "gaps": (lambda: f(5, 16 * D)[:, ::2], "qkv has a stride of 8 bytes on its last axis; needs 4"),
    "backwards": (lambda: f(5, 8 * D)[:, ::-1], "qkv has a stride of -4 bytes on its last axis"),
    "read-only": (lambda: np.broadcast_to(f(8 * D), (5, 8 * D)), "qkv is read-only; needs a write"),
    "overlapping": (overlapping, r"qkv has shape \(5, 512\) and .* overlap themselves; needs one"),
}
"""NumPy's, that no norm can take."""
TENSORS = {
    "nested": (
        lambda torch: torch.nested.nested_tensor([torch.ones(3, 8 * D), torch.ones(2, 8 * D)]),
        "qkv is nested; needs a strided tensor with memory",
    ),
    "jagged": (
        lambda torch: torch.nested.nested_tensor(
            [torch.ones(3, 8 * D), torch.ones(2, 8 * D)], layout=torch.jagged
        ),
        "qkv is a NestedTensor, a subclass of torch.Tensor; needs a plain tensor",
    ),
    "sparse": (lambda torch: torch.ones(5, 8 * D).to_sparse(), "qkv is of layout torch.sparse_coo"),
    "rows": (lambda torch: torch.ones(5, 8 * D).to_sparse_csr(), "qkv is of layout torch.sparse_c"),
    "mkldnn": (lambda torch: torch.ones(5, 8 * D).to_mkldnn(), "qkv is of layout torch._mkldnn; n"),
    "meta": (lambda torch: torch.ones(5, 8 * D, device="meta"), "qkv is on the meta device, with"),
    "grad": (lambda torch: torch.ones(5, 8 * D, requires_grad=True), "qkv requires grad and grad"),
    "negated": (lambda torch: torch._neg_view(torch.ones(5, 8 * D)), "qkv is a lazily negated vi"),
    "integers": (lambda torch: torch.ones(5, 8 * D, dtype=torch.int8), "qkv has dtype int8; needs"),
    "expanded": (lambda torch: torch.ones(8 * D).expand(5, -1), "qkv has .* overlap themselves; n"),
    "gaps": (lambda torch: torch.ones(5, 16 * D)[:, ::2], "qkv has a stride of 8 bytes on its l"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_a_packed_buffer_is_refused_by_its_own_name(name):
    make, message = BUFFERS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        rotator().packed(make(), num_heads=4, num_kv_heads=2, positions=np.arange(5))


@pytest.mark.filterwarnings("ignore:.*(nested|sparse|mkldnn|Sparse)")
@pytest.mark.parametrize("name", TENSORS)
def test_a_packed_tensor_is_refused_by_its_own_name(name):
    torch = pytest.importorskip("torch")
    make, message = TENSORS[name]
    qkv = make(torch)
    with pytest.raises((TypeError, ValueError), match=message):
        rotator().packed(qkv, num_heads=4, num_kv_heads=2, positions=torch.arange(5))


def test_a_packed_buffer_with_gaps_is_refused_after_its_like(library):
    """A reshape would copy it, and the copy be normalized."""
    qk, positions = rotator(), library.array(np.arange(5))
    gaps = library.array(f(5, 16 * D))
    for _ in range(2):
        qkv = library.array(f(5, 8 * D))
        qk.packed(qkv, num_heads=4, num_kv_heads=2, positions=positions)
        with pytest.raises(ValueError, match="qkv has a stride of 8 bytes on its last axis"):
            qk.packed(gaps[:, ::2], num_heads=4, num_kv_heads=2, positions=positions)
    np.testing.assert_array_equal(library.host(gaps), f(5, 16 * D))


@pytest.mark.parametrize("sections", [(), (16, 8, 8)])
@pytest.mark.parametrize("wrong", [-1, 16, -(2**31), 2**31 - 1])
def test_positions_outside_of_the_table(library, wrong, sections):
    """Refused where looking costs nothing, before anything is written."""
    qk = rotator(sections=sections)
    positions = np.array([3, 0, 15, wrong, 7], np.int32)
    positions = np.stack([np.zeros_like(positions)] * 2 + [positions]) if sections else positions
    q, k, qkv, positions = map(library.array, (RIGHT["q"], RIGHT["k"], f(5, 7 * D), positions))
    calls = (
        lambda: qk(q, k, positions=positions),
        lambda: qk(q, k, positions=positions, out=(q, k)),
        lambda: qk.packed(qkv, num_heads=3, num_kv_heads=2, positions=positions),
    )
    for call in () if library.on_gpu else calls:
        with pytest.raises(ValueError, match=rf"positions hold {wrong}; needs 0 to 15, (or|and)"):
            call()
    # It computes on the host whatever it is given.
    with pytest.raises(ValueError, match=f"positions hold {wrong}; needs 0 to 15"):
        qk.forward_reference(q, k, positions=positions)
    for array, values in ((q, RIGHT["q"]), (k, RIGHT["k"]), (qkv, f(5, 7 * D))):
        np.testing.assert_array_equal(library.host(array), values)
    qk.warmup(q, k, positions=positions)  # of arrays laid out like these


def test_one_position_a_token_where_three_are_needed():
    qk = rotator(sections=(8, 12, 12))
    with pytest.raises(
        ValueError, match=r"positions have shape \(3,\); needs \(3, \.\.\.\), a row .*of \(3,\) or"
    ):
        qk(f(3, 3, D), f(3, 2, D), positions=np.arange(3))
    one = qk(f(3, D), f(2, D), positions=np.arange(3))
    some = qk(f(3, D)[None], f(2, D)[None], positions=np.arange(3)[:, None])
    np.testing.assert_array_equal(one[0], some[0][0])


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
        rotator(sections=(16, 8, 8))(q, k, positions=positions)
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
    qk, positions = rotator(), library.array(np.arange(5))
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
            ValueError,
            match=rf"qkv has shape \(5, {width}\); needs a last axis of .* or last axes of",
        ):
            qk.packed(buffer[:, :width], **counts, positions=positions)
    plain = QKNorm(HeadNorm(), HeadNorm())
    with pytest.raises(
        ValueError, match=r"needs a last axis of a multiple of 7, 3 \+ 2 \* 2 heads of one length"
    ):
        plain.packed(buffer[:, :54], num_heads=3, num_kv_heads=2)
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
        rotator()(q, torch.from_numpy(k), positions=np.arange(5))
    with pytest.raises(TypeError, match="positions is a list; needs a NumPy, CuPy or torch array"):
        rotator()(q, k, positions=[0, 1, 2, 3, 4])
    k.flags.writeable = False
    with pytest.raises(ValueError, match="out of k is read-only; needs a writeable array"):
        rotator()(q, k, positions=np.arange(5), out=(q, k))
    np.testing.assert_array_equal(q, f(5, 3, D))
    rotator().warmup(q, k, positions=np.arange(5))
    with pytest.raises(ValueError, match="k requires grad and grad mode is on"):
        rotator()(
            torch.ones(5, 3, D), torch.ones(5, 2, D).requires_grad_(), positions=torch.arange(5)
        )


@pytest.mark.gpu
def test_arrays_of_two_devices_are_refused():
    torch = pytest.importorskip("torch")
    cpu = {n: torch.from_numpy(a) for n, a in (RIGHT | COS).items() if a is not None}
    cpu["positions"] = torch.arange(5)
    qk, cuda = rotator(), {n: a.cuda() for n, a in cpu.items()}
    tables = {n: a for n, a in cuda.items() if n != "positions"}
    for name, given in (
        ("k", {n: cuda[n] for n in RIGHT}), ("positions", {n: cuda[n] for n in RIGHT}),
        ("cos", tables), ("sin", tables),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name} is on cpu; needs the device of q, cuda:0"):
            call(qk, given | {name: cpu[name]})
    with pytest.raises(TypeError, match="is on cpu; needs"):
        call(qk, {n: cuda[n] for n in RIGHT}, out=(cuda["q"], cpu["k"]))


def planned(dtype, head_dim):
    """Return the geometry of q and k that turn, on a GPU."""
    x = layout.Layout((1, 1, head_dim), (0, 0, dtype.itemsize), dtype, GPU, 16)
    row = layout.Layout((1, 2), (0, dtype.itemsize), dtype, GPU, 16)
    norm = PartNorm(option_rules.options("rms", head_dim=head_dim), None, None)
    rotation = Rotation("half", False, 2, True, (), False, (True, True), row, row, None)
    parts = {"q": x, "k": x}
    return qk_norm_rope.plan(
        part_rules.describe(dict.fromkeys("qk", norm), parts, parts, rotation, -2)
    )


PROMISED = dict.fromkeys(DTYPES, 8192) | {FLOAT32: 4096, FLOAT64: 3072}
"""Of a head, in QKNorm's docstring."""


def test_heads_of_any_promised_length_fit_a_gpu(dtype):
    for head_dim in range(2, PROMISED[dtype] + 1):
        planned(dtype, head_dim)  # refuses what does not fit


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (FLOAT16, 16384, "takes 65536 bytes of shared memory to rotate; needs 49152 at most"),
        (FLOAT64, 3073, "takes 53248 bytes of shared memory to rotate; needs 49152 at most"),
        (BFLOAT16, 8193, "head_dim is 8193; needs 8192 at most for bfloat16"),
    ],
    ids=str,
)
def test_a_head_too_long_for_a_gpu_is_refused_there_alone(dtype, head_dim, message, rng):
    with pytest.raises(ValueError, match=message):
        planned(dtype, head_dim)
    q = rng.standard_normal((2, 1, head_dim)).astype(dtype.numpy)
    norm = HeadNorm(head_dim=head_dim)
    rope = Rope.of_theta(1e4, 64, max_position=4)
    y, _ = QKNorm(norm, norm, rope=rope)(q, q, positions=np.arange(2))
    cos, sin = rope.at(np.arange(2), dtype.numpy)
    expected = rope_numpy.apply(norm(q), cos[:, None], sin[:, None], rotary_dim=64)
    np.testing.assert_array_equal(y, expected)


def test_more_heads_than_32_bits_count_are_refused_on_a_gpu():
    """The kernel's fields for heads and their groups have 32 bits; ctypes drops the others."""
    most = qk_norm_rope.MAX_HEADS
    norm = PartNorm(option_rules.options("rms", head_dim=2), None, None)

    def called(*heads):
        parts = {
            name: layout.Layout((1, n, 2), (0, 0, 2), FLOAT16, GPU, 16)
            for name, n in zip("qkv", heads, strict=False)
        }
        return part_rules.describe(dict.fromkeys(parts, norm), parts, parts, None, -2)

    for heads in ((2**30, 2**30), (2**32, 1), (2**31, 1), (most, 1), (1, 2**30, 2**30), (2**33, 0)):
        told = r" \+ ".join(map(str, heads))
        with pytest.raises(
            ValueError, match=f"have {told} heads, {sum(heads)} in all; needs {most} at most on a"
        ):
            qk_norm_rope.plan(called(*heads))
    for heads in ((most - 1, 1), (1, most - 1), (0, most), (1, 2, most - 3)):
        call = called(*heads)
        config = qk_norm_rope.plan(call)._replace(heads_per_group=1)
        params = qk_norm_rope._params(call, config)
        padded = [*heads, 0][:3]
        assert list(params.num_heads) == padded
        assert list(params.groups_end) == [sum(padded[: i + 1]) for i in range(3)]
        # What a group past the last heads counts to.
        assert most + max(qk_norm_rope.HEADS_PER_GROUP.values()) < 2**31
