"""One evaluation of loss and gradient of small chains beside its alternatives, in one process on one thread.

``pytest bench/test_small.py -k quick`` takes seconds, ``-k full`` every size, depth, width and mask, ``-k batch`` 16
problems at once. Each test interleaves our evaluation with

- the floor: the flops that are needed (three of each thin product, three thin products over what is observed) at the
  rate of the fastest product of that shape, ``np.matmul``'s or ``gemm``'s;
- NumPy: plain code with ``out=`` buffers, the residual on a full matrix;
- torch: autograd on the masked full product (left out where torch is missing).

``extra_info`` holds microseconds (medians; of one problem for batches) and ratios; -s prints them.
"""

import time

import numba
import numpy as np
import pytest

import fastdmf
from fastdmf.backend import get_backend, thread_limits
from fastdmf.chain import Layout, initial_factors
from fastdmf.kernels.cpu.gemm import gemm, gemm_work
from fastdmf.problem import Problem

DENSITY = 0.2

QUICK = [
    (n, 3, width, dtype, mask)
    for n, width in ((2, 2), (20, 20), (100, 20), (100, 100))
    for dtype in "fd"
    for mask in ("sparse", "dense")
]
FULL = [
    (n, depth, width, dtype, mask)
    for n in (2, 20, 100, 300, 500)
    for depth in (2, 3, 4, 5)
    for width in sorted({min(n, 20), n})
    for dtype in "fd"
    for mask in ("sparse", "dense")
]


class Case:
    """One problem, or a batch that shares its mask, and the functions to time."""

    def __init__(self, n, depth, width, dtype, mask, batch=1):
        rng = np.random.default_rng(0)
        self.dtype, self.batch, self.dense = np.dtype(dtype), batch, mask == "dense"
        self.layout = Layout((n, *[width] * (depth - 1), n))
        count = n * n if self.dense else max(1, round(DENSITY * n * n))
        rows, cols = np.divmod(rng.permutation(n * n)[:count], n)
        self.count, self.y = count, rng.standard_normal((1, count)).astype(dtype)
        operator = fastdmf.EntryMask(rows, cols, (n, n))
        bound = operator.bind(get_backend(), self.y, dtype=dtype, width=width, batch=batch)
        self.problem = Problem(bound, self.layout, batch, loss="sse")
        self.x = self.layout.allocate(batch, dtype)
        for b in range(batch):
            self.layout.write(self.x, initial_factors(self.layout, "gaussian", 1.0, b), b)
        self.grad = self.layout.allocate(batch, dtype)
        self.factors = [np.ascontiguousarray(w) for w in self.layout.factors(self.x)]
        if batch == 1:
            self.factors = [w[0] for w in self.factors]
        self.full_y, self.mask = (np.zeros((n, n), dtype) for _ in range(2))
        self.full_y[rows, cols], self.mask[rows, cols] = self.y, 1
        self.products = [np.empty((*w.shape[:-1], n), dtype) for w in self.factors]
        self.backs = [np.empty_like(p) for p in self.products]
        self.grads = [np.empty_like(w) for w in self.factors]

    def ours(self):
        self.losses, _ = self.problem.evaluate(self.x, self.grad)

    def numpy(self):
        w, x, g, grads = self.factors, self.products, self.backs, self.grads
        x[0] = w[0]
        for j in range(1, len(w)):
            np.matmul(w[j], x[j - 1], out=x[j])
        np.subtract(x[-1], self.full_y, out=g[-1])
        g[-1] *= self.mask
        self.loss = np.vdot(g[-1], g[-1])
        g[-1] *= 2
        for j in range(len(w) - 1, 0, -1):
            np.matmul(g[j], x[j - 1].swapaxes(-1, -2), out=grads[j])
            np.matmul(w[j].swapaxes(-1, -2), g[j], out=g[j - 1])
        grads[0] = g[0]

    def torch(self):
        """Return the function; raises ImportError where torch is missing."""
        import torch

        torch.set_num_threads(1)
        factors = [torch.from_numpy(w.copy()).requires_grad_() for w in self.factors]
        y, mask = torch.from_numpy(self.full_y), torch.from_numpy(self.mask)

        def run():
            x = factors[0]
            for w in factors[1:]:
                x = w @ x
            r = (x - y) * mask
            loss = (r * r).sum()
            for w in factors:
                w.grad = None
            loss.backward()
            return [w.grad.numpy() for w in factors]

        return run

    def check(self, torch):
        """All three agree."""
        self.ours()
        self.numpy()
        tolerance = 2e-3 if self.dtype == np.float32 else 1e-10
        np.testing.assert_allclose(self.losses.sum(), self.loss, rtol=tolerance)
        other = None if torch is None else torch()
        for j, ours in enumerate(self.layout.factors(self.grad)):
            for theirs in [self.grads[j]] if other is None else [self.grads[j], other[j]]:
                assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)

    def flops(self):
        d, n, k = self.layout.dims, self.layout.depth, self.layout.cut
        thin = sum(d[0] * d[j] * d[j - 1] for j in range(2, k + 1)) + sum(
            d[n] * d[j] * d[j - 1] for j in range(k + 1, n)
        )
        return 6 * (thin + self.count * self.layout.width)

    def rate(self):
        """Return flops a microsecond of the fastest product of the chain's shape."""
        n, h = self.layout.shape[0], self.layout.width
        k = n if self.layout.depth == 2 else h
        a, b, c = (np.random.default_rng(1).standard_normal(s).astype(self.dtype) for s in ((n, h), (h, k), (n, k)))
        work = get_backend().kernels.aligned_empty((gemm_work(k, h, self.dtype),), self.dtype)
        flat = [x.ravel() for x in (c, a, b)]
        times = medians(
            [
                lambda: np.matmul(a, b, out=c),
                lambda: gemm(flat[0], 0, k, flat[1], 0, h, 1, flat[2], 0, k, 1, n, k, h, work, 0),
            ]
        )
        return 2 * n * h * k / min(times)


