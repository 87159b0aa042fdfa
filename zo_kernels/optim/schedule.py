"""The schedule of a live step: evaluate, decide, record, apply, project; operation by operation, or as a graph.

Belongs here: the order in which the parts of a step are called, and what takes a failed one back. Does not belong here: what each part does (evaluate.py,
decide.py, record.py, run.py, projection.py), when a step is called (step.py), how a graph is kept (graph.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_kernels import views
from zo_kernels.optim import findings, graph
from zo_kernels.optim.decide import Decided, Numbers, choose, decide
from zo_kernels.optim.decision import Decision
from zo_kernels.optim.digests import SAMPLED, print_of
from zo_kernels.optim.evaluate import Evaluation
from zo_kernels.optim.points import Point
from zo_kernels.optim.record import Recording
from zo_kernels.optim.refresh import Groups, Left, active, trained
from zo_kernels.optim.run import Run
from zo_kernels.optim.workers import Workers
from zo_kernels.plan import written


class Outcome(NamedTuple):
    """loss: what the step returns, float64 0-d. gradient: g of the first group and query, before clipping, float64 0-d."""

    loss: Tensor
    gradient: Tensor


class Paused(NamedTuple):
    """A run that takes no step for now, as `check` sees it.

    view: makes the view of the next step's weights, which nobody flushes from then on. Raises what a step would.
    """

    run: Run
    warner: findings.Warner
    view: Callable[[], views.View]


class Schedule:
    """The steps of one run.

    Args:
        first_order: steps the parameters that get gradients by backpropagation. model: whose forwards the closure runs; None: not known.
        rounding: of the updates. graphs: steps are to be launched as graphs, where they can be. workers: share the steps; None: there is this process alone.
    """

    def __init__(
        self,
        run: Run,
        recording: Recording,
        warner: findings.Warner,
        model: nn.Module | None,
        first_order: torch.optim.Optimizer | None,
        rounding: str,
        graphs: bool,
        workers: Workers | None = None,
    ) -> None:
        self.workers = workers
        self.run, self.recording, self.warner = run, recording, warner
        self.model, self.first_order, self.rounding = model, first_order, rounding
        self.graphs_wanted = graphs
        self.left = Left(model)
        self.graphs: graph.Graphs | None = None

    def begin(self, groups: Groups, numbers: Numbers, batches: Sequence[Any] | None) -> None:
        """Before anything of a step is done, the view of its weights too.

        Raises:
            RuntimeError: it could not be recorded. WorkerError: another worker's is another one.
        """
        self.recording.check()
        if self.workers is None:
            return
        names = [name for _, name, _ in active(groups)]
        common: dict[str, Any] = {"steps": self.run.steps, "tag": self.run.tag}
        common |= {name: list(getattr(numbers, name)) for name in ("lr", "eps", "decay", "signs")}
        common["what is trained"] = f"{len(names)} parameters ({print_of(' '.join(names))})"
        common["micro-batches"] = print_of(batches, SAMPLED)
        self.workers.begin(common, self.left.written(groups) if self.workers.met else "")

    def step(
        self, view: views.View, groups: Groups, numbers: Numbers, closure: Callable[..., Any], batches: Sequence[Any] | None
    ) -> Outcome:
        """One step of the weights that `view` has, which are those of torch's parameter `groups`, whose `numbers` these are.

        Raises:
            Whatever the closure raises; weights, state, generators and record are then as before (in place: to within the rounding of the passes).
        """
        self.run.prepare(view)
        found = self._graphed(view, groups, numbers, closure, batches) if self.graphs_wanted else None
        found = found or self._eager(view, groups, numbers, closure, batches)
        if self.workers is not None:
            self.left.look(groups, view)
        return found

    # -- operation by operation --

    def _eager(
        self, view: views.View, groups: Groups, numbers: Numbers, closure: Callable[..., Any], batches: Sequence[Any] | None
    ) -> Outcome:
        run = self.run
        forwards = Evaluation(closure, batches, self.warner, view.devices, workers=self.workers)
        fresh: list[str] = []
        try:
            first = self._backpropagate(forwards, groups)
            if run.projector is not None:
                fresh = run.projector.hold(trained(groups))
            behind = self._measure(view, forwards, groups, numbers)

            def commit(decision: Decision) -> None:
                run.commit(decision, lambda: trained(groups))

            found, decision, back = self._decide_and_apply(view, forwards, numbers, run.tag, first, behind, commit)
            if back is not None:
                try:
                    decision = self._project(view, forwards, groups, decision)
                    self.recording.before(decision)
                except BaseException:
                    back()
                    raise
                commit(decision)
        except BaseException:
            if run.projector is not None:
                run.projector.drop(fresh)
            if self.first_order is not None:
                self.first_order.zero_grad()
            forwards.finish(keep=True)
            raise
        forwards.finish(keep=False)
        return found

    def _measure(self, view: views.View, forwards: Evaluation, groups: Groups, numbers: Numbers) -> list[float]:
        """The numbers of the record behind the rule's: the projection's, zeros until the end of the step, and the direction's."""
        run, method = self.run, self.run.method
        found = [0.0] * (method.measured - method.decided)
        if method.direction.size:
            masks = {m.name: m.mask for w in view.groups for m in w.members}
            eps, tag = float(numbers.eps[0]), run.tag + method.measured
            found += run.direction.learn(run.steps, tag, trained(groups), masks, eps, forwards.forward)
        return found

    def _decide_and_apply(
        self,
        view: views.View,
        forwards: Evaluation,
        numbers: Numbers,
        tag: views.Tag,
        first: Tensor | None = None,
        behind: Sequence[float] = (),
        commit: Callable[[Decision], None] | None = None,
        recorded: bool = False,
    ) -> tuple[Outcome, Decision, Callable[[], None] | None]:
        """The forwards and the update of a step, whose numbers may lie on a device.

        Args:
            tag: of the first direction. first: the loss that the first-order optimizer's gradients are of. behind: see `decide`. commit: makes the
                step count; None: it does not, and has no record. recorded: for a graph, and not executed.

        Returns:
            What was found and decided. A step that ends with a projection is neither recorded nor committed yet; last is what takes it back.
        """
        run, method = self.run, self.run.method
        tags = method.tags(tag)
        self.warner.begin(view.params)
        with view.step(recorded=recorded):
            losses = self._losses(view, forwards, method.shifts(tags, numbers.eps))
            if first is not None:  # a loss at theta that is no number spoils both halves
                losses[0] += 0 * first.to(losses.device)
            decided = decide(
                method, numbers, losses, self.recording.planned(tag, numbers, self.rounding), run.past, behind, run.unit
            )
            if numbers.table is None:
                self.warner.note(losses, decided.decision.gradient, decided.decision.go)
            decision = self._try(view, forwards, decided, numbers).decision
            for weights in view.groups:
                method.rule.reserve(run.rule, weights)
            back = run.snapshot(view) if commit is not None and run.projects(decision) else None
            done = commit if back is None else None
            if done is not None:
                self.recording.before(decision)
            try:
                run.apply(decision, tags, view, view.ahead(tag, numbers.eps))
            except BaseException:
                if commit is not None:
                    self.recording.cut_short("a step failed in its update, after its record was written")
                raise
            if self.first_order is not None:
                if bool(decision.go):  # on a device the host waits; a backward pass has kept it busy
                    self.first_order.step()
                self.first_order.zero_grad()
            if done is not None:
                self.recording.behind(decision)
                done(decision)
        return Outcome(decided.loss, decided.gradient), decision, back

    def _losses(self, view: views.View, forwards: Evaluation, shifts: Sequence[Any]) -> Tensor:
        """The losses at theta + each of these shifts of the groups."""

        def point(shift: Any) -> Point:
            return Point(lambda: self.run.see(view, shift), view.check, rounds=view.mode != "scratch")

        points = [point(shift) for shift in shifts]
        if self.run.method.estimator.dual:
            return forwards.dual(points)
        return forwards.forward(points, view.away if view.together else None)

    def _try(self, view: views.View, forwards: Evaluation, decided: Decided, numbers: Numbers) -> Decided:
        """Evaluate a rule's candidates, if it has any, and keep the best."""
        method, decision = self.run.method, decided.decision
        if not method.rule.tries or decision.go is False:
            return decided
        losses = self._losses(view, forwards, method.trials(decision.tag, decision.coefs))
        return choose(method, decided, -numbers.signs[0] * losses)

    def _project(self, view: views.View, forwards: Evaluation, groups: Groups, decision: Decision) -> Decision:
        """The projection that ends a step, on its batch, behind the update; with its numbers in the decision."""
        run, method = self.run, self.run.method
        assert run.projector is not None
        params = trained(groups)
        ours = {id(p) for p in params.values()}
        strangers = [
            p for p in (self.model.parameters() if self.model is not None else ()) if p.requires_grad and id(p) not in ours
        ]

        def point(see: Callable[[], None]) -> Point:
            def look() -> None:
                see()
                view.expect()

            return Point(look, view.check_weights)

        backward = forwards.backward(
            "a projection learned by backpropagation needs a closure that returns a differentiable loss tensor, which depends on a projected layer: "
            "no no_grad() or item() in it; or take learn='forward'"
        )
        try:
            for p in strangers:  # no gradients for what another optimizer trains
                p.requires_grad_(False)
            sign = -1.0 if groups[0]["maximize"] else 1.0
            tag = int(decision.tag) + method.decided
            numbers = run.projector.learn(tag, params, run.streams, forwards.forward, backward, point, sign)
        finally:
            for p in strangers:
                p.requires_grad_(True)
        first, *others = decision.coefs
        return replace(decision, coefs=[[*first[: method.decided], *numbers, *first[method.measured :]], *others])

    def _backpropagate(self, forwards: Evaluation, groups: Groups) -> Tensor | None:
        """Gradients of the first-order optimizer's parameters at theta, and the loss; no graph is kept for ours. None without such an optimizer."""
        if self.first_order is None:
            return None
        ours = list(trained(groups).values())
        self.first_order.zero_grad()
        backward = forwards.backward(
            "first_order needs a closure that returns a differentiable loss tensor, and parameters with requires_grad in its optimizer"
        )
        try:
            for p in ours:
                p.requires_grad_(False)
            return backward([Point()])[0]
        finally:
            for p in ours:
                p.requires_grad_(True)

    # -- as a graph --

    def _graphed(
        self, view: views.View, groups: Groups, numbers: Numbers, closure: Callable[..., Any], batches: Sequence[Any] | None
    ) -> Outcome | None:
        """The step as a graph, captured if need be; None if it has to run operation by operation."""
        run = self.run
        try:
            if batches is None:
                raise graph.Refused("it needs step(closure, batches): a graph must know which memory holds the batch")
            if self.graphs is None:
                if len(view.devices) != 1:
                    raise graph.Refused(f"the weights lie on {len(view.devices)} devices")
                self.graphs = graph.Graphs(next(iter(view.devices)), len(groups), 3)
                if run.method.rule.stateful:
                    run.rule.hold(view.groups, self.graphs.device)
            graphs = self.graphs
            graphs.check(batches)
            training = self.model.training if self.model is not None else None
            decays = tuple(g["weight_decay"] != 0 for g in groups)  # with the signs, constants of the captured kernels
            key = graph.key_of(closure, batches, training, (*decays, *numbers.signs), len(groups))
            inputs = graphs.inputs
            read = numbers.captured(inputs.numbers, decays)
            if not graphs.known(key):
                # What must have run once before it can be captured, without a trace in the weights: the same kernels may not give the same bits in a
                # graph and outside (models choose others), so that every step of a run is a graph's. The first step of all finds out how the forwards go.
                inputs.set(run.tag, [[0.0, 0.0, 1.0]] * len(groups))
                for _ in range(view.rehearses):
                    self._rehearse(view, closure, batches, read, inputs.tag)
            inputs.set(run.tag, numbers.rows())
            if key.value not in graphs.captured:
                if (why := view.unrecordable()) is not None:
                    raise graph.Refused(why)
                run.skipped = torch.as_tensor(run.skipped, device=inputs.tag.device)

                def whole(static: list[Any]) -> tuple[Tensor, ...]:
                    forwards = Evaluation(closure, static, self.warner, None, reads=False)
                    found, decision, _ = self._decide_and_apply(view, forwards, read, inputs.tag, recorded=True)
                    run.count(decision)
                    return *found, decision.unknown()

                graphs.capture(key, batches, whole, view.memory)
            loss, gradient, summary = graphs.replay(key, batches)
            self.warner.note([loss], gradient, None)
            written([plan for w in view.groups for plan in w.plans])
            planned = self.recording.planned(run.tag, numbers, self.rounding)
            self.recording.queue(planned, summary)
            run.last = planned.unread(summary, planned.decay)  # the graph's own memory, which is the last launch's
            run.tag += run.method.terms
            return Outcome(loss, gradient)
        except graph.Refused as refused:
            self._refuse(str(refused))
            return None

    def _rehearse(self, view: views.View, closure: Callable[..., Any], batches: Sequence[Any], read: Numbers, tag: Tensor) -> None:
        """The step as it will be captured: on the graph's own inputs, since a number of the host and one in device memory are other kernels, of which none
        can be loaded in a capture. They hold lr = eps = 0, which no rounding changes, in place neither. The random state, too, is as before.

        Raises:
            Refused: the step cannot be captured.
        """
        forwards = Evaluation(closure, batches, self.warner, view.devices, reads=False)
        try:
            self._decide_and_apply(view, forwards, read, tag)
        except BaseException:
            view.seen = 0  # its passes have rounded nothing, and no record is to repeat them
            raise
        finally:
            forwards.finish(keep=True)
        if forwards.draws():
            raise graph.Refused("the forwards draw random numbers (dropout? call model.eval())")

    def _refuse(self, reason: str) -> None:
        self.graphs_wanted, self.graphs = False, None
        self.run.rule.held = False
        warnings.warn(f"cuda_graph=True: {reason}; the steps run without graphs", stacklevel=6)
