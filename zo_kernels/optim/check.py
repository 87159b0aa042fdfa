"""`check`: evaluate a closure as a step would, change nothing, and report what would make the steps' numbers wrong.

Belongs here: the evaluations, what they must leave as it was, and the report. Does not belong here: what a finding is and its words
(findings.py), how a model sees a perturbation (views/).
"""

from __future__ import annotations

import contextlib
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import interrupts, views
from zo_kernels.optim import evaluate, findings, generators, refresh
from zo_kernels.optim.perturbed import prepared
from zo_kernels.optim.schedule import Paused
from zo_kernels.optim.step import ZOStep
from zo_kernels.views import tangents

DIRECTIONS = 3  # along which differences are measured


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what: "model", "loss", "aim", "repeat", "buffers", "reads", "difference", "grain", "weights", "mode", "speed", "bytes".
        status: "ok", "warning" (it costs precision, or may be meant) or "mistake" (no step can train with it).
        text, remedy: for people; no remedy where all is well.
        numbers: what was measured. tensors: names of the parameters or buffers that it is about.
    """

    name: str
    status: str
    text: str
    remedy: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, status: str, words: findings.Words, **more: Any) -> Finding:
        return cls(name, status, words.what, words.remedy, **more)


@dataclass(frozen=True, repr=False)
class Report:
    """What `check` found: ``print(report)`` is a table; ``report["grain"].numbers`` and the like are for programs."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is neither a mistake nor a warning."""
        return not self.mistakes and not self.warnings

    @property
    def mistakes(self) -> list[Finding]:
        return [f for f in self.findings if f.status == "mistake"]

    @property
    def warnings(self) -> list[Finding]:
        return [f for f in self.findings if f.status == "warning"]

    def __getitem__(self, name: str) -> Finding:
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"{name!r}: looked at were {', '.join(f.name for f in self.findings)}")

    def __contains__(self, name: object) -> bool:
        return any(f.name == name for f in self.findings)

    def __str__(self) -> str:
        lines = [f"{len(self.mistakes)} mistakes, {len(self.warnings)} warnings"]
        for f in self.findings:
            head = f"{f.status if f.status == 'ok' else f.status.upper():<8} {f.name:<11} "
            lines += textwrap.wrap(f.text, 132, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False)
            if f.remedy:
                indent = " " * len(head)
                lines += textwrap.wrap(
                    f.remedy, 132, initial_indent=indent[:-3] + "-> ", subsequent_indent=indent, break_long_words=False
                )
        return "\n".join(lines)

    __repr__ = __str__


def check(step: ZOStep, closure: Callable[..., Any], batches: Sequence[Any] | None = None) -> Report:
    """What is wrong with a step before it is made: some ten evaluations of the closure at theta and at theta ± eps z, for the z of the next steps.

    Nothing is changed: weights (to the bit; in place, for the time of the check, for a copy of the trained ones), gradients, buffers of the model,
    the generators of torch, numpy and random, the optimizer and its journal. What a closure changes of its own (an iterator, a generator object, a
    file) stays changed.

    Args:
        step: any optimizer of zo_kernels, before or between its steps.
        closure, batches: as for `ZOStep.step`.

    Returns:
        The findings. A closure that runs nothing of what is trained, evaluations that do not repeat, a loss in 16 bits and tensors that swallow the
        perturbation are among what is looked for; docs/check.md has the list.

    Raises:
        Whatever the closure raises, and what a step would refuse: TypeError if it returns no loss, RuntimeError if it writes to the weights.
    """
    evaluate.check_call(closure, batches)
    with step.paused("zk.check()") as paused, views.as_in_training():
        try:
            view = paused.view()
        except RuntimeError as error:  # parameters that the model has lost
            return Report((Finding("model", "mistake", str(error)),))
        with _unchanged(paused, view):
            return Report(tuple(_Check(step, paused, view, closure, batches).findings()))


@contextlib.contextmanager
def _unchanged(paused: Paused, view: views.View) -> Iterator[None]:
    """The next step is prepared; what that and the evaluations touch is, afterwards, what it was."""
    rng = generators.Generators(view.devices)
    states = rng.get()
    model = paused.warner.model
    every = list(model.parameters()) if model is not None else list(view.params.values())
    grads = [(p, p.grad) for p in every]
    try:
        for p in every:
            p.grad = None
        with prepared(paused, view):
            yield
    finally:
        with interrupts.uninterrupted():
            for p, gradient in grads:
                p.grad = gradient
            rng.set(states)


