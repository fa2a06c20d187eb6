"""
Rotary embeddings of models: what a config says of a layer's, and its family's row (`Rotary`).

Sources are lines of ``transformers/models/<name>/modeling_<name>.py`` in transformers 5.23.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cupy_headnorm.checkpoint import rotary
from cupy_headnorm.checkpoint.rotary import Layer
from cupy_headnorm.rope.frequencies import ROPE_TYPES, inverse_frequency

_LONGEST_HEAD = 1 << 16
"""A head has no more dims: of a norm without a weight config.json alone says how many."""


@contextlib.contextmanager
def of_any_values() -> Iterator[None]:
    """
    Raise ValueError where a field of a config is of no use: a list for a number, or zero.

    Any field may hold anything, and what it leads to is seen where it is used. Frequencies that
    are not finite `rope.Rope` refuses.
    """
    try:
        with np.errstate(all="ignore"):
            yield
    except rotary.UNREADABLE as error:
        if type(error) is ValueError and "; needs" in str(error):
            raise
        raise ValueError(
            f"the config's rotary embedding cannot be read ({type(error).__name__}: "
            f"{error!s:.200}); needs fields as transformers writes them"
        ) from error


def rotates(config: Mapping[str, Any], layer: int) -> bool:
    """Tell whether a layer of a model that has a rotary embedding applies it."""
    with of_any_values():
        of = rotary.of_layer(config, layer)
        return _rotates(of, of.family.rotary.unrotated)


def _rotates(of: Layer, unrotated: str) -> bool:
    if unrotated == "every nth":
        if of.text.get("no_rope_layers"):  # true where there is one: llama4:329
            return bool(of.get("no_rope_layers"))
        return bool((of.layer + 1) % of.get("no_rope_layer_interval"))
    only_sliding = unrotated == "full" or (
        unrotated == "full beside sliding"
        and of.text.get("sliding_window", "the class has one") is not None
    )
    for needed, name in (
        (only_sliding, "layer_types"),
        (unrotated == "without theta", "layer_rope_theta"),
    ):
        if needed and not of.text.get(name):
            raise ValueError(
                f"the config of {of.model_type} has no {name}; needs them, since some of its "
                "layers rotate nothing"
            )
    layer_type = of.get("layer_types") or "sliding_attention"
    params = of.text.get("rope_parameters") or {}
    if layer_type in params and params[layer_type] is None:  # beam:138
        return False
    if of.text.get("layer_rope_theta") and not of.get("layer_rope_theta"):  # muse_spark:663
        return False
    return not only_sliding or layer_type == "sliding_attention"


def read(
    config: Mapping[str, Any], layer: int, head_dim: int | None, max_position: int | None
) -> tuple[dict[str, Any], int]:
    """Return the fields of `rope.Rope` for one layer of a model, and the layer's head_dim."""
    of = rotary.of_layer(config, layer)
    text, model_type, family = of.text, of.model_type, of.family
    _refuse_unsupported(of)
    layer_type = of.get("layer_types")
    pattern = text.get("sliding_window_pattern") or family.rotary.pattern
    if layer_type is None and pattern:
        layer_type = "sliding_attention" if (layer + 1) % pattern else "full_attention"
    params = rotary.parameters(of, layer_type)
    theta = _theta(of, params, layer_type)
    head_dim = rotary.head_dim(of, layer_type, head_dim)
    if not 1 <= head_dim <= _LONGEST_HEAD:
        raise ValueError(f"head_dim is {head_dim}; needs 1 to {_LONGEST_HEAD}")
    partial = rotary.share(of, params, layer_type, head_dim)
    if params["rope_type"] == "dynamic" and params.get("alpha") and family.rotary.alpha:
        theta *= params["alpha"] ** (head_dim / (head_dim - 2))
        params["rope_type"] = "default"
    if params["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"RoPE of {model_type} is of type {params['rope_type']!r}; needs one of {ROPE_TYPES}, "
            "or a Rope by hand, whose calls are given cos and sin"
        )
    longest = text.get("max_position_embeddings", params.get("original_max_position_embeddings"))
    frequencies, scaling = inverse_frequency(params, theta, head_dim, partial, longest)
    sections, interleaved = _sections(of, params, len(frequencies))
    if max_position is None:
        max_position = of.get("max_position_embeddings")
        if max_position is None:
            raise ValueError(f"{model_type} has no max_position_embeddings; needs max_position=")
    fields = {
        "rotary_dim": 2 * len(frequencies),
        "inverse_frequency": tuple(frequencies.tolist()),
        "max_position": max_position,
        "style": rotary.style(of),
        "order": family.rope.order,
        "rounding": "once" if family.rotary.table else "every_op",
        "table": family.rotary.table or "x",
        "sections": sections,
        "interleaved_sections": interleaved,
        "attention_scaling": scaling,
    }
    return fields, head_dim


def _refuse_unsupported(of: Layer) -> None:
    family, row = of.family, of.family.rotary
    why = family.refused or row.refused
    if row.only_with and of.text.get(row.only_with[0]) != row.only_with[1]:
        flag, value = row.only_with
        why = f"it has none unless its config's {flag} is {value!r}"
    if family.rope.order == "none":
        why = "it has none"
    elif family.tower != "text":  # a picture's positions are coordinates, one for each pair
        why = f"its {family.tower} tower rotates by no table of a config"
    if why:
        raise ValueError(
            f"no rotary embedding of {of.model_type} is supported: {why}; "
            "needs a Rope by hand, whose calls are given cos and sin, or none"
        )
    if row.own_parameters and not (of.text.get("rope_scaling") or of.text.get("rope_parameters")):
        raise ValueError(
            f"the config of {of.model_type} has no rope_parameters; needs them, since its class "
            "has more of its own than a rope_theta"
        )


def _theta(of: Layer, params: Mapping[str, Any], layer_type: str | None) -> Any:
    row = of.family.rotary
    theta = params.get("rope_theta")
    if theta is None and row.full_alone and layer_type == "sliding_attention":
        theta = of.text.get("rope_local_base_freq", row.sliding_theta)
    if theta is None:
        theta = of.get("rope_theta")
    if of.text.get("layer_rope_theta"):  # in the model a truth value: muse_spark:645
        own = of.get("layer_rope_theta")
        theta = own and (params.get("rope_theta") or own)
    if theta is None and (of.text.get("rope_parameters") or row.theta):
        theta = row.theta or 1e4
    if not theta:
        raise ValueError(
            f"layer {of.layer} of {of.model_type} has rope_theta {theta}; needs a number"
        )
    return theta


def _sections(of: Layer, params: Mapping[str, Any], half: int) -> tuple[tuple[int, ...], bool]:
    """
    Return how many of `half` frequencies take each row of the positions.

    The second tells whether the rows interleave.
    """
    row = of.family.rotary
    sections = tuple(params.get("mrope_section") or params.get("xdrope_section") or ())
    if row.sections and not sections:
        # The first row takes what the others, clipped, leave.
        rows = enumerate(row.sections)
        others = [len(range(half)[row : 3 * size : 3]) for row, size in rows][1:]
        sections = (half - sum(others), *others)
    if row.alternating:
        sections = (half // 2,) * 2
    if sections and row.wide_sections:
        raise ValueError(
            f"sections of {of.model_type} are {sections} of twice as many dims: the dims of a pair "
            "rotate by different angles; needs a Rope by hand, whose calls are given cos and sin"
        )
    return sections, row.alternating or bool(row.sections)
