"""theta + c z of weights that are away: a scratch view whose blocks come when a forward asks for them, and whose updates wait until they come.

Belongs here: what of a scratch step is different where not all weights are there. Does not belong here: how a block comes (away.py), what stands before the
modules' parameters (shadow.py, fronts.py).

Since a scratch step leaves clean weights alone, a forward that fails, at whatever block, has nothing to put back, and a block that is written back is clean.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_kernels import ops, parameters
from zo_kernels.interrupts import uninterrupted
from zo_kernels.plan import Pass, Plan
from zo_kernels.views.away import Block, Missed, place_of
from zo_kernels.views.buffer import Buffer
from zo_kernels.views.queued import sequence
from zo_kernels.views.reads import Reads, walk
from zo_kernels.views.scratch import Scratch
from zo_kernels.views.shadow import QUIET, PerturbedWeight
from zo_kernels.views.work import Shift, Terms, Work


class OneCall(Buffer):
    """What the next calls will ask for may not be there yet: each call's weights are written when it comes."""

    def begin(self) -> None:
        self.asked, self.live = None, {}


class Visiting(Scratch):
    """Some of the trained weights are away, all in blocks of one model; the others are resident, and their updates do not wait."""

    defers = True
    holds_values = False
    buffers = OneCall

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        places = {id(p): place for p in self.trained if (place := place_of(p)) is not None}
        self.away = next(iter(places.values()))[0]
        self.away.check()
        self.blocks: dict[int, Block] = {i: block for i, (_, block) in places.items()}  # by the parameter's id
        # The others' memory is another block's from one moment to the next. `Away` sees who reads and who writes to them.
        self.counted = [p for p in self.counted if id(p) not in self.blocks]
        self.counts = {id(p): k for k, p in enumerate(self.counted)}
        entries = [e for plan in self.plans() for e in plan.entries]
        for own in (*(e.src for e in entries), *(e.dst for e in entries), *(s.clean for s in self.shadows.values())):
            self.away.reads.trust(own)
        self.reads = Reads(self.counted, QUIET, self._read, self._written, self._elsewhere)
        self.buffer.asked = None

    # -- forwards --

    @contextlib.contextmanager
    def step(self, recorded: bool = False) -> Iterator[None]:
        self.watched_mode = self.model.training  # a look at memory (held.Watch) would take one block for another
        self.away.refuses = self._refuse
        try:
            with super().step(recorded):
                yield
        finally:
            self.away.refuses = lambda p: None

    def _refuse(self, p: Tensor) -> None:
        if id(p) in self.blocks and not self.forward.inside and not self.bare:
            raise RuntimeError(
                f"parameter {self.names[id(p)]} of an offloaded model is read past its module's attribute, where it is not perturbed: read it as "
                "module.weight inside the forward, or keep its module out of zk.offload's blocks"
            )

    def _bring(self, found: Sequence[PerturbedWeight], others: Iterable[Any] = ()) -> None:
        mine = [self.blocks[id(s.param)] for s in found if id(s.param) in self.blocks]
        self.away.need([*mine, *self.away.reads.blocks_of(others)])

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Sequence[PerturbedWeight]) -> Any:
        with self._reading(found):
            self._bring(found, walk((args, kwargs)))  # all that it reads: nothing comes in their place while it runs
            return super().call(func, args, kwargs, found)

    def kept(self, found: Sequence[PerturbedWeight]) -> list[Tensor]:
        with self._reading(found):
            self._bring(found)
            return super().kept(found)

    def _reading(self, found: Sequence[PerturbedWeight]) -> contextlib.AbstractContextManager[Any]:
        return self.away.reading(self.names[id(found[0].param)])

    def retag(self, mask_tag: int) -> None:
        self.away.wait()
        super().retag(mask_tag)

    # -- the clean weights --

    def execute(self, works: Iterable[Work], *, from_clean: bool = False, ahead: Sequence[Shift] | None = None) -> None:
        with self._untouched(), uninterrupted():
            torch.clear_autocast_cache()
            made = []
            for work in works:
                work.do(Part(self, None, self.backend))
                made.append(work)
            self.away.later(Missed(self, made, self.mask_tag))

    def snapshot(self, from_clean: bool) -> Callable[[], None]:
        raise RuntimeError("an offloaded model has no second copy of its weights to go back to")

    def advance(self, block: Block, steps: Sequence[Missed]) -> None:
        """What these steps of the view do to a block that is there."""
        part = Part(self, block, self.backend)
        for tag, own in itertools.groupby(steps, key=lambda step: step.mask_tag):
            mine = list(own)
            for k in range(len(self.groups)):
                if tag is not None:
                    for plan in part.update_plans(k, None):
                        plan.retag(tag)
                waiting: list[Pass] = []
                for work in (work for step in mine for work in step.works if work.group == k):
                    if isinstance(work, Terms) and work.names is None:
                        if (p := self._pass(work.terms, work.decay, work.rounding)) is not None:
                            waiting.append(p)
                        continue
                    sequence(part.update_plans(k, None), waiting, self.backend)
                    waiting.clear()
                    work.do(part)
                sequence(part.update_plans(k, None), waiting, self.backend)


@dataclass
class Part:
    """A view's weights of one block (`work.Worker`); None: those that are resident."""

    view: Visiting
    block: Block | None
    backend: str | None

    def update_plans(self, group: int, names: Collection[str] | None) -> list[Plan]:
        params = self.view.groups[group].params
        plans = self.view.update_plans(group, names)
        return [plan for plan in plans if plan.entries and parameters.block_of(params[plan.members[0]]) is self.block]

    def run(self, work: Terms, update: bool) -> None:
        plans = self.update_plans(work.group, work.names)
        if plans and (p := self.view._pass(work.terms, work.decay, work.rounding)) is not None:
            ops.run(plans, p, self.backend)
