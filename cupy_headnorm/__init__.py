"""
Per-attention-head normalization (QK-norm) for CuPy, torch, NumPy and every DLPack array.

`HeadNorm` holds a weight and normalizes; `rms_norm` and `layer_norm` are the same as functions;
`reference` has them in NumPy.
"""

from cupy_headnorm import reference
from cupy_headnorm._driver import GPUUnavailableError
from cupy_headnorm._kernels import CaptureError, environment
from cupy_headnorm._launch import LaunchConfig
from cupy_headnorm._version import __version__
from cupy_headnorm.checkpoint import CheckpointError
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.ops import layer_norm, rms_norm

__all__ = [
    "CaptureError",
    "CheckpointError",
    "GPUUnavailableError",
    "HeadNorm",
    "LaunchConfig",
    "__version__",
    "environment",
    "layer_norm",
    "reference",
    "rms_norm",
]
