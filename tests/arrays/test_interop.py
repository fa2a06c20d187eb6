"""Zero copies, the producer's library, and every kind of array but torch's that is refused."""

import contextlib
import ctypes
import gc
import sys
import weakref
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from cases import Layout
from libraries import StrictLibrary
from tolerances import assert_alike

import cupy_headnorm
from cupy_headnorm import HeadNorm, QKNorm, rms_norm
from cupy_headnorm._arrays import dlpack, find, views
from cupy_headnorm._arrays.dtypes import FLOAT32
from cupy_headnorm._arrays.layout import is_dense
from cupy_headnorm._calls import uploads
from cupy_headnorm._cuda import driver, environment
from cupy_headnorm._cuda import memory as cuda_memory


def test_result_is_the_producers(any_library, rng):
    x = any_library.array(rng.standard_normal((5, 3, 64)).astype(np.float32))
    y = rms_norm(x, any_library.array(np.ones(64, np.float32)))
    expected = cupy_headnorm.reference.rms_norm(any_library.host(x))
    assert_alike(any_library.host(y), expected)
    assert any_library.pointer(y) != any_library.pointer(x)


def test_view_is_the_same_memory(any_library, dtype):
    if any_library.name == "strict" and dtype.name in ("bfloat16", "float16"):
        pytest.skip("not in the array API standard: the library has no such arrays")
    x = any_library.array(np.ones((5, 3, 64), dtype.numpy))
    view = find.view(x, "x")
    assert view.pointer == any_library.pointer(x)
    assert view.layout.shape == (5, 3, 64)
    size = dtype.itemsize
    assert view.layout.strides == (192 * size, 64 * size, size)
    assert view.layout.dtype is dtype
    if view.layout.device.kind == "cpu":
        assert view.as_numpy().ctypes.data == view.pointer


def test_result_keeps_the_order_of_axes(library, rng):
    """As torch's and NumPy's own functions do: (b, t, h, d) seen as (b, h, t, d) stays so."""
    x = library.array(rng.standard_normal((2, 5, 3, 64)).astype(np.float32)).swapaxes(1, 2)
    y = rms_norm(x, heads_axis=-3)
    assert library.strides(y) == library.strides(x)


# shape, strides of x, of the result
ODD = {
    "a row of a wider matrix": ((1, 192), (768, 1), (192, 1)),
    "a token of packed q, k, v": ((1, 1, 4, 64), (768, 768, 64, 1), (256, 256, 64, 1)),
    "broadcast": ((3, 1, 64), (64, 0, 1), (64, 64, 1)),
    "heads first, of one sequence": ((1, 3, 5, 64), (4096, 64, 192, 1), (960, 64, 192, 1)),
    "one sequence of a longer one": ((1, 5, 3, 64), (4096, 192, 64, 1), (960, 192, 64, 1)),
    "one of all": ((1, 1, 1), (7, 5, 1), (1, 1, 1)),
}


@pytest.mark.parametrize("case", ODD)
def test_a_result_has_no_odd_stride(library, case, rng):
    """A stride along an axis of length 1 places nothing, but whoever multiplies matrices asks."""
    shape, strides, expected = ODD[case]
    flat = library.array(rng.standard_normal(4096).astype(np.float32))
    x = library.lay(flat, Layout(case, shape, strides))
    assert library.strides(x) == strides
    norm = HeadNorm(np.ones(shape[-1], np.float32))
    for _ in range(2):
        y = norm(x)
        assert library.strides(y) == expected
        assert_alike(library.host(y), norm(np.array(library.host(x))))
    q, k = QKNorm(norm, norm)(x, x) if len(shape) > 2 else (y, y)
    assert library.strides(q) == library.strides(k) == expected


@pytest.mark.parametrize("shape", [(3, 1, 64), (2, 1, 3, 64), (2, 3, 1, 64), (1, 3, 1, 64)])
def test_a_dense_array_keeps_its_strides(library, shape, rng):
    whole = library.array(rng.standard_normal(shape).astype(np.float32))
    for x in (whole, whole.swapaxes(0, 1)):
        y = rms_norm(x)
        assert is_dense(y.shape, library.strides(y))
        if library.name == "torch":
            assert library.strides(y) == library.strides(x)


def test_a_producer_without_a_namespace_is_refused():
    class Bare:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    with pytest.raises(
        TypeError, match=r"x is a Bare without a namespace .*numpy.from_dlpack\(x\)"
    ):
        rms_norm(Bare(np.ones((3, 64), np.float32)))


def test_a_producer_from_before_dlpack_1(rng):
    """No max_version argument, no read-only flag."""
    import array_api_strict

    class Old:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, stream=None):
            return self.array.__dlpack__()

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

        def __array_namespace__(self):
            return array_api_strict

    x = rng.standard_normal((3, 64)).astype(np.float32)
    y = rms_norm(Old(x))
    assert type(y) is type(array_api_strict.asarray(0))
    np.testing.assert_array_equal(np.from_dlpack(y), rms_norm(x))


