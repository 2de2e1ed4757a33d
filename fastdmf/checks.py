"""Checks of arguments that the solvers share; every error names the argument and says what to do."""

from numbers import Integral, Real

import numpy as np

from fastdmf.arrays import as_host

__all__ = ["check_count", "check_data", "check_flag", "check_number", "check_real", "check_seed", "float_for"]

# Largest values whose squares, summed over any number of entries, float32 and float64 hold; and the least for float32.
_LARGE, _LARGEST, _SMALL = 1e14, 1e140, 1e-12


def check_number(name, value, low, *, closed=False):
    """Refuse what is not a finite number above ``low`` (or equal to it, if ``closed``)."""
    number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    if not (number and np.isfinite(value) and (value >= low if closed else value > low)):
        raise ValueError(f"{name} must be a number {'>=' if closed else '>'} {low}, got {value!r}")


def check_count(name, value, low=1):
    """Return ``value`` as an int, refusing what is not an integer from ``low`` on."""
    if not isinstance(value, Integral) or isinstance(value, (bool, np.bool_)) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    return int(value)


def check_flag(name, value):
    """Refuse what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def float_for(name, values, dtype):
    """Return the dtype in which real values can be fitted: ``dtype``, or float64 where float32 holds no squares.

    Raises
    ------
    ValueError
        If float64 does not hold them either.
    """
    largest = float(np.abs(values).max(initial=0))
    if largest > _LARGEST:
        raise ValueError(f"{name} holds values too large to be squared, up to {largest:.1e}: scale it down")
    fits = largest == 0 or _SMALL <= largest <= _LARGE
    return np.dtype(np.float32 if dtype == np.float32 and fits else np.float64)


def check_seed(seed):
    """Return ``seed`` as an int >= 0; None draws one."""
    if seed is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if not isinstance(seed, Integral) or isinstance(seed, (bool, np.bool_)) or seed < 0:
        raise ValueError(f"random_state must hold integers >= 0, got {seed!r}")
    return int(seed)


def check_real(name, value, ndims):
    """Return a finite real array; integers become float64."""
    value = np.asarray(as_host(value))
    if value.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {value.dtype}")
    if value.ndim not in ndims:
        raise ValueError(f"{name} must have {' or '.join(map(str, ndims))} dimensions, got shape {value.shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} contains NaN or infinite values: leave those measurements out")
    return value if value.dtype in (np.float32, np.float64) else value.astype(np.float64)


def check_data(operator, y, weights, dtype, ndims=(1, 2)):
    """Return y, weights and the dtype of the fit, once they fit the operator and each other."""
    y = check_real("y", y, ndims)
    if operator.size == 0:
        raise ValueError("operator has no measurements")
    if y.shape[-1] != operator.size:
        raise ValueError(f"y has {y.shape[-1]} measurements along its last axis, the operator {operator.size}")
    if weights is not None:
        weights = check_real("weights", weights, ndims)
        if weights.shape[-1] != operator.size:
            raise ValueError(f"weights has {weights.shape[-1]} along its last axis, the operator {operator.size}")
        if (weights < 0).any():
            raise ValueError("weights must not be negative")
    if dtype is None:
        dtype = y.dtype if operator.dtype is None else np.result_type(y.dtype, operator.dtype)
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}") from None
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    with np.errstate(over="ignore"):
        if not np.isfinite(y.astype(dtype)).all():
            raise ValueError(f"y overflows in {dtype}: scale it, or use dtype='float64'")
    return y, weights, dtype
