"""Limited-memory BFGS with scalar coefficients and its line search on a batch: two passes over the memory a step.

The memory of a slice is a ring of K places for pairs s = x_{t+1} - x_t, y = g_{t+1} - g_t; at most K - 1 are held, so
that a new pair can be written before it is judged. Row i of ``pairs`` (B, 2 K, D) is the s of place i, row K + i its y.

The direction is -H g in the compact form of BFGS (Byrd, Nocedal and Schnabel 1994, eq. 2.22; the same H as the
two-loop recursion): H g = gamma g + S a + Y b, whose coefficients follow from inner products of the memory, kept by
recurrence, and from [S Y]^T g. So a step reads the memory twice, once for those products and once for the direction,
and everything else that a step does on vectors rides along. With D = 30,000 in float64 and ten pairs, 4.8 MB in the
third-level cache, either pass runs at that cache's bandwidth (bench/overhead.py). The search's decisions are made
here too: as array expressions over one slice they took 60 us a step, a third of what the passes take.

One compiled function prepares a direction and one judges a trial; large slices call them in two parts, with the passes
over vectors between them in parallel. What they share is inlined by numba: as functions of their own it was compiled
once more inside every caller.

All buffers are C-contiguous and D is a multiple of a cache line, as ``fastdmf.chain.Layout`` makes it. Sums are taken
in ranges of ``_RANGE`` numbers and added in order in float64: no bit depends on the number of threads.
"""

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.vectors import (
    add,
    fma,
    fold,
    load,
    load_row,
    mul,
    row_width,
    splat,
    store,
    sub,
    sum1,
    zero,
    zero_row,
)

__all__ = ["lbfgs_coefficients", "lbfgs_judge", "lbfgs_try"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}

_RANGE = 4096  # numbers of one partial sum, and of one item of parallel work; 1024 was 8 % slower (D = 30,000)
_SERIAL = 1 << 20  # numbers of the memory under which a parallel region costs more than it saves
_WHOLE, _BEFORE, _AFTER = range(3)  # parts of the work on a slice: all, or what stands around the passes over vectors


@njit(inline="always", **_SETTINGS)
def lbfgs_coefficients(coefficients, s_y, y_y, products, newest, held):
    """Overwrite ``coefficients`` with those of H g in the memory of one slice, and return gamma.

    With R the upper triangle of S^T Y, oldest pair first, and D its diagonal: R a' = S^T g, b = -gamma a',
    R^T a = (D + gamma Y^T Y) a' - gamma Y^T g.

    Parameters
    ----------
    coefficients, products : (2 K,) float64
        a, then b; s_i . g, then y_i . g. By place; coefficients of places that are not held are zero.
    s_y, y_y : (K, K) float64
        s_i . y_j and y_i . y_j, by place.
    newest, held : int
        Place of the newest pair, and how many are held (at least one).

    Returns
    -------
    gamma : float
        s . y / y . y of the newest pair.
    """
    places = s_y.shape[0]
    gamma = s_y[newest, newest] / y_y[newest, newest]
    coefficients[:] = 0
    # Ages count down to the newest pair, 0. First a' in the place of b.
    for age in range(held):
        i = (newest - age) % places
        total = products[i]
        for younger in range(age):
            j = (newest - younger) % places
            total -= s_y[i, j] * coefficients[places + j]
        coefficients[places + i] = total / s_y[i, i]
    for age in range(held - 1, -1, -1):
        i = (newest - age) % places
        total = s_y[i, i] * coefficients[places + i] - gamma * products[places + i]
        for other in range(held):
            j = (newest - other) % places
            total += gamma * y_y[i, j] * coefficients[places + j]
        for older in range(age + 1, held):
            j = (newest - older) % places
            total -= s_y[j, i] * coefficients[j]
        coefficients[i] = total / s_y[i, i]
    for i in range(places, 2 * places):
        coefficients[i] *= -gamma
    return gamma


