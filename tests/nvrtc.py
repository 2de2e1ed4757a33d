"""NVRTC, NVIDIA's compiler, through ctypes: kernels become machine code of any GPU on a machine that has none.

It comes with the package ``nvidia-cuda-nvrtc`` (CUDA 13) or ``nvidia-cuda-nvrtc-cu12``, and with cupy's ``[ctk]``.
"""

import ctypes
import importlib.util
import re
from pathlib import Path


def find():
    """Return the path of the library, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations)
    found = [p for folder in folders for p in sorted(Path(folder).glob("*/lib*/libnvrtc.so*"))]
    return next((p for p in found if ".alt." not in p.name), None)


class Compiler:
    """NVRTC as it was found."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, name, *args):
        return getattr(self._library, name)(*args)

    def version(self):
        """Return "major.minor"."""
        numbers = (ctypes.c_int * 2)()
        self._call("nvrtcVersion", ctypes.byref(numbers, 0), ctypes.byref(numbers, ctypes.sizeof(ctypes.c_int)))
        return "{}.{}".format(*numbers)

    def architectures(self):
        """Return the numbers of the architectures it knows."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return list(numbers)

    def compile(self, text, architecture, options=(), *, name="kernels"):
        """Compile to machine code; return what its assembler says, and the code before it.

        Returns
        -------
        resources : dict
            kernel -> (registers of a thread, bytes of stack that it uses beside them).
        ptx : str

        Raises
        ------
        RuntimeError
            With the compiler's messages; warnings count.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
        flags = [f"-arch=sm_{architecture}", "-std=c++17", "-ftz=true", "--ptxas-options=-v", *options]
        values = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        code = self._call("nvrtcCompileProgram", program, len(flags), values)
        log, ptx = (self._text(program, f"nvrtcGet{what}") for what in ("ProgramLog", "PTX"))
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        if code or "warning" in log or "error" in log:
            raise RuntimeError(f"{name}, sm_{architecture}, {options}: {log}")
        return resources(log), ptx

    def _text(self, program, name):
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(name, program, text)
        return text.value.decode()


def resources(log):
    """Return registers and bytes of stack of each kernel from the assembler's messages."""
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    # Functions that are called, like pow, are told of in between.
    kernel = rf"Compiling entry function '(\w+)'.*?Function properties for \1\n\D*{frame}.*?Used (\d+) registers"
    found = re.findall(kernel, log, re.S)
    return {name: (int(used), int(stack) + int(out) + int(back)) for name, stack, out, back, used in found}
