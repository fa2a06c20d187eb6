"""safetensors files as people have them: whole, sharded, damaged, hostile."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from cupy_headnorm import CheckpointError, HeadNorm
from cupy_headnorm._arrays.dtypes import DTYPES
from cupy_headnorm.checkpoint import files, tensors
from cupy_headnorm.checkpoint.files import short

KEY = "model.layers.0.self_attn.q_norm"


def index(folder, weight_map):
    (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def shards(tmp_path, rng):
    """Weight and bias of one norm in two shards, as large models have them."""
    weight = rng.standard_normal((3, 64)).astype(ml_dtypes.bfloat16)
    bias = rng.standard_normal((3, 64)).astype(np.float32)
    save_file({f"{KEY}.weight": weight}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({f"{KEY}.bias": bias}, tmp_path / "model-00002-of-00002.safetensors")
    index(
        tmp_path,
        {
            f"{KEY}.weight": "model-00001-of-00002.safetensors",
            f"{KEY}.bias": "model-00002-of-00002.safetensors",
        },
    )
    return tmp_path, weight, bias


def test_round_trip(dtype, rng, tmp_path):
    weight = rng.standard_normal((3, 64)).astype(dtype.numpy)
    bias = rng.standard_normal(64).astype(dtype.numpy)
    path = tmp_path / "norm.safetensors"
    HeadNorm(weight, bias).to_safetensors(path, KEY)
    norm = HeadNorm.from_safetensors(str(path), KEY)
    for read, given in ((norm.weight, weight), (norm.bias, bias)):
        assert read.dtype == given.dtype
        np.testing.assert_array_equal(read, given)


def test_shards(shards):
    folder, weight, bias = shards
    norm = HeadNorm.from_safetensors(folder, KEY, kind="layer")
    np.testing.assert_array_equal(norm.weight, weight)
    np.testing.assert_array_equal(norm.bias, bias)
    assert (norm.num_heads, norm.head_dim) == (3, 64)


def test_single_file_comes_before_the_index(shards):
    folder, weight, _ = shards
    save_file({f"{KEY}.weight": weight + weight}, folder / files.SINGLE)
    norm = HeadNorm.from_safetensors(folder, KEY)
    np.testing.assert_array_equal(norm.weight, weight + weight)
    assert norm.bias is None


def test_torch_reads_what_we_write_and_the_other_way(tmp_path, rng):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from safetensors.torch import save_file as torch_save_file

    weight = torch.randn(64, dtype=torch.bfloat16)
    torch_save_file({f"{KEY}.weight": weight}, tmp_path / "torch.safetensors")
    norm = HeadNorm.from_safetensors(tmp_path / "torch.safetensors", KEY)
    norm.to_safetensors(tmp_path / "ours.safetensors", "q_norm")
    again = load_file(tmp_path / "ours.safetensors")["q_norm.weight"]
    assert torch.equal(again, weight)


def test_links_into_a_download_cache_are_followed(shards, tmp_path_factory):
    folder, weight, _ = shards
    cache = tmp_path_factory.mktemp("blobs")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(cache / "blob")
    shard.symlink_to(cache / "blob")
    np.testing.assert_array_equal(HeadNorm.from_safetensors(folder, KEY).weight, weight)


def test_missing_key_lists_near_ones(shards):
    folder, *_ = shards
    with pytest.raises(
        CheckpointError, match=rf"no tensor model.layers.0.attn.q_norm.weight; .*{KEY}"
    ):
        HeadNorm.from_safetensors(folder, "model.layers.0.attn.q_norm")


def test_missing_key_of_an_empty_file(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="it holds no tensors"):
        HeadNorm.from_safetensors(tmp_path / "empty.safetensors", KEY)


def test_read_tensor_names_near_ones(shards):
    folder, weight, _ = shards
    np.testing.assert_array_equal(tensors.read_tensor(folder, f"{KEY}.weight"), weight)
    with pytest.raises(CheckpointError, match=rf"no tensor {KEY}.wait; it has {KEY}.weight"):
        tensors.read_tensor(folder, f"{KEY}.wait")


def test_missing_shard(shards):
    folder, *_ = shards
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors does not exist"):
        HeadNorm.from_safetensors(folder, KEY)


def test_two_maps_of_one_index(shards):
    folder, *_ = shards
    entry = f'"weight_map": {{"{KEY}.weight": "model-0000%d-of-00002.safetensors"}}'
    (folder / files.INDEX).write_text(f"{{{entry % 1}, {entry % 2}}}")
    with pytest.raises(CheckpointError, match="puts weight_map in .*; needs one file for each"):
        tensors.survey(folder)


def raw(header, data=b""):
    """Return a safetensors file with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("shape", [[1] * 65 + [64], [0, 2**63], [0, 2**64 - 1], [0] * 100])
