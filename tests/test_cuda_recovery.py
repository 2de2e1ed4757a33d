"""``recover`` on a double of cupy, or on a GPU: tangent vectors, continuation and whole runs beside the CPU's."""

from itertools import pairwise

import numpy as np
import pytest
import test_cuda_backend
from test_recovery import draw, entries, low_rank, relative, tangent_matrix

import fastdmf
from fastdmf import EntryMask, GaussianDense, GaussianSeeded, RankOne, device_bounds, recover, recovery
from fastdmf import noisy_fit as noisy_fit_module
from fastdmf.arrays import as_host
from fastdmf.backend import get_backend
from fastdmf.continuation import Continuation, Schedule
from fastdmf.engine import Status
from fastdmf.noisy_fit import noisy_fit
from fastdmf.recovery import identified
from fastdmf.tangent import (
    LowRank,
    Measurements,
    Tangent,
    degrees_of_freedom,
    gauss_newton,
    ridge_solve,
    thin_svd,
)

pytestmark, cupy, double = test_cuda_backend.pytestmark, test_cuda_backend.cupy, test_cuda_backend.double

N1, N2, RANK, M = 16, 13, 2, 84
KINDS = {
    "sparse": lambda rng: entries(N1, N2, RANK, M / degrees_of_freedom((N1, N2), RANK), rng),
    "dense": lambda rng: entries(N1, N2, RANK, M / degrees_of_freedom((N1, N2), RANK), rng),
    "gaussian": lambda rng: GaussianDense(rng.standard_normal((M, N1, N2))),
    "seeded": lambda rng: GaussianSeeded(5, M, (N1, N2)),
    "rank_one": lambda rng: RankOne(rng.standard_normal((M, N1)), rng.standard_normal((M, N2))),
}


@pytest.fixture(autouse=True)
def sparse_unless_dense(monkeypatch, request):
    """The sparse route for masks, however many of their cells are known, but where a test asks for the dense one."""
    if "dense" not in request.node.name:
        monkeypatch.setattr(device_bounds, "_DENSE", 2.0)


def problem(kind, seed=0):
    """Return (operator, y, truth)."""
    rng = np.random.default_rng(seed)
    truth, _ = low_rank(N1, N2, RANK, rng)
    operator = KINDS[kind](rng)
    assert operator.size == M
    return operator, operator.apply(truth), truth


def noisy():
    """Return (mask, y, truth) of rank 1 with noise of a twentieth of the entries, 63 of 12 x 10."""
    rng = np.random.default_rng(1)
    truth, _ = low_rank(12, 10, 1, rng)
    mask = entries(12, 10, 1, 3.0, rng)
    return mask, truth[mask.rows, mask.cols] + 0.05 * rng.standard_normal(mask.size), truth


@pytest.fixture
def short(monkeypatch):
    """Continuations of a few steps."""
    schedules = Schedule(decay=0.5, end=1e-2), Schedule(first=0.55, decay=0.6, end=1e-2)
    monkeypatch.setattr(recovery, "_SCHEDULES", schedules)


def there(x):
    """Return a decomposition on the device."""
    return LowRank.of(x.parts(), get_backend("cuda").xp)


def formed(x):
    u, s, v = x.parts()
    return (u * s) @ v.T


# --- tangent vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_products_with_tangent_vectors(cupy, kind, rank):
    """As the formulas say, also where 2 r is wider than the matrix."""
    rng = np.random.default_rng(2)
    operator, y, _ = problem(kind)
    weights = rng.uniform(0.5, 2, M)
    _, x = low_rank(N1, N2, rank, rng)
    data = Measurements(operator, y, weights, get_backend("cuda"))
    tangent, plain = Tangent(data, there(x)), Tangent(Measurements(operator, y, weights, get_backend("cpu")), x)
    g, other = draw(plain, rng), draw(plain, rng)
    there_g, matrix = cupy.asarray(g), tangent_matrix(plain, g)
    r = operator.apply(matrix) - y
    loss, slope = tangent.residual(there_g)
    assert isinstance(slope, cupy.ndarray) and tangent.shape == plain.shape
    assert float(loss) == pytest.approx(np.sum(weights * r**2) / np.sum(weights * y**2), rel=1e-10)
    measured = operator.apply(tangent_matrix(plain, other))
    assert np.vdot(other, slope.get()) == pytest.approx(np.vdot(measured, weights * r), rel=1e-9, abs=1e-9)
    expected = np.vdot(measured, weights * operator.apply(matrix))
    assert np.vdot(other, tangent.normal(there_g).get()) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(tangent.predict(there_g).get()[0], operator.apply(matrix), atol=1e-10)
    np.testing.assert_array_equal(tangent.point.get(), plain.point)
    back = tangent.svd(there_g)
    np.testing.assert_allclose(formed(back.truncated(min(2 * rank, N2))), matrix, atol=1e-11)
    x = there(x)
    r = operator.apply(formed(x)) - y
    assert data.loss(x) == pytest.approx(np.sum(weights * r**2) / np.sum(weights * y**2), rel=1e-10)


