"""The class: what it holds, where it loads, how it prints and pickles."""

import copy
import pickle
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from cases import DEFAULT, random
from tolerances import assert_alike

import cupy_headnorm
from cupy_headnorm import HeadNorm, LaunchConfig, layer_norm, rms_norm
from cupy_headnorm._arrays.dtypes import BFLOAT16, FLOAT16, FLOAT32
from cupy_headnorm._arrays.layout import Device
from cupy_headnorm._calls.uploads import device_of
from cupy_headnorm._sources import of_model
from cupy_headnorm.checkpoint.norms import ModelNorm
from cupy_headnorm.headnorm import built, inside
from cupy_headnorm.models import records


@pytest.fixture
def parameters(rng):
    return random(rng, (3, 64), BFLOAT16), random(rng, (3, 64), FLOAT32)


def test_call_equals_the_function(library, parameters, rng):
    weight, bias = parameters
    x = library.array(random(rng, (5, 3, 64), BFLOAT16))
    for kind, function in (("rms", rms_norm), ("layer", layer_norm)):
        norm = HeadNorm(weight, bias, kind=kind, weight_offset=1.0, rounding="before_weight")
        expected = function(
            x, library.array(weight), library.array(bias), weight_offset=1.0,
            rounding="before_weight",
        )  # fmt: skip
        np.testing.assert_array_equal(library.host(norm(x)), library.host(expected))


def test_weights_from_any_library_serve_any_other(library, parameters, rng):
    weight, bias = parameters
    norm = HeadNorm(library.array(weight), library.array(bias))
    x = random(rng, (5, 3, 64), BFLOAT16)
    np.testing.assert_array_equal(norm(x), HeadNorm(weight, bias)(x))
    assert norm.weight.dtype == weight.dtype


def test_out_and_heads_axis(library, parameters, rng):
    norm = HeadNorm(*parameters)
    values = random(rng, (2, 5, 3, 64), FLOAT32)
    plain = library.host(norm(library.array(values)))
    swapped = library.array(values).swapaxes(1, 2)
    assert norm(swapped, heads_axis=-3, out=swapped) is swapped
    np.testing.assert_array_equal(library.host(swapped).swapaxes(1, 2), plain)


def test_forward_has_the_old_calling_form(library, parameters, rng):
    norm = HeadNorm(*parameters)
    values = random(rng, (5, 3, 64), FLOAT32)
    x = library.array(values)
    expected = library.host(norm(x))
    y = norm.forward(x, None, object(), 3, loras=["a"], position=4)
    np.testing.assert_array_equal(library.host(y), expected)
    assert y is not x
    held = norm.forward(x, intermediates=True)
    assert list(held) == ["hidden_states"]
    np.testing.assert_array_equal(library.host(held["hidden_states"]), expected)
    np.testing.assert_array_equal(library.host(x), values)


@pytest.mark.parametrize("name", ["out", "heads_axis"])
def test_forward_does_not_swallow_our_own_names(name, parameters):
    norm = HeadNorm(*parameters)
    x = np.ones((5, 3, 64), np.float32)
    for form in (norm.forward, norm.forward_reference):
        with pytest.raises(TypeError, match=f"forward takes no {name}; needs a call of the norm"):
            form(x, **{name: -3})


def test_forward_reference_returns_to_the_library_and_device(any_library, parameters, rng):
    norm = HeadNorm(*parameters)
    values = random(rng, (5, 3, 64), FLOAT32)
    x = any_library.array(values)
    y = norm.forward_reference(x)
    np.testing.assert_array_equal(any_library.host(y), norm(values))
    held = norm.forward_reference(x, intermediates=True)
    assert list(held) == ["hidden_states"]


def test_forward_reference_with_bfloat16(library, parameters, rng):
    norm = HeadNorm(*parameters)
    values = random(rng, (5, 3, 64), BFLOAT16)
    y = library.host(norm.forward_reference(library.array(values)))
    np.testing.assert_array_equal(y, norm(values))


def test_parameters_are_what_was_given_and_a_snapshot(parameters):
    weight, bias = parameters
    given = weight.copy()
    norm = HeadNorm(given, bias, weight_offset=1.0)
    given[...] = 0
    np.testing.assert_array_equal(norm.weight, weight)
    assert norm.weight.shape == (3, 64)
    assert norm.bias.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        norm.weight[0] = 1
    flat = HeadNorm(weight.reshape(-1), head_dim=64)
    assert flat.weight.shape == (192,)
    assert (flat.num_heads, flat.head_dim) == (3, 64)


