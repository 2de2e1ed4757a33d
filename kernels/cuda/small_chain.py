"""Small chains on the device: how a problem lies in shared memory, and the launch of many steps of many problems."""

from dataclasses import dataclass

import numpy as np

from fastdmf.kernels.cuda import real_name
from fastdmf.kernels.cuda.checks import check_arguments, table

__all__ = ["CONVERGED", "DIVERGED", "MAX_ITER", "RUNNING", "SmallChainPlan", "small_chain"]

RUNNING, CONVERGED, MAX_ITER, DIVERGED = range(4)

_THREADS, _SIDE, _NARROW = 256, 16, 2  # as in small_chain.cu
_WIDEST = 128
_SHARED_BYTES = 227 * 1024  # of a block: an H100's
_OWN_BYTES = 256  # at least what the kernel's own variables take of them
_RULES = {"gd": 0, "momentum": 1, "nesterov": 2, "group_rmsprop": 3}
_PLAIN, _SECOND_TRANSPOSED, _FIRST_TRANSPOSED, _COPY = range(4)

_TABLE = table(
    **dict.fromkeys(("x", "grad"), "REAL B D"),
    velocity="REAL? B D",
    mean_square="float64? B",
    count="int64 B",
    status="int32 B",
    losses="float64 B",
    lr="float64 B",
    factors="REAL B",
    divisors="float64 B",
    ceilings="float64 B",
    indptr="int64 B n1+1",
    indices="int32 nnz",
    y="REAL nnz",
    w="REAL? nnz",
)


@dataclass(frozen=True)
class SmallChainPlan:
    """What the kernel does with the factors of one problem.

    Attributes
    ----------
    products : (any, 9) int32
        Kind, whether the result is a gradient, place and leading dimension of the result, places of both operands, and
        m, n, k; first those that come before the residuals.
    places : (N, 4) int32
        Where each factor lies: first number in the flat buffer, rows, columns, first number in shared memory.
    sizes : (4,) int32
        n1, n2, place of the predictions, place of G.
    before : int
        Products before the residuals.
    length : int
        Numbers in shared memory.
    widest : int
        Largest width.
    size : int
        Numbers of one problem in the flat buffer.
    rows : int
        n1.
    dtype : numpy dtype
    rule : str
    """

    products: object
    places: object
    sizes: object
    before: int
    length: int
    widest: int
    size: int
    rows: int
    dtype: object
    rule: str

    @classmethod
    def of(cls, dims, offsets, dtype, rule, *, shared_bytes=_SHARED_BYTES, to_device=lambda x: x):
        """Plan a chain.

        Parameters
        ----------
        dims : sequence of int
            d_0, ..., d_N.
        offsets : sequence of int
            Where the N factors begin in the flat buffer, and its length: W_1 as (d_0, d_1) unless it is alone, W_j as
            (d_j, d_{j-1}).
        dtype : float32 or float64
        rule : {"gd", "momentum", "nesterov", "group_rmsprop"}
        shared_bytes : int
            That a block of the device may have.
        to_device : callable
            For the three tables.

        Raises
        ------
        ValueError
            If a width is above 128, the problem does not fit in shared memory, or there is no such rule.
        """
        d, depth, dtype = [int(n) for n in dims], len(dims) - 1, np.dtype(dtype)
        if rule not in _RULES:
            raise ValueError(f"rule must be one of {sorted(_RULES)}, got {rule!r}")
        if max(d) > _WIDEST:
            raise ValueError(f"dims must be at most {_WIDEST} for a small chain, got {tuple(d)}")
        stored = [(d[0], d[1])] + [(d[j], d[j - 1]) for j in range(2, depth + 1)] if depth > 1 else [(d[1], d[0])]
        # Where all matrices begin. Short ones go first: threads read behind a matrix as far as their tile goes.
        matrices = {("w", j + 1): shape[0] for j, shape in enumerate(stored)}
        matrices |= {("r", j): d[j] for j in range(2, depth)} | {"g": d[-1]}
        ld, place, length = max(d) | 1, {}, 0
        for name in sorted(matrices, key=matrices.get):
            place[name], length = length, length + matrices[name] * ld
        products, before = _products(d, place, ld, offsets)
        length = max(length, *(_end(row, max(d)) for row in products))
        need = length * dtype.itemsize + _OWN_BYTES
        if need > shared_bytes:
            narrower = "fewer or narrower factors" + (", or float32" if dtype == np.float64 else "")
            raise ValueError(
                f"dims {tuple(d)} in {dtype} need {need:,} bytes of shared memory and a block has {shared_bytes:,}: "
                f"use {narrower}"
            )
        places = [(int(offsets[j]), *shape, place["w", j + 1]) for j, shape in enumerate(stored)]
        sizes = d[-1], d[0], place["g"] if depth > 1 else place["w", 1], place["g"]
        tables = (np.array(rows, np.int32) for rows in (products, places, sizes))
        return cls(*map(to_device, tables), before, length, max(d), int(offsets[-1]), d[-1], dtype, rule)

    def options(self):
        """Return the compiler's options."""
        tile, ld = _tile(self.widest), self.widest | 1
        types = [f"-DREAL={real_name(self.dtype)}", f"-DSTORED={real_name(self.dtype)}"]
        return [*types, f"-DTILE={tile}", f"-DLD={ld}", f"-DRULE={_RULES[self.rule]}"]


