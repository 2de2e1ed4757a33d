"""Cross-validation over the entries of a matrix."""

from numbers import Integral

import numpy as np
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils import check_random_state

from fastdmf.entries import read_entries
from fastdmf.ids import IdTable

__all__ = ["EntryKFold", "spare_last_entries"]


def spare_last_entries(held_out, rows, cols):
    """Return ``held_out`` without the entries that would leave their row or column nothing to be fitted to."""
    if held_out is None:
        return None
    fitted = np.ones(len(rows), bool)
    fitted[held_out] = False
    for index in (rows, cols):
        bare = np.bincount(index, fitted, minlength=index.max() + 1)[index] == 0
        # One entry is enough: the first of each bare line.
        _, first = np.unique(np.where(bare, index, -1), return_index=True)
        fitted[first[bare[first]]] = True
    held_out = np.flatnonzero(~fitted)
    return held_out if held_out.size else None


class EntryKFold(BaseCrossValidator):
    """Split entries (row, column) into folds that leave every row and column an entry to be fitted to.

    Entries are dealt to the folds at random. In each split the entries that would leave their row or column without
    any other stay in the training set: a row with one entry is never tested, and rows are not tested whole, as they
    would be by a ``KFold`` without shuffling on entries that come row by row.

    Parameters
    ----------
    n_splits : int
    random_state : int, RandomState instance or None
    columns : sequence of str, optional
        Names of the columns of a DataFrame, as for :class:`DMFCompleter`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.model_selection import GridSearchCV
    >>> from fastdmf import DMFCompleter, EntryKFold
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((150, 2)) @ rng.standard_normal((2, 100))
    >>> pairs = np.argwhere(rng.random(truth.shape) < 0.15)
    >>> y = truth[tuple(pairs.T)] + 0.1 * rng.standard_normal(len(pairs))
    >>> search = GridSearchCV(DMFCompleter(random_state=0), {"width": [1, 2]}, cv=EntryKFold(3, random_state=0))
    >>> search.fit(pairs, y).best_params_
    {'width': 2}
    """

    def __init__(self, n_splits=5, *, random_state=None, columns=None):
        self.n_splits = n_splits
        self.random_state = random_state
        self.columns = columns

    def split(self, X, y=None, groups=None):
        """Yield (training indices, test indices) of the entries.

        Parameters
        ----------
        X : array-like of shape (k, 2), or DataFrame
        y, groups : ignored

        Raises
        ------
        TypeError
            If X is sparse: scikit-learn selects entries by their place in X.
        ValueError
            If ``n_splits`` is no integer from 2 to the number of entries.
        """
        return super().split(X, y, groups)

    def _iter_test_indices(self, X, y=None, groups=None):
        if hasattr(X, "tocoo"):
            raise TypeError(
                "X must be pairs or a DataFrame: of a sparse matrix, coo = X.tocoo(), pass "
                "np.column_stack([coo.row, coo.col]) and y = coo.data"
            )
        entries = read_entries(X, None, self.columns)
        k, n = len(entries), self.n_splits
        if not isinstance(n, Integral) or isinstance(n, bool) or not 2 <= n <= k:
            raise ValueError(f"n_splits must be an integer from 2 to the number of entries, {k}; got {n!r}")
        rows, cols = (IdTable.of(name, ids)[1] for name, ids in (("row", entries.rows), ("column", entries.cols)))
        order = check_random_state(self.random_state).permutation(k)
        for fold in range(n):
            test = spare_last_entries(np.sort(order[fold::n]), rows, cols)
            yield np.zeros(0, np.int64) if test is None else test

    def get_n_splits(self, X=None, y=None, groups=None):
        """Return the number of splits."""
        return self.n_splits
