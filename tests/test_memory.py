"""Memory of completion is O(entries + factors), measured as the peak of a fresh process."""

import os
import subprocess
import sys

import pytest
from conftest import PEAK_KILOBYTES

# 5 million entries of 138,000 x 27,000 at width 32 in float32; the data are made in pieces so that the peak is the
# library's own. Enough steps that the memory of the accelerated phase is full.
CODE = f"""{PEAK_KILOBYTES}
import sys, warnings
import numpy as np, fastdmf

rng = np.random.default_rng(0)
n1, n2, m = (int(k) for k in sys.argv[1:])
counts = rng.multinomial(m, np.full(n1, 1 / n1))
rows = np.repeat(np.arange(n1, dtype=np.int32), counts)
cols = np.empty(m, np.int32)
start = 0
for count in counts:
    # distinct columns without a set: a random start and a random odd stride modulo n2
    cols[start:start + count] = np.sort((rng.integers(n2) + np.arange(count) * (2 * rng.integers(n2 // 2) + 1)) % n2)
    start += count
u, v = rng.standard_normal((n1, 2), np.float32), rng.standard_normal((n2, 2), np.float32)
y = np.empty(m, np.float32)
for a in range(0, m, 500_000):
    s = slice(a, a + 500_000)
    y[s] = (u[rows[s]] * v[cols[s]]).sum(1)
same = (rows[1:] == rows[:-1]) & (cols[1:] == cols[:-1])
keep = np.concatenate([[True], ~same])
if not keep.all():
    rows, cols, y = rows[keep], cols[keep], y[keep]
del same, keep, u, v, counts
before = peak_kilobytes()
mask = fastdmf.EntryMask(rows, cols, (n1, n2))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    solution = fastdmf.solve(mask, y, width=32, max_iter=60, random_state=0)
accelerated = int((solution.history["step_size"] == 1).sum())
peak = peak_kilobytes()
fall = solution.history["loss"][-1] / solution.history["loss"][0]
print(before, peak, accelerated, fall, str(solution.factors[0].dtype))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_five_million_entries_stay_below_one_gigabyte():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Small first, by the same kernels: compiling them takes memory of its own, which the disk cache then saves.
    for sizes in (("30000", "6000", "1000000"), ("138000", "27000", "5000000")):
        done = subprocess.run([sys.executable, "-c", CODE, *sizes], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    before, peak, accelerated, fall, dtype = done.stdout.split()
    print(f"peak {int(peak) / 1e6:.3f} GB, of which {int(before) / 1e6:.3f} GB before the solve")
    assert dtype == "float32"
    assert int(accelerated) >= 11, "the memory of pairs did not fill"
    assert float(fall) < 0.5
    assert int(peak) * 1024 < 1e9
