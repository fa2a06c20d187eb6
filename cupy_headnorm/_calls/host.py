"""The arithmetic of a validated call on NumPy arrays."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cupy_headnorm._calls import threads
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec

if TYPE_CHECKING:  # one norm needs no rules of several: 2 ms
    from cupy_headnorm._rules.parts import Part, PartsCall

_CHUNK_BYTES = 1024 * 1024
"""A chunk has so many of widened values, and as much scratch. 1 GiB of float32, head_dim 128, one
core of a server with 1 MiB of L2: 128 KiB 0.36 s, 256 KiB 0.31, 512 KiB 0.27, 1 MiB 0.22, 2 MiB
0.21; whole-array NumPy 0.63."""
_MAX_THREADS = 4
"""Each has chunks of its own, 2 MiB with its scratch."""
_THREAD_CHUNKS = 8
"""A thread takes no fewer: 4 ms of work, against 0.1 ms to start it."""


def apply(
    call: NormCall,
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """Run a validated call on NumPy arrays."""
    if call.rows == 0:
        return
    head_dim = call.spec.head_dim
    accumulate = call.spec.x.accumulate.numpy
    sizes, *strides = zip(*call.axes, strict=True)
    x_rows = _rows(x, sizes, strides[0], head_dim)
    out_rows = _rows(out, sizes, strides[1], head_dim)
    # One entry is enough for an axis along which a parameter does not change.
    parameters = [
        None if array is None else _rows(array, map(_entries, sizes, steps), steps, head_dim)
        for array, steps in zip((weight, bias), strides[2:], strict=True)
    ]
    # A row longer than a chunk is walked in blocks of columns, and read again for each pass.
    columns = min(head_dim, _CHUNK_BYTES // accumulate.itemsize)
    blocks = [slice(start, start + columns) for start in range(0, head_dim, columns)]
    rows = max(1, _CHUNK_BYTES // (columns * accumulate.itemsize))
    chunks = deque(_chunks(call.axes, rows))

    def work() -> None:
        buffers = np.empty((2, min(rows, call.rows), columns), accumulate)
        with np.errstate(all="ignore"):  # infinities and NaN follow IEEE without a warning
            while True:
                try:
                    index = chunks.popleft()
                except IndexError:
                    return
                weights, biases = (
                    None if p is None else p[_broadcast_index(p, index)] for p in parameters
                )
                chunk = _Chunk(call.spec, x_rows[index], blocks, buffers)
                _normalize(call, chunk, weights, biases, out_rows[index])

    count = min(_MAX_THREADS, len(chunks) // _THREAD_CHUNKS)
    if count > 1:
        count = min(count, len(os.sched_getaffinity(0)))
    if count < 2:
        work()
        return
    # NumPy lets go of the interpreter in its loops. A row is one thread's, so its bits stay.
    threads.helped(work, count - 1, chunks.clear)


def apply_parts(
    call: PartsCall,
    xs: Sequence[np.ndarray],
    parameters: Sequence[Sequence[np.ndarray | None]],
    outs: Sequence[np.ndarray],
    rotate: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    """
    Run a validated call on q, k and v.

    `rotate` takes heads of shape ``(*tokens, num_heads, head_dim)``, by the axes of the call.
    """
    for i, part in enumerate(call.parts):
        sizes = [*(axis.size for axis in call.axes), part.num_heads]
        x_steps = [*(axis.x[i] for axis in call.axes), part.x]
        out_steps = [*(axis.out[i] for axis in call.axes), part.out]
        source = x = _rows(xs[i], sizes, x_steps, call.spec.norm.head_dim)
        target = out = _rows(outs[i], sizes, out_steps, call.spec.norm.head_dim)
        if rotate is not None and part.rotated and call.spec.rope is not None:
            if call.spec.rope.first:
                source = rotate(x)
            else:
                target = np.empty(x.shape, x.dtype)
        weight, bias = parameters[i]
        apply(_of_part(call, part, source, target, weight, bias), source, weight, bias, target)
        if rotate is not None and target is not out:
            out[...] = rotate(target)


def _of_part(
    call: PartsCall,
    part: Part,
    x: np.ndarray,
    out: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
) -> NormCall:
    """Return the call of one part's norm on heads of shape ``(*tokens, num_heads, head_dim)``."""
    spec = call.spec.norm
    axes = [
        RowAxis(n, of_x, of_out, 0, 0)
        for n, of_x, of_out in zip(x.shape[:-1], x.strides[:-1], out.strides[:-1], strict=True)
    ]
    axes[-1] = axes[-1]._replace(weight=part.weight, bias=part.bias)
    norm = spec._replace(
        weight=None if weight is None else spec.weight, bias=None if bias is None else spec.bias
    )
    rows = call.tokens * part.num_heads
    return NormCall(norm, tuple(axes), rows, part.eps, part.weight_offset, _ANY_ALIGNMENT)


