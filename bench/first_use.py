"""What a user waits for: seconds to import, to compile and to solve on a first use, in fresh processes.

    python bench/first_use.py [--only imputer] [--keep bench/results/first_use.jsonl]

Every case runs in a process of its own, first with an empty cache of compiled kernels, then with what it left, three
times (medians). ``kernels`` is the import of numba and of the kernels, ``compile`` what waiting for compiled versions
takes besides (compiling, or loading from the cache), ``solve`` the rest of the first fit, ``again`` a second one.
Problems are small: what is timed is not the solver.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("numpy", "numba", "llvmlite")
SECONDS = ("import", "kernels", "compile", "solve", "again")


def imputer():
    """Return a first fit: a table of 60 x 40, half of it missing."""
    import numpy as np

    from fastdmf import DMFImputer

    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 40))
    X[rng.random(X.shape) < 0.5] = np.nan
    return lambda: DMFImputer(random_state=0).fit_transform(X)


def sensing():
    """Return a first fit: 80 measurements of a 12 x 10 matrix."""
    import numpy as np

    from fastdmf import DMFSensing

    rng = np.random.default_rng(0)
    A = rng.standard_normal((80, 12, 10))
    y = A.reshape(80, -1) @ (rng.standard_normal((12, 2)) @ rng.standard_normal((2, 10))).ravel()
    return lambda: DMFSensing(random_state=0).fit(A, y)


def _entries(n, rank, count, noise):
    import numpy as np

    rng = np.random.default_rng(0)
    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n)) + noise * rng.standard_normal((n, n))
    rows, cols = np.divmod(rng.choice(n * n, count, replace=False), n)
    return rows, cols, truth[rows, cols]


def completer():
    """Return a first fit: 6000 entries of 200 x 200."""
    import numpy as np

    from fastdmf import DMFCompleter

    rows, cols, y = _entries(200, 3, 6000, 0.1)
    pairs = np.stack([rows, cols], axis=1)
    return lambda: DMFCompleter(random_state=0).fit(pairs, y)


def solve():
    """Return a first call: the paper's completion, 2000 entries of 100 x 100."""
    import fastdmf

    rows, cols, y = _entries(100, 5, 2000, 0)
    return lambda: fastdmf.solve(fastdmf.EntryMask(rows, cols, (100, 100)), y, random_state=0)


def vbmf():
    """Return a first call: 6000 entries of 200 x 200."""
    import fastdmf

    rows, cols, y = _entries(200, 3, 6000, 0.1)
    return lambda: fastdmf.vbmf(fastdmf.EntryMask(rows, cols, (200, 200)), y, random_state=0)


CASES = {case.__name__: case for case in (imputer, sensing, completer, solve, vbmf)}


def measure(name):
    """Print the seconds of this process as JSON."""
    begin = time.perf_counter()
    run = CASES[name]()
    imported = time.perf_counter()
    from fastdmf.backend import compile_clock, get_backend

    get_backend().kernels  # noqa: B018  the import
    ready = time.perf_counter()
    with compile_clock() as clock:
        run()
    first = time.perf_counter()
    run()
    again = time.perf_counter() - first
    spent = imported - begin, ready - imported, clock.compile_seconds, clock.seconds, again
    modules = [m for key, m in sys.modules.items() if key.startswith("fastdmf.kernels.cpu.")]
    kernels = {f for m in modules for f in vars(m).values() if hasattr(f, "signatures")}
    print(json.dumps(dict(zip(SECONDS, spent)) | {"versions": sum(len(f.signatures) for f in kernels)}))


def processes(name):
    """Yield a line for the empty cache and one for the warm cache."""
    root = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as cache:
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore", __file__, "--measure", name]
        for state, times in (("empty", 1), ("warm", 3)):
            runs = []
            for _ in range(times):
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            line = {"case": name, "cache": state, **{k: statistics.median(run[k] for run in runs) for k in runs[0]}}
            line["first_fit"] = line["kernels"] + line["compile"] + line["solve"]
            yield {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}


def main():
    """Print a table and a JSON line for each case and state; keep the lines if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--keep", type=Path, help="JSON-lines file; lines of the same case and state are replaced")
    parser.add_argument("--measure", choices=sorted(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    versions = {package: metadata.version(package) for package in PACKAGES}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    lines = []
    for name in args.only:
        for line in processes(name):
            lines.append({**line, "machine": machine, "versions_of": versions})
            print(json.dumps(lines[-1]), flush=True)
    columns = ("case", "cache", *SECONDS, "first_fit", "versions")
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for line in lines:
        print("| " + " | ".join(str(line[column]) for column in columns) + " |")
    if args.keep:
        fresh = {(line["case"], line["cache"]) for line in lines}
        kept = [json.loads(text) for text in args.keep.read_text().splitlines()] if args.keep.exists() else []
        kept = [line for line in kept if (line["case"], line["cache"]) not in fresh]
        args.keep.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *lines]))


if __name__ == "__main__":
    main()
