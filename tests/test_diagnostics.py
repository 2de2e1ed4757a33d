"""What ``track=`` records, against plain NumPy along real runs; batches, checkpoints, bad arguments."""

import itertools
import warnings

import numpy as np
import pytest
from conftest import OPERATORS, completion

import fastdmf
from fastdmf import diagnostics
from fastdmf.diagnostics import TRACKS, Entries
from fastdmf.engine import SolveWarning, Status, singular_values
from fastdmf.rules import GradientDescent, GroupRMSprop

CHAIN = ("singular_values", "top_singular_values", "nuclear_norm", "effective_rank", "schatten", "imbalance")
ALIGNMENT = ("alignment_diagonal", "alignment_offdiagonal")
SIGNAL = ("subspace_angle", "error_norm", "signal_min")


@pytest.fixture
def iterated(monkeypatch):
    """Use the subspace iteration also where the decomposition would be as quick."""
    monkeypatch.setattr(diagnostics, "_EXACT_WIDTH", 0)


def product(factors):
    out = factors[0]
    for w in factors[1:]:
        out = w @ out
    return out


def spectral_oracle(factors):
    """Return what the spectrum's names stand for, from the full matrix."""
    w = product(factors)
    s = np.linalg.svd(w, compute_uv=False)
    p = s[s > 0] / s.sum()
    pairs = itertools.pairwise(factors)
    gaps = [np.linalg.norm(b.T @ b - a @ a.T) / np.linalg.norm(a) ** 2 for a, b in pairs]
    return {
        "singular_values": s[:10],
        "top_singular_values": s[:10],
        "nuclear_norm": s.sum(),
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "schatten": np.sum(s ** (2 / len(factors))),
        "imbalance": max(gaps, default=0.0),
    }


def alignment_oracle(w, op, y, weights, loss):
    """Return U^T G V on and off the diagonal, with G by definition from the operator's adjoint."""
    c = {"mse": 1 / weights.sum(), "mse/2": 0.5 / weights.sum(), "sse": 1.0, "sse/2": 0.5}[loss]
    g = 2 * c * op.adjoint(weights * (op.apply(w) - y))
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    inner = np.abs(u.T @ g @ vt.T)
    on, off = inner.diagonal(), inner[~np.eye(len(inner), dtype=bool)]
    return {"alignment_diagonal": [on.mean(), on.std()], "alignment_offdiagonal": [off.mean(), off.std()]}


def followed(op, y, **options):
    """Run ``solve`` and return it with the factors of every record; a batch is a list of them for each slice."""
    seen = []
    run = fastdmf.solve(op, y, callback=lambda p: seen.append(p.factors()) and None, on_failure="ignore", **options)
    return run, seen


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_records_are_what_they_say(name, depth):
    rng = np.random.default_rng(depth)
    op = OPERATORS[name](12, 9, 70, rng)
    ys, weights = rng.standard_normal((2, op.size)), rng.random(op.size) + 0.1
    rows, cols = [0, 3, 11], [8, 3, 0]
    options = {"weights": weights, "depth": depth, "loss": "mse/2", "init_scale": 0.3, "tol": 1e-300}
    options |= {"rule": GroupRMSprop(lr=0.03), "max_iter": 30, "check_every": 10}
    track = (*CHAIN, *ALIGNMENT, ("entries", rows, cols))
    run, seen = followed(op, ys, track=track, random_state=[5, 6], **options)
    assert len(seen) == 4
    for t, record in enumerate(seen):
        for b in range(2):
            factors = [w[b] for w in record]
            w = product(factors)
            expected = spectral_oracle(factors) | alignment_oracle(w, op, ys[b], weights, "mse/2")
            for key, value in (expected | {"entries": w[rows, cols]}).items():
                np.testing.assert_allclose(run.history[key][t, b], value, rtol=1e-6, atol=1e-9, err_msg=key)
    for b in range(2):
        single, _ = followed(op, ys[b], track=track, random_state=5 + b, **options)
        for key in (*CHAIN, *ALIGNMENT, "entries"):
            np.testing.assert_allclose(run[b].history[key], single.history[key], rtol=1e-8, atol=1e-12, err_msg=key)


