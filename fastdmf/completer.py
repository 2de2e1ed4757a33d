"""``DMFCompleter``: a matrix known at some of its entries, completed, predicted pair by pair, and kept up to date."""

import copy
import warnings
from dataclasses import replace
from numbers import Real

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from fastdmf.alternating import balanced_factors, balancing_rotations
from fastdmf.backend import get_backend, thread_limits
from fastdmf.checks import check_count
from fastdmf.entries import DUPLICATES, mask_of, merge, read_entries, read_values, read_weights
from fastdmf.entry_kfold import spare_last_entries
from fastdmf.factor_model import FactorModel
from fastdmf.fit_parts import Parts, whole
from fastdmf.fitting import GAIN, check_settings, descend, draw_held_out, effective_rank, in_range, report, unit_scale
from fastdmf.held_entries import HeldEntries
from fastdmf.ids import IdTable, Positions
from fastdmf.progress import CallbackSupportMixin
from fastdmf.recovery import recover
from fastdmf.shards import EntryShards
from fastdmf.variational import bias_model, vbmf

__all__ = ["DMFCompleter"]

# Numbers in the largest temporary array of ``reconstruct`` and ``top_k`` (16 MB in float32).
_CHUNK = 4_000_000
# The widest chain of the descent that is not asked for by name.
_WIDEST = 100
# Latent columns of the descent below this share of the largest are what is left of its start.
_DEAD = 1e-6


