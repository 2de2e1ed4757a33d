"""Reproducible random entries: Philox4x32-10 and the exact normal transform, on explicit vectors.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) maps a counter of four 32-bit words and a key of two to four
random words. Here the counter is (block, 0, row, problem) and the key the two halves of a 64-bit seed, so that any
entry is a function of its place alone: entries need no memory and no order.

The format ``gauss-v1``. The words of a block give the samples of four columns, 4 block .. 4 block + 3: the first two
come from the words (w, v) = (0, 1), the last two from (2, 3). In float32, with every operation rounded once:

    u = (w >> 9) 2^-23 + 2^-24                    exact, an odd multiple of 2^-24 in (0, 1)
    u = m 2^e with 1/2 <= m < 1, f = m - 1        exact, on the bits
    R = sqrt(fma(2^23 e, c, f p(f)))              -2 ln u = -2 ln 2 e - 2 ln(1 + f); c = -2 ln 2 / 2^23
    t = ((v >> 9) | 1) 2^-23 - 1/2                exact, an odd multiple of 2^-23 in (-1/2, 1/2)
    x = R (t s(t t)),  y = R q(t t)               sin(pi t) = t s(t^2), cos(pi t) = q(t^2)
    y changes its sign where the lowest bit of v is set.

The polynomials p, s and q are evaluated by Horner's rule, each step one fma. Only correctly rounded operations occur
and no result is subnormal, so any hardware that has them gives the same bits; nothing may be contracted or
reordered. ``fma`` is ``llvm.fma``, a call of the C library on machines without the instruction. Against exact
arithmetic R is within 3.1 units of 2^-24, relative, and sine and cosine are within 2.7. The distribution is exactly
symmetric, its variance is within 5e-8 of 1, and no sample is larger than 5.77 in size.

The format ``rademacher-v1``. The words of a block give the signs of 128 columns: column k of the block is -1 where bit
k % 32 (bit 0 is the lowest) of word k // 32 is set, and 1 elsewhere.

``LANES`` blocks are worked on at once, as many as a register has 32-bit lanes. A product of Philox takes 64 bits, so
blocks are split over two sets of wide lanes; the high half of a wide lane may hold anything, because only low halves
are multiplied. A block costs 75 integer operations and its samples 40 of the others; both are counted in vectors.
"""

import llvmlite.ir as ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, models, register_model

from fastdmf.kernels.cpu.vectors import (
    VECTOR_BYTES,
    Vec,
    _address,
    _broadcast,
    _call,
    _constant,
    _each,
    _pack,
    _shuffle,
    _vector,
    lanes_of,
    mul,
    sub,
)

__all__ = ["LANES", "columns", "holds_signs", "load_entries", "normals", "own_frame", "store_words", "words"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

LANES = VECTOR_BYTES // 4

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# From the lowest up, each exactly a float32: minimax fits of -2 ln(1 + f) / f on [-1/2, 0] and, in t^2 on [0, 1/4], of
# sin(pi t) / t and cos(pi t). One term less would save 1 % of the time and cost a digit.
_LOG = (
    -1.999999761581421,
    1.0000687837600708,
    -0.663818895816803,
    0.543604850769043,
    -0.08043222874403,
    1.559323787689209,
    2.1476664543151855,
    2.3616294860839844,
)
_SIN = (3.1415927410125732, -5.167720317840576, 2.5502591133117676, -0.5993670225143433, 0.07969464361667633)
_COS = (1.0, -4.934795379638672, 4.058447360992432, -1.3320621252059937, 0.22000567615032196)
_EXPONENT = -1.6525916635146132e-07

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}

_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Words(types.Type):
    """One register of 32-bit words."""

    def __init__(self):
        super().__init__(name=f"Words({LANES})")


@register_model(Words)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, manager, words):
        super().__init__(manager, words, _INTEGERS)


