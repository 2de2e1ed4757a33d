"""Barrett and Dherin 2021: gradient descent with step h follows the flow of E + (h/4) ||grad E||^2 to second order."""

import numpy as np
from scipy.interpolate import CubicSpline

import fastdmf
from bench.papers.harness import Experiment, figure
from bench.papers.instances import completion
from fastdmf.penalties import GradientNorm
from fastdmf.rules import Flow, GradientDescent

TITLE = "implicit gradient regularization: distance to the flows with and without the penalty"
ORIGIN = "order of the modified flow"


def endpoint(problem, start, time, penalty):
    """Return the factors of the flow at ``time``, flattened, by a spline through its steps."""
    times, points = [0.0], []

    def log(progress):
        points.append(np.concatenate([w.ravel() for w in progress.factors()]))
        if progress.iteration:
            times.append(progress.values["time"])
        return times[-1] > time

    options = {"rule": Flow(rtol=1e-10), "penalty": penalty, "callback": log, "loss": "sse/2", "tol": 1e-300}
    fastdmf.solve(*problem, factors=start, on_failure="ignore", **options)
    times, keep = np.unique(times, return_index=True)  # a refused step repeats its point
    return CubicSpline(times, np.array(points)[keep])(time)


def gaps(problem, start, time, counts):
    """Return the distances of gradient descent to both flows for steps time / count."""
    plain, out = endpoint(problem, start, time, ()), []
    for count in counts:
        h = time / count
        options = {"rule": GradientDescent(lr=h), "max_iter": count, "loss": "sse/2", "tol": 1e-300}
        run = fastdmf.solve(*problem, factors=start, on_failure="ignore", **options)
        at = np.concatenate([w.ravel() for w in run.factors])
        modified = endpoint(problem, start, time, GradientNorm(h / 4))
        out.append((np.linalg.norm(at - modified), np.linalg.norm(at - plain)))
    return np.array(out)


def run(quick):
    """The paper's two parameters, and a deep completion."""
    result, made = Experiment(), figure(2)
    # E = (y - a b)^2 / 2 with y = 0.6, from the paper's (2.8, 3.5).
    one = fastdmf.EntryMask([0], [0], (1, 1)), np.array([0.6])
    toy = [np.array([[2.8]]), np.array([[3.5]])]
    mask, y, _ = completion(0, 60, 12, 2)
    deep = [0.6 * np.random.default_rng(j).standard_normal((12, 12)) for j in range(3)]
    cases = {
        "two parameters": (one, toy, 0.1, (40, 80, 160)),
        "completion, depth 3": ((mask, y), deep, 0.2, (100, 200, 400)),
    }
    for axis, (name, (problem, start, time, counts)) in zip(made[1], cases.items()):
        found = gaps(problem, start, time, counts)
        slopes = -np.diff(np.log2(found), axis=0)
        result.add(f"{name}: order of the gap to the penalised flow", slopes[:, 0], 1.8, 2.2, ORIGIN)
        result.add(f"{name}: order of the gap to the plain flow", slopes[:, 1], 0.8, 1.2, ORIGIN)
        h = time / np.array(counts)
        axis.loglog(h, found[:, 0], "o-", label="flow of E + (h/4) ||grad E||$^2$")
        axis.loglog(h, found[:, 1], "s-", label="flow of E")
        axis.set(xlabel="step h", ylabel="distance at one time", title=name)
        axis.legend(fontsize="small")
    result.figure = made[0]
    return result
