"""The kernel for q, k and v on the CPU, as test_host.py has the one for one array."""

import host
import numpy as np
import pytest
import qk_cases
from host_build import ANY, PARTS, WHOLE
from host_cases import FAR, MANY, far_copy, reserved, running
from tolerances import FLIPS_FEW, mismatch

from cupy_headnorm._arrays import find
from cupy_headnorm._calls import remembered
from cupy_headnorm._calls import tables as rope_tables
from cupy_headnorm._cuda import launcher
from cupy_headnorm._plans import qk_norm_rope

pytestmark = pytest.mark.usefixtures("compiler")


def parts_of(kernel, rng):
    """Return a case, what it makes, and its norms; the rows of parts lie as the kernel allows."""
    case = kernel.case
    if case.head_dim > 1000:
        case = case._replace(tokens=2)
    parts, norms, beside = case.made(rng, beyond=3)
    qk = qk_cases.qk_norm(case, norms)
    itemsize = case.dtype.itemsize
    if kernel.how == ANY:
        # Slices of one buffer, whose rows lie off all boundaries.
        widths = [part.shape[-2] * case.head_dim for part in parts]
        packed = np.zeros((2, case.tokens, sum(widths) + 1), case.dtype.numpy).view(np.uint8)
        memory = np.full(packed.nbytes + 32, 0xA5, np.uint8)
        at, laid = -memory.ctypes.data % 16 + itemsize, []
        for part, width in zip(parts, widths, strict=True):
            pitch = packed.shape[-1]
            strides = (case.tokens * pitch, pitch, case.head_dim * itemsize, itemsize)
            laid.append(np.ndarray(part.shape, part.dtype, memory, at, strides))
            laid[-1][...] = part
            at += width * itemsize
        parts = laid
    return case, (parts, norms, beside), qk


@pytest.mark.parametrize("heads_per_group", [1, 2, 4])
@pytest.mark.parametrize("kernel", PARTS, ids=str)
def test_parts_match_float64(kernel, heads_per_group, rng, monkeypatch):
    plan = qk_norm_rope.plan
    monkeypatch.setattr(
        qk_norm_rope, "plan", lambda call: plan(call)._replace(heads_per_group=heads_per_group)
    )
    case, made, qk = parts_of(kernel, rng)
    parts, _, beside = made
    inside = dict(beside)
    if "positions" in beside:  # NumPy refuses what the kernel clamps
        inside["positions"] = np.clip(beside["positions"], 0, qk_cases.MAX_POSITION - 1)
    twin = qk(*parts, **inside)
    with running(kernel):
        found = qk(*parts, **beside)
        qk_cases.check(case, found, made)
        for part, y, expected in zip(parts, found, twin, strict=True):
            assert mismatch(y, expected) <= FLIPS_FEW or case.dtype.itemsize > 2
            assert part.strides != y.strides or kernel.how == WHOLE
        qk(*parts, **beside, out=tuple(parts))
        for part, y in zip(parts, found, strict=True):
            assert part.tobytes() == y.tobytes()


def test_parts_on_pairs_of_numbers_have_the_bits_of_parts_on_single_ones(rng):
    """sm_90 multiplies and adds two 16-bit numbers at once, sm_75 one by one in float."""
    pairs, single = PARTS[:2]
    assert (pairs.architecture, single.architecture) == (900, 750)
    _, (parts, _, beside), qk = parts_of(pairs, rng)
    with running(pairs):
        found = qk(*parts, **beside)
    with running(single):
        for a, b in zip(found, qk(*parts, **beside), strict=True):
            assert a.tobytes() == b.tobytes()


def test_parts_without_rope_have_the_bits_of_norms_one_by_one(rng):
    kernel = next(k for k in PARTS if k.case.by is None)
    _, (parts, *_), qk = parts_of(kernel, rng)
    with running(kernel):
        found = qk(*parts)
    with host.device():
        for name, part, y in zip("qk", parts, found, strict=False):
            assert qk.norms[name](part).tobytes() == y.tobytes()


