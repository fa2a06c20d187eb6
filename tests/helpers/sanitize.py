"""
compute-sanitizer over the tests marked ``sanitize``, in processes side by side.

    python tests/helpers/sanitize.py [--tool memcheck ...] [-j 16] [--planted]

Only our kernels are checked, and each array has memory of its own. A run of no finding tells little
if the tool saw nothing, so each process reports what it launched (it loads this file as a pytest
plugin), and ``--planted`` runs a copy of the kernels with one fault for each tool, which must find
it. tests/conftest.py marks the tests that `is_selected` names.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("head_norm", "qk_norm")
"""Each is part of the names of all kernels from one source."""
MAX_TESTS = 150
SECONDS, PLANTED_SECONDS = 400, 120
"""A process of many tests is stopped after the first, one on a planted fault after the second."""
REPORT = "HEADNORM_SANITIZE_REPORT"

# initcheck sees no write of a kernel that is not checked: so in all of these what a kernel of ours
# reads was copied from the host or written by another of ours. Most run on CuPy, which unlike torch
# makes every layout without a kernel.
SELECTED = {
    "test_norms.py::test_norm_matches_float64": (
        r"(cupy|torch-cuda)-(default|x=float(16|32|64))",
        r"cupy-(weight=(None|float(16|32|64))|bias=(bfloat16|float64)|tokens=[1789]|num_heads=33)",
    ),
    "test_norms.py::test_any_head_dim": (
        r"cupy-(1|3|33|37|73|80|96|111|257|513|1001|1025|4099|20000)-layer",
    ),
    "test_norms.py::test_every_pair_of_choices": (
        r"cupy-head_norm_\w+_d(37|100|1001)_(before_weight|every_op)",
        r"cupy-head_norm_\w+_rstd",
    ),
    "test_norms.py::test_any_strides": (
        r"cupy-float16-layer-(queries-of-packed-qkv|heads-before-tokens|reversed-.*|expanded-.*)",
        r"cupy-float16-layer-(misaligned|odd-stride|aligned-to-4-elements|overlapping-windows)",
        r"cupy-float16-layer-(five-axes|nine-axes-that-merge|flat-slice)",
    ),
    "test_norms.py::test_out_has_strides_of_its_own_and_nothing_else_is_written": (
        r"cupy-(keys-of-packed-qkv|every-second-head|heads-before-tokens|reversed-heads)",
        r"cupy-(misaligned|odd-stride|aligned-to-4-elements|five-axes|flat-slice)",
    ),
    "test_norms.py::test_in_place_gives_the_same_bits": (r"cupy-.*", r"torch-cuda-bfloat16"),
    "test_norms.py::test_a_rows_bits_depend_on_the_row_alone": (
        r"cupy-float16-(64|128|1024|4099)-layer",
        r"cupy-bfloat16-(37|256)-rms",
        r"cupy-float(32-1024|64-80)-rms",
    ),
    "test_gpu.py::test_any_geometry_by_hand": (r"layer-.*",),
    "test_gpu.py::test_apexs_stride": (r"",),
    "test_qknorm.py::test_matches_float64": (
        r"cupy-(default|x=float(16|64)|x=float32,every_op=False|v=True|tokens=300)",
        r"cupy-head_dim=(2|10|33|36|80|256|2048)",
        r"cupy-by=[\w ]+",
        r"cupy-(style=(interleaved|half flipped)|first=True|partial=True|heads=\(33, 3\))",
        r"cupy-(kind=layer|weight=None|bias=own float32|offset=1.0)",
    ),
    "test_qknorm.py::test_bits_do_not_depend_on_strides_and_nothing_else_is_written": (
        r"cupy-(packed|misaligned|odd strides|heads before tokens)-float16-positions",
        r"cupy-(reversed heads|expanded batch|other orders of axes|many axes)-float16-positions",
        r"cupy-misaligned-(bfloat16|float32|float64)-cos and sin",
    ),
    "test_qknorm.py::test_packed": (r"cupy-(float16|float32)", r"torch-cuda-bfloat16"),
    "test_qknorm.py::test_positions_outside_of_the_table_are_clamped": (r"cupy-.*",),
    "test_qknorm.py::test_tables_and_positions_of_any_strides": (r"cupy",),
}
"""Each test has expressions for what stands in brackets after its name."""


def is_selected(nodeid: str) -> bool:
    """Tell whether a test is one of those for compute-sanitizer."""
    test, _, parameters = nodeid.rpartition("/")[2].partition("[")
    patterns = SELECTED.get(test, ())
    return any(re.fullmatch(pattern, parameters.removesuffix("]")) for pattern in patterns)


class Tool(NamedTuple):
    """One of compute-sanitizer's, and how it is shown to find something."""

    options: tuple[str, ...]
    file: str
    """A fault is planted in this one of the kernels' files."""
    right: str
    wrong: str
    tests: tuple[str, str]
    """They run into it, one on each of `KERNELS`."""


