"""Bands from plain NumPy: the experiments in float64 with numpy alone, where no paper prints a number for the setting.

    python -m bench.papers.plain            # all, into bands.json
    python -m bench.papers.plain t1 t5

A quantity's band is fixed by a rule before fastdmf is run: from the smallest of the seeds over a factor to the largest
times it, 1.5 for errors and norms, 1.1 for counts and effective ranks; below 1e-6 an error's band starts at zero. The
instances are drawn here, by other code and from other seeds than those of the experiments. A key's docstring is
kept beside its values as its settings.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

BANDS = Path(__file__).parent / "bands.json"
FACTORS = {"error": 1.5, "count": 1.1}


def low_rank(rng, n, rank):
    """Return U V^T with Frobenius norm n."""
    w = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    return w * n / np.sqrt(np.sum(w * w))


def effective_rank(w):
    """Return exp of the entropy of the singular values."""
    s = np.linalg.svd(w, compute_uv=False)
    p = s[s > 0] / s.sum()
    return np.exp(-np.sum(p * np.log(p)))


def gradients(factors, g_of):
    """Return the product, its loss, and the gradient of every factor; ``g_of`` maps W to (loss, G)."""
    products = [factors[0]]
    for w in factors[1:]:
        products.append(w @ products[-1])
    loss, back = g_of(products[-1])
    out = [None] * len(factors)
    for j in range(len(factors) - 1, 0, -1):
        out[j] = back @ products[j - 1].T
        back = factors[j].T @ back
    out[0] = back
    return products[-1], loss, out


def mask_loss(mask, truth):
    """Return W -> (mse, its gradient) over the entries of a 0/1 mask."""
    count = mask.sum()

    def g_of(w):
        r = mask * (w - truth)
        return np.sum(r * r) / count, 2 / count * r

    return g_of


def linear_loss(a, y):
    """Return W -> (mse, its gradient) for measurements as the rows of ``a``."""

    def g_of(w):
        r = a @ w.ravel() - y
        return r @ r / len(y), (2 / len(y) * (r @ a)).reshape(w.shape)

    return g_of


def group_rmsprop(factors, g_of, target=1e-6, lr=1e-3, beta=0.99, eps=1e-4):
    """Run the rule of Arora et al. to the loss ``target``; return (W, iterations)."""
    square, t = 0.0, 0
    while True:
        w, loss, grads = gradients(factors, g_of)
        if loss <= target or t >= 400_000:
            return w, t
        t += 1
        square = beta * square + (1 - beta) * sum(np.sum(g * g) for g in grads)
        step = lr / (np.sqrt(square / (1 - beta**t)) + eps)
        factors = [f - step * g for f, g in zip(factors, grads)]


def gaussian_start(rng, n, depth, alpha):
    """Return Gaussian factors with E ||W||_F^2 = alpha^2 n."""
    return [rng.standard_normal((n, n)) * alpha ** (1 / depth) / np.sqrt(n) for _ in range(depth)]


def completion(cases, n, rank, count, seeds=3):
    """Run (depth, alpha) cases on fresh completion instances; return quantities."""
    out = {}
    for depth, alpha, name in cases:
        for seed in range(seeds):
            rng = np.random.default_rng([11, n, count, seed])
            truth = low_rank(rng, n, rank)
            mask = np.zeros(n * n)
            mask[rng.permutation(n * n)[:count]] = 1
            start = gaussian_start(rng, n, depth, alpha)
            w, steps = group_rmsprop(start, mask_loss(mask.reshape(n, n), truth))
            error = np.sum((w - truth) ** 2) / np.sum(truth**2)
            found = {"error": error, "effective_rank": effective_rank(w), "iterations": steps}
            found["nuclear_norm"] = np.linalg.norm(w, "nuc") / np.linalg.norm(truth, "nuc")
            for key, value in found.items():
                kind = "error" if key == "error" else "count"
                out.setdefault(f"{name} {key}", (kind, []))[1].append(value)
    return out


def t1():
    """Completion: n = 100, rank 5, ||W*||_F = n, 2000 entries, alpha 1e-3, GroupRMSprop to mse 1e-6; 3 instances."""
    return completion([(d, 1e-3, f"depth {d}") for d in (2, 3, 4)], 100, 5, 2000)


def t1_quick():
    """t1 with n = 50, rank 3, 900 entries."""
    return completion([(d, 1e-3, f"depth {d}") for d in (2, 3)], 50, 3, 900)


def t2_quick():
    """t1_quick with 1600 entries."""
    return completion([(d, 1e-3, f"depth {d}") for d in (2, 3)], 50, 3, 1600)


def t3():
    """t1, depth 2, for four alphas; nuclear norms are shares of the truth's."""
    return completion([(2, a, f"depth 2 alpha {a:g}") for a in (1e-3, 1e-4, 1e-5, 1e-6)], 100, 5, 2000)


