"""Descents of small chains in one kernel, run by the emulator, against the same descents with naive gradients."""

import naive
import numpy as np
import pytest
from cuda_launches import Ordered, compiled, emulated, in_every_order, nan

from fastdmf.chain import Layout
from fastdmf.kernels.cuda.small_chain import CONVERGED, DIVERGED, MAX_ITER, RUNNING, SmallChainPlan, small_chain

SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)
BETA, EPS, DELTA = 0.8, 0.01, 0.7
# About twice the worst that was seen, of c eps sqrt(terms) in ten steps.
BOUND = 3.5


class Chains:
    """Some problems of one shape: masks, data and learning rates of their own; every third row is empty."""

    def __init__(self, dims, dtype, rule, *, runs=3, code=SQUARED, weighted=False, lr=0.05):
        rng = np.random.default_rng([runs, *dims])
        self.dims, self.dtype, self.rule, self.runs, self.code = dims, np.dtype(dtype), rule, runs, code
        self.layout, (n1, n2) = Layout(dims), (dims[-1], dims[0])
        self.plan = SmallChainPlan.of(dims, self.layout.offsets, dtype, rule)
        self.x = self.layout.allocate(runs, dtype)
        for view in self.layout.stored(self.x):
            view[...] = rng.standard_normal(view.shape) * (0.6 / min(view.shape[1:])) ** 0.5
        some = [i for i in range(n1) if i % 3 != 1 or n1 < 3]
        cells = [np.sort(rng.choice(len(some) * n2, -(-len(some) * n2 // (2 + b)), replace=False)) for b in range(runs)]
        self.entries = [(np.array(some)[c // n2], c % n2) for c in cells]
        starts = np.append(0, np.cumsum([len(c) for c in cells]))
        self.indptr = np.array(
            [starts[b] + np.searchsorted(self.entries[b][0], np.arange(n1 + 1)) for b in range(runs)]
        )
        self.indices = np.concatenate([cols for _, cols in self.entries]).astype(np.int32)
        self.y = rng.standard_normal(starts[-1]).astype(dtype)
        self.w = rng.random(starts[-1]).astype(dtype) if weighted else None
        self.starts, counts = starts, np.diff(starts)
        self.factors = (2 / counts).astype(dtype)
        self.divisors, self.ceilings = rng.uniform(0.5, 2, runs) * counts, np.full(runs, 1e6)
        self.lr = lr * rng.uniform(0.5, 1, runs)

    def data(self, b):
        at = slice(self.starts[b], self.starts[b + 1])
        return *self.entries[b], self.y[at], None if self.w is None else self.w[at], self.code, DELTA

    def naive(self, max_iter, tol, check_every):
        """Return what the kernel should, in float64: x, steps, how it ended, loss."""
        ends = [self._naive(b, max_iter, tol, check_every) for b in range(self.runs)]
        return [np.array(part) for part in zip(*ends)]

    def _naive(self, b, max_iter, tol, check_every):
        x, kept, mean = self.x[b : b + 1].astype(float), None, 0.0
        velocity = np.zeros_like(x)
        for t in range(max_iter + 1):
            loss, gradients, _ = naive.chain_entry([w[0] for w in self.layout.factors(x)], *self.data(b))
            if t % check_every == 0 or t == max_iter:
                if not loss <= self.ceilings[b]:
                    return kept[0], t, DIVERGED, loss
                kept = x.copy()
                if loss / self.divisors[b] <= tol:
                    return kept[0], t, CONVERGED, loss
            if t == max_iter:
                return kept[0], t, MAX_ITER, loss
            grad = np.zeros_like(x)
            self.layout.write(grad, [float(self.factors[b]) * g for g in gradients])
            step = self.lr[b]
            if self.rule == "group_rmsprop":
                mean = BETA * mean + (1 - BETA) * (grad**2).sum()
                step /= np.sqrt(mean / (1 - BETA ** (t + 1))) + EPS
            if self.rule in ("momentum", "nesterov"):
                velocity = BETA * velocity + grad
                grad = grad + BETA * velocity if self.rule == "nesterov" else velocity
            x = x - step * grad

    def state(self):
        """Return x, scratch and the table of results, before the first launch."""
        velocity = np.zeros_like(self.x) if self.rule in ("momentum", "nesterov") else None
        mean = np.zeros(self.runs) if self.rule == "group_rmsprop" else None
        results = np.zeros(self.runs, np.int64), np.full(self.runs, RUNNING, np.int32), nan(self.runs)
        return [self.x.copy(), nan(*self.x.shape, dtype=self.dtype), velocity, mean, *results]

    def given(self):
        return self.lr, self.factors, self.divisors, self.ceilings, self.indptr, self.indices, self.y, self.w

    def run(self, order, max_iter, tol, check_every, turns=10**6, module=None):
        """Launch until all have ended; return x, steps, how they ended, losses, and the number of launches."""
        state, launches = self.state(), 0
        module = Ordered(module or compiled("small_chain", *self.plan.options()), order)
        settings = self.code, DELTA, BETA, EPS, tol, max_iter, check_every, turns
        while (state[5] == RUNNING).any() and launches < 50:
            small_chain(module, self.plan, *state, *self.given(), *settings)
            launches += 1
        return state[0], *state[4:], np.array(launches)


def check(problem, got, expected):
    x, count, status, losses, _ = got
    np.testing.assert_array_equal(count, expected[1])
    np.testing.assert_array_equal(status, expected[2])
    bound = BOUND * np.finfo(problem.dtype).eps * np.sqrt(sum(problem.dims))
    for b in range(problem.runs):
        assert np.linalg.norm(x[b] - expected[0][b]) <= bound * np.linalg.norm(expected[0][b])
        if status[b] == DIVERGED:  # by then rounding has grown as well
            assert losses[b] > problem.ceilings[b]
        else:
            assert abs(losses[b] - expected[3][b]) <= bound * abs(expected[3][b])


# Depths 1 to 5; widths that a tile holds exactly, and those that it does not; narrow and wide sides of every product.
# Those of one largest width share a compiled module.
SHAPES = [
    (1, 1),
    (33, 5),
    (1, 33),
    (33, 2, 17),
    (7, 33, 32),
    (33, 33, 33, 33),
    (20, 3, 33, 31),
    (17, 5, 33, 3, 9),
    (33, 1, 33, 2, 33),
    (16, 33, 12, 33, 2, 18),
]


@emulated
@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "rule", "code", "weighted"),
    [
        (np.float32, "gd", SQUARED, False),
        (np.float32, "momentum", HUBER, True),
        (np.float32, "group_rmsprop", SQUARED, True),
        (np.float64, "nesterov", TRUNCATED, False),
    ],
)
def test_descents(dims, dtype, rule, code, weighted):
    problem = Chains(dims, dtype, rule, code=code, weighted=weighted)
    got = in_every_order(lambda order: problem.run(order, 9, 1e-9, 4))
    check(problem, got, problem.naive(9, 1e-9, 4))


@emulated
@pytest.mark.parametrize("dims", [(16, 16, 16), (70, 65, 80), (100, 98, 100, 97)])
def test_descents_with_other_tiles(dims):
    problem = Chains(dims, np.float32, "gd", runs=1)
    check(problem, in_every_order(lambda order: problem.run(order, 3, 1e-9, 3)), problem.naive(3, 1e-9, 3))


@emulated
@pytest.mark.parametrize(
    ("dtype", "rule", "longer"), [(np.float32, "group_rmsprop", 2000), (np.float64, "nesterov", 60)]
)
def test_each_problem_ends_by_itself(dtype, rule, longer):
    """One converges, one grows without bound, one goes on to the last step; what they leave is what was looked at."""
    problem = Chains((17, 5, 33, 3, 9), dtype, rule)
    problem.lr[1] *= longer
    problem.ceilings[1] = 1e3
    problem.divisors[0] = 1.001 / 0.05 * problem.naive(4, 1e-9, 4)[3][0]
    expected = problem.naive(11, 0.05, 2)
    assert expected[2].tolist() == [CONVERGED, DIVERGED, MAX_ITER] and expected[1].tolist() in ([4, 2, 11], [4, 4, 11])
    got = in_every_order(lambda order: problem.run(order, 11, 0.05, 2))
    check(problem, got, expected)
    # What has ended is not touched by another launch.
    again = problem.run("forward", 11, 0.05, 2)
    np.testing.assert_array_equal(again[0], got[0])


@emulated
@pytest.mark.parametrize(
    ("dtype", "rule"), [(np.float32, "gd"), (np.float32, "group_rmsprop"), (np.float64, "nesterov")]
)
def test_launches_do_not_change_the_bits(dtype, rule):
    problem = Chains((20, 3, 33, 31), dtype, rule)
    whole = problem.run("forward", 13, 1e-9, 3)
    assert whole[-1] == 1
    for turns, launches in ((1, 5), (4, 3), (6, 3)):
        parts = problem.run("forward", 13, 1e-9, 3, turns)
        assert parts[-1] == launches
        for a, b in zip(whole[:-1], parts):
            np.testing.assert_array_equal(a, b)


@emulated
def test_a_problem_is_the_same_alone():
    problem, one = Chains((20, 3, 33, 31), np.float32, "momentum"), Chains((20, 3, 33, 31), np.float32, "momentum")
    at = slice(one.starts[1], one.starts[2])
    one.x, one.indptr, one.runs = one.x[1:2], one.indptr[1:2] - one.starts[1], 1
    one.indices, one.y = one.indices[at], one.y[at]
    one.lr, one.factors, one.divisors, one.ceilings = (
        a[1:2] for a in (one.lr, one.factors, one.divisors, one.ceilings)
    )
    for a, b in zip(problem.run("forward", 6, 1e-9, 2)[:-1], one.run("forward", 6, 1e-9, 2)):
        np.testing.assert_array_equal(a[1], b[0])


@emulated
def test_nan_ends_its_problem_only():
    problem = Chains((20, 3, 33, 31), np.float32, "gd")
    problem.y[problem.starts[1]] = np.nan
    x, count, status, losses, _ = problem.run("forward", 4, 1e-9, 2)
    assert status.tolist() == [MAX_ITER, DIVERGED, MAX_ITER] and count.tolist() == [4, 0, 4]
    assert np.isnan(losses).tolist() == [False, True, False]
    np.testing.assert_array_equal(x[1], problem.x[1])
    np.testing.assert_array_equal(np.isnan(x), False)


@emulated
def test_masks_without_entries():
    problem = Chains((5, 4, 33), np.float32, "gd", runs=1)
    problem.indptr[:] = 0
    problem.indices, problem.y = problem.indices[:0], problem.y[:0]
    x, count, status, losses, _ = problem.run("forward", 4, 1e-9, 2)
    assert status == [CONVERGED] and count == [0] and losses == [0]
    np.testing.assert_array_equal(x, problem.x)


def layout_plan(dims, dtype=np.float32, rule="gd", **options):
    return SmallChainPlan.of(dims, Layout(dims).offsets, dtype, rule, **options)


def test_what_fits():
    """The table of small_chain.cu."""
    for dtype, widths in ((np.float32, (128, 107, 90, 79)), (np.float64, (96, 75, 63, 55))):
        for depth, n in zip(range(2, 6), widths):
            plan = layout_plan((n,) * (depth + 1), dtype)
            assert plan.length * plan.dtype.itemsize <= 227 * 1024
            with pytest.raises(ValueError, match="bytes of shared memory|must be at most 128"):
                layout_plan((n + 1,) * (depth + 1), dtype)
    with pytest.raises(
        ValueError, match=r"dims \(60, 60, 60\) in float32 need 45,148 bytes .* has 40,000: use fewer .*factors$"
    ):
        layout_plan((60, 60, 60), shared_bytes=40_000)
    with pytest.raises(ValueError, match="rule must be one of .*'nesterov'.*, got 'adam'"):
        layout_plan((5, 5), rule="adam")


@pytest.mark.parametrize("dims", [*SHAPES, (100, 100, 100, 100), (97, 33, 40), (40, 90, 10, 70)])
def test_reads_stay_in_shared_memory(dims):
    """Threads read behind edges, never behind the end; matrices do not overlap."""
    plan, ld = layout_plan(dims), max(dims) | 1
    tile = -(-max(dims) // 16)
    threads = np.arange(16)
    for kind, _, _, _, a, b, m, n, k in plan.products.tolist():
        if kind == 3:
            continue
        for place, size, across in ((a, m, kind == 2), (b, n, kind != 1)):
            far = threads.max() + 16 * ((tile if size > 32 else min(tile, 2)) - 1)
            last = place + ((k - 1) * ld + far if across else far * ld + k - 1)
            assert far >= size - 1 and last < plan.length
    places = {int(p): int(r) for _, r, _, p in plan.places}
    for _, to_gradient, c, _, _, _, m, *_ in plan.products.tolist():
        if not to_gradient:
            places[c] = m
    ordered = sorted(places)
    assert all(p + places[p] * ld <= q for p, q in zip(ordered, [*ordered[1:], plan.length]))
    assert len(places) == max(2 * (len(dims) - 1) - 1, 1)
