"""Tables in plain text: of any width, without any library, and with nothing broken."""

import subprocess
import sys
from pathlib import Path

import pytest

from cupy_headnorm.bench import text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks/results/h100-80gb-hbm3.json"
COLUMNS = ("layers", "norm", "min", "why")
ROWS = [
    ("0-17", "model.layers.*.self_attn.q_norm", "-0.81", "nothing is known of such a norm"),
    ("3", "model.layers.*.self_attn.k_norm", "1.2", "its weight is packed"),
]
WORDS = {word for row in (COLUMNS, *ROWS) for cell in row for word in cell.split()}


@pytest.fixture(params=[20, 40, 60, 80, 200])
def width(request, monkeypatch):
    monkeypatch.setattr(text, "width", lambda: request.param)
    return request.param


def test_no_word_is_broken(width):
    lines = text.table(COLUMNS, ROWS, right=("min",))
    assert {word for line in lines for word in line.split()} == WORDS
    longest = max(map(len, WORDS))
    assert max(map(len, lines)) <= max(width, longest + len("layers  "))


def test_columns_are_aligned(width):
    lines = text.table(COLUMNS, ROWS, right=("min",))
    if width < 80:
        assert lines[:2] == ["layers  0-17", "norm    model.layers.*.self_attn.q_norm"]
        return
    at = lines[0].index("why")
    assert lines[1][at:].startswith("nothing is known")
    assert lines[0][:at].rstrip().endswith("  min")
    assert lines[1][:at].rstrip().endswith("-0.81")


def test_what_would_steer_a_terminal_is_written_out(width):
    (_, line, *_) = text.table(("name",), [("a\x1b[2Jb",)])
    assert line == "a\\x1b[2Jb"


@pytest.mark.parametrize("columns", [80, 200])
def test_verdicts_come_first_and_all_timings_if_asked_for(columns):
    """Neither rich nor matplotlib is needed for it."""
    code = (
        "import sys; sys.modules.update(rich=None, matplotlib=None)\n"
        "sys.stdout.isatty = lambda: True\n"
        "from cupy_headnorm import cli; sys.exit(cli.main(sys.argv[1:]))"
    )

    def printed(*more):
        command = [sys.executable, "-c", code, "bench", "--from", str(RESULTS), *more]
        environment = {"COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return done.stdout.splitlines()

    few, every = printed(), printed("--all")
    start = next(i for i, line in enumerate(few) if line.startswith("Numbers to reach"))
    assert start < 8
    assert few[-1].endswith(" device times: --all prints them")
    assert every[: len(few) - 2] == few[:-2]
    assert len(every) > len(few) + 300
    assert all(len(line) <= columns for line in few)
    assert all(len(line) <= 80 for line in every[len(few) :])
