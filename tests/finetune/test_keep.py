"""Which weights a run keeps: the journal's bits of the chosen step, also after a kill; what chooses, and what never does."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from zo_finetune import files, keep
from zo_finetune import run as running
from zo_finetune.cli import main
from zo_finetune.config import Config
from zo_finetune.data import load_splits
from zo_finetune.errors import UserError
from zo_finetune.files import BEST
from zo_finetune.tasks import get_task
from zo_finetune.tasks.sst2 import SST2

from tests.finetune.children import Children
from tests.kernels.cases import same_bits

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def arguments(train_command: Callable[..., list[str]]) -> Arguments:
    """Steps so long that the dev loss goes up again: the best is neither the first nor the last."""

    def build(output: Path, *more: str, **options: Any) -> list[str]:
        return train_command(output, *more, **{"steps": 6, "lr": "3e-2", "eval_every": 2, "seed": 1, "keep": "best", **options})

    return build


@pytest.fixture(scope="session")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed; no test changes it."""
    folder = tmp_path_factory.mktemp("keep") / "run"
    assert main(arguments(folder)) == 0
    return folder


def result(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / "result.json")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (found,) = [p for name in ("model", "adapter") for p in (folder / name).glob("*.safetensors")]
    return load_file(found)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def best_of(history: list[dict[str, Any]], by: str = "loss") -> int:
    worst = {"loss": math.inf}.get(by, -math.inf)
    values = [worst if e[by] is None else e[by] for e in history]
    return int(history[values.index(min(values) if by == "loss" else max(values))]["step"])


METHODS = {
    "inplace": ["--perturbation", "inplace", "--dtype", "bfloat16"],
    "lazy": ["--perturbation", "lazy"],
    "lora": ["--peft", "lora", "--lr", "3e-1"],
    "dizo": ["--method", "dizo", "--option", "every=2"],
}


