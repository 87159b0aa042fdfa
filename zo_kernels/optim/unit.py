"""What a projected gradient is measured in: its running root mean square, by which a step does not depend on the loss's scale.

Belongs here: the division, and the numbers that it keeps between steps. Does not belong here: limits of |g| (clip.py), what is made of the quotient
(rules.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zo_kernels.optim.decision import Decision
from zo_kernels.plan import move

TINY = 2.0**-126  # beside s, so that gradients which were all 0 have the quotient 0


@dataclass(frozen=True)
class ScaleFree:
    """Each g_i, clipped, divided by the running root mean square s of its parameter group, the step's own among them, before a rule sees it:

        W <- 1 + beta W,    s^2 <- (beta W' s'^2 + mean_i g_i^2) / W,    g_i <- g_i / (s + 2^-126)

    with W = s = 0 at the start and W', s' the values before: the exponential average of g^2 with its bias taken out, as Adam's v, but one number for a
    group and not one for each weight. The first step has s^2 = mean g_i^2 (with one query the sign of g is left); no quotient is beyond sqrt(q W),
    below sqrt(q / (1 - beta)). A loss times a constant gives the same steps, and with one query `lr` is the root mean square of the way of a weight.

    s is the number behind a record's coefficients, in fp32, and the next step goes on from that. A step that is skipped is none of it.

    Args:
        beta: of the average, in [0, 1).
    """

    beta: float = 0.99
    name: ClassVar[str] = "scale-free"
    size: ClassVar[int] = 1  # numbers of a record

    def __post_init__(self) -> None:
        if not (isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool) and 0 <= self.beta < 1):
            raise ValueError(f"beta={self.beta!r} must be in [0, 1)")

    def of(self) -> UnitState:
        return UnitState(self)

    def divided(self, gs: Any, before: Any) -> tuple[Any, Any]:
        """The quotients, and s, both as what was given: tensors or numpy arrays. The arithmetic is torch's, whose sums have an order of their own.

        Args:
            gs: float64 [groups, queries]. before: float64 [2, groups, 1], s and W of the steps before.
        """
        rms, weight = torch.as_tensor(before)
        seen = self.beta * weight
        root = ((seen * rms * rms + torch.as_tensor(gs).square().mean(1, keepdim=True)) / (1 + seen)).sqrt()
        s = root if isinstance(gs, Tensor) else root.numpy()
        return gs / (s + TINY), s


class UnitState:
    """s, an fp32 number, and W of each parameter group, in the order of the groups: on the host, or on a device, from which nothing is read. A group that
    came later begins with its first step."""

    keeps: ClassVar[Mapping[str, torch.dtype | None]] = {}  # see `RuleState.keeps`

    def __init__(self, config: ScaleFree) -> None:
        self.config = config
        self.rows: Tensor | list[list[float]] = []  # [groups][2]

    def here(self, groups: int) -> np.ndarray:
        """For `ScaleFree.divided`, as numpy has it; what is on a device is waited for."""
        return np.array(self._read(groups), dtype=np.float64).T[:, :, None]

    def on(self, groups: int, device: torch.device) -> Tensor:
        """The same on a device; the host does not wait for it."""
        return self._there(groups, device).T[:, :, None]

    def learned(self, decision: Decision, place: int) -> None:
        """A step is done, whose record has s at this place of each group's numbers."""
        coefs, beta = decision.coefs, self.config.beta
        if isinstance(decision.go, Tensor):
            rows = self._there(len(coefs), decision.go.device)
            new = torch.stack((torch.stack([torch.as_tensor(c[place]) for c in coefs]), 1 + beta * rows[:, 1]), 1)
            self.rows = torch.where(decision.go, new, rows)
        elif decision.go:
            self.rows = [[float(c[place]), 1 + beta * w] for c, (_, w) in zip(coefs, self._read(len(coefs)), strict=True)]

    def _read(self, groups: int) -> list[list[float]]:
        rows = self.rows.tolist() if isinstance(self.rows, Tensor) else self.rows
        return [*rows, *([0.0, 0.0] for _ in range(groups - len(rows)))]

    def _there(self, groups: int, device: torch.device) -> Tensor:
        if isinstance(self.rows, Tensor) and self.rows.device == device and len(self.rows) == groups:
            return self.rows
        return move(torch.tensor(self._read(groups), dtype=torch.float64, device="cpu"), device)

    def begin(self, params: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
        """See `RuleState.begin`."""
        return {}

    def memory(self) -> list[Tensor]:
        """Every tensor that is held now: a few numbers, which are no state of a weight's."""
        return []

    def state(self) -> dict[str, Any]:
        return {"rows": self._read(0)}

    def load(self, state: Mapping[str, Any]) -> None:
        rows: Sequence[Sequence[float]] = state["rows"]
        self.rows = [[float(s), float(w)] for s, w in rows]
