"""What `inspect` says of a checkpoint: as plain data, and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cupy_headnorm.bench import text
from cupy_headnorm.checkpoint import survey
from cupy_headnorm.checkpoint.files import short
from cupy_headnorm.checkpoint.norms import ModelNorm, Refused

_SAME = (
    "role", "tower", "kind", "eps", "weight_offset", "rounding", "result", "num_heads", "head_dim",
    "heads_axis", "shape", "dtype", "rope", "notes",
)  # fmt: skip
"""What the layers of one row have in common."""

_Arrays = tuple[np.ndarray | None, np.ndarray | None]
"""Weight and bias."""


def collect(folder: str, variant: str | None = None) -> dict[str, Any]:
    """
    Describe a model's head norms in plain data, layers that are alike together.

    Returns
    -------
    dict
        ``checkpoint``, ``variant``, ``model_type``, ``norms``, ``refused`` and ``notes``. A
        norm's ``weight`` and ``bias`` are the least, the largest and the mean value and the
        standard deviation over all its layers, as stored, or None.
    """
    _, _, where, found = survey.survey(folder, variant=variant)
    supported: dict[Any, list[tuple[str, ModelNorm]]] = {}
    refused: dict[Any, list[Refused]] = {}
    keyed = found.keyed()
    norms = [norm for norm in keyed.values() if isinstance(norm, ModelNorm)]
    loaded = dict(zip(norms, survey.load_all(where, norms), strict=True))
    for (_, role), norm in keyed.items():
        if isinstance(norm, ModelNorm):
            alike = tuple(getattr(norm, name) for name in _SAME)
            supported.setdefault((role, alike), []).append((role, norm))
    for norm in found.refused:
        place = survey.without_layer(norm.name)
        refused.setdefault((place, norm.shape, norm.dtype, norm.reason), []).append(norm)
    return {
        "checkpoint": str(folder),
        "variant": variant,
        "model_type": found.model_type,
        "norms": [_row(loaded, alike) for alike in supported.values()],
        "refused": [
            {
                "name": place,
                "layers": [norm.layer for norm in alike],
                "role": alike[0].role,
                "shape": list(shape),
                "dtype": dtype,
                "reason": reason,
            }
            for (place, shape, dtype, reason), alike in refused.items()
        ],
        "notes": list(found.notes),
    }


def _row(loaded: Mapping[ModelNorm, _Arrays], alike: list[tuple[str, ModelNorm]]) -> dict[str, Any]:
    role, first = alike[0]
    weights, biases = zip(*(loaded[norm] for _, norm in alike), strict=True)
    weight = _statistics(weights)
    note = survey.note_of_mean(first, weight["mean"] if weight else None)
    return {
        "name": survey.without_layer(first.name),
        "layers": [norm.layer for _, norm in alike],
        **{name: getattr(first, name) for name in _SAME},
        "role": role,
        "shape": list(first.shape),
        "rope": first.rope._asdict(),
        "notes": [*first.notes, *filter(None, [note])],
        "weight": weight,
        "bias": _statistics(biases),
    }


def _statistics(arrays: Iterable[np.ndarray | None]) -> dict[str, float | None] | None:
    values = [array.ravel().astype(np.float64) for array in arrays if array is not None]
    if not values:
        return None
    joined = np.concatenate(values)
    with np.errstate(invalid="ignore", over="ignore"):
        found = {
            "min": joined.min(), "max": joined.max(), "mean": joined.mean(), "std": joined.std(),
        }  # fmt: skip
    # JSON has no word for what is not finite.
    return {name: float(value) if np.isfinite(value) else None for name, value in found.items()}


def show(found: dict[str, Any]) -> None:
    """Print what `collect` returns."""
    print("\n".join(_told(found)))


def _told(found: dict[str, Any]) -> Iterator[str]:
    title = f"{found['model_type']} in {found['checkpoint']}"
    title += "" if found["variant"] is None else f", {found['variant']}"
    yield text.printable(title)
    if found["norms"]:
        yield from text.table(_NORMS, _norms(found["norms"]))
        yield "\nNames, and values as stored over all layers of a row"
        yield from text.table(_VALUES, _values(found["norms"]), right=_VALUES[3:])
    else:
        yield "no head norm is supported"
    if found["refused"]:
        yield "\nRefused"
        rows = [
            (_layers(norm), norm["name"], _shape(norm["shape"]), norm["dtype"], norm["reason"])
            for norm in found["refused"]
        ]  # fmt: skip
        yield from text.table(("layers", "norm", "shape", "dtype", "why"), rows)
    notes: dict[str, list[str]] = {note: [] for note in found["notes"]}
    for norm in found["norms"]:
        for note in filter(None, (*norm["notes"], norm["rope"]["note"])):
            notes.setdefault(note, []).append(norm["role"])
    if notes:
        yield ""
    for note, roles in notes.items():
        whose = f"{', '.join(dict.fromkeys(roles))}: " if roles else ""
        yield from text.wrapped(text.printable(f"Note: {whose}{note}"), "  ", "")


def _layers(norm: dict[str, Any]) -> str:
    return survey.ranges(norm["layers"])


def _shape(shape: list[int]) -> str:
    return short(tuple(shape)) if shape else "none"


_NORMS = (
    "layers", "role", "shape", "dtype", "heads", "kind", "offset", "eps", "rounding", "RoPE",
)  # fmt: skip


def _norms(norms: list[dict[str, Any]]) -> Iterator[Sequence[str]]:
    for norm in norms:
        rope = norm["rope"]
        words = [rope["order"]]
        if rope["order"] != "none":
            words.append(rope["style"])
            if rope["partial"] != 1:
                words.append(f"{rope['partial']:g} of head_dim")
        yield (
            _layers(norm), norm["role"], _shape(norm["shape"]), norm["dtype"],
            str(norm["num_heads"] or "any"), norm["kind"], f"{norm['weight_offset']:g}",
            f"{norm['eps']:g}", norm["rounding"], ", ".join(words),
        )  # fmt: skip


_VALUES = ("layers", "norm", "tensor", "min", "max", "mean", "std")


def _values(norms: list[dict[str, Any]]) -> Iterable[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for norm in norms:
        parts = [part for part in ("weight", "bias") if norm[part] is not None]
        for part in parts:
            numbers = (
                "not finite" if value is None else f"{value:.4g}" for value in norm[part].values()
            )
            rows.append((_layers(norm), norm["name"], part, *numbers))
        if not parts:
            rows.append((_layers(norm), norm["name"], "none", *[""] * 4))
    return dict.fromkeys(rows)  # q and k may be of one module
