"""Spectral starts: factors of the best approximation of low rank to the measurements' back-projection."""

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import eigsh, svds

from fastdmf.backend import thread_limits
from fastdmf.checks import check_count, check_number, check_real
from fastdmf.masks import EntryMask
from fastdmf.operators import as_operator

__all__ = ["spectral_factors"]

_TRANSFORMS = {"identity": lambda y: y, "sign": np.sign}
_DENSE = 300  # smaller dimension up to which all singular values are computed


def spectral_factors(operator, y, rank, *, symmetric=False, transform="identity", scale=1.0):
    """Return factors of the top part of c A*(y), a start for :func:`fastdmf.solve`.

    c = n1 n2 / sum_i ||A_i||_F^2 makes it an estimate of W: 1/p for a mask with a fraction p of the entries,
    1/(m sigma^2) for measurements by independent N(0, sigma^2) numbers.

    Parameters
    ----------
    operator : Operator
        As for :func:`fastdmf.solve`.
    y : array of shape (m,)
    rank : int
        Width of the factors, up to min(n1, n2).
    symmetric : bool
        One factor U, for W = U U^T: from the largest eigenvalues of the symmetric part of c A*(y), where negative ones
        count as zero.
    transform : {"identity", "sign"}
        What is done to y before: ``"sign"`` for data with outliers (Ma and Fattahi 2023, JMLR 22-0233).
    scale : float
        Of the product, W = scale c A*(y) in its top part: alpha^2 for U_0 = alpha V D_+^(1/2) of that paper. With
        ``"sign"`` c A*(sign y) is in no units of W and only its directions mean something.

    Returns
    -------
    list of ndarray, float64
        [W_1, W_2] of shapes (rank, n2) and (n1, rank), balanced: S^(1/2) V^T and U S^(1/2); or [U], shape (n1, rank).

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, y is zero everywhere, or, for ``symmetric``, c A*(y) has no positive eigenvalue.

    Notes
    -----
    Masks of large matrices are never made dense. Signs are fixed by the largest entry of every left vector, and
    Lanczos vectors start alike, so that the same data give the same factors.

    Examples
    --------
    >>> import numpy as np, fastdmf
    >>> mask = fastdmf.EntryMask([0, 0, 1, 1], [0, 1, 0, 1], (2, 2))
    >>> w1, w2 = fastdmf.spectral_factors(mask, np.array([2.0, 4.0, 1.0, 2.0]), 1)
    >>> np.allclose(w2 @ w1, [[2, 4], [1, 2]])
    True
    """
    operator = as_operator(operator)
    y = check_real("y", y, (1,))
    if len(y) != operator.size:
        raise ValueError(f"y has {len(y)} measurements, the operator {operator.size}")
    rank = check_count("rank", rank)
    if rank > min(operator.shape):
        raise ValueError(f"rank must be at most {min(operator.shape)} for shape {operator.shape}, got {rank}")
    if transform not in _TRANSFORMS:
        raise ValueError(f"transform must be one of {sorted(_TRANSFORMS)}, got {transform!r}")
    check_number("scale", scale, 0)
    n1, n2 = operator.shape
    if symmetric and n1 != n2:
        raise ValueError(f"symmetric=True needs a square matrix, got shape {operator.shape}")
    if not y.any():
        raise ValueError("y is zero everywhere: there is no direction to start from")
    c = scale * n1 * n2 / operator.squared_norms().sum()
    with thread_limits():
        estimate = _back_projection(operator, c * _TRANSFORMS[transform](y.astype(np.float64)))
        if symmetric:
            return [_symmetric_factor(estimate, rank)]
        left, values, right = _top_triplets(estimate, rank)
    weights = _signs(left) * np.sqrt(values)
    return [weights[:, None] * right, left * weights]


def _symmetric_factor(estimate, rank):
    """Return U of the positive part of the symmetric part's top eigenvalues."""
    values, vectors = _top_eigenpairs((estimate + estimate.T) / 2, rank)
    if not values[0] > 0:
        raise ValueError("the symmetric part of the measurements' back-projection has no positive eigenvalue")
    return vectors * _signs(vectors) * np.sqrt(np.maximum(values, 0))


def _back_projection(operator, y):
    """Return A*(y), sparse for a mask."""
    if not isinstance(operator, EntryMask):
        return operator.adjoint(y)
    return sparse.csr_array(
        (operator.sort(y), operator.indices[: operator.size], operator.indptr), shape=operator.shape
    )


def _is_small(matrix, rank):
    # Lanczos needs room: about twice the vectors that are asked for.
    return min(matrix.shape) <= max(_DENSE, 4 * rank)


def _dense(matrix):
    return matrix.toarray() if sparse.issparse(matrix) else matrix


def _first_vector(matrix):
    return np.random.default_rng(0).standard_normal(min(matrix.shape))


def _top_triplets(matrix, rank):
    """Return (U, s, V^T) of the largest singular values, descending."""
    if _is_small(matrix, rank):
        left, values, right = np.linalg.svd(_dense(matrix), full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    left, values, right = svds(matrix, k=rank, v0=_first_vector(matrix))
    order = np.argsort(values)[::-1]
    return left[:, order], values[order], right[order]


def _top_eigenpairs(matrix, rank):
    """Return (values, vectors) of the largest eigenvalues, descending."""
    if _is_small(matrix, rank):
        values, vectors = np.linalg.eigh(_dense(matrix))
    else:
        values, vectors = eigsh(matrix, k=rank, which="LA", v0=_first_vector(matrix))
    order = np.argsort(values)[::-1][:rank]
    return values[order], vectors[:, order]


def _signs(vectors):
    """Return the signs that make the largest entry of every column positive."""
    largest = np.abs(vectors).argmax(axis=0)
    return np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
