"""The compiled kernels against the plain loops of ``naive.py``.

An output o of a sum of t terms must satisfy norm(o - reference) <= c eps sqrt(t) norm(reference); c is in ``BOUNDS``.
Outputs and scratch hold NaN before each call, inputs are compared with copies after it.
"""

import hashlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import naive
import numba
import numpy as np
import pytest

from fastdmf.kernels import cpu
from fastdmf.kernels.cpu import entry_index, vectors

KERNELS = Path(vectors.__file__).parent
SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)
# About twice the worst that was seen at AVX2 and at SSE width.
BOUNDS = {"forward": 1, "pull": 0.5, "loss": 0.5, "dense": 2}

# Narrow rows stay in registers, wide ones run over cache lines, on every target.
WIDTHS = [(np.float32, 16), (np.float32, 80), (np.float64, 8), (np.float64, 40)]

# n1, n2, entries, runs, own y for each run, loss, weighted
MASKS = [
    (1, 1, 1, 1, False, SQUARED, False),
    (1, 1, 0, 3, True, SQUARED, True),
    (2, 31, 1, 1, False, HUBER, True),
    (31, 2, 45, 3, True, TRUNCATED, False),
    (33, 257, 700, 3, False, ABSOLUTE, True),
    (257, 33, 900, 1, False, HUBER, False),
    (33, 31, 400, 3, True, SQUARED, True),
    (31, 33, 300, 1, False, TRUNCATED, True),
]
DELTA = 0.7


def aligned(x):
    out = cpu.aligned_empty(x.shape, x.dtype)
    out[...] = x
    return out


def poisoned(*shape, dtype=np.float64):
    return aligned(np.full(shape, np.nan, dtype))


def padded(x):
    return np.pad(np.ascontiguousarray(x), ((0, 0), (0, cpu.PAD)))  # NumPy keeps the order of its input


def close(got, reference, terms, family, dtype):
    got, reference = np.asarray(got, float), np.asarray(reference, float)
    error = np.linalg.norm(got - reference)
    assert error <= BOUNDS[family] * np.finfo(dtype).eps * np.sqrt(terms) * np.linalg.norm(reference)


def targets(prediction, rng):
    """Return y with residuals of both signs on both sides of DELTA and none near a corner of a loss."""
    size = rng.uniform(0.1, 0.6, prediction.shape) + rng.integers(0, 2, prediction.shape) * 0.7
    return prediction - size * rng.choice([-1.0, 1.0], prediction.shape)


