"""What survives: kill -9 at any moment, full disks, folders that may not be written to, damaged files."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import completion, random_mask
from test_checkpoint import bits

import fastdmf
from fastdmf import Checkpoint, DMFImputer
from fastdmf.engine import Status
from fastdmf.files import remove_unfinished

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, tmpfs")

KILLS = 20
QUIET = {"on_failure": "ignore"}


def table():
    """A table on which the imputer tries all that it has, and recovery is exact."""
    rng = np.random.default_rng(0)
    full = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 40))
    return np.where(rng.random(full.shape) < 0.3, full, np.nan)


def descend(**options):
    _, mask, y = completion(0, n=60, rank=3, count=900)
    return fastdmf.solve(mask, y, rule="gd", max_iter=2000, check_every=20, random_state=0, **options)


def recover(**options):
    _, mask, y = completion(0, n=60, rank=4, count=700)
    y = y + 0.1 * y.std() * np.random.default_rng(0).standard_normal(len(y))
    return fastdmf.recover(mask, y, random_state=0, **options)


def sweep(**options):
    rng = np.random.default_rng(0)
    full = rng.standard_normal((600, 8)) @ rng.standard_normal((8, 400)) + 0.3 * rng.standard_normal((600, 400))
    mask = random_mask(600, 400, 9000, rng)
    return fastdmf.vbmf(mask, full[mask.rows, mask.cols], max_iter=200, tol=0, random_state=0, **options)


def impute(checkpoint=None, callback=None):
    logger = logging.getLogger("fastdmf")
    logger.setLevel(logging.INFO)
    logger.addFilter(lambda record: callback(getattr(record, "progress", None)))  # lets none through
    return DMFImputer(random_state=0, checkpoint=checkpoint, verbose=1).fit(table())


# name -> function of (checkpoint, callback); the longest wait before a kill, as a part of the whole run, of which the
# imputer reads its finished parts first.
FITS = {"solve": (descend, 0.3), "recover": (recover, 0.3), "vbmf": (sweep, 0.3), "imputer": (impute, 0.8)}


def keep(fitted, path):
    """Write all bits that have to be the same: an estimator with all that it has, a solution's factors and history."""
    if isinstance(fitted, DMFImputer):
        fastdmf.save(fitted, path)
    else:
        more = {"row_bias": fitted.row_bias} if hasattr(fitted, "row_bias") else {}
        np.savez(path, *fitted.factors, **fitted.history, **more)


def kept(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name].tobytes() for name in file.files if name not in ("header", "seal")}


# --- kill -9 ---------------------------------------------------------------------------------------------------------

# Imports once and forks for every run, before any thread of the kernels is there; kills from outside, by kill -9.
NURSERY = """
import json, os, signal, sys, time, warnings
sys.path.insert(0, sys.argv[1])
import numpy as np
import fastdmf
from fastdmf import Checkpoint, DMFImputer
from fastdmf.kernels import cpu
from test_faults import FITS, keep

warnings.simplefilter("ignore")


def start(name, checkpoint, out):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            tick = lambda progress: os.write(write, b"%d\\n" % (progress.iteration if progress else 0)) and None
            keep(FITS[name][0](checkpoint=checkpoint, callback=tick), out)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    return child, read


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def unfinished(folder, child):
    return any(f".{child}." in file for file in os.listdir(folder))


def chain(name, kills, folder):
    rng = np.random.default_rng(kills)
    path, out = os.path.join(folder, "run.npz"), os.path.join(folder, "out.npz")
    written = Checkpoint(os.path.join(folder, "reference.npz"), every=0)
    for checkpoint, to in ((None, "whole.npz"), (written, "written.npz")):
        child, read = start(name, checkpoint, os.path.join(folder, to))
        os.read(read, 1)
        begun = time.monotonic()
        told = open(read).read()
        assert ended(child) == 0
        whole = time.monotonic() - begun
    longest = whole * FITS[name][1]
    killed, writing, ends, moments = 0, 0, 0, []
    while killed < kills or ends == 0:
        child, read = start(name, Checkpoint(path, every=0), out)
        first = os.read(read, 100)  # of its records, or nothing from a run that failed
        stuck = len(moments) > 2 and len(set(moments[-3:])) == 1  # in one long step: let the run end
        if killed < kills and not stuck:
            time.sleep(float(rng.uniform(0, longest)))
            patience = time.monotonic() + 1
            while killed % 4 == 3 and not unfinished(folder, child) and time.monotonic() < patience:
                pass  # every fourth kill waits for a file that is being written
            os.kill(child, signal.SIGKILL)
        with open(read) as records:
            last = ["none", *(first.decode() + records.read()).split()][-1]
        code = ended(child)
        if code == -signal.SIGKILL:
            killed += 1
            writing += unfinished(folder, child)
            parts = [file for file in os.listdir(folder) if file.startswith("run.npz") and not file.endswith(".new")]
            moments.append(f"{last} of {sorted(parts)[-1:]}")
            continue
        if code:
            return {"failed": code}
        ends += 1
        moments.append("end")
        os.rename(out, os.path.join(folder, f"out{ends}.npz"))
        for file in os.listdir(folder):
            if file.startswith("run.npz"):
                os.unlink(os.path.join(folder, file))
    return {"killed": killed, "writing": writing, "ends": ends, "moments": moments, "seconds": whole}


for line in sys.stdin:
    print(json.dumps(chain(*json.loads(line))), flush=True)
"""


