"""Explicit LLVM vectors inside numba: the small instruction set that the kernels are written in.

The auto-vectoriser spends a short loop on alias checks, trip-count tests and horizontal sums; a kernel that says its
vectors itself does not. Two kinds of value exist:

- ``Vec(base, lanes)``: one LLVM vector ``<lanes x base>``; ``native`` lanes fill one register of the target,
  four-lane vectors hold the residuals of four entries;
- a *row*: a plain numba tuple of ``count`` native vectors. Its width enters through the TYPE of a token, the tuple
  ``(0,) * count``: one readable kernel serves every width, and the token keys numba's cache like any argument.

Offsets are counted in elements from the start of a C-contiguous array of any number of dimensions and are 64 bits
wide; nothing is bounds-checked. Every operation that takes vectors takes rows as well, and a vector beside a row
meets each of its members. ``fma`` is ``llvm.fmuladd``: fused where the target can, a product and a sum elsewhere
(``llvm.fma`` would call the C library once a lane there).

Half precision is a way to store, never to compute, and numba has no such arrays: an array of uint16 holds the bits
of float16, one of int16 those of bfloat16, and loads from them give float32. The conversion is exact.
"""

import os

import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils, types
from numba.core.errors import NumbaTypeError
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_jitable, register_model

__all__ = [
    "ABSOLUTE",
    "HUBER",
    "SQUARED",
    "TRUNCATED",
    "VECTOR_BYTES",
    "Vec",
    "absolute",
    "add",
    "copysign",
    "div",
    "dot",
    "first",
    "fma",
    "fold",
    "lanes_of",
    "load",
    "load4",
    "load4_strided_first",
    "load_first",
    "load_four",
    "load_index",
    "load_row",
    "load_strided",
    "load_strided_first",
    "load_transposed",
    "loss_numbers",
    "maximum",
    "minimum",
    "mul",
    "pointer",
    "prefetch",
    "prefetch_row",
    "rho_psi",
    "row_width",
    "select_le",
    "splat",
    "splat4",
    "splat4_loss",
    "splat_at",
    "splat_lane",
    "splat_loss",
    "store",
    "store_first",
    "store_strided",
    "store_strided_first",
    "sub",
    "sum1",
    "sum4",
    "widen",
    "zero",
    "zero_row",
    "zero_sum",
]

_LINE = 64
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT16, _BFLOAT16 = types.uint16, types.int16  # what holds their bits
_LLVM = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), _FLOAT16: _I16, _BFLOAT16: _I16}
_BYTES = {types.float32: 4, types.float64: 8, _FLOAT16: 2, _BFLOAT16: 2}
_SUFFIX = {types.float32: "f32", types.float64: "f64", _FLOAT16: "i16", _BFLOAT16: "i16"}
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")


def _vector_bytes():
    """Return the register width of the target that numba compiles for (and keys its cache by).

    The environment variable ``FASTDMF_VECTOR_BYTES`` (16, 32 or 64) overrides it: LLVM splits what is wider than a
    register, so that any machine can test every width. Numba's cache does not see the variable; such a process needs
    a ``NUMBA_CACHE_DIR`` of its own.
    """
    forced = os.environ.get("FASTDMF_VECTOR_BYTES")
    if forced:
        if forced not in ("16", "32", "64"):
            raise ValueError(f"FASTDMF_VECTOR_BYTES must be 16, 32 or 64, got {forced!r}")
        return int(forced)
    if "+avx512f" in _FEATURES:
        return 64
    return 32 if "+avx2" in _FEATURES else 16


VECTOR_BYTES = _vector_bytes()


def lanes_of(base):
    """Return the number of lanes of one register for ``types.float32`` or ``types.float64``."""
    return VECTOR_BYTES // _BYTES[base]


class Vec(types.Type):
    """One LLVM vector of ``lanes`` numbers of type ``base``."""

    def __init__(self, base, lanes):
        self.base = base
        self.lanes = lanes
        super().__init__(name=f"Vec({base}, {lanes})")


