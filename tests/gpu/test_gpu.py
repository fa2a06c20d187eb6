"""What only a GPU can show: kinds of memory, 64-bit offsets, geometries, peers' shape tables."""

import gc
import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import function
from libraries import CuPyLibrary, TorchLibrary
from oracle import norm as oracle
from tolerances import assert_alike, assert_close

import cupy_headnorm
from cupy_headnorm import HeadNorm, LaunchConfig, ops, rms_norm
from cupy_headnorm.headnorm import inside

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy")


def expected(x, weight=None):
    return cupy_headnorm.reference.rms_norm(x, weight)


def test_weights_are_freed_and_come_back(cupy):
    norm = HeadNorm(np.ones((4, 128), np.float32))
    x = cupy.ones((64, 4, 128), np.float32)
    first = norm(x).get()
    del x
    norm.unload()
    gc.collect()
    assert not inside(norm).devices
    np.testing.assert_array_equal(norm(cupy.ones((64, 4, 128), np.float32)).get(), first)


def test_managed_memory(cupy, rng):
    values = rng.standard_normal((16, 4, 128)).astype(np.float32)
    memory = cupy.cuda.malloc_managed(values.nbytes)
    x = cupy.ndarray(values.shape, np.float32, memory)
    x[...] = cupy.asarray(values)
    assert_alike(rms_norm(x).get(), expected(values))


def test_pinned_host_memory_runs_the_reference(rng):
    values = rng.standard_normal((16, 4, 128)).astype(np.float32)
    x = torch.from_numpy(values).pin_memory()
    y = rms_norm(x)
    assert y.device.type == "cpu"
    np.testing.assert_array_equal(y.numpy(), expected(values))


def test_weight_on_another_device_is_refused(cupy):
    x, weight = torch.ones(3, 64, device="cuda"), torch.ones(64)
    with pytest.raises(TypeError, match="weight is on cpu; needs the device of x, cuda:0"):
        rms_norm(x, weight)
    with pytest.raises(TypeError, match="weight is on cuda:0; needs the device of x, cpu"):
        rms_norm(weight.expand(3, 64), x[0])
    with pytest.raises(TypeError, match="out is on cpu; needs the device of x, cuda:0"):
        rms_norm(x, out=torch.ones(3, 64))
    with pytest.raises(TypeError, match=r"weight is a ndarray \(cupy\); needs the library of x"):
        rms_norm(x, cupy.ones(64, np.float32))


