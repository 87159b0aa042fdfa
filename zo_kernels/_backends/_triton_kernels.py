"""The Triton kernel: one launch over a list of tensors, the noise generated in registers.

    dst <- round(decay * src + scale * mask * sum_k c_k z(seed, stream, tag_k, i))                         docs/numerics.md

Cost of an element, in SASS instructions, for one Gaussian term on 16-bit weights: Philox 40 / 16 = 2.5, the sixteen numbers 1.75,
their products 1, the mix 4, load, convert, add, round and store 3: about 12, and 3 of addresses and loop. In a loop over terms each
costs Philox, numbers and products again, less what does not depend on the tag: 5, and 0.3
for the loop. A sequence of passes keeps the weights in registers: 12.5 to 13.1 for each pass of one term, roundings included.
tests/kernels/test_triton_aot.py counts them.

Belongs here: device code, in the order of the contract's sections. Does not belong here: anything that imports torch, launch
parameters, checks (triton.py).

Layout. A *lane* is one element of Triton's [P] tensors and owns one Gaussian call, that is the 16 elements i0 + 0..7 and i0 + 16..23.
A *tile* is P lanes, 16 P elements, and starts at a multiple of 16 P in the full tensor, so a tile never crosses q = 2^32 and the
high word of q is the same in all lanes. A *chunk* is the W elements of one 128-bit access: [P, W] with W = 8 (16-bit) or 4 (fp32).
Chunks are put together by tl.join, whose result keeps a lane's values in its thread: no shared memory, no shuffles. With
W = 8 for fp32 the loads would be laid out 4 to a thread and every chunk would go through shared memory.
"""
# The functions are Triton's language in Python's syntax: annotations would mean tl types, and its compiler knows no (*x, y).
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: SIM300, RUF005

import triton
import triton.language as tl

GAUSSIAN: tl.constexpr = tl.constexpr(0)  # purposes, section 1
RADEMACHER: tl.constexpr = tl.constexpr(1)
ROUNDING: tl.constexpr = tl.constexpr(2)
MASK: tl.constexpr = tl.constexpr(3)

# KINDs beside GAUSSIAN and RADEMACHER: z from factors, with numbers of columns that are multiples of 8 and right factors that lie at
# multiples of 16 bytes, or any.
LOW_RANK_8: tl.constexpr = tl.constexpr(2)
LOW_RANK: tl.constexpr = tl.constexpr(3)

RSQRT: tl.constexpr = tl.constexpr(4)  # added to SCALE
RECORD: tl.constexpr = tl.constexpr(14)  # words of zo_tensor

KAPPA: tl.constexpr = tl.constexpr(float.fromhex("0x1.251fbep+0"))

STEP_OTHER: tl.constexpr = tl.constexpr(1)  # flags of a pass of a sequence that is not a usual one
STEP_LIVE: tl.constexpr = tl.constexpr(2)
STEP_STOCHASTIC: tl.constexpr = tl.constexpr(4)

TILE_BITS = 40  # a span is tensor << TILE_BITS | first tile
SPAN_TILE_BITS: tl.constexpr = tl.constexpr(TILE_BITS)
SPAN_TILE_MASK: tl.constexpr = tl.constexpr((1 << TILE_BITS) - 1)
BLOCK_LIMIT: tl.constexpr = tl.constexpr(1 << 30)  # scale blocks are clamped to this; spans are far shorter


# ---- 1. Philox4x32-10 -------------------------------------------------------------------------------------------------


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words per lane; every argument is uint32, a scalar where it is the same in all lanes.

    64-bit products, not tl.umulhi: one IMAD.WIDE gives both halves, umulhi and the low product would be two multiplications.
    """
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def call(start, step, PURPOSE: tl.constexpr, stream, tag, k0, k1, ROWS: tl.constexpr):
    """The words of the calls q = start + step: `start` an int64 scalar, `step` a [P] tensor.

    Without rows `start` is a multiple of a power of two above every `step`, so the sum cannot carry into the high word.
    """
    if ROWS:
        q = start + step
        return philox(q.to(tl.uint32), (PURPOSE << 24) | (q >> 32).to(tl.uint32), stream, tag, k0, k1)
    else:
        low = start.to(tl.uint32) + step.to(tl.uint32)
        return philox(low, (PURPOSE << 24) | (start >> 32).to(tl.uint32), stream, tag, k0, k1)


# ---- 2. Gaussian ------------------------------------------------------------------------------------------------------


@triton.jit
def coefficient(c, KIND: tl.constexpr):
    """c' of section 2, or c itself (section 3); 0 for a term that is not live. `c` is fp32, a scalar or a tensor."""
    if KIND == GAUSSIAN:
        t = c * KAPPA
        b = t.to(tl.uint32, bitcast=True)
        result = (b + 0x3F + ((b >> 7) & 1)) & 0xFFFFFF80
        limit = 0x7F7FFFC0  # from here on the rounding overflows to infinity
    else:
        b = c.to(tl.uint32, bitcast=True)
        result = b
        limit = 0x7F800000
    # 2^-100 <= |t| and c' finite, in one comparison: what is below 2^-100 wraps to a large number, infinity and NaN lie above the limit.
    live = ((b << 1) - 0x1B000000) < 2 * (limit - 0x0D800000)
    return tl.where(live, result, 0).to(tl.float32, bitcast=True)


