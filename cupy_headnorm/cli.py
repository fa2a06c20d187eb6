"""``python -m cupy_headnorm {demo, info, inspect, bench}``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cupy_headnorm import (
    _bench_report,
    _driver,
    _dtypes,
    _inspect_report,
    _kernels,
    _spec,
    _timing,
    bench,
    checkpoint,
)
from cupy_headnorm._version import __version__
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.pretrained import HeadNorms

_DEMO_KEY = "model.layers.1.self_attn.q_norm"
_MOST_NAMED = 4
_DEMO_HEADS, _DEMO_HEAD_DIM = 32, 128  # Qwen3-8B's queries


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cupy_headnorm: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an error is one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = _parser().parse_args(given)
    chosen.command = f"python -m cupy_headnorm {shlex.join(given)}"
    try:
        chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("cupy_headnorm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"cupy_headnorm: {message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m cupy_headnorm", description="Per-head normalization on GPUs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="{demo,info,inspect,bench}")

    demo = commands.add_parser("demo", help="load a norm, run it here, check it and time it")
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "checkpoint",
        nargs="?",
        help="safetensors file or folder, whose config.json says what options do not; without it "
        "a sharded one like Qwen3's is written first",
    )
    demo.add_argument("--key", help="the norm's name in the checkpoint, without .weight")
    demo.add_argument("--kind", choices=tuple(_spec.DEFAULT_EPS))
    demo.add_argument("--eps", type=float, help="default: 1e-6 for rms, 1e-5 for layer")
    demo.add_argument("--rounding", choices=_spec.ROUNDINGS)
    demo.add_argument("--weight-offset", type=float, help="1 for Gemma 3")
    demo.add_argument("--num-heads", type=bench.count, help="heads of x")
    demo.add_argument("--head-dim", type=bench.count, help="default: the weight's last axis")
    demo.add_argument("--heads-axis", type=int, default=-2)
    demo.add_argument("--tokens", type=int, help="tokens of the random x")
    demo.add_argument(
        "--dtype",
        choices=[dtype.name for dtype in _dtypes.DTYPES],
        help="of the random x; default: the weight's",
    )
    demo.add_argument(
        "--activations",
        help="safetensors file with <key>.input, used as x, and, to compare, <key>.output",
    )
    demo.add_argument("--on", choices=("auto", "gpu", "cpu"), default="auto")

    info = commands.add_parser("info", help="versions, devices, what works and what to install")
    info.set_defaults(run=_info)

    look = commands.add_parser("inspect", help="a model's head norms, and what is refused and why")
    look.set_defaults(run=_inspect)
    look.add_argument("checkpoint", help="folder with config.json and safetensors files")
    look.add_argument("--variant", help="part of the files' names: fp16 for model.fp16.safetensors")
    look.add_argument("--json", action="store_true", help="print JSON instead of tables")

    measure = commands.add_parser("bench", help="speed beside a copy of the same bytes and peers")
    measure.set_defaults(run=_bench)
    bench.add_arguments(measure)
    return parser


def _print(rows: list[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")


def _info(_: argparse.Namespace) -> None:
    found = _kernels.environment()
    rows: list[tuple[str, Any]] = [
        ("cupy-headnorm", f"{__version__} in {Path(__file__).resolve().parent}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    for package in ("numpy", "ml_dtypes", "safetensors", "torch", "transformers", "jax"):
        rows.append((package, bench.version(package) or "not installed"))
    rows += [
        ("CuPy", found.cupy or "not usable"),
        ("NVRTC", found.nvrtc or "not usable"),
        ("driver", found.driver or "no NVIDIA driver answers"),
        ("kernel cache", found.cache or "unknown without CuPy"),
    ]
    rows += [(f"cuda:{i}", name) for i, name in enumerate(found.devices)] or [("devices", "none")]
    rows.append(("NumPy arrays", "work"))
    rows.append(("torch and JAX on the CPU", "work"))
    if found.reason:
        rows += [("CUDA arrays", f"do not work: {found.reason}"), ("needs", found.remedy)]
    else:
        rows.append(("CUDA arrays", "work: CuPy, torch, JAX and other DLPack arrays"))
    _print(rows)


def _inspect(chosen: argparse.Namespace) -> None:
    console = None if chosen.json else _bench_report.console()
    found = _inspect_report.collect(chosen.checkpoint, chosen.variant)
    if console is None:
        print(json.dumps(found, indent=1))
    else:
        _inspect_report.show(found, console)


def _demo(chosen: argparse.Namespace) -> None:
    on, where = _place(chosen.on)
    rows: list[tuple[str, Any]] = [("where", where)]
    if chosen.checkpoint is None:
        with tempfile.TemporaryDirectory(prefix="cupy-headnorm-") as folder:
            shards = _write_qwen3_like(Path(folder))
            shown = ", ".join(shards)
            rows.append(("checkpoint", f"{folder}, written for this demo and removed: {shown}"))
            chosen.checkpoint = folder
            chosen.key = chosen.key or _DEMO_KEY
            chosen.rounding = chosen.rounding or "before_weight"
            norm = _load(chosen)
    elif chosen.key is None:
        raise ValueError(
            f"no --key given; needs the norm's name in the checkpoint{_such_as(chosen.checkpoint)}"
        )
    else:
        norm = _load(chosen)
        rows.append(("checkpoint", chosen.checkpoint))
    rows.append(("norm", norm))

    x, recorded = _activations(chosen, norm, on)
    with on:
        device_x = on.xp.asarray(x)
        y = norm(device_x, heads_axis=chosen.heads_axis)
        y = y.get() if on.name == "cupy" else y
    rows.append(("x", f"{x.dtype} {x.shape}, last axis normalized"))
    for name in ("weight", "bias"):
        values = getattr(norm, name)
        if values is not None:
            rows.append((name, f"{values.dtype} {values.shape}"))
    eps_units = _largest_error(norm, x, y, chosen.heads_axis)
    rows.append(("largest error", f"{eps_units:.3f} eps of {x.dtype} against {_wide(x).__name__}"))
    if recorded is not None:
        if recorded.shape != y.shape or recorded.dtype != y.dtype:
            raise ValueError(
                f"{chosen.key}.output is {recorded.dtype} {recorded.shape}; "
                f"needs {y.dtype} {y.shape}, as the input"
            )
        wrong = int(np.count_nonzero(y != recorded))
        share = f"{100 * wrong / max(y.size, 1):.4f} %"
        rows.append(("mismatches", f"{wrong} of {y.size} ({share}) against the recorded output"))
    timing = _timing.time_norm(norm, x, on, chosen.heads_axis)
    moved = 2 * x.nbytes
    rows.append(("time", f"{timing.norm:.2f} us, {moved / timing.norm / 1e3:,.1f} GB/s"))
    rows.append(("share of a copy", f"{timing.share:.2f} of the speed of a copy of {moved} bytes"))
    _print(rows)


def _place(wanted: str) -> tuple[Any, str]:
    found = _kernels.environment()
    if wanted == "gpu" and found.reason:
        raise _driver.GPUUnavailableError(f"{found.reason}; needs: {found.remedy}")
    if wanted != "cpu" and not found.reason:
        return _timing.backend(), f"GPU kernel, since CuPy {found.cupy} sees {found.devices[0]}"
    why = "as asked" if wanted == "cpu" else found.reason
    return _timing.Host(), f"NumPy reference on the CPU: {why}"


def _such_as(path: str) -> str:
    """Return the first names of norms in a checkpoint, as the end of a sentence."""
    try:
        if _is_model(path):
            norms = HeadNorms(path)
            names = [norm.name for norm in norms.described.values()]
        else:
            stems = (name.rpartition(".")[0] for name in checkpoint.tensor_names(path))
            names = [stem for stem in dict.fromkeys(stems) if "norm" in stem]
    except ValueError:
        return ""  # what is wrong there is said once a key is given
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f", such as {', '.join(names[:_MOST_NAMED])}{more}" if names else ""


def _is_model(path: str) -> bool:
    return Path(path, checkpoint.CONFIG).is_file()


def _load(chosen: argparse.Namespace) -> HeadNorm:
    if _is_model(chosen.checkpoint):
        return HeadNorm.from_pretrained(
            chosen.checkpoint,
            chosen.key,
            num_heads=chosen.num_heads,
            head_dim=chosen.head_dim,
            kind=chosen.kind,
            eps=chosen.eps,
            weight_offset=chosen.weight_offset,
            rounding=chosen.rounding,
        )
    head_dim = chosen.head_dim
    if head_dim is None and chosen.num_heads is not None:
        # --num-heads speaks of x; a flat weight takes --head-dim beside it.
        read = checkpoint.read_norm(chosen.checkpoint, chosen.key)
        head_dim = next(array.shape[-1] for array in read if array is not None)
    return HeadNorm.from_safetensors(
        chosen.checkpoint,
        chosen.key,
        num_heads=chosen.num_heads,
        head_dim=head_dim,
        kind=chosen.kind or "rms",
        eps=chosen.eps,
        weight_offset=chosen.weight_offset or 0.0,
        rounding=chosen.rounding or "once",
    )


def _write_qwen3_like(folder: Path) -> list[str]:
    """Write the head norms of two Qwen3-8B-shaped layers, in a shard each, with their index."""
    import ml_dtypes
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    shards = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    weight_map, total = {}, 0
    for layer, shard in enumerate(shards):
        tensors = {}
        for role in ("q_norm", "k_norm"):
            values = random.uniform(0.5, 2.0, _DEMO_HEAD_DIM).astype(ml_dtypes.bfloat16)
            tensors[f"model.layers.{layer}.self_attn.{role}.weight"] = values
            total += values.nbytes
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / checkpoint.INDEX).write_text(json.dumps(index, indent=1))
    return shards


def _activations(
    chosen: argparse.Namespace, norm: HeadNorm, on: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return x and, where one was recorded, the model's own output."""
    if chosen.activations is not None:
        x = checkpoint.read_tensor(chosen.activations, f"{chosen.key}.input")
        output = f"{chosen.key}.output"
        given = output in checkpoint.tensor_names(chosen.activations)
        return x, checkpoint.read_tensor(chosen.activations, output) if given else None
    tokens = chosen.tokens if chosen.tokens is not None else (8192 if on.name == "cupy" else 256)
    if tokens < 0:
        raise ValueError(f"--tokens is {tokens}; needs 0 or more")
    heads = norm.num_heads or _DEMO_HEADS
    head_dim = norm.head_dim or _DEMO_HEAD_DIM
    shape = [tokens, heads, head_dim]
    if chosen.heads_axis == -3:
        shape = [1, heads, tokens, head_dim]
    dtype = norm.weight.dtype if norm.weight is not None else np.float32
    if chosen.dtype is not None:
        dtype = _dtypes.from_name(chosen.dtype, "--dtype").numpy
    values = np.random.default_rng(1).standard_normal(shape, np.float32)
    return values.astype(dtype), None


