"""The targets of ``bench.fuzz`` on a few drawn examples each, planted faults that they find, and what they found."""

import importlib
import io
import json
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

import fastdmf
from fastdmf import tables
from fastdmf.checkpoint import CheckpointFile
from fastdmf.tables import TableError, read_entries, read_table

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fuzz():
    """``bench`` is a folder of scripts, found from the repository's root only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        names = "harness", "loaders", "models", "estimators"
        yield {name: importlib.import_module(f"bench.fuzz.{name}") for name in names}
    for name in [name for name in sys.modules if name == "bench" or name.startswith("bench.")]:
        del sys.modules[name]


# Target, case, examples: a second or two each.
SHARES = [
    *[("loaders", case, 60) for case in ("text", "twins", "market", "sparse", "npy", "parquet", "seeds", "bytes")],
    *[("models", case, 40) for case in ("bytes", "header", "arrays", "checkpoint", "shards")],
    *[("estimators", case, 25) for case in ("completer", "imputer", "sensing")],
]


@pytest.mark.parametrize(("target", "case", "count"), SHARES)
def test_a_few_examples(target, case, count, fuzz):
    watched, one = fuzz["harness"].watched, fuzz[target].CASES[case]

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(one.strategy)
    def run(value):
        watched(one, value)

    run()


def test_every_case_has_its_examples(fuzz):
    """But the one that fills the memory."""
    cases = {(target, case) for target in ("loaders", "models", "estimators") for case in fuzz[target].CASES}
    assert cases - {(target, case) for target, case, _ in SHARES} == {("models", "bomb")}


# --- the harness -------------------------------------------------------------------------------------------------


def warn(value):
    np.float64(1e300) * np.float64(1e300)


def take(value):
    take.kept = [getattr(take, "kept", None), np.ones(20_000_000)]


def refuse(*said):
    return lambda value, harness: harness.refusal(ValueError(*said), "shape", "depth")


# What the harness says of a fault, dots for what is measured -> the check that has it.
FAULTS = {
    "KeyError: 3": lambda value, harness: {}[value],
    "RuntimeWarning escapes at test_fuzz.py": lambda value, harness: warn(value),
    "names none of": refuse("something is wrong"),
    "no one readable line": refuse("depth is wrong,\nand so on"),
    "takes more than 0 s": lambda value, harness: None,
    "takes ... MB": lambda value, harness: take(value),
}


@pytest.mark.parametrize("said", FAULTS)
def test_planted_faults_are_found(said, fuzz, tmp_path, monkeypatch):
    """Each with its shortest example, however often it comes."""
    harness = fuzz["harness"]
    monkeypatch.setattr(harness, "_MEMORY", 1 << 28)
    seconds = 0.0 if "0 s" in said else 60.0
    case = harness.Case(st.just(3), lambda value: FAULTS[said](value, harness), seconds)
    with harness.Recorder({"planted": case}, tmp_path) as recorder:
        for value in (33, 3):
            recorder.run(("planted", value))
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["executions"] == {"planted": 2}
    assert all(part in written["findings"][0]["error"] for part in said.split("..."))
    assert written["findings"][0]["example"] == "('planted', 3)"


def test_a_documented_refusal_is_none(fuzz, tmp_path):
    harness = fuzz["harness"]
    case = harness.Case(st.just(3), lambda value: refuse("depth must be an integer, got 'x'")(value, harness))
    with harness.Recorder({"planted": case}, tmp_path) as recorder:
        recorder.run(("planted", 3))
    assert not recorder.findings and recorder.executions["planted"] == 1 and recorder.taken["planted"] == 0


def test_an_example_is_run_again():
    command = [
        sys.executable,
        "-m",
        "bench.fuzz",
        "loaders",
        "--replay",
        "('bytes', (b'1,2,3\\n', [], ('entries', {})))",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "taken\n"


# --- what was found: files ---------------------------------------------------------------------------------------


def written(folder, content, name="f.csv"):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["rot13", "hex", "idna", "\0", "x", None])
def test_encodings_that_are_none(encoding, tmp_path):
    with pytest.raises(TableError, match="encoding must be one of text that Python knows, got"):
        read_entries(written(tmp_path, b"1,2,3\n"), encoding=encoding)


def test_text_that_is_not_utf_32(tmp_path):
    with pytest.raises(TableError, match="f.csv is not utf-32: pass the encoding= that it was written in"):
        read_entries(written(tmp_path, b"1,2,3\n2,3,4\n"), encoding="utf-32")


@pytest.mark.parametrize("separator", ["é", "\0"])
def test_separators_that_text_is_not_split_at(separator, tmp_path):
    with pytest.raises(TableError, match="separator must be one ASCII character, got"):
        read_entries(written(tmp_path, b"1,2,3\n"), separator=separator)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_nul_in_text_of_any_encoding(encoding, tmp_path):
    with pytest.raises(TableError, match="neither text nor a format that is known"):
        read_entries(written(tmp_path, "a,b\0,1\n".encode(encoding)), encoding=encoding)


@pytest.mark.parametrize("missing", [7, (7,), None])
def test_marks_that_are_no_texts(missing, tmp_path):
    with pytest.raises(TableError, match="missing must be texts that mark a hole, got"):
        read_table(written(tmp_path, b"1,2\n"), missing=missing)


def npz(folder, **members):
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    return written(folder, buffer.getvalue(), "m.npz")


CSR = {"format": b"csr", "shape": (3, 2), "data": [1.0, 2.0], "indices": [0, 1], "indptr": [0, 1, 2, 2]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"indptr": [0, 1, 2, 0]}, "its pointers decrease"),  # scipy 1.17 wrote outside of its arrays
        ({"indptr": [0, 1 << 20, 2, 2]}, "its pointers decrease"),
        ({"indices": [0, 100]}, "must be < 2"),
        ({"indices": [0.0, 1.0]}, "its indices are no integers"),
        ({"indptr": [0j, 1, 2, 2]}, "its indices are no integers"),
        ({"indptr": [[0, 1, 2, 2]]}, "its pointers decrease"),
        ({"data": np.ones(2, np.float16)}, "float16"),
        ({"format": b"lil"}, "'lil'"),
        ({"format": b"dia"}, "DIA format, which stores zeros of its own"),
    ],
)
def test_sparse_matrices_whose_indices_lead_elsewhere(change, said, tmp_path):
    members = {name: np.asarray(value) for name, value in (CSR | change).items()}
    with pytest.raises(TableError, match=f"m.npz .*{said}"):
        read_entries(npz(tmp_path, **members))


def test_sparse_matrices_in_all_of_scipys_forms(tmp_path):
    """The reader puts them together itself."""
    matrix = sparse.random(6, 5, density=0.4, random_state=0)
    for form in ("csr", "csc", "coo"):
        for make in (sparse.csr_matrix, sparse.csr_array):
            sparse.save_npz(tmp_path / "m.npz", make(matrix).asformat(form), compressed=form == "coo")
            rows, columns, values = read_entries(tmp_path / "m.npz")
            assert (sparse.coo_array((values, (rows, columns)), (6, 5)) != matrix).nnz == 0
    coo = matrix.tocoo()
    members = {"format": np.array(b"coo"), "shape": np.array((6, 5)), "data": coo.data, "coords": np.array(coo.coords)}
    assert read_entries(npz(tmp_path, **members))[2].tolist() == coo.data.tolist()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("array real symmetric\n1 3\n1\n2\n3\n", "a symmetric matrix of shape .1, 3.: it must be square"),
        ("array real skew-symmetric\n1 1\n1\n", "has 1 values, a skew-symmetric matrix of 1 rows and columns has 0"),
        ("array real hermitian\n2 2\n1\n", "has 1 values, a hermitian matrix of 2 rows and columns has 3"),
        ("coordinate real symmetric\n2 3 1\n1 1 1\n", "it must be square"),
    ],
)
def test_symmetric_matrices_that_are_none(text, said, tmp_path):
    """The first two let scipy 1.17 write outside of its arrays, the third it filled up with zeros."""
    with pytest.raises(TableError, match=f"m.mtx .*{said}"):
        read_table(written(tmp_path, f"%%MatrixMarket matrix {text}".encode(), "m.mtx"))


def test_symmetric_matrices(tmp_path):
    text = b"%%MatrixMarket matrix array real symmetric\n% by hand\n\n2 2\n1\n2\n3\n"
    assert read_table(written(tmp_path, text, "m.mtx")).values.tolist() == [[1, 2], [2, 3]]


def test_parquet_of_half_precision_and_of_missing_ids(tmp_path):
    pd.DataFrame({"a": np.array([1, 60000], "f2"), "b": [3, 4]}).to_parquet(tmp_path / "f.parquet")
    rows, columns, _ = read_entries(tmp_path / "f.parquet")
    assert rows.tolist() == [1, 60000] and columns.tolist() == [3, 4]
    pd.DataFrame({"a": ["u", None, "v"], "b": [3.0, 4, 5]}).to_parquet(tmp_path / "f.parquet")
    with pytest.raises(TableError, match=r"f.parquet, row 1 \(from 0\), column 'a': the row id is missing"):
        read_table(tmp_path / "f.parquet")


def test_errors_of_others_are_cut(tmp_path):
    """What zipfile says quotes all that it finds in the place of a name."""
    buffer = io.BytesIO()
    sparse.save_npz(buffer, sparse.eye_array(30, format="csr"))
    content = bytearray(buffer.getvalue())
    content[26:28] = b"\xff\x0f"  # the length of the first member's name
    with pytest.raises(TableError) as caught:
        read_entries(written(tmp_path, bytes(content), "m.npz"))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


# --- what was found: models, checkpoints, shards -----------------------------------------------------------------


def test_a_small_file_does_not_fill_the_memory(tmp_path):
    path, text = tmp_path / "bomb.npz", b"{'descr': '|u1', 'fortran_order': False, 'shape': (50000000,), }\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("header", "seal"):
            archive.writestr(
                f"{name}.npy", b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(50 << 20)
            )
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="bomb.npz is damaged, or is no model that fastdmf.save wrote"):
        fastdmf.load(path)
    with pytest.raises(ValueError, match="bomb.npz' is damaged or none of fastdmf's"):
        CheckpointFile(path, "run").load()


def resealed(fuzz, kind, edit):
    """Return a saved model's file, its header edited, with digests that are right again."""
    models = fuzz["models"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "edited", lambda header, edits: edit(header) or header)
        return models._sealed(models._model(kind)[0], [], [], False)


