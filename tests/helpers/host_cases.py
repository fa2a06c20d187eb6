"""What kernels on the CPU are run on: rows of a few sizes in any layout, and rows far apart."""

import contextlib
import math
import mmap

import host
import host_build
import numpy as np
from host_build import ANY, NORMS, WHOLE
from oracle import norm as oracle
from tolerances import assert_close

import cupy_headnorm

HEADS = 3


def alone(kernel):
    """Return the library as if it held one specialisation."""
    found, everything = kernel.specialisation(), host.library()
    return host_build.Library(everything.path, {found: everything.symbols[found]})


@contextlib.contextmanager
def running(kernel, **options):
    """Let calls run on one kernel, or raise NotBuilt."""
    with host.device(alone(kernel), architecture=getattr(kernel, "architecture", 900), **options):
        yield


# One array of heads.
def rows(rng, shape, dtype):
    """Return rows of a few sizes, one of zeros and one near a mean."""
    large = 1e4 if dtype.name == "float16" else 1e17
    values = rng.standard_normal(shape)
    scale = np.resize([1, large, 0, 1e-3, 1], shape[:-1])[..., np.newaxis]
    mean = np.resize([0, 0, 0, 0, 100, 0, 0], shape[:-1])[..., np.newaxis]
    return (values * scale + mean).astype(dtype.numpy)


LAYOUTS = {
    # name: the fewest axes of a kernel that runs it, shape, strides in rows, first row.
    "contiguous": (1, (5, HEADS), (HEADS, 1), 0),
    "one row": (1, (1, 1), (1, 1), 0),
    "every other row": (1, (7, 1), (2, 1), 1),
    "rows backwards": (1, (9, 1), (-1, 1), 8),
    "one row seven times": (1, (7, 1), (0, 1), 0),
    "slice": (3, (4, HEADS), (7, 1), 2),
    "heads backwards": (3, (4, HEADS), (7, -1), 6),
    "heads first": (3, (HEADS, 5), (1, HEADS), 0),
    "four axes": (8, (2, 3, 2, HEADS), (40, 12, 4, -1), 5),
}


def laid(norm, name, values):
    """Return an array that lies as a layout says, filled with the values of its rows."""
    _, shape, strides, first = LAYOUTS[name]
    dtype, head_dim = norm.spec.x.numpy, norm.spec.head_dim
    aligned = {WHOLE: 16, ANY: dtype.itemsize}.get(norm.how, norm.how)
    pitch = -(-head_dim * dtype.itemsize // aligned) * aligned
    pitch += aligned if norm.how == ANY or name != "contiguous" else 0
    low = sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + first
    high = sum(max(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + first
    assert low >= 0
    memory = np.full((high + 1) * pitch + 64, 0xA5, np.uint8)
    # As far off a boundary of 16 bytes as the kernel allows.
    at = -memory.ctypes.data % 16 + aligned % 16 + first * pitch
    strides = [s * pitch for s in strides] + [dtype.itemsize]
    array = np.ndarray((*shape, head_dim), dtype, memory, at, strides)
    array[...] = values
    return array


def parameters(norm, rng, shape):
    """Return weight and bias, of each head where a kernel has an axis for heads."""
    found = []
    for dtype in (norm.spec.weight, norm.spec.bias):
        size = shape[-2:] if norm.axes > 1 else shape[-1:]
        found.append(None if dtype is None else (rng.standard_normal(size) + 1).astype(dtype.numpy))
    return found


def options(norm):
    """Return the arguments of a call that a row of `NORMS` runs."""
    offset = 1.0 if norm.spec.offset else 0.0
    return {"eps": 1e-5, "rounding": norm.spec.rounding, "weight_offset": offset}


def kernel_of(spec, how, *, wide=False):
    """Return the row of `NORMS` with the geometry that the package chooses."""
    wanted = (spec, how, None, wide)
    return next(n for n in NORMS if (n.spec, n.how, n.config, n.wide) == wanted)


# Rows far apart. Of a reservation only the pages of rows are there, so that a wrong address faults.
def reserved(size):
    unreserved = 0x4000  # MAP_NORESERVE, which mmap knows from Python 3.12 on
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)


FAR = 3 * 2**30
"""Rows lie so many bytes apart. Four of them take 12 GiB of addresses, and four pages."""


def far_apart(memory, norm, step):
    """Return four rows, from the low end or from the high one."""
    dtype, head_dim = norm.spec.x.numpy, norm.spec.head_dim
    at = 0 if step > 0 else -3 * step
    return np.ndarray((4, head_dim), dtype, memory, at, (step, dtype.itemsize))


def far_copy(values, step):
    """Return a copy whose rows all lie so far apart, upwards or downwards."""
    *outer, _ = values.shape
    strides = [step * math.prod(outer[i + 1 :]) for i in range(len(outer))]
    reach = (math.prod(outer) - 1) * abs(step)
    memory, at = reserved(reach + 2**16), 0 if step > 0 else reach
    array = np.ndarray(values.shape, values.dtype, memory, at, (*strides, values.itemsize))
    array[...] = values
    return array


MANY = 2**31 + 200
"""31 bits do not count so many rows."""


def last_rows(using, rng):
    """Normalize more rows than 31 bits count, of which the last block runs."""
    norm = kernel_of(host_build.ONE_ELEMENT, ANY)
    x = np.ndarray((MANY, 1), np.float16, reserved(2 * MANY))
    x[-100:] = rng.standard_normal((100, 1))
    weight, bias = np.array([3.0]), np.array([0.5], np.float16)
    before = x[-100:].copy()
    rows_per_block = norm.launched().rows_per_block
    last = (MANY - 1) // rows_per_block
    exact, slack, _ = oracle("rms", before, weight, bias, eps=1e-6)
    with host.device(using, blocks=[last]):
        cupy_headnorm.rms_norm(x, weight, bias, out=x)
    done = MANY - last * rows_per_block
    assert_close(x[-done:], exact[-done:], slack[-done:], "float16")
    assert x[-100:-done].tobytes() == before[:-done].tobytes()
