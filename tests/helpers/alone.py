"""
A pytest plugin: of several workers, one that runs a test marked ``alone`` is the only one at work.

Each test holds a lock that workers share, and such a test holds it by itself. Between tests a
worker does nothing, and its process ends with the run: what it holds of a device stays as it is.
tests/conftest.py loads this file.
"""

import contextlib
import fcntl
import tempfile
from pathlib import Path

import pytest

FOLDER = pytest.StashKey[tempfile.TemporaryDirectory]()


@contextlib.contextmanager
def turn(folder, alone):
    """Work beside others, or alone."""
    with open(Path(folder, "gate"), "a") as gate, open(Path(folder, "work"), "a") as work:
        try:
            # Who waits to be alone keeps the gate shut: else tests that overlap would go first
            # without end.
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(work, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            if not alone:
                fcntl.flock(gate, fcntl.LOCK_UN)
            yield
        finally:
            # A forked child may have the files open for longer, so closing them is not enough.
            fcntl.flock(work, fcntl.LOCK_UN)
            fcntl.flock(gate, fcntl.LOCK_UN)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell xdist's workers the folder: one a run, since a test may run pytest itself."""
    if FOLDER not in node.config.stash:
        node.config.stash[FOLDER] = tempfile.TemporaryDirectory()
    node.workerinput["alone"] = node.config.stash[FOLDER].name


def pytest_unconfigure(config):
    if FOLDER in config.stash:
        config.stash[FOLDER].cleanup()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Take a turn around the whole test, with the fixtures of its module."""
    folder = getattr(item.config, "workerinput", {}).get("alone")
    if folder is None:  # no worker
        return (yield)
    # What is skipped need not wait for others, nor they for it.
    alone = item.get_closest_marker("alone") and not item.get_closest_marker("skip")
    with turn(folder, alone):
        return (yield)