def medians(functions, seconds=0.3):
    """Return median microseconds of calls in interleaved bursts, whose first call finds its code and data again."""
    times = [[] for _ in functions]
    begin = time.perf_counter()
    while len(times[0]) < 12 or time.perf_counter() - begin < seconds:
        for function, spent in zip(functions, times):
            function()
            burst = time.perf_counter()
            while True:
                start = time.perf_counter()
                function()
                spent.append(time.perf_counter() - start)
                if time.perf_counter() - burst > 1e-3:
                    break
    return [1e6 * float(np.median(spent)) for spent in times]


def report(benchmark, case, threads=1):
    """Time a case and fill ``extra_info``."""
    with thread_limits(threads):
        try:
            torch = case.torch()
        except ImportError:
            torch = None
        case.check(torch)
        ours, plain, *rest = medians([case.ours, case.numpy, *([torch] if torch else [])])
        floor = case.flops() / case.rate()
        info = {"us": ours / case.batch, "over_floor": ours / case.batch / floor, "floor_us": floor}
        info |= {"numpy_us": plain / case.batch, "over_numpy": plain / ours}
        if rest:
            info |= {"torch_us": rest[0] / case.batch, "over_torch": rest[0] / ours}
        info["threads"] = numba.get_num_threads()
        benchmark.extra_info.update({name: round(value, 2) for name, value in info.items()})
        print({name: round(value, 1) for name, value in info.items()})
        benchmark.pedantic(case.ours, rounds=20, warmup_rounds=2)


def name(case):
    n, depth, width, dtype, mask = case
    return f"{n}-depth{depth}-w{width}-{'float32' if dtype == 'f' else 'float64'}-{mask}"


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_quick(benchmark, case):
    report(benchmark, Case(*case))


@pytest.mark.parametrize("case", FULL, ids=name)
def test_full(benchmark, case):
    report(benchmark, Case(*case))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [(100, 3, w, dtype, "sparse") for w in (20, 100) for dtype in "fd"], ids=name)
def test_batch(benchmark, case, threads):
    """16 problems: NumPy and torch with a leading axis; ``singles_us`` is one of 16 runs by themselves."""
    many, one = Case(*case, batch=16), Case(*case)
    report(benchmark, many, threads)
    with thread_limits(1):
        (single,) = medians([one.ours])
    benchmark.extra_info["singles_us"] = round(single, 2)
    print({"singles_us": round(single, 1)})
