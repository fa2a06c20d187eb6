"""What test_untrusted.py found, each once more by name."""

import itertools
import subprocess
import sys

import pytest
import untrusted
from checkpoints import LLAMA3, SEEDS, TEXT, WHOLE, YARN, file_of, header_of, tensors_of, write
from untrusted import LONG, deliberate, in_memory, in_time, shown

from cupy_headnorm import CheckpointError, QKNorm
from cupy_headnorm._commands import inspect
from cupy_headnorm.checkpoint import files as checkpoint_files
from cupy_headnorm.models import BY_MODEL_TYPE
from cupy_headnorm.pretrained import head_norms

# The fixtures of untrusted.py that these tests take.
place = untrusted.place


def refused_soon(folder, config, tensors, read, match):
    header, size = header_of(tensors)
    write(folder, config, None, {checkpoint_files.SINGLE: (header, size)})
    with (
        in_time(folder),
        in_memory(folder),
        pytest.raises(ValueError, match=match) as error,
    ):
        read(folder)
    assert deliberate(error.value)


LLAMA4, OF_LLAMA4 = SEEDS["llama4"]
QWEN3, OF_QWEN3 = SEEDS["qwen3"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"head_dim": 2**31 - 1}, "head_dim is 2147483647; needs 1 to 65536"),
     ({"head_dim": 2**24}, "head_dim is 16777216; needs 1 to 65536"),
     ({"head_dim": 32, "rotary_dim": 2**31}, "2147483648 of 32 dims .* needs a config without it"),
     ({"partial_rotary_factor": 1e6}, "16000000 of 16 dims .* needs a config without it"),
     ({"partial_rotary_factor": float("inf")}, "cannot convert float infinity .*; needs fields")],
)  # fmt: skip
def test_a_head_is_as_long_as_memory(tmp_path, fields, said):
    # 300 bytes of config.json asked for 30 GB.
    config = LLAMA4 | {"rope_scaling": None} | fields
    refused_soon(
        tmp_path, config, {"model.layers.0.self_attn.q_proj.x": ("BF16", (1, 2))},
        lambda folder: QKNorm.from_pretrained(folder, 0), said,
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
        tmp_path, LLAMA4 | {"num_hidden_layers": 1000, "rope_parameters": many}, OF_LLAMA4,
        head_norms, "rope_parameters has 3000 fields; needs 100 at most",
    )  # fmt: skip


def read_soon(folder, config, tensors, read=head_norms):
    """Read a folder in time and memory in proportion to it."""
    write(folder, config, None, {checkpoint_files.SINGLE: header_of(tensors)})
    with in_time(folder):
        found = read(folder)
    with in_memory(folder):
        read(folder)
    return found


def empty(prefixes):
    return {f"{prefix}.0.x": ("F32", (0,)) for prefix in prefixes}


UNWEIGHTED = sorted(
    name
    for name, family in BY_MODEL_TYPE.items()
    if any(role.weight == "none" for role in family.roles) and family.tower == "text"
)


@pytest.mark.parametrize("model_type", UNWEIGHTED)
def test_layers_that_a_config_counts_are_counted_once(tmp_path, model_type):
    # Each plain prefix had all of them: 4 s and 10 MB for each 100 bytes.
    words = ("model", "transformer", "backbone", "module")
    prefixes = [".".join(path) for path in itertools.product(words, repeat=3)]
    config = QWEN3 | {"model_type": model_type, "num_hidden_layers": 1000, "rope_scaling": None}
    norms = read_soon(tmp_path, config, empty(f"{prefix}.layers" for prefix in prefixes))
    assert len(norms) <= 3000


def test_a_layer_type_that_is_no_word_is_not_written_for_each_norm(tmp_path):
    # 0.26 s for 95 KB, four times as long for twice as many.
    kinds = {str(number): number for number in range(60_000)}
    config = QWEN3 | {"layer_types": kinds, "rope_parameters": {"rope_type": "default"}}
    assert len(read_soon(tmp_path, config, tensors_of("model.", 300, *WHOLE))) == 600


