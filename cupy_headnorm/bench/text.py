"""Tables in plain text, which break no word and no name, however narrow the terminal is."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence

_PIPE = 120
"""A file or a pipe is so wide."""
_NARROWEST = 24
"""A last column has so much room at least; with less, rows become lines of names and values."""
_GAP = "  "


def width() -> int:
    """Return the columns of the terminal, or of what stands in its place."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPE


def printable(value: str) -> str:
    """Return a text of somebody else in one line that steers no terminal."""
    return value if value.isprintable() else "".join(
        c if c.isprintable() else ascii(c)[1:-1] for c in value
    )  # fmt: skip


def wrapped(text: str, indent: str = "", first: str | None = None, most: int = 0) -> list[str]:
    """
    Return lines of no more than `most` columns where no word is longer; none is broken.

    Without `most` they are those of the terminal; a file or a pipe gets one line.
    """
    unbroken = max(len(text) + len(indent) + len(first or ""), 1)
    return textwrap.wrap(
        text,
        most or (width() if sys.stdout.isatty() else unbroken),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()
) -> list[str]:
    """
    Return a head and rows as lines with aligned columns, those `right` at the right.

    Words of the last column go on in the next line. Where the others leave it no room, each row is
    a block of lines, a name and a value each.
    """
    told = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *told, strict=True)]
    indent = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    room = width() - indent
    if room < min(widths[-1], _NARROWEST):
        return list(_blocks(columns, told))
    lines = []
    for row in (columns, *told):
        cells = [
            cell.rjust(w) if name in right else cell.ljust(w)
            for name, cell, w in zip(columns, row, widths, strict=True)
        ]
        first = _GAP.join([*cells[:-1], ""])
        last = cells[-1] if columns[-1] in right else row[-1]
        lines += wrapped(last, " " * indent, first, width()) or [first]
    return [line.rstrip() for line in lines]


def _blocks(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    label = max(map(len, columns)) + len(_GAP)
    for number, row in enumerate(rows):
        yield from [""] if number else []
        for name, cell in zip(columns, row, strict=True):
            if cell:
                yield from wrapped(cell, " " * label, name.ljust(label), width())