def _vector(vec):
    return ir.VectorType(_LLVM[vec.base], vec.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        super().__init__(manager, vec, _vector(vec))


def _of(array, lanes=None):
    """Return the type of ``lanes`` elements of an array in registers (default: as many as fill one)."""
    base = types.float32 if array.dtype in _HALVES else array.dtype
    return Vec(base, lanes or lanes_of(base))


def _is_row(value):
    return isinstance(value, types.UniTuple)


def _constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _shuffle(builder, x, y, lanes):
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _broadcast(builder, vector, scalar):
    undefined = ir.Constant(vector, ir.Undefined)
    filled = builder.insert_element(undefined, scalar, _I32(0))
    return _shuffle(builder, filled, undefined, [0] * vector.count)


def _address(context, builder, array_type, array, offset):
    if isinstance(array_type, types.CPointer):
        return builder.gep(array, [offset])
    if array_type.layout != "C":
        raise NumbaTypeError(f"explicit vectors need C-contiguous arrays, got {array_type}")
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def _call(builder, name, result, args):
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _lane_mask(builder, lanes, count):
    """Return the mask lane < count."""
    indices = ir.VectorType(_I64, lanes)
    return builder.icmp_signed("<", ir.Constant(indices, list(range(lanes))), _broadcast(builder, indices, count))


def _addresses(context, builder, signature, values, stride, count):
    """Return the addresses of a[offset + k stride]; constant steps from one address fold into the instructions."""
    start = _address(context, builder, signature.args[0], values[0], values[1])
    if isinstance(stride, int):
        return [builder.gep(start, [_I64(k * stride)]) for k in range(count)]
    return [builder.gep(start, [builder.mul(stride, _I64(k))]) for k in range(count)]


def _pack(builder, members):
    row = ir.Constant(ir.ArrayType(members[0].type, len(members)), ir.Undefined)
    for k, member in enumerate(members):
        row = builder.insert_value(row, member, k)
    return row


def _members(builder, signature, values, k):
    """Return vector k of each row among the arguments; what is no row stands for every k."""
    return [builder.extract_value(v, k) if _is_row(t) else v for t, v in zip(signature.args, values)]


def _each(result, args, operation):
    """Make the type and the code of an intrinsic: ``operation`` on vectors, or on the members of rows.

    ``result`` is what the operation returns on vectors.
    """
    row = next((a for a in args if _is_row(a)), None)

    def codegen(context, builder, signature, values):
        if row is None:
            return operation(builder, *values)
        return _pack(builder, [operation(builder, *_members(builder, signature, values, k)) for k in range(row.count)])

    return (result if row is None else types.UniTuple(result, row.count))(*args), codegen


def _member(value):
    return value.dtype if _is_row(value) else value


def _elementwise(operation):
    """Make what types and codes an intrinsic that works lane by lane on equal vectors."""

    def typed(*args):
        vec = _member(args[0])
        if any(_member(a) != vec for a in args):
            return None
        return _each(vec, args, lambda builder, *values: operation(builder, vec, *values))

    return typed


def _named(name):
    def operation(builder, vec, *values):
        return _call(builder, f"llvm.{name}.v{vec.lanes}{_SUFFIX[vec.base]}", _vector(vec), values)

    return _elementwise(operation)


def _select_le(builder, vec, a, b, x, y):
    return builder.select(builder.fcmp_unordered("<=", a, b), x, y)


_ADD = _elementwise(lambda builder, vec, x, y: builder.fadd(x, y))
_SUB = _elementwise(lambda builder, vec, x, y: builder.fsub(x, y))
_MUL = _elementwise(lambda builder, vec, x, y: builder.fmul(x, y))
_DIV = _elementwise(lambda builder, vec, x, y: builder.fdiv(x, y))
_FMA = _named("fmuladd")
_ABS = _named("fabs")
_COPYSIGN = _named("copysign")
_MIN = _elementwise(lambda b, vec, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
_MAX = _elementwise(lambda b, vec, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
_SELECT_LE = _elementwise(_select_le)


@intrinsic
def add(typingctx, x, y):
    """Return x + y."""
    return _ADD(x, y)


@intrinsic
def sub(typingctx, x, y):
    """Return x - y."""
    return _SUB(x, y)


@intrinsic
def mul(typingctx, x, y):
    """Return x y."""
    return _MUL(x, y)


@intrinsic
def div(typingctx, x, y):
    """Return x / y."""
    return _DIV(x, y)


@intrinsic
def fma(typingctx, x, y, z):
    """Return x y + z, rounded once where the target can."""
    return _FMA(x, y, z)


@intrinsic
def absolute(typingctx, x):
    """Return the absolute value of x."""
    return _ABS(x)


@intrinsic
def copysign(typingctx, x, y):
    """Return the absolute value of x with the sign of y."""
    return _COPYSIGN(x, y)


@intrinsic
def minimum(typingctx, x, y):
    """Return the smaller; y where either is NaN."""
    return _MIN(x, y)


@intrinsic
def maximum(typingctx, x, y):
    """Return the larger; y where either is NaN."""
    return _MAX(x, y)


@intrinsic
def select_le(typingctx, a, b, x, y):
    """Return x where a <= b or either is NaN, y elsewhere."""
    return _SELECT_LE(a, b, x, y)


def _from_float16(builder, vec, half):
    """Return the float16 numbers with the bits ``half``.

    One instruction with F16C. Without it LLVM would call a C function for each lane, which numba's linker need not
    find. There: exponent and mantissa move to their places, a product with 2^112 corrects the exponent's bias, also
    of subnormals, and the exponent of what is infinite or NaN is filled with ones.
    """
    if "+f16c" in _FEATURES:
        return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), vec.lanes)), _vector(vec))
    integers = ir.VectorType(_I32, vec.lanes)

    def every(number):
        return _constant(integers, number)

    bits = builder.zext(half, integers)
    shifted = builder.shl(builder.and_(bits, every(0x7FFF)), every(13))
    finite = builder.fmul(builder.bitcast(shifted, _vector(vec)), _constant(_vector(vec), 2.0**112))
    special = builder.icmp_unsigned(">=", shifted, every(0x7C00 << 13))
    size = builder.select(special, builder.or_(shifted, every(0x7F800000)), builder.bitcast(finite, integers))
    sign = builder.shl(builder.and_(bits, every(0x8000)), every(16))
    return builder.bitcast(builder.or_(size, sign), _vector(vec))


