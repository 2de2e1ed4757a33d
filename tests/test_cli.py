"""The ``fastdmf`` command: usage, exit codes, and the demonstration on a corner of its grid."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from sklearn.impute import SimpleImputer

from fastdmf import __version__, cli

demo = pytest.importorskip("fastdmf.demo", reason="the demonstration needs matplotlib", exc_type=ImportError)
ROOT = Path(__file__).resolve().parent.parent


def usage(capsys, *argv):
    """Return what a wrong command line prints; it must end with code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def corner(monkeypatch):
    """Run the demonstration on 40 x 50 cells of the grid."""
    grid = demo.load_elevation()[100:140, 100:150]
    monkeypatch.setattr(demo, "load_elevation", lambda: grid)
    return grid


def test_no_command(capsys):
    """Without a command the help goes to stderr, code 2."""
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "demo" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paint"], "invalid choice: 'paint'"),
        (["demo", "--hide", "0"], "0.01 to 0.99"),
        (["demo", "--hide", "1"], "0.01 to 0.99"),
        (["demo", "--hide", "nan"], "0.01 to 0.99"),
        (["demo", "--hide", "half"], "0.01 to 0.99"),
        (["demo", "--seed", "-1"], "integer from 0"),
        (["demo", "--seed", "1.5"], "integer from 0"),
        (["demo", "--out", "picture.jpg"], "should end in .png"),
        (["demo", "extra"], "unrecognized arguments"),
    ],
)
def test_wrong_usage(capsys, argv, message):
    """Wrong usage names the fault and ends with code 2."""
    assert message in usage(capsys, *argv)


