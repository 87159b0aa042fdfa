"""The one operation on weights: its public doors, its torch.library registration and its dispatch to a backend.

    theta <- round(decay * theta + scale * mask * sum_k c_k z(seed, stream, tag_k))          docs/numerics.md

Belongs here: `perturb_`, `perturb_sequence_`, `normal`, and the inner doors `run` and `run_sequence`, whose arguments are checked already.
Does not belong here: checks (checks.py), what a backend receives (plan.py), arithmetic (reference.py, _backends/), models and optimizers
(parameters.py, optim/).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels import _backends as backends
from zo_kernels import checks
from zo_kernels.plan import (
    Mask,
    Pass,
    Passes,
    Plan,
    RandomMask,
    Terms,
    check_factors,
    check_mask,
    check_scale,
    make_passes,
    make_plans,
    make_terms,
    written,
)


def run(plans: Sequence[Plan], p: Pass, backend: str | None = None) -> None:
    """One launch for each plan. The inner door: arguments are already checked, terms on a device are moved to the others."""
    if (n_terms := len(p.tags)) > 1:  # before the first of them writes
        for plan in plans:
            plan.admit(n_terms)
    for plan in plans:
        backends.of(plan, backend).perturb(plan, p.on(plan.device))
    written(plans)


def run_sequence(plans: Sequence[Plan], passes: Passes, backend: str | None = None) -> None:
    """All passes over each plan, in one launch for each. The inner door of `perturb_sequence_`."""
    for plan in plans:
        plan.admit_sequence()
    for plan in plans:
        backends.pick(plan.device, backend).sequence(plan, passes.on(plan.device))
    written(plans)


def magnitude_masks(plans: Sequence[Plan], limits: Sequence[Tensor], backend: str | None = None) -> None:
    """The bit mask of |x| <= limit, as `pack_mask` has it, of every tensor of the plans, read from its weights and written to its `mask`, in one launch
    for each plan. An inner door.

    Args:
        plans: every entry has a mask of its own, and no gathered rows.
        limits: for each plan float32 [rows of its table] on its device; a weight is compared as a real number, so that a NaN is never kept, and a
            limit that is negative or NaN keeps nothing.
    """
    for plan, given in zip(plans, limits, strict=True):
        if not plan.table[plan.table[:, 2] > 0, 4].all() or plan.table[:, 7].any():
            raise ValueError("magnitude_masks: a tensor of the plan has no mask to be written, or gathered rows")
        if given.dtype != torch.float32 or given.shape != (len(plan.table),) or given.device != plan.device:
            raise ValueError(
                f"limits is {given.dtype} {tuple(given.shape)} on {given.device}; give float32 ({len(plan.table)},) on {plan.device}, "
                "one for each row of the plan's table"
            )
    for plan, given in zip(plans, limits, strict=True):
        backends.of(plan, backend).magnitude_mask(plan, given)


def perturb_(
    params: Sequence[Tensor],
    terms: Terms,
    *,
    seed: int,
    streams: Sequence[int],
    decay: float | Tensor = 1.0,
    rounding: str = "nearest",
    out: Sequence[Tensor] | None = None,
    masks: Sequence[Mask] | None = None,
    scales: Sequence[Any] | None = None,
    offsets: Sequence[int] | None = None,
    factors: Sequence[Any] | None = None,
    kind: str = "gaussian",
    backend: str | None = None,
) -> None:
    """``theta <- round(decay * theta + scale * mask * sum_k c_k z(seed, stream, tag_k))`` for a list of tensors.

    One launch per device and dtype for the whole list; every backend writes the same bits (docs/numerics.md).

    Args:
        params: contiguous tensors of dtype float32, float16 or bfloat16, of any shape, that do not overlap. Written in place
            unless `out` is given.
        terms: a list of ``(tag, coefficient)``, tags 0 .. 2^32 - 1. Coefficients may be one-element tensors, or tags and coefficients
            a pair of tensors (int64 [K], float32 [K]), on any device: nothing is read back from them, and a non-finite one
            skips its term, which as a number is an error.
        seed: 0 .. 2^64 - 1.
        streams: one 32-bit stream for each tensor, its name for the noise (`zo_kernels.stream_of`).
        decay: factor of theta, a float or a one-element float32 tensor (where a non-finite one counts as 1).
        rounding: of the result to a 16-bit type: "nearest" (even) or "stochastic" (unbiased, replayable).
        out: tensors of the same shapes, dtypes and devices that take the results; `params` is then only read.
        masks: for each tensor None, a `RandomMask`, a bool tensor of its shape, or `pack_mask` of one (1 bit per element).
        scales: for each tensor None, a number, a float32 tensor with one value per row (first dimension), ``(values, B)``
            with one value per B consecutive elements, or ``(values, B, "rsqrt")``, where the scale is 1 / sqrt(value).
        offsets: for each tensor the index of its first element in the unsharded tensor (default 0).
        factors: for each tensor None, or ``(left, right)`` of the unsharded matrix [shape[0], numel / shape[0]]: float32 [rows, rank] in
            row order and [cols, rank] in column order (its ``.t()`` is contiguous), rank 1 .. 64. Its z is then left right^T and not
            noise, whatever the tag (LOZO). There is one term, and factors have at most 12 significant bits, as
            `zo_kernels.lowrank.Factors` makes them (docs/numerics.md, section 11).
        kind: "gaussian" or "rademacher".
        backend: "reference", "cpu", "triton" or "cuda"; default: the best for the device, or ``ZO_KERNELS_BACKEND``.

    Raises:
        TypeError, ValueError: an argument is wrong; names it, its value and the remedy. Nothing has been changed. Masks, scales, factors,
            terms and decay that share memory with what is written are refused too.
        RuntimeError: the backend asked for is not available; says why.
    """
    tensors, rest = tensor_arguments(
        params, seed=seed, streams=streams, out=out, masks=masks, scales=scales, offsets=offsets, factors=factors, kind=kind, backend=backend
    )  # fmt: skip
    tags, coefs = make_terms(terms)
    checks.check_choice("rounding", rounding, checks.ROUNDINGS)
    factor = checks.check_decay("decay", decay)
    given: tuple[Any, ...] = ([], [], tags, coefs) if isinstance(tags, Tensor) else (tags, coefs, None, None)
    decays = (None, factor) if isinstance(factor, Tensor) else (None if factor == 1.0 else factor, None)
    if tensors[0]:  # the dispatcher has nothing to go by without a tensor
        torch.ops.zo_kernels.perturb_(*tensors, *given, *decays, rounding, *rest)


def perturb_sequence_(
    params: Sequence[Tensor],
    passes: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    streams: Sequence[int],
    out: Sequence[Tensor] | None = None,
    masks: Sequence[Mask] | None = None,
    scales: Sequence[Any] | None = None,
    offsets: Sequence[int] | None = None,
    kind: str = "gaussian",
    backend: str | None = None,
) -> None:
    """Passes one after another, bit for bit as one call of `perturb_` for each of them, with one read and one write of the weights.

    This is how a recorded run is replayed: the weights of a run that updated S times hold S roundings, which a single call with all
    the terms would not repeat (docs/numerics.md, section 6).

    Args:
        passes: for each pass a dict of what `perturb_` calls ``terms``, ``decay`` (default 1.0) and ``rounding`` (default "nearest").
            An empty list changes nothing.

    The other arguments, and what is raised, are those of `perturb_`; they hold for all passes. There are no factors and no "rsqrt" scales.
    """
    tags, coefs, first, decay, rounding = make_passes(passes)
    tensors, rest = tensor_arguments(
        params, seed=seed, streams=streams, out=out, masks=masks, scales=scales, offsets=offsets, kind=kind, backend=backend
    )
    if tensors[0]:
        torch.ops.zo_kernels.perturb_sequence_(*tensors, tags, coefs, first, decay, rounding, *rest)


# ---- registration -----------------------------------------------------------------------------------------------------

# The operation as torch sees it, so that torch.compile keeps it whole and knows what it writes. `src` is empty for a pass in
# place: a tensor must not be both read as one argument and written as another. `seed` is the same 64 bits as a signed integer.
_LIBRARY = torch.library.Library("zo_kernels", "DEF")
_TENSORS = "Tensor(a!)[] dst, Tensor[] src"
_REST = (
    "int seed, int[] streams, Tensor?[] masks, int[] keeps, int[] mask_tags, Tensor?[] scales, int[] scale_blocks, bool[] rsqrts, "
    "int[] offsets, Tensor?[] lefts, Tensor?[] rights, str kind, str? backend"
)
_LIBRARY.define(
    f"perturb_({_TENSORS}, int[] tags, float[] coefs, Tensor? tag_tensor, Tensor? coef_tensor, float? decay, Tensor? decay_tensor, "
    f"str rounding, {_REST}) -> ()"
)
_LIBRARY.define(
    f"perturb_sequence_({_TENSORS}, Tensor tags, Tensor coefs, Tensor first, Tensor decay, Tensor rounding, {_REST}) -> ()"
)


def tensor_arguments(
    params: Sequence[Tensor],
    *,
    seed: int,
    streams: Sequence[int],
    out: Sequence[Tensor] | None = None,
    masks: Sequence[Mask] | None = None,
    scales: Sequence[Any] | None = None,
    offsets: Sequence[int] | None = None,
    factors: Sequence[Any] | None = None,
    kind: str = "gaussian",
    backend: str | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments `_TENSORS` and `_REST` of both operations, with every check that needs no address."""
    checks.check_list(params)
    n = len(params)
    checks.check_word("seed", seed, 64)
    checks.check_choice("kind", kind, checks.KINDS)
    streams = checks.check_streams(streams, n)
    shifts = checks.check_offsets(offsets, n)
    flat_masks = [check_mask(f"masks[{k}]", m, params[k]) for k, m in enumerate(checks.check_length("masks", masks, n))]
    flat_scales = [
        check_scale(f"scales[{k}]", s, params[k], shifts[k]) for k, s in enumerate(checks.check_length("scales", scales, n))
    ]
    pairs = [
        check_factors(f"factors[{k}]", f, params[k], shifts[k]) for k, f in enumerate(checks.check_length("factors", factors, n))
    ]
    dst = list(params) if out is None else list(checks.check_length("out", out, n))
    for k, t in enumerate(dst):
        checks.check_tensor(f"out[{k}]", t)
    return (dst, [] if out is None else list(params)), (
        seed - (1 << 64) if seed >> 63 else seed,
        streams,
        [m for m, _, _ in flat_masks],
        [keep for _, keep, _ in flat_masks],
        [tag for _, _, tag in flat_masks],
        [s for s, _, _ in flat_scales],
        [block for _, block, _ in flat_scales],
        [rsqrt for _, _, rsqrt in flat_scales],
        shifts,
        [left for left, _ in pairs],
        [right for _, right in pairs],
        kind,
        backend,
    )


