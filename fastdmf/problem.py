"""Operator + data + chain -> value and gradient in one of the literature's normalisations."""

import numpy as np

from fastdmf.chain import Sweep

__all__ = ["NORMALISATIONS", "Problem", "unit"]

# Factor of sum w rho(r) in the loss, from sum w: a learning rate means nothing without it.
NORMALISATIONS = {
    "mse": lambda weight: 1 / weight,
    "mse/2": lambda weight: 0.5 / weight,
    "sse": lambda weight: np.ones_like(weight),
    "sse/2": lambda weight: np.full_like(weight, 0.5),
}


class Problem:
    """min over the factors of  c sum_i w_i rho(A(W_N ... W_1)_i - y_i) + l2/2 sum_j ||W_j||_F^2 + penalties.

    Parameters
    ----------
    bound : fastdmf.contract.Bound
    layout : fastdmf.chain.Layout
    batch : int
        Number B of slices.
    loss : {"mse", "mse/2", "sse", "sse/2"}
        c = 1/sum w, 1/(2 sum w), 1 or 1/2.
    l2 : float
    penalties : sequence
        Objects of :mod:`fastdmf.penalties`. Each has ``add(problem, x, grad)``, which returns its values, (B,) float64,
        and adds its gradient to ``grad``, where that of the terms before it is found.

    Notes
    -----
    Works on flat (B, D) buffers. Scratch is kept between calls, so that an evaluation allocates nothing of the size of
    the factors; :meth:`leading_singular` refers to the point evaluated last.
    """

    def __init__(self, bound, layout, batch, *, loss="mse", l2=0.0, penalties=()):
        self.bound, self.layout, self.batch, self.loss, self.l2 = bound, layout, batch, loss, l2
        self.penalties = tuple(penalties)
        self.backend, self.xp, self.kernels = bound.backend, bound.backend.xp, bound.backend.kernels
        self.weight_sums = np.broadcast_to(bound.weight_sums(), (batch,))
        self.scale = np.broadcast_to(NORMALISATIONS[loss](bound.weight_sums()), (batch,))
        null_losses = np.broadcast_to(bound.null_losses(), (batch,))
        self.null_objective = self.scale * null_losses
        self._null_divisors = np.where(null_losses > 0, null_losses, np.inf)
        # The operator pulls sum w rho / 2, so that squared loss has the residual itself.
        self._factors = self.backend.asarray(2 * self.scale, bound.dtype)
        self._scale = self.backend.asarray(self.scale)
        self._sweep = Sweep(layout, batch, bound.dtype, self.xp)
        self._fused = bound.fuse_chain(layout)
        self._halves = None

    def evaluate(self, x, grad, probe=None):
        """Return (losses, objective), both (B,) float64, and write the gradient of the objective.

        Parameters
        ----------
        x, grad : ndarray of shape (B, D)
            Point, and gradient (overwritten).
        probe : tuple of ndarray (u, v), optional
            Vectors (B, n1), (B, n2), replaced by G v and G^T u, where G is the gradient of the data term in the
            convention sum w r^2 / 2 (without c).

        Returns
        -------
        losses : ndarray of shape (B,)
            sum w rho(r), without c.
        objective : ndarray of shape (B,)
            c times that plus the l2 term and the penalties. Both are the backend's arrays; :meth:`measure` waits.
        """
        if self._fused is not None:
            losses = self._fused(x, grad, self._factors, probe)
        elif self.layout.depth == 1:
            w, g = self.layout.stored(x)[0], self.layout.stored(grad)[0]
            losses = self.bound.loss_and_adjoint(w, g)
            if probe is not None:
                u, v = probe
                u[:], v[:] = _matvec(g, v), _matvec(g.swapaxes(1, 2), u)
            g *= self._factors[:, None, None]
            self._halves = (w, None)
        else:
            p, qt = self._sweep.products(x)
            gp, gqt = self._sweep.outputs(grad)
            losses = self.bound.loss_and_pull(p, qt, gp, gqt, probe)
            gp *= self._factors[:, None, None]
            gqt *= self._factors[:, None, None]
            self._sweep.gradients(grad)
            self._halves = (p, qt)
        objective = self._scale * losses
        if self.l2:
            objective = objective + 0.5 * self.l2 * self.squared_norm(x)
            grad += x.dtype.type(self.l2) * x
        for penalty in self.penalties:
            objective = objective + penalty.add(self, x, grad)
        return losses, objective

    def measure(self, x, grad, probe=None):
        """As :meth:`evaluate`, with both results on the host: for rules that decide there."""
        return self.backend.host(*self.evaluate(x, grad, probe))

    def take(self, keep):
        """Return the problem of the batch's slices ``keep`` (an index array)."""
        terms = {"loss": self.loss, "l2": self.l2, "penalties": self.penalties}
        return Problem(self.bound.take(keep), self.layout, len(keep), **terms)

    def residuals(self, x):
        """Return A(W) - y of the point ``x``, shape (B, m), in the order of the measurements."""
        return self.bound.residuals(*self.halves(x))

    def halves(self, x):
        """Return copies-free (P, Q^T) of the point ``x``; at depth 1 (W, identity)."""
        if self.layout.depth == 1:
            w = self.layout.stored(x)[0]
            return w, self.xp.broadcast_to(self.xp.eye(w.shape[2], dtype=w.dtype), (len(w), w.shape[2], w.shape[2]))
        return self._sweep.products(x)

    def relative(self, losses):
        """Return sum w rho(r) / sum w rho(y), the loss relative to that of W = 0 (0/0 is 0); on the host."""
        return losses / self._null_divisors

    def squared_norm(self, a):
        """Return the squared norm of every slice of a (B, D) buffer, (B,) float64, in one pass."""
        out = self.xp.empty(len(a))
        self.kernels.slices_dot(out, a, a)
        return out

    def leading_singular(self, v, steps):
        """Improve ``v`` (B, n2), in place, by power steps on W^T W at the point evaluated last.

        Returns
        -------
        s1 : ndarray of shape (B,), float64
            Estimate of ||W||_2 from below, on the host; four thin products a step, W is never formed.
        """
        if self._fused is not None:
            return self._fused.leading_singular(v, steps)
        p, qt = self._halves

        def forward(v):
            return _matvec(p, v) if qt is None else _matvec(p, _matvec(qt.swapaxes(1, 2), v))

        def backward(u):
            pu = _matvec(p.swapaxes(1, 2), u)
            return pu if qt is None else _matvec(qt, pu)

        for _ in range(steps):
            unit(backward(forward(v)), out=v)
        return np.sqrt(self.backend.host(squared_norm(forward(v))))

    def leading_gradient(self, u, v, steps):
        """Improve (u, v) towards the leading singular pair of G at the point evaluated last, in place."""
        if self._fused is not None:
            return self._fused.leading_gradient(u, v, steps)
        p, qt = self._halves
        # Probes of the evaluation itself: separate pulls would compile kernels that nothing else needs.
        gp, gqt = self.xp.empty_like(p), None if qt is None else self.xp.empty_like(qt)
        if qt is None:
            self.bound.loss_and_adjoint(p, gp)
        for _ in range(steps):
            gv, gu = u.copy(), v.copy()
            if qt is None:
                gv, gu = _matvec(gp, v), _matvec(gp.swapaxes(1, 2), u)
            else:
                self.bound.loss_and_pull(p, qt, gp, gqt, (gv, gu))
            norms = unit(gv, out=u)
            unit(gu, out=v)
        return self.backend.host(norms)


