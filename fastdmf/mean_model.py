"""The mean of several fits to the same entries as a model: what one of them gets wrong by its start, others do not."""

from dataclasses import replace

import numpy as np

from fastdmf.factor_model import highest

__all__ = ["MeanModel"]


class MeanModel:
    """The mean of the predictions of several :class:`FactorModel` (``members``), with the methods of one.

    Rows and columns that come later are solved for in every member by itself.
    """

    def __init__(self, members):
        self.members = members

    @property
    def mean(self):
        return self.members[0].mean

    @property
    def dtype(self):
        return self.members[0].dtype

    @property
    def noise(self):
        return float(np.mean([model.noise for model in self.members]))

    @property
    def entries(self):
        """The entries, (indptr, indices, y, w): the members share them."""
        return self.members[0].entries

    def held(self):
        """Return the model with its entries in memory; see :meth:`FactorModel.held`."""
        first = self.members[0].held()
        if first is self.members[0]:
            return self
        shared = dict(zip(("indptr", "indices", "y", "w"), first.entries))
        return MeanModel([first, *(replace(model, **shared) for model in self.members[1:])])

    def biases(self):
        """Return the biases of rows and columns, (n1,) and (n2,)."""
        return [np.mean(both, axis=0) for both in zip(*(model.biases() for model in self.members))]

    def latent(self):
        """Return the latent columns P and Q of all members side by side, scaled so that P Q^T is the mean."""
        share = 1 / np.sqrt(len(self.members))
        sides = zip(*(model.latent() for model in self.members))
        return [np.concatenate([x * x.dtype.type(share) for x in side], axis=1) for side in sides]

    def predict(self, rows, cols, return_std=False):
        """Return predictions at pairs, and with ``return_std`` standard deviations, as a :class:`FactorModel` does.

        The variance of a member stands for that of the mean, as the root mean square over the members: they differ by
        their starts, not by what the data leave open.
        """
        if not return_std:
            return sum(model.predict(rows, cols) for model in self.members) / len(self.members)
        means, deviations = zip(*(model.predict(rows, cols, True) for model in self.members))
        return np.mean(means, axis=0), np.sqrt(np.mean(np.square(deviations), axis=0))

    def block(self, rows, cols=None):
        """Return predictions of whole rows, or of rows at some columns."""
        return sum(model.block(rows, cols) for model in self.members) / len(self.members)

    def top(self, rows, k, exclude_seen):
        """Return the k columns with the highest predictions in each row and those, (r, k), the best first."""
        scores = self.block(rows)
        return highest(self.members[0].leave_out(rows, scores) if exclude_seen else scores, k)

    def fold_in(self, indptr, indices, y, w):
        """Return a model whose rows are new ones with these entries."""
        return MeanModel([model.fold_in(indptr, indices, y, w) for model in self.members])

    def learned(self, indptr, indices, y, w, n2, rows, cols):
        """Return a model of all these entries, solved again for the rows and columns that are named."""
        return MeanModel([model.learned(indptr, indices, y, w, n2, rows, cols) for model in self.members])
