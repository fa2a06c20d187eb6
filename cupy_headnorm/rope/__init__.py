"""Rotary embeddings: `Rope` describes one, `apply` rotates heads by it in NumPy."""

from cupy_headnorm.rope.embedding import Rope
from cupy_headnorm.rope.numpy import apply

__all__ = ["Rope", "apply"]