def t3_quick():
    """t1_quick for two alphas."""
    return completion([(d, a, f"depth {d} alpha {a:g}") for d in (2, 3) for a in (1e-2, 1e-4)], 50, 3, 900)


def t4_quick():
    """Sensing: n = 30, rank 2, 400 measurements, entries N(0, 1/n^2), the rule of t1; 3 instances."""
    out, n, count = {}, 30, 400
    for depth, alpha in ((2, 1e-3), (2, 1e-5), (3, 1e-3)):
        for seed in range(3):
            rng = np.random.default_rng([14, seed])
            a = rng.standard_normal((count, n * n)) / n
            truth = low_rank(rng, n, 2)
            w, _ = group_rmsprop(gaussian_start(rng, n, depth, alpha), linear_loss(a, a @ truth.ravel()))
            error = np.sum((w - truth) ** 2) / np.sum(truth**2)
            out.setdefault(f"depth {depth} alpha {alpha:g} error", ("error", []))[1].append(error)
    return out


def dynamics(n, rank, count, steps, seeds):
    """Follow gradient descent, lr 0.1, from the identity; see the experiment for the quantities."""
    out = {}
    for depth in (1, 2, 3):
        for seed in range(seeds):
            rng = np.random.default_rng([15, n, seed])
            truth = low_rank(rng, n, rank)
            mask = np.zeros(n * n)
            mask[rng.permutation(n * n)[:count]] = 1
            g_of = mask_loss(mask.reshape(n, n), truth)
            factors = [1e-3 ** (1 / depth) * np.eye(n) for _ in range(depth)]
            takeoff, best = np.nan, np.inf
            for t in range(steps[depth] + 1):
                w, _, grads = gradients(factors, g_of)
                if t % 100 == 0:
                    s = np.linalg.svd(w, compute_uv=False)
                    takeoff = t if np.isnan(takeoff) and s[0] > 10 else takeoff
                    best = min(best, np.sum((w - truth) ** 2) / np.sum(truth**2))
                factors = [f - 0.1 * g for f, g in zip(factors, grads)]
            found = {"take-off": ("count", takeoff), "best error": ("error", best), "tail": ("error", s[rank])}
            for key, (kind, value) in found.items():
                out.setdefault(f"depth {depth} {key}", (kind, []))[1].append(value)
    return out


def t5():
    """Entries of t1, gradient descent lr 0.1 on mse, identity start 1e-3, 30,000 or 40,000 steps; 2 instances."""
    return dynamics(100, 5, 2000, {1: 30_000, 2: 40_000, 3: 40_000}, 2)


def t5_quick():
    """t5 with n = 50, rank 3, 900 entries, half the steps; 3 instances."""
    return dynamics(50, 3, 900, {1: 15_000, 2: 20_000, 3: 20_000}, 3)


