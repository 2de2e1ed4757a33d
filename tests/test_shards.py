"""Entries on disk: what is stored against plain NumPy sorts, fits against those in memory, and whole folders only."""

import doctest
import json
import pickle
import tracemalloc

import numpy as np
import pytest

import fastdmf
from fastdmf import shards as module
from fastdmf.alternating import HeldSide, Sweeps
from fastdmf.engine import Status
from fastdmf.shards import EntryShards, _Writer, write_shards
from fastdmf.variational import vbmf

SHAPE = 90, 70


def entries(count=1500, *, seed=0, shape=SHAPE, gaps=True):
    """Rank 2 plus biases plus noise in random order: rows, cols, values, weights; some rows and columns are empty."""
    rng = np.random.default_rng(seed)
    rows, cols = np.divmod(rng.choice(shape[0] * shape[1], count, replace=False), shape[1])
    if gaps:
        keep = (rows > 2) & (rows < shape[0] - 4) & (rows != 40) & (cols != 0) & (cols < shape[1] - 3)
        rows, cols = rows[keep], cols[keep]
    u, v = rng.standard_normal((shape[0], 3)), rng.standard_normal((shape[1], 3))
    values = 3 + u[rows, 2] + v[cols, 2] + np.einsum("ij,ij->i", u[rows, :2], v[cols, :2])
    values += 0.3 * rng.standard_normal(len(rows))
    return rows, cols, values.astype(np.float32), rng.integers(0, 4, len(rows)).astype(np.float32)


def split(arrays, count=5):
    """The arrays part by part, the last part empty."""
    return [tuple(a[k::count] for a in arrays) for k in range(count)] + [tuple(a[:0] for a in arrays)]


def dense(arrays, shape, which):
    out = np.full(shape, np.nan)
    out[arrays[0], arrays[1]] = arrays[which]
    return out


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shard_entries", "shards"), [(10**6, (1, 1)), (100, None), (1, None)])
def test_stored_entries_are_those_given(tmp_path, shard_entries, shards, weighted):
    """Every run of both orders against a plain sort: indices, values, weights, pointers, zeros behind the last."""
    arrays = entries()[: 4 if weighted else 3]
    stored = write_shards(tmp_path / "x", split(arrays), SHAPE, shard_entries=shard_entries)
    stored.verify()
    assert (stored.shape, stored.size, stored.weighted) == (SHAPE, len(arrays[0]), weighted)
    average = np.average(arrays[2].astype(float), weights=arrays[3] if weighted else None)
    assert abs(stored.mean - average) < 1e-6
    for axis, side in enumerate(stored.sides()):
        major, minor = arrays[axis], arrays[1 - axis]
        order = np.lexsort((minor, major))
        np.testing.assert_array_equal(np.diff(side.indptr), np.bincount(major, minlength=SHAPE[axis]))
        reached, count = 0, 0
        for at, indptr, indices, y, w in side.blocks():
            size = indptr[-1]
            here = order[count : count + size]
            assert at.start == reached and indptr[0] == 0
            np.testing.assert_array_equal(indptr, side.indptr[at.start : at.stop + 1] - count)
            np.testing.assert_array_equal(indices[:size], minor[here])
            np.testing.assert_array_equal(y[:size], arrays[2][here] - np.float32(stored.mean))
            assert indices.dtype == np.int32 and y.dtype == np.float32 and indices.flags.writeable
            assert not indices[size:].any() and len(indices) >= size + 16 and not y[size : size + 16].any()
            if weighted:
                np.testing.assert_array_equal(w[:size], arrays[3][here])
            else:
                assert w is None
            reached, count = at.stop, count + size
            assert size <= shard_entries + np.bincount(major).max()
        assert reached == SHAPE[axis] and count == stored.size
        cuts = stored._cuts[axis]
        runs = len(cuts) - 1
        assert runs == shards[axis] if shards else runs > 5
        if shard_entries == 1:  # one for every row with entries, and what is empty behind them
            assert runs == len(np.unique(major)) + 1 and side.indptr[cuts[-2]] == stored.size
    back = [np.concatenate(a) for a in zip(*stored.parts())]
    order = np.lexsort((arrays[1], arrays[0]))
    assert len(back) == len(arrays)
    for a, b in zip(back, arrays):
        np.testing.assert_array_equal(a, b[order])


