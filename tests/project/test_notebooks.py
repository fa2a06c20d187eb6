"""Every notebook runs from top to bottom, without a GPU too, and is kept without outputs."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
RESULTS = sorted((Path(__file__).resolve().parents[2] / "notebooks/results").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("MPLBACKEND", "agg")
    # The kernel is this Python with this package, installed or not.
    monkeypatch.setenv("PYTHONPATH", str(path.parent.parent), prepend=":")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(path.parent))
    texts = [
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]
    assert not any("Error" in text for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_kept_without_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_there_are_notebooks():
    stems = [path.stem for path in NOTEBOOKS]
    assert stems == [
        "1-first-norm",
        "2-torch-and-checkpoints",
        "3-inside-the-kernel",
        "4-measuring",
        "5-qk-and-rope",
    ]


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_results_say_what_made_them(path):
    results = json.loads(path.read_text())
    assert results["device"].startswith("NVIDIA ")
    assert results["timer"] in ("torch", "cupy")
    assert datetime.fromisoformat(results["date"]).tzinfo is not None
    assert results["versions"]["cupy_headnorm"]
    # A command that everyone can give: no folder of whoever measured.
    assert not set(results["command"].split()) & {"cd", "&&", ";"}
    assert not any(word.startswith(("/", "~")) for word in re.split("[ =]", results["command"]))
