"""Second derivatives of the data term along a direction, by thin products; the sharpness of a point.

With W = P Q cut as in :mod:`fastdmf.chain`, a direction of the factors moves P and Q by dP and dQ, the predictions by
dr = A(dP Q + P dQ) and w psi by w slope dr. The gradient of the chain is a sum of products of factors and of
G = A*(w psi), so that its derivative follows by the product rule: every quantity is kept as a pair, its value and its
derivative along the direction.
"""

import numpy as np

__all__ = ["hessian_vector", "sharpness"]

_DENSE = 20  # numbers of a point up to which its Hessian is formed: ARPACK keeps as many vectors


def hessian_vector(problem, x, v):
    """Return the Hessian of the data term c sum w rho(A(W) - y), as a function of the factors, times a direction.

    Parameters
    ----------
    problem : fastdmf.problem.Problem
        Its l2 term, whose Hessian is l2 times the identity, and its penalties are left out.
    x, v : ndarray of shape (B, D)
        Point and direction, in the precision of the problem.

    Returns
    -------
    hv : ndarray of shape (B, D)
        Of the same precision; the gaps between the factors are zero.

    Notes
    -----
    Exact, and linear in ``v``. Where psi jumps or has a kink (truncated, absolute, huber at its threshold) the
    derivative is that of the piece the residual is on. Two forward passes and two pulls, one of each at twice the
    width h of the cut; W is formed by operators that do so anyway, and at depth 1. What ``problem`` remembers of the
    point it evaluated last stays as it is.
    """
    layout = problem.layout
    out = layout.allocate(len(x), x.dtype, problem.xp)
    pairs, g = list(zip(layout.stored(x), layout.stored(v))), layout.stored(out)
    n, k = layout.depth, layout.cut
    if n == 1:
        _, change = _residual_gradients(problem.bound, *(_apply(problem.bound, part) for part in pairs[0]))
        for b, r in enumerate(change):
            g[0][b] = problem.bound.operator.adjoint(r)
    elif layout.symmetric:
        gp, gq = _pull(problem.bound, pairs[0], pairs[0])
        np.add(gp[1], gq[1], out=g[0])
    else:
        # lefts[j] = W_N ... W_j, rights[j] = (W_j ... W_1)^T, as in fastdmf.chain.Sweep.
        lefts, rights = {n: pairs[-1]}, {1: pairs[0]}
        for j in range(n - 1, k, -1):
            lefts[j] = _product(lefts[j + 1], pairs[j - 1])
        for j in range(2, k + 1):
            rights[j] = _product(rights[j - 1], _transposed(pairs[j - 1]))
        gp, gq = _pull(problem.bound, lefts[k + 1], rights[k])
        for j in range(k, 1, -1):
            g[j - 1][:] = _derivative(_transposed(gq), rights[j - 1])
            gq = _product(gq, pairs[j - 1])
        for j in range(k + 1, n):
            g[j - 1][:] = _derivative(_transposed(lefts[j + 1]), gp)
            gp = _product(gp, _transposed(pairs[j - 1]))
        g[0][:], g[-1][:] = gq[1], gp[1]
    out *= (2 * problem.scale).astype(x.dtype)[:, None]
    return out


def sharpness(problem, x, steps=300):
    """Return the largest eigenvalue of the Hessian of the data term and the l2 term at a point.

    Gradient descent with a step of more than 2 / sharpness leaves the point. At a balanced exact fit of
    ||W - W*||_F^2 / 2 by N factors it is N s1^(2 - 2/N), with s1 = ||W*||_2.

    Parameters
    ----------
    problem : fastdmf.problem.Problem
        Its penalties are left out.
    x : ndarray of shape (B, D)
    steps : int
        Most restarts of ARPACK, of about ten Hessian-vector products each.

    Returns
    -------
    ndarray of shape (B,), float64
        From a start that is always the same.

    Raises
    ------
    scipy.sparse.linalg.ArpackNoConvergence
        If ``steps`` do not reach the precision of ``x``.
    """
    return np.array([_top_eigenvalue(problem.take(np.array([b])), x[b : b + 1], steps) for b in range(len(x))])


def _top_eigenvalue(problem, x, steps):
    from scipy.sparse.linalg import LinearOperator, eigsh

    layout = problem.layout
    inside = layout.allocate(1, x.dtype, problem.xp)
    for view in layout.stored(inside):
        view[:] = 1
    places = np.flatnonzero(inside)  # all but the gaps between the factors, where the Hessian is zero

    def product(direction):
        v = np.zeros_like(x)
        v[0, places] = direction.ravel()
        return hessian_vector(problem, x, v)[0, places].astype(np.float64)

    size = len(places)
    if size <= _DENSE:
        top = np.linalg.eigvalsh(np.stack([product(e) for e in np.eye(size)]))[-1]
    else:
        hessian = LinearOperator((size, size), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(size)
        options = {"which": "LA", "v0": start, "maxiter": steps, "tol": np.finfo(x.dtype).eps}
        top = eigsh(hessian, 1, return_eigenvectors=False, **options)[0]
    return float(top) + problem.l2


def _apply(bound, w):
    """Return A(W), shape (B, m), of full matrices."""
    return np.stack([bound.operator.apply(one) for one in w]).astype(bound.dtype, copy=False)


def _residual_gradients(bound, predictions, change):
    """Return w psi, and its derivative where the predictions change by ``change``; both (B, m)."""
    slope = bound.loss.slope(predictions - bound.y, bound.y)
    derivative = change * slope if bound.weights is None else change * slope * bound.weights
    return bound.psi(predictions), derivative


def _pull(bound, p, q):
    """Return the pairs of G Q^T and of G^T P, from those of P and Q^T."""
    h = p[0].shape[2]
    predictions = bound.forward(p[0], q[0])
    # dP Q + P dQ, and then G Q^T beside G dQ^T, as one thin product of twice the width.
    wide_p, wide_q = np.concatenate(p, axis=2), np.concatenate(q, axis=2)
    change = bound.forward(np.concatenate([p[1], p[0]], axis=2), wide_q)
    r, dr = _residual_gradients(bound, predictions, change)
    gp, gq = bound.pull(r, wide_p, wide_q)
    dgp, dgq = bound.pull(dr, p[0], q[0])
    return (gp[:, :, :h], dgp + gp[:, :, h:]), (gq[:, :, :h], dgq + gq[:, :, h:])


def _product(a, b):
    """Return the pair of a b."""
    return a[0] @ b[0], _derivative(a, b)


def _derivative(a, b):
    """Return the derivative of a b."""
    return a[1] @ b[0] + a[0] @ b[1]


def _transposed(a):
    return tuple(part.swapaxes(1, 2) for part in a)
