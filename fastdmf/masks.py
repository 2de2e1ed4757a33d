"""Observed entries of a matrix: the operator of completion, and its bound form on the entry kernels."""

import numpy as np

from fastdmf.contract import Bound, Operator, check_shape

__all__ = ["EntryMask", "FusedChain"]


def _check_indices(name, index, n):
    """Return ``index`` as a 1-d array of whole numbers in [0, n)."""
    index = np.asarray(index)
    if index.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {index.shape}")
    if index.size == 0:
        return np.zeros(0, np.int64)
    if index.dtype.kind == "f" and (index == np.floor(index)).all():
        index = index.astype(np.int64)
    if index.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold whole numbers, got dtype {index.dtype}")
    low, high = index.min(), index.max()
    if low < 0:
        raise ValueError(f"{name} must not be negative, got {low} (indices count from 0)")
    if high >= n:
        raise ValueError(f"{name} must be below {n}, the matrix's size in that direction, got {high}")
    return index


# Entries of a row or column from which one can be held out without taking what determines the rest.
_SPARED = 6


class EntryMask(Operator):
    """Observed entries X[rows, cols] (matrix completion).

    Parameters
    ----------
    rows, cols : array of int, shape (m,)
        Indices from 0, in any order; every entry at most once.
    shape : tuple of int
        (n1, n2).

    Raises
    ------
    TypeError, ValueError
        If an index is negative, fractional or out of range, the lengths differ, there is no entry, or an entry comes
        twice.

    Notes
    -----
    Kept sorted by row and column (8 + 4 bytes an entry with int32 columns). Nothing of size n1 x n2 is formed unless
    the mask is so dense that the products of full matrices are quicker.
    """

    curvature_factor = 1.3

    def __init__(self, rows, cols, shape):
        self.shape = check_shape(shape)
        n1, n2 = self.shape
        rows, cols = _check_indices("rows", rows, n1), _check_indices("cols", cols, n2)
        if len(rows) != len(cols):
            raise ValueError(f"rows and cols must have the same length, got {len(rows)} and {len(cols)}")
        if len(rows) == 0:
            raise ValueError("rows and cols are empty: at least one observed entry is needed")
        self.size = len(rows)
        from fastdmf.kernels.cpu import entry_sort

        self.indptr, self.indices, order = entry_sort(np.ascontiguousarray(rows), np.ascontiguousarray(cols), n1, n2)
        self._refuse_duplicates()
        # None stands for "came sorted".
        self.order = None if bool((order[1:] > order[:-1]).all()) else order

    def _refuse_duplicates(self):
        again = np.zeros(self.size + 1, bool)
        again[1:-1] = self.indices[1 : self.size] == self.indices[: self.size - 1]
        again[self.indptr] = False  # the first entry of a row repeats nothing
        count = int(again.sum())
        if count:
            k = int(again.argmax())
            row = int(np.searchsorted(self.indptr, k, side="right")) - 1
            raise ValueError(
                f"{count} entries occur more than once, the first at row {row}, column {self.indices[k]}: "
                "combine duplicate entries (sum, mean or last) before"
            )

    @property
    def rows(self):
        """Row indices in the order they were given, shape (m,)."""
        return self.unsort(np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)))

    @property
    def cols(self):
        """Column indices in the order they were given, shape (m,)."""
        return self.unsort(self.indices[: self.size])

    def sort(self, values):
        """Bring values (..., m) from the order of the measurements into sorted order."""
        return values if self.order is None else values[..., self.order]

    def unsort(self, values):
        """Bring values (..., m) from sorted order into the order of the measurements."""
        if self.order is None:
            return values
        out = np.empty_like(values)
        out[..., self.order] = values
        return out

    def apply(self, x):
        return x[self.rows, self.cols]

    def adjoint(self, r):
        g = np.zeros(self.shape, r.dtype)
        g[self.rows, self.cols] = r
        return g

    def restrict(self, index):
        return EntryMask(self.rows[index], self.cols[index], self.shape)

    def squared_norms(self):
        return np.ones(self.size)

    def coverage(self):
        return np.diff(self.indptr), np.bincount(self.indices[: self.size], minlength=self.shape[1])

    def hold_out(self, fraction, rng):
        """As for every operator, but of rows and columns with more than ``_SPARED`` entries alone, where there are."""
        rows, cols = self.rows, self.cols
        by_row, by_column = self.coverage()
        allowed = np.flatnonzero((by_row[rows] > _SPARED) & (by_column[cols] > _SPARED))
        count = min(max(round(fraction * self.size), 1), self.size - 1)
        if len(allowed) < count:
            return super().hold_out(fraction, rng)
        return np.sort(rng.permutation(allowed)[:count])

    def _bound_on(self, backend):
        if backend.name == "cpu":
            return _BoundMask
        from fastdmf.device_bounds import DeviceMask

        return DeviceMask


