"""Which axis is the heads', and what shapes of weight and bias fit them."""

from __future__ import annotations

import functools
from typing import NamedTuple

from cupy_headnorm._arrays.layout import Layout
from cupy_headnorm._rules.options import NormOptions, integer

Shape = tuple[int, ...]


def layout_error(message: str) -> ValueError:
    """Return the error of an array that is not laid out as a call reads it."""
    return ValueError(f"{message} (see 'How x is read' in the documentation)")


class Geometry(NamedTuple):
    """Heads as far as the arguments and parameters tell; x decides what is still None."""

    num_heads: int | None
    head_dim: int | None
    read_as_flat: bool
    """head_dim came from splitting a 1-D weight by num_heads: see `head_axis`."""


@functools.lru_cache(maxsize=1024)
def geometry(
    num_heads: int | None, head_dim: int | None, weight: Shape | None, bias: Shape | None
) -> Geometry:
    """
    Find num_heads and head_dim, and check the parameters' shapes against them.

    head_dim is the argument; else the last axis of a 2-D parameter; else that of a flat one
    split by num_heads; else the length of a 1-D one.
    """
    shapes = {n: s for n, s in (("weight", weight), ("bias", bias)) if s is not None}
    if not shapes:
        return Geometry(num_heads, head_dim, read_as_flat=False)
    for name, shape in shapes.items():
        if len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(
                f"{name} has shape {shape}; needs (head_dim,), (num_heads, head_dim) "
                "or (num_heads * head_dim,)"
            )
    read_as_flat = False
    if head_dim is None:
        name, shape = max(shapes.items(), key=lambda item: len(item[1]))  # a 2-D one, if any
        head_dim = shape[-1]
        if len(shape) == 1 and num_heads is not None and num_heads > 1:
            head_dim, rest = divmod(shape[0], num_heads)
            if rest:
                raise ValueError(
                    f"{name} has shape {shape}, which num_heads={num_heads} does not divide; "
                    f"needs head_dim={shape[0]} beside it if all heads share the {name}"
                )
            read_as_flat = True
    if num_heads is None:
        for name, shape in sorted(shapes.items(), key=lambda item: -len(item[1])):  # 2-D first
            heads, rest = (shape[0], 0) if len(shape) == 2 else divmod(shape[0], head_dim)
            if rest or heads == 0:
                raise ValueError(
                    f"{name} has shape {shape}; needs ({head_dim},), (num_heads, {head_dim}) "
                    f"or a multiple of head_dim={head_dim}"
                )
            if len(shape) == 2 or heads > 1:
                num_heads = heads
                break
    for name, shape in shapes.items():
        allowed: set[Shape] = {(head_dim,)}
        if num_heads is not None:
            allowed |= {(num_heads, head_dim), (num_heads * head_dim,)}
        if shape not in allowed:
            needed = " or ".join(str(s) for s in sorted(allowed, key=lambda s: (len(s), s)))
            raise ValueError(f"{name} has shape {shape}; needs {needed}")
    return Geometry(num_heads, head_dim, read_as_flat)


def geometry_of(opts: NormOptions, weight: Layout | None, bias: Layout | None) -> Geometry:
    """Find the geometry of a norm's options and parameters."""
    return geometry(opts.num_heads, opts.head_dim, weight and weight.shape, bias and bias.shape)


def head_axis(
    shape: Shape, heads: Geometry, head_dim: int, heads_axis: int
) -> tuple[bool, int | None]:
    """Tell whether x is flat and, if heads matter, which of its axes (split, if flat) is theirs."""
    outer, num_heads = len(shape) - 1, heads.num_heads
    if heads_axis != -2 and not (-len(shape) <= heads_axis < outer):
        raise layout_error(
            f"heads_axis is {heads_axis} and x has shape {shape}; needs one of its {outer} axes "
            "before head_dim"
        )
    if shape[-1] == head_dim:
        if num_heads is None or num_heads == 1:
            return False, None
        there = shape[heads_axis] if outer else 1
        if there != num_heads:
            raise layout_error(
                f"x has shape {shape}, {there} heads on axis {heads_axis}; needs "
                + _heads_there(shape, num_heads, head_dim, heads_axis, told=heads.head_dim)
            )
        return False, heads_axis % len(shape)
    if num_heads is None:
        found, rest = divmod(shape[-1], head_dim)
        cure = f": num_heads={found} here" if found and not rest else ""
        raise layout_error(
            f"x has shape {shape}; needs a last axis of head_dim={head_dim}, "
            f"or num_heads given for flat input{cure}"
        )
    if heads.read_as_flat:
        # A weight of 128 with 32 heads may be shared, or flat with 4 elements a head. Only x in
        # heads of 4 tells; read as flat, any other would silently be normalized in wrong groups.
        length = num_heads * head_dim
        raise layout_error(
            f"x has shape {shape}, and a 1-D weight of {length} with num_heads={num_heads} can "
            f"mean two things; needs head_dim={length} (all heads share the weight) or "
            f"head_dim={head_dim} (it is flat)"
        )
    if shape[-1] != num_heads * head_dim:
        raise layout_error(
            f"x has shape {shape}; needs a last axis of head_dim={head_dim} "
            f"or num_heads * head_dim = {num_heads * head_dim}"
        )
    if heads_axis != -2:
        raise layout_error(
            f"heads_axis is {heads_axis} and x of shape {shape} is flat; needs -2, or x unflattened"
        )
    return True, outer


