"""Pictures of runs, sweeps and completed matrices, in the manner of scikit-learn's Display classes.

A display holds the numbers that are drawn, as attributes; ``plot`` draws them with matplotlib, which is imported only
there, and returns the display with what it made: ``ax_`` (or ``axes_``), ``figure_`` and the artists. Without ``ax`` a
figure of its own is made by pyplot, for ``plt.show()`` or ``display.figure_.savefig``; on axes that are given, only the
data, the labels, the scales and the legend are drawn, so that several displays can share them.

A *table* is whatever gives a column by its name, ``table["error"]``, one row a run: what :func:`fastdmf.sweep` returns,
a dict of arrays, a data frame.
Missing numbers are left out of every picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastdmf.checks import check_count, check_number, check_real

__all__ = [
    "Curve",
    "EffectiveRankDisplay",
    "ErrorDisplay",
    "InpaintingDisplay",
    "PhaseTransitionDisplay",
    "SingularValuesDisplay",
]

# Okabe and Ito's colours, told apart with any kind of colour vision, without the yellow that white swallows.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^DvPX"
_MARKED = 25  # curves of no more points than this show them
# Settings get a logarithmic axis where they span the first factor and the last step is the second times the first one.
_SPAN, _GROWTH = 10.0, 4.0
_ROUNDING = 1e-15  # of the largest singular value: below it lies rounding, which a logarithmic axis need not show
_TICKS = 12  # cells along an axis of a map that are all labelled
_NAMES = {
    "error": "error",
    "init_scale": r"init scale $\alpha$",
    "measurements": "number of measurements $m$",
    "m": "number of measurements $m$",
    "time": "time $t$",
}


# --- axes ------------------------------------------------------------------------------------------------------------


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('drawing needs matplotlib, which is missing: pip install "fastdmf[plot]"') from error
    return pyplot


def _axes(ax, size):
    """Return ``ax``, or the axes of a new figure of ``size`` inches, with a light grid and no box."""
    if ax is not None:
        return ax
    ax = _pyplot().subplots(figsize=size, layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def _legend(ax):
    """Put the legend of what is labelled, if that is more than one thing, to the right of the data."""
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)


def _label(ax, xlabel, ylabel):
    """Label the axes, unless they are labelled already."""
    ax.set_xlabel(ax.get_xlabel() or xlabel)
    ax.set_ylabel(ax.get_ylabel() or ylabel)


def _scale(values):
    """Return "log" for positive numbers in steps that grow with them, else "linear"."""
    at = np.unique(values)
    wide = at.size > 2 and at[0] > 0 and at[-1] >= _SPAN * at[0]
    return "log" if wide and at[-1] - at[-2] >= _GROWTH * (at[1] - at[0]) else "linear"


def _name(column):
    return _NAMES.get(column, str(column).replace("_", " "))


# --- histories and tables --------------------------------------------------------------------------------------------


def _history(solution):
    history = getattr(solution, "history", None)
    if history is None:
        raise TypeError(f"solution must be what fastdmf.solve returns, got {type(solution).__name__}")
    return history


def _record(history, name, hint):
    """Return what a history holds under ``name``, or raise an error that ends with the ``hint``."""
    if not isinstance(history, Mapping):
        raise TypeError(f"history must be a dict of arrays, as in Solution.history, got {type(history).__name__}")
    if name not in history:
        raise ValueError(f"history has no {name!r}, only {', '.join(map(str, history))}: {hint}")
    return np.asarray(history[name], np.float64)


def _pick(values, run):
    """Return the records of ``run``, an index into the second axis."""
    run = check_count("run", run, 0)
    if run >= values.shape[1]:
        raise ValueError(f"run={run} is not there: history holds {values.shape[1]} runs, counted from 0")
    return values[:, run]


def _clock(history, x, run, batched):
    """Return the horizontal axis: the iteration, or another number that the history holds for each record."""
    clock = _record(history, x, "x names what the records are drawn against")
    if batched and clock.ndim == 2:
        if run is None:
            raise ValueError(f"history[{x!r}] differs from run to run of a batch: choose one with run=")
        clock = _pick(clock, run)
    if clock.ndim != 1:
        raise ValueError(f"history[{x!r}] is not one number a record, it has shape {clock.shape}")
    return clock


def _column(table, name, dtype=None):
    """Return a column of a table as a 1-D array; as float64 a missing number is NaN."""
    try:
        values = table[name]
    except Exception as error:  # every kind of table has an error of its own for a column that it lacks
        known = getattr(table, "columns", table if isinstance(table, Mapping) else None)
        listed = "" if known is None else f", only {', '.join(map(str, known))}"
        raise ValueError(f"table has no column {name!r}{listed}") from error
    try:
        values = np.asarray(values, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"table[{name!r}] must hold numbers: {error}") from error
    if values.ndim != 1:
        raise ValueError(f"table[{name!r}] must be one value a row, got shape {values.shape}")
    if values.size == 0:
        raise ValueError(f"table is empty: its column {name!r} has no rows")
    return values


def _same_length(columns):
    """Refuse columns, a dict by name, of different lengths."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"table has columns of different lengths: {lengths}")


