"""Runs that are killed and resumed end as runs that were never killed; replays of their journals give the same weights."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune import files, run_folder
from zo_finetune import run as running
from zo_finetune.cli import main
from zo_finetune.config import Config
from zo_finetune.errors import UserError
from zo_finetune.tasks import get_task

from tests.finetune.children import Children
from tests.finetune.conftest import make_rows, write_jsonl
from tests.kernels.cases import same_bits
from zo_kernels import journal

STEPS = 7
CLOCK = {
    *("seconds_per_step", "training_seconds", "evaluation_seconds", "loading_seconds", "peak_memory_bytes", "command"),
}  # fmt: skip
RUNS = {
    "scratch": ["--lr-schedule", "cosine", "--weight-decay", "0.1", "--clip", "5"],
    "inplace": ["--perturbation", "inplace", "--dtype", "bfloat16", "--lr-schedule", "linear"],
    "lazy": ["--perturbation", "lazy", "--dtype", "float16"],
    "lora": ["--peft", "lora", "--accumulate", "2"],
    "prefix": ["--peft", "prefix"],
}


Arguments = Callable[[str, Path], list[str]]


@pytest.fixture(scope="session")
def arguments(train_command: Callable[..., list[str]]) -> Arguments:
    def build(name: str, output: Path) -> list[str]:
        return train_command(output, *RUNS[name], steps=STEPS, lr="1e-3", eval_every=3, seed=5)

    return build


@pytest.fixture(scope="session")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that nobody disturbed, made once; no test changes it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp("whole") / name
            assert main(arguments(name, path)) == 0
            made[name] = path
        return made[name]

    return folder


def state(run: Path) -> tuple[dict[str, Any], list[list[str]], dict[str, torch.Tensor], bytes]:
    """What must not depend on interruptions."""
    result = {k: v for k, v in json.loads((run / "result.json").read_text()).items() if k not in CLOCK}
    with (run / "log.csv").open(newline="") as file:
        log = [row[:4] for row in csv.reader(file)]
    folder = run / ("model" if (run / "model").is_dir() else "adapter")
    records = journal.read(run / files.JOURNAL).records
    fields = ("tag", "flags", "loss", "gradient", "groups")
    return result, log, load_file(next(folder.glob("*.safetensors"))), b"".join(records[field].tobytes() for field in fields)


def assert_same(a: Path, b: Path) -> None:
    (result, log, weights, records), (others, other_log, other_weights, other_records) = state(a), state(b)
    assert result == others
    assert log == other_log
    assert records == other_records
    assert weights.keys() == other_weights.keys() and all(same_bits(weights[n], other_weights[n]) for n in weights)


@pytest.fixture
def killed(children: Children, tmp_path: Path) -> Callable[..., int]:
    """Run a command in a process of its own that gets a signal in its so-manyth loss; returns its wait status."""

    def run(command: list[str], calls: int, how: int = signal.SIGKILL) -> int:
        return children.run(command, tmp_path / "said", calls, how)

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_bits(
    name: str, arguments: Arguments, whole: Callable[[str], Path], killed: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    per_step = 2 * (2 if name == "lora" else 1)
    assert os.WTERMSIG(killed(arguments(name, run), 2 * per_step + 2)) == signal.SIGKILL  # in step 3
    assert len(journal.read(run / files.JOURNAL)) == 2
    # killed once more, with a record that was being written and a log that lags and is torn
    assert os.WTERMSIG(killed(["resume", str(run)], 3 * per_step + 1)) == signal.SIGKILL
    with (run / files.JOURNAL).open("ab") as file:
        file.write(b"half a record")
    lines = (run / "log.csv").read_text().splitlines(keepends=True)
    assert len(lines) == 6
    (run / "log.csv").write_text("".join(lines[:3]) + lines[3][:5])
    capsys.readouterr()
    assert main(["resume", str(run)]) == 0
    assert "resumed after 5 of 7 steps; cut off: 13 of the " in capsys.readouterr().err
    # config.json names the folder; nothing else may differ
    text = (run / "result.json").read_text().replace(str(run), str(whole(name)))
    (run / "result.json").write_text(text)
    assert_same(run, whole(name))
    before = (run / "result.json").read_bytes()
    assert main(["resume", str(run)]) == 0
    assert "is finished after 7 steps" in capsys.readouterr().err
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", ["scratch", "inplace", "lazy"])
def test_an_interrupted_run_goes_on(
    name: str, arguments: Arguments, whole: Callable[[str], Path], killed: Callable[..., int], tmp_path: Path
) -> None:
    """Ctrl-C in the second forward of step 3: what there is is saved, with the interrupted attempt's rounding, and is resumed without."""
    run = tmp_path / "run"
    assert os.WEXITSTATUS(killed(arguments(name, run), 6, signal.SIGINT)) == 130
    result = json.loads((run / "result.json").read_text())
    assert result["interrupted"] and result["steps"] == 2 and result["after"] is None
    out = tmp_path / "replayed"
    assert main(["replay", str(run), "--model", result["hyperparameters"]["model"], "--output", str(out), "--device", "cpu"]) == 0
    saved, replayed = (load_file(folder / "model" / "model.safetensors") for folder in (run, out))
    assert all(same_bits(saved[n], replayed[n]) for n in saved)
    assert main(["resume", str(run)]) == 0
    (run / "result.json").write_text((run / "result.json").read_text().replace(str(run), str(whole(name))))
    assert_same(run, whole(name))


