"""What a remembered call still looks at, on a GPU: test_dispatch.py has the same without one."""

import numpy as np
import pytest
import streams
from streams import DIM, SHAPE, TORCH, normal, synchronize
from tolerances import RELATIVE, assert_alike

from cupy_headnorm import HeadNorm, reference, rms_norm

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")

# The fixtures of streams.py that these tests take.
library = streams.library
taken = streams.taken


SHIFTS = [(0, 1), (1, 0), (1, 1), (4, 2), (3, None), (2, 6)]
"""Elements of 2 bytes that x and out begin after the start of their memory."""


@pytest.mark.parametrize("shifts", SHIFTS, ids=str)
def test_another_alignment_is_another_plan(library, shifts, taken, rng):
    """The remembered kernel would read past what its address allows, which stops the GPU."""
    values = rng.standard_normal((16, 4, DIM)).astype(np.float16)
    norm = HeadNorm(rng.standard_normal(DIM).astype(np.float32))

    def shifted(by):
        flat = library.array(np.zeros(values.size + 16, np.float16))
        x = flat[by : by + values.size].reshape(values.shape)
        library.write(x, library.array(values))
        return x

    x_shift, out_shift = shifts
    right = library.host(norm(shifted(0)))
    norm(shifted(0), out=shifted(0))
    # The plans are made per alignment in bytes up to 16: 8 elements on, all is known again.
    for further, ways in ((0, ["step by step"]), (0, []), (8, [])):
        taken.clear()
        x = shifted(x_shift + further)
        out = None if out_shift is None else shifted(out_shift + further)
        np.testing.assert_array_equal(library.host(norm(x, out=out)), right)
        assert taken == ways


def test_overlap_is_refused_when_the_call_is_remembered(library, taken, rng):
    memory = library.array(normal(rng, (12, 4, DIM)))
    before = library.host(memory)
    norm = HeadNorm(np.ones(DIM, np.float32))
    norm(memory[:4], out=memory[8:])
    for first in (2, 1):
        with pytest.raises(ValueError, match="out overlaps x in part"):
            norm(memory[:4], out=memory[first : first + 4])
    taken.clear()
    norm(memory[:4], out=memory[4:8])  # side by side is apart
    assert taken == []
    after = library.host(memory)
    np.testing.assert_array_equal(after[:4], before[:4])
    assert_alike(after[4:8], reference.rms_norm(before[:4]))
    np.testing.assert_array_equal(after[8:], after[4:8])


class Subclass(torch.Tensor):
    pass


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


REFUSED = {
    "gradient": (lambda x: x.clone().requires_grad_(), "requires grad and grad mode is on"),
    "negated": (torch._neg_view, "a lazily negated view"),
    "subclass": (lambda x: x.as_subclass(Subclass), "a Subclass, a subclass of torch.Tensor"),
    "sparse": (lambda x: x.to_sparse(), "of layout torch.sparse_coo"),
    "meta": (lambda x: x.to("meta"), "on the meta device, without memory"),
    "fake": (fake, "a FakeTensor, a subclass of torch.Tensor"),
    "functional": (torch._to_functional_tensor, "functional, without memory of its own"),
    "integer": (lambda x: x.int(), "has dtype int32"),
}


def remembered(taken):
    """Return a norm and arrays whose calls are remembered, and a check that they still are."""
    norm = HeadNorm(np.full(DIM, 2, np.float32))
    values = np.full(SHAPE, 3, np.float32)
    x, y, weight = (TORCH.array(part) for part in (values, values, np.ones(DIM, np.float32)))
    calls = (
        lambda: norm(x),
        lambda: norm(x, out=y),
        lambda: norm(x.clone(), out=None),
        lambda: norm(x[0])[None],
        lambda: norm(y, out=y),
        lambda: 2 * rms_norm(x, weight),
        lambda: 2 * rms_norm(x, weight, out=y),
    )
    for call in calls:
        call()

    def check():
        taken.clear()
        for call in calls:
            np.testing.assert_allclose(TORCH.host(call()), 2, rtol=2 * RELATIVE["float32"])
        assert taken == []

    check()
    return norm, x, y, weight, check


@pytest.mark.parametrize("refused", REFUSED)
def test_what_first_calls_refuse_remembered_ones_do(refused, taken):
    make, message = REFUSED[refused]
    norm, x, y, weight, check = remembered(taken)
    bad, bad_weight = make(x), make(weight)
    for call in (
        lambda: norm(bad),
        lambda: norm(bad, out=bad),
        lambda: norm(bad, out=y),
        lambda: norm(x, out=bad),
        lambda: rms_norm(x, bad_weight),
        lambda: rms_norm(bad, weight, out=y),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    synchronize()
    assert (x == 3).all()
    check()


def in_dual_level(norm, x):
    with torch.autograd.forward_ad.dual_level():
        norm(torch.autograd.forward_ad.make_dual(x, x))


def under_fake_mode(norm, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        norm(x)


def under_make_fx(norm, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(lambda t: norm(t))(x)


TRACED = {
    "vmap": (
        lambda norm, x: torch.func.vmap(lambda t: norm(t))(x),
        "inside a torch.func transform",
    ),
    "grad": (
        lambda norm, x: torch.func.grad(lambda t: norm(t).sum())(x),
        "inside a torch.func transform",
    ),
    "dual": (in_dual_level, "a forward-mode AD dual"),
    "fake mode": (under_fake_mode, "traced by .*FakeTensorMode"),
    "make_fx": (under_make_fx, "traced by make_fx"),
    "jit": (lambda norm, x: torch.jit.trace(lambda t: norm(t), x), "traced by torch.jit.trace"),
}


@pytest.mark.parametrize("traced", TRACED)
def test_remembered_calls_are_refused_where_they_would_be_lost(traced, taken):
    trace, message = TRACED[traced]
    norm, x, _, _, check = remembered(taken)
    with pytest.raises(TypeError, match=message):
        trace(norm, x)
    check()
