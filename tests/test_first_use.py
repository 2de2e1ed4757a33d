"""Gates on what has to be compiled: counts, which neither noise nor a slow machine can move.

Every compiled version costs a second on a user's first fit, and a file to load on every other first fit of a process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ESTIMATOR_TESTS

ROOT = Path(__file__).resolve().parent.parent

# What a fresh process compiles, and what it loads where another has compiled before.
COUNTER = """
import json, sys, warnings
from fastdmf.backend import get_backend
import fastdmf, numpy as np
from numba.core import event

get_backend().kernels
compiled = event.RecordingListener()
rng = np.random.default_rng(0)
X = rng.standard_normal((40, 2)) @ rng.standard_normal((2, 30))
A = rng.standard_normal((90, 8, 7))
rows, cols = np.divmod(rng.permutation(40 * 30)[:500], 30)
mask = fastdmf.EntryMask(rows, cols, X.shape)


def first_fit(kind):
    if kind == "imputer":
        fastdmf.DMFImputer(random_state=0).fit(np.where(rng.random(X.shape) < 0.5, X, np.nan))
    elif kind == "sensing":
        fastdmf.DMFSensing(random_state=0).fit(A, A.reshape(90, -1) @ X[:8, :7].ravel())
    elif kind == "solve":
        fastdmf.solve(mask, X[rows, cols], random_state=0)
    else:
        fastdmf.vbmf(mask, X[rows, cols], random_state=0)


with event.install_listener("numba:compile", compiled):
    first_fit(sys.argv[1])
modules = [m for name, m in sys.modules.items() if name.startswith("fastdmf.kernels.cpu.")]
kernels = [f for m in modules for f in vars(m).values() if hasattr(f, "signatures")]
counts = {"compiled": sum(record.is_start for _, record in compiled.buffer)}
print(json.dumps(counts | {"versions": sum(len(f.signatures) for f in set(kernels))}))
"""


def count(kind, cache):
    """Return the counts of a first fit in a process of its own."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", COUNTER, kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# One above what was counted: 23 and 9, 15 and 11. The descent alone has 17 and 7; 69 and 47 before its kernels were
# put on a diet.
@pytest.mark.parametrize(("kind", "compiled", "versions"), [("imputer", 24, 10), ("sensing", 17, 12)])
def test_first_fit_compiles_little_and_the_second_process_nothing(kind, compiled, versions, tmp_path):
    cold, warm = count(kind, tmp_path), count(kind, tmp_path)
    print(kind, cold, warm)
    assert 0 < cold["compiled"] <= compiled and 0 < cold["versions"] <= versions
    assert warm["compiled"] == 0 and 0 < warm["versions"] <= versions


def test_the_estimators_share_few_compiled_versions(request):
    """Comes right behind the estimators' own tests (``conftest`` sees to it): every option, dtype and kind of input."""
    ran = {item.path.name for item in request.session.items}
    if not ran >= ESTIMATOR_TESTS:
        pytest.skip(f"counts after the tests of {sorted(ESTIMATOR_TESTS)} in the same process: run them together")
    modules = [m for name, m in sys.modules.items() if name.startswith("fastdmf.kernels.cpu.")]
    kernels = {f for m in modules for f in vars(m).values() if hasattr(f, "signatures")}
    versions = {f.py_func.__qualname__: len(f.signatures) for f in kernels if f.signatures}
    print(sum(versions.values()), versions)
    assert 0 < sum(versions.values()) <= 40
