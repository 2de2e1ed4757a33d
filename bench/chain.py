"""One evaluation of a small completion problem: the whole chain in one compiled call against separate products.

Depth 3, square masks, one thread; medians of interleaved calls in microseconds, and their ratio. The width up to which
the one call is chosen (``fastdmf.masks``) comes from this table.

    python bench/chain.py
"""

import time

import numpy as np

import fastdmf
from fastdmf.backend import get_backend, thread_limits
from fastdmf.chain import Layout, initial_factors
from fastdmf.masks import FusedChain
from fastdmf.problem import Problem


def main():
    """Print the table."""
    rng = np.random.default_rng(0)
    print(f"{'n':>5}{'width':>7}{'dtype':>9}{'one call':>10}{'separate':>10}{'ratio':>7}")
    with thread_limits(1):
        for n, entries in ((100, 2000), (300, 9000), (500, 25_000)):
            rows, cols = np.divmod(rng.permutation(n * n)[:entries], n)
            operator = fastdmf.EntryMask(rows, cols, (n, n))
            y = rng.standard_normal((1, entries))
            for width in (8, 20, 32, 48, 64, 100):
                for dtype in (np.float64, np.float32):
                    layout = Layout((n, width, width, n))
                    bound = operator.bind(get_backend(), y, dtype=dtype, width=width)
                    bound.route = "one_pass_serial"
                    fused, separate = Problem(bound, layout, 1), Problem(bound, layout, 1)
                    fused._fused, separate._fused = FusedChain(bound, layout), None
                    x = layout.allocate(1, dtype)
                    layout.write(x, initial_factors(layout, "gaussian", 1.0, 0))
                    grad = np.zeros_like(x)
                    times = {fused: [], separate: []}
                    for _ in range(200 if n == 100 else 60):
                        for problem, spent in times.items():
                            begin = time.perf_counter()
                            problem.evaluate(x, grad)
                            spent.append(time.perf_counter() - begin)
                    a, b = (1e6 * np.median(spent) for spent in times.values())
                    print(f"{n:>5}{width:>7}{np.dtype(dtype).name:>9}{a:>10.0f}{b:>10.0f}{a / b:>7.2f}")


if __name__ == "__main__":
    main()
