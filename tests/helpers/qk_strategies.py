"""Calls of QKNorm, drawn for the property tests: see strategies.py."""

from typing import NamedTuple

import numpy as np
import qk_cases
from hypothesis import strategies as st
from strategies import (
    ELEMENTS,
    KINDS,
    SPOILT,
    Buffer,
    Place,
    alignment_of,
    off_boundaries,
    shifts,
    shown,
    sizes,
    strides,
)


class QKKey(NamedTuple):
    """Kernels of QKNorm, but for the number of axes."""

    case: qk_cases.Case
    """Its heads and tokens are drawn anew."""
    access: int | None = None
    """As in `NormKey`."""
    table_access: int | None = None
    """The same of cosines and sines that are given."""

    @property
    def alignment(self):
        """Bytes that q, k and v are aligned to."""
        return alignment_of(self.case.head_dim, self.case.dtype.itemsize, self.access)

    @property
    def table_alignments(self):
        """Bytes that cosines and sines are aligned to, and how many are of use."""
        case, itemsize = self.case, self.case.of_table.itemsize
        most = alignment_of(case.head_dim, case.dtype.itemsize) // case.dtype.itemsize * itemsize
        most = min(16, most)
        return most if self.table_access is None else self.table_access * itemsize, most


def _key(access=None, table_access=None, **changes):
    return QKKey(qk_cases.DEFAULT._replace(**changes), access, table_access)


QK_KEYS = (
    _key(),
    _key(by="int32", partial=True, v=True),
    _key(access=1),
    _key(by=None, weight="own x", v=True),
    _key(by=None, kind="layer", bias="own x", rounding="once", access=2),
    _key(by="whole x"),
    _key(by="whole x", access=4, table_access=1, head_dim=64),
    _key(by="half x", style="interleaved", rounding="every_op", bias="shared x"),
    _key(by="half float32", every_op=False, table="float32", table_access=2),
    _key(by="whole float32", every_op=False, table="float32", first=True, weight="own float32"),
    _key(by="chunks of sections", head_dim=64, weight="shared float32", offset=1.0),
    _key(by="interleaved sections", rounding="once", weight="own float32"),
    _key(head_dim=256, every_op=False, table="float32", first=True),
    _key(x="float16", head_dim=80, style="half flipped", first=True),
    _key(
        x="float16", head_dim=96, kind="layer", weight="own x", bias="own float32", v=True, access=1
    ),
    _key(x="float16", head_dim=33, by="half x", style="interleaved", table_access=1),
    _key(x="float16", head_dim=2, by="int32", weight=None),
    _key(x="float16", head_dim=160, every_op=False, weight="shared float32", rounding="once"),
    _key(x="float16", head_dim=2048, by="int32", partial=True),
    _key(x="float32", head_dim=128, rounding="once", first=True, kind="layer"),
    _key(x="float32", head_dim=64, style="interleaved", by="whole x", access=1, weight="own x"),
    _key(x="float32", head_dim=100, partial=True, offset=1.0, v=True, rounding="every_op"),
    _key(x="float32", head_dim=10, by="half x", every_op=False, table_access=1, bias="own float32"),
    _key(x="float32", head_dim=512, by=None, weight="own x"),
    _key(x="float64", head_dim=64, weight="own float64"),
    _key(x="float64", head_dim=36, by="half x", style="half flipped", access=1, kind="layer"),
    _key(x="float64", head_dim=128, every_op=False, weight=None, first=True, v=True, by="int32"),
)  # fmt: skip


def qk_norm(case, rng, heads, eps):
    """Return a QKNorm and, for each part, weight, bias and options."""
    norms = [case.norm(rng, n) for n in heads]
    norms = [(w, b, options | {"eps": e}) for (w, b, options), e in zip(norms, eps, strict=True)]
    if case.v and case.bias and rng.integers(2):
        (weight, _, of_q), (_, bias, of_k) = norms
        norms = [(weight, None, of_q), (None, bias, of_k)]
    if case.v:
        norms.append((None, None, norms[0][2] | {"weight_offset": 0.0}))
    return qk_cases.qk_norm(case, norms), norms


class QKCase(NamedTuple):
    """One call of QKNorm."""

    key: QKKey
    places: dict[str, Place]
    """Of q, k and v, "out of q" and so on, cos, sin, positions, and of a packed buffer."""
    size: int
    """Of the buffer."""
    in_place: bool
    """`out` is the parts themselves."""
    heads_axis: int
    eps: tuple[float, float]
    """Of the norms of q and of k."""
    kinds: tuple[str, ...]
    """Of rows, of `KINDS`."""
    seed: int
    """Of all values."""
    lengths: tuple[None, ...]
    """As many calls follow one another, all of one length."""
    fault: str | None
    refusal: tuple[type, str] | None
    """What a fault is refused with."""

    __repr__ = shown

    @property
    def case(self):
        return self.key.case

    @property
    def heads_at(self):
        """Which axis is that of the heads."""
        return self.heads_axis % len(self.places["q"].shape)

    @property
    def parts(self):
        return ("q", "k", "v") if self.case.v else ("q", "k")

    @property
    def outs(self):
        """Names of what is written, where that is given."""
        names = [f"out of {name}" for name in self.parts]
        return names if names[0] in self.places else []


