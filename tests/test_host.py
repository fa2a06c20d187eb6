"""
The kernels' own text on the CPU, under sanitizers, against float64: see host.py.

Each test runs a kernel three times, its threads in ascending, descending and some other order, and
`host` wants equal bits of all three, and no byte changed but the result's.
"""

import contextlib
import mmap

import host
import host_build
import numpy as np
import pytest
import qk_cases
from host_build import ANY, NORMS, PARTS, WHOLE
from oracle import norm as oracle
from tolerances import FLIPS_FEW, assert_close, mismatch

import cupy_headnorm
from cupy_headnorm import QKNorm, _parts_launch, ops
from cupy_headnorm._launch import LaunchConfig

HEADS = 3


@pytest.fixture(autouse=True)
def _compiler():
    host.require()


def alone(kernel):
    """Return the library as if it held one specialisation."""
    found, everything = kernel.specialisation(), host.library()
    return host_build.Library(everything.path, {found: everything.symbols[found]})


@contextlib.contextmanager
def running(kernel, **options):
    with host.device(alone(kernel), architecture=getattr(kernel, "architecture", 900), **options):
        yield


# One array of heads.
def rows(rng, shape, dtype):
    """Return rows of a few sizes, one of zeros and one near a mean."""
    large = 1e4 if dtype.name == "float16" else 1e17
    values = rng.standard_normal(shape)
    scale = np.resize([1, large, 0, 1e-3, 1], shape[:-1])[..., np.newaxis]
    mean = np.resize([0, 0, 0, 0, 100, 0, 0], shape[:-1])[..., np.newaxis]
    return (values * scale + mean).astype(dtype.numpy)


LAYOUTS = {
    # name: the fewest axes of a kernel that serves it, shape, strides in rows, first row.
    "contiguous": (1, (5, HEADS), (HEADS, 1), 0),
    "one row": (1, (1, 1), (1, 1), 0),
    "every other row": (1, (7, 1), (2, 1), 1),
    "rows backwards": (1, (9, 1), (-1, 1), 8),
    "one row seven times": (1, (7, 1), (0, 1), 0),
    "slice": (3, (4, HEADS), (7, 1), 2),
    "heads backwards": (3, (4, HEADS), (7, -1), 6),
    "heads first": (3, (HEADS, 5), (1, HEADS), 0),
    "four axes": (8, (2, 3, 2, HEADS), (40, 12, 4, -1), 5),
}