def _wide(x: np.ndarray) -> type:
    return np.longdouble if x.dtype == np.float64 else np.float64


def _largest_error(norm: HeadNorm, x: np.ndarray, y: np.ndarray, heads_axis: int) -> float:
    """Return the largest distance from exact arithmetic, in eps of each value."""
    if x.size == 0:
        return 0.0
    wide, head_dim = _wide(x), norm.head_dim or x.shape[-1]
    rows: np.ndarray = x.astype(wide)
    if x.shape[-1] != head_dim:  # flat
        rows = rows.reshape(*x.shape[:-1], -1, head_dim)
    if norm.kind == "layer":
        rows = rows - rows.mean(-1, keepdims=True)
    exact = rows / np.sqrt((rows * rows).mean(-1, keepdims=True) + norm.eps)

    def beside_rows(values: np.ndarray) -> np.ndarray:
        shape = [1] * rows.ndim
        shape[-1] = head_dim
        if values.size > head_dim:
            shape[heads_axis] = values.size // head_dim
        return values.astype(wide).reshape(shape)

    if norm.weight is not None:
        exact = exact * (beside_rows(norm.weight) + norm.weight_offset)
    if norm.bias is not None:
        exact = exact + beside_rows(norm.bias)
    # Where values cancel, the error is that of what cancelled: count from 1/64 of the row's
    # largest value.
    size = np.maximum(np.abs(exact), np.abs(exact).max(-1, keepdims=True) / 64)
    error = np.abs(y.astype(wide).reshape(exact.shape) - exact) / np.maximum(size, 1e-300)
    return float(error.max() / _dtypes.from_numpy(x.dtype, "x").eps)


def _bench(chosen: argparse.Namespace) -> None:
    bench.run(chosen, chosen.command)
