"""torch tensors, by their own attributes, without importing torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from cupy_headnorm._arrays import dtypes
from cupy_headnorm._arrays.dtypes import NUMBERS, Allowed
from cupy_headnorm._arrays.layout import CPU, Device, dense_strides, is_dense
from cupy_headnorm._arrays.views import ArrayView, Looked, Plain, view_at


class _Untraced:
    """
    True, which tells Dynamo to keep out of a function.

    It would go on to trace what that function calls, frame by frame, so when it first asks it is
    told to keep out of the whole package. No earlier moment would do: the first torch.compile
    imports Dynamo, maybe after us and before any call.
    """

    _told = False

    def __bool__(self) -> bool:
        rules: Any = sys.modules.get("torch._dynamo.trace_rules")
        if not self._told and hasattr(rules, "add"):
            self._told = True
            rules.add("cupy_headnorm")
        return True


_UNTRACED = _Untraced()
Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """
    Make torch.compile break its graph around `function`, as torch.compiler.disable does.

    The attributes are Dynamo's own. They need no torch, and a call costs nothing more.
    """
    vars(function).update(
        _torchdynamo_disable=_UNTRACED,
        _torchdynamo_disable_msg="cupy_headnorm launches kernels of its own, which no graph of "
        "torch holds; needs torch.compile without fullgraph, or a call outside of what is compiled "
        "or exported",
    )
    return function


_TRACERS = {
    "FakeTensorMode",
    "FunctionalTensorMode",
    "PreDispatchTorchFunctionMode",
    "ProxyTorchDispatchMode",
}
"""torch's modes that record operations, or run them on tensors without memory."""


def _looks(torch: Any) -> tuple[Callable[[Any], Any], Callable[[tuple[Any, ...]], Any]]:
    """
    Return `Library.glance` and `Library.look` for plain tensors.

    They refuse nothing themselves: whatever `Torch.view` might refuse goes there. Reading a
    tensor's own attributes takes 0.8 us on an H200's host; whether anything looks on is asked
    once a call.
    """
    is_grad_enabled, forward_ad = torch.is_grad_enabled, torch.autograd.forward_ad
    is_tracing, dispatch_modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack
    function_modes, mode_at = torch._C._len_torch_function_stack, torch._C._get_function_stack_at
    plain = {torch.Tensor, torch.nn.Parameter}

    def only_default_devices() -> bool:
        # Any other mode may trace, or change what torch.empty_like makes.
        context = getattr(sys.modules.get("torch.utils._device"), "DeviceContext", None)
        return all(type(mode_at(i)) is context for i in range(function_modes()))

    def look(arrays: tuple[Any, ...]) -> Looked | None:
        if (
            is_tracing()
            or dispatch_modes()
            or (function_modes() and not only_default_devices())
            or forward_ad._current_level >= 0
        ):
            return None
        addresses, keys = [], []
        try:
            for x in arrays:
                if (
                    type(x) not in plain
                    or not x.is_cuda
                    or x.is_neg()
                    or (x.requires_grad and is_grad_enabled())
                ):
                    return None
                address = x.data_ptr()
                if not address:
                    return None
                addresses.append(address)
                keys.append((x.get_device(), x.shape, x.stride(), x.dtype, address & 15))
        except RuntimeError:  # a tensor without storage
            return None
        return tuple(addresses), tuple(keys)

    def glance(x: Any) -> tuple[int, tuple[Any, ...]] | None:
        # `look` at one, written out: it would take 0.2 us more.
        try:
            if (
                not x.is_cuda
                or x.is_neg()
                or (x.requires_grad and is_grad_enabled())
                or is_tracing()
                or dispatch_modes()
                or (function_modes() and not only_default_devices())
                or forward_ad._current_level >= 0
            ):
                return None
            address = x.data_ptr()
            if not address:
                return None
            return address, (x.get_device(), x.shape, x.stride(), x.dtype, address & 15)
        except RuntimeError:
            return None

    return glance, look


def _version_counter(torch: Any) -> Callable[[tuple[Any, ...]], None]:
    """Return the function inside torch's public one, in half the time, where it does the same."""
    with torch.inference_mode(False), contextlib.suppress(AttributeError, TypeError, RuntimeError):
        inner: Callable[[tuple[Any, ...]], None] = torch._C._increment_version
        probe = torch.empty(0, device="cpu")
        inner((probe,))
        if probe._version == 1:
            return inner

    def each(arrays: tuple[Any, ...]) -> None:
        for array in arrays:
            torch.autograd.graph.increment_version(array)

    return each