class _BoundMask(Bound):
    """Observed entries: sparse kernels on padded rows, or the dense route where the mask is dense."""

    compiled = True
    # Ranges of columns that threads take in turn.
    _COLUMN_RANGES = 16
    # Cells of a dense mask under which the parallel region costs more than it saves.
    _SERIAL_CELLS = 100_000

    def _own(self, y, weights):
        kernels, op = self.backend.kernels, self.operator
        n1, n2 = op.shape

        def padded(a):
            out = np.zeros((len(a), op.size + kernels.PAD), self.dtype)
            out[:, : op.size] = op.sort(np.asarray(a))
            return out

        self._y = padded(y)
        self._w = None if weights is None else padded(weights)
        width = min(n1, n2) if self.width is None else self.width
        self.route, self._n_ranges = kernels.entry_route(n1, n2, op.size, width, self.batch, self.dtype)
        self._block_rows = kernels.BLOCK_ROWS
        self._structures = {}

    @property
    def y(self):
        """Data in the order of the measurements."""
        return self.operator.unsort(self._y[:, : self.operator.size])

    @property
    def weights(self):
        """Weights in the order of the measurements, or None."""
        return None if self._w is None else self.operator.unsort(self._w[:, : self.operator.size])

    def _forget_data(self):
        self._y, self._structures = np.zeros_like(self._y), {}

    def _structure(self, name, build):
        if name not in self._structures:
            self._structures[name] = build()
        return self._structures[name]

    def _cuts(self):
        return self.backend.kernels.entry_cuts(self.operator.indptr, self._n_ranges)

    def _blocks(self):
        """Column-major copy inside row blocks: pointers, rows, data, weights, and column ranges."""
        op, kernels = self.operator, self.backend.kernels
        bptr, brows, border = kernels.entry_blocks(op.indptr, op.indices, *op.shape, self._block_rows)

        def gathered(a):
            if a is None:
                return None
            out = np.zeros_like(a)
            out[:, : op.size] = a[:, border]
            return out

        cuts = kernels.entry_column_cuts(bptr, op.shape[1], self._COLUMN_RANGES)
        return bptr, brows, gathered(self._y), gathered(self._w), cuts

    def _dense(self):
        """Data and weights as full matrices, zero at the holes."""
        op = self.operator
        rows, cols = np.repeat(np.arange(op.shape[0]), np.diff(op.indptr)), op.indices[: op.size]
        y = np.zeros((len(self._y), *op.shape), self.dtype)
        y[:, rows, cols] = self._y[:, : op.size]
        w = np.zeros((1 if self._w is None else len(self._w), *op.shape), self.dtype)
        w[:, rows, cols] = 1 if self._w is None else self._w[:, : op.size]
        return y, w

    def loss_and_adjoint(self, x, out):
        y, w = self._structure("dense", self._dense)
        # The kernel works in place and on contiguous matrices; slices of a chain's buffer have gaps between them.
        g = out if out.flags.c_contiguous else self._buffer("g", out.shape)
        if g is not x:
            g[:] = x
        losses = np.empty(len(x))
        kernels = self.backend.kernels
        residual = kernels.dense_residual_serial if g.size < self._SERIAL_CELLS else kernels.dense_residual
        residual(g, losses, y, w, self.loss.code, self.loss.delta)
        if g is not out:
            out[:] = g
        return losses

    def loss_and_pull(self, p, qt, gp, gqt, probe=None):
        if self.route == "dense":
            return super().loss_and_pull(p, qt, gp, gqt, probe)
        h = p.shape[2]
        if probe is None and self._fits(p) and self._fits(qt) and self._fits(gp) and self._fits(gqt):
            for name in ("p", "qt", "gp", "gqt"):  # left by wider calls: as much memory as the factors
                self._release(name)
            return self._sparse_loss_and_pull(p, qt, gp, gqt)
        # Two more columns, P' = [P, 0, u] and Q'^T = [Q^T, v, 0], leave P Q unchanged and bring G v and G^T u along.
        u, v = (None, None) if probe is None else probe
        pw, qw = self._staged("p", p, u, 1), self._staged("qt", qt, v, 0)
        gpw, gqw = self._buffer("gp", pw.shape), self._buffer("gqt", qw.shape)
        losses = self._sparse_loss_and_pull(pw, qw, gpw, gqw)
        gp[:], gqt[:] = gpw[:, :, :h], gqw[:, :, :h]
        if probe is not None:
            u[:], v[:] = gpw[:, :, h], gqw[:, :, h + 1]
        return losses

    def _fits(self, a):
        return a.shape[2] % self.backend.kernels.row_multiple(self.dtype) == 0 and a.flags.c_contiguous

    def _staged(self, name, a, extra=None, place=0):
        """Copy ``a`` (B, n, h) into rows padded with zeros, with ``extra`` (B, n) in column h + place."""
        batch, n, h = a.shape
        multiple = self.backend.kernels.row_multiple(self.dtype)
        wide = -(-(h + (0 if extra is None else 2)) // multiple) * multiple
        out = self._buffer(name, (batch, n, wide))
        out[:, :, :h] = a
        out[:, :, h:] = 0
        if extra is not None:
            out[:, :, h + place] = extra
        return out

    def _sparse_loss_and_pull(self, p, qt, gp, gqt):
        """One evaluation on padded rows by the route chosen in bind."""
        kernels, op = self.backend.kernels, self.operator
        losses = np.empty(len(p))
        head = (gp, gqt, losses, p, qt, op.indptr, op.indices, self._y, self._w)
        loss = (self.loss.code, self.loss.delta)
        if self.route == "one_pass_serial":
            kernels.entry_one_pass_serial(*head, *loss)
        elif self.route == "one_pass":
            copies = self._buffer("copies", (len(p), self._n_ranges, *qt.shape[1:]))
            kernels.entry_one_pass(*head, *loss, self._structure("cuts", self._cuts), copies)
        else:
            *blocks, column_cuts = self._structure("blocks", self._blocks)
            kernels.entry_two_pass(*head, *blocks, *loss, self._structure("cuts", self._cuts), column_cuts)
        return losses

    # Sums over the data in sorted order, so that no bit depends on the order in which the entries were given.

    def null_losses(self):
        rho = self.loss.rho(-self._y, self._y)  # zero where y is padded with zeros
        return (rho if self._w is None else rho * self._w).sum(axis=1, dtype=np.float64)

    def weight_sums(self):
        return np.array([float(self.operator.size)]) if self._w is None else self._w.sum(axis=1, dtype=np.float64)

    def curvature(self):
        n1, n2 = self.operator.shape
        return self.operator.curvature_factor * self.weight_sums() / (n1 * n2)

    def fuse_chain(self, layout):
        if layout.symmetric or layout.depth < 2 or max(layout.dims) > _SMALL:
            return None
        return FusedChain(self, layout)

    def _forward_sorted(self, p, qt):
        kernels, op = self.backend.kernels, self.operator
        out = np.empty((len(p), op.size), self.dtype)
        p, qt = (a if self._fits(a) else self._staged(n, a) for n, a in (("p", p), ("qt", qt)))
        forward = kernels.entry_forward_serial if self.route == "one_pass_serial" else kernels.entry_forward
        forward(out, p, qt, op.indptr, op.indices)
        return out

    def forward(self, p, qt):
        return self.operator.unsort(self._forward_sorted(p, qt))

    def losses(self, p, qt):
        m = self.operator.size
        if max(*self.operator.shape, p.shape[2]) <= _SMALL:
            return self._small_losses(p, qt)
        y = self._y[:, :m]
        rho = self.loss.rho(self._forward_sorted(p, qt) - y, y)
        if self._w is not None:
            rho = rho * self._w[:, :m]
        return rho.sum(axis=1, dtype=np.float64)

    def _small_losses(self, p, qt):
        """Return what ``losses`` does, by the kernel that the chain's evaluation has anyway, one run at a time."""
        kernels, op = self.backend.kernels, self.operator
        h, out = kernels.chain_padded(p.shape[2], self.dtype), np.empty(len(p))
        r, loss = self._buffer("r", (op.size + kernels.PAD,)), kernels.chain_loss(self.loss.code, self.loss.delta)
        w = self._y if self._w is None else self._w
        for b in range(len(p)):
            left, right = (_padded_rows(a[b], h).ravel() for a in (p, qt))
            data = op.indptr, op.indices, self._row(self._y, b), self._row(w, b), loss, self._w is not None
            out[b] = kernels.sampled_residuals(r, 0, left, 0, right, 0, h, op.shape[0], *data, self.dtype.type(1))
        return out

    def pull(self, r, p, qt):
        kernels, op = self.backend.kernels, self.operator
        h = p.shape[2]
        rs = np.zeros((len(r), op.size + kernels.PAD), self.dtype)
        rs[:, : op.size] = op.sort(r)
        pw, qw = self._staged("p", p), self._staged("qt", qt)
        gp, gqt = np.empty_like(pw), np.empty_like(qw)
        copies = self._buffer("copies", (len(p), self._n_ranges, *qw.shape[1:]))
        kernels.entry_pull(gp, gqt, rs, pw, qw, op.indptr, op.indices, self._structure("cuts", self._cuts), copies)
        return np.ascontiguousarray(gp[:, :, :h]), np.ascontiguousarray(gqt[:, :, :h])


def _padded_rows(a, h):
    """Return ``a`` (n, width) with rows of ``h`` numbers, zeros behind the last column; itself where it has them."""
    if a.shape[1] == h and a.flags.c_contiguous:
        return a
    out = np.zeros((len(a), h), a.dtype)
    out[:, : a.shape[1]] = a
    return out


# Rows, columns and inner widths up to which a whole chain is evaluated in one compiled call.
_SMALL = 500


class FusedChain:
    """All products, residuals and gradients of one evaluation of a small mask problem in one compiled call.

    Parameters
    ----------
    bound : _BoundMask
    layout : fastdmf.chain.Layout
        Of depth 2 or more, not symmetric.
    dense : bool, optional
        Whether the residuals go through full matrices; chosen by their cost when None.
    """

    def __init__(self, bound, layout, dense=None):
        self._kernels = kernels = bound.backend.kernels
        op, (n1, n2) = bound.operator, layout.shape
        chosen, self._parallel = kernels.chain_route(layout.dims, layout.cut, op.size, bound.batch, bound.dtype)
        dense = chosen if dense is None else dense
        if dense:
            y, w = (a.reshape(len(a), -1) for a in bound._structure("dense", bound._dense))
            weighted = bound._w is not None or op.size < n1 * n2
        else:
            y, w = bound._y, bound._y if bound._w is None else bound._w
            weighted = bound._w is not None
        residuals = n1 * n2 if dense else op.size
        self._plan = kernels.chain_plan(layout.dims, layout.cut, layout.offsets[:-1], residuals, dense, bound.dtype)
        self._entries = (op.indptr, op.indices, *kernels.entry_blocks(op.indptr, op.indices, n1, n2, n1))
        self._data = (y, w, kernels.chain_loss(bound.loss.code, bound.loss.delta), weighted, dense)
        self._work, self._point, self._factors = np.empty((0, 0), bound.dtype), None, None

    def __call__(self, x, grad, factors, probe=None):
        """Return sum w rho, (B,) float64, and write the gradient of factors / 2 times that.

        ``factors`` is (B,); ``probe`` as for ``Bound.loss_and_pull``.
        """
        if len(x) != len(self._work):
            self._work = self._kernels.aligned_empty((len(x), self._plan.length), x.dtype)
        losses = np.empty(len(x))
        u, v = (x, x) if probe is None else probe
        data = (*self._plan[:3], *self._entries, *self._data, u, v, probe is not None, self._work)
        if self._parallel:
            self._kernels.chain_runs_parallel(grad, losses, x, factors, *data)
        else:
            self._kernels.chain_runs(grad, losses, x, factors, *data, 0, len(x))
        self._point, self._factors = x, factors
        return losses

    def leading_singular(self, v, steps):
        """Improve ``v`` as ``Problem.leading_singular`` does."""
        norms = np.empty(len(v))
        self._kernels.chain_power(norms, v, self._point, self._plan.ends, self._plan.sizes, steps, self._work)
        return norms

    def leading_gradient(self, u, v, steps):
        """Improve ``u`` and ``v`` as ``Problem.leading_gradient`` does."""
        # A rule starts with it once: no kernel to compile.
        norms = np.zeros(len(v))
        for b in range(len(v)):
            product, adjoint = self._residual_products(b)
            for _ in range(steps):
                gv, gu = product(v[b]), adjoint(u[b])
                norms[b] = np.linalg.norm(gv)
                for out, x, size in ((u[b], gv, norms[b]), (v[b], gu, np.linalg.norm(gu))):
                    np.divide(x, size, out=out, where=size > 0, casting="same_kind")
        return norms

    def _residual_products(self, b):
        """Return the functions v -> G v and u -> G^T u of run b at the point evaluated last."""
        _, n1, n2, *_ = self._plan.sizes
        at = self._plan.ends[0, 2]
        if self._data[-1]:
            g = self._work[b, at : at + n1 * n2].reshape(n1, n2) / np.float64(self._factors[b])
            return g.__matmul__, g.T.__matmul__
        indptr, indices = self._entries[:2]
        rows, cols = np.repeat(np.arange(n1), np.diff(indptr)), indices[: indptr[-1]]
        r = self._work[b, at : at + len(rows)] / np.float64(self._factors[b])
        return (
            lambda v: np.bincount(rows, r * v[cols], minlength=n1),
            lambda u: np.bincount(cols, r * u[rows], minlength=n2),
        )

    def halves(self):
        """Return (P, Q^T) of the point evaluated last: views, valid until it moves or the next call."""
        return self._kernels.chain_halves(self._point, self._plan, self._work)
