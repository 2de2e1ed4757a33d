"""``recover``, the continuation, and Gauss-Newton in the tangent space."""

import re
import warnings

import numpy as np
import pytest
from conftest import OPERATORS, completion

from fastdmf import DMFSensing, EntryMask, GaussianDense, RankOne, recover
from fastdmf.continuation import Continuation, Schedule
from fastdmf.engine import SolveWarning, Status
from fastdmf.noisy_fit import noisy_fit
from fastdmf.recovery import identified, largest_rank
from fastdmf.tangent import LowRank, Measurements, Tangent, degrees_of_freedom, gauss_newton, ridge_solve, thin_svd


def low_rank(n1, n2, rank, rng):
    """Return a matrix of root mean square 1 and its decomposition."""
    w = rng.standard_normal((n1, rank)) @ rng.standard_normal((rank, n2))
    w /= np.sqrt(np.mean(w**2))
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return w, LowRank(u[:, :rank], s[:rank], vt[:rank].T)


def entries(n1, n2, rank, rho, rng):
    """Return a mask with ``rho`` entries a degree of freedom, and ``rank`` + 1 at least in every row and column."""
    m = int(rho * degrees_of_freedom((n1, n2), rank))
    needed = [rng.permutation(n2)[: rank + 1] + i * n2 for i in range(n1)]
    counts = np.bincount(np.concatenate(needed) % n2, minlength=n2)
    for j in np.flatnonzero(counts <= rank):
        free = np.setdiff1d(np.arange(n1) * n2 + j, np.concatenate(needed))
        needed.append(rng.permutation(free)[: rank + 1 - counts[j]])
    needed = np.concatenate(needed)
    assert len(needed) <= m
    cells = np.concatenate([needed, rng.permutation(np.setdiff1d(np.arange(n1 * n2), needed))[: m - len(needed)]])
    return EntryMask(*np.divmod(rng.permutation(cells), n2), (n1, n2))


def relative(x, truth):
    return np.linalg.norm(x - truth) / np.linalg.norm(truth)


def tangent_matrix(tangent, g):
    """Return T g, formed plainly."""
    c, m, z = tangent.parts(g)
    return tangent.u @ c @ tangent.v.T + m @ tangent.v.T + tangent.u @ z.T


def draw(tangent, rng):
    """Return a random tangent vector."""
    g = rng.standard_normal(tangent.shape)
    _, m, z = tangent.parts(g)
    m -= tangent.u @ (tangent.u.T @ m)
    z -= tangent.v @ (tangent.v.T @ z)
    return g


