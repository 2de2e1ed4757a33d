"""``DMFQuadratic``: regression by a one-hidden-layer network with quadratic activations, ||U^T x||^2."""

import warnings

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fastdmf.checks import check_number
from fastdmf.fit_parts import Parts, caller_level, whole
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
from fastdmf.operators import RankOne
from fastdmf.progress import CallbackSupportMixin

__all__ = ["DMFQuadratic"]


class DMFQuadratic(CallbackSupportMixin, RegressorMixin, BaseEstimator):
    """Learn y = ||U^T x||^2, a network with quadratic activations and output weights of one [1]_.

    The prediction is linear in U U^T, a sum of x_i^T (U U^T) x_i terms that are never formed as matrices. Descent from
    a small start finds a U U^T of low rank, although U may be square: the number of hidden units that the data need is
    not given. U itself is determined up to a rotation of its columns.

    Parameters
    ----------
    width : int, optional
        Hidden units, an upper bound on the rank. Default as many as features.
    rule : str or Rule
        Step rule of the descent, see :func:`fastdmf.solve`; ``"auto"`` has nothing to tune. A rule's settings are in
        the units of the scaled data. The paper's own, :class:`fastdmf.rescaled.RescaledGradientDescent`, is there to
        be studied: from 1500 Gaussian inputs in 50 dimensions, rank 3, it has U U^T to 2 to 6 % after 2000 steps, for
        it has to estimate tr(U U^T), where ``"auto"`` has it to 0.03 % within 200
        (``tests/test_quadratic.py -k default``).
    truncation : float, optional
        Leave out of each gradient the inputs whose prediction exceeds this multiple of the root mean square of y, as
        the paper does (its R) to bound the weight of a few long inputs. Default none. With Gaussian inputs, which the
        paper has, it made no difference to ``"auto"``; with heavy tails and noise in proportion to y 2.0 took errors of
        0.18 to 0.32 down to 0.11 to 0.17 (``-k long_inputs``).
    init_scale : float
        Mean prediction of the start, for inputs of independent features, relative to the root mean square of y.
    max_iter : int, optional
        Steps of the descent; the default is the rule's.
    tol : float
        The descent ends when the squared residual is this share of ||y||^2.
    validation_fraction : float
        Share of the samples that is held out to choose the stopping point; 0 fits all of them to ``tol``. That is right
        for data without noise, and no danger with it, as U U^T >= 0 hardly overfits: but such a fit ends with a
        warning, as no ``tol`` is reached.
    patience : int
        Evaluations without a lower held-out error before the descent ends.
    device : {"auto", "cpu", "cuda"}
    n_threads : int, optional
        The result does not depend on it.
    random_state : int, RandomState instance or None
        Draws the start and the held-out samples. Pass an int for results that can be repeated.
    verbose : int
        Above 0, progress is logged at level INFO by the logger ``"fastdmf"``.
    warm_start : bool
        Start from the factor of the last fit.
    checkpoint : path or Checkpoint, optional
        File to which the state of the fit is written every minute, or as the :class:`fastdmf.Checkpoint` says. A fit
        that was killed goes on from it when it is repeated, and ends with the same bits. Needs ``random_state``,
        and is for one fit: leave it out in a cross-validation, and delete the file when done.

    Attributes
    ----------
    factors_ : list of ndarray
        [U], of shape (n_features, width); the precision of X.
    matrix_ : ndarray of shape (n_features, n_features)
        U U^T, symmetric positive semidefinite.
    components_ : ndarray of shape (r, n_features)
        Its eigenvectors.
    singular_values_ : ndarray of shape (r,)
        Its eigenvalues, descending: squares of the singular values of U.
    effective_rank_ : float
        exp of the entropy of the normalised eigenvalues.
    n_iter_ : int
    status_ : fastdmf.engine.Status
    history_ : dict of ndarray
        Records of the descent on scaled data; see :func:`fastdmf.solve`.
    device_ : str
    depth_, solver_ : int, str
        2 and ``"descent"``.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only when X has string column names.

    See Also
    --------
    DMFSensing : With ``psd=True``, U U^T from any linear measurements.
    fastdmf.RankOne : The measurements x_i^T W x_i for :func:`fastdmf.solve`.

    Notes
    -----
    X is divided by the root mean square of its entries, y by its own; neither is centred.

    Ctrl-C ends the solver between two steps: the estimator is fitted as far as it came, and a warning says so. Between
    solvers, or pressed twice, it raises, and the estimator is what it was before ``fit``. Callbacks of scikit-learn
    (from its version 1.9, ``set_callbacks``) see the fit at each of its records.

    References
    ----------
    .. [1] Y. Li, T. Ma, H. Zhang, "Algorithmic Regularization in Over-parameterized Matrix Sensing and Neural Networks
       with Quadratic Activations", 2018, arXiv:1712.09203.

    Examples
    --------
    >>> import numpy as np
    >>> from fastdmf import DMFQuadratic
    >>> rng = np.random.default_rng(0)
    >>> U = rng.standard_normal((20, 2))
    >>> X = rng.standard_normal((400, 20))
    >>> y = np.sum((X @ U) ** 2, axis=1)
    >>> model = DMFQuadratic(random_state=0).fit(X, y)
    >>> bool(np.linalg.norm(model.matrix_ - U @ U.T) < 0.01 * np.linalg.norm(U @ U.T))
    True
    """

    depth = 2  # of U U^T, for ``start_factors``: not a parameter

    def __init__(
        self,
        width=None,
        *,
        rule="auto",
        truncation=None,
        init_scale=1e-3,
        max_iter=None,
        tol=1e-8,
        validation_fraction=0.1,
        patience=50,
        device="auto",
        n_threads=None,
        random_state=None,
        verbose=0,
        warm_start=False,
        checkpoint=None,
    ):
        self.width = width
        self.rule = rule
        self.truncation = truncation
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

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # on targets of both signs
        return tags

    @whole
    def fit(self, X, y):
        """Fit U to the samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Inputs, at least two; not centred, nor given an intercept.
        y : array-like of shape (n_samples,)
            Outputs. Noise may make some of them negative.

        Returns
        -------
        self

        Raises
        ------
        TypeError
            If X is sparse.
        ValueError
            If X or y holds text, complex, NaN or infinite values, the lengths differ, X is zero, or a parameter is
            wrong.

        Warns
        -----
        UserWarning
            If the negative values of y sum to more than half of the positive ones: no network of this form fits them.
        ConvergenceWarning
            If the descent ends neither converged nor early stopped (nor stalled after the best held-out error).
        """
        check_settings(self, solvers=None)
        check_number("init_scale", self.init_scale, 0)
        if self.truncation is not None:
            check_number("truncation", self.truncation, 0)
        parts = Parts(self, X, y, most=1)
        with explain("X and y"):
            X, y = validate_data(
                self, X, y, dtype=[np.float64, np.float32], order="C", y_numeric=True, ensure_min_samples=2
            )
        y = np.asarray(y, X.dtype)
        length = unit_scale(X)
        if length == 0:
            raise ValueError("X is zero everywhere: there is nothing to fit")
        if -y[y < 0].sum() > 0.5 * y[y > 0].sum():
            warnings.warn(
                "much of y is negative, which ||U^T x||^2 cannot be: do not centre y, and fit -y if all of it is",
                UserWarning,
                stacklevel=caller_level(),
            )
        unit = unit_scale(y)
        of_w = unit / length**2
        m, d = X.shape
        random = check_random_state(self.random_state)
        seed = int(random.randint(np.iinfo(np.int32).max))
        solution = descend(
            self,
            parts,
            RankOne(X / X.dtype.type(length)),
            y / y.dtype.type(unit or 1.0),
            depth=self.depth,
            width=self.width,
            held_out=draw_held_out(self.validation_fraction, m, random),
            start=start_factors(self, (d, d), of_w, symmetric=True),
            init_scale=self.init_scale / d,  # of U U^T = alpha I, whose mean prediction is d alpha
            seed=seed,
            symmetric=True,
            fitted=lambda factors: matrix_attributes(factors, of_w, symmetric=True),
            elementwise_loss="squared" if self.truncation is None else ("truncated_prediction", self.truncation),
        )
        parts.reports.close()
        vars(self).update(matrix_attributes(solution.factors, of_w, symmetric=True))
        self.solver_ = "descent"
        report(self, solution)
        parts.reports.end()
        return self

    def predict(self, X):
        """Return ||U^T x||^2 for every row x of ``X``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            As for ``fit``, or if the number or the names of the features differ.
        """
        check_is_fitted(self)
        with explain("X"):
            X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        hidden = X @ self.factors_[0]
        return np.einsum("ij,ij->i", hidden, hidden)
