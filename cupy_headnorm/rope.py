"""
Rotary embeddings: which dims turn, by which angles, with which roundings; and the same in NumPy.

The numbers are those of transformers 5.23, ``modeling_rope_utils.py`` and the models' own
``RotaryEmbedding`` and ``apply_rotary_pos_emb``, step by step in float32. Powers and cosines,
which no standard fixes, are taken in float64 and rounded: of torch's own, on a CPU, one power in 50
and one cosine in 20 is a unit in the last place off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupy_headnorm import _dtypes, _spec, models

STYLES = ("half", "interleaved", "half flipped")
ORDERS = ("after norm", "before norm")
ROUNDINGS = ("every_op", "once")
TABLES = ("x", "float32")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")

ROUNDED_ONCE = {
    # cos and sin stay in float32, and so does all until the cast: olmo2:154, beam:138, lfm3:146
    **dict.fromkeys(("olmo2", "olmo3", "flex_olmo", "olmo_hybrid"), "float32"),
    **dict.fromkeys(("beam", "lfm3"), "float32"),
    # complex numbers of float32: llama4:225
    **dict.fromkeys(("llama4", "llama4_text"), "float32"),
    # cos and sin are rounded to x's dtype first; then all is float32: cohere:175, hunyuan_vl:460
    **dict.fromkeys(("cohere", "hunyuan_vl", "hunyuan_vl_text"), "x"),
}
"""Model types that round once, with the dtype of their tables; all others round every op."""

_THETA = {
    **dict.fromkeys(("apertus",), 12e6),
    **dict.fromkeys(("cohere", "flex_olmo", "llama4_text", "muse_glimmer_assistant"), 5e5),
    **dict.fromkeys(("olmo3", "qwen3_vl_text", "qwen3_vl_moe_text"), 5e5),
    **dict.fromkeys(("gemma3_text", "gemma3n_text", "t5gemma2_text"), 1e6),
    **dict.fromkeys(("t5gemma2_decoder", "lfm2", "lfm2_moe", "qwen3_omni_moe_text"), 1e6),
    **dict.fromkeys(("minimax_m2", "minimax_m3_vl_text"), 5e6),
    "hy_v3": 11_158_840.0,
}
"""The config classes' own rope_theta, where it is not 10,000."""

_SLIDING_THETA = {
    # a config's rope_theta goes to the full layers, the sliding ones keep 5e5: olmo3:117
    "olmo3": 5e5,
    **dict.fromkeys(("gemma3_text", "gemma3n_text", "t5gemma2_text"), 1e4),
    "t5gemma2_decoder": 1e4,
    **dict.fromkeys(("step3p7", "step3p5"), None),
}
"""Whose scaling, if flat, is that of full_attention only, and the other layers' theta."""

_SLIDING_PATTERN = {"gemma3_text": 6, "t5gemma2_text": 6, "t5gemma2_decoder": 6}
"""Every so-manieth layer is full_attention where layer_types is missing."""

_INTERLEAVED_SECTIONS = {
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text"), (24, 20, 20)),
    **dict.fromkeys(("qwen3_omni_moe_talker_text",), (24, 20, 20)),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), (11, 11, 10)),
}
"""Whose M-RoPE interleaves, whatever the config says, with their own sections."""

_ELSEWHERE = {
    "deepseek_v4": "the last dims turn",
    **dict.fromkeys(("deepseek_v32", "axk2", "glm_moe_dsa", "hy_v4"), "an indexer's dims turn"),
    **dict.fromkeys(("dots3_note", "dots3_note_text"), "an indexer's dims turn"),
    **dict.fromkeys(("mistral_large4", "mistral_large4_text"), "an indexer's dims turn"),
}
"""Whose rotary embedding is not of the first dims of q and k."""

_ONLY_SLIDING = {"afmoe", "flint", "kolibri1"}
_ONLY_SLIDING |= {"exaone4", "exaone4_5", "exaone4_5_text", "exaone_moe"}
"""Whose full layers turn nothing: afmoe:359, flint:281, exaone4:233, exaone_moe:183."""

_CHUNK = 1 << 18
"""Angles at a time: 2 MiB of float64."""