class Mask:
    """One random problem, sorted and blocked, with its reference."""

    def __init__(self, dtype, h, n1, n2, nnz, runs, own, code, weighted, integers=False):
        rng = np.random.default_rng([n1, n2, nnz, h])
        # Every third row and every fourth column stays empty where there is room.
        rows = rng.choice([i for i in range(n1) if i % 3 != 1 or n1 < 3], nnz)
        cols = rng.choice([j for j in range(n2) if j % 4 != 2 or n2 < 4], nnz)
        self.indptr, self.indices, self.order = cpu.entry_sort(rows, cols, n1, n2)
        self.rows, self.cols = rows[self.order], cols[self.order]
        self.bptr, self.brows, self.border = cpu.entry_blocks(self.indptr, self.indices, n1, n2, 16)

        def factor(n):
            x = rng.integers(-2, 3, (runs, n, h)) if integers else rng.standard_normal((runs, n, h)) / np.sqrt(h)
            x[..., h - 3 :] = 0  # columns of padding
            return aligned(x.astype(dtype))

        self.dtype, self.h, self.nnz, self.runs, self.code = dtype, h, nnz, runs, code
        self.p, self.qt = factor(n1), factor(n2)
        predictions = [naive.entry_forward(p, qt, self.rows, self.cols) for p, qt in zip(self.p, self.qt)]
        self.predictions = np.array(predictions).reshape(runs, nnz)
        if integers:
            y, self.delta = rng.integers(-3, 4, (runs, nnz)) + self.predictions, 2.0
        elif own:
            y, self.delta = targets(self.predictions, rng), DELTA
        else:
            # One y cannot keep three runs off the corners; the seeds are such that none comes near.
            y, self.delta = targets(self.predictions[:1], rng), DELTA
        self.y = padded(y.astype(dtype))
        weights = rng.integers(0, 4, (1, nnz)) if integers else rng.random((1, nnz))
        self.w = padded(weights.astype(dtype)) if weighted else None
        self.yb = padded(self.y[:, self.border])
        self.wb = padded(self.w[:, self.border]) if weighted else None
        self.cuts = cpu.entry_cuts(self.indptr, 3)
        r = self.predictions - self.y[:, :nnz]
        corner = {HUBER: DELTA, TRUNCATED: DELTA, ABSOLUTE: 0.0}.get(code)
        if corner is not None and not integers and nnz:
            assert np.abs(np.abs(r) - corner).min() > 1e-5
        self.inputs = {
            k: np.copy(x)
            for k, x in vars(self).items()
            if isinstance(x, np.ndarray) and k not in ("predictions", "rows", "cols", "order", "border")
        }

    def outputs(self):
        n1, n2 = self.p.shape[1], self.qt.shape[1]
        return (
            poisoned(self.runs, n1, self.h, dtype=self.dtype),
            poisoned(self.runs, n2, self.h, dtype=self.dtype),
            poisoned(self.runs),
        )

    def copies(self):
        return poisoned(self.runs, 3, self.qt.shape[1], self.h, dtype=self.dtype)

    def evaluate(self, route):
        """Return what a route gives for (gp, gqt, losses)."""
        out = self.outputs()
        head = (*out, self.p, self.qt, self.indptr, self.indices, self.y, self.w)
        if route == "serial":
            cpu.entry_one_pass_serial(*head, self.code, self.delta)
        elif route == "one_pass":
            cpu.entry_one_pass(*head, self.code, self.delta, self.cuts, self.copies())
        else:
            blocks = (self.bptr, self.brows, self.yb, self.wb)
            cpu.entry_two_pass(*head, *blocks, self.code, self.delta, self.cuts)
        return out

    def reference(self):
        runs = []
        for b in range(self.runs):
            w = None if self.w is None else self.w[0]
            y = self.y[b % len(self.y)]
            runs.append(naive.entry_loss(self.p[b], self.qt[b], self.rows, self.cols, y, w, self.code, self.delta))
        losses, gp, gqt = zip(*runs)
        return np.array(gp), np.array(gqt), np.array(losses)

    def unchanged(self):
        for name, before in self.inputs.items():
            np.testing.assert_array_equal(getattr(self, name), before)


def check_route(dtype, h, mask, route):
    problem = Mask(dtype, h, *mask)
    got, expected = problem.evaluate(route), problem.reference()
    for o, e in zip(got, expected):
        close(o, e, h + problem.nnz, "loss", dtype)
        assert (o[..., h - 3 :] == 0).all() or o.ndim == 1
    problem.unchanged()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "h"), WIDTHS)
def test_entry_serial(dtype, h, mask):
    check_route(dtype, h, mask, "serial")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "h"), WIDTHS)
@pytest.mark.parametrize("route", ["one_pass", "two_pass"])
def test_entry_parallel(dtype, h, mask, route):
    check_route(dtype, h, mask, route)


@pytest.mark.parametrize("code", [SQUARED, HUBER, TRUNCATED, ABSOLUTE])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("route", ["serial", "one_pass", "two_pass"])
def test_entry_is_exact_on_integers(code, weighted, route):
    """Corners included: residuals of 0 and of exactly the threshold."""
    problem = Mask(np.float32, 16, 33, 31, 400, 1, True, code, weighted, integers=True)
    r = problem.predictions - problem.y[:, :400]
    assert (r == 0).any() and (np.abs(r) == 2).any()
    for o, e in zip(problem.evaluate(route), problem.reference()):
        np.testing.assert_array_equal(o, e)


