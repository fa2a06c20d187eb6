"""From what a caller names to the folder that holds it: on the disk, or in the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cupy_headnorm.checkpoint.files import CONFIG, CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PIPELINE = "model_index.json"
"""At the root of a folder of diffusers, whose models lie in folders below."""


def model_folder(path: Any) -> Path:
    """
    Return the folder of a model.

    A hub id such as ``Qwen/Qwen3-0.6B`` is that of its snapshot in huggingface_hub's cache, where
    there is one and the package is installed; a folder of the name wins, and nothing is downloaded.

    Raises
    ------
    CheckpointError
        There is no such folder, or it is a file or the root of a pipeline; the message names the
        folder to give, or the call that downloads it.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            if not (folder / CONFIG).exists() and (folder / _PIPELINE).is_file():
                raise CheckpointError(_pipeline(folder))
            return folder
        if folder.exists():
            raise CheckpointError(
                f"{path} is a file; needs the model's folder, {folder.parent}, with its {CONFIG}"
            )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a null character, of which no name has one
        raise CheckpointError(f"{path} is no path ({error}); needs a model's folder") from error
    name = str(path)
    if _HUB_ID.fullmatch(name) is None:
        raise CheckpointError(f"{path} does not exist; needs a model's folder")
    cached = _cached(name)
    if cached is None:
        raise CheckpointError(
            f"{path} is no folder, and no snapshot of it is in the cache of huggingface_hub; needs "
            f"a download first: huggingface_hub.snapshot_download({name!r}) returns its folder"
        )
    return cached


def _cached(name: str) -> Path | None:
    """Return the folder of a snapshot that the hub's package has downloaded before."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(name, CONFIG)
    if not isinstance(found, str):
        found = try_to_load_from_cache(name, _PIPELINE)
    return model_folder(Path(found).parent) if isinstance(found, str) else None


def _pipeline(folder: Path) -> str:
    inside = [entry.name for entry in folder.iterdir() if (entry / CONFIG).is_file()]
    models = sorted(inside, key=lambda name: (not name.startswith("transformer"), name))[:3]
    needed = " or ".join(str(folder / name) for name in models) or "a folder with its config.json"
    return f"{folder} is a pipeline of diffusers; needs the folder of one of its models, {needed}"
