"""Entries of a matrix as people hold them: sparse matrices, pairs with values, tables of (row, column, value)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from fastdmf.checks import check_real, float_for
from fastdmf.masks import EntryMask

__all__ = ["DUPLICATES", "Entries", "mask_of", "merge", "read_entries", "read_values", "read_weights"]

_HEAVIEST = 1e15  # beyond, weights and squares leave the range of floats together
DUPLICATES = ("error", "sum", "mean", "last")

# Formats that say which entries are stored; a DIA or BSR matrix pads with zeros that nobody observed.
_FORMATS = ("csr", "csc", "coo", "lil", "dok")
_EXPECTED = (
    "X must be a sparse matrix, an array of pairs (row, column) of shape (k, 2) with the values in y, or a DataFrame "
    "of (row, column, value)"
)


@dataclass
class Entries:
    """Entries in the order they came in.

    Attributes
    ----------
    rows, cols : ndarray of shape (k,)
        Positions where ``shape`` is given, else ids.
    values : ndarray of shape (k,) or None
    shape : tuple of int or None
        That of a sparse matrix; None where rows and columns are named by ids.
    """

    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray | None
    shape: tuple | None

    def __len__(self):
        return len(self.rows)


def read_entries(X, y=None, columns=None):
    """Return the :class:`Entries` of what ``DMFCompleter`` accepts.

    Parameters
    ----------
    X : sparse matrix or array of shape (n1, n2), array-like of shape (k, 2), or DataFrame
    y : array-like of shape (k,), optional
        Values of the pairs.
    columns : sequence of two or three names, optional
        Of the columns (row, column, value) of a DataFrame; by default its first three.

    Raises
    ------
    TypeError, ValueError
        If X is nothing of the kind, y does not go with it, or a column is missing.
    """
    if sparse.issparse(X):
        return _from_sparse(X, y)
    if hasattr(X, "columns") and hasattr(X, "__getitem__"):
        return _from_frame(X, y, columns)
    pairs = X if isinstance(X, np.ndarray) else _as_array(X)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        hint = "; DMFImputer fills dense matrices with NaN at the holes" if pairs.dtype.kind == "f" else ""
        raise ValueError(f"{_EXPECTED}; got an array of shape {pairs.shape}{hint}")
    return Entries(pairs[:, 0], pairs[:, 1], _match(y, len(pairs)), None)


def _as_array(X):
    if isinstance(X, (str, bytes)) or np.isscalar(X) or X is None:
        raise TypeError(f"{_EXPECTED}; got {type(X).__name__}")
    if hasattr(X, "__array__"):
        return np.asarray(X)
    try:
        # Objects keep a pair ("a", 7) from becoming two strings.
        return np.array(list(X), dtype=object) if len(X) else np.zeros((0, 2), np.int64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_EXPECTED}; got {type(X).__name__} ({error})") from None


def _from_sparse(X, y):
    if X.format not in _FORMATS:
        raise TypeError(f"X is sparse in {X.format.upper()} format, which stores zeros of its own: use X.tocsr()")
    if y is not None:
        raise ValueError("y must be None when X is sparse: the values are those stored in X")
    if X.ndim != 2:
        raise ValueError(f"X must have 2 dimensions, got shape {X.shape}")
    # Dictionaries come in any order; through CSR they are in that of rows.
    coo = (X.tocsr() if X.format in ("lil", "dok") else X).tocoo()
    return Entries(coo.row, coo.col, coo.data, X.shape)


def _from_frame(X, y, columns):
    names = list(X.columns)
    if columns is None:
        needed = 2 if y is not None else min(3, max(2, len(names)))
        if len(names) < needed:
            raise ValueError(f"X has columns {names}: row, column and value are needed (or name them by columns=)")
        columns = names[:needed]
    else:
        if not isinstance(columns, Iterable):
            raise TypeError(f"columns must name row, column and value, got {columns!r}")
        columns = [columns] if isinstance(columns, str) else list(columns)
        if len(columns) not in (2, 3):
            raise ValueError(f"columns must name row, column and value, got {columns}")
        # Pairs to be predicted need no value.
        missing = [name for name in columns[:2] if name not in names]
        if missing:
            raise ValueError(f"columns names {missing}, but X has {names}")
        columns = [name for name in columns if name in names]
    if y is not None:
        values = _match(y, len(X))
    else:
        values = np.asarray(X[columns[2]]) if len(columns) == 3 else None
    return Entries(np.asarray(X[columns[0]]), np.asarray(X[columns[1]]), values, None)


def _match(y, k):
    if y is None:
        return None
    y = np.asarray(y)
    if y.shape != (k,):
        raise ValueError(f"y must hold one value for each of the {k} pairs of X, got shape {y.shape}")
    return y


def read_values(values):
    """Return values as float32 (from float32, float16 and integers of up to 16 bits) or float64.

    Values far from 1 are float64, too: float32 does not hold their squares.

    Raises
    ------
    TypeError
        If they are not real numbers.
    ValueError
        If one is NaN or infinite, or too large to be squared.
    """
    if values is None:
        raise ValueError(f"no values: {_EXPECTED}")
    if values.dtype == object:  # of a nullable column
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError):
            raise TypeError("the values must be real numbers: leave out entries without one") from None
    if (values.dtype.kind in "iuf" and values.dtype.itemsize <= 2) or values.dtype == bool:
        values = values.astype(np.float32)
    values = check_real("values", values, (1,))
    return values.astype(float_for("the data", values, values.dtype), copy=False)


def read_weights(entry_weight, k, dtype):
    """Return weights (k,) >= 0, or None.

    Raises
    ------
    TypeError, ValueError
        If they are not, or zero everywhere.
    """
    if entry_weight is None:
        return None
    weights = check_real("entry_weight", entry_weight, (1,))
    if weights.max(initial=0) > _HEAVIEST:
        raise ValueError(f"entry_weight must be at most {_HEAVIEST:.0e}, got {weights.max():.1e}: scale them down")
    weights = weights.astype(dtype)
    if len(weights) != k:
        raise ValueError(f"entry_weight must hold one weight for each of the {k} entries, got {len(weights)}")
    if (weights < 0).any():
        raise ValueError("entry_weight must not be negative: a weight of 0 leaves an entry out")
    if k and not weights.any():
        raise ValueError("entry_weight is zero everywhere: at least one entry must count")
    return weights


def mask_of(rows, cols, values, weights, shape, duplicates):
    """Return (EntryMask, values, weights) with every entry once.

    Parameters
    ----------
    rows, cols : ndarray of int, shape (k,)
    values : ndarray of shape (k,)
    weights : ndarray of shape (k,) or None
    shape : tuple of int
    duplicates : {"error", "sum", "mean", "last"}
        What becomes of the values of an entry that comes more than once. A mean is weighted, and has the sum of the
        weights; the last value keeps its weight.

    Raises
    ------
    ValueError
        If there are duplicates and ``duplicates`` is "error", or "sum" with weights.
    """
    if duplicates != "error":
        rows, cols, values, weights = _combine(rows, cols, values, weights, shape, duplicates)
    try:
        return EntryMask(rows, cols, shape), values, weights
    except ValueError as error:
        found, _, advice = str(error).partition(": ")
        if not advice.startswith("combine"):
            raise
        raise ValueError(f"{found}: choose duplicates='sum', 'mean' or 'last'") from None


def _combine(rows, cols, values, weights, shape, how):
    from fastdmf.kernels.cpu import entry_sort

    indptr, indices, order = entry_sort(rows, cols, *shape)
    k = len(rows)
    first = np.ones(k, bool)
    first[1:] = indices[1:k] != indices[: k - 1]
    first[indptr[:-1][indptr[:-1] < k]] = True  # the first entry of a row repeats nothing
    if first.all():
        return rows, cols, values, weights
    if how == "sum" and weights is not None:
        raise ValueError("duplicates='sum' does not go with entry_weight: use 'mean' or 'last'")
    at = np.flatnonzero(first)
    v, w = values[order], None if weights is None else weights[order]
    if how == "last":
        last = np.append(at[1:], k) - 1
        v, w = v[last], None if w is None else w[last]
    elif how == "sum":
        v = np.add.reduceat(v.astype(np.float64), at).astype(values.dtype)
    else:
        share = np.ones(k) if w is None else w.astype(np.float64)
        total = np.add.reduceat(share, at)
        # Duplicates that all weigh nothing: whatever the value, it does not count.
        v = (np.add.reduceat(v * share, at) / np.where(total > 0, total, 1)).astype(values.dtype)
        w = None if w is None else total.astype(w.dtype)
    return rows[order][at], cols[order][at], v, w


def merge(old, new, n2, duplicates, offset):
    """Return (indptr, indices, y, w), padded, of two sets of entries in sorted order together.

    Parameters
    ----------
    old, new : tuple (indptr, indices, y, w)
        Each entry once; ``new`` has at least as many rows; w may be None.
    n2 : int
        Number of columns.
    duplicates : {"error", "sum", "mean", "last"}
        What becomes of entries in both. For a mean, the old one counts with its weight, or as one.
    offset : float
        What y is less than the values.

    Raises
    ------
    ValueError
        As ``mask_of``.
    """
    (indptr, indices, y, w), (new_indptr, new_indices, z, u) = old, new
    m, k, pad = indptr[-1], new_indptr[-1], len(y) - indptr[-1]
    if (w is None) != (u is None):
        w, u = (np.ones_like(b) if a is None else a for a, b in ((w, y), (u, z)))

    def keys(pointers, cols):
        return np.repeat(np.arange(len(pointers) - 1) * n2, np.diff(pointers)) + cols[: pointers[-1]]

    old_keys, new_keys = keys(indptr, indices), keys(new_indptr, new_indices)
    at = np.searchsorted(old_keys, new_keys)
    again = old_keys[np.minimum(at, m - 1)] == new_keys
    both, fresh = at[again], ~again
    y, w, z, u = y[:m].copy(), None if w is None else w[:m].copy(), z[:k], None if u is None else u[:k]
    if both.size:
        if duplicates == "error":
            row, col = divmod(int(new_keys[again.argmax()]), n2)
            raise ValueError(
                f"{both.size} entries occur more than once, the first at row {row}, column {col}, in which the model "
                "has one already: choose duplicates='last', 'sum' or 'mean'"
            )
        if duplicates == "last":
            y[both] = z[again]
            if w is not None:
                w[both] = u[again]
        elif duplicates == "sum":
            if w is not None:
                raise ValueError("duplicates='sum' does not go with entry_weight: use 'mean' or 'last'")
            y[both] += z[again] + y.dtype.type(offset)
        else:
            s, t = (1, 1) if w is None else (w[both], u[again])
            y[both] = (s * y[both] + t * z[again]) / np.maximum(s + t, 1e-30)
            if w is not None:
                w[both] = s + t

    def joined(a, b):
        return None if a is None else np.pad(np.insert(a, at[fresh], b[fresh]), (0, pad))

    counts = np.diff(new_indptr) - np.bincount(new_keys[again] // n2, minlength=len(new_indptr) - 1)
    pointers = np.pad(indptr, (0, len(new_indptr) - len(indptr)), mode="edge") + np.append(0, np.cumsum(counts))
    return pointers, joined(indices[:m], new_indices[:k].astype(indices.dtype)), joined(y, z), joined(w, u)
