"""The kernels of small chains against the plain loops of ``naive.py``: products, sampled products, whole evaluations.

An output o of a sum of t terms must satisfy norm(o - reference) <= c eps sqrt(t) norm(reference); c is in ``BOUNDS``.
Outputs and scratch hold NaN before each call, inputs are compared with copies after it.
"""

import naive
import numba
import numpy as np
import pytest

from fastdmf.kernels import cpu
from fastdmf.kernels.cpu.gemm import gemm, gemm_work
from fastdmf.kernels.cpu.sampled import sampled_gather, sampled_reorder, sampled_residuals

SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)
# About twice the worst that was seen at AVX2 and at SSE width.
BOUNDS = {"gemm": 0.5, "sampled": 1, "chain": 2.5}
DTYPES = [np.float32, np.float64]


def aligned(x):
    out = cpu.aligned_empty(x.shape, x.dtype)
    out[...] = x
    return out


def poisoned(*shape, dtype=np.float64):
    return aligned(np.full(shape, np.nan, dtype))


def close(got, reference, terms, family, dtype):
    got, reference = np.asarray(got, float), np.asarray(reference, float)
    error = np.linalg.norm(got - reference)
    assert error <= BOUNDS[family] * np.finfo(dtype).eps * np.sqrt(terms) * np.linalg.norm(reference)


# Products ------------------------------------------------------------------------------------------------------

