"""Gradient descent on two factors, each preconditioned by the other's Gram matrix: ScaledGD and PrecGD."""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from fastdmf.rule import Rule, State, start

__all__ = ["PreconditionedGD", "ScaledGD"]


@dataclass
class _Preconditioned(State):
    """``damping`` (B,) is eta; ``roots`` (B, J, h, h) the Cholesky factor that each stored factor's step uses.

    ``curvature`` (B,) is kappa = sum_i w_i ||A_i||_F^2 / (n1 n2), by which sums of squares become those of a matrix.
    """

    damping: np.ndarray = None
    roots: np.ndarray = None
    curvature: np.ndarray = None

    def records(self):
        return {"damping": self.damping.copy()}


@dataclass(frozen=True)
class ScaledGD(Rule):
    """W_2 <- W_2 - lr grad_2 (W_1 W_1^T + eta I)^-1, W_1 <- W_1 - lr (W_2^T W_2 + eta I)^-1 grad_1, at once.

    For W = U U^T it is U <- U - lr grad (U^T U + eta I)^-1. The rate near a fit does not depend on the condition
    number of W: with eta = 0 where the width is the rank (Tong, Ma and Chi 2021, ScaledGD), with an eta of the size
    of the error where it is larger (Zhang, Fattahi and Zhang 2021, PrecGD).

    Parameters
    ----------
    lr : float
        In the named normalisation of the loss. The papers' is 0.5 for the loss (1/2p) sum r^2 of a mask with a
        fraction p of the entries: 0.5 / p with ``loss="sse/2"``.
    damping : float or {"loss", "gradient"}
        eta, in units of W. ``"loss"``: sqrt(sum w r^2 / kappa) with kappa = sum_i w_i ||A_i||_F^2 / (n1 n2), which
        estimates ||W - W*||_F; for measurements by N(0, 1) numbers kappa is about m, and it is the root of the mean
        squared residual. ``"gradient"``: sqrt(sum_j ||grad_j Gram_j^(-1/2)||_F^2) / (c kappa), with the Gram matrix
        of the other factor; for U U^T the paper's ||grad (U^T U)^(-1/2)||_F in the units that it assumes,
        c kappa = 1.

    Notes
    -----
    **This changes the implicit bias.** With a small eta all modes grow alike from a small start, whatever their size,
    so that the start no longer selects a low rank: use a width near the rank and start from
    :func:`fastdmf.spectral_factors`. The path does not depend on an orthogonal change of the basis of the hidden
    layer (with eta = 0: on any).

    Records have ``damping``. A start with linearly dependent columns and no damping is an error; a Gram matrix that
    becomes singular to working precision later ends its slice, which stays where it is. Gram matrices and their
    Cholesky factors are float64: 2 h^2 (n1 + n2) multiply-adds a step besides the evaluation.
    """

    lr: float = 1e-2
    damping: float | str = 0.0

    def __post_init__(self):
        self._require("lr", 0)
        if isinstance(self.damping, str):
            if self.damping not in ("loss", "gradient"):
                raise ValueError(
                    f"{type(self).__name__}(damping=...) must be a number >= 0, 'loss' or 'gradient', "
                    f"got {self.damping!r}"
                )
        else:
            self._require("damping", 0, closed=True)

    def init(self, problem, x):
        layout, batch = problem.layout, len(x)
        if layout.depth != 2:
            raise ValueError(
                f"{type(self).__name__} preconditions one factor by the other: it needs depth=2 or symmetric=True, "
                f"got depth {layout.depth}"
            )
        if isinstance(self.damping, str) and problem.bound.loss.name == "absolute":
            raise ValueError(
                f"damping={self.damping!r} measures the error by squared residuals, which elementwise_loss='absolute' "
                "has not: give a number"
            )
        # The operator's own factor is for the directions that matter to a step; here the mean over all is meant.
        mean = problem.bound.curvature() / problem.bound.operator.curvature_factor
        state = _Preconditioned(
            **start(problem, x, self.lr),
            damping=np.zeros(batch),
            roots=np.zeros((batch, len(layout.stored_shapes), layout.width, layout.width)),
            curvature=np.broadcast_to(mean, (batch,)).copy(),
        )
        self._factorise(problem, state)
        if state.failed.any():
            raise ValueError(
                f"{type(self).__name__} cannot start: the factors of slice {int(state.failed.argmax())} have linearly "
                f"dependent columns (width {layout.width}) and damping={self.damping!r}: use a width up to the rank of "
                "the start, a damping > 0, or another start"
            )
        return state

    def step(self, problem, state):
        pairs = list(zip(problem.layout.stored(state.x), problem.layout.stored(state.grad)))
        for b in np.flatnonzero(~state.failed):
            for (w, g), root in zip(pairs, state.roots[b]):
                w[b] -= (self.lr * cho_solve((root, True), g[b].T, check_finite=False).T).astype(w.dtype)
        state.losses, state.objective = problem.evaluate(state.x, state.grad)
        self._factorise(problem, state)

    def _factorise(self, problem, state):
        """Set ``damping`` and ``roots`` for the point just evaluated; slices where that is impossible fail."""
        # As stored, both factors are tall, and each one's partner is the other one (for U U^T: itself).
        partners = [w.astype(np.float64) for w in reversed(problem.layout.stored(state.x))]
        grams = [w.swapaxes(1, 2) @ w for w in partners]
        gradients = problem.layout.stored(state.grad)
        for b in np.flatnonzero(~state.failed):
            slice_grams = [gram[b] for gram in grams]
            eta = self._damping(problem, state, b, slice_grams, [g[b] for g in gradients])
            roots = [None if eta is None else _cholesky(gram, eta) for gram in slice_grams]
            if any(root is None for root in roots):
                state.failed[b] = True
            else:
                state.damping[b], state.roots[b] = eta, roots

    def _damping(self, problem, state, b, grams, gradients):
        """Return eta of slice ``b``; None where it is not defined."""
        if self.damping == "loss":
            return np.sqrt(state.losses[b] / state.curvature[b])
        if self.damping != "gradient":
            return self.damping
        total = 0.0
        for gram, g in zip(grams, gradients):
            root = _cholesky(gram, 0.0)
            if root is None:
                return None
            total += np.sum(solve_triangular(root, g.T, lower=True, check_finite=False) ** 2, dtype=np.float64)
        return np.sqrt(total) / (problem.scale[b] * state.curvature[b])


@dataclass(frozen=True)
class PreconditionedGD(ScaledGD):
    """:class:`ScaledGD` with ``damping="loss"`` as the default: PrecGD, for widths above the rank."""

    damping: float | str = "loss"


def _cholesky(gram, eta):
    """Return the lower Cholesky factor of gram + eta I; None where that is singular to working precision, or NaN."""
    try:
        root = np.linalg.cholesky(gram + eta * np.eye(len(gram)))
    except np.linalg.LinAlgError:
        return None
    pivots = np.diagonal(root)
    return root if pivots.min() ** 2 > len(gram) * np.finfo(np.float64).eps * pivots.max() ** 2 else None
