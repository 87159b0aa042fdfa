"""A zeroth-order step: estimator x direction x update rule, as a `torch.optim.Optimizer`.

Belongs here: the step and its life: when the model is evaluated, what is committed together, resuming, copies, journals. Does not belong here:
what is evaluated (estimators.py), along what (directions.py, blocks.py), what is made of it (rules.py), the papers' names for combinations of
them (methods.py), how a model sees theta ± eps z (views/), the pass over the weights (ops.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_kernels import _backends as backends
from zo_kernels import _replay as replays
from zo_kernels import checks, interrupts, parameters, views
from zo_kernels import journal as journals
from zo_kernels.optim import blocks as blocking
from zo_kernels.optim import directions, estimators, findings, generators, graph, parts, projection, record, rules, saved
from zo_kernels.plan import written
from zo_kernels.views import tangents

Loss = Tensor | float


class Numbers(NamedTuple):
    """One parameter group's numbers in one step: floats, or 0-d float64 tensors where a graph reads them from device memory. eps and decay
    are fp32 numbers, as a journal records them, whatever holds them."""

    lr: float | Tensor
    eps: float | Tensor
    decay: float | Tensor  # 1 - lr weight_decay


class ZOStep(torch.optim.Optimizer):
    """A zeroth-order optimizer put together from parts. ``step(closure)`` is a whole training step.

    An estimator evaluates the model at points around theta and finds projected gradients g_i along directions z_i; a rule turns them into an
    update. With the defaults it is MeZO: L at theta ± eps z, g their difference over 2 eps, theta <- (1 - lr wd) theta - lr g z. z is
    regenerated from (seed, parameter name, tag): nothing of the size of the weights is ever stored, unless a rule keeps a state.

    `zo_kernels.optim.methods` has a thin constructor for each method of the literature. docs/algorithms.md says what each costs.

    Args:
        model_or_params: a module, `model.named_parameters()`, a list of tensors, or parameter groups of either (own ``lr``,
            ``eps``, ``weight_decay``, and ``mask`` and ``scale``: one value for the group or a dict by parameter name, as in
            `perturb_`). Frozen parameters of a module are left alone.
        lr: learning rate, >= 0; any torch LR scheduler may drive it.
        eps: perturbation scale, > 0. With groups of different eps, g is (L+ - L-) / (2 eps) with the group's own eps.
        seed: 0 .. 2^64 - 1; the run's noise is a function of it.
        weight_decay: decoupled; a module's biases and normalization layers (by class) get their own group without it.
        perturbation: "scratch": the forwards see theta ± eps z through a buffer and the weights change in the update alone, exactly;
            needs a module. "inplace": the weights really change and come back, three passes, each of which rounds. "auto": scratch
            if there is a module (one that is not torch.compile'd), otherwise in place.
        lazy: in place only: restore, update and the next step's perturbation are one pass, two passes a step. **Between steps the
            weights then stand at theta + eps z.** `flush()` makes them clean, and is called by itself before a forward outside of
            a step, before the module's or the optimizer's state is saved or loaded, when the optimizer goes away and when the
            interpreter exits. What reads or assigns the parameters in another way must call it.
        scratch_bytes: size of the scratch buffer. A matrix larger than it is multiplied in parts, whose last bits may differ from those
            of one product; what is smaller gives the same bits as in place. Adapters or a small model that fit whole cost no Python
            in the forwards. Default: 32 MiB on a GPU, 4 MiB on a CPU.
        cuda_graph: launch whole steps as CUDA graphs, where the host's launches take longer than their kernels. Needs
            ``step(closure, batches)`` with one closure object that reads the batch from its argument, and forwards that draw no
            random numbers and never wait for the device. What cannot be captured runs as without, with one warning that says why.
            A new shape of batch costs a rehearsal (two or four more forwards; in place: a step without a graph).
        rounding: of the update to 16-bit weights: "nearest", "stochastic" (unbiased: updates below half a unit in the last place count
            in expectation), "auto": stochastic in scratch mode, nearest in place.
        kind: "gaussian" (the paper) or "rademacher" directions.
        clip: |g| is clipped to this value, or as `QuantileClip` says; None: not.
        maximize: ascend, for rewards.
        model: the module, where the first argument is not one: enables scratch mode for parameter groups.
        backend: see `perturb_`.
        journal: path of a journal that records the run (docs/journal.md), one record a step; None: none. `open_journal` takes more options.
        resume: go on with the run in `journal`, if there is one: the weights given must be those that it started from, its steps are
            replayed onto them, and `steps` tells how many there were.
        estimator: `TwoSided`, `OneSided`, `ThreePoint` or `ForwardGradient`. Default: TwoSided().
        rule: `SGD`, `Sign`, `Conservative`, `Momentum`, `Adam` or `HessianDiagonal`. Default: SGD().
        direction: `Dense`, `RandomSparse`, `MagnitudeSparse`, `LayerScale`, `LowRank` or `InverseRoot`. Default: Dense().
        blocks: `Blocks`: only a part of the parameters takes part in a step; None: all.
        projection: `Projection` (DiZO); None: none.
        first_order: a torch optimizer of other parameters of the model, which get gradients by backpropagation on the same batches and are stepped
            with ours (hybrid ZO-FO). They are taken out of the model's parameters that this optimizer trains.

    Attributes:
        projected_gradient: g of the last step, first group and first query, before clipping: 0-d float64 tensor on the losses' device.
        skipped: number of steps whose g, or coefficient in fp32, was not finite; such a step leaves the weights as they were.
        steps: number of steps done.

    Raises:
        TypeError, ValueError: an argument is wrong, or parts make no sense together; names it, its value and the remedy.
    """

    _kept: rules.Kept
    _held: directions.Held

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        seed: int = 0,
        weight_decay: float = 0.0,
        perturbation: str = "auto",
        lazy: bool = False,
        scratch_bytes: int | None = None,
        cuda_graph: bool = False,
        rounding: str = "auto",
        kind: str = "gaussian",
        clip: float | rules.QuantileClip | None = None,
        maximize: bool = False,
        model: nn.Module | None = None,
        backend: str | None = None,
        journal: str | os.PathLike[str] | None = None,
        resume: bool = False,
        estimator: estimators.Estimator | None = None,
        rule: rules.Rule | None = None,
        direction: directions.Direction | None = None,
        blocks: blocking.Blocks | None = None,
        projection: projection.Projection | None = None,
        first_order: torch.optim.Optimizer | None = None,
    ) -> None:
        estimator, rule, direction = estimator or estimators.TwoSided(), rule or rules.SGD(), direction or directions.Dense()
        if resume and journal is None:
            raise ValueError("resume=True needs journal=PATH, the journal of the run to go on with")
        checks.check_choice("perturbation", perturbation, ("auto", "inplace", "scratch"))
        checks.check_choice("rounding", rounding, ("auto", *checks.ROUNDINGS))
        checks.check_choice("kind", kind, checks.KINDS)
        checks.check_word("seed", seed, 64)
        if clip is not None and not isinstance(clip, rules.QuantileClip) and not checks.check_fp32("clip", clip) > 0:
            raise ValueError(f"clip={clip!r} must be positive, a QuantileClip, or None for no clipping")
        if first_order is not None and journal is not None:
            raise ValueError(
                "journal with first_order: gradients by backpropagation are no record of scalars; save checkpoints of both optimizers"
            )
        theirs = {id(p) for g in first_order.param_groups for p in g["params"]} if first_order is not None else set()
        named = parameters.read_params(model_or_params, model, weight_decay, theirs)
        if perturbation == "scratch" and named.model is None:
            raise ValueError(
                "perturbation='scratch' needs the module whose forwards it serves: give the module as the first argument, or model=...; "
                "or take perturbation='inplace'"
            )
        compiled = named.model is not None and views.compiled(named.model)
        if perturbation == "scratch" and compiled:
            raise ValueError(
                "perturbation='scratch' cannot serve a torch.compile'd module: give the plain module, or take 'inplace'"
            )
        scratch = named.model is not None and perturbation != "inplace" and not compiled
        if lazy and perturbation != "inplace":
            raise ValueError(
                f"lazy=True with perturbation={perturbation!r}: only passes in place can be merged with the next step's; give 'inplace'"
            )
        parts.check(estimator, rule, direction, blocks, projection, first_order, clip, kind, lazy, cuda_graph, scratch or None)
        if lazy and cuda_graph:
            raise ValueError("lazy=True and cuda_graph=True: a lazy step depends on the one before it; choose one")
        if scratch_bytes is not None and (not isinstance(scratch_bytes, int) or scratch_bytes < 1):
            raise ValueError(f"scratch_bytes={scratch_bytes!r} must be a positive number of bytes, or None for the default")
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        for number, group in enumerate(named.groups):
            _check_group(f"params[{number}]: " if len(named.groups) > 1 else "", {**defaults, **group})
        for _, p in (pair for g in named.groups for pair in g["params"]):
            if not p.is_meta:
                backends.pick(p.device, backend)
        self._estimator, self._rule, self._direction, self._blocks = estimator, rule, direction, blocks
        trained = [name for g in named.groups for name, _ in g["params"]]
        self._projection = projection.of(int(seed), trained, backend) if projection is not None else None
        self._first_order = first_order
        self._first_loss: Tensor | float = 0.0  # the sum of those that were differentiated
        self._points = estimator.points()
        self._own = rule.size(
            estimator.directions
        )  # numbers of the rule in a record; behind them come the projection's and the direction's
        self._terms = self._own + (self._projection.size if self._projection is not None else 0) + direction.size
        self._kept, self._held = rule.of(), direction.of(int(seed), kind, backend)
        self._past: deque[rules.Number] = deque(maxlen=clip.window if isinstance(clip, rules.QuantileClip) else 1)  # |g|, fp32
        self._views: dict[int | None, views.View] = {}
        self._members: list[list[str]] = []  # the blocks' parameters
        self._model, self._backend, self._kind, self._seed = named.model, backend, kind, int(seed)
        self._scratch, self._clip = scratch, clip
        self._lazy, self._scratch_bytes = lazy, scratch_bytes
        self._graphs: graph.Graphs | None = None
        self._graph_wanted = cuda_graph
        self._flush_at_exit: weakref.finalize[..., Any] | None = None
        self._busy = threading.Lock()  # a step is under way, in this thread or in another
        self._inside = False  # its view is made, and it may stand anywhere
        self._rounding = rounding if rounding != "auto" else ("stochastic" if scratch else "nearest")
        self._tag = self._first_tag = 0  # of the next step's first direction, and of the run's
        self._skipped: Tensor | int = 0
        self.projected_gradient: Tensor | None = None
        self._whole = isinstance(model_or_params, nn.Module)  # every parameter of the model was ours to take
        self._warner = findings.Warner()
        self._streams = parameters.streams_of(named.all_names)
        self._view: views.View | None = None
        self._owned: set[str] = set()  # the parameters that the module had
        self._recorder: record.Recorder | None = None
        self._recorder_closes: weakref.finalize[..., Any] | None = None
        self._flushed = False  # since the last record
        self._summary: record.Summary | None = None  # of the step under way
        self._made = False
        self._complete = False  # state_dict() has a place for every tensor that there will be
        self._check_signs([{**defaults, **group} for group in named.groups])
        with interrupts.uninterrupted():  # torch imports its compiler for the first optimizer: cut short, that cannot be done again
            super().__init__(named.groups, defaults)
            # And for the first step of all, which it names, a part of its profiler, where it keeps whatever a handler raises to itself.
            with torch.autograd.profiler.record_function("zo_kernels"):
                pass
        self._made = True
        self._refresh()
        if lazy and named.model is not None:
            self._guard(named.model)
        if not scratch and perturbation == "auto" and any(p.dtype != torch.float32 for g in self.param_groups for p in g["params"]):
            warnings.warn(
                "16-bit weights without a (plain, not compiled) module are perturbed in place, which rounds them anew at every step: the weights drift "
                "(docs/numerics.md). Give the module, or model=..., for the exact scratch mode; perturbation='inplace' silences this.",
                stacklevel=2,
            )
        if journal is not None:
            self.open_journal(journal, resume=resume)

    # -- the step --

    @torch.inference_mode(False)
    def _refresh(self) -> views.View:
        """The view of the next step's weights, made anew if a parameter was frozen, unfrozen, added, replaced, moved or converted."""
        block = self._blocks.at(self.steps, len(self._members), self._seed) if self._blocks and self._members else None
        view = self._views.get(block)
        if isinstance(self._view, views.Scratch) and view is not self._view:
            self._view.release()  # another block's: one buffer is enough
        if view is not None and self._current(view, block) and not view.moved():
            self._view = view
            return view
        self.flush()  # of the weights as they were
        if view is not None:
            self._views.clear()
        if self._blocks is not None:
            self._members = self._blocks.split([n for _, n, _ in self._active()])
            block = self._blocks.at(self.steps, len(self._members), self._seed)
        among = self._among(block)
        self._held.expect([(n, p, self._streams[n]) for _, n, p in self._active() if among is None or n in among])
        groups = [
            parameters.Weights.of_group(g, self._streams, among, self._limits, self._direction.update_differs)
            for g in self.param_groups
        ]
        checks.check_overlap(
            [(f"parameter {n}", p) for w in groups for n, p in zip(w.names, w.params, strict=True)],
            "a step updates each weight once",
        )
        parameters.check_apart(groups, [(n, p) for _, n, p in self._active()])
        options: dict[str, Any] = {"seed": self._seed, "kind": self._kind, "backend": self._backend}
        if isinstance(self._estimator, estimators.ForwardGradient):
            assert self._model is not None
            view = tangents.Tangents(groups, self._model, self._scratch_bytes, **options)
        elif self._scratch and self._model is not None:
            view = views.Scratch(groups, self._model, self._scratch_bytes, **options)
        else:
            view = views.InPlace(groups, self._model, self._lazy, **options)
            if self._flush_at_exit is not None:
                self._flush_at_exit.detach()
            if self._lazy:
                self._flush_at_exit = weakref.finalize(self, _restore, view, os.getpid())
        view.mask_tag = self._held.mask_tag
        there = {view.names[id(p)] for _, _, p in view.places}
        if lost := sorted(self._owned & set(view.names.values()) - there):
            raise RuntimeError(
                f"{len(lost)} parameters are no longer in the model ({', '.join(lost[:3])}): they were replaced (untied, "
                "load_state_dict(assign=True), a conversion), and the optimizer would train what no forward reads. Make a new optimizer "
                "of the model; load_state_dict(old.state_dict()) goes on with the run"
            )
        if self._recorder is not None:
            self._check_recorded()
        self._owned |= there
        self._warner.membership = True
        self._view = self._views[block] = view
        self._graphs = None
        return view

    def _current(self, view: views.View, block: int | None) -> bool:
        among = self._among(block)
        return len(view.groups) == len(self.param_groups) and all(
            w.current(g, among) for w, g in zip(view.groups, self.param_groups, strict=True)
        )

    def _among(self, block: int | None) -> set[str] | None:
        return None if block is None else set(self._members[block])

    def _limits(self, name: str, p: Tensor) -> directions.Limits:
        return self._held.limits(name, p, self._streams[name])

    def _prepare(self, view: views.View) -> None:
        """Masks, scales and factors of the next step, from the clean weights."""
        self._held.prepare(self.steps, self._tag, view.params)
        if view.mask_tag != self._held.mask_tag:
            assert self._held.mask_tag is not None
            view.retag(self._held.mask_tag)

    # -- weights that stand ahead of their values --

    def flush(self) -> None:
        """Bring weights that a lazy step left at theta + eps z back to theta. The next step then begins with a pass of its own."""
        if isinstance(self._view, views.InPlace) and not self._inside:
            with interrupts.uninterrupted():
                ahead = any(self._view.at)
                self._view.restore()
                self._flushed |= ahead
        if self._recorder is not None and not self._inside:
            self._recorder.drain(wait=True)

    def _guard(self, model: nn.Module) -> None:
        """Flush before anybody else reads the weights through the module."""
        flush = _Flush(self)
        handles: list[Any] = []
        for name, module in model.named_modules():
            # Who calls an inner module, or `model.forward` by its name, passes the model's own hook by. Guarding the rest of the modules would cost
            # each forward of a step, and they read what these have.
            if module is model or any(p.requires_grad for p in module.parameters(recurse=False)):
                try:
                    handles.append(module.register_forward_pre_hook(flush))
                except RuntimeError as error:
                    _remove(handles)
                    raise ValueError(
                        f"lazy=True with the scripted module {name or type(model).__name__!r}: it takes no hook, so that a forward between two steps would "
                        "read theta + eps z; leave lazy out, or give the module before torch.jit.script"
                    ) from error
            handles += [module.register_state_dict_pre_hook(flush), module.register_load_state_dict_pre_hook(flush)]
        weakref.finalize(self, _remove, handles)

    def step(self, closure: Callable[..., Loss] | None = None, batches: Sequence[Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: evaluates the model and returns the loss: a tensor with one element, or anything float() takes (accuracy, F1, a
                reward): it is never differentiated. Called twice, both times from the same random state (dropout masks agree);
                after the step the random state is as after one call. Keep the loss in float32: in 16 bits it is quantised more
                coarsely than the difference that the step needs.
            batches: gradient accumulation: the closure is called with each of these micro-batches, and the losses are averaged.

        Returns:
            The mean of the losses at theta + eps z and theta - eps z, a 0-d float32 tensor on the loss's device.

        Raises:
            Whatever the closure raises: the weights, the random state and the module are then as before the step (in place: to
            within the rounding of the passes). TypeError if the closure returns no loss. RuntimeError if it changes the weights, or steps
            this optimizer, or if the module lost a parameter since it was given; docs/faults.md has every case.
        """
        if closure is None and self._is_dummy():
            self._complete = True
            return torch.full((), math.nan)
        _check_call(closure, batches)
        assert closure is not None
        # An interrupt comes through in the closure, or when the step is done or undone: record, weights, module, modes and tag always agree.
        # What a step makes is used by the next one, in whatever mode that is.
        with interrupts.uninterrupted(), torch.inference_mode(False), torch.no_grad(), views.attention_as_in_training():
            if not self._busy.acquire(blocking=False):
                raise _inside("step()")
            try:
                loss = self._step(closure, batches)
            finally:
                self._inside = False
                self._busy.release()
            if isinstance(self._view, views.Scratch) and (note := self._view.news()):
                warnings.warn(note, findings.ZOWarning, stacklevel=3)
            assert self._view is not None
            for words in self._warner.look(self, self._view):
                warnings.warn(words, findings.ZOWarning, stacklevel=3)
        return loss.float()

    def _step(self, closure: Callable[..., Loss], batches: Sequence[Any] | None) -> Tensor:
        if self._tag + self._terms > 1 << 32:
            raise RuntimeError("the run's 2^32 directions are used up: start a new run with another seed")
        for number, group in enumerate(self.param_groups):
            _check_group(f"param_groups[{number}]: ", group)
        self._check_signs(self.param_groups)
        view = self._refresh()
        if self._recorder is not None:
            self._recorder.check()
        self._inside, tag, ahead = True, self._tag, False
        if isinstance(view, views.InPlace):
            view.seen, ahead = 0, any(view.at)
        try:
            self._prepare(view)
            loss = self._graphed(view, closure, batches) if self._graph_wanted else None
            if loss is None:
                loss = self._eager(view, closure, batches)
        except BaseException:
            self._held.undo()
            self._record_failure(view, tag, ahead)
            raise
        return loss

    def _is_dummy(self) -> bool:
        """torch.distributed.checkpoint makes an optimizer's state by a step without a closure, with lr = 0 and gradients of zero."""
        trained = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        return all(float(g.get("lr", 1)) == 0 for g in self.param_groups) and all(
            p.grad is not None and not p.grad.any() for p in trained
        )

    def _check_signs(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Whether groups may go in opposite directions: not where one choice is made for all of them.

        Raises:
            ValueError: they do, and may not.
        """
        signs = {bool(g["maximize"]) for g in groups}
        one = next((part for part in (self._projection, self._first_order) if part is not None), None)
        if len(signs) > 1 and (one is not None or isinstance(self._rule, rules.Conservative)):
            raise ValueError(
                "maximize differs between groups, and a projection, a first_order optimizer or the rule Conservative() goes one way for all: "
                "give all groups the same"
            )
        theirs = {bool(g.get("maximize")) for g in self._first_order.param_groups} if self._first_order is not None else signs
        if theirs != signs:
            raise ValueError(
                f"maximize={sorted(signs)} and a first_order optimizer that does the opposite: give both the same maximize"
            )

    def _numbers(self) -> list[Numbers]:
        return [
            Numbers(float(g["lr"]), _fp32(float(g["eps"])), _fp32(1 - float(g["lr"]) * float(g["weight_decay"])))
            for g in self.param_groups
        ]

    def _eager(
        self, view: views.View, closure: Callable[..., Loss], batches: Sequence[Any] | None, rehearsal: bool = False
    ) -> Tensor:
        """The step, operation by operation. A rehearsal has lr = 0 and leaves the random state, too, as it was."""
        rng = generators.Generators(plan.device for w in view.groups for plan in w.plans)
        before = rng.get()
        after: list[Any] = []

        def between() -> None:
            if not after:
                after[:] = rng.get()
            rng.set(before)

        def evaluate() -> Tensor:
            return self._evaluate(closure, batches)

        numbers = [n._replace(lr=0.0, decay=1.0) if rehearsal else n for n in self._numbers()]
        inner: list[float] = []
        fresh: list[str] = []
        try:
            if self._first_order is not None:
                self._backpropagate(closure, batches)
                between()
            if self._projection is not None:
                fresh = self._projection.hold(self._trained())
                inner = [0.0] * self._projection.size  # until the end of the step
            if self._direction.size:
                eps, masks = float(numbers[0].eps), {m.name: m.mask for w in view.groups for m in w.members}
                tag = self._tag + self._own + len(inner)
                inner += self._held.learn(self.steps, tag, self._trained(), masks, eps, evaluate, between)
            loss = self._evaluate_and_update(view, closure, batches, self._tag, numbers, between, inner, commit=not rehearsal)
        except BaseException:
            if self._projection is not None:
                self._projection.drop(fresh)
            if self._first_order is not None:
                self._first_order.zero_grad()
            rng.set(before)
            raise
        rng.set(before if rehearsal else after or rng.get())
        if self._graph_wanted and not rng.same(before, after):
            self._refuse_graph("the forwards draw random numbers (dropout? call model.eval())")
        return loss

    def _rehearse(self, view: views.Scratch, closure: Callable[..., Loss], batches: Sequence[Any]) -> None:
        """What must have run once before it can be captured, without a trace in the weights: the same kernels may not give the same
        bits in a graph and outside (models choose others), so that every step of a run is a graph's."""
        skipped = self._skipped.clone() if isinstance(self._skipped, Tensor) else self._skipped
        for _ in range(1 if view.watched_mode is not None else 2):  # the first step of all finds out how the forwards go
            self._eager(view, closure, batches, rehearsal=True)
        if isinstance(self._skipped, Tensor) and isinstance(skipped, Tensor):
            self._skipped.copy_(skipped)  # graphs count here
        else:
            self._skipped = skipped

    def _graphed(self, view: views.View, closure: Callable[..., Loss], batches: Sequence[Any] | None) -> Tensor | None:
        """The step as a graph, captured if need be; None if it has to run eagerly."""
        try:
            if batches is None:
                raise graph.Refused("it needs step(closure, batches): a graph must know which memory holds the batch")
            if self._graphs is None:
                devices = {plan.device for w in view.groups for plan in w.plans}
                if len(devices) != 1:
                    raise graph.Refused(f"the weights lie on {len(devices)} devices")
                self._graphs = graph.Graphs(devices.pop(), len(self.param_groups), len(Numbers._fields))
            graphs = self._graphs
            training = self._model.training if self._model is not None else None
            decays = tuple(g["weight_decay"] != 0 for g in self.param_groups)
            signs = tuple(g["maximize"] for g in self.param_groups)  # constants of the captured kernels
            key = graph.key_of(closure, batches, training, (*decays, *signs), len(self.param_groups))
            if not graphs.known(key):
                if not isinstance(view, views.Scratch):
                    return None  # in place a rehearsal would round the weights
                self._rehearse(view, closure, batches)
                if not self._graph_wanted:
                    return None
            values = self._numbers()
            graphs.inputs.set(self._tag, values)
            if key.value not in graphs.captured:
                inputs = graphs.inputs
                numbers = [
                    Numbers(row[0], row[1], row[2] if decay else 1.0) for row, decay in zip(inputs.numbers, decays, strict=True)
                ]
                self._skipped = torch.as_tensor(self._skipped, device=inputs.tag.device)

                def whole(static: list[Any]) -> tuple[Tensor, ...]:
                    loss = self._evaluate_and_update(view, closure, static, inputs.tag, numbers, commit=False)
                    assert self.projected_gradient is not None and self._summary is not None
                    return loss, self.projected_gradient, *([self._summary.queued()] if self._recorder is not None else [])

                graphs.capture(key, batches, whole, view.memory)
            loss, self.projected_gradient, *summary = graphs.replay(key, batches)
            self._warner.note([loss], self.projected_gradient, None)
            written([plan for w in view.groups for plan in w.plans])
            if self._recorder is not None:
                self._recorder.put(self._entry(values), summary[0])
            self._tag += self._terms
            return loss
        except graph.Refused as refused:
            self._refuse_graph(str(refused))
            return None

    def _refuse_graph(self, reason: str) -> None:
        self._graph_wanted, self._graphs = False, None
        warnings.warn(f"cuda_graph=True: {reason}; the steps run without graphs", stacklevel=5)

    def _evaluate_and_update(
        self,
        view: views.View,
        closure: Callable[..., Loss],
        batches: Sequence[Any] | None,
        tag: views.Tag,
        numbers: Sequence[Numbers],
        between: Callable[[], None] = lambda: None,
        inner: Sequence[float] = (),
        *,
        commit: bool,
    ) -> Tensor:
        """The forwards and the update; the loss, 0-d float64. `between` is called after each forward. `inner`: the numbers of the record that
        are the projection's and the direction's. `commit`: the step counts."""
        tags = self._tags(tag)
        losses: list[Tensor] = []
        dual = isinstance(view, tangents.Tangents)

        def at(shifts: list[views.Shift]) -> Tensor:
            view.see(shifts)
            loss = self._evaluate(closure, batches, dual)
            view.check()
            between()
            return loss

        self._warner.begin(self)
        with view.step(recorded=isinstance(tag, Tensor)):
            for point in self._points:
                losses.append(at([[(tags[i], factor * n.eps) for i, factor in point] for n in numbers]))
            if self._first_order is not None:  # a loss at theta that is no number spoils both halves
                losses[0] = losses[0] + torch.as_tensor(0 * self._first_loss, device=losses[0].device)
            decided = self._decide(tags, numbers, losses, inner)
            if not isinstance(tag, Tensor):
                assert self._summary is not None
                self._warner.note(losses, self._summary.gradient, self._summary.finite)
            if isinstance(self._rule, rules.Conservative) and decided[0].go is not False:
                decided = self._choose(decided, at)
            ahead = [view.ahead(tag, [n.eps for n in numbers])] if isinstance(view, views.InPlace) else []
            for weights in view.groups:
                self._rule.reserve(self._kept, weights)
            projects = self._projection is not None and self._projection.due(self.steps) and bool(decided[0].go)
            back = self._before(view) if projects else None
            queued = self._record(numbers) if commit and not projects else None
            try:
                self._apply(view, decided, *ahead)
            except BaseException:
                if commit and self._recorder is not None:
                    self._recorder.broken = "a step failed in its update, after its record was written"
                raise
            assert self._summary is not None
            if self._first_order is not None:
                if bool(decided[0].go):  # on a device the host waits; a backward pass has kept it busy
                    self._first_order.step()
                self._first_order.zero_grad()
            if queued is not None and self._recorder is not None:
                self._recorder.put(*queued)
            if commit and back is None:
                self._commit()
        if back is not None:
            try:
                self._project(view, closure, batches, between)
                self._record(numbers)
            except BaseException:
                back()
                raise
            self._commit()
        return self._estimator.loss(losses)

    def _commit(self) -> None:
        """The step is done, and counts."""
        assert self._summary is not None
        if self._direction.size:
            self._held.learned(self.steps, self._summary.coefs[0][-self._direction.size :], self._trained())
        self._tag += self._terms
        if isinstance(self._clip, rules.QuantileClip):
            self._past.append(_fp32_of(abs(self._summary.gradient)))

    def _project(
        self, view: views.View, closure: Callable[..., Loss], batches: Sequence[Any] | None, between: Callable[[], None]
    ) -> None:
        """The projection that ends a step, on its batch, behind the update; its numbers join those of the step's record."""
        assert self._projection is not None and self._summary is not None

        def guarded(forward: Callable[[], Any]) -> Any:
            view.expect()
            try:
                result = forward()
                views.View.check(view)  # of the module's own attributes: nothing stands before them any more
            except BaseException:
                view._undo()
                raise
            between()
            return result

        refusal = (
            "a projection learned by backpropagation needs a closure that returns a differentiable loss tensor, which depends on a projected layer: "
            "no no_grad() or item() in it; or take learn='forward'"
        )
        trained, own, size = self._trained(), self._own, self._projection.size
        ours = {id(p) for p in trained.values()}
        strangers = [
            p for p in (self._model.parameters() if self._model is not None else ()) if p.requires_grad and id(p) not in ours
        ]
        try:
            for p in strangers:  # no gradients for what another optimizer trains
                p.requires_grad_(False)
            numbers = self._projection.learn(
                self._tag + own,
                trained,
                self._streams,
                lambda: guarded(lambda: self._evaluate(closure, batches)),
                lambda: guarded(lambda: interrupts.outside(self._backward, closure, batches, refusal)),
                -1.0 if self.param_groups[0]["maximize"] else 1.0,
            )
        finally:
            for p in strangers:
                p.requires_grad_(True)
        first, *others = self._summary.coefs
        self._summary = self._summary._replace(coefs=[[*first[:own], *numbers, *first[own + size :]], *others])

    def _before(self, view: views.View) -> Callable[[], None]:
        """What takes an update, and what follows it, back: to weights and state as they stand now, which are copied to host memory."""
        # A rule's pass begins at clean weights, too, and leaves other factors of low-rank directions behind: no way back from a perturbation.
        merged = isinstance(view, views.InPlace) and not self._rule.stateful
        with contextlib.nullcontext() if merged else view.clean():
            at = list(view.at) if isinstance(view, views.InPlace) else []
            weights = [(p, p.detach().to("cpu", copy=True)) for w in view.groups for p in w.params]
            rule = self._kept.state()
            direction = self._held.state() if isinstance(self._direction, directions.InverseRoot) else None  # the rule's, in truth

        def back() -> None:
            with interrupts.uninterrupted(), torch.no_grad():
                for p, values in weights:
                    p.copy_(values)
                self._kept.load(rule)
                if direction is not None:
                    self._held.load(direction)
                if isinstance(view, views.InPlace):
                    view.at = at
                    view.restore()

        return back

    def _evaluate(self, closure: Callable[..., Loss], batches: Sequence[Any] | None, dual: bool = False) -> Tensor:
        """The mean loss, 0-d float64; `dual`: [2], with its tangent."""
        as_loss = self._warner.hearing(tangents.as_loss if dual else _as_loss)
        try:
            with self._warner.reads:
                if batches is None:
                    return as_loss(interrupts.outside(closure))
                return torch.stack([as_loss(interrupts.outside(closure, batch)) for batch in batches]).mean(0)
        except RuntimeError as error:
            if not _in_backward(error):
                raise
            raise RuntimeError(
                f"the closure calls backward(), and a step needs no gradients ({str(error).splitlines()[0]}): nothing was updated. Leave it out; "
                "for parameters that are trained by backpropagation there is first_order"
            ) from error

    def _tags(self, tag: views.Tag) -> list[views.Tag]:
        """Of a step's directions."""
        return [tag + i if i else tag for i in range(self._estimator.directions)]

    def tags_of(self, step: int) -> list[int]:
        """The tags of the directions of the run's step number `step` (0: the first): z_i of a parameter is
        ``zk.normal(shape, seed=seed, stream=optimizer.stream_of(name), tag=tags[i])``."""
        return [int(t) for t in self._tags(self._first_tag + step * self._terms)]

    def stream_of(self, name: str) -> int:
        """The stream of a parameter's noise in this run, by its name with or without the prefixes of wrappers: `zk.stream_of(name)`, but where
        two names of the model have one hash.

        Raises:
            ValueError: the model had no such parameter.
        """
        if name in self._streams:
            return self._streams[name]
        bare = parameters.canonical_name(name)
        for known, stream in self._streams.items():
            if parameters.canonical_name(known) == bare:
                return stream
        raise ValueError(
            f"name={name!r}: this optimizer knows no such parameter; it knows {', '.join(sorted(self._streams)[:3])}, ..."
        )

    def _decide(
        self, tags: Sequence[views.Tag], numbers: Sequence[Numbers], losses: Sequence[Tensor], inner: Sequence[float]
    ) -> list[rules.Applied]:
        """The step's numbers for each group, from float64 losses. On the CPU they are numbers; elsewhere they stay tensors, so that the host
        does not wait for the device."""
        if inner:
            losses = [loss.cpu() for loss in losses]  # the host has waited for the projection's losses
        device, recorded = losses[0].device, isinstance(tags[0], Tensor)
        if recorded and device != tags[0].device:  # type: ignore[union-attr]
            raise graph.Refused(f"the closure returns a loss on {device}: return the tensor that the device computed")
        on_host = (_on_host(device) or bool(inner)) and not recorded
        signs = [1.0 if g["maximize"] else -1.0 for g in self.param_groups]
        raw: list[list[Any]] = [self._estimator.gradients(losses, n.eps) for n in numbers]
        self.projected_gradient = raw[0][0]
        loss: Any = self._estimator.loss(losses)
        if on_host:
            raw, loss = [[float(g) for g in gs] for gs in raw], float(loss)
        gs, clipped = self._clipped(raw, on_host)
        curvatures: list[Any] = [None] * len(numbers)
        if isinstance(self._estimator, estimators.ThreePoint):
            curvatures = [self._estimator.curvature(losses, n.eps) for n in numbers]
            curvatures = [float(c) for c in curvatures] if on_host else curvatures
        # The numbers as they are recorded, of fp32: what is formed of them later is formed from those.
        coefs: list[list[Any]] = [
            [_fp32_of(c) for c in self._rule.decide([sign * g for g in group], n.lr, curvature)]
            for sign, group, n, curvature in zip(signs, gs, numbers, curvatures, strict=True)
        ]
        decays: list[views.Coefficient] = [n.decay for n in numbers]
        finite: Any
        if on_host:
            finite = all(math.isfinite(x) for group in (*raw, *coefs) for x in group)
            if not finite:
                self._skipped = self._skipped + 1
                coefs, decays = [[0.0] * len(group) for group in coefs], [1.0] * len(decays)
        else:
            coefs = [[rules.on_device(c, device) for c in group] for group in coefs]
            finite = torch.stack([x for group in (*raw, *coefs) for x in group]).isfinite().all()
            if isinstance(self._skipped, Tensor):
                self._skipped += ~finite  # in place: a graph counts here too
            else:
                self._skipped = self._skipped + (~finite).long()
            coefs = [[torch.where(finite, c, 0.0) for c in group] for group in coefs]
            decays = [
                d if isinstance(d, float) and d == 1.0
                else torch.where(finite, d if isinstance(d, Tensor) else torch.full((), d, dtype=torch.float64, device=device), 1.0)
                for d in decays
            ]  # fmt: skip
        first = list(inner) if finite is not False else [0.0] * len(inner)
        recorded_coefs = [[*group, *(first if k == 0 else [0.0] * len(first))] for k, group in enumerate(coefs)]
        self._summary = record.Summary(loss, raw[0][0], finite, clipped, recorded_coefs)
        return [
            rules.Applied(k, tags, group, d, self._rounding, finite) for k, (group, d) in enumerate(zip(coefs, decays, strict=True))
        ]

    def _clipped(self, raw: list[list[Any]], on_host: bool) -> tuple[list[list[Any]], Any]:
        limit = self._clip.limit(list(self._past)) if isinstance(self._clip, rules.QuantileClip) else self._clip
        if limit is None:
            return raw, False if on_host else torch.zeros_like(raw[0][0], dtype=torch.bool)
        if on_host:
            top = float(limit)
            return [[min(max(g, -top), top) for g in gs] for gs in raw], any(abs(g) > top for gs in raw for g in gs)
        return (
            [[g.clamp(-limit, limit) for g in gs] for gs in raw],
            torch.stack([g.abs() > limit for gs in raw for g in gs]).any(),
        )

    def _choose(self, decided: list[rules.Applied], at: Callable[[list[views.Shift]], Tensor]) -> list[rules.Applied]:
        """Evaluate a conservative rule's candidates and keep the best."""
        rule = self._rule
        assert isinstance(rule, rules.Conservative) and self._summary is not None
        tried = [a.coefs[1] for a in decided]
        trials = zip(*(rule.trials(a.tags[0], u) for a, u in zip(decided, tried, strict=True)), strict=True)
        sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
        chosen = rule.choose([sign * at(list(shifts)) for shifts in trials], tried)
        coefs = [[c, u] for c, u in zip(chosen, tried, strict=True)]
        self._summary = self._summary._replace(coefs=coefs)
        return [replace(a, coefs=c) for a, c in zip(decided, coefs, strict=True)]

    def _apply(self, view: views.View, decided: Sequence[rules.Applied], *ahead: Any) -> None:
        """Weights and state as a function of the step's numbers: the one place where a live step and a replayed one change them."""
        rule, kept = self._rule, self._kept
        before = kept.cohorts
        try:
            if rule.stateful:
                options = {"seed": self._seed, "kind": self._kind, "backend": self._backend, "held": self._held}
                with view.clean():
                    for a in decided:
                        rule.run(kept, a, view.groups[a.group], options)
                return
            updates = [
                [(names, views.Update(terms, a.decay, a.rounding)) for names, terms in rule.terms(kept, a, view.groups[a.group])]
                for a in decided
            ]
            if all(len(parts) == 1 for parts in updates):
                view.update([parts[0][1] for parts in updates], *ahead)
            else:
                view.update_parts(updates)
        except BaseException:
            kept.cohorts = before
            raise

    def _active(self) -> list[tuple[int, str, Tensor]]:
        """(group, name, parameter) of all that are not frozen. A group whose list was edited is refused where its weights are made."""
        return [
            (k, n, p)
            for k, g in enumerate(self.param_groups)
            for n, p in zip(g["param_names"], g["params"], strict=False)
            if p.requires_grad
        ]

    def _trained(self) -> dict[str, Tensor]:
        return {n: p for _, n, p in self._active()}

    def _backpropagate(self, closure: Callable[..., Loss], batches: Sequence[Any] | None) -> None:
        """Gradients of the first-order optimizer's parameters at theta; no graph is kept for ours."""
        assert self._first_order is not None
        ours = list(self._trained().values())
        self._first_order.zero_grad()
        try:
            for p in ours:
                p.requires_grad_(False)
            self._first_loss = interrupts.outside(
                self._backward,
                closure,
                batches,
                "first_order needs a closure that returns a differentiable loss tensor, and parameters with requires_grad in its optimizer",
            )
        finally:
            for p in ours:
                p.requires_grad_(True)

    def _backward(self, closure: Callable[..., Loss], batches: Sequence[Any] | None, refusal: str) -> Tensor | float:
        """Backpropagation of the mean loss; the sum of the losses. `refusal`: of a loss without a graph."""
        total: Tensor | float = 0.0
        with torch.enable_grad():
            for batch in [None] if batches is None else batches:
                loss = closure() if batches is None else closure(batch)
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise TypeError(refusal)
                (loss / (1 if batches is None else len(batches))).backward()
                total = total + loss.detach().double()
        return total

    @property
    def skipped(self) -> int:
        return int(self._skipped)

    @property
    def steps(self) -> int:
        return (self._tag - self._first_tag) // self._terms

    # -- the journal --

    def open_journal(
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        replace: bool = False,
        fsync_every: int = 100,
        hyperparameters: Mapping[str, Any] | None = None,
        notes: Any = "",
    ) -> journals.Journal | None:
        """Record every step from now on. The journal's base are the weights as they are now; nothing but steps may change them.

        Args:
            path: of the file, which must not exist; its folder must.
            resume: go on with the run in it, if it exists: it is recovered, its steps are replayed onto the weights, which must be those
                that it started from, and the next step is the run's next.
            replace, fsync_every: see `journal.create`.
            hyperparameters, notes: any JSON, for people.

        Returns:
            What was there, if it was resumed.

        Raises:
            ValueError: the journal is of another run or base model; neither was changed. Otherwise what `journal.create` and
            `journal.reopen` raise.
        """
        self._refuse_inside("open_journal()")
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"journal={path!r} must be a path")
        if self._recorder is not None:
            raise RuntimeError(f"the steps are recorded already, in {self._recorder.writer.path}: one run has one journal")
        self.flush()
        view = self._refresh()
        mine: dict[str, Any] = {
            "seed": self._seed,
            "kind": self._kind,
            "perturbation": "scratch" if self._scratch else "lazy" if self._lazy else "inplace",
        }
        if self._first_order is not None:
            raise RuntimeError(
                "a journal with first_order: gradients by backpropagation are no record of scalars; save checkpoints of both optimizers"
            )
        groups = [parameters.Weights.of_group(g, self._streams) for g in self.param_groups]  # with the masks and scales that stay
        mine |= {"terms": self._terms, "method": self.method()}
        trained = [(n, p) for w in groups for n, p in zip(w.names, w.params, strict=True)]
        ids = {id(p) for _, p in trained}
        frozen = [(n, p) for n, p in (self._model.named_parameters() if self._model is not None else ()) if id(p) not in ids]
        past = writer = None
        if resume and os.path.lexists(path):
            if self._tag:
                raise RuntimeError(
                    f"resume=True after {self._tag} steps: only an optimizer that has not stepped can resume a journal"
                )
            try:
                writer, past = journals.reopen(path, fsync_every=fsync_every, after_steps=True)
            except journals.UnbegunError:
                replace = True
        if writer is not None and past is not None:
            try:
                parts.of_header(past.header)  # what this version cannot go on with is named as such
                record.check_header(past.header, mine, groups)
                buffers = self._model.named_buffers(remove_duplicate=False) if self._model is not None else None
                journals.verify_base(past.header, [*trained, *frozen], buffers)
                if different := record.differences(past, self._about(), self._rounding):
                    warnings.warn(
                        f"the run in {os.fspath(path)!s} goes on with other numbers than it began with: {'; '.join(different)}. What it has done stays as it "
                        "was; make the optimizer with the recorded numbers to go on with the same run",
                        findings.ZOWarning,
                        stacklevel=2,
                    )
                self._replay(view, past)
            except BaseException:
                writer.close()
                raise
        else:
            if self.steps and mine["method"] is not None:
                raise RuntimeError(
                    f"open_journal() after {self.steps} steps: what this method's records mean depends on the number of a step and on the steps before "
                    "it; open the journal before the first step"
                )
            header = journals.Header(
                parameters=record.table(groups),
                groups=len(groups),
                frozen=tuple(journals.Frozen.of(n, p) for n, p in frozen),
                buffers=tuple(
                    journals.Frozen.of(n, b)
                    for n, b in (parameters.persistent_buffers(self._model) if self._model is not None else ())
                ),
                hyperparameters={**self._about(), **(hyperparameters or {})},
                notes=notes,
                **mine,
            )
            writer = journals.create(path, header, fsync_every=fsync_every, replace=replace)
        with interrupts.uninterrupted():
            self._recorder, self._graphs = record.Recorder(writer), None  # graphs must hand over their numbers
            self._recorder_closes = weakref.finalize(self, self._recorder.close)
        return past

    def _about(self) -> dict[str, Any]:
        """The numbers of a header that no record depends on; lr before any scheduler."""
        signs = [g["maximize"] for g in self.param_groups]
        return {
            "lr": [float(g.get("initial_lr", g["lr"])) for g in self.param_groups],
            "weight_decay": [float(g["weight_decay"]) for g in self.param_groups],
            "eps": [float(g["eps"]) for g in self.param_groups],
            "clip": None if isinstance(self._clip, rules.QuantileClip) else self._clip,  # that one is in the method
            "maximize": signs[0] if len(set(signs)) == 1 else signs,
        }

    def close_journal(self) -> None:
        """Write what is queued, make it durable, release the lock; later steps are not recorded."""
        with interrupts.uninterrupted():
            recorder, self._recorder = self._recorder, None
            if recorder is not None and self._recorder_closes is not None:
                self._recorder_closes.detach()
                recorder.close()

    def reopen_journal(self) -> None:
        """Go on after a record could not be written (a full disk) and the cause was mended. The step that failed was not done."""
        if self._recorder is not None:
            self._recorder.reopen()

    def _configured(self) -> dict[str, Any]:
        """The parts whose options say what the numbers of a record, or of a state, mean."""
        return {
            "estimator": self._estimator,
            "rule": self._rule,
            "direction": self._direction,
            "blocks": self._blocks,
            "projection": self._projection.config if self._projection else None,
        }

    def method(self) -> dict[str, Any] | None:
        """What the numbers of a record mean, for a journal's header: JSON; None where they are the coefficients of an update along directions
        that stay, as in plain MeZO: such records replay without an optimizer."""
        if parts.plain(self._rule, self._direction, self._blocks, self._projection, self._clip) and (
            isinstance(self._view, views.Scratch) or self._estimator == estimators.TwoSided()
        ):
            return None
        mine = {**self._configured(), "clip": self._clip if isinstance(self._clip, rules.QuantileClip) else None}
        described = {what: record.described(part) for what, part in mine.items() if part is not None}
        if self._blocks is not None and self._rule.counts and not self._kept.together:
            described["rule"]["counts"] = parts.COUNTS
        return described

    def _replay(self, view: views.View, past: journals.Journal) -> None:
        if past.header.method is None:
            replayer = replays.Replayer(view.groups, past.header, self._backend)
            replayer.records(past.records)
            if isinstance(view, views.InPlace):
                view.at = list(replayer.at)
        else:
            self.apply_records(past.header, past.records)
        self._tag = past.next_tag
        self._first_tag = past.next_tag - len(past.steps) * self._terms
        self._skipped = int(past.flag("skipped").sum())
        if len(past.steps):
            self.projected_gradient = torch.tensor(float(past.steps["gradient"][-1]), dtype=torch.float64)

    @torch.no_grad()
    def apply_records(self, header: journals.Header, recorded: Any) -> None:
        """The steps of a journal with this method again: every pass and every state, without a forward."""
        for tag, flags, decays, epses, coefs in replays.rows(header, recorded):
            if not self.steps:
                self._first_tag = tag
            self._tag = tag
            view, tags = self._refresh(), self._tags(tag)
            go = not flags & journals.FLAGS["skipped"]
            rounding = "stochastic" if flags & journals.FLAGS["stochastic"] else "nearest"
            self._prepare(view)
            own, learned = self._own, coefs[0][self._terms - self._direction.size :]
            if self._projection is not None:
                self._projection.hold(self._trained())
                inner = coefs[0][own : own + self._projection.size]
            coefs = [group[:own] for group in coefs]
            decided = [
                rules.Applied(k, tags, group, d, rounding, go) for k, (group, d) in enumerate(zip(coefs, decays, strict=True))
            ]
            if epses is not None and isinstance(view, views.InPlace):
                view.expect()
                shifts = [[[(tags[i], factor * e) for i, factor in point] for e in epses] for point in self._points]
                if isinstance(self._rule, rules.Conservative) and go:
                    rule = self._rule
                    shifts += [list(t) for t in zip(*(rule.trials(tag, c[1]) for c in coefs), strict=True)]
                for shift in shifts:
                    view.see(shift)
            self._apply(view, decided)
            if self._projection is not None and self._projection.due(self.steps) and go:
                self._projection.repeat(tag + own, self._trained(), self._streams, inner)
            if self._direction.size:
                self._held.learned(self.steps, learned, self._trained())
            self._tag = tag + self._terms
            self._skipped = int(self._skipped) + (not go)
        if isinstance(self._clip, rules.QuantileClip):
            self._past.extend(abs(float(g)) for g in recorded["gradient"])

    def _entry(self, numbers: Sequence[Numbers]) -> dict[str, Any]:
        """What the host knows of the step's record."""
        entry = {
            "tag": self._tag,
            "decay": [n.decay for n in numbers],
            "stochastic": self._rounding == "stochastic",
            "flushed": self._flushed,
        }
        self._flushed = False
        return entry if self._scratch else {**entry, "eps": [n.eps for n in numbers]}

    def _record(self, numbers: Sequence[Numbers]) -> tuple[dict[str, Any], Tensor] | None:
        """Write the step's record, or, where the host does not know its numbers, return what is to be queued behind the update."""
        if self._recorder is None or self._summary is None:
            return None
        s, flushed = self._summary, self._flushed
        entry = self._entry(numbers)
        if isinstance(s.finite, Tensor):
            return entry, s.queued()
        try:
            self._recorder.append(record.complete(entry, s.values()))
        except BaseException:
            self._flushed = flushed
            raise
        return None

    def _record_failure(self, view: views.View, tag: int, ahead: bool) -> None:
        """A failed step in place has rounded the weights without an update; scratch mode has nothing to tell. `ahead`: a lazy run's weights
        were, when the step began."""
        if self._recorder is None or not isinstance(view, views.InPlace):
            return
        if self._recorder.broken:
            return
        if not view.whole:
            self._recorder.broken = "a pass over the weights was cut short"
        elif self._recorder.writer.header.method is not None and view.seen:
            self._recorder.broken = "a step failed, and its passes in place rounded the weights"
        elif view.seen and self._tag == tag:
            entry = self._entry([n._replace(decay=1.0) for n in self._numbers()])
            entry |= {"coefs": [[0.0] * self._terms] * len(view.groups), "failed": "plus" if view.seen == 1 else "minus"}
            self._recorder.put(entry)
        else:  # the step was done, or not begun; the weights may have been restored from ahead
            self._flushed |= self._lazy and (ahead or self._tag != tag) and not any(view.at)

    def _check_recorded(self) -> None:
        """The journal's table of parameters is that of the whole run."""
        assert self._recorder is not None
        recorded = {(p.name, p.group) for p in self._recorder.writer.header.parameters}
        now = {(n, k) for k, n, _ in self._active()}
        if recorded != now:
            raise RuntimeError(
                f"parameter {min(recorded ^ now)[0]!r} was frozen, unfrozen, added or moved to another group, and the journal "
                f"{self._recorder.writer.path} has one table for the run: close_journal(), and open_journal() another one"
            )
        groups = [parameters.Weights.of_group(g, self._streams) for g in self.param_groups]
        known = {p.name: (p.mask, p.scale) for p in self._recorder.writer.header.parameters}
        for w in groups:
            for m in w.members if w.own else ():
                if journals.described(m.name, m.tensor, m.mask, m.scale) != known[m.name]:
                    raise RuntimeError(
                        f"parameter {m.name!r} has another mask or scale than when {self._recorder.writer.path} was opened, and the journal has one for "
                        "the run: put it back, or close_journal(), and open_journal() another one"
                    )

    # -- a run that goes on --

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on besides the weights, in torch's form: tensors of a parameter in "state", the groups, and the seed, the next
        tag, the streams and what the method remembers in the first group (`saved`). Tensors are copies."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self.flush()
        state = saved.pack(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def state_bytes(self) -> int:
        """Bytes that the method keeps between steps besides the weights, as they are now: moments, diagonals, masks, scales, factors, anchors, the
        tensors of a `first_order` optimizer. Tensors in one piece of memory count once. Nothing is counted that only a step needs (the scratch
        buffer), and a state that no step has needed yet is not there."""
        return saved.memory(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly: the next step's noise is that of the run that was saved. Parameters are found by their names, in whatever order and wrapper
        they were saved. States of earlier versions load where what they hold is what this optimizer's method keeps.

        Raises:
            TypeError, ValueError: not a state of this class, or one of another method, of other parameters, or with a part lost or damaged; says what
            differs. Nothing was changed.
        """
        self._refuse_inside("load_state_dict()")
        if self._recorder is not None:
            raise RuntimeError(
                "load_state_dict() of an optimizer with a journal: load first, then open_journal(); or resume the journal"
            )
        given: Any = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else changed
        loaded = saved.read(self, given, _check_group)
        self._check_signs(loaded.groups)
        self.flush()
        with interrupts.uninterrupted():
            self.param_groups, self.state = loaded.groups, defaultdict(dict, loaded.state)
            self._kept, self._held, self._projection = loaded.kept, loaded.held, loaded.projector
            self._past = deque(loaded.past, maxlen=self._past.maxlen)
            self._seed, self._tag, self._first_tag, self._skipped = (
                loaded.numbers[what] for what in ("seed", "tag", "first_tag", "skipped")
            )
            self._streams = loaded.streams
            self._view, self._views = None, {}
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group's parameters need names (``(name, tensor)`` pairs), or are the module's, and no name twice.

        Raises:
            TypeError, ValueError: no step could take the group; says why. The groups are as they were.
        """
        if not self._made:  # by torch's constructor, of groups that are read and checked as a whole
            super().add_param_group(param_group if param_group["params"] else {**param_group, "param_names": []})
            return
        self._refuse_inside("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}: give a dict with the key 'params'")
        (group,) = parameters.read_params([param_group], self._model, 0.0, positions=False).groups
        _check_group("param_group: ", {**self.defaults, **group})
        there = {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=False)}
        names = [n for n, _ in group["params"]]
        if taken := [n for n in names if n in there]:
            raise ValueError(f"param_group: the name {taken[0]!r} is in use: names give parameters their noise and must be unique")
        streams = parameters.streams_of(names, self._streams)
        tensors = [p for _, p in group["params"]]
        parameters.Weights.of_group({**group, "params": tensors, "param_names": names}, streams)
        checks.check_overlap(
            [(f"parameter {n}", p) for n, p in [*there.items(), *group["params"]]], "a step updates each weight once"
        )
        for p in tensors:
            backends.pick(p.device, self._backend)
        if self._blocks is not None:
            self._blocks.split([n for _, n, _ in self._active()] + names)
        self.flush()
        super().add_param_group(group if names else {**group, "param_names": []})
        self._streams = streams

    # -- copies --

    def _refuse_inside(self, what: str) -> None:
        if self._busy.locked():
            raise _inside(what)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: everything, the module too, but hooks and what the next step makes anew. A lazy optimizer is not
        flushed: a module copied beside it stands where the original stands."""
        self._refuse_inside("a copy")
        state = {k: v for k, v in self.__dict__.items() if k not in _MADE_ANEW and not k.startswith("_optimizer_")}
        state["_at"] = self._view.at if isinstance(self._view, views.InPlace) else None
        state["_journal"] = self._recorder.writer.path if self._recorder is not None else ""
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # torch calls it from load_state_dict too, with a part of the state
        if "_at" not in state:
            return
        at = self.__dict__.pop("_at")
        if path := self.__dict__.pop("_journal"):
            warnings.warn(
                f"the copy of an optimizer with a journal ({path}) does not record: open_journal() gives it one of its own",
                stacklevel=2,
            )
        self._view = self._graphs = self._flush_at_exit = self._recorder = self._recorder_closes = None
        self._views = {}
        self._busy, self._inside = threading.Lock(), False
        view = self._refresh()
        if isinstance(view, views.InPlace) and at is not None and len(at) == len(view.at):
            view.at = at
        if self._lazy and self._model is not None:
            self._guard(self._model)

    def __copy__(self) -> ZOStep:
        raise TypeError(
            "a shallow copy would step the same weights with the same noise: copy.deepcopy((model, optimizer)) copies both"
        )


_MADE_ANEW = {
    "_view",
    "_views",
    "_graphs",
    "_flush_at_exit",
    "_recorder",
    "_recorder_closes",
    "_busy",
    "_inside",
    "step",
    "_zero_grad_profile_name",
}


def replayer(header: journals.Header, groups: Sequence[parameters.Weights], backend: str | None) -> ZOStep:
    """An optimizer that can apply the records of a journal with a method to the weights that it started from.

    Raises:
        ValueError: the method is none that this version knows.
    """
    found = parts.of_header(header)
    params = [
        {
            "params": [(m.name, m.tensor) for m in w.members],
            "mask": {m.name: m.mask for m in w.members},
            "scale": {m.name: m.scale for m in w.members},
        }
        for w in groups
    ]
    if isinstance(found.get("estimator"), estimators.ForwardGradient):
        found["estimator"] = estimators.TwoSided()  # one direction too, and nothing is evaluated
    optimizer = ZOStep(
        params, lr=0.0, eps=1.0, seed=header.seed, kind=header.kind, perturbation="inplace", backend=backend, **found
    )
    if optimizer._terms != header.terms:
        raise ValueError(
            f"the journal has {header.terms} numbers a record, its method needs {optimizer._terms}: it was not written by zo_kernels"
        )
    # The noise that the run had: in another set of names a collision may have been resolved in another way.
    optimizer._streams = {m.name: m.stream for w in groups for m in w.members}
    optimizer._held = optimizer._direction.of(header.seed, header.kind, backend)
    optimizer._kept.together = optimizer._blocks is not None and not parts.counted(header)
    optimizer._views, optimizer._view = {}, None
    return optimizer


def _inside(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} of an optimizer whose step is under way, by its closure or in another thread: call it between two steps"
    )


class _Flush:
    """A module's hook that makes a lazy optimizer's weights clean. A copy of it, in a copied or pickled module, does nothing."""

    def __init__(self, optimizer: ZOStep | None = None) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else None

    def __call__(self, *_: Any, **__: Any) -> None:
        optimizer = self.optimizer() if self.optimizer is not None else None
        if optimizer is not None:
            optimizer.flush()

    def __reduce__(self) -> Any:
        return _Flush, ()


def _in_backward(error: BaseException) -> bool:
    """Whether it came out of torch's backward pass."""
    backward = {torch.autograd.backward.__code__, torch.autograd.grad.__code__}
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code in backward:
            return True
        frame = frame.tb_next
    return False


def _restore(view: views.InPlace, process: int) -> None:
    """A fork's child leaves the weights alone: in shared memory they are its parent's."""
    if os.getpid() == process:
        view.restore()


def _on_host(device: torch.device) -> bool:
    """Whether numbers that come from losses there are known to the host without waiting."""
    return device.type == "cpu"


def _fp32(x: float) -> float:
    """x rounded to fp32; infinity beyond it."""
    return ctypes.c_float(x).value


def _fp32_of(x: Any) -> Any:
    """x, a number or a float64 tensor, rounded to fp32."""
    return x.float().double() if isinstance(x, Tensor) else _fp32(x)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _check_group(where: str, group: dict[str, Any]) -> None:
    for key in ("lr", "eps", "weight_decay", "maximize"):
        if key not in group:
            raise ValueError(f"{where}the group has no {key!r}: put it back")
    for key in ("lr", "eps", "weight_decay"):
        if isinstance(group[key], Tensor) and group[key].numel() != 1:
            raise ValueError(f"{where}{key} is a tensor of shape {tuple(group[key].shape)}: give one number")
    lr, eps, decay = (group[k].item() if isinstance(group[k], Tensor) else group[k] for k in ("lr", "eps", "weight_decay"))
    if not (isinstance(lr, (int, float)) and not isinstance(lr, bool) and 0 <= lr < math.inf):
        raise ValueError(f"{where}lr={lr!r} must be a finite number >= 0 (to ascend, use maximize=True)")
    if not (isinstance(eps, (int, float)) and not isinstance(eps, bool) and 0 < _fp32(eps) < math.inf):
        raise ValueError(f"{where}eps={eps!r} must be a finite number > 0, in fp32 too")
    if not (isinstance(decay, (int, float)) and not isinstance(decay, bool) and 0 <= decay < math.inf):
        raise ValueError(f"{where}weight_decay={decay!r} must be a finite number >= 0")
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"{where}maximize={group['maximize']!r} must be True or False")


def _check_call(closure: Any, batches: Any) -> None:
    """Refuse what no step can be made with. Micro-batches are read once for each forward, in order: nothing that is used up, nor one batch alone."""
    if not callable(closure):
        raise TypeError(f"closure={closure!r}: step needs a function that evaluates the model and returns the loss")
    if batches is None:
        return
    kind = type(batches).__name__
    if isinstance(batches, Mapping) or hasattr(batches, "_fields"):
        raise TypeError(f"batches is a {kind}, which is one batch: give a list of micro-batches, batches=[batch]")
    if isinstance(batches, (Tensor, str, bytes, bytearray)) or hasattr(batches, "__array__"):
        raise TypeError(
            f"batches is a {kind}: give a list of micro-batches, each as the closure takes it, for example batches=[batch]"
        )
    if not hasattr(batches, "__len__") or not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"batches is a {kind}, which has no length or no order, and may be used up by the first forward: give a list of micro-batches, batches=list(...)"
        )
    if not len(batches):
        raise ValueError("batches is empty: give at least one micro-batch, or None to call closure() without an argument")


def _as_loss(value: Any) -> Tensor:
    """A closure's result as a 0-d float64 tensor on its own device."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"closure returned a tensor of shape {tuple(value.shape)}: return one number, for example its mean()")
        if value.is_complex() or value.is_meta:
            raise TypeError(f"closure returned a {value.dtype} tensor on {value.device}: return a real number that has a value")
        return value.detach().reshape(()).double()
    if value is None:
        raise TypeError("closure returned None: return the loss (a missing `return`?)")
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"closure returned {type(value).__name__}: return a tensor with one element or a number") from None
