"""Which method is above which: intervals against what is known of them, and a comparison's choices, which see no evaluation row."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zo_finetune import outcomes, ranking
from zo_finetune.cli import main
from zo_finetune.decoding import Answers
from zo_finetune.errors import UserError
from zo_finetune.intervals import Resampling, measured, parted_at, threshold
from zo_finetune.metrics.auc import auc
from zo_finetune.metrics.best_threshold import best_accuracy
from zo_finetune.outcomes import Outcomes
from zo_finetune.tasks import get_task

from tests.finetune.conftest import write_jsonl

SST2 = get_task("sst2")
Rows = np.ndarray[Any, np.dtype[np.float64]]


def values(rows: Rows, first: int = 0) -> Outcomes:
    return Outcomes(np.arange(first, first + len(rows)), rows, np.zeros(len(rows), np.int64))


def scored(seed: int, rows: int, labels: int = 2, ties: bool = False) -> Outcomes:
    draw = np.random.default_rng(seed)
    label = draw.integers(labels, size=rows)
    scores = draw.normal(size=(rows, labels)) + 0.5 * np.eye(labels)[label]
    scores = np.round(scores * 2) / 2 if ties else scores
    return Outcomes(np.arange(rows), (scores.argmax(1) == label).astype(float), label, scores)


# ---- measures -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_measures_are_those_of_an_evaluation(ties: bool) -> None:
    found = scored(0, 101, ties=ties)
    scores, labels, ones = torch.tensor(found.scores), torch.tensor(found.label), np.ones((1, 101))
    assert found.scores is not None
    margins = scores[:, 1] - scores[:, 0]
    assert measured("auc", found, ones)[0] == pytest.approx(auc(margins, labels)[0])
    assert measured("accuracy_at_best_threshold", found, ones)[0] == pytest.approx(best_accuracy(margins, labels))
    assert measured("loss", found, ones)[0] == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item())
    assert measured("accuracy", found, ones)[0] == found.value.mean()
    assert parted_at(found, threshold(found)).value.mean() == pytest.approx(best_accuracy(margins, labels))


@pytest.mark.parametrize("name", ["auc", "accuracy_at_best_threshold", "loss", "accuracy"])
def test_a_row_that_is_drawn_twice_counts_twice(name: str) -> None:
    found = scored(1, 40, ties=True)
    times = np.random.default_rng(2).integers(3, size=40)
    at = np.repeat(np.arange(40), times)
    assert found.scores is not None
    again = Outcomes(at, found.value[at], found.label[at], found.scores[at])
    twice = measured(name, found, times[None].astype(float))[0]
    assert twice == pytest.approx(measured(name, again, np.ones((1, len(at))))[0])


def test_the_area_of_several_labels_is_the_mean_of_their_pairs() -> None:
    found = scored(3, 90, labels=3)
    assert found.scores is not None
    each = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pair = (found.label == a) | (found.label == b)
        each.append(
            auc(torch.tensor((found.scores[:, b] - found.scores[:, a])[pair]), torch.tensor((found.label[pair] == b) * 1))[0]
        )
    assert measured("auc", found, np.ones((1, 90)))[0] == pytest.approx(np.mean(each))


def test_a_label_that_is_not_drawn_and_a_score_that_is_no_number() -> None:
    found = scored(4, 10)
    assert found.scores is not None
    assert measured("auc", found, (found.label == 1)[None].astype(float))[0] == 0.5
    torn = Outcomes(found.rows, found.value, found.label, np.where(np.arange(20).reshape(10, 2) == 3, np.nan, found.scores))
    assert math.isnan(measured("auc", torn, np.ones((1, 10)))[0]) and math.isnan(measured("loss", torn, np.ones((1, 10)))[0])
    resampling = Resampling([found], 50)
    assert resampling.interval(resampling.sample("loss", [torn]), resampling.sample("loss", [found])) is None


# ---- intervals ----------------------------------------------------------------------------------------------------------------


def test_with_one_seed_an_interval_is_the_closed_form() -> None:
    """The mean of n paired differences has the standard error s / sqrt(n), s of n: what resampled rows come to."""
    draw = np.random.default_rng(0)
    one, other = draw.normal(0.1, 1, 400), draw.normal(0, 1, 400)
    resampling = Resampling([values(other)], 4000)
    found = resampling.interval(resampling.sample("x", [values(one)]), resampling.sample("x", [values(other)]))
    error = (one - other).std() / 20
    assert found is not None and found.difference == pytest.approx((one - other).mean())
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error)


def test_pairing_narrows_an_interval() -> None:
    """What both methods find hard on a row, and what a seed does to both, is in neither's favour: resampled apart it would be in the interval."""
    draw = np.random.default_rng(1)
    rows, seeds = draw.normal(0, 1, 300), draw.normal(0, 1, 5)
    one, other = ([values(rows + s + draw.normal(0, 0.1, 300)) for s in seeds] for _ in range(2))
    resampling = Resampling(one, 1000)
    a, b = resampling.sample("x", one), resampling.sample("x", other)
    paired = resampling.interval(a, b)
    turned = [Outcomes(o.rows, o.value[::-1].copy(), o.label) for o in (*other[1:], other[0])]
    apart = resampling.interval(a, resampling.sample("x", turned))
    assert paired is not None and apart is not None
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low)
    other_rows = resampling.interval(a, resampling.sample("x", [Outcomes(o.rows, o.value[::-1].copy(), o.label) for o in other]))
    assert other_rows is not None
    assert paired.high - paired.low < 0.2 * (other_rows.high - other_rows.low), "the seeds' shares were the same"


