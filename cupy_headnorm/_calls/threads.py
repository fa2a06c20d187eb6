"""Work that several threads share."""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections.abc import Callable


def helped(work: Callable[[], None], helpers: int, stop: Callable[[], None]) -> None:
    """
    Run `work` here and in so many threads beside, until all of them return.

    There are fewer where no more start: at the interpreter's end, or where a process may have no
    more. One that fails or is interrupted lets the others `stop`.
    """
    failures: list[BaseException] = []
    running: list[threading.Lock] = []

    def help_out(ended: threading.Lock) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
            stop()
        finally:
            ended.release()

    def wait() -> None:
        for ended in running:
            with ended:
                pass

    # An executor would take a lock that all executors share. A signal's handler that comes then,
    # and calls a norm, waits for its own thread.
    try:
        with contextlib.suppress(RuntimeError):
            for _ in range(helpers):
                ended = threading.Lock()
                ended.acquire()
                _thread.start_new_thread(help_out, (ended,))
                running.append(ended)
        work()
        wait()
    finally:
        stop()
        wait()
    if failures:
        raise failures.pop()
