"""vbmf: components that the data support, noise estimates, equivariance, features of the mask, bad input."""

import itertools
import signal

import numpy as np
import pytest
from scipy.sparse import csr_array

import fastdmf
from fastdmf import variational
from fastdmf.alternating import Sweeps, balancing_rotations
from fastdmf.backend import get_backend
from fastdmf.engine import SolveWarning, Status
from fastdmf.mask_features import Regression
from fastdmf.variational import vbmf


def ratings(n1, n2, count, rank, noise, *, biases=0.3, seed=0):
    """Low rank plus biases plus noise at random cells: (mask, y, truth with noise everywhere)."""
    rng = np.random.default_rng(seed)
    full = biases * (rng.standard_normal((n1, 1)) + rng.standard_normal(n2)) + 1.0
    if rank:
        full += rng.standard_normal((n1, rank)) @ rng.standard_normal((rank, n2))
    full += noise * rng.standard_normal((n1, n2))
    rows, cols = np.divmod(rng.choice(n1 * n2, count, replace=False), n2)
    return fastdmf.EntryMask(rows, cols, (n1, n2)), full[rows, cols], full


def hidden_error(solution, mask, full):
    outside = np.ones(full.shape, bool)
    outside[mask.rows, mask.cols] = False
    return np.sqrt(np.mean((solution.matrix() - full)[outside] ** 2))


