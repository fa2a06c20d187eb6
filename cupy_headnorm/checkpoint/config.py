"""Fields of a model's config.json, checked: any value may be there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from cupy_headnorm.checkpoint import rotary
from cupy_headnorm.checkpoint.files import CheckpointError, short
from cupy_headnorm.models.records import Family, ModelRope, Role

_MOST = 2**31 - 1
"""Of what a config counts."""
_MOST_ROPES = 100
"""Fields or types of layers; models have 15."""


class Fields:
    """Fields of one tower's config, with the config class's defaults behind them."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.family = family

    def given(self, name: str, layer: int | None = None) -> Any:
        """Return a field of config.json itself; of a list with a value a layer that of `layer`."""
        names = [name, *(other for other, own in self.family.aliases.items() if own == name)]
        value = next((v for n in names if (v := self.config.get(n)) is not None), None)
        if layer is not None and isinstance(value, (list, tuple)):
            value = value[layer] if layer < len(value) else None
        return value

    def get(self, name: str, layer: int | None = None) -> Any:
        """Return a field, as config.json or else the config class says it."""
        value = self.given(name, layer)
        return self.family.defaults.get(name) if value is None else value

    def count(self, name: str, layer: int | None = None) -> int | None:
        """Return a field that counts something; None if nothing says it."""
        if not name:
            return None
        value = self.get(name, layer)
        null = name in self.config and self.config[name] is None
        if name == "num_key_value_heads" and (value is None or null):
            # A null is as many as queries have, whatever the class's own value is.
            name = "num_attention_heads"
            value = self.get(name, layer)
        listed = self.given(name)
        if isinstance(listed, (list, tuple)) and layer is not None and layer >= len(listed):
            raise CheckpointError(
                f"config.json's {name} is of {len(listed)} layers; needs a value for layer {layer}"
            )
        if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
            raise CheckpointError(f"config.json's {name} is {short(value)}; needs 1 to {_MOST}")
        return value

    def head_dims(self, role: Role, layer: int) -> dict[str, int]:
        """Return every head_dim that the config allows, by the words that say it."""
        found = {}
        for rule in role.head_dim:
            if rule != "hidden":
                found[rule] = self.count(rule, layer)
                continue
            if any(self.given(other, layer) is not None for other in found):
                break  # models ask for it where there is no head_dim
            hidden, heads = self.count("hidden_size"), self.count("num_attention_heads", layer)
            if hidden and heads:
                found["hidden_size // num_attention_heads"] = hidden // heads
        return {rule: value for rule, value in found.items() if value}

    def eps(self, role: Role) -> float:
        """Return a role's eps."""
        value = self.get(role.eps) if isinstance(role.eps, str) else role.eps
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            raise CheckpointError(
                f"config.json's {role.eps} is {short(value)}; needs a number, 0 or more"
            )
        return float(value)

    def rope(self, rope: ModelRope, layer: int, head_dim: int) -> ModelRope:
        """Return `rope` with the share of head_dim that the model rotates by its config."""
        for name in ("rope_parameters", "rope_scaling"):
            given = self.config.get(name)
            if isinstance(given, Mapping) and len(given) > _MOST_ROPES:  # each layer looks at all
                raise CheckpointError(
                    f"config.json's {name} has {len(given)} fields; needs {_MOST_ROPES} at most"
                )
        # What cannot be read, or says two shares, `rope.Rope` refuses; a norm is one without it.
        with contextlib.suppress(*rotary.UNREADABLE):
            of = rotary.Layer(self.config, "", self.family, layer)
            layer_type = of.get("layer_types")
            parameters = rotary.parameters(of, layer_type)
            if parameters["rope_type"] != "proportional":
                share = rotary.share(of, parameters, layer_type, head_dim)
                return rope._replace(partial=share)
        return rope
