"""Predictions at pairs against plain loops."""

import naive
import numba
import numpy as np
import pytest

from fastdmf.kernels import cpu

WIDTHS = [(np.float32, 16), (np.float32, 32), (np.float32, 80), (np.float64, 8), (np.float64, 16), (np.float64, 40)]


def arrays(n1, n2, k, h, dtype, seed=0):
    """Random rows, pairs and variances; the last columns are padding, column 1 of the rows has no variance."""
    rng = np.random.default_rng(seed)

    def rows_of(n):
        out = cpu.aligned_empty((n, h), dtype)
        out[:] = rng.standard_normal((n, h))
        out[:, h - 3 :] = 0
        return out

    x, y = rows_of(n1), rows_of(n2)
    rows, cols = rng.integers(0, n1, k), rng.integers(0, n2, k)
    variances = [rng.uniform(0.5, 2, h).astype(dtype) for _ in range(4)]
    variances[1][1] = variances[1][h - 3 :] = variances[3][h - 3 :] = np.inf
    counts = [rng.integers(0, 50, n).astype(dtype) for n in (n1, n2)]
    return x, y, rows, cols, counts[0], *variances[:2], counts[1], *variances[2:]


@pytest.mark.parametrize(("dtype", "h"), WIDTHS)
@pytest.mark.parametrize(
    ("n1", "n2", "k"), [(1, 1, 1), (2, 31, 3), (31, 2, 33), (33, 257, 257), (257, 33, 1000), (2, 2, 0)]
)
def test_pairs(n1, n2, k, dtype, h):
    data = arrays(n1, n2, k, h, dtype)
    before = [a.copy() for a in data]
    # Two places behind the last pair show writing past the end.
    outs = [np.full(k + 2, np.nan, dtype) for _ in range(3)]
    cpu.pair_moments(outs[0][:k], outs[1][:k], *data)
    cpu.pair_predict(outs[2][:k], *data[:4])
    means, spreads = naive.pair_moments(*data)
    tol = 4 * np.finfo(dtype).eps * np.sqrt(h)
    for out, expected in ((outs[0], means), (outs[1], spreads), (outs[2], means)):
        assert np.isnan(out[k:]).all()
        assert np.linalg.norm(out[:k] - expected) <= tol * max(np.linalg.norm(expected), 1)
    assert np.array_equal(outs[0][:k], outs[2][:k])
    assert all(np.array_equal(a, b) for a, b in zip(data, before))


def test_same_bits_alone_and_for_any_number_of_threads():
    data = arrays(300, 200, 1001, 32, np.float32)
    results = []
    threads = numba.get_num_threads()
    for n in (1, 2):
        numba.set_num_threads(min(n, threads))
        means, spreads = np.empty((2, 1001), np.float32)
        cpu.pair_moments(means, spreads, *data)
        results.append((means, spreads))
    numba.set_num_threads(threads)
    assert np.array_equal(results[0], results[1])
    for k in (0, 500, 1000):
        mean, spread = np.empty((2, 1), np.float32)
        cpu.pair_moments(mean, spread, *data[:2], *(a[k : k + 1] for a in data[2:4]), *data[4:])
        assert (mean[0], spread[0]) == (means[k], spreads[k])


def test_offsets_beyond_32_bits(tmp_path):
    """A row whose first number lies beyond 2^31 numbers of its array, in a file with a hole."""
    n, h = 2**27 + 3, 16
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(n, h))
    x[-1] = np.arange(h)
    y = np.ones((2, h), np.float32)
    out = np.full(1, np.nan, np.float32)
    cpu.pair_predict(out, x.view(np.ndarray), y, np.array([n - 1]), np.array([1]))
    assert out[0] == h * (h - 1) / 2


def test_one_compiled_version_a_dtype():
    for dtype, h in WIDTHS:
        data = arrays(3, 4, 5, h, dtype)
        out = np.empty(5, dtype)
        cpu.pair_predict(out, *data[:4])
        cpu.pair_moments(out, out.copy(), *data)
    assert len(cpu.pairs._pairs.signatures) == 2