@pytest.mark.parametrize(("noise", "error"), [(0.1, 0.115), (0.5, 0.562), (1.0, 1.115)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exactly_the_true_components_survive(noise, error, dtype):
    """Rank 5 among 30 components; error and noise estimate are those of the study, noise included."""
    mask, y, full = ratings(500, 400, 30_000, 5, noise)
    solution = vbmf(mask, y.astype(dtype), random_state=0)
    print(f"noise {noise}: {solution.components} components, s = {solution.noise:.4f}, {solution.n_iter} sweeps")
    assert solution.status is Status.CONVERGED and solution.components == 5
    assert solution.factors[0].dtype == dtype
    assert abs(solution.noise / noise**2 - 1) < 0.03
    assert hidden_error(solution, mask, full) < error


def test_tied_variances_that_let_components_die_are_untied():
    mask, y, full = ratings(500, 400, 30_000, 5, 0.5)
    with pytest.warns(SolveWarning, match="prior variances tied as by depth=3 let most components die"):
        solution = vbmf(mask, y, depth=3, implicit_features=False, random_state=0)
    free = vbmf(mask, y, implicit_features=False, random_state=0)
    assert solution.components == free.components == 5
    assert hidden_error(solution, mask, full) < 1.0001 * hidden_error(free, mask, full)


def test_no_noise_is_recognised():
    mask, y, full = ratings(500, 400, 30_000, 5, 0.0)
    solution = vbmf(mask, y, random_state=0, on_failure="ignore")
    assert solution.components == 5 and solution.noise < 1e-6
    assert hidden_error(solution, mask, full) < 1e-3


@pytest.mark.parametrize("implicit_features", [False, True])
def test_pure_noise_shrinks_to_the_biases(implicit_features):
    mask, y, full = ratings(2000, 1000, 60_000, 0, 1.0, biases=1.0)
    solution = vbmf(mask, y, implicit_features=implicit_features, random_state=0, on_failure="ignore")
    latent = np.linalg.norm(fastdmf.Solution.matrix(solution)) / np.sqrt(full.size)
    error = hidden_error(solution, mask, full)
    print(f"latent part {latent:.4f}, error {error:.4f}")
    assert latent < 0.05 and error < 1.03


def sparse_ratings(n1, n2, per_row, strength, seed=0):
    """``per_row`` entries a row: biases, rank 3 of this strength, noise 1; (mask, y) and as many hidden entries."""
    rng = np.random.default_rng(seed)
    cells = rng.choice(n1 * n2, 2 * n1 * per_row, replace=False)
    u, v = rng.standard_normal((n1, 3)), rng.standard_normal((n2, 3))
    rows, cols = np.divmod(cells, n2)
    y = 3 + 0.5 * rng.standard_normal(n1)[rows] + 0.5 * rng.standard_normal(n2)[cols] + rng.standard_normal(len(rows))
    y += strength * np.einsum("ij,ij->i", u[rows], v[cols]) / np.sqrt(3)
    half = n1 * per_row
    return fastdmf.EntryMask(rows[:half], cols[:half], (n1, n2)), y[:half], rows[half:], cols[half:], y[half:]


def error_of_biases(mask, y, rows, cols, values):
    """Root mean square error of ridge-regressed row and column biases, the best of some ridges."""
    mu, best = y.mean(), np.inf
    i, j = mask.rows, mask.cols
    for ridge in (2.0, 5.0, 10.0):
        a, b = np.zeros(mask.shape[0]), np.zeros(mask.shape[1])
        for _ in range(20):
            b = np.bincount(j, y - mu - a[i], len(b)) / (np.bincount(j, minlength=len(b)) + ridge)
            a = np.bincount(i, y - mu - b[j], len(a)) / (np.bincount(i, minlength=len(a)) + ridge)
        best = min(best, np.sqrt(np.mean((mu + a[rows] + b[cols] - values) ** 2)))
    return best


@pytest.mark.parametrize("shape", [(2000, 1000), (3000, 300), (300, 3000)])
@pytest.mark.parametrize("per_row", [1, 2, 5])
def test_very_sparse_masks_fall_back_to_biases(shape, per_row):
    mask, y, *hidden = sparse_ratings(*shape, per_row, 0.3)
    solution = vbmf(mask, y, random_state=0, on_failure="ignore")
    error = np.sqrt(np.mean((solution.predict(*hidden[:2]) - hidden[2]) ** 2))
    ratio = error / error_of_biases(mask, y, *hidden)
    print(f"{shape}, {per_row} entries a row: {ratio:.4f} of the error of biases, {solution.components} components")
    assert solution.components == 0 and ratio < 1.005


def test_a_fit_cut_short_is_not_given_up_for_biases():
    """Structure that the evidence does not show yet: each sweep more predicts better, from the first on."""
    mask, y, full = ratings(500, 400, 10_000, 3, 0.5)
    errors = [
        hidden_error(vbmf(mask, y, max_iter=k, random_state=0, on_failure="ignore"), mask, full) for k in (2, 4, 6, 30)
    ]
    print("after 2, 4, 6, 30 sweeps:", errors)
    assert (np.diff(errors) < 0).all()


def test_structure_in_a_sparse_mask_is_kept():
    mask, y, *hidden = sparse_ratings(3000, 200, 10, 1.5)
    solution = vbmf(mask, y, random_state=0, on_failure="ignore")
    error = np.sqrt(np.mean((solution.predict(*hidden[:2]) - hidden[2]) ** 2))
    assert solution.components >= 3 and error < 0.85 * error_of_biases(mask, y, *hidden)


def test_evidence_is_what_it_says():
    """Divergences from explicit posterior variances, row by row."""
    mask, y, _ = ratings(60, 50, 900, 3, 0.3)
    sweeps = vbmf(mask, y, random_state=0, max_iter=6, on_failure="ignore").sweeps
    total = -0.5 * 900 * (np.log(2 * np.pi * sweeps.noise) + 1)
    for side in sweeps.sides:
        free = side.free > 0
        v, mean = side.variances_of(np.arange(side.n))[:, free], np.zeros(1) if side.mean is None else side.mean
        away = (side.x - mean)[:, free] ** 2
        total -= 0.5 * np.sum((v + away) / side.prior[free] - 1 - np.log(v / side.prior[free]))
    np.testing.assert_allclose(sweeps.evidence(), total, rtol=1e-10)


def test_evidence_rises():
    mask, y, _ = ratings(500, 400, 20_000, 5, 0.5)
    evidence = vbmf(mask, y, random_state=0, implicit_features=False, tol=0.0, on_failure="ignore").history["evidence"]
    assert (np.diff(evidence[5:]) > -1e-4).all() and evidence[-1] > evidence[5]


def test_scale_and_shift():
    """Data times 1024 give as much of the result, a shift is absorbed by the mean."""
    mask, y, _ = ratings(60, 50, 900, 3, 0.3)
    one = vbmf(mask, y, random_state=0, on_failure="ignore")
    two = vbmf(mask, 1024 * y, random_state=0, on_failure="ignore")
    np.testing.assert_allclose(two.matrix() / 1024, one.matrix(), atol=1e-8)
    assert one.n_iter == two.n_iter
    moved = vbmf(mask, y + 100, random_state=0, on_failure="ignore")
    np.testing.assert_allclose(moved.matrix() - 100, one.matrix(), atol=1e-7)


def test_the_order_of_the_entries_does_not_matter():
    mask, y, _ = ratings(60, 50, 900, 3, 0.3)
    order = np.random.default_rng(1).permutation(900)
    other = fastdmf.EntryMask(mask.rows[order], mask.cols[order], mask.shape)
    one, two = vbmf(mask, y, random_state=0), vbmf(other, y[order], random_state=0)
    np.testing.assert_array_equal(one.matrix(), two.matrix())


def test_whole_weights_are_repeated_entries():
    """Weight 2 moves the regressions as an entry that stands twice; weight 0 leaves an entry out."""
    mask, y, _ = ratings(60, 50, 900, 3, 0.3)
    options = {"random_state": 0, "on_failure": "ignore", "implicit_features": False}
    twice = vbmf(mask, y, weights=np.full(900, 2.0), tol=0.0, **options)
    once = vbmf(mask, y, tol=0.0, **options)
    assert twice.noise < once.noise
    weights = np.ones(900)
    weights[:200] = 0
    part = fastdmf.EntryMask(mask.rows[200:], mask.cols[200:], mask.shape)
    left_out = vbmf(mask, np.where(weights > 0, y, 77.0), weights=weights, **options)
    np.testing.assert_allclose(left_out.matrix(), vbmf(part, y[200:], **options).matrix(), rtol=1e-8)


def test_empty_and_single_rows_and_columns():
    """They take their prior mean: the mean plus the biases of the other side."""
    rng = np.random.default_rng(0)
    rows, cols = np.divmod(rng.choice(40 * 30, 500, replace=False), 30)
    keep = (rows > 1) & (cols > 0)
    mask = fastdmf.EntryMask(np.append(rows[keep], 1), np.append(cols[keep], 5), (40, 30))
    y = rng.standard_normal(mask.size) + 3
    solution = vbmf(mask, y, implicit_features=False, random_state=0, on_failure="ignore")
    full = solution.matrix()
    assert np.isfinite(full).all()
    np.testing.assert_allclose(full[0], solution.mean + solution.column_bias, rtol=1e-12)
    assert abs(solution.row_bias[0]) < 1e-12 and abs(solution.column_bias[0]) < 1e-12


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), (5, 1)])
def test_tiny_matrices(shape):
    rows, cols = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    solution = vbmf(fastdmf.EntryMask(rows, cols, shape), rows + 1.0, random_state=0, on_failure="ignore")
    assert np.isfinite(solution.matrix()).all() and solution.matrix().shape == shape


