"""Variational matrix factorization of large or noisy masks: alternating ridge regressions that tune themselves.

Model. y_ij = mu + p_i . q_j + noise, with H = h + 2 columns: column 0 of P is learned against a constant column of Q
(row bias), column 1 the other way round, the rest are latent. p_i ~ N(m_i, diag g), q_j ~ N(k_j, diag g'), the noise
has variance s. A factorized Gaussian posterior has variances that are functions of the count c_i of a row alone,

    V_ik = s / (c_i (mq_k + vq_k) + s / g_k),      mq_k = sum_j d_j q_jk^2 / nnz,   vq_k = sum_j d_j V_jk / nnz,

so that s, g, the variances and every ridge weight have closed forms which cost O((n1 + n2) H) a sweep (Raiko, Ilin and
Karhunen 2007; Lim and Teh 2007; Nakajima and Sugiyama 2011 on what they prune). The rows' regressions take one to three
steps of conjugate gradients (``kernels.row_solver``). Components that the data do not support die by themselves:
there is no learning rate, no penalty and no rank to choose.

Depth enters through the prior variances: tied across components as g_k <- gbar^(1 - theta) g_k^theta with
theta = 1 - 2/N, they are the empirical-Bayes counterpart of the Schatten-2/N penalty of N factors under weight decay.

On a device live the factors, the prior means, the entries and what there is of numbers a row; sums over rows come to
the host, where all of the size of the width is done.
"""

from dataclasses import dataclass

import numpy as np

from fastdmf.backend import get_backend
from fastdmf.mask_features import Regression, mask_features

__all__ = ["HeldSide", "Settings", "Solvers", "Sweeps", "balanced_factors", "balancing_rotations"]

# The constants below were chosen on MovieLens-100K u1 and MovieLens-1M with the test curve in sight; everything else
# was then only run.
_START = 0.2  # of the square root of the bias fit's error: standard deviation of the latent columns of Q
_WARM_RIDGE = 0.7  # of the spectral norm of the noise on the mask
_BIAS_RIDGE = 5.0
_STEPS, _TOL = 3, 0.1  # of conjugate gradients a row
_ALIVE = 1e-4  # of the largest component's energy
_DEAD = 1e-8  # of the largest component's energy
_FLOOR = 1e-12
_WARM_SWEEPS, _FEATURES_FROM = 2, 3
# Entries up to which rows keep the columns of zeros that dead components leave: narrower ones would be another compiled
# version of the regressions, two seconds of a first fit, for less than a millisecond a sweep.
_FEW = 100_000
_BLOCK, _BLOCK_ON_DEVICE = 1 << 14, 1 << 18  # rows that are held in float64 at a time


@dataclass(frozen=True)
class HeldSide:
    """The entries of the rows, or of the columns, in memory: one block.

    :class:`Solvers` takes anything with ``indptr``, ``weighted``, ``blocks`` and ``arrays``; ``shards`` has the one
    that reads from disk.

    Attributes
    ----------
    indptr, indices, y, w : ndarray
        Sorted entries as ``kernels.row_solve`` takes them, y centred; w may be None.
    """

    indptr: np.ndarray
    indices: np.ndarray
    y: np.ndarray
    w: np.ndarray | None

    @property
    def weighted(self):
        """Whether entries have weights."""
        return self.w is not None

    def blocks(self):
        """Yield (slice of the rows, indptr, indices, y, w): runs of rows that cover all, with pointers from 0.

        The arrays of a block may be overwritten by the next one's.
        """
        yield slice(0, len(self.indptr) - 1), *self.arrays()

    def arrays(self):
        """Return (indptr, indices, y, w) of all entries."""
        return self.indptr, self.indices, self.y, self.w


class Solvers:
    """The regressions of all rows: pairs (slice of the rows, what ``kernels.row_solver`` gives), a block at a time.

    Those of entries in memory are made once for all fits: on a device they hold a copy of the entries.

    Attributes
    ----------
    entries : HeldSide, or an object with its methods
    """

    def __init__(self, kernels, entries):
        self._kernels, self.entries = kernels, entries
        self._kept = list(self._made()) if isinstance(entries, HeldSide) else None

    def _made(self):
        for at, *block in self.entries.blocks():
            yield at, self._kernels.row_solver(*block)

    def __iter__(self):
        return self._made() if self._kept is None else iter(self._kept)


