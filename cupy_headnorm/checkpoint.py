"""Safetensors files: a file, or a folder with one file or with shards, and its config.json."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from cupy_headnorm import _dtypes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_STEMS = ("model", "diffusion_pytorch_model")
"""Of files in a folder: transformers' name, then diffusers'."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not hold what was asked for."""


def config(folder: Any) -> dict[str, Any]:
    """
    Read a folder's config.json.

    Raises
    ------
    CheckpointError
        It is not there, or holds no JSON object.
    """
    path = Path(folder) / CONFIG
    try:
        there = path.is_file()
        text = path.read_bytes() if there else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    if not there:
        raise CheckpointError(
            f"{folder} has no {CONFIG}, which says what the model is; needs a model's folder, or "
            "HeadNorm.from_safetensors with kind, eps, weight_offset and rounding"
        )
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); needs a model's {CONFIG}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} holds a {type(read).__name__}; needs a JSON object")
    return read


def files(path: Any, *, variant: str | None = None) -> dict[str, Path]:
    """Return which file holds which tensor; parameters and errors are those of `headers`."""
    path = Path(path)
    singles, indices = _names(variant)
    try:
        if not path.is_dir():
            return dict.fromkeys(_keys(path), path)
        for single, index in zip(singles, indices, strict=True):
            if (path / single).is_file():
                return dict.fromkeys(_keys(path / single), path / single)
            if (path / index).is_file():
                return _indexed(path / index)
        listed = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    raise CheckpointError(f"{path} holds {listed}; needs {singles[0]} or {indices[0]}")


def survey(
    path: Any, *, variant: str | None = None
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Path]]:
    """
    Return dtype, as safetensors spells it, and shape of every tensor, and the file that holds it.

    No tensor's data is read. Tensors of a shard that its index does not name are among them:
    transformers loads them too.

    Parameters
    ----------
    path : path-like
        As for `read_norm`.
    variant : str, optional
        ``"fp16"`` for ``model.fp16.safetensors``, or its index and shards.

    Raises
    ------
    CheckpointError
        Beside the errors of `read_norm`: two shards hold one tensor, or a shard lacks what the
        index puts there.
    """
    where = files(path, variant=variant)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    holder: dict[str, Path] = {}
    for file_path in dict.fromkeys(where.values()):
        with _open(file_path) as file:
            for name in file.keys():  # noqa: SIM118  a safe_open is no mapping
                other = holder.setdefault(name, file_path)
                if other != file_path:
                    raise CheckpointError(
                        f"{other} and {file_path} both hold {name}; needs one file for each tensor"
                    )
                stored = file.get_slice(name)
                found[name] = (stored.get_dtype(), tuple(stored.get_shape()))
    for name, file_path in where.items():
        if holder.get(name) != file_path:
            raise CheckpointError(f"{file_path} lacks {name}, which the index puts there")
    return found, holder


