"""Which head norms a model has: its config.json and tensor headers, read by rows of `models`."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm.checkpoint import files
from cupy_headnorm.checkpoint import tensors as checkpoint_tensors
from cupy_headnorm.checkpoint.files import CheckpointError, short
from cupy_headnorm.checkpoint.folder import model_folder
from cupy_headnorm.checkpoint.layers import (
    PLACE,
    Group,
    Tower,
    Towers,
    groups_of,
    model_type_of,
)
from cupy_headnorm.checkpoint.norms import (
    ARGUMENTS,
    Found,
    ModelNorm,
    ModelNorms,
    Refused,
    Tensors,
    UnknownModelError,
    looks_like_a_norm,
    one_each,
    refuse,
    supported,
)
from cupy_headnorm.checkpoint.reader import Reader

_MOST_LISTED = 8
_MLX_KEEPS = {"gemma3", "gemma3_text", "minimax_m3_vl", "minimax_m3_vl_text"}
"""
Model types whose norms add 1 in MLX too: their conversions hold the weight as transformers does.
Those of qwen3_next, qwen3_5*, step3p5 and step3p7 hold 1 + weight, of qwen4_exp some do; of others
nothing is known.
"""
_NEAR_ONE = 0.5
"""
From 1: MLX's reader of step3p5 takes a weight of a mean of half or more for 1 + weight. Means of
published Qwen 3.5 and 4 conversions are 0.94 to 1.22, of weights without the 1 -0.06 and 0.22.
"""
_TRAINED_NEAR_ONE = {"gemma3", "gemma3_text"}
"""Whose weights' means are near 1 without the 1: Gemma 3 270M's are 0.81 for q and 1.27 for k."""


def find(config: Mapping[str, Any], tensors: Tensors, *, full_width: bool = False) -> ModelNorms:
    """
    Find every head norm of a model.

    Parameters
    ----------
    config : mapping
        What config.json holds.
    tensors : mapping
        Dtype, as safetensors spells it, and shape by name: of files, or of a module's state dict.
    full_width : bool, optional
        Give norms over all heads together as norms of one head, instead of refusing them.

    Raises
    ------
    CheckpointError
        A shape contradicts config.json or a projection; a head of a list is missing.
    UnknownModelError
        No part of the model is known, and there are tensors that look like head norms.
    """
    top = model_type_of(config)
    norms: list[ModelNorm] = []
    refused: list[Refused] = []
    unclaimed: list[Refused] = []
    notes: list[str] = []
    known = False
    flags: dict[str, Any] = {}  # those that are on; None once one of its norms is found
    towers = Towers(config)
    counted: set[str] = set()  # towers whose layers config.json has counted
    for group in groups_of(tensors):
        tower = towers.of(group)
        taken: set[str] = set()
        family = tower.family
        if family is not None:
            known = True
            # Of several groups for one tower the first alone: each would have all those layers.
            first = not group.label and family.tower not in counted
            counted |= {family.tower} if first else set()
            reader = Reader(group, family, tower.config, tower.model_type, tensors, first)
            own = list(reader.norms(full_width))
            norms += [norm for norm in own if isinstance(norm, ModelNorm)]
            refused += [norm for norm in own if isinstance(norm, Refused)]
            if reader.flag:
                flags.setdefault(family.flag, reader.flag)
                if own:
                    flags[family.flag] = None
            if family.refused and not own:
                notes.append(f"{tower.model_type}: {family.refused}")
            taken = reader.taken
        unclaimed += _unclaimed(group, tower, taken, tensors)
    if unclaimed and not known:
        raise UnknownModelError(
            f"nothing is known of {top}, and these tensors look like head norms: "
            f"{_listed(unclaimed)}; needs kind, eps, weight_offset and rounding: {ARGUMENTS}"
        )
    notes += [
        f"config.json's {flag} is {short(value)}; no tensor of a norm is there"
        for flag, value in flags.items()
        if value
    ]
    if not known:
        notes.append(f"nothing is known of {top}, and no tensor looks like a head norm")
    elif not (norms or refused or unclaimed or notes):
        notes.append(f"no tensor of a head norm of {top} is there")
    refused += dict.fromkeys(unclaimed)
    found = ModelNorms(top, tuple(norms), tuple(refused), tuple(dict.fromkeys(notes)))
    found.keyed()  # refuses two norms in one place
    return found


def _unclaimed(group: Group, tower: Tower, taken: set[str], tensors: Tensors) -> Iterator[Refused]:
    """Yield the tensors of a group that no role claims and that look like a head norm's."""
    what = tower.model_type if tower.family is None else f"such a norm of {tower.model_type}"
    reason = f"nothing is known of {what}; {ARGUMENTS} would say it"
    for layer, rests in group.layers.items():
        for rest, name in rests.items():
            if name not in taken and looks_like_a_norm(rest):
                module = re.sub(r"(\.norms\.\d+)?\.\w+$", "", name)
                dtype, shape = tensors[name]
                label = group.label or "text"
                yield Refused(module, label, layer, "", tuple(shape), dtype, reason, unknown=True)


