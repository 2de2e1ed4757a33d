"""Limited-memory BFGS with scalar coefficients and its line search on a batch: two passes over the memory a step.

The memory of a slice is a ring of K places for pairs s = x_{t+1} - x_t, y = g_{t+1} - g_t; at most K - 1 are held, so
that a new pair can be written before it is judged. Row i of ``pairs`` (B, 2 K, D) is the s of place i, row K + i its y.

The direction is -H g in the compact form of BFGS (Byrd, Nocedal and Schnabel 1994, eq. 2.22; the same H as the
two-loop recursion): H g = gamma g + S a + Y b, whose coefficients follow from inner products of the memory, kept by
recurrence, and from [S Y]^T g. So a step reads the memory twice, once for those products and once for the direction,
and everything else that a step does on vectors rides along. With D = 30,000 in float64 and ten pairs, 4.8 MB in the
third-level cache, either pass runs at that cache's bandwidth (bench/overhead.py). The search's decisions are made
here too: as array expressions over one slice they took 60 us a step, a third of what the passes take.

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
BUILT_ON = {"vectors": "fda00a159f57"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}

_RANGE = 4096  # numbers of one partial sum, and of one item of parallel work; 1024 was 8 % slower (D = 30,000)
_SERIAL = 1 << 20  # numbers of the memory under which a parallel region costs more than it saves


@njit(**_SETTINGS)
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
        i = (newest - age + places) % places
        total = products[i]
        for younger in range(age):
            j = (newest - younger + places) % places
            total -= s_y[i, j] * coefficients[places + j]
        coefficients[places + i] = total / s_y[i, i]
    for age in range(held - 1, -1, -1):
        i = (newest - age + places) % places
        total = s_y[i, i] * coefficients[places + i] - gamma * products[places + i]
        for other in range(held):
            j = (newest - other + places) % places
            total += gamma * y_y[i, j] * coefficients[places + j]
        for older in range(age + 1, held):
            j = (newest - older + places) % places
            total -= s_y[j, i] * coefficients[j]
        coefficients[i] = total / s_y[i, i]
    for i in range(places, 2 * places):
        coefficients[i] *= -gamma
    return gamma


@njit(**_SETTINGS)
def _row(k, newest, held, places):
    """Return the row of ``pairs`` that is number k of those held, s and y in turn; behind them the last one again."""
    k = min(k, 2 * held - 1)
    return (newest - k // 2 + places) % places + k % 2 * places


@njit(**_SETTINGS)
def _write_pair(sums, pairs, s_at, y_at, trial, x, trial_grad, grad, at, begin, end):
    """Write a range of a new pair; sums = s.s, s.y, y.y, s.g, y.g with the gradient g at the new point."""
    ss = sy = yy = sg = yg = zero(x)
    for c in range(begin, end, row_width(x, (0,))):
        g = load(trial_grad, at + c)
        s, y = sub(load(trial, at + c), load(x, at + c)), sub(g, load(grad, at + c))
        store(pairs, s_at + c, s)
        store(pairs, y_at + c, y)
        ss, sy, yy, sg, yg = fma(s, s, ss), fma(s, y, sy), fma(y, y, yy), fma(s, g, sg), fma(y, g, yg)
    sums[0], sums[1], sums[2], sums[3], sums[4] = sum1(ss), sum1(sy), sum1(yy), sum1(sg), sum1(yg)


@njit(**_SETTINGS)
def _four_dots(sums, k, pairs, r0, r1, r2, r3, g, at, begin, end):
    """Write the inner products of a range of four rows with g to sums[k:]."""
    like = (0, 0)
    s0 = s1 = s2 = s3 = zero_row(g, like)
    step = row_width(g, like)
    whole = begin + (end - begin) // step * step
    for c in range(begin, whole, step):
        x = load_row(g, at + c, like)
        s0 = fma(x, load_row(pairs, r0 + c, like), s0)
        s1 = fma(x, load_row(pairs, r1 + c, like), s1)
        s2 = fma(x, load_row(pairs, r2 + c, like), s2)
        s3 = fma(x, load_row(pairs, r3 + c, like), s3)
    t0, t1, t2, t3 = fold(s0), fold(s1), fold(s2), fold(s3)
    for c in range(whole, end, row_width(g, (0,))):
        z = load(g, at + c)
        t0 = fma(z, load(pairs, r0 + c), t0)
        t1 = fma(z, load(pairs, r1 + c), t1)
        t2 = fma(z, load(pairs, r2 + c), t2)
        t3 = fma(z, load(pairs, r3 + c), t3)
    sums[k], sums[k + 1], sums[k + 2], sums[k + 3] = sum1(t0), sum1(t1), sum1(t2), sum1(t3)


@njit(**_SETTINGS)
def _remember_range(partial, item, pairs, newest, held, trial, x, trial_grad, grad, moved):
    """Write a range of one slice's new pair, and the sums of that range: of the pair, then of every row held."""
    _, rows, size = pairs.shape
    b, k = item // partial.shape[1], item % partial.shape[1]
    if not moved[b]:
        return
    places, base = rows // 2, b * rows
    begin, end = k * _RANGE, min((k + 1) * _RANGE, size)
    place, sums = (newest[b] + 1) % places, partial[b, k]
    s_at, y_at = (base + place) * size, (base + places + place) * size
    _write_pair(sums, pairs, s_at, y_at, trial, x, trial_grad, grad, b * size, begin, end)
    for e in range(0, 2 * held[b], 4):
        r0 = (base + _row(e, newest[b], held[b], places)) * size
        r1 = (base + _row(e + 1, newest[b], held[b], places)) * size
        r2 = (base + _row(e + 2, newest[b], held[b], places)) * size
        r3 = (base + _row(e + 3, newest[b], held[b], places)) * size
        _four_dots(sums, 5 + e, pairs, r0, r1, r2, r3, trial_grad, b * size, begin, end)


