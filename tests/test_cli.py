"""The command line, run as a newcomer does: in a process of its own."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tolerances import EPS_FLOAT32, EPS_ONE_ROUNDING, EPS_TWO_ROUNDINGS

from cupy_headnorm import HeadNorm, cli


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


def test_info_says_what_works_and_what_to_install(capsys):
    code, out, err = in_process(capsys, "info")
    assert (code, err) == (0, "")
    said = rows(out)
    for name in ("cupy-headnorm", "Python", "numpy", "torch", "CuPy", "NVRTC", "driver"):
        assert said[name].strip()
    assert said["NumPy arrays"].strip() == "work"
    works = said["CUDA arrays"].strip()
    assert works.startswith("work") or (works.startswith("do not work: ") and said["needs"])


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
        f"{sys.executable} -m cupy_headnorm info | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_bench_prints_a_table(capsys):
    pytest.importorskip("rich")
    code, out, err = in_process(
        capsys, "bench", "--tokens", 2, "--num-heads", 2, "--head-dim", 64, "--dtype", "float16",
        "--kind", "rms", "layer", "--layout", "contiguous", "in-place", "packed-qkv",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.count("2 x 2 x 64") == 6
    code, out, _ = in_process(capsys, "bench", "--megabytes", 0.1, "--num-heads", 2)
    assert "195 x 2 x 128" in out
