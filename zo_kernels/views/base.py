"""What the ways to see theta + c z share: the terms, the update of clean weights, and the guard of forwards.

Belongs here: `View`, what a caller may ask of any way. Does not belong here: a way of its own (inplace.py,
scratch.py, tangents.py), which c and z (optim/), the arithmetic (ops.py).
"""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import looks, ops, shards
from zo_kernels.interrupts import uninterrupted
from zo_kernels.parameters import Weights
from zo_kernels.plan import Pass, Plan
from zo_kernels.views.work import Coefficient, Shift, Tag, Terms, Work

_NUMBERS = frozenset((int, float))


def changed(name: str, how: str) -> RuntimeError:
    return RuntimeError(
        f"parameter {name} was {how} inside a step: nothing was updated. A closure only reads the weights; change them between two steps. "
        "(In place, values that it wrote are off by the perturbation: load them again)"
    )


def gone(names: Sequence[str]) -> RuntimeError:
    return RuntimeError(
        f"{len(names)} parameters are no longer in the model ({', '.join(names[:3])}): they were replaced (untied, "
        "load_state_dict(assign=True), a conversion), and the optimizer would train what no forward reads. Make a new optimizer "
        "of the model; load_state_dict(old.state_dict()) goes on with the run"
    )


class View(abc.ABC):
    """What all ways share: the parameter groups, and the update of the clean weights.

    `see(shifts)` makes the next forward run at theta + shift, one list of (tag, c) for each group; `execute` is the step itself, after
    which the weights are clean. Around both, `step()` guards the forwards, and after each forward `check()` refuses one that changed
    the weights.
    """

    mode: str  # the journal's word: "scratch", "inplace", "lazy"; in the last two a forward leaves a trace in the weights, their rounding
    limit = 0  # bytes of the buffer
    away: Any = None  # the blocks of an offloaded model (away.Away)
    defers = False  # work waits until its weights are there

    def __init__(self, groups: Sequence[Weights], model: nn.Module | None, *, seed: int, kind: str, backend: str | None) -> None:
        self.groups, self.model, self.seed, self.kind, self.backend = groups, model, seed, kind, backend
        self.params = {m.name: m.tensor for w in groups for m in w.members}
        self.parts = [m for w in groups for m in w.members if m.whole is not None]
        self.parted = bool(self.parts) or shards.parted(model)
        self.settle()
        self.names = {id(p): m.name for w in groups for m in w.members for p in (m.tensor, m.param)}
        # Every attribute of the model that reads a trainable parameter: a tied one has several. A scripted module has its own.
        self.places: list[tuple[nn.Module, str, Tensor]] = [
            (module, attribute, p)
            for module in (model.modules() if model is not None else ())
            if isinstance(module._parameters, dict)
            for attribute, p in module._parameters.items()
            if p is not None and id(p) in self.names
        ]
        # Who holds whom: a module that was replaced (a new head) keeps its parameters, and no forward reads them.
        children = [
            (module, name, child)
            for module in (model.modules() if model is not None else ())
            if isinstance(module._modules, dict)
            for name, child in module._modules.items()
        ]
        self.parents, self.child_names, self.held_by = ([child[k] for child in children] for k in range(3))
        self.served: set[int] | None = None  # ids of the parameters that a forward has asked for; None: not known
        self._found_at(groups)
        self.counted = [p for p in self.trained if not p.is_inference()]  # whose writes torch counts
        self.modules, self.attributes, self.placed = ([place[k] for place in self.places] for k in range(3))
        self.versions: looks.Columns = ([],)
        self.mask_tag: int | None = None  # of the random masks, where it changes from step to step
        self.seen = 0  # shifts of this step that are whole in the weights themselves
        self.whole = True  # every pass over the weights that began has ended

    def _found_at(self, groups: Sequence[Weights]) -> None:
        """Parameters beside their memory as the plans have it."""
        pairs = [(m.tensor, e.src) for w in groups for m, e in w.entries()]
        self.trained, self.memories = [p for p, _ in pairs], [memory for _, memory in pairs]
        self.lie_at = looks.ADDRESSES.at(self.memories)
        self.devices = {memory.device for memory in self.memories} | {shards.forwards_on(m.param) for m in self.parts}

    def another(self) -> View:
        """A view of the same weights, which stand where they are, that has learned nothing of the forwards."""
        made = self._anew(seed=self.seed, kind=self.kind, backend=self.backend)
        made.stand(self.standing())
        if self.mask_tag is not None:
            made.mask_tag = self.mask_tag
            made.retag(self.mask_tag)
        return made

    @abc.abstractmethod
    def _anew(self, **options: Any) -> View: ...

    # -- where the weights stand between two steps --

    def standing(self) -> list[Shift]:
        """The shift of each group that is in the weights' own memory: of a lazy run the next step's first perturbation."""
        return [()] * len(self.groups)

    def stand(self, at: Sequence[Shift]) -> None:
        """The weights stand there, by whatever brought them."""
        assert not any(at), "perturbations lie outside of the weights"

    def begin(self) -> bool:
        """A step begins; whether its weights stand ahead."""
        self.seen = 0
        return any(self.standing())

    def restore(self) -> bool:
        """Back to theta, to within the rounding of a pass. Whether the weights were elsewhere."""
        return False

    def ahead(self, tag: Tag, eps: Sequence[Coefficient]) -> list[Shift] | None:
        """Where the update of the step of `tag` goes on to; None: it ends at the clean weights."""
        return None

    def snapshot(self, from_clean: bool) -> Callable[[], None]:
        """A copy of the trained weights in host memory, and what takes them back to it. `from_clean`: not from where they are perturbed."""
        copies = [(p, p.detach().to("cpu", copy=True)) for w in self.groups for p in w.params]

        def back() -> None:
            self._undo()
            for p, values in copies:
                p.copy_(values)

        return back

    # -- forwards that change weights --

    def expect(self) -> None:
        """From here on nobody but us may write to the weights."""
        self.versions = looks.VERSIONS.at(self.counted)

    def check(self) -> None:
        """After a forward that `see` was called for. Raises what `check_weights` does, and where a value that stands for a weight was changed."""
        self.check_weights()

    def settle(self) -> None:
        """What a forward has gathered of sharded weights is given back."""
        if self.parted:
            shards.settle(self.model)

    def check_weights(self) -> None:
        """After any forward, of the modules' own parameters.

        Raises:
            RuntimeError: it wrote to a weight, moved, converted or replaced one. Writes through `.data` keep no count and are not seen.
        """
        self.settle()
        for m in self.parts:
            if shards.memory_of(m.param).data_ptr() != m.tensor.data_ptr():
                raise changed(m.name, "moved or converted")
        both = len(self.counted) == len(self.trained)
        if not both or looks.WRITES.first_change(self.trained, (*self.versions, *self.lie_at)) >= 0:
            if (k := looks.VERSIONS.first_change(self.counted, self.versions)) >= 0:
                raise changed(self.names[id(self.counted[k])], "written to")
            if (k := looks.ADDRESSES.first_change(self.trained, self.lie_at)) >= 0:
                raise changed(self.names[id(self.trained[k])], "moved or converted")
        if (k := self._replaced()) >= 0:
            raise changed(self.names[id(self.placed[k])], "replaced")

    def _replaced(self) -> int:
        """The first place of the model that holds another tensor than when the view was made; -1: there is none."""
        return looks.first_replaced(self.modules, "_parameters", self.attributes, self.placed)

    def moved(self) -> bool:
        """`_replaced`, or one holds another module."""
        self.settle()
        return self._replaced() >= 0 or looks.first_replaced(self.parents, "_modules", self.child_names, self.held_by) >= 0

    def _undo(self) -> None:
        """Parameters that a failed forward replaced, moved or converted are what they were."""
        if self.parted:
            shards.recover(self.model)
        for module, attribute, p in self.places:
            if module._parameters.get(attribute) is not p:
                module._parameters[attribute] = p  # type: ignore[assignment]
        for p, memory in zip(self.trained, self.memories, strict=True):
            if p.data_ptr() != memory.data_ptr():
                p.data = memory

    @abc.abstractmethod
    def step(self, recorded: bool = False) -> contextlib.AbstractContextManager[None]:
        """Around the forwards and the update of one step. `recorded`: passes are recorded for later and not executed now."""

    @abc.abstractmethod
    def see(self, shifts: Sequence[Shift]) -> None:
        """The next forward runs at theta + shift."""

    @property
    def together(self) -> bool:
        return False

    @property
    def rehearses(self) -> int:
        """Steps without a perturbation and an update that must have run before one is recorded."""
        return 1

    def unrecordable(self) -> str | None:
        """Why no step can be recorded, as far as the forwards have shown."""
        return None

    def news(self) -> str | None:
        """What the user is to know of the forwards so far, in one line; None if nothing is new."""
        return None

    # -- memory --

    def memory(self) -> Any:
        """What passes and forwards read and write by address, besides the weights: a graph keeps it alive."""
        return self.groups

    def release(self) -> None:
        """Give back the memory that the next forward makes anew, if there is any."""
        return

    # -- the clean weights --

    def _pass(self, terms: Sequence[tuple[Tag, Coefficient]], decay: Coefficient, rounding: str) -> Pass | None:
        """The pass of these terms; None if it would change nothing. What is a tensor stays on its device: no copy to the host, no wait."""
        tags, coefs = zip(*terms, strict=True) if terms else ((), ())
        here = _NUMBERS.issuperset(map(type, (*tags, *coefs, decay)))
        device = None if here else next((x.device for x in (*tags, *coefs, decay) if isinstance(x, Tensor)), None)
        if device is None:
            if not any(coefs) and decay == 1.0:
                return None
            # Terms of 0 stay, as they do on a device: the first tag names the draw of stochastic rounding.
            factor = None if decay == 1.0 else float(decay)
            return Pass(self.seed, list(map(int, tags)), list(map(float, coefs)), factor, self.kind, rounding)
        shift = decay.float() if isinstance(decay, Tensor) else (None if decay == 1.0 else decay)
        if not tags:
            return Pass(self.seed, [], [], shift, self.kind, rounding)
        # Numbers become tensors by a fill, which unlike a copy from the host does not wait; a step's tags, one behind another, by one for all.
        if set(map(type, tags)) == {int} and list(tags) == list(range(first := int(tags[0]), first + len(tags))):
            named = torch.arange(first, first + len(tags), dtype=torch.int64, device=device)
        else:
            named = torch.stack([t if isinstance(t, Tensor) else torch.full((), t, dtype=torch.int64, device=device) for t in tags])
        values = [c if isinstance(c, Tensor) else torch.full((), c, dtype=torch.float64, device=device) for c in coefs]
        return Pass(self.seed, named, torch.stack(values).float(), shift, self.kind, rounding)

    def update_plans(self, group: int, names: Collection[str] | None) -> list[Plan]:
        """The plans of an update of a group, or of these parameters of it."""
        weights = self.groups[group]
        return weights.update_plans if names is None else [plan for plan, _ in weights.part(names)]

    def run(self, work: Terms, update: bool) -> None:
        """The pass of these terms, with the scales of an update or a perturbation; nothing to do is not done."""
        if (p := self._pass(work.terms, work.decay, work.rounding)) is not None:
            plans = self.update_plans(work.group, work.names) if update else self.groups[work.group].plans
            ops.run(plans, p, self.backend)

    def execute(self, works: Iterable[Work], *, from_clean: bool = False, ahead: Sequence[Shift] | None = None) -> None:
        """The step itself: work on the clean weights, one after another; an interrupt waits until all is done. `works` are asked for one by one, each when
        those before it are done.

        Args:
            from_clean: the weights are to be clean before the first is asked for. ahead: of a lazy view, see `ahead`.
        """
        with uninterrupted():
            torch.clear_autocast_cache()  # for who evaluates under the same autocast
            for work in works:
                work.do(self)

    # -- plans --

    def plans(self) -> Iterator[Plan]:
        """Every plan of the view's passes."""
        for weights in self.groups:
            yield from weights.plans
            if weights.update_plans is not weights.plans:
                yield from weights.update_plans
            for part in weights.parts.values():
                yield from (plan for plan, _ in part)

    def retag(self, mask_tag: int) -> None:
        """Another draw of the random masks."""
        for plan in self.plans():
            plan.retag(mask_tag)


class as_in_training:
    """Around a step: no gradient is asked for, outside of inference mode, whose tensors no later step could write to; and torch's attention modules keep off
    their fused path for evaluation, which they take where no gradient is asked for and no argument is of a tensor subclass: a step's kernels would
    depend on what stands before the weights, on the size of the buffer and on the mode, and its padding would be treated in another way than when
    training by backpropagation."""

    # How many steps are under way, in any thread, and torch's setting before the first of them.
    lock = threading.Lock()
    steps = 0
    before = True

    def __enter__(self) -> None:
        self.inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        if self.inference is not None:
            self.inference.__enter__()
        shared = as_in_training
        with shared.lock:
            if not shared.steps:
                shared.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            shared.steps += 1
        self.graded = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_grad_enabled(self.graded)
        shared = as_in_training
        with shared.lock:
            shared.steps -= 1
            if not shared.steps:
                torch.backends.mha.set_fastpath_enabled(shared.before)
        if self.inference is not None:
            self.inference.__exit__(None, None, None)