# ---------------------------------------------------------------- tangent space


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("n1", "n2", "rank"), [(13, 9, 1), (9, 13, 3), (8, 8, 8)])
def test_products_with_tangent_vectors(backend, rng, name, n1, n2, rank):
    operator = OPERATORS[name](n1, n2, 40, rng)
    weights = rng.uniform(0.5, 2, operator.size)
    y = rng.standard_normal(operator.size)
    _, x = low_rank(n1, n2, rank, rng)
    data = Measurements(operator, y, weights, backend)
    tangent = Tangent(data, x)
    g = draw(tangent, rng)
    matrix = tangent_matrix(tangent, g)
    assert np.vdot(g, g) == pytest.approx(np.vdot(matrix, matrix), rel=1e-12), "T is an isometry"
    np.testing.assert_allclose(tangent_matrix(tangent, tangent.point), (x.u * x.s) @ x.v.T, atol=1e-12)
    p, qt = tangent.halves(g)
    np.testing.assert_allclose(p @ qt.T, matrix, atol=1e-12)

    r = operator.apply(matrix) - y
    loss, slope = tangent.residual(g)
    assert loss == pytest.approx(np.sum(weights * r**2) / np.sum(weights * y**2), rel=1e-10)
    other = draw(tangent, rng)
    expected = np.vdot(operator.apply(tangent_matrix(tangent, other)), weights * r)
    assert np.vdot(other, slope) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    expected = np.vdot(operator.apply(tangent_matrix(tangent, other)), weights * operator.apply(matrix))
    assert np.vdot(other, tangent.normal(g)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    if 2 * rank <= min(n1, n2):
        back = tangent.svd(g)
        np.testing.assert_allclose((back.u * back.s) @ back.v.T, matrix, atol=1e-11)


def test_ridge_solve_is_the_dense_solution(backend, rng):
    mask = entries(12, 10, 2, 1.6, rng)
    _, x = low_rank(12, 10, 2, rng)
    tangent = Tangent(Measurements(mask, rng.standard_normal(mask.size), None, backend), x)
    ridge = rng.uniform(0.1, 2, tangent.shape)
    b = tangent.normal(draw(tangent, rng))
    columns = [tangent.normal(e.reshape(tangent.shape)).ravel() for e in np.eye(b.size)]
    # Orthogonality holds for the whole iteration when the ridge is the same along each column of M and of Z.
    ridge[2:14], ridge[14:] = ridge[2], ridge[14]
    dense = np.linalg.solve(np.array(columns).T + np.diag(ridge.ravel()), b.ravel())
    found, iterations = ridge_solve(tangent, b, ridge, 1e-13, 500)
    assert 0 < iterations < 500
    np.testing.assert_allclose(found.ravel(), dense, atol=1e-10)
    capped, iterations = ridge_solve(tangent, b, ridge, 1e-13, 3)
    assert iterations == 3
    assert not np.allclose(capped.ravel(), dense, atol=1e-6)


def test_thin_svd(rng):
    left, right = rng.standard_normal((9, 3)), rng.standard_normal((3, 7))
    x = thin_svd(left, right)
    np.testing.assert_allclose((x.u * x.s) @ x.v.T, left @ right, atol=1e-12)
    np.testing.assert_allclose(x.u.T @ x.u, np.eye(3), atol=1e-12)
    first, second = x.balanced()
    np.testing.assert_allclose(second @ first, left @ right, atol=1e-12)
    np.testing.assert_allclose(first @ first.T, second.T @ second, atol=1e-12)


def test_gauss_newton_converges_quadratically(backend, rng):
    w, x = low_rank(40, 30, 3, rng)
    mask = entries(40, 30, 3, 2.0, rng)
    data = Measurements(mask, w[mask.rows, mask.cols], None, backend)
    start = thin_svd(x.u * x.s + 0.05 * rng.standard_normal(x.u.shape), x.v.T)
    found, residual = gauss_newton(data, start, 20, 1e-13, 300)
    assert residual < 1e-13
    assert relative((found.u * found.s) @ found.v.T, w) < 1e-12


def test_gauss_newton_finds_the_penalised_minimum(backend, rng):
    """Along the tangent space the gradients of data term and penalty cancel, until steps gain too little (1 %)."""
    w, _ = low_rank(30, 20, 2, rng)
    mask = entries(30, 20, 2, 2.5, rng)
    y = w[mask.rows, mask.cols] + 0.3 * rng.standard_normal(mask.size)
    data = Measurements(mask, y, rng.uniform(0.5, 1.5, mask.size), backend)
    u, s, vt = np.linalg.svd(mask.adjoint(y))
    start = LowRank(u[:, :2], s[:2], vt[:2].T)
    x, _ = gauss_newton(data, start, 60, 1e-12, 500, penalty=0.05)
    tangent = Tangent(data, x)
    loss, slope = tangent.residual(tangent.point)
    gradient = slope + 0.05 * data.curvature * tangent.point
    assert np.linalg.norm(gradient) < 1e-2 * np.linalg.norm(slope)
    assert 0.01 < loss < 0.5


def test_continuation_step_minimises_the_reweighted_form(backend, rng):
    """X = T g + A*(y - A T g) meets the entries and is W A* (A W A*)^-1 y for the weight W of the formula."""
    w, _ = low_rank(12, 10, 2, rng)
    mask = entries(12, 10, 2, 1.5, rng)
    y = w[mask.rows, mask.cols]
    data = Measurements(mask, y, None, backend)
    path = Continuation(data, Schedule(), rng)
    for _ in range(12):
        path.step()
    x, eps = path.x, path.eps
    progress = np.log(eps / path._start) / np.log(1e-4)
    q = 0.5 + 0.5 * progress
    r = max(int((x.s > eps).sum()), 1)
    a = np.maximum(x.s[:r] / eps, 1.001) ** q
    u, v = x.u[:, :r], x.v[:, :r]
    left = (u * a) @ u.T + np.eye(12) - u @ u.T
    right = (v * a) @ v.T + np.eye(10) - v @ v.T
    form = np.kron(left, right)
    a_matrix = np.eye(120)[mask.rows * 10 + mask.cols]
    exact = (form @ a_matrix.T @ np.linalg.solve(a_matrix @ form @ a_matrix.T, y)).reshape(12, 10)
    path.step()
    assert path.exponent == pytest.approx(q)
    expected = np.linalg.svd(exact, compute_uv=False)
    np.testing.assert_allclose(path.x.s[:2], expected[:2], rtol=2e-2)


@pytest.mark.parametrize("shape", [(60, 50), (300, 30)])
def test_both_ways_to_decompose_agree(backend, rng, shape, monkeypatch):
    w, _ = low_rank(*shape, 2, rng)
    mask = entries(*shape, 2, 2.0, rng)
    found = []
    for cells in (0, 1000):
        monkeypatch.setattr("fastdmf.continuation._FULL_CELLS", cells)
        data = Measurements(mask, w[mask.rows, mask.cols], None, backend)
        path = Continuation(data, Schedule(), np.random.default_rng(0))
        for _ in range(10):
            path.step()
        found.append(path.x.s)
    np.testing.assert_allclose(*found, rtol=1e-8)


# ---------------------------------------------------------------- recover


@pytest.mark.parametrize(
    ("n1", "n2", "rank", "rho"), [(100, 100, 5, 1.3), (60, 90, 3, 1.5), (30, 20, 1, 2), (80, 80, 8, 2)]
)
def test_exact_from_few_entries(rng, n1, n2, rank, rho):
    w, _ = low_rank(n1, n2, rank, rng)
    mask = entries(n1, n2, rank, rho, rng)
    solution = recover(mask, w[mask.rows, mask.cols], random_state=0, on_failure="ignore")
    assert solution.status is Status.EXACT
    assert solution.rank == rank
    assert relative(solution.matrix(), w) < 1e-10
    assert solution.residual < 1e-10
    assert solution.noise == 0
    first, second = solution.factors
    assert first.shape == (rank, n2)
    np.testing.assert_allclose(first @ first.T, second.T @ second, atol=1e-10 * np.linalg.norm(first) ** 2)


def test_the_papers_instance():
    """2000 entries of 100 x 100 at rank 5: descent stops at 4e-3 relative error, this at the rounding."""
    w, mask, y = completion(0)
    solution = recover(mask, y, random_state=0)
    assert solution.status is Status.EXACT
    assert relative(solution.matrix(), w) < 1e-12


def test_ill_conditioned(rng):
    left, right = (np.linalg.qr(rng.standard_normal((80, 4)))[0] for _ in range(2))
    w = (left * 100.0 ** -np.linspace(0, 1, 4)) @ right.T
    mask = entries(80, 80, 4, 1.6, rng)
    solution = recover(mask, w[mask.rows, mask.cols], random_state=0)
    assert solution.status is Status.EXACT
    assert relative(solution.matrix(), w) < 1e-10


@pytest.mark.parametrize("kind", ["dense", "rank one", "psd"])
def test_sensing(rng, kind):
    n, rank = 24, 2
    w, _ = low_rank(n, n, rank, rng)
    m = int(1.5 * degrees_of_freedom((n, n), rank))
    if kind == "dense":
        operator = GaussianDense(rng.standard_normal((m, n, n)))
    elif kind == "rank one":
        operator = RankOne(rng.standard_normal((m, n)), rng.standard_normal((m, n)))
    else:
        u = rng.standard_normal((n, rank))
        w, operator = u @ u.T, RankOne(rng.standard_normal((m, n)), rng.standard_normal((m, n)))
    solution = recover(operator, operator.apply(w), random_state=0)
    assert solution.status is Status.EXACT
    assert relative(solution.matrix(), w) < 1e-10


def test_units_and_order_do_not_matter(rng):
    w, _ = low_rank(50, 40, 3, rng)
    mask = entries(50, 40, 3, 1.8, rng)
    y = w[mask.rows, mask.cols]
    one = recover(mask, y, random_state=0)
    large = recover(mask, 1e6 * y, random_state=0)
    assert relative(large.matrix() / 1e6, one.matrix()) < 1e-12
    order = rng.permutation(mask.size)
    other = recover(mask.restrict(order), y[order], random_state=0)
    assert relative(other.matrix(), one.matrix()) < 1e-12


def test_bits_do_not_depend_on_threads(rng):
    w, _ = low_rank(50, 40, 3, rng)
    mask = entries(50, 40, 3, 1.6, rng)
    y = w[mask.rows, mask.cols]
    one, two = (recover(mask, y, random_state=0, n_threads=k).matrix() for k in (1, 2))
    assert (one == two).all()


def test_float32_data_are_exact_at_their_precision(rng):
    w, _ = low_rank(60, 60, 3, rng)
    mask = entries(60, 60, 3, 2.5, rng)
    solution = recover(mask, w[mask.rows, mask.cols].astype(np.float32), random_state=0)
    assert solution.status is Status.EXACT
    assert solution.factors[0].dtype == np.float64
    assert relative(solution.matrix(), w) < 1e-6


def test_little_noise_is_noise(rng):
    w, _ = low_rank(60, 60, 3, rng)
    mask = entries(60, 60, 3, 2.5, rng)
    y = w[mask.rows, mask.cols] + 1e-5 * rng.standard_normal(mask.size)
    solution = recover(mask, y, random_state=0)
    assert solution.status is Status.NOISE_LEVEL
    assert solution.n_eval < 20_000
    assert relative(solution.matrix(), w) < 2e-3


def test_noise_is_recognised_and_its_level(backend, rng):
    w, x = low_rank(80, 80, 3, rng)
    mask = entries(80, 80, 3, 2.5, rng)
    y = w[mask.rows, mask.cols] + 0.05 * rng.standard_normal(mask.size)
    solution = recover(mask, y, random_state=0)
    assert solution.status is Status.NOISE_LEVEL
    assert solution.rank == 3
    assert solution.noise == pytest.approx(0.05, rel=0.1)
    assert 0.04 < solution.held_out < 0.12
    data = Measurements(mask, y, None, backend)
    oracle, _ = gauss_newton(data, x, 60, 1e-12, 1000)
    ratio = relative(solution.matrix(), w) / relative((oracle.u * oracle.s) @ oracle.v.T, w)
    assert ratio < 1.1
    assert recover(mask, y, noise=True, random_state=0).status is Status.NOISE_LEVEL
    assert recover(mask, y, noise=False, random_state=0, on_failure="ignore").status is Status.NOT_IDENTIFIED


def test_weights(backend, rng):
    """Weights of zero leave entries out; heavy ones count as repeated measurements."""
    w, x = low_rank(60, 50, 2, rng)
    mask = entries(60, 50, 2, 3.0, rng)
    y = w[mask.rows, mask.cols]
    weights = np.ones(mask.size)
    wrong = rng.permutation(mask.size)[:40]
    y[wrong] += 5
    weights[wrong] = 0
    solution = recover(mask, y, weights=weights, random_state=0)
    assert solution.status is Status.EXACT
    assert relative(solution.matrix(), w) < 1e-10

    deviation = np.where(rng.random(mask.size) < 0.5, 0.02, 0.3)
    y = w[mask.rows, mask.cols] + deviation * rng.standard_normal(mask.size)
    errors = [
        relative(recover(mask, y, weights=k, noise=True, random_state=0).matrix(), w) for k in (None, deviation**-2.0)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_pure_noise_is_not_identified(rng):
    mask = entries(50, 50, 2, 2.0, rng)
    with pytest.warns(SolveWarning, match="do not determine"):
        solution = recover(mask, rng.standard_normal(mask.size), random_state=0)
    assert solution.status is Status.NOT_IDENTIFIED
    assert solution.held_out > 0.8


def test_fits_that_are_not_determined_are_no_certificates(backend, rng):
    """A row with fewer entries than the rank: met to the last digit, and not determined."""
    w, x = low_rank(40, 40, 3, rng)
    mask = entries(40, 40, 3, 2.5, rng)
    keep = np.ones(mask.size, bool)
    keep[np.flatnonzero(mask.rows == 0)[2:]] = False
    mask = mask.restrict(np.flatnonzero(keep))
    assert not identified(Measurements(mask, w[mask.rows, mask.cols], None, backend), x, rng)
    with pytest.warns(SolveWarning) as warned:
        solution = recover(mask, w[mask.rows, mask.cols], random_state=0)
    assert solution.status is Status.NOT_IDENTIFIED
    texts = [str(w.message) for w in warned]
    assert any("NOT_IDENTIFIED" in text for text in texts)
    assert any(re.search(r"1 rows and \d+ columns hold at most 3 entries", text) for text in texts)
    assert relative(solution.matrix()[1:], w[1:]) < 1e-8, "the other rows are determined"


def test_identified(backend, rng):
    w, x = low_rank(40, 40, 2, rng)
    mask = entries(40, 40, 2, 1.6, rng)
    assert identified(Measurements(mask, w[mask.rows, mask.cols], None, backend), x, rng)


def test_held_out_entries_spare_short_rows(rng):
    mask = EntryMask(*np.nonzero(rng.random((60, 50)) < 0.16), (60, 50))
    rows, cols = mask.coverage()
    held = mask.hold_out(0.1, rng)
    assert len(held) == round(0.1 * mask.size)
    assert (np.diff(held) > 0).all()
    assert (rows[mask.rows[held]] > 6).all()
    assert (cols[mask.cols[held]] > 6).all()
    thin = EntryMask(np.arange(20), np.arange(20), (20, 20))
    assert len(thin.hold_out(0.25, rng)) == 5
    gaussian = GaussianDense(rng.standard_normal((20, 3, 3)))
    assert len(gaussian.hold_out(0.25, rng)) == 5
    assert [set(counts.tolist()) for counts in gaussian.coverage()] == [{20}, {20}]


def test_noisy_fit_keeps_the_descent_where_that_is_better(backend, rng):
    """With the rank capped far below the truth only the descent can predict."""
    w, _ = low_rank(50, 50, 4, rng)
    mask = entries(50, 50, 4, 3.0, rng)
    data = Measurements(mask, w[mask.rows, mask.cols], None, backend)
    capped, error, credible = noisy_fit(data, 1, 0.1, np.random.default_rng(0))
    assert capped.rank > 1
    assert error < 0.3
    assert credible


def test_degrees_of_freedom():
    assert degrees_of_freedom((100, 100), 5) == 975
    assert largest_rank((100, 100), 2000) == 10
    assert largest_rank((100, 100), 150) == 0
    assert largest_rank((4, 3), 12) == 2
    assert largest_rank((4, 3), 13) == 3


@pytest.mark.parametrize(("n1", "n2", "rank"), [(20, 15, 9), (6, 6, 3), (5, 3, 1)])
def test_ranks_beyond_half_of_a_matrix_that_is_all_known(rng, n1, n2, rank):
    w, _ = low_rank(n1, n2, rank, rng)
    mask = EntryMask(*np.nonzero(np.ones((n1, n2))), (n1, n2))
    solution = recover(mask, w[mask.rows, mask.cols], noise=False, random_state=0)
    assert solution.status is Status.EXACT
    assert solution.rank == rank
    assert relative(solution.matrix(), w) < 1e-10


def test_history_callback_and_stop(rng):
    w, _ = low_rank(40, 40, 2, rng)
    mask = entries(40, 40, 2, 1.5, rng)
    y = w[mask.rows, mask.cols]
    seen = []
    solution = recover(mask, y, callback=lambda progress: seen.append(progress.values), random_state=0)
    assert len(seen) == len(solution.history["iteration"])
    eps, exponent = solution.history["eps"], solution.history["exponent"]
    running = ~np.isnan(eps)
    assert solution.history["loss"][-1] == solution.residual**2 or solution.history["loss"][-1] < 1e-20
    assert (np.diff(eps[running]) < 0).all()
    assert exponent[running][0] == 0.5
    assert (np.diff(exponent[running][1:]) > 0).all()
    stopped = recover(mask, y, callback=lambda progress: progress.iteration >= 3, random_state=0)
    assert stopped.status is Status.STOPPED
    assert stopped.n_iter == 3
    assert stopped.matrix().shape == (40, 40)

    def interrupt(progress):
        if progress.iteration == 2:
            raise KeyboardInterrupt

    interrupted = recover(mask, y, callback=interrupt, random_state=0, on_failure="ignore")
    assert interrupted.status is Status.INTERRUPTED
    assert np.isfinite(interrupted.matrix()).all()


def test_high_effort_tries_more(rng):
    mask = entries(20, 20, 2, 1.1, rng)
    y = rng.standard_normal(mask.size)
    runs = [recover(mask, y, noise=False, effort=e, random_state=0, on_failure="ignore") for e in ("normal", "high")]
    assert runs[1].n_iter > 1.5 * runs[0].n_iter


BAD = {
    "operator must be a fastdmf operator": {"operator": np.eye(3)},
    "noise must be": {"noise": "some"},
    "effort must be": {"effort": 3},
    "on_failure must be": {"on_failure": "raise"},
    "tol must be": {"tol": 0},
    "validation must be a number": {"validation": 0},
    "validation must be a fraction": {"validation": 1.5},
    "max_rank must be": {"max_rank": 0},
    "y has 3 measurements": {"y": np.ones(3)},
    "y contains NaN": {"y": np.full(60, np.nan)},
    "y is zero everywhere": {"y": np.zeros(60)},
    "weights must not be negative": {"weights": -np.ones(60)},
    "weights are zero everywhere": {"weights": np.zeros(60)},
    "random_state must hold": {"random_state": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    rng = np.random.default_rng(0)
    mask = EntryMask(*np.divmod(rng.permutation(100)[:60], 10), (10, 10))
    arguments = {"operator": mask, "y": rng.standard_normal(60), **BAD[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        recover(arguments.pop("operator"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize("max_rank", [None, 3])
def test_too_few_measurements(max_rank):
    with pytest.raises(ValueError, match="operator has 5 measurements, too few for the 19 degrees of freedom"):
        recover(EntryMask(np.arange(5), np.arange(5), (10, 10)), np.ones(5), max_rank=max_rank)


def test_max_rank_is_kept(rng):
    w, _ = low_rank(40, 40, 3, rng)
    mask = entries(40, 40, 3, 2.0, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        solution = recover(mask, w[mask.rows, mask.cols], max_rank=2, noise=False, random_state=0)
    assert solution.status is not Status.EXACT
    assert solution.rank <= 2


def test_measurements_of_nothing_are_left_out():
    """Matrices that are zero; and data whose only number is held out, or all of them."""
    rng = np.random.default_rng(0)
    truth = np.outer(rng.standard_normal(6), rng.standard_normal(5))
    a = rng.standard_normal((50, 6, 5))
    a[::7] = 0
    y = np.einsum("mij,ij->m", a, truth)
    solution = recover(GaussianDense(a), y, random_state=0)
    assert solution.status is Status.EXACT and np.linalg.norm(solution.matrix() - truth) < 1e-10
    with pytest.raises(ValueError, match="operator measures nothing: all of its matrices are zero"):
        recover(GaussianDense(np.zeros((9, 3, 2))), np.ones(9))
    with pytest.raises(ValueError, match="operator has 1 measurements, too few"):
        recover(GaussianDense(np.eye(1, 10, 5).reshape(5, 2), (1, 2)), np.array([0, 0, 1.0, 0, 0]))
    spike = np.zeros(len(y))
    spike[3] = 1.0
    for seed in range(4):  # the spike is held out or not
        found = recover(GaussianDense(a), spike, noise=True, random_state=seed, on_failure="ignore")
        assert found.status is not Status.EXACT and np.isfinite(found.matrix()).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_data_without_squares_are_recovered(scale):
    """Numbers whose squares are no numbers of float64."""
    truth, op, y = completion(0, n=20, rank=1, count=150)
    solution = recover(op, scale * y, random_state=0)
    assert solution.status is Status.EXACT
    np.testing.assert_allclose(solution.matrix() / scale, truth, atol=1e-10 * np.abs(truth).max())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_unit_of_the_measurements_does_not_matter(scale):
    """Neither to the descent, whose least step once depended on it, nor to recovery."""
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 10))
    a = rng.standard_normal((90, 12, 10))
    y = np.einsum("mij,ij->m", a, truth)
    model = DMFSensing(shape=(12, 10), solver="descent", random_state=0).fit(scale * a, scale * y)
    assert np.linalg.norm(model.matrix_ - truth) < 0.02 * np.linalg.norm(truth)
    solution = recover(GaussianDense(scale * a), scale * y, random_state=0)
    assert solution.status is Status.EXACT and np.linalg.norm(solution.matrix() - truth) < 1e-10 * np.linalg.norm(truth)
