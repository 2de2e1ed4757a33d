"""Singular values against the iteration."""

from collections.abc import Mapping

import numpy as np

from fastdmf.display_axes import COLORS, axes_of, draw_legend, label_axes, name_of
from fastdmf.display_records import clock_of, history_of, pick_run, record_of, singular_values_of

__all__ = ["SingularValuesDisplay"]

_ROUNDING = 1e-15  # of the largest singular value: below it lies rounding, which a logarithmic axis need not show


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
        return cls.from_history(history_of(solution), **options)

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
        values = record_of(history, name, hint)
        if values.ndim == 3 and run is None:
            last = values.shape[1] - 1
            raise ValueError(f"history holds {last + 1} runs: choose one with run=0 to run={last}")
        if values.ndim == 2 and run is not None:
            raise ValueError(f"run={run!r} is for a batch: history holds a single run")
        clock = clock_of(history, x, run, values.ndim == 3)
        values = values if run is None else pick_run(values, run)
        there = np.isfinite(values).all(axis=1) & np.isfinite(clock)
        truth = None if truth is None else singular_values_of(truth)
        return cls(clock[there], values[there], truth=truth, xlabel=name_of(x))

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
        ax = axes_of(ax, (6.4, 3.8))
        from matplotlib import colormaps

        count = self.singular_values.shape[1]
        truth = np.zeros(0) if self.truth is None else self.truth[:count]
        colored = len(truth) or min(count, len(COLORS))
        colors = COLORS if colored <= len(COLORS) else colormaps["viridis"](np.linspace(0, 0.85, colored))
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
        label_axes(ax, self.xlabel, "singular value")
        draw_legend(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self