def laid(norm, name, values):
    """Return an array that lies as a layout says, filled with the values of its rows."""
    _, shape, strides, first = LAYOUTS[name]
    dtype, head_dim = norm.spec.x.numpy, norm.spec.head_dim
    aligned = {WHOLE: 16, ANY: dtype.itemsize}.get(norm.how, norm.how)
    pitch = -(-head_dim * dtype.itemsize // aligned) * aligned
    pitch += aligned if norm.how == ANY or name != "contiguous" else 0
    low = sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + first
    high = sum(max(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + first
    assert low >= 0
    memory = np.full((high + 1) * pitch + 64, 0xA5, np.uint8)
    # As far off a boundary of 16 bytes as the kernel allows.
    at = -memory.ctypes.data % 16 + aligned % 16 + first * pitch
    strides = [s * pitch for s in strides] + [dtype.itemsize]
    array = np.ndarray((*shape, head_dim), dtype, memory, at, strides)
    array[...] = values
    return array


def parameters(norm, rng, shape):
    """Return weight and bias, of each head where a kernel has an axis for heads."""
    found = []
    for dtype in (norm.spec.weight, norm.spec.bias):
        size = shape[-2:] if norm.axes > 1 else shape[-1:]
        found.append(None if dtype is None else (rng.standard_normal(size) + 1).astype(dtype.numpy))
    return found


def function(spec):
    return {"rms": cupy_headnorm.rms_norm, "layer": cupy_headnorm.layer_norm}[spec.kind]


def options(norm):
    offset = 1.0 if norm.spec.weight and norm.axes == 3 else 0.0
    return {"eps": 1e-5, "rounding": norm.spec.rounding, "weight_offset": offset}


CASES = [
    (norm, name)
    for norm in NORMS
    for name, (axes, *_) in LAYOUTS.items()
    if axes <= norm.axes and (norm.spec.head_dim <= 2048 or name in ("one row", "heads backwards"))
]


@pytest.mark.parametrize(("norm", "layout"), CASES, ids=str)
def test_norm_matches_float64(norm, layout, rng):
    shape = (*LAYOUTS[layout][1], norm.spec.head_dim)
    x = laid(norm, layout, rows(rng, shape, norm.spec.x))
    weight, bias = parameters(norm, rng, shape)
    given = options(norm)
    exact, slack, product = oracle(norm.spec.kind, x, weight, bias, **given)
    run = function(norm.spec)
    with running(norm):
        if norm.config is None:
            y = run(x, weight, bias, **given)
        else:
            y = ops.launch(norm.launched(), x, weight, bias, kind=norm.spec.kind, **given)
        before = 0 if norm.spec.rounding == "once" else product
        assert_close(y, exact, slack, norm.spec.x.name, before)
        if norm.config is None and layout != "one row seven times":
            run(x, weight, bias, out=x, **given)
            assert x.tobytes() == y.tobytes()


def kernel_of(spec, how):
    return next(n for n in NORMS if (n.spec, n.how, n.config) == (spec, how, None))


# With a kernel that moves whole vectors.
COMPARED = [
    (norm, layout)
    for norm, layout in CASES
    if norm.config is None and (norm.spec, WHOLE) in [(n.spec, n.how) for n in NORMS]
]


@pytest.mark.parametrize(("norm", "layout"), COMPARED, ids=str)
def test_a_row_has_the_bits_that_it_has_alone(norm, layout, rng):
    """Whatever its place and alignment, and what moves it."""
    shape = (*LAYOUTS[layout][1], norm.spec.head_dim)
    x = laid(norm, layout, rows(rng, shape, norm.spec.x))
    given = parameters(norm._replace(axes=1), rng, shape)
    with running(norm):
        y = function(norm.spec)(x, *given, rounding=norm.spec.rounding)
    with running(kernel_of(norm.spec, WHOLE)):
        for row, found in zip(x.reshape(-1, shape[-1]), y.reshape(-1, shape[-1]), strict=True):
            alone = function(norm.spec)(row.copy(), *given, rounding=norm.spec.rounding)
            assert alone.tobytes() == found.tobytes()


@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 16])
def test_any_number_of_rows_shares_a_block(rows_per_block, rng):
    """16 lanes a row: a warp in part, and rows that do not fill a block."""
    norm = kernel_of(host_build.QWEN3, WHOLE)
    x = rows(rng, (11, norm.spec.head_dim), norm.spec.x)
    config = LaunchConfig(16, 16, 1, rows_per_block, 16)
    weight, _ = parameters(norm, rng, x.shape)
    with running(norm):
        expected = cupy_headnorm.rms_norm(x, weight)
        found = ops.launch(config, x, weight)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "spec", [host_build.QWEN3, host_build.IDLE_LANES, host_build.BLOCK], ids=lambda spec: spec.name
)
def test_infinities_and_nan_stay_in_their_row(spec, rng):
    norm = kernel_of(spec, WHOLE)
    x = rows(rng, (5, spec.head_dim), spec.x)
    x[1, 7], x[2, 0], x[3, -1] = np.inf, -np.inf, np.nan
    with running(norm):
        y = function(spec)(x, *parameters(norm._replace(axes=1), rng, x.shape))
    assert np.isfinite(y.astype(np.float64)).all(-1).tolist() == [True, *[False] * 3, True]


def test_a_call_that_is_remembered_reaches_the_kernel_too(rng):
    norm = kernel_of(host_build.QWEN3, ANY)
    weight, _ = parameters(norm._replace(axes=1), rng, (norm.spec.head_dim,))
    arrays = [rows(rng, (n, HEADS, norm.spec.head_dim), norm.spec.x) for n in (4, 4, 9, 2)]
    with running(norm):
        found = [cupy_headnorm.rms_norm(x, weight) for x in arrays]
        held = cupy_headnorm.HeadNorm(weight)
        found += [held(x) for x in arrays]
    expected = 2 * [cupy_headnorm.rms_norm(x, weight) for x in arrays]
    for a, b in zip(found, expected, strict=True):
        assert mismatch(a, b) <= FLIPS_FEW


# Rows far apart. Of a reservation only the pages of rows are there, so that a wrong address faults.
def reserved(size):
    unreserved = 0x4000  # MAP_NORESERVE, which mmap knows from Python 3.12 on
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)


