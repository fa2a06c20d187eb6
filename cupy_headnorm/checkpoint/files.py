"""
What lies in a checkpoint's folder: its config.json, and which file holds which tensor.

A folder may be anybody's. Whatever it holds, reading raises an error of this
module or TypeError, takes time and memory in proportion to the files, and opens no file but
those of the folder. Links in it are followed, since download caches are made of them
(``snapshots/x/model.safetensors -> ../../blobs/y``): who places links in a folder decides what is
read, who writes an index does not. A file that is changed while it is read is no case of this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_STEMS = ("model", "diffusion_pytorch_model")
"""Of files in a folder: transformers' name, then diffusers'."""
_NOT_IN_A_NAME = set('/\\:\0"')
"""Characters that no file's name has here, on any system."""
_LONGEST_JSON = 100_000_000
"""Bytes, as safetensors has it for headers; parsed they are many times as many."""
_DEEPEST_CONFIG = 64
"""So that whatever a config holds can be shown and compared without end of the stack."""
_LONGEST_MESSAGE = 4000


def short(value: Any, most: int = 60) -> str:
    """
    Write a value of a file for a message: as repr does, its first `most` characters.

    A value is written as far as it is shown: it may be all of a long file, and shown for each norm.
    """
    told, length = [], 0
    for piece in _pieces(value, most):
        told.append(piece)
        length += len(piece)
        if length >= most:
            break
    return "".join(told)[:most]


def _pieces(value: Any, most: int) -> Iterator[str]:
    """Yield what repr writes of a value of JSON or a shape, of a string no more than is needed."""
    if isinstance(value, dict):
        for number, (name, inner) in enumerate(value.items()):
            yield ", " if number else "{"
            yield from _pieces(name, most)
            yield ": "
            yield from _pieces(inner, most)
        yield "}" if value else "{}"
    elif isinstance(value, (list, tuple)):
        opening, closing = "[]" if isinstance(value, list) else "()"
        for number, inner in enumerate(value):
            yield ", " if number else opening
            yield from _pieces(inner, most)
        closing = f",{closing}" if closing == ")" and len(value) == 1 else closing
        yield closing if value else opening + closing
    else:
        yield repr(value[:most] if isinstance(value, str) else value)


class CheckpointError(ValueError):
    """
    A checkpoint is missing, damaged, or does not hold what was asked for.

    Its message is one line that steers no terminal, whatever names the files hold.
    """

    __module__ = "cupy_headnorm"

    def __init__(self, message: str) -> None:
        if not message.isprintable():
            message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


def config(folder: Any) -> dict[str, Any]:
    """
    Read a folder's config.json.

    Raises
    ------
    CheckpointError
        It is not there, holds no JSON object, or one that nests too deep.
    """
    path = Path(folder) / CONFIG
    try:
        if not path.is_file():
            told = f" (it {_no_file(path)})" if path.exists() else ""
            raise CheckpointError(
                f"{folder} has no {CONFIG}{told}, which says what the model is; needs a model's "
                "folder, or HeadNorm.from_safetensors with kind, eps, weight_offset and rounding"
            )
        read = _json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); needs a model's {CONFIG}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} holds a {type(read).__name__}; needs a JSON object")
    level: list[Any] = [read]
    for _ in range(_DEEPEST_CONFIG + 1):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise CheckpointError(f"{path} nests deeper than {_DEEPEST_CONFIG}; needs a model's config")
    return read


def files(path: Any, *, variant: str | None = None) -> dict[str, Path]:
    """Return which file holds which tensor; see `checkpoint.survey` for parameters and errors."""
    path = Path(path)
    singles, indices = _names(variant)
    try:
        if not path.is_dir():
            return dict.fromkeys(keys_of(path), path)
        for single, index in zip(singles, indices, strict=True):
            if (path / single).is_file():
                return dict.fromkeys(keys_of(path / single), path / single)
            if (path / index).is_file():
                indexed = _indexed(path / index)
                own = [] if any(shard.exists() for shard in set(indexed.values())) else _own(path)
                return _held_by(own) if own and variant is None else indexed
        own = _own(path) if variant is None else []
        if own:
            return _held_by(own)
        entries = sorted(path.iterdir(), key=lambda entry: entry.name)[:8]
        told = [f"{e.name}{'' if e.is_file() else ' (no file)'}" for e in entries]
        listed = ", ".join(told) or "nothing"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    raise CheckpointError(f"{path} holds {listed}; needs {singles[0]} or {indices[0]}")


