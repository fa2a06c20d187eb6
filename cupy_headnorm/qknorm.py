"""The class that normalizes queries and keys, and turns them by their positions, in one launch."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_headnorm import (
    _dtypes,
    _interop,
    _kernels,
    _parts,
    _parts_kernels,
    _spec,
    reference,
)
from cupy_headnorm import rope as rotary
from cupy_headnorm._arrays import ArrayView, Library
from cupy_headnorm._dispatch import identity, store
from cupy_headnorm._interop import quick
from cupy_headnorm._parts import PartNorm, PartsCall, Turning
from cupy_headnorm._torch import untraced
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.rope import Rope

_NAMES = ("q", "k", "v")


class QKNorm:
    r"""
    Normalize queries and keys, each with its own norm, and turn them by their positions.

    One launch reads q, k and, with a `v_norm`, v once and writes each once.

    Parameters
    ----------
    q_norm, k_norm : HeadNorm
        Of one kind, one rounding and one head_dim; weights of one dtype, biases too.
    v_norm : HeadNorm, optional
        Normalizes v, which is not turned (Gemma 3n and 4: ``HeadNorm(head_dim=256)``). Default:
        calls take no v.
    rope : Rope, optional
        The rotary embedding. Default: none.

    Raises
    ------
    TypeError, ValueError
        The norms do not go together; the message says what was given and what is needed.

    Notes
    -----
    Without `rope` the results are those of the norms one by one, bit for bit. With it they are
    first rounded to x's dtype, as between a model's modules, and turned then (or the other way
    round, where ``rope.order`` is ``"before norm"``).

    Streams, graphs, threads, results and errors are as `HeadNorm` has them. Positions are read by
    the kernel, not by the host: those outside of the table are clamped to its ends.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_headnorm import HeadNorm, QKNorm, Rope
    >>> norm = HeadNorm(np.ones(4, np.float32))
    >>> qk = QKNorm(norm, norm, rope=Rope.of_theta(10000.0, 4, max_position=16))
    >>> q, k = np.ones((3, 2, 4), np.float32), np.ones((3, 1, 4), np.float32)  # 3 tokens
    >>> q, k = qk(q, k, positions=np.arange(3))
    >>> q[:, 0].round(3)
    array([[ 1.   ,  1.   ,  1.   ,  1.   ],
           [-0.301,  0.99 ,  1.382,  1.01 ],
           [-1.325,  0.98 ,  0.493,  1.02 ]], dtype=float32)
    """

    def __init__(
        self,
        q_norm: HeadNorm,
        k_norm: HeadNorm,
        v_norm: HeadNorm | None = None,
        *,
        rope: Rope | None = None,
    ) -> None:
        given = {"q_norm": q_norm, "k_norm": k_norm}
        given |= {} if v_norm is None else {"v_norm": v_norm}
        for name, norm in given.items():
            if not isinstance(norm, HeadNorm):
                raise TypeError(f"{name} is a {type(norm).__name__}; needs a HeadNorm")
        if rope is not None and not isinstance(rope, Rope):
            raise TypeError(f"rope is a {type(rope).__name__}; needs a cupy_headnorm.Rope")
        self._norms = dict(zip(_NAMES, given.values(), strict=False))
        self._rope = rope
        _parts.check_norms({name: norm._part() for name, norm in self._norms.items()})
        head_dim = next((n.head_dim for n in given.values() if n.head_dim is not None), None)
        if rope is not None and head_dim is not None:
            rope.check(head_dim)
        self._tables = _Tables(rope)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | os.PathLike[str],
        layer: int,
        *,
        variant: str | None = None,
        max_position: int | None = None,
    ) -> QKNorm:
        """
        Return what one layer of a Hugging Face model does to q and k, and to v where it norms v.

        `max_position` is the length of the tables; default: the config's max_position_embeddings.
        A layer without a rotary embedding (``no_rope_layers``) has none here.

        Raises
        ------
        CheckpointError
            As `HeadNorm.from_pretrained`.
        ValueError
            The rotary embedding is not served (`cupy_headnorm.rope.Rope.from_config`).
        """
        from cupy_headnorm import pretrained
        from cupy_headnorm.checkpoint import CheckpointError

        norms = pretrained.head_norms(model_dir, variant=variant)
        layer = _spec.integer(layer, "layer")
        for name in "qk":
            try:
                norms[layer, name]
            except KeyError:
                raise CheckpointError(
                    f"{model_dir} has no norm of {name} in layer {layer}; needs one of its keys, "
                    f"{', '.join(map(str, list(norms)[:4])) or 'of which there are none'}"
                ) from None
        found = [norms[layer, name] for name in _NAMES if (layer, name) in norms]
        described = norms.described[layer, "q"]
        embedding = None
        if described.rope.order != "none" and rotary.turns(norms.config, layer):
            embedding = Rope.from_config(
                norms.config, layer, head_dim=described.head_dim, max_position=max_position
            )
        return cls(*found, rope=embedding)

    @property
    def rope(self) -> Rope | None:
        """The rotary embedding."""
        return self._rope

    @property
    def norms(self) -> Mapping[str, HeadNorm]:
        """The norms by part: ``q``, ``k`` and, if there is one, ``v``."""
        return dict(self._norms)

    def __repr__(self) -> str:
        words = [repr(norm) for norm in self._norms.values()]
        if self._rope is not None:
            r = self._rope
            words.append(f"rope=<{r.style}, rotary_dim={r.rotary_dim}, {r.order}>")
        return f"QKNorm({', '.join(words)})"

    def __reduce__(self) -> tuple[Any, ...]:
        norms = (*self._norms.values(), None)[:3]
        return _rebuilt, (norms, self._rope)

    @untraced
    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any = None,
        /,
        *,
        positions: Any = None,
        cos: Any = None,
        sin: Any = None,
        heads_axis: int = -2,
        out: Any = None,
    ) -> tuple[Any, ...]:
        """
        Normalize and turn.

        Parameters
        ----------
        q, k, v : array
            ``(..., num_heads, head_dim)`` each, of one dtype, device and library, and of the same
            tokens; slices of one buffer are as good as arrays of their own. v if there is a
            `v_norm`, and only then.
        positions : array of int32 or int64, optional
            Shape of q without heads and head_dim, or what broadcasts to it, such as ``(tokens,)``.
            With sections (M-RoPE) one row for each of them in front: ``(3, ...)``.
        cos, sin : array, optional
            In place of `positions`: those of each token, ``(..., rotary_dim)`` as models have them
            or ``(..., rotary_dim / 2)``, float32 or q's dtype, broadcast to q's tokens.
        heads_axis : int, optional
            As in `HeadNorm`. Default: ``-2``.
        out : tuple of arrays, optional
            One for each part, ``(q, k)`` for in place. Default: new arrays.

        Returns
        -------
        tuple of arrays
            As many as were given.
        """
        parts = (q, k) if v is None else (q, k, v)
        if out is not None:
            out = self._checked_out(out)
        if type(heads_axis) is not int:  # what equals one may be none: -2.0
            heads_axis = _spec.integer(heads_axis, "heads_axis")
        arrays = _Arrays(parts, positions, cos, sin, out)
        if len(parts) == len(self._norms):
            results = _known(self, arrays, heads_axis)
            if results is not None:
                return results
        return self._step_by_step(arrays, heads_axis)

    def packed(
        self,
        qkv: Any,
        /,
        *,
        num_heads: int,
        num_kv_heads: int,
        positions: Any = None,
        cos: Any = None,
        sin: Any = None,
    ) -> Any:
        """
        Work in place on a packed buffer ``(..., (num_heads + 2 num_kv_heads) * head_dim)``.

        Queries come first, then keys, then values, which only a `v_norm` touches. Returns `qkv`.
        """
        library = _interop.library_of(qkv, "qkv")
        num_heads = _spec.count(_spec.integer(num_heads, "num_heads"), "num_heads")
        num_kv_heads = _spec.count(_spec.integer(num_kv_heads, "num_kv_heads"), "num_kv_heads")
        heads = num_heads + 2 * num_kv_heads
        shape = tuple(qkv.shape)
        width = shape[-1] if shape else 0
        head_dim = self._norms["q"].head_dim or self._norms["k"].head_dim or width // heads
        if width != heads * head_dim or not head_dim:
            raise ValueError(
                f"qkv has shape {shape}; needs a last axis of {heads * head_dim}, "
                f"{num_heads} + 2 * {num_kv_heads} heads of {head_dim}"
            )
        if not library.takes_out:
            raise TypeError(
                f"qkv is a {type(qkv).__name__}, which may forbid writing; needs a NumPy, CuPy or "
                "torch array"
            )
        by_head = _split_last(qkv, (*shape[:-1], heads, head_dim))
        first_v = num_heads + num_kv_heads
        parts = [by_head[..., :num_heads, :], by_head[..., num_heads:first_v, :]]
        if "v" in self._norms:
            parts.append(by_head[..., first_v:, :])
        self(*parts, positions=positions, cos=cos, sin=sin, out=tuple(parts))
        return qkv

    def load(self, device: Any = None) -> None:
        """
        Upload the norms to a CUDA device and wait; see `HeadNorm.load`.

        The tables, whose dtype is that of x, follow with the first call or `warmup`.
        """
        for norm in self._norms.values():
            norm.load(device)

    def unload(self) -> None:
        """Wait for the work in flight and free every device copy; the next use uploads again."""
        for norm in self._norms.values():
            norm.unload()
        self._tables.unload()

    def warmup(
        self,
        q: Any,
        k: Any,
        v: Any = None,
        /,
        *,
        positions: Any = None,
        cos: Any = None,
        sin: Any = None,
        heads_axis: int = -2,
        out: Any = None,
    ) -> None:
        """Load, compile and plan for arrays laid out like these; they stay as they are."""
        parts = (q, k) if v is None else (q, k, v)
        for target in (None, parts) if out is None else (self._checked_out(out),):
            arrays = _Arrays(parts, positions, cos, sin, target)
            try:
                self._step_by_step(arrays, heads_axis, dry=True)
            except (TypeError, ValueError):
                if target is not parts:
                    raise
                # Parts may be arrays that cannot be written; then there is nothing to prepare.

    def _checked_out(self, out: Any) -> tuple[Any, ...]:
        count = len(self._norms)
        if not isinstance(out, (tuple, list)) or len(out) != count:
            raise TypeError(f"out is a {type(out).__name__}; needs a tuple of {count} arrays")
        return tuple(out)

    def _step_by_step(
        self, arrays: _Arrays, heads_axis: int, *, dry: bool = False
    ) -> tuple[Any, ...]:
        """Run a call with every check, and remember it."""
        parts, positions, cos, sin, out = arrays
        heads_axis = _spec.checked_heads_axis(heads_axis)
        if len(parts) != len(self._norms):
            raise TypeError(
                "v is given and there is no v_norm; needs q and k only"
                if len(parts) > len(self._norms)
                else "no v is given; needs one for v_norm"
            )
        names = tuple(self._norms)
        q = _interop.view(parts[0], "q")
        library, device = q.library, q.layout.device
        views = {"q": q}
        for name, array in zip(names[1:], parts[1:], strict=True):
            views[name] = _interop.view_beside(q, array, name, of="q")
        on_gpu = device.kind == "cuda"
        stream = library.stream(device.index) if on_gpu else 0
        norms = {name: norm._part_beside(q) for name, norm in self._norms.items()}
        turning, tables = self._turning(q, positions, cos, sin, stream)
        made = [None] * len(parts)
        if out is None:
            if on_gpu and not library.allocates_in_graphs:
                _kernels.refuse_capture(stream, "a result without out would be allocated")
            results, made = zip(*(library.empty_like(v) for v in views.values()), strict=True)
            outs = {n: _interop.view(r, "result") for n, r in zip(names, results, strict=True)}
        else:
            results = out
            outs = {
                name: views[name]
                if target is array and library.takes_out
                else _interop.view_beside(q, target, "out", of="q")
                for name, target, array in zip(names, results, parts, strict=True)
            }
            for name, view in outs.items():
                if not view.writeable:
                    raise ValueError(f"out of {name} is read-only; needs a writeable array")
        described = {
            name: PartNorm(options, weight and weight.layout, bias and bias.layout)
            for name, (options, weight, bias) in norms.items()
        }
        layouts = [{n: view.layout for n, view in found.items()} for found in (views, outs)]
        key = (*described.items(), *(tuple(one.values()) for one in layouts), turning, heads_axis)
        plan = _plans.get(key)
        if plan is None:
            call = _parts.describe(described, *layouts, turning, heads_axis)
            for view in outs.values():
                _spec.check_out_layout(view.layout)
            runs = on_gpu and call.tokens and any(part.num_heads for part in call.parts)
            launch = _parts_kernels.prepare(call, device.index, stream) if runs else None
            plan = _Plan(call, launch)
            store(_plans, key, plan)
        if out is not None:
            beside = dict(zip(("cos", "sin", "positions"), tables, strict=True))
            for name, (_, weight, bias) in norms.items():
                beside |= {f"the weight of {name}": weight, f"the bias of {name}": bias}
            _check_overlaps(views, outs, beside)
        if plan.launch is not None:
            run = _parts_kernels.runner(plan.launch)
            _remember(self, library, arrays, heads_axis, run, made, (views, outs, tables))
        if dry:
            return ()
        if plan.launch is not None:
            addresses = []
            for name, (_, *held) in norms.items():
                addresses += [views[name].pointer, outs[name].pointer]
                addresses += [0 if view is None else view.pointer for view in held]
            addresses += [0] * (4 * (_parts.PARTS - len(norms)))
            run(stream, *addresses, *(0 if view is None else view.pointer for view in tables))
            library.launched((*views.values(), *tables), device.index, stream)
        elif not on_gpu:
            _on_host(self._rope, turning, norms, views, outs, tables, heads_axis)
        if out is None:
            return tuple(
                library.deliver(result, view)
                for result, view in zip(results, views.values(), strict=True)
            )
        for result in results:
            library.wrote((result,))
        return results

    def _turning(
        self, q: ArrayView, positions: Any, cos: Any, sin: Any, stream: int
    ) -> tuple[Turning | None, tuple[ArrayView | None, ...]]:
        """Describe the rotary embedding of a call; return views of cos, sin and positions too."""
        rope = self._rope
        given = [
            n for n, a in (("positions", positions), ("cos", cos), ("sin", sin)) if a is not None
        ]
        if rope is None:
            if given:
                raise ValueError(
                    f"{given[0]} is given and there is no rope; needs QKNorm(rope=...)"
                )
            return None, (None, None, None)
        if given not in (["positions"], ["cos", "sin"]):
            raise ValueError(
                f"given to turn by: {', '.join(given) or 'nothing'}; needs positions alone, or cos "
                "and sin"
            )
        seen = None
        if positions is None:
            tables = [
                _interop.view_beside(q, a, n, of="q") for n, a in (("cos", cos), ("sin", sin))
            ]
        else:
            seen = _interop.view_beside(q, positions, "positions", _dtypes.POSITIONS, of="q")
            tables = self._tables.beside(q, stream)
        turning = Turning(
            rope.style,
            rope.order == "before norm",
            rope.rotary_dim,
            rope.rounding == "every_op",
            rope.sections if positions is not None else (),
            rope.interleaved_sections,
            tuple(name != "v" for name in self._norms),
            *(table.layout for table in tables),
            None if seen is None else seen.layout,
        )
        return turning, (*tables, seen)


class _Tables:
    """A rotary embedding's cosines and sines in each memory and dtype where they were needed."""

    def __init__(self, rope: Rope | None) -> None:
        self._rope = rope
        self._lock = threading.Lock()
        self.identity = identity(rope)
        self.ready: dict[tuple[str, int, str], tuple[ArrayView, ArrayView]] = {}
        self.addresses: dict[tuple[int, Any], tuple[int, int]] = {}
        """Of cosines and sines, by CUDA device and the library's own dtype of q."""

    def beside(self, q: ArrayView, stream: int) -> tuple[ArrayView, ArrayView]:
        """Return views of both for arrays like `q`."""
        device, dtype = q.layout.device, q.layout.dtype
        if self._rope.table == "float32" and dtype.name != "float64":
            dtype = _dtypes.FLOAT32
        key = (*device, dtype.name)
        found = self.ready.get(key)
        if found is None:
            if device.kind == "cuda":
                _kernels.refuse_capture(stream, f"the tables are not on {device} yet")
            with self._lock:
                found = self.ready.get(key)
                if found is None:
                    tables = self._rope.tables(dtype.numpy)
                    if device.kind == "cuda":
                        found = tuple(_interop.upload(table, device.index) for table in tables)
                    else:
                        found = tuple(_interop.view(table, "table") for table in tables)
                    self.ready[key] = found
        return found

    def unload(self) -> None:
        """Wait for the work in flight and free every device copy."""
        with self._lock:
            held, self.ready, self.addresses = self.ready, {}, {}
        for index in {index for kind, index, _ in held if kind == "cuda"}:
            _interop.synchronize(index)


