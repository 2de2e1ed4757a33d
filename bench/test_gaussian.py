"""Dense measurements beside their floors, BLAS and torch, in one process.

``pytest bench/test_gaussian.py -k quick`` reads 80 MB of A, ``-k full`` 800 MB, ``-k shapes`` 160 MB in rows of 10 to
250,000 numbers; ``-k blocks`` compares whole rows, four at a time, with blocks of rows in chunks of columns, and
``-k rounding`` recovers a matrix from A as float32 and as float16. A is float32.

Floors: *read* adds the numbers of A up, with all threads, and does nothing else; *arithmetic* is as many fused products
and sums, in registers. Bandwidth moves while others use the machine, so each round of a benchmark times the read floor
and our kernel just before it, and ratios are between medians over the same rounds. BLAS is NumPy's: two gemv for each
right-hand side, or two gemm for all together. Torch is autograd of the squared residuals.
"""

import time
from functools import lru_cache

import numba
import numpy as np
import pytest
from numba import njit, prange
from threadpoolctl import threadpool_limits

import fastdmf
import fastdmf.kernels.cpu as cpu
from fastdmf.kernels.cpu import gaussian
from fastdmf.kernels.cpu import vectors as v

SIZES = {"quick": (2_000, 10_000), "full": (20_000, 10_000)}
COLUMNS = [10, 31, 100, 333, 1_000, 10_000, 40_000, 250_000]
NUMBERS = 40_000_000  # of A, for every shape
RANGES = 8
EIGHT = (0,) * 8
PAUSE = 0.05  # seconds: BLAS threads spin after their work, and whatever came next took 1.3 times as long


