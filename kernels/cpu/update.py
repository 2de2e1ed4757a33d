"""Updates of the rules on a batch: x and what a rule remembers are (B, D), numbers of a slice (B,) float64.

In NumPy: each is a few passes over the factors beside an evaluation, whose products take many times as long.
"""

import numpy as np

from fastdmf.kernels.cpu.slices import slices_move

__all__ = ["update_adam", "update_gd", "update_group_rmsprop", "update_momentum"]


def update_gd(x, grad, step_size, *, count=None):
    """Overwrite ``x`` with x - step_size grad; raise ``count`` by one."""
    slices_move(x, x, -step_size, grad)
    if count is not None:
        count += 1


def update_momentum(x, velocity, grad, step_size, beta, *, nesterov=False):
    """Overwrite v with beta v + grad, and x with x - step_size v, or with x - step_size (grad + beta v)."""
    beta = x.dtype.type(beta)
    velocity *= beta
    velocity += grad
    x -= step_size.astype(x.dtype)[:, None] * (grad + beta * velocity if nesterov else velocity)


def update_adam(x, mean, square, grad, step_size, beta1, beta2, eps, count):
    """Overwrite ``x``, ``mean`` and ``square`` with a step of Adam; raise ``count`` by one."""
    real = x.dtype.type
    count += 1
    mean += real(1 - beta1) * (grad - mean)
    square += real(1 - beta2) * (grad * grad - square)
    first, second = ((1 - beta**count).astype(real)[:, None] for beta in (beta1, beta2))
    root = np.sqrt(square / second)
    x -= step_size.astype(real)[:, None] * (mean / first) / (root + real(eps))


def update_group_rmsprop(step_size, mean_square, squares, lr, beta, eps, count):
    """Overwrite ``mean_square`` with beta v + (1 - beta) squares, and ``step_size`` with what the rule takes next.

    lr / (sqrt(v / (1 - beta^(count + 1))) + eps), where ``squares`` are those of the gradients at points to which
    ``count`` steps have led.
    """
    mean_square *= beta
    mean_square += (1 - beta) * squares
    step_size[:] = lr / (np.sqrt(mean_square / (1 - beta ** (count + 1))) + eps)
