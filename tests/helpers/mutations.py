"""Strategies that change a tree of JSON, or bytes, as damage or malice might."""

import copy
import functools
import itertools

from checkpoints import SEEDS
from hypothesis import strategies as st

DEEP = functools.reduce(lambda inner, _: [inner], range(300), 0)
HUGE = [2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400]
NUMBERS = st.sampled_from([
    0, 1, 2, 3, 4, 7, 15, 16, 17, 64, 100, -1, -16, 10_001, *HUGE, *(-number for number in HUGE),
    0.0, 0.5, 1.0, -0.0, 1.5, 1e-45, 5e-324, 1e38, 1e39, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"),
])  # fmt: skip
WORDS = st.sampled_from([
    "", "x", "F32", "BF16", "F8_E4M3", "F4", "I64", "C64", "BOOL", "\ud800", "\x1b[2J", "a" * 3000,
    "sliding_attention", "full_attention", "linear", "yarn", "llama3", "dynamic", "mrope",
    "proportional", "longrope", "default", *SEEDS, "gemma3_text", "qwen3_vl_text", "gemma3n",
    "\u202e", "é", "\0", "1e5", "-1", "nan", "__metadata__", "../x", "a.b.c" * 100,
])  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.integers(), st.floats())
VALUES = st.one_of(
    LEAVES,
    st.sampled_from(
        [[], {}, [[]], {"": {}}, DEEP, [0, 0], [1] * 70, [0, 2**63], {"a": {"b": [1]}}]
    ),
    st.lists(LEAVES, max_size=4),
    st.dictionaries(WORDS, LEAVES, max_size=3),
)
LONG = st.sampled_from([
    [0] * 200_000, {str(number): 0 for number in range(100_000)}, "z" * 500_000, 10**4000,
    [[0] * 100] * 1000, {"z" * 500: [0] * 100_000}, [{"a": 0}] * 30_000, ["z" * 1000] * 300,
    {"full_attention": {"partial_rotary_factor": [0] * 99_999, "rope_type": "z" * 99_999},
     "sliding_attention": {"partial_rotary_factor": [0] * 99_999, "rope_type": "z" * 99_999}},
])  # fmt: skip
"""What a message shows the start of, and what nobody may look at as a whole for each group."""
FIELDS = st.sampled_from(
    """
    model_type text_config vision_config thinker_config llm_config decoder _class_name
    hidden_size head_dim num_attention_heads num_key_value_heads rms_norm_eps layer_norm_eps
    layer_types num_hidden_layers use_qk_norm per_layer_config global_head_dim sliding_window
    sliding_window_pattern no_rope_layers no_rope_layer_interval
    rope_parameters rope_scaling rope_theta rope_local_base_freq layer_rope_theta
    rope_scaling_layers rope_type type factor truncate alpha mrope_section attention_factor
    beta_fast beta_slow mscale mscale_all_dim low_freq_factor high_freq_factor
    original_max_position_embeddings max_position_embeddings
    partial_rotary_factor rotary_dim rotary_pct
    """.split()  # noqa: SIM905  a list of so many quotes is unreadable
)


def places(tree):
    """Return every place in a tree of JSON, as the container and the key."""
    found, level = [], [tree]
    while level:
        outer = level.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer))
        for key in keys:
            found.append((outer, key))
            if isinstance(outer[key], (dict, list)):
                level.append(outer[key])
    return found


