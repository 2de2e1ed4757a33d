"""The ``fastdmf`` command: usage, exit codes, and the demonstration on a corner of its grid."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
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
    for argv, text in (
        [["--version"], __version__],
        [["--help"], "demo"],
        [["--help"], "exit codes:"],
        [["demo", "--help"], "--hide F"],
        [["complete", "--help"], "fastdmf complete ratings.csv --out filled.parquet"],
        [["predict", "--help"], "fastdmf predict model.npz pairs.csv --out predictions.csv"],
        [["impute", "--help"], "fastdmf impute table.csv --out filled.csv"],
        [["shard", "--help"], "fastdmf shard part-*.csv.gz --out ratings.shards"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_help_is_light():
    """The parser alone loads no numerical package."""
    code = "import sys; from fastdmf.cli import _parser; _parser(); print('numpy' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.skipif(os.name != "posix", reason="CPU seconds of a child")
def test_help_is_quick():
    """It answers in less than 0.3 CPU seconds, which a busy machine does not change much; the best of three."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "fastdmf.cli", "complete", "--help"], env=env, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(seconds) < 0.3


@pytest.mark.parametrize("command", ["complete", "predict", "impute", "shard", "demo", "warmup", "info"])
def test_every_option_is_explained(command):
    """Each has a text, and none has a default that its text hides."""
    commands = next(action for action in cli._parser()._actions if action.dest == "command").choices
    for action in commands[command]._actions:
        assert action.help, action
        shown = action.default in (None, False, (), Path("-")) or "default" in action.help
        assert shown or action.dest in ("help", "biases", "solver", "keep_empty"), action


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
    assert f"cannot write {tmp_path / place}: " in captured.err
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
        # Where it strikes in code that was run from a text, as numba does, Python itself ends by the signal in spite of
        # the handler; a shell shows 130 for both.
        assert run.wait(timeout=60) in (130, -signal.SIGINT)
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


