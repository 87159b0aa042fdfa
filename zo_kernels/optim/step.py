"""A zeroth-order step: estimator x direction x update rule, as a `torch.optim.Optimizer`.

Belongs here: what a user calls, the arguments and their checks, and what an optimizer refuses while a step is under way. Does not belong here: what a method
is (method.py), the order of a step and what takes a failed one back (schedule.py), the journal's queue (record.py), a saved state (saved.py), the
papers' names for methods (methods.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from zo_kernels import _backends as backends
from zo_kernels import checks, interrupts, journal, parameters, quantized, views
from zo_kernels.optim import anchor as anchors
from zo_kernels.optim import blocks as blocking
from zo_kernels.optim import clip as clips
from zo_kernels.optim import (
    deferred,
    directions,
    estimators,
    evaluate,
    findings,
    hooks,
    lazy,
    method,
    movement,
    projection,
    record,
    refresh,
    repeat,
    rules,
    saved,
    sharded,
    unit,
)
from zo_kernels.optim.decide import Numbers
from zo_kernels.optim.decision import Decision
from zo_kernels.optim.digests import print_of
from zo_kernels.optim.evaluate import Loss
from zo_kernels.optim.groups import Accepted, check_group, check_signs, joining
from zo_kernels.optim.run import Run
from zo_kernels.optim.schedule import Outcome, Paused, Schedule


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
            needs a module. Of FSDP2's modules the copies are perturbed that they gather for a forward. "inplace": the weights really change
            and come back, three passes, each of which rounds. "auto": scratch if there is a module (one that is not torch.compile'd, nor has
            shards that no forward gathers), otherwise in place.
        lazy: in place only: restore, update and the next step's perturbation are one pass, two passes a step. **Between steps the
            weights then stand at theta + eps z.** `flush()` makes them clean, and is called by itself before a forward outside of
            a step, before the module's or the optimizer's state is saved or loaded, when the optimizer goes away and when the
            interpreter exits. What reads or assigns the parameters in another way must call it.
        scratch_bytes: size of the scratch buffer. A matrix larger than it is multiplied in parts, whose last bits may differ from those
            of one product; what is smaller gives the same bits as in place. What fits whole (adapters) costs no Python in the
            forwards. Default: 33 MiB on a GPU, 4 MiB on a CPU.
        cuda_graph: launch whole steps as CUDA graphs, where the host's launches take longer than their kernels. Needs
            ``step(closure, batches)`` with one closure object that reads the batch from its argument, and forwards that draw no
            random numbers and never wait for the device. What cannot be captured runs as without, with one warning that says why.
            A new shape of batch costs a rehearsal (two or four more forwards). Batches lie on the weights' device. Not for all methods (docs/algorithms.md).
        rounding: of the update to 16-bit weights: "nearest", "stochastic" (unbiased: updates below half a unit in the last place count
            in expectation), "auto": stochastic in scratch mode, nearest in place.
        kind: "gaussian" (the paper) or "rademacher" directions.
        clip, scale_free: |g| is clipped to this value, or as `QuantileClip` says, and then divided as `ScaleFree` says; None: not.
        anchor: `Anchor(lam, every, base)`: a pull back toward the weights that the run began with, every so many steps; None: none.
        maximize: ascend, for rewards.
        model: the module, where the first argument is not one: enables scratch mode for parameter groups.
        backend: see `perturb_`.
        journal: path of a journal that records the run (docs/journal.md), one record a step; None: none. `open_journal` takes more options.
        resume: go on with the run in `journal`, if there is one: the weights given must be those that it started from, its steps are
            replayed onto them, and `steps` tells how many there were.
        estimator: where the loss is evaluated, and g from the losses. Default: `TwoSided`. docs/algorithms.md, "Parts", lists what there is.
        rule: what is made of the g. Default: `SGD`.
        direction: what limits, scales or replaces z. Default: `Dense`.
        blocks: `Blocks`: only a part of the parameters takes part in a step; None: all.
        projection: `Projection` (DiZO); None: none.
        first_order: a torch optimizer of other parameters of the model, which get gradients by backpropagation on the same batches and are stepped
            with ours (hybrid ZO-FO). They are taken out of the model's parameters that this optimizer trains.
        process_group, parallel, timeout: processes of torch.distributed that share each step (docs/parallel.md), such as `torch.distributed.group.WORLD`:
            all make the same optimizer and the same calls, on the same batches; each evaluates its share of the points ("directions"), of the
            micro-batches ("data"), or of both, and waits `timeout` seconds for the slowest. None: this process alone.

    Attributes:
        workers: who shares the steps: `rank`, `size`, and `sent`, the bytes that this one has sent; None.
        projected_gradient: g of the last step, first group and first query, before clipping: 0-d float64 tensor on the losses' device.
        skipped: number of steps whose g, or coefficient in fp32, was not finite; such a step leaves the weights as they were.
        steps: number of steps done.

    Raises:
        TypeError, ValueError: an argument is wrong, or parts make no sense together; names it, its value and the remedy.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        checks.check_options(cls, options)
        return super().__new__(cls)

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
        clip: float | clips.QuantileClip | None = None,
        scale_free: unit.ScaleFree | None = None,
        anchor: anchors.Anchor | None = None,
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
        process_group: Any = None,
        parallel: str = "auto",
        timeout: float = 600.0,
    ) -> None:
        if resume and journal is None:
            raise ValueError("resume=True needs journal=PATH, the journal of the run to go on with")
        checks.check_choice("perturbation", perturbation, ("auto", "inplace", "scratch"), lazy="'inplace' with lazy=True")
        checks.check_choice("rounding", rounding, ("auto", *checks.ROUNDINGS))
        checks.check_choice("kind", kind, checks.KINDS)
        checks.check_word("seed", seed, 64)
        if first_order is not None and journal is not None:
            raise ValueError(_NO_RECORD)
        theirs = parameters.taken_by(first_order)
        named = parameters.read_params(model_or_params, model, weight_decay, theirs)
        scratch = views.can_serve(named.model, perturbation)
        if lazy and perturbation != "inplace":
            raise ValueError(f"lazy=True with perturbation={perturbation!r}: only passes in place can be merged; give 'inplace'")
        what = method.make(
            estimator, rule, direction, blocks, projection, clip, kind, [n for g in named.groups for n, _ in g["params"]],
            scale_free=scale_free, anchor=anchor, first_order=first_order, lazy=lazy, cuda_graph=cuda_graph, scratch=scratch,
            shared=process_group is not None,
        )  # fmt: skip
        deferred.check([p for g in named.groups for _, p in g["params"]], what, scratch, cuda_graph, first_order)
        if scratch_bytes is not None and (not isinstance(scratch_bytes, int) or scratch_bytes < 1):
            raise ValueError(f"scratch_bytes={scratch_bytes!r} must be a positive number of bytes, or None for the default")
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        groups = [{**defaults, **group} for group in named.groups]
        for number, group in enumerate(groups):
            check_group(f"params[{number}]: " if len(groups) > 1 else "", group)
        for p in (p for g in groups for _, p in g["params"] if not p.is_meta):
            backends.pick(p.device, backend)
        check_signs(groups, what, first_order)
        self._model, self._first_order, self._backend = named.model, first_order, backend
        mode = "scratch" if scratch else "lazy" if lazy else "inplace"
        self.workers = sharded.workers_of(named, what, mode, journal is not None, first_order, process_group, parallel, timeout)
        self._recording = record.Recording(mode, self.workers)
        self._rounding = rounding if rounding != "auto" else ("stochastic" if scratch else "nearest")
        self._scratch_bytes, self._graph_wanted = scratch_bytes, cuda_graph
        self._owned: set[str] = set()  # the parameters that the module had
        self._warner = findings.Warner(named.model, first_order, kind, isinstance(model_or_params, nn.Module))
        self._complete = self._made = False  # state_dict() has a place for every tensor that there will be; torch's part
        self.projected_gradient: Tensor | None = None
        self._begin(Run(what, int(seed), parameters.streams_of(named.all_names), backend))
        with interrupts.uninterrupted():  # torch imports its compiler for the first optimizer: cut short, that cannot be done again
            super().__init__(named.groups, defaults)
            # And for the first step of all, which it names, a part of its profiler, where it keeps whatever a handler raises to itself.
            with torch.autograd.profiler.record_function("zo_kernels"):
                pass
        self._made = True
        quantized.keep_what_runs(named.model)
        self._refresh()
        self._guard()
        if not scratch and perturbation == "auto" and any(p.dtype != torch.float32 for g in self.param_groups for p in g["params"]):
            warnings.warn(
                "16-bit weights without a (plain, not compiled, not tensor-parallel) module are perturbed in place, which rounds them anew at every step: the "
                "weights drift (docs/numerics.md). Give the module, or model=..., for the exact scratch mode; perturbation='inplace' silences this.",
                stacklevel=2,
            )
        if journal is not None:
            self.open_journal(journal, resume=resume)

    # -- the step --

    profile_hook_step = staticmethod(hooks.around)
    __signature__ = checks.InitSignature()

    def _begin(self, run: Run) -> None:
        """What belongs to a run, and to this object alone."""
        self._run = run
        if self.workers is not None:
            self.workers.met = False
        self._views = refresh.Views(run)
        self._schedule = Schedule(
            run, self._recording, self._warner, self._model, self._first_order, self._rounding, self._graph_wanted, self.workers
        )
        self._accepted = Accepted()
        self._busy = threading.Lock()  # a step is under way, in this thread or in another
        self._inside = False  # its view is made, and it may stand anywhere
        self._flush_at_end: weakref.finalize[..., Any] | None = None

    def _guard(self) -> None:
        if self._recording.mode == "lazy" and self._model is not None:
            lazy.guard(self, self._model)

    def view_of(self, groups: list[parameters.Weights]) -> views.View:
        """A view of these weights, for `refresh.Views`."""
        mode = self._recording.mode
        view = refresh.view_over(groups, self._model, self._run, mode, self._scratch_bytes)
        if self._flush_at_end is not None:
            self._flush_at_end.detach()
        if mode == "lazy":
            self._flush_at_end = lazy.restore_at_end(self, view)
        return view

    def found(self, view: views.View) -> None:
        """Of a new view, for `refresh.Views`: that the model still has what is trained, and the journal's table is that of the whole run."""
        sharded.found(view, self.workers)
        there = {view.names[id(p)] for _, _, p in view.places}
        if lost := sorted(self._owned & set(view.names.values()) - there):
            raise views.gone(lost)
        if self._run.method.anchor is not None:
            self._run.method.anchor.check(view.params)
        if self._recording.recorder is not None:
            record.check_recorded(self._recording.recorder, self._weights())
        self._owned |= there
        self._warner.membership = True
        self._schedule.graphs = None

    def _weights(self) -> list[parameters.Weights]:
        """The groups with the masks and scales that stay."""
        return [parameters.Weights.of_group(g, self._run.streams) for g in self.param_groups]

    def _refresh(self) -> views.View:
        return self._views.refresh(self.param_groups, self)

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[Paused]:
        """For `check`: meanwhile no step of this optimizer begins, and no copy is made.

        Raises:
            RuntimeError: a step is under way; `what` is called between two steps.
        """
        sharded.refuse(what, self.workers)
        if not self._busy.acquire(blocking=False):
            raise under_way(what)
        flushed = self._recording.flushed

        def view() -> views.View:
            found = self._refresh()
            self._inside = True
            back.extend(found.params.values() if self._recording.flushed == flushed else ())
            return found

        try:
            with self._schedule.left.untouched() as back:
                yield Paused(self._run, self._warner, view)
        finally:
            self._inside = False
            self._busy.release()

    def flush(self) -> None:
        """Bring weights that a lazy step left at theta + eps z back to theta. The next step then begins with a pass of its own."""
        if self._inside:
            return
        if self._views.now is not None:
            with interrupts.uninterrupted():
                self._recording.flushed |= self._views.now.restore()
        self._recording.drain()

    def train(self) -> None:
        """For trainers that say so to optimizers whose weights differ in training (schedule-free's): nothing is to be done."""

    def eval(self) -> None:
        """Before an evaluation: as `flush`."""
        self.flush()

    def step(self, closure: Callable[..., Loss] | None = None, batches: Sequence[Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: evaluates the model and returns the loss: a tensor with one element, or anything float() takes (accuracy, F1, a reward): it is never
                differentiated. Called twice, both times from the same random state (dropout masks agree); after the step the random state is as after
                one call. Keep the loss in float32: in 16 bits it is quantised more coarsely than the difference that the step needs.
            batches: gradient accumulation: the closure is called with each of these micro-batches, and the losses are averaged.

        Returns:
            The mean of the losses at theta + eps z and theta - eps z, a 0-d float32 tensor on the loss's device.

        Raises:
            Whatever the closure raises: weights, random state and module are then as before the step (in place: to within the rounding of the passes).
            TypeError: it returns no loss. RuntimeError: it changes weights or steps this optimizer, or the module lost a parameter; see docs/faults.md.
        """
        if closure is None and saved.asked_for(self.param_groups):
            self._complete = True
            return torch.full((), math.nan)
        # An interrupt comes through in the closure, or when the step is done or undone: record, weights, module, modes and tag always agree.
        # What a step makes is used by the next one, in whatever mode that is.
        with interrupts.uninterrupted(), views.as_in_training():
            if not self._busy.acquire(blocking=False):
                raise under_way("step()")
            try:
                view, found = self._step(closure, batches)
            finally:
                self._inside = False
                self._busy.release()
            self.projected_gradient = found.gradient
            if note := view.news():
                warnings.warn(note, findings.ZOWarning, stacklevel=3)
            for words in self._warner.look(self.param_groups, view):
                warnings.warn(words, findings.ZOWarning, stacklevel=3)
        return found.loss.float()

    def _step(self, closure: Any, batches: Sequence[Any] | None) -> tuple[views.View, Outcome]:
        run = self._run
        try:
            evaluate.check_call(closure, batches)
            if run.tag + run.method.terms > 1 << 32:
                raise RuntimeError("the run's 2^32 directions are used up: start a new run with another seed")
            numbers = self._accepted.of(self.param_groups, run.method, self._first_order)
            self._schedule.begin(self.param_groups, numbers, batches)
            view = self._refresh()
        except BaseException as error:
            if self.workers is not None:
                self.workers.failed("the beginning of a step", error)
            raise
        if self.workers is not None and not self.workers.met:
            self.workers.meet(self._common())
        self._inside, tag, ahead = True, run.tag, view.begin()

        def attempt() -> Decision:
            planned = self._recording.planned(tag, Numbers.of(self.param_groups, still=True), self._rounding)
            coefs = [[0.0] * run.method.terms] * len(view.groups)
            return replace(planned, coefs=coefs, failed="plus" if view.seen == 1 else "minus")

        try:
            return view, self._schedule.step(view, self.param_groups, numbers, closure, batches)
        except BaseException:
            run.direction.undo()
            self._recording.failed(view, run.tag != tag, ahead, attempt)
            raise

    # -- where a run is --

    @property
    def skipped(self) -> int:
        return int(self._run.skipped)

    @property
    def steps(self) -> int:
        return self._run.steps

    def movement(self) -> float:
        """How far the last step moved a weight: the root mean square, over the weights that took part, of their way along the step's directions, without
        decay and projection. It is what a learning rate is best chosen by (docs/learning.md).

        From the step's numbers, sqrt(sum c_i^2) of their coefficients times what z measures, exact in expectation over z, and no weight is read. `Momentum`
        and LOZO-M read their state, which of sharded weights all processes ask for; of `Adam` it is about the rate that its averages leave: what |g| of one
        size would come to. 0.0 of a skipped step, NaN before the first step and after `load_state_dict`. On a GPU the host waits for the step's numbers.
        """
        groups = self._views.now.groups if self._views.now is not None else []
        return movement.movement(self._run, groups, self.workers)

    def tags_of(self, step: int) -> list[int]:
        """The tags of the directions of the run's step number `step` (0: the first): z_i of a parameter is
        ``zk.normal(shape, seed=seed, stream=optimizer.stream_of(name), tag=tags[i])``."""
        return self._run.tags_of(step)

    def stream_of(self, name: str) -> int:
        """The stream of a parameter's noise in this run, by its name with or without the prefixes of wrappers: `zk.stream_of(name)`, but where
        two names of the model have one hash.

        Raises:
            ValueError: the model had no such parameter.
        """
        return self._run.stream_of(name)

    def block(self) -> tuple[str, ...] | None:
        """The names of the parameters that the next step may perturb and change, of a run with `blocks`; None: without, all take part."""
        if (blocks := self._run.method.blocks) is None:
            return None
        parts = blocks.split([name for _, name, _ in refresh.active(self.param_groups)])
        return tuple(parts[blocks.at(self.steps, len(parts), self._run.seed)])

    def forwards(self, step: int | None = None) -> int:
        """What a step costs in forwards for each micro-batch, candidates and projections included. One that carries tangents counts as two, a backward
        pass as two. `step`: its number in the run (0: the first); None: the next one."""
        hybrid = 3 if self._first_order is not None else 0
        return self._run.method.forwards(self.steps if step is None else step) + hybrid

    def method(self) -> dict[str, Any] | None:
        """What the numbers of a record mean, for a journal's header: JSON; None where they are the coefficients of an update along directions
        that stay, as in plain MeZO: such records replay without an optimizer."""
        return self._run.method.described(self._recording.mode == "scratch", self._run.rule.together)

    def _common(self) -> dict[str, Any]:
        """What workers who share the steps must begin with."""
        kept = print_of(saved.pack(self._run, self.param_groups, self.state, complete=False)["state"])
        return {**self._start().common(), "scratch_bytes": self._scratch_bytes, "what the method keeps": kept}

    def _start(self) -> record.Start:
        return record.start_of(self._run, self.param_groups, self._weights(), self._model, self._recording.mode, self._rounding)

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
    ) -> journal.Journal | None:
        """Record every step from now on. The journal's base are the weights as they are now; nothing but steps may change them.

        Args:
            path: of the file, which must not exist; its folder must. Factors of `InputSubspace` are written beside it.
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
        if self._recording.opened:
            raise RuntimeError(f"the steps are recorded already, in {self._recording.path or path}: one run has one journal")
        self.flush()
        view, run = self._refresh(), self._run
        if self._first_order is not None:
            raise RuntimeError(_NO_RECORD)

        def go_on(past: journal.Journal) -> None:
            repeat.resume(run, past, view, self._refresh, lambda: refresh.trained(self.param_groups))
            if len(past.steps):
                self.projected_gradient = torch.tensor(float(past.steps["gradient"][-1]), dtype=torch.float64, device="cpu")

        recorder, past = record.open_(
            path, self._start(), resume=resume, replace=replace, fsync_every=fsync_every, hyperparameters=hyperparameters, notes=notes,
            go_on=go_on, workers=self.workers,
        )  # fmt: skip
        self._recording.begin(recorder, self)
        return past

    def close_journal(self) -> None:
        """Write what is queued, make it durable, release the lock; later steps are not recorded."""
        self._recording.close()

    def reopen_journal(self) -> None:
        """Go on after a record could not be written (a full disk) and the cause was mended. The step that failed was not done."""
        if self._recording.recorder is not None:
            self._recording.recorder.reopen()

    # -- a run that goes on --

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on besides the weights, in torch's form: tensors of a parameter in "state", the groups, and the seed, the next
        tag, the streams and what the method remembers in the first group (`saved`). Tensors are copies."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self.flush()
        state = saved.pack(self._run, self.param_groups, self.state, self._complete)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def state_bytes(self) -> int:
        """Bytes that the method keeps between steps besides the weights, as they are now: moments, diagonals, masks, scales, factors, anchors, the
        tensors of a `first_order` optimizer. Tensors in one piece of memory count once. Nothing is counted that only a step needs (the scratch
        buffer), and a state that no step has needed yet is not there."""
        return saved.memory(self._run, self._first_order)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly: the next step's noise is that of the run that was saved. Parameters are found by their names, in whatever order and wrapper
        they were saved. States of earlier versions load where what they hold is what this optimizer's method keeps.

        Raises:
            TypeError, ValueError: not a state of this class, or one of another method, of other parameters, or with a part lost or damaged; says what
            differs. RuntimeError: a journal is open, and the state is not of where its run is. Nothing was changed.
        """
        self._refuse_inside("load_state_dict()")
        given: Any = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else changed
        loaded = saved.read(self._run, self.param_groups, given)
        if self._recording.recorder is not None and not saved.same(self._run, loaded.run):
            raise RuntimeError(
                "load_state_dict() of an optimizer with a journal, and the state is not of where the run is: load first, then open_journal(); or resume "
                "the journal"
            )
        check_signs(loaded.groups, self._run.method, self._first_order)
        saved.tell(self._run, self.param_groups, loaded)
        self.flush()
        with interrupts.uninterrupted():
            self.param_groups, self.state = loaded.groups, defaultdict(dict, loaded.state)
            self._graph_wanted = self._schedule.graphs_wanted
            self._begin(loaded.run)
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
        group, streams = joining(param_group, self.param_groups, self.defaults, self._model, self._run, self._backend)
        self.flush()
        super().add_param_group(group if group["params"] else {**group, "param_names": []})
        self._run.streams = streams

    # -- copies --

    def _refuse_inside(self, what: str) -> None:
        if self._busy.locked():
            raise under_way(what)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: everything but hooks and what the next step makes anew. No lazy one is flushed: a module copied beside it stands alike."""
        self._refuse_inside("a copy")
        state = {k: v for k, v in self.__dict__.items() if k not in _MADE_ANEW and not k.startswith("_optimizer_")}
        state["_at"] = self._views.now.standing() if self._views.now is not None else []
        state["_journal"], state["_graph_wanted"] = self._recording.path, self._schedule.graphs_wanted
        state["workers"] = None  # a copy steps alone
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
        self._begin(self._run)
        view = self._refresh()
        if len(at) == len(view.standing()):
            view.stand(at)
        self._guard()

    def __copy__(self) -> ZOStep:
        raise TypeError("a shallow copy would step the same weights with the same noise: give copy.deepcopy((model, optimizer))")


_NO_RECORD = "journal with first_order: gradients by backpropagation are no record of scalars; save checkpoints of both optimizers"
_MADE_ANEW = {"_views", "_schedule", "_accepted", "_flush_at_end", "_busy", "_inside", "step", "_zero_grad_profile_name"}


def under_way(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} of an optimizer whose step is under way, by its closure or in another thread: call it between two steps"
    )
