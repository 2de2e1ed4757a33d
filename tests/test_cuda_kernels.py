"""The CUDA kernels, run on the CPU by the emulator, against the plain loops of ``naive.py``, and compiled for GPUs.

An output o of a sum of t terms must satisfy norm(o - reference) <= c eps sqrt(t) norm(reference); c is in ``BOUNDS``.
Outputs and scratch hold NaN before each call; the emulator sees that inputs stay as they are and that nothing is read
or written outside of an array. Threads take turns in three orders, and the bits must not depend on it.
"""

import dataclasses
import functools
import subprocess
import sys
import tomllib
from pathlib import Path

import naive
import numpy as np
import pytest
from cuda_device import ON_DEVICE
from cuda_emulator import ORDERS, EmulationError, Module
from cuda_launches import Ordered, compiled, emulated, in_every_order, nan, summing, sums
from test_cuda_small_chain import Chains

from fastdmf.kernels import cpu, cuda
from fastdmf.kernels.cuda import dense, entry, gaussian, lbfgs, measurements, row_solve, seeded, slices, update

ROOT = Path(__file__).resolve().parent.parent
SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)
DELTA = 0.7
# About twice the worst that was seen.
BOUNDS = {"forward": 0.5, "pull": 0.6, "loss": 1.6}


def close(got, reference, terms, family, dtype):
    got, reference = np.asarray(got, float), np.asarray(reference, float)
    error = np.linalg.norm(got - reference)
    assert error <= BOUNDS[family] * np.finfo(dtype).eps * np.sqrt(terms) * np.linalg.norm(reference)


def targets(prediction, rng):
    """Return y with residuals of both signs on both sides of DELTA and none near a corner of a loss."""
    size = rng.uniform(0.1, 0.6, prediction.shape) + rng.integers(0, 2, prediction.shape) * 0.7
    return prediction - size * rng.choice([-1.0, 1.0], prediction.shape)


