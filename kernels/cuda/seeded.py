"""Seeded measurements on the device: the launches of an evaluation, of its halves, and of the entries themselves.

A layout is a ``MeasurePlan`` made with ``pack=4``; ``module`` is the family ``seeded`` with ``seeded_options``,
``sums`` is ``slices``. A ``stream`` is (problem, low half of the seed, high half), each uint32, as for the kernels of
the CPU.
"""

import numpy as np

from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.measurements import THREADS, check_terms, join, stride
from fastdmf.kernels.cuda.slices import slices_sum

__all__ = ["seeded_adjoint", "seeded_entries", "seeded_forward", "seeded_loss_pull", "seeded_options"]

_MOST = 65_535  # blocks along the second dimension of a grid

_LOSS_PULL = table(
    g="REAL B d",
    losses="float64 B",
    x="REAL B d",
    rows="uint32 m",
    y="REAL 1|B m",
    w="REAL? 1|B m",
    partial="REAL ranges B d",
)
_FORWARD = table(out="REAL B m", x="REAL B d", rows="uint32 m")
_PARTS = table(parts="REAL windows B m")
_ADJOINT = table(g="REAL B d", r="REAL B m", rows="uint32 m", partial="REAL ranges B d")
_ENTRIES = table(out="float32 m d", rows="uint32 m")


def _check_stream(stream):
    if len(stream) != 3 or any(not isinstance(word, np.uint32) for word in stream):
        raise ValueError(f"stream must be three numbers of uint32, got {stream!r}")


def seeded_options(plan, dtype, ensemble):
    """Return the compiler's options for an ensemble, ``"gaussian"`` or ``"rademacher"``."""
    return [*plan.options(dtype), f"-DSIGNS={int(ensemble == 'rademacher')}"]


def seeded_loss_pull(module, sums, plan, g, losses, x, y, w, code, delta, rows, stream, partial, terms):
    """Evaluate losses and pulls where a row fits in a block (one window); every entry is drawn once a tile.

    Overwrites ``g`` (B, d) and ``losses`` (B,) float64; scratch as for ``gaussian_loss_pull``.
    """
    arrays = {"g": g, "losses": losses, "x": x, "y": y, "w": w, "rows": rows, "partial": partial}
    known = check_arguments(_LOSS_PULL, {"ranges": plan.ranges}, **arrays)
    plan.check("x", known["d"])
    if plan.windows > 1:
        raise ValueError(f"plan has {plan.windows} windows, this is for one: draw the entries for the dense kernels")
    check_terms(terms, len(x), len(rows))
    _check_stream(stream)
    sizes = np.int64(len(rows)), np.int64(x.shape[1]), np.int32(len(x))
    given = stride(y), np.int64(0) if w is None else stride(w), np.int32(code), x.dtype.type(delta)
    arguments = (partial, terms[0], x, y, w, rows, *sizes, *given, *stream)
    module.launch("seeded_loss_pull", plan.grid(len(x)), (plan.threads,), arguments)
    join(module, g, partial)
    slices_sum(sums, losses, *terms)


def seeded_forward(module, plan, out, x, rows, stream, parts=None):
    """Overwrite ``out`` (B, m) with a_i . x_b; ``parts`` (windows, B, m) is scratch for several windows."""
    known = check_arguments(_FORWARD, out=out, x=x, rows=rows)
    plan.check("x", known["d"])
    if plan.windows > 1:
        check_arguments(_PARTS, plan.sizes(known), parts=parts)
    _check_stream(stream)
    to = out if plan.windows == 1 else parts
    sizes = np.int64(len(rows)), np.int64(x.shape[1]), np.int32(len(x))
    module.launch("seeded_forward", plan.grid(len(x)), (plan.threads,), (to, x, rows, *sizes, *stream))
    if to is parts:
        join(module, out, parts)


def seeded_adjoint(module, plan, g, r, rows, stream, partial):
    """Overwrite ``g`` (B, d) with sum_i r_i a_i for ``r`` (B, m); ``partial`` (plan.ranges, B, d) is scratch."""
    known = check_arguments(_ADJOINT, {"ranges": plan.ranges}, g=g, r=r, rows=rows, partial=partial)
    plan.check("g", known["d"])
    _check_stream(stream)
    sizes = np.int64(len(rows)), np.int64(g.shape[1]), np.int32(len(g))
    module.launch("seeded_adjoint", plan.grid(len(g)), (plan.threads,), (partial, r, rows, *sizes, *stream))
    join(module, g, partial)


def seeded_entries(module, out, rows, stream):
    """Overwrite ``out`` (m, d) float32 with the entries, d a multiple of 4: of a batch, for the dense kernels.

    So go rows that do not fit in a block: they are drawn once, into as much scratch as the L2 cache holds.
    """
    check_arguments(_ENTRIES, out=out, rows=rows)
    _check_stream(stream)
    m, d = out.shape
    if d % 4:
        raise ValueError(f"out must have a multiple of 4 columns, got {d}")
    grid = -(-d // (4 * THREADS)), min(m, _MOST)
    module.launch("seeded_entries", grid, (THREADS,), (out, rows, np.int64(m), np.int64(d), *stream))
