"""The array module and the compiled kernels behind one handle, and the threads they may use.

Everything above this file takes arrays from ``backend.xp`` and loops from ``backend.kernels``; the GPU is a second
handle with the same methods (``fastdmf.cuda``), not a second program. BLAS runs on one thread inside a solve: its
threaded products split a matrix by the number of threads, so that their last bits depend on it, while the kernels split
by fixed ranges and give the same bits for every thread count.
"""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from threading import Lock, RLock
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from fastdmf.arrays import as_host, is_on_device
from fastdmf.cuda import CudaBackend, cuda_report, find_cuda

__all__ = ["Backend", "compile_clock", "cuda_report", "get_backend", "thread_limits"]


@dataclass(frozen=True)
class Backend:
    """One place to compute: its name, its array module and its kernels.

    Attributes
    ----------
    name : str
        ``"cpu"``.
    xp : module
        numpy.
    """

    name: str
    xp: object

    compile_seconds: ClassVar = 0.0  # numba tells that itself

    @cached_property
    def kernels(self):
        """The kernel module; loaded on first use, since compiling backends are slow to import."""
        return import_module(f"fastdmf.kernels.{self.name}")

    def asarray(self, a, dtype=None):
        """Return ``a`` as a C-contiguous array of ``xp``, from wherever it lives."""
        return np.ascontiguousarray(as_host(a), dtype)

    def host(self, *arrays):
        """Return arrays of ``xp`` as NumPy's: one, or a tuple."""
        return arrays[0] if len(arrays) == 1 else arrays

    def captured(self, step):
        """Return what does the same as ``step()`` and may cost less from the third call on."""
        return step

    def session(self):
        """Return the context in which a solver computes."""
        return nullcontext()


_CPU = Backend("cpu", np)
_workqueue = RLock()
_blas = SimpleNamespace(lock=Lock(), users=0, controller=None, limiter=None)


@lru_cache(maxsize=1)
def _cuda():
    cupy, sentence = find_cuda()
    if cupy is None:
        raise RuntimeError(f"device='cuda' is not available: {sentence}. Use device='cpu' or 'auto'.")
    return CudaBackend(cupy)


def get_backend(device="auto", *data):
    """Return the backend for ``device``.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        A device that is asked for and missing is an error, never a silent fallback. "auto" is the CPU, and the GPU for
        data that are there.
    *data
        What will be computed with.

    Raises
    ------
    RuntimeError
        If ``device="cuda"`` cannot be served; the message says what was found.
    ValueError
        If the name is unknown.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" or (device == "auto" and any(is_on_device(a) for a in data)):
        return _cuda()
    return _CPU


@contextmanager
def compile_clock(backend=_CPU):
    """Measure a block's seconds, those of waiting for kernels apart: importing, compiling, loading from the cache.

    Yields an object whose ``seconds`` and ``compile_seconds`` are set at the end. What other threads compile meanwhile
    counts as well.
    """
    clock = SimpleNamespace(seconds=0.0, compile_seconds=0.0)
    begin = time.perf_counter()
    compiled = backend.compile_seconds
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
        clock.compile_seconds += backend.compile_seconds - compiled
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
