"""What is evaluated, and what the losses tell: points around theta, and projected gradients from the losses there.

Belongs here: the estimators of the gradient along known directions. Does not belong here: which directions (directions.py), what is
done with the projected gradients (rules.py), how a model sees a point (views/).

A point is a list of (direction, factor): theta + eps sum factor z_direction. Losses and differences are float64: at L = 0.7 a loss in fp16
has a spacing of 2^-11, which at eps = 1e-3 quantises g to 0.24 (bf16: 1.95).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks
from zo_kernels.optim import shaping

Offsets = Sequence[tuple[int, float]]


class Estimator:
    """What all estimators have. Losses are float64 [points], in the order of `points` (with tangents, where `dual`: [points, 2]); eps is float64
    [groups, 1]. `gradients`, `curvature` and `loss` are given tensors, or numpy arrays of the same shapes, and use what both have. Everything stays on the
    losses' device."""

    name: ClassVar[str]
    dual: ClassVar[bool] = False  # losses come with their tangents, of forwards that carry them
    curved: ClassVar[bool] = False  # its points tell the `curvature`

    @property
    def plain(self) -> bool:
        """Whether `gradients` and `loss` take numbers too: a list of losses and the eps of one group, of which they make a number."""
        return False

    @property
    def directions(self) -> int:
        """How many the estimate uses."""
        return 1

    def points(self) -> list[Offsets]:
        """Where the loss is evaluated, in this order."""
        raise NotImplementedError

    def gradients(self, losses: Any, eps: Any) -> Any:
        """g_i for each direction, of which the estimate is the mean of g_i z_i: float64 [groups, directions]."""
        raise NotImplementedError

    def loss(self, losses: Any) -> Any:
        """What a step returns, 0-d: the best that these losses tell about the loss at theta."""
        return losses[0]

    def curvature(self, losses: Any, eps: Any) -> Any:
        """Along the direction, float64 [groups, 1]; None where the points do not tell (`curved`)."""
        return None


def check_queries(queries: int) -> None:
    if checks.check_word("queries", queries, 16) < 1:
        raise ValueError("queries=0: give the number of directions that a step averages over, at least 1")


@dataclass(frozen=True)
class TwoSided(Estimator):
    """n-SPSA (Spall 1992; MeZO, definition 1): g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps), averaged over the queries. 2 q forwards.

    There is no gradient buffer, whatever q: the update is one pass with q terms.
    """

    queries: int = 1
    name: ClassVar[str] = "two-sided"

    def __post_init__(self) -> None:
        check_queries(self.queries)

    @property
    def plain(self) -> bool:
        return self.queries == 1

    @property
    def directions(self) -> int:
        return self.queries

    def points(self) -> list[Offsets]:
        return [[(i, sign)] for i in range(self.queries) for sign in (1.0, -1.0)]

    def gradients(self, losses: Any, eps: Any) -> Any:
        if self.queries == 1:
            return (losses[0] - losses[1]) / (2 * eps)
        return (losses[0::2] - losses[1::2]) / (2 * eps)

    def loss(self, losses: Any) -> Any:
        if self.queries == 1 and not isinstance(losses, Tensor):
            return (losses[0] + losses[1]) / 2  # torch's mean, without its operation
        return torch.as_tensor(losses).mean()


@dataclass(frozen=True)
class OneSided(Estimator):
    """g_i = (L(theta + eps z_i) - L(theta)) / eps, averaged over the queries. 1 + q forwards.

    Args:
        normalize: FZOO (arXiv 2506.09034, see `FZOO`): the estimate divided by the sample standard deviation (q - 1 in the denominator) of the q losses
            L(theta + eps z_i), the clean loss not among them. Where they are all equal the quotient is no number, and the step is skipped and
            counted, never divided by zero. Needs q >= 2.
    """

    queries: int = 1
    normalize: bool = False
    name: ClassVar[str] = "one-sided"

    def __post_init__(self) -> None:
        check_queries(self.queries)
        if self.normalize and self.queries < 2:
            raise ValueError(
                f"normalize=True with queries={self.queries}: a standard deviation needs at least 2 losses; give more queries"
            )

    @property
    def directions(self) -> int:
        return self.queries

    def points(self) -> list[Offsets]:
        return [[], *([(i, 1.0)] for i in range(self.queries))]

    def gradients(self, losses: Any, eps: Any) -> Any:
        g = (losses[1:] - losses[0]) / eps
        if not self.normalize:
            return g
        # Equal losses: 0 / 0, which no step survives as a number, and which the optimizer skips. The deviation is torch's, whose sum has an order of its own.
        spread = torch.as_tensor(losses)[1:].std()
        return g / (spread if isinstance(losses, Tensor) else float(spread))


