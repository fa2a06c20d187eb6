"""The command info: what works here, and what to install."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from cupy_headnorm import bench
from cupy_headnorm._commands import demo
from cupy_headnorm._cuda import environment
from cupy_headnorm._version import __version__


def run(_: argparse.Namespace) -> None:
    found = environment.environment()
    rows: list[tuple[str, Any]] = [
        ("cupy-headnorm", f"{__version__} in {Path(__file__).resolve().parent.parent}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    for package in ("numpy", "ml_dtypes", "safetensors", "torch", "transformers", "jax"):
        rows.append((package, bench.version(package) or "not installed"))
    rows += [
        ("CuPy", found.cupy or "not usable"),
        ("NVRTC", found.nvrtc or "not usable"),
        ("driver", found.driver or "no NVIDIA driver answers"),
        ("kernel cache", found.cache or "unknown without CuPy"),
    ]
    rows += [(f"cuda:{i}", name) for i, name in enumerate(found.devices)] or [("devices", "none")]
    rows += [("NumPy arrays", "work"), ("torch and JAX on the CPU", "work")]
    if found.reason:
        rows += [("CUDA arrays", f"do not work: {found.reason}"), ("needs", found.remedy)]
    else:
        rows.append(("CUDA arrays", "work: CuPy, torch, JAX and other DLPack arrays"))
    demo.print_rows(rows)
