"""A double of cupy on NumPy and the emulator: what runs on a GPU runs on it, line by line, where there is none.

Arrays are NumPy's behind a wrapper that refuses what cupy refuses: NumPy arrays beside its own, implicit conversion to
them, and anything that waits for the device while a stream is captured. ``np.f(x)`` goes to ``f`` here, as cupy has
it. A captured stream notes every operation with its arrays and does none; a graph does them, on the same arrays.
Kernels of a ``RawModule`` are compiled by g++ and run by ``cuda_emulator``, with its guard bands. ``syncs`` counts how
often the host waited. Functions are NumPy's of the same name; ``test_cuda_backend.py`` looks that cupy has those that
are used.
"""

import contextlib
import time
import types

import cuda_emulator
import numpy as np

__all__ = ["Double", "ndarray"]

_STATE = types.SimpleNamespace(capture=None, syncs=0, used=set(), order="forward", kernels=set())
# Kernels have no place in an emulated memory of this size unless a test lowers it.
_MEMORY = types.SimpleNamespace(limit=1 << 40)


class OutOfMemoryError(MemoryError):
    """As cupy's."""


def _sync():
    if _STATE.capture is not None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")
    _STATE.syncs += 1


def _bare(value):
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}: a NumPy array beside the device's")
    if isinstance(value, (list, tuple)):
        return type(value)(_bare(v) for v in value)
    return value


