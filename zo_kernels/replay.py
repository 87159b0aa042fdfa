"""From a journal back to weights: every step of the run again, or their sum at once.

Belongs here: which weights a journal's run is repeated on, and in which order. Does not belong here: the file (journal), what a step does (optim/run.py), the
arithmetic (ops.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace as changed
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_kernels import _backends as backends
from zo_kernels import checks, journal, ops, views
from zo_kernels.optim.factored import InputSubspace
from zo_kernels.optim.method import Method
from zo_kernels.optim.refresh import Groups, Views, trained
from zo_kernels.optim.repeat import queue, repeat
from zo_kernels.optim.run import Run
from zo_kernels.parameters import Member, Weights, block_of
from zo_kernels.plan import Pass, Plan, RandomMask
from zo_kernels.quantized import named_weights

MODES = ("sequential", "fused")
TERMS = 1024  # of a fused replay in one pass over an fp32 sum


# ---- every step ---------------------------------------------------------------------------------------------------------


class _Recorded:
    """The owner of a recorded run's views: every pass in place, at once."""

    def __init__(self, header: journal.Header, backend: str | None) -> None:
        self.header, self.backend = header, backend

    def view_of(self, groups: list[Weights]) -> views.View:
        return views.InPlace(groups, None, seed=self.header.seed, kind=self.header.kind, backend=self.backend)

    def flush(self) -> None:
        """Between two steps the weights are clean."""

    def found(self, view: views.View) -> None:
        """A journal's table was compared with the weights before."""


