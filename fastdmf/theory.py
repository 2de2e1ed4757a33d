"""Closed forms of the theory, to call before a run: escape times, stability limits, velocities, thresholds.

Units are those of the data: s are singular values of W, a drive is a gradient of the loss in its named normalisation,
and learning rates belong to that normalisation, too. Where it says "vectorised" numbers may be arrays that broadcast.

References
----------
.. [1] S. Arora, N. Cohen, W. Hu, Y. Luo, "Implicit Regularization in Deep Matrix Factorization", 2019,
   arXiv:1905.13655.
.. [2] S. Arora, N. Cohen, E. Hazan, "On the Optimization of Deep Networks: Implicit Acceleration by
   Overparameterization", 2018, arXiv:1802.06509.
.. [3] H. Chou, C. Gieshoff, J. Maly, H. Rauhut, "Gradient Descent for Deep Matrix Factorization: Dynamics and Implicit
   Bias towards Low Rank", 2020, arXiv:2011.13772.
.. [4] A. Kyrillidis, A. Kalev, "Implicit regularization and solution uniqueness in over-parameterized matrix sensing",
   2018, arXiv:1806.02046.
.. [5] N. Razin, N. Cohen, "Implicit Regularization in Deep Learning May Not Be Explainable by Norms", 2020,
   arXiv:2005.06398.
"""

import numpy as np

from fastdmf.backend import get_backend
from fastdmf.chain import Layout
from fastdmf.checks import check_count, check_data, check_number
from fastdmf.operators import Operator, as_operator
from fastdmf.problem import NORMALISATIONS, Problem
from fastdmf.symmetry import symmetric_squared_norms

__all__ = [
    "determinant_sign",
    "diagonal_path",
    "end_to_end_velocity",
    "escape_count",
    "escape_iterations",
    "escape_time",
    "loss_curvature",
    "mode_drive",
    "separation",
    "singular_value_velocity",
    "stability_limit",
    "uniqueness_threshold",
]

# Power steps are made in rounds of this many, until a round moves the norm by less than that.
_STEPS, _SETTLED, _ROUNDS = 10, 1e-6, 50


# --- plateaus --------------------------------------------------------------------------------------------------------


def escape_time(depth, drive, init_scale, level, *, target=np.inf, symmetric=False):
    """Return the time that gradient flow takes to carry a mode from ``init_scale`` to ``level``.

    Solves ds/dt = N g s^(2 - 2/N) (1 - s/target), a mode of a balanced chain ([1]_, theorem 3) whose drive
    g = -u^T G v falls linearly as it is fitted; with the default target it stays constant, and

        N = 1:  t = (level - s_0) / g
        N = 2:  t = log(level / s_0) / (2 g)
        N >= 3: t = (s_0^(-(N-2)/N) - level^(-(N-2)/N)) / ((N - 2) g).

    Parameters
    ----------
    depth : int
        Number of factors N.
    drive : float or array
        g at the start, such as :func:`mode_drive`. Vectorised, as all below.
    init_scale : float or array
        s_0, the mode's singular value at the start.
    level : float or array
        Singular value to reach, below ``target``.
    target : float or array
        Singular value at which the drive is zero.
    symmetric : bool
        W = U U^T, which moves twice as fast; ``depth`` must be 2.

    Returns
    -------
    float or ndarray
        Zero where the start is at the level already.

    Raises
    ------
    ValueError
        If a number is not positive, ``level`` is not below ``target``, or ``symmetric`` has another depth than 2.

    Examples
    --------
    >>> from fastdmf import theory
    >>> round(float(theory.escape_time(3, 1.0, 1e-6, level=1.0)), 6)
    99.0
    """
    n = _depth(depth, symmetric)
    g, start, level, target = (
        _positive(name, value, finite=name != "target")
        for name, value in (("drive", drive), ("init_scale", init_scale), ("level", level), ("target", target))
    )
    if (level >= target).any():
        raise ValueError(f"level must be below target, got level={level} and target={target}")
    start = np.minimum(start, level)
    time = (_primitive(n, level, target) - _primitive(n, start, target)) / (g * (2 if symmetric else 1))
    return time[()]


