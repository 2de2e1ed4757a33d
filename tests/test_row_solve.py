"""The rows' ridge regressions against conjugate gradients in plain loops, and against dense solves."""

import sys

import naive
import numba
import numpy as np
import pytest

from fastdmf.kernels import cpu

SHAPES = [(1, 1, 1), (1, 1, 0), (2, 31, 9), (31, 2, 40), (33, 257, 900), (257, 33, 2000)]
WIDTHS = [(np.float32, 16), (np.float32, 32), (np.float32, 80), (np.float64, 8), (np.float64, 16), (np.float64, 40)]


class Rows:
    """One random problem: two columns are not free, the last ones are padding."""

    def __init__(self, n1, n2, nnz, h, dtype, *, weighted=True, centred=True, seed=0):
        rng = np.random.default_rng(seed)
        cells = np.sort(rng.choice(n1 * n2, min(nnz, n1 * n2), replace=False))
        self.rows, self.cols = np.divmod(cells, n2)
        self.indptr, self.indices, _ = cpu.entry_sort(self.rows, self.cols, n1, n2)
        real = h - 3

        def array(*shape):
            out = cpu.aligned_empty(shape, dtype)
            out[...] = rng.standard_normal(shape)
            out[..., real:] = 0
            return out

        self.a, self.b = array(n1, h), array(n2, h)
        self.mean = array(n1, h) if centred else None
        self.y, self.w = (np.zeros(len(cells) + cpu.PAD, dtype) for _ in range(2))
        self.y[: len(cells)] = rng.standard_normal(len(cells))
        self.w[: len(cells)] = rng.uniform(0, 2, len(cells))
        self.y[len(cells) :] = self.w[len(cells) :] = 7.0  # read beside the tail, never used
        if not weighted:
            self.w = None
        self.scale = rng.uniform(0.5, 2, n1).astype(dtype)
        self.scaled_ridge, self.ridge = (rng.uniform(0.1, 1, h).astype(dtype) for _ in range(2))
        self.moment = rng.uniform(0.5, 2, h).astype(dtype)
        self.free = np.ones(h, dtype)
        self.free[[0, 2]] = 0

    def arguments(self):
        data = (self.a, self.b, self.mean, self.indptr, self.indices, self.y, self.w)
        return (*data, self.scale, self.scaled_ridge, self.ridge, self.moment, self.free)

    def reference(self, steps, tol):
        mean = np.zeros_like(self.a) if self.mean is None else self.mean
        size = len(self.rows)
        w = np.ones(size) if self.w is None else self.w[:size]
        ridges = (x.astype(float) for x in (self.scale, self.scaled_ridge, self.ridge, self.moment, self.free))
        return naive.row_solve(self.a, self.b, mean, self.rows, self.cols, self.y[:size], w, *ridges, steps, tol)


@pytest.mark.parametrize("solve", [cpu.row_solve, cpu.row_solve_serial])
@pytest.mark.parametrize(("dtype", "h"), WIDTHS)
@pytest.mark.parametrize(("n1", "n2", "nnz"), SHAPES)
def test_row_solve(n1, n2, nnz, dtype, h, solve):
    for weighted, centred, steps, tol in ((True, True, 3, 0.01), (False, False, 1, 0.1), (True, False, 2, 0.9)):
        problem = Rows(n1, n2, nnz, h, dtype, weighted=weighted, centred=centred)
        expected, loss = problem.reference(steps, tol)
        before = [None if x is None else x.copy() for x in problem.arguments()]
        total = solve(*problem.arguments(), steps, tol)
        # Whether a row that is close to the tolerance takes one step more is a matter of rounding.
        bound = 2e-4 if dtype == np.float32 else 1e-12
        off = np.abs(problem.a - expected).max(axis=1) > bound * np.abs(expected).max()
        assert off.mean() <= 0.02
        assert isinstance(total, float) and abs(total - loss) <= 4 * np.finfo(dtype).eps * np.sqrt(nnz + 1) * loss
        for x, kept in zip(problem.arguments()[1:], before[1:]):
            np.testing.assert_array_equal(x, kept)
        np.testing.assert_array_equal(problem.a[:, [0, 2]], before[0][:, [0, 2]])
        assert (problem.a[:, h - 3 :] == 0).all()


