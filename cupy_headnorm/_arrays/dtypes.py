"""The one table of element types: every other module asks it, none keeps its own list."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np


class DType(NamedTuple):
    """One element type and its name in every world the library talks to."""

    name: str
    """NumPy's and torch's name."""
    short: str
    """Part of a kernel's name: ``f16``."""
    numpy: np.dtype
    dlpack_code: int
    """``DLDataTypeCode`` of dlpack.h: 0 is int, 2 is float, 4 is bfloat."""
    safetensors: str
    cuda: str
    """Spelling in the kernels."""
    eps: float
    """Distance from 1 to the next value: 2 to the minus number of stored mantissa bits."""

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.numpy.itemsize

    @property
    def accumulate(self) -> DType:
        """The type all arithmetic is done in: float64 for float64, float32 for the others."""
        return self if self.name == "float64" else FLOAT32

    def __repr__(self) -> str:
        return self.name


FLOAT16 = DType("float16", "f16", np.dtype(np.float16), 2, "F16", "__half", 2.0**-10)
BFLOAT16 = DType(
    "bfloat16", "bf16", np.dtype(ml_dtypes.bfloat16), 4, "BF16", "__nv_bfloat16", 2.0**-7
)
FLOAT32 = DType("float32", "f32", np.dtype(np.float32), 2, "F32", "float", 2.0**-23)
FLOAT64 = DType("float64", "f64", np.dtype(np.float64), 2, "F64", "double", 2.0**-52)

INT32 = DType("int32", "i32", np.dtype(np.int32), 0, "I32", "int", 1.0)
INT64 = DType("int64", "i64", np.dtype(np.int64), 0, "I64", "long long", 1.0)

DTYPES = (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)


class Allowed(NamedTuple):
    """Some dtypes of the table, found by the names that libraries have for them."""

    needed: str
    """For messages."""
    by_numpy: dict[np.dtype, DType]
    by_dlpack: dict[tuple[int, int, int], DType]
    by_name: dict[str, DType]


def _allowed(dtypes: tuple[DType, ...], needed: str) -> Allowed:
    return Allowed(
        needed,
        {dtype.numpy: dtype for dtype in dtypes},
        {(dtype.dlpack_code, 8 * dtype.itemsize, 1): dtype for dtype in dtypes},
        {dtype.name: dtype for dtype in dtypes},
    )


NEEDED = "float16, bfloat16, float32 or float64"
NUMBERS = _allowed(DTYPES, NEEDED)
"""Of arrays that are normalized, and all beside them but positions."""
POSITIONS = _allowed((INT32, INT64), "int32 or int64")

BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}


def promoted(a: DType, b: DType) -> DType:
    """Return the dtype of a product, as torch has it: float32 for float16 times bfloat16."""
    if a.itemsize == b.itemsize:
        return a if a is b else FLOAT32
    return max(a, b, key=lambda dtype: dtype.itemsize)


def from_numpy(dtype: np.dtype, role: str, allowed: Allowed = NUMBERS) -> DType:
    """Return the table's row for a NumPy (or CuPy) dtype; TypeError names `role`."""
    found = allowed.by_numpy.get(dtype)
    # A byte-swapped float32 compares unequal to np.float32 and is refused here by name.
    if found is None:
        raise TypeError(f"{role} has dtype {dtype}; needs {allowed.needed} in native byte order")
    return found


def from_dlpack(code: int, bits: int, lanes: int, role: str, allowed: Allowed = NUMBERS) -> DType:
    """Return the table's row for a DLPack type triple; TypeError names `role`."""
    found = allowed.by_dlpack.get((code, bits, lanes))
    if found is None:
        raise TypeError(
            f"{role} has DLPack dtype (code {code}, {bits} bits, {lanes} lanes); "
            f"needs {allowed.needed}"
        )
    return found


def from_name(name: str, role: str, allowed: Allowed = NUMBERS) -> DType:
    """Return the table's row for ``"float16"`` and the like; TypeError names `role`."""
    found = allowed.by_name.get(name)
    if found is None:
        raise TypeError(f"{role} has dtype {name}; needs {allowed.needed}")
    return found
