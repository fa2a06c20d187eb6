"""
A row's bits depend on its values, and on nothing around it.

Every row is computed alone. Then rows are computed together a hundred times: in other numbers,
arrangements, strides and alignments, in place and not, and each at another place every time. All
must have the bits of the row alone.
"""

import math

import host
import numpy as np
import pytest
from cases import Layout
from libraries import CuPyLibrary, NumPyLibrary, TorchLibrary
from strategies import KINDS, parameter, values

from cupy_headnorm import HeadNorm, QKNorm, Rope
from cupy_headnorm._arrays.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

RUNS = 100
SOME = 18
"""There are so many runs where each takes long: two of each of `SHIFTS`."""
ROWS = 40
"""A run gives them to its places in turn, and begins with another one."""
SHIFTS = 9
"""Elements that the first row is moved by: 0 to 8."""
ON_GPU = [
    pytest.param(CuPyLibrary(), id="cupy"),
    pytest.param(TorchLibrary("cuda"), id="torch-cuda"),
]
POSITIONS = np.array([0, 1, 7, 300, 4095])


def bits(array):
    """Return an array's bits; all NaN are one."""
    array = np.ascontiguousarray(array)
    found = array.view(f"u{array.itemsize}").copy()
    found[np.isnan(array)] = np.iinfo(found.dtype).max
    return found


def same_bits(found, expected, run):
    off = bits(found) != bits(expected)
    assert not off.any(), f"{np.count_nonzero(off)} of {off.size} values differ in run {run}"


