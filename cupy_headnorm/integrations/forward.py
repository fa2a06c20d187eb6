"""What stands in the place of the forward of a module that is swapped."""

from __future__ import annotations

import inspect
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch

from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._calls import dispatch
from cupy_headnorm._calls.operands import Given
from cupy_headnorm._calls.parameters import Norm
from cupy_headnorm._cuda.memory import CaptureError
from cupy_headnorm._sources import of_model
from cupy_headnorm.checkpoint.norms import ModelNorm
from cupy_headnorm.headnorm import HeadNorm, built, inside

_MAX_REASONS = 32
"""Kept by their own text: a reason names shapes, of which a server meets any number."""
OTHERS = "other reasons"
_METHODS = ("forward", "__getstate__", "_replicate_for_data_parallel")
"""Replaced on a module. By the latter two copies are made, which look them up on the instance."""


class Forward:
    """
    What stands in the place of one module's forward.

    It does not own the module, which owns it: a model in no reference cycle is freed when it is
    let go.
    """

    def __init__(self, module: torch.nn.Module, described: ModelNorm) -> None:
        _check_methods(module)
        # torch.export and torch.fx read these of a forward, as if it were a method.
        self.__signature__ = inspect.signature(module.forward)
        self.__code__ = getattr(type(module).forward, "__code__", None)
        self._module = weakref.ref(module)
        self.described = described
        self._weights = _getters(described, described.weights)
        self._biases = _getters(described, described.biases)
        self.of_options = Norm(inside(self.norm()).for_heads_axis(described.heads_axis).options)
        self.active = True
        self.calls = 0
        self.fallbacks: Counter[str] = Counter()

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run our norm, or the module's own forward where ours would not do the same."""
        module = self._owner()
        if self.active:
            try:
                result = self._ours(module, *args, **kwargs)
            except (TypeError, ValueError, CaptureError) as error:
                # What is no call of ours raises here, and so does what would be a wrong one.
                self._fell_back(str(error))
            else:
                self.calls += 1
                return result
        return type(module).forward(module, *args, **kwargs)

    def _owner(self) -> torch.nn.Module:
        module = self._module()
        if module is None:
            raise ValueError(f"{self.described.name} is of a model that is gone; needs the model")
        return module

    def _ours(self, module: torch.nn.Module, x: torch.Tensor) -> Any:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x is a {type(x).__name__}; needs a torch.Tensor")
        weight, bias = self.parameters(module)
        if torch.is_grad_enabled():
            for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
                if tensor is not None and tensor.requires_grad:
                    raise ValueError(
                        f"{name} requires grad and grad mode is on; needs torch.no_grad()"
                    )
        if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
            raise ValueError("autocast is on; needs a call outside of it")
        return dispatch.lane_beside(self.of_options, x, weight, bias, None)

    def parameters(
        self, module: torch.nn.Module
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the weight and the bias as they are now."""
        return _gathered(module, self._weights), _gathered(module, self._biases)

    def _fell_back(self, reason: str) -> None:
        known = reason in self.fallbacks or len(self.fallbacks) < _MAX_REASONS
        self.fallbacks[reason if known else OTHERS] += 1

    def norm(self) -> HeadNorm:
        """Return the norm with a copy of the module's weights."""
        module = self._owner()
        with torch.no_grad():
            return built(of_model(self.described, *self.parameters(module)))

    def on_instance(self) -> dict[str, Any]:
        """Return the attributes that the module has for as long as it is swapped."""
        return dict(zip(_METHODS, (self, self._state, self._replica), strict=True))

    def restore(self) -> None:
        """Give the module its own forward back."""
        self.active = False  # enough where another library has wrapped this one since
        module = self._module()
        for name in () if module is None else self._found_on(module.__dict__):
            delattr(module, name)

    def _found_on(self, attributes: dict[str, Any]) -> list[str]:
        return [n for n, ours in self.on_instance().items() if attributes.get(n) == ours]

    def _state(self) -> Any:
        """Return what copy and pickle take of the module: without our forward, its class' runs."""
        module = self._owner()
        kind: Any = type(module)
        state = kind.__getstate__(module)
        if not isinstance(state, dict):
            return state
        ours = self._found_on(state)
        return {name: value for name, value in state.items() if name not in ours}

    def _replica(self) -> torch.nn.Module:
        """Return what nn.DataParallel runs on another device, without our forward."""
        module = self._owner()
        kind: Any = type(module)
        replica: torch.nn.Module = kind._replicate_for_data_parallel(module)
        for name in self._found_on(replica.__dict__):
            delattr(replica, name)
        self._fell_back("nn.DataParallel runs copies of the module; needs the model itself")
        return replica

    def __reduce__(self) -> tuple[Any, ...]:
        # Where another library has kept this one: a copy of the module, of which only the class is
        # there yet, gives its own forward.
        return getattr, (self._owner(), "forward")


def _check_methods(module: torch.nn.Module) -> None:
    """Refuse a module on whose instance somebody has replaced one of them."""
    for name in _METHODS:
        found = module.__dict__.get(name)
        # Who takes a wrapper off again may leave the class' own.
        if found is not None and found != MethodType(getattr(type(module), name), module):
            raise ValueError(
                f"its {name} is a {type(found).__name__} put on the instance; needs that of its "
                "class"
            )


@torch.no_grad()
def check_agrees(module: torch.nn.Module, forward: Forward, like: torch.Tensor) -> None:
    """Refuse a module that computes something else than is known of its model: a patched one."""
    described, like = forward.described, next(module.parameters(), like)
    shape = [2, 2, 2, described.head_dim]
    shape[described.heads_axis] = described.num_heads or 1
    # The mean tells the kinds apart, rows of 0.001 an epsilon from another.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    x[0] *= 0.001
    x = x.to(like.dtype).to(like.device)
    try:
        theirs = type(module).forward(module, x)
    except Exception as error:
        raise ValueError(
            f"its own forward fails on x of shape {tuple(shape)} ({error}); needs one that takes it"
        ) from error
    if theirs.shape != x.shape:
        raise ValueError(
            f"its own forward gives {tuple(theirs.shape)} for x of shape {tuple(shape)}; needs "
            "the shape of x"
        )
    theirs = theirs.double()
    given = Given((x,), forward.parameters(module), None)
    ours = dispatch.run(forward.of_options, given)[0].double()
    bound = theirs.abs().amax(-1, keepdim=True) * (4 * torch.finfo(x.dtype).eps + 1e-5)
    apart = (ours - theirs).abs()
    if not (apart <= bound).all():
        raise ValueError(
            f"its own forward and what {described.kind} with eps={described.eps} gives differ by "
            f"{apart.max():.3g}; needs the forward of transformers' own class"
        )


def _getters(described: ModelNorm, names: Iterable[str]) -> tuple[Callable[[Any], Any], ...]:
    """Return what gets the tensors of these names from their norm's module."""
    return tuple(operator.attrgetter(name.removeprefix(f"{described.name}.")) for name in names)


def _gathered(module: Any, getters: tuple[Callable[[Any], Any], ...]) -> torch.Tensor | None:
    """Return the tensor of a norm, one row a head where each head has a module of its own."""
    if not getters:
        return None
    if len(getters) == 1:
        tensor: torch.Tensor = getters[0](module)
        return tensor
    return torch.stack([get(module) for get in getters])