def put_row_count(header):
    header["fitted"]["_rows"] = {"object": ["Positions", {"name": "row", "n": 13}]}


def put_indicator(header):
    header["fitted"]["indicator_"] = {"object": ["MissingIndicator", {"n": 10**9, "features": [0]}]}


def put_generator(header):
    state = {"tuple": ["MT19937", {"array": 0}, 999, 0, 0.0]}
    header["parameters"]["random_state"] = {"object": ["RandomState", {"state": state}]}


@pytest.mark.parametrize(
    ("kind", "edit", "said"),
    [
        ("names", put_row_count, "a model of another shape than its ids"),
        ("gaussian", put_indicator, "a MissingIndicator of 1000000000"),
        ("sensing", put_generator, "a RandomState of .* at place 999"),
        ("names", lambda header: header.update({"fastdmf": "9" * 5000, "class": "x" * 5000}), "KeyError: 'xxx"),
    ],
)
def test_models_that_lead_outside(kind, edit, said, fuzz, tmp_path):
    path = written(tmp_path, resealed(fuzz, kind, edit), "m.npz")
    with pytest.raises(ValueError, match=f"m.npz was written by fastdmf .*{said}") as caught:
        fastdmf.load(path)
    assert len(str(caught.value)) < 700 + len(str(tmp_path))