def test_runs_that_are_paired_have_the_same_rows() -> None:
    resampling = Resampling([values(np.zeros(3))], 10)
    with pytest.raises(ValueError, match="the same rows, seed by seed"):
        resampling.sample("x", [values(np.zeros(3), first=1)])


@pytest.mark.parametrize(("rows_vary", "seeds_vary", "nested"), [(0.0, 1.0, False), (1.0, 0.0, False), (1.0, 0.1, True)])
def test_intervals_cover_what_they_say(rows_vary: float, seeds_vary: float, nested: bool) -> None:
    """Five seeds, whose variation or that of the rows is the larger, 150 times: 95 % of the intervals hold the truth, within what 150 can tell (three
    standard errors are 0.053). A plain percentile interval of five seeds holds it in 0.83 where the seeds are what varies."""
    draw, hits, plain = np.random.default_rng(5), 0, 0
    for _ in range(150):
        shared, one, other = draw.normal(0, rows_vary, 100), [], []
        for k in range(5):
            own = draw.normal(0, rows_vary, 100) if nested else shared
            one.append(values(own + draw.normal(0, seeds_vary) + draw.normal(0, 0.5, 100), first=1000 * k if nested else 0))
            other.append(values(np.zeros(100), first=1000 * k if nested else 0))
        resampling = Resampling(other, 300)
        a, b = resampling.sample("x", one), resampling.sample("x", other)
        found = resampling.interval(a, b)
        assert found is not None
        hits += found.low <= 0 <= found.high
        low, high = np.quantile(np.take_along_axis(a.drawn, resampling.seeds, 1).mean(1), [0.025, 0.975])
        plain += low <= 0 <= high
    assert 0.897 <= hits / 150 <= 1
    if seeds_vary == 1.0:
        assert hits > plain + 5


# ---- the files ----------------------------------------------------------------------------------------------------------------


def test_rows_come_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 2)
    scores[2, 0], scores[3, 1] = -torch.inf, torch.nan
    answers = Answers(scores, torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 1, -1, 0]), ("a", "b"))
    written = outcomes.outcomes_of(SST2, answers, [7, 3, 9, 1, 2])
    outcomes.write(tmp_path / "x.csv", written)
    read = outcomes.read(tmp_path / "x.csv")
    assert read is not None and read.scores is not None
    assert (
        read.rows.tolist() == [7, 3, 9, 1, 2] and read.value.tolist() == [1, 1, 1, 0, 0] and read.label.tolist() == [0, 1, 1, 0, 1]
    )
    assert np.array_equal(read.scores.astype(np.float32), scores.numpy(), equal_nan=True)
    assert outcomes.read(tmp_path / "absent.csv") is None


def test_too_many_rows_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "MOST_NUMBERS", 50)
    outcomes.write(tmp_path / "x.csv", scored(0, 10))
    outcomes.write(tmp_path / "y.csv", scored(0, 11))
    assert (tmp_path / "x.csv").exists() and not (tmp_path / "y.csv").exists()


