"""``recover``: low-rank matrices to the last digit, their rank unknown, from few entries or measurements."""

import warnings
from dataclasses import astuple, dataclass

import numpy as np

from fastdmf.arrays import as_host, same_home
from fastdmf.backend import compile_clock, get_backend, thread_limits
from fastdmf.checkpoint import CheckpointFile, digest
from fastdmf.checks import check_count, check_data, check_number, check_seed
from fastdmf.continuation import Continuation, Schedule
from fastdmf.contract import Operator
from fastdmf.engine import Solution, SolveWarning, Status, Stop, drive, warn_unless_success
from fastdmf.noisy_fit import noisy_fit
from fastdmf.tangent import (
    SETTLED,
    LowRank,
    Measurements,
    Tangent,
    degrees_of_freedom,
    gauss_newton,
    ridge_solve,
)

__all__ = ["RecoverySolution", "recover"]

# The second is slower and starts a little deeper, for what the first misses when entries are scarce.
_SCHEDULES = (Schedule(), Schedule(first=0.55, decay=0.94))
_MORE_SCHEDULES = (
    Schedule(first=0.75, last=0.75, decay=0.85),
    Schedule(first=0.6, last=0.9),
    Schedule(decay=0.92),
    Schedule(first=0.55, decay=0.96),
)
_MARGIN = 1.03  # measurements a degree of freedom that a rank candidate needs
_ATTEMPT_EVERY, _ATTEMPT_FROM = 6, 0.25  # steps; eps relative to the largest singular value
_GAP = 1.25  # ratio of singular values that names a rank
_ACCEPT = 1e-9  # relative residual at which a candidate is looked at closely
_ROUNDING = 4  # units of the data's rounding that an exact fit may leave
_SURE = 1.5  # measurements a degree of freedom from which no smaller rank needs to be ruled out
_SAME = 0.1  # distance of two matrices, in units of the residual, that makes them one
_FINAL_CG = 2000
_PROBE_CG, _PROBE_TOL = 4000, 1e-12
_LOST, _SEEN = 0.1, 1e-11  # of one direction's share of a random vector; of the mean curvature
_NO_LIMIT = 10**9  # steps: the search ends by itself
_CLEAR = 0.5  # relative error on held-out data below which a noisy fit ends the search for an exact one


@dataclass(repr=False)
class RecoverySolution(Solution):
    """What ``recover`` returns: a :class:`Solution` with balanced factors [W_1, W_2].

    Attributes
    ----------
    residual : float
        sqrt(sum w r^2 / sum w y^2) on the data.
    noise : float
        Estimated standard deviation of the noise, corrected for the degrees of freedom; 0 where the fit is exact.
    held_out : float
        Relative error on the held-out data that chose the rank; NaN where nothing was held out.
    """

    residual: float = np.nan
    noise: float = 0.0
    held_out: float = np.nan


def largest_rank(shape, m):
    """Return the largest rank whose degrees of freedom m measurements could determine."""
    ranks = range(1, min(shape) + 1)
    return max((r for r in ranks if _MARGIN * degrees_of_freedom(shape, r) <= m), default=0)


def identified(data, x, rng):
    """Return whether the measurements see every direction of the tangent space at ``x``.

    A random tangent vector g is measured and recovered from its measurements. A direction that is not seen is lost, a
    part of 1 / sqrt(dimension) of g; what is merely seen weakly may not have been found yet, but has measurements.
    """
    tangent, host = Tangent(data, x), data.backend.host
    g = data.xp.asarray(rng.standard_normal(tangent.shape))
    _, m, z = tangent.parts(g)
    m -= x.u @ (x.u.T @ m)
    z -= x.v @ (x.v.T @ z)
    found, _ = ridge_solve(tangent, tangent.normal(g), 0.0, _PROBE_TOL, _PROBE_CG)
    lost = g - found
    size, whole = host(np.vdot(lost, lost), np.vdot(g, g))
    if size <= _LOST**2 * whole / g.size:
        return True
    return bool(host(np.vdot(lost, tangent.normal(lost))) > _SEEN * data.curvature * size)


