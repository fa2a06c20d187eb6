"""
Rotary embeddings: which dims rotate, by which angles, with which roundings; and the same in NumPy.

The numbers are those of the models' own ``RotaryEmbedding`` and ``apply_rotary_pos_emb`` in
transformers 5.23, step by step in float32. Cosines, which no standard fixes, are taken in float64
and rounded: of torch's own, on a CPU, one in 20 is a unit in the last place off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._rules import options
from cupy_headnorm.rope import config as rope_config
from cupy_headnorm.rope import numpy as rope_numpy
from cupy_headnorm.rope.frequencies import powers
from cupy_headnorm.rope.numpy import ORDERS, ROUNDINGS, STYLES, TABLES

_CHUNK = 1 << 18
"""Angles at a time: 2 MiB of float64."""

_MOST_ANGLES = 1 << 30
"""
Of a table. Both are 8 GiB in float32, and took 2 minutes of one core of a busy host, 122 ns an
angle. The longest released, of Llama 4 Scout's 10,485,760 positions, has 0.6 of them.
"""
_MOST_POSITIONS = 2**31 - 1
"""On the host, which makes no table."""


@dataclasses.dataclass(frozen=True)
class Rope:
    r"""
    A rotary embedding of the first `rotary_dim` dims of a head; the others pass.

    Frequency :math:`i` of ``rotary_dim / 2`` rotates one pair of dims, at position :math:`p`, by
    :math:`a = p f_i`, with :math:`c = s \cos a` and :math:`d = s \sin a`:

    .. math:: (y_1, y_2) = (x_1 c - x_2 d,\; x_2 c + x_1 d)

    Parameters
    ----------
    rotary_dim : int
        Even; at most head_dim, which `check` is told.
    inverse_frequency : sequence of float
        The :math:`f_i`, ``rotary_dim / 2`` of them, as float32. A pair of zero stays as it is.
    max_position : int
        Number of positions in a table, below ``2**31``, and on a GPU ``2**31 / rotary_dim`` at
        most. Others are refused on the host, and clamped to the table's ends on a GPU, which alone
        reads them there.
    style : {"half", "interleaved", "half flipped"}
        Which dims are a pair: ``i`` and ``i + rotary_dim / 2`` (NeoX), ``2 i`` and ``2 i + 1``
        (GPT-J), or as the first with the sign of :math:`d` changed (nanochat).
    order : {"after norm", "before norm"}
        When heads are rotated.
    rounding : {"every_op", "once"}
        With R, the rounding to x's dtype: ``R(R(x c) + R(x' d))`` or ``R(x c + x' d)``.
    table : {"x", "float32"}
        Dtype of :math:`c` and :math:`d`: x's, or as they come. Rounding every op needs x's.
    sections : tuple of int
        M-RoPE: how many frequencies take each row of the positions, ``rotary_dim / 2`` together.
        Empty where positions have no rows.
    interleaved_sections : bool
        Rows interleave, as in Qwen3-VL, instead of following one another, as in Qwen2-VL.
    attention_scaling : float
        The :math:`s`, multiplied in float32 (YaRN).
    """

    rotary_dim: int
    inverse_frequency: tuple[float, ...]
    max_position: int
    style: str = "half"
    order: str = "after norm"
    rounding: str = "every_op"
    table: str = "x"
    sections: tuple[int, ...] = ()
    interleaved_sections: bool = False
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        rotary_dim = rope_numpy.checked_rotary_dim(self.rotary_dim)
        half = rotary_dim // 2
        try:
            frequencies = np.asarray(self.inverse_frequency, np.float32)
        except (TypeError, ValueError):
            given = options.shown(self.inverse_frequency)
            raise TypeError(f"inverse_frequency is {given}; needs a sequence of numbers") from None
        if frequencies.shape != (half,):
            raise ValueError(
                f"inverse_frequency has shape {frequencies.shape}; "
                f"needs ({half},), half of rotary_dim {rotary_dim}"
            )
        if not np.isfinite(frequencies).all():
            raise ValueError("inverse_frequency has an infinity or NaN; needs finite numbers")
        for name, allowed in (
            ("style", STYLES), ("order", ORDERS), ("rounding", ROUNDINGS), ("table", TABLES)
        ):  # fmt: skip
            object.__setattr__(self, name, options.one_of(getattr(self, name), allowed, name))
        if self.rounding == "every_op" and self.table != "x":
            raise ValueError(f"rounding is 'every_op' and table {self.table!r}; needs table 'x'")
        max_position = options.integer(self.max_position, "max_position")
        if max_position < 1:
            raise ValueError(f"max_position is {max_position}; needs 1 or more")
        if max_position > _MOST_POSITIONS:
            raise ValueError(
                f"max_position is {max_position}; needs {_MOST_POSITIONS} at most: hand in "
                "max_position=, as many positions as are used"
            )
        try:
            sizes = tuple(self.sections)
        except TypeError:
            raise TypeError(
                f"sections are {options.shown(self.sections)}; needs a sequence of integers"
            ) from None
        sections = tuple(options.integer(size, "sections") for size in sizes)
        if sections and (sum(sections) != half or min(sections) < 0):
            raise ValueError(
                f"sections are {sections}, together {sum(sections)}; "
                f"needs {half}, half of rotary_dim {rotary_dim}"
            )
        if not isinstance(self.interleaved_sections, (bool, np.bool_)):
            raise TypeError(
                f"interleaved_sections is {options.shown(self.interleaved_sections)}; "
                "needs True or False"
            )
        scaling = options.real(self.attention_scaling, "attention_scaling")
        for name, value in (
            ("rotary_dim", rotary_dim), ("max_position", max_position), ("sections", sections),
            ("inverse_frequency", tuple(frequencies.tolist())), ("attention_scaling", scaling),
            ("interleaved_sections", bool(self.interleaved_sections)),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    @classmethod
    def of_theta(cls, theta: float, rotary_dim: int, *, max_position: int, **fields: Any) -> Rope:
        """Return the plain embedding, of frequencies ``theta ** (-2 i / rotary_dim)``."""
        frequencies = 1 / powers(
            options.real(theta, "theta"), rope_numpy.checked_rotary_dim(rotary_dim)
        )
        return cls(rotary_dim, tuple(frequencies.tolist()), max_position, **fields)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        layer: int = 0,
        *,
        head_dim: int | None = None,
        max_position: int | None = None,
    ) -> Rope:
        """
        Return the embedding of one layer of a model.

        Parameters
        ----------
        config : Mapping
            A parsed ``config.json``; the text tower's is found in it. ``rope_parameters``, flat or
            by layer type, as well as the older ``rope_scaling``, ``rope_theta``,
            ``partial_rotary_factor``, ``rotary_pct`` and ``rotary_dim``.
        layer : int
        head_dim : int, optional
            What the layer's norm has; the config's own otherwise.
        max_position : int, optional
            Length of the table; ``max_position_embeddings`` otherwise.

        Raises
        ------
        TypeError
            `layer` is no integer.
        ValueError
            A type that depends on the length of the sequence (dynamic, longrope), or is unknown; a
            model type that is not in `models`; a layer that the config gives no embedding; a share
            of head_dim that the type's module in transformers does not rotate by, where others do;
            fields that cannot be read.
        """
        layer = options.integer(layer, "layer")
        with rope_config.of_any_values():
            fields, head_dim = rope_config.read(config, layer, head_dim, max_position)
            rope = cls(**fields)
            rope.check(head_dim)
        return rope

    def check(self, head_dim: int) -> None:
        """Check that heads of `head_dim` have `rotary_dim` dims."""
        if self.rotary_dim > head_dim:
            raise ValueError(
                f"rotary_dim is {self.rotary_dim}; needs at most head_dim, which is {head_dim}"
            )

    @property
    def row_of_frequency(self) -> tuple[int, ...]:
        """Row of the positions that each frequency takes; zeros without `sections`."""
        half, rows = self.rotary_dim // 2, len(self.sections)
        found = np.zeros(half, np.int64)
        if self.interleaved_sections:
            for row in range(1, rows):
                found[row : self.sections[row] * rows : rows] = row
        elif rows:
            found = np.repeat(np.arange(rows), self.sections)
        return tuple(found.tolist())

    def tables(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Return cos and sin, ``(max_position, rotary_dim / 2)`` each, rounded to `dtype`.

        `dtype` is what `table` says: that of x, or float32. M-RoPE picks rows for each frequency.
        """
        wanted = dtypes.from_numpy(np.dtype(dtype), "dtype").numpy
        cos, sin = np.empty((2, *self._shape()), wanted)
        for start, *piece in self._pieces(wanted):
            stop = start + len(piece[0])
            cos[start:stop], sin[start:stop] = piece
        return cos, sin

    def _shape(self) -> tuple[int, int]:
        """Return the shape of a table; ValueError where it is not to be made."""
        half = self.rotary_dim // 2
        if self.max_position > _MOST_ANGLES // half:
            raise ValueError(
                f"max_position is {self.max_position}; needs {_MOST_ANGLES // half} at most for "
                f"tables of rotary_dim {self.rotary_dim}: hand in max_position=, as many positions "
                "as are used"
            )
        return self.max_position, half

    def _pieces(self, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield some rows of the tables at a time, with the number of the first."""
        step = max(1, _CHUNK // (self.rotary_dim // 2))
        for start in range(0, self.max_position, step):
            positions = np.arange(start, min(start + step, self.max_position))
            yield start, *self._cos_sin(positions[:, np.newaxis], dtype)

    def at(self, positions: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Return the tables' rows at integer `positions`: ``(..., rotary_dim / 2)`` each.

        With `sections`, `positions` has one row for each of them in front.

        Raises
        ------
        TypeError
            A dtype is none that `positions`, or cosines and sines, may have.
        ValueError
            There is no row for each of the sections; a position lies outside of the tables.
        """
        positions = np.asarray(positions)
        if positions.dtype.kind not in "iu":
            raise TypeError(f"positions have dtype {positions.dtype}; needs an integer dtype")
        wanted = dtypes.from_numpy(np.dtype(dtype), "dtype").numpy
        if self.sections and (positions.ndim == 0 or positions.shape[0] != len(self.sections)):
            raise ValueError(
                f"positions have shape {positions.shape}; "
                f"needs ({len(self.sections)}, ...), a row for each of the sections"
            )
        self._check_range(positions)
        if not self.sections:
            return self._cos_sin(positions[..., np.newaxis], wanted)
        by_frequency = positions[np.asarray(self.row_of_frequency)]
        return self._cos_sin(np.moveaxis(by_frequency, 0, -1), wanted)

    def _check_range(self, positions: np.ndarray) -> None:
        """Refuse positions outside of the tables."""
        if not positions.size:
            return
        first, last = int(positions.min()), int(positions.max())
        needed = f"needs 0 to {self.max_position - 1}"
        if last >= self.max_position:
            raise ValueError(
                f"positions hold {last}; {needed}, or a Rope with max_position={last + 1} or more"
            )
        if first < 0:
            raise ValueError(
                f"positions hold {first}; {needed}, and any of them for a token of padding"
            )

    def _cos_sin(self, positions: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        frequencies = np.asarray(self.inverse_frequency, np.float32)
        angles = (positions.astype(np.float32) * frequencies).astype(np.float64)
        scaling = np.float32(self.attention_scaling)
        with np.errstate(all="ignore"):
            cos = np.cos(angles).astype(np.float32) * scaling
            sin = np.sin(angles).astype(np.float32) * scaling
            return cos.astype(dtype), sin.astype(dtype)