def to_bfloat16(x):
    """Return the nearest numbers with eight bits of precision, and their bits."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16
    return bits.view(np.float32), (bits >> 16).astype(np.uint16)


# Slices --------------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("runs", "size"), [(1, 1), (3, 2), (2, 31), (1, 33), (2, 257), (3, 4100), (1, 12_300)])
def test_steps_and_inner_products(dtype, runs, size):
    rng = np.random.default_rng(size)
    x, d = (rng.standard_normal((runs, size)).astype(dtype) for _ in range(2))
    steps = rng.standard_normal(runs)
    module = compiled("slices", *slices.slices_options(dtype))

    def evaluate(order):
        out, inner, total, place = nan(runs, size, dtype=dtype), nan(runs), nan(runs), x.copy()
        ordered = Ordered(module, order)
        slices.slices_move(ordered, out, x, steps, d)
        slices.slices_move(ordered, place, place, steps, d)
        np.testing.assert_array_equal(place, out)
        slices.slices_dot(ordered, inner, x, d, *summing(runs, size))
        slices.slices_sum(ordered, total, x.astype(float), *summing(runs, size))
        return out, inner, total

    moved, inner, total = in_every_order(evaluate)
    eps, expected = np.finfo(dtype).eps, x + steps[:, None] * d.astype(float)
    assert (np.abs(moved - expected) <= 2 * eps * (np.abs(x) + np.abs(expected))).all()
    products = x.astype(float) * d
    for got, terms in ((inner, products), (total, x.astype(float))):
        bound = 2 * np.finfo(float).eps * np.sqrt(size) * np.abs(terms).sum(axis=1)
        assert (np.abs(got - terms.sum(axis=1)) <= bound).all()


@emulated
def test_long_sums_take_several_rounds():
    x = np.random.default_rng(0).integers(-3, 4, (1, 4096**2 // 16 + 5)).astype(float)
    shapes = slices.slices_scratch_shapes(1, x.size)
    assert shapes == [(1, 257)] and slices.slices_scratch_shapes(2, 4096**2 + 1) == [(2, 4097), (2, 2)]
    assert slices.slices_scratch_shapes(3, 4096) == slices.slices_scratch_shapes(3, 0) == []
    out = nan(1)
    slices.slices_sum(sums("forward"), out, x, *summing(1, x.size))
    assert out[0] == x.sum()
    empty = nan(3)
    slices.slices_sum(sums("forward"), empty, np.zeros((3, 0)))
    assert (empty == 0).all()


# Entry masks ---------------------------------------------------------------------------------------------------

# n1, n2, entries, runs, own y for each run, loss, weighted. One y for several runs goes with a psi without steps.
MASKS = [
    (1, 1, 1, 1, False, SQUARED, False),
    (1, 1, 0, 3, True, SQUARED, True),
    (2, 31, 1, 1, False, HUBER, True),
    (31, 2, 45, 3, True, TRUNCATED, False),
    (33, 257, 700, 3, False, HUBER, True),
    (257, 33, 900, 1, False, ABSOLUTE, False),
    (33, 31, 400, 3, True, SQUARED, True),
    (31, 33, 300, 1, False, TRUNCATED, True),
]

# Widths that are whole vectors and those that are not, of one lane to two vectors of a warp; several kinds of storage.
WIDTHS = [
    *((np.float32, h, None, np.int32) for h in (1, 3, 4, 16, 22, 48, 128, 255, 256)),
    *((np.float64, h, None, np.int32) for h in (1, 8, 40, 256)),
    *((np.float32, h, "bfloat16", np.int32) for h in (2, 16, 80)),
    (np.float32, 16, None, np.int64),
]


class Mask:
    """One random problem with its reference, as the device would hold it."""

    def __init__(self, dtype, h, stored, index, n1, n2, nnz, runs, own, code, weighted, *, longest=20, integers=False):
        rng = np.random.default_rng([n1, n2, nnz, h])
        # Every third row and every fourth column stays empty where there is room; row 0 has more than its share.
        some = [i for i in range(n1) if i % 3 != 1 or n1 < 3]
        rows = np.where(rng.random(nnz) < 0.2, 0, rng.choice(some, nnz))
        cols = rng.choice([j for j in range(n2) if j % 4 != 2 or n2 < 4], nnz)
        indptr, indices, order = cpu.entry_sort(rows, cols, n1, n2)
        self.entry_rows, self.entry_cols = rows[order], cols[order]

        def factor(n):
            x = rng.integers(-2, 3, (runs, n, h)) if integers else rng.standard_normal((runs, n, h)) / np.sqrt(h)
            return to_bfloat16(x) if stored else (x.astype(dtype),) * 2

        (self.p, self.p_stored), (self.qt, self.qt_stored) = factor(n1), factor(n2)
        predictions = [naive.entry_forward(*pair, self.entry_rows, self.entry_cols) for pair in zip(self.p, self.qt)]
        self.predictions = np.array(predictions).reshape(runs, nnz)
        if integers:
            y, self.delta = rng.integers(-3, 4, (runs, nnz)) + self.predictions, 2.0
        else:
            y, self.delta = targets(self.predictions if own else self.predictions[:1], rng), DELTA
        self.y = y.astype(dtype)
        weights = rng.integers(0, 4, (1, nnz)) if integers else rng.random((1, nnz))
        self.w = weights.astype(dtype) if weighted else None
        self.dtype, self.h, self.nnz, self.runs, self.code = dtype, h, nnz, runs, code
        colptr, of_column, *_ = cpu.entry_columns(indptr, indices, np.zeros(nnz + cpu.PAD), None, n2)
        self.by_column = np.lexsort((self.entry_rows, self.entry_cols))
        self.rows = entry.EntrySide.of(indptr, indices[:nnz].astype(index), longest=longest)
        self.columns = entry.EntrySide.of(colptr, of_column[:nnz].astype(index), longest=longest)
        self.parts = nan(runs, max(self.rows.pieces, self.columns.pieces, 1), h, dtype=dtype)
        self.module = compiled("entry", *entry.entry_options(h, dtype, stored=stored, index=index))

    def outputs(self):
        shapes = self.p.shape, self.qt.shape
        return [nan(*shape, dtype=self.dtype) for shape in shapes], nan(self.runs)

    def evaluate(self, order):
        (gp, gqt), losses = self.outputs()
        items = len(self.rows.row)
        yc, wc = (None if v is None else np.ascontiguousarray(v[:, self.by_column]) for v in (self.y, self.w))
        self.parts[:] = np.nan
        entry.entry_loss_pull(
            *(Ordered(self.module, order), sums(order), gp, gqt, losses, self.p_stored, self.qt_stored),
            *(self.rows, self.y, self.w, self.columns, yc, wc, self.code, self.delta),
            *(self.parts, (nan(self.runs, items), *summing(self.runs, items))),
        )
        return gp, gqt, losses

    def reference(self):
        runs = []
        for b in range(self.runs):
            w = None if self.w is None else self.w[0]
            data = self.entry_rows, self.entry_cols, self.y[b % len(self.y)], w
            runs.append(naive.entry_loss(self.p[b], self.qt[b], *data, self.code, self.delta))
        losses, gp, gqt = zip(*runs)
        return np.array(gp), np.array(gqt), np.array(losses)


@emulated
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "h", "stored", "index"), WIDTHS)
def test_entry_loss_pull(dtype, h, stored, index, mask):
    problem = Mask(dtype, h, stored, index, *mask)
    for got, expected in zip(in_every_order(problem.evaluate), problem.reference()):
        close(got, expected, h + problem.nnz, "loss", dtype)


@emulated
@pytest.mark.parametrize("mask", MASKS[1:6])
@pytest.mark.parametrize(("dtype", "h", "stored", "index"), WIDTHS[::3])
def test_entry_halves(dtype, h, stored, index, mask):
    problem = Mask(dtype, h, stored, index, *mask)
    r = np.random.default_rng(3).standard_normal((problem.runs, problem.nnz)).astype(dtype)
    by_column = np.ascontiguousarray(r[:, problem.by_column])

    def evaluate(order):
        (gp, gqt), _ = problem.outputs()
        out, module = nan(*r.shape, dtype=dtype), Ordered(problem.module, order)
        entry.entry_forward(module, out, problem.p_stored, problem.qt_stored, problem.rows)
        for g, values, q, side in (
            (gp, r, problem.qt_stored, problem.rows),
            (gqt, by_column, problem.p_stored, problem.columns),
        ):
            problem.parts[:] = np.nan
            entry.entry_pull(module, g, values, q, side, problem.parts)
        return out, gp, gqt

    out, gp, gqt = in_every_order(evaluate)
    close(out, problem.predictions, h, "forward", dtype)
    pairs = zip(r, problem.p, problem.qt)
    expected = [naive.entry_pull(*pair, problem.entry_rows, problem.entry_cols) for pair in pairs]
    close(gp, [e[0] for e in expected], problem.nnz, "pull", dtype)
    close(gqt, [e[1] for e in expected], problem.nnz, "pull", dtype)


@emulated
@pytest.mark.parametrize("code", [SQUARED, HUBER, TRUNCATED, ABSOLUTE])
@pytest.mark.parametrize("weighted", [False, True])
def test_entry_is_exact_on_integers(code, weighted):
    """Corners included: residuals of 0 and of exactly the threshold."""
    problem = Mask(np.float32, 16, None, np.int32, 33, 31, 400, 1, True, code, weighted, integers=True)
    r = problem.predictions - problem.y
    assert (r == 0).any() and (np.abs(r) == 2).any()
    for got, expected in zip(problem.evaluate("random"), problem.reference()):
        np.testing.assert_array_equal(got, expected)


def test_items_cover_the_entries():
    indptr = np.array([0, 3, 3, 24, 44, 45])
    side = entry.EntrySide.of(indptr, np.zeros(45, np.int64), longest=10)
    assert side.begin.tolist() == [0, 3, 3, 13, 23, 24, 34, 44, 45] and side.row.tolist() == [0, 1, 2, 2, 2, 3, 3, 4]
    assert side.slot.tolist() == [-1, -1, 0, 1, 2, 3, 4, -1] and side.cut.tolist() == [2, 3]
    assert side.first.tolist() == [0, 3, 5] and side.pieces == 5
    kinds = [getattr(side, name).dtype.name for name in ("begin", "row", "slot", "cut", "first")]
    assert kinds == ["int64", "int64", "int32", "int64", "int32"]
    empty = entry.EntrySide.of(np.zeros(3, np.int64), np.zeros(0, np.int32))
    assert empty.begin.tolist() == [0, 0, 0] and empty.pieces == 0 and empty.first.tolist() == [0]


@emulated
def test_entry_bits_depend_on_the_items_alone():
    """Another grid and other blocks give the same; other pieces need not."""
    problem = Mask(np.float32, 48, None, np.int32, *MASKS[4])

    class Narrow(Ordered):
        def launch(self, kernel, grid, block, arguments, *, shared=0):
            super().launch(kernel, (2, *grid[1:]), (64,), arguments, shared=shared)

    results = []
    for module in (Ordered(problem.module, "forward"), Narrow(problem.module, "forward")):
        (gp, gqt), _ = problem.outputs()
        item_losses = nan(problem.runs, len(problem.rows.row))
        entry._side(
            *(module, gp, problem.parts, item_losses, problem.p, problem.qt, problem.rows),
            *(problem.y, problem.w, problem.code, problem.delta),
        )
        results.append((gp, item_losses))
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)
    assert not np.isnan(results[0][0]).any()


@emulated
def test_offsets_are_64_bits_wide():
    """Row 2^27 of a factor of width 16 lies 2^31 numbers in; only the pages that are touched exist."""
    n2 = 2**27 + 1
    try:
        qt = np.zeros((1, n2, 16), np.float32)
    except MemoryError:
        pytest.skip("no 8.6 GB of address space")
    qt[0, -1], qt[0, 0] = 3, 100
    p, out, g = np.ones((1, 1, 16), np.float32), nan(1, 1, dtype=np.float32), nan(1, 1, 16, dtype=np.float32)
    side = entry.EntrySide.of(np.array([0, 1]), np.array([n2 - 1], np.int32))
    module = compiled("entry", *entry.entry_options(16, np.float32))
    entry.entry_forward(module, out, p, qt, side)
    assert out[0, 0] == 48
    entry.entry_pull(module, g, np.full((1, 1), 2, np.float32), qt, side, None)
    assert (g == 6).all()


@emulated
def test_nan_reaches_the_loss_of_its_run_only():
    for code in (SQUARED, HUBER, TRUNCATED, ABSOLUTE):
        problem = Mask(np.float32, 16, None, np.int32, 33, 31, 400, 3, True, code, True)
        problem.p[1, problem.entry_rows[0]] = np.nan
        losses = problem.evaluate("forward")[2]
        assert np.isnan(losses).tolist() == [False, True, False]


# Measurements --------------------------------------------------------------------------------------------------

# m, columns, runs, own y, loss, weighted
MEASUREMENTS = [
    (0, 5, 2, True, SQUARED, True),
    (1, 1, 1, False, SQUARED, False),
    (2, 33, 3, True, HUBER, True),
    (33, 258, 5, False, HUBER, False),
    (257, 32, 1, False, ABSOLUTE, True),
    (31, 2, 4, True, TRUNCATED, True),
    (9, 2_600, 1, True, SQUARED, False),
]
MEASURED = 4.5  # the bound of measurements, also about twice the worst that was seen: a residual may cancel


class Measurements:
    """One random problem: A as it is stored and as it is meant, x, y, w, given numbers, and the reference."""

    def __init__(self, a, dtype, runs, own, code, weighted, stored=None):
        self.m, self.d = a.shape
        rng = np.random.default_rng(a.shape)
        self.dtype, self.runs, self.code = dtype, runs, code
        self.a, self.stored = a, a if stored is None else stored
        self.x = (rng.standard_normal((runs, self.d)) / np.sqrt(self.d)).astype(dtype)
        self.products = self.x.astype(float) @ a.T.astype(float)
        self.y = targets(self.products if own else self.products[:1], rng).astype(dtype)
        self.w = rng.random((1, self.m)).astype(dtype) if weighted else None
        self.r = rng.standard_normal((runs, self.m)).astype(dtype)

    def scratch(self, plan):
        partial = nan(plan.ranges, self.runs, self.d, dtype=self.dtype)
        return partial, (nan(self.runs, self.m), *summing(self.runs, self.m))

    def outputs(self):
        shapes = (self.runs, self.d), (self.runs, self.d), (self.runs, self.m)
        return [nan(*shape, dtype=self.dtype) for shape in shapes], nan(self.runs)

    def check(self, g, back, out, losses):
        def near(got, reference, terms, size=0.0):
            error, size = np.linalg.norm(np.asarray(got, float) - reference), max(np.linalg.norm(reference), size)
            assert error <= MEASURED * np.finfo(self.dtype).eps * np.sqrt(terms) * size

        for b in range(self.runs):
            w = None if self.w is None else self.w[0]
            loss, pull = naive.gaussian_loss_pull(self.a, self.x[b], self.y[b % len(self.y)], w, self.code, DELTA)
            near(losses[b], loss, self.m + self.d)
            near(g[b], pull, self.m + self.d)
        # A single product may cancel to less than its terms.
        squares = self.x.astype(float) ** 2 @ self.a.T.astype(float) ** 2
        near(out, self.products, self.d, np.sqrt(squares.sum()))
        near(back, self.r.astype(float) @ self.a.astype(float), self.m)


def windowed(plan, d, rows=5):
    """Return a plan that cuts rows into windows of one warp, and takes a few rows at a time."""
    return dataclasses.replace(plan, threads=32, per=1, windows=-(-d // (32 * plan.pack)), rows=rows)


def run_dense(problem, plan, order, stored=None):
    module = Ordered(compiled("gaussian", *plan.options(problem.dtype, stored)), order)
    (g, back, out), losses = problem.outputs()
    partial, terms = problem.scratch(plan)
    runs, dtype = problem.runs, problem.dtype
    batch = nan(plan.windows, runs, plan.rows, dtype=dtype), nan(runs, plan.rows, dtype=dtype)
    data = problem.stored, problem.x, problem.y, problem.w, problem.code, DELTA
    gaussian.gaussian_loss_pull(module, sums(order), plan, g, losses, *data, partial, terms, batch)
    parts = nan(plan.windows, runs, problem.m, dtype=dtype)
    gaussian.gaussian_forward(module, plan, out, problem.stored, problem.x, parts)
    partial[:] = np.nan
    gaussian.gaussian_pull(module, plan, back, problem.stored, problem.r, partial)
    return g, back, out, losses


@emulated
@pytest.mark.parametrize(
    ("dtype", "stored", "wide"),
    [(np.float32, None, False), (np.float32, None, True), (np.float64, None, True), (np.float32, "float16", False)],
)
@pytest.mark.parametrize(("m", "d", "runs", "own", "code", "weighted"), MEASUREMENTS)
def test_gaussian(dtype, stored, m, d, runs, own, code, weighted, wide):
    a = np.random.default_rng([m, d]).standard_normal((m, d)).astype(stored or dtype)
    bits = a.view(np.uint16) if stored else a
    problem = Measurements(a.astype(dtype), dtype, runs, own, code, weighted, bits)
    plan = measurements.plan_measurements(m, d, runs, dtype)
    assert plan.windows == 1 and plan.threads * plan.per * plan.pack >= d
    if wide:
        plan = windowed(plan, d)
    problem.check(*in_every_order(lambda order: run_dense(problem, plan, order, stored)))


@emulated
def test_float16_is_read_exactly():
    """Every finite number: as many measurements of one column."""
    a = np.arange(2**16, dtype=np.uint16)
    a = a[np.isfinite(a.view(np.float16))][:, None]
    plan = measurements.plan_measurements(*a.shape, 1, np.float32)
    out = nan(1, len(a), dtype=np.float32)
    module = compiled("gaussian", *plan.options(np.float32, "float16"))
    gaussian.gaussian_forward(Ordered(module, "forward"), plan, out, a, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(out[0], a[:, 0].view(np.float16).astype(np.float32))


def test_plans_fit_the_registers():
    """Words for x, g and two rows stay below the limit, and every column has its place."""
    for dtype in (np.float32, np.float64):
        for d in (1, 3, 900, 901, 10_000, 10_240, 10_244, 90_000, 10**6):
            for runs in (1, 2, 3, 7, 100):
                plan = measurements.plan_measurements(5_000, d, runs, dtype)
                numbers = plan.per * plan.pack * (2 * plan.tile + 2) + 4 * plan.tile
                assert (
                    numbers * np.dtype(dtype).itemsize <= 4 * 88
                    and plan.per >= 1
                    and plan.threads % 32 == 0
                    and plan.threads <= 512
                )
                covered = plan.windows * plan.threads * plan.per * plan.pack
                assert d <= covered and d % plan.pack == 0 and plan.tile <= max(runs, 1)
                assert plan.grid(runs) == (264, -(-runs // plan.tile), plan.windows)
    assert measurements.plan_measurements(5_000, 10_000, 1, np.float32).windows == 1
    assert measurements.plan_measurements(5_000, 10_000, 1, np.float64).windows > 1
    assert measurements.plan_measurements(0, 4, 1, np.float32).ranges == 1


# Seeded measurements -------------------------------------------------------------------------------------------

SEED, PROBLEM, TOP = 0x299F31D0A4093822, 7, 2**32 - 1


def drawn(rows, columns, ensemble, seed=SEED, problem=PROBLEM):
    """What the kernels of the CPU draw."""
    out = nan(len(rows), columns, dtype=np.float32)
    scratch = cpu.seeded_scratch(1, cpu.seeded_width(columns), ensemble)
    cpu.seeded_entries(out, np.array(rows, np.uint32), cpu.seeded_stream(seed, problem), scratch)
    return out


@emulated
@pytest.mark.parametrize("ensemble", ["gaussian", "rademacher"])
@pytest.mark.parametrize("seed", [0, SEED, 2**64 - 1])
def test_seeded_entries_are_those_of_the_cpu(ensemble, seed):
    """Bit for bit, for any rows, columns, seed and problem; and against rational arithmetic."""
    rows, columns = np.array([TOP, 0, 5, 6], np.uint32), 1_300
    plan = measurements.plan_measurements(4, columns, 1, np.float32, pack=4)
    module = Ordered(compiled("seeded", *seeded.seeded_options(plan, np.float32, ensemble)), "random")
    for problem in (0, TOP):
        out = nan(4, columns, dtype=np.float32)
        seeded.seeded_entries(module, out, rows, cpu.seeded_stream(seed, problem))
        expected = drawn(rows, columns, ensemble, seed, problem)
        np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))
        np.testing.assert_array_equal(out[0, :40], naive.seeded_entries(seed, problem, TOP, 40, ensemble))


@emulated
def test_many_seeded_samples_are_those_of_the_cpu():
    """Half a million, which go through every exponent of the logarithm down to 2^-17 and all quarters of the angle."""
    rows, columns = np.arange(8, dtype=np.uint32), 65_536
    plan = measurements.plan_measurements(8, 4, 1, np.float32, pack=4)
    module = Ordered(compiled("seeded", *seeded.seeded_options(plan, np.float32, "gaussian")), "forward")
    out = nan(8, columns, dtype=np.float32)
    seeded.seeded_entries(module, out, rows, cpu.seeded_stream(SEED, PROBLEM))
    assert np.abs(out).max() > 4.5
    np.testing.assert_array_equal(out.view(np.uint32), drawn(rows, columns, "gaussian").view(np.uint32))


@emulated
@pytest.mark.parametrize(  # every value of each with every value of another
    ("dtype", "ensemble", "wide"),
    [
        (np.float32, "gaussian", False),
        (np.float64, "gaussian", True),
        (np.float32, "rademacher", True),
        (np.float64, "rademacher", False),
    ],
)
@pytest.mark.parametrize(("m", "d", "runs", "own", "code", "weighted"), MEASUREMENTS)
def test_seeded(ensemble, dtype, m, d, runs, own, code, weighted, wide):
    d = -(-d // 4) * 4
    rows = np.random.default_rng(m).integers(0, 2**32, m, dtype=np.uint32)
    problem = Measurements(drawn(rows, d, ensemble).astype(dtype), dtype, runs, own, code, weighted)
    plan, stream = measurements.plan_measurements(m, d, runs, dtype, pack=4), cpu.seeded_stream(SEED, PROBLEM)
    if wide:
        plan = windowed(plan, d)
    module = compiled("seeded", *seeded.seeded_options(plan, dtype, ensemble))

    def evaluate(order):
        (g, back, out), losses = problem.outputs()
        partial, terms = problem.scratch(plan)
        ordered = Ordered(module, order)
        data = problem.x, problem.y, problem.w, code, DELTA, rows, stream
        if not wide:
            seeded.seeded_loss_pull(ordered, sums(order), plan, g, losses, *data, partial, terms)
        parts = nan(plan.windows, runs, m, dtype=dtype)
        seeded.seeded_forward(ordered, plan, out, problem.x, rows, stream, parts)
        partial[:] = np.nan
        seeded.seeded_adjoint(ordered, plan, back, problem.r, rows, stream, partial)
        if wide:  # rows that do not fit are drawn for the dense kernels
            a = nan(m, d, dtype=np.float32)
            if m:
                seeded.seeded_entries(ordered, a, rows, stream)
            problem.stored = a.astype(dtype)
            g, _, _, losses = run_dense(problem, plan, order)
        return g, back, out, losses

    problem.check(*in_every_order(evaluate))


# Regressions of rows -------------------------------------------------------------------------------------------


class Rows:
    """One random problem: two columns are not free where there are more, some rows are empty, row 0 is long."""

    def __init__(self, n1, n2, nnz, h, dtype, *, stored=None, weighted=True, centred=True, long=40):
        rng = np.random.default_rng([n1, n2, h])
        first = rng.choice(n2, min(n2, -(-nnz // 3)), replace=False)
        others = n2 + rng.choice((n1 - 1) * n2, min(nnz - len(first), (n1 - 1) * n2), replace=False)
        self.rows, self.cols = np.divmod(np.sort(np.concatenate((first, others))), n2)
        self.indptr = np.append(0, np.cumsum(np.bincount(self.rows, minlength=n1)))
        self.indices, size = self.cols.astype(np.int32), len(self.rows)
        self.dtype = dtype
        self.a, self.b = (rng.standard_normal((n, h)).astype(dtype) for n in (n1, n2))
        self.b, self.b_stored = to_bfloat16(self.b) if stored else (self.b, self.b)
        self.mean = rng.standard_normal((n1, h)).astype(dtype) if centred else None
        self.y = rng.standard_normal(size).astype(dtype)
        self.w = rng.uniform(0, 2, size).astype(dtype) if weighted else None
        self.scale = rng.uniform(0.5, 2, n1).astype(dtype)
        self.scaled_ridge, self.ridge = (rng.uniform(0.1, 1, h).astype(dtype) for _ in range(2))
        self.moment = rng.uniform(0.5, 2, h).astype(dtype)
        self.free = np.ones(h, dtype)
        if h > 3:
            self.free[[0, 2]] = 0
        self.lists = row_solve.row_solve_lists(self.indptr, np.int32, long)
        self.module = compiled("row_solve", *row_solve.row_solve_options(h, dtype, stored=stored))

    def solve(self, order, steps, tol):
        a, total, n1 = self.a.copy(), nan(1), len(self.a)
        row_solve.row_solve(
            *(Ordered(self.module, order), sums(order), total, a, self.b_stored, self.mean, self.indptr, self.lists),
            *(self.indices, self.y, self.w, self.scale, self.scaled_ridge, self.ridge, self.moment, self.free),
            *(steps, tol, (nan(1, n1), *summing(1, n1))),
        )
        return a, total

    def reference(self, steps, tol):
        mean = np.zeros_like(self.a) if self.mean is None else self.mean
        w = np.ones_like(self.y) if self.w is None else self.w
        vectors = (x.astype(float) for x in (self.scale, self.scaled_ridge, self.ridge, self.moment, self.free))
        return naive.row_solve(self.a, self.b, mean, self.rows, self.cols, self.y, w, *vectors, steps, tol)


@emulated
@pytest.mark.parametrize(
    ("dtype", "h", "stored"),
    [
        *((np.float32, h, None) for h in (1, 16, 22, 256)),
        *((np.float64, h, None) for h in (8, 40)),
        (np.float32, 16, "bfloat16"),
    ],
)
@pytest.mark.parametrize(("n1", "n2", "nnz"), [(1, 1, 1), (1, 1, 0), (2, 31, 9), (31, 2, 40), (33, 257, 400)])
def test_row_solve(dtype, h, stored, n1, n2, nnz):
    for weighted, centred, steps, tol in ((True, True, 3, 0.01), (False, False, 1, 0.1), (True, False, 2, 0.9)):
        problem = Rows(n1, n2, nnz, h, dtype, stored=stored, weighted=weighted, centred=centred)
        assert (len(problem.lists[1]) > 0) == (nnz > 100)
        expected, loss = problem.reference(steps, tol)
        a, total = in_every_order(lambda order: problem.solve(order, steps, tol))  # noqa: B023
        # Whether a row that is close to the tolerance takes one step more is a matter of rounding.
        bound = 2e-4 if dtype == np.float32 else 1e-12
        off = np.abs(a - expected).max(axis=1) > bound * np.abs(expected).max()
        assert off.mean() <= 0.02
        # Terms: of each prediction, and of the sum.
        assert abs(total[0] - loss) <= 4 * np.finfo(dtype).eps * np.sqrt(h + nnz) * loss
        np.testing.assert_array_equal(a[:, problem.free == 0], problem.a[:, problem.free == 0])


@emulated
def test_row_solve_on_one_warp_and_on_many():
    """A row's length decides, so both must give the regression itself when they may take many steps."""
    for long in (0, 10**6):
        problem = Rows(5, 60, 90, 16, np.float64, long=long)
        assert [len(rows) for rows in problem.lists] == [0, 5] if long == 0 else [5, 0]
        a, _ = problem.solve("random", 100, 0.0)
        free, fixed = problem.free == 1, problem.free == 0
        for i in range(5):
            at = problem.rows == i
            bi, w = problem.b[problem.cols[at]], problem.w[at]
            left = problem.y[at] - bi[:, fixed] @ problem.a[i, fixed]
            shrink = (problem.scale[i] * problem.scaled_ridge + problem.ridge)[free]
            gram = (bi[:, free] * w[:, None]).T @ bi[:, free] + np.diag(shrink)
            exact = np.linalg.solve(gram, bi[:, free].T @ (w * left) + shrink * problem.mean[i, free])
            np.testing.assert_allclose(a[i, free], exact, atol=1e-10)