def _primitive(n, s, target):
    """Return an integral over s of 1 / (N s^(2 - 2/N) (1 - s/target))."""
    if n == 2:
        return (np.log(s) - np.log1p(-s / target)) / 2
    from scipy.special import hyp2f1

    power = 2 / n - 1
    return s**power / (n * power) * hyp2f1(1, power, 1 + power, s / target)


def escape_iterations(depth, drive, init_scale, lr, level, *, target=np.inf, symmetric=False, momentum=0.0):
    """Return how many steps of gradient descent a mode takes from ``init_scale`` to ``level``.

    :func:`escape_time` / lr, and with momentum (heavy ball or Nesterov's) times 1 - momentum: the limit of small
    steps. :func:`escape_count` counts the steps of the discrete rule instead.

    Parameters
    ----------
    depth, drive, init_scale, level, target, symmetric
        As of :func:`escape_time`.
    lr : float or array
        Learning rate.
    momentum : float
        In [0, 1).

    Returns
    -------
    float or ndarray

    Raises
    ------
    ValueError
        As :func:`escape_time`, or if ``lr`` is not positive or ``momentum`` not in [0, 1).
    """
    lr, momentum = _positive("lr", lr), _momentum(momentum)
    time = escape_time(depth, drive, init_scale, level, target=target, symmetric=symmetric)
    return (time * (1 - momentum) / lr)[()]


def escape_count(depth, target, init_scale, lr, *, level=None, max_count=10_000_000):
    """Return how many steps gradient descent makes until a mode reaches ``level``, counted one by one.

    On 0.5 ||W - W*||_F^2 from W_j = s_0^(1/N) I every eigenvalue of W obeys :func:`diagonal_path`'s recursion.

    Parameters
    ----------
    depth : int
    target, init_scale, lr : float or array
        Eigenvalue of W*, that of the start, learning rate. Vectorised.
    level : float or array, optional
        Default half of ``target``.
    max_count : int
        Steps after which to give up.

    Returns
    -------
    int or ndarray of int

    Raises
    ------
    ValueError
        If a number is not positive, ``level`` is not below ``target``, or ``max_count`` steps are not enough.

    Examples
    --------
    >>> from fastdmf import theory
    >>> int(theory.escape_count(3, 1.0, 1e-4, 1e-2))
    2072
    """
    n, max_count = check_count("depth", depth), check_count("max_count", max_count)
    target, start, lr = (
        _positive(name, value) for name, value in (("target", target), ("init_scale", init_scale), ("lr", lr))
    )
    level = target / 2 if level is None else _positive("level", level)
    if (level >= target).any():
        raise ValueError(f"level must be below target, got level={level} and target={target}")
    d, target, lr, level = (np.array(a) for a in np.broadcast_arrays(start ** (1 / n), target, lr, level))
    counts, goal = np.zeros(d.shape, np.int64), level ** (1 / n)
    for _ in range(max_count):
        waiting = d < goal
        if not waiting.any():
            return counts[()]
        d = np.where(waiting, _descended(d, target, lr, n), d)
        counts += waiting
    raise ValueError(f"level is not reached in max_count={max_count} steps: raise max_count, lr or init_scale")


def diagonal_path(depth, eigenvalues, init_scale, lr, steps):
    """Return the eigenvalues of W along gradient descent on 0.5 ||W - W*||_F^2 from W_j = alpha^(1/N) I.

    For a symmetric W* all factors stay equal and are diagonal in its basis: W has the eigenvalues d^N with
    d <- d - lr d^(N-1) (d^N - lambda), an exact statement about the discrete rule [3]_. Positive eigenvalues are
    recovered, negative ones end at zero.

    Parameters
    ----------
    depth : int
    eigenvalues : array of shape (n,)
        lambda, of W*.
    init_scale, lr : float
    steps : int

    Returns
    -------
    ndarray of shape (steps + 1, n)

    Raises
    ------
    ValueError
        If the eigenvalues are not finite, or a number is not positive.
    """
    n, steps = check_count("depth", depth), check_count("steps", steps, 0)
    lam = np.asarray(eigenvalues, np.float64)
    if lam.ndim != 1 or not np.isfinite(lam).all():
        raise ValueError(f"eigenvalues must be a 1-d array of finite numbers, got shape {lam.shape}")
    check_number("init_scale", init_scale, 0)
    check_number("lr", lr, 0)
    path = np.empty((steps + 1, len(lam)))
    path[0] = init_scale ** (1 / n)
    for t in range(steps):
        path[t + 1] = _descended(path[t], lam, lr, n)
    return path**n


