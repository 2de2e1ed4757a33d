"""``solve`` as a user meets it: batches, reproducibility, arguments, bad input."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import OPERATORS, completion, random_mask

import fastdmf
from fastdmf.engine import SolveWarning, Status
from fastdmf.rules import Adam, Auto, GradientDescent, GroupRMSprop, Momentum, Nesterov

SMALL = dict(n=24, rank=2, count=300)


def _quiet(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        return fastdmf.solve(*args, **kw)


RULES = {
    "auto": Auto(),
    "gd": GradientDescent(lr=3.0),
    "momentum": Momentum(lr=0.5),
    "nesterov": Nesterov(lr=0.5),
    "group_rmsprop": GroupRMSprop(lr=0.02),
    "adam": Adam(lr=0.01),
}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_equals_its_single_runs(rule, depth):
    """8 seeds: the same over 50 evaluations to rounding, and the same final quality."""
    truth, op, y = completion(0, n=40, rank=2, count=700)
    seeds = list(range(8))
    kw = dict(rule=RULES[rule], depth=depth, init_scale=1e-2, check_every=1, truth=truth)
    many = _quiet(op, y, random_state=seeds, max_iter=49, tol=1e-300, **kw)
    assert len(many) == 8
    for b, seed in enumerate(seeds):
        one = _quiet(op, y, random_state=seed, max_iter=49, tol=1e-300, **kw)
        for name in ("loss", "grad_norm", "step_size", "error"):
            np.testing.assert_allclose(many[b].history[name], one.history[name], rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(many[b].matrix(), one.matrix(), rtol=0, atol=1e-9 * np.abs(one.matrix()).max())
    if rule == "auto":
        many = fastdmf.solve(op, y, random_state=seeds, **kw)
        assert len({int(n) for n in many.n_iter}) > 1 or depth == 1  # they end at different times
        for b, seed in enumerate(seeds):
            one = fastdmf.solve(op, y, random_state=seed, **kw)
            assert many.status[b] is one.status is Status.CONVERGED
            assert many[b].history["error"][-1] == pytest.approx(one.history["error"][-1], rel=0.1, abs=1e-6)
            assert len(many[b].history["loss"]) == many.n_iter[b] + 1


def test_batches_over_data_weights_and_starts(rng):
    _, op, y = completion(0, **SMALL)
    ys = np.stack([y, 2 * y, y + 0.1])
    weights = (rng.random((3, len(y))) < 0.7).astype(float)
    factors = [rng.standard_normal((3, 24, 24)) * 0.02 for _ in range(3)]
    many = _quiet(op, ys, weights=weights, factors=factors, max_iter=40)
    for b in range(3):
        one = _quiet(op, ys[b], weights=weights[b], factors=[w[b] for w in factors], max_iter=40)
        np.testing.assert_allclose(many[b].history["loss"], one.history["loss"], rtol=1e-8)
    assert not one.batched and many.batched
    shared = _quiet(op, y, weights=weights, random_state=5, max_iter=5)
    assert len(shared) == 3
    np.testing.assert_array_equal(shared.history["iteration"], np.arange(6))
    zero_weights = weights[0] == 0
    changed = np.where(zero_weights, 1e3, y)
    a, b = (_quiet(op, v, weights=weights[0], random_state=5, max_iter=30).matrix() for v in (y, changed))
    np.testing.assert_array_equal(a, b)  # a weight of zero leaves a measurement out


def test_validation_in_a_batch():
    _, op, y = completion(0, **SMALL)
    y = y + 0.3 * np.random.default_rng(0).standard_normal(len(y))
    many = _quiet(op, y, random_state=[1, 2, 3], validation=0.1, patience=30)
    for b, seed in enumerate((1, 2, 3)):
        one = _quiet(op, y, random_state=seed, validation=0.1, patience=30)
        rows = slice(0, 50)
        np.testing.assert_allclose(many[b].history["validation"][rows], one.history["validation"][rows], rtol=1e-8)
        assert many.status[b] is one.status is Status.EARLY_STOPPED
        np.testing.assert_allclose(many[b].history["validation"].min(), one.history["validation"].min(), rtol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ["small", "dense", "wide", "gaussian"])
def test_same_bits_again_and_for_one_or_two_threads(case, dtype):
    """Sizes on each route of the kernels: serial, dense, parallel ranges and blocks, the Gaussian kernel's ranges."""
    rng = np.random.default_rng(0)
    if case == "gaussian":
        op, kw = OPERATORS["gaussian"](30, 20, 700, rng), dict(depth=3)
    else:
        n1, n2, count, width = {
            "small": (40, 30, 300, 8),
            "dense": (60, 50, 2000, 40),
            "wide": (3000, 800, 90_000, 20),
        }[case]
        op, kw = random_mask(n1, n2, count, rng), dict(width=width)
    y = (rng.standard_normal(op.size)).astype(dtype)
    runs = [
        _quiet(op, y, random_state=3, max_iter=25, dtype=dtype, n_threads=t, validation=0.1, **kw)
        for t in (1, 2, 2, None)
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0].factors, other.factors):
            np.testing.assert_array_equal(a, b)
        for name in runs[0].history:
            np.testing.assert_array_equal(runs[0].history[name], other.history[name])


