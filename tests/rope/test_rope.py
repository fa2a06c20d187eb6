"""Rotary embeddings against transformers' own classes and functions, from configs as released."""

import dataclasses
import re
import sys

import numpy as np
import pytest
from tolerances import FLIPS, FLIPS_FEW, FLIPS_NEED, TELLING, mismatch

from cupy_headnorm import HeadNorm, QKNorm, models
from cupy_headnorm.rope import Rope, embedding
from cupy_headnorm.rope import config as rope_config
from cupy_headnorm.rope.numpy import apply

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import families  # noqa: E402
import rotary  # noqa: E402
from rotary import (  # noqa: E402
    BASE,
    CASES,
    GEMMA4,
    OLMO3,
    QWEN3_VL,
    YARN,
    Theirs,
    halved,
    numpy_of,
    qwen3,
    saved,
)

ODD = {  # no rotary class of its own; needs sections; ignores its rotary_dim; head_dim is 73
    "fuyu", "exaone4_5", "hunyuan_vl", "hunyuan_vl_text", "minimax_m3_vl", "minimax_m3_vl_text",
    "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text",
}  # fmt: skip
NORMED_Q = [
    name
    for name, family in models.BY_MODEL_TYPE.items()
    if name in rotary.CONFIG_MAPPING and name not in ODD
    if any(role.name == "q" and role.weight != "full" for role in family.roles)
]  # fmt: skip


def ulps(a, b):
    return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max()


@pytest.mark.parametrize("form", ["as released", "as transformers saves it"])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scaling(name, form):
    raw, layer = CASES[name]
    theirs = Theirs(raw, layer)
    rope = Rope.from_config(raw if form == "as released" else saved(theirs.whole), layer)
    found = np.array(rope.inverse_frequency, np.float32)
    assert rope.rotary_dim == 2 * len(theirs.frequencies)
    # torch's power is one unit off at most; divided by a factor, that may be two.
    assert ulps(found, theirs.frequencies) <= 2
    assert np.count_nonzero(found != theirs.frequencies) <= 0.06 * len(found)
    assert rope.attention_scaling == theirs.scaling
    assert rope.max_position == 40960


