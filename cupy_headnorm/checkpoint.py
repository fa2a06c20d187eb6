"""Norm weights in safetensors files: a file, or a folder with one file or with shards."""

from __future__ import annotations

import difflib
import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from cupy_headnorm import _dtypes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not hold what was asked for."""


def read_norm(path: Any, key: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """
    Read ``<key>.weight`` and ``<key>.bias``, of which one may be missing.

    Parameters
    ----------
    path : path-like
        A safetensors file, or a folder with ``model.safetensors`` or, failing that, with
        ``model.safetensors.index.json`` and its shards: transformers' order.
    key : str
        The module's name in the file, such as ``model.layers.0.self_attn.q_norm``.

    Raises
    ------
    CheckpointError
        Nothing readable is there, a shard is missing or lies outside the folder, or the key is
        not found; the message lists near matches.
    TypeError
        The tensor's dtype is not float16, bfloat16, float32 or float64 (float8, say).
    """
    where = _files(Path(path))
    names = (f"{key}.weight", f"{key}.bias")
    if not any(name in where for name in names):
        raise CheckpointError(
            f"{path} has no tensor {names[0]}; needs one of its keys, such as "
            + _near(key, list(where))
        )
    weight, bias = (_read(where[name], name) if name in where else None for name in names)
    return weight, bias


def tensor_names(path: Any) -> list[str]:
    """Return the names of all tensors of a file or folder."""
    return sorted(_files(Path(path)))


def read_tensor(path: Any, name: str) -> np.ndarray:
    """Read one tensor by its full name; errors are those of `read_norm`."""
    where = _files(Path(path))
    if name not in where:
        near = difflib.get_close_matches(name, list(where), n=3, cutoff=0.5) or sorted(where)[:3]
        raise CheckpointError(f"{path} has no tensor {name}; it has {', '.join(near) or 'none'}")
    return _read(where[name], name)


def write_norm(path: Any, key: str, weight: np.ndarray | None, bias: np.ndarray | None) -> None:
    """
    Write ``<key>.weight`` and ``<key>.bias`` to a safetensors file of their own.

    A file that holds other tensors is refused and stays as it is.
    """
    import safetensors
    from safetensors.numpy import save_file

    tensors = {f"{key}.weight": weight, f"{key}.bias": bias}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    if not tensors:
        raise ValueError("the norm has neither weight nor bias; needs one to be written")
    if Path(path).exists():
        others = sorted(set(_keys(Path(path))) - {f"{key}.weight", f"{key}.bias"})
        if others:
            raise CheckpointError(
                f"{path} exists and holds {others[0]} among {len(others)} other tensors, which "
                "would be lost; needs a file of its own"
            )
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be written ({error})") from error


def _near(key: str, names: list[str]) -> str:
    stems = sorted({name.rpartition(".")[0] for name in names})
    near = difflib.get_close_matches(key, stems, n=3, cutoff=0.5) or stems[:3]
    return ", ".join(near) if near else "none: it holds no tensors"


def _files(path: Path) -> dict[str, Path]:
    """Return which file holds which tensor."""
    try:
        if not path.is_dir():
            return dict.fromkeys(_keys(path), path)
        if (path / SINGLE).is_file():
            return dict.fromkeys(_keys(path / SINGLE), path / SINGLE)
        if (path / INDEX).is_file():
            return _indexed(path / INDEX)
        listed = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    raise CheckpointError(f"{path} holds {listed}; needs {SINGLE} or {INDEX}")


def _indexed(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        entries = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index ({type(error).__name__}: {error}); "
            'needs JSON with a "weight_map" of tensor names to shards'
        ) from error
    files = {}
    for name, shard in entries:
        # Links are followed, as download caches use them; names that climb out are not.
        parts = {*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts}
        if ".." in parts or PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).anchor:
            raise CheckpointError(
                f"{index} puts {name} in {shard!r}, outside its folder; needs a path inside"
            )
        files[name] = index.parent / shard
    return files


def _open(path: Path) -> Any:
    import ml_dtypes  # noqa: F401  registers bfloat16, which safetensors asks NumPy for
    import safetensors

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; needs a safetensors file")
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error


def _keys(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _read(path: Path, name: str) -> np.ndarray:
    import safetensors

    with _open(path) as file:
        if name not in file.keys():  # noqa: SIM118  a safe_open is no mapping
            raise CheckpointError(f"{path} lacks {name}, which the index puts there")
        stored = file.get_slice(name).get_dtype()
        if stored not in _dtypes.BY_SAFETENSORS:
            raise TypeError(
                f"{name} has dtype {stored}; needs {' or '.join(_dtypes.BY_SAFETENSORS)}"
            )
        try:
            return file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} cannot give {name} ({error})") from error
