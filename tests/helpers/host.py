"""
The kernels on the CPU, where CI has no GPU.

The very text that NVRTC compiles is compiled by g++ beside ``host/cuda.h``, under AddressSanitizer
and UBSan, and run by ``host/block.cpp`` with every thread of a block as a fiber. `host_build` says
which specialisations. A kernel runs in a process of its own, ``host/worker.py``, in three orders of
its threads, which must end in the same bits. It finds copies of the arrays' memory that end where
the arrays do, and bytes between their rows are forbidden too.

`device` makes the package take NumPy arrays for a GPU's: what is called inside it is checked,
planned and launched as on one.
"""

import contextlib
import ctypes
import functools
import os

import numpy as np
import pytest
from host_build import build, missing, specialisations
from host_run import ORDERS, Finding, Use, run  # noqa: F401  tests know them from here
from stand_in import forget_calls, on_cuda, take_for_gpu

from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.dtypes import DTYPES, INT32, INT64
from cupy_headnorm._cuda import compiler, launcher
from cupy_headnorm._plans import head_norm, qk_norm_rope
from cupy_headnorm._rules.norm import NormSpec

ITEMSIZE = {dtype.cuda: dtype.itemsize for dtype in (*DTYPES, INT32, INT64)}


class NotBuilt(LookupError):
    """No specialisation that is compiled runs a call."""


def require():
    """Skip a test where kernels cannot be compiled for the CPU; `make test` makes that an error."""
    if missing():
        if os.environ.get("HEADNORM_REQUIRE_HOST"):
            raise RuntimeError(missing())
        pytest.skip(missing())


@functools.cache
def library():
    """Return all specialisations, compiled."""
    return build(specialisations())


# From a launch to the memory that its kernel may touch, by the offset of each address in its
# parameters: NumPy's arithmetic beside the kernel's own.
def _offsets(numbers, axes, strides):
    """Return bytes to entries of a grid, whose innermost axis comes first."""
    offsets = np.zeros(numbers.shape, np.int64)
    for axis, stride in zip(axes[:-1], strides[:-1], strict=True):
        numbers, index = np.divmod(numbers, axis.size)
        offsets += index * stride
    return offsets + numbers * strides[-1]


def _row_offsets(rows, axes, name):
    """See ``headnorm/rows.cuh``: steps are multiplied by whole quotients."""
    offsets, size = np.zeros(rows.shape, np.int64), 1
    for axis in axes:
        offsets += rows // size * getattr(axis, name)
        size *= axis.size
    return offsets


def _norm_uses(macros, params, blocks):
    each = int(macros["HN_ROWS"])
    rows = np.add.outer(np.array(blocks) * each, np.arange(each))
    rows = rows[rows < params.rows]
    uses = {}
    for i, name in enumerate(("x", "out", "weight", "bias")):
        width = ITEMSIZE.get(macros["HN_X" if i < 2 else f"HN_{name.upper()}"], 0)
        if width:
            starts = np.unique(getattr(params, name) + _row_offsets(rows, params.axis, name))
            uses[8 * i] = Use(starts, width * int(macros["HN_HEAD_DIM"]), name == "out")
    return uses


def _parts_uses(macros, params, blocks):
    axes = params.axis[1:]  # the first one is that of the groups
    groups = np.add.outer(
        np.array(blocks, np.int64) * params.groups_per_block, np.arange(params.groups_per_block)
    )
    tokens, among = np.divmod(groups[groups < params.groups], params.axis[0].size)
    head_dim = int(macros["HN_HEAD_DIM"])
    uses = {}

    def use(at, starts, width, written=False):
        uses[at] = Use(np.unique(starts), width, written)

    of, before = type(params), 0
    for i, (part, num_heads) in enumerate(zip(params.part, params.num_heads, strict=True)):
        heads = np.add.outer(
            (among - before) * params.heads_per_group, np.arange(params.heads_per_group)
        )
        before = params.groups_end[i]
        group, _ = there = np.nonzero((heads >= 0) & (heads < num_heads))
        for j, name in enumerate(("x", "out", "weight", "bias")):
            address = getattr(part, name)
            if not address or not group.size:
                continue
            starts = address + heads[there] * getattr(part, f"head_{name}")
            if j < 2:
                strides = [getattr(axis, name)[i] for axis in axes]
                starts += _offsets(tokens[group], axes, strides)
            width = ITEMSIZE[macros["HN_X" if j < 2 else f"HN_{name.upper()}"]]
            at = of.part.offset + i * ctypes.sizeof(part) + getattr(type(part), name).offset
            use(at, starts, width * head_dim, name == "out")
    if macros["HN_ROPE"] == "none":
        return uses
    rows = _offsets(tokens, axes, [axis.table for axis in axes])
    if params.positions:
        rows = np.arange(params.max_position) * params.table_row
        at = _offsets(tokens, axes, [axis.position for axis in axes])
        sections = np.arange(macros["HN_SECTION_SIZES"].count(",") + 1) * params.position_row
        width = ITEMSIZE[macros["HN_POSITION"]]
        use(of.positions.offset, params.positions + np.add.outer(sections, at), width)
    entries = int(macros["HN_ROTARY_DIM"]) // (1 if macros["HN_WHOLE_ROWS"] == "true" else 2)
    for name in ("cosines", "sines"):
        starts = getattr(params, name) + rows
        use(getattr(of, name).offset, starts, ITEMSIZE[macros["HN_TABLE"]] * entries)
    return uses


