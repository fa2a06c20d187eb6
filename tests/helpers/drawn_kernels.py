"""The kernels that drawn calls may run: those of the keys, and no others."""

import functools
import math

import host
import host_build
import numpy as np
from norm_strategies import NORM_KEYS, NormKey
from qk_strategies import QK_KEYS, qk_norm

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.layout import CPU, Layout
from cupy_headnorm._cuda import compiler
from cupy_headnorm._plans import head_norm, qk_norm_rope
from cupy_headnorm._plans.head_norm import AXES
from cupy_headnorm._rules import parts
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec
from cupy_headnorm._rules.rotary import Rotation
from cupy_headnorm.headnorm import inside

KEYS = {"head_norm.cu": NORM_KEYS, "qk_norm_rope.cu": QK_KEYS}
"""They go by the file of their kernels."""


def calls_of(key):
    """Yield a call for each of a key's kernels."""
    return _norm_calls(key) if isinstance(key, NormKey) else _parts_calls(key)


def _norm_calls(key):
    alignments = [key.alignment, key.alignment, 16, 16]
    for i, of in ((2, key.weight), (3, key.bias)):
        alignments[i] = 16 if key.aligned or of is None else of.itemsize
    for axes in AXES:
        rows = (RowAxis(2, 0, 0, 0, 0),) * axes
        yield NormCall(NormSpec(*key[:7]), rows, 2**axes, 1e-6, 0.0, tuple(alignments))


def dense(shape, dtype, alignment):
    """Return the layout of a contiguous array."""
    strides = [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape))]
    return Layout(tuple(shape), tuple(strides), dtype, CPU, alignment)


def _parts_calls(key):
    case = key.case
    qk, _ = qk_norm(case, np.random.default_rng(0), (1, 1), (1e-5, 1e-5))
    norms = {name: inside(norm).part for name, norm in qk.norms.items()}
    layouts = dict.fromkeys(norms, dense((2, 1, case.head_dim), case.dtype, key.alignment))
    rotation = None
    if qk.rope is not None:
        rope = qk.rope
        if case.by_positions:
            of = dtypes.INT32 if case.by == "int32" else dtypes.INT64
            positions = dense((*(3,) * bool(rope.sections), 2), of, of.itemsize)
            tables = dense((rope.max_position, rope.rotary_dim // 2), case.of_table, 16)
        else:
            positions = None
            tables = dense((case.table_width,), case.of_table, key.table_alignments[0])
        rotation = Rotation(
            rope.style, rope.order == "before norm", rope.rotary_dim, rope.rounding == "every_op",
            rope.sections, rope.interleaved_sections, tuple(name != "v" for name in norms),
            tables, tables, positions,
        )  # fmt: skip
    call = parts.describe(norms, layouts, layouts, rotation, -2)
    call = call._replace(parameters=tuple((dtype, 16) for dtype, _ in call.parameters))
    for axes in qk_norm_rope.AXES:  # of which one is that of the groups of heads
        yield call._replace(axes=call.axes * (axes - 1))


def rows_of(call):
    """Return how many rows, or heads of all parts together, a call has."""
    if isinstance(call, NormCall):
        return call.rows
    return call.tokens * sum(part.num_heads for part in call.parts)


def macros_of(call):
    """Return the file and the macros of the kernel that runs a call."""
    if isinstance(call, NormCall):
        config = head_norm.plan(call)
        return "head_norm.cu", head_norm.macros(
            call.spec, config, head_norm.memory_of(call, config)
        )
    rope = call.spec.rope
    if rope and rope.position and not call.lookup.table_row:
        # The host makes no tables. A GPU's have row after row.
        row = rope.rotary_dim // 2 * rope.table.itemsize
        call = call._replace(lookup=call.lookup._replace(alignment=math.gcd(16, row)))
    return "qk_norm_rope.cu", qk_norm_rope.macros(call.spec, qk_norm_rope.plan(call))


def kernel_of(call):
    """Return the file and the compiler's options of the kernel that runs a call."""
    file, macros = macros_of(call)
    return file, compiler.options_of(macros)


@functools.cache
def kernels():
    """Return all that drawn calls may run."""
    found = [kernel_of(call) for keys in KEYS.values() for key in keys for call in calls_of(key)]
    return tuple(dict.fromkeys(found))


def keys_built_for_the_host(file):
    """Return the keys all of whose kernels, or ones that do their work, run on the host."""
    built = host_build.specialisations()

    def runs(call):
        try:
            return host.kernel_for(built, *macros_of(call), 900)
        except host.NotBuilt:
            return None

    return [key for key in KEYS[file] if all(map(runs, calls_of(key)))]
