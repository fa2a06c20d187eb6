"""Kernels run in a process of their own, on copies of the memory that they may touch."""

import atexit
import contextlib
import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np
from host_build import FOLDER, sanitizer

ORDERS = (0, 1, 2024)
"""Threads run in these: ascending, descending, and by a seed."""
SPARSE = 2**26
"""Above so many bytes a buffer's addresses are reserved, and only the pages of its rows exist."""


class Finding(Exception):
    """What a sanitizer, or the running of the block, says against a kernel."""


class _Worker:
    """The process that runs kernels. A finding ends it; the next request starts another."""

    def __init__(self):
        self.process = self.report = None

    def start(self):
        self.report = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", FOLDER / "worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.report,
            env={
                **os.environ,
                "LD_PRELOAD": sanitizer(),
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
        )

    def stop(self):
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.report.close()
            self.process = None

    def ask(self, request):
        if self.process is None:
            self.start()
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            code = self.process.wait()
            self.report.seek(0)
            answer = self.report.read().decode(errors="replace").strip()
            answer = answer or f"the worker ended with {code} and no word"
        except BaseException:
            # Interrupted: the answer would be taken for that to the next request.
            self.process.kill()
            self.stop()
            raise
        if isinstance(answer, str):
            self.stop()
            raise Finding(answer)
        return answer


_worker = _Worker()
atexit.register(_worker.stop)


class Use(NamedTuple):
    """Rows of bytes that a kernel may touch."""

    starts: np.ndarray
    """The addresses of the rows."""
    width: int
    written: bool = False


def _merged(uses):
    """Return the ranges of bytes that are used, as starts and ends, in order and apart."""
    starts = np.concatenate([use.starts.ravel() for use in uses])
    ends = np.concatenate([use.starts.ravel() + use.width for use in uses])
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.append(True, starts[1:] > reach[:-1])
    return starts[first], reach[np.append(first[1:], True)]


class _Buffer:
    """Arrays that share an extent of memory, and a copy of it for the worker."""

    def __init__(self, uses):
        self.starts, self.ends = _merged(uses)
        self.low, self.high = int(self.starts[0]), int(self.ends[-1])
        # The copy lies as the memory does to a boundary of 16 bytes.
        self.first = self.low - self.low % 16
        self.size = self.high - self.first
        self.sparse = self.size > SPARSE
        written = [use for use in uses if use.written]
        self.written = _merged(written) if written else ((), ())

    def pieces(self):
        """Return what the copy is filled with: (offset, bytes)."""
        ranges = [(self.low, self.high)]
        if self.sparse:
            ranges = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [(a - self.first, ctypes.string_at(a, b - a)) for a, b in ranges]

    def request(self):
        """Return the arguments of the worker's memory."""
        gaps = [0, *np.ravel((self.starts, self.ends), "F").tolist()]
        forbidden = [] if self.sparse else [max(0, at - self.first) for at in gaps[:-1]]
        return self.size, self.pieces(), forbidden, self.sparse

    def check(self, pieces, results):
        """Raise Finding if a byte changed that is none of the result's."""
        for (offset, before), after in zip(pieces, results, strict=True):
            found = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
            for a, b in zip(*self.written, strict=True):
                low, high = (max(0, int(x) - self.first - offset) for x in (a, b))
                found[low:high] = False
            if found.any():
                raise Finding(f"byte {offset + found.argmax()} is none of the result, and changed")

    def write(self, pieces, results):
        """Copy the result back."""
        for (offset, _), after in zip(pieces, results, strict=True):
            low = self.first + offset
            for a, b in zip(*self.written, strict=True):
                a, b = max(int(a), low), min(int(b), low + len(after))
                if a < b:
                    ctypes.memmove(a, after[a - low : b - low], b - a)


def _buffers(uses):
    """Group the uses whose extents overlap."""
    extents = sorted(
        (int(use.starts.min()), int(use.starts.max()) + use.width, i) for i, use in enumerate(uses)
    )
    groups, reach = [], None
    for low, high, i in extents:
        if reach is None or low >= reach:
            groups.append([])
        groups[-1].append(uses[i])
        reach = high if reach is None else max(reach, high)
    return [_Buffer(group) for group in groups]


def run(built, specialisation, params, uses, blocks, threads, orders=ORDERS):
    """
    Run some blocks of a kernel, and leave its results in the memory of this process.

    Parameters
    ----------
    built : Library
    specialisation : Specialisation
        One of `built`.
    params : ctypes.Structure
        With the addresses of this process.
    uses : dict of int to Use
        What lies where an array's address says, by the address's offset in `params`.
    blocks : sequence of int
        Numbers of those to run, one after another.
    threads : int
        Of a block.
    orders : sequence of int
        See `ORDERS`.

    Raises
    ------
    Finding
        A sanitizer found something, threads waited for each other in vain, bytes changed that are
        none of the result's, or orders led to different bits.
    """
    buffers = _buffers([*uses.values()])
    requests = [buffer.request() for buffer in buffers]
    addresses = {}
    for at, use in uses.items():
        address = int.from_bytes(bytes(params)[at : at + 8], sys.byteorder)
        low = int(use.starts.min())
        number = next(i for i, b in enumerate(buffers) if b.first <= low < b.high)
        addresses[at] = (number, address - buffers[number].first)
    results = _worker.ask({
        "library": str(built.path),
        "symbol": built.symbols[specialisation],
        "params": bytes(params),
        "addresses": addresses,
        "buffers": requests,
        "blocks": list(blocks),
        "threads": threads,
        "orders": orders,
    })  # fmt: skip
    for order, result in zip(orders, results, strict=True):
        for buffer, (_, pieces, *_), found in zip(buffers, requests, result, strict=True):
            buffer.check(pieces, found)
        if result != results[0]:
            raise Finding(f"threads in order {order} and in order {orders[0]} give different bits")
    for buffer, (_, pieces, *_), found in zip(buffers, requests, results[0], strict=True):
        buffer.write(pieces, found)
