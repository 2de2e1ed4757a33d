"""Gaussian and sign measurements that are drawn from a seed whenever they are needed, and never stored."""

from contextlib import nullcontext
from copy import copy

import numpy as np

from fastdmf.backend import get_backend, thread_limits
from fastdmf.contract import Bound, Operator, check_shape

__all__ = ["GaussianSeeded"]

_ENSEMBLES = ("gaussian", "rademacher")


def _check_whole(name, value, limit, low=0):
    """Return ``value`` as an integer from ``low`` to ``limit``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= limit:
        raise ValueError(f"{name} must be from {low} to {limit}, got {value}")
    return int(value)


class GaussianSeeded(Operator):
    """Measurements <A_i, X> with independent random A_i that a seed defines and nobody stores.

    Parameters
    ----------
    seed : int
        64 bits, 0 to 2^64 - 1.
    m : int
        Number of measurements, up to 2^32.
    shape : tuple of int
        (n1, n2), with n1 n2 up to 2^34.
    ensemble : {"gaussian", "rademacher"}
        Standard normal entries, or independent signs: 1 or -1, drawn about seven times as fast.
    problem : int
        32 bits: independent measurements under the same seed, for sweeps.

    Attributes
    ----------
    index : ndarray of shape (m,), uint32
        The rows of the seed's matrix that the measurements are: 0 .. m - 1, or what :meth:`restrict` left of them.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind or not in its range.

    Notes
    -----
    Entry (r, c) of A_i is column n2 r + c of row ``index[i]`` of a matrix drawn by Philox4x32-10 [1]_ with the seed as
    its key and (block of columns, 0, row, problem) as its counter; ``fastdmf.kernels.cpu.philox`` defines the formats
    ``gauss-v1`` and ``rademacher-v1`` to the bit. Entries are float32 numbers, the same for every precision, batch,
    restriction, machine and number of threads; sums are in the precision of X.

    An evaluation draws every entry once and uses it for the residual and for the adjoint; runs of a batch share it.
    It takes 1.0 ns an entry and core, 0.16 with signs, where dense float32 measurements take 0.2 from memory, and no
    memory for A: of use where A does not fit. :meth:`squared_norms`, which the self-tuned rule asks for once, draws
    everything once more and keeps the norms; binding draws nothing.

    References
    ----------
    .. [1] J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """

    def __init__(self, seed, m, shape, *, ensemble="gaussian", problem=0):
        self.seed = _check_whole("seed", seed, 2**64 - 1)
        self.size = _check_whole("m", m, 2**32, low=1)
        self.shape = check_shape(shape)
        n1, n2 = self.shape
        if n1 * n2 > 2**34:
            raise ValueError(f"shape may have 2^34 entries, columns of the random matrix; {self.shape} has {n1 * n2}")
        if ensemble not in _ENSEMBLES:
            raise ValueError(f"ensemble must be 'gaussian' or 'rademacher', got {ensemble!r}")
        self.ensemble = ensemble
        self.problem = _check_whole("problem", problem, 2**32 - 1)
        self.index = np.arange(self.size, dtype=np.uint32)
        self._norms = None

    def apply(self, x):
        drawing = self._drawing(x)
        drawing.matrix[0] = np.reshape(x, self.shape)
        with drawing.turn():
            return drawing.forward()[0]

    def adjoint(self, r):
        drawing = self._drawing(r)
        r = np.ascontiguousarray(r, drawing.x.dtype).reshape(1, self.size)
        with drawing.turn():
            return drawing.adjoint(r)[0].copy()

    def restrict(self, index):
        part = copy(self)
        part.index = self.index[index]
        part.size = len(part.index)
        part._norms = None if self._norms is None else self._norms[index]
        return part

    def matrices(self, index):
        """Return the measurement matrices ``index`` of this operator.

        Parameters
        ----------
        index : int, slice or array
            Anything that selects from m things.

        Returns
        -------
        a : ndarray of shape (n1, n2) for an integer, else (k, n1, n2); float32
        """
        rows = self.index[index]
        kernels = get_backend("cpu").kernels
        out = np.empty((rows.size, self.shape[0] * self.shape[1]), np.float32)
        scratch = kernels.seeded_scratch(1, kernels.seeded_width(out.shape[1]), self.ensemble)
        kernels.seeded_entries(out, np.atleast_1d(rows), self.stream(), scratch)
        return out.reshape(rows.shape + self.shape)

    def squared_norms(self):
        if self._norms is None:
            norms = np.full(self.size, float(self.shape[0] * self.shape[1]))
            if self.ensemble == "gaussian":
                drawing = _Drawing(self, get_backend("cpu").kernels, 1, np.float32)
                with thread_limits():
                    drawing.squared_norms(norms)
            self._norms = norms
        return self._norms.copy()

    def stream(self):
        """Return what the kernels know of the seed."""
        return get_backend("cpu").kernels.seeded_stream(self.seed, self.problem)

    def _drawing(self, array):
        dtype = np.float32 if np.asarray(array).dtype == np.float32 else np.float64
        return _Drawing(self, get_backend("cpu").kernels, 1, dtype)

    def _bound_on(self, backend):
        if backend.name == "cpu":
            return _BoundSeeded
        from fastdmf.device_bounds import DeviceSeeded

        return DeviceSeeded


class _Drawing:
    """An operator's measurements, ready for the kernels at one batch and precision.

    ``matrix`` (B, n1, n2) is where X is written; ``gradient``, of the same shape, where adjoints come out.
    """

    # Numbers drawn under which the parallel region costs more than it saves.
    _SERIAL_BELOW = 100_000
    # Ranges of measurements with a gradient and a scratch of their own, added in order: the same bits for any number of
    # threads. As many as keep many cores busy, while they have work and little memory.
    _N_RANGES, _PER_RANGE, _MEMORY = (4, 64), 16, 1 << 25

    def __init__(self, operator, kernels, batch, dtype):
        self.kernels, self.index = kernels, operator.index
        self.stream = operator.stream()
        self.columns = operator.shape[0] * operator.shape[1]
        width = kernels.seeded_width(self.columns)
        self.parallel = batch * operator.size * width >= self._SERIAL_BELOW
        fewest, ranges = self._N_RANGES
        while ranges > fewest and (
            ranges * self._PER_RANGE > operator.size or ranges * (batch + 2) * width > self._MEMORY
        ):
            ranges //= 2
        ranges = ranges if self.parallel else 1
        self.scratch = kernels.seeded_scratch(ranges, width, operator.ensemble)
        self.partial = kernels.aligned_empty((ranges, batch, width), dtype)
        self.x, self.g = (kernels.aligned_empty((batch, width), dtype) for _ in range(2))
        self.x[:, self.columns :] = 0
        self.matrix, self.gradient = (a[:, : self.columns].reshape(batch, *operator.shape) for a in (self.x, self.g))

    def turn(self):
        """Return the context that a call from outside a solve needs: Python threads may enter together."""
        return thread_limits() if self.parallel else nullcontext()

    def loss_pull(self, y, weights, loss):
        """Return the losses, (B,) float64; the adjoint is in ``gradient``."""
        losses = np.empty(len(self.x))
        arguments = (self.g, losses, self.x, y, weights, loss.code, loss.delta, self.index, self.stream)
        if self.parallel:
            self.kernels.seeded_loss_pull(*arguments, self.partial, self.scratch)
        else:
            self.kernels.seeded_loss_pull_serial(*arguments, self.scratch)
        return losses

    def adjoint(self, r):
        if self.parallel:
            self.kernels.seeded_adjoint(self.g, r, self.index, self.stream, self.partial, self.scratch)
        else:
            self.kernels.seeded_adjoint_serial(self.g, r, self.index, self.stream, self.scratch)
        return self.gradient

    def forward(self):
        out = np.empty((len(self.x), len(self.index)), self.x.dtype)
        kernels = self.kernels
        forward = kernels.seeded_forward if self.parallel else kernels.seeded_forward_serial
        forward(out, self.x, self.index, self.stream, self.scratch)
        return out

    def squared_norms(self, out):
        self.kernels.seeded_squared_norms(out, self.columns, self.index, self.stream, self.scratch)


class _BoundSeeded(Bound):
    """Seeded measurements: the fused kernel, which shares what it draws among the batch."""

    compiled = True
    _drawing = None

    def _for(self, batch):
        if self._drawing is None or len(self._drawing.x) != batch:
            self._drawing = _Drawing(self.operator, self.backend.kernels, batch, self.dtype)
        return self._drawing

    def loss_and_adjoint(self, x, out):
        drawing = self._for(len(x))
        drawing.matrix[:] = x
        losses = drawing.loss_pull(self.y, self.weights, self.loss)
        out[:] = drawing.gradient
        return losses

    def forward(self, p, qt):
        drawing = self._for(len(p))
        np.matmul(p, qt.swapaxes(1, 2), out=drawing.matrix)
        return drawing.forward()

    def pull(self, r, p, qt):
        g = self._for(len(p)).adjoint(np.ascontiguousarray(r, self.dtype))
        return g @ qt, g.swapaxes(1, 2) @ p
