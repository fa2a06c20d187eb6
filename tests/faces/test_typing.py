"""Type checkers: the package passes mypy --strict, and a user's mistakes do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = """
from typing import Any, assert_type

import numpy as np

import cupy_headnorm
from cupy_headnorm import HeadNorm, QKNorm, Rope, head_norms, reference, rms_norm

Float32 = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]


class Tensor:
    shape = (1, 2, 8)
    dtype = "bfloat16"


def right(x: Float32, tensor: Tensor, anything: Any) -> None:
    assert_type(rms_norm(x), Float32)
    assert_type(rms_norm(tensor, x, eps=1e-6, out=tensor), Tensor)
    assert_type(cupy_headnorm.layer_norm(anything), Any)
    norm = HeadNorm(np.ones(8), kind="rms", rounding="before_weight")
    assert_type(norm(x), Float32)
    assert_type(norm(tensor, out=tensor), Tensor)
    assert_type(norm.heads(0, 1).num_heads, int | None)
    HeadNorm(kind=norm.kind, rounding=norm.rounding)
    qk = QKNorm(norm, norm)
    assert_type(qk(x, x, positions=x), tuple[Float32, Float32])
    assert_type(qk(tensor, tensor, tensor), tuple[Tensor, Tensor, Tensor])
    rope: Rope | None = qk.rope
    held: HeadNorm = head_norms("folder")[0, "q"]
    result: np.ndarray = reference.rms_norm(x)


def wrong(x: Float32, tensor: Tensor) -> None:
    rms_norm([1.0, 2.0])  # type: ignore[type-var]
    rms_norm(x, eps="1e-6")  # type: ignore[arg-type]
    rms_norm(x, rounding="twice")  # type: ignore[arg-type]
    rms_norm(x, epsilon=1e-6)  # type: ignore[call-arg]
    rms_norm(x=x)  # type: ignore[call-arg]
    HeadNorm(kind="batch")  # type: ignore[arg-type]
    cupy_headnorm.rms_nrom(x)  # type: ignore[attr-defined]
    tensor = rms_norm(x)  # type: ignore[assignment]
"""
"""Every `ignore` is needed, or --strict complains."""

pytestmark = pytest.mark.slow  # 15 s and 3 s where nothing is cached


def mypy(*words: str, cwd: Path, **environment: str) -> str:
    """Return what mypy complains of."""
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_the_package_is_strictly_typed():
    pytest.importorskip("torch")
    assert mypy("cupy_headnorm", cwd=ROOT) == ""


def test_a_users_mistakes_are_found(tmp_path):
    """The checkout is found as an installed package would be: through its ``py.typed``."""
    (tmp_path / "user.py").write_text(USER)
    assert mypy("user.py", cwd=tmp_path, PYTHONPATH=str(ROOT)) == ""
