"""The Triton kernel of the update rules: one launch over a list of tensors and their states, the noise generated in registers.

    (theta, states) <- rule(decay theta, states, u),  u = scale * sum_k c_k z_k                  docs/numerics.md, "Update rules"

Cost: memory traffic of 2 sizes of the weight and 8 bytes for each fp32 state (bf16: 4). Instructions per element: those of a pass
(_triton_kernels.py), and 10 to 60 for the rule, whose quotients and roots are IEEE's. tests/kernels/test_triton_aot.py counts registers,
spills and widths of accesses.

Belongs here: device code. Does not belong here: noise, masks and casts as such (_triton_kernels.py, whose names and layout of tiles these
are), anything that imports torch, launch parameters (triton.py).

Layout. Weights of 16 bits and states of 32 have chunks of different widths. So what was loaded in 128-bit chunks is taken apart (tl.split, the
reverse of the joins in `chunk`, without leaving the thread) into the 16 numbers of a lane, the form that noise has; the rule works on those.
"""
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"
# ruff: noqa: SIM300, RUF005

import triton
import triton.language as tl

from zo_kernels._backends._triton_kernels import (
    BLOCK_LIMIT,
    GAUSSIAN,
    MASK,
    RECORD,
    ROUNDING,
    SPAN_TILE_BITS,
    SPAN_TILE_MASK,
    add_term,
    chunk,
    coefficient,
    mix,
    octets,
    round_nearest,
    round_stochastic,
    widen,
)

STATE_ROUNDING: tl.constexpr = tl.constexpr(4)  # purpose, section 1
MOMENTUM: tl.constexpr = tl.constexpr(0)  # the codes of zo_kernels.h
ADAM: tl.constexpr = tl.constexpr(1)
HIZOO: tl.constexpr = tl.constexpr(2)
ADAM_HISTORY: tl.constexpr = tl.constexpr(3)


# ---- memory: the 16 numbers of every lane -----------------------------------------------------------------------------


