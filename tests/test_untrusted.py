"""
Folders from a stranger: reading ends soon, stays within them, and fails with an error of ours.

Valid little checkpoints are changed at every level: the tree of config.json, of the index and of
the headers, their bytes, the length in front of a header, the offsets, the data, what lies in the
folder. HEADNORM_CASES=20000 runs as many of each kind and other ones each time.
"""

import contextlib
import copy
import functools
import io
import json
import linecache
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cupy_headnorm
from cupy_headnorm import CheckpointError, HeadNorm, QKNorm, _inspect_report, checkpoint, cli
from cupy_headnorm.pretrained import head_norms

CASES = int(os.environ.get("HEADNORM_CASES") or 0)
SECONDS = 10  # an example takes some 20 ms
PACKAGE = str(Path(cupy_headnorm.__file__).parent)
SECRET = 777.0

checked = settings(
    max_examples=CASES or 60,
    derandomize=not CASES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

KEYS = [f"model.layers.0.self_attn.{name}" for name in ("q_norm", "k_norm", "q_layernorm")]


# Checkpoints as they should be


def tensors_of(prefix, layers, q, k, names=("q_norm", "k_norm"), rows=(64, 32), dtype="BF16"):
    """Return dtypes and shapes of some layers' norms and projections."""
    tensors = {}
    for layer in range(layers):
        at = f"{prefix}layers.{layer}.self_attn."
        for name, shape, length in zip(names, (q, k), rows, strict=True):
            heads = [f".norms.{head}" for head in range(shape[0])] if len(shape) == 2 else [""]
            for head in heads:
                tensors[f"{at}{name}{head}.weight"] = (dtype, shape[-1:])
            tensors[f"{at}{name[0]}_proj.weight"] = ("I8", (length, 2))
    return tensors


TEXT = {
    "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "rope_scaling": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}  # fmt: skip
VISION = {"model_type": "siglip_vision_model", "hidden_size": 8, "num_hidden_layers": 1}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
WHOLE = (16,), (16,)
SEEDS = {
    "qwen3": (TEXT | {"rope_scaling": YARN}, tensors_of("model.", 2, *WHOLE)),
    "qwen3_vl": (
        {
            "model_type": "qwen3_vl", "vision_config": {"model_type": "qwen3_vl"},
            "text_config": TEXT | {
                "model_type": "qwen3_vl_text",
                "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
            },
        },
        tensors_of("model.language_model.", 1, *WHOLE),
    ),
    "gemma3": (
        {
            "model_type": "gemma3", "vision_config": VISION,
            "text_config": TEXT | SLIDING | {"model_type": "gemma3_text"},
        },
        tensors_of("language_model.model.", 2, *WHOLE)
        | {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": ("F16", (4, 4))},
    ),
    "stablelm": (
        TEXT | {
            "model_type": "stablelm", "qk_layernorm": True, "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
        },
        tensors_of("model.", 1, (4, 16), (2, 16), ("q_layernorm", "k_layernorm"), dtype="F32"),
    ),
    "cohere": (
        TEXT | {"model_type": "cohere", "use_qk_norm": True, "layer_norm_eps": 1e-5},
        {"model.layers.0.self_attn.q_norm.weight": ("F16", (4, 16)),
         "model.layers.0.self_attn.k_norm.weight": ("F16", (2, 16))},
    ),
    "llama4": (
        TEXT | {
            "model_type": "llama4_text", "use_qk_norm": True, "no_rope_layers": [1, 0],
            "rope_scaling": LLAMA3,
        },
        {"model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 2))},
    ),
    "olmo2": (TEXT | {"model_type": "olmo2"}, tensors_of("model.", 2, (64,), (32,))),
    "unknown": ({"model_type": "nobody"}, tensors_of("model.", 1, *WHOLE, dtype="F64")),
}  # fmt: skip
SIZES = {"I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def header_of(tensors):
    """Return the header of a file with these tensors, and the length of its data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return header, end


def file_of(header, data, length=None):
    """Return a safetensors file; `length` is what it says of its header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length % 2**64) + header + data


def seeded(name, sharded):
    """Return a checkpoint as trees and lengths: what is mutated, and written by `write`."""
    config, tensors = copy.deepcopy(SEEDS[name])
    names = list(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    files = SHARDS if sharded else (checkpoint.SINGLE,)
    index = {
        "metadata": {"total_size": 4096},
        "weight_map": {n: f for f, part in zip(files, parts, strict=True) for n in part},
    }
    shards = {f: header_of({n: tensors[n] for n in p}) for f, p in zip(files, parts, strict=True)}
    return config, (index if sharded else None), shards


def write(folder, config, index, shards):
    (folder / checkpoint.CONFIG).write_bytes(encoded(config))
    if index is not None:
        (folder / checkpoint.INDEX).write_bytes(encoded(index))
    for name, (header, size) in shards.items():
        (folder / name).write_bytes(file_of(header, b"\x3c" * size))


def encoded(tree):
    return tree if isinstance(tree, bytes) else json.dumps(tree).encode()


# What a stranger makes of them

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


# What must hold


def deliberate(error):
    """Tell whether an error was raised by a statement of the package, not on its way."""
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    file = at.tb_frame.f_code.co_filename
    line = linecache.getline(file, at.tb_lineno).strip()
    return file.startswith(PACKAGE) and line.startswith("raise ")


@contextlib.contextmanager
def refusing(allowed=(ValueError, TypeError)):
    """Let pass errors of ours, and of the kinds that are documented."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, allowed) or not deliberate(error):
            raise
        told = str(error)
        if isinstance(error, CheckpointError) and (len(told) > 5000 or not told.isprintable()):
            raise AssertionError(f"{told!r} is no message of one line") from error


@contextlib.contextmanager
def in_time(seconds=SECONDS):
    def late(*_):
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def size_of(folder):
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())


@contextlib.contextmanager
def in_memory(folder):
    """
    Allow what parsed JSON and values in float64 need, a fixed multiple of the files.

    The constant is of modules that are imported and of tracebacks.
    """
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    most = (8 << 20) + 100 * size_of(folder)
    assert peak <= most, f"{peak} bytes, where {most} are allowed"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for each example, beside what must not be read; all that is opened is noted."""
    secret, _ = header_of({f"{KEYS[0]}.weight": ("F32", (16,))})
    values = np.full(16, SECRET, "<f4").tobytes()
    (tmp_path / "secret.safetensors").write_bytes(file_of(secret, values))
    (tmp_path / checkpoint.CONFIG).write_text('{"model_type": "secret"}')
    opened = []
    safe_open = safetensors.safe_open
    read_bytes = Path.read_bytes

    def noted(path, *arguments, **keywords):
        opened.append(path)
        return safe_open(path, *arguments, **keywords)

    def read(path):
        # hypothesis reads too: it looks for constants in the text of modules.
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            opened.append(path)
        return read_bytes(path)

    monkeypatch.setattr(safetensors, "safe_open", noted)
    monkeypatch.setattr(Path, "read_bytes", read)

    @contextlib.contextmanager
    def made():
        opened.clear()
        folder = tmp_path / "model"
        folder.mkdir()
        try:
            yield folder
            strange = [path for path in opened if Path(os.path.abspath(path)).parent != folder]
            assert not strange
        finally:
            for entry in folder.iterdir():
                entry.unlink()
            folder.rmdir()

    made.opened = opened
    return made


def read_all(folder):
    """Read a folder by every door."""
    with refusing():
        checkpoint.config(folder)
    names = []
    with refusing():
        found, holder = checkpoint.survey(folder)
        assert found.keys() == holder.keys()
        names = checkpoint.tensor_names(folder)
    for name in names[:2]:
        with refusing():
            array = checkpoint.read_tensor(folder, name)
            assert not (array.astype(np.float64) == SECRET).any()
    stems = [name.removesuffix(".weight") for name in names if "norm" in name]
    for key in [*stems[:1], *KEYS[:2]]:
        with refusing():
            norm = HeadNorm.from_safetensors(folder, key)
            assert norm.weight is None or not (norm.weight.astype(np.float64) == SECRET).any()
        with refusing():
            HeadNorm.from_pretrained(folder, key)
    with refusing():
        HeadNorm.from_pretrained(
            folder, KEYS[0], kind="rms", eps=1e-6, rounding="once", num_heads=1
        )
    with refusing(CheckpointError):
        norms = head_norms(folder)
        assert len(repr(norms)) < 10_000
        assert norms.notes is not None
        for key in list(norms)[:4]:
            with refusing():
                norms[key]
    for layer in (0, 1):
        with refusing():
            QKNorm.from_pretrained(folder, layer)
    with refusing():
        found = _inspect_report.collect(str(folder))
        json.dumps(found)
        shown(found)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = cli.main(["inspect", "--json", str(folder)])
    told = err.getvalue()
    assert (code, told.count("\n")) in ((0, 0), (2, 1))


def shown(found):
    from rich.console import Console

    _inspect_report.show(found, Console(file=io.StringIO(), width=100))


@pytest.fixture
def tried(place):
    """Return a context that writes nothing and checks all when it is left."""

    @contextlib.contextmanager
    def trying(traced=True):
        with place() as folder:
            yield folder
            with in_time(), in_memory(folder) if traced else contextlib.nullcontext():
                read_all(folder)

    return trying


TRACED = st.sampled_from((False, False, False, True))  # to trace memory takes thrice the time
SEEDED = st.builds(seeded, st.sampled_from(list(SEEDS)), st.booleans())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_read(tried, name, sharded):
    # Else all that follows would test one message.
    with tried() as folder:
        write(folder, *seeded(name, sharded))
        if name == "unknown":
            HeadNorm.from_safetensors(folder, KEYS[0])
        elif name != "olmo2":
            assert len(head_norms(folder)) > 0
            QKNorm.from_pretrained(folder, 0)


@checked
@given(data=st.data())
def test_config(tried, data):
    config, index, shards = data.draw(SEEDED)
    with tried(data.draw(TRACED)) as folder:
        write(folder, data.draw(mutated(config)), index, shards)


@checked
@given(data=st.data())
def test_config_bytes(tried, data):
    config, index, shards = data.draw(SEEDED)
    with tried(data.draw(TRACED)) as folder:
        write(folder, data.draw(spoiled(encoded(config))), index, shards)


NAMES = st.sampled_from([
    "__metadata__", "", "\0", "\x1b[2J", "a" * 999, "a" * 1001, "." * 900, "model.layers.0",
    *(f"{KEYS[0]}.{part}" for part in ("weight", "bias", "norms.0.weight", "norms.7.weight")),
    f"{KEYS[1]}.weight", f"{KEYS[1]}.bias", "model.layers.99999.self_attn.q_norm.weight",
    "visual.blocks.0.attn.q_norm.weight", "model.layers.00.self_attn.q_norm.weight",
    "model.layers.100000.self_attn.q_norm.weight", "layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.q_proj.weight", "x.layers.1.self_attn.k_norm.weight",
])  # fmt: skip
LENGTHS = st.one_of(
    st.none(),
    st.sampled_from([0, 1, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1]),
    st.integers(0, 10_000),
)


@checked
@given(data=st.data())
def test_headers(tried, data):
    config, index, shards = data.draw(SEEDED)
    name = data.draw(st.sampled_from(list(shards)))
    header, size = shards[name]
    with tried(data.draw(TRACED)) as folder:
        write(folder, config, index, shards)
        changed = encoded(data.draw(mutated(header, NAMES)))
        if data.draw(st.booleans()):
            changed = data.draw(spoiled(changed))
        size = max(0, size + data.draw(st.sampled_from((0, 0, 0, -1, 1, -size, 64))))
        written = file_of(changed, b"\x3c" * size, data.draw(LENGTHS))
        (folder / name).write_bytes(written)


TRICKS = ("shape", "zeros", "offsets", "overlap", "gap", "axes", "dtype", "empty")


@checked
@given(data=st.data())
def test_headers_that_contradict_themselves_only_a_little(tried, data):
    # Most changes of above end at safetensors' first look: these pass it, or nearly.
    config, index, shards = data.draw(SEEDED)
    with tried(data.draw(TRACED)) as folder:
        for header, _ in shards.values():
            own = [name for name in header if name != "__metadata__"]
            for name in own and data.draw(st.lists(st.sampled_from(own), max_size=2, unique=True)):
                tensor, trick = header[name], data.draw(st.sampled_from(TRICKS))
                count = int(np.prod(tensor["shape"]))
                if trick == "shape":
                    parts = [n for n in (1, 2, 4, 8, 16, 32, 64) if count % n == 0]
                    part = data.draw(st.sampled_from(parts))
                    tensor["shape"] = [part, count // part]
                elif trick == "axes":
                    tensor["shape"] = [1] * data.draw(st.integers(0, 80)) + [count]
                elif trick in ("zeros", "empty"):
                    tensor["shape"] = [0, *data.draw(st.lists(NUMBERS, max_size=3))]
                    if trick == "empty":
                        tensor["data_offsets"][1] = tensor["data_offsets"][0]
                elif trick == "dtype":
                    tensor["dtype"] = data.draw(st.sampled_from(("F16", "U16", "I16", "F8_E4M3")))
                else:
                    by = data.draw(st.sampled_from((-1, 1, 8, 2**63)))
                    places = {"overlap": (0,), "gap": (1,), "offsets": (0, 1)}[trick]
                    for at in places:
                        tensor["data_offsets"][at] += by
        for name in list(shards):
            header, _ = shards[name]
            size = max((t["data_offsets"][1] for t in header.values() if "dtype" in t), default=0)
            shards[name] = header, size if 0 <= size < 100_000 else 0
        write(folder, config, index, shards)


FILES = st.sampled_from([
    "../secret.safetensors", "..", ".", "", "/", "\0", "a" * 300, "a" * 5000, "sub/x", "\ud800",
    "./" + SHARDS[0], SHARDS[0], SHARDS[1], checkpoint.CONFIG, checkpoint.INDEX, "pipe", "loop",
    "link", "nothing", "up/secret.safetensors", "..\\secret.safetensors", "C:\\x", "C:x", "zero",
    "\\\\host\\x", "file:///etc/passwd", "~", "%2e%2e/secret.safetensors", "\x1b[2J", "/dev/zero",
    "//secret.safetensors", "x/../../secret.safetensors",
])  # fmt: skip


@checked
@given(data=st.data())
def test_index(tried, data):
    config, index, shards = data.draw(SEEDED.filter(lambda seed: seed[1] is not None))
    with tried(data.draw(TRACED)) as folder:
        secret = str(folder.parent / "secret.safetensors")
        names = st.one_of(FILES, st.just(secret), VALUES)
        changed = data.draw(mutated(index, NAMES, names))
        if data.draw(st.integers(0, 3)) == 0:
            changed = data.draw(spoiled(encoded(changed)))
        write(folder, config, changed, shards)
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")
        (folder / "link").symlink_to(SHARDS[0])
        (folder / "up").symlink_to("..")
        (folder / "nothing").symlink_to("missing")
        (folder / "zero").symlink_to("/dev/zero")


@checked
@given(data=st.data())
def test_files_of_any_bytes(tried, data):
    with tried(data.draw(TRACED)) as folder:
        for name in (checkpoint.CONFIG, checkpoint.INDEX, checkpoint.SINGLE, *SHARDS):
            if data.draw(st.booleans()):
                start = data.draw(st.sampled_from((b"", b"{", b"\x02" + bytes(7) + b"{}")))
                (folder / name).write_bytes(start + data.draw(st.binary(max_size=64)))


# What was found, each once more by name


def refused_soon(folder, config, tensors, read, match):
    header, size = header_of(tensors)
    write(folder, config, None, {checkpoint.SINGLE: (header, size)})
    with (
        in_time(),
        in_memory(folder),
        pytest.raises(ValueError, match=match) as error,
    ):
        read(folder)
    assert deliberate(error.value)


LLAMA4, OF_LLAMA4 = SEEDS["llama4"]
QWEN3, OF_QWEN3 = SEEDS["qwen3"]


@pytest.mark.parametrize(
    "fields",
    [{"head_dim": 2**31 - 1}, {"head_dim": 2**24}, {"head_dim": 32, "rotary_dim": 2**31},
     {"partial_rotary_factor": 1e6}, {"partial_rotary_factor": float("inf")}],
)  # fmt: skip
def test_a_head_is_as_long_as_memory(tmp_path, fields):
    # 300 bytes of config.json asked for 30 GB.
    config = LLAMA4 | {"rope_scaling": None} | fields
    refused_soon(
        tmp_path, config, {"model.layers.0.self_attn.q_proj.x": ("BF16", (1, 2))},
        lambda folder: QKNorm.from_pretrained(folder, 0), "needs a share of 1 at most",
    )  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{"model_type": {}, "text_config": TEXT | {"model_type": {}}}, {"rope_scaling": 3},
     {"rope_scaling": [[1]]}, {"rope_scaling": {"rope_type": {}}}, {"rope_theta": {"a": 1}},
     {"rope_scaling": YARN | {"beta_fast": {}}}, {"rope_scaling": LLAMA3 | {"low_freq_factor": 0}},
     {"rope_scaling": LLAMA3 | {"factor": "../x"}}, {"layer_types": []},
     {"rope_parameters": 1, "rope_scaling": None}, {"rope_scaling": {"mrope_section": True}},
     {"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, {"rope_theta": -0.0}],
)  # fmt: skip
def test_a_rotary_embedding_of_any_values(tmp_path, fields):
    refused_soon(
        tmp_path, QWEN3 | fields, OF_QWEN3, lambda folder: QKNorm.from_pretrained(folder, 0),
        "; needs ",
    )  # fmt: skip


def test_prefixes_of_many_modules_beside_a_config_of_many_fields(tmp_path):
    # Each module was looked for in all of the config: a minute for 400 KB.
    config = {str(field): 0 for field in range(10_000)} | QWEN3
    tensors = {
        f"{'a.' * 450}x{number}.layers.0.self_attn.q_norm.weight": ("F16", (16,))
        for number in range(300)
    }
    refused_soon(tmp_path, config, tensors, head_norms, "has 10011 fields in one place; needs 1000")


def test_a_rotary_embedding_for_each_of_many_layers(tmp_path):
    # Each layer looked at all of them: 20 s for 80 KB.
    many = {str(kind): {"rope_theta": 1} for kind in range(3000)}
    refused_soon(
        tmp_path, LLAMA4 | {"num_hidden_layers": 10_000, "rope_parameters": many}, OF_LLAMA4,
        head_norms, "rope_parameters has 3000 fields; needs 100 at most",
    )  # fmt: skip


def test_a_model_type_of_no_end_is_shown_soon(tmp_path):
    config = {"model_type": "qwen3" * 100_000}
    write(tmp_path, config, None, {checkpoint.SINGLE: header_of({"x": ("F16", (1,))})})
    with in_time():
        shown(_inspect_report.collect(str(tmp_path)))


def test_inspect_opens_a_file_once_for_all_norms(place):
    with place() as folder:
        tensors = tensors_of("model.", 20, *WHOLE)
        write(folder, QWEN3, None, {checkpoint.SINGLE: header_of(tensors)})
        _inspect_report.collect(str(folder))
        assert place.opened.count(folder / checkpoint.SINGLE) == 3  # names, headers, data


UNDER_A_LIMIT = """
import contextlib, resource, sys
from cupy_headnorm import CheckpointError, HeadNorm
from cupy_headnorm.pretrained import head_norms
from cupy_headnorm import QKNorm, _inspect_report
import ml_dtypes, safetensors, rich.table
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        HeadNorm.from_safetensors(path, "q")
    except CheckpointError:
        pass
    else:
        raise SystemExit(f"{path} was read")
    for read in (head_norms, _inspect_report.collect):
        with contextlib.suppress(CheckpointError):
            read(path)
try:
    bytearray(128 << 20)
except MemoryError:
    print("all refused")
"""


def test_memory_of_safetensors_itself_is_limited(tmp_path):
    # tracemalloc sees nothing of what is not Python's or NumPy's.
    def one(shape, offsets, dtype="F32"):
        return {"q.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    files = [
        *(file_of(b"{}", b"", length) for length in (99_999_999, 100_000_001, 2**31, 2**63, -1)),
        *(
            file_of(one(shape, offsets), bytes(64))
            for shape, offsets in (
                ([2**40], [0, 2**42]), ([2**32, 2**32], [0, 64]), ([2**62], [0, 0]),
                ([16], [0, 2**63]), ([16], [2**63, 64]), ([-16], [0, 64]), ([16], [64, 0]),
                ([2**61 + 16], [0, 64]), ([16, 1.5], [0, 64]), ([16], [-64, 64]),
            )
        ),
        file_of(one([0, 2**62], [0, 0]), b""),
        file_of(b'{"q.weight":' + b"[" * 1_000_000, b""),
        file_of(one([16], [0, 64]) | {"b": one([8], [0, 32])["q.weight"]}, bytes(64)),
    ]  # fmt: skip
    folders = []
    for number, data in enumerate(files):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / checkpoint.SINGLE).write_bytes(data)
        (folder / checkpoint.CONFIG).write_text('{"model_type": "qwen3"}')
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, *folders], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("all refused\n", "")
