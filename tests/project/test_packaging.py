"""Wheel and sdist hold all that runs and tests need, and run from there."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(p.relative_to(ROOT) for p in (ROOT / "kernels").rglob("*.cu*"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build from a clean copy: what an old build folder holds would be packed too."""
    pytest.importorskip("build")
    clean = tmp_path_factory.mktemp("clean") / "source"
    kept = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clean, ignore=kept)
    for name in (".clang-format", ".ci"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, clean / name)
    folder = tmp_path_factory.mktemp("dist")
    # The wheel is built from the sdist, as pip would.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(clean)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheel_holds_the_package_and_every_kernel(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in KERNELS:
        assert f"cupy_headnorm/{path}" in names
    assert "cupy_headnorm/py.typed" in names
    for path in (ROOT / "cupy_headnorm").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cupy_headnorm"}
    assert not any("kernels/__init__" in name for name in names)


def test_the_index_can_show_the_description(dist):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_repositorys_address_is_one_placeholder():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.cf[fg]"), *(ROOT / "docs").glob("*/*.md")]
    found = [path.name for path in texts for _ in re.findall(r"\bREPOSITORY\b", path.read_text())]
    assert sorted(found) == ["CONTRIBUTING.md", "README.md"]


def test_sdist_holds_tests_notebooks_and_the_makefile(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = [*map(str, KERNELS), "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"]
    wanted += [
        "Makefile",
        "constraints.txt",
        "setup.cfg",
        "pyproject.toml",
        "notebooks/1-first-norm.ipynb",
    ]
    wanted += ["cupy_headnorm/py.typed", "tests/public_api.txt"]
    held = [p for p in (ROOT / "tests").rglob("*") if p.suffix in (".py", ".h", ".cpp", ".txt")]
    wanted += [".ci/run", *(str(p.relative_to(ROOT)) for p in held)]
    assert not set(wanted) - names


def run(site, folder, *words, **environment):
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
    )


def test_wheel_runs_from_another_folder(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    done = run("", tmp_path, *install)
    assert done.returncode == 0, done.stderr
    done = run(site, tmp_path, "-m", "cupy_headnorm", "demo", "--tokens", "4")
    assert (done.returncode, done.stderr) == (0, "")
    where = "import cupy_headnorm._cuda.source as s; print(s.kernels_folder())"
    assert run(site, tmp_path, "-c", where).stdout.strip() == str(site / "cupy_headnorm/kernels")


def test_unpacked_sdist_runs(dist, tmp_path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    where = "import cupy_headnorm._cuda.source as s; print(s.kernels_folder())"
    assert run(source, tmp_path, "-c", where).stdout.strip() == str(source / "kernels")
