"""`zk.perturbed`: the model at theta + eps z outside of a step, and theta after it.

Belongs here: what forwards see within the block, and what is left behind. Does not belong here: how a view works (test_views.py).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.models import make, tokens

EPS = 1e-2
MODES: dict[str, dict[str, Any]] = {
    "scratch": {"perturbation": "scratch"},
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
}


def loss_of(model: nn.Module) -> Tensor:
    ids = tokens()
    return nn.functional.cross_entropy(model(input_ids=ids).logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def memory(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they lie there: of a lazy run, ahead."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def interrupted(_: Tensor) -> None:
    raise KeyboardInterrupt


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(same_bits(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_forwards_see_the_perturbed_weights_and_the_run_hears_nothing(mode: str, dtype: torch.dtype) -> None:
    """Between the steps of a run, whose later steps have the bits that they would have had."""
    model = make("llama", dtype)
    step = zk.MeZOStep(model, lr=1e-3, eps=EPS, seed=4, **MODES[mode])
    step.step(lambda: loss_of(model))
    alone = copy.deepcopy((model, step))
    before, rng = memory(model), torch.get_rng_state()
    for tag, sign in ((1, 1.0), (1, -1.0), (77, 0.5), (3, 0)):
        by_hand = copy.deepcopy((model, step))
        by_hand[1].flush()
        if sign:
            for name, p in by_hand[0].named_parameters():
                zk.perturb_([p], [(tag, sign * EPS)], seed=4, streams=[step.stream_of(name)])
        with torch.no_grad():
            wanted = loss_of(by_hand[0])
        with zk.perturbed(step, tag, sign):
            assert torch.equal(loss_of(model), wanted) and torch.equal(loss_of(model), wanted)
        assert unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), rng) and step.steps == 1
    step.step(lambda: loss_of(model))
    alone[1].step(lambda: loss_of(alone[0]))
    assert unchanged(model, memory(alone[0]))


def test_both_sides_are_a_steps() -> None:
    """And those of a method with masks and a block are what its next step will see."""
    for make_step in (zk.MeZOStep, lambda *a, **k: zk.BlockwiseZO(*a, direction=zk.RandomSparse(0.3), **k), zk.LOZO):
        model = make("llama")
        step = make_step(model, lr=1e-3, eps=EPS, seed=2)
        for _ in range(2):
            (tag,) = step.tags_of(step.steps)
            losses = []
            for sign in (1, -1):
                with zk.perturbed(step, tag, sign):
                    losses.append(float(loss_of(model)))
            step.step(lambda model=model: loss_of(model))
            assert float(step.projected_gradient) == (losses[0] - losses[1]) / (2 * float(torch.tensor(EPS)))


@pytest.mark.parametrize("mode", MODES)
def test_whatever_ends_the_block_the_weights_are_back(mode: str) -> None:
    model = make("llama")
    step = zk.MeZOStep(model, lr=1e-3, eps=EPS, **MODES[mode])
    before = memory(model)
    with pytest.raises(KeyboardInterrupt), zk.perturbed(step, 5):
        interrupted(loss_of(model))
    assert unchanged(model, before)
    with zk.perturbed(step, 5):
        for inside in (lambda: step.step(lambda: loss_of(model)), lambda: zk.perturbed(step, 6).__enter__()):
            with pytest.raises(RuntimeError, match="under way"):
                inside()
    with pytest.raises(RuntimeError, match="was written to"), zk.perturbed(step, 5):
        next(model.parameters()).mul_(2)
    if mode != "scratch":
        assert unchanged(model, before)
    step.step(lambda: loss_of(model))
    assert step.steps == 1


def test_what_makes_no_sense_is_refused() -> None:
    model = make("llama")
    step = zk.MeZOStep(model, lr=1e-3)
    for wrong, words in (
        (lambda: zk.perturbed(step, -1), "tag"),
        (lambda: zk.perturbed(step, 0, float("nan")), "sign"),
        (lambda: zk.perturbed(zk.ForwardGrad(model, lr=1e-3), 0), "another estimator"),
    ):
        with pytest.raises(ValueError, match=words), wrong():
            pass


def test_eval_brings_a_lazy_runs_weights_back() -> None:
    model, flushed = make("llama"), make("llama")
    steps = [zk.MeZOStep(m, lr=1e-3, perturbation="inplace", lazy=True) for m in (model, flushed)]
    for step, m in zip(steps, (model, flushed), strict=True):
        step.train()
        step.step(lambda m=m: loss_of(m))
    steps[0].eval()
    assert not unchanged(model, memory(flushed))
    steps[1].flush()
    assert unchanged(model, memory(flushed))