def test_parts_may_have_a_weight_or_a_bias_alone(rng):
    """Parts beside them have the other: each is looked for where it is."""
    kernel = next(k for k in PARTS if k.case.v and k.case.bias)
    case, (parts, norms, beside), _ = parts_of(kernel, rng)
    (weight, _, options), (_, bias, _), without = norms
    norms = [(weight, None, options), (None, bias, options), without]
    with running(kernel):
        found = qk_cases.qk_norm(case, norms)(*parts, **beside)
    qk_cases.check(case, found, (parts, norms, beside))


@pytest.mark.parametrize("kernel", [k for k in PARTS if k.how == WHOLE], ids=str)
def test_parts_of_another_number_of_tokens(kernel, rng, monkeypatch):
    """Calls of one sequence, and of one token, are derived from a call of 2 sequences."""
    case, (parts, _, beside), qk = parts_of(kernel, rng)
    derived, over = [], qk_norm_rope.over

    def listing(*arguments):
        derived.append(over(*arguments))
        return derived[-1]

    monkeypatch.setattr(qk_norm_rope, "over", listing)

    def call(sequences, length):
        # Axes of what rotates a part, from its end: positions have none of head_dim.
        last = -1 if "positions" in beside else -2
        rotation = {}
        for name, array in beside.items():
            array = np.take(array, range(min(length, array.shape[last])), last)
            if array.ndim >= 1 - last:
                array = np.take(array, range(min(sequences, array.shape[last - 1])), last - 1)
            rotation[name] = np.ascontiguousarray(array)
        arrays = [np.ascontiguousarray(part[:sequences, :length]) for part in parts]
        return [y.tobytes() for y in qk(*arrays, **rotation)]

    tokens = parts[0].shape[1]
    smaller = [(1, tokens), (2, 1), (1, 2), (2, tokens)]
    expected = []
    for sizes in smaller:
        with running(kernel):
            expected.append(call(*sizes))
    assert not derived
    with running(kernel):
        call(2, tokens)
        found = [call(*sizes) for sizes in smaller]
    assert found == expected
    # Rows of positions would lie another number of bytes apart; 2 tokens have no other number.
    never = case.by == "chunks of sections" or (tokens == 2 and beside)
    assert any(derived) == (not never)


def test_no_token_after_some_is_no_launch(rng, monkeypatch):
    kernel = next(k for k in PARTS if k.case.by is None)
    _, (parts, *_), qk = parts_of(kernel, rng)
    with running(kernel):
        right = qk(*parts)
        outs = tuple(map(np.empty_like, right))
        qk(*parts, out=outs)
        monkeypatch.setattr(launcher, "runners", None)
        known = remembered.thread.lengths
        known |= {key: like._replace(runs=dict.fromkeys(range(64))) for key, like in known.items()}
        assert known
        none = [part[:0] for part in parts]
        for out in (None, tuple(y[:0] for y in outs)):
            for y, expected in zip(qk(*none, out=out), right, strict=True):
                np.testing.assert_array_equal(y, expected[:0])


def test_more_tokens_that_step_back_reach_further_back(rng):
    """Two sequences use what one leaves free."""
    kernel = next(k for k in PARTS if k.case.by is None)
    _, (parts, *_), qk = parts_of(kernel, rng)
    q = np.concatenate([parts[0]] * 3)
    k, v = parts[1:]
    with running(kernel):
        right = qk(q[5:3:-1], k, v)
        outs = q[2:4], k.copy(), v.copy()
        for y, expected in zip(qk(q[5:3:-1], k, v, out=outs), right, strict=True):
            np.testing.assert_array_equal(y, expected)
        before = q.copy()
        more = [np.concatenate([part, part[:1]]) for part in (k, v)]
        with pytest.raises(ValueError, match="out of q overlaps q"):
            qk(q[5:2:-1], *more, out=(q[1:4], *(part.copy() for part in more)))
        np.testing.assert_array_equal(q, before)


