"""
What a second call looks at, and what it trusts: the path of a call that ran before.

The path belongs to CUDA memory. Here host memory stands in for it, as stand_in.py says;
tests/gpu/test_streams.py and tests/calls/test_remembered.py have the real one.
"""

import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import host_build
import numpy as np
import pytest
import stand_in
from host_build import ANY
from host_cases import kernel_of, rows, running
from stand_in import expected, tensor

from cupy_headnorm import HeadNorm, layer_norm, reference, rms_norm
from cupy_headnorm._arrays import find
from cupy_headnorm._calls import dispatch, parameters, remembered
from cupy_headnorm._cuda import launcher
from cupy_headnorm.headnorm import inside

torch = pytest.importorskip("torch")
slow = stand_in.slow


def test_the_second_call_only_looks(slow, rng):
    weight = tensor(rng, 4, 64)
    norm = HeadNorm(weight)
    for calls in range(3):
        x, y = tensor(rng, 5, 4, 64), torch.empty(5, 4, 64)
        right = expected(x, weight)
        np.testing.assert_array_equal(norm(x), right)
        np.testing.assert_array_equal(norm(x, out=y), right)
        norm(x, out=x)
        np.testing.assert_array_equal(x, right)
        # In place is known from out of place: only addresses differ.
        assert len(slow) == 2, f"step by step again in round {calls}"


def test_functions_are_remembered_too(slow, rng):
    for _ in range(3):
        x, weight, bias = tensor(rng, 5, 4, 64), tensor(rng, 4, 64), tensor(rng, 64)
        np.testing.assert_array_equal(rms_norm(x, weight), expected(x, weight))
        np.testing.assert_array_equal(
            layer_norm(x, weight, bias), expected(x, weight, bias, norm=reference.layer_norm)
        )
        assert len(slow) == 2


def test_options_of_a_function_make_it_another(slow, rng):
    x = tensor(rng, 5, 4, 64)
    for eps in (1e-6, 1.0, 1e-6, 1.0):
        np.testing.assert_array_equal(rms_norm(x, eps=eps), expected(x, eps=eps))
    assert len(slow) == 2


LAYOUTS = {
    "contiguous": lambda n, rng: tensor(rng, n, 4, 64),
    "batch of one": lambda n, rng: tensor(rng, 1, n, 4, 64),
    "slice of packed": lambda n, rng: tensor(rng, n, 6, 64)[:, 1:5],
    "slice of a batch of one": lambda n, rng: tensor(rng, 1, n, 6, 64)[:, :, :4],
    "flat": lambda n, rng: tensor(rng, n, 256),
    "flat slice": lambda n, rng: tensor(rng, n, 512)[:, 256:],
    "expanded": lambda n, rng: tensor(rng, 1, 4, 64).expand(n, 4, 64),
    "every other token": lambda n, rng: tensor(rng, 2 * n, 4, 64)[::2],
    "sequences": lambda n, rng: tensor(rng, 2, n, 4, 64),
    "slice of sequences": lambda n, rng: tensor(rng, 3, n, 6, 64)[..., 1:5, :],
    "flat sequences": lambda n, rng: tensor(rng, 2, n, 512)[..., 128:384],
}


@pytest.mark.parametrize(
    ("layout", "out"),
    [
        (layout, out)
        for layout in LAYOUTS
        for out in ("new", "in place", "given")
        if (layout, out) != ("expanded", "in place")  # it has no place for each result
    ],
)
def test_another_number_of_tokens_is_no_new_plan(slow, rng, layout, out):
    weight, bias = tensor(rng, 4, 64), tensor(rng, 64)
    norm = HeadNorm(weight, bias, kind="layer")
    for tokens in (7, 3, 20, 2, 7):
        x = LAYOUTS[layout](tokens, rng)
        right = expected(x, weight, bias, norm=reference.layer_norm, num_heads=4, head_dim=64)
        target = {"new": None, "in place": x, "given": torch.empty(x.shape)}[out]
        np.testing.assert_array_equal(norm(x, out=target), right)
    assert len(slow) == 1


def test_lengths_that_are_not_outermost(slow, rng):
    weight = tensor(rng, 64)
    norm = HeadNorm(weight)
    for length in (3, 5, 3, 5):
        for x in (
            tensor(rng, 2, length, 4, 64),  # sequences in a batch
            tensor(rng, 2, 9, 4, 64)[:, :length],  # shorter than the memory of each
            tensor(rng, 2, 18, 4, 64)[:, : 2 * length : 2],
            tensor(rng, 1, length, 4, 64).expand(2, length, 4, 64),
            tensor(rng, 2, 4, length, 64).transpose(1, 2),
            tensor(rng, 4, length, 64).transpose(0, 1),  # tokens first, heads outermost in memory
            tensor(rng, 4, 9, 64)[:, :length].transpose(0, 1),
            tensor(rng, length, 1, 64).expand(length, 4, 64),
        ):
            np.testing.assert_array_equal(norm(x), expected(x, weight))


