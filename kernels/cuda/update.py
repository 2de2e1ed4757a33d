"""Updates of the rules on the device: the launches.

Of every launcher: ``x``, ``grad`` and what a rule remembers are (B, D), ``step_size`` is (B,) float64, ``count`` (B,)
float64 the steps that each slice has taken, which a launch raises by one, ``active`` (B,) uint8 the slices that move,
None for all. Nothing but ``beta``, ``eps`` and the like is fixed when a graph is recorded.
"""

import numpy as np

from fastdmf.kernels.cuda import real_name
from fastdmf.kernels.cuda.checks import check_arguments, table

__all__ = ["update_adam", "update_gd", "update_group_rmsprop", "update_momentum", "update_options"]

_THREADS = 256
_MOST_BLOCKS = 4096  # of a slice: more than any device holds at once

_SLICES = {"step_size": "float64 B", "count": "float64? B", "active": "uint8? B"}
_GD = table(x="REAL B D", grad="REAL B D", **_SLICES)
_MOMENTUM = table(x="REAL B D", velocity="REAL B D", grad="REAL B D", **_SLICES)
_ADAM = table(
    **dict.fromkeys(("x", "mean", "square", "grad"), "REAL B D"),
    **(_SLICES | {"count": "float64 B"}),
    tickets="uint32 B",
)
_GROUP_RMSPROP = table(
    **dict.fromkeys(("step_size", "mean_square", "squares", "lr"), "float64 B"),
    count="float64 B",
    active="uint8? B",
)


def update_options(dtype):
    """Return the compiler's options."""
    return [f"-DREAL={real_name(dtype)}", f"-DSTORED={real_name(dtype)}"]


def _launch(module, kernel, arrays, shape, *settings):
    runs, size = shape
    blocks = max(min(-(-size // (4 * _THREADS)), _MOST_BLOCKS), 1)
    module.launch(kernel, (blocks, runs), (_THREADS,), (*arrays, np.int64(size), *settings))


def update_gd(module, x, grad, step_size, *, count=None, active=None):
    """Overwrite ``x`` with x - step_size grad: gradient descent, and every rule with one number for all factors."""
    check_arguments(_GD, x=x, grad=grad, step_size=step_size, count=count, active=active)
    _launch(module, "update_gd", (x, grad, step_size, count, active), x.shape)


def update_momentum(module, x, velocity, grad, step_size, beta, *, nesterov=False, count=None, active=None):
    """Overwrite ``x`` and ``velocity`` with a step of the heavy ball, or of Nesterov's momentum."""
    check_arguments(_MOMENTUM, x=x, velocity=velocity, grad=grad, step_size=step_size, count=count, active=active)
    arrays = x, velocity, grad, step_size, count, active
    _launch(module, "update_momentum", arrays, x.shape, np.float64(beta), np.int32(nesterov))


def update_adam(module, x, mean, square, grad, step_size, beta1, beta2, eps, count, tickets, *, active=None):
    """Overwrite ``x``, ``mean`` and ``square`` with a step of Adam.

    ``tickets`` (B,) uint32 must be zero before the first call, and is so after each.
    """
    check_arguments(
        _ADAM,
        **{"x": x, "mean": mean, "square": square, "grad": grad},
        **{"step_size": step_size, "count": count, "active": active, "tickets": tickets},
    )
    arrays = x, mean, square, grad, step_size, count, tickets, active
    _launch(module, "update_adam", arrays, x.shape, np.float64(beta1), np.float64(beta2), np.float64(eps))


def update_group_rmsprop(module, step_size, mean_square, squares, lr, beta, eps, count, *, active=None):
    """Overwrite ``step_size`` and ``mean_square`` for points just evaluated: what ``update_gd`` then takes.

    ``squares`` (B,) are the squared norms of the gradients, from ``slices_dot``, ``lr`` is (B,) float64, and ``count``
    the steps that led to the points.
    """
    arrays = {"step_size": step_size, "mean_square": mean_square, "squares": squares, "lr": lr, "count": count}
    check_arguments(_GROUP_RMSPROP, **arrays, active=active)
    runs = len(step_size)
    arguments = (*arrays.values(), active, np.int32(runs), np.float64(beta), np.float64(eps))
    module.launch("update_group_rmsprop", (-(-runs // _THREADS),), (_THREADS,), arguments)