_INTEGERS = ir.VectorType(_I32, LANES)
_WIDE = ir.VectorType(_I64, LANES // 2)
_WORDS = Words()
_SAMPLES = Vec(types.float32, LANES)
_FLOATS = _vector(_SAMPLES)


# Philox --------------------------------------------------------------------------------------------------------


def _round(builder, state, key):
    """Return the state after one round: two products of low halves, whose halves are crossed and mixed in."""
    low, shift = _constant(_WIDE, 0xFFFFFFFF), _constant(_WIDE, 32)
    p0, p1 = (builder.mul(builder.and_(state[k], low), _constant(_WIDE, _MULTIPLIERS[k // 2])) for k in (0, 2))
    # The older word first meets the key: where both are the same for all blocks, that is done outside the loop.
    c0 = builder.xor(builder.lshr(p1, shift), builder.xor(state[1], key[0]))
    c2 = builder.xor(builder.lshr(p0, shift), builder.xor(state[3], key[1]))
    return c0, p1, c2, p0


@intrinsic
def words(typingctx, block, row, stream):
    """Return the four words of ``LANES`` blocks from ``block`` (int64) on; ``stream`` is (problem, key), all uint32.

    Lane 4 q + j holds block j LANES / 4 + q: the order in which ``columns`` needs two shuffles a vector.
    """
    places = [j * LANES // 4 + q for q in range(LANES // 4) for j in range(4)]

    def codegen(context, builder, signature, values):
        def wide(value):
            return _broadcast(builder, _WIDE, builder.zext(value, _I64))

        first = _broadcast(builder, _WIDE, values[0])
        stream = [builder.extract_value(values[2], k) for k in range(3)]
        row, problem = wide(values[1]), wide(stream[0])
        # Even lanes of a register are the low halves of the first set of wide lanes, odd lanes those of the second.
        sets = [
            (builder.add(first, ir.Constant(_WIDE, places[half::2])), _constant(_WIDE, 0), row, problem)
            for half in (0, 1)
        ]
        for r in range(_ROUNDS):
            key = [wide(builder.add(k, _I32(r * weyl & 0xFFFFFFFF))) for k, weyl in zip(stream[1:], _WEYL)]
            sets = [_round(builder, state, key) for state in sets]
        lanes = [lane for k in range(0, LANES, 2) for lane in (k, LANES + k)]
        pairs = [[builder.bitcast(word, _INTEGERS) for word in pair] for pair in zip(*sets)]
        return _pack(builder, [_shuffle(builder, *pair, lanes) for pair in pairs])

    return types.UniTuple(_WORDS, 4)(types.int64, types.uint32, types.UniTuple(types.uint32, 3)), codegen


def _mix(builder, x, y, run, odd):
    """Take runs of lanes in turn from x and y, the even or the odd runs of each four lanes."""
    lanes = []
    for start in range(0, LANES, 4):
        if run == 1:
            lanes += [start + 2 * odd, LANES + start + 2 * odd, start + 2 * odd + 1, LANES + start + 2 * odd + 1]
        else:
            lanes += [start + 2 * odd, start + 2 * odd + 1, LANES + start + 2 * odd, LANES + start + 2 * odd + 1]
    return _shuffle(builder, x, y, lanes)


@intrinsic
def columns(typingctx, row):
    """Return what four vectors, one number a block each, hold for the columns in their order."""

    def codegen(context, builder, signature, values):
        a, b, c, d = (builder.extract_value(values[0], k) for k in range(4))
        halves = [(_mix(builder, a, b, 1, odd), _mix(builder, c, d, 1, odd)) for odd in (0, 1)]
        return _pack(builder, [_mix(builder, *half, 2, odd) for half in halves for odd in (0, 1)])

    return row(row), codegen


# Arithmetic on words and samples, vectors or rows of them ------------------------------------------------------


def _bitwise(name, *args):
    """Make the type and the code of an intrinsic that is one instruction on words."""
    return _each(_WORDS, args, lambda builder, *values: getattr(builder, name)(*values))


@intrinsic(prefer_literal=True)
def _bits(typingctx, number):
    """Return words that all hold a constant."""
    value = number.literal_value & 0xFFFFFFFF
    return _WORDS(number), lambda context, builder, signature, values: _constant(_INTEGERS, value)


@intrinsic
def _splat(typingctx, number):
    """Return samples that all hold a constant."""

    def codegen(context, builder, signature, values):
        return _broadcast(builder, _FLOATS, context.cast(builder, values[0], types.float64, types.float32))

    return _SAMPLES(types.float64), codegen


@intrinsic
def _shift_right(typingctx, x, y):
    return _bitwise("lshr", x, y)


@intrinsic
def _shift_left(typingctx, x, y):
    return _bitwise("shl", x, y)


@intrinsic
def _and(typingctx, x, y):
    return _bitwise("and_", x, y)


@intrinsic
def _or(typingctx, x, y):
    return _bitwise("or_", x, y)


@intrinsic
def _xor(typingctx, x, y):
    return _bitwise("xor", x, y)


@intrinsic
def _minus(typingctx, x, y):
    return _bitwise("sub", x, y)


@intrinsic
def _as_samples(typingctx, x):
    """Return the floats that have these bits."""
    return _each(_SAMPLES, (x,), lambda builder, value: builder.bitcast(value, _FLOATS))


@intrinsic
def _as_words(typingctx, x):
    """Return the bits of samples."""
    return _each(_WORDS, (x,), lambda builder, value: builder.bitcast(value, _INTEGERS))


@intrinsic
def _convert(typingctx, x):
    """Return signed integers as floats."""
    return _each(_SAMPLES, (x,), lambda builder, value: builder.sitofp(value, _FLOATS))


def _fma(builder, x, y, z):
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [x, y, z])


@intrinsic
def _exact_fma(typingctx, x, y, z):
    """Return x y + z, rounded once on every machine."""
    return _each(_SAMPLES, (x, y, z), _fma)


@intrinsic
def _root(typingctx, x):
    return _each(_SAMPLES, (x,), lambda builder, value: _call(builder, f"llvm.sqrt.v{LANES}f32", _FLOATS, [value]))


def _polynomial(coefficients):
    """Make an intrinsic that evaluates a polynomial by Horner's rule."""

    @intrinsic
    def evaluate(typingctx, x):
        def operation(builder, value):
            total = _constant(_FLOATS, coefficients[-1])
            for coefficient in coefficients[-2::-1]:
                total = _fma(builder, total, value, _constant(_FLOATS, coefficient))
            return total

        return _each(_SAMPLES, (x,), operation)

    return evaluate


_log = _polynomial(_LOG)
_sin = _polynomial(_SIN)
_cos = _polynomial(_COS)


# The normal transform ------------------------------------------------------------------------------------------


@njit(forceinline=True, **_SETTINGS)
def _radius(w):
    """Return sqrt(-2 ln u), u in (0, 1) from the 23 high bits of w."""
    u = sub(_as_samples(_or(_shift_right(w, _bits(9)), _bits(0x3F800000))), _splat(1.0 - 2.0**-24))
    half = _as_words(u)
    e = _and(_minus(half, _bits(0x3F000000)), _bits(-0x800000))  # the exponent, in its place: 2^23 e
    f = sub(_as_samples(_minus(half, e)), _splat(1.0))
    return _root(_exact_fma(_convert(e), _splat(_EXPONENT), mul(f, _log(f))))


@njit(forceinline=True, **_SETTINGS)
def _angle(v):
    """Return sine and cosine of a uniform angle: the high bits of v, and its lowest for the sign of the cosine."""
    t = sub(_as_samples(_or(_shift_right(v, _bits(9)), _bits(0x3F800001))), _splat(1.5))
    square = mul(t, t)
    cosine = _xor(_as_words(_cos(square)), _shift_left(v, _bits(31)))
    return mul(_sin(square), t), _as_samples(cosine)


@njit(forceinline=True, **_SETTINGS)
def normals(w, v):
    """Return the samples of two sets of words, each for 4 ``LANES`` columns in their order.

    Two sets, because the operations of one wait for each other: one alone took 1.18 times as long.
    """
    radius = _radius((w[0], w[2], v[0], v[2]))
    sine, cosine = _angle((w[1], w[3], v[1], v[3]))
    x, y = mul(radius, sine), mul(radius, cosine)
    return columns((x[0], y[0], x[1], y[1])), columns((x[2], y[2], x[3], y[3]))


# Entries in memory: samples in float32, or signs in the bits of uint32 ------------------------------------------


@intrinsic
def own_frame(typingctx):
    """Keep the function that calls this out of its callers, with a stack frame that starts on a cache line."""

    def codegen(context, builder, signature, values):
        builder.function.attributes.add("noinline")
        builder.function.attributes.alignstack = 64
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def holds_signs(typingctx, a):
    """Return whether ``a`` holds signs, known when compiling."""
    signs = a.dtype == types.uint32
    return types.boolean(a), lambda context, builder, signature, values: ir.Constant(ir.IntType(1), signs)


@intrinsic
def store_words(typingctx, a, offset, row):
    """Write a row of words to a[offset:] of a uint32 array."""

    def codegen(context, builder, signature, values):
        for k in range(row.count):
            at = builder.add(values[1], _I64(k * LANES))
            address = builder.bitcast(_address(context, builder, a, values[0], at), _INTEGERS.as_pointer())
            builder.store(builder.extract_value(values[2], k), address, align=4)
        return context.get_dummy_value()

    return types.void(a, types.int64, row), codegen


@intrinsic
def load_entries(typingctx, x, a, offset):
    """Return the native vector of x's type with the entries at a[offset:].

    ``offset`` counts entries, also where they are signs; those of one vector lie in one word.
    """
    vec = Vec(x.dtype, lanes_of(x.dtype))
    signs = a.dtype == types.uint32

    def codegen(context, builder, signature, values):
        if signs:
            word = builder.load(_address(context, builder, a, values[1], builder.lshr(values[2], _I64(5))))
            vector = ir.VectorType(_I32, vec.lanes)
            last = ir.Constant(vector, [31 - k for k in range(vec.lanes)])
            begin = _broadcast(builder, vector, builder.trunc(builder.and_(values[2], _I64(31)), _I32))
            bits = builder.shl(_broadcast(builder, vector, word), builder.sub(last, begin))
            negative = builder.icmp_signed("<", bits, _constant(vector, 0))
            return builder.select(negative, _constant(_vector(vec), -1.0), _constant(_vector(vec), 1.0))
        vector = ir.VectorType(ir.FloatType(), vec.lanes)
        address = builder.bitcast(_address(context, builder, a, *values[1:]), vector.as_pointer())
        value = builder.load(address)
        value.align = 4
        return value if vec.base is types.float32 else builder.fpext(value, _vector(vec))

    return vec(x, a, types.int64), codegen
