"""The arithmetic of a validated call on NumPy arrays."""

from __future__ import annotations

import _thread
import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall
from cupy_headnorm._rules.parts import Part, PartsCall

_CHUNK_BYTES = 1024 * 1024
"""Of widened values a chunk, beside as much scratch. 1 GiB of float32, head_dim 128, one core of a
server with 1 MiB of L2: 128 KiB 0.36 s, 256 KiB 0.31, 512 KiB 0.27, 1 MiB 0.22, 2 MiB 0.21;
whole-array NumPy 0.63."""
_MAX_THREADS = 4
"""Each has chunks of its own, 2 MiB with its scratch."""
_THREAD_CHUNKS = 8
"""A thread takes on at least: 4 ms of work, against 0.1 ms to start it."""


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
    x_rows = _rows(x, [(axis.size, axis.x) for axis in call.axes], head_dim)
    out_rows = _rows(out, [(axis.size, axis.out) for axis in call.axes], head_dim)
    parameters = [
        None if array is None else _rows(array, [_once(*step) for step in steps], head_dim)
        for array, steps in (
            (weight, [(axis.size, axis.weight) for axis in call.axes]),
            (bias, [(axis.size, axis.bias) for axis in call.axes]),
        )
    ]
    # A row longer than a chunk is walked in blocks of columns, and read again for each pass.
    columns = min(head_dim, _CHUNK_BYTES // accumulate.itemsize)
    blocks = [slice(start, start + columns) for start in range(0, head_dim, columns)]
    chunk = max(1, _CHUNK_BYTES // (columns * accumulate.itemsize))
    chunks = deque(_chunks(call.axes, chunk))

    def work() -> None:
        buffers = np.empty((2, min(chunk, call.rows), columns), accumulate)
        with np.errstate(all="ignore"):  # infinities and NaN follow IEEE without a warning
            while True:
                try:
                    index = chunks.popleft()
                except IndexError:
                    return
                weights, biases = (
                    None if p is None else p[_broadcast_index(p, index)] for p in parameters
                )
                _normalize(call, x_rows[index], weights, biases, out_rows[index], blocks, buffers)

    threads = min(_MAX_THREADS, len(chunks) // _THREAD_CHUNKS)
    if threads > 1:
        threads = min(threads, len(os.sched_getaffinity(0)))
    if threads < 2:
        work()
        return
    # NumPy lets go of the interpreter in its loops. A row is one thread's, so its bits stay.
    _helped(work, threads - 1, chunks.clear)


def _helped(work: Callable[[], None], helpers: int, stop: Callable[[], None]) -> None:
    """
    Run `work` here and in so many threads beside, until all of them return.

    There are fewer where no more start: at the interpreter's end, or where a process may have no
    more. One that fails or is interrupted lets the others `stop`.
    """
    failures: list[BaseException] = []
    running: list[threading.Lock] = []

    def help_out(ended: threading.Lock) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
            stop()
        finally:
            ended.release()

    def wait() -> None:
        for ended in running:
            with ended:
                pass

    # An executor would take a lock that all executors share. A signal's handler that comes then,
    # and calls a norm, waits for its own thread.
    try:
        with contextlib.suppress(RuntimeError):
            for _ in range(helpers):
                ended = threading.Lock()
                ended.acquire()
                _thread.start_new_thread(help_out, (ended,))
                running.append(ended)
        work()
        wait()
    finally:
        stop()
        wait()
    if failures:
        raise failures.pop()


def apply_parts(
    call: PartsCall,
    xs: Sequence[np.ndarray],
    parameters: Sequence[Sequence[np.ndarray | None]],
    outs: Sequence[np.ndarray],
    rotate: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    """
    Run a validated call on q, k and v.

    `rotate` takes heads of shape ``(*tokens, num_heads, head_dim)``, the tokens' axes being those
    of the call.
    """
    for i, part in enumerate(call.parts):
        sizes = [*(axis.size for axis in call.axes), part.num_heads]
        x_steps = [*(axis.x[i] for axis in call.axes), part.x]
        out_steps = [*(axis.out[i] for axis in call.axes), part.out]
        source = x = _rows(xs[i], list(zip(sizes, x_steps, strict=True)), call.spec.head_dim)
        target = out = _rows(outs[i], list(zip(sizes, out_steps, strict=True)), call.spec.head_dim)
        if rotate is not None and part.turned and call.spec.rope is not None:
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
    spec = call.spec
    axes = [
        RowAxis(n, of_x, of_out, 0, 0)
        for n, of_x, of_out in zip(x.shape[:-1], x.strides[:-1], out.strides[:-1], strict=True)
    ]
    axes[-1] = axes[-1]._replace(weight=part.weight, bias=part.bias)
    norm = spec.norm._replace(
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
    axes = [(n if step else 1, step) for n, step in zip(sizes, steps, strict=True)]
    last = array.ndim - own
    return np.lib.stride_tricks.as_strided(
        array,
        (*(n for n, _ in axes), *array.shape[last:]),
        (*(step for _, step in axes), *array.strides[last:]),
        writeable=False,
    )


def _once(size: int, stride: int) -> tuple[int, int]:
    """Keep one entry of an axis along which a parameter does not change."""
    return (size, stride) if stride else (1, 0)


def _rows(array: np.ndarray, axes: list[tuple[int, int]], head_dim: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(
        array,
        (*(size for size, _ in axes), head_dim),
        (*(stride for _, stride in axes), array.itemsize),
        writeable=array.flags.writeable,
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


def _normalize(
    call: NormCall,
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    out: np.ndarray,
    blocks: list[slice],
    buffers: np.ndarray,
) -> None:
    """Normalize one chunk: `x` and `out` of shape (..., head_dim), at most a buffer's rows."""
    spec = call.spec
    accumulate = spec.x.accumulate.numpy
    number = accumulate.type
    wide = spec.x.numpy == accumulate
    inverse_count = number(1.0 / spec.head_dim)
    # As in headnorm/norm.cuh: an exact power of two keeps the sum of squares of values up to 1e18,
    # centred ones up to 2e18, in range. Fewer squares than this cannot leave it.
    scale = number(1)
    if spec.head_dim > (256 if spec.kind == "rms" else 64):
        scale = number(2.0 ** -math.ceil(math.log2(spec.head_dim)))
    inverse_scaled_count = number(1.0 / spec.head_dim / float(scale))
    rows = math.prod(x.shape[:-1])
    mean = None

    def buffer(which: int, columns: slice) -> np.ndarray:
        shape = x[..., columns].shape
        return buffers[which, :rows, : shape[-1]].reshape(shape)

    def load(columns: slice) -> np.ndarray:
        """Return x widened: x itself where that is what it is."""
        # NumPy adds misaligned numbers in another order.
        if wide and x.flags.aligned:
            return x[..., columns]
        np.copyto(buffer(0, columns), x[..., columns], casting="unsafe")
        return buffer(0, columns)

    one_block = len(blocks) == 1
    values = load(blocks[0])
    if spec.kind == "layer":
        total = number(0)
        for columns in blocks:
            values = values if one_block else load(columns)
            total = total + np.add.reduce(values, axis=-1, keepdims=True)
        mean = total * inverse_count
    squares = number(0)
    for columns in blocks:
        values = values if one_block else load(columns)
        if mean is not None:
            values = np.subtract(values, mean, out=buffer(0, columns))
        if scale == 1:  # at most 256 squares: einsum adds 8 or more in parallel, in one pass
            products = np.einsum("...d,...d->...", values, values)
            squares = squares + products[..., np.newaxis]
        else:
            scaled = np.multiply(values, scale, out=buffer(1, columns))
            np.multiply(scaled, values, out=scaled)
            squares = squares + np.add.reduce(scaled, axis=-1, keepdims=True)
    inverse = squares * inverse_scaled_count
    inverse += number(call.eps)
    np.sqrt(inverse, out=inverse)
    np.divide(number(1), inverse, out=inverse)

    def rounded(values: np.ndarray) -> None:
        if not wide:
            np.copyto(values, values.astype(spec.x.numpy), casting="unsafe")

    if spec.rounding == "rstd":
        rounded(inverse)

    for columns in blocks:
        if not one_block:
            values = load(columns)
            if mean is not None:
                values = np.subtract(values, mean, out=buffer(0, columns))
        # The last step writes where the result belongs, so that it passes the cache once.
        last = out[..., columns] if wide else buffer(0, columns)
        plain = weight is None and bias is None
        y = np.multiply(values, inverse, out=last if plain else buffer(1, columns))
        if spec.rounding in ("before_weight", "every_op"):
            rounded(y)
        if weight is not None:
            scales = weight[..., columns].astype(accumulate) + number(call.weight_offset)
            y = np.multiply(y, scales, out=last if bias is None else y)
        if bias is not None:
            if spec.rounding == "every_op":
                rounded(y)
            np.add(y, bias[..., columns].astype(accumulate), out=last)
        if not wide:
            np.copyto(out[..., columns], last, casting="unsafe")