def checked_plans(
    dst: list[Tensor],
    src: list[Tensor],
    streams: list[int],
    masks: list[Tensor | None],
    keeps: list[int],
    mask_tags: list[int],
    scales: list[Tensor | None],
    scale_blocks: list[int],
    rsqrts: list[bool],
    offsets: list[int],
    lefts: list[Tensor | None],
    rights: list[Tensor | None],
    *,
    backend: str | None,
    read: Mapping[str, Tensor | None],
) -> list[Plan]:
    """The plans of an operation, whose backends have been asked for before anything is changed."""
    plans = make_plans(
        src or dst,
        streams,
        out=dst if src else None,
        masks=[RandomMask(keep / 2**32, tag) if keep else m for m, keep, tag in zip(masks, keeps, mask_tags, strict=True)],
        scales=[
            None if s is None else (s, block, *["rsqrt"] * rsqrt)
            for s, block, rsqrt in zip(scales, scale_blocks, rsqrts, strict=True)
        ],
        offsets=offsets,
        factors=[None if left is None else (left, right) for left, right in zip(lefts, rights, strict=True)],
        read=[(name, t) for name, t in read.items() if t is not None],
    )
    for plan in plans:
        backends.pick(plan.device, backend)
    return plans


def _perturb(
    dst: list[Tensor],
    src: list[Tensor],
    tags: list[int],
    coefs: list[float],
    tag_tensor: Tensor | None,
    coef_tensor: Tensor | None,
    decay: float | None,
    decay_tensor: Tensor | None,
    rounding: str,
    seed: int,
    *rest: Any,
) -> None:
    *described, kind, backend = rest
    p = Pass(
        seed & ((1 << 64) - 1),
        tags if tag_tensor is None else tag_tensor,
        coefs if coef_tensor is None else coef_tensor,
        decay if decay_tensor is None else decay_tensor,
        kind,
        rounding,
    )
    read = {"terms: the tags": tag_tensor, "terms: the coefficients": coef_tensor, "decay": decay_tensor}
    run(checked_plans(dst, src, *described, backend=backend, read=read), p, backend)


