"""Seeded measurements: the format to the bit, the kernels against plain loops, and the operator that uses them."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import naive
import numba
import numpy as np
import pytest
from conftest import OPERATORS, PEAK_KILOBYTES

import fastdmf
from fastdmf.backend import get_backend, thread_limits
from fastdmf.contract import Bound
from fastdmf.kernels import cpu
from fastdmf.kernels.cpu import philox, vectors
from fastdmf.operators import GaussianDense, GaussianSeeded

SEED, PROBLEM = 0x299F31D0A4093822, 7
ENSEMBLES = ["gaussian", "rademacher"]
TOP = 2**32 - 1
SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)
DELTA = 0.7


def entries(rows, columns, ensemble, seed=SEED, problem=PROBLEM):
    """What the kernels draw, with NaN before."""
    out = np.full((len(rows), columns), np.nan, np.float32)
    scratch = cpu.seeded_scratch(1, cpu.seeded_width(columns), ensemble)
    cpu.seeded_entries(out, np.array(rows, np.uint32), cpu.seeded_stream(seed, problem), scratch)
    return out


# The format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((TOP,) * 4, (TOP,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_words(counter, key, expected):
    """The known answers of Random123, which hold the oracle of everything below."""
    assert tuple(naive.philox(counter, key)) == expected


@numba.njit
def _store_words(out, block, row, stream):
    philox.store_words(out, 0, philox.columns(philox.words(block, row, stream)))


@pytest.mark.parametrize("block", [0, 4, 12_345, 2**32 - 64])
@pytest.mark.parametrize(("row", "problem"), [(0, 0), (1, TOP), (TOP, 1)])
def test_words_equal_the_oracle(block, row, problem):
    """Every word of the counter and of the key up to its end."""
    for seed in (0, SEED, 2**64 - 1):
        out = np.zeros(4 * philox.LANES, np.uint32)
        _store_words(out, block, np.uint32(row), cpu.seeded_stream(seed, problem))
        for k, words in enumerate(out.reshape(-1, 4)):
            assert words.tolist() == naive.philox((block + k, 0, row, problem), (seed & TOP, seed >> 32))


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("columns", [1, 2, 31, 33, 257, 1300])
def test_entries_equal_the_oracle(ensemble, columns):
    """Bit for bit, in rational arithmetic; odd and even numbers of rows in any order."""
    rows = [TOP, 0, 5] if columns < 1000 else [3]
    got = entries(rows, columns, ensemble)
    for k, row in enumerate(rows):
        np.testing.assert_array_equal(got[k], naive.seeded_entries(SEED, PROBLEM, row, columns, ensemble))


@pytest.mark.parametrize(
    ("ensemble", "digest"),
    [
        ("gaussian", "ca43ada41631bef31d5cc1a488847fb7"),
        ("rademacher", "b20a1a2e9feed83c20b8e5d7b4e459c9"),
    ],
)
def test_the_format_is_frozen(ensemble, digest):
    """Measurements that someone took with a seed must be the same in every release and on every machine."""
    block = entries(range(64), 5_000, ensemble)
    assert hashlib.sha256(block.astype("<f4").tobytes()).hexdigest()[:32] == digest


def test_transform_against_exact_arithmetic():
    """Radius, sine and cosine of a million samples: within 3 units of 2^-24 each, before their product is rounded."""
    count = 1 << 20
    words = np.zeros(count, np.uint32)
    for k in range(0, count, 4 * philox.LANES):
        _store_words(words[k : k + 4 * philox.LANES], k // 4, np.uint32(3), cpu.seeded_stream(SEED, PROBLEM))
    x, y = entries([3], count, "gaussian").reshape(-1, 2).T.astype(float)
    w, v = words.reshape(-1, 2).T
    u = (2.0 * (w >> 9) + 1) / 2**24
    t = (v >> 9 | 1) / 2**23 - 0.5
    sine, cosine = np.sin(np.pi * t), np.cos(np.pi * t) * np.where(v & 1, -1, 1)
    radius = np.sqrt(-2 * np.log(u))
    unit = 2.0**-24
    assert np.abs(np.hypot(x, y) / radius - 1).max() < 7 * unit
    assert np.abs(x / radius - sine).max() < 6 * unit
    assert np.abs(y / radius - cosine).max() < 6 * unit
    assert np.abs(x / (radius * sine) - 1).max() < 7 * unit


def test_samples_are_normal():
    """Moments, extremes, quantiles and correlations of 4 million samples, each within five standard deviations."""
    from scipy.special import ndtr

    z = entries(range(64), 65_536, "gaussian").astype(float)
    n = z.size
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * np.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert 4.5 < np.abs(z).max() <= 5.7681074
    counts = np.bincount((ndtr(z.ravel()) * 1000).astype(int), minlength=1000)
    chi2 = ((counts - n / 1000) ** 2 / (n / 1000)).sum()
    assert abs(chi2 - 999) < 5 * np.sqrt(2 * 999)
    for lag in (1, 2, 3, 4, 8, 32):  # the samples of a pair, of a block, of neighbouring registers
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 5 / np.sqrt(n)
        assert abs((z[:, lag:] ** 2 * z[:, :-lag] ** 2).mean() - 1) < 5 * np.sqrt(8 / n)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / np.sqrt(n)
    other = entries(range(64), 65_536, "gaussian", problem=PROBLEM + 1).astype(float)
    assert abs((z * other).mean()) < 5 / np.sqrt(n)


def test_signs_are_fair():
    z = entries(range(64), 65_536, "rademacher").astype(float)
    n = z.size
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert np.abs(z.reshape(-1, 128).mean(axis=0)).max() < 5 / np.sqrt(n / 128)  # every bit of a block
    for lag in (1, 8, 32, 128):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 5 / np.sqrt(n)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / np.sqrt(n)


# The kernels ---------------------------------------------------------------------------------------------------

# m, columns, runs, own y, loss, weighted
MEASUREMENTS = [
    (0, 5, 1, True, SQUARED, False),
    (1, 1, 1, False, SQUARED, False),
    (2, 33, 3, True, HUBER, True),
    (33, 257, 5, False, TRUNCATED, False),
    (257, 31, 1, False, ABSOLUTE, True),
    (31, 2, 2, True, SQUARED, True),
]


def close(got, reference, terms, dtype):
    error = np.linalg.norm(np.asarray(got, float) - reference)
    assert error <= 4.5 * np.finfo(dtype).eps * np.sqrt(terms) * np.linalg.norm(reference)


def poisoned(shape, dtype):
    out = cpu.aligned_empty(shape, dtype)
    out.fill(np.nan)
    return out


def poisoned_scratch(ranges, width, ensemble):
    """NaN, or all signs negative."""
    scratch = cpu.seeded_scratch(ranges, width, ensemble)
    scratch.view(np.uint32)[:] = TOP
    return scratch


def on_threads(count, evaluate):
    with thread_limits(count):
        return evaluate()


# Every value of each with every value of another, but not all three together: each is compiled for itself.
@pytest.mark.parametrize(
    ("dtype", "ensemble", "parallel"),
    [
        (np.float32, "gaussian", False),
        (np.float32, "rademacher", True),
        (np.float64, "gaussian", True),
        (np.float64, "rademacher", False),
    ],
)
@pytest.mark.parametrize(("m", "columns", "runs", "own", "code", "weighted"), MEASUREMENTS)
def test_kernels(dtype, ensemble, m, columns, runs, own, code, weighted, parallel):
    if parallel and ensemble == "rademacher":
        runs = max(runs, 2)  # one compiled version less
    rng = np.random.default_rng([m, columns])
    rows = rng.integers(0, 2**32, m, dtype=np.uint32)
    a = entries(rows, columns, ensemble).astype(dtype)
    width = cpu.seeded_width(columns)
    x = np.zeros((runs, width), dtype)
    x[:, :columns] = rng.standard_normal((runs, columns)) / np.sqrt(columns)
    products = x[:, :columns].astype(float) @ a.T.astype(float)
    near = products if own else products[:1]
    size = rng.uniform(0.1, 0.6, near.shape) + rng.integers(0, 2, near.shape) * DELTA
    y = (near - size * rng.choice([-1.0, 1.0], near.shape)).astype(dtype)
    w = rng.random((1, m)).astype(dtype) if weighted else None
    inputs = [np.copy(z) for z in (x, y, rows)]
    stream = cpu.seeded_stream(SEED, PROBLEM)
    pulls = np.ascontiguousarray(np.broadcast_to(y, (runs, m)))

    def evaluate():
        g, back, losses = poisoned((runs, width), dtype), poisoned((runs, width), dtype), poisoned(runs, float)
        out = poisoned((runs, m), dtype)
        scratch = poisoned_scratch(3 if parallel else 1, width, ensemble)
        head = (g, losses, x, y, w, code, DELTA, rows, stream)
        if parallel:
            partial = poisoned((3, runs, width), dtype)
            cpu.seeded_loss_pull(*head, partial, scratch)
            cpu.seeded_forward(out, x, rows, stream, scratch)
            cpu.seeded_adjoint(back, pulls, rows, stream, partial, scratch)
        else:
            cpu.seeded_loss_pull_serial(*head, scratch)
            cpu.seeded_forward_serial(out, x, rows, stream, scratch)
            cpu.seeded_adjoint_serial(back, pulls, rows, stream, scratch)
        return g, losses, out, back

    one, two = on_threads(1, evaluate), on_threads(2, evaluate)
    for first, second in zip(one, two):
        np.testing.assert_array_equal(first, second)
    g, losses, out, back = one
    for b in range(runs):
        weights = None if w is None else w[0]
        loss, pull = naive.gaussian_loss_pull(a, x[b, :columns], y[b % len(y)], weights, code, DELTA)
        close(losses[b], loss, m + columns, dtype)
        close(g[b, :columns], pull, m + columns, dtype)
    close(out, products, columns, dtype)
    close(back[:, :columns], pulls.astype(float) @ a.astype(float), m, dtype)
    for z, before in zip((x, y, rows), inputs):
        np.testing.assert_array_equal(z, before)


def test_squared_norms():
    for columns in (1, 33, 700):
        norms = np.full(37, np.nan)
        rows = np.arange(37, dtype=np.uint32)
        scratch = poisoned_scratch(3, cpu.seeded_width(columns), "gaussian")
        cpu.seeded_squared_norms(norms, columns, rows, cpu.seeded_stream(SEED, PROBLEM), scratch)
        expected = (entries(rows, columns, "gaussian").astype(float) ** 2).sum(axis=1)
        np.testing.assert_allclose(norms, expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        (16, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}),
        (64, {"FASTDMF_VECTOR_BYTES": "64"}),
    ],
    ids=["without_fma", "wide"],
)
def test_other_machines(size, target):
    """The same bits with other vectors, and where a fused product and sum is a call of the C library.

    In a process and a cache of its own.
    """
    if size == vectors.VECTOR_BYTES:
        pytest.skip("this is that target")
    here = Path(__file__).resolve().parent
    env = {**os.environ, **target, "NUMBA_CACHE_DIR": str(here / "__pycache__" / f"numba-{size}")}
    only = "oracle or frozen or (test_kernels and 33-257 and gaussian and float32)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", only, str(here / "test_seeded.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])


# The operator --------------------------------------------------------------------------------------------------


def drawn_by(operator, dtype, batch, threads):
    """The measurement matrices as a bound operator's forward passes see them: products with unit matrices."""
    n1, n2 = operator.shape
    bound = operator.bind(get_backend("cpu"), np.zeros((1, operator.size)), dtype=dtype)
    seen = np.full((operator.size, n1 * n2), np.nan, dtype)
    cells = np.arange(n1 * n2)
    for start in range(0, n1 * n2, batch):
        chunk = cells[start : start + batch]
        p, qt = np.zeros((len(chunk), n1, 1), dtype), np.zeros((len(chunk), n2, 1), dtype)
        p[np.arange(len(chunk)), chunk // n2], qt[np.arange(len(chunk)), chunk % n2] = 1, 1
        seen[:, chunk] = on_threads(threads, lambda p=p, qt=qt: bound.forward(p, qt)).T
    return seen.reshape(operator.size, n1, n2)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_one_seed_is_one_matrix(ensemble):
    """Bit-equal for every precision, batch, number of threads, route and restriction."""
    operator = GaussianSeeded(SEED, 41, (7, 11), ensemble=ensemble, problem=PROBLEM)
    a = operator.matrices(slice(None))
    np.testing.assert_array_equal(a.reshape(41, 77), entries(range(41), 77, ensemble))
    for dtype, batch, threads in [(np.float32, 1, 1), (np.float64, 3, 2), (np.float32, 77, 2), (np.float64, 77, 1)]:
        np.testing.assert_array_equal(drawn_by(operator, dtype, batch, threads), a)
    index = np.array([40, 3, 3, 17])
    part = operator.restrict(index).restrict(np.array([True, False, True, True]))
    np.testing.assert_array_equal(drawn_by(part, np.float32, 7, 1), a[[40, 3, 17]])
    np.testing.assert_array_equal(operator.matrices(-1), a[40])
    assert operator.matrices(np.array([], int)).shape == (0, 7, 11)
    other = GaussianSeeded(SEED, 41, (7, 11), ensemble=ensemble)
    assert np.mean(other.matrices(slice(None)) == a) < 0.6


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_dense_measurements(ensemble, dtype, rng):
    """The routes of small and of large work, next to the stored matrices."""
    for m, shape in [(60, (9, 8)), (700, (20, 31))]:
        operator = GaussianSeeded(SEED, m, shape, ensemble=ensemble)
        dense = GaussianDense(operator.matrices(slice(None)).astype(dtype))
        x, r = rng.standard_normal(shape).astype(dtype), rng.standard_normal(m).astype(dtype)
        for ours, theirs in [(operator.apply(x), dense.apply(x)), (operator.adjoint(r), dense.adjoint(r))]:
            assert ours.dtype == dtype and ours.shape == theirs.shape
            assert np.linalg.norm(ours - theirs) < 30 * np.finfo(dtype).eps * np.linalg.norm(theirs)
        np.testing.assert_allclose(operator.squared_norms(), dense.squared_norms(), rtol=1e-5)


def test_norms_are_drawn_once_and_kept(monkeypatch):
    operator = GaussianSeeded(3, 50, (6, 7))
    norms = operator.squared_norms()
    monkeypatch.setattr(cpu, "seeded_squared_norms", None)
    norms[0] = -1  # a copy: the kept ones must not change
    assert (operator.squared_norms() > 0).all()
    np.testing.assert_array_equal(operator.restrict([4, 2]).squared_norms(), operator.squared_norms()[[4, 2]])
    np.testing.assert_array_equal(GaussianSeeded(3, 5, (6, 7), ensemble="rademacher").squared_norms(), np.full(5, 42.0))


def test_parallel_route_in_a_batch(rng):
    """Many ranges, right-hand sides behind the first block, weights of their own, and a change of the batch."""
    n1, n2, m, h = 24, 30, 1100, 4
    operator = GaussianSeeded(11, m, (n1, n2))
    for batch in (5, 2):
        y, w = rng.standard_normal((batch, m)), rng.random((batch, m))
        bound = operator.bind(get_backend("cpu"), y, weights=w, loss=("huber", 9.0), dtype=np.float64)
        oracle = Bound(operator, bound.backend, y, w, bound.loss, np.dtype(float))
        p, qt = rng.standard_normal((batch, n1, h)), rng.standard_normal((batch, n2, h))
        ours, theirs = (np.full_like(p, np.nan), np.full_like(qt, np.nan)), (np.empty_like(p), np.empty_like(qt))
        with thread_limits():
            losses = bound.loss_and_pull(p, qt, *ours)
            np.testing.assert_allclose(losses, oracle.loss_and_pull(p, qt, *theirs), rtol=1e-12)
        for a, b in zip(ours, theirs):
            assert np.linalg.norm(a - b) < 1e-12 * np.linalg.norm(b)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_solve_recovers_a_low_rank_matrix(ensemble, rng):
    truth = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 16))
    truth *= 16 / np.linalg.norm(truth)
    operator = GaussianSeeded(SEED, 200, truth.shape, ensemble=ensemble)
    solution = fastdmf.solve(operator, operator.apply(truth), depth=3, max_iter=1500, random_state=0)
    error = np.linalg.norm(solution.matrix() - truth) / np.linalg.norm(truth)
    print(f"{ensemble}: relative error {error:.1e} after {solution.n_eval} evaluations, 200 numbers for 320 entries")
    assert error < 2e-3


