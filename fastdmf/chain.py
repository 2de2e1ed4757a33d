"""The chain of factors: memory layout, products, gradients, starting points.

W = W_N ... W_1 with W_j of shape d_j x d_{j-1}. The chain is cut once, at its narrowest inner width h = d_k, into
P = W_N ... W_{k+1} (n1 x h) and Q = W_k ... W_1 (h x n2); every factor's gradient follows from the two thin products
G Q^T and G^T P that the operator returns. W_1 is *stored* transposed, so that both sides are tall C-contiguous arrays
and depth 2 needs no copy at all: P = W_2, Q^T = W_1^T as stored.

All factors of a run are views of one flat (B, D) buffer, B the batch. The symmetric chain W = U U^T has one factor
and P = Q^T = U.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["INITS", "Layout", "Sweep", "imbalance", "initial_factors"]

# Factors start at multiples of 64 bytes in either precision: misaligned rows cost the mask kernels a third
# (6.2 against 4.7 ns an entry in the kernel study).
_ALIGN = 16


@dataclass(frozen=True)
class Layout:
    """Where the factors lie in a flat buffer.

    Attributes
    ----------
    dims : tuple of int
        (d_0, d_1, ..., d_N); for the symmetric chain (n, h, n).
    symmetric : bool
        W = U U^T with one stored factor U of shape (n, h).
    """

    dims: tuple
    symmetric: bool = False

    @property
    def depth(self):
        """Number of factors N of the product (2 for the symmetric chain)."""
        return len(self.dims) - 1

    @property
    def shape(self):
        """(n1, n2) of W."""
        return self.dims[-1], self.dims[0]

    @cached_property
    def stored_shapes(self):
        """Shapes as stored: W_1 transposed, unless it is alone."""
        d = self.dims
        if self.symmetric:
            return [(d[0], d[1])]
        if self.depth == 1:
            return [(d[1], d[0])]
        return [(d[0], d[1])] + [(d[j], d[j - 1]) for j in range(2, len(d))]

    @cached_property
    def offsets(self):
        """First number of every stored factor, and the length D of the whole."""
        sizes = [-(-rows * cols // _ALIGN) * _ALIGN for rows, cols in self.stored_shapes]
        return [0, *np.cumsum(sizes).tolist()]

    @property
    def size(self):
        """Length D of one slice of the buffer; the gaps between factors stay zero."""
        return self.offsets[-1]

    @cached_property
    def cut(self):
        """k: P ends with W_{k+1}, Q begins with W_k. The narrowest place, then the fewest flops."""
        d, n = self.dims, self.depth
        if n < 2:
            return 0

        def cost(k):
            right = sum(d[0] * d[j] * d[j - 1] for j in range(2, k + 1))
            return d[k], right + sum(d[n] * d[j] * d[j - 1] for j in range(k + 1, n))

        return min(range(1, n), key=cost)

    @property
    def width(self):
        """Width h of the cut."""
        return self.dims[self.cut] if self.depth > 1 else min(self.shape)

    def allocate(self, batch, dtype, xp=np):
        """Return a zeroed (batch, D) buffer that starts at a multiple of 64 bytes."""
        itemsize = np.dtype(dtype).itemsize
        raw = xp.zeros(batch * self.size + _ALIGN, dtype)
        if xp is np:
            skip = (-raw.ctypes.data) % 64 // itemsize
            raw = raw[skip:]
        return raw[: batch * self.size].reshape(batch, self.size)

    def stored(self, flat):
        """Return views (B, rows, cols) of the factors as they lie in ``flat``."""
        batch = len(flat)
        return [
            flat[:, start : start + rows * cols].reshape(batch, rows, cols)
            for start, (rows, cols) in zip(self.offsets, self.stored_shapes)
        ]

    def factors(self, flat):
        """Return views (B, d_j, d_{j-1}) of W_1, ..., W_N; for the symmetric chain the one factor U."""
        views = self.stored(flat)
        if self.symmetric or self.depth == 1:
            return views
        return [views[0].swapaxes(1, 2), *views[1:]]

    def write(self, flat, factors, slice_=0):
        """Copy ``factors`` (as given by the user, W_j of d_j x d_{j-1}) into slice ``slice_`` of ``flat``."""
        for view, w in zip(self.factors(flat), factors):
            view[slice_] = w


class Sweep:
    """Products of one layout, with scratch memory that is kept between evaluations.

    :meth:`products` forms P and Q^T and keeps the partial products; :meth:`gradients` turns G Q^T and G^T P into the
    gradients of all factors. Depth 1 and the symmetric chain are the short cases of the same two calls.
    """

    def __init__(self, layout, batch, dtype, xp=np):
        self.layout, self.xp = layout, xp
        d, n, k = layout.dims, layout.depth, layout.cut
        self._lefts, self._rights, self._gp, self._gq = {}, {}, {}, {}
        if layout.symmetric or n == 1:
            return

        def empty(*shape):
            return xp.empty((batch, *shape), dtype)

        # lefts[j] = W_N ... W_j, rights[j] = (W_j ... W_1)^T; the ends are the factors themselves.
        for j in range(n - 1, k, -1):
            self._lefts[j] = empty(d[n], d[j - 1])
            self._gp[j] = empty(d[n], d[j - 1])
        for j in range(2, k + 1):
            self._rights[j] = empty(d[0], d[j])
            self._gq[j] = empty(d[0], d[j])

    def products(self, flat):
        """Return (P, Q^T), shapes (B, n1, h) and (B, n2, h), as views or scratch; valid until the next call."""
        layout, xp = self.layout, self.xp
        w = layout.stored(flat)
        if layout.symmetric:
            return w[0], w[0]
        n, k = layout.depth, layout.cut
        self._w = w
        self._lefts[n], self._rights[1] = w[-1], w[0]
        for j in range(n - 1, k, -1):
            xp.matmul(self._lefts[j + 1], w[j - 1], out=self._lefts[j])
        for j in range(2, k + 1):
            xp.matmul(self._rights[j - 1], w[j - 1].swapaxes(1, 2), out=self._rights[j])
        return self._lefts[k + 1], self._rights[k]

    def outputs(self, grad):
        """Return the arrays (gp, gqt) that the operator should write into: the gradient itself where it can."""
        layout = self.layout
        g = layout.stored(grad)
        if layout.symmetric:
            if "other" not in self._gp:
                self._gp["other"] = self.xp.empty_like(g[0])
            return g[0], self._gp["other"]
        n, k = layout.depth, layout.cut
        self._gp[n], self._gq[1] = g[-1], g[0]
        return self._gp[k + 1], self._gq[k]

    def gradients(self, grad):
        """Complete ``grad`` from what the operator wrote into :meth:`outputs`."""
        layout, xp = self.layout, self.xp
        if layout.symmetric:
            # d/dU of l(U U^T) is G U + G^T U.
            layout.stored(grad)[0][:] += self._gp["other"]
            return
        n, k, w, g = layout.depth, layout.cut, self._w, layout.stored(grad)
        for j in range(k, 1, -1):
            xp.matmul(self._gq[j].swapaxes(1, 2), self._rights[j - 1], out=g[j - 1])
            xp.matmul(self._gq[j], w[j - 1], out=self._gq[j - 1])
        for j in range(k + 1, n):
            xp.matmul(self._lefts[j + 1].swapaxes(1, 2), self._gp[j], out=g[j - 1])
            xp.matmul(self._gp[j], w[j - 1].swapaxes(1, 2), out=self._gp[j + 1])


def imbalance(factors):
    """Return max_j ||W_{j+1}^T W_{j+1} - W_j W_j^T||_F / ||W_j||_F^2 of each slice (Arora et al. 2019, eq. 4).

    Zero along the gradient flow from a balanced start; ``factors`` as from :meth:`Layout.factors`, shape (B,).
    """
    worst = np.zeros(len(factors[0]))
    for below, above in itertools.pairwise(factors):
        below, above = below.astype(np.float64), above.astype(np.float64)
        gap = above.swapaxes(1, 2) @ above - below @ below.swapaxes(1, 2)
        scale = (below**2).sum((1, 2))
        worst = np.maximum(worst, np.sqrt((gap**2).sum((1, 2))) / np.where(scale > 0, scale, 1))
    return worst


# --- starting points: lists of W_1, ..., W_N in float64 for one seed ------------------------------------------------


def _gaussian(dims, alpha, rng):
    """Independent normals of standard deviation alpha^(1/N) / sqrt(d_{j-1}): E ||W||_F^2 = alpha^2 n1."""
    a = alpha ** (1 / (len(dims) - 1))
    return [rng.standard_normal((rows, cols)) * (a / np.sqrt(cols)) for cols, rows in itertools.pairwise(dims)]


def _imbalanced(dims, alpha, rng):
    """Gaussian factors whose standard deviations grow geometrically from W_1 to W_N, by 3 in all; alpha as there.

    At depth 2 W_2 = 3 W_1 in scale, the start of Xiong, Ding and Du 2023 (F_0 = a X, G_0 = (a/3) Y): the imbalance
    F^T F - G^T G, which gradient descent keeps, makes factors wider than the rank converge at a linear rate.
    """
    factors = _gaussian(dims, alpha, rng)
    places = np.linspace(-0.5, 0.5, len(factors)) if len(factors) > 1 else [0.0]
    return [3.0**place * w for place, w in zip(places, factors)]


def _identity(dims, alpha, rng):
    """alpha^(1/N) I, cut off where a factor is not square."""
    a = alpha ** (1 / (len(dims) - 1))
    return [a * np.eye(rows, cols) for cols, rows in itertools.pairwise(dims)]


def _orthogonal(dims, alpha, rng):
    """Random (semi-)orthogonal factors, scaled alike so that ||W||_F = alpha sqrt(n1)."""
    factors = []
    for cols, rows in itertools.pairwise(dims):
        q, r = np.linalg.qr(rng.standard_normal((max(rows, cols), min(rows, cols))))
        q *= np.sign(np.diagonal(r))  # uniform over the orthogonal group
        factors.append(q if rows >= cols else q.T)
    return _rescaled(factors, alpha, dims)


def _balanced(dims, alpha, rng):
    """W_{j+1}^T W_{j+1} = W_j W_j^T exactly: one random spectrum shared out evenly among the factors.

    W = U S V^T of rank min(dims) with random U, V and the spectrum of a Gaussian matrix; W_1 = S^(1/N) V^T,
    W_N = U S^(1/N), between them S^(1/N) (Arora, Cohen and Hazan 2018, procedure 1).
    """
    h, n = min(dims), len(dims) - 1
    u, v = (np.linalg.qr(rng.standard_normal((rows, h)))[0] for rows in (dims[-1], dims[0]))
    s = np.linalg.svd(rng.standard_normal((h, h)), compute_uv=False) ** (1 / n)
    factors = []
    for j in range(1, n + 1):
        w = np.zeros((dims[j], dims[j - 1]))
        left = u if j == n else np.eye(dims[j], h)
        right = v if j == 1 else np.eye(dims[j - 1], h)
        w[:] = (left * s) @ right.T
        factors.append(w)
    return _rescaled(factors, alpha, dims)


def _rescaled(factors, alpha, dims):
    """Scale all factors alike so that ||W||_F = alpha sqrt(n1); thin products only."""
    thin = factors[0]
    for w in factors[1:-1]:
        thin = w @ thin
    if len(factors) > 1:
        top = factors[-1]
        norm = np.sqrt(np.sum((top.T @ top) * (thin @ thin.T)))
    else:
        norm = np.linalg.norm(thin)
    scale = (alpha * np.sqrt(dims[-1]) / norm) ** (1 / len(factors))
    return [scale * w for w in factors]


INITS = {
    "gaussian": _gaussian,
    "imbalanced": _imbalanced,
    "identity": _identity,
    "orthogonal": _orthogonal,
    "balanced": _balanced,
}


def initial_factors(layout, init, alpha, seed):
    """Return the factors W_1, ..., W_N (the symmetric chain: U) of a start, float64.

    Parameters
    ----------
    layout : Layout
    init : str
        ``"gaussian"``, ``"imbalanced"``, ``"identity"``, ``"orthogonal"`` or ``"balanced"``.
    alpha : float
        End-to-end scale: E ||W||_F^2 = alpha^2 n1 for Gaussian factors, and as much for the others but
        ``"identity"``, where every factor is alpha^(1/N) I.
    seed : int
        Drawn on the host in float64 whatever the precision or the device, so that runs can be compared.

    Notes
    -----
    The symmetric chain takes U = sqrt(alpha) times the first factor of the same kind: for ``"identity"`` and
    ``"orthogonal"`` sqrt(alpha) times a matrix with orthonormal columns (Li, Ma and Zhang 2018 write alpha for our
    sqrt(alpha)).
    """
    rng = np.random.default_rng(seed)
    if not layout.symmetric:
        return INITS[init](layout.dims, alpha, rng)
    n, h, _ = layout.dims
    if init in ("gaussian", "imbalanced"):  # one factor has nothing to be out of balance with
        return [rng.standard_normal((n, h)) * np.sqrt(alpha / h)]
    if init == "identity":
        return [np.sqrt(alpha) * np.eye(n, h)]
    q, r = np.linalg.qr(rng.standard_normal((n, h)))
    return [np.sqrt(alpha) * q * np.sign(np.diagonal(r))]