@pytest.fixture(scope="module")
def nursery():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-c", NURSERY, here]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def chain(*order):
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield chain
        process.stdin.close()


@pytest.mark.parametrize("name", FITS)
def test_kill_at_twenty_moments(name, nursery, tmp_path):
    """One run after the other is killed and resumed until twenty kills are over: each has the bits of a whole one."""
    told = nursery(name, KILLS, str(tmp_path))
    print(name, told)
    assert told["killed"] == KILLS and told["ends"] >= 1
    assert told["writing"] > 0  # some kills left a file half written
    assert len(set(told["moments"])) > KILLS // 4
    whole = kept(tmp_path / "whole.npz")
    assert len(whole) > 2 and kept(tmp_path / "written.npz") == whole
    for k in range(told["ends"]):
        assert kept(tmp_path / f"out{k + 1}.npz") == whole


# --- files that cannot be written ------------------------------------------------------------------------------------

STAGES = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from fastdmf import Checkpoint
from test_faults import FITS

stage, seen, save = sys.argv[3], 0, np.savez


def dying(call, *, before=None):
    # The seventh call is the end of the process.
    def patched(*args, **kwargs):
        global seen
        seen += 1
        if seen == 7 and before is not None:
            before(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        call(*args, **kwargs)
        if seen == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    return patched


def half(file, **arrays):
    save(file, **{name: arrays[name] for name in list(arrays)[: len(arrays) // 2]})
    file.flush()


if stage == "half":
    np.savez = dying(save, before=half)
elif stage == "unsynced":
    os.fsync = dying(os.fsync, before=lambda descriptor: None)
elif stage == "unplaced":
    os.replace = dying(os.replace, before=lambda new, path: None)
elif stage == "placed":
    os.replace = dying(os.replace)
FITS["vbmf"][0](checkpoint=Checkpoint(sys.argv[2], every=0))
"""


@pytest.mark.parametrize("stage", ["half", "unsynced", "unplaced", "placed"])
def test_kill_while_a_checkpoint_is_written(stage, tmp_path):
    """At each stage of the seventh writing: the file is whole, of the sixth state or of the seventh."""
    path = tmp_path / "run.npz"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STAGES, str(Path(__file__).resolve().parent), str(path), stage]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    left = sorted(file.name.split(".")[-1] for file in tmp_path.iterdir())
    assert left == ["npz"] if stage == "placed" else left == ["new", "npz"]
    first = []
    resumed = sweep(checkpoint=path, callback=lambda progress: first.append(progress.iteration) and None, **QUIET)
    assert first[0] == (6 if stage == "placed" else 5)
    assert bits(resumed) == bits(sweep(**QUIET))
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]  # what the kill had left is gone


def test_only_what_killed_processes_left_is_removed(tmp_path):
    """A running process' file stays, and so does everything of another name."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = {
        f"run.npz.{ended.pid}.1.new": False,
        f"run.npz.{os.getpid()}.1.new": True,
        "run.npz.1.1.new": True,
        "run.npz.first.1.new": True,
        f"run.npz.fold0.{ended.pid}.1.new": True,
        f"run.npz.{10**40}.1.new": True,
        f"other.npz.{ended.pid}.1.new": True,
        f"run.npz.{ended.pid}.1": True,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"")
    remove_unfinished(tmp_path / "run.npz")
    assert {name: (tmp_path / name).exists() for name in names} == names


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of that size, where this process may mount one."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk is root's")
def test_a_disk_that_is_full(tmp_path):
    """The run ends as if it wrote none, the former checkpoint stays, and serves once there is room."""
    with small_disk(tmp_path, 2048):
        path, filler = tmp_path / "run.npz", tmp_path / "filler"
        sweep(checkpoint=path, callback=lambda progress: progress.iteration == 3)
        before = path.read_bytes()
        assert len(before) > 100_000
        with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with open(filler, "r+b") as file:  # room for half of a checkpoint
            file.truncate(filler.stat().st_size - len(before) // 2)
        with pytest.warns(RuntimeWarning, match=r"run.npz' cannot be written \(.*No space left.*the former one stays"):
            solution = sweep(checkpoint=Checkpoint(path, every=0), **QUIET)
        whole = bits(sweep(**QUIET))
        assert bits(solution) == whole
        assert path.read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir()) == ["filler", "run.npz"]
        filler.unlink()
        assert bits(sweep(checkpoint=path, **QUIET)) == whole


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late(call, tmp_path, monkeypatch):
    """Errors that come after all bytes seemed written leave the former file as well."""
    path = tmp_path / "run.npz"
    sweep(checkpoint=path, callback=lambda progress: progress.iteration == 3)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.warns(RuntimeWarning, match="Input/output error") as caught:
        solution = sweep(checkpoint=Checkpoint(path, every=0), **QUIET)
    monkeypatch.undo()
    assert len(caught) == 1 and bits(solution) == bits(sweep(**QUIET))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["run.npz"]


@contextmanager
def nobody():
    """Be a user without rights, as whom a folder without write permission is one; root writes everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_is_read_only():
    """A resumed fit goes on without writing; one that begins says so and goes on as well."""
    impute_here = lambda path: DMFImputer(solver="descent", depth=2, random_state=0, checkpoint=path).fit(table())  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.npz"
        whole = impute_here(None)
        finished = impute_here(path)
        os.chmod(folder, 0o555)
        try:
            with nobody():
                assert not os.access(folder, os.W_OK, effective_ids=True)
                with pytest.warns(RuntimeWarning, match="cannot be written .*Permission denied.*the run goes on"):
                    resumed = impute_here(Checkpoint(path, every=0))
                with pytest.warns(RuntimeWarning, match="other.npz' cannot be written"):
                    begun = impute_here(Checkpoint(Path(folder) / "other.npz", every=0))
        finally:
            os.chmod(folder, 0o755)
        for model in (finished, resumed, begun):
            assert all(np.array_equal(a, b) for a, b in zip(model.factors_, whole.factors_))


# --- files that are damaged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", ".covariances", ".fold0", ".depth2", ".depth3", ".recovery"])
def test_a_damaged_part(part, tmp_path):
    """Whichever file of a fit is damaged: it is named, and the imputer is what it was before."""
    path = tmp_path / "run.npz"
    imputer = DMFImputer(random_state=0, checkpoint=path).fit(table())
    assert imputer.status_ is Status.EXACT
    damaged = path.with_name(path.name + part)
    if part == "":  # only another solver's fit has it
        imputer.set_params(solver="variational")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imputer.fit(table())
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    before = dict(vars(imputer))
    with pytest.raises(ValueError, match=rf"run.npz{part}' is damaged or none of fastdmf's: name another file"):
        imputer.fit(table())
    assert vars(imputer).keys() == before.keys()
    assert all(vars(imputer)[name] is value for name, value in before.items())
    damaged.unlink()
    imputer.fit(table())