def _from_bfloat16(builder, vec, half):
    """Return the bfloat16 numbers with the bits ``half``, which are the upper bits of the same float32."""
    integers = ir.VectorType(_I32, vec.lanes)
    bits = builder.shl(builder.zext(half, integers), _constant(integers, 16))
    return builder.bitcast(bits, _vector(vec))


_HALVES = {_FLOAT16: _from_float16, _BFLOAT16: _from_bfloat16}


def _load(builder, vec, address, stored):
    """Return the vector at an address; ``stored`` is the type of the array's elements."""
    value = builder.load(builder.bitcast(address, ir.VectorType(_LLVM[stored], vec.lanes).as_pointer()))
    value.align = _BYTES[stored]
    return _HALVES[stored](builder, vec, value) if stored in _HALVES else value


@intrinsic
def pointer(typingctx, a):
    """Return the address of a[0], which every operation here takes in the place of the array.

    Arrays that are handed from one compiled function to another are reference-counted there, by atomic operations;
    an address is a number, and its type says nothing of dimensions or of who may write. Whoever takes it keeps the
    array alive.
    """

    def codegen(context, builder, signature, values):
        return _address(context, builder, a, values[0], _I64(0))

    return types.CPointer(a.dtype)(a), codegen


@intrinsic
def load(typingctx, a, offset):
    """Return the native vector at a[offset:]."""
    vec = _of(a)

    def codegen(context, builder, signature, values):
        return _load(builder, vec, _address(context, builder, signature.args[0], *values), a.dtype)

    return vec(a, types.int64), codegen


@intrinsic
def load4(typingctx, a, offset):
    """Return the four lanes at a[offset:]."""
    vec = _of(a, 4)

    def codegen(context, builder, signature, values):
        return _load(builder, vec, _address(context, builder, signature.args[0], *values), a.dtype)

    return vec(a, types.int64), codegen


