"""How an error shows what was given."""

from __future__ import annotations

from typing import Any

_SHOWN = 80
"""Characters of a value that a message shows at most."""


def shown(value: Any) -> str:
    """Return a value's repr as a message shows it: in one line, and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