@st.composite
def mutated(draw, tree, names=FIELDS, values=VALUES, most=3):
    """Draw a tree with some of its values changed, moved, lost or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        at = places(tree)
        if not at:
            break
        outer, key = at[draw(st.integers(0, len(at) - 1))]
        how = draw(
            st.sampled_from(("set", "set", "set", "delete", "add", "swap", "wrap", "rename"))
        )
        if how == "set":
            outer[key] = copy.deepcopy(draw(values))
        elif how == "delete":
            del outer[key]
        elif how == "add" and isinstance(outer, dict):
            outer[draw(names)] = copy.deepcopy(draw(values))
        elif how == "swap":
            other, name = at[draw(st.integers(0, len(at) - 1))]
            outer[key] = copy.deepcopy(other[name])
        elif how == "wrap":
            outer[key] = draw(st.sampled_from((lambda v: [v], lambda v: {"": v})))(outer[key])
        elif isinstance(outer, dict):
            outer[draw(names)] = outer.pop(key)
    return tree


LOOKED_AT = st.sampled_from(["model_type", "_class_name", "layer_types", "rope_parameters"])
"""Fields that are read for each group of layers, or for each norm."""
PLAIN = ["model", "base_model", "module", "backbone", "transformer", "language_model", "llm"]
STACKS = ["layers", "h", "blocks", "transformer_blocks", "single_layers", "refiner"]
RESTS = st.sampled_from([
    "x", "self_attn.x", "self_attn.q_norm.weight", "self_attn.v_norm.weight",
    "self_attn.q_proj.weight", "self_attn.q_layernorm.norms.0.weight", "attn.norm_q.weight",
])  # fmt: skip


CROWDS = ("plain prefixes", "prefixes", "layers", "tensors of a layer")
BURDENS = ("long value", "many fields", "many layers")


@st.composite
def crowd(draw, how, count=300):
    """Draw names of many tensors: of many groups of layers, many layers, or many of one layer."""
    rest, stack = draw(RESTS), draw(st.sampled_from(STACKS))
    words = draw(st.lists(st.sampled_from(["visual", "audio_x", "thinker", *PLAIN]), max_size=24))
    if how == "plain prefixes":  # of the model's main part, each of them
        prefixes = itertools.chain.from_iterable(
            itertools.product(PLAIN, repeat=depth) for depth in range(5)
        )
        return [
            ".".join((*prefix, stack, "0", rest)) for prefix in itertools.islice(prefixes, count)
        ]
    at = {
        "prefixes": lambda number: (*words, f"x{number}", stack, "0", rest),
        "layers": lambda number: (*words, stack, str(number), rest),
        "tensors of a layer": lambda number: (*words, stack, "0", f"x{number}", rest),
    }[how]
    return [".".join(at(number)) for number in range(count)]


@st.composite
def crowded(draw, config, what):
    """Draw a config that takes long to look at as a whole, or has as many layers as it may."""
    config = copy.deepcopy(config)
    if what == "long value":
        config[draw(st.one_of(LOOKED_AT, FIELDS))] = draw(LONG)
    elif what == "many fields":
        named = draw(st.sampled_from(("x{}", "x{}_config", "vision_{}_config")))
        config |= {named.format(number): None for number in range(950)}
    else:
        config["num_hidden_layers"] = 1000
        unweighted = "nanochat", "llama4_text", "diffllama", "muse_spark_text"
        config["model_type"] = draw(st.sampled_from(unweighted))
    return config


@st.composite
def spoiled(draw, data):
    """Draw bytes that differ from `data` in a few places, or have nothing to do with it."""
    data = bytearray(data)
    how = draw(st.sampled_from(("bytes", "cut", "insert", "replace", "encode", "double")))
    if how == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    elif how == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif how == "insert":
        at = draw(st.integers(0, len(data)))
        data[at:at] = draw(st.sampled_from(SCRAPS))
    elif how == "replace":
        data = draw(st.one_of(st.binary(max_size=200), st.sampled_from(SCRAPS)))
    elif how == "encode":
        text = data.decode("latin-1")
        kind = draw(st.sampled_from(("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-7")))
        data = text.encode(kind)
    else:  # twice the same keys
        data = data[:-1] + b"," + data[1:]
    return bytes(data)


SCRAPS = [
    b"NaN", b"-Infinity", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"[" * 5000, b'{"":' * 5000,
    b"{" * 200_000, b"9" * 5000, b"1e999", b'"\\ud800"', b"\xed\xa0\x80", b"//", b"{}", b"null",
    b'{"a":1,"a":2,', b'"weight_map":{},', b'"model_type":"gemma3_text",', b" " * 10_000,
]  # fmt: skip