@emulated
@pytest.mark.parametrize("long", [0, 10**6])
def test_row_solve_nan_stays_in_its_row(long):
    problem, clean = (Rows(9, 60, 120, 16, np.float32, long=long) for _ in range(2))
    problem.y[np.flatnonzero(problem.rows == 5)[0]] = np.nan
    a, total = problem.solve("forward", 3, 0.1)
    expected, _ = clean.solve("forward", 3, 0.1)
    others = np.arange(9) != 5
    assert np.isnan(total[0])
    np.testing.assert_array_equal(a[others], expected[others])


@emulated
def test_row_solve_without_entries_and_ridge_stays():
    problem = Rows(2, 31, 0, 16, np.float64)
    problem.ridge[:] = problem.scaled_ridge[:] = 0
    a, total = problem.solve("forward", 3, 0.1)
    assert total[0] == 0
    np.testing.assert_array_equal(a, problem.a)


# What holds the families together -----------------------------------------------------------------------------


@functools.cache
def one_of_each():
    """Return family -> (options of the compiler, a run in one order that returns its outputs)."""
    regressions = Rows(9, 60, 200, 16, np.float64, long=5)
    a = np.random.default_rng(0).standard_normal((9, 260)).astype(np.float32)
    dense_problem = Measurements(a, np.float32, 2, True, HUBER, True)
    plan = measurements.plan_measurements(9, 260, 2, np.float32)
    x = np.arange(600.0)[None]
    chains = Chains((17, 5, 33, 3, 9), np.float32, "group_rmsprop", runs=1)

    def add_up(order):
        out = nan(1)
        slices.slices_dot(sums(order), out, x, x)
        return [out]

    def residual(order):
        g, losses, module = x.copy(), nan(1), compiled("dense", *dense.dense_options(np.float64))
        dense.dense_residual(
            Ordered(module, order), sums(order), g, losses, x[:, ::-1].copy(), x, SQUARED, 0, (nan(1, 1),)
        )
        return g, losses

    def pairs_dot(order):
        out, module = nan(1, 2, 1), compiled("lbfgs", *lbfgs.lbfgs_options(np.float64))
        arguments = out, np.concatenate([x, -x])[None], x, np.int64(600)
        Ordered(module, order).launch("pairs_dot", (1, 2, 1), (256,), arguments)
        return [out]

    def adam(order):
        x, mean, square, grad = np.random.default_rng(0).random((4, 2, 3000))
        count, tickets = np.array([3.0, 4.0]), np.zeros(2, np.uint32)
        module = Ordered(compiled("update", *update.update_options(np.float64)), order)
        update.update_adam(module, x, mean, square, grad, np.full(2, 0.1), 0.9, 0.99, 1e-8, count, tickets)
        return x, mean, square, count

    return {
        "slices": (slices.slices_options(np.float64), add_up),
        "dense": (dense.dense_options(np.float64), residual),
        "lbfgs": (lbfgs.lbfgs_options(np.float64), pairs_dot),
        "update": (update.update_options(np.float64), adam),
        "gaussian": (plan.options(np.float32), lambda order: run_dense(dense_problem, plan, order)),
        "row_solve": (
            row_solve.row_solve_options(16, np.float64),
            lambda order: regressions.solve(order, 3, 0.01),
        ),
        "small_chain": (chains.plan.options(), lambda order: chains.run(order, 4, 1e-9, 2)),
    }