def test_shape_follows_from_the_indices(tmp_path):
    """As far as they reach, through parts that reach ever farther; types of the caller's do not matter."""
    rows, cols, values, _ = entries(gaps=False)
    order = np.argsort(rows)
    parts = [
        (rows[at].astype(np.uint16), cols[at].tolist(), values[at].astype(np.float64))
        for at in np.array_split(order, 40)
    ]
    stored = write_shards(tmp_path / "x", iter(parts))
    assert stored.shape == (rows.max() + 1, cols.max() + 1) and stored.dtype == np.float32
    np.testing.assert_array_equal(
        dense([np.concatenate(a) for a in zip(*stored.parts())], stored.shape, 2),
        dense((rows, cols, values), stored.shape, 2),
    )


def test_float64_values(tmp_path):
    rows, cols, values, _ = entries()
    values = values + 1e-9 * np.arange(len(values))
    stored = write_shards(tmp_path / "x", [(rows, cols, values)], dtype="float64")
    ((_, _, back),) = stored.parts()
    np.testing.assert_array_equal(back, values[np.lexsort((cols, rows))])
    assert stored.mean == values[np.lexsort((cols, rows))].mean()


def test_indices_beyond_32_bits(tmp_path):
    """A matrix that long has int64 indices; they are refused where nothing asks for them."""
    far = np.array([2**31 + 5, 2**31 + 3, 7])
    with pytest.raises(ValueError, match=r"cols of part 0 must be below 2147483647 where no shape is given"):
        write_shards(tmp_path / "x", [([0, 1, 1], far, [1.0, 2.0, 3.0])])
    writer = _Writer(tmp_path, None, False, np.dtype("float32"), 10)
    # Pointers of so many columns would take 17 GB; of the counts only the length is looked at.
    writer.shape, writer.counts[1] = (2, 2**31 + 6), range(2**31 + 6)
    places = writer._places(1, 0, far)
    assert places.dtype == np.int64 and writer._places(0, 0, [0, 1, 1]).dtype == np.int32
    np.testing.assert_array_equal(places, far)


def test_ids(tmp_path):
    """Strings and integers get positions part by part, and come back."""
    rows = np.array(["b", "a", "b", "c", "a"], object)
    cols = np.array([70, 7, 7, 10**12, 70])
    parts = [(rows[:3], cols[:3], [1.0, 2.0, 3.0]), (rows[3:], cols[3:], [4.0, 5.0])]
    stored = write_shards(tmp_path / "x", parts, ids=True)
    assert stored.row_ids.tolist() == ["a", "b", "c"] and stored.column_ids.tolist() == [7, 70, 10**12]
    i, j, values = (np.concatenate(a) for a in zip(*stored.parts()))
    named = dict(zip(zip(stored.row_ids[i], stored.column_ids[j].tolist()), values.tolist()))
    assert named == {("b", 70): 1, ("a", 7): 2, ("b", 7): 3, ("c", 10**12): 4, ("a", 70): 5}
    with pytest.raises(ValueError, match="more than once, the first at row b, column 70"):
        write_shards(tmp_path / "y", [*parts, (["b"], [70], [6.0])], ids=True)
    with pytest.raises(ValueError, match="shape must be None with ids=True"):
        write_shards(tmp_path / "y", parts, (3, 3), ids=True)
    plain = write_shards(tmp_path / "z", [([0, 2], [1, 0], [1.0, 2.0])])
    assert plain.row_ids.tolist() == [0, 1, 2] and plain.column_ids.tolist() == [0, 1]


