"""``vbmf`` from shards on disk: memory, seconds and bytes an entry, beside the fit in memory.

    python bench/shards.py [--entries 200e6] [--rows 2e6] [--columns 1e5] [--sweeps 8] [--compare 20e6]
                           [--folder /tmp] [--cold] [--keep results/shards.jsonl]

Rank 10 plus biases plus noise of standard deviation 0.7 in float32; rows have a heavy-tailed number of entries, and
every part of two million entries has rows from everywhere. ``--entries`` are written and fitted first; the peak is
VmHWM of this process, generator included. Then ``--compare`` entries, with a hundredth of that many rows, from shards
and from memory. CPU seconds are those of all threads. ``--cold`` drops the shards from the system's cache before
every pass over one side, so that all is read from disk. Estimates for 10^9 entries are the measured figures, scaled.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

import fastdmf
from fastdmf.shards import ShardSide

RANK, NOISE, PART = 10, 0.7, 1 << 21


def memory(field):
    """Return bytes of this process, VmRSS or VmHWM."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def forget_peak():
    """Start VmHWM anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Source:
    """Distinct entries of a rank-10 matrix, part by part, the same on every pass."""

    def __init__(self, count, n1, n2, seed=0):
        rng = np.random.default_rng(seed)
        self.shape = n1, n2
        share = rng.lognormal(0, 1, n1)
        self.counts = np.minimum(np.maximum(share * (count / share.sum()), 1), n2 // 3).astype(np.int64)
        # Row i has entries at (start + t stride) mod p for t = 0, 1, ...: distinct, as p is prime.
        self.prime = next(p for p in range(n2, 1, -1) if all(p % k for k in range(2, int(p**0.5) + 1)))
        self.start = rng.integers(0, self.prime, n1)
        self.stride = rng.integers(1, self.prime, n1)
        self.p, self.q = (rng.standard_normal((n, RANK), np.float32) / RANK**0.25 for n in self.shape)
        self.a, self.b = (0.4 * rng.standard_normal(n, np.float32) for n in self.shape)
        self.busy = np.argsort(-self.counts, kind="stable")
        self.seed = seed

    def parts(self):
        """Yield (rows, cols, values)."""
        sizes = np.sort(self.counts)
        rows, turns, waiting, number = [], [], 0, 0
        for t in range(int(self.counts.max())):
            here = self.busy[: len(sizes) - np.searchsorted(sizes, t, side="right")]
            for k in range(0, len(here), PART):
                rows.append(here[k : k + PART])
                turns.append(np.full(len(rows[-1]), t))
                waiting += len(rows[-1])
                if waiting >= PART:
                    yield self._part(np.concatenate(rows), np.concatenate(turns), number)
                    rows, turns, waiting, number = [], [], 0, number + 1
        if waiting:
            yield self._part(np.concatenate(rows), np.concatenate(turns), number)

    def _part(self, rows, turns, number):
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(rows))
        rows, turns = rows[order], turns[order]
        cols = (self.start[rows] + turns * self.stride[rows]) % self.prime
        values = 3.5 + self.a[rows] + self.b[cols] + NOISE * rng.standard_normal(len(rows), np.float32)
        values += np.einsum("ij,ij->i", self.p[rows], self.q[cols])
        return rows.astype(np.int32), cols.astype(np.int32), values.astype(np.float32)


class Clock:
    """Wall and CPU seconds since the start."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self):
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def timed(parts, spent):
    """Yield parts, and add the CPU and wall seconds of making them to ``spent``."""
    while True:
        clock = Clock()
        part = next(parts, None)
        spent += clock.read()
        if part is None:
            return
        yield part


def write(source, folder):
    """Write shards; return them and what it took, without making the data."""
    spent, clock = np.zeros(2), Clock()
    shards = fastdmf.write_shards(folder, timed(source.parts(), spent), source.shape)
    wall, cpu = np.array(clock.read()) - spent
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    line = {"ns_an_entry_wall": 1e9 * wall / shards.size, "ns_an_entry_cpu": 1e9 * cpu / shards.size}
    return shards, line | {"bytes_an_entry": size / shards.size}


