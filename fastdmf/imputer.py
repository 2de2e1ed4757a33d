"""``DMFImputer``: holes of a table, an image or a sensor matrix filled by deep matrix factorization."""

import warnings
from functools import partial
from numbers import Real

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.impute import MissingIndicator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fastdmf.checks import check_count, check_flag, check_number, float_for
from fastdmf.entry_kfold import spare_last_entries
from fastdmf.fit_parts import Parts, caller_level, whole
from fastdmf.fitting import (
    check_settings,
    draw_held_out,
    effective_rank,
    explain,
    halves,
    in_range,
    report,
    thin_svd,
    unit_scale,
)
from fastdmf.progress import CallbackSupportMixin
from fastdmf.row_fits import TrialInterrupted
from fastdmf.table_choice import FEW_COLUMNS, ChoiceSettings, choose_fit
from fastdmf.table_descent import fit_descent, fit_recovery

__all__ = ["DMFImputer"]

_SOLVERS = ("auto", "variational", "gaussian", "descent", "recovery")
# Columns are centred and brought to one scale when the median column's variance is below this share of the mean one:
# then half of the columns would hardly count in a squared loss. Tables of mixed units are far below, columns of one
# unit far above.
_UNSEEN = 0.01
# In tables of few columns, where one column may be all that tells of another, it is enough that one column's variance
# is this share of another's.
_UNLIKE = 0.1
# Otherwise columns are centred in tables of few columns, where an offset would use up one of few modes, and in tall
# ones, where the means are well determined. Elsewhere the leading mode does it as well or better, and exactly low-rank
# data keep their rank.
_TALL = 4
# Share of the observed entries that ``score`` hides, and the seed that draws them.
_HIDDEN, _HIDDEN_SEED = 0.2, 0
_NEAR = 1e-12  # root mean square, and one over it, within which a table keeps its unit
_STILL = 1e-6  # variance, relative to the smallest of the other columns, given to columns without any


