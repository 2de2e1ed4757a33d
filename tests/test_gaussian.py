"""Dense measurements: the kernels against plain loops, every kind of storage, and the operator that uses them.

An output o of a sum of t terms must satisfy norm(o - reference) <= c eps sqrt(t) norm(reference).
"""

import naive
import numba
import numpy as np
import pytest
from conftest import LOSSES

import fastdmf
from fastdmf import DMFSensing, GaussianDense
from fastdmf.contract import Bound
from fastdmf.kernels import cpu
from fastdmf.kernels.cpu import gaussian

SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)
DELTA = 0.7
BOUND = 4.5  # about twice the worst that was seen at AVX2 and at SSE width: the sums cancel
STORAGES = [(np.float32, None), (np.float64, None), (np.float32, "float16")]

# m, d, runs, own y, loss, weighted. The last two leave the caches of a core: blocks of rows, in chunks of columns.
MEASUREMENTS = [
    (0, 5, 2, True, SQUARED, True),
    (1, 1, 1, False, SQUARED, False),
    (2, 33, 3, True, HUBER, True),
    (33, 257, 5, False, TRUNCATED, False),
    (257, 31, 1, False, ABSOLUTE, True),
    (31, 2, 4, True, SQUARED, True),
    (37, 8_200, 9, True, HUBER, True),
    (70, 4_100, 17, False, SQUARED, False),
]


def poisoned(*shape, dtype=np.float64):
    out = cpu.aligned_empty(shape, dtype)
    out[...] = np.nan
    return out


def close(got, reference, terms, dtype):
    got, reference = np.asarray(got, float), np.asarray(reference, float)
    error = np.linalg.norm(got - reference)
    assert error <= BOUND * np.finfo(dtype).eps * np.sqrt(terms) * np.linalg.norm(reference)


def on_threads(count, evaluate):
    before = numba.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        return evaluate()
    finally:
        numba.set_num_threads(before)


def targets(prediction, rng):
    """Return y with residuals of both signs on both sides of DELTA and none near a corner of a loss."""
    size = rng.uniform(0.1, 0.6, prediction.shape) + rng.integers(0, 2, prediction.shape) * 0.7
    return prediction - size * rng.choice([-1.0, 1.0], prediction.shape)


# The kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "storage"), STORAGES)
@pytest.mark.parametrize(("m", "d", "runs", "own", "code", "weighted"), MEASUREMENTS)
@pytest.mark.parametrize("parallel", [False, True])
def test_fused_and_halves(dtype, storage, m, d, runs, own, code, weighted, parallel):
    rng = np.random.default_rng([m, d])
    a = rng.standard_normal((m, d)).astype(storage or dtype)
    stored = a.view(np.uint16) if storage else a
    x = (rng.standard_normal((runs, d)) / np.sqrt(d)).astype(dtype)
    products = x.astype(float) @ a.T.astype(float)
    y = targets(products if own else products[:1], rng).astype(dtype)
    w = rng.random((1, m)).astype(dtype) if weighted else None
    r = rng.standard_normal((runs, m)).astype(dtype)
    inputs = [np.copy(z) for z in (stored, x, y, r)]

    def evaluate():
        g, back, losses = poisoned(runs, d, dtype=dtype), poisoned(runs, d, dtype=dtype), poisoned(runs)
        out = poisoned(runs, m, dtype=dtype)
        if parallel:
            partial = poisoned(3, runs, d, dtype=dtype)
            cpu.gaussian_loss_pull(g, losses, stored, x, y, w, code, DELTA, partial)
            cpu.gaussian_forward(out, stored, x)
            partial[:] = np.nan
            cpu.gaussian_pull(back, stored, r, partial)
        else:
            cpu.gaussian_loss_pull_serial(g, losses, stored, x, y, w, code, DELTA)
            cpu.gaussian_forward_serial(out, stored, x)
            cpu.gaussian_pull_serial(back, stored, r)
        return g, losses, out, back

    one, two = on_threads(1, evaluate), on_threads(2, evaluate)
    for first, second in zip(one, two):
        np.testing.assert_array_equal(first, second)
    g, losses, out, back = one
    for b in range(runs):
        weights = None if w is None else w[0]
        loss, pull = naive.gaussian_loss_pull(a, x[b], y[b % len(y)], weights, code, DELTA)
        close(losses[b], loss, m + d, dtype)
        close(g[b], pull, m + d, dtype)
    close(out, products, d, dtype)
    close(back, r.astype(float) @ a.astype(float), m, dtype)
    for z, before in zip((stored, x, y, r), inputs):
        np.testing.assert_array_equal(z, before)