@pytest.mark.parametrize(("dtype", "h"), WIDTHS)
@pytest.mark.parametrize("mask", MASKS[1:6])
def test_entry_forward_and_pull(dtype, h, mask):
    problem = Mask(dtype, h, *mask)
    p, qt, nnz, runs = problem.p, problem.qt, problem.nnz, problem.runs
    behind = 5
    for forward in (cpu.entry_forward, cpu.entry_forward_serial):
        out = poisoned(runs, nnz + behind, dtype=dtype)
        flat = out.ravel()
        whole = flat[: runs * nnz].reshape(runs, nnz)
        forward(whole, p, qt, problem.indptr, problem.indices)
        close(whole, problem.predictions, h, "forward", dtype)
        assert np.isnan(flat[runs * nnz :]).all()
    r = padded(np.random.default_rng(3).standard_normal((runs, nnz)).astype(dtype))
    expected = [naive.entry_pull(r[b], p[b], qt[b], problem.rows, problem.cols) for b in range(runs)]
    for parallel in (False, True):
        gp, gqt, _ = problem.outputs()
        head = (gp, gqt, r, p, qt, problem.indptr, problem.indices)
        if parallel:
            cpu.entry_pull(*head, problem.cuts, problem.copies())
        else:
            cpu.entry_pull_serial(*head)
        close(gp, [e[0] for e in expected], nnz, "pull", dtype)
        close(gqt, [e[1] for e in expected], nnz, "pull", dtype)
    problem.unchanged()


def on_threads(count, evaluate):
    before = numba.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        return evaluate()
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("route", ["one_pass", "two_pass"])
def test_bits_do_not_depend_on_threads(route):
    problem = Mask(np.float32, 16, *MASKS[6])
    one, two = (on_threads(t, lambda: problem.evaluate(route)) for t in (1, 2))
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)


def test_nan_reaches_the_loss_of_its_run_only():
    for code in (SQUARED, HUBER, TRUNCATED, ABSOLUTE):
        problem = Mask(np.float32, 16, 33, 31, 400, 3, True, code, True)
        problem.p[1, problem.rows[0]] = np.nan
        losses = problem.evaluate("serial")[2]
        assert np.isnan(losses).tolist() == [False, True, False]


def test_entry_takes_int64_indices():
    problem = Mask(np.float32, 16, *MASKS[6])
    expected = problem.evaluate("serial")
    problem.indices = problem.indices.astype(np.int64)
    for o, e in zip(problem.evaluate("serial"), expected):
        np.testing.assert_array_equal(o, e)


def test_offsets_are_64_bits_wide():
    """Row 2^27 of a factor of width 16 lies 2^31 numbers in; only the pages that are touched exist."""
    n2 = 2**27 + 1
    try:
        qt = np.zeros((1, n2, 16), np.float32)
    except MemoryError:
        pytest.skip("no 8.6 GB of address space")
    qt[0, -1], qt[0, 0] = 3, 100
    p, out = np.ones((1, 1, 16), np.float32), np.zeros((1, 1), np.float32)
    indices = np.zeros(1 + cpu.PAD, np.int32)
    indices[0] = n2 - 1
    cpu.entry_forward_serial(out, p, qt, np.array([0, 1]), indices)
    assert out[0, 0] == 48
    assert entry_index.index_type(2**31 - 1) is np.int32 and entry_index.index_type(2**31) is np.int64


