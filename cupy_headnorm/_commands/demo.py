"""The command demo: write, load, apply and check a norm."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._cuda import driver, environment
from cupy_headnorm.bench import clocks
from cupy_headnorm.checkpoint import files
from cupy_headnorm.checkpoint import tensors as checkpoint_tensors
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.pretrained import HeadNorms

_DEMO_KEY = "model.layers.1.self_attn.q_norm"
_MOST_NAMED = 4
_DEMO_HEADS, _DEMO_HEAD_DIM = 32, 128  # Qwen3-8B's queries


def print_rows(rows: list[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")


def run(chosen: argparse.Namespace) -> None:
    on, where = _place(chosen.on)
    rows: list[tuple[str, Any]] = [("where", where)]
    if chosen.checkpoint is None:
        with tempfile.TemporaryDirectory(prefix="cupy-headnorm-") as folder:
            shards = ", ".join(_write_qwen3_like(Path(folder)))
            rows.append(("checkpoint", f"{folder}, written for this demo and removed: {shards}"))
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
        y = norm(on.xp.asarray(x), heads_axis=chosen.heads_axis)
        y = y.get() if on.name == "cupy" else y
    rows.append(("x", f"{x.dtype} {x.shape}, last axis normalized"))
    for name in ("weight", "bias"):
        values = getattr(norm, name)
        if values is not None:
            rows.append((name, f"{values.dtype} {values.shape}"))
    eps_units = _largest_error(norm, x, y, chosen.heads_axis)
    rows.append(("largest error", f"{eps_units:.3f} eps of {x.dtype} against float64"))
    if recorded is not None:
        if recorded.shape != y.shape or recorded.dtype != y.dtype:
            raise ValueError(
                f"{chosen.key}.output is {recorded.dtype} {recorded.shape}; "
                f"needs {y.dtype} {y.shape}, as the input"
            )
        wrong = int(np.count_nonzero(y != recorded))
        of_all = f"{100 * wrong / max(y.size, 1):.4f} %"
        rows.append(("mismatches", f"{wrong} of {y.size} ({of_all}) against the recorded output"))
    spent, ceiling = _microseconds(norm, x, on, chosen.heads_axis)
    moved, share = 2 * x.nbytes, ceiling / spent
    rows.append(("time", f"{spent:.2f} us, {moved / spent / 1e3:,.1f} GB/s"))
    rows.append(("share of a copy", f"{share:.2f} of the speed of a copy of {moved} bytes"))
    if on.name == "numpy":
        rows.append(("note", "the reference is for correctness; on a GPU the kernel runs instead"))
    print_rows(rows)


def _place(wanted: str) -> tuple[Any, str]:
    found = environment.environment()
    if wanted == "gpu" and found.reason:
        raise driver.GPUUnavailableError(f"{found.reason}; needs: {found.remedy}")
    if wanted != "cpu" and not found.reason:
        return clocks.Gpu(), f"GPU kernel, since CuPy {found.cupy} sees {found.devices[0]}"
    why = "as asked" if wanted == "cpu" else found.reason
    return clocks.Host(), f"NumPy reference on the CPU: {why}"


def _such_as(path: str) -> str:
    """Return the first names of norms in a checkpoint, as the end of a sentence."""
    try:
        if _is_model(path):
            norms = HeadNorms(path)
            names = [norm.name for norm in norms.described.values()]
        else:
            stems = (name.rpartition(".")[0] for name in checkpoint_tensors.tensor_names(path))
            names = [stem for stem in dict.fromkeys(stems) if "norm" in stem]
    except ValueError:
        return ""  # what is wrong there is said once a key is given
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f", such as {', '.join(names[:_MOST_NAMED])}{more}" if names else ""


def _is_model(path: str) -> bool:
    return Path(path, files.CONFIG).is_file()


def _load(chosen: argparse.Namespace) -> HeadNorm:
    names = ("num_heads", "head_dim", "kind", "eps", "weight_offset", "rounding")
    given: dict[str, Any] = {name: getattr(chosen, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if _is_model(chosen.checkpoint):
        return HeadNorm.from_pretrained(chosen.checkpoint, chosen.key, **given)
    if "num_heads" in given and "head_dim" not in given:
        # --num-heads speaks of x; a flat weight takes --head-dim beside it.
        read = checkpoint_tensors.read_norm(chosen.checkpoint, chosen.key)
        given["head_dim"] = next(array.shape[-1] for array in read if array is not None)
    return HeadNorm.from_safetensors(chosen.checkpoint, chosen.key, **given)


def _write_qwen3_like(folder: Path) -> list[str]:
    """Write the head norms of two Qwen3-8B-shaped layers, in a shard each, with their index."""
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file

    weights = np.random.default_rng(0).uniform(0.5, 2.0, (2, 2, _DEMO_HEAD_DIM)).astype(bfloat16)
    shards, weight_map = [], {}
    for layer, (q, k) in enumerate(weights):
        shard, at = f"model-{layer + 1:05}-of-00002.safetensors", f"model.layers.{layer}.self_attn"
        tensors = {f"{at}.q_norm.weight": q, f"{at}.k_norm.weight": k}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
        shards.append(shard)
    index = {"metadata": {"total_size": weights.nbytes}, "weight_map": weight_map}
    (folder / files.INDEX).write_text(json.dumps(index, indent=1))
    return shards


def _activations(
    chosen: argparse.Namespace, norm: HeadNorm, on: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return x and, where one was recorded, the model's own output."""
    if chosen.activations is not None:
        x = checkpoint_tensors.read_tensor(chosen.activations, f"{chosen.key}.input")
        output = f"{chosen.key}.output"
        given = output in checkpoint_tensors.tensor_names(chosen.activations)
        return x, checkpoint_tensors.read_tensor(chosen.activations, output) if given else None
    tokens = chosen.tokens if chosen.tokens is not None else (8192 if on.name == "cupy" else 256)
    if tokens < 0:
        raise ValueError(f"--tokens is {tokens}; needs 0 or more")
    heads, head_dim = norm.num_heads or _DEMO_HEADS, norm.head_dim or _DEMO_HEAD_DIM
    shape = (1, heads, tokens, head_dim) if chosen.heads_axis == -3 else (tokens, heads, head_dim)
    dtype = norm.weight.dtype if norm.weight is not None else np.float32
    if chosen.dtype is not None:
        dtype = dtypes.from_name(chosen.dtype, "--dtype").numpy
    return np.random.default_rng(1).standard_normal(shape, np.float32).astype(dtype), None