def _descended(d, lam, lr, n):
    return d - lr * d ** (n - 1) * (d**n - lam)


def separation(depth, ratio, init_scale):
    """Return where a weaker mode is when the leading one arrives at size 1, both having started at ``init_scale``.

    From the closed forms of :func:`escape_time` with constant drives. For alpha -> 0 it is ratio at N = 1,
    alpha^(1 - ratio) at N = 2, a power of the start, and alpha (1 - ratio)^(-N/(N-2)) at N >= 3, the start times a
    constant: this is why depth makes modes take off one at a time.

    Parameters
    ----------
    depth : int
    ratio : float or array
        Drive of the weaker mode over that of the leading one, in (0, 1). Vectorised.
    init_scale : float or array
        alpha, in units of the leading mode's final size, in (0, 1).

    Returns
    -------
    float or ndarray
        In (0, 1), in units of the leading mode's final size.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """
    n = check_count("depth", depth)
    ratio, alpha = _positive("ratio", ratio), _positive("init_scale", init_scale)
    for name, value in (("ratio", ratio), ("init_scale", alpha)):
        if (value >= 1).any():
            raise ValueError(f"{name} must be below 1, got {value}")
    if n == 2:
        return (alpha ** (1 - ratio))[()]
    power = 2 / n - 1
    return (((1 - ratio) * alpha**power + ratio) ** (1 / power))[()]


# --- step sizes ------------------------------------------------------------------------------------------------------


def stability_limit(depth, s1, curvature=1.0, *, symmetric=False, momentum=0.0, nesterov=False):
    """Return the learning rate from which gradient descent leaves a balanced exact fit.

    2 / (kappa N s1^(2 - 2/N)): there the top eigenvalue of the Hessian is kappa N s1^(2 - 2/N). Heavy ball
    multiplies it by 1 + beta, Nesterov's momentum by (1 + beta) / (1 + 2 beta).

    Parameters
    ----------
    depth : int
    s1 : float or array
        Largest singular value of the matrix to be fitted. Vectorised.
    curvature : float or array
        kappa of the loss in W, :func:`loss_curvature`; 1 for 0.5 ||W - W*||_F^2.
    symmetric : bool
        W = U U^T, whose Hessian is twice as large; ``depth`` must be 2.
    momentum : float
        beta in [0, 1).
    nesterov : bool

    Returns
    -------
    float or ndarray

    Raises
    ------
    ValueError
        If a number is not positive, ``momentum`` is not in [0, 1), or ``symmetric`` has another depth than 2.

    Examples
    --------
    >>> from fastdmf import theory
    >>> float(theory.stability_limit(2, 1.0))
    1.0
    """
    n, beta = _depth(depth, symmetric), _momentum(momentum)
    s1, kappa = _positive("s1", s1), _positive("curvature", curvature)
    gain = (1 + beta) / (1 + 2 * beta) if nesterov else 1 + beta
    return (2 * gain / (kappa * n * s1 ** (2 - 2 / n) * (2 if symmetric else 1)))[()]


def loss_curvature(operator, loss="mse", *, weights=None, symmetric=False):
    """Return the mean curvature kappa of the loss over all directions of W.

    2 c sum_i w_i ||A_i||_F^2 / (n1 n2) for squared residuals, c the normalisation of :func:`fastdmf.solve`. Along
    low-rank directions it is larger, the more so the fewer the measurements: for a safe step take a fraction of
    :func:`stability_limit`.

    Parameters
    ----------
    operator : Operator
    loss : {"mse", "mse/2", "sse", "sse/2"}
    weights : array of shape (m,) or (B, m), optional
    symmetric : bool
        Over symmetric W alone: sum_i w_i ||(A_i + A_i^T)/2||_F^2 / (n (n + 1) / 2).

    Returns
    -------
    float or ndarray of shape (B,)

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    """
    operator, _, weights, _ = _data(operator, np.zeros(getattr(operator, "size", 1)), weights, loss)
    w = np.ones(operator.size) if weights is None else weights.astype(np.float64)
    n1, n2 = operator.shape
    if symmetric:
        if n1 != n2:
            raise ValueError(f"symmetric=True needs a square matrix, got shape {operator.shape}")
        norms, dimension = symmetric_squared_norms(operator), n1 * (n1 + 1) / 2
    else:
        norms, dimension = operator.squared_norms(), n1 * n2
    return (2 * NORMALISATIONS[loss](w.sum(axis=-1)) * (w @ norms) / dimension)[()]