@triton.jit
def scaled(w, SHIFT: tl.constexpr, base, c, s, FIRST: tl.constexpr):
    """s + c' f: exact product, so the fma rounds once as section 2 asks. With a literal base the mask and the base, two
    immediates, would need two LOP3."""
    f = (((w << SHIFT) & 0x82C20000) | base).to(tl.float32, bitcast=True)
    if FIRST:
        return c * f
    else:
        return tl.fma(c, f, s)


@triton.jit
def four(w, base, c, s, m: tl.constexpr, FIRST: tl.constexpr):
    return (
        scaled(w, 0, base, c, s[4 * m], FIRST),
        scaled(w, 4, base, c, s[4 * m + 1], FIRST),
        scaled(w, 11, base, c, s[4 * m + 2], FIRST),
        scaled(w, 15, base, c, s[4 * m + 3], FIRST),
    )


@triton.jit
def mix4(a, b, c, d):
    a, b = a + b, a - b
    c, d = c + d, c - d
    return a + c, b + d, a - c, b - d


@triton.jit
def mix(s):
    """Steps H = 1, 2 inside quarters, then H = 4, 8 across them."""
    a = mix4(s[0], s[1], s[2], s[3]) + mix4(s[4], s[5], s[6], s[7])
    return mix_quarters(a + mix4(s[8], s[9], s[10], s[11]) + mix4(s[12], s[13], s[14], s[15]))


@triton.jit
def mix_quarters(a):
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = a
    a0, a4, a8, a12 = mix4(a0, a4, a8, a12)
    a1, a5, a9, a13 = mix4(a1, a5, a9, a13)
    a2, a6, a10, a14 = mix4(a2, a6, a10, a14)
    a3, a7, a11, a15 = mix4(a3, a7, a11, a15)
    return a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15


@triton.jit
def mixed_four(w, base, c, minus_c):
    """c' f of one word through the steps H = 1, 2. The products are exact, so step 1 may take one in an fma: 10 instructions, not 12."""
    x0 = scaled(w, 0, base, c, c, True)
    x2 = scaled(w, 11, base, c, c, True)
    a, b = scaled(w, 4, base, c, x0, False), scaled(w, 4, base, minus_c, x0, False)
    d, e = scaled(w, 15, base, c, x2, False), scaled(w, 15, base, minus_c, x2, False)
    return a + d, b + e, a - d, b - e


@triton.jit
def one_gaussian(i_tile, at, stream, tag, c, k0, k1, base, ROWS: tl.constexpr):
    """What `add_term` and `mix` make of a single term."""
    w0, w1, w2, w3 = call(i_tile >> 4, 2 * (at >> 5) + ((at >> 3) & 1), GAUSSIAN, stream, tag, k0, k1, ROWS)
    quarters = mixed_four(w0, base, c, -c) + mixed_four(w1, base, c, -c)
    return mix_quarters(quarters + mixed_four(w2, base, c, -c) + mixed_four(w3, base, c, -c))


# ---- 3. Rademacher ----------------------------------------------------------------------------------------------------