@pytest.mark.parametrize("name", RUNS)
def test_a_journal_is_a_checkpoint(
    name: str, whole: Callable[[str], Path], tmp_path: Path, model_folder: Callable[[str], Path], capsys: Any
) -> None:
    run, model = whole(name), str(model_folder("llama"))
    kind = "adapter" if name in ("lora", "prefix") else "model"
    saved = load_file(next((run / kind).glob("*.safetensors")))
    alone = shutil.copy(run / files.JOURNAL, tmp_path / "shared.zoj")
    for mode in ("sequential", "fused"):
        out = tmp_path / mode
        assert main(["replay", str(alone), "--model", model, "--output", str(out), "--mode", mode, "--device", "cpu"]) == 0
        replayed = load_file(next((out / kind).glob("*.safetensors")))
        assert replayed.keys() == saved.keys()
        assert all(same_bits(saved[n], replayed[n]) for n in saved) or mode == "fused"
        assert all(torch.allclose(saved[n].float(), replayed[n].float(), atol=0.05) for n in saved)
        assert (out / kind / "tokenizer.json").is_file()
    start = tmp_path / "start"
    assert main(["replay", str(run), "--model", model, "--output", str(start), "--upto", "0", "--device", "cpu"]) == 0
    if kind == "model":
        base = load_file(Path(model) / "model.safetensors")
        begun = load_file(start / kind / "model.safetensors")
        assert all(torch.equal(base[n].to(begun[n].dtype), begun[n]) for n in begun)
    capsys.readouterr()
    more = ["--output", str(tmp_path / "no"), "--device", "cpu"]
    assert main(["replay", str(run), "--model", str(model_folder("gpt2")), *more]) == 2
    wrong = capsys.readouterr().err
    assert "not the one that this run started from" in wrong or "--peft" in wrong
    assert main(["replay", str(run), "--model", model, "--upto", "8", *more]) == 2
    assert "--upto 8 must be 0 to 7: so many steps are in " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_resumed_is_said(arguments: Arguments, killed: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    def refused(*command: str) -> str:
        capsys.readouterr()
        assert main(list(command)) == 2
        return capsys.readouterr().err

    run = tmp_path / "run"
    assert "no run began there" in refused("resume", str(tmp_path))
    killed(arguments("scratch", run), 6)

    def marks() -> dict[str, tuple[int, int]]:
        found = [run / name for name in run_folder.FILES if (run / name).exists()]
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    before = marks()
    assert "evaluations.jsonl" in before
    with journal.reopen(run / files.JOURNAL)[0]:
        assert f"is in use by process {os.getpid()}" in refused("resume", str(run))
        assert "is in use by process" in refused(*arguments("scratch", run), "--overwrite")
        assert before == marks()  # they are the other process's
    assert len(journal.read(run / files.JOURNAL)) == 2
    good = json.loads((run / "config.json").read_text())

    def with_config(**changes: Any) -> str:
        (run / "config.json").write_text(json.dumps({**good, "config": {**good["config"], **changes}}))
        return refused("resume", str(run))

    assert "'nonsense' is no option of this version" in with_config(nonsense=1)
    assert "steps='7' is not" in with_config(steps="7")
    assert "save=1 is not" in with_config(save=1)
    assert "columns={'sentence': 1} is not" in with_config(columns={"sentence": 1})
    assert "--batch-size 0 must be greater than 0" in with_config(batch_size=0)
    for changes, said in (  # behind the journal, which has what the run began with
        ({"seed": 6}, "seed is 6, and was 5 when the run began"),
        ({"lr": 0.5}, "lr is 0.5, and was 0.001 when"),
        ({"eps": 0.5}, "eps is 0.5, and was null when"),
        ({"method": "sign"}, 'method is "sign", and was "mezo" when'),
        ({"steps": 9}, "steps is 9, and was 7 when"),
        ({"batch_size": 5}, "batch_size is 5, and was 4 when"),
        ({"clip": None}, "clip is null, and was 5.0 when"),
        ({"lr_schedule": "linear"}, 'lr_schedule is "linear", and was "cosine" when'),
        ({"eval_every": 2}, "eval_every is 2, and was 3 when"),
        ({"dtype": "float16"}, 'dtype is "float16", and was "auto" when'),
    ):
        assert said in with_config(**changes)
    assert f"the model that the run began with, {tmp_path}/gone, is gone: put it back" in with_config(model=str(tmp_path / "gone"))
    assert "the data that the run began with" in with_config(data=str(tmp_path / "gone"))
    (run / "config.json").write_text(json.dumps({"config": good["config"]}))
    assert "must have the keys directory and config" in refused("resume", str(run))
    (run / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused("resume", str(run))
    data = write_jsonl(tmp_path / "train.jsonl", make_rows(80, 9))
    assert "gives other examples than when the run began" in with_config(data=str(data))
    (run / "config.json").write_text(json.dumps(good))
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    (run / "evaluations.jsonl").write_text(lines[0] + "\n")
    assert "lacks evaluations" in refused("resume", str(run))
    assert len(journal.read(run / files.JOURNAL)) == 2


def test_a_replay_says_what_the_journal_lacks(
    whole: Callable[[str], Path], tmp_path: Path, model_folder: Callable[[str], Path], capsys: Any
) -> None:
    """Half a run's weights look like a whole one's."""
    run, model = Path(shutil.copytree(whole("scratch"), tmp_path / "run")), str(model_folder("llama"))
    command = ["replay", str(run), "--model", model, "--device", "cpu", "--output"]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert "recorded for" not in capsys.readouterr().err
    with (run / files.JOURNAL).open("r+b") as file:
        file.truncate((run / files.JOURNAL).stat().st_size - 3)
    assert main([*command, str(tmp_path / "torn")]) == 0
    said = capsys.readouterr().err
    assert f"the run was recorded for 6 of its {STEPS} steps" in said
    assert "bytes of record 6 at its end, where the run was ended: that is left out" in said
    assert main([*command, str(tmp_path / "asked"), "--upto", "2"]) == 0
    assert "recorded for" not in capsys.readouterr().err


SCORE = {"accuracy": 0.5, "accuracy_stderr": 0.1, "loss": 0.7, "examples": 12}
DAMAGED: dict[
    str, tuple[dict[str, Any], dict[str, Any] | None, str]
] = {  # found by the fuzzer: config.json, result.json, what is said
    "no directory": ({"directory": "", "config": {}}, None, "goes on without it"),
    "a directory that is none": ({"directory": "x" * 5000, "config": {}}, None, "goes on without it"),
    "a number beyond floats": ({"directory": "/", "config": {"lr": 10**400}}, None, "lr=1000000"),
    "a seed beyond the noise": (
        {"directory": "/", "config": {"seed": 1 << 64}},
        None,
        "--seed 18446744073709551616 must be below 2^64",
    ),
    "a result without steps": ({}, {"task": "sst2", "interrupted": False}, "result.json is not that of a run"),
    "a result of no run": (
        {},
        {"task": "sst2", "interrupted": 0, "steps": 2, "before": SCORE, "after": SCORE},
        "result.json is not that of a run",
    ),
    "a result of another task": (
        {},
        {"task": "other", "interrupted": False, "steps": 2, "before": SCORE, "after": SCORE},
        "result.json is not that of a run",
    ),
    "a result without its end": (
        {},
        {"task": "sst2", "interrupted": False, "steps": 2, "before": SCORE, "after": None},
        "result.json is not that of a run",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    saved, result, said = DAMAGED[name]
    config = dataclasses.asdict(Config(model="m", task="sst2", data="d", output="o"))

    def load(config: Config, **more: Any) -> Any:
        raise UserError("goes on without it")

    monkeypatch.setattr(running, "load", load)
    (tmp_path / files.JOURNAL).touch()
    files.write_json(tmp_path / "config.json", {"directory": "/", **saved, "config": {**config, **saved.get("config", {})}})
    if result is not None:
        files.write_json(tmp_path / "result.json", result)
    assert main(["resume", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_evaluations_that_are_none_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    good = [{"before": SCORE}, {"dev": {"step": 0, **SCORE, "predicted": {"no": 1.0}, "auc": None}}, {"dev": {"step": 1, **SCORE}}]
    for bad in (
        *(
            {"dev": {**good[2]["dev"], key: value}}
            for key, value in (("step", "1"), ("step", True), ("accuracy", 10**400), ("auc", "x"))
        ),
        *({"dev": {"step": 1, **{k: v for k, v in SCORE.items() if k != key}}} for key in SCORE),
        {"dev": {"step": 1, **SCORE, "predicted": [1.0]}},
        {"before": {"accuracy": 0.5}},
        {},
        3,
    ):
        path.write_text("".join(json.dumps(line) + "\n" for line in (*good[:2], bad, good[2])))
        assert run_folder.Evaluations(path, get_task("sst2")).read() == (SCORE, [good[1]["dev"]])
        assert run_folder.Evaluations(path, get_task("sst2")).recover(9) == (SCORE, [good[1]["dev"]])
    path.write_text(json.dumps(good[0]) + "\n" + "[" * 100_000)
    assert run_folder.Evaluations(path, get_task("sst2")).recover(9) == (SCORE, [])


def test_times_that_are_none_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss,projected_gradient,lr,seconds\n1,,,,nan\n2,,,,-1\n3,,,,1.5\n4,,,,inf\n5,," + "x" * 200_000)
    assert run_folder.Log.seconds(path) == {3: 1.5}