class _Side:
    """The rows, or the columns: entries in their order, factors, prior, and what the posterior needs of it.

    The posterior variances are V_ik = s / (count_i a_k + reach_i b_k + l_k), never stored: equal counts have equal
    variances, so that sums over rows are sums over distinct counts.
    """

    _SUMS = "second", "away", "variance", "mean_variance"
    _CHANGING = "x", "mean", "free", "prior", "second", "away", "variance", "mean_variance", "posterior"
    _OF_REGRESSION = "variance", "coefficients", "divergence"
    _OF_ROWS = "counts", "distinct", "which", "times", "distinct_reach", "reach"

    def __init__(self, backend, solvers, width, dtype):
        self.backend, self.solvers, self.entries = backend, solvers, solvers.entries
        self.indptr = self.entries.indptr
        self.n = len(self.indptr) - 1
        self.dtype = dtype
        if self.entries.weighted:
            self.counts = np.concatenate([_row_sums(indptr, w) for _, indptr, *_, w in self.entries.blocks()])
        else:
            self.counts = np.diff(self.indptr).astype(np.float64)
        self.total = max(self.counts.sum(), 1e-300)
        self.density = self.total / self.n
        self.distinct, self.which, times = np.unique(self.counts, return_inverse=True, return_counts=True)
        self.times = times.astype(np.float64)
        # What the ridge of the warm start grows with.
        self.distinct_reach = np.sqrt(np.maximum(self.distinct, 1) / self.density)
        self.reach = self.distinct_reach[self.which]
        self._move()
        self.x = backend.kernels.aligned_empty((self.n, width), dtype)
        self.x[:] = 0
        self.free = np.ones(width)
        self.mean = None
        self.regression = self.basis = None
        self.prior = np.ones(width)
        self.second = np.zeros(width)  # sum_i c_i x_ik^2 / nnz
        self.variance = np.zeros(width)  # sum_i c_i V_ik / nnz
        self.mean_variance = np.zeros(width)  # mean_i V_ik
        self.posterior = None  # (s, a, b, l) of the variances

    def _move(self):
        """Bring what there is of numbers a row to where the backend computes."""
        self._block = _BLOCK if self.backend.name == "cpu" else _BLOCK_ON_DEVICE
        for name in self._OF_ROWS:
            setattr(self, name, self.backend.asarray(getattr(self, name)))

    def _placed(self, a):
        """Return a copy there; the kernels want whole cache lines."""
        place = self.backend.kernels.aligned_empty(a.shape, a.dtype)
        place[:] = self.backend.asarray(a)
        return place

    def _uploaded(self, *vectors):
        """Return vectors of the host there, in one copy."""
        return self.backend.asarray(np.stack(vectors))

    def improve(self, other, scale, scaled_ridge, ridge, steps=_STEPS, posterior=None):
        """Regress every row on the other side; return the squared error before.

        ``posterior`` is what :meth:`spread` takes: given here, its sums come from a device together with the others.
        """
        vectors = scaled_ridge, ridge, other.second, self.free
        error = 0.0
        for at, solve in self.solvers:
            mean = None if self.mean is None else self.mean[at]
            error = error + solve(self.x[at], other.x, mean, scale[at], vectors, steps, _TOL)
        error, *sums = self.backend.host(error, *self._squares(), *self._spreads(posterior))
        for name, value in zip(self._SUMS, sums):
            setattr(self, name, value)
        return float(error)

    def finish(self, entries=False):
        """Bring all to the host; the side can be read, and no longer improved. Entries are kept if ``entries``."""
        self.solvers = None
        if not entries:
            self.entries = None
        home = get_backend()
        if self.backend is not home:
            self.backend = home
            self._move()
            self.x, self.mean = (None if a is None else self._placed(a) for a in (self.x, self.mean))
            if self.regression is not None:
                self.regression.features = home.asarray(self.regression.features)

    def measure(self):
        """Sum the squares of the factors."""
        self.second, self.away = self.backend.host(*self._squares())

    def _squares(self):
        """Return sum_i c_i x_ik^2 / nnz and mean_i (x - m)_ik^2, a block of rows in float64 at a time."""
        zeros, width = self.backend.xp.zeros, self.x.shape[1]
        second, away = zeros(width), zeros(width)
        for k in range(0, self.n, self._block):
            at = slice(k, k + self._block)
            x = self.x[at].astype(np.float64)
            second += _square_sums(x, self.counts[at])
            if self.mean is not None:
                x -= self.mean[at]
            away += _square_sums(x)
        return second / self.total, away / self.n

    def square_sum(self):
        """Return sum w y^2."""
        total = 0.0
        for _, indptr, _, y, w in self.entries.blocks():
            y = y[: indptr[-1]]
            total += float(np.vdot(y, y) if w is None else np.dot(w[: len(y)], y.astype(np.float64) ** 2))
        return total

    def logs(self):
        """Return sum_i log(V_ik / g_k), (H,), where the factors live; of any finite number for columns not free."""
        logs, (prior,) = self.backend.xp.zeros(len(self.prior)), self._uploaded(self.prior)
        for k in range(0, len(self.distinct), self._block):
            at = slice(k, k + self._block)
            v = self.variances(self.distinct[at], self.distinct_reach[at])
            logs += self.times[at] @ np.log(np.where(v > 0, v, 1) / prior)
        return logs

    def divergence(self, logs):
        """Return the divergence of the posterior from the prior of every column, (H,); 0 for columns not free.

        ``logs`` are those of :meth:`logs`, on the host.
        """
        return self.free * 0.5 * (self.n * ((self.mean_variance + self.away) / self.prior - 1) - logs)

    def select(self, keep):
        """Keep the columns ``keep`` of the factors and of all that goes with them."""
        width = _padded(len(keep), self.dtype) if self.indptr[-1] > _FEW else self.x.shape[1]
        places = self.backend.asarray(keep)

        def kept(v, fill=0.0):
            out = np.full(width, fill, v.dtype)
            out[: len(keep)] = v[keep]
            return out

        def kept_of_rows(a):
            out = self.backend.kernels.aligned_empty((self.n, width), self.dtype)
            out[:, : len(keep)], out[:, len(keep) :] = a[:, places], 0
            return out

        self.x = kept_of_rows(self.x)
        if self.mean is not None:
            self.mean = kept_of_rows(self.mean)
            self.regression.select(keep)
        for name in ("free", "second", "away", "variance", "mean_variance"):
            setattr(self, name, kept(getattr(self, name)))
        self.prior = kept(self.prior, 1.0)
        s, a, b, ridge = self.posterior
        self.posterior = s, kept(a, 1.0), kept(b), kept(ridge)

    def adopt(self, other):
        """Take what the same side of a fit to some of the rows has found of the components; factors begin at zero."""
        for name in ("free", "prior", "second", "variance", "mean_variance"):
            setattr(self, name, getattr(other, name).copy())
        self.x = self.backend.kernels.aligned_empty((self.n, other.x.shape[1]), self.dtype)
        self.x[:] = 0

    def snapshot(self):
        """Return what has changed since the start."""
        regression = None
        if self.regression is not None:
            regression = {name: getattr(self.regression, name) for name in self._OF_REGRESSION}
        arrays = {name: self.backend.host(getattr(self, name)) for name in self._CHANGING}
        return {"arrays": arrays, "regression": regression}

    def resume(self, snapshot):
        """Go on from a snapshot; features, counts and entries are those of the start."""
        for name, value in snapshot["arrays"].items():
            of_rows = isinstance(value, np.ndarray) and value.ndim == 2
            setattr(self, name, self._placed(value) if of_rows else value)
        for name, value in (snapshot["regression"] or {}).items():
            setattr(self.regression, name, value)

    def variances(self, counts, reach):
        """Return V for rows with these counts, (len(counts), H)."""
        s, *vectors = self.posterior
        a, b, ridge, numerator = self._uploaded(*vectors, s * self.free)
        shape = counts[:, None] * a + reach[:, None] * b + ridge
        return numerator / np.maximum(shape, 1e-300)

    def variances_of(self, index):
        """Return V of the rows ``index``, (k, H)."""
        return self.variances(self.counts[index], self.reach[index])

    def spread(self, s, a, b, ridge):
        """Set the posterior and sum its variances."""
        self.variance, self.mean_variance = self.backend.host(*self._spreads((s, a, b, ridge)))

    def _spreads(self, posterior):
        """Set the posterior and return sum_i c_i V_ik / nnz and mean_i V_ik; nothing where that is None."""
        if posterior is None:
            return ()
        self.posterior, zeros = posterior, self.backend.xp.zeros
        variance, mean_variance = zeros(len(self.free)), zeros(len(self.free))
        for k in range(0, len(self.distinct), self._block):
            at = slice(k, k + self._block)
            v = self.variances(self.distinct[at], self.distinct_reach[at])
            variance += (self.times[at] * self.distinct[at]) @ v
            mean_variance += self.times[at] @ v
        return variance / self.total, mean_variance / self.n


