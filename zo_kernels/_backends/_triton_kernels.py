"""The Triton kernel: one launch over a list of tensors, the noise generated in registers.

    dst <- round(decay * src + scale * mask * sum_k c_k z(seed, stream, tag_k, i))                         docs/numerics.md

Cost of an element, in SASS instructions, for one Gaussian term on 16-bit weights: Philox 40 / 16 = 2.5, the sixteen numbers 1.75,
their products 1, the mix 4, load, convert, add, round and store 3: about 12, and 2 of addresses and loop. A further term costs
Philox, numbers and products again: 5.25. tests/kernels/test_triton_aot.py counts them.

Belongs here: device code, in the order of the contract's sections. Does not belong here: anything that imports torch, launch
parameters, checks (triton.py).

Layout. A *lane* is one element of Triton's [P] tensors and owns one Gaussian call, that is the 16 elements i0 + 0..7 and i0 + 16..23.
A *tile* is P lanes, 16 P elements, and starts at a multiple of 16 P in the full tensor, so a tile never crosses q = 2^32 and the
high word of q is the same in all lanes. A *chunk* is the W elements of one 128-bit access: [P, W] with W = 8 (16-bit) or 4 (fp32).
Chunks are put together by tl.join, whose result keeps a lane's values in its thread: no shared memory, no shuffles. With
W = 8 for fp32 the loads would be laid out 4 to a thread and every chunk would go through shared memory.
"""

import triton
import triton.language as tl

GAUSSIAN: tl.constexpr = tl.constexpr(0)  # purposes, section 1
RADEMACHER: tl.constexpr = tl.constexpr(1)
ROUNDING: tl.constexpr = tl.constexpr(2)
MASK: tl.constexpr = tl.constexpr(3)

TILE_BITS = 40  # a span is tensor << TILE_BITS | first tile
SPAN_TILE_BITS: tl.constexpr = tl.constexpr(TILE_BITS)
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
def live_or_zero(t, rounded):
    """`rounded` (bits) as fp32 where |t| >= 2^-100 and both are finite, else 0: the term is skipped."""
    a = t.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    live = (a >= 0x0D800000) & (a < 0x7F800000) & ((rounded & 0x7F800000) != 0x7F800000)
    return tl.where(live, rounded, 0).to(tl.float32, bitcast=True)


@triton.jit
def coefficient(c, KIND: tl.constexpr):
    """c' of section 2, or c itself (section 3); 0 for a term that is not live. `c` is an fp32 scalar."""
    if KIND == GAUSSIAN:
        t = c * 1.1450114250183105  # KAPPA, 0x1.251fbep+0
        b = t.to(tl.uint32, bitcast=True)
        return live_or_zero(t, (b + 0x3F + ((b >> 7) & 1)) & 0xFFFFFF80)
    else:
        return live_or_zero(c, c.to(tl.uint32, bitcast=True))


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
    a0, a1, a2, a3 = mix4(s[0], s[1], s[2], s[3])
    a4, a5, a6, a7 = mix4(s[4], s[5], s[6], s[7])
    a8, a9, a10, a11 = mix4(s[8], s[9], s[10], s[11])
    a12, a13, a14, a15 = mix4(s[12], s[13], s[14], s[15])
    a0, a4, a8, a12 = mix4(a0, a4, a8, a12)
    a1, a5, a9, a13 = mix4(a1, a5, a9, a13)
    a2, a6, a10, a14 = mix4(a2, a6, a10, a14)
    a3, a7, a11, a15 = mix4(a3, a7, a11, a15)
    return a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15


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
        return four(w0, base, c, s, 0, FIRST) + four(w1, base, c, s, 1, FIRST) + four(w2, base, c, s, 2, FIRST) + four(w3, base, c, s, 3, FIRST)
    else:
        w0, w1, w2, w3 = call(i_tile >> 7, at >> 7, RADEMACHER, stream, tag, k0, k1, ROWS)
        w = tl.where((at & 64) == 0, tl.where((at & 32) == 0, w0, w1), tl.where((at & 32) == 0, w2, w3))
        w = w >> (at & 8).to(tl.uint32)
        return eight(w, 0, c, s, 0, FIRST) + eight(w, 16, c, s, 8, FIRST)


# ---- 4, 5. Chunks, masks, scales, casts -------------------------------------------------------------------------------


@triton.jit
def chunk(x, AT: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """[P, W] from W tensors [P] of the tuple x, beginning at AT. A join adds the fastest dimension, so it goes last."""
    if W == 8:
        even = tl.join(tl.join(x[AT], x[AT + 4]), tl.join(x[AT + 2], x[AT + 6]))
        odd = tl.join(tl.join(x[AT + 1], x[AT + 5]), tl.join(x[AT + 3], x[AT + 7]))
        return tl.reshape(tl.join(even, odd), (P, 8))
    else:
        return tl.reshape(tl.join(tl.join(x[AT], x[AT + 2]), tl.join(x[AT + 1], x[AT + 3])), (P, 4))


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
def round_nearest(r, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if DTYPE == tl.bfloat16 and INTERPRETED:  # the interpreter's own cast truncates
        b = r.to(tl.uint32, bitcast=True)
        nearest = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        return tl.where((b & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return r.to(DTYPE)