@pytest.mark.parametrize("name", CASES)
def test_tables(name):
    raw, layer = CASES[name]
    theirs = Theirs(raw, layer)
    rope = Rope.from_config(raw, layer, max_position=4096)
    # With the module's own frequencies: far from 0 a unit in the last place is seen.
    rope = dataclasses.replace(rope, inverse_frequency=theirs.frequencies)
    for dtype in ("float32", "bfloat16", "float16"):
        expected = theirs.cos_sin(getattr(torch, dtype), torch.arange(4096)[None])
        for table, cos in zip(rope.tables(dtype), expected, strict=True):
            cos = halved(numpy_of(cos)[0])
            assert cos.dtype == (table.dtype if rope.table == "x" else np.float32)
            cos = cos.astype(table.dtype)
            assert mismatch(table, cos) < (0.1 if dtype == "float32" else FLIPS)
            if dtype == "float32":
                assert ulps(table, cos) <= (1 if rope.attention_scaling == 1 else 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_apply(name, dtype, rng):
    raw, layer = CASES[name]
    theirs, rope = Theirs(raw, layer), Rope.from_config(raw, layer)
    head_dim = {"stablelm": 128, "glm4_moe": 128, "minimax_m2": 128}.get(name, rope.rotary_dim)
    tokens = FLIPS_NEED // (2 * head_dim)
    q = torch.from_numpy(rng.standard_normal((1, 2, tokens, head_dim), np.float32))
    q = q.to(getattr(torch, dtype))
    cos, sin = theirs.cos_sin(q.dtype, torch.arange(tokens)[None] * 7)
    expected = numpy_of(theirs.apply(q, cos, sin))
    x, cos, sin = numpy_of(q), numpy_of(cos)[:, None], numpy_of(sin)[:, None]
    options = {"style": rope.style, "rotary_dim": rope.rotary_dim}
    found = apply(x, cos, sin, rounding=rope.rounding, **options)
    assert np.array_equal(found, expected)
    if dtype != "float32":
        other = "once" if rope.rounding == "every_op" else "every_op"
        turning = 2 * np.count_nonzero(rope.inverse_frequency) / head_dim
        wrong = apply(x, cos, sin, rounding=other, **options)
        assert mismatch(wrong, expected) > TELLING * turning


@pytest.mark.parametrize("name", NORMED_Q)
def test_every_family(name, rng):
    raw = saved(rotary.CONFIG_MAPPING[name]())
    for layer in range(8):  # the first that has a rotary embedding
        try:
            rope = Rope.from_config(raw, layer, max_position=32)
            break
        except ValueError as error:
            why = str(error)
    else:
        assert "is supported: " in why
        return
    theirs = Theirs(raw, layer)
    assert ulps(np.array(rope.inverse_frequency, np.float32), theirs.frequencies) <= 2
    q = torch.from_numpy(rng.standard_normal((1, 2, 32, rope.rotary_dim))).to(torch.bfloat16)
    positions = rng.integers(0, 32, (*([len(rope.sections)] if rope.sections else []), 1, 32))
    cos, sin = theirs.cos_sin(q.dtype, torch.from_numpy(positions))
    assert rope.table == ("x" if cos.dtype == q.dtype else "float32")
    expected = numpy_of(theirs.apply(q, cos, sin))
    x, cos, sin = numpy_of(q), *(halved(numpy_of(table))[:, None] for table in (cos, sin))
    assert np.array_equal(apply(x, cos, sin, style=rope.style, rounding=rope.rounding), expected)
    ours = [table[:, None] for table in rope.at(positions, cos.dtype)]
    ours = apply(x, *ours, style=rope.style, rounding=rope.rounding)
    assert mismatch(ours, expected) < FLIPS_FEW


SLIDING, FULL = "sliding_attention", "full_attention"
TURNED = [
    name
    for name, row in families.FAMILIES.items()
    if {"q", "encoder_q"} & row.roles.keys()
    for family in [models.BY_MODEL_TYPE.get(row.package or name)]
    if family is not None and family.tower == "text" and family.rope.order != "none"
]


def layers_that_turn(name, layer_types, monkeypatch):
    """
    Return a tiny model's config, and of each layer whether a forward pass turned its heads.

    Where the model tells sliding layers from full ones, it has two of `layer_types`.
    """
    row, kind = families.ROWS[name], families.model_class(name)
    if isinstance(kind, str):
        pytest.skip(kind)
    config = families._config(kind.config_class, row.config)
    config._attn_implementation = "eager"
    text = config.get_text_config()
    types = {*(getattr(text, "layer_types", None) or ())}
    made_by_type = name in ("neomme", "step3p7")  # their fields would not fit other types
    if types and types <= {SLIDING, FULL} and not made_by_type and text.sliding_window:
        text.layer_types = list(layer_types)
        text.sliding_window = text.sliding_window if SLIDING in layer_types else None
    model, now, seen, modules = kind(config).eval(), [], {}, set()

    def enter(layer):
        now[:] = [layer]
        seen.setdefault(layer, False)

    def telling(function):
        def told(*given, **named):
            seen.update(dict.fromkeys(now, True))
            return function(*given, **named)

        return told

    for path, attention in model.named_modules():
        found = re.fullmatch(r"(?!.*vision).*layers\.(\d+)\.self_attn", path)
        if found:
            attention.register_forward_pre_hook(lambda *_, layer=int(found[1]): enter(layer))
            attention.register_forward_hook(lambda *_: now.clear())
            modules.add(sys.modules[type(attention).__module__])
    for module in modules:
        for function in [name for name in vars(module) if name.startswith("apply_rotary")]:
            monkeypatch.setattr(module, function, telling(getattr(module, function)))
    with torch.no_grad():
        row.run(model)
    return saved(model.config), seen


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "layer_types"),
    [*((name, (SLIDING, FULL)) for name in TURNED), ("exaone4", (FULL, FULL))],
)
def test_layers_turn_as_in_the_model(name, layer_types, monkeypatch):
    """Full layers may turn nothing, or only where no layer slides."""
    config, seen = layers_that_turn(name, layer_types, monkeypatch)
    assert seen
    assert seen == {layer: rope_config.rotates(config, layer) for layer in seen}
    if name == "exaone4_5":  # as released: transformers renames it
        config["text_config"]["model_type"] = "exaone4_5_text"
        assert seen == {layer: rope_config.rotates(config, layer) for layer in seen}


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"model_type": "afmoe"}, "layer_types"),
        ({"model_type": "exaone4"}, "layer_types"),
        ({"model_type": "exaone_moe", "sliding_window": 128}, "layer_types"),
        ({"model_type": "muse_spark_text"}, "layer_rope_theta"),
    ],
)
def test_which_layers_turn_is_not_guessed(config, missing):
    """A config may leave out what its class makes up."""
    with pytest.raises(ValueError, match=f"the config of .* has no {missing}; needs them, since"):
        rope_config.rotates(config, 3)


