"""Reading entries from CSV: seconds and peak memory, and the seconds until an error names its line.

    python bench/files.py [--entries 10e6] [--folder /tmp]
    python bench/files.py --entries 100e6 --shard       # ``fastdmf shard``, which takes a file part by part

Every case runs in a process of its own, whose peak (VmHWM) counts imports and the result. The bad line is the last but
one.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

READ = """
import sys, time
from fastdmf import tables
import pyarrow.csv
begin = time.perf_counter()
try:
    tables.read_entries(sys.argv[1])
    said = "read"
except tables.TableError as error:
    said = str(error).replace(sys.argv[1], "FILE")[:90]
seconds = time.perf_counter() - begin
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(f"{seconds:.2f} s, peak {peak / 1e3:.0f} MB: {said}")
"""

SHARD = """
import sys, time
from pathlib import Path
from fastdmf import cli
begin = time.perf_counter()
folder = Path(sys.argv[1]).with_name("shards")
assert cli.main(["shard", sys.argv[1], "--out", str(folder), "--quiet"]) == 0
seconds = time.perf_counter() - begin
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
size = sum(file.stat().st_size for file in folder.iterdir())
print(f"{seconds:.1f} s, peak {peak / 1e3:.0f} MB: {size / 1e6:.0f} MB of shards")
"""


def write(path, count, prefix="", bad=None):
    """Write a header and ``count`` entries, ten a row; ``bad`` takes the place of the last line but one."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        file.write("user,item,rating\n")
        for start in range(0, count, 1_000_000):
            n = min(1_000_000, count - start)
            rows, values = np.arange(start, start + n) // 10, rng.integers(1, 6, n)
            # Ten different ones a row, wherever it is cut.
            cols = (7919 * (np.arange(start, start + n) % 10) + 31 * rows) % 100_000
            lines = [
                f"{prefix}{i},{prefix}{j},{v}.5\n" for i, j, v in zip(rows.tolist(), cols.tolist(), values.tolist())
            ]
            if bad is not None and start + n == count:
                lines[-2] = bad
            file.writelines(lines)


def main():
    """Time every case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=float, default=10e6)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--shard", action="store_true", help="make shards instead")
    args = parser.parse_args()
    cases = {"integer ids": {}, "string ids": {"prefix": "u"}}
    if not args.shard:
        cases |= {"a column too many": {"bad": "1,2,3,4\n"}, "no number": {"bad": "1,2,three\n"}}
    for name, options in cases.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "entries.csv"
            write(path, int(args.entries), **options)
            command = [sys.executable, "-c", SHARD if args.shard else READ, path]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{name:<20} {path.stat().st_size / 1e6:.0f} MB  {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