def test_shares_that_are_no_numbers_are_not_compared_for_each_norm(tmp_path):
    kinds = {kind: {"partial_rotary_factor": [0] * 200_000} for kind in "ab"}
    config = QWEN3 | {"rope_parameters": kinds}
    assert len(read_soon(tmp_path, config, tensors_of("model.", 300, *WHOLE))) == 600


def test_a_model_type_that_is_no_word_is_not_written_for_each_group(tmp_path):
    # 7 s for 270 KB.
    config = {"model_type": [0] * 160_000}
    norms = read_soon(tmp_path, config, empty(f"p{number}.layers" for number in range(400)))
    assert norms.model_type == repr([0] * 100)[:100]


@pytest.mark.parametrize("prefix", ["visual." * 27, ""])
def test_all_fields_are_not_looked_at_for_each_group(tmp_path, prefix):
    # For each module that is named for a sense: 8 s for 140 KB.
    config = QWEN3 | {f"x{number}_config": None for number in range(900)}
    names = empty(f"{prefix}x{number}.layers" for number in range(500))
    assert len(read_soon(tmp_path, config, names)) == 0


@pytest.mark.parametrize(
    "long", ["z" * 99_999, [0] * 99_999, {"z" * 99_999: 0}, [["z"] * 999] * 99, 10**4000]
)
@pytest.mark.parametrize(
    ("fields", "name"),
    [({}, "rms_norm_eps"), ({}, "head_dim"), ({}, "num_attention_heads"),
     ({"model_type": "llama4_text"}, "no_rope_layers"), ({"model_type": "gemma3"}, "text_config"),
     ({"model_type": "cohere", "layer_norm_eps": 1}, "use_qk_norm"), ({}, "model_type")],
)  # fmt: skip
def test_no_message_and_no_note_prints_a_long_value(tmp_path, fields, name, long):
    config = QWEN3 | fields | {name: long}
    of = OF_QWEN3 if fields == {} else OF_LLAMA4
    write(tmp_path, config, None, {checkpoint_files.SINGLE: header_of(of)})
    try:
        told = shown(inspect.collect(str(tmp_path)))
    except CheckpointError as error:
        told = str(error)
    assert "; needs " in told or " in /" in told
    assert len(told.replace(str(tmp_path), "")) < 1500
    assert not any(part in told for part in LONG)


def test_a_model_type_of_no_end_is_shown_soon(tmp_path):
    config = {"model_type": "qwen3" * 100_000}
    write(tmp_path, config, None, {checkpoint_files.SINGLE: header_of({"x": ("F16", (1,))})})
    with in_time(tmp_path):
        shown(inspect.collect(str(tmp_path)))


def test_inspect_opens_a_file_once_for_all_norms(place):
    with place() as folder:
        tensors = tensors_of("model.", 20, *WHOLE)
        write(folder, QWEN3, None, {checkpoint_files.SINGLE: header_of(tensors)})
        inspect.collect(str(folder))
        assert place.opened.count(folder / checkpoint_files.SINGLE) == 3  # names, headers, data


UNDER_A_LIMIT = """
import contextlib, resource, sys
from cupy_headnorm import CheckpointError, HeadNorm
from cupy_headnorm.pretrained import head_norms
from cupy_headnorm import QKNorm
from cupy_headnorm._commands import inspect
import ml_dtypes, safetensors
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        HeadNorm.from_safetensors(path, "q")
    except CheckpointError:
        pass
    else:
        raise SystemExit(f"{path} was read")
    for read in (head_norms, inspect.collect):
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
        (folder / checkpoint_files.SINGLE).write_bytes(data)
        (folder / checkpoint_files.CONFIG).write_text('{"model_type": "qwen3"}')
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, *folders], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("all refused\n", "")
