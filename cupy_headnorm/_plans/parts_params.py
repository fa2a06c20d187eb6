"""``headnorm::PartsParams`` of headnorm/parts.cuh in ctypes, and where its addresses lie."""

from __future__ import annotations

import ctypes
import functools

from cupy_headnorm._plans.specialisation import ARRAYS, Real, Struct, fields
from cupy_headnorm._rules.axes import PARTS

PART_WORDS = tuple(range(8 * part, 8 * part + 4) for part in range(PARTS))
"""
These are places of a part's x, out, weight and bias among a launch's words; strides follow.

The first word is ``headnorm::PartsParams::part``.
"""
COS, SIN, POSITIONS = range(8 * PARTS, 8 * PARTS + 3)


class _Part(ctypes.Structure):
    """``headnorm::Part``."""

    _fields_ = [
        *fields(ctypes.c_uint64, *ARRAYS),
        *fields(ctypes.c_int64, *(f"head_{name}" for name in ARRAYS)),
    ]


class _Axis(ctypes.Structure):
    """``headnorm::TokenAxis``."""

    _fields_ = [
        *fields(ctypes.c_int64, "size"),
        *fields(ctypes.c_uint32, "multiplier", "shift"),
        *fields(ctypes.c_int64 * PARTS, "x", "out"),
        *fields(ctypes.c_int64, "position", "table"),
    ]


@functools.cache
def params_type(real: Real, axes: int) -> Struct:
    """Return the type of the parameter of a kernel that adds in `real`."""

    class Scalars(ctypes.Structure):
        _fields_ = [
            *fields(ctypes.c_int64, "groups"),
            *fields(ctypes.c_int32, "heads_per_group", "groups_per_block"),
            *fields(ctypes.c_int32 * PARTS, "groups_end", "num_heads", "rotated"),
            *fields(real * PARTS, "eps", "weight_offset"),
        ]

    class Params(Scalars):
        """``headnorm::PartsParams``."""

        _fields_ = [
            ("unused", ctypes.c_uint8 * (-ctypes.sizeof(Scalars) % 16)),  # Part is alignas(16)
            ("part", _Part * PARTS),
            *fields(ctypes.c_uint64, "cosines", "sines", "positions"),
            *fields(ctypes.c_int64, "position_row", "table_row", "max_position"),
            ("axis", _Axis * axes),
        ]

    return Params
