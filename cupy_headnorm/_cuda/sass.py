"""How many instructions a kernel is: NVRTC's machine code, read by NVIDIA's disassembler."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cupy_headnorm._cuda import source

PACKAGE = "nvidia-cuda-nvdisasm"
"""It brings the disassembler; a CUDA toolkit does too."""


def disassembler() -> str:
    """Return where ``nvdisasm`` is: on the PATH, or in `PACKAGE`; empty where it is not."""
    packages = (Path(folder).glob("nvidia/*/bin/nvdisasm") for folder in sys.path)
    found = (str(path) for folder in packages for path in folder)
    return shutil.which("nvdisasm") or next(found, "")


def cubin(file: str, options: tuple[str, ...], target: str) -> bytes:
    """
    Compile ``kernels/<file>`` as CuPy does, for a GPU such as ``"sm_90"``.

    Raises
    ------
    cupy.cuda.compiler.CompileException
        NVRTC refuses the source; the message is its log.
    """
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc
    from cupy.cuda.compiler import CompileException

    text = source.pasted(file)
    options = (
        *assemble_cupy_compiler_options(()),
        *options,
        f"-arch={target}",
        "-ftz=true",
        "--device-as-default-execution-space",
    )
    program = nvrtc.createProgram(text, file, (), ())
    try:
        nvrtc.compileProgram(program, options)
        code: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise CompileException(log, text, file, options, "nvrtc") from None
    finally:
        nvrtc.destroyProgram(program)
    return code + b"\0"  # CuPy drops the last byte, as if it ended a string


def listing(code: bytes) -> list[str]:
    """
    Return the instructions of a kernel up to its last ``EXIT``: all that a warp can execute.

    Raises
    ------
    RuntimeError
        There is no disassembler, or it does not read the code.
    """
    tool = disassembler()
    if not tool:
        raise RuntimeError(f"nvdisasm is not found; needs: pip install {PACKAGE}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=False)
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", done.stdout)
    last = max((i for i, text in enumerate(found) if re.search(r"\bEXIT\b", text)), default=-1)
    if done.returncode or last < 0:
        raise RuntimeError(f"{tool} reads no kernel: {' '.join(done.stderr.split())[:200]}")
    return found[: last + 1]