def _beside(draw, tokens):
    """Draw a shape that broadcasts to that of the tokens."""
    shape = [1 if draw(st.integers(0, 4)) == 4 else n for n in tokens]
    return shape[draw(st.sampled_from((0, 0, 0, 1, len(shape)))) :]


def _qk_faults(backend, case):
    """Yield the ways to spoil a call, as `_faults`."""
    q, k = case.places["q"], case.places["k"]

    def without(*names, **more):
        return {"places": {n: p for n, p in case.places.items() if n not in names} | more}

    yield "heads_axis", {"heads_axis": -1}, (ValueError, "heads_axis is -1")
    yield "another dtype", without(k=k._replace(dtype=np.dtype("i2"))), (TypeError, "k has dtype")
    fewer = k._replace(shape=k.shape[1:], strides=k.strides[1:])
    yield "fewer axes", without(k=fewer), (ValueError, "needs as many axes as q|needs heads on")
    if case.case.v:
        yield "no v", without("v", "out of v"), (TypeError, "no v is given|needs a tuple of 3")
    else:
        yield "v", without(v=q), (TypeError, "v is given and there is no v_norm")
    if case.outs and not case.in_place:
        yield "one out", without("out of k"), (TypeError, "out is a tuple; needs a tuple of")
    rotated_by = [n for n in ("positions", "cos", "sin") if n in case.places]
    if rotated_by:
        yield (
            "nothing to rotate by",
            without(*rotated_by),
            (ValueError, "given to rotate by: nothing"),
        )
    else:
        yield "positions", without(positions=q), (ValueError, "there is no rope")
    if "positions" in case.places:
        positions = case.places["positions"]
        floats = positions._replace(dtype=np.dtype(f"f{positions.dtype.itemsize}"))
        yield "positions of floats", without(positions=floats), (TypeError, "positions has dtype")
        many = (*positions.shape[:1], *(1 for _ in q.shape), *positions.shape[1:])
        more = positions._replace(shape=many, strides=(8,) * len(many))
        if 0 not in many and positions.offset + more.reach[1] <= case.size:
            yield "shape of positions", without(positions=more), (ValueError, "broadcasts to it")
        half, size = positions.dtype.itemsize // 2, positions.dtype.itemsize
        refusal = ValueError, f"positions are aligned to {half} bytes; needs {size}"
        if backend.odd_addresses and 0 not in positions.shape:
            off = positions._replace(offset=positions.offset + half)
            yield "address of positions", without(positions=off), refusal
            steps = [step - half if step > 0 else step + half for step in positions.strides]
            off = positions._replace(strides=(*steps,))
            if max(positions.shape, default=1) > 1 and off.offset + off.reach[1] <= case.size:
                yield "strides of positions", without(positions=off), refusal
    if "cos" in case.places:
        cos = case.places["cos"]
        wider = cos._replace(shape=(*cos.shape[:-1], cos.shape[-1] + 1))
        yield "width of cos", without(cos=wider), (ValueError, "cos has shape")
        yield "cos alone", without("sin"), (ValueError, "given to rotate by: cos;")


