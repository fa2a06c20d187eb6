"""
Beside transformers' own modules: the share of values that differ, in tiny models of each family.

``python tests/helpers/parity.py [--qk] [--device cuda] [--json] [FAMILY ...]`` prints it: of each
norm, or of queries and keys as a layer gives them to its attention function.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import torch
import transformers
from families import FAMILIES, model_class, tiny
from rotary import attention
from tolerances import FLIPS_NEED, mismatch

from cupy_headnorm import HeadNorm, QKNorm
from cupy_headnorm.pretrained import head_norms

DTYPES = ("bfloat16", "float16")
OTHER = {"once": "before_weight", "before_weight": "once", "every_op": "once", "rstd": "once"}
"""Roundings, and what an implementer may take for each."""

QK_FAMILIES = (
    "qwen3", "gemma3", "glm4_moe", "cohere", "hunyuan_v1_dense", "llama4", "qwen3_vl", "stablelm",
    "phi", "chameleon", "gemma3n", "gemma4", "embedding_gemma2", "lfm3", "nanochat", "neomme",
)  # fmt: skip
"""Each style, order, rounding and part of head_dim, in layers of each type."""
MOST = 4096  # positions


class Parity(NamedTuple):
    """Shares of values that differ from the real module's."""

    right: float
    wrong: float
    what: str
    """The wrong norm's difference from ours."""


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy()


def wrong(norm):
    """Return another rounding than the norm's, and the norm with that."""
    rounding = OTHER[norm.rounding]
    if norm.weight is None and norm.rounding == "once":
        rounding = "rstd"  # a weight is needed to round before it
    other = HeadNorm(
        norm.weight, norm.bias, kind=norm.kind, eps=norm.eps, num_heads=norm.num_heads,
        head_dim=norm.head_dim, weight_offset=norm.weight_offset, rounding=rounding,
    )  # fmt: skip
    return rounding, other


