"""What only a GPU can show: streams, graphs, 64-bit offsets, geometries, peers' shape tables."""

import gc
import itertools
import threading
import weakref
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from libraries import CuPyLibrary, TorchLibrary
from oracle import norm as oracle
from tolerances import RELATIVE, assert_alike, assert_close

import cupy_headnorm
from cupy_headnorm import CaptureError, HeadNorm, LaunchConfig, _interop, layer_norm, ops, rms_norm

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy")


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


@pytest.fixture(scope="module")
def spin(cupy):
    """Keep a stream busy for about 20 ms: whatever is queued elsewhere runs first."""
    kernel = cupy.RawKernel(SPIN, "spin")
    return lambda stream: kernel((1,), (1,), (np.int64(40_000_000),), stream=stream)


def expected(x, weight=None):
    return cupy_headnorm.reference.rms_norm(x, weight)


@pytest.mark.parametrize("stream", ["default", "other"])
def test_torch_work_is_queued_on_torchs_stream(spin, stream, rng):
    values = rng.standard_normal((64, 4, 128)).astype(np.float32)
    norm = HeadNorm(np.ones(128, np.float32))
    x = torch.zeros(values.shape, device="cuda")
    source = torch.from_numpy(values).cuda()
    norm.warmup(x)
    torch.cuda.synchronize()
    chosen = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    with torch.cuda.stream(chosen):
        spin(SimpleNamespace(ptr=chosen.cuda_stream))
        x.copy_(source)
        y = norm(x)
        norm(x, out=x)
    # On any other stream the norm would have read zeros while the spinning kernel ran.
    torch.cuda.synchronize()
    assert_alike(y.cpu().numpy(), expected(values))
    assert torch.equal(x, y)


@pytest.mark.parametrize("stream", ["default", "other"])
def test_cupy_work_is_queued_on_cupys_stream(cupy, spin, stream, rng):
    values = rng.standard_normal((64, 4, 128)).astype(np.float32)
    norm = HeadNorm(np.ones(128, np.float32))
    chosen = cupy.cuda.Stream.null if stream == "default" else cupy.cuda.Stream(non_blocking=True)
    source = cupy.asarray(values)
    x = cupy.zeros_like(source)
    norm.warmup(x)
    cupy.cuda.Device().synchronize()
    with chosen:
        spin(chosen)
        x[...] = source
        y = norm(x)
        norm(x, out=x)
        chosen.synchronize()
        assert_alike(y.get(), expected(values))
        np.testing.assert_array_equal(x.get(), y.get())


