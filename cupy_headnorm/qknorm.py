"""The class that normalizes queries and keys and rotates them, in one launch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, overload

from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._arrays.views import Array
from cupy_headnorm._calls import dispatch, packed
from cupy_headnorm._calls.operands import Given
from cupy_headnorm._calls.parts import Parts
from cupy_headnorm._calls.tables import Tables
from cupy_headnorm._rules import options
from cupy_headnorm._rules import parts as part_rules
from cupy_headnorm.headnorm import HeadNorm, inside
from cupy_headnorm.rope import Rope

_NAMES = ("q", "k", "v")
_HEADS_AXIS = -2


class QKNorm:
    r"""
    Normalize queries and keys, each with its own norm, and rotate them by their positions.

    One launch reads q, k and, with a `v_norm`, v once and writes each once.

    Parameters
    ----------
    q_norm, k_norm : HeadNorm
        Of one kind, one rounding and one head_dim; weights of one dtype, biases too. A num_heads
        that was given is that of the calls' arrays, ``num_heads=1`` too.
    v_norm : HeadNorm, optional
        Normalizes v, which is not rotated (Gemma 3n and 4: ``HeadNorm(head_dim=256)``). Default:
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
    first rounded to x's dtype, as between a model's modules, and rotated then (or the other way
    round, where ``rope.order`` is ``"before norm"``).

    Streams, graphs, threads, results and errors are as `HeadNorm` has them. A position outside of
    the table is a ValueError on the host. On a GPU, where the kernel alone reads positions, it is
    clamped to the table's ends without a word.

    On the host heads have any length. On a GPU they have up to 8,192 elements, 4,096 of float32,
    3,072 of float64; longer ones must fit a block of threads, or raise ValueError.

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
        inner = {name: inside(norm) for name, norm in self._norms.items()}
        part_rules.check_norms({name: norm.part for name, norm in inner.items()})
        dims = (norm.head_dim for norm in given.values() if norm.head_dim is not None)
        self._head_dim = next(dims, None)
        if rope is not None and self._head_dim is not None:
            rope.check(self._head_dim)
        self._tables = Tables(rope)
        self._operations = {_HEADS_AXIS: Parts(inner, self._tables, _HEADS_AXIS)}

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
            The rotary embedding is not supported (`cupy_headnorm.rope.Rope.from_config`).
        """
        from cupy_headnorm import pretrained

        norms, rope = pretrained.of_layer(model_dir, layer, variant, max_position)
        return cls(*norms, rope=rope)

    @property
    def rope(self) -> Rope | None:
        """The rotary embedding."""
        return self._tables.rope

    @property
    def norms(self) -> Mapping[str, HeadNorm]:
        """The norms by part: ``q``, ``k`` and, if there is one, ``v``."""
        return dict(self._norms)

    def __repr__(self) -> str:
        words, r = [repr(norm) for norm in self._norms.values()], self.rope
        if r is not None:
            sections = f", sections={r.sections}" if r.sections else ""
            words.append(f"rope=<{r.style}, rotary_dim={r.rotary_dim}, {r.order}{sections}>")
        return f"QKNorm({', '.join(words)})"

    def __reduce__(self) -> tuple[Any, ...]:
        norms = (*self._norms.values(), None)[:3]
        return _rebuilt, (norms, self._tables.rope)

    @overload
    def __call__(
        self, q: Array, k: Array, v: None = None, /, *, positions: Any = None, cos: Any = None,
        sin: Any = None, heads_axis: int = -2, out: Any = None,
    ) -> tuple[Array, Array]: ...  # fmt: skip

    @overload
    def __call__(
        self, q: Array, k: Array, v: Array, /, *, positions: Any = None, cos: Any = None,
        sin: Any = None, heads_axis: int = -2, out: Any = None,
    ) -> tuple[Array, Array, Array]: ...  # fmt: skip

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
        Normalize and rotate.

        Parameters
        ----------
        q, k, v : array
            ``(..., num_heads, head_dim)`` each, of one dtype, device and library, and of the same
            tokens; slices of one buffer are as good as arrays of their own. v if there is a
            `v_norm`, and only then.
        positions : array of int32 or int64, optional
            Shape of q without heads and head_dim, or what broadcasts to it, such as ``(tokens,)``.
            With sections (M-RoPE) one row for each of them in front: ``(3, ...)``. From 0 up to
            the rope's max_position, excluded; others raise on the host and are clamped on a GPU.
        cos, sin : array, optional
            In place of `positions`: those of each token, ``(..., rotary_dim)`` as models have them
            or ``(..., rotary_dim / 2)``, float32 or q's dtype, broadcast to q's tokens; both of
            the same strides.
        heads_axis : int, optional
            As in `HeadNorm`. Default: ``-2``.
        out : tuple of arrays, optional
            One for each part, ``(q, k)`` for in place. Default: new arrays.

        Returns
        -------
        tuple of arrays, one for each part
        """
        operation = self._operation(heads_axis)
        return dispatch.run(operation, operation.given(q, k, v, positions, cos, sin, out))

    def _operation(self, heads_axis: int) -> Parts:
        """Return what a call does to heads on an axis."""
        # By its type too, or -2.0 would pass for -2.
        found = self._operations.get(heads_axis) if type(heads_axis) is int else None
        if found is None:
            axis = options.checked_heads_axis(heads_axis)
            norms = {name: inside(norm) for name, norm in self._norms.items()}
            found = self._operations.setdefault(axis, Parts(norms, self._tables, axis))
        return found

    @untraced
    def forward_reference(
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
    ) -> tuple[Any, ...]:
        """
        Return what a call returns, computed on the host in NumPy: for debugging; it copies.

        Positions outside of the table are a ValueError, of arrays on a GPU too.
        """
        arrays = {"q": q, "k": k, "v": v, "positions": positions, "cos": cos, "sin": sin}
        given = {name: array for name, array in arrays.items() if array is not None}
        views = [find.view(given[name], name) for name in _NAMES if name in given]
        on_host = {name: find.to_host(array, name) for name, array in given.items()}
        parts = [on_host.pop(name) for name in _NAMES if name in given]
        results = self(*parts, **on_host, heads_axis=heads_axis)
        return tuple(
            view.library.from_host(y, view) for y, view in zip(results, views, strict=True)
        )

    @untraced
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
        Work in place on ``(..., (num_heads + 2 num_kv_heads) * head_dim)``, and return it.

        Or on ``(..., num_heads + 2 num_kv_heads, head_dim)``, where a norm tells head_dim.
        Queries come first, then keys, then values, which only a `v_norm` touches.
        """
        shape = packed.Packed(num_heads, num_kv_heads, self._head_dim, len(self._norms))
        buffer, parts = packed.split(qkv, shape)
        operation = self._operation(_HEADS_AXIS)
        given = Given(parts, (positions, cos, sin), parts)
        if buffer.is_checked or dispatch.hit(operation, given) is None:
            buffer.check()
            dispatch.step_by_step(operation, given)
        return qkv

    def load(self, device: Any = None) -> None:
        """
        Upload the norms to a CUDA device and wait; see `HeadNorm.load`.

        The tables, whose dtype is that of x, follow with the first call or `warmup`.
        """
        for norm in self._norms.values():
            norm.load(device)

    def unload(self) -> None:
        """
        Wait for the work in flight and free every device copy; the next use uploads again.

        A CUDA graph that was captured before must not be replayed any more; see `warmup`.
        """
        for norm in self._norms.values():
            norm.unload()
        self._tables.unload()
        for operation in tuple(self._operations.values()):
            operation.forget()

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
        """
        Load, compile and plan for arrays laid out like these; they stay as they are.

        Then such a call can be captured into a CUDA graph, which reads the weights and tables on
        the device: keep this object as long, and do not `unload` it or its norms meanwhile.
        """
        parts = (q, k) if v is None else (q, k, v)
        operation = self._operation(heads_axis)
        outs = (None, parts) if out is None else (out,)
        calls = [operation.given(q, k, v, positions, cos, sin, given) for given in outs]
        dispatch.prepare(operation, calls, asked=out is not None)


def _rebuilt(norms: tuple[Any, ...], rope: Rope | None) -> QKNorm:
    return QKNorm(*norms, rope=rope)
