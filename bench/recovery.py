"""Exact recovery with the rank unknown: success against oversampling, noise, conditioning, sensing, seconds.

    python bench/recovery.py success --n 100 --rho 1.2 1.3 --seeds 50        # recover alone
    python bench/recovery.py success --n 100 --rho 1.3 1.5 2 3 --seeds 5 --peers
    python bench/recovery.py condition | noise | sensing | seconds
    python bench/recovery.py show; python bench/recovery.py figure recovery.png

Instances: W of rank 5, ||W||_F = n, and floor(rho r (2 n - r)) entries drawn uniformly among the masks that leave every
row and column at least r of them; rho is the oversampling, 1 the number of degrees of freedom. An instance is
*identifiable* when the Jacobian of (A, B) -> mask o (A B) at the truth has rank r (2 n - r), tested by the eigenvalues
of its Gram matrix up to n = 300, beyond by recovering a random tangent vector. Success: relative error < 1e-3; a false
certificate is a run that ends EXACT without it on an identifiable instance. Nobody is told the rank. (Told the rank, on
instances of this kind at n = 100 and rho 1.2, 1.3, 1.5, 2: R2RILS 2, 3, 6, 6 of 6 with 100 outer steps, GNMR in its
setting variant 0, 0, 6, 6 of 6 with 60; quoted from a study of ours, not run by this script.) Every run is kept
as a JSON line under ``bench/results`` and not repeated unless ``--again`` is given.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

import fastdmf
from fastdmf.backend import get_backend, thread_limits
from fastdmf.recovery import identified
from fastdmf.tangent import LowRank, Measurements, gauss_newton

RESULTS = Path(__file__).parent / "results" / "recovery.jsonl"
RANK = 5


def instance(n, rho, seed, rank=RANK, condition=None):
    """Return (W, rows, cols); ``condition`` makes the spectrum geometric with that ratio of ends."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((n, rank)), rng.standard_normal((rank, n))
    if condition is not None:
        left, right = np.linalg.qr(left)[0], np.linalg.qr(right.T)[0].T
        left = left * condition ** -np.linspace(0, 1, rank)
    truth = left @ right
    truth *= n / np.linalg.norm(truth)
    m = int(rho * rank * (2 * n - rank))
    while True:
        rows, cols = np.divmod(np.sort(rng.choice(n * n, m, replace=False)), n)
        if min(np.bincount(rows, minlength=n).min(), np.bincount(cols, minlength=n).min()) >= rank:
            return truth, rows, cols


def low_rank(truth, rank=RANK):
    """Return the truth as a LowRank."""
    u, s, vt = np.linalg.svd(truth, full_matrices=False)
    return LowRank(u[:, :rank], s[:rank], vt[:rank].T)


def identifiable(truth, rows, cols, rank=RANK):
    """Return whether the Jacobian at the truth has full rank."""
    n1, n2 = truth.shape
    x = low_rank(truth, rank)
    if n1 > 300:
        mask = fastdmf.EntryMask(rows, cols, truth.shape)
        data = Measurements(mask, truth[rows, cols], None, get_backend())
        return identified(data, x, np.random.default_rng(0))
    m, r = len(rows), np.arange(rank)
    places = np.hstack([rows[:, None] * rank + r, n1 * rank + cols[:, None] * rank + r])
    values = np.hstack([x.v[cols], x.u[rows]])
    jacobian = csr_matrix((values.ravel(), places.ravel(), np.arange(m + 1) * 2 * rank), (m, rank * (n1 + n2)))
    eigenvalues = np.linalg.eigvalsh((jacobian.T @ jacobian).toarray())
    return bool(eigenvalues[rank**2] > 1e-13 * eigenvalues[-1])  # rank^2 directions leave A B as it is


def compiled_by():
    """Return a small instance that compiles what a run needs."""
    truth, rows, cols = instance(30, 2.0, 0, rank=2)
    return rows, cols, truth[rows, cols], truth.shape


def error(x, truth):
    """Return ||X - W||_F / ||W||_F."""
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))


# ---------------------------------------------------------------- methods: (rows, cols, y, shape, seed) -> X, note


def by_recover(rows, cols, y, shape, seed):
    mask = fastdmf.EntryMask(rows, cols, shape)
    solution = fastdmf.recover(mask, y, noise=False, random_state=seed, on_failure="ignore")
    return solution.matrix(), solution.status.name


def by_descent(rows, cols, y, shape, seed):
    mask = fastdmf.EntryMask(rows, cols, shape)
    solution = fastdmf.solve(mask, y, tol=1e-12, max_iter=3000, random_state=seed, on_failure="ignore")
    return solution.matrix(), solution.status.name


