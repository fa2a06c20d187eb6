"""
Measures norms as a share of a copy of the same bytes, on the GPU or, without one, on the host.

On the GPU a time is the median over replays of a graph of calls that walk through buffers larger
than the L2, so that neither launching nor the cache is in the number. The ceiling is the better of
a device-to-device copy and an in-place multiply of as many contiguous bytes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import _dtypes, _kernels, ops
from cupy_headnorm.headnorm import HeadNorm

_ROTATION_BYTES = 512 * 1024 * 1024
"""Of all buffers together: ten times an H100's L2."""
_REPLAYS = 9

LAYOUTS = ("contiguous", "in-place", "packed-qkv", "packed-qkv-in-place")


class Case(NamedTuple):
    """One thing to measure."""

    tokens: int
    num_heads: int
    head_dim: int
    dtype: str
    kind: str
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes read and written: x once, the result once."""
        itemsize = _dtypes.from_name(self.dtype, "dtype").itemsize
        return 2 * self.tokens * self.num_heads * self.head_dim * itemsize


class Timing(NamedTuple):
    """Microseconds a call, of a norm and of the ceiling."""

    norm: float
    ceiling: float

    @property
    def share(self) -> float:
        """How much of copy speed the norm reaches."""
        return self.ceiling / self.norm


class Gpu:
    """Times calls on a stream of its own."""

    name = "cupy"

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def __enter__(self) -> Gpu:
        self._stream.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stream.__exit__(*raised)

    def rotation(self, nbytes: int) -> int:
        """Return how many sets of `nbytes` are larger than the L2 together."""
        return int(np.clip(_ROTATION_BYTES // max(nbytes, 1), 2, 64))

    def microseconds(self, call: Callable[[int], object], buffers: int) -> float:
        """Return the device time of ``call(i)``, i walking through the buffers."""
        stream, cuda = self._stream, self.xp.cuda
        count = max(buffers, 12)
        for i in range(buffers):
            call(i)
        stream.synchronize()
        stream.begin_capture()
        for i in range(count):
            call(i % buffers)
        graph = stream.end_capture()
        graph.launch(stream)
        times = []
        for _ in range(_REPLAYS):
            start, stop = cuda.Event(), cuda.Event()
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cuda.get_elapsed_time(start, stop) * 1e3 / count)
        return statistics.median(times)

    def copy(self, to: Any, source: Any) -> None:
        """Copy contiguous bytes with the driver's own copy."""
        device_to_device = 3  # cudaMemcpyDeviceToDevice
        self.xp.cuda.runtime.memcpyAsync(
            to.data.ptr, source.data.ptr, source.nbytes, device_to_device, self._stream.ptr
        )


class Host:
    """Times calls by the clock."""

    name = "numpy"
    xp = np

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def rotation(self, nbytes: int) -> int:
        """Return how many sets of buffers to walk through."""
        return 2

    def microseconds(self, call: Callable[[int], object], buffers: int) -> float:
        """Return the time of ``call(i)``, i walking through the buffers."""
        call(0)
        times = []
        for i in range(_REPLAYS):
            start = time.perf_counter()
            call(i % buffers)
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    def copy(self, to: Any, source: Any) -> None:
        """Copy an array."""
        np.copyto(to, source)


def backend() -> Gpu | Host:
    """Return the GPU's timer where a GPU can be used, else the host's."""
    return Host() if _kernels.environment().reason else Gpu()


def time_norm(norm: HeadNorm, x: np.ndarray, on: Gpu | Host, heads_axis: int = -2) -> Timing:
    """Time `norm` out of place on copies of `x`."""
    with on:
        buffers = on.rotation(2 * x.nbytes)
        inputs = [on.xp.array(x) for _ in range(buffers)]
        results = [on.xp.empty_like(v) for v in inputs]
        spent = on.microseconds(
            lambda i: norm(inputs[i], heads_axis=heads_axis, out=results[i]), buffers
        )
        return Timing(spent, _ceiling(on, inputs, results))


def _ceiling(on: Gpu | Host, inputs: list[Any], results: list[Any]) -> float:
    buffers = len(inputs)
    one = inputs[0].dtype.type(1)
    return min(
        on.microseconds(lambda i: on.copy(results[i], inputs[i]), buffers),
        on.microseconds(lambda i: on.xp.multiply(inputs[i], one, out=inputs[i]), buffers),
    )


def measure(case: Case, on: Gpu | Host) -> Timing:
    """Time the norm that `case` describes."""
    dtype = _dtypes.from_name(case.dtype, "dtype").numpy
    xp = on.xp
    with on:
        buffers = on.rotation(case.nbytes)
        shape = (case.tokens, case.num_heads, case.head_dim)
        random = np.random.default_rng(0)
        values = xp.asarray(random.standard_normal(shape, np.float32).astype(dtype))
        plain = [xp.array(values) for _ in range(buffers)]
        others = [xp.empty_like(v) for v in plain]
        inputs, results = plain, others
        if case.layout.startswith("packed-qkv"):
            # 4 query heads to a key and a value head, as in Qwen3-8B: the slice of the queries.
            packed = case.num_heads + 2 * max(1, case.num_heads // 4)
            inputs = [xp.empty((case.tokens, packed, case.head_dim), dtype) for _ in plain]
            inputs = [v[:, : case.num_heads] for v in inputs]
            for v in inputs:
                v[...] = values
        if case.layout.endswith("in-place"):
            results = inputs
        weight = xp.asarray(random.standard_normal(case.head_dim, np.float32).astype(dtype))
        norm = {"rms": ops.rms_norm, "layer": ops.layer_norm}[case.kind]
        spent = on.microseconds(lambda i: norm(inputs[i], weight, out=results[i]), buffers)
        return Timing(spent, _ceiling(on, plain, others))


def cases(
    tokens: list[int],
    heads: list[int],
    head_dims: list[int],
    dtypes: list[str],
    kinds: list[str],
    layouts: list[str],
    megabytes: float | None,
) -> Iterator[Case]:
    """Yield every combination; `megabytes` sets the tokens so that x has that many."""
    for num_heads, head_dim, dtype, kind, layout in itertools.product(
        heads, head_dims, dtypes, kinds, layouts
    ):
        itemsize = _dtypes.from_name(dtype, "dtype").itemsize
        row = num_heads * head_dim * itemsize
        counts = tokens if megabytes is None else [max(1, int(megabytes * 1e6 / row))]
        for count in counts:
            yield Case(count, num_heads, head_dim, dtype, kind, layout)


def report(to_measure: list[Case], on: Gpu | Host, where: str) -> None:
    """Measure every case, with a progress bar, and print a table."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file or a pipe is not 80 columns wide
    console.print(f"{where}; copy: GB/s of the better of a copy and an in-place multiply")
    table = Table(box=None)
    for column in (
        "tokens x heads x dim",
        "dtype",
        "kind",
        "layout",
        "us",
        "GB/s",
        "copy",
        "share",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for case in track(to_measure, "measuring", console=console, transient=True):
        timing = measure(case, on)
        table.add_row(
            f"{case.tokens} x {case.num_heads} x {case.head_dim}",
            case.dtype,
            case.kind,
            case.layout,
            f"{timing.norm:.2f}",
            f"{case.nbytes / timing.norm / 1e3:,.0f}",
            f"{case.nbytes / timing.ceiling / 1e3:,.0f}",
            f"{timing.share:.3f}",
        )
    console.print(table)
