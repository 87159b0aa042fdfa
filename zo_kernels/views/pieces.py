"""Weights that the buffer holds a piece of at a time: matrices multiplied in parts, and the gathered rows of embedding tables.

Belongs here: a function's result, worked out from pieces of its weight. Does not belong here: whole weights (buffer.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import _backends as backends
from zo_kernels.plan import Plan
from zo_kernels.views.base import changed
from zo_kernels.views.buffer import Buffer, Calls, Fill, launches_of
from zo_kernels.views.memory import ALIGNMENT, empty
from zo_kernels.views.shadow import PerturbedWeight

MOST_GATHERS = 64  # plans of gathered rows that are kept: batches of every length come along in a run
GATHER_BYTES = 1 << 22  # of gathered rows that are perturbed at a time, and at most GATHER_ROWS of them
GATHER_ROWS = 1 << 16
PART_ROWS = 256  # parts of a matrix have a multiple of so many rows: whole tiles of matrix kernels, whole calls of the noise


@dataclass
class Part:
    """Rows start .. stop of a matrix that is multiplied in parts."""

    fill: Fill
    weight: Tensor
    bias: Tensor | None
    start: int
    stop: int


@dataclass
class Gather:
    """Rows of an embedding table: their numbers, their values, and what perturbs them."""

    rows: Tensor
    values: Tensor
    mask: Tensor | None
    plan: Plan
    backend: ModuleType


class Pieces:
    """The parts and gathers of one view. `names`: of the parameters, by id, for errors."""

    def __init__(self, buffer: Buffer, names: Mapping[int, str]) -> None:
        self.buffer, self.forward, self.names = buffer, buffer.forward, names
        self.parts: dict[Calls, list[Part]] = buffer.table()
        self.gathers: dict[tuple[int, int], Gather] = {}  # by the table's shadow and the number of rows
        self.memory: dict[tuple[str, torch.device], Tensor] = {}  # that all gathers share: one is over before the next begins

    # -- matrices larger than the buffer --

    def linear(self, input: Any, weight: Any, bias: Any = None) -> Tensor | None:
        """input (theta + c z)^T + bias, a part of the rows of theta at a time; None where only the whole matrix will do."""
        if (
            type(weight) is not PerturbedWeight
            or not isinstance(input, Tensor)
            or type(input) is PerturbedWeight
            or weight.clean.ndim != 2
        ):
            return None
        if (parts := self._parts(weight, bias)) is None:
            return None
        self.buffer.lend()
        rows, width = weight.clean.shape
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type)
        result: Tensor | None = None
        for part in parts:
            self.buffer.write(part.fill)
            b = part.bias if bias is None or type(bias) is PerturbedWeight else bias[part.start : part.stop]
            if plain:
                product = nn.functional.linear(input, part.weight, b)
                if result is None:
                    result = product.new_empty(*input.shape[:-1], rows)
                result[..., part.start : part.stop] = product
                continue
            # Straight into the columns of the result: no second copy of logits.
            if result is None:
                result = input.new_empty(*input.shape[:-1], rows)
            flat, out = input.reshape(-1, width), result.view(-1, rows)[:, part.start : part.stop]
            torch.mm(flat, part.weight.t(), out=out) if b is None else torch.addmm(b, flat, part.weight.t(), out=out)
        return result

    def _parts(self, weight: PerturbedWeight, bias: Any) -> list[Part] | None:
        """The parts of a matrix, which take turns in the buffer; None if a part would not fit."""
        shadows = [weight, bias] if type(bias) is PerturbedWeight else [weight]
        key = tuple(map(id, shadows))
        if (parts := self.parts.get(key)) is None:
            rows = weight.clean.shape[0]
            row_bytes = sum(s.clean.nbytes // rows for s in shadows)
            at_once = (self.buffer.limit - 2 * ALIGNMENT) // row_bytes // PART_ROWS * PART_ROWS
            if at_once <= 0:
                return None
            self.forward.serve(shadows)
            free = [s for s in shadows if id(s.param) not in self.forward.held]
            room = self.buffer.room([(s.clean.device, s.clean.dtype, torch.Size((at_once, *s.clean.shape[1:]))) for s in free])
            parts = []
            for start in range(0, rows, at_once):
                stop = min(start + at_once, rows)
                values = {id(s): r[: stop - start] for s, r in zip(free, room, strict=True)}
                entries = [
                    (s.group, s.entry.part(start * (s.clean.numel() // rows), stop * (s.clean.numel() // rows), values[id(s)]))
                    for s in free
                ]
                fill = Fill(launches_of(entries, self.buffer.backend), {}, list(values.values()))
                # What is held has its perturbed values itself; its products are the same parts, in whichever step it was found.
                own, *others = [values.get(id(s), s.clean[start:stop]) for s in shadows]
                parts.append(Part(fill, own, others[0] if others else None, start, stop))
            self.parts[key] = parts
        return parts

    # -- embeddings --

    def embedding(
        self, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **more: Any
    ) -> Tensor | None:
        """theta + c z in the gathered rows only; None where the whole table is the only way."""
        if type(weight) is not PerturbedWeight or not isinstance(input, Tensor):
            return None
        if max_norm is not None:  # it writes to the table
            raise changed(self.names[id(weight.param)], "written to (max_norm)")
        entry, p = weight.entry, self.forward.passes[weight.group]
        table = weight.clean
        if p is None or id(weight.param) in self.forward.held or (entry.mask is not None and table.shape[1] % 8):
            return None
        flat = input.reshape(-1)
        result = torch.empty(flat.numel(), table.shape[1], dtype=table.dtype, device=table.device)
        at_once = max(1, min(GATHER_ROWS, GATHER_BYTES // (table.shape[1] * table.element_size() or 1)))
        self.forward.inside = True
        try:
            for start in range(0, flat.numel(), at_once):
                gather = self._gather(weight, min(at_once, flat.numel() - start))
                gather.rows.copy_(flat[start : start + at_once])
                torch.index_select(table, 0, gather.rows, out=gather.values)
                if gather.mask is not None and entry.mask is not None:
                    torch.index_select(entry.mask.view(table.shape[0], -1), 0, gather.rows, out=gather.mask)
                gather.backend.perturb(gather.plan, p.on(table.device))
                result[start : start + at_once] = gather.values
        finally:
            self.forward.inside = False
        return result.view(*input.shape, table.shape[1])

    def _gather(self, weight: PerturbedWeight, n: int) -> Gather:
        """Memory and plan for `n` rows of a table. The same addresses at every step: a backend's tables of the plan are uploaded once."""
        if (gather := self.gathers.get((id(weight), n))) is None:
            self.forward.serve([weight])
            entry, table = weight.entry, weight.clean
            width = table.shape[1]
            rows = self._room("rows", n * 8, table.device).view(torch.int64)
            values = self._room("values", n * width * table.element_size(), table.device).view(table.dtype).view(n, width)
            mask = None if entry.mask is None else self._room("mask", n * width // 8, table.device).view(n, width // 8)
            local = replace(entry, src=values, dst=values, rows=rows, row_len=width, mask=None if mask is None else mask.view(-1))
            if len(self.gathers) >= MOST_GATHERS:
                self.gathers.clear()
            plan = Plan((local,), table.device, table.dtype)
            gather = self.gathers[id(weight), n] = Gather(
                rows, values, mask, plan, backends.pick(table.device, self.buffer.backend)
            )
        return gather

    def _room(self, purpose: str, size: int, device: torch.device) -> Tensor:
        room = self.memory.get((purpose, device))
        if room is None or room.numel() < size:
            room = self.memory[purpose, device] = empty((size,), torch.uint8, device)
            self.gathers.clear()  # they point into the old memory
        return room[:size]

    # -- all of them --

    def plans(self) -> Iterator[Plan]:
        for parts in self.parts.values():
            for part in parts:
                yield from (plan for _, plan, _ in part.fill.launches)
        for gather in self.gathers.values():
            yield gather.plan

    def release(self) -> None:
        """The memory of gathers goes; the parts go with the buffer."""
        self.gathers.clear()
        self.memory.clear()
