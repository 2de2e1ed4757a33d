"""Everything that is measured on a GPU, in one command of a few minutes; a compact table comes last.

    python bench/gpu.py --keep bench/results/gpu.jsonl                      # all sections
    python bench/gpu.py --only mask gaussian
    python bench/gpu.py --data ../shared/data                               # MovieLens-1M besides

The ceilings come first: bandwidth of a copy, of gathered rows, of reads from the L2 cache, flops of a product. Every
kernel is then told as a ratio to its floor on the same device, and beside what people would use instead: torch's
``sampled_addmm`` with two sparse products, two cuBLAS products with A, a torch loop over problems (where torch with
CUDA is installed). Times are medians of runs between two events of the stream, after warm-up; losses are compared with
the CPU's, so that a quick wrong answer is an error.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from versions import installed

import fastdmf
from fastdmf.backend import cuda_report, get_backend
from fastdmf.cuda import find_cuda

HERE = Path(__file__).resolve().parent
PACKAGES = ("fastdmf", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x", "torch")


@dataclass(frozen=True)
class Sizes:
    """How large everything is; ``TINY`` is for looking whether the script runs."""

    copy: int = 1 << 28  # numbers
    cached: int = 4 << 20
    product: int = 8192
    rows: int = 138_493
    columns: int = 26_744
    entries: int = 20_000_000
    widths: tuple = (16, 32, 64, 128)
    measurements: int = 20_000
    side: int = 100
    drawn: int = 20_000
    parameters: int = 1 << 27
    problems: int = 1000
    known: int = 3000
    steps: int = 300
    fits: int = 100
    repeats: int = 7


TINY = Sizes(
    **{"copy": 4096, "cached": 1024, "product": 16, "rows": 40, "columns": 30, "entries": 300, "widths": (16,)},
    **{"measurements": 30, "side": 8, "drawn": 40, "parameters": 4096, "problems": 3, "known": 40, "steps": 4},
    **{"fits": 3, "repeats": 2},
)


class Bench:
    """The device, a clock, and the rows that were measured."""

    def __init__(self, sizes, data):
        self.sizes, self.data, self.rows, self.ceilings = sizes, data, [], {}
        self.backend = get_backend("cuda")
        self.cupy = self.backend.xp
        self.rng = np.random.default_rng(0)

    def seconds(self, function):
        """Return the median seconds of ``function`` on the stream."""
        events = [self.cupy.cuda.Event() for _ in range(2)]
        times = []
        for k in range(self.sizes.repeats + 2):
            events[0].record()
            function()
            events[1].record()
            events[1].synchronize()
            if k >= 2:
                times.append(1e-3 * self.cupy.cuda.get_elapsed_time(*events))
        return float(np.median(times))

    def add(self, section, name, **numbers):
        """Keep and print one row."""
        row = {"section": section, "name": name, **numbers}
        self.rows.append(row)
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{section:<10} {name:<34} {shown}", flush=True)

    def normal(self, *shape, dtype=np.float32):
        """Return normal numbers on the device."""
        return self.cupy.asarray(self.rng.standard_normal(shape, np.float32).astype(dtype))


# --- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(bench):
    """Measure what the device can do: copies, reads of the L2 cache, products."""
    cupy, sizes = bench.cupy, bench.sizes
    a = cupy.zeros(sizes.copy, np.float32)
    b = cupy.empty_like(a)
    seconds = bench.seconds(lambda: cupy.copyto(b, a))
    bench.ceilings["copy"] = 2 * a.nbytes / seconds
    bench.add("ceiling", "copy", gb_per_second=2e-9 * a.nbytes / seconds)
    small = cupy.zeros(sizes.cached, np.float32)
    repeats = 50

    def read():
        for _ in range(repeats):
            small.sum()

    seconds = bench.seconds(read) / repeats
    bench.add("ceiling", f"sum of {4e-6 * sizes.cached:.3g} MB in L2", gb_per_second=1e-9 * small.nbytes / seconds)
    n = sizes.product
    for dtype in (np.float32, np.float64):
        x, out = bench.normal(n, n, dtype=dtype), cupy.empty((n, n), dtype)
        seconds = bench.seconds(lambda x=x, out=out: cupy.matmul(x, x, out=out))
        bench.add("ceiling", f"product {np.dtype(dtype)}", tflops=2e-12 * n**3 / seconds)


# --- masks -----------------------------------------------------------------------------------------------------------


def mask(bench):
    """Residual and both products of a large mask: over the gathers alone, and beside torch."""
    cupy, sizes = bench.cupy, bench.sizes
    n1, n2, count = sizes.rows, sizes.columns, sizes.entries
    # Popular rows and columns, as in ratings.
    draw = (n * bench.rng.random(int(1.3 * count)) ** 2 for n in (n1, n2))
    cells = np.unique(np.dot([n2, 1], np.stack([d.astype(np.int64) for d in draw])))
    cells = np.sort(bench.rng.permutation(cells)[:count])
    operator = fastdmf.EntryMask(*np.divmod(cells, n2), (n1, n2))
    y = bench.rng.standard_normal(operator.size, np.float32)
    probe = (HERE / "probes.cu").read_text()
    for h in sizes.widths:
        bound = operator.bind(bench.backend, y[None], dtype=np.float32, width=h)
        bound.dense = False
        p, qt = bench.normal(1, n1, h), bench.normal(1, n2, h)
        gp, gqt = cupy.empty_like(p), cupy.empty_like(qt)
        seconds = bench.seconds(lambda b=bound, a=(p, qt, gp, gqt): b.loss_and_pull(*a))
        gather = cupy.RawModule(code=probe, options=("-std=c++17", f"-DWIDTH={h}")).get_function("gather")
        rows, columns = bound._structures["rows"][0], bound._structures["columns"][0]
        grid, out = 132 * 8, cupy.empty(132 * 8 * 256, np.float32)

        def floor(gather=gather, p=p, qt=qt, rows=rows, columns=columns, out=out, grid=grid):
            for table, side in ((qt, rows), (p, columns)):
                gather((grid,), (256,), (out, table, side.indices, np.int64(operator.size)))

        least = bench.seconds(floor)
        numbers = {"ms": 1e3 * seconds, "gather_ms": 1e3 * least, "of_gather_floor": least / seconds}
        numbers["gathered_gb_per_second"] = 8e-9 * operator.size * (h + 1) / least
        if torch := _torch():
            pattern = [cupy.asarray(a) for a in (operator.indptr, operator.indices[: operator.size].astype(np.int64))]
            numbers["torch_ms"] = 1e3 * bench.seconds(_torch_mask(torch, pattern, cupy.asarray(y), p[0], qt[0]))
            numbers["times_torch"] = numbers["torch_ms"] / numbers["ms"]
        host = operator.bind(get_backend("cpu"), y[None], dtype=np.float32, width=h)
        on_host = [a.get() for a in (p, qt, gp, gqt)]
        expected = host.loss_and_pull(*on_host[:2], *(np.empty_like(a) for a in on_host[2:]))
        numbers["loss_off"] = float(abs(bound.loss_and_pull(p, qt, gp, gqt).get() / expected - 1)[0])
        bench.add("mask", f"{operator.size:,} entries, h {h}", **numbers)


def _torch():
    """Return torch if it computes on this device, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _torch_mask(torch, pattern, y, p, qt):
    """Return the function that does the same by ``sampled_addmm`` and two sparse products."""
    indptr, indices, y, p, qt = (torch.from_dlpack(a) for a in (*pattern, y, p, qt))
    zeros = torch.zeros_like(y)
    size = (len(p), len(qt))
    base = torch.sparse_csr_tensor(indptr, indices, zeros, size=size)
    columns = base.to_sparse_csc()

    def evaluate():
        r = torch.sparse.sampled_addmm(base, p, qt.T)
        values = r.values() - y
        residual = torch.sparse_csr_tensor(indptr, indices, values, size=size)
        return (
            residual @ qt,
            torch.sparse_csr_tensor(columns.ccol_indices(), columns.row_indices(), values, size=size[::-1]) @ p,
            (values * values).sum(),
        )

    return evaluate


