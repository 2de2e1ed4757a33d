"""Many steps of small chains in one launch: a block of the device for each run, its factors in shared memory.

What it saves is launches and traffic: by arithmetic a step of a 100 x 100 chain of depth 3 takes 38 us in one block and
0.3 us a run where 132 run at a time (``kernels/cuda/small_chain.cu``), while six products of the whole batch by cuBLAS
read and write three matrices each, 0.7 MB a run and step. One run alone is left to the captured graph, which has the
whole device for it.
"""

import numpy as np

from fastdmf.device_bounds import DeviceMask

__all__ = ["PersistentChain"]

_RUNS = 16  # of a batch, from which blocks beat one graph; narrower chains are bound by launches in any number
_NARROW = 48


class PersistentChain:
    """A fixed rule's steps on small masks.

    Parameters
    ----------
    problem : fastdmf.problem.Problem
    rule : Rule
        With a ``persistent`` name.
    state : State
        At its start: what the rule remembers is zero.
    """

    def __init__(self, problem, rule, state):
        self.problem, self.rule = problem, rule
        backend, layout, runs = problem.backend, problem.layout, problem.batch
        self._kernels = backend.kernels
        self._plan = self._kernels.small_chain_plan(layout.dims, layout.offsets, state.x.dtype, rule.persistent)
        xp, bound = backend.xp, problem.bound
        self._entries = tuple(None if a is None else backend.asarray(a) for a in _entries(bound, runs))
        self._steps, self._status = xp.zeros(runs, np.int64), xp.zeros(runs, np.int32)
        self._losses, self._scratch = xp.empty(runs), xp.zeros_like(state.x)
        self._lr = xp.full(runs, float(rule.lr))
        self._factors = backend.asarray(2 * problem.scale, state.x.dtype)
        self._endless = xp.full(runs, 1.0), xp.full(runs, np.inf)
        # The state's mean counts the gradient at its point, where the next launch begins.
        self._mean_square = xp.zeros(runs) if rule.persistent == "group_rmsprop" else None
        self._done = 0

    @staticmethod
    def of(problem, rule, state):
        """Return the chain where these are its kind of problem and rule, else None."""
        layout, backend = problem.layout, problem.backend
        if backend.name == "cpu" or rule.persistent is None or problem.l2 or problem.penalties or layout.symmetric:
            return None
        if not isinstance(problem.bound, DeviceMask):
            return None
        if problem.batch < _RUNS and max(layout.dims) > _NARROW:
            return None
        if not backend.kernels.small_chain_fits(layout.dims, layout.offsets, state.x.dtype, rule.persistent):
            return None
        return PersistentChain(problem, rule, state)

    def take(self, keep, problem, state):
        """Return the chain of the slices ``keep`` (an index array), whose problem and state are given."""
        part = PersistentChain(problem, self.rule, state)
        part._done = self._done
        part._steps += self._done
        if self._mean_square is not None:
            part._mean_square = self._mean_square[self.problem.backend.asarray(keep)]
        return part

    def __call__(self, state, steps):
        """Take ``steps`` steps of all runs and evaluate the points that they lead to."""
        problem, rule = self.problem, self.rule
        self._status[...] = 0
        total = self._done + steps
        velocity = getattr(state, "velocity", None)
        arrays = state.x, self._scratch, velocity, self._mean_square, self._steps, self._status, self._losses
        numbers = self._lr, self._factors, *self._endless
        loss = problem.bound.loss.code, problem.bound.loss.delta
        beta, eps = getattr(rule, "beta", 0.0), getattr(rule, "eps", 0.0)
        settings = beta, eps, -1.0, total, max(total, 1), steps
        self._kernels.small_chain(self._plan, *arrays, *numbers, *self._entries, *loss, *settings)
        self._done = total
        state.losses, state.objective = problem.evaluate(state.x, state.grad)
        # A run whose loss is NaN has stayed where it began.
        lost = self._status == self._kernels.DIVERGED
        state.losses, state.objective = (np.where(lost, np.inf, a) for a in (state.losses, state.objective))
        if self._mean_square is not None:
            state.count[...] = total
            state.mean_square[...] = self._mean_square
            rule._adapt(problem, state)


def _entries(bound, runs):
    """Return indptr (B, n1 + 1), indices, y and the weights of all runs' entries, those of weight zero left out."""
    op = bound.operator
    rows, cols = np.repeat(np.arange(op.shape[0]), np.diff(op.indptr)), op.indices[: op.size].astype(np.int32)
    y = np.broadcast_to(op.sort(bound.y), (runs, op.size))
    if bound.weights is None:
        kept, w = np.ones((runs, op.size), bool), None
    else:
        w = np.broadcast_to(op.sort(bound.weights), (runs, op.size))
        kept = w != 0
        w = None if (w[kept] == 1).all() else w[kept]
    run, entry = np.nonzero(kept)
    counts = np.zeros((runs, op.shape[0]), np.int64)
    np.add.at(counts, (run, rows[entry]), 1)
    ends = counts.cumsum().reshape(runs, -1)
    indptr = np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1)
    return indptr, cols[entry], np.ascontiguousarray(y[kept]), w
