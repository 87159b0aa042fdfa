"""`zo-finetune suite`: its plan, what it leaves out and why, what it keeps after a kill, the arithmetic of its table, what it refuses."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import console, suite_plan, suite_table
from zo_finetune.cli import main
from zo_finetune.errors import UserError
from zo_finetune.metrics.best_threshold import best_accuracy
from zo_finetune.objectives.classification import Classification
from zo_finetune.suite_table import COLUMNS, Table
from zo_finetune.suites import SUITES, Column
from zo_finetune.tasks import get_task

from tests.finetune.calls import Calls
from tests.finetune.children import Children
from tests.finetune.conftest import make_rows, write_jsonl

ROOT = Path(__file__).parents[2]
VARYING = ("seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def untabled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is most of the time of a small suite: it is drawn where a test asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(suite_table, "draw", lambda path, *_: path.write_bytes(b""))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sst2 as a folder of splits, copa as one file of extras, rte without a column."""
    root = tmp_path_factory.mktemp("root")
    rows = make_rows(90, 1)
    for name, part in (("train", rows[:60]), ("validation", rows[60:])):
        (root / "sst2").mkdir(exist_ok=True)
        write_jsonl(root / "sst2" / f"{name}.jsonl", part)
    (root / "extras" / "copa_small").mkdir(parents=True)
    words = {"premise": "the film is dull {}.", "choice1": "It is cold.", "choice2": "It is warm.", "question": "cause"}
    copa = [{k: v.format(n) for k, v in words.items()} | {"label": n % 2} for n in range(30)]
    write_jsonl(root / "extras" / "copa_small" / "all.jsonl", copa)
    (root / "rte").mkdir()
    write_jsonl(root / "rte" / "train.jsonl", [{"premise": "a film", "label": 0}] * 9)
    return root


@pytest.fixture
def command(model_folder: Callable[[str], Path], root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def build(
        methods: str | None, *more: str, suite: str = "mezo", model: str = "llama", tasks: str | None = "sst2,copa"
    ) -> list[str]:
        sizes = {
            "steps": 2,
            "batch-size": 2,
            "train-examples": 36,
            "dev-examples": 4,
            "eval-examples": 6,
            "points": 1,
            "seeds": "0,1",
        }
        fixed = {"suite": suite, "model": model_folder(model), "data": root, "output": tmp_path / "out", "device": "cpu"}
        given = fixed | sizes | {"methods": methods, "tasks": tasks}
        return ["suite", *(w for name, value in given.items() if value is not None for w in (f"--{name}", str(value))), *more]

    return build


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def settled(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in VARYING} for row in rows_of(folder)]


# ---- the table -------------------------------------------------------------------------------------------------------------------


def made_row(task: str, column: str, seed: int, score: float, **more: Any) -> dict[str, Any]:
    known = {"suite": "mezo", "source": "ours", "model": "m", "title": column.upper(), "metric": "accuracy", "majority": 0.5}
    return {name: "" for name in COLUMNS} | known | {"task": task, "column": column, "seed": seed, "score": score} | more


