"""The literature's methods: each a thin constructor of a `ZOStep` from its parts, with its paper's defaults.

Belongs here: names, papers, equations and defaults. Does not belong here: what a step does (schedule.py) or what a part computes (estimators.py,
rules.py, directions.py, blocks.py, projection.py).

Every constructor takes what `ZOStep` takes besides its own arguments (seed, weight_decay, perturbation, rounding, clip, journal, ...), and parts that
it does not fix itself. docs/algorithms.md compares them: forwards a step, memory, what a journal records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zo_kernels.optim import blocks as blocking
from zo_kernels.optim import directions, estimators, rules
from zo_kernels.optim import projection as projections
from zo_kernels.optim.step import ZOStep


def _estimator(queries: int, one_sided: bool) -> estimators.Estimator:
    return estimators.OneSided(queries) if one_sided else estimators.TwoSided(queries)


class MeZOStep(ZOStep):
    """Zeroth-order SGD (Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333, algorithm 1).

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)              the projected gradient, a scalar
        theta <- (1 - lr wd) theta - lr g z

    The paper's defaults for full fine-tuning of OPT: lr 1e-6 or 1e-7, eps 1e-3, batch 16, 20,000 steps, constant lr; LoRA: lr 1e-4 or 5e-5, eps 1e-2.

    Args:
        queries: directions that a step averages over (n-SPSA, definition 1); two forwards each.
        one_sided: g = (L(theta + eps z) - L(theta)) / eps instead: one forward a query, and one more.

    The other arguments, attributes and errors are those of `ZOStep`.
    """

    def __init__(
        self, model_or_params: Any, lr: float, eps: float = 1e-3, *, queries: int = 1, one_sided: bool = False, **more: Any
    ) -> None:
        super().__init__(model_or_params, lr, eps, estimator=_estimator(queries, one_sided), **more)


class ZOSignSGD(ZOStep):
    """theta <- (1 - lr wd) theta - lr sign(g) z: ZO-SGD-Sign of the benchmark of Zhang et al. 2024 (arXiv 2402.11592). `lr` is the length of a step
    whatever the loss's scale. With several queries: the mean of sign(g_i) z_i."""

    def __init__(
        self, model_or_params: Any, lr: float, eps: float = 1e-3, *, queries: int = 1, one_sided: bool = False, **more: Any
    ) -> None:
        super().__init__(model_or_params, lr, eps, estimator=_estimator(queries, one_sided), rule=rules.Sign(), **more)


class ZOMomentum(ZOStep):
    """b <- beta b + g z, theta <- (1 - lr wd) theta - lr b (ZO-SGD-MMT of arXiv 2402.11592).

    Args:
        beta: 0.9 there.
        state: "stored": b is held, one pass for b and the weights. "recomputed": b is formed from the last `history` steps' scalars, nothing is
            held, and beta^history of it is left out.
        history: steps to remember where the state is recomputed.
        state_dtype: of a stored b: "float32", or "bfloat16", stochastically rounded.
    """

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        beta: float = 0.9,
        state: str = "stored",
        history: int = 32,
        state_dtype: str = "float32",
        queries: int = 1,
        one_sided: bool = False,
        **more: Any,
    ) -> None:
        rule = rules.Momentum(beta, state, history, state_dtype)
        super().__init__(model_or_params, lr, eps, estimator=_estimator(queries, one_sided), rule=rule, **more)


class ZOAdam(ZOStep):
    """Adam on g z (ZO-AdaMM, Chen et al. 2019, arXiv 1910.06513; ZO-Adam of arXiv 2402.11592; decoupled weight decay).

    Args:
        betas, adam_eps: of Adam.
        state: "stored": m and v are held, one pass for them and the weights; v is fp32 always. "recomputed": from the last `history` steps'
            scalars, nothing is held.
        history, state_dtype: see `Adam`.
    """

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        state: str = "stored",
        history: int = 32,
        state_dtype: str = "float32",
        queries: int = 1,
        one_sided: bool = False,
        **more: Any,
    ) -> None:
        rule = rules.Adam(*betas, adam_eps, state, history, state_dtype)
        super().__init__(model_or_params, lr, eps, estimator=_estimator(queries, one_sided), rule=rule, **more)


class ZOConservative(ZOStep):
    """The best of theta, theta - lr g z and theta + lr g z (ZO-SGD-Cons of arXiv 2402.11592), five forwards a step."""

    def __init__(self, model_or_params: Any, lr: float, eps: float = 1e-3, **more: Any) -> None:
        super().__init__(model_or_params, lr, eps, rule=rules.Conservative(), **more)


class ForwardGrad(ZOStep):
    """theta <- (1 - lr wd) theta - lr (z . grad L) z, the projection exact, by forward-mode differentiation (Baydin et al. 2022, "Gradients without
    Backpropagation", arXiv 2202.08587; Forward-Grad of arXiv 2402.11592). One forward that carries tangents; no eps. The closure returns a loss that
    torch computed from the model."""

    def __init__(self, model_or_params: Any, lr: float, **more: Any) -> None:
        super().__init__(model_or_params, lr, estimator=estimators.ForwardGradient(), **more)


