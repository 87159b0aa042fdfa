"""From points to losses: every forward of a step is made here.

Belongs here: the calls of a closure, the random state and the micro-batches that they share, backward passes of a hybrid and of a learned projection.
Does not belong here: which points (estimators.py, rules.py, directions.py, projection.py), how a model sees one (views/), what the losses tell (decide.py).

Every loss of a step comes out of one function, `Evaluation.losses`: its points, candidates, a projection's and a layer scale's own forwards. Workers that
share a step share it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels import interrupts, views
from zo_kernels.optim import findings, generators, lockstep
from zo_kernels.optim.digests import print_of, watched
from zo_kernels.optim.points import Losses, Point
from zo_kernels.optim.workers import GIVEN, UNSEEN, Workers, parts_batches
from zo_kernels.views import tangents

Loss = Tensor | float


def check_call(closure: Any, batches: Any) -> None:
    """Refuse what no step can be made with. Micro-batches are read once for each forward, in order: nothing that is used up, nor one batch alone.

    Raises:
        TypeError, ValueError: says what is wrong, and what to give.
    """
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


def on_host(device: torch.device) -> bool:
    """Whether numbers that come from losses there are known to the host without waiting."""
    return device.type == "cpu"


def as_loss(value: Any) -> Tensor | float:
    """A closure's result as a float64 number: a 0-d tensor of the device that it lies on, a float where that is the host, which reads it for a tenth of
    what torch's operations cost.

    Raises:
        TypeError: it is no real number.
    """
    if isinstance(value, Tensor):
        return float(_checked(value).item()) if on_host(value.device) else as_tensor(value)
    if value is None:
        raise TypeError("closure returned None: return the loss (a missing `return`?)")
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"closure returned {type(value).__name__}: return a tensor with one element or a number") from None


def as_tensor(value: Any) -> Tensor:
    """The same as a 0-d float64 tensor wherever it lies: nothing is read that is a tensor already."""
    if isinstance(value, Tensor):
        return _checked(value).detach().reshape(()).double()
    return torch.tensor(as_loss(value), dtype=torch.float64, device="cpu")


def _checked(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise TypeError(f"closure returned a tensor of shape {tuple(value.shape)}: return one number, for example its mean()")
    if value.is_complex() or value.is_meta:
        raise TypeError(f"closure returned a {value.dtype} tensor on {value.device}: return a real number that has a value")
    return value


def _together(losses: Sequence[Tensor | float]) -> Tensor:
    """Losses of one kind in one float64 tensor: [n], with tangents [n, 2]."""
    if not {float}.issuperset(map(type, losses)):
        return torch.stack([torch.as_tensor(loss, dtype=torch.float64) for loss in losses])
    return torch.from_numpy(np.array(losses, dtype=np.float64))


def _mean(rows: Sequence[Tensor | float]) -> Tensor | float:
    """Over the micro-batches of a point."""
    return rows[0] if len(rows) == 1 else _together(rows).mean(0)


def _in_backward(error: BaseException) -> bool:
    """Whether it came out of torch's backward pass."""
    backward = {torch.autograd.backward.__code__, torch.autograd.grad.__code__}
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code in backward:
            return True
        frame = frame.tb_next
    return False