def test_memory_of_writing_and_fitting(tmp_path):
    """Neither holds the entries: what NumPy allocates at a time stays far below their size."""
    n1, n2, per_row = 4000, 500, 100
    rng = np.random.default_rng(0)
    start, stride = rng.integers(0, 499, n1), rng.integers(1, 499, n1)

    def parts():
        for k in range(0, per_row, 5):
            turn = np.repeat(np.arange(k, k + 5), n1)
            rows = np.tile(np.arange(n1, dtype=np.int32), 5)
            cols = (start[rows] + turn * stride[rows]) % 499
            yield rows, cols.astype(np.int32), np.sin(rows * 0.1 + cols).astype(np.float32)

    options = {"width": 14, "max_iter": 3, "random_state": 0, "on_failure": "ignore"}
    # What is imported and compiled is not counted: some kernels have a version for large parts.
    vbmf(write_shards(tmp_path / "before", parts(), (n1, n2), shard_entries=20_000), **options)
    tracemalloc.start()
    try:
        stored = write_shards(tmp_path / "x", parts(), (n1, n2), shard_entries=20_000)
        writing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        solution = vbmf(stored, **options)
        fitting = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{stored.size} entries: {writing / stored.size:.1f} and {fitting / stored.size:.1f} bytes an entry")
    assert stored.size == 400_000 and np.isfinite(solution.noise)
    assert writing < 12 * stored.size and fitting < 4 * stored.size


# --- fits ------------------------------------------------------------------------------------------------------------


def bits(solution):
    return [w.tobytes() for w in solution.factors] + [v.tobytes() for v in solution.history.values()]