def test_a_checkpoint_whose_array_has_become_shorter(tmp_path):
    """As much is read as an array's own header says, and then numpy compares no checksum."""
    path = tmp_path / "run.npz"
    file = CheckpointFile(path, "run")
    file.save({"x": np.arange(90.0).reshape(30, 3), "k": 1})
    assert file.load()["x"].shape == (30, 3)
    content = path.read_bytes()
    assert content.count(b"'shape': (30, 3)") == 1
    path.write_bytes(content.replace(b"'shape': (30, 3)", b"'shape': (10, 3)"))
    with pytest.raises(ValueError, match="run.npz' is damaged or none of fastdmf's"):
        file.load()


@pytest.fixture
def shards(tmp_path):
    rows, cols = np.divmod(np.arange(60), 6)
    return fastdmf.write_shards(tmp_path / "x", [(rows, cols, np.sin(rows + cols))], ids=True, shard_entries=20).folder


def change_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index["cuts"].update(rows=[0, 18, 10]), "cuts do not divide the matrix"),
        (lambda index: index["cuts"].update(rows=[0]), "cuts do not divide the matrix"),
        (lambda index: index["cuts"].update(rows=[0, "5", 10]), "cuts do not divide the matrix"),
        (lambda index: index.update(mean=float("nan")), "mean must be a number"),
        (lambda index: index.update(weighted=None), "weighted and ids must be true or false"),
        (lambda index: index.update(pad=0), "pad must be an integer"),
        (lambda index: index.update(pad=2**31), "pad must be at most"),
        (lambda index: index.update(files=[[1]]), "AttributeError"),
        (lambda index: index["files"].update({"../x": [1, 2]}), "files are not those of its runs"),
        (lambda index: index.update(dtype="float16"), "dtype must be float32 or float64"),
        (lambda index: index.update(entries=10**30), "has changed since it was written"),
    ],
)
def test_an_index_that_leads_outside(change, said, shards):
    change_index(shards, change)
    with pytest.raises(ValueError, match=f"x.*{said}"):
        fastdmf.EntryShards(shards)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rows-00000.indices", 6, "indices of run 0 of rows in .* are damaged"),
        ("columns-00001.indices", -1, "indices of run 1 of columns in .* are damaged"),
        ("rows-00000.values", np.nan, "values of run 0 of rows in .* are damaged"),
    ],
)
def test_shards_that_lead_outside(name, value, said, shards):
    """Kernels check no index."""
    path = shards / f"{name}.npy"
    array = np.load(path)
    array[2] = value
    np.save(path, array)
    with pytest.raises(ValueError, match=said):
        fastdmf.vbmf(fastdmf.EntryShards(shards), random_state=0)