def test_a_call_does_not_wait_for_the_gpu(spin):
    x = torch.zeros(64, 4, 128, device="cuda")
    norm = HeadNorm(np.ones(128, np.float32))
    norm(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        spin(SimpleNamespace(ptr=stream.cuda_stream))
        norm(x)
        assert not stream.query(), "the call returned before the work before it was done"
    torch.cuda.synchronize()


def test_torch_graph_in_place_and_with_a_new_result(rng):
    values = rng.standard_normal((8, 4, 128)).astype(np.float32)
    norm = HeadNorm(np.full(128, 2, np.float32))
    x = torch.zeros(values.shape, device="cuda")
    norm.warmup(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = norm(x)
        norm(x, out=x)
    x.copy_(torch.from_numpy(values))
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_alike(y.cpu().numpy(), 2 * expected(values))
    assert torch.equal(x, y)


def test_cupy_graph_in_place_and_with_out(cupy, rng):
    values = rng.standard_normal((8, 4, 128)).astype(np.float32)
    norm = HeadNorm(np.full(128, 2, np.float32))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.zeros(values.shape, np.float32)
        y = cupy.zeros_like(x)
        norm.warmup(x)
        norm.warmup(x, out=y)
        stream.begin_capture()
        norm(x, out=y)
        norm(x, out=x)
        with pytest.raises(CaptureError, match="a result without out would be allocated"):
            norm(x)
        graph = stream.end_capture()
        x.set(values)
        graph.launch(stream)
        stream.synchronize()
        assert_alike(y.get(), 2 * expected(values))
        np.testing.assert_array_equal(x.get(), y.get())


def test_nothing_is_loaded_while_capturing(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.ones((8, 4, 136), np.float32)
        unloaded = HeadNorm(np.ones(136, np.float32))
        stream.begin_capture()
        with pytest.raises(CaptureError, match="this layout is not planned yet while the stream"):
            layer_norm(x, out=x)
        with pytest.raises(CaptureError, match=r"weight is not on cuda:0 yet .*warmup\(x\)"):
            unloaded(x, out=x)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        assert (x.get() == 1).all()
    assert unloaded._on_device == {}


def test_new_results_live_in_torchs_pool():
    x = torch.ones(64, 4, 128, device="cuda")
    norm = HeadNorm(np.ones(128, np.float32))
    norm.warmup(x)
    before = torch.cuda.memory_allocated()
    y = norm(x)
    assert torch.cuda.memory_allocated() - before == y.numel() * 4


def test_weights_are_freed_and_come_back(cupy):
    norm = HeadNorm(np.ones((4, 128), np.float32))
    x = cupy.ones((64, 4, 128), np.float32)
    first = norm(x).get()
    del x
    norm.unload()
    gc.collect()
    assert norm._on_device == {}
    np.testing.assert_array_equal(norm(cupy.ones((64, 4, 128), np.float32)).get(), first)


def test_unload_waits_for_work_in_flight(cupy, spin, rng):
    values = rng.standard_normal((64, 4, 128)).astype(np.float32)
    weight = rng.standard_normal(128).astype(np.float32)
    norm = HeadNorm(weight)
    x = cupy.asarray(values)
    stream = cupy.cuda.Stream(non_blocking=True)
    norm.warmup(x)
    cupy.cuda.Device().synchronize()
    with stream:
        spin(stream)
        y = norm(x)
        norm.unload()
        assert stream.done
        assert_alike(y.get(), expected(values, weight))


def test_another_dlpack_producer_on_the_gpu(cupy, rng):
    values = rng.standard_normal((64, 4, 128)).astype(ml_dtypes.bfloat16)
    x = cupy.asarray(values)
    plain = rms_norm(x).get()
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with stream:
            for _ in range(3):
                y = rms_norm(Another(x, cupy))
            np.testing.assert_array_equal(y.get(), plain)
            stream.synchronize()
            rms_norm(Another(x, cupy))
            in_flight = len(_interop._DLPACK._in_flight)
            assert in_flight <= 1, "capsules are let go once their kernel has run"
    assert HeadNorm().forward_reference(Another(x, cupy)).shape == x.shape


def test_weights_of_another_producer_are_kept_too(cupy, spin, rng):
    """A producer that exports a temporary: nothing but its capsule keeps the memory."""

    class Temporary(Another):
        def __dlpack__(self, **options):
            copy = self.array.copy()
            self.exported = weakref.ref(copy)
            return copy.__dlpack__(**options)

    values = cupy.asarray(rng.standard_normal((64, 4, 128)).astype(np.float32))
    x, weight = Temporary(values, cupy), Temporary(values[0, 0], cupy)
    rms_norm(x, weight)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        spin(stream)
        rms_norm(x, weight)
        assert not stream.done
        assert x.exported() is not None
        assert weight.exported() is not None
        stream.synchronize()


def test_a_plan_miss_spares_another_threads_capture(cupy):
    """Compiling and uploading use no default stream, which would break a blocking stream's."""
    errors = []

    def other_thread():
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                x = cupy.ones((8, 4, 144), np.float32)
                captured.wait()
                HeadNorm(np.ones(144, np.float32)).warmup(x)
                stream.synchronize()
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    captured, done = threading.Event(), threading.Event()
    norm = HeadNorm(np.full(128, 2, np.float32))
    blocking = cupy.cuda.Stream()
    with blocking:
        x = cupy.ones((8, 4, 128), np.float32)
        norm.warmup(x)
        thread = threading.Thread(target=other_thread)
        thread.start()
        cupy.cuda.Device().synchronize()
        relaxed = cupy.cuda.runtime.streamCaptureModeRelaxed
        blocking.begin_capture(mode=relaxed)
        captured.set()
        done.wait(60)
        norm(x, out=x)
        graph = blocking.end_capture()
        graph.launch(blocking)
        blocking.synchronize()
        thread.join()
        assert not errors
        np.testing.assert_allclose(x.get(), 2, rtol=RELATIVE["float32"])


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
    norm = {"rms": rms_norm, "layer": layer_norm}[kind]
    y = library.host(norm(x, library.array(weight), out=result, eps=1e-5))
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
    norm = {"rms": rms_norm, "layer": layer_norm}[kind]
    y = library.host(
        norm(library.array(values), library.array(weight), library.array(bias), eps=1e-6)
    )
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


@pytest.mark.two_gpus
@pytest.mark.parametrize("producer", ["torch", "cupy", "another"])
def test_a_device_that_is_not_current(cupy, producer, rng):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a second CUDA device")
    values = rng.standard_normal((16, 4, 128)).astype(np.float32)
    norm = HeadNorm(np.ones(128, np.float32))
    with cupy.cuda.Device(1):
        x = cupy.asarray(values)
    if producer == "torch":
        x = torch.from_numpy(values).to("cuda:1")
    elif producer == "another":
        x = Another(x, cupy)
    for _ in range(2):
        y = norm(x)
    host = y.cpu().numpy() if producer == "torch" else y.get()
    assert_alike(host, expected(values))
    assert cupy.cuda.runtime.getDevice() == 0
    norm.unload()
    assert_alike(HeadNorm().forward_reference(values), expected(values))


class Another:
    """CuPy memory behind nothing but DLPack and a namespace."""

    def __init__(self, array, namespace):
        self.array = array
        self.namespace = namespace

    def __dlpack__(self, *, stream=None, **options):
        with self.array.device:
            return self.array.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return self.namespace
