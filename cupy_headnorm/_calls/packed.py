"""A packed buffer of queries, keys and values, taken apart into views of its heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from cupy_headnorm._arrays import find, layout
from cupy_headnorm._arrays.find import quick
from cupy_headnorm._arrays.views import Library
from cupy_headnorm._rules import heads, options


class Packed(NamedTuple):
    """What a packed buffer holds; `num_kv_heads` keys, and as many values."""

    num_heads: Any
    num_kv_heads: Any
    head_dim: int | None
    parts: int
    """2 for q and k, 3 for v too."""


@dataclass
class Buffer:
    """A packed buffer, whose layout is looked at once, and only where a call needs it."""

    qkv: Any
    library: Library
    is_checked: bool = False

    def check(self) -> None:
        """Refuse the buffer by its own name, where its parts would be refused by theirs."""
        if self.is_checked:
            return
        qkv = self.library.view(self.qkv, "qkv")
        if qkv.layout.shape:
            heads.check_last_stride(qkv.layout, "qkv")
        if not qkv.writeable:
            raise ValueError("qkv is read-only; needs a writeable array")
        layout.check_out_layout(qkv.layout, "qkv")
        self.is_checked = True


def split(qkv: Any, held: Packed) -> tuple[Buffer, tuple[Any, ...]]:
    """Return a packed buffer, and views of its parts ``(..., heads, head_dim)``."""
    library = find.library_of(qkv, "qkv")
    if not library.takes_out:
        raise TypeError(
            f"qkv is a {type(qkv).__name__}, which may forbid writing; needs a NumPy, CuPy or "
            "torch array"
        )
    buffer = Buffer(qkv, library)
    # CuPy's reshape copies where the last axis has gaps, torch's unflatten never does.
    may_split = hasattr(qkv, "unflatten") or qkv.strides[-1:] == (qkv.itemsize,)
    if quick.get(type(qkv)) is not library or library.glance(qkv) is None or not may_split:
        buffer.check()
    num_heads, num_kv_heads = (
        _count(value, name)
        for name, value in zip(("num_heads", "num_kv_heads"), held[:2], strict=True)
    )
    total = num_heads + 2 * num_kv_heads
    shape = tuple(qkv.shape)
    width = shape[-1] if shape else 0
    head_dim = held.head_dim or width // total
    if shape[-2:] == (total, held.head_dim):
        by_head = qkv
    elif width != total * head_dim or not head_dim:
        wanted = f"{total * head_dim}" if held.head_dim else f"a multiple of {total}"
        raise heads.layout_error(
            f"qkv has shape {shape}; needs a last axis of {wanted}, "
            f"{num_heads} + 2 * {num_kv_heads} heads of {held.head_dim or 'one length'}"
            + (f", or last axes of ({total}, {held.head_dim})" if held.head_dim else "")
        )
    else:
        by_head = _split_last(qkv, (*shape[:-1], total, head_dim))
    first_v = num_heads + num_kv_heads
    parts = by_head[..., :num_heads, :], by_head[..., num_heads:first_v, :]
    return buffer, parts if held.parts == 2 else (*parts, by_head[..., first_v:, :])


def _count(value: Any, name: str) -> int:
    """Check a number of heads that must be given."""
    number = options.integer(value, name)
    options.count(number, name)
    return number


def _split_last(qkv: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of `qkv`, whose last axis has no gaps, with that axis split."""
    if hasattr(qkv, "unflatten"):
        return qkv.unflatten(-1, shape[-2:])
    return qkv.reshape(shape)
