"""Gradients against central differences in float64, and what the rules read off a problem."""

import numpy as np
import pytest
from conftest import LOSSES, OPERATORS

from fastdmf.chain import Layout
from fastdmf.problem import Problem, dot

N1, N2 = 9, 7
CHAINS = {
    1: (N2, N1),
    2: (N2, 5, N1),
    3: (N2, 6, 4, N1),
    4: (N2, 5, 8, 3, N1),
    5: (N2, 6, 5, 4, 8, N1),
}


def _problem(name, loss, dims, rng, backend, *, weighted, l2, normalisation, symmetric=False, batch=2):
    n1, n2 = dims[-1], dims[0]
    op = OPERATORS[name](n1, n2, 40, rng)
    y = rng.standard_normal((1, op.size))
    weights = rng.random((batch, op.size)) if weighted else None
    layout = Layout(dims, symmetric)
    bound = op.bind(backend, y, weights=weights, loss=LOSSES[loss], dtype=np.float64, width=layout.width)
    return Problem(bound, layout, batch, loss=normalisation, l2=l2)


def _check_gradient(problem, rng, scale):
    layout, batch = problem.layout, problem.batch
    x = layout.allocate(batch, np.float64)
    for view in layout.stored(x):
        view[:] = scale * rng.standard_normal(view.shape)
    grad, scratch = np.full_like(x, np.nan), np.full_like(x, np.nan)
    grad[:] = 0
    for view in layout.stored(grad):
        view[:] = np.nan
    problem.evaluate(x, grad)
    for j in range(len(layout.stored_shapes)):  # one factor at a time: an error in one must not hide in the sum
        direction = np.zeros_like(x)
        layout.stored(direction)[j][:] = rng.standard_normal(layout.stored(direction)[j].shape)
        expected = dot(grad, direction)
        errors = []
        for step in (1e-4, 1e-5):
            _, up = problem.evaluate(x + step * direction, scratch)
            _, down = problem.evaluate(x - step * direction, scratch)
            numeric = (up - down) / (2 * step)
            errors.append(np.abs(numeric - expected) / np.abs(expected))
        assert (np.min(errors, axis=0) < 1e-6).all(), (j, errors)
        print(f"factor {j}: relative error against central differences {np.min(errors, axis=0).max():.1e}")


@pytest.mark.parametrize("depth", CHAINS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradient(name, loss, depth, rng, backend):
    problem = _problem(name, loss, CHAINS[depth], rng, backend, weighted=depth % 2 == 0, l2=0.3, normalisation="mse")
    _check_gradient(problem, rng, 0.8)


@pytest.mark.parametrize("normalisation", ["mse", "mse/2", "sse", "sse/2"])
def test_normalisations(normalisation, rng, backend):
    problem = _problem("mask", "squared", CHAINS[3], rng, backend, weighted=True, l2=0.0, normalisation=normalisation)
    _check_gradient(problem, rng, 0.8)
    x = problem.layout.allocate(2, np.float64)
    x += rng.standard_normal(x.shape)
    losses, objective = problem.evaluate(x, np.full_like(x, np.nan))
    w = problem.bound.weights.sum(axis=1)
    factor = {"mse": 1 / w, "mse/2": 0.5 / w, "sse": 1, "sse/2": 0.5}[normalisation]
    np.testing.assert_allclose(objective, factor * losses, rtol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("width", "loss"), [(3, "squared"), (8, "huber"), (11, "truncated"), (8, "absolute")])
@pytest.mark.parametrize("name", OPERATORS)
def test_symmetric_gradient(name, width, loss, weighted, rng, backend):
    problem = _problem(
        name, loss, (8, width, 8), rng, backend, weighted=weighted, l2=0.1, normalisation="sse", symmetric=True
    )
    _check_gradient(problem, rng, 0.8)


@pytest.mark.parametrize("name", ["mask", "gaussian"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_spectral_norms(name, depth, rng, backend):
    """Power iterations reach ||W||_2 and ||G||_2, and the probe agrees with G."""
    problem = _problem(name, "huber", CHAINS[depth], rng, backend, weighted=True, l2=0.0, normalisation="mse")
    layout = problem.layout
    x = layout.allocate(2, np.float64)
    for view in layout.stored(x):
        view[:] = rng.standard_normal(view.shape)
    p, qt = (a.copy() for a in problem.halves(x))
    w = p @ qt.swapaxes(1, 2)
    g = np.empty_like(w)
    problem.bound.loss_and_adjoint(w, g)
    u, v, right = (rng.standard_normal((2, n)) for n in (N1, N2, N2))
    gv, gu = np.einsum("bij,bj->bi", g, v), np.einsum("bij,bi->bj", g, u)
    probe = (u.copy(), v.copy())
    problem.evaluate(x, np.full_like(x, np.nan), probe)
    np.testing.assert_allclose(probe[0], gv, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(probe[1], gu, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(problem.leading_singular(right, 400), np.linalg.norm(w, 2, axis=(1, 2)), rtol=1e-9)
    np.testing.assert_allclose(problem.leading_gradient(u, v, 800), np.linalg.norm(g, 2, axis=(1, 2)), rtol=1e-9)
