"""theta + c z through a scratch buffer: the weights themselves stay as they are.

Belongs here: a scratch step around its forwards, and what a function that receives weights is given. Does not belong here: what the buffer holds
(buffer.py, pieces.py), what stands before the modules' parameters (shadow.py, fronts.py), parameters that are read past it (held.py, reads.py).

For the time of a step every trainable parameter of a module is shadowed by a `PerturbedWeight`, a tensor without storage that stands in the
module's `__dict__`, where attribute access looks first. When a torch function receives one (`F.linear(x, self.weight, self.bias)`), the clean
weights are read, theta + c z is written into a buffer, and the function runs on the buffer. Forward hooks on modules were the alternative: they
miss a weight that a parent reads (a tied head), need one buffer per nesting level, and cost two Python calls per module instead of one per use.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import shards
from zo_kernels.parameters import Weights
from zo_kernels.plan import Plan
from zo_kernels.views.away import away_of
from zo_kernels.views.base import View, changed
from zo_kernels.views.buffer import Buffer, Forward
from zo_kernels.views.fronts import Fronts
from zo_kernels.views.held import Held, Watch, uncompiled
from zo_kernels.views.memory import default_scratch_bytes
from zo_kernels.views.pieces import Pieces
from zo_kernels.views.reads import Reads, walk
from zo_kernels.views.shadow import FRESH, QUIET, SETTERS, PerturbedWeight, swap_in
from zo_kernels.views.work import Shift, Work


class Scratch(View):
    """theta + c z in one reusable buffer a device; the weights themselves change in `execute` alone.

    `scratch_bytes`: of the buffer; None: as default_scratch_bytes says. It grows beyond that only to a single weight that is larger and
    cannot be handled in parts: one that a function other than `F.linear` or `F.embedding` takes.
    """

    mode = "scratch"
    holds_values = True  # modules may be given values, where all fit
    buffers: type[Buffer] = Buffer
    model: nn.Module

    def __init__(self, groups: Sequence[Weights], model: nn.Module, scratch_bytes: int | None = None, **options: Any) -> None:
        super().__init__(groups, model, **options)
        self.shadows: dict[int, PerturbedWeight] = {}
        for k, weights in enumerate(groups):
            for m, entry in weights.entries():
                self.shadows[id(m.tensor)] = PerturbedWeight(m.tensor, entry, k, self)
        self.limit = scratch_bytes or default_scratch_bytes(s.clean.device for s in self.shadows.values())
        sites: dict[nn.Module, list[tuple[str, PerturbedWeight]]] = {}
        for module, attribute, p in self.places:
            sites.setdefault(module, []).append((attribute, self.shadows[id(p)]))
        self.forward = Forward()
        self.buffer = self.buffers(self.limit, self.backend, self.forward)
        self.pieces = Pieces(self.buffer, self.names)
        self.fronts = Fronts(sites, self._fitting(), self.buffer)
        self.held = Held(self.names, self.backend, self.forward)
        reached = {id(p) for _, _, p in self.places}
        self.forward.held = {i: s for i, s in self.shadows.items() if i not in reached}
        self.served = None if self.forward.held else self.forward.served  # nobody sees who reads those that no module owns
        self.counts = {id(p): k for k, p in enumerate(self.counted)}  # where `versions` has a parameter's
        self.reads = Reads((s.param for s in self.shadows.values()), QUIET, self._read, self._written, self._elsewhere)
        self.thread: int | None = None  # that runs a step now
        self.recorded = False  # this step's passes are recorded and not executed
        self.bare = False  # this forward runs at theta itself
        self.away = away_of(model)
        self.watched_mode: bool | None = None  # model.training of the step that was watched

    def _anew(self, **options: Any) -> Scratch:
        return type(self)(self.groups, self.model, self.limit, **options)

    def _fitting(self) -> list[PerturbedWeight]:
        """The shadows whose values modules are given: all of them, but for tables whose rows are gathered, where these fit into the buffer's size."""
        gathered = {id(p): True for _, _, p in self.places}
        for module, attribute, p in self.places:
            gathered[id(p)] &= type(module) is nn.Embedding and attribute == "weight"
        fitting = [self.shadows[i] for i, rows in gathered.items() if not rows]
        return fitting if self.holds_values and sum(s.room for s in fitting) <= self.limit else []

    # -- a step --

    @contextlib.contextmanager
    def step(self, recorded: bool = False) -> Iterator[None]:
        # One step shows which parameters are read in ways that attributes do not show, and in which order; watching costs microseconds
        # an operation.
        watched = self.model.training is not self.watched_mode
        if watched:
            self.buffer.surprised = True  # see() starts to learn
        self.fronts.prepare()
        held = dict(self.forward.held)
        self.thread, self.recorded = threading.get_ident(), recorded
        self.expect()
        try:
            self.fronts.place()
            if watched:
                with (
                    uncompiled(),
                    Watch(self.forward, self.shadows.values(), self.fronts.shown, self._read, self._written),
                ):
                    yield
                self.watched_mode = self.model.training
            else:
                yield
            self.fronts.keep()
        except BaseException:
            self.reads.end()
            self._undo()
            self._drop_gradients()
            self.held.put_back()
            self.fronts.spoiled()
            if len(held) < len(self.forward.held):  # what the failed closure read may be what made it fail
                self.forward.held = held
                self.buffer.forget()
            raise
        finally:
            self.reads.end()
            self.fronts.remove()
            self.bare = self.forward.inside = False
            self.thread = None
            self.held.put_back()

    @property
    def together(self) -> bool:
        """Whether the forwards of a step may take turns, each seen again when its turn comes. Not those of a step that is looked at, in its own thread."""
        return self.away is not None and self.away.together and not self.recorded and self.watched_mode is self.model.training

    def see(self, shifts: Sequence[Shift]) -> None:
        self.thread = threading.get_ident()
        self.held.put_back()
        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, and the buffer's tensors are used again
        if not any(shifts):  # the weights themselves: nothing stands before them
            self.reads.end()  # of a point whose turn is over, in another thread
            self.fronts.remove()
            self.bare = self.forward.inside = True
            if self.forward.held:
                self.expect()
            return
        if self.bare:
            self.bare = self.forward.inside = False
            self.fronts.place()
        self.buffer.begin()
        self.forward.passes = [self._pass(shift, 1.0, "nearest") if shift else None for shift in shifts]
        self.fronts.write()  # from clean weights
        for shadow in self.forward.held.values():
            self.held.perturb(shadow)
        if self.forward.held:  # else nobody has written to a weight since the step began, or the last forward was checked
            self.expect()
        self.reads.begin()

    def check(self) -> None:
        self.reads.end()
        super().check()
        if self.bare:
            return
        if (self.fronts.check(self.names) or self.buffer.fills) and self._drop_gradients():
            raise RuntimeError(
                "the closure calls backward(): in scratch mode the gradients do not reach the parameters; nothing was updated. Leave it out "
                "(MeZO needs none; in Lightning: self.automatic_optimization = False), or take perturbation='inplace'"
            )

    @property
    def rehearses(self) -> int:
        return 1 if self.watched_mode is not None else 2  # the first forwards of all show how they go

    def unrecordable(self) -> str | None:
        return self.held.unrecordable()

    def _drop_gradients(self) -> bool:
        """Those of the buffer's tensors; whether there were any."""
        fills = (self.fronts.resident, *self.buffer.fills.values())
        found = [t for fill in fills if fill for t in fill.written if t.grad is not None]
        for t in found:
            t.grad = None
        return bool(found)

    # -- the clean weights --

    def execute(self, works: Iterable[Work], *, from_clean: bool = False, ahead: Sequence[Shift] | None = None) -> None:
        with self._untouched():
            super().execute(works, from_clean=from_clean, ahead=ahead)

    def snapshot(self, from_clean: bool) -> Callable[[], None]:
        with self._untouched():
            return super().snapshot(from_clean)

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """The weights are what they are between steps, and may be written to."""
        self.held.put_back()
        self.buffer.live = {}
        self.forward.inside = True
        try:
            yield
        finally:
            self.forward.inside = False

    # -- plans and memory --

    def plans(self) -> Iterator[Plan]:
        yield from super().plans()
        yield from self.buffer.plans()
        yield from self.pieces.plans()
        yield from (plan for _, plan, _ in self.fronts.resident.launches) if self.fronts.resident else ()

    def retag(self, mask_tag: int) -> None:
        super().retag(mask_tag)
        for shadow in self.shadows.values():
            shadow.entry = shadow.entry.retagged(mask_tag)
        self.buffer.live = {}

    def release(self) -> None:
        self.fronts.release()
        self.buffer.release()
        self.pieces.release()

    def memory(self) -> Any:
        tables: list[dict[Any, Any]] = [*self.buffer.tables, self.pieces.gathers]
        mine = dict(self.buffer.memory), dict(self.pieces.memory), [list(t.values()) for t in tables], self.fronts.resident
        return self.groups, *mine

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
            rows = self.pieces.embedding(*args, **kwargs)
            if rows is not None:
                return rows
        elif func is nn.functional.linear and found[0].clean.nbytes > self.limit:
            product = self.pieces.linear(*args, **kwargs)
            if product is not None:
                return product
        values = self.buffer.values(found)
        plain, named = swap_in(args, kwargs, values)
        if func in FRESH:
            return func(*plain, **named)
        if getattr(func, "__name__", "") in SETTERS:
            raise changed(self.names[id(found[0].param)], "changed")
        versions = [t._version for t in values]
        result = func(*plain, **named)
        for t, before, shadow in zip(values, versions, found, strict=True):
            if t._version != before:
                self.buffer.live = {}
                raise changed(self.names[id(shadow.param)], "written to")
        storages = self.buffer.storages
        for t in (result,) if type(result) is Tensor else walk(result):
            if isinstance(t, Tensor) and type(t) is not PerturbedWeight and t.untyped_storage().data_ptr() in storages:
                # A view of the weight outlives the call (`weight.t()`): it needs values that the next call does not overwrite.
                plain, named = swap_in(args, kwargs, self.buffer.kept(found))
                return func(*plain, **named)
        return result

    def kept(self, found: Sequence[PerturbedWeight]) -> list[Tensor]:
        """theta + c z of each weight in memory of its own, for code that torch functions do not show."""
        return self.buffer.kept(found)

    # -- parameters that shadows do not reach --

    def _read(self, p: Tensor) -> None:
        if id(p) not in self.forward.held:
            self.hold(self.shadows[id(p)])

    def _written(self, p: Tensor) -> None:
        raise changed(self.names[id(p)], "written to")

    def _elsewhere(self, p: Tensor) -> None:
        self.refuse_thread(self.shadows[id(p)])

    def hold(self, shadow: PerturbedWeight) -> None:
        """From now on this parameter is perturbed in place around each forward and put back from a copy.

        At the moment of its first read every earlier use went through the shadow, so that the forward has the same values as if it had been held
        from the start.

        Raises:
            RuntimeError: the step is being recorded; the copy would not be part of it.
        """
        key = id(shadow.param)
        if self.recorded:
            raise RuntimeError(f"parameter {self.names[key]} is read past its module's attribute, and was not in the steps before")
        self.forward.held[key] = shadow
        self.forward.serve([shadow])
        self.buffer.forget()
        if self.held.perturb(shadow) and not shadow.clean.is_inference():
            self.versions[0][self.counts[key]] = shadow.clean._version

    def news(self) -> str | None:
        return self.held.news()


def can_serve(model: nn.Module | None, perturbation: str) -> bool:
    """Whether a model's forwards see perturbed values in the place of its weights where a user asks for this perturbation: "auto", "scratch" or "inplace".

    Raises:
        ValueError: "scratch" was asked for, and cannot be; says why.
    """
    # Part of the model that runs as a graph of torch.compile has the weights built in and would not see a shadow.
    compiled = model is not None and any(
        type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules()
    )
    if perturbation == "scratch" and model is None:
        raise ValueError(
            "perturbation='scratch' needs the module whose forwards it serves: give the module as the first argument, or model=...; "
            "or take perturbation='inplace'"
        )
    if perturbation == "scratch" and compiled:
        raise ValueError("perturbation='scratch' cannot serve a torch.compile'd module: give the plain module, or take 'inplace'")
    parted = shards.parted(model)
    why = shards.ungathered(model) if model is not None and parted else ""
    if perturbation == "scratch" and why:
        raise ValueError(
            f"perturbation='scratch' serves sharded weights (DTensor) where a forward gathers them: {why}: take 'inplace', or leave it out"
        )
    return model is not None and perturbation != "inplace" and not compiled and not why