NORM = "tests/faces/test_norms.py::"
QK = "tests/faces/test_qknorm.py::test_matches_float64"
TOOLS = {
    "memcheck": Tool(
        # Without padding an overrun may end in the next allocation. Errors of calls into CUDA are
        # the libraries': they ask for what a device cannot do, and go on.
        ("--padding", "512", "--report-api-errors", "no"),
        "include/headnorm/geometry.cuh",
        "kEveryLaneFull || element < kHeadDim;",
        "kEveryLaneFull || element <= kHeadDim;",
        (f"{NORM}test_any_head_dim[cupy-37-layer]", f"{QK}[cupy-head_dim=33]"),
    ),
    "racecheck": Tool(
        ("--racecheck-num-workers", "2"),
        "include/headnorm/reduce.cuh",
        "    __syncthreads();\n    return warp_sum<kWarps>",
        "    return warp_sum<kWarps>",
        (f"{NORM}test_any_head_dim[cupy-1025-layer]", f"{QK}[cupy-head_dim=2048]"),
    ),
    "initcheck": Tool(
        # What comes back of an array in pieces went through a kernel of a library.
        ("--check-api-memory-access", "no"),
        "include/headnorm/geometry.cuh",
        "      vector.template store<G::kAccess>(row + first);",
        "      static_cast<void>(*reinterpret_cast<const volatile unsigned char*>(row + first));\n"
        "      vector.template store<G::kAccess>(row + first);",
        (f"{NORM}test_any_head_dim[cupy-37-layer]", f"{QK}[cupy-head_dim=33]"),
    ),
    "synccheck": Tool(
        (),
        "include/headnorm/reduce.cuh",
        "    __syncwarp();",
        # The last lane is not of those it says it waits with. A barrier that a warp misses is no
        # finding on an H100: the lanes that end count as arrived.
        "    __syncwarp(0x7fffffff);",
        (f"{NORM}test_any_strides[cupy-float16-layer-misaligned]", f"{QK}[cupy-default]"),
    ),
}


class Run(NamedTuple):
    """A process that has ended."""

    tool: str
    tests: tuple[str, ...]
    seconds: float
    code: int
    output: str
    report: dict[str, Any] | None
    """What the plugin wrote; None where pytest did not come to its end."""


def findings(run: Run) -> int | None:
    """Return how many the tool counted; None if it did not come to its end."""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", run.output)
    return sum(map(int, counts)) if counts else None


def problems(run: Run, root: Path = ROOT) -> list[str]:
    """Say all that keeps a process from being proof that its tests are clean."""
    found, report = [], run.report
    count = findings(run)
    if count is None:
        found.append("no summary of the tool")
    elif count:
        found.append(f"{count} findings")
    if report is None:
        return [*found, "pytest did not end"]
    found += [f"failed: {test}" for test in report["failed"]]
    found += [f"skipped: {test}" for test in report["skipped"]]
    if missing := len(run.tests) - sum(len(report[n]) for n in ("passed", "failed", "skipped")):
        found.append(f"{missing} tests did not run")
    if not report["launches"]:
        found.append("no kernel of ours was launched")
    unseen = [name for name in report["launches"] if not any(part in name for part in KERNELS)]
    found += [f"not checked, by its name: {name}" for name in unseen]
    if Path(report["kernels"]) != root / "kernels":
        found.append(f"ran the kernels of {report['kernels']}")
    if run.code and not found:
        found.append(f"exit code {run.code}")
    return found


# As a pytest plugin, in the process that is checked.
class _Watch:
    def __init__(self, path):
        self.path = path
        self.report = {"passed": [], "failed": [], "skipped": [], "launches": {}}
        self.names = {}

    def pytest_sessionstart(self):
        from cupy_headnorm._cuda import compiler, launcher, source

        self.report["kernels"] = str(source.kernels_folder())
        compiled, packed = compiler.compiled, launcher.packed
        launches = self.report["launches"]

        def naming(file, options, *rest):
            function = compiled(file, options, *rest)
            name = next(o.partition("=")[2] for o in options if o.startswith("-DHN_NAME="))
            self.names[function.ptr] = name
            return function

        def counting(launch):
            memory, start, only_device = packed(launch)
            name = self.names[launch.function]

            def start_counted(*arguments):
                launches[name] = launches.get(name, 0) + 1
                start(*arguments)

            return memory, start_counted, only_device

        compiler.compiled, launcher.packed = naming, counting

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.report[report.outcome].append(report.nodeid)

    def pytest_sessionfinish(self):
        Path(self.path).write_text(json.dumps(self.report))


def pytest_configure(config):
    """Watch the tests, where this file is a plugin: ``pytest -p sanitize``."""
    config.pluginmanager.register(_Watch(os.environ[REPORT]))


