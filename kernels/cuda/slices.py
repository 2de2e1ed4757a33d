"""Steps, sums and inner products of a batch: the launches."""

import numpy as np

from fastdmf.kernels.cuda import real_name
from fastdmf.kernels.cuda.checks import check_arguments, table

__all__ = ["check_scratch", "slices_dot", "slices_move", "slices_options", "slices_scratch_shapes", "slices_sum"]

_THREADS, _RANGE = 256, 4096  # as in sums.cu
_MOST_BLOCKS = 4096  # of a step: more than any device holds at once

_SUM = table(x="float64 B D", out="float64 B")
_DOT = table(a="REAL B D", b="REAL B D", out="float64 B")
_MOVE = table(out="REAL B D", x="REAL B D", steps="float64 B", direction="REAL B D")


def slices_options(dtype):
    """Return the compiler's options."""
    return [f"-DREAL={real_name(dtype)}", f"-DSTORED={real_name(dtype)}"]


def slices_scratch_shapes(runs, size):
    """Return the shapes of the float64 scratch that a sum over slices (``runs``, ``size``) takes, in its order."""
    shapes = []
    while size > _RANGE:
        size = -(-size // _RANGE)
        shapes.append((runs, size))
    return shapes


def check_scratch(name, scratch, runs, size):
    """Raise unless ``scratch`` is that of a sum over slices (``runs``, ``size``)."""
    shapes = slices_scratch_shapes(runs, size)
    if len(scratch) != len(shapes):
        raise ValueError(f"{name} must be {len(shapes)} arrays for sums over ({runs}, {size}), got {len(scratch)}")
    for k, (array, shape) in enumerate(zip(scratch, shapes)):
        where = f"{name}[{k}]"
        check_arguments({where: ("float64", False, tuple(map(str, shape)))}, **{where: array})


def _ranges(size):
    return max(-(-size // _RANGE), 1)


def slices_sum(module, out, x, *scratch):
    """Overwrite ``out`` (B,) float64 with the sums of the slices of ``x`` (B, D) float64.

    ``scratch`` has the shapes of ``slices_scratch_shapes(B, D)``.
    """
    check_arguments(_SUM, x=x, out=out)
    check_scratch("scratch", scratch, *x.shape)
    for to in (*scratch, out):
        size = x.shape[1]
        module.launch("slices_sum", (_ranges(size), len(x)), (_THREADS,), (to, x, np.int64(size)))
        x = to


def slices_dot(module, out, a, b, *scratch):
    """Overwrite ``out`` (B,) float64 with the inner products of the slices of ``a`` and ``b`` (B, D).

    ``scratch`` as for ``slices_sum``.
    """
    check_arguments(_DOT, a=a, b=b, out=out)
    check_scratch("scratch", scratch, *a.shape)
    first, *others = (*scratch, out)
    size = a.shape[1]
    module.launch("slices_dot", (_ranges(size), len(a)), (_THREADS,), (first, a, b, np.int64(size)))
    if others:
        slices_sum(module, out, first, *others[:-1])


def slices_move(module, out, x, steps, direction):
    """Overwrite ``out`` with x_b + steps_b direction_b; it may be ``x``. All (B, D), ``steps`` (B,) float64."""
    check_arguments(_MOVE, out=out, x=x, steps=steps, direction=direction)
    runs, size = x.shape
    if size:
        blocks = min(-(-size // _THREADS), _MOST_BLOCKS)
        module.launch("slices_move", (blocks, runs), (_THREADS,), (out, x, steps, direction, np.int64(size)))
