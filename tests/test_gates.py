"""Gates on counts, which noise cannot move: allocations, passes over the data, compiled versions."""

import tracemalloc

import numpy as np
from conftest import completion, random_mask

import fastdmf
from fastdmf.chain import Layout
from fastdmf.kernels import cpu
from fastdmf.problem import Problem
from fastdmf.rules import GradientDescent


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


def test_one_evaluation_a_step(monkeypatch):
    """auto: as many passes over the data as evaluations, and the start's power iterations."""
    _, op, y = completion(0, n=60, rank=2, count=900)
    counts = {"evaluate": 0, "pull": 0, "forward": 0}

    def counted(owner, name, key):
        original = getattr(owner, name)

        def wrapper(self, *args, **kw):
            counts[key] += 1
            return original(self, *args, **kw)

        monkeypatch.setattr(owner, name, wrapper)

    counted(Problem, "evaluate", "evaluate")
    bound = op.bind(fastdmf.backend.get_backend(), y[None]).__class__
    counted(bound, "pull", "pull")
    counted(bound, "forward", "forward")
    solution = fastdmf.solve(op, y, random_state=0)
    assert solution.n_eval == counts["evaluate"] == solution.n_iter + 1
    assert counts["pull"] == 5 and counts["forward"] == 1


def test_few_compiled_versions():
    """Depths and widths share compiled versions: wide rows one, narrow rows one a width."""
    import warnings

    def versions():
        return sum(
            len(f.signatures)
            for module in (cpu.chain, cpu.dense, cpu.entry, cpu.gaussian)
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
