"""Starts from some of the rows: which rows, what comes of them, and when there is no such start."""

import numpy as np
import pytest

import fastdmf
from fastdmf import alternating, row_subset, variational
from fastdmf.alternating import Settings
from fastdmf.backend import get_backend
from fastdmf.held_entries import HeldEntries
from fastdmf.row_subset import fit_some_rows
from fastdmf.variational import vbmf

SHAPE = 3000, 60


@pytest.fixture
def small(monkeypatch):
    """Fits of any size may start so."""
    monkeypatch.setattr(variational, "_SUBSET_FROM", 0)


def ratings(rank=3, noise=0.5, seed=0, empty=True):
    """Rows of 0 to 40 entries, the long ones first: (mask, y, full without noise)."""
    rng = np.random.default_rng(seed)
    n1, n2 = SHAPE
    full = 2 + 0.5 * (rng.standard_normal((n1, 1)) + rng.standard_normal(n2))
    full += rng.standard_normal((n1, rank)) @ rng.standard_normal((rank, n2))
    counts = np.sort(rng.integers(0 if empty else 1, 41, n1))[::-1]
    rows = np.repeat(np.arange(n1), counts)
    cols = np.concatenate([rng.choice(n2, k, replace=False) for k in counts])
    order = rng.permutation(len(rows))
    rows, cols = rows[order], cols[order]
    y = full[rows, cols] + noise * rng.standard_normal(len(rows))
    return fastdmf.EntryMask(rows, cols, SHAPE), y, full


def error(solution, full):
    return np.sqrt(np.mean((solution.matrix() - full) ** 2))


FITS = {
    "default": {},
    "weights": {"weights": np.random.default_rng(1).integers(0, 3, 100_000).astype(float)},
    "no biases": {"biases": False},
    "tied": {"depth": 3, "width": 4},
    "features": {"implicit_features": True},
    "float32": {"dtype": "float32"},
    "several": {"n_init": 2},
}


@pytest.mark.parametrize("kind", FITS)
def test_as_good_as_from_all_rows(small, monkeypatch, kind):
    mask, y, full = ratings()
    options = {"width": 8, "implicit_features": False, "random_state": 0, "on_failure": "ignore", **FITS[kind]}
    if "weights" in options:
        options["weights"] = options["weights"][: mask.size]
    some = vbmf(mask, y, **options)
    monkeypatch.setattr(row_subset, "_SHARE", 0.0)
    every = vbmf(mask, y, **options)
    print(f"{kind}: {some.n_iter}, {every.n_iter} sweeps, errors {error(some, full):.4f}, {error(every, full):.4f}")
    assert not np.array_equal(some.matrix(), every.matrix())
    assert some.components == every.components
    assert some.n_iter < every.n_iter or kind == "tied"  # which went on to a higher evidence here
    assert error(some, full) < 1.01 * error(every, full)
    assert some.noise == pytest.approx(every.noise, rel=0.02)
    evidence = [fit.history["evidence"][-1] for fit in (some, every)]
    assert evidence[0] > evidence[1] - 5e-3
    assert np.isfinite(some.history["loss"]).all() and some.history["iteration"][0] == 0


def test_components_that_died_among_some_rows_are_gone(small, monkeypatch):
    """Where rows become narrower with them, too."""
    monkeypatch.setattr(alternating, "_FEW", 0)
    monkeypatch.setattr(row_subset, "_SWEEPS", 12)
    mask, y, full = ratings(2, 0.1)
    solution = vbmf(mask, y, width=28, implicit_features=True, random_state=0)
    assert solution.components == 2
    assert solution.sweeps.rows.x.shape[1] == 8 == get_backend().kernels.row_multiple(np.float64)
    monkeypatch.setattr(row_subset, "_SHARE", 0.0)
    assert error(solution, full) < 1.01 * error(vbmf(mask, y, width=28, random_state=0), full)


@pytest.mark.parametrize("weighted", [False, True])
def test_drawn_rows_have_their_entries(tmp_path, weighted, monkeypatch):
    """From one block and from several, some of which hold none of the rows."""
    monkeypatch.setattr(row_subset, "_CHUNK", 7)
    mask, y, _ = ratings()
    weights = np.random.default_rng(2).random(mask.size) if weighted else None
    drawn = np.r_[0:40, 1500, 1502, 2990:3000]  # the last ones are empty
    held = HeldEntries(mask, y, weights=weights)
    parts = [mask.rows, mask.cols, y] + [weights] * weighted
    stored = fastdmf.write_shards(tmp_path / "x", [parts], SHAPE, dtype="float64", shard_entries=500)
    rows = stored.sides()[0]
    for entries in (held.rows, rows):
        part = row_subset._copied(entries, drawn, 8)
        assert len(part.indptr) == len(drawn) + 1
        for k, i in enumerate(drawn):
            at, of = slice(*part.indptr[k : k + 2]), slice(*held.rows.indptr[i : i + 2])
            np.testing.assert_array_equal(part.indices[at], held.rows.indices[of])
            np.testing.assert_allclose(part.y[at], held.rows.y[of], atol=1e-12)
            if weighted:
                np.testing.assert_array_equal(part.w[at], held.rows.w[of])
        assert not part.y[part.indptr[-1] :].any() and len(part.y) == part.indptr[-1] + 8
        assert (part.w is None) == (not weighted)


