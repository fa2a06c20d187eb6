"""Measure: our norms, their peers and a copy of the same bytes, on this machine."""

from cupy_headnorm.bench.arguments import add_arguments, count
from cupy_headnorm.bench.command import measure, run, version

__all__ = ["add_arguments", "count", "measure", "run", "version"]
