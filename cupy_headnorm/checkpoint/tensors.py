"""Tensors of safetensors files, whole or in shards: what there is, reading, writing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm.checkpoint.files import (
    CheckpointError,
    files,
    keys_of,
    open_file,
    short,
    stale_index,
)

__all__ = [
    "heads_of",
    "read_many",
    "read_norm",
    "read_tensor",
    "stacked",
    "survey",
    "tensor_names",
    "write_norm",
    "written_by_mlx",
]

_LONGEST_NAME = 1000
LACKING = "lacking"
"""Stands for the dtype of a tensor that an index names and its file has not."""
WEIGHTS = ("weight", "scale", "gamma")
"""What a norm's weight is called, by torch's modules first, then by JAX's."""


def survey(
    path: Any, *, variant: str | None = None
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Path], tuple[str, ...]]:
    """
    Return dtype, as safetensors spells it, and shape of every tensor, and the file that holds it.

    No tensor's data is read. Tensors of a shard that its index does not name are among them:
    transformers loads them too. One that its shard lacks has the dtype `LACKING`. Last are notes:
    what of the index is not so.

    Parameters
    ----------
    path : path-like
        As for `read_norm`.
    variant : str, optional
        ``"fp16"`` for ``model.fp16.safetensors``, or its index and shards.

    Raises
    ------
    CheckpointError
        Beside the errors of `read_norm`: two shards hold one tensor; a name is longer than 1000
        characters.
    """
    where = files(path, variant=variant)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    holder: dict[str, Path] = {}
    for file_path in dict.fromkeys(where.values()):
        with open_file(file_path) as file:
            for name in file.keys():  # noqa: SIM118  a safe_open is no mapping
                if len(name) > _LONGEST_NAME:
                    raise CheckpointError(
                        f"{file_path} has a tensor's name of {len(name)} characters, "
                        f"{name[:40]}...; needs {_LONGEST_NAME} at most"
                    )
                other = holder.setdefault(name, file_path)
                if other != file_path:
                    raise CheckpointError(
                        f"{other} and {file_path} both hold {name}; needs one file for each tensor"
                    )
                stored = file.get_slice(name)
                found[name] = (stored.get_dtype(), tuple(stored.get_shape()))
    lacking = [name for name, file_path in where.items() if holder.get(name) != file_path]
    elsewhere = next((name for name in lacking if name in holder), None)
    if elsewhere is not None:
        raise CheckpointError(
            f"{where[elsewhere]} lacks {elsewhere}, which the index puts there and "
            f"{holder[elsewhere]} holds; needs one file for each tensor"
        )
    for name in lacking:
        found[name], holder[name] = (LACKING, ()), where[name]
    notes = [*stale_index(path, where.values(), variant)]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        notes.append(f"{where[lacking[0]].name} lacks {lacking[0]}{more}, which the index names")
    return found, holder, tuple(notes)


def written_by_mlx(paths: Iterable[Path]) -> set[Path]:
    """Return the files whose metadata says that MLX wrote them."""
    found = set()
    for path in set(paths):
        with open_file(path) as file:
            if (file.metadata() or {}).get("format") == "mlx":
                found.add(path)
    return found


def read_norm(
    path: Any, key: str, *, variant: str | None = None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """
    Read ``<key>.weight`` and ``<key>.bias``, of which one may be missing.

    Without a ``.weight``, ``<key>.scale`` or ``<key>.gamma`` is the weight. Where neither is there,
    but a module a head (``<key>.norms.0.weight``, StableLM's), theirs are stacked,
    ``(num_heads, head_dim)``.

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
        Nothing readable is there, a shard is missing or is named by a path, or the key is not
        found; the message lists near matches.
    TypeError
        The tensor's dtype is not float16, bfloat16, float32 or float64 (float8, say).
    """
    where = files(path, variant=variant)

    def array(part: str) -> np.ndarray | None:
        whole, heads = f"{key}.{part}", heads_of(where, key, part)
        if whole in where:
            return _read_one(where, whole)
        return stacked(read_many(where, heads)) if heads else None

    bias = array("bias")
    weight = next((found for part in WEIGHTS if (found := array(part)) is not None), None)
    if weight is None and bias is None:
        raise CheckpointError(
            f"{path} has no tensor {key}.weight; needs one of its keys, such as "
            + _near(key, list(where))
        )
    return weight, bias


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
                f"{_head_name(key, head, part)} is there and "
                f"{_head_name(key, wanted, part)} is not; needs every head from 0 to {heads[-1]}"
            )
    return [_head_name(key, head, part) for head in heads]


