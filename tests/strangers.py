"""What must hold when a stranger's folder is read: an end, bounds, and errors of ours."""

import contextlib
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
from cupy_headnorm import CheckpointError, HeadNorm, QKNorm, _inspect_report, checkpoint, cli
from cupy_headnorm.pretrained import head_norms

SECONDS = 10  # an example takes some 20 ms
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
        if isinstance(error, CheckpointError) and (len(told) > 5000 or not told.isprintable()):
            raise AssertionError(f"{told!r} is no message of one line") from error


@contextlib.contextmanager
def in_time(seconds=SECONDS):
    def late(*_):
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def size_of(folder):
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())


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
    (tmp_path / checkpoint.CONFIG).write_text('{"model_type": "secret"}')
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
    with refusing():
        checkpoint.config(folder)
    names = []
    with refusing():
        found, holder = checkpoint.survey(folder)
        assert found.keys() == holder.keys()
        names = checkpoint.tensor_names(folder)
    for name in names[:2]:
        with refusing():
            array = checkpoint.read_tensor(folder, name)
            assert not (array.astype(np.float64) == SECRET).any()
    stems = [name.removesuffix(".weight") for name in names if "norm" in name]
    for key in [*stems[:1], *KEYS[:2]]:
        with refusing():
            norm = HeadNorm.from_safetensors(folder, key)
            assert norm.weight is None or not (norm.weight.astype(np.float64) == SECRET).any()
        with refusing():
            HeadNorm.from_pretrained(folder, key)
    with refusing():
        HeadNorm.from_pretrained(
            folder, KEYS[0], kind="rms", eps=1e-6, rounding="once", num_heads=1
        )
    with refusing(CheckpointError):
        norms = head_norms(folder)
        assert len(repr(norms)) < 10_000
        assert norms.notes is not None
        for key in list(norms)[:4]:
            with refusing():
                norms[key]
    for layer in (0, 1):
        with refusing():
            QKNorm.from_pretrained(folder, layer)
    with refusing():
        found = _inspect_report.collect(str(folder))
        json.dumps(found)
        shown(found)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = cli.main(["inspect", "--json", str(folder)])
    told = err.getvalue()
    assert (code, told.count("\n")) in ((0, 0), (2, 1))


def shown(found):
    from rich.console import Console

    _inspect_report.show(found, Console(file=io.StringIO(), width=100))


@pytest.fixture
def tried(place):
    """Return a context that writes nothing and checks all when it is left."""

    @contextlib.contextmanager
    def trying(traced=True):
        with place() as folder:
            yield folder
            with in_time(), in_memory(folder) if traced else contextlib.nullcontext():
                read_all(folder)

    return trying
