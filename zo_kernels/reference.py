"""The noise contract in plain PyTorch: slow, obvious, on any device, and the truth for the tests.

Belongs here: docs/numerics.md, section by section, as functions of element indices. Does not belong here: anything clever,
anything a user calls directly (that is `zo_kernels.ops`), checks of arguments.

Unsigned 32-bit words are held in int64 tensors. A product of two of them wraps modulo 2^64, which leaves its bits right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zo_kernels.plan import Entry, Pass, Passes, Plan
    from zo_kernels.update import RulePass, States

GAUSSIAN, RADEMACHER, ROUNDING, MASK, STATE = range(5)  # the purposes of section 1
U32 = 0xFFFFFFFF
KAPPA = float.fromhex("0x1.251fbep+0")
CHUNK = 1 << 20  # elements worked on at a time; a multiple of 128, the most that one Philox call feeds


# ---- bits -------------------------------------------------------------------------------------------------------------


def float_bits(x: Tensor) -> Tensor:
    """The bits of an fp32 tensor as int64 in 0 .. 2^32 - 1."""
    return x.contiguous().view(torch.int32).long() & U32


def bits_float(b: Tensor) -> Tensor:
    """The fp32 tensor that has these bits."""
    return torch.where(b >= 1 << 31, b - (1 << 32), b).to(torch.int32).view(torch.float32)


# ---- 1. Philox4x32-10 -----------------------------------------------------------------------------------------------


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> list[Tensor]:
    """The four words of each call; counters are int64 tensors that broadcast, `seed` is 0 .. 2^64 - 1."""
    k0, k1 = seed & U32, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & U32) ^ c1 ^ k0, p1 & U32, (p0 >> 32 & U32) ^ c3 ^ k1, p0 & U32
        k0, k1 = (k0 + 0x9E3779B9) & U32, (k1 + 0xBB67AE85) & U32
    return [c0, c1, c2, c3]


def words(q: Tensor, purpose: int, stream: int, tag: Tensor | int, seed: int) -> Tensor:
    """The words of the calls `q`, shape [*q.shape, 4]."""
    tag = torch.as_tensor(tag, dtype=torch.int64, device=q.device) & U32
    w = philox(q & U32, purpose << 24 | q >> 32, torch.full_like(q, stream), tag.expand_as(q), seed)
    return torch.stack(w, dim=-1)


# ---- 2. Gaussian ----------------------------------------------------------------------------------------------------


def live_or_zero(t: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` where |t| >= 2^-100 and `rounded` is finite, else 0: the term is skipped."""
    return torch.where((t.abs() >= 2.0**-100) & rounded.isfinite(), rounded, 0.0)


def gaussian_coefficients(c: Tensor) -> Tensor:
    """c' of every fp32 coefficient."""
    t = c * torch.tensor(KAPPA, dtype=torch.float32, device=c.device)
    b = float_bits(t)
    return live_or_zero(t, bits_float((b + 0x3F + (b >> 7 & 1)) & 0xFFFFFF80))


def sixteen(w: Tensor) -> Tensor:
    """f[0..15] of every call: [..., 4] words -> [..., 16] fp32."""
    shifts = torch.tensor([0, 4, 11, 15], device=w.device)
    f = bits_float((w[..., :, None] << shifts) & 0x82C20000 | 0x3C240000)
    return f.flatten(-2)