def test_width_that_is_not_padded_is_refused():
    problem = Mask(np.float32, 16, *MASKS[0])
    with pytest.raises(ValueError, match="width 15"):
        cpu.entry_forward(
            np.zeros((1, 1), np.float32),
            problem.p[..., :15].copy(),
            problem.qt[..., :15].copy(),
            problem.indptr,
            problem.indices,
        )


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
@pytest.mark.parametrize(("n1", "n2", "nnz"), [(1, 1, 0), (1, 1, 1), (31, 33, 257), (2, 31, 60)])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("least", [0, 1 << 15])
def test_sorting(kind, n1, n2, nnz, by_row, least, monkeypatch):
    """Compiled, and by NumPy as few entries are."""
    monkeypatch.setattr(entry_index, "_COMPILED", least)
    rng = np.random.default_rng(nnz)
    rows, cols = rng.integers(0, n1, nnz).astype(kind), rng.integers(0, n2, nnz).astype(kind)
    if by_row:
        order = np.lexsort((cols, rows))
        rows, cols = rows[order], cols[order]
    indptr, indices, order = cpu.entry_sort(rows, cols, n1, n2)
    np.testing.assert_array_equal(order, naive.sort_entries(rows, cols))
    np.testing.assert_array_equal(indices, np.append(cols[order], np.zeros(cpu.PAD)))
    np.testing.assert_array_equal(np.diff(indptr), np.bincount(rows, minlength=n1))
    assert (indptr[0], indptr.dtype, indices.dtype) == (0, np.int64, np.int32)
    rows, cols = rows[order], cols[order]
    for block_rows in (1, 7, 64):
        bptr, brows, border = cpu.entry_blocks(indptr, indices, n1, n2, block_rows)
        np.testing.assert_array_equal(border, naive.block_entries(rows, cols, block_rows))
        np.testing.assert_array_equal(brows, np.append(rows[border], np.zeros(cpu.PAD)))
        segments = rows.astype(int) // block_rows * n2 + cols
        np.testing.assert_array_equal(np.diff(bptr), np.bincount(segments, minlength=len(bptr) - 1))
        cuts = cpu.entry_column_cuts(bptr, n2, 5)
        assert cuts[0] == 0 and cuts[-1] == n2 and (np.diff(cuts) >= 0).all() and len(cuts) == 6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n1", "n2", "nnz"), [(1, 1, 0), (1, 1, 1), (31, 33, 257), (2, 31, 60)])
@pytest.mark.parametrize("least", [0, 1 << 15])
def test_order_of_columns(n1, n2, nnz, weighted, dtype, least, monkeypatch):
    monkeypatch.setattr(entry_index, "_COMPILED", least)
    rng = np.random.default_rng(nnz)
    indptr, indices, order = cpu.entry_sort(rng.integers(0, n1, nnz), rng.integers(0, n2, nnz), n1, n2)
    y, w = np.zeros(nnz + cpu.PAD, dtype), np.zeros(nnz + cpu.PAD, dtype)
    y[:nnz], w[:nnz] = rng.standard_normal(nnz), rng.random(nnz)
    rows = np.repeat(np.arange(n1), np.diff(indptr))
    expected = naive.block_entries(rows, indices[:nnz], n1)
    colptr, found, yc, wc = cpu.entry_columns(indptr, indices, y, w if weighted else None, n2)
    np.testing.assert_array_equal(np.diff(colptr), np.bincount(indices[:nnz], minlength=n2))
    np.testing.assert_array_equal(found, np.append(rows[expected], np.zeros(cpu.PAD)))
    np.testing.assert_array_equal(yc, np.append(y[expected], np.zeros(cpu.PAD)))
    assert (wc is None) if not weighted else np.array_equal(wc, np.append(w[expected], np.zeros(cpu.PAD)))
    assert (colptr[0], colptr.dtype, found.dtype, yc.dtype) == (0, np.int64, np.int32, dtype)


def test_cuts_share_the_entries():
    counts = np.random.default_rng(0).integers(0, 9, 1000)
    indptr = np.append(0, np.cumsum(counts))
    cuts = cpu.entry_cuts(indptr, 8)
    shares = np.diff(indptr[cuts])
    assert np.abs(shares - indptr[-1] / 8).max() <= 9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_routes_follow_the_work(dtype):
    def route(*args):
        return cpu.entry_route(*args, dtype)[0]

    assert route(100, 100, 2000, 20, 1) == "one_pass_serial"
    assert route(100, 100, 10_000, 100, 1) == "dense"
    assert route(138_000, 27_000, 5_000_000, 16, 1) == "one_pass"
    # Copies of a long thin factor would cost more than the second pass.
    assert route(100_000, 3_000_000, 2_000_000, 16, 1) == "two_pass"
    for batch in (1, 3, 64):
        kind, ranges = cpu.entry_route(138_000, 27_000, 5_000_000, 16, batch, dtype)
        assert kind == "one_pass" and 1 <= ranges <= 8 and ranges * batch >= 2