def test_narrow_chains_and_names_alone():
    """Through the thin halves; one name alone gives what it gives among others; float32 too."""
    truth, op, y = completion(0, n=40, rank=2, count=700)
    options = {"depth": 3, "width": (5, 9), "random_state": 0, "max_iter": 40, "check_every": 20}
    run, seen = followed(op, y, track=(*CHAIN, *ALIGNMENT), **options)
    for t, factors in enumerate(seen):
        for key, value in spectral_oracle(factors).items():
            value = value[:5] if np.ndim(value) and run.history[key].shape[1] == 5 else value
            np.testing.assert_allclose(run.history[key][t], value, rtol=1e-6, atol=1e-12, err_msg=key)
    assert run.history["alignment_diagonal"].shape == (3, 2)
    for key in CHAIN:
        for dtype, rtol in (("float64", 1e-9), ("float32", 1e-3)):
            alone, _ = followed(op, y, track=key, dtype=dtype, **options)
            ours, among = (np.atleast_1d(r.history[key][0]) for r in (alone, run))
            np.testing.assert_allclose(ours, among[: len(ours)], rtol=rtol, atol=1e-6 * (dtype == "float32"))


def test_alignment_of_a_thin_chain_counts_its_own_vectors():
    _, op, y = completion(0, n=20, rank=2, count=200)
    run, seen = followed(op, y, depth=2, width=4, random_state=0, max_iter=3, track=ALIGNMENT, loss="sse")
    for t, factors in enumerate(seen):
        w = product(factors)
        u, _, vt = np.linalg.svd(w)
        inner = np.abs(u[:, :4].T @ (2 * op.adjoint(op.apply(w) - y)) @ vt[:4].T)
        off = inner[~np.eye(4, dtype=bool)]
        assert run.history["alignment_diagonal"][t, 0] == pytest.approx(inner.diagonal().mean(), rel=1e-9)
        assert run.history["alignment_offdiagonal"][t, 1] == pytest.approx(off.std(), rel=1e-9)