class DMFCompleter(CallbackSupportMixin, RegressorMixin, BaseEstimator):
    """Complete a matrix of which some entries are known, as ratings are.

    The model is mean + row bias + column bias + W_N ... W_1, fitted by variational matrix factorization
    (:func:`fastdmf.vbmf`), which has nothing to tune, or by descent from a small start (:func:`fastdmf.solve`).

    Entries come as a sparse matrix, whose stored values are the observed ones, zeros among them; as an array of pairs
    (row, column) with the values in ``y``; or as a pandas or polars DataFrame of (row, column, value). In pairs and
    DataFrames rows and columns are called by ids, integers or strings; in a sparse matrix by their positions. Entries
    on disk, of which only a block at a time is in memory, come as :class:`fastdmf.EntryShards`.

    Parameters
    ----------
    depth : int, optional
        Number of factors N. For the variational solver it ties the prior variances of the components (theta =
        1 - 2/N) and by default follows from the density; the descent takes 3.
    width : int or tuple of int, optional
        Upper bound on the rank; a tuple of inner widths for the descent. By default the solver's.
    solver : {"auto", "variational", "descent", "recovery"}
        "auto" is the variational one. "recovery" is :func:`fastdmf.recover`, for entries without noise: no mean, no
        biases, no bounds, the rank found.
    biases : bool
        Whether rows and columns have biases. Without them is better for exactly low-rank data.
    implicit_features : bool, optional
        Whether *which* entries are known informs the model; see :func:`fastdmf.vbmf`. Right for ratings, a leak where
        the pattern knows the answer.
    n_init : int
        Variational fits from that many starts, whose predictions are averaged: on ratings a little more accurate, at
        n_init times the cost.
    max_iter : int, optional
        Sweeps, or steps of the descent; the default is the solver's.
    tol : float, optional
        Gain of evidence an entry, or squared residual over squared data, at which the fit ends; the default is the
        solver's.
    columns : sequence of str, optional
        Names of the columns (row, column, value) of a DataFrame; by default its first three.
    duplicates : {"error", "sum", "mean", "last"}
        What becomes of an entry that comes more than once. In ``partial_fit`` an entry that the model has already
        comes again: "last" replaces it.
    min_value, max_value : float, optional
        Bounds on predictions; by default those of the observed values. ``-np.inf`` and ``np.inf`` leave them free.
    rule, init_scale, validation_fraction, patience
        Of the descent; see :func:`fastdmf.solve`. The share ``validation_fraction`` of the entries is held out and
        chooses the stopping point and the noise variance; 0 fits everything to ``tol``.
    device : {"auto", "cpu", "cuda"}
    n_threads : int, optional
        The result does not depend on it.
    random_state : int, RandomState instance or None
        Pass an int for results that can be repeated.
    verbose : int
        Above 0, progress is logged at level INFO by the logger ``"fastdmf"``.
    checkpoint : path or Checkpoint, optional
        File to which the state of the fit is written every minute, or as the :class:`fastdmf.Checkpoint` says. A fit
        that was killed goes on from it when it is repeated, and ends with the same bits. Each of
        ``n_init`` starts has a file of its own, the second's name ends in ``.1``. Needs ``random_state``, and is for
        one fit: leave it out in a cross-validation, and delete the files when done.

    Attributes
    ----------
    row_ids_, column_ids_ : ndarray
        Ids of the rows and columns of the model, or their positions.
    mean_ : float
    row_bias_, column_bias_ : ndarray of shape (n1,) and (n2,)
    factors_ : list of ndarray
        Balanced factors [W_1, ..., W_N] of the latent part.
    components_ : ndarray of shape (r, n2)
        Right singular vectors of the latent part.
    singular_values_ : ndarray of shape (r,)
    effective_rank_ : float
        exp of the entropy of the normalised singular values.
    noise_variance_ : float
    depth_ : int
    n_iter_ : int
    status_ : fastdmf.engine.Status
    history_ : dict of ndarray
        Records of the fit; those of the descent are for data of unit root mean square.
    device_, solver_ : str

    See Also
    --------
    DMFImputer : Fills dense matrices with holes.
    EntryKFold : Cross-validation over entries.

    Notes
    -----
    float32 values and integers of up to 16 bits are fitted in float32, others in float64, which takes twice the
    memory and about twice the time. The model keeps its entries, 8 bytes each in float32, for ``partial_fit`` and
    ``top_k``.

    Ctrl-C ends the solver between two steps: the estimator is fitted as far as it came, by the starts that are done
    where there are several, and a warning says so. Before and behind the solver, or pressed twice, it raises, and the
    estimator is what it was before ``fit``. Callbacks of scikit-learn (from its version 1.9, ``set_callbacks``) see
    the records of the fit, and the model at its end.

    Examples
    --------
    >>> import numpy as np
    >>> from fastdmf import DMFCompleter
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((300, 2)) @ rng.standard_normal((2, 200))
    >>> pairs = np.argwhere(rng.random(truth.shape) < 0.1)
    >>> y = truth[tuple(pairs.T)] + 0.1 * rng.standard_normal(len(pairs))
    >>> model = DMFCompleter(random_state=0).fit(pairs, y)
    >>> others = rng.integers((300, 200), size=(1000, 2))
    >>> bool(np.abs(model.predict(others) - truth[tuple(others.T)]).mean() < 0.05)
    True
    >>> columns, values = model.top_k([0, 7], k=3)
    >>> columns.shape
    (2, 3)
    """

    def __init__(
        self,
        depth=None,
        width=None,
        *,
        solver="auto",
        biases=True,
        implicit_features=None,
        n_init=1,
        max_iter=None,
        tol=None,
        columns=None,
        duplicates="error",
        min_value=None,
        max_value=None,
        rule="auto",
        init_scale=1e-3,
        validation_fraction=0.1,
        patience=50,
        device="auto",
        n_threads=None,
        random_state=None,
        verbose=0,
        checkpoint=None,
    ):
        self.depth = depth
        self.width = width
        self.solver = solver
        self.biases = biases
        self.implicit_features = implicit_features
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.columns = columns
        self.duplicates = duplicates
        self.min_value = min_value
        self.max_value = max_value
        self.rule = rule
        self.init_scale = init_scale
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.n_threads = n_threads
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint = checkpoint

    # --- fit ---------------------------------------------------------------------------------------------------------

    @whole
    def fit(self, X, y=None, *, entry_weight=None):
        """Fit the model to entries.

        Parameters
        ----------
        X : sparse matrix of shape (n1, n2), array-like of shape (k, 2), DataFrame, or EntryShards
            Entries, as described above; never written to. Shards are for the variational solver, without features of
            the mask, and stay on disk: the model reads there what it predicts from, and has the entries in memory once
            it was saved and loaded.
        y : array-like of shape (k,), optional
            Values of pairs; also goes with a DataFrame of (row, column).
        entry_weight : array-like of shape (k,), optional
            Weights >= 0 in the order of the entries (for a sparse matrix that of ``X.tocoo()``): an entry of weight 2
            counts as two, one of weight 0 not at all. Shards hold their own.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If X is none of these, values or weights are not finite real numbers, entries come twice (see
            ``duplicates``), ids are missing or of mixed types, there is no entry, or a parameter is wrong.

        Warns
        -----
        ConvergenceWarning
            If the solver ends neither converged nor early stopped.
        """
        self._check()
        parts = Parts(self, X, y, most=self.n_init)
        stored = isinstance(X, EntryShards)
        rows, cols, *data = self._read_shards(X, y, entry_weight) if stored else self._read_fit(X, y, entry_weight)
        exact = self.solver == "recovery"
        if exact:
            self._observed = -np.inf, np.inf
        else:
            self._observed = X.limits if stored else (float(data[1].min()), float(data[1].max()))
        random = check_random_state(self.random_state)
        seed = int(random.randint(np.iinfo(np.int32).max))
        if self.solver == "descent":
            solution, model = self._descend(parts, *data, random, seed)
        elif exact:
            solution, model = self._recover(parts, *data, seed)
        else:
            solution, model = self._vary(parts, data, seed)
        data.clear()  # the model has its own
        parts.reports.close()
        report(self, solution)
        self.solver_ = "variational" if self.solver == "auto" else self.solver
        self.depth_ = len(solution.factors)
        self.n_features_in_ = len(cols) if sparse.issparse(X) else 2
        self._settle(model, rows, cols)
        parts.reports.end()
        return self

    @whole
    def partial_fit(self, X, y=None, *, entry_weight=None):
        """Take in new entries, of rows and columns that may be new: only those that they touch are solved for again.

        Each touched row, then column, becomes the ridge regression of all its entries on the other side. The noise, the
        priors and the number of components stay as they were fitted: a fit of everything is better once the entries
        are many more (MovieLens-1M, an RMSE of 0.8255 at once: 0.8246 when the last tenth comes so, 0.8312 when a half
        does). Without a fit before, this is ``fit``.

        Parameters
        ----------
        X, y, entry_weight
            New entries, as for ``fit``. A sparse matrix may have more rows and columns than before.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            As for ``fit``; an entry that the model has already counts as a duplicate.
        """
        if not hasattr(self, "_model"):
            return self.fit(X, y, entry_weight=entry_weight)
        self._check()
        entries, values, weights = self._read(X, y, entry_weight)
        model = self._model
        dtype = model.dtype
        if entries.shape is None:
            rows, i = self._rows.extend(entries.rows)
            cols, j = self._columns.extend(entries.cols)
        else:
            rows, cols = (table.reach(n) for table, n in zip((self._rows, self._columns), entries.shape))
            i, j = entries.rows, entries.cols
        centred = (values - model.mean).astype(dtype)
        weights = None if weights is None else weights.astype(dtype)
        mask, centred, weights = mask_of(i, j, centred, weights, (len(rows), len(cols)), self.duplicates)
        old, new = model.entries, _sorted(mask, centred, weights)
        entries = merge(old, new, len(cols), self.duplicates, model.mean)
        with thread_limits(self.n_threads):
            model = model.learned(*entries, len(cols), np.unique(i), np.unique(j))
        low, high = self._observed
        self._observed = min(low, float(values.min())), max(high, float(values.max()))
        self._settle(model, rows, cols)
        return self

    def fold_in(self, X, y=None, *, entry_weight=None):
        """Return a model whose rows are new ones, known by their entries, and whose columns are those of this one.

        Each row is the ridge regression of its entries on the columns, with the noise and the priors of the fit, as
        the rows of the fit are. This model stays as it is; ``partial_fit`` adds rows to it.

        Parameters
        ----------
        X, y, entry_weight
            Entries of the new rows, as for ``fit``; a sparse matrix has as many columns as the model. Entries of
            columns that the model does not know are left out.

        Returns
        -------
        DMFCompleter

        Warns
        -----
        UserWarning
            If entries are left out.
        """
        check_is_fitted(self)
        entries, values, weights = self._read(X, y, entry_weight)
        if entries.shape is not None:
            if entries.shape[1] != len(self._columns):
                raise ValueError(f"X has {entries.shape[1]} columns, the model {len(self._columns)}")
            rows, i, j = Positions("row", entries.shape[0]), entries.rows, entries.cols
        else:
            rows, i = IdTable.of("row", entries.rows)
            j = self._columns.encode(entries.cols)
            known = j >= 0
            if not known.all():
                self._say(f"{len(j) - known.sum()} of {len(j)} entries are of unknown columns and left out", 3)
                i, j, values = i[known], j[known], values[known]
                weights = None if weights is None else weights[known]
        model = self._model
        shape = len(rows), len(self._columns)
        mask, values, weights = mask_of(i, j, values, weights, shape, self.duplicates)
        centred = (values - model.mean).astype(model.dtype)
        with thread_limits(self.n_threads):
            model = model.fold_in(*_sorted(mask, centred, weights))
        out = copy.copy(self)
        out._settle(model, rows, self._columns)
        return out

    # --- predictions -------------------------------------------------------------------------------------------------

    def predict(self, X, return_std=False):
        """Return predictions at pairs, or at the stored entries of a sparse pattern.

        A pair of an unknown row or column gets what is known of it: the mean and the other's bias.

        Parameters
        ----------
        X : array-like of shape (k, 2), DataFrame, or sparse matrix of shape (n1, n2)
            Pairs of ids or positions; or a pattern, whose values do not matter.
        return_std : bool
            Also return predictive standard deviations, of the variational solver only. They are right on average and
            too flat between pairs: pairs called certain err more than they say, uncertain ones less.

        Returns
        -------
        ndarray of shape (k,), or a sparse matrix like X; with ``return_std`` two of them

        Raises
        ------
        NotFittedError
            Before ``fit``.
        TypeError, ValueError
            If X is none of these, positions are out of range, or a pattern has another shape.

        Warns
        -----
        UserWarning
            If rows or columns are unknown: how many pairs.
        """
        check_is_fitted(self)
        if return_std and self.solver_ != "variational":
            raise ValueError("return_std=True needs the variational solver: the others have no posterior")
        i, j = self._places(read_entries(X, None, self.columns))
        with thread_limits(self.n_threads):
            parts = self._model.predict(i, j, return_std)
        parts = list(parts) if return_std else [parts]
        self._clip(parts[0])
        parts = [part.astype(self._model.dtype) for part in parts]
        if sparse.issparse(X):
            parts = [_like(X, part) for part in parts]
        return tuple(parts) if return_std else parts[0]

    def reconstruct(self, rows=None, cols=None):
        """Return predictions of whole rows, or of a block of rows and columns.

        Parameters
        ----------
        rows, cols : array-like of ids or positions, optional
            Default all.

        Returns
        -------
        ndarray of shape (len(rows), len(cols))

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            If positions are out of range.

        Warns
        -----
        UserWarning
            If rows or columns are unknown: how many.
        """
        check_is_fitted(self)
        i, j = self._codes(self._rows, rows), self._codes(self._columns, cols)
        out = np.empty((len(i), len(j)), self._model.dtype)
        step = max(1, _CHUNK // max(1, len(j)))
        with thread_limits(self.n_threads):
            for k in range(0, len(i), step):
                out[k : k + step] = self._clip(self._model.block(i[k : k + step], j))
        return out

    def top_k(self, rows=None, k=10, *, exclude_seen=True):
        """Return the columns with the highest predictions in each row.

        Parameters
        ----------
        rows : array-like of ids or positions, optional
            Default all.
        k : int
        exclude_seen : bool
            Leave out the columns in which a row has an entry.

        Returns
        -------
        columns : ndarray of shape (len(rows), k)
            Ids or positions, the best first. A row with fewer than k columns to choose from ends in -1 (None among
            strings).
        values : ndarray of shape (len(rows), k)
            Their predictions; NaN where there is no column.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            If k is no integer from 1 to the number of columns, or positions are out of range.

        Warns
        -----
        UserWarning
            If rows are unknown: how many.
        """
        check_is_fitted(self)
        if check_count("k", k) > len(self._columns):
            raise ValueError(f"k must be at most {len(self._columns)}, the number of columns, got {k}")
        i = self._codes(self._rows, rows)
        codes, values = np.empty((len(i), k), np.int64), np.empty((len(i), k), self._model.dtype)
        step = max(1, _CHUNK // len(self._columns))
        with thread_limits(self.n_threads):
            for start in range(0, len(i), step):
                at = slice(start, start + step)
                codes[at], values[at] = self._model.top(i[at], int(k), exclude_seen)
        missing = np.isneginf(values)
        codes[missing], values = -1, np.where(missing, values.dtype.type(np.nan), self._clip(values))
        return self._columns.decode(codes), values

    def score(self, X, y=None, entry_weight=None):
        """Return the coefficient of determination R^2 of the predictions at entries.

        Parameters
        ----------
        X, y, entry_weight
            As for ``fit``.

        Returns
        -------
        float

        Raises
        ------
        NotFittedError
            Before ``fit``.
        TypeError, ValueError
            As for ``fit`` and ``predict``.
        """
        check_is_fitted(self)
        entries, values, weights = self._read(X, y, entry_weight)
        predictions = self._clip(self._model.predict(*self._places(entries)))
        return float(r2_score(values, predictions, sample_weight=weights))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.string = True
        tags.target_tags.required = False
        return tags

    # --- input -------------------------------------------------------------------------------------------------------

    def _check(self):
        """Check the settings that the solvers do not see."""
        check_settings(self, ("auto", "variational", "descent", "recovery"))
        check_count("n_init", self.n_init)
        if self.duplicates not in DUPLICATES:
            raise ValueError(f"duplicates must be one of {DUPLICATES}, got {self.duplicates!r}")
        if not isinstance(self.biases, (bool, np.bool_)):
            raise ValueError(f"biases must be True or False, got {self.biases!r}")
        for name in ("min_value", "max_value"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or np.isnan(value)):
                raise ValueError(f"{name} must be a number or None, got {value!r}")
        if self.min_value == np.inf or self.max_value == -np.inf:
            raise ValueError(
                f"min_value={self.min_value!r} and max_value={self.max_value!r} leave no value between them"
            )
        if None not in (self.min_value, self.max_value) and not self.min_value < self.max_value:
            raise ValueError(f"min_value must be below max_value, got {self.min_value!r} and {self.max_value!r}")

    def _read(self, X, y, entry_weight):
        """Return (entries, values, weights)."""
        entries = read_entries(X, y, self.columns)
        if len(entries) == 0:
            raise ValueError("X has no entries: at least one observed entry is needed")
        values = read_values(entries.values)
        return entries, values, read_weights(entry_weight, len(entries), values.dtype)

    def _read_fit(self, X, y, entry_weight):
        """Return (tables of rows and columns, mask, values, weights); what the entries were read into is let go."""
        entries, values, weights = self._read(X, y, entry_weight)
        if entries.shape is None:
            rows, i = IdTable.of("row", entries.rows)
            cols, j = IdTable.of("column", entries.cols)
        else:
            rows, cols = (Positions(name, n) for name, n in zip(("row", "column"), entries.shape))
            i, j = entries.rows, entries.cols
        return rows, cols, *mask_of(i, j, values, weights, (len(rows), len(cols)), self.duplicates)

    def _read_shards(self, shards, y, entry_weight):
        """Return (tables of rows and columns, shards)."""
        for name, value in (("y", y), ("entry_weight", entry_weight)):
            if value is not None:
                raise ValueError(f"{name} must be None with EntryShards, which hold it: give it to write_shards(...)")
        if self.solver not in ("auto", "variational"):
            raise ValueError(
                f"solver={self.solver!r} needs the entries in memory: use solver='variational' with EntryShards"
            )
        return IdTable("row", shards.row_ids), IdTable("column", shards.column_ids), shards

    def _places(self, entries):
        """Return the codes of entries, -1 for unknown ones; say how many pairs have any."""
        if entries.shape is not None:
            shape = len(self._rows), len(self._columns)
            if entries.shape != shape:
                raise ValueError(f"the pattern has shape {entries.shape}, the model {shape}")
            return entries.rows, entries.cols
        i, j = self._rows.encode(entries.rows), self._columns.encode(entries.cols)
        unknown = int(((i < 0) | (j < 0)).sum())
        if unknown:
            self._say(
                f"{unknown} of {len(i)} pairs have an unknown row or column; they get the mean and the bias of the one "
                "that is known"
            )
        return i, j

    def _codes(self, table, ids):
        """Return the codes of ids, all of them for None; say how many are unknown."""
        if ids is None:
            return np.arange(len(table))
        ids = np.atleast_1d(np.asarray(ids, dtype=None if len(np.shape(ids)) < 2 else object))
        if ids.ndim != 1:
            raise ValueError(f"{table.name}s must have 1 dimension, got shape {ids.shape}")
        codes = table.encode(ids)
        unknown = int((codes < 0).sum())
        if unknown:
            self._say(f"{unknown} of {len(codes)} {table.name}s are unknown; they get what is known without them")
        return codes

    def _say(self, what, stacklevel=4):
        warnings.warn(f"{type(self).__name__}: {what}", UserWarning, stacklevel=stacklevel)

    def _clip(self, values):
        """Bring values into the bounds, in place."""
        bounds = (
            observed if bound is None else bound
            for bound, observed in zip((self.min_value, self.max_value), self._observed)
        )
        low, high = (in_range(bound, self._model.dtype) for bound in bounds)
        return np.clip(values, low, high, out=values)

    # --- the two solvers ---------------------------------------------------------------------------------------------

    def _vary(self, parts, data, seed):
        """Return the solution of ``vbmf`` and its model; mask, values and weights are let go."""
        entries = data[0] if isinstance(data[0], EntryShards) else HeldEntries(*data[:2], weights=data[2])
        data.clear()
        tol = GAIN if self.tol is None else self.tol
        title = f"depth {'default' if self.depth is None else self.depth}"
        solution = vbmf(
            entries,
            depth=self.depth,
            width=self.width,
            implicit_features=self.implicit_features,
            biases=self.biases,
            n_init=self.n_init,
            max_iter=self.max_iter,
            tol=tol,
            **parts.options(title, goal=("evidence", tol)),
            device=self.device,
            n_threads=self.n_threads,
            random_state=seed,
            on_failure="ignore",
        )
        model = solution.factor_model()
        solution.sweeps = solution.fits = None  # the entries by column, and the factors again
        return solution, model

    def _descend(self, parts, mask, values, weights, random, seed):
        """Return the solution of ``solve`` on what biases leave, and its model."""
        rows, cols = mask.rows, mask.cols
        held_out = spare_last_entries(draw_held_out(self.validation_fraction, len(values), random), rows, cols)
        known = np.ones(len(values), values.dtype) if weights is None else weights.copy()
        if held_out is not None:
            known[held_out] = 0
        # Biases that saw the held-out entries would stop the descent late.
        shown = {"weights": weights if held_out is None else known, "biases": bool(self.biases)}
        base = bias_model(mask, values, **shown, device=self.device, n_threads=self.n_threads)
        z = values - base.predict(rows, cols).astype(values.dtype)
        unit = unit_scale(z)
        solution = descend(
            self,
            parts,
            mask,
            z / z.dtype.type(unit or 1.0),
            weights=weights,
            depth=self.depth,
            width=min(*mask.shape, _WIDEST) if self.width is None else self.width,
            held_out=held_out,
            start=None,
            init_scale=self.init_scale,
            seed=seed,
        )
        left, right = solution.halves()
        turns = balancing_rotations(left, right.T)
        alive = turns[2] > _DEAD * turns[2][:1]
        p, q = (
            (half @ turn[:, alive]).astype(values.dtype) * values.dtype.type(np.sqrt(unit))
            for half, turn in zip((left, right.T), turns)
        )
        at = slice(None) if held_out is None else held_out
        error = z[at] - np.einsum("kh,kh->k", p[rows[at]], q[cols[at]])
        weight = None if weights is None else weights[at]
        noise = float(np.average(np.square(error, dtype=np.float64), weights=weight))
        model = FactorModel.of_latent(base, p, q, max(noise, np.finfo(values.dtype).eps ** 2 * unit**2, 1e-200))
        # All entries count from here on, the held-out ones too.
        model.y, model.w = _sorted(mask, (values - base.mean).astype(values.dtype), weights)[2:]
        model.rows.counts[:-1] = np.bincount(rows, weights, mask.shape[0])
        model.columns.counts[:-1] = np.bincount(cols, weights, mask.shape[1])
        return solution, model

    def _recover(self, parts, mask, values, weights, seed):
        """Return the solution of ``recover`` and its model; mean and biases would add to the rank."""
        width = {} if self.width is None else {"max_rank": self.width}
        solution = recover(
            mask,
            values,
            weights=weights,
            validation=self.validation_fraction or 0.05,
            **parts.options("recovery"),
            on_failure="ignore",
            device=self.device,
            n_threads=self.n_threads,
            random_state=seed,
            **width,
        )
        right, left = (w.astype(values.dtype) for w in solution.factors)
        base = bias_model(mask, values, weights=weights, biases=False, device=self.device, n_threads=self.n_threads)
        scale = float(np.mean(np.square(values, dtype=np.float64)))
        noise = max(solution.noise**2, np.finfo(values.dtype).eps ** 2 * scale)
        model = FactorModel.of_latent(replace(base, mean=0.0), left, right.T, noise)
        model.y, model.w = _sorted(mask, values, weights)[2:]
        return solution, model

    def _settle(self, model, rows, columns):
        """Set the model and what is told of it."""
        self._model, self._rows, self._columns = model, rows, columns
        self.row_ids_, self.column_ids_ = rows.ids, columns.ids
        self.mean_, self.noise_variance_ = model.mean, float(model.noise)
        self.row_bias_, self.column_bias_ = model.biases()
        p, q = model.latent()
        with thread_limits(self.n_threads):
            self.factors_ = balanced_factors(p, q, self.depth_)
        norms = np.linalg.norm(self.factors_[0].astype(np.float64), axis=1)
        alive = norms > 0
        self.components_ = (self.factors_[0][alive] / norms[alive, None]).astype(p.dtype)
        self.singular_values_ = norms[alive] ** self.depth_
        self.effective_rank_ = effective_rank(self.singular_values_)


def _sorted(mask, y, w):
    """Return (indptr, indices, y, w) of entries in the order of the kernels, padded."""
    padded = lambda v: None if v is None else np.pad(mask.sort(v), (0, get_backend().kernels.PAD))  # noqa: E731
    return mask.indptr, mask.indices, padded(y), padded(w)


def _like(X, values):
    """Return a copy of a sparse matrix with other values."""
    out = X.tocsr(copy=True) if X.format in ("lil", "dok") else X.copy()
    out.data = values
    return out