@pytest.mark.parametrize("text", [b"\xab", b"[1, 2]", b"7", b"[" * 100_000])
def test_ids_that_are_none(text, shards):
    path = shards / "rows.ids.json"
    path.write_bytes(text)
    change_index(shards, lambda index: index["files"].update({path.name: [len(text), zlib.crc32(text)]}))
    with pytest.raises(ValueError, match="rows.ids.json' has changed since it was written"):
        fastdmf.EntryShards(shards).row_ids  # noqa: B018


# --- what was found: estimators ----------------------------------------------------------------------------------

PAIRS = np.argwhere(np.random.default_rng(0).random((12, 9)) < 0.6)
VALUES = np.random.default_rng(1).standard_normal(len(PAIRS))
quiet = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@quiet
@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e37, 1e-44])
@pytest.mark.parametrize("solver", ["variational", "descent"])
def test_float32_values_whose_squares_are_no_float32(scale, solver):
    """The bits of the same fit in float64."""
    y = (VALUES * scale).astype(np.float32)
    one, other = (
        fastdmf.DMFCompleter(solver=solver, random_state=0, max_iter=20).fit(PAIRS, values).reconstruct()
        for values in (y, y.astype(np.float64))
    )
    assert np.isfinite(one).all() and np.array_equal(one, other)