@pytest.mark.parametrize(
    "text",
    ["", "row,value,label\n", "row,value\n1,1\n", "row,value,label,score_0,score_1\n1,1,2,0,0\n", "row,value,label\n1,1,0.5\n",
     "row,value,label\n1,1,-1\n", "row,value,label\n1,1,0\n1,1,0\n", "row,value,label,score_0\n1,1,0\n", "row,value,label\nx,1,0\n",
     "row,value,label\n1e400,1,0\n", "row,value,label\nnan,1,0\n", "row,value,label\n1,1,0\n2,1\n"],
)  # fmt: skip
def test_rows_that_no_run_wrote_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match="is not as a run wrote it"):
        outcomes.read(tmp_path / "x.csv")


# ---- a standing ---------------------------------------------------------------------------------------------------------------


def runs_of(label: str, after: dict[int, Outcomes], before: dict[int, Outcomes]) -> ranking.Runs:
    row = {"forwards": 10, "frozen_forwards": 2.5, "steps": 5, "lr": 0.1, "seconds": 1.0}
    return ranking.Runs(label, label, "loss", 10, dict.fromkeys(after, row), before, before, after)


def test_above_below_and_undecided() -> None:
    def shifted(by: float, noise: float = 0.0) -> dict[int, Outcomes]:
        found, draw = {}, np.random.default_rng(9)
        for seed in range(3):
            one = scored(seed, 300)
            assert one.scores is not None
            scores = one.scores + by * np.eye(2)[one.label] + noise * draw.normal(size=(300, 2))
            found[seed] = Outcomes(one.rows, (scores.argmax(1) == one.label).astype(float), one.label, scores)
        return found

    before = shifted(-0.5)
    given = (("mezo", 0.0, 0.0), ("same", 0.03, 0.2), ("worse", -0.4, 0.0), ("better", 0.4, 0.0))
    standing = ranking.Standing(SST2, [runs_of(n, shifted(by, noise), before) for n, by, noise in given], "mezo", resamples=300)
    lines = {line["method"]: line for line in standing.lines}
    assert [line["method"] for line in standing.lines if line["method"] in lines][0::3][:2] == ["better", "worse"]
    assert {name: lines[name]["verdict"] for name in ("better", "same", "worse", "mezo")} == {
        "better": "above", "same": "undecided", "worse": "below", "mezo": "",
    }  # fmt: skip
    assert {line["method"] for line in standing.lines if line["kind"] == "reference"} == {
        "zero-shot", "zero-shot, line of the dev rows", "zero-shot, line of these rows*", "most frequent label",
    }  # fmt: skip
    labels = np.concatenate([before[s].label for s in range(3)]).reshape(3, -1)
    assert lines["most frequent label"]["accuracy"] == pytest.approx(np.mean([max(x.mean(), 1 - x.mean()) for x in labels]))
    best = [measured("accuracy_at_best_threshold", before[s], np.ones((1, 300)))[0] for s in range(3)]
    assert lines["zero-shot, line of these rows*"]["accuracy"] == pytest.approx(np.mean(best))
    hits = [float(o.value.mean()) for o in shifted(0.4).values()]
    assert lines["better"]["accuracy"] == pytest.approx(np.mean(hits))
    assert lines["better"]["accuracy_deviation"] == pytest.approx(np.std(hits, ddof=1)), "the sample's"
    assert lines["better"]["auc_low"] > 0 > lines["better"]["loss_high"]
    assert set(lines["better"]) == set(ranking.columns(SST2))
    assert "| better | 10 | 2 | 1 | 0.1 |" in standing.markdown()


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def compared(train_command: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def build(output: Path, *more: str, **options: Any) -> list[str]:
        own = {"methods": "mezo,sign", "forwards": "12,4", "seeds": "0,1", "points": 2, "steps": None, "lr_factors": "1,3000"}
        return train_command(output, *more, command="compare", dev_examples=8, eval_examples=20, **{**own, **options})

    return build


def test_objectives_and_half_of_the_forwards(compared: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = compared(tmp_path / "out", "--objectives", "loss,language-model", "--data-seed", "0")
    assert main(arguments) == 0
    rows = read_rows(tmp_path / "out" / "ranking.csv")
    made = {(r["method"], r["objective"], r["budget"]): r for r in rows if r["kind"] == "method"}
    assert set(made) == {(m, o, b) for m in ("mezo", "sign") for o in ("loss", "language-model") for b in ("12", "4")}
    assert made["mezo", "loss", "12"]["verdict"] == "" and made["mezo", "loss", "4"]["verdict"] in ("above", "below", "undecided")
    assert {r["seeds"] for r in made.values()} == {"2"} and {r["edge"] for r in made.values()} <= {"low", "high"}
    assert all(r["frozen_forwards"] == r["forwards"] for r in made.values())
    folders = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    assert folders == {f"{m}{o}{b}" for m in ("mezo", "sign") for o in ("", "@language-model") for b in ("", "@4")}
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["ranking"]["baseline"] == "mezo" and content["ranking"]["resamples"] == 2000
    assert set(content["tuned"]) == {f"{m}{o}{b}" for m in ("mezo", "sign") for o in ("", ", language-model") for b in ("", ", 4")}
    assert (tmp_path / "out" / "ranking.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "resamples of rows and seeds, paired by both" in table and "on 8 held-out training rows with 1 of the seeds" in table


def test_a_method_with_one_objective_and_number_of_forwards(compared: Callable[..., list[str]], tmp_path: Path) -> None:
    methods = "mezo@loss@12,sign@4,sign@language-model@12"
    assert main(compared(tmp_path / "out", "--objectives", "loss,language-model", methods=methods, lr_factors=None, seeds="0")) == 0
    rows = [r for r in read_rows(tmp_path / "out" / "ranking.csv") if r["kind"] == "method"]
    assert {(r["method"], r["objective"], r["budget"]) for r in rows} == {
        ("mezo", "loss", "12"), ("sign", "loss", "4"), ("sign", "language-model", "4"), ("sign", "language-model", "12"),
    }  # fmt: skip


def test_no_choice_sees_an_evaluation_row(compared: Callable[..., list[str]], data_folder: Path, tmp_path: Path) -> None:
    """With the labels of all evaluation rows shuffled, learning rates, kept steps and every number of the dev examples are the same."""
    rows = [json.loads(line) for line in (data_folder / "validation.jsonl").read_text().splitlines()]
    labels = [row["label"] for row in rows]
    random.Random(3).shuffle(labels)
    other = tmp_path / "data"
    other.mkdir()
    (other / "train.jsonl").write_bytes((data_folder / "train.jsonl").read_bytes())
    write_jsonl(other / "validation.jsonl", [{**row, "label": label} for row, label in zip(rows, labels, strict=True)])

    choices, results = [], []
    for name, data in (("true", data_folder), ("shuffled", other)):
        arguments = compared(tmp_path / name, "--keep", "best", "--lr-seeds", "2", forwards="12", data=data)
        assert main(arguments) == 0
        content = json.loads((tmp_path / name / "compare.json").read_text())
        runs = {p.parent.relative_to(tmp_path / name): json.loads(p.read_text()) for p in (tmp_path / name).rglob("result.json")}
        choices.append((content["tuned"], [(r["method"], r["seed"], r["lr"], r["dev_loss"]) for r in content["runs"]],
                        {str(p): (r["kept"], r["history"]) for p, r in runs.items()}))  # fmt: skip
        results.append([r["accuracy"] for r in content["runs"]])
    assert choices[0] == choices[1] and len(choices[0][0]["mezo"]) == 2
    assert results[0] != results[1]


def test_a_learning_rate_is_chosen_by_the_mean_of_its_seeds(compared: Callable[..., list[str]], tmp_path: Path) -> None:
    given = compared(
        tmp_path / "out", "--lr-seeds", "2", "--lr-by", "auc", methods="mezo", forwards="8", lr_factors=None, lr_grid="1e-3,1e-2"
    )
    assert main(given) == 0
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    tuned, found = content["tuned"]["mezo"], {}
    for path in (tmp_path / "out").rglob("result.json"):
        result = json.loads(path.read_text())
        found.setdefault(result["hyperparameters"]["lr"], []).append(result["history"][-1]["auc"])
    assert {float(lr): value for lr, value in tuned.items()} == {lr: pytest.approx(np.mean(aucs)) for lr, aucs in found.items()}
    assert {run["lr"] for run in content["runs"]} == {float(max(tuned, key=tuned.__getitem__))}
