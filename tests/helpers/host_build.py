"""
Kernels that `host` runs: which specialisations, and how g++ makes a library of them.

A new choice of a kernel is a row of `NORMS` or `PARTS` that has it, and its value in
``test_host.py::test_few_kernels_cover_all_choices``; test_host.py then runs it in every layout that
it fits. There may be 40 rows, and there are: each takes half a second to compile. So put the
choice into a row whose others occur elsewhere too: those that no row has any more, that test names.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import qk_cases

from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from cupy_headnorm._calls import dispatch
from cupy_headnorm._calls import tables as rope_tables
from cupy_headnorm._cuda import source as kernel_source
from cupy_headnorm._plans import geometry as row_geometries
from cupy_headnorm._plans import head_norm, qk_norm_rope
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._rules.norm import NormSpec

FOLDER = Path(__file__).parent / "host"
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "host"
KEPT = 32
"""The cache keeps so many libraries."""
# Seconds to compile a kernel: -Og 0.34, -O1 0.53, -O0 0.98.
FLAGS = (
    *("-std=c++17", "-Og", "-g1", "-fPIC", "-w", "-ffp-contract=off", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)


class Specialisation(NamedTuple):
    """One compiled kernel."""

    source: str
    macros: tuple[tuple[str, str], ...]
    architecture: int = 900
    """``__CUDA_ARCH__``: from 900 on some arithmetic is on pairs of numbers."""

    def __str__(self):
        return f"{dict(self.macros)['HN_NAME']}_sm{self.architecture // 10}"

    def text(self, symbol, changed=lambda text: text):
        """Return all that g++ is given; `changed` may plant a fault in the kernel's text."""
        lines = [
            '#include "cuda.h"',
            f"#define __CUDA_ARCH__ {self.architecture}",
            *(f"#define {name} {value}" for name, value in self.macros if name != "HN_NAME"),
            # Kernels that differ in how memory lies may share a name.
            f"#define HN_NAME {dict(self.macros)['HN_NAME']}_{symbol}",
            # Without a linkage of its own AddressSanitizer would not guard what is static.
            "namespace {",
            changed(kernel_source.pasted(self.source)),
            "}",
            f'extern "C" void {symbol}(const void* params) {{ call(HN_NAME, params); }}',
        ]
        return "\n".join([*lines, ""])


# The list.
WHOLE, ANY = "whole", "any"
"""
How a kernel moves rows: in whole vectors, which lie on boundaries of 16 bytes, or by elements,
which lie anywhere.
"""


class Norm(NamedTuple):
    """A specialisation for one array of heads."""

    spec: NormSpec
    how: str | int
    """`WHOLE`, `ANY`, or the bytes moved at once."""
    axes: int
    """It is one of `_plans.head_norm.AXES`. A kernel runs calls of fewer axes too."""
    config: LaunchConfig | None = None
    """None for the geometry that the package chooses."""
    wide: bool = False
    """Whether it counts in 64 bits, as all kernels for many axes do."""

    def __str__(self):
        geometry = "" if self.config is None else f",{self.config.rows_per_block} rows a block"
        wide = ",wide" if self.wide else ""
        return f"{self.spec.name},{self.how},axes={self.axes}{geometry}{wide}"

    def launched(self):
        """Return the whole geometry."""
        itemsize = self.spec.x.itemsize
        config = self.config
        if config is None:
            vector, lanes, vectors = row_geometries.row_geometry(self.spec.head_dim, itemsize)
            warp = row_geometries.WARP
            rows = 4 * warp // lanes if lanes <= warp else 1
            config = LaunchConfig(vector * itemsize, lanes, vectors, rows, itemsize)
        access = {WHOLE: config.vector_bytes, ANY: itemsize}.get(self.how, self.how)
        return replace(config, access_bytes=access)

    def specialisation(self):
        config = self.launched()
        vector = config.vector_bytes // self.spec.x.itemsize
        narrow = self.axes <= row_geometries.FEW_AXES and not self.wide
        memory = head_norm.Memory(self.axes, narrow, 1 if self.how == ANY else vector)
        macros = head_norm.macros(self.spec, config, memory)
        return Specialisation("head_norm.cu", tuple(macros.items()))


