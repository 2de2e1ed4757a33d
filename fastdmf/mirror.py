"""Mirror descent on the matrix itself: the path of descent on two factors from a small start, at depth 1."""

from dataclasses import dataclass

import numpy as np

from fastdmf.rule import Rule, State, start

__all__ = ["MirrorDescent"]

_POTENTIALS = ("hypentropy", "entropy")
_ASYMMETRY = 1e-5  # of a start, relative to its largest entry: more is no rounding


@dataclass
class _Dual(State):
    """``dual`` (B, n1, n2) is Z: small increments on what the point is an exponential of, so float64."""

    dual: np.ndarray = None


@dataclass(frozen=True)
class MirrorDescent(Rule):
    """Z <- Z - lr G with G the gradient in W, and W the mirror image of Z (Wu and Rebeschini 2021).

    ============== ===================================================== ====================================
    potential      W                                                     start
    ============== ===================================================== ====================================
    ``hypentropy`` scale sinh(Z), on the singular values; any shape      any, also W = 0, which gives Z = 0
    ``entropy``    expm(Z) with G symmetrised: positive semidefinite     symmetric positive definite
    ============== ===================================================== ====================================

    Parameters
    ----------
    lr : float
        In the named normalisation of the loss. The paper's (1/m) sum r_i A_i is the gradient of ``"mse/2"``.
    scale : float
        Of ``hypentropy``, in units of W: singular values far below it move as in gradient descent with step
        lr scale, those far above by factors. It is what a small start is to factors; ``entropy`` has the start.
    potential : {"hypentropy", "entropy"}

    Notes
    -----
    For ``solve(..., depth=1, symmetric=False)``, most simply with ``factors=[W_0]``: zeros of shape (n1, n2) for
    ``hypentropy``, alpha times the identity for ``entropy``.

    Where G is symmetric and commutes with W, ``entropy`` from alpha I is, to first order in the step, gradient descent
    on U U^T from U = sqrt(alpha) I with lr / 4: both move W by -lr G W. Elsewhere the paths are close. A singular
    value decomposition (eigenvalues for ``entropy``) of n1 x n2 is taken every step.

    A slice whose values overflow stays there and counts as diverged.
    """

    lr: float = 1.0
    scale: float = 1e-3
    potential: str = "hypentropy"

    def __post_init__(self):
        self._require("lr", 0)
        self._require("scale", 0)
        if self.potential not in _POTENTIALS:
            raise ValueError(f"MirrorDescent(potential=...) must be one of {list(_POTENTIALS)}, got {self.potential!r}")

    def init(self, problem, x):
        if problem.layout.depth != 1:
            raise ValueError(
                f"MirrorDescent moves the matrix itself and needs depth=1, got depth {problem.layout.depth}; "
                "start with factors=[W_0], where zeros will do for potential='hypentropy'"
            )
        w = problem.layout.stored(x)[0].astype(np.float64)
        if self.potential == "entropy":
            _check_definite(w)
        return _Dual(**start(problem, x, self.lr), dual=self._dual(w))

    def step(self, problem, state):
        w, g = (problem.layout.stored(flat)[0] for flat in (state.x, state.grad))
        # A gradient that is not finite has no way on; decompositions would raise an error for the whole batch.
        alive = np.flatnonzero(np.isfinite(problem.squared_norm(state.grad)))
        g = g[alive].astype(np.float64)
        if self.potential == "entropy":
            g = (g + g.swapaxes(1, 2)) / 2
        state.dual[alive] -= self.lr * g
        w[alive] = self._primal(state.dual[alive])
        state.losses, state.objective = problem.evaluate(state.x, state.grad)

    def _dual(self, w):
        """Return Z of W, (B, n1, n2)."""
        if self.potential == "entropy":
            return _on_eigenvalues(np.log, w)
        return _on_singular_values(lambda s: np.arcsinh(s / self.scale), w)

    def _primal(self, z):
        """Return W of Z, (B, n1, n2)."""
        if self.potential == "entropy":
            return _on_eigenvalues(np.exp, z)
        return _on_singular_values(lambda s: self.scale * np.sinh(s), z)


def _on_eigenvalues(function, a):
    values, vectors = np.linalg.eigh(a)
    return (vectors * function(values)[:, None, :]) @ vectors.swapaxes(1, 2)


def _on_singular_values(function, a):
    left, values, right = np.linalg.svd(a, full_matrices=False)
    return (left * function(values)[:, None, :]) @ right


def _check_definite(w):
    """Refuse a start of which there is no logarithm."""
    if w.shape[1] != w.shape[2]:
        raise ValueError(f"MirrorDescent(potential='entropy') needs a square matrix, got shape {w.shape[1:]}")
    for b, one in enumerate(w):
        largest, least = np.abs(one).max(), np.linalg.eigvalsh(one)[0]
        if np.abs(one - one.T).max() > _ASYMMETRY * largest or least <= 0:
            raise ValueError(
                "MirrorDescent(potential='entropy') needs a symmetric positive definite start, and that of slice "
                f"{b} is not (least eigenvalue {least:.3g}): pass factors=[alpha * np.eye(n)]"
            )
