"""Plain float64 loops: the one oracle of the kernels. Imports nothing of the package and compiles nothing."""

import math
from fractions import Fraction

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


# Seeded entries, in exact rational arithmetic -------------------------------------------------------------------


def philox(counter, key):
    """Return the four words of Philox4x32-10 for a counter of four words and a key of two."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def float32(x):
    """Round a rational number to float32, to nearest and to even; no subnormal numbers."""
    if x == 0:
        return x
    e = 0
    while abs(x) >= Fraction(2) ** (e + 1):
        e += 1
    while abs(x) < Fraction(2) ** e:
        e -= 1
    ulp = Fraction(2) ** (e - 23)
    return round(x / ulp) * ulp


def polynomial(x, coefficients):
    """Evaluate by Horner's rule, lowest coefficient first: each step a product and a sum rounded once."""
    total = coefficients[-1]
    for c in coefficients[-2::-1]:
        total = float32(total * x + c)
    return total


LOG, SIN, COS, EXPONENT = (
    [Fraction(float.fromhex(h)) for h in row.split()]
    for row in (
        "-0x1.fffffcp+0 0x1.000482p+0 -0x1.53e012p-1 0x1.16536p-1 -0x1.49734ep-4 0x1.8f2fd8p+0 0x1.12e6bcp+1 "
        "0x1.2e49ep+1",
        "0x1.921fb6p+1 -0x1.4abbeep+2 0x1.466ee4p+1 -0x1.32e03cp-1 0x1.466de4p-4",
        "0x1p+0 -0x1.3bd3bp+2 0x1.03bd9ap+2 -0x1.550206p+0 0x1.c29256p-3",
        "-0x1.62e43p-23",
    )
)


def normal_pair(w, v):
    """Return the two samples of ``gauss-v1`` for a pair of words."""
    u = Fraction(2 * (w >> 9) + 1, 2**24)
    e = 0
    while u * Fraction(2) ** -e < Fraction(1, 2):
        e -= 1
    f = u * Fraction(2) ** -e - 1
    square = float32(2**23 * e * EXPONENT[0] + float32(f * polynomial(f, LOG)))
    # The root of a float32 in float64, rounded once more, is the rounded root: float64 has twice the digits and two.
    radius = float32(Fraction(math.sqrt(square)))
    t = Fraction(v >> 9 | 1, 2**23) - Fraction(1, 2)
    z = float32(t * t)
    sine, cosine = float32(t * polynomial(z, SIN)), polynomial(z, COS)
    return float(float32(radius * sine)), float(float32(radius * cosine)) * (-1 if v & 1 else 1)


def seeded_entries(seed, problem, row, columns, ensemble):
    """Return the first ``columns`` entries of one row."""
    key, out = (seed & 0xFFFFFFFF, seed >> 32), []
    while len(out) < columns:
        if ensemble == "gaussian":
            w = philox((len(out) // 4, 0, row, problem), key)
            out += [*normal_pair(w[0], w[1]), *normal_pair(w[2], w[3])]
        else:
            w = philox((len(out) // 128, 0, row, problem), key)
            out += [-1.0 if w[k // 32] >> k % 32 & 1 else 1.0 for k in range(128)]
    return np.array(out[:columns])


def two_loop(pairs, g, base):
    """Return H g of BFGS by the two-loop recursion; ``pairs`` are (s, y), oldest first, none means base I."""
    q, alphas = g.astype(float).copy(), []
    for s, y in reversed(pairs):
        alphas.append(np.dot(s, q) / np.dot(s, y))
        q -= alphas[-1] * y
    q *= base if not pairs else np.dot(*pairs[-1]) / np.dot(pairs[-1][1], pairs[-1][1])
    for s, y in pairs:
        q += (alphas.pop() - np.dot(y, q) / np.dot(s, y)) * s
    return q


def pair_moments(x, y, rows, cols, row_counts, a, e, column_counts, b, f):
    """Return x_i . y_j and sum_h (x_ih^2 + V_ih) W_jh + V_ih y_jh^2 at each pair."""
    means, spreads = np.zeros(len(rows)), np.zeros(len(rows))
    for k, (i, j) in enumerate(zip(rows, cols)):
        for h in range(x.shape[1]):
            p, q = float(x[i, h]), float(y[j, h])
            v = 1 / (float(row_counts[i]) * float(a[h]) + float(e[h]))
            w = 1 / (float(column_counts[j]) * float(b[h]) + float(f[h]))
            means[k] += p * q
            spreads[k] += (p * p + v) * w + v * q * q
    return means, spreads