LARGE = f"""{PEAK_KILOBYTES}
import numpy as np
from fastdmf import GaussianSeeded

small = GaussianSeeded(1, 50_000, (2, 2))  # compiles, and loads what the parallel region needs
small.adjoint(small.apply(np.ones((2, 2), np.float32)))
before = peak_kilobytes()
operator = GaussianSeeded(1, 250, (1000, 1000))
r = operator.apply(np.full((1000, 1000), 1e-3, np.float32))
peak = peak_kilobytes()
print(before, peak, r.std())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_hold_the_measurements():
    """A forward pass whose matrices would take a gigabyte."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    before, peak, spread = (float(word) for word in done.stdout.split())
    print(f"{(peak - before) / 1e3:.0f} MB more for measurements of 1000 MB")
    assert peak - before < 200e3
    assert 0.8 < spread < 1.2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((1.5, 3, (2, 2)), {}, TypeError, "seed must be an integer, got 1.5"),
        ((True, 3, (2, 2)), {}, TypeError, "seed must be an integer, got True"),
        ((-1, 3, (2, 2)), {}, ValueError, "seed must be from 0 to 18446744073709551615, got -1"),
        ((2**64, 3, (2, 2)), {}, ValueError, "seed must be from 0"),
        ((0, "3", (2, 2)), {}, TypeError, "m must be an integer"),
        ((0, 0, (2, 2)), {}, ValueError, "m must be from 1 to 4294967296, got 0"),
        ((0, 2**32 + 1, (2, 2)), {}, ValueError, "m must be from 1"),
        ((0, 3, (2, 0)), {}, ValueError, "shape must be positive"),
        ((0, 3, (2**17, 2**18)), {}, ValueError, "shape may have 2\\^34 entries.*has 34359738368"),
        ((0, 3, (2, 2)), {"ensemble": "uniform"}, ValueError, "'gaussian' or 'rademacher', got 'uniform'"),
        ((0, 3, (2, 2)), {"problem": 2**32}, ValueError, "problem must be from 0 to 4294967295"),
        ((0, 3, (2, 2)), {"problem": None}, TypeError, "problem must be an integer"),
    ],
)
def test_bad_arguments(arguments, options, error, match):
    with pytest.raises(error, match=match):
        GaussianSeeded(*arguments, **options)


def test_wrong_lengths_are_refused():
    operator = GaussianSeeded(0, 5, (3, 4))
    with pytest.raises(ValueError, match="reshape"):
        operator.apply(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="reshape"):
        operator.adjoint(np.zeros(6))


def test_numpy_integers_are_taken():
    operator = GaussianSeeded(np.uint64(2**64 - 1), np.int32(3), (2, 2), problem=np.uint8(4))
    assert (operator.seed, operator.size, operator.problem) == (2**64 - 1, 3, 4)
    assert operator.dtype is None
    assert "seeded" in OPERATORS