@pytest.mark.parametrize(("dtype", "h"), [(np.float32, 16), (np.float64, 16), (np.float64, 40)])
def test_many_steps_give_the_ridge_regression(dtype, h):
    """Every row against a dense solve of its normal equations; rows without entries fall back to their mean."""
    problem = Rows(33, 257, 900, h, dtype)
    cpu.row_solve(*problem.arguments(), 200, 0.0)
    free = np.flatnonzero(problem.free[: h - 3])
    fixed = np.flatnonzero(problem.free[: h - 3] == 0)
    for i in range(33):
        at = np.flatnonzero(problem.rows == i)
        bi, w = problem.b[problem.cols[at]].astype(float), problem.w[at].astype(float)
        left = problem.y[at] - bi[:, fixed] @ problem.a[i, fixed]
        shrink = (problem.scale[i] * problem.scaled_ridge + problem.ridge)[free].astype(float)
        gram = (bi[:, free] * w[:, None]).T @ bi[:, free] + np.diag(shrink)
        exact = np.linalg.solve(gram, bi[:, free].T @ (w * left) + shrink * problem.mean[i, free])
        np.testing.assert_allclose(problem.a[i, free], exact, atol=2e-5 if dtype == np.float32 else 1e-10)


def test_empty_rows_take_their_prior_mean_or_stay():
    problem = Rows(2, 31, 0, 16, np.float64)
    expected = problem.a.copy()
    free = (problem.free == 1) & (np.arange(16) < 13)
    cpu.row_solve(*problem.arguments(), 1, 0.1)
    expected[:, free] = problem.mean[:, free]
    np.testing.assert_allclose(problem.a, expected, rtol=1e-14)
    problem = Rows(2, 31, 0, 16, np.float64)
    problem.ridge[:] = problem.scaled_ridge[:] = 0
    before = problem.a.copy()
    assert cpu.row_solve(*problem.arguments(), 3, 0.1) == 0
    np.testing.assert_array_equal(problem.a, before)


def test_scale_equivariance():
    """Powers of two times data, start and mean give exactly as much of the result."""
    small, large = (Rows(33, 257, 900, 32, np.float32) for _ in range(2))
    for x in (large.a, large.mean, large.y):
        x *= 1024
    large.b[:], large.free[[0, 2]], small.free[[0, 2]] = small.b, 1, 1
    cpu.row_solve(*small.arguments(), 3, 0.1)
    cpu.row_solve(*large.arguments(), 3, 0.1)
    np.testing.assert_array_equal(large.a, 1024 * small.a)


def test_nan_stays_in_its_row():
    problem, clean = (Rows(33, 257, 900, 32, np.float32) for _ in range(2))
    bad = int(np.flatnonzero(problem.rows == 5)[0])
    problem.y[bad] = np.nan
    assert np.isnan(cpu.row_solve(*problem.arguments(), 3, 0.1))
    cpu.row_solve(*clean.arguments(), 3, 0.1)
    others = np.arange(33) != 5
    np.testing.assert_array_equal(problem.a[others], clean.a[others])


@pytest.mark.parametrize("h", [16, 80])
def test_same_bits_for_any_number_of_threads(h):
    results = []
    threads = numba.get_num_threads()
    for count in (1, threads):
        numba.set_num_threads(count)
        problem = Rows(257, 33, 2000, h, np.float32)
        total = cpu.row_solve(*problem.arguments(), 3, 0.1)
        results.append((problem.a.tobytes(), total))
    numba.set_num_threads(threads)
    assert results[0] == results[1]


@pytest.mark.parametrize("most", [0, 899, 900])
def test_row_solver_solves_few_entries_on_the_calling_thread(monkeypatch, most):
    """Vectors of any precision become that of the factors."""
    module, called = sys.modules["fastdmf.kernels.cpu.row_solve"], []
    monkeypatch.setattr(module, "_SERIAL", most)
    for name in ("row_solve", "row_solve_serial"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, kernel=kernel: (called.append(name), kernel(*a))[1])
    one, two = Rows(33, 257, 900, 16, np.float32), Rows(33, 257, 900, 16, np.float32)
    a, b, mean, indptr, indices, y, w, scale, *vectors = one.arguments()
    wide = [v.astype(np.float64) for v in (scale, *vectors)]
    got = cpu.row_solver(indptr, indices, y, w)(a, b, mean, wide[0], wide[1:], 2, 0.1)
    expected = (cpu.row_solve if most < 900 else cpu.row_solve_serial)(*two.arguments(), 2, 0.1)
    assert called == ["row_solve" if most < 900 else "row_solve_serial"]
    assert got == expected and one.a.tobytes() == two.a.tobytes()