def test_rows_that_end_with_the_memory():
    """Four rows and whole vectors at a time read nothing behind A, x and y and write nothing behind g: NaN is there."""
    m, d = 5, 13

    def framed(x):
        frame = np.full(x.size + 64, np.nan, x.dtype)
        inside = frame[: x.size].reshape(x.shape)
        inside[:] = x
        return frame, inside

    rng = np.random.default_rng(0)
    a, x, y = (rng.standard_normal(shape) for shape in ((m, d), (3, d), (3, m)))
    loss, pull = naive.gaussian_loss_pull(a, x[2], y[2], None, SQUARED, 0.0)
    (_, a), (_, x), (_, y), (frame, g) = map(framed, (a, x, y, np.zeros((3, d))))
    losses = poisoned(3)
    cpu.gaussian_loss_pull_serial(g, losses, a, x, y, None, SQUARED, 0.0)
    close(losses[2], loss, m + d, float)
    close(g[2], pull, m + d, float)
    assert np.isnan(frame[g.size :]).all()


def test_nan_is_not_hidden():
    """One NaN in x is a NaN loss of its right-hand side and of no other; every loss tells."""
    a, x, y = np.ones((9, 5)), np.ones((3, 5)), np.zeros((1, 9))
    x[1, 4] = np.nan
    for code in (SQUARED, HUBER, TRUNCATED, ABSOLUTE):
        g, losses = poisoned(3, 5), poisoned(3)
        cpu.gaussian_loss_pull_serial(g, losses, a, x, y, None, code, DELTA)
        np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
        np.testing.assert_array_equal(np.isnan(g).any(axis=1), [False, True, False])


def test_one_compiled_version():
    """Read-only and writable arrays, weights, batches, halves and losses share one, of each parallel and serial."""
    rng = np.random.default_rng(0)
    a, x, y, w = (rng.standard_normal(shape) for shape in ((40, 7), (3, 7), (3, 40), (1, 40)))
    frozen = [z.copy() for z in (a, x, y, w)]
    for z in frozen:
        z.flags.writeable = False

    def evaluate(a, x, y, w, runs, code):
        g, losses, partial, out = poisoned(runs, 7), poisoned(runs), poisoned(2, runs, 7), poisoned(runs, 40)
        head = g, losses, a, x[:runs], y[:runs]
        for weights in (None, w):
            cpu.gaussian_loss_pull_serial(*head, weights, code, DELTA)
            cpu.gaussian_loss_pull(*head, weights, code, DELTA, partial)
        cpu.gaussian_forward(out, a, x[:runs])
        cpu.gaussian_pull(g, a, y[:runs], partial)

    evaluate(a, x, y, w, 1, SQUARED)
    compiled = [f for f in vars(gaussian).values() if hasattr(f, "signatures")]
    before = [len(f.signatures) for f in compiled]
    for arrays in ((a, x, y, w), frozen):
        for runs in (1, 2, 3):
            for code in (SQUARED, TRUNCATED):
                evaluate(*arrays, runs, code)
    assert [len(f.signatures) for f in compiled] == before


# The operator --------------------------------------------------------------------------------------------------


def halved(m, n1, n2, rng):
    a = rng.standard_normal((m, n1, n2))
    return a, GaussianDense(a, storage="float16")