def fit(sweeps, *data):
    """Fit a fixed number of sweeps; return what it took."""
    clock = Clock()
    options = {"max_iter": sweeps, "tol": 0.0, "implicit_features": False, "random_state": 0, "on_failure": "ignore"}
    solution = fastdmf.vbmf(*data, **options)
    wall, cpu = clock.read()
    each = 1e9 / data[0].size / solution.n_iter
    line = {"ns_an_entry_and_sweep_wall": each * wall, "ns_an_entry_and_sweep_cpu": each * cpu}
    return solution, line | {"noise": solution.noise}


def say(what, entries, line, keep):
    """Print one line, with the peak so far."""
    line = {"what": what, "entries": entries, **line, "peak_gb": memory("VmHWM") / 1e9}
    line = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(line), flush=True)
    if keep:
        with keep.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def drop_from_cache(folder):
    """Ask the system to forget what it caches of the files of a folder."""
    for path in Path(folder).iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def make_cold():
    """Let every pass over a side begin with an empty cache."""
    blocks = ShardSide.blocks

    def cold(self):
        drop_from_cache(self.shards.folder)
        yield from blocks(self)

    ShardSide.blocks = cold


def main():
    """Print a line a measurement, and the estimate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = lambda text: int(float(text))  # noqa: E731
    parser.add_argument("--entries", type=number, default=200_000_000)
    parser.add_argument("--rows", type=number, default=2_000_000)
    parser.add_argument("--columns", type=number, default=100_000)
    parser.add_argument("--compare", type=number, default=20_000_000)
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--cold", action="store_true", help="read everything from disk")
    parser.add_argument("--keep", type=Path, help="JSON-lines file to append to")
    args = parser.parse_args()
    free = shutil.disk_usage(args.folder).free
    needed = 25 * max(args.entries, args.compare)
    if free < needed:
        parser.error(f"{args.folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed")
    if args.cold:
        make_cold()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        # Compiled before any clock starts.
        warm, _ = write(Source(200_000, 2_000, args.columns), f"{folder}/warm")
        fit(3, warm)
        shards, line = write(Source(args.entries, args.rows, args.columns), f"{folder}/large")
        written = say("write", shards.size, line, args.keep)
        forget_peak()
        solution, line = fit(args.sweeps, shards)
        fitted = say("fit from shards", shards.size, line, args.keep)
        billion = {
            "disk_gb": written["bytes_an_entry"],
            "write_minutes": written["ns_an_entry_wall"] / 60,
            "minutes_of_30_sweeps": 30 * fitted["ns_an_entry_and_sweep_wall"] / 60,
        }
        print(json.dumps({"estimate_for_1e9": {key: round(value, 1) for key, value in billion.items()}}))
        del solution
        shutil.rmtree(f"{folder}/large")
        if not args.compare:
            return
        source = Source(args.compare, args.compare // 100, args.columns)
        shards, line = write(source, f"{folder}/small")
        say("write", shards.size, line, args.keep)
        forget_peak()
        one, line = fit(args.sweeps, shards)
        say("fit from shards", shards.size, line, args.keep)
        forget_peak()
        rows, cols, values = (np.concatenate(arrays) for arrays in zip(*source.parts()))
        clock = Clock()
        mask = fastdmf.EntryMask(rows, cols, source.shape)
        line = {"index_ns_an_entry_cpu": 1e9 * clock.read()[1] / mask.size}
        two, more = fit(args.sweeps, mask, values)
        at = slice(0, 100_000)
        largest = np.abs(one.predict(rows[at], cols[at]) - two.predict(rows[at], cols[at])).max()
        say("fit from memory", mask.size, line | more | {"largest_difference": float(largest)}, args.keep)


if __name__ == "__main__":
    main()
