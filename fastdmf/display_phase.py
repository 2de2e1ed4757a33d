"""Phase transitions: the success rate over two settings."""

import numpy as np

from fastdmf.checks import check_number
from fastdmf.display_axes import axes_of, label_axes, name_of, scale_of
from fastdmf.display_records import check_same_length, column_of

__all__ = ["PhaseTransitionDisplay"]

_TICKS = 12  # cells along an axis of a map that are all labelled


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
        columns = {name: column_of(table, name, np.float64) for name in (x, y, value)}
        check_same_length(columns)
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
            if column_of(table, value).dtype == bool:
                raise ValueError(f"table[{value!r}] holds successes already: leave threshold out")
            success, label = values <= threshold, rf"success rate ({name_of(value)} $\leq$ {threshold:g})"
        xs, columns_at = np.unique(columns[x][there], return_inverse=True)
        ys, rows_at = np.unique(columns[y][there], return_inverse=True)
        wins, runs = np.zeros((2, len(ys), len(xs)))
        np.add.at(wins, (rows_at, columns_at), success[there])
        np.add.at(runs, (rows_at, columns_at), 1)
        rates = np.divide(wins, runs, out=np.full_like(wins, np.nan), where=runs > 0)
        return cls(xs, ys, rates, **({"xlabel": name_of(x), "ylabel": name_of(y), "label": label} | options))

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
        ax = axes_of(ax, (6.0, 4.2))
        from matplotlib import patheffects

        if own:
            ax.grid(False)
        xscale, yscale = (
            scale_of(at) if scale == "auto" else scale for at, scale in ((self.x, xscale), (self.y, yscale))
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
        label_axes(ax, self.xlabel, self.ylabel)
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