class _Check:
    def __init__(
        self, step: ZOStep, paused: Paused, view: views.View, closure: Callable[..., Any], batches: Sequence[Any] | None
    ) -> None:
        self.step, self.run, self.warner = step, paused.run, paused.warner
        self.view, self.closure, self.batches = view, closure, batches
        self.model: nn.Module | None = paused.warner.model
        self.trained = refresh.trained(step.param_groups)
        self.dual = self.run.method.estimator.dual
        self.eps = float(step.param_groups[0]["eps"])
        self.rng = generators.Generators(view.devices)
        self.before = self.rng.get()
        self.buffers = dict(self.model.named_buffers()) if self.model is not None else {}
        modules = self.model.named_modules() if self.model is not None else ()
        self.owners = [(n, m, dict(m._buffers)) for n, m in modules if isinstance(m._buffers, dict) and m._buffers]
        self.copies: dict[str, Tensor] = {}  # of buffers that forwards may write to
        self.moved: set[str] = set()  # buffers that one did write to
        self.kinds: list[Any] = []

    def evaluate(self, dual: bool = False) -> list[float]:
        """The loss of each micro-batch (with `dual`, its tangent), from the same state of everything."""
        convert = tangents.as_loss if dual else evaluate.as_tensor
        found = []
        try:
            for batch in [None] if self.batches is None else self.batches:
                value = self.closure() if self.batches is None else self.closure(batch)
                self.kinds.append(value.dtype if isinstance(value, Tensor) else type(value))
                found.append(float(convert(value).reshape(-1)[-1]))
        finally:
            self.rng.set(self.before)
            for name, clean in self.copies.items():
                if not torch.equal(_bits(self.buffers[name]), _bits(clean)):
                    self.moved.add(name)
                    self.buffers[name].copy_(clean)
            for prefix, module, named in self.owners:
                if replaced := [n for n, b in named.items() if module._buffers.get(n) is not b]:
                    self.moved |= {f"{prefix}.{n}".lstrip(".") for n in replaced}
                    module._buffers.update(named)
        return found

    def findings(self) -> Iterator[Finding]:
        """All of them, the evaluations first."""
        mine = self.view.another()  # the optimizer's keeps what it has learned of the forwards
        mine.restore()  # of a lazy run, whose weights are ahead
        # At theta: what is read and written, then twice alike.
        mine.expect()
        reads = findings.ClosureReads(self.trained, self.buffers)
        self.copies = reads.copies  # filled while the forward runs, in time for what it restores
        with reads:
            first = self.evaluate()
        if any(p.grad is not None for p in (self.model.parameters() if self.model is not None else self.trained.values())):
            raise RuntimeError("the closure calls backward(): a step needs the loss alone; leave it out of the closure")
        times, theta = [], []
        for _ in range(2):
            start = time.perf_counter()
            theta.append(self.evaluate())
            times.append(time.perf_counter() - start)
            mine.check_weights()  # nothing stands before the weights yet, as a scratch view would have it
        sides = self.differences(mine) if reads.read or not self.dual else [([0.0], [0.0])]  # a loss without a tangent is no slope

        losses = [first, *theta, *(s for pair in sides for s in pair)]

        yield self.of_membership()
        yield self.of_loss(losses)
        yield self.of_aim(losses)
        differences = [_mean(a) - _mean(b) for a, b in sides] if not self.dual else [_mean(a) for a, _ in sides]
        yield self.of_repeat(theta, differences)
        if self.model is not None:
            yield self.of_buffers()
        yield self.of_reads(reads.read)
        yield self.of_difference(theta[0], sides, differences, bool(reads.read))
        if not self.dual:
            yield self.of_grain(losses, sides)
            yield self.of_weights()
        if self.model is not None:
            yield self.of_mode()
        yield self.of_speed(min(times))
        yield self.of_bytes()

    def differences(self, mine: views.View) -> list[tuple[list[float], list[float]]]:
        """Losses on both sides along DIRECTIONS directions; of forward gradients the slopes, twice."""
        tags = [t for t in range(self.run.tag, self.run.tag + DIRECTIONS) if t < 1 << 32]
        found = []
        with mine.step():
            for tag in tags:
                pair = []
                for side in (1.0, -1.0):
                    self.run.see(mine, [[(tag, side * float(g["eps"]))] for g in self.step.param_groups])
                    pair.append(self.evaluate(self.dual))
                    mine.check()
                    if self.dual:
                        pair.append(pair[0])
                        break
                found.append((pair[0], pair[1]))
            mine.restore()
        return found

    # -- the findings --

    def of_membership(self) -> Finding:
        if not self.trained:
            return Finding.of("model", "mistake", findings.FROZEN)
        if names := self.warner.unowned(self.step.param_groups):
            return Finding.of("model", "warning", findings.nobodys(names), tensors=tuple(names))
        elements = sum(p.numel() for p in self.trained.values())
        text = f"{len(self.trained)} tensors with {elements:,} weights are trained"
        return Finding("model", "ok", text, numbers={"tensors": len(self.trained), "weights": elements})

    def of_loss(self, losses: Sequence[Sequence[float]]) -> Finding:
        values = [v for part in losses for v in part]
        bad = sum(not math.isfinite(v) for v in values)
        numbers = {"loss": _mean(losses[0]), "evaluations": len(values), "not_finite": bad}
        if bad:
            return Finding(
                "loss",
                "mistake",
                f"{bad} of {len(values)} losses are not finite; such steps are skipped, weights as before",
                "A loss in float16 overflows at 65504, a mask may leave no token, eps may be too large",
                numbers,
            )
        return Finding("loss", "ok", f"{_mean(losses[0]):.6g}, finite in all {len(values)} evaluations", numbers=numbers)

    def of_aim(self, losses: Sequence[Sequence[float]]) -> Finding:
        up = {bool(g["maximize"]) for g in self.step.param_groups}
        if up == {True}:
            return Finding("aim", "ok", "steps make what the closure returns larger (maximize=True)")
        text = "steps make what the closure returns smaller (maximize=False)"
        n = findings.shares_of([v for part in losses for v in part])
        if up == {True, False} or n is None or self.sixteen(losses) is not None:
            return Finding("aim", "ok", text if len(up) == 1 else "steps go up for some groups and down for others (maximize)")
        return Finding(
            "aim",
            "warning",
            f"{text}, and it returns shares of {n}, as an accuracy over {n} examples is",
            "If more is better, give maximize=True or return minus it; if it is a rate of errors, all is well",
            {"examples": n},
        )

    def of_repeat(self, theta: Sequence[Sequence[float]], differences: Sequence[float]) -> Finding:
        size = _root_mean_square(differences)
        apart = max(abs(a - b) for a, b in zip(*theta, strict=True)) if _finite(theta) else 0.0
        same = all(a == b or (a != a and b != b) for a, b in zip(*theta, strict=True))
        numbers = {"apart": apart, "difference": size}
        if same:
            return Finding("repeat", "ok", "two evaluations at theta agree to the bit", numbers=numbers)
        text = f"two evaluations at theta differ by {apart:.2g}; those at theta ± eps z differ by {size:.2g} (root mean square)"
        remedy = (
            "Both forwards of a step must see the same: pass batches to step() instead of drawing them inside the closure (from an iterator or a loader), and "
            "draw random numbers from torch's own generator. For kernels that add in any order: torch.use_deterministic_algorithms(True)"
        )
        return Finding("repeat", "mistake" if apart > 0.05 * size else "warning", text, remedy, numbers)

    def of_buffers(self) -> Finding:
        names = tuple(sorted(self.moved))
        if not names:
            return Finding("buffers", "ok", "no forward changes a buffer of the model")
        text = f"each forward changes {len(names)} buffers ({findings.names_of(names)}), also those at perturbed weights and of steps that fail"
        return Finding("buffers", "warning", text, "Call eval() on these modules (batch norm)", {"buffers": len(names)}, names)

    def of_reads(self, read: set[str]) -> Finding:
        unread = tuple(
            sorted({n for n, p in self.trained.items() if p.numel()} - read)
        )  # who reads nothing of nothing misses nothing
        numbers = {"read": len(self.trained) - len(unread), "unread": len(unread)}
        if not unread:
            return Finding("reads", "ok", "the closure reads every trained tensor", numbers=numbers)
        if not read:
            return Finding.of("reads", "mistake", findings.UNREAD, numbers=numbers, tensors=unread)
        text = f"the closure never reads {len(unread)} of {len(self.trained)} trained tensors: {findings.names_of(unread)}"
        return Finding(
            "reads", "warning", text, "They only take part in the noise: freeze them, or activate their adapter", numbers, unread
        )

    def of_difference(
        self,
        theta: Sequence[float],
        sides: Sequence[tuple[Sequence[float], Sequence[float]]],
        differences: Sequence[float],
        reads: bool,
    ) -> Finding:
        zero = sum(d == 0 for d in differences)
        numbers = {"directions": len(differences), "equal": zero, "difference": _root_mean_square(differences)}
        if not self.dual:
            numbers["curvature"] = _root_mean_square([_mean(a) + _mean(b) - 2 * _mean(theta) for a, b in sides])
        if self.dual:
            text = f"the slopes along {len(differences)} directions are {numbers['difference']:.3g} (root mean square)"
        else:
            g = numbers["difference"] / (2 * self.eps)
            text = f"L(theta + eps z) - L(theta - eps z) is {numbers['difference']:.3g}, g {g:.3g} (root mean square over {len(differences)} directions)"
        if zero < len(differences):
            return Finding("difference", "ok", text, numbers=numbers)
        return Finding(
            "difference",
            "warning" if reads else "mistake",
            f"g is 0 along all {len(differences)} directions: a step changes nothing but by weight decay",
            "A measure that counts (accuracy) needs more examples or a larger eps; for other losses see the findings about reads, grain and weights",
            numbers,
        )

    def sixteen(self, losses: Sequence[Sequence[float]]) -> torch.dtype | None:
        values = [v for part in losses for v in part if math.isfinite(v)]
        return findings.sixteen_bits(values, self.kinds, findings.holds_sixteen(self.model, self.trained.values()))

    def of_grain(self, losses: Sequence[Sequence[float]], sides: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Finding:
        values = [v for part in losses for v in part if math.isfinite(v)]
        spreads = [abs(x - y) for a, b in sides for x, y in zip(a, b, strict=True) if math.isfinite(x - y)]
        if not values or not spreads:
            return Finding("grain", "ok", "no finite losses to compare")
        dtype = self.sixteen(losses)
        counts = any(k in (bool, int) or (isinstance(k, torch.dtype) and not k.is_floating_point) for k in self.kinds)
        near = findings.grain(sorted(map(abs, values))[len(values) // 2], dtype or torch.float32)
        numbers = {"grain": near, "difference": _root_mean_square(spreads), "bits": 16 if dtype else 32}
        if not counts and (words := findings.coarse(dtype or torch.float32, values, spreads, self.eps)) and (dtype or any(spreads)):
            return Finding.of("grain", "mistake" if dtype else "warning", words, numbers=numbers)
        text = f"losses in {findings.name_of(dtype or torch.float32)} are {near:.2g} apart, their differences are {numbers['difference']:.2g}"
        return Finding("grain", "ok", text, numbers=numbers)

    def of_weights(self) -> Finding:
        shares = findings.moved(findings.deviations(self.step.param_groups, self.view), self.run.method.kind)
        params = self.view.params
        total = sum(params[n].numel() for n in shares)
        everything = sum(share * params[n].numel() for n, share in shares.items()) / max(1, total)
        still, part = findings.swallowed(shares, params)
        numbers = {"moves": everything, "still": part, **{f"moves:{n}": shares[n] for n in still}}
        if not still:
            text = f"eps z changes {everything:.1%} of the elements after rounding, and more than half of every tensor's"
            return Finding("weights", "ok", text, numbers=numbers)
        words = findings.stiff(still, shares, params, self.eps)
        return Finding.of(
            "weights", "mistake" if everything < findings.MOVES else "warning", words, numbers=numbers, tensors=tuple(still)
        )

    def of_mode(self) -> Finding:
        assert self.model is not None
        active = [
            n for n, m in self.model.named_modules() if m.training and isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
        ]
        if not self.model.training:
            return Finding("mode", "ok", "eval mode")
        return Finding(
            "mode",
            "ok",
            f"train mode; {len(active)} dropout modules are active, with the same masks in both forwards",
            tensors=tuple(active),
        )

    def of_speed(self, seconds: float) -> Finding:
        forwards = (1 if self.batches is None else len(self.batches)) / max(seconds, 1e-9)
        return Finding("speed", "ok", f"{forwards:.3g} forwards a second", numbers={"forwards_per_second": forwards})

    def of_bytes(self) -> Finding:
        every = [*self.model.parameters(), *self.model.buffers()] if self.model is not None else []
        weights = sum(t.nbytes for t in {id(t): t for t in (*every, *self.trained.values())}.values())
        state = self.step.state_bytes()
        trained = sum(p.nbytes for p in self.trained.values())
        room = self.view.limit
        text = f"{weights:,} of weights and buffers ({trained:,} trained), {state:,} of state, a buffer of at most {room:,}"
        return Finding("bytes", "ok", text, numbers={"weights": weights, "trained": trained, "state": state, "scratch": room})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(parts: Sequence[Sequence[float]]) -> bool:
    return all(math.isfinite(v) for part in parts for v in part)


def _root_mean_square(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return math.sqrt(sum(v * v for v in finite) / len(finite)) if finite else 0.0


def _bits(t: Tensor) -> Tensor:
    """For a comparison that NaN passes."""
    return t.detach().contiguous().view(-1).view(torch.uint8) if t.numel() else t