@dataclasses.dataclass(frozen=True)
class Rope:
    r"""
    A rotary embedding of the first `rotary_dim` dims of a head; the others pass.

    Frequency :math:`i` of ``rotary_dim / 2`` turns one pair of dims, at position :math:`p`, by
    :math:`a = p f_i`, with :math:`c = s \cos a` and :math:`d = s \sin a`:

    .. math:: (y_1, y_2) = (x_1 c - x_2 d,\; x_2 c + x_1 d)

    Parameters
    ----------
    rotary_dim : int
        Even; at most head_dim, which `check` is told.
    inverse_frequency : sequence of float
        The :math:`f_i`, ``rotary_dim / 2`` of them, as float32. A pair of zero stays as it is.
    max_position : int
        Number of positions in a table. Others are clamped to its ends.
    style : {"half", "interleaved", "half flipped"}
        Which dims are a pair: ``i`` and ``i + rotary_dim / 2`` (NeoX), ``2 i`` and ``2 i + 1``
        (GPT-J), or as the first with the sign of :math:`d` changed (nanochat).
    order : {"after norm", "before norm"}
    rounding : {"every_op", "once"}
        With R, the rounding to x's dtype: ``R(R(x c) + R(x' d))`` or ``R(x c + x' d)``.
    table : {"x", "float32"}
        Dtype of :math:`c` and :math:`d`: x's, or as they come. Rounding every op needs x's.
    sections : tuple of int
        M-RoPE: how many frequencies take each row of the positions, ``rotary_dim / 2`` together.
        Empty where positions have no rows.
    interleaved_sections : bool
        Rows take turns, as in Qwen3-VL, instead of following one another, as in Qwen2-VL.
    attention_scaling : float
        The :math:`s`, multiplied in float32 (YaRN).
    """

    rotary_dim: int
    inverse_frequency: tuple[float, ...]
    max_position: int
    style: str = "half"
    order: str = "after norm"
    rounding: str = "every_op"
    table: str = "x"
    sections: tuple[int, ...] = ()
    interleaved_sections: bool = False
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        rotary_dim = _rotary_dim(self.rotary_dim)
        half = rotary_dim // 2
        frequencies = np.asarray(self.inverse_frequency, np.float32)
        if frequencies.shape != (half,):
            raise ValueError(
                f"inverse_frequency has shape {frequencies.shape}; "
                f"needs ({half},), half of rotary_dim {rotary_dim}"
            )
        if not np.isfinite(frequencies).all():
            raise ValueError("inverse_frequency has an infinity or NaN; needs finite numbers")
        for name, allowed in (
            ("style", STYLES), ("order", ORDERS), ("rounding", ROUNDINGS), ("table", TABLES)
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; needs one of {allowed}")
        if self.rounding == "every_op" and self.table != "x":
            raise ValueError(f"rounding is 'every_op' and table {self.table!r}; needs table 'x'")
        max_position = _spec.integer(self.max_position, "max_position")
        if max_position < 1:
            raise ValueError(f"max_position is {max_position}; needs 1 or more")
        sections = tuple(_spec.integer(size, "sections") for size in self.sections)
        if sections and (sum(sections) != half or min(sections) < 0):
            raise ValueError(
                f"sections are {sections}, together {sum(sections)}; "
                f"needs {half}, half of rotary_dim {rotary_dim}"
            )
        scaling = float(self.attention_scaling)
        if not math.isfinite(scaling):
            raise ValueError(f"attention_scaling is {scaling}; needs a finite number")
        for name, value in (
            ("rotary_dim", rotary_dim), ("max_position", max_position), ("sections", sections),
            ("inverse_frequency", tuple(frequencies.tolist())), ("attention_scaling", scaling),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    @classmethod
    def of_theta(cls, theta: float, rotary_dim: int, *, max_position: int, **fields: Any) -> Rope:
        """Return the plain embedding, of frequencies ``theta ** (-2 i / rotary_dim)``."""
        frequencies = 1 / _powers(theta, _rotary_dim(rotary_dim))
        return cls(rotary_dim, tuple(frequencies.tolist()), max_position, **fields)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        layer: int = 0,
        *,
        head_dim: int | None = None,
        max_position: int | None = None,
    ) -> Rope:
        """
        Return the embedding of one layer of a model.

        Parameters
        ----------
        config : Mapping
            A parsed ``config.json``; the text tower's is found in it. ``rope_parameters``, flat or
            by layer type, as well as the older ``rope_scaling``, ``rope_theta``,
            ``partial_rotary_factor``, ``rotary_pct`` and ``rotary_dim``.
        layer : int
        head_dim : int, optional
            What the layer's norm has; the config's own otherwise.
        max_position : int, optional
            Length of the table; ``max_position_embeddings`` otherwise.

        Raises
        ------
        ValueError
            A type that depends on the length of the sequence (dynamic, longrope), or is unknown; a
            model type that is not in `models`; a layer that the config gives no embedding.
        """
        return _from_config(cls, config, _spec.integer(layer, "layer"), head_dim, max_position)

    def check(self, head_dim: int) -> None:
        """Check that heads of `head_dim` have `rotary_dim` dims."""
        if self.rotary_dim > head_dim:
            raise ValueError(
                f"rotary_dim is {self.rotary_dim}; needs at most head_dim, which is {head_dim}"
            )

    @property
    def row_of_frequency(self) -> tuple[int, ...]:
        """Row of the positions that each frequency takes; zeros without `sections`."""
        half, rows = self.rotary_dim // 2, len(self.sections)
        found = np.zeros(half, np.int64)
        if self.interleaved_sections:
            for row in range(1, rows):
                found[row : self.sections[row] * rows : rows] = row
        elif rows:
            found = np.repeat(np.arange(rows), self.sections)
        return tuple(found.tolist())

    def tables(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Return cos and sin, ``(max_position, rotary_dim / 2)`` each, rounded to `dtype`.

        `dtype` is what `table` says: that of x, or float32. M-RoPE picks rows for each frequency.
        """
        wanted = _dtypes.from_numpy(np.dtype(dtype), "dtype").numpy
        half = self.rotary_dim // 2
        cos, sin = np.empty((2, self.max_position, half), wanted)
        step = max(1, _CHUNK // half)
        for start in range(0, self.max_position, step):
            stop = min(start + step, self.max_position)
            positions = np.arange(start, stop)
            cos[start:stop], sin[start:stop] = self._cos_sin(positions[:, np.newaxis], wanted)
        return cos, sin

    def at(self, positions: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Return the tables' rows at integer `positions`, clamped: ``(..., rotary_dim / 2)`` each.

        With `sections`, `positions` has one row for each of them in front.
        """
        positions = np.asarray(positions)
        if positions.dtype.kind not in "iu":
            raise TypeError(f"positions have dtype {positions.dtype}; needs an integer dtype")
        wanted = _dtypes.from_numpy(np.dtype(dtype), "dtype").numpy
        positions = np.clip(positions, 0, self.max_position - 1)
        if not self.sections:
            return self._cos_sin(positions[..., np.newaxis], wanted)
        if positions.ndim == 0 or positions.shape[0] != len(self.sections):
            raise ValueError(
                f"positions have shape {positions.shape}; "
                f"needs ({len(self.sections)}, ...), a row for each of the sections"
            )
        by_frequency = positions[np.asarray(self.row_of_frequency)]
        return self._cos_sin(np.moveaxis(by_frequency, 0, -1), wanted)

    def _cos_sin(self, positions: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        frequencies = np.asarray(self.inverse_frequency, np.float32)
        angles = (positions.astype(np.float32) * frequencies).astype(np.float64)
        scaling = np.float32(self.attention_scaling)
        with np.errstate(all="ignore"):
            cos = np.cos(angles).astype(np.float32) * scaling
            sin = np.sin(angles).astype(np.float32) * scaling
            return cos.astype(dtype), sin.astype(dtype)


def apply(
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    style: str = "half",
    rounding: str = "every_op",
    rotary_dim: int | None = None,
) -> np.ndarray:
    """
    Turn heads in NumPy, as the kernel does.

    Parameters
    ----------
    x : numpy.ndarray
        ``(..., head_dim)``, float16, bfloat16, float32 or float64.
    cos, sin : numpy.ndarray
        Broadcast against ``(..., rotary_dim / 2)`` or ``(..., rotary_dim)``; an axis of length 1
        stands for the heads. Of full width each dim takes its own, in the model's own order. If
        every op is rounded they are rounded to x's dtype first.
    style, rounding, rotary_dim
        As `Rope` has them; all of head_dim if `rotary_dim` is not given.

    Returns
    -------
    numpy.ndarray
        Of x's shape and dtype. The arithmetic is float32's, float64's for float64.
    """
    dtype = _dtypes.from_numpy(x.dtype, "x")
    wide, head_dim = dtype.accumulate.numpy, x.shape[-1]
    width = _rotary_dim(head_dim if rotary_dim is None else rotary_dim)
    if width > head_dim:
        raise ValueError(f"rotary_dim is {width}; needs at most head_dim, which is {head_dim}")
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; needs one of {STYLES}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; needs one of {ROUNDINGS}")

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype.numpy).astype(wide) if rounding == "every_op" else values

    def per_dim(values: np.ndarray, name: str) -> np.ndarray:
        _dtypes.from_numpy(values.dtype, name)
        if values.shape[-1] not in (width // 2, width):
            raise ValueError(
                f"{name} is {values.shape[-1]} wide; "
                f"needs {width // 2} or {width}, for rotary_dim {width}"
            )
        if values.shape[-1] != width:
            pairs = (values[..., np.newaxis],) * 2
            values = (
                np.concatenate(pairs, -1).reshape(*values.shape[:-1], width)
                if style == "interleaved"
                else np.concatenate((values, values), -1)
            )
        return rounded(values.astype(wide))

    turned = x[..., :width].astype(wide)
    other = np.empty_like(turned)
    if style == "interleaved":
        other[..., 0::2], other[..., 1::2] = -turned[..., 1::2], turned[..., 0::2]
    else:
        other[..., : width // 2] = -turned[..., width // 2 :]
        other[..., width // 2 :] = turned[..., : width // 2]
    if style == "half flipped":
        other = -other
    with np.errstate(all="ignore"):  # infinities and NaN follow IEEE without a warning
        y = rounded(turned * per_dim(cos, "cos")) + rounded(other * per_dim(sin, "sin"))
        out = x.copy()
        out[..., :width] = y.astype(dtype.numpy)
    return out


def turns(config: Mapping[str, Any], layer: int) -> bool:
    """Tell whether a layer of a model that has a rotary embedding applies it."""
    text, model_type, _ = _text(config)
    if model_type.startswith("llama4"):
        own = text.get("no_rope_layers")  # true where there is one: llama4:329
        interval = text.get("no_rope_layer_interval", 4)
        return bool(own[layer]) if own else (layer + 1) % interval != 0
    layer_type = (text.get("layer_types") or {layer: "sliding_attention"})[layer]
    params, thetas = text.get("rope_parameters") or {}, text.get("layer_rope_theta")
    if layer_type in params and params[layer_type] is None:  # beam:138
        return False
    if thetas and not thetas[layer]:  # muse_spark:663
        return False
    only_sliding = model_type in _ONLY_SLIDING and (
        model_type in ("afmoe", "flint") or text.get("sliding_window") is not None
    )
    return not only_sliding or layer_type == "sliding_attention"


def _rotary_dim(value: object) -> int:
    rotary_dim = _spec.integer(value, "rotary_dim")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; needs an even number, 2 or more")
    return rotary_dim


def _powers(theta: float, dim: int, *, count: int | None = None) -> np.ndarray:
    """Return ``theta ** (2 i / dim)`` in float32, for all i below dim / 2 or `count` of them."""
    if not theta > 0:
        raise ValueError(f"theta is {theta}; needs a number above 0")
    count = -(-dim // 2) if count is None else count
    exponents = np.arange(0, 2 * count, 2).astype(np.float32) / np.float32(dim)
    return (float(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)


def _inverse_frequency(
    params: Mapping[str, Any], theta: float, head_dim: int, partial: float, text: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    """Return frequencies and attention_scaling: transformers/modeling_rope_utils.py:134 to 663."""
    rope_type = params["rope_type"]
    factor = params.get("factor")
    if rope_type == "proportional":
        angles = int(partial * head_dim // 2)
        frequencies = np.zeros(head_dim // 2, np.float32)
        frequencies[:angles] = 1 / _powers(theta, head_dim, count=angles)
        return frequencies / np.float32(1.0 if factor is None else factor), 1.0
    # The dims of an odd part are rounded up to pairs; its exponents are not.
    dim = int(head_dim * partial)
    if dim < 1:
        raise ValueError(f"{partial} of head_dim {head_dim} is {dim} dims; needs 1 or more")
    powers = _powers(theta, dim)
    frequencies = 1 / powers
    if rope_type == "default":
        return frequencies, 1.0
    original = params.get("original_max_position_embeddings")
    if factor is None and rope_type == "yarn" and original:
        factor = text.get("max_position_embeddings", original) / original
    needed = {"factor": factor}
    if rope_type != "linear":
        needed["original_max_position_embeddings"] = original
    if rope_type == "llama3":
        needed |= {name: params.get(name) for name in ("low_freq_factor", "high_freq_factor")}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"RoPE of type {rope_type!r} has no {missing[0]}; needs one")
    if rope_type == "linear":
        return frequencies / np.float32(factor), 1.0
    if rope_type == "llama3":
        return _llama3(frequencies, factor, original, params), 1.0
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (params.get("beta_fast") or 32, params.get("beta_slow") or 1)
    )
    if params["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = (np.arange(len(powers), dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    interpolated = 1 / (np.float32(factor) * powers)
    frequencies = interpolated * (1 - keep) + frequencies * keep

    def mscale(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scaling = params.get("attention_factor")
    if scaling is None:
        over, under = params.get("mscale"), params.get("mscale_all_dim")
        scaling = mscale(over) / mscale(under) if over and under else mscale(1)
    return frequencies, scaling


def _llama3(
    frequencies: np.ndarray, factor: float, original: int, params: Mapping[str, Any]
) -> np.ndarray:
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    # torch divides a number by a tensor as the tensor's reciprocal times the number.
    wavelength = (1 / frequencies) * np.float32(2 * math.pi)
    scaled = np.where(wavelength > original / low, frequencies / np.float32(factor), frequencies)
    smooth = (1 / wavelength) * np.float32(original)
    smooth = (smooth - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * scaled / np.float32(factor) + smooth * scaled
    medium = ~(wavelength < original / high) & ~(wavelength > original / low)
    return np.where(medium, smoothed, scaled)


def _from_config(
    cls: type[Rope],
    config: Mapping[str, Any],
    layer: int,
    head_dim: int | None,
    max_position: int | None,
) -> Rope:
    text, model_type, family = _text(config)
    why = family.refused or _ELSEWHERE.get(model_type, "")
    if family.rope.order == "none":
        why = "it has none"
    elif family.tower != "text":  # a picture's positions are coordinates, one for each pair
        why = f"its {family.tower} tower turns by no table of a config"
    if why:
        raise ValueError(
            f"no rotary embedding of {model_type} is served: {why}; "
            "needs cos and sin given with each call, or none"
        )

    def field(name: str) -> Any:
        """Return a layer's own value where there is one a layer."""
        value = text.get(name, family.defaults.get(name))
        if not isinstance(value, (list, tuple)):
            return value
        if not 0 <= layer < len(value):
            raise ValueError(f"layer is {layer}; needs 0 to {len(value) - 1}, as {name} have it")
        return value[layer]

    layer_type = field("layer_types")
    pattern = text.get("sliding_window_pattern") or _SLIDING_PATTERN.get(model_type)
    if layer_type is None and pattern:
        layer_type = "sliding_attention" if (layer + 1) % pattern else "full_attention"
    params = _parameters(text, model_type, layer, layer_type)
    sliding = model_type in _SLIDING_THETA and layer_type == "sliding_attention"
    theta = params.get("rope_theta")
    if theta is None and sliding:
        theta = text.get("rope_local_base_freq", _SLIDING_THETA[model_type])
    if theta is None:
        theta = field("rope_theta")
    if text.get("layer_rope_theta"):
        theta = field("layer_rope_theta")
    if theta is None and (text.get("rope_parameters") or model_type in _THETA):
        theta = _THETA.get(model_type, 1e4)
    if not theta:
        raise ValueError(f"layer {layer} of {model_type} has rope_theta {theta}; needs a number")

    if head_dim is None:
        head_dim = _head_dim(text, family, layer, layer_type)
    partial = params.get("partial_rotary_factor")
    for name in ("partial_rotary_factor", "partial_rotary_factors", "rotary_pct"):
        partial = field(name) if partial is None else partial
    if partial is None and text.get("rotary_dim") is not None:
        partial = text["rotary_dim"] / head_dim
    partial = family.rope.partial if partial is None else partial

    if params["rope_type"] == "dynamic" and params.get("alpha") and "hunyuan" in model_type:
        # Called dynamic, it depends on no length: hunyuan_v1_dense:298.
        theta *= params["alpha"] ** (head_dim / (head_dim - 2))
        params["rope_type"] = "default"
    if params["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"RoPE of {model_type} is of type {params['rope_type']!r}; needs one of {ROPE_TYPES}, "
            "or cos and sin given with each call"
        )
    frequencies, scaling = _inverse_frequency(params, theta, head_dim, partial, text)
    half = len(frequencies)
    sections = tuple(params.get("mrope_section") or params.get("xdrope_section") or ())
    interleaved = model_type in _INTERLEAVED_SECTIONS
    if interleaved and not sections:
        # The first row takes what the others, clipped, leave.
        rows = enumerate(_INTERLEAVED_SECTIONS[model_type])
        others = [len(range(half)[row : 3 * size : 3]) for row, size in rows][1:]
        sections = (half - sum(others), *others)
    if model_type == "neomme":  # rows and columns take turns: neomme:167
        sections, interleaved = (half // 2,) * 2, True
    if sections and model_type.startswith("hunyuan_vl"):
        raise ValueError(
            f"sections of {model_type} are {sections} of twice as many dims: the dims of a pair "
            "turn by different angles; needs cos and sin given with each call"
        )
    if max_position is None:
        max_position = field("max_position_embeddings")
        if max_position is None:
            raise ValueError(f"{model_type} has no max_position_embeddings; needs max_position=")
    rope = cls(
        2 * half,
        tuple(frequencies.tolist()),
        max_position,
        family.rope.style,
        family.rope.order,
        "once" if model_type in ROUNDED_ONCE else "every_op",
        ROUNDED_ONCE.get(model_type, "x"),
        sections,
        interleaved,
        scaling,
    )
    rope.check(head_dim)
    return rope


def _text(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, models.Family]:
    """Return the text tower's config, its model type and what is known of that."""
    text, names = config, [config.get("model_type", "")]
    for key in ("thinker_config", "text_config", "llm_config", "decoder"):
        if isinstance(text.get(key), Mapping):
            text = text[key]
            of_text = f"{names[0]}_text"
            of_text = of_text if of_text in models.BY_MODEL_TYPE else names[0]
            names.insert(0, text.get("model_type", of_text))
    for name in names:
        if name in models.BY_MODEL_TYPE:
            return text, name, models.BY_MODEL_TYPE[name]
    raise ValueError(
        f"model_type is {' in '.join(repr(name) for name in names)}; needs one that "
        "cupy_headnorm.models has, or Rope(...) with its arguments"
    )


def _parameters(
    text: Mapping[str, Any], model_type: str, layer: int, layer_type: str | None
) -> dict[str, Any]:
    """Return the layer's parameters, with rope_type and truncate."""
    params = dict(text.get("rope_scaling") or text.get("rope_parameters") or {})
    # transformers looks for it in the outer mapping, so that it counts only if that is flat
    # (modeling_rope_utils:475).
    truncate = params.get("truncate", True)
    scaled = text.get("rope_scaling_layers")  # molmo2:662
    by_type = any(isinstance(value, Mapping) for value in params.values())
    if by_type:
        if layer_type not in params:
            raise ValueError(
                f"layer {layer} is of type {layer_type!r}; needs one of {tuple(params)}, "
                "which rope_parameters have"
            )
        if params[layer_type] is None:
            raise ValueError(f"layer {layer} ({layer_type}) has no rotary embedding; needs one")
        params = dict(params[layer_type])
    elif (model_type in _SLIDING_THETA and layer_type == "sliding_attention") or (
        scaled is not None and layer not in scaled
    ):
        params = {name: params[name] for name in ("rope_theta",) if name in params}
    rope_type = params.get("rope_type", params.get("type", "default"))
    # Qwen2-VL's and HunyuanOCR's names for sections: qwen2_vl:131, hunyuan_vl:217.
    params["rope_type"] = {"mrope": "default", "xdrope": "dynamic"}.get(rope_type, rope_type)
    original = params.get("original_max_position_embeddings")
    if not by_type:
        original = text.get("original_max_position_embeddings") or original
    params["original_max_position_embeddings"] = original or text.get("max_position_embeddings")
    params["truncate"] = truncate
    return params


def _head_dim(
    text: Mapping[str, Any], family: models.Family, layer: int, layer_type: str | None
) -> int:
    # Keys are numbers, some with zeros in front: transformers writes "05" beside "11".
    per_layer = {int(key): own for key, own in (text.get("per_layer_config") or {}).items()}
    head_dim = per_layer.get(layer, {}).get("head_dim")
    if head_dim is None and layer_type == "full_attention":
        head_dim = text.get("global_head_dim")
    for where in (text, family.defaults):
        head_dim = where.get("head_dim") if head_dim is None else head_dim
    if head_dim is None:
        try:
            head_dim = text["hidden_size"] // text["num_attention_heads"]
        except KeyError as missing:
            raise ValueError(
                f"config has neither head_dim nor {missing}; needs head_dim="
            ) from None
    return head_dim
