"""Operators with their data on a GPU: the bound forms of masks, dense and seeded measurements.

Each hands arrays of the device to the kernels' table of its backend (``fastdmf.kernels.cuda.table``); nothing waits for
the device in an evaluation, so that evaluations can be captured.
"""

from copy import copy

import numpy as np

from fastdmf.contract import Bound

__all__ = ["DeviceGaussian", "DeviceMask", "DeviceSeeded"]

# Observed fraction from which a full product with cuBLAS and one pass over its cells takes less than the gathers of the
# sparse kernels, by count of bytes and flops in float32 (8 h bytes and 8 h flops an entry against 6 h flops a cell); no
# device was at hand to measure it.
_DENSE = 0.04
_WIDEST = 256  # of the sparse kernels
_CELLS = 1 << 28  # of the dense route: a gigabyte a matrix in float32


class _Device(Bound):
    """What the three share: losses come from kernels that know them by their code."""

    compiled = True

    def _empty(self, *shape, dtype=None):
        return self.backend.xp.empty(shape, dtype or self.dtype)


class DeviceMask(_Device):
    """Observed entries: the sparse kernels on both orders of the entries, or full matrices where the mask is dense.

    ``y`` and ``weights``, in the order of the measurements, stay on the host.
    """

    def _own(self, y, weights):
        self.y = self.backend.host(self.backend.asarray(y)).astype(self.dtype, copy=False)
        self.weights = None
        if weights is not None:
            self.weights = self.backend.host(self.backend.asarray(weights)).astype(self.dtype, copy=False)
        n1, n2 = self.operator.shape
        width = min(n1, n2) if self.width is None else self.width
        cells = n1 * n2
        self.dense = cells <= _CELLS and (width > _WIDEST or self.operator.size >= _DENSE * cells)
        # What follows from the mask alone is shared with the homogeneous form.
        self._structures, self._sides = {}, {}

    def _forget_data(self):
        self.y, self._structures = np.zeros_like(self.y), {}

    def _structure(self, name, build):
        return _built(self._structures, name, build)

    def _rows(self):
        """Return the rows' side, and y and the weights in its order."""
        op, upload = self.operator, self.backend.asarray
        w = None if self.weights is None else upload(op.sort(self.weights))
        return _built(self._sides, "rows", self._row_side), upload(op.sort(self.y)), w

    def _columns(self):
        """Return the columns' side, y and the weights in its order, and that order of the rows' entries."""
        op, upload = self.operator, self.backend.asarray
        side, order, on_device = _built(self._sides, "columns", self._column_side)
        w = None if self.weights is None else upload(op.sort(self.weights)[:, order])
        return side, upload(op.sort(self.y)[:, order]), w, on_device

    def _row_side(self):
        op = self.operator
        return self.backend.kernels.entry_side(op.indptr, op.indices[: op.size].astype(self._index()))

    def _column_side(self):
        """Return the columns' side and its order of the rows' entries, on the host and on the device."""
        op = self.operator
        n1, n2 = op.shape
        cols = op.indices[: op.size]
        order = np.argsort(cols, kind="stable")
        rows = np.repeat(np.arange(n1, dtype=self._index()), np.diff(op.indptr))[order]
        indptr = np.append(0, np.cumsum(np.bincount(cols, minlength=n2)))
        return self.backend.kernels.entry_side(indptr, rows), order, self.backend.asarray(order)

    def _index(self):
        return np.int32 if max(self.operator.shape) < 2**31 else np.int64

    def _cells(self):
        """Return y and the weights as full matrices (1 or B, n1 n2), zero at the holes."""
        op = self.operator
        n1, n2 = op.shape
        rows, cols = np.repeat(np.arange(n1), np.diff(op.indptr)), op.indices[: op.size]
        y, w = np.zeros((len(self.y), n1, n2), self.dtype), op.sort(self.y)
        y[:, rows, cols] = w
        w = np.ones((1, op.size), self.dtype) if self.weights is None else op.sort(self.weights)
        full = np.zeros((len(w), n1, n2), self.dtype)
        full[:, rows, cols] = w
        return tuple(self.backend.asarray(a.reshape(len(a), -1)) for a in (y, full))

    def loss_and_adjoint(self, x, out):
        y, w = self._structure("cells", self._cells)
        # Contiguous and in place: slices of a chain's buffer have gaps between them.
        g = self._empty(len(x), y.shape[1])
        g[...] = x.reshape(g.shape)
        losses = self._empty(len(x), dtype=np.float64)
        self.backend.kernels.dense_residual(g, losses, y, w, self.loss.code, self.loss.delta)
        out[...] = g.reshape(out.shape)
        return losses

    def loss_and_pull(self, p, qt, gp, gqt, probe=None):
        if self.dense:
            return super().loss_and_pull(p, qt, gp, gqt, probe)
        h, runs = p.shape[2], len(p)
        multiple = self.backend.kernels.row_multiple(self.dtype)
        if h + (0 if probe is None else 2) > _WIDEST:
            return self._evaluate_in_parts(p, qt, gp, gqt, probe)
        if probe is None and h % multiple == 0 and all(a.flags.c_contiguous for a in (p, qt, gp, gqt)):
            return self._evaluate(p, qt, gp, gqt)
        # Two more columns, P' = [P, 0, u] and Q'^T = [Q^T, v, 0], leave P Q unchanged and bring G v and G^T u along.
        u, v = (None, None) if probe is None else probe
        pw, qw = self._staged(p, u, 1), self._staged(qt, v, 0)
        gpw, gqw = self._empty(runs, *pw.shape[1:]), self._empty(runs, *qw.shape[1:])
        losses = self._evaluate(pw, qw, gpw, gqw)
        gp[...], gqt[...] = gpw[:, :, :h], gqw[:, :, :h]
        if probe is not None:
            u[...], v[...] = gpw[:, :, h], gqw[:, :, h + 1]
        return losses

    def _staged(self, a, extra=None, place=0):
        """Copy ``a`` (B, n, h) into rows padded with zeros, with ``extra`` (B, n) in column h + place."""
        runs, n, h = a.shape
        multiple = self.backend.kernels.row_multiple(self.dtype)
        wide = -(-(h + (0 if extra is None else 2)) // multiple) * multiple
        out = self._empty(runs, n, wide)
        out[:, :, :h], out[:, :, h:] = a, 0
        if extra is not None:
            out[:, :, h + place] = extra
        return out

    def _evaluate(self, p, qt, gp, gqt):
        losses = self._empty(len(p), dtype=np.float64)
        rows, (columns, yc, wc, _) = self._structure("rows", self._rows), self._structure("columns", self._columns)
        loss = self.loss.code, self.loss.delta
        self.backend.kernels.entry_loss_pull(gp, gqt, losses, p, qt, *rows, columns, yc, wc, *loss)
        return losses

    def _evaluate_in_parts(self, p, qt, gp, gqt, probe):
        """Evaluate what is too wide for one kernel: predictions of parts of the columns, and pulls of parts."""
        _, y, w = self._structure("rows", self._rows)
        predicted = self._predicted(p, qt)
        rho, r = self.loss.rho(predicted - y, y), self.loss.psi(predicted - y, y)
        if w is not None:
            rho, r = rho * w, r * w
        for at in _parts(p.shape[2]):
            gp[:, :, at], gqt[:, :, at] = self._pull_sorted(r, p[:, :, at], qt[:, :, at])
        if probe is not None:
            u, v = probe
            gv, gu = self._pull_sorted(r, u[:, :, None], v[:, :, None])
            u[...], v[...] = gv[:, :, 0], gu[:, :, 0]
        return rho.sum(axis=1, dtype=np.float64)

    def _weighted(self, values):
        """Return sum over the measurements, (B,) float64, of the host's ``values`` (B, m)."""
        values = self.operator.sort(values)
        w = None if self.weights is None else self.operator.sort(self.weights)
        return (values if w is None else values * w).sum(axis=1, dtype=np.float64)

    def null_losses(self):
        return self._weighted(self.loss.rho(-self.y, self.y))

    def weight_sums(self):
        if self.weights is None:
            return np.array([float(self.operator.size)])
        return self.operator.sort(self.weights).sum(axis=1, dtype=np.float64)

    def curvature(self):
        n1, n2 = self.operator.shape
        return self.operator.curvature_factor * self.weight_sums() / (n1 * n2)

    def take(self, keep):
        def pick(a):
            return a if a is None or len(a) == 1 else a[keep]

        data = pick(self.y), pick(self.weights)
        return type(self)(self.operator, self.backend, *data, self.loss, self.dtype, self.width, len(keep))

    def _predicted(self, p, qt):
        """Return A(P Q), (B, m), in the order of the rows' side."""
        side, *_ = self._structure("rows", self._rows)
        if self.dense and p.shape[2] > _WIDEST:
            rows, cols = (self.backend.asarray(a) for a in self._places())
            return np.matmul(p, qt.swapaxes(1, 2))[:, rows, cols]
        total = None
        for at in _parts(p.shape[2]):
            out = self._empty(len(p), self.operator.size)
            self.backend.kernels.entry_forward(out, self._staged(p[:, :, at]), self._staged(qt[:, :, at]), side)
            total = out if total is None else total + out
        return total

    def _places(self):
        op = self.operator
        return np.repeat(np.arange(op.shape[0]), np.diff(op.indptr)), op.indices[: op.size]

    def _order(self):
        """Return the place among the measurements of each of the rows' entries, or None if it is its own."""
        return None if self.operator.order is None else self.backend.asarray(self.operator.order)

    def forward(self, p, qt):
        predicted, order = self._predicted(p, qt), self._structure("order", self._order)
        if order is None:
            return predicted
        out = self.backend.xp.empty_like(predicted)
        out[:, order] = predicted
        return out

    def losses(self, p, qt):
        _, y, w = self._structure("rows", self._rows)
        rho = self.loss.rho(self._predicted(p, qt) - y, y)
        return self.backend.host((rho if w is None else rho * w).sum(axis=1, dtype=np.float64))

    def _given(self):
        """Return y and the weights in the order of the measurements, on the device."""
        if self.operator.order is None:
            return self._structure("rows", self._rows)[1:]
        return tuple(None if a is None else self.backend.asarray(a) for a in (self.y, self.weights))

    def psi(self, predictions):
        y, w = self._structure("given", self._given)
        g = self.loss.psi(predictions - y, y)
        return g if w is None else g * w

    def residuals(self, p, qt):
        return self.forward(p, qt) - self._structure("given", self._given)[0]

    def pull(self, r, p, qt):
        order = self._structure("order", self._order)
        r = self.backend.xp.ascontiguousarray(r if order is None else r[:, order])
        parts = [self._pull_sorted(r, p[:, :, at], qt[:, :, at]) for at in _parts(p.shape[2])]
        return parts[0] if len(parts) == 1 else tuple(self.backend.xp.concatenate(g, axis=2) for g in zip(*parts))

    def _pull_sorted(self, r, p, qt):
        """As ``pull``, for ``r`` in the order of the rows' side and no more columns than the kernels take."""
        h = p.shape[2]
        rows, (columns, *_, by_column) = self._structure("rows", self._rows), self._structure("columns", self._columns)
        pw, qw = self._staged(p), self._staged(qt)
        gp, gqt = self._empty(*pw.shape), self._empty(*qw.shape)
        self.backend.kernels.entry_pull(gp, r, qw, rows[0])
        self.backend.kernels.entry_pull(gqt, self.backend.xp.ascontiguousarray(r[:, by_column]), pw, columns)
        return gp[:, :, :h], gqt[:, :, :h]


def _parts(h):
    """Return slices of h columns, each no wider than the sparse kernels take."""
    return [slice(k, min(k + _WIDEST, h)) for k in range(0, h, _WIDEST)]


def _built(kept, name, build):
    """Return what is kept under ``name``, built when it is first asked for."""
    if name not in kept:
        kept[name] = build()
    return kept[name]


class _Measured(_Device):
    """Dense measurements, stored or drawn: through the full matrix X as one row."""

    def take(self, keep):
        part = copy(self)  # A is shared
        part._work, part.batch, keep = {}, len(keep), self.backend.asarray(keep)
        contiguous = self.backend.xp.ascontiguousarray
        part.y, part.weights = (a if a is None or len(a) == 1 else contiguous(a[keep]) for a in (self.y, self.weights))
        return part

    def forward(self, p, qt):
        x = np.matmul(p, qt.swapaxes(1, 2)).reshape(len(p), -1)
        out = self._empty(len(p), self.operator.size)
        self._measure(out, x)
        return out

    def pull(self, r, p, qt):
        n1, n2 = self.operator.shape
        g = self._empty(len(r), n1 * n2)
        self._pull(g, self.backend.asarray(r, self.dtype))
        g = g.reshape(len(r), n1, n2)
        return np.matmul(g, qt), np.matmul(g.swapaxes(1, 2), p)

    def loss_and_adjoint(self, x, out):
        n1, n2 = self.operator.shape
        g, losses = self._empty(len(x), n1 * n2), self._empty(len(x), dtype=np.float64)
        self._loss_pull(g, losses, self.backend.xp.ascontiguousarray(x.reshape(g.shape)))
        out[...] = g.reshape(out.shape)
        return losses


class DeviceGaussian(_Measured):
    """Dense measurements: the fused kernel, which shares one read of A among the runs."""

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        super().__init__(operator, backend, y, weights, loss, dtype, width, batch)
        self._stored = operator.storage
        if operator.storage is None:
            self._a = backend.asarray(operator.a, dtype)
        elif dtype == np.float32:
            self._a = backend.asarray(operator.a).view(np.uint16)  # the kernels' form of float16
        else:
            raise ValueError(f"storage='float16' computes in float32, not in {dtype}: pass dtype='float32'")

    def _loss_pull(self, g, losses, x):
        data = self.y, self.weights, self.loss.code, self.loss.delta
        self.backend.kernels.gaussian_loss_pull(g, losses, self._a, x, *data, stored=self._stored)

    def _measure(self, out, x):
        self.backend.kernels.gaussian_forward(out, self._a, x, stored=self._stored)

    def _pull(self, g, r):
        self.backend.kernels.gaussian_pull(g, self._a, r, stored=self._stored)


class DeviceSeeded(_Measured):
    """Seeded measurements: drawn where they are used, the same numbers as on the CPU."""

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        super().__init__(operator, backend, y, weights, loss, dtype, width, batch)
        self._rows, self._drawings = backend.asarray(operator.index), {}

    def _drawing(self, runs):
        if runs not in self._drawings:
            op, columns = self.operator, self.operator.shape[0] * self.operator.shape[1]
            self._drawings[runs] = self.backend.kernels.seeded(
                self._rows, columns, runs, self.dtype, op.ensemble, op.stream()
            )
        return self._drawings[runs]

    def curvature(self):
        if self.operator._norms is None and self.operator.ensemble == "gaussian":
            self.operator._norms = self._drawing(1).squared_norms()
        return super().curvature()

    def _loss_pull(self, g, losses, x):
        data = self.y, self.weights, self.loss.code, self.loss.delta
        self._drawing(len(x)).loss_pull(g, losses, x, *data)

    def _measure(self, out, x):
        self._drawing(len(x)).forward(out, x)

    def _pull(self, g, r):
        self._drawing(len(r)).adjoint(g, r)
