"""`perturbed`: the model at theta + eps z outside of a step.

Belongs here: what a look at perturbed weights must leave as it was. Does not belong here: how a model sees a perturbation (views/), what is made of the losses
there (a step; or evolution strategies and analyses of a user's own).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from zo_kernels import checks, interrupts, views
from zo_kernels.optim.schedule import Paused
from zo_kernels.optim.step import ZOStep


@contextlib.contextmanager
def perturbed(step: ZOStep, tag: int, sign: float = 1.0) -> Iterator[None]:
    """Within ``with zk.perturbed(step, tag, sign):`` the model's forwards run at theta + sign eps z(tag), as those of a step's closure do.

    z is that of a step with this tag, of every parameter that the next step trains: with the masks, scales, factors and the block of that step, and
    with each group's own eps. On leaving, the weights are what they were, to the bit: in scratch mode they never change, in place they are put back from a
    copy, which costs the memory of what is trained. Neither the run nor its journal hears of it.

    Args:
        step: any optimizer of zo_kernels, before or between its steps; none of its own may begin within the block. Forwards are made without gradients, in
            scratch mode in the thread that entered the block.
        tag: of the direction, 0 .. 2^32 - 1; `step.tags_of(k)` has those of step k.
        sign: multiple of eps: +1 and -1 are the sides of a step, 0 is theta itself.

    Raises:
        TypeError, ValueError: an argument is wrong, or the optimizer's are forward gradients, which perturb nothing.
        RuntimeError: a step is under way; or the block wrote to a weight.
    """
    checks.check_word("tag", tag, 32)
    if isinstance(sign, bool) or not isinstance(sign, (int, float)) or not math.isfinite(sign):
        raise ValueError(f"sign={sign!r} must be a finite number: +1 and -1 are the sides of a step")
    with step.paused("zk.perturbed()") as paused, views.as_in_training():
        if paused.run.method.estimator.dual:
            raise ValueError(
                "forward gradients perturb no weight: make an optimizer with another estimator, for example MeZOStep, to look with"
            )
        view = paused.view()
        with prepared(paused, view):
            mine = view.another()  # the optimizer's keeps what it has learned of the closure's forwards
            mine.restore()  # of a lazy run, whose weights are ahead
            with mine.step():
                paused.run.see(mine, [[(tag, sign * float(g["eps"]))] if sign else [] for g in step.param_groups])
                yield
                mine.check()
                mine.restore()


@contextlib.contextmanager
def prepared(paused: Paused, view: views.View) -> Iterator[None]:
    """The next step is prepared. Afterwards its direction and the weights are what they were."""
    copies = [(p, p.detach().clone()) for p in view.params.values()] if view.mode != "scratch" else []
    try:
        paused.run.prepare(view)
        yield
    finally:
        with interrupts.uninterrupted():
            paused.run.direction.undo()
            with torch.inference_mode():  # writes to parameters that were made in it, too
                for p, clean in copies:
                    p.copy_(clean)