def test_strided_parameters_are_taken_as_they_mean(library, rng, parameters):
    values = random(rng, (64, 3), FLOAT32)
    transposed = library.array(values).swapaxes(0, 1)
    np.testing.assert_array_equal(HeadNorm(transposed).weight, values.T)


def test_sizes_are_the_true_ones(parameters):
    weight, bias = parameters
    norm = HeadNorm(weight, bias)
    assert norm.size == 384
    assert norm.nbytes == 192 * 2 + 192 * 4
    assert (HeadNorm().size, HeadNorm().nbytes) == (0, 0)


def test_properties(parameters):
    norm = HeadNorm(*parameters, kind="layer", rounding="before_weight", weight_offset=2)
    assert (norm.kind, norm.eps, norm.rounding) == ("layer", 1e-5, "before_weight")
    assert (norm.num_heads, norm.head_dim, norm.weight_offset) == (3, 64, 2.0)
    assert HeadNorm().eps == 1e-6
    assert (HeadNorm().num_heads, HeadNorm().head_dim) == (None, None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda w, b: HeadNorm(), "HeadNorm(eps=1e-06)"),
        (
            lambda w, b: HeadNorm(np.ones(128, ml_dtypes.bfloat16)),
            "HeadNorm(<bfloat16 (128,)>, eps=1e-06)",
        ),
        (
            lambda w, b: HeadNorm(w, b, kind="layer", num_heads=3, weight_offset=1),
            "HeadNorm(<bfloat16 (3, 64)>, bias=<float32 (3, 64)>, kind='layer', eps=1e-05, "
            "num_heads=3, weight_offset=1.0)",
        ),
    ],
)
def test_repr(make, text, parameters):
    assert repr(make(*parameters)) == text


def test_repr_of_a_file_is_the_call(parameters, tmp_path):
    path = tmp_path / "norm.safetensors"
    HeadNorm(*parameters).to_safetensors(path, "q_norm")
    norm = HeadNorm.from_safetensors(path, "q_norm", weight_offset=1)
    again = eval(repr(norm))
    assert repr(again) == repr(norm)
    np.testing.assert_array_equal(again.weight, norm.weight)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))]
)
def test_copies_and_pickles(copied, parameters, rng, library, tmp_path):
    path = tmp_path / "norm.safetensors"
    HeadNorm(*parameters).to_safetensors(path, "q_norm")
    x = library.array(random(rng, (5, 3, 64), FLOAT32))
    for norm in (
        HeadNorm(*parameters, kind="layer", eps=0.5, num_heads=3, head_dim=64),
        HeadNorm.from_safetensors(path, "q_norm", rounding="before_weight"),
    ):
        expected = library.host(norm(x))
        again = copied(norm)
        assert again is not norm
        assert repr(again) == repr(norm)
        np.testing.assert_array_equal(library.host(again(x)), expected)


def test_heads_are_a_ranks_part(library, parameters, rng):
    weight, bias = parameters
    values = random(rng, (5, 3, 64), FLOAT32)
    for norm in (HeadNorm(weight, bias), HeadNorm(weight.reshape(-1), bias, head_dim=64)):
        whole = library.host(norm(library.array(values)))
        part = norm.heads(1, 3)
        y = library.host(part(library.array(values[:, 1:])))
        np.testing.assert_array_equal(y, whole[:, 1:])
        assert part.num_heads == 2
    shared = HeadNorm(weight[0]).heads(2, 4)
    assert (shared.num_heads, shared.weight.shape) == (2, (64,))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (1, 1), (2, 1), (0, 4)])
def test_heads_outside_are_refused(start, stop, parameters):
    with pytest.raises(ValueError, match=rf"heads {start} to {stop} of a norm of 3 heads; needs"):
        HeadNorm(*parameters).heads(start, stop)
    with pytest.raises(TypeError, match=r"start is 0\.5; needs an integer"):
        HeadNorm(*parameters).heads(0.5, 1)


def test_load_unload_and_use_again(library, parameters, rng):
    norm = HeadNorm(*parameters)
    x = library.array(random(rng, (5, 3, 64), FLOAT32))
    expected = library.host(norm(x))
    norm.unload()
    assert not inside(norm).devices
    np.testing.assert_array_equal(library.host(norm(x)), expected)
    norm.load("cuda" if library.on_gpu else "cpu")
    assert bool(inside(norm).devices) == library.on_gpu
    norm.unload()
    norm.unload()


