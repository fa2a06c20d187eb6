"""The cosines and sines of a call: given with it, or looked up by position in tables made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm._arrays import dtypes, find
from cupy_headnorm._arrays.views import ArrayView
from cupy_headnorm._calls import host, uploads
from cupy_headnorm._calls.parameters import identity
from cupy_headnorm._cuda import memory
from cupy_headnorm._cuda.once import made_once
from cupy_headnorm._rules.parts import PartsCall
from cupy_headnorm._rules.rotary import Rotation
from cupy_headnorm.rope import Rope
from cupy_headnorm.rope import numpy as rope_numpy


class RopeCall(NamedTuple):
    """A rotary embedding beside a call, and the arrays that it is read from."""

    rope: Rope
    rotation: Rotation
    cos: ArrayView
    sin: ArrayView
    positions: ArrayView | None
    """None where cos and sin are the tokens' own."""

    @property
    def views(self) -> dict[str, ArrayView]:
        """The arrays by name."""
        positions = {} if self.positions is None else {"positions": self.positions}
        return {"cos": self.cos, "sin": self.sin, **positions}

    def in_numpy(self, call: PartsCall) -> Callable[[np.ndarray], np.ndarray]:
        """Return what rotates heads that lie as `call.axes` and one axis of heads say."""
        rope, sizes = self.rope, [axis.size for axis in call.axes]
        if self.positions is None:
            steps = [axis.table for axis in call.axes]
            cos, sin = (host.grid(t.as_numpy(), sizes, steps, 1) for t in (self.cos, self.sin))
        else:
            positions = self.positions.as_numpy()
            steps = [axis.position for axis in call.axes]
            if rope.sections:
                positions = np.stack([host.grid(row, sizes, steps, 0) for row in positions])
            else:
                positions = host.grid(positions, sizes, steps, 0)
            cos, sin = rope.at(positions, self.cos.layout.dtype.numpy)

        def rotate(x: np.ndarray) -> np.ndarray:
            return rope_numpy.apply(
                x,
                cos[..., np.newaxis, :],
                sin[..., np.newaxis, :],
                style=rope.style,
                rounding=rope.rounding,
                rotary_dim=rope.rotary_dim,
            )

        return rotate


class Pair(NamedTuple):
    """Tables of cosines and sines in one memory."""

    cos: ArrayView
    sin: ArrayView


class Tables:
    """A rotary embedding's cosines and sines on each device and in each dtype they were needed."""

    def __init__(self, rope: Rope | None) -> None:
        self.rope = rope
        self.identity = identity(rope)
        """Stands for `rope`, or for none, in the keys of remembered calls."""
        self.ready: dict[tuple[int, str], Pair] = {}
        """By CUDA device's index and their dtype."""
        self.seen: dict[tuple[int, Any], Pair] = {}
        """The same by the library's own dtype of q."""

    def describe(
        self,
        names: tuple[str, ...],
        q: ArrayView,
        positions: Any,
        cos: Any,
        sin: Any,
        stream: int,
    ) -> RopeCall | None:
        """Describe what rotates the parts called `names`; None where there is no embedding."""
        rope = self.rope
        given = [
            n for n, a in (("positions", positions), ("cos", cos), ("sin", sin)) if a is not None
        ]
        if rope is None:
            if given:
                raise ValueError(
                    f"{given[0]} is given and there is no rope; needs QKNorm(rope=...)"
                )
            return None
        if given not in (["positions"], ["cos", "sin"]):
            raise ValueError(
                f"given to rotate by: {', '.join(given) or 'nothing'}; needs positions alone, or "
                "cos and sin"
            )
        seen = None
        if positions is None:
            cos_view = find.view_beside(q, cos, "cos", of="q")
            sin_view = find.view_beside(q, sin, "sin", of="q")
        else:
            seen = find.view_beside(q, positions, "positions", dtypes.POSITIONS, of="q")
            tables = self._beside(rope, q, stream)
            cos_view, sin_view = tables.cos, tables.sin
            if find.quick.get(type(q.owner)) is q.library:
                self.saw(q.owner.dtype, tables)
        rotation = Rotation(
            rope.style,
            rope.order == "before norm",
            rope.rotary_dim,
            rope.rounding == "every_op",
            rope.sections if positions is not None else (),
            rope.interleaved_sections,
            tuple(name != "v" for name in names),
            cos_view.layout,
            sin_view.layout,
            None if seen is None else seen.layout,
        )
        return RopeCall(rope, rotation, cos_view, sin_view, seen)

    def _beside(self, rope: Rope, q: ArrayView, stream: int) -> Pair:
        """Return views of both tables for arrays like `q`; on the host shapes and dtypes alone."""
        device, dtype = q.layout.device, q.layout.dtype
        if rope.table == "float32" and dtype.name != "float64":
            dtype = dtypes.FLOAT32
        if device.kind == "cpu":
            # `in_numpy` computes the rows that it needs: the whole may be gigabytes.
            half = rope.rotary_dim // 2
            rows = np.broadcast_to(np.zeros(half, dtype.numpy), (rope.max_position, half))
            unread = find.view(rows, "table")
            return Pair(unread, unread)
        key = (device.index, dtype.name)
        found = self.ready.get(key)
        if found is None:
            memory.refuse_capture(stream, f"the tables are not on {device} yet")

            def make() -> Pair:
                shape, pieces = rope._shape(), rope._pieces(dtype.numpy)
                return Pair(*uploads.upload_pieces(shape, dtype.numpy, pieces, device.index))

            found = made_once(self.ready, key, make)
        return found

    def saw(self, dtype: Any, tables: Pair) -> None:
        """Let calls on parts of a library's `dtype` find their tables."""
        index = tables.cos.layout.device.index
        self.seen[index, dtype] = tables
        if (
            self.ready.get((index, tables.cos.layout.dtype.name)) is not tables
        ):  # unloaded meanwhile
            self.seen.pop((index, dtype), None)

    def unload(self) -> None:
        """Wait for the work in flight and free every device copy."""
        held, self.ready, self.seen = self.ready, {}, {}
        for index in {index for index, _ in held.copy()}:
            memory.synchronize(index)
