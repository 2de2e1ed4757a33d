"""The CUDA kernels of dense masks and of L-BFGS, emulated: against plain loops, and beside the CPU's."""

import numpy as np
import pytest
from cuda_launches import Ordered, compiled, emulated, in_every_order, nan, summing, sums

from fastdmf.kernels import cpu
from fastdmf.kernels.cuda import dense, lbfgs, slices

DELTA = 0.7


@emulated
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("code", range(4))
@pytest.mark.parametrize(("runs", "cells", "own"), [(1, 1, False), (3, 31, True), (2, 257, False), (2, 8200, True)])
def test_dense_residual(dtype, code, runs, cells, own):
    rng = np.random.default_rng([cells, code])
    x = rng.standard_normal((runs, cells)).astype(dtype)
    y, w = (rng.standard_normal((runs if own else 1, cells)).astype(dtype) for _ in range(2))
    w = np.where(rng.random(w.shape) < 0.5, 0, np.abs(w))
    module = compiled("dense", *dense.dense_options(dtype))

    def evaluate(order):
        g, losses, ranges = x.copy(), nan(runs), dense.dense_ranges(cells)
        terms = nan(runs, ranges), *summing(runs, ranges)
        dense.dense_residual(Ordered(module, order), sums(order), g, losses, y, w, code, DELTA, terms)
        return g, losses

    g, losses = in_every_order(evaluate)
    r = x.astype(float) - y
    a, s = np.abs(r), np.sign(r)
    rho = [r**2, np.where(a <= DELTA, r**2, DELTA * (2 * a - DELTA)), np.minimum(r**2, DELTA**2), a][code]
    psi = [r, np.where(a <= DELTA, r, DELTA * s), np.where(a <= DELTA, r, 0), s / 2][code]
    eps = np.finfo(dtype).eps
    near = np.abs(a - DELTA) < 4 * eps * (1 + np.abs(x)) if code in (1, 2) else np.zeros(a.shape, bool)
    assert not near.any()
    np.testing.assert_allclose(g, w * psi, rtol=4 * eps, atol=8 * eps)
    np.testing.assert_allclose(losses, (w * rho).sum(axis=1), rtol=8 * eps)


class Scratch:
    """What the host's part of L-BFGS asks for, on NumPy."""

    upload = staticmethod(np.array)
    host = staticmethod(np.array)
    empty = staticmethod(lambda shape: np.full(shape, np.nan))
    sums = staticmethod(summing)


def searches(dtype, size, rng):
    """Return memory, search, points and the rest for slices with none, some and all pairs, and one that waits."""
    runs, places = 4, 4
    pairs = rng.standard_normal((runs, 2 * places, size)).astype(dtype)
    newest, held = np.array([0, 1, 3, 2]), np.array([0, 2, 3, 1])
    s, y = pairs[:, :places].astype(float), pairs[:, places:].astype(float)
    y[:] = s + 0.1 * y  # of positive curvature
    pairs[:, places:] = y
    y = pairs[:, places:].astype(float)
    s_y, y_y = np.einsum("bik,bjk->bij", s, y), np.einsum("bik,bjk->bij", y, y)
    x, grad, trial, trial_grad, direction = (rng.standard_normal((runs, size)).astype(dtype) for _ in range(5))
    products = np.einsum("bik,bk->bi", pairs.astype(float), grad)
    memory = pairs, s_y, y_y, products, np.zeros((runs, 2 * places)), np.zeros(runs), newest, held
    search = (
        *(np.zeros(runs), np.array([1.0, 0.4, 1.0, 0.16]), np.ones(runs), np.full(runs, 0.3)),
        *(np.array([0, 1, 0, 2]), np.zeros(runs, int), np.array([True, True, True, False]), np.zeros(runs, bool)),
    )
    return memory, search, (x, grad, trial, trial_grad, direction)


@emulated
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [16, 320, 4160])
@pytest.mark.parametrize("searching", [[True] * 4, [True, False, True, True]])
def test_search_is_the_cpus(dtype, size, searching):
    """A direction, a trial and its judgement, with slices that are accepted, refused and left alone."""
    searching, module = np.array(searching), compiled("lbfgs", *lbfgs.lbfgs_options(dtype))
    moves = compiled("slices", *slices.slices_options(dtype))
    outcomes = []
    for device in (False, True):
        memory, search, points = searches(dtype, size, np.random.default_rng(size))
        x, grad, trial, trial_grad, direction = points
        accepted, far = np.zeros(4, bool), np.array([0.0, 9.0, 0.0, 9.0])
        objectives, settings = (np.ones(4), np.array([-1e9, -1e9, -1e9, 1e9])), (1e-4, 0.1, 1e-8, 0.4, 3, 2)
        first, second = (trial, direction, x, grad), (trial, x, trial_grad, grad)
        rest = objectives, far, searching, settings
        if device:
            head = Ordered(module, "random"), Ordered(moves, "random"), Scratch
            lbfgs.lbfgs_try(*head, memory, search, first, searching)
            lbfgs.lbfgs_judge(*head, accepted, memory, search, second, *rest)
        else:
            cpu.lbfgs_try(memory, search, first, searching)
            cpu.lbfgs_judge(accepted, memory, search, second, *rest)
        outcomes.append((*memory[1:], *search, trial, direction, accepted, memory[0]))
    assert outcomes[0][-2].tolist() == [True, searching[1], True, False]
    for got, expected in zip(*outcomes[::-1]):
        if got.dtype == dtype or got.dtype.kind == "f":
            scale = max(float(np.abs(expected).max()), 1.0)
            np.testing.assert_allclose(got, expected, atol=200 * np.finfo(dtype).eps * scale * np.sqrt(size))
        else:
            np.testing.assert_array_equal(got, expected)


@emulated
def test_memory_that_is_not_held_is_not_read():
    """Rows of no pair may hold anything: their coefficients are zero."""
    rng = np.random.default_rng(0)
    memory, search, (x, grad, trial, _, direction) = searches(np.float64, 32, rng)
    memory[0][0] = np.nan  # holds none
    head = compiled("lbfgs", *lbfgs.lbfgs_options(np.float64)), compiled("slices", *slices.slices_options(np.float64))
    lbfgs.lbfgs_try(*head, Scratch, memory, search, (trial, direction, x, grad), np.ones(4, bool))
    np.testing.assert_allclose(direction[0], -0.3 * grad[0], rtol=1e-15)
    assert np.isfinite(trial).all()