def by_nuclear_norm(rows, cols, y, shape, seed):
    """Minimise ||X||_* subject to the entries by ADMM, 1000 rounds."""
    x = np.zeros(shape)
    x[rows, cols] = y
    step = 5 / np.linalg.norm(x, 2)
    z, dual = x.copy(), np.zeros(shape)
    for _ in range(1000):
        u, s, vt = np.linalg.svd(z - dual, full_matrices=False)
        x = (u * np.maximum(s - 1 / step, 0)) @ vt
        z = x + dual
        z[rows, cols] = y
        change = x - z
        dual += change
        if np.linalg.norm(change) < 1e-7 * np.linalg.norm(z):
            break
    return x, "ADMM"


def by_soft_impute(rows, cols, y, shape, seed):
    """Soft-impute along 30 falling lambdas to 1e-4 of the largest, 100 rounds each."""
    seen = np.zeros(shape, bool)
    seen[rows, cols] = True
    target = np.zeros(shape)
    target[rows, cols] = y
    z, top = np.zeros(shape), np.linalg.norm(target, 2)
    for weight in top * np.geomspace(0.5, 1e-4, 30):
        for _ in range(100):
            u, s, vt = np.linalg.svd(np.where(seen, target, z), full_matrices=False)
            new = (u * np.maximum(s - weight, 0)) @ vt
            change = np.linalg.norm(new - z) / max(np.linalg.norm(new), 1e-300)
            z = new
            if change < 1e-5:
                break
    return z, "path"


def by_pursuit(rows, cols, y, shape, seed):
    """Greedy rank-one pursuit: add the residual's top singular pair, then 20 rounds of alternating least squares."""
    a, b = np.zeros((shape[0], 0)), np.zeros((shape[1], 0))
    order = np.argsort(cols, kind="stable")
    sides = [
        (rows, cols, np.searchsorted(rows, np.arange(shape[0] + 1)), y),
        (cols[order], rows[order], np.searchsorted(cols[order], np.arange(shape[1] + 1)), y[order]),
    ]
    most = max(r for r in range(1, min(shape)) if r * (sum(shape) - r) < len(y))
    for _ in range(most):
        residual = np.zeros(shape)
        residual[rows, cols] = y - np.einsum("kh,kh->k", a[rows], b[cols])
        u, s, vt = np.linalg.svd(residual)
        a, b = np.c_[a, u[:, 0] * np.sqrt(s[0])], np.c_[b, vt[0] * np.sqrt(s[0])]
        for _ in range(20):
            for (_, other, ptr, values), x, z in zip(sides, (a, b), (b, a)):
                for i in range(len(x)):
                    at = slice(ptr[i], ptr[i + 1])
                    x[i] = np.linalg.lstsq(z[other[at]], values[at], rcond=None)[0]
        if np.linalg.norm(y - np.einsum("kh,kh->k", a[rows], b[cols])) < 1e-6 * np.linalg.norm(y):
            break
    return a @ b.T, f"rank {a.shape[1]}"


METHODS = {
    "recover": by_recover,
    "descent, depth 3": by_descent,
    "nuclear norm": by_nuclear_norm,
    "soft-impute": by_soft_impute,
    "rank-one pursuit": by_pursuit,
}


# ---------------------------------------------------------------- panels


