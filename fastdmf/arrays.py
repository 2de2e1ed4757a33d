"""Arrays of other libraries: where they live, and how they come to the host.

What lies on a GPU says so by ``__cuda_array_interface__`` (cupy, torch, numba, jax). cupy is imported for such arrays
alone.
"""

import numpy as np

__all__ = ["as_cupy", "as_host", "as_native", "is_on_device", "same_home"]


def is_on_device(a):
    """Return whether ``a`` is an array in a GPU's memory."""
    if isinstance(a, (np.ndarray, np.generic, int, float, str, tuple, list)) or a is None:
        return False
    try:
        # torch has the attribute on every tensor, and raises for those on the host.
        return hasattr(a, "__cuda_array_interface__")
    except (TypeError, RuntimeError):
        return False


def as_cupy(a):
    """Return an array in a GPU's memory as cupy's, without a copy: its own, or by DLPack where it has that."""
    import cupy

    if isinstance(a, cupy.ndarray):
        return a
    return cupy.from_dlpack(a) if hasattr(a, "__dlpack__") else cupy.asarray(a)


def as_native(a):
    """Return (module, array): cupy and its array for what is on a device, else numpy and an ndarray."""
    if not is_on_device(a):
        return np, np.asarray(a)
    import cupy

    return cupy, as_cupy(a)


def as_host(a):
    """Return a device array as NumPy's, and everything else as it is."""
    return as_cupy(a).get() if is_on_device(a) else a


def same_home(arrays, like):
    """Return ``arrays`` where ``like`` lives: as NumPy's, or as cupy's if it is on a device."""
    if not is_on_device(like):
        return [as_host(a) for a in arrays]
    import cupy

    return [cupy.asarray(a) for a in arrays]
