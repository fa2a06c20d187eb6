"""constraints.txt pins all that tests and tools take, and whoever installs them reads it."""

import configparser
import re
import tomllib
from pathlib import Path

import pins
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
SED = "s/^[^#].*# cuda12: //"

requirements = pytest.importorskip("packaging.requirements")


def pinned(cuda, python):
    """Return the versions that a Python gets, having checked that each is said once."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if cuda == "cuda12":
            line = re.sub("^[^#].*# cuda12: ", "", line)
        if not (text := line.partition("#")[0].strip()):
            continue
        one = requirements.Requirement(text)
        ((sign, version),) = ((s.operator, s.version) for s in one.specifier)
        assert (sign, "*" in version, "+" in version) == ("==", False, False), line
        if one.marker is None or one.marker.evaluate({"python_version": python}):
            assert one.name not in found, line
            found[one.name] = version
    return found


@pytest.mark.parametrize("cuda", ["cuda12", "cuda13"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(cuda, python):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    wanted = config["options"]["install_requires"].splitlines()
    wanted += [line for e in [*pins.EXTRAS.split(","), cuda] for line in extras[e].splitlines()]
    wanted += tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    found = pinned(cuda, python)
    asked = [requirements.Requirement(line) for line in wanted if line]
    assert len(asked) > 25
    for one in asked:
        assert pins.normal(one.name) in found, f"{one} is not pinned: make pins"
        assert one.specifier.contains(found[pins.normal(one.name)]), one


def test_no_version_is_pinned_in_setup_cfg_too():
    text = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
    assert re.findall(r"^ .*==(?!1[23]\.\*)", text.partition("\n[")[0], re.MULTILINE) == []


def test_whoever_installs_what_tests_take_reads_the_pins():
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    (installs,) = re.findall(r".*pip install.*", makefile)
    assert "PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS)" in installs
    with_tests = re.findall(r"^.*pip install .*\[test.*$", readme, re.MULTILINE)
    assert [re.findall(r"-c (\S+)", line) for line in with_tests] == [
        ["constraints.txt"],
        ["cuda12.txt"],
    ]
    for text in (makefile, readme, pins.HEAD, (ROOT / "constraints.txt").read_text()):
        assert SED in text
    assert (ROOT / "constraints.txt").read_text().startswith(pins.HEAD)


def test_lines_have_markers_where_pythons_differ():
    found = {
        (3, 12): {"numpy": "2.5", "scipy": "1", "new": "1"},
        (3, 11): {"numpy": "2.4", "scipy": "1", "old": "2"},
        (3, 14): {"numpy": "2.6", "scipy": "1", "new": "1"},
    }
    cuda12 = {(3, 11): {"scipy": "1", "numpy": "2.4", "for12": "3", "new": "0"}}
    lines = pins.lines(found)
    assert lines == {
        "new": ["new==1"],
        "numpy": [
            'numpy==2.4 ; python_version < "3.12"',
            'numpy==2.5 ; python_version >= "3.12" and python_version < "3.14"',
            'numpy==2.6 ; python_version >= "3.14"',
        ],
        "old": ["old==2"],
        "scipy": ["scipy==1"],
    }
    del lines["numpy"]
    text = pins.joined(lines, pins.lines(cuda12))
    assert text == pins.HEAD + (
        "for12==3\nnew==1  # cuda12: new==0\nnumpy==2.4\nold==2\nscipy==1\n"
    )


def test_a_report_of_pip_gives_versions_of_pypi_alone():
    def package(name, version, **info):
        return {"metadata": {"name": name, "version": version}, "download_info": info}

    ours = package("cupy-headnorm", "0.1.0", dir_info={"editable": True})
    assert pins.versions({"install": [ours, package("A_b", "1.0")]}) == {"a-b": "1.0"}
    with pytest.raises(
        ValueError, match=r"^torch is 2\.13\.0\+cpu, a build of another index; needs one of PyPI$"
    ):
        pins.versions({"install": [package("torch", "2.13.0+cpu")]})