def symmetric_truth(rng, d, rank):
    """Return U U^T with normalised Gaussian columns."""
    u = rng.standard_normal((d, rank))
    u /= np.linalg.norm(u, axis=0)
    return u @ u.T


def symmetric_descent(a, y, u, lr, steps):
    """Descend (1/m) sum r^2 over U U^T; return U U^T."""
    n = len(u)
    for _ in range(steps):
        r = a @ (u @ u.T).ravel() - y
        g = (r @ a).reshape(n, n)
        u = u - lr * 2 / len(y) * (g + g.T) @ u
    return u @ u.T


def t7_quick():
    """Sensing by U U^T from alpha I: d = 40, rank 2, m = 5 d r, lr 0.0025 on mse, 3000 steps; 3 instances."""
    out, d, rank = {}, 40, 2
    for alpha in (1e-1, 1e-2, 1e-3):
        for seed in range(3):
            rng = np.random.default_rng([17, seed])
            truth = symmetric_truth(rng, d, rank)
            a = rng.standard_normal((5 * d * rank, d * d))
            x = symmetric_descent(a, a @ truth.ravel(), alpha * np.eye(d), 0.0025, 3000)
            error = np.linalg.norm(x - truth) / np.linalg.norm(truth)
            out.setdefault(f"alpha {alpha:g} test", ("error", []))[1].append(error)
    return out


def cone_descent(a, y, lr, steps, tol, x, accelerated=False):
    """Projected gradient on the PSD cone for (1/m) sum r^2."""
    n = len(x)
    point, momentum, best = x, 1.0, np.inf
    for _ in range(steps):
        r = a @ point.ravel() - y
        loss = r @ r
        if loss <= tol**2 * (y @ y):
            break
        if accelerated and loss > best:
            point, momentum, best = x, 1.0, np.inf
            continue
        best = loss
        g = (r @ a).reshape(n, n)
        values, vectors = np.linalg.eigh(point - lr / len(y) * (g + g.T))
        new = (vectors * np.maximum(values, 0)) @ vectors.T
        after = (1 + np.sqrt(1 + 4 * momentum**2)) / 2 if accelerated else 1.0
        point, x, momentum = new + (momentum - 1) / after * (new - x), new, after
    return point


def t8_quick():
    """Projected gradient and U U^T from 0.01 I: d = 30, rank 1, lr 0.0025 on mse, 3000 steps; 3 instances."""
    out, d = {}, 30
    for multiple in (5, 15, 25):
        for seed in range(3):
            rng = np.random.default_rng([18, seed])
            truth = symmetric_truth(rng, d, 1)
            a = rng.standard_normal((multiple * d, d * d))
            y = a @ truth.ravel()
            both = {
                "cone": cone_descent(a, y, 0.0025, 3000, 1e-3, np.zeros((d, d))),
                "factored": symmetric_descent(a, y, 0.01 * np.eye(d), 0.0025, 3000),
            }
            for name, x in both.items():
                error = np.linalg.norm(x - truth) / np.linalg.norm(truth)
                out.setdefault(f"m {multiple}d {name}", ("error", []))[1].append(error)
    return out


def t9():
    """Accelerated projected gradient: n = 20, step 1/L, from a random PSD start, 20,000 steps; 9 instances."""
    out, n = {}, 20
    cases = [(1, 115, "gaussian"), (1, 127, "gaussian"), (3, 134, "gaussian"), (3, 147, "gaussian")]
    for rank, count, kind in [*cases, (1, 50, "rank one")]:
        for seed in range(9):
            rng = np.random.default_rng([19, rank, count, seed])
            u = rng.standard_normal((n, rank))
            truth = u @ u.T / np.sum(u * u)
            if kind == "gaussian":
                # Symmetric parts: rotation invariant, as the statistical dimension supposes.
                g = rng.standard_normal((count, n, n))
                a = ((g + g.transpose(0, 2, 1)) / 2).reshape(count, -1)
            else:
                v = rng.standard_normal((count, n))
                a = np.einsum("mi,mj->mij", v, v).reshape(count, -1)
            v = rng.standard_normal((n, n))
            lr = count / (2 * np.linalg.norm(a, 2) ** 2)
            x = cone_descent(a, a @ truth.ravel(), lr, 20_000, 1e-12, v @ v.T / np.sum(v * v), accelerated=True)
            error = np.linalg.norm(x - truth) / np.linalg.norm(truth)
            out.setdefault(f"{kind} r {rank} m {count}", ("error", []))[1].append(error)
    return out