def test_no_result_has_an_odd_stride(slow, rng):
    """Neither where another length made the plan, with or without an odd stride, nor later."""
    norm = HeadNorm(weight := tensor(rng, 64))

    def strides(sequences, tokens, odd):
        x = tensor(rng, 3, 9, 4, 64)[:1, :tokens] if odd else tensor(rng, sequences, tokens, 4, 64)
        y = norm(x)
        np.testing.assert_array_equal(y, expected(x, weight))
        return y.stride()

    plain = [(2, 7, False), (1, 7, True), (1, 5, True), (2, 3, False), (1, 1, True), (1, 7, True)]
    for calls in (plain, plain[1:], plain[::-1]):
        remembered.thread.calls.clear()
        remembered.thread.lengths.clear()
        slow.clear()
        for sequences, tokens, odd in calls * 2:
            assert strides(sequences, tokens, odd) == (tokens * 256, 256, 64, 1)
        # Once more where the first one was plain, and for one token, which no other length serves.
        assert len(slow) <= 3


def test_sequences_whose_results_lie_apart(slow, rng):
    """x steps from sequence to sequence as from token to token, and out does not, or otherwise."""
    weight = tensor(rng, 64)
    norm = HeadNorm(weight)
    for length in (3, 5, 8, 3, 5, 8):
        dense, apart = torch.empty(2, length, 4, 64), torch.full((2, 9, 4, 64), 7.0)
        x, y = tensor(rng, 2, length, 4, 64), apart[:, :length]
        right = expected(x, weight)
        for out in (dense, y):
            np.testing.assert_array_equal(norm(x, out=out), right)
        assert (apart[:, length:] == 7).all()
        y.copy_(x)
        np.testing.assert_array_equal(norm(y, out=dense), right)
        np.testing.assert_array_equal(norm(y), right)


def test_an_out_of_another_shape_is_refused_after_others_fit(slow, rng):
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x, out=torch.empty(5, 4, 64))
    with pytest.raises(ValueError, match="out has shape"):
        norm(x[:4], out=torch.empty(6, 4, 64))


def test_results_whose_inner_axis_lies_outermost(slow, rng):
    norm = HeadNorm()
    for n in (5, 3, 6):
        x = tensor(rng, n, 2, 4, 64)
        out = torch.empty(2, 6, 4, 64)[:, :n].transpose(0, 1)
        np.testing.assert_array_equal(norm(x, out=out), expected(x))


def test_heads_first_layouts_are_told_apart(slow, rng):
    """The outermost axis may be that of the heads: then its length is no number of tokens."""
    weight = tensor(rng, 4, 64)
    norm = HeadNorm(weight)
    for tokens in (5, 9):
        x = tensor(rng, 4, tokens, 64)
        right = expected(x, weight, heads_axis=-3)
        np.testing.assert_array_equal(norm(x, heads_axis=-3), right)
        np.testing.assert_array_equal(norm(x[None], heads_axis=-3)[0], right)
        np.testing.assert_array_equal(norm(x, heads_axis=0), right)
    square = tensor(rng, 4, 4, 64)  # as many tokens as heads: nothing but heads_axis tells
    for axis in (-2, -3, -2, -3):
        right = expected(square, weight, heads_axis=axis)
        np.testing.assert_array_equal(norm(square, heads_axis=axis), right)
        np.testing.assert_array_equal(rms_norm(square, weight, heads_axis=axis), right)
    with pytest.raises(ValueError, match="3 heads on axis -3; needs num_heads=4"):
        norm(tensor(rng, 3, 5, 64), heads_axis=-3)
    with pytest.raises(ValueError, match="3 heads on axis -2; needs num_heads=4"):
        norm(tensor(rng, 1, 3, 64))


def test_one_token_and_none_after_many(slow, rng):
    weight = tensor(rng, 64)
    norm = HeadNorm(weight)
    for tokens in (6, 1, 0, 6, 1, 0):
        x = tensor(rng, tokens, 4, 64)
        np.testing.assert_array_equal(norm(x), expected(x, weight))


def test_no_token_after_many_where_it_has_an_address(compiler, rng):
    """NumPy's empty slices have one, as a GPU's need not: nothing may be launched over no row."""
    kernel = kernel_of(host_build.QWEN3, ANY)
    x = rows(rng, (6, 4, kernel.spec.head_dim), kernel.spec.x)
    weight = rows(rng, x.shape[-1:], kernel.spec.weight)
    norm = HeadNorm(weight, rounding=kernel.spec.rounding)
    with running(kernel):
        right = norm(x)
        for tokens in (1, 0, 6, 1, 0):
            for out in (None, np.empty_like(x)[:tokens]):
                np.testing.assert_array_equal(norm(x[:tokens], out=out), right[:tokens])


def test_versions_count_every_write(slow, rng):
    x, y = tensor(rng, 5, 4, 64), torch.empty(5, 4, 64)
    norm = HeadNorm()
    for n in range(1, 4):
        norm(x, out=x)
        with torch.no_grad():
            norm(x, out=y)
        assert (x._version, y._version) == (n, n)
    assert norm(x)._version == 0