@quiet
def test_values_that_cannot_be_squared():
    with pytest.raises(ValueError, match="the data holds values too large to be squared, up to .*e.200: scale it down"):
        fastdmf.DMFCompleter(random_state=0).fit(PAIRS, VALUES * 1e200)
    with pytest.raises(ValueError, match=r"entry_weight must be at most 1e\+15, got 1.0e\+300"):
        fastdmf.DMFCompleter(random_state=0).fit(PAIRS, VALUES, entry_weight=np.full(len(VALUES), 1e300))
    A = np.random.default_rng(0).standard_normal((20, 6))
    with pytest.raises(ValueError, match="A holds values too small to be squared"):
        fastdmf.DMFSensing(random_state=0).fit(A * 1e-160, A[:, 0])
    A, y = (A * 1e20).astype(np.float32), A[:, 0].astype(np.float32)
    fits = [fastdmf.DMFSensing(random_state=0).fit(A.astype(dtype), y.astype(dtype)).matrix_ for dtype in ("f4", "f8")]
    assert np.isfinite(fits[0]).all() and np.array_equal(*fits)


@quiet
@pytest.mark.parametrize("scale", [2.0**330, 2.0**-330])
def test_tables_far_from_one_are_filled_like_others(scale):
    """Squares of their squared errors leave the range of floats; their deviations are finite."""
    X = np.full((12, 9), np.nan)
    X[tuple(PAIRS.T)] = VALUES
    filled = fastdmf.DMFImputer(random_state=0).fit_transform(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = fastdmf.DMFImputer(random_state=0).fit(X * scale)
        far, doubt = model.transform(X * scale), model.uncertainty(X * scale)
    np.testing.assert_allclose(far / scale, filled, rtol=1e-6, atol=1e-9)
    assert np.isfinite(doubt).all() and (doubt[np.isnan(X)] > 0).all() and (doubt[~np.isnan(X)] == 0).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (fastdmf.DMFImputer, "keep_empty_features"),
        (fastdmf.DMFImputer, "add_indicator"),
        (fastdmf.DMFImputer, "warm_start"),
        (fastdmf.DMFSensing, "psd"),
        (fastdmf.DMFSensing, "warm_start"),
    ],
)
def test_flags_that_are_none(make, name):
    X = np.arange(12.0).reshape(4, 3)
    with pytest.raises(ValueError, match=f"{name} must be True or False, got inf"):
        make(**{name: np.inf}).fit(X, X[:, 0])


def test_measurements_that_are_none():
    A = np.eye(6)
    with pytest.raises(ValueError, match="A has no measurements"):
        fastdmf.DMFSensing().fit(fastdmf.GaussianDense(A[:0], (2, 3)), A[:0, 0])
    for y in (np.arange(6).astype("M8[s]"), np.array(list("abcdef"))):
        for measurements in (A, fastdmf.GaussianDense(A, (2, 3))):
            with pytest.raises((TypeError, ValueError), match="y must hold (real )?numbers|A and y must hold"):
                fastdmf.DMFSensing().fit(measurements, y)
    with pytest.raises(ValueError, match=r"shape must be two positive integers \(n1, n2\), got 2.5"):
        fastdmf.DMFSensing(shape=2.5).fit(fastdmf.GaussianDense(A, (2, 3)), A[:, 0])
    with pytest.raises(TypeError, match="columns must name row, column and value, got 2"):
        fastdmf.DMFCompleter(columns=2).fit(pd.DataFrame({"a": [1], "b": [2], "c": [3.0]}))


def test_nothing_else_reads_sparse_matrices():
    """Scipy's own reader trusts what it finds."""
    assert "load_npz(" not in Path(tables.__file__).read_text()


