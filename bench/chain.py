"""One evaluation of a small completion problem: the whole chain in one compiled call against separate products.

Square masks, one thread; medians of interleaved calls in microseconds: the one call with the residuals at the entries
and with full matrices, the route that it chooses, and separate calls of NumPy's products around the entry kernels. The
constants of ``chain_route`` (``fastdmf.kernels.cpu.chain``) come from this table.

    python bench/chain.py [--depth 3]
"""

import argparse
import time

import numpy as np

import fastdmf
from fastdmf.backend import get_backend, thread_limits
from fastdmf.chain import Layout, initial_factors
from fastdmf.masks import FusedChain
from fastdmf.problem import Problem


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=3, help="depth (default: %(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(
        f"{'n':>5}{'width':>6}{'density':>8}{'dtype':>9}{'entries':>9}{'full':>8}{'chosen':>9}{'separate':>10}{'ratio':>7}"
    )
    for n in (20, 100, 300, 500):
        for width in sorted({8, 20, 64, n} if n > 20 else {8, n}):
            for density in (0.1, 0.2, 0.4, 0.6, 1.0):
                rows, cols = np.divmod(rng.permutation(n * n)[: int(density * n * n)], n)
                operator = fastdmf.EntryMask(rows, cols, (n, n))
                y = rng.standard_normal((1, len(rows)))
                for dtype in (np.float64, np.float32):
                    compare(operator, y, Layout((n, *[width] * (args.depth - 1), n)), density, dtype)


def compare(operator, y, layout, density, dtype):
    """Print one line."""
    with thread_limits(1):
        bound = operator.bind(get_backend(), y, dtype=dtype, width=layout.width)
        problems = [Problem(bound, layout, 1) for _ in range(3)]
        for problem, fused in zip(problems, (FusedChain(bound, layout, False), FusedChain(bound, layout, True), None)):
            problem._fused = fused
        x = layout.allocate(1, dtype)
        layout.write(x, initial_factors(layout, "gaussian", 1.0, 0))
        grad = np.zeros_like(x)
        times = [[] for _ in problems]
        for _ in range(7 if layout.width > 100 else 21 if layout.shape[0] > 100 else 101):
            for problem, spent in zip(problems, times):
                begin = time.perf_counter()
                problem.evaluate(x, grad)
                spent.append(time.perf_counter() - begin)
        entries, full, separate = (1e6 * np.median(spent) for spent in times)
        dense = FusedChain(bound, layout)._data[-1]
        chosen = full if dense else entries
        line = f"{layout.shape[0]:>5}{layout.width:>6}{density:>8}{np.dtype(dtype).name:>9}{entries:>9.0f}{full:>8.0f}"
        print(f"{line}{'full' if dense else 'entries':>9}{separate:>10.0f}{chosen / separate:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
