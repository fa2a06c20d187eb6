"""What the documentation shows below a block or a command is what that prints."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"```(python|sh)\n([^`]*)```\n\n(?:It prints:\n\n)?```text\n([^`]*)```")
"""A block, and what stands directly below it."""
ON_A_MACHINE_OF_ITS_OWN = ("inspect", "info", "bench")
"""Commands whose output depends on a folder or on the machine."""


def shown():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for language, block, text in SHOWN.findall(page.read_text()):
            command = [sys.executable, "-c", block]
            if language == "sh":
                command = [sys.executable, *shlex.split(block)[1:]]
                if command[3] in ON_A_MACHINE_OF_ITS_OWN:
                    continue
            yield pytest.param(command, text, id=f"{page.stem}: {text.split()[0]}")


CASES = list(shown())


@pytest.mark.parametrize(("command", "text"), CASES)
def test_what_is_shown_is_printed(command, text):
    if "import torch" in command[-1]:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == text.splitlines()


def test_pages_show_what_blocks_and_commands_print():
    assert len(CASES) >= 4
