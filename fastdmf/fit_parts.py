"""The solver runs that one ``fit`` consists of: what each is told of progress and of its checkpoint, and all or none.

A fit may run several solvers, one after the other: trials, rival depths, the last digits. Every run has a file of its
own, whose name is that of the estimator's ``checkpoint`` and a suffix that says the run's role. So a fit that was
killed goes on where it was: runs that had ended are read, the one that was cut goes on, and the others follow.
"""

import functools
import sys
from pathlib import Path

import numpy as np

from fastdmf.checkpoint import Checkpoint, CheckpointFile
from fastdmf.progress import Reports, with_callbacks

__all__ = ["Kept", "Parts", "caller_level", "whole"]


class Parts:
    """The solver runs of one fit.

    Parameters
    ----------
    estimator : estimator
        With the parameters ``checkpoint``, ``random_state`` and ``verbose``.
    X, y : object, optional
        The data of the fit, for scikit-learn's callbacks.
    most : int, optional
        Largest number of runs, where it is known.

    Raises
    ------
    TypeError, ValueError
        If the checkpoint is no path or :class:`Checkpoint`, in no folder, or without a seed that would come again.

    Attributes
    ----------
    reports : Reports
    """

    def __init__(self, estimator, X=None, y=None, *, most=None):
        self._checkpoint = estimator.checkpoint
        if self._checkpoint is not None:
            if estimator.random_state is None:
                raise ValueError(
                    "checkpoint needs random_state=an integer: with a fresh draw no other fit could go on from the file"
                )
            if not isinstance(self._checkpoint, Checkpoint):
                self._checkpoint = Checkpoint(self._checkpoint)
            CheckpointFile(self._checkpoint, "")  # is there such a folder?
        self.reports = Reports(estimator, X, y, most=most)

    def options(self, title, suffix="", **told):
        """Return ``callback`` and ``checkpoint`` for a solver, as a dict.

        Parameters
        ----------
        title : str
            Of the run, in reports.
        suffix : str
            To the name of the checkpoint: the run's role, the same whenever the fit is repeated.
        told
            Of :meth:`Reports.run`.
        """
        return {"callback": self.reports.run(title, **told), "checkpoint": self.file(suffix)}

    def file(self, suffix):
        """Return the :class:`Checkpoint` of a role; None without one."""
        if self._checkpoint is None:
            return None
        path = Path(self._checkpoint.path)
        return Checkpoint(path.with_name(path.name + suffix), self._checkpoint.every)


class Kept:
    """Results of many short runs in one file, which are made once.

    Parameters
    ----------
    checkpoint : Checkpoint or None
        None keeps nothing.
    run : callable
        Returns the ``digest`` of data and settings of them all.
    """

    def __init__(self, checkpoint, run):
        self._file = None if checkpoint is None else CheckpointFile(checkpoint, run())
        self._tree = (None if self._file is None else self._file.load()) or {}
        self._changed = False

    def get(self, key):
        """Return what was put under a text, else None."""
        return self._tree.get(key)

    def put(self, key, value):
        """Keep arrays, numbers and texts, alone or in lists; they are in the file when that is due, or at the end."""
        if self._file is None:
            return
        self._tree[key], self._changed = value, True
        if self._file.due():
            self.write()

    def write(self):
        """Write the file, if anything is new."""
        if self._changed:
            self._file.save(self._tree)
            self._changed = False


def whole(fit):
    """Let a method that fits leave a fitted estimator, or else the one that was there before: nothing in between.

    scikit-learn's callbacks are taken down in either case, and NumPy's handling of errors is what it was before.
    """
    managed = with_callbacks(fit)

    @functools.wraps(fit)
    def fit_or_nothing(self, *args, **kwargs):
        before, errors = dict(vars(self)), np.geterr()
        try:
            return managed(self, *args, **kwargs)
        except BaseException:  # Ctrl-C above all
            self.__dict__ = before
            np.seterr(**errors)  # it may come just as an np.errstate(...) is about to end, which then never does
            raise

    return fit_or_nothing


def caller_level():
    """Return the ``stacklevel`` at which a warning names the line outside of fastdmf and scikit-learn that called."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fastdmf", "sklearn"):
        frame, level = frame.f_back, level + 1
    return level
