"""
How the site is built: ``make docs``.

Pages whose text lies elsewhere are written beside the others before Sphinx reads them: the models
that the registry knows, the results of benchmarks, the changelog and the notebooks.
"""

import shutil
from pathlib import Path

import cupy_headnorm
from cupy_headnorm._commands import models_page
from cupy_headnorm.bench import record
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = ROOT / "notebooks/results"

project = "cupy-headnorm"
author = "the cupy-headnorm authors"
release = version = cupy_headnorm.__version__
extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_nb"]
exclude_patterns = ["_build", "pictures"]
html_theme = "furo"
html_title = f"cupy-headnorm {release}"
html_copy_source = html_show_sphinx = html_show_copyright = False

nb_execution_mode = "off"  # notebooks show the outputs that they are stored with
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc has them
numpydoc_show_class_members = False
numpydoc_validation_checks = {"GL06", "GL07", "PR02"}  # unknown sections, their order, parameters
numpydoc_validation_exclude = {r"\.__"}


def page(name, text):
    """Write a page where it has changed: Sphinx reads those anew."""
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def benchmarks():
    """Return what was measured on each device, as a page."""
    lines = ["# Benchmarks", "", "`cupy-headnorm bench --suite` measures all of this on your GPU:"]
    lines += ["[how to benchmark](howto/benchmark.md). Shares are of the better of a copy and an"]
    lines += ["in-place multiply of the same bytes, in the same run.", ""]
    for path in sorted(RESULTS.glob("*.json")):
        if "ladder" in path.stem:
            continue
        found = record.read(path)
        figure = path.with_suffix(".svg")
        lines += [f"## {found.device}, {found.date[:10]}", ""]
        lines += [", ".join(f"{name} {number}" for name, number in found.versions.items()), ""]
        if figure.exists():
            (HERE / "results").mkdir(exist_ok=True)
            shutil.copy(figure, HERE / "results" / figure.name)
            lines += [f"![Speed by tokens, and host times](results/{figure.name})", ""]
        lines += ["| number to reach | needed | measured | |", "|---|---|--:|---|"]
        for row in found.targets:
            met = {True: "met", False: "missed", None: "not measured"}[row["met"]]
            measured = "" if row["measured"] is None else f"{row['measured']:g}"
            lines.append(f"| {row['what']} | {row['needed']} | {measured} | {met} |")
        lines.append("")
    return "\n".join(lines)


def mathml(self, node):
    """Write a formula as MathML, which browsers draw without a script."""
    self.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    raise __import__("docutils").nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))


html_math_renderer = "mathml"

page("models.md", models_page.markdown())
page("benchmarks.md", benchmarks())
page("changelog.md", (ROOT / "CHANGELOG.md").read_text())
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
    page(f"notebooks/{notebook.name}", notebook.read_text())
