"""fastdmf beside what people use today, with the same splits, each run in a process of its own.

    pip install cmfrec scikit-surprise myfm "setuptools<80" torch pandas psutil     # myfm needs the old setuptools
    python bench/peers.py --data ../shared/data ratings u1 u2 u3 u4 u5 ml-1m
    python bench/peers.py --data ../shared/data ratings u1 ml-1m --curves        # error against time
    python bench/peers.py --data ../shared/data matrices --share 0.4 --seeds 3
    python bench/peers.py --show                                  # the tables again, from what was kept
    python bench/peers.py --figure peers.png                      # the curves

A process first runs its method on a tiny problem, so that imports and compiling are not counted, then loads the split,
and then the clock starts: test error, CPU and wall seconds of the fit (with whatever indexes it builds), and by how
much the resident memory grew at its highest. Runs are kept as JSON lines; a run that is already kept is not repeated
unless asked (``--again``). Errors are clipped to the range of the data for every method alike. A peer that is not
installed is named and left out.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from peer_methods import MATRICES, RATINGS
from problems import MATRICES as MATRIX_NAMES
from problems import RATINGS as RATING_NAMES
from problems import Problem, problem
from versions import installed

KINDS = {"ratings": (RATINGS, RATING_NAMES), "matrices": (MATRICES, MATRIX_NAMES)}
RESULTS = Path(__file__).parent / "results" / "peers.jsonl"


def tiny(kind):
    """Return a problem that compiles and imports whatever a method needs."""
    rng = np.random.default_rng(0)
    # Ratings enough for whatever a method does on many.
    n1, n2 = (900, 600) if kind == "ratings" else (60, 40)
    share = 0.1 if kind == "ratings" else 0.6
    x = 3 + rng.standard_normal((n1, 2)) @ rng.standard_normal((2, n2)) / 2
    rows, cols = np.nonzero(rng.random(x.shape) < share)
    rows, cols = rows.astype(np.int32), cols.astype(np.int32)
    triple = rows, cols, x[rows, cols].astype(np.float32 if kind == "ratings" else float)
    return Problem("tiny", x.shape, triple, triple, (1, 5))


def child(kind, method, seed, iterations, folder):
    """Run one method on one problem and print what it cost."""
    import psutil

    method = KINDS[kind][0][method]
    extra = (iterations,) if kind == "ratings" else ()
    method.fit(tiny(kind), *(None for _ in extra), seed)
    case = Problem.load(Path(folder))
    before = psutil.Process().memory_info().rss
    forget_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    answer = method.fit(case, *extra, seed)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = peak_memory()
    rows, cols = case.test[:2]
    predictions = answer[rows, cols] if kind == "matrices" else answer(rows, cols)
    costs = {"cpu_seconds": cpu, "wall_seconds": wall, "extra_mb": (peak - before) / 1e6, "peak_mb": peak / 1e6}
    print(json.dumps({"error": case.error(np.asarray(predictions)), **costs}))


def forget_peak():
    """Let the kernel count the peak of resident memory anew, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """Return the peak of resident memory in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def versions():
    """Return the versions of what is compared."""
    return installed(("fastdmf", "cmfrec", "scikit-surprise", "myfm", "torch", "scikit-learn", "numpy"))


def key(line):
    """Return what tells one run from another."""
    return tuple(line[name] for name in ("kind", "problem", "method", "seed", "iterations"))


def kept(path):
    """Return the kept runs by their key."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {key(line): line for line in lines}


def keep(path, line):
    """Replace or append one run."""
    runs = {**kept(path), key(line): line}
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(run) + "\n" for run in runs.values()))


def run(args, name):
    """Measure all methods on one problem, for every seed."""
    methods, _ = KINDS[args.kind]
    chosen = args.methods or methods
    splits_differ = name not in RATING_NAMES or name == "ml-1m"
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            saved = False
            for label in chosen:
                method = methods[label]
                for iterations in method.iterations if args.curves else (None,):
                    line = {"kind": args.kind, "method": label, "seed": seed, "iterations": iterations}
                    line["problem"] = name if args.kind == "ratings" else f"{name} {args.share:.0%}"
                    if key(line) in kept(args.keep) and not args.again:
                        continue
                    if not saved:
                        case = problem(args.data, name, seed if splits_differ else 0, args.share)
                        case.save(Path(folder))
                        size, saved = len(case.train[2]), True
                        del case
                    if size > method.largest:
                        continue
                    command = ["--child", args.kind, label, str(seed), str(iterations), folder]
                    done = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True)
                    if done.returncode:
                        print(f"{name}: {label} left out: {done.stderr.strip().splitlines()[-1]}", flush=True)
                        break
                    line |= json.loads(done.stdout.splitlines()[-1])
                    line |= {"settings": method.settings, "machine": machine(), "versions": versions()}
                    keep(args.keep, line)
                    print(
                        f"{line['problem']:18s} {label:18s} seed {seed} {iterations or '':>4} "
                        f"{line['error']:8.4f} {line['cpu_seconds']:8.2f} s {line['extra_mb']:8.0f} MB",
                        flush=True,
                    )