def test_constant_data():
    mask, y, _ = ratings(20, 20, 100, 0, 0.0, biases=0.0)
    solution = vbmf(mask, y, random_state=0, on_failure="ignore")
    np.testing.assert_allclose(solution.matrix(), 1.0, rtol=1e-6)


def test_factors_are_balanced_and_multiply_to_the_latent_part():
    mask, y, _ = ratings(80, 60, 2000, 3, 0.2)
    for depth in (2, 3, 4):
        solution = vbmf(mask, y, depth=depth, random_state=0, on_failure="ignore")
        assert len(solution.factors) == depth
        product = solution.factors[0]
        for below, above in itertools.pairwise(solution.factors):
            np.testing.assert_allclose(above.T @ above, below @ below.T, atol=1e-5)
            product = above @ product
        expected = solution.mean + solution.row_bias[:, None] + solution.column_bias + product
        np.testing.assert_allclose(solution.matrix(), expected, atol=1e-10)


def test_standard_deviations_are_right_on_average():
    mask, y, full = ratings(500, 400, 20_000, 5, 0.5)
    solution = vbmf(mask, y, random_state=0)
    outside = np.ones(full.shape, bool)
    outside[mask.rows, mask.cols] = False
    rows, cols = np.nonzero(outside)
    mean, std = solution.predict(rows, cols, return_std=True)
    np.testing.assert_allclose(mean, solution.matrix()[rows, cols], atol=1e-12)
    ratio = np.mean(std**2) / np.mean((mean - full[rows, cols]) ** 2)
    print(f"predicted over actual mean square {ratio:.3f}")
    assert 0.9 < ratio < 1.05 and (std > 0).all()