@njit(**_SETTINGS)
def _update(sums, s_y, y_y, products, coefficients, gamma, newest, held, cosine, stretch):
    """Update the inner products of one slice from the sums; return the newest place and how many pairs are held.

    Y^T s of the new s needs no pass: s is the direction times ``stretch``, and its coefficients are known. S^T y and
    Y^T y of the new y are the changes of [S Y]^T g.
    """
    places = s_y.shape[0]
    place, old = (newest + 1) % places, products.copy()
    for k in range(2 * held):
        products[_row(k, newest, held, places)] = sums[5 + k]
    if not sums[1] > cosine * np.sqrt(sums[0] * sums[2]):
        return newest, held
    for k in range(0, 2 * held, 2):
        j = _row(k, newest, held, places)
        y_d = gamma * old[places + j]
        for e in range(0, 2 * held, 2):
            i = _row(e, newest, held, places)
            y_d += coefficients[i] * s_y[i, j] + coefficients[places + i] * y_y[i, j]
        s_y[place, j] = -stretch * y_d
        s_y[j, place] = products[j] - old[j]
        y_y[place, j] = y_y[j, place] = products[places + j] - old[places + j]
    s_y[place, place], y_y[place, place] = sums[1], sums[2]
    products[place], products[places + place] = sums[3], sums[4]
    return place, min(held + 1, places - 1)


