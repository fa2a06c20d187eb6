"""
Host memory that stands in for a GPU's, and the reference for its kernel.

host.py runs the kernels themselves on NumPy's arrays, test_dispatch.py and test_qk_calls.py the
reference on torch's.
"""

import collections
import functools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from cupy_headnorm import reference
from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.layout import Device, as_numpy
from cupy_headnorm._arrays.views import Plain
from cupy_headnorm._calls import dispatch, host, remembered, uploads
from cupy_headnorm._cuda import environment, launcher, memory
from cupy_headnorm._plans import head_norm
from cupy_headnorm._rules.norm import NormCall

CUDA = Device("cuda", 0)
STREAM = 7
"""Of every call on torch's arrays."""


def on_cuda(view):
    """Return an ArrayView as that of an array of a GPU."""
    return view._replace(layout=view.layout._replace(device=CUDA))


def assembled(shape, dtype, pieces, _):
    """Do what `uploads.upload_pieces` does."""
    whole = np.empty((2, *shape), dtype)
    for start, *piece in pieces:
        whole[:, start : start + len(piece[0])] = piece
    return tuple(on_cuda(find.view(array, "parameter")) for array in whole)


def take_for_gpu(patch, adapter, *kinds):
    """Let `adapter` serve arrays of some types, and nothing ask CuPy for anything."""
    for kind in kinds:
        patch.setitem(find.quick, kind, adapter)
        patch.setitem(find._found, kind, adapter)
    patch.setattr(environment, "import_cupy", lambda: None)
    patch.setattr(
        uploads, "upload", lambda array, _: on_cuda(find.view(np.array(array), "parameter"))
    )
    patch.setattr(uploads, "upload_pieces", assembled)
    patch.setattr(memory, "synchronize", lambda index: None)
    patch.setattr(memory, "refuse_capture", lambda *_: None)


def forget_calls(patch):
    """Let nobody know a call, here and for as long as the patch lasts."""
    patch.setattr(remembered.thread, "calls", {})
    patch.setattr(remembered.thread, "lengths", {})
    patch.setattr(dispatch, "plans", {})


def list_steps(patch, of_given):
    """Return a list that fills with what `of_given` makes of each call that goes step by step."""
    seen = []
    step_by_step = dispatch.step_by_step

    def listing(operation, given, **options):
        seen.append(of_given(given))
        return step_by_step(operation, given, **options)

    patch.setattr(dispatch, "step_by_step", listing)
    return seen


def take_for_runner(patch):
    """Let launches that stand in for a kernel's run themselves."""

    def runners(_, sources):
        def run_of(launch):
            def run(stream, addresses):
                assert stream == STREAM
                launch.run(collections.defaultdict(int, {w: addresses[i] for w, i in sources}))

            return run

        return run_of

    patch.setattr(launcher, "runners", runners)


def torch_adapter():
    """Return torch's adapter, for which host memory is that of a GPU, whose stream is `STREAM`."""
    import torch

    class HostAsCuda(type(find.library_of(torch.empty(0), "x"))):
        def __init__(self):
            super().__init__(torch)
            self.stream = lambda index: STREAM
            read = self.glance

            def glance(x):
                # The tensor's own answers, but for where it lies.
                stand_in = SimpleNamespace(
                    is_cuda=True,
                    is_neg=x.is_neg,
                    requires_grad=x.requires_grad,
                    data_ptr=x.data_ptr,
                    get_device=lambda: 0,
                    shape=x.shape,
                    stride=x.stride,
                    dtype=x.dtype,
                )
                return read(stand_in)

            self.glance = glance
            self.look = functools.partial(Plain.look, self)

        def view(self, x, role, *rows):
            return on_cuda(super().view(x, role, *rows))

    return HostAsCuda()


# Calls of one norm on it.
@pytest.fixture
def slow(monkeypatch):
    """Stand in for the GPU, and list the shapes of x that went step by step."""
    import torch

    take_for_gpu(monkeypatch, torch_adapter(), torch.Tensor, torch.nn.Parameter)
    take_for_kernel(monkeypatch)
    forget_calls(monkeypatch)
    return list_steps(monkeypatch, lambda given: tuple(given.parts[0].shape))


def take_for_kernel(patch):
    """Let NumPy do what the kernel for one norm does."""
    patch.setattr(head_norm, "prepare", lambda call, *_: Launch(call))
    patch.setattr(head_norm, "over", over)
    take_for_runner(patch)


def over(launch, before, after):
    """As the kernel does: it meets the outermost length in the number of rows alone."""
    outermost, *inner = launch.call.axes
    rows = launch.call.rows // before * after
    outermost = outermost._replace(size=outermost.size * rows // launch.call.rows)
    return Launch(launch.call._replace(axes=(outermost, *inner), rows=rows))


class Launch(NamedTuple):
    """Does what the kernel does with the same addresses and the same grid of rows."""

    call: NormCall

    def run(self, words):
        spec = self.call.spec

        def rows(address, dtype, strides):
            layout = SimpleNamespace(
                size=1,
                shape=(*(axis.size for axis in self.call.axes), spec.head_dim),
                strides=(*strides, dtype.itemsize),
                dtype=dtype,
            )
            return as_numpy(address, layout, None, writeable=True)

        axes = self.call.axes
        parameters = [
            rows(words[word], dtype, [getattr(axis, name) for axis in axes]) if dtype else None
            for name, word, dtype in (
                ("weight", head_norm.WEIGHT, spec.weight),
                ("bias", head_norm.BIAS, spec.bias),
            )
        ]
        host.apply(
            self.call,
            rows(words[head_norm.X], spec.x, [axis.x for axis in axes]),
            *parameters,
            rows(words[head_norm.OUT], spec.x, [axis.out for axis in axes]),
        )


def tensor(rng, *shape, dtype=None):
    import torch

    values = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    return values if dtype is None else values.to(dtype)


def expected(x, *parameters, norm=reference.rms_norm, **options):
    return norm(x.numpy(), *(p.numpy() for p in parameters), **options)
