"""Dense and seeded measurements on the device: how the columns lie on threads, and what both have in common."""

from dataclasses import dataclass

import numpy as np

from fastdmf.kernels.cuda import real_name, stored_name
from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.slices import check_scratch

__all__ = ["MeasurePlan", "check_terms", "join", "plan_measurements", "stride"]

THREADS = 256
_MOST_THREADS, _ROWS = 512, 2  # of a block; rows it holds: as in measurements.cu
# 32-bit registers of a thread for x, g, two rows of A, and four numbers a right-hand side: of 128, which 512 threads
# leave to each. What is left is enough for the rest on every architecture; the tests compile for them.
_REGISTERS = 88
_RANGES = 264  # blocks that share the rows: two for each of an H100's multiprocessors, the same on every device
_CACHED_BYTES = 24 << 20  # of A between its two uses, where rows do not fit in a block: half an H100's L2


@dataclass(frozen=True)
class MeasurePlan:
    """How an evaluation of measurements is laid out; it follows from the shape alone, and the bits with it.

    Attributes
    ----------
    pack : int
        Columns that a thread loads at once.
    per : int
        Packs of a thread.
    tile : int
        Right-hand sides that share a read of A.
    threads : int
        Of a block.
    windows : int
        Blocks that a row takes.
    ranges : int
        Blocks that share the rows.
    rows : int
        Rows at a time where there are several windows.
    """

    pack: int
    per: int
    tile: int
    threads: int
    windows: int
    ranges: int
    rows: int

    def options(self, dtype, stored=None):
        """Return the compiler's options."""
        numbers = [f"-DPACK={self.pack}", f"-DPER={self.per}", f"-DRUNS={self.tile}", f"-DTHREADS={self.threads}"]
        return [f"-DREAL={real_name(dtype)}", f"-DSTORED={stored_name(dtype, stored)}", *numbers]

    def sizes(self, known):
        """Return what is ``known`` of a launch's arrays, with the plan's own numbers."""
        return known | {"ranges": self.ranges, "windows": self.windows, "rows": self.rows}

    def check(self, name, d):
        """Raise unless rows of ``d`` columns, those of the argument ``name``, are what the plan is for."""
        covered = self.windows * self.threads * self.per * self.pack
        if d % self.pack or not covered - self.threads * self.per * self.pack < d <= covered:
            raise ValueError(f"{name} has {d} columns, which this plan is not for: {self}")

    def grid(self, runs):
        """Return the grid of the kernels that go through A."""
        return self.ranges, -(-runs // self.tile), self.windows


def plan_measurements(m, d, runs, dtype, *, stored_bytes=None, pack=None):
    """Lay out ``m`` measurements of ``d`` columns for ``runs`` right-hand sides.

    ``pack`` is what divides d and fills 16 bytes best unless it is given; ``stored_bytes`` are those of a number of A.
    """
    size = np.dtype(dtype).itemsize
    if pack is None:
        pack = next(k for k in (16 // size, 2, 1) if d % k == 0)
    packs = d // pack

    def most(tile):
        words = size // 4
        return (_REGISTERS - 4 * tile * words) // ((2 * tile + _ROWS) * pack * words)

    tiles = [tile for tile in (4, 2, 1) if tile == 1 or tile <= runs]
    fitting = [tile for tile in tiles if packs <= _MOST_THREADS * most(tile)]
    tile = fitting[0] if fitting else tiles[0]
    per = -(-packs // _MOST_THREADS) if fitting else most(tile)
    threads = min(-(-packs // (32 * per)) * 32, _MOST_THREADS)
    rows = max(_CACHED_BYTES // (d * (stored_bytes or size)), _ROWS)
    return MeasurePlan(
        pack=pack,
        per=per,
        tile=tile,
        threads=threads,
        windows=-(-packs // (threads * per)),
        ranges=max(min(_RANGES, -(-m // _ROWS)), 1),
        rows=rows,
    )


def check_terms(terms, runs, m):
    """Raise unless ``terms`` is the scratch for the losses of ``m`` measurements: (runs, m), and that of its sums."""
    check_arguments(table(**{"terms[0]": "float64 B m"}), {"B": runs, "m": m}, **{"terms[0]": terms[0]})
    check_scratch("terms[1:]", terms[1:], runs, m)


def stride(a):
    """Return the distance between runs in (1 or B, m): none for one that all share."""
    return np.int64(a.shape[1] if a.shape[0] > 1 else 0)


def join(module, out, parts):
    """Overwrite ``out`` with the sum over the leading axis of ``parts``."""
    blocks = -(-out.size // THREADS)
    module.launch("measured_join", (blocks,), (THREADS,), (out, parts, np.int32(len(parts)), np.int64(out.size)))