def test_features_are_the_singular_vectors_of_the_scaled_mask():
    mask, y, _ = ratings(70, 50, 900, 2, 0.3)
    solution = vbmf(mask, y, implicit_features=True, random_state=0, on_failure="ignore")
    pattern = csr_array((np.ones(900), (mask.rows, mask.cols)), shape=mask.shape).toarray()
    c, d = pattern.sum(1), pattern.sum(0)
    scaled = pattern / np.sqrt(np.maximum(c, 1))[:, None] / np.sqrt(np.maximum(d, 1))
    u, s, vt = np.linalg.svd(scaled, full_matrices=False)
    rows, columns = (side.regression.features for side in solution.sweeps.sides)
    for features, vectors, n, counts in ((rows, u, 70, c), (columns, vt.T, 50, d)):
        # Twenty leading pairs; signs are free.
        expected = np.sqrt(n) * (vectors * s)[:, 1:20]
        np.testing.assert_allclose(np.abs(features[:, 2:21]), np.abs(expected), atol=1e-4)
        np.testing.assert_allclose(features[:, 0], np.log1p(counts) - np.log1p(counts).mean())
    # A new row with the observations of row 3 has the features of row 3.
    seen = pattern[3] > 0
    again = solution.sweeps.columns.basis[seen].sum(0) / np.sqrt(seen.sum())
    np.testing.assert_allclose(again, rows[3, 2:], atol=1e-8)


def test_features_that_say_nothing_are_left_out():
    """The evidence, which pays for the coefficients, is higher without them; so is the accuracy."""
    mask, y, *hidden = sparse_ratings(3000, 200, 10, 1.5)
    fits = [vbmf(mask, y, implicit_features=use, random_state=0, on_failure="ignore") for use in (True, False, None)]
    errors = [np.sqrt(np.mean((fit.predict(*hidden[:2]) - hidden[2]) ** 2)) for fit in fits]
    assert fits[0].sweeps.evidence() < fits[1].sweeps.evidence() and errors[1] < errors[0]
    assert errors[2] == errors[1] and fits[2].sweeps.rows.regression is None


def test_features_that_tell_are_kept():
    """Rows observe the columns whose factors are like their own."""
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((600, 2)), rng.standard_normal((400, 2))
    affinity = u @ v.T
    seen = rng.random(affinity.shape) < 0.12 / (1 + np.exp(-4 * affinity))
    mask, full = fastdmf.EntryMask(*np.nonzero(seen), seen.shape), affinity + rng.standard_normal(seen.shape)
    fits = [vbmf(mask, full[seen], implicit_features=use, random_state=0, on_failure="ignore") for use in (False, None)]
    assert fits[1].sweeps.rows.regression is not None
    assert fits[1].sweeps.evidence() > fits[0].sweeps.evidence()
    assert hidden_error(fits[1], mask, full) < hidden_error(fits[0], mask, full)


def test_regression_on_features():
    """Against the normal equations, and coefficients that mean nothing shrink."""
    rng = np.random.default_rng(0)
    f = rng.standard_normal((300, 4))
    x = np.column_stack([f @ [1.0, -2.0, 0.5, 0.0] + 0.1 * rng.standard_normal(300), rng.standard_normal(300)])
    regression = Regression(f, np.array([4.0, 0.25]))
    trust, prior = rng.uniform(0.5, 1, 300), np.array([0.3, 0.7])
    mean = regression.fit(x, trust, prior)
    gram = f.T @ (f * trust[:, None])
    for k, ridge in enumerate((0.3 / 4.0, 0.7 / 0.25)):
        z = np.linalg.solve(gram + ridge * np.eye(4), f.T @ (trust * x[:, k]))
        np.testing.assert_allclose(mean[:, k], f @ z, rtol=1e-10)
    # The divergence of the last coefficients, from explicit posterior variances.
    for k, (g, t) in enumerate(((0.3, 4.0), (0.7, 0.25))):
        z, after = regression.coefficients[:, k], regression.variance[k]
        v = np.diag(np.linalg.inv((gram + g / t * np.eye(4)) / g))
        eigen = g / (np.linalg.eigvalsh(gram) + g / t)
        np.testing.assert_allclose(v.sum(), eigen.sum(), rtol=1e-10)
        expected = 0.5 * (z @ z / after + np.sum(eigen / after - 1 - np.log(eigen / after)))
        np.testing.assert_allclose(regression.divergence[k], expected, rtol=1e-10)
    for _ in range(20):
        regression.fit(x, trust, prior)
    assert regression.variance[0] > 0.5 and regression.variance[1] < 0.02