def _products(d, place, ld, offsets):
    """Return the rows of the table, and how many of them come before the residuals."""
    depth = len(d) - 1

    def right(j):
        """Return the place of R_j = W_j ... W_1, or of what has taken its place."""
        return place["g"] if j == depth else place["w", 1] if j == 1 else place["r", j]

    def gradient(kind, j, a, b, m, n, k):
        return kind, 1, int(offsets[j - 1]), n, a, b, m, n, k

    if depth == 1:
        return [gradient(_COPY, 1, place["g"], place["g"], d[1], d[0], 0)], 0
    # R_1 is W_1, which is stored transposed.
    forward = [
        (_PLAIN if j > 2 else _SECOND_TRANSPOSED, 0, right(j), ld, place["w", j], right(j - 1), d[j], d[0], d[j - 1])
        for j in range(2, depth + 1)
    ]
    backward = []
    for j in range(depth, 1, -1):
        kind = _SECOND_TRANSPOSED if j > 2 else _PLAIN
        backward.append(gradient(kind, j, right(j), right(j - 1), d[j], d[j - 1], d[0]))
        if j > 2:
            operands = place["w", j], right(j)
            backward.append((_FIRST_TRANSPOSED, 0, right(j - 1), ld, *operands, d[j - 1], d[0], d[j]))
    backward.append(gradient(_FIRST_TRANSPOSED, 1, right(2), place["w", 2], d[0], d[1], d[2]))
    return [*forward, *backward], len(forward)


def _tile(widest):
    """Return how many rows and columns of a result a thread has."""
    return -(-widest // _SIDE)


def _end(row, widest):
    """Return where the reads of a product end, those behind its edges included."""
    kind, _, _, _, a, b, m, n, k = row
    if kind == _COPY:
        return 0
    tile, ld = _tile(widest), widest | 1
    reach = [_SIDE * (min(tile, _NARROW) if size <= _SIDE * min(tile, _NARROW) else tile) for size in (m, n)]
    ends = [
        place + ((k - 1) * ld + far if across else (far - 1) * ld + k)
        for place, far, across in zip((a, b), reach, (kind == _FIRST_TRANSPOSED, kind != _SECOND_TRANSPOSED))
    ]
    return max(ends)


def small_chain(
    module,
    plan,
    x,
    grad,
    velocity,
    mean_square,
    count,
    status,
    losses,
    lr,
    factors,
    divisors,
    ceilings,
    indptr,
    indices,
    y,
    w,
    code,
    delta,
    beta,
    eps,
    tol,
    max_iter,
    check_every,
    turns,
):
    """Go on with every problem that is ``RUNNING``, for ``turns`` steps or some more, or until it has ended.

    Parameters
    ----------
    module, plan
        The family ``small_chain`` with the plan's options, and the plan.
    x : (B, D)
        The factors, one problem a slice; overwritten with the last point at which a problem looked whether to end, and
        was not diverging.
    grad : (B, D)
        Scratch.
    velocity : (B, D) or None
        For ``"momentum"`` and ``"nesterov"``; zero at the start, overwritten.
    mean_square : (B,) float64 or None
        For ``"group_rmsprop"``; zero at the start, overwritten.
    count, status, losses : (B,) int64, int32 and float64
        The table of results, overwritten: steps taken, ``RUNNING``, ``CONVERGED``, ``MAX_ITER`` or ``DIVERGED``, and
        sum w rho there. 0 and ``RUNNING`` at the start.
    lr, factors : (B,) float64 and (B,)
        Learning rates; the gradient is that of factors / 2 times sum w rho.
    divisors, ceilings : (B,) float64
        A problem has converged when its sum w rho / divisors <= ``tol``, and diverged when it is not <= ceilings.
    indptr, indices, y, w
        All entries, problem by problem and row by row: (B, n1 + 1) int64, the places at which the rows begin and the
        last one ends, (nnz,) int32 columns, no two the same in a row, and (nnz,) twice; ``w`` may be None.
    code, delta
        The loss, as for the kernels of the CPU.
    beta, eps : float
        Settings of the rule.
    tol : float
    max_iter, check_every : int
        A problem looks whether to end at multiples of ``check_every`` and at ``max_iter``.
    turns : int
        Steps; the launch ends at the next multiple of ``check_every``. A descent gives the same bits in any number of
        launches.
    """
    sizes = {"REAL": plan.dtype.name, "D": plan.size, "n1": plan.rows}
    needs = {"velocity": velocity, "mean_square": mean_square}
    needed = {"momentum": "velocity", "nesterov": "velocity", "group_rmsprop": "mean_square"}.get(plan.rule)
    if needed and needs[needed] is None:
        raise ValueError(f"{needed} must be an array for rule {plan.rule!r}, got None")
    arrays = {
        **{"x": x, "grad": grad, **needs, "count": count, "status": status, "losses": losses, "lr": lr},
        **{"factors": factors, "divisors": divisors, "ceilings": ceilings},
        **{"indptr": indptr, "indices": indices, "y": y, "w": w},
    }
    check_arguments(_TABLE, sizes, **arrays)
    for name, number in (("max_iter", max_iter), ("check_every", check_every), ("turns", turns)):
        if number < (name != "max_iter"):
            raise ValueError(f"{name} must be at least {int(name != 'max_iter')}, got {number!r}")
    tables = plan.products, plan.places, plan.sizes
    counts = np.int32(len(plan.products)), np.int32(plan.before), np.int32(len(plan.places)), np.int64(plan.size)
    loss = np.int32(code), plan.dtype.type(delta)
    settings = np.float64(beta), np.float64(eps), np.float64(tol)
    steps = np.int64(max_iter), np.int64(check_every), np.int64(turns)
    arguments = (*arrays.values(), *tables, *counts, *loss, *settings, *steps)
    shared = plan.length * plan.dtype.itemsize
    module.launch("small_chain", (len(x),), (_THREADS,), arguments, shared=shared)