def read_norm(
    path: Any, key: str, *, variant: str | None = None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """
    Read ``<key>.weight`` and ``<key>.bias``, of which one may be missing.

    Where neither is there, but a module a head (``<key>.norms.0.weight``, StableLM's), theirs are
    stacked, ``(num_heads, head_dim)``.

    Parameters
    ----------
    path : path-like
        A safetensors file, or a folder with ``model.safetensors`` or, failing that, with
        ``model.safetensors.index.json`` and its shards: transformers' order. Then the same with
        diffusers' ``diffusion_pytorch_model``.
    key : str
        The module's name in the file, such as ``model.layers.0.self_attn.q_norm``.
    variant : str, optional
        Part of the files' names, such as ``"fp16"``.

    Raises
    ------
    CheckpointError
        Nothing readable is there, a shard is missing or lies outside the folder, or the key is
        not found; the message lists near matches.
    TypeError
        The tensor's dtype is not float16, bfloat16, float32 or float64 (float8, say).
    """
    where = files(path, variant=variant)
    arrays = []
    for part in ("weight", "bias"):
        whole, heads = f"{key}.{part}", heads_of(where, key, part)
        if whole in where:
            arrays.append(_read(where[whole], whole))
        else:
            arrays.append(read_heads(where, heads) if heads else None)
    if all(array is None for array in arrays):
        raise CheckpointError(
            f"{path} has no tensor {key}.weight; needs one of its keys, such as "
            + _near(key, list(where))
        )
    return arrays[0], arrays[1]


def heads_of(names: Iterable[str], key: str, part: str) -> list[str]:
    """
    Return the tensors ``<key>.norms.<head>.<part>`` among `names`, by number of head.

    Raises
    ------
    CheckpointError
        A head is missing between them.
    """
    pattern = re.compile(re.escape(f"{key}.norms.") + rf"(0|[1-9][0-9]{{0,5}})\.{part}")
    heads = sorted(int(found[1]) for found in map(pattern.fullmatch, names) if found)
    for wanted, head in enumerate(heads):
        if wanted != head:
            raise CheckpointError(
                f"{head_name(key, head, part)} is there and {head_name(key, wanted, part)} is not; "
                f"needs every head from 0 to {heads[-1]}"
            )
    return [head_name(key, head, part) for head in heads]


def head_name(key: str, head: int, part: str) -> str:
    """Return the tensor of one head where each has a module of its own."""
    return f"{key}.norms.{head}.{part}"


def read_one(where: Mapping[str, Path], name: str) -> np.ndarray:
    """Read a tensor of which `files` says where it is; errors are those of `read_norm`."""
    return _read(where[name], name)


def read_heads(where: Mapping[str, Path], names: Iterable[str]) -> np.ndarray:
    """Read tensors of one head each, stacked; errors are those of `read_norm`."""
    names = list(names)
    arrays = [_read(where[name], name) for name in names]
    kinds = {(array.dtype.name, array.shape) for array in arrays}
    if len(kinds) > 1:
        told = " and ".join(f"{dtype} {shape}" for dtype, shape in sorted(kinds))
        raise CheckpointError(f"{names[0]} and its like are {told}; needs one dtype and shape")
    return np.stack(arrays)


def tensor_names(path: Any) -> list[str]:
    """Return the names of all tensors of a file or folder."""
    return sorted(files(path))


def read_tensor(path: Any, name: str, *, variant: str | None = None) -> np.ndarray:
    """Read one tensor by its full name; errors are those of `read_norm`."""
    where = files(path, variant=variant)
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


def _names(variant: str | None) -> tuple[list[str], list[str]]:
    """Return the names that single files and indices may have, in order."""
    if variant is not None and (not isinstance(variant, str) or set(variant) & set('/\\:\0"')):
        raise CheckpointError(
            f"variant is {variant!r}; needs a part of a file's name, such as 'fp16'"
        )
    part = f".{variant}" if variant else ""
    return (
        [f"{stem}{part}.safetensors" for stem in _STEMS],
        [f"{stem}.safetensors.index{part}.json" for stem in _STEMS],
    )


def _indexed(index: Path) -> dict[str, Path]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        for name, value in pairs:
            if isinstance(value, str) and members[name] != value:
                raise CheckpointError(
                    f"{index} puts {name} in {value!r} and in {members[name]!r}; "
                    "needs one file for each tensor"
                )
        return members

    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=once)["weight_map"]
        entries = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index ({type(error).__name__}: {error}); "
            'needs JSON with a "weight_map" of tensor names to shards'
        ) from error
    files = {}
    shards: dict[str, Path] = {}
    for name, shard in entries:
        # Links are followed, as download caches use them; names that climb out are not.
        parts = {*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts}
        if ".." in parts or PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).anchor:
            raise CheckpointError(
                f"{index} puts {name} in {shard!r}, outside its folder; needs a path inside"
            )
        files[name] = shards.setdefault(shard, index.parent / shard)
    return files


def _open(path: Path) -> Any:
    import ml_dtypes  # noqa: F401  registers bfloat16, which safetensors asks NumPy for
    import safetensors

    try:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; needs a safetensors file")
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
