"""Strategies that change a tree of JSON, or bytes, as a stranger might."""

import copy
import functools

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
