"""The calling form of ExLlamaV2's head norm, whose other arguments a norm ignores."""

from __future__ import annotations

from typing import Any, cast

from cupy_headnorm._arrays import find
from cupy_headnorm._arrays.torch import untraced
from cupy_headnorm._described import Described


class ExLlamaForm(Described):
    """A norm that can be called in that form, too."""

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
        result = cast(Any, self)(hidden_states)
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
        from cupy_headnorm import reference

        arguments = self._arguments()
        function = getattr(reference, f"{arguments.pop('kind')}_norm")
        values = x.library.to_host(hidden_states, "x")
        result = x.library.from_host(function(values, self.weight, self.bias, **arguments), x)
        return {"hidden_states": result} if intermediates else result


def _refuse_new_names(ignored: dict[str, Any]) -> None:
    """Refuse arguments of `__call__` that the old calling form would silently ignore."""
    for name in ("out", "heads_axis"):
        if name in ignored:
            raise TypeError(f"forward takes no {name}; needs a call of the norm itself")
