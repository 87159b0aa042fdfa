"""Shaped rewards: against loops in float64, and what they do not change with.

Belongs here: functions of tensors. Does not belong here: the estimator that shapes a step's losses (test_methods.py, test_estimators.py).
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zo_kernels as zk

values = st.lists(st.integers(-20, 20).map(lambda x: x / 8), min_size=1, max_size=9)


def scored_by_a_loop(rewards: list[float]) -> list[float]:
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    return [(r - statistics.fmean(rewards)) / statistics.stdev(rewards) for r in rewards]


def ranked_by_a_loop(rewards: list[float]) -> list[float]:
    places = [[k for k, r in enumerate(sorted(rewards)) if r == own] for own in rewards]
    return [statistics.fmean(p) / (len(rewards) - 1) - 0.5 if len(rewards) > 1 else 0.0 for p in places]


@settings(max_examples=50, deadline=None)
@given(values)
def test_scores_and_ranks_are_those_of_loops(rewards: list[float]) -> None:
    r = torch.tensor(rewards, dtype=torch.float64)
    scored, ranks = zk.z_scored(r), zk.ranked(r)
    assert scored.tolist() == pytest.approx(scored_by_a_loop(rewards), abs=1e-12)
    assert ranks.tolist() == pytest.approx(ranked_by_a_loop(rewards), abs=1e-15)
    assert torch.equal(zk.ranked(r), zk.ranked(r.exp() * 3 + r**3))  # a monotone map
    assert torch.equal(zk.ranked(-r), -ranks)
    assert torch.allclose(zk.z_scored(4 * r + 1), scored, atol=1e-12) and torch.allclose(zk.z_scored(-r), -scored, atol=1e-12)
    assert zk.z_scored(r.bfloat16()).dtype == zk.ranked(r.half()).dtype == zk.ranked(r.long()).dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-20, 20).map(lambda x: x / 8)), min_size=1, max_size=12))
def test_a_groups_advantages_are_its_own(drawn: list[tuple[int, float]]) -> None:
    groups, rewards = torch.tensor([g for g, _ in drawn]), torch.tensor([r for _, r in drawn], dtype=torch.float64)
    found = zk.group_relative(rewards, groups)
    for group in groups.unique():
        mine = groups == group
        assert torch.allclose(found[mine], zk.z_scored(rewards[mine]), atol=1e-12)


def test_equal_rewards_and_such_that_are_no_numbers() -> None:
    same = torch.full((3,), 0.1)
    groups = torch.tensor([0, 0, 0])
    assert zk.z_scored(same).tolist() == zk.ranked(same).tolist() == zk.group_relative(same, groups).tolist() == [0.0] * 3
    for wrong in (torch.nan, torch.inf, -torch.inf):
        bad = torch.tensor([1.0, wrong, 2.0])
        assert zk.z_scored(bad).isnan().all() and zk.ranked(bad).isnan().all() and zk.group_relative(bad, groups).isnan().all()
        assert (
            zk.group_relative(torch.tensor([1.0, wrong, 2.0, 3.0]), torch.tensor([0, 1, 0, 1])).isnan().tolist()
            == [False, True] * 2
        )


def test_a_spread_beyond_fp32_is_no_number() -> None:
    """And not 0, which would pass for rewards that are all the same."""
    far = torch.tensor([0.5, 0.7, -3e38])
    assert zk.z_scored(far).isnan().all() and zk.group_relative(far, torch.zeros(3)).isnan().all()
    assert zk.z_scored(far.double()).isfinite().all()


def test_groups_of_another_shape_are_refused() -> None:
    rewards, groups = torch.randn(4), torch.tensor([0, 0, 1, 1])
    for r, g in (
        (rewards, groups[:1]),
        (rewards[:1], groups),
        (rewards, groups[:, None]),
        (rewards[:, None], groups),
        (rewards.view(2, 2), groups[:2]),
    ):
        with pytest.raises(ValueError, match="a group for each reward"):
            zk.group_relative(r, g)


def test_along_a_dimension() -> None:
    r = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shape in (zk.ranked, zk.z_scored):
        for dim in range(3):
            lines, mine = (x.movedim(dim, -1).reshape(-1, r.shape[dim]) for x in (r, shape(r, dim)))
            assert torch.allclose(mine, torch.stack([shape(line) for line in lines]), atol=1e-14)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"shape": "rank"}, ValueError, "shape='rank': give one of ranked, z-scored"),
        ({"queries": 1}, ValueError, "one loss has none beside it"),
        ({"queries": 0}, ValueError, "at least 1"),
        ({"mirrored": 1}, TypeError, "mirrored=1 must be True or False"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        zk.Shaped(**options)
    assert zk.Shaped(1, mirrored=True).points() == [[(0, 1.0)], [(0, -1.0)]] and len(zk.Shaped(3).points()) == 3