def test_product_of_a_sparse_matrix():
    kernels = get_backend().kernels
    rng = np.random.default_rng(0)
    mask = fastdmf.EntryMask(*np.divmod(rng.choice(33 * 257, 900, replace=False), 257), (33, 257))
    for dtype, h in ((np.float32, 16), (np.float32, 80), (np.float64, 8)):
        r, v = np.zeros(900 + kernels.PAD, dtype), kernels.aligned_empty((257, h), dtype)
        r[:900], v[:] = rng.standard_normal(900), rng.standard_normal((257, h))
        out = kernels.aligned_empty((33, h), dtype)
        out[:] = np.nan
        kernels.entry_product(out, r, v, mask.indptr, mask.indices)
        dense = csr_array((r[:900].astype(float), mask.indices[:900], mask.indptr), shape=(33, 257))
        np.testing.assert_allclose(out, dense @ v.astype(float), atol=50 * np.finfo(dtype).eps)


def test_balancing_rotations():
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((40, 5)), rng.standard_normal((30, 5))
    left, right, s = balancing_rotations(p, q)
    np.testing.assert_allclose(s, np.linalg.svd(p @ q.T, compute_uv=False)[:5])
    np.testing.assert_allclose(p @ left @ (q @ right).T, p @ q.T, atol=1e-12)
    np.testing.assert_allclose((p @ left).T @ (p @ left), np.diag(s), atol=1e-12)


def test_same_bits_for_any_number_of_threads():
    mask, y, _ = ratings(300, 200, 5000, 3, 0.3)
    results = [vbmf(mask, y, random_state=0, n_threads=n, on_failure="ignore") for n in (1, 2)]
    assert results[0].matrix().tobytes() == results[1].matrix().tobytes()
    assert results[0].noise == results[1].noise


def test_mean_of_several_starts():
    """Predictions are the mean over the members, the factors their product, and the first member the single fit."""
    mask, y, full = ratings(300, 200, 6000, 3, 0.5)
    options = {"random_state": 0, "on_failure": "ignore"}
    one, three = vbmf(mask, y, **options), vbmf(mask, y, n_init=3, **options)
    parts = [sweeps.rows.x @ sweeps.columns.x.T for sweeps in three.fits]
    assert len(parts) == 3 and all(np.abs(a - b).max() > 1e-4 for a, b in itertools.combinations(parts, 2))
    np.testing.assert_array_equal(one.mean + parts[0], one.matrix())
    np.testing.assert_allclose(three.matrix(), three.mean + np.mean(parts, axis=0), atol=1e-10)
    latent = three.row_bias[:, None] + three.column_bias + fastdmf.Solution.matrix(three)
    np.testing.assert_allclose(three.mean + latent, three.matrix(), atol=1e-4)
    values, deviations = three.predict(mask.rows, mask.cols, return_std=True)
    np.testing.assert_allclose(values, three.matrix()[mask.rows, mask.cols], atol=1e-10)
    np.testing.assert_allclose(deviations, one.predict(mask.rows, mask.cols, return_std=True)[1], rtol=0.02)
    assert three.sweeps.evidence() == max(sweeps.evidence() for sweeps in three.fits)
    errors = [hidden_error(solution, mask, full) for solution in (one, three)]
    print("one start, three:", errors)
    assert errors[1] < errors[0]


def test_a_callback_ends_all_starts():
    mask, y, _ = ratings(60, 50, 900, 3, 0.3)
    count = []
    solution = vbmf(mask, y, random_state=0, n_init=3, callback=lambda p: count.append(p) or len(count) == 20)
    assert solution.status is Status.STOPPED and 1 <= len(solution.fits) <= 3 and len(count) == 20