def _wrap(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(np.asarray(value))
    if isinstance(value, (tuple, list)):
        return type(value)(_wrap(v) for v in value) if type(value) in (tuple, list) else tuple(map(_wrap, value))
    return value


def _arrays(value):
    if isinstance(value, np.ndarray):
        return [value]
    return [a for v in value for a in _arrays(v)] if isinstance(value, (tuple, list)) else []


def _do(function, *args, **kwargs):
    """Call a NumPy function on wrapped arrays, and note it while a stream is captured."""
    args, kwargs = _bare(args), {name: _bare(v) for name, v in kwargs.items()}
    if _STATE.capture is not None and (function is np.copyto or kwargs.get("out") is not None):
        _STATE.capture.append(lambda: function(*args, **kwargs))
        return _wrap(kwargs.get("out"))
    out = function(*args, **kwargs)
    out = np.asarray(out) if isinstance(out, np.generic) else out
    results, given = _arrays(out), _arrays([args, list(kwargs.values())])
    if sum(a.nbytes for a in results) > _MEMORY.limit:
        raise OutOfMemoryError(f"Out of memory allocating {sum(a.nbytes for a in results):,} bytes")
    views = all(any(np.may_share_memory(a, b) for b in given) for a in results)
    if _STATE.capture is not None and not views:
        # What was computed now is new memory, of which nobody has read yet; a graph fills it again.
        def again():
            new = function(*args, **kwargs)
            for a, b in zip(results, _arrays(np.asarray(new) if isinstance(new, np.generic) else new), strict=True):
                a[...] = b

        _STATE.capture.append(again)
        for a in results:
            a[...] = 0 if a.dtype.kind in "iub" else np.nan
    return _wrap(out)


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """Wraps one NumPy array."""

    __slots__ = ("_a",)

    def __init__(self, a):
        self._a = a

    for _name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides"):
        exec(f"{_name} = property(lambda self: self._a.{_name})")
    for _name in ("reshape", "swapaxes", "transpose", "ravel", "view"):
        exec(f"def {_name}(self, *args, **kw): return _do(lambda a, *p: a.{_name}(*p, **kw), self, *args)")
    for _name in ("astype", "copy", "sum", "max", "min", "mean", "any", "all", "argmax", "argmin", "argsort", "cumsum"):
        exec(f"def {_name}(self, *args, **kw): return _do(lambda a, *p, **k: a.{_name}(*p, **k), self, *args, **kw)")
    del _name

    @property
    def T(self):
        return self.transpose()

    @property
    def flags(self):
        return types.SimpleNamespace(c_contiguous=self._a.flags.c_contiguous, f_contiguous=self._a.flags.f_contiguous)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self._a.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        shape, dtype = self.shape, self.dtype
        return {"shape": shape, "typestr": dtype.str, "data": (self._a.ctypes.data, False), "version": 3}

    def fill(self, value):
        self[...] = value

    def get(self):
        _sync()
        return self._a.copy()

    def set(self, value):
        _sync()
        if not isinstance(value, np.ndarray) or value.dtype != self.dtype or value.shape != self.shape:
            raise TypeError("set takes a NumPy array of the same type and shape")
        self._a[...] = value

    def item(self):
        _sync()
        return self._a.item()

    def tolist(self):
        _sync()
        return self._a.tolist()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    __index__ = __int__

    def __bool__(self):
        return bool(self.item())

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        if isinstance(key, ndarray) and key.dtype == bool:
            _sync()  # how many there are, the host must know
        return _do(lambda a, k: a[k], self, key)

    def __setitem__(self, key, value):
        key, value, a = _bare(key), _bare(value), self._a
        if _STATE.capture is None:
            a[key] = value
        else:
            _STATE.capture.append(lambda: a.__setitem__(key, value))

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__":
            return NotImplemented
        if "out" in kwargs and isinstance(kwargs["out"], tuple):
            (kwargs["out"],) = kwargs["out"]
        if not set(kwargs) <= {"out", "dtype", "casting"}:
            raise TypeError(f"Wrong arguments {kwargs}")
        return getattr(_functions, ufunc.__name__)(*inputs, **kwargs)

    def __array_function__(self, function, types_, args, kwargs):
        module = _functions.linalg if "linalg" in function.__module__ else _functions
        return getattr(module, function.__name__)(*args, **kwargs)


# Names that are used on device arrays; cupy has all of them, with NumPy's meaning.
_CREATING = ("empty", "zeros", "ones", "full", "arange", "eye")
_UFUNCS = (
    *("add", "subtract", "multiply", "divide", "true_divide", "negative", "power", "sqrt", "square", "abs", "absolute"),
    *("maximum", "minimum", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "isfinite", "sign"),
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "invert", "exp", "log", "matmul"),
    *("floor_divide", "log1p", "expm1", "remainder"),
)
_PLAIN = (
    *("where", "clip", "einsum", "vdot", "dot", "concatenate", "stack", "broadcast_to", "copyto", "sum", "cumsum"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "tile", "repeat", "searchsorted", "bincount", "any", "all"),
    *("argsort", "ascontiguousarray", "diagonal", "fill_diagonal", "take", "outer", "average", "mean", "diff", "trace"),
    *("expand_dims", "max", "min", "abs", "swapaxes", "squeeze", "reshape", "array_equal", "amax", "flip", "pad"),
)
_LINALG = ("qr", "svd", "eigh", "cholesky", "norm", "solve", "inv")


class _Functions:
    def __init__(self, names, home):
        self._names, self._home = names, home

    def __getattr__(self, name):
        if name not in self._names:
            raise AttributeError(f"the double of cupy has no {name}")
        _STATE.used.add(name)
        function = getattr(self._home, name)
        if name == "abs":
            function = np.absolute
        return lambda *args, **kwargs: _do(function, *args, **kwargs)


_functions = _Functions({*_UFUNCS, *_PLAIN}, np)
_functions.linalg = _Functions(set(_LINALG), np.linalg)


class _Stream:
    def __init__(self, null=False, non_blocking=False):
        self._notes = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def synchronize(self):
        _sync()

    def begin_capture(self, mode=None):
        if _STATE.capture is not None:
            raise RuntimeError("a stream is captured already")
        _STATE.capture = self._notes = []

    def end_capture(self):
        _STATE.capture = None
        return _Graph(self._notes)

    def use(self):
        return self


class _Graph:
    def __init__(self, notes):
        self._notes = notes

    def launch(self, stream=None):
        for note in self._notes:
            note()

    def upload(self, stream=None):
        """Nothing."""