def _perturb_sequence(
    dst: list[Tensor],
    src: list[Tensor],
    tags: Tensor,
    coefs: Tensor,
    first: Tensor,
    decay: Tensor,
    rounding: Tensor,
    seed: int,
    *rest: Any,
) -> None:
    *described, kind, backend = rest
    passes = Passes(seed & ((1 << 64) - 1), tags, coefs, first, decay, rounding, kind)
    read = {"passes: the tags": tags, "passes: the coefficients": coefs, "passes: the decays": decay}
    run_sequence(checked_plans(dst, src, *described, backend=backend, read=read), passes, backend)


for _name, _function in (("perturb_", _perturb), ("perturb_sequence_", _perturb_sequence)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zo_kernels::{_name}", lambda *args: None, lib=_LIBRARY)


def normal(
    shape: Sequence[int] | int,
    *,
    seed: int,
    stream: int,
    tag: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: str = "gaussian",
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The direction z itself, as a tensor of `shape`: for tests and study, since no step ever materialises it.

    Args:
        shape: of the result; element i in contiguous order is z(seed, stream, tag, offset + i).
        seed, stream, tag: 0 .. 2^64 - 1, 0 .. 2^32 - 1, 0 .. 2^32 - 1.
        dtype: float32 (exact), or float16 / bfloat16 (rounded to nearest even).
        kind: "gaussian" or "rademacher".
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(not isinstance(s, int) or s < 0 for s in shape):
        raise ValueError(f"shape={shape} must be non-negative integers")
    if math.prod(shape) > checks.MAX_INDEX:
        raise ValueError(f"shape={shape} has more than 2^56 elements")
    z = torch.zeros(shape, dtype=dtype, device=device)
    perturb_([z], [(tag, 1.0)], seed=seed, streams=[stream], offsets=[offset], kind=kind, backend=backend)
    return z