def test_decompositions(cupy):
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((9, 3)), rng.standard_normal((3, 7))
    x = thin_svd(cupy.asarray(left), cupy.asarray(right))
    assert isinstance(x.u, cupy.ndarray) and isinstance(x.s, np.ndarray)
    np.testing.assert_allclose(formed(x), left @ right, atol=1e-12)
    first, second = (w.get() for w in x.balanced())
    np.testing.assert_allclose(second @ first, left @ right, atol=1e-12)
    other = x.truncated(2)
    assert x.distance(other) == pytest.approx(x.s[2] / np.linalg.norm(x.s), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_ridge_solve_and_gauss_newton(cupy, kind):
    """The same iterations as the CPU's, and the same end."""
    rng = np.random.default_rng(4)
    operator, y, truth = problem(kind)
    _, x = low_rank(N1, N2, RANK, rng)
    found, fits = [], []
    u, s, vt = np.linalg.svd(truth + 0.02 * rng.standard_normal(truth.shape))
    start = LowRank(u[:, :RANK], s[:RANK], vt[:RANK].T)
    for name in ("cpu", "cuda"):
        data = Measurements(operator, y, None, get_backend(name))
        tangent = Tangent(data, LowRank.of(x.parts(), data.xp))
        ridge = data.xp.asarray(np.linspace(0.1, 2, x.u.size + x.v.size + RANK**2).reshape(tangent.shape))
        _, slope = tangent.residual(tangent.point)
        g, count = ridge_solve(tangent, slope, ridge * data.curvature, 1e-9, 500)
        found.append((as_host(g), count))
        fits.append(gauss_newton(data, LowRank.of(start.parts(), data.xp), 20, 1e-12, 300, penalty=1e-3))
    assert found[0][1] == found[1][1] > 3
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-8 * np.abs(found[0][0]).max())
    assert fits[1][1] == pytest.approx(fits[0][1], rel=1e-6)
    assert relative(formed(fits[1][0]), formed(fits[0][0])) < 1e-6


def test_the_host_waits_once_an_iteration(double):
    """Of conjugate gradients, whatever measures."""
    for kind in KINDS:
        operator, y, _ = problem(kind)
        data = Measurements(operator, y, None, get_backend("cuda"))
        tangent = Tangent(data, there(low_rank(N1, N2, RANK, np.random.default_rng(0))[1]))
        _, slope = tangent.residual(tangent.point)
        tangent.normal(slope)  # which uploads what it needs
        waits = []
        for count in (4, 9):
            double.state.syncs = 0
            assert ridge_solve(tangent, slope, 1e-3 * data.curvature, 0.0, count)[1] == count
            waits.append(double.state.syncs)
        assert waits == [5, 10], kind


def test_nothing_left_of_a_direction(cupy):
    """A step along a direction that nothing bends is not kept."""
    operator, y, _ = problem("dense")
    for name in ("cpu", "cuda"):
        data = Measurements(operator, y, np.zeros(M), get_backend(name))
        tangent = Tangent(data, LowRank.of(low_rank(N1, N2, RANK, np.random.default_rng(0))[1].parts(), data.xp))
        g, count = ridge_solve(tangent, data.xp.ones(tangent.shape), 0.0, 0.0, 5)
        assert count == 0 and not as_host(g).any()