class _Search:
    """Continuations and attempts to finish them, as the loop drives them (``engine.Process``).

    Parameters
    ----------
    data : Measurements
    phases : sequence of Schedule or None
        Continuations in turn; None stands for the noisy fit.
    max_rank : int
    tol, rounding, validation : float
        Relative residuals of an exact fit, and of the rounding of the data; fraction held out by the noisy fit.
    rng : numpy.random.Generator
    """

    # What a checkpoint holds as it is.
    _NUMBERS = "residual", "exact", "held_out", "credible", "_standing"

    def __init__(self, data, phases, max_rank, tol, rounding, validation, rng):
        self.data, self.max_rank, self.validation, self.rng = data, max_rank, validation, rng
        self.tol, self.accept, self.rounding = max(tol, rounding), max(_ACCEPT, rounding), rounding
        self.best, self.residual, self.exact = None, np.inf, False
        self.noisy, self.held_out, self.credible = None, np.nan, False
        self._phases, self._path = list(phases), None
        self._standing, self._last = (np.inf,), None
        self._ends = {}  # rank -> (x, residual) of its last attempt, None once two have ended at the same point

    @property
    def n_eval(self):
        return self.data.n_eval

    def step(self, most):
        if self._path is not None:
            self._advance()
        elif self._phases[0] is None:
            self._phases.pop(0)
            self._fit_noise()
        else:
            self._path, self._ends = Continuation(self.data, self._phases.pop(0), self.rng), {}
        return 1

    def _advance(self):
        path = self._path
        path.step()
        if path.done:
            self._path = None
            self._finish(path.x, 20, 300, last=True)
        elif path.eps < _ATTEMPT_FROM * path.x.s[0] and path.steps % _ATTEMPT_EVERY == 0:
            self._finish(path.x, 8, 150)

    def _fit_noise(self):
        """Fit the noisy matrix; where it may be the exact one, try to finish it."""
        found = noisy_fit(self.data, self.max_rank, self.validation, self.rng)
        self.noisy, self.held_out, self.credible = found
        if self._phases and self.noisy.s[0] > 0 and self.noisy.rank <= self.max_rank:
            self._try(self.noisy, self.noisy.rank, 20, 300)
        if self.credible and self.held_out < _CLEAR:
            self._phases = []

    def _finish(self, x, steps, cg, last=False):
        """Polish the ranks that the spectrum of ``x`` names; keep one that meets the data."""
        cap = min(self.max_rank, x.rank - 1)
        ratios = x.s[:cap] / np.maximum(x.s[1 : cap + 1], 1e-12 * x.s[0])
        ranks = [int(k) + 1 for k in np.argsort(-ratios)[:2] if ratios[k] >= _GAP]
        if last:
            ranks += [r for r in range(max(1, self.max_rank - 3), cap + 1) if r not in ranks]
        for rank in ranks:
            before = self._ends.get(rank, ())
            # A larger rank than one that meets the data, though it does not determine them, would tell nothing.
            if before is None or (self.best is not None and self.residual < self.tol and rank > self.best.rank):
                continue
            if self._try(x, rank, steps, cg):
                break
            # Data with noise lead every attempt to one point; a third would be as vain. Where that noise is small, no
            # further search can mistake it for an exact fit that was missed.
            end, residual = self._ends[rank] = self._last
            if before and end.distance(before[0]) < _SAME * residual:
                self._ends[rank] = None
                if self.tol < residual < SETTLED:
                    self._path, self._phases = None, [phase for phase in self._phases if phase is None]
                    break

    def _try(self, x, rank, steps, cg):
        """Polish one candidate; return whether it meets the data and they determine it."""
        candidate, residual = self._polish(x, rank, steps, cg)
        if residual < self.accept:
            candidate, residual = self._accept(candidate)
            self.exact = residual < self.tol and identified(self.data, candidate, self.rng)
        self._last = candidate, residual
        # Of fits that meet the data the smallest rank is the one to show, of others the closest.
        standing = (max(residual, self.tol), candidate.rank, residual)
        if self.exact or standing < self._standing:
            self.best, self.residual, self._standing = candidate, residual, standing
        return self.exact

    def _polish(self, x, rank, steps, cg):
        return gauss_newton(self.data, x.truncated(rank), steps, 0.1 * self.accept, cg)

    def _accept(self, x):
        """Return the smallest rank that also meets the data, and its residual, to the last digits."""
        shape, m = self.data.operator.shape, self.data.operator.size
        if m < _SURE * degrees_of_freedom(shape, x.rank):
            for rank in (x.rank - 1, x.rank - 2):
                if rank < 1:
                    break
                smaller, residual = self._polish(x, rank, 25, 300)
                if residual < self.accept:
                    x = smaller
        return gauss_newton(self.data, x, 6, max(1e-14, 0.1 * self.rounding), _FINAL_CG, damping=1e-20)

    def record(self):
        path = self._path
        values = {
            "relative_loss": 0.0 if self.exact else 1.0,
            "null_objective": 1.0,
            "objective": min(self.residual, 1.0),
            "loss": self.residual**2,
            "eps": np.nan if path is None else path.eps,
            "exponent": np.nan if path is None else path.exponent,
            "rank": np.nan if path is None else path.rank,
        }
        return {name: np.array([float(value)]) for name, value in values.items()}

    def failed(self):
        return np.array([self._path is None and not self._phases])

    def finish(self, position, slice_, best):
        """Nothing: the search holds the result."""

    def result(self):
        """Return (status, x): what was found so far."""
        if self.exact:
            return Status.EXACT, self.best
        # A fit to the last digit that is not determined is no noisy one.
        if self.noisy is not None and self.residual > self.tol:
            return (Status.NOISE_LEVEL if self.credible else Status.NOT_IDENTIFIED), self.noisy
        if self.best is not None:
            return Status.NOT_IDENTIFIED, self.best
        n1, n2 = self.data.operator.shape
        zero = LowRank(np.zeros((n1, 1)), np.zeros(1), np.zeros((n2, 1)))
        return Status.NOT_IDENTIFIED, zero if self._path is None else self._path.x.truncated(max(self._path.rank, 1))

    def factors(self):
        return [as_host(w)[None] for w in self.result()[1].balanced()]

    def snapshot(self):
        return {
            "numbers": {name: getattr(self, name) for name in self._NUMBERS},
            "n_eval": self.data.n_eval,
            "phases": [None if phase is None else astuple(phase) for phase in self._phases],
            "path": None if self._path is None else self._path.snapshot(),
            "found": [None if x is None else x.parts() for x in (self.best, self.noisy)],
            "last": _fit_parts(self._last),
            "ends": {rank: _fit_parts(end) for rank, end in self._ends.items()},
            "rng": self.rng.bit_generator.state,
        }

    def resume(self, snapshot, active):
        for name, value in snapshot["numbers"].items():
            setattr(self, name, value)
        self.data.n_eval = snapshot["n_eval"]
        self._phases = [None if phase is None else Schedule(*phase) for phase in snapshot["phases"]]
        self._path = None if snapshot["path"] is None else Continuation.resumed(self.data, snapshot["path"])
        xp = self.data.xp
        self.best, self.noisy = (None if x is None else LowRank.of(x, xp) for x in snapshot["found"])
        self._last = _fit_of(snapshot["last"], xp)
        self._ends = {rank: _fit_of(end, xp) for rank, end in snapshot["ends"].items()}
        self.rng.bit_generator.state = snapshot["rng"]