STRIDE = 2**31


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_strides_beyond_2_to_the_31(cupy, dtype, rng):
    """flashinfer's test_qknorm_int64_stride: a batch stride of 2**31 elements."""
    values = rng.standard_normal((2, 3, 4, 128)).astype(dtype)
    buffer = cupy.zeros(STRIDE + 3 * 4 * 128, dtype)
    strides = [s * buffer.itemsize for s in (STRIDE, 4 * 128, 128, 1)]
    x = cupy.lib.stride_tricks.as_strided(buffer, values.shape, strides)
    x[...] = cupy.asarray(values)
    weight = cupy.asarray(rng.standard_normal((4, 128)).astype(dtype))
    y = rms_norm(x, weight).get()
    np.testing.assert_array_equal(y, rms_norm(cupy.asarray(values), weight).get())
    assert rms_norm(x, weight, out=x) is x
    np.testing.assert_array_equal(x.get(), y)
    # A negative one: the same memory walked from its far end.
    strides[0] = -strides[0]
    back = cupy.lib.stride_tricks.as_strided(buffer[STRIDE:], values.shape, strides)
    np.testing.assert_array_equal(rms_norm(back).get(), rms_norm(cupy.asarray(y[::-1])).get())


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "head_dim"), [(2**25 + 3, 128), (2**31 + 12345, 1)])
def test_more_than_2_to_the_31_elements(cupy, rows, head_dim):
    x = cupy.empty((rows, 1, head_dim), np.float16)
    x[...] = cupy.arange(head_dim, dtype=np.float16) + 1
    x[-1] *= 2
    x[rows // 2] = -x[rows // 2]
    rms_norm(x, out=x, eps=0)
    exact, slack, _ = oracle("rms", np.arange(1.0, head_dim + 1).astype(np.float16)[None], eps=0)
    for row, sign in ((0, 1), (1, 1), (rows // 2, -1), (rows - 2, 1), (rows - 1, 1)):
        assert_close(sign * x[row].get(), exact, slack, "float16")
    # Every row but one is the first one's equal, bit for bit.
    same = sum(int((part == x[0, 0]).all(-1).sum()) for part in _pieces(x))
    assert same == rows - 1


def _pieces(x, size=2**27):
    return (x[start : start + size] for start in range(0, len(x), size))


@pytest.mark.slow
def test_rows_above_2_to_the_32_on_several_axes(cupy):
    """The 64-bit divisions of rows.cuh: an expanded x, per-head weights, one element a row."""
    tokens, heads = 2**31 + 7, 2  # a row's number does not fit 32 bits
    x = cupy.broadcast_to(cupy.full((1, 1, 1), 3, np.float16), (tokens, heads, 1))
    weight = cupy.asarray(np.array([[1.0], [2.0]], np.float32))
    y = rms_norm(x, weight, eps=0, out=cupy.zeros((tokens, heads, 1), np.float16))
    for head in range(heads):
        assert sum(int((p == head + 1).sum()) for p in _pieces(y[:, head, 0])) == tokens


GEOMETRIES = [
    LaunchConfig(16, 16, 1, 1, 16),  # one block per row
    LaunchConfig(16, 16, 1, 8, 16),
    LaunchConfig(16, 16, 1, 3, 16),  # idle lanes in the block's last warp
    LaunchConfig(16, 2, 8, 16, 16),
    LaunchConfig(2, 32, 4, 2, 2),
    LaunchConfig(8, 32, 1, 8, 4),
    LaunchConfig(16, 32, 1, 4, 16),  # half of the lanes idle
    LaunchConfig(2, 128, 1, 1, 2),  # a whole block, through shared memory
    LaunchConfig(4, 32, 1, 4, 4),  # two tiles
    LaunchConfig(16, 2, 3, 16, 8),  # three tiles, the last in part
]


@pytest.mark.parametrize("config", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_any_geometry_by_hand(cupy, config, kind, rng):
    x = (rng.standard_normal((37, 3, 128)) + 1).astype(np.float16)
    weight = rng.standard_normal((3, 128)).astype(np.float32)
    y = ops.launch(config, cupy.asarray(x), cupy.asarray(weight), kind=kind, eps=1e-5)
    exact, slack, _ = oracle(kind, x, weight, eps=1e-5)
    assert_close(y.get(), exact, slack, "float16")


def test_a_geometry_that_cannot_run_is_refused(cupy):
    x = cupy.ones((37, 3, 128), np.float16)
    with pytest.raises(ValueError, match="lanes is 12; needs a power of two"):
        ops.launch(LaunchConfig(16, 12, 1, 1, 16), x)
    with pytest.raises(ValueError, match="x is in host memory; a launch configuration needs CUDA"):
        ops.launch(LaunchConfig(16, 16, 1, 1, 16), np.ones((37, 3, 128), np.float16))


def test_one_block_per_row_gives_the_same_bits(cupy, rng):
    x = cupy.asarray(rng.standard_normal((37, 3, 128)).astype(np.float16))
    chosen = HeadNorm().plan(x)
    alone = LaunchConfig(
        chosen.vector_bytes, chosen.lanes, chosen.vectors_per_lane, 1, chosen.access_bytes
    )
    np.testing.assert_array_equal(ops.launch(alone, x).get(), rms_norm(x).get())


def against_float64(library, shape, rng, dtype=np.float16, sliced=False, out=False, kind="rms"):
    """One line of a peer's table, at our tolerance instead of theirs."""
    values = rng.standard_normal(shape).astype(dtype)
    x = library.array(values)
    if sliced:
        wide = np.zeros((*shape[:-2], 2 * shape[-2], shape[-1]), dtype)
        wide[..., : shape[-2], :] = values
        x = library.array(wide)[..., : shape[-2], :]
    weight = rng.standard_normal(shape[-1]).astype(dtype)
    result = library.array(np.zeros(shape, dtype)) if out else None
    y = library.host(function(kind)(x, library.array(weight), out=result, eps=1e-5))
    exact, slack, _ = oracle(kind, values, weight, eps=1e-5)
    assert_close(y, exact, slack, np.dtype(dtype).name)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("heads", [4, 7, 16])
@pytest.mark.parametrize("batch", [1, 19, 99, 989])
def test_flashinfers_table(batch, heads, head_dim, rng):
    for sliced, out in itertools.product([False, True], repeat=2):
        against_float64(CuPyLibrary(), (batch, heads, head_dim), rng, sliced=sliced, out=out)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("heads", [2, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 9, 256, 4109])
def test_sglangs_table(batch, heads, head_dim, rng):
    against_float64(TorchLibrary("cuda"), (batch, heads, head_dim), rng, ml_dtypes.bfloat16)


@pytest.mark.parametrize("hidden", [8, 768, 769, 5120, 5125, 8192])
@pytest.mark.parametrize("tokens", [7, 83, 4096])
def test_vllms_table(tokens, hidden, rng):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        against_float64(CuPyLibrary(), (tokens, 1, hidden), rng, dtype, sliced=hidden == 769)


@pytest.mark.parametrize("heads", [16, 32, 40, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 8, 32, 256])
def test_tensorrt_llms_table(tokens, heads, head_dim, rng):
    packed = rng.standard_normal((tokens, heads + 16, head_dim)).astype(ml_dtypes.bfloat16)
    x = TorchLibrary("cuda").array(packed)
    weight = rng.standard_normal(head_dim).astype(ml_dtypes.bfloat16)
    norm = HeadNorm(weight)
    for start, stop in ((0, heads), (heads, heads + 8)):
        norm(x[:, start:stop], out=x[:, start:stop])
    exact, slack, _ = oracle("rms", packed[:, : heads + 8], weight, eps=1e-6)
    y = TorchLibrary("cuda").host(x)
    assert_close(y[:, : heads + 8], exact, slack, "bfloat16")
    np.testing.assert_array_equal(y[:, heads + 8 :], packed[:, heads + 8 :])


@pytest.mark.parametrize("shape", [(2, 16, 4, 64), (1, 1, 32, 128)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_quacks_table(shape, kind, rng):
    values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    weight, bias = rng.standard_normal((2, *shape[-2:])).astype(np.float32)
    library = TorchLibrary("cuda")
    arrays = map(library.array, (values, weight, bias))
    y = library.host(function(kind)(*arrays, eps=1e-6))
    exact, slack, _ = oracle(kind, values, weight, bias, eps=1e-6)
    assert_close(y, exact, slack, "bfloat16")


@pytest.mark.parametrize("shape", [(2, 128, 512), (5, 123, 123), (2, 2, 8), (9, 7, 41)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_ligers_table(shape, kind, rng):
    for dtype in (np.float32, ml_dtypes.bfloat16):
        against_float64(TorchLibrary("cuda"), shape, rng, dtype, kind=kind)


def test_apexs_stride(rng):
    values = rng.standard_normal((10, 20, 64)).astype(np.float16)
    x = TorchLibrary("cuda").array(values)[::3, ::5]
    y = TorchLibrary("cuda").host(rms_norm(x))
    exact, slack, _ = oracle("rms", values[::3, ::5], eps=1e-6)
    assert_close(y, exact, slack, "float16")
    with pytest.raises(ValueError, match="x has a stride of 6 bytes on its last axis; needs 2"):
        rms_norm(TorchLibrary("cuda").array(values)[::3, ::5, ::3])
