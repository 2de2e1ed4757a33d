"""What all pictures share: axes, their scales, labels and legend.

Pictures of runs, sweeps and completed matrices are in the manner of scikit-learn's Display classes. A display holds
the numbers that are drawn, as attributes; ``plot`` draws them with matplotlib, which is imported only there, and
returns the display with what it made: ``ax_`` (or ``axes_``), ``figure_`` and the artists. Without ``ax`` a figure of
its own is made by pyplot, for ``plt.show()`` or ``display.figure_.savefig``; on axes that are given, only the data,
the labels, the scales and the legend are drawn, so that several displays can share them. Missing numbers are left
out.
"""

import numpy as np

__all__ = ["COLORS", "axes_of", "draw_legend", "label_axes", "load_pyplot", "name_of", "scale_of"]

# Okabe and Ito's colours, told apart with any kind of colour vision, without the yellow that white swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Settings get a logarithmic axis where they span the first factor and the last step is the second times the first one.
_SPAN, _GROWTH = 10.0, 4.0
_NAMES = {
    "error": "error",
    "init_scale": r"init scale $\alpha$",
    "measurements": "number of measurements $m$",
    "m": "number of measurements $m$",
    "time": "time $t$",
}


def load_pyplot():
    """Return matplotlib's pyplot; an ImportError says how to get it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('drawing needs matplotlib, which is missing: pip install "fastdmf[plot]"') from error
    return pyplot


def axes_of(ax, size):
    """Return ``ax``, or the axes of a new figure of ``size`` inches, with a light grid and no box."""
    if ax is not None:
        return ax
    ax = load_pyplot().subplots(figsize=size, layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def draw_legend(ax):
    """Put the legend of what is labelled, if that is more than one thing, to the right of the data."""
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)


def label_axes(ax, xlabel, ylabel):
    """Label the axes, unless they are labelled already."""
    ax.set_xlabel(ax.get_xlabel() or xlabel)
    ax.set_ylabel(ax.get_ylabel() or ylabel)


def scale_of(values):
    """Return "log" for positive numbers in steps that grow with them, else "linear"."""
    at = np.unique(values)
    wide = at.size > 2 and at[0] > 0 and at[-1] >= _SPAN * at[0]
    return "log" if wide and at[-1] - at[-2] >= _GROWTH * (at[1] - at[0]) else "linear"


def name_of(column):
    """Return what an axis or a legend calls a column of a table, or a number of a history."""
    return _NAMES.get(column, str(column).replace("_", " "))
