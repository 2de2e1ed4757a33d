"""The entry-mask kernels beside scipy and NumPy, in one process.

``pytest bench/test_entry.py -k quick`` takes seconds, ``-k full`` is 138,000 x 27,000 with 5 million entries (36 a row,
columns by a power law). ``extra_info`` holds ns an entry. ``-k model`` prints the figures behind ``entry_route``.
"""

import time

import numba
import numpy as np
import pytest
from scipy.sparse import csr_array

import fastdmf.kernels.cpu as cpu

SIZES = {"quick": (6_000, 4_000, 300_000), "full": (138_000, 27_000, 5_000_000)}
RANGES = 8


class Problem:
    def __init__(self, n1, n2, nnz, h, dtype=np.float32):
        rng = np.random.default_rng(0)
        popularity = np.arange(1, n2 + 1) ** -0.8
        rows = rng.integers(0, n1, nnz)
        cols = rng.choice(n2, nnz, p=popularity / popularity.sum())
        self.shape, self.nnz = (n1, n2), nnz
        self.indptr, self.indices, _ = cpu.entry_sort(rows, cols, n1, n2)
        self.bptr, self.brows, border = cpu.entry_blocks(self.indptr, self.indices, n1, n2, cpu.BLOCK_ROWS)
        self.p, self.qt, self.gp, self.gqt = (cpu.aligned_empty((1, n, h), dtype) for n in (n1, n2, n1, n2))
        for x in (self.p, self.qt):
            x[:] = rng.standard_normal(x.shape, dtype=np.float32)
        self.y = np.zeros((1, nnz + cpu.PAD), dtype)
        self.y[:, :nnz] = rng.standard_normal(nnz)
        self.yb = np.zeros_like(self.y)
        self.yb[:, :nnz] = self.y[:, border]
        self.losses = np.empty(1)
        self.copies = cpu.aligned_empty((1, RANGES, n2, h), dtype)
        self.cuts = cpu.entry_cuts(self.indptr, RANGES)
        self.col_cuts = cpu.entry_column_cuts(self.bptr, n2, 16)
        self.rows = np.repeat(np.arange(n1), np.diff(self.indptr))

    def _head(self):
        return self.gp, self.gqt, self.losses, self.p, self.qt, self.indptr, self.indices, self.y, None

    def one_pass(self):
        cpu.entry_one_pass(*self._head(), 0, 0.0, self.cuts, self.copies)

    def one_pass_serial(self):
        cpu.entry_one_pass_serial(*self._head(), 0, 0.0)

    def two_pass(self):
        blocks = (self.bptr, self.brows, self.yb, None)
        cpu.entry_two_pass(*self._head(), *blocks, 0, 0.0, self.cuts, self.col_cuts)

    def scipy(self):
        """Predictions by einsum in chunks, both products by scipy."""
        cols = self.indices[: self.nnz]
        r = np.empty(self.nnz, self.p.dtype)
        for k in range(0, self.nnz, 100_000):
            at = slice(k, min(k + 100_000, self.nnz))
            np.einsum("ij,ij->i", self.p[0][self.rows[at]], self.qt[0][cols[at]], out=r[at])
        r -= self.y[0, : self.nnz]
        g = csr_array((r, cols, self.indptr), shape=self.shape)
        self.gp[0], self.gqt[0] = g @ self.qt[0], g.T @ self.p[0]
        self.losses[0] = r @ r


@pytest.mark.parametrize("route", ["scipy", "one_pass_serial", "one_pass", "two_pass"])
@pytest.mark.parametrize("h", [16, 32, 64])
@pytest.mark.parametrize("size", SIZES)
def test_evaluation(benchmark, size, h, route):
    problem = Problem(*SIZES[size], h)
    benchmark.pedantic(getattr(problem, route), rounds=3 if size == "full" else 10, warmup_rounds=1)
    benchmark.extra_info["ns_per_entry"] = round(benchmark.stats["min"] / problem.nnz * 1e9, 2)
    benchmark.extra_info["threads"] = numba.get_num_threads()


def best(function, seconds=0.4):
    function()
    times = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def test_model():
    """Print ns an entry on one thread by the bytes of a row, as ``entry_route`` holds them (run with -s)."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    for place, shape in (("near", (2_000, 2_000, 400_000)), ("far", SIZES["full"])):
        for dtype in (np.float32, np.float64):
            for size in (64, 128, 256, 512):
                problem = Problem(*shape, size // np.dtype(dtype).itemsize, dtype)
                figures = [best(f) / problem.nnz * 1e9 for f in (problem.one_pass_serial, problem.two_pass)]
                print(place, np.dtype(dtype).name, size, "bytes: one pass, two passes", np.round(figures, 1), "ns")
    numba.set_num_threads(before)
