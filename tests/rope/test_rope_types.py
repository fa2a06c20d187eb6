"""How many dims of a head each registered model type rotates, as transformers' own modules do."""

import contextlib
import copy
import functools

import numpy as np
import pytest

from cupy_headnorm import models
from cupy_headnorm.rope import Rope, config
from cupy_headnorm.rope.numpy import apply

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from rotary import CONFIG_MAPPING, Theirs, halved, numpy_of, saved  # noqa: E402

TEXT = [
    name
    for name, family in models.BY_MODEL_TYPE.items()
    if family.tower == "text" and name in CONFIG_MAPPING
]
SHARE = 0.75
"""No config class's own; of 64, 128, 256 and 512 dims a multiple of 4, as NeoMME needs."""
FORMS = (
    "as saved", "as released", "partial_rotary_factor", "rope_parameters", "rope_scaling", "both",
    "partial_rotary_factors", "factors as released", "rotary_pct", "rotary_emb_fraction",
    "rotary_dim", "linear", "yarn", "proportional",
)  # fmt: skip
ROTATES = {
    "zamba2": {"use_mem_rope": True},
    "granitemoehybrid": {
        "position_embedding_type": "rope", "layer_types": ["full_attention"] * 32
    },
}  # fmt: skip
"""Fields without which a type has no rotary embedding."""


def ulps(a, b):
    return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max()


def text_of(raw):
    nested = (raw.get(k) for k in ("thinker_config", "text_config", "llm_config", "decoder"))
    found = next((each for each in nested if isinstance(each, dict)), None)
    return raw if found is None else text_of(found)


@functools.cache
def whole(name):
    """Return a config as its class saves it, with a rotary embedding."""
    raw = saved(CONFIG_MAPPING[name]())
    text = text_of(raw)
    if "num_attention_heads" not in text or "hidden_size" not in text:
        return raw
    text.pop("time_step_limit", None)  # infinity, which transformers does not read again
    text.update(ROTATES.get(name, {}))
    if text.get("head_dim", 0) is None:
        text["head_dim"] = head_dim(text, 0)
    if name != "zamba2" and head_dim(text, 0) % 4:
        text["head_dim"] = 64  # a share of another is odd, which transformers' YaRN refuses
    return raw


def head_dim(text, layer):
    """Return the dims of what the model's own function is given of a head."""
    own = {int(k): v for k, v in (text.get("per_layer_config") or {}).items()}.get(layer, {})
    for found in (
        text.get("qk_rope_head_dim"), own.get("head_dim"), text.get("head_dim"),
        text.get("attention_head_dim"),
    ):  # fmt: skip
        if found:
            return found
    return text["hidden_size"] // text["num_attention_heads"]


def written(raw, form):
    """Return a config with a share of head_dim in one of the forms that configs have it in."""
    raw = copy.deepcopy(raw)
    text = text_of(raw)
    saved_as = text["rope_parameters"]
    by_type = any(isinstance(value, dict) for value in saved_as.values())

    def parameters(**fields):
        if not by_type:
            return {"rope_type": "default", "rope_theta": 1e4} | fields
        return {
            kind: value and {"rope_type": "default", "rope_theta": 1e4} | fields
            for kind, value in saved_as.items()
        }

    share, width = {"partial_rotary_factor": SHARE}, head_dim(text, 0)
    plain = {"rope_parameters": parameters()}
    text.pop("rope_parameters")
    text |= {
        "as saved": {"rope_parameters": saved_as},
        "as released": {"rope_theta": 1e4},
        "partial_rotary_factor": {"rope_theta": 1e4, **share},
        "rope_parameters": {"rope_parameters": parameters(**share)},
        "rope_scaling": {"rope_parameters" if by_type else "rope_scaling": parameters(**share)},
        "both": plain | share,
        "partial_rotary_factors": plain | {"partial_rotary_factors": [SHARE] * 999},
        "factors as released": {"rope_theta": 1e4, "partial_rotary_factors": [SHARE] * 999},
        "rotary_pct": plain | {"rotary_pct": SHARE},
        "rotary_emb_fraction": plain | {"rotary_emb_fraction": SHARE},
        "rotary_dim": plain | {"rotary_dim": int(width * SHARE)},
        "linear": {"rope_parameters": parameters(rope_type="linear", factor=2.0, **share)},
        "yarn": {"rope_parameters": parameters(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=1024,
        )},
        "proportional": {"rope_parameters": parameters(rope_type="proportional", **share)},
    }[form]  # fmt: skip
    return raw