QWEN3 = NormSpec("rms", BFLOAT16, BFLOAT16, None, 128, "once", False)
IDLE_LANES = NormSpec("layer", BFLOAT16, FLOAT32, FLOAT32, 96, "once", False)
TWO_ROUNDINGS = NormSpec("layer", FLOAT16, FLOAT16, FLOAT16, 80, "before_weight", False)
ONE_ELEMENT = NormSpec("rms", FLOAT16, FLOAT64, FLOAT16, 1, "once", False)
BLOCK = NormSpec("rms", FLOAT16, FLOAT16, None, 2048, "once", False)
TAIL = NormSpec("layer", FLOAT32, BFLOAT16, FLOAT64, 100, "once", False)
ODD_BLOCK = NormSpec("layer", FLOAT32, FLOAT32, FLOAT32, 513, "once", True)
ODD = NormSpec("rms", FLOAT32, None, FLOAT32, 37, "every_op", False)
TILES = NormSpec("layer", FLOAT32, FLOAT32, None, 20000, "once", True)
DOUBLE = NormSpec("rms", FLOAT64, FLOAT64, FLOAT32, 64, "before_weight", True)
NORMS = (
    Norm(QWEN3, WHOLE, 1),
    Norm(QWEN3, WHOLE, 1, wide=True),
    *(Norm(QWEN3, WHOLE, 1, LaunchConfig(16, 16, 1, rows, 16)) for rows in (1, 2, 3, 16)),
    Norm(QWEN3, 4, 3),
    Norm(QWEN3, ANY, 8),  # by a stage in shared memory
    Norm(QWEN3, WHOLE, 1, LaunchConfig(16, 4, 2, 64, 16)),  # tiles within a warp
    Norm(IDLE_LANES, WHOLE, 3),
    Norm(IDLE_LANES, ANY, 8),
    Norm(NormSpec("layer", BFLOAT16, BFLOAT16, BFLOAT16, 128, "every_op", True), ANY, 8),
    Norm(NormSpec("rms", BFLOAT16, None, None, 256, "rstd", False), WHOLE, 8),
    Norm(NormSpec("rms", BFLOAT16, FLOAT64, None, 73, "once", False), ANY, 8),
    Norm(ONE_ELEMENT, ANY, 8),
    Norm(TWO_ROUNDINGS, WHOLE, 8),
    Norm(TWO_ROUNDINGS, ANY, 8),
    Norm(BLOCK, WHOLE, 1),
    Norm(BLOCK, ANY, 8),
    Norm(TAIL, WHOLE, 3),
    Norm(TAIL, ANY, 8),
    Norm(TAIL, 8, 1, LaunchConfig(8, 16, 1, 3, 8)),  # tiles, and a warp in part
    Norm(ODD_BLOCK, ANY, 8),
    Norm(ODD, ANY, 8),
    Norm(TILES, WHOLE, 3),
    Norm(TILES, ANY, 8),
    Norm(DOUBLE, WHOLE, 8),
    Norm(DOUBLE, ANY, 8),
    Norm(NormSpec("layer", FLOAT64, FLOAT32, BFLOAT16, 33, "once", True), ANY, 8),
)


def _call_of(case):
    """Return the validated call that QKNorm makes of a case on a GPU."""
    parts, norms, beside = case.made(np.random.default_rng(0))
    qk, plans = qk_cases.qk_norm(case, norms), {}

    def tables(*_):
        return rope_tables.Pair(
            *(find.view(t, "table") for t in qk.rope.tables(case.of_table.numpy))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "plans", plans)
        patch.setattr(rope_tables.Tables, "_beside", tables)
        qk(*parts, **beside)
    (plan,) = plans.values()
    return plan.call


class Parts(NamedTuple):
    """A specialisation for q, k and v, by a case that it runs."""

    case: qk_cases.Case
    how: str
    """`WHOLE` or `ANY`."""
    axes: int
    """It is one of `_plans.qk_norm_rope.AXES`."""
    architecture: int = 900

    def __str__(self):
        return f"{self.case},{self.how},axes={self.axes},sm_{self.architecture // 10}"

    def specialisation(self):
        call = _call_of(self.case)
        config = qk_norm_rope.plan(call)._replace(axes=self.axes)
        if self.how == ANY:
            config = config._replace(access=1, parameter_access=1, table_access=1)
        macros = qk_norm_rope.macros(call.spec, config)
        return Specialisation("qk_norm_rope.cu", tuple(macros.items()), self.architecture)


def _parts(how, axes, architecture=900, **changes):
    return Parts(qk_cases.DEFAULT._replace(**changes), how, axes, architecture)


