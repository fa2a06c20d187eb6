"""The documentation: it builds without a warning, needs no network, and no link is dead."""

import re
import shutil
import subprocess
import sys
import urllib.parse
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ROOT / "tests/public_api.txt"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]


def built(source, out, **environment):
    """Run Sphinx as `make docs` does; return the process."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    return subprocess.run(
        [*command, source, out],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(out)} | environment,
    )


def copied(folder):
    """Copy what the site is made of: it writes pages beside the others."""
    ignored = shutil.ignore_patterns("_build")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=ignored)
    shutil.copy(ROOT / "CHANGELOG.md", folder)
    (folder / "notebooks").symlink_to(ROOT / "notebooks")
    return folder / "docs"


class Page(HTMLParser):
    """What a page loads, where it links to, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.anchors = set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.add(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.loads.add(given["href"])


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = built(copied(folder), folder / "html")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder / "html"


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_pages_load_nothing_from_elsewhere(site, pages):
    loads = {load for page in pages.values() for load in page.loads}
    assert len(loads) > 10
    assert not [load for load in loads if re.match(r"(?:https?:)?//", load)]
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)]*", styles)


def test_links_lead_to_pages_and_anchors(site, pages):
    dead, seen = [], 0
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            seen += 1
            target, _, anchor = urllib.parse.unquote(link).partition("#")
            file = (path.parent / target).resolve() if target else path
            found = pages.get(file)
            if not file.exists() or (found and anchor and anchor not in found.anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert seen > 1000
    assert not dead


def test_every_public_name_has_its_place(site):
    """Those of public_api.txt, and the members of its classes."""
    _, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    listed = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    module, owner, missing = "", "", []
    for line in PUBLIC.read_text().splitlines():
        if line.startswith("# "):
            module, owner = line[2:], ""
        elif module.startswith("cupy_headnorm") and re.match(r"\w", line):
            name = re.match(r"(?:class )?(\w+)", line)[1]
            owner = f"{module}.{name}" if line.startswith("class ") else ""
            missing += [f"{module}.{name}"] * (f"{module}.{name}" not in listed)
        elif owner and (member := re.match(r"    (?:classmethod )?([a-z]\w*)\(", line)):
            name = f"{owner}.{member[1]}"
            missing += [name] * (name not in listed)
    assert len(listed) > 60
    assert not [name for name in missing if not name.endswith((".environment", ".__version__"))]


BROKEN = '''
def function(x):
    """
    Do nothing.

    Parameters
    ----------
    x : int
    y : int

    Outcomes
    --------
    none
    """
'''


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("[nowhere](howto/nowhere.md)", r"nowhere.md"),
        ("[nowhere](install.md#nowhere)", r"nowhere"),
        (
            "```{eval-rst}\n.. autofunction:: broken.function\n```",
            r"(?s)(?=.*Unknown parameters \{'y'\})(?=.*unknown section.*Outcomes|.*Outcomes)",
        ),
    ],
    ids=["a dead link", "a dead anchor", "a docstring that does not parse"],
)
def test_what_is_broken_fails_the_build(added, told, tmp_path):
    source = copied(tmp_path)
    for path in [*source.glob("*/*.md"), *source.glob("[j-z]*.md")]:
        path.unlink()
    (tmp_path / "broken.py").write_text(BROKEN)
    (source / "index.md").write_text(f"# Index\n\n{added}\n")
    done = built(source, tmp_path / "html", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode
    assert re.search(told, done.stderr), done.stderr