SHAPES: Mapping[str, Callable[[Tensor], Tensor]] = {"ranked": shaping.ranked, "z-scored": shaping.z_scored}


@dataclass(frozen=True)
class Shaped(Estimator):
    """Evolution strategies (Salimans et al. 2017, arXiv 1703.03864, algorithm 1): the losses of all points of a step are shaped before they count, for
    rewards, whose scale says nothing: give a closure that returns minus the reward, or ``maximize=True``. With u = shape(losses), g_i = u_i / eps,
    averaged over the queries. q forwards and none at theta, in whose place is the mean that `shape` takes off; 2 q mirrored.

    A step whose losses are all equal, as shares of few right answers often are, has g = 0 and moves nothing; one of which a loss is not finite is skipped.

    Args:
        queries: at least 2, or 1 where mirrored.
        shape: "ranked" (theirs, section 2.1) or "z-scored" (Qiu et al. 2025, arXiv 2509.24372): `zo_kernels.ranked`, `zo_kernels.z_scored`, over the losses
            of a step, each the mean of its micro-batches.
        mirrored: at theta + eps z_i and theta - eps z_i (their "mirrored sampling"): g_i = (u_i+ - u_i-) / (2 eps).
    """

    queries: int = 8
    shape: str = "ranked"
    mirrored: bool = False
    name: ClassVar[str] = "shaped"

    def __post_init__(self) -> None:
        check_queries(self.queries)
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r:.80}: give one of {', '.join(SHAPES)}")
        if not isinstance(self.mirrored, bool):
            raise TypeError(f"mirrored={self.mirrored!r:.80} must be True or False")
        if self.queries < 2 and not self.mirrored:
            raise ValueError(
                f"queries={self.queries} with mirrored=False: one loss has none beside it to be compared with; give more queries"
            )

    @property
    def directions(self) -> int:
        return self.queries

    def points(self) -> list[Offsets]:
        return [[(i, sign)] for i in range(self.queries) for sign in ((1.0, -1.0) if self.mirrored else (1.0,))]

    def gradients(self, losses: Any, eps: Any) -> Any:
        u: Any = SHAPES[self.shape](torch.as_tensor(losses))
        if not isinstance(losses, Tensor):
            u = u.numpy()
        return (u[0::2] - u[1::2]) / (2 * eps) if self.mirrored else u / eps

    def loss(self, losses: Any) -> Any:
        return torch.as_tensor(losses).mean()


@dataclass(frozen=True)
class ThreePoint(Estimator):
    """L(theta), L(theta + eps z), L(theta - eps z): the two-sided g, and |L+ + L- - 2 L0| / (2 eps^2), the curvature along z that HiZOO
    (arXiv 2402.15173) feeds its diagonal. 3 forwards."""

    name: ClassVar[str] = "three-point"
    curved: ClassVar[bool] = True

    def points(self) -> list[Offsets]:
        return [[], [(0, 1.0)], [(0, -1.0)]]

    def gradients(self, losses: Any, eps: Any) -> Any:
        return (losses[1] - losses[2]) / (2 * eps)

    def curvature(self, losses: Any, eps: Any) -> Any:
        return abs(losses[1] + losses[2] - 2 * losses[0]) / (2 * eps * eps)


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """g = z . grad L(theta), exact, by forward-mode differentiation (Baydin et al. 2022, arXiv 2202.08587): one forward that carries tangents, and
    no eps. The tangent of a weight is generated where the weight is used (views/tangents.py), never for the whole model."""

    name: ClassVar[str] = "forward-gradient"
    dual: ClassVar[bool] = True

    def points(self) -> list[Offsets]:
        return [[(0, 1.0)]]

    def gradients(self, losses: Any, eps: Any) -> Any:
        return (losses[0, 1] + 0 * losses[0, 0]) * (eps / eps)  # no number where the loss is none, whatever its slope

    def loss(self, losses: Any) -> Any:
        return losses[0, 0]


ESTIMATORS: Sequence[type[Estimator]] = (TwoSided, OneSided, Shaped, ThreePoint, ForwardGradient)
