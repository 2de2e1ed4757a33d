"""Limited-memory BFGS on the device: the passes over vectors there, the decisions between them on the host.

The decisions are those of the CPU's kernels, in the parts that they have for large slices: what comes before and after
the passes. Numbers of a slice are NumPy arrays, vectors are the device's.
"""

import numpy as np

from fastdmf.kernels.cpu.lbfgs import _AFTER, _BEFORE, _judge, _try
from fastdmf.kernels.cuda import real_name
from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.slices import slices_dot, slices_move, slices_sum

__all__ = ["lbfgs_judge", "lbfgs_options", "lbfgs_try"]

_THREADS, _RANGE = 256, 4096  # as in sums.cu
_MOST_BLOCKS = 4096


def lbfgs_options(dtype):
    """Return the compiler's options."""
    return [f"-DREAL={real_name(dtype)}", f"-DSTORED={real_name(dtype)}"]


def _check(memory, **points):
    rows = table(pairs="REAL B rows D", **dict.fromkeys(points, "REAL B D"))
    check_arguments(rows, {"rows": memory[3].shape[1]}, pairs=memory[0], **points)


def _without_vectors(memory, points):
    """Return the memory and the points as the host's decisions take them: of length zero."""
    pairs, *inner = memory
    runs, rows, _ = pairs.shape
    return (np.empty((runs, rows, 0)), *inner), tuple(np.empty((runs, 0)) for _ in points)


def lbfgs_try(module, moves, scratch, memory, search, points, searching):
    """Write the trials of the slices that are ``searching``; arguments from ``memory`` on as for the CPU's kernel.

    Parameters
    ----------
    module, moves
        The families ``lbfgs`` and ``slices`` of the vectors' precision.
    scratch
        Object with ``upload`` (NumPy array to device), ``host`` (device array to NumPy), ``empty(shape)`` float64 on
        the device and ``sums(runs, size)``, scratch of ``slices_dot``.
    """
    _check(memory, trial=points[0], direction=points[1], x=points[2], grad=points[3])
    pairs, _, _, _, coefficients, gamma, *_ = memory
    slope, stretch, step_size, base, trials, _, fresh, failed = search
    trial, direction, x, grad = points
    (runs, rows, size), blocks = pairs.shape, min(-(-x.shape[1] // _THREADS), _MOST_BLOCKS)
    aimed, slopes = np.zeros(runs, bool), np.zeros((runs, 1))
    bare, nothing = _without_vectors(memory, points)
    numbers = slope, stretch, step_size, base, trials, fresh, failed
    again = True
    while again:
        _try(_BEFORE, aimed, slopes, *bare, *numbers, *nothing, searching)
        if aimed.any():
            numbers_of = (scratch.upload(a) for a in (coefficients, gamma, aimed.astype(np.int32)))
            arguments = direction, pairs, grad, *numbers_of, np.int64(size), np.int32(rows)
            module.launch("pairs_direction", (blocks, runs), (_THREADS,), arguments)
            out = scratch.empty((runs,))
            slices_dot(moves, out, direction, grad, *scratch.sums(runs, size))
            slopes[:, 0] = scratch.host(out)
        again = _try(_AFTER, aimed, slopes, *bare, *numbers, *nothing, searching)
    if searching.all():
        slices_move(moves, trial, x, scratch.upload(stretch), direction)
    else:
        for b in np.flatnonzero(searching):
            at = slice(b, b + 1)
            slices_move(moves, trial[at], x[at], scratch.upload(stretch[at]), direction[at])


def lbfgs_judge(module, moves, scratch, accepted, memory, search, points, objectives, far, searching, settings):
    """Accept or refuse those trials; arguments as for ``lbfgs_try`` and for the CPU's kernel."""
    _check(memory, trial=points[0], x=points[1], trial_grad=points[2], grad=points[3])
    pairs, *inner = memory
    newest = inner[5]
    trial, x, trial_grad, grad = points
    runs, rows, size = pairs.shape
    places = rows // 2
    moved, sums = np.zeros(runs, bool), np.zeros((runs, 1, 5 + rows))
    bare, nothing = _without_vectors(memory, points)
    rest = *search, *nothing, *objectives, far, searching, *settings
    _judge(_BEFORE, moved, sums, accepted, *bare, *rest)
    if moved.any():
        s, y = trial - x, trial_grad - grad
        for b in np.flatnonzero(moved):
            place = (newest[b] + 1) % places
            pairs[b, place], pairs[b, places + place] = s[b], y[b]
        kept = scratch.sums(runs * rows, size)
        products, first = scratch.empty((runs * rows,)), -(-size // _RANGE)
        partial = kept[0] if kept else products
        module.launch("pairs_dot", (first, rows, runs), (_THREADS,), (partial, pairs, trial_grad, np.int64(size)))
        if kept:
            slices_sum(moves, products, partial, *kept[1:])
        inner_products = []
        for a, b in ((s, s), (s, y), (y, y), (s, trial_grad), (y, trial_grad)):
            inner_products.append(scratch.empty((runs,)))
            slices_dot(moves, inner_products[-1], a, b, *scratch.sums(runs, size))
        sums[:, 0, 5:] = scratch.host(products).reshape(runs, rows)
        sums[:, 0, :5] = np.stack([scratch.host(a) for a in inner_products], axis=1)
    _judge(_AFTER, moved, sums, accepted, *bare, *rest)