def test_precision_follows_the_data():
    _, op, y = completion(0, **SMALL)
    for given, asked, expected in [
        (np.float32, None, np.float32),
        (np.float64, None, np.float64),
        (np.float32, "float64", np.float64),
        (np.float64, np.float32, np.float32),
        (np.int64, None, np.float64),
    ]:
        solution = _quiet(op, y.astype(given), dtype=asked, random_state=0, max_iter=3)
        assert {w.dtype for w in solution.factors} == {np.dtype(expected)}


def test_shapes_of_the_factors():
    rng = np.random.default_rng(0)
    op = random_mask(9, 7, 30, rng)
    y = rng.standard_normal(op.size)
    shapes = lambda **kw: [w.shape for w in _quiet(op, y, random_state=0, max_iter=2, **kw).factors]  # noqa: E731
    assert shapes() == [(7, 7), (7, 7), (9, 7)]
    assert shapes(depth=1) == [(9, 7)]
    assert shapes(depth=2, width=3) == [(3, 7), (9, 3)]
    assert shapes(depth=4, width=(5, 12, 2)) == [(5, 7), (12, 5), (2, 12), (9, 2)]
    square = random_mask(8, 8, 30, rng)
    y = rng.standard_normal(square.size)
    assert [w.shape for w in _quiet(square, y, symmetric=True, random_state=0, max_iter=2).factors] == [(8, 8)]
    assert [w.shape for w in _quiet(square, y, symmetric=True, width=3, random_state=0, max_iter=2).factors] == [(8, 3)]


def test_symmetric_sensing_recovers(rng):
    """Li, Ma, Zhang: full-width U, m = 5 d r Gaussian measurements, small orthogonal start."""
    d, r = 20, 2
    u = rng.standard_normal((d, r))
    truth = u @ u.T / np.linalg.norm(u @ u.T, 2)
    op = fastdmf.symmetric_part(fastdmf.GaussianDense(rng.standard_normal((5 * d * r, d, d))))
    solution = fastdmf.solve(
        op, op.apply(truth), symmetric=True, init="orthogonal", init_scale=1e-6, random_state=0, truth=truth, tol=1e-8
    )
    assert solution.status is Status.CONVERGED
    assert solution.history["error"][-1] < 1e-4
    np.testing.assert_array_equal(solution.matrix(), solution.matrix().T)


def test_inputs_are_never_changed(rng):
    _, op, y = completion(0, **SMALL)
    w, factors = rng.random(len(y)), [0.1 * rng.standard_normal((24, 24)) for _ in range(3)]
    copies = [a.copy() for a in (y, w, *factors)]
    for a in (y, w, *factors):
        a.flags.writeable = False
    solution = _quiet(op, y, weights=w, factors=factors, max_iter=10, validation=0.2, random_state=0)
    for a, b in zip((y, w, *factors), copies):
        np.testing.assert_array_equal(a, b)
    assert not any(np.shares_memory(a, b) for a, b in zip(solution.factors, factors))


def test_exact_zero_data_converges_at_once():
    op = random_mask(6, 5, 12, np.random.default_rng(0))
    solution = fastdmf.solve(op, np.zeros(op.size), random_state=0)
    assert solution.status is Status.CONVERGED and solution.n_iter == 0


