"""losses.py against loops in float64, and what each loss does not change with.

Belongs here: the functions of tensors. Does not belong here: objectives and batches that use them (test_pairs.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zo_finetune.losses import CENTRE, answer_loss, choice_loss, mean_score, pair_loss, token_loss

seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Scores [n, k] and labels, at least two of them different."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=generator)
    labels[:2] = torch.tensor([0, 1])
    return torch.randn(n, k, generator=generator, dtype=torch.float64) * 3, labels


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def pairs_by_a_loop(scores: Tensor, labels: Tensor, centre: float) -> float:
    s, y = scores.tolist(), labels.tolist()
    n, k = range(len(s)), range(len(s[0]))
    terms = [
        softplus(-((s[i][y[i]] - s[i][y[j]]) - (s[j][y[i]] - s[j][y[j]]))) for i, j in product(n, n) if y[i] != y[j]
    ]  # each pair twice, with the same term
    gaps = [sum(row[a] - row[b] for row in s) / len(s) for a, b in product(k, k) if a < b]
    return sum(terms) / len(terms) + centre * sum(gap**2 for gap in gaps) / len(gaps)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 9), st.integers(2, 4), st.sampled_from((0.0, CENTRE, 1.5)))
def test_pairs_are_those_of_a_loop(seed: int, n: int, k: int, centre: float) -> None:
    scores, labels = drawn(seed, n, k)
    expected = pairs_by_a_loop(scores, labels, centre)
    assert pair_loss(scores, labels, centre).item() == pytest.approx(expected, rel=1e-12)
    single = pair_loss(scores.float(), labels, centre)
    # A margin is four scores, each rounded to fp32 and added with three roundings: it is off by at most 16 max|s| 2^-24. The slope of log(1 + exp(-m)) is at
    # most its value, so that this is the relative error of a pair's loss, however small; 1e-5 for what follows.
    relative = 16 * scores.abs().max().item() * 2.0**-24 + 1e-5
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=relative)
    assert pair_loss(scores.bfloat16(), labels).dtype == torch.float32


def test_pairs_of_two_labels_are_the_logistic_ranking_loss() -> None:
    scores, labels = drawn(3, 11, 2)
    f = scores[:, 1] - scores[:, 0]
    expected = torch.nn.functional.softplus(f[labels == 0][:, None] - f[labels == 1][None, :]).mean()
    assert pair_loss(scores, labels, 0.0).item() == pytest.approx(expected.item(), rel=1e-12)
    assert mean_score(scores).item() == pytest.approx(f.mean().item() ** 2, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 9), st.integers(2, 4))
def test_pairs_see_neither_a_labels_constant_nor_an_examples(seed: int, n: int, k: int) -> None:
    """s[a](x) + c_a + g(x): the same order. The centre's term sees c alone; the order of the examples is nothing."""
    scores, labels = drawn(seed, n, k)
    generator = torch.Generator().manual_seed(seed + 1)
    c, g = torch.randn(k, generator=generator, dtype=torch.float64), torch.randn(n, 1, generator=generator, dtype=torch.float64)
    order = torch.randperm(n, generator=generator)
    moved = (scores + c + g)[order]
    assert pair_loss(moved, labels[order], 0.0).item() == pytest.approx(pair_loss(scores, labels, 0.0).item(), rel=1e-11)
    assert mean_score(scores + g).item() == pytest.approx(mean_score(scores).item(), rel=1e-9, abs=1e-12)
    level = scores - scores.mean(0)
    assert mean_score(level).item() < 1e-24 < mean_score(level + torch.arange(k))