class Survey(NamedTuple):
    """A model's folder: what is in it, and where."""

    config: dict[str, Any]
    tensors: Tensors
    where: Mapping[str, Path]
    """The file that holds each tensor."""
    found: ModelNorms


def survey(folder: Any, *, variant: str | None = None, full_width: bool = False) -> Survey:
    """Read a folder's config and headers and `find` its norms; errors are those of all three."""
    folder = model_folder(folder)
    config = files.config(folder)
    tensors, where, notes = checkpoint_tensors.survey(folder, variant=variant)
    found = find(config, tensors, full_width=full_width)
    found = found._replace(notes=(*notes, *found.notes))
    return Survey(config, tensors, where, _without_sums(found, where))


def _without_sums(found: ModelNorms, where: Mapping[str, Path]) -> ModelNorms:
    """Refuse norms of which MLX may have written 1 + weight, where the model adds 1 itself."""
    doubtful = [n for n in found.norms if n.weight_offset and n.model_type not in _MLX_KEEPS]
    mlx = checkpoint_tensors.written_by_mlx(where[name] for n in doubtful for name in n.weights)
    sums = {n for n in doubtful if where[n.weights[0]] in mlx}
    if not sums:
        return found
    refused = tuple(
        refuse(
            norm,
            f"MLX wrote its file, and may have stored 1 + weight, to which {norm.model_type} adds "
            f"1 again; needs HeadNorm.from_safetensors(path, key, kind={norm.kind!r}, "
            f"eps={norm.eps:g}, rounding={norm.rounding!r}, weight_offset=) with 0 for stored "
            "sums, whose mean is near 1, else 1",
            unknown=True,
        )
        for norm in found.norms
        if norm in sums
    )
    kept = tuple(norm for norm in found.norms if norm not in sums)
    return found._replace(norms=kept, refused=found.refused + refused)