def test_out_of_an_unknown_producer_is_refused():
    x = StrictLibrary().array(np.ones((3, 64), np.float32))
    with pytest.raises(TypeError, match="out is a Array, which may forbid writing; needs a NumPy"):
        rms_norm(x, out=x)


def test_memory_of_other_devices_is_refused():
    raw = dlpack.Tensor(64, (3, 64), (64, 1), (2, 32, 1), (10, 0), False)
    with pytest.raises(TypeError, match="x is in ROCm memory; needs host or CUDA memory"):
        views.view_of(raw, FLOAT32, "x", None, find._DLPACK)
    for kind, name in ((8, "Metal"), (14, "oneAPI"), (99, "DLPack device type 99")):
        with pytest.raises(TypeError, match=f"x is in {name} memory"):
            views.view_of(raw._replace(device=(kind, 0)), FLOAT32, "x", None, find._DLPACK)
    for kind, name in ((13, "cuda"), (3, "cpu")):  # managed and pinned memory
        view = views.view_of(raw._replace(device=(kind, 0)), FLOAT32, "x", None, None)
        assert view.layout.device.kind == name
    with pytest.raises(TypeError, match="x has 192 elements at a null pointer; needs memory"):
        views.view_of(raw._replace(pointer=0, device=(2, 0)), FLOAT32, "x", None, None)


