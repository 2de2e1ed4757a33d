"""Entry masks on the device: how entries are cut into work, and the launches of an evaluation and of its halves."""

from dataclasses import dataclass

import numpy as np

from fastdmf.kernels.cuda import real_name, stored_name
from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.slices import check_scratch, slices_sum

__all__ = ["EntrySide", "entry_forward", "entry_loss_pull", "entry_options", "entry_pull"]

_THREADS = 256  # of a block: eight warps, each with an item of its own

_LOSS_PULL = table(
    gp="REAL B n1 H",
    gqt="REAL B n2 H",
    losses="float64 B",
    p="STORED B n1 H",
    qt="STORED B n2 H",
    y="REAL 1|B nnz+",
    w="REAL? 1|B nnz+",
    yc="REAL 1|B nnz+",
    wc="REAL? 1|B nnz+",
    parts="REAL? B pieces+ H",
)
_FORWARD = table(out="REAL B nnz+", p="STORED B n1 H", qt="STORED B n2 H")
_PULL = table(g="REAL B n1 H", r="REAL B nnz+", q="STORED B n2 H", parts="REAL? B pieces+ H")
_SIDE = {
    "begin": "int64 items+1",
    "row": "INDEX items",
    "slot": "int32 items",
    "cut": "INDEX cut",
    "first": "int32 cut+1",
    "indices": "INDEX nnz+",
}


def entry_options(h, dtype, *, stored=None, index=np.int32):
    """Return the compiler's options for factors of width ``h``, stored as ``dtype`` or as ``stored``."""
    types = {"REAL": real_name(dtype), "STORED": stored_name(dtype, stored), "INDEX": real_name(index)}
    return [f"-DH={h}", *(f"-D{name}={value}" for name, value in types.items())]


