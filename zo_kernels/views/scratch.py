"""theta + c z through a scratch buffer: the weights themselves stay as they are.

Belongs here: the buffer and what it is filled with, in which order; parts of matrices and rows of tables; parameters that shadows do not reach.
Does not belong here: what stands before the modules' parameters (shadow.py), how a read past it is noticed (reads.py).

For the time of a step every trainable parameter of a module is shadowed by a `PerturbedWeight`, a tensor without storage that stands in the
module's `__dict__`, where attribute access looks first. When a torch function receives one (`F.linear(x, self.weight, self.bias)`), the clean
weights are read, theta + c z is written into a buffer, and the function runs on the buffer. Forward hooks on modules were the alternative: they
miss a weight that a parent reads (a tied head), need one buffer per nesting level, and cost two Python calls per module instead of one per use.

The buffer has a fixed size, `scratch_bytes`. One pass fills it with the weights of as many of the next calls as it holds, in the order
in which an earlier forward asked for them: a launch a layer, or a launch a model, instead of one for every bias. A matrix larger
than the buffer is multiplied in parts, and an embedding perturbs only the rows it gathers. Where all of them fit at once (adapters,
norms, a small model), the modules get the values themselves, and no Python of ours runs inside a forward.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zo_kernels import _backends as backends
from zo_kernels import ops
from zo_kernels.interrupts import uninterrupted
from zo_kernels.parameters import Weights
from zo_kernels.plan import Entry, Pass, Plan
from zo_kernels.views.base import Shift, Update, View, changed
from zo_kernels.views.memory import ALIGNMENT, aligned, default_scratch_bytes, empty, overlap
from zo_kernels.views.reads import Reads, version, walk
from zo_kernels.views.shadow import FRESH, QUIET, SETTERS, Calls, PerturbedWeight, Placed, swap_in

MOST_GATHERS = 64  # plans of gathered rows that are kept: batches of every length come along in a run
GATHER_BYTES = 1 << 22  # of gathered rows that are perturbed at a time, and at most GATHER_ROWS of them
GATHER_ROWS = 1 << 16
PART_ROWS = 256  # parts of a matrix have a multiple of so many rows: whole tiles of matrix kernels, whole calls of the noise


@dataclass
class Fill:
    """Consecutive calls whose weights one pass writes into the buffer.

    `plans`: (parameter group, plan, backend) of each launch; `values`: what each call receives; `written`: all of them.
    """

    plans: list[tuple[int, Plan, ModuleType]]
    values: dict[Calls, list[Tensor]]
    written: list[Tensor]


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
    """Rows of an embedding table: their numbers, their values in the buffer, and what perturbs them."""

    rows: Tensor
    values: Tensor
    mask: Tensor | None
    plan: Plan
    backend: ModuleType


class Scratch(View):
    """theta + c z in one reusable buffer a device; the weights themselves change in `update` alone.

    `scratch_bytes`: of the buffer; None: as default_scratch_bytes says. It grows beyond that only to a single weight that is larger and
    cannot be handled in parts: one that a function other than `F.linear` or `F.embedding` takes.
    """

    holds_values = True  # modules may be given values, where all fit

    def __init__(self, groups: Sequence[Weights], model: nn.Module, scratch_bytes: int | None = None, **options: Any) -> None:
        super().__init__(groups, model, **options)
        self.model: nn.Module = model
        self.served = set()
        shadows: dict[int, PerturbedWeight] = {}
        for k, weights in enumerate(groups):
            entries = weights.entries()
            for p in weights.params:
                shadows[id(p)] = PerturbedWeight(p, entries[id(p)], k, self)
        self.limit = scratch_bytes or default_scratch_bytes(s.clean.device for s in shadows.values())
        self.sites: dict[nn.Module, list[tuple[str, PerturbedWeight]]] = {}
        for module, attribute, p in self.places:
            self.sites.setdefault(module, []).append((attribute, shadows[id(p)]))
        self.number = {id(p): k for k, p in enumerate(self.counted)}
        # What the modules hold the values of, instead of shadows: where all of them fit, but for tables whose rows are gathered. Never
        # what an earlier step happened to read: a module must see the same kind of tensor in every step.
        gathered = {id(p): True for _, _, p in self.places}
        for module, attribute, p in self.places:
            gathered[id(p)] &= type(module) is nn.Embedding and attribute == "weight"
        here = {id(s): s for sites in self.sites.values() for _, s in sites if not gathered[id(s.param)]}
        fits = self.holds_values and sum(s.room for s in here.values()) <= self.limit
        self.fitting: list[PerturbedWeight] = list(here.values()) if fits else []
        self.thread: int | None = None  # that runs a step now
        self.passes: list[Pass | None] = []
        self.buffers: dict[torch.device, Tensor] = {}
        self.storages: set[int] = set()  # the buffers', by address
        self.fills: dict[Calls, Fill] = {}  # by the call that comes first
        self.live: dict[Calls, list[Tensor]] = {}  # the values that the buffer holds now
        # What the calls of this forward took, with None where the buffer served something else; None: nothing is to be learned from it.
        self.asked: list[list[PerturbedWeight] | None] | None = []
        self.changed = False  # a call came that no earlier forward had
        self.resident: Fill | None = None  # of `fitting`, in memory of its own
        self.shown: dict[int, PerturbedWeight] = {}  # its weights, by the ids of the values
        self.asks: Sequence[bool] = []  # whether its values asked for a gradient when the step began
        self.lie_at: Sequence[int] = []  # the addresses of its values
        self.resident_beside = 0  # how many parameters were held when it was made
        self.filled: Sequence[int] = []  # the versions of its values after the pass
        self.fronts: list[Placed] = []
        self.fronts_of: Fill | None = None  # `resident` when they were made
        self.parts: dict[Calls, list[Part]] = {}
        self.gathers: dict[tuple[int, int], Gather] = {}  # by the table's shadow and the number of rows
        self.gather_memory: dict[tuple[str, torch.device], Tensor] = {}
        self.inside = False  # our own reads of clean weights are under way, or all reads are clean
        self.bare = False  # this forward runs at theta itself
        # Parameters that code reaches past its module's attributes (a list of captured weights, a scripted module), and a copy of
        # their clean values while a forward runs. `missing` are those that no module owns at all.
        reached = {id(shadow) for sites in self.sites.values() for _, shadow in sites}
        self.held: dict[int, PerturbedWeight] = {i: s for i, s in shadows.items() if id(s) not in reached}
        if self.held:
            self.served = None  # nobody sees who reads those
        self.copies: dict[int, Tensor] = {}
        self.told = 0  # how many held parameters the user knows of
        self.watched_mode: bool | None = None  # model.training of the step that was watched
        self.shadows = shadows
        self.recorded = False  # this step's passes are recorded and not executed
        self.reads = Reads((s.param for s in shadows.values()), QUIET, self._read, self._written, self._elsewhere)

    # -- a step --

    @contextlib.contextmanager
    def step(self, recorded: bool = False) -> Iterator[None]:
        # One step shows which parameters are read in ways that attributes do not show, and in which order; watching costs microseconds
        # an operation.
        watched = self.model.training is not self.watched_mode
        if watched:
            self.changed = True  # see() starts to learn
        if self.fitting and (self.resident is None or self.resident_beside != len(self.held)):
            room = [empty(s.clean.shape, s.clean.dtype, s.clean.device) for s in self.fitting]
            self.resident, self.resident_beside = self._fill_of([[s] for s in self.fitting], room), len(self.held)
            self.shown = {id(self.resident.values[(id(s),)][0]): s for s in self.fitting}
        there = self.resident.values if self.resident else {}
        if not self.fronts or self.fronts_of is not self.resident:
            self.fronts_of = self.resident
            self.fronts = [
                Placed(module, {a: there[(id(s),)][0] if (id(s),) in there else s for a, s in sites})
                for module, sites in self.sites.items()
            ]
        if self.resident:
            self.asks = [t.requires_grad for t in self.resident.written]
            self.lie_at = [t.data_ptr() for t in self.resident.written]
        held = dict(self.held)
        self.thread, self.recorded = threading.get_ident(), recorded
        self.expect()
        try:
            for front in self.fronts:
                front.place()
            if watched:
                with _uncompiled(), Watch(self, self.shadows.values()):
                    yield
                self.watched_mode = self.model.training
            else:
                yield
            for front in self.fronts:
                if front.touched:
                    front.keep()
        except BaseException:
            self.reads.end()
            self._undo()
            self._drop_gradients()
            self._put_back()
            self.resident = None  # whatever the closure set in its values
            if len(held) < len(self.held):  # what the failed closure read may be what made it fail
                self.held, self.live = held, {}
                self.fills.clear()
                self.parts.clear()
            raise
        finally:
            self.reads.end()
            for front in self.fronts:
                front.remove()
            self.bare = self.inside = False
            self.thread = None
            self._put_back()

    def see(self, shifts: Sequence[Shift]) -> None:
        self._put_back()
        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, and the buffer's tensors are used again
        if not any(shifts):  # the weights themselves: nothing stands before them
            for front in self.fronts:
                front.remove()
            self.bare = self.inside = True
            self.expect()
            return
        if self.bare:
            self.bare = self.inside = False
            for front in self.fronts:
                front.place()
        self._learn()
        self.live = {}
        self.passes = [self._pass(shift, 1.0, "nearest") if shift else None for shift in shifts]
        if self.resident:  # from clean weights: those that were held after it was made are in it too
            self._fill(self.resident)
            self.filled = [t._version for t in self.resident.written]
        for shadow in self.held.values():
            self._perturb_held(shadow)
        self.expect()
        self.reads.begin()

    def check(self) -> None:
        self.reads.end()
        super().check()
        if self.bare:
            return
        if self.resident:
            written = self.resident.written
            for before, now, how in (
                (self.filled, [t._version for t in written], "written to"),
                (self.asks, [t.requires_grad for t in written], "changed"),
                (self.lie_at, [t.data_ptr() for t in written], "moved or converted"),
            ):
                if before != now:
                    t = next(t for t, a, b in zip(written, before, now, strict=True) if a != b)
                    raise changed(self._name_of(next(k for k, (v,) in self.resident.values.items() if v is t)[0]), how)
        for front in self.fronts:
            for attribute in front.values_shown:
                if attribute not in front.module.__dict__:
                    raise changed(self.names[id(front.parameters[attribute])], "perturbed by another step")
        if self._drop_gradients():
            raise RuntimeError(
                "the closure calls backward(): in scratch mode the gradients do not reach the parameters; nothing was updated. Leave it out "
                "(MeZO needs none), or take perturbation='inplace'"
            )

    def _serves(self, shadows: Iterable[PerturbedWeight]) -> None:
        if self.served is not None:
            self.served.update(id(s.param) for s in shadows)

    def _name_of(self, shadow: int) -> str:
        return next(self.names[i] for i, s in self.shadows.items() if id(s) == shadow)

    def _drop_gradients(self) -> bool:
        """Those of the buffer's tensors; whether there were any."""
        found = [t for fill in (self.resident, *self.fills.values()) if fill for t in fill.written if t.grad is not None]
        for t in found:
            t.grad = None
        return bool(found)

    def update(self, updates: Sequence[Update]) -> None:
        with self._untouched():
            super().update(updates)

    @contextlib.contextmanager
    def clean(self) -> Iterator[None]:
        with self._untouched(), super().clean():
            yield

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """The weights are what they are between steps, and may be written to."""
        self._put_back()
        self.live = {}
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def plans(self) -> Iterator[Plan]:
        yield from super().plans()
        parts = [part.fill for parts in self.parts.values() for part in parts]
        for fill in (self.resident, *self.fills.values(), *parts):
            for _, plan, _ in fill.plans if fill else ():
                yield plan
        for gather in self.gathers.values():
            yield gather.plan

    def retag(self, mask_tag: int) -> None:
        super().retag(mask_tag)
        for shadow in self.shadows.values():
            shadow.entry = shadow.entry.retagged(mask_tag)
        self.live = {}

    def release(self) -> None:
        """Give the memory of buffers back; the next forward makes them anew."""
        self.resident, self.fronts_of = None, None
        self.fronts = []
        self._drop_buffers()
        self.gathers.clear()
        self.gather_memory.clear()

    def memory(self) -> Any:
        tables = (self.fills, self.parts, self.gathers)
        return self.groups, dict(self.buffers), dict(self.gather_memory), [list(t.values()) for t in tables], self.resident

    # -- a function that receives weights --

    def refuse_thread(self, shadow: PerturbedWeight) -> None:
        name = self.names[id(shadow.param)]
        raise RuntimeError(
            f"the perturbed {name} of a scratch step is used after the step: read it again from its module"
            if self.thread is None
            else f"the model runs in another thread than step() (read: {name}): in scratch mode one buffer serves one forward at a time. "
            "Take perturbation='inplace', or run the model in the closure's thread"
        )

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Sequence[PerturbedWeight]) -> Any:
        if func is nn.functional.embedding:
            rows = self._embedding(*args, **kwargs)
            if rows is not None:
                return rows
        elif func is nn.functional.linear and found[0].clean.nbytes > self.limit:
            product = self._linear(*args, **kwargs)
            if product is not None:
                return product
        values = self.values(found)
        plain, named = swap_in(args, kwargs, values)
        if func in FRESH:
            return func(*plain, **named)
        if getattr(func, "__name__", "") in SETTERS:
            raise changed(self.names[id(found[0].param)], "changed")
        versions = [t._version for t in values]
        result = func(*plain, **named)
        for t, before, shadow in zip(values, versions, found, strict=True):
            if t._version != before:
                self.live = {}
                raise changed(self.names[id(shadow.param)], "written to")
        for t in (result,) if type(result) is Tensor else walk(result):
            if isinstance(t, Tensor) and type(t) is not PerturbedWeight and t.untyped_storage().data_ptr() in self.storages:
                # A view of the weight outlives the call (`weight.t()`): it needs values that the next call does not overwrite.
                plain, named = swap_in(args, kwargs, self.values(found, keep=True))
                return func(*plain, **named)
        return result

    def values(self, found: Sequence[PerturbedWeight], keep: bool = False) -> list[Tensor]:
        """theta + c z of each weight, in the buffer (valid until the next call) or, to keep, in memory of their own."""
        key = tuple(map(id, found))
        if keep:
            self._serves(found)
            fill = self._fill_of([found], [empty(s.clean.shape, s.clean.dtype, s.clean.device) for s in found])
            self._fill(fill)
            return fill.values[key]
        if self.asked is not None:
            self.asked.append(list(found))
        values = self.live.get(key)
        if values is None:
            fill_ = self.fills.get(key)
            if fill_ is None:
                fill_ = self._make_fill([found])
                self.changed = True
            self._fill(fill_)
            self.live = fill_.values
            values = self.live[key]
        return values

    def _fill(self, fill: Fill) -> None:
        self.inside = True
        try:
            for group, plan, backend in fill.plans:
                if (p := self.passes[group]) is not None:
                    backend.perturb(plan, p)
                else:
                    for e in plan.entries:
                        e.dst.view(-1).copy_(e.src.view(-1))
        finally:
            self.inside = False
        torch.autograd.graph.increment_version(fill.written)  # a graph that saved the buffer must not use what is in it now

    def _make_fill(self, calls: Sequence[Sequence[PerturbedWeight]]) -> Fill:
        """The fill of these calls in the buffer, kept under the first one."""
        shadows = {id(s): s for call in calls for s in call}.values()
        self._serves(shadows)
        room = self._room([(s.clean.device, s.clean.dtype, s.clean.shape) for s in shadows])
        fill = self.fills[tuple(map(id, calls[0]))] = self._fill_of(calls, room)
        return fill

    def _fill_of(self, calls: Sequence[Sequence[PerturbedWeight]], room: Sequence[Tensor]) -> Fill:
        """The fill of these calls, with memory for each of their weights, in the order in which they first occur."""
        shadows = {id(s): s for call in calls for s in call}
        free = {i: value for i, value in zip(shadows, room, strict=True) if id(shadows[i].param) not in self.held}
        plans = self._plans([(shadows[i].group, replace(shadows[i].entry, dst=value)) for i, value in free.items()])
        # Leaves that require a gradient, like the parameters they stand for: at::matmul folds a batch into one matrix product only then,
        # even under no_grad. Otherwise a head over the last position is computed, and its weight copied, once for each row.
        leaves = {i: value.detach().requires_grad_(shadows[i].param.requires_grad) for i, value in free.items()}
        values = {tuple(map(id, call)): [leaves.get(id(s), s.param) for s in call] for call in calls}
        return Fill(plans, values, list(leaves.values()))

    def _plans(self, entries: Sequence[tuple[int, Entry]]) -> list[tuple[int, Plan, ModuleType]]:
        """One launch for each parameter group, device and dtype among (group, entry)."""
        by_launch: dict[tuple[int, torch.device, torch.dtype], list[Entry]] = {}
        for group, entry in entries:
            by_launch.setdefault((group, entry.dst.device, entry.dst.dtype), []).append(entry)
        return [
            (group, Plan(tuple(members), device, dtype), backends.pick(device, self.backend))
            for (group, device, dtype), members in by_launch.items()
        ]

    def _learn(self) -> None:
        """Between two forwards: from the calls of the one that is over, which ones the buffer can serve together."""
        asked, self.asked = self.asked, [] if self.changed else None
        self.changed = False
        if not asked:
            return
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
        self._room([(device, torch.uint8, torch.Size((size,))) for device, size in largest.items()])
        for calls in together.values():
            self._make_fill(calls)

    def _drop_buffers(self) -> None:
        """With all that points into them, so that an old buffer and its larger successor are never there together."""
        self.fills.clear()
        self.parts.clear()
        self.live = {}
        self.buffers.clear()
        self.storages.clear()

    def _room(self, wanted: Sequence[tuple[torch.device, torch.dtype, torch.Size]]) -> list[Tensor]:
        """Tensors of the buffer that are in use together; a buffer grows to the largest call it has seen."""
        starts, ends = [], dict.fromkeys((device for device, _, _ in wanted), 0)
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in wanted]
        for (device, _, _), size in zip(wanted, sizes, strict=True):
            starts.append(ends[device])
            ends[device] += aligned(size)
        have = {device: buffer.numel() for device, buffer in self.buffers.items()}
        if any(have.get(device, 0) < size for device, size in ends.items()):
            self._drop_buffers()
            for device, size in (have | {device: max(size, have.get(device, 0)) for device, size in ends.items()}).items():
                whole = empty((size + ALIGNMENT,), torch.uint8, device)
                start = -whole.data_ptr() % ALIGNMENT
                self.buffers[device] = whole[start : start + size]
            self.storages = {b.untyped_storage().data_ptr() for b in self.buffers.values()}
        return [
            self.buffers[device][start : start + size].view(dtype).view(shape)
            for (device, dtype, shape), start, size in zip(wanted, starts, sizes, strict=True)
        ]

    # -- matrices larger than the buffer --

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Tensor | None:
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
        self.live = {}
        if self.asked is not None:
            self.asked.append(None)
        rows, width = weight.clean.shape
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type)
        result: Tensor | None = None
        for part in parts:
            self._fill(part.fill)
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
            at_once = (self.limit - 2 * ALIGNMENT) // row_bytes // PART_ROWS * PART_ROWS
            if at_once <= 0:
                return None
            self._serves(shadows)
            free = [s for s in shadows if id(s.param) not in self.held]
            room = self._room([(s.clean.device, s.clean.dtype, torch.Size((at_once, *s.clean.shape[1:]))) for s in free])
            parts = []
            for start in range(0, rows, at_once):
                stop = min(start + at_once, rows)
                values = {id(s): r[: stop - start] for s, r in zip(free, room, strict=True)}
                entries = [
                    (s.group, s.entry.part(start * (s.clean.numel() // rows), stop * (s.clean.numel() // rows), values[id(s)]))
                    for s in free
                ]
                fill = Fill(self._plans(entries), {}, list(values.values()))
                # What is held has its perturbed values itself; its products are the same parts, in whichever step it was found.
                own, *others = [values.get(id(s), s.clean[start:stop]) for s in shadows]
                parts.append(Part(fill, own, others[0] if others else None, start, stop))
            self.parts[key] = parts
        return parts

    # -- embeddings --

    def _embedding(
        self, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **more: Any
    ) -> Tensor | None:
        """theta + c z in the gathered rows only; None where the whole table is the only way."""
        if type(weight) is not PerturbedWeight or not isinstance(input, Tensor):
            return None
        if max_norm is not None:  # it writes to the table
            raise changed(self.names[id(weight.param)], "written to (max_norm)")
        entry, p = weight.entry, self.passes[weight.group]
        table = weight.clean
        if p is None or id(weight.param) in self.held or (entry.mask is not None and table.shape[1] % 8):
            return None
        flat = input.reshape(-1)
        result = torch.empty(flat.numel(), table.shape[1], dtype=table.dtype, device=table.device)
        at_once = max(1, min(GATHER_ROWS, GATHER_BYTES // (table.shape[1] * table.element_size() or 1)))
        self.inside = True
        try:
            for start in range(0, flat.numel(), at_once):
                gather = self._gather(weight, min(at_once, flat.numel() - start))
                gather.rows.copy_(flat[start : start + at_once])
                torch.index_select(table, 0, gather.rows, out=gather.values)
                if gather.mask is not None and entry.mask is not None:
                    torch.index_select(entry.mask.view(table.shape[0], -1), 0, gather.rows, out=gather.mask)
                gather.backend.perturb(gather.plan, p)
                result[start : start + at_once] = gather.values
        finally:
            self.inside = False
        return result.view(*input.shape, table.shape[1])

    def _gather(self, weight: PerturbedWeight, n: int) -> Gather:
        """Memory and plan for `n` rows of a table. The same addresses at every step: a backend's tables of the plan are uploaded once."""
        if (gather := self.gathers.get((id(weight), n))) is None:
            self._serves([weight])
            entry, table = weight.entry, weight.clean
            width = table.shape[1]
            rows = self._memory("rows", n * 8, table.device).view(torch.int64)
            values = self._memory("values", n * width * table.element_size(), table.device).view(table.dtype).view(n, width)
            mask = None if entry.mask is None else self._memory("mask", n * width // 8, table.device).view(n, width // 8)
            local = replace(entry, src=values, dst=values, rows=rows, row_len=width, mask=None if mask is None else mask.view(-1))
            if len(self.gathers) >= MOST_GATHERS:
                self.gathers.clear()
            plan = Plan((local,), table.device, table.dtype)
            gather = self.gathers[id(weight), n] = Gather(rows, values, mask, plan, backends.pick(table.device, self.backend))
        return gather

    def _memory(self, purpose: str, size: int, device: torch.device) -> Tensor:
        """Bytes that all gathers share: one is over before the next begins."""
        room = self.gather_memory.get((purpose, device))
        if room is None or room.numel() < size:
            room = self.gather_memory[purpose, device] = empty((size,), torch.uint8, device)
            self.gathers.clear()  # they point into the old memory
        return room[:size]

    # -- parameters that shadows do not reach --

    def _read(self, p: Tensor) -> None:
        if id(p) not in self.held:
            self.hold(self.shadows[id(p)])

    def _written(self, p: Tensor) -> None:
        raise changed(self.names[id(p)], "written to")

    def _elsewhere(self, p: Tensor) -> None:
        self.refuse_thread(self.shadows[id(p)])

    def hold(self, shadow: PerturbedWeight) -> None:
        """From now on this parameter is perturbed in place around each forward and put back from a copy: exact, for the copy's memory.

        At the moment of its first read every earlier use went through the shadow, so that the forward has the same values as if it had been held
        from the start.

        Raises:
            RuntimeError: the step is being recorded; the copy would not be part of it.
        """
        if self.recorded:
            raise RuntimeError(
                f"parameter {self.names[id(shadow.param)]} is read past its module's attribute, and was not in the steps before"
            )
        self.held[id(shadow.param)] = shadow
        self._serves([shadow])
        self.fills.clear()
        self.parts.clear()
        self.live = {}
        self._perturb_held(shadow)

    def _perturb_held(self, shadow: PerturbedWeight) -> None:
        p = self.passes[shadow.group]
        if p is None:
            return
        self.inside = True
        try:
            with uninterrupted():
                self.copies[id(shadow.param)] = shadow.clean.clone()
                ops.run((Plan((shadow.entry,), shadow.clean.device, shadow.clean.dtype),), p, self.backend)
                if not shadow.clean.is_inference():
                    self.versions[self.number[id(shadow.param)]] = shadow.clean._version
        finally:
            self.inside = False

    def _put_back(self) -> None:
        if not self.copies:
            return
        self.inside = True
        try:
            with uninterrupted(), torch.no_grad():
                for key, copy in self.copies.items():
                    # Those made in inference mode are written to there alone.
                    with torch.inference_mode() if self.held[key].clean.is_inference() else contextlib.nullcontext():
                        self.held[key].param.copy_(copy)
                self.copies.clear()
        finally:
            self.inside = False

    def news(self) -> str | None:
        """Which parameters are perturbed in place and the memory that this costs, in one line; None if nothing is new."""
        if len(self.held) == self.told:
            return None
        self.told = len(self.held)
        size = sum(s.clean.nbytes for s in self.held.values())
        names = ", ".join(sorted(self.names[i] for i in self.held))
        return (
            f"scratch mode: {len(self.held)} parameters are read in ways that their modules' attributes do not show ({names}); "
            f"they are perturbed in place around each forward and put back, bit for bit, from a copy of {size / 2**20:.1f} MiB"
        )


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled functions run as they were written: a mode that the compiler traces becomes a part of what it makes, values of one forward included.
    Importing the compiler takes seconds, and who has not imported it compiles nothing."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class Watch(TorchFunctionMode):
    """What `Reads` cannot see, during the first step: functions that read or write a clean weight through a tensor that shared its memory before
    the forward. Also which of the values that modules hold are used."""

    def __init__(self, scratch: Scratch, shadows: Any) -> None:
        super().__init__()
        self.scratch = scratch
        self.storages: dict[int, list[PerturbedWeight]] = {}
        for shadow in shadows:
            self.storages.setdefault(shadow.clean.untyped_storage().data_ptr(), []).append(shadow)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.scratch.inside or func in QUIET or func in (Tensor.untyped_storage, Tensor.data_ptr):
            return func(*args, **kwargs)
        leaves = list(walk((args, kwargs)))
        self.scratch._serves(self.scratch.shown[id(t)] for t in leaves if id(t) in self.scratch.shown)
        written = [(t, version(t), shadows[0]) for t in leaves if (shadows := self._found(t))]
        result = func(*args, **kwargs)
        for t, before, shadow in written:
            if version(t) != before:
                self.scratch._written(shadow.param)
        return result

    def _found(self, t: Any) -> list[PerturbedWeight]:
        """The weights whose memory this is, which are held from now on."""
        if not isinstance(t, Tensor) or type(t) is PerturbedWeight:
            return []
        with torch._C.DisableTorchFunctionSubclass():
            if t.is_meta:
                return []
            try:
                storage = t.untyped_storage().data_ptr()
            except (NotImplementedError, RuntimeError):  # sparse, or a subclass without memory of its own
                return []
            found = [shadow for shadow in self.storages.get(storage, ()) if overlap(t, shadow.clean)]
        for shadow in found:
            self.scratch._read(shadow.param)
        return found
