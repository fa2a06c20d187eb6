"""What test_untrusted.py found, each once more by name."""

import subprocess
import sys

import pytest
import strangers
from checkpoints import LLAMA3, SEEDS, TEXT, WHOLE, YARN, file_of, header_of, tensors_of, write
from strangers import deliberate, in_memory, in_time, shown

from cupy_headnorm import QKNorm, _inspect_report, checkpoint
from cupy_headnorm.pretrained import head_norms

# The fixtures of strangers.py that these tests take.
place = strangers.place


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