@dataclass(frozen=True)
class EntrySide:
    """The entries in the order of one side, cut into items of work.

    Attributes
    ----------
    begin : (items + 1,) int64
        Where the items begin.
    row : (items,)
        The row of each item. Every row has an item, without entries if it has none.
    slot : (items,) int32
        -1 for whole rows, else the place among the pieces of rows that are cut.
    cut : (cut,)
        Rows that are cut.
    first : (cut + 1,) int32
        Where their pieces begin.
    indices : (nnz,) or more
        Rows of the other side. The type of all three of them is that of the module's ``index``.
    pieces : int
        Number of pieces.
    length : int
        Number of rows.
    entries : int
        Number of entries.
    reach : int
        One more than the largest of the indices.
    """

    begin: object
    row: object
    slot: object
    cut: object
    first: object
    indices: object
    pieces: int
    length: int
    entries: int
    reach: int

    @classmethod
    def of(cls, indptr, indices, *, longest=1024, to_device=lambda x: x):
        """Cut rows into items of at most ``longest`` entries; ``indptr`` and ``indices`` are NumPy arrays.

        An item is one warp's work, and what is cut costs a second pass over its pieces.
        """
        counts = np.diff(indptr)
        pieces = np.maximum(-(-counts // longest), 1)
        row = np.repeat(np.arange(len(counts)), pieces)
        place = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        in_pieces = pieces[row] > 1
        arrays = (
            np.append(indptr[row] + place * longest, indptr[-1]).astype(np.int64),
            row.astype(indices.dtype),
            np.where(in_pieces, np.cumsum(in_pieces) - 1, -1).astype(np.int32),
            np.flatnonzero(pieces > 1).astype(indices.dtype),
            np.append(0, np.cumsum(pieces[pieces > 1])).astype(np.int32),
            indices,
        )
        entries = int(indptr[-1])
        reach = int(indices[:entries].max()) + 1 if entries else 0
        return cls(*map(to_device, arrays), int(in_pieces.sum()), len(counts), entries, reach)

    def check(self, name, length, others):
        """Raise unless this, the argument ``name``, is a side of ``length`` rows for ``others`` of the other side."""
        if self.length != length:
            raise ValueError(f"{name} must have {length} rows, got {self.length}")
        if self.reach > others:
            raise ValueError(f"{name} must have indices below {others}, got {self.reach - 1}")
        rows = table(**{f"{name}.{part}": row for part, row in _SIDE.items()})
        arrays = {f"{name}.{part}": getattr(self, part) for part in _SIDE}
        check_arguments(rows, {"nnz": self.entries}, **arrays)


def _stride(a):
    """Return the distance between runs in (1 or B, m): none for one that all share."""
    return np.int64(a.shape[1] if a.shape[0] > 1 else 0)


def _check_parts(parts, pieces):
    if pieces and parts is None:
        raise ValueError(f"parts must be an array for {pieces} pieces of rows that are cut, got None")


def _grid(items, runs):
    return -(-items * 32 // _THREADS), runs


def _side(module, g, parts, losses, p, q, side, y, w, code, delta):
    """Overwrite ``g`` with one product of the residual, and ``losses`` (B, items) unless it is None."""
    (runs, n1, _), n2, items = g.shape, q.shape[1], len(side.row)
    strides = _stride(y), np.int64(0) if w is None else _stride(w)
    sizes = np.int64(n1), np.int64(n2), np.int64(items), np.int64(side.pieces)
    places = side.begin, side.row, side.slot, side.indices
    arguments = (g, parts, losses, p, q, *places, y, w, *sizes, *strides, np.int32(code), g.dtype.type(delta))
    module.launch("entry_evaluate", _grid(items, runs), (_THREADS,), arguments)
    _join(module, g, parts, side)


def _join(module, g, parts, side):
    runs, n1, h = g.shape
    if side.pieces:
        sizes = np.int64(n1), np.int64(side.pieces), np.int64(len(side.cut))
        grid = -(-len(side.cut) * h // _THREADS), runs
        module.launch("entry_join", grid, (_THREADS,), (g, parts, side.cut, side.first, *sizes))


def entry_loss_pull(module, sums, gp, gqt, losses, p, qt, rows, y, w, columns, yc, wc, code, delta, parts, item_losses):
    """Evaluate loss, G Q^T and G^T P in two passes, one a side.

    Parameters
    ----------
    module, sums
        The families ``entry`` and ``slices``.
    gp, gqt, losses
        Overwritten: (B, n1, H), (B, n2, H), (B,) float64.
    p, qt
        (B, n1, H), (B, n2, H).
    rows, y, w, columns, yc, wc
        The entries by row and by column, an ``EntrySide`` and (1 or B, nnz or more) values each; both weights may be
        None.
    code, delta
        The loss, as for the kernels of the CPU.
    parts : (B, pieces, H)
        Scratch for the side with more pieces; None if neither has any.
    item_losses : tuple of arrays
        Scratch of ``slices_sum`` for (B, items of rows) float64, behind an array of that shape.
    """
    sizes = {"nnz": rows.entries, "pieces": max(rows.pieces, columns.pieces)}
    arrays = {"gp": gp, "gqt": gqt, "losses": losses, "p": p, "qt": qt, "y": y, "w": w, "yc": yc, "wc": wc}
    check_arguments(_LOSS_PULL, sizes, **arrays, parts=parts)
    _check_parts(parts, sizes["pieces"])
    rows.check("rows", gp.shape[1], gqt.shape[1])
    columns.check("columns", gqt.shape[1], gp.shape[1])
    if rows.entries != columns.entries:
        raise ValueError(f"columns must have as many entries as rows, {rows.entries}, got {columns.entries}")
    if (w is None) != (wc is None):
        raise ValueError("w and wc must both be None, or neither")
    terms = table(**{"item_losses[0]": "float64 B items"})
    check_arguments(terms, {"B": len(gp), "items": len(rows.row)}, **{"item_losses[0]": item_losses[0]})
    check_scratch("item_losses[1:]", item_losses[1:], len(gp), len(rows.row))
    _side(module, gp, parts, item_losses[0], p, qt, rows, y, w, code, delta)
    _side(module, gqt, parts, None, qt, p, columns, yc, wc, code, delta)
    slices_sum(sums, losses, *item_losses)


def entry_forward(module, out, p, qt, rows):
    """Overwrite ``out`` (B, nnz) with the predictions p_i . q_j in the order of ``rows``."""
    check_arguments(_FORWARD, {"nnz": rows.entries}, out=out, p=p, qt=qt)
    rows.check("rows", p.shape[1], qt.shape[1])
    (runs, n1, _), n2, items = p.shape, qt.shape[1], len(rows.row)
    sizes = (np.int64(n) for n in (n1, n2, items, out.shape[1]))
    arguments = (out, p, qt, rows.begin, rows.row, rows.indices, *sizes)
    module.launch("entry_forward", _grid(items, runs), (_THREADS,), arguments)


def entry_pull(module, g, r, q, side, parts):
    """Overwrite ``g`` (B, n, H) with R Q^T for the entries ``r`` (B, nnz) of R in the order of ``side``.

    With the rows' side and Q^T it is one product, with the columns' side and P the other.
    """
    check_arguments(_PULL, {"nnz": side.entries, "pieces": side.pieces}, g=g, r=r, q=q, parts=parts)
    side.check("side", g.shape[1], q.shape[1])
    _check_parts(parts, side.pieces)
    (runs, n1, _), n2, items = g.shape, q.shape[1], len(side.row)
    sizes = (np.int64(n) for n in (n1, n2, items, side.pieces, r.shape[1]))
    arguments = (g, parts, r, q, side.begin, side.row, side.slot, side.indices, *sizes)
    module.launch("entry_pull", _grid(items, runs), (_THREADS,), arguments)
    _join(module, g, parts, side)
