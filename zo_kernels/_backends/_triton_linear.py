"""The perturbed linear: both forwards of a step for one read of the weights, which nothing ever writes.

    y[:M] = x[:M] round(W + s)^T + round(b + s_b)        y[M:] = x[M:] round(W - s)^T + round(b - s_b)
    s = sum_k c_k z(seed, stream, tag_k, i)                                                          docs/numerics.md

Cost of a 16-bit weight, for one Gaussian term and up to 64 rows of x in each half: 2 bytes read, none written, where two bare forwards move
4, and two passes with two forwards 12 (down to 4 where their buffer stays in the L2 cache). 19 SASS instructions on sm_90, 20 to 27 on sm_80:
the noise 9.25 and convert 1 as in a pass, then both signs with their roundings 3, and 5 to 6 for Philox's 64-bit counters, tensor cores,
shared memory and loop. tests/kernels/test_triton_aot.py counts them. fp32 weights take 53 at 16 rows, since the tensor cores have no fp32:
one FFMA for each row of x.

From how many rows on it cannot win, an estimate, not yet measured: an H100 issues some 29e12 instructions a second, so 19 of them take as
long as reading 2 bytes at 3 TB/s, 0.65 ps. Every 64 further rows of a half make the noise once more, so M rows take 0.65 ps ceil(M / 64) at
best; the tensor cores' work hides behind that. Two bare forwards take 1.4 ps up to some 250 rows, so from 129 rows on they are faster. Two
passes and two forwards through memory take 4.1 ps, and from 250 rows on 2.8 ps + M 0.0055 ps (4 M operations at 730e12 a second), so from
some 600 rows on they are faster too; from fewer where the buffer stays in the L2 cache.

Belongs here: device code of this product. Does not belong here: noise (_triton_kernels.py), what is launched with what (triton.py),
checks (zo_kernels/linear.py).

Layout. As in _triton_kernels.py a lane owns one Gaussian call, here 16 elements of a row: 0..7 and 16..23 of some 32. A tile is BN rows by
BK columns, so that no output of a call is wasted, and chunk number n of all lanes is one operand of a product over BK / CHUNKS columns. x
is read in that order of columns. theta - s is what the negated coefficients give, since every rounding on the way to s is symmetric. (Only
a weight of -0 where s is 0 stays -0 here, which no sum of products shows.)

Where a matrix has too few rows to fill the device, programs share a row: each adds up a part of K, and `finish_kernel` adds the parts, in
order, through fp32 partial sums of y's shape. Nothing of the weight's size is ever written.
"""
# The functions are Triton's language in Python's syntax: annotations would mean tl types, and its compiler knows no (*x, y).
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from zo_kernels._backends._triton_kernels import GAUSSIAN, add_term, chunk, coefficient, mix, round_nearest, widen