def stale_index(path: Any, used: Iterable[Path], variant: str | None) -> Iterator[str]:
    """Yield a note where a folder's index names none of the files that are `used` in its place."""
    _, indices = _names(variant)
    names = sorted({file.name for file in used})
    for index in indices if Path(path).is_dir() else ():
        if names and (Path(path) / index).is_file():
            named = {shard.name for shard in _indexed(Path(path) / index).values()}
            if named.isdisjoint(names):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                yield f"{index} names files that are not there; read instead: {names[0]}{more}"
            return


_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def _own(folder: Path) -> list[Path]:
    """
    Return the one file or the shards that a folder holds under a name of their own.

    Conversions call them ``output.safetensors``, or ``output-00001-of-00002.safetensors``. One
    with a dot in it, ``model.fp16.safetensors``, is a variant, which is asked for.
    """
    sets: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_file() and "." not in path.stem:
            shard = _SHARD.fullmatch(path.name)
            sets.setdefault(f"{shard[1]}-*-of-{shard[3]}" if shard else path.name, []).append(path)
    if len(sets) > 1:
        raise CheckpointError(
            f"{folder} holds {' and '.join(list(sets)[:4])}; needs {SINGLE}, {INDEX} or one "
            "set of files"
        )
    for name, paths in sets.items():
        shard = _SHARD.fullmatch(paths[0].name)
        if shard and len(paths) != int(shard[3]):
            raise CheckpointError(f"{folder} holds {len(paths)} of {name}; needs all of them")
        return paths
    return []


def _held_by(paths: Iterable[Path]) -> dict[str, Path]:
    held: dict[str, Path] = {}
    for path in paths:
        for name in keys_of(path):
            other = held.setdefault(name, path)
            if other != path:
                raise CheckpointError(
                    f"{other} and {path} both hold {name}; needs one file for each tensor"
                )
    return held


def _names(variant: str | None) -> tuple[list[str], list[str]]:
    """Return the names that single files and indices may have, in order."""
    if variant is not None and (not isinstance(variant, str) or set(variant) & _NOT_IN_A_NAME):
        raise CheckpointError(
            f"variant is {variant!r}; needs a part of a file's name, such as 'fp16'"
        )
    part = f".{variant}" if variant else ""
    return (
        [f"{stem}{part}.safetensors" for stem in _STEMS],
        [f"{stem}.safetensors.index{part}.json" for stem in _STEMS],
    )


def _inside(value: Any) -> Iterable[Any]:
    """Return what a value of JSON holds."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _json(path: Path, of_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    size = path.stat().st_size
    if size > _LONGEST_JSON:
        raise CheckpointError(f"{path} has {size} bytes; needs {_LONGEST_JSON} at most")
    return json.loads(path.read_bytes(), object_pairs_hook=of_pairs)


def _indexed(index: Path) -> dict[str, Path]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        for name, value in pairs:
            if members[name] is not value and members[name] != value:
                raise CheckpointError(
                    f"{index} puts {name} in {short(value)} and in {short(members[name])}; "
                    "needs one file for each tensor"
                )
        return members

    try:
        entries = list(_json(index, once)["weight_map"].items())
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index ({type(error).__name__}: {error}); "
            'needs JSON with a "weight_map" of tensor names to shards'
        ) from error
    shards: dict[str, Path] = {}
    for name, shard in entries:
        # A path could lead out of the folder, be it through a link to another folder.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & _NOT_IN_A_NAME:
            raise CheckpointError(
                f"{index} puts {name} in {short(shard, 200)}; needs the name of a file beside it"
            )
        shards.setdefault(shard, index.parent / shard)
    return {name: shards[shard] for name, shard in entries}


def _no_file(path: Path) -> str:
    """Say of what is no file, and would be waited for or read without end, what it is."""
    if path.is_dir():
        return "is a folder"
    return "is a pipe, a device or a socket" if path.exists() else "does not exist"


def open_file(path: Path) -> Any:
    """Open a safetensors file, its header parsed."""
    import ml_dtypes  # noqa: F401  registers bfloat16, which safetensors asks NumPy for
    import safetensors

    try:
        if not path.is_file():
            raise CheckpointError(f"{path} {_no_file(path)}; needs a safetensors file")
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error


def keys_of(path: Path) -> list[str]:
    """Return the names of a file's tensors."""
    with open_file(path) as file:
        return list(file.keys())