def t10():
    """4 x 4, R = 3, sse, lr 5e-3 (depth 2, U U^T) or 2e-3 (depth 3), to a relative loss of 1e-12; 5 starts."""
    mask = np.zeros((4, 4))
    y = np.zeros((4, 4))
    for i, j, value in ((0, 2, 1.0), (0, 3, 3.0), (1, 2, 3.0)):
        mask[i, j] = mask[j, i] = 1
        y[i, j] = y[j, i] = value
    out = {}
    cases = [(2, a) for a in (1e-1, 1e-4, 1e-8, 1e-12)] + [(3, a) for a in (1e-1, 1e-2, 1e-3)]
    for depth, alpha in cases:
        for seed in range(5):
            u = np.random.default_rng([20, seed]).standard_normal((4, 4)) / 2 * np.sqrt(alpha)
            if depth == 2:
                for _ in range(200_000):
                    g = 2 * mask * (u @ u.T - y)
                    u = u - 5e-3 * (g + g.T) @ u
                    if np.sum(g * g) < 4e-12 * 38:
                        break
                w = u @ u.T
            else:
                values, q = np.linalg.eigh(u @ u.T)
                root = (q * np.maximum(values, 0) ** (1 / 3)) @ q.T
                factors = [root] * 3
                for _ in range(200_000):
                    w, loss, grads = gradients(factors, lambda w: (np.sum((mask * (w - y)) ** 2), 2 * mask * (w - y)))
                    if loss < 1e-12 * 38:
                        break
                    factors = [f - 2e-3 * g for f, g in zip(factors, grads)]
            norm = np.linalg.norm(w, "nuc")
            out.setdefault(f"depth {depth} alpha {alpha:g} nuclear norm", ("count", []))[1].append(norm)
    return out


def determinant(alpha, levels, seeds):
    """Return |w_11| where the loss passes each level, from a balanced start."""
    out = {}
    observed, y = np.array([[0, 1], [1, 1]]), np.array([[0, 1], [1, 0]])
    for seed in range(seeds):
        rng = np.random.default_rng([21, seed])
        w = rng.standard_normal((2, 2))
        while np.linalg.det(w) <= 0:
            w = rng.standard_normal((2, 2))
        u, s, vt = np.linalg.svd(alpha * w)
        root = np.diag(s ** (1 / 3))
        factors, left = [root @ vt, root, u @ root], list(levels)
        while left:
            w, loss, grads = gradients(factors, lambda w: (np.sum((observed * (w - y)) ** 2) / 2, observed * (w - y)))
            if loss <= left[0]:
                out.setdefault(f"entry at loss {left.pop(0):g}", ("error", []))[1].append(abs(w[0, 0]))
            factors = [f - 3e-3 * g for f, g in zip(factors, grads)]
    return out


def t11():
    """2 x 2, depth 3, balanced start of positive determinant, alpha 1e-6, lr 3e-3 on sse/2, to 1e-3; 2 starts."""
    return determinant(1e-6, (1e-1, 1e-2, 1e-3), 2)


def t11_quick():
    """t11 with alpha 1e-3, to 1e-2; 5 starts."""
    return determinant(1e-3, (1e-1, 1e-2), 5)