@njit(**_SETTINGS)
def _sums(pairs):
    """Return room for the sums of every range: of the pair, of the rows, and two more that groups of four may write."""
    return np.empty((pairs.shape[0], -(-pairs.shape[2] // _RANGE), pairs.shape[1] + 7))


@njit(**_SETTINGS)
def _remember(partial, pairs, newest, held, trial, x, trial_grad, grad, moved):
    """Write the pairs of the slices that are about to move from x to trial, and their sums."""
    for item in range(partial.shape[0] * partial.shape[1]):
        _remember_range(partial, item, pairs, newest, held, trial, x, trial_grad, grad, moved)


@njit(parallel=True, **_SETTINGS)
def _remember_parallel(partial, pairs, newest, held, trial, x, trial_grad, grad, moved):
    for item in prange(partial.shape[0] * partial.shape[1]):
        _remember_range(partial, item, pairs, newest, held, trial, x, trial_grad, grad, moved)


@njit(**_SETTINGS)
def _accept(accepted, moved, searching, objective, trial_objective, stretch, slope, armijo):
    """Decide for the slices that are searching; ``moved`` are the accepted ones of those."""
    for b in range(len(searching)):
        if searching[b]:
            accepted[b] = trial_objective[b] <= objective[b] + armijo * stretch[b] * slope[b]
        moved[b] = searching[b] and accepted[b]


@njit(**_SETTINGS)
def _settle(
    partial,
    s_y,
    y_y,
    products,
    coefficients,
    gamma,
    newest,
    held,
    stretch,
    step_size,
    base,
    trials,
    restarts,
    fresh,
    failed,
    objective,
    far,
    cosine_far,
    cosine_near,
    searching,
    moved,
    shrink,
    most_trials,
    most_restarts,
):
    """Bring the memory of the slices that move up to date, and shorten the steps of those that do not."""
    for b in range(len(searching)):
        if moved[b]:
            sums = partial[b, 0]
            for k in range(1, partial.shape[1]):
                for e in range(5 + 2 * held[b]):
                    sums[e] += partial[b, k, e]
            inner = s_y[b], y_y[b], products[b], coefficients[b]
            cosine = cosine_far if objective[b] > far[b] else cosine_near
            newest[b], held[b] = _update(sums, *inner, gamma[b], newest[b], held[b], cosine, stretch[b])
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


@njit(**_SETTINGS)
def _judge(
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
    """Judge in one call, on the calling thread."""
    moved, partial = np.empty(len(searching), np.bool_), _sums(pairs)
    _accept(accepted, moved, searching, objective, trial_objective, stretch, slope, armijo)
    _remember(partial, pairs, newest, held, trial, x, trial_grad, grad, moved)
    _settle(
        partial,
        s_y,
        y_y,
        products,
        coefficients,
        gamma,
        newest,
        held,
        stretch,
        step_size,
        base,
        trials,
        restarts,
        fresh,
        failed,
        objective,
        far,
        cosine_far,
        cosine_near,
        searching,
        moved,
        shrink,
        most_trials,
        most_restarts,
    )


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
    slope, *rest = search
    if pairs.size < _SERIAL:
        _judge(accepted, *memory, *search, *points, *objectives, far, searching, *settings)
        return
    armijo, cosine_far, cosine_near, *limits = settings
    moved, partial = np.empty(len(searching), np.bool_), _sums(pairs)
    _accept(accepted, moved, searching, *objectives, search[1], slope, armijo)
    _remember_parallel(partial, pairs, *inner[5:], *points, moved)
    _settle(partial, *inner, *rest, objectives[0], far, cosine_far, cosine_near, searching, moved, *limits)


@njit(**_SETTINGS)
def _subtract_four(out, at, pairs, r0, r1, r2, r3, c0, c1, c2, c3, begin, end):
    """Subtract four rows with their coefficients from a range of ``out``."""
    z0, z1, z2, z3 = splat(out, -c0), splat(out, -c1), splat(out, -c2), splat(out, -c3)
    for c in range(begin, end, row_width(out, (0,))):
        d = fma(z0, load(pairs, r0 + c), load(out, at + c))
        d = fma(z1, load(pairs, r1 + c), d)
        d = fma(z2, load(pairs, r2 + c), d)
        store(out, at + c, fma(z3, load(pairs, r3 + c), d))


@njit(**_SETTINGS)
def _direct_range(partial, item, direction, trial, pairs, coefficients, gamma, newest, held, x, grad, aimed):
    """Write a range of one slice's direction and trial, and the range's part of the slope."""
    _, rows, size = pairs.shape
    b, k = item // partial.shape[1], item % partial.shape[1]
    if not aimed[b]:
        return
    places, base, at = rows // 2, b * rows, b * size
    begin, end = k * _RANGE, min((k + 1) * _RANGE, size)
    lanes, factor = row_width(x, (0,)), splat(x, -gamma[b])
    for c in range(at + begin, at + end, lanes):
        store(direction, c, mul(factor, load(grad, c)))
    for e in range(0, 2 * held[b], 4):
        i0, i1 = _row(e, newest[b], held[b], places), _row(e + 1, newest[b], held[b], places)
        i2, i3 = _row(e + 2, newest[b], held[b], places), _row(e + 3, newest[b], held[b], places)
        c0, c1, c2, c3 = coefficients[b, i0], coefficients[b, i1], coefficients[b, i2], coefficients[b, i3]
        if e + 2 >= 2 * held[b]:
            c2 = c3 = 0.0  # rows behind the last one repeat it
        r0, r1, r2, r3 = (base + i0) * size, (base + i1) * size, (base + i2) * size, (base + i3) * size
        _subtract_four(direction, at, pairs, r0, r1, r2, r3, c0, c1, c2, c3, begin, end)
    slope = zero(x)
    for c in range(at + begin, at + end, lanes):
        d = load(direction, c)
        slope = fma(d, load(grad, c), slope)
        store(trial, c, add(load(x, c), d))
    partial[b, k] = sum1(slope)


@njit(**_SETTINGS)
def _direct(partial, direction, trial, pairs, coefficients, gamma, newest, held, x, grad, aimed):
    """Write direction and trial of the slices ``aimed`` from their coefficients, and the parts of their slopes."""
    for item in range(partial.size):
        _direct_range(partial, item, direction, trial, pairs, coefficients, gamma, newest, held, x, grad, aimed)


@njit(parallel=True, **_SETTINGS)
def _direct_parallel(partial, direction, trial, pairs, coefficients, gamma, newest, held, x, grad, aimed):
    for item in prange(partial.size):
        _direct_range(partial, item, direction, trial, pairs, coefficients, gamma, newest, held, x, grad, aimed)


@njit(**_SETTINGS)
def _aim(s_y, y_y, products, coefficients, gamma, newest, held, base, aimed):
    """Set the coefficients of the slices ``aimed``."""
    for b in range(len(aimed)):
        if aimed[b]:
            if held[b]:
                gamma[b] = lbfgs_coefficients(coefficients[b], s_y[b], y_y[b], products[b], newest[b], held[b])
            else:
                coefficients[b], gamma[b] = 0, base[b]


@njit(**_SETTINGS)
def _check(partial, slope, held, aimed):
    """Add up the slopes; clear the memory of what does not descend, and say whether there is such a slice.

    ``aimed`` are those slices afterwards.
    """
    again = False
    for b in range(len(aimed)):
        if aimed[b]:
            slope[b] = 0.0
            for k in range(partial.shape[1]):
                slope[b] += partial[b, k]
            aimed[b] = held[b] > 0 and not slope[b] < 0
            if aimed[b]:
                held[b], again = 0, True
    return again


@njit(**_SETTINGS)
def _start(direction, trial, slope, stretch, step_size, trials, fresh, failed, x, searching):
    """Start the search along new directions; write the trials of those that go on with the old one."""
    size = x.shape[1]
    for b in range(len(searching)):
        if searching[b] and fresh[b]:
            fresh[b], trials[b] = False, 0
            stretch[b] = step_size[b] = 1.0
            failed[b] |= not slope[b] < 0
        elif searching[b]:
            t = splat(x, stretch[b])
            for c in range(b * size, (b + 1) * size, row_width(x, (0,))):
                store(trial, c, fma(t, load(direction, c), load(x, c)))


@njit(**_SETTINGS)
def _try(
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
    """Try in one call, on the calling thread."""
    aimed, partial = searching & fresh, np.empty((x.shape[0], -(-x.shape[1] // _RANGE)))
    again = True
    while again:
        _aim(s_y, y_y, products, coefficients, gamma, newest, held, base, aimed)
        _direct(partial, direction, trial, pairs, coefficients, gamma, newest, held, x, grad, aimed)
        again = _check(partial, slope, held, aimed)
    _start(direction, trial, slope, stretch, step_size, trials, fresh, failed, x, searching)


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
    if pairs.size < _SERIAL:
        _try(*memory, slope, stretch, step_size, base, trials, fresh, failed, *points, searching)
        return
    trial, direction, x, grad = points
    aimed, partial = searching & fresh, np.empty((x.shape[0], -(-x.shape[1] // _RANGE)))
    again = True
    while again:
        _aim(*inner, newest, held, base, aimed)
        _direct_parallel(partial, direction, trial, pairs, *inner[3:], newest, held, x, grad, aimed)
        again = _check(partial, slope, held, aimed)
    _start(direction, trial, slope, stretch, step_size, trials, fresh, failed, x, searching)