@triton.jit
def apart(x, P: tl.constexpr, W: tl.constexpr):
    """The W columns of [P, W]: `chunk` backwards."""
    if W == 8:
        even, odd = tl.split(tl.reshape(x, (P, 2, 2, 2)))
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x2, x6 = tl.split(x26)
        x1, x5 = tl.split(x15)
        x3, x7 = tl.split(x37)
        return x0, x1, x2, x3, x4, x5, x6, x7
    else:
        even, odd = tl.split(tl.reshape(x, (P, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3


@triton.jit
def load_lanes(p, off, low, high, P: tl.constexpr, WHOLE: tl.constexpr):
    """`p + off` is each lane's first element; WHOLE, low, high as in `perturb_tile`."""
    x = ()
    if WHOLE:
        W: tl.constexpr = 128 // p.dtype.element_ty.primitive_bitwidth
        for n in tl.static_range(16 // W):
            shift = 16 * (n * W // 8) + n * W % 8
            places = off[:, None] + (shift + tl.arange(0, W)[None, :])
            x = x + apart(tl.load(tl.multiple_of(p + places, (1, 16))), P, W)
    else:
        for a in tl.static_range(16):
            place = a + 8 * (a // 8)
            x = x + (tl.load(p + off + place, mask=(low <= place) & (place < high), other=0),)
    return x


@triton.jit
def store_lanes(p, x, off, low, high, P: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        W: tl.constexpr = 128 // p.dtype.element_ty.primitive_bitwidth
        for n in tl.static_range(16 // W):
            shift = 16 * (n * W // 8) + n * W % 8
            places = off[:, None] + (shift + tl.arange(0, W)[None, :])
            tl.store(tl.multiple_of(p + places, (1, 16)), chunk(x, n * W, P, W))
    else:
        for a in tl.static_range(16):
            place = a + 8 * (a // 8)
            tl.store(p + off + place, x[a], mask=(low <= place) & (place < high))


@triton.jit
def load_factors(scales, off, low, high, start, block, k_span, P: tl.constexpr, WHOLE: tl.constexpr):
    """The scale of each element; 1, which is exact, for a tensor that has none beside others that do."""
    has_scale = scales.to(tl.int64) != 0
    x = ()
    for a in tl.static_range(16):
        place = a + 8 * (a // 8)
        k = ((start + (off + place).to(tl.uint32)) // block).to(tl.int64) + k_span
        if WHOLE:
            factor = tl.load(scales + k, mask=has_scale, other=1.0)
        else:
            factor = tl.load(scales + k, mask=has_scale & (low <= place) & (place < high), other=1.0)
        x = x + (factor,)
    return x


@triton.jit
def load_bits(mask, e_tile, off, low, high, P: tl.constexpr, WHOLE: tl.constexpr):
    """For each element whether the bit mask keeps it; all of a tensor that has none beside others that do."""
    has_mask = mask.to(tl.int64) != 0
    x = ()
    for a in tl.static_range(16):
        place = a + 8 * (a // 8)
        if WHOLE:  # e_tile + off is a multiple of 8
            byte = tl.load(mask + (e_tile >> 3) + ((off + 16 * (a // 8)) >> 3), mask=has_mask, other=255)
            bit = (byte.to(tl.int32) >> (a % 8)) & 1
        else:
            e = e_tile + off + place
            byte = tl.load(mask + (e >> 3), mask=has_mask & (low <= place) & (place < high), other=255)
            bit = (byte.to(tl.int32) >> (e & 7).to(tl.int32)) & 1
        x = x + (bit != 0,)
    return x


# ---- the rules --------------------------------------------------------------------------------------------------------


@triton.jit
def rule_of(d, u, first, second, n, RULE: tl.constexpr):
    """(theta, first, second) of csrc/rules.h; n are the numbers."""
    if RULE == MOMENTUM:
        first = n[3] * first + u
        return d - n[2] * first, first, second
    elif RULE == ADAM:
        first = n[3] * first + n[4] * u
        second = n[5] * second + n[6] * (u * u)
        return d - tl.div_rn(n[2] * first, tl.sqrt_rn(n[7] * second) + n[8]), first, second
    elif RULE == HIZOO:
        h = first + first * (n[3] * (n[4] * (u * u) - 1.0))
        h = tl.where(h < n[5], n[5], tl.where(h > n[6], n[6], h))  # a NaN stays one
        return d - tl.div_rn(n[2] * u, tl.sqrt_rn(h)), h, second
    else:
        return d - tl.div_rn(n[2] * u, tl.sqrt_rn(second) + n[3]), first, second


@triton.jit
def times(x, factors, SCALE: tl.constexpr):
    y = ()
    for a in tl.static_range(16):
        if SCALE:
            y = y + (x[a] * factors[a],)
        else:
            y = y + (x[a],)
    return y


@triton.jit
def add_squares(v, q, y):
    w = ()
    for a in tl.static_range(16):
        w = w + (v[a] + q * (y[a] * y[a]),)
    return w


@triton.jit
def is_finite(x):
    return (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def update_tile(
    tensor, n, i_tile, at, e_tile, low, high, start, n_terms, tags, coefs, squares, k0, k1, base,
    DTYPE: tl.constexpr, STATE: tl.constexpr, RULE: tl.constexpr, KIND: tl.constexpr, BIT_MASK: tl.constexpr,
    RANDOM_MASK: tl.constexpr, SCALE: tl.constexpr, STOCHASTIC: tl.constexpr, P: tl.constexpr, INTERPRETED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile; the arguments are those of `perturb_tile`, `n` the numbers of the rule."""
    theta, first, second, mask, scales, block, k_span, stream, keep_below, mask_tag = tensor
    theta += e_tile
    x = load_lanes(theta, at, low, high, P, WHOLE)
    if RULE != ADAM_HISTORY:
        first += e_tile
        old_first = load_lanes(first, at, low, high, P, WHOLE)
    if RULE == ADAM:
        second += e_tile
        old_second = load_lanes(second, at, low, high, P, WHOLE)
    factors = ()
    if SCALE:
        factors = load_factors(scales, at, low, high, start, block, k_span, P, WHOLE)

    zero = tl.zeros([P], tl.float32)
    zeros = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    s = zeros
    v = zeros
    one = coefficient(zero + 1.0, KIND)
    go = n_terms >= 0
    live = n_terms < 0
    for k in range(0, n_terms):
        tag = tl.load(tags + 2 * k).to(tl.uint32)
        given = tl.load(coefs + k)
        go = go & is_finite(given)
        c = coefficient(given, KIND)
        live = live | (c != 0.0)
        s = add_term(s, i_tile, at, stream, tag, c, k0, k1, base, KIND, False, False)
        if RULE == ADAM_HISTORY:
            q = tl.load(squares + k)
            go = go & is_finite(q)
            y = add_term(zeros, i_tile, at, stream, tag, one, k0, k1, base, KIND, True, False)
            if KIND == GAUSSIAN:
                y = mix(y)
            v = add_squares(v, q, times(y, factors, SCALE))
    if KIND == GAUSSIAN:
        s = mix(s)
    s = times(s, factors, SCALE)

    tag = tl.load(tags, mask=n_terms > 0, other=0).to(tl.uint32)
    if BIT_MASK:
        bits = load_bits(mask, e_tile, at, low, high, P, WHOLE)
    if RANDOM_MASK:
        lots = octets(i_tile, at, MASK, stream, mask_tag, k0, k1, False)
    if STOCHASTIC:
        dice = octets(i_tile, at, ROUNDING, stream, tag, k0, k1, False)
    if STATE == tl.bfloat16:
        state_dice = octets(i_tile, at, STATE_ROUNDING, stream, tag, k0, k1, False)
    new_theta = ()
    new_first = ()
    new_second = ()
    for a in tl.static_range(16):
        d = widen(x[a], DTYPE) * n[1]
        f = zero
        g = v[a]
        if RULE != ADAM_HISTORY:
            f = widen(old_first[a], STATE)
        if RULE == ADAM:
            g = old_second[a]
        u = s[a] + 0.0  # never -0
        if SCALE:
            u = tl.where(live, u, 0.0)  # whatever the scale
        r, f, g = rule_of(d, u, f, g, n, RULE)
        if STATE == tl.bfloat16:
            f = round_stochastic(f, state_dice[a], STATE)
        if BIT_MASK or RANDOM_MASK:
            keep = low < high + 64  # True
            if BIT_MASK:
                keep = keep & bits[a]
            if RANDOM_MASK:
                keep = keep & ((lots[a] < keep_below) | (keep_below == 0))
            r = tl.where(keep, r, d)
            if RULE != ADAM_HISTORY:
                f = tl.where(keep, f, old_first[a])
            if RULE == ADAM:
                g = tl.where(keep, g, old_second[a])
        if STOCHASTIC:
            new_theta = new_theta + (round_stochastic(r, dice[a], DTYPE),)
        else:
            new_theta = new_theta + (round_nearest(r, DTYPE, INTERPRETED),)
        new_first = new_first + (f,)
        new_second = new_second + (g,)
    if go:
        store_lanes(theta, new_theta, at, low, high, P, WHOLE)
        if RULE != ADAM_HISTORY:
            store_lanes(first, new_first, at, low, high, P, WHOLE)
        if RULE == ADAM:
            store_lanes(second, new_second, at, low, high, P, WHOLE)


# ---- the launch -------------------------------------------------------------------------------------------------------

# Nothing that changes from step to step may be specialised on: a new value would compile a new kernel.
NOT_SPECIALISED = ["tiles", "seed_low", "seed_high", "n_terms", "tags", "coefs", "squares", "numbers", "base", "states"]


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def update_kernel(
    table,  # int64 [n, 14]: the records of zo_tensor in csrc/zo_kernels.h
    states,  # int64 [n, 2]: zo_states
    spans,  # int64 [programs]: tensor << TILE_BITS | first tile
    tiles,  # tiles of a span
    seed_low, seed_high,  # bits of uint32 values, as int32
    n_terms, tags, coefs,  # int32 [K, 2] (low word, high word), fp32 [K], in device memory; at least one word each
    squares,  # fp32 [K]; None unless RULE is ADAM_HISTORY
    numbers,  # fp32: those of the rule
    base,  # 0x3C240000
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,  # of the first state: tl.float32 or tl.bfloat16
    RULE: tl.constexpr,
    NUMBERS: tl.constexpr,  # how many
    KIND: tl.constexpr,
    BIT_MASK: tl.constexpr,  # some tensor of the list has one
    RANDOM_MASK: tl.constexpr,
    SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    P: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program takes one span, as in `perturb_kernel`."""
    span = tl.load(spans + tl.program_id(0))
    record = table + (span >> SPAN_TILE_BITS) * RECORD
    held = states + (span >> SPAN_TILE_BITS) * 2
    tile = span & SPAN_TILE_MASK
    theta = tl.load(record + 1)
    numel = tl.load(record + 2)
    offset = tl.load(record + 3)
    scale_block = tl.load(record + 6)
    word9 = tl.load(record + 9)
    first = tl.load(held)
    second = tl.load(held + 1)
    k0 = seed_low.to(tl.uint32)
    k1 = seed_high.to(tl.uint32)

    n = ()
    go = tiles >= 0
    for k in tl.static_range(NUMBERS):
        number = tl.load(numbers + k)
        go = go & is_finite(number)
        n = n + (number,)
    go = go & ((n[0].to(tl.uint32, bitcast=True) << 1) != 0)

    TILE: tl.constexpr = 16 * P
    lane = tl.arange(0, P)
    origin = offset & -TILE
    count = (offset - origin + numel + (TILE - 1)) // TILE
    aligned = (((theta | first | second) & 15) == 0) & ((offset & 7) == 0)
    last = tl.minimum(tile + tiles, count)
    last = tl.where(go, last, tile)

    block = scale_block
    k_span = offset * 0
    start = offset * 0
    if SCALE:  # 32-bit divisions in the tiles, see `perturb_kernel`
        i_span = origin + tile * TILE
        k = i_span // scale_block
        left = (k + 1) * scale_block - i_span
        block = tl.minimum(scale_block, BLOCK_LIMIT)
        start = block - tl.minimum(left, block)
        k_span = k - offset // scale_block
        block = block.to(tl.uint32)

    tensor = (
        theta.to(tl.pointer_type(DTYPE)),
        first.to(tl.pointer_type(STATE)),
        second.to(tl.pointer_type(tl.float32)),
        tl.load(record + 4).to(tl.pointer_type(tl.uint8)),
        tl.load(record + 5).to(tl.pointer_type(tl.float32)),
        block,
        k_span,
        word9.to(tl.uint32),
        (word9 >> 32).to(tl.uint32),
        tl.load(record + 10).to(tl.uint32),
    )
    for t in range(tile, last):
        i_tile = origin + t * TILE
        e_tile = i_tile - offset
        at = 32 * (lane >> 1) + 8 * (lane & 1)
        low = tl.maximum(-e_tile, 0).to(tl.int32) - at
        high = tl.minimum(numel - e_tile, TILE).to(tl.int32) - at
        inside = (e_tile >= 0) & (e_tile + TILE <= numel)
        opaque = base.to(tl.uint32) | ((i_tile + at) >> 56).to(tl.uint32)
        begin = (start + (t - tile) * TILE).to(tl.uint32)
        if aligned & inside:
            update_tile(
                tensor, n, i_tile, at, e_tile, low, high, begin, n_terms, tags, coefs, squares, k0, k1, opaque,
                DTYPE, STATE, RULE, KIND, BIT_MASK, RANDOM_MASK, SCALE, STOCHASTIC, P, INTERPRETED, True,
            )  # fmt: skip
        else:
            update_tile(
                tensor, n, i_tile, at, e_tile, low, high, begin, n_terms, tags, coefs, squares, k0, k1, opaque,
                DTYPE, STATE, RULE, KIND, BIT_MASK, RANDOM_MASK, SCALE, STOCHASTIC, P, INTERPRETED, False,
            )  # fmt: skip