BAD = [
    (dict(y=np.zeros(3)), ValueError, "y has 3 measurements.*operator 300"),
    (dict(y=np.full(300, np.nan)), ValueError, "y contains NaN"),
    (dict(y=np.full(300, 1j)), TypeError, "y must hold real"),
    (dict(y=np.full(300, "a")), TypeError, "y must hold real"),
    (dict(y=np.zeros((2, 2, 300))), ValueError, "y must have 1 or 2 dimensions"),
    (dict(y=np.full(300, 1e300), dtype="float32"), ValueError, "y overflows in float32"),
    (dict(operator=np.eye(3)), TypeError, "as_operator"),
    (dict(weights=np.full(300, -1.0)), ValueError, "weights must not be negative"),
    (dict(weights=np.zeros(300)), ValueError, "weights are zero"),
    (dict(weights=np.ones(5)), ValueError, "weights has 5"),
    (dict(weights=np.full(300, np.inf)), ValueError, "weights contains NaN or inf"),
    (dict(depth=0), ValueError, "depth must be an integer >= 1, got 0"),
    (dict(depth=2.5), ValueError, "depth must be an integer"),
    (dict(depth=True), ValueError, "depth must be an integer"),
    (dict(width=0), ValueError, "width must be an integer >= 1"),
    (dict(width=np.array(2)), ValueError, "width must be an integer >= 1, got array"),
    (dict(width=-3), ValueError, "width must be"),
    (dict(width=(3, 0)), ValueError, "width must be"),
    (dict(width=(3, 3, 3)), ValueError, "depth - 1 = 2 inner widths, got 3"),
    (dict(init="he"), ValueError, "init must be one of"),
    (dict(init_scale=0), ValueError, "init_scale must be a number > 0"),
    (dict(init_scale=-1e-3), ValueError, "init_scale"),
    (dict(init_scale=np.inf), ValueError, "init_scale"),
    (dict(tol=0), ValueError, "tol must be a number > 0"),
    (dict(tol=-1), ValueError, "tol"),
    (dict(l2=-1), ValueError, "l2 must be a number >= 0"),
    (dict(loss="rmse"), ValueError, "loss must be one of"),
    (dict(elementwise_loss="l3"), ValueError, "elementwise_loss must be one of"),
    (dict(elementwise_loss="huber"), ValueError, "needs a positive threshold"),
    (dict(elementwise_loss=("huber", -1)), ValueError, "needs a positive threshold"),
    (dict(elementwise_loss=("squared", 1)), ValueError, "takes no threshold"),
    (dict(rule="sgd"), ValueError, "rule must be one of"),
    (dict(max_iter=-1), ValueError, "max_iter must be an integer >= 0"),
    (dict(max_iter=1.5), ValueError, "max_iter"),
    (dict(check_every=0), ValueError, "check_every"),
    (dict(patience=0), ValueError, "patience"),
    (dict(on_failure="raise"), ValueError, "on_failure must be 'warn' or 'ignore'"),
    (dict(callback=3), TypeError, "callback must be callable"),
    (dict(track=("rank",)), ValueError, "track knows"),
    (dict(truth=np.zeros((24, 24))), ValueError, "truth is zero"),
    (dict(truth=np.ones((3, 3))), ValueError, "truth has shape"),
    (dict(validation=0.0), ValueError, "validation must be a fraction"),
    (dict(validation=1.0), ValueError, "validation must be a fraction"),
    (dict(validation=1e-9), ValueError, "leaves one side empty"),
    (dict(validation=[0, 0]), ValueError, "distinct"),
    (dict(validation=[0, 300]), ValueError, r"in \[0, 300\)"),
    (dict(validation=np.arange(300)), ValueError, "weights are zero"),
    (dict(device="tpu"), ValueError, "device must be"),
    (dict(device="cuda"), RuntimeError, "device='cuda' is not available: .*Use device='cpu'"),
    (dict(n_threads=0), ValueError, "n_threads must be a positive integer"),
    (dict(n_threads=1.0), ValueError, "n_threads"),
    (dict(dtype="float16"), ValueError, "dtype must be float32 or float64"),
    (dict(dtype="no"), ValueError, "dtype must be float32 or float64"),
    (dict(random_state=-1), ValueError, "random_state must hold integers >= 0"),
    (dict(random_state="a"), ValueError, "random_state"),
    (dict(random_state=[]), ValueError, "random_state is empty"),
    (dict(random_state=[1, 2], y=np.ones((3, 300))), ValueError, "batch axes differ"),
    (dict(symmetric=True, depth=3), ValueError, "depth 2; got depth=3"),
    (dict(factors=[]), ValueError, "factors is empty"),
    (dict(factors=3), TypeError, "factors must be a list"),
    (dict(factors=[np.ones((24, 24)), np.ones((24, 3))]), ValueError, r"factors\[1\].*does not fit"),
    (dict(factors=[np.ones((24, 24)), np.ones((3, 24))]), ValueError, "multiply to a"),
    (dict(factors=[np.ones((24, 24))], symmetric=True, y=None), None, None),
    (dict(factors=[np.ones((24, 24))] * 2, symmetric=True), ValueError, "has one factor, got 2"),
    (dict(factors=[np.ones((5, 24))], symmetric=True), ValueError, "has 5 rows"),
    (dict(factors=[np.ones((2, 24, 24)), np.ones((3, 24, 24))]), ValueError, "batch axes of different"),
    (dict(factors=[np.zeros((24, 24))] * 3), ValueError, "start cannot move: its gradient is exactly zero"),
]