class DMFImputer(CallbackSupportMixin, OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Fill the holes of a matrix by deep matrix factorization.

    Nothing needs tuning. The rows of the table are taken as draws of one distribution z ~ N(m, C), which is fitted to
    the observed entries; the holes h of any row, seen at ``fit`` or not, are filled with their conditional mean given
    its observed columns o,

        z_h = m_h + C_ho C_oo^-1 (z_o - m_o).

    Held-out entries choose how C is found: as the full covariance of up to 500 columns, by expectation maximisation
    with shrinkage, or as L L^T + sigma^2 I of few factors, by variational matrix factorization (:func:`fastdmf.vbmf`)
    or, for data of exactly low rank, by descent from a small start [1]_.

    Parameters
    ----------
    depth : int, optional
        Number of factors, at least 2. For the variational solver it ties the prior variances of the components; for the
        descent 2 and 3 are both fitted by default and the one with the lower held-out error stays.
    width : int or tuple of int, optional
        Inner width or widths, an upper bound on the rank. Given, or with ``depth`` given, the full covariance does not
        compete. Default of the descent: full, min(n_samples, n_features), up to 500.
    solver : {"auto", "variational", "gaussian", "descent", "recovery"}
        ``"auto"`` lets held-out entries choose, is the descent where ``rule``, ``warm_start`` or several widths ask for
        it, and finishes exactly low-rank data by :func:`fastdmf.recover`, which is ``"recovery"``. ``"gaussian"`` is
        the full covariance.
    rule : str or Rule
        Step rule of the descent, see :func:`fastdmf.solve`; ``"auto"`` has nothing to tune.
    init_scale : float
        End-to-end scale of the start, for data of unit root mean square.
    max_iter : int, optional
        Steps of one fit; the default is the solver's.
    tol : float
        The descent ends when the squared residual is this share of the squared data; the others do not use it.
    validation_fraction : float
        Share of the observed entries that is held out to choose the solver and its settings; only the descent, which
        also stops by them, is not fitted to them in the end. 0 holds out nothing: the full covariance up to 500
        columns, else the variational solver. Every row and column keeps an entry for the fit.
    patience : int
        Evaluations without a lower held-out error before the descent ends.
    missing_values : float, default=np.nan
        The marker of a hole: NaN (then ``None`` and pandas' ``NA`` as well) or a number.
    add_indicator : bool
        Append the columns of a :class:`sklearn.impute.MissingIndicator`.
    keep_empty_features : bool
        Keep columns without any observed entry at ``fit``, filled with the mean of all observed entries; else drop
        them. scikit-learn's imputers drop them by default; completion is expected to keep the matrix' shape.
    min_value, max_value : float or array of shape (n_features,)
        Bounds on what is filled in.
    standardize : bool or "auto"
        Whether the columns are centred and brought to unit variance for the fit. ``"auto"`` does so where their units
        clearly differ (the median column has less than a hundredth of the mean column variance), only centres other
        matrices of up to 30 columns or at least four rows a column, and leaves the rest as it is. ``False`` is better
        for tables that are exactly low-rank without an offset: centring by observed means adds a rank.
    device : {"auto", "cpu", "cuda"}
    n_threads : int, optional
        The result does not depend on it.
    random_state : int, RandomState instance or None
        Draws the start and the held-out entries. Pass an int for results that can be repeated.
    verbose : int
        Above 0, progress is logged at level INFO by the logger ``"fastdmf"``.
    warm_start : bool
        Start from the factors of the last fit.
    checkpoint : path or Checkpoint, optional
        File to which the state of the fit is written every minute, or as the :class:`fastdmf.Checkpoint` says. A fit
        that was killed goes on from it when it is repeated, and ends with the same bits. A fit that tries several
        solvers has more files beside it, whose names end in the part that they are of: ``.fold0``, ``.covariances``,
        ``.depth2``, ``.depth3``, ``.recovery``. Needs ``random_state``, and is for one fit: leave it out in a
        cross-validation, and delete the files when done.

    Attributes
    ----------
    factors_ : list of ndarray
        [W_1, ..., W_N]; the fitted matrix is ``mean_ + scale_ * (W_N ... W_1)``.
    mean_, scale_ : ndarray of shape (n_features,)
        Zeros and ones where nothing was centred or rescaled; a power of two for tables far from 1 (1e-12 or 1e12).
    components_ : ndarray of shape (r, n_features)
        Right singular vectors of W_N ... W_1.
    singular_values_ : ndarray of shape (r,)
    effective_rank_ : float
        exp of the entropy of the normalised singular values.
    noise_variance_ : float
        sigma^2, in units of ``scale_``: of a full covariance the mean variance of a column when all others are known.
    depth_ : int
    n_iter_ : int
        Steps of the fit that was kept.
    status_ : fastdmf.engine.Status
    history_ : dict of ndarray
        Records of the fit that was kept; see :func:`fastdmf.solve` and :func:`fastdmf.vbmf`.
    device_, solver_ : str
    indicator_ : MissingIndicator or None
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only when X has string column names.

    See Also
    --------
    fastdmf.vbmf, fastdmf.solve : The solvers themselves.

    Notes
    -----
    Observed entries are returned unchanged, bit for bit, and ``fit_transform(X)`` equals ``fit(X).transform(X)``.
    The fitted matrix is :meth:`reconstruct`; for few factors it differs a little, as it saw the rows themselves.
    :meth:`uncertainty` says how far off a filled value may be.

    Columns that stand in an order, like pixels or times, may be correlated by their distance, and rows that are alike
    may err alike, as those of one cluster do; both are used where held-out entries confirm it. The order of the rows is
    not.

    An all-missing row is filled with the mean of the fitted rows. float32 data is fitted and returned in float32,
    anything else in float64; the fold-in, n_rows (n_features r^2 + r^3) flops for r modes, is done in float64.

    Ctrl-C ends the solver between two steps: the estimator is fitted as far as it came, and a warning says so. Between
    solvers, or pressed twice, it raises, and the estimator is what it was before ``fit``. Callbacks of scikit-learn
    (from its version 1.9, ``set_callbacks``) see the records of all solvers, and the model at the end.

    References
    ----------
    .. [1] S. Arora, N. Cohen, W. Hu, Y. Luo, "Implicit Regularization in Deep Matrix Factorization", 2019,
       arXiv:1905.13655.

    Examples
    --------
    >>> import numpy as np
    >>> from fastdmf import DMFImputer
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 40))
    >>> X = np.where(rng.random(truth.shape) < 0.5, truth, np.nan)
    >>> filled = DMFImputer(random_state=0).fit_transform(X)
    >>> bool(np.abs(filled - truth).max() < 0.05)
    True
    """

    def __init__(
        self,
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
        missing_values=np.nan,
        add_indicator=False,
        keep_empty_features=True,
        min_value=-np.inf,
        max_value=np.inf,
        standardize="auto",
        device="auto",
        n_threads=None,
        random_state=None,
        verbose=0,
        warm_start=False,
        checkpoint=None,
    ):
        self.depth = depth
        self.width = width
        self.solver = solver
        self.rule = rule
        self.init_scale = init_scale
        self.max_iter = max_iter
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.missing_values = missing_values
        self.add_indicator = add_indicator
        self.keep_empty_features = keep_empty_features
        self.min_value = min_value
        self.max_value = max_value
        self.standardize = standardize
        self.device = device
        self.n_threads = n_threads
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start
        self.checkpoint = checkpoint

    @whole
    def fit(self, X, y=None):
        """Fit the factors to the observed entries.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Real numbers, holes marked by ``missing_values`` (or masked, in a masked array); never written to.
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        TypeError
            If X is sparse, or holds dates or other objects.
        ValueError
            If X has no observed entry, or holds text, complex or infinite values, or is not a table, or a parameter
            is wrong.

        Warns
        -----
        ConvergenceWarning
            If the descent ends neither converged nor early stopped (nor stalled after the best held-out error).
        UserWarning
            If a column has no observed entry.
        """
        check_settings(self, _SOLVERS)
        if self.depth is not None:
            check_count("depth", self.depth, 2)
        if np.ndim(self.width) and not len(self.width):
            raise ValueError(f"width must hold at least one inner width, got {self.width!r}")
        if not isinstance(self.standardize, (bool, np.bool_)) and self.standardize != "auto":
            raise ValueError(f"standardize must be True, False or 'auto', got {self.standardize!r}")
        for name in ("add_indicator", "keep_empty_features", "warm_start"):
            check_flag(name, getattr(self, name))
        # Whatever solver is chosen: a wrong setting is an error for any.
        check_number("tol", self.tol, 0)
        check_number("init_scale", self.init_scale, 0)
        check_count("patience", self.patience)
        parts = Parts(self, X, y)
        X, observed = self._read(X, reset=True)
        if not observed.any():
            raise ValueError(f"X has no observed entry: all {X.size} entries are missing_values={self.missing_values}")
        self._low, self._high = self._bounds()
        self._empty = ~observed.any(axis=0)
        if self._empty.any():
            fate = "filled with the mean of all observed entries" if self.keep_empty_features else "dropped"
            self._say(f"columns without any observed entry are {fate}", self._column_names(self._empty))

        rows, cols = np.nonzero(observed)
        values = X[rows, cols].astype(np.float64)
        self.mean_, self.scale_ = self._columns(values, cols, X.shape)
        random = check_random_state(self.random_state)
        seed = int(random.randint(np.iinfo(np.int32).max))
        held_out = spare_last_entries(draw_held_out(self.validation_fraction, len(values), random), rows, cols)
        # A column that is empty at fit has no part in the model.
        z = np.where(observed, (X - self.mean_) / self.scale_, 0.0)[:, ~self._empty]
        try:
            dtype = float_for("X", z, X.dtype)
            fit = self._fit_rows(parts, z, observed[:, ~self._empty], held_out, seed, dtype)
        except TrialInterrupted as interrupted:
            fit = interrupted.fit
        parts.reports.close()
        self._keep(fit)
        self.indicator_ = None
        if self.add_indicator:
            self.indicator_ = MissingIndicator(error_on_new=False).fit(np.where(observed, X, np.nan))
        parts.reports.end()
        return self

    def transform(self, X):
        """Fill the holes of X; its rows need not be those of the fit.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_features_out)
            X with its holes filled and its observed entries unchanged; float32 for float32, else float64.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            As for ``fit``, or if the number or the names of the features differ.

        Warns
        -----
        UserWarning
            If a row has no observed entry: it is filled with the mean of the fitted rows.
        """
        check_is_fitted(self)
        X, observed = self._read(X, reset=False)
        blank = np.flatnonzero(~observed.any(axis=1))
        if blank.size:
            self._say("rows without any observed entry are filled with the mean of the fitted rows", blank)
        out = self._fill(X, observed)[:, self._kept()]
        if self.indicator_ is not None:
            flags = self.indicator_.transform(np.where(observed, X, np.nan))
            out = np.hstack([out, flags.astype(out.dtype)])
        return out

    def uncertainty(self, X):
        """Return the standard deviation of what ``transform`` fills into each hole, 0 where X is observed.

        It is that of the row's conditional distribution, given its observed entries and the fitted model: a value in a
        hole is to be expected within one standard deviation of what is filled in about two times out of three.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_features) or without the columns that ``transform`` drops
            In the units of X, bounds aside; NaN for columns without any observed entry at ``fit``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            As for ``transform``.
        """
        check_is_fitted(self)
        X, observed = self._read(X, reset=False)
        _, deviations = self._fill(X, observed, deviations=True)
        return deviations.astype(X.dtype)[:, self._kept()]

    def reconstruct(self):
        """Return the fitted matrix mean_ + scale_ * (W_N ... W_1), shape (n_samples, n_features_out).

        Raises
        ------
        NotFittedError
            Before ``fit``.
        """
        check_is_fitted(self)
        product = self.factors_[0]
        for w in self.factors_[1:]:
            product = w @ product
        return (self.mean_ + self.scale_ * product).astype(product.dtype)[:, self._kept()]

    def score(self, X, y=None):
        """Return minus the root mean square error on a hidden fifth of the observed entries of X.

        A fixed seed hides them, the rest of each row predicts them. (Scoring entries that the model can see would
        favour the widest model.)

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : ignored

        Returns
        -------
        float
            In units of ``scale_``: those of X unless the columns were brought to one scale.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            As for ``transform``, or if X has no observed entry.
        """
        check_is_fitted(self)
        X, observed = self._read(X, reset=False)
        rows, cols = np.nonzero(observed & self._kept())
        if not rows.size:
            raise ValueError("X has no observed entry to score")
        hidden = np.random.default_rng(_HIDDEN_SEED).permutation(rows.size)[: max(1, round(_HIDDEN * rows.size))]
        rows, cols = rows[hidden], cols[hidden]
        visible = observed.copy()
        visible[rows, cols] = False
        error = (self._fill(X, visible)[rows, cols] - X[rows, cols]) / self.scale_[cols]
        return -unit_scale(error)

    def get_feature_names_out(self, input_features=None):
        """Return the names of the columns of ``transform``.

        Parameters
        ----------
        input_features : array-like of str, optional
            Default ``feature_names_in_``, or x0, x1, ...

        Returns
        -------
        ndarray of str objects
        """
        check_is_fitted(self)
        names = super().get_feature_names_out(input_features)
        out = names[self._kept()]
        if self.indicator_ is None:
            return out
        return np.concatenate([out, self.indicator_.get_feature_names_out(names)])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # --- input -------------------------------------------------------------------------------------------------------

    def _read(self, X, reset):
        """Return (X as floats, whether each entry is observed); X may still be the user's memory."""
        if isinstance(X, np.ma.MaskedArray):
            X = X.astype(np.result_type(X.dtype, np.float32)).filled(self._marker())
        with explain("X"):
            X = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], order="C", ensure_all_finite=False)
        nan = np.isnan(X)
        marker = self._marker()
        holes = nan if np.isnan(marker) else X == X.dtype.type(marker)
        if nan.any() and holes is not nan:
            raise ValueError(f"X contains NaN, but holes are marked by missing_values={self.missing_values}")
        infinite = np.isinf(X) & ~holes
        if infinite.any():
            i, j = np.argwhere(infinite)[0]
            raise ValueError(
                f"X contains infinite values ({infinite.sum()}, the first at row {i}, column {j}): mark entries that "
                "are not known by missing_values"
            )
        return X, ~holes

    def _marker(self):
        """Return ``missing_values`` as a float; pandas' NA and None become NaN with the rest of the table."""
        value = self.missing_values
        if value is None or type(value).__name__ == "NAType":
            return np.nan
        if not isinstance(value, Real):
            raise ValueError(f"missing_values must be NaN or a number, got {value!r}")
        return float(value)

    def _bounds(self):
        """Return min_value and max_value as arrays over the columns."""
        bounds = []
        for name in ("min_value", "max_value"):
            try:
                value = np.asarray(getattr(self, name), np.float64)
                bounds.append(np.broadcast_to(value, (self.n_features_in_,)).copy())
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name} must be a number or hold one for each of the {self.n_features_in_} features, "
                    f"got {getattr(self, name)!r}"
                ) from None
        if not (bounds[0] < bounds[1]).all():
            raise ValueError(f"min_value must be below max_value, got {self.min_value!r} and {self.max_value!r}")
        return bounds

    def _kept(self):
        """Which columns of X come out."""
        return np.ones_like(self._empty) if self.keep_empty_features else ~self._empty

    def _column_names(self, which):
        return getattr(self, "feature_names_in_", np.arange(self.n_features_in_))[which]

    def _say(self, what, members):
        shown = ", ".join(str(name) for name in members[:10])
        more = f" and {len(members) - 10} more" if len(members) > 10 else ""
        warnings.warn(f"{type(self).__name__}: {what}: {shown}{more}", UserWarning, stacklevel=caller_level())

    # --- fit ---------------------------------------------------------------------------------------------------------

    def _columns(self, values, cols, shape):
        """Return (mean, scale) of the columns for the fit: zeros and ones where the data is left as it is."""
        n, p = shape
        count = np.maximum(np.bincount(cols, minlength=p), 1)
        with np.errstate(over="ignore", invalid="ignore"):
            mean, overall = np.bincount(cols, values, minlength=p) / count, values.mean()
            variance = np.bincount(cols, np.square(values - mean[cols]), minlength=p) / count
        if not np.isfinite(variance).all() or not np.isfinite(overall):
            raise ValueError(f"X holds values too large to be squared, up to {np.abs(values).max():.1e}: scale it down")
        varying = variance[variance > 0]
        if self.standardize == "auto":
            few = p <= FEW_COLUMNS and varying.size > 0 and varying.min() < _UNLIKE * varying.max()
            rescale = few or (varying.size > 0 and np.median(varying) < _UNSEEN * varying.mean())
            centre = rescale or p <= FEW_COLUMNS or n >= _TALL * p
        else:
            rescale = centre = bool(self.standardize)
        if not centre:
            mean = np.zeros(p)
        mean[self._empty] = overall
        if not rescale or varying.size == 0:
            return mean, np.full(p, _far_unit(values))
        # Nothing is known of the unit of a column that does not vary: its holes stay at its mean.
        return mean, np.sqrt(np.where(variance > 0, variance, _STILL * varying.min()))

    def _fit_rows(self, parts, z, seen, held_out, seed, dtype):
        """Return the :class:`RowFit` of the solver asked for, or of the one that predicts held-out entries best.

        Parameters, and what is raised, as of :func:`choose_fit`.
        """
        descent = partial(fit_descent, self, parts, z, seen, held_out, dtype, columns=~self._empty, seed=seed)
        computed = {"device": self.device, "n_threads": self.n_threads}
        recovery = partial(
            fit_recovery, parts, z, seen, dtype, validation=self.validation_fraction, seed=seed, **computed
        )
        if self.solver == "recovery":
            return recovery()
        if self.solver == "descent" or (self.solver == "auto" and self._asks_for_descent()):
            return descent()
        settings = ChoiceSettings(self.solver, self.depth, self.width, self.max_iter, **computed)
        return choose_fit(settings, parts, z, seen, held_out, dtype, seed=seed, descent=descent, recovery=recovery)

    def _asks_for_descent(self):
        """Whether a setting is given that the descent alone has."""
        return self.rule != "auto" or self.warm_start or np.ndim(self.width) > 0

    def _keep(self, fit):
        """Set the fitted attributes."""
        self._rows = fit.rows
        factors, told = list(fit.factors), ~self._empty
        if self._empty.any():
            factors[0] = np.zeros((len(factors[0]), len(told)), factors[0].dtype)
            factors[0][:, told] = fit.factors[0]
        self.factors_, self.depth_ = factors, len(factors)
        self.solver_ = fit.solver
        _, s, vt = thin_svd(*halves(factors))
        self.singular_values_, self.components_ = s, vt
        self.effective_rank_ = effective_rank(s)
        self.noise_variance_ = fit.rows.noise
        report(self, fit)

    # --- fold-in -----------------------------------------------------------------------------------------------------

    def _fill(self, X, observed, deviations=False):
        """Return a copy of X with its holes filled; optionally also the standard deviations of what was filled in."""
        told = ~self._empty
        z = np.where(observed, (X - self.mean_) / self.scale_, 0.0)[:, told]
        # Before the fit's units are undone: what was observed keeps its bits.
        fitted = np.zeros(X.shape)
        filled = self._rows.fill(z, observed[:, told], deviations)
        fitted[:, told] = filled[0] if deviations else filled
        low, high = (in_range(bound, X.dtype) for bound in (self._low, self._high))
        out = np.where(observed, X, np.clip(self.mean_ + self.scale_ * fitted, low, high)).astype(X.dtype)
        if not deviations:
            return out
        spread = np.full(X.shape, np.nan)
        spread[:, told] = filled[1]
        # Of units far from 1 there is no square.
        return out, np.where(observed, 0.0, np.sqrt(spread) * self.scale_)


def _far_unit(values):
    """Return 1, or a power of two for values so far from 1 that squares of squared errors leave the range of floats."""
    size = unit_scale(values)
    return 1.0 if size == 0 or _NEAR <= size <= 1 / _NEAR else 2.0 ** min(round(np.log2(size)), 1023)
