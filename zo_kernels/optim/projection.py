"""DiZO's projections: how far the chosen layers may have moved from where they started, learned with forward passes alone or by backpropagation.

Tan et al. 2025, "Harmony in Divergence: Towards Fast, Accurate, and Memory-efficient Zeroth-order LLM Fine-tuning" (arXiv 2502.03304).

Belongs here: the anchors, the inner steps, and their repetition from a record. Does not belong here: the step that a projection ends, and
what takes both back (schedule.py, run.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks, ops
from zo_kernels.optim.points import Losses, Point, stay
from zo_kernels.parameters import canonical_name
from zo_kernels.patterns import Patterns, check_patterns

LEARN = ("forward", "backpropagation")


@dataclass(frozen=True)
class Projection:
    """At the end of every `every`-th step, on its batch, the distance of each chosen layer from its anchor, its weights at the run's start, is
    rescaled: theta <- anchor + r (theta - anchor), r = gamma / t in the paper, t the distance. `inner` steps learn r, one number a layer, which starts
    at 1 (the paper's re-initialisation) and is clipped to 1 ± tau. eps and lr are in units of t, so that nothing is divided by it: a layer that has not
    moved stays where it is. A step that is skipped is not projected.

    Args:
        layers: regular expressions; a parameter is projected if one matches a part of its name, as it is or canonical. The paper takes query and value.
        learn: "forward": r <- r - lr g z, two forwards each at r ± eps z, z one normal number a layer. "backpropagation" (the paper's DiZO with
            FO): r <- r - lr dL/dr, a forward and a backward each, dL/dr = sum of (dL/dtheta (theta - anchor)) over the layer. Needs a closure that returns
            a loss with a graph. (The authors' code steps gamma by Adam with lr 0.1, on batches of its own.)

    Memory: the anchors, always. While one is learned: the projected layers once more, a host copy of all trained weights and the rule's state,
    from which a forward that fails takes the whole step back; with backpropagation the activations, and the gradient of one layer at a time.
    """

    every: int = 50
    inner: int = 10
    eps: float = 0.1
    lr: float = 0.05
    tau: float = 0.2
    layers: Sequence[str] = (r"\b(q_proj|v_proj|query|value|query_key_value|c_attn)\.(weight$|lora_[AB]\.)",)
    learn: str = "forward"
    name: ClassVar[str] = "dizo"

    def __post_init__(self) -> None:
        for what in ("every", "inner"):
            if checks.check_word(what, getattr(self, what)) < 1:
                raise ValueError(f"{what}=0: give a number of steps, at least 1")
        for what in ("eps", "lr"):
            if not checks.check_fp32(what, getattr(self, what)) > 0:
                raise ValueError(f"{what}={getattr(self, what)!r} must be positive")
        if not (isinstance(self.tau, (int, float)) and 0 < self.tau < 1):
            raise ValueError(f"tau={self.tau!r} must be in (0, 1): r is clipped to 1 ± tau")
        checks.check_choice("learn", self.learn, LEARN)
        object.__setattr__(self, "layers", check_patterns("layers", self.layers))

    def matching(self, names: Iterable[str]) -> list[str]:
        """The names of the parameters that are projected, in the order of their canonical names.

        Raises:
            ValueError: there is none.
        """
        layers = Patterns("layers", self.layers)
        chosen = [n for n in names if any(layers.first(known) is not None for known in dict.fromkeys((n, canonical_name(n))))]
        if not chosen:
            raise ValueError(
                f"projection: no parameter matches {list(self.layers)}: give layers=[...] with patterns of this model's names"
            )
        return sorted(chosen, key=canonical_name)

    def size(self, layers: int) -> int:
        """Numbers, and tags, of a step's record: the inner projected gradients, or r of each of so many layers."""
        return self.inner if self.learn == "forward" else layers

    def due(self, step: int) -> bool:
        """Whether the step of this number (0: the first) ends with a projection."""
        return (step + 1) % self.every == 0


class Projector:
    """The anchors of one run, by the name of the parameter."""

    keeps: ClassVar[Mapping[str, torch.dtype | None]] = {"anchors": None}  # see `RuleState.keeps`; None: of the parameter's shape

    def __init__(self, config: Projection, seed: int, layers: int, backend: str | None = None) -> None:
        self.config, self.seed, self.backend, self.size = config, seed, backend, config.size(layers)
        self.anchors: dict[str, Tensor] = {}
        self.matched: tuple[tuple[str, ...], list[str]] = (
            (),
            [],
        )  # the names that were asked for last, and those of them that are projected

    def chosen(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the parameters that are projected."""
        if self.matched[0] != (names := tuple(params)):
            self.matched = names, self.config.matching(names)
        return {n: params[n] for n in self.matched[1]}

    def hold(self, params: Mapping[str, Tensor]) -> list[str]:
        """Before a step: anchors of the projected layers that have none. Returns their names, for `drop`.

        Raises:
            ValueError: no parameter is projected any more, or, with backpropagation, not so many as when the run began.
        """
        chosen = self.chosen(params)
        if self.config.learn == "backpropagation" and len(chosen) != self.size:
            raise ValueError(
                f"projection: {len(chosen)} layers are projected, and {self.size} were when the optimizer was made, which is how many numbers a step "
                "records: freeze and unfreeze other parameters, or make a new optimizer"
            )
        fresh = []
        for name, p in chosen.items():
            if name not in self.anchors:
                self.anchors[name] = p.detach().clone()
                fresh.append(name)
            elif self.anchors[name].device != p.device:
                self.anchors[name] = self.anchors[name].to(p.device)
        return fresh

    def drop(self, fresh: Sequence[str]) -> None:
        """The step did not take place: its weights are nobody's start."""
        for name in fresh:
            self.anchors.pop(name, None)

    def _along(self, stream: int, tag: int, device: torch.device) -> float:
        # A backend that was asked for may work on the weights' device only; all give the same number.
        where = device if self.backend is not None else torch.device("cpu")
        return float(ops.normal((), seed=self.seed, stream=stream, tag=tag, device=where, backend=self.backend))

    def _clip(self, r: float) -> float:
        return min(max(r, 1 - self.config.tau), 1 + self.config.tau)

    def _advance(self, r: dict[str, float], g: float, z: Mapping[str, float]) -> dict[str, float]:
        return {n: self._clip(x - self.config.lr * g * z[n]) for n, x in r.items()}

    def _place(self, chosen: Mapping[str, Tensor], far: Mapping[str, Tensor], r: Mapping[str, float]) -> None:
        for name, p in chosen.items():
            anchor = self.anchors[name].float()
            p.copy_(anchor + (far[name].float() - anchor) * r[name])
        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, not by its version

    def _directions(self, chosen: Mapping[str, Tensor], streams: Mapping[str, int], tag: int) -> dict[str, float]:
        return {n: self._along(streams[n], tag, p.device) for n, p in chosen.items()}

    @torch.no_grad()
    def learn(
        self,
        tag: int,
        params: Mapping[str, Tensor],
        streams: Mapping[str, int],
        losses: Losses,
        backward: Losses,
        point: Callable[[Callable[[], None]], Point],
        sign: float = 1.0,
    ) -> list[float]:
        """Project `params`, which stand where the step has left them. Returns the numbers to record.

        Args:
            losses: the forwards. backward: the same with their backward passes, which leave gradients in the `grad` of those of `params` alone that
                require one. point: the point that a function brings the weights to, guarded against forwards that write to them.
            sign: -1 to ascend.

        Raises:
            Whatever a forward raises; the projected layers are then anywhere.
        """
        chosen = self.chosen(params)
        far = {n: p.detach().clone() for n, p in chosen.items()}
        r, eps = dict.fromkeys(chosen, 1.0), self.config.eps
        if self.config.learn == "backpropagation":
            for _ in range(self.config.inner):
                slopes = self._slopes(chosen, far, params, lambda: backward([point(stay)]))
                r = {n: self._clip(x - self.config.lr * sign * slopes[n]) if math.isfinite(slopes[n]) else x for n, x in r.items()}
                r = {n: _fp32(x) for n, x in r.items()}  # as recorded
                self._place(chosen, far, r)
            return list(r.values())
        inner = []
        for j in range(self.config.inner):
            z = self._directions(chosen, streams, tag + j)

            def at(side: float, r: dict[str, float] = r, z: dict[str, float] = z) -> Point:
                return point(lambda: self._place(chosen, far, {n: x + side * z[n] for n, x in r.items()}))

            plus, minus = losses([at(eps), at(-eps)]).tolist()
            g = _fp32(sign * (plus - minus) / (2 * eps))
            inner.append(g if math.isfinite(g) else 0.0)
            r = self._advance(r, inner[-1], z)
        self._place(chosen, far, r)
        return inner

    def _slopes(
        self,
        chosen: Mapping[str, Tensor],
        far: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        backpropagate: Callable[[], Any],
    ) -> dict[str, float]:
        """dL/dr of each layer. Its gradient is reduced to that one number, and freed, before backpropagation goes on to the next layer."""
        slopes = dict.fromkeys(chosen, 0.0)
        grads = {n: p.grad for n, p in params.items()}

        def reduce(name: str) -> Callable[[Tensor], None]:
            def hook(p: Tensor) -> None:
                assert p.grad is not None
                moved = far[name].float() - self.anchors[name].float()
                slopes[name] += float((p.grad.float() * moved).sum(dtype=torch.float64))
                p.grad = None

            return hook

        handles = [p.register_post_accumulate_grad_hook(reduce(n)) for n, p in chosen.items()]
        try:
            for n, p in params.items():
                p.grad = None
                p.requires_grad_(n in chosen)
            backpropagate()
        finally:
            for handle in handles:
                handle.remove()
            for n, p in params.items():
                p.requires_grad_(True)
                p.grad = grads[n]
        return slopes

    @torch.no_grad()
    def repeat(self, tag: int, params: Mapping[str, Tensor], streams: Mapping[str, int], numbers: Sequence[float]) -> None:
        """The projection of a recorded step again."""
        chosen = self.chosen(params)
        if self.config.learn == "backpropagation":
            r = dict(zip(chosen, numbers, strict=True))
        else:
            r = dict.fromkeys(chosen, 1.0)
            for j, g in enumerate(numbers):
                r = self._advance(r, g, self._directions(chosen, streams, tag + j))
        self._place(chosen, {n: p.detach().clone() for n, p in chosen.items()}, r)

    def begin(self, params: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
        """See `RuleState.begin`."""
        return {"anchors": {n: p.detach().clone() for n, p in self.chosen(params).items()}}

    def memory(self) -> list[Tensor]:
        """Every tensor that is held now."""
        return list(self.anchors.values())

    def state(self) -> dict[str, Any]:
        return {"anchors": {n: a.clone() for n, a in self.anchors.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        self.anchors = {n: a.clone() for n, a in state["anchors"].items()}


def _fp32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))
