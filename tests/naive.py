"""Plain float64 loops: the one oracle of the kernels. Imports nothing of the package and compiles nothing."""

import numpy as np

SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)


def rho_psi(r, code, delta):
    """Return rho(r) and psi(r) = rho'(r) / 2 of one residual."""
    a = abs(r)
    if code == SQUARED:
        return r * r, r
    if code == HUBER:
        return (r * r, r) if a <= delta else (delta * (2 * a - delta), delta if r > 0 else -delta)
    if code == TRUNCATED:
        return (r * r, r) if a <= delta else (delta * delta, 0.0)
    return a, 0.0 if r == 0 else (0.5 if r > 0 else -0.5)


def sort_entries(rows, cols):
    """Return the stable order by row, then column."""
    return np.array(sorted(range(len(rows)), key=lambda k: (rows[k], cols[k])), dtype=int)


def block_entries(rows, cols, block_rows):
    """Return the order of row-sorted entries by row block, then column, then row."""
    return np.array(sorted(range(len(rows)), key=lambda k: (rows[k] // block_rows, cols[k], rows[k])), dtype=int)


def entry_forward(p, qt, rows, cols):
    """Return p_i . q_j at each entry, one run."""
    p, qt = p.astype(float), qt.astype(float)
    return np.array([float(np.dot(p[i], qt[j])) for i, j in zip(rows, cols)])


def entry_pull(r, p, qt, rows, cols):
    """Return R Q^T and R^T P for the sparse R with the given entries, one run."""
    p, qt = p.astype(float), qt.astype(float)
    gp, gqt = np.zeros_like(p), np.zeros_like(qt)
    for k, (i, j) in enumerate(zip(rows, cols)):
        gp[i] += float(r[k]) * qt[j]
        gqt[j] += float(r[k]) * p[i]
    return gp, gqt


def losses_and_pulls(prediction, y, w, code, delta):
    """Return the sum of w rho and the array of w psi over flat arrays; w None means one."""
    total, pulls = 0.0, np.zeros(len(prediction))
    for k, f in enumerate(prediction):
        rho, psi = rho_psi(float(f) - float(y[k]), code, delta)
        weight = 1.0 if w is None else float(w[k])
        total += weight * rho
        pulls[k] = weight * psi
    return total, pulls


def entry_loss(p, qt, rows, cols, y, w, code, delta):
    """Return (loss, G Q^T, G^T P), one run."""
    loss, pulls = losses_and_pulls(entry_forward(p, qt, rows, cols), y, w, code, delta)
    return loss, *entry_pull(pulls, p, qt, rows, cols)


def gaussian_loss_pull(a, x, y, w, code, delta):
    """Return (loss, sum_i w psi(a_i . x - y_i) a_i), one run."""
    a, x = a.astype(float), x.astype(float)
    loss, pulls = losses_and_pulls([float(np.dot(row, x)) for row in a], y, w, code, delta)
    g = np.zeros(a.shape[1])
    for row, pull in zip(a, pulls):
        g += pull * row
    return loss, g


def chain_entry(factors, rows, cols, y, w, code, delta):
    """Return the loss at the entries of W_N ... W_1 and its gradients (of half the loss), with the residual dense."""
    factors = [f.astype(float) for f in factors]
    product = factors[0]
    for f in factors[1:]:
        product = f @ product
    loss, pulls = losses_and_pulls(product[rows, cols], y, w, code, delta)
    g = np.zeros_like(product)
    for i, j, pull in zip(rows, cols, pulls):
        g[i, j] += pull
    gradients = []
    for k in range(len(factors)):
        left = np.eye(product.shape[0])
        for f in reversed(factors[k + 1 :]):
            left = left @ f
        right = np.eye(product.shape[1])
        for f in factors[:k]:
            right = f @ right
        gradients.append(left.T @ g @ right.T)
    return loss, gradients, g


def row_solve(a, b, mean, rows, cols, y, w, scale, scaled_ridge, ridge, moment, free, steps, tol):
    """Return the rows after preconditioned conjugate gradients on their ridge regressions, and sum w r^2 before."""
    a, b, y, w = a.astype(float), b.astype(float), y.astype(float), w.astype(float)
    total = 0.0
    for i in range(len(a)):
        at = np.flatnonzero(rows == i)
        bi, yi, wi = b[cols[at]], y[at], w[at]
        shrink = scale[i] * scaled_ridge + ridge
        scaling = free / np.maximum(wi.sum() * moment + shrink, 1e-300)
        r = yi - bi @ a[i]
        total += np.sum(wi * r * r)
        g = bi.T @ (wi * r) - shrink * (a[i] - mean[i])
        d = z = scaling * g
        rz = g @ z
        stop = tol * rz
        for step in range(steps):
            if not rz > 0 or (step and rz < stop):
                break
            image = bi.T @ (wi * (bi @ d)) + shrink * d
            along = rz / (d @ image)
            a[i] += along * d
            g = g - along * image
            z = scaling * g
            d, rz = z + (g @ z) / rz * d, g @ z
    return a, total


def product(a, b):
    """Return A B."""
    a, b = a.astype(float), b.astype(float)
    out = np.zeros((a.shape[0], b.shape[1]))
    for k in range(a.shape[1]):
        out += np.outer(a[:, k], b[k])
    return out