def test_few_widths_are_compiled(cupy):
    """Four an octave, each at most a quarter wider than asked for."""
    operator, y, _ = problem("sparse")
    data = Measurements(operator, y, None, get_backend("cuda"))
    widths = [data.buffers(h)[0].shape[2] for h in range(2, 257, 2)]
    assert all(h <= width <= 1.25 * h for h, width in zip(range(2, 257, 2), widths))
    assert len(set(widths)) == 24


@pytest.mark.parametrize("weighted", [False, True])
def test_wider_than_the_kernels(cupy, monkeypatch, weighted):
    """A mask's products of more columns than its kernels take, in parts; with them a whole run."""
    monkeypatch.setattr(device_bounds, "_WIDEST", 4)
    rng = np.random.default_rng(5)
    operator, y, truth = problem("sparse")
    weights = rng.uniform(0.5, 2, M) if weighted else None
    p, qt, r = rng.standard_normal((2, N1, 11)), rng.standard_normal((2, N2, 11)), rng.standard_normal((2, M))
    found = []
    for name in ("cpu", "cuda"):
        backend = get_backend(name)
        bound = operator.bind(
            backend, y[None], weights=None if weights is None else weights[None], width=3, loss=("huber", 0.7), batch=2
        )
        arrays = [backend.asarray(a) for a in (p, qt, r)]
        probe = [backend.asarray(a) for a in (p[:, :, 0], qt[:, :, 0])]
        out = [backend.xp.empty_like(a) for a in arrays[:2]]
        losses = bound.loss_and_pull(*arrays[:2], *out, probe)
        pulled = bound.pull(arrays[2], *arrays[:2])
        found.append([as_host(a) for a in (losses, *out, *probe, bound.forward(*arrays[:2]), *pulled)])
    for a, b in zip(*found):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)
    solution = recover(operator, y, weights=weights, device="cuda", noise=False, random_state=0)
    assert solution.status is Status.EXACT
    assert relative(solution.matrix(), truth) < 1e-10


# --- continuation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_continuation_follows_the_cpu(cupy, kind):
    """From the same start the same eps, exponents, ranks and singular values."""
    operator, y, _ = problem(kind)
    weights = np.random.default_rng(6).uniform(0.5, 2, M)
    paths = []
    for name in ("cpu", "cuda"):
        data = Measurements(operator, y, weights, get_backend(name))
        path, seen = Continuation(data, Schedule(), np.random.default_rng(0)), []
        for _ in range(8):
            seen.append((path.eps, path.exponent, path.rank, *path.x.s))
            path.step()
        assert isinstance(path.x.s, np.ndarray) and isinstance(path.x.u, data.xp.ndarray)
        paths.append(np.array(seen))
    assert paths[0][-1, 2] >= 1
    np.testing.assert_allclose(paths[1][:, :3], paths[0][:, :3], rtol=1e-12)
    # Modes of next to nothing differ by the rounding of the largest.
    apart = np.abs(paths[1] - paths[0])[:, 3:].max(axis=1) / paths[0][:, 3]
    print(f"{kind}: {apart.max():.1e} apart over {len(apart)} steps")
    assert apart.max() < 1e-8


# --- recover -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exact(cupy, kind):
    operator, y, truth = problem(kind)
    records = []

    def callback(progress):
        records.append(progress.factors())

    host, device = (recover(operator, y, device=d, callback=callback, random_state=0) for d in ("cpu", "cuda"))
    assert device.status is host.status is Status.EXACT and device.device == "cuda"
    assert device.rank == RANK and device.n_iter == host.n_iter
    assert relative(device.matrix(), truth) < 1e-10 and device.residual < 1e-10
    assert abs(device.n_eval / host.n_eval - 1) < 0.1
    for name in ("eps", "exponent", "rank"):
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=1e-8)
    assert all(isinstance(w, np.ndarray) for w in [*device.factors, *(w for record in records for w in record)])
    first, second = device.factors
    np.testing.assert_allclose(first @ first.T, second.T @ second, atol=1e-10 * np.linalg.norm(first) ** 2)