@njit(inline="always", **_SETTINGS)
def _remember(sums, b, k, pairs, newest, held, trial, x, trial_grad, grad):
    """Write range k of one slice's new pair, and the sums of that range.

    sums = s.s, s.y, y.y, s.g, y.g with the gradient g at the new point, then s_i . g and y_i . g by place.
    """
    _, rows, size = pairs.shape
    places, at, begin, end = rows // 2, b * size, k * _RANGE, min((k + 1) * _RANGE, size)
    s_at = (b * rows + (newest + 1) % places) * size
    y_at = s_at + places * size
    lanes, step = row_width(x, (0,)), row_width(x, (0, 0))
    ss = sy = yy = sg = yg = zero(x)
    for c in range(begin, end, lanes):
        g = load(trial_grad, at + c)
        s, y = sub(load(trial, at + c), load(x, at + c)), sub(g, load(grad, at + c))
        store(pairs, s_at + c, s)
        store(pairs, y_at + c, y)
        ss, sy, yy, sg, yg = fma(s, s, ss), fma(s, y, sy), fma(y, y, yy), fma(s, g, sg), fma(y, g, yg)
    sums[0], sums[1], sums[2], sums[3], sums[4] = sum1(ss), sum1(sy), sum1(yy), sum1(sg), sum1(yg)
    whole = begin + (end - begin) // step * step
    for age in range(0, held, 2):
        # Two pairs at once; the last of an odd number meets itself.
        i, j = (newest - age) % places, (newest - min(age + 1, held - 1)) % places
        r0, r1 = (b * rows + i) * size, (b * rows + j) * size
        r2, r3 = r0 + places * size, r1 + places * size
        s0 = s1 = s2 = s3 = zero_row(x, (0, 0))
        for c in range(begin, whole, step):
            g = load_row(trial_grad, at + c, (0, 0))
            s0 = fma(g, load_row(pairs, r0 + c, (0, 0)), s0)
            s1 = fma(g, load_row(pairs, r1 + c, (0, 0)), s1)
            s2 = fma(g, load_row(pairs, r2 + c, (0, 0)), s2)
            s3 = fma(g, load_row(pairs, r3 + c, (0, 0)), s3)
        t0, t1, t2, t3 = fold(s0), fold(s1), fold(s2), fold(s3)
        for c in range(whole, end, lanes):
            z = load(trial_grad, at + c)
            t0 = fma(z, load(pairs, r0 + c), t0)
            t1 = fma(z, load(pairs, r1 + c), t1)
            t2 = fma(z, load(pairs, r2 + c), t2)
            t3 = fma(z, load(pairs, r3 + c), t3)
        sums[5 + i], sums[5 + j], sums[5 + places + i], sums[5 + places + j] = sum1(t0), sum1(t1), sum1(t2), sum1(t3)


@njit(parallel=True, **_SETTINGS)
def _remember_parallel(partial, pairs, newest, held, trial, x, trial_grad, grad, moved):
    ranges = partial.shape[1]
    for item in prange(partial.shape[0] * ranges):
        b, k = item // ranges, item % ranges
        if moved[b]:
            _remember(partial[b, k], b, k, pairs, newest[b], held[b], trial, x, trial_grad, grad)


@njit(**_SETTINGS)
def _judge(
    part,
    moved,
    partial,
    accepted,
    pairs,
    s_y,
    y_y,
    products,
    coefficients,
    gamma,
    newest,
    held,
    slope,
    stretch,
    step_size,
    base,
    trials,
    restarts,
    fresh,
    failed,
    trial,
    x,
    trial_grad,
    grad,
    objective,
    trial_objective,
    far,
    searching,
    armijo,
    cosine_far,
    cosine_near,
    shrink,
    most_trials,
    most_restarts,
):
    """Judge on the calling thread: all, or what comes before or after the passes that write the pairs."""
    places = s_y.shape[1]
    for b in range(len(searching)):
        if searching[b] and part != _AFTER:
            accepted[b] = trial_objective[b] <= objective[b] + armijo * stretch[b] * slope[b]
        moved[b] = searching[b] and accepted[b]
        if part == _BEFORE:
            continue
        if moved[b]:
            sums = partial[b, 0]
            for k in range(partial.shape[1]):
                if part == _WHOLE:
                    _remember(partial[b, k], b, k, pairs, newest[b], held[b], trial, x, trial_grad, grad)
                if k > 0:
                    for e in range(len(sums)):
                        sums[e] += partial[b, k, e]
            # The inner products with the new pair. Y^T s of the new s needs no pass: s is the direction times
            # ``stretch``, whose coefficients are known. S^T y and Y^T y of the new y are the changes of [S Y]^T g.
            place = (newest[b] + 1) % places
            cosine = cosine_far if objective[b] > far[b] else cosine_near
            keep = sums[1] > cosine * np.sqrt(sums[0] * sums[2])
            for age in range(held[b]):
                j = (newest[b] - age) % places
                s_g, y_g = sums[5 + j], sums[5 + places + j]
                if keep:
                    y_d = gamma[b] * products[b, places + j]
                    for other in range(held[b]):
                        i = (newest[b] - other) % places
                        y_d += coefficients[b, i] * s_y[b, i, j] + coefficients[b, places + i] * y_y[b, i, j]
                    s_y[b, place, j] = -stretch[b] * y_d
                    s_y[b, j, place] = s_g - products[b, j]
                    y_y[b, place, j] = y_y[b, j, place] = y_g - products[b, places + j]
                products[b, j], products[b, places + j] = s_g, y_g
            if keep:
                s_y[b, place, place], y_y[b, place, place] = sums[1], sums[2]
                products[b, place], products[b, places + place] = sums[3], sums[4]
                newest[b], held[b] = place, min(held[b] + 1, places - 1)
            fresh[b], restarts[b] = True, 0
        elif searching[b]:
            trials[b] += 1
            stretch[b] *= shrink
            step_size[b] = stretch[b]
            if trials[b] >= most_trials:
                held[b], fresh[b] = 0, True
                base[b] *= 0.5
                restarts[b] += 1
                failed[b] |= restarts[b] >= most_restarts


