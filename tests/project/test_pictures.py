"""The documentation's pictures are what their scripts draw."""

import runpy
from pathlib import Path

import pytest

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
SCRIPTS = sorted(PICTURES.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_pictures_are_what_their_scripts_draw(script, tmp_path):
    runpy.run_path(str(script))["main"](tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert drawn
    for file in drawn:
        assert (PICTURES / file.name).read_text() == file.read_text(), f"run {script.name} again"


def test_every_picture_has_a_script(tmp_path):
    for script in SCRIPTS:
        runpy.run_path(str(script))["main"](tmp_path)
    stored = {file.name for file in PICTURES.glob("*.svg")}
    assert stored == {file.name for file in tmp_path.iterdir()}