# From the package to a launch.
LOOSE = {
    "HN_NAME", "HN_BLOCKS", "HN_ACCESS", "HN_PARAMETER_ACCESS", "HN_TABLE_ACCESS", "HN_AXES",
    "HN_INDEX",
}  # fmt: skip
"""A kernel may differ in these macros and still do: it moves less at once, or has axes to spare."""


def kernel_for(kernels, source, macros, architecture):
    """Return the specialisation that does what `macros` ask for, itself or the next best one."""

    def accesses(of):
        return [int(of.get(f"HN_{name}ACCESS", 1)) for name in ("", "PARAMETER_", "TABLE_")]

    found = []
    for kernel in kernels:
        of = dict(kernel.macros)
        same = all(of.get(name) == value for name, value in macros.items() if name not in LOOSE)
        if not same or (kernel.source, kernel.architecture) != (source, architecture):
            continue
        moves = all(a <= b for a, b in zip(accesses(of), accesses(macros), strict=True))
        axes = int(of["HN_AXES"])
        counts = of.get("HN_INDEX") != "int" or macros["HN_INDEX"] == "int"
        if moves and counts and axes >= int(macros["HN_AXES"]):
            found.append((accesses(of), -axes, kernel))
    if not found:
        raise NotBuilt(f"{macros['HN_NAME']} is not among the kernels compiled for the host")
    return max(found, key=lambda item: item[:2])[-1]


class _HostAsCuda(type(find.library_of(np.empty(0), "x"))):
    """NumPy's adapter, for which host memory is that of a GPU, and calls are remembered."""

    allocates_in_graphs = True
    plain = (np.ndarray,)

    def glance(self, x):
        address = x.ctypes.data
        return address, (0, x.shape, x.strides, x.dtype, (address % 16, x.flags.writeable))

    def view(self, x, role, *rows):
        return on_cuda(super().view(x, role, *rows))

    def empty_like(self, view):
        result, _ = super().empty_like(view)
        ctypes.memset(result.ctypes.data, 0xFF, result.nbytes)  # NaN, where nothing is written
        return result, lambda x: self.empty_like(self.view(x, "x"))[0]

    def stream(self, index):
        return 0


class _Device:
    """What launches on a GPU, on the host."""

    def __init__(self, built, orders, architecture, blocks):
        self.built, self.orders, self.blocks = built, orders, blocks
        self.find = functools.partial(kernel_for, built.symbols, architecture=architecture)

    def prepare(self, call, index, stream, config=None):
        if config is None:
            config = head_norm.plan(call)
        else:
            head_norm.check_config(config, call.spec, compiler.DeviceLimits())
            head_norm.check_call(call, config)
        memory = head_norm.memory_of(call, config)
        found = self.find("head_norm.cu", head_norm.macros(call.spec, config, memory))
        of = dict(found.macros)
        memory = memory._replace(axes=int(of["HN_AXES"]), narrow=of["HN_INDEX"] == "int")
        return head_norm.launch_of(call, config, memory, index)._replace(function=found)

    def prepare_parts(self, call, index, stream, config=None):
        config = qk_norm_rope.plan(call) if config is None else config
        found = self.find("qk_norm_rope.cu", qk_norm_rope.macros(call.spec, config))
        config = config._replace(axes=int(dict(found.macros)["HN_AXES"]))
        return qk_norm_rope.launch_of(call, config, index)._replace(function=found)

    def packed(self, launch):
        memory = bytearray(16)
        memory += launch.params
        params = type(launch.params).from_buffer(memory, 16)
        uses = _norm_uses if isinstance(launch.spec, NormSpec) else _parts_uses

        def start(function, count, *_):
            blocks = range(count) if self.blocks is None else self.blocks
            found = uses(dict(function.macros), params, blocks)
            run(self.built, function, params, found, blocks, launch.threads, self.orders)

        return memory, start, True


@contextlib.contextmanager
def device(built=None, *, orders=ORDERS, architecture=900, blocks=None):
    """
    Take NumPy arrays for those of a GPU, on which the kernels of `built` run.

    `blocks` are those to run, where a launch has more than a CPU can. NotBuilt is raised by calls
    that no kernel runs, and Finding by those that go wrong.
    """
    gpu = _Device(built or library(), orders, architecture, blocks)
    with pytest.MonkeyPatch.context() as patch:
        take_for_gpu(patch, _HostAsCuda(), np.ndarray)
        patch.setattr(compiler, "limits", lambda index: compiler.DeviceLimits())
        patch.setattr(head_norm, "prepare", gpu.prepare)
        patch.setattr(launcher, "packed", gpu.packed)
        patch.setattr(qk_norm_rope, "prepare", gpu.prepare_parts)
        forget_calls(patch)
        yield


@contextlib.contextmanager
def interrupted(handler):
    """
    Run `handler` between packing and starting of the next launch, as Python runs a signal's.

    It goes inside of `device`, whose own functions must be back when that ends.
    """
    packed, left = launcher.packed, [handler]

    def packing(launch):
        memory, start, only_device = packed(launch)

        def start_later(*of_launch):
            if left:
                left.pop()()
            start(*of_launch)

        return memory, start_later, only_device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "packed", packing)
        yield


def planted(specialisation, *changes):
    """Compile a specialisation whose text has other pieces: (old, new), each there just once."""

    def changed(text):
        for old, new in changes:
            if text.count(old) != 1:
                raise LookupError(f"{text.count(old)} times in {specialisation.source}: {old!r}")
            text = text.replace(old, new)
        return text

    return build([specialisation], changed)
