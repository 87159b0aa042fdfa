"""Rewards, or losses, as numbers without a scale: what is compared with what, and nothing else.

Belongs here: functions of tensors. Does not belong here: which losses of a step they are for (`Shaped` in estimators.py).

Each of them has mean 0 over what it compares, and so says nothing where it is taken of one evaluation alone: a closure that returns the mean of its own
shaped rewards returns 0 at every point. They are for numbers of several evaluations: the losses of a step's queries (`Shaped` does that), or the rewards
of answers drawn once a step, in which a closure weighs log-probabilities, -(advantages * log_probs).mean().

Equal rewards give 0: nothing tells them apart, and 0 / 0 is not asked. One that is not finite makes all that are compared with it NaN, as a step with such a
loss is skipped; and so do rewards that differ so much that a square overflows, by which z-scores would all be 0. The host reads nothing. fp32 or wider,
whatever the rewards are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(rewards: Tensor) -> Tensor:
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def _over(centred: Tensor, spread: Tensor, differ: Tensor) -> Tensor:
    """Quotients; 0 where nothing differs, NaN where the spread is an infinity."""
    finite = torch.where(spread == torch.inf, torch.nan, spread)
    return torch.where(differ, centred / finite, centred * 0)


def z_scored(rewards: Tensor, dim: int = -1) -> Tensor:
    """(r - mean) / s along a dimension, s the sample standard deviation (n - 1 in the denominator).

    Returns:
        The rewards' shape.
    """
    r = _wide(rewards)
    centred = r - r.mean(dim, keepdim=True)
    differ = r.amax(dim, keepdim=True) != r.amin(dim, keepdim=True)  # NaN differs: it stays
    spread = (centred.square().sum(dim, keepdim=True) / max(r.shape[dim] - 1, 1)).sqrt()
    return _over(centred, spread, differ)


def ranked(rewards: Tensor, dim: int = -1) -> Tensor:
    """Centred ranks along a dimension, from -1/2 (the lowest) to 1/2, equal ones the mean of theirs: as evolution strategies shape fitness (Salimans et al.
    2017, arXiv 1703.03864, section 2.1). A monotone map of the rewards changes nothing. n^2 comparisons.

    Returns:
        The rewards' shape; 0 where there is one reward.
    """
    r = _wide(rewards).movedim(dim, -1)
    above = (r[..., :, None] > r[..., None, :]).sum(-1) - (r[..., :, None] < r[..., None, :]).sum(-1)
    ranks = above.to(r.dtype) / (2 * max(r.shape[-1] - 1, 1))
    finite = r.isfinite().all(-1, keepdim=True)
    return torch.where(finite, ranks, torch.nan).movedim(-1, dim)


def group_relative(rewards: Tensor, groups: Tensor) -> Tensor:
    """The advantages of GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): (r - mean) / s among the rewards of the same group, as `z_scored`; a reward
    alone in its group gives 0. n^2 comparisons.

    Args:
        rewards: [n]. groups: [n], whole numbers, such as the number of the prompt that an answer is of.

    Returns:
        [n].

    Raises:
        ValueError: another shape, which would be repeated.
    """
    if rewards.ndim != 1 or groups.shape != rewards.shape:
        raise ValueError(
            f"rewards have the shape {tuple(rewards.shape)} and groups {tuple(groups.shape)}: give [n] both, a group for each reward"
        )
    r = _wide(rewards)
    same = groups[:, None] == groups[None, :]
    counts = same.sum(-1)
    theirs = torch.where(same, r[None, :], 0.0)
    centred = r - theirs.sum(-1) / counts
    spread = (
        torch.where(same, (r[None, :] - theirs.sum(-1, keepdim=True) / counts[:, None]).square(), 0.0).sum(-1)
        / (counts - 1).clamp(min=1)
    ).sqrt()
    differ = (same & (r[None, :] != r[:, None])).any(-1)
    return _over(centred, spread, differ)
