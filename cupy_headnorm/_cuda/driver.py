"""
The NVIDIA driver as seen without CuPy, and what to install for it.

Runs as a script too (``python cupy_headnorm/_cuda/driver.py``): prints the CuPy extra for this
machine, ``cuda12`` or ``cuda13``, or nothing where no driver answers. Only the standard library is
used, since the Makefile asks before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path


class GPUUnavailableError(RuntimeError):
    """A call needs the GPU and something it rests on is missing; the message says the remedy."""

    __module__ = "cupy_headnorm"


def _libcuda() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError):
        return ctypes.CDLL("libcuda.so.1")
    return None


def cuda_version() -> int | None:
    """Return the newest CUDA version the driver supports, 13000 for 13.0; None without a driver."""
    libcuda, version = _libcuda(), ctypes.c_int()
    if libcuda is None or libcuda.cuInit(0) or libcuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """
    Let this thread allocate and load while another one captures a graph.

    torch.cuda.graph captures in CUDA's global mode: cudaMalloc in any thread then is an error, and
    ends the capture. A thread in relaxed mode is let be.
    """
    libcuda, mode = _libcuda(), ctypes.c_int(_RELAXED)
    # It gives back what was before. Until CUDA has begun it is an error, and nobody captures.
    if libcuda is None or libcuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)):
        yield
        return
    try:
        yield
    finally:
        libcuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED in CUDA's cuda.h."""


def extra() -> str:
    """Return the extra with the CuPy of the driver's CUDA major: cuda13 from 13.0, else cuda12."""
    version = cuda_version()
    return "cuda12" if version is not None and version < 13000 else "cuda13"


def install_command(wanted: str | None = None) -> str:
    """Return the pip command for an extra; by default that of CuPy, NVRTC and the CUDA headers."""
    wanted = wanted or extra()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.cfg").is_file():
        return f"pip install -e '{checkout}[{wanted}]'"
    return f"pip install 'cupy-headnorm[{wanted}]'"


if __name__ == "__main__" and cuda_version() is not None:
    print(extra())
