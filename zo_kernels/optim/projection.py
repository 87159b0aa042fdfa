"""DiZO's projections: how far the chosen layers may have moved from where they started, learned with forward passes alone.

Tan et al. 2025, "Harmony in Divergence: Towards Fast, Accurate, and Memory-efficient Zeroth-order LLM Fine-tuning" (arXiv 2502.03304).

Belongs here: the anchors, the inner steps, and their repetition from a record. Does not belong here: the steps between two projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.parameters import stream_of
from zo_kernels.patterns import Patterns, check_patterns


def nothing() -> None:
    """What undoes a projection that was not made."""


@dataclass(frozen=True)
class Projection:
    """Before every `every`-th step (not the first) the distance of each chosen layer from its anchor, its weights at the run's start, is rescaled:
    theta <- anchor + r (theta - anchor), r = gamma / t in the paper. `inner` zeroth-order steps learn r, one number a layer: two forwards each at
    r ± eps z, r <- r - lr g z, clipped to 1 ± tau; r starts at 1 (the paper's re-initialisation). eps and lr are in units of the distance t, so
    that nothing is divided by it: a layer that has not moved stays where it is.

    Args:
        layers: regular expressions; a parameter is projected if one matches a part of its name. The paper takes query and value.
    """

    every: int = 50
    inner: int = 10
    eps: float = 0.1
    lr: float = 0.05
    tau: float = 0.2
    layers: Sequence[str] = (r"\b(q_proj|v_proj|query|value|query_key_value|c_attn)\.(weight$|lora_[AB]\.)",)
    name: ClassVar[str] = "dizo"

    def __post_init__(self) -> None:
        for what in ("every", "inner"):
            if ops.check_word(what, getattr(self, what)) < 1:
                raise ValueError(f"{what}=0: give a number of steps, at least 1")
        for what in ("eps", "lr"):
            if not ops.check_fp32(what, getattr(self, what)) > 0:
                raise ValueError(f"{what}={getattr(self, what)!r} must be positive")
        if not (isinstance(self.tau, (int, float)) and 0 < self.tau < 1):
            raise ValueError(f"tau={self.tau!r} must be in (0, 1): r is clipped to 1 ± tau")
        object.__setattr__(self, "layers", check_patterns("layers", self.layers))

    @property
    def size(self) -> int:
        """Numbers, and tags, of a step's record: the inner projected gradients."""
        return self.inner

    def of(self, seed: int) -> Projector:
        return Projector(self, seed)


class Projector:
    """The anchors of one run: a copy of the projected layers, and another while a projection is learned."""

    def __init__(self, config: Projection, seed: int) -> None:
        self.config, self.seed = config, seed
        self.size = config.size
        self.anchors: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        return step > 0 and step % self.config.every == 0

    def matching(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that are projected.

        Raises:
            ValueError: there is none.
        """
        layers = Patterns("layers", self.config.layers)
        chosen = {n: p for n, p in params.items() if layers.first(n) is not None}
        if not chosen:
            raise ValueError(
                f"projection: no parameter matches {list(self.config.layers)}: give layers=[...] with patterns of this model's names"
            )
        return chosen

    def _chosen(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen = self.matching(params)
        for name, p in chosen.items():
            if name not in self.anchors:
                self.anchors[name] = p.detach().clone()
            elif self.anchors[name].device != p.device:
                self.anchors[name] = self.anchors[name].to(p.device)
        return chosen

    def _along(self, name: str, tag: int) -> float:
        return float(ops.normal((), seed=self.seed, stream=stream_of(name), tag=tag, device="cpu"))

    def _advance(self, r: dict[str, float], g: float, tag: int) -> dict[str, float]:
        low, high = 1 - self.config.tau, 1 + self.config.tau
        return {n: min(max(x - self.config.lr * g * self._along(n, tag), low), high) for n, x in r.items()}

    def _place(self, params: Mapping[str, Tensor], far: Mapping[str, Tensor], r: Mapping[str, float]) -> None:
        for name, p in params.items():
            anchor = self.anchors[name].float()
            p.copy_(anchor + (far[name].float() - anchor) * r[name])

    @torch.no_grad()
    def learn(
        self,
        step: int,
        tag: int,
        params: Mapping[str, Tensor],
        evaluate: Callable[[], Tensor],
        between: Callable[[], None],
        sign: float = 1.0,
    ) -> tuple[list[float], Callable[[], None]]:
        """Project, if this step is due. Returns the inner gradients (zeros if not) and what undoes the projection, to the bit.

        Raises:
            Whatever a forward raises; the weights are then as before.
        """
        chosen = self._chosen(params)
        if not self.due(step):
            return [0.0] * self.size, nothing
        far = {n: p.detach().clone() for n, p in chosen.items()}

        def undo() -> None:
            with torch.no_grad():
                for n, p in chosen.items():
                    p.copy_(far[n])

        r, inner = dict.fromkeys(chosen, 1.0), []
        try:
            for j in range(self.config.inner):
                losses = []
                for side in (1.0, -1.0):
                    shifted = {n: x + side * self.config.eps * self._along(n, tag + j) for n, x in r.items()}
                    self._place(chosen, far, shifted)
                    torch.clear_autocast_cache()
                    losses.append(float(evaluate()))
                    between()
                g = sign * (losses[0] - losses[1]) / (2 * self.config.eps)
                g = float(torch.tensor(g, dtype=torch.float32))
                inner.append(g if math.isfinite(g) else 0.0)
                r = self._advance(r, inner[-1], tag + j)
            self._place(chosen, far, r)
        except BaseException:
            undo()
            raise
        return inner, undo

    @torch.no_grad()
    def repeat(self, step: int, tag: int, params: Mapping[str, Tensor], inner: Sequence[float], go: bool) -> None:
        """The projection of a recorded step again."""
        chosen = self._chosen(params)
        if not self.due(step) or not go:
            return
        r = dict.fromkeys(chosen, 1.0)
        for j, g in enumerate(inner):
            r = self._advance(r, g, tag + j)
        self._place(chosen, {n: p.detach().clone() for n, p in chosen.items()}, r)

    def state(self) -> dict[str, Any]:
        return {"anchors": {n: a.clone() for n, a in self.anchors.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        self.anchors = {n: a.clone() for n, a in state["anchors"].items()}
