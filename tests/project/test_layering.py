"""The floors of CONTRIBUTING.md hold, and heavy libraries stay where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cupy_headnorm"
MODULES = sorted(PACKAGE.rglob("*.py"))
BENCH = ("_timing", "_providers", "_qk_providers", "_costs", "_bench_report", "bench")
REPORTS = (*BENCH, "_inspect_report")


def floors():
    table = re.search(r"```\n(F0 .*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    found, floor = {}, None
    for line in table.group(1).splitlines():
        match = re.match(r"(?:F(\d+) *| +)([\w/]+)\.py", line)
        floor = int(match.group(1)) if match.group(1) else floor
        found[match.group(2).replace("/", ".")] = floor
    return found


def dotted(path):
    """Return a module's name within the package: ``integrations.transformers``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path):
    """Yield (module of the package or top-level library, node is inside a function)."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            names = [node.module]
            if node.module == "cupy_headnorm":
                names = [f"cupy_headnorm.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) in inside


def test_every_module_has_a_floor():
    assert set(floors()) == {dotted(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_down(path):
    known, own = floors(), dotted(path)
    for name, _ in imported(path):
        if name.startswith("cupy_headnorm."):
            other = name.removeprefix("cupy_headnorm.")
            # What is imported from a module may be one of its names.
            other = other if other in known else other.rpartition(".")[0]
            assert known[other] < known[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_cupy_and_torch_are_imported_where_allowed(path):
    for name, inside_function in imported(path):
        top = name.split(".")[0]
        if top == "cupy":
            assert dotted(path) in ("_interop", "_kernels", *BENCH)
            assert inside_function
        if top in ("torch", "transformers") and dotted(path) == "integrations.transformers":
            continue
        if top in ("torch", "transformers", "liger_kernel", "rich", "matplotlib"):
            assert dotted(path) in REPORTS
            assert inside_function


def test_importing_the_package_imports_neither_cupy_nor_torch():
    code = (
        "import sys, cupy_headnorm\n"
        "heavy = {'cupy', 'torch', 'jax', 'safetensors', 'rich', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_kernels_package_shadows_the_one_on_pypi():
    assert not (ROOT / "kernels" / "__init__.py").exists()
