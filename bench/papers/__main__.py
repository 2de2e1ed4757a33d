"""Run the literature's experiments, print each target beside what was measured, keep lines and figures.

    python -m bench.papers                  # all, in the papers' sizes
    python -m bench.papers --quick          # all, in sizes that take seconds; bands from plain NumPy runs
    python -m bench.papers t1 t5            # some
    python -m bench.papers --table          # what is kept, as a Markdown table, without running anything
    python -m bench.papers --summary        # a line an experiment

Ends with code 1 if a row is outside its band.
"""

import argparse
import importlib
import json
import pkgutil
import platform
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np

import bench.papers
import fastdmf
from bench.papers.harness import markdown, print_rows, summary
from fastdmf.engine import SolveWarning

RESULTS = Path(__file__).parent.parent / "results"


def scripts():
    """Return name -> module of all experiments, T1 first."""
    found = [re.fullmatch(r"t(\d+)_\w+", module.name) for module in pkgutil.iter_modules(bench.papers.__path__)]
    return {f"t{int(m[1])}": f"bench.papers.{m[0]}" for m in found if m}


def keep(path, name, lines):
    """Replace the lines of an experiment in the file."""
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in kept if line["experiment"] != name.upper()] + lines
    kept.sort(key=lambda line: int(line["experiment"][1:]))
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def run(name, module, quick, folder):
    """Run one experiment; return its lines, and write its figure if there is a folder."""
    script = importlib.import_module(module)
    print(f"\n{name.upper()} {script.TITLE}", flush=True)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        # Many of these runs stop at a fixed number of steps, as the papers' do; their results say what they reached.
        warnings.simplefilter("ignore", SolveWarning)
        result = script.run(quick)
    seconds = time.perf_counter() - begin
    about = {"machine": f"{platform.machine()}, numpy {np.__version__}, fastdmf {fastdmf.__version__}"}
    lines = [
        {
            "experiment": name.upper(),
            "title": script.TITLE,
            "quantity": row.quantity,
            "target": row.target,
            "origin": row.origin,
            "measured": row.measured,
            "value": row.value,
            "within": row.within,
            "seconds": round(seconds, 2),
            **about,
        }
        for row in result.rows
    ]
    print_rows(name, lines)
    print(f"  {seconds:.1f} s")
    if folder is not None and result.figure is not None:
        folder.mkdir(parents=True, exist_ok=True)
        result.figure.savefig(folder / f"{name}.png")
    return lines


def main():
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.papers", description=__doc__.split("\n")[0])
    known = scripts()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds")
    parser.add_argument("--table", action="store_true", help="print the kept lines as Markdown and run nothing")
    parser.add_argument("--summary", action="store_true", help="print a line an experiment of what is kept")
    parser.add_argument("--no-keep", action="store_true", help="leave the kept lines and figures alone")
    args = parser.parse_args()
    form = "papers-quick" if args.quick else "papers"
    path = RESULTS / f"{form}.jsonl"
    if args.table or args.summary:
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        print(summary(kept) if args.summary else markdown(kept))
        return 0
    unknown = set(args.names) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    outside = count = 0
    for name in args.names or known:
        folder = None if args.no_keep or args.quick else RESULTS / form
        lines = run(name, known[name], args.quick, folder)
        if not args.no_keep:
            keep(path, name, lines)
        count += len(lines)
        outside += sum(not line["within"] for line in lines)
    print(f"\n{count - outside} of {count} quantities within their bands")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