def test_version_and_help(capsys):
    """Both answer on stdout with code 0."""
    for argv, text in ([["--version"], __version__], [["--help"], "demo"], [["demo", "--help"], "--hide F"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_help_is_light():
    """The parser alone loads no numerical package."""
    code = "import sys; from fastdmf.cli import _parser; _parser(); print('numpy' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "False\n"


def test_info(capsys):
    """Versions, threads, threading layer and devices are there."""
    assert cli.main(["info"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["fastdmf"].strip() == __version__
    assert rows["numpy"].strip() == np.__version__
    assert re.search(r"^\s*\d+ of \d+ usable cores, layer (omp|tbb|workqueue)$", rows["kernel threads"])
    assert {"device cpu", "device cuda", "BLAS", "scikit-learn"} <= set(rows)


@pytest.mark.parametrize("place", ["missing/picture.png", "folder.png"])
def test_unwritable_picture_is_said_first(capsys, tmp_path, monkeypatch, place):
    """A picture that cannot be written is reported before any work, in one line, code 1."""
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: pytest.fail("the work was done"))
    assert cli.main(["demo", "--out", str(tmp_path / place)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "cannot write the picture" in captured.err
    assert "--out" in captured.err


def test_check_leaves_no_trace(tmp_path, monkeypatch):
    """The check creates no file and changes none that is there."""
    old = tmp_path / "old.png"
    old.write_bytes(b"picture")
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: None)
    for name in ("old.png", "new.png"):
        assert cli.main(["demo", "--out", str(tmp_path / name)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert old.read_bytes() == b"picture"


def test_without_matplotlib(capsys, monkeypatch):
    """The message is the command that helps."""
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert cli.main(["demo"]) == 1
    assert 'pip install "fastdmf[plot]"' in capsys.readouterr().err


def test_failure_and_debug(capsys, monkeypatch, tmp_path):
    """A failure is one line and code 1; ``--debug`` lets it through; either way the progress handler is gone."""

    def fail(*args, **kwargs):
        raise RuntimeError("the grid is upside down")

    handlers = list(logging.getLogger("fastdmf").handlers)
    monkeypatch.setattr(demo, "run", fail)
    argv = ["demo", "--out", str(tmp_path / "a.png")]
    assert cli.main(argv) == 1
    assert capsys.readouterr().err == "fastdmf: error: the grid is upside down (--debug shows the traceback)\n"
    with pytest.raises(RuntimeError, match="upside down"):
        cli.main([*argv, "--debug"])
    assert logging.getLogger("fastdmf").handlers == handlers


def test_demo(corner, capsys, tmp_path):
    """The demonstration names its choices, ranks by the error, shows progress and writes a PNG."""
    out = tmp_path / "panel.png"
    assert cli.main(["demo", "--out", str(out), "--seed", "3", "--hide", "0.4"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    text = " ".join(captured.out.split())
    names = ["DMFImputer", "SimpleImputer", "KNNImputer", "IterativeImputer"]
    for name in names:
        assert f"method {name}(" in text
        assert f"{name} ..." in captured.err
    assert "probability 0.4, seed 3" in text
    rows = [line.split() for line in captured.out.splitlines() if line.split()[0:1] and line.split()[0] in names]
    assert sorted(row[0] for row in rows) == sorted(names)
    errors = [float(row[1]) for row in rows]
    assert errors == sorted(errors)
    assert "iteration" in captured.err

    # The line of mean filling, recomputed.
    holes = np.random.default_rng(3).random(corner.shape) < 0.4
    filled = SimpleImputer().fit_transform(np.where(holes, np.nan, corner))
    rmse = np.sqrt(np.mean((filled - corner)[holes] ** 2))
    mean = next(row for row in rows if row[0] == "SimpleImputer")
    assert float(mean[1]) == pytest.approx(rmse, abs=0.0051)
    assert float(mean[2]) == pytest.approx(rmse / corner[holes].std(), abs=0.000051)


def test_elevation_grid():
    """The data are what the text says, and the holes repeat with the seed."""
    grid = demo.load_elevation()
    assert grid.shape == (344, 403)
    assert (grid.min(), grid.max()) == (236, 1076)
    observed = demo.hide_cells(grid, 0.5, 0)
    np.testing.assert_array_equal(observed, demo.hide_cells(grid, 0.5, 0))
    holes = np.isnan(observed)
    assert abs(holes.mean() - 0.5) < 5 * 0.5 / np.sqrt(grid.size)
    np.testing.assert_array_equal(observed[~holes], grid[~holes])
    with pytest.raises(ValueError, match="nothing to"):
        demo.hide_cells(grid[:2, :2], 1e-9, 0)


def test_panel_shares_one_scale(corner):
    """Truth, observed and filled have the same colours for the same heights; the error has zero in the middle."""
    observed = demo.hide_cells(corner, 0.5, 0)
    filled = np.where(np.isnan(observed), corner.mean(), observed)
    figure = demo.draw(corner, observed, filled, "title")
    images = [axis.images[0] for axis in figure.axes if axis.images and axis.get_title()]
    assert [axis.get_title().split()[0] for axis in figure.axes[:4]] == ["truth", "observed", "filled", "error:"]
    assert {image.get_clim() for image in images[:3]} == {(corner.min(), corner.max())}
    low, high = images[3].get_clim()
    assert low == -high < 0


@pytest.mark.skipif(os.name != "posix", reason="signals of a terminal")
def test_ctrl_c(tmp_path):
    """Ctrl-C ends the command with code 130 and one line, wherever it strikes."""
    command = [sys.executable, "-u", "-m", "fastdmf.cli", "demo", "--out", str(tmp_path / "a.png")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        for line in run.stderr:
            if "iteration" in line or "compiling" in line:
                break
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
        assert run.wait(timeout=60) == 130
    finally:
        run.kill()
        run.stderr.close()
    assert rest.endswith("fastdmf: interrupted\n")
    assert "Traceback" not in rest
    assert not (tmp_path / "a.png").exists()


def test_warmup_reports_every_job(monkeypatch, capsys):
    from fastdmf import warmup

    seen = []
    monkeypatch.setattr(warmup, "JOBS", {"one": seen.append, "two": seen.append})
    assert cli.main(["warmup"]) == 0
    captured = capsys.readouterr()
    assert seen == [np.float32, np.float64] * 2
    assert re.search(r"kernels ready in \d+\.\d s", captured.out)
    assert [line.split(":")[0] for line in captured.err.splitlines()] == [
        f"{job}, {dtype}" for job in ("one", "two") for dtype in ("float32", "float64")
    ]


@pytest.mark.parametrize("job", ["completion, variational", "sensing, seeded"])
def test_a_warmed_up_job_compiles_nothing(job):
    from fastdmf.backend import compile_clock
    from fastdmf.warmup import JOBS

    with np.errstate(all="ignore"):
        JOBS[job](np.float64)
        with compile_clock() as clock:
            JOBS[job](np.float64)
    assert clock.compile_seconds < 0.05