def _fit_parts(fit):
    """Return (x, residual) with x taken apart, and None for None."""
    return None if fit is None else (fit[0].parts(), fit[1])


def _fit_of(parts, xp):
    return None if parts is None else (LowRank.of(parts[0], xp), parts[1])


def recover(
    operator,
    y,
    *,
    weights=None,
    max_rank=None,
    noise="auto",
    validation=0.05,
    effort="normal",
    tol=1e-10,
    callback=None,
    checkpoint=None,
    on_failure="warn",
    device="auto",
    n_threads=None,
    random_state=None,
):
    """Recover a low-rank matrix whose rank is not known, exactly where the data allow it.

    The minimiser of the depth-N penalty is followed while the depth N grows from 2 to infinity; where its spectrum
    names a rank, Gauss-Newton steps on the matrices of that rank finish it. A residual of 1e-14 with more measurements
    than degrees of freedom is a certificate in practice, so that nothing has to be told and wrong ranks are recognised.

    Parameters
    ----------
    operator : Operator
        :class:`EntryMask` and every other operator of ``solve``.
    y : array of shape (m,)
    weights : array of shape (m,), optional
        Weights >= 0 of the squared residuals; zero leaves a measurement out.
    max_rank : int, optional
        Default the largest whose r (n1 + n2 - r) degrees of freedom are fewer than the measurements.
    noise : {"auto", True, False}
        Whether to look for an exact fit first and, if there is none, for the best noisy one; only the one; only the
        other.
    validation : float
        Fraction of the measurements held out to choose the rank of a noisy fit.
    effort : {"normal", "high"}
        ``"high"`` tries four more schedules, each as long as the first, before it gives up.
    tol : float
        Relative residual sqrt(sum w r^2 / sum w y^2) of an exact fit; at least four units of the rounding of ``y``, so
        that float32 data are met exactly at 5e-7.
    callback, checkpoint, on_failure, device, n_threads, random_state
        As in :func:`fastdmf.solve`. A step is one of the continuation.

    Returns
    -------
    RecoverySolution
        ``status`` is EXACT, NOISE_LEVEL or NOT_IDENTIFIED, or says who stopped the run.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be; the message names it.

    Warns
    -----
    SolveWarning
        If the data do not determine the matrix, or rows or columns hold fewer entries than the rank needs.

    Notes
    -----
    Computed in float64. Needs the products of the operator with thin factors only; nothing of size n1 x n2 is formed
    where that is more than 32 times the number of measurements, and on the GPU nothing but what the operator's products
    take. Factors are NumPy arrays, or on the GPU where ``y`` is; the start and the held-out data are the same on every
    device.

    References
    ----------
    Depth as a Schatten-2/N penalty: Arora, Cohen, Hu, Luo 2019 (1905.13655). Reweighting: Mohan and Fazel 2012;
    Kuemmerle and Verdun 2021. Gauss-Newton on fixed-rank matrices: Vandereycken 2013; Zilber and Nadler 2022 (GNMR).
    """
    if not isinstance(operator, Operator):
        raise TypeError(
            f"operator must be a fastdmf operator, got {type(operator).__name__}: "
            "use EntryMask, or fastdmf.operators.as_operator(op, shape)"
        )
    if noise not in ("auto", True, False):
        raise ValueError(f"noise must be 'auto', True or False, got {noise!r}")
    if effort not in ("normal", "high"):
        raise ValueError(f"effort must be 'normal' or 'high', got {effort!r}")
    if on_failure not in ("warn", "ignore"):
        raise ValueError(f"on_failure must be 'warn' or 'ignore', got {on_failure!r}")
    check_number("tol", tol, 0)
    check_number("validation", validation, 0)
    if validation >= 1:
        raise ValueError(f"validation must be a fraction below 1, got {validation!r}")
    backend = get_backend(device, y, getattr(operator, "a", None))
    home = y  # results go where the data came from
    y, weights, _ = check_data(operator, y, weights, np.float64, ndims=(1,))
    rounding = _ROUNDING * float(np.finfo(y.dtype).eps)
    y = y.astype(np.float64)
    if weights is not None:
        if not weights.any():
            raise ValueError("weights are zero everywhere: at least one measurement must count")
        kept = np.flatnonzero(weights)
        if len(kept) < len(weights):
            operator, y, weights = operator.restrict(kept), y[kept], weights[kept]
        weights = weights.astype(np.float64) / weights.mean(dtype=np.float64)
    norms = operator.squared_norms()
    if not norms.all():  # what measures nothing says nothing
        kept = np.flatnonzero(norms)
        if not len(kept):
            raise ValueError("operator measures nothing: all of its matrices are zero")
        operator, y, weights = operator.restrict(kept), y[kept], None if weights is None else weights[kept]
    cap = largest_rank(operator.shape, operator.size)
    if max_rank is not None:
        cap = min(check_count("max_rank", max_rank), cap)
    if not y.any():
        raise ValueError("y is zero everywhere: the zero matrix meets it, there is nothing to recover")
    if cap == 0:
        n1, n2 = operator.shape
        raise ValueError(
            f"operator has {operator.size} measurements, too few for the {n1 + n2 - 1} degrees of freedom of a "
            f"{n1} x {n2} matrix of rank 1: measure more"
        )
    seed = check_seed(random_state)
    rng = np.random.default_rng(seed)

    with compile_clock(backend) as clock, thread_limits(n_threads), backend.session():
        # The mean of the squares is 1 from here on, so that no constant depends on the unit of y.
        power = np.ldexp(1.0, np.frexp(np.abs(y).max())[1] - 1)  # exact, and squares stay in range
        scale = float(power * np.sqrt(np.mean((y / power) ** 2)))
        if scale < np.finfo(np.float64).tiny:
            raise ValueError(f"y is too small, its values reach {np.abs(y).max():.3g} at most: scale it up")
        data = Measurements(operator, y / scale, weights, backend)
        phases = {"auto": (_SCHEDULES[0], None, *_SCHEDULES[1:]), True: (None,), False: _SCHEDULES}[noise]
        if effort == "high" and noise is not True:
            phases += _MORE_SCHEDULES
        search = _Search(data, phases, cap, tol, rounding, validation, rng)
        file = None
        if checkpoint is not None:
            # What the operator makes of one matrix tells it from others; to single precision alike on all devices.
            u, v = (np.random.default_rng(0).standard_normal((n, 1)) for n in operator.shape)
            made = np.float32(data.loss(LowRank(u, np.ones(1), v)))
            settings = operator.shape, phases, cap, tol, validation, seed
            file = CheckpointFile(checkpoint, digest("recover", *settings, y, weights, float(made)))
        (end,), (n_iter,), history = drive(search, 1, Stop(_NO_LIMIT, 1, 0.0), callback, file)
        status, x = search.result()
        if end in (Status.STOPPED, Status.INTERRUPTED):
            status = end
        loss = data.loss(x)
        n_eval = data.n_eval
        factors = same_home(LowRank(x.u, x.s * scale, x.v).balanced(), home)
    freedom = max(operator.size - degrees_of_freedom(operator.shape, x.rank), 1)
    deviation = 0.0 if status is Status.EXACT else float(np.sqrt(loss * data.null / freedom)) * scale
    if on_failure == "warn":
        warn_unless_success([status])
        if search.residual <= search.tol:
            _warn_of_few(operator, x.rank)
    history = {name: v if name == "iteration" else v[:, 0] for name, v in history.items()}
    return RecoverySolution(
        factors,
        status,
        int(n_iter),
        n_eval,
        history,
        device=backend.name,
        seconds=clock.seconds,
        compile_seconds=clock.compile_seconds,
        residual=float(np.sqrt(loss)),
        noise=deviation,
        held_out=search.held_out,
    )


def _warn_of_few(operator, rank):
    """Warn of rows and columns that hold fewer entries than a matrix of this rank needs."""
    few = [int((counts <= rank).sum()) for counts in operator.coverage()]
    if any(few):
        warnings.warn(
            f"{few[0]} rows and {few[1]} columns hold at most {rank} entries, the rank found: what else is in them is "
            "determined barely or not at all",
            SolveWarning,
            stacklevel=3,
        )
