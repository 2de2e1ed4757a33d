"""``solve`` follows trajectories of independent implementations at every recorded step."""

from pathlib import Path

import numpy as np
import pytest

import fastdmf
from fastdmf.rules import GradientDescent, GroupRMSprop

DATA = Path(__file__).parent / "data"
NAMES = sorted(p.stem for p in DATA.glob("*.npz") if "instance" not in p.stem)


def _operator(z, name):
    if name.startswith("completion"):
        return fastdmf.EntryMask(z["rows"], z["cols"], z["ground_truth"].shape)
    return fastdmf.GaussianDense(np.load(DATA / "sensing_30x30_k300_instance.npz")["A"])


def test_all_files_are_there():
    assert len(NAMES) == 5


@pytest.mark.parametrize("name", NAMES)
def test_trajectory(name):
    z = np.load(DATA / f"{name}.npz")
    depth = int(z["depth"])
    if "grouprmsprop" in name:
        rule = GroupRMSprop(lr=float(z["lr"]), beta=float(z["alpha"]), eps=float(z["eps"]))
    else:
        rule = GradientDescent(lr=float(z["lr"]))
    # Some files hold every step, one holds the steps that it lists and stops by the training loss.
    steps = z["steps"] if z["steps"].ndim else np.arange(int(z["steps"]) + 1)
    with pytest.warns(fastdmf.engine.SolveWarning, match="MAX_ITER"):
        solution = fastdmf.solve(
            _operator(z, name),
            z["y"],
            factors=[z[f"W{j}_init"] for j in range(1, depth + 1)],
            rule=rule,
            max_iter=int(steps[-1]),
            check_every=1,
            tol=1e-300,
            truth=z["ground_truth"],
            track=("nuclear_norm",) if "nuclear_norm" in z.files and len(steps) < 1000 and steps[-1] < 3000 else (),
        )
    history = solution.history
    assert history["iteration"].tolist() == list(range(int(steps[-1]) + 1))
    assert solution.n_eval == steps[-1] + 1
    worst = 0.0
    for ours, theirs in (("loss", "loss"), ("error", "recon_error"), ("grad_norm",) * 2, ("step_size",) * 2):
        if theirs in z.files:
            np.testing.assert_allclose(history[ours][steps], z[theirs], rtol=1e-10, err_msg=ours)
            worst = max(worst, np.max(np.abs(history[ours][steps] / z[theirs] - 1)))
    print(f"{name}: {len(steps)} records, largest relative deviation {worst:.1e}")
    for j in range(1, depth + 1):
        if f"W{j}_final" in z.files:
            final, reference = solution.factors[j - 1], z[f"W{j}_final"]
            assert np.linalg.norm(final - reference) < 1e-10 * np.linalg.norm(reference)
