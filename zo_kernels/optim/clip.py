"""How large a projected gradient may be: limits for |g|.

Belongs here: limits as functions of the gradients before a step. Does not belong here: what is made of a clipped gradient (rules.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks


@dataclass(frozen=True)
class FixedClip:
    """|g| is clipped to `at`, an fp32 number; infinity: not at all."""

    at: float = math.inf
    window: ClassVar[int] = 0  # gradients that are remembered

    @property
    def number(self) -> float | None:
        """What a header has beside lr; None: nothing."""
        return None if self.at == math.inf else self.at

    def limit(self, past: Sequence[Any]) -> float | Tensor | None:
        return self.number


@dataclass(frozen=True)
class QuantileClip:
    """|g| is clipped to the `q` quantile of its last `window` values; not before there are `least`."""

    q: float = 0.95
    window: int = 100
    least: int = 10
    name: ClassVar[str] = "quantile"
    number: ClassVar[None] = None  # it is in the method

    def __post_init__(self) -> None:
        if not (isinstance(self.q, (int, float)) and 0 < self.q <= 1):
            raise ValueError(f"q={self.q!r} must be in (0, 1]")
        if not 1 <= checks.check_word("least", self.least) <= checks.check_word("window", self.window):
            raise ValueError(f"least={self.least} must be in 1 .. window={self.window}")

    def limit(self, past: Sequence[float | Tensor]) -> float | Tensor | None:
        """The clip for the next step; None: there are too few values yet. Those that are not finite do not count.

        Args:
            past: |g| of the last steps: numbers, or 0-d float64 tensors on a device, from which nothing is read back.
        """
        if len(past) < self.least:
            return None
        device = next((g.device for g in past if isinstance(g, Tensor)), torch.device("cpu"))
        values = torch.stack([torch.as_tensor(g, dtype=torch.float64, device=device) for g in past])
        finite = values.isfinite()  # on a device nobody knows here how many there are; infinity limits nothing
        return torch.where(finite.sum() >= self.least, torch.where(finite, values, torch.nan).nanquantile(self.q), torch.inf)


def clip_of(clip: Any) -> FixedClip | QuantileClip:
    """What a user gave for `clip`: a number, None for no clipping, or a `QuantileClip`.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    if clip is None or isinstance(clip, QuantileClip):
        return clip or FixedClip()
    if not checks.check_fp32("clip", clip) > 0:
        raise ValueError(f"clip={clip!r} must be positive, a QuantileClip, or None for no clipping")
    return FixedClip(float(clip))
