"""
Write constraints.txt: the versions that the tests, their tools and notebooks take.

    python tests/helpers/pins.py [--python python3.12 ...] [REQUIREMENT ...]

Each Python resolves the extras against its index, by a pip that installs nothing. Where one has
another version than that before it, lines have markers. A requirement holds a package back:
``torch==2.13.0``. What an extra of CUDA 12 has otherwise is kept behind the line, for sed.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "test,docs,notebooks,bench,hf,real"
FOR_CUDA12 = "torch<2.11"
"""Later ones on PyPI are built for CUDA 13, and their packages exclude those of CUDA 12."""
HEAD = """\
# What tests, lint and notebooks take: `pip install -c constraints.txt`. Written by `make pins`.
# With CUDA 12: sed 's/^[^#].*# cuda12: //' constraints.txt
"""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(report):
    """Return the versions that a report of pip names, without that of this project."""
    found = {}
    for package in report["install"]:
        name, version = normal(package["metadata"]["name"]), package["metadata"]["version"]
        if "+" in version:
            raise ValueError(f"{name} is {version}, a build of another index; needs one of PyPI")
        if "dir_info" not in package["download_info"]:
            found[name] = version
    return found


def resolved(python, cuda, requirements):
    """Let a Python's pip resolve the extras."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [python, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-e", f".[{EXTRAS},{cuda}]", *requirements]
        subprocess.run(command, cwd=ROOT, check=True)
        return versions(json.loads(report.read_text()))


def lines(found):
    """Return the lines of each package, from its versions by Python: ``(3, 11)`` and so on."""
    pins = {}
    for name in sorted({name for names in found.values() for name in names}):
        have = {python: found[python][name] for python in sorted(found) if name in found[python]}
        runs = [list(run) for _, run in itertools.groupby(have, key=have.get)]
        bounds = [run[0] for run in runs[1:]]
        pins[name] = []
        for run, low, high in zip(runs, [None, *bounds], [*bounds, None], strict=True):
            limits = [
                f'python_version {sign} "{bound[0]}.{bound[1]}"'
                for sign, bound in ((">=", low), ("<", high))
                if bound
            ]
            marker = f" ; {' and '.join(limits)}" if limits else ""
            pins[name].append(f"{name}=={have[run[0]]}{marker}")
    return pins


def joined(pins, cuda12):
    """Return the text of the file; a line's other form with CUDA 12 stands behind it."""
    text = HEAD
    for name in sorted({*pins, *cuda12}):
        ours, others = pins.get(name, []), cuda12.get(name, [])
        for line, other in itertools.zip_longest(ours, others, fillvalue=""):
            differs = ours and others and line != other
            text += f"{line}  # cuda12: {other}\n" if differs else f"{line or other}\n"
    return text


def main():
    """Resolve for each Python and either CUDA, then write."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--python", action="append", help="default: this one")
    parser.add_argument("requirements", nargs="*", metavar="REQUIREMENT")
    arguments = parser.parse_args()
    found, cuda12 = {}, {}
    # Both CUDAs hold the same but for torch and what comes with it.
    others = [r for r in arguments.requirements if not r.startswith("torch")] + [FOR_CUDA12]
    for python in arguments.python or [sys.executable]:
        asked = [python, "-c", "import sys; print(*sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        version = tuple(map(int, done.stdout.split()))
        found[version] = resolved(python, "cuda13", arguments.requirements)
        cuda12[version] = resolved(python, "cuda12", others)
    (ROOT / "constraints.txt").write_text(joined(lines(found), lines(cuda12)))


if __name__ == "__main__":
    main()
