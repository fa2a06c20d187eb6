"""JAX: eager arrays in and out on their own device, refused inside transforms, never written."""

import os

import numpy as np
import pytest
from tolerances import assert_alike

from cupy_headnorm import HeadNorm, reference, rms_norm

# Read when JAX is imported: leave memory on the GPU to the other tests, and be two host devices.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
jax = pytest.importorskip("jax")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    try:
        return jax.devices(request.param)[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no {request.param}: {error}")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def ones():
    return jax.device_put(np.ones((3, 64), np.float32), jax.devices("cpu")[0])


@pytest.mark.usefixtures("x64")
def test_result_is_a_jax_array_where_x_is(device, dtype, rng):
    values = rng.standard_normal((5, 3, 64)).astype(dtype.numpy)
    weight = rng.standard_normal((3, 64)).astype(dtype.numpy)
    x = jax.device_put(values, device)
    y = rms_norm(x, jax.device_put(weight, device))
    assert isinstance(y, jax.Array)
    assert y.devices() == {device}
    assert_alike(np.asarray(y), reference.rms_norm(values, weight))
    np.testing.assert_array_equal(np.asarray(x), values)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("call", ["norm", "forward", "forward_reference"])
def test_headnorm_holds_a_snapshot_of_a_jax_weight(device, call, dtype, rng):
    values = rng.standard_normal((5, 3, 64)).astype(dtype.numpy)
    weight = rng.standard_normal(64).astype(dtype.numpy)
    source = jax.device_put(weight, device)
    norm = HeadNorm(source)
    source.delete()
    assert norm.weight.dtype == dtype.numpy
    np.testing.assert_array_equal(norm.weight, weight)
    x = jax.device_put(values, device)
    y = norm(x) if call == "norm" else getattr(norm, call)(x)
    assert y.devices() == {device}
    assert_alike(np.asarray(y), reference.rms_norm(values, weight))


def test_shapes_without_tokens_and_flat_ones(device, rng):
    empty = jax.device_put(np.ones((0, 3, 64), np.float32), device)
    assert rms_norm(empty).shape == (0, 3, 64)
    values = rng.standard_normal((5, 192)).astype(np.float32)
    y = rms_norm(jax.device_put(values, device), num_heads=3, head_dim=64)
    assert_alike(np.asarray(y), reference.rms_norm(values, num_heads=3, head_dim=64))


def test_work_is_ordered_without_waiting(device, rng):
    """JAX computes behind the caller's back, and reuses memory as soon as an array is dropped."""
    values = rng.standard_normal((2048, 2048)).astype(np.float32)
    norm = HeadNorm(np.ones(64, np.float32), num_heads=32, head_dim=64)
    norm(jax.device_put(values, device))
    step = jax.jit(lambda x: x @ x.T)

    def run(settle):
        x = jax.device_put(values, device)
        for _ in range(10):
            x = settle(norm(settle(step(x))))
        return np.asarray(x)

    np.testing.assert_array_equal(run(lambda x: x), run(jax.block_until_ready))


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_result_is_in_the_kind_of_memory_of_x(device, kind):
    place = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
    y = rms_norm(jax.device_put(np.ones((3, 64), np.float32), place))
    assert y.sharding.memory_kind == kind
    assert y.devices() == {device}


def test_result_is_on_the_host_device_of_x():
    """DLPack gives all of JAX's host devices one number."""
    _, second = jax.devices("cpu")
    y = rms_norm(jax.device_put(np.ones((3, 64), np.float32), second))
    assert y.devices() == {second}


def test_out_is_refused(device):
    x = jax.device_put(np.ones((3, 64), np.float32), device)
    with pytest.raises(TypeError, match="out is a jax.Array, which is immutable.*without out"):
        rms_norm(x, out=x)
    with pytest.raises(TypeError, match="out is a jax.Array, which is immutable.*without out"):
        HeadNorm(np.ones(64, np.float32))(x, out=jax.device_put(x, device))
    HeadNorm(np.ones(64, np.float32)).warmup(x)
    assert (np.asarray(x) == 1).all()


TRANSFORMS = {
    "jit": lambda x: jax.jit(rms_norm)(x),
    "method": lambda x: jax.jit(HeadNorm(np.ones(64, np.float32)))(x),
    "vmap": lambda x: jax.vmap(rms_norm)(x[None]),
    "grad": lambda x: jax.grad(lambda x: rms_norm(x).sum())(x),
    "jvp": lambda x: jax.jvp(rms_norm, (x,), (x,)),
    "eval_shape": lambda x: jax.eval_shape(rms_norm, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform, ones):
    with pytest.raises(
        TypeError, match="x is a .*Tracer, without memory: .* inside jax.jit .*needs an eager call"
    ):
        TRANSFORMS[transform](ones)


def test_traced_weights_are_refused(ones):
    with pytest.raises(TypeError, match="weight is a .*Tracer, without memory"):
        jax.jit(lambda weight: rms_norm(ones, weight))(ones[0])
    with pytest.raises(TypeError, match="weight is a .*Tracer, without memory"):
        jax.jit(lambda weight: HeadNorm(weight)(ones))(ones[0])


def test_constants_of_a_traced_function_are_eager(ones):
    y = jax.jit(lambda x: x + rms_norm(ones))(ones)
    np.testing.assert_array_equal(np.asarray(y), 1 + np.asarray(rms_norm(ones)))


def test_arrays_on_several_devices_are_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), ("tokens",))
    for axes in (("tokens",), ()):  # parted, and copied
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        x = jax.device_put(np.ones((4, 64), np.float32), place)
        with pytest.raises(TypeError, match="x is a jax.Array on 2 devices; needs .* single dev"):
            rms_norm(x)
        assert rms_norm(x.addressable_shards[1].data).devices() == {jax.devices("cpu")[1]}
        with pytest.raises(TypeError, match="weight is a jax.Array on 2 devices"):
            HeadNorm(x)


def test_deleted_arrays_are_refused(ones):
    kept = rms_norm(ones)
    ones.delete()
    for arrays, name in (((ones,), "x"), ((kept, ones), "weight")):
        with pytest.raises(TypeError, match=f"{name} is a jax.Array that was deleted or donated"):
            rms_norm(*arrays)


def test_float64_is_refused_where_jax_makes_float32_of_it(x64, device):
    x = jax.device_put(np.ones((3, 64)), device)
    assert rms_norm(x).dtype == np.float64
    with (
        jax.enable_x64(False),
        pytest.raises(TypeError, match="x is float64 while jax_enable_x64 is off"),
    ):
        rms_norm(x)


def test_other_kinds_are_refused_by_name(ones):
    with pytest.raises(TypeError, match="x has dtype int32; needs float16"):
        rms_norm(ones.astype(np.int32))
    with pytest.raises(TypeError, match="x has dtype float8_e4m3fn; needs float16"):
        rms_norm(ones.astype("float8_e4m3fn"))
    with pytest.raises(TypeError, match="x is a PRNGKeyArray; needs a NumPy, CuPy or torch"):
        rms_norm(jax.random.key(0))
    with pytest.raises(TypeError, match=r"weight is a ndarray \(numpy\); needs .* of x, jax"):
        rms_norm(ones, np.ones(64, np.float32))
    with pytest.raises(TypeError, match=r"weight is a ArrayImpl \(jax\); needs .* of x, numpy"):
        rms_norm(np.ones((3, 64), np.float32), ones[0])