def test_callback_and_max_iter():
    mask, y, _ = ratings(60, 50, 900, 3, 0.3)
    seen = []
    solution = vbmf(mask, y, random_state=0, callback=lambda p: seen.append(p.iteration) or p.iteration == 3)
    assert solution.status is Status.STOPPED and seen == [0, 1, 2, 3] and solution.n_iter == 3
    with pytest.warns(SolveWarning, match="MAX_ITER"):
        vbmf(mask, y, random_state=0, max_iter=2)
    one = vbmf(mask, y, random_state=0, max_iter=1, on_failure="ignore")
    assert np.isfinite(one.matrix()).all()
    assert list(solution.history) == ["iteration", "objective", "loss", "evidence", "components"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": np.ones((3, 3))}, TypeError, "mask must be an EntryMask"),
        ({"y": np.full(20, np.nan)}, ValueError, "y contains NaN"),
        ({"y": np.ones(19)}, ValueError, "y has 19 measurements"),
        ({"y": np.ones((2, 20))}, ValueError, "y must have 1 dimensions"),
        ({"y": np.array(["a"] * 20)}, TypeError, "y must hold real numbers"),
        ({"weights": -np.ones(20)}, ValueError, "weights must not be negative"),
        ({"weights": np.zeros(20)}, ValueError, "weights are zero everywhere"),
        ({"depth": 1}, ValueError, "depth must be an integer >= 2"),
        ({"width": 0}, ValueError, "width must be an integer >= 1"),
        ({"n_init": 0}, ValueError, "n_init must be an integer >= 1"),
        ({"max_iter": 0}, ValueError, "max_iter must be an integer >= 1"),
        ({"tol": -1.0}, ValueError, "tol must be a number >= 0"),
        ({"random_state": -1}, ValueError, "random_state must hold integers >= 0"),
        ({"dtype": "int32"}, ValueError, "dtype must be float32 or float64"),
        ({"on_failure": "raise"}, ValueError, "on_failure must be"),
        ({"device": "tpu"}, ValueError, "device must be"),
    ],
)
def test_bad_input(change, error, message):
    mask, y, _ = ratings(10, 8, 20, 1, 0.1)
    arguments = {"mask": mask, "y": y, **change}
    with pytest.raises(error, match=message):
        vbmf(arguments.pop("mask"), arguments.pop("y"), **arguments)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


class Press:
    """Ctrl-C at the n-th call of a function, or several times."""

    def __init__(self, monkeypatch, owner, name, at, times=1):
        self.count, self.at, self._call = 0, at, getattr(owner, name)
        press = self

        def call(*args, **kwargs):
            press.count += 1
            for _ in range(times if press.count == press.at else 0):
                signal.raise_signal(signal.SIGINT)
            return press._call(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


def interrupted(mask, y, **options):
    previous = signal.getsignal(signal.SIGINT)
    with pytest.warns(SolveWarning, match="INTERRUPTED"):
        solution = vbmf(mask, y, random_state=0, **options)
    assert solution.status is Status.INTERRUPTED and signal.getsignal(signal.SIGINT) is previous
    return solution


def test_ctrl_c_in_a_rival_fit_leaves_the_fit(monkeypatch):
    """That without features begins when the one with them is done."""
    mask, y, _ = ratings(200, 150, 3_000, 2, 0.5)
    done = vbmf(mask, y, implicit_features=True, random_state=0)
    for later in (1, 4):
        with monkeypatch.context() as patch:
            press = Press(patch, Sweeps, "step", done.n_iter + later)
            solution = interrupted(mask, y)
        assert press.count == press.at and np.array_equal(solution.matrix(), done.matrix())
        assert solution.n_iter == done.n_iter


@pytest.mark.parametrize("place", ["as the second starts", "in the second", "at the end of the second"])
def test_ctrl_c_among_several_starts_keeps_those_that_are_done(monkeypatch, place):
    mask, y, _ = ratings(200, 150, 3_000, 2, 0.5)
    options = {"implicit_features": False, "width": 4}
    first, both = (vbmf(mask, y, n_init=n, random_state=0, **options) for n in (1, 2))
    steps = first.n_iter + {"in the second": 2, "at the end of the second": both.n_eval - first.n_iter}.get(place, 0)
    patched = (Sweeps, "start", 2) if place == "as the second starts" else (Sweeps, "step", steps)
    with monkeypatch.context() as patch:
        press = Press(patch, *patched)
        solution = interrupted(mask, y, n_init=3, **options)
    assert press.count == press.at
    assert len(solution.fits) == 1
    assert np.array_equal(solution.matrix(), first.matrix())


def test_ctrl_c_behind_the_last_rival_is_not_lost(monkeypatch):
    mask, y, _ = ratings(200, 150, 3_000, 2, 0.5)
    whole = vbmf(mask, y, random_state=0)
    with monkeypatch.context() as patch:
        Press(patch, variational._Fit, "prefer_biases", 1)
        solution = interrupted(mask, y)
    assert np.array_equal(solution.matrix(), whole.matrix()) and solution.n_iter == whole.n_iter


def test_a_second_ctrl_c_raises(monkeypatch):
    mask, y, _ = ratings(200, 150, 3_000, 2, 0.5)
    done = vbmf(mask, y, implicit_features=True, random_state=0).n_iter
    previous = signal.getsignal(signal.SIGINT)
    Press(monkeypatch, Sweeps, "step", done + 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        vbmf(mask, y, random_state=0)
    assert signal.getsignal(signal.SIGINT) is previous
