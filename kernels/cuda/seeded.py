"""Seeded measurements on the device: the launches of an evaluation, of its halves, and of the entries themselves.

A layout is a ``MeasurePlan`` made with ``pack=4``; ``module`` is the family ``seeded`` with ``seeded_options``,
``sums`` is ``slices``. A ``stream`` is (problem, low half of the seed, high half), each uint32, as for the kernels of
the CPU.
"""

import numpy as np

from fastdmf.kernels.cuda.measurements import THREADS, join, stride
from fastdmf.kernels.cuda.slices import slices_sum

__all__ = ["seeded_adjoint", "seeded_entries", "seeded_forward", "seeded_loss_pull", "seeded_options"]

_MOST = 65_535  # blocks along the second dimension of a grid


def seeded_options(plan, dtype, ensemble):
    """Return the compiler's options for an ensemble, ``"gaussian"`` or ``"rademacher"``."""
    return [*plan.options(dtype), f"-DSIGNS={int(ensemble == 'rademacher')}"]


def seeded_loss_pull(module, sums, plan, g, losses, x, y, w, code, delta, rows, stream, partial, terms):
    """Evaluate losses and pulls where a row fits in a block (one window); every entry is drawn once a tile.

    Overwrites ``g`` (B, d) and ``losses`` (B,) float64; scratch as for ``gaussian_loss_pull``.
    """
    sizes = np.int64(len(rows)), np.int64(x.shape[1]), np.int32(len(x))
    given = stride(y), np.int64(0) if w is None else stride(w), np.int32(code), x.dtype.type(delta)
    arguments = (partial, terms[0], x, y, w, rows, *sizes, *given, *stream)
    module.launch("seeded_loss_pull", plan.grid(len(x)), (plan.threads,), arguments)
    join(module, g, partial)
    slices_sum(sums, losses, *terms)


def seeded_forward(module, plan, out, x, rows, stream, parts=None):
    """Overwrite ``out`` (B, m) with a_i . x_b; ``parts`` (windows, B, m) is scratch for several windows."""
    to = out if plan.windows == 1 else parts
    sizes = np.int64(len(rows)), np.int64(x.shape[1]), np.int32(len(x))
    module.launch("seeded_forward", plan.grid(len(x)), (plan.threads,), (to, x, rows, *sizes, *stream))
    if to is parts:
        join(module, out, parts)


def seeded_adjoint(module, plan, g, r, rows, stream, partial):
    """Overwrite ``g`` (B, d) with sum_i r_i a_i for ``r`` (B, m); ``partial`` (plan.ranges, B, d) is scratch."""
    sizes = np.int64(len(rows)), np.int64(g.shape[1]), np.int32(len(g))
    module.launch("seeded_adjoint", plan.grid(len(g)), (plan.threads,), (partial, r, rows, *sizes, *stream))
    join(module, g, partial)


def seeded_entries(module, out, rows, stream):
    """Overwrite ``out`` (m, d) float32 with the entries, d a multiple of 4: of a batch, for the dense kernels.

    So go rows that do not fit in a block: they are drawn once, into as much scratch as the L2 cache holds.
    """
    m, d = out.shape
    grid = -(-d // (4 * THREADS)), min(m, _MOST)
    module.launch("seeded_entries", grid, (THREADS,), (out, rows, np.int64(m), np.int64(d), *stream))
