"""
What is made once and then kept: kernels, and weights and tables on a device.

Between any two steps of a thread Python may run a signal's handler or a finalizer in it. One that
comes while its own thread makes something may want the same thing, or another one, which another
thread is making. So there is one lock for all, and who holds it may take it again: no thread waits
for a second one, nor for itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

_making = threading.RLock()


def made_once(kept: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """
    Return `kept[key]`, which one thread makes where it is missing, while others wait.

    A handler that interrupts `make` may make it too. What is kept first stays, and is what both
    return: somebody may be using it.
    """
    found = kept.get(key)
    if found is None:
        with _making:
            found = kept.get(key)
            if found is None:
                found = kept.setdefault(key, make())
    return found


def _forked() -> None:
    """Forget the lock: who held it may be a thread that the child of a fork does not have."""
    global _making
    _making = threading.RLock()


os.register_at_fork(after_in_child=_forked)