def test_the_tables_arithmetic() -> None:
    """Standard errors by hand, marks, means without WSC, the paper's figures; from a CSV file as from memory."""
    rows = [
        made_row("sst2", "mezo", 0, 0.60, stderr=0.03, examples=200, threshold=0.65),
        made_row("sst2", "mezo", 1, 0.64, stderr=0.04, examples=200, threshold=0.67),
        made_row("copa", "mezo", 0, 0.70, stderr=0.05, examples=100, majority=None),
        made_row("copa", "mezo", 1, 0.80, stderr=0.05, examples=100, majority=None),
        made_row("wsc", "mezo", 0, 0.50, stderr=0.05, examples=104, majority=0.635),
        *suite_table.paper_rows(SUITES["mezo"], ["sst2", "copa", "wsc"]),
    ]
    table = Table(rows, ("wsc",))
    found = table.scores["sst2", "mezo"]
    assert found.mean == pytest.approx(0.62) and found.over_rows == pytest.approx(math.sqrt((0.03**2 + 0.04**2) / 2))
    assert found.over_seeds == pytest.approx(0.02)  # the sample deviation of 0.60 and 0.64 is 0.02 sqrt(2), over sqrt(2)
    assert table.scores["wsc", "mezo"].over_seeds is None
    assert table.averaged == ["sst2", "copa"]
    mean = table.average("mezo")
    assert mean.mean == pytest.approx((0.62 + 0.75) / 2) and mean.over_seeds == pytest.approx(0.035)  # of 0.65 and 0.72
    assert mean.over_rows == pytest.approx(math.sqrt((0.03**2 + 0.04**2) / 2 + 0.05**2) / 2)
    text = suite_table.page(rows, ("wsc",))
    assert "| MEZO | 62.0 ± 3.5 ± 2.0 (t) | 75.0 ± 5.0 ± 5.0 | 50.0 ± 5.0 (m) | 68.5 ± 3.1 ± 3.5 |\n" in text
    assert "| *MEZO, the paper's OPT-13B* | *91.4* | *88.0* | *63.5* | *89.7* |\n" in text
    assert "| majority rate | 50.0 |  | 63.5 |  |\n" in text and "| best zero-shot threshold | 66.0 |  |  |  |\n" in text
    assert "MeZO (arXiv 2305.17333), table 1, OPT-13B: of another model" in text and "Mean: over sst2, copa." in text
    assert suite_table.page([*csv.DictReader(io.StringIO(suite_table.to_csv(rows), newline=""))], ("wsc",)) == text


def test_the_zero_shot_column_has_no_mark_of_its_own_threshold() -> None:
    rows = [made_row("sst2", column, 0, 0.6, stderr=0.1, examples=9, threshold=0.6) for column in ("zero-shot", "probe")]
    assert [Table(rows, ()).marks("sst2", column) for column in ("zero-shot", "probe")] == ["", " (t)"]


def test_the_best_threshold() -> None:
    """Against every line between two margins, ties included."""
    draw = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 40):
        margins, labels = torch.randint(-3, 4, (n,), generator=draw).float(), torch.randint(0, 2, (n,), generator=draw)
        lines = [-9.0, *(m + 0.5 for m in range(-4, 5))]
        best = max(((margins > t).long() == labels).double().mean().item() for t in lines)
        assert best_accuracy(margins, labels) == pytest.approx(best)
    assert best_accuracy(torch.tensor([1.0, math.nan]), torch.tensor([0, 1])) is None


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_whole(name: str) -> None:
    suite = SUITES[name]
    ways = [suite_plan.Way.of(column) for column in suite.columns]
    assert len({way.label for way in ways}) == len(ways) == len({way.column.title for way in ways})
    assert {*suite.scores} <= {*suite.tasks} and {len(row) for row in suite.scores.values()} <= {len(ways)}
    for task in suite.tasks:
        assert "masked" in get_task(task).forms or not name.startswith("mezo-masked")
    assert all(suite.paper_score(task, way.label) is not None for task in suite.scores for way in ways)
    assert suite.paper_score("sst2", "sign:queries=9") is None
    assert not {"task", "data", "peft", "method", "seed"} & {*suite.options}


# ---- the plan --------------------------------------------------------------------------------------------------------------------


