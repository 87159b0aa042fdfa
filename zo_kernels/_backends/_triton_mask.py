"""The Triton kernel of masks by magnitude: |x| <= limit, one read of the weights, a bit for each written.

Belongs here: device code. Does not belong here: anything that imports torch, the launch (triton.py). Why the comparison does not stand in the
kernels that perturb: csrc/cpu/mask_tile.h.
"""
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM300

import triton
import triton.language as tl

from zo_kernels._backends._triton_kernels import RECORD, SPAN_TILE_BITS, SPAN_TILE_MASK


@triton.jit
def kept(at, here, inside, limit, shift: tl.constexpr, DTYPE: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr):
    """Bits shift .. shift + W - 1 of each octet: [P] from the W weights from at + shift on, of which those count that are inside."""
    column = shift + tl.arange(0, W)[None, :]
    if WHOLE:
        x = tl.load(tl.multiple_of(at[:, None] + column, (1, 16)))
    else:
        there = (here[:, None] + column >= 0) & (here[:, None] + column < inside)
        x = tl.load(at[:, None] + column, mask=there, other=0)
    # Magnitudes as fp32's bits, whose order is theirs, with the NaNs above infinity.
    if DTYPE == tl.float32:
        bits = x
    elif DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32) << 16
    else:
        bits = x.to(tl.float16, bitcast=True).to(tl.float32).to(tl.uint32, bitcast=True)
    below = (bits & 0x7FFFFFFF) < limit
    if not WHOLE:
        below = below & there
    return tl.sum(below.to(tl.int32) << column, axis=1)


@triton.jit
def octets(at, here, inside, limit, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """The bytes of octets of weights, by 128-bit accesses, each of which stays in its thread."""
    if DTYPE == tl.float32:
        low = kept(at, here, inside, limit, 0, DTYPE, 4, WHOLE)
        return (low + kept(at, here, inside, limit, 4, DTYPE, 4, WHOLE)).to(tl.uint8)
    else:
        return kept(at, here, inside, limit, 0, DTYPE, 8, WHOLE).to(tl.uint8)


@triton.jit(do_not_specialize=["limits", "tiles"])
def magnitude_mask_kernel(
    table,  # int64 [n, 14]: the records of zo_tensor in csrc/zo_kernels.h
    limits,  # fp32 [n]
    spans,  # int64 [programs]: tensor << TILE_BITS | first tile
    tiles,  # tiles of a span
    DTYPE: tl.constexpr,
    P: tl.constexpr,
):
    """A program takes one span, as in `perturb_kernel`; a tile has the bytes whose first elements lie in it, whatever the offset."""
    span = tl.load(spans + tl.program_id(0))
    number = span >> SPAN_TILE_BITS
    record = table + number * RECORD
    tile = span & SPAN_TILE_MASK
    source = tl.load(record)
    numel = tl.load(record + 2)
    offset = tl.load(record + 3)
    bits = tl.load(record + 4).to(tl.pointer_type(tl.uint8))
    given = tl.load(limits + number)
    limit = tl.where(given >= 0, (given.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) + 1, 0)

    TILE: tl.constexpr = 16 * P
    src = source.to(tl.pointer_type(tl.uint32 if DTYPE == tl.float32 else tl.uint16))
    origin = offset & -TILE
    count = (offset - origin + numel + (TILE - 1)) // TILE
    octet = tl.arange(0, TILE // 8)
    for k in range(tile, tl.minimum(tile + tiles, count)):
        start = (k * TILE - (offset - origin) + 7) & -8
        if ((source & 15) == 0) & (start >= 0) & (start + TILE <= numel):
            tl.store(bits + (start >> 3) + octet, octets(src + start + octet * 8, octet, numel, limit, DTYPE, True))
        else:
            first = start + octet * 8
            byte = octets(src + first, first, numel, limit, DTYPE, False)
            tl.store(bits + (first >> 3), byte, mask=(first >= 0) & (first < numel))
