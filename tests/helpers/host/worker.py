"""Run kernels for host.py in a process of their own, since AddressSanitizer must be loaded first.

Requests come as pickles on the standard input, answers go as pickles to the standard output. What
AddressSanitizer and UBSan find they write to the standard error, and end the process.
"""

import ctypes
import pickle
import signal
import struct
import sys

PAGE = 4096
NO_ACCESS, READ_AND_WRITE = 0, 3
PRIVATE_ANONYMOUS_UNRESERVED = 0x4022
MAP_FAILED = 2**64 - 1
SECONDS = 60
"""A kernel may take so many. Those of the tests take milliseconds."""

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.mmap.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Memory:
    """A buffer of `size` bytes, of which `pieces`, (offset, bytes), are filled."""

    def __init__(self, library, size, pieces, forbidden, sparse):
        self.library, self.size, self.sparse = library, size, sparse
        if sparse:
            # As far apart as they are said to be, on pages beside which nothing may be touched.
            self.address = libc.mmap(None, size, NO_ACCESS, PRIVATE_ANONYMOUS_UNRESERVED, -1, 0)
            if self.address == MAP_FAILED:
                raise MemoryError(f"no {size} bytes of addresses")
        else:
            self.address = libc.malloc(size)
        for offset, data in pieces:
            if sparse:
                first = offset // PAGE * PAGE
                length = offset + len(data) - first
                libc.mprotect(self.address + first, length, READ_AND_WRITE)
            ctypes.memmove(self.address + offset, data, len(data))
        ranges = (ctypes.c_size_t * len(forbidden))(*forbidden)
        library.forbid(ctypes.c_void_p(self.address), ranges, len(forbidden) // 2)

    def taken(self, pieces):
        """Return what the pieces hold now, and free all."""
        if not self.sparse:
            self.library.allow(ctypes.c_void_p(self.address), self.size)
        found = [ctypes.string_at(self.address + offset, len(data)) for offset, data in pieces]
        if self.sparse:
            libc.munmap(self.address, self.size)
        else:
            libc.free(self.address)
        return found


def answer(request):
    """Return what the buffers hold after a run in each order, or a text if something is wrong."""
    library = ctypes.CDLL(request["library"])
    library.run.restype = ctypes.c_char_p
    library.allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    kernel = ctypes.cast(library[request["symbol"]], ctypes.c_void_p)
    blocks = (ctypes.c_uint * len(request["blocks"]))(*request["blocks"])
    found = []
    for order in request["orders"]:
        memories = [Memory(library, *buffer) for buffer in request["buffers"]]
        params = ctypes.create_string_buffer(request["params"], len(request["params"]))
        for at, (buffer, offset) in request["addresses"].items():
            struct.pack_into("Q", params, at, memories[buffer].address + offset)
        threads = request["threads"]
        wrong = library.run(kernel, params, blocks, ctypes.c_size_t(len(blocks)), threads, order)
        if wrong:
            return wrong.decode()
        pieces = (pieces for _, pieces, *_ in request["buffers"])
        found.append([m.taken(p) for m, p in zip(memories, pieces, strict=True)])
    return found


while True:
    try:
        request = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    signal.alarm(SECONDS)  # whose signal ends the process
    result = answer(request)
    signal.alarm(0)
    pickle.dump(result, sys.stdout.buffer)
    sys.stdout.buffer.flush()