def test_a_window_that_is_left_out_is_there():
    exaone = {"model_type": "exaone4", "layer_types": [SLIDING, FULL]}
    assert [rope_config.rotates(exaone, layer) for layer in (0, 1)] == [True, False]
    assert rope_config.rotates(exaone | {"sliding_window": None}, 1)
    assert rope_config.rotates({"model_type": "exaone4", "sliding_window": None}, 1)


def test_layers_that_turn_nothing_where_no_model_runs():
    """AFMoE and FLINT look at the layer alone, and Llama 4 counts: configuration_llama4:170."""
    for model_type in ("afmoe", "flint"):
        config = {"model_type": model_type, "layer_types": [FULL], "sliding_window": None}
        assert not rope_config.rotates(config, 0)
    for interval in ({}, {"no_rope_layer_interval": 4}, {"no_rope_layer_interval": 3}):
        every = interval.get("no_rope_layer_interval", 4)
        found = [rope_config.rotates({"model_type": "llama4_text"} | interval, i) for i in range(8)]
        assert found == [(i + 1) % every != 0 for i in range(8)]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_vl"])
def test_rows_of_positions(name, rng):
    if name == "qwen3_vl":
        theirs, rope = Theirs(QWEN3_VL, 0), Rope.from_config(QWEN3_VL, max_position=999)
    else:  # no norms, and so not in the registry: chunks of frequencies
        theirs = Theirs({"model_type": name, "text_config": {**BASE, "head_dim": None}}, 0)
        rope = Rope.of_theta(1e6, 128, max_position=999, sections=(16, 24, 24))
    rope = dataclasses.replace(rope, inverse_frequency=theirs.frequencies)
    positions = rng.integers(0, 999, (3, 1, 64))
    expected = theirs.cos_sin(torch.float32, torch.from_numpy(positions))
    for found, cos in zip(rope.at(positions, np.float32), expected, strict=True):
        assert np.abs(found - halved(numpy_of(cos))).max() <= 2.0**-23
    assert tuple(rope.row_of_frequency.count(row) for row in range(3)) == rope.sections


def test_cos_of_full_width_may_differ_within_a_pair(rng):
    """HunyuanOCR's sections are of dims, not of frequencies; its rounding is Cohere's."""
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 16, 16, 16]}
    raw = {"model_type": "hunyuan_vl_text", **BASE, "rope_parameters": sections}
    with pytest.raises(ValueError, match="the dims of a pair rotate by different angles"):
        Rope.from_config(raw)
    theirs = Theirs(raw, 0)
    q = torch.from_numpy(rng.standard_normal((1, 2, 64, 128))).to(torch.bfloat16)
    cos, sin = theirs.cos_sin(q.dtype, torch.from_numpy(rng.integers(0, 999, (4, 1, 64))))
    assert not torch.equal(cos[..., :64], cos[..., 64:])
    found = apply(numpy_of(q), numpy_of(cos)[:, None], numpy_of(sin)[:, None], rounding="once")
    assert np.array_equal(found, numpy_of(theirs.apply(q, cos, sin)))


