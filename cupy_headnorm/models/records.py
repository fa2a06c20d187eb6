"""What a row of the registry holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class ModelRope(NamedTuple):
    """
    The rotary embedding beside a norm, as far as the family tells.

    Its angles are in each model's config, from which `cupy_headnorm.Rope` is made.
    """

    order: str = "after norm"
    """``"after norm"``, ``"before norm"`` or ``"none"``."""
    style: str = "half"
    """``"half"`` (NeoX), ``"interleaved"`` (GPT-J), ``"half flipped"``: the other sign."""
    partial: float = 1.0
    """
    Share of head_dim that is rotated, first dims first, where the config does not say. A config's
    share beside ``rope_type: proportional`` is none: all dims rotate, some by no angle.
    """
    note: str = ""


class Rotary(NamedTuple):
    """What configs and classes of a family say of its rotary embedding otherwise than Llama's."""

    theta: float | None = None
    """The config class's own rope_theta, where it is not 10,000."""
    table: str = ""
    """
    Dtype of cos and sin where the result is rounded once: ``"float32"``, or ``"x"`` where they are
    rounded first. Empty where every operation is rounded.
    """
    refused: str = ""
    """Why no `Rope` can be made of a config."""
    only_with: tuple[str, Any] | None = None
    """A field, and the value without which there is no rotary embedding."""
    own_parameters: bool = False
    """Whether the class makes up more than a theta where a config has no rope_parameters."""

    # Layers
    full_alone: bool = False
    """Whether parameters that are not by layer type are those of full_attention alone."""
    sliding_theta: float | None = None
    """The class's own theta of the other layers then."""
    pattern: int = 0
    """The last of so many layers is full_attention, where layer_types is missing."""
    unrotated: str = ""
    """
    Layers that do not rotate: ``"full"``, ``"full beside sliding"`` (none without a window),
    ``"without theta"`` (layer_rope_theta), ``"every nth"`` (no_rope_layers).
    """

    # Dims
    shares: tuple[str, ...] = ()
    """Fields that say how many dims the module rotates, the first ones, in their order."""
    shares_by_type: bool = False
    """
    Whether partial_rotary_factor counts in parameters by layer type alone, and the others without.
    """
    shares_in_parameters: bool = False
    """Whether partial_rotary_factor counts in the parameters alone, the class having its own."""
    share: float | Mapping[str, float] | None = None
    """Share where the config has none, if not `ModelRope.partial`; for some by layer type."""
    part: int = 0
    """The class's own qk_rope_head_dim, where heads have a part that is rotated whole (MLA)."""
    neighbours: str = ""
    """Whether a pair of that part is two neighbours: ``"always"``, ``"rope_interleave"``, if so."""
    hidden_times: int = 1
    """The heads share so many times hidden_size, where head_dim is not said."""
    null_is_hidden: bool = False
    """Whether a head_dim of null is hidden_size // num_attention_heads, in spite of the class's."""

    # Sections (M-RoPE)
    sections: tuple[int, ...] = ()
    """The class's own, where rows interleave whatever the config says."""
    alternating: bool = False
    """Whether rows and columns alternate."""
    wide_sections: bool = False
    """Whether sections count dims, and the two of a pair rotate by different angles."""
    alpha: bool = False
    """Whether ``"dynamic"`` with an alpha depends on no length."""


class Role(NamedTuple):
    """
    One tensor of an attention that is normalized head by head.

    Several of one name in a family are alternatives: the tensors' names and shapes tell.
    """

    name: str
    """``"q"``, ``"k"``, ``"v"``, ``"index_k"``, ..."""
    stems: tuple[str, ...]
    """
    Modules below the layer, ``self_attn.q_norm``: the library's own name first, then those that
    are found on disk only.
    """
    heads: str = "num_attention_heads"
    """Config field with the number of heads; empty where only the projection tells."""
    kind: str = "rms"
    weight: str = "shared"
    """
    ``"shared"`` (head_dim,), ``"per head"`` (num_heads, head_dim), ``"flat"`` of as many,
    ``"list"`` one module a head, ``"none"``, or ``"full"``: (num_heads * head_dim,) over all heads,
    refused unless one head is asked for.
    """
    bias: bool = False
    eps: str | float = "rms_norm_eps"
    """Config field, or the module's constant."""
    weight_offset: float = 0.0
    rounding: str = "once"
    result: str = "x"
    """Dtype of the model's own result: ``"x"``, ``"promoted"`` with the weight's, ``"weight"``."""
    heads_axis: int = -2
    """Axis of the heads in what the module is given; of no account where it has one head only."""
    head_dim: tuple[str, ...] = ("head_dim",)
    """
    Config fields, any of which may hold, and ``"hidden"``: hidden_size // num_attention_heads where
    config.json gives none of them. Empty where only the weight tells, or without one the norms
    beside it.
    """
    projection: str = ""
    """Module whose rows are num_heads * head_dim, to check against: ``self_attn.q_proj``."""
    projection_factor: int = 1
    """Rows of it a row of a head: 2 where a gate is projected along."""
    layers: str = ""
    """
    Where no tensor tells which layers have it: a config field with a truth a layer (or one for
    all), or ``"role:k"``, the layers where that role has a tensor; empty for all layers.
    """
    tensor: str = "weight"
    """Name of the weight in its module."""
    refused: str = ""
    """Why it is not supported."""