def test_pairs_are_lowest_at_the_posterior() -> None:
    """Examples x of three kinds with p(label | x), each label as often as it has weight: the gradient is 0 at log p + c + g, elsewhere not."""
    counts = torch.tensor([[6, 3, 1], [2, 2, 6], [2, 5, 3]])  # of each kind, each label; the sums of the columns are the same
    kinds, labels = zip(*((x, a) for x in range(3) for a in range(3) for _ in range(counts[x, a])), strict=True)
    posterior = (counts.double() / counts.sum(1, keepdim=True)).log()
    table = (posterior + torch.tensor([0.3, -2.0, 1.0]) + torch.tensor([[1.0], [0.0], [-4.0]])).requires_grad_()
    pair_loss(table[list(kinds)], torch.tensor(labels), 0.0).backward()
    assert table.grad is not None and table.grad.abs().max() < 1e-12
    other = (posterior * 1.5).requires_grad_()
    pair_loss(other[list(kinds)], torch.tensor(labels), 0.0).backward()
    assert other.grad is not None and other.grad.abs().max() > 1e-3


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(2, 5))
def test_choices_are_those_of_a_loop(seed: int, n: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, width, generator=generator, dtype=torch.float64) * 3
    right = torch.rand(n, width, generator=generator) < 0.4
    gone = torch.rand(n, width, generator=generator) < 0.3
    right[0, :2], gone[0, :2] = torch.tensor([True, False]), False
    right &= ~gone
    scores[gone] = -torch.inf
    each = []
    for row, is_right, is_gone in zip(scores.tolist(), right.tolist(), gone.tolist(), strict=True):
        wrong = [s for s, r, x in zip(row, is_right, is_gone, strict=True) if not r and not x]
        if terms := [softplus(w - s) for s, r in zip(row, is_right, strict=True) if r for w in wrong]:
            each.append(sum(terms) / len(terms))
    scores.requires_grad_()
    loss = choice_loss(scores, right)
    assert loss.item() == pytest.approx(sum(each) / len(each), rel=1e-12)
    loss.backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    moved = scores.detach() + torch.randn(n, 1, generator=generator, dtype=torch.float64)  # candidates of an example only
    assert choice_loss(moved, right).item() == pytest.approx(loss.item(), rel=1e-11)


def test_losses_of_tokens_and_of_answers() -> None:
    log_probs = torch.tensor([[[-1.0, -2.0, -6.0], [-4.0, 9.0, 9.0]]])
    present = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]])
    assert token_loss(log_probs, present).item() == 13 / 4
    assert answer_loss(log_probs, present).item() == (3 + 4) / 2
    one = torch.cat((log_probs, torch.full((1, 2, 3), torch.nan))), torch.cat((present, torch.zeros(1, 2, 3)))
    assert token_loss(*one).item() == 13 / 4 and answer_loss(*one).item() == (3 + 4) / 2  # an answer without tokens
    assert token_loss(log_probs.half(), present).dtype == answer_loss(log_probs.bfloat16(), present).dtype == torch.float32


def test_the_mean_of_nothing_is_no_number() -> None:
    """Not 0, which would pass for a batch that is learned."""
    scores = torch.randn(3, 2)
    assert pair_loss(scores, torch.tensor([1, 1, 1])).isnan() and pair_loss(scores * torch.nan, torch.tensor([0, 1, 1])).isnan()
    assert choice_loss(scores, torch.ones(3, 2, dtype=torch.bool)).isnan()
    assert choice_loss(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[True, False]])).isnan()
    assert choice_loss(torch.tensor([[0.0, torch.nan]]), torch.tensor([[True, False]])).isnan()
    assert token_loss(scores, torch.zeros(3, 2)).isnan() and answer_loss(scores, torch.zeros(3, 2)).isnan()


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (pair_loss, torch.tensor([1])),
        (pair_loss, torch.tensor([[0], [1], [1]])),
        (choice_loss, torch.tensor([[True, False]])),
        (choice_loss, torch.tensor([[True], [False], [True]])),
        (token_loss, torch.ones(2)),
        (token_loss, torch.ones(3, 1)),
        (token_loss, torch.ones(1, 3, 2)),
        (answer_loss, torch.ones(2)),
        (answer_loss, torch.ones(3, 1)),
    ],
)
def test_another_shape_is_refused(loss: Callable[..., Tensor], other: Tensor) -> None:
    """It would be repeated, and the mean be one of other counts."""
    with pytest.raises(ValueError, match=r"has the shape \(.*\), beside \(3, 2\): give \(3"):
        loss(torch.randn(3, 2), other)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 2)])
def test_pairs_want_a_score_of_each_label(shape: tuple[int, ...]) -> None:
    """Of one score a row, as a ranker has it, the message says what to give; that has the loss of the two labels' difference."""
    with pytest.raises(ValueError, match=r"scores has the shape \(3.*torch\.stack\(\(torch\.zeros_like\(s\), s\), 1\)"):
        pair_loss(torch.randn(shape), torch.tensor([0, 1, 1]))


def test_one_score_a_row_is_ranked() -> None:
    s, labels = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0, 1, 1])
    f = torch.tensor([1.5, -1.5])  # of the row of label 0 the score less those of label 1
    expected = torch.nn.functional.softplus(f).mean() + 0.02 * s.mean() ** 2
    assert torch.isclose(pair_loss(torch.stack((torch.zeros_like(s), s), 1), labels, 0.02), expected)