def mix(s: Tensor) -> Tensor:
    """The orthogonal mix over the last dimension, of size 16."""
    for h in (1, 2, 4, 8):
        x, y = s.unflatten(-1, (8 // h, 2, h)).unbind(-2)
        s = torch.stack((x + y, x - y), dim=-2).flatten(-3)
    return s


def gaussian_sum(i: Tensor, tags: Tensor, coefs: Tensor, stream: int, seed: int) -> Tensor:
    """sum_k c_k z_k at the elements `i`; `coefs` are c' (0: skipped)."""
    # Neighbouring elements share calls: compute each call once, then look its outputs up.
    q, place = torch.unique(2 * (i >> 5) + (i >> 3 & 1), return_inverse=True)
    s = torch.zeros(*q.shape, 16, dtype=torch.float32, device=i.device)
    for tag, c in zip(tags, coefs, strict=True):
        s = s + c * sixteen(words(q, GAUSSIAN, stream, tag, seed))
    return mix(s)[place, 8 * (i >> 4 & 1) + (i & 7)]


# ---- 3. Rademacher --------------------------------------------------------------------------------------------------


def rademacher_sum(i: Tensor, tags: Tensor, coefs: Tensor, stream: int, seed: int) -> Tensor:
    """sum_k ±c_k at the elements `i`; `coefs` are 0 where the term is skipped."""
    q, place = torch.unique(i >> 7, return_inverse=True)
    s = torch.zeros(i.shape, dtype=torch.float32, device=i.device)
    for tag, c in zip(tags, coefs, strict=True):
        w = words(q, RADEMACHER, stream, tag, seed)[place, i >> 5 & 3]
        s = s + torch.where((w >> (i & 31) & 1).bool(), -c, c)
    return s


# ---- 4. Masks, scales -------------------------------------------------------------------------------------------------------


def octet_words(i: Tensor, purpose: int, stream: int, tag: Tensor | int, seed: int) -> Tensor:
    """The word of the purposes that feed 8 elements a call, at each element."""
    q, place = torch.unique(i >> 3, return_inverse=True)
    return words(q, purpose, stream, tag, seed)[place, (i & 7) >> 1]


def random_keep(i: Tensor, threshold: int, tag: int, stream: int, seed: int) -> Tensor:
    x = octet_words(i, MASK, stream, tag, seed)
    x = torch.where(i & 1 == 0, (x << 16 | x >> 16) & U32, x)
    return x < threshold


def scale_of(i: Tensor, entry: Entry) -> Tensor:
    values = entry.scale[i // entry.scale_block - entry.offset // entry.scale_block]  # type: ignore[index]
    return torch.ones_like(values) / exact_sqrt(values) if entry.rsqrt else values


def exact_sqrt(x: Tensor) -> Tensor:
    """RN(sqrt(x)). Through float64, whose root of an fp32 is never so near to a midpoint of two fp32s that rounding twice matters."""
    return x.double().sqrt().float()


def bit_keep(e: Tensor, entry: Entry) -> Tensor:
    """The mask's bits of the local elements e; of a block of columns each row begins with a byte."""
    assert entry.mask is not None
    if entry.width:
        e = e // entry.width * (8 * ((entry.width + 7) // 8)) + e % entry.width
    return (entry.mask[e >> 3].long() >> (e & 7) & 1).bool()


# ---- 5. Casts -------------------------------------------------------------------------------------------------------


def cast_stochastic(r: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `r` to a 16-bit type with the 16 random bits `v` (int64, 0 .. 65535)."""
    b = float_bits(r)
    a, negative = b & 0x7FFFFFFF, b >= 1 << 31
    if dtype == torch.bfloat16:
        magnitude = bits_float((a + v) & 0xFFFF0000)
    else:
        pad = torch.where(a < 0x38800000, 2.0**-14, 0.0).to(torch.float32)
        magnitude = bits_float((float_bits(bits_float(a) + pad) + (v >> 3)) & 0xFFFFE000) - pad
    result = torch.where(negative, -magnitude, magnitude)
    return torch.where(r.isnan(), r, result).to(dtype)


# ---- 11. Low-rank directions ---------------------------------------------------------------------------------------


def low_rank_sum(i: Tensor, coefs: Tensor, entry: Entry) -> Tensor:
    """RN(c z) at the elements `i`, with z = left right^T; `coefs` is empty or one coefficient (0: skipped)."""
    z = torch.zeros(i.shape, dtype=torch.float32, device=i.device)
    for rho in range(entry.rank):
        z = z + entry.left[i // entry.cols, rho] * entry.right[i % entry.cols, rho]  # type: ignore[index]
    return z * coefs if len(coefs) else z


# ---- the pass -------------------------------------------------------------------------------------------------------


def element_indices(entry: Entry, e: Tensor) -> Tensor:
    """The index i in the full tensor of each local element e (section 7)."""
    if entry.width:
        return entry.offset + e // entry.width * entry.pitch + e % entry.width
    if entry.rows is None:
        return entry.offset + e
    return entry.rows[e // entry.row_len] * entry.row_len + e % entry.row_len


def perturb_entry(entry: Entry, p: Pass, tags: Tensor, coefs: Tensor, decay: Tensor | None) -> None:
    """One tensor of the list."""
    src, dst = entry.src.view(-1), entry.dst.view(-1)
    gaussian = p.kind == "gaussian" and not entry.rank
    coefs = gaussian_coefficients(coefs) if gaussian else live_or_zero(coefs, coefs)
    live = (coefs != 0).any() if len(coefs) else torch.tensor(False, device=src.device)
    for start in range(0, src.numel(), CHUNK):
        e = torch.arange(start, min(start + CHUNK, src.numel()), device=src.device)
        i = element_indices(entry, e)
        theta = src[start : start + CHUNK].float()
        d = theta if decay is None else torch.where(decay.isfinite(), theta * decay, theta)
        if entry.rank:
            s = low_rank_sum(i, coefs, entry)
        else:
            s = (gaussian_sum if gaussian else rademacher_sum)(i, tags, coefs, entry.stream, p.seed)
        u = s if entry.scale is None else s * scale_of(i, entry)
        keep = live.expand_as(d)
        if entry.mask is not None:
            keep = keep & bit_keep(e, entry)
        if entry.keep:
            keep = keep & random_keep(i, entry.keep, entry.mask_tag, entry.stream, p.seed)
        r = torch.where(keep, d + u, d)
        if p.rounding == "stochastic" and dst.dtype != torch.float32:
            tag = tags[0] if len(tags) else 0
            v = octet_words(i, ROUNDING, entry.stream, tag, p.seed) >> (16 * (i & 1)) & 0xFFFF
            dst[start : start + CHUNK] = cast_stochastic(r, v, dst.dtype)
        else:
            dst[start : start + CHUNK] = r.to(dst.dtype)


def perturb(plan: Plan, p: Pass) -> None:
    """theta <- round(decay * theta + scale * mask * sum_k c_k z_k) for every tensor of the plan."""
    plan.admit(len(p.tags))
    tags, coefs, decay = p.terms_on(plan.device)
    for entry in plan.entries:
        perturb_entry(entry, p, tags, coefs, decay)


def sequence(plan: Plan, passes: Passes) -> None:
    """The passes one after another: the definition that the other backends are held to."""
    plan.admit_sequence()
    for entry in plan.entries:
        if entry.dst.data_ptr() != entry.src.data_ptr():
            entry.dst.copy_(entry.src)
        in_place = replace(entry, src=entry.dst)
        for p in passes:
            perturb_entry(in_place, p, *p.terms_on(plan.device))


# ---- masks by magnitude ---------------------------------------------------------------------------------------------


def packed(keep: Tensor) -> Tensor:
    """bool [rows, n] as bits, uint8 [rows, ceil(n / 8)]: element e of a row in bit e & 7 of its byte e >> 3."""
    octets = torch.nn.functional.pad(keep, (0, -keep.shape[1] % 8)).unflatten(1, (-1, 8))
    return (octets.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def magnitude_mask(plan: Plan, limits: Tensor) -> None:
    """The mask of every tensor of the plan: |x| <= its limit as real numbers, which no NaN is. Magnitudes are compared by their bits."""
    behind = torch.where(limits >= 0, (float_bits(limits) & 0x7FFFFFFF) + 1, 0)
    first = 0
    for entry, rows in zip(plan.entries, plan.rows, strict=True):
        assert entry.mask is not None
        mine, flat = behind[first : first + rows], entry.src.view(-1)
        first += rows
        if entry.width:
            kept = float_bits(flat.view(rows, -1).float()) & 0x7FFFFFFF < mine[:, None]
            entry.mask.copy_(packed(kept).view(-1))
            continue
        for start in range(0, flat.numel(), CHUNK):
            bits = packed((float_bits(flat[start : start + CHUNK].float()) & 0x7FFFFFFF < mine)[None])[0]
            entry.mask[start // 8 : start // 8 + bits.numel()] = bits


# ---- 10. Update rules -----------------------------------------------------------------------------------------------


def momentum(d: Tensor, u: Tensor, held: list[Tensor], n: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(theta, b); every operation rounds to fp32."""
    lr, beta = n
    b = beta * held[0] + u
    return d - lr * b, b


def adam(d: Tensor, u: Tensor, held: list[Tensor], n: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(theta, m, v)."""
    lr1, beta1, one_minus_beta1, beta2, one_minus_beta2, v_factor, eps = n
    m = beta1 * held[0] + one_minus_beta1 * u
    v = beta2 * held[1] + one_minus_beta2 * (u * u)
    return d - (lr1 * m) / (exact_sqrt(v_factor * v) + eps), m, v


def hizoo(d: Tensor, z: Tensor, held: list[Tensor], n: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(theta, h)."""
    lrg, alpha, kappa, low, high = n
    h = held[0] + held[0] * (alpha * (kappa * (z * z) - 1))
    h = torch.where(h < low, low, torch.where(h > high, high, h))
    return d - (lrg * z) / exact_sqrt(h), h


RULES = {"momentum": momentum, "adam": adam, "hizoo": hizoo}


def update_entry(entry: Entry, held: Sequence[Tensor], p: RulePass, given: tuple[Tensor, ...]) -> None:
    """One tensor of the list and its states."""
    tags, coefs, numbers, squares = given
    go = (numbers[0] != 0) & numbers.isfinite().all() & coefs.isfinite().all() & squares.isfinite().all()
    decay, rest = numbers[1], numbers[2:].unbind()
    gaussian = p.kind == "gaussian"
    coefs = gaussian_coefficients(coefs) if gaussian else live_or_zero(coefs, coefs)
    one = torch.ones(1, device=numbers.device)
    one = gaussian_coefficients(one) if gaussian else one
    theta, states = entry.src.view(-1), [s.view(-1) for s in held]
    for start in range(0, theta.numel(), CHUNK):
        e = torch.arange(start, min(start + CHUNK, theta.numel()), device=theta.device)
        i = element_indices(entry, e)

        def noise(tags: Tensor, coefs: Tensor, i: Tensor = i) -> Tensor:
            s = (gaussian_sum if gaussian else rademacher_sum)(i, tags, coefs, entry.stream, p.seed)
            if entry.scale is not None:
                s = torch.where((coefs != 0).any(), s * scale_of(i, entry), s)  # without a live term it is not looked at
            return s + 0.0  # u is never -0

        keep = go.expand(len(e))
        if entry.mask is not None:
            keep = keep & bit_keep(e, entry)
        if entry.keep:
            keep = keep & random_keep(i, entry.keep, entry.mask_tag, entry.stream, p.seed)
        tag = tags[0] if len(tags) else 0

        def dither(purpose: int, i: Tensor = i, tag: Tensor | int = tag) -> Tensor:
            return octet_words(i, purpose, entry.stream, tag, p.seed) >> (16 * (i & 1)) & 0xFFFF

        chunk = slice(start, start + CHUNK)
        u, d = noise(tags, coefs), theta[chunk].float() * decay
        if p.rule == "adam_history":
            v = torch.zeros_like(u)
            for k, q in enumerate(squares):
                z = noise(tags[k : k + 1], one)
                v = v + q * (z * z)
            lr, eps = rest
            new: tuple[Tensor, ...] = (d - (lr * u) / (exact_sqrt(v) + eps),)
        else:
            new = RULES[p.rule](d, u, [s[chunk].float() for s in states], rest)
        for s, value in zip(states, new[1:], strict=True):
            rounded = value if s.dtype == torch.float32 else cast_stochastic(value, dither(STATE), s.dtype)
            s[chunk] = torch.where(keep, rounded, s[chunk])
        r = torch.where(keep, new[0], d)
        stochastic = p.rounding == "stochastic" and theta.dtype != torch.float32
        cast = cast_stochastic(r, dither(ROUNDING), theta.dtype) if stochastic else r.to(theta.dtype)
        theta[chunk] = torch.where(go, cast, theta[chunk])


def update(plan: Plan, states: States, p: RulePass) -> None:
    """(theta, states) <- rule(theta, states, u) for every tensor of the plan."""
    given = p.tensors_on(plan.device)
    for entry, held in zip(plan.entries, states, strict=True):
        update_entry(entry, held, p, given)
