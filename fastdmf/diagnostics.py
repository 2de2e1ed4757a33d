"""What ``solve(track=)`` can add to a record: a table from names to functions of the recorded point.

A :class:`Point` holds what several of them need, worked out once a record and only if it is asked for; what outlives a
record (the block of the subspace iteration, the start of the signal) lies in the :class:`Tracker`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastdmf.chain import imbalance
from fastdmf.checks import check_real
from fastdmf.engine import singular_values

__all__ = ["TRACKS", "Entries", "Tracker", "as_track"]

_TOP = 10  # singular values of "singular_values" and "top_singular_values"
_LARGEST = 1e140  # of W's entries: their squares are still finite


@dataclass(frozen=True)
class Entries:
    """Entries of W to record as ``history["entries"]``, of shape (records, k).

    Parameters
    ----------
    rows, cols : sequence of int, shape (k,)
        Indices from 0.

    Raises
    ------
    TypeError, ValueError
        If they are not two lists of as many non-negative integers.
    """

    rows: tuple
    cols: tuple

    def __post_init__(self):
        for name in ("rows", "cols"):
            index = np.asarray(getattr(self, name))
            if index.ndim != 1 or index.size == 0:
                raise ValueError(f"Entries({name}=...) must be a list of indices, got shape {index.shape}")
            if index.dtype.kind not in "iu":
                raise TypeError(f"Entries({name}=...) must hold integers, got dtype {index.dtype}")
            if index.min() < 0:
                raise ValueError(f"Entries({name}=...) must not be negative, got {index.min()} (indices count from 0)")
            object.__setattr__(self, name, tuple(index.tolist()))  # hashable, and the same text whatever it came as
        if len(self.rows) != len(self.cols):
            raise ValueError(f"Entries needs as many rows as cols, got {len(self.rows)} and {len(self.cols)}")


class Point:
    """A recorded point of all active slices.

    Attributes
    ----------
    sound : ndarray of bool, shape (B,)
        Slices whose numbers can be decomposed; those of a run that has diverged may not.
    p, qt : ndarray of shape (B, n1, h) and (B, n2, h)
        The thin halves of W = P Q; zero where a slice is not sound.
    factors : list of ndarray of shape (B, d_j, d_{j-1})
    depth : int
    tracker : Tracker
    """

    def __init__(self, tracker, problem, x):
        self.tracker, self._problem = tracker, problem
        self.depth = problem.layout.depth
        # Decompositions are the host's.
        self.factors = problem.layout.factors(problem.backend.host(x))
        self.p, self.qt = problem.backend.host(*problem.halves(x))
        self.sound = np.array([_magnitude(p) * _magnitude(qt) < _LARGEST for p, qt in zip(self.p, self.qt)])
        if not self.sound.all():
            self.p, self.qt = (np.where(self.sound[:, None, None], half, 0) for half in (self.p, self.qt))

    def matrix(self, b):
        """Return W of slice ``b``, float64."""
        return self.p[b].astype(np.float64) @ self.qt[b].T.astype(np.float64)

    @cached_property
    def spectrum(self):
        """Singular values, (B, k) float64, and (B, 4) means and deviations of the gradient among their vectors.

        The latter only where the tracker wants them: they take the singular vectors.
        """
        if not self.tracker.aligns:
            return singular_values(self.p, self.qt.swapaxes(1, 2)), None
        w = np.stack([self.matrix(b) for b in range(len(self.p))])
        backend = self._problem.backend
        g = backend.xp.empty(w.shape, self.p.dtype)
        self._problem.bound.loss_and_adjoint(backend.asarray(w, self.p.dtype), g)
        g = backend.host(g)
        k = min(*w.shape[1:], self.p.shape[2])
        values, alignment = np.empty((len(w), min(w.shape[1:]))), np.empty((len(w), 4))
        for b, scale in enumerate(2 * self._problem.scale):
            u, values[b], vt = np.linalg.svd(w[b], full_matrices=False)
            gradient = scale * g[b].astype(np.float64)
            if self._problem.layout.symmetric:
                gradient = 0.5 * (gradient + gradient.T)
            size = np.abs(u[:, :k].T @ gradient @ vt[:k].T)
            rest = size[~np.eye(k, dtype=bool)]
            alignment[b, :2] = size.diagonal().mean(), size.diagonal().std()
            alignment[b, 2:] = (rest.mean(), rest.std()) if rest.size else 0
        return values, alignment

    @property
    def singular_values(self):
        return self.spectrum[0]

    @cached_property
    def signal(self):
        """(B, 3): subspace angle, norm of the error, smallest singular value of the signal, float64."""
        return np.array([signal.split(u) for signal, u in zip(self.tracker.signals, self.p.astype(np.float64))])


def _magnitude(half):
    """Return a bound of the norms of the rows; infinite where a number is not finite."""
    size = float(np.abs(half).max()) * half.shape[1] ** 0.5
    return size if np.isfinite(size) else np.inf


def _nuclear_norm(point):
    return point.singular_values.sum(axis=1)


def _effective_rank(point):
    s = point.singular_values
    total = s.sum(axis=1)
    share = s / np.where(total > 0, total, 1)[:, None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.exp(-(share * logs).sum(axis=1))


def _schatten(point):
    return (point.singular_values ** (2 / point.depth)).sum(axis=1)


def _top_singular_values(point):
    tracker, (n1, width), n2 = point.tracker, point.p.shape[1:], point.qt.shape[1]
    if tracker.decomposes or min(n1, n2, width) <= _EXACT_WIDTH:
        return point.singular_values[:, :_TOP]
    blocks = tracker.block
    if blocks is None:
        # Generic, so that no mode is missed, and the same for every slice of a batch and in a run alone.
        start = np.random.default_rng(_BLOCK_SEED).standard_normal((n2, _BLOCK))
        blocks = [np.linalg.qr(start)[0]] * len(point.p)
    found = [
        _subspace_iteration(p.astype(np.float64), qt.astype(np.float64), block)
        for p, qt, block in zip(point.p, point.qt, blocks)
    ]
    tracker.block = np.stack([block for _, block in found])
    return np.stack([values for values, _ in found])


# A block of twice as many vectors as values is iterated until the residual of each Ritz pair of W^T W is this share of
# its value (or of 1e-12 of the largest); where it is not after so many rounds the decomposition is cheaper.
_BLOCK, _RESIDUAL, _FLOOR, _ROUNDS, _BLOCK_SEED = 2 * _TOP, 5e-3, 1e-12, 15, 0
_EXACT_WIDTH = 100  # widths up to which the decomposition takes no longer


def _subspace_iteration(p, qt, block):
    """Return the top singular values of P Q and the block that the next record starts from."""
    for _ in range(_ROUNDS):
        left = p @ (qt.T @ block)
        _, s, turn = np.linalg.svd(np.linalg.qr(left, mode="r"))
        back = qt @ (p.T @ (left @ turn.T))
        ritz = s[:_TOP] ** 2
        residual = np.linalg.norm(back[:, :_TOP] - (block @ turn[:_TOP].T) * ritz, axis=0)
        block = np.linalg.qr(back)[0]
        if (residual <= _RESIDUAL * np.maximum(ritz, _FLOOR * ritz[0])).all():
            return s[:_TOP], block
    return singular_values(p, qt.T)[:_TOP], block


def _entries(point):
    entries = point.tracker.entries
    rows, cols = np.array(entries.rows), np.array(entries.cols)
    return np.einsum("bkh,bkh->bk", point.p[:, rows].astype(np.float64), point.qt[:, cols].astype(np.float64))


# Name -> function of a Point that returns an array over the slices, (B,) or (B, k).
TRACKS = {
    "singular_values": lambda point: point.singular_values[:, :_TOP],
    "top_singular_values": _top_singular_values,
    "nuclear_norm": _nuclear_norm,
    "effective_rank": _effective_rank,
    "schatten": _schatten,
    "imbalance": lambda point: imbalance(point.factors),
    "alignment_diagonal": lambda point: point.spectrum[1][:, :2],
    "alignment_offdiagonal": lambda point: point.spectrum[1][:, 2:],
    "subspace_angle": lambda point: point.signal[:, 0],
    "error_norm": lambda point: point.signal[:, 1],
    "signal_min": lambda point: point.signal[:, 2],
    "entries": _entries,
}
_ALIGNMENT = {"alignment_diagonal", "alignment_offdiagonal"}
_SIGNAL = {"subspace_angle", "error_norm", "signal_min"}
_DECOMPOSING = {"singular_values", "nuclear_norm", "effective_rank", "schatten", *_ALIGNMENT}


def as_track(track, shape):
    """Return ``track`` as a tuple of names and at most one :class:`Entries`.

    Parameters
    ----------
    track : str, Entries or sequence of them
        The form ("entries", rows, cols) stands for ``Entries(rows, cols)``, alone or in the sequence.
    shape : tuple of int
        (n1, n2) of W.

    Raises
    ------
    TypeError, ValueError
        If a name is unknown, entries come twice, or one lies outside W.
    """
    if isinstance(track, (str, Entries)) or _is_entries(track):
        track = (track,)
    items = [Entries(*item[1:]) if _is_entries(item) else item for item in track]
    known = [name for name in TRACKS if name != "entries"]
    unknown = [item for item in items if not isinstance(item, Entries) and item not in known]
    if unknown:
        raise ValueError(f"track knows {', '.join(known)}, and ('entries', rows, cols); got {unknown}")
    items = tuple(dict.fromkeys(items))
    if sum(isinstance(item, Entries) for item in items) > 1:
        raise ValueError("track takes the entries to record as one ('entries', rows, cols)")
    for item in items:
        if isinstance(item, Entries) and (max(item.rows) >= shape[0] or max(item.cols) >= shape[1]):
            raise ValueError(
                f"track: entry ({max(item.rows)}, {max(item.cols)}) is outside the {shape[0]} x {shape[1]} matrix"
            )
    return items


def _is_entries(item):
    """Return whether ``item`` is of the form ("entries", rows, cols)."""
    return isinstance(item, (tuple, list)) and len(item) == 3 and isinstance(item[0], str) and item[0] == "entries"


def as_truth(truth, shape):
    """Return ``truth`` as (1, n1, n2) or (B, n1, n2) float64, or None.

    Raises
    ------
    TypeError, ValueError
        If it is not real and finite, has another shape, or is zero.
    """
    if truth is None:
        return None
    truth = check_real("truth", truth, (2, 3)).astype(np.float64)
    if truth.shape[-2:] != shape:
        raise ValueError(f"truth has shape {truth.shape}, the operator's matrix {shape}")
    truth = truth.reshape(-1, *shape)
    if not truth.any(axis=(1, 2)).all():
        raise ValueError("truth is zero everywhere: a relative error needs a scale")
    return truth


class Tracker:
    """What a run records besides its losses.

    Parameters
    ----------
    track : tuple
        From :func:`as_track`.
    truth : ndarray of shape (1, n1, n2) or (B, n1, n2), or None
        From :func:`as_truth`; adds ``"error"``.
    problem : fastdmf.problem.Problem
    x : ndarray of shape (B, D)
        The start.

    Raises
    ------
    ValueError
        If a name needs a truth and a symmetric chain, and they are not there.
    """

    def __init__(self, track, truth, problem, x):
        self.names = tuple("entries" if isinstance(item, Entries) else item for item in track)
        self.entries = next((item for item in track if isinstance(item, Entries)), None)
        self.truth, self.signals = truth, None
        self.block = self.block_before = None  # the latter as it was before the last record
        self.decomposes, self.aligns = (not names.isdisjoint(self.names) for names in (_DECOMPOSING, _ALIGNMENT))
        if not _SIGNAL.isdisjoint(self.names):
            wanted = ", ".join(name for name in self.names if name in _SIGNAL)
            if truth is None or not problem.layout.symmetric:
                raise ValueError(f"track: {wanted} split U of W = U U^T by the truth: pass symmetric=True and truth=")
            starts = problem.layout.factors(problem.backend.host(x))[0].astype(np.float64)
            self.signals = [_Signal(truth[0 if len(truth) == 1 else b], u) for b, u in enumerate(starts)]

    def record(self, problem, x):
        """Return name -> array over the slices, of the point ``x`` (B, D)."""
        if not self.names and self.truth is None:
            return {}
        point = Point(self, problem, x)
        self.block_before = self.block
        values = {}
        if self.truth is not None:
            truth = np.broadcast_to(self.truth, (len(x), *self.truth.shape[1:]))
            error = [np.sum((point.matrix(b) - truth[b]) ** 2) for b in range(len(x))]
            values["error"] = np.array(error) / np.sum(self.truth**2, axis=(1, 2))
        values |= {name: np.array(TRACKS[name](point), np.float64) for name in self.names}
        for value in values.values():
            value[~point.sound] = np.nan
        return values

    def take(self, keep):
        """Go on with the slices ``keep`` (index array) alone."""
        if self.truth is not None and len(self.truth) > 1:
            self.truth = self.truth[keep]
        if self.block is not None:
            self.block = self.block[keep]
        if self.signals is not None:
            self.signals = [self.signals[b] for b in keep]


class _Signal:
    """Signal and error of U_t as in the proof of Li, Ma and Zhang 2018 (arXiv:1712.09203), section 3.

    S_0 = span(U*), S_t = (I - eta M_{t-1}) S_{t-1}; Z_t = P_{S_t} U_t is the signal, E_t = U_t - Z_t the error. Every
    rule that moves U by scalar multiples of its gradients keeps U_t = X_t U_0 with the same X_t that moves S_t, so that
    S_t = span(U_t U_0^+ U*) where U_0 has full row rank, without a recursion. A narrower U_0 does not determine X_t:
    there S_t stays span(U*), and the angle is that of the leading left singular vectors of U_t.
    """

    def __init__(self, truth, start):
        values, vectors = np.linalg.eigh(0.5 * (truth + truth.T))
        self.basis = vectors[:, values > len(values) * np.finfo(np.float64).eps * np.abs(values).max()]
        self.carried = None
        n, h = start.shape
        if h >= n and np.linalg.matrix_rank(start) == n:
            self.carried = np.linalg.pinv(start) @ self.basis

    def split(self, u):
        """Return (sin of the largest principal angle, ||E||_2, s_min(U*^T Z)) of U (n, h)."""
        basis, rank = self.basis, self.basis.shape[1]
        if not rank:
            return np.nan, np.nan, np.nan
        if self.carried is None:
            space, leading = basis, np.linalg.svd(u, full_matrices=False)[0][:, :rank]
        else:
            space = leading = np.linalg.qr(u @ self.carried)[0]
        signal = space @ (space.T @ u)
        angle = np.linalg.norm(leading - basis @ (basis.T @ leading), 2)
        smallest = np.linalg.svd(basis.T @ signal, compute_uv=False)[-1]
        return min(angle, 1.0), np.linalg.norm(u - signal, 2), smallest
