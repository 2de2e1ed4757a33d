"""CUDA C++ compiled by g++ behind ``cuda_emulator.h`` and run on NumPy arrays, as a GPU's driver would run it.

A ``Module`` is the text of some kernels with its ``-D`` options. ``launch`` takes a grid, a block and the arguments of
a kernel; the types are those of the C++ parameters, so that a wrong dtype or order is a ``TypeError`` before it is a
wrong number. Around every array lies a band of 0xFF bytes: NaN for who reads there, an error for who writes there.
What a kernel takes as const must be the same afterwards. Only arrays above a gigabyte go as they are.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent / "__pycache__" / "cuda"
COMPILER = shutil.which("g++")
AVAILABLE = COMPILER is not None and sys.platform == "linux"  # what a library has shared is found in ELF files alone
ORDERS = ("forward", "reverse", "random")

# -ffp-contract=off: what is fused is written so. -fno-extern-tls-init: shared memory
# has no initial values, which g++ would look for. The two sanitizers find vector loads off their place and indices
# outside of arrays; their calls end in the header.
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    "-fno-extern-tls-init",
    *("-fsanitize=alignment,bounds", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"),
]
BAND = 512  # bytes; a GPU's allocator aligns to as many
_LARGE = 1 << 30

_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(')


class EmulationError(RuntimeError):
    """A kernel did what a GPU would not forgive."""


class _Parameter(ctypes.Structure):
    _fields_ = [(name, ctypes.c_byte) for name in ("pointer", "constant", "kind", "size")]


def kernel_names(text):
    """Return the names of the kernels that a text defines for the outside."""
    return _KERNEL.findall(text)


def _machine_flags():
    """Return the flags that make fma one instruction where there is one."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    return ["-mfma"] if re.search(r"\bfma\b", features) and os.uname().machine == "x86_64" else []


def build(text, options=(), *, name="kernels", header=None):
    """Compile the text of kernels to a library, or find it compiled, and return its path."""
    header = (HERE / "cuda_emulator.h").read_text() if header is None else header
    whole = f'#include "cuda_emulator.h"\n#line 1 "{name}.cu"\n{text}\n'
    whole += "\n".join(f"EMULATOR_EXPORT({kernel})" for kernel in kernel_names(text))
    flags = [*FLAGS, *_machine_flags(), *options]
    key = [whole, header, str(flags), COMPILER]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:20]
    library = BUILT / f"{name}-{digest}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            source, half, done = (Path(folder) / file for file in ("kernels.cpp", "kernels.o", "kernels.so"))
            source.write_text(whole)
            (Path(folder) / "cuda_emulator.h").write_text(header)
            for command in ([COMPILER, *flags, "-c", source, "-o", half], [COMPILER, "-shared", half, "-o", done]):
                told = subprocess.run(command, capture_output=True, text=True)
                if told.returncode or told.stderr:
                    raise RuntimeError(f"{name}: {told.stderr}")
            os.replace(done, library)
    return library


class Module:
    """Kernels that are ready to run.

    Parameters
    ----------
    text : str
        CUDA C++; kernels are its ``extern "C" __global__`` functions.
    options : sequence of str
        As for the compiler of a GPU: ``-DNAME=VALUE``.
    name : str
        For messages and files.
    header : str, optional
        Instead of ``cuda_emulator.h``.
    """

    def __init__(self, text, options=(), *, name="kernels", header=None):
        self.name, self.kernels = name, kernel_names(text)
        self._library = ctypes.CDLL(str(build(text, options, name=name, header=header)))

    def _parameters(self, kernel):
        describe = getattr(self._library, f"parameters_{kernel}")
        describe.restype = ctypes.POINTER(_Parameter)
        found = []
        for p in describe():
            if p.pointer == 2:
                return found
            found.append((bool(p.pointer), bool(p.constant), np.dtype(f"{chr(p.kind)}{p.size}")))

    def launch(self, kernel, grid, block, arguments, *, shared=0, order="forward", seed=0):
        """Run a kernel.

        Parameters
        ----------
        kernel : str
        grid, block : tuple of int
            Up to three.
        arguments : sequence
            C-contiguous arrays, None for a null pointer, NumPy scalars: no Python numbers, whose width on a GPU is
            what the driver thinks.
        shared : int
            Bytes of dynamic shared memory.
        order : {"forward", "reverse", "random"}
            In which order threads and blocks take turns.
        seed : int
            For the random order.

        Raises
        ------
        TypeError
            If the arguments are not what the kernel takes.
        EmulationError
            If it did something wrong; the message tells the block, the thread and the line.
        """
        parameters = self._parameters(kernel)
        if len(arguments) != len(parameters):
            raise TypeError(f"{kernel} takes {len(parameters)} arguments, got {len(arguments)}")
        cells, banded = [], {}
        for k, (value, (pointer, constant, dtype)) in enumerate(zip(arguments, parameters)):
            if pointer and value is None:
                cells.append(np.zeros(1, np.uintp))
                continue
            if not isinstance(value, np.ndarray if pointer else np.generic) or value.dtype != dtype:
                kind, got = (
                    "an array" if pointer else "a number",
                    f"{type(value).__name__} {getattr(value, 'dtype', '')}",
                )
                raise TypeError(f"{kernel}: argument {k} is {kind} {dtype}, not {got.strip()}")
            if pointer and value.nbytes > _LARGE:
                value = np.uintp(value.ctypes.data)
            elif pointer:  # one array that is given twice is one on the device as well
                band = banded.setdefault(id(value), _Banded(k, value))
                band.constant &= constant
                value = np.uintp(band.inside.ctypes.data)
            cells.append(np.array(value))
        addresses = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        run = getattr(self._library, f"launch_{kernel}")
        run.restype = ctypes.c_char_p
        sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        told = run(*sizes, ctypes.c_size_t(shared), ORDERS.index(order), ctypes.c_uint(seed), addresses)
        if told:
            raise EmulationError(f"{self.name}: {kernel}: {told.decode()}")
        for band in banded.values():
            fault = band.take_back()
            if fault:
                raise EmulationError(f"{self.name}: {kernel}: {fault}")


class _Banded:
    """A copy of an argument inside a band of 0xFF bytes."""

    def __init__(self, place, array):
        if not array.flags.c_contiguous:
            raise TypeError("arrays must be C-contiguous")
        self.place, self.array, self.constant = place, array, True
        self.frame = np.full(array.nbytes + 3 * BAND, 0xFF, np.uint8)
        self.start = BAND + -self.frame.ctypes.data % BAND
        self.inside = self.frame[self.start : self.start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.inside[...] = array

    def take_back(self):
        """Copy the result to the array, or say what is wrong with it."""
        around = self.frame[: self.start], self.frame[self.start + self.array.nbytes :]
        if any((band != 0xFF).any() for band in around):
            return f"writes outside of argument {self.place}"
        if not self.constant:
            self.array[...] = self.inside
        elif self.inside.tobytes() != self.array.tobytes():
            return f"writes to argument {self.place}, which is const"
        return None