PARTS = (
    _parts(WHOLE, 2),
    _parts(WHOLE, 2, architecture=750),
    _parts(ANY, 8),
    _parts(
        WHOLE, 3, x="float16", head_dim=2048, by=None, weight="own x", rounding="once", v=True
    ),
    _parts(WHOLE, 8, by="half x", style="interleaved", rounding="every_op", bias="shared x"),
    _parts(WHOLE, 3, by="chunks of sections", head_dim=64, weight="shared float32", offset=1.0),
    _parts(ANY, 8, by="interleaved sections", rounding="once", weight="own float32"),
    _parts(
        WHOLE, 8, by="whole float32", every_op=False, table="float32", first=True,
        weight="own float32",
    ),
    _parts(
        ANY, 8, x="float16", head_dim=96, kind="layer", weight="own x", bias="own float32", v=True
    ),
    _parts(ANY, 8, x="float16", head_dim=33, by="half x", style="interleaved"),
    _parts(ANY, 8, x="float16", head_dim=80, style="half flipped", first=True, v=True),
    _parts(WHOLE, 3, x="float16", head_dim=2048, by="int32", partial=True),
    _parts(ANY, 8, x="float16", head_dim=2048, by="int32", partial=True),
    _parts(
        WHOLE, 8, x="float32", head_dim=100, partial=True, offset=1.0, v=True, rounding="every_op"
    ),
    _parts(ANY, 8, x="float32", head_dim=10, by="half x", every_op=False, bias="own float32"),
    _parts(ANY, 8, x="float64", head_dim=36, by="half x", style="half flipped", kind="layer"),
)  # fmt: skip


@functools.cache
def specialisations():
    """Return all that is compiled."""
    return tuple(kernel.specialisation() for kernel in (*NORMS, *PARTS))


# Compiling.
def includes():
    """Return the folders of CUDA's headers: of the CUDA runtime, and of CuPy for nv/target."""
    nvidia, cupy = (importlib.util.find_spec(name) for name in ("nvidia", "cupy"))
    roots = map(Path, nvidia.submodule_search_locations if nvidia else ())
    of_runtime = [h.parent for root in roots for h in sorted(root.glob("*/include/cuda_fp16.h"))]
    if not of_runtime or cupy is None:
        return ()
    return of_runtime[0], Path(cupy.origin).parent / "_core/include/cupy/_cccl/libcudacxx"


@functools.cache
def missing():
    """Say what is missing to compile and run kernels; empty if nothing is."""
    for tool in ("g++", "objcopy"):
        if not shutil.which(tool):
            return f"{tool} is not on the PATH; needs a package such as g++ or build-essential"
    if not Path(sanitizer()).is_absolute():
        return "g++ has no AddressSanitizer; needs a package such as libasan"
    if not includes():
        return "CUDA's headers are not installed; needs pip install cupy-headnorm[cuda13]"
    return ""


@functools.cache
def sanitizer():
    """Return the path of AddressSanitizer's library, which must be loaded first."""
    return _run("g++", "-print-file-name=libasan.so").strip()


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


class Library(NamedTuple):
    """A shared library and the names of its kernels."""

    path: Path
    symbols: dict[Specialisation, str]


def build(kernels, changed=lambda text: text):
    """
    Compile specialisations, or find what another process or run compiled from the same texts.

    `changed` may plant a fault in the kernels' text.
    """
    symbols = {kernel: f"kernel_{i}" for i, kernel in enumerate(kernels)}
    texts = {symbol: kernel.text(symbol, changed) for kernel, symbol in symbols.items()}
    flags = [*FLAGS, f"-I{FOLDER}", *(f"-isystem{folder}" for folder in includes())]
    own = [FOLDER / name for name in ("crt/host_defines.h", "cuda.h", "block.cpp")]
    facts = [_run("g++", "--version"), *flags, *(file.read_text() for file in own)]
    path = CACHE / f"{_hash([*facts, *texts.values()])}.so"
    common = CACHE / _hash(facts)
    common.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (common / "ready").exists():
            _run("g++", *flags, "-x", "c++-header", own[1], "-o", common / "cuda.h.gch")
            _run("g++", "-std=c++17", "-O1", "-fPIC", "-c", own[2], "-o", common / "block.o")
            (common / "ready").touch()
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _compile(texts, [f"-I{common}", *flags], common, Path(folder)).rename(path)
            for old in sorted(CACHE.glob("*.so"), key=os.path.getmtime)[:-KEPT]:
                old.unlink()
        os.utime(path)
    return Library(path, symbols)


def _hash(texts):
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]


def _compile(texts, flags, common, folder):
    def one(symbol):
        source, compiled = folder / f"{symbol}.cpp", folder / f"{symbol}.o"
        source.write_text(texts[symbol])
        _run("g++", *flags, "-c", source, "-o", compiled)
        # block.cpp finds what is __shared__ by the name of its section.
        rename = "--rename-section=.bss=shared,alloc,load,data,contents"
        _run("objcopy", rename, compiled)
        return compiled

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(one, texts))
    result = folder / "host.so"
    _run(
        *("g++", "-shared", "-fsanitize=address,undefined", "-o", result, common / "block.o"),
        *objects,
    )
    return result