def _head_name(key: str, head: int, part: str) -> str:
    """Return the tensor of one head where each has a module of its own."""
    return f"{key}.norms.{head}.{part}"


def _read_one(where: Mapping[str, Path], name: str) -> np.ndarray:
    """Read a tensor of which `files` says where it is; errors are those of `read_norm`."""
    return read_many(where, [name])[name]


def read_many(where: Mapping[str, Path], names: Iterable[str]) -> dict[str, np.ndarray]:
    """
    Read tensors in the order of `names`, each file opened once; errors are those of `read_norm`.

    To open a file is to parse all of its header: of a long one, for each of its tensors, that
    takes hours.
    """
    names = list(names)
    of_file: dict[Path, list[str]] = {}
    for name in names:
        of_file.setdefault(where[name], []).append(name)
    read = dict(read for path, own in of_file.items() for read in _read(path, own))
    return {name: read[name] for name in names}


def stacked(heads: Mapping[str, np.ndarray]) -> np.ndarray:
    """
    Stack tensors of one head each, by name.

    Raises
    ------
    CheckpointError
        They differ in dtype or shape.
    """
    kinds = {(array.dtype.name, array.shape) for array in heads.values()}
    if len(kinds) > 1:
        told = " and ".join(f"{dtype} {short(shape)}" for dtype, shape in sorted(kinds))
        raise CheckpointError(
            f"{next(iter(heads))} and its like are {told}; needs one dtype and shape"
        )
    return np.stack(list(heads.values()))


def tensor_names(path: Any) -> list[str]:
    """Return the names of all tensors of a file or folder."""
    return sorted(files(path))


def read_tensor(path: Any, name: str, *, variant: str | None = None) -> np.ndarray:
    """Read one tensor by its full name; errors are those of `read_norm`."""
    where = files(path, variant=variant)
    if name not in where:
        near = difflib.get_close_matches(name, list(where), n=3, cutoff=0.5) or sorted(where)[:3]
        raise CheckpointError(f"{path} has no tensor {name}; it has {', '.join(near) or 'none'}")
    return _read_one(where, name)


def write_norm(path: Any, key: str, weight: np.ndarray | None, bias: np.ndarray | None) -> None:
    """
    Write ``<key>.weight`` and ``<key>.bias`` to a safetensors file of their own.

    A file that holds other tensors is refused and stays as it is.
    """
    import safetensors
    from safetensors.numpy import save_file

    given = {f"{key}.weight": weight, f"{key}.bias": bias}
    tensors = {name: array for name, array in given.items() if array is not None}
    if not tensors:
        raise ValueError("the norm has neither weight nor bias; needs one to be written")
    try:
        there = Path(path).exists()
        others = sorted(set(keys_of(Path(path))) - given.keys()) if there else []
        if others:
            raise CheckpointError(
                f"{path} exists and holds {others[0]} among {len(others)} other tensors, which "
                "would be lost; needs a file of its own"
            )
        save_file(tensors, path, metadata={"format": "pt"})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be written ({error})") from error


def _near(key: str, names: list[str]) -> str:
    stems = sorted({name.rpartition(".")[0] for name in names})
    near = difflib.get_close_matches(key, stems, n=3, cutoff=0.5) or stems[:3]
    return ", ".join(near) if near else "none: it holds no tensors"


def _read(path: Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    import safetensors

    with open_file(path) as file:
        held = set(file.keys())
        for name in names:
            if name not in held:
                raise CheckpointError(f"{path} lacks {name}, which the index puts there")
            stored = file.get_slice(name).get_dtype()
            if stored not in dtypes.BY_SAFETENSORS:
                raise TypeError(
                    f"{name} has dtype {stored}; needs {' or '.join(dtypes.BY_SAFETENSORS)}"
                )
            try:
                yield name, file.get_tensor(name)
            except (safetensors.SafetensorError, ValueError) as error:
                # NumPy refuses shapes that safetensors allows: of 65 axes, or (0, 2**63).
                raise CheckpointError(f"{path} cannot give {name} ({error})") from error
