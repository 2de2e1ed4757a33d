"""The papers' experiments: their harness, and the quick forms that take a second."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("t6", "t19", "t20", "t21", "t23", "t24")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """``bench`` is a folder of scripts, found from the repository's root only."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield
    for name in [name for name in sys.modules if name == "bench" or name.startswith("bench.")]:
        del sys.modules[name]


def papers():
    return importlib.import_module("bench.papers.__main__")


def harness():
    return importlib.import_module("bench.papers.harness")


def test_rows_are_judged_by_their_median():
    row = harness().Row("error", [1.0, 9.0, 2.0], 1.5, 3.0, "a figure")
    assert row.median == 2.0 and row.within and row.value == "2 [1, 9]" and row.target == "1.5 .. 3"
    assert not harness().Row("error", [np.nan], 0, 1, "").within
    assert not harness().Row("error", 1.01, 0, 1, "").within and harness().Row("error", 1.0, 0, 1, "").within
    assert harness().Row("error", 5, 1, np.inf, "").target == ">= 1"
    experiment = harness().Experiment()
    experiment.near("count", 104, 100, 0.05, "")
    experiment.near("count", 106, 100, 0.05, "")
    assert [row.within for row in experiment.rows] == [True, False]


def test_every_script_says_what_it_is():
    scripts = papers().scripts()
    expected = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24]
    assert list(scripts) == [f"t{number}" for number in expected]
    for module in scripts.values():
        script = importlib.import_module(module)
        assert script.TITLE and script.__doc__ and callable(script.run)


@pytest.mark.parametrize("name", QUICK)
def test_quick_form_is_within_its_bands(name, tmp_path):
    lines = papers().run(name, papers().scripts()[name], True, tmp_path)
    assert lines and [line["quantity"] for line in lines if not line["within"]] == []
    for picture in tmp_path.iterdir():
        assert picture.stat().st_size > 5000


def test_lines_of_an_experiment_are_replaced_and_sorted(tmp_path):
    path = tmp_path / "kept.jsonl"
    line = {
        "experiment": "T20",
        "title": "t",
        "seconds": 1.0,
        "quantity": "steps",
        "target": "1",
        "origin": "o",
        "value": "1",
        "within": True,
    }
    papers().keep(path, "t20", [line])
    papers().keep(path, "t3", [{**line, "experiment": "T3"}])
    papers().keep(path, "t20", [{**line, "within": False}])
    kept = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(one["experiment"], one["within"]) for one in kept] == [("T3", True), ("T20", False)]
    assert "| T20 | steps | 1 | o | 1 | NO |" in harness().markdown(kept)
    assert harness().summary(kept).splitlines()[2:] == ["| T3 | t | 1 of 1 | 1 |", "| T20 | t | 0 of 1 | 1 |"]


def test_bad_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["papers", "t99"])
    with pytest.raises(SystemExit):
        papers().main()
    assert "unknown: t99" in capsys.readouterr().err


def test_bands_come_from_plain_runs():
    bands = json.loads((ROOT / "bench" / "papers" / "bands.json").read_text())
    for entry in bands["bands"].values():
        for quantity in entry["quantities"].values():
            assert quantity["low"] <= np.median(quantity["values"]) <= quantity["high"]
