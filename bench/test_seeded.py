"""Seeded measurements: what drawing costs, the fused kernel, and the alternatives, in one process.

``-k quick`` is d = 1e4, ``-k wide`` d = 2.5e5. ``extra_info`` holds 1e9 entries a second, in all and by core: words of
Philox alone (four make four samples or 128 signs), samples alone, whole evaluations (residual and adjoint, every entry
once), NumPy's generator with two BLAS passes, and the dense kernel on a stored A.
"""

import numba
import numpy as np
import pytest

import fastdmf.kernels.cpu as cpu
from fastdmf.kernels.cpu import philox, vectors

SIZES = {"quick": (2_000, 10_000), "wide": (80, 250_000)}
STREAM = cpu.seeded_stream(0, 0)


@numba.njit(error_model="numpy")
def draw_words(out, stream, rows):
    philox.own_frame()
    for row in range(rows):
        for c in range(0, out.shape[0], 4 * philox.LANES):
            philox.store_words(out, c, philox.columns(philox.words(c // 4, np.uint32(row), stream)))


@numba.njit(error_model="numpy")
def draw_samples(out, stream, rows):
    philox.own_frame()
    far = out.shape[0] // 2
    for row in range(0, rows, 2):
        for c in range(0, far, 4 * philox.LANES):
            w, v = philox.words(c // 4, np.uint32(row), stream), philox.words(c // 4, np.uint32(row + 1), stream)
            z0, z1 = philox.normals(w, v)
            vectors.store(out, c, z0)
            vectors.store(out, far + c, z1)


def report(benchmark, entries, threads=1):
    rate = entries / benchmark.stats["min"] / 1e9
    benchmark.extra_info["g_entries_per_second"] = round(rate, 3)
    benchmark.extra_info["per_core"] = round(rate / threads, 3)


@pytest.mark.parametrize("draw", [draw_words, draw_samples], ids=["words", "samples"])
def test_drawing(benchmark, draw):
    """Into 32 KB, so that nothing but arithmetic is timed."""
    out = cpu.aligned_empty(8192, np.uint32 if draw is draw_words else np.float32)
    rows = 2_000
    benchmark.pedantic(lambda: draw(out, STREAM, rows), rounds=7, warmup_rounds=1)
    report(benchmark, out.size * rows // (1 if draw is draw_words else 2))


class Problem:
    def __init__(self, size, runs, ensemble, threads):
        m, columns = SIZES[size]
        self.m = m * (8 if ensemble == "rademacher" else 1)
        self.columns, self.d = columns, cpu.seeded_width(columns)
        rng = np.random.default_rng(0)
        self.rows = np.arange(self.m, dtype=np.uint32)
        self.x, self.g = (cpu.aligned_empty((runs, self.d), np.float32) for _ in range(2))
        self.x[:] = 0
        self.x[:, :columns] = rng.standard_normal((runs, columns)) / np.sqrt(columns)
        self.y = rng.standard_normal((runs, self.m), dtype=np.float32)
        self.losses = np.empty(runs)
        ranges = 8 if threads > 1 else 1
        self.partial = np.empty((ranges, runs, self.d), np.float32)
        self.scratch = cpu.seeded_scratch(ranges, self.d, ensemble)

    def serial(self):
        head = (self.g, self.losses, self.x, self.y, None, 0, 0.0)
        cpu.seeded_loss_pull_serial(*head, self.rows, STREAM, self.scratch)

    def parallel(self):
        head = (self.g, self.losses, self.x, self.y, None, 0, 0.0)
        cpu.seeded_loss_pull(*head, self.rows, STREAM, self.partial, self.scratch)

    def numpy(self):
        """Draw and use 32 measurements at a time; a second draw for the adjoint is not charged."""
        rng, x, g = np.random.default_rng(0), self.x[0, : self.columns], self.g[0, : self.columns]
        a = np.empty((min(32, self.m), self.columns), np.float32)
        g[:] = 0
        for i in range(0, self.m, len(a)):
            rng.standard_normal(dtype=np.float32, out=a)
            r = a @ x - self.y[0, i : i + len(a)]
            g += r[: self.m - i] @ a[: self.m - i]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("runs", [1, 2, 4, 8])
@pytest.mark.parametrize("ensemble", ["gaussian", "rademacher"])
@pytest.mark.parametrize("size", SIZES)
def test_evaluation(benchmark, size, ensemble, runs, threads):
    problem = Problem(size, runs, ensemble, threads)
    before = numba.get_num_threads()
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    benchmark.pedantic(problem.serial if threads == 1 else problem.parallel, rounds=7, warmup_rounds=1)
    numba.set_num_threads(before)
    report(benchmark, problem.m * problem.columns, threads)


@pytest.mark.parametrize("size", SIZES)
def test_numpy(benchmark, size):
    problem = Problem(size, 1, "gaussian", 1)
    problem.m //= 8
    benchmark.pedantic(problem.numpy, rounds=5, warmup_rounds=1)
    report(benchmark, problem.m * problem.columns)


@pytest.mark.parametrize("runs", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_stored(benchmark, size, runs):
    """The dense kernel on one thread: 80 MB of A, which no cache holds."""
    m, d = SIZES[size]
    rng = np.random.default_rng(0)
    a = cpu.aligned_empty((m, d), np.float32)
    rng.standard_normal(dtype=np.float32, out=a)
    x, y = rng.standard_normal((runs, d), dtype=np.float32), rng.standard_normal((runs, m), dtype=np.float32)
    g, losses = np.empty_like(x), np.empty(runs)
    benchmark.pedantic(
        lambda: cpu.gaussian_loss_pull_serial(g, losses, a, x, y, None, 0, 0.0), rounds=7, warmup_rounds=1
    )
    report(benchmark, m * d)