SIZES = [
    (1, 1, 1),
    (2, 2, 2),
    (6, 16, 8),
    (7, 1, 5),
    (1, 33, 2),
    (31, 2, 33),
    (33, 31, 1),
    (5, 9, 257),
    (2, 257, 31),
    (257, 3, 4),
    (12, 8, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_in_columns", [False, True])
@pytest.mark.parametrize("b_in_columns", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_gemm(dtype, a_in_columns, b_in_columns, m, n, k):
    """At places inside one buffer, with leading dimensions of their own; nothing else of C's buffer changes."""
    rng = np.random.default_rng([m, n, k])

    def placed(x, in_columns):
        """Return (buffer, place, row, column) of a matrix between NaN, its rows or columns three numbers apart."""
        y = x.T if in_columns else x
        wide = np.full((y.shape[0], y.shape[1] + 3), np.nan, dtype)
        wide[:, : y.shape[1]] = y
        steps = (1, wide.shape[1]) if in_columns else (wide.shape[1], 1)
        return np.concatenate([np.full(5, np.nan, dtype), wide.ravel()]), 5, *steps

    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    left, right = placed(a, a_in_columns), placed(b, b_in_columns)
    before = left[0].copy(), right[0].copy()
    expected = naive.product(a, b)
    for ldc in (n, n + 40):
        c = np.full(7 + m * ldc + 9, np.nan, dtype)
        work = np.full(11 + gemm_work(n, k, dtype), np.nan, dtype)
        gemm(c, 7, ldc, *left, *right, m, n, k, work, 11)
        got = c[7 : 7 + m * ldc].reshape(m, ldc)
        close(got[:, :n], expected, max(k, 1), "gemm", dtype)
        assert np.isnan(c[:7]).all() and np.isnan(c[7 + m * ldc :]).all() and np.isnan(work[:11]).all()
        # Rows with room for whole vectors get zeros behind column n, and nothing behind those.
        padded = cpu.chain_padded(n, dtype)
        assert (got[:, n : min(ldc, padded)] == 0).all() and np.isnan(got[:, padded:]).all()
    for x, kept in zip((left[0], right[0]), before):
        np.testing.assert_array_equal(x, kept)


def test_gemm_keeps_nan_in_its_row_and_column():
    a, b, c = np.ones((31, 17)), np.ones((17, 33)), np.zeros(31 * 33)
    a[8, 3], b[2, 30] = np.nan, np.inf
    gemm(c, 0, 33, a.ravel(), 0, 17, 1, b.ravel(), 0, 33, 1, 31, 33, 17, np.zeros(gemm_work(33, 17, c.dtype)), 0)
    c = c.reshape(31, 33)
    assert np.isnan(c[8]).all() and np.isinf(np.delete(c, 8, axis=0)[:, 30]).all()
    assert (np.delete(np.delete(c, 8, axis=0), 30, axis=1) == 17).all()


# Sampled products ----------------------------------------------------------------------------------------------


class Entries:
    """A random mask, by rows and by columns; every third row and every fourth column is empty where there is room."""

    def __init__(self, n1, n2, nnz, rng):
        rows = rng.choice([i for i in range(n1) if i % 3 != 1 or n1 < 3], nnz)
        cols = rng.choice([j for j in range(n2) if j % 4 != 2 or n2 < 4], nnz)
        self.indptr, self.indices, order = cpu.entry_sort(rows, cols, n1, n2)
        self.rows, self.cols = rows[order], cols[order]
        self.columns = cpu.entry_blocks(self.indptr, self.indices, n1, n2, n1)

    @property
    def arrays(self):
        return self.indptr, self.indices, *self.columns


def padded_data(x):
    return np.pad(np.ascontiguousarray(x), ((0, 0), (0, cpu.PAD)))


def targets(prediction, rng):
    """Return y with residuals of both signs on both sides of 0.7 and none near a corner of a loss."""
    size = rng.uniform(0.1, 0.6, prediction.shape) + rng.integers(0, 2, prediction.shape) * 0.7
    return prediction - size * rng.choice([-1.0, 1.0], prediction.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("code", "weighted"), [(SQUARED, False), (SQUARED, True), (HUBER, True), (TRUNCATED, False)])
@pytest.mark.parametrize(("n1", "n2", "nnz", "h"), [(1, 1, 1, 1), (2, 31, 0, 3), (33, 7, 90, 33), (31, 257, 300, 130)])
def test_sampled(dtype, code, weighted, n1, n2, nnz, h):
    rng = np.random.default_rng([n1, h])
    entries, wide = Entries(n1, n2, nnz, rng), cpu.chain_padded(h, dtype)
    x = np.full(3 + (n1 + n2) * wide, np.nan, dtype)
    p_at, q_at = 3, 3 + n1 * wide
    p, q = x[p_at:q_at].reshape(n1, wide), x[q_at:].reshape(n2, wide)
    for factor in (p, q):
        factor[:, :h], factor[:, h:] = rng.standard_normal((len(factor), h)) / np.sqrt(h), 0
    prediction = naive.entry_forward(p[:, :h], q[:, :h], entries.rows, entries.cols)
    y = padded_data(targets(prediction, rng)[None].astype(dtype))[0]
    w = padded_data(rng.random((1, nnz)).astype(dtype))[0]
    loss, r = cpu.chain_loss(code, 0.7), np.full(2 + nnz + cpu.PAD, np.nan, dtype)
    inputs = [z.copy() for z in (x, y, w)]
    total = sampled_residuals(
        r, 2, x, p_at, x, q_at, wide, n1, entries.indptr, entries.indices, y, w, loss, weighted, 0.25
    )
    expected, pulls = naive.losses_and_pulls(prediction, y, w if weighted else None, code, 0.7)
    close(total, expected, nnz + h, "sampled", dtype)
    close(r[2 : 2 + nnz], 0.25 * pulls, h, "sampled", dtype)
    assert np.isnan(r[:2]).all() and np.isnan(r[2 + nnz + 3 :]).all()
    by_columns = np.full(nnz + 1, np.nan, dtype)
    sampled_reorder(by_columns, 1, r, 2, entries.columns[2])
    np.testing.assert_array_equal(by_columns[1:], r[2 : 2 + nnz][entries.columns[2]])
    gp, gqt = naive.entry_pull(r[2 : 2 + nnz], p[:, :h], q[:, :h], entries.rows, entries.cols)
    for reference, rows, at, values, pattern in (
        (gp, n1, q_at, (r, 2), (entries.indptr, entries.indices)),
        (gqt, n2, p_at, (by_columns, 1), entries.columns[:2]),
    ):
        out = np.full(4 + rows * h + 5, np.nan, dtype)
        sampled_gather(out, 4, h, *values, x, at, wide, rows, *pattern)
        close(out[4 : 4 + rows * h].reshape(rows, h), reference, nnz + 1, "sampled", dtype)
        assert np.isnan(out[:4]).all() and np.isnan(out[4 + rows * h :]).all()
    for z, kept in zip((x, y, w), inputs):
        np.testing.assert_array_equal(z, kept)


# Whole evaluations ---------------------------------------------------------------------------------------------

# dims (d_0 .. d_N), cut
CHAINS = [
    ((1, 1, 1), 1),
    ((2, 2, 2, 2), 1),
    ((7, 5, 9), 1),
    ((7, 16, 9), 1),
    ((7, 5, 4, 9), 1),
    ((7, 5, 4, 9), 2),
    ((33, 8, 6, 8, 31), 2),
    ((6, 5, 8, 4, 3, 9), 1),
    ((6, 5, 8, 4, 3, 9), 2),
    ((6, 5, 8, 4, 3, 9), 4),
    ((6, 5, 8, 4, 3, 7, 9), 3),
    ((31, 70, 33), 1),
]


def serial(grad, losses, *rest):
    """Evaluate all runs on the calling thread."""
    cpu.chain_runs(grad, losses, *rest, 0, len(losses))


class Chain:
    """One random batch of small chains with its reference."""

    def __init__(self, dims, cut, dtype, *, runs, dense, code, weighted, own):
        rng = np.random.default_rng([*dims, runs])
        n1, n2 = dims[-1], dims[0]
        nnz = n1 * n2 if dense else min(25, (3 * n1 * n2 + 3) // 4)
        self.shapes = [(a, b) for a, b in zip(dims[1:], dims)]
        self.factors = [
            [(rng.standard_normal(s) / np.sqrt(s[1])).astype(dtype) for s in self.shapes] for _ in range(runs)
        ]
        sizes = [-(-a * b // 16) * 16 for a, b in self.shapes]
        self.offsets = np.cumsum([0, *sizes[:-1]])
        self.flat = aligned(np.zeros((runs, sum(sizes)), dtype))
        self.views = [slice(o, o + a * b) for o, (a, b) in zip(self.offsets, self.shapes)]
        for b in range(runs):
            for j, view in enumerate(self.views):
                f = self.factors[b][j]
                self.flat[b, view] = (f if j else f.T).ravel()
        if dense:
            self.rows, self.cols = (i.ravel() for i in np.indices((n1, n2)))
            self.pattern = cpu.entry_sort([0], [0], 1, 1)[:2]
            self.pattern += cpu.entry_blocks(*self.pattern, 1, 1, 1)  # not read
        else:
            entries = Entries(n1, n2, nnz, rng)
            self.rows, self.cols, self.pattern = entries.rows, entries.cols, entries.arrays
        y, w = rng.standard_normal((runs if own else 1, nnz)), rng.random((runs, nnz))
        if dense:
            w[:, ::3], y[:, ::3] = 0, 1e3  # holes
        self.y, self.w = ((z if dense else padded_data(z)).astype(dtype) for z in (y, w))
        self.dims, self.cut, self.dtype, self.dense, self.nnz = np.array(dims), cut, dtype, dense, nnz
        self.code, self.weighted, self.runs, self.sizes = code, weighted, runs, (n1, n2)
        self.scale = rng.uniform(0.2, 3, runs).astype(dtype)
        self.u, self.v = (rng.standard_normal((runs, n)).astype(dtype) for n in (n1, n2))
        self.plan = cpu.chain_plan(dims, cut, self.offsets, nnz, dense, dtype)

    def evaluate(self, run, probing=False):
        """Return (gradient, losses, G v, G^T u, scratch) of what is poisoned before."""
        grad, losses = poisoned(*self.flat.shape, dtype=self.dtype), poisoned(self.runs)
        work = poisoned(self.runs, self.plan.length, dtype=self.dtype)
        inputs = self.flat, self.y, self.w, self.scale
        before = [x.copy() for x in inputs]
        u, v = self.u.copy(), self.v.copy()
        chain = (*self.plan[:3], *self.pattern)
        data = (self.y, self.w, cpu.chain_loss(self.code, 1.3), self.weighted, self.dense)
        run(grad, losses, self.flat, self.scale, *chain, *data, u, v, probing, work)
        for x, kept in zip(inputs, before):
            np.testing.assert_array_equal(x, kept)
        if not probing:
            np.testing.assert_array_equal(u, self.u)
            np.testing.assert_array_equal(v, self.v)
        return grad, losses, u, v, work

    def check(self, run, probing):
        grad, losses, gv, gtu, work = self.evaluate(run, probing)
        terms = self.nnz + sum(self.dims)
        for b in range(self.runs):
            w = self.w[b] if self.weighted else None
            y = self.y[b % len(self.y)]
            loss, gradients, g = naive.chain_entry(self.factors[b], self.rows, self.cols, y, w, self.code, 1.3)
            close(losses[b], loss, terms, "chain", self.dtype)
            for j, (view, expected) in enumerate(zip(self.views, gradients)):
                expected = self.scale[b] * (expected if j else expected.T).ravel()
                close(grad[b, view], expected, terms, "chain", self.dtype)
            if probing:
                close(gv[b], g @ self.v[b], terms, "chain", self.dtype)
                close(gtu[b], g.T @ self.u[b], terms, "chain", self.dtype)
            self.check_halves(work[b], b, terms)
        # Between the factors nothing is written.
        outside = np.ones(self.flat.shape[1], bool)
        for view in self.views:
            outside[view] = False
        assert np.isnan(grad[:, outside]).all()

    def check_halves(self, work, b, terms):
        """P and Q^T lie in the scratch unless a factor serves as it is."""
        h, depth = self.dims[self.cut], len(self.dims) - 1
        wide = cpu.chain_padded(h, self.dtype)
        left = np.linalg.multi_dot([np.eye(self.sizes[0]), *reversed(self.factors[b][self.cut :])])
        right = np.linalg.multi_dot([np.eye(h), *reversed(self.factors[b][: self.cut])])
        for side, is_factor, expected in ((1, self.cut == depth - 1, left), (0, self.cut == 1, right.T)):
            if not (is_factor and wide == h):
                start = self.plan.ends[side, 4]
                got = work[start : start + len(expected) * wide].reshape(-1, wide)
                close(got[:, :h], expected, terms, "chain", self.dtype)
                assert (got[:, h:] == 0).all()


@pytest.mark.parametrize(("dims", "cut"), CHAINS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chain(dims, cut, dense, dtype):
    one = Chain(dims, cut, dtype, runs=1, dense=dense, code=SQUARED, weighted=dense, own=True)
    one.check(serial, probing=False)
    many = Chain(dims, cut, dtype, runs=3, dense=dense, code=HUBER, weighted=True, own=False)
    many.check(cpu.chain_runs_parallel, probing=True)


@pytest.mark.parametrize("code", [SQUARED, HUBER, TRUNCATED, ABSOLUTE])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_chain_of_every_loss(code, weighted, dense):
    problem = Chain((7, 5, 4, 9), 2, np.float64, runs=2, dense=dense, code=code, weighted=weighted, own=True)
    problem.check(serial, probing=True)


@pytest.mark.parametrize("dense", [False, True])
def test_chain_has_the_same_bits_on_any_number_of_threads(dense):
    problem = Chain((33, 8, 6, 31), 2, np.float32, runs=5, dense=dense, code=SQUARED, weighted=True, own=True)
    before = numba.get_num_threads()
    results = [problem.evaluate(serial, True)]
    try:
        for count in (1, 2):
            numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
            results.append(problem.evaluate(cpu.chain_runs_parallel, True))
    finally:
        numba.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0][:4], other[:4]):
            np.testing.assert_array_equal(a, b)


def test_nan_stays_in_its_run():
    problem = Chain((7, 5, 4, 9), 2, np.float64, runs=3, dense=False, code=HUBER, weighted=True, own=True)
    problem.flat[1, problem.offsets[1]] = np.nan
    grad, losses, *_ = problem.evaluate(cpu.chain_runs_parallel)
    assert np.isnan(losses).tolist() == [False, True, False]
    inside = np.concatenate([np.arange(v.start, v.stop) for v in problem.views])
    assert np.isfinite(grad[[0, 2]][:, inside]).all()


@pytest.mark.parametrize(("dims", "cut"), [((1, 1, 1), 1), ((7, 16, 9), 1), ((33, 8, 6, 8, 31), 2), ((31, 70, 33), 1)])
@pytest.mark.parametrize(("runs", "dense"), [(1, False), (3, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_power_steps(dims, cut, runs, dense, dtype):
    problem = Chain(dims, cut, dtype, runs=runs, dense=dense, code=SQUARED, weighted=False, own=True)
    *_, work = problem.evaluate(serial)
    v, norms = problem.v.copy(), np.full(runs, np.nan)
    cpu.chain_power(norms, v, problem.flat, problem.plan.ends, problem.plan.sizes, 3, work)
    p, qt = cpu.chain_halves(problem.flat, problem.plan, work)
    for b in range(runs):
        w = np.linalg.multi_dot([*reversed(problem.factors[b])]).astype(float)
        close(p[b].astype(float) @ qt[b].T.astype(float), w, sum(dims), "chain", dtype)
        expected = problem.v[b].astype(float)
        for _ in range(3):
            expected = w.T @ (w @ expected)
            expected /= np.linalg.norm(expected)
        close(v[b], expected, 10 * sum(dims), "chain", dtype)
        close(norms[b], np.linalg.norm(w @ expected), sum(dims), "chain", dtype)
    problem.flat[:] = 0
    *_, work = problem.evaluate(serial)
    before = v.copy()
    cpu.chain_power(norms, v, problem.flat, problem.plan.ends, problem.plan.sizes, 2, work)
    np.testing.assert_array_equal(v, before)  # a zero matrix leaves it
    assert (norms == 0).all()


def test_routes_follow_the_work():
    def route(dims, nnz, batch=1):
        return cpu.chain_route(dims, 1, nnz, batch, np.dtype(np.float64))

    assert route((100, 100, 100, 100), 2000) == (False, False)
    assert route((100, 100, 100, 100), 10_000) == (True, False)
    assert route((100, 100, 100, 100), 2000, 16) == (False, True)
    assert route((2, 2, 2), 3, 4)[1] is False  # a parallel region would cost more than it saves