def test_cupy_for_rocm_is_refused(monkeypatch):
    class Array:
        pass

    runtime = SimpleNamespace(is_hip=True)
    cupy = SimpleNamespace(ndarray=Array, cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(TypeError, match="x is a CuPy array of a ROCm build; needs CuPy for CUDA"):
        find.library_of(Array(), "x")


def test_dtypes_that_only_dlpack_names():
    x = StrictLibrary().array(np.ones((3, 64), np.complex64))
    with pytest.raises(TypeError, match=r"x has DLPack dtype \(code 5, 64 bits, 1 lanes\); needs"):
        rms_norm(x)


def test_capsules_of_a_later_dlpack_are_refused():
    capsule = np.ones(3).__dlpack__(max_version=(1, 0))
    address = dlpack._pointer_of(capsule, b"dltensor_versioned")
    dlpack._Versioned.from_address(address).version.major = 2
    with pytest.raises(TypeError, match="DLPack capsule of version 2; needs 1"):
        dlpack.read_capsule(capsule)
    dlpack._Versioned.from_address(address).version.major = 1  # for whoever frees it


def test_libraries_without_a_glance_say_so():
    """None sends a call to `view`; the address of a result is what `view` finds."""
    x = np.ones((3, 64), np.float32)
    library = find.library_of(x, "x")
    assert library.glance(x) is None
    assert library.address(x) == x.ctypes.data


def test_capsules_without_strides_are_compact():
    raw = dlpack.DLTensor()
    shape = (ctypes.c_int64 * 3)(2, 3, 4)
    raw.ndim, raw.shape, raw.data, raw.byte_offset = 3, shape, 64, 8
    tensor = dlpack._read(raw, read_only=False)
    assert tensor.strides == (12, 4, 1)
    assert tensor.pointer == 72


def test_a_consumed_capsule_is_refused():
    capsule = np.ones(3).__dlpack__()
    np.from_dlpack(_Once(capsule))
    with pytest.raises(TypeError, match="used_dltensor.*needs an unconsumed DLPack capsule"):
        dlpack.read_capsule(capsule)


@pytest.mark.parametrize("returned", [None, 3, "dltensor", np.ones(3), object])
def test_what_is_no_capsule_is_refused_by_the_name_of_its_array(returned):
    name = f"__dlpack__ of %s returned a {type(returned).__name__}; needs a DLPack capsule"
    x, weight = _dlpack_only(np, np.ones((2, 3), np.float32)), _dlpack_only(np, np.ones(3))
    for array, role in ((weight, "weight"), (x, "x")):
        array.__class__.__dlpack__ = lambda *_, **options: returned
        with pytest.raises(TypeError, match=name % role):
            rms_norm(x, weight)


@pytest.mark.parametrize("place", [None, 1, (1,), (1, 0, 0), "cpu"])
def test_what_is_no_device_is_refused(place):
    x = _dlpack_only(np, np.ones((2, 3), np.float32))
    x.__class__.__dlpack_device__ = lambda self: place
    with pytest.raises(TypeError, match=r"^__dlpack_device__ of x returned .*; needs a pair, of"):
        rms_norm(x)


def test_a_class_is_no_array():
    with pytest.raises(TypeError, match="x is a type; needs a NumPy, CuPy or torch array"):
        rms_norm(np.ndarray)


class _Once:
    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return (1, 0)


def test_bfloat16_of_an_unknown_host_library_is_refused():
    torch = pytest.importorskip("torch")
    x = _dlpack_only(torch, torch.ones(3, 64, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="x is a bfloat16 Producer on the host, where NumPy"):
        rms_norm(x)


@pytest.mark.parametrize("base", ["numpy", "torch", "DLPack", "DLPack, refused", "nothing known"])
def test_a_class_lives_no_longer_for_a_call(base, rng):
    """Accepted or refused: programs make classes in loops, or reload their modules."""
    values = rng.standard_normal((3, 64)).astype(np.float32)

    def call():
        namespace = {
            "__dlpack__": lambda self, **options: values.__dlpack__(**options),
            "__dlpack_device__": lambda self: (1, 0),
            "__array_namespace__": lambda self: np,
        }
        if base == "numpy":
            x = values.view(type("Array", (np.ndarray,), {}))
        elif base == "torch":
            torch = pytest.importorskip("torch")
            x = torch.from_numpy(values).as_subclass(type("Tensor", (torch.Tensor,), {}))
        else:
            if base != "DLPack":
                del namespace["__array_namespace__"]
            if base == "nothing known":
                del namespace["__dlpack__"]
            x = type("Producer", (), namespace)()
        with contextlib.suppress(TypeError):
            np.testing.assert_array_equal(rms_norm(x), rms_norm(values))
            assert base == "DLPack"
        return weakref.ref(type(x))

    classes = [call() for _ in range(20)]
    gc.collect()
    assert not [one() for one in classes if one() is not None]


def test_libraries_that_another_thread_is_importing(monkeypatch, rng):
    """Calls on another's arrays do not ask them for what they do not have yet."""
    x = _dlpack_only(np, rng.standard_normal((3, 64)).astype(np.float32))
    for name in ("cupy", "torch", "jax"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert rms_norm(x).shape == (3, 64)
    with pytest.raises(TypeError, match="x is a list; needs a NumPy, CuPy or torch array"):
        rms_norm([1.0])


def _dlpack_only(torch, tensor):
    class Producer:
        def __dlpack__(self, **options):
            return tensor.__dlpack__()

        def __dlpack_device__(self):
            return tensor.__dlpack_device__()

        def __array_namespace__(self):
            return torch

    return Producer()


def test_import_error_of_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        cupy_headnorm.GPUUnavailableError,
        match=r"CuPy is not usable .*; needs: pip install -e .*\[cuda1[23]\]",
    ):
        environment.import_cupy()
    assert "pip install" in cupy_headnorm.environment().remedy


def test_pieces_are_copied_one_by_one(monkeypatch):
    """Memory of the device is taken once; that of a piece may be reused when the next is asked."""
    taken, log = [], []

    class Array:
        def __init__(self, shape, dtype, pointer):
            self.memory, self.values = pointer, np.full(shape, 7, dtype)
            assert self.memory[1] == self.values.nbytes

        def __getitem__(self, rows):
            part = object.__new__(type(self))
            part.values = self.values[rows]
            return part

        def set(self, values, stream):
            log.append((self.values, values, stream))  # done when the stream is waited for

    class Stream:
        def synchronize(self):
            for memory, values, stream in log:
                assert stream is self
                memory[...] = values
            log.clear()

    def malloc(size):
        taken.append(size)
        return 4096 * len(taken)

    cuda = SimpleNamespace(
        Device=lambda index: contextlib.nullcontext(),
        runtime=SimpleNamespace(malloc=malloc, free=lambda address: None),
        UnownedMemory=lambda address, size, owner, index: (owner, size),
        MemoryPointer=lambda memory, offset: memory,
    )
    monkeypatch.setattr(
        environment, "import_cupy", lambda: SimpleNamespace(ndarray=Array, cuda=cuda)
    )
    monkeypatch.setattr(cuda_memory, "side_stream", Stream)
    monkeypatch.setattr(find, "view", lambda array, role: array.values)
    entered = []

    @contextlib.contextmanager
    def beside_captures():
        entered.append(True)
        yield
        entered.append(False)

    monkeypatch.setattr(driver, "beside_captures", beside_captures)
    memory = np.empty((2, 3, 4), np.float32)

    def pieces():
        for start in (0, 3, 6):
            assert entered[-1]
            assert not log
            memory[...] = start
            yield start, *memory[:, : 7 - start]

    for found in uploads.upload_pieces((7, 4), np.dtype(np.float32), pieces(), 0):
        assert found.tolist() == [[float(row // 3 * 3)] * 4 for row in range(7)]
    assert taken[:2] == [7 * 4 * 4] * 2
    assert np.array_equal(uploads.upload(np.arange(5.0), 0), np.arange(5.0))
    assert taken[2:] == [40]
    assert not entered[-1]