def t14():
    """W* = diag(12, 6, 4, 3), n = 50, m = 1000, identity start 1e-4, lr 1e-3 on mse, to 0.01; 3 instances."""
    out, n = {}, 50
    truth = np.zeros((n, n))
    truth[range(4), range(4)] = 12, 6, 4, 3
    for depth in (1, 2, 3):
        for seed in range(3):
            a = np.random.default_rng([24, seed]).standard_normal((1000, n * n))
            g_of = linear_loss(a, a @ truth.ravel())
            factors, loss, t, halves = [1e-4 ** (1 / depth) * np.eye(n) for _ in range(depth)], np.inf, 0, []
            while loss > 0.01:
                w, loss, grads = gradients(factors, g_of)
                if depth > 1 and t % 10 == 0 and len(halves) < 4:
                    s = np.linalg.svd(w, compute_uv=False)
                    halves += [t] * (s[:4] > truth.diagonal()[:4] / 2)[len(halves) :].sum()
                factors, t = [f - 1e-3 * g for f, g in zip(factors, grads)], t + 1
            error = np.sum((w - truth) ** 2) / np.sum(truth**2)
            out.setdefault(f"depth {depth} error", ("error", []))[1].append(error)
            for mode, half in enumerate(halves):
                out.setdefault(f"depth {depth} half height of mode {mode + 1}", ("count", []))[1].append(half)
    return out


def upper_gaussian(rng, count, n):
    """Return symmetric matrices as rows, standard normal on and above the diagonal."""
    upper = np.triu(rng.standard_normal((count, n, n)))
    return (upper + np.triu(upper, 1).transpose(0, 2, 1)).reshape(count, -1)


def t15():
    """U U^T of width k: d = 20, spectrum 1, .9, .8, m = 200, spectral start, F - (0.1/m) sum r_i A_i F; 2 instances."""
    out, d, m = {}, 20, 200
    for seed in range(2):
        rng = np.random.default_rng([25, seed])
        q = np.linalg.qr(rng.standard_normal((d, 3)))[0]
        truth = (q * [1, 0.9, 0.8]) @ q.T
        a = upper_gaussian(rng, m, d)
        y = a @ truth.ravel()
        values, vectors = np.linalg.eigh((y @ a).reshape(d, d) / (2 * m))
        for width, steps in ((3, (300, 1000)), (4, (1000, 10_000, 100_000))):
            f = vectors[:, -width:] * np.sqrt(np.maximum(values[-width:], 0))
            for t in range(steps[-1] + 1):
                x = f @ f.T
                if t in steps:
                    out.setdefault(f"k {width} step {t}", ("error", []))[1].append(np.linalg.norm(x - truth, 2))
                f = f - 0.1 / m * ((a @ x.ravel() - y) @ a).reshape(d, d) @ f
    return out


def t16():
    """PrecGD: n = 100, r* = 2, r = 4, m = 1200, step 1e-5 on f = sum r^2, damping sqrt(f/m), near start; 2 seeds."""
    out, n, m = {}, 100, 1200
    for seed in range(2):
        rng = np.random.default_rng([26, seed])
        a = rng.standard_normal((m, n * n))
        for kappa in (1, 5):
            z = np.linalg.qr(rng.standard_normal((n, 2)))[0] * np.sqrt([1, 1 / kappa])
            truth, start = z @ z.T, np.hstack([z, np.zeros((n, 2))]) + 1e-2 * rng.standard_normal((n, 4))
            y = a @ truth.ravel()
            for name in ("PrecGD", "gd"):
                x, errors = start, []
                for t in range(401):
                    r = a @ (x @ x.T).ravel() - y
                    if t % 100 == 0:
                        errors.append(np.linalg.norm(x @ x.T - truth))
                    pull = (r @ a).reshape(n, n)
                    g = 2 * (pull + pull.T) @ x
                    if name == "PrecGD":
                        g = g @ np.linalg.inv(x.T @ x + np.sqrt(r @ r / m) * np.eye(4))
                    x = x - 1e-5 * g
                out.setdefault(f"kappa {kappa} {name} step 400", ("error", []))[1].append(errors[-1])
                if name == "PrecGD":
                    rate = (errors[-1] / errors[1]) ** (1 / 3)
                    out.setdefault(f"kappa {kappa} PrecGD per 100 steps", ("error", []))[1].append(rate)
    return out