# --- options from a file ---------------------------------------------------------------------------------------------


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Return a function that runs a command with a text as its file of options, and returns what it was told."""
    told = []
    for name in ("_complete", "_impute", "_shard"):
        monkeypatch.setattr(cli, name, lambda args: told.append(args) or 0)
    monkeypatch.chdir(tmp_path)

    def run(command, text, *argv):
        Path("run.toml").write_text(text, encoding="utf-8")
        assert cli.main([*command.split(), "--config", "run.toml", *argv]) == 0
        return told[-1]

    return run


CONFIG = """\
# what I always ask for
depth = 3
width = [4, 5]
min-value = 1
max_value = "free"
tol = 1e-3
solver = "descent"
biases = false
implicit-features = true
columns = ["user", "item, the", 2]
separator = "\\t"
out = "filled.csv"
seed = 12
quiet = true
"""


def test_config(options):
    """Keys are names of options; values are what the command line would make of their text."""
    args = options("complete r.csv", CONFIG)
    assert vars(args) | {
        "depth": 3,
        "width": (4, 5),
        "min_value": 1.0,
        "max_value": np.inf,
        "tol": 1e-3,
        "solver": "descent",
        "biases": False,
        "implicit_features": True,
        "columns": ("user", "item, the", 2),
        "separator": "\t",
        "out": Path("filled.csv"),
        "seed": 12,
        "quiet": True,
        "entries": Path("r.csv"),
        "max_iter": None,
        "n_init": 1,
        "header": "auto",
        "command": "complete",
    } == vars(args)


def test_the_command_line_wins(options):
    """Also where it gives an option its default."""
    args = options("complete r.csv", CONFIG, "--depth", "5", "--biases", "--seed", "0", "--solver=auto")
    assert (args.depth, args.biases, args.seed, args.solver, args.width) == (5, True, 0, "auto", (4, 5))
    assert options("impute t.csv", "missing = [-999, '?']\nrows = 3").missing == ("-999", "?")
    assert options("shard a.csv b.csv", "positions = true\nout = 's'").entries == [Path("a.csv"), Path("b.csv")]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("dept = 3", 2, "fastdmf complete has no option 'dept': did you mean depth?"),
        ("maxiter = 3", 2, "no option 'maxiter': did you mean max-iter?"),
        ("xyz = 3", 2, "no option 'xyz': fastdmf complete --help lists them"),
        ("entries = 'r.csv'", 2, "no option 'entries'"),
        ("config = 'r.toml'", 2, "no option 'config'"),
        ("[complete]\ndepth = 3", 2, "no option 'complete'"),
        ("depth = 'three'", 2, "run.toml, depth = 'three': an integer from 1 is needed, got 'three'"),
        ("depth = 2.5", 2, "depth = 2.5: an integer from 1 is needed"),
        ("depth = true", 2, "depth = True: a text or a number is needed"),
        ("tol = {a = 1}", 2, "a text or a number is needed"),
        ("solver = 'magic'", 2, "solver = 'magic': one of auto, variational, descent, recovery is needed"),
        ("biases = 'no'", 2, "biases = 'no': true or false is needed"),
        ("quiet = 1", 2, "quiet = 1: true or false is needed"),
        ("columns = []", 2, "a text or a number is needed"),
        ("depth = ", 2, "run.toml is no TOML file: Invalid value (at "),
        ("depth = 3\ndepth = 4", 2, "run.toml is no TOML file: Cannot overwrite a value"),
        ("\xff", 2, "run.toml is no TOML file"),
        (None, 1, "cannot read run.toml: No such file or directory; --config names a TOML file"),
    ],
)
def test_wrong_config(tmp_path, monkeypatch, capsys, text, code, message):
    """A key or a value is named, with what it should be."""
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("run.toml").write_bytes(text.encode("latin-1"))
    assert cli.main(["complete", "r.csv", "--out", "o.csv", "--config", "run.toml"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# --- how it ends -----------------------------------------------------------------------------------------------------


def ending(monkeypatch, capsys, error, *argv):
    """Return (code, stderr) of a command in which something is raised."""

    def fail(args):
        raise error

    monkeypatch.setattr(cli, "_complete", fail)
    code = cli.main(["complete", "r.csv", *argv])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 1, "fastdmf: error: out of memory: take fewer cells at a time; 'fastdmf shard'"),
        (MemoryError("Unable to allocate 3 TiB"), 1, "fastdmf: error: out of memory (Unable to allocate 3 TiB): take"),
        (OSError(28, "No space left on device", "o.csv"), 1, "fastdmf: error: o.csv: No space left on device\n"),
        (OSError("cannot write 'o.csv': full"), 1, "fastdmf: error: cannot write 'o.csv': full\n"),
        (ValueError("two\nlines"), 1, "fastdmf: error: two lines\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 1, "fastdmf: error: 'utf-8' codec can't decode byte 0xff"),
        (ZeroDivisionError("float"), 1, "fastdmf: error: float (--debug shows the traceback)\n"),
        (RuntimeError(), 1, "fastdmf: error: RuntimeError (--debug shows the traceback)\n"),
        (cli.UsageError("so not"), 2, "fastdmf complete: error: so not (fastdmf complete --help)\n"),
        (KeyboardInterrupt(), 130, "\nfastdmf: interrupted\n"),
    ],
)
def test_no_traceback(monkeypatch, capsys, error, code, said):
    """Whatever happens is one line on stderr and a code; ``--debug`` lets it through."""
    got, err = ending(monkeypatch, capsys, error)
    assert got == code
    assert err.startswith(said)
    assert "Traceback" not in err
    if not isinstance(error, cli.UsageError):
        with pytest.raises(type(error)):
            ending(monkeypatch, capsys, error, "--debug")


def test_what_ctrl_c_strikes_may_fail(monkeypatch, capsys):
    """An error on the way out is no other error."""
    error = RuntimeError("half compiled")
    error.__context__ = ValueError("half read")
    error.__context__.__context__ = KeyboardInterrupt()
    assert ending(monkeypatch, capsys, error) == (130, "\nfastdmf: interrupted\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("choose duplicates='sum', 'mean' or 'last'", "choose --duplicates sum, mean or last"),
        ("pass header=True if", "pass --header yes if"),
        ("which header=False says", "which --header no says"),
        ("pass encoding='latin-1', or", "pass --encoding latin-1, or"),
        ("name the separator=", "name the --separator"),
        ("biases=False is better, max_iter=3", "--no-biases is better, --max-iter 3"),
        ("n_init must be an integer", "--n-init must be an integer"),
        ("min_value must be below max_value", "--min-value must be below --max-value"),
        ("tol must be a number: raise max_iter", "--tol must be a number: raise --max-iter"),
        ("Use device='cpu'", "Use --device cpu"),
        ("random_state=0 and n_threads=2", "--seed 0 and --threads 2"),
        ("write_shards(...) makes them", "'fastdmf shard' makes them"),
        ("rule='auto' is no option", "rule='auto' is no option"),
        ("the file a=b.csv", "the file a=b.csv"),
    ],
)
def test_errors_speak_of_options(monkeypatch, capsys, text, said):
    """What the library says of its arguments is said of the options."""
    assert ending(monkeypatch, capsys, ValueError(text)) == (1, f"fastdmf: error: {said}\n")


def test_warnings_come_once_and_in_one_line(monkeypatch, capsys):
    """Those of other packages for their own developers do not come."""

    def warn(args):
        for _ in range(2):
            warnings.warn("DMFCompleter: MAX_ITER: raise max_iter=\nor so", UserWarning, stacklevel=1)
        warnings.warn("a number overflows", RuntimeWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "_complete", warn)
    assert cli.main(["complete", "r.csv"]) == 0
    expected = "fastdmf: warning: MAX_ITER: raise --max-iter or so\nfastdmf: warning: a number overflows\n"
    assert capsys.readouterr() == ("", expected)


def test_stderr_is_closed(monkeypatch):
    """Nobody to complain to is no reason for a traceback."""
    monkeypatch.setattr(cli, "_complete", lambda args: 1 / 0)
    reading, writing = os.pipe()
    os.close(reading)
    closed = os.fdopen(writing, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", closed)
        assert cli.main(["complete", "r.csv"]) == 1
    with contextlib.suppress(BrokenPipeError):
        closed.close()