@njit(parallel=True, error_model="numpy")
def read_floor(a, out):
    """Add up the numbers of A, one stream a range."""
    ranges, size, step = out.shape[0], a.size, v.row_width(a, EIGHT)
    for item in prange(ranges):
        k = np.int64(item)
        total = v.zero_row(a, EIGHT)
        for c in range(size * k // ranges // step * step, size * (k + 1) // ranges // step * step, step):
            total = v.add(v.load_row(a, c, EIGHT), total)
        out[k] = v.sum1(v.fold(total))


@njit(parallel=True, error_model="numpy")
def arithmetic_floor(a, out, count):
    """Do ``count`` fused products and sums in eight registers a range."""
    ranges, width = out.shape[0], v.row_width(a, EIGHT)
    for k in prange(ranges):
        total, half = v.zero_row(a, EIGHT), v.splat(a, 0.5)
        for _ in range(count // ranges // width):
            total = v.fma(total, half, half)
        out[k] = v.sum1(v.fold(total))


class Problem:
    """A of m rows and d columns."""

    def __init__(self, m, d):
        rng = np.random.default_rng(0)
        self.a, self.half = cpu.aligned_empty((m, d), np.float32), cpu.aligned_empty((m, d), np.uint16)
        for row in range(0, m, 1000):
            block = self.a[row : row + 1000]
            rng.standard_normal(dtype=np.float32, out=block)
            self.half[row : row + 1000] = block.astype(np.float16).view(np.uint16)
        self.sums = np.empty(RANGES)

    def share(self, runs):
        """Set the number of right-hand sides."""
        m, d = self.a.shape
        rng = np.random.default_rng(runs)
        self.x, self.g = (cpu.aligned_empty((runs, d), np.float32) for _ in range(2))
        self.x[:] = rng.standard_normal((runs, d)) / np.sqrt(d)
        self.y = rng.standard_normal((runs, m), dtype=np.float32)
        self.r, self.losses = np.empty_like(self.y), np.empty(runs)
        self.partial = cpu.aligned_empty((min(RANGES, max(m // 4, 1)), runs, d), np.float32)
        return self

    def read(self):
        read_floor(self.a, self.sums)

    def arithmetic(self):
        arithmetic_floor(self.a, self.sums, 2 * self.a.size * len(self.x))

    def ours(self):
        cpu.gaussian_loss_pull(self.g, self.losses, self.a, self.x, self.y, None, 0, 0.0, self.partial)

    def serial(self):
        cpu.gaussian_loss_pull_serial(self.g, self.losses, self.a, self.x, self.y, None, 0, 0.0)

    def float16(self):
        cpu.gaussian_loss_pull(self.g, self.losses, self.half, self.x, self.y, None, 0, 0.0, self.partial)

    def forward(self):
        cpu.gaussian_forward(self.r, self.a, self.x)

    def pull(self):
        cpu.gaussian_pull(self.g, self.a, self.y, self.partial)

    def blas_gemv(self):
        with threadpool_limits(numba.get_num_threads(), user_api="blas"):
            for b in range(len(self.x)):
                r = self.a @ self.x[b] - self.y[b]
                np.dot(r, self.a, out=self.g[b])
                self.losses[b] = r @ r

    def blas_gemm(self):
        with threadpool_limits(numba.get_num_threads(), user_api="blas"):
            np.matmul(self.x, self.a.T, out=self.r)
            self.r -= self.y
            np.matmul(self.r, self.a, out=self.g)
            self.losses[:] = np.einsum("bm,bm->b", self.r, self.r)

    def torch(self):
        torch = pytest.importorskip("torch")
        torch.set_num_threads(numba.get_num_threads())
        a, x, y = (torch.from_numpy(z) for z in (self.a, self.x, self.y))
        x = x.clone().requires_grad_()
        ((x @ a.T - y) ** 2).sum().backward()
        self.g[:] = x.grad.numpy() / 2


@lru_cache(maxsize=1)
def problem_of(m, d):
    return Problem(m, d)


def measure(benchmark, problem, route, beside, rounds):
    """Time a route, and before each of its rounds those that its ratios are against."""
    times = {name: [] for name in beside if name != route}

    def others():
        for name, spent in times.items():
            time.sleep(PAUSE)
            begin = time.perf_counter()
            getattr(problem, name)()
            spent.append(time.perf_counter() - begin)
        time.sleep(PAUSE)

    benchmark.pedantic(getattr(problem, route), setup=others, rounds=rounds, warmup_rounds=1)
    median = benchmark.stats["median"]
    size = problem.half.nbytes if route == "float16" else problem.a.nbytes
    if route != "arithmetic":
        benchmark.extra_info["gb_per_second"] = round(size / median / 1e9, 1)
    for name, spent in times.items():
        benchmark.extra_info[f"over_{name}"] = round(median / np.median(spent[1:]), 2)  # the first is the warm-up's
    benchmark.extra_info["threads"] = numba.get_num_threads()


# Floors first: the others are measured against them.
ROUTES = ["read", "arithmetic", "ours", "serial", "float16", "forward", "pull", "blas_gemv", "blas_gemm", "torch"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("runs", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_evaluation(benchmark, size, runs, route):
    problem = problem_of(*SIZES[size]).share(runs)
    benchmark.group = f"gaussian {size}, {runs} right-hand sides"
    beside = ["read", "ours"] if runs == 1 else ["read", "arithmetic", "ours"]
    measure(benchmark, problem, route, beside, rounds=9 if size == "quick" else 5)


@pytest.mark.parametrize("runs", [1, 8])
@pytest.mark.parametrize("columns", COLUMNS)
def test_shapes(benchmark, columns, runs):
    problem = problem_of(NUMBERS // columns, columns).share(runs)
    benchmark.group = f"gaussian shapes, {runs} right-hand sides"
    measure(benchmark, problem, "ours", ["read", "float16", "blas_gemv"] if runs == 1 else ["read"], rounds=5)


@pytest.mark.parametrize("way", ["rows", "blocks"])
@pytest.mark.parametrize("runs", [4, 8, 16])
@pytest.mark.parametrize("columns", [1_000, 10_000, 250_000])
def test_blocks(benchmark, monkeypatch, columns, runs, way):
    monkeypatch.setattr(gaussian, "_MANY", 0 if way == "blocks" else runs + 1)
    monkeypatch.setattr(gaussian, "_NEAR", 0)
    problem = problem_of(NUMBERS // columns, columns).share(runs)
    benchmark.group = f"gaussian blocks, {columns} columns"
    measure(benchmark, problem, "ours", ["read", "arithmetic"], rounds=5)


@pytest.mark.parametrize("storage", [None, "float16"])
def test_rounding(benchmark, storage):
    """Recover a 40 x 40 matrix of rank 3 from 1,200 measurements without noise."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 40))
    a = rng.standard_normal((1200, 40, 40), dtype=np.float32)
    y = a.reshape(1200, -1).astype(float) @ truth.ravel()
    operator = fastdmf.GaussianDense(a, storage=storage)

    def recover():
        return fastdmf.solve(operator, y, dtype="float32", tol=1e-9, max_iter=1000, random_state=0, on_failure="ignore")

    benchmark.group = "gaussian rounding"
    solution = benchmark.pedantic(recover, rounds=1, warmup_rounds=1)
    error = np.linalg.norm(solution.matrix() - truth) / np.linalg.norm(truth)
    benchmark.extra_info.update(storage=storage or "float32", relative_error=f"{error:.1e}", steps=solution.n_iter)
