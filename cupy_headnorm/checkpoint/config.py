"""Fields of a model's config.json, checked: any value may be there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

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
        """Return `rope` with the share of head_dim that the config says, in old words or new."""
        shares: list[Any] = []
        for name in ("rope_parameters", "rope_scaling"):
            given = self.config.get(name)
            if not isinstance(given, Mapping):
                continue
            if len(given) > _MOST_ROPES:  # each layer looks at all of them
                raise CheckpointError(
                    f"config.json's {name} has {len(given)} fields; needs {_MOST_ROPES} at most"
                )
            # Some have one set for each type of layer.
            sets = {kind: nested for kind, nested in given.items() if isinstance(nested, Mapping)}
            kind = self.get("layer_types", layer)
            own = sets.get(kind) if isinstance(kind, str) else None
            chosen = [own] if own is not None else list(sets.values()) or [given]
            if any(each.get("rope_type") == "proportional" for each in chosen):
                return rope
            told = [each.get("partial_rotary_factor") for each in chosen]
            # Numbers only: to compare what else may be there takes as long as it is, each time.
            if all(type(share) in (int, float) and share == told[0] for share in told):
                shares.append(told[0])
        for name in ("partial_rotary_factor", "rotary_pct"):
            shares.append(self.get(name, layer))
        rotary_dim = self.get("rotary_dim", layer)
        whole = type(rotary_dim) is int and 0 < rotary_dim <= head_dim
        shares.append(rotary_dim / head_dim if whole else None)
        for share in shares:
            if type(share) in (int, float) and 0 < share <= 1:
                return rope._replace(partial=float(share))
        return rope
