"""What the command line does around the work: ``fastdmf demo``, ``warmup`` and ``info``."""

import logging
import os
import platform
import sys
from importlib import metadata, util

from fastdmf import __version__
from fastdmf.command_files import check_writable

__all__ = ["demo", "info", "warmup"]

_REQUIRED = ("numpy", "scipy", "numba", "llvmlite", "scikit-learn", "threadpoolctl")
_OPTIONAL = ("matplotlib", "pillow", "pandas", "polars", "pyarrow")


def demo(args):
    """Run the demonstration."""
    if util.find_spec("matplotlib") is None:
        hint = 'pip install "fastdmf[plot]"'
        raise RuntimeError(f"the demo takes its data and its picture from matplotlib, which is missing: {hint}")
    check_writable(args.out, "--out")
    from fastdmf import demo

    handler = logging.StreamHandler()
    logger = logging.getLogger("fastdmf")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        demo.run(args.out, hide=args.hide, seed=args.seed)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    return 0


def warmup(args):
    """Compile the kernels."""
    from fastdmf.warmup import warm_up

    def report(job, dtype, seconds):
        print(f"{job}, {dtype}: {seconds:.1f} s", file=sys.stderr, flush=True)

    print(f"kernels ready in {warm_up(report):.1f} s")
    return 0


def info(args):
    """Print versions, threads and devices."""
    import numba
    from threadpoolctl import threadpool_info

    from fastdmf.backend import cuda_report, thread_limits

    rows = [("fastdmf", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in _REQUIRED:
        rows.append((package, metadata.version(package)))
    for package in _OPTIONAL:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed (optional)"))
    # numba chooses its threading layer when the first thread starts, which setting the number of threads does.
    with thread_limits():
        layer = numba.threading_layer()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows.append(("kernel threads", f"{numba.config.NUMBA_NUM_THREADS} of {cores} usable cores, layer {layer}"))
    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            rows.append(("BLAS", f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads"))
    wait = os.environ.get("OMP_WAIT_POLICY", "not set (passive is kinder to a busy machine)")
    rows.append(("OMP_WAIT_POLICY", wait))
    rows.append(("device cpu", f"available, {platform.machine()}"))
    rows.append(("device cuda", cuda_report()))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0
