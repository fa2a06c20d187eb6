"""Processes that run a text: where a whole process is tested, its exit included."""

import os
import subprocess
import sys
from pathlib import Path

import cupy_headnorm


def environment(**added):
    """Return this process's, with our package on the path."""
    roots = (str(Path(cupy_headnorm.__file__).parent.parent), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), **added}


def assert_well_ended(code, said):
    assert code == 0, said
    for word in ("Traceback", "Exception ignored", "terminate called"):
        assert word not in said, said


def run(code, *, may_complain=False, **added):
    """Run a text in a process that must end well, and return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**added),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_well_ended(done.returncode, "" if may_complain and not done.returncode else done.stderr)
    return done.stdout.splitlines()