def _groups(table, by):
    """Return a list of (label, rows) of the groups that the columns ``by`` make, rows as indices.

    Numbers go up; anything else stands in the order of its first row. A row with a NaN there is in none.
    """
    groups = {}
    for row, key in enumerate(zip(*(_column(table, name).tolist() for name in by))):
        if not any(isinstance(value, float) and np.isnan(value) for value in key):
            groups.setdefault(key, []).append(row)
    keys = list(groups)
    if all(isinstance(value, (int, float)) for key in keys for value in key):
        keys.sort()
    return [(", ".join(_shown(name, value) for name, value in zip(by, key)), groups[key]) for key in keys]


def _shown(name, value):
    """Return what a legend says of the column ``name``'s ``value``."""
    if isinstance(value, str):
        return value
    return f"{_name(name)} {value:g}" if isinstance(value, float) else f"{_name(name)} {value}"


def _singular_values(truth):
    """Return the singular values of ``truth``, descending and positive: of a matrix, or given in any order."""
    truth = check_real("truth", truth, (1, 2))
    if truth.ndim == 1:
        s = np.sort(truth[truth > 0])[::-1]
    else:
        s = np.linalg.svd(truth, compute_uv=False)
        s = s[s > max(truth.shape) * np.finfo(s.dtype).eps * s[0]]
    if s.size == 0:
        raise ValueError("truth is zero everywhere")
    return s.astype(np.float64)


# --- singular values -------------------------------------------------------------------------------------------------


