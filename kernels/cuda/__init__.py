"""Kernels for CUDA as text, and the host's part of them: plans in NumPy and the launches of one call.

``<family>.cu`` holds the kernels of a family and ``<family>.py`` what goes around them, with the names and arguments
of ``fastdmf.kernels.cpu`` where the work is the same. Nothing here imports a GPU's packages. A ``module`` is what a
family's text was compiled to with its options: any object with

    launch(kernel, grid, block, arguments, *, shared=0)

where grid and block are tuples, arguments are device arrays, None for a null pointer, or NumPy scalars, and shared is
the dynamic shared memory in bytes. Arrays are C-contiguous, and scratch is passed in: a call allocates nothing, so that
it can be part of a graph.
"""

from pathlib import Path

import numpy as np

__all__ = ["FAMILIES", "real_name", "source", "stored_name"]

# What each family's text is made of.
FAMILIES = {
    "dense": ("common", "sums", "dense"),
    "entry": ("common", "rows", "entry"),
    "gaussian": ("common", "measurements", "gaussian"),
    "lbfgs": ("common", "sums", "lbfgs"),
    "row_solve": ("common", "rows", "row_solve"),
    "seeded": ("common", "measurements", "seeded"),
    "slices": ("common", "sums", "slices"),
    "small_chain": ("common", "rules", "small_chain"),
    "update": ("common", "rules", "update"),
}

_NAMES = {
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
    np.dtype(np.int32): "int",
    np.dtype(np.int64): "long long",
}


def source(family):
    """Return the whole text of a family: no file of its own that a compiler's cache would not see.

    Raises
    ------
    KeyError
        If there is no such family.
    """
    folder = Path(__file__).parent
    return "\n".join((folder / f"{name}.cu").read_text(encoding="utf-8") for name in FAMILIES[family])


def real_name(dtype):
    """Return the name of float32, float64, int32 or int64 in C++."""
    return _NAMES[np.dtype(dtype)]


def stored_name(dtype, stored=None):
    """Return how large arrays are stored: as ``dtype``, or ``"bfloat16"`` or ``"float16"`` beside float32.

    Raises
    ------
    ValueError
        If a half width is asked for beside float64.
    """
    if stored is None:
        return real_name(dtype)
    if stored not in ("bfloat16", "float16") or np.dtype(dtype) != np.float32:
        raise ValueError(f"stored must be None, or 'bfloat16' or 'float16' for float32, got {stored!r} for {dtype}")
    return stored
