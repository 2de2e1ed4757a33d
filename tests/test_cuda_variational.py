"""vbmf on a double of cupy, or on a GPU: sweep by sweep beside the CPU's run."""

import numpy as np
import pytest
import test_cuda_backend

import fastdmf
from fastdmf import alternating, row_subset, variational
from fastdmf.alternating import Sweeps
from fastdmf.arrays import as_host, is_on_device
from fastdmf.engine import Status
from fastdmf.shards import write_shards
from fastdmf.variational import bias_model, vbmf

pytestmark, cupy, double = test_cuda_backend.pytestmark, test_cuda_backend.cupy, test_cuda_backend.double

N1, N2 = 40, 300
FAST = {"random_state": 5, "on_failure": "ignore"}


def ratings(seed=0, *, count=1300, strength=1.0, noise=0.3):
    """Return (mask, y, truth) of rank 2 with biases and noise; empty rows and columns, and one row of 280 entries."""
    rng = np.random.default_rng(seed)
    full = 2 + 0.3 * rng.standard_normal((N1, 1)) + 0.3 * rng.standard_normal(N2)
    full += strength * rng.standard_normal((N1, 2)) @ rng.standard_normal((2, N2))
    full += noise * rng.standard_normal((N1, N2))
    seen = np.zeros((N1, N2), bool)
    seen.flat[rng.choice(N1 * N2, count, replace=False)] = True
    seen[7, :280] = True
    seen[[0, 5]] = seen[:, [0, 3]] = False
    rows, cols = np.nonzero(seen)
    order = rng.permutation(len(rows))
    mask = fastdmf.EntryMask(rows[order], cols[order], (N1, N2))
    return mask, full[mask.rows, mask.cols], full


