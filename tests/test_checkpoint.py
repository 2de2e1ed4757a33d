"""Checkpoints: the same bits after an interruption at any moment, whole files whatever happens, clear refusals."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import completion, random_mask

import fastdmf
from fastdmf.checkpoint import Checkpoint
from fastdmf.engine import Status
from fastdmf.rules import Adam, Flow, GradientDescent, GroupRMSprop, Momentum, Nesterov


def noisy_entries(seed=0):
    rng = np.random.default_rng(seed)
    full = rng.standard_normal((90, 3)) @ rng.standard_normal((3, 70)) + 0.3 * rng.standard_normal((90, 70))
    mask = random_mask(90, 70, 1800, rng)
    return mask, full[mask.rows, mask.cols]


def small(n=30, count=300):
    _, mask, y = completion(0, n=n, rank=2, count=count)
    return mask, y


# One row a kind of run: name -> function of (checkpoint, callback) that returns a solution.
RUNS = {
    "auto": lambda **kw: fastdmf.solve(*small(), random_state=0, **kw),
    "auto, batch": lambda **kw: fastdmf.solve(*small(), random_state=[0, 1, 2], track=["effective_rank"], **kw),
    "auto, held out": lambda **kw: fastdmf.solve(*noisy_entries(), random_state=0, validation=0.1, **kw),
    "auto, float32": lambda **kw: fastdmf.solve(*noisy_entries(), width=16, dtype="float32", max_iter=40, **kw),
    "recover": lambda **kw: fastdmf.recover(*small(count=260), random_state=0, **kw),
    "recover, noise": lambda **kw: fastdmf.recover(*noisy_entries(), random_state=0, **kw),
    "vbmf": lambda **kw: fastdmf.vbmf(*noisy_entries(), random_state=0, **kw),
    "vbmf, features": lambda **kw: fastdmf.vbmf(
        *noisy_entries(), depth=3, implicit_features=True, dtype="float32", random_state=0, **kw
    ),
    "vbmf, three starts": lambda **kw: fastdmf.vbmf(*noisy_entries(), n_init=3, random_state=0, **kw),
}
FIXED = GradientDescent(lr=0.1), Momentum(lr=0.1), Nesterov(lr=0.1), GroupRMSprop(lr=0.01), Adam(lr=0.01), Flow()
for rule in FIXED:
    RUNS[type(rule).__name__] = lambda rule=rule, **kw: fastdmf.solve(
        *small(), rule=rule, check_every=3, max_iter=50, random_state=0, **kw
    )


def bits(solution):
    """Return what has to be the same."""
    return [w.tobytes() for w in solution.factors] + [v.tobytes() for v in solution.history.values()]


@pytest.mark.filterwarnings("ignore::fastdmf.engine.SolveWarning")
@pytest.mark.parametrize("kind", RUNS)
def test_same_bits_after_an_interruption(kind, tmp_path):
    """Stopped at some record and resumed, four times over a run, equals the run that never was."""
    if "float32" in kind:
        run = lambda **kw: RUNS[kind](random_state=0, **kw)  # noqa: E731
    else:
        run = RUNS[kind]
    records = []
    whole = run(callback=lambda progress: records.append(1))
    places = {1, len(records) // 3, 2 * len(records) // 3, len(records) - 1}
    for place in sorted(places):
        path = tmp_path / f"{place}.npz"
        count = []
        stopped = run(checkpoint=path, callback=lambda p, place=place, c=count: c.append(1) or len(c) >= place)
        status = stopped.status if isinstance(stopped.status, list) else [stopped.status]
        assert Status.STOPPED in status and path.exists()
        again = []
        resumed = run(checkpoint=path, callback=lambda p, c=again: c.append(1) and None)
        assert bits(resumed) == bits(whole) and resumed.n_eval == whole.n_eval
        assert resumed.status == whole.status and np.array_equal(resumed.n_iter, whole.n_iter)
        if "starts" not in kind:  # the last records of starts that had ended are made again, too
            assert len(again) == len(records) - place + 1  # the interrupted record is made again, no other
    # In several pieces.
    path = tmp_path / "pieces.npz"
    for _ in range(4):
        count = []
        run(checkpoint=path, callback=lambda p, c=count: c.append(1) or len(c) >= 3)
    assert bits(run(checkpoint=path)) == bits(whole)


CHILD = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import numpy as np, fastdmf
from test_checkpoint import RUNS
from fastdmf import Checkpoint

warnings.simplefilter("ignore")
tick = lambda progress: print(progress.iteration, flush=True)
solution = RUNS[sys.argv[2]](checkpoint=Checkpoint(sys.argv[3], every=0), callback=tick)
np.savez(sys.argv[4], *solution.factors)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL")
@pytest.mark.filterwarnings("ignore::fastdmf.engine.SolveWarning")
@pytest.mark.parametrize("kind", ["auto", "recover", "vbmf"])
def test_same_bits_after_kill(kind, tmp_path):
    """Killed again and again, a little after a record, while the file is perhaps being written."""
    whole = RUNS[kind]()
    rng = np.random.default_rng(0)
    path, out = tmp_path / "run.npz", tmp_path / "factors.npz"
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    kills = 0
    for records in (2, 5, 3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, here, kind, str(path), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for _ in range(records):
            child.stdout.readline()
        time.sleep(0.003 * rng.random())
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1 and path.exists()
    resumed = RUNS[kind](checkpoint=path)
    assert bits(resumed) == bits(whole)


def test_a_full_disk_leaves_the_former_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    whole = RUNS["vbmf"](on_failure="ignore")
    RUNS["vbmf"](checkpoint=path, callback=lambda p: p.iteration == 2)
    before = path.read_bytes()
    save = np.savez

    def full(file, **arrays):
        save(file, **dict(list(arrays.items())[:2]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(RuntimeWarning, match=r"cannot be written.*No space left.*the run goes on") as caught:
        solution = RUNS["vbmf"](checkpoint=Checkpoint(path, every=0), on_failure="ignore")
    assert len(caught) == 1 and bits(solution) == bits(whole)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    monkeypatch.undo()
    assert bits(RUNS["vbmf"](checkpoint=path, on_failure="ignore")) == bits(whole)


def test_files_of_others_are_refused_and_kept(tmp_path):
    path = tmp_path / "run.npz"
    mask, y = small()
    for first, others in {
        "auto": [
            lambda: fastdmf.solve(mask, y, random_state=1, checkpoint=path),
            lambda: fastdmf.solve(mask, y, depth=2, random_state=0, checkpoint=path),
            lambda: fastdmf.solve(mask, y, tol=1e-5, random_state=0, checkpoint=path),
            lambda: fastdmf.solve(mask, y + 1, random_state=0, checkpoint=path),
            lambda: RUNS["recover"](checkpoint=path),
        ],
        "recover": [
            lambda: fastdmf.recover(*small(count=261), random_state=0, checkpoint=path),
            lambda: fastdmf.recover(*small(count=260), random_state=1, checkpoint=path),
            lambda: fastdmf.recover(*small(count=260), random_state=0, noise=False, checkpoint=path),
        ],
        "vbmf": [
            lambda: fastdmf.vbmf(*noisy_entries(1), random_state=0, checkpoint=path),
            lambda: fastdmf.vbmf(*noisy_entries(), random_state=0, width=7, checkpoint=path),
            lambda: fastdmf.vbmf(*noisy_entries(), random_state=1, checkpoint=path),
        ],
    }.items():
        path.unlink(missing_ok=True)
        RUNS[first](checkpoint=path, callback=lambda p: p.iteration == 2)
        before = path.read_bytes()
        for other in others:
            with pytest.raises(ValueError, match="belongs to a run with other data, settings or seed: name another"):
                other()
            assert path.read_bytes() == before


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "run.npz"
    RUNS["vbmf"](checkpoint=path, callback=lambda p: p.iteration == 2)
    whole = path.read_bytes()
    pickled = tmp_path / "pickle.npz"
    np.savez(pickled, header=np.array([{}], dtype=object))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (b"", whole[: len(whole) // 2], b"hello", bytes(flipped), pickled.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run.npz' is damaged or none of fastdmf's: name another file"):
            RUNS["vbmf"](checkpoint=path)


@pytest.mark.parametrize(
    ("checkpoint", "error", "match"),
    [
        (7, TypeError, "checkpoint must be a path or a Checkpoint, got int"),
        ("nowhere/run.npz", ValueError, "checkpoint must name a file in a folder that exists"),
        (".", ValueError, "checkpoint must name a file in a folder that exists"),
    ],
)
def test_bad_arguments(checkpoint, error, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("auto", "recover", "vbmf"):
        with pytest.raises(error, match=match):
            RUNS[kind](checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"Checkpoint\(every=...\) must be a number of seconds >= 0, got -1"):
        Checkpoint("run.npz", every=-1)
