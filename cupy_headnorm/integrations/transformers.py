"""Our norms in the place of those of a transformers model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch

from cupy_headnorm._arrays import dtypes
from cupy_headnorm.checkpoint import survey
from cupy_headnorm.checkpoint.norms import looks_like_a_norm
from cupy_headnorm.headnorm import HeadNorm
from cupy_headnorm.integrations.forward import OTHERS, check_agrees
from cupy_headnorm.integrations.forward import Forward as _Forward

__all__ = ["SwappedNorms", "use_head_norms"]


def use_head_norms(model: torch.nn.Module) -> SwappedNorms:
    """
    Let a transformers model's norms of single heads compute with `HeadNorm`'s kernels.

    ``forward`` is replaced on the instances of its q, k (and v) norm modules; classes, parameters,
    state dict and hooks stay as they are. The modules' own arithmetic is kept, to the rounding
    step.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, or any part of one that has its ``config``.

    Returns
    -------
    SwappedNorms
        Undoes the swap; a context manager.

    Raises
    ------
    TypeError
        `model` has no config.
    ValueError
        It has no norm that can be swapped, or is swapped already; the message says which.
    GPUUnavailableError
        The model is in CUDA memory and CuPy or NVRTC is missing.

    Notes
    -----
    A module's own forward runs wherever ours would not do the same: while autograd records and x
    or a weight requires grad, under autocast, where x or a weight is not a plain tensor with
    memory (torch.export, torch.jit.trace, torch.func, DTensor), where the model's own result is
    of another dtype than x. Each such call is counted in `SwappedNorms.fallbacks`.

    Weights are read at each call, so whatever changes them counts: a load_state_dict, an optimizer
    step, a move to another device or dtype.

    torch.compile breaks its graph at each norm, and with ``fullgraph=True`` raises.

    Swap before ``fully_shard`` of FSDP2: it makes the weights DTensors, which a swap refuses, and
    with which the modules' own forward runs. A norm that PEFT's ``modules_to_save`` wraps is
    named in `SwappedNorms.refused`.

    A norm or model that is deep-copied or pickled while it is swapped gives one that is not, and so
    does a shallow copy of a norm; one of a model shares its norms. Replicas of nn.DataParallel are
    not swapped, and each counts as a fallback.

    A ``with`` block that ends with fallbacks and no call of ours warns with the reason.

    Examples
    --------
    >>> from cupy_headnorm.integrations.transformers import use_head_norms
    >>> with use_head_norms(model) as swapped:  # doctest: +SKIP
    ...     tokens = model.generate(**prompt)
    >>> swapped  # doctest: +SKIP
    <SwappedNorms: 36 norms of gemma3_text, 864 calls, 0 fallbacks, restored>
    """
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not isinstance(model, torch.nn.Module) or to_dict is None:
        raise TypeError(f"model is a {type(model).__name__}; needs a transformers model")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module.__dict__.get("forward"), _Forward):
            raise ValueError(f"{name} is swapped already; needs restore() of what swapped it")
    found = survey.find(to_dict(), _tensors(model))
    refused = _wrapped(modules) | {one.name: one.reason for one in found.refused}
    ours: dict[int, tuple[torch.nn.Module, _Forward]] = {}
    for described in found.norms:
        try:
            module = modules[_path(described.name, modules)]
            forward = _Forward(module, described)
            check_agrees(module, forward, next(model.parameters()))
        except (TypeError, ValueError) as error:
            refused[described.name] = str(error)
            continue
        # Llama 4 has one module for q and k.
        known = ours.setdefault(id(module), (module, forward))[1]
        if known.of_options.options != forward.of_options.options:
            raise ValueError(f"{described.name} is one module for two kinds of norm; needs one")
    if not ours:
        why = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:1])
        raise ValueError(
            f"a model of type {found.model_type} has no norm of single heads that can be "
            f"swapped{why}"
        )
    for module, forward in ours.values():
        for name, attribute in forward.on_instance().items():
            setattr(module, name, attribute)
    return SwappedNorms(found.model_type, [forward for _, forward in ours.values()], refused)


class SwappedNorms:
    """
    The norms of a model that `use_head_norms` has swapped; a context manager that restores them.

    The swap lasts as long as the model does, whether this object is kept or not.
    """

    def __init__(
        self, model_type: str, forwards: Iterable[_Forward], refused: dict[str, str]
    ) -> None:
        self._model_type = model_type
        self._forwards = tuple(forwards)
        self.refused = refused
        """Norms that were found and not swapped, with the reason."""

    @property
    def norms(self) -> dict[str, HeadNorm]:
        """What is computed, by the module's name: a copy of its weights, made now."""
        return {forward.described.name: forward.norm() for forward in self._forwards}

    @property
    def calls(self) -> int:
        """Number of calls that ours has answered; approximate while several threads call."""
        return sum(forward.calls for forward in self._forwards)

    @property
    def fallbacks(self) -> Counter[str]:
        """Number of calls that a module's own forward has answered, by reason; see `calls`."""
        return sum((forward.fallbacks for forward in self._forwards), Counter())

    def restore(self) -> None:
        """Give every module its own forward back; once more does nothing."""
        for forward in self._forwards:
            forward.restore()

    def __enter__(self) -> SwappedNorms:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        swapped = self._swapped
        self.restore()
        # Last, since a filter may raise it; not over an error that is on its way, nor once more.
        if swapped and kind is None and self.fallbacks and not self.calls:
            reasons = (reason for reason, _ in self.fallbacks.most_common() if reason != OTHERS)
            warnings.warn(
                f"use_head_norms answered none of {self.fallbacks.total()} calls of "
                f"{self._model_type}'s norms; most often {next(reasons)}",
                stacklevel=2,
            )

    @property
    def _swapped(self) -> bool:
        return any(forward.active for forward in self._forwards)

    def __repr__(self) -> str:
        restored = "" if self._swapped else ", restored"
        return (
            f"<SwappedNorms: {len(self._forwards)} norms of {self._model_type}, {self.calls} "
            f"calls, {self.fallbacks.total()} fallbacks{restored}>"
        )


def _tensors(model: torch.nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape by name, as a checkpoint's header has them."""
    spellings = {dtype.name: dtype.safetensors for dtype in dtypes.DTYPES}
    found = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        dtype = str(tensor.dtype).removeprefix("torch.")
        # Integers are packed weights, whose shapes tell nothing.
        if tensor.is_floating_point():
            found[name] = (spellings.get(dtype, dtype), tuple(tensor.shape))
    return found


def _wrapped(modules: dict[str, torch.nn.Module]) -> dict[str, str]:
    """Return norms that PEFT keeps a trained copy of, whose forward chooses between the two."""
    return {
        name: "PEFT's modules_to_save wraps it and trains a copy; needs merge_and_unload() first"
        for name, module in modules.items()
        if looks_like_a_norm(f"{name}.weight")
        and {"original_module", "modules_to_save"} <= module._modules.keys()
    }


def _path(name: str, modules: dict[str, torch.nn.Module]) -> str:
    """Return the full name of a module; that of one without tensors may lack its prefix."""
    if name in modules:
        return name
    paths = [path for path in modules if path.endswith(f".{name}")]
    if len(paths) != 1:
        raise ValueError(f"the model has {len(paths)} modules {name}; needs one")
    return paths[0]
