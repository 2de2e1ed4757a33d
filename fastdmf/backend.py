"""The array module and the compiled kernels behind one handle, and the threads they may use.

Everything above this file takes arrays from ``backend.xp`` and loops from ``backend.kernels``; a second backend is
one more ``Backend`` value, not a second program. BLAS runs on one thread inside a solve: its threaded products
split a matrix by the number of threads, so that their last bits depend on it, while the kernels split by fixed
ranges and give the same bits for every thread count.
"""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, metadata
from threading import Lock, RLock
from types import SimpleNamespace

import numpy as np

__all__ = ["Backend", "compile_clock", "cuda_report", "get_backend", "thread_limits"]


@dataclass(frozen=True)
class Backend:
    """One place to compute: its name, its array module and its kernels.

    Attributes
    ----------
    name : str
        ``"cpu"``.
    xp : module
        numpy, or a module with numpy's interface.
    """

    name: str
    xp: object

    @cached_property
    def kernels(self):
        """The kernel module; loaded on first use, since compiling backends are slow to import."""
        return import_module(f"fastdmf.kernels.{self.name}")


_CPU = Backend("cpu", np)
_workqueue = RLock()
_blas = SimpleNamespace(lock=Lock(), users=0, controller=None, limiter=None)


def cuda_report():
    """Say in one sentence what was found of CUDA."""
    for package in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        return f"{package} {version} is installed, but this release of fastdmf does not launch its CUDA kernels yet"
    return "cupy is not installed, and this release of fastdmf does not launch its CUDA kernels yet"


def get_backend(device="auto"):
    """Return the backend for ``device``.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        A device that is asked for and missing is an error, never a silent fallback.

    Raises
    ------
    RuntimeError
        If ``device="cuda"`` cannot be served; the message says what was found.
    ValueError
        If the name is unknown.
    """
    if device in ("auto", "cpu"):
        return _CPU
    if device == "cuda":
        raise RuntimeError(f"device='cuda' is not available: {cuda_report()}. Use device='cpu' or 'auto'.")
    raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")


@contextmanager
def compile_clock():
    """Measure a block's seconds, those of waiting for kernels apart: importing, compiling, loading from the cache.

    Yields an object whose ``seconds`` and ``compile_seconds`` are set at the end. What other threads compile meanwhile
    counts as well.
    """
    clock = SimpleNamespace(seconds=0.0, compile_seconds=0.0)
    begin = time.perf_counter()
    get_backend().kernels  # noqa: B018  the import, which takes most of a second the first time
    imported = time.perf_counter() - begin
    from numba.core import event

    # Held around every compilation and every look into the cache.
    listener = event.TimingListener()
    try:
        with event.install_listener("numba:compiler_lock", listener):
            yield clock
    finally:
        clock.compile_seconds = imported + (listener.duration if listener.done else 0.0)
        clock.seconds = time.perf_counter() - begin - clock.compile_seconds


@contextmanager
def _single_blas_thread():
    """Limit BLAS to one thread while at least one solve runs.

    The limit is the process's, not the thread's: the first solve in sets it and the last one out puts it back.
    """
    # Products inside compiled kernels are scipy's BLAS, which must be loaded before it can be limited.
    import scipy.linalg.cython_blas  # noqa: F401
    from threadpoolctl import ThreadpoolController

    with _blas.lock:
        if _blas.users == 0:
            # The libraries are looked for once: that takes as long as many a small call.
            _blas.controller = _blas.controller or ThreadpoolController()
            _blas.limiter = _blas.controller.limit(limits=1, user_api="blas")
        _blas.users += 1
    try:
        yield
    finally:
        with _blas.lock:
            _blas.users -= 1
            if _blas.users == 0:
                _blas.limiter.restore_original_limits()


@contextmanager
def thread_limits(n_threads=None):
    """Run the kernels on ``n_threads`` threads (None: all that numba may use) and BLAS on one.

    Both settings are put back at the end; Python threads may enter at the same time.

    Raises
    ------
    ValueError
        If ``n_threads`` is not a positive integer.
    """
    if n_threads is not None and (
        isinstance(n_threads, bool) or not isinstance(n_threads, (int, np.integer)) or n_threads < 1
    ):
        raise ValueError(f"n_threads must be a positive integer or None, got {n_threads!r}")
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(before if n_threads is None else min(int(n_threads), numba.config.NUMBA_NUM_THREADS))
    # numba's own layer, which serves where neither OpenMP nor TBB is found, kills a process whose threads enter it
    # together: there, solves wait for each other. (The layer is known once the number of threads is set.)
    turn = _workqueue if numba.threading_layer() == "workqueue" else nullcontext()
    try:
        with turn, _single_blas_thread():
            yield
    finally:
        numba.set_num_threads(before)
