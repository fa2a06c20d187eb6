"""The class that holds a norm's weight and epsilon."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._arrays.views import AnyArray, Array
from cupy_headnorm._calls import dispatch
from cupy_headnorm._calls.operands import Given
from cupy_headnorm._calls.parameters import HeldNorm
from cupy_headnorm._calls.uploads import Held, device_of, snapshot
from cupy_headnorm._cuda import environment
from cupy_headnorm._described import Read
from cupy_headnorm._exllama import ExLlamaForm
from cupy_headnorm._plans.geometry import LaunchConfig
from cupy_headnorm._rules import heads as head_rules
from cupy_headnorm._rules import options
from cupy_headnorm._rules.options import Kind, Rounding

_HEADS_AXIS = -2
"""The default: a call that leaves it checks nothing. Told by `is`, or -2.0 would pass for it."""


class HeadNorm(ExLlamaForm):
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
        See `cupy_headnorm.rms_norm`; ``num_heads=1`` is for x of any shape whose last axis is
        head_dim.
    weight_offset : float, optional
        Added to the weight in float32: 1.0 for Gemma 3. Default: ``0.0``.
    rounding : {"once", "before_weight", "every_op", "rstd"}, optional
        Where results are rounded to the dtype of `x`:

        - ``"once"``: the result alone. Gemma 3, Qwen3-Next, OLMo 2, Command-R+.
        - ``"before_weight"``: the normalized value too, before the weight. Qwen3, GLM-4.5.
        - ``"every_op"``: also the product with the weight, before the bias. Chameleon.
        - ``"rstd"``: the inverse root, and its product with `x`; RMS without weight and bias.
          DeepSeek-V4's queries.

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
        self._source = None
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
        given = {
            "kind": kind,
            "eps": eps,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "weight_offset": weight_offset,
            "rounding": rounding,
        }
        from cupy_headnorm import _sources

        return built(_sources.from_safetensors(path, key, given), cls)

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
            the model's arithmetic is not supported; the message says which.

        Notes
        -----
        Where the model's own result has another dtype than `x` (a float32 weight times a bfloat16
        value under ``"before_weight"``), a call raises TypeError, unless `rounding` was given.
        """
        given = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "kind": kind,
            "eps": eps,
            "weight_offset": weight_offset,
            "rounding": rounding,
        }
        from cupy_headnorm import _sources

        return built(_sources.from_pretrained(model_dir, key, variant, given), cls)

    def to_safetensors(self, path: str | os.PathLike[str], key: str) -> None:
        """Write ``<key>.weight`` and ``<key>.bias``, as they are held, to a new file."""
        from cupy_headnorm.checkpoint import tensors

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

    def heads(self, start: int, stop: int) -> HeadNorm:
        """
        Return the norm of heads `start` to `stop` (excluded): a rank's part in tensor parallelism.

        Raises
        ------
        ValueError
            The range is empty or leaves the norm's heads.
        """
        start, stop = head_rules.checked_range(start, stop, self.num_heads)
        arguments = self._arguments() | {"num_heads": stop - start, "head_dim": self.head_dim}
        weight, bias = (self._part(values, start, stop) for values in (self._weight, self._bias))
        return built(Read(weight, bias, arguments, None, self._options.result))

    def _part(self, values: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
        """Return what belongs to some heads: all of it where they share it."""
        if values is None or self.num_heads is None or values.shape == (self.head_dim,):
            return values
        return values.reshape(self.num_heads, -1)[start:stop]

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
        outs = [None, (x,)] if out is None else [(out,)]
        calls = [Given((x,), (None, None), given) for given in outs]
        dispatch.prepare(norm, calls, asked=out is not None)

    def plan(self, x: AnyArray, /, *, heads_axis: int = -2) -> LaunchConfig:
        """Return the geometry used for `x`, or for its like on an H100 if it is in host memory."""
        return dispatch.plan(self._norm.for_heads_axis(heads_axis), x)

    def __reduce__(self) -> tuple[Any, ...]:
        read = Read(self._weight, self._bias, self._arguments(), self._source, self._options.result)
        return built, (read, type(self))


def built(read: Read, kind: type[HeadNorm] = HeadNorm) -> HeadNorm:
    """Build a norm from what was read of it."""
    norm = kind(read.weight, read.bias, **read.arguments)
    norm._norm, norm._source = norm._norm.with_result_dtype(read.result), read.source
    return norm


def inside(norm: HeadNorm) -> HeldNorm:
    """Return the norm as calls meet it."""
    return norm._norm