class _Kernel:
    def __init__(self, module, name):
        self._module, self._name, self.max_dynamic_shared_size_bytes = module, name, 48 << 10
        self._pointers = [p[0] for p in module._parameters(name)]

    def __call__(self, grid, block, args, *, shared_mem=0):
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: more dynamic shared memory than the kernel allows")
        bare = []
        for value, pointer in zip(args, self._pointers, strict=True):
            if pointer:
                null = isinstance(value, np.uint64) and value == 0
                if not (null or isinstance(value, ndarray)):
                    raise TypeError(f"{self._name}: a pointer is a device array or np.uint64(0), got {type(value)}")
                bare.append(None if null else value._a)
            else:
                bare.append(value)

        def launch():
            _STATE.kernels.add(self._name)
            self._module.launch(self._name, grid, block, bare, shared=shared_mem, order=_STATE.order, seed=3)

        if _STATE.capture is None:
            launch()
        else:
            _STATE.capture.append(launch)


class _RawModule:
    def __init__(self, code=None, *, options=(), backend="nvrtc", name_expressions=None):
        self._module = cuda_emulator.Module(code, [o for o in options if o.startswith("-D")], name="double")

    def get_function(self, name):
        return _Kernel(self._module, name)


class _Event:
    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        _sync()


class _Pool:
    def malloc(self, size):
        raise NotImplementedError

    def free_all_blocks(self):
        """Nothing."""

    def total_bytes(self):
        return 0

    used_bytes = total_bytes


class Double(types.ModuleType):
    """The module: put it at ``sys.modules["cupy"]``."""

    def __init__(self, *, available=True):
        super().__init__("cupy")
        self.__version__, self.ndarray, self.state, self.memory = "14.2.0", ndarray, _STATE, _MEMORY
        self.linalg, self.RawModule, self._available = _functions.linalg, _RawModule, available
        pool = _Pool()
        self.get_default_memory_pool = lambda: pool
        self.cuda = types.SimpleNamespace(
            Stream=_Stream,
            Graph=_Graph,
            MemoryPool=_Pool,
            using_allocator=contextlib.nullcontext,
            get_current_stream=_Stream,
            Event=_Event,
            get_elapsed_time=lambda first, last: 1e3 * (last.time - first.time),
            is_available=self.is_available,
            runtime=types.SimpleNamespace(
                getDeviceCount=self._count,
                CUDARuntimeError=RuntimeError,
                driverGetVersion=lambda: 12090 if available else 0,
                memGetInfo=lambda: (_MEMORY.limit, _MEMORY.limit),
                getDeviceProperties=lambda _: {"name": b"double", "major": 9, "minor": 0},
            ),
            compiler=types.SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            Device=lambda *_: types.SimpleNamespace(
                id=0, compute_capability="90", attributes={"MaxSharedMemoryPerBlockOptin": 227 << 10}
            ),
        )

    def is_available(self):
        return self._available

    def _count(self):
        if not self._available:
            raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime")
        return 1

    def __getattr__(self, name):
        if name in _CREATING:
            _STATE.used.add(name)
            return lambda *args, **kwargs: _do(getattr(np, name), *args, **kwargs)
        return getattr(_functions, name)

    def asnumpy(self, a, **kwargs):
        return a.get() if isinstance(a, ndarray) else np.asarray(a)

    def asarray(self, a, dtype=None):
        return self.array(a, dtype, copy=None)

    def array(self, a, dtype=None, copy=True):
        if isinstance(a, ndarray):
            return a if not copy and (dtype is None or a.dtype == dtype) else a.astype(dtype or a.dtype)
        _sync()
        a = np.array(_bare(a) if not isinstance(a, np.ndarray) else a, dtype, order="C")
        if a.nbytes > _MEMORY.limit:
            raise OutOfMemoryError(f"Out of memory allocating {a.nbytes:,} bytes")
        return ndarray(a)

    def from_dlpack(self, a):
        return ndarray(np.from_dlpack(a))

    def get_array_module(self, *arrays):
        return self if any(isinstance(a, ndarray) for a in arrays) else np
