"""What a fit tells while it runs: to the logger ``"fastdmf"``, to a stream, and to scikit-learn's callbacks.

A :class:`Reports` belongs to one ``fit`` of one estimator and hands a callback to each solver run of it. Where the
estimator is verbose, every twentieth record becomes a line of the log, and a :class:`StreamProgress`, if one is open,
sees all of them. Callbacks of scikit-learn (``set_callbacks``, from its version 1.9) see the fit as a task, its solver
runs as tasks of that, and their records as tasks without parts.
"""

import logging
import math
import shutil
import sys
import time
from dataclasses import dataclass

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:
        """Nothing: this scikit-learn has no callbacks."""

    def with_callbacks(method):
        """Return the method as it is."""
        return method


__all__ = ["CallbackSupportMixin", "Report", "Reports", "StreamProgress", "logger", "with_callbacks"]

logger = logging.getLogger("fastdmf")
logger.addHandler(logging.NullHandler())

# Records between two lines of the log, and the seconds after which a slow run's next record gets one anyway.
_LOG_EVERY, _LOG_SECONDS = 20, 10.0
# Seconds between two drawings of a terminal's line, and those of a fit that shows nothing.
_REDRAW, _SILENT = 0.1, 1.0
_BAR = 20  # characters
# Steps from which a limit is none: ``recover`` ends by itself.
_NO_LIMIT = 10**9
# Open streams, the innermost last.
_streams = []


@dataclass(frozen=True)
class Report:
    """What a record says of a run.

    Attributes
    ----------
    name : str
        Of the estimator, and of the run where a fit may have several.
    iteration : int
    values : list of str
        Loss and held-out loss, or what the solver has instead.
    elapsed : float
        Seconds since the run began.
    share : float or None
        How much is done, from 0 to 1: the larger one of steps over the largest number of steps and of how far the
        logarithm of the loss (the gain of evidence, the largest change) has come towards the tolerance, both since the
        run's first record. A forecast: held-out data may end a run before. None where nothing limits a run.
    left : float or None
        Seconds that the rest would take at the same pace.
    """

    name: str
    iteration: int
    values: list
    elapsed: float
    share: float | None
    left: float | None

    def __str__(self):
        parts = [f"iteration {self.iteration}", *self.values]
        if self.share is not None:
            parts.insert(0, f"{100 * self.share:.0f} %")
        if self.left is not None:
            parts.append(f"at most {_duration(self.left)} left")
        return f"{self.name}: {', '.join(parts)}"


def _duration(seconds):
    """Return a text like 7 s, 3 min, 2.5 h."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


class StreamProgress:
    """Shows the progress of the fits inside a ``with`` block that are verbose.

    On a terminal: one line with a bar that is written over again and taken away in the end. Elsewhere: a plain line
    now and then. Nothing in the first second of a fit.

    Parameters
    ----------
    stream : text stream, optional
        Default ``sys.stderr``, as it is when the block is entered.
    every : float
        Seconds between two lines where the stream is no terminal.

    Raises
    ------
    ValueError
        If ``every`` is negative or no number.

    Examples
    --------
    >>> import numpy as np
    >>> from fastdmf import DMFImputer
    >>> from fastdmf.progress import StreamProgress
    >>> X = np.where(np.eye(20), np.nan, np.add.outer(np.arange(20.0), np.arange(20.0)))
    >>> with StreamProgress(every=5.0):
    ...     filled = DMFImputer(solver="descent", random_state=0, verbose=1).fit_transform(X)
    """

    def __init__(self, stream=None, every=5.0):
        if isinstance(every, bool) or not isinstance(every, (int, float)) or not every >= 0:
            raise ValueError(f"every must be a number of seconds >= 0, got {every!r}")
        self.stream, self.every = stream, every
        self._out, self._terminal, self._drawn, self._last = None, False, 0, -math.inf

    def __enter__(self):
        self._out = sys.stderr if self.stream is None else self.stream
        self._terminal = bool(getattr(self._out, "isatty", bool)())
        self._last = -math.inf
        _streams.append(self)
        return self

    def __exit__(self, *exception):
        _streams.remove(self)
        self.clear()

    def show(self, report, since):
        """Write a report, if it is time to.

        Parameters
        ----------
        report : Report
        since : float
            Seconds since its fit began, of which the run may be a part only.
        """
        now = time.monotonic()
        if since < _SILENT or now - self._last < (_REDRAW if self._terminal else self.every):
            return
        self._last = now
        if self._terminal:
            self._draw(_with_bar(report))
        else:
            self.write(f"{report}\n")

    def clear(self):
        """Take the terminal's line away."""
        if self._drawn:
            self._draw("")
            self.write("\r")

    def write(self, text):
        """Write text as it is; a stream that is closed or full does not end a fit."""
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):
            pass

    def _draw(self, text):
        text = text[: max(shutil.get_terminal_size().columns - 1, 0)]
        self.write("\r" + text.ljust(self._drawn))
        self._drawn = len(text)