LONG = {"short_factor": [1.0] * 64, "long_factor": [2.0 + i / 8 for i in range(64)]}
BY_HAND = {
    # what is refused: (config, fields of a Rope by hand)
    "type 'longrope'": (
        qwen3(rope_type="longrope", original_max_position_embeddings=4096, **LONG)[0], {},
    ),
    "the dims of a pair rotate by different angles": (
        {
            "model_type": "hunyuan_vl_text", **BASE,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 16, 16, 16],
            },
        },
        {"order": "before norm", "rounding": "once"},
    ),
    "its vision tower rotates by no table": ({"model_type": "sapiens2"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("refused", BY_HAND)
def test_what_a_config_is_refused_a_rope_by_hand_does(refused, rng):
    """As the error says: given cos and sin, a call asks the Rope for no angle."""
    config, fields = BY_HAND[refused]
    message = f"{refused}.*; needs .*a Rope by hand, whose calls are given cos and sin"
    with pytest.raises(ValueError, match=message):
        Rope.from_config(config)
    norms = [HeadNorm(rng.standard_normal(128).astype(np.float32)) for _ in "qk"]
    qk = QKNorm(*norms, rope=Rope.of_theta(1e4, 128, max_position=1, **fields))
    parts = [
        numpy_of(torch.from_numpy(rng.standard_normal((1, 64, n, 128))).to(torch.bfloat16))
        for n in (4, 2)
    ]
    if config["model_type"] == "sapiens2":  # its own angles are of a picture
        angles = rng.uniform(0, 9, (1, 64, 64))
        angles = torch.from_numpy(np.concatenate((angles, angles), -1)).to(torch.bfloat16)
        cos, sin = angles.cos(), angles.sin()
    else:
        rows = (4,) if "different angles" in refused else ()
        positions = torch.from_numpy(rng.integers(4096, 9999, (*rows, 1, 64)))
        cos, sin = Theirs(config, 0).cos_sin(torch.bfloat16, positions)
    cos, sin = numpy_of(cos), numpy_of(sin)

    def turn(x):
        rounding = fields.get("rounding", "every_op")
        return apply(x, cos[:, :, None], sin[:, :, None], rounding=rounding)

    found = qk(*parts, cos=cos, sin=sin)
    for y, x, norm in zip(found, parts, norms, strict=True):
        expected = norm(turn(x)) if "order" in fields else turn(norm(x))
        assert y.tobytes() == expected.tobytes()


def test_positions_index_tables_and_ropes_are_values():
    rope = Rope.of_theta(1e4, 8, max_position=3, attention_scaling=2)
    for table, found in zip(rope.tables("float64"), rope.at([0, 2, 1, 2], "float64"), strict=True):
        assert np.array_equal(found, table[[0, 2, 1, 2]])
    for empty in (np.zeros(0, int), np.zeros((3, 0), np.int32)):
        assert rope.at(empty, "float64")[0].shape == (*empty.shape, 4)
    assert hash(rope) == hash(Rope.of_theta(1e4, 8, max_position=3, attention_scaling=2.0))
    x = np.linspace(-1, 1, 30).reshape(3, 10)
    cos, sin = rope.tables("float64")
    a, b = x[:, :4], x[:, 4:8]
    expected = np.concatenate((a * cos - b * sin, b * cos + a * sin, x[:, 8:]), -1)
    assert np.array_equal(apply(x, cos, sin, rotary_dim=8), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tables_in_pieces(dtype):
    """As the whole at once, bit for bit, and in no more memory than a piece has."""
    rope = Rope.of_theta(1e4, 128, max_position=3 * 4096 + 7, attention_scaling=1.1)
    whole = rope._cos_sin(np.arange(rope.max_position)[:, None], rope.tables(dtype)[0].dtype)
    at = 0
    for start, *piece in rope._pieces(whole[0].dtype):
        assert start == at
        at += len(piece[0])
        for rows, table in zip(piece, whole, strict=True):
            assert rows.size <= embedding._CHUNK
            assert rows.tobytes() == table[start:at].tobytes()
    assert at == rope.max_position
    for table, expected in zip(rope.tables(dtype), whole, strict=True):
        assert table.tobytes() == expected.tobytes()


def test_what_is_too_long_is_cured_by_max_position():
    for most in (10**11, 2**62):
        config = qwen3()[0] | {"max_position_embeddings": most}
        assert Rope.from_config(config, max_position=4096).max_position == 4096
    assert configured(max_position_embeddings=2**24)._shape() == (2**24, 64)
    scout = {"model_type": "llama4_text", **BASE, "rope_scaling": rotary.LLAMA3}
    assert Rope.from_config(scout | {"max_position_embeddings": 10_485_760})._shape()


def rope(**fields):
    return Rope(**{"rotary_dim": 4, "inverse_frequency": (1, 0.5), "max_position": 9} | fields)


def configured(**fields):
    return Rope.from_config(qwen3()[0] | fields)


X = np.zeros((2, 8), np.float32)
REFUSED = {
    "rotary_dim is 3; needs an even number": lambda: rope(rotary_dim=3),
    r"shape \(2,\); needs \(3,\), half of rotary_dim 6": lambda: rope(rotary_dim=6),
    "an infinity or NaN; needs finite": lambda: rope(inverse_frequency=(1, np.inf)),
    "style is 'neox'; needs one of": lambda: rope(style="neox"),
    "'every_op' and table 'float32'; needs table 'x'": lambda: rope(table="float32"),
    "max_position is 0; needs 1 or more": lambda: rope(max_position=0),
    r"sections are \(1, 2\), together 3; needs 2, half": lambda: rope(sections=(1, 2)),
    "rotary_dim is 4; needs at most head_dim, which is 2": lambda: rope().check(2),
    "positions hold 9; needs 0 to 8, or a Rope with max_position=10 or more": lambda: (
        rope().at([0, 9, -1], "f")
    ),
    "positions hold -1; needs 0 to 8, and any of them for a token of pad": lambda: (
        rope().at(np.int32(-1), "f")
    ),
    "positions hold 18446744073709551615; needs 0 to 8": lambda: (
        rope().at(np.array([2**64 - 1], np.uint64), "f")
    ),
    "positions hold 12; needs 0 to 8": lambda: (
        rope(sections=(2, 0)).at([[1, 2], [3, 12]], "f")  # of a row that no frequency takes
    ),
    "inverse_frequency is 'ab'; needs a sequence of numbers": lambda: rope(inverse_frequency="ab"),
    "x is a list; needs a plain numpy.ndarray": lambda: apply([1.0], X, X),
    "cos is a matrix; needs a plain numpy.ndarray": lambda: apply(X, X.view(np.matrix), X),
    "dtype float64; needs an integer dtype": lambda: rope().at(np.ones(3), "f"),
    r"shape \(3,\); needs \(2, ...\), a row": lambda: rope(sections=(1, 1)).at([1, 1, 1], "f"),
    "rotary_dim is 10; needs at most head_dim, which is 8": lambda: apply(X, X, X, rotary_dim=10),
    "sin is 8 wide; needs 2 or 4, for": lambda: apply(X, X[:, :2], X, rotary_dim=4),
    "type 'longrope'; needs one of": lambda: configured(rope_scaling={"rope_type": "longrope"}),
    "type 'dynamic'; needs": lambda: configured(rope_scaling={"type": "dynamic", "alpha": 9.0}),
    "type 'linear' has no factor": lambda: configured(rope_scaling={"type": "linear"}),
    "rope_theta None; needs a number": lambda: configured(rope_theta=None),
    "is 'gpt2'; needs one that .* has, or Rope": lambda: configured(model_type="gpt2"),
    "mllama is supported: it has none": lambda: configured(model_type="mllama"),
    "deepseek_v4 is supported: the last dims": lambda: configured(model_type="deepseek_v4"),
    "sapiens2 is supported: its vision tower": lambda: configured(model_type="sapiens2"),
    "needs max_position=": lambda: configured(max_position_embeddings=None),
    "layer is 12; needs 0 to 11": lambda: Rope.from_config(GEMMA4, 12),
    "layer is 4; needs 0 to 3, as layer_types have it": lambda: rope_config.rotates(OLMO3, 4),
    "theta is -1; needs a number above 0": lambda: configured(rope_theta=-1),
    "type 'yarn' has no factor; needs one": lambda: configured(
        rope_scaling=YARN | {"factor": None}, max_position_embeddings=None
    ),
    "factor is 0.25, 32 of 128 dims in vLLM, but qwen3 in transformers does not .* it 128;": (
        lambda: configured(partial_rotary_factor=0.25)
    ),
    "0.25, 8 of 32 dims in vLLM, but qwen3 .* it 32; needs a config without it, or a Rope": (
        lambda: configured(head_dim=32, rope_scaling={"partial_rotary_factor": 0.25})
    ),
    "rotary_dim is 32, 32 of 128 dims by its name, but qwen3": lambda: configured(rotary_dim=32),
    "rotary_pct is 0.25, 32 of 128 dims in vLLM, but glm4_moe in .* does not .* without it 64;": (
        lambda: configured(model_type="glm4_moe", rotary_pct=0.25)
    ),
    "1.5 of head_dim 128 shall rotate; needs a share": lambda: configured(
        model_type="glm4_moe", partial_rotary_factor=1.5
    ),
    "head_dim is 0; needs 1 to 65536": lambda: configured(head_dim=0),
    "head_dim is null, which the config class of qwen3 .* refuses; needs .* or head_dim=": (
        lambda: configured(head_dim=None)
    ),
    "head_dim is 192; needs 64, the qk_rope_head_dim of deepseek_v3": lambda: Rope.from_config(
        qwen3()[0] | {"model_type": "deepseek_v3"}, head_dim=192
    ),
    "the config of apertus has no rope_parameters; needs them": lambda: configured(
        model_type="apertus"
    ),
    "kimi_linear is supported: it has none": lambda: configured(model_type="kimi_linear"),
    "it has none unless its config's use_mem_rope is True": lambda: configured(model_type="zamba2"),
    "max_position is 100000000000; needs 2147483647 at most: hand in max_position=": (
        lambda: configured(max_position_embeddings=10**11)
    ),
    f"max_position is {2**62}; needs 2147483647 at most": lambda: configured(
        max_position_embeddings=2**62
    ),
    "is 16777217; needs 16777216 at most for tables of rotary_dim 128: hand in max_position=": (
        lambda: configured(max_position_embeddings=2**24 + 1).tables("float16")
    ),
    "has no low_freq_factor": lambda: configured(rope_scaling={"type": "llama3", "factor": 2}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()