def traced(*args, **kwargs):
    """Return the solution and what every sweep left: noise, squared error, prior variances, live columns of factors."""
    seen, step = [], Sweeps.step

    def noted(sweeps):
        step(sweeps)
        sides = [(side.prior.copy(), as_host(side.x[:, : sweeps.live])) for side in sweeps.sides]
        seen.append((sweeps.noise, sweeps.squared_error, *(a.copy() for side in sides for a in side)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweeps, "step", noted)
        return vbmf(*args, **kwargs), seen


def apart(a, b):
    """Return the largest relative distance of arrays of two runs, in the norm."""
    return max(np.linalg.norm(np.subtract(x, y)) / np.linalg.norm(y) for x, y in zip(a, b, strict=True))


def error(solution, mask, full):
    outside = np.ones(full.shape, bool)
    outside[mask.rows, mask.cols] = False
    return np.sqrt(np.mean((solution.matrix() - full)[outside] ** 2))


KINDS = {
    "plain": {"implicit_features": False},
    "features": {"implicit_features": True},
    "weights": {"implicit_features": True, "weights": True},
    "tied": {"implicit_features": False, "depth": 4},
    "no_biases": {"implicit_features": True, "biases": False, "depth": 3},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_follow_the_cpu(cupy, kind, dtype):
    """The same start, noise, prior variances and factors over the first sweeps, and the same predictions at the end."""
    mask, y, full = ratings()
    options = {**FAST, "width": 6, "max_iter": 9, "tol": 0.0, "dtype": dtype, **KINDS[kind]}
    if "weights" in options:
        options["weights"] = np.random.default_rng(1).random(len(y)) * (np.arange(len(y)) % 7 > 0)
    (host, expected), (device, got) = (traced(mask, y, device=name, **options) for name in ("cpu", "cuda"))
    assert (host.device, device.device) == ("cpu", "cuda")
    assert len(got) == len(expected) == device.n_iter == 9
    largest = max(apart(a, b) for a, b in zip(got, expected))
    print(f"{kind}, {np.dtype(dtype)}: {largest:.1e} apart over {len(got)} sweeps")
    assert largest < (1e-3 if dtype == np.float32 else 1e-8)
    errors = error(device, mask, full), error(host, mask, full)
    assert abs(errors[0] / errors[1] - 1) < (1e-5 if dtype == np.float32 else 1e-6)
    for a, b in zip(device.factors, host.factors):
        assert isinstance(a, np.ndarray) and a.dtype == dtype and a.shape == b.shape


def test_every_option_off_its_default(cupy):
    mask, y, full = ratings(1)
    records = []
    settings = {"weights": np.random.default_rng(2).random(len(y)) + 0.1, "depth": 4, "width": 5, "tol": 2e-3}
    settings |= {"implicit_features": True, "biases": False, "max_iter": 12, "n_init": 2, "n_threads": 1}
    settings |= {"dtype": "float64", "random_state": 3, "on_failure": "ignore"}

    def callback(progress):
        records.append([w.copy() for w in progress.factors()])

    host, device = (
        vbmf(mask, y.astype(np.float32), device=name, callback=callback, **settings) for name in ("cpu", "cuda")
    )
    assert host.status is device.status and host.n_iter == device.n_iter and host.n_eval == device.n_eval
    half = len(records) // 2
    assert all(isinstance(w, np.ndarray) for record in records for w in record)
    products = [record[1] @ record[0] for record in records]
    for a, b in zip(products[half + 2 : half + 6], products[2:6]):
        np.testing.assert_allclose(a, b, atol=1e-8 * np.abs(b).max())
    for name in host.history:
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=1e-7)
    assert len(device.fits) == 2 and device.components == host.components
    np.testing.assert_allclose(device.matrix(), host.matrix(), atol=1e-7)
    assert abs(device.noise / host.noise - 1) < 1e-7 and device.mean == host.mean
    assert error(device, mask, full) == pytest.approx(error(host, mask, full), rel=1e-6)


@pytest.mark.parametrize(
    ("data", "options", "ending"),
    [
        ({"seed": 4, "count": 1800, "strength": 0.7}, {}, "without features"),
        ({"seed": 2, "strength": 0.0, "noise": 1.0}, {}, "biases alone"),
        ({"seed": 2, "count": 3500}, {"width": 15, "depth": 2}, "untied"),
    ],
)
def test_rivals_are_preferred_alike(cupy, data, options, ending):
    """Fits to convergence, others tried behind them; one case for each end."""
    mask, y, full = ratings(**data)
    host, device = (vbmf(mask, y, device=name, **{"width": 6} | options, **FAST) for name in ("cpu", "cuda"))
    assert device.status is host.status and device.n_iter == host.n_iter and device.components == host.components
    for solution in (host, device):
        if ending == "without features":
            assert solution.sweeps.rows.regression is None and solution.components > 0
        elif ending == "biases alone":
            assert solution.components == 0
        else:
            assert solution.sweeps.settings.theta == 1
    assert error(device, mask, full) == pytest.approx(error(host, mask, full), rel=1e-6)
    np.testing.assert_allclose(device.row_bias, host.row_bias, atol=1e-7)
    np.testing.assert_allclose(device.sweeps.evidence(), host.sweeps.evidence(), rtol=1e-9)


def test_dead_components_leave(cupy, monkeypatch):
    """Into narrower rows, as with many entries; rows are summed in several blocks."""
    monkeypatch.setattr(alternating, "_FEW", 0)
    monkeypatch.setattr(alternating, "_BLOCK_ON_DEVICE", 16)
    mask, y, full = ratings(3, count=2000)
    weights = np.random.default_rng(2).random(len(y)) + 0.5  # as many distinct counts as rows
    options = {**FAST, "width": 12, "implicit_features": True, "tol": 1e-7, "weights": weights}
    host, device = (vbmf(mask, y, device=name, **options) for name in ("cpu", "cuda"))
    assert device.components == host.components < 7
    assert device.sweeps.rows.x.shape == host.sweeps.rows.x.shape == (N1, 8)
    assert error(device, mask, full) == pytest.approx(error(host, mask, full), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 2)])
def test_tiny_matrices(cupy, shape):
    rows, cols = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    mask = fastdmf.EntryMask(rows, cols, shape)
    host, device = (vbmf(mask, rows + 1.0, device=name, **FAST) for name in ("cpu", "cuda"))
    np.testing.assert_allclose(device.matrix(), host.matrix(), atol=1e-8)


def test_the_model_is_on_the_host(cupy):
    """Predictions, their deviations and rows that come later; nothing of the fit stays on the device."""
    mask, y, _ = ratings(4)
    host, device = (vbmf(mask, y, width=4, max_iter=6, device=name, **FAST) for name in ("cpu", "cuda"))
    for a, b in zip(device.predict(mask.rows, mask.cols, True), host.predict(mask.rows, mask.cols, True)):
        np.testing.assert_allclose(a, b, atol=1e-8)
    models = device.factor_model(), host.factor_model()
    entries = np.array([0, 3]), np.arange(19, dtype=np.int32), np.linspace(-1, 1, 19), None
    new = [model.fold_in(*entries).block(np.array([0])) for model in models]
    np.testing.assert_allclose(*new, atol=1e-8)

    for ours, theirs in zip(device.sweeps.sides, host.sweeps.sides):
        assert ours.solvers is None and ours.regression is not None
        for mine, other in ((ours, theirs), (ours.regression, theirs.regression), (device.sweeps, host.sweeps)):
            kinds = [{name: type(value) for name, value in vars(part).items()} for part in (mine, other)]
            assert kinds[0] == kinds[1] and not any(is_on_device(value) for value in vars(mine).values())