def machine():
    """Return the processor and the number of cores."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def show(path):
    """Print means over the seeds: ratings with the best error first, matrices by their standing, the worst first."""
    cases = {}
    for line in kept(path).values():
        if line["iterations"] is None:
            cases.setdefault((line["kind"], line["problem"]), {}).setdefault(line["method"], []).append(line)
    for (kind, name), methods in cases.items():
        if kind != "ratings":
            continue
        print(f"\n{name}\n\n| method | RMSE | CPU s | wall s | extra MB | seeds | settings |" + "\n" + "|---" * 7 + "|")
        means = {label: np.mean([[line[c] for c in COLUMNS] for line in lines], 0) for label, lines in methods.items()}
        for label, (error, cpu, wall, extra) in sorted(means.items(), key=lambda item: item[1][0]):
            seeds, settings = len(methods[label]), methods[label][0]["settings"]
            print(f"| {label} | {error:.4f} | {cpu:.2f} | {wall:.2f} | {extra:.0f} | {seeds} | {settings} |")
    rows = []
    for (kind, name), methods in cases.items():
        if kind == "matrices" and "fastdmf" in methods:
            errors = {label: np.mean([line["error"] for line in lines]) for label, lines in methods.items()}
            seconds = {label: np.mean([line["cpu_seconds"] for line in lines]) for label, lines in methods.items()}
            best = min(error for label, error in errors.items() if label != "fastdmf")
            rows.append((errors["fastdmf"] / best, name, errors, seconds))
    if rows:
        labels = list(MATRICES)
        print(f"\n| matrix, hidden | fastdmf / best peer | {' | '.join(labels)} | fastdmf CPU s | KNN CPU s |")
        print("|---" * (len(labels) + 4) + "|")
    for ratio, name, errors, seconds in sorted(rows, reverse=True):
        cells = " | ".join(f"{errors[label]:.4g}" if label in errors else "" for label in labels)
        print(f"| {name} | {ratio:.3f} | {cells} | {seconds['fastdmf']:.2f} | {seconds.get('KNN', np.nan):.2f} |")


COLUMNS = ("error", "cpu_seconds", "wall_seconds", "extra_mb")


def figure(path, out):
    """Draw error against CPU seconds, one panel a problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {}
    for line in kept(path).values():
        if line["kind"] == "ratings" and line["seed"] == 0 and RATINGS[line["method"]].iterations:
            curves.setdefault(line["problem"], {}).setdefault(line["method"], []).append(line)
    curves = {name: methods for name, methods in curves.items() if any(len(lines) > 1 for lines in methods.values())}
    fig, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.6), squeeze=False, layout="constrained")
    colors = {label: f"C{k}" for k, label in enumerate(RATINGS)}
    for ax, (name, methods) in zip(axes[0], curves.items()):
        for label, lines in methods.items():
            stops = [line for line in lines if line["iterations"] is not None]
            stops.sort(key=lambda line: line["iterations"])
            points = [(line["cpu_seconds"], line["error"]) for line in stops]
            if points:
                ax.plot(*zip(*points), "o-", ms=3, lw=2 if label == "fastdmf" else 1, color=colors[label], label=label)
            for line in lines:
                if line["iterations"] is None:
                    ax.plot(line["cpu_seconds"], line["error"], "*", ms=9, color=colors[label])
        ax.set(xscale="log", title=name, xlabel="CPU seconds of the fit")
        low = min(line["error"] for lines in methods.values() for line in lines)
        ax.set_ylim(low - 0.005, low + 0.08)
    axes[0, 0].set_ylabel("test RMSE")
    axes[0, -1].legend(fontsize=7)
    fig.savefig(out, dpi=150)


def main():
    """Run, show, or draw."""
    if sys.argv[1:2] == ["--child"]:
        kind, label, seed, iterations, folder = sys.argv[2:]
        return child(kind, label, int(seed), None if iterations == "None" else int(iterations), folder)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=KINDS, help="what to run")
    parser.add_argument("names", nargs="*", help="problems (default: all of the kind)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--methods", nargs="+", help="rows of the table to run (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="splits, and starts (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of a matrix's cells hidden (default: %(default)s)")
    parser.add_argument("--curves", action="store_true", help="stop every method at several iterations")
    parser.add_argument("--again", action="store_true", help="repeat runs that are kept")
    parser.add_argument("--keep", type=Path, default=RESULTS, help="JSON lines (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print the tables of the kept runs")
    parser.add_argument("--figure", type=Path, help="draw the kept curves")
    args = parser.parse_args()
    if args.kind:
        for name in args.names or KINDS[args.kind][1]:
            run(args, name)
    if args.show or args.kind:
        show(args.keep)
    if args.figure:
        figure(args.keep, args.figure)


if __name__ == "__main__":
    main()
