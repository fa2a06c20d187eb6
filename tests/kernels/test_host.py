"""
The kernels' own text on the CPU, under sanitizers, against float64: see host.py.

Each test runs a kernel three times, its threads in ascending, descending and some other order, and
`host` wants equal bits of all three, and no byte changed but the result's.
"""

import host
import host_build
import numpy as np
import pytest
from cases import function
from host_build import ANY, NORMS, PARTS, WHOLE
from host_cases import (
    FAR,
    HEADS,
    LAYOUTS,
    far_apart,
    kernel_of,
    laid,
    last_rows,
    options,
    parameters,
    reserved,
    rows,
    running,
)
from oracle import norm as oracle
from tolerances import FLIPS_FEW, assert_close, mismatch

import cupy_headnorm
from cupy_headnorm import ops
from cupy_headnorm._calls import dispatch
from cupy_headnorm._plans.geometry import LaunchConfig

pytestmark = pytest.mark.usefixtures("compiler")


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
    run = function(norm.spec.kind)
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


# With a kernel that moves whole vectors.
COMPARED = [
    (norm, layout)
    for norm, layout in CASES
    if norm.config is None and (norm.spec, WHOLE) in [(n.spec, n.how) for n in NORMS]
]


@pytest.mark.parametrize(("norm", "layout"), COMPARED, ids=str)
def test_a_row_has_the_bits_that_it_has_alone(norm, layout, rng):
    """Neither its place nor its alignment nor what moves it changes them."""
    shape = (*LAYOUTS[layout][1], norm.spec.head_dim)
    x = laid(norm, layout, rows(rng, shape, norm.spec.x))
    given = parameters(norm._replace(axes=1), rng, shape)
    with running(norm):
        y = function(norm.spec.kind)(x, *given, **options(norm))
    with running(kernel_of(norm.spec, WHOLE)):
        for row, found in zip(x.reshape(-1, shape[-1]), y.reshape(-1, shape[-1]), strict=True):
            alone = function(norm.spec.kind)(row.copy(), *given, **options(norm))
            assert alone.tobytes() == found.tobytes()


@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 16])
def test_any_number_of_rows_shares_a_block(rows_per_block, rng):
    """A row has 16 lanes: warps are filled in part, and rows do not fill a block."""
    norm = kernel_of(host_build.QWEN3, WHOLE)
    x = rows(rng, (11, norm.spec.head_dim), norm.spec.x)
    config = LaunchConfig(16, 16, 1, rows_per_block, 16)
    weight, _ = parameters(norm, rng, x.shape)
    with running(norm):
        expected = cupy_headnorm.rms_norm(x, weight)
    with running(norm._replace(config=config)):
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
        y = function(spec.kind)(x, *parameters(norm._replace(axes=1), rng, x.shape))
    assert np.isfinite(y.astype(np.float64)).all(-1).tolist() == [True, *[False] * 3, True]


@pytest.mark.parametrize(
    "spec",
    [host_build.IDLE_LANES, host_build.TAIL, host_build.ODD_BLOCK, host_build.TILES],
    ids=lambda spec: spec.name,
)
def test_equal_values_are_no_distance_from_their_mean(spec, rng):
    """Neither by lanes, nor by blocks, nor by tiles."""
    norm = kernel_of(spec, ANY if spec is host_build.ODD_BLOCK else WHOLE)
    constants = rng.uniform(1, 2000, (5, 1)).astype(spec.x.numpy)
    x = np.repeat(constants, spec.head_dim, -1)
    weight, bias = parameters(norm._replace(axes=1), rng, x.shape)
    given = options(norm)
    bias = bias if bias is None else bias.astype(spec.x.numpy).astype(bias.dtype)
    with running(norm):
        y = cupy_headnorm.layer_norm(x, weight, bias, **given)
    np.testing.assert_array_equal(y, np.broadcast_to(0 if bias is None else bias, x.shape))


def test_a_call_that_is_remembered_reaches_the_kernel_too(rng, monkeypatch):
    slow, step_by_step = [], dispatch.step_by_step
    monkeypatch.setattr(
        dispatch, "step_by_step", lambda *given: slow.append(given) or step_by_step(*given)
    )
    norm = kernel_of(host_build.QWEN3, ANY)
    weight, _ = parameters(norm._replace(axes=1), rng, (norm.spec.head_dim,))
    arrays = [rows(rng, (n, HEADS, norm.spec.head_dim), norm.spec.x) for n in (4, 4, 9, 2)]
    with running(norm):
        found = [cupy_headnorm.rms_norm(x, weight) for x in arrays]
        held = cupy_headnorm.HeadNorm(weight)
        found += [held(x) for x in arrays]
    assert len(slow) == 2, "the first call of the function, and of the norm"
    expected = 2 * [cupy_headnorm.rms_norm(x, weight) for x in arrays]
    for a, b in zip(found, expected, strict=True):
        assert mismatch(a, b) <= FLIPS_FEW


def test_a_call_inside_of_its_like(rng):
    norm = kernel_of(host_build.QWEN3, ANY)
    weight, _ = parameters(norm._replace(axes=1), rng, (norm.spec.head_dim,))
    arrays = [rows(rng, (4, HEADS, norm.spec.head_dim), norm.spec.x) for _ in range(3)]
    with running(norm):
        held = cupy_headnorm.HeadNorm(weight)
        expected = [held(x) for x in arrays]
    inside = []
    with running(norm), host.interrupted(lambda: inside.append(held(arrays[2]))):
        found = [held(x) for x in arrays[:2]]
    for a, b in zip([*found, *inside], expected, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("step", [FAR, -FAR])
@pytest.mark.parametrize("how", [WHOLE, ANY])
def test_rows_may_lie_further_apart_than_32_bits_count(how, step, rng):
    norm = kernel_of(host_build.QWEN3, how, wide=how == WHOLE)
    values = rows(rng, (4, norm.spec.head_dim), norm.spec.x)
    weight, _ = parameters(norm._replace(axes=1), rng, values.shape)
    x = far_apart(reserved(3 * FAR + 2**16), norm, step)
    x[...] = values
    with running(norm):
        expected = cupy_headnorm.rms_norm(values, weight)
        cupy_headnorm.rms_norm(x, weight, out=x)
        assert x.tobytes() == expected.tobytes()


def test_more_rows_than_31_bits_count(rng):
    last_rows(None, rng)


# What is compiled, and where nothing can be.
def test_few_kernels_cover_all_choices():
    kernels = host_build.specialisations()
    assert len(set(kernels)) == len(NORMS) + len(PARTS) <= 45
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
            assert found["HN_OFFSET"] == {"false", "true"}
            ways = {(int(of["HN_AXES"]), of["HN_INDEX"]) for of in chosen}
            assert ways == {(1, "int"), (1, "long long"), (3, "int"), (8, "long long")}
            assert found["HN_ROWS"] >= {"1", "2", "3", "8", "16"}
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
