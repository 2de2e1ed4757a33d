"""What all targets share: cases, what counts as a finding, and the engines that drive them.

A case is a strategy of hypothesis and a check of what it draws. What is drawn is plain (numbers, texts, bytes, and
tuples and dicts of them), so that its ``repr`` is the whole reproducer. A check returns whether the input was taken;
a documented refusal is no finding, any other exception is, and so are warnings that say nothing to a user, much time
and much memory.

hypothesis draws at random; atheris, where it is installed, mutates what led to new branches of fastdmf. Both run the
same cases.
"""

import faulthandler
import json
import os
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning

__all__ = ["Case", "Finding", "Recorder", "drive_by_atheris", "drive_by_hypothesis", "refusal", "watched"]

_MEMORY = 1 << 30  # bytes that a case may take beside what the process has
_SHOWN = 4_000  # characters of a reproducer that are kept
_SPOKEN = (ConvergenceWarning, DataConversionWarning)
few = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Finding(AssertionError):
    """What a check found."""


@dataclass(frozen=True)
class Case:
    """One kind of input.

    Attributes
    ----------
    strategy : SearchStrategy
    check : callable
        Of what is drawn; returns whether it was taken, raises on a finding.
    seconds : float
        More time than that is a finding.
    """

    strategy: st.SearchStrategy
    check: Callable
    seconds: float = 5.0


def refusal(error, *names):
    """Check a refusal: one line of readable length, with at least one of the names in it."""
    said = str(error)
    if "\n" in said or not said or len(said) > 700:
        raise Finding(f"{type(error).__name__} of {len(said)} characters is no one readable line: {said[:300]!r}")
    if not any(name in said for name in names):
        raise Finding(f"{type(error).__name__} names none of {sorted(names)}: {said!r}") from error


def watched(case, value):
    """Run a check; return whether the input was taken.

    Raises
    ------
    Finding
        On a warning that is no sentence of fastdmf or scikit-learn to a user, and on much memory.
    Exception
        That the check lets through.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        taken = case.check(value)
    seconds = time.perf_counter() - begin
    for warning in caught:
        kind = warning.category
        if not (issubclass(kind, _SPOKEN) or (kind is UserWarning and str(warning.message).startswith("DMF"))):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            raise Finding(f"{kind.__name__} escapes at {place}: {warning.message}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > _MEMORY // 4:
        raise Finding(f"takes {grown / 1e6:.0f} MB")
    if seconds > case.seconds:
        raise Finding(f"takes more than {case.seconds:g} s")
    return taken


class Recorder:
    """Runs cases, counts them and keeps one reproducer, the shortest, of each finding.

    Parameters
    ----------
    cases : dict of str to Case
    folder : Path
        Holds what is run at the moment, ``current``, and the counts and findings so far, ``found.json``.
    """

    def __init__(self, cases, folder):
        self.cases, self.folder = cases, folder
        self.executions, self.taken, self.findings = Counter(), Counter(), {}
        self._written = 0.0
        self._current = open(folder / "current", "w", encoding="utf-8", errors="backslashreplace")
        self._log = open(folder / "log", "w", encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.write()
        self._current.close()
        self._log.close()

    def run(self, drawn):
        """Run the check of one (name, value)."""
        name, value = drawn
        case = self.cases[name]
        said = repr(drawn)
        self._current.seek(0)
        self._current.truncate()
        self._current.write(said)
        self._current.flush()
        faulthandler.dump_traceback_later(6 * case.seconds + 1, exit=True, file=self._log)
        self.executions[name] += 1
        try:
            self.taken[name] += bool(watched(case, value))
        except Exception as error:
            self._keep(name, error, said)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if time.monotonic() > self._written + 1:
            self.write()

    def _keep(self, name, error, said):
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "fastdmf" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        # Numbers in a message make no finding of its own.
        kind = "".join("0" if c.isdigit() else c for c in str(error)[:60]) if isinstance(error, Finding) else ""
        key = name, type(error).__name__, place, kind
        times, shortest, shown = self.findings.get(key, (0, said, None))
        if shown is None or len(said) < len(shortest):
            shortest, shown = said, f"{type(error).__name__}: {error}"[:600]
        self.findings[key] = times + 1, shortest, shown

    def write(self):
        """Write what is known so far."""
        self._written = time.monotonic()
        found = [
            {"case": key[0], "at": key[2], "error": shown, "times": times, "example": said[:_SHOWN]}
            for key, (times, said, shown) in self.findings.items()
        ]
        text = json.dumps({"executions": self.executions, "taken": self.taken, "findings": found})
        whole = self.folder / "found.json.new"
        whole.write_text(text)
        os.replace(whole, self.folder / "found.json")


def drawn_of(cases):
    """Return the strategy of (name, value) over all cases."""
    return st.sampled_from(sorted(cases)).flatmap(lambda name: st.tuples(st.just(name), cases[name].strategy))


def drive_by_hypothesis(recorder, seconds, seed):
    """Draw cases at random until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:

        def one(drawn):
            if time.monotonic() < end:
                recorder.run(drawn)

        run = settings(few, max_examples=100)(given(drawn_of(recorder.cases))(one))
        hypothesis.seed(seed)(run)()
        seed += 1_000_003


def drive_by_atheris(recorder, seconds, seed):
    """Let atheris mutate the draws by coverage until the time is over; ends the process."""
    import atheris

    end = time.monotonic() + seconds
    one = settings(few)(given(drawn_of(recorder.cases))(recorder.run)).hypothesis.fuzz_one_input

    def run(data):
        # libFuzzer would end the process without a word.
        if time.monotonic() > end:
            recorder.write()
            os._exit(0)
        one(data)

    # A timeout of 0 is none to libFuzzer, and none is left to atheris, whose alarm then ends what takes a second.
    options = ["-max_len=8192", "-len_control=20", "-rss_limit_mb=0", "-timeout=86400", "-verbosity=0"]
    options.append(f"-seed={seed + 1}")
    atheris.Setup(["fuzz", *options, f"-artifact_prefix={recorder.folder}/"], run)
    atheris.Fuzz()


def limit_memory():
    """Let the process have no more than what it has and a little: what asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 4 * _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