def t18_quick():
    """Spectral entropy, step 1, and U U^T, step 1/4: n = 20, rank 2, trace 1, 2000 steps; 3 instances."""
    out, n, rank = {}, 20, 2
    for seed in range(3):
        rng = np.random.default_rng([28, seed])
        u = rng.standard_normal((n, rank))
        truth = u @ u.T / np.sum(u * u)
        for ratio, m in ((3, 3 * n * rank), (1, n * rank)):
            a = rng.standard_normal((m, n, n))
            a = ((a + a.transpose(0, 2, 1)) / 2).reshape(m, -1)
            y = a @ truth.ravel()
            for alpha in (1e-1, 1e-3, 1e-5):
                dual, u, apart = np.log(alpha) * np.eye(n), np.sqrt(alpha) * np.eye(n), 0.0
                for t in range(2001):
                    values, vectors = np.linalg.eigh(dual)
                    pair = (vectors * np.exp(values)) @ vectors.T, u @ u.T
                    if t % 50 == 0:
                        errors = [np.linalg.norm(x - truth) / np.linalg.norm(truth) for x in pair]
                        apart = max(apart, abs(np.log10(errors[0] / errors[1])))
                    pulls = [((a @ x.ravel() - y) @ a).reshape(n, n) / m for x in pair]
                    dual, u = dual - pulls[0], u - 0.5 * pulls[1] @ u
                case = f"m {ratio}nr alpha {alpha:g}"
                out.setdefault(f"{case} error", ("error", []))[1].append(errors[1])
                out.setdefault(f"{case} effective_rank", ("count", []))[1].append(effective_rank(pair[1]))
                out.setdefault(f"{case} decades apart", ("error", []))[1].append(apart)
                last = abs(np.log10(errors[0] / errors[1]))
                out.setdefault(f"{case} decades apart at the end", ("error", []))[1].append(last)
    return out


def t20():
    """Scalar chain of equal layers on (s - 1)^2 / 2, lr 1e-2, from s = alpha: steps to s = 0.5; no randomness."""
    out = {}
    for depth in (2, 3, 4):
        for alpha in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            w, steps = alpha ** (1 / depth), 0
            while w**depth < 0.5:
                w, steps = w - 1e-2 * (w**depth - 1) * w ** (depth - 1), steps + 1
            out[f"depth {depth} alpha {alpha:g} steps"] = "count", [steps]
    return out


def t23():
    """E = (0.6 - a b)^2 / 2 from (2.8, 3.5), time 0.1: order of the gap of descent to both flows; no randomness."""

    def flow(weight, count=20_000):
        def field(z):
            (a, b), r, q = z, z[0] * z[1] - 0.6, z @ z
            return -np.array(
                [r * b + weight * (2 * r * b * q + 2 * r * r * a), r * a + weight * (2 * r * a * q + 2 * r * r * b)]
            )

        z, h = np.array([2.8, 3.5]), 0.1 / count
        for _ in range(count):
            k1 = field(z)
            k2 = field(z + h / 2 * k1)
            k3 = field(z + h / 2 * k2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(z + h * k3))
        return z

    plain, gaps = flow(0.0), []
    for count in (40, 80, 160):
        z, h = np.array([2.8, 3.5]), 0.1 / count
        for _ in range(count):
            z = z - h * (z[0] * z[1] - 0.6) * z[::-1]
        gaps.append((np.linalg.norm(z - flow(h / 4)), np.linalg.norm(z - plain)))
    slopes = -np.diff(np.log2(gaps), axis=0)
    return {f"order {name}": ("count", list(slopes[:, k])) for k, name in enumerate(("penalised", "plain"))}


