"""Curves of one number: the error, and the effective rank, against a setting or the iteration."""

from dataclasses import dataclass

import numpy as np

from fastdmf.checks import check_number
from fastdmf.display_axes import COLORS, axes_of, draw_legend, label_axes, name_of, scale_of
from fastdmf.display_records import (
    check_same_length,
    clock_of,
    column_of,
    groups_of,
    history_of,
    pick_run,
    record_of,
    singular_values_of,
)

__all__ = ["Curve", "EffectiveRankDisplay", "ErrorDisplay"]

_MARKERS = "os^DvPX"
_MARKED = 25  # curves of no more points than this show them


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
        columns = {name: column_of(table, name, np.float64) for name in (x, value)}
        by = (by,) if isinstance(by, str) else tuple(by or ())
        check_same_length(columns | {name: column_of(table, name) for name in by})
        groups = groups_of(table, by) if by else [(None, slice(None))]
        curves = [_gather(label, columns[x][rows], columns[value][rows]) for label, rows in groups]
        return cls(curves, **({"xlabel": name_of(x), "ylabel": name_of(value)} | options))

    @classmethod
    def from_solution(cls, solution, **options):
        """Return the display of what :func:`fastdmf.solve` returned; ``options`` as for :meth:`from_history`."""
        return cls.from_history(history_of(solution), **options)

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
        values = record_of(history, cls._value, cls._hint)
        clock = clock_of(history, x, run, values.ndim == 2)
        if values.ndim == 1:
            if run is not None:
                raise ValueError(f"run={run!r} is for a batch: history holds a single run")
            values = values[:, None]
        elif run is not None:
            values = pick_run(values, run)[:, None]
        curve = Curve.of(name, clock, values if values.shape[1] == 1 else _carried(values))
        return cls([curve], **({"xlabel": name_of(x), "ylabel": cls._record_label} | options))

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
        ax = axes_of(ax, (6.4, 3.8))
        self.lines_, self.bands_ = [], []
        for k, curve in enumerate(self.curves, start=len(ax.lines)):
            style = {"color": COLORS[k % len(COLORS)], "linewidth": 1.8, "label": curve.label}
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
            xscale = scale_of(np.concatenate([curve.x for curve in self.curves]))
        ax.set_xscale(xscale)
        if yscale == "auto":
            yscale = self._yscale if any((curve.median > 0).any() for curve in self.curves) else "linear"
        ax.set_yscale(yscale)
        label_axes(ax, self.xlabel, f"{self.ylabel}\n(median and range over runs)" if self.bands_ else self.ylabel)
        draw_legend(ax)
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

            truth = effective_rank(singular_values_of(truth))
        elif truth is not None:
            check_number("truth", truth, 0)
        self.truth = truth