@pytest.mark.parametrize(
    ("width", "shape", "per_row"),
    [(0, (3000, 60), 20), (30, (3000, 60), 10), (8, (200, 60), 60)],
    ids=["biases alone", "few entries", "few rows"],
)
def test_no_such_start(width, shape, per_row):
    """Where there is nothing to tell, or too little to tell it from."""
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(shape[0]), per_row)
    cols = np.tile(np.arange(per_row), shape[0])
    held = HeldEntries(fastdmf.EntryMask(rows, cols, shape), rng.standard_normal(len(rows)))
    settings, dtype = Settings(1.0, width, True), np.dtype(float)
    drawn = np.random.default_rng(3)
    assert fit_some_rows(get_backend(), held.rows, shape[1], settings, drawn, dtype) is None
    if width != 8:  # rows are drawn before they are counted
        assert drawn.bit_generator.state == np.random.default_rng(3).bit_generator.state


def test_no_more_than_may_be_copied():
    mask, y, _ = ratings()
    held = HeldEntries(mask, y)
    settings, parts = Settings(1.0, 8, True), []
    for most in (8 * 60 * 5 - 1, 8 * 60 * 5):
        rng = np.random.default_rng(0)
        parts.append(fit_some_rows(get_backend(), held.rows, 60, settings, rng, held.dtype, most))
    assert parts[0] is None and parts[1].done == 4
    assert parts[1].rows.entries is None  # they are gone


def test_few_entries_start_from_all_rows(monkeypatch):
    """Five million, as it is set."""
    mask, y, _ = ratings()
    monkeypatch.setattr(variational, "fit_some_rows", lambda *a: pytest.fail("not here"))
    assert variational._SUBSET_FROM == 5_000_000
    vbmf(mask, y, width=4, max_iter=2, random_state=0, on_failure="ignore")


def test_the_same_bits(small, tmp_path):
    """By seed, for any number of threads, from a checkpoint, and from one shard a side."""
    mask, y, _ = ratings(empty=False)
    options = {"width": 8, "random_state": 0, "on_failure": "ignore"}
    whole = vbmf(mask, y, implicit_features=False, **options).matrix()
    assert np.array_equal(vbmf(mask, y, implicit_features=False, n_threads=1, **options).matrix(), whole)
    other = vbmf(mask, y, implicit_features=False, **{**options, "random_state": 1}).matrix()
    assert not np.array_equal(other, whole)
    stop = {"callback": lambda progress: progress.iteration == 2, "checkpoint": tmp_path / "run.npz"}
    vbmf(mask, y, implicit_features=False, **stop, **options)
    resumed = vbmf(mask, y, implicit_features=False, checkpoint=tmp_path / "run.npz", **options)
    assert np.array_equal(resumed.matrix(), whole)
    stored = fastdmf.write_shards(tmp_path / "x", [(mask.rows, mask.cols, y)], SHAPE, dtype="float64")
    assert np.array_equal(vbmf(stored, **options).matrix(), whole)
    several = fastdmf.write_shards(
        tmp_path / "several", [(mask.rows, mask.cols, y)], SHAPE, dtype="float64", shard_entries=9_000
    )
    np.testing.assert_allclose(vbmf(several, **options).matrix(), whole, atol=1e-9)


def test_held_entries_are_mask_and_values():
    mask, y, _ = ratings()
    weights = np.random.default_rng(2).random(mask.size)
    options = {"width": 4, "random_state": 0, "on_failure": "ignore"}
    for w in (None, weights):
        expected = vbmf(mask, y, weights=w, **options)
        solution = vbmf(HeldEntries(mask, y, weights=w), **options)
        assert np.array_equal(solution.matrix(), expected.matrix()) and solution.mean == expected.mean
    for beside in ({"y": y}, {"weights": weights}, {"dtype": "float32"}):
        with pytest.raises(ValueError, match="must be None with HeldEntries"):
            vbmf(HeldEntries(mask, y), **beside)
