"""Every documented refusal, once, on every library: the message, and nothing written."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
from tolerances import assert_alike

import cupy_headnorm
from cupy_headnorm import HeadNorm, Rope, layer_norm, ops, reference, rms_norm
from cupy_headnorm._arrays.dtypes import FLOAT32
from cupy_headnorm._arrays.layout import CPU, Device, Layout
from cupy_headnorm._calls import lengths
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._rules import norm as norm_rules
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm.rope import numpy as rope_numpy

X = np.linspace(-1, 1, 5 * 3 * 64, dtype=np.float32).reshape(5, 3, 64)


def w(*shape):
    return np.ones(shape, np.float32)


# name: (function's arguments, keywords, error, message)
REFUSED = {
    "no axis": ((w(),), {}, ValueError, r"x has shape \(\); needs \(\.\.\., num_heads, head_dim\)"),
    "no head_dim": ((w(3, 0),), {}, ValueError, r"x has shape \(3, 0\); needs a head_dim of 1"),
    "wrong last axis": (
        (X, w(65)),
        {},
        ValueError,
        r"x has shape \(5, 3, 64\); needs a last axis of head_dim=65, or num_heads given",
    ),
    "wrong last axis, heads known": (
        (X, w(3, 32)),
        {},
        ValueError,
        r"x has shape \(5, 3, 64\); needs a last axis of head_dim=32 or num_heads \* head_dim = 96",
    ),
    "wrong num_heads": (
        (X, w(4, 64)),
        {},
        ValueError,
        r"x has shape \(5, 3, 64\), 3 heads on axis -2; needs num_heads=4 there",
    ),
    "heads on another axis": (
        (X, w(3, 64)),
        {"heads_axis": -3},
        ValueError,
        r"5 heads on axis -3; needs heads_axis=-2, where 3 are \(see 'How x is read'",
    ),
    "heads before the tokens": (
        (w(2, 3, 7, 64), w(3, 64)),
        {},
        ValueError,
        r"7 heads on axis -2; needs heads_axis=-3, where 3 are",
    ),
    "flat x of one weight for all": (
        (w(5, 4096),),
        {"num_heads": 32},
        ValueError,
        r"5 heads on axis -2; needs head_dim=128 if x is flat, or num_heads=32 on axis -2",
    ),
    "flat x of a shared weight": (
        (w(5, 192), w(64)),
        {},
        ValueError,
        r"needs a last axis of head_dim=64, or num_heads given for flat input: num_heads=3 here",
    ),
    "one row of several heads": (
        (w(64), w(3, 64)),
        {},
        ValueError,
        r"x has shape \(64,\), 1 heads on axis -2; needs num_heads=3",
    ),
    "weight of 3 axes": ((X, w(1, 3, 64)), {}, ValueError, r"weight has shape \(1, 3, 64\); needs"),
    "empty weight": ((X, w(0)), {}, ValueError, r"weight has shape \(0,\); needs \(head_dim,\)"),
    "weight against head_dim": (
        (X, w(63)),
        {"head_dim": 64},
        ValueError,
        r"weight has shape \(63,\); needs \(64,\), \(num_heads, 64\) or a multiple",
    ),
    "weight against num_heads": (
        (X, w(4, 64)),
        {"num_heads": 3, "head_dim": 64},
        ValueError,
        r"weight has shape \(4, 64\); needs \(64,\) or \(192,\) or \(3, 64\)",
    ),
    "bias against weight": (
        (X, w(3, 64), w(65)),
        {},
        ValueError,
        r"bias has shape \(65,\); needs \(64,\) or \(192,\) or \(3, 64\)",
    ),
    "num_heads does not divide": (
        (X, w(64)),
        {"num_heads": 3},
        ValueError,
        r"weight has shape \(64,\), which num_heads=3 does not divide; needs head_dim=64",
    ),
    "flat x that num_heads does not divide": (
        (w(5, 190),),
        {"num_heads": 3, "head_dim": 64},
        ValueError,
        r"x has shape \(5, 190\); needs a last axis of head_dim=64 or num_heads \* head_dim = 192",
    ),
    "1-D weight that may be flat": (
        (w(5, 4, 64), w(64)),
        {"num_heads": 4},
        ValueError,
        r"can mean two things; needs head_dim=64 .* or head_dim=16",
    ),
    "flat x with heads_axis": (
        (w(5, 192), w(3, 64)),
        {"heads_axis": 0},
        ValueError,
        r"heads_axis is 0 and x of shape \(5, 192\) is flat; needs -2",
    ),
    "heads_axis on head_dim": ((X,), {"heads_axis": -1}, ValueError, r"heads_axis is -1, the axis"),
    "heads_axis too far": (
        (X,),
        {"heads_axis": -4},
        ValueError,
        r"heads_axis is -4 and x has shape \(5, 3, 64\); needs one of its 2 axes before head_dim",
    ),
    "heads_axis on head_dim, from the front": (
        (X,),
        {"heads_axis": 2},
        ValueError,
        r"heads_axis is 2 and x has shape \(5, 3, 64\); needs one of its 2 axes",
    ),
    "heads_axis of one row": ((w(64),), {"heads_axis": 9}, ValueError, r"heads_axis is 9 and x"),
    "eps a string": ((X,), {"eps": "1e-6"}, TypeError, r"eps is '1e-6'; needs a number"),
    "heads_axis no integer": ((X,), {"heads_axis": 1.5}, TypeError, r"heads_axis is 1.5; needs an"),
    "num_heads 0": ((X,), {"num_heads": 0}, ValueError, r"num_heads is 0; needs 1 or more"),
    "head_dim no integer": ((X,), {"head_dim": "64"}, TypeError, r"head_dim is '64'; needs an int"),
    "eps negative": ((X,), {"eps": -1e-6}, ValueError, r"eps is -1e-06; needs 0 or more"),
    "eps NaN": ((X,), {"eps": float("nan")}, ValueError, r"eps is nan; needs a finite number"),
    "eps huge": ((X,), {"eps": 10**400}, ValueError, r"eps is inf; needs a finite number"),
    "eps infinite": ((X,), {"eps": float("inf")}, ValueError, r"eps is inf; needs a finite number"),
    "eps no number": ((X,), {"eps": "small"}, TypeError, r"eps is 'small'; needs a number"),
    "offset infinite": (
        (X, w(64)),
        {"weight_offset": float("inf")},
        ValueError,
        r"weight_offset is inf; needs a finite number",
    ),
    "offset without weight": (
        (X,),
        {"weight_offset": 1},
        ValueError,
        r"weight_offset is 1.0; needs a weight to be added to",
    ),
    "rounding": (
        (X,),
        {"rounding": "twice"},
        ValueError,
        r"rounding is 'twice'; needs one of \('once', 'before_weight', 'every_op', 'rstd'\)",
    ),
    "rounding of the inverse root with a weight": (
        (X, w(64)),
        {"rounding": "rstd"},
        ValueError,
        r"rounding is .rstd. and (a weight is given; needs neither w|kind .layer.; needs kind)",
    ),
    "integer x": ((w(3, 64).astype(np.int32),), {}, TypeError, r"x has .*int32.*; needs float16, "),
    "complex x": (
        (w(3, 64).astype(np.complex64),),
        {},
        TypeError,
        r"x has .*complex64.*; needs float16, bfloat16, float32 or float64",
    ),
    "bool weight": ((X, np.ones(64, bool)), {}, TypeError, r"weight has .*bool.*; needs float16"),
}


OF_LAYOUT = [
    name
    for name, (*_, message) in REFUSED.items()
    if re.search("last axis of|on axis|axes before|is flat|two things|stride of", message)
]


@pytest.mark.parametrize("name", ["x", "weight", "out"])
def test_gaps_are_refused_with_their_cure(name):
    arrays = {"x": w(5, 3, 64), "weight": w(64)}
    arrays[name] = w(*arrays.get(name, arrays["x"]).shape, 2)[..., 0]
    cure = rf"ascontiguousarray\({name}\) of NumPy and CuPy, {name}.contiguous\(\) of torch \(see"
    with pytest.raises(ValueError, match=rf"{name} has a stride of 8 .* needs 4, .*: {cure}"):
        rms_norm(arrays.pop("x"), **arrays)


def test_errors_of_layout_lead_to_how_x_is_read():
    assert len(OF_LAYOUT) >= 12
    for name in OF_LAYOUT:
        arrays, options, error, _ = REFUSED[name]
        with pytest.raises(error, match=r"\(see 'How x is read' in the documentation\)$"):
            rms_norm(*arrays, **options)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm], ids=["rms", "layer"])
def test_weight_and_bias_have_the_names_that_a_norm_gives_them(norm, rng):
    x, weight, bias = (rng.standard_normal(shape) for shape in ((5, 3, 64), (3, 64), (64,)))
    expected = norm(x, weight, bias)
    np.testing.assert_array_equal(norm(x, weight=weight, bias=bias), expected)
    np.testing.assert_array_equal(norm(x, weight, bias=bias), expected)
    np.testing.assert_array_equal(norm(x, bias=bias), norm(x, None, bias))
    by_hand = getattr(reference, norm.__name__)
    np.testing.assert_array_equal(by_hand(x, weight=weight, bias=bias), expected)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm], ids=["rms", "layer"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(library, name, norm):
    arrays, options, error, message = REFUSED[name]
    arrays = [library.array(a) for a in arrays]
    before = library.host(arrays[0]).copy()
    with pytest.raises(error, match=message):
        norm(*arrays, **options)
    with pytest.raises(error, match=message):
        norm(*arrays, out=arrays[0], **options)
    np.testing.assert_array_equal(library.host(arrays[0]), before)


@pytest.mark.parametrize("name", REFUSED)
def test_reference_refuses_the_same(name):
    arrays, options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        reference.rms_norm(*arrays, **options)


def refused(error, message, *arrays, **options):
    with pytest.raises(error, match=message):
        rms_norm(*arrays, **options)


def test_strided_last_axis(library):
    x = library.array(np.ones((5, 3, 128), np.float32))[..., ::2]
    refused(ValueError, r"x has a stride of 8 bytes on its last axis; needs 4", x)
    y = library.array(X)
    refused(ValueError, r"weight has a stride of 8 bytes", y, library.array(w(128))[::2])
    refused(ValueError, r"out has a stride of 8 bytes", y, out=x)


def test_one_element_rows_have_no_last_stride(library):
    x = library.array(np.ones((5, 3, 2), np.float32))[..., ::2]
    assert_alike(library.host(rms_norm(x)), rms_norm(np.ones((5, 3, 1), np.float32)))


@pytest.mark.parametrize(
    "x",
    [
        np.ones((3, 64), ml_dtypes.float8_e4m3fn),
        np.ones((3, 64), ">f4"),
        np.ones((3, 64), object),
        np.ones((3, 64), "datetime64[s]"),
    ],
    ids=lambda x: str(x.dtype),
)
def test_numpy_dtypes_that_are_not_served(x):
    refused(TypeError, r"x has dtype .*; needs float16, bfloat16, float32 or float64 in native", x)


def test_out_of_other_shape_dtype_or_library(library):
    x, out = library.array(X), library.array(np.full((5, 3, 64), 7, np.float32))
    refused(
        ValueError, r"out has shape \(5, 192\); needs that of x", x, out=library.array(w(5, 192))
    )
    half = library.array(X.astype(np.float16))
    refused(TypeError, r"out has dtype float16; needs that of x, float32", x, out=half)
    with pytest.raises(TypeError, match="out is a list; needs a NumPy, CuPy or torch array"):
        rms_norm(x, out=[1.0])
    assert (library.host(out) == 7).all()


def test_mixed_libraries():
    import torch

    x = torch.ones(5, 3, 64)
    message = r"weight is a ndarray \(numpy\); needs the library of x, torch"
    refused(TypeError, message, x, w(64))
    refused(
        TypeError, r"bias is a Tensor \(torch\); needs the library of x, numpy", X, None, x[0, 0]
    )
    refused(
        TypeError, r"out is a ndarray \(numpy\); needs the library of x, torch", x, out=X.copy()
    )
    refused(TypeError, r"x is a list; needs a NumPy, CuPy or torch array", [[1.0]])


def test_read_only_out():
    out = np.full_like(X, 7)
    out.flags.writeable = False
    refused(ValueError, "out is read-only; needs a writeable array", X, out=out)
    with pytest.raises(ValueError, match="out is read-only"):
        reference.rms_norm(X, out=out)
    assert (out == 7).all()


def test_out_that_overlaps_itself(library):
    from cases import LAYOUTS

    for layout in (v for v in LAYOUTS if v.overlaps):
        buffer = library.array(np.full(layout.elements, 7, np.float32))
        out = library.lay(buffer, layout)
        x = library.array(np.ones(layout.shape, np.float32))
        refused(ValueError, r"out has shape .* which overlap themselves", x, out=out)
        refused(ValueError, r"out has shape .* which overlap themselves", out, out=out)
        assert (library.host(buffer) == 7).all()


def test_out_that_overlaps_x_in_part(library):
    buffer = library.array(np.full((7, 3, 64), 7, np.float32))
    refused(ValueError, "out overlaps x in part; needs x itself", buffer[:5], out=buffer[2:])
    refused(ValueError, "out overlaps x in part", buffer[::2], out=buffer[:4])
    refused(ValueError, "out overlaps x in part", buffer[:, :2], out=buffer[:, 1:])
    assert (library.host(buffer) == 7).all()


def test_out_interleaved_with_x_does_not_overlap(library, rng):
    """Query and key slices of one buffer share a range of bytes and not one byte."""
    packed = rng.standard_normal((5, 6, 64)).astype(np.float32)
    given = library.array(packed)
    rms_norm(given[:, :3], out=given[:, 3:])
    result = library.host(given)
    np.testing.assert_array_equal(result[:, :3], packed[:, :3])
    assert_alike(result[:, 3:], reference.rms_norm(packed[:, :3]))


def test_out_that_overlaps_a_weight(library):
    buffer = library.array(np.full((5, 3, 64), 7, np.float32))
    x = library.array(X)
    refused(ValueError, "out overlaps weight; needs separate memory", x, buffer[4, 0], out=buffer)
    refused(
        ValueError, "out overlaps bias; needs separate memory", x, None, buffer[0, 0], out=buffer
    )
    assert (library.host(buffer) == 7).all()


def test_subclasses_whose_meaning_would_be_lost():
    refused(TypeError, "x is a MaskedArray, whose meaning a norm would drop", np.ma.masked_array(X))
    refused(TypeError, "x is a recarray", np.ones((3, 64), np.float32).view(np.recarray))


def test_memmap_is_plain_memory(tmp_path):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    mapped[...] = X
    np.testing.assert_array_equal(rms_norm(mapped), rms_norm(X))
    assert rms_norm(mapped, out=mapped) is mapped
    np.testing.assert_array_equal(np.asarray(mapped), rms_norm(X))


def test_headnorm_refuses_what_the_functions_refuse(library):
    with pytest.raises(ValueError, match=r"kind is 'batch'; needs one of \('rms', 'layer'\)"):
        HeadNorm(w(64), kind="batch")
    with pytest.raises(ValueError, match=r"kind is \['rms'\]; needs one of"):
        HeadNorm(w(64), kind=["rms"])
    with pytest.raises(ValueError, match=r"eps is -1\.0; needs 0 or more"):
        HeadNorm(w(64), eps=-1)
    with pytest.raises(ValueError, match="weight_offset is 1.0; needs a weight"):
        HeadNorm(weight_offset=1)
    with pytest.raises(TypeError, match="weight has dtype int64"):
        HeadNorm(np.arange(4))
    with pytest.raises(TypeError, match="weight is a list"):
        HeadNorm([1.0])
    with pytest.raises(ValueError, match="rounding is 'rstd' and a bias is given; needs neither"):
        HeadNorm(None, w(64), rounding="rstd")
    norm = HeadNorm(w(3, 64))
    with pytest.raises(ValueError, match="needs num_heads=3 there"):
        norm(library.array(w(5, 4, 64)))
    with pytest.raises(ValueError, match="heads_axis is -1"):
        norm(library.array(X), heads_axis=-1)


def test_one_dimensional_weight_with_num_heads_is_never_guessed_wrong(library, rng):
    """Do all heads share it, or is it flat? Only x in heads of the short length tells."""
    norm = HeadNorm(w(64), num_heads=4)
    assert norm.head_dim == 16
    x = library.array(rng.standard_normal((5, 4, 16)).astype(np.float32))
    assert norm(x).shape == (5, 4, 16)
    for shape in ((5, 4, 64), (2, 4, 5, 64), (5, 256), (5, 64)):
        with pytest.raises(ValueError, match=r"two things; needs head_dim=64 .* or head_dim=16"):
            norm(library.array(w(*shape)))
    shared = HeadNorm(w(64), num_heads=4, head_dim=64)
    assert shared(library.array(w(5, 4, 64))).shape == (5, 4, 64)
    assert shared(library.array(w(5, 256))).shape == (5, 256)
    flat = HeadNorm(w(64), num_heads=4, head_dim=16)
    assert flat(library.array(w(5, 64))).shape == (5, 64)


def test_in_place_across_axes_of_length_1(library, rng):
    values = rng.standard_normal((5, 3, 64)).astype(np.float32)
    buffer = library.array(values)
    rms_norm(buffer[0:1], out=buffer[0][None])
    result = library.host(buffer)
    assert_alike(result[0], reference.rms_norm(values[0]))
    np.testing.assert_array_equal(result[1:], values[1:])


def test_errors_of_the_package_are_what_they_say():
    assert issubclass(cupy_headnorm.CheckpointError, ValueError)
    assert issubclass(cupy_headnorm.GPUUnavailableError, RuntimeError)
    assert issubclass(cupy_headnorm.CaptureError, RuntimeError)


def test_parameters_lie_on_the_device_of_x():
    x = Layout((5, 3, 64), (768, 256, 4), FLOAT32, Device("cuda", 1), 16)
    weight = Layout((64,), (4,), FLOAT32, Device("cuda", 0), 16)
    with pytest.raises(TypeError, match="weight is on cuda:0; needs the device of x, cuda:1"):
        norm_rules.describe(option_rules.options("rms"), x, weight, None, x)


def test_no_elements_have_no_axis_of_tokens():
    x = Layout((0, 3, 64), (768, 256, 4), FLOAT32, CPU, 16)
    key = (0, x.shape, x.strides, "float32", 0)
    strides = lengths.Arrays([lengths.Role((-1,), 1, broadcasts=False)]).token_strides([key])
    assert all(math.prod(x.shape[: lead + 1]) == 0 for lead in lengths.leads(strides))


NORM = HeadNorm(w(64))
ROPE = {"rotary_dim": 4, "inverse_frequency": (1, 0.5), "max_position": 9}
# Who is given an argument that is no array, and its name.
DOORS = {
    "function": (
        lambda **given: rms_norm(X, **given),
        ("eps", "weight_offset", "num_heads", "head_dim", "heads_axis", "rounding"),
    ),
    "reference": (
        lambda **given: reference.rms_norm(X, **given),
        ("eps", "weight_offset", "num_heads", "head_dim", "heads_axis", "rounding"),
    ),
    "HeadNorm": (HeadNorm, ("kind", "weight_offset", "num_heads", "head_dim", "rounding")),
    "norm": (lambda **given: NORM(X, **given), ("heads_axis",)),
    "load": (NORM.load, ("device",)),
    "launch": (lambda **given: ops.launch(NORM.plan(X), X, **given), ("kind", "eps", "rounding")),
    "launch of": (lambda config: ops.launch(config, X), ("config",)),
    "LaunchConfig": (lambda lanes: LaunchConfig(16, lanes, 1, 1, 16), ("lanes",)),
    "of_theta": (lambda theta: Rope.of_theta(theta, 4, max_position=3), ("theta",)),
    "Rope": (
        lambda **given: hash(Rope(**ROPE | given)),
        (
            "style", "order", "rounding", "table", "sections", "interleaved_sections",
            "attention_scaling", "max_position", "rotary_dim",
        ),
    ),
    "apply": (
        lambda **given: rope_numpy.apply(X, X, X, **given), ("style", "rounding", "rotary_dim")
    ),
}  # fmt: skip
ODD = {
    "a list": lambda: ["rms"],
    "a dict": lambda: {"rms": 1},
    "a set": lambda: {1.5},
    "an object": object,
    "an array": lambda: np.array([1.0, 2.0]),
    "words": lambda: np.array(["rms", "once"]),
    "a word": lambda: np.array("rms"),
    "many lines": lambda: np.ones((40, 40)),
    "a tensor": lambda: pytest.importorskip("torch").ones(40, 40),
    "no memory": lambda: pytest.importorskip("torch").ones(1, device="meta"),
}


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize(
    ("door", "name"), [(door, name) for door, (_, names) in DOORS.items() for name in names]
)
def test_an_argument_of_any_type_is_refused_by_name_and_in_one_line(door, name, value):
    """Some values cannot be hashed, and some are neither equal nor unequal to a word."""
    with pytest.raises((TypeError, ValueError), match=rf"^{name} (is|are) .*; needs ") as caught:
        DOORS[door][0](**{name: ODD[value]()})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_words_of_numpy_are_words():
    norm = HeadNorm(kind=np.str_("layer"), rounding=np.str_("once"))
    assert (type(norm.kind), type(norm.rounding)) == (str, str)
    assert_alike(norm(X), HeadNorm(kind="layer")(X))


@pytest.mark.parametrize("zeros", [(-0.0, 0.0), (0.0, -0.0)])
def test_an_offset_of_minus_0_is_0(zeros, rng):
    """They are equal and hash alike, so caches cannot tell them apart; -0 + -0 is not 0 + -0."""
    weight = np.array([-0.0, 0.0, 1.0, -1.0], np.float32)
    x, eps = rng.standard_normal((3, 4)).astype(np.float32), 0.123  # an eps of its own
    right = rms_norm(x, weight + 0.0, eps=eps)
    for offset in zeros:
        for y in (
            rms_norm(x, weight, eps=eps, weight_offset=offset),
            reference.rms_norm(x, weight, eps=eps, weight_offset=offset),
            HeadNorm(weight, eps=eps, weight_offset=offset)(x),
        ):
            assert y.tobytes() == right.tobytes()
    assert repr(HeadNorm(head_dim=4, eps=-0.0)) == repr(HeadNorm(head_dim=4, eps=0.0))
