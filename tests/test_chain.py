"""Layout, products, starting points."""

import numpy as np
import pytest

from fastdmf.chain import INITS, Layout, Sweep, imbalance, initial_factors

CHAINS = [(7, 9), (7, 4, 9), (7, 5, 6, 9), (7, 11, 3, 8, 9), (7, 8, 6, 4, 5, 9), (7, 3, 3, 3, 3, 9)]


def _filled(layout, batch, rng):
    x = layout.allocate(batch, np.float64)
    for view in layout.factors(x):
        view[:] = rng.standard_normal(view.shape)
    return x


@pytest.mark.parametrize("dims", CHAINS)
def test_products_and_storage(dims, rng):
    layout = Layout(dims)
    x = _filled(layout, 3, rng)
    assert x.ctypes.data % 64 == 0 and x.shape == (3, layout.size)
    assert all(offset % 16 == 0 for offset in layout.offsets)
    factors = layout.factors(x)
    assert [f.shape[1:] for f in factors] == list(zip(dims[1:], dims))
    product = factors[0]
    for w in factors[1:]:
        product = w @ product
    if layout.depth > 1:
        p, qt = Sweep(layout, 3, np.float64).products(x)
        assert p.shape[2] == layout.width == min(dims[1:-1])
        np.testing.assert_allclose(p @ qt.swapaxes(1, 2), product, rtol=1e-12, atol=1e-12)
    before = x.copy()
    layout.write(x, [f[1].copy() for f in factors], 2)
    np.testing.assert_array_equal(x[2], before[1])
    np.testing.assert_array_equal(x[:2], before[:2])


def test_the_cut_is_narrow_and_cheap():
    assert Layout((7, 11, 3, 8, 9)).cut == 2
    # Equal widths: every thin product runs along the short side.
    assert Layout((1000, 5, 5, 5, 10)).cut == 1
    assert Layout((10, 5, 5, 5, 1000)).cut == 3


def test_depth_two_is_free_of_copies():
    layout = Layout((6, 4, 5))
    x = layout.allocate(1, np.float64)
    sweep = Sweep(layout, 1, np.float64)
    for array in (*sweep.products(x), *sweep.outputs(x)):
        assert np.shares_memory(array, x) and array.flags.c_contiguous


@pytest.mark.parametrize("dims", CHAINS)
@pytest.mark.parametrize("init", INITS)
def test_inits_have_the_end_to_end_scale(init, dims):
    alpha, layout = 0.02, Layout(dims)
    norms = []
    for seed in range(1 if init == "identity" else 200):
        factors = initial_factors(layout, init, alpha, seed)
        assert [w.shape for w in factors] == list(zip(dims[1:], dims))
        product = factors[0]
        for w in factors[1:]:
            product = w @ product
        norms.append(np.sum(product**2))
    target = alpha**2 * dims[-1]
    if init in ("gaussian", "imbalanced"):  # in the mean; deep products of thin factors have heavy tails
        standard_error = np.std(norms) / np.sqrt(len(norms))
        assert abs(np.mean(norms) - target) < 4 * standard_error
    elif init == "identity":
        assert norms[0] == pytest.approx(alpha**2 * min(dims))
    else:
        np.testing.assert_allclose(norms, target, rtol=1e-10)


def test_imbalanced_factors_differ_threefold_from_end_to_end():
    low, middle, high = (np.std(w) for w in initial_factors(Layout((90, 90, 90, 90)), "imbalanced", 1e-3, 0))
    assert high / low == pytest.approx(3, rel=0.05) and middle / low == pytest.approx(np.sqrt(3), rel=0.05)


def test_inits_differ_in_balance_and_seed():
    layout = Layout((7, 5, 6, 9))
    as_batch = lambda factors: [w[None] for w in factors]  # noqa: E731
    assert imbalance(as_batch(initial_factors(layout, "balanced", 0.3, 0)))[0] < 1e-14
    assert imbalance(as_batch(initial_factors(layout, "gaussian", 0.3, 0)))[0] > 0.01
    square = Layout((6, 6, 6))
    assert imbalance(as_batch(initial_factors(square, "orthogonal", 0.3, 0)))[0] < 1e-14
    for init in ("gaussian", "imbalanced", "orthogonal", "balanced"):
        a, b, c = (initial_factors(layout, init, 0.3, seed)[1] for seed in (1, 1, 2))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("init", INITS)
def test_symmetric_inits(init):
    (u,) = initial_factors(Layout((8, 3, 8), symmetric=True), init, 0.04, 0)
    assert u.shape == (8, 3)
    if init in ("gaussian", "imbalanced"):
        assert 0.2 < np.linalg.norm(u) / np.sqrt(0.04 * 8) < 2
    else:
        np.testing.assert_allclose(u.T @ u, 0.04 * np.eye(3), atol=1e-14)
