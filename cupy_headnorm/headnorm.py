"""The class that holds a norm's weight and epsilon."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cupy_headnorm import reference
from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._arrays.views import AnyArray, Array
from cupy_headnorm._calls import dispatch
from cupy_headnorm._calls.operands import Given
from cupy_headnorm._calls.parameters import Held, HeldNorm, device_of, snapshot
from cupy_headnorm._cuda import environment
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._rules import heads as head_rules
from cupy_headnorm._rules import options
from cupy_headnorm._rules.options import Kind, NormOptions, Rounding
from cupy_headnorm.checkpoint import tensors

if TYPE_CHECKING:
    from cupy_headnorm.checkpoint.reader import ModelNorm


_HEADS_AXIS = -2
"""The default: a call that leaves it checks nothing. Told by `is`, or -2.0 would pass for it."""


class HeadNorm:
    """
    Normalize each attention head on its own: RMSNorm or LayerNorm, with a copy of the weight.

    The copy is made here, of a torch Parameter too: a later load_state_dict or optimizer step is
    not seen and needs a new norm.

    Parameters
    ----------
    weight, bias : array, optional
        Shape ``(head_dim,)`` shared by all heads, ``(num_heads, head_dim)`` or flat; float16,
        bfloat16, float32 or float64, of any library, on any device. Copied.
    kind : {"rms", "layer"}, optional
        Default: ``"rms"``.
    eps : float, optional
        Default: 1e-6 for rms, 1e-5 for layer.
    num_heads, head_dim : int, optional
        See `cupy_headnorm.rms_norm`; ``num_heads=1`` serves x of any shape whose last axis is
        head_dim.
    weight_offset : float, optional
        Added to the weight in float32: 1.0 for Gemma 3. Default: ``0.0``.
    rounding : {"once", "before_weight", "every_op", "rstd"}, optional
        Default: ``"once"``.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit; the message says what was given and what is needed.

    Notes
    -----
    The first use on a device uploads the weight there and waits for it, once. Instances may be
    used from any number of threads; they pickle and copy by their arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_headnorm import HeadNorm
    >>> norm = HeadNorm(np.ones(4, dtype=np.float32), eps=1e-6)
    >>> norm
    HeadNorm(<float32 (4,)>, eps=1e-06)
    >>> queries = np.array([[[1.0, 2.0, 3.0, 4.0]]], dtype=np.float32)
    >>> norm(queries).round(4)
    array([[[0.3651, 0.7303, 1.0954, 1.4606]]], dtype=float32)
    """

    @untraced
    def __init__(
        self,
        weight: AnyArray | None = None,
        bias: AnyArray | None = None,
        *,
        kind: Kind = "rms",
        eps: float | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        weight_offset: float = 0.0,
        rounding: Rounding = "once",
    ) -> None:
        opts = options.options(
            kind,
            eps=eps,
            num_heads=num_heads,
            head_dim=head_dim,
            weight_offset=weight_offset,
            rounding=rounding,
        )
        self._weight = snapshot(weight, "weight")
        self._bias = snapshot(bias, "bias")
        self._geometry = head_rules.geometry(
            opts.num_heads,
            opts.head_dim,
            None if self._weight is None else self._weight.shape,
            None if self._bias is None else self._bias.shape,
        )
        options.check_parameters(opts, weight, bias)
        self._source: Source | None = None
        self._norm = HeldNorm(opts, Held(self._weight, self._bias))

    @classmethod
    def from_safetensors(
        cls,
        path: str | os.PathLike[str],
        key: str,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        kind: Kind = "rms",
        eps: float | None = None,
        weight_offset: float = 0.0,
        rounding: Rounding = "once",
    ) -> HeadNorm:
        """
        Read ``<key>.weight`` and ``<key>.bias`` from a file or a folder with shards.

        See `cupy_headnorm.checkpoint.read_norm` for what `path` may be and for the errors.
        """
        weight, bias = tensors.read_norm(path, key)
        norm = cls(
            weight,
            bias,
            kind=kind,
            eps=eps,
            num_heads=num_heads,
            head_dim=head_dim,
            weight_offset=weight_offset,
            rounding=rounding,
        )
        norm._source = Source("from_safetensors", os.fspath(path), key)
        return norm

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | os.PathLike[str],
        key: str,
        *,
        variant: str | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        kind: Kind | None = None,
        eps: float | None = None,
        weight_offset: float | None = None,
        rounding: Rounding | None = None,
    ) -> HeadNorm:
        """
        Read a norm of a Hugging Face model and compute as the model does, to the rounding step.

        Parameters
        ----------
        model_dir : path-like
            A folder with config.json and safetensors files, whole or in shards.
        key : str
            The norm's name, such as ``model.layers.0.self_attn.q_norm``; ``python -m cupy_headnorm
            inspect model_dir`` lists them. Its prefix may be that of another transformers release.
        variant : str, optional
            Part of the file names: ``"fp16"`` for ``model.fp16.safetensors``.
        num_heads, head_dim, kind, eps, weight_offset, rounding : optional
            Win over what `cupy_headnorm.models` knows of the model. All of `kind`, `eps` and
            `rounding` are needed for a model it does not know; ``num_heads=1`` for a norm over the
            whole width, which is one head then.

        Raises
        ------
        CheckpointError
            The checkpoint is damaged, its config and tensors contradict, the key is not found, or
            the model's arithmetic is not served; the message says which.

        Notes
        -----
        Where the model's own result has another dtype than `x` (a float32 weight times a bfloat16
        value under ``"before_weight"``), a call raises TypeError, unless `rounding` was given.
        """
        from cupy_headnorm.checkpoint import survey  # the registry: only checkpoints need it

        given: dict[str, Any] = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "kind": kind,
            "eps": eps,
            "weight_offset": weight_offset,
            "rounding": rounding,
        }
        overrides = {name: value for name, value in given.items() if value is not None}
        source = Source("from_pretrained", os.fspath(model_dir), key, overrides, variant)
        try:
            described, weight, bias = survey.read(
                model_dir, key, variant=variant, full_width=num_heads == 1
            )
        except survey.UnknownModelError:
            if not {"kind", "eps", "rounding"} <= overrides.keys():
                raise
            weight, bias = tensors.read_norm(model_dir, key, variant=variant)
            norm = cls(weight, bias, **overrides)
            norm._source = source
            return norm
        return of_model(described, weight, bias, source, cls, **overrides)

    @property
    def _options(self) -> NormOptions:
        return self._norm.options

    def to_safetensors(self, path: str | os.PathLike[str], key: str) -> None:
        """Write ``<key>.weight`` and ``<key>.bias``, as they are held, to a new file."""
        tensors.write_norm(path, key, self._weight, self._bias)

    @untraced
    def __call__(
        self, x: Array, /, *, heads_axis: int = _HEADS_AXIS, out: Array | None = None
    ) -> Array:
        """
        Normalize `x`; see `cupy_headnorm.rms_norm` for layouts, `out` and errors.

        Returns
        -------
        array
            Shape, dtype, device and library of `x`; `out` if it was given.
        """
        norm = self._norm if heads_axis is _HEADS_AXIS else self._norm.for_heads_axis(heads_axis)
        result: Array = dispatch.lane(norm, x, out)
        return result

    @untraced
    def forward(
        self,
        hidden_states: Any,
        cache: Any = None,
        attn_params: Any = None,
        past_len: Any = None,
        intermediates: bool = False,
        loras: Any = None,
        **kwargs: Any,
    ) -> Any:
        """
        Normalize in the calling form of ExLlamaV2's head norm; the other arguments are ignored.

        Returns
        -------
        array or dict
            A new array, in ``{"hidden_states": array}`` if `intermediates`.
        """
        _refuse_new_names(kwargs)
        result = self(hidden_states)
        return {"hidden_states": result} if intermediates else result

    @untraced
    def forward_reference(
        self,
        hidden_states: Any,
        cache: Any = None,
        attn_params: Any = None,
        past_len: Any = None,
        intermediates: bool = False,
        loras: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Normalize as `forward` does, but on the host in NumPy: for debugging; it copies."""
        _refuse_new_names(kwargs)
        x = find.view(hidden_states, "x")
        o = self._options
        function = reference.rms_norm if o.kind == "rms" else reference.layer_norm
        values = function(
            x.library.to_host(hidden_states, "x"),
            self._weight,
            self._bias,
            eps=o.eps,
            num_heads=o.num_heads,
            head_dim=o.head_dim,
            weight_offset=o.weight_offset,
            rounding=o.rounding,
        )
        result = x.library.from_host(values, x)
        return {"hidden_states": result} if intermediates else result

    def heads(self, start: int, stop: int) -> HeadNorm:
        """
        Return the norm of heads `start` to `stop` (excluded): a rank's part in tensor parallelism.

        Raises
        ------
        ValueError
            The range is empty or leaves the norm's heads.
        """
        start, stop = options.integer(start, "start"), options.integer(stop, "stop")
        most = self.num_heads
        if not 0 <= start < stop or (most is not None and stop > most):
            raise ValueError(
                f"heads {start} to {stop} of a norm of "
                f"{'any number of' if most is None else most} heads; needs "
                f"0 <= start < stop{'' if most is None else f' <= {most}'}"
            )

        def part(values: np.ndarray | None) -> np.ndarray | None:
            if values is None or most is None or values.shape == (self.head_dim,):
                return values
            return values.reshape(most, -1)[start:stop]

        arguments = self._arguments()
        arguments.update(num_heads=stop - start, head_dim=self.head_dim)
        norm = HeadNorm(part(self._weight), part(self._bias), **arguments)
        norm._norm = norm._norm.with_result_dtype(self._options.result)
        return norm

    def load(self, device: Any = None) -> None:
        """Upload to a CUDA device (an index, ``"cuda:1"``, a torch or CuPy device) and wait."""
        with environment.explained():
            place = device_of(device)
            if place.kind == "cuda":
                self._norm.load(place.index)

    def unload(self) -> None:
        """
        Wait for the work in flight and free every device copy; the next use uploads again.

        A CUDA graph that was captured before must not be replayed any more; see `warmup`.
        """
        self._norm.unload()

    def warmup(self, x: AnyArray, /, *, heads_axis: int = -2, out: AnyArray | None = None) -> None:
        """
        Load, compile and plan for arrays laid out like `x`, in place and not; `x` stays.

        Then such a call can be captured into a CUDA graph. Keep the norm as long as the graph, and
        do not `unload` it meanwhile: the graph reads the weights on the device, which are freed
        with the norm.
        """
        norm = self._norm.for_heads_axis(heads_axis)
        for target in (None, x) if out is None else (out,):
            given = Given((x,), (None, None), None if target is None else (target,))
            try:
                dispatch.step_by_step(norm, given, dry=True)
            except (TypeError, ValueError):
                if target is not x or out is x:
                    raise
                # x may be an array that cannot be written; then there is nothing to prepare.

    def plan(self, x: AnyArray, /, *, heads_axis: int = -2) -> LaunchConfig:
        """Return the geometry used for `x`, or for its like on an H100 if it is in host memory."""
        return dispatch.plan(self._norm.for_heads_axis(heads_axis), x)

    @property
    def weight(self) -> np.ndarray | None:
        """The weight as it was given or stored, without the offset; read-only."""
        return self._weight

    @property
    def bias(self) -> np.ndarray | None:
        """The bias as it was given or stored; read-only."""
        return self._bias

    @property
    def kind(self) -> Kind:
        """``"rms"`` or ``"layer"``."""
        return self._options.kind

    @property
    def eps(self) -> float:
        """Added to the mean square or variance."""
        return self._options.eps

    @property
    def num_heads(self) -> int | None:
        """Heads, where the arguments tell; None for a norm of any number."""
        return self._geometry.num_heads

    @property
    def head_dim(self) -> int | None:
        """Elements a head, where the arguments tell; None if x decides."""
        return self._geometry.head_dim

    @property
    def weight_offset(self) -> float:
        """Added to the weight in float32."""
        return self._options.weight_offset

    @property
    def rounding(self) -> Rounding:
        """Where results are rounded."""
        return self._options.rounding

    @property
    def size(self) -> int:
        """Number of elements of weight and bias."""
        return sum(array.size for array in (self._weight, self._bias) if array is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias: what each loaded device holds."""
        return sum(array.nbytes for array in (self._weight, self._bias) if array is not None)

    def __repr__(self) -> str:
        defaults = options.options(self.kind)
        shown: dict[str, Any] = {} if self.kind == "rms" else {"kind": self.kind}
        shown["eps"] = self.eps
        for name in ("num_heads", "head_dim", "weight_offset", "rounding"):
            value = getattr(self._options, name)
            if value != getattr(defaults, name):
                shown[name] = value
        words = [f"{name}={value!r}" for name, value in shown.items()]
        if self._source is not None:
            return self._source.told(words)
        for name, array in (("bias", self._bias), ("weight", self._weight)):
            if array is not None:
                told = f"<{array.dtype} {array.shape}>"
                words.insert(0, told if name == "weight" else f"bias={told}")
        return f"HeadNorm({', '.join(words)})"

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = functools.partial(type(self), self._weight, self._bias, **self._arguments())
        return _rebuilt, (rebuild, self._options.result, self._source)

    def _arguments(self) -> dict[str, Any]:
        o = self._options
        return {
            "kind": o.kind,
            "eps": o.eps,
            "num_heads": o.num_heads,
            "head_dim": o.head_dim,
            "weight_offset": o.weight_offset,
            "rounding": o.rounding,
        }


class Source(NamedTuple):
    """The constructor that read a norm from a file, and what it was given."""

    constructor: str
    path: str
    key: str
    overrides: Mapping[str, Any] | None = None
    variant: str | None = None

    def told(self, words: list[str]) -> str:
        """Write the call; `words` are the arguments where `overrides` are not kept."""
        if self.overrides is not None:
            given = {} if self.variant is None else {"variant": self.variant}
            words = [f"{name}={value!r}" for name, value in (given | dict(self.overrides)).items()]
        return (
            f"HeadNorm.{self.constructor}({', '.join([repr(self.path), repr(self.key), *words])})"
        )


def _rebuilt(rebuild: Callable[[], HeadNorm], result: str, source: Source | None) -> HeadNorm:
    norm = rebuild()
    norm._norm, norm._source = norm._norm.with_result_dtype(result), source
    return norm


def inside(norm: HeadNorm) -> HeldNorm:
    """Return the norm as calls meet it."""
    return norm._norm


def of_model(
    described: ModelNorm,
    weight: Any,
    bias: Any,
    source: Source | None = None,
    kind: type[HeadNorm] = HeadNorm,
    **overrides: Any,
) -> HeadNorm:
    """Build the norm that a model's is `described` to be; `overrides` are HeadNorm's arguments."""
    shared = described.shape in ((), (described.head_dim,))
    arguments: dict[str, Any] = {
        "kind": described.kind,
        "eps": described.eps,
        "num_heads": None if shared else described.num_heads,
        "head_dim": described.head_dim,
        "weight_offset": described.weight_offset if weight is not None else 0.0,
        "rounding": described.rounding,
    }
    norm = kind(weight, bias, **arguments | overrides)
    norm._source = source
    if "rounding" not in overrides:
        norm._norm = norm._norm.with_result_dtype(described.result)
    return norm


def _refuse_new_names(ignored: dict[str, Any]) -> None:
    """Refuse arguments of `__call__` that the old calling form would silently ignore."""
    for name in ("out", "heads_axis"):
        if name in ignored:
            raise TypeError(f"forward takes no {name}; needs a call of the norm itself")
