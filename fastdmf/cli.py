"""The ``fastdmf`` command.

Exit codes: 0 done, 1 failed (one line on stderr says why; ``--debug`` shows the traceback), 2 wrong usage, 130
interrupted from the keyboard. Results go to stdout, progress to stderr. Everything slow is imported inside the
subcommand that needs it, so that ``--help`` and wrong usage answer at once.
"""

import argparse
import logging
import os
import platform
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

from fastdmf import __version__

__all__ = ["main"]

_REQUIRED = ("numpy", "scipy", "numba", "llvmlite", "scikit-learn", "threadpoolctl")
_OPTIONAL = ("matplotlib", "pillow", "pandas", "polars", "pyarrow")


def main(argv=None):
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the program's name; default those of the process.

    Raises
    ------
    SystemExit
        From argparse: 0 after ``--help`` and ``--version``, 2 on wrong usage.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return args.call(args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("\nfastdmf: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        text = str(error) or type(error).__name__
        print(f"fastdmf: error: {text} (--debug shows the traceback)", file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="fastdmf",
        description="Deep matrix factorization: fill the holes of a matrix, recover one from linear measurements.",
        epilog="The library itself is used from Python: fastdmf.DMFImputer, fastdmf.DMFSensing, fastdmf.solve.",
    )
    parser.add_argument("--version", action="version", version=f"fastdmf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    text = "fill the holes of a real elevation grid, beside scikit-learn's imputers"
    demo = commands.add_parser("demo", parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}.")
    demo.add_argument(
        "--out",
        type=_png,
        default=Path("fastdmf-demo.png"),
        metavar="FILE.png",
        help="picture to write (default: %(default)s in the current folder)",
    )
    demo.add_argument(
        "--hide", type=_fraction, default=0.5, metavar="F", help="fraction of the cells to hide (default: %(default)s)"
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="seed of the holes and the methods (default: %(default)s)"
    )
    demo.set_defaults(call=_demo)

    text = "compile the kernels ahead of the first fit"
    warmup = commands.add_parser(
        "warmup",
        parents=[common],
        help=text,
        description=f"{text[0].upper()}{text[1:]}, into numba's cache on disk; what is there already is only loaded.",
    )
    warmup.set_defaults(call=_warmup)

    text = "print versions, threads and devices"
    info = commands.add_parser("info", parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}.")
    info.set_defaults(call=_info)
    return parser


def _png(text):
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"the picture is a PNG: {text!r} should end in .png")
    return path


def _fraction(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.01 <= value <= 0.99:
        raise argparse.ArgumentTypeError(f"a number from 0.01 to 0.99 is needed, got {text!r}")
    return value


def _seed(text):
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"an integer from 0 to 2**32 - 1 is needed, got {text!r}")
    return value


def _demo(args):
    if util.find_spec("matplotlib") is None:
        hint = 'pip install "fastdmf[plot]"'
        raise RuntimeError(f"the demo takes its data and its picture from matplotlib, which is missing: {hint}")
    _check_writable(args.out)
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


def _check_writable(path):
    """Fail before the work is done, not after it."""
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"cannot write the picture {path}: {error.strerror}; choose another place with --out") from None


def _warmup(args):
    from fastdmf.warmup import warm_up

    def report(job, dtype, seconds):
        print(f"{job}, {dtype}: {seconds:.1f} s", file=sys.stderr, flush=True)

    print(f"kernels ready in {warm_up(report):.1f} s")
    return 0


def _info(args):
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


if __name__ == "__main__":
    sys.exit(main())
