"""The buffers of bytes that the arrays of a drawn call lie in, by array library."""

import numpy as np
from libraries import CuPyLibrary, NumPyLibrary, TorchLibrary
from strategies import MEMORY, Backend


class Numpy:
    """A buffer that NumPy's arrays lie in."""

    backend = Backend("numpy", read_only=True)

    def __init__(self):
        self.library = NumPyLibrary()
        memory = np.zeros(MEMORY + 64, np.uint8)
        self.memory = memory[-memory.ctypes.data % 64 :][:MEMORY]

    def write(self, values):
        self.memory[: values.size] = values

    def read(self, size):
        return self.memory[:size].copy()

    def array(self, place, writeable=True):
        found = place.of(self.memory)
        found.flags.writeable = writeable
        return found


class TorchOnHost(Numpy):
    backend = Backend("torch-cpu", negative_strides=False, odd_addresses=False)

    def __init__(self):
        import torch

        super().__init__()
        self.library = TorchLibrary("cpu")
        self.bytes = torch.from_numpy(self.memory)

    def array(self, place, writeable=True):
        import torch

        size = place.dtype.itemsize
        flat = self.bytes.view(getattr(torch, place.dtype.name))
        steps = [stride // size for stride in place.strides]
        return flat.as_strided(place.shape, steps, place.offset // size)


class TorchOnCuda(TorchOnHost):
    backend = TorchOnHost.backend._replace(name="torch-cuda", kernels=True)

    def __init__(self):
        import torch

        self.library = TorchLibrary("cuda")
        self.bytes = torch.zeros(MEMORY, dtype=torch.uint8, device="cuda")

    def write(self, values):
        import torch

        self.bytes[: values.size].copy_(torch.from_numpy(values))

    def read(self, size):
        return self.bytes[:size].cpu().numpy()


class CuPy:
    backend = Backend("cupy", kernels=True)

    def __init__(self):
        import cupy

        self.library = CuPyLibrary()
        self.memory = cupy.zeros(MEMORY, np.uint8)

    def write(self, values):
        self.memory[: values.size].set(values)

    def read(self, size):
        return self.memory[:size].get()

    def array(self, place, writeable=True):
        import cupy

        return cupy.ndarray(
            place.shape, place.dtype, self.memory.data + place.offset, strides=place.strides
        )


class Kernels(Numpy):
    """NumPy's arrays, on which the kernels run."""

    backend = Numpy.backend._replace(name="kernels-on-host", kernels=True)


ON_GPU = [CuPy, TorchOnCuda]


def name_of(memory):
    return memory.backend.name