def _largest_error(norm: HeadNorm, x: np.ndarray, y: np.ndarray, heads_axis: int) -> float:
    """Return the largest distance from the reference in float64, in eps of each value."""
    if x.size == 0:
        return 0.0
    options = ("kind", "eps", "num_heads", "head_dim", "weight_offset")
    in_float64 = HeadNorm(norm.weight, norm.bias, **{name: getattr(norm, name) for name in options})
    shape = (-1, norm.head_dim or x.shape[-1])
    exact = in_float64(x.astype(np.float64), heads_axis=heads_axis).reshape(shape)
    # Where values cancel, the error is that of what cancelled: count from 1/64 of the row's
    # largest value.
    size = np.maximum(np.abs(exact), np.abs(exact).max(-1, keepdims=True) / 64)
    error = np.abs(y.reshape(shape).astype(np.float64) - exact) / np.maximum(size, 1e-300)
    return float(error.max() / dtypes.from_numpy(x.dtype, "x").eps)


def _microseconds(
    norm: HeadNorm, x: np.ndarray, on: clocks.Timer, heads_axis: int
) -> tuple[float, float]:
    """Return the time of `norm` on copies of x, out of place, and the ceiling of as many bytes."""
    with on:
        buffers = on.rotation(2 * x.nbytes)
        inputs = [on.array(x) for _ in range(buffers)]
        results = [on.xp.empty_like(v) for v in inputs]
        calls = (
            lambda i: norm(inputs[i], heads_axis=heads_axis, out=results[i]),
            lambda i: on.copy(results[i], inputs[i]),
            lambda i: on.multiply(inputs[i]),
        )
        spent, *ceilings = (on.microseconds(call, buffers) for call in calls)
        return spent, min(ceilings)