def _with_bar(report):
    if report.share is None:
        return str(report)
    done = int(_BAR * report.share)
    return f"[{'#' * done}{'.' * (_BAR - done)}] {report}"


class Reports:
    """What one ``fit`` tells of its solver runs.

    Parameters
    ----------
    estimator : estimator
        ``verbose`` and scikit-learn's callbacks are its own.
    X, y : object, optional
        The data of the fit, for callbacks.
    most : int, optional
        Largest number of solver runs, where it is known.
    """

    def __init__(self, estimator, X=None, y=None, *, most=None):
        self.estimator, self._data = estimator, {"X": X, "y": y}
        self._started = time.perf_counter()
        self._context = self._tasks = None
        if getattr(estimator, "_skl_callbacks", None):
            self._context = estimator._init_callback_context(max_subtasks=most)
            self._context.call_on_fit_task_begin(estimator=estimator, **self._data)

    def run(self, title, *, goal=None, check_every=1, fitted=None):
        """Return a callback for one solver run, or for several in a row; None where nobody listens.

        Parameters
        ----------
        title : str
            Of the run, behind the estimator's name.
        goal : tuple of str and float, optional
            Name and end of the recorded value that the run brings down; of ``"evidence"`` it is the gain.
        check_every : int
            Steps between records.
        fitted : callable, optional
            Maps the current factors to the attributes of an estimator that was fitted up to here.
        """
        if not self.estimator.verbose and self._context is None:
            return None
        return _Run(self, title, goal, check_every, fitted)

    def say(self, text):
        """Log a sentence if the estimator is verbose."""
        if self.estimator.verbose:
            logger.info("%s %s", type(self.estimator).__name__, text)

    def begin(self, title, most):
        """Return the tasks of a run that begins, None without callbacks; the run before it has ended."""
        self.close()
        if self._context is not None:
            self._tasks = _Tasks(self._context, self.estimator, self._data, title, most)
        return self._tasks

    def show(self, report):
        """Show a report on the stream that is open."""
        for stream in _streams[-1:]:
            stream.show(report, time.perf_counter() - self._started)

    def close(self):
        """End what is open of the last run: before a warning is written where its line stands, and for callbacks."""
        if self._tasks is not None:
            self._tasks.close()
            self._tasks = None
        for stream in _streams[-1:]:
            stream.clear()

    def end(self):
        """Tell callbacks that the fit has ended and the estimator is fitted."""
        self.close()
        if self._context is not None:
            told = {"estimator": self.estimator, **self._data, "reconstruction_attributes": {}}
            self._context.call_on_fit_task_end(**told)