def test_measurements_of_an_operator_are_looked_at():
    """As those of an array are: too large or too small to be squared, in A and in y."""
    rng = np.random.default_rng(0)
    a, y = rng.standard_normal((30, 3, 2)), rng.standard_normal(30)
    for scale, said in ((1e170, "A holds values too large to be squared"), (1e-170, "A holds values too small")):
        with pytest.raises(ValueError, match=said):
            fastdmf.DMFSensing().fit(fastdmf.GaussianDense(scale * a), y)
    y[3] = 1e300
    with pytest.raises(ValueError, match="y holds values too large to be squared"):
        fastdmf.DMFSensing().fit(fastdmf.GaussianDense(a), y)
    large = np.where(np.arange(180).reshape(30, 3, 2) % 2, 1, -1) * 1.7e308
    assert fastdmf.GaussianDense(large).size == 30  # its sum is no number, its numbers are


def test_tables_without_noise_or_holes():
    """Dependent loadings and no noise: nothing is singular."""
    rng = np.random.default_rng(0)
    for shape in ((11, 5), (12, 8), (30, 9)):
        table = rng.standard_normal((shape[0], 1)) @ rng.standard_normal((1, shape[1]))
        filled = fastdmf.DMFImputer(random_state=0).fit_transform(table)
        np.testing.assert_array_equal(filled, table)
    assert fastdmf.DMFImputer(random_state=0).fit_transform(np.array([[1.7e308]])) == 1.7e308
    with pytest.raises(ValueError, match="X holds values too large"):
        fastdmf.DMFImputer().fit(np.array([[1.7e308, 1.7e308]]))


@pytest.mark.parametrize("solver", ["auto", "variational", "gaussian", "descent", "recovery"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"depth": ("a", 2)}, "depth must be an integer >= 2, got"),
        ({"depth": 1}, "depth must be an integer >= 2, got 1"),
        ({"depth": 0}, "depth must be an integer >= 2, got 0"),
        ({"width": ()}, "width must hold at least one inner width, got"),
    ],
)
def test_depths_and_widths_that_no_imputer_has(solver, setting, said):
    with pytest.raises(ValueError, match=said):
        fastdmf.DMFImputer(solver=solver, **setting).fit(np.random.default_rng(0).standard_normal((12, 4)))


def test_recovery_of_what_is_next_to_nothing():
    X = np.random.default_rng(0).choice([0.0, np.nan], (12, 4), p=[0.8, 0.2])
    X[0, 0] = 5e-324
    with pytest.raises(ValueError, match="y is too small, its values reach .* at most: scale it up"):
        fastdmf.DMFImputer(solver="recovery", random_state=0).fit(X)


def test_a_start_that_is_too_far_away():
    """No warning of NumPy's; the status says it."""
    rng = np.random.default_rng(0)
    a, y = rng.standard_normal((20, 10)), rng.standard_normal(20)
    with pytest.warns(ConvergenceWarning, match="DIVERGED"):
        fastdmf.DMFSensing(shape=(5, 2), solver="descent", init_scale=1e300, random_state=0).fit(a, y)


@pytest.mark.parametrize("bounds", [{"max_value": -np.inf}, {"min_value": np.inf}])
def test_bounds_that_leave_nothing(bounds):
    with pytest.raises(ValueError, match="leave no value between them"):
        fastdmf.DMFCompleter(**bounds).fit(np.array([[0, 0], [1, 1]]), np.array([1.0, 2.0]))


def test_one_column_has_no_features_of_the_mask():
    rng = np.random.default_rng(0)
    pairs = np.stack([np.arange(40), np.zeros(40, int)], axis=1)
    model = fastdmf.DMFCompleter(implicit_features=True, random_state=0).fit(pairs, rng.standard_normal(40))
    assert np.isfinite(model.noise_variance_) and np.isfinite(model.predict(pairs)).all()


def test_long_names_of_columns_are_cut(tmp_path):
    path = written(tmp_path, b"a,b," + b"c" * 900 + b"\n1,2,3\n1,3,three\n")
    with pytest.raises(TableError, match=r"line 3, column 'c{80}\.\.\.'") as caught:
        read_entries(path)
    assert len(str(caught.value)) < 400