@triton.jit
def signed(w, BIT: tl.constexpr, c, s, FIRST: tl.constexpr):
    """s ± c, minus where the bit is set."""
    v = (((w << (31 - BIT)) & 0x80000000) ^ c.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    if FIRST:
        return v
    else:
        return s + v


@triton.jit
def eight(w, BIT: tl.constexpr, c, s, at: tl.constexpr, FIRST: tl.constexpr):
    return (
        signed(w, BIT, c, s[at], FIRST),
        signed(w, BIT + 1, c, s[at + 1], FIRST),
        signed(w, BIT + 2, c, s[at + 2], FIRST),
        signed(w, BIT + 3, c, s[at + 3], FIRST),
        signed(w, BIT + 4, c, s[at + 4], FIRST),
        signed(w, BIT + 5, c, s[at + 5], FIRST),
        signed(w, BIT + 6, c, s[at + 6], FIRST),
        signed(w, BIT + 7, c, s[at + 7], FIRST),
    )


# ---- the sum over the terms -------------------------------------------------------------------------------------------


@triton.jit
def add_term(s, i_tile, at, stream, tag, c, k0, k1, base, KIND: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """The 16 sums of every lane, one term further. A term that is not live has c = 0 and adds ±0 to a sum that is never -0.

    `i_tile + at` is the index of each lane's first element. A Rademacher call feeds eight lanes, and each of them makes it: 2.5
    instructions an element, where handing words from lane to lane would need shared memory.
    """
    if KIND == GAUSSIAN:
        step = 2 * (at >> 5) + ((at >> 3) & 1)
        w0, w1, w2, w3 = call(i_tile >> 4, step, GAUSSIAN, stream, tag, k0, k1, ROWS)
        return (
            four(w0, base, c, s, 0, FIRST)
            + four(w1, base, c, s, 1, FIRST)
            + four(w2, base, c, s, 2, FIRST)
            + four(w3, base, c, s, 3, FIRST)
        )
    else:
        w0, w1, w2, w3 = call(i_tile >> 7, at >> 7, RADEMACHER, stream, tag, k0, k1, ROWS)
        w = tl.where((at & 64) == 0, tl.where((at & 32) == 0, w0, w1), tl.where((at & 32) == 0, w2, w3))
        w = w >> (at & 8).to(tl.uint32)
        return eight(w, 0, c, s, 0, FIRST) + eight(w, 16, c, s, 8, FIRST)


# ---- 11. Low-rank directions ------------------------------------------------------------------------------------------


@triton.jit
def low_rank(factors, first, inside, c, KIND: tl.constexpr, P: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr):
    """RN(c z) of a chunk [P, W], whose first elements have the indices `first`: z is the sum over rho of left[row, rho] * right[rho, column].
    The products are exact. What is not `inside` may lie outside the matrix. A chunk of LOW_RANK_8 lies in one row."""
    left, right, cols, rank = factors
    row = first // cols
    column = (first - row * cols)[:, None] + tl.arange(0, W)[None, :]
    if KIND == LOW_RANK_8:
        rows = row[:, None]
        some = tl.max(inside.to(tl.int32), axis=1, keep_dims=True) != 0
    else:
        over = column - cols  # at most W - 1
        narrow = tl.minimum(cols, W).to(tl.int32)
        wraps = tl.where(over < 0, 0, 1 + tl.maximum(over, 0).to(tl.int32) // narrow).to(tl.int64)
        rows = row[:, None] + wraps
        column -= wraps * cols
        some = inside
    z = tl.zeros([P, W], tl.float32)
    for rho in range(rank):
        at = right + rho * cols + column
        if WHOLE:
            x = tl.load(left + rows * rank + rho)
            if KIND == LOW_RANK_8:
                at = tl.multiple_of(at, (1, 16))
            y = tl.load(at)
        else:
            x = tl.load(left + rows * rank + rho, mask=some, other=0.0)
            y = tl.load(at, mask=inside, other=0.0)
        z = tl.fma(tl.broadcast_to(x, (P, W)), y, z)
    return c * z


# ---- 4, 5. Chunks, masks, scales, casts -------------------------------------------------------------------------------


@triton.jit
def chunk(x, AT: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """[P, W] from W tensors [P] of the tuple x, beginning at AT. A join adds the fastest dimension, so it goes last."""
    if W == 1:
        return x[AT][:, None]
    elif W == 8:
        even = tl.join(tl.join(x[AT], x[AT + 4]), tl.join(x[AT + 2], x[AT + 6]))
        odd = tl.join(tl.join(x[AT + 1], x[AT + 5]), tl.join(x[AT + 3], x[AT + 7]))
        return tl.reshape(tl.join(even, odd), (P, 8))
    else:
        return tl.reshape(tl.join(tl.join(x[AT], x[AT + 2]), tl.join(x[AT + 1], x[AT + 3])), (P, 4))


@triton.jit
def octet(i_tile, step, PURPOSE: tl.constexpr, stream, tag, k0, k1, ROWS: tl.constexpr):
    """What purposes 2 (16 random bits) and 3 (a word to compare) give to the 8 elements of each lane's call."""
    w0, w1, w2, w3 = call(i_tile >> 3, step, PURPOSE, stream, tag, k0, k1, ROWS)
    if PURPOSE == MASK:
        return (w0 << 16 | w0 >> 16, w0, w1 << 16 | w1 >> 16, w1, w2 << 16 | w2 >> 16, w2, w3 << 16 | w3 >> 16, w3)
    else:
        return w0 & 0xFFFF, w0 >> 16, w1 & 0xFFFF, w1 >> 16, w2 & 0xFFFF, w2 >> 16, w3 & 0xFFFF, w3 >> 16


@triton.jit
def octets(i_tile, at, PURPOSE: tl.constexpr, stream, tag, k0, k1, ROWS: tl.constexpr):
    """The same for the 16 elements of a lane."""
    first = octet(i_tile, at >> 3, PURPOSE, stream, tag, k0, k1, ROWS)
    return first + octet(i_tile, (at >> 3) + 2, PURPOSE, stream, tag, k0, k1, ROWS)


@triton.jit
def round_stochastic(r, v, DTYPE: tl.constexpr):
    """Section 5; `v` holds 16 random bits."""
    b = r.to(tl.uint32, bitcast=True)
    sign = b & 0x80000000
    a = b & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        up = tl.where(a > 0x7F800000, 0x7FC0, (a + v) >> 16)
        return (up | (sign >> 16)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        pad = tl.where(a < 0x38800000, 6.103515625e-05, 0.0)  # 2^-14
        y = (a.to(tl.float32, bitcast=True) + pad).to(tl.uint32, bitcast=True)
        y = (y + (v >> 3)) & 0xFFFFE000
        magnitude = (y.to(tl.float32, bitcast=True) - pad).to(tl.uint32, bitcast=True)
        return tl.where(a > 0x7F800000, r, (magnitude | sign).to(tl.float32, bitcast=True)).to(tl.float16)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """To fp32. bf16 as bits: the interpreter's own cast flushes subnormals."""
    if DTYPE == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_nearest(r, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if DTYPE == tl.bfloat16 and INTERPRETED:  # the interpreter's own cast truncates
        b = r.to(tl.uint32, bitcast=True)
        nearest = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        return tl.where((b & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return r.to(DTYPE)


# ---- a tile -----------------------------------------------------------------------------------------------------------


@triton.jit
def settle(
    d, u, lots, dice, n: tl.constexpr, tensor, i_tile, at, e_tile, off, inside, start, live, decay,
    DTYPE: tl.constexpr, DECAY: tl.constexpr, BIT_MASK: tl.constexpr, RANDOM_MASK: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, P: tl.constexpr, W: tl.constexpr, INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
    SURE: tl.constexpr,
):  # fmt: skip
    """The new values of chunk n, whose old ones are d and whose sums are u. SURE: a term is live. The other arguments are those of `perturb_tile`."""
    mask, scales, block, k_span, keep_below = tensor[2], tensor[3], tensor[4], tensor[5], tensor[7]
    j = tl.arange(0, W)[None, :]
    shift = 16 * (n * W // 8) + n * W % 8
    d = widen(d, DTYPE)
    if DECAY:
        d = d * decay
    if SCALE > 0:
        BLOCKS: tl.constexpr = SCALE & 3
        has_scale = scales.to(tl.int64) != 0  # other tensors of the list have none: their factor is 1, which is exact
        if ROWS:
            i = i_tile + at + shift
            at_k = (i[:, None] + j) // block - k_span
        else:
            place = start + (at + shift).to(tl.uint32)
            k = place // block
            place = place - k * block
            k = k.to(tl.int64) + k_span
        if BLOCKS == 1 and WHOLE and not ROWS:  # blocks of 8 and more: a chunk lies in one or in two of them
            first = tl.load(scales + k, mask=has_scale, other=1.0)
            second = tl.load(scales + k + 1, mask=has_scale & (place + (W - 1) >= block), other=1.0)
            factor = tl.where(place[:, None] + j.to(tl.uint32) >= block, second[:, None], first[:, None])
        else:
            if not ROWS:
                at_k = k[:, None] + ((place[:, None] + j.to(tl.uint32)) // block).to(tl.int64)
            if WHOLE:
                factor = tl.load(scales + at_k, mask=has_scale, other=1.0)
            else:
                factor = tl.load(scales + at_k, mask=has_scale & inside, other=1.0)
        if SCALE >= RSQRT:
            factor = tl.where(tensor[9] != 0, tl.div_rn(1.0, tl.sqrt_rn(factor)), factor)
        u = u * factor
    r = d + u

    keep = live
    if BIT_MASK:
        has_mask = mask.to(tl.int64) != 0
        if WHOLE:
            byte = tl.load(mask + (e_tile >> 3) + ((off + shift) >> 3), mask=has_mask, other=255)
            bit = (byte.to(tl.int32)[:, None] >> ((shift & 7) + j)) & 1
        else:
            e = e_tile + off[:, None] + (shift + j)
            byte = tl.load(mask + (e >> 3), mask=has_mask & inside, other=255)
            bit = (byte.to(tl.int32) >> (e & 7).to(tl.int32)) & 1
        keep = keep & (bit != 0)
    if RANDOM_MASK:
        keep = keep & ((chunk(lots, n * W, P, W) < keep_below) | (keep_below == 0))
    if BIT_MASK or RANDOM_MASK or not SURE:
        r = tl.where(keep, r, d)

    if STOCHASTIC:
        return round_stochastic(r, chunk(dice, n * W, P, W), DTYPE)
    else:
        return round_nearest(r, DTYPE, INTERPRETED)


@triton.jit
def settle_all(
    x, s, lots, dice, tensor, i_tile, at, e_tile, off, low, high, start, live, decay,
    DTYPE: tl.constexpr, DECAY: tl.constexpr, BIT_MASK: tl.constexpr, RANDOM_MASK: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, P: tl.constexpr, W: tl.constexpr, INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
    SURE: tl.constexpr,
):  # fmt: skip
    """`settle` for all chunks x of a tile."""
    y = ()
    j = tl.arange(0, W)[None, :]
    for n in tl.static_range(16 // W):
        shift = 16 * (n * W // 8) + n * W % 8
        inside = (low[:, None] <= shift + j) & (shift + j < high[:, None])
        new = settle(
            x[n], chunk(s, n * W, P, W), lots, dice, n, tensor, i_tile, at, e_tile, off, inside, start, live, decay, DTYPE, DECAY, BIT_MASK, RANDOM_MASK,
            SCALE, ROWS, STOCHASTIC, P, W, INTERPRETED, WHOLE, SURE,
        )  # fmt: skip
        y = y + (new,)
    return y


@triton.jit
def perturb_tile(
    tensor, i_tile, at, e_tile, off, low, high, start, c0, c1, live, n_terms, tag0, tag1, terms, decay, n_passes, firsts, steps,
    k0, k1, base,
    DTYPE: tl.constexpr, KIND: tl.constexpr, TERMS: tl.constexpr, DECAY: tl.constexpr, BIT_MASK: tl.constexpr,
    RANDOM_MASK: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, SEQUENCE: tl.constexpr,
    P: tl.constexpr, NARROW: tl.constexpr, INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile. The lane's first element has index i_tile + at in the full tensor and e_tile + off in memory.

    WHOLE: every element of the tile exists, every chunk is aligned to 16 bytes and to 8 elements. Otherwise a lane's element
    number j (0 .. 7, 16 .. 23) exists if low <= j < high. `start`: place of the tile's first element in the first scale block of
    the span (see `perturb_kernel`).
    """
    W: tl.constexpr = 128 // DTYPE.primitive_bitwidth if WHOLE or not NARROW else 1
    CHUNKS: tl.constexpr = 16 // W
    src, dst, stream, mask_tag = tensor[0], tensor[1], tensor[6], tensor[8]
    j = tl.arange(0, W)[None, :]
    zero = tl.zeros([P], tl.float32)
    zeros = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    # Kept for all passes of a sequence; for one pass all loads go first, and are in flight while the noise is computed. (The path of single
    # elements would pay for that with twice the registers.)
    x = ()
    if WHOLE or SEQUENCE:
        for n in tl.static_range(CHUNKS):
            shift = 16 * (n * W // 8) + n * W % 8
            if WHOLE:
                x = x + (tl.load(tl.multiple_of(src + e_tile + off[:, None] + (shift + j), (1, 16))),)
            else:
                inside = (low[:, None] <= shift + j) & (shift + j < high[:, None])
                x = x + (tl.load(src + e_tile + off[:, None] + (shift + j), mask=inside),)
    lots = ()
    dice = ()

    if SEQUENCE:
        if RANDOM_MASK:
            lots = octets(i_tile, at, MASK, stream, mask_tag, k0, k1, ROWS)
        for p in range(0, n_passes):
            word = tl.load(steps + 2 * p)
            tag = word.to(tl.uint32)
            c = (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
            other = tl.load(steps + 2 * p + 1)
            if other == 0:
                if KIND == GAUSSIAN:
                    s = one_gaussian(i_tile, at, stream, tag, c, k0, k1, base, ROWS)
                else:
                    s = add_term(zeros, i_tile, at, stream, tag, c, k0, k1, base, KIND, True, ROWS)
                x = settle_all(
                    x, s, lots, dice, tensor, i_tile, at, e_tile, off, low, high, start, True, decay,
                    DTYPE, 0, BIT_MASK, RANDOM_MASK, SCALE, ROWS, False, P, W, INTERPRETED, WHOLE, True,
                )  # fmt: skip
            else:
                s = add_term(zeros, i_tile, at, stream, tag, c, k0, k1, base, KIND, True, ROWS)
                for k in range(tl.load(firsts + p) + 1, tl.load(firsts + p + 1)):
                    term = tl.load(terms + k)
                    more = (term >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
                    s = add_term(s, i_tile, at, stream, term.to(tl.uint32), more, k0, k1, base, KIND, False, ROWS)
                if KIND == GAUSSIAN:
                    s = mix(s)
                flags = other.to(tl.uint32)
                factor = (other >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
                some = (flags & STEP_LIVE) != 0
                if STOCHASTIC:
                    if (flags & STEP_STOCHASTIC) != 0:
                        x = settle_all(
                            x, s, lots, octets(i_tile, at, ROUNDING, stream, tag, k0, k1, ROWS), tensor, i_tile, at, e_tile, off, low,
                            high, start, some, factor, DTYPE, 1, BIT_MASK, RANDOM_MASK, SCALE, ROWS, True, P, W, INTERPRETED, WHOLE,
                            False,
                        )  # fmt: skip
                    else:
                        x = settle_all(
                            x, s, lots, dice, tensor, i_tile, at, e_tile, off, low, high, start, some, factor,
                            DTYPE, 1, BIT_MASK, RANDOM_MASK, SCALE, ROWS, False, P, W, INTERPRETED, WHOLE, False,
                        )  # fmt: skip
                else:
                    x = settle_all(
                        x, s, lots, dice, tensor, i_tile, at, e_tile, off, low, high, start, some, factor,
                        DTYPE, 1, BIT_MASK, RANDOM_MASK, SCALE, ROWS, False, P, W, INTERPRETED, WHOLE, False,
                    )  # fmt: skip
    else:
        s = zeros
        if KIND >= LOW_RANK_8:  # no noise
            pass
        elif TERMS > 0:
            s = add_term(s, i_tile, at, stream, tag0, c0, k0, k1, base, KIND, True, ROWS)
            if TERMS > 1:
                s = add_term(s, i_tile, at, stream, tag1, c1, k0, k1, base, KIND, False, ROWS)
        else:
            for k in tl.range(0, n_terms, loop_unroll_factor=2):
                term = tl.load(terms + k)
                c = (term >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
                live = live | ((term >> 32) != 0)
                s = add_term(s, i_tile, at, stream, term.to(tl.uint32), c, k0, k1, base, KIND, False, ROWS)
        if KIND == GAUSSIAN:
            s = mix(s)
        if RANDOM_MASK:
            lots = octets(i_tile, at, MASK, stream, mask_tag, k0, k1, ROWS)
        if STOCHASTIC:
            dice = octets(i_tile, at, ROUNDING, stream, tag0, k0, k1, ROWS)

    for n in tl.static_range(CHUNKS):
        shift = 16 * (n * W // 8) + n * W % 8
        here = off[:, None] + (shift + j)
        inside = (low[:, None] <= shift + j) & (shift + j < high[:, None])
        if SEQUENCE:
            y = x[n]
        else:
            if KIND >= LOW_RANK_8:
                u = low_rank(tensor[10], i_tile + at + shift, inside, c0, KIND, P, W, WHOLE)
            else:
                u = chunk(s, n * W, P, W)
            if WHOLE:
                d = x[n]
            else:
                d = tl.load(src + e_tile + here, mask=inside)
            y = settle(
                d, u, lots, dice, n, tensor, i_tile, at, e_tile, off, inside, start, live, decay, DTYPE, DECAY, BIT_MASK,
                RANDOM_MASK, SCALE, ROWS, STOCHASTIC, P, W, INTERPRETED, WHOLE,
                TERMS > 0 and WHOLE,  # `perturb_kernel` has looked whether a term is live
            )  # fmt: skip
        if WHOLE:
            tl.store(tl.multiple_of(dst + e_tile + here, (1, 16)), y)
        else:
            tl.store(dst + e_tile + here, y, mask=inside)


# ---- sequences of passes ----------------------------------------------------------------------------------------------


@triton.jit
def prepare_steps(
    n_passes,
    most_terms,
    tags,
    coefs,
    firsts,
    decays,
    roundings,
    steps,
    KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    P: tl.constexpr,
):
    """Two words for each pass: its first term as (tag, c'), and 0 if it is a usual one (one live term, no decay, nearest), or else the
    flags in the low half and the decay in the high one. As the terms, by every program."""
    for p in range(0, n_passes, P):
        some = p + tl.arange(0, P)
        exists = some < n_passes
        begin = tl.load(firsts + some, mask=exists, other=0)
        end = tl.load(firsts + some + 1, mask=exists, other=0)
        tag = tl.load(tags + 2 * begin, mask=begin < end, other=0).to(tl.uint32).to(tl.int64)
        c = coefficient(tl.load(coefs + begin, mask=begin < end, other=0.0), KIND).to(tl.uint32, bitcast=True)
        live = c
        for k in range(1, most_terms):
            there = begin + k < end
            live = live | coefficient(tl.load(coefs + begin + k, mask=there, other=0.0), KIND).to(tl.uint32, bitcast=True)
        decay = tl.load(decays + some, mask=exists, other=1.0).to(tl.uint32, bitcast=True)
        decay = tl.where((decay & 0x7F800000) == 0x7F800000, 0x3F800000, decay)
        flags = tl.where(live != 0, STEP_OTHER | STEP_LIVE, STEP_OTHER)
        if STOCHASTIC:
            flags = flags | tl.where(tl.load(roundings + some, mask=exists, other=0) != 0, STEP_STOCHASTIC, 0)
        usual = (end - begin == 1) & (decay == 0x3F800000) & (flags == (STEP_OTHER | STEP_LIVE))
        other = tl.where(usual, 0, (decay.to(tl.int64) << 32) | flags.to(tl.int64))
        tl.store(steps + 2 * some, tag | (c.to(tl.int64) << 32), mask=exists)
        tl.store(steps + 2 * some + 1, other, mask=exists)


# ---- the launch -------------------------------------------------------------------------------------------------------


# Nothing that changes from step to step may be specialised on: a new value would compile a new kernel.
NOT_SPECIALISED = [
    *("tiles", "seed_low", "seed_high", "tag0", "tag1", "coef0", "coef1", "decay_bits"),
    *("n_terms", "tags", "coefs", "terms", "decay_ptr", "base"),
    *("n_passes", "most_terms", "firsts", "decays", "roundings", "steps"),
]


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def perturb_kernel(
    table,  # int64 [n, 14]: the records of zo_tensor in csrc/zo_kernels.h
    spans,  # int64 [programs]: tensor << TILE_BITS | first tile
    tiles,  # tiles of a span
    seed_low, seed_high, tag0, tag1, coef0, coef1, decay_bits,  # bits of uint32 and fp32 values, as int32
    n_terms, tags, coefs,  # int32 [K, 2] (low word, high word), fp32 [K], in device memory; None if HOST_TERMS
    terms,  # int64 [K], scratch: what the kernel makes of tags and coefs; None if TERMS > 0
    decay_ptr,  # fp32 [1]; None unless DECAY == 2
    n_passes, most_terms, firsts, decays, roundings,  # of a sequence: S, the most terms of a pass, int64 [S + 1], fp32 [S], uint8 [S]
    steps,  # int64 [S, 2], scratch: what the kernel makes of the passes; None unless SEQUENCE
    base,  # 0x3C240000
    DTYPE: tl.constexpr,  # tl.float32, tl.float16 or tl.bfloat16
    KIND: tl.constexpr,  # GAUSSIAN or RADEMACHER; LOW_RANK_8 or LOW_RANK, with TERMS = 1, if all tensors of the list have factors
    TERMS: tl.constexpr,  # 1 or 2: that many, without a loop; 0: n_terms of them
    HOST_TERMS: tl.constexpr,  # TERMS of them are tag0, coef0, tag1, coef1
    DECAY: tl.constexpr,  # 0: none; 1: decay_bits; 2: decay_ptr
    BIT_MASK: tl.constexpr,  # some tensor of the list has one
    RANDOM_MASK: tl.constexpr,
    SCALE: tl.constexpr,  # 0: none; 1: all blocks hold at least 8 elements; 2: any. Plus RSQRT: some scales are given as 1 / scale^2
    ROWS: tl.constexpr,  # every tensor of the list is gathered rows; otherwise none is
    STOCHASTIC: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SEQUENCE: tl.constexpr,  # many passes, with TERMS = 0 and DECAY = 0; STOCHASTIC: some of them may be
    P: tl.constexpr,
    NARROW: tl.constexpr,  # masked accesses by columns [P, 1]; as [P, W] they would go through shared memory
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program takes one span: `tiles` consecutive tiles of one tensor, or what is left of it."""
    span = tl.load(spans + tl.program_id(0))
    record = table + (span >> SPAN_TILE_BITS) * RECORD
    tile = span & SPAN_TILE_MASK
    src = tl.load(record)
    dst = tl.load(record + 1)
    numel = tl.load(record + 2)
    offset = tl.load(record + 3)
    scale_block = tl.load(record + 6)
    row_len = tl.load(record + 8)
    word9 = tl.load(record + 9)
    stream = word9.to(tl.uint32)
    keep_below = (word9 >> 32).to(tl.uint32)
    word10 = tl.load(record + 10)
    mask_tag = word10.to(tl.uint32)
    rows = tl.load(record + 7).to(tl.pointer_type(tl.int64))
    k0 = seed_low.to(tl.uint32)
    k1 = seed_high.to(tl.uint32)

    # The terms that fit into registers.
    t0 = tag0.to(tl.uint32)
    t1 = tag1.to(tl.uint32)
    c0 = 0.0
    c1 = 0.0
    live = n_terms < 0  # False
    if TERMS > 0:
        if HOST_TERMS:
            c0 = coefficient(coef0.to(tl.float32, bitcast=True), KIND)
        else:
            t0 = tl.load(tags).to(tl.uint32)
            c0 = coefficient(tl.load(coefs), KIND)
        live = c0.to(tl.uint32, bitcast=True) != 0  # of bits: the interpreter cannot broadcast a comparison of floats
        if TERMS > 1:
            if HOST_TERMS:
                c1 = coefficient(coef1.to(tl.float32, bitcast=True), KIND)
            else:
                t1 = tl.load(tags + 2).to(tl.uint32)
                c1 = coefficient(tl.load(coefs + 1), KIND)
            live = live | (c1.to(tl.uint32, bitcast=True) != 0)
    else:
        # (tag, c') of all terms, so that the loop over them spends nothing on c'. Every program writes the same words to the same place and
        # reads only what it has written itself: no other order is needed than the barrier's.
        for k in range(0, n_terms, P):
            some = k + tl.arange(0, P)
            exists = some < n_terms
            tag = tl.load(tags + 2 * some, mask=exists, other=0).to(tl.uint32).to(tl.int64)
            c = coefficient(tl.load(coefs + some, mask=exists, other=0.0), KIND).to(tl.uint32, bitcast=True).to(tl.int64)
            tl.store(terms + some, tag | (c << 32), mask=exists)
        if SEQUENCE:
            prepare_steps(n_passes, most_terms, tags, coefs, firsts, decays, roundings, steps, KIND, STOCHASTIC, P)
        tl.debug_barrier()
        if STOCHASTIC and not SEQUENCE:
            t0 = tl.load(tags, mask=n_terms > 0, other=0).to(tl.uint32)
    decay = 1.0
    if DECAY > 0:
        if DECAY == 1:
            decay = decay_bits.to(tl.float32, bitcast=True)
        else:
            decay = tl.load(decay_ptr)
        decay = tl.where((decay.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000, 1.0, decay)

    # A tile's first element in the full tensor, and how many tiles the tensor has.
    TILE: tl.constexpr = 16 * P
    lane = tl.arange(0, P)
    if ROWS:
        # A row starts anywhere in a group of 32, so it takes the groups that it can touch at worst. Two calls to a group.
        whole_groups = (row_len & 31) == 0
        row_calls = 2 * tl.where(whole_groups, row_len >> 5, (row_len + 62) >> 5)
        calls = numel // row_len * row_calls
        count = (calls + (P - 1)) // P
        origin = offset * 0
        aligned = (((src | dst) & 15) == 0) & whole_groups
    else:
        origin = offset & -TILE
        count = (offset - origin + numel + (TILE - 1)) // TILE
        aligned = (((src | dst) & 15) == 0) & ((offset & 7) == 0)
    last = tl.minimum(tile + tiles, count)

    # Scale: element i takes value i div B - offset div B. Without rows, `start` is where the span's first element lies in its block, so that
    # the tiles need 32-bit divisions only. Beyond 2^30 elements of a block only the distance to its end matters.
    block = scale_block
    k_span = offset * 0
    start = offset * 0
    if SCALE > 0:
        k_span = offset // scale_block
        if not ROWS:
            i_span = origin + tile * TILE
            k = i_span // scale_block
            left = (k + 1) * scale_block - i_span
            block = tl.minimum(scale_block, BLOCK_LIMIT)
            start = block - tl.minimum(left, block)
            k_span = k - k_span
            block = block.to(tl.uint32)

    tensor = (
        src.to(tl.pointer_type(DTYPE)),
        dst.to(tl.pointer_type(DTYPE)),
        tl.load(record + 4).to(tl.pointer_type(tl.uint8)),
        tl.load(record + 5).to(tl.pointer_type(tl.float32)),
        block,
        k_span,
        stream,
        keep_below,
        mask_tag,
        word10 >> 48,  # whether scales are given as 1 / scale^2
        (
            tl.load(record + 11).to(tl.pointer_type(tl.float32)),
            tl.load(record + 12).to(tl.pointer_type(tl.float32)),
            tl.load(record + 13),
            ((word10 >> 32) & 0xFFFF).to(tl.int32),
        ),
    )
    if TERMS > 0 and DECAY == 0 and IN_PLACE:
        last = tl.where(live, last, tile)  # nothing to do: both roundings keep every bit
    for t in range(tile, last):  # `opaque`: an index is below 2^56, which the compiler cannot know, so the base stays in a register
        if ROWS:
            i_tile = origin
            e_tile = origin
            row0 = t * P // row_calls
            step = (t * P - row0 * row_calls).to(tl.uint32) + lane.to(tl.uint32)
            ahead = step // row_calls.to(tl.uint32)
            row = row0 + ahead.to(tl.int64)
            step = (step - ahead * row_calls.to(tl.uint32)).to(tl.int64)
            exists = row * row_len < numel
            row_start = tl.load(rows + row, mask=exists, other=0) * row_len
            at = (row_start & -32) + 32 * (step >> 1) + 8 * (step & 1)
            off = at - row_start + row * row_len
            low = tl.minimum(tl.maximum(row_start - at, 0), 32).to(tl.int32)
            high = tl.where(exists, tl.minimum(tl.maximum(row_start + row_len - at, 0), 32), 0).to(tl.int32)
            inside = (t + 1) * P <= calls
            opaque = base.to(tl.uint32) | (at >> 56).to(tl.uint32)
        else:
            i_tile = origin + t * TILE
            e_tile = i_tile - offset
            at = 32 * (lane >> 1) + 8 * (lane & 1)
            off = at
            low = tl.maximum(-e_tile, 0).to(tl.int32) - at
            high = tl.minimum(numel - e_tile, TILE).to(tl.int32) - at
            inside = (e_tile >= 0) & (e_tile + TILE <= numel)
            opaque = base.to(tl.uint32) | ((i_tile + at) >> 56).to(tl.uint32)
        first = (start + (t - tile) * TILE).to(tl.uint32)
        if aligned & inside & (live | (TERMS == 0)):
            perturb_tile(
                tensor, i_tile, at, e_tile, off, low, high, first, c0, c1, live, n_terms, t0, t1, terms, decay, n_passes, firsts,
                steps, k0, k1, opaque,
                DTYPE, KIND, TERMS, DECAY, BIT_MASK, RANDOM_MASK, SCALE, ROWS, STOCHASTIC, SEQUENCE, P,
                NARROW, INTERPRETED, True,
            )  # fmt: skip
        else:
            perturb_tile(
                tensor, i_tile, at, e_tile, off, low, high, first, c0, c1, live, n_terms, t0, t1, terms, decay, n_passes, firsts,
                steps, k0, k1, opaque,
                DTYPE, KIND, TERMS, DECAY, BIT_MASK, RANDOM_MASK, SCALE, ROWS, STOCHASTIC, SEQUENCE, P,
                NARROW, INTERPRETED, False,
            )  # fmt: skip