BLOCK, OF_WARP = "__syncthreads();", "__syncwarp();"
# How many each text has; seeded measurements have that of the dense ones.
BARRIERS = {
    **{(family, BLOCK): 1 for family in ("slices", "dense", "lbfgs", "update", "gaussian")},
    **{("row_solve", BLOCK): 2, ("small_chain", BLOCK): 7, ("small_chain", OF_WARP): 2},
}


@emulated
@pytest.mark.skipif(ON_DEVICE, reason="what a planted fault does is the emulator's to find")
@pytest.mark.parametrize(
    ("family", "barrier", "k"), [(*place, k) for place, count in BARRIERS.items() for k in range(count)]
)
def test_every_barrier_is_needed(family, barrier, k, monkeypatch):
    """Without it the threads' order shows in some way, so that the tests above would fail."""
    text = cuda.source(family)
    options, run = one_of_each()[family]
    expected = run("forward")
    parts = text.split(barrier)
    broken = Module(barrier.join(parts[: k + 1]) + barrier.join(parts[k + 1 :]), options)
    monkeypatch.setattr(compiled(family, *options), "launch", broken.launch)

    def differs(order):
        try:
            return not all(np.array_equal(a, b) for a, b in zip(run(order), expected))
        except EmulationError:
            return True

    assert any(differs(order) for order in ORDERS)