class Family(NamedTuple):
    """Model types that do the same."""

    model_types: tuple[str, ...]
    """
    ``model_type`` of config.json, or of the nested config of that tower; ``_class_name`` of
    diffusers. A type whose config nests the text tower's is in the row of that tower.
    """
    roles: tuple[Role, ...] = ()
    rope: ModelRope = ModelRope()
    rotary: Rotary = Rotary()
    defaults: Mapping[str, Any] = {}
    """
    Config fields that a config.json may omit, with the config class' own values. Without one here
    num_key_value_heads is num_attention_heads.
    """
    flag: str = ""
    """Config field that says whether there are norms; tensors win over it."""
    tower: str = "text"
    """``"text"`` or another main one, ``"vision"``, ``"audio"``, ``"transformer"`` (diffusers)."""
    aliases: Mapping[str, str] = {}
    """Other names that a config.json has for a field, the config class' attribute_map."""
    refused: str = ""
    """Why no norm of it is supported."""


def pair(
    q: str | tuple[str, ...],
    k: str | tuple[str, ...],
    /,
    attention: str | tuple[str, ...] = "self_attn",
    *,
    projected: bool = True,
    **shared: Any,
) -> tuple[Role, Role]:
    """Return the roles q and k that differ in name and number of heads only."""
    attentions = (attention,) if isinstance(attention, str) else attention

    def stems(names: str | tuple[str, ...]) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else names
        return tuple(f"{attention}.{name}" for attention in attentions for name in names)

    def role(name: str, names: str | tuple[str, ...], **fields: Any) -> Role:
        projection = f"{attentions[0]}.{name}_proj" if projected else ""
        return Role(name, stems(names), projection=projection, **fields)

    k_fields = {"heads": "num_key_value_heads", **shared, "projection_factor": 1}
    return role("q", q, **shared), role("k", k, **k_fields)


def named(prefix: str, roles: Iterable[Role]) -> tuple[Role, ...]:
    """Return the roles under other names: ``second_q``."""
    return tuple(role._replace(name=f"{prefix}_{role.name}") for role in roles)


def alike(
    members: Mapping[str | tuple[str, ...], Mapping[str, Any]],
    rotary: Mapping[str, Rotary] = {},
    **shared: Any,
) -> tuple[Family, ...]:
    """Return families that differ in their configs' defaults, and `rotary` by the first name."""
    every = ((names,) if isinstance(names, str) else names for names in members)
    return tuple(
        Family(names, defaults=defaults, rotary=rotary.get(names[0], Rotary()), **shared)
        for names, defaults in zip(every, members.values(), strict=True)
    )


def sizes(
    heads: int | None = None,
    kv: int | None = None,
    head_dim: int | None = None,
    hidden: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return config fields by their names, those that are given."""
    named = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "hidden_size": hidden,
        **fields,
    }
    return {name: value for name, value in named.items() if value is not None}


QK = ("q_norm", "k_norm")
EITHER = ("head_dim", "hidden")

CAST_FIRST: dict[str, Any] = {"rounding": "before_weight", "result": "promoted"}
"""weight * cast(n): qwen3:49, and 40 copies of it."""
ONE_PLUS: dict[str, Any] = {"weight_offset": 1.0}
"""cast(n * (1 + weight)), the weight stored less one: gemma3:135, and 6 copies of it."""

GATE = "a gate is part of the norm, multiplied in before the result is rounded"
RANK = "normalizes the rank of a low-rank projection, before there are heads"

GATED = Role("linear_out", ("linear_attn.norm",), refused=GATE)
"""Gated DeltaNet: qwen3_next:58, :623; this weight is not stored less one."""
LORA = (
    Role("q_lora", ("self_attn.q_a_layernorm",), refused=RANK),
    Role("kv_lora", ("self_attn.kv_a_layernorm",), refused=RANK),
)
INDEX_K = Role(
    "index_k",
    ("self_attn.indexer.k_norm", "attention.indexer.k_norm"),
    "",
    kind="layer",
    bias=True,
    eps=1e-6,
    head_dim=("index_head_dim",),
    projection="self_attn.indexer.wk",
)
"""Sparse attention's indexer, one head: deepseek_v32:174, :216."""
V_OF_K = Role(
    "v",
    ("self_attn.v_norm",),
    "num_key_value_heads",
    weight="none",
    head_dim=(),
    layers="role:k",
)
"""Without a weight; layers that use another layer's keys and values have neither norm."""
FULL: dict[str, Any] = {"weight": "full", "head_dim": EITHER}
"""Over all heads at once, before they are told apart."""
