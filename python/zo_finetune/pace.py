"""Whether a run's rate moves its weights by what can teach them something: beside how large they are.

Belongs here: the range, its reason, and the one line where a run is out of it. Does not belong here: how far a step moves a weight (`ZOStep.movement`), what a
rate is (methods.py).

Steps along random directions go a random walk: n of them, each moving a weight by m (root mean square), have moved it by about sqrt(n) m. Where that is as much
as the weights are large, what is left is as much noise as model, and the model forgets, whatever the task gains; where it is less than a thousandth of that, no
weight has changed in the digits that a task is learned in. Between the two the line says nothing, and no rate is good because of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

LOOKS = 10  # steps that are looked at before a word: |g| of a single one may be anything
LEAST, MOST = 1e-3, 1.0  # of the way of a whole run, in units of the weights' root mean square


class Pace:
    """Looks at the first steps of a run.

    Args:
        weights: those that are trained, as the run begins with them; empty: nothing is said, as of weights that were added to the model and begin at 0.
        rates: the learning rate of each of the run's steps.
        option: what gives the rate, as its user writes it.
    """

    def __init__(self, weights: Iterable[Tensor], rates: Iterable[float], option: str = "--lr") -> None:
        self.option = option
        square = count = 0.0
        for w in weights:
            square += float(torch.linalg.vector_norm(w.detach(), dtype=torch.float32)) ** 2
            count += w.numel()
        self.size = math.sqrt(square / count) if count else 0.0
        rates = list(rates)
        self.steps, self.rate = len(rates), math.sqrt(sum(r * r for r in rates))
        self.most = max(rates, default=0.0)
        self.seen: list[float] = []  # what a step moved a weight by, for each unit of the learning rate

    def saw(self, movement: float, lr: float) -> str | None:
        """What is to be said after a step, which moved a weight by `movement`: once, or never.

        Args:
            movement: NaN where nobody knows.
        """
        looks = min(LOOKS, self.steps)
        if not self.size or lr <= 0 or not math.isfinite(movement) or len(self.seen) >= looks:
            return None
        self.seen.append(movement / lr)
        if len(self.seen) < looks:
            return None
        typical = math.sqrt(sum(x * x for x in self.seen) / looks)
        share = typical * self.rate / self.size
        if not typical or LEAST <= share <= MOST:
            return None
        moved = typical * self.most
        moves = f"a step at {self.option} {self.most:g} moves a weight by about {moved:.2g}, where the weights are {self.size:.2g} (root mean square)"
        if share > MOST:
            return (
                f"{moves}: {self.steps} such steps are a walk as long as the weights are large ({share:.1f} times), and the model forgets; "
                f"a smaller {self.option} keeps more"
            )
        return (
            f"{moves}: {self.steps} such steps are {share:.1g} of that, too little to teach anything; take a larger {self.option}"
        )
