"""The command line, run as a newcomer does: in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tolerances import EPS_FLOAT32, EPS_ONE_ROUNDING, EPS_TWO_ROUNDINGS

from cupy_headnorm import HeadNorm, cli
from cupy_headnorm._commands import demo
from cupy_headnorm._commands import inspect as inspect_command
from cupy_headnorm._cuda import environment as cuda_environment


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cupy_headnorm", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def rows(text):
    return dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)


def in_process(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_demo_without_arguments(tmp_path):
    done = run("demo", "--tokens", "8")
    assert (done.returncode, done.stderr) == (0, "")
    said = rows(done.stdout)
    assert "model-00001-of-00002.safetensors, model-00002-of-00002" in said["checkpoint"]
    assert "HeadNorm.from_safetensors(" in said["norm"]
    assert "bfloat16 (8, 32, 128)" in said["x"]
    error = float(said["largest error"].split()[0])
    assert EPS_ONE_ROUNDING < error < EPS_TWO_ROUNDINGS
    assert said["weight"].strip() == "bfloat16 (128,)"
    assert "GB/s" in said["time"]
    assert "of the speed of a copy of 131072 bytes" in said["share of a copy"]
    assert ("GPU kernel" in said["where"]) or ("NumPy reference on the CPU: " in said["where"])


@pytest.fixture
def checkpoint(tmp_path, rng):
    weight = rng.standard_normal((4, 32)).astype(np.float32)
    norm = HeadNorm(weight, kind="layer")
    norm.to_safetensors(tmp_path / "model.safetensors", "layer.q_norm")
    x = rng.standard_normal((1, 4, 7, 32)).astype(np.float32)
    recorded = norm(x, heads_axis=-3)
    recorded[0, 0, 0, 0] += 1
    save_file(
        {"layer.q_norm.input": x, "layer.q_norm.output": recorded},
        tmp_path / "activations.safetensors",
    )
    return tmp_path


def test_demo_on_a_checkpoint_with_activations(checkpoint, capsys):
    code, out, err = in_process(
        capsys, "demo", checkpoint, "--key", "layer.q_norm", "--kind", "layer", "--heads-axis", -3,
        "--activations", checkpoint / "activations.safetensors", "--on", "cpu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    said = rows(out)
    assert said["mismatches"].strip().startswith("1 of 896 (0.1116 %)")
    assert said["where"].strip() == "NumPy reference on the CPU: as asked"
    assert "float32 (1, 4, 7, 32)" in said["x"]
    assert float(said["largest error"].split()[0]) < EPS_FLOAT32


def test_demo_with_an_input_alone_or_an_output_that_does_not_fit(checkpoint, capsys):
    x = np.ones((1, 4, 7, 32), np.float32)
    path = checkpoint / "activations.safetensors"
    common = (
        "demo",
        checkpoint,
        "--key",
        "layer.q_norm",
        "--heads-axis",
        -3,
        "--activations",
        path,
    )
    save_file({"layer.q_norm.input": x}, path)
    code, out, _ = in_process(capsys, *common)
    assert code == 0
    assert "mismatches" not in out
    save_file({"layer.q_norm.input": x, "layer.q_norm.output": x[..., 1:]}, path)
    code, _, err = in_process(capsys, *common)
    assert code == 2
    assert "output is float32 (1, 4, 7, 31); needs float32 (1, 4, 7, 32)" in err


def test_demo_reads_num_heads_as_those_of_x(capsys):
    code, out, _ = in_process(capsys, "demo", "--num-heads", 4, "--tokens", 2, "--on", "cpu")
    assert code == 0
    assert "bfloat16 (2, 4, 128)" in rows(out)["x"]


def test_demo_on_a_single_row(tmp_path, capsys):
    path = tmp_path / "norm.safetensors"
    HeadNorm(np.full(32, 2, np.float32), np.ones(32, np.float32)).to_safetensors(path, "q_norm")
    save_file({"q_norm.input": np.arange(32, dtype=np.float32)}, tmp_path / "x.safetensors")
    code, out, err = in_process(
        capsys, "demo", path, "--key", "q_norm", "--activations", tmp_path / "x.safetensors"
    )
    assert (code, err) == (0, "")
    assert "float32 (32,)" in rows(out)["x"]
    assert float(rows(out)["largest error"].split()[0]) < EPS_FLOAT32


def test_demo_makes_up_an_x_of_the_right_shape(checkpoint, capsys):
    common = ("demo", checkpoint, "--key", "layer.q_norm", "--tokens", 5, "--on", "cpu")
    code, out, _ = in_process(capsys, *common, "--dtype", "float16")
    assert code == 0
    assert "float16 (5, 4, 32)" in rows(out)["x"]
    code, out, _ = in_process(capsys, *common, "--heads-axis", -3)
    assert "float32 (1, 4, 5, 32)" in rows(out)["x"]
    code, out, _ = in_process(capsys, *common, "--tokens", 0)
    assert code == 0
    assert "(0, 4, 32)" in rows(out)["x"]


def test_the_largest_error_is_of_a_value_or_of_a_64th_of_its_rows_largest():
    x = np.array([[[64, 0.25, 0, 0]]], np.float32)
    norm = HeadNorm(head_dim=4, eps=0)
    y = norm(x)
    assert demo._largest_error(norm, x, y, -2) < 1
    y[0, 0, 1] += y.max() / 64 * 8 * np.finfo(np.float32).eps
    assert demo._largest_error(norm, x, y, -2) == pytest.approx(8, abs=0.5)


def test_info_says_what_works_and_what_to_install(capsys):
    code, out, err = in_process(capsys, "info")
    assert (code, err) == (0, "")
    said = rows(out)
    for name in ("cupy-headnorm", "Python", "numpy", "torch", "CuPy", "NVRTC", "driver"):
        assert said[name].strip()
    assert said["NumPy arrays"].strip() == "work"
    works = said["CUDA arrays"].strip()
    assert works.startswith("work") or (works.startswith("do not work: ") and said["needs"])


def test_info_on_a_machine_with_a_gpu(capsys, monkeypatch):
    found = cuda_environment.Environment(
        "", "", "14.2.0", "13.0", "CUDA 13.0", ("a GPU, sm_90",), "/cache"
    )
    monkeypatch.setattr(cuda_environment, "environment", lambda: found)
    code, out, err = in_process(capsys, "info")
    assert (code, err) == (0, "")
    said = {name: value.strip() for name, value in rows(out).items()}
    assert said["cuda:0"] == "a GPU, sm_90"
    assert said["CUDA arrays"] == "work: CuPy, torch, JAX and other DLPack arrays"
    assert "needs" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "/nowhere", "--key", "k"], "/nowhere does not exist; needs a safetensors file"),
        (["demo", "/nowhere"], "no --key given; needs the norm's name in the checkpoint"),
        (["demo", "--tokens", "-1"], "--tokens is -1; needs 0 or more"),
        (["demo", "--eps", "-1"], "eps is -1.0; needs 0 or more"),
        (["demo", "--head-dim", "77"], "weight has shape (128,); needs"),
        (["demo", "--heads-axis", "-1"], "heads_axis is -1"),
        (["demo", "--activations", "/nowhere"], "/nowhere does not exist"),
        (["demo", "--dtype", "float32", "--heads-axis", "5"], "heads_axis is 5 and x has shape"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, capsys):
    code, _, err = in_process(capsys, *arguments)
    assert code == 2
    assert err.startswith("cupy_headnorm: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--kind", "batch"], "argument --kind: invalid choice: 'batch'"),
        (["bench", "--head-dim", "0"], "argument --head-dim: 0 is given; needs 1 or more"),
        (["bench", "--megabytes", "inf"], "argument --megabytes: inf is given; needs a finite"),
    ],
)
def test_wrong_words_are_one_line_too(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("cupy_headnorm: ")
    assert done.stderr.count("\n") == 1


def test_asking_for_a_gpu_where_there_is_none():
    done = run("demo", "--on", "gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr or "CuPy is not usable" in done.stderr
    assert done.stderr.count("\n") == 1


def test_unwritable_cache_is_named_and_the_cpu_still_works(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = str(blocked / "cache")
    info = run("info", CUPY_CACHE_DIR=cache)
    assert info.returncode == 0
    assert "set CUPY_CACHE_DIR to one" in info.stdout or "CuPy is not usable" in info.stdout
    assert run("demo", "--tokens", "1", CUPY_CACHE_DIR=cache).returncode == 0
    asked = run("demo", "--on", "gpu", CUPY_CACHE_DIR=cache)
    assert asked.returncode == 2
    assert "importing CuPy failed" in asked.stderr or "CuPy is not usable" in asked.stderr
    assert asked.stderr.count("\n") == 1


def test_output_into_a_closed_pipe_is_no_error():
    done = subprocess.run(
        # `true` is gone before the first line, which a pipe would swallow otherwise.
        f"{sys.executable} -m cupy_headnorm info | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_bench_prints_a_table(capsys):
    code, out, err = in_process(
        capsys, "bench", "--tokens", 2, "--num-heads", 2, "--head-dim", 64, "--dtype", "float16",
        "--kind", "rms", "layer", "--layout", "contiguous", "in-place", "packed-qkv",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.count("2 x 2 x 64") == 6
    code, out, _ = in_process(capsys, "bench", "--megabytes", 0.1, "--num-heads", 2)
    assert "195 x 2 x 128" in out


CONFIG = {
    "model_type": "sarvam_moe", "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "partial_rotary_factor": 0.5,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """Three layers of Sarvam, the second without norms, and a tensor that looks like one."""
    tensors = {"model.layers.1.self_attn.v_norm.weight": np.ones(16, np.float32)}
    for layer in (0, 2):
        at = f"model.layers.{layer}.self_attn"
        tensors[f"{at}.q_norm.weight"] = np.linspace(layer, layer + 1, 16, dtype=np.float32)
        tensors[f"{at}.k_norm.weight"] = np.full(16, np.nan, np.float32)
        tensors[f"{at}.q_proj.weight"] = np.zeros((64, 8), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_inspect_prints_tables(model, capsys):
    code, out, err = in_process(capsys, "inspect", model)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"sarvam_moe in {model}"
    rows = "0, 2 {} (16,) F32 {} rms 0 1e-06 before_weight after norm, half, 0.5 of head_dim"
    assert rows.format("q", 4) in lines
    assert rows.format("k", 2) in lines
    values = np.concatenate([np.linspace(layer, layer + 1, 16) for layer in (0, 2)])
    name = "0, 2 model.layers.*.self_attn.{}_norm weight"
    assert f"{name.format('q')} 0 3 1.5 {values.std():.4g}" in lines
    assert f"{name.format('k')} not finite not finite not finite not finite" in lines
    refused = lines[lines.index("Refused") + 2]
    assert refused.startswith(
        "1 model.layers.*.self_attn.v_norm (16,) F32 nothing is known of such"
    )
    assert "Note: k: config.json decides num_heads: no k_proj to check against" in lines


def test_inspect_says_what_its_columns_mean(capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    told = capsys.readouterr().out
    for column in inspect_command._NORMS:
        assert f"\n  {column} " in told


def test_the_script_is_called_by_its_own_name(model):
    """It stands beside the interpreter of an environment that the package is installed in."""
    script = Path(sys.executable).with_name("cupy-headnorm")
    if not script.exists():
        pytest.skip("the package is not installed: run from a bare checkout")
    done = subprocess.run([script, "inspect"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("see cupy-headnorm inspect --help\n")
    done = subprocess.run([script, "inspect", model], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"sarvam_moe in {model}\n")


def test_inspect_prints_json(model, capsys):
    code, out, err = in_process(capsys, "inspect", model, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["model_type"], said["variant"], said["notes"]) == ("sarvam_moe", None, [])
    q, k = said["norms"]
    assert q["name"] == "model.layers.*.self_attn.q_norm"
    assert (q["layers"], q["role"], q["shape"], q["dtype"]) == ([0, 2], "q", [16], "F32")
    assert (q["kind"], q["eps"], q["rounding"], q["num_heads"]) == ("rms", 1e-6, "before_weight", 4)
    assert q["rope"]["partial"] == 0.5
    assert (q["weight"]["min"], q["weight"]["max"]) == (0, 3)
    assert q["weight"]["mean"] == pytest.approx(1.5)
    assert (q["bias"], k["weight"]["max"]) == (None, None)
    assert said["refused"][0]["layers"] == [1]


def test_inspect_merges_what_is_alike_and_nothing_else(model, capsys):
    config = {**CONFIG, "model_type": "llama4_text", "num_hidden_layers": 10}
    (model / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(8)}, model / "model.safetensors")
    code, out, _ = in_process(capsys, "inspect", model)
    assert code == 0
    assert "0-2, 4-6, 8-9" in out
    assert out.count(" layers.*.self_attn.qk_norm  none") == 1
    assert "Note: q, k: config.json decides num_heads: no projection to check against" in out


def test_inspect_shows_names_as_they_are(model, capsys):
    odd = "model.layers.0.[bold]:bug:.v_norm"
    config = {**CONFIG, "model_type": ":bug:[red]", "text_config": CONFIG}
    (model / "config.json").write_text(json.dumps(config))
    save_file({f"{odd}.weight": np.ones(8)}, model / "model.safetensors")
    code, out, _ = in_process(capsys, "inspect", model)
    assert code == 0
    assert out.startswith(":bug:[red] in ")
    assert odd.replace("0", "*") in out


def test_inspect_of_values_that_overflow(model, capsys, recwarn):
    tensors = {"model.layers.0.self_attn.q_norm.weight": np.full(16, 1e308)}
    save_file(tensors, model / "model.safetensors")
    code, out, err = in_process(capsys, "inspect", model, "--json")
    assert (code, err, recwarn.list) == (0, "", [])
    (q,) = json.loads(out)["norms"]
    assert (q["weight"]["max"], q["weight"]["mean"]) == (1e308, None)


@pytest.mark.parametrize(
    ("model_type", "mean", "noted"),
    [("qwen3_next", 1.02, True), ("qwen4_exp", 1.22, True), ("step3p7", 0.6, True),
     ("minimax_m3_vl_text", 0.9, True), ("qwen3_next", 0.22, False), ("qwen3_5", -0.06, False),
     ("gemma3_text", 1.02, False), ("qwen3", 1.02, False)],
)  # fmt: skip
def test_inspect_notes_a_mean_near_one(model, capsys, model_type, mean, noted):
    # Whatever the metadata says: of a trained Gemma 3 alone it is near 1 as it should be.
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": model_type}))
    weight = np.linspace(mean - 0.1, mean + 0.1, 16, dtype=np.float32)
    save_file({"model.layers.0.self_attn.q_norm.weight": weight}, model / "model.safetensors")
    code, out, _ = in_process(capsys, "inspect", model)
    assert code == 0
    note = (
        f"Note: q: {model_type} adds 1 to weights whose mean is {mean}: near 1, as if the file "
        "held the sums already; if it does, weight_offset=0 is right\n"
    )
    assert (note in out) == noted
    assert ("held the sums" in out) == noted


def test_inspect_says_that_mlx_may_have_stored_sums(model, capsys):
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen3_5"}))
    tensors = {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "mlx"})
    code, out, err = in_process(capsys, "inspect", model, "--json")
    assert (code, err) == (0, "")
    (refused,) = json.loads(out)["refused"]
    assert refused["name"] == "model.layers.*.self_attn.q_norm"
    assert "may have stored 1 + weight, to which qwen3_5 adds 1 again" in refused["reason"]


Q = "model.layers.0.self_attn.q_norm"


@pytest.mark.parametrize(
    ("model_type", "options", "said"),
    [("qwen3", (), {"eps": 3e-6, "rounding": "before_weight", "weight_offset": 0}),
     ("gemma3_text", (), {"eps": 3e-6, "rounding": "once", "weight_offset": 1}),
     ("gemma3_text", ("--weight-offset", 0, "--eps", 1e-4),
      {"eps": 1e-4, "rounding": "once", "weight_offset": 0}),
     ("qwen3", ("--rounding", "once", "--kind", "layer"),
      {"kind": "layer", "eps": 3e-6, "rounding": "once"})],
)  # fmt: skip
def test_demo_on_a_models_folder_computes_as_the_model(
    model, capsys, monkeypatch, model_type, options, said
):
    # Gemma's weights of 0 stand for 1: without the 1 all results are 0, and an error of 0 said so.
    config = {**CONFIG, "model_type": model_type, "rms_norm_eps": 3e-6}
    (model / "config.json").write_text(json.dumps(config))
    save_file({f"{Q}.weight": np.zeros(16, np.float32)}, model / "model.safetensors")
    loaded, load = [], demo._load
    monkeypatch.setattr(demo, "_load", lambda chosen: loaded.append(load(chosen)) or loaded[-1])
    code, out, err = in_process(
        capsys, "demo", model, "--key", Q, "--tokens", 3, "--on", "cpu", *options
    )
    assert (code, err) == (0, "")
    assert "HeadNorm.from_pretrained(" in rows(out)["norm"]
    assert {name: getattr(loaded[0], name) for name in said} == said
    assert bool(loaded[0](np.ones((1, 16), np.float32)).any()) == (loaded[0].weight_offset == 1)


def test_demo_without_a_key_names_the_norms(model, capsys):
    names = [f"model.layers.{layer}.self_attn.{role}_norm" for layer in (0, 2) for role in "qk"]
    code, _, err = in_process(capsys, "demo", model)
    assert code == 2
    assert err == (
        "cupy_headnorm: no --key given; needs the norm's name in the checkpoint, such as "
        f"{', '.join(names)}\n"
    )
    (model / "config.json").unlink()
    save_file({"norm.weight": np.ones(2), "x.weight": np.ones(2)}, model / "one.safetensors")
    _, _, err = in_process(capsys, "demo", model / "one.safetensors")
    assert err.endswith("in the checkpoint, such as norm\n")
    save_file(
        {f"layers.{layer}.q_norm.weight": np.ones(2) for layer in range(6)},
        model / "model.safetensors",
    )
    _, _, err = in_process(capsys, "demo", model)
    assert err.endswith("layers.2.q_norm, layers.3.q_norm and 2 more\n")


def test_inspect_says_that_nothing_is_supported(model, capsys):
    (model / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.norm.weight": np.ones(8)}, model / "model.safetensors")
    code, out, _ = in_process(capsys, "inspect", model)
    assert code == 0
    assert "no head norm is supported" in out
    assert "Note: nothing is known of llama, and no tensor looks like a head norm" in out


def test_inspect_reads_a_variant(model, capsys):
    (model / "model.safetensors").rename(model / "model.fp16.safetensors")
    code, out, _ = in_process(capsys, "inspect", model, "--variant", "fp16")
    assert code == 0
    assert out.splitlines()[0].endswith(", fp16")
    code, _, err = in_process(capsys, "inspect", model)
    assert code == 2
    assert err.count("\n") == 1
    assert "needs model.safetensors or model.safetensors.index.json" in err


def test_inspect_names_what_it_cannot_read(model, capsys):
    code, out, err = in_process(capsys, "inspect", "/nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "/nowhere does not exist; needs a model's folder" in err
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "new [bold]comer"}))
    code, out, err = in_process(capsys, "inspect", model, "--json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "nothing is known of new [bold]comer, and these tensors look like head norms" in err


def test_inspect_on_a_real_model(real, capsys):
    code, out, err = in_process(capsys, "inspect", real, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert [norm["layers"] for norm in said["norms"]] == [list(range(18))] * 2
    assert {norm["weight_offset"] for norm in said["norms"]} == {1.0}
