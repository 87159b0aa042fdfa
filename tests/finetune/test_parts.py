"""The parts of a run as functions, as a suite calls them: the same numbers as a run with its folder, which they never see."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune.config import Config
from zo_finetune.evaluate import describe, evaluate, is_evaluation
from zo_finetune.load import Loaded, load
from zo_finetune.run import run
from zo_finetune.train import Optimizer, Progress, Stopwatch, make_optimizer, train


class Memory:
    """Rows of a training without a file."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def write(self, rows: Iterable[Sequence[float]]) -> None:
        self.losses += (row[1] for row in rows)

    def close(self) -> None:
        pass


@pytest.fixture
def config(model_folder: Callable[[str], Path], data_folder: Path, tmp_path: Path) -> Config:
    return Config(
        model=str(model_folder("llama")), task="sst2", data=str(data_folder), output=str(tmp_path / "run"), device="cpu", steps=4,
        batch_size=4, dev_examples=6, eval_examples=10, eval_every=2, lr=1e-3, lr_schedule="linear", save=False,
    )  # fmt: skip


def trained(loaded: Loaded, optimizer: Optimizer) -> tuple[dict[str, Any], list[float], list[int], dict[str, Any]]:
    rows, watched = Memory(), []
    with loaded.scorer() as scorer:
        before = evaluate(loaded.task, scorer, loaded.eval_set, 3)
        progress = Progress(rows, loaded.config.steps, optimizer, loaded.language_model.device)
        train(loaded, optimizer, scorer, progress, Stopwatch(), watched.append)
        return before, rows.losses, watched, evaluate(loaded.task, scorer, loaded.eval_set, 3)


def test_the_parts_are_the_run(config: Config, tmp_path: Path) -> None:
    result = run(config, ["here"])
    loaded = load(config)
    before, losses, watched, after = trained(loaded, make_optimizer(loaded.language_model, config))
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        assert losses == [float(row["loss"]) for row in csv.DictReader(file)]
    assert watched == [h["step"] for h in result["history"]] == [0, 2, 4]
    for mine, its in ((before, result["before"]), (after, result["after"])):
        assert mine.keys() == its.keys() and mine["predicted"] == its["predicted"]
        for name in ("accuracy", "loss", "auc"):
            assert mine[name] == pytest.approx(its[name])  # in batches of another size
        assert is_evaluation(loaded.task, json.loads(json.dumps(mine))) and describe(loaded.task, mine).startswith("accuracy ")
    assert result["command"] == ["here"] and result["saved"] is None


def test_a_model_that_is_loaded_serves_several_evaluations(config: Config) -> None:
    first = load(config)
    other = load(replace(config, seed=1, eval_examples=4), first.language_model)
    assert other.language_model is first.language_model and len(other.eval_set) == 4
    with other.scorer() as scorer:
        assert evaluate(other.task, scorer, other.eval_set, 2)["examples"] == 4


class Backpropagation(torch.optim.SGD):
    """An optimizer of another kind, which gives a run no more than `train.Optimizer` asks for."""

    skipped, steps = 0, 0
    projected_gradient = torch.zeros(())

    def step(self, closure: Any, batches: Sequence[Any]) -> torch.Tensor:
        self.zero_grad()
        loss = torch.stack([closure(batch) for batch in batches]).mean()
        loss.backward()
        super().step()
        self.steps += 1
        return loss.detach()

    def movement(self) -> float:
        return math.nan

    def block(self) -> None:
        pass

    def state_bytes(self) -> int:
        return 0

    def open_journal(self, path: Any, **more: Any) -> Any:
        raise NotImplementedError

    def close_journal(self) -> None:
        pass


def test_another_kind_of_optimizer_is_trained_with(config: Config) -> None:
    loaded = load(replace(config, steps=20, batch_size=16, eval_every=0))
    before, losses, watched, after = trained(loaded, Backpropagation(loaded.language_model.model.parameters(), 0.05))
    assert len(losses) == 20 and not watched
    assert after["loss"] < before["loss"]