def scaled_steps(n, rank, share, seeds):
    """Count the steps of ScaledGD from the spectral start."""
    out = {}
    for kappa in (1, 5, 20):
        for seed in range(seeds):
            rng = np.random.default_rng([27, n, seed])
            u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for _ in range(2))
            truth = (u * np.linspace(1, 1 / kappa, rank)) @ v.T
            mask = rng.random((n, n)) < share
            p = mask.mean()
            left, s, right = np.linalg.svd(mask * truth / p)
            x, z = left[:, :rank] * np.sqrt(s[:rank]), right[:rank].T * np.sqrt(s[:rank])
            errors = []
            for _ in range(200):
                r = mask * (x @ z.T - truth)
                errors.append(np.linalg.norm(x @ z.T - truth) / np.linalg.norm(truth))
                x, z = (
                    x - 0.5 / p * r @ z @ np.linalg.inv(z.T @ z),
                    z - 0.5 / p * r.T @ x @ np.linalg.inv(x.T @ x),
                )
            for level in (1e-3, 1e-6, 1e-12):
                reached = np.array(errors) <= level
                steps = int(np.argmax(reached)) if reached.any() else 200
                out.setdefault(f"kappa {kappa} steps to {level:g}", ("count", []))[1].append(steps)
    return out


def t17():
    """ScaledGD: n = 1000, rank 10, p = 0.2, s linear from 1 to 1/kappa, step 0.5/p, spectral start; 2 instances."""
    return scaled_steps(1000, 10, 0.2, 2)


def t17_quick():
    """t17 with n = 400, rank 3, p = 0.3; 5 instances."""
    return scaled_steps(400, 3, 0.3, 5)


KEYS = (t1, t1_quick, t2_quick, t3, t3_quick, t4_quick, t5, t5_quick, t7_quick, t8_quick, t9, t10, t11, t11_quick)
KEYS += (t14, t15, t16, t17, t17_quick, t18_quick, t20, t23)


def limits(kind, values):
    """Return (low, high) of a band by the rule in the module's docstring."""
    low, high = min(values) / FACTORS[kind], max(values) * FACTORS[kind]
    return (0.0 if kind == "error" and min(values) < 1e-6 else low), high


def main():
    """Write the bands."""
    known = {key.__name__: key for key in KEYS}
    parser = argparse.ArgumentParser(prog="python -m bench.papers.plain", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)} (default: all)")
    names = parser.parse_args().names or list(known)
    for name in names:
        begin = time.perf_counter()
        quantities = {}
        for quantity, (kind, values) in known[name]().items():
            low, high = limits(kind, values)
            rounded = [float(f"{v:.4g}") for v in values]
            quantities[quantity] = {"values": rounded, "low": float(f"{low:.4g}"), "high": float(f"{high:.4g}")}
        kept = json.loads(BANDS.read_text())["bands"] if BANDS.exists() else {}
        kept[name] = {
            "settings": known[name].__doc__,
            "seconds": round(time.perf_counter() - begin, 1),
            "quantities": quantities,
        }
        about = {
            "command": "python -m bench.papers.plain",
            "rule": "smallest value / f to largest * f, f = 1.5 (errors, norms) or 1.1 (counts, ranks); "
            "an error below 1e-6: from 0",
            "seeds": "instances of plain.py, other than those of the experiments",
            "numpy": np.__version__,
        }
        about_key = {key: {"settings": make.__doc__} for key, make in known.items()}
        ordered = {key: about_key[key] | kept[key] for key in known if key in kept}
        BANDS.write_text(json.dumps({**about, "bands": ordered}, indent=1) + "\n")
        print(f"{name}: {kept[name]['seconds']} s", flush=True)
        for quantity, entry in quantities.items():
            print(f"  {quantity:<40} {entry['values']}")


if __name__ == "__main__":
    main()