@intrinsic
def load_row(typingctx, a, offset, like):
    """Return ``len(like)`` native vectors from a[offset:]."""
    vec = _of(a)

    def codegen(context, builder, signature, values):
        addresses = _addresses(context, builder, signature, values, vec.lanes, like.count)
        return _pack(builder, [_load(builder, vec, address, a.dtype) for address in addresses])

    return types.UniTuple(vec, like.count)(a, types.int64, like), codegen


@intrinsic
def load_index(typingctx, a, offset):
    """Return the integer a[offset] as int64, without numba's test for negative offsets."""

    def codegen(context, builder, signature, values):
        value = builder.load(_address(context, builder, signature.args[0], values[0], values[1]))
        return value if value.type == _I64 else builder.sext(value, _I64)

    return types.int64(a, types.int64), codegen


@intrinsic
def load_four(typingctx, a, offset, last, scale):
    """Return ``scale`` times the integers a[offset], ..., a[offset + 3]; a[last] stands for those behind ``last``."""

    def codegen(context, builder, signature, values):
        start = values[1]
        members = []
        for k in range(4):
            at = builder.add(start, _I64(k))
            at = builder.select(builder.icmp_signed("<", at, values[2]), at, values[2]) if k else at
            value = builder.load(_address(context, builder, signature.args[0], values[0], at))
            members.append(builder.mul(value if value.type == _I64 else builder.sext(value, _I64), values[3]))
        return _pack(builder, members)

    return types.UniTuple(types.int64, 4)(a, types.int64, types.int64, types.int64), codegen


def _holds(array, value):
    """Tell whether an array can hold a vector or a row as it is: nothing is rounded when stored."""
    return array.dtype == _member(value).base


def _store(builder, vec, value, address):
    builder.store(value, builder.bitcast(address, _vector(vec).as_pointer()), align=_BYTES[vec.base])


@intrinsic
def store(typingctx, a, offset, value):
    """Write a vector or a row to a[offset:]."""
    if not _holds(a, value):
        return None

    def codegen(context, builder, signature, values):
        if not _is_row(value):
            _store(builder, value, values[2], _address(context, builder, signature.args[0], *values[:2]))
            return context.get_dummy_value()
        for k, address in enumerate(_addresses(context, builder, signature, values, value.dtype.lanes, value.count)):
            _store(builder, value.dtype, builder.extract_value(values[2], k), address)
        return context.get_dummy_value()

    return types.void(a, types.int64, value), codegen


def _load_masked(builder, vec, address, stored, count):
    vector = ir.VectorType(_LLVM[stored], vec.lanes)
    args = [
        builder.bitcast(address, vector.as_pointer()),
        _I32(_BYTES[stored]),
        _lane_mask(builder, vec.lanes, count),
        _constant(vector, 0 if stored in _HALVES else 0.0),
    ]
    value = _call(builder, f"llvm.masked.load.v{vec.lanes}{_SUFFIX[stored]}.p0", vector, args)
    return _HALVES[stored](builder, vec, value) if stored in _HALVES else value


def _store_masked(builder, vec, value, address, count):
    args = [
        value,
        builder.bitcast(address, _vector(vec).as_pointer()),
        _I32(_BYTES[vec.base]),
        _lane_mask(builder, vec.lanes, count),
    ]
    _call(builder, f"llvm.masked.store.v{vec.lanes}{_SUFFIX[vec.base]}.p0", ir.VoidType(), args)


@intrinsic
def load_first(typingctx, a, offset, count):
    """Return the native vector at a[offset:] with zeros in the lanes from ``count`` on, which are not read."""
    vec = _of(a)

    def codegen(context, builder, signature, values):
        address = _address(context, builder, signature.args[0], *values[:2])
        return _load_masked(builder, vec, address, a.dtype, values[2])

    return vec(a, types.int64, types.int64), codegen


@intrinsic
def store_first(typingctx, a, offset, value, count):
    """Write the first ``count`` lanes of a vector or a row to a[offset:]; nothing behind them is touched."""
    if not _holds(a, value):
        return None

    def codegen(context, builder, signature, values):
        if not _is_row(value):
            address = _address(context, builder, signature.args[0], *values[:2])
            _store_masked(builder, value, values[2], address, values[3])
            return context.get_dummy_value()
        lanes = value.dtype.lanes
        for k, address in enumerate(_addresses(context, builder, signature, values, lanes, value.count)):
            left = builder.sub(values[3], _I64(k * lanes))
            _store_masked(builder, value.dtype, builder.extract_value(values[2], k), address, left)
        return context.get_dummy_value()

    return types.void(a, types.int64, value, types.int64), codegen


