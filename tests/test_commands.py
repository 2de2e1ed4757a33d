"""``fastdmf complete``, ``predict``, ``impute`` and ``shard``: from file to predictions, beside the library itself."""

import gzip
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from functools import partial
from itertools import chain, permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import io as scipy_io
from scipy import sparse

import fastdmf
from fastdmf import alternating, cli, command_shards, tables

csv = pytest.importorskip("pyarrow.csv", reason="text and parquet files need pyarrow")
ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```console\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def truth(seed=0, n1=40, n2=30):
    """Rank 2 plus biases."""
    rng = np.random.default_rng(seed)
    biases = 3 + rng.standard_normal((n1, 1)) + rng.standard_normal(n2)
    return biases + rng.standard_normal((n1, 2)) @ rng.standard_normal((2, n2))


def ratings(seed=0):
    """Return a DataFrame of entries; users are texts, items integers, in any order."""
    rng, full = np.random.default_rng(seed), truth(seed)
    i, j = np.nonzero(rng.random(full.shape) < 0.4)
    values = (full[i, j] + 0.1 * rng.standard_normal(len(i))).round(3)
    order = rng.permutation(len(i))
    return pd.DataFrame({"user": [f"u{k}" for k in i[order]], "item": j[order] + 5, "rating": values[order]})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a file of ratings, of pairs, and a table with holes."""
    monkeypatch.chdir(tmp_path)
    frame = ratings()
    frame.to_csv("ratings.csv", index=False)
    frame[["user", "item"]].iloc[::7].to_csv("pairs.csv", index=False)
    holes = np.random.default_rng(1).random((40, 30)) < 0.2
    table = pd.DataFrame(np.where(holes, np.nan, truth().round(3)), columns=[f"h{k}" for k in range(30)])
    table.insert(0, "station", [f"s{k}" for k in range(40)])
    table.to_csv("table.csv", index=False)
    return tmp_path


def run(*argv):
    """Run a command that must end well."""
    assert cli.main([*map(str, argv), "--quiet"]) == 0


def refused(capsys, *argv):
    """Return what a command line that must be refused says: the code, and one line on stderr."""
    try:
        code = cli.main([*map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return code, captured.err


def fitted(frame=None, **settings):
    """Return what the library makes of the ratings."""
    return fastdmf.DMFCompleter(**({"random_state": 0} | settings)).fit(ratings() if frame is None else frame)


# --- complete --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.csv.gz", "out.tsv.gz", "out.parquet"])
def test_every_cell(place, name):
    """By default every cell comes, row by row, with its ids, as ``reconstruct`` has it."""
    run("complete", "ratings.csv", "--out", name)
    rows, columns, values = tables.read_entries(name)
    model = fitted()
    assert rows.tolist() == np.repeat(model.row_ids_, len(model.column_ids_)).tolist()
    assert columns.tolist() == np.tile(model.column_ids_, len(model.row_ids_)).tolist()
    np.testing.assert_array_equal(values, model.reconstruct().ravel())


def test_missing_cells_and_deviations(place):
    """The cells without an entry are those that the file lacks."""
    run("complete", "ratings.csv", "--cells", "missing", "--std", "--out", "out.parquet")
    out, frame, model = pd.read_parquet("out.parquet"), ratings(), fitted()
    assert list(out.columns) == ["row", "column", "value", "std"]
    asked, known = (set(zip(*part)) for part in ((out.row, out.column), (frame.user, frame.item)))
    assert asked | known == {(i, j) for i in model.row_ids_ for j in model.column_ids_}
    assert len(asked) + len(known) == len(model.row_ids_) * len(model.column_ids_) == len(out) + len(frame)
    values, std = model.predict(out[["row", "column"]], return_std=True)
    np.testing.assert_array_equal(out["value"], values)
    np.testing.assert_array_equal(out["std"], std)


@pytest.mark.parametrize("cells", [(), ("--cells", "all")])
def test_best_columns(place, cells):
    """``--top`` is ``top_k``; with ``--cells all`` also of what is known."""
    run("complete", "ratings.csv", "--top", 3, *cells, "--std", "--out", "best.parquet")
    out, model = pd.read_parquet("best.parquet"), fitted()
    columns, values = model.top_k(k=3, exclude_seen=not cells)
    assert out.row.tolist() == np.repeat(model.row_ids_, 3).tolist()
    assert out.column.tolist() == columns.ravel().tolist()
    np.testing.assert_array_equal(out["value"], values.ravel())
    np.testing.assert_array_equal(out["std"], model.predict(out[["row", "column"]], return_std=True)[1])


def test_more_than_there_is(place):
    """More columns are asked for than a row has: it ends with those that it has."""
    pd.DataFrame({"u": ["a", "a", "b"], "i": [1, 2, 2], "r": [1.5, 2, 3]}).to_csv("few.csv", index=False)
    run("complete", "few.csv", "--top", 10, "--out", "best.csv")
    rows, columns, _ = tables.read_entries("best.csv")
    assert list(zip(rows, columns)) == [("b", 1)]


# Every option of the model off its default, and what it is in the library.
OPTIONS = {
    "depth and width": ("--depth 3 --width 4", {"depth": 3, "width": 4}),
    "max_iter": ("--max-iter 4", {"max_iter": 4}),
    "tol": ("--tol 1e-2", {"tol": 1e-2}),
    "biases": ("--no-biases", {"biases": False}),
    "implicit": ("--implicit-features", {"implicit_features": True}),
    "no implicit": ("--no-implicit-features", {"implicit_features": False}),
    "n_init": ("--n-init 2", {"n_init": 2}),
    "bounds": ("--min-value 2 --max-value=3.5", {"min_value": 2, "max_value": 3.5}),
    "free": ("--min-value free --max-value free", {"min_value": -np.inf, "max_value": np.inf}),
    "seed": ("--seed 7 --solver variational", {"random_state": 7}),
    "threads": ("--threads 1 --device cpu", {"n_threads": 1}),
    "descent": (
        "--solver descent --width 6,5 --validation 0.2 --seed 3",
        {"solver": "descent", "width": (6, 5), "validation_fraction": 0.2, "random_state": 3},
    ),
    "recovery": ("--solver recovery --width 5", {"solver": "recovery", "width": 5}),
}

# Where the result does not depend on them, or features of the mask are not kept.
NO_MATTER = ("threads", "implicit", "no implicit")


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_options_of_the_model(place, case):
    argv, settings = OPTIONS[case]
    run("complete", "ratings.csv", "--out", "out.csv", *argv.split())
    expected = fitted(**settings).reconstruct()
    np.testing.assert_array_equal(tables.read_entries("out.csv")[2], expected.ravel())
    assert case in NO_MATTER or not np.array_equal(expected, fitted().reconstruct())


def test_pairs(place):
    """Pairs are found by the names of the entries' columns, and what is written is called like them."""
    pairs = pd.read_csv("pairs.csv").assign(when=0)[["when", "item", "user"]]
    pairs.to_csv("pairs.csv", index=False)
    names = ["--columns", "user,item,rating"]
    run("complete", "ratings.csv", *names, "--pairs", "pairs.csv", "--std", "--out", "out.parquet")
    out = pd.read_parquet("out.parquet")
    assert list(out.columns) == ["user", "item", "rating", "std"]
    assert out[["item", "user"]].values.tolist() == pairs[["item", "user"]].values.tolist()
    values, std = fitted().predict(out[["user", "item"]], return_std=True)
    np.testing.assert_array_equal(out["rating"], values)
    np.testing.assert_array_equal(out["std"], std)


@pytest.mark.parametrize("duplicates", ["sum", "mean", "last"])
def test_duplicates(place, capsys, duplicates):
    """They are an error that names them by their ids, or what one says."""
    frame = pd.concat([ratings(), ratings().iloc[:20].assign(rating=1.0)])
    frame.to_csv("twice.csv", index=False)
    first = frame.iloc[:20].sort_values(["user", "item"]).iloc[0]
    code, err = refused(capsys, "complete", "twice.csv", "--out", "out.csv", "--quiet")
    assert code == 1
    assert f"20 entries occur more than once, the first at row {first.user}, column {first['item']}: " in err
    assert "choose --duplicates sum, mean or last" in err
    run("complete", "twice.csv", "--duplicates", duplicates, "--out", "out.csv")
    model = fitted(frame, duplicates=duplicates)
    np.testing.assert_array_equal(tables.read_entries("out.csv")[2], model.reconstruct().ravel())


def test_dtype(place, capsys):
    run("complete", "ratings.csv", "--dtype", "float32", "--out", "out.parquet")
    out = pd.read_parquet("out.parquet")
    assert out["value"].dtype == np.float32
    expected = fitted(ratings().astype({"rating": np.float32})).reconstruct()
    np.testing.assert_array_equal(out["value"], expected.ravel())
    Path("large.csv").write_text("a,b,1e60\nb,c,1\n")
    code, err = refused(capsys, "complete", "large.csv", "--dtype", "float32", "--out", "out.csv")
    assert (code, "overflow in float32: use --dtype float64" in err) == (1, True)


# Other layouts of the same file: how it is written, and what says so.
LAYOUTS = {
    "names": (
        lambda f: f.assign(when=0)[["when", "rating", "user", "item"]].to_csv("f.csv", index=False),
        "--columns user,item,rating",
    ),
    "quoted": (
        lambda f: f.rename(columns={"user": "a, b", "item": "1", "rating": "r"}).to_csv("f.csv", index=False),
        '--columns \'"a, b","1",r\'',
    ),
    "places": (lambda f: f.assign(when=0)[["when", "rating", "user", "item"]].to_csv("f.csv"), "--columns 3,4,2"),
    "bare": (lambda f: f.to_csv("f.csv", index=False, header=False), "--header no"),
    "header": (lambda f: f.to_csv("f.csv", index=False), "--header yes"),
    "semicolons": (lambda f: f.to_csv("f.csv", index=False, sep=";", decimal=","), "--separator ; --decimal ,"),
    "tabs": (lambda f: f.to_csv("f.csv", index=False, sep="\t"), "--separator tab"),
    "dashes": (lambda f: f.to_csv("f.csv", index=False, sep="-"), "--separator -"),
    "parquet": (lambda f: f.to_parquet("f.csv"), ""),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(place, case):
    write, argv = LAYOUTS[case]
    frame = ratings().assign(rating=lambda f: f.rating.abs())
    write(frame)
    run("complete", "f.csv", "--out", "out.csv", *shlex.split(argv))
    np.testing.assert_array_equal(tables.read_entries("out.csv")[2], fitted(frame).reconstruct().ravel())


def test_encoding(place):
    frame = ratings().replace("u1", "josé")
    frame.to_csv("f.csv", index=False, encoding="latin-1")
    run("complete", "f.csv", "--encoding", "latin-1", "--columns", "user,item", "--top", 1, "--out", "out.csv")
    out = pd.read_csv("out.csv")
    assert list(out.columns) == ["user", "item", "value"]
    assert "josé" in set(out.user)


def test_matrices(place):
    """Matrices are known by positions, go in as they are, and come out as they are asked for."""
    frame = ratings().assign(user=lambda f: f.user.str[1:].astype(int), item=lambda f: f["item"] - 5)
    matrix = sparse.coo_array((frame.rating, (frame.user, frame.item)), (40, 30))
    dense = np.full(matrix.shape, np.nan)
    dense[frame.user, frame.item] = frame.rating
    np.save("m.npy", dense)
    sparse.save_npz("m.npz", matrix.tocsr())
    scipy_io.mmwrite("m.mtx", matrix, precision=17)
    with gzip.open("m.mtx.gz", "wb") as file:
        file.write(Path("m.mtx").read_bytes())
    expected = fitted(frame.sort_values(["user", "item"])).reconstruct()
    for name in ("m.npy", "m.npz", "m.mtx", "m.mtx.gz"):
        run("complete", name, "--out", "out.npz")
        np.testing.assert_allclose(sparse.load_npz("out.npz").toarray(), expected, rtol=1e-9)
    run("complete", "m.npz", "--out", "out.mtx")
    np.testing.assert_allclose(scipy_io.mmread("out.mtx").toarray(), expected, rtol=1e-9)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".mtx"])
def test_rows_and_columns_of_a_matrix_that_hold_nothing(place, capsys, suffix):
    """They are there in the output, predicted by what is known without them; pairs beyond the matrix are none."""
    frame = ratings()
    rows, columns = frame.user.str[1:].astype(int) + 2, frame["item"] - 4
    matrix = sparse.coo_array((frame.rating, (rows, columns)), (45, 34))
    dense = np.full(matrix.shape, np.nan)
    dense[rows, columns] = frame.rating
    if suffix == ".npy":
        np.save("m.npy", dense)
    elif suffix == ".npz":
        sparse.save_npz("m.npz", matrix.tocsc())
    else:
        scipy_io.mmwrite("m.mtx", matrix, precision=17)
    expected = fastdmf.DMFCompleter(random_state=0).fit(matrix.tocsr())
    run("complete", f"m{suffix}", "--out", "out.npz", "--model", "model.npz")
    out = sparse.load_npz("out.npz")
    assert out.shape == (45, 34)
    np.testing.assert_allclose(out.toarray(), expected.reconstruct(), rtol=1e-9)
    run("complete", f"m{suffix}", "--cells", "missing", "--out", "missing.csv")
    rows, columns, values = tables.read_entries("missing.csv")
    assert len(rows) == 45 * 34 - len(frame) and np.isnan(dense[rows, columns]).all()
    np.testing.assert_allclose(values, expected.reconstruct()[rows, columns], rtol=1e-6)
    Path("asked.csv").write_text("44,33\n0,0\n")
    run("predict", "model.npz", "asked.csv", "--out", "p.csv")
    np.testing.assert_allclose(tables.read_entries("p.csv")[2], expected.reconstruct()[[44, 0], [33, 0]], rtol=1e-6)
    Path("asked.csv").write_text("45,0\n")
    code, err = refused(capsys, "predict", "model.npz", "asked.csv", "--out", "q.csv")
    assert (code, "row index 45 is out of range: the model has 45 rows" in err) == (1, True)


def test_only_the_model(place):
    run("complete", "ratings.csv", "--model", "model.npz", "--n-init", 2)
    assert sorted(path.name for path in place.iterdir()) == ["model.npz", "pairs.csv", "ratings.csv", "table.csv"]
    np.testing.assert_array_equal(fastdmf.load("model.npz").reconstruct(), fitted(n_init=2).reconstruct())


# --- predict ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(place):
    """Return the fitted model; it is in ``model.npz``."""
    made = fitted()
    fastdmf.save(made, "model.npz")
    return made


def test_predict(model):
    """The pairs come back in their order, those that come twice too."""
    pd.DataFrame({"x": 0, "item": [9, 5, 9], "user": ["u3", "u1", "u3"]}).to_csv("asked.csv", index=False)
    run("predict", "model.npz", "asked.csv", "--columns", "user,item", "--out", "p.csv", "--std", "--threads", 1)
    out = csv.read_csv("p.csv").to_pandas()
    assert list(out.columns) == ["user", "item", "value", "std"]
    assert out[["user", "item"]].values.tolist() == [["u3", 9], ["u1", 5], ["u3", 9]]
    values, std = model.predict(out[["user", "item"]], return_std=True)
    np.testing.assert_array_equal(out["value"], values)
    np.testing.assert_array_equal(out["std"], std)


def test_names_above_pairs_of_texts(place, capfd):
    """Of texts alone a first line that nobody knows is the columns' names, unless it is said to be a pair."""
    frame = ratings().assign(item=lambda f: "i" + f["item"].astype(str))
    frame.to_csv("texts.csv", index=False)
    pairs = frame[["user", "item"]].head(3)
    pairs.to_csv("asked.csv", index=False)
    run("complete", "texts.csv", "--pairs", "asked.csv", "--out", "one.csv", "--model", "texts.npz")
    run("predict", "texts.npz", "asked.csv", "--out", "two.csv")
    for name in ("one.csv", "two.csv"):
        out = csv.read_csv(name).to_pandas()
        assert out[["row", "column"]].to_numpy().tolist() == pairs.to_numpy().tolist()
    capfd.readouterr()
    assert cli.main(["predict", "texts.npz", "asked.csv", "--out", "all.csv", "--header", "no"]) == 0
    assert len(csv.read_csv("all.csv")) == 4 and "taken for names" not in capfd.readouterr().err
    assert cli.main(["predict", "texts.npz", "asked.csv", "--out", "two.csv"]) == 0
    assert "'user' and 'item' in the first line of asked.csv are taken for names" in capfd.readouterr().err
    pairs.to_csv("bare.csv", index=False, header=False)
    run("predict", "texts.npz", "bare.csv", "--out", "bare-out.csv")
    assert len(csv.read_csv("bare-out.csv")) == 3


def test_unknown_ids(model, capfd):
    """They are predicted by what is known, and stderr says so in one line; without ``--out`` all goes to stdout."""
    Path("asked.csv").write_text("u3,9\nnobody,9\nu3,77\nnobody,77\n")
    assert cli.main(["predict", "model.npz", "asked.csv"]) == 0
    out, err = capfd.readouterr()
    out = csv.read_csv(io.BytesIO(out.encode())).to_pandas()
    assert out.row.tolist() == ["u3", "nobody", "u3", "nobody"]
    biases = model.row_bias_[model.row_ids_ == "u3"][0], model.column_bias_[model.column_ids_ == 9][0]
    np.testing.assert_allclose(out["value"][1:], model.mean_ + np.array([biases[1], biases[0], 0]))
    lines = err.splitlines()
    assert lines[0].startswith("fastdmf: warning: 3 of 4 pairs have an unknown row or column; they get the mean")
    assert lines[1].startswith("fastdmf: 4 predictions to standard output in ")
    assert len(lines) == 2


def test_ids_in_another_type(place):
    """Texts of digits and integers are the same id, whatever else the one file holds and the other does not."""
    frame = ratings().assign(user=lambda f: f.user.str[1:].replace("7", "seven"))
    frame.to_csv("ratings.csv", index=False)
    run("complete", "ratings.csv", "--model", "model.npz")
    Path("digits.csv").write_text("3,9\n5,11\n")
    run("predict", "model.npz", "digits.csv", "--out", "p.csv")
    expected = fitted(frame).predict(pd.DataFrame({"user": ["3", "5"], "item": [9, 11]}))
    np.testing.assert_array_equal(tables.read_entries("p.csv")[2], expected)

    Path("mixed.csv").write_text("3,9\n5,first\n3,007\n")
    assert cli.main(["predict", "model.npz", "mixed.csv", "--out", "p.csv", "--quiet"]) == 0
    rows, columns, values = tables.read_entries("p.csv")
    assert columns.tolist() == ["9", "first", "007"]
    made = fitted(frame)
    biases = [made.row_bias_[made.row_ids_ == name][0] for name in ("5", "3")]
    np.testing.assert_allclose(values, [expected[0], *(made.mean_ + np.array(biases))])


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["none.npz", "pairs.csv"], 1, "cannot read 'none.npz': there is no such file"),
        (["pairs.csv", "pairs.csv"], 1, "is no model that fastdmf.save wrote"),
        (["imputer.npz", "pairs.csv"], 1, "imputer.npz is a DMFImputer, which predicts no pairs"),
        (
            ["descent.npz", "pairs.csv", "--std"],
            2,
            "--std needs a variational model, and descent.npz comes from descent",
        ),
        (["model.npz", "one.csv"], 1, "one.csv has 1 column"),
        (["model.npz", "pairs.csv", "--out", "nowhere/p.csv"], 1, "cannot write nowhere/p.csv"),
        (["model.npz", "pairs.csv", "--out", "p.npz"], 2, "must end in one of .csv, .tsv"),
        (["model.npz", "pairs.csv", "--out", "pairs.csv"], 2, "--out pairs.csv is the input pairs.csv"),
        (["model.npz", "link.csv", "--out", "pairs.csv"], 2, "--out pairs.csv is the input link.csv"),
        (["-", "-"], 2, "standard input can be read only once"),
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_predict_refuses(model, capsys, monkeypatch, argv, code, message):
    Path("one.csv").write_text("a\nb\n")
    os.symlink("pairs.csv", "link.csv")
    before = Path("pairs.csv").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    if argv[0] == "imputer.npz":
        fastdmf.save(fastdmf.DMFImputer(random_state=0).fit(truth()[:, :5]), "imputer.npz")
    if argv[0] == "descent.npz":
        fastdmf.save(fitted(solver="descent", max_iter=5), "descent.npz")
    got, err = refused(capsys, "predict", *argv, "--quiet")
    assert (got, message in err) == (code, True), err
    assert err.count("\n") == 1
    assert Path("pairs.csv").read_bytes() == before


# --- shards ----------------------------------------------------------------------------------------------------------


def from_shards(**settings):
    """Return the shards' solution, and the bounds of its predictions."""
    solution = fastdmf.vbmf(fastdmf.EntryShards("shards"), random_state=SEED, on_failure="ignore", **settings)
    values = ratings().rating
    return solution, (values.min(), values.max())


# What an estimator of random_state=0 tells its solver.
SEED = int(np.random.RandomState(0).randint(np.iinfo(np.int32).max))


def test_shards(place):
    """Several files make one folder, from which the same is written as the solver says, in the order of its ids."""
    frame = ratings()
    halves = frame.iloc[:200], frame.iloc[200:]
    halves[0].to_csv("a.csv", index=False, sep=";")
    halves[1].to_parquet("b.parquet")
    run("shard", "a.csv", "b.parquet", "--out", "shards", "--dtype", "float64", "--shard-entries", 100)
    shards = fastdmf.EntryShards("shards")
    assert shards.size == len(frame)
    assert shards.dtype == np.float64
    assert len(list(Path("shards").glob("rows-*.indices.npy"))) > 2
    solution, bounds = from_shards(width=5)
    run("complete", "shards", "--width", 5, "--out", "out.parquet", "--model", "model.npz")
    out = pd.read_parquet("out.parquet")
    assert out.row.tolist() == np.repeat(shards.row_ids, 30).tolist()
    assert out.column.tolist() == np.tile(shards.column_ids, 40).tolist()
    np.testing.assert_allclose(out["value"], np.clip(solution.matrix(), *bounds).ravel(), rtol=1e-12)

    # The saved model has the entries: it leaves them out, and learns on.
    again = fastdmf.load("model.npz")
    np.testing.assert_array_equal(again.reconstruct().ravel(), out["value"])
    run("complete", "shards", "--width", 5, "--top", 2, "--std", "--out", "best.csv")
    best = csv.read_csv("best.csv").to_pandas()
    columns, values = again.top_k(k=2)
    assert best.column.tolist() == columns.ravel().tolist()
    np.testing.assert_array_equal(best["value"], values.ravel())
    np.testing.assert_array_equal(best["std"], again.predict(best[["row", "column"]], return_std=True)[1])
    assert not set(zip(best.row, best.column)) & set(zip(frame.user, frame.item))
    new = pd.DataFrame({"user": ["new"] * 9, "item": range(5, 14), "rating": truth()[3, :9]})
    learned = again.partial_fit(new)
    assert learned.reconstruct().shape == (41, 30)
    assert np.isfinite(learned.reconstruct()).all()


def test_options_beside_shards(place):
    frame = ratings().assign(user=lambda f: f.user.str[1:].astype(int), item=lambda f: f["item"] - 5)
    frame[["item", "user", "rating"]].to_csv("f.csv", index=False)
    run("shard", "f.csv", "--columns", "user,item,rating", "--positions", "--out", "shards")
    run("complete", "shards", "--n-init", 2, "--no-biases", "--max-iter", 9, "--tol", 0.01, "--depth", 3, "--dtype",
        "float64", "--cells", "missing", "--model", "model.npz", "--out", "out.csv")  # fmt: skip
    rows, columns, values = tables.read_entries("out.csv")
    assert not set(zip(rows, columns)) & set(zip(frame.user, frame["item"]))
    assert len(rows) + len(frame) == 1200
    options = {"n_init": 2, "biases": False, "max_iter": 9, "tol": 0.01, "depth": 3, "dtype": np.float64}
    solution, bounds = from_shards(**options)
    np.testing.assert_allclose(values, np.clip(solution.matrix(), *bounds)[rows, columns], rtol=1e-6)
    np.testing.assert_allclose(fastdmf.load("model.npz").reconstruct()[rows, columns], values, rtol=1e-12)


def test_texts_and_integers_in_shards(place, capsys):
    """One text among them, and all ids of that side are texts as they stand; whichever file comes first."""
    Path("texts.csv").write_text("a,1,2\n007,2,3\n")
    Path("numbers.csv").write_text("7,1,4\n8,3,5\n")
    pd.DataFrame({"row": [9, 7], "column": [1, 2], "value": [1.0, 2.0]}).to_parquet("numbers.parquet")
    files = "texts.csv", "numbers.csv", "numbers.parquet"
    for order in permutations(files):
        assert cli.main(["shard", *order, "--out", "-".join(order)]) == 0
        err = capsys.readouterr().err
        assert ("row ids that are texts come behind integers: all are read as texts" in err) == (order[0] != files[0])
        shards = fastdmf.EntryShards("-".join(order))
        assert shards.size == 6 and sorted(shards.column_ids.tolist()) == [1, 2, 3]
        assert sorted(shards.row_ids.tolist()) == ["007", "7", "8", "9", "a"]
        entries = zip(*map(np.concatenate, zip(*shards.parts())))
        found = {(shards.row_ids[i], shards.column_ids[j]): v for i, j, v in entries}
        assert found["7", 1] == 4 and found["7", 2] == 2 and found["007", 2] == 3 and found["9", 1] == 1
    code, err = refused(capsys, "shard", "numbers.csv", "texts.csv", "--positions", "--out", "others", "--quiet")
    assert (code, "texts.csv has row ids that are texts behind others that are integers" in err) == (1, True)
    assert not Path("others").exists()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_files_larger_than_a_part_become_shards(place, capsys, monkeypatch, suffix):
    """Part by part, to the same shards as from one part; errors name the file and the line, or the ids."""
    frame = ratings()
    frame.to_parquet("f.parquet") if suffix == ".parquet" else frame.to_csv(f"f{suffix}", index=False)
    run("shard", f"f{suffix}", "--out", "one")
    sizes = []
    whole = fastdmf.EntryShards("one")
    monkeypatch.setattr(command_shards, "iter_entries", partial(tables.iter_entries, size=50))
    monkeypatch.setattr("fastdmf.tables._BATCH", 60)
    monkeypatch.setattr("fastdmf.column_text._BLOCK", 600)
    parts = command_shards.write_shards
    spied = lambda folder, given, **options: parts(folder, counted(given, sizes), **options)  # noqa: E731
    monkeypatch.setattr(command_shards, "write_shards", spied)
    assert cli.main(["shard", f"f{suffix}", "--out", "many"]) == 0
    assert len(sizes) > 4 and sum(sizes) == len(frame) and max(sizes) < 150
    many = fastdmf.EntryShards("many")
    assert sorted(many.row_ids.tolist()) == sorted(whole.row_ids.tolist())
    rows = [{(s.row_ids[i], s.column_ids[j], v) for part in s.parts() for i, j, v in zip(*part)} for s in (whole, many)]
    assert rows[0] == rows[1] and f"f{suffix}: {len(frame)} entries" in capsys.readouterr().err
    if suffix == ".csv":
        with open("f.csv", "a") as file:
            file.write(f"{frame.user[0]},{frame.item[0]},3\n")
        code, err = refused(capsys, "shard", "f.csv", "--out", "twice", "--quiet")
        assert (code, f"row {frame.user[0]}, column {frame.item[0]}: leave all but one out" in err) == (1, True)
        with open("f.csv", "a") as file:
            file.write("u,1,x\n")
        code, err = refused(capsys, "shard", "f.csv", "--out", "bad", "--quiet")
        assert (code, f"f.csv, line {len(frame) + 3}, column 'rating': 'x' is no number" in err) == (1, True)
        assert not Path("bad").exists() and not Path("twice").exists()


def counted(parts, sizes):
    for part in parts:
        sizes.append(len(part[0]))
        yield part


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["shard", "pairs.csv", "--out", "s"], 1, "pairs.csv holds pairs without values"),
        (["shard", "ratings.csv", "ratings.csv", "--out", "s"], 1, "leave all but one out, over all files"),
        (["shard", "minus.csv", "--positions", "--out", "s"], 1, "rows of minus.csv must not be negative, got -1"),
        (["shard", "ratings.csv", "--out", "."], 1, "folder '.' is in use"),
        (["shard", "ratings.csv"], 2, "--out FOLDER is needed"),
        (["shard", "ratings.csv", "--out", "ratings.csv"], 2, "--out ratings.csv is an input"),
        (["complete", "shards", "--solver", "descent", "--out", "o.csv"], 2, "only the variational solver"),
        (["complete", "shards", "--duplicates", "last", "--out", "o.csv"], 2, "shards hold every entry once"),
        (["complete", "shards", "--columns", "a,b,c", "--out", "o.csv"], 2, "leave --duplicates and --columns out"),
        (["complete", "shards", "--implicit-features", "--out", "o.csv"], 2, "needs the entries in memory"),
        (["complete", "folder", "--out", "o.csv"], 1, "holds no entry shards: 'fastdmf shard' makes them"),
    ],
)
def test_shards_refuse(place, capsys, argv, code, message):
    Path("minus.csv").write_text("-1,2,3\n4,5,6\n")
    Path("folder").mkdir()
    if argv[1] == "shards":
        run("shard", "ratings.csv", "--out", "shards")
    got, err = refused(capsys, *argv, "--quiet")
    assert (got, message in err) == (code, True), err
    assert err.count("\n") == 1


# --- impute ----------------------------------------------------------------------------------------------------------


def imputed(values, **settings):
    """Return what the library fills in, and its standard deviations."""
    model = fastdmf.DMFImputer(**({"random_state": 0} | settings)).fit(values)
    return model.transform(values), model.uncertainty(values)


@pytest.mark.parametrize("name", ["out.csv", "out.tsv.gz", "out.parquet"])
def test_impute(place, name):
    """Names of columns and rows are kept, and what was known has its bits."""
    run("impute", "table.csv", "--out", name, "--std-out", f"std-{name}")
    table = pd.read_csv("table.csv")
    values = tables.read_table("table.csv").values
    for path, expected in zip((name, f"std-{name}"), imputed(values)):
        out = tables.read_table(path)
        np.testing.assert_array_equal(out.values, expected)
        assert out.columns == list(table.columns[1:])
        assert out.rows.tolist() == table.station.tolist()
    read = pd.read_parquet(name) if name.endswith("parquet") else pd.read_csv(name, sep=None, engine="python")
    assert list(read.columns) == list(table.columns)


IMPUTER_OPTIONS = {
    "solver": ("--solver descent --width 6,5 --max-iter 40", {"solver": "descent", "width": (6, 5), "max_iter": 40}),
    "depth": ("--depth 3 --solver variational", {"depth": 3, "solver": "variational"}),
    "gaussian": ("--solver gaussian --validation 0.3", {"solver": "gaussian", "validation_fraction": 0.3}),
    "bounds": ("--min-value 1 --max-value 4", {"min_value": 1, "max_value": 4}),
    "standardize": ("--standardize yes --seed 4", {"standardize": True, "random_state": 4}),
    "as it is": ("--standardize no --threads 1", {"standardize": False, "n_threads": 1}),
}


@pytest.mark.parametrize("case", IMPUTER_OPTIONS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_options_of_the_imputer(place, case):
    argv, settings = IMPUTER_OPTIONS[case]
    run("impute", "table.csv", "--out", "out.csv", *argv.split())
    values = tables.read_table("table.csv").values
    expected = imputed(values, **settings)[0]
    np.testing.assert_array_equal(tables.read_table("out.csv").values, expected)
    assert not np.array_equal(expected, imputed(values)[0])


def test_tables_of_other_kinds(place):
    """A matrix without names; a marker of holes; ids of rows that are numbers; pandas' index."""
    values = truth().round(3)
    values[np.random.default_rng(1).random(values.shape) < 0.2] = np.nan
    expected = imputed(values)[0]
    np.save("t.npy", values)
    run("impute", "t.npy", "--out", "out.npy")
    np.testing.assert_array_equal(np.load("out.npy"), expected)
    run("impute", "t.npy", "--out", "out.csv")
    assert tables.read_table("out.csv").columns is None

    frame = pd.DataFrame(values, columns=[f"h{k}" for k in range(30)])
    frame.insert(3, "id", range(100, 140))
    frame.fillna(-999).to_csv("t.csv", index=False)
    run("impute", "t.csv", "--rows", "id", "--missing=-999,-998", "--out", "out.parquet")
    out = pd.read_parquet("out.parquet")
    assert list(out.columns) == ["id", *(f"h{k}" for k in range(30))]
    assert out["id"].tolist() == list(range(100, 140))
    np.testing.assert_array_equal(out.drop(columns="id"), expected)
    run("impute", "t.csv", "--rows", "3", "--missing=-999", "--out", "out.csv")
    np.testing.assert_array_equal(tables.read_table("out.csv", rows="id").values, expected)
    run("impute", "t.csv", "--rows", "none", "--missing=-999", "--out", "out.csv")
    assert tables.read_table("out.csv").columns == list(frame.columns)

    frame.set_index(frame.pop("id").rename(None) ** 2).to_parquet("t.parquet")
    run("impute", "t.parquet", "--out", "out.csv")
    assert Path("out.csv").read_text().startswith('"","h0"')
    np.testing.assert_array_equal(tables.read_table("out.csv").values, expected)


def test_layouts_of_tables(place):
    frame = pd.read_csv("table.csv").assign(station=lambda f: "ä" + f.station)
    frame.to_csv("t.csv", index=False, sep="|", decimal=",", encoding="latin-1", header=False)
    argv = "--separator | --decimal , --encoding latin-1 --header no"
    run("impute", "t.csv", "--out", "out.csv", *argv.split())
    out = tables.read_table("out.csv", header=False)
    np.testing.assert_array_equal(out.values, imputed(tables.read_table("table.csv").values)[0])
    assert out.rows.tolist() == frame.station.tolist()
    assert out.columns is None


def test_empty_columns(place, capsys):
    """They are filled, and a warning names them; or they go, and their names with them."""
    frame = pd.read_csv("table.csv").assign(h3=np.nan)
    frame.to_csv("t.csv", index=False)
    assert cli.main(["impute", "t.csv", "--out", "out.csv", "--quiet"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("fastdmf: warning: columns without any observed entry are filled with the mean of all")
    assert err.count("\n") == 1
    values = tables.read_table("t.csv").values
    with pytest.warns(UserWarning, match="without any observed entry"):
        filled, dropped = imputed(values)[0], imputed(values, keep_empty_features=False)[0]
    np.testing.assert_array_equal(tables.read_table("out.csv").values, filled)
    run("impute", "t.csv", "--no-keep-empty", "--out", "out.csv", "--std-out", "std.csv")
    for name in ("out.csv", "std.csv"):
        out = tables.read_table(name)
        assert out.columns == [f"h{k}" for k in range(30) if k != 3]
    np.testing.assert_array_equal(tables.read_table("out.csv").values, dropped)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["none.csv", "--out", "o.csv"], 1, "cannot read 'none.csv': there is no such file"),
        (["empty.csv", "--out", "o.csv"], 1, "empty.csv is empty"),
        (["text.csv", "--out", "o.csv"], 1, "text.csv, line 2, column 'b': 'x' is no number ('1,x')"),
        (["text.csv", "--out", "o.csv"], 1, "name it by --rows if it holds the ids of the rows"),
        (["text.parquet", "--rows", "none", "--out", "o.csv"], 1, "string, no numbers: encode it as numbers"),
        (["same.csv", "--out", "o.csv"], 1, "same.csv has several columns 'a'"),
        (["holes.csv", "--out", "o.csv"], 1, "holes.csv holds no number: all its 4 cells are holes"),
        ([".", "--out", "o.csv"], 1, "cannot read '.': it is a folder, name a file in it"),
        (["table.csv", "--out", "o.npy"], 2, "an .npy file keeps no names"),
        (["table.csv", "--out", "o.mtx"], 2, "--out o.mtx: the name must end in one of"),
        (["table.csv"], 2, "--out FILE is needed"),
        (["table.csv", "--out", "o.csv", "--std-out", "o.csv"], 2, "--std-out o.csv is what --out writes"),
        (["table.csv", "--out", "-", "--std-out", "-"], 2, "--std-out and --out cannot both be standard output"),
        (["table.csv", "--out", "table.csv"], 2, "is the input table.csv"),
        (["table.csv", "--out", "o.csv", "--rows", "city"], 1, "table.csv has no column 'city'"),
        (["table.csv", "--out", "o.csv", "--width", "3,3", "--solver", "gaussian"], 2, "needs --solver descent"),
        (["table.csv", "--out", "o.csv", "--min-value", "3", "--max-value", "2"], 1, "--min-value must be below"),
    ],
)
def test_impute_refuses(place, capsys, argv, code, message):
    Path("empty.csv").write_text("")
    Path("text.csv").write_text("a,b\n1,x\n2,\n")
    pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}).to_parquet("text.parquet")
    Path("same.csv").write_text("a,a\n1,2\n2,\n")
    Path("holes.csv").write_text("a,b\n,\n,\n")
    got, err = refused(capsys, "impute", *argv, "--quiet")
    assert (got, message in err) == (code, True), err
    assert err.count("\n") == 1
    assert not Path("o.csv").exists()


# --- files that are wrong --------------------------------------------------------------------------------------------

BAD = {
    "empty.csv": (b"", "empty.csv is empty"),
    "names.csv": (b"user,item,rating\n", "holds names and no entries"),
    "nan.csv": (b"u,i,r\na,b,1\nc,d,nan\n", "nan.csv, line 3, column 'r': nan is no finite number"),
    "inf.csv": (b"a,b,1\nc,d,-inf\n", "inf.csv, line 2, column 2 (from 0): -inf is no finite number"),
    "words.csv": (b"u,i,r\na,b,good\n", "words.csv, line 2, column 'r': 'good' is no number"),
    "one.csv": (b"a\nb\n", "one.csv has 1 column: row, column and value are needed; pass --separator"),
    "pairs.csv": (b"a,b\nc,d\n", "pairs.csv holds pairs without values"),
    "ragged.csv": (b"u,i,r\na,b,1\nc,d\n", "ragged.csv, line 3: 2 columns, line 1 has 3 ('c,d')"),
    "id.csv": (b"u,i,r\na,b,1\n,d,2\n", "id.csv, line 3, column 'u': the row id is missing"),
    "latin.csv": (b"u,i,r\nJos\xe9,b,1\n", "line 2: byte 0xe9 is not UTF-8: pass --encoding latin-1"),
    "utf16.csv": ("a,b,1\n".encode("utf-16"), "is UTF-16: pass --encoding utf-16"),
    "comma.csv": (b"u;i;r\na;b;1,5\n", "line 2, column 'r': '1,5' is no number ('a;b;1,5'): pass --decimal ,"),
    "colons.dat": (b"1::2::3::9\n1::3::4::9\n", "is separated by '::': pass --separator : --columns 0,2,4"),
    "bytes.csv": (bytes(range(256)), "is neither text nor a format that is known"),
    "cut.csv.gz": (gzip.compress(b"a,b,1\n" * 99)[:30], "is damaged or cut off"),
    "cut.parquet": (b"PAR1" + bytes(40), "is damaged, or no parquet file"),
    "sheet.xlsx": (b"PK\x03\x04" + bytes(40), "cannot be read as a matrix"),
    "index.mtx": (b"%%MatrixMarket matrix coordinate real general\n2 2 1\n5 5 1.0\n", "cannot be read as a matrix"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, monkeypatch, capsys, name):
    """One line names the file, the line and what to do, code 1; nothing is written."""
    monkeypatch.chdir(tmp_path)
    content, message = BAD[name]
    Path(name).write_bytes(content)
    for command in (["complete"], ["shard"]):
        code, err = refused(capsys, *command, name, "--out", "out.csv")
        assert (code, message in err) == (1, True), err
        assert err.startswith("fastdmf: error: ")
        assert err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_negative_ids(place):
    """They are ids like others."""
    frame = ratings().assign(user=lambda f: -f.user.str[1:].astype(int))
    frame.to_csv("f.csv", index=False)
    run("complete", "f.csv", "--out", "out.csv")
    rows, _, values = tables.read_entries("out.csv")
    assert rows.tolist() == np.repeat(np.arange(-39, 1), 30).tolist()
    np.testing.assert_array_equal(values, fitted(frame).reconstruct().ravel())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("command", ["complete ratings.csv", "impute table.csv", "predict model.npz pairs.csv"])
def test_unreadable(place, capsys, command):
    for path in place.iterdir():
        path.chmod(0)
    code, err = refused(capsys, *command.split(), "--out", "out.csv")
    assert (code, err.count("\n")) == (1, 1)
    assert "Permission denied, check the name and its permissions" in err or "no such file" in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["none.csv", "--out", "o.csv"], 1, "cannot read 'none.csv': there is no such file"),
        (["ratings.csv", "--out", "nowhere/o.csv"], 1, "cannot write nowhere/o.csv: No such file or directory"),
        (["ratings.csv", "--out", "o.xlsx"], 2, "the name must end in one of .csv"),
        (["ratings.csv", "--out", "folder.csv"], 1, "cannot write folder.csv: Is a directory"),
        (["ratings.csv", "--out", "o.csv", "--model", "model"], 2, "--model model: the name must end in one of .npz"),
        (["ratings.csv", "--out", "o.csv", "--model", "-"], 2, "--model -: the name must end in one of .npz"),
        (["ratings.csv", "--out", "o.npz", "--model", "o.npz"], 2, "--model o.npz is what --out writes"),
        (["ratings.csv"], 2, "--out FILE or --model FILE is needed"),
        (["ratings.csv", "--out", "o.npz"], 2, "a matrix has positions from 0, and ratings.csv has ids like 'u0'"),
        (["minus.csv", "--out", "o.mtx"], 2, "a matrix has positions from 0, and minus.csv has ids like '-1'"),
        (["ratings.csv", "--out", "o.npz", "--std"], 2, "the name must end in one of .csv, .tsv"),
        (["ratings.csv", "--out", "o.csv", "--columns", "user,items"], 1, "ratings.csv has no column 'items'"),
        (
            ["ratings.csv", "--out", "o.csv", "--columns", "user,item,std", "--std"],
            2,
            "name the columns by their places",
        ),
        (
            ["ratings.csv", "--out", "o.csv", "--max-cells", "99"],
            2,
            "1200 cells would be written, more than --max-cells",
        ),
        (["ratings.csv", "--out", "o.csv", "--top", "3", "--max-cells", "99"], 2, "120 cells would be written"),
        (["ratings.csv", "--out", "o.csv", "--top", "3", "--pairs", "pairs.csv"], 2, "give one"),
        (["ratings.csv", "--out", "o.csv", "--cells", "all", "--pairs", "pairs.csv"], 2, "leave it out with --pairs"),
        (["ratings.csv", "--model", "m.npz", "--top", "3"], 2, "say what --out FILE is to hold"),
        (["ratings.csv", "--out", "o.csv", "--std", "--solver", "descent"], 2, "--std needs the variational solver"),
        (["ratings.csv", "--out", "o.csv", "--width", "3,4"], 2, "--width N,N,... needs --solver descent"),
        (["ratings.csv", "--out", "o.csv", "--depth", "1"], 1, "--depth must be an integer >= 2, got 1"),
        (["ratings.csv", "--out", "o.csv", "--encoding", "klingon"], 1, "got 'klingon'"),
        (["ratings.csv", "--out", "o.csv", "--resume"], 2, "--resume needs the folder to go on from"),
        (["ratings.csv", "--out", "o.csv", "--checkpoint", "pairs.csv"], 2, "--checkpoint pairs.csv is a file"),
        (["ratings.csv", "--out", "ratings.csv"], 2, "--out ratings.csv is the input ratings.csv"),
        (["ratings.csv", "--out", "pairs.csv", "--pairs", "pairs.csv"], 2, "is the input pairs.csv"),
    ],
)
def test_complete_refuses(place, capsys, argv, code, message):
    """All of it before the fit."""
    Path("folder.csv").mkdir()
    Path("minus.csv").write_text("-1,2,3\n4,5,6\n")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in place.iterdir())
    got, err = refused(capsys, "complete", *argv, "--quiet")
    assert (got, message in err) == (code, True), err
    assert err.count("\n") == 1
    assert sorted((path.name, path.stat().st_mtime_ns) for path in place.iterdir()) == before


def test_values_of_options(capsys):
    """The option is named, and what it takes."""
    for argv, message in {
        "--depth 0": "argument --depth: an integer from 1 is needed, got '0'",
        "--width 3,x": "argument --width: an integer from 1 is needed, got 'x'",
        "--min-value low": "argument --min-value: a number, or 'free' is needed, got 'low'",
        "--tol 0": "argument --tol: a number above 0 is needed",
        "--validation 1": "argument --validation: a number from 0 to below 1 is needed",
        "--columns user": "two or three names or places from 0 are needed, as in 0,1,3, got 'user'",
        "--separator ::": "of lines like 1::2::3 the separator : makes columns 0, 2 and 4",
        "--checkpoint-every -1": "a number of seconds is needed",
        "--header maybe": "argument --header: invalid choice: 'maybe'",
        "--dept 3": "unrecognized arguments: --dept 3 (did you mean --depth?)",
    }.items():
        code, err = refused(capsys, "complete", "r.csv", "--out", "o.csv", *argv.split())
        assert (code, message in err) == (2, True), err
        assert err.startswith("usage: fastdmf complete ENTRIES (--out FILE | --model FILE) [options]\n")


# --- streams ---------------------------------------------------------------------------------------------------------


def test_streams(place, monkeypatch, capfdbinary):
    """Standard input may be anything that a file may be; standard output is CSV, or what ``--format`` says."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(Path("ratings.csv").read_bytes()))))
    run("complete", "-", "--out", "-")
    out, err = capfdbinary.readouterr()
    assert err == b""
    run("complete", "ratings.csv", "--out", "out.csv")
    assert out == Path("out.csv").read_bytes()
    for kind, read in (("tsv", lambda file: csv.read_csv(file, parse_options=TABS)), ("parquet", pd.read_parquet)):
        run("complete", "ratings.csv", "--out", "-", "--format", kind)
        out = read(io.BytesIO(capfdbinary.readouterr().out))
        np.testing.assert_array_equal(out["value"], fitted().reconstruct().ravel())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("table.csv").read_bytes())))
    run("impute", "-", "--out", "-")
    expected = imputed(tables.read_table("table.csv").values)[0]
    Path("out.csv").write_bytes(capfdbinary.readouterr().out)
    np.testing.assert_array_equal(tables.read_table("out.csv").values, expected)
    assert list(place.glob("*.new")) == []


TABS = csv.ParseOptions(delimiter="\t")


def test_errors_call_standard_input_by_its_name(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"u,i,r\na,b,x\n")))
    code, err = refused(capsys, "complete", "-", "--out", "out.csv")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("fastdmf: error: standard input, line 2, column 'r': 'x' is no number")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_named_pipes(place):
    """A pipe, as of <(...) in a shell, is read as standard input is."""
    os.mkfifo("pipe")
    data = Path("ratings.csv").read_bytes()
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(data))
    writer.start()
    run("complete", "pipe", "--out", "out.csv")
    writer.join()
    np.testing.assert_array_equal(tables.read_entries("out.csv")[2], fitted().reconstruct().ravel())


def test_nobody_reads_on(place):
    """A pipe that is closed ends the command without a word, as it does other tools."""
    code = "import sys; from fastdmf import cli; sys.exit(cli.main())"
    command = [sys.executable, "-c", code, "complete", "ratings.csv", "--out", "-", "--quiet"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, env=env, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_notes(place, capsys):
    """What was read, found and written is said on stderr, in lines of its own; ``--quiet`` says none of it."""
    argv = ["complete", "ratings.csv", "--out", "out.csv", "--model", "model.npz"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("fastdmf: ") for line in lines)
    values = ratings().rating
    entries = f"{len(values)} entries ({values.min():.6g} to {values.max():.6g}), 40 rows, 30 columns"
    assert re.fullmatch(rf"fastdmf: {re.escape(entries)}, read in \d+\.\d s", lines[0])
    assert any(re.search(r"variational fit in \d+\.\d s: \d+ sweeps, rank 2, standard deviation of", x) for x in lines)
    assert re.fullmatch(r"fastdmf: 1200 predictions to out\.csv in \d+\.\d s", lines[-1])
    run(*argv)
    assert capsys.readouterr() == ("", "")


def test_progress(place, capsys, monkeypatch):
    """A fit that takes longer says how far it is."""
    from fastdmf import command_fit, progress

    monkeypatch.setattr(command_fit, "_EVERY", 0.0)
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    assert cli.main(["complete", "ratings.csv", "--out", "out.csv"]) == 0
    more = capsys.readouterr().err.count("\n")
    assert cli.main(["impute", "table.csv", "--out", "out.csv"]) == 0
    assert more > 5
    assert capsys.readouterr().err.count("\n") > 5


def test_a_table_among_entries(place, capsys):
    """It can be read as entries, which nobody means: a warning says what does."""
    pd.read_csv("table.csv").fillna(0).to_csv("table.csv", index=False)
    assert cli.main(["complete", "table.csv", "--model", "model.npz", "--quiet"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("fastdmf: warning: table.csv has 31 columns, of which the first three are row, column and")
    assert "'fastdmf impute' fills a table" in err
    run("complete", "table.csv", "--columns", "0,1,2", "--model", "model.npz")
    assert "columns" not in capsys.readouterr().err


def test_warnings_are_lines(place, capsys):
    """A fit that is cut short says so in one line."""
    assert cli.main(["complete", "ratings.csv", "--max-iter", "3", "--out", "out.csv", "--quiet"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("fastdmf: warning: MAX_ITER: --max-iter was reached before tol")
    assert err.count("\n") == 1
    assert ".py" not in err


# --- interrupts and checkpoints --------------------------------------------------------------------------------------


@pytest.fixture
def press(monkeypatch):
    """Let Ctrl-C come in the k-th sweep of a fit."""

    def after(k):
        step, done = alternating.Sweeps.step, []

        def pressed(sweeps):
            done.append(sweeps)
            if len(done) == k:
                signal.raise_signal(signal.SIGINT)
            step(sweeps)

        monkeypatch.setattr(alternating.Sweeps, "step", pressed)
        return lambda: monkeypatch.setattr(alternating.Sweeps, "step", step)

    return after


@pytest.mark.parametrize("command", ["complete ratings.csv --solver variational", "impute table.csv --depth 2"])
def test_interrupted_fit(place, capsys, press, command):
    """What was found so far is written, stderr says so, and the code is 130."""
    press(4)
    assert cli.main([*command.split(), "--out", "out.csv"]) == 130
    err = capsys.readouterr().err
    assert "fastdmf: interrupted: what is written comes from the fit so far" in err
    assert "Traceback" not in err
    assert np.isfinite(tables.read_table("out.csv", rows=0).values[:, -1]).all()


def test_checkpoint(place, capsys, press):
    """After Ctrl-C the fit goes on from its state, to the same bits; the state is gone once they are written."""
    argv = ["complete", "ratings.csv", "--checkpoint", "states/here", "--checkpoint-every", "0"]
    release = press(4)
    assert cli.main([*argv, "--out", "part.csv"]) == 130
    release()
    assert list(Path("states/here").iterdir())
    capsys.readouterr()
    code, err = refused(capsys, *argv, "--out", "out.csv", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "--checkpoint states/here holds the state of another fit: go on from it by --resume, or take another" in err

    seen = []
    step = alternating.Sweeps.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alternating.Sweeps, "step", lambda sweeps: (seen.append(1), step(sweeps))[1])
        run(*argv, "--resume", "--out", "out.csv")
        resumed = len(seen)
        run("complete", "ratings.csv", "--out", "whole.csv")
    assert 0 < resumed < len(seen) - resumed
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes() != Path("part.csv").read_bytes()
    assert not Path("states/here").exists()

    assert cli.main([*argv, "--resume", "--out", "out.csv"]) == 0
    assert "there is no state in states/here yet: the fit starts at its beginning" in capsys.readouterr().err
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_checkpoint_of_other_data(place, capsys, press):
    """It is refused, not overwritten."""
    release = press(4)
    argv = ["--checkpoint", "states", "--quiet"]
    assert cli.main(["complete", "ratings.csv", "--out", "out.csv", *argv]) == 130
    release()
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in Path("states").iterdir()}
    ratings(1).to_csv("others.csv", index=False)
    code, err = refused(capsys, "complete", "others.csv", "--out", "out.csv", "--resume", *argv)
    assert (code, err.count("\n")) == (1, 1)
    assert "belongs to a run with other data, settings or seed" in err
    assert {path.name: path.read_bytes() for path in Path("states").iterdir()} == before


def test_checkpoints_of_tables_and_shards(place, press, capsys):
    """``impute``, and ``complete`` from shards, go on as well."""
    run("shard", "ratings.csv", "--out", "shards")
    for command in (["impute", "table.csv", "--depth", "2"], ["complete", "shards"]):
        argv = [*command, "--checkpoint", "states", "--quiet"]
        release = press(4)
        assert cli.main([*argv, "--out", "part.csv"]) == 130
        release()
        assert list(Path("states").iterdir())
        run(*argv, "--resume", "--out", "out.csv")
        run(*command, "--out", "whole.csv")
        assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
        assert not Path("states").exists()


# --- what is installed -----------------------------------------------------------------------------------------------


def test_without_pandas(place, monkeypatch):
    """Neither pandas nor polars is needed."""
    for name in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, name, None)
    run("complete", "ratings.csv", "--top", 1, "--out", "out.parquet", "--model", "model.npz")
    run("predict", "model.npz", "pairs.csv", "--out", "out.csv")
    run("impute", "table.csv", "--out", "out.csv")


@pytest.mark.parametrize("command", ["complete ratings.csv", "impute table.csv", "shard ratings.csv"])
def test_without_pyarrow(place, monkeypatch, capsys, command):
    """The message is the command that helps."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, err = refused(capsys, *command.split(), "--out", "out.csv")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith('fastdmf: error: text and parquet files need pyarrow: pip install "fastdmf[io]"')


# --- the README ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=[str(k) for k in range(len(BLOCKS))])
def test_readme(place, block, capfdbinary):
    """Every command of a console block runs, in the order of the block, on files called as they are there."""
    ratings().to_csv("part-2.csv", index=False)
    (frame := ratings()).assign(user="v" + frame.user).to_csv("part-1.csv", index=False)
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ fastdmf ")]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        parts = (sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words)
        assert cli.main([*chain.from_iterable(parts)]) == 0, command
