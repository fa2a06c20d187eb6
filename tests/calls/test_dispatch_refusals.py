"""What a second call refuses as the first one did: see test_dispatch.py."""

import itertools

import host_build
import numpy as np
import pytest
import stand_in
from host_build import ANY
from host_cases import kernel_of, rows, running
from stand_in import expected, tensor

from cupy_headnorm import CaptureError, HeadNorm, ops, reference, rms_norm
from cupy_headnorm._arrays import find
from cupy_headnorm._cuda import memory as cuda_memory

torch = pytest.importorskip("torch")
slow = stand_in.slow


def test_what_the_first_call_refuses_the_second_does_too(slow, rng):
    x, y = tensor(rng, 8, 4, 64), torch.empty(8, 4, 64)
    norm = HeadNorm(tensor(rng, 64))
    weight = tensor(rng, 64)
    with torch.no_grad():
        norm(x), norm(x, out=y), norm(x, out=x), rms_norm(x, weight), rms_norm(x, weight, out=y)
    requires_grad = x.clone().requires_grad_()
    for call in (norm, lambda t: norm(x, out=t), lambda t: norm(t, out=y)):
        with pytest.raises(ValueError, match="requires grad and grad mode is on"):
            call(requires_grad)
        with pytest.raises(TypeError, match="a lazily negated view"):
            call(torch._neg_view(x))
        with pytest.raises(TypeError, match="a Subclass, a subclass of torch.Tensor"):
            call(x.as_subclass(Subclass))
    with pytest.raises(ValueError, match="weight requires grad"):
        rms_norm(x, weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="x has shape"):
        norm(tensor(rng, 8, 4, 32))
    with pytest.raises(TypeError, match="out has dtype float16"):
        norm(x, out=y.half())
    with pytest.raises(TypeError, match="out is a ndarray"):
        norm(x, out=y.numpy())


class Subclass(torch.Tensor):
    pass


def test_overlap_is_looked_for_at_every_call(slow, rng):
    memory = tensor(rng, 12, 4, 64)
    norm = HeadNorm()
    norm(memory[:4], out=memory[8:])
    known = len(slow)
    with pytest.raises(ValueError, match="out overlaps x in part"):
        norm(memory[:4], out=memory[2:6])
    with pytest.raises(ValueError, match="out overlaps x in part"):
        norm(memory[2:6], out=memory[:4])
    right = expected(memory[:4])
    norm(memory[:4], out=memory[4:8])  # side by side is apart
    np.testing.assert_array_equal(memory[4:8], right)
    norm(memory[:4], out=memory[:4])  # other objects, one place
    np.testing.assert_array_equal(memory[:4], right)
    assert len(slow) == known + 2
    x, parameters = tensor(rng, 4, 64), tensor(rng, 2, 64)
    rms_norm(x, parameters[0], parameters[1], out=torch.empty(4, 64))
    known = len(slow)
    for which in range(2):
        out = torch.empty(6, 64)
        shared = [out[0], parameters[0]] if which == 0 else [parameters[0], out[0]]
        with pytest.raises(ValueError, match=f"out overlaps {('weight', 'bias')[which]}; needs"):
            rms_norm(x, *shared, out=out[:4])
    assert len(slow) == known + 2


def test_more_tokens_than_are_known_reach_further(slow, rng):
    memory, norm = tensor(rng, 8, 4, 64), HeadNorm()
    norm(memory[:2], out=memory[2:4])
    before = memory.clone()
    with pytest.raises(ValueError, match="out overlaps x in part"):
        norm(memory[:5], out=memory[2:7])
    assert torch.equal(memory, before)


def test_more_tokens_backwards_reach_further_down(compiler, rng):
    """Of NumPy, since torch has no negative strides."""
    kernel = kernel_of(host_build.QWEN3, ANY)
    memory = rows(rng, (8, 4, kernel.spec.head_dim), kernel.spec.x)
    weight = rows(rng, memory.shape[-1:], kernel.spec.weight)
    norm = HeadNorm(weight, rounding=kernel.spec.rounding)
    with running(kernel):
        right = norm(memory[4:1:-1])
        np.testing.assert_array_equal(norm(memory[4:2:-1], out=memory[6:4:-1]), right[:2])
        np.testing.assert_array_equal(norm(memory[4:1:-1], out=memory[7:4:-1]), right)
        before = memory.copy()
        with pytest.raises(ValueError, match="out overlaps x in part"):
            norm(memory[4::-1], out=memory[6:1:-1])
    assert memory.tobytes() == before.tobytes()


