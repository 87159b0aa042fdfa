"""Every method on a real architecture with adapters and a learning-rate schedule: recorded, replayed onto the base, resumed."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.models import loss_of, make, tokens
from tests.optim.test_device_numbers import METHODS

CASES = [(name, mode) for name in METHODS for mode in ("inplace", "scratch") if (name, mode) != ("forward-gradient", "inplace")]


def some_factors(model: torch.nn.Module) -> zk.InputFactors:
    """Of every other trained matrix."""
    draw = torch.Generator().manual_seed(3)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2]
    return zk.InputFactors({n: torch.randn(p.shape[1], 2, generator=draw) for n, p in trained[::2]})


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_adapters_and_schedules(name: str, mode: str, tmp_path: Path) -> None:
    base, ids, path = make("lora", torch.bfloat16), tokens(), tmp_path / "run.zoj"
    methods = {
        **METHODS,
        "input-subspace": functools.partial(zk.FZOO, lr=1e-4, queries=3, direction=zk.InputSubspace(some_factors(base))),
    }

    def run(model: Any, steps: int, **more: Any) -> zk.ZOStep:
        step = methods[name](model, seed=5, perturbation=mode, journal=path, **more)
        done = step.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(step, lambda k: 1 / (1 + done + k))
        for _ in range(done, steps):
            assert step.step(lambda: loss_of(model, ids)).isfinite()
            schedule.step()
        step.close_journal()
        return step

    whole = copy.deepcopy(base)
    run(whole, 6)
    path.rename(tmp_path / "whole.zoj")
    run(copy.deepcopy(base), 3)
    resumed = copy.deepcopy(base)
    assert run(resumed, 6, resume=True).steps == 6
    replayed = copy.deepcopy(base)
    zk.replay(replayed, path)
    moved = False
    for start, a, b, c in zip(base.parameters(), whole.parameters(), resumed.parameters(), replayed.parameters(), strict=True):
        assert same_bits(a, b) and same_bits(a, c)
        moved |= not same_bits(a, start)
        assert a.requires_grad or same_bits(a, start), "a frozen weight moved"
    assert moved