_ANY_ALIGNMENT = (1, 1, 1, 1)
"""NumPy's loops take arrays as they lie."""


def grid(array: np.ndarray, sizes: Sequence[int], steps: Sequence[int], own: int) -> np.ndarray:
    """
    Return a view of `array` over axes of these sizes and strides, and its own last axes.

    An axis along which it does not move is 1 long: it broadcasts.
    """
    last = array.ndim - own
    return np.lib.stride_tricks.as_strided(
        array,
        (*map(_entries, sizes, steps), *array.shape[last:]),
        (*steps, *array.strides[last:]),
        writeable=False,
    )


def _entries(size: int, step: int) -> int:
    return size if step else 1


def _rows(
    array: np.ndarray, sizes: Iterable[int], steps: Iterable[int], head_dim: int
) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(
        array, (*sizes, head_dim), (*steps, array.itemsize), writeable=array.flags.writeable
    )


def _chunks(axes: tuple[RowAxis, ...], rows: int) -> Iterator[tuple[int | slice, ...]]:
    """Yield index tuples that cover the grid of rows, at most `rows` rows each."""
    sizes = [axis.size for axis in axes]
    split = len(sizes) - 1
    while split > 0 and math.prod(sizes[split:]) <= rows:
        split -= 1
    step = max(1, rows // math.prod(sizes[split + 1 :]))
    for lead in np.ndindex(*sizes[:split]):
        for start in range(0, sizes[split], step):
            yield (*lead, slice(start, start + step))


def _broadcast_index(
    parameter: np.ndarray, index: tuple[int | slice, ...]
) -> tuple[int | slice, ...]:
    return tuple(
        i if n > 1 else (slice(None) if isinstance(i, slice) else 0)
        for n, i in zip(parameter.shape, index, strict=False)
    )


class _Chunk(NamedTuple):
    """Rows of x, of shape (..., head_dim), at most as many as `buffers` have."""

    spec: NormSpec
    x: np.ndarray
    blocks: list[slice]
    """Columns that are worked on at once, one after the other."""
    buffers: np.ndarray

    @property
    def wide(self) -> bool:
        """Tell whether x is of the type of the arithmetic."""
        return self.spec.x.accumulate is self.spec.x

    def buffer(self, which: int, columns: slice) -> np.ndarray:
        shape = self.x[..., columns].shape
        return self.buffers[which, : math.prod(shape[:-1]), : shape[-1]].reshape(shape)

    def widened(self, columns: slice) -> np.ndarray:
        """Return x widened: x itself where that is what it is."""
        # NumPy adds misaligned numbers in another order.
        if self.wide and self.x.flags.aligned:
            return self.x[..., columns]
        np.copyto(self.buffer(0, columns), self.x[..., columns], casting="unsafe")
        return self.buffer(0, columns)

    def centred(self, columns: slice, values: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
        """Return widened x less its mean, if there is one."""
        return values if mean is None else np.subtract(values, mean, out=self.buffer(0, columns))

    def round(self, values: np.ndarray) -> None:
        """Round widened values to x's type, where they are."""
        if not self.wide:
            np.copyto(values, values.astype(self.spec.x.numpy), casting="unsafe")


def _normalize(
    call: NormCall,
    chunk: _Chunk,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """Normalize one chunk into `out`, of its shape."""
    values, mean, inverse = _statistics(chunk, call.eps)
    number = call.spec.x.accumulate.numpy.type
    for columns in chunk.blocks:
        if len(chunk.blocks) > 1:
            values = chunk.centred(columns, chunk.widened(columns), mean)
        scale = shift = None
        if weight is not None:
            scale = weight[..., columns].astype(number) + number(call.weight_offset)
        if bias is not None:
            shift = bias[..., columns].astype(number)
        _scale(chunk, columns, values, inverse, scale, shift, out[..., columns])


def _statistics(chunk: _Chunk, eps: float) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Return the last block of x widened and centred, its mean if need be, and the inverse root."""
    spec, blocks = chunk.spec, chunk.blocks
    number = spec.x.accumulate.numpy.type
    # As in headnorm/norm.cuh: an exact power of two keeps the sum of squares of values up to 1e18,
    # centred ones up to 2e18, in range. Fewer squares than this cannot leave it.
    scale = number(1)
    if spec.head_dim > (256 if spec.kind == "rms" else 64):
        scale = number(2.0 ** -math.ceil(math.log2(spec.head_dim)))
    values, mean = chunk.widened(blocks[0]), None
    if spec.kind == "layer":
        total = number(0)
        for columns in blocks:
            values = values if len(blocks) == 1 else chunk.widened(columns)
            total = total + np.add.reduce(values, axis=-1, keepdims=True)
        mean = total * number(1.0 / spec.head_dim)
    squares = differences = number(0)
    for columns in blocks:
        values = values if len(blocks) == 1 else chunk.widened(columns)
        values = chunk.centred(columns, values, mean)
        if mean is not None:
            differences = differences + np.add.reduce(values, axis=-1, keepdims=True)
        if scale == 1:  # at most 256 squares: einsum adds 8 or more in parallel, in one pass
            products = np.einsum("...d,...d->...", values, values)
            squares = squares + products[..., np.newaxis]
        else:
            scaled = np.multiply(values, scale, out=chunk.buffer(1, columns))
            np.multiply(scaled, values, out=scaled)
            squares = squares + np.add.reduce(scaled, axis=-1, keepdims=True)
    if mean is not None:  # see kCorrectsMean in headnorm/norm.cuh
        differences /= number(spec.head_dim)
        mean += differences
        if len(blocks) == 1:
            values -= differences
    inverse = squares * number(1.0 / spec.head_dim / float(scale))
    inverse += number(eps)
    np.sqrt(inverse, out=inverse)
    np.divide(number(1), inverse, out=inverse)
    if spec.rounding == "rstd":
        chunk.round(inverse)
    return values, mean, inverse


def _scale(
    chunk: _Chunk,
    columns: slice,
    values: np.ndarray,
    inverse: np.ndarray,
    scale: np.ndarray | None,
    shift: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """Write a block of results: centred values by the inverse root, the weight and the bias."""
    rounding = chunk.spec.rounding
    # The last step writes where the result belongs, so that it passes the cache once.
    last = out if chunk.wide else chunk.buffer(0, columns)
    plain = scale is None and shift is None
    y = np.multiply(values, inverse, out=last if plain else chunk.buffer(1, columns))
    if rounding in ("before_weight", "every_op"):
        chunk.round(y)
    if scale is not None:
        y = np.multiply(y, scale, out=last if shift is None else y)
    if shift is not None:
        if rounding == "every_op":
            chunk.round(y)
        np.add(y, shift, out=last)
    if not chunk.wide:
        np.copyto(out, last, casting="unsafe")