class SingularValuesDisplay:
    """Singular values of W against the iteration.

    Parameters
    ----------
    iteration : ndarray of shape (records,)
    singular_values : ndarray of shape (records, k)
        Descending in each record.
    truth : ndarray of shape (r,), optional
        The singular values that the run should end at, descending, without zeros.
    xlabel : str

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure
    lines_ : list of Line2D
        One for each singular value.
    truth_lines_ : list of Line2D

    Examples
    --------
    >>> import fastdmf, numpy as np
    >>> mask = fastdmf.EntryMask([0, 0, 1], [0, 1, 0], (2, 2))
    >>> solution = fastdmf.solve(mask, np.ones(3), track="singular_values", random_state=0)
    >>> display = fastdmf.SingularValuesDisplay.from_solution(solution, truth=np.ones((2, 2)))
    >>> display.plot().figure_.savefig("values.png")  # doctest: +SKIP
    """

    def __init__(self, iteration, singular_values, *, truth=None, xlabel="iteration"):
        self.iteration, self.singular_values = iteration, singular_values
        self.truth, self.xlabel = truth, xlabel

    @classmethod
    def from_solution(cls, solution, **options):
        """Return the display of what :func:`fastdmf.solve` returned; ``options`` as for :meth:`from_history`."""
        return cls.from_history(_history(solution), **options)

    @classmethod
    def from_history(cls, history, *, truth=None, run=None, x="iteration"):
        """Return the display of a history.

        Parameters
        ----------
        history : dict of ndarray
            Recorded with ``track=("singular_values",)`` or ``("top_singular_values",)``.
        truth : array of shape (n1, n2) or (r,), optional
            The true matrix, or its singular values.
        run : int, optional
            Which run of a batch; needed for a batch alone.
        x : str
            What else to draw against: ``"time"`` for the gradient flow.

        Raises
        ------
        TypeError, ValueError
            If the history lacks what is drawn, or ``run`` is missing, wrong, or not wanted.
        """
        name = "singular_values"
        if isinstance(history, Mapping) and name not in history and "top_singular_values" in history:
            name = "top_singular_values"
        hint = 'track=("singular_values",) is needed: fastdmf.solve records them, the estimators do not'
        values = _record(history, name, hint)
        if values.ndim == 3 and run is None:
            last = values.shape[1] - 1
            raise ValueError(f"history holds {last + 1} runs: choose one with run=0 to run={last}")
        if values.ndim == 2 and run is not None:
            raise ValueError(f"run={run!r} is for a batch: history holds a single run")
        clock = _clock(history, x, run, values.ndim == 3)
        values = values if run is None else _pick(values, run)
        there = np.isfinite(values).all(axis=1) & np.isfinite(clock)
        truth = None if truth is None else _singular_values(truth)
        return cls(clock[there], values[there], truth=truth, xlabel=_name(x))

    def plot(self, ax=None, *, xscale="linear", yscale="log", **kwargs):
        """Draw the singular values: the first r in colours for a truth of rank r, else the first seven, others in grey.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        xscale, yscale : {"linear", "log"}
        **kwargs
            For ``ax.plot``, for every line.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        ax = _axes(ax, (6.4, 3.8))
        from matplotlib import colormaps

        count = self.singular_values.shape[1]
        truth = np.zeros(0) if self.truth is None else self.truth[:count]
        colored = len(truth) or min(count, len(_COLORS))
        colors = _COLORS if colored <= len(_COLORS) else colormaps["viridis"](np.linspace(0, 0.85, colored))
        colors = [*colors[:colored], *["0.75"] * (count - colored)]
        self.lines_ = []
        for k, (values, color) in enumerate(zip(self.singular_values.T, colors)):
            label = rf"$\sigma_{{{k + 1}}}$" if k < colored else "_"
            if k == colored:
                label = rf"$\sigma_{{{k + 1}}}$" + (rf" to $\sigma_{{{count}}}$" if k + 1 < count else "")
            style = {"color": color, "label": label, "linewidth": 1.8 if k < colored else 1.0} | kwargs
            self.lines_ += ax.plot(self.iteration, values, zorder=2.9 - 0.5 * k / count, **style)
        self.truth_lines_ = [
            ax.axhline(value, color="0.2", linewidth=0.9, linestyle="--", label="_" if k else "truth", zorder=2.2)
            for k, value in enumerate(truth)
        ]
        ax.set_xscale(xscale)
        ax.set_yscale(yscale)
        if yscale == "log" and self.singular_values.size:
            ax.set_ylim(bottom=max(ax.get_ylim()[0], _ROUNDING * self.singular_values.max()))
        _label(ax, self.xlabel, "singular value")
        _legend(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self


# --- curves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Runs that share settings, told by one curve; the arrays have the same length.

    Attributes
    ----------
    label : str or None
    x : ndarray
        Ascending.
    median, low, high : ndarray
        Over the runs at each ``x``, those without a number left out.
    """

    label: str | None
    x: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, label, x, values):
        """Return the curve of runs ``values`` (points, runs), NaN where one is missing, at ``x`` (points,)."""
        there = np.isfinite(values).any(axis=1) & np.isfinite(x)
        values = np.where(np.isfinite(values), values, np.nan)[there]
        ends = [function(values, axis=1) for function in (np.nanmedian, np.nanmin, np.nanmax)]
        return cls(label, x[there], *ends)

    @property
    def spread(self):
        """Whether the runs differ anywhere."""
        return bool((self.high > self.low).any())