@intrinsic
def load_strided(typingctx, a, offset, stride, like):
    """Return ``len(like)`` native vectors, number k from a[offset + k stride:]."""
    vec = _of(a)

    def codegen(context, builder, signature, values):
        addresses = _addresses(context, builder, signature, values, values[2], like.count)
        return _pack(builder, [_load(builder, vec, address, a.dtype) for address in addresses])

    return types.UniTuple(vec, like.count)(a, types.int64, types.int64, like), codegen


@intrinsic
def load_transposed(typingctx, a, offset, stride):
    """Return the columns of the square block whose rows are the native vectors at a[offset + k stride:].

    Rounds of interleaving vector k with vector k + n/2: log2(n) n shuffles for n lanes.
    """
    vec = _of(a)
    n = vec.lanes
    low, high = ([e for k in half for e in (k, n + k)] for half in (range(n // 2), range(n // 2, n)))

    def codegen(context, builder, signature, values):
        addresses = _addresses(context, builder, signature, values, values[2], n)
        block = [_load(builder, vec, address, a.dtype) for address in addresses]
        for _ in range(n.bit_length() - 1):
            pairs = zip(block[: n // 2], block[n // 2 :])
            block = [_shuffle(builder, x, y, lanes) for x, y in pairs for lanes in (low, high)]
        return _pack(builder, block)

    return types.UniTuple(vec, n)(a, types.int64, types.int64), codegen


def _strided_first(a, vec, like):
    def codegen(context, builder, signature, values):
        addresses = _addresses(context, builder, signature, values, values[2], like.count)
        return _pack(builder, [_load_masked(builder, vec, address, a.dtype, values[4]) for address in addresses])

    return types.UniTuple(vec, like.count)(a, types.int64, types.int64, like, types.int64), codegen


@intrinsic
def load_strided_first(typingctx, a, offset, stride, like, count):
    """Return the native vectors of ``load_strided`` with zeros in the lanes from ``count`` on, which are not read."""
    return _strided_first(a, _of(a), like)


@intrinsic
def load4_strided_first(typingctx, a, offset, stride, like, count):
    """Return as ``load_strided_first`` does, with four lanes each."""
    return _strided_first(a, _of(a, 4), like)


@intrinsic
def store_strided(typingctx, a, offset, stride, row):
    """Write vector k of a row to a[offset + k stride:]."""
    if not _holds(a, row):
        return None

    def codegen(context, builder, signature, values):
        for k, address in enumerate(_addresses(context, builder, signature, values, values[2], row.count)):
            _store(builder, row.dtype, builder.extract_value(values[3], k), address)
        return context.get_dummy_value()

    return types.void(a, types.int64, types.int64, row), codegen


@intrinsic
def store_strided_first(typingctx, a, offset, stride, row, count):
    """Write the first ``count`` lanes of vector k of a row to a[offset + k stride:]."""
    if not _holds(a, row):
        return None

    def codegen(context, builder, signature, values):
        for k, address in enumerate(_addresses(context, builder, signature, values, values[2], row.count)):
            _store_masked(builder, row.dtype, builder.extract_value(values[3], k), address, values[4])
        return context.get_dummy_value()

    return types.void(a, types.int64, types.int64, row, types.int64), codegen


def _prefetch(builder, address):
    pointer = builder.bitcast(address, _I8.as_pointer())
    # Arguments after the address: read, keep in every cache level, data.
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(3), _I32(1)])


@intrinsic
def prefetch(typingctx, a, offset):
    """Ask for the cache line of a[offset]."""

    def codegen(context, builder, signature, values):
        _prefetch(builder, _address(context, builder, signature.args[0], *values))
        return context.get_dummy_value()

    return types.void(a, types.int64), codegen


@intrinsic
def prefetch_row(typingctx, a, offset, like):
    """Ask for every cache line of the row at a[offset:]."""
    vec = _of(a)
    step = _LINE // _BYTES[a.dtype]

    def codegen(context, builder, signature, values):
        lines = -(-like.count * vec.lanes // step)
        for address in _addresses(context, builder, signature, values, step, lines):
            _prefetch(builder, address)
        return context.get_dummy_value()

    return types.void(a, types.int64, like), codegen


@intrinsic
def row_width(typingctx, a, like):
    """Return the number of elements of ``a`` in a row of ``like``, known when compiling."""
    width = like.count * _of(a).lanes

    def codegen(context, builder, signature, values):
        return _I64(width)

    return types.int64(a, like), codegen


def _filled(vec, array, extra):
    def codegen(context, builder, signature, values):
        if not extra:
            return _constant(_vector(vec), 0.0)
        scalar = context.cast(builder, values[1], signature.args[1], vec.base)
        return _broadcast(builder, _vector(vec), scalar)

    return vec(array, *extra), codegen


@intrinsic
def zero(typingctx, a):
    """Return the native zero vector of ``a``'s type."""
    return _filled(_of(a), a, ())


@intrinsic
def zero_sum(typingctx):
    """Return four zero lanes of float64: the start of a sum that ``widen`` feeds."""
    wide = Vec(types.float64, 4)

    def codegen(context, builder, signature, values):
        return _constant(_vector(wide), 0.0)

    return wide(), codegen


@intrinsic
def zero_row(typingctx, a, like):
    """Return a row of zeros of ``a``'s type."""
    vec = _of(a)
    row_type = types.UniTuple(vec, like.count)

    def codegen(context, builder, signature, values):
        return ir.Constant(ir.ArrayType(_vector(vec), like.count), [_constant(_vector(vec), 0.0)] * like.count)

    return row_type(a, like), codegen


@intrinsic
def splat(typingctx, a, x):
    """Return the native vector of ``a``'s type with the number x in every lane."""
    return _filled(_of(a), a, (x,))


@intrinsic
def splat4(typingctx, a, x):
    """Return four lanes of ``a``'s type with the number x in each."""
    return _filled(_of(a, 4), a, (x,))


@intrinsic
def splat_at(typingctx, a, offset):
    """Return the native vector with the number a[offset] in every lane."""
    vec = _of(a)
    if not _holds(a, vec):
        return None

    def codegen(context, builder, signature, values):
        return _broadcast(builder, _vector(vec), builder.load(_address(context, builder, signature.args[0], *values)))

    return vec(a, types.int64), codegen


@intrinsic(prefer_literal=True)
def splat_lane(typingctx, v, k):
    """Return the native vector with lane k (a constant) of v in every lane."""
    if not isinstance(k, types.IntegerLiteral):
        return None
    lane = k.literal_value
    vec = Vec(_member(v).base, lanes_of(_member(v).base))
    return _each(vec, (v, k), lambda builder, x, _: _shuffle(builder, x, x, [lane] * vec.lanes))


@intrinsic
def first(typingctx, v, count):
    """Return v with zeros in the lanes from ``count`` on."""
    vec = _member(v)

    def operation(builder, x, limit):
        return builder.select(_lane_mask(builder, vec.lanes, limit), x, _constant(_vector(vec), 0.0))

    return _each(vec, (v, types.int64), operation)


@intrinsic
def dot(typingctx, x, y):
    """Return sum_k x_k y_k over the vectors of two rows: one vector of partial sums."""
    vec = x.dtype

    def codegen(context, builder, signature, values):
        pairs = [[builder.extract_value(v, k) for v in values] for k in range(x.count)]
        total = builder.fmul(*pairs[0])
        name = f"llvm.fmuladd.v{vec.lanes}{_SUFFIX[vec.base]}"
        for pair in pairs[1:]:
            total = _call(builder, name, _vector(vec), [*pair, total])
        return total

    return vec(x, y), codegen


@intrinsic
def fold(typingctx, x):
    """Return the sum of the vectors of a row."""

    def codegen(context, builder, signature, values):
        total = builder.extract_value(values[0], 0)
        for k in range(1, x.count):
            total = builder.fadd(total, builder.extract_value(values[0], k))
        return total

    return x.dtype(x), codegen


def _halve(builder, value):
    half = value.type.count // 2
    low = _shuffle(builder, value, value, range(half))
    return builder.fadd(low, _shuffle(builder, value, value, range(half, 2 * half)))


def _pair(builder, x, y, run):
    """Add neighbouring runs of lanes inside x and inside y; the result alternates runs of x and of y."""
    count = x.type.count
    even, odd = [], []
    for start in range(0, count, 2 * run):
        for lanes, shift in ((even, 0), (odd, run)):
            at = [start + shift + e for e in range(run)]
            lanes += at + [count + e for e in at]
    return builder.fadd(_shuffle(builder, x, y, even), _shuffle(builder, x, y, odd))


@intrinsic
def sum4(typingctx, a, b, c, d):
    """Return four lanes: the sum over the lanes of each of four vectors.

    A shuffle tree: two interleaving steps, then halves are folded; about two shuffles a vector instead of one
    chain of shuffles each.
    """
    vec = _member(a)

    def operation(builder, *values):
        ab, cd = _pair(builder, *values[:2], 1), _pair(builder, *values[2:], 1)
        if vec.lanes == 2:
            return _shuffle(builder, ab, cd, range(4))
        total = _pair(builder, ab, cd, 2)
        while total.type.count > 4:
            total = _halve(builder, total)
        return total

    return _each(Vec(vec.base, 4), (a, b, c, d), operation)


@intrinsic
def sum1(typingctx, v):
    """Return the sum over the lanes, halves folded on each other; of a row, one sum a vector."""

    def operation(builder, value):
        while value.type.count > 1:
            value = _halve(builder, value)
        return builder.extract_element(value, _I32(0))

    return _each(_member(v).base, (v,), operation)


@intrinsic
def widen(typingctx, v):
    """Return four float64 lanes with the lanes of v added in runs of four: the feed of a float64 sum."""
    wide = Vec(types.float64, 4)
    vec = _member(v)

    def operation(builder, value):
        if vec.lanes == 2:
            value = _shuffle(builder, value, _constant(value.type, 0.0), range(4))
        parts = [_shuffle(builder, value, value, range(k, k + 4)) for k in range(0, value.type.count, 4)]
        if vec.base is not types.float64:
            parts = [builder.fpext(part, _vector(wide)) for part in parts]
        total = parts[0]
        for part in parts[1:]:
            total = builder.fadd(total, part)
        return total

    return _each(wide, (v,), operation)


# Elementwise losses --------------------------------------------------------------------------------------------
# All four are one formula with four numbers (d, c0, c1, c2). With a = abs(r): rho = r^2 and psi = r where a <= d;
# rho = c0 + c1 a and psi = sign(r) c2 elsewhere. There is no branch, and NaN goes through both.

SQUARED, HUBER, TRUNCATED, ABSOLUTE = range(4)


def loss_numbers(code, delta):
    """Return (d, c0, c1, c2) for a loss code and its threshold."""
    if code == SQUARED:
        return np.inf, 0.0, 0.0, 0.0
    if code == ABSOLUTE:
        return 0.0, 0.0, 1.0, 0.5
    delta = float(delta)
    return (delta, -delta * delta, 2.0 * delta, delta) if code == HUBER else (delta, delta * delta, 0.0, 0.0)


@register_jitable
def splat_loss(a, numbers):
    """Return the four numbers of a loss as native vectors of ``a``'s type."""
    return splat(a, numbers[0]), splat(a, numbers[1]), splat(a, numbers[2]), splat(a, numbers[3])


@register_jitable
def splat4_loss(a, numbers):
    """Return the four numbers of a loss as four-lane vectors of ``a``'s type."""
    return splat4(a, numbers[0]), splat4(a, numbers[1]), splat4(a, numbers[2]), splat4(a, numbers[3])


@register_jitable
def rho_psi(r, loss):
    """Return rho(r) and psi(r) lane by lane; ``loss`` holds d, c0, c1, c2 as vectors."""
    d, c0, c1, c2 = loss
    a = absolute(r)
    return select_le(a, d, mul(r, r), fma(c1, a, c0)), select_le(a, d, r, copysign(c2, r))
