"""Ids of rows and columns: what people call them, and where they stand in the matrix.

Codes count from 0 and never change once given, so that a model may learn new ids later; -1 stands for an id that the
table does not know. They are int32 unless there are more.
"""

import numpy as np

__all__ = ["IdTable", "Positions", "read_ids"]

UNKNOWN = -1

# Integers whose range is at most so many times their number are sorted by marking them, without comparisons.
_COMPACT = 4


def read_ids(name, values):
    """Return ids as int64, or as strings in an array of objects.

    Parameters
    ----------
    name : str
        What the ids are of, for the errors: "row" or "column".
    values : array-like of shape (k,)
        Whole numbers, or strings.

    Raises
    ------
    TypeError
        If they are neither, or some of each.
    ValueError
        If one is missing, or not an int64.
    """
    # In an array of type U, strings lose the NULs at their end.
    values = np.array(values, object) if isinstance(values, (list, tuple)) else np.asarray(values)
    if values.dtype.kind == "U":
        return values.astype(object)
    if values.dtype.kind == "O":
        kinds = set(map(type, values.tolist()))
        if any(kind is type(None) or kind.__name__ in ("NAType", "NaTType") for kind in kinds) or (
            float in kinds and any(value != value for value in values if isinstance(value, float))
        ):
            raise ValueError(f"{name} ids contain missing values: leave those entries out")
        if not kinds or kinds <= {str, np.str_}:
            return values
        if not all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"{name} ids must all be integers or all be strings, got {names}: convert them to one type")
        try:
            return values.astype(np.int64)
        except OverflowError:
            raise ValueError(f"{name} ids must fit into 64 bits: pass them as strings") from None
    if values.dtype.kind == "f":
        if np.isnan(values).any():
            raise ValueError(f"{name} ids contain missing values: leave those entries out")
        values = values.astype(np.float64, copy=False)  # float16 does not reach the limit
        if not (np.abs(values) < 2.0**53).all() or (values != np.floor(values)).any():
            raise TypeError(f"{name} ids must be whole numbers or strings, got {values.dtype}: pass integers")
    elif values.dtype.kind not in "iu":
        raise TypeError(f"{name} ids must be whole numbers or strings, got dtype {values.dtype}")
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} ids must fit into 64 bits with a sign: pass them as strings")
    return values.astype(np.int64, copy=False)


def _unique(values):
    """Return the sorted distinct ids and the place of each value among them."""
    if values.dtype == object:
        ids = np.array(sorted(dict.fromkeys(values.tolist())), object)
        place = {value: k for k, value in enumerate(ids)}
        places = np.fromiter((place[value] for value in values.tolist()), np.int64, len(values))
    elif values.size and (span := int(values.max()) - (low := int(values.min())) + 1) <= _COMPACT * values.size:
        offsets = values - low
        present = np.zeros(span, bool)
        present[offsets] = True
        return np.flatnonzero(present) + low, _codes(np.cumsum(present) - 1)[offsets]
    else:
        ids, places = np.unique(values, return_inverse=True)
    return ids, _codes(places.reshape(-1))


def _codes(places):
    small = places.size == 0 or places.max() <= np.iinfo(np.int32).max
    return places.astype(np.int32 if small else np.int64)


class IdTable:
    """The ids of one side and their codes.

    Parameters
    ----------
    name : str
        "row" or "column".
    ids : ndarray of int64, or of strings as objects
        Distinct; ``ids[code]`` is the id of a code.
    """

    def __init__(self, name, ids):
        self.name, self.ids = name, ids
        self._order = np.argsort(ids, kind="stable")

    @classmethod
    def of(cls, name, values):
        """Return a table of the ids among ``values`` in their order, and the codes of the values."""
        ids, codes = _unique(read_ids(name, values))
        return cls(name, ids), codes

    def __len__(self):
        return len(self.ids)

    def _check_type(self, values):
        if values.dtype != self.ids.dtype and values.size:
            kinds = ["strings" if a.dtype == object else "integers" for a in (self.ids, values)]
            raise TypeError(f"{self.name} ids were {kinds[0]} at fit and are {kinds[1]} now: convert them")

    def _find(self, ids):
        if len(self.ids) == 0:
            return np.full(len(ids), UNKNOWN)
        places = np.minimum(np.searchsorted(self.ids, ids, sorter=self._order), len(self.ids) - 1)
        codes = self._order[places]
        return np.where(self.ids[codes] == ids, codes, UNKNOWN)

    def encode(self, values):
        """Return the codes of ids, -1 for those that are not in the table.

        Raises
        ------
        TypeError
            If the table holds strings and the ids are integers, or the other way round.
        """
        values = read_ids(self.name, values)
        self._check_type(values)
        ids, places = _unique(values)
        return _codes(self._find(ids))[places]

    def decode(self, codes):
        """Return the ids of codes; None, or -1 among integers, for the code -1."""
        codes = np.asarray(codes)
        ids = self.ids[np.maximum(codes, 0)] if len(self.ids) else np.zeros(codes.shape, self.ids.dtype)
        ids[codes < 0] = None if ids.dtype == object else UNKNOWN
        return ids

    def extend(self, values):
        """Return a table with the new ids behind those of this one, and the codes of the values."""
        values = read_ids(self.name, values)
        self._check_type(values)
        ids, places = _unique(values)
        codes = self._find(ids)
        new = codes == UNKNOWN
        codes[new] = len(self) + np.arange(new.sum())
        return IdTable(self.name, np.concatenate([self.ids, ids[new]])), _codes(codes)[places]

    def reach(self, n):
        """Return this table, which must have n ids.

        Raises
        ------
        ValueError
            If it has not: a sparse matrix does not name new rows or columns.
        """
        if n != len(self):
            raise ValueError(f"X has {n} {self.name}s, the model {len(self)}: name new ones by pairs of ids")
        return self


class Positions:
    """Rows or columns that are called by their place in the matrix.

    Parameters
    ----------
    name : str
    n : int
    """

    def __init__(self, name, n):
        self.name, self._n = name, n

    def __len__(self):
        return self._n

    @property
    def ids(self):
        """All of them, 0 .. n - 1."""
        return np.arange(self._n)

    def encode(self, values):
        """Return the values themselves.

        Raises
        ------
        ValueError
            If one is out of range.
        """
        values = self._read(values)
        if values.size and values.max() >= self._n:
            raise ValueError(
                f"{self.name} index {values.max()} is out of range: the model has {self._n} {self.name}s "
                "(partial_fit adds new ones)"
            )
        return values

    def decode(self, codes):
        """Return the codes themselves."""
        return np.array(codes)

    def extend(self, values):
        """Return positions that reach as far as the values, and the values."""
        values = self._read(values)
        return Positions(self.name, max(self._n, int(values.max(initial=-1)) + 1)), values

    def reach(self, n):
        """Return positions for at least n."""
        return Positions(self.name, max(self._n, n))

    def _read(self, values):
        values = read_ids(self.name, values)
        if values.dtype == object and values.size:
            raise TypeError(f"{self.name} ids are strings, but the model was fitted to positions in a sparse matrix")
        if values.size and values.min() < 0:
            raise ValueError(f"{self.name} index {values.min()} is negative: positions count from 0")
        return values.astype(np.int64, copy=False)
