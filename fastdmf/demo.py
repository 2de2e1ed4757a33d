"""The main job on real data: fill the holes of an elevation grid, beside scikit-learn's imputers, and draw it.

The grid is the whole of the file that matplotlib ships, and cells are hidden independently of each other: neither was
chosen by looking at results. The settings of every method are fixed, and printed; IterativeImputer's are the largest
of those tried that leave room for the other methods in a minute on two cores. The methods see a table: none is told
that neighbouring cells are neighbours.
"""

import logging
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

from fastdmf.backend import thread_limits
from fastdmf.display_images import InpaintingDisplay
from fastdmf.engine import Status
from fastdmf.imputer import DMFImputer

__all__ = ["Entry", "compare", "draw", "hide_cells", "load_elevation", "run", "tabulate"]


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes
    ----------
    name : str
    rmse : float
        Root mean square error over the hidden cells, in the unit of the data.
    relative : float
        ``rmse`` over the standard deviation of the hidden cells: 1 is what the best constant would reach.
    seconds : float
        Wall-clock time of ``fit_transform``.
    filled : ndarray
        The completed matrix.
    note : str
        Its warnings, empty if all is well.
    """

    name: str
    rmse: float
    relative: float
    seconds: float
    filled: np.ndarray
    note: str


def load_elevation():
    """Return the Jacksboro fault elevation grid, float64 of shape (344, 403), metres."""
    with np.load(get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)) as file:
        return file["elevation"].astype(np.float64)


def hide_cells(truth, fraction, seed):
    """Return a copy of ``truth`` with every cell NaN with probability ``fraction``, independently."""
    holes = np.random.default_rng(seed).random(truth.shape) < fraction
    if not holes.any() or holes.all():
        raise ValueError(f"hiding {fraction:g} of {truth.size} cells leaves nothing to fill or nothing to see")
    return np.where(holes, np.nan, truth)


def _methods(seed):
    """Return the imputers in the order in which they run; their repr names every setting off its default."""
    return [
        DMFImputer(random_state=seed, verbose=1),
        SimpleImputer(keep_empty_features=True),
        KNNImputer(n_neighbors=5, weights="distance", keep_empty_features=True),
        IterativeImputer(max_iter=5, n_nearest_features=100, random_state=seed, keep_empty_features=True),
    ]


def compare(truth, observed, methods):
    """Fill ``observed`` by every method and measure the filled cells against ``truth``.

    Parameters
    ----------
    truth, observed : ndarray of shape (n1, n2)
        Without and with NaN.
    methods : list of imputer

    Returns
    -------
    list of Entry
        In the order of ``methods``.

    Raises
    ------
    KeyboardInterrupt
        Also where a method itself took Ctrl-C as the wish to end early.
    """
    holes = np.isnan(observed)
    spread = truth[holes].std()
    entries = []
    for method in methods:
        name = type(method).__name__
        _say(f"  {name} ...")
        started = time.perf_counter()
        # One BLAS thread for all: the peers' many small products lose more to waking threads than they gain.
        with warnings.catch_warnings(record=True) as caught, thread_limits():
            warnings.simplefilter("always")
            filled = _fill(method, observed)
        seconds = time.perf_counter() - started
        rmse = float(np.sqrt(np.mean((filled[holes] - truth[holes]) ** 2)))
        note = "; ".join(sorted({str(warning.message) for warning in caught}))
        entries.append(Entry(name, rmse, rmse / spread, seconds, filled, note))
    return entries


def _fill(method, observed):
    """Return ``observed`` without holes; Ctrl-C ends the command, not just the fit."""
    filled = method.fit_transform(observed)
    if getattr(method, "status_", None) is Status.INTERRUPTED:
        raise KeyboardInterrupt
    return filled


def tabulate(entries):
    """Return the table as text, the lowest error first, then the notes."""
    entries = sorted(entries, key=lambda entry: entry.rmse)
    lines = [f"{'method':<18}{'RMSE':>8}{'relative':>10}{'seconds':>9}"]
    lines += [f"{e.name:<18}{e.rmse:>8.2f}{e.relative:>10.4f}{e.seconds:>9.2f}" for e in entries]
    lines += [f"note: {e.name}: {e.note}" for e in entries if e.note]
    return "\n".join(lines)


def draw(truth, observed, filled, title):
    """Return a figure of truth, observed, filled and error; the first three share one colour scale.

    Parameters
    ----------
    truth, observed, filled : ndarray of shape (n1, n2)
    title : str
    """
    figure = Figure(figsize=(11, 9), layout="compressed")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    # The errors stand below what was filled in, and what was observed below the truth.
    axes = [figure.add_subplot(2, 2, place) for place in (1, 3, 2, 4)]
    display = InpaintingDisplay(observed, {"filled by DMFImputer": filled}, truth=truth)
    display.plot(axes, errors=True, label="elevation", unit="m")
    return figure


def run(out, *, hide, seed):
    """Run the demonstration: print the settings and the table, write the picture.

    Parameters
    ----------
    out : path
        PNG file to write.
    hide : float
        Fraction of the cells to hide.
    seed : int
        Of the holes, and of every method that draws.
    """
    truth = load_elevation()
    observed = hide_cells(truth, hide, seed)
    n1, n2 = truth.shape
    n_holes = int(np.isnan(observed).sum())
    methods = _methods(seed)
    low, high = truth.min(), truth.max()
    print(f"data      elevation of the Jacksboro fault, whole grid, {n1} x {n2}, {low:.0f} to {high:.0f} m")
    print(f"hidden    {n_holes} of {truth.size} cells, uniformly at random, probability {hide:g}, seed {seed}")
    for method in methods:
        print(f"method    {' '.join(repr(method).split())}")
    sys.stdout.flush()

    _say("compiling the kernels (once per machine, not timed below) ...")
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        _fill(DMFImputer(random_state=seed, max_iter=2), observed)
    _say(f"  {time.perf_counter() - started:.1f} s")
    _say("filling the holes ...")
    entries = compare(truth, observed, methods)

    print(f"\n{tabulate(entries)}")
    print("RMSE: over the hidden cells, metres; relative: RMSE / standard deviation of the hidden cells\n")
    ours = entries[0]
    title = f"{n_holes / truth.size:.0%} of the cells hidden; RMSE over the hidden cells {ours.rmse:.1f} m"
    draw(truth, observed, ours.filled, title).savefig(out, format="png", dpi=110)
    print(f"picture   {out}")


def _say(text):
    logging.getLogger("fastdmf").info(text)