def _padded(width, dtype):
    """Return the width in whole cache lines of the CPU, on every device: fits and checkpoints move between them."""
    multiple = get_backend().kernels.row_multiple(dtype)
    return -(-max(width, 1) // multiple) * multiple


def _row_sums(indptr, w):
    sums = np.concatenate(([0.0], np.cumsum(w[: indptr[-1]], dtype=np.float64)))
    return sums[indptr[1:]] - sums[indptr[:-1]]


def _square_sums(x, weights=None):
    """Return sum_i w_i x_ik^2, (H,)."""
    if isinstance(x, np.ndarray):
        return np.einsum("ik,ik->k", x, x) if weights is None else np.einsum("i,ik,ik->k", weights, x, x)
    # cupy's einsum would take a product of two vectors for every column.
    return (np.ones_like(x[:, 0]) if weights is None else weights) @ (x * x)


@dataclass
class Settings:
    """What a fit is told.

    Attributes
    ----------
    theta : float
        1 - 2/N; 1 leaves every component its own prior variance.
    width : int
        Latent columns h.
    biases : bool
    """

    theta: float = 1.0
    width: int = 30
    biases: bool = True


class Sweeps:
    """One variational fit: ``start``, then ``step`` improves ``rows``, ``columns`` and the noise variance ``noise``.

    Parameters
    ----------
    backend : Backend
    rows, columns : Solvers
        For the entries in either order.
    settings : Settings
    rng : numpy.random.Generator
    dtype : numpy dtype
    """

    def __init__(self, backend, rows, columns, settings, rng, dtype):
        self.settings, self.rng, self.backend, self.dtype = settings, rng, backend, dtype
        self.head = 2 if settings.biases else 0
        self.live = self.head + settings.width
        width = _padded(self.live, dtype)
        self.rows = _Side(backend, rows, width, dtype)
        self.columns = _Side(backend, columns, width, dtype)
        self.sides = self.rows, self.columns
        for side in self.sides:
            side.free[self.live :] = 0
        if settings.biases:
            for side, fixed in zip(self.sides, (1, 0)):
                side.x[:, fixed], side.free[fixed] = 1, 0
        self.done, self.noise, self.squared_error = 0, None, None

    def use_features(self, count):
        """Let spectral features of the mask set the prior means; ``count`` vectors."""
        patterns = ((side.indptr, side.entries.indices, self.backend.host(side.counts)) for side in self.sides)
        features = mask_features(get_backend().kernels, *patterns, count, self.rng, self.dtype)
        for side, f, basis in zip(self.sides, features[:2], features[2:]):
            side.regression = Regression(self.backend.asarray(f), np.ones(self.live))
            side.basis = basis
            side.mean = np.zeros_like(side.x)

    # --- start ---------------------------------------------------------------------------------------------------

    def start(self):
        """Fit the biases and draw the small latent columns of Q."""
        rows, columns, head = self.rows, self.columns, self.head
        width = rows.x.shape[1]
        self.bias_ridge, zero = np.zeros(width), np.zeros(width)
        self.bias_ridge[:head] = _BIAS_RIDGE
        for side in self.sides:
            side.measure()
        self.squared_error = square_sum = rows.square_sum()
        if head:
            for _ in range(2):
                columns.improve(rows, columns.reach, zero, self.bias_ridge, steps=1)
                self.squared_error = rows.improve(columns, rows.reach, zero, self.bias_ridge, steps=1)
        self._bound(square_sum)
        self.noise = self.bias_noise = max(self.squared_error / rows.total, self.least)
        latent = slice(head, self.live)
        shape = columns.n, self.settings.width
        if self.settings.width:
            drawn = _START * self.noise**0.25 * self.rng.standard_normal(shape, dtype=self.dtype)
            columns.x[:, latent] = self.backend.asarray(drawn, self.dtype)
        columns.measure()
        # About the spectral norm of the noise on the mask.
        self.penalty = np.zeros(width)
        self.penalty[latent] = _WARM_RIDGE * np.sqrt(self.noise) * (np.sqrt(rows.density) + np.sqrt(columns.density))

    def start_from(self, other):
        """Go on from a fit to some of the rows, with its settings, by sweeps over all rows."""
        rows, columns = self.sides
        self.live, self.noise, self.bias_noise = other.live, other.noise, other.bias_noise
        for side, known in zip(self.sides, other.sides):
            side.adopt(known)
        columns.x[:] = self.backend.asarray(other.columns.x)
        if self.head:
            rows.x[:, 1] = 1
        columns.measure()
        self._bound(rows.square_sum())
        self.squared_error = self.noise * rows.total  # until the first sweep tells
        self.done = _WARM_SWEEPS

    def _bound(self, square_sum):
        """Let no estimate of the noise go below rounding."""
        self.least = max(np.finfo(self.dtype).eps ** 2 * square_sum / self.rows.total, 1e-200)

    def step(self):
        """Improve everything once: two sweeps of ridge regressions first, variational ones from then on."""
        if self.done < _WARM_SWEEPS:
            self._warm()
        else:
            self._sweep()
        self.done += 1
        if self.settings.theta == 1 and self.done > _FEATURES_FROM:
            self._drop()

    def _warm(self):
        """Sweep with ridges that grow with the square root of the counts (maximum a posteriori), then rotate."""
        for side, other in (self.sides, self.sides[::-1]):
            self.squared_error = side.improve(other, side.reach, self.penalty, self.bias_ridge)
        self.rotate()
        if self.done == _WARM_SWEEPS - 1:
            for side, other in (self.sides, self.sides[::-1]):
                side.spread(self.noise, other.second, self.penalty, self.bias_ridge)
            self._estimate()

    def rotate(self):
        """Turn the latent columns into U S^(1/2) and V S^(1/2) of their product."""
        latent = slice(self.head, self.live)
        left, right, _ = balancing_rotations(self.rows.x[:, latent], self.columns.x[:, latent])
        for side, turn in zip(self.sides, (left, right)):
            side.x[:, latent] = side.x[:, latent] @ self.backend.asarray(turn, self.dtype)
            side.measure()

    # --- sweeps --------------------------------------------------------------------------------------------------

    def _sweep(self):
        """Improve rows, columns, priors and noise."""
        for side, other in (self.sides, self.sides[::-1]):
            ridge = self.noise / side.prior
            posterior = self.noise, other.second + other.variance, np.zeros_like(ridge), ridge
            self.squared_error = side.improve(other, side.counts, other.variance, ridge, posterior=posterior)
            if side.regression is not None and self.done >= _FEATURES_FROM:
                self._centre(side)
        self._estimate()

    def _centre(self, side):
        """Move the prior means to what the features of the mask predict."""
        latent = slice(self.head, self.live)
        posterior = side.variances(side.distinct, side.distinct_reach)[:, latent].mean(axis=1)
        trust = 1 / (1 + posterior / side.prior[latent].mean())
        live = slice(0, self.live)
        side.mean[:, live] = side.regression.fit(side.x[:, live], trust[side.which], side.prior[live])
        for k in np.flatnonzero(side.free[live] == 0):
            side.mean[:, k] = 0
        side.measure()

    def _estimate(self):
        """Set noise and prior variances to their closed forms at the present factors."""
        rows, columns = self.sides
        mp, vp, mq, vq = rows.second, rows.variance, columns.second, columns.variance
        floor = _FLOOR * np.sqrt(self.noise)
        variance = float((mp * vq + vp * mq + vp * vq).sum())
        self.noise = max(self.squared_error / rows.total + variance, self.least)
        for side in self.sides:
            side.prior = side.away + side.mean_variance + floor
        theta = self.settings.theta
        if theta < 1 and self.components:
            latent = slice(self.head, self.live)
            # The geometric weights keep dead components from dragging the common variance down with them.
            weight = np.sqrt(rows.prior * columns.prior)[latent]
            for side in self.sides:
                g = side.prior[latent]
                side.prior[latent] = ((weight @ g) / weight.sum()) ** (1 - theta) * g**theta

    def _drop(self):
        """Leave out components without energy."""
        energy = (self.rows.second * self.columns.second)[self.head : self.live]
        if energy.size == 0 or (energy >= _DEAD * energy.max()).all():
            return
        keep = np.concatenate((np.arange(self.head), self.head + np.flatnonzero(energy >= _DEAD * energy.max())))
        self.live = len(keep)
        for side in self.sides:
            side.select(keep)

    def evidence(self):
        """Return the variational lower bound on the log likelihood, at the noise variance that maximises it.

        -nnz/2 (log(2 pi s) + 1) less the divergence of each factor's posterior from its prior,
        1/2 sum (V + (x - m)^2) / g - 1 - log(V / g), and that of the coefficients of the mask's features from theirs.
        """
        logs = self.backend.host(*(side.logs() for side in self.sides))
        divergence = sum(side.divergence(part).sum() for side, part in zip(self.sides, logs))
        for side in self.sides:
            if side.regression is not None and side.regression.divergence is not None:
                divergence += side.free[: self.live] @ side.regression.divergence
        return -0.5 * self.rows.total * (np.log(2 * np.pi * self.noise) + 1) - divergence

    def finish(self):
        """Bring all to the host and let the entries by column go: the fit can be read, and no longer improved."""
        self.rows.finish(entries=True)
        self.columns.finish()
        self.backend = get_backend()

    _NUMBERS = "live", "done", "noise", "squared_error"

    def snapshot(self):
        """Return what has changed since the start."""
        numbers = {name: getattr(self, name) for name in self._NUMBERS}
        return {"numbers": numbers, "sides": [side.snapshot() for side in self.sides]}

    def resume(self, snapshot):
        """Go on from a snapshot of a fit that started as this one did."""
        for name, value in snapshot["numbers"].items():
            setattr(self, name, value)
        for side, part in zip(self.sides, snapshot["sides"]):
            side.resume(part)

    @property
    def alive(self):
        """Number of latent columns that carry more than 1e-4 of the largest one's energy."""
        energy = (self.rows.second * self.columns.second)[self.head : self.live]
        return int(np.count_nonzero(energy > _ALIVE * energy.max(initial=0)))

    @property
    def components(self):
        """Number of latent columns that are left."""
        return self.live - self.head


def balancing_rotations(p, q):
    """Return (L, R, s) with p L = U S^(1/2) and q R = V S^(1/2), where p q^T = U S V^T.

    Through the eigenvectors of the two small Gram matrices in float64, no decomposition of tall matrices; on the host,
    wherever p and q are.
    """
    p_gram, q_gram = get_backend("auto", p).host(p.T @ p, q.T @ q)
    values, vectors = np.linalg.eigh(p_gram.astype(np.float64))
    values = np.maximum(values, values[-1] * 1e-12 + 1e-30) if len(values) else values
    root, inverse = (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T
    squared, turn = np.linalg.eigh(root @ q_gram.astype(np.float64) @ root)
    squared, turn = squared[::-1], turn[:, ::-1]
    s = np.sqrt(np.maximum(squared, squared[0] * 1e-12 + 1e-30)) if len(squared) else squared
    return inverse @ turn * np.sqrt(s), root @ turn / np.sqrt(s), s


def balanced_factors(p, q, depth):
    """Return [W_1, ..., W_N] with W_N ... W_1 = p q^T and W_{j+1}^T W_{j+1} = W_j W_j^T, N = ``depth``."""
    left, right, s = balancing_rotations(p, q)
    # What the rotation rounds up to 1e-6 of the largest is dead.
    alive = s > 2e-6 * s[:1]
    outer, inner = alive * s ** (1 / depth - 0.5), [np.diag(alive * s ** (1 / depth)).astype(p.dtype)] * (depth - 2)
    return [(q @ (right * outer).astype(p.dtype)).T, *inner, p @ (left * outer).astype(p.dtype)]