def test_shapes_that_only_safetensors_allows(tmp_path, shape):
    length = 0 if 0 in shape else 256
    header = {f"{KEY}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, length]}}
    path = tmp_path / "norm.safetensors"
    path.write_bytes(raw(header, bytes(length)))
    with pytest.raises(CheckpointError, match=rf"cannot give {KEY}.weight \(.*(dimension|too big)"):
        HeadNorm.from_safetensors(path, KEY)


def test_a_file_is_opened_once_for_all_heads(tmp_path, monkeypatch):
    # Each opening parses all of the header: 20,000 heads of 2 MB took ten minutes.
    import safetensors

    path = tmp_path / "norm.safetensors"
    save_file({f"{KEY}.norms.{head}.weight": np.ones(4) for head in range(50)}, path)
    opened, safe_open = [], safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k)
    )
    assert HeadNorm.from_safetensors(path, KEY, kind="layer").num_heads == 50
    assert len(opened) == 2  # once for the names


def test_a_tensors_name_of_no_end(tmp_path):
    save_file({"a" * 1000: np.ones(2)}, tmp_path / "norm.safetensors")
    tensors.survey(tmp_path / "norm.safetensors")
    save_file({"a" * 1001: np.ones(2)}, tmp_path / "norm.safetensors")
    with pytest.raises(CheckpointError, match=r"name of 1001 characters, a{40}\.\.\.; needs 1000"):
        tensors.survey(tmp_path / "norm.safetensors")