class _Plan(NamedTuple):
    call: PartsCall
    launch: _parts_kernels.PartsLaunch | None
    """None where the reference runs, or nothing."""


_plans: dict[tuple[Any, ...], _Plan] = {}
"""Those of all threads."""


class _Arrays(NamedTuple):
    """What a caller gave."""

    parts: tuple[Any, ...]
    positions: Any
    cos: Any
    sin: Any
    out: tuple[Any, ...] | None

    @property
    def in_place(self) -> bool:
        """Whether each part is its own `out`."""
        return self.out is not None and all(map(operator.is_, self.out, self.parts))

    def each(self) -> list[Any]:
        """Return all that are there, those of `out` last if they are others."""
        beside = [a for a in (self.positions, self.cos, self.sin) if a is not None]
        return [*self.parts, *beside, *(() if self.in_place else self.out or ())]


class _Known(NamedTuple):
    """A call that this thread has run before."""

    run: Any
    """Launches, from a stream and the addresses of the kernel's parameters."""
    makes: tuple[Any, ...]
    """Make the results, where none are given."""
    alignments: tuple[int, ...]
    """That the results' addresses need, where none are given."""
    reach: tuple[tuple[int, int], ...]
    """Of each array of the caller: first byte and byte after the last, from its address."""
    places: tuple[int, ...]
    """Of each array of the caller, from the first one: these were seen not to overlap."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], _Known] = {}


_thread = _Thread()


def _glances(
    qk: QKNorm, library: Library, arrays: _Arrays, heads_axis: int
) -> tuple[tuple[Any, ...], list[int], list[int]] | None:
    """
    Look at a call's arrays; None where they need more than a look.

    Returns a key of all that its plan depends on, the addresses of the arrays, and those of the
    norms' weights and biases and of the tables.
    """
    addresses, keys = [], []
    for array in arrays.each():
        seen = library.glance(array) if quick.get(type(array)) is library else None
        if seen is None:
            return None
        addresses.append(seen[0])
        keys.append(seen[1])
    index, _, _, dtype, _ = keys[0]
    held, identities = [], []
    for norm in qk._norms.values():
        parameters = norm._norm.ready.get(index)
        if parameters is None:
            return None
        held += (parameters.weight_address, parameters.bias_address)
        identities.append(parameters.identity)
    if arrays.positions is not None:
        tables = qk._tables.addresses.get((index, dtype))
        if tables is None:
            return None
        held += tables
    # As many arrays may be others: cos and sin without out, or out without cos and sin.
    given = (arrays.positions is None, 0 if arrays.out is None else 1 + arrays.in_place)
    return (*identities, qk._tables.identity, *given, heads_axis, *keys), addresses, held


def _known(qk: QKNorm, arrays: _Arrays, heads_axis: int) -> tuple[Any, ...] | None:
    """Run a call whose like this thread has run before; None where there is none."""
    library = quick.get(type(arrays.parts[0]))
    seen = library and _glances(qk, library, arrays, heads_axis)
    call = seen and _thread.calls.get(seen[0])
    if not call:
        return None
    (_, addresses, held), count = seen, len(arrays.parts)
    stream = library.stream(seen[0][count + 4][0])
    if arrays.out is None:
        if not library.allocates_in_graphs:
            _kernels.refuse_capture(stream, "a result without out would be allocated")
        results = tuple(make(x) for make, x in zip(call.makes, arrays.parts, strict=True))
        targets = [library.address(result) for result in results]
        for address, alignment in zip(targets, call.alignments, strict=True):
            if not address or address & (alignment - 1):
                return None
    else:
        results = arrays.out
        targets = addresses[:count] if arrays.in_place else addresses[-count:]
        if _may_overlap(call, addresses, count, in_place=arrays.in_place):
            return None
    of_parts = [0] * (4 * _parts.PARTS)
    of_parts[0 : 4 * count : 4] = addresses[:count]
    of_parts[1 : 4 * count : 4] = targets
    of_parts[2 : 4 * count : 4] = held[0 : 2 * count : 2]
    of_parts[3 : 4 * count : 4] = held[1 : 2 * count : 2]
    if arrays.positions is not None:
        call.run(stream, *of_parts, *held[2 * count :], addresses[count])
    elif arrays.cos is not None:
        call.run(stream, *of_parts, addresses[count], addresses[count + 1], 0)
    else:
        call.run(stream, *of_parts, 0, 0, 0)
    if arrays.out is not None:
        for result in results:
            library.wrote((result,))
    return results


def _may_overlap(call: _Known, addresses: list[int], count: int, *, in_place: bool) -> bool:
    """Tell whether what is written may share bytes with another array of the call."""
    first = addresses[0]
    if tuple(address - first for address in addresses) == call.places:
        return False
    ranges = [
        (address + low, address + high)
        for address, (low, high) in zip(addresses, call.reach, strict=True)
    ]
    written = range(count) if in_place else range(len(ranges) - count, len(ranges))
    return any(
        ranges[i][0] < high and low < ranges[i][1]
        for i in written
        for j, (low, high) in enumerate(ranges)
        if i != j
    )


def _remember(
    qk: QKNorm,
    library: Library,
    arrays: _Arrays,
    heads_axis: int,
    run: Any,
    makes: Sequence[Any],
    views: tuple[Mapping[str, ArrayView], Mapping[str, ArrayView], tuple[ArrayView | None, ...]],
) -> None:
    """Let `_known` find this call, if a glance at its arrays tells that it is the same again."""
    if quick.get(type(arrays.parts[0])) is not library:
        return
    parts, outs, (cos, sin, positions) = views
    if arrays.positions is not None:
        seen = library.glance(arrays.parts[0])
        if seen is None:
            return
        qk._tables.addresses[seen[1][0], seen[1][3]] = (cos.pointer, sin.pointer)
    seen = _glances(qk, library, arrays, heads_axis)
    if seen is None:
        return
    beside = [positions] if positions is not None else [v for v in (cos, sin) if v is not None]
    others = () if arrays.out is None or arrays.in_place else outs.values()
    placed = [*parts.values(), *beside, *others]
    known = _Known(
        run,
        tuple(makes),
        tuple(view.layout.alignment for view in outs.values()),
        tuple(view.layout.extent(0) for view in placed),
        tuple(view.pointer - placed[0].pointer for view in placed),
    )
    store(_thread.calls, seen[0], known)


def _check_overlaps(
    views: Mapping[str, ArrayView],
    outs: Mapping[str, ArrayView],
    beside: Mapping[str, ArrayView | None],
) -> None:
    """Refuse an `out` that shares bytes with anything but the part that it is the result of."""
    for name, out in outs.items():
        others = {f"out of {other}": view for other, view in outs.items() if other != name}
        _spec.check_overlaps({**views, **others, **beside}, out, name, f"out of {name}")


def _on_host(
    rope: Rope | None,
    turning: Turning | None,
    norms: Mapping[str, tuple[Any, ArrayView | None, ArrayView | None]],
    views: Mapping[str, ArrayView],
    outs: Mapping[str, ArrayView],
    tables: tuple[ArrayView | None, ...],
    heads_axis: int,
) -> None:
    """Run a validated call in NumPy."""
    turn = None
    if turning is not None:
        cos, sin, positions = (None if view is None else view.as_numpy() for view in tables)
        if positions is not None:
            cos, sin = rope.at(positions, cos.dtype)
        axes = len(views["q"].layout.shape)
        at = heads_axis if heads_axis < 0 else heads_axis - axes
        cos, sin = (
            np.expand_dims(t.reshape((1,) * (axes - 1 - t.ndim) + t.shape), at) for t in (cos, sin)
        )
        options = {"style": rope.style, "rounding": rope.rounding, "rotary_dim": rope.rotary_dim}

        def turn(x: np.ndarray) -> np.ndarray:
            return rotary.apply(x, cos, sin, **options)

    for i, (name, (opts, weight, bias)) in enumerate(norms.items()):
        function = {"rms": reference.rms_norm, "layer": reference.layer_norm}[opts.kind]
        x = views[name].as_numpy()
        turned = turn is not None and turning.turned[i]
        if turned and turning.first:
            x = turn(x)
        y = function(
            x,
            *(None if view is None else view.as_numpy() for view in (weight, bias)),
            eps=opts.eps,
            num_heads=opts.num_heads,
            head_dim=opts.head_dim,
            heads_axis=heads_axis,
            weight_offset=opts.weight_offset,
            rounding=opts.rounding,
        )
        np.copyto(outs[name].as_numpy(), turn(y) if turned and not turning.first else y)


def _split_last(qkv: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of `qkv` with its last axis split."""
    if hasattr(qkv, "unflatten"):
        return qkv.unflatten(-1, shape[-2:])
    if qkv.shape[-1] > 1 and qkv.strides[-1] != qkv.itemsize:
        raise ValueError(
            f"qkv has a stride of {qkv.strides[-1]} bytes on its last axis; needs {qkv.itemsize}, "
            "neighbouring elements"
        )
    return qkv.reshape(shape)


def _rebuilt(norms: tuple[Any, ...], rope: Rope | None) -> QKNorm:
    return QKNorm(*norms, rope=rope)
