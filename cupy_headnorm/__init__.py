"""
Per-attention-head normalization (QK-norm) for CuPy, torch, NumPy and every DLPack array.

`HeadNorm` holds a weight and normalizes; `rms_norm` and `layer_norm` are the same as functions;
`reference` has them in NumPy. `head_norms` finds those of a Hugging Face model.
"""

from typing import TYPE_CHECKING, Any

from cupy_headnorm import reference
from cupy_headnorm._driver import GPUUnavailableError
from cupy_headnorm._kernels import CaptureError, environment
from cupy_headnorm._launch import LaunchConfig
from cupy_headnorm._version import __version__
from cupy_headnorm.checkpoint import CheckpointError
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.ops import layer_norm, rms_norm

if TYPE_CHECKING:
    from cupy_headnorm.pretrained import head_norms

__all__ = [
    "CaptureError",
    "CheckpointError",
    "GPUUnavailableError",
    "HeadNorm",
    "LaunchConfig",
    "__version__",
    "environment",
    "head_norms",
    "layer_norm",
    "reference",
    "rms_norm",
]


def __getattr__(name: str) -> Any:
    # What is known of models takes some milliseconds to import: only checkpoints need it.
    if name == "head_norms":
        from cupy_headnorm.pretrained import head_norms

        return head_norms
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