def _heads_there(
    shape: Shape, num_heads: int, head_dim: int, heads_axis: int, told: int | None
) -> str:
    """Say what x needs whose last axis is head_dim, and whose heads are not where they belong."""
    flat = f"num_heads={num_heads} there, or for flat input a last axis of {num_heads * head_dim}"
    elsewhere = [axis - len(shape) for axis, n in enumerate(shape[:-1]) if n == num_heads]
    if len(elsewhere) == 1:
        return f"heads_axis={elsewhere[0]}, where {num_heads} are"
    split, rest = divmod(head_dim, num_heads)
    if told is None and split and not rest:
        # Nothing but x told head_dim: x is flat, or has other heads.
        return f"head_dim={split} if x is flat, or num_heads={num_heads} on axis {heads_axis}"
    return f"{flat} = num_heads * head_dim (head_dim={head_dim} here)"


def check_same(what: str, layout: Layout, name: str, first: Layout, of: str) -> None:
    """Refuse an array of another shape or dtype, say `what`, than the array called `of`."""
    found, needed = getattr(layout, what), getattr(first, what)
    if found != needed:
        error = ValueError if what == "shape" else TypeError
        raise error(f"{name} has {what} {found}; needs that of {of}, {needed}")


def check_device(layout: Layout | None, name: str, first: Layout, of: str) -> None:
    """Refuse an array on another device than that of the array called `of`."""
    if layout is not None and layout.device != first.device:
        raise TypeError(f"{name} is on {layout.device}; needs the device of {of}, {first.device}")


def check_last_stride(layout: Layout, name: str) -> None:
    """Refuse an array whose last axis has gaps."""
    if layout.shape[-1] > 1 and layout.size and layout.strides[-1] != layout.dtype.itemsize:
        raise layout_error(
            f"{name} has a stride of {layout.strides[-1]} bytes on its last axis; needs "
            f"{layout.dtype.itemsize}, neighbouring elements: ascontiguousarray({name}) of NumPy "
            f"and CuPy, {name}.contiguous() of torch"
        )


def parameter_stride(layout: Layout | None, name: str, head_dim: int) -> int:
    """Return the bytes from one head's parameters to the next head's: 0 where all share them."""
    if layout is None:
        return 0
    check_last_stride(layout, name)
    if len(layout.shape) == 2:
        return layout.strides[0]
    return 0 if layout.shape[0] == head_dim else head_dim * layout.dtype.itemsize


def axes_before_heads(
    opts: NormOptions, weight: Layout | None, bias: Layout | None, x: Layout
) -> int | None:
    """Return the number of axes before the heads'; None where it does not matter which they are."""
    heads = geometry_of(opts, weight, bias)
    flat = heads.head_dim is not None and x.shape[-1] != heads.head_dim
    if heads.num_heads in (None, 1) or flat:
        return None
    return opts.heads_axis % len(x.shape)


def checked_range(start: int, stop: int, most: int | None) -> tuple[int, int]:
    """Check a range of heads of a norm that has `most`, or any number of them."""
    start, stop = integer(start, "start"), integer(stop, "stop")
    if not 0 <= start < stop or (most is not None and stop > most):
        raise ValueError(
            f"heads {start} to {stop} of a norm of "
            f"{'any number of' if most is None else most} heads; needs "
            f"0 <= start < stop{'' if most is None else f' <= {most}'}"
        )
    return start, stop
