"""Turn pytest-benchmark's JSON into a table and into lines that are kept.

    pytest bench -k full --benchmark-json=run.json
    python bench/report.py run.json --keep bench/results/kernels.jsonl

A line holds the median, the rounds, what the benchmark counted (``extra_info``), the versions and the processor. Lines
of a benchmark that is already kept are replaced.
"""

import argparse
import json
from pathlib import Path

from versions import installed

VECTORS = {"avx512f": " with AVX-512", "avx2": " with AVX2"}
PACKAGES = ("fastdmf", "numpy", "scipy", "numba", "torch")


def lines(path):
    """Return one dict a benchmark."""
    run = json.loads(Path(path).read_text())
    versions = installed(PACKAGES)
    cpu = run["machine_info"]["cpu"]
    widest = next((name for flag, name in VECTORS.items() if flag in cpu.get("flags", ())), "")
    machine = f"{cpu.get('brand_raw', run['machine_info']['machine'])}{widest}, {cpu.get('count')} cores"
    for benchmark in run["benchmarks"]:
        yield {
            "group": benchmark["group"],
            "name": benchmark["name"],
            "median_seconds": benchmark["stats"]["median"],
            "rounds": benchmark["stats"]["rounds"],
            **benchmark["extra_info"],
            "machine": machine,
            "versions": versions,
        }


def table(rows):
    """Print a table a group: name, median, and whatever was counted."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for group, members in groups.items():
        skip = {"group", "name", "median_seconds", "rounds", "machine", "versions"}
        columns = list(dict.fromkeys(key for row in members for key in row if key not in skip))
        print(f"\n{group}\n")
        print("| benchmark | median ms | " + " | ".join(columns) + " |")
        print("|---" * (2 + len(columns)) + "|")
        for row in members:
            cells = [str(row.get(column, "")) for column in columns]
            print(f"| {row['name']} | {1e3 * row['median_seconds']:.4g} | " + " | ".join(cells) + " |")


def main():
    """Print the tables; keep the lines if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", help="files that pytest --benchmark-json wrote")
    parser.add_argument("--keep", type=Path, help="JSON-lines file to merge the results into")
    args = parser.parse_args()
    rows = [row for path in args.json for row in lines(path)]
    table(rows)
    if args.keep:
        fresh = {(row["group"], row["name"]) for row in rows}
        kept = [json.loads(line) for line in args.keep.read_text().splitlines()] if args.keep.exists() else []
        kept = [row for row in kept if (row["group"], row["name"]) not in fresh]
        args.keep.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *rows]))


if __name__ == "__main__":
    main()