def read(
    folder: Any, key: str, *, variant: str | None = None, full_width: bool = False
) -> tuple[ModelNorm, np.ndarray | None, np.ndarray | None]:
    """
    Read one norm of a model: what the model computes, its weight and its bias.

    Parameters
    ----------
    folder : path-like
        With config.json and the tensors.
    key : str
        The module's name, on disk or in memory: prefixes may differ where one norm fits.
    variant : str, optional
        Part of the files' names, such as ``"fp16"``.
    full_width : bool, optional
        Read a norm over all heads together as a norm of one head.

    Raises
    ------
    CheckpointError
        The key is not found, or the norm is refused; beside the errors of `survey`.
    UnknownModelError
        Nothing is known of the model or of this norm.
    TypeError
        The key is no string.
    """
    if not isinstance(key, str):
        raise TypeError(f"key is {key!r}; needs a norm's name")
    _, tensors, where, found = survey(folder, variant=variant, full_width=full_width)
    norms: list[Found] = [*found.norms, *found.refused]
    every = {norm.name: norm for norm in reversed(norms)}
    norm = every.get(key) or _under_another_prefix(every, key)
    stored = [f"{key}.{part}" for part in checkpoint_tensors.WEIGHTS if f"{key}.{part}" in tensors]
    if norm is None and stored:
        raise UnknownModelError(
            f"{folder} has {stored[0]}, of which nothing is known; {ARGUMENTS} would say it"
        )
    if norm is None:
        near = difflib.get_close_matches(key, list(every), n=3, cutoff=0.5) or list(every)[-3:]
        what = f"needs one of its, such as {', '.join(near)}" if near else "; ".join(found.notes)
        raise CheckpointError(f"{folder} has no head norm {key}; {what}")
    described = supported(norm)
    return described, *load(where, described)


def load(where: Mapping[str, Path], norm: ModelNorm) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read the weight and the bias of a norm; `survey` says where they are."""
    return load_all(where, [norm])[0]


def load_all(
    where: Mapping[str, Path], norms: Sequence[ModelNorm]
) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Read the weights and biases of norms, opening each file once."""
    parts = [names for norm in norms for names in (norm.weights, norm.biases)]
    read = checkpoint_tensors.read_many(where, itertools.chain.from_iterable(parts))

    def array(norm: ModelNorm, names: tuple[str, ...]) -> np.ndarray | None:
        if one_each(norm.name, names):
            return checkpoint_tensors.stacked({name: read[name] for name in names})
        return read[names[0]] if names else None

    return [(array(norm, norm.weights), array(norm, norm.biases)) for norm in norms]


def _under_another_prefix(every: Mapping[str, Found], key: str) -> Found | None:
    """Return the one norm that differs from `key` in its prefix, of the same tower."""

    def place(name: str) -> tuple[str, ...] | None:
        found = PLACE.fullmatch(name)
        if not found:
            return None
        label = Group(found["prefix"] or "", found["stack"], {}).label
        return label, found["stack"], found["layer"], found["rest"]

    wanted = place(key)
    fits = [norm for name, norm in every.items() if wanted and place(name) == wanted]
    return fits[0] if len(fits) == 1 else None


def note_of_mean(norm: ModelNorm, mean: float | None) -> str:
    """Return what the mean of a norm's stored weights makes worth knowing, or nothing."""
    likely = norm.weight_offset and norm.model_type not in _TRAINED_NEAR_ONE
    if not likely or mean is None or abs(mean - 1) > _NEAR_ONE:
        return ""
    return (
        f"{norm.model_type} adds {norm.weight_offset:g} to weights whose mean is {mean:.3g}: near "
        "1, as if the file held the sums already; if it does, weight_offset=0 is right"
    )


def without_layer(name: str) -> str:
    """Return a module's name with a star for its layer."""
    place = PLACE.fullmatch(name)
    return f"{name[: place.start('layer')]}*{name[place.end('layer') :]}" if place else name


def ranges(layers: list[int]) -> str:
    """Write layers as ``"0-4, 6-10, 12"``."""
    told = []
    for _, run in itertools.groupby(enumerate(sorted(layers)), lambda at: at[1] - at[0]):
        numbers = [layer for _, layer in run]
        told.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(told)


def _listed(unclaimed: list[Refused]) -> str:
    alike: dict[str, list[int]] = {}
    for norm in dict.fromkeys(unclaimed):
        told = f"{without_layer(norm.name)} {norm.dtype} {short(norm.shape)}"
        alike.setdefault(told, []).append(norm.layer)
    listed = [f"{told} in layers {ranges(layers)}" for told, layers in alike.items()]
    more = [f"{len(listed) - _MOST_LISTED} more"] if len(listed) > _MOST_LISTED else []
    return ", ".join(listed[:_MOST_LISTED] + more)
