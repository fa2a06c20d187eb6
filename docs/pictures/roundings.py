"""
Draw the pictures of concepts/roundings.md.

``python docs/pictures/roundings.py`` writes them beside this file. Every text stands in a box with
a colour of its own, so that the pictures can be read on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from cupy_headnorm import HeadNorm

# Steps of each rounding; "R" stands where a value is rounded.
PIPELINES = {
    "once": ["x", "/ rms", "* weight", "+ bias", "R", "y"],
    "before_weight": ["x", "/ rms", "R", "* weight", "+ bias", "R", "y"],
    "every_op": ["x", "/ rms", "R", "* weight", "R", "+ bias", "R", "y"],
    "rstd": ["x", "1 / rms", "R", "* x", "R", "y"],
}
STYLE = """<style>
text { font: 17px system-ui, sans-serif; fill: #1b1f24; text-anchor: middle; }
.end { fill: #cfe3ff; stroke: #2f6fd0; }
.step { fill: #f1f3f5; stroke: #868e96; }
.round { fill: #e8590c; }
.on-round { fill: #ffffff; font-weight: bold; }
.line { stroke: #868e96; stroke-width: 2; }
</style>"""


def svg(width: int, height: int, label: str, parts: list[str]) -> str:
    """Put parts of a picture together."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{label}">'
    )
    return "\n".join([head, STYLE, *parts, "</svg>", ""])


def pipeline(name: str, steps: list[str]) -> str:
    """Draw steps from left to right, with a disc where a value is rounded."""
    widths = {"R": 30, "x": 40, "y": 40, "/ rms": 76, "1 / rms": 84, "* x": 60}
    parts, left, middle = [], 2, 26
    for i, step in enumerate(steps):
        width = widths.get(step, 92)
        centre = left + width / 2
        if step == "R":
            parts.append(f'<circle class="round" cx="{centre}" cy="{middle}" r="15"/>')
        else:
            kind = "end" if step in "xy" else "step"
            parts.append(
                f'<rect class="{kind}" x="{left}" y="6" width="{width}" height="40" rx="6"/>'
            )
        on_round = ' class="on-round"' if step == "R" else ""
        parts.append(f'<text{on_round} x="{centre}" y="{middle + 6}">{_shown(step)}</text>')
        left += width
        if i < len(steps) - 1:
            parts.append(f'<path class="line" d="M{left} {middle}h22"/>')
            left += 22
    return svg(640, 52, f"{name}: {', '.join(steps)}; R rounds to the dtype of x", parts)


def _shown(step: str) -> str:
    return step.replace("*", "&#215;").replace("/", "&#247;")


def example() -> str:
    """Draw one product on a line of bfloat16 numbers, as two roundings give it."""
    x, weight = (np.array(v, ml_dtypes.bfloat16) for v in ([[3, 4, 5, 6]], [1.5] * 4))
    wide = x.astype(np.float64)
    exact = float((wide / np.sqrt((wide**2).mean() + 1e-6))[0, 0] * 1.5)
    ends = {r: float(HeadNorm(weight, rounding=r)(x)[0, 0]) for r in ("once", "before_weight")}
    low, high = sorted(ends.values())
    step = high - low

    def place(value: float) -> float:
        return 160 + 320 * (value - low) / step

    parts = ['<path class="line" d="M20 92H620"/>']
    for value in (low, high):
        parts.append(f'<path class="line" d="M{place(value):.1f} 80v24"/>')
        parts.append(_label(place(value), 108, f"{value}", "step"))
    parts.append(f'<circle class="round" cx="{place(exact):.1f}" cy="92" r="6"/>')
    parts.append(_label(place(exact), 4, f"exact: {exact:.6f}", "step"))
    parts.append(f'<path class="line" d="M{place(exact):.1f} 36v48"/>')
    for name, value in ends.items():
        parts.append(_label(place(value), 146, name, "end"))
    return svg(640, 184, f"exact {exact:.6f}; {ends}".replace('"', ""), parts)


def _label(centre: float, top: float, text: str, kind: str) -> str:
    width = 12 + 10 * len(text)
    return (
        f'<rect class="{kind}" x="{centre - width / 2:.1f}" y="{top}" width="{width}" height="32" '
        f'rx="6"/><text x="{centre:.1f}" y="{top + 22}">{text}</text>'
    )


def main(folder: Path) -> None:
    """Write the pictures into a folder."""
    for name, steps in PIPELINES.items():
        file = folder / f"rounding-{name.replace('_', '-')}.svg"
        file.write_text(pipeline(name, steps), encoding="utf-8")
    (folder / "rounding-example.svg").write_text(example(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
