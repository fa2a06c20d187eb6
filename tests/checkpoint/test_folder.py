"""What a caller may name: a folder, a snapshot in the hub's cache; and files of other names."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from cupy_headnorm import CheckpointError, HeadNorm, QKNorm, head_norms
from cupy_headnorm._commands import inspect
from cupy_headnorm.checkpoint import files

CONFIG = {
    "model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_hidden_layers": 2, "rope_theta": 1e6, "max_position_embeddings": 64,
}  # fmt: skip
NAME = "nobody/Qwen3-tiny"


def tensors(layer):
    at = f"model.layers.{layer}.self_attn"
    return {f"{at}.{n}_norm.weight": np.full(16, layer + 1, np.float32) for n in "qk"}


def written(folder, *names):
    """Write a model whose layers lie in one file each of these names, or all in one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files.CONFIG).write_text(json.dumps(CONFIG))
    if len(names) == 1:
        save_file(tensors(0) | tensors(1), folder / names[0])
    for layer, name in enumerate(names if len(names) > 1 else ()):
        save_file(tensors(layer), folder / name)
    return folder


def index(folder, **where):
    """Write an index that puts layers into files of other names."""
    named = {name: file for file, layers in where.items() for i in layers for name in tensors(i)}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": named}))


SHARDS = [f"output-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.mark.parametrize("names", [["output.safetensors"], SHARDS], ids=["one", "shards"])
@pytest.mark.parametrize("stale", [False, True])
def test_files_of_a_conversion(names, stale, tmp_path, capsys):
    folder = written(tmp_path, *names)
    if stale:
        index(folder, **{"model-00001-of-00001.safetensors": (0, 1)})
    norms = head_norms(folder)
    assert [float(norms[layer, "q"].weight[0]) for layer in (0, 1)] == [1, 2]
    norm = HeadNorm.from_safetensors(folder, "model.layers.1.self_attn.k_norm")
    assert float(norm.weight[0]) == 2
    more = " and 1 more" if len(names) > 1 else ""
    told = f"{files.INDEX} names files that are not there; read instead: {names[0]}{more}"
    assert norms.notes[:1] == ((told,) if stale else norms.notes[:1])
    assert (told in norms.notes) == stale
    inspect.show(inspect.collect(str(folder)))
    assert (f"Note: {told}\n" in capsys.readouterr().out) == stale


def test_files_that_are_no_set(tmp_path):
    folder = written(tmp_path, *SHARDS)
    save_file(tensors(0), folder / "consolidated.safetensors")
    told = r"holds consolidated.safetensors and output-\*-of-00002; needs model.safetensors, .* one"
    with pytest.raises(CheckpointError, match=told):
        head_norms(folder)
    (folder / "consolidated.safetensors").unlink()
    (folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"holds 1 of output-\*-of-00002; needs all of them"):
        head_norms(folder)


def test_an_index_whose_files_are_there_in_part_is_not_stale(tmp_path):
    folder = written(tmp_path, *SHARDS)
    index(folder, **{SHARDS[0]: (0,), "output-00003-of-00003.safetensors": (1,)})
    with pytest.raises(CheckpointError, match="output-00003-of-00003.safetensors does not exist"):
        head_norms(folder)


def test_a_tensor_that_its_shard_lacks_refuses_what_needs_it_alone(tmp_path):
    folder = written(tmp_path, "model-00001-of-00001.safetensors")
    named = [*tensors(0), *tensors(1), "mtp.fc.weight", "model.layers.2.self_attn.q_norm.weight"]
    shard = "model-00001-of-00001.safetensors"
    (folder / files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(named, shard)}))
    norms = head_norms(folder)
    assert list(norms) == [(0, "q"), (0, "k"), (1, "q"), (1, "k")]
    assert f"{shard} lacks mtp.fc.weight and 1 more, which the index names" in norms.notes
    with pytest.raises(CheckpointError, match="q_norm is refused: the index names its tensor, and"):
        norms[2, "q"]
    with pytest.raises(CheckpointError, match="lacks mtp.fc.weight, which the index puts there"):
        HeadNorm.from_safetensors(folder, "mtp.fc")


READS = {
    "head_norms": head_norms,
    "from_pretrained": lambda at: HeadNorm.from_pretrained(at, "model.layers.0.self_attn.q_norm"),
    "QKNorm": lambda at: QKNorm.from_pretrained(at, 0),
    "inspect": inspect.collect,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_no_folder_is_told_the_folder(read, tmp_path):
    folder = written(tmp_path / "m", "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"is a file; needs the model's folder, {folder}, w"):
        read(str(folder / "model.safetensors"))
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("transformer", "vae"):
        written(tmp_path / name, "diffusion_pytorch_model.safetensors")
    first = tmp_path / "transformer"
    with pytest.raises(
        CheckpointError, match=rf"is a pipeline of diffusers; .* models, {first} or"
    ):
        read(str(tmp_path))
    read(str(folder))


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_hub_id_is_read_from_the_cache(read, tmp_path, monkeypatch):
    """Nothing is downloaded: the cache is one that the hub's own package would have made."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    download = rf"^{NAME} is no folder.*snapshot_download\('{NAME}'\) returns its folder"
    with pytest.raises(CheckpointError, match=download):
        read(NAME)
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    written(repository / "snapshots" / "abc", "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    read(NAME)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=download):  # without the package there is no cache
        read(NAME)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"^{NAME} has no config.json"):  # a folder wins
        read(NAME)


def test_the_hubs_package_is_imported_for_a_hub_id_alone(tmp_path):
    folder = written(tmp_path, "model.safetensors")
    code = (
        "import sys; from cupy_headnorm import head_norms; head_norms(sys.argv[1])\n"
        "print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