def lbfgs_judge(accepted, memory, search, points, objectives, far, searching, settings):
    """Accept or refuse the trials of the slices that are ``searching``, and prepare their next ones.

    An accepted one gives its pair s = trial - x, y = trial_grad - grad to the memory, if the cosine of the angle
    between them is large enough. A refused one shrinks its step; after some trials the memory is cleared and ``base``
    halved, and after some such restarts the slice has failed.

    Parameters
    ----------
    accepted : (B,) bool
        Overwritten where searching.
    memory : tuple of arrays
        pairs (B, 2 K, D); s_y and y_y (B, K, K), s_i . y_j and y_i . y_j by place; products (B, 2 K), [S Y]^T of the
        gradient, of the new one after a move; coefficients (B, 2 K) and gamma (B,) of the direction; newest and held
        (B,) int64, the place of the newest pair and how many there are. All but the two integers and the pairs are
        float64. Overwritten for the slices that move.
    search : tuple of arrays of shape (B,)
        slope = grad . direction, stretch with trial = x + stretch direction, step_size (what is recorded), base (the
        step without a memory), float64; trials and restarts, int64; fresh (asks for a new direction) and failed, bool.
        Overwritten where searching.
    points : tuple of arrays of shape (B, D)
        trial, x, trial_grad, grad.
    objectives : pair of arrays of shape (B,)
        At x and at the trial.
    far, searching : (B,) float64, (B,) bool
    settings : tuple
        The constant of Armijo's test, the least cosine where the objective is above ``far`` and elsewhere, the factor
        of refused steps, the trials to a restart, the restarts to a failure.
    """
    pairs, *inner = memory
    runs, rows, size = pairs.shape
    moved, partial = np.empty(runs, bool), np.zeros((runs, -(-size // _RANGE), 5 + rows))
    everything = moved, partial, accepted, *memory, *search, *points, *objectives, far, searching, *settings
    if pairs.size < _SERIAL:
        _judge(_WHOLE, *everything)
        return
    _judge(_BEFORE, *everything)
    _remember_parallel(partial, pairs, *inner[5:], *points, moved)
    _judge(_AFTER, *everything)


@njit(inline="always", **_SETTINGS)
def _direct(b, k, direction, trial, pairs, coefficients, gamma, newest, held, x, grad):
    """Write range k of one slice's direction and trial; return the range's part of the slope."""
    _, rows, size = pairs.shape
    places, at = rows // 2, b * size
    begin, end, lanes = k * _RANGE, min((k + 1) * _RANGE, size), row_width(x, (0,))
    z0 = splat(x, -gamma)
    for c in range(at + begin, at + end, lanes):
        store(direction, c, mul(z0, load(grad, c)))
    for age in range(0, held, 2):
        # Two pairs at once; the last of an odd number meets itself and counts once.
        i, j = (newest - age) % places, (newest - min(age + 1, held - 1)) % places
        once = 1.0 if age + 1 < held else 0.0
        z0, z1 = splat(x, -coefficients[b, i]), splat(x, -once * coefficients[b, j])
        z2, z3 = splat(x, -coefficients[b, places + i]), splat(x, -once * coefficients[b, places + j])
        r0, r1 = (b * rows + i) * size, (b * rows + j) * size
        r2, r3 = r0 + places * size, r1 + places * size
        for c in range(begin, end, lanes):
            d = fma(z0, load(pairs, r0 + c), load(direction, at + c))
            d = fma(z1, load(pairs, r1 + c), d)
            d = fma(z2, load(pairs, r2 + c), d)
            store(direction, at + c, fma(z3, load(pairs, r3 + c), d))
    slope = zero(x)
    for c in range(at + begin, at + end, lanes):
        d = load(direction, c)
        slope = fma(d, load(grad, c), slope)
        store(trial, c, add(load(x, c), d))
    return sum1(slope)


@njit(parallel=True, **_SETTINGS)
def _direct_parallel(partial, direction, trial, pairs, coefficients, gamma, newest, held, x, grad, aimed):
    ranges = partial.shape[1]
    for item in prange(partial.size):
        b, k = item // ranges, item % ranges
        if aimed[b]:
            partial[b, k] = _direct(b, k, direction, trial, pairs, coefficients, gamma[b], newest[b], held[b], x, grad)


@njit(**_SETTINGS)
def _try(
    part,
    aimed,
    partial,
    pairs,
    s_y,
    y_y,
    products,
    coefficients,
    gamma,
    newest,
    held,
    slope,
    stretch,
    step_size,
    base,
    trials,
    fresh,
    failed,
    trial,
    direction,
    x,
    grad,
    searching,
):
    """Try on the calling thread: all, or what comes before or after the passes that write the directions.

    ``aimed`` are the slices that need such a pass; says whether there is one whose memory was cleared.
    """
    again, size = False, x.shape[1]
    for b in range(len(searching)):
        aimed[b] = searching[b] and fresh[b]
        if searching[b] and not fresh[b] and part != _AFTER:
            t = splat(x, stretch[b])
            for c in range(b * size, (b + 1) * size, row_width(x, (0,))):
                store(trial, c, fma(t, load(direction, c), load(x, c)))
        turning = aimed[b]
        while turning:
            if part != _AFTER:
                coefficients[b], gamma[b] = 0, base[b]
                if held[b]:
                    gamma[b] = lbfgs_coefficients(coefficients[b], s_y[b], y_y[b], products[b], newest[b], held[b])
            if part == _BEFORE:
                break
            slope[b] = 0.0
            for k in range(partial.shape[1]):
                if part == _WHOLE:
                    partial[b, k] = _direct(
                        b, k, direction, trial, pairs, coefficients, gamma[b], newest[b], held[b], x, grad
                    )
                slope[b] += partial[b, k]
            if held[b] and not slope[b] < 0:
                held[b], again = 0, True
                turning = part == _WHOLE
            else:
                fresh[b], trials[b], stretch[b], step_size[b] = False, 0, 1.0, 1.0
                failed[b] |= not slope[b] < 0
                turning = False
    return again


def lbfgs_try(memory, search, points, searching):
    """Write the trial of every slice that is ``searching``: a new direction where it is fresh, else the shorter step.

    direction = -H grad, and trial = x + direction. A slice without pairs goes along -base grad; so does one whose
    direction would not descend, and its memory is cleared; one that would not descend even so has failed.

    Parameters
    ----------
    memory, search, searching
        As for ``lbfgs_judge``; what depends on the direction is overwritten for those slices.
    points : tuple of arrays of shape (B, D)
        trial and direction, overwritten for those slices; x and grad.
    """
    pairs, *inner, newest, held = memory
    slope, stretch, step_size, base, trials, _, fresh, failed = search
    trial, direction, x, grad = points
    aimed, partial = np.empty(len(x), bool), np.empty((len(x), -(-x.shape[1] // _RANGE)))
    everything = aimed, partial, *memory, slope, stretch, step_size, base, trials, fresh, failed, *points, searching
    if pairs.size < _SERIAL:
        _try(_WHOLE, *everything)
        return
    again = True
    while again:
        _try(_BEFORE, *everything)
        _direct_parallel(partial, direction, trial, pairs, *inner[3:], newest, held, x, grad, aimed)
        again = _try(_AFTER, *everything)
