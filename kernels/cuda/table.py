"""The kernels of one device under the names and arguments by which the engine calls those of the CPU.

What a call needs besides, scratch and compiled modules, is here: scratch comes from the device's memory pool, modules
are compiled when they are first asked for. Indices, routes and decisions stay the CPU's.
"""

from functools import cached_property, partial

import numpy as np

from fastdmf.kernels.cuda import dense, entry, gaussian, lbfgs, row_solve, seeded, slices, small_chain, source, update
from fastdmf.kernels.cuda.measurements import plan_measurements

__all__ = ["CudaKernels"]


class CudaKernels:
    """Kernels for arrays of ``xp``.

    Parameters
    ----------
    xp : module
        cupy.
    compile_ : callable
        (family's name, text, options) -> module as ``fastdmf.kernels.cuda`` has it.
    """

    PAD = 0  # kernels read no number behind the last

    def __init__(self, xp, compile_):
        self.xp, self._compile, self._modules, self._tickets = xp, compile_, {}, {}

    def module(self, family, options):
        """Return the module of a family with the compiler's options, compiled once."""
        key = family, *options
        if key not in self._modules:
            self._modules[key] = self._compile(family, source(family), tuple(options))
        return self._modules[key]

    # --- memory ------------------------------------------------------------------------------------------------------

    def aligned_empty(self, shape, dtype):
        """Return an array; the pool aligns to 512 bytes."""
        return self.xp.empty(shape, dtype)

    def empty(self, shape):
        """Return an array of float64."""
        return self.xp.empty(shape, np.float64)

    def upload(self, a):
        """Return a NumPy array on the device."""
        return self.xp.asarray(a)

    def host(self, a):
        """Return a device array as NumPy's; waits for it."""
        return self.xp.asnumpy(a)

    def sums(self, runs, size):
        """Return the scratch of sums over slices (runs, size)."""
        return [self.empty(shape) for shape in slices.slices_scratch_shapes(runs, size)]

    def row_multiple(self, dtype):
        """Return of what the width of rows is a multiple where they are loaded 16 bytes at a time."""
        return 16 // np.dtype(dtype).itemsize

    # --- slices ------------------------------------------------------------------------------------------------------

    def _slices(self, dtype):
        return self.module("slices", slices.slices_options(dtype))

    def slices_move(self, out, x, steps, direction):
        """As ``slices_move`` of the CPU; ``steps`` on the device."""
        slices.slices_move(self._slices(x.dtype), out, x, steps, direction)

    def slices_dot(self, out, a, b):
        """As ``slices_dot`` of the CPU."""
        slices.slices_dot(self._slices(a.dtype), out, a, b, *self.sums(*a.shape))

    def _update(self, dtype):
        return self.module("update", update.update_options(dtype))

    def update_gd(self, x, grad, step_size, *, count=None):
        """As ``update_gd`` of the CPU."""
        update.update_gd(self._update(x.dtype), x, grad, step_size, count=count)

    def update_momentum(self, x, velocity, grad, step_size, beta, *, nesterov=False):
        """As ``update_momentum`` of the CPU."""
        update.update_momentum(self._update(x.dtype), x, velocity, grad, step_size, beta, nesterov=nesterov)

    def update_adam(self, x, mean, square, grad, step_size, beta1, beta2, eps, count):
        """As ``update_adam`` of the CPU."""
        runs = len(x)
        if runs not in self._tickets:  # zero before and after each launch: one array for all states of that length
            self._tickets[runs] = self.xp.zeros(runs, np.uint32)
        arrays = x, mean, square, grad, step_size
        update.update_adam(self._update(x.dtype), *arrays, beta1, beta2, eps, count, self._tickets[runs])

    def update_group_rmsprop(self, step_size, mean_square, squares, lr, beta, eps, count):
        """As ``update_group_rmsprop`` of the CPU."""
        module = self._update(np.float64)
        update.update_group_rmsprop(module, step_size, mean_square, squares, lr, beta, eps, count)

    def lbfgs_try(self, memory, search, points, searching):
        """As ``lbfgs_try`` of the CPU; vectors on the device, numbers on the host."""
        dtype = points[0].dtype
        families = self.module("lbfgs", lbfgs.lbfgs_options(dtype)), self._slices(dtype)
        lbfgs.lbfgs_try(*families, self, memory, search, points, searching)

    def lbfgs_judge(self, accepted, memory, search, points, objectives, far, searching, settings):
        """As ``lbfgs_judge`` of the CPU; vectors on the device, numbers on the host."""
        dtype = points[0].dtype
        families = self.module("lbfgs", lbfgs.lbfgs_options(dtype)), self._slices(dtype)
        rest = memory, search, points, objectives, far, searching, settings
        lbfgs.lbfgs_judge(*families, self, accepted, *rest)

    # --- small chains ------------------------------------------------------------------------------------------------

    DIVERGED = small_chain.DIVERGED

    @cached_property
    def _shared_bytes(self):
        """Bytes of shared memory that a block of this device may have."""
        return int(self.xp.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])

    def small_chain_plan(self, dims, offsets, dtype, rule):
        """Return the plan of chains of these dimensions; a ValueError where they do not fit in a block."""
        settings = {"shared_bytes": self._shared_bytes, "to_device": self.upload}
        return small_chain.SmallChainPlan.of(dims, offsets, dtype, rule, **settings)

    def small_chain_fits(self, dims, offsets, dtype, rule):
        """Return whether there is such a plan."""
        try:
            self.small_chain_plan(dims, offsets, dtype, rule)
        except ValueError:
            return False
        return True

    def small_chain(self, plan, *arguments):
        """Take steps; arguments as for ``fastdmf.kernels.cuda.small_chain``."""
        small_chain.small_chain(self.module("small_chain", plan.options()), plan, *arguments)

    # --- entry masks -------------------------------------------------------------------------------------------------

    def _entry(self, h, dtype, index):
        return self.module("entry", entry.entry_options(h, dtype, index=index))

    def entry_side(self, indptr, indices):
        """Return the entries of one side, cut into work and on the device."""
        return entry.EntrySide.of(indptr, indices, to_device=self.upload)

    def _parts(self, runs, h, dtype, *sides):
        pieces = max(side.pieces for side in sides)
        return self.xp.empty((runs, pieces, h), dtype) if pieces else None

    def entry_loss_pull(self, gp, gqt, losses, p, qt, rows, y, w, columns, yc, wc, code, delta):
        """Evaluate loss, G Q^T and G^T P; ``rows`` and ``columns`` from ``entry_side``, in as wide indices."""
        runs, _, h = p.shape
        module = self._entry(h, p.dtype, rows.indices.dtype)
        items = self.empty((runs, len(rows.row))), *self.sums(runs, len(rows.row))
        parts = self._parts(runs, h, p.dtype, rows, columns)
        sums = self._slices(np.float64)
        data = rows, y, w, columns, yc, wc, code, delta
        entry.entry_loss_pull(module, sums, gp, gqt, losses, p, qt, *data, parts, items)

    def entry_forward(self, out, p, qt, rows):
        """Predict the entries in the order of ``rows``."""
        entry.entry_forward(self._entry(p.shape[2], p.dtype, rows.indices.dtype), out, p, qt, rows)

    def entry_pull(self, g, r, q, side):
        """Overwrite ``g`` with R Q^T for numbers ``r`` (B, nnz) in the order of ``side``."""
        runs, _, h = g.shape
        module = self._entry(h, g.dtype, side.indices.dtype)
        entry.entry_pull(module, g, r, q, side, self._parts(runs, h, g.dtype, side))

    def dense_residual(self, g, losses, y, w, code, delta):
        """Replace ``g`` (B, cells) by w psi(g - y)."""
        module, (runs, cells) = self.module("dense", dense.dense_options(g.dtype)), g.shape
        ranges = dense.dense_ranges(cells)
        terms = self.empty((runs, ranges)), *self.sums(runs, ranges)
        dense.dense_residual(module, self._slices(np.float64), g, losses, y, w, code, delta, terms)

    # --- measurements ------------------------------------------------------------------------------------------------

    def gaussian_loss_pull(self, g, losses, a, x, y, w, code, delta, stored=None):
        """Evaluate losses and pulls of dense measurements."""
        (m, d), runs, dtype = a.shape, len(x), x.dtype
        plan = plan_measurements(m, d, runs, dtype, stored_bytes=a.itemsize)
        module, sums = self.module("gaussian", plan.options(dtype, stored)), self._slices(np.float64)
        partial, terms = self.xp.empty((plan.ranges, runs, d), dtype), (self.empty((runs, m)), *self.sums(runs, m))
        batch = None
        if plan.windows > 1:
            batch = self.xp.empty((plan.windows, runs, plan.rows), dtype), self.xp.empty((runs, plan.rows), dtype)
        data = a, x, y, w, code, delta
        gaussian.gaussian_loss_pull(module, sums, plan, g, losses, *data, partial, terms, batch)

    def gaussian_forward(self, out, a, x, stored=None):
        """Measure ``x``."""
        (m, d), runs, dtype = a.shape, len(x), x.dtype
        plan = plan_measurements(m, d, runs, dtype, stored_bytes=a.itemsize)
        parts = self.xp.empty((plan.windows, runs, m), dtype) if plan.windows > 1 else None
        gaussian.gaussian_forward(self.module("gaussian", plan.options(dtype, stored)), plan, out, a, x, parts)

    def gaussian_pull(self, g, a, r, stored=None):
        """Overwrite ``g`` (B, d) with A^T r."""
        (m, d), runs, dtype = a.shape, len(r), r.dtype
        plan = plan_measurements(m, d, runs, dtype, stored_bytes=a.itemsize)
        partial = self.xp.empty((plan.ranges, runs, d), dtype)
        gaussian.gaussian_pull(self.module("gaussian", plan.options(dtype, stored)), plan, g, a, r, partial)

    def seeded(self, rows, columns, runs, dtype, ensemble, stream):
        """Return seeded measurements, ready for a batch: an object with ``loss_pull``, ``forward`` and ``adjoint``."""
        return _Seeded(self, rows, columns, runs, dtype, ensemble, stream)

    # --- row regressions ---------------------------------------------------------------------------------------------

    def row_solver(self, indptr, indices, y, w):
        """As ``row_solver`` of the CPU, for entries on the host, of which a copy is kept on the device.

        The sum that it returns and ``scale`` are on the device, ``vectors`` on the host.
        """
        m = int(indptr[-1])
        lists = tuple(self.upload(rows) for rows in row_solve.row_solve_lists(indptr, indices.dtype))
        entries = (None if v is None else self.upload(v[:m]) for v in (indices, y, w))
        return partial(self._row_solve, (self.upload(indptr), lists, *entries))

    def _row_solve(self, entries, a, b, mean, scale, vectors, steps, tol):
        options = row_solve.row_solve_options(a.shape[1], a.dtype, index=entries[2].dtype)
        module, total, n = self.module("row_solve", options), self.empty((1,)), len(a)
        squares = self.empty((1, n)), *self.sums(1, n)
        scale, vectors = scale.astype(a.dtype, copy=False), self.upload(np.array(vectors, a.dtype))
        data = *entries, scale, *vectors, steps, tol, squares
        row_solve.row_solve(module, self._slices(np.float64), total, a, b, mean, *data)
        return total[0]


