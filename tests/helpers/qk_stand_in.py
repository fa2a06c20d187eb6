"""The same as stand_in.py for q, k and v."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from cases import random
from qk_cases import MAX_POSITION, D
from stand_in import forget_calls, list_steps, take_for_gpu, take_for_runner, torch_adapter

from cupy_headnorm import HeadNorm, QKNorm, Rope, reference
from cupy_headnorm._arrays import layout as layouts
from cupy_headnorm._arrays.dtypes import FLOAT32, INT64
from cupy_headnorm._plans import qk_norm_rope
from cupy_headnorm._plans.parts_params import COS, PART_WORDS, POSITIONS, SIN
from cupy_headnorm._rules.parts import PartsCall
from cupy_headnorm.rope import numpy as rope_numpy


class Launch(NamedTuple):
    """Does what the kernel does with the same addresses and strides."""

    call: PartsCall

    def laid(self, address, shape, strides, dtype):
        strides = (*strides, dtype.itemsize)
        layout = SimpleNamespace(size=1, shape=tuple(shape), strides=strides, dtype=dtype)
        return layouts.as_numpy(address, layout, None, writeable=True)

    def tables(self, positions, addresses):
        call, rope, sizes = self.call, self.call.spec.rope, [axis.size for axis in self.call.axes]
        for address in addresses:
            if positions:
                strides = [axis.position for axis in call.axes]
                at = self.laid(positions, (*sizes, 1), strides, INT64)[..., 0]
                shape = (call.lookup.max_position, rope.rotary_dim // 2)
                rows = self.laid(address, shape, (call.lookup.table_row,), rope.table)
                yield rows[np.clip(at, 0, call.lookup.max_position - 1)]
            else:
                shape = (*sizes, rope.rotary_dim)
                yield self.laid(address, shape, [a.table for a in call.axes], rope.table)

    def run(self, words):
        call, spec = self.call, self.call.spec.norm
        cos, sin, positions = (words[word] for word in (COS, SIN, POSITIONS))
        tables = list(self.tables(positions, (cos, sin))) if call.spec.rope else []
        for i, part in enumerate(call.parts):
            address_of_x, address_of_out, weight, _ = (words[word] for word in PART_WORDS[i])
            shape = (*(axis.size for axis in call.axes), part.num_heads, spec.head_dim)
            x = self.laid(address_of_x, shape, (*(a.x[i] for a in call.axes), part.x), spec.x)
            out = self.laid(
                address_of_out, shape, (*(a.out[i] for a in call.axes), part.out), spec.x
            )
            weight = self.laid(weight, shape[-2:], (part.weight,), spec.weight)
            y = reference.rms_norm(x, weight, eps=part.eps, rounding=spec.rounding)
            out[...] = (
                rope_numpy.apply(y, *(t[..., np.newaxis, :] for t in tables)) if tables else y
            )


def over(launch, before, after):
    """As the kernel does: it meets the outermost length in the number of tokens alone."""
    call = launch.call
    outermost, *inner = call.axes
    outermost = outermost._replace(size=outermost.size // before * after)
    return Launch(call._replace(axes=(outermost, *inner), tokens=call.tokens // before * after))


def take_for_kernel(patch):
    """Let NumPy do what the kernel for q, k and v does."""
    patch.setattr(qk_norm_rope, "prepare", lambda call, *_: Launch(call))
    patch.setattr(qk_norm_rope, "over", over)
    take_for_runner(patch)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of torch's tensors that are a GPU's, or are taken for it."""
    if request.param == "cuda":
        return "cuda"
    import torch

    take_for_gpu(monkeypatch, torch_adapter(), torch.Tensor, torch.nn.Parameter)
    take_for_kernel(monkeypatch)
    return "cpu"


@pytest.fixture
def slow(monkeypatch):
    """Forget all calls, and list those that go step by step."""
    forget_calls(monkeypatch)
    return list_steps(monkeypatch, lambda given: given)


def made(rng, *, theta=1e4, eps=1e-6, max_position=MAX_POSITION, rotates=True):
    rope = Rope.of_theta(theta, D, max_position=max_position) if rotates else None
    return QKNorm(*(HeadNorm(random(rng, D, FLOAT32), eps=eps) for _ in "qk"), rope=rope)