class _Curves:
    """What :class:`ErrorDisplay` and :class:`EffectiveRankDisplay` share."""

    _value = _record_label = _hint = ""
    _yscale = "linear"
    truth = None

    def __init__(self, curves, *, xlabel, ylabel):
        self.curves = [curve for curve in curves if curve.x.size]
        if not self.curves:
            raise ValueError(f"there is no finite number to draw for {ylabel!r} against {xlabel!r}")
        self.xlabel, self.ylabel = xlabel, ylabel

    @classmethod
    def from_table(cls, table, *, x="init_scale", by="depth", value=None, **options):
        """Return the display of a table of runs.

        Parameters
        ----------
        table : SweepTable, dict of array, data frame, or whatever gives a column as ``table[name]``
            One row a run.
        x : str
            Column of numbers for the horizontal axis, ``"init_scale"`` or ``"measurements"``, say.
        by : str or sequence of str, optional
            Columns whose combined values make a curve each, like ``"depth"`` or ``("method", "depth")``; None makes
            one of all rows.
        value : str, optional
            Column of numbers that is drawn: the median over the rows that share ``x`` and ``by``, and their range.
            Default that of the class.
        **options
            For the class.

        Raises
        ------
        ValueError
            If a column is missing, has no rows, is of another length, or should hold numbers and does not, or if no
            row has all of them.
        """
        value = cls._value if value is None else value
        columns = {name: _column(table, name, np.float64) for name in (x, value)}
        by = (by,) if isinstance(by, str) else tuple(by or ())
        _same_length(columns | {name: _column(table, name) for name in by})
        groups = _groups(table, by) if by else [(None, slice(None))]
        curves = [_gather(label, columns[x][rows], columns[value][rows]) for label, rows in groups]
        return cls(curves, **({"xlabel": _name(x), "ylabel": _name(value)} | options))

    @classmethod
    def from_solution(cls, solution, **options):
        """Return the display of what :func:`fastdmf.solve` returned; ``options`` as for :meth:`from_history`."""
        return cls.from_history(_history(solution), **options)

    @classmethod
    def from_history(cls, history, *, name=None, run=None, x="iteration", **options):
        """Return the display of a history, as one curve.

        Parameters
        ----------
        history : dict of ndarray
        name : str, optional
            The curve in the legend: displays drawn on the same axes are told apart by it.
        run : int, optional
            Which run of a batch. By default all: their median and range, where a run that has ended keeps its last
            value.
        x : str
            What else to draw against: ``"time"`` for the gradient flow.
        **options
            For the class.

        Raises
        ------
        TypeError, ValueError
            If the history lacks what is drawn, or ``run`` is wrong or not wanted.
        """
        values = _record(history, cls._value, cls._hint)
        clock = _clock(history, x, run, values.ndim == 2)
        if values.ndim == 1:
            if run is not None:
                raise ValueError(f"run={run!r} is for a batch: history holds a single run")
            values = values[:, None]
        elif run is not None:
            values = _pick(values, run)[:, None]
        curve = Curve.of(name, clock, values if values.shape[1] == 1 else _carried(values))
        return cls([curve], **({"xlabel": _name(x), "ylabel": cls._record_label} | options))

    def plot(self, ax=None, *, xscale="auto", yscale="auto", **kwargs):
        """Draw a line of medians for every curve and, where runs differ, a band from their lowest to their highest.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Curves that are on it already keep their colours.
        xscale, yscale : {"auto", "linear", "log"}
            ``"auto"`` is logarithmic where that is natural.
        **kwargs
            For ``ax.plot``, for every line.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        ax = _axes(ax, (6.4, 3.8))
        self.lines_, self.bands_ = [], []
        for k, curve in enumerate(self.curves, start=len(ax.lines)):
            style = {"color": _COLORS[k % len(_COLORS)], "linewidth": 1.8, "label": curve.label}
            if curve.x.size <= _MARKED:
                style |= {"marker": _MARKERS[k % len(_MARKERS)], "markersize": 5}
            (line,) = ax.plot(curve.x, curve.median, **(style | kwargs))
            self.lines_.append(line)
            if curve.spread:
                band = ax.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.18, linewidth=0)
                self.bands_.append(band)
        self.truth_line_ = None
        if self.truth is not None:
            self.truth_line_ = ax.axhline(self.truth, color="0.2", linewidth=1.0, linestyle="--", label="truth")
        if xscale == "auto":
            xscale = _scale(np.concatenate([curve.x for curve in self.curves]))
        ax.set_xscale(xscale)
        if yscale == "auto":
            yscale = self._yscale if any((curve.median > 0).any() for curve in self.curves) else "linear"
        ax.set_yscale(yscale)
        _label(ax, self.xlabel, f"{self.ylabel}\n(median and range over runs)" if self.bands_ else self.ylabel)
        _legend(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _gather(label, x, values):
    """Return the curve of ``values`` at the numbers ``x``, both (rows,)."""
    at = np.unique(x[np.isfinite(x)])
    rows = [values[x == each] for each in at]
    runs = np.full((len(at), max(map(len, rows), default=1)), np.nan)
    for k, row in enumerate(rows):
        runs[k, : len(row)] = row
    return Curve.of(label, at, runs)


def _carried(values):
    """Return records (records, runs) with the last number of every run in place of the NaN that follow it."""
    values = values.copy()
    for run in values.T:
        there = np.flatnonzero(np.isfinite(run))
        if there.size:
            run[there[-1] + 1 :] = run[there[-1]]
    return values


class ErrorDisplay(_Curves):
    """Errors against the init scale, the number of measurements or the iteration, a curve for each depth or method.

    Parameters
    ----------
    curves : list of Curve
    xlabel, ylabel : str

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure
    lines_ : list of Line2D
    bands_ : list of PolyCollection
        Of the curves whose runs differ.

    Notes
    -----
    A history has ``"error"``, the squared relative error ||W - W*||_F^2 / ||W*||_F^2, where :func:`fastdmf.solve` was
    given ``truth=``.

    Examples
    --------
    >>> import fastdmf
    >>> table = {"init_scale": [1e-3, 1e-1, 1e-3, 1e-1], "depth": [2, 2, 3, 3], "error": [1e-2, 0.4, 1e-4, 0.1]}
    >>> [curve.label for curve in fastdmf.ErrorDisplay.from_table(table, x="init_scale", by="depth").curves]
    ['depth 2', 'depth 3']
    """

    _value = "error"
    _record_label = r"squared relative error $\|W - W^*\|_F^2\,/\,\|W^*\|_F^2$"
    _hint = "fastdmf.solve records the error where it is given truth="
    _yscale = "log"


class EffectiveRankDisplay(_Curves):
    """Effective rank of W against the iteration or the init scale.

    Parameters
    ----------
    curves : list of Curve
    xlabel, ylabel : str
    truth : float or array, optional
        The truth's effective rank, or the true matrix or its singular values: a dashed line.

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure
    lines_ : list of Line2D
    bands_ : list of PolyCollection
        Of the curves whose runs differ.
    truth_line_ : Line2D or None

    Notes
    -----
    The effective rank is exp(-sum p log p) with p = s / sum s, s the singular values of W; a history has it where
    :func:`fastdmf.solve` was given ``track=("effective_rank",)``.
    """

    _value = "effective_rank"
    _record_label = "effective rank"
    _hint = 'track=("effective_rank",) is needed: fastdmf.solve records it, the estimators do not'

    def __init__(self, curves, *, xlabel, ylabel, truth=None):
        super().__init__(curves, xlabel=xlabel, ylabel=ylabel)
        if np.ndim(truth):
            from fastdmf.fitting import effective_rank

            truth = effective_rank(_singular_values(truth))
        elif truth is not None:
            check_number("truth", truth, 0)
        self.truth = truth


# --- phase transitions -----------------------------------------------------------------------------------------------


class PhaseTransitionDisplay:
    """Success rates over two settings, as a map.

    Parameters
    ----------
    x, y : ndarray of shape (nx,) and (ny,)
        The settings, ascending.
    rates : ndarray of shape (ny, nx)
        Share of the runs that succeeded; NaN where there was none.
    xlabel, ylabel, label : str
        ``label`` is that of the colour bar.
    theory : tuple of array (x, y), optional
        A curve to draw over the map, like m = r (n1 + n2 - r), the number of free parameters.
    theory_label : str

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure
    mesh_ : QuadMesh
    colorbar_ : Colorbar or None
    theory_line_ : Line2D or None

    Examples
    --------
    >>> import fastdmf
    >>> table = {"measurements": [50, 50, 90, 90], "rank": [1, 1, 1, 1], "error": [0.5, 1e-4, 1e-5, 1e-4]}
    >>> fastdmf.PhaseTransitionDisplay.from_table(table, threshold=1e-3).rates
    array([[0.5, 1. ]])
    """

    def __init__(self, x, y, rates, *, xlabel, ylabel, label="success rate", theory=None, theory_label="theory"):
        self.x, self.y, self.rates = x, y, rates
        self.xlabel, self.ylabel, self.label = xlabel, ylabel, label
        if theory is not None:
            theory = tuple(np.asarray(each, np.float64) for each in theory)
            if len(theory) != 2 or theory[0].shape != theory[1].shape or theory[0].ndim != 1:
                raise ValueError(f"theory must be (x, y), two lists of one length, got {[t.shape for t in theory]}")
        self.theory, self.theory_label = theory, theory_label

    @classmethod
    def from_table(cls, table, *, x="measurements", y="rank", value="error", threshold=None, **options):
        """Return the display of a table of runs.

        Parameters
        ----------
        table : SweepTable, dict of array, data frame, or whatever gives a column as ``table[name]``
            One row a run.
        x, y : str
            Columns of numbers for the axes.
        value : str
            Column of successes, true or false, or of errors. A missing value counts neither way, an infinite error as
            a failure.
        threshold : float, optional
            Errors up to it are successes; for a column of errors alone.
        **options
            For the class.

        Raises
        ------
        ValueError
            If a column is missing, has no rows, is of another length or should hold numbers and does not, or if
            ``threshold`` is missing, not wanted or not positive, or ``theory`` is not two lists of one length.
        """
        columns = {name: _column(table, name, np.float64) for name in (x, y, value)}
        _same_length(columns)
        values = columns[value]
        there = ~np.isnan(np.array(list(columns.values()))).any(axis=0)
        if not there.any():
            raise ValueError(f"table has no row with {x!r}, {y!r} and {value!r}")
        if threshold is None:
            if not np.isin(values[there], (0, 1)).all():
                raise ValueError(f"table[{value!r}] holds numbers, not successes: pass threshold=, the largest success")
            success, label = values, "success rate"
        else:
            check_number("threshold", threshold, 0)
            if _column(table, value).dtype == bool:
                raise ValueError(f"table[{value!r}] holds successes already: leave threshold out")
            success, label = values <= threshold, rf"success rate ({_name(value)} $\leq$ {threshold:g})"
        xs, columns_at = np.unique(columns[x][there], return_inverse=True)
        ys, rows_at = np.unique(columns[y][there], return_inverse=True)
        wins, runs = np.zeros((2, len(ys), len(xs)))
        np.add.at(wins, (rows_at, columns_at), success[there])
        np.add.at(runs, (rows_at, columns_at), 1)
        rates = np.divide(wins, runs, out=np.full_like(wins, np.nan), where=runs > 0)
        return cls(xs, ys, rates, **({"xlabel": _name(x), "ylabel": _name(y), "label": label} | options))

    def plot(self, ax=None, *, xscale="auto", yscale="auto", colorbar=True, **kwargs):
        """Draw the map; cells without a run are hatched.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        xscale, yscale : {"auto", "linear", "log"}
        colorbar : bool
        **kwargs
            For ``ax.pcolormesh``.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        own = ax is None
        ax = _axes(ax, (6.0, 4.2))
        from matplotlib import patheffects

        if own:
            ax.grid(False)
        xscale, yscale = (
            _scale(at) if scale == "auto" else scale for at, scale in ((self.x, xscale), (self.y, yscale))
        )
        edges = _edges(self.x, xscale), _edges(self.y, yscale)
        ax.patch.set(facecolor="white", hatch="////", edgecolor="0.7", linewidth=0)
        style = {"cmap": "cividis", "vmin": 0, "vmax": 1} | kwargs
        self.mesh_ = ax.pcolormesh(*edges, np.ma.masked_invalid(self.rates), **style)
        self.theory_line_ = None
        if self.theory is not None:
            (line,) = ax.plot(*self.theory, color="white", linewidth=2, label=self.theory_label)
            line.set_path_effects([patheffects.withStroke(linewidth=4, foreground="black")])
            ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.01), borderaxespad=0.0, frameon=False)
            self.theory_line_ = line
        ax.set(xscale=xscale, yscale=yscale, xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
        for axis, at in ((ax.xaxis, self.x), (ax.yaxis, self.y)):
            shown = at[:: -(-len(at) // _TICKS)]
            axis.set_ticks(shown, [f"{each:g}" for each in shown])
            axis.set_ticks([], minor=True)
        _label(ax, self.xlabel, self.ylabel)
        self.colorbar_ = ax.figure.colorbar(self.mesh_, ax=ax, label=self.label) if colorbar else None
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _edges(at, scale):
    """Return the borders of the cells around ``at``, in the middle between neighbours on that scale."""
    at = np.log(at) if scale == "log" else at
    if len(at) == 1:
        edges = np.array([at[0] - 0.5, at[0] + 0.5])
    else:
        middle = 0.5 * (at[1:] + at[:-1])
        edges = np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])
    return np.exp(edges) if scale == "log" else edges


# --- inpainting ------------------------------------------------------------------------------------------------------


class InpaintingDisplay:
    """A matrix with holes beside what one or several methods filled in, on one colour scale.

    Parameters
    ----------
    observed : array of shape (n1, n2)
        NaN (or masked) where hidden.
    filled : dict of str to array of shape (n1, n2)
        The completed matrix of each method, by its name.
    truth : array of shape (n1, n2), optional
        NaN where it is not known.

    Attributes
    ----------
    errors : dict of str to float
        Root mean square error over the hidden entries whose truth is known, in the unit of the data; empty without
        ``truth``.
    axes_ : list of matplotlib Axes
        Of the panels: truth, if there is one, observed, filled, errors, if they are asked for.
    figure_ : matplotlib Figure
    images_ : list of AxesImage
        In the same order.
    colorbars_ : list of Colorbar

    Raises
    ------
    TypeError, ValueError
        If the shapes differ, an array is not real or not a matrix or has infinite values, what is filled has holes
        left, or there is nothing to show.
    """

    def __init__(self, observed, filled, *, truth=None):
        self.observed = _image("observed", observed)
        if not isinstance(filled, Mapping) or not filled:
            raise TypeError(f"filled must be a dict of name -> matrix, got {type(filled).__name__} {filled!r:.40}")
        self.filled = {name: _image(f"filled[{name!r}]", each, self.observed.shape) for name, each in filled.items()}
        for name, each in self.filled.items():
            if np.isnan(each).any():
                raise ValueError(f"filled[{name!r}] still has {np.isnan(each).sum()} holes")
        self.truth = None if truth is None else _image("truth", truth, self.observed.shape)
        self._seen = np.isfinite(self.observed)
        if not self._seen.any():
            raise ValueError("observed has no entry: all of them are NaN")
        self.errors = {}
        if self.truth is not None:
            known = ~self._seen & np.isfinite(self.truth)
            if not known.any():
                raise ValueError("observed hides no entry whose truth is known: leave truth out")
            misses = {name: (each - self.truth)[known] for name, each in self.filled.items()}
            self.errors = {name: float(np.sqrt(np.mean(miss**2))) for name, miss in misses.items()}

    @classmethod
    def from_estimator(cls, estimator, X, *, truth=None, name=None):
        """Return the display of what a fitted imputer makes of X.

        Parameters
        ----------
        estimator : DMFImputer, or another fitted transformer that keeps the shape of X
            Its ``missing_values`` mark the holes.
        X : array-like of shape (n1, n2)
        truth : array of shape (n1, n2), optional
        name : str, optional
            Default the name of the class.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        TypeError, ValueError
            As above, also if ``transform`` drops or adds columns.
        """
        observed = _image("X", X)
        marker = getattr(estimator, "missing_values", np.nan)
        observed = np.where(observed == marker, np.nan, observed) if isinstance(marker, (int, float)) else observed
        return cls(observed, {name or type(estimator).__name__: estimator.transform(X)}, truth=truth)

    def plot(self, ax=None, *, errors=False, label=None, unit="", **kwargs):
        """Draw the panels; the colours span the truth where it is known, else what was observed.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of them, optional
            One for each panel, in the order of ``axes_``.
        errors : bool
            Also draw filled - truth for every method. The colours end where 99 % of the hidden entries lie within.
        label : str, optional
            What the matrix holds, for the colour bar.
        unit : str
            Its unit, for the colour bars and the errors in the titles.
        **kwargs
            For ``imshow``, for all panels but the errors.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If there are not as many axes as panels, or ``errors`` are asked for without a truth.
        """
        if errors and self.truth is None:
            raise ValueError("errors=True needs the truth: pass truth= when the display is made")
        titles, images = ["truth"], [self.truth]
        if self.truth is None:
            titles, images = [], []
        titles.append(f"observed ({1 - self._seen.mean():.0%} hidden)")
        images.append(self.observed)
        ending = f" {unit}" if unit else ""
        titles += [f"{name}\nRMSE {self.errors[name]:.3g}{ending}" if self.errors else name for name in self.filled]
        images += self.filled.values()
        misses = [each - self.truth for each in self.filled.values()] if errors else []
        self.axes_ = self._axes(ax, len(images), len(misses))
        self.figure_ = self.axes_[0].figure

        whole = self.observed if self.truth is None else self.truth
        n1, n2 = whole.shape
        shape = {"interpolation": "nearest", "aspect": "equal" if max(n1, n2) <= 4 * min(n1, n2) else "auto"}
        style = shape | {"cmap": "viridis", "vmin": np.nanmin(whole), "vmax": np.nanmax(whole)} | kwargs
        self.images_ = [axis.imshow(image, **style) for axis, image in zip(self.axes_, images)]
        # With errors, observed stands in their row, and the row of the truth has the colour bar.
        row = [self.axes_[0], *self.axes_[2 : len(images)]] if errors else self.axes_
        text = " ".join(part for part in (label, f"[{unit}]" if unit else "") if part)
        self.colorbars_ = [self.figure_.colorbar(self.images_[0], ax=row, label=text, pad=0.05 / len(row))]
        if errors:
            sizes = np.abs([miss[~self._seen] for miss in misses])
            limit = float(np.nanquantile(sizes, 0.99)) or 1.0
            style = shape | {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
            axes = self.axes_[len(images) :]
            self.images_ += [axis.imshow(miss, **style) for axis, miss in zip(axes, misses)]
            titles += ["error: filled - truth"] * len(misses)
            text = f"error [{unit}]" if unit else "error"
            place = {"ax": axes, "pad": 0.05 / len(axes)}
            self.colorbars_.append(self.figure_.colorbar(self.images_[-1], label=text, extend="both", **place))
        for axis, title in zip(self.axes_, titles):
            axis.set_title(title, fontsize="medium")
            axis.set(xticks=[], yticks=[])
        return self

    def _axes(self, ax, n_images, n_errors):
        """Return a list with the axes of the panels: those given, or new ones in a row, or in two with errors."""
        if ax is not None:
            axes = list(np.atleast_1d(np.asarray(ax, object)).ravel())
            if len(axes) != n_images + n_errors:
                raise ValueError(f"ax holds {len(axes)} axes for {n_images + n_errors} panels")
            return axes
        n1, n2 = self.observed.shape
        rows, columns = (2, 1 + n_errors) if n_errors else (1, n_images)
        height = 2.8 * min(max(n1 / n2, 0.5), 1.5)
        size = (2.8 * columns + 1.2, (height + 0.6) * rows)
        grid = _pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="compressed")[1]
        if not n_errors:
            return list(grid[0])
        # Observed stands below the truth, the error of each method below what it filled in.
        return [grid[0, 0], grid[1, 0], *grid[0, 1:], *grid[1, 1:]]


def _image(name, values, shape=None):
    """Return a real matrix as float64, NaN where it is masked."""
    if isinstance(values, np.ma.MaskedArray):
        values = values.astype(np.float64).filled(np.nan)
    values = np.asarray(values)
    if values.dtype == object:  # a data frame with missing entries of another kind than NaN
        values = values.astype(np.float64)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must be a matrix, got shape {values.shape}")
    if np.isinf(values).any():
        raise ValueError(f"{name} holds infinite values")
    if shape is not None and values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, observed {shape}")
    return values.astype(np.float64)
