"""
How many instructions a kernel is, held to a budget: on fast memory the kernels are bound by them.

All that a warp executes is in the text up to its last EXIT, and no loop is in the kernel of one
norm; of that of q and k the loop over a group's heads is run once a head.
"""

import pytest
from test_compile import nvrtc
from test_qk_compile import CHOICES, call_of

from cupy_headnorm._arrays.dtypes import BFLOAT16
from cupy_headnorm._cuda import sass
from cupy_headnorm._cuda.compiler import options_of
from cupy_headnorm._plans import head_norm, qk_norm_rope
from cupy_headnorm._rules.axes import RowAxis
from cupy_headnorm._rules.norm import NormCall, NormSpec

TARGET = "sm_90"
COUNTED_BY = (13, 0)
"""The version of NVRTC that `make test` takes. Another one may be a little off, so it has budgets
alone."""
NORMS = {
    # kind, head_dim, axes: budget, counted. A warp moves 32 vectors of 16 bytes of head_dim 128,
    # 48 of 96 and 192, and 36 of 72.
    ("rms", 128, 1): (95, 86),
    ("layer", 128, 1): (130, 112),
    ("rms", 128, 3): (110, 108),
    ("rms", 96, 1): (125, 120),
    ("layer", 96, 1): (160, 155),
    ("rms", 192, 1): (125, 122),
    ("layer", 192, 1): (165, 159),
    ("rms", 256, 1): (95, 90),
    ("layer", 256, 1): (130, 118),
    ("rms", 72, 1): (130, 128),
    ("layer", 72, 1): (170, 167),
}
QK = {
    "rows": (300, 293),
    "positions": (320, 311),
    None: (250, 239),
}
"""Of q and k, 128, rounded before the weight: with cosines given, by positions, not rotated."""


def held(file, macros, budget, counted):
    """Compile and count: NVRTC and the disassembler come with the tests, and neither is skipped."""
    version = nvrtc().getVersion()
    found = len(sass.listing(sass.cubin(file, options_of(macros), TARGET)))
    assert found <= budget
    if version == COUNTED_BY:
        assert found == counted, "more or fewer: write the new number down"


@pytest.mark.parametrize("chosen", NORMS, ids=lambda chosen: "-".join(map(str, chosen)))
def test_one_norm(chosen):
    kind, head_dim, axes = chosen
    spec = NormSpec(kind, BFLOAT16, BFLOAT16, None, head_dim, "once", False)
    # Strides of their own keep axes apart.
    rows = tuple(RowAxis(3, 7**i, 7**i, 0, 0) for i in range(axes))
    call = NormCall(spec, rows, 3**axes, 1e-6, 0.0, (16, 16, 16, 16))
    config = head_norm.plan(call)
    macros = head_norm.macros(spec, config, head_norm.memory_of(call, config))
    held("head_norm.cu", macros, *NORMS[chosen])


@pytest.mark.parametrize("by", QK)
def test_q_and_k(by):
    row = {name: choices[0] for name, choices in CHOICES.items()} | {"rounding": "before_weight"}
    row |= {"by": by} if by else {"style": None}
    call = call_of(row)
    macros = qk_norm_rope.macros(call.spec, qk_norm_rope.plan(call))
    held("qk_norm_rope.cu", macros, *QK[by])


def test_what_is_no_kernel_is_told():
    with pytest.raises(RuntimeError, match="nvdisasm reads no kernel"):
        sass.listing(b"no kernel")


def test_a_missing_disassembler_is_told(monkeypatch):
    monkeypatch.setattr(sass, "disassembler", lambda: "")
    with pytest.raises(RuntimeError, match=f"needs: pip install {sass.PACKAGE}"):
        sass.listing(b"")
