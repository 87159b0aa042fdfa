"""The scratch buffer: which weights' theta + c z it holds, and from which call to which.

Belongs here: its memory, the passes that fill it, and the order of calls that they are learned from. Does not belong here: which function is
given the values (scratch.py), a part of one weight (pieces.py).

The buffer has a fixed size, `limit`. One pass fills it with the weights of as many of the next calls as it holds, in the order in which an
earlier forward asked for them: a launch a layer, or a launch a model, instead of one for every bias. The order is a guess: a call that
comes out of turn gets a fill of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zo_kernels import _backends as backends
from zo_kernels.plan import Entry, Pass, Plan
from zo_kernels.views.memory import ALIGNMENT, aligned, empty
from zo_kernels.views.shadow import PerturbedWeight

Calls = tuple[int, ...]  # the weights that one call takes, by the ids of their shadows
Launches = list[tuple[int, Plan, ModuleType]]  # (parameter group, plan, backend)


class Forward:
    """The forward under way, as the parts of a scratch view see it."""

    def __init__(self) -> None:
        self.passes: list[Pass | None] = []  # of each parameter group; None: it stands at theta
        self.held: dict[int, PerturbedWeight] = {}  # by the parameter's id: those whose own memory is perturbed
        self.served: set[int] = set()  # ids of the parameters that forwards have asked for
        self.inside = False  # our own reads of clean weights are under way, or all reads are clean

    def serve(self, shadows: Iterable[PerturbedWeight]) -> None:
        self.served.update(id(s.param) for s in shadows)


@dataclass
class Fill:
    """Consecutive calls whose weights one pass writes into the buffer.

    `values`: what each call receives; `written`: all of them.
    """

    launches: Launches
    values: dict[Calls, list[Tensor]]
    written: list[Tensor]


def launches_of(entries: Sequence[tuple[int, Entry]], backend: str | None) -> Launches:
    """One launch for each parameter group, device and dtype among (group, entry)."""
    by_launch: dict[tuple[int, torch.device, torch.dtype], list[Entry]] = {}
    for group, entry in entries:
        by_launch.setdefault((group, entry.dst.device, entry.dst.dtype), []).append(entry)
    return [
        (group, Plan(tuple(members), device, dtype), backends.pick(device, backend))
        for (group, device, dtype), members in by_launch.items()
    ]


class Buffer:
    """One piece of memory a device, used again and again.

    `limit`: its size in bytes. It grows beyond that only to a single weight that is larger and cannot be handled in parts.
    """

    def __init__(self, limit: int, backend: str | None, forward: Forward) -> None:
        self.limit, self.backend, self.forward = limit, backend, forward
        self.memory: dict[torch.device, Tensor] = {}
        self.storages: set[int] = set()  # of `memory`, by address
        self.tables: list[dict[Calls, Any]] = []  # of all that points into `memory`
        self.fills: dict[Calls, Fill] = self.table()  # by the call that comes first
        self.live: dict[Calls, list[Tensor]] = {}  # the values that it holds now
        # What the calls of this forward took, with None where the buffer served something else; None: nothing is to be learned from it.
        self.asked: list[list[PerturbedWeight] | None] | None = []
        self.surprised = False  # a call came that no earlier forward had

    def table(self) -> dict[Calls, Any]:
        """A new table of what points into the buffer; `forget` empties it."""
        self.tables.append({})
        return self.tables[-1]

    # -- the values of a call --

    def values(self, found: Sequence[PerturbedWeight]) -> list[Tensor]:
        """theta + c z of each weight, valid until the next call."""
        if self.asked is not None:
            self.asked.append(list(found))
        key = tuple(map(id, found))
        values = self.live.get(key)
        if values is None:
            fill = self.fills.get(key)
            if fill is None:
                fill = self._make([found])
                self.surprised = True
            self.write(fill)
            self.live = fill.values
            values = self.live[key]
        return values

    def kept(self, found: Sequence[PerturbedWeight]) -> list[Tensor]:
        """theta + c z of each weight, in memory of their own."""
        self.forward.serve(found)
        fill = self.fill_of([found], [empty(s.clean.shape, s.clean.dtype, s.clean.device) for s in found])
        self.write(fill)
        return fill.values[tuple(map(id, found))]

    def lend(self) -> None:
        """From here to the next call the buffer holds what somebody else writes there."""
        self.live = {}
        if self.asked is not None:
            self.asked.append(None)

    def write(self, fill: Fill) -> None:
        forward = self.forward
        forward.inside = True
        try:
            for group, plan, backend in fill.launches:
                if (p := forward.passes[group]) is not None:
                    backend.perturb(plan, p.on(plan.device))
                else:
                    for e in plan.entries:
                        e.dst.view(-1).copy_(e.src.view(-1))
        finally:
            forward.inside = False
        torch.autograd.graph.increment_version(fill.written)  # a graph that saved the buffer must not use what is in it now

    # -- what is written together --

    def begin(self) -> None:
        """Another forward begins: from the calls of the one that is over, which ones the buffer can serve together."""
        asked, self.asked = self.asked, [] if self.surprised else None
        self.surprised = False
        if asked:
            self._learn(asked)
        self.live = {}

    def _learn(self, asked: Sequence[Sequence[PerturbedWeight] | None]) -> None:
        together: dict[Calls, list[Sequence[PerturbedWeight]]] = {}
        largest: dict[torch.device, int] = {}
        calls: list[Sequence[PerturbedWeight]] = []
        weights: dict[int, PerturbedWeight] = {}
        size = 0
        for call in [*asked, None]:
            more = sum({id(s): s.room for s in call or () if id(s) not in weights}.values())
            if calls and (call is None or size + more > self.limit):
                together.setdefault(tuple(map(id, calls[0])), calls)
                sizes: dict[torch.device, int] = {}
                for s in weights.values():
                    sizes[s.clean.device] = sizes.get(s.clean.device, 0) + s.room
                largest |= {device: max(n, largest.get(device, 0)) for device, n in sizes.items()}
                calls, weights, size = [], {}, 0
                more = sum({id(s): s.room for s in call or ()}.values())
            if call is not None:
                calls.append(call)
                weights |= {id(s): s for s in call}
                size += more
        self.fills.clear()
        self.room([(device, torch.uint8, torch.Size((size,))) for device, size in largest.items()])
        for calls in together.values():
            self._make(calls)

    def _make(self, calls: Sequence[Sequence[PerturbedWeight]]) -> Fill:
        """The fill of these calls in the buffer, kept under the first one."""
        shadows = {id(s): s for call in calls for s in call}.values()
        self.forward.serve(shadows)
        room = self.room([(s.clean.device, s.clean.dtype, s.clean.shape) for s in shadows])
        fill = self.fills[tuple(map(id, calls[0]))] = self.fill_of(calls, room)
        return fill

    def fill_of(self, calls: Sequence[Sequence[PerturbedWeight]], room: Sequence[Tensor]) -> Fill:
        """The fill of these calls, with memory for each of their weights, in the order in which they first occur."""
        shadows = {id(s): s for call in calls for s in call}
        free = {i: value for i, value in zip(shadows, room, strict=True) if id(shadows[i].param) not in self.forward.held}
        entries = [(shadows[i].group, replace(shadows[i].entry, dst=value)) for i, value in free.items()]
        # Leaves that require a gradient, like the parameters they stand for: at::matmul folds a batch into one matrix product only then,
        # even under no_grad. Otherwise a head over the last position is computed, and its weight copied, once for each row.
        leaves = {i: value.detach().requires_grad_(shadows[i].param.requires_grad) for i, value in free.items()}
        values = {tuple(map(id, call)): [leaves.get(id(s), s.param) for s in call] for call in calls}
        return Fill(launches_of(entries, self.backend), values, list(leaves.values()))

    def plans(self) -> Iterator[Plan]:
        for fill in self.fills.values():
            yield from (plan for _, plan, _ in fill.launches)

    # -- memory --

    def room(self, wanted: Sequence[tuple[torch.device, torch.dtype, torch.Size]]) -> list[Tensor]:
        """Tensors of the buffer that are in use together; it grows to the largest call it has seen."""
        starts, ends = [], dict.fromkeys((device for device, _, _ in wanted), 0)
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in wanted]
        for (device, _, _), size in zip(wanted, sizes, strict=True):
            starts.append(ends[device])
            ends[device] += aligned(size)
        have = {device: memory.numel() for device, memory in self.memory.items()}
        if any(have.get(device, 0) < size for device, size in ends.items()):
            self.release()
            for device, size in (have | {device: max(size, have.get(device, 0)) for device, size in ends.items()}).items():
                whole = empty((size + ALIGNMENT,), torch.uint8, device)
                start = -whole.data_ptr() % ALIGNMENT
                self.memory[device] = whole[start : start + size]
            self.storages = {b.untyped_storage().data_ptr() for b in self.memory.values()}
        with torch.inference_mode(False):  # whose writes are counted, whatever mode the closure is in
            return [
                self.memory[device][start : start + size].view(dtype).view(shape)
                for (device, dtype, shape), start, size in zip(wanted, starts, sizes, strict=True)
            ]

    def forget(self) -> None:
        """What points into the buffer is made anew: another parameter is held, or the memory goes."""
        for table in self.tables:
            table.clear()
        self.live = {}

    def release(self) -> None:
        """The memory goes, with all that points into it, so that an old buffer and its larger successor are never there together."""
        self.forget()
        self.memory.clear()
        self.storages.clear()
