"""What the documents show is run: docstrings, the README's blocks, and its commands."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_headnorm
from cupy_headnorm import cli, models
from cupy_headnorm.bench import costs, record, report

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


WITH_EXAMPLES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in sorted((ROOT / "cupy_headnorm").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_doctests(name):
    if ".integrations." in name:
        pytest.importorskip("transformers")
        pytest.importorskip("torch")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0


def test_what_is_called_most_has_examples():
    assert {f"cupy_headnorm.{name}" for name in ("ops", "headnorm", "qknorm")} <= {*WITH_EXAMPLES}


BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {
    f"{path.relative_to(ROOT / 'docs').with_suffix('')} {number}": block
    for path in sorted((ROOT / "docs").rglob("*.md"))
    for number, block in enumerate(BLOCK.findall(path.read_text()))
}  # fmt: skip


@pytest.mark.parametrize("block", PAGES.values(), ids=PAGES)
def test_blocks_of_the_documentation(block):
    runs(block)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split()[1])
def test_readme_blocks(block):
    runs(block)


def runs(block):
    """Run a block as a script of its own, NumPy's arrays in the place of CuPy's without a GPU."""
    if "import cupy as" in block and cupy_headnorm.environment().reason:
        block = block.replace("import cupy as cp\n", "import numpy as cp\n")
        block = block.replace("cp.random.", "cp.random.default_rng(0).")
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_has_an_example_a_library_of_about_ten_lines():
    first = BLOCKS[:3]
    assert [block.split()[1] for block in first] == ["cupy", "torch", "numpy"]
    assert all(len(block.strip().splitlines()) <= 12 for block in first)


def test_readmes_commands_are_targets_and_links_lead_somewhere():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists()


# The rows of README's table: provider, its label there, its host calls.
SPEED = [
    ("copy", "device copy", []),
    ("ours", "**ours**", [("", costs.TORCH_NEW), ("in place ", costs.TORCH_IN_PLACE)]),
    ("compile", "transformers, `torch.compile`", [("", "transformers, torch.compile")]),
    ("liger", "Liger", [("", "Liger")]),
    ("functional", "`F.rms_norm`", [("", costs.FUNCTIONAL)]),
    ("eager", "transformers, eager", [("", "transformers, eager")]),
]


def in_short(microseconds):
    return f"{microseconds:.3g}" if microseconds < 100 else f"{microseconds:,.0f}"


def speed_rows(results):
    case = costs.HOST_CASE
    device = {
        (row["provider"], row["tokens"]): row["microseconds"]
        for row in results.timings
        if all(row[name] == getattr(case, name) for name in case._fields if name != "tokens")
    }
    host = {row["call"]: row["microseconds"] for row in results.host}
    for provider, label, calls in SPEED:
        cells = [in_short(device[provider, tokens]) for tokens in (1, 64, 1024, 8192)]
        cells.append(", ".join(said + in_short(host[call]) for said, call in calls))
        yield f"| {label} | {' | '.join(cells)} |"


def test_readmes_figure_and_table_are_of_the_committed_results():
    section = README.partition("## How fast\n")[2].partition("\n## ")[0]
    (figure,) = re.findall(r"!\[[^]]*\]\((.*)\)", README)
    results = record.read((ROOT / figure).with_suffix(".json"))
    stamp = f"{results.device}, {results.date[:10]}"
    assert f"{stamp}, `{results.command}`" in section
    assert f"bench --from {Path(figure).with_suffix('.json')} --plot {figure}" in section
    rows = "\n".join(speed_rows(results))
    assert rows in section, f"README's table should say:\n{rows}"


def test_readmes_figure_is_what_its_command_draws(tmp_path):
    pytest.importorskip("matplotlib")
    (figure,) = (ROOT / path for path in re.findall(r"!\[[^]]*\]\((.*\.svg)\)", README))
    report.plot(record.read(figure.with_suffix(".json")), tmp_path / "new.svg")
    texts, new = (
        re.findall("<!-- (.*) -->", f.read_text()) for f in (figure, tmp_path / "new.svg")
    )
    assert texts == new, "draw the figure again, with README's command"


def test_make_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    expected = (
        "help demo test newest pins coverage lint format compile gpu sanitize bench parity real"
    )
    assert sorted(listed) == sorted([*expected.split(), "docs", "notebooks", "wheel", "clean"])


def test_no_document_names_a_place_that_is_not_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:tests|kernels|notebooks)/[\w./-]+)`", text + README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text):
        places = (ROOT / "cupy_headnorm" / path, ROOT / path)
        assert any(place.exists() for place in places), path
    for path in re.findall(r"`(\w+\.cuh?)`", text.replace("`X.cu`", "")):
        assert list((ROOT / "kernels").rglob(path)), path
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_documents_count_the_models_that_are_known():
    known = len(models.BY_MODEL_TYPE)
    supported = sum(
        len(family.model_types)
        for family in models.FAMILIES
        if not family.refused and any(not r.refused and r.weight != "full" for r in family.roles)
    )
    readme, changelog = (
        " ".join(text.split()) for text in (README, (ROOT / "CHANGELOG.md").read_text())
    )
    assert f"a registry of {known} model types" in readme
    assert f"norms of {supported} are supported" in readme
    assert f"the norms of {supported} model types" in changelog
    assert f"{known - supported} others refused" in changelog
    # No other count of them is told, which would not be held here.
    assert len(re.findall(r"\d+ (?:model types|others refused|are supported)", readme)) == 3
    assert len(re.findall(r"\d+ (?:model types|others refused|are supported)", changelog)) == 2


def test_readme_counts_the_model_types_whose_modules_are_compared():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import families

    types = {row.package or name for name, row in families.FAMILIES.items()}
    assert f"with the modules of {len(types)} model types" in " ".join(README.split())


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    wings = {path.stem for path in (ROOT / "cupy_headnorm").iterdir() if path.stem != "__init__"}
    dotted = re.findall(r"`(\w+(?:\.\w+)+)", text)
    named = {name for name in dotted if name.split(".")[0] in wings}
    named = {name for name in named if name.rpartition(".")[2] not in ("py", "cuh")}
    assert len(named) > 15
    for name in named:
        pkgutil.resolve_name(f"cupy_headnorm.{name}")


COMMANDS = re.findall(r"python -m cupy_headnorm ([^`]+?)(?: *#.*)?[`\n]", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_readmes_commands_are_understood(command):
    cli._parser().parse_args(command.split())
