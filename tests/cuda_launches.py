"""What the tests of the CUDA kernels share: modules that the emulator has compiled, and launches in every order."""

import functools

import cuda_emulator
import numpy as np
import pytest
from cuda_device import ON_DEVICE, Module
from cuda_emulator import ORDERS

from fastdmf.kernels import cuda
from fastdmf.kernels.cuda import slices

emulated = pytest.mark.skipif(
    not (cuda_emulator.AVAILABLE or ON_DEVICE), reason="g++ on Linux is needed to emulate CUDA kernels"
)


@functools.cache
def compiled(family, *options):
    return Module(cuda.source(family), options, name=family)


class Ordered:
    """A module whose launches take turns in one order."""

    def __init__(self, module, order):
        self.module, self.order = module, order

    def launch(self, kernel, grid, block, arguments, *, shared=0):
        self.module.launch(kernel, grid, block, arguments, shared=shared, order=self.order, seed=7)


class Refusing:
    """A module that must not be launched."""

    def launch(self, kernel, grid, block, arguments, *, shared=0):
        raise AssertionError(f"{kernel} was launched")


def nan(*shape, dtype=np.float64):
    return np.full(shape, np.nan, dtype)


def in_every_order(evaluate):
    """Return what ``evaluate`` gives, after a look that all orders of the threads give the same."""
    first, *others = (evaluate(order) for order in ORDERS)
    for other in others:
        for a, b in zip(first, other):
            np.testing.assert_array_equal(a, b)
    return first


def sums(order):
    return Ordered(compiled("slices", *slices.slices_options(np.float64)), order)


def summing(runs, size):
    return [nan(*shape) for shape in slices.slices_scratch_shapes(runs, size)]
