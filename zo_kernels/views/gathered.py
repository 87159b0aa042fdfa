"""theta + c z in the whole weights that FSDP2 gathers for a forward: the parts that a process has stay as they are.

Belongs here: what notices that FSDP has gathered a weight, and the pass over that copy. Does not belong here: where a part lies (zo_kernels/shards.py),
the update of parts, which is that of any view (base.py).

FSDP puts the whole weight where its part stood, in the module's `_parameters`, right before a module runs, and the part back behind it. For the time of a
step that dict is one which says so: a whole weight is perturbed once, as it comes, by one pass in its own memory, a temporary of FSDP's. So nothing but
that memory is needed, each value is rounded once from a clean weight, as in scratch.py, and whoever reads the weight, wherever, reads theta + c z. What
FSDP keeps of a forward (`reshard_after_forward=False`, a number, the outermost module) is not perturbed again within it, and is given back before the next
point. Forward hooks behind FSDP's were the alternative: they do not know whether a module that is called a second time has gathered its weights anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import ops, shards
from zo_kernels.parameters import Member, Weights
from zo_kernels.plan import Entry, Pass, Plan
from zo_kernels.views.base import View, changed, gone
from zo_kernels.views.reads import version
from zo_kernels.views.shadow import Placed
from zo_kernels.views.work import Shift


@dataclass(eq=False)
class Gathered:
    """A trained weight of which a process has a part. `whole`: what FSDP gathers, always the same object, whose memory comes and goes; within tensor
    parallelism, it is this process's part of that. `clean`: the part stands in the modules, or what was gathered of it at theta."""

    member: Member
    entry: Entry  # of the part
    group: int
    whole: Tensor
    offset: int
    columns: tuple[int, int] | None
    clean: bool = True
    seen: int = 0  # the count of writes behind our own
    plan: Plan | None = None

    def planned(self) -> Plan:
        """Of the whole weight where it lies now."""
        memory = shards.memory_of(self.whole).detach()
        if self.plan is None or int(self.plan.table[0, 0]) != memory.data_ptr():
            e, (width, pitch) = self.entry, self.columns or (0, 0)
            entry = Entry(memory, memory, e.stream, self.offset, keep=e.keep, mask_tag=e.mask_tag, width=width, pitch=pitch)
            self.plan = Plan((entry,), memory.device, memory.dtype)
        return self.plan


class Told(Placed):
    """A module's `_parameters` for the time of a step, which says what is put there."""

    __slots__ = ("tell",)

    def __init__(self, module: nn.Module, tell: Callable[[nn.Module, str, Any], None]) -> None:
        super().__init__(module, {})
        self.tell = tell

    def __setitem__(self, name: str, p: Any) -> None:
        super().__setitem__(name, p)
        self.tell(self.module, name, p)


class GatheredCopies(View):
    """All trained weights are parts that FSDP2 gathers for a forward.

    Every process makes the view at the same time: each weight is gathered once.

    Raises:
        ValueError: one is not gathered, or in another dtype; names it. RuntimeError: the model has others in their place.
    """

    mode = "scratch"
    model: nn.Module

    def __init__(self, groups: Sequence[Weights], model: nn.Module, **options: Any) -> None:
        super().__init__(groups, model, **options)
        self.passes: list[Pass | None] = [None] * len(groups)
        there = set(map(id, model.parameters()))
        if lost := sorted(m.name for w in groups for m in w.members if id(m.param) not in there):
            raise gone(lost)
        found = shards.wholes(model, [m.param for w in groups for m in w.members])
        parts: dict[int, Gathered] = {}
        for k, weights in enumerate(groups):
            for m, entry in weights.entries():
                whole = found.get(id(m.param))
                if whole is None or whole.dtype != m.tensor.dtype:
                    how = "not gathered by FSDP" if whole is None else f"{m.tensor.dtype}, and gathered as {whole.dtype}"
                    raise ValueError(f"perturbation='scratch': parameter {m.name!r} is {how}: take perturbation='inplace'")
                where = shards.place_of(m.name, whole) if shards.is_part(whole) else (0, None)
                parts[id(m.param)] = Gathered(m, entry, k, whole, *where)
        # Of a tied weight the first of its places tells: FSDP fills them one after another.
        self.at: dict[tuple[int, str], Gathered] = {}
        for module, attribute, p in self.places:
            if (part := parts.pop(id(p), None)) is not None:
                self.at[id(module), attribute] = part
        self.told = [Told(module, self._put) for module in {id(m): m for m, _, _ in self.places}.values()]
        self.served = self.asked = set[int]()
        self.spoiled = ""  # a whole weight that a forward has written to

    def _anew(self, **options: Any) -> GatheredCopies:
        return GatheredCopies(self.groups, self.model, **options)

    def _put(self, module: nn.Module, attribute: str, p: Any) -> None:
        part = self.at.get((id(module), attribute))
        if part is None:
            return
        if p is part.member.param:
            if not part.clean and version(shards.memory_of(part.whole)) != part.seen:
                self.spoiled = part.member.name
            part.clean = True
        elif p is part.whole:
            self.asked.add(id(part.member.tensor))
            run = self.passes[part.group]
            if part.clean and run is not None:
                ops.run([part.planned()], run, self.backend)
                part.clean, part.seen = False, version(shards.memory_of(part.whole))
        elif not shards.is_part(p):  # FSDP's are parts of what was gathered, and perturbed as that was
            raise changed(part.member.name, "replaced")

    @contextlib.contextmanager
    def step(self, recorded: bool = False) -> Iterator[None]:
        for told in self.told:
            told.place()
        try:
            yield
            for told in self.told:
                if told.touched:
                    told.keep()
        except BaseException:
            self._undo()
            raise
        finally:
            for told in self.told:
                told.remove()
            self.passes, self.spoiled = [None] * len(self.groups), ""

    def see(self, shifts: Sequence[Shift]) -> None:
        self.settle()
        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, which FSDP fills again
        self.passes = [self._pass(shift, 1.0, "nearest") if shift else None for shift in shifts]
        self.expect()

    def check(self) -> None:
        super().check()
        if self.spoiled:
            raise changed(self.spoiled, "written to, where FSDP had gathered it,")

    def retag(self, mask_tag: int) -> None:
        super().retag(mask_tag)
        for part in self.at.values():
            part.entry, part.plan = part.entry.retagged(mask_tag), None