@pytest.mark.parametrize("loss", LOSSES)
def test_float16_is_the_rounded_operator(loss, rng, backend):
    """Every answer is that of the float64 operator whose A was rounded before."""
    n1, n2, m = 13, 21, 260
    a, op = halved(m, n1, n2, rng)
    rounded = GaussianDense(a.astype(np.float16).astype(float))
    assert op.a.dtype == np.float16 and op.dtype == np.float32 and op.storage == "float16"
    assert not np.array_equal(rounded.a, a.reshape(m, -1))
    x, r = rng.standard_normal((n1, n2)), rng.standard_normal(m)
    np.testing.assert_allclose(op.apply(x), rounded.apply(x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(op.adjoint(r), rounded.adjoint(r), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(op.squared_norms(), rounded.squared_norms(), rtol=1e-12)

    part = np.array([3, 250, 7, 7])
    np.testing.assert_allclose(op.restrict(part).apply(x), rounded.apply(x)[part], rtol=1e-12, atol=1e-12)
    assert op.restrict(part).size == 4 and op.size == m

    y, w = rng.standard_normal((1, m)), rng.random((1, m))
    bound = op.bind(backend, y, weights=w, loss=LOSSES[loss], dtype=np.float32)
    oracle = Bound(rounded, backend, y, w, bound.loss, np.dtype(np.float64))
    p, qt = rng.standard_normal((2, n1, 4)), rng.standard_normal((2, n2, 4))
    single = p.astype(np.float32), qt.astype(np.float32)
    got, expected = [poisoned(*z.shape, dtype=np.float32) for z in (p, qt)], [poisoned(*z.shape) for z in (p, qt)]
    tolerance = 20 * np.finfo(np.float32).eps * np.sqrt(n1 * n2)
    losses = bound.loss_and_pull(*single, *got)
    np.testing.assert_allclose(losses, oracle.loss_and_pull(p, qt, *expected), rtol=tolerance)
    r = rng.standard_normal((2, m))
    pairs = [*zip(got, expected), *zip(bound.pull(r.astype(np.float32), *single), oracle.pull(r, p, qt))]
    for ours, theirs in [*pairs, (bound.forward(*single), oracle.forward(p, qt))]:
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(theirs)


def test_float16_converts_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(GaussianDense, "_BLOCK", 50)  # two rows, and the last alone
    a, op = halved(7, 4, 6, rng)
    np.testing.assert_array_equal(op.a, a.reshape(7, -1).astype(np.float16))
    x, r = rng.standard_normal((4, 6)), rng.standard_normal(7)
    np.testing.assert_allclose(op.apply(x), op.a.astype(float) @ x.ravel(), rtol=1e-12)
    np.testing.assert_allclose(op.adjoint(r).ravel(), r @ op.a.astype(float), rtol=1e-12)
    np.testing.assert_allclose(op.squared_norms(), (op.a.astype(float) ** 2).sum(axis=1), rtol=1e-12)


def test_float16_input_is_taken_as_it_is(rng):
    a = rng.standard_normal((5, 2, 3)).astype(np.float16)
    np.testing.assert_array_equal(GaussianDense(a, storage="float16").a, a.reshape(5, 6))
    empty = GaussianDense(np.zeros((0, 2, 3)), storage="float16")
    assert empty.size == 0 and empty.apply(np.ones((2, 3))).shape == (0,)
    zeros = GaussianDense(np.zeros((4, 2, 3)), storage="float16")
    assert not zeros.a.any()


def test_sensing_from_float16(rng):
    """A rank-1 matrix is recovered as well as its rounded measurements allow, in single precision."""
    truth = np.outer(rng.standard_normal(12), rng.standard_normal(10))
    a, op = halved(200, 12, 10, rng)
    y = a.reshape(200, -1) @ truth.ravel()
    model = DMFSensing(random_state=0).fit(op, y)
    assert model.matrix_.dtype == np.float32
    assert np.linalg.norm(model.matrix_ - truth) < 2e-3 * np.linalg.norm(truth)
    solution = fastdmf.solve(op, y, dtype="float32", random_state=0, max_iter=500, on_failure="ignore")
    assert np.linalg.norm(solution.matrix() - truth) < 2e-2 * np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("a", "options", "kind", "message"),
    [
        (np.ones((4, 2, 3)), {"storage": "float8"}, ValueError, "storage must be None or 'float16', got 'float8'"),
        (np.ones((4, 2, 3)), {"storage": "bfloat16"}, ValueError, "storage must be None or 'float16'"),
        (np.full((4, 2, 3), 7e4), {}, ValueError, r"a holds 7e\+04, float16 ends at 65504: scale a and y down"),
        (np.full((4, 2, 3), -7e4), {}, ValueError, "a holds 7e.04"),
        (np.full((4, 2, 3), 1.1e-6), {}, ValueError, "a loses 2.*of its norm in float16.*scale a and y up"),
        (np.full((4, 2, 3), np.nan), {}, ValueError, "a contains NaN or infinite"),
        (np.full((4, 2, 3), np.inf, np.float16), {}, ValueError, "a contains NaN or infinite"),
        (np.full((4, 2, 3), 1j), {}, TypeError, "a must hold real numbers"),
        (np.ones(5), {}, ValueError, "a must have 2 or 3 dimensions"),
        (np.array(1.0), {}, ValueError, "a must have 2 or 3 dimensions"),
        (np.ones((4, 6)), {}, ValueError, r"a of shape \(4, 6\) needs shape=\(n1, n2\)"),
        (np.ones((4, 6)), {"shape": (2, 4)}, ValueError, "does not fit shape"),
    ],
)
def test_bad_float16(a, options, kind, message):
    with pytest.raises(kind, match=message):
        GaussianDense(a, **{"storage": "float16", **options})


def test_float16_computes_in_single_precision(rng):
    _, op = halved(9, 2, 3, rng)
    with pytest.raises(ValueError, match="storage='float16' computes in float32, not in float64: pass dtype='float32'"):
        fastdmf.solve(op, np.zeros(9) + 1.0)
