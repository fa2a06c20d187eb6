"""What must hold when an untrusted folder is read: an end, bounds, and errors of ours."""

import contextlib
import gc
import io
import json
import linecache
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
from checkpoints import KEYS, file_of, header_of

import cupy_headnorm
from cupy_headnorm import CheckpointError, HeadNorm, QKNorm, cli
from cupy_headnorm._commands import inspect
from cupy_headnorm.checkpoint import files as checkpoint_files
from cupy_headnorm.checkpoint import tensors
from cupy_headnorm.pretrained import head_norms

SECONDS = 60  # an example takes some 20 ms
CPU_SECONDS = 0.5
CPU_SECONDS_A_BYTE = {".json": 5e-7, ".safetensors": 5e-6}
"""
What a door may take. Measured: 0.07 s for 1000 layers that a config counts; 2e-8 s a byte of JSON;
1e-6 to 2e-6 of tensors' headers, ten times as many where a table is printed.
"""
LONG = ("z" * 250, "0, " * 80)
"""Parts of the long values of mutations.py: none is printed."""
PACKAGE = str(Path(cupy_headnorm.__file__).parent)
SECRET = 777.0


def deliberate(error):
    """Tell whether an error was raised by a statement of the package, not on its way."""
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    file = at.tb_frame.f_code.co_filename
    line = linecache.getline(file, at.tb_lineno).strip()
    return file.startswith(PACKAGE) and line.startswith("raise ")


@contextlib.contextmanager
def refusing(allowed=(ValueError, TypeError)):
    """Let pass errors of ours, and of the kinds that are documented."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, allowed) or not deliberate(error):
            raise
        told = str(error)
        assert not any(part in told for part in LONG)
        if isinstance(error, CheckpointError) and (len(told) > 5000 or not told.isprintable()):
            raise AssertionError(f"{told!r} is no message of one line") from error


def size_of(folder):
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())


@contextlib.contextmanager
def in_time(folder, times=1):
    """Allow a door a time in proportion to the files: of this process, and an end by the clock."""
    files = [entry for entry in folder.rglob("*") if entry.is_file()]
    each = (CPU_SECONDS_A_BYTE.get(file.suffix, 0) * file.stat().st_size for file in files)
    most = times * (CPU_SECONDS + sum(each)) * (4 if tracemalloc.is_tracing() else 1)
    told = f"took longer than {most:.2f} s of {size_of(folder)} bytes, or {SECONDS} s of a clock"
    fired = []

    def late(*_):
        fired.append(True)
        raise AssertionError(told)

    timers = ((signal.SIGALRM, signal.ITIMER_REAL, SECONDS),
              (signal.SIGPROF, signal.ITIMER_PROF, most))  # fmt: skip
    before = [signal.signal(number, late) for number, _, _ in timers]
    # What other tests have left in the process is no work of the door's: with torch and JAX there,
    # a collection over all of it takes half a second.
    gc.freeze()
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        gc.unfreeze()
    assert not fired, told  # the command line catches any error


@contextlib.contextmanager
def in_memory(folder):
    """
    Allow what parsed JSON and values in float64 need, a fixed multiple of the files.

    The constant is of modules that are imported and of tracebacks.
    """
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    most = (8 << 20) + 100 * size_of(folder)
    assert peak <= most, f"{peak} bytes, where {most} are allowed"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for each example, beside what must not be read; all that is opened is noted."""
    secret, _ = header_of({f"{KEYS[0]}.weight": ("F32", (16,))})
    values = np.full(16, SECRET, "<f4").tobytes()
    (tmp_path / "secret.safetensors").write_bytes(file_of(secret, values))
    (tmp_path / checkpoint_files.CONFIG).write_text('{"model_type": "secret"}')
    opened = []
    safe_open = safetensors.safe_open
    read_bytes = Path.read_bytes

    def noted(path, *arguments, **keywords):
        opened.append(path)
        return safe_open(path, *arguments, **keywords)

    def read(path):
        # hypothesis reads too: it looks for constants in the text of modules.
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            opened.append(path)
        return read_bytes(path)

    monkeypatch.setattr(safetensors, "safe_open", noted)
    monkeypatch.setattr(Path, "read_bytes", read)

    @contextlib.contextmanager
    def made():
        opened.clear()
        folder = tmp_path / "model"
        folder.mkdir()
        try:
            yield folder
            strange = [path for path in opened if Path(os.path.abspath(path)).parent != folder]
            assert not strange
        finally:
            for entry in folder.iterdir():
                entry.unlink()
            folder.rmdir()

    made.opened = opened
    return made


def read_all(folder):
    """Read a folder by every door."""

    @contextlib.contextmanager
    def door(allowed=(ValueError, TypeError), times=1):
        with refusing(allowed), in_time(folder, times):
            yield

    with door():
        checkpoint_files.config(folder)
    names = []
    with door():
        found, holder, _ = tensors.survey(folder)
        assert found.keys() == holder.keys()
        names = tensors.tensor_names(folder)
    for name in names[:2]:
        with door():
            array = tensors.read_tensor(folder, name)
            assert not (array.astype(np.float64) == SECRET).any()
    stems = [name.removesuffix(".weight") for name in names if "norm" in name]
    for key in [*stems[:1], *KEYS[:2]]:
        with door():
            norm = HeadNorm.from_safetensors(folder, key)
            assert norm.weight is None or not (norm.weight.astype(np.float64) == SECRET).any()
        with door():
            HeadNorm.from_pretrained(folder, key)
    with door():
        HeadNorm.from_pretrained(
            folder, KEYS[0], kind="rms", eps=1e-6, rounding="once", num_heads=1
        )
    norms = {}
    with door(CheckpointError):
        norms = head_norms(folder)
        assert len(repr(norms)) < 10_000
        told = "".join(norms.notes) + "".join(norm.reason for norm in norms.refused)
        assert not any(part in told for part in LONG)
    for key in list(norms)[:4]:
        with door():
            norms[key]
    for layer in (0, 1):
        with door():
            QKNorm.from_pretrained(folder, layer)
    found = None
    with door():
        found = inspect.collect(str(folder))
        json.dumps(found)
    with door(times=10):
        told = shown(found) if found else ""
        assert not any(part in told for part in LONG)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
        in_time(folder),
    ):
        code = cli.main(["inspect", "--json", str(folder)])
    told = err.getvalue()
    assert (code, told.count("\n")) in ((0, 0), (2, 1))


def shown(found):
    with contextlib.redirect_stdout(io.StringIO()) as file:
        inspect.show(found)
    return file.getvalue()


@pytest.fixture
def tried(place):
    """Return a context that writes nothing and checks all when it is left."""

    @contextlib.contextmanager
    def trying(traced=True):
        with place() as folder:
            yield folder
            with in_memory(folder) if traced else contextlib.nullcontext():
                read_all(folder)

    return trying
