"""DMFCompleter at a million entries: errors, wall and CPU seconds of everything it does; the pair kernel beside NumPy.

    python bench/completer.py                           # generated ratings, 20,000 x 5,000
    python bench/completer.py --data ../shared/data     # MovieLens-1M besides, the split of bench/variational.py
    python bench/completer.py --pairs                   # the kernel: ns a pair, beside einsum, torch and copying

A tenth of the entries is hidden. ``fold_in`` takes the entries of every tenth row to a model fitted without those rows,
and is scored on those rows' hidden entries, beside the model of all rows; ``partial_fit`` adds the last tenth, and
half, of the training entries. Medians of three runs after one that compiles.
"""

import argparse
import copy
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastdmf import DMFCompleter
from fastdmf.kernels import cpu

REPEATS = 3


def movielens(folder):
    """Return (training pairs, values, test pairs, values)."""
    z = np.load(folder / "movielens/ml-1m/ratings.npz")
    order = np.random.default_rng(0).permutation(len(z["user"]))
    pairs, y = np.column_stack([z["user"], z["item"]])[order], z["rating"][order].astype(np.float32)
    cut = len(order) - len(order) // 10
    return pairs[:cut], y[:cut], pairs[cut:], y[cut:]


def generated(n1=20_000, n2=5_000, k=1_000_000, rank=8, noise=0.7):
    """Return the same of low rank, biases and noise, columns by a power law."""
    rng = np.random.default_rng(0)
    popularity = np.arange(1, n2 + 1) ** -0.6
    cells = np.zeros(0, np.int64)
    while len(cells) < k:
        cols = rng.choice(n2, k // 2, p=popularity / popularity.sum())
        cells = np.union1d(cells, rng.integers(0, n1, k // 2) * n2 + cols)
    rows, cols = np.divmod(rng.permutation(cells)[:k], n2)
    u, v = rng.standard_normal((n1, rank)), rng.standard_normal((n2, rank))
    y = 3.5 + 0.3 * rng.standard_normal(n1)[rows] + 0.3 * rng.standard_normal(n2)[cols]
    y += np.einsum("kh,kh->k", u[rows], v[cols]) / np.sqrt(rank) / 2 + noise * rng.standard_normal(k)
    pairs, cut = np.column_stack([rows, cols]), k - k // 10
    return pairs[:cut], y[:cut].astype(np.float32), pairs[cut:], y[cut:].astype(np.float32)


def timed(name, call, note=""):
    """Run a call, print its median seconds, return what it returned last."""
    call()
    times = []
    for _ in range(REPEATS):
        wall, used = time.perf_counter(), time.process_time()
        out = call()
        times.append((time.perf_counter() - wall, time.process_time() - used))
    wall, used = np.median(times, axis=0)
    print(f"{name:<34}{wall:>9.3f}{used:>9.3f}  {note(out) if callable(note) else note}")
    return out


def table(name, pairs, y, test, values):
    """Print the rows of one problem."""

    def error(model, at=slice(None)):
        return f"RMSE {np.sqrt(np.mean((model.predict(test[at]) - values[at]) ** 2)):.4f}"

    def fit(at):
        return DMFCompleter(random_state=0).fit(pairs[at], y[at])

    def extended(first, then):
        model = fit(first)

        return lambda: copy.copy(model).partial_fit(pairs[then], y[then])

    print(f"\n{name}: {len(y)} entries{'':<16}{'wall s':>6}{'CPU s':>9}")
    everything = slice(None)
    model = timed("fit", lambda: fit(everything), error)
    names = np.array([f"id{i}" for i in range(pairs.max() + 1)], object)[pairs]
    timed("fit, ids that are strings", lambda: DMFCompleter(random_state=0).fit(names, y), "")
    many = np.random.default_rng(1).integers(0, pairs.max(axis=0) + 1, (1_000_000, 2))
    many = many[np.isin(many[:, 0], model.row_ids_) & np.isin(many[:, 1], model.column_ids_)]
    timed(f"predict {len(many)} pairs", lambda: model.predict(many))
    timed("the same with return_std", lambda: model.predict(many, return_std=True))
    timed(f"top_k of {len(model.row_ids_)} rows", lambda: model.top_k())
    timed("top_k of 1 row", lambda: model.top_k(model.row_ids_[:1]))
    tenth, hidden = pairs[:, 0] % 10 == 0, test[:, 0] % 10 == 0
    rest = fit(~tenth)
    note = f"{len(np.unique(pairs[tenth, 0]))} rows; fitted with the others {error(model, hidden)}, "
    timed("fold_in", lambda: rest.fold_in(pairs[tenth], y[tenth]), lambda folded: note + error(folded, hidden))
    one = pairs[:, 0] == pairs[tenth][0, 0]
    timed("fold_in of 1 row", lambda: rest.fold_in(pairs[one], y[one]))
    for share, parts in (("the last tenth", 10), ("the other half", 2)):
        cut = len(y) - len(y) // parts
        before = error(fit(slice(0, cut)))
        timed(
            f"partial_fit of {share}",
            extended(slice(0, cut), slice(cut, None)),
            lambda m, b=before: f"{b} before, {error(m)} after",
        )


def pair_kernel():
    """Print ns a pair, and gathered bytes a second beside those of copying memory."""
    rng, k = np.random.default_rng(0), 1_000_000
    source = np.ones(1 << 26, np.float32)
    target = np.empty_like(source)
    for n1, n2, h in ((6_040, 3_706, 32), (138_000, 27_000, 32), (138_000, 27_000, 64)):
        x, y = (cpu.aligned_empty((n, h), np.float32) for n in (n1, n2))
        x[:], y[:] = (rng.standard_normal(a.shape, dtype=np.float32) for a in (x, y))
        rows, cols = rng.integers(0, n1, k), rng.integers(0, n2, k)
        means, spreads = np.empty((2, k), np.float32)
        counts = [rng.integers(0, 99, n).astype(np.float32) for n in (n1, n2)]
        v = [rng.uniform(0.5, 2, h).astype(np.float32) for _ in range(4)]
        moments = (means, spreads, x, y, rows, cols, counts[0], *v[:2], counts[1], *v[2:])

        def einsum(x=x, y=y, rows=rows, cols=cols, means=means):
            for at in range(0, k, 100_000):
                b = slice(at, at + 100_000)
                np.einsum("kh,kh->k", x[rows[b]], y[cols[b]], out=means[b])

        calls = {
            "pairs": lambda a=moments: cpu.pair_predict(a[0], *a[2:6]),
            "with spread": lambda a=moments: cpu.pair_moments(*a),
            "einsum": einsum,
            "copy": lambda: np.copyto(target, source),
        }
        if find_spec("torch"):
            import torch
            from torch.nn.functional import embedding

            tensors = [torch.from_numpy(a) for a in (x, y, rows, cols)]
            calls["torch"] = lambda t=tensors: embedding(t[2], t[0]).mul_(embedding(t[3], t[1])).sum(1)
        times = {name: [] for name in calls}
        for turn in range(8):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if turn:
                    times[name].append(time.perf_counter() - begin)
        median = {name: np.median(t) for name, t in times.items()}
        copied = 2 * source.nbytes / median.pop("copy") / 1e9
        figures = ", ".join(f"{name} {t / k * 1e9:.1f}" for name, t in median.items())
        rate = k * (2 * h * 4 + 16 + 4) / median["pairs"] / 1e9
        print(f"{n1} x {n2}, h {h}: ns a pair: {figures}; {rate:.0f} GB/s gathered, copying {copied:.0f} GB/s")


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with movielens/")
    parser.add_argument("--pairs", action="store_true", help="the pair kernel alone")
    args = parser.parse_args()
    if args.pairs:
        pair_kernel()
        return
    table("generated", *generated())
    if args.data:
        table("MovieLens-1M", *movielens(args.data))


if __name__ == "__main__":
    main()