@triton.jit
def noise(
    i_tile, at, stream, tag, c, n_terms, tags, coefs, k0, k1, base, KIND: tl.constexpr, TERMS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """The 16 sums of every lane, `i_tile + at` being its first element's index: one term (tag, c), or n_terms from device memory."""
    if KIND != GAUSSIAN:  # 128 elements to a call: `i_tile` need not be a multiple of that, so the sum is formed first
        at = i_tile + at
        i_tile = i_tile * 0
    zero = tl.zeros([P], tl.float32)
    s = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    if TERMS == 1:
        s = add_term(s, i_tile, at, stream, tag, c, k0, k1, base, KIND, True, True)
    else:
        for k in tl.range(0, n_terms):
            tag_k = tl.load(tags + 2 * k).to(tl.uint32)
            c_k = coefficient(tl.load(coefs + k), KIND)
            s = add_term(s, i_tile, at, stream, tag_k, c_k, k0, k1, base, KIND, False, True)
    if KIND == GAUSSIAN:
        s = mix(s)
    return s


@triton.jit
def pick(s, a):
    """Number a (0 .. 15) of every lane's 16: [P]."""
    bit = (a & 1) == 0
    b0, b1, b2, b3 = tl.where(bit, s[0], s[1]), tl.where(bit, s[2], s[3]), tl.where(bit, s[4], s[5]), tl.where(bit, s[6], s[7])
    b4, b5, b6, b7 = (
        tl.where(bit, s[8], s[9]),
        tl.where(bit, s[10], s[11]),
        tl.where(bit, s[12], s[13]),
        tl.where(bit, s[14], s[15]),
    )
    bit = (a & 2) == 0
    b0, b1, b2, b3 = tl.where(bit, b0, b1), tl.where(bit, b2, b3), tl.where(bit, b4, b5), tl.where(bit, b6, b7)
    bit = (a & 4) == 0
    b0, b1 = tl.where(bit, b0, b1), tl.where(bit, b2, b3)
    return tl.where((a & 8) == 0, b0, b1)


@triton.jit
def product(w, x, acc, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + w x^T in fp32. The weight comes first: on sm_90 that operand may lie in registers. The interpreter knows no bf16, and products of
    16-bit numbers are exact in fp32."""
    if INTERPRETED:
        w = widen(w, DTYPE)
        x = widen(x, DTYPE)
    return tl.dot(w, tl.trans(x), acc, input_precision="ieee")


@triton.jit
def perturbed_bias(
    bias, n, N, offset, stream, tag, c, n_terms, tags, coefs, k0, k1, base, DTYPE: tl.constexpr, KIND: tl.constexpr,
    TERMS: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(b + s, b - s), rounded, as fp32 [BN]. An element a lane: 16 times the noise that is needed, but of one vector, and at any offset."""
    i = tl.cast(offset, tl.int64) + n
    opaque = base.to(tl.uint32) | (i >> 56).to(tl.uint32)
    first = (i & -32) + (i & 8)
    s = noise(first * 0, first, stream, tag, c, n_terms, tags, coefs, k0, k1, opaque, KIND, TERMS, BN)
    u = pick(s, 8 * ((i >> 4) & 1) + (i & 7))
    d = widen(tl.load(bias + n, mask=n < N, other=0.0), DTYPE)
    plus = widen(round_nearest(d + u, DTYPE, INTERPRETED), DTYPE)
    minus = widen(round_nearest(d - u, DTYPE, INTERPRETED), DTYPE)
    return plus, minus


# Nothing that changes from step to step, or with the number of tokens, may be specialised on.
NOT_SPECIALISED = [
    *("M", "offset", "bias_offset", "seed_low", "seed_high", "stream", "bias_stream", "tag", "coef", "n_terms", "tags", "coefs"),
    *("base", "splits", "split_tiles"),
]


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def linear_kernel(
    x, weight, bias, y,  # [M or 2 M, K], [N, K], [N] or None, [M or 2 M, N]
    partial,  # fp32 [splits, M or 2 M, N] if SPLIT: the sums over parts of K, which `finish_kernel` adds up; otherwise None
    M, N, K,
    split_tiles,  # length of a part of K, in BK
    offset, bias_offset,  # index of the first element in the unsharded tensor; `offset` is a multiple of 32
    seed_low, seed_high, stream, bias_stream, tag, coef,  # bits of uint32 and fp32 values, as int32
    n_terms, tags, coefs,  # int32 [n, 2] (low word, high word), fp32 [n], in device memory; None if TERMS == 1
    base,  # 0x3C240000
    DTYPE: tl.constexpr,  # of x, weight, bias and y: tl.float32, tl.float16 or tl.bfloat16
    KIND: tl.constexpr,  # GAUSSIAN or RADEMACHER
    TERMS: tl.constexpr,  # 1: tag, coef; 0: n_terms of them
    HALVES: tl.constexpr,  # whether there is a second half of x and y, with -s
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,  # rows of x, of one half
    BN: tl.constexpr,  # rows of the weight
    BK: tl.constexpr,  # a multiple of 32
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program computes y[m0 : m0 + BM, n0 : n0 + BN] of each half, or the part of it that a stretch of K gives."""
    LANES: tl.constexpr = BK // 16  # of a row
    P: tl.constexpr = BN * LANES
    W: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    CHUNKS: tl.constexpr = 16 // W
    # Programs that read the same weights are neighbours: all but the first find them in the L2 cache.
    m_tiles = (M + (BM - 1)) // BM
    m0 = tl.program_id(0) % m_tiles * BM
    n0 = tl.program_id(0) // m_tiles * BN
    part = tl.program_id(1)

    k0 = seed_low.to(tl.uint32)
    k1 = seed_high.to(tl.uint32)
    t = tag.to(tl.uint32)
    c = 0.0
    if TERMS == 1:
        c = coefficient(coef.to(tl.float32, bitcast=True), KIND)
    origin = tl.cast(offset, tl.int64)

    # Rows beyond the end repeat the last one; their results are not stored.
    lane = tl.arange(0, P)
    row = tl.minimum(n0 + lane // LANES, N - 1).to(tl.int64) * K
    place = lane % LANES
    column = 32 * (place >> 1) + 8 * (place & 1)
    at = row + column
    j = tl.arange(0, W)[None, :]
    # x takes the chunks of K in the same order: the sum over K does not mind.
    m = m0 + tl.arange(0, BM)
    x_place = tl.arange(0, LANES * W)
    x_column = 32 * (x_place // (2 * W)) + 8 * (x_place // W & 1)
    x_row = tl.minimum(m, M - 1).to(tl.int64) * K
    x_at = x_row[:, None] + tl.max_contiguous(tl.multiple_of(x_column + x_place % W, W), W)[None, :]
    x_half = tl.cast(M, tl.int64) * K

    plus = tl.zeros([BN, BM], tl.float32)
    minus = tl.zeros([BN, BM], tl.float32)
    for k in tl.range(part * split_tiles * BK, tl.minimum((part + 1) * split_tiles * BK, K), BK):
        w = ()
        for n in tl.static_range(CHUNKS):
            shift = 16 * (n * W // 8) + n * W % 8
            p = weight + k + at[:, None] + (shift + j)
            if EVEN_K:
                w = w + (tl.load(p),)
            else:
                w = w + (tl.load(p, mask=(k + column < K)[:, None], other=0.0),)
        i_tile = origin + k
        opaque = base.to(tl.uint32) | ((i_tile + at) >> 56).to(tl.uint32)  # see perturb_kernel
        s = noise(i_tile, at, stream.to(tl.uint32), t, c, n_terms, tags, coefs, k0, k1, opaque, KIND, TERMS, P)
        for n in tl.static_range(CHUNKS):
            shift = 16 * (n * W // 8) + n * W % 8
            d = widen(w[n], DTYPE)
            u = chunk(s, n * W, P, W)
            p = x + k + shift + x_at
            if EVEN_K:
                x_plus = tl.load(p)
            else:  # no noise either beyond the end of a row: 0 times an infinity would be NaN
                u = tl.where((k + column < K)[:, None], u, 0.0)
                x_plus = tl.load(p, mask=(k + x_column < K)[None, :], other=0.0)
            w_plus = tl.reshape(round_nearest(d + u, DTYPE, INTERPRETED), (BN, LANES * W))
            plus = product(w_plus, x_plus, plus, DTYPE, INTERPRETED)
            if HALVES:
                if EVEN_K:
                    x_minus = tl.load(p + x_half)
                else:
                    x_minus = tl.load(p + x_half, mask=(k + x_column < K)[None, :], other=0.0)
                w_minus = tl.reshape(round_nearest(d - u, DTYPE, INTERPRETED), (BN, LANES * W))
                minus = product(w_minus, x_minus, minus, DTYPE, INTERPRETED)

    n = n0 + tl.arange(0, BN)
    inside = (n < N)[:, None] & (m < M)[None, :]
    to = n[:, None] + (m.to(tl.int64) * N)[None, :]
    y_half = tl.cast(M, tl.int64) * N
    if SPLIT:
        to += part * (y_half * (2 if HALVES else 1))
        tl.store(partial + to, plus, mask=inside)
        if HALVES:
            tl.store(partial + y_half + to, minus, mask=inside)
    else:
        if BIAS:
            b_plus, b_minus = perturbed_bias(
                bias, n, N, bias_offset, bias_stream.to(tl.uint32), t, c, n_terms, tags, coefs, k0, k1, base, DTYPE, KIND, TERMS, BN,
                INTERPRETED,
            )  # fmt: skip
            plus += b_plus[:, None]
            minus += b_minus[:, None]
        tl.store(y + to, round_nearest(plus, DTYPE, INTERPRETED), mask=inside)
        if HALVES:
            tl.store(y + y_half + to, round_nearest(minus, DTYPE, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=[*NOT_SPECIALISED, "rows"])
def finish_kernel(
    bias, y, partial,
    rows,  # of y
    M, N, splits, bias_offset, seed_low, seed_high, bias_stream, tag, coef, n_terms, tags, coefs, base,
    DTYPE: tl.constexpr, KIND: tl.constexpr, TERMS: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y = round(the partial sums, added up in order, + the bias); arguments as above. In order: atomics would not repeat a result."""
    m_tiles = (rows + (BM - 1)) // BM
    m = tl.program_id(0) % m_tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) // m_tiles * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (n < N)[None, :]
    at = (m.to(tl.int64) * N)[:, None] + n[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for part in range(0, splits):
        total += tl.load(partial + part * (tl.cast(rows, tl.int64) * N) + at, mask=inside, other=0.0)
    if BIAS:
        c = 0.0
        if TERMS == 1:
            c = coefficient(coef.to(tl.float32, bitcast=True), KIND)
        b_plus, b_minus = perturbed_bias(
            bias, n, N, bias_offset, bias_stream.to(tl.uint32), tag.to(tl.uint32), c, n_terms, tags, coefs, seed_low.to(tl.uint32),
            seed_high.to(tl.uint32), base, DTYPE, KIND, TERMS, BN, INTERPRETED,
        )  # fmt: skip
        total += tl.where((m < M)[:, None], b_plus[None, :], b_minus[None, :])
    tl.store(y + at, round_nearest(total, DTYPE, INTERPRETED), mask=inside)
