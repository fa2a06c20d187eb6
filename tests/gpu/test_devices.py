"""Devices that are not current, and producers that are known by DLPack alone, on a GPU."""

import threading
import weakref

import ml_dtypes
import numpy as np
import pytest
import streams
from streams import (
    CUPY,
    DIM,
    OTHER_TOKENS,
    TOKENS,
    TORCH,
    WAYS,
    Call,
    forget,
    normal,
    reserve,
    synchronize,
    zeros,
)
from tolerances import assert_alike

from cupy_headnorm import HeadNorm, reference, rms_norm
from cupy_headnorm._arrays import find
from cupy_headnorm._cuda import launcher

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", exc_type=ImportError)

# The fixtures of streams.py that these tests take.
library = streams.library
spin = streams.spin
path = streams.path
taken = streams.taken
kind = streams.kind
result = streams.result
call = streams.call


class Devices:
    """CUDA's current device as the launches see it: 1, while all arrays are on 0."""

    def __init__(self, monkeypatch):
        self.current = 1
        self.events = []
        self.broken = False
        self._launch = cupy.cuda.driver.launchKernel
        runtime, driver = cupy.cuda.runtime, cupy.cuda.driver
        monkeypatch.setattr(launcher, "_thread", threading.local())
        monkeypatch.setattr(runtime, "getDeviceCount", lambda: 2)
        monkeypatch.setattr(runtime, "getDevice", lambda: self.current)
        monkeypatch.setattr(runtime, "setDevice", self._set)
        monkeypatch.setattr(driver, "launchKernel", self._start)

    def _set(self, index):
        self.events.append(index)
        self.current = index

    def _start(self, *arguments):
        self.events.append("launch")
        if self.broken:
            raise RuntimeError("the launch failed")
        self._launch(*arguments)


def test_the_device_of_the_arrays_is_made_current(library, path, call, taken, monkeypatch, rng):
    """The logic, on one GPU: CuPy and torch themselves do not see what is patched here."""
    call.lead_to("remembered", taken)  # the library is met and the kernel loaded
    devices = Devices(monkeypatch)
    call.lead_to(path, taken)
    values = normal(rng)
    x, out = library.array(values), zeros(library)
    devices.events.clear()
    y = call(x, out)
    assert taken == WAYS[path]
    assert devices.events == [0, "launch", 1]
    synchronize()
    assert_alike(library.host(y), call.expected(values))
    devices.events.clear()
    devices.broken = True
    with pytest.raises(RuntimeError, match="the launch failed"):
        call(x, out)
    assert devices.events == [0, "launch", 1], "the device that was current is so again"
    devices.events.clear()
    devices.broken, devices.current = False, 0
    call(x, out)
    assert devices.events == ["launch"], "nothing is switched where the device is current"


needs_two_gpus = pytest.mark.two_gpus


@pytest.fixture
def second_device():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a second CUDA device")


@needs_two_gpus
@pytest.mark.parametrize("producer", ["torch", "cupy", "another"])
def test_a_device_that_is_not_current(second_device, producer, rng):
    values = normal(rng, (16, 4, DIM))
    norm = HeadNorm(np.ones(DIM, np.float32))
    x = {"torch": TORCH, "cupy": CUPY, "another": CUPY}[producer].to_device_1(values)
    if producer == "another":
        x = Another(x, cupy)
    for _ in range(2):
        y = norm(x)
    host = y.cpu().numpy() if producer == "torch" else y.get()
    assert_alike(host, reference.rms_norm(values))
    assert cupy.cuda.runtime.getDevice() == 0
    norm.unload()
    assert_alike(HeadNorm().forward_reference(values), reference.rms_norm(values))


@needs_two_gpus
def test_a_stream_of_a_device_that_is_not_current(
    second_device, library, path, result, taken, spin, rng
):
    values = normal(rng)
    call = Call(library, "norm", result, rng)
    x, out, source = (library.to_device_1(values) for _ in range(3))
    # What is known on device 0 is not known on device 1.
    call.lead_to("remembered", taken)
    tokens = OTHER_TOKENS if path == "other length" else TOKENS
    call(x[:tokens], out[:tokens])
    assert taken == ["step by step"]
    if path == "first":
        forget()
    with library.stream_of_device_1() as stream:
        with cupy.cuda.Device(1), torch.cuda.device(1):  # which leave the streams as they are
            library.write(x, source - source)
            reserve(library, x)
            spin(0, cycles=1)
            synchronize()
            spin(library.handle(stream))
            library.write(x, source)
        assert cupy.cuda.runtime.getDevice() == 0
        taken.clear()
        y = call(x, out)
        assert taken == WAYS[path]
        assert cupy.cuda.runtime.getDevice() == 0
        stream.synchronize()
    assert_alike(library.host(y), call.expected(values))


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


def test_another_dlpack_producer_on_the_gpu(rng):
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
            in_flight = len(find._DLPACK._in_flight)
            assert in_flight <= 1, "capsules are let go once their kernel has run"
    assert HeadNorm().forward_reference(Another(x, cupy)).shape == x.shape


def test_weights_of_another_producer_are_kept_too(spin, rng):
    """A producer that exports a temporary: nothing but its capsule keeps the memory."""

    class Temporary(Another):
        def __dlpack__(self, **options):
            copy = self.array.copy()
            self.exported = weakref.ref(copy)
            return copy.__dlpack__(**options)

    values = cupy.asarray(normal(rng))
    x, weight = Temporary(values, cupy), Temporary(values[0, 0], cupy)
    rms_norm(x, weight)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        spin(stream.ptr)
        rms_norm(x, weight)
        assert not stream.done
        assert x.exported() is not None
        assert weight.exported() is not None
        stream.synchronize()


def test_another_producers_work_is_queued_on_cupys_stream(spin, rng):
    values = normal(rng)
    source, x = cupy.asarray(values), zeros(CUPY)
    norm = HeadNorm(np.ones(DIM, np.float32))
    norm(Another(x, cupy))
    stream = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream()), stream:
        reserve(CUPY, x)
        synchronize()
        spin(stream.ptr)
        x[...] = source
        y = norm(Another(x, cupy))
        assert not stream.done
        stream.synchronize()
        assert_alike(y.get(), reference.rms_norm(values))