# --- measurements ----------------------------------------------------------------------------------------------------


def gaussian(bench):
    """Loss and pull of dense measurements: over one read of A, and beside two products with A."""
    cupy, sizes = bench.cupy, bench.sizes
    m, n = sizes.measurements, sizes.side
    a = bench.normal(m, n * n)
    operator = fastdmf.GaussianDense(a, (n, n))
    for runs in (1, 4):
        y = bench.normal(runs, m)
        bound = operator.bind(bench.backend, y, dtype=np.float32, batch=runs)
        x, g = bench.normal(runs, n, n), cupy.empty((runs, n, n), np.float32)
        seconds = bench.seconds(lambda b=bound, x=x, g=g: b.loss_and_adjoint(x, g))

        def products(x=x, y=y, runs=runs):
            r = cupy.matmul(x.reshape(runs, -1), a.T) - y
            return cupy.matmul(r, a), (r * r).sum(axis=1)

        two = bench.seconds(products)
        expected = products()[1].get()
        read = a.nbytes / seconds
        bench.add(
            "gaussian",
            f"{1e-6 * a.nbytes:.0f} MB, {runs} right-hand sides",
            ms=1e3 * seconds,
            gb_per_second=1e-9 * read,
            of_copy=read / bench.ceilings.get("copy", np.nan),
            two_products_ms=1e3 * two,
            times_two_products=two / seconds,
            loss_off=float(np.abs(bound.loss_and_adjoint(x, g).get() / expected - 1).max()),
        )