def test_arrays_of_the_device_give_factors_there(cupy):
    mask, y, _ = ratings(4)
    options = {**FAST, "width": 4, "max_iter": 4}
    host, device = (
        vbmf(mask, y, **options),
        vbmf(mask, cupy.asarray(y), weights=cupy.asarray(np.ones_like(y)), **options),
    )
    assert device.device == "cuda" and all(isinstance(w, cupy.ndarray) for w in device.factors)
    np.testing.assert_allclose(
        (device.factors[1] @ device.factors[0]).get(), host.factors[1] @ host.factors[0], atol=1e-8
    )
    back = vbmf(mask, cupy.asarray(y), device="cpu", **options)
    assert back.device == "cpu" and back.matrix().tobytes() == host.matrix().tobytes()
    assert back.factors[0].get().tobytes() == host.factors[0].tobytes()


def test_the_start_is_that_of_the_cpu(cupy):
    """Before the first sweep, to the rounding of the biases' regressions."""
    mask, y, _ = ratings(4)
    starts, start = [], Sweeps.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Sweeps, "start", lambda sweeps: (start(sweeps), starts.append([as_host(s.x).copy() for s in sweeps.sides]))
        )
        for name in ("cpu", "cuda"):
            vbmf(mask, y, width=4, max_iter=1, device=name, **FAST)
    assert apart(starts[1], starts[0]) < 1e-12 and np.linalg.norm(starts[0][1][:, 2:6]) > 0


# --- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "most"), [(False, 3), (True, 7)])
def test_the_host_waits_a_few_times_a_sweep(double, monkeypatch, features, most):
    """Results fetched: those of both halves of a sweep and of the evidence, and two of each regression on features."""
    fastdmf.backend.get_backend("cuda")  # which waits for its trial
    mask, y, _ = ratings(4)
    fetched, uploaded = [], []
    get, array = double.asnumpy, double.array
    monkeypatch.setattr(double, "asnumpy", lambda a: fetched.append(a.nbytes) or get(a))
    monkeypatch.setattr(double, "array", lambda a, *p, **k: uploaded.append(a) or array(a, *p, **k))
    counts = []
    for sweeps in (8, 13):
        fetched.clear()
        uploaded.clear()
        vbmf(mask, y, width=4, tol=0.0, max_iter=sweeps, implicit_features=features, device="cuda", **FAST)
        counts.append((len(fetched), sum(isinstance(a, np.ndarray) for a in uploaded)))
    waits, uploads = (np.subtract(*reversed(counts)) / 5).tolist()
    print(f"a sweep: {waits:g} results fetched, {uploads:g} uploads of vectors of the width")
    assert waits <= most and uploads <= 12


# --- shards, checkpoints, refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_shards_are_streamed(cupy, tmp_path, weighted):
    mask, y, full = ratings(4)
    weights = [np.random.default_rng(2).random(len(y)).astype(np.float32) + 0.1] * weighted
    part = mask.rows, mask.cols, y.astype(np.float32), *weights
    stored = write_shards(tmp_path / "x", [part], (N1, N2), shard_entries=400)
    options = {**FAST, "width": 5, "max_iter": 8, "dtype": "float64"}
    host, device = (vbmf(stored, device=name, **options) for name in ("cpu", "cuda"))
    assert len(list(device.sweeps.rows.entries.blocks())) > 3
    np.testing.assert_allclose(device.matrix(), host.matrix(), atol=1e-8)
    assert error(device, mask, full) == pytest.approx(error(host, mask, full), rel=1e-6)
    held = vbmf(
        mask, y.astype(np.float32), weights=weights[0] if weighted else None, implicit_features=False, **options
    )
    np.testing.assert_allclose(device.matrix(), held.matrix(), atol=1e-6)


def test_a_start_from_some_rows(cupy, monkeypatch):
    monkeypatch.setattr(variational, "_SUBSET_FROM", 0)
    monkeypatch.setattr(row_subset, "_ROWS", 1)
    monkeypatch.setattr(row_subset, "_SHARE", 0.9)
    monkeypatch.setattr(row_subset, "_ENTRIES", 1)
    mask, y, _ = ratings(4)
    options = {**FAST, "width": 4, "max_iter": 8}
    host, device = (vbmf(mask, y, device=name, **options) for name in ("cpu", "cuda"))
    np.testing.assert_allclose(device.matrix(), host.matrix(), atol=1e-8)
    monkeypatch.setattr(variational, "fit_some_rows", lambda *a: None)
    assert not np.allclose(vbmf(mask, y, **options).matrix(), host.matrix(), atol=1e-3)