def _matvec(a, v):
    """Batched matrix-vector product."""
    return np.matmul(a, v[:, :, None])[:, :, 0]


def dot(a, b):
    """Return the inner product of every slice, (B,), float64."""
    if isinstance(a, np.ndarray):
        return np.array([np.vdot(x, y) for x, y in zip(a, b)], np.float64)
    return np.einsum("bi,bi->b", a, b).astype(np.float64)


def squared_norm(a):
    """Return the squared norm of every slice, (B,), float64."""
    return dot(a, a)


def unit(a, out, chosen=None):
    """Write the slices of ``a`` that are ``chosen`` (default: all) and not zero to ``out`` with norm one; return norms.

    A slice at a time: with one ``einsum`` and ``divide`` over all, a step of the take-off took longer at n = 100. On a
    device all at once, without waiting for it.
    """
    norms = np.sqrt(squared_norm(a))
    if not isinstance(a, np.ndarray):
        some = norms > 0 if chosen is None else (norms > 0) & chosen
        out[...] = np.where(some[:, None], a / np.where(some, norms, 1).astype(a.dtype)[:, None], out)
        return norms
    for b, size in enumerate(norms):
        if size > 0 and (chosen is None or chosen[b]):
            np.divide(a[b], a.dtype.type(size), out=out[b])
    return norms
