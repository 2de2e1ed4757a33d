"""A fitted matrix mu + P Q^T as a model: predictions at pairs and blocks, and rows and columns that come later.

P and Q are those of ``alternating``: two columns of biases (each against a constant one of the other side) and latent
columns, rows of P with the prior N(m_i, diag g), noise of variance s. With the other side fixed, a row is the ridge
regression of its entries on the rows of Q, and its posterior variances are functions of its count c_i,

    V_ik = s / (c_i a_k + s / g_k),      a_k = sum_j d_j (q_jk^2 + W_jk) / nnz,

W being the variances of Q. Its prior mean follows from what it has entries at, through the features of
``mask_features``. What the model does not know has the last row of its side: no bias, no latent part, so that
predictions there are mu plus the bias that is known.
"""

from dataclasses import dataclass, replace

import numpy as np

from fastdmf.backend import get_backend

__all__ = ["FactorModel", "FactorSide", "highest"]

# Conjugate gradients of rows that are folded in, to convergence: at most so many steps, and the share of the first
# preconditioned gradient at which a row is done.
_STEPS, _TOL = 30, 1e-6
# Turns of rows, then columns, in a partial fit: more of them cost as much each and gain ever less.
_ROUNDS = 2
_GROUP = 32  # columns whose largest prediction stands for them in ``top``
_MOST = 1e30  # a precision that float32 holds, times any count


@dataclass
class FactorSide:
    """The rows, or the columns.

    Attributes
    ----------
    x : ndarray of shape (n + 1, H)
        Factors; the last row stands for rows without entries.
    counts : ndarray of shape (n + 1,)
        Sums of the weights of the entries.
    prior : ndarray of shape (H,)
        Prior variances g.
    second, variance : ndarray of shape (H,)
        Means over the entries of the squared factors, and of their posterior variances.
    free : ndarray of shape (H,)
        0 for the constant column and for padding, else 1.
    basis : ndarray of shape (n, f) or None
        What each row adds to the features of the other side's rows that have an entry there.
    coefficients : ndarray of shape (f + 2, H) or None
        Prior means are features times these; the first two features are log(1 + count) - ``mean_log`` and 1.
    mean_log : float
    """

    x: np.ndarray
    counts: np.ndarray
    prior: np.ndarray
    second: np.ndarray
    variance: np.ndarray
    free: np.ndarray
    basis: np.ndarray | None = None
    coefficients: np.ndarray | None = None
    mean_log: float = 0.0

    def __len__(self):
        return len(self.counts) - 1