def told(text, kind, width):
    """Yield, of each field that says a share, the numbers of dims that it may mean."""
    params = text.get("rope_scaling") or text.get("rope_parameters") or {}
    params = params[kind] if isinstance(params.get(kind), dict) else params
    widths = [width]
    if "qk_rope_head_dim" in text:  # a share may be one of the whole head
        widths += [text[name] for name in ("head_dim", "linear_head_dim") if name in text]
        widths.append(text["qk_nope_head_dim"] + text["qk_rope_head_dim"])
    shares = [text.get(name) for name in ("rotary_pct", "rotary_emb_fraction")]
    if params.get("rope_type") != "proportional":
        shares.append(params.get("partial_rotary_factor", text.get("partial_rotary_factor")))
    shares.append((text.get("partial_rotary_factors") or [None])[0])
    for share in shares:
        if share is not None:
            yield [2 * -(-int(share * w) // 2) for w in widths]
    if "rotary_dim" in text:
        yield [text["rotary_dim"]]


def layers(raw):
    """Return the first layer of each type that is rotated, by the type."""
    found, text = {}, text_of(raw)
    for layer, kind in enumerate(text.get("layer_types") or [None]):
        if kind not in ("conv", "linear_attention", "mamba") and config.rotates(raw, layer):
            found.setdefault(kind, layer)
    return found


def rotated(theirs, width):
    """Return heads before and after the model's own rotation; None where it cannot."""
    q = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 2, 5, width), np.float32))
    try:
        cos, sin = theirs.cos_sin(q.dtype, torch.arange(5)[None] * 7)
        return [numpy_of(each) for each in (q, theirs.rotate(q, cos, sin), cos, sin)]
    except (RuntimeError, TypeError):
        return None


def compare(rope, theirs, heads):
    found = np.array(rope.inverse_frequency, np.float32)
    assert rope.rotary_dim == 2 * len(theirs.frequencies)
    assert ulps(found, theirs.frequencies) <= 2
    assert rope.attention_scaling == theirs.scaling
    x, expected, cos, sin = heads
    cos, sin = (halved(table)[:, None] for table in (cos, sin))
    ours = apply(x, cos, sin, style=rope.style, rotary_dim=rope.rotary_dim)
    if theirs.leaves_halves:
        ours = np.concatenate((ours[..., 0::2], ours[..., 1::2]), -1)
    assert np.allclose(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TEXT)
def test_as_in_transformers_or_refused(name, form):
    """A share that the type's module does not rotate by is refused; what it rotates by is ours."""
    family = models.BY_MODEL_TYPE[name]
    raw = whole(name)
    if not text_of(raw).get("rope_parameters") or family.refused or family.rope.order == "none":
        with pytest.raises(ValueError, match=r"is supported|has rope_theta None|neither head_dim"):
            Rope.from_config(raw)
        return
    if family.rotary.refused:
        with pytest.raises(ValueError, match="is supported: "):
            Rope.from_config(raw)
        return
    raw = written(raw, form)
    text, compared = text_of(raw), 0
    unsaid = not (text.get("rope_parameters") or text.get("rope_scaling"))
    for kind, layer in layers(raw).items():
        compared += 1
        if unsaid and family.rotary.own_parameters:
            with pytest.raises(ValueError, match="has no rope_parameters; needs them"):
                Rope.from_config(raw, layer, max_position=32)
            continue
        width = head_dim(text, layer)
        theirs = Theirs(raw, layer)
        heads = rotated(theirs, width)
        wrong = [d for d in told(text, kind, width) if 2 * len(theirs.frequencies) not in d]
        if wrong:
            with pytest.raises(ValueError, match=r"does not rotate by it, and .*or a Rope by hand"):
                Rope.from_config(raw, layer, max_position=32)
        elif heads is not None:
            compare(Rope.from_config(raw, layer, max_position=32), theirs, heads)
    assert compared


def has_one(name):
    family = models.BY_MODEL_TYPE[name]
    refused = family.refused or family.rope.order == "none" or family.rotary.refused
    text = text_of(whole(name))
    return not refused and "rope_parameters" in text and "attention_head_dim" not in text


@pytest.mark.parametrize("said", ["null", "nothing"])
@pytest.mark.parametrize("name", [name for name in TEXT if has_one(name)])
def test_head_dim_that_is_not_said(name, said):
    """Null is what transformers makes of it, where it does not refuse the config."""
    raw = copy.deepcopy(whole(name))
    text = text_of(raw)
    text.pop("head_dim", None)
    text.pop("per_layer_config", None)
    if name == "afmoe" or "qwen3_omni" in name:  # whose own two are the same, or odd
        text["hidden_size"] = 48 * text["num_attention_heads"]
    if "rotary_dim" in text:  # MiniMax-M3's config has both
        text["rope_parameters"]["partial_rotary_factor"] = text["rotary_dim"] / 128
    if said == "null":
        text["head_dim"] = None
    heads = None
    ((_, layer), *_) = layers(raw).items()
    with contextlib.suppress(Exception) if said == "null" else contextlib.nullcontext():
        theirs = Theirs(raw, layer)
        heads = rotated(theirs, text.get("qk_rope_head_dim") or 2 * len(theirs.frequencies))
    if heads is not None:
        compare(Rope.from_config(raw, layer, max_position=32), theirs, heads)
    elif "qk_rope_head_dim" in text:  # it alone counts
        assert Rope.from_config(raw, layer, max_position=32).rotary_dim == text["qk_rope_head_dim"]
    elif "hunyuan_vl" not in name:  # needs sections, without which no model runs
        with pytest.raises(ValueError, match="head_dim is null, which .* refuses; needs a number"):
            Rope.from_config(raw, layer, max_position=32)
