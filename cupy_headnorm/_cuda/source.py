"""Finds ``kernels/`` and turns a ``.cu`` file and its own headers into one text."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'^#include "(headnorm/[\w.]+)"[^\n]*$', re.MULTILINE)


@cache
def kernels_folder() -> Path:
    """Return the folder of the kernels: inside an installed package, beside it in a checkout."""
    inside, beside = _PACKAGE / "kernels", _PACKAGE.parent / "kernels"
    if (inside / "head_norm.cu").is_file():
        return inside
    if (beside / "head_norm.cu").is_file() and (_PACKAGE.parent / "setup.cfg").is_file():
        return beside
    raise FileNotFoundError(f"kernels not found: no head_norm.cu in {inside} nor in {beside}")


@cache
def pasted(name: str) -> str:
    """
    Return ``kernels/<name>`` with every own header pasted in once.

    CuPy's disk cache keys on the text it is given and not on what ``-I`` finds, so a header left
    to the compiler could change and the old kernel would run on. ``#line`` keeps the compiler's
    messages pointing into the real files.
    """
    folder = kernels_folder()
    seen: set[str] = set()

    def paste(path: str) -> str:
        text = (folder / path).read_text(encoding="utf-8")

        def replace(match: re.Match[str]) -> str:
            header = match.group(1)
            line = text.count("\n", 0, match.start()) + 2
            if header in seen:
                return ""
            seen.add(header)
            return f'{paste("include/" + header)}\n#line {line} "{path}"'

        return f'#line 1 "{path}"\n' + _INCLUDE.sub(replace, text)

    return paste(name)
