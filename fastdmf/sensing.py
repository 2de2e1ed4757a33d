"""``DMFSensing``: a matrix recovered from linear measurements <A_i, W>."""

import numpy as np
from scipy.sparse.linalg import LinearOperator
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fastdmf.arrays import as_host
from fastdmf.checks import check_flag, float_for
from fastdmf.engine import Status
from fastdmf.fit_parts import Parts, whole
from fastdmf.fitting import (
    check_settings,
    descend,
    draw_held_out,
    explain,
    matrix_attributes,
    report,
    start_factors,
    unit_scale,
)
from fastdmf.operators import GaussianDense, Operator, as_operator
from fastdmf.progress import CallbackSupportMixin
from fastdmf.recovery import largest_rank, recover

__all__ = ["DMFSensing"]

_LEAST = 1e-140  # root mean square of A's entries of which squares are normal numbers
_FITTED = 1e-3  # mean square of the held-out residuals, relative to y, from which exact recovery is worth a try


class DMFSensing(CallbackSupportMixin, RegressorMixin, BaseEstimator):
    """Recover a matrix W from measurements y_i = <A_i, W> by deep matrix factorization.

    A linear model without intercept whose coefficients form a matrix, fitted as W = W_N ... W_1 by descent from a
    small start, whose implicit bias is towards low rank [1]_; with ``psd=True`` as W = U U^T with a square U [2]_. The
    rank is not given.

    Parameters
    ----------
    shape : tuple of int, optional
        (n1, n2) of W. By default that of the measurements if they come as (m, n1, n2) or as an operator, else the
        squarest n1 <= n2 with n1 * n2 features.
    psd : bool
        Fit a symmetric positive semidefinite W = U U^T; ``shape`` must be square.
    depth : int, optional
        Number of factors. Default 3; always 2 with ``psd``.
    width : int or tuple of int, optional
        Inner width or widths, an upper bound on the rank. Default full.
    solver : {"auto", "descent", "recovery"}
        ``"recovery"`` is :func:`fastdmf.recover`, in float64: the last digit where the data are exact, and a rank
        chosen by held-out measurements where they are not. ``"auto"`` descends and, where float64 measurements are met
        to a few percent, recovers the last digits; ``depth``, ``width``, ``rule``, ``max_iter``, ``warm_start`` and
        ``psd=True`` ask for the descent alone.
    rule : str or Rule
        Step rule of the descent, see :func:`fastdmf.solve`; ``"auto"`` has nothing to tune.
    init_scale : float
        End-to-end scale of the start, relative to a W with the entries' root mean square that y suggests.
    max_iter : int, optional
        Steps of the descent; the default is the rule's.
    tol : float
        The descent ends when the squared residual is this share of ||y||^2.
    validation_fraction : float
        Share of the measurements that is held out to choose the stopping point; 0 fits all of them to ``tol``, which
        is right for measurements without noise.
    patience : int
        Evaluations without a lower held-out error before the descent ends.
    device : {"auto", "cpu", "cuda"}
    n_threads : int, optional
        The result does not depend on it.
    random_state : int, RandomState instance or None
        Draws the start and the held-out measurements. Pass an int for results that can be repeated.
    verbose : int
        Above 0, progress is logged at level INFO by the logger ``"fastdmf"``.
    warm_start : bool
        Start from the factors of the last fit.
    checkpoint : path or Checkpoint, optional
        File to which the state of the fit is written every minute, or as the :class:`fastdmf.Checkpoint` says. A fit
        that was killed goes on from it when it is repeated, and ends with the same bits. Where recovery
        follows a descent its file's name ends in ``.recovery``. Needs ``random_state``, and is for one fit: leave it
        out in a cross-validation, and delete the files when done.

    Attributes
    ----------
    matrix_ : ndarray of shape (n1, n2)
    coef_ : ndarray of shape (n1 * n2,)
        ``matrix_``, row by row.
    factors_ : list of ndarray
        [W_1, ..., W_N] with W = W_N ... W_1, or [U].
    components_ : ndarray of shape (r, n2)
        Right singular vectors of W.
    singular_values_ : ndarray of shape (r,)
    effective_rank_ : float
        exp of the entropy of the normalised singular values.
    depth_ : int
    n_iter_ : int
    status_ : fastdmf.engine.Status
    history_ : dict of ndarray
        Records of the descent on scaled data; see :func:`fastdmf.solve`.
    device_, solver_ : str
    n_features_in_ : int
        n1 * n2.
    feature_names_in_ : ndarray of str
        Only when A has string column names.

    See Also
    --------
    fastdmf.solve : The descent itself.

    Notes
    -----
    Ctrl-C ends the solver between two steps: the estimator is fitted as far as it came, and a warning says so. Between
    solvers, or pressed twice, it raises, and the estimator is what it was before ``fit``. Callbacks of scikit-learn
    (from its version 1.9, ``set_callbacks``) see the fit at each of its records.

    References
    ----------
    .. [1] S. Arora, N. Cohen, W. Hu, Y. Luo, "Implicit Regularization in Deep Matrix Factorization", 2019,
       arXiv:1905.13655.
    .. [2] Y. Li, T. Ma, H. Zhang, "Algorithmic Regularization in Over-parameterized Matrix Sensing and Neural Networks
       with Quadratic Activations", 2018, arXiv:1712.09203.

    Examples
    --------
    >>> import numpy as np
    >>> from fastdmf import DMFSensing
    >>> rng = np.random.default_rng(0)
    >>> truth = np.outer(rng.standard_normal(12), rng.standard_normal(10))
    >>> A = rng.standard_normal((80, 12, 10))
    >>> model = DMFSensing(random_state=0).fit(A, A.reshape(80, -1) @ truth.ravel())
    >>> bool(np.linalg.norm(model.matrix_ - truth) < 0.01 * np.linalg.norm(truth))
    True
    """

    def __init__(
        self,
        shape=None,
        psd=False,
        depth=None,
        width=None,
        *,
        solver="auto",
        rule="auto",
        init_scale=1e-3,
        max_iter=None,
        tol=1e-6,
        validation_fraction=0.1,
        patience=50,
        device="auto",
        n_threads=None,
        random_state=None,
        verbose=0,
        warm_start=False,
        checkpoint=None,
    ):
        self.shape = shape
        self.psd = psd
        self.depth = depth
        self.width = width
        self.solver = solver
        self.rule = rule
        self.init_scale = init_scale
        self.max_iter = max_iter
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.n_threads = n_threads
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start
        self.checkpoint = checkpoint

    @whole
    def fit(self, A, y):
        """Fit W to the measurements.

        Parameters
        ----------
        A : array-like of shape (m, n1 * n2) or (m, n1, n2), Operator or scipy LinearOperator
            The measurement matrices, flat ones row by row; a LinearOperator maps ``coef_`` to the measurements.
        y : array-like of shape (m,)

        Returns
        -------
        self

        Raises
        ------
        TypeError
            If A is sparse or not linear algebra.
        ValueError
            If A or y holds text, complex, NaN or infinite values, the lengths differ, A does not fit ``shape``, or a
            parameter is wrong.

        Warns
        -----
        ConvergenceWarning
            If the descent ends neither converged nor early stopped (nor stalled after the best held-out error).
        """
        check_settings(self, ("auto", "descent", "recovery"))
        for name in ("psd", "warm_start"):
            check_flag(name, getattr(self, name))
        if self.psd and self.solver == "recovery":
            raise ValueError("psd=True is fitted by descent: pass solver='auto' or 'descent', or psd=False")
        parts = Parts(self, A, y, most=2 if self.solver == "auto" else 1)
        operator, y = self._read_fit(A, y)
        if self.psd and operator.shape[0] != operator.shape[1]:
            raise ValueError(f"psd=True needs a square matrix, got shape {operator.shape}")

        # In units in which a dense W has entries of root mean square 1, as if they had been observed themselves.
        with np.errstate(over="ignore", invalid="ignore"):
            entry = float(np.sqrt(np.sum(operator.squared_norms()) / operator.size))
        if not np.isfinite(entry):
            raise ValueError("A holds values too large to be squared: scale it down")
        if 0 < entry < _LEAST:
            raise ValueError("A holds values too small to be squared: scale it up")
        unit = unit_scale(y) / entry if entry > 0 else 0.0
        random = check_random_state(self.random_state)
        seed = int(random.randint(np.iinfo(np.int32).max))
        if self.solver == "recovery":
            return self._keep(self._recover(parts, "", operator, y, seed), "recovery", parts)
        solution = descend(
            self,
            parts,
            operator,
            y / y.dtype.type(unit or 1.0),
            depth=self.depth,
            width=self.width,
            held_out=draw_held_out(self.validation_fraction, operator.size, random),
            start=start_factors(self, operator.shape, unit, symmetric=bool(self.psd)),
            init_scale=self.init_scale,
            seed=seed,
            symmetric=bool(self.psd),
            fitted=lambda factors: self._attributes(factors, unit),
        )
        if self._may_be_exact(solution, operator.shape, y / (unit or 1.0)):
            exact = self._recover(parts, ".recovery", operator, y, seed, noise=False)
            if exact.status is Status.EXACT:
                return self._keep(exact, "recovery", parts)
            if exact.status is Status.INTERRUPTED:
                solution.status = Status.INTERRUPTED
        return self._keep(solution, "descent", parts, unit)

    def _may_be_exact(self, solution, shape, y):
        """Return whether the descent met held-out float64 measurements so closely that noise can hardly be all."""
        asked = self.depth is not None or self.width is not None or self.max_iter is not None or self.rule != "auto"
        if self.solver != "auto" or self.psd or asked or self.warm_start:
            return False
        if y.dtype != np.float64 or "validation" not in solution.history or not largest_rank(shape, len(y)):
            return False
        settled = solution.status.success or solution.status is Status.STALLED
        return settled and bool(np.nanmin(solution.history["validation"]) < _FITTED * np.mean(y**2))

    def _recover(self, parts, suffix, operator, y, seed, noise="auto"):
        unit = unit_scale(y)  # of what it works on
        told = parts.options("recovery", suffix, fitted=lambda factors: self._attributes(factors, unit))
        return recover(
            operator,
            y,
            noise=noise,
            validation=self.validation_fraction or 0.05,
            on_failure="ignore",
            **told,
            device=self.device,
            n_threads=self.n_threads,
            random_state=seed,
        )

    def _keep(self, solution, solver, parts, unit=1.0):
        """Set the fitted attributes."""
        parts.reports.close()
        vars(self).update(self._attributes(solution.factors, unit))
        self.solver_ = solver
        report(self, solution)
        parts.reports.end()
        return self

    def _attributes(self, factors, unit):
        """Return what follows from the factors, name -> value."""
        values = matrix_attributes(factors, unit, symmetric=bool(self.psd))
        return {**values, "coef_": values["matrix_"].ravel()}

    def predict(self, A):
        """Return <A_i, W> for every measurement.

        Parameters
        ----------
        A : array-like of shape (m, n1 * n2) or (m, n1, n2), Operator or scipy LinearOperator

        Returns
        -------
        ndarray of shape (m,)

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            As for ``fit``, or if the number or the names of the features differ.
        """
        check_is_fitted(self)
        if isinstance(A, Operator):
            if A.shape != self.matrix_.shape:
                raise ValueError(f"A measures matrices of shape {A.shape}, the fitted one is {self.matrix_.shape}")
            return A.apply(self.matrix_)
        if isinstance(A, LinearOperator):
            return as_operator(A, self.matrix_.shape).apply(self.matrix_)
        with explain("A"):
            A, _ = _flat(A, self.matrix_.shape)
            A = validate_data(self, A, reset=False, dtype=[np.float64, np.float32])
        return A @ self.coef_

    # --- input -------------------------------------------------------------------------------------------------------

    def _read_fit(self, A, y):
        """Return (operator, y as floats of its precision) and set what scikit-learn wants to know of the features."""
        if isinstance(A, (Operator, LinearOperator)):
            if isinstance(A, Operator):
                operator = A
                if self.shape is not None and self._matrix_shape(None) != A.shape:
                    raise ValueError(f"A measures matrices of shape {A.shape}, but shape={tuple(self.shape)}")
            else:
                operator = as_operator(A, self._matrix_shape(A.shape[1]))
            with explain("y"):
                y = validate_data(self, y=y, y_numeric=True)
            self.n_features_in_ = operator.shape[0] * operator.shape[1]
            if operator.size == 0:
                raise ValueError("A has no measurements: at least one is needed")
            _check_numbers(y)
            if len(y) != operator.size:
                raise ValueError(f"A has {operator.size} measurements, y has {len(y)}")
            for name in ("a", "b"):
                if hasattr(operator, name):
                    _check_size(as_host(getattr(operator, name)))
            return operator, np.asarray(y, float_for("y", y, operator.dtype or np.float64))
        A, shape = _flat(A, None if self.shape is None else self._matrix_shape(None))
        with explain("A and y"):
            A, y = validate_data(self, A, y, dtype=[np.float64, np.float32], order="C", y_numeric=True)
        _check_numbers(y)
        _check_size(A)
        A = A.astype(float_for("A", A, A.dtype), copy=False)
        A = A.astype(float_for("y", y, A.dtype), copy=False)
        if self.shape is not None or shape is None:
            shape = self._matrix_shape(A.shape[1])
        return GaussianDense(A, shape), np.asarray(y, A.dtype)

    def _matrix_shape(self, n_features):
        """Return (n1, n2): ``shape``, or the squarest that ``n_features`` allows."""
        if self.shape is None:
            n1 = int(np.sqrt(n_features))
            while n_features % n1:
                n1 -= 1
            return n1, n_features // n1
        try:
            n1, n2 = (int(n) for n in self.shape)
        except (TypeError, ValueError):
            n1 = n2 = 0
        if n1 < 1 or n2 < 1 or (n1, n2) != tuple(self.shape):
            raise ValueError(f"shape must be two positive integers (n1, n2), got {self.shape!r}")
        if n_features is not None and n1 * n2 != n_features:
            raise ValueError(f"A has {n_features} features, but shape={(n1, n2)} has {n1 * n2} entries")
        return n1, n2


def _check_numbers(y):
    """Refuse texts and dates, which scikit-learn lets through."""
    if y.dtype.kind not in "biuf":
        raise TypeError(f"y must hold real numbers, got dtype {y.dtype}: encode it as numbers")


def _check_size(a):
    """Refuse measurement matrices whose squares are not numbers of float64."""
    float_for("A", a, np.dtype(np.float64))
    largest = float(np.abs(a).max(initial=0))
    if 0 < largest < _LEAST:
        raise ValueError(f"A holds values too small to be squared, up to {largest:.1e}: scale it up")


def _flat(A, shape):
    """Return ``A`` as a table of one row a measurement, and the matrix' shape: that of (m, n1, n2), else ``shape``."""
    ndim = A.ndim if hasattr(A, "ndim") else np.asarray(A).ndim
    if ndim != 3:
        return A, shape
    A = np.asarray(A)
    if shape is not None and A.shape[1:] != shape:
        raise ValueError(f"A measures matrices of shape {A.shape[1:]}, but the shape is {shape}")
    return A.reshape(len(A), A.shape[1] * A.shape[2]), A.shape[1:]
