"""
The DLPack structures, read from capsules with ctypes alone.

Layouts are those of dlpack.h 1.3, https://github.com/dmlc/dlpack.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
DEVICE_NAMES = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 11: "ROCm host", 14: "oneAPI"}

_READ_ONLY = 1
_MAJOR = 1


class DLDevice(ctypes.Structure):
    """``DLDevice``."""

    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class DLTensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("version", _Version),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


class Tensor(NamedTuple):
    """A DLTensor in Python's words."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    dtype: tuple[int, int, int]
    """DLPack's code, bits and lanes."""
    device: tuple[int, int]
    """DLPack's device type and index."""
    read_only: bool


def _read(raw: DLTensor, read_only: bool) -> Tensor:
    shape = tuple(raw.shape[: raw.ndim]) if raw.ndim else ()
    if raw.strides:
        strides = tuple(raw.strides[: raw.ndim])
    else:
        strides, step = (), 1
        for n in reversed(shape):
            strides, step = (step, *strides), step * n
    return Tensor(
        (raw.data or 0) + raw.byte_offset,
        shape,
        strides,
        (raw.code, raw.bits, raw.lanes),
        (raw.device.type, raw.device.index),
        read_only,
    )


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)


def read_capsule(capsule: Any, of: str = "the array") -> Tensor:
    """Describe an unconsumed capsule; the memory lives as long as the caller holds it."""
    try:
        name = _name_of(capsule)
    except ValueError:  # Python's own, on what is no capsule
        raise TypeError(
            f"__dlpack__ of {of} returned a {type(capsule).__name__}; needs a DLPack capsule"
        ) from None
    address = _pointer_of(capsule, name)
    if name == b"dltensor_versioned":
        versioned = _Versioned.from_address(address)
        if versioned.version.major != _MAJOR:
            raise TypeError(f"DLPack capsule of version {versioned.version.major}; needs {_MAJOR}")
        return _read(versioned.tensor, bool(versioned.flags & _READ_ONLY))
    if name == b"dltensor":
        # DLManagedTensor begins with its DLTensor, and has no read-only flag.
        return _read(DLTensor.from_address(address), read_only=False)
    raise TypeError(f"capsule named {name!r}; needs an unconsumed DLPack capsule")
