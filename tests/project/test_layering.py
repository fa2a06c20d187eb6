"""The table of wings in CONTRIBUTING.md holds, and heavy libraries stay where they belong."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cupy_headnorm"
MODULES = sorted(PACKAGE.rglob("*.py"))
BENCH = ("bench.clocks", "bench.providers", "bench.costs", "bench.report", "bench.record",
         "bench.command", "bench.workloads", "bench.suite", "bench.arguments")  # fmt: skip
REPORTS = (*BENCH, "_commands.inspect")


def allowed():
    """Return by wing those that it may import, as CONTRIBUTING's table has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = re.search(r"^\| wing \|.*?\n\n", text, re.DOTALL | re.MULTILINE).group(0)
    found = {}
    for line in table.strip().splitlines()[2:]:
        wings, _, below, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        for wing in re.findall(r"`([\w.]+)`", wings):
            found[wing] = set(re.findall(r"`([\w.]+)`", below))
    return found


def wing_of(name):
    """Return the wing of a dotted module of the package; a face is a wing of its own."""
    top = name.partition(".")[0]
    return "faces" if top in FACES else top


FACES = {
    "__init__",
    "_described",
    "_exllama",
    "_sources",
    "headnorm",
    "ops",
    "qknorm",
    "reference",
    "pretrained",
}


def dotted(path):
    """Return a module's name within the package: ``integrations.transformers``."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported(path):
    """Yield (dotted name of what is imported, node is inside a function)."""
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
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) in inside


def module_of(name):
    """Return the module that a name of the package is, or is in: ``__init__`` for public names."""
    known = {dotted(path) for path in MODULES}
    name = name.removeprefix("cupy_headnorm").lstrip(".")
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or "__init__"


def arrows():
    """Yield (importing module, imported module) within the package."""
    for path in MODULES:
        for name, _ in imported(path):
            if name.split(".")[0] == "cupy_headnorm" and module_of(name) != dotted(path):
                yield dotted(path), module_of(name)


def test_every_wing_is_in_the_table():
    assert {wing_of(dotted(path)) for path in MODULES} == set(allowed())


def test_the_table_goes_upward():
    above = set()
    for wing, below in allowed().items():
        assert below <= above, f"{wing} may import {below - above}, which has no row before"
        above.add(wing)


def test_imports_point_down():
    may = allowed()
    for own, other in arrows():
        wing, below = wing_of(own), wing_of(other)
        assert below == wing or below in may[wing], f"{own} imports {other}"


def test_no_module_is_in_a_circle():
    graph = {}
    for own, other in arrows():
        graph.setdefault(own, set()).add(other)
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in sorted(graph.get(name, ())):
                visit(other)
            done.add(path.pop())

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_cupy_and_torch_are_imported_where_allowed(path):
    for name, inside_function in imported(path):
        top = name.split(".")[0]
        if top == "cupy":
            assert dotted(path).startswith("_cuda.") or dotted(path) in BENCH
            assert inside_function
        if top in ("torch", "transformers") and dotted(path).startswith("integrations."):
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


def test_what_coverage_leaves_out_is_there():
    with (ROOT / "pyproject.toml").open("rb") as file:
        left_out = tomllib.load(file)["tool"]["coverage"]["report"]["exclude_also"]
    texts = [path.read_text() for path in MODULES]
    for pattern in left_out:
        head, names, tail = re.fullmatch(r"(\w+ )\(?(.*?)\)?(\\\(.*|:)", pattern).groups()
        for name in names.split("|"):
            assert any(re.search(head + name + tail, text) for text in texts), name
