"""
Draw the picture of concepts/head-norm.md: one token's queries, normalized head by head.

``python docs/pictures/heads.py`` writes it beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cupy_headnorm import rms_norm

COLOURS = ("#2f6fd0", "#2b8a3e", "#e8590c")
STYLE = """<style>
text { font: 17px system-ui, sans-serif; fill: #1b1f24; text-anchor: middle; }
.label { fill: #f1f3f5; stroke: #868e96; }
.zero { stroke: #868e96; stroke-width: 1.5; }
</style>"""
DIM, WIDTH, UNIT = 8, 22, 26


def main(folder: Path) -> None:
    """Write the picture into a folder."""
    x = np.random.default_rng(4).standard_normal((3, DIM)).astype(np.float32)
    x *= np.array([[0.35], [1.5], [0.8]], np.float32)
    parts = []
    for middle, values, title in ((92, x, "x"), (272, rms_norm(x), "y")):
        parts.append(f'<path class="zero" d="M20 {middle}H620"/>')
        for head, row in enumerate(values):
            left = 32 + head * 200
            for i, value in enumerate(row):
                height = abs(float(value)) * UNIT
                top = middle - height if value > 0 else middle
                parts.append(
                    f'<rect x="{left + i * WIDTH}" y="{top:.1f}" width="{WIDTH - 3}" '
                    f'height="{height:.1f}" fill="{COLOURS[head]}"/>'
                )
            label = f"{title}, head {head}: rms {np.sqrt((row**2).mean()):.2f}"
            parts.append(
                f'<rect class="label" x="{left}" y="{middle + 66}" width="176" height="28" rx="6"/>'
                f'<text x="{left + 88}" y="{middle + 86}">{label}</text>'
            )
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 376" role="img" '
        'aria-label="Three heads of different size, and after the norm of one size each">'
    )
    text = "\n".join([head, STYLE, *parts, "</svg>", ""])
    (folder / "heads.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
