"""Dense measurements on the device: the launches of an evaluation and of its halves.

A layout is a ``MeasurePlan``; ``module`` is the family ``gaussian`` with the plan's options, ``sums`` is ``slices``.
"""

import numpy as np

from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.measurements import THREADS, check_terms, join, stride
from fastdmf.kernels.cuda.slices import slices_sum

__all__ = ["gaussian_forward", "gaussian_loss_pull", "gaussian_pull"]

_LOSS_PULL = table(
    g="REAL B d",
    losses="float64 B",
    a="STORED m d",
    x="REAL B d",
    y="REAL 1|B m",
    w="REAL? 1|B m",
    partial="REAL ranges B d",
)
_BATCH = table(**{"batch[0]": "REAL windows B rows", "batch[1]": "REAL B rows"})
_FORWARD = table(out="REAL B m", a="STORED m d", x="REAL B d")
_PARTS = table(parts="REAL windows B m")
_PULL = table(g="REAL B d", a="STORED m d", r="REAL B m", partial="REAL ranges B d")


def gaussian_loss_pull(module, sums, plan, g, losses, a, x, y, w, code, delta, partial, terms, batch=None):
    """Evaluate losses and pulls; A is read once from memory.

    Parameters
    ----------
    g, losses
        Overwritten: (B, d) and (B,) float64.
    a, x, y, w, code, delta
        As for the kernels of the CPU: (m, d), (B, d), (1 or B, m) twice; ``w`` may be None.
    partial : (plan.ranges, B, d)
        Scratch.
    terms : tuple of arrays
        Scratch: (B, m) float64, and behind it that of ``slices_sum`` for this shape.
    batch : tuple of arrays
        Scratch where the plan has several windows: (windows, B, rows) and (B, rows).
    """
    arrays = {"g": g, "losses": losses, "a": a, "x": x, "y": y, "w": w, "partial": partial}
    known = check_arguments(_LOSS_PULL, {"ranges": plan.ranges}, **arrays)
    plan.check("a", known["d"])
    check_terms(terms, len(x), len(a))
    if plan.windows > 1:
        if batch is None:
            raise ValueError(f"batch must be two arrays for {plan.windows} windows, got None")
        check_arguments(_BATCH, plan.sizes(known), **{f"batch[{k}]": scratch for k, scratch in enumerate(batch)})
    (m, d), runs = a.shape, len(x)
    given = stride(y), np.int64(0) if w is None else stride(w), np.int32(code), x.dtype.type(delta)
    grid, block = plan.grid(runs), (plan.threads,)
    if plan.windows == 1:
        arguments = (partial, terms[0], a, x, y, w, np.int64(m), np.int64(d), np.int32(runs), *given)
        module.launch("gaussian_loss_pull", grid, block, arguments)
    else:
        for first in range(0, m, plan.rows):
            rows = a[first : first + plan.rows]
            count = np.int64(len(rows))
            # The last batch uses the beginning of the scratch as if it were smaller.
            parts, r = (_first(z, runs, count) for z in batch)
            sizes = count, np.int64(d), np.int32(runs)
            module.launch("gaussian_forward", grid, block, (parts, rows, x, *sizes))
            places = np.int64(m), np.int64(first), count, np.int32(plan.windows)
            arguments = (r, terms[0], parts, y, w, *places, *given)
            module.launch("measured_judge", (-(-int(count) // THREADS), runs), (THREADS,), arguments)
            module.launch("gaussian_pull", grid, block, (partial, rows, r, *sizes, np.int32(first > 0)))
    join(module, g, partial)
    slices_sum(sums, losses, *terms)


def _first(scratch, runs, count):
    """Return the beginning of (..., B, rows) as (..., B, count)."""
    windows = scratch.size // (runs * scratch.shape[-1])
    return scratch.reshape(-1)[: windows * runs * count].reshape(windows, runs, count)


def gaussian_forward(module, plan, out, a, x, parts=None):
    """Overwrite ``out`` (B, m) with a_i . x_b; ``parts`` (windows, B, m) is scratch for several windows."""
    known = check_arguments(_FORWARD, out=out, a=a, x=x)
    plan.check("a", known["d"])
    if plan.windows > 1:
        check_arguments(_PARTS, plan.sizes(known), parts=parts)
    (m, d), runs = a.shape, len(x)
    to = out if plan.windows == 1 else parts
    arguments = (to, a, x, np.int64(m), np.int64(d), np.int32(runs))
    module.launch("gaussian_forward", plan.grid(runs), (plan.threads,), arguments)
    if to is parts:
        join(module, out, parts)


def gaussian_pull(module, plan, g, a, r, partial):
    """Overwrite ``g`` (B, d) with sum_i r_bi a_i for ``r`` (B, m); ``partial`` as for ``gaussian_loss_pull``."""
    known = check_arguments(_PULL, {"ranges": plan.ranges}, g=g, a=a, r=r, partial=partial)
    plan.check("a", known["d"])
    (m, d), runs = a.shape, len(r)
    arguments = (partial, a, r, np.int64(m), np.int64(d), np.int32(runs), np.int32(0))
    module.launch("gaussian_pull", plan.grid(runs), (plan.threads,), arguments)
    join(module, g, partial)