class _Run:
    """The callback of a solver run: counts, forecasts, and passes on. Its ``elapsed`` tells where the next one starts.

    Parameters are those of :meth:`Reports.run`, and ``reports`` that it belongs to.
    """

    def __init__(self, reports, title, goal, check_every, fitted):
        self._reports, self._title, self._goal, self._check_every = reports, title, goal, check_every
        self._fitted = fitted
        self._elapsed, self._count = math.inf, 0

    def __call__(self, progress):
        reports = self._reports
        if progress.elapsed < self._elapsed:
            self._begin(progress)
        self._elapsed = progress.elapsed
        if reports.estimator.verbose:
            self._report(progress)
        if self._tasks is None:
            return False
        return self._tasks.record(None if self._fitted is None else lambda: self._fitted(progress.factors()))

    def _begin(self, progress):
        reports = self._reports
        self._logged, self._from = progress.elapsed, progress.iteration
        self._share, self._start, self._before = 0.0, None, None
        limited = progress.max_iter < _NO_LIMIT
        self._steps = progress.max_iter - progress.iteration if limited else None
        most = None if self._steps is None else -(-self._steps // self._check_every) + 1
        self._tasks = reports.begin(self._title, most)

    def _report(self, progress):
        share = self._forecast(progress)
        left = None
        if share is not None and share > 0:
            left = progress.elapsed * (1 - share) / share
        name = f"{type(self._reports.estimator).__name__} {self._title}"
        report = Report(name, progress.iteration, _values(progress.values), progress.elapsed, share, left)
        if self._count % _LOG_EVERY == 0 or progress.elapsed - self._logged >= _LOG_SECONDS:
            self._logged = progress.elapsed
            said = ", ".join([f"iteration {report.iteration}", *report.values, f"{report.elapsed:.1f} s"])
            logger.info("%s: %s", name, said, extra={"progress": report})
        self._count += 1
        self._reports.show(report)

    def _forecast(self, progress):
        """Return the share that is done, which never falls; None where it cannot be known."""
        if self._steps is None and self._goal is None:
            return None
        if self._steps:
            self._share = max(self._share, (progress.iteration - self._from) / self._steps)
        if self._goal is not None:
            self._share = max(self._share, self._descended(progress.values))
        return min(self._share, 1.0)

    def _descended(self, values):
        """Return how far the logarithm of the goal's value has come."""
        name, end = self._goal
        value = float(values[name])
        if name == "evidence":
            value, self._before = value - (math.nan if self._before is None else self._before), value
        if not (0 < value < math.inf):  # not known yet, or there
            return 0.0
        if self._start is None:
            self._start = value
        if not 0 < end < self._start:
            return 0.0
        return math.log(self._start / value) / math.log(self._start / end)


def _values(values):
    """Return the texts of a record's values."""
    names = {"loss": "loss", "validation": "held out", "change": "largest change"}
    there = {text: values[name] for name, text in names.items() if name in values and math.isfinite(values[name])}
    return [f"{text} {value:.4g}" for text, value in there.items()]


class _Tasks:
    """A solver run as scikit-learn's callbacks see it: a task whose parts end at the records."""

    def __init__(self, context, estimator, data, title, most):
        self._estimator, self._data = estimator, data
        self._run = context.subcontext(task_name=title, max_subtasks=most)
        self._run.call_on_fit_task_begin(estimator=estimator, **data)
        self._part = None

    def record(self, fitted):
        """End the steps that led to this record, begin the next ones; return whether a callback wants to stop."""
        told = {"estimator": self._estimator, **self._data, "reconstruction_attributes": fitted}
        stop = False
        if self._part is not None:
            stop = self._part.call_on_fit_task_end(**told)
        self._part = self._run.subcontext(task_name="steps")
        self._part.call_on_fit_task_begin(**told)
        return stop

    def close(self):
        """End the run; the part that was begun at its last record is empty."""
        if self._part is not None:
            self._part.call_on_fit_task_end(estimator=self._estimator)
        self._run.call_on_fit_task_end(estimator=self._estimator, **self._data)
