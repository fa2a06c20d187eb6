"""
Read what others wrote: folders of models, their configs and tensors, and the head norms in them.

Whatever a folder holds, reading it runs none of it, takes time and memory in proportion to its
files, and ends with an answer or with one `CheckpointError`.
"""

from cupy_headnorm.checkpoint.files import CheckpointError
from cupy_headnorm.checkpoint.tensors import read_norm

__all__ = ["CheckpointError", "read_norm"]