# As a script.
def start(tool: str, tests: tuple[str, ...], number: int, root: Path, seconds: int) -> Run:
    """Run tests of the checkout at `root` under a tool."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log")
        paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HEADNORM_NO_POOLS": "1",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            REPORT: str(report),
        }
        filters = [word for part in KERNELS for word in ("--kernel-name", f"kns={part}")]
        command = ["compute-sanitizer", "--tool", tool, *filters, *TOOLS[tool].options]
        # The target connects to the tool through a port. Each has some of its own.
        command += ["--port", str(49152 + 16 * number), "--launch-timeout", "120"]
        command += ["--target-processes", "application-only", "--error-exitcode", "86"]
        command += [sys.executable, "-m", "pytest", "-q", "-p", "sanitize"]
        command += ["-p", "no:cacheprovider", *tests]
        began = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=root,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        return Run(
            tool,
            tests,
            time.monotonic() - began,
            code,
            log.read_text(errors="replace"),
            json.loads(report.read_text()) if report.exists() else None,
        )


def collected() -> list[str]:
    """Return the selected tests, as pytest names them."""
    names = {test.partition("::")[0] for test in SELECTED}
    files = sorted(str(path) for path in ROOT.glob("tests/*/test_*.py") if path.name in names)
    command = [sys.executable, "-m", "pytest", "-m", "sanitize", "--collect-only", "-q", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if not 0 < len(tests) <= MAX_TESTS:
        sys.exit(f"{len(tests)} tests are marked sanitize; needs 1 to {MAX_TESTS}\n{done.stdout}")
    return tests


def check(tools: list[str], jobs: int) -> bool:
    """Run the selected tests under each tool; print a table, and all that is wrong."""
    tests = collected()
    shards = min(max(1, jobs // len(tools)), len(tests))
    work = [(tool, tuple(tests[n::shards])) for n in range(shards) for tool in tools]
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(lambda n: start(*work[n], n, ROOT, SECONDS), range(len(work))))
    rows, clean = [], True
    for tool in tools:
        mine = [run for run in runs if run.tool == tool]
        wrong = [problem for run in mine for problem in problems(run)]
        launched: dict[str, int] = {}
        for run in mine:
            for name, count in (run.report or {"launches": {}})["launches"].items():
                launched[name] = launched.get(name, 0) + count
        kernels = [sum(part in name for name in launched) for part in KERNELS]
        wrong += [f"no {p} was launched" for p, n in zip(KERNELS, kernels, strict=True) if not n]
        passed = sum(len(run.report["passed"]) for run in mine if run.report)
        rows.append(
            (
                tool,
                str(sum(findings(run) or 0 for run in mine)),
                f"{passed} of {len(tests)}",
                *map(str, kernels),
                str(sum(launched.values())),
                f"{max(run.seconds for run in mine):.0f}",
                "; ".join(wrong[:3]) or "clean",
            )
        )
        for run in mine:
            if problems(run):
                print(
                    f"--- {tool}, exit code {run.code}, {run.seconds:.0f} s\n{run.output[-6000:]}"
                )
        clean = clean and not wrong
    head = ("tool", "findings", "passed", *(f"{part} kernels" for part in KERNELS))
    show((*head, "launches", "seconds", "result"), rows)
    return clean


def plant(tool: str, folder: Path) -> Path:
    """Copy the checkout into `folder`, with a tool's fault in the kernels."""
    found = TOOLS[tool]
    root = folder / tool
    for name in ("cupy_headnorm", "kernels", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    file = root / "kernels" / found.file
    text = file.read_text()
    if text.count(found.right) != 1:
        raise ValueError(f"{found.file} has {text.count(found.right)} of {found.right!r}; needs 1")
    file.write_text(text.replace(found.right, found.wrong))
    return root


def check_planted(tools: list[str], jobs: int) -> bool:
    """Plant a fault for each tool, and see whether it finds it in both kernels."""
    with tempfile.TemporaryDirectory() as folder:
        roots = {tool: plant(tool, Path(folder).resolve()) for tool in tools}
        work = [(tool, (test,)) for tool in tools for test in TOOLS[tool].tests]

        def run_one(n: int) -> Run:
            return start(*work[n], n, roots[work[n][0]], PLANTED_SECONDS)

        with ThreadPoolExecutor(jobs) as pool:
            runs = list(pool.map(run_one, range(len(work))))
    rows, all_caught = [], True
    for n, run in enumerate(runs):
        kernel = KERNELS[n % len(KERNELS)]
        caught = bool(findings(run)) and kernel in named(run)
        if not caught:
            print(f"--- {run.tool}, exit code {run.code}\n{run.output[-6000:]}")
        count = "none" if findings(run) is None else str(findings(run))
        rows.append((run.tool, kernel, count, f"{run.seconds:.0f}", "caught" if caught else "LOST"))
        all_caught = all_caught and caught
    show(("tool", "kernel", "findings", "seconds", "planted fault"), rows)
    return all_caught


def named(run: Run) -> str:
    """Return what the tool itself said."""
    lines = run.output.splitlines()
    return "\n".join(line for line in lines if line.startswith("========="))


def show(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def main() -> None:
    """Exit with 0 if every tool ran, saw our kernels and found nothing."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all four")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument(
        "--planted", action="store_true", help="see whether each tool finds a planted fault"
    )
    arguments = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on the PATH; needs that of the CUDA toolkit")
    run = check_planted if arguments.planted else check
    sys.exit(not run(arguments.tool or list(TOOLS), max(1, arguments.jobs)))


if __name__ == "__main__":
    main()