FITS = {
    "default": {},
    "tied": {"depth": 3, "width": 5},
    "no biases, float64": {"biases": False, "dtype": "float64"},
    "two starts": {"n_init": 2, "width": 6},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", FITS)
def test_fits_are_those_in_memory(tmp_path, kind, weighted):
    """One shard a side: the same bits. Several, with empty rows, columns and shards: the same to rounding."""
    rows, cols, values, weights = entries(2500)
    arrays = (rows, cols, values, weights)[: 4 if weighted else 3]
    options = {"random_state": 0, "on_failure": "ignore", "implicit_features": False, **FITS[kind]}
    mask = fastdmf.EntryMask(rows, cols, SHAPE)
    if weighted and "dtype" in options:  # a weighted mean is summed in the type of the values
        values = values.astype(np.float64)
        weights = weights.astype(np.float64)
    expected = vbmf(mask, values, weights=weights if weighted else None, **options)
    one = write_shards(tmp_path / "one", split(arrays), SHAPE, dtype=values.dtype)
    options.pop("implicit_features")
    solution = vbmf(one, **options)
    assert bits(solution) == bits(expected) and solution.mean == expected.mean and solution.noise == expected.noise
    assert solution.status is expected.status and solution.components == expected.components
    several = write_shards(tmp_path / "several", split(arrays), SHAPE, shard_entries=200, dtype=values.dtype)
    assert [len(cuts) for cuts in several._cuts] > [8, 8]
    solution = vbmf(several, **options)
    assert solution.n_iter == expected.n_iter and solution.components == expected.components
    rounding = 2e-4 if solution.factors[0].dtype == np.float32 else 1e-9
    np.testing.assert_allclose(solution.matrix(), expected.matrix(), atol=rounding)
    np.testing.assert_allclose(solution.noise, expected.noise, rtol=rounding)
    np.testing.assert_allclose(solution.history["evidence"], expected.history["evidence"], rtol=rounding)
    for parts in (solution.predict(rows, cols, True), expected.predict(rows, cols, True)):
        assert np.isfinite(parts).all()


def test_one_entry_a_shard(tmp_path):
    rows, cols, values, _ = entries(400)
    stored = write_shards(tmp_path / "x", [(rows, cols, values)], SHAPE, dtype="float64", shard_entries=1)
    solution = vbmf(stored, random_state=0, on_failure="ignore")
    mask = fastdmf.EntryMask(rows, cols, SHAPE)
    expected = vbmf(mask, values.astype(np.float64), random_state=0, implicit_features=False, on_failure="ignore")
    np.testing.assert_allclose(solution.matrix(), expected.matrix(), atol=1e-9)


def test_same_bits_for_any_number_of_threads(tmp_path):
    """Through the parallel kernel in one shard and the serial one in the next."""
    rng = np.random.default_rng(0)
    shape = 400, 300
    rows, cols = np.divmod(rng.choice(shape[0] * shape[1], 60_000, replace=False), shape[1])
    values = rng.standard_normal(60_000).astype(np.float32)
    stored = write_shards(tmp_path / "x", [(rows, cols, values)], shape, shard_entries=25_000)
    options = {"max_iter": 4, "random_state": 0, "on_failure": "ignore"}
    one, two = (vbmf(stored, n_threads=n, **options) for n in (1, 2))
    assert bits(one) == bits(two)
    mask = fastdmf.EntryMask(rows, cols, shape)
    expected = vbmf(mask, values, implicit_features=False, **options)
    np.testing.assert_allclose(one.matrix(), expected.matrix(), atol=1e-4)


def test_checkpoints(tmp_path):
    """Resumed from shards to the same bits; other entries are another run."""
    rows, cols, values, _ = entries()
    stored = write_shards(tmp_path / "x", [(rows, cols, values)], SHAPE, shard_entries=300)
    path, options = tmp_path / "run.npz", {"random_state": 0, "on_failure": "ignore"}
    whole = vbmf(stored, **options)
    count = []
    stopped = vbmf(stored, checkpoint=path, callback=lambda p: count.append(1) or len(count) == 6, **options)
    assert stopped.status is Status.STOPPED
    assert bits(vbmf(stored, checkpoint=path, **options)) == bits(whole)
    values[0] += 1
    other = write_shards(tmp_path / "y", [(rows, cols, values)], SHAPE, shard_entries=300)
    with pytest.raises(ValueError, match="other data, settings or seed"):
        vbmf(other, checkpoint=path, **options)


@pytest.mark.parametrize("n_init", [1, 2])
def test_the_model_reads_what_it_needs(tmp_path, n_init):
    """Predictions, new rows and top columns as in memory; learning entries is refused, also after pickling."""
    rows, cols, values, weights = entries(2500)
    options = {"random_state": 0, "on_failure": "ignore", "n_init": n_init}
    stored = write_shards(tmp_path / "x", split((rows, cols, values, weights)), SHAPE, shard_entries=200)
    model = pickle.loads(pickle.dumps(vbmf(stored, **options).factor_model()))
    mask = fastdmf.EntryMask(rows, cols, SHAPE)
    expected = vbmf(mask, values, weights=weights, implicit_features=False, **options).factor_model()
    assert model.dtype == np.float32
    some = np.array([50, 3, 40, 89, 3, -1])
    for exclude_seen in (False, True):
        best = model.top(some, 70 if exclude_seen else 5, exclude_seen)
        wanted = expected.top(some, 70 if exclude_seen else 5, exclude_seen)
        np.testing.assert_allclose(best[1], wanted[1], atol=2e-4)
        if exclude_seen:
            seen = [set(cols[rows == i]) for i in some]
            assert [set(c[np.isneginf(v)]) for c, v in zip(*best)] == seen and len(seen[0]) > 10
    np.testing.assert_allclose(model.predict(rows, cols), expected.predict(rows, cols), atol=2e-4)
    new = fastdmf.EntryMask([0, 0, 1], [5, 9, 30], (2, 70))
    y = np.pad(np.array([1.0, -0.5, 2.0], np.float32), (0, 16))
    folded = [m.fold_in(new.indptr, new.indices, y, None).block(np.arange(2)) for m in (model, expected)]
    np.testing.assert_allclose(*folded, atol=2e-4)
    indptr, indices, y, w = model.entries
    places = np.array([[7, len(y) - 1], [0, 7]])
    for lazy, held in zip((indices, y, w), expected.entries[1:]):
        np.testing.assert_allclose(lazy[places], held[places], atol=1e-6)
        assert lazy.dtype == held.dtype and len(lazy) == indptr[-1]
    with pytest.raises(TypeError, match="learning new entries does, takes a fit to an EntryMask"):
        model.learned(indptr, indices, y, w, 70, np.array([3]), np.array([4]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": np.ones(3)}, ValueError, "y must be None with EntryShards"),
        ({"weights": np.ones(3)}, ValueError, "weights must be None with EntryShards"),
        ({"implicit_features": True}, ValueError, "implicit_features=True needs the entries in memory"),
        ({"dtype": "int32"}, ValueError, "dtype must be float32 or float64"),
        ({"width": 0}, ValueError, "width must be an integer >= 1"),
    ],
)
def test_what_fits_refuse(tmp_path, change, error, message):
    stored = write_shards(tmp_path / "x", [entries()[:3]], SHAPE)
    with pytest.raises(error, match=message):
        vbmf(stored, change.pop("y", None), **change)


def test_other_solvers_say_what_they_take(tmp_path):
    with pytest.raises(TypeError, match="y is missing"):
        vbmf(fastdmf.EntryMask([0], [0], (1, 1)))
    with pytest.raises(TypeError, match="must be an EntryMask or EntryShards, got str"):
        vbmf(str(tmp_path / "x"))


# --- the estimator ---------------------------------------------------------------------------------------------------

COMPLETERS = {
    "defaults": {},
    "several": {"n_init": 2, "biases": False},
    "float64": {"width": 5, "depth": 3},
}


@pytest.mark.parametrize("kind", COMPLETERS)
def test_the_completer_from_one_shard_has_the_bits_of_memory(tmp_path, kind):
    rows, cols, values, weights = entries(2500, gaps=False)
    names = np.array([f"u{i:03d}" for i in range(SHAPE[0])], object)
    parts = split((names[rows], cols - 5, values, weights))
    stored = write_shards(tmp_path / "x", parts, ids=True, dtype="float64" if kind == "float64" else "float32")
    pairs = np.column_stack((names[rows], cols - 5)).astype(object)
    if kind == "float64":
        values = values.astype(np.float64)
    settings = {"random_state": 0, "implicit_features": None, **COMPLETERS[kind]}
    model = fastdmf.DMFCompleter(**settings).fit(stored)
    settings["implicit_features"] = False
    expected = fastdmf.DMFCompleter(**settings).fit(pairs, values, entry_weight=weights)
    assert model.row_ids_.tolist() == expected.row_ids_.tolist() and model.n_features_in_ == 2
    assert model.column_ids_.tolist() == expected.column_ids_.tolist()
    for name in ("mean_", "noise_variance_", "n_iter_", "solver_", "depth_", "status_", "_observed"):
        assert getattr(model, name) == getattr(expected, name), name
    np.testing.assert_array_equal(model.reconstruct(), expected.reconstruct())
    for of, wanted in zip(model.predict(pairs, True), expected.predict(pairs, True)):
        np.testing.assert_array_equal(of, wanted)
    for of, wanted in zip(model.top_k(k=3), expected.top_k(k=3)):
        np.testing.assert_array_equal(of, wanted)

    # It learns once it holds its entries.
    new = np.array([["new", 3], ["new", 9], ["u001", 100]], object), np.array([1.0, 2.0, 3.0], values.dtype)
    with pytest.raises(TypeError, match="or a completer that was saved and loaded"):
        pickle.loads(pickle.dumps(model)).partial_fit(*new)
    fastdmf.save(model, tmp_path / "model.npz")
    again = fastdmf.load(tmp_path / "model.npz").partial_fit(*new)
    np.testing.assert_array_equal(again.reconstruct(), expected.partial_fit(*new).reconstruct())
    assert not isinstance(model._model.entries[1], np.ndarray)  # saving changed nothing


def test_the_completer_goes_on_from_a_checkpoint(tmp_path):
    rows, cols, values, weights = entries(2500)
    stored = write_shards(tmp_path / "x", split((rows, cols, values, weights)), SHAPE, shard_entries=300)
    file = fastdmf.Checkpoint(tmp_path / "fit.npz", every=0)
    settings = {"random_state": 0, "tol": 0.0, "max_iter": 12, "checkpoint": file}
    with pytest.warns(UserWarning, match="MAX_ITER"):
        whole = fastdmf.DMFCompleter(random_state=0, tol=0.0, max_iter=12).fit(stored)
    with pytest.MonkeyPatch.context() as patch:
        step, count = Sweeps.step, []

        def cut(self):
            step(self)
            count.append(1)
            if len(count) == 6:
                raise OSError("the disk is gone")

        patch.setattr(Sweeps, "step", cut)
        with pytest.raises(OSError, match="the disk is gone"):
            fastdmf.DMFCompleter(**settings).fit(stored)
        count[:] = [0] * 100
        with pytest.warns(UserWarning, match="MAX_ITER"):
            again = fastdmf.DMFCompleter(**settings).fit(stored)
    assert len(count) < 100 + 12
    np.testing.assert_array_equal(again.reconstruct(), whole.reconstruct())


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"solver": "descent"}, {}, "solver='descent' needs the entries in memory: use solver='variational'"),
        ({"solver": "recovery"}, {}, "solver='recovery' needs the entries in memory"),
        ({"implicit_features": True}, {}, "implicit_features=True needs the entries in memory"),
        ({}, {"y": np.ones(3)}, "y must be None with EntryShards"),
        ({}, {"entry_weight": np.ones(3)}, "entry_weight must be None with EntryShards"),
        ({"width": 0}, {}, "width must be an integer >= 1"),
    ],
)
def test_what_the_completer_refuses(tmp_path, settings, arguments, message):
    stored = write_shards(tmp_path / "x", [entries()[:3]], SHAPE)
    model = fastdmf.DMFCompleter(**settings)
    with pytest.raises(ValueError, match=message):
        model.fit(stored, **arguments)
    assert not hasattr(model, "factors_")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shards_of_one_type_fit_in_the_other(tmp_path, dtype):
    rows, cols, values, _ = entries()
    other = {"float32": "float64", "float64": "float32"}[dtype]
    write_shards(tmp_path / "x", [(rows, cols, values)], SHAPE, dtype=dtype)
    stored = EntryShards(tmp_path / "x", dtype=other)
    solution = vbmf(stored, random_state=0, on_failure="ignore")
    assert stored.dtype == solution.factors[0].dtype == np.dtype(other)
    assert bits(solution) == bits(vbmf(EntryShards(tmp_path / "x"), dtype=other, random_state=0, on_failure="ignore"))
    with pytest.raises(ValueError, match="dtype must be float32 or float64, got 'int8'"):
        EntryShards(tmp_path / "x", dtype="int8")


