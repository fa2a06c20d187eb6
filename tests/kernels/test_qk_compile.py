"""NVRTC compiles the kernel of q, k and v without a GPU: no warning, no spill."""

import pytest
from allpairspy import AllPairs
from test_compile import assert_none_spilt, built, pytest_generate_tests  # noqa: F401

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.layout import Device, Layout
from cupy_headnorm._plans import qk_norm_rope
from cupy_headnorm._rules import options as option_rules
from cupy_headnorm._rules import parts, rotary

TOKENS, HEADS = 4096, {"q": 32, "k": 8, "v": 8}
BY_NAME = {dtype.name: dtype for dtype in dtypes.DTYPES} | {None: None}
CHOICES = {
    "x": ("bfloat16", "float16", "float32", "float64"),
    # No warp is full, odd, vectors of 8 and of 4 elements, the widest of one warp, whole blocks.
    "head_dim": (128, 10, 33, 64, 80, 100, 512, 1024),
    "style": ("half", "interleaved", "half flipped"),
    "table": ("x", "float32"),
    "by": ("positions", "rows", "sections"),
    "by_other": (False, True),
    "rounding": ("once", "before_weight", "every_op"),
    "kind": ("rms", "layer"),
    "weight": ("x", None, "float32"),
    "bias": (None, "x"),
    "every_op": (True, False),
    "first": (False, True),
    "partial": (False, True),
    "offset": (0.0, 1.0),
    "aligned": (True, False),
    "v": (False, True),
}


def supported(row):
    chosen = dict(zip(CHOICES, row, strict=False))
    return chosen.get("weight", "x") is not None or not chosen.get("offset")


def placed(shape, dtype, *, aligned=True, row=None):
    """Return a layout in CUDA memory, whose rows are apart if `row` tells by how much."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step * dtype.itemsize)
        step = step * n if row is None or len(strides) > 1 else row
    alignment = 16 if aligned else dtype.itemsize
    return Layout(tuple(shape), tuple(reversed(strides)), dtype, Device("cuda", 0), alignment)


def call_of(c):
    """Return the validated call of a row of `CHOICES`."""
    x, head_dim = BY_NAME[c["x"]], c["head_dim"]
    dtype = lambda name: x if name == "x" else BY_NAME[name]  # noqa: E731
    parameter = {n: c[n] and placed((head_dim,), dtype(c[n])) for n in ("weight", "bias")}
    options = option_rules.options(
        c["kind"], head_dim=head_dim, rounding=c["rounding"], weight_offset=c["offset"]
    )
    heads = {name: n for name, n in HEADS.items() if name != "v" or c["v"]}
    norms = dict.fromkeys(heads, parts.PartNorm(options, **parameter))
    rows = {
        name: placed(
            (TOKENS, n, head_dim), x, aligned=c["aligned"], row=head_dim + 1 - c["aligned"]
        )
        for name, n in heads.items()
    }
    rotation = None
    if c["style"]:
        rotary_dim = max(head_dim // (4 if c["partial"] else 2) * 2, 4)
        by, other, positions = c["by"], c["by_other"], None
        sections = (rotary_dim // 2 - 2, 1, 1) if by == "sections" and rotary_dim > 6 else ()
        if by != "rows":
            position = dtypes.INT32 if other else dtypes.INT64
            positions = placed((*([3] if sections else []), TOKENS), position)
        width = rotary_dim if by == "rows" and not other else rotary_dim // 2
        table = placed((TOKENS, width), dtype(c["table"]), aligned=c["aligned"])
        rotation = rotary.Rotation(
            c["style"], c["first"], rotary_dim, c["every_op"], sections, other,
            tuple(name != "v" for name in heads), table, table, positions,
        )  # fmt: skip
    return parts.describe(norms, rows, rows, rotation, -2)


def covering():
    names, values = CHOICES.keys(), list(CHOICES.values())
    rows = [dict(zip(names, row, strict=True)) for row in AllPairs(values, filter_func=supported)]
    default = {name: choices[0] for name, choices in CHOICES.items()}
    # Qwen3-VL, and without rotation.
    rows += [default | c for c in ({"by": "sections", "by_other": True}, {"style": None})]
    return [call_of(row) for row in rows]


def configs(call):
    """Yield how the call runs, and how it does beside axes that do not merge."""
    config = qk_norm_rope.plan(call)
    yield config
    yield config._replace(axes=qk_norm_rope.AXES[-1])


def identified(call):
    return f"{call.spec.name}_{call.alignment}"


COVERING = covering()


def test_as_many_as_promised():
    assert 32 <= len(COVERING) <= 44


@pytest.mark.parametrize("call", COVERING, ids=identified)
def test_compiles_without_spills(call, architecture, request):
    chosen = list(configs(call))
    if architecture != 90 and not request.config.getoption("--all-architectures"):
        chosen = chosen[:1]
    for config in chosen:
        macros = qk_norm_rope.macros(call.spec, config)
        log, _ = built("qk_norm_rope.cu", macros, f"sm_{architecture}")
        assert macros["HN_NAME"] in log
        assert_none_spilt(log)
