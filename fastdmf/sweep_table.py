"""The table that a sweep returns: columns of axes and results, rows of runs."""

import csv
from numbers import Real

import numpy as np

__all__ = ["SweepTable"]

_SHOWN = 40  # rows of a printed table


class SweepTable:
    """A tidy table: a column for each axis of the sweep and each result, a row for each run.

    ``table["error"]`` is a column, iteration gives rows as dicts, :meth:`where` picks rows, :meth:`group` sums up over
    the others, and printing shows aligned text.

    Parameters
    ----------
    columns : dict of str to list
        In order; all of one length.
    axes : tuple of str, optional
        The columns that say what was run.
    singular_values, histories, solutions : list, optional
        One for each row.

    Attributes
    ----------
    columns : tuple of str
        The axes, then (of :func:`fastdmf.sweep`):

        - ``status``: name of a :class:`fastdmf.Status`.
        - ``n_iter``, ``n_eval``: steps, evaluations of loss and gradient.
        - ``loss``: at the record whose factors ``solve`` returns.
        - ``error``: ||W - truth||_F^2 / ||truth||_F^2; NaN without truth.
        - ``rank``: singular values above 1e-3 of the largest. ``effective_rank``: exp(-sum p log p), p = s / sum s.
          ``nuclear_norm``: sum s.
        - ``seconds``: share of the batch's, by evaluations.
    axes : tuple of str
    singular_values : list of ndarray
        All of W at the end of each run, descending, float64; empty for one that has not ended. None for a table of
        groups.
    histories : list of dict
        The records of each run (:class:`fastdmf.Solution`), if the sweep kept them; None for one that has not ended.
    solutions : list of Solution
        Likewise.
    """

    def __init__(self, columns, *, axes=(), singular_values=None, histories=None, solutions=None):
        self._data = {name: list(values) for name, values in columns.items()}
        self.axes, self.singular_values, self.histories, self.solutions = axes, singular_values, histories, solutions

    @property
    def columns(self):
        return tuple(self._data)

    def __len__(self):
        return len(next(iter(self._data.values())))

    def __getitem__(self, name):
        """Return a column as an array, (rows,); of objects if it holds more than numbers or texts."""
        values = self._column(name)
        if all(isinstance(v, Real) for v in values) or all(isinstance(v, str) for v in values):
            return np.array(values)
        out = np.empty(len(values), object)
        out[:] = values
        return out

    def __iter__(self):
        for values in zip(*self._data.values()):
            yield dict(zip(self._data, values))

    def _column(self, name):
        if name not in self._data:
            raise KeyError(f"no column {name!r}; there are {', '.join(self._data)}")
        return self._data[name]

    def where(self, **values):
        """Return the table of the rows in which the columns have these values: ``table.where(depth=3)``.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        columns = {name: self._column(name) for name in values}
        rows = [k for k in range(len(self)) if all(columns[name][k] == value for name, value in values.items())]

        def pick(items):
            return None if items is None else [items[k] for k in rows]

        return SweepTable(
            {name: pick(items) for name, items in self._data.items()},
            axes=self.axes,
            singular_values=pick(self.singular_values),
            histories=pick(self.histories),
            solutions=pick(self.solutions),
        )

    def group(self, by=None, value="error"):
        """Return median, minimum and maximum of a column over the rows that have the columns ``by`` in common.

        Parameters
        ----------
        by : str or sequence of str, optional
            Default all axes but ``seed``.
        value : str
            A column of numbers; rows where it is NaN are left out.

        Returns
        -------
        SweepTable
            Columns ``by``, ``median``, ``min``, ``max`` (NaN if nothing is left) and ``runs``, how many there were;
            groups in the order of their first rows.

        Raises
        ------
        KeyError, TypeError, ValueError
            If there is no such column, the values are not numbers, or a column of ``by`` has one of the new names.
        """
        by = [name for name in self.axes if name != "seed"] if by is None else [by] if isinstance(by, str) else list(by)
        new = {"median": np.median, "min": np.min, "max": np.max, "runs": len}
        if taken := [name for name in by if name in new]:
            raise ValueError(f"by holds {taken}, names of the new columns: {', '.join(new)}")
        numbers = self[value]
        if numbers.dtype.kind not in "fiub":
            raise TypeError(f"value must be a column of numbers, {value!r} holds {self._column(value)[0]!r}")
        keys = zip(*map(self._column, by)) if by else [()] * len(self)
        groups = {}
        for key, number in zip(keys, numbers.tolist()):
            kept = groups.setdefault(key, [])
            if not np.isnan(number):
                kept.append(number)
        columns = {name: [key[k] for key in groups] for k, name in enumerate(by)}
        for name, measure in new.items():
            columns[name] = [measure(kept) if kept or measure is len else np.nan for kept in groups.values()]
        return SweepTable(columns, axes=tuple(by))

    def to_pandas(self):
        """Return the table as a pandas DataFrame.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas needs pandas (pip install pandas); to_csv does without") from None
        return pandas.DataFrame({name: self[name] for name in self.columns})

    def to_csv(self, path):
        """Write the table to a file of comma-separated values, with a line of names; numbers to all their digits."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._data)
            writer.writerows(zip(*self._data.values()))

    def __repr__(self):
        def text(value):
            return f"{value:.3g}" if isinstance(value, float) else str(value)

        columns = [[name, *map(text, values[:_SHOWN])] for name, values in self._data.items()]
        widths = [max(map(len, cells)) for cells in columns]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in zip(*columns)]
        if len(self) > _SHOWN:
            lines.append(f"... and {len(self) - _SHOWN} more of {len(self)} rows")
        return "\n".join(lines)