@dataclass
class FactorModel:
    """A matrix mu + P Q^T, and the entries that it was fitted to.

    Attributes
    ----------
    mean, noise : float
        mu and the noise variance s.
    rows, columns : FactorSide
    head : int
        Number of columns of biases, 2 or 0; the latent ones follow.
    indptr, indices, y, w : ndarray
        The entries in the order of ``entry_sort``, less the mean; w may be None.
    """

    mean: float
    noise: float
    rows: FactorSide
    columns: FactorSide
    head: int
    indptr: np.ndarray
    indices: np.ndarray
    y: np.ndarray
    w: np.ndarray | None

    # --- what it consists of -----------------------------------------------------------------------------------------

    @property
    def dtype(self):
        return self.y.dtype

    @property
    def entries(self):
        """The entries, (indptr, indices, y, w)."""
        return self.indptr, self.indices, self.y, self.w

    def held(self):
        """Return the model with its entries in memory, where they can be read at some places only so far."""
        if isinstance(self.indices, np.ndarray):
            return self
        places = np.arange(int(self.indptr[-1]))
        return replace(self, **dict(zip(("indices", "y", "w"), self._padded(places))))

    def biases(self):
        """Return the biases of rows and columns, (n1,) and (n2,)."""
        sides = (self.rows.x[:-1], 0), (self.columns.x[:-1], 1)
        return [x[:, k].copy() if self.head else np.zeros(len(x), x.dtype) for x, k in sides]

    def latent(self):
        """Return the latent columns P and Q, (n1, h) and (n2, h)."""
        latent = slice(self.head, self.head + int(self.rows.free[self.head :].sum()))  # padding follows
        return self.rows.x[:-1, latent], self.columns.x[:-1, latent]

    # --- predictions -------------------------------------------------------------------------------------------------

    def predict(self, rows, cols, return_std=False):
        """Return predictions (k,) at the pairs, float64; -1 stands for an unknown row or column.

        With ``return_std`` also the standard deviations sqrt(s + sum_k p^2 W + V q^2 + V W).
        """
        kernels, x, y = get_backend().kernels, self.rows.x, self.columns.x
        # The kernel takes places from the front, all of one type.
        places = [np.where(i < 0, n, i).astype(np.int64) for i, n in ((rows, len(x) - 1), (cols, len(y) - 1))]
        means = np.empty(len(rows), x.dtype)
        if not return_std:
            kernels.pair_predict(means, x, y, *places)
            return self.mean + means.astype(np.float64)
        spreads = np.empty_like(means)
        kernels.pair_moments(means, spreads, x, y, *places, *self._precisions(0), *self._precisions(1))
        return self.mean + means.astype(np.float64), np.sqrt(self.noise + spreads.astype(np.float64))

    def _precisions(self, axis):
        """Return counts, growth with the count, and start, of the posterior precisions 1 / V of a side."""
        side, other = self._sides(axis)
        # A variance of nothing is a precision without bound.
        with np.errstate(divide="ignore", over="ignore"):
            start = np.where(side.free > 0, 1 / side.prior, np.inf)
            growth = np.minimum((other.second + other.variance) / self.noise, _MOST)
            return [np.ascontiguousarray(v, side.x.dtype) for v in (side.counts, growth, start)]

    def block(self, rows, cols=None):
        """Return predictions of whole rows (r, n2), or of rows at some columns (r, c), in the dtype of the factors."""
        q = self.columns.x[:-1] if cols is None else self.columns.x[cols]
        out = self.rows.x[rows] @ q.T
        out += out.dtype.type(self.mean)
        return out

    def top(self, rows, k, exclude_seen):
        """Return the k columns with the highest predictions in each row and those, (r, k), the best first.

        Columns in which a row has an entry have the prediction -inf if ``exclude_seen``.
        """
        return highest(self.leave_out(rows, self.block(rows)) if exclude_seen else self.block(rows), k)

    def leave_out(self, rows, scores):
        """Put -inf at the entries of these rows into ``scores`` (r, n2), and return it."""
        known = np.flatnonzero(rows >= 0)
        of, at = _expand(rows[known], self.indptr)
        scores[known[of], self.indices[at]] = -np.inf
        return scores

    @classmethod
    def of_latent(cls, base, p, q, noise):
        """Return ``base``, a model of biases, with the latent part p q^T added.

        Prior variances are the mean squares of the columns, and nothing is uncertain.
        """
        kernels, n = get_backend().kernels, base.head + p.shape[1]
        multiple = kernels.row_multiple(p.dtype)
        width = -(-max(n, 1) // multiple) * multiple
        sides = []
        for side, latent in ((base.rows, p), (base.columns, q)):
            x = kernels.aligned_empty((len(side) + 1, width), p.dtype)
            x[:] = 0
            x[:, : base.head], x[:-1, base.head : n] = side.x[:, : base.head], latent
            free = np.zeros(width)
            free[: base.head], free[base.head : n] = side.free[: base.head], 1
            square = np.mean(np.square(x[:-1], dtype=np.float64), axis=0)
            second = np.einsum("i,ik,ik->k", side.counts, x, x) / side.counts.sum()
            # A column of zeros keeps a prior that can be divided by, and stays as good as zero.
            prior = np.maximum(square, 1e-12 * max(square[free > 0].max(initial=0), noise, 1e-200))
            sides.append(FactorSide(x, side.counts, prior, second, np.zeros(width), free))
        return replace(base, noise=noise, rows=sides[0], columns=sides[1])

    def variances(self, axis, counts):
        """Return V of rows (axis 0) or columns (1) with these counts, (len(counts), H)."""
        side, other = self._sides(axis)
        return self.noise * side.free / (counts[:, None] * (other.second + other.variance) + self.noise / side.prior)

    def _sides(self, axis):
        return (self.rows, self.columns) if axis == 0 else (self.columns, self.rows)

    def solve(self, axis, x, indptr, indices, y, w):
        """Overwrite ``x`` (r, H) with rows (axis 0) or columns (1) that have these entries; return their counts.

        Parameters
        ----------
        axis : {0, 1}
        x : ndarray of shape (r, H)
            Start.
        indptr, indices, y, w : ndarray
            Entries as those of the model.
        """
        side, other = self._sides(axis)
        sizes = np.diff(indptr)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        counts = sizes.astype(np.float64) if w is None else np.bincount(owner, w[: len(owner)], len(sizes))
        mean = None
        if side.coefficients is not None:
            mean = np.zeros_like(x)
            mean[:] = self._features(side, other, counts, owner, indices[: len(owner)]) @ side.coefficients * side.free
        vectors = other.variance, self.noise / side.prior, other.second, side.free
        solve = get_backend().kernels.row_solver(indptr, indices, y, w)
        solve(x, other.x, mean, counts, vectors, _STEPS, _TOL)
        return counts

    def _features(self, side, other, counts, owner, indices):
        """Return the features of rows with entries at ``indices``, (r, f + 2)."""
        from scipy.sparse import csr_array

        pattern = csr_array((np.ones(len(owner), other.basis.dtype), (owner, indices)), (len(counts), len(other.basis)))
        spectral = (pattern @ other.basis) / np.sqrt(np.maximum(counts, 1))[:, None]
        return np.column_stack([np.log1p(counts) - side.mean_log, np.ones(len(counts)), spectral])

    def fold_in(self, indptr, indices, y, w):
        """Return a model whose rows are new ones with these entries (in sorted order, less the mean, padded)."""
        rows, n = self.rows, len(indptr) - 1
        x = get_backend().kernels.aligned_empty((n + 1, rows.x.shape[1]), rows.x.dtype)
        x[:] = rows.x[-1]
        counts = np.append(self.solve(0, x[:-1], indptr, indices, y, w), 0.0)
        side = replace(rows, x=x, counts=counts, basis=None)
        return replace(self, rows=side, indptr=indptr, indices=indices, y=y, w=w)

    def learned(self, indptr, indices, y, w, n2, rows, cols):
        """Return a model of these entries, solved again for the rows and columns that are named.

        Parameters
        ----------
        indptr, indices, y, w : ndarray
            All entries, the former ones among them; rows may be more than before.
        n2 : int
            Number of columns.
        rows, cols : ndarray of int
            Distinct rows and columns whose entries are new.
        """
        n1 = len(indptr) - 1
        sides = {"rows": self._grown(0, n1), "columns": self._grown(1, n2)}
        model = replace(self, **sides, indptr=indptr, indices=indices, y=y, w=w)
        touched = (model._entries_of_rows(rows), rows), (model._entries_of_columns(cols), cols)
        for _ in range(_ROUNDS):
            for axis, (entries, lines) in enumerate(touched):
                model._solve_again(axis, lines, *entries)
        return model

    def _solve_again(self, axis, lines, *entries):
        """Solve for some rows (axis 0) or columns (1), and sum their side anew."""
        side = self._sides(axis)[0]
        x = get_backend().kernels.aligned_empty((len(lines), side.x.shape[1]), side.x.dtype)
        x[:] = side.x[lines]
        side.counts[lines] = self.solve(axis, x, *entries)
        side.x[lines] = x
        total = side.counts.sum()
        side.second = np.einsum("i,ik,ik->k", side.counts, side.x, side.x) / total
        side.variance = _weighted_sum(side.counts, lambda c: self.variances(axis, c)) / total

    def _entries_of_rows(self, rows):
        """Return (indptr, indices, y, w) of some rows, padded."""
        of, at = _expand(rows, self.indptr)
        pointers = np.append(0, np.cumsum(np.bincount(of, minlength=len(rows))))
        return pointers, *self._padded(at)

    def _entries_of_columns(self, cols):
        """Return the same of some columns."""
        kernels, m = get_backend().kernels, self.indptr[-1]
        n1, n2 = len(self.rows), len(self.columns)
        place = np.full(n2, -1, kernels.index_type(max(n1, n2)))
        place[cols] = np.arange(len(cols))
        of = place[self.indices[:m]]
        at = np.flatnonzero(of >= 0)
        owners = np.repeat(np.arange(n1, dtype=place.dtype), np.diff(self.indptr))[at]
        pointers, indices, order = kernels.entry_sort(of[at], owners, len(cols), n1)
        return pointers, indices, *self._padded(at[order])[1:]

    def _padded(self, at):
        pad = get_backend().kernels.PAD
        return [None if v is None else np.pad(v[at], (0, pad)) for v in (self.indices, self.y, self.w)]

    def _grown(self, axis, n):
        """Return a copy of a side with rows to spare for n, the new ones unknown so far."""
        side = self._sides(axis)[0]
        more = n - len(side)
        x = get_backend().kernels.aligned_empty((n + 1, side.x.shape[1]), side.x.dtype)
        x[: len(side)], x[len(side) :] = side.x[:-1], side.x[-1]
        # New rows tell nothing of the columns' features before the next fit.
        basis = None if side.basis is None else np.pad(side.basis, ((0, more), (0, 0)))
        return replace(side, x=x, counts=np.pad(side.counts, (0, more)), basis=basis)


def highest(scores, k):
    """Return the places of the k largest numbers in each row of ``scores`` and those, (r, k), the largest first."""
    # The k-th largest of the maxima of groups of columns bounds the k-th largest column from below, and few columns
    # reach it: quicker than argpartition of whole rows.
    r, n2 = scores.shape
    size = max(1, min(_GROUP, n2 // (4 * k)))
    groups = n2 // size
    maxima = scores[:, : size * groups].reshape(r, size, groups).max(axis=1)
    bound = np.partition(maxima, groups - k, axis=1)[:, groups - k, None]
    of, at = np.divmod(np.flatnonzero(scores >= bound), n2)
    place = np.arange(len(of)) - np.searchsorted(of, np.arange(r))[of]
    values = np.full((r, place.max(initial=-1) + 1), -np.inf, scores.dtype)
    columns = np.zeros(values.shape, at.dtype)
    values[of, place], columns[of, place] = scores[of, at], at
    # Equal predictions come in the order of the columns.
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(columns, best, 1), np.take_along_axis(values, best, 1)


def _weighted_sum(counts, variances):
    """Return sum_i c_i V_i through the distinct counts."""
    distinct, times = np.unique(counts, return_counts=True)
    return (times * distinct) @ variances(distinct)


def _expand(lines, indptr):
    """Return for every entry of some rows (its row's place among ``lines``, its place among the entries)."""
    starts, sizes = indptr[lines], indptr[lines + 1] - indptr[lines]
    of = np.repeat(np.arange(len(lines)), sizes)
    return of, np.arange(len(of)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