def mode_drive(operator, y, loss="mse", *, weights=None):
    """Return the drive of the leading mode next to W = 0: ||G(0)||_2 = 2 c ||A*(w y)||_2.

    Parameters
    ----------
    operator : Operator
    y : array of shape (m,) or (B, m)
    loss : {"mse", "mse/2", "sse", "sse/2"}
        Squared residuals.
    weights : array of shape (m,) or (B, m), optional

    Returns
    -------
    float or ndarray of shape (B,)
        By power steps that go on until ten move it by less than 1e-6: from below. No matrix of the size of W is formed
        for an entry mask.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    """
    operator, y, weights, dtype = _data(operator, y, weights, loss)
    n1, n2 = operator.shape
    batch = max(len(a) if a is not None and a.ndim == 2 else 1 for a in (y, weights))
    single = y.ndim == 1 and (weights is None or weights.ndim == 1)
    y = y.reshape(-1, operator.size)
    weights = None if weights is None else weights.reshape(-1, operator.size)
    layout = Layout((n2, 1, n1))
    bound = operator.bind(get_backend("cpu"), y, weights=weights, dtype=dtype, width=1, batch=batch)
    problem = Problem(bound, layout, batch, loss=loss)
    x, grad = (layout.allocate(batch, dtype) for _ in range(2))
    problem.evaluate(x, grad)
    rng = np.random.default_rng(0)
    u, v = (np.tile(rng.standard_normal(n).astype(dtype), (batch, 1)) for n in (n1, n2))
    norms = np.zeros(batch)
    for _ in range(_ROUNDS):
        before, norms = norms, np.asarray(problem.leading_gradient(u, v, _STEPS))
        if (np.abs(norms - before) <= _SETTLED * norms).all():
            break
    drive = 2 * problem.scale * norms
    return float(drive[0]) if single else drive


def _data(operator, y, weights, loss):
    """Return (operator, y, weights, dtype), checked."""
    if not isinstance(operator, Operator):
        operator = as_operator(operator)
    y, weights, dtype = check_data(operator, y, weights, None)
    if loss not in NORMALISATIONS:
        raise ValueError(f"loss must be one of {sorted(NORMALISATIONS)}, got {loss!r}")
    return operator, y, weights, dtype


# --- velocities ------------------------------------------------------------------------------------------------------


def singular_value_velocity(w, g, depth):
    """Return ds_r/dt = -N s_r^(2 - 2/N) u_r^T G v_r of balanced gradient flow ([1]_, theorem 3).

    Parameters
    ----------
    w, g : array of shape (..., n1, n2)
        W, and the gradient of the loss there.
    depth : int

    Returns
    -------
    ndarray of shape (..., min(n1, n2))
        In the order of the singular values, descending. Meaningful where they are distinct.

    Raises
    ------
    ValueError
        If the shapes differ, or ``depth`` is no count.
    """
    n = check_count("depth", depth)
    w, g = _pair(w, g)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return -n * s ** (2 - 2 / n) * np.einsum("...ir,...ij,...rj->...r", u, g, vt)


