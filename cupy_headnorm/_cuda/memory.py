"""Memory of a CUDA device and its streams: side streams, capture, what frees."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from cupy_headnorm._cuda import driver, environment


class Owner:
    """Owns memory: `free` runs when the last reference is gone."""


def free(address: int) -> None:
    # CuPy's own memory would end the capture of another thread, and a collector may run this in any
    # thread. In the child of a fork there is nothing to free.
    with contextlib.suppress(Exception), driver.beside_captures():
        environment.import_cupy().cuda.runtime.free(address)


def side_stream() -> Any:
    """
    Return a new stream of the current device that waits for no other, nor any for it.

    The default stream would do for work of our own, but for another thread that captures a graph:
    work on the default stream breaks the capture of every blocking stream.
    """
    return environment.import_cupy().cuda.Stream(non_blocking=True)


def synchronize(index: int) -> None:
    """Wait for all work on CUDA device `index`."""
    environment.import_cupy().cuda.Device(index).synchronize()


def is_capturing(stream: int) -> bool:
    """Tell whether `stream` is being captured into a CUDA graph."""
    # The legacy default stream cannot be; asking about it while another is captured is an error.
    # Whoever has another one has imported CuPy.
    return stream != 0 and bool(sys.modules["cupy"].cuda.runtime.streamIsCapturing(stream))


class CaptureError(RuntimeError):
    """A call would compile, load or allocate while its stream is captured into a CUDA graph."""

    __module__ = "cupy_headnorm"


def refuse_capture(
    stream: int,
    what: str,
    needed: str = "a call of warmup(x) before, with an array of the same layout",
) -> None:
    """Raise CaptureError where `stream` is being captured."""
    if is_capturing(stream):
        raise CaptureError(f"{what} while the stream is captured into a graph; needs {needed}")


def refuse_allocation(stream: int) -> None:
    """Raise CaptureError where a new result would come from a pool that knows nothing of graphs."""
    refuse_capture(stream, "a result without out would be allocated", "out")
