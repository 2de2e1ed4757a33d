"""Completed matrices as images, beside what was observed."""

from collections.abc import Mapping

import numpy as np

from fastdmf.display_axes import load_pyplot

__all__ = ["InpaintingDisplay"]


class InpaintingDisplay:
    """A matrix with holes beside what one or several methods filled in, on one colour scale.

    Parameters
    ----------
    observed : array of shape (n1, n2)
        NaN (or masked) where hidden.
    filled : dict of str to array of shape (n1, n2)
        The completed matrix of each method, by its name.
    truth : array of shape (n1, n2), optional
        NaN where it is not known.

    Attributes
    ----------
    errors : dict of str to float
        Root mean square error over the hidden entries whose truth is known, in the unit of the data; empty without
        ``truth``.
    axes_ : list of matplotlib Axes
        Of the panels: truth, if there is one, observed, filled, errors, if they are asked for.
    figure_ : matplotlib Figure
    images_ : list of AxesImage
        In the same order.
    colorbars_ : list of Colorbar

    Raises
    ------
    TypeError, ValueError
        If the shapes differ, an array is not real or not a matrix or has infinite values, what is filled has holes
        left, or there is nothing to show.
    """

    def __init__(self, observed, filled, *, truth=None):
        self.observed = _image("observed", observed)
        if not isinstance(filled, Mapping) or not filled:
            raise TypeError(f"filled must be a dict of name -> matrix, got {type(filled).__name__} {filled!r:.40}")
        self.filled = {name: _image(f"filled[{name!r}]", each, self.observed.shape) for name, each in filled.items()}
        for name, each in self.filled.items():
            if np.isnan(each).any():
                raise ValueError(f"filled[{name!r}] still has {np.isnan(each).sum()} holes")
        self.truth = None if truth is None else _image("truth", truth, self.observed.shape)
        self._seen = np.isfinite(self.observed)
        if not self._seen.any():
            raise ValueError("observed has no entry: all of them are NaN")
        self.errors = {}
        if self.truth is not None:
            known = ~self._seen & np.isfinite(self.truth)
            if not known.any():
                raise ValueError("observed hides no entry whose truth is known: leave truth out")
            misses = {name: (each - self.truth)[known] for name, each in self.filled.items()}
            self.errors = {name: float(np.sqrt(np.mean(miss**2))) for name, miss in misses.items()}

    @classmethod
    def from_estimator(cls, estimator, X, *, truth=None, name=None):
        """Return the display of what a fitted imputer makes of X.

        Parameters
        ----------
        estimator : DMFImputer, or another fitted transformer that keeps the shape of X
            Its ``missing_values`` mark the holes.
        X : array-like of shape (n1, n2)
        truth : array of shape (n1, n2), optional
        name : str, optional
            Default the name of the class.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        TypeError, ValueError
            As above, also if ``transform`` drops or adds columns.
        """
        observed = _image("X", X)
        marker = getattr(estimator, "missing_values", np.nan)
        observed = np.where(observed == marker, np.nan, observed) if isinstance(marker, (int, float)) else observed
        return cls(observed, {name or type(estimator).__name__: estimator.transform(X)}, truth=truth)

    def plot(self, ax=None, *, errors=False, label=None, unit="", **kwargs):
        """Draw the panels; the colours span the truth where it is known, else what was observed.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of them, optional
            One for each panel, in the order of ``axes_``.
        errors : bool
            Also draw filled - truth for every method. The colours end where 99 % of the hidden entries lie within.
        label : str, optional
            What the matrix holds, for the colour bar.
        unit : str
            Its unit, for the colour bars and the errors in the titles.
        **kwargs
            For ``imshow``, for all panels but the errors.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If there are not as many axes as panels, or ``errors`` are asked for without a truth.
        """
        if errors and self.truth is None:
            raise ValueError("errors=True needs the truth: pass truth= when the display is made")
        titles, images = ["truth"], [self.truth]
        if self.truth is None:
            titles, images = [], []
        titles.append(f"observed ({1 - self._seen.mean():.0%} hidden)")
        images.append(self.observed)
        ending = f" {unit}" if unit else ""
        titles += [f"{name}\nRMSE {self.errors[name]:.3g}{ending}" if self.errors else name for name in self.filled]
        images += self.filled.values()
        misses = [each - self.truth for each in self.filled.values()] if errors else []
        self.axes_ = self._axes(ax, len(images), len(misses))
        self.figure_ = self.axes_[0].figure

        whole = self.observed if self.truth is None else self.truth
        n1, n2 = whole.shape
        shape = {"interpolation": "nearest", "aspect": "equal" if max(n1, n2) <= 4 * min(n1, n2) else "auto"}
        style = shape | {"cmap": "viridis", "vmin": np.nanmin(whole), "vmax": np.nanmax(whole)} | kwargs
        self.images_ = [axis.imshow(image, **style) for axis, image in zip(self.axes_, images)]
        # With errors, observed stands in their row, and the row of the truth has the colour bar.
        row = [self.axes_[0], *self.axes_[2 : len(images)]] if errors else self.axes_
        text = " ".join(part for part in (label, f"[{unit}]" if unit else "") if part)
        self.colorbars_ = [self.figure_.colorbar(self.images_[0], ax=row, label=text, pad=0.05 / len(row))]
        if errors:
            sizes = np.abs([miss[~self._seen] for miss in misses])
            limit = float(np.nanquantile(sizes, 0.99)) or 1.0
            style = shape | {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
            axes = self.axes_[len(images) :]
            self.images_ += [axis.imshow(miss, **style) for axis, miss in zip(axes, misses)]
            titles += ["error: filled - truth"] * len(misses)
            text = f"error [{unit}]" if unit else "error"
            place = {"ax": axes, "pad": 0.05 / len(axes)}
            self.colorbars_.append(self.figure_.colorbar(self.images_[-1], label=text, extend="both", **place))
        for axis, title in zip(self.axes_, titles):
            axis.set_title(title, fontsize="medium")
            axis.set(xticks=[], yticks=[])
        return self

    def _axes(self, ax, n_images, n_errors):
        """Return a list with the axes of the panels: those given, or new ones in a row, or in two with errors."""
        if ax is not None:
            axes = list(np.atleast_1d(np.asarray(ax, object)).ravel())
            if len(axes) != n_images + n_errors:
                raise ValueError(f"ax holds {len(axes)} axes for {n_images + n_errors} panels")
            return axes
        n1, n2 = self.observed.shape
        rows, columns = (2, 1 + n_errors) if n_errors else (1, n_images)
        height = 2.8 * min(max(n1 / n2, 0.5), 1.5)
        size = (2.8 * columns + 1.2, (height + 0.6) * rows)
        grid = load_pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="compressed")[1]
        if not n_errors:
            return list(grid[0])
        # Observed stands below the truth, the error of each method below what it filled in.
        return [grid[0, 0], grid[1, 0], *grid[0, 1:], *grid[1, 1:]]


def _image(name, values, shape=None):
    """Return a real matrix as float64, NaN where it is masked."""
    if isinstance(values, np.ma.MaskedArray):
        values = values.astype(np.float64).filled(np.nan)
    values = np.asarray(values)
    if values.dtype == object:  # a data frame with missing entries of another kind than NaN
        values = values.astype(np.float64)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must be a matrix, got shape {values.shape}")
    if np.isinf(values).any():
        raise ValueError(f"{name} holds infinite values")
    if shape is not None and values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, observed {shape}")
    return values.astype(np.float64)
