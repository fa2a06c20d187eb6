"""
Beside transformers' own modules: the share of values that differ, in tiny models of each family.

``python tests/parity.py [--device cuda] [--json] [FAMILY ...]`` prints it.
"""

import argparse
import json
import sys
import tempfile
from typing import NamedTuple

import torch
import transformers
from families import FAMILIES, model_class, tiny
from tolerances import FLIPS_NEED, mismatch

from cupy_headnorm import HeadNorm
from cupy_headnorm.pretrained import head_norms

DTYPES = ("bfloat16", "float16")
OTHER = {"once": "before_weight", "before_weight": "once", "every_op": "once", "rstd": "once"}


class Parity(NamedTuple):
    """Shares of values that differ from the real module's."""

    right: float
    wrong: float
    what: str
    """The wrong norm's difference from ours."""


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy()


def wrong(norm):
    """Return what else an implementer may have thought the model does, and the norm that does."""
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
    layers = sum(role == key[1] for _, role in model.norms)
    x = real.input(FLIPS_NEED // layers, getattr(torch, dtype), device)
    expected = real(x)
    assert expected.dtype == x.dtype
    what, other = wrong(norm)
    right, mistaken = (
        mismatch(bits(n(x, heads_axis=real.heads_axis)), bits(expected)) for n in (norm, other)
    )
    return Parity(right, mistaken, what)


def table(families, device, folder):
    """Yield a line for each family, role and dtype: the worst of its layers."""
    for family in families:
        reason = model_class(family)
        if isinstance(reason, str):
            yield {"family": family, "missing": reason}
            continue
        for dtype in DTYPES:
            made = tiny(family, dtype, folder)
            ours = head_norms(made.folder)
            for role in dict.fromkeys(role for _, role in made.norms):
                layers = [key for key in made.norms if key[1] == role]
                if lost := [layer for layer, _ in layers if (layer, role) not in ours]:
                    reason = f"head_norms has no {role} of layers {lost}"
                    yield {"family": family, "role": role, "dtype": dtype, "missing": reason}
                    continue
                found = [measure(made, ours, key, dtype, device) for key in layers]
                yield {
                    "family": family,
                    "role": role,
                    "dtype": dtype,
                    "mismatch": 100 * max(one.right for one in found),
                    "rounding": ours[layers[0]].rounding,
                    "mismatch_wrong": 100 * min(one.wrong for one in found),
                    "wrong": found[0].what,
                }


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Print the parity table.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.families) - FAMILIES.keys():
        parser.error(f"no family {', '.join(sorted(unknown))}; needs some of {', '.join(FAMILIES)}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = list(table(chosen.families or FAMILIES, chosen.device, folder))
    if chosen.json:
        json.dump(lines, sys.stdout, indent=1)
        print()
        return
    head = ("family", "role", "dtype", "mismatch %", "rounding", "wrong %", "wrong rounding")
    cells = [
        (
            line["family"], line["role"], line["dtype"], f"{line['mismatch']:.4f}",
            line["rounding"], f"{line['mismatch_wrong']:.1f}", line["wrong"],
        )
        for line in lines
        if "missing" not in line
    ]  # fmt: skip
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
        console.width = max(console.width, 110)  # a file is no narrow terminal
        console.print(shown)
    for line in lines:
        if "missing" in line:
            print(f"{line['family']}: {line['missing']}")


if __name__ == "__main__":
    main()