def measure(model, norms, key, dtype, device):
    """Compare our norm with the real module; a role's layers share the values that flips need."""
    real, norm = model.norms[key], norms[key]
    sharing = sum(role == key[1] for _, role in model.norms)
    x = real.input(FLIPS_NEED // sharing, getattr(torch, dtype), device)
    expected = real(x)
    assert expected.dtype == x.dtype
    what, other = wrong(norm)
    right, mistaken = (
        mismatch(bits(n(x, heads_axis=real.heads_axis)), bits(expected)) for n in (norm, other)
    )
    return Parity(right, mistaken, what)


class QKParity(NamedTuple):
    """Shares of values of a layer's q and k that differ from the real attention's."""

    positions: float
    given: float
    """With the model's own cos and sin."""
    v: float
    rounding: float
    """With the other rounding of the rotary embedding."""
    what: str
    order: float
    """With norm and rotary embedding in the other order."""
    turned: float
    """Share of dims that turn."""


def layers(model):
    """Yield a layer of the tiny model for each rotary embedding, and its QKNorm."""
    ropes = set()
    for layer in sorted({layer for layer, role in model.norms if role == "q"}):
        qk = QKNorm.from_pretrained(model.folder, layer, max_position=MOST)
        if qk.rope is not None and qk.rope not in ropes:
            ropes.add(qk.rope)
            yield layer, qk


def measure_qk(model, layer, qk, device):
    """Compare a QKNorm with the layer's own forward pass."""
    real = attention(model, layer, FLIPS_NEED, rows=len(qk.rope.sections), most=MOST, device=device)
    parts = [real.parts[name] for name in qk.norms]

    def shares(norm, **beside):
        found = dict(zip(qk.norms, norm(*parts, **beside), strict=True))
        pairs = {name: (bits(y), bits(real.results[name])) for name, y in found.items()}
        v = mismatch(*pairs.pop("v")) if "v" in pairs else 0.0
        return mismatch(
            *(np.concatenate([one.ravel() for one in s]) for s in zip(*pairs.values(), strict=True))
        ), v

    def other(**fields):
        norm = QKNorm(*qk.norms.values(), rope=dataclasses.replace(qk.rope, **fields))
        return shares(norm, positions=real.positions)[0]

    rounding = "once" if qk.rope.rounding == "every_op" else "every_op"
    order = "after norm" if qk.rope.order == "before norm" else "before norm"
    share, v = shares(qk, positions=real.positions)
    return QKParity(
        share,
        shares(qk, cos=real.cos_sin[0], sin=real.cos_sin[1])[0],
        v,
        other(rounding=rounding, table="x"),
        rounding,
        other(order=order),
        2 * np.count_nonzero(qk.rope.inverse_frequency) / parts[0].shape[-1],
    )


def lines(made, dtype, device):
    """Yield a line for each role: the worst of its layers."""
    ours = head_norms(made.folder)
    for role in dict.fromkeys(role for _, role in made.norms):
        keys = [key for key in made.norms if key[1] == role]
        if lost := [layer for layer, _ in keys if (layer, role) not in ours]:
            yield {"role": role, "missing": f"head_norms has no {role} of layers {lost}"}
            continue
        found = [measure(made, ours, key, dtype, device) for key in keys]
        yield {
            "role": role,
            "mismatch": 100 * max(one.right for one in found),
            "rounding": ours[keys[0]].rounding,
            "mismatch_wrong": 100 * min(one.wrong for one in found),
            "wrong": found[0].what,
        }


def qk_lines(made, dtype, device):
    """Yield a line for each layer."""
    for layer, qk in layers(made):
        found = measure_qk(made, layer, qk, device)
        yield {
            "layer": layer,
            "order": qk.rope.order,
            "rounding": qk.rope.rounding,
            "turned": 100 * found.turned,
            "mismatch": 100 * found.positions,
            "mismatch_given": 100 * found.given,
            "mismatch_wrong": 100 * found.rounding,
            "wrong": found.what,
            "mismatch_order": 100 * found.order,
        }


def table(lines_of, families, device, folder):
    """Yield the lines of each family and dtype, and why a family has none."""
    for family in families:
        reason = model_class(family)
        if isinstance(reason, str):
            yield {"family": family, "missing": reason}
            continue
        for dtype in DTYPES:
            for line in lines_of(tiny(family, dtype, folder), dtype, device):
                yield {"family": family, "dtype": dtype} | line


# heading: (key, how its value is written)
COLUMNS = {
    "family": ("family", "{}"), "role": ("role", "{}"), "dtype": ("dtype", "{}"),
    "mismatch %": ("mismatch", "{:.4f}"), "rounding": ("rounding", "{}"),
    "wrong %": ("mismatch_wrong", "{:.1f}"), "wrong rounding": ("wrong", "{}"),
}  # fmt: skip
QK_COLUMNS = {
    "family": ("family", "{}"), "layer": ("layer", "{}"), "dtype": ("dtype", "{}"),
    "turned %": ("turned", "{:.0f}"), "mismatch %": ("mismatch", "{:.4f}"),
    "given %": ("mismatch_given", "{:.4f}"), "rounding": ("rounding", "{}"),
    "wrong %": ("mismatch_wrong", "{:.1f}"), "order": ("order", "{}"),
    "wrong order %": ("mismatch_order", "{:.1f}"),
}  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Print the parity table.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--qk", action="store_true", help="q and k, with their rotary embedding")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.families) - FAMILIES.keys():
        parser.error(f"no family {', '.join(sorted(unknown))}; needs some of {', '.join(FAMILIES)}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines_of, default = (qk_lines, QK_FAMILIES) if chosen.qk else (lines, FAMILIES)
        rows = list(table(lines_of, chosen.families or default, chosen.device, folder))
    if chosen.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    columns = QK_COLUMNS if chosen.qk else COLUMNS
    head = tuple(columns)
    cells = [
        tuple(form.format(line[name]) for name, form in columns.values())
        for line in rows
        if "missing" not in line
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        for row in (head, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    else:
        shown = Table(*head, box=None)
        for row in cells:
            shown.add_row(*row)
        console = Console()
        console.width = max(console.width, 120)  # a file is no narrow terminal
        console.print(shown)
    for line in rows:
        if "missing" in line:
            print(f"{line['family']}: {line['missing']}")


if __name__ == "__main__":
    main()
