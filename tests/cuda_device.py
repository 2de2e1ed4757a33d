"""The emulator's ``Module`` on a GPU, where there is one: the same tests, launched by cupy.

``FASTDMF_KERNELS=cuda pytest tests/test_cuda_*.py`` runs them so. Every array is copied into a band of 0xFF bytes on
the device and back, and what a kernel may not write must be the same afterwards. Orders of the threads are the
hardware's own.
"""

import os
import re

import cuda_emulator
import numpy as np

__all__ = ["ON_DEVICE", "Module"]

ON_DEVICE = os.environ.get("FASTDMF_KERNELS") == "cuda"
BAND = 512


class DeviceModule:
    """As ``cuda_emulator.Module``, compiled by cupy."""

    def __init__(self, text, options=(), *, name="kernels"):
        import cupy

        self.name, self.kernels, self._cupy = name, cuda_emulator.kernel_names(text), cupy
        self._raw = cupy.RawModule(code=text, options=("-std=c++17", *options))
        self._constant = {kernel: _constants(text, kernel) for kernel in self.kernels}

    def launch(self, kernel, grid, block, arguments, *, shared=0, order="forward", seed=0):
        """Run a kernel on copies of the arguments, and copy them back."""
        cupy = self._cupy
        function, bands, cells = self._raw.get_function(kernel), {}, []
        if shared > 48 << 10:
            function.max_dynamic_shared_size_bytes = shared
        for k, value in enumerate(arguments):
            if isinstance(value, np.ndarray):
                if id(value) not in bands:
                    frame = cupy.full(value.nbytes + 2 * BAND, 0xFF, np.uint8)
                    inside = frame[BAND : BAND + value.nbytes].view(value.dtype).reshape(value.shape)
                    inside.set(np.ascontiguousarray(value))
                    bands[id(value)] = [value, frame, inside, True]
                bands[id(value)][3] &= self._constant[kernel][k]
                value = bands[id(value)][2]
            cells.append(np.uint64(0) if value is None else value)
        function(grid, block, tuple(cells), shared_mem=shared)
        cupy.cuda.get_current_stream().synchronize()
        for value, frame, inside, constant in bands.values():
            if bool((frame[:BAND] != 0xFF).any()) or bool((frame[BAND + value.nbytes :] != 0xFF).any()):
                raise cuda_emulator.EmulationError(f"{self.name}: {kernel}: writes outside of an argument")
            result = inside.get()
            if constant and result.tobytes() != value.tobytes():
                raise cuda_emulator.EmulationError(f"{self.name}: {kernel}: writes to an argument that is const")
            value[...] = result


def _constants(text, kernel):
    """Return for each parameter of a kernel whether it is const."""
    inside = re.search(rf"\b{kernel}\((.*?)\)\s*\{{", text, re.DOTALL)[1]
    return ["const " in parameter or "*" not in parameter for parameter in inside.split(",")]


Module = DeviceModule if ON_DEVICE else cuda_emulator.Module
