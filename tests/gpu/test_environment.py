"""What is said where a piece is missing: driver, CuPy, NVRTC, headers, cache folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cupy_headnorm import GPUUnavailableError
from cupy_headnorm._cuda import driver as cuda_driver
from cupy_headnorm._cuda import environment as cuda_environment

DRIVER = Path(cuda_driver.__file__)
ROOT = DRIVER.resolve().parents[2]
EMPTY = cuda_environment.Environment("", "", "14.2.0", "13.0", "CUDA 13.0", ("a GPU",), "/cache")


@pytest.mark.parametrize(
    ("version", "extra"),
    [(None, "cuda13"), (12020, "cuda12"), (12090, "cuda12"), (13000, "cuda13")],
)
def test_the_extra_is_that_of_the_drivers_cuda(version, extra, monkeypatch):
    monkeypatch.setattr(cuda_driver, "cuda_version", lambda: version)
    assert cuda_driver.extra() == extra
    # From a checkout pip installs the checkout, from elsewhere the release.
    assert cuda_driver.install_command() == f"pip install -e '{ROOT}[{extra}]'"
    monkeypatch.setattr(cuda_driver, "__file__", "/usr/lib/python3/cupy_headnorm/_cuda/driver.py")
    assert cuda_driver.install_command() == f"pip install 'cupy-headnorm[{extra}]'"


class Driver:
    """libcuda, with a number of its own."""

    def __init__(self, version, failure=0):
        self.version, self.failure = version, failure

    def cuInit(self, flags):
        return self.failure

    def cuDriverGetVersion(self, to):
        to._obj.value = self.version
        return 0

    mode = 0
    """Of captures: global."""

    def cuThreadExchangeStreamCaptureMode(self, to):
        if not self.failure:
            self.mode, to._obj.value = to._obj.value, self.mode
        self.failure, failure = 0, self.failure
        return failure


@pytest.mark.parametrize(
    ("driver", "version"), [(Driver(12080), 12080), (Driver(13000), 13000), (Driver(0, 100), None)]
)
def test_the_drivers_cuda_is_asked_of_libcuda(driver, version, monkeypatch):
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    assert cuda_driver.cuda_version() == version


def test_a_thread_keeps_its_mode_of_captures_where_cuda_begins(monkeypatch):
    driver = Driver(13000, failure=3)  # CUDA_ERROR_NOT_INITIALIZED
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    with cuda_driver.beside_captures():
        assert not driver.failure, "it was asked"
    assert driver.mode == 0


def test_captures_of_other_threads_are_let_be(monkeypatch):
    driver = Driver(13000)
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    seen = []

    def allocate():
        with cuda_driver.beside_captures():
            seen.append(driver.mode)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate()
    assert seen == [2], "CU_STREAM_CAPTURE_MODE_RELAXED"
    assert driver.mode == 0


def test_the_makefile_asks_without_anything_installed():
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(DRIVER)], capture_output=True, text=True, check=True
    )
    expected = "" if cuda_driver.cuda_version() is None else cuda_driver.extra() + "\n"
    assert done.stdout == expected


def explained(error):
    with pytest.raises((type(error), GPUUnavailableError)) as caught, cuda_environment.explained():
        raise error
    return caught.value


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def test_no_nvrtc(cupy, monkeypatch):
    def missing():
        raise RuntimeError("CuPy failed to load libnvrtc.so.13")

    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", missing)
    found = cuda_environment.environment()
    assert found.reason == "NVRTC does not load (CuPy failed to load libnvrtc.so.13)"
    error = explained(RuntimeError("whatever CuPy says"))
    assert isinstance(error, GPUUnavailableError)
    assert "NVRTC does not load" in str(error)
    assert "pip install -e " in str(error)


def test_devices_are_told_by_name_and_memory(cupy, monkeypatch):
    properties = {"name": b"a GPU", "major": 9, "minor": 0, "totalGlobalMem": 80 * 2**30}
    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", lambda: (13, 0))
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda index: properties)
    found = cuda_environment.environment()
    assert (found.reason, found.nvrtc) == ("", "13.0")
    assert found.devices == ("a GPU, sm_90, 80 GiB",) * 2


def test_no_headers(monkeypatch):
    monkeypatch.setattr(cuda_environment, "environment", lambda: EMPTY)
    text = 'scalar.cuh(5): catastrophic error: cannot open source file "cuda_bf16.h"\n  more'
    error = explained(RuntimeError(text))
    assert isinstance(error, GPUUnavailableError)
    assert "CUDA headers not found (scalar.cuh(5): catastrophic error: cannot open" in str(error)
    assert "pip install -e " in str(error)


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(cuda_environment, "environment", lambda: EMPTY)
    error = explained(PermissionError(13, "Permission denied", "/cache/x"))
    assert isinstance(error, GPUUnavailableError)
    assert "the kernel cache /cache cannot be written" in str(error)
    assert "CUPY_CACHE_DIR set to a writeable folder" in str(error)


def test_other_errors_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(cuda_environment, "environment", lambda: EMPTY)
    error = RuntimeError("a bug in a kernel")
    assert explained(error) is error


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_cache_folder_that_cannot_be_made(cupy, tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        "from cupy_headnorm import GPUUnavailableError\n"
        "from cupy_headnorm._cuda import environment\n"
        "try: environment.import_cupy()\n"
        "except GPUUnavailableError as error: print(error)"
    )
    done = run(code, CUPY_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert "importing CuPy failed" in done.stdout
    assert "set CUPY_CACHE_DIR to one" in done.stdout


@pytest.mark.gpu
def test_a_cuda_tensor_without_cupy_says_what_to_install():
    code = (
        "import sys, torch; sys.modules['cupy'] = None\n"
        "import cupy_headnorm\n"
        "try: cupy_headnorm.rms_norm(torch.ones(3, 64, device='cuda'))\n"
        "except cupy_headnorm.GPUUnavailableError as error: print(error)"
    )
    done = run(code)
    assert "CuPy is not usable" in done.stdout, done.stderr
    assert "pip install -e " in done.stdout


def test_environment_never_raises(monkeypatch):
    def broken():
        raise GPUUnavailableError("CuPy is not usable (why); needs: pip install it")

    monkeypatch.setattr(cuda_environment, "import_cupy", broken)
    found = cuda_environment.environment()
    assert (found.reason, found.remedy) == ("CuPy is not usable (why)", "pip install it")