class Evaluation:
    """The forwards of one step: of one closure on the same micro-batches, each from the same random state.

    Args:
        warner: is told what the closure returns, and watches what it reads.
        devices: of the weights, whose generators count; None: no generator is touched (a graph is being captured).
        reads: losses on the host are read. Of a step that is, or will be, a graph none is.
        workers: share the forwards; None: this process makes all of them.
    """

    def __init__(
        self,
        closure: Callable[..., Loss],
        batches: Sequence[Any] | None,
        warner: findings.Warner,
        devices: Collection[torch.device] | None,
        reads: bool = True,
        workers: Workers | None = None,
    ) -> None:
        self.closure, self.warner, self.workers = closure, warner, workers
        self.convert: Callable[[Any], Loss] = as_loss if reads else as_tensor
        self.calls: list[tuple[Any, ...]] = [()] if batches is None else [(batch,) for batch in batches]
        self.rng = generators.Generators(devices) if devices is not None else None
        self.before: list[Any] = self.rng.get() if self.rng is not None else []
        self.after: list[Any] = []  # of the first forward

    def losses(
        self, points: Sequence[Point], one: Callable[[tuple[Any, ...]], Tensor | float], away: views.Away | None = None
    ) -> Tensor:
        """The mean loss over the micro-batches at each point, float64 [points, ...].

        Args:
            one: makes one forward, with the closure's arguments. away: blocks of an offloaded model, a visit of which serves all points; None: the points
                come one behind the other.
        """
        if self.workers is not None:
            return _together([_mean(rows) for rows in self._shared(self.workers, points, one, away)])
        if away is not None and self._beside(len(points)):
            return _together([_mean(rows) for rows in self._side_by_side([(p, self.calls) for p in points], one, away)])
        found: list[Tensor | float] = []
        for point in points:
            point.see()
            if self.rng is not None and self.after:
                self.rng.set(self.before)
            rows = [one(arguments) for arguments in self.calls]
            found.append(_mean(rows))
            point.check()
            if self.rng is not None:
                self.after = self.after or self.rng.get()
        return _together(found)

    def _beside(self, points: int) -> bool:
        """Whether forwards at so many points may take turns. A look at operations is one thread's."""
        return points > 1 and self.rng is not None and isinstance(self.warner.reads, contextlib.nullcontext)

    def _side_by_side(
        self,
        work: Sequence[tuple[Point, Sequence[tuple[Any, ...]]]],
        one: Callable[[tuple[Any, ...]], Tensor | float],
        away: views.Away,
    ) -> list[list[Tensor | float]]:
        """The losses of these calls at each point, whose forwards are in lockstep over the blocks of an offloaded model."""
        heard, order = self.warner.heard, list[int]()

        def job(which: lockstep.Forward) -> list[Tensor | float]:
            rows = []
            for arguments in work[which.number][1]:
                rows.append(one(arguments))
                order.append(which.number)
            which.point.check()
            return rows

        assert self.rng is not None
        since, together = len(heard), lockstep.Lockstep(away, [point for point, _ in work], self.rng, self.before)
        found = together.run(job)
        self.after = self.after or together.forwards[0].random
        if len(heard) > since:  # as they would have come one behind the other
            heard[since:] = [heard[since + k] for k in sorted(range(len(order)), key=order.__getitem__)]
        return found

    def _shared(
        self,
        workers: Workers,
        points: Sequence[Point],
        one: Callable[[tuple[Any, ...]], Tensor | float],
        away: views.Away | None,
    ) -> list[Any]:
        """The losses [points][micro-batches] of all workers, on the host; this one makes its own forwards. What any worker's forward raises ends the step
        on all of them."""
        batches = len(self.calls)
        shares = workers.shares(len(points), batches)
        heard, drawn, parted = len(self.warner.heard), "", parts_batches(shares, batches)
        if count := workers.idle(shares):
            how = "whole points, since forwards draw random numbers" if workers.whole else f"parallel={workers.parallel!r}"
            self.warner.say("idle", findings.idle(count, workers.size, f"{len(points)} points x {batches} micro-batches", how))
        own = [[self.calls[c % batches] for c in shares[workers.rank] if c // batches == p] for p in range(len(points))]
        with watched(None if parted else self.warner.model) as given:
            mine, error = self._own(points, own, one, away)
        if error is None and self.draws():
            states = generators.Generators.drawn(self.before, self.after)
            drawn = print_of([before for before, _ in states] if parted else states)
        numbers = [] if error is not None else _together(mine).reshape(-1).tolist()
        width = len(numbers) // max(1, len(mine))
        found, drew = workers.round(
            "the losses of a step",
            error,
            workers.common
            | {
                "decisions before": workers.chain,
                "table of losses": f"{len(points)} x {batches} x {width}",
                GIVEN: "".join(given) or UNSEEN,
            },
            drawn,
            numbers,
            [len(share) * width for share in shares],
        )
        if error is not None:
            raise error
        workers.agree(found, shares)
        if any(drew) and parted:
            if workers.parallel != "auto":
                raise RuntimeError(
                    f"parallel={workers.parallel!r}: the forwards draw random numbers (dropout?), each micro-batch those behind the one before it, and the "
                    "micro-batches of a point are not all one worker's: take parallel='directions', or what draws out (model.eval())"
                )
            workers.whole, self.after = True, []
            del self.warner.heard[heard:]
            return self._shared(workers, points, one, away)
        table: list[list[Any]] = [[None] * batches for _ in points]
        for share, row in zip(shares, found, strict=True):
            for k, c in enumerate(share):
                values = row[k * width : (k + 1) * width]
                table[c // batches][c % batches] = torch.tensor(values, dtype=torch.float64) if width > 1 else values[0]
        self.warner.heard_of_all(heard, [cell for cells in table for cell in cells])
        return table

    def _own(
        self,
        points: Sequence[Point],
        own: Sequence[Sequence[tuple[Any, ...]]],
        one: Callable[[tuple[Any, ...]], Tensor | float],
        away: views.Away | None,
    ) -> tuple[list[Tensor | float], BaseException | None]:
        """The losses of this worker's calls at each point, and what a forward raised, behind all passes of such points as round the weights."""
        error: BaseException | None = None
        mine: list[Tensor | float] = []
        work = [(point, calls) for point, calls in zip(points, own, strict=True) if calls]
        if away is not None and self._beside(len(work)):
            try:
                mine = [loss for rows in self._side_by_side(work, one, away) for loss in rows]
            except BaseException as raised:
                error = raised
        else:
            for point, calls in zip(points, own, strict=True):
                try:
                    if point.rounds or (calls and error is None):
                        point.see()
                    if not calls or error is not None:
                        continue
                    if self.rng is not None:
                        self.rng.set(self.before)
                    mine += [one(arguments) for arguments in calls]
                    point.check()
                    if self.rng is not None and not self.after:
                        self.after = self.rng.get()
                except BaseException as raised:
                    error = error or raised
        return mine, error

    def finish(self, keep: bool) -> None:
        """The random state after the step: as after one forward, or, `keep`, as before it."""
        if self.rng is not None:
            self.rng.set(self.before if keep else self.after or self.rng.get())

    def draws(self) -> bool:
        """Whether a forward draws random numbers."""
        return self.rng is not None and bool(self.after) and not self.rng.same(self.before, self.after)

    # -- the kinds of forwards --

    def forward(self, points: Sequence[Point], away: views.Away | None = None) -> Tensor:
        """`Losses` of plain forwards. away: see `losses`."""
        return self.losses(points, self._one(self.warner.hearing(self.convert)), away)

    def dual(self, points: Sequence[Point]) -> Tensor:
        """`Losses` with their tangents: float64 [points, 2]."""
        return self.losses(points, self._one(self.warner.hearing(tangents.as_loss)))

    def backward(self, refusal: str) -> Losses:
        """`Losses` of forwards that backpropagate the mean over the micro-batches. `refusal`: of a loss without a graph, a TypeError."""

        def run(arguments: tuple[Any, ...]) -> Tensor:
            with torch.enable_grad():
                loss = self.closure(*arguments)
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise TypeError(refusal)
                (loss / len(self.calls)).backward()
            return loss.detach().double().reshape(())

        return lambda points: self.losses(points, lambda arguments: interrupts.outside(run, arguments))

    def _one(self, convert: Callable[[Any], Tensor | float]) -> Callable[[tuple[Any, ...]], Tensor | float]:
        def one(arguments: tuple[Any, ...]) -> Tensor | float:
            try:
                with self.warner.reads:
                    return convert(interrupts.outside(self.closure, *arguments))
            except RuntimeError as error:
                if not _in_backward(error):
                    raise
                raise RuntimeError(
                    f"the closure calls backward(), and a step needs no gradients ({str(error).splitlines()[0]}): nothing was updated. Leave it out "
                    "(in Lightning: self.automatic_optimization = False); for parameters that are trained by backpropagation there is first_order"
                ) from error

        return one
