"""Each instruction of the explicit vectors against NumPy, on vectors and on rows of two, both dtypes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from fastdmf.kernels.cpu import vectors as v

DTYPES = [np.float32, np.float64]
ROW = (0, 0)


def lanes(dtype):
    return v.VECTOR_BYTES // np.dtype(dtype).itemsize


def numbers(count, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(dtype)


@njit
def arithmetic(out, a, step, like):
    for k, x, y, z in (
        (0, v.load(a, 0), v.load(a, step), v.load(a, 2 * step)),
        (step, v.load(a, step), v.load(a, 2 * step), v.load(a, 3 * step)),
    ):
        v.store(out, k, v.add(x, y))
        v.store(out, k + 2 * step, v.sub(x, y))
        v.store(out, k + 4 * step, v.mul(x, y))
        v.store(out, k + 6 * step, v.fma(x, y, z))
        v.store(out, k + 8 * step, v.minimum(x, y))
        v.store(out, k + 10 * step, v.maximum(x, y))
        v.store(out, k + 12 * step, v.absolute(x))
        v.store(out, k + 14 * step, v.copysign(x, y))
        v.store(out, k + 16 * step, v.select_le(x, y, z, x))
        v.store(out, k + 24 * step, v.div(x, y))
    x, y, z = v.load_row(a, 0, like), v.load_row(a, step, like), v.load_row(a, 2 * step, like)
    v.store(out, 18 * step, v.fma(x, y, z))
    v.store(out, 20 * step, v.fma(v.load(a, 0), y, z))
    v.store(out, 22 * step, v.select_le(x, v.load(a, 0), z, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_lane_by_lane(dtype):
    n = lanes(dtype)
    a, out = numbers(4 * n, dtype), np.full(26 * n, np.nan, dtype)
    arithmetic(out, a, n, ROW)
    x, y, z = a[: 2 * n], a[n : 3 * n], a[2 * n :]
    fused = (x.astype(np.longdouble) * y + z).astype(dtype)
    alone = np.tile(a[:n], 2)
    got = out.reshape(13, 2 * n)
    exact = {
        0: x + y,
        1: x - y,
        2: x * y,
        4: np.minimum(x, y),
        5: np.maximum(x, y),
        6: np.abs(x),
        7: np.copysign(x, y),
        8: np.where(x <= y, z, x),
        11: np.where(x <= alone, z, x),
        12: x / y,
    }
    for k, expected in exact.items():
        np.testing.assert_array_equal(got[k], expected)
    # One rounding where the target fuses, two elsewhere: within an ulp of the larger of product and sum.
    ulp = np.finfo(dtype).eps * np.maximum(np.abs(x * y), np.abs(fused))
    assert (np.abs(got[3] - fused) <= ulp).all()
    np.testing.assert_array_equal(got[9], got[3])
    ulp = np.finfo(dtype).eps * np.maximum(np.abs(alone * y), np.abs(alone * y + z))
    assert (np.abs(got[10] - (alone.astype(np.longdouble) * y + z)) <= ulp).all()


@njit
def comparisons_with_nan(out, a, b, step):
    x, y = v.load(a, 0), v.load(b, 0)
    v.store(out, 0, v.select_le(x, y, x, y))
    v.store(out, step, v.minimum(x, y))
    v.store(out, 2 * step, v.maximum(x, y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_inside_for_select_and_gives_the_second_for_extremes(dtype):
    n = lanes(dtype)
    a, b, out = np.full(n, np.nan, dtype), np.ones(n, dtype), np.zeros(3 * n, dtype)
    comparisons_with_nan(out, a, b, n)
    assert np.isnan(out[:n]).all()
    np.testing.assert_array_equal(out[n:], 1)


@njit
def sums(out, wide, a, step, like):
    four = v.sum4(v.load(a, 0), v.load(a, step), v.load(a, 2 * step), v.load(a, 3 * step))
    v.store(out, 0, four)
    out[4] = v.sum1(v.load(a, 0))
    v.store(wide, 0, v.widen(v.load(a, 0)))
    v.store(wide, 4, v.widen(four))
    x, y = v.load_row(a, 0, like), v.load_row(a, 2 * step, like)
    out[5] = v.sum1(v.dot(x, y))
    out[6] = v.sum1(v.fold(x))
    out[7], out[8] = v.sum1(x)
    fours = v.sum4(x, y, x, y)
    v.store(out, 9, fours)
    first, second = v.widen(x)
    v.store(wide, 8, second)
    v.store(wide, 12, v.add(v.zero_sum(), first))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_lanes(dtype):
    n = lanes(dtype)
    a = np.random.default_rng(1).integers(-99, 99, 4 * n).astype(dtype)  # integers: every order of adding is exact
    out, wide = np.full(17, np.nan, dtype), np.full(16, np.nan)
    sums(out, wide, a, n, ROW)
    rows = a.reshape(4, n).sum(axis=1)
    np.testing.assert_array_equal(out[:4], rows)
    np.testing.assert_array_equal(out[4:9], [rows[0], a[: 2 * n] @ a[2 * n :], a[: 2 * n].sum(), rows[0], rows[1]])
    np.testing.assert_array_equal(out[9:], rows[[0, 2, 0, 2, 1, 3, 1, 3]])

    def widened(x):
        return np.pad(x, (0, -len(x) % 4)).reshape(-1, 4).sum(axis=0)

    np.testing.assert_array_equal(wide[:4], widened(a[:n]))
    np.testing.assert_array_equal(wide[4:8], rows)
    np.testing.assert_array_equal(wide[8:12], widened(a[n : 2 * n]))
    np.testing.assert_array_equal(wide[12:], widened(a[:n]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_keeps_what_the_type_cannot_add(dtype):
    n = lanes(dtype)
    a, wide = np.zeros(4 * n, dtype), np.full(16, np.nan)
    a[0] = 1 / np.finfo(dtype).eps
    if n > 4:
        a[4] = 0.25  # lost by a sum in this dtype
    sums(np.zeros(17, dtype), wide, a, n, ROW)
    assert wide[0] == float(a[0]) + (0.25 if n > 4 else 0)


@njit
def places(out, a, ints, step, like, count):
    v.store(out, 0, v.load_first(a, 1, count))
    v.store_first(out, step, v.load(a, 0), count)
    v.store(out, 2 * step, v.first(v.load(a, 0), count))
    v.store(out, 3 * step, v.splat(a, 2.5))
    v.store(out, 4 * step, v.zero_row(a, like))
    four = v.load4(a, 1)
    v.store(out, 6 * step, v.splat_lane(four, 0))
    v.store(out, 7 * step, v.splat_lane(four, 3))
    v.store(out, 8 * step, v.load_strided(a, 1, 3, like))
    v.store(out, 10 * step, v.load_strided_first(a, 1, 3, like, count))
    v.store_strided(out, 12 * step, 2 * step, v.load_row(a, 0, like))
    v.store_strided_first(out, 13 * step, 2 * step, v.load_row(a, 0, like), count)
    v.store(out, 16 * step, v.load4_strided_first(a, 1, 3, like, count))
    v.store(out, 16 * step + 8, v.splat4(a, 1.5))
    v.prefetch(a, 0)
    v.prefetch_row(a, 0, like)
    return v.row_width(a, like), v.load_index(ints, 1), v.load_four(ints, 1, 2, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_loads_stores_and_masks(dtype, count):
    n = lanes(dtype)
    a, out = numbers(4 * n + 8, dtype), np.full(16 * n + 12, np.nan, dtype)
    for ints in (np.array([3, -7, 4, 9, 9, 9], np.int32), np.array([3, 2**40, 4, 9, 9, 9], np.int64)):
        width, index, four = places(out, a, ints, n, ROW, count)
        assert (width, index) == (2 * n, ints[1])
        assert four == (5 * int(ints[1]), 20, 20, 20)

    def kept(x):
        return np.where(np.arange(len(x)) < count, x, 0)

    def row(start, stride, size):
        return [a[start : start + size], a[start + stride : start + stride + size]]

    got = out[: 16 * n].reshape(16, n)
    np.testing.assert_array_equal(got[0], kept(a[1 : 1 + n]))
    np.testing.assert_array_equal(got[1, :count], a[:count])
    np.testing.assert_array_equal(got[2], kept(a[:n]))
    np.testing.assert_array_equal(got[3], 2.5)
    np.testing.assert_array_equal(got[4:6], 0)
    np.testing.assert_array_equal(got[6], a[1])
    np.testing.assert_array_equal(got[7], a[4])
    np.testing.assert_array_equal(got[8:10], row(1, 3, n))
    np.testing.assert_array_equal(got[10:12], [kept(x) for x in row(1, 3, n)])
    np.testing.assert_array_equal(got[[12, 14]], row(0, n, n))
    np.testing.assert_array_equal(got[[13, 15], :count], [x[:count] for x in row(0, n, n)])
    assert np.isnan(got[[1, 13, 15], count:]).all()
    np.testing.assert_array_equal(out[16 * n : 16 * n + 8], np.concatenate([kept(x) for x in row(1, 3, 4)]))
    np.testing.assert_array_equal(out[16 * n + 8 :], 1.5)


@njit
def blocks(out, a, step, like, stride, count):
    v.store_strided(out, 0, step, v.load_transposed(a, 1, stride))
    v.store(out, step * step, v.splat_at(a, 2))
    v.store_first(out, step * step + step, v.load_row(a, 1, like), count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [0, 0.5, 1, 1.5, 2])
def test_transposed_blocks_and_first_of_rows(dtype, part):
    n = lanes(dtype)
    stride, count = n + 3, int(part * n)
    a, out = numbers(n * stride + 1, dtype), np.full(n * n + 3 * n, np.nan, dtype)
    blocks(out, a, n, ROW, stride, count)
    block = np.stack([a[1 + k * stride : 1 + k * stride + n] for k in range(n)])
    np.testing.assert_array_equal(out[: n * n].reshape(n, n), block.T)
    np.testing.assert_array_equal(out[n * n : n * n + n], a[2])
    np.testing.assert_array_equal(out[n * n + n :][:count], a[1 : 1 + count])
    assert np.isnan(out[n * n + n + count :]).all()


@njit
def from_halves(out, half, step, like):
    for k in range(0, half.size, 2 * step):
        v.store(out, k, v.load_row(half, k, like))


@njit
def every_load_of_halves(out, half, step, like, count):
    v.store(out, 0, v.load(half, 1))
    v.store(out, step, v.load_first(half, 1, count))
    v.store(out, 2 * step, v.load_strided(half, 1, 3, like))
    v.store(out, 4 * step, v.load_strided_first(half, 1, 3, like, count))
    v.store(out, 6 * step, v.load4(half, 1))
    v.store(out, 6 * step + 4, v.load4_strided_first(half, 1, 3, like, count))
    v.store(out, 6 * step + 12, v.splat4(half, 1.5))
    v.prefetch(half, 0)
    v.prefetch_row(half, 0, like)
    return v.row_width(half, like)


def float16(bits):
    return bits.view(np.float16).astype(np.float32)


def bfloat16(bits):
    return np.ascontiguousarray(np.stack([np.zeros_like(bits), bits], axis=-1)).view(np.float32)[..., 0]


HALVES = [(np.uint16, float16), (np.int16, bfloat16)]


@pytest.mark.parametrize(("kind", "decoded"), HALVES)
def test_halves_load_as_float32(kind, decoded):
    """All 65536 of them: subnormals, both zeros, infinities, NaN."""
    half = np.arange(2**16).astype(np.uint16).view(kind)
    out = np.full(half.size, 7, np.float32)
    from_halves(out, half, lanes(np.float32), ROW)
    expected = decoded(half)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(out[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(out[~number]).all()


@pytest.mark.parametrize(("kind", "decoded"), HALVES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_halves_through_every_load(kind, decoded, count):
    n = lanes(np.float32)
    half = np.random.default_rng(count).integers(0, 0x7C00, 2 * n + 8).astype(np.uint16).view(kind)
    a, out = decoded(half), np.full(6 * n + 16, np.nan, np.float32)
    assert every_load_of_halves(out, half, n, ROW, count) == 2 * n

    def row(size, count):
        return [np.where(np.arange(size) < count, a[k : k + size], 0) for k in (1, 4)]

    np.testing.assert_array_equal(out[:n], a[1 : 1 + n])
    np.testing.assert_array_equal(out[n : 2 * n], row(n, count)[0])
    np.testing.assert_array_equal(out[2 * n : 6 * n].reshape(4, n), row(n, n) + row(n, count))
    np.testing.assert_array_equal(out[6 * n : 6 * n + 12].reshape(3, 4), [a[1:5], *row(4, count)])
    np.testing.assert_array_equal(out[6 * n + 12 :], 1.5)


@njit
def mixed(a, b):
    return v.sum1(v.add(v.load(a, 0), v.load(b, 0)))


@njit
def stored_as_another(a, b):
    v.store(a, 0, v.load(b, 0))


def test_mixed_types_do_not_compile():
    from numba.core.errors import TypingError

    with pytest.raises(TypingError):
        mixed(np.zeros(16, np.float32), np.zeros(16, np.float64))
    for kind in (np.float64, np.uint16):
        with pytest.raises(TypingError):
            stored_as_another(np.zeros(16, kind), np.zeros(16, np.float32))


def test_other_layouts_do_not_compile():
    from numba.core.errors import NumbaError

    with pytest.raises(NumbaError, match="C-contiguous"):
        mixed(np.zeros((16, 2), np.float32)[:, 0], np.zeros(16, np.float32))


@pytest.mark.parametrize(("features", "size"), [("", 16), ("+avx,+avx2,+fma", 32), ("+avx,+avx2,+avx512f", 64)])
def test_width_follows_the_target(features, size):
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "FASTDMF_VECTOR_BYTES": ""}
    code = "from fastdmf.kernels.cpu.vectors import VECTOR_BYTES; print(VECTOR_BYTES)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == size


@pytest.mark.parametrize(("forced", "printed"), [("16", "16"), ("64", "64"), ("48", "16, 32 or 64")])
def test_width_can_be_forced(forced, printed):
    env = {**os.environ, "FASTDMF_VECTOR_BYTES": forced}
    code = "from fastdmf.kernels.cpu.vectors import VECTOR_BYTES; print(VECTOR_BYTES)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert printed in done.stdout + done.stderr
    assert (done.returncode == 0) == (forced != "48")