def _sequential(header: journal.Header, records: np.ndarray, weights: list[Weights], backend: str | None, method: Method) -> None:
    """Every pass of the run in its order."""
    if method.terms != header.terms:
        raise ValueError(
            f"the journal has {header.terms} numbers a record, its method needs {method.terms}: it was not written by zo_kernels"
        )
    run = Run(method, header.seed, {m.name: m.stream for w in weights for m in w.members}, backend)
    params = {m.name: m.tensor for w in weights for m in w.members}
    if header.method is None:
        queued = queue(weights, header, backend)
        repeat(run, header, records, lambda: queued, lambda: params)
        queued.restore()  # from where a lazy run had gone ahead to
        queued.apply()
        return
    groups: Groups = [
        {
            "params": w.params,
            "param_names": w.names,
            "mask": {m.name: m.mask for m in w.members},
            "scale": {m.name: m.scale for m in w.members},
        }
        for w in weights
    ]
    made, owner = Views(run), _Recorded(header, backend)
    frozen = [p for w in weights for p in w.params if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        repeat(run, header, records, lambda: made.refresh(groups, owner), lambda: trained(groups))
    finally:
        for p in frozen:
            p.requires_grad_(False)


# ---- their sum --------------------------------------------------------------------------------------------------------


def _fuse(weights: Weights, header: journal.Header, records: np.ndarray, group: int, backend: str | None) -> None:
    """theta_0 prod(d) + sum_k c_k prod(later d) z_k, one tensor at a time: coefficients in float64, the sum in fp32, one rounding."""
    groups = records["groups"]
    decay = groups["decay"][:, group].astype(np.float64)
    after = np.append(np.cumprod(decay[::-1])[::-1], 1.0)  # after[k]: of the decays of records k, k + 1, ...
    coefs = groups["coef"].reshape(len(records), header.groups, header.terms)[:, group].astype(np.float64) * after[1:, None]
    tags = records["tag"].astype(np.int64)[:, None] + np.arange(header.terms)
    live = coefs != 0
    c, t = coefs[live].tolist(), tags[live].tolist()
    for m, entry in weights.entries():
        total = entry.src if entry.src.dtype == torch.float32 else entry.src.float()
        one = Plan((changed(entry, src=total, dst=total),), m.tensor.device, torch.float32)
        for start in range(0, max(1, len(t)), TERMS):
            factor = float(after[0]) if start == 0 and after[0] != 1 else None
            terms = slice(start, start + TERMS)
            if t[terms] or factor is not None:
                ops.run([one], Pass(header.seed, t[terms], c[terms], factor, header.kind), backend)
        if total is not entry.src:
            m.tensor.copy_(total)


# ---- a user's model ----------------------------------------------------------------------------------------------------


def weights_of(
    header: journal.Header, named: Mapping[str, Tensor], masks: Mapping[str, Any], scales: Mapping[str, Any]
) -> list[Weights]:
    """The run's parameter groups in a model, masks and scales as recorded.

    Raises:
        ValueError: a stored mask or scale is not given, or is another one.
    """
    groups: list[list[Member]] = [[] for _ in range(header.groups)]
    for entry in header.parameters:
        p = journal.find(named, entry.name)
        mask, scale = masks.get(entry.name), scales.get(entry.name)
        if entry.mask is not None and "keep" in entry.mask:
            mask = RandomMask(entry.mask["keep"] / 2**32, entry.mask["tag"])
        if entry.scale is not None and "value" in entry.scale:
            scale = float(entry.scale["value"])
        found = journal.described(entry.name, p, mask, scale)
        for what, recorded, mine in (("mask", entry.mask, found[0]), ("scale", entry.scale, found[1])):
            if recorded != mine:
                raise ValueError(
                    f"parameter {entry.name!r}: the run's {what} is {recorded!r:.160}, given is {mine!r:.160}; a journal holds the digest of a "
                    f"stored {what}: give it as {what}s={{{entry.name!r}: ...}}"
                )
        groups[entry.group].append(Member(entry.name, p, entry.stream, mask=mask, scale=scale))
    return [Weights(members) for members in groups]


def load(source: journal.Journal | str | os.PathLike[str]) -> journal.Journal:
    """A journal as given, or read; a torn tail is said and left out."""
    if isinstance(source, journal.Journal):
        return source
    found = journal.read(source, strict=False)
    if found.tail is not None:
        warnings.warn(
            f"{source}: torn behind its {len(found)} whole records ({found.tail.reason}); the tail is left out", stacklevel=3
        )
    return found


def until(past: journal.Journal, upto: int | None) -> np.ndarray:
    """The records of the first `upto` steps, with the failed attempts between them; None: all."""
    if upto is None:
        return past.records
    steps = len(past.steps)
    if isinstance(upto, bool) or not isinstance(upto, (int, np.integer)) or not 0 <= upto <= steps:
        raise ValueError(f"upto={upto!r} must be a number of steps, 0 .. {steps}: so many are in the journal")
    if upto == 0:
        return past.records[:0]
    counted = ~(past.flag("failed_plus") | past.flag("failed_minus"))
    return past.records[: int(np.flatnonzero(counted)[upto - 1]) + 1]


@torch.no_grad()
def replay(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    source: journal.Journal | str | os.PathLike[str],
    upto: int | None = None,
    *,
    mode: str = "sequential",
    backend: str | None = None,
    check: bool = True,
    masks: Mapping[str, Any] | None = None,
    scales: Mapping[str, Any] | None = None,
    factors: journal.InputFactors | str | os.PathLike[str] | None = None,
    start: str | os.PathLike[str] | None = None,
) -> journal.Journal:
    """Apply a recorded run to the weights that it started from, in place. To go back to an earlier step, load the base again and
    replay up to that step.

    Args:
        model: a module, or (name, tensor) pairs; with exactly the run's starting weights. Parameters of no concern to the run may be there.
        source: a journal, or its path.
        upto: number of steps; None: all.
        mode: "sequential": every pass of the run in its order, each rounded as the run rounded it: the bits that the run had, on any device
            and backend. "fused": all terms in one fp32 sum a weight and one rounding: not the run's bits, but closer to what the run would
            have been in fp32, and for 16-bit weights much faster than the steps were.
        backend: see `perturb_`.
        check: compare names, shapes, dtypes and the SHA-256 of all weights, and of a module's buffers, with the journal's first.
        masks, scales: stored masks and scales of the run, by parameter name, as `perturb_` takes them (the journal has their digests).
        factors: of a run along `InputSubspace`, or the path of their file; None: they lie beside `source`, a path. The journal has their digest.
        start: the path of a file with what the run's adapter, or new head, began with (`journal.write_start`); None: beside `source`, a path, if it is there.
            The model's own values of these weights do not count, and their dtype becomes the run's.

    Returns:
        The journal.

    Raises:
        ValueError: the weights are not those that the run started from, or an argument is wrong; nothing was changed.
        DamagedError: the file is not a journal.
    """
    checks.check_choice("mode", mode, MODES)
    named = named_weights(model) if isinstance(model, nn.Module) else dict(model)
    if any(block_of(p) is not None for p in named.values()):
        raise ValueError(
            "model: its weights are offloaded (zk.offload); make an optimizer and resume the journal, which replays it block by block"
        )
    past = load(source)
    if past.header.method is not None and mode == "fused":
        raise ValueError(
            "mode='fused' sums the terms of plain updates; this run's method has steps that depend on each other: take 'sequential'"
        )
    method = Method.of_header(past.header)
    if isinstance(method.direction, InputSubspace):
        found = journal.factors_of(factors, method.direction.sha256, source)
        method = changed(method, direction=changed(method.direction, factors=found))
    records = until(past, upto)
    given, named = named, journal.with_start(named, journal.start_of(past.header, start, source))
    if check:
        buffers = model.named_buffers(remove_duplicate=False) if isinstance(model, nn.Module) else None
        journal.verify_base(past.header, named.items(), buffers)
    groups = weights_of(past.header, named, masks or {}, scales or {})
    for one in (one for w in groups for one in w.plans):
        backends.pick(one.device, backend)
    if method.anchor is not None:  # the weights are those that it pulls to, now and not once a step was made
        base = {m.name: m.tensor.detach().to("cpu", copy=True) for w in groups for m in w.members}
        method = changed(method, anchor=changed(method.anchor, base=base))
    if mode == "fused":
        for k, w in enumerate(groups):
            _fuse(w, past.header, records, k, backend)
    else:
        _sequential(past.header, records, groups, backend, method)
    for name, p in given.items():
        if (made := named[name]) is not p:
            p.data = made if made.dtype != p.dtype else p.data.copy_(made)
    return past