def test_limits(tmp_path):
    rows, cols, values, _ = entries()
    for most in (10**6, 1):
        stored = write_shards(tmp_path / str(most), [(rows, cols, values)], SHAPE, shard_entries=most)
        assert stored.limits == (values.min(), values.max())


def test_the_side_in_memory_is_one_block():
    arrays = np.array([0, 2, 3]), np.zeros(19, np.int32), np.zeros(19), None
    ((at, *block),) = HeldSide(*arrays).blocks()
    assert at == slice(0, 2) and all(a is b for a, b in zip(block, arrays))


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = [0, 1], [1, 0], [1.0, 2.0]


@pytest.mark.parametrize(
    ("parts", "options", "error", "message"),
    [
        ([GOOD, ([2, -1], [0, 0], [1.0, 1.0])], {}, ValueError, "rows of part 1 must not be negative, got -1"),
        ([([0], [3], [1.0])], {"shape": (2, 3)}, ValueError, "cols of part 0 must be below 3, the matrix's size"),
        ([([0.0], [3], [1.0])], {}, TypeError, "rows of part 0 must hold integers, got dtype float64"),
        ([([True], [3], [1.0])], {}, TypeError, "rows of part 0 must hold integers, got dtype bool"),
        ([([[0]], [3], [1.0])], {}, ValueError, r"rows of part 0 must have 1 dimension, got shape \(1, 1\)"),
        ([([0, 1], [3], [1.0])], {}, ValueError, r"cols of part 0 must have the shape of rows, \(2,\), got \(1,\)"),
        ([([0], [3], 1.0)], {}, ValueError, r"values of part 0 must have the shape of rows, \(1,\), got \(\)"),
        ([([0, 5], [3, 4], [1.0, np.nan])], {}, ValueError, "NaN or infinite ones, the first at row 5, column 4"),
        ([([0, 5], [3, 4], [-np.inf, 1.0])], {}, ValueError, "NaN or infinite ones, the first at row 0, column 3"),
        ([([0], [3], [1e300])], {}, ValueError, "values of part 0 overflow in float32"),
        ([([0], [3], ["a"])], {}, TypeError, "values of part 0 must hold real numbers"),
        ([([0], [3], [1.0], [-1.0])], {}, ValueError, "weights of part 0 must not be negative"),
        ([([0], [3], [1.0], [0.0])], {}, ValueError, "weights are zero everywhere"),
        ([([0], [3], [1.0], [1.0]), GOOD], {}, ValueError, "part 1 has 3 items, part 0 has 4: weights go with all"),
        ([([0], [3])], {}, TypeError, r"part 0 must be \(rows, cols, values\).*got 2 items"),
        ([np.ones((3, 2))], {}, TypeError, r"part 0 must be \(rows, cols, values\).*got ndarray"),
        ([GOOD, ([5, 0], [5, 1], [1.0, 1.0])], {}, ValueError, "more than once, the first at row 0, column 1: combine"),
        ([([4, 4], [2, 2], [1.0, 1.0])], {}, ValueError, "more than once, the first at row 4, column 2"),
        ([], {}, ValueError, "parts hold no entry"),
        ([([], [], [])], {}, ValueError, "parts hold no entry"),
        (7, {}, TypeError, "parts must be an iterable of"),
        ([GOOD], {"shape": (0, 3)}, ValueError, "shape must be positive"),
        ([GOOD], {"dtype": "float16"}, ValueError, "dtype must be float32 or float64, got 'float16'"),
        ([GOOD], {"dtype": None}, ValueError, "dtype must be float32 or float64, got None"),
        ([GOOD], {"shard_entries": 0}, ValueError, "shard_entries must be an integer >= 1"),
        ([GOOD], {"ids": 1}, ValueError, "ids must be True or False"),
    ],
)
def test_what_writing_refuses(tmp_path, parts, options, error, message):
    with pytest.raises(error, match=message):
        write_shards(tmp_path / "x", parts, **options)
    assert not any(tmp_path.iterdir())


