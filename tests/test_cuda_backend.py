"""The solvers on a double of cupy: the same engine, the CUDA kernels emulated, beside the CPU's runs."""

import sys

import cuda_emulator
import cupy_double
import numpy as np
import pytest
from conftest import random_mask

import fastdmf
from fastdmf import backend, cuda

pytestmark = pytest.mark.skipif(not cuda_emulator.AVAILABLE, reason="g++ on Linux is needed to emulate CUDA kernels")


def _forget():
    cuda.find_cuda.cache_clear()
    backend._cuda.cache_clear()


@pytest.fixture
def cupy(monkeypatch):
    """The double in cupy's place, found as a GPU is."""
    monkeypatch.setitem(sys.modules, "cupy", cupy_double.Double())
    _forget()
    yield sys.modules["cupy"]
    _forget()


# --- what is found -----------------------------------------------------------------------------------------------


def test_device_is_found_by_running_a_kernel(cupy):
    assert fastdmf.backend.cuda_report().startswith("available, double, compute capability 9.0")
    assert fastdmf.backend.get_backend("cuda").name == "cuda"
    assert fastdmf.backend.get_backend("auto").name == "cpu"
    assert fastdmf.backend.get_backend("auto", cupy.zeros(3)).name == "cuda"


# --- descent -----------------------------------------------------------------------------------------------------


def problem(kind, rng, n1=13, n2=9):
    truth = rng.standard_normal((n1, 2)) @ rng.standard_normal((2, n2))
    match kind:
        case "sparse":
            operator = random_mask(n1, n2, 60, rng)
        case "dense":
            operator = random_mask(n1, n2, 70, rng)
        case "gaussian":
            operator = fastdmf.GaussianDense(rng.standard_normal((71, n1, n2)))
        case "seeded":
            operator = fastdmf.GaussianSeeded(5, 71, (n1, n2))
        case "rank_one":
            operator = fastdmf.operators.RankOne(rng.standard_normal((80, n1)), rng.standard_normal((80, n2)))
    return operator, operator.apply(truth)


KINDS = ["sparse", "dense", "gaussian", "seeded", "rank_one"]
# Steps short enough that rounding is not amplified.
RULES = {
    "gd": fastdmf.rules.GradientDescent(lr=2e-3),
    "momentum": fastdmf.rules.Momentum(lr=1e-3, beta=0.8),
    "nesterov": fastdmf.rules.Nesterov(lr=1e-3, beta=0.8),
    "group_rmsprop": fastdmf.rules.GroupRMSprop(lr=0.02, beta=0.95, eps=1e-3),
    "adam": fastdmf.rules.Adam(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6),
    "auto": fastdmf.rules.Auto(),
}


@pytest.fixture(autouse=True)
def small_masks_are_sparse(monkeypatch, request):
    """The sparse route for the masks that are called so, however many of their cells are known."""
    from fastdmf import device_bounds

    if "sparse" in request.node.name:
        monkeypatch.setattr(device_bounds, "_DENSE", 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_first_evaluations_agree(cupy, kind, rule):
    rng = np.random.default_rng(1)
    operator, y = problem(kind, rng)
    settings = {"rule": RULES[rule], "random_state": 0, "max_iter": 50, "check_every": 5, "tol": 1e-14}
    settings |= {"init_scale": 0.1, "on_failure": "ignore", "depth": 3, "width": 5, "l2": 1e-3}
    host = fastdmf.solve(operator, y, **settings)
    device = fastdmf.solve(operator, y, device="cuda", **settings)
    assert device.device == "cuda" and host.device == "cpu"
    for name in ("loss", "objective", "grad_norm", "step_size"):
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=1e-9)
    assert isinstance(device.factors[0], np.ndarray)