class Torch(Plain):
    """The `Library` of torch."""

    name = "torch"
    allocates_in_graphs = True
    glance: Callable[[Any], tuple[int, tuple[Any, ...]] | None]
    look: Callable[[tuple[Any, ...]], Looked | None]
    wrote: Callable[[tuple[Any, ...]], None]
    stream: Callable[[int], int]

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.glance, self.look = _looks(torch)
        self.plain = (torch.Tensor, torch.nn.Parameter)
        # Autograd must know of what was written, or a later backward uses the overwritten values
        # without an error: also where no gradient is recorded, as torch's own in-place functions
        # do. Tensors made in inference mode keep no account, and are left alone.
        self.wrote = _version_counter(torch)
        # On an H100's host: this 0.06 us, torch.cuda.current_stream 1.0.
        self.stream = getattr(torch._C, "_cuda_getCurrentRawStream", self._stream)
        # Tensors whose memory is not what they mean, or who have none.
        self._refusals: tuple[tuple[Callable[[Any], bool], str], ...] = (
            (torch._C._functorch.is_functorch_wrapped_tensor, "inside a torch.func transform"),
            (torch._is_functional_tensor, "functional, without memory of its own"),
            (lambda x: x.layout is not torch.strided, "of layout {x.layout}"),
            (lambda x: x.is_nested, "nested"),
            (lambda x: x.is_quantized, "quantized"),
            (lambda x: x.is_meta, "on the meta device, without memory"),
            (torch.is_neg, "a lazily negated view (resolve_neg() makes it plain)"),
            (torch.is_conj, "a lazily conjugated view (resolve_conj() makes it plain)"),
            (torch._is_zerotensor, "a zero tensor without memory"),
            (self._is_dual, "a forward-mode AD dual"),
        )

    def view(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> ArrayView:
        self._refuse(x, role)
        dtype = dtypes.from_name(str(x.dtype).removeprefix("torch."), role, allowed)
        device = self._device(x, role)
        strides = tuple([stride * dtype.itemsize for stride in x.stride()])
        return view_at(x.data_ptr(), tuple(x.shape), strides, dtype, device, role, x, self)

    def _device(self, x: Any, role: str) -> Device:
        kind = x.device.type
        if kind == "cpu":
            return CPU
        if kind == "cuda" and not self._torch.version.hip:
            return Device("cuda", x.get_device())
        name = "ROCm" if kind == "cuda" else kind
        raise TypeError(f"{role} is in {name} memory; needs host or CUDA memory")

    def _refuse(self, x: Any, role: str) -> None:
        """Refuse tensors whose attributes do not tell all that they mean."""
        torch = self._torch
        traced = self._traced()
        if traced is not None:
            raise TypeError(
                f"{role} is traced {traced}, which would lose this norm; needs an eager call, "
                "outside of the trace"
            )
        if type(x) not in self.plain:
            raise TypeError(
                f"{role} is a {type(x).__name__}, a subclass of torch.Tensor; "
                "needs a plain tensor or Parameter"
            )
        for is_refused, what in self._refusals:
            if is_refused(x):
                raise TypeError(f"{role} is {what.format(x=x)}; needs a strided tensor with memory")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{role} requires grad and grad mode is on, but this norm has no backward; "
                f"needs torch.no_grad() around the call, or {role}.detach()"
            )

    def _traced(self) -> str | None:
        """Tell who records the operations on tensors now: a launch is none, and would be lost."""
        c = self._torch._C
        if c._is_tracing():
            return "by torch.jit.trace"
        # Others that look on, such as a FlopCounterMode or a default device, lose nothing.
        for count, at in (
            (c._len_torch_dispatch_stack, c._get_dispatch_stack_at),
            (c._len_torch_function_stack, c._get_function_stack_at),
        ):
            for i in range(count()):
                names = {kind.__name__ for kind in type(at(i)).__mro__} & _TRACERS
                if names:
                    return f"by make_fx, torch.export or the like ({names.pop()})"
        return None

    def _is_dual(self, x: Any) -> bool:
        forward_ad = self._torch.autograd.forward_ad
        return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None

    def empty_like(self, view: ArrayView) -> tuple[Any, Callable[[Any], Any]]:
        make = self._torch.empty_like
        result = make(view.owner)
        if result.dim() and result.numel() and result.shape[-1] > 1 and result.stride(-1) != 1:
            make = partial(make, memory_format=self._torch.contiguous_format)
            result = make(view.owner)
        elif not is_dense(result.shape, result.stride()):
            make = self._dense_like
            result = make(view.owner)
        return result, make

    @staticmethod
    def _dense_like(x: Any) -> Any:
        """
        Return new memory in the order of axes of `x`, dense along axes of length 1 too.

        torch.empty_like takes over their strides from an `x` that has no gaps otherwise, and a
        product of matrices looks at them.
        """
        return x.new_empty_strided(x.shape, dense_strides(x.shape, x.stride()))

    def address(self, x: Any) -> int:
        try:
            address: int = x.data_ptr()
        except RuntimeError:  # made inside a transform of torch.func
            return 0
        return address

    def _stream(self, index: int) -> int:
        handle: int = self._torch.cuda.current_stream(index).cuda_stream
        return handle

    def to_host(self, x: Any, role: str, allowed: Allowed = NUMBERS) -> np.ndarray:
        with self._torch.no_grad():
            self._refuse(x, role)
            return self.view(x.detach().cpu(), role, allowed).as_numpy()

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        # NumPy cannot hand bfloat16 to torch, so torch makes the memory and NumPy fills it.
        host = self._torch.empty(values.shape, dtype=like.owner.dtype, device="cpu")
        np.copyto(self.view(host, "result").as_numpy(), values)
        return host.to(like.owner.device)
