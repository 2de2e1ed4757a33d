"""Reading entries from CSV: seconds and peak memory, and the seconds until an error names its line.

    python bench/files.py [--entries 10e6] [--folder /tmp]

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


def write(path, count, prefix="", bad=None):
    """Write a header and ``count`` entries, ten a row; ``bad`` takes the place of the last line but one."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        file.write("user,item,rating\n")
        for start in range(0, count, 1_000_000):
            n = min(1_000_000, count - start)
            rows, cols, values = np.arange(start, start + n) // 10, rng.integers(0, 100_000, n), rng.integers(1, 6, n)
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
    args = parser.parse_args()
    cases = {
        "integer ids": {},
        "string ids": {"prefix": "u"},
        "a column too many": {"bad": "1,2,3,4\n"},
        "no number": {"bad": "1,2,three\n"},
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, options in cases.items():
            path = Path(folder) / "entries.csv"
            write(path, int(args.entries), **options)
            done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
            print(f"{name:<20} {path.stat().st_size / 1e6:.0f} MB  {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