def test_all_barriers_are_tried():
    counts = {
        (family, barrier): count
        for family in cuda.FAMILIES
        for barrier in (BLOCK, OF_WARP)
        if (count := cuda.source(family).count(barrier))
    }
    assert counts == BARRIERS | {("seeded", BLOCK): 1}


def test_options_name_what_the_text_asks_for():
    assert entry.entry_options(24, np.float64, index=np.int64) == [
        *("-DH=24", "-DREAL=double", "-DSTORED=double", "-DINDEX=long long"),
    ]
    assert entry.entry_options(24, np.float32, stored="bfloat16")[2] == "-DSTORED=bfloat16"
    for stored, dtype in (("float8", np.float32), ("bfloat16", np.float64)):
        with pytest.raises(ValueError, match=f"stored must be None.* for float32, got '{stored}' for"):
            cuda.stored_name(dtype, stored)
    with pytest.raises(KeyError, match="nothing"):
        cuda.source("nothing")


def test_the_texts_are_in_the_package():
    """Every file that a family needs is one that a wheel takes along."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings["package-data"]["fastdmf.kernels.cuda"] == ["*.cu"]
    needed = {f"{name}.cu" for names in cuda.FAMILIES.values() for name in names}
    assert needed == {path.name for path in (ROOT / "kernels" / "cuda").glob("*.cu")}


def test_nothing_of_a_gpu_is_imported():
    code = (
        "import sys; from fastdmf.kernels.cuda import entry, gaussian, row_solve, seeded; print('cupy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
