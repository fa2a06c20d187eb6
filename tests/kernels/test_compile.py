"""NVRTC compiles every covering specialisation without a GPU: no warning, no spill."""

import os
import re

import pytest
from cases import covering_specs

from cupy_headnorm._arrays.dtypes import FLOAT16
from cupy_headnorm._cuda import source as kernel_source
from cupy_headnorm._cuda.compiler import options_of
from cupy_headnorm._plans import geometry, head_norm
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec

GATE = (75, 90, 120)
ALL = (75, 80, 86, 89, 90, 100, 120)


def nvrtc():
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        # `make test` brings NVRTC; a test-suite run by hand may do without.
        if os.environ.get("HEADNORM_REQUIRE_NVRTC"):
            raise
        pytest.skip(f"no NVRTC: {error}")
    return nvrtc


def compiled(spec, config, memory, target):
    return built("head_norm.cu", head_norm.macros(spec, config, memory), target)


def built(source, macros, target):
    """Return the compiler's log, in which ptxas reports each kernel, and the PTX."""
    compiler = nvrtc()
    from cupy._core.core import assemble_cupy_compiler_options

    program = compiler.createProgram(kernel_source.pasted(source), source, (), ())
    options = (
        *assemble_cupy_compiler_options(()),
        *options_of(macros),
        f"-arch={target}",
        "-ftz=true",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
    )
    try:
        compiler.compileProgram(program, options)
    except compiler.NVRTCError:
        pytest.fail(compiler.getProgramLog(program))
    log, ptx = compiler.getProgramLog(program), compiler.getPTX(program)
    compiler.destroyProgram(program)
    # -Werror would say the same, but NVRTC before 13.5 does not know it.
    assert "warning" not in log, log
    return log, ptx.decode() if isinstance(ptx, bytes) else ptx


def assert_no_spills(spec, config, memory, architecture):
    log, _ = compiled(spec, config, memory, f"sm_{architecture}")
    assert head_norm.macros(spec, config, memory)["HN_NAME"] in log
    assert_none_spilt(log)


def assert_none_spilt(log):
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills == [("0", "0")], log


def specialisations(spec):
    """Yield geometry and memory: aligned and contiguous, then the worst in both."""
    for alignment, axes in ((16, 1), (spec.x.itemsize, 3), (spec.x.itemsize, 8)):
        # Strides of their own keep axes apart.
        rows = tuple(RowAxis(3, 7**i, 7**i, 0, 0) for i in range(axes))
        parameters = [d.itemsize if d and alignment < 16 else 16 for d in (spec.weight, spec.bias)]
        call = NormCall(spec, rows, 3**axes, 1e-6, 0.0, (alignment, 16, *parameters))
        config = head_norm.plan(call)
        yield config, head_norm.memory_of(call, config)


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-architectures")
        metafunc.parametrize("architecture", ALL if everything else GATE, ids="sm_{}".format)


@pytest.mark.parametrize("spec", covering_specs(), ids=lambda spec: spec.name)
def test_compiles_without_spills(spec, architecture, request):
    chosen = list(specialisations(spec))
    if architecture != 90 and not request.config.getoption("--all-architectures"):
        chosen = chosen[:1]
    for config, memory in chosen:
        assert_no_spills(spec, config, memory, architecture)


@pytest.mark.parametrize("head_dim", [8, 10, 16, 20, 34, 40, 64, 100, 128, 1000])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_misaligned_rows_compile_without_spills(kind, head_dim, architecture):
    """They move element by element: through shared memory where a row has lanes enough."""
    spec = NormSpec(kind, FLOAT16, FLOAT16, None, head_dim, "once", False)
    for config, memory in list(specialisations(spec))[1:]:
        assert config.access_bytes == 2
        assert_no_spills(spec, config, memory, architecture)


@pytest.mark.parametrize("head_dim", [33, 66, 127])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_small_stores_follow_one_another(kind, head_dim):
    """Otherwise pieces of one sector come too late to meet in the cache: see norm.cuh."""
    spec = NormSpec(kind, FLOAT16, FLOAT16, None, head_dim, "once", False)
    config, memory = next(specialisations(spec))
    _, text = compiled(spec, config, memory, "compute_90")
    between = text[text.index("st.global") : text.rindex("st.global")]
    assert text.count("st.global") == config.vectors_per_lane
    assert "f32" not in between


def test_a_lane_count_that_is_no_power_of_two_does_not_compile():
    spec = covering_specs()[0]
    config, memory = next(specialisations(spec))
    bad = geometry.LaunchConfig(**{**config.__dict__, "lanes": 12})
    with pytest.raises(pytest.fail.Exception, match="lanes must be a power of two"):
        compiled(spec, bad, memory, "sm_90")