def arrangement(run, rows, head_dim, negative_strides):
    """Return a layout of about `rows` rows for one run."""
    apart = (head_dim, head_dim + 3, 2 * head_dim, head_dim + 8)[run // SHIFTS % 4]
    shape = (
        (rows,),
        (-(-rows // 3), 3),
        (2, -(-rows // 4), 2),
        (2, 2, 3, -(-rows // 12)),
    )[run % 4]
    strides, step = [], apart
    for n in reversed(shape):
        strides.insert(0, step)
        step *= n
        step += apart * (len(shape) > 2)  # so that no axes merge
    if run % 7 == 1 and len(shape) == 2:
        strides[0], strides[1] = apart, apart * shape[0]
    offset = run % SHIFTS
    if run % 5 == 2 and negative_strides:
        offset += (shape[0] - 1) * strides[0]
        strides[0] = -strides[0]
    return Layout(f"run {run}", (*shape, head_dim), (*strides, 1), offset)


def filled(library, layout, found):
    """Return rows laid out in a buffer of a library."""
    reach = sum((n - 1) * abs(s) for n, s in zip(layout.shape, layout.strides, strict=True))
    buffer = np.zeros(reach + SHIFTS + 1, found.dtype)
    NumPyLibrary().lay(buffer, layout)[...] = found
    return library.lay(library.array(buffer), layout)


def written(run, library, call, x):
    """Call with a new result, in place, and into memory laid out and aligned otherwise."""
    if run % 3 == 0:
        return call(x)
    if run % 3 == 1:
        return call(x, out=x)
    shape = tuple(x.shape)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    host = library.host(x)
    layout = Layout("out", shape, strides, run // 3 % SHIFTS)
    return call(x, out=filled(library, layout, np.zeros(shape, host.dtype)))


def norm_depends_on_values_alone(library, norm, dtype, head_dim, rng, runs, sizes):
    rows = values(rng, KINDS, (ROWS, head_dim), dtype.numpy)
    alone = np.stack([library.host(norm(library.array(row))) for row in rows])
    for run in range(runs):
        layout = arrangement(run, sizes[run % len(sizes)], head_dim, library.negative_strides)
        places = np.arange(math.prod(layout.shape[:-1])).reshape(layout.shape[:-1])
        which = (places + run) % ROWS
        y = written(run, library, norm, filled(library, layout, rows[which]))
        same_bits(library.host(y), alone[which], run)


# A group of lanes, odd rows, a block a row, tiles of a row.
NORMS = {
    "bfloat16-128": (BFLOAT16, BFLOAT16, None, 128, {}),
    "float16-37-layer": (FLOAT16, FLOAT32, FLOAT32, 37, {"kind": "layer"}),
    "float16-80-layer": (
        FLOAT16, FLOAT16, FLOAT16, 80, {"kind": "layer", "rounding": "before_weight"},
    ),
    "float32-100-layer": (FLOAT32, FLOAT32, FLOAT32, 100, {"kind": "layer"}),
    "float64-64": (
        FLOAT64, FLOAT64, FLOAT32, 64, {"rounding": "before_weight", "weight_offset": 1.0},
    ),
    "float16-2048": (FLOAT16, FLOAT16, None, 2048, {}),
    "bfloat16-20000-layer": (BFLOAT16, BFLOAT16, BFLOAT16, 20000, {"kind": "layer"}),
}  # fmt: skip


def made(rng, name):
    dtype, of_weight, of_bias, head_dim, options = NORMS[name]
    weight = parameter(rng, "near one", head_dim, of_weight.numpy)
    bias = of_bias and parameter(rng, "wide", head_dim, of_bias.numpy)
    return HeadNorm(weight, bias, **options), dtype, head_dim


@pytest.mark.parametrize("name", NORMS)
def test_a_row_alone_and_in_any_batch(library, name, rng, one_thread):
    norm, dtype, head_dim = made(rng, name)
    # Every number of rows; with long rows, few of them.
    sizes = range(1, RUNS + 1) if head_dim < 1000 else range(1, 9)
    norm_depends_on_values_alone(library, norm, dtype, head_dim, rng, RUNS, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ON_GPU)
@pytest.mark.parametrize("name", NORMS)
def test_a_row_among_many(library, name, rng):
    """There are so many that all multiprocessors are busy."""
    norm, dtype, head_dim = made(rng, name)
    rows = max(300, 2**20 // head_dim)
    norm_depends_on_values_alone(library, norm, dtype, head_dim, rng, SOME, (rows,))


# QKNorm. A head's bits depend on its values and its token's position, or cosines and sines.
HALF = {"style": "half"}
QKS = {
    "bfloat16-128": (BFLOAT16, 128, "positions", HALF, {"rounding": "before_weight"}),
    "bfloat16-128-given": (BFLOAT16, 128, "given", HALF, {"rounding": "before_weight"}),
    "bfloat16-128-unrotated": (BFLOAT16, 128, None, None, {}),
    "float16-80-first": (FLOAT16, 80, "positions", HALF | {"order": "before norm"}, {}),
    "float16-2048": (
        FLOAT16, 2048, "int32", HALF | {"rotary_dim": 512}, {"rounding": "before_weight"},
    ),
    "float32-64-layer": (FLOAT32, 64, "positions", {"style": "interleaved"}, {"kind": "layer"}),
    "float64-36-given": (FLOAT64, 36, "given", {"style": "interleaved"}, {}),
}  # fmt: skip


def qk_made(rng, name):
    dtype, head_dim, way, rope, options = QKS[name]
    norms = [HeadNorm(parameter(rng, "near one", head_dim, dtype.numpy), **options) for _ in "qk"]
    if rope is not None:
        rope = Rope.of_theta(1e4, max_position=4096, **({"rotary_dim": head_dim} | rope))
    tables = rng.uniform(-1, 1, (2, POSITIONS.size, head_dim)).astype(dtype.numpy)

    def rotation(library, which):
        """Return what rotates tokens by the positions of these numbers."""
        if way in ("positions", "int32"):
            found = POSITIONS[which].astype("int32" if way == "int32" else "int64")
            return {"positions": library.array(found)}
        if way == "given":
            return {n: library.array(t[which]) for n, t in zip(("cos", "sin"), tables, strict=True)}
        return {}

    return QKNorm(*norms, rope=rope), dtype, head_dim, rotation


def heads_alone(library, qk, rows, rotation):
    """Return q and k of every row at every position, each computed alone."""
    shape = (2, len(rows), POSITIONS.size, rows.shape[-1])
    alone = np.empty(shape, rows.dtype)
    for i, row in enumerate(rows):
        for j in range(POSITIONS.size):
            one = [library.array(row[np.newaxis, np.newaxis]) for _ in "qk"]
            for part, y in enumerate(qk(*one, **rotation(library, np.array([j])))):
                alone[part, i, j] = library.host(y)
    return alone


def qk_layouts(run, tokens, heads, head_dim):
    """Return layouts of q and k in one buffer: packed, apart, with heads first, misaligned."""
    (h, k), offset = heads, run % SHIFTS
    apart = (head_dim, head_dim + 3, head_dim + 8)[run // SHIFTS % 3]
    strides, at = (
        ((apart * (h + 2 * k), apart), apart * h),  # slices of a packed buffer
        ((apart, apart * tokens), apart * tokens * h),  # each head's tokens together
        ((apart * h, apart), apart * h * tokens),  # arrays of their own
    )[run % 3]
    of_k = (apart * k, apart) if run % 3 == 2 else strides
    return [
        Layout("q", (tokens, h, head_dim), (*strides, 1), offset),
        Layout("k", (tokens, k, head_dim), (*of_k, 1), offset + at),
    ]


def qk_depends_on_values_alone(library, qk, dtype, head_dim, rotation, rng, runs, sizes, heads):
    # Each row is computed at each position, so of long ones there are few.
    rows = values(rng, KINDS, (20 if head_dim < 1000 else 8, head_dim), dtype.numpy)
    alone = heads_alone(library, qk, rows, rotation)
    for run in range(runs):
        tokens, counts = sizes[run % len(sizes)], heads[run % len(heads)]
        layouts = qk_layouts(run, tokens, counts, head_dim)
        size = max(at.elements for at in layouts) + SHIFTS
        buffer = np.zeros(size, dtype.numpy)
        position = (np.arange(tokens) + run) % POSITIONS.size
        which = []
        for part, at in enumerate(layouts):
            places = np.arange(math.prod(at.shape[:2])).reshape(at.shape[:2])
            which.append((places + run + 3 * part) % len(rows))
            NumPyLibrary().lay(buffer, at)[...] = rows[which[-1]]
        flat = library.array(buffer)
        parts = tuple(library.lay(flat, at) for at in layouts)
        out = parts if run % 2 else None
        found = qk(*parts, **rotation(library, position), out=out)
        for part, y in enumerate(found):
            expected = alone[part][which[part], position[:, np.newaxis]]
            same_bits(library.host(y), expected, run)


HEADS = ((1, 1), (3, 1), (8, 2), (2, 5), (33, 4))


@pytest.mark.parametrize("name", QKS)
def test_a_head_alone_and_in_any_batch(library, name, rng, one_thread):
    qk, dtype, head_dim, rotation = qk_made(rng, name)
    sizes = range(1, 14) if head_dim < 1000 else range(1, 4)
    qk_depends_on_values_alone(library, qk, dtype, head_dim, rotation, rng, RUNS, sizes, HEADS)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ON_GPU)
@pytest.mark.parametrize("name", [name for name in QKS if "2048" not in name])
def test_a_head_among_many(library, name, rng):
    """There are so many that a group of lanes does several heads."""
    qk, dtype, head_dim, rotation = qk_made(rng, name)
    qk_depends_on_values_alone(library, qk, dtype, head_dim, rotation, rng, 4, (4096,), ((40, 16),))


# The kernels themselves, on the host, where a run is three: in three orders of the threads.
@pytest.mark.parametrize("name", ["bfloat16-128", "float16-80-layer", "float16-2048", "float64-64"])
def test_a_row_in_any_batch_of_the_kernel(name, compiler, rng):
    norm, dtype, head_dim = made(rng, name)
    sizes = range(1, SOME + 1) if head_dim < 1000 else (1, 3)
    with host.device():
        norm_depends_on_values_alone(NumPyLibrary(), norm, dtype, head_dim, rng, SOME, sizes)


@pytest.mark.parametrize("name", ["bfloat16-128", "float16-2048"])
def test_a_head_in_any_batch_of_the_kernel(name, compiler, rng):
    qk, dtype, head_dim, rotation = qk_made(rng, name)
    with host.device():
        qk_depends_on_values_alone(
            NumPyLibrary(), qk, dtype, head_dim, rotation, rng, SOME, (1, 2), HEADS[:3]
        )
