"""``vbmf`` on 5 to 100 million entries: CPU seconds and bytes of memory an entry, each size in a process of its own.

    python bench/scale.py [--millions 5 20 50 100] [--sweeps 8] [--shuffled]
    python bench/scale.py --data ../shared/data        # DMFCompleter on the 20 million synthetic ratings of peers.py
    python bench/scale.py --data ../shared/data --start    # the same ratings, from some of the rows and from all

138,493 x 26,744, rank 10 plus biases plus noise of standard deviation 0.7, as many entries in each row,
in float32. Entries come sorted by row, or shuffled, as int32 rows and columns and float32 values, 12 bytes an entry
that are the caller's. ``index`` is ``EntryMask``, ``fit`` is ``vbmf`` with a fixed number of sweeps. Memory is the
growth of the process's peak over what it held before: all that the library takes, and of that the factors' share, the
posterior means and prior variances of both sides, does not grow with the entries.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from problems import Problem, problem
from scipy.sparse import coo_matrix

import fastdmf
from fastdmf import row_subset

SHAPE = 138_493, 26_744
RANK, NOISE = 10, 0.7
PIECE = 1 << 20


def entries(count, shuffled):
    """Return rows, columns and values."""
    n1 = SHAPE[0]
    rng = np.random.default_rng(0)
    per_row = count // n1
    rows = np.repeat(np.arange(n1, dtype=np.int32), per_row)
    cols = np.empty(len(rows), np.int32)
    for i in range(n1):
        # Distinct columns without a set: a random start and a random stride that the prime 26,737 knows no factor of.
        at = (rng.integers(26_737) + np.arange(per_row) * rng.integers(1, 26_737)) % 26_737
        cols[i * per_row : (i + 1) * per_row] = np.sort(at)
    p, q = (rng.standard_normal((n, RANK), np.float32) / RANK**0.25 for n in SHAPE)
    a, b = (0.4 * rng.standard_normal(n, np.float32) for n in SHAPE)
    y = np.empty(len(rows), np.float32)
    for k in range(0, len(rows), PIECE):
        i, j = rows[k : k + PIECE], cols[k : k + PIECE]
        y[k : k + PIECE] = 3.5 + a[i] + b[j] + np.einsum("ij,ij->i", p[i], q[j])
        y[k : k + PIECE] += NOISE * rng.standard_normal(len(i), np.float32)
    if shuffled:
        order = rng.permutation(len(rows))
        rows, cols, y = rows[order], cols[order], y[order]
    return rows, cols, y


def memory(field):
    """Return bytes of this process, VmRSS or VmHWM."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def measure(count, sweeps, shuffled):
    """Print a JSON line."""
    warm = fastdmf.EntryMask(*np.divmod(np.arange(0, 500 * 400, 5), 400), (500, 400))
    fastdmf.vbmf(warm, np.ones(warm.size, np.float32), random_state=0, max_iter=3, on_failure="ignore")
    rows, cols, y = entries(count, shuffled)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    start = time.process_time()
    mask = fastdmf.EntryMask(rows, cols, SHAPE)
    indexed = time.process_time()
    options = {"max_iter": sweeps, "tol": 0.0, "implicit_features": False, "random_state": 0, "on_failure": "ignore"}
    solution = fastdmf.vbmf(mask, y, **options)
    fitted = time.process_time()
    n = len(rows)
    factors = 4 * sum(SHAPE) * solution.sweeps.rows.x.shape[1]
    line = {"entries": n, "shuffled": shuffled, "sweeps": solution.n_iter, "noise_variance": round(solution.noise, 4)}
    line |= {"index_seconds": indexed - start, "fit_seconds": fitted - indexed}
    line |= {"ns_an_entry_and_sweep": 1e9 * (fitted - indexed) / n / solution.n_iter}
    peak = memory("VmHWM") - before
    line |= {"library_bytes_an_entry": peak / n, "factors_bytes": factors, "peak_gb": memory("VmHWM") / 1e9}
    print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in line.items()}))


def complete(folder):
    """Print what the defaults do on a split that ``problems`` has saved: all that this process ever holds counts."""
    folder = Path(folder)
    rows, columns, values = (np.load(folder / f"train_{part}.npy") for part in ("rows", "columns", "values"))
    x = coo_matrix((values, (rows, columns)), SHAPE)
    before, start = memory("VmRSS"), time.process_time()
    model = fastdmf.DMFCompleter(random_state=0).fit(x)
    line = {"entries": x.nnz, "cpu_seconds": time.process_time() - start, "before_gb": before / 1e9}
    line["peak_gb"] = memory("VmHWM") / 1e9
    case = Problem.load(folder)
    line["rmse"] = case.error(model.predict(np.stack(case.test[:2], axis=1)))
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in line.items()}))


def starts(folder, rounds=3):
    """Print CPU seconds, sweeps and test error of fits that start from some of the rows, and from all of them.

    ``entries`` of the rows for every number of the columns' factors: as it is set, fewer, and 0 for a start from all.
    """
    case = problem(folder, "synth20m")
    mask = fastdmf.EntryMask(*(a.astype(np.int32) for a in case.train[:2]), case.shape)
    y = case.train[2].astype(np.float32)
    seconds = {row_subset._ENTRIES: [], 3: [], 0: []}
    for k in range(rounds + 1):  # the first compiles
        for entries, times in seconds.items():
            row_subset._ENTRIES = entries
            begin = time.process_time()
            solution = fastdmf.vbmf(mask, y, random_state=k)
            times.append(time.process_time() - begin)
            line = {"entries": entries, "seed": k, "sweeps": solution.n_iter, "components": solution.components}
            line["rmse"] = case.error(solution.predict(*case.test[:2]))
            line["evidence"] = solution.history["evidence"][-1]
            line["cpu_seconds"] = times[-1]
            print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in line.items()}), flush=True)
    some, _, full = (float(np.median(times[1:])) for times in seconds.values())
    print(f"medians: {some:.2f} s from some of the rows, {full:.2f} s from all, ratio {full / some:.2f}")


def main():
    """Print the table, and keep the lines if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[5, 20, 50, 100])
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--shuffled", action="store_true", help="entries in random order")
    parser.add_argument("--keep", type=Path, help="JSON-lines file to append to")
    parser.add_argument("--data", type=Path, help="folder with synthetic.py")
    parser.add_argument("--start", action="store_true", help="compare starts on the data")
    parser.add_argument("--saved", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.child, args.sweeps, args.shuffled)
        return
    if args.saved:
        complete(args.saved)
        return
    if args.start:
        starts(args.data)
        return
    if args.data:
        with tempfile.TemporaryDirectory() as folder:
            problem(args.data, "synth20m").save(Path(folder))
            for _ in range(2):  # the first compiles
                done = subprocess.run([sys.executable, __file__, "--saved", folder], capture_output=True, text=True)
        print(done.stdout.splitlines()[-1] if not done.returncode else done.stderr)
        return
    for millions in args.millions:
        command = [sys.executable, __file__, "--child", str(millions * 10**6), "--sweeps", str(args.sweeps)]
        command += ["--shuffled"] if args.shuffled else []
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        print(line, flush=True)
        if args.keep:
            with args.keep.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
