"""torch tensors, without importing torch: through its C exchange API, or a capsule before 2.11."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupy_headnorm import _dlpack, _dtypes
from cupy_headnorm._arrays import ArrayView, Plain, view_of


class Torch(Plain):
    """The `Library` of torch."""

    name = "torch"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._kinds = (torch.Tensor, torch.nn.Parameter)
        self._api = _dlpack.exchange_api(torch.Tensor)
        # Tensors whose memory is not what they mean, or who have none.
        self._refusals: tuple[tuple[Callable[[Any], bool], str], ...] = (
            (torch._C._functorch.is_functorch_wrapped_tensor, "inside a torch.func transform"),
            (torch._is_functional_tensor, "functional, without memory of its own"),
            (lambda x: x.layout is not torch.strided, "of layout {x.layout}"),
            (lambda x: x.is_quantized, "quantized"),
            (lambda x: x.is_meta, "on the meta device, without memory"),
            (torch.is_neg, "a lazily negated view (resolve_neg() makes it plain)"),
            (torch.is_conj, "a lazily conjugated view (resolve_conj() makes it plain)"),
            (torch._is_zerotensor, "a zero tensor without memory"),
            (self._is_dual, "a forward-mode AD dual"),
        )

    def view(self, x: Any, role: str) -> ArrayView:
        self._refuse(x, role)
        dtype = _dtypes.from_name(str(x.dtype).removeprefix("torch."), role)
        raw = self._api.view(x) if self._api else self._through_capsule(x)
        return view_of(raw, dtype, role, x, self)

    def _refuse(self, x: Any, role: str) -> None:
        """Refuse what the exchange API, which checks nothing, would let through."""
        torch = self._torch
        if type(x) not in self._kinds:
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

    def _is_dual(self, x: Any) -> bool:
        forward_ad = self._torch.autograd.forward_ad
        return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None

    def _through_capsule(self, x: Any) -> _dlpack.Tensor:
        """Describe a tensor of a torch before 2.11, which has no C exchange API."""
        x = x.detach()
        if x.device.type != "cuda":
            return _dlpack.read_capsule(x.__dlpack__())
        with self._torch.cuda.device(x.device):
            return _dlpack.read_capsule(x.__dlpack__(stream=-1))

    def empty_like(self, view: ArrayView) -> Any:
        torch = self._torch
        result = torch.empty_like(view.owner, requires_grad=False)
        if result.dim() and result.numel() and result.shape[-1] > 1 and result.stride(-1) != 1:
            return torch.empty_like(view.owner, memory_format=torch.contiguous_format)
        return result

    def stream(self, index: int) -> int:
        if self._api:
            return self._api.stream(index)
        return self._torch.cuda.current_stream(index).cuda_stream

    def wrote(self, out: Any) -> None:
        # Autograd must know, or a later backward uses the overwritten values without an error:
        # also where no gradient is recorded, as torch's own in-place functions do.
        if not out.is_inference():
            self._torch.autograd.graph.increment_version(out)

    def to_host(self, x: Any, role: str) -> np.ndarray:
        with self._torch.no_grad():
            self._refuse(x, role)
            return self.view(x.detach().cpu(), role).as_numpy()

    def from_host(self, values: np.ndarray, like: ArrayView) -> Any:
        # NumPy cannot hand bfloat16 to torch, so torch makes the memory and NumPy fills it.
        host = self._torch.empty(values.shape, dtype=like.owner.dtype, device="cpu")
        np.copyto(self.view(host, "result").as_numpy(), values)
        return host.to(like.owner.device)
