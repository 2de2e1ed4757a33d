"""What pictures are made of: the records of a run, and the columns of a table.

A *table* is whatever gives a column by its name, ``table["error"]``, one row a run: what :func:`fastdmf.sweep` returns,
a dict of arrays, a data frame.
"""

from collections.abc import Mapping

import numpy as np

from fastdmf.checks import check_count, check_real
from fastdmf.display_axes import name_of

__all__ = [
    "check_same_length",
    "clock_of",
    "column_of",
    "groups_of",
    "history_of",
    "pick_run",
    "record_of",
    "singular_values_of",
]


def history_of(solution):
    """Return the history of what ``fastdmf.solve`` returns; a TypeError says that of anything else."""
    history = getattr(solution, "history", None)
    if history is None:
        raise TypeError(f"solution must be what fastdmf.solve returns, got {type(solution).__name__}")
    return history


def record_of(history, name, hint):
    """Return what a history holds under ``name``, or raise an error that ends with the ``hint``."""
    if not isinstance(history, Mapping):
        raise TypeError(f"history must be a dict of arrays, as in Solution.history, got {type(history).__name__}")
    if name not in history:
        raise ValueError(f"history has no {name!r}, only {', '.join(map(str, history))}: {hint}")
    return np.asarray(history[name], np.float64)


def pick_run(values, run):
    """Return the records of ``run``, an index into the second axis."""
    run = check_count("run", run, 0)
    if run >= values.shape[1]:
        raise ValueError(f"run={run} is not there: history holds {values.shape[1]} runs, counted from 0")
    return values[:, run]


def clock_of(history, x, run, batched):
    """Return the horizontal axis: the iteration, or another number that the history holds for each record."""
    clock = record_of(history, x, "x names what the records are drawn against")
    if batched and clock.ndim == 2:
        if run is None:
            raise ValueError(f"history[{x!r}] differs from run to run of a batch: choose one with run=")
        clock = pick_run(clock, run)
    if clock.ndim != 1:
        raise ValueError(f"history[{x!r}] is not one number a record, it has shape {clock.shape}")
    return clock


def column_of(table, name, dtype=None):
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


def check_same_length(columns):
    """Refuse columns, a dict by name, of different lengths."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"table has columns of different lengths: {lengths}")


def groups_of(table, by):
    """Return a list of (label, rows) of the groups that the columns ``by`` make, rows as indices.

    Numbers go up; anything else stands in the order of its first row. A row with a NaN there is in none.
    """
    groups = {}
    for row, key in enumerate(zip(*(column_of(table, name).tolist() for name in by))):
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
    return f"{name_of(name)} {value:g}" if isinstance(value, float) else f"{name_of(name)} {value}"


def singular_values_of(truth):
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