def end_to_end_velocity(w, g, depth):
    """Return dW/dt = -sum_{j=1..N} (W W^T)^((j-1)/N) G (W^T W)^((N-j)/N) of balanced gradient flow ([2]_, theorem 1).

    Parameters
    ----------
    w, g : array of shape (..., n1, n2)
        W, and the gradient of the loss there.
    depth : int

    Returns
    -------
    ndarray of shape (..., n1, n2)

    Raises
    ------
    ValueError
        If the shapes differ, or ``depth`` is no count.
    """
    n = check_count("depth", depth)
    w, g = _pair(w, g)
    u, s, vt = np.linalg.svd(w)
    inner = np.swapaxes(u, -1, -2) @ g @ np.swapaxes(vt, -1, -2)
    (n1, n2), rank = w.shape[-2:], s.shape[-1]

    def root(power, size):
        """Return s^power, with a zero for every direction that W does not have; power 0 is the identity."""
        values = np.zeros((*s.shape[:-1], size))
        values[..., :rank] = s
        return values**power

    total = sum(
        root(2 * (j - 1) / n, n1)[..., :, None] * inner * root(2 * (n - j) / n, n2)[..., None, :]
        for j in range(1, n + 1)
    )
    return -u @ total @ vt


def _pair(w, g):
    w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
    if w.ndim < 2 or w.shape != g.shape:
        raise ValueError(f"w and g must be matrices of one shape, got {w.shape} and {g.shape}")
    return w, g


# --- what can be reached ---------------------------------------------------------------------------------------------


def determinant_sign(factors):
    """Return the sign of det(W_N ... W_1), which gradient flow from a balanced start never changes.

    Singular values of balanced flow stay positive for N >= 2 ([1]_, theorem 3), so W never becomes singular: a fit
    whose determinant has the other sign is out of reach, and a completion that has to have it drives W to infinity
    ([5]_, theorem 1). Starts that are not balanced, such as Gaussian ones, may cross, and so may finite steps.

    Parameters
    ----------
    factors : list of array
        [W_1, ..., W_N], W_j of shape (..., d_j, d_{j-1}), with a square product.

    Returns
    -------
    int or ndarray of int
        1, -1, or 0 where the product is singular to working precision.

    Raises
    ------
    ValueError
        If the factors do not fit, or their product is not square.
    """
    product = np.asarray(factors[0], np.float64)
    for w in factors[1:]:
        product = np.asarray(w, np.float64) @ product
    if product.ndim < 2 or product.shape[-1] != product.shape[-2]:
        raise ValueError(f"factors must have a square product, got shape {product.shape}")
    sign = np.linalg.slogdet(product)[0]
    s = np.linalg.svd(product, compute_uv=False)
    regular = s[..., -1] > s[..., 0] * product.shape[-1] * np.finfo(np.float64).eps
    return (sign * regular).astype(np.int64)[()]


def uniqueness_threshold(n, rank):
    """Return how many Gaussian measurements make a positive semidefinite matrix the only feasible one.

    The statistical dimension of the cone of feasible directions, n r - r (r - 1)/2 + (n - r)(n - r + 1)/4: of order
    n^2/4, not n r. Above it every method that keeps W positive semidefinite recovers a matrix of rank r from symmetric
    Gaussian measurements, whatever its bias [4]_; below it the small start is what finds it.

    Parameters
    ----------
    n : int or array
        Size of the matrix. Vectorised.
    rank : int or array
        From 0 to n.

    Returns
    -------
    float or ndarray

    Raises
    ------
    ValueError
        If ``rank`` is not in [0, n].

    Examples
    --------
    >>> from fastdmf import theory
    >>> float(theory.uniqueness_threshold(100, 1))
    2575.0
    """
    n, r = np.asarray(n, np.float64), np.asarray(rank, np.float64)
    if not ((r >= 0) & (r <= n) & (n >= 1)).all():
        raise ValueError(f"rank must be from 0 to n, got rank={rank} and n={n}")
    return (n * r - r * (r - 1) / 2 + (n - r) * (n - r + 1) / 4)[()]


# --- arguments -------------------------------------------------------------------------------------------------------


def _positive(name, value, *, finite=True):
    value = np.asarray(value, np.float64)
    if not (value > 0).all() or (finite and not np.isfinite(value).all()):
        raise ValueError(f"{name} must be positive{' and finite' if finite else ''}, got {value}")
    return value


def _depth(depth, symmetric):
    n = check_count("depth", depth)
    if symmetric and n != 2:
        raise ValueError(f"symmetric=True means W = U U^T, depth 2; got depth={depth!r}")
    return n


def _momentum(value):
    if not 0 <= value < 1:
        raise ValueError(f"momentum must be in [0, 1), got {value!r}")
    return float(value)