def test_the_plan(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    """What there is, what is left out and why, what it costs; nothing is written."""
    assert main(command("zero-shot,in-context,mezo,adam", "--plan", tasks="sst2,copa,rte,wic")) == 0
    text = capsys.readouterr().out
    assert "14 cells, 0 of them finished; seeds 0, 1" in text
    assert "| sst2 |" in text and "| 36 | 4 | 6 |" in text and "| copa |" in text and "/copa_small/all.jsonl |" in text
    assert "\nleft out: wic: no rows: there is no wic or extras/wic* in " in text
    assert "\nleft out: rte: " in text and "needs premise, hypothesis, label" in text
    assert "\nleft out: copa, in-context: 32 demonstrations are drawn from the training rows, and there are 20\n" in text
    assert "\nsst2: with 32 demonstrations a prompt has about " in text
    assert "| mezo | 2 | 1e-06 | 0.001 | 4 |" in text and "| adam | 2 | 1e-05 |  | 6 |" in text
    # 2 seeds x 2 tasks x (4 + 6) passes; rows: 6 before and after, 4 at two points; of the baselines 6 each
    assert "about 40 forward passes of a training batch and 196 rows evaluated" in text
    assert not (tmp_path / "out").exists()


def test_one_cell_is_one(command: Callable[..., list[str]], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what takes long says what it is about, however short its parts are."""
    said: list[str] = []

    class Phase(console.Phase):
        def __enter__(self) -> console.Phase:
            said.append(self.what)
            return super().__enter__()

    class Counter(console.Counter):
        def advance(self, n: int, note: str = "") -> None:
            said.append(f"{self.what}: {self.done + n} of {self.total}, {note}")
            super().advance(n, note)

    monkeypatch.setattr(console, "Phase", Phase)
    monkeypatch.setattr(console, "Counter", Counter)
    assert main(command("zero-shot", "--plan", "--seeds", "1", tasks="sst2")) == 0
    assert ": 1 cell, 0 of them finished; seeds 1" in capsys.readouterr().out
    assert said[-2:] == ["tokenizing the rows of sst2", "looking at the rows: 1 of 1, sst2, seed 1"]


def test_a_masked_model(command: Callable[..., list[str]], capsys: Any) -> None:
    assert main(command("zero-shot,in-context,dizo:layers=nowhere", "--plan", model="roberta")) == 0
    text = capsys.readouterr().out
    assert "left out: copa: task copa has no prompt for a masked model, only for: causal" in text
    assert "left out: sst2, in-context: demonstrations are text that a causal model goes on with, and this model is masked" in text
    assert "left out: dizo:layers=nowhere: --method dizo: " in text and "2 cells" in text


def test_where_rows_are(tmp_path: Path) -> None:
    sst2 = get_task("sst2")
    assert suite_plan.find("hub", sst2) == ("nyu-mll/glue", "sst2")
    for made, wanted in (
        ("extras/sst2_small/all.jsonl", "extras/sst2_small/all.jsonl"),
        ("extras/sst2/train32.jsonl", "extras/sst2"),
        ("sst2.jsonl", "sst2.jsonl"),
        ("sst2/train.jsonl", "sst2"),
    ):  # each is preferred to those before it
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / made, make_rows(3, 0))
        assert suite_plan.find(str(tmp_path), sst2) == (str(tmp_path / wanted), None)
    (tmp_path / "sst5x").mkdir()
    with pytest.raises(UserError, match=r"no rows: there is no sst5 or extras/sst5\*"):
        suite_plan.find(str(tmp_path), get_task("sst5"))


# ---- runs ------------------------------------------------------------------------------------------------------------------------


def test_a_suite_that_is_killed_goes_on_to_the_same_table(
    command: Callable[..., list[str]], children: Children, tmp_path: Path, capsys: Any
) -> None:
    """Killed for good in a run that has a journal: finished cells are kept, that run goes on, and the table is that of a suite never killed."""
    arguments = command("zero-shot,adam,mezo", "--seeds", "0")
    assert children.run(arguments, tmp_path / "said", calls=2 + 3) != 0  # on sst2 two steps with adam, then the second with mezo
    out = tmp_path / "out"
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert len(kept) == 3 and len(rows_of(out)) == 3 + 14
    assert main(arguments) == 0
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())
    assert "resumed after 1 of 2 steps" in capsys.readouterr().err
    first = settled(out)
    assert len([row for row in first if row["source"] == "ours"]) == 6
    assert main([word if word != str(out) else str(tmp_path / "again") for word in arguments]) == 0
    assert settled(tmp_path / "again") == first
    assert (tmp_path / "again" / "table.md").read_text() == (out / "table.md").read_text()
    content = json.loads((out / "suite.json").read_text())
    assert not content["interrupted"] and content["failed"] == {} and len(content["cells"]) == 6
    # the same command again makes nothing; other options are refused, for runs and for baselines
    times = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert main(arguments) == 0
    assert "6 cells, 6 of them finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("result.json")} == times
    for more, reason in (
        (["--batch-size", "3"], "has a run with another batch_size"),
        (["--max-length", "30"], "another max_length"),
    ):
        assert main([*arguments, *more]) == 2
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_learning_rates_are_chosen_on_the_dev_rows(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Of each column and task, with the first seed; the run that was chosen is that seed's cell."""
    given = ["--lr-factors", "1,1e4", "--lr", "mezo:peft=ln=1e-7", "--peft", "ln"]
    assert main(command("mezo,mezo:peft=ln", *given, tasks="sst2")) == 0
    out = tmp_path / "out" / "cells" / "sst2"
    assert [p.name for p in out.iterdir()] == ["mezo-peft=ln"]
    losses = {}
    for run in out.rglob("*-seed0"):
        result = json.loads((run / "result.json").read_text())
        losses[result["hyperparameters"]["lr"]] = result["history"][-1]["loss"]
    assert sorted(losses) == [1e-07, 1e-03]
    best = min(losses, key=losses.__getitem__)
    rows = [row for row in rows_of(tmp_path / "out") if row["source"] == "ours"]
    assert [(float(row["lr"]), row["seed"], row["peft"]) for row in rows] == [(best, "0", "ln"), (best, "1", "ln")]
    assert float(rows[0]["dev_loss"]) == losses[best]


def test_a_cell_with_an_error_ends_no_other(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError("there is none")

    arguments = command("mezo", "--seeds", "0")
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", full)
        assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 cells ended with an error, the first sst2, mezo, seed 0: out of memory" in last and "tries them again" in last
    assert [row["task"] for row in rows_of(tmp_path / "out") if row["source"] == "ours"] == ["copa"]
    assert "Ended with an error: sst2, mezo, seed 0" in (tmp_path / "out" / "table.md").read_text()
    assert main(arguments) == 0
    assert [row["task"] for row in rows_of(tmp_path / "out") if row["source"] == "ours"] == ["sst2", "copa"]


def test_ctrl_c_keeps_what_is_finished(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Classification, "loss", Calls(4 + 2).of(Classification.loss))
    assert main(command("mezo", tasks="sst2")) == 130
    assert "interrupted: 1 of 2 cells are finished and kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "suite.json").read_text())["interrupted"]
    assert len([row for row in rows_of(tmp_path / "out") if row["source"] == "ours"]) == 1


# ---- mistakes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["--methods", "zeroshot"], "--methods zeroshot: there is no 'zeroshot'; did you mean 'zero-shot'?"),
        (["--methods", "mezo:peft=all"], "--methods mezo:peft=all: give peft once, as one of none, lora"),
        (["--methods", "mezo:rank=2"], "--method mezo has no option 'rank'"),
        (["--methods", "mezo,mezo"], "--methods: give at least one, and none twice"),
        (["--tasks", "sst3"], "--tasks 'sst3' must be of boolq, cb, "),
        (["--tasks", "sst2,sst2"], "--tasks: give at least one, and none twice"),
        (["--seeds", "1,1"], "--seeds: give at least one, and none twice"),
        (["--peft", "lora"], "--methods: give at least one"),
        (["--peft", "none,Lora"], "--peft 'Lora' must be one of none, lora"),
        (["--lr", "sign=1e-3"], "--lr sign=0.001: --methods has no 'sign': it has mezo"),
        (["--lr-factors", "1,2", "--dev-examples", "0"], "--lr-factors chooses by the dev examples"),
        (["--tasks", "wic"], "nothing can be done: wic: no rows"),
        (["--data", "nowhere"], "nothing can be done: sst2: no rows: there is no sst2 or extras/sst2* in nowhere"),
        (["--steps", "0"], "--steps 0 must be greater than 0"),
    ],
)
def test_what_is_refused(changes: list[str], reason: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    assert main([*command("mezo"), *changes]) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["suite.json", "table.csv", "table.md", "table.png"])
def test_what_a_suite_did_not_write_is_kept(name: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    assert main(command("zero-shot", tasks="sst2")) == 2
    assert f"its {name} would be replaced, and no suite wrote that" in capsys.readouterr().err.splitlines()[-1]


def test_the_figure(drawn: None, tmp_path: Path) -> None:
    rows = [made_row(task, c, 0, 0.6, stderr=0.1, examples=9, threshold=0.7) for task in ("sst2", "rte") for c in ("mezo", "adam")]
    suite_table.draw(tmp_path / "table.png", "a title", [*rows, *suite_table.paper_rows(SUITES["mezo"], ["sst2"])], ())
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_baseline_that_was_changed_is_told(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    arguments = command("zero-shot", "--seeds", "0", tasks="sst2")
    assert main(arguments) == 0
    path = next((tmp_path / "out" / "cells").rglob("result.json"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "metrics"}))
    assert main(arguments) == 2
    assert "its result.json is not as it was written (KeyError: 'metrics')" in capsys.readouterr().err.splitlines()[-1]


def test_a_table_is_of_one_data_set(command: Callable[..., list[str]], root: Path, tmp_path: Path, capsys: Any) -> None:
    """What changes behind finished cells, a run's or a baseline's, is noticed before another is made; a task whose rows stayed goes on."""
    changed = tmp_path / "data"
    shutil.copytree(root, changed)
    for methods in ("zero-shot", "mezo"):
        arguments = command(methods, "--seeds", "0", "--data", str(changed), "--output", str(tmp_path / methods))
        assert main(arguments) == 0
        path = changed / "sst2" / "validation.jsonl"
        rows = path.read_text()
        path.write_text(rows.replace("film", "book"))
        capsys.readouterr()
        assert main([*arguments, "--seeds", "0,1"]) == 2
        assert "has a result of other examples than --data" in (said := capsys.readouterr().err) and "(eval rows)" in said
        assert not (tmp_path / methods / "cells" / "seed1").exists()
        path.write_text(rows)
        train = changed / "sst2" / "train.jsonl"
        rows = train.read_text()
        train.write_text(rows.replace("film", "book"))
        assert main(arguments) == (0 if methods == "zero-shot" else 2)  # which reads no training rows
        train.write_text(rows)


def test_columns_of_ones_own() -> None:
    way = suite_plan.Way.of(Column("mezo:queries=4:peft=lora", "x"))
    assert way.entry is not None and way.entry.given == {"queries": "4"}
    assert (way.peft, way.short) == ("lora", "mezo:peft=lora")


def test_the_benchmark_of_the_documentation(drawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/suite.py with what is there: a CSV of ours with the documented columns, a table with the paper's, a figure."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows = [made_row(task, "mezo", 0, 0.6, stderr=0.1, examples=9, threshold=0.7) for task in ("sst2", "rte")]
    (tmp_path / "table.csv").write_text(suite_table.to_csv([*rows, *suite_table.paper_rows(SUITES["mezo"], ["sst2"])]))
    out, page = tmp_path / "suite.csv", tmp_path / "page.md"
    page.write_text("before\n<!-- table suite -->\nlast year\n<!-- end -->\nafter\n")
    words = {"--work": tmp_path, "--out": out, "--page": page, "--figures": tmp_path}
    monkeypatch.setattr(sys, "argv", ["suite.py", "--written", *(str(w) for pair in words.items() for w in pair)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / "suite.py"), run_name="__main__")
    assert end.value.code == 0
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    listed = {key: columns.split() for key, columns in re.findall(r"^- `([\w.]+)`: `([\w ]+)`", text, re.MULTILINE)}
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert [(row["task"], row["score"]) for row in reader] == [("sst2", "0.6"), ("rte", "0.6")]
        assert reader.fieldnames == listed["machine"] + listed["suite.csv"]
    filled = page.read_text()
    assert (
        filled.startswith("before\n")
        and filled.endswith("\nafter\n")
        and "*MEZO, the paper's OPT-13B*" in filled
        and "last year" not in filled
    )
    assert (tmp_path / "suite.png").read_bytes().startswith(b"\x89PNG")