@pytest.mark.parametrize("name", METHODS)
def test_the_best_weights_are_the_journals_at_that_step(
    name: str, arguments: Arguments, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    assert main(arguments(tmp_path / "run", *METHODS[name])) == 0
    told = result(tmp_path / "run")
    step = best_of(told["history"])
    assert told["kept"] == {"step": step, "by": "loss", "value": told["history"][step // 2]["loss"], "split": "dev"}
    replay = ["replay", str(tmp_path / "run"), "--model", str(model_folder("llama")), "--device", "cpu", "--upto", str(step)]
    assert main([*replay, "--output", str(tmp_path / "again")]) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "again"))
    assert told["steps"] == 6 and not (tmp_path / "run" / BEST).exists()


def test_a_replay_to_the_end_says_that_another_step_was_kept(
    whole: Path, model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay = ["replay", str(whole), "--model", str(model_folder("llama")), "--device", "cpu", "--output"]
    assert main([*replay, str(tmp_path / "again")]) == 0
    said = capsys.readouterr()
    assert "these are the weights after the last step, and the run kept those of its best evaluation" in said.err
    assert said.out == f"the weights of the whole journal are in {tmp_path / 'again' / 'model'}\n"
    assert main([*replay, str(tmp_path / "two"), "--upto", "2"]) == 0
    assert capsys.readouterr().out == f"the weights after 2 steps are in {tmp_path / 'two' / 'model'}\n"


def test_the_best_are_other_weights_than_the_last(whole: Path, arguments: Arguments, tmp_path: Path) -> None:
    """In the run of these tests, which walks off, so that its last is not its best; everything before the choice is the same."""
    best = result(whole)
    assert best["kept"]["step"] < 6  # which one it is depends on the order in which a processor's matrix products add
    assert main(arguments(tmp_path / "last", keep="last")) == 0
    last = result(tmp_path / "last")
    assert last["kept"] == {"step": 6, "by": "last", "value": None, "split": None}
    assert last["history"] == best["history"] and last["before"] == best["before"] and last["after"] != best["after"]
    assert not same(weights(whole), weights(tmp_path / "last"))


def test_another_number_may_choose(arguments: Arguments, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(tmp_path / "run", "--no-save", keep_by="accuracy")) == 0
    told = result(tmp_path / "run")
    assert told["kept"]["step"] == best_of(told["history"], "accuracy")
    assert told["kept"]["by"] == "accuracy"
    capsys.readouterr()
    for options, message in (
        ({"keep_by": "predicted"}, "--keep-by 'predicted' must be one of accuracy, loss"),
        ({"keep_by": "acuracy"}, "did you mean 'accuracy'"),
        ({"keep": "last", "keep_by": "loss"}, "--keep-by 'loss' says which evaluation is the best, and --keep is last"),
        ({"dev_examples": 0, "eval_every": None}, "with --dev-examples 0 there are none"),
        ({"eval_every": 0}, "with --eval-every 0 there are none"),
    ):
        assert main(arguments(tmp_path / "refused", **options)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_what_is_best() -> None:
    history = [
        {"step": k, "loss": loss, "accuracy": a}
        for k, (loss, a) in enumerate([(None, 0.5), (0.4, 0.9), (0.3, 0.9), (math.nan, 0.1), (0.3, 0.2)])
    ]
    assert keep.best(history, "loss")["step"] == 2
    assert keep.best(history, "accuracy")["step"] == 1
    assert keep.best(history[:1], "loss") is None


def test_a_task_without_a_number_to_choose_by() -> None:
    class Told(SST2):
        metrics = ("predicted",)

    with pytest.raises(UserError, match=r"no metric of task sst2 \(predicted\) says what is better"):
        keep.criterion(None, Told())


def test_a_killed_run_keeps_what_one_never_killed_does(
    whole: Path, arguments: Arguments, tmp_path: Path, children: Children
) -> None:
    assert children.run(arguments(tmp_path / "run"), tmp_path / "stderr", calls=9) == signal.SIGKILL
    assert main(["resume", str(tmp_path / "run")]) == 0
    one, other = result(whole), result(tmp_path / "run")
    for name in ("kept", "before", "after", "history"):
        assert one[name] == other[name]
    assert same(weights(whole), weights(tmp_path / "run"))


def test_ctrl_c_between_training_and_the_end(
    whole: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As the base model is loaded again, there are no weights to save: the run goes on from its journal."""
    load_model = keep.load_model

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keep, "load_model", interrupted)
    assert main(arguments(tmp_path / "run")) == 130
    assert "go on with: zo-finetune resume" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr(keep, "load_model", load_model)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert same(weights(whole), weights(tmp_path / "run"))


@pytest.mark.parametrize("perturbation", ["scratch", "lazy"])
def test_there_are_never_two_models(
    perturbation: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the base model is loaded again, no weight of the trained one is left in memory."""
    storages: list[StorageWeakRef] = []
    load, load_model = running.load, keep.load_model

    def noted(config: Config, **more: Any) -> Any:
        loaded = load(config, **more)
        storages.extend(StorageWeakRef(p.untyped_storage()) for p in loaded.language_model.model.parameters())
        return loaded

    def looked(config: Config) -> Any:
        assert storages and all(storage.expired() for storage in storages)
        storages.clear()
        return load_model(config)

    monkeypatch.setattr(running, "load", noted)
    monkeypatch.setattr(keep, "load_model", looked)
    assert main(arguments(tmp_path / "run", perturbation=perturbation)) == 0
    assert not storages


@pytest.mark.parametrize("method", ["hybrid", "adam"])
def test_without_a_journal_the_best_weights_are_on_the_disk(
    method: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the model at that evaluation; the copy goes at the end."""
    copies: dict[int, dict[str, torch.Tensor]] = {}
    saw = keep.Keeper.saw

    def noted(self: keep.Keeper, history: list[dict[str, Any]]) -> None:
        saw(self, history)
        copies[history[-1]["step"]] = {name: p.detach().clone() for name, p in self.loaded.language_model.model.named_parameters()}
        assert self.path.exists()

    monkeypatch.setattr(keep.Keeper, "saw", noted)
    assert main(arguments(tmp_path / "run", method=method)) == 0
    told = result(tmp_path / "run")
    step = best_of(told["history"])
    assert told["kept"]["step"] == step < 6
    kept = weights(tmp_path / "run")
    assert kept and all(same_bits(kept[name], copies[step][name]) for name in kept)
    assert any(not same_bits(kept[name], copies[6][name]) for name in kept)
    assert not list((tmp_path / "run").glob("best*"))


def test_a_copy_that_cannot_be_written_ends_the_run(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keep.os, "fsync", full)
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="No space"):
        keep.write(torch.nn.Linear(2, 2), tmp_path / "x" / BEST)
    assert not any((tmp_path / "x").iterdir())


def test_the_evaluation_rows_choose_nothing(
    arguments: Arguments, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked at before the first step and after the last, and no training batch or dev evaluation has one of them."""
    events: list[tuple[str, Any]] = []
    answers_of, train = running.answers_of, running.train

    def noted(task: Any, scorer: Any, examples: Any, *more: Any) -> Any:
        events.append(("evaluate", [e.inputs for e in examples]))
        return answers_of(task, scorer, examples, *more)

    def training(loaded: Any, *more: Any) -> None:
        events.append(("begin", [e.inputs for e in loaded.train_set]))
        train(loaded, *more)
        events.append(("end", None))

    monkeypatch.setattr(running, "answers_of", noted)
    monkeypatch.setattr(running, "train", training)
    assert main(arguments(tmp_path / "run")) == 0
    kinds = [kind for kind, _ in events]
    assert kinds == ["evaluate", "begin", *["evaluate"] * 4, "end", "evaluate"]
    test = {inputs for inputs in events[0][1]}
    assert events[0] == events[-1]
    for kind, seen in events[1:-1]:
        assert kind == "end" or test.isdisjoint(seen)
    wanted = load_splits(
        str(data_folder), get_task("sst2"), "causal", dev_examples=8, eval_examples=12, train_examples=1000, seed=1
    )
    assert (len(test), wanted.origin["eval"].endswith("validation.jsonl")) == (12, True)


def test_a_comparison_takes_the_loss_of_what_is_kept(train_command: Callable[..., list[str]], tmp_path: Path) -> None:
    options = {"steps": None, "methods": "mezo,adam", "forwards": 12, "seeds": "1", "points": 3, "lr": "mezo=3e-2", "keep": "best"}
    assert main(train_command(tmp_path / "all", command="compare", **options)) == 0
    told = files.read_json(tmp_path / "all" / "compare.json")
    for run in told["runs"]:
        (folder,) = (tmp_path / "all" / "runs" / run["method"]).iterdir()
        one = result(folder)
        assert run["dev_loss"] == one["kept"]["value"] == min(e["loss"] for e in one["history"])


def test_a_base_model_that_changes_meanwhile_is_refused(
    arguments: Arguments, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    load_model = keep.load_model

    def changed(config: Config) -> Any:
        found = load_model(config)
        next(iter(found.model.parameters())).data[0, 0] += 1
        return found

    monkeypatch.setattr(keep, "load_model", changed)
    assert main(arguments(tmp_path / "run")) == 2
    assert "--keep best: " in capsys.readouterr().err
