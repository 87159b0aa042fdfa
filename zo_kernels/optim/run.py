"""A run: where it is, what its method remembers, and the one place where a step changes weights and state.

Belongs here: `Run.apply`, through which a live, a resumed and a replayed step go, and what counts a step. Does not belong here: how a decision is reached
(evaluate.py, decide.py), where records lie (record.py, journal), which view serves a step (refresh.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels import interrupts, parameters
from zo_kernels.optim.decision import Decision
from zo_kernels.optim.method import Method
from zo_kernels.optim.projection import Projector
from zo_kernels.parameters import Weights
from zo_kernels.views import Pull, Shift, Tag, View, Work

Params = Callable[[], Mapping[str, Tensor]]  # the parameters that are not frozen, by name; asked for where they are needed


class Run:
    """Attributes:
    seed: of the noise. streams: of all parameters of the model, by name. backend: see `perturb_`.
    tag: of the next step's first direction. first_tag: of the run's. skipped: steps whose numbers were not finite; a 0-d tensor on a GPU.
    last: the last step's decision; None before the first, and after a state was loaded.
    began: the names of the parameters whose anchor was compared with the weights that they joined the run with, or that a loaded run goes on with.
    rule, direction, projector, unit: what the method's parts keep between steps. past: |g| of the last steps, 0-d float64 tensors with fp32 values, as many
        as the method's clip looks at.
    """

    def __init__(self, method: Method, seed: int, streams: Mapping[str, int], backend: str | None) -> None:
        self.method, self.seed, self.streams, self.backend = method, seed, dict(streams), backend
        self.tag = self.first_tag = 0
        self.skipped: Tensor | int = 0
        self.last: Decision | None = None
        self.began: set[str] = set()
        self.rule = method.rule.of()
        self.direction = method.direction.of(seed, method.kind, backend)
        self.projector = Projector(method.projection, seed, method.layers, backend) if method.projection is not None else None
        self.unit = method.scale_free.of() if method.scale_free is not None else None
        self.past: deque[Any] = deque(maxlen=method.clip.window)

    @property
    def steps(self) -> int:
        """That were done."""
        return (self.tag - self.first_tag) // self.method.terms

    def tags_of(self, step: int) -> list[int]:
        """The tags of the directions of the step of this number (0: the first)."""
        return [int(t) for t in self.method.tags(self.first_tag + step * self.method.terms)]

    def stream_of(self, name: str) -> int:
        """The stream of a parameter, by its name with or without the prefixes of wrappers.

        Raises:
            ValueError: the model had no such parameter.
        """
        if name in self.streams:
            return self.streams[name]
        bare = parameters.canonical_name(name)
        for known, stream in self.streams.items():
            if parameters.canonical_name(known) == bare:
                return stream
        raise ValueError(
            f"name={name!r}: this optimizer knows no such parameter; it knows {', '.join(sorted(self.streams)[:3])}, ..."
        )

    def prepare(self, view: View) -> None:
        """Masks, scales and factors of the next step, from the clean weights."""
        if self.method.anchor is not None and (joined := view.params.keys() - self.began):
            self.method.anchor.check(view.params, begins=joined)
            self.began |= joined  # once: a step in place that fails leaves roundings
        self.direction.prepare(self.steps, self.tag, view.params)
        if (tag := self.direction.mask_tag) is not None and view.mask_tag != tag:
            view.retag(tag)
            view.mask_tag = tag

    def see(self, view: View, shifts: Sequence[Shift]) -> None:
        """The view at theta + shift of each group, along the direction of its tag."""
        self.direction.follow(shifts, view.restore)
        view.see(shifts)

    def apply(self, decision: Decision, tags: Sequence[Tag], view: View, ahead: list[Shift] | None = None) -> None:
        """Weights and state as a function of the step's numbers.

        Args:
            tags: of its directions, as `Method.shifts` had them. ahead: where a lazy view goes on to (`View.ahead`).
        """
        rule, before = self.method.rule, self.rule.cohorts
        own = self.method.own

        def works() -> Iterator[Work]:
            for k, weights in enumerate(view.groups):
                for work in rule.work(self.rule, decision.share(k, tags, own), weights, self.direction):
                    yield from self.direction.parted(work, weights)
            if self.method.anchor is not None and self.method.anchor.due(self.steps):
                yield from (self._pull(k, weights, decision) for k, weights in enumerate(view.groups))

        try:
            view.execute(works(), from_clean=self.method.from_clean, ahead=ahead)
        except BaseException:
            self.rule.cohorts = before
            raise

    def _pull(self, group: int, weights: Weights, decision: Decision) -> Pull:
        anchor = self.method.anchor
        assert anchor is not None
        return Pull(group, list(zip(weights.names, weights.params, strict=True)), anchor.of, anchor.lam, decision.go)

    def go_on(self, tag: int, first_tag: int) -> None:
        """From steps that were done elsewhere: their weights are where these left them."""
        self.tag, self.first_tag = tag, first_tag
        self.began = set(self.streams) if self.steps else set()

    def commit(self, decision: Decision, trained: Params) -> None:
        """The step is done, and counts.

        Args:
            trained: gives the parameters that are not frozen, by name.
        """
        method = self.method
        if method.direction.size:
            self.direction.learned(self.steps, [float(c) for c in decision.coefs[0][method.measured :]], trained())
        if self.unit is not None:
            self.unit.learned(decision, method.own)
        if method.clip.window:
            g = decision.gradient
            g = g if isinstance(g, Tensor) else torch.tensor(g, dtype=torch.float64, device="cpu")
            self.past.append(g.abs().float().double())
        self.count(decision)
        self.last = decision
        self.tag += method.terms

    def count(self, decision: Decision) -> None:
        """Whether the step was skipped; where a graph records it, in the same memory each time."""
        if isinstance(decision.go, Tensor):
            if isinstance(self.skipped, Tensor):
                self.skipped += ~decision.go
            else:
                self.skipped = self.skipped + (~decision.go).long()
        else:
            self.skipped = self.skipped + (not decision.go)

    def projects(self, decision: Decision) -> bool:
        """Whether the step ends with a projection; on a device the host waits."""
        return self.projector is not None and self.projector.config.due(self.steps) and bool(decision.go)

    def snapshot(self, view: View) -> Callable[[], None]:
        """What takes an update, and what follows it, back: to weights and state as they stand now, which are copied to host memory."""
        weights = view.snapshot(self.method.rule.stateful)
        rule, direction = self.rule.state(), self.direction.written()

        def back() -> None:
            with interrupts.uninterrupted(), torch.no_grad():
                self.rule.load(rule)
                self.direction.restore(direction)
                weights()

        return back

    def repeat(self, decision: Decision, view: View, trained: Params) -> None:
        """A recorded step, or the passes of a failed one, again: without a forward."""
        method, tags = self.method, self.method.tags(decision.tag)
        self.prepare(view)
        if self.projector is not None:
            self.projector.hold(trained())
        if decision.eps is not None:
            points = method.shifts(tags, decision.eps)
            if decision.flushed:
                view.restore()
            if decision.failed:
                points = points[: 1 if decision.failed == "plus" else 2]
            elif method.rule.tries and decision.go:
                points += method.trials(decision.tag, decision.coefs)
            for shifts in points:
                self.see(view, shifts)
        if decision.failed:
            view.restore()
            return
        self.apply(decision, tags, view, view.ahead(decision.tag, decision.eps or []))
        if self.projector is not None and self.projects(decision):
            inner = [float(c) for c in decision.coefs[0][method.decided : method.measured]]
            self.projector.repeat(int(decision.tag) + method.decided, trained(), self.streams, inner)
        self.commit(decision, trained)