def test_messages_steer_no_terminal_and_end(tmp_path):
    path = tmp_path / "norm.safetensors"
    save_file({"\x1b[2J\u202eq\n.weight": np.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J\\u202eq\\n") as error:
        HeadNorm.from_safetensors(path, "q")
    assert str(error.value).isprintable()
    save_file({"q" * 100_000 + ".weight": np.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"no tensor q.weight; .* \.\.\. qqq") as error:
        HeadNorm.from_safetensors(path, "q")
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize("name", [files.CONFIG, files.INDEX])
def test_json_of_no_end(tmp_path, name):
    # Parsed it would be many times as long; of a file with a hole nothing is read.
    with (tmp_path / name).open("wb") as file:
        file.truncate(10**12)
    read = files.config if name == files.CONFIG else files.files
    with pytest.raises(CheckpointError, match="has 1000000000000 bytes; needs 100000000 at most"):
        read(tmp_path)


def test_what_is_no_file_is_not_waited_for(shards):
    folder, *_ = shards
    (folder / files.INDEX).unlink()
    os.mkfifo(folder / files.CONFIG)
    os.mkfifo(folder / files.INDEX)
    with pytest.raises(CheckpointError, match="has no config.json"):
        files.config(folder)
    assert {path.name for path in files.files(folder).values()} == {
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    }
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds 1 of model-\*-of-00002; needs all of them"):
        files.files(folder)


@pytest.fixture
def no_files(tmp_path):
    """What is there and no file, by what it is called: a pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    other = "is a pipe, a device or a socket"
    return tmp_path, {"pipe": other, "link": other, "/dev/zero": other, "folder": "is a folder"}


def test_what_is_no_file_is_named(no_files):
    folder, said = no_files
    norm = HeadNorm(np.ones(4, np.float32))
    for name, what in said.items():
        refused = pytest.raises(CheckpointError, match=f"{name} {what}; needs a safetensors file")
        with refused:
            norm.to_safetensors(folder / name, KEY)
        if name != "folder":  # of a folder its files are read
            with refused:
                HeadNorm.from_safetensors(folder / name, KEY)
            with refused:
                tensors.read_tensor(folder / name, KEY)
    assert list((folder / "folder").iterdir()) == []


def test_a_folder_named_as_a_file_is_named(no_files):
    folder, _ = no_files
    (folder / files.SINGLE).mkdir()
    (folder / files.CONFIG).mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors \(no file\), pipe \(no file\); "):
        files.files(folder)
    with pytest.raises(CheckpointError, match=r"has no config.json \(it is a folder\), which"):
        files.config(folder)
    (folder / files.CONFIG).rmdir()
    os.mkfifo(folder / files.CONFIG)
    with pytest.raises(
        CheckpointError, match=r"config.json \(it is a pipe, a device or a socket\)"
    ):
        files.config(folder)


def test_a_name_that_no_file_can_have_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"a cannot be written \(.*too long"):
        HeadNorm(np.ones(4, np.float32)).to_safetensors(tmp_path / ("a" * 300), KEY)


class Unwritable:
    def __repr__(self):
        raise AssertionError("looked at")


@pytest.mark.parametrize(
    "value",
    [None, True, 1.5, float("nan"), "a'b", "x" * 99, "\x1b" * 99, [], {}, (), (1,), [1, [2]],
     10**99, {"a": {"b": ()}, "c": [{}, ""]}, {"x" * 99: 1}, [[[]]] * 50, ((0, 1),) * 50],
)  # fmt: skip
def test_a_value_is_written_as_repr_does_and_cut(value):
    for most in (60, 200):
        assert short(value, most) == repr(value)[:most]


def test_what_is_not_shown_is_not_looked_at():
    rest = Unwritable()
    assert short([0] * 30 + [rest]) == repr([0] * 99)[:60]
    assert short({"a" * 70: rest}) == "{'" + "a" * 58
    assert len(short([["z" * 10**8]])) == 60


def test_index_and_shard_disagree(shards):
    folder, weight, _ = shards
    save_file({"other.weight": weight}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks {KEY}.weight, which the index puts there"):
        HeadNorm.from_safetensors(folder, KEY)


@pytest.mark.parametrize(
    "shard",
    [
        *("../x.safetensors", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "\\\\host\\x", ".."),
        *(".", "", "\0", "up/model.safetensors", "a/model.safetensors", None, 3, ["x"], {"": "x"}),
    ],
)
@pytest.mark.parametrize("read", [lambda f: HeadNorm.from_safetensors(f, KEY), tensors.survey])
def test_index_entries_that_are_no_names(shards, shard, read):
    # A path is refused though it stayed inside: a link on its way may lead out.
    folder, weight, _ = shards
    (folder / "a").mkdir()
    save_file({f"{KEY}.weight": weight}, folder / "a" / "model.safetensors")
    (folder / "up").symlink_to("a")
    index(folder, {f"{KEY}.weight": shard})
    with pytest.raises(CheckpointError, match="needs the name of a file beside it"):
        read(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', "[" * 5000, "\xff"]
)
def test_index_that_is_none(shards, text):
    folder, *_ = shards
    (folder / files.INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"is no index .*needs JSON with a .weight_map."):
        HeadNorm.from_safetensors(folder, KEY)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_file(tmp_path, keep):
    data = save({f"{KEY}.weight": np.ones(64, np.float32)})
    path = tmp_path / "norm.safetensors"
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="is no readable safetensors file"):
        HeadNorm.from_safetensors(path, KEY)


def test_corrupt_files(tmp_path):
    data = bytearray(save({f"{KEY}.weight": np.ones(64, np.float32)}))
    path = tmp_path / "norm.safetensors"
    for change in (
        b"\xff" * 8 + data[8:],  # a header longer than the file
        data[:8] + b"x" + data[9:],  # no JSON
        bytes(data).replace(b"F32", b"F99"),  # no dtype
        b"not safetensors at all, just text",
    ):
        path.write_bytes(change)
        with pytest.raises(CheckpointError, match="is no readable safetensors file"):
            HeadNorm.from_safetensors(path, KEY)


def test_fp8_is_refused_from_the_header(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as torch_save_file

    path = tmp_path / "norm.safetensors"
    torch_save_file({f"{KEY}.weight": torch.ones(64).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(TypeError, match=r"has dtype F8_E4M3; needs F16 or BF16 or F32 or F64"):
        HeadNorm.from_safetensors(path, KEY)


def test_places_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; needs a safetensors file"):
        HeadNorm.from_safetensors(tmp_path / "nowhere", KEY)
    with pytest.raises(CheckpointError, match=r"holds nothing; needs model.safetensors or model"):
        HeadNorm.from_safetensors(tmp_path, KEY)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds notes.txt; needs model.safetensors"):
        HeadNorm.from_safetensors(tmp_path, KEY)
    with pytest.raises(CheckpointError, match="does not exist|cannot be read"):
        HeadNorm.from_safetensors(tmp_path / "notes.txt" / "below", KEY)


def test_folder_without_permission(shards, monkeypatch):
    folder, *_ = shards
    if os.geteuid() != 0:
        folder.chmod(0)
    else:  # root may read all: let the system call fail as it would for others
        from pathlib import Path

        def refused(self):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "is_file", refused)
    try:
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
            HeadNorm.from_safetensors(folder, KEY)
    finally:
        folder.chmod(0o700)


def test_headers_are_those_of_all_shards(shards):
    folder, *_ = shards
    assert tensors.survey(folder)[0] == {
        f"{KEY}.weight": ("BF16", (3, 64)),
        f"{KEY}.bias": ("F32", (3, 64)),
    }
    assert tensors.survey(folder / "model-00002-of-00002.safetensors")[0] == {
        f"{KEY}.bias": ("F32", (3, 64))
    }


def test_headers_need_every_shard(shards):
    folder, weight, _ = shards
    first = folder / "model-00001-of-00002.safetensors"
    save_file({"other.weight": weight}, first)
    found, _, notes = tensors.survey(folder)
    assert found[f"{KEY}.weight"] == (tensors.LACKING, ())
    assert notes == (f"{first.name} lacks {KEY}.weight, which the index names",)
    with pytest.raises(CheckpointError, match=rf"lacks {KEY}.weight, which the index puts there"):
        tensors.read_norm(folder, KEY)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors does not exist"):
        tensors.survey(folder)


def test_two_files_that_hold_one_tensor(shards):
    folder, weight, bias = shards
    second = folder / "model-00002-of-00002.safetensors"
    save_file({f"{KEY}.weight": weight, f"{KEY}.bias": bias}, second)
    with pytest.raises(
        CheckpointError,
        match=rf"model-00001-of-00002.safetensors and .*model-00002-of-00002.safetensors both hold "
        rf"{KEY}.weight; needs one file for each tensor",
    ):
        tensors.survey(folder)


def test_an_index_that_puts_one_tensor_in_two_files(shards):
    folder, *_ = shards
    path = folder / files.INDEX
    entry = f'"{KEY}.weight": "model-00001-of-00002.safetensors"'
    other = f'"{KEY}.weight": "model-00002-of-00002.safetensors"'
    path.write_text(f'{{"weight_map": {{{entry}, {other}}}}}')
    with pytest.raises(
        CheckpointError,
        match=rf"puts {KEY}.weight in 'model-00001.*' and in 'model-00002.*'; needs one file",
    ):
        HeadNorm.from_safetensors(folder, KEY)
    long = json.dumps(["z" * 9999] * 9)
    path.write_text(f'{{"weight_map": {{{entry}, "{KEY}.weight": {long}}}}}')
    with pytest.raises(CheckpointError, match="puts .*; needs one file") as error:
        files.files(folder)
    assert "z" * 100 not in str(error.value)
    path.write_text(f'{{"weight_map": {{{entry}, {entry}}}}}')  # twice the same is no claim
    HeadNorm.from_safetensors(folder, KEY)


def names_of(folder, variant=None):
    return set(tensors.survey(folder, variant=variant)[0])


def test_files_are_looked_for_in_the_libraries_order(tmp_path):
    stems = ("model", "diffusion_pytorch_model")
    for number, stem in reversed(list(enumerate(stems))):
        # Each is preferred to those that were written before it.
        save_file({f"shard{number}": np.ones(2)}, tmp_path / f"{stem}-00001-of-00001.safetensors")
        listed = {"weight_map": {f"shard{number}": f"{stem}-00001-of-00001.safetensors"}}
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(listed))
        assert names_of(tmp_path) == {f"shard{number}"}
        save_file({f"whole{number}": np.ones(2)}, tmp_path / f"{stem}.safetensors")
        assert names_of(tmp_path) == {f"whole{number}"}


def test_variants(tmp_path):
    save_file({"plain": np.ones(2)}, tmp_path / "model.safetensors")
    save_file({"half": np.ones(2)}, tmp_path / "model.fp16-00001-of-00001.safetensors")
    listed = {"weight_map": {"half": "model.fp16-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(listed))
    assert names_of(tmp_path, "fp16") == {"half"}
    save_file({"whole": np.ones(2)}, tmp_path / "model.fp16.safetensors")
    assert names_of(tmp_path, "fp16") == {"whole"}
    assert names_of(tmp_path) == {"plain"}
    assert tensors.read_tensor(tmp_path, "whole", variant="fp16").tolist() == [1, 1]
    with pytest.raises(
        CheckpointError,
        match=r"needs model.int8.safetensors or model.safetensors.index.int8.json",
    ):
        names_of(tmp_path, "int8")


@pytest.mark.parametrize("variant", ["../x", "a/b", "a\\b", "C:x", "\0", 16])
def test_a_variant_is_no_path(tmp_path, variant):
    with pytest.raises(CheckpointError, match="needs a part of a file's name, such as 'fp16'"):
        tensors.survey(tmp_path, variant=variant)


def test_config(tmp_path):
    path = tmp_path / files.CONFIG
    with pytest.raises(CheckpointError, match=r"has no config.json, which says what the model is"):
        files.config(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere has no config.json"):
        files.config(tmp_path / "nowhere")
    path.write_text('{"model_type": "qwen3"}')
    assert files.config(str(tmp_path)) == {"model_type": "qwen3"}
    for text in ("", "{", "[" * 100_000, "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"is no JSON .*; needs a model's config.json"):
            files.config(tmp_path)
    path.write_text('{"a":' * 64 + "1" + "}" * 64)
    files.config(tmp_path)
    path.write_text('{"a":' * 64 + "[1]" + "}" * 64)  # to show this may exhaust the stack
    with pytest.raises(CheckpointError, match=r"config.json nests deeper than 64; needs a model's"):
        files.config(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json holds a list; needs a JSON object"):
        files.config(tmp_path)


def test_a_module_a_head_is_stacked_by_number(tmp_path):
    path = tmp_path / "norm.safetensors"
    heads = {f"{KEY}.norms.{head}.weight": np.full(4, head, np.float32) for head in range(12)}
    save_file(heads | {f"{KEY}.norms.x.weight": np.ones(9)}, path)
    norm = HeadNorm.from_safetensors(path, KEY, kind="layer")
    assert norm.weight[:, 0].tolist() == list(range(12))
    assert (norm.num_heads, norm.head_dim) == (12, 4)
    del heads[f"{KEY}.norms.5.weight"]
    save_file(heads, path)
    with pytest.raises(
        CheckpointError,
        match=rf"{KEY}.norms.6.weight is there and {KEY}.norms.5.weight is not; needs every head "
        "from 0 to 11",
    ):
        HeadNorm.from_safetensors(path, KEY)
    heads[f"{KEY}.norms.5.weight"] = np.ones(3, np.float32)
    save_file(heads, path)
    with pytest.raises(
        CheckpointError, match=r"float32 \(3,\) and float32 \(4,\); needs one dtype"
    ):
        HeadNorm.from_safetensors(path, KEY)


def test_heads_that_alternate_between_shards_keep_their_order(tmp_path):
    shards = {f"{KEY}.norms.{head}.weight": f"{head % 2}.safetensors" for head in range(5)}
    for shard in set(shards.values()):
        own = {
            name: np.full(4, head, np.float32)
            for head, name in enumerate(shards)
            if shards[name] == shard
        }
        save_file(own, tmp_path / shard)
    index(tmp_path, shards)
    weight = HeadNorm.from_safetensors(tmp_path, KEY, kind="layer").weight
    assert weight[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_bias_alone(tmp_path):
    path = tmp_path / "norm.safetensors"
    HeadNorm(None, np.full(64, 0.5, np.float32)).to_safetensors(path, KEY)
    norm = HeadNorm.from_safetensors(path, KEY)
    assert norm.weight is None
    assert (norm.bias == 0.5).all()


def test_writing_loses_no_other_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    norm = HeadNorm(np.ones(64, np.float32))
    norm.to_safetensors(path, KEY)
    norm.to_safetensors(path, KEY)
    save_file({"lm_head.weight": np.ones(3), f"{KEY}.weight": np.ones(64)}, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"holds lm_head.weight among 1 other tensors, which"):
        norm.to_safetensors(path, KEY)
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot be written"):
        norm.to_safetensors(tmp_path / "no" / "such" / "folder.safetensors", KEY)


def test_a_norm_without_parameters_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="neither weight nor bias"):
        HeadNorm().to_safetensors(tmp_path / "x", KEY)


def test_every_dtype_of_the_table_has_a_safetensors_name():
    assert {dtype.safetensors for dtype in DTYPES} == {"F16", "BF16", "F32", "F64"}