def kept(path):
    """Return the kept lines by what was run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {json.dumps(line["run"], sort_keys=True): line for line in lines}


def measure(args, run, work):
    """Do one run unless it is kept, keep and print it."""
    name = json.dumps(run, sort_keys=True)
    lines = kept(args.keep)
    if name not in lines or args.again:
        lines[name] = {"run": run, **work()}
        args.keep.parent.mkdir(exist_ok=True)
        args.keep.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
        print(json.dumps(lines[name]), flush=True)
    return lines[name]


def solved(method, truth, rows, cols, seed):
    """Run a method; return error, CPU seconds and what it says."""
    begin = time.process_time()
    x, note = METHODS[method](rows, cols, truth[rows, cols], truth.shape, seed)
    return {"error": error(x, truth), "seconds": time.process_time() - begin, "says": note}


def success(args):
    """Success against oversampling."""
    for n in args.n:
        for rho in args.rho:
            for seed in range(args.seeds):
                case = instance(n, rho, seed)
                for method in METHODS if args.peers else ("recover",):
                    run = {"panel": "success", "n": n, "rho": rho, "seed": seed, "method": method}

                    def work(case=case, method=method, seed=seed):
                        return {**solved(method, *case, seed), "identifiable": identifiable(*case)}

                    measure(args, run, work)


def condition(args):
    """Success with a geometric spectrum."""
    for number in (1, 10, 100):
        for rho in (1.3, 1.5, 2.0):
            for seed in range(args.seeds):
                case = instance(100, rho, seed, condition=number)
                run = {"panel": "condition", "n": 100, "rho": rho, "seed": seed, "condition": number}

                def work(case=case, seed=seed):
                    return {**solved("recover", *case, seed), "identifiable": identifiable(*case)}

                measure(args, run, work)


def noise(args):
    """5 % noise: errors on the cells outside the data, beside the oracle and the early-stopped descent."""
    for rho in (1.5, 2.0, 3.0):
        for seed in range(args.seeds):

            def work(rho=rho, seed=seed):
                truth, rows, cols = instance(100, rho, seed)
                y = truth[rows, cols] + 0.05 * np.random.default_rng([seed, 1]).standard_normal(len(rows))
                unseen = np.ones(truth.shape, bool)
                unseen[rows, cols] = False
                mask = fastdmf.EntryMask(rows, cols, truth.shape)
                begin = time.process_time()
                solution = fastdmf.recover(mask, y, random_state=seed, on_failure="ignore")
                seconds = time.process_time() - begin
                oracle, _ = gauss_newton(
                    Measurements(mask, y, None, get_backend()), low_rank(truth), 60, 1e-12, 1000, damping=1e-3
                )
                begin = time.process_time()
                descent = fastdmf.solve(mask, y, validation=0.05, random_state=seed, on_failure="ignore")
                found = {
                    "recover": solution.matrix(),
                    "oracle": (oracle.u * oracle.s) @ oracle.v.T,
                    "descent": descent.matrix(),
                }
                errors = {f"error_{k}": error(x[unseen], truth[unseen]) for k, x in found.items()}
                costs = {"seconds": seconds, "seconds_descent": time.process_time() - begin}
                return {**errors, **costs, "says": solution.status.name, "rank": solution.rank}

            measure(args, {"panel": "noise", "rho": rho, "seed": seed}, work)


def sensing(args):
    """Dense and rank-one measurements; dense ones also whitened, (A A^T)^-1 in the data term."""
    cases = [("dense", 40, 2), ("dense, whitened", 40, 2), ("rank one", 40, 2), ("dense", 100, 5)]
    for kind, n, rank in cases:
        for rho in (1.1, 1.3, 1.5, 2.0) if n == 40 else (2000 / 975,):
            for seed in range(min(args.seeds, 10) if n == 40 else 1):

                def work(kind=kind, n=n, rank=rank, rho=rho, seed=seed):
                    rng = np.random.default_rng(seed)
                    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
                    truth *= n / np.linalg.norm(truth)
                    m = int(rho * rank * (2 * n - rank))
                    if kind == "rank one":
                        operator = fastdmf.RankOne(rng.standard_normal((m, n)), rng.standard_normal((m, n)))
                    else:
                        a = rng.standard_normal((m, n * n)) / n
                        if "whitened" in kind:
                            a = np.linalg.solve(np.linalg.cholesky(a @ a.T), a)
                        operator = fastdmf.GaussianDense(a.reshape(m, n, n))
                    y = operator.apply(truth)
                    begin = time.process_time()
                    solution = fastdmf.recover(operator, y, noise=False, random_state=seed, on_failure="ignore")
                    middle = time.process_time()
                    descent = fastdmf.solve(operator, y, random_state=seed, on_failure="ignore")
                    return {
                        "error": error(solution.matrix(), truth),
                        "seconds": middle - begin,
                        "evaluations": solution.n_eval,
                        "says": solution.status.name,
                        "error_descent": error(descent.matrix(), truth),
                        "seconds_descent": time.process_time() - middle,
                        "evaluations_descent": descent.n_eval,
                    }

                run = {"panel": "sensing", "kind": kind, "n": n, "rank": rank, "rho": round(rho, 3), "seed": seed}
                measure(args, run, work)


def seconds(args):
    """The paper's completion (100 x 100, rank 5, 2000 entries) beside plain NumPy running the paper's rule."""
    import completion

    from fastdmf.chain import Layout, initial_factors

    for seed in range(min(args.seeds, 3)):

        def work(seed=seed):
            truth, rows, cols = completion.instance(seed)
            start = initial_factors(Layout((100,) * 4), "gaussian", completion.ALPHA, seed + 1000)
            with thread_limits(1):  # BLAS threads that wait for one another would count
                begin = time.process_time()
                evaluations, product = completion.plain_numpy(truth, rows, cols, start)
                numpy_seconds = time.process_time() - begin
            by_recover(rows, cols, truth[rows, cols], truth.shape, seed)
            result = [solved("recover", truth, rows, cols, seed) for _ in range(5)]
            return {
                **result[0],
                "seconds": float(np.median([r["seconds"] for r in result])),
                "seconds_numpy": numpy_seconds,
                "evaluations_numpy": evaluations,
                "error_numpy": error(product, truth),
            }

        measure(args, {"panel": "seconds", "seed": seed}, work)


# ---------------------------------------------------------------- tables and figure


def show(args):
    """Print a table a panel."""
    panels = {}
    for line in kept(args.keep).values():
        panels.setdefault(line["run"]["panel"], []).append(line)

    def grouped(lines, *keys):
        groups = {}
        for line in lines:
            groups.setdefault(tuple(line["run"][k] for k in keys), []).append(line)
        return sorted(groups.items())

    certificates = [line for name in ("success", "condition") for line in panels.get(name, ()) if line["identifiable"]]
    certificates = [line for line in certificates if line["says"] == "EXACT"]
    false = sum(line["error"] >= 1e-3 for line in certificates)
    print(f"false certificates on identifiable instances: {false} of {len(certificates)}\n")
    for panel, keys in (("success", ("method", "n", "rho")), ("condition", ("condition", "rho"))):
        print(f"| {' | '.join(keys)} | recovered / identifiable (run) | largest error where recovered | CPU s |")
        print("|---" * (len(keys) + 3) + "|")
        for group, lines in grouped(panels.get(panel, ()), *keys):
            able = [line for line in lines if line["identifiable"]]
            errors = [line["error"] for line in able if line["error"] < 1e-3]
            print(
                f"| {' | '.join(map(str, group))} | {len(errors)} / {len(able)} ({len(lines)}) | "
                f"{max(errors, default=np.nan):.0e} | {np.median([line['seconds'] for line in lines]):.2f} |"
            )
        print()
    print("| noise 5 %, rho | error / oracle, median | error / descent, median | worst | CPU s |\n" + "|---" * 5 + "|")
    for (rho,), lines in grouped(panels.get("noise", ()), "rho"):
        oracle, descent = (
            [line["error_recover"] / line[f"error_{other}"] for line in lines] for other in ("oracle", "descent")
        )
        cpu = np.median([line["seconds"] for line in lines])
        medians = f"{np.median(oracle):.3f} | {np.median(descent):.3f} | {max(descent):.3f}"
        print(f"| {rho} ({len(lines)}) | {medians} | {cpu:.1f} |")
    print("\n| sensing | n | rho | recovered | largest error | CPU s | descent: error | CPU s |\n" + "|---" * 8 + "|")
    for group, lines in grouped(panels.get("sensing", ()), "kind", "n", "rho"):
        columns = {k: [line[k] for line in lines] for k in ("error", "seconds", "error_descent", "seconds_descent")}
        print(
            f"| {' | '.join(map(str, group))} | {sum(e < 1e-3 for e in columns['error'])} / {len(lines)} | "
            f"{max(columns['error']):.0e} | {np.median(columns['seconds']):.2f} | "
            f"{np.median(columns['error_descent']):.0e} | {np.median(columns['seconds_descent']):.2f} |"
        )
    lines = panels.get("seconds", ())
    if lines:
        ours, theirs = (np.median([line[k] for line in lines]) for k in ("seconds", "seconds_numpy"))
        print(f"\npaper's completion: {ours:.3f} s, plain NumPy {theirs:.1f} s: {theirs / ours:.0f} times")


def figure(args):
    """Draw success against oversampling, one curve a method and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {}
    for line in kept(args.keep).values():
        run = line["run"]
        if run["panel"] == "success" and line["identifiable"]:
            label = f"{run['method']}, n = {run['n']}"
            curves.setdefault(label, {}).setdefault(run["rho"], []).append(line["error"] < 1e-3)
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for k, (label, points) in enumerate(sorted(curves.items(), key=lambda item: "recover" not in item[0])):
        rho = sorted(points)
        share = [100 * np.mean(points[x]) for x in rho]
        if label.startswith("recover"):
            ax.plot(rho, share, "o-", lw=2, label=label)
        else:  # many lie on each other: hollow markers of growing size
            ax.plot(rho, share, "s^vDph"[k % 6] + "--", lw=1, ms=3 + 2 * k, mfc="none", label=label)
    ax.set(xlabel="entries a degree of freedom", ylabel="recovered, % of identifiable", ylim=(-4, 104))
    ax.set_title("100 x 100 and larger, rank 5, nobody is told the rank", fontsize=10)
    ax.legend(fontsize=7)
    fig.savefig(args.path, dpi=150)


def main():
    """Run a panel, print the tables, or draw."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    panels = {f.__name__: f for f in (success, condition, noise, sensing, seconds, show, figure)}
    parser.add_argument("panel", choices=panels)
    parser.add_argument("path", nargs="?", default="recovery.png", help="of the figure")
    parser.add_argument("--n", type=int, nargs="+", default=[100])
    parser.add_argument("--rho", type=float, nargs="+", default=[1.2, 1.3])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--keep", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.panel not in ("show", "figure"):
        by_recover(*compiled_by(), 0)  # before a clock starts
    panels[args.panel](args)


if __name__ == "__main__":
    main()
