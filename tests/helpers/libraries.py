"""One face for the array libraries: make an array, lay it out, read it back."""

import numpy as np


class NumPyLibrary:
    name = "numpy"
    negative_strides = True
    on_gpu = False

    def array(self, values):
        return np.array(values)

    def host(self, array):
        assert type(array) is np.ndarray
        return array

    def pointer(self, array):
        return array.ctypes.data

    def lay(self, flat, layout):
        """Return a view of a 1-D array by a layout of cases.py."""
        return np.lib.stride_tricks.as_strided(
            flat[layout.offset :], layout.shape, [s * flat.itemsize for s in layout.strides]
        )

    def strides(self, array):
        return tuple(s // array.itemsize for s in array.strides)


class CuPyLibrary(NumPyLibrary):
    name = "cupy"
    on_gpu = True

    def array(self, values):
        import cupy

        return cupy.array(values)

    def host(self, array):
        import cupy

        assert type(array) is cupy.ndarray
        return array.get()

    def pointer(self, array):
        return array.data.ptr

    def lay(self, flat, layout):
        import cupy

        return cupy.lib.stride_tricks.as_strided(
            flat[layout.offset :], layout.shape, [s * flat.itemsize for s in layout.strides]
        )


class TorchLibrary:
    name = "torch"
    negative_strides = False

    def __init__(self, device):
        self.device = device
        self.on_gpu = device == "cuda"

    def array(self, values):
        import torch

        values = np.array(values)
        if values.dtype.name == "bfloat16":
            tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(values)
        return tensor.to(self.device)

    def host(self, array):
        import ml_dtypes
        import torch

        assert type(array) is torch.Tensor
        assert array.device.type == self.device
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()

    def pointer(self, array):
        return array.data_ptr()

    def lay(self, flat, layout):
        return flat.as_strided(layout.shape, layout.strides, layout.offset)

    def strides(self, array):
        return array.stride()


class StrictLibrary(NumPyLibrary):
    """array-api-strict: a producer known by its DLPack methods and namespace alone."""

    name = "strict"

    def array(self, values):
        import array_api_strict

        return array_api_strict.asarray(np.array(values))

    def host(self, array):
        import array_api_strict

        assert type(array) is type(array_api_strict.asarray(0))
        return np.from_dlpack(array)

    def pointer(self, array):
        return np.from_dlpack(array).ctypes.data