@pytest.mark.parametrize(
    ("change", "error", "match"), BAD, ids=[f"{i}-{'-'.join(c)}" for i, (c, _, _) in enumerate(BAD)]
)
def test_bad_input(change, error, match):
    _, op, y = completion(0, **SMALL)
    if error is None:  # a good start of the same kind, so that the row above fails for its own reason
        change = {**change, "y": y}
        assert _quiet(change.pop("operator", op), change.pop("y"), max_iter=2, **change).n_iter == 2
        return
    arguments = {"operator": op, "y": y, "random_state": 0, **change}
    with pytest.raises(error, match=match):
        fastdmf.solve(arguments.pop("operator"), arguments.pop("y"), **arguments)


def test_symmetric_needs_a_square_matrix():
    op = random_mask(5, 4, 10, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"square matrix, got shape \(5, 4\)"):
        fastdmf.solve(op, np.ones(op.size), symmetric=True)


def test_a_start_that_float32_cannot_move_is_refused():
    """Plateau growth per step below rounding (relative increment eta g alpha^((N-2)/N))."""
    _, op, y = completion(0, **SMALL)
    slow = dict(rule=GradientDescent(lr=1e-3), depth=4, init_scale=1e-14, random_state=0)
    with pytest.raises(ValueError, match="rounded away in float32.*dtype='float64'"):
        fastdmf.solve(op, y.astype(np.float32), **slow)
    assert _quiet(op, y, max_iter=3, **slow).n_iter == 3  # float64 moves
    with pytest.raises(ValueError, match=r"gradient is exactly zero \(init_scale=1e-200\)"):
        fastdmf.solve(op, y.astype(np.float32), depth=5, init_scale=1e-200, random_state=0)
    assert _quiet(op, y.astype(np.float32), depth=4, init_scale=1e-14, random_state=0, max_iter=200).history["loss"][
        -1
    ] < 0.5 * np.mean(y**2)


def test_import_needs_no_scikit_learn():
    code = (
        "import sys, numpy as np, fastdmf\n"
        "op = fastdmf.EntryMask([0, 1, 2], [0, 1, 1], (3, 2))\n"
        "fastdmf.solve(op, np.ones(3), random_state=0)\n"
        "assert 'sklearn' not in sys.modules and 'kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_state_none_differs_between_calls():
    _, op, y = completion(0, **SMALL)
    a, b = (_quiet(op, y, max_iter=2).factors[0] for _ in range(2))
    assert not np.array_equal(a, b)


def test_compile_time_stands_apart():
    """A kernel that has to be compiled is not counted as time of the solve, and only once."""
    import numba

    from fastdmf.backend import compile_clock

    @numba.njit
    def twice(x):
        return 2 * x

    with compile_clock() as first:
        twice(1.0)
    with compile_clock() as second:
        twice(1.0)
    assert first.compile_seconds > 0.005 > second.compile_seconds
    assert 0 <= first.seconds < first.compile_seconds
    rng = np.random.default_rng(0)
    mask = fastdmf.EntryMask(*np.divmod(rng.permutation(200)[:150], 10), (20, 10))
    for _ in range(2):
        solution = fastdmf.solve(mask, rng.standard_normal(150), max_iter=5, random_state=0, on_failure="ignore")
    assert solution.seconds > 0 and solution.compile_seconds < 0.005