def test_a_call_inside_of_its_like(rng):
    kernel = PARTS[0]
    _, (parts, _, beside), qk = parts_of(kernel, rng)
    others = [part[..., ::-1].copy() for part in parts]
    with running(kernel):
        expected = [qk(*arrays, **beside) for arrays in (parts, others)]
    inside = []
    with running(kernel), host.interrupted(lambda: inside.extend(qk(*others, **beside))):
        found = qk(*parts, **beside)
    for a, b in zip([*found, *inside], [*expected[0], *expected[1]], strict=True):
        assert a.tobytes() == b.tobytes()


def test_positions_outside_of_the_tables_are_clamped_and_read_nothing_else(rng):
    kernel = PARTS[0]
    _, (parts, _, _), qk = parts_of(kernel, rng)
    far = np.array([-1, -(2**62), 2**62, qk_cases.MAX_POSITION, 0, 2**31, -(2**31)])
    far = np.stack([far, far[::-1]])
    with running(kernel):
        found = qk(*parts, positions=far)
        clamped = qk(*parts, positions=np.clip(far, 0, qk_cases.MAX_POSITION - 1))
    for a, b in zip(found, clamped, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("step", [FAR, -FAR])
@pytest.mark.parametrize("kernel", PARTS, ids=str)
def test_rows_may_lie_further_apart_than_32_bits_count(kernel, step, rng, monkeypatch):
    """They are those of heads, tokens, positions, and cosines and sines, given or looked up."""
    plan = qk_norm_rope.plan
    # Then a group begins with the third head, and each walks from head to head.
    monkeypatch.setattr(qk_norm_rope, "plan", lambda call: plan(call)._replace(heads_per_group=2))
    case = kernel.case._replace(tokens=2, heads=(4, 3))
    parts, norms, beside = case.made(rng, beyond=3)
    qk = qk_cases.qk_norm(case, norms)
    tables = [] if case.by is None else [t[:4] for t in qk.rope.tables(case.of_table.numpy)]

    def looked_up(*_):
        return rope_tables.Pair(*(find.view(table, "table") for table in tables))

    monkeypatch.setattr(rope_tables.Tables, "_beside", looked_up)
    with running(kernel):
        expected = qk(*parts, **beside)
        parts = tuple(far_copy(part, step) for part in parts)
        tables = [far_copy(table, step) for table in tables]
        far = {
            name: far_copy(array[..., np.newaxis], step)[..., 0]
            if name == "positions"
            else far_copy(array, step)
            for name, array in beside.items()
        }
        qk(*parts, **far, out=parts)
    for part, y in zip(parts, expected, strict=True):
        assert part.tobytes() == y.tobytes()


def test_more_groups_than_32_bits_count(rng, monkeypatch):
    """Each token has two groups; those of the last block run."""
    kernel = next(k for k in PARTS if k.case.head_dim == 10)
    case, plan, planned = kernel.case._replace(heads=(1, 1), tokens=100), qk_norm_rope.plan, []
    monkeypatch.setattr(
        qk_norm_rope, "plan", lambda call: planned.append(plan(call)) or planned[-1]
    )
    parts, norms, beside = case.made(rng)
    parts = [part[0] for part in parts]
    qk = qk_cases.qk_norm(case, norms)
    beside = {name: table[0, :1] for name, table in beside.items()}  # one row for all
    many = []
    for part in parts:
        many.append(np.ndarray((MANY, *part.shape[1:]), part.dtype, reserved(40 * MANY)))
        many[-1][-100:] = part
    with running(kernel):
        expected = qk(*parts, **beside)
    groups_per_block = planned[-1].groups_per_block
    last = (2 * MANY - 1) // groups_per_block
    with running(kernel, blocks=[last]):
        qk(*many, **beside, out=tuple(many))
    assert planned[-1].axes == qk_norm_rope.AXES[-1], "kernels of fewer count in 32 bits"
    done = MANY - last * groups_per_block // 2
    for x, y, before in zip(many, expected, parts, strict=True):
        assert x[-done:].tobytes() == y[-done:].tobytes()
        assert x[-100:-done].tobytes() == before[:-done].tobytes()
