"""Registers and spills of every kernel on GPUs that are not there, beside what ``cuda_registers.toml`` allows.

``python tests/cuda_registers.py`` compiles all of them and writes the file anew, ``pytest -s`` prints them.
"""

import tomllib
from pathlib import Path

import numpy as np
import nvrtc

from fastdmf.chain import Layout
from fastdmf.kernels import cuda
from fastdmf.kernels.cuda import dense, entry, lbfgs, row_solve, seeded, slices, update
from fastdmf.kernels.cuda.measurements import plan_measurements
from fastdmf.kernels.cuda.small_chain import SmallChainPlan

ARCHITECTURES = (75, 80, 90, 100)
BUDGET = Path(__file__).resolve().parent / "cuda_registers.toml"


def _dtype_name(dtype, stored):
    return np.dtype(dtype).name + (f"/{stored}" if stored else "")


def _cases():
    """Yield name, family and options of the compiler: every family with every kind of its options."""
    reals = (np.float32, np.float64)
    for family, options in (("slices", slices), ("update", update), ("dense", dense), ("lbfgs", lbfgs)):
        for dtype in reals:
            yield f"{family} {np.dtype(dtype)}", family, getattr(options, f"{family}_options")(dtype)
    for family, options in (("entry", entry.entry_options), ("row_solve", row_solve.row_solve_options)):
        for dtype, stored in ((np.float32, None), (np.float64, None), (np.float32, "bfloat16")):
            for h in (1, 8, 17, 32, 64, 128, 256):
                yield f"{family} h={h} {_dtype_name(dtype, stored)}", family, options(h, dtype, stored=stored)
        for dtype in reals:
            yield f"{family} h=64 {np.dtype(dtype)} int64", family, options(64, dtype, index=np.int64)
    # A row in one thread's registers, and as many as there are; several right-hand sides; several windows.
    for d, runs, dtype, stored in (
        (100, 1, np.float32, None),
        (10_000, 1, np.float32, None),
        (10_001, 1, np.float32, None),
        (2048, 4, np.float32, None),
        (6000, 2, np.float32, None),
        (10**6, 1, np.float32, None),
        (10_000, 1, np.float32, "float16"),
        (5000, 1, np.float64, None),
        (1000, 4, np.float64, None),
    ):
        plan = plan_measurements(10_000, d, runs, dtype)
        yield f"gaussian d={d} runs={runs} {_dtype_name(dtype, stored)}", "gaussian", plan.options(dtype, stored)
    for d, runs, dtype in ((10_000, 1, np.float32), (2048, 4, np.float32), (4096, 1, np.float64)):
        plan = plan_measurements(10_000, d, runs, dtype, pack=4)
        for ensemble in ("gaussian", "rademacher"):
            options = seeded.seeded_options(plan, dtype, ensemble)
            yield f"seeded {ensemble} d={d} runs={runs} {np.dtype(dtype)}", "seeded", options
    for dtype, n, rules in (
        (np.float32, 33, ("gd",)),
        (np.float32, 100, ("gd", "momentum", "nesterov", "group_rmsprop")),
        (np.float32, 128, ("gd",)),
        (np.float64, 96, ("group_rmsprop",)),
    ):
        for rule in rules:
            plan = SmallChainPlan.of((n,) * 3, Layout((n,) * 3).offsets, dtype, rule)
            yield f"small_chain n={n} {np.dtype(dtype)} {rule}", "small_chain", plan.options()


CASES = {name: (family, options) for name, family, options in _cases()}


def measure(compiler, architecture):
    """Return (name of the case, kernel) -> (registers, bytes of stack and spills)."""
    found = {}
    for name, (family, options) in CASES.items():
        used, _ = compiler.compile(cuda.source(family), architecture, options, name=family)
        found |= {(name, kernel): numbers for kernel, numbers in sorted(used.items())}
    return found


def budget():
    """Return the file's contents: NVRTC's version, and (name, kernel) -> architecture -> (registers, bytes)."""
    file = tomllib.loads(BUDGET.read_text(encoding="utf-8"))
    allowed = {}
    for name, kernels in file["registers"].items():
        for kernel, numbers in kernels.items():
            spills = file["spills"].get(name, {}).get(kernel, [0] * len(ARCHITECTURES))
            allowed[name, kernel] = dict(zip(ARCHITECTURES, zip(numbers, spills)))
    return file["nvrtc"], allowed


def write(compiler):
    """Measure everything and write the file."""
    found = [measure(compiler, architecture) for architecture in ARCHITECTURES]
    lines = [
        "# Registers of a thread, the most that are allowed, and bytes of stack, on sm_75, 80, 90 and 100, where those",
        "# are not zero. Written by tests/cuda_registers.py with the NVRTC of this version, whose numbers they are.",
        f'nvrtc = "{compiler.version()}"',
    ]
    for title, place in (("registers", 0), ("spills", 1)):
        lines += ["", f"[{title}]"]
        for name, kernel in found[0]:
            numbers = [used[name, kernel][place] for used in found]
            if place == 0 or any(numbers):
                lines.append(f'"{name}".{kernel} = {numbers}')
    BUDGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(nvrtc.Compiler(nvrtc.find()))