def test_norms_that_agree_share_their_plans_and_keep_their_weights(slow, rng):
    x = tensor(rng, 5, 4, 64)
    for _ in range(3):
        weight = tensor(rng, 64)
        np.testing.assert_array_equal(HeadNorm(weight)(x), expected(x, weight))
    # A norm's first call uploads its weight; the plan is there.
    assert len(dispatch.plans) == 1
    assert len(remembered.thread.calls) == 1


def test_unload_and_load_again(slow, rng):
    x, weight = tensor(rng, 5, 4, 64), tensor(rng, 64)
    norm = HeadNorm(weight)
    for _ in range(2):
        for _ in range(2):
            np.testing.assert_array_equal(norm(x), expected(x, weight))
        norm.unload()
        assert not inside(norm).ready


def test_a_warmed_call_only_looks(slow, rng):
    norm = HeadNorm(tensor(rng, 64))
    x = tensor(rng, 5, 4, 64)
    before = x.clone()
    norm.warmup(x)
    assert torch.equal(x, before)
    known = len(slow)
    norm(x), norm(x, out=x)
    assert len(slow) == known


def test_the_cache_is_bounded(slow, rng, monkeypatch):
    monkeypatch.setattr(remembered, "MAX_CALLS", 4)
    norm = HeadNorm()
    for heads in range(1, 12):
        x = tensor(rng, 1, heads, 3, 64)
        np.testing.assert_array_equal(norm(x), expected(x))
        sizes = [len(remembered.thread.calls), len(remembered.thread.lengths)]
        assert max(*sizes, len(dispatch.plans)) <= 4


def test_threads_have_parameters_of_their_own(slow, rng):
    """A call writes addresses into its parameters; two threads in one call must not share them."""
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    here = remembered.thread.calls
    there = []

    def other():
        norm(x)
        there.append(remembered.thread.calls)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert here.keys() == there[0].keys()
    assert all(here[key].run is not there[0][key].run for key in here)


def test_every_path_asks_for_the_stream_of_now(slow, rng, monkeypatch):
    streams = []
    monkeypatch.setattr(
        launcher, "runners", lambda *_: lambda _: lambda stream, _: streams.append(stream)
    )
    now = iter(range(100, 200))
    monkeypatch.setattr(find.quick[torch.Tensor], "stream", lambda index: next(now))
    norm, weight = HeadNorm(tensor(rng, 64)), tensor(rng, 64)
    norm(tensor(rng, 5, 4, 64)), rms_norm(tensor(rng, 5, 4, 64), weight)
    calls = (norm, lambda x: norm(x, out=x), lambda x: rms_norm(x, weight))
    for call, tokens in itertools.product(calls, (5, 5, 7, 7)):
        asked = next(now)
        call(tensor(rng, tokens, 4, 64))
        assert streams[-1] > asked


def test_another_alignment_is_another_plan(slow, rng):
    norm = HeadNorm(tensor(rng, 64))
    values = tensor(rng, 5, 4, 64, dtype=torch.float16)

    def shifted(by):
        x = torch.empty(values.numel() + 16, dtype=torch.float16)
        x = x[by : by + values.numel()].view(values.shape)
        return x.copy_(values)

    right = norm(shifted(0))
    for number, shifts in enumerate([(0, 0), (0, 1), (1, 0), (4, 2)], 1):
        for further in (0, 0, 8):
            x, out = (shifted(by + further) for by in shifts)
            np.testing.assert_array_equal(norm(x, out=out), right)
            assert len(slow) == 1 + number


def test_calls_go_with_their_thread(slow, rng):
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)

    def other():
        norm(x)
        return [weakref.ref(call.run) for call in remembered.thread.calls.values()]

    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            (run,) = pool.submit(other).result()
        gc.collect()
        assert run() is None
    assert len(dispatch.plans) == 1


def test_an_argument_that_changes_is_read_at_every_call(slow, rng):
    for library in (lambda t: t, lambda t: t.numpy()):
        x = library(tensor(rng, 5, 4, 64))
        eps = torch.tensor(0.0)
        for value in (1.0, 4.0):
            eps.fill_(value)
            right = reference.rms_norm(np.asarray(x), eps=value)
            np.testing.assert_array_equal(rms_norm(x, eps=eps), right)


def test_strides_of_the_tokens_tell_families_apart(slow, rng):
    norm, memory = HeadNorm(), tensor(rng, 40, 4, 64)
    for step, tokens in ((1, 5), (2, 5), (1, 7), (2, 7), (3, 6), (1, 9)):
        x = memory[: step * tokens : step]
        np.testing.assert_array_equal(norm(x), expected(x))
        np.testing.assert_array_equal(norm(x[None], out=torch.empty(1, tokens, 4, 64))[0], norm(x))


def test_identities_of_norms_are_bounded(slow, rng):
    x = tensor(rng, 5, 4, 64)
    for i in range(20):
        HeadNorm(eps=1e-6 * (i + 1))(x)
    info = parameters.identity.cache_info()
    assert info.currsize <= info.maxsize
