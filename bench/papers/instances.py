"""The papers' random instances, and starts that ``solve`` has no name for. One seed fixes an instance."""

import numpy as np

import fastdmf

__all__ = ["balanced_factors", "completion", "low_rank", "sensing", "symmetric_gaussian"]


def low_rank(n, rank, rng):
    """Return U V^T of standard normal U, V, scaled to ||W||_F = n (Arora, Cohen, Hu, Luo 2019)."""
    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    return truth * (n / np.linalg.norm(truth))


def completion(seed, count=2000, n=100, rank=5):
    """Return (mask, y, W) of Arora et al.: ``count`` entries drawn without replacement."""
    rng = np.random.default_rng(seed)
    truth = low_rank(n, rank, rng)
    rows, cols = np.divmod(rng.choice(n * n, count, replace=False), n)
    return fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols], truth


def sensing(count=2000, n=100, dtype=np.float32):
    """Return the measurements of Arora et al.: entries N(0, 1/n^2), so that y has unit variance."""
    rng = np.random.default_rng(7)
    return fastdmf.GaussianDense((rng.standard_normal((count, n, n)) / n).astype(dtype))


def symmetric_gaussian(count, n, rng):
    """Return (count, n, n) symmetric matrices with standard normal entries on and above the diagonal."""
    upper = np.triu(rng.standard_normal((count, n, n)))
    return upper + np.triu(upper, 1).swapaxes(1, 2)


def balanced_factors(matrix, depth):
    """Return [W_1, ..., W_N] with the product ``matrix`` = U S V^T: S^(1/N) V^T, S^(1/N), ..., U S^(1/N)."""
    if depth == 1:
        return [matrix]
    u, s, vt = np.linalg.svd(matrix)
    root = s ** (1 / depth)
    inner = [np.diag(root) for _ in range(depth - 2)]
    return [root[:, None] * vt, *inner, u * root]