class _Seeded:
    """Seeded measurements of a batch: rows that fit in a block are drawn where they are used, others batch by batch."""

    def __init__(self, kernels, rows, columns, runs, dtype, ensemble, stream):
        self.kernels, self.rows, self.columns, self.runs, self.dtype = kernels, rows, columns, runs, np.dtype(dtype)
        self.stream = stream
        # Entries are drawn four at a time: the columns behind the last meet zeros in x.
        self.width = -(-columns // 4) * 4
        plan = plan_measurements(len(rows), self.width, runs, dtype, pack=4)
        self.drawn = plan.windows > 1
        self.plan = plan
        self.module = kernels.module("seeded", seeded.seeded_options(plan, dtype, ensemble))

    def _whole(self, x):
        if self.width == self.columns:
            return x
        wide = self.kernels.xp.zeros((len(x), self.width), self.dtype)
        wide[:, : self.columns] = x
        return wide

    def _batches(self):
        """Yield slices of the measurements and their entries, drawn into as much scratch as the L2 cache holds."""
        for first in range(0, len(self.rows), self.plan.rows):
            rows = self.rows[first : first + self.plan.rows]
            a = self.kernels.xp.empty((len(rows), self.width), np.float32)
            seeded.seeded_entries(self.module, a, rows, self.stream)
            yield slice(first, first + len(rows)), a.astype(self.dtype, copy=False)

    def squared_norms(self):
        """Return the squared norms of the measurements, (m,) float64, on the host."""
        parts = []
        for _, a in self._batches():
            a = a[:, : self.columns].astype(np.float64)
            parts.append(self.kernels.host((a * a).sum(axis=1)))
        return np.concatenate(parts)

    def loss_pull(self, g, losses, x, y, w, code, delta):
        """Overwrite ``g`` (B, columns) and ``losses`` (B,) float64."""
        kernels, m, x = self.kernels, len(self.rows), self._whole(x)
        wide = g if self.width == self.columns else kernels.xp.empty((self.runs, self.width), self.dtype)
        if self.drawn:
            losses[...], wide[...] = 0, 0
            part, one = kernels.empty((self.runs,)), kernels.xp.empty_like(wide)
            for at, a in self._batches():
                given = (None if v is None else kernels.xp.ascontiguousarray(v[:, at]) for v in (y, w))
                kernels.gaussian_loss_pull(one, part, a, x, *given, code, delta)
                wide += one
                losses += part
        else:
            sums, plan = kernels._slices(np.float64), self.plan
            partial = kernels.xp.empty((plan.ranges, self.runs, self.width), self.dtype)
            terms = kernels.empty((self.runs, m)), *kernels.sums(self.runs, m)
            data = x, y, w, code, delta, self.rows, self.stream
            seeded.seeded_loss_pull(self.module, sums, plan, wide, losses, *data, partial, terms)
        if wide is not g:
            g[...] = wide[:, : self.columns]

    def forward(self, out, x):
        """Overwrite ``out`` (B, m) with the measurements of ``x``."""
        plan, runs = self.plan, self.runs
        parts = self.kernels.xp.empty((plan.windows, runs, len(self.rows)), self.dtype) if plan.windows > 1 else None
        seeded.seeded_forward(self.module, plan, out, self._whole(x), self.rows, self.stream, parts)

    def adjoint(self, g, r):
        """Overwrite ``g`` (B, columns) with the sum of r_i times row i."""
        xp, plan = self.kernels.xp, self.plan
        wide = g if self.width == self.columns else xp.empty((self.runs, self.width), self.dtype)
        partial = xp.empty((plan.ranges, self.runs, self.width), self.dtype)
        seeded.seeded_adjoint(self.module, plan, wide, r, self.rows, self.stream, partial)
        if wide is not g:
            g[...] = wide[:, : self.columns]
