"""Kernels on the buffers of a batch: steps and inner products, and L-BFGS with its line search."""

import naive
import numba
import numpy as np
import pytest

from fastdmf.kernels import cpu

DTYPES = [np.float32, np.float64]
LARGE = 1 << 18  # numbers from which the kernels work in parallel


def on_threads(count, work):
    before = numba.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        return work()
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("runs", "size"), [(1, 1), (3, 2), (2, 31), (1, 33), (2, 257), (3, 4100), (2, LARGE // 2 + 3)])
def test_steps_and_inner_products(dtype, runs, size):
    rng = np.random.default_rng(size)
    x, d = (rng.standard_normal((runs, size)).astype(dtype) for _ in range(2))
    steps = rng.standard_normal(runs)
    before = x.copy(), d.copy()
    eps = np.finfo(dtype).eps
    expected = x + steps[:, None] * d.astype(float)

    def moved(t):
        out = np.full_like(x, np.nan)
        on_threads(t, lambda: cpu.slices_move(out, x, steps, d))
        return out

    def inner(t):
        out = np.full(runs, np.nan)
        on_threads(t, lambda: cpu.slices_dot(out, x, d))
        return out

    one, two = moved(1), moved(2)
    np.testing.assert_array_equal(one, two)
    assert (np.abs(one - expected) <= 2 * eps * (np.abs(x) + np.abs(expected))).all()
    np.testing.assert_array_equal(inner(1), inner(2))
    products = x.astype(float) * d
    assert (np.abs(inner(1) - products.sum(axis=1)) <= 8 * eps * np.abs(products).sum(axis=1)).all()
    for a, kept in zip((x, d), before):
        np.testing.assert_array_equal(a, kept)
    cpu.slices_move(x, x, steps, d)  # in place
    np.testing.assert_array_equal(x, one)


# L-BFGS --------------------------------------------------------------------------------------------------------

PLACES = 5


class Search:
    """A batch of searches on sum_i c_i (x_i^2 / 2 + x_i^4 / 40): values and gradients are plain arrays."""

    def __init__(self, runs, size, dtype, seed=0):
        rng = np.random.default_rng(seed)
        self.c = rng.uniform(0.5, 5, (runs, size))
        self.dtype, self.runs = dtype, runs

        def buffer(fill=np.nan):
            out = cpu.aligned_empty((runs, size), dtype)
            out[:] = fill
            return out

        self.x = buffer()
        self.x[:] = rng.standard_normal((runs, size))
        self.grad, self.trial, self.trial_grad, self.direction = (buffer() for _ in range(4))
        self.objective = self.value(self.x, self.grad)
        self.pairs = cpu.aligned_empty((runs, 2 * PLACES, size), dtype)
        self.pairs[:] = np.nan
        self.s_y, self.y_y = (np.full((runs, PLACES, PLACES), np.nan) for _ in range(2))
        self.products, self.coefficients = (np.full((runs, 2 * PLACES), np.nan) for _ in range(2))
        self.gamma, self.slope, self.stretch, self.step_size = (np.full(runs, np.nan) for _ in range(4))
        self.base = np.full(runs, 0.05)
        self.newest, self.held, self.trials, self.restarts = (np.zeros(runs, np.int64) for _ in range(4))
        self.fresh, self.failed = np.ones(runs, bool), np.zeros(runs, bool)
        self.far, self.searching = np.full(runs, np.inf), np.ones(runs, bool)
        self.remembered = [[] for _ in range(runs)]

    def value(self, x, grad):
        x = x.astype(float)
        grad[:] = self.c * (x + x**3 / 10)
        return (self.c * (x**2 / 2 + x**4 / 40)).sum(axis=1)

    @property
    def kept(self):
        """Return memory and search."""
        inner = self.s_y, self.y_y, self.products, self.coefficients, self.gamma
        numbers = self.slope, self.stretch, self.step_size, self.base
        flags = self.trials, self.restarts, self.fresh, self.failed
        return (self.pairs, *inner, self.newest, self.held), (*numbers, *flags)

    def propose(self):
        cpu.lbfgs_try(*self.kept, (self.trial, self.direction, self.x, self.grad), self.searching)

    def judge(self, objective, cosine=1e-8):
        """Return which trials were accepted, and move there."""
        accepted = np.zeros(self.runs, bool)
        points, objectives = (self.trial, self.x, self.trial_grad, self.grad), (self.objective, objective)
        settings = 1e-4, np.inf, cosine, 0.4, 3, 2
        cpu.lbfgs_judge(accepted, *self.kept, points, objectives, self.far, self.searching, settings)
        for b in np.flatnonzero(accepted):
            s, y = (self.trial[b] - self.x[b]), (self.trial_grad[b] - self.grad[b])
            s, y = s.astype(float), y.astype(float)
            if s @ y > cosine * np.sqrt((s @ s) * (y @ y)):
                self.remembered[b] = [*self.remembered[b], (s, y)][1 - PLACES :]
            self.x[b], self.grad[b], self.objective[b] = self.trial[b], self.trial_grad[b], objective[b]
        return accepted


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_directions_are_those_of_the_two_loop_recursion(dtype, tolerance):
    """Three slices, several turns of the ring, one of them idle for a while."""
    search = Search(3, 48, dtype)
    worst, checked = 0.0, 0
    for t in range(14):
        search.searching[2] = not 4 <= t < 7
        idle = search.direction[2].copy(), search.products[2].copy(), search.trials[2]
        aimed = np.flatnonzero(search.searching & search.fresh)
        search.propose()
        checked += len(aimed)
        for b in aimed:
            expected = -naive.two_loop(search.remembered[b], search.grad[b].astype(float), search.base[b])
            worst = max(worst, np.linalg.norm(search.direction[b] - expected) / np.linalg.norm(expected))
            np.testing.assert_allclose(search.slope[b], search.direction[b].astype(float) @ search.grad[b], rtol=1e-5)
            np.testing.assert_array_equal(search.trial[b], search.x[b] + search.direction[b])
        accepted = search.judge(search.value(search.trial, search.trial_grad))
        assert not accepted[~search.searching].any()
        if not search.searching[2]:
            for now, before in zip((search.direction[2], search.products[2], search.trials[2]), idle):
                np.testing.assert_array_equal(now, before)
    print(f"{np.dtype(dtype).name}: directions differ from the two-loop recursion by {worst:.1e}")
    assert worst < tolerance and checked > 30
    assert search.held.tolist() == [PLACES - 1] * 3 and [len(r) for r in search.remembered] == [PLACES - 1] * 3


def test_refused_trials_shorten_the_step_and_clear_the_memory():
    search = Search(2, 32, np.float64)
    for _ in range(3):
        search.propose()
        search.judge(search.value(search.trial, search.trial_grad))
    x, base = search.x.copy(), search.base.copy()
    better = search.objective - 1.0
    for k in range(3):  # slice 0 is refused three times, slice 1 moves each time
        search.propose()
        np.testing.assert_allclose(search.trial[0], x[0] + 0.4**k * search.direction[0], rtol=1e-14)
        objective = search.value(search.trial, search.trial_grad)
        objective[0] = np.nan if k == 1 else search.objective[0] + 1
        accepted = search.judge(np.array([objective[0], min(objective[1], better[1])]))
        assert accepted.tolist() == [False, True] and not search.failed.any()
        better = search.objective - 1.0
    np.testing.assert_array_equal(search.x[0], x[0])
    assert search.held[0] == 0 and search.fresh[0] and search.restarts.tolist() == [1, 0]
    np.testing.assert_allclose(search.base, [0.5 * base[0], base[1]])
    search.propose()
    np.testing.assert_allclose(search.direction[0], -search.base[0] * search.grad[0], rtol=1e-14)
    for _ in range(3):
        assert not search.failed[0]
        search.judge(search.objective + 1)
        search.propose()
    assert search.failed[0]


def test_pairs_of_little_curvature_are_left_out_far_from_the_end():
    search = Search(2, 32, np.float64)
    search.far[:] = [0.0, np.inf]  # the first is far, where a cosine above one is asked for
    for _ in range(2):
        search.propose()
        search.judge(search.value(search.trial, search.trial_grad))
    assert search.held.tolist() == [0, 2]


def test_a_direction_that_does_not_descend_clears_the_memory():
    search = Search(1, 32, np.float64)
    for _ in range(3):
        search.propose()
        search.judge(search.value(search.trial, search.trial_grad))
    search.products *= -1e3  # as rounding could spoil them
    search.propose()
    assert search.held[0] == 0 and search.slope[0] < 0 and not search.failed[0]
    np.testing.assert_allclose(search.direction, -search.base[0] * search.grad, rtol=1e-14)
    search.grad[:] = 0
    search.fresh[:] = True
    search.propose()
    assert search.failed[0]


def test_same_bits_on_any_number_of_threads():
    """Large enough for the parallel passes; the serial ones take the same ranges."""

    def run(count):
        search = Search(1, 120_000, np.float64)
        for _ in range(6):
            on_threads(count, search.propose)
            objective = search.value(search.trial, search.trial_grad)
            on_threads(count, lambda objective=objective: search.judge(objective))
        assert search.pairs.size > 1 << 20
        return search

    one, two = run(1), run(2)
    for name in ("x", "direction", "s_y", "products", "slope"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