def test_interleaved_slices_are_told_apart_exactly(slow, rng):
    packed = tensor(rng, 5, 6, 64)
    queries, keys = packed[:, :2], packed[:, 2:4]
    norm = HeadNorm()
    for _ in range(2):
        right = expected(queries)
        norm(queries, out=keys)
        np.testing.assert_array_equal(keys, right)
    with pytest.raises(ValueError, match="out overlaps x in part"):
        norm(packed[:, :2], out=packed[:, 1:3])


def test_tracing_and_modes_go_step_by_step(slow, rng):
    from torch.utils.flop_counter import FlopCounterMode

    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    with FlopCounterMode(display=False):
        np.testing.assert_array_equal(norm(x), expected(x))
    assert len(slow) == 2
    with torch.device("cpu"):  # a function mode that looks on
        norm(x)
    assert len(slow) == 2
    with pytest.raises(TypeError, match="traced by torch.jit.trace"):
        torch.jit.trace(lambda t: norm(t), x)


def test_what_would_be_lost_is_refused_when_it_is_known(slow, rng):
    """Transforms hand a norm tensors of layouts that it remembers, without memory behind them."""
    norm, weight = HeadNorm(), tensor(rng, 64)
    x = tensor(rng, 8, 4, 64)
    calls = (norm, lambda t: norm(t, out=t), lambda t: rms_norm(t, weight))
    for call in calls:
        call(x.clone()), call(x[0].clone())
    known = len(slow)
    for call, (trace, message) in itertools.product(calls, LOST):
        with pytest.raises(TypeError, match=message):
            trace(call, x)
    for call in calls:
        np.testing.assert_array_equal(call(x.clone()), call(x.clone()))
    assert len(slow) == known + len(calls) * len(LOST)


def _dual(call, x):
    with torch.autograd.forward_ad.dual_level():
        call(torch.autograd.forward_ad.make_dual(x, x))


LOST = (
    (lambda call, x: torch.func.vmap(lambda t: call(t))(x), "inside a torch.func transform"),
    (
        lambda call, x: torch.func.grad(lambda t: call(t).sum())(x),
        "inside a torch.func transform",
    ),
    (_dual, "a forward-mode AD dual"),
    (lambda call, x: call(torch._to_functional_tensor(x)), "functional, without memory"),
    (lambda call, x: call(x.to_sparse()), "of layout torch.sparse_coo"),
    (lambda call, x: call(x.to("meta")), "on the meta device"),
)


def test_a_new_result_is_refused_in_a_capture_on_every_path(slow, rng, monkeypatch):
    """That of a library whose pool knows nothing of graphs, as CuPy's."""
    monkeypatch.setattr(find.quick[torch.Tensor], "allocates_in_graphs", False)
    norm = HeadNorm(tensor(rng, 64))
    x = tensor(rng, 5, 4, 64)
    norm(x), norm(x.clone(), out=x.clone())

    def refuse(stream, what, needed="warmup"):
        raise CaptureError(f"{what}; needs {needed}")

    monkeypatch.setattr(cuda_memory, "refuse_capture", refuse)
    for tokens in (5, 7):
        x = tensor(rng, tokens, 4, 64)
        with pytest.raises(
            CaptureError, match="a result without out would be allocated; needs out"
        ):
            norm(x)
        right = reference.rms_norm(x.numpy(), norm.weight)
        np.testing.assert_array_equal(norm(x, out=x), right)
    # A plan of a kernel that is loaded loads nothing.
    np.testing.assert_array_equal(
        norm(x[None], out=x[None])[0], reference.rms_norm(right, norm.weight)
    )


def test_a_mode_that_changes_what_torch_makes_is_seen(slow, rng):
    class Smaller(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.empty_like:
                return torch.empty(1)
            return function(*args, **(kwargs or {}))

    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    with Smaller(), pytest.raises(ValueError, match=r"out has shape \(1,\); needs that of x"):
        norm(x)


def test_a_result_inside_a_transform_is_refused_by_name(slow, rng):
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    with pytest.raises(TypeError, match="inside a torch.func transform"):
        torch.func.grad(lambda z: (norm(x), z.sum())[1])(tensor(rng, 3))


def test_heads_axis_is_an_integer_on_a_known_call_too(slow, rng):
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    for axis in (-2.0, np.array([-2.0]), torch.tensor(-2.0)):
        with pytest.raises(TypeError, match="heads_axis is .*; needs an integer"):
            norm(x, heads_axis=axis)
    np.testing.assert_array_equal(norm(x, heads_axis=np.int64(-2)), expected(x))
    for axis in (64, -65):
        with pytest.raises(ValueError, match=f"heads_axis is {axis}; needs one of the 64 axes"):
            norm(x, heads_axis=axis)


def test_a_geometry_of_ones_own_needs_cuda_memory():
    norm, x = HeadNorm(), torch.ones(3, 64)
    with pytest.raises(ValueError, match="x is in host memory; a launch configuration needs CUDA"):
        ops.launch(norm.plan(x), x)
