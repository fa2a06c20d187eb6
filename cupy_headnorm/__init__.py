"""
Per-attention-head normalization (QK-norm) for CuPy, torch, NumPy and every DLPack array.

`HeadNorm` holds a weight and normalizes; `rms_norm` and `layer_norm` are the same as functions;
`reference` has them in NumPy. `QKNorm` normalizes queries and keys and rotates them by a `Rope`, in
one launch. `head_norms` finds the norms of a Hugging Face model.
"""

from typing import TYPE_CHECKING, Any

from cupy_headnorm._cuda.driver import GPUUnavailableError
from cupy_headnorm._cuda.environment import environment
from cupy_headnorm._cuda.memory import CaptureError
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._version import __version__
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.ops import layer_norm, rms_norm

if TYPE_CHECKING:
    from cupy_headnorm import reference
    from cupy_headnorm.checkpoint import CheckpointError
    from cupy_headnorm.pretrained import head_norms
    from cupy_headnorm.qknorm import QKNorm
    from cupy_headnorm.rope import Rope

__all__ = [
    "CaptureError",
    "CheckpointError",
    "GPUUnavailableError",
    "HeadNorm",
    "LaunchConfig",
    "QKNorm",
    "Rope",
    "__version__",
    "environment",
    "head_norms",
    "layer_norm",
    "reference",
    "rms_norm",
]


_LATER = {
    "CheckpointError": "checkpoint",
    "QKNorm": "qknorm",
    "Rope": "rope",
    "checkpoint": "checkpoint",
    "head_norms": "pretrained",
    "reference": "reference",
}
"""Where they are. What reads files and what is known of models takes milliseconds to import."""


if not TYPE_CHECKING:  # a type checker would take it for a promise of every name

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        module = importlib.import_module(f"{__name__}.{_LATER[name]}")
        found = getattr(module, name, module)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER})
