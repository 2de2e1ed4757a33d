"""Compile ahead of the first fit: every kernel that the defaults use, into numba's cache on disk.

Each job runs the public interface on a problem of a few rows; where a route is chosen by size, the job asks for it.
"""

import warnings

import numpy as np

from fastdmf.backend import compile_clock, get_backend, thread_limits
from fastdmf.descent import solve
from fastdmf.operators import EntryMask, GaussianDense, GaussianSeeded
from fastdmf.recovery import recover
from fastdmf.variational import vbmf

__all__ = ["JOBS", "warm_up"]

_SHAPE = 24, 20


def _mask():
    rows, cols = np.divmod(np.arange(0, _SHAPE[0] * _SHAPE[1], 2), _SHAPE[1])
    return EntryMask(rows, cols, _SHAPE)


def _descend(operator, dtype, **options):
    y = np.linspace(-1, 1, operator.size, dtype=dtype)
    solve(operator, y, **{"dtype": dtype, "max_iter": 15, "random_state": 0, "on_failure": "ignore", **options})


def _small_completion(dtype):
    _descend(_mask(), dtype)
    _descend(_mask(), dtype, width=8, validation=0.2)
    _descend(_mask(), dtype, random_state=[0, 1])


def _large_completion(dtype):
    mask, rng = _mask(), np.random.default_rng(0)
    y = np.ones((1, mask.size), dtype)
    for route in ("one_pass_serial", "one_pass", "two_pass"):
        for width in (16, 32, 128):
            bound = mask.bind(get_backend(), y, dtype=dtype, width=width)
            bound.route = route
            p, qt = (rng.standard_normal((1, n, width)).astype(dtype) for n in _SHAPE)
            bound.loss_and_pull(p, qt, np.empty_like(p), np.empty_like(qt))
    bound.pull(bound.forward(p, qt), p, qt)


def _sensing(dtype):
    a = np.random.default_rng(0).standard_normal((64, *_SHAPE)).astype(dtype)
    _descend(GaussianDense(a), dtype)


def _seeded(dtype):
    _descend(GaussianSeeded(0, 64, _SHAPE), dtype)


def _ratings(dtype):
    mask = _mask()
    for width in (30, 62):
        y = np.linspace(-1, 1, mask.size, dtype=dtype)
        solution = vbmf(mask, y, width=width, implicit_features=True, random_state=0, on_failure="ignore")
    solution.predict(mask.rows, mask.cols, return_std=True)
    # Many entries are worked on in parallel, in rows that get narrower as components die.
    kernels = get_backend().kernels
    for lines in (1, 2, 3, 4, 8):
        width = lines * kernels.row_multiple(dtype)
        a, b = (kernels.aligned_empty((n, width), dtype) for n in _SHAPE)
        a[:], b[:] = 0, 1
        ones, data = np.ones(width, dtype), np.ones(mask.size + kernels.PAD, dtype)
        entries = mask.indptr, mask.indices, data, None, np.ones(len(a), dtype)
        kernels.row_solve(a, b, None, *entries, ones, ones, ones, ones, 1, 0.1)


def _recovery(dtype):
    mask = _mask()
    y = np.random.default_rng(0).standard_normal(mask.size).astype(dtype)  # no rank meets it: every path is tried
    recover(mask, y, max_rank=2, random_state=0, on_failure="ignore")


JOBS = {
    "completion, small": _small_completion,
    "completion, large": _large_completion,
    "completion, variational": _ratings,
    "recovery": _recovery,
    "sensing": _sensing,
    "sensing, seeded": _seeded,
}


def warm_up(report=None):
    """Run all jobs in float32 and float64.

    Parameters
    ----------
    report : callable, optional
        Called with (name of the job, name of the dtype, seconds spent on kernels) after each.

    Returns
    -------
    float
        Seconds spent on importing, compiling and loading kernels.
    """
    total = 0.0
    for name, job in JOBS.items():
        for dtype in (np.float32, np.float64):
            with compile_clock() as clock, thread_limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                job(dtype)
            total += clock.compile_seconds
            if report is not None:
                report(name, np.dtype(dtype).name, clock.compile_seconds)
    return total