def test_weights(cupy):
    """Weights of zero leave entries out, those that remain differ."""
    rng = np.random.default_rng(7)
    truth, _ = low_rank(N1, N2, RANK, rng)
    mask = entries(N1, N2, RANK, 2.5, rng)
    y, weights = truth[mask.rows, mask.cols], rng.uniform(0.5, 2, mask.size)
    wrong = rng.permutation(mask.size)[:30]
    y[wrong] += 5
    weights[wrong] = 0
    solution = recover(mask, y, weights=weights, device="cuda", random_state=0)
    assert solution.status is Status.EXACT
    assert relative(solution.matrix(), truth) < 1e-10


@pytest.mark.parametrize("noise", ["auto, dense", True])
def test_noise(cupy, short, noise):
    mask, y, truth = noisy()
    options = {"noise": noise if noise is True else "auto", "max_rank": 1 if noise is True else 2, "random_state": 0}
    host, device = (recover(mask, y, device=d, **options) for d in ("cpu", "cuda"))
    assert device.status is host.status is Status.NOISE_LEVEL
    assert device.rank == host.rank == 1
    assert device.held_out == pytest.approx(host.held_out, rel=1e-3)
    assert device.noise == pytest.approx(host.noise, rel=1e-3)
    assert relative(device.matrix(), host.matrix()) < 1e-3
    assert relative(device.matrix(), truth) < 0.05


def test_noisy_fit_keeps_the_descent_where_that_is_better(cupy, monkeypatch):
    """Which was run on the device; both see the same held-out measurements."""
    monkeypatch.setattr(noisy_fit_module, "_BETTER", 1e9)
    mask, y, _ = noisy()
    fits, devices, solve = [], [], noisy_fit_module.solve
    monkeypatch.setattr(noisy_fit_module, "solve", lambda *a, **kw: devices.append(kw["device"]) or solve(*a, **kw))
    for name in ("cpu", "cuda"):
        data = Measurements(mask, y, None, get_backend(name))
        fits.append(noisy_fit(data, 1, 0.1, np.random.default_rng(0)))
    assert devices == ["cpu", "cuda"]
    assert isinstance(fits[1][0].u, cupy.ndarray)
    assert fits[1][1] == pytest.approx(fits[0][1], rel=1e-3)
    assert relative(formed(fits[1][0]), formed(fits[0][0])) < 1e-2


def test_identified(cupy):
    """A row of two entries does not determine what three dimensions of a rank leave open."""
    rng = np.random.default_rng(8)
    truth, x = low_rank(N1, N2, 3, rng)
    mask = EntryMask(*np.nonzero(rng.random((N1, N2)) < 0.8), (N1, N2))
    keep = np.ones(mask.size, bool)
    keep[np.flatnonzero(mask.rows == 0)[2:]] = False
    for operator, expected in ((mask, True), (mask.restrict(np.flatnonzero(keep)), False)):
        data = Measurements(operator, operator.apply(truth), None, get_backend("cuda"))
        assert identified(data, there(x), np.random.default_rng(1)) is expected


