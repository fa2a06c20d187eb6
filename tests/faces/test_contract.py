"""Each fault of the system this library replaces, as a test that ours does not have it."""

import numpy as np
import pytest
from oracle import norm as oracle
from tolerances import assert_close

from cupy_headnorm import CheckpointError, HeadNorm, layer_norm, rms_norm
from cupy_headnorm._arrays import dtypes


def test_1_the_kind_is_rms_unless_asked_for(library, rng):
    """Qwen3 ran as LayerNorm: 30 % off where the mean is 0.3 of the deviation."""
    x = (rng.standard_normal((7, 3, 128)) + 0.3).astype(np.float32)
    y = library.host(HeadNorm(np.ones(128, np.float32))(library.array(x)))
    exact, slack, _ = oracle("rms", x, eps=1e-6)
    assert_close(y, exact, slack, "float32")
    wrong, *_ = oracle("layer", x, eps=1e-6)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_close(y, wrong, slack, "float32")


def test_2_every_dtype_of_every_operand(library, rng, dtype):
    x = rng.standard_normal((7, 3, 64)).astype(dtype.numpy)
    for other in ("float16", "bfloat16", "float32", "float64"):
        weight = rng.standard_normal(64).astype(dtypes.from_name(other, "w").numpy)
        y = library.host(rms_norm(library.array(x), library.array(weight)))
        exact, slack, _ = oracle("rms", x, weight, eps=1e-6)
        assert_close(y, exact, slack, dtype.name)


@pytest.mark.parametrize("head_dim", [96, 128, 256, 512, 1024, 4096])
def test_3_layer_norm_has_no_race_between_its_two_sums(library, head_dim, rng):
    """A mean near 1000 makes a variance taken with a half-written mean visible."""
    x = (rng.standard_normal((257, 3, head_dim)) + 1000).astype(np.float32)
    exact, slack, _ = oracle("layer", x, eps=1e-5)
    given = library.array(x)
    for _ in range(10):
        assert_close(library.host(layer_norm(given)), exact, slack, "float32")


@pytest.mark.parametrize("head_dim", [1, 7, 33, 63, 65, 80, 127, 513, 769, 2047])
def test_4_head_dim_is_any_number(library, head_dim, rng):
    x = rng.standard_normal((9, 3, head_dim)).astype(np.float16)
    for kind, function in (("rms", rms_norm), ("layer", layer_norm)):
        y = library.host(function(library.array(x), eps=1e-5))
        exact, slack, _ = oracle(kind, x, eps=1e-5)
        assert_close(y, exact, slack, "float16")


def test_5_a_slice_of_a_packed_buffer_is_read_where_it_lies(library, rng):
    packed = rng.standard_normal((9, 10, 64)).astype(np.float16)
    queries = library.array(packed)[:, :6]
    exact, slack, _ = oracle("rms", packed[:, :6], eps=1e-6)
    assert_close(library.host(rms_norm(queries)), exact, slack, "float16")
    with pytest.raises(ValueError, match="out has shape"):
        rms_norm(queries, out=library.array(packed)[:, :5])


@pytest.mark.parametrize("tokens", [0, 65_536, 70_001])
def test_6_any_number_of_tokens(library, tokens, rng):
    x = rng.standard_normal((tokens, 1, 8)).astype(np.float32)
    exact, slack, _ = oracle("rms", x, eps=1e-6)
    out = library.array(np.full_like(x, np.nan))
    assert_close(library.host(rms_norm(library.array(x), out=out)), exact, slack, "float32")


def test_7_the_fallback_has_the_bias(library, rng):
    x, bias = rng.standard_normal((7, 3, 64)), rng.standard_normal(64)
    norm = HeadNorm(None, bias)
    y = library.host(norm.forward_reference(library.array(x)))
    exact, slack, _ = oracle("rms", x, None, bias, eps=1e-6)
    assert_close(y, exact, slack, "float64")


def test_8_infinities_and_nan_are_not_made_finite(library):
    x = np.ones((3, 2, 64), np.float16)
    x[1, 0, 3], x[2, 1, 0] = np.inf, np.nan
    y = library.host(rms_norm(library.array(x)))
    assert np.isnan(y[1, 0, 3])  # inf / inf
    assert (np.delete(y[1, 0], 3) == 0).all()  # 1 / inf
    assert np.isnan(y[2, 1]).all()
    assert np.isfinite(y[0]).all()
    assert np.isfinite(y[1, 1]).all()


# 9, bias after the rounding and 1 added in the weight's dtype, is in test_norms.py:
# test_offset_is_formed_in_float32 and test_bias_is_added_before_the_rounding.


def test_10_reading_the_weight_back_gives_what_the_file_held(tmp_path):
    weight, bias = np.full(64, 0.25, np.float16), np.full(64, 0.5, np.float32)
    HeadNorm(weight, bias, weight_offset=1).to_safetensors(tmp_path / "a.safetensors", "q_norm")
    norm = HeadNorm.from_safetensors(
        tmp_path / "a.safetensors", "q_norm", num_heads=32, head_dim=64, weight_offset=1
    )
    assert norm.weight.shape == (64,)
    np.testing.assert_array_equal(norm.weight, weight)
    np.testing.assert_array_equal(norm.bias, bias)


def test_11_a_missing_tensor_is_an_error_at_once(tmp_path):
    HeadNorm(np.ones(64, np.float32)).to_safetensors(tmp_path / "a.safetensors", "q_norm")
    with pytest.raises(CheckpointError, match="no tensor k_norm.weight; needs one of its keys"):
        HeadNorm.from_safetensors(tmp_path / "a.safetensors", "k_norm")


def test_12_epsilon_and_kind_belong_to_the_norm(library, rng):
    """Chameleon's fixed 1e-5, Gemma 4's two head sizes and an unweighted norm side by side."""
    for head_dim, kind, eps, weighted in ((256, "rms", 1e-6, True), (512, "layer", 1e-5, False)):
        weight = rng.standard_normal(head_dim).astype(np.float32) if weighted else None
        x = (rng.standard_normal((5, 2, head_dim)) * 1e-3).astype(np.float32)
        y = library.host(HeadNorm(weight, kind=kind, eps=eps)(library.array(x)))
        exact, slack, _ = oracle(kind, x, weight, eps=eps)
        assert_close(y, exact, slack, "float32")


def test_13_tensor_parallel_ranks_agree_with_the_whole(library, rng):
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    x = rng.standard_normal((5, 8, 64)).astype(np.float16)
    norm = HeadNorm(weight)
    whole = library.host(norm(library.array(x)))
    for rank in range(4):
        mine = slice(2 * rank, 2 * rank + 2)
        part = norm.heads(mine.start, mine.stop)(library.array(x[:, mine]))
        np.testing.assert_array_equal(library.host(part), whole[:, mine])
