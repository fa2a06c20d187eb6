"""
Any array in, an `ArrayView` out; results in the producer's library, on the producer's stream.

Libraries are found in `sys.modules` and never imported: whoever holds a tensor has imported its
library already. Nothing here copies an element.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np

from cupy_headnorm._arrays.dtypes import NUMBERS, POSITIONS, Allowed
from cupy_headnorm._arrays.libraries import JAX, CuPy, DLPack, NumPy
from cupy_headnorm._arrays.torch import Torch, untraced
from cupy_headnorm._arrays.views import ArrayView, Library
from cupy_headnorm._cuda import environment

_NUMPY = NumPy()
_DLPACK = DLPack()
_found: MutableMapping[type, Library] = weakref.WeakKeyDictionary()
"""Of the types met, none of which lives longer for it: programs make classes in loops."""
quick: dict[type, Library] = {}
"""The types of arrays that are looked at by `Library.glance`, once one of each was seen."""


@untraced
def library_of(x: Any, role: str) -> Library:
    """Return the library whose array `x` is; TypeError where it is none."""
    library = _found.get(type(x))
    if library is None:
        library = _found[type(x)] = _find(x, role)
    return library


def _find(x: Any, role: str) -> Library:
    # Another thread may be importing one of them: it has no arrays then.
    cupy: Any = sys.modules.get("cupy")
    torch: Any = sys.modules.get("torch")
    jax: Any = sys.modules.get("jax")
    if isinstance(x, np.ndarray):
        return _NUMPY
    if isinstance(x, getattr(cupy, "ndarray", ())):
        if cupy.cuda.runtime.is_hip:
            raise TypeError(f"{role} is a CuPy array of a ROCm build; needs CuPy for CUDA")
        return _once(CuPy, cupy, cupy.ndarray)
    if isinstance(x, getattr(torch, "Tensor", ())):
        return _once(Torch, torch, torch.Tensor)
    if isinstance(x, getattr(getattr(jax, "core", None), "Tracer", ())):
        raise TypeError(
            f"{role} is a {type(x).__name__}, without memory: the call is inside jax.jit or "
            "another transform of JAX; needs an eager call, outside of it"
        )
    is_class = isinstance(x, type)  # whose methods want an instance
    if not is_class and hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        if isinstance(x, getattr(jax, "Array", ())):
            return _found.setdefault(jax.Array, JAX(jax))
        return _DLPACK
    raise TypeError(
        f"{role} is a {type(x).__name__}; needs a NumPy, CuPy or torch array, "
        "or any object with __dlpack__ and __dlpack_device__"
    )


def _once(adapter: Callable[[Any], Library], module: Any, array: type) -> Library:
    """Make the adapter of a library whose plain arrays are looked at, or return the one made."""
    known = quick if _hidden is None else _hidden
    library = known.get(array)
    if library is None:
        library = known.setdefault(array, adapter(module))
    for kind in library.plain:
        known[kind] = library
    return library


def view(x: Any, role: str, allowed: Allowed = NUMBERS) -> ArrayView:
    """Describe any array."""
    return library_of(x, role).view(x, role, allowed)


def view_beside(
    x: ArrayView, array: Any, role: str, allowed: Allowed = NUMBERS, *, of: str = "x"
) -> ArrayView:
    """Describe `array`, which must come from the library of `x`, called `of`."""
    library = library_of(array, role)
    if library is not x.library:
        raise TypeError(
            f"{role} is a {type(array).__name__} ({library.name}); "
            f"needs the library of {of}, {x.library.name}"
        )
    return library.view(array, role, allowed)


def to_host(array: Any, role: str) -> np.ndarray:
    """Return an array's values in host memory, copied from a device."""
    allowed = POSITIONS if role == "positions" else NUMBERS
    return library_of(array, role).to_host(array, role, allowed)


_hidden: dict[type, Library] | None = None
"""In the child of a fork, what `quick` held, until CUDA is seen to work there; else None."""


def _forget() -> Callable[[], None]:
    """Let every call go step by step: what its like has loaded before the fork may be lost."""
    global _hidden
    _hidden = {**(_hidden or {}), **quick}
    quick.clear()
    return _restore


def _restore() -> None:
    global _hidden
    quick.update(_hidden or {})
    _hidden = None


environment.on_fork(_forget)