FAR = 3 * 2**30
"""Bytes from row to row. Four of them take 12 GiB of addresses, and four pages."""


def far_apart(memory, norm, step):
    """Return four rows, from the low end or from the high one."""
    dtype, head_dim = norm.spec.x.numpy, norm.spec.head_dim
    at = 0 if step > 0 else -3 * step
    return np.ndarray((4, head_dim), dtype, memory, at, (step, dtype.itemsize))


@pytest.mark.parametrize("step", [FAR, -FAR])
@pytest.mark.parametrize("how", [WHOLE, ANY])
def test_rows_may_lie_further_apart_than_32_bits_count(how, step, rng):
    norm = kernel_of(host_build.QWEN3, how)
    values = rows(rng, (4, norm.spec.head_dim), norm.spec.x)
    weight, _ = parameters(norm._replace(axes=1), rng, values.shape)
    x = far_apart(reserved(3 * FAR + 2**16), norm, step)
    x[...] = values
    with running(norm):
        expected = cupy_headnorm.rms_norm(values, weight)
        cupy_headnorm.rms_norm(x, weight, out=x)
        assert x.tobytes() == expected.tobytes()


MANY = 2**31 + 200


def last_rows(using, rng):
    """Normalize more rows than 31 bits count, of which the last block runs."""
    norm = kernel_of(host_build.ONE_ELEMENT, ANY)
    x = np.ndarray((MANY, 1), np.float16, reserved(2 * MANY))
    x[-100:] = rng.standard_normal((100, 1))
    weight, bias = np.array([3.0]), np.array([0.5], np.float16)
    before = x[-100:].copy()
    rows_per_block = norm.launched().rows_per_block
    last = (MANY - 1) // rows_per_block
    exact, slack, _ = oracle("rms", before, weight, bias, eps=1e-6)
    with host.device(using, blocks=[last]):
        cupy_headnorm.rms_norm(x, weight, bias, out=x)
    done = MANY - last * rows_per_block
    assert_close(x[-done:], exact[-done:], slack[-done:], "float16")
    assert x[-100:-done].tobytes() == before[:-done].tobytes()


def test_more_rows_than_31_bits_count(rng):
    last_rows(None, rng)


# q, k and v.
def parts_of(kernel, rng):
    """Return a case, what it makes, and its norms; the rows of parts lie as the kernel allows."""
    case = kernel.case
    if case.head_dim > 1000:
        case = case._replace(tokens=2)
    parts, norms, beside = case.made(rng)
    qk = QKNorm(*(host_build.held(case, norm) for norm in norms), rope=case.rope())
    itemsize = case.dtype.itemsize
    if kernel.how == ANY:
        # Slices of one buffer, whose rows lie off all boundaries.
        widths = [part.shape[-2] * case.head_dim for part in parts]
        packed = np.zeros((2, case.tokens, sum(widths) + 1), case.dtype.numpy).view(np.uint8)
        memory = np.full(packed.nbytes + 32, 0xA5, np.uint8)
        at, laid = -memory.ctypes.data % 16 + itemsize, []
        for part, width in zip(parts, widths, strict=True):
            pitch = packed.shape[-1]
            strides = (case.tokens * pitch, pitch, case.head_dim * itemsize, itemsize)
            laid.append(np.ndarray(part.shape, part.dtype, memory, at, strides))
            laid[-1][...] = part
            at += width * itemsize
        parts = laid
    return case, (parts, norms, beside), qk


@pytest.mark.parametrize("heads_per_group", [1, 2, 4])
@pytest.mark.parametrize("kernel", PARTS, ids=str)
def test_parts_match_float64(kernel, heads_per_group, rng, monkeypatch):
    plan = _parts_launch.plan
    monkeypatch.setattr(
        _parts_launch, "plan", lambda call: plan(call)._replace(heads_per_group=heads_per_group)
    )
    case, made, qk = parts_of(kernel, rng)
    parts, _, beside = made
    twin = qk(*parts, **beside)
    with running(kernel):
        found = qk(*parts, **beside)
        qk_cases.check(case, found, made)
        for part, y, expected in zip(parts, found, twin, strict=True):
            assert mismatch(y, expected) <= FLIPS_FEW or case.dtype.itemsize > 2
            assert part.strides != y.strides or kernel.how == WHOLE
        qk(*parts, **beside, out=tuple(parts))
        for part, y in zip(parts, found, strict=True):
            assert part.tobytes() == y.tobytes()


