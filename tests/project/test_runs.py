"""How a run of the tests goes beside plugins that happen to be there, and in several processes."""

import contextlib
import fcntl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import processes
import pytest
from alone import turn

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "setup.cfg"


def run(folder, *options):
    """Run the tests of a folder with this project's settings, and plugins of there or here."""
    paths = [str(folder), str(ROOT / "tests"), processes.environment()["PYTHONPATH"]]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(SETTINGS), "-p", "no:cacheprovider", *options],
        cwd=folder,
        env=processes.environment(PYTHONPATH=":".join(paths)),
        capture_output=True,
        text=True,
        timeout=120,
    )


NOISY = """
import warnings

def pytest_configure():
    warnings.warn("said by a plugin while it is configured")
"""
TESTS = """
import warnings

def test_nothing():
    pass

def test_warns():
    warnings.warn("said by a test")
"""


def test_a_plugin_may_warn_while_it_is_configured_and_a_test_may_not(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "test_it.py").write_text(TESTS)
    done = run(tmp_path, ".", "-p", "noisy", "-p", "conftest")
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "UserWarning: said by a test" in done.stdout
    assert "said by a plugin" in done.stderr


LATE = """
import warnings
import pytest
from _pytest.config import apply_warning_filters

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    with warnings.catch_warnings():
        apply_warning_filters(config.getini("filterwarnings"), [])
        warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.")
"""


def test_pytest_benchmark_may_say_that_it_is_off(tmp_path):
    """Before pytest 9.2 the settings' filters hold where its plugin says so, up to 5.2 at least."""
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "test_it.py").write_text("def test_nothing():\n    pass\n")
    done = run(tmp_path, ".", "-p", "late", "-p", "conftest")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


SAY = """
import os

def say(word):
    file = os.open("said", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(file, (word + "\\n").encode())
    os.close(file)
"""
MANY = """
import time
import pytest
from say import say

@pytest.fixture(scope="module", autouse=True)
def of_a_module():
    say("begin")
    yield
    say("end")

@pytest.mark.parametrize("number", range(30))
def test_one_of_many(number):
    say("begin")
    time.sleep(0.1)
    say("end")
"""
ALONE = """
import time
import pytest
from say import say

@pytest.mark.alone
def test_alone():
    say("alone")
    time.sleep(2)
    say("was alone")
"""


def test_a_test_that_is_alone_runs_while_others_wait(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "say.py").write_text(SAY)
    (tmp_path / "test_1.py").write_text(MANY)
    (tmp_path / "test_2.py").write_text(ALONE)
    done = run(tmp_path, ".", "-p", "alone", "-n", "3")
    assert "31 passed" in done.stdout, done.stdout + done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    at = said.index("alone")
    assert said[at + 1] == "was alone"


def test_who_waits_to_be_alone_goes_before_those_that_come_later(tmp_path):
    order = []

    def work(name, alone):
        with turn(tmp_path, alone):
            order.append(name)

    with ThreadPoolExecutor(2) as pool, open(tmp_path / "gate", "a") as gate:
        with turn(tmp_path, alone=False):
            waiting = pool.submit(work, "alone", True)
            until = time.monotonic() + 30
            with contextlib.suppress(BlockingIOError):
                while time.monotonic() < until:  # until it has shut the gate
                    fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    fcntl.flock(gate, fcntl.LOCK_UN)
                    time.sleep(0.01)
            assert time.monotonic() < until
            later = pool.submit(work, "later", False)
            assert not wait([waiting, later], timeout=0.5).done
        waiting.result(30)
        later.result(30)
    assert order == ["alone", "later"]


CONFTEST = """
from say import say

def pytest_runtest_logreport(report):
    if report.skipped:
        say("skipped")
"""
SKIPPED = """
import os
import time
import pytest

def test_while_that_is_skipped():
    began = time.monotonic()
    while not os.path.exists("said"):
        assert time.monotonic() < began + 30
        time.sleep(0.1)

@pytest.mark.alone
@pytest.mark.skip(reason="no device")
def test_skipped():
    raise AssertionError
"""


def test_a_skipped_test_is_not_waited_for(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "say.py").write_text(SAY)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(SKIPPED)
    done = run(tmp_path, ".", "-p", "alone", "-n", "2")
    assert "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
