"""The entry-mask kernels beside their floors, torch, scipy and NumPy, in one process.

``pytest bench/test_entry.py -k quick`` takes seconds; ``-k full`` is 138,000 x 27,000 with 5 million entries (36 a row,
columns by a power law), ``-k large`` the same with 20 million. ``extra_info`` holds ns an entry, and the ratio to the
figures that were measured before in the same process. ``-k model -s`` prints the figures behind ``entry_route``.

Floors: *arithmetic* is our own pass over indices that hit 16 hot rows of Q; *gather* reads the rows of Q and adds to
the rows of G^T P, without arithmetic to speak of, with prefetch. Torch stands twice: as one writes it (``G.t() @ P``
sorts again on every call) and with the transposed structure prepared.
"""

import time
import warnings
from functools import lru_cache

import numba
import numpy as np
import pytest
from numba import njit, prange
from scipy.sparse import csr_array

import fastdmf
import fastdmf.kernels.cpu as cpu
from fastdmf.backend import get_backend
from fastdmf.kernels.cpu import vectors as v

SIZES = {"quick": (6_000, 4_000, 300_000), "full": (138_000, 27_000, 5_000_000), "large": (138_000, 27_000, 20_000_000)}
RANGES = 8
LINE = (0,) * (cpu.LINE // v.VECTOR_BYTES)
MEDIANS = {}


@njit(parallel=True, error_model="numpy")
def gather_floor(q, s, indices, cuts):
    """Read the rows of q at the indices and add them to those of a copy of s, range by range."""
    h = np.int64(q.shape[1])
    step = v.row_width(q, LINE)
    for piece in prange(cuts.shape[0] - 1):
        copy = s[piece]
        for k in range(cuts[piece], cuts[piece + 1]):
            j = v.load_index(indices, k) * h
            ahead = v.load_index(indices, k + 12) * h
            for c in range(0, h, step):
                v.prefetch(q, ahead + c)
                v.prefetch(copy, ahead + c)
            for c in range(0, h, step):
                v.store(copy, j + c, v.add(v.load_row(copy, j + c, LINE), v.load_row(q, j + c, LINE)))


class Problem:
    def __init__(self, n1, n2, nnz, h, dtype=np.float32):
        rng = np.random.default_rng(0)
        popularity = np.arange(1, n2 + 1) ** -0.8
        cells = np.zeros(0, np.int64)
        while len(cells) < nnz:  # a mask holds every entry once
            cols = rng.choice(n2, nnz // 4, p=popularity / popularity.sum())
            cells = np.union1d(cells, rng.integers(0, n1, nnz // 4) * n2 + cols)
        rows, cols = np.divmod(rng.permutation(cells)[:nnz], n2)
        self.shape, self.nnz = (n1, n2), nnz
        begin = time.perf_counter()
        self.indptr, self.indices, _ = cpu.entry_sort(rows, cols, n1, n2)
        self.bptr, self.brows, border = cpu.entry_blocks(self.indptr, self.indices, n1, n2, cpu.BLOCK_ROWS)
        self.index_seconds = time.perf_counter() - begin
        self.p, self.qt, self.gp, self.gqt = (cpu.aligned_empty((1, n, h), dtype) for n in (n1, n2, n1, n2))
        for x in (self.p, self.qt):
            x[:] = rng.standard_normal(x.shape, dtype=np.float32)
        self.y = np.zeros((1, self.nnz + cpu.PAD), dtype)
        self.y[:, : self.nnz] = rng.standard_normal(self.nnz)
        self.yb = np.zeros_like(self.y)
        self.yb[:, : self.nnz] = self.y[:, border]
        self.losses = np.empty(1)
        self.copies = cpu.aligned_empty((1, RANGES, n2, h), dtype)
        self.cuts = cpu.entry_cuts(self.indptr, RANGES)
        self.col_cuts = cpu.entry_column_cuts(self.bptr, n2, 16)
        self.hot = self.indices.copy()
        self.hot[: self.nnz] = np.arange(self.nnz) % min(16, n2)

    @property
    def rows(self):
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    def _head(self, indices=None):
        indices = self.indices if indices is None else indices
        return self.gp, self.gqt, self.losses, self.p, self.qt, self.indptr, indices, self.y, None

    def arithmetic_floor(self):
        cpu.entry_one_pass(*self._head(self.hot), 0, 0.0, self.cuts, self.copies)

    def gather_floor(self):
        pieces = np.linspace(0, self.nnz, RANGES + 1).astype(np.int64)
        gather_floor(self.qt[0], self.copies[0], self.indices, pieces)

    def one_pass(self):
        cpu.entry_one_pass(*self._head(), 0, 0.0, self.cuts, self.copies)

    def one_pass_serial(self):
        cpu.entry_one_pass_serial(*self._head(), 0, 0.0)

    def two_pass(self):
        blocks = (self.bptr, self.brows, self.yb, None)
        cpu.entry_two_pass(*self._head(), *blocks, 0, 0.0, self.cuts, self.col_cuts)

    def solver(self):
        """What a descent does: the route that ``bind`` chooses."""
        operator = fastdmf.EntryMask(self.rows, self.indices[: self.nnz], self.shape)
        y, h = self.y[:, : self.nnz], self.p.shape[2]
        bound = operator.bind(get_backend(), y, dtype=self.p.dtype, width=h)
        return lambda: bound.loss_and_pull(self.p, self.qt, self.gp, self.gqt)

    def row_solve(self):
        """Return one step of conjugate gradients for every row."""
        h, dtype = self.p.shape[2], self.p.dtype
        ones, scale = np.ones(h, dtype), np.ones(self.shape[0], dtype)
        data = (self.qt[0], None, self.indptr, self.indices, self.y[0], None, scale, ones, ones, ones, ones)
        return lambda: cpu.row_solve(self.p[0], *data, 1, 0.1)

    def scipy(self):
        """Return predictions by einsum in chunks and both products by scipy."""
        cols, rows = self.indices[: self.nnz], self.rows
        r = np.empty(self.nnz, self.p.dtype)

        def evaluate():
            for k in range(0, self.nnz, 100_000):
                at = slice(k, min(k + 100_000, self.nnz))
                np.einsum("ij,ij->i", self.p[0][rows[at]], self.qt[0][cols[at]], out=r[at])
            np.subtract(r, self.y[0, : self.nnz], out=r)
            g = csr_array((r, cols, self.indptr), shape=self.shape)
            self.gp[0], self.gqt[0] = g @ self.qt[0], g.T @ self.p[0]
            self.losses[0] = r @ r

        return evaluate

    def torch(self, prepared=False):
        """Return sampled_addmm and two sparse products; ``prepared`` holds the transposed structure ready."""
        torch = pytest.importorskip("torch")
        torch.set_num_threads(numba.get_num_threads())
        nnz, index = self.nnz, self.indices[: self.nnz].astype(np.int64)

        def csr(indptr, indices, values, shape):
            return torch.sparse_csr_tensor(*map(torch.from_numpy, (indptr, indices)), values, size=shape)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR support is in beta"
            y = csr(self.indptr, index, torch.from_numpy(-self.y[0, :nnz]), self.shape)
        p, q = torch.from_numpy(self.p[0]), torch.from_numpy(self.qt[0])
        turned = csr_array((np.arange(nnz), index, self.indptr), shape=self.shape).T.tocsr()
        order, indptr = torch.from_numpy(turned.data), turned.indptr.astype(np.int64)
        rows = turned.indices.astype(np.int64)

        def evaluate():
            g = torch.sparse.sampled_addmm(y, p, q.T)
            gp = g @ q
            gt = csr(indptr, rows, g.values()[order], self.shape[::-1]) if prepared else g.t()
            return gp, gt @ p, (g.values() ** 2).sum(dtype=torch.float64)

        return evaluate

    def torch_prepared(self):
        return self.torch(prepared=True)


@lru_cache(maxsize=1)
def problem_of(size, h):
    return Problem(*SIZES[size], h)


# Floors first: the others are measured against them.
PREPARED = ("solver", "row_solve", "scipy", "torch", "torch_prepared")
ROUTES = ["arithmetic_floor", "gather_floor", "solver", "one_pass_serial", "one_pass", "two_pass", "row_solve"]
CASES = [(size, h, route) for size in SIZES for h in (16, 32, 64) for route in [*ROUTES, *PREPARED[2:]]]


@pytest.mark.parametrize(("size", "h", "route"), CASES)
def test_evaluation(benchmark, size, h, route):
    problem = problem_of(size, h)
    run = getattr(problem, route)
    run = run() if route in PREPARED else run
    slow = route in ("scipy", "torch", "torch_prepared")
    benchmark.group = f"mask {size} h={h}"
    benchmark.pedantic(run, rounds=3 if slow else 9, warmup_rounds=1)
    median = benchmark.stats["median"]
    MEDIANS[size, h, route] = median
    benchmark.extra_info.update(ns_per_entry=round(median / problem.nnz * 1e9, 2), threads=numba.get_num_threads())
    for floor in ("arithmetic_floor", "gather_floor"):
        if (size, h, floor) in MEDIANS:
            benchmark.extra_info[f"over_{floor}"] = round(median / MEDIANS[size, h, floor], 2)
    if (size, h, "solver") in MEDIANS and slow:
        benchmark.extra_info["ours_is_faster_by"] = round(median / MEDIANS[size, h, "solver"], 1)


@pytest.mark.parametrize("size", SIZES)
def test_index(benchmark, size):
    """Sorting shuffled entries by row and column, and their blocks for the column pass."""
    n1, n2, _ = SIZES[size]
    problem = problem_of(size, 16)
    shuffle = np.random.default_rng(0).permutation(problem.nnz)
    rows, cols = problem.rows[shuffle], problem.indices[: problem.nnz][shuffle].astype(np.int64)

    def index():
        indptr, indices, _ = cpu.entry_sort(rows, cols, n1, n2)
        cpu.entry_blocks(indptr, indices, n1, n2, cpu.BLOCK_ROWS)

    benchmark.group = f"mask {size} index"
    benchmark.pedantic(index, rounds=5, warmup_rounds=1)
    benchmark.extra_info["ns_per_entry"] = round(benchmark.stats["median"] / problem.nnz * 1e9, 2)


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