def test_parts_on_pairs_of_numbers_have_the_bits_of_parts_on_single_ones(rng):
    """sm_90 multiplies and adds two 16-bit numbers at once, sm_75 one by one in float."""
    pairs, single = PARTS[:2]
    assert (pairs.architecture, single.architecture) == (900, 750)
    _, (parts, _, beside), qk = parts_of(pairs, rng)
    with running(pairs):
        found = qk(*parts, **beside)
    with running(single):
        for a, b in zip(found, qk(*parts, **beside), strict=True):
            assert a.tobytes() == b.tobytes()


def test_parts_without_rope_have_the_bits_of_norms_one_by_one(rng):
    kernel = next(k for k in PARTS if k.case.by is None)
    _, (parts, *_), qk = parts_of(kernel, rng)
    with running(kernel):
        found = qk(*parts)
    with host.device():
        for name, part, y in zip("qk", parts, found, strict=False):
            assert qk.norms[name](part).tobytes() == y.tobytes()


def test_positions_outside_of_the_tables_are_clamped_and_read_nothing_else(rng):
    kernel = PARTS[0]
    _, (parts, _, _), qk = parts_of(kernel, rng)
    far = np.array([-1, -(2**62), 2**62, qk_cases.MAX_POSITION, 0, 2**31, -(2**31)])
    far = np.stack([far, far[::-1]])
    with running(kernel):
        found = qk(*parts, positions=far)
        clamped = qk(*parts, positions=np.clip(far, 0, qk_cases.MAX_POSITION - 1))
    for a, b in zip(found, clamped, strict=True):
        assert a.tobytes() == b.tobytes()


# What is compiled, and where nothing can be.
def test_few_kernels_cover_all_choices():
    kernels = host_build.specialisations()
    assert len(set(kernels)) == len(NORMS) + len(PARTS) <= 40
    for source, count in (("head_norm.cu", len(NORMS)), ("qk_norm_rope.cu", len(PARTS))):
        chosen = [dict(k.macros) for k in kernels if k.source == source]
        assert len(chosen) == count
        found = {name: {macros[name] for macros in chosen} for name in chosen[0]}
        elements = {"__half", "__nv_bfloat16", "float", "double"}
        assert found["HN_X"] == elements
        assert found["HN_KIND"] == {"rms", "layer"}
        assert found["HN_ROUNDING"] >= {"once", "before_weight", "every_op"}
        assert len(found["HN_ACCESS"]) >= 3
        if source == "head_norm.cu":
            assert found["HN_WEIGHT"] == found["HN_BIAS"] == {*elements, "headnorm::None"}
            assert "rstd" in found["HN_ROUNDING"]
            assert found["HN_AXES"] == {"1", "3", "8"}
        else:
            assert found["HN_AXES"] == {"2", "3", "8"}
            assert found["HN_ROPE"] == {"none", "half", "half_flipped", "interleaved"}
            assert found["HN_SECTIONS"] == {"none", "chunks", "interleaved"}
            assert found["HN_POSITION"] == {"headnorm::None", "int", "long long"}
            assert found["HN_FOLD"] == {"1", "2"}
            for name in ("ROPE_FIRST", "EVERY_OP", "WHOLE_ROWS", "OFFSET", "ALIKE"):
                assert found[f"HN_{name}"] == {"true", "false"}
            assert any(m["HN_ROTARY_DIM"] not in ("0", m["HN_HEAD_DIM"]) for m in chosen)


def test_what_is_not_compiled_is_refused():
    with (
        host.device(),
        pytest.raises(host.NotBuilt, match="head_norm_rms_f32_unweighted_d7 is not"),
    ):
        cupy_headnorm.rms_norm(np.ones((2, 7), np.float32))


def test_without_a_compiler_tests_skip_or_fail(monkeypatch):
    monkeypatch.setattr(host, "missing", lambda: "no compiler")
    monkeypatch.delenv("HEADNORM_REQUIRE_HOST", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no compiler"):
        host.require()
    monkeypatch.setenv("HEADNORM_REQUIRE_HOST", "1")
    with pytest.raises(RuntimeError, match="no compiler"):
        host.require()
