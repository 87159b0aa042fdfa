"""Losses of scores and of log-probabilities, as functions of tensors: for the objectives, and for a closure of one's own.

    from zo_finetune.losses import pair_loss

    def closure(batch):
        return pair_loss(score(model, batch), batch.labels)  # [N, 2] and [N]

Belongs here: arithmetic on tensors. Does not belong here: where scores come from (scoring.py), batches (data.py), which of these a run lowers
(objectives/), losses across the forwards of a step (zo_kernels).

All of them compute in fp32, or in float64 where they are given that, and return 0-d tensors: a step divides a difference of two by 2 eps. None of
them reads a number on the host, so that a CUDA graph can hold them. What is no number stays none: a score that is NaN makes the loss NaN, and so does a batch
of which the loss is the mean of nothing (each says when); a step of zo_kernels whose loss is NaN is skipped and counted, and a batch that teaches
nothing is never taken for one that is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CENTRE = 0.02  # weight of the squared mean score: of 0, 0.02 and others in a spike (docs/learning.md)


def wide(values: Tensor) -> Tensor:
    """In fp32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_shape(name: str, value: Tensor, like: Tensor, dims: int) -> None:
    """Raises ValueError: `value` has another shape than the first `dims` dimensions of `like`, by which it would be repeated and every mean be another."""
    if value.shape != like.shape[:dims] or like.ndim < dims:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, beside {tuple(like.shape)}: give {tuple(like.shape[:dims])}")


def pair_loss(scores: Tensor, labels: Tensor, centre: float = CENTRE) -> Tensor:
    """Does each example score its own label higher, against every other label, than the examples of that label do?

    The mean, over all pairs of examples i, j with different labels a, b, of softplus(-m), m = (s_i[a] - s_i[b]) - (s_j[a] - s_j[b]), plus
    `centre` times `mean_score`. With two labels and f = s[1] - s[0] that is softplus(f_negative - f_positive), the logistic ranking loss.

    What it is consistent for: among the examples of two labels a and b, softplus(-m) is the logistic loss of ranking by s[a] - s[b], whose minimiser is
    log p(a | x) / p(b | x) plus any constant (Gao and Zhou 2015, arXiv 1208.0645: the logistic pairwise loss is consistent with AUC). The scores
    s[a](x) = log p(a | x) + c_a + g(x) are that for all pairs of labels at once, whatever c and g, so no pair pays for another: the loss is consistent with
    the AUC of each label against each other (whose mean is Hand and Till's M, 2001). It does not see the constants c_a, which decide between labels: the
    term of `centre` holds them so that no label has a head start over a batch. That is right where batches hold each label equally often.

    Args:
        scores: [N, K], of each example the score of each label, K at least 2; finite. One score s a row is torch.stack((torch.zeros_like(s), s), 1).
        labels: [N], whole numbers 0 to K - 1.
        centre: at least 0; 0 leaves the term out.

    Returns:
        0-d; NaN where all labels are the same: the mean over no pair.

    Raises:
        ValueError: `scores` has no column for each of two labels, or `labels` has another shape.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores has the shape {tuple(scores.shape)}: give [N, K], one for each label; of one score s a row torch.stack((torch.zeros_like(s), s), 1)"
        )
    check_shape("labels", labels, scores, 1)
    scores = wide(scores)
    own = scores.gather(1, labels[:, None])
    gaps = own - scores[:, labels]  # [i, j]: s_i[label of i] - s_i[label of j]
    differ = labels[:, None] != labels[None, :]
    ranking = torch.where(differ, -logsigmoid(gaps + gaps.T), 0.0).sum() / differ.sum()
    return ranking + centre * mean_score(scores) if centre else ranking


def mean_score(scores: Tensor) -> Tensor:
    """The squared mean, over the examples, of the difference of two labels' scores; averaged over all pairs of labels. With two, (mean of f)^2.

    Args:
        scores: [N, K], K at least 2.
    """
    means = wide(scores).mean(0)
    means = means - means.mean()
    return 2 * means.square().sum() / (len(means) - 1)  # the mean over a < b of (means[a] - means[b])^2


def choice_loss(scores: Tensor, right: Tensor) -> Tensor:
    """Does a right candidate score higher than the wrong ones of the same example?

    Where candidates belong to their example (multiple choice), those of different examples have no common scale, and pairs across examples mean nothing. The
    mean over the examples of the mean of softplus(s[wrong] - s[right]) over their pairs: consistent with the order of two candidates by the odds that
    one is right and the other wrong. An example without a wrong or without a right candidate has no pair and is left out.

    Args:
        scores: [N, C]; -inf where an example has fewer candidates.
        right: bool [N, C].

    Returns:
        0-d; NaN where no example has a pair.

    Raises:
        ValueError: `right` has another shape.
    """
    check_shape("right", right, scores, 2)
    scores = wide(scores)
    wrong = ~right & (scores != -torch.inf)
    pairs = right[:, :, None] & wrong[:, None, :]
    gaps = scores[:, :, None] - torch.where(wrong, scores, 0.0)[:, None, :]
    counts = pairs.sum((1, 2))
    each = torch.where(pairs, -logsigmoid(torch.where(pairs, gaps, 0.0)), 0.0).sum((1, 2)) / counts.clamp(min=1)
    return each.sum() / (counts > 0).sum()


def token_loss(log_probs: Tensor, present: Tensor) -> Tensor:
    """-log p, averaged over all tokens of all answers: a long answer counts more than a short one.

    Args:
        log_probs: [..., T], of each answer's tokens; what stands where none is, is not read.
        present: the same shape, not 0 where there is a token.

    Returns:
        0-d; NaN where there is no token.

    Raises:
        ValueError: `present` has another shape.
    """
    check_shape("present", present, log_probs, log_probs.ndim)
    there = present != 0
    return -torch.where(there, wide(log_probs), 0.0).sum() / there.sum()


def answer_loss(log_probs: Tensor, present: Tensor) -> Tensor:
    """-log p, averaged over the tokens of each answer and then over the answers: each counts the same, whatever its length.

    Arguments as `token_loss`; an answer without tokens is left out.

    Returns:
        0-d; NaN where there is no token.

    Raises:
        ValueError: `present` has another shape.
    """
    check_shape("present", present, log_probs, log_probs.ndim)
    there = present != 0
    counts = there.sum(-1)
    each = torch.where(there, wide(log_probs), 0.0).sum(-1) / counts.clamp(min=1)
    return -each.sum() / (counts > 0).sum()