# Dense masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("code", "weighted"), [(SQUARED, True), (HUBER, False), (TRUNCATED, True), (ABSOLUTE, True)])
@pytest.mark.parametrize(("n1", "n2", "runs"), [(1, 1, 1), (2, 33, 3), (257, 33, 1)])
def test_dense_residual(dtype, code, weighted, n1, n2, runs):
    rng = np.random.default_rng(n1)
    products = rng.standard_normal((runs, n1, n2)).astype(dtype)
    y = targets(products[:1].astype(float), rng).astype(dtype)
    w = rng.random((runs, n1, n2)).astype(dtype) * rng.integers(0, 2, (runs, n1, n2)).astype(dtype)
    inputs = [x.copy() for x in (y, w)]
    for residual in (cpu.dense_residual, cpu.dense_residual_serial):
        g, losses = products.copy(), poisoned(runs)
        residual(g, losses, y, w if weighted else None, code, DELTA)
        for b in range(runs):
            weights = w[b].ravel() if weighted else None
            loss, pulls = naive.losses_and_pulls(products[b].ravel(), y[0].ravel(), weights, code, DELTA)
            close(losses[b], loss, n1 * n2, "dense", dtype)
            close(g[b].ravel(), pulls, 4, "dense", dtype)
    for x, before in zip((y, w), inputs):
        np.testing.assert_array_equal(x, before)


# What holds the family together --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.stem for path in sorted(KERNELS.glob("*.py"))])
def test_kernel_files_name_what_they_were_compiled_with(name):
    """Numba's disk cache watches the kernel's own file: an edit of a file it compiles must be an edit there."""
    module = importlib.import_module(f"fastdmf.kernels.cpu.{name}")
    compiled = set(re.findall(r"^from fastdmf\.kernels\.cpu\.(\w+) import", (KERNELS / f"{name}.py").read_text(), re.M))
    # The indices' helpers are called from Python alone, and updates have nothing compiled.
    compiled = set() if name in ("__init__", "update") else compiled - {"entry_index"}
    digests = {k: hashlib.sha256((KERNELS / f"{k}.py").read_bytes()).hexdigest()[:12] for k in compiled}
    assert getattr(module, "BUILT_ON", {}) == digests


def test_aligned_empty():
    for shape in ((1,), (3, 5, 16)):
        x = cpu.aligned_empty(shape, np.float32)
        assert x.shape == shape and x.ctypes.data % 64 == 0 and x.flags.c_contiguous and x.flags.writeable


@pytest.mark.parametrize(("size", "features"), [(16, ""), (32, "+avx,+avx2,+fma"), (64, None)])
def test_other_widths(size, features):
    """The same oracle on the vectors of other machines, in a process and a cache of its own.

    Narrower ones through the target's features; wider ones are forced, and LLVM splits them.
    """
    if size == vectors.VECTOR_BYTES:
        pytest.skip(f"{size} bytes are what this process runs at")
    here = Path(__file__).resolve().parent
    if features is None:
        target = {"FASTDMF_VECTOR_BYTES": str(size)}
    else:
        target = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    env = {**os.environ, **target, "NUMBA_CACHE_DIR": str(here / "__pycache__" / f"numba-{size}")}
    chosen = ["test_vectors.py", "test_kernels.py", "test_gaussian.py"]
    only = "lane_by_lane or sums_over or loads_stores or halves or entry_serial or fused_and_halves"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", only]
    done = subprocess.run([*command, *(str(here / name) for name in chosen)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