def seeded(bench):
    """Seeded measurements: samples a second, and the bits beside the CPU's."""
    n = bench.sizes.side
    for ensemble in ("gaussian", "rademacher"):
        operator = fastdmf.GaussianSeeded(2024, bench.sizes.drawn, (n, n), ensemble=ensemble)
        bound = operator.bind(bench.backend, bench.normal(1, operator.size), dtype=np.float32)
        x, g = bench.normal(1, n, n), bench.cupy.empty((1, n, n), np.float32)
        seconds = bench.seconds(lambda b=bound, x=x, g=g: b.loss_and_adjoint(x, g))
        at, entries = next(iter(bound._drawing(1)._batches()))
        some = np.arange(at.start, at.stop)[:: max((at.stop - at.start) // 64, 1)]
        equal = np.array_equal(entries.get()[some - at.start, : n * n], operator.matrices(some).reshape(len(some), -1))
        rate = 1e-12 * operator.size * n * n / seconds
        bench.add("seeded", ensemble, ms=1e3 * seconds, tera_samples_per_second=rate, bits_equal=bool(equal))


# --- steps -----------------------------------------------------------------------------------------------------------


def update(bench):
    """Steps of the rules: over a copy of as many bytes."""
    kernels, d = bench.backend.kernels, bench.sizes.parameters
    arrays = [bench.cupy.zeros((1, d), np.float32) for _ in range(4)]
    one = bench.cupy.full(1, 1e-3)
    count = bench.cupy.zeros(1)
    x, grad, first, second = arrays
    steps = {
        "gd": (12, lambda: kernels.update_gd(x, grad, one)),
        "momentum": (20, lambda: kernels.update_momentum(x, first, grad, one, 0.9)),
        "adam": (28, lambda: kernels.update_adam(x, first, second, grad, one, 0.9, 0.999, 1e-8, count)),
    }
    for name, (size, step) in steps.items():
        seconds = bench.seconds(step)
        rate = size * d / seconds
        of_copy = rate / bench.ceilings.get("copy", np.nan)
        bench.add("update", name, ms=1e3 * seconds, gb_per_second=1e-9 * rate, of_copy=of_copy)


def step(bench):
    """One iteration of gradient descent on a small matrix, through the captured graph and on the CPU."""
    operator, y, _ = _small(bench, 0)
    for device in ("cuda", "cpu"):
        spent = []
        for steps in (bench.sizes.steps, 11 * bench.sizes.steps):
            settings = {"rule": "gd", "max_iter": steps, "check_every": steps, "on_failure": "ignore"}
            settings |= {"depth": 3, "dtype": np.float32, "random_state": 0, "device": device, "init_scale": 0.1}
            begin = time.perf_counter()
            fastdmf.solve(operator, y, **settings)
            spent.append(time.perf_counter() - begin)
        per = (spent[1] - spent[0]) / (10 * bench.sizes.steps)
        bench.add("step", f"depth 3, {bench.sizes.side} x {bench.sizes.side}, {device}", us=1e6 * per)


def _small(bench, seed):
    n = bench.sizes.side
    rng = np.random.default_rng([seed, 1])
    truth = rng.standard_normal((n, 5)) @ rng.standard_normal((5, n)) / np.sqrt(5)
    rows, columns = np.divmod(rng.choice(n * n, bench.sizes.known, replace=False), n)
    return fastdmf.EntryMask(rows, columns, (n, n)), truth[rows, columns].astype(np.float32), truth


def sweep(bench):
    """A sweep over seeds, beside a torch loop over the same problems, extrapolated from some steps of one."""
    sizes = bench.sizes
    problems = [_small(bench, seed) for seed in range(sizes.problems)]
    settings = {"rule": "gd", "depth": 3, "init_scale": 0.1, "dtype": np.float32, "check_every": sizes.steps}
    begin = time.perf_counter()
    table = fastdmf.sweep(
        lambda seed: problems[seed],
        seed=range(sizes.problems),
        **settings,
        max_iter=sizes.steps,
        tol=1e-12,
        device="cuda",
    )
    seconds = time.perf_counter() - begin
    numbers = {"seconds": seconds, "us_per_step_and_problem": 1e6 * seconds / (sizes.problems * sizes.steps)}
    operator, y, _ = problems[0]
    one = fastdmf.solve(operator, y, **settings, max_iter=sizes.steps, random_state=0, tol=1e-12, on_failure="ignore")
    numbers["loss_off"] = abs(float(table["loss"][0]) / one.history["loss"][-1] - 1)
    if torch := _torch():
        per = _torch_step(torch, operator, y, min(sizes.steps, 200))
        numbers |= {"torch_us_per_step": 1e6 * per, "times_torch": per * sizes.problems * sizes.steps / seconds}
    bench.add("sweep", f"{sizes.problems} problems, {sizes.steps} steps", **numbers)


def _torch_step(torch, operator, y, steps):
    """Return the seconds of a step of the plain torch loop on one problem."""
    n1, n2 = operator.shape
    factors = [torch.randn(n1, n1, device="cuda").mul_(0.05).requires_grad_() for _ in range(3)]
    seen = torch.zeros(n1, n2, device="cuda")
    seen[operator.rows, operator.cols] = 1
    target = torch.zeros(n1, n2, device="cuda")
    target[operator.rows, operator.cols] = torch.as_tensor(y, device="cuda")
    optimizer = torch.optim.SGD(factors, lr=1e-2)
    for k in range(steps + 20):
        if k == 20:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        optimizer.zero_grad()
        (((factors[2] @ factors[1] @ factors[0] - target) * seen) ** 2).mean().backward()
        optimizer.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


# --- solvers ---------------------------------------------------------------------------------------------------------


def agreement(bench):
    """Runs on both devices from one start: along 50 evaluations, and at their end."""
    operator, y, truth = _small(bench, 7)
    for rule in ("gd", "group_rmsprop", "auto"):
        settings = {"rule": rule, "random_state": 0, "depth": 3, "dtype": np.float64, "on_failure": "ignore"}
        settings |= {"check_every": 1, "init_scale": 0.1, "tol": 1e-9, "max_iter": 50}
        host, device = (fastdmf.solve(operator, y, device=d, **settings) for d in ("cpu", "cuda"))
        k = min(len(host.history["loss"]), len(device.history["loss"]))
        off = float(np.abs(device.history["loss"][:k] / host.history["loss"][:k] - 1).max())
        bench.add("agreement", f"{rule}, loss of 50 evaluations", off=off)
    ends = [fastdmf.solve(operator, y, random_state=0, device=d, on_failure="ignore") for d in ("cpu", "cuda")]
    errors = [float(np.linalg.norm(end.matrix() - truth) / np.linalg.norm(truth)) for end in ends]
    bench.add("agreement", "auto to its end", cpu_error=errors[0], cuda_error=errors[1])
    found = [
        fastdmf.recover(operator, y.astype(float), random_state=0, device=d, on_failure="ignore")
        for d in ("cpu", "cuda")
    ]
    errors = [float(np.linalg.norm(one.matrix() - truth) / np.linalg.norm(truth)) for one in found]
    seconds = {f"{one.device}_seconds": one.seconds for one in found}
    bench.add("agreement", "recover", cpu_error=errors[0], cuda_error=errors[1], **seconds)


def ratings(bench):
    """``vbmf`` on MovieLens-1M, or where that is not at hand on noisy numbers of its size."""
    shape, train, test, name = _ratings(bench)
    operator = fastdmf.EntryMask(train[0], train[1], shape)
    for device in ("cpu", "cuda", "cuda"):  # the second run on the device has its kernels compiled
        begin = time.perf_counter()
        fit = fastdmf.vbmf(operator, train[2].astype(np.float32), random_state=0, device=device, on_failure="ignore")
        seconds = time.perf_counter() - begin
        wrong = fit.predict(test[0], test[1]) - test[2]
        bench.add("ratings", f"{name}, {device}", rmse=float(np.sqrt(np.mean(wrong**2))), seconds=seconds)


def _ratings(bench):
    sizes, path = bench.sizes, bench.data and bench.data / "movielens/ml-1m/ratings.npz"
    if path and path.exists():
        z = np.load(path)
        order = np.random.default_rng(0).permutation(len(z["user"]))
        triples = [z[key][order] for key in ("user", "item", "rating")]
        cut = len(order) - len(order) // 10
        return (6040, 3706), [a[:cut] for a in triples], [a[cut:] for a in triples], "MovieLens-1M"
    n1, n2, count = min(6040, sizes.rows), min(3706, sizes.columns), min(1_000_000, sizes.entries)
    rng = np.random.default_rng(0)
    rows, columns = np.divmod(rng.choice(n1 * n2, count, replace=False), n2)
    p, q = rng.standard_normal((n1, 5)), rng.standard_normal((n2, 5))
    values = 3.5 + 0.3 * np.einsum("ij,ij->i", p[rows], q[columns]) + 0.8 * rng.standard_normal(count)
    cut = count - count // 10
    triples = rows, columns, values
    return (n1, n2), [a[:cut] for a in triples], [a[cut:] for a in triples], f"{count:,} noisy numbers"


def leaks(bench):
    """Bytes of the memory pool after a few fits and after many."""
    operator, y, _ = _small(bench, 3)
    pool, held = bench.cupy.get_default_memory_pool(), []
    for k in range(bench.sizes.fits):
        settings = {"rule": "gd", "max_iter": 20, "device": "cuda", "on_failure": "ignore"}
        fastdmf.solve(operator, y, random_state=k, **settings)
        held.append(pool.total_bytes())
    early = held[min(10, len(held) - 1)]
    bench.add("leaks", f"{bench.sizes.fits} fits", early_bytes=early, late_bytes=held[-1], constant=held[-1] == early)


SECTIONS = {f.__name__: f for f in (ceilings, mask, gaussian, seeded, update, step, sweep, agreement, ratings, leaks)}


def main(argv=None):
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--data", type=Path, help="folder with movielens/")
    parser.add_argument("--tiny", action="store_true", help="sizes at which nothing is measured: does it run?")
    parser.add_argument("--keep", type=Path, metavar="FILE.jsonl", help="file to write the rows to")
    args = parser.parse_args(argv)
    device = cuda_report()
    print(device)
    if find_cuda()[0] is None:
        return 1
    bench, failed = Bench(TINY if args.tiny else Sizes(), args.data), []
    for name in args.only:
        try:
            SECTIONS[name](bench)
        except Exception as error:  # one section that fails must not cost the others' time on a device
            failed.append(f"{name}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
    if args.keep:
        lines = (json.dumps({**row, "device": device, "versions": installed(PACKAGES)}) for row in bench.rows)
        args.keep.write_text("".join(f"{line}\n" for line in lines))
    print()
    for row in bench.rows:
        numbers = (
            f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items() if k not in ("section", "name")
        )
        print(" | ".join((row["section"], row["name"], *numbers)))
    for text in failed:
        print(f"failed: {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
