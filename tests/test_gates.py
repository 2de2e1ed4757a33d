"""Gates on counts, which noise cannot move: allocations, passes over the data, compiled versions."""

import tracemalloc

import numpy as np
import pytest
from conftest import completion, random_mask

import fastdmf
from fastdmf.chain import Layout, initial_factors
from fastdmf.kernels import cpu
from fastdmf.problem import Problem
from fastdmf.rules import Auto, GradientDescent, GroupRMSprop


def _largest_allocation(call):
    call()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_an_evaluation_allocates_nothing_of_the_size_of_the_factors(rng, backend):
    op = random_mask(4000, 900, 40_000, rng)
    for depth, width in ((2, 16), (3, 16), (3, 24)):
        layout = Layout((900, *[width] * (depth - 1), 4000))
        problem = Problem(op.bind(backend, rng.standard_normal((1, op.size)), width=width), layout, 1)
        x = layout.allocate(1, np.float64)
        x += 0.1
        grad = np.zeros_like(x)
        assert _largest_allocation(lambda p=problem, x=x, g=grad: p.evaluate(x, g)) < 0.05 * x.nbytes


def test_a_step_allocates_nothing_of_the_size_of_the_factors(backend):
    """Small chains and large ones; for auto in both phases, after the memory has been taken."""
    _, small, y = completion(0, n=60, rank=2, count=900)
    large = random_mask(900, 700, 20_000, np.random.default_rng(0))
    data = np.random.default_rng(1).standard_normal(large.size)
    for op, values, width in ((small, y, 60), (large, data, 16)):
        layout = Layout((op.shape[1], width, width, op.shape[0]))
        problem = Problem(op.bind(backend, values[None], width=width), layout, 1)
        for rule in (GradientDescent(lr=1e-3), GroupRMSprop(), Auto(accelerate=False), Auto()):
            x = layout.allocate(1, np.float64)
            layout.write(x, initial_factors(layout, "gaussian", 1e-2, 0))
            state = rule.init(problem, x)
            if rule == Auto():
                while not state.accelerated[0]:
                    rule.step(problem, state)
            step = _largest_allocation(lambda r=rule, p=problem, s=state: r.step(p, s))
            assert step < 0.25 * x.nbytes, (rule, step / x.nbytes)  # a few vectors of n1 or n2 numbers


def test_few_calls_a_step(monkeypatch, backend):
    """Compiled calls a step of small chains: what Python costs there is their number."""
    _, op, y = completion(0, n=60, rank=2, count=900)
    counts = {}
    families = "chain", "slices", "lbfgs", "entry", "dense", "update"
    names = [name for name in cpu.__dict__ if name.split("_")[0] in families]
    for name in names:
        original = getattr(cpu, name)
        if callable(original):

            def wrapper(*args, name=name, original=original, **kw):
                counts[name] = counts.get(name, 0) + 1
                return original(*args, **kw)

            monkeypatch.setattr(cpu, name, wrapper)
    layout = Layout((60, 60, 60, 60))
    problem = Problem(op.bind(backend, y[None], width=60), layout, 1)

    def calls(rule, fast=False):
        x = layout.allocate(1, np.float64)
        layout.write(x, initial_factors(layout, "gaussian", 1e-2, 0))
        state = rule.init(problem, x)
        while fast and not state.accelerated[0]:
            rule.step(problem, state)
        rule.step(problem, state)
        counts.clear()
        rule.step(problem, state)
        return dict(counts)

    evaluation = {"chain_runs": 1}
    assert calls(GradientDescent(lr=1e-3)) == {**evaluation, "update_gd": 1}
    assert calls(GroupRMSprop()) == {**evaluation, "update_gd": 1, "slices_dot": 1, "update_group_rmsprop": 1}
    assert calls(Auto()) == {**evaluation, "slices_move": 1, "chain_power": 1}
    assert calls(Auto(), fast=True) == {**evaluation, "lbfgs_try": 1, "lbfgs_judge": 1}


@pytest.mark.parametrize(("shape", "count", "extra"), [((60, 60), 900, None), ((60, 600), 6000, 5)])
def test_one_evaluation_a_step(shape, count, extra, monkeypatch):
    """auto: as many passes over the data as evaluations, and the start's power steps (small chains take none)."""
    rng = np.random.default_rng(0)
    op = random_mask(*shape, count, rng)
    y = op.apply(rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1])))
    counts = {"evaluate": 0, "loss_and_pull": 0}

    def counted(owner, name, key):
        original = getattr(owner, name)

        def wrapper(self, *args, **kw):
            counts[key] += 1
            return original(self, *args, **kw)

        monkeypatch.setattr(owner, name, wrapper)

    counted(Problem, "evaluate", "evaluate")
    bound = op.bind(fastdmf.backend.get_backend(), y[None]).__class__
    counted(bound, "loss_and_pull", "loss_and_pull")
    solution = fastdmf.solve(op, y, width=20, random_state=0, max_iter=100, on_failure="ignore")
    assert solution.n_eval == counts["evaluate"] == solution.n_iter + 1
    assert counts["loss_and_pull"] == (0 if extra is None else solution.n_eval + extra)


def test_few_compiled_versions():
    """Depths and widths share compiled versions: wide rows one, narrow rows one a width."""
    import warnings

    def versions():
        return sum(
            len(f.signatures)
            for module in (cpu.chain, cpu.dense, cpu.entry, cpu.gaussian, cpu.gemm, cpu.lbfgs, cpu.sampled, cpu.slices)
            for f in vars(module).values()
            if hasattr(f, "signatures")
        )

    rng = np.random.default_rng(0)
    op = random_mask(300, 200, 3000, rng)
    y = rng.standard_normal(op.size)

    def run(**kw):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fastdmf.solve(op, y, rule=GradientDescent(lr=1e-3), max_iter=2, random_state=0, **kw)

    run(width=40, depth=3)
    run(width=20, depth=3)
    before = versions()
    for depth in (2, 3, 4, 5):
        for width in (70, 41, 150, 23):
            run(width=width, depth=depth)
    assert versions() == before