def test_folders_that_writing_refuses(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    (tmp_path / "file").touch()
    for name in ("used", "file"):
        with pytest.raises(ValueError, match="is in use: delete it, or name another"):
            write_shards(tmp_path / name, [GOOD])
    for function in (lambda folder: write_shards(folder, [GOOD]), EntryShards):
        with pytest.raises(TypeError, match=r"folder must be a str or an os.PathLike, got int"):
            function(7)
    with pytest.raises(ValueError, match="folder must lie in one that exists"):
        write_shards(tmp_path / "no" / "x", [GOOD])
    (tmp_path / "empty").mkdir()
    assert write_shards(tmp_path / "empty", [GOOD]).size == 2
    with pytest.raises(ValueError, match="is in use"):
        write_shards(tmp_path / "empty", [GOOD])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_parts_leave_nothing(tmp_path, error):
    def parts():
        yield GOOD
        raise error

    with pytest.raises(error):
        write_shards(tmp_path / "x", parts())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", range(7))
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, place):
    """At whichever file it happens; what a killed process leaves beside is no folder of shards, and is replaced."""
    save, count = np.save, []

    def full(path, array):
        count.append(path)
        if len(count) > place:
            raise OSError(28, "No space left on device")
        save(path, array)

    rows, cols, values, _ = entries(200)
    arguments = [(rows, cols, values)], SHAPE
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_shards(tmp_path / "x", *arguments, shard_entries=60)
    assert not any(tmp_path.iterdir())
    count.clear()
    monkeypatch.setattr(module.shutil, "rmtree", lambda *a, **k: None)
    with pytest.raises(OSError, match="No space left"):
        write_shards(tmp_path / "x", *arguments, shard_entries=60)
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("x.") and left.name.endswith(".new")
    for folder in (left, tmp_path / "x"):
        with pytest.raises(ValueError, match="holds no entry shards"):
            EntryShards(folder)
    assert write_shards(tmp_path / "x", *arguments).size == len(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def stored(tmp_path):
    return write_shards(tmp_path / "x", [entries()[:3]], SHAPE, shard_entries=400)


def change_index(folder, **values):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE = {
    "no index": (lambda f: (f / "index.json").unlink(), "holds no entry shards"),
    "no JSON": (lambda f: (f / "index.json").write_text("{"), "is damaged or none of fastdmf's"),
    "a list": (lambda f: (f / "index.json").write_text("[1]"), "is damaged or none of fastdmf's"),
    "foreign": (lambda f: change_index(f, format="parquet"), "is none of fastdmf's"),
    "later": (lambda f: change_index(f, version=2), "has version 2 of the format, this release reads 1"),
    "no shape": (lambda f: change_index(f, shape=None), "index .* is damaged"),
    "other shape": (lambda f: change_index(f, shape=[90, 71]), "index .* is damaged .*cuts do not divide the matrix"),
    "lost": (lambda f: (f / "rows-00001.values.npy").unlink(), "lacks its file 'rows-00001.values.npy'"),
    "cut short": (lambda f: cut(f / "columns-00000.indices.npy"), "columns-00000.indices.npy' has .* bytes instead"),
    "pointers": (lambda f: flip(f / "rows.pointers.npy"), "rows.pointers.npy' has changed since it was written"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path, place=-80):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders_are_refused(stored, kind):
    damage, message = DAMAGE[kind]
    damage(stored.folder)
    with pytest.raises(ValueError, match=message):
        EntryShards(stored.folder)


def test_changed_bytes(stored):
    """Headers show when a shard is read, values when all is verified."""
    again = EntryShards(stored.folder)
    again.verify()
    assert again.digest == stored.digest and repr(again).startswith("<EntryShards: 90 x 70, ")
    flip(stored.folder / "rows-00001.values.npy")
    again = EntryShards(stored.folder)
    with pytest.raises(ValueError, match="rows-00001.values.npy' has changed since it was written"):
        again.verify()
    path = stored.folder / "rows-00000.indices.npy"
    data = path.read_bytes()
    path.write_bytes(b"\0" * 6 + data[6:])
    with pytest.raises(ValueError, match="rows-00000.indices.npy' cannot be read"):
        vbmf(EntryShards(stored.folder), random_state=0)
    path.write_bytes(data.replace(b"<i4", b"<f4"))
    with pytest.raises(ValueError, match="indices of run 0 of rows .* are damaged"):
        vbmf(EntryShards(stored.folder), random_state=0)


def test_the_example():
    results = doctest.testmod(module)
    assert results.attempted >= 7 and not results.failed
