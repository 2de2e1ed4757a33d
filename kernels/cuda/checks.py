"""Shapes and dtypes of a launch: looked at before a kernel runs, for a kernel does not.

A table has a row ``argument="dtype size size ..."`` for every array of a launcher. A dtype is that of NumPy, or a
letter that stands for one throughout: ``REAL`` float32 or float64, ``INDEX`` int32 or int64, ``STORED`` the REAL or
uint16, half the bits. ``?`` behind it lets the argument be None. A size is a number, a name that stands for one number
throughout, ``name+1`` for one more, ``name+`` for at least so many, or ``1|name`` for one row that all share as well.
"""

import numpy as np

__all__ = ["check_arguments", "table"]

_KINDS = {"REAL": ("float32", "float64"), "INDEX": ("int32", "int64")}


def table(**rows):
    """Return the table of one launcher, each row as (dtype, optional, sizes)."""
    return {name: _row(*text.split()) for name, text in rows.items()}


def _row(dtype, *sizes):
    return dtype.rstrip("?"), dtype.endswith("?"), sizes


def check_arguments(rows, sizes=(), /, **arrays):
    """Raise unless every array is what its row of the table says.

    Parameters
    ----------
    rows : dict
        From ``table``. What a row uses with ``+``, and REAL where one has STORED, is known from ``sizes`` or from a row
        before it.
    sizes : dict, optional
        What names and letters stand for beforehand: numbers of a plan, names of dtypes.
    **arrays
        The arguments by name.

    Returns
    -------
    dict
        What names and letters stand for.

    Raises
    ------
    ValueError
        The message names the argument, what it is and what it must be.
    """
    known = dict(sizes)
    for name, (dtype, optional, dims) in rows.items():
        array = arrays[name]
        if array is None:
            if not optional:
                raise ValueError(f"{name} must be an array, got None")
            continue
        _check_dtype(name, array, dtype, known)
        _check_shape(name, array, dims, known)
    return known


def _check_dtype(name, array, dtype, known):
    got = getattr(array, "dtype", None)
    if dtype == "STORED":
        allowed = (known["REAL"], "uint16") if known["REAL"] == "float32" else (known["REAL"],)
    elif dtype in _KINDS:
        allowed = (known[dtype],) if dtype in known else _KINDS[dtype]
    else:
        allowed = (dtype,)
    if got is None or np.dtype(got).name not in allowed:
        raise ValueError(f"{name} must be an array of {' or '.join(allowed)}, got {got or type(array).__name__}")
    if dtype in _KINDS:
        known[dtype] = np.dtype(got).name


def _check_shape(name, array, dims, known):
    wanted = []
    fits = len(array.shape) == len(dims)
    for dim, got in zip(dims, array.shape):
        key, _, more = dim.removeprefix("1|").partition("+")
        if dim.startswith("1|") and got == 1:
            continue
        size = int(key) if key.isdigit() else known.setdefault(key, got - int(more or 0))
        fits &= got >= size if dim.endswith("+") else got == size + int(more or 0)
        wanted += [] if key.isdigit() else [f"{key} = {size}"]
    if not fits:
        told = f" with {', '.join(wanted)}" if wanted and len(array.shape) == len(dims) else ""
        raise ValueError(f"{name} must have shape ({', '.join(dims)}){told}, got {tuple(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
