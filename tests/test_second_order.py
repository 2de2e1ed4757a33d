"""Hessian-vector products against central differences of the gradient; the sharpness of a balanced exact fit."""

import numpy as np
import pytest
from conftest import LOSSES, OPERATORS, random_mask

from fastdmf.chain import Layout
from fastdmf.operators import EntryMask
from fastdmf.problem import Problem, dot
from fastdmf.second_order import hessian_vector, sharpness

N1, N2 = 9, 7
CHAINS = {
    1: (N2, N1),
    2: (N2, 5, N1),
    3: (N2, 6, 4, N1),
    4: (N2, 5, 8, 3, N1),
    5: (N2, 6, 5, 4, 8, N1),
}


def _problem(op, dims, rng, backend, *, loss="squared", weighted=True, symmetric=False, l2=0.0, dtype=np.float64):
    """A batch of two with weights of their own and shared data; its l2 term is no part of the Hessian."""
    layout = Layout(dims, symmetric)
    y, weights = rng.standard_normal((1, op.size)), rng.random((2, op.size)) if weighted else None
    bound = op.bind(backend, y, weights=weights, loss=LOSSES[loss], dtype=dtype, width=layout.width)
    return Problem(bound, layout, 2, loss="mse/2", l2=l2)


def _normal(problem, rng, scale=1.0, dtype=np.float64):
    """Return a buffer of normal numbers, zero in the gaps."""
    x = problem.layout.allocate(problem.batch, dtype)
    for view in problem.layout.stored(x):
        view[:] = scale * rng.standard_normal(view.shape)
    return x


def _gradient(problem, x):
    grad = np.zeros_like(x)
    problem.evaluate(x, grad)
    return grad


def _check(problem, x, rng):
    """Move one factor at a time: an error in one must not hide behind the others."""
    layout, worst = problem.layout, 0.0
    for j in range(len(layout.stored_shapes)):
        v = np.zeros_like(x)
        layout.stored(v)[j][:] = rng.standard_normal(layout.stored(v)[j].shape)
        hv, errors = hessian_vector(problem, x, v), []
        for step in (1e-5, 1e-6):
            difference = (_gradient(problem, x + step * v) - _gradient(problem, x - step * v)) / (2 * step)
            away = np.linalg.norm(difference - problem.l2 * v - hv, axis=1)
            errors.append(away / np.linalg.norm(difference, axis=1))
        worst = max(worst, np.min(errors, axis=0).max())
    print(f"relative error against central differences {worst:.1e}")
    assert worst < 1e-8


@pytest.mark.parametrize("depth", CHAINS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OPERATORS)
def test_derivative_of_the_gradient(name, loss, depth, rng, backend):
    op = OPERATORS[name](N1, N2, 40, rng)
    problem = _problem(op, CHAINS[depth], rng, backend, loss=loss, weighted=depth % 2 == 0, l2=0.3)
    if depth == 1 and loss == "absolute":  # piecewise linear
        assert not hessian_vector(problem, _normal(problem, rng), _normal(problem, rng)).any()
    else:
        _check(problem, _normal(problem, rng, 0.8), rng)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("width", "loss"), [(3, "squared"), (8, "huber"), (11, "squared")])
@pytest.mark.parametrize("name", OPERATORS)
def test_symmetric_chain(name, width, loss, weighted, rng, backend):
    op = OPERATORS[name](8, 8, 40, rng)
    problem = _problem(op, (8, width, 8), rng, backend, loss=loss, weighted=weighted, symmetric=True)
    _check(problem, _normal(problem, rng, 0.8), rng)


@pytest.mark.parametrize("name", ["rank_one", "scipy"])
def test_a_loss_that_depends_on_the_data(name, rng, backend):
    """The slope sees each measurement's own y."""
    op = OPERATORS[name](8, 8, 40, rng)
    problem = _problem(op, (8, 5, 8), rng, backend, symmetric=True)
    x = _normal(problem, rng, 0.5)
    delta = np.median(np.abs(problem.bound.forward(*problem.halves(x))))
    data = {"weights": problem.bound.weights, "loss": ("truncated_prediction", delta), "width": 5}
    bound = op.bind(backend, rng.standard_normal((2, 40)), **data)
    _check(Problem(bound, problem.layout, 2, loss="mse/2"), x, rng)


@pytest.mark.parametrize(
    ("n1", "n2", "count", "width"), [(600, 30, 5000, 5), (40, 30, 1199, 9), (700, 300, 30_000, 16)]
)
def test_routes_of_the_mask(n1, n2, count, width, rng, backend):
    """Chains that are not evaluated in one call, nearly full masks, several ranges of rows."""
    problem = _problem(random_mask(n1, n2, count, rng, empty=False), (n2, width, n1), rng, backend)
    _check(problem, _normal(problem, rng, 0.3), rng)


