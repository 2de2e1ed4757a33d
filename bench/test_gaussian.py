"""Dense measurements with one read of A beside two BLAS passes, in one process.

``-k quick`` reads 80 MB, ``-k full`` 800 MB. ``extra_info`` holds GB of A a second.
"""

import numba
import numpy as np
import pytest

import fastdmf.kernels.cpu as cpu

SIZES = {"quick": (2_000, 10_000), "full": (20_000, 10_000)}
RANGES = 8


@pytest.mark.parametrize("route", ["blas", "serial", "parallel"])
@pytest.mark.parametrize("runs", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_pull(benchmark, size, runs, route):
    m, d = SIZES[size]
    rng = np.random.default_rng(0)
    a = cpu.aligned_empty((m, d), np.float32)
    rng.standard_normal(dtype=np.float32, out=a)
    x, y = rng.standard_normal((runs, d), dtype=np.float32), rng.standard_normal((runs, m), dtype=np.float32)
    g, losses, partial = np.empty_like(x), np.empty(runs), np.empty((RANGES, runs, d), np.float32)

    def blas():
        for b in range(runs):
            r = a @ x[b] - y[b]
            np.dot(r, a, out=g[b])
            losses[b] = r @ r

    def serial():
        cpu.gaussian_loss_pull_serial(g, losses, a, x, y, None, 0, 0.0)

    def parallel():
        cpu.gaussian_loss_pull(g, losses, a, x, y, None, 0, 0.0, partial)

    benchmark.pedantic(locals()[route], rounds=5, warmup_rounds=1)
    benchmark.extra_info["gb_per_second"] = round(a.nbytes / benchmark.stats["min"] / 1e9, 1)
    benchmark.extra_info["threads"] = numba.get_num_threads()
