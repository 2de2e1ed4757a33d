"""Where the time of a step goes: evaluation, rule, loop, record; on 2 x 2 and on the paper's instance, one thread.

    python bench/overhead.py [--dtype float64]

Microseconds. ``evaluation`` is loss and gradient, ``rule`` the rest of a rule's step (medians over steps; for ``auto``
by phase: the take-off with its power iterations, L-BFGS from a full memory on, of which ``direction`` is a part);
``loop`` what a step costs more inside ``solve``, and ``record`` what a record costs, both from whole runs with few and
with many records.
"""

import argparse
import time
import warnings

import numpy as np

import fastdmf
from fastdmf.backend import get_backend, thread_limits
from fastdmf.chain import Layout, initial_factors
from fastdmf.problem import Problem
from fastdmf.rules import Auto, GradientDescent, GroupRMSprop


def tiny():
    """Return (operator, y): three entries of a 2 x 2 matrix."""
    return fastdmf.EntryMask([0, 0, 1], [0, 1, 0], (2, 2)), np.array([1.0, 0.5, 0.5])


def paper(n=100, rank=5, entries=2000):
    """Return (operator, y) of the paper's completion experiment."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    truth *= n / np.linalg.norm(truth)
    rows, cols = np.divmod(rng.choice(n * n, entries, replace=False), n)
    return fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols]


class Timed(Problem):
    """A problem that notes the seconds of its evaluations."""

    def evaluate(self, *args):
        """Evaluate, and add the time to ``seconds``."""
        begin = time.perf_counter()
        result = super().evaluate(*args)
        self.seconds = time.perf_counter() - begin
        return result


def by_step(operator, y, rule, dtype, steps):
    """Return {phase: (evaluation, rule)} in microseconds."""
    n = operator.shape[0]
    layout = Layout((n,) * 4)
    bound = operator.bind(get_backend(), y[None], dtype=dtype, width=n)
    times = {}
    done = 0
    while done < steps:
        problem = Timed(bound, layout, 1)
        x = layout.allocate(1, dtype)
        layout.write(x, initial_factors(layout, "gaussian", 1e-3, 0))
        state = rule.init(problem, x)
        for _ in range(min(steps, 150)):
            if isinstance(rule, Auto):
                full = state.accelerated[0] and state.held[0] == state.s_y.shape[1] - 1
                phase = "auto, full memory" if full else None if state.accelerated[0] else "auto, take-off"
            else:
                phase = ""
            begin = time.perf_counter()
            rule.step(problem, state)
            whole = time.perf_counter() - begin
            if phase is not None:
                direction = problem.direction if phase == "auto, full memory" else np.nan
                times.setdefault(phase, []).append((problem.seconds, whole - problem.seconds, direction))
            done += 1
            if problem.relative(state.losses)[0] < 1e-12 or state.failed[0]:
                break
    return {phase: 1e6 * np.median(rows, axis=0) for phase, rows in times.items() if len(rows) > 10}


class TimedAuto(Auto):
    """``auto`` that notes the seconds of its last direction."""

    def _try(self, problem, state):
        begin = time.perf_counter()
        super()._try(problem, state)
        problem.direction = time.perf_counter() - begin


def by_run(operator, y, rule, dtype, steps):
    """Return microseconds a step of ``solve`` with few records and with one a step, its setup taken off."""
    settings = dict(rule=rule, tol=1e-300, dtype=dtype, random_state=0, n_threads=1, on_failure="ignore")
    out = []
    for every in (1000, 1):
        spent = []
        for _ in range(7):
            seconds = []
            for count in (steps // 4, steps):
                begin = time.perf_counter()
                fastdmf.solve(operator, y, max_iter=count, check_every=every, **settings)
                seconds.append(time.perf_counter() - begin)
            spent.append((seconds[1] - seconds[0]) / (steps - steps // 4))
        out.append(1e6 * np.median(spent))
    return out


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float64", help="float32 or float64 (default: %(default)s)")
    args = parser.parse_args()
    rules = {"gd": GradientDescent(lr=1e-3), "group_rmsprop": GroupRMSprop(lr=1e-5), "auto": TimedAuto()}
    print(f"{args.dtype}, us a step" + f"{'evaluation':>22}{'rule':>8}{'loop':>8}{'record':>8}{'every 10':>10}")
    warnings.simplefilter("ignore")
    for case, (operator, y) in {"2 x 2": tiny(), "n = 100": paper()}.items():
        steps = 4000 if case == "2 x 2" else 400
        for name, rule in rules.items():
            with thread_limits(1):
                by_step(operator, y, rule, np.dtype(args.dtype), 20)
                parts = by_step(operator, y, rule, np.dtype(args.dtype), steps)
            for phase, (evaluation, rest, direction) in parts.items():
                line = f"{case:<9}{phase or name:<20}{evaluation:>10.1f}{rest:>8.1f}"
                if not phase:
                    few, many = by_run(operator, y, rule, np.dtype(args.dtype), steps)
                    loop, record = few - evaluation - rest, many - few
                    line += f"{loop:>8.1f}{record:>8.1f}{few + record / 10:>10.1f}"
                elif np.isfinite(direction):
                    line += f"   direction {direction:.1f}"
                print(line)


if __name__ == "__main__":
    main()
