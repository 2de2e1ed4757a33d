"""The GPU behind the backend's handle: what was found of it, compiled modules, captured steps, and its errors.

cupy is imported when the device is first asked for, and never by ``import fastdmf``. That its constructors succeed says
nothing: a device counts as found when a kernel was compiled for it and has run.
"""

import os
import time
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib import metadata

import numpy as np

__all__ = ["CudaBackend", "cuda_report", "find_cuda"]

_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
_INSTALL = 'pip install "fastdmf[cuda13]" or "fastdmf[cuda12]", whichever the driver serves'
# Of every architecture: above it a kernel has to be told.
_SHARED_BYTES = 48 << 10
_MOST_RUNS = 65_535  # blocks along the second and third dimension of a grid
_TRIAL = 'extern "C" __global__ void fastdmf_trial(int* out) { out[threadIdx.x] = threadIdx.x * 3 + 1; }'


def _installed():
    for package in _PACKAGES:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return "cupy"


@lru_cache(maxsize=1)
def find_cuda():
    """Return (cupy or None, sentence): whether a GPU computes here, tried once per process.

    ``FASTDMF_DEVICE=cpu`` in the environment hides it.
    """
    if os.environ.get("FASTDMF_DEVICE", "").lower() == "cpu":
        return None, "hidden by FASTDMF_DEVICE=cpu"
    try:
        import cupy
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        return None, f"cupy is {'not installed' if missing else f'broken ({error})'}: {_INSTALL}"
    found = _installed()
    if not cupy.is_available():
        return None, f"{found} found, no device: {_why_not(cupy)}"
    try:
        kernel = cupy.RawModule(code=_TRIAL, options=("-std=c++17",)).get_function("fastdmf_trial")
        out = cupy.zeros(32, np.int32)
        kernel((1,), (32,), (out,))
        if cupy.asnumpy(out).tolist() != list(range(1, 97, 3)):
            return None, f"{found} found, but a kernel computed nonsense on its device"
    except (RuntimeError, ImportError, cupy.cuda.compiler.CompileException) as error:
        return None, f"{found} found, but a kernel could not be compiled and run: {_one_line(error)}"
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name, (free, total) = properties["name"].decode(), cupy.cuda.runtime.memGetInfo()
    capability = f"{properties['major']}.{properties['minor']}"
    return cupy, f"{name}, compute capability {capability}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {found}"


def _why_not(cupy):
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        return _one_line(error)
    return f"{count} devices, none of which can be used"


def _one_line(error):
    return " ".join(str(error).split())[:300]


def cuda_report():
    """Say in one sentence what was found of CUDA."""
    cupy, sentence = find_cuda()
    return sentence if cupy is None else f"available, {sentence}"


class _Module:
    """A family's kernels as cupy has them; ``launch`` as ``fastdmf.kernels.cuda`` wants it."""

    def __init__(self, cupy, text, options):
        # The text is whole, so that cupy's cache on disk, which looks at it and the options, is never stale.
        self._raw = cupy.RawModule(code=text, options=("-std=c++17", *options))
        self._functions = {}

    def launch(self, kernel, grid, block, arguments, *, shared=0):
        if kernel not in self._functions:
            self._functions[kernel] = self._raw.get_function(kernel)
        function = self._functions[kernel]
        if shared > _SHARED_BYTES and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        if len(grid) > 1 and max(grid[1:]) > _MOST_RUNS:
            raise ValueError(
                f"a batch of {max(grid[1:]):,} runs is more than a launch takes, {_MOST_RUNS:,}: use fewer"
            )
        pointers = tuple(np.uint64(0) if a is None else a for a in arguments)
        function(grid, block, pointers, shared_mem=shared)


class _Captured:
    """A step as a graph: done plainly once, noted the second time, and replayed from then on.

    The step must do all with arrays: whatever it reads and changes stays where it is. Its scratch comes from a pool of
    its own, whose blocks nobody else gets while the graph lives; the first, plain step fills it.
    """

    def __init__(self, backend, step):
        self._backend, self._step, self._graph, self._done = backend, step, None, 0
        self._pool = backend.xp.cuda.MemoryPool()

    def __call__(self):
        cuda = self._backend.xp.cuda
        if self._graph is None:
            with cuda.using_allocator(self._pool.malloc):
                if self._done == 0:
                    self._step()
                else:
                    stream = self._backend.stream
                    stream.begin_capture()
                    try:
                        self._step()
                    finally:
                        self._graph = stream.end_capture()
            self._done += 1
        if self._graph is not None:
            self._graph.launch(self._backend.stream)


class CudaBackend:
    """As ``fastdmf.backend.Backend``, for one GPU.

    Attributes
    ----------
    name : str
        ``"cuda"``.
    xp : module
        cupy.
    compile_seconds : float
        Spent on modules so far: in NVRTC, or in cupy's cache on disk.
    """

    name = "cuda"

    def __init__(self, cupy):
        self.xp, self.compile_seconds = cupy, 0.0

    @cached_property
    def kernels(self):
        """The kernels' table."""
        from fastdmf.kernels.cuda.table import CudaKernels

        return CudaKernels(self.xp, self._compile)

    @cached_property
    def stream(self):
        """The stream of all that solvers do: one that can be captured."""
        return self.xp.cuda.Stream(non_blocking=True)

    def _compile(self, family, text, options):
        begin = time.perf_counter()
        module = _Module(self.xp, text, options)
        self.compile_seconds += time.perf_counter() - begin
        return module

    def asarray(self, a, dtype=None):
        """Return ``a`` (of the host, or of any library's on the device) as a C-contiguous array of ``xp``."""
        from fastdmf.arrays import as_cupy, is_on_device

        a = as_cupy(a) if is_on_device(a) else np.ascontiguousarray(a, dtype)
        return self.xp.ascontiguousarray(self.xp.asarray(a, dtype))

    def host(self, *arrays):
        """Return device arrays as NumPy's, one or a tuple; small ones of one precision in one copy.

        What is NumPy's already stays as it is.
        """
        xp = self.xp
        away = [a for a in arrays if isinstance(a, xp.ndarray)]
        if len(away) > 1 and len({a.dtype for a in away}) == 1 and sum(a.nbytes for a in away) < 1 << 16:
            packed = xp.asnumpy(xp.concatenate([a.reshape(-1) for a in away]))
            parts = iter(np.split(packed, np.cumsum([a.size for a in away])[:-1]))
            out = [next(parts).reshape(a.shape) if isinstance(a, xp.ndarray) else a for a in arrays]
        else:
            out = [xp.asnumpy(a) if isinstance(a, xp.ndarray) else a for a in arrays]
        return out[0] if len(out) == 1 else tuple(out)

    def captured(self, step):
        """Return what does the same as ``step()``, by a graph from the third call on."""
        return _Captured(self, step)

    @contextmanager
    def session(self):
        """Compute on the backend's stream; out of memory is told with the bytes.

        What the caller's stream has in hand is waited for at the start, and the results at the end.
        """
        cuda = self.xp.cuda
        cuda.get_current_stream().synchronize()
        try:
            with self.stream:
                yield
                self.stream.synchronize()
        except cuda.memory.OutOfMemoryError as error:
            free, total = cuda.runtime.memGetInfo()
            raise MemoryError(
                f"device='cuda' has no room: {_one_line(error)}; {free:,} of {total:,} bytes of the device are free. "
                "A smaller width, dtype='float32', fewer runs at once, or device='cpu' need less; "
                "cupy.get_default_memory_pool().free_all_blocks() gives back what other work left in the pool"
            ) from None