def test_balance_and_alignment_along_the_flow():
    """At balance the Schatten sum is sum ||W_j||^2 / N; off the diagonal the gradient dies out first."""
    _, op, y = completion(0, n=30, rank=2, count=500)
    run, seen = followed(
        op, y, depth=2, init="identity", rule="flow", max_iter=150, track=["schatten", *ALIGNMENT], random_state=0
    )
    norms = [sum(np.sum(w**2) for w in factors) / 2 for factors in seen]
    np.testing.assert_allclose(run.history["schatten"], norms, rtol=1e-4)
    on, off = run.history["alignment_diagonal"][:, 0], run.history["alignment_offdiagonal"][:, 0]
    ratio = off / on
    print("off the diagonal over on it, start, middle, end:", ratio[[0, len(ratio) // 2, -1]])
    assert ratio[0] > 0.8 and ratio.min() < 0.3


# --- the subspace iteration ------------------------------------------------------------------------------------------

PATHS = {
    # The start's values are all equal.
    "identity, depth 3": (100, 100, dict(depth=3, init="identity", rule=GradientDescent(lr=0.3), max_iter=8000), 50),
    "gaussian, depth 2": (100, 100, dict(depth=2, max_iter=150), 1),
    "narrow": (300, 80, dict(depth=3, width=80, max_iter=120), 1),
    "float32": (150, 150, dict(depth=3, max_iter=100, dtype="float32"), 1),
}


@pytest.mark.parametrize("path", PATHS)
def test_top_singular_values_along_a_run(path, monkeypatch, iterated):
    """Within 1e-3 of each (or 1e-9 of the largest) at every record; the block saves decompositions."""
    n, width, options, every = PATHS[path]
    _, op, y = completion(0, n=n, rank=5, count=n * n // 4)
    decompositions = []
    exact = diagnostics.singular_values
    monkeypatch.setattr(diagnostics, "singular_values", lambda *a: decompositions.append(1) or exact(*a))
    run, seen = followed(op, y, track="top_singular_values", check_every=every, random_state=0, **options)
    worst = 0.0
    for ours, factors in zip(run.history["top_singular_values"], seen):
        factors = [w.astype(np.float64) for w in factors]
        s = np.linalg.svd(product(factors), compute_uv=False)[:10]
        worst = max(worst, np.max((np.abs(ours - s) - 1e-9 * s[0]) / s))
    print(f"{path}: {len(seen)} records, {len(decompositions)} decompositions, largest relative error {worst:.1e}")
    assert len(seen) > 50
    assert worst < 1e-3 and len(decompositions) <= 0.1 * len(seen)


def test_top_singular_values_of_slices_and_of_what_is_decomposed_anyway(iterated):
    _, op, y = completion(0, n=70, rank=3, count=1500)
    options = {"depth": 2, "max_iter": 30, "check_every": 3}
    many, _ = followed(op, y, track="top_singular_values", random_state=[0, 1, 2], **options)
    for b in range(3):
        one, _ = followed(op, y, track="top_singular_values", random_state=b, **options)
        np.testing.assert_allclose(
            many[b].history["top_singular_values"], one.history["top_singular_values"], rtol=1e-6
        )
    both, _ = followed(op, y, track=["top_singular_values", "singular_values"], random_state=0, **options)
    np.testing.assert_array_equal(both.history["top_singular_values"], both.history["singular_values"])


def test_small_widths_are_decomposed():
    """Up to the measured crossover: no error at all."""
    _, op, y = completion(0, n=100, rank=3, count=1500)
    run, _ = followed(op, y, track="top_singular_values", depth=2, max_iter=3, random_state=0)
    both, _ = followed(op, y, track="singular_values", depth=2, max_iter=3, random_state=0)
    np.testing.assert_array_equal(run.history["top_singular_values"], both.history["singular_values"])


def test_subspace_iteration_gives_up_where_it_cannot_converge(monkeypatch):
    """A flat spectrum from a random block: the rounds are not enough, and the decomposition answers."""
    rng = np.random.default_rng(0)
    p, qt = rng.standard_normal((90, 90)), np.linalg.qr(rng.standard_normal((90, 90)))[0]
    block = np.linalg.qr(rng.standard_normal((90, 20)))[0]
    monkeypatch.setattr(diagnostics, "_ROUNDS", 1)
    s, after = diagnostics._subspace_iteration(p, qt, block)
    np.testing.assert_allclose(s, singular_values(p, qt.T)[:10], rtol=1e-12)
    np.testing.assert_allclose(after.T @ after, np.eye(20), atol=1e-12)


# --- signal and error ------------------------------------------------------------------------------------------------


def symmetric_instance(d=14, r=2, m=800, seed=0):
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((d, r)) / np.sqrt(d)
    a = rng.standard_normal((m, d, d))
    op = fastdmf.GaussianDense((a + a.swapaxes(1, 2)) / 2)
    return u @ u.T, op, op.apply(u @ u.T)


def recursion(truth, op, y, start, lr, steps):
    """S_t by its recursion: plain gradient descent, one NumPy step at a time; rows of (angle, ||E||, s_min)."""
    values, vectors = np.linalg.eigh(truth)
    basis = vectors[:, values > 1e-9]
    u, s, out = start.copy(), basis.copy(), []
    for _ in range(steps + 1):
        q = np.linalg.qr(s)[0]
        z = q @ (q.T @ u)
        # The angle between the column space of Z and span(U*).
        space = np.linalg.svd(z)[0][:, : basis.shape[1]]
        sine = np.linalg.svd(space - basis @ (basis.T @ space), compute_uv=False)[0]
        smallest = np.linalg.svd(basis.T @ z, compute_uv=False)[-1]
        out.append((sine, np.linalg.norm(u - z, 2), smallest))
        m = 4 / op.size * op.adjoint(op.apply(u @ u.T) - y)  # the gradient of the mean square is M U
        u, s = u - lr * m @ u, q - lr * m @ q
    return np.array(out)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "wide"])
def test_signal_and_error_by_the_recursion(init):
    truth, op, y = symmetric_instance()
    lr, steps, rng = 0.02, 400, np.random.default_rng(1)
    start = {
        "orthogonal": 1e-2 * np.linalg.qr(rng.standard_normal((14, 14)))[0],
        "gaussian": 1e-2 * rng.standard_normal((14, 14)),
        "wide": 1e-2 * rng.standard_normal((14, 20)),
    }[init]
    run = fastdmf.solve(
        op,
        y,
        factors=[start],
        symmetric=True,
        rule=GradientDescent(lr=lr),
        max_iter=steps,
        check_every=1,
        tol=1e-300,
        truth=truth,
        track=SIGNAL,
        on_failure="ignore",
    )
    expected = recursion(truth, op, y, start, lr, steps)
    for k, name in enumerate(SIGNAL):
        np.testing.assert_allclose(run.history[name], expected[:, k], rtol=1e-6, atol=1e-9, err_msg=name)
    if init == "orthogonal":  # the lemmas' claims: the signal grows to its size, the error stays where it began
        lowest = np.sqrt(np.linalg.eigvalsh(truth)[-2])
        assert run.history["signal_min"][-1] > 0.9 * lowest > 20 * run.history["signal_min"][0]
        assert run.history["error_norm"].max() < 4 * run.history["error_norm"][0]
        assert run.history["subspace_angle"].max() < 0.3


def test_signal_of_a_narrow_start():
    """The projection onto span(U*), and the angle of U's own leading vectors."""
    truth, op, y = symmetric_instance()
    options = {"symmetric": True, "width": 4, "rule": GradientDescent(lr=0.02), "max_iter": 400, "random_state": 0}
    run, seen = followed(op, y, truth=truth, track=SIGNAL, check_every=100, **options)
    basis = np.linalg.eigh(truth)[1][:, -2:]
    for t, (u,) in enumerate(seen):
        z = basis @ (basis.T @ u)
        leading = np.linalg.svd(u)[0][:, :2]
        cosines = np.linalg.svd(basis.T @ leading, compute_uv=False)
        assert run.history["error_norm"][t] == pytest.approx(np.linalg.norm(u - z, 2), rel=1e-9)
        assert run.history["signal_min"][t] == pytest.approx(np.linalg.svd(z)[1][1], rel=1e-9)
        assert run.history["subspace_angle"][t] == pytest.approx(np.sqrt(1 - cosines.min() ** 2), rel=1e-6, abs=1e-7)
    assert run.history["subspace_angle"][-1] < 0.1 < run.history["subspace_angle"][0]


# --- one truth a slice -----------------------------------------------------------------------------------------------


def test_a_truth_for_each_slice_goes_with_its_slice():
    """Slices end at different records; each keeps its own truth, signal and block."""
    instances = [symmetric_instance(seed=seed) for seed in range(3)]
    op = instances[0][1]
    truths = np.stack([truth * scale for (truth, _, _), scale in zip(instances, (1.0, 0.5, 1.5))])
    ys = np.stack([op.apply(truth) for truth in truths])
    options = {"symmetric": True, "init": "orthogonal", "init_scale": 1e-4, "tol": 1e-6}
    many = fastdmf.solve(op, ys, truth=truths, track=SIGNAL, random_state=[3, 4, 5], **options)
    assert len(set(many.n_iter.tolist())) > 1 and set(many.status) == {Status.CONVERGED}
    for b in range(3):
        one = fastdmf.solve(op, ys[b], truth=truths[b], track=SIGNAL, random_state=3 + b, **options)
        w = many[b].matrix()
        error = np.linalg.norm(w - truths[b]) ** 2 / np.linalg.norm(truths[b]) ** 2
        assert many[b].history["error"][-1] == pytest.approx(error, rel=1e-9)
        rows = slice(0, 40)
        for name in ("error", *SIGNAL):
            np.testing.assert_allclose(
                many[b].history[name][rows], one.history[name][rows], rtol=1e-6, atol=1e-10, err_msg=name
            )
        assert many[b].history["error"][-1] < 1e-3
    batch_of_one = fastdmf.solve(op, ys[0], truth=truths[:1], random_state=3, **options)
    assert len(batch_of_one) == 1  # a leading axis is a batch, also of one


@pytest.mark.filterwarnings("ignore::fastdmf.engine.SolveWarning")
def test_same_bits_after_an_interruption(tmp_path, iterated):
    """The block and the start of the signal survive a checkpoint."""
    truth, op, y = completion(0, n=70, rank=3, count=2500)
    cases = {
        "block": lambda **kw: fastdmf.solve(
            op, y, depth=2, max_iter=30, track=("top_singular_values", ("entries", [1], [2])), random_state=[0, 1], **kw
        )
    }
    symmetric_truth, gaussian, measured = symmetric_instance()
    cases["signal"] = lambda **kw: fastdmf.solve(
        gaussian, measured, symmetric=True, max_iter=30, truth=symmetric_truth, track=SIGNAL, random_state=0, **kw
    )
    for name, run in cases.items():
        whole, path, count = run(), tmp_path / f"{name}.npz", []
        run(checkpoint=path, callback=lambda p, count=count: count.append(1) or len(count) == 12)
        resumed = run(checkpoint=path)
        assert len(count) == 12
        for key, values in whole.history.items():
            np.testing.assert_array_equal(resumed.history[key], values, err_msg=key)


def test_a_diverged_run_is_recorded_as_nan():
    """Decompositions refuse infinite numbers; the record of a run that has diverged between two does not."""
    _, op, y = completion(0, n=20, rank=2, count=200)
    track = [*CHAIN, *ALIGNMENT, ("entries", [0], [0])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        run = fastdmf.solve(
            op, y, rule=GradientDescent(lr=1e4), init_scale=0.1, track=track, check_every=50, random_state=[0, 1]
        )
    assert set(run.status) == {Status.DIVERGED}
    for name in (*CHAIN, *ALIGNMENT, "entries"):
        assert np.isfinite(run.history[name][0]).all() and np.isnan(run.history[name][-1]).all(), name


# --- arguments -------------------------------------------------------------------------------------------------------

BAD = [
    ("rank", ValueError, "track knows singular_values, .*entries.*; got \\['rank'\\]"),
    (["entries"], ValueError, "track knows"),
    ([("entries", [0])], ValueError, "track knows"),
    (3, TypeError, "not iterable"),
    (Entries([0], [12]), ValueError, r"entry \(0, 12\) is outside the 24 x 12 matrix"),
    ([Entries([0], [1]), ("entries", [1], [1])], ValueError, "track takes the entries to record as one"),
    (["error_norm"], ValueError, "error_norm split U.*pass symmetric=True and truth="),
]


@pytest.mark.parametrize(("track", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_tracks(track, error, match):
    op = fastdmf.EntryMask([0, 1, 2], [0, 1, 1], (24, 12))
    with pytest.raises(error, match=match):
        fastdmf.solve(op, np.ones(3), track=track, random_state=0)


@pytest.mark.parametrize(
    ("rows", "cols", "error", "match"),
    [
        ([], [], ValueError, "must be a list of indices"),
        (0, [1], ValueError, r"rows=...\) must be a list of indices, got shape \(\)"),
        ([0.5], [1], TypeError, "must hold integers, got dtype float64"),
        ([0], [-1], ValueError, r"cols=...\) must not be negative, got -1"),
        ([0, 1], [1], ValueError, "as many rows as cols, got 2 and 1"),
    ],
)
def test_bad_entries(rows, cols, error, match):
    with pytest.raises(error, match=match):
        Entries(rows, cols)


def test_signal_needs_a_truth():
    _, op, y = symmetric_instance()
    with pytest.raises(ValueError, match="subspace_angle split U"):
        fastdmf.solve(op, y, symmetric=True, track="subspace_angle", random_state=0)


def test_bad_truths():
    _, op, y = completion(0, n=24, rank=2, count=300)
    for truth, match in [
        (np.ones((2, 3, 24)), r"truth has shape \(2, 3, 24\)"),
        (np.stack([np.ones((24, 24)), np.zeros((24, 24))]), "truth is zero"),
        (np.ones((2, 24, 24)), "batch axes differ"),
        (np.full((24, 24), np.nan), "truth contains NaN"),
    ]:
        with pytest.raises(ValueError, match=match):
            fastdmf.solve(op, y, truth=truth, random_state=[0, 1, 2])


def test_every_name_is_documented():
    for name in TRACKS:
        assert f'"{name}"' in fastdmf.solve.__doc__