@pytest.mark.parametrize(("before", "after"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_checkpoints_go_on_on_any_device(cupy, tmp_path, monkeypatch, before, after):
    """To the same bits on the same one; a component has died when the file is written."""
    monkeypatch.setattr(alternating, "_FEW", 0)
    monkeypatch.setattr(alternating, "_DEAD", 0.3)
    mask, y, _ = ratings(4)
    options = {**FAST, "width": 8, "tol": 0.0, "implicit_features": True, "max_iter": 9}
    whole = vbmf(mask, y, device=after, **options)
    file = fastdmf.Checkpoint(tmp_path / "run.npz", every=0)
    stop = {"callback": lambda progress: progress.iteration == 6, "checkpoint": file}
    stopped = vbmf(mask, y, device=before, **stop, **options)
    assert stopped.status is Status.STOPPED and stopped.components < 7
    resumed = vbmf(mask, y, device=after, checkpoint=file, **options)
    assert resumed.n_iter == whole.n_iter == 9
    if before == after:
        assert resumed.matrix().tobytes() == whole.matrix().tobytes()
        np.testing.assert_array_equal(resumed.history["evidence"], whole.history["evidence"])
    else:
        np.testing.assert_allclose(resumed.matrix(), whole.matrix(), atol=1e-8)


def test_too_wide(cupy):
    rng = np.random.default_rng(0)
    rows, cols = np.divmod(rng.choice(600 * 520, 2000, replace=False), 520)
    mask, y = fastdmf.EntryMask(rows, cols, (600, 520)), rng.standard_normal(2000)
    with pytest.raises(ValueError, match=r"width 255 is more than the 254 of the GPU's kernels: .*device='cpu'"):
        vbmf(mask, y, width=255, device="cuda")
    with pytest.raises(ValueError, match="width 257 is more than the 256"):
        vbmf(mask, y, width=257, biases=False, device="cuda")


def test_out_of_memory_tells_the_bytes(double, monkeypatch):
    mask, y, _ = ratings(4)
    monkeypatch.setattr(double.memory, "limit", 9_000)
    with pytest.raises(MemoryError, match=r"no room: Out of memory allocating [\d,]+ bytes.*9,000 bytes of the device"):
        vbmf(mask, y, device="cuda", **FAST)


# --- what stands on it -----------------------------------------------------------------------------------------------


def test_biases_alone(cupy):
    mask, y, _ = ratings(4)
    weights = np.random.default_rng(2).random(len(y)) + 0.1
    host, device = (bias_model(mask, y, weights=weights, device=name) for name in ("cpu", "cuda"))
    for a, b in zip(device.biases(), host.biases()):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert device.noise == pytest.approx(host.noise, rel=1e-12)


@pytest.mark.parametrize("solver", ["variational", "descent"])
def test_completer(cupy, solver):
    mask, y, _ = ratings(4)
    pairs = np.column_stack([mask.rows, mask.cols])
    options = {"width": 4, "max_iter": 6, "solver": solver, "random_state": 0}
    if solver == "descent":
        options["rule"] = fastdmf.rules.Adam(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6)
    known = np.isin(np.arange(N1), mask.rows)[:, None] & np.isin(np.arange(N2), mask.cols)
    hidden = np.column_stack(np.nonzero(known))[::7]
    with pytest.warns(match="MAX_ITER"):
        models = [fastdmf.DMFCompleter(device=name, **options).fit(pairs, y) for name in ("cpu", "cuda")]
    assert [model.device_ for model in models] == ["cpu", "cuda"]
    np.testing.assert_allclose(models[1].predict(hidden), models[0].predict(hidden), atol=1e-7)
    new = np.array([["new", 5], ["new", 9]], dtype=object)
    folded = [model.fold_in(new, [1.0, 3.0]).predict(np.array([["new", 11]], dtype=object)) for model in models]
    np.testing.assert_allclose(*folded, atol=1e-7)


def test_imputer(cupy):
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 20)) + 0.1 * rng.standard_normal((50, 20))
    holed = np.where(rng.random(truth.shape) < 0.4, np.nan, truth)
    models = [
        fastdmf.DMFImputer(device=name, solver="variational", random_state=0).fit(holed) for name in ("cpu", "cuda")
    ]
    assert [model.device_ for model in models] == ["cpu", "cuda"]
    np.testing.assert_allclose(models[1].transform(holed), models[0].transform(holed), atol=1e-6)
    assert models[1].n_iter_ == models[0].n_iter_
