"""The text that goes to the compiler."""

import ctypes
import re
from types import SimpleNamespace

import pytest

from cupy_headnorm._arrays.dtypes import BFLOAT16, FLOAT32
from cupy_headnorm._arrays.layout import Device, Layout
from cupy_headnorm._cuda import compiler, source
from cupy_headnorm._plans import geometry, head_norm
from cupy_headnorm._rules.norm import NormSpec, describe
from cupy_headnorm._rules.options import options

SHARED = ["geometry.cuh", "norm.cuh", "reduce.cuh", "rows.cuh", "scalar.cuh", "vec.cuh"]
HEADERS = {"head_norm.cu": SHARED, "qk_norm_rope.cu": sorted([*SHARED, "parts.cuh", "rope.cuh"])}


@pytest.mark.parametrize("kernel", HEADERS)
def test_every_own_header_is_pasted_once(kernel):
    text = source.pasted(kernel)
    assert '#include "headnorm' not in text
    headers = sorted(p.name for p in (source.kernels_folder() / "include/headnorm").iterdir())
    assert headers == HEADERS["qk_norm_rope.cu"]
    for header in headers:
        pasted = text.count(f'#line 1 "include/headnorm/{header}"')
        assert pasted == (header in HEADERS[kernel])


@pytest.mark.parametrize("kernel", HEADERS)
def test_line_numbers_point_into_the_real_files(kernel):
    text = source.pasted(kernel)
    name, number = None, 0
    checked = set()
    for line in text.split("\n"):
        mark = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if mark:
            number, name = int(mark.group(1)), mark.group(2)
            continue
        real = (source.kernels_folder() / name).read_text().split("\n")
        if line:
            assert real[number - 1] == line, (name, number)
            checked.add(name)
        number += 1
    assert len(checked) == 1 + len(HEADERS[kernel])


def test_missing_kernels_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "_PACKAGE", tmp_path / "cupy_headnorm")
    source.kernels_folder.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"no head_norm.cu in .*kernels nor in .*kern"):
            source.kernels_folder()
    finally:
        source.kernels_folder.cache_clear()


def test_installed_kernels_come_first(monkeypatch, tmp_path):
    package = tmp_path / "cupy_headnorm"
    (package / "kernels").mkdir(parents=True)
    (package / "kernels" / "head_norm.cu").write_text("")
    monkeypatch.setattr(source, "_PACKAGE", package)
    source.kernels_folder.cache_clear()
    try:
        assert source.kernels_folder() == package / "kernels"
    finally:
        source.kernels_folder.cache_clear()


def test_a_kernels_name_says_its_specialisation():
    spec = NormSpec("rms", BFLOAT16, FLOAT32, None, 128, "once", False)
    assert spec.name == "head_norm_rms_bf16_f32_d128"
    spec = NormSpec("layer", FLOAT32, None, BFLOAT16, 80, "before_weight", False)
    assert spec.name == "head_norm_layer_f32_unweighted_bias_bf16_d80_before_weight"
    config = geometry.LaunchConfig(16, 16, 1, 8, 4)
    one_axis, more = head_norm.Memory(1, True, 4), head_norm.Memory(8, False, 2)
    assert head_norm.macros(spec, config, one_axis)["HN_NAME"].endswith("_access4")
    assert head_norm.macros(spec, config, more)["HN_NAME"].endswith(
        "_access4_parameter_access2_axes8"
    )


def test_params_lie_as_in_rows_cuh():
    """ctypes follows C's layout rules; the order and the width of the fields are ours to keep."""
    text = (source.kernels_folder() / "include/headnorm/rows.cuh").read_text()
    struct = re.search(r"struct Params \{(.*?)\n\};", text, re.DOTALL).group(1)
    fields = re.findall(r"(\w+)(?:\[kAxes\])?;", struct)
    axis = re.search(r"struct RowAxis \{(.*?)\n\};", text, re.DOTALL).group(1)
    of_axis = re.findall(r"(?:Index|unsigned int) (\w+);", axis)
    for narrow, index in ((True, ctypes.c_int32), (False, ctypes.c_int64)):
        params = head_norm._params_type(ctypes.c_float, 3, narrow)
        assert fields == [name for name, _ in params._fields_]
        found = dict(dict(params._fields_)["axis"]._type_._fields_)
        assert of_axis == list(found)
        assert {found[name] for name in of_axis[:5]} == {index}


def test_a_launch_holds_its_axes_and_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(compiler, "limits", lambda index: compiler.DeviceLimits())
    monkeypatch.setattr(compiler, "loaded", lambda *_: SimpleNamespace(ptr=7))
    device = Device("cuda", 0)
    x = Layout((4, 3, 64), (5 * 256, 256, 4), FLOAT32, device, 16)  # of a packed buffer
    out = x._replace(strides=(3 * 256, 256, 4))
    weight = Layout((3, 64), (256, 4), FLOAT32, device, 16)
    call = describe(options("rms", eps=0.5, weight_offset=1.0), x, weight, None, out)
    launch = head_norm.prepare(call, 0, 0)
    params, config = launch.params, launch.config
    assert (launch.function, launch.threads) == (7, config.threads)
    assert (params.rows, params.eps, params.weight_offset) == (12, 0.5, 1.0)
    axes = [(a.size, a.x, a.out, a.weight, a.bias) for a in params.axis]
    # The last one goes back over the one inside of it.
    assert axes == [(1, 0, 0, 0, 0), (3, 256, 256, 256, 0), (4, 512, 0, -768, 0)]
    for axis in params.axis:
        assert (axis.multiplier, axis.shift) == geometry.division(axis.size)
    longer = head_norm.over(launch, 4, 1000)
    assert (longer.total, longer.blocks) == (3000, config.blocks(3000))
    assert (params.rows, launch.total, launch.blocks) == (12, 12, config.blocks(12))
    # With few axes the kernel counts rows in 32 bits.
    assert head_norm.over(launch, 4, 2**30) is None