def test_load_without_a_gpu_says_what_is_missing():
    if not cupy_headnorm.environment().reason:
        norm = HeadNorm(np.ones(64, np.float32))
        norm.load(np.int64(0))
        assert 0 in inside(norm).devices
        return
    for device in (None, 0, "cuda", "cuda:0"):
        with pytest.raises(cupy_headnorm.GPUUnavailableError, match=r"; needs: "):
            HeadNorm(np.ones(64, np.float32)).load(device)


@pytest.mark.parametrize(
    "device",
    [1, np.int64(1), "cuda:1", SimpleNamespace(type="cuda", index=1), SimpleNamespace(id=1)],
)
def test_a_device_is_read_as_libraries_write_it(device):
    assert device_of(device) == Device("cuda", 1)


def test_load_names_a_device_it_cannot_read():
    with pytest.raises(ValueError, match=r"device is 'cuda:x'; needs an index, 'cpu', 'cuda'"):
        HeadNorm().load("cuda:x")
    with pytest.raises(ValueError, match="device is 1.5; needs"):
        HeadNorm().load(1.5)


def test_warmup_writes_nothing(library, parameters, rng):
    norm = HeadNorm(*parameters)
    values = random(rng, (5, 3, 64), FLOAT32)
    x = library.array(values)
    assert norm.warmup(x) is None
    np.testing.assert_array_equal(library.host(x), values)
    norm.warmup(x, heads_axis=-2, out=library.array(values))
    with pytest.raises(ValueError, match="needs num_heads=3"):
        norm.warmup(library.array(values[:, :2]))


def test_plan_tells_the_geometry(library, parameters):
    x = library.array(np.ones((1000, 3, 64), np.float16))
    config = HeadNorm(*parameters).plan(x)
    assert isinstance(config, LaunchConfig)
    assert (config.vector_bytes, config.lanes, config.vectors_per_lane) == (16, 8, 1)


def test_many_threads_share_a_norm(library, rng):
    weight = random(rng, 64, FLOAT32)
    norm = HeadNorm(weight)
    values = [random(rng, (n + 1, 3, 64), FLOAT32) for n in range(8)]
    expected = [cupy_headnorm.reference.rms_norm(v, weight) for v in values]
    wrong = []

    def work(n):
        for _ in range(25):
            y = library.host(norm(library.array(values[n])))
            try:
                assert_alike(y, expected[n])
            except AssertionError:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_default_case_is_qwen3s():
    assert (DEFAULT.kind, DEFAULT.head_dim, DEFAULT.eps) == ("rms", 128, HeadNorm().eps)


def made_of_model(weight, own_rounding, result, **overrides):
    described = ModelNorm(
        name="q_norm", tower="text", layer=0, role="q", weights=(), biases=(), kind="rms", eps=1e-6,
        weight_offset=0.0, rounding=own_rounding, result=result, num_heads=3, head_dim=64,
        heads_axis=-2, shape=(64,), dtype="F32", rope=records.ModelRope(), notes=(),
        model_type="qwen3",
    )  # fmt: skip
    return built(of_model(described, weight, None, None, overrides))


@pytest.mark.parametrize(
    ("x", "weight", "result", "own"),
    [
        (BFLOAT16, FLOAT32, "promoted", "float32"),
        (FLOAT16, BFLOAT16, "promoted", "float32"),
        (BFLOAT16, FLOAT16, "weight", "float16"),
        (FLOAT32, BFLOAT16, "weight", "bfloat16"),
    ],
)
def test_a_models_own_result_dtype_is_not_changed_in_silence(x, weight, result, own, library, rng):
    values, w = random(rng, (5, 3, 64), x), random(rng, (64,), weight)
    norm = made_of_model(w, "before_weight", result)
    for refusing in (norm, norm.heads(0, 3), pickle.loads(pickle.dumps(norm))):
        for axis in (-2, -3):
            with pytest.raises(
                TypeError,
                match=rf"x has dtype {x} and the weight {weight}, of which the model itself makes "
                rf"{own}; needs x of {own}, or rounding='before_weight' given explicitly",
            ):
                refusing(library.array(values[:, :, None]), heads_axis=axis)
    chosen = made_of_model(w, "before_weight", result, rounding="before_weight")
    assert library.host(chosen(library.array(values))).dtype == x.numpy
    same = values.astype(w.dtype)
    assert library.host(norm(library.array(same))).dtype == w.dtype
