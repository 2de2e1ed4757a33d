"""Continuation in depth: the minimiser of the depth-N penalty while N grows from 2 to infinity.

A balanced depth-N factorization penalises sum_k s_k^(2/N). Reweighted around X = U diag(s) V^T and smoothed at eps,
that is the quadratic form with inverse Y -> L Y R, L = U diag(max(s, eps) / eps)^q U^T + (I - U U^T), R alike, with
q = 1 - 1/N: 1/2 for depth 2 (the nuclear norm), 2/3 for depth 3, 1 for infinite depth (the log-determinant). A step
minimises it subject to A(X) = y. In the tangent space of the r modes above eps this is a ridge regression,

    g = argmin |y - A(T g)|^2 + unit (sum_ab C_ab^2 / (a_a a_b - 1) + sum_a (|M_a|^2 + |Z_a|^2) / (a_a - 1)),
    X = T g + A*(y - A(T g)) / unit,                a = (s / eps)^q,

exact by the Woodbury identity where A A* = unit I (masks). For dense and rank-one measurements it is an approximation
that costs nothing: weighting the data term by (A A*)^-1, which makes it exact, recovers as many instances as exactly
(bench/recovery.py sensing, "dense" and "dense, whitened"). Then eps shrinks and q grows: shrinking eps at infinite
depth from the start freezes wrong directions.
"""

from dataclasses import astuple, dataclass

import numpy as np

from fastdmf.arrays import is_on_device
from fastdmf.tangent import LowRank, Tangent, ridge_solve

__all__ = ["Continuation", "Schedule"]

_CG_TOL, _CG = 1e-3, 150
# Cells a measurement up to which X is formed on the CPU: there three products with it then cost less than three sparse
# passes. On a device both are few of the dozens of passes of a step.
_FULL_CELLS = 32


@dataclass(frozen=True)
class Schedule:
    """How the exponent grows and eps shrinks.

    Attributes
    ----------
    first, last : float
        The exponent q at the start and at the end.
    decay : float
        Of eps, a step.
    end : float
        The end of eps, relative to the largest singular value.
    """

    first: float = 0.5
    last: float = 1.0
    decay: float = 0.88
    end: float = 1e-4


class Continuation:
    """The state of one continuation: ``step`` until ``done``.

    Parameters
    ----------
    data : Measurements
    schedule : Schedule
    rng : numpy.random.Generator
        For the start of the singular vectors.

    Attributes
    ----------
    x : LowRank
        The leading part of the minimiser.
    eps : float
    exponent : float
        q of the last step.
    rank : int
        Modes above eps in the last step.
    """

    def __init__(self, data, schedule, rng):
        self.data, self.schedule = data, schedule
        n1, n2 = data.operator.shape
        # Ranks that the measurements could determine, and some more: the gap behind them names the rank.
        width = min(n1, n2, int(1.5 * data.operator.size / (n1 + n2)) + 2)
        xp = data.xp
        # Drawn on the host, so that every device starts alike.
        v = np.linalg.qr(xp.asarray(rng.standard_normal((n2, width))))[0]
        zero = Tangent(data, LowRank(xp.zeros((n1, 1)), np.zeros(1), xp.zeros((n2, 1))))
        self.x = LowRank(xp.zeros((n1, width)), np.zeros(width), v)
        for _ in range(4):  # nothing to start from yet: a few more rounds
            self._decompose(zero, zero.point)
        self.eps = self._start = self.x.s[0]
        self.exponent, self.rank, self.steps = schedule.first, 0, 0

    def snapshot(self):
        """Return what ``resumed`` needs."""
        numbers = {name: getattr(self, name) for name in ("eps", "_start", "exponent", "rank", "steps")}
        return {"schedule": astuple(self.schedule), "x": self.x.parts(), "numbers": numbers}

    @classmethod
    def resumed(cls, data, snapshot):
        """Return the continuation that a snapshot was taken of."""
        path = cls.__new__(cls)
        path.data, path.schedule, path.x = data, Schedule(*snapshot["schedule"]), LowRank.of(snapshot["x"], data.xp)
        for name, value in snapshot["numbers"].items():
            setattr(path, name, value)
        return path

    @property
    def done(self):
        return self.eps <= self.schedule.end * self.x.s[0]

    def step(self):
        """Do one step."""
        schedule, s, xp = self.schedule, self.x.s, self.data.xp
        progress = min(1.0, np.log(self.eps / self._start) / np.log(schedule.end))
        self.exponent = schedule.first + (schedule.last - schedule.first) * progress
        self.rank = r = max(int((s > self.eps).sum()), 1)
        a = np.maximum(s[:r] / self.eps, 1.001) ** self.exponent
        tangent = Tangent(self.data, self.x.truncated(r))
        ridge = xp.empty(tangent.shape)
        ridge[:r] = xp.asarray(self.data.unit / (np.outer(a, a) - 1))
        ridge[r:] = xp.asarray(self.data.unit / (a - 1))
        _, slope = tangent.residual(xp.zeros(tangent.shape))
        g, _ = ridge_solve(tangent, -slope, ridge, _CG_TOL, _CG)
        self._decompose(tangent, g)
        self.eps *= schedule.decay
        self.steps += 1

    def _forms(self):
        """Return whether to form X; a device's operators have no adjoint to form it with."""
        op, here = self.data.operator, self.data.backend.name == "cpu"
        return here and not is_on_device(getattr(op, "a", None)) and op.shape[0] * op.shape[1] <= _FULL_CELLS * op.size

    def _decompose(self, tangent, g):
        """Set x to the leading singular vectors of T g + A*(y - A(T g)) / unit: one round of subspace iteration.

        The minimiser moves little from step to step, so that a round from the former vectors is enough: at n = 100 as
        many instances are recovered as with a full decomposition.
        """
        data, (p, qt) = self.data, tangent.halves(g)
        n1, n2 = data.operator.shape
        bound, xp = data.bound, data.xp
        e = -bound.psi(tangent.predict(g)) / data.unit
        if self._forms():
            full = p @ qt.T
            full += data.operator.adjoint(e[0])
            right, left = (lambda v: full @ v), (lambda u: full.T @ u)
        else:

            def right(v):
                return p @ (qt.T @ v) + bound.pull(e, xp.zeros((1, n1, v.shape[1])), v[None])[0][0]

            def left(u):
                return qt @ (p.T @ u) + bound.pull(e, u[None], xp.zeros((1, n2, u.shape[1])))[1][0]

        u = np.linalg.qr(right(self.x.v))[0]
        v = np.linalg.qr(left(u))[0]
        u, b = np.linalg.qr(right(v))
        a, s, wt = np.linalg.svd(data.backend.host(b))
        self.x = LowRank(u @ xp.asarray(a), s, v @ xp.asarray(wt.T))
