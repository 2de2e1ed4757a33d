"""Run the fuzzing of one target for some time, print the findings and keep a line.

    python -m bench.fuzz loaders --seconds 600      # files of entries and tables
    python -m bench.fuzz models --seconds 600       # saved models, checkpoints, shards
    python -m bench.fuzz estimators --seconds 600   # fits and predictions
    python -m bench.fuzz loaders --replay "('text', ...)"   # one example of a finding, with its traceback

One process works at a time, for up to ``--part`` seconds: turn by turn it is driven by hypothesis and, if that is
installed (``pip install "fastdmf[fuzz]"``), by atheris. If it crashes or hangs, that is a finding, and the next goes
on. The line goes to ``bench/results/fuzz.jsonl`` with ``--save``. Ends with code 1 if there are findings.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

from bench.fuzz import harness

RESULTS = Path(__file__).parent.parent / "results" / "fuzz.jsonl"
TARGETS = "loaders", "models", "estimators"
PACKAGES = "numpy", "scipy", "scikit-learn", "numba", "pyarrow", "hypothesis", "atheris"


def module_of(target, engine="hypothesis"):
    """Return the module of a target; for atheris fastdmf is imported with a trace of its branches."""
    if engine == "atheris":
        import atheris

        importlib.import_module("fastdmf.kernels.cpu")  # without: kernels are compiled from their own bytecode
        with atheris.instrument_imports(include=["fastdmf"]):
            return importlib.import_module(f"bench.fuzz.{target}")
    return importlib.import_module(f"bench.fuzz.{target}")


def work(target, case, engine, seconds, seed, folder):
    """Be the process that works."""
    module = module_of(target, engine)
    module.prepare()
    cases = module.CASES
    drive = harness.drive_by_atheris if engine == "atheris" else harness.drive_by_hypothesis
    with harness.Recorder(cases if case is None else {case: cases[case]}, folder) as recorder:
        harness.limit_memory()
        drive(recorder, seconds, seed)


def supervise(target, case, engines, seconds, part, seed):
    """Start one working process after the other; return their counts and findings together."""
    counts, findings, begin = {}, {}, time.monotonic()
    k = 0
    while (left := seconds - (time.monotonic() - begin)) > 1:
        engine = engines[k % len(engines)]
        with tempfile.TemporaryDirectory() as folder:
            options = ["--engine", engine, "--seconds", str(min(part, left)), "--seed", str(seed + k)]
            options += [] if case is None else ["--case", case]
            command = [sys.executable, "-m", "bench.fuzz", target, *options, "--work", folder]
            # The directory below is what a case may write to.
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": folder})
            found = Path(folder, "found.json")
            found = json.loads(found.read_text()) if found.exists() else {"executions": {}, "taken": {}, "findings": []}
            if done.returncode and not sum(found["executions"].values()):
                sys.exit(f"the target cannot be run:\n{done.stderr}")
            if done.returncode:
                current = Path(folder, "current").read_text() if Path(folder, "current").exists() else ""
                log = Path(folder, "log").read_text() if Path(folder, "log").exists() else ""
                said = "hangs: " + log if "Timeout" in log else f"ends with {done.returncode}: " + done.stderr[-1500:]
                found["findings"].append({"case": "", "at": "", "error": said, "times": 1, "example": current})
        total = counts.setdefault(engine, {"executions": Counter(), "taken": Counter()})
        for kind, counter in total.items():
            counter.update(found[kind])
        for finding in found["findings"]:
            key = finding["case"], finding["at"], finding["error"][:40]
            known = findings.setdefault(key, finding)
            if known is not finding:
                known["times"] += finding["times"]
                if len(finding["example"]) < len(known["example"]):
                    known.update(example=finding["example"], error=finding["error"])
        k += 1
    return counts, list(findings.values()), time.monotonic() - begin


def replay(target, said):
    """Run one example and let what it raises go."""
    name, value = ast.literal_eval(said)
    print("taken" if harness.watched(module_of(target).CASES[name], value) else "refused")


def version(package):
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main():
    """Run a target."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--part", type=float, default=100, help="seconds after which a new process takes over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("both", "hypothesis", "atheris"), default="both")
    parser.add_argument("--case", help="run this case alone")
    parser.add_argument("--save", action="store_true", help=f"append a line to {RESULTS.name}")
    parser.add_argument("--replay", help="an example of a finding, as it was printed")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay is not None:
        return replay(args.target, args.replay)
    if args.work is not None:
        return work(args.target, args.case, args.engine, args.seconds, args.seed, args.work)
    engines = ["hypothesis", "atheris"] if args.engine == "both" else [args.engine]
    if importlib.util.find_spec("atheris") is None:
        engines = ["hypothesis"]
    counts, findings, seconds = supervise(args.target, args.case, engines, args.seconds, args.part, args.seed)
    for finding in findings:
        print(
            f"\n{finding['case']} {finding['at']} ({finding['times']} times)\n{finding['error']}\n{finding['example']}"
        )
    line = {
        "target": args.target,
        "seconds": round(seconds),
        "seed": args.seed,
        "executions": sum(sum(count["executions"].values()) for count in counts.values()),
        "engines": counts,
        "findings": findings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    print(f"\n{args.target}: {line['executions']} executions in {line['seconds']} s, {len(findings)} findings")
    for engine, count in counts.items():
        print(
            f"  {engine}: " + ", ".join(f"{k} {count['taken'][k]}/{n}" for k, n in sorted(count["executions"].items()))
        )
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