@pytest.mark.parametrize(("before", "after"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize(("kind", "place"), [("rank_one", 4), ("dense", 11)])
def test_checkpoints_go_on_on_any_device(cupy, tmp_path, before, after, kind, place):
    """To the same bits on the same one."""
    operator, y, _ = problem(kind)
    whole = recover(operator, y, device=after, random_state=0)
    assert whole.n_iter > 11
    file = fastdmf.Checkpoint(tmp_path / "run.npz", every=0)
    stop = {"callback": lambda progress: progress.iteration == place, "checkpoint": file}
    stopped = recover(operator, y, device=before, random_state=0, **stop)
    assert stopped.status is Status.STOPPED and stopped.device == before
    resumed = recover(operator, y, device=after, checkpoint=file, random_state=0)
    assert resumed.status is Status.EXACT and resumed.n_iter == whole.n_iter
    if before == after:
        assert [w.tobytes() for w in resumed.factors] == [w.tobytes() for w in whole.factors]
        assert resumed.n_eval == whole.n_eval
        for name in whole.history:
            np.testing.assert_array_equal(resumed.history[name], whole.history[name])
    else:
        assert relative(resumed.matrix(), whole.matrix()) < 1e-10


def test_checkpoints_of_a_noisy_run_dense(cupy, short, tmp_path, monkeypatch):
    """With a noisy fit, ends of attempts and another continuation in hand."""
    monkeypatch.setattr(recovery, "_CLEAR", 0.0)
    mask, y, _ = noisy()
    options = {"device": "cuda", "random_state": 0, "on_failure": "ignore", "max_rank": 1}
    whole = recover(mask, y, **options)
    file, seen = fastdmf.Checkpoint(tmp_path / "run.npz", every=0), []

    def callback(progress):
        """Stop in the second continuation."""
        seen.append(np.isfinite(progress.values["eps"]))
        return seen[-3:] == [True] * 3 and sum(b and not a for a, b in pairwise(seen)) == 2

    stopped = recover(mask, y, checkpoint=file, callback=callback, **options)
    assert stopped.status is Status.STOPPED and stopped.n_iter < whole.n_iter
    resumed = recover(mask, y, checkpoint=file, **options)
    assert resumed.status is whole.status and resumed.n_iter == whole.n_iter
    assert [w.tobytes() for w in resumed.factors] == [w.tobytes() for w in whole.factors]


@pytest.mark.parametrize("kind", ["gaussian", "rank_one"])
def test_arrays_of_the_device_stay_there(cupy, kind):
    operator, y, truth = problem(kind)
    if kind == "gaussian":
        operator = GaussianDense(cupy.asarray(operator.a), operator.shape)
    else:
        operator = RankOne(cupy.asarray(operator.a), cupy.asarray(operator.b))
    weights = np.ones(M)
    weights[:5] = 0
    given = operator, cupy.asarray(y)
    solution = recover(*given, weights=cupy.asarray(weights), random_state=0)
    assert solution.device == "cuda" and all(isinstance(w, cupy.ndarray) for w in solution.factors)
    assert solution.status is Status.EXACT and solution.rank == RANK
    assert relative((solution.factors[1] @ solution.factors[0]).get(), truth) < 1e-10
    back = recover(*given, device="cpu", random_state=0)
    assert back.device == "cpu" and isinstance(back.factors[0], cupy.ndarray)
    index = np.arange(0, M, 3)
    part = Measurements(operator, y, None, get_backend("cuda")).restrict(index)
    assert part.loss(LowRank(np.zeros((N1, 1)), np.ones(1), np.zeros((N2, 1)))) == pytest.approx(1)
    np.testing.assert_allclose(part.operator.squared_norms(), operator.squared_norms()[index])


# --- what stands on it, and refusals -----------------------------------------------------------------------------


def test_sensing(cupy):
    operator, y, truth = problem("gaussian")
    rows = np.asarray(operator.a).reshape(M, -1)
    model = fastdmf.DMFSensing(solver="recovery", device="cuda", shape=(N1, N2), random_state=0).fit(rows, y)
    assert model.device_ == "cuda" and model.solver_ == "recovery"
    assert relative(model.matrix_, truth) < 1e-10
    np.testing.assert_allclose(model.predict(rows), y, atol=1e-9)


def test_completer(cupy):
    mask, y, truth = problem("sparse")
    pairs = np.column_stack([mask.rows, mask.cols])
    model = fastdmf.DMFCompleter(solver="recovery", device="cuda", random_state=0).fit(pairs, y)
    assert model.device_ == "cuda"
    hidden = np.column_stack(np.nonzero(np.ones((N1, N2))))
    np.testing.assert_allclose(model.predict(hidden), truth.ravel(), atol=1e-9)


def test_refusals(cupy):
    linear = fastdmf.operators.as_operator(np.random.default_rng(0).standard_normal((30, 20)), (5, 4))
    with pytest.raises(ValueError, match="Linear operators compute on the CPU alone: pass device='cpu'"):
        recover(linear, np.ones(30), device="cuda")


def test_out_of_memory_tells_the_bytes(double, monkeypatch):
    operator, y, _ = problem("gaussian")
    monkeypatch.setattr(double.memory, "limit", 20_000)
    with pytest.raises(
        MemoryError, match=r"no room: Out of memory allocating [\d,]+ bytes.*20,000 bytes of the device"
    ):
        recover(operator, y, device="cuda")