@pytest.mark.parametrize("depth", CHAINS)
def test_symmetric_and_linear(depth, rng, backend):
    """<u, H v> = <v, H u> and H (2 u - 3 v) = 2 H u - 3 H v; the gaps between the factors stay zero."""
    problem = _problem(OPERATORS["mask"](N1, N2, 40, rng), CHAINS[depth], rng, backend)
    x, u, v = (_normal(problem, rng) for _ in range(3))
    hu, hv, both = (hessian_vector(problem, x, one) for one in (u, v, 2 * u - 3 * v))
    np.testing.assert_allclose(dot(u, hv), dot(v, hu), rtol=1e-12)
    np.testing.assert_allclose(both, 2 * hu - 3 * hv, rtol=1e-10, atol=1e-12)
    gaps = np.ones_like(x)
    for view in problem.layout.stored(gaps):
        view[:] = 0
    assert not (hu * gaps).any() and (dot(hu, hu) > 0).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_a_slice_is_its_single_run_and_float32_is_close(name, rng, backend):
    op = OPERATORS[name](N1, N2, 40, rng)
    problem = _problem(op, CHAINS[3], rng, backend, loss="huber")
    x, v = _normal(problem, rng), _normal(problem, rng)
    hv = hessian_vector(problem, x, v)
    for b in range(2):
        alone = hessian_vector(problem.take(np.array([b])), x[b : b + 1], v[b : b + 1])
        np.testing.assert_allclose(hv[b], alone[0], rtol=1e-12, atol=1e-14)
    weights = problem.bound.weights.astype(np.float32)
    data = {"weights": weights, "loss": LOSSES["huber"], "dtype": np.float32, "width": 4}
    single = Problem(op.bind(backend, problem.bound.y.astype(np.float32), **data), problem.layout, 2, loss="mse/2")
    rough = hessian_vector(single, x.astype(np.float32), v.astype(np.float32))
    assert rough.dtype == np.float32
    assert np.linalg.norm(rough - hv) < 1e-5 * np.linalg.norm(hv)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("name", ["mask", "gaussian"])
def test_the_point_evaluated_last_stays(name, depth, rng, backend):
    """What a rule reads off the problem does not change through products at that point and at others."""
    problem = _problem(OPERATORS[name](N1, N2, 40, rng), CHAINS[depth], rng, backend)
    x, elsewhere, v = (_normal(problem, rng) for _ in range(3))
    start, u = rng.standard_normal((2, N2)), rng.standard_normal((2, N1))
    problem.evaluate(x, np.zeros_like(x))

    def read():
        return problem.leading_singular(start.copy(), 3), problem.leading_gradient(u.copy(), start.copy(), 3)

    before = read()
    problem.evaluate(x, np.zeros_like(x))
    for point in (x, elsewhere):
        hessian_vector(problem, point, v)
    np.testing.assert_array_equal(before, read())


def _exact_fit(depth, spectra, backend, dims, l2=0.0):
    """Balanced factors of one W* for each spectrum, and the problem ||W - W*||_F^2 / 2 (+ l2)."""
    n1, n2 = dims[-1], dims[0]
    layout, rng = Layout(dims), np.random.default_rng(1)
    x, targets = layout.allocate(len(spectra), np.float64), []
    for b, s in enumerate(spectra):
        u, v = (np.linalg.qr(rng.standard_normal((n, len(s))))[0] for n in (n1, n2))
        factors = []
        for j in range(1, depth + 1):
            left = u if j == depth else np.eye(dims[j], len(s))
            right = v if j == 1 else np.eye(dims[j - 1], len(s))
            factors.append((left * np.array(s) ** (1 / depth)) @ right.T)
        layout.write(x, factors, b)
        targets.append((u * s) @ v.T)
    rows, cols = np.divmod(np.arange(n1 * n2), n2)
    bound = EntryMask(rows, cols, (n1, n2)).bind(backend, np.reshape(targets, (len(spectra), -1)), width=layout.width)
    return Problem(bound, layout, len(spectra), loss="sse/2", l2=l2), x


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_sharpness_of_a_balanced_exact_fit(depth, backend):
    """N s1^(2 - 2/N) by Lanczos, and with l2 that much more; a slice each for two spectra."""
    dims = (6, *[4] * (depth - 1), 8)
    for l2 in (0.0, 0.25):
        problem, x = _exact_fit(depth, [(3.0, 1.0, 0.5), (0.7, 0.6)], backend, dims, l2)
        expected = depth * np.array([3.0, 0.7]) ** (2 - 2 / depth) + l2
        np.testing.assert_allclose(sharpness(problem, x), expected, rtol=1e-10)


def test_sharpness_of_few_numbers_and_of_any_point(rng, backend):
    """Fewer numbers than ARPACK wants; and a point away from a fit, against the Hessian formed column by column."""
    for depth in (1, 3):  # ARPACK refuses a single number
        problem, x = _exact_fit(depth, [(1.7,)], backend, (1,) * (depth + 1))
        np.testing.assert_allclose(sharpness(problem, x), depth * 1.7 ** (2 - 2 / depth), rtol=1e-12)
    problem = _problem(OPERATORS["rank_one"](N1, N2, 40, rng), CHAINS[3], rng, backend, l2=0.1)
    x = _normal(problem, rng)
    columns = [hessian_vector(problem, x, np.tile(e, (2, 1))) for e in np.eye(x.shape[1])]
    full = np.stack(columns, axis=1) + 0.1 * np.eye(x.shape[1])
    np.testing.assert_allclose(sharpness(problem, x), np.linalg.eigvalsh(full)[:, -1], rtol=1e-10)


def test_sharpness_in_float32(rng, backend):
    op, layout = OPERATORS["gaussian"](N1, N2, 40, rng), Layout(CHAINS[3])
    y, points = rng.standard_normal((1, 40)), {}
    for dtype in (np.float64, np.float32):
        problem = Problem(op.bind(backend, y, dtype=dtype, width=layout.width), layout, 1)
        points[dtype] = sharpness(problem, _normal(problem, np.random.default_rng(2), dtype=dtype))
    np.testing.assert_allclose(points[np.float32], points[np.float64], rtol=1e-5)


def test_sharpness_says_when_it_has_not_converged(rng, backend):
    from scipy.sparse.linalg import ArpackNoConvergence

    problem = _problem(OPERATORS["mask"](40, 30, 300, rng), (30, 20, 40), rng, backend)
    with pytest.raises(ArpackNoConvergence, match="No convergence"):
        sharpness(problem, _normal(problem, rng), steps=1)