@st.composite
def drawn_qk_case(draw, backend, keys):
    """Draw a call of QKNorm."""
    key, spoilt = draw(st.sampled_from(keys)), draw(SPOILT)
    of = key.case
    head_dim, dtype, itemsize = of.head_dim, of.dtype.numpy, of.dtype.itemsize
    whole, unit = alignment_of(head_dim, itemsize), key.alignment
    budget = max(2, ELEMENTS // head_dim)
    # What is spoilt is none of a packed buffer's.
    how = draw(st.sampled_from(("packed", "one buffer", "apart")[spoilt:]))
    # No heads: where the arrays' addresses do not matter.
    fewest = draw(st.integers(0, 15)) < 15 or how == "packed" or key.access is not None
    fewest = 1 if fewest or "own" in f"{of.weight}{of.bias}" else 0
    heads = [draw(st.integers(fewest, min(5, budget // 2))) for _ in "qk"]
    tokens = sizes(draw, 8 if backend.kernels else 5, budget // max(1, sum(heads)))
    heads = [*heads, heads[1]]
    if draw(st.integers(0, 29)) == 29 and tokens:
        tokens[0] = 0
    heads_at = len(tokens)
    if how != "packed" and draw(st.booleans()):
        heads_at = draw(st.integers(0, len(tokens)))
    shape = (*tokens[:heads_at], 0, *tokens[heads_at:], head_dim)

    def of_heads(n):
        return (*shape[:heads_at], n, *shape[heads_at + 1 :])

    buffer, places = Buffer(draw), {}
    names = ("q", "k", "v") if of.v else ("q", "k")
    where = draw(
        st.sampled_from(("absent", "in place", "apart", "the same places", "swapped", "shifted"))
    )
    where = "in place" if how == "packed" else where

    # What is off the boundaries of `whole` bytes: every address, or one stride of one array.
    off = draw(st.sampled_from((None, "parts", "outs"))) if unit < whole else None
    if off and how == "packed":
        off = "parts"
    elif off == "outs" or (off and where != "absent"):
        where = "apart"
    between = whole if off else unit
    written = where in ("in place", "the same places")

    def slices(distinct, shift, off):
        """Return places of q, k and v in one buffer."""
        whole_shape = of_heads(sum(heads))
        steps = strides(draw, whole_shape, dtype, between, backend, distinct=distinct)
        if off:
            steps, shift = off_boundaries(whole_shape, steps, unit)
        qkv = buffer.place(whole_shape, steps, dtype, shift, slack=unit)
        ends = np.cumsum([0, *heads])
        return [qkv.cut(heads_at, int(ends[i]), int(ends[i + 1])) for i in range(3)]

    def apart(distinct, shift, off):
        found, one = [], draw(st.sampled_from(names)) if off else None
        for name, n in zip("qkv", heads, strict=True):
            steps = strides(draw, of_heads(n), dtype, between, backend, distinct=distinct)
            if name == one:
                steps, shift = off_boundaries(of_heads(n), steps, unit)
            found.append(buffer.place(of_heads(n), steps, dtype, shift, slack=unit))
            shift = between * draw(st.integers(0, 3))
        return found

    shift = 0 if off else shifts(draw, unit, whole)
    if how == "packed":
        width = sum(heads) * head_dim
        steps = strides(draw, (*tokens, width), dtype, between, backend, distinct=True)
        if off:
            steps, shift = off_boundaries((*tokens, width), steps, unit)
        qkv = places["qkv"] = buffer.place((*tokens, width), steps, dtype, shift)
        by_head = qkv._replace(
            shape=of_heads(sum(heads)), strides=(*steps[:-1], head_dim * itemsize, itemsize)
        )
        ends = np.cumsum([0, *heads])
        parts = [by_head.cut(heads_at, int(ends[i]), int(ends[i + 1])) for i in range(3)]
    else:
        parts = (slices if how == "one buffer" else apart)(written, shift, off == "parts")
    places |= dict(zip(names, parts, strict=False))
    if where == "shifted":
        outs = [part._replace(offset=part.offset + unit) for part in parts]
    elif where == "swapped":
        outs = [parts[1], parts[0], parts[2]] if heads[0] == heads[1] else parts
    elif where == "apart":
        shift = between * draw(st.integers(0, 3))
        outs = draw(st.sampled_from((slices, apart)))(True, shift, off == "outs")
    else:
        outs = parts if written else []
    places |= {f"out of {n}": out for n, out in zip(names, outs, strict=False)}
    # What rotates.
    if of.by_positions:
        positions = np.dtype(np.int32 if of.by == "int32" else np.int64)
        beside = _beside(draw, tokens)
        if "sections" in of.by:
            beside = [3, *beside] if beside or not tokens else [3, 1]  # (3,) might be of 3 tokens
        size = positions.itemsize
        # The last stride is free too.
        steps = strides(draw, (*beside, 1), positions, size, backend)[:-1]
        at = size * draw(st.integers(0, 16 // size - 1))
        places["positions"] = buffer.place(beside, steps, positions, at)
    elif of.by:
        table = of.of_table.numpy
        step, most = key.table_alignments
        beside = (*_beside(draw, tokens), of.table_width)
        between = most if step < most and draw(st.booleans()) else step
        steps = strides(draw, beside, table, between, backend)
        at = shifts(draw, step, most)
        if between > step:
            steps, at = off_boundaries(beside, steps, step)
        places["cos"] = buffer.place(beside, steps, table, at)
        places["sin"] = buffer.place(beside, steps, table, between * draw(st.integers(0, 3)))
    kinds = draw(st.sampled_from((("normal",), ("normal", "zeros", "one"), KINDS)))
    heads_axis = heads_at - len(shape) if how == "packed" or draw(st.booleans()) else heads_at
    eps = [draw(st.sampled_from((1e-5, 1e-6, 1e-3))) for _ in "qk"]
    case = QKCase(
        key, places, buffer.end, written and where == "in place", heads_axis, tuple(eps), kinds,
        draw(st.integers(0, 2**32 - 1)), (None,), None, None,
    )  # fmt: skip
    if spoilt:
        name, changes, refusal = draw(st.sampled_from(list(_qk_faults(backend, case))))
        return case._replace(**changes, fault=name, refusal=refusal)
    return case._replace(lengths=draw(st.sampled_from(((None,), (None, None)))))
