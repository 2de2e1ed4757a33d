"""The emulator that the CUDA kernels are tested with: what it computes, and the faults that it must find."""

import re

import cuda_emulator
import numpy as np
import pytest
from cuda_emulator import ORDERS, EmulationError, Module

pytestmark = pytest.mark.skipif(not cuda_emulator.AVAILABLE, reason="g++ on Linux is needed to emulate CUDA kernels")

TEXT = (cuda_emulator.HERE / "samples.cu").read_text()


# Threads change stacks by a few instructions on x86-64, by the C library elsewhere.
@pytest.fixture(scope="module", params=["", "-DEMULATE_WITH_UCONTEXT"], ids=["native", "ucontext"])
def samples(request):
    return Module(TEXT, [request.param] if request.param else [], name="samples")


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


def nan(*shape, dtype=np.float32):
    return np.full(shape, np.nan, dtype)


# What it computes ----------------------------------------------------------------------------------------------


def test_warp_operations(samples, order, rng):
    blocks, size = 3, 64
    x = rng.integers(-9, 9, (blocks, size // 32, 32)).astype(np.float32)
    y = rng.standard_normal(x.shape)
    out, wide, counts = nan(*x.shape, 3), nan(*x.shape, dtype=float), np.full(x.shape, -1, np.int32)
    samples.launch("shuffles", (blocks,), (size,), (out, counts, x, y, wide), order=order, seed=4)
    np.testing.assert_array_equal(out[..., 0], np.broadcast_to(x.sum(axis=2, keepdims=True), x.shape))
    np.testing.assert_array_equal(out[..., 1], np.cumsum(x, axis=2))
    eights = x.reshape(blocks, -1, 4, 8)
    # Beyond eight lanes a lane of the upper part reads the lower one, as on a GPU; the lower ones read themselves.
    crossed = x.copy()
    for o in (16, 8, 4, 2, 1):
        at = np.arange(32) ^ o
        at = np.where(at // 8 > np.arange(32) // 8, np.arange(32), at)
        crossed = crossed + crossed[..., at]
    np.testing.assert_array_equal(out[..., 2], crossed)
    assert eights.size == x.size
    np.testing.assert_array_equal(wide.reshape(-1, 16), np.roll(y.reshape(-1, 16), -1, axis=1))
    expected = ((x > 0) << np.arange(32, dtype=np.uint32)).astype(np.uint32)
    halves = expected.reshape(-1, 2, 16).sum(axis=2, dtype=np.uint32)
    np.testing.assert_array_equal(counts.view(np.uint32).reshape(-1, 2, 16)[..., 0], halves)


def test_shared_memory_and_barriers(samples, order, rng):
    x = rng.standard_normal((5, 128)).astype(np.float32)
    out = nan(5, 128)
    samples.launch("turn", (2,), (128,), (out, x, np.int32(640)), shared=512, order=order, seed=1)
    np.testing.assert_array_equal(out, np.roll(x, -1, axis=1))


def test_three_dimensions(samples, order):
    out = np.full((12, 24), -1, np.int32)
    samples.launch("places", (2, 3, 2), (2, 4, 3), (out,), order=order)
    np.testing.assert_array_equal(out, 100 * np.arange(12)[:, None] + np.arange(24))


def test_votes(samples, order):
    x, out = np.zeros(40, np.int32), np.full(40, -1, np.int32)
    samples.launch("votes", (1,), (40,), (out, x), order=order)
    assert not out.any()
    x[37] = 5
    samples.launch("votes", (1,), (40,), (out, x), order=order)
    assert (out == 1).all()


def test_random_order_follows_its_seed(samples, rng):
    """A kernel with a race shows the order: the same for one seed, another one for others."""
    x = rng.standard_normal(256).astype(np.float32)

    def run(seed):
        out = nan(256)
        samples.launch("missing_barrier", (1,), (256,), (out, x), order="random", seed=seed)
        return out.tobytes()

    assert run(1) == run(1) and len({run(seed) for seed in range(20)}) > 5


# Faults --------------------------------------------------------------------------------------------------------


def test_a_missing_barrier_shows(samples, order, rng):
    x, out = rng.standard_normal(256).astype(np.float32), nan(256)
    for _ in range(2):  # what the first launch left behind must not help the second
        samples.launch("missing_barrier", (1,), (256,), (out, x), order=order, seed=1)
        assert np.isnan(out).any()


def test_a_missing_second_barrier_shows(samples, order, rng):
    x, out = rng.standard_normal((4, 64)).astype(np.float32), nan(4, 64)
    samples.launch("missing_second_barrier", (1,), (64,), (out, x, np.int32(4)), order=order, seed=1)
    assert not np.array_equal(out, np.roll(x, -1, axis=1))
    seen = []
    for seed in range(5):  # a random order may be lucky
        samples.launch("missing_late_barrier", (1,), (64,), (out, x, np.int32(4)), order=order, seed=seed)
        seen.append(np.array_equal(out, np.roll(x, 32, axis=1)))
    assert not all(seen)


def test_a_missing_warp_barrier_shows(samples, order, rng):
    x, out = rng.standard_normal(32).astype(np.float32), nan(32)
    samples.launch("missing_warp_barrier", (1,), (32,), (out, x), order=order, seed=1)
    assert np.isnan(out).any()
    right = Module(TEXT, ["-DWITH_WARP_BARRIER"], name="samples")
    right.launch("missing_warp_barrier", (1,), (32,), (out, x), order=order, seed=1)
    np.testing.assert_array_equal(out, x[::-1])


def test_shared_memory_is_poisoned_for_every_block(samples, order):
    out = np.zeros(3, np.float32)
    samples.launch("unwritten_shared", (3,), (1,), (out,), order=order)
    np.testing.assert_array_equal(np.isnan(out), [False, True, True])


# Kernel, what it takes behind 32 numbers, and what it is told of.
FAULTS = (
    ("divergent_barrier", (), "__syncthreads, but thread .* waits at the one of line"),
    ("barrier_not_for_all", (), "1 threads of the block have ended|ends while all others wait at __syncthreads"),
    ("barrier_and_shuffle", (), "waits for lanes of its mask that never come"),
    ("lanes_that_ended", (), "the warp operation waits for lanes of its mask that never come"),
    ("lane_not_in_mask", (), "the calling lane .* is not in the mask 0000ffff"),
    ("different_masks", (), "gives the mask"),
    ("lane_outside_mask", (), "lane 15 reads lane 16 outside the mask"),
    ("different_lines", (), "is in the warp operation of line"),
    ("write_behind", (np.int32(32),), "writes outside of argument 0"),
    ("write_before", (), "writes outside of argument 0"),
    ("write_to_input", (), "writes to argument 0, which is const"),
    ("not_aligned", (np.zeros(8, np.float32),), "the address 0x.* is not aligned"),
    ("large_frame", (np.int32(17_000),), "the thread needs more than 65536 bytes of stack"),
    ("index_outside", (np.int32(8),), "the index 8 is outside of the array"),
    ("index_outside", (np.int32(-1),), "the index -1 is outside of the array"),
)


@pytest.mark.parametrize(("kernel", "extra", "message"), FAULTS)
def test_faults_are_found(samples, order, kernel, extra, message):
    with pytest.raises(EmulationError, match=f"samples: {kernel}: .*({message})"):
        samples.launch(kernel, (1,), (32,), (np.zeros(32, np.float32), *extra), order=order, seed=2)
    # The next launch starts afresh.
    out = np.full((1, 24), -1, np.int32)
    samples.launch("places", (1,), (24,), (out,), order=order)
    np.testing.assert_array_equal(out, [np.arange(24)])


# Where the header looks, what stands there when it does not, and the faults that then go unnoticed or by another name.
LINE_OF_BARRIER = "if (fibers[i].line != line) fail("
CHECKS = {
    "lines of a barrier": ([(LINE_OF_BARRIER, "if (false) fail(")], ["divergent_barrier"]),
    "threads that have ended": (
        [
            ("if (alive < threads) fail(", "if (false) fail("),
            ("if (--alive && waiting == alive) fail(", "alive--; if (false) fail("),
            (
                "fibers[i].state = READY;\n        fibers[i].received",
                "if (fibers[i].state != DONE) fibers[i].state = READY;\n        fibers[i].received",
            ),
        ],
        ["barrier_not_for_all"],
    ),
    "waiting for ever": (
        [("        report(current->state == IN_WARP ?", "        return; report(current->state == IN_WARP ?")],
        ["barrier_and_shuffle", "lanes_that_ended"],
    ),
    "the lane in its mask": ([("if (!(mask >> lane() & 1)) fail(", "if (false) fail(")], ["lane_not_in_mask"]),
    "equal masks": ([("if (lanes[k].mask != mask) fail(", "if (false) fail(")], ["different_masks"]),
    "equal lines": ([("if (lanes[k].line != line) fail(", "if (false) fail(")], ["different_lines"]),
    "the lane that is read": (
        [("if (!ballot && !(mask >> lanes[k].source & 1))", "if (false)")],
        ["lane_outside_mask"],
    ),
    "the end of the stack": ([("!= BOTTOM)\n        report(", "== 0)\n        report(")], ["large_frame"]),
    "alignment": ([('emulator::fail("the address %#zx is not aligned", (size_t)address);', "")], ["not_aligned"]),
    "indices": ([('emulator::fail("the index %zd is outside of the array", (ssize_t)index);', "")], ["index_outside"]),
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_of_the_header_is_needed(check):
    """A fault that another check would find as well would not show that this one works."""
    replaced, missed = CHECKS[check]
    header = (cuda_emulator.HERE / "cuda_emulator.h").read_text()
    for there, instead in replaced:
        assert header.count(there) == 1, there
        header = header.replace(there, instead)
    blind = Module(TEXT, name="samples", header=header)
    for kernel, extra, message in FAULTS:
        if kernel in missed:
            try:
                blind.launch(kernel, (1,), (32,), (np.zeros(32, np.float32), *extra))
            except EmulationError as error:
                assert not re.search(message, str(error))


def test_poison_and_orders_are_needed(rng):
    """Without them stale numbers hide what is missing."""
    header = (cuda_emulator.HERE / "cuda_emulator.h").read_text()
    poison, order = "memset(shared.start, POISON, shared.size);", "order == RANDOM && i > 1"
    band = "for (size_t k = dynamic; k < dynamic + SHARED_BAND; k++)"
    assert all(header.count(text) == 1 for text in (poison, order, band))
    blind = Module(
        TEXT,
        name="samples",
        header=header.replace(poison, "").replace(order, "false").replace(band, "for (size_t k = 1; k < 1; k++)"),
    )
    out, x = np.zeros(3, np.float32), rng.standard_normal(256).astype(np.float32)
    blind.launch("unwritten_shared", (3,), (1,), (out,))
    assert not np.isnan(out[1:]).any()
    results = set()
    for seed in range(3):
        out = nan(256)
        blind.launch("missing_barrier", (1,), (256,), (out, x), order="random", seed=seed)
        blind.launch("missing_barrier", (1,), (256,), (out, x), order="random", seed=seed)
        results.add(out.tobytes())
    np.testing.assert_array_equal(out, np.roll(x, 128))  # what the first launch left behind helps the second
    assert len(results) == 1
    blind.launch("write_behind_shared", (2,), (8,), (), shared=32)


@pytest.mark.parametrize(
    ("around", "constant", "missed"),
    [(False, True, ["write_behind", "write_before"]), (True, False, ["write_to_input"])],
)
def test_every_check_of_the_driver_is_needed(samples, monkeypatch, around, constant, missed):
    whole = cuda_emulator._Banded.take_back

    def half_blind(band):
        if not around:
            band.frame[: band.start] = band.frame[band.start + band.array.nbytes :] = 0xFF
        if not constant:
            band.constant = False
        return whole(band)

    monkeypatch.setattr(cuda_emulator._Banded, "take_back", half_blind)
    for kernel, extra, _ in FAULTS:
        if kernel in missed:
            samples.launch(kernel, (1,), (32,), (np.zeros(32, np.float32), *extra))


def test_every_planted_fault_has_its_check():
    missed = [kernel for _, faults in CHECKS.values() for kernel in faults]
    driver = ["write_behind", "write_before", "write_to_input"]
    assert sorted(missed + driver) == sorted({kernel for kernel, _, _ in FAULTS})
    header = (cuda_emulator.HERE / "cuda_emulator.h").read_text()
    # As many as are tried: those above with one fail or report each, one with two, and the band of shared memory.
    assert len(re.findall(r"\b(?:fail|report)\(\"|\breport\(current", header)) == len(CHECKS) + 2


def test_messages_tell_the_place(samples):
    lines = TEXT.splitlines()
    line = next(k + 1 for k, text in enumerate(lines) if "if (threadIdx.x < 20)" in text)
    with pytest.raises(EmulationError, match=rf"block \(0, 0, 0\), thread \(0, 0, 0\), line {line}:"):
        samples.launch("lanes_that_ended", (1,), (32,), (np.zeros(32, np.float32),))
    line = next(k + 1 for k, text in enumerate(lines) if "x + 2" in text)
    with pytest.raises(EmulationError, match=rf"block \(1, 0, 0\), thread \(0, 0, 0\), line {line}:"):
        samples.launch("not_aligned", (2,), (1,), (np.zeros(1, np.float32), np.zeros(8, np.float32)), order="reverse")


def test_dynamic_shared_memory_ends_where_the_launch_says(samples, order):
    samples.launch("write_behind_shared", (2,), (8,), (), shared=36, order=order)
    with pytest.raises(EmulationError, match="byte 32 of the dynamic shared memory is written, it has 32"):
        samples.launch("write_behind_shared", (2,), (8,), (), shared=32, order=order)


# The driver ----------------------------------------------------------------------------------------------------


def test_aligned_vectors_are_fine(samples, order):
    x, out = np.arange(40, dtype=np.float32), nan(10)
    samples.launch("quarter", (1,), (3,), (out, x, None, np.int64(40)), order=order)
    np.testing.assert_array_equal(out, x.reshape(10, 4).sum(axis=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (np.zeros(1), np.zeros(4, np.float32), None, np.int64(4)),
            "0 is an array float32, not ndarray float64",
        ),
        ((np.zeros(1, np.float32),) * 2 + (np.zeros(1, np.int16), np.int64(4)), "argument 2 is an array uint16"),
        ((np.zeros(1, np.float32),) * 2 + (None, 4), "argument 3 is a number int64, not int"),
        ((np.zeros(1, np.float32),) * 2 + (None, np.int32(4)), "argument 3 is a number int64, not int32 int32"),
        ((np.zeros(1, np.float32),) * 2 + (None, np.float64(4)), "argument 3 is a number int64, not float64"),
        ((np.zeros(1, np.float32), None, None), "quarter takes 4 arguments, got 3"),
        ((np.zeros((4, 2), np.float32)[:, 0], None, None, np.int64(0)), "C-contiguous"),
    ],
)
def test_arguments_of_the_wrong_type(samples, arguments, message):
    with pytest.raises(TypeError, match=message):
        samples.launch("quarter", (1,), (1,), arguments)


def test_sizes_that_no_gpu_has(samples):
    with pytest.raises(EmulationError, match="more than 1024 threads"):
        samples.launch("places", (1,), (1025,), (np.zeros(1025, np.int32),))
    with pytest.raises(EmulationError, match="more than 227 KB"):
        samples.launch("write_behind_shared", (1,), (8,), (), shared=300_000)


def test_text_that_does_not_compile():
    with pytest.raises(RuntimeError, match=r"broken.cu:2:.*nothing"):
        Module('extern "C" __global__ void f(int* x) {\n *x = nothing; }', name="broken")
