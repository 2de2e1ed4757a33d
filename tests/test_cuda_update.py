"""The fused updates, run by the emulator, against one step of the rules of the CPU on real problems."""

import numpy as np
import pytest
from cuda_emulator import ORDERS
from cuda_launches import Ordered, compiled, emulated, nan, summing

from fastdmf.backend import get_backend
from fastdmf.chain import Layout
from fastdmf.kernels.cuda import slices, update
from fastdmf.operators import EntryMask
from fastdmf.problem import Problem
from fastdmf.rules import Adam, GradientDescent, GroupRMSprop, Momentum, Nesterov

pytestmark = emulated

# Settings off their defaults. Momentum and descent have no pow: bit for bit.
RULES = {
    "gd": (GradientDescent(lr=0.3), 0),
    "momentum": (Momentum(lr=0.2, beta=0.7), 0),
    "nesterov": (Nesterov(lr=0.2, beta=0.7), 0),
    "group_rmsprop": (GroupRMSprop(lr=0.05, beta=0.8, eps=1e-3), 4),
    "adam": (Adam(lr=0.02, beta1=0.7, beta2=0.9, eps=1e-4), 4),
}


def problem_of(dtype, runs, dims):
    """Return a problem on a random mask, and a start with numbers in the gaps between factors too."""
    rng = np.random.default_rng([runs, *dims])
    n1, n2 = dims[-1], dims[0]
    rows, cols = np.divmod(rng.choice(n1 * n2, -(-n1 * n2 // 2), replace=False), n2)
    layout, mask = Layout(dims), EntryMask(rows, cols, (n1, n2))
    y = rng.standard_normal((runs, mask.size)).astype(dtype)
    problem = Problem(mask.bind(get_backend("cpu"), y, dtype=np.dtype(dtype), width=layout.width), layout, runs)
    x = layout.allocate(runs, dtype)
    for view in layout.stored(x):
        view[...] = rng.standard_normal(view.shape)
    return problem, x


class Device:
    """What the device holds of a state: copies, and counts of its own."""

    def __init__(self, rule, state, order, steps):
        self.x, self.rule = state.x.copy(), rule
        self.module = Ordered(compiled("update", *update.update_options(state.x.dtype)), order)
        self.order, runs = order, len(state.x)
        self.count, self.active = np.zeros(runs), np.ones(runs, np.uint8)
        self.count[:] = steps
        self.tickets = np.zeros(runs, np.uint32)
        self.lr = np.full(runs, rule.lr)
        self.step_size = np.array(state.step_size)
        for name in ("velocity", "mean_square", "mean", "square"):
            if hasattr(state, name):
                setattr(self, name, getattr(state, name).copy())

    def remembered(self):
        return [name for name in ("x", "velocity", "mean", "square") if hasattr(self, name)]

    def step(self, grad):
        """Move as the rule's ``step`` does before it evaluates."""
        rule, shared = self.rule, {"count": self.count, "active": self.active}
        if isinstance(rule, Momentum):
            settings = {"nesterov": isinstance(rule, Nesterov), **shared}
            update.update_momentum(self.module, self.x, self.velocity, grad, self.step_size, rule.beta, **settings)
        elif isinstance(rule, Adam):
            arrays = self.x, self.mean, self.square, grad, self.step_size
            betas = rule.beta1, rule.beta2, rule.eps
            update.update_adam(self.module, *arrays, *betas, self.count, self.tickets, active=self.active)
        else:
            update.update_gd(self.module, self.x, grad, self.step_size, **shared)

    def adapt(self, grad):
        """What group RMSprop does when a gradient is known."""
        squares = nan(len(grad))
        module = Ordered(compiled("slices", *slices.slices_options(grad.dtype)), self.order)
        slices.slices_dot(module, squares, grad, grad, *summing(*grad.shape))
        settings = self.rule.beta, self.rule.eps, self.count
        arrays = self.step_size, self.mean_square, squares, self.lr
        update.update_group_rmsprop(self.module, *arrays, *settings, active=self.active)

    def all(self):
        others = ["mean_square"] if hasattr(self, "mean_square") else []
        return [getattr(self, name) for name in (*self.remembered(), *others, "step_size", "count", "tickets")]


def near(got, expected, ulps):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    assert (np.abs(got - expected) <= ulps * np.finfo(got.dtype).eps * np.abs(expected)).all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("runs", "dims"), [(1, (1, 1)), (3, (7, 4, 5)), (2, (40, 33, 31, 20))])
def test_steps_are_those_of_the_rules(name, dtype, runs, dims):
    rule, ulps = RULES[name]
    problem, x = problem_of(dtype, runs, dims)
    state = rule.init(problem, x)
    for steps in range(3):
        devices = [Device(rule, state, order, steps) for order in ORDERS]
        for device in devices:
            device.step(state.grad.copy())
        rule.step(problem, state)
        for device in devices:
            if name == "group_rmsprop":
                device.adapt(state.grad)
                # The CPU adds squares of float32 in float32.
                scale = np.finfo(dtype).eps / np.finfo(float).eps
                near(device.mean_square, state.mean_square, ulps * scale)
                near(device.step_size, state.step_size, ulps * scale)
            for part in device.remembered():
                near(getattr(device, part), getattr(state, part), ulps)
            assert (device.count == steps + 1).all() and not device.tickets.any()
            for a, b in zip(device.all(), devices[0].all()):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", RULES)
def test_slices_that_are_not_active_stay(name):
    """All others move as they do alone, and a graph that holds the launch goes on with whatever is active."""
    rule, _ = RULES[name]
    problem, x = problem_of(np.float32, 4, (9, 5, 8))
    state = rule.init(problem, x)
    before, device, free = (Device(rule, state, "random", [3, 0, 7, 5]) for _ in range(3))
    device.active[:] = [1, 0, 1, 0]
    for d in (device, free):
        if name == "group_rmsprop":
            d.adapt(state.grad)
        d.step(state.grad)
    for a, b, c in zip(device.all(), before.all(), free.all()):
        np.testing.assert_array_equal(a[1::2], b[1::2])
        np.testing.assert_array_equal(a[::2], c[::2])
    assert device.count.tolist() == [4, 0, 8, 5] and (device.x[::2] != before.x[::2]).any(axis=1).all()


def test_the_same_launch_again_takes_the_next_step():
    """Nothing is given anew: counts, tickets and steps come from memory, as for a graph that is played twice."""
    rule = RULES["adam"][0]
    problem, x = problem_of(np.float64, 2, (40, 33, 20))
    state = rule.init(problem, x)
    device, noted = Device(rule, state, "reverse", 0), []
    inner = device.module

    class Noting:
        def launch(self, *launch, shared=0):
            noted.append((launch, shared))

    device.module = Noting()
    device.step(state.grad)
    for _ in range(4):
        for launch, shared in noted:
            inner.launch(*launch, shared=shared)
        rule.step(problem, state)
        near(device.x, state.x, 4)
    assert device.count.tolist() == [4, 4] and len(noted) == 1


def test_learning_rates_come_from_memory():
    rule = RULES["gd"][0]
    problem, x = problem_of(np.float64, 3, (6, 4))
    state = rule.init(problem, x)
    device = Device(rule, state, "forward", 0)
    device.step_size[:] = [0, 0.5, -2]
    device.step(state.grad)
    np.testing.assert_allclose(device.x, state.x - device.step_size[:, None] * state.grad, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(device.x[0], state.x[0])


def test_nan_stays_in_its_slice():
    for name, (rule, _) in RULES.items():
        problem, x = problem_of(np.float32, 3, (6, 4))
        state = rule.init(problem, x)
        device, grad = Device(rule, state, "forward", 0), state.grad.copy()
        grad[1] = np.nan
        device.step(grad)
        assert np.isnan(device.x).any(axis=1).tolist() == [False, True, False], name