class HybridZO(ZOStep):
    """Some parameters by forwards alone, the others by backpropagation on the same batch, both at the same theta (hybrid ZO-FO, arXiv 2402.11592).

    Args:
        first_order: any torch optimizer over the parameters that get gradients. The model's other trainable parameters are this optimizer's.
    """

    def __init__(
        self, model_or_params: Any, lr: float, eps: float = 1e-3, *, first_order: torch.optim.Optimizer, **more: Any
    ) -> None:
        super().__init__(model_or_params, lr, eps, first_order=first_order, **more)


class BlockwiseZO(ZOStep):
    """One block of parameters is perturbed and updated in a step, the others are left alone (block-wise ZO, arXiv 2402.11592).

    Args:
        by: "layer", or a sequence of regular expressions of names. order: "cyclic" or "random". every: steps until the next block.
    """

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        by: str | Sequence[str] = "layer",
        order: str = "cyclic",
        every: int = 1,
        **more: Any,
    ) -> None:
        super().__init__(model_or_params, lr, eps, blocks=blocking.Blocks(by, order, every), **more)


class SparseMeZO(ZOStep):
    """Only the small weights take part, in perturbation and update (Liu et al. 2024, "Sparse MeZO", arXiv 2402.15751).

    Args:
        quantile: the share of each tensor's weights that takes part, smallest first, at the run's start; 0.25 for the paper's sparsity of 75 %.
    """

    def __init__(self, model_or_params: Any, lr: float, eps: float = 1e-3, *, quantile: float = 0.25, **more: Any) -> None:
        super().__init__(model_or_params, lr, eps, direction=directions.MagnitudeSparse(quantile), **more)


class HiZOO(ZOStep):
    """A diagonal of the Hessian preconditions perturbation and update (Zhao et al. 2024, "Second-Order Fine-Tuning without Pain for LLMs",
    arXiv 2402.15173, algorithm 1). Three forwards a step; H is fp32, 4 bytes a weight.

    Args:
        alpha: smoothing of H; 1e-8 is that of the authors' README (github.com/Yanjun-Zhao/HiZOO). What fp32 makes of it: near H = 1 a decrease by alpha H
            rounds to nothing (half a unit is 3e-8), an increase by alpha H kappa z^2 counts where kappa z^2 is above 6. low, high: H is clamped
            to them.
    """

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        alpha: float = 1e-8,
        low: float = 1e-4,
        high: float = 1e4,
        **more: Any,
    ) -> None:
        super().__init__(
            model_or_params,
            lr,
            eps,
            estimator=estimators.ThreePoint(),
            rule=rules.HessianDiagonal(alpha, low, high),
            direction=directions.InverseRoot(),
            **more,
        )


class DiZO(ZOStep):
    """MeZO with learned projections of some layers (Tan et al. 2025, arXiv 2502.03304; see `Projection`, whose arguments these are)."""

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        every: int = 50,
        inner: int = 10,
        inner_eps: float = 0.1,
        inner_lr: float = 0.05,
        tau: float = 0.2,
        layers: Sequence[str] = projections.Projection.layers,
        learn: str = "forward",
        **more: Any,
    ) -> None:
        projection = projections.Projection(every, inner, inner_eps, inner_lr, tau, layers, learn)
        super().__init__(model_or_params, lr, eps, projection=projection, **more)


class LOZO(ZOStep):
    """Directions of low rank, z = U V^T (Chen et al. 2024, "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures",
    arXiv 2410.07698). The update has the paper's 1 / rank. The authors' code has not: its lr is lr / rank here, so that its 1e-7 at rank 2 is 2e-7.

    Args:
        rank: 1 or 2 in the authors' README. every: steps that V is kept for (the paper's nu, 50 or 100).
        momentum: beta of LOZO-M (see `LowRankMomentum`), 0.9 in the authors' scripts; 0: none. The average's weights sum to 1, so lr keeps its meaning.
    """

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        rank: int = 2,
        every: int = 50,
        momentum: float = 0.0,
        **more: Any,
    ) -> None:
        if momentum:
            more = {"rule": rules.LowRankMomentum(momentum), **more}
        super().__init__(model_or_params, lr, eps, direction=directions.LowRank(rank, every), **more)


class FZOO(ZOStep):
    """A batch of one-sided queries along Rademacher directions, the step divided by the standard deviation of their losses (Dang et al. 2025, "FZOO: Fast
    Zeroth-Order Optimizer", arXiv 2506.09034). 1 + queries forwards. Equal losses tell nothing, and the step is skipped.

        g = sum_i (l_i - l_0) z_i / (eps N),  sigma^2 = sum_i (l_i - mean_j l_j)^2 / (N - 1),  theta <- (1 - lr wd) theta - lr g / sigma

    with l_0 = L(theta), l_i = L(theta + eps z_i): the sample deviation of the N perturbed losses, without the clean one, as the authors' page
    (dkmiyan.github.io/FZOO_hp, "Gradient Estimation and Parameter Update") has the paper's equation. Their code (github.com/DKmiyan/FZOO) divides by N
    instead of N - 1 and leaves 1 / eps out: its lr is lr / eps here, up to sqrt(1 - 1 / N).
    """

    def __init__(
        self, model_or_params: Any, lr: float, eps: float = 1e-3, *, queries: int = 8, kind: str = "rademacher", **more: Any
    ) -> None:
        super().__init__(model_or_params, lr, eps, estimator=estimators.OneSided(queries, normalize=True), kind=kind, **more)
