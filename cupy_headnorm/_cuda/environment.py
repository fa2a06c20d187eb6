"""CuPy as it is found, what the machine offers, and errors that name the cure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cupy_headnorm._cuda import driver as cuda_driver


def import_cupy() -> Any:
    """Return the cupy module; GPUUnavailableError, with the command that mends it, without one."""
    try:
        import cupy
    except ImportError as error:
        raise cuda_driver.GPUUnavailableError(
            f"CuPy is not usable ({error}); needs: {cuda_driver.install_command()}"
        ) from error
    except Exception as error:
        # Since 14.1 the import makes the kernel cache folder, with an OSError where it cannot.
        raise cuda_driver.GPUUnavailableError(
            f"importing CuPy failed ({type(error).__name__}: {error}); needs a writeable cache "
            "folder: set CUPY_CACHE_DIR to one"
        ) from error
    if _restores:
        _check_fork(cupy)
    return cupy


class Environment(NamedTuple):
    """What the machine offers; `reason` is empty where the GPU can be used."""

    reason: str
    remedy: str
    cupy: str
    nvrtc: str
    driver: str
    devices: tuple[str, ...]
    cache: str


def environment() -> Environment:
    """Look at driver, CuPy, devices, NVRTC and cache folder. Never raises."""
    version = cuda_driver.cuda_version()
    driver = "" if version is None else f"CUDA {version // 1000}.{version % 1000 // 10}"
    found = Environment("", "", "", "", driver, (), "")
    try:
        cupy = import_cupy()
    except cuda_driver.GPUUnavailableError as error:
        reason, _, remedy = str(error).rpartition("; needs")
        return found._replace(reason=reason, remedy=remedy.lstrip(": "))
    found = found._replace(cupy=cupy.__version__, cache=_cache_folder())
    try:
        found = found._replace(nvrtc="{}.{}".format(*cupy.cuda.nvrtc.getVersion()))
    except Exception as error:
        return found._replace(
            reason=f"NVRTC does not load ({error})", remedy=cuda_driver.install_command()
        )
    try:
        runtime = cupy.cuda.runtime
        names = []
        for index in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(index)
            names.append(
                f"{properties['name'].decode()}, sm_{properties['major']}{properties['minor']}, "
                f"{properties['totalGlobalMem'] / 2**30:.0f} GiB"
            )
    except Exception as error:
        return found._replace(
            reason=f"no CUDA device ({error})",
            remedy="an NVIDIA GPU and a driver that `nvidia-smi` can talk to",
        )
    return found._replace(devices=tuple(names))


def _cache_folder() -> str:
    default = os.path.join(os.path.expanduser("~"), ".cupy", "kernel_cache")
    return os.environ.get("CUPY_CACHE_DIR", default)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what CuPy says about a missing piece into our error, with the command that mends it."""
    try:
        yield
    except (TypeError, ValueError):
        raise
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        raise cuda_driver.GPUUnavailableError(explanation) from error


def _explanation(error: Exception) -> str | None:
    found = environment()
    if found.reason:
        return f"{found.reason}; needs: {found.remedy}"
    text = str(error)
    if "cannot open source file" in text or "could not open source file" in text:
        found_line, needed = text.splitlines()[0], cuda_driver.install_command()
        return f"CUDA headers not found ({found_line}); needs: {needed}"
    if isinstance(error, OSError):
        return (
            f"the kernel cache {found.cache or 'of CuPy'} cannot be written ({error}); "
            "needs: CUPY_CACHE_DIR set to a writeable folder"
        )
    return None


_forgets: list[Callable[[], Callable[[], None]]] = []
_restores: list[Callable[[], None]] = []
"""In the child of a fork, until CUDA is seen to work there."""


def on_fork(forget: Callable[[], Callable[[], None]]) -> None:
    """Run `forget` in the child of a fork, and what it returns once CUDA is seen to work there."""
    _forgets.append(forget)


def _forked() -> None:
    _restores.extend([forget() for forget in _forgets])


os.register_at_fork(after_in_child=_forked)


def _check_fork(cupy: Any) -> None:
    """Raise GPUUnavailableError in the child of a process that had used CUDA."""
    try:
        cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.runtime.getDevice()
    except Exception as error:
        if "InitializationError" not in str(error):
            return  # nothing that a fork does: whoever needs the device explains it
        raise cuda_driver.GPUUnavailableError(
            f"CUDA was used before this process was forked, and does not work in it ({error}); "
            "needs: multiprocessing's start method spawn or forkserver"
        ) from error
    while _restores:
        _restores.pop(0)()
