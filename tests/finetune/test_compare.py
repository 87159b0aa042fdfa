"""`zo-finetune compare`: which runs it makes, what it writes, what it keeps after Ctrl-C, what it refuses."""

from __future__ import annotations

import csv
import errno
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from zo_finetune import cached, files, inputs, run_folder
from zo_finetune import compare as comparing
from zo_finetune import model as models
from zo_finetune.cli import main
from zo_finetune.objectives.classification import Classification
from zo_finetune.run import run
from zo_finetune.tasks import get_task

from tests.finetune.calls import Calls
from tests.finetune.conftest import write_jsonl
from zo_kernels import journal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(train_command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    def build(methods: str, *more: str, forwards: int = 12, seeds: str = "0,1") -> list[str]:
        own = {"methods": methods, "forwards": forwards, "seeds": seeds, "points": 2, "steps": None}
        return train_command(tmp_path / "out", *more, command="compare", dev_examples=6, eval_examples=4, **own)

    return build


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_methods_and_two_seeds(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ctrl-C in the third run keeps two; the same command goes on, and ends as if nothing had been."""
    arguments = command("mezo,fzoo:queries=3", "--lr", "mezo=1e-3")
    calls = Calls(12 + 12 + 5)
    monkeypatch.setattr(Classification, "loss", calls.of(Classification.loss))
    assert main(arguments) == 130
    out = tmp_path / "out"
    assert [(row["method"], row["seed"]) for row in rows_of(out)] == [("mezo", "0"), ("fzoo:queries=3", "0")]
    assert "2 runs are finished and kept" in capsys.readouterr().err
    kept = {path: path.read_bytes() for path in out.glob("runs/*/*seed0/result.json")}
    assert len(kept) == 2
    calls.stop = 0
    assert main(arguments) == 0
    assert all(path.read_bytes() == content for path, content in kept.items())
    rows = rows_of(out)
    assert [(row["method"], row["seed"], row["steps"], row["forwards"]) for row in rows] == [
        ("mezo", "0", "6", "12"), ("fzoo:queries=3", "0", "3", "12"), ("mezo", "1", "6", "12"), ("fzoo:queries=3", "1", "3", "12"),
    ]  # fmt: skip
    assert {(row["method"], row["lr"]) for row in rows} == {("mezo", "0.001"), ("fzoo:queries=3", "5e-09")}
    for seed in "01":  # the same data: the same model, evaluated on the same examples
        assert len({row["accuracy_before"] + row["loss_before"] for row in rows if row["seed"] == seed}) == 1
    content = json.loads((out / "compare.json").read_text())
    assert not content["interrupted"] and len(content["runs"]) == 4
    assert content["methods"]["fzoo:queries=3"] == {"queries": 3, "kind": "rademacher"}
    mezo = content["curves"]["mezo"]
    assert [run["seed"] for run in mezo] == [0, 1]
    assert [point[0] for point in mezo[0]["dev"]] == [0, 6, 12]
    assert [point[0] for point in content["curves"]["fzoo:queries=3"][0]["dev"]] == [0, 8, 12]
    table = (out / "table.md").read_text()
    assert len(re.findall(r"\n\| mezo \| 12 \| 12 \| \d+ \| 0.001 \|", table)) == 1 and table in capsys.readouterr().out
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Without a journal, only finished runs are kept; here all of them are.
    calls.made = 0
    assert main(arguments) == 0 and calls.made == 0
    assert main([*arguments, "--batch-size", "5"]) == 2
    assert "has a run with another batch_size" in capsys.readouterr().err


def test_learning_rates_are_chosen_on_the_dev_examples(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest loss on them at the end; the run that was chosen serves as that of the first seed."""
    assert main(command("hybrid", "--lr-factors", "1e4,1", forwards=10)) == 0
    out = tmp_path / "out"
    content = json.loads((out / "compare.json").read_text())
    tuned = content["tuned"]["hybrid"]
    assert list(tuned) == ["0.01", "1e-06"] and len(set(tuned.values())) == 2
    best = min(tuned, key=tuned.__getitem__)
    assert [(row["lr"], row["seed"]) for row in content["runs"]] == [(float(best), 0), (float(best), 1)]
    assert content["runs"][0]["dev_loss"] == tuned[best]
    assert {path.name for path in (out / "runs" / "hybrid").iterdir()} == {"lr0.01-seed0", "lr1e-06-seed0", f"lr{best}-seed1"}


def test_state_is_counted(command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of state for a trained weight, of methods that have none, one and two numbers, a bit, and copies of two layers' matrices."""
    wanted = "mezo,momentum,momentum:state=recomputed,zo-adam,sparse,hizoo,dizo"
    assert main(command(wanted, "--points", "0", forwards=6, seeds="0")) == 0
    found = {row["method"]: (int(row["state_bytes"]), int(row["trained_weights"])) for row in rows_of(tmp_path / "out")}
    weights = found["mezo"][1]
    assert {name: size for name, (size, _) in found.items() if name not in ("sparse", "dizo")} == {
        "mezo": 0, "momentum": 4 * weights, "momentum:state=recomputed": 0, "zo-adam": 8 * weights, "hizoo": 4 * weights,
    }  # fmt: skip
    assert weights / 8 <= found["sparse"][0] <= weights / 8 + 100
    assert found["dizo"][0] == 2 * 2 * 32 * 32 * 4  # query and value of two layers


@pytest.mark.parametrize(
    ("methods", "more", "reason"),
    [
        ("mezo,mezo", [], "--methods: give at least one, and none twice"),
        ("mezo,nonsense", [], "--method 'nonsense' must be one of"),
        ("mezo:queries", [], "'queries' must be KEY=VALUE"),
        ("mezo:rank=2", [], "--method mezo has no option 'rank'"),
        ("mezo", ["--lr", "sign=1e-3"], "--lr sign=0.001: --methods has no 'sign'"),
        ("mezo", ["--lr", "mezo=-1"], "--lr -1.0 must be at least 0"),
        ("mezo,conservative", ["--forwards", "4"], "--forwards 4: a step of conservative needs 5"),
        ("mezo", ["--lr-factors", "1,0"], "--lr-factors must be finite and greater than 0"),
        ("mezo", ["--lr-factors", "1,2", "--points", "0"], "--lr-factors and --lr-grid choose by the dev examples"),
        ("mezo", ["--seeds", "1,1"], "--seeds: give at least one, and none twice"),
        ("mezo", ["--points", "-1"], "--points -1 must be at least 0"),
        ("mezo", ["--forwards", "4,4"], "--forwards: give at least one, and none twice"),
        ("mezo", ["--objectives", "loss,loss"], "--objectives: give at least one, and none twice"),
        ("mezo", ["--objective", "loss", "--objectives", "pairs"], "--objective loss is none of --objectives: leave it out"),
        ("mezo,sign", ["--baseline", "sing"], "--baseline 'sing' must be one of --methods; did you mean 'sign'"),
        ("mezo", ["--lr-grid", "1e-3,1e-2", "--lr", "mezo=1"], "--lr-grid has the rates of every method: leave out --lr"),
        ("mezo", ["--lr-grid", "0,1"], "--lr-grid must be finite and greater than 0"),
        ("mezo@loss@loss", [], "--methods mezo@loss@loss: behind @ is one objective, and one number of forwards"),
        ("mezo@pears", [], "--methods mezo@pears: it is none of --objectives (loss) and --forwards (12): add it there"),
        ("mezo@6", [], "--methods mezo@6: it is none of --objectives (loss) and --forwards (12): add it there"),
        ("mezo,mezo@loss", [], "--methods: give at least one, and none twice"),
        ("mezo", ["--lr-seeds", "3"], "--lr-seeds 3: there are 2 --seeds"),
        ("mezo", ["--lr-by", "f1"], "--lr-by 'f1' must be one of accuracy, loss, auc"),
    ],
)
def test_what_is_refused(
    methods: str, more: list[str], reason: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    assert main(command(methods, *more)) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_objectives_are_above_a_task_files(tmp_path: Path) -> None:
    """Each run has its own, and none of them the file's in its place."""
    file = tmp_path / "mood.toml"
    file.write_text('name = "mood"\nprompt = "{text}"\nwords = ["No", "Yes"]\nobjective = "accuracy"\n')
    base = {"model": "m", "data": "d", "task_file": str(file), "output": ""}
    own: dict[str, Any] = {"methods": "mezo", "forwards": [4], "seeds": [0], "output": str(tmp_path / "out")}
    for objectives, wanted in ((None, ["accuracy"]), (["loss", "pairs"], ["loss", "pairs"])):
        plan = comparing.plan_of(own | {"objectives": objectives}, base)
        plan.check()
        assert [plan.config(one, 0).settled().objective for one in plan.contenders] == wanted


@pytest.mark.parametrize(
    ("methods", "more", "reason"),
    [
        ("mezo,dizo", ["--peft", "ln"], "--method dizo: "),
        ("mezo", ["--seeds", "0,4000", "--column", "sentence=absent"], "absent"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    methods: str,
    more: list[str],
    reason: str,
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(Classification, "loss", lambda *_: pytest.fail("a step was taken"))
    assert main(command(methods, *more)) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["runs", "runs/mezo", "runs/mezo/lr1e-06-seed0", "runs/mezo/lr1e-06-seed0/log.csv"])
def test_folders_that_lead_elsewhere_are_refused(name: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    assert main(command("mezo")) == 2
    assert f"{link} is a link; a run has a " in capsys.readouterr().err
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_benchmark_of_the_documentation(
    model_folder: Callable[[str], Path], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/compare.py: a CSV with the documented columns and without a path, a figure, a table in a page."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    out, page = tmp_path / "compare.csv", tmp_path / "page.md"
    page.write_text("before\n<!-- table compare -->\nold\n<!-- end -->\nafter\n")
    script = [
        "compare.py",
        "--model",
        str(model_folder("llama")),
        "--data",
        str(data_folder),
        "--work",
        str(tmp_path / "work"),
        "--quick",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [*script, "--out", str(out), "--figures", str(tmp_path), "--page", str(page), "--methods", "sign", "--peft", "ln"],
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / "compare.py"), run_name="__main__")
    assert end.value.code == 0
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    listed = {key: columns.split() for key, columns in re.findall(r"^- `([\w.]+)`: `([\w ]+)`", text, re.MULTILINE)}
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert reader.fieldnames == listed["machine"] + listed["compare.csv"]
    assert [(row["method"], row["seed"], row["steps"], row["peft"]) for row in rows] == [
        ("sign", "0", "5", "ln"),
        ("sign", "1", "5", "ln"),
    ]
    assert str(tmp_path) not in out.read_text()
    assert (tmp_path / "compare-ln.png").read_bytes().startswith(b"\x89PNG")
    filled = page.read_text()
    assert filled.startswith("before\n") and filled.endswith("\nafter\n") and "| sign | 10 | 10 |" in filled and "old" not in filled


@pytest.mark.parametrize("option", [["--lr", "1e-3"], ["--seeds", "a"], ["--lr-factors", "1,,2"]])
def test_what_the_parser_refuses(option: list[str], command: Callable[..., list[str]]) -> None:
    with pytest.raises(SystemExit) as end:
        main(command("mezo", *option))
    assert end.value.code == 2


def test_an_unfinished_run_without_a_journal_begins_anew(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "loss", Calls(5).of(Classification.loss))
    arguments = command("hybrid", forwards=10, seeds="0")
    assert main(arguments) == 130
    assert not (tmp_path / "out" / "compare.csv").exists()
    assert main(arguments) == 0
    assert [row["steps"] for row in rows_of(tmp_path / "out")] == ["2"]
    assert tuple(rows_of(tmp_path / "out")[0]) == comparing.columns(get_task("sst2"))


@pytest.fixture
def compared(command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One finished run, which a next comparison keeps."""
    assert main(command("mezo", forwards=4, seeds="0")) == 0
    return next((tmp_path / "out" / "runs").rglob("result.json")).parent


def test_finished_runs_that_were_changed_are_refused_before_the_first_step(
    compared: Path, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    good = {name: (compared / name).read_bytes() for name in ("result.json", "log.csv")}
    monkeypatch.setattr(Classification, "loss", lambda *_: pytest.fail("a step was taken"))
    result = json.loads(good["result.json"])
    damaged = [
        (("result.json", json.dumps({k: v for k, v in result.items() if k != name}).encode()))
        for name in ("history", "forwards", "versions")
    ]
    damaged += [
        ("result.json", json.dumps(result | {"weights": 3}).encode()),
        ("result.json", json.dumps(result | {"history": [{"step": "x"}]}).encode()),
    ]
    damaged += [
        ("log.csv", b""),
        ("log.csv", b"step,loss\n1,\xff\n"),
        ("log.csv", b"step,loss\nx,y\n"),
        ("log.csv", b"a,b\n1,2\n"),
        ("log.csv", None),
    ]
    for name, content in damaged:
        (compared / name).unlink() if content is None else (compared / name).write_bytes(content)
        assert main(command("mezo,sign", forwards=4, seeds="0")) == 2, (name, content)
        assert "are not as the run wrote them" in capsys.readouterr().err.splitlines()[-1]
        (compared / name).write_bytes(good[name])
    assert main(command("mezo", forwards=4, seeds="0")) == 0


@pytest.mark.parametrize("name", comparing.OWN)
def test_what_a_comparison_did_not_write_is_kept(
    name: str, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Classification, "loss", lambda *_: pytest.fail("a step was taken"))
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    assert main(command("mezo")) == 2
    assert f"its {name} would be replaced, and no comparison wrote that" in capsys.readouterr().err
    (out / name).unlink()
    for made in (out / name, out / f"{name}.part"):
        made.mkdir()
        assert main(command("mezo")) == 2
        assert f"{made} is a folder; a run has a plain file there" in capsys.readouterr().err
        made.rmdir()


def test_a_table_that_could_not_be_written_is_said(
    compared: Path, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    assert main(command("mezo", forwards=4, seeds="0")) == 2
    assert "free space there, then give the same command again" in capsys.readouterr().err.splitlines()[-1]


def test_an_option_given_twice_is_refused(command: Callable[..., list[str]], capsys: Any) -> None:
    """The table would say both, and the run would be of the last."""
    assert main(command("mezo:queries=2:queries=4")) == 2
    assert "--methods mezo:queries=2:queries=4: queries is given twice" in capsys.readouterr().err
    assert main(command("mezo", "--lr", "mezo=1e-3", "--lr", "mezo=1e-4")) == 2
    assert "--lr mezo is given twice" in capsys.readouterr().err


def test_runs_have_the_bits_that_they_have_alone(
    command: Callable[..., list[str]], tmp_path: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the model, the rows and the hidden states of what is frozen, each made once."""
    made = {"models": 0, "states": 0, "looks": 0}

    def counting(what: str, own: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made[what] += 1
            return own(*args, **kwargs)

        return call

    monkeypatch.setattr(models, "load", counting("models", models.load))
    monkeypatch.setattr(cached, "filled", counting("states", cached.filled))
    monkeypatch.setattr(inputs, "look", counting("looks", inputs.look))
    methods = "mezo,adamw@loss,fzoo-inputs:rank=2"
    arguments = command(
        methods,
        "--train-blocks",
        "last:1",
        "--cache",
        "memory",
        "--objectives",
        "loss,pairs",
        "--lr",
        "mezo=1e-2",
        "--lr",
        "adamw=1e-2",
        forwards=45,
    )
    assert main(arguments) == 0
    assert made == {"models": 1, "states": 2, "looks": 2}  # of two seeds' rows
    out = tmp_path / "out"
    folders = sorted(out.glob("runs/*/*seed1"))
    assert len(folders) == 5
    for folder in folders:
        config = replace(run_folder.saved_config(folder), output=str(tmp_path / "alone" / folder.parent.name))
        run(config)
        alone = Path(config.output)
        for name in ("evaluations.jsonl", "scores_before.csv", "scores_dev.csv", "scores_after.csv"):
            assert (alone / name).read_bytes() == (folder / name).read_bytes(), (folder, name)
        if (folder / files.JOURNAL).exists():
            mine, other = (journal.read(f / files.JOURNAL) for f in (folder, alone))
            assert mine.header.fingerprint == other.header.fingerprint
            names = [name for name in mine.steps.dtype.names if name != "crc"]  # which is of the file
            assert all(mine.steps[name].tobytes() == other.steps[name].tobytes() for name in names), folder


def test_a_table_is_of_one_data_set_and_one_model(
    command: Callable[..., list[str]], model_folder: Callable[[str], Path], data_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """What changes behind finished runs is noticed before another run is made."""
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(data_folder, data)
    shutil.copytree(model_folder("llama"), model)

    def made(methods: str, seeds: str) -> int:
        return main([*command(methods, seeds=seeds, forwards=4), "--data", str(data), "--model", str(model)])

    assert made("mezo", "0") == 0
    before = (data / "validation.jsonl").read_text()
    (data / "validation.jsonl").write_text(
        before.replace('"label": 1', '"label": 2').replace('"label": 0', '"label": 1').replace('"label": 2', '"label": 0')
    )
    capsys.readouterr()
    for methods, seeds in (("mezo,sign", "0"), ("mezo", "0,1"), ("mezo", "0")):  # the last has nothing left to make
        assert made(methods, seeds) == 2
        assert "has a result of other examples than --data" in (said := capsys.readouterr().err) and "(eval rows)" in said
    (data / "validation.jsonl").write_text(before)
    weights = load_file(model / "model.safetensors")
    save_file({name: t * 1.5 for name, t in weights.items()}, model / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert made("mezo", "0,1") == 2
    assert "the model is not the one that this run started from" in capsys.readouterr().err
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert made("mezo,sign", "0,1") == 0


@pytest.mark.parametrize("methods", ["sgd", "mezo"])
def test_a_table_without_journals_or_of_adapters_is_of_one_data_set_and_one_model(
    methods: str,
    command: Callable[..., list[str]],
    model_folder: Callable[[str], Path],
    data_folder: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """sgd notes no rows in a journal; an adapter's first weights are of a seed."""
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(data_folder, data)
    shutil.copytree(model_folder("llama"), model)
    more = ["--peft", "lora"] if methods == "mezo" else []
    arguments = [*command(methods, *more, forwards=6), "--data", str(data), "--model", str(model), "--seeds"]
    assert main([*arguments, "0"]) == 0
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows.replace("film", "book"))
    capsys.readouterr()
    assert main([*arguments, "0,1"]) == 2
    assert "(train rows)" in capsys.readouterr().err
    (data / "train.jsonl").write_text(rows)
    if more:
        weights = load_file(model / "model.safetensors")
        save_file({name: t * 1.5 for name, t in weights.items()}, model / "model.safetensors", {"format": "pt"})
        assert main([*arguments, "0,1"]) == 2
        assert "the model is not the one that this run started from" in capsys.readouterr().err
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert main([*arguments, "0,1"]) == 0
    shutil.rmtree(data)  # what is finished is shown without
    capsys.readouterr()
    assert main([*arguments, "0,1"]) == 0
    assert "cannot be looked at" in capsys.readouterr().err


def test_a_rate_that_nothing_chose_is_said_to_be_that(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    """The dev examples hold one label, and have no AUC."""
    rows = [{"sentence": f"{k} the film is fine", "label": 1} for k in range(40)] + [{"sentence": "the film is dull", "label": 0}]
    for name in ("train", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    arguments = command("mezo", "--lr-grid", "1e-3,1e-4", "--lr-by", "auc", "--data", str(tmp_path), forwards=4, seeds="0")
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert (
        "mezo: with no learning rate is the auc of the dev examples a number; the first is taken, and none was chosen" in said.err
    )
    assert "Of mezo it is the first, and none was chosen" in said.out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["tuned"] == {"mezo": {"0.001": None, "0.0001": None}}


@pytest.mark.parametrize(
    "more",
    [("--task", "copa", "--objective", "pairs"), ("--batch-size", "24")],
    ids=["two inputs an example", "more than there are"],
)
def test_the_frozen_part_is_counted_in_batches(
    more: tuple[str, ...], command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rows that block 0 runs, beside the rows of a batch that block 1 runs in a step."""
    rows: dict[int, list[int]] = {0: [], 1: []}
    read = models.load

    def hooked(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        for k, block in enumerate(found.model.model.layers):
            block.register_forward_hook(lambda m, args, output, k=k: rows[k].append(args[0].shape[0]))
        return found

    monkeypatch.setattr(models, "load", hooked)
    for name, start in (("train", 0), ("validation", 100)):
        lines = [{"sentence": f"{k} the film is fine", "label": k % 2} for k in range(start, start + 20)]
        if more[0] == "--task":
            own = {"choice1": "The cast is great", "choice2": "It was terrible and cold", "question": "cause"}
            lines = [{"premise": line["sentence"], "label": line["label"], **own} for line in lines]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    options = ("--train-blocks", "last:1", "--cache", "memory", "--data", str(tmp_path), "--points", "0", *more)
    assert main(command("mezo", *options, forwards=4, seeds="0")) == 0
    (row,) = rows_of(tmp_path / "out")
    config = json.loads(next((tmp_path / "out").glob("runs/*/*/result.json")).read_text())
    kept, batch = config["cache"]["examples"], 4 * 2 if more[0] == "--task" else config["data"]["train"]["rows"]
    assert batch in rows[1] and float(row["frozen_forwards"]) == round(kept / batch, 1)
