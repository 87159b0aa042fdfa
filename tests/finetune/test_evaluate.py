"""`zo-finetune evaluate`: the numbers of a run's `before`, of independent computations with transformers, and what is refused.

Belongs here: zero-shot, demonstrations, calibrated scores, splits, the folder. Does not belong here: metrics (test_report.py, test_scorers.py), prompts
(test_tasks.py), the probe (test_probe.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from zo_finetune import baseline
from zo_finetune.cli import main
from zo_finetune.config import Config, Evaluation
from zo_finetune.data import load_split, load_splits
from zo_finetune.errors import UserError
from zo_finetune.incontext import Demonstrations, demonstration, neutral
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Candidate, Example

from tests.finetune.conftest import make_rows, write_jsonl

ModelFolder = Callable[[str], Path]
CLOSE = {"abs": 2e-5}  # fp32 over inputs of different shape (test_scoring.py)
WORDS = (" terrible", " great")


@pytest.fixture
def command(model_folder: ModelFolder, data_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def build(*more: str, model: str = "llama", data: Path = data_folder, task: str = "sst2", output: str = "out") -> list[str]:
        where = ["--model", str(model_folder(model)), "--data", str(data), "--task", task, "--output", str(tmp_path / output)]
        return ["evaluate", *where, "--device", "cpu", "--batch-size", "5", *more]

    return build


def result_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "result.json").read_text()), [json.loads(line) for line in lines]


def sentences(data: Path, split: str = "validation") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]


class Reference:
    """A causal model's log-probabilities, one text at a time, as transformers has them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, context: str, word: str, room: int = 1 << 20) -> float:
        """Of the one token that `word` is, behind a start token and the last `room` tokens of the context."""
        ids = self.tokenizer(context, add_special_tokens=False).input_ids
        (answer,) = self.tokenizer(word, add_special_tokens=False).input_ids
        logits = self.model(torch.tensor([[0, *ids[-room:]]])).logits[0, -1]
        return float(torch.log_softmax(logits.double(), -1)[answer])


# ---- scores ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "roberta"])
def test_zero_shot_is_what_a_run_has_before(
    model: str,
    command: Callable[..., list[str]],
    train_command: Callable[..., list[str]],
    data_folder: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """The same rows by the same seed, whatever the training; and the majority rate and rows that stand beside."""
    run = train_command(tmp_path / "run", "--no-save", "--seed", "3", "--eval-batch-size", "5", model=model, steps=1)
    assert main(run) == 0
    words = command("--seed", "3", "--eval-examples", "12", model=model)
    assert main(words) == 0
    before = json.loads((tmp_path / "run" / "result.json").read_text())["before"]
    result, predictions = result_of(tmp_path / "out")
    assert {**result["metrics"], "examples": result["rows"], "majority": result["majority"]} == before
    assert (result["task"], result["split"], result["shots"], result["calibrated"]) == ("sst2", "eval", 0, False)
    assert result["command"] == ["zo-finetune", *words] and result["versions"]["transformers"] and result["machine"]["device"]
    rows, names = sentences(data_folder), ("negative", "positive")
    assert [p["right"] for p in predictions] == [[names[rows[p["row"] - 1]["label"]]] for p in predictions]
    assert sum(p["answer"] in p["right"] for p in predictions) / 12 == result["metrics"]["accuracy"]
    assert all(p["answer"] == names[p["scores"][1] > p["scores"][0]] for p in predictions)
    rights = [p["right"][0] for p in predictions]
    assert result["majority"] == max(map(rights.count, names)) / 12
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("0 shots: accuracy ") and f"on 12 examples (majority {result['majority']:.4f})" in said


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_what_a_run_saved_is_worth_what_it_had_after(
    peft: str, command: Callable[..., list[str]], train_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Whole weights are a model, and an adapter stands beside its model."""
    assert main(train_command(tmp_path / "run", "--peft", peft, "--lr", "1e-2", "--eval-batch-size", "5", dev_examples=0)) == 0
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    words = command("--eval-examples", "12", *(["--adapter", saved["saved"]] if peft == "lora" else []))
    if peft == "none":
        words[words.index("--model") + 1] = saved["saved"]
    assert main(words) == 0
    result = result_of(tmp_path / "out")[0]
    assert {**result["metrics"], "examples": 12, "majority": result["majority"]} == saved["after"] != saved["before"]


def test_what_is_odd_about_the_rows_of_demonstrations_is_told(tmp_path: Path) -> None:
    rows = make_rows(30, 3)
    write_jsonl(tmp_path / "train.jsonl", [{**row, "label": 1} for row in rows[:20]])
    write_jsonl(tmp_path / "test.jsonl", rows[20:])
    options = Evaluation(model="m", output="o", task="sst2", data=str(tmp_path), split="test", shots=2)
    notes = baseline.read_rows(
        options, Config(model="m", output="o", task="sst2", data=str(tmp_path)), get_task("sst2"), "causal"
    ).notes
    assert any(note.startswith("demonstrations: warning: all 16 train examples are 'positive'") for note in notes)


def test_demonstrations_are_scored_as_by_hand(
    command: Callable[..., list[str]], model_folder: ModelFolder, data_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """Drawn anew for each example by a seed of its index, joined by blank lines, cut on the left at the model's length."""
    reference, shots = Reference(model_folder("llama")), 6
    assert main(command("--shots", str(shots), "--seed", "2")) == 0
    result, predictions = result_of(tmp_path / "out")
    pool = load_splits(str(data_folder), get_task("sst2"), "causal", seed=2).train
    rows, cut, seen = sentences(data_folder), 0, set()
    for index, said in enumerate(predictions):
        sentence, draw, drawn = rows[said["row"] - 1]["sentence"], random.Random((2 << 32) + index).random, []
        while len(drawn) < shots:
            if (place := int(draw() * len(pool))) not in drawn:
                drawn.append(place)
        seen.add(tuple(drawn))
        shown = [f"{pool[k].candidates[0].context}{WORDS[pool[k].label]}" for k in drawn]
        text = "\n\n".join([*shown, f"{sentence} It was"])
        cut += len(reference.tokenizer(text, add_special_tokens=False).input_ids) > 63
        assert said["scores"] == pytest.approx([reference(text, word, 63) for word in WORDS], **CLOSE)
    assert len(seen) == len(predictions) == 30
    assert result["cut"] == cut > 0 and result["shots"] == shots
    assert f"{cut} of 30 texts are longer than 64 tokens: their beginnings are left out" in capsys.readouterr().err


def test_calibrated_scores_are_differences(
    command: Callable[..., list[str]], model_folder: ModelFolder, data_folder: Path, tmp_path: Path
) -> None:
    """Of log-probabilities behind the prompt and behind its neutral words; demonstrations stand before the first alone, as in MeZO's sfc."""
    reference = Reference(model_folder("llama"))
    assert main(command("--calibrated")) == 0
    anyway = [reference("It was", word) for word in WORDS]
    result, predictions = result_of(tmp_path / "out")
    rows = sentences(data_folder)
    for said in predictions:
        context = f"{rows[said['row'] - 1]['sentence']} It was"
        wanted = [reference(context, word) - usual for word, usual in zip(WORDS, anyway, strict=True)]
        assert said["scores"] == pytest.approx(wanted, **CLOSE)
    assert result["calibrated"] is True
    assert main(command("--shots", "2", output="plain")) == main(command("--shots", "2", "--calibrated", output="both")) == 0
    for plain, both in zip(result_of(tmp_path / "plain")[1], result_of(tmp_path / "both")[1], strict=True):
        assert both["scores"] == pytest.approx([a - b for a, b in zip(plain["scores"], anyway, strict=True)], **CLOSE)


def test_what_is_neutral() -> None:
    """No space begins the text that an answer ends, and nothing of the example is left in it."""
    example = Example((Candidate("a It was", " bad", "", " It was"), Candidate("a", " Yes", "tail", "")), 1, frozenset({1}))
    assert neutral(example) == Example((Candidate("It was", " bad", "", " It was"), Candidate("", "Yes", "", "")), 0)


def test_free_answers_are_written_and_kept(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    """With demonstrations too; what has no candidates has no calibrated score, and no majority."""
    asked = [
        {
            "title": "T",
            "context": f"a {k} film",
            "question": "what?",
            "answers": {"text": [f"film {k}", "film"], "answer_start": [0, 0]},
        }
        for k in range(12)
    ]
    write_jsonl(tmp_path / "train.jsonl", asked[:9])
    write_jsonl(tmp_path / "validation.jsonl", asked[9:])
    assert main(command("--shots", "1", data=tmp_path, task="squad")) == 0
    result, predictions = result_of(tmp_path / "out")
    assert {"f1", "f1_stderr", "em", "em_stderr"} <= result["metrics"].keys() and result["majority"] is None and result["rows"] == 3
    for said in predictions:
        assert said["right"] == [f"film {said['row'] + 8}", "film"] and said["scores"] is None and isinstance(said["answer"], str)
    for words in (
        command("--calibrated", data=tmp_path, task="squad", output="no"),
        ["probe", *command(data=tmp_path, task="squad", output="no")[1:]],
    ):
        assert main(words) == 2
    said = capsys.readouterr().err
    assert "error: --calibrated: task squad has no candidates to score" in said
    assert "error: task squad has free answers, and a probe chooses among labels or candidates" in said


# ---- demonstrations --------------------------------------------------------------------------------------------------------------


def examples(*texts: str) -> list[Example]:
    return [
        Example((Candidate(f"{text} It was", " bad"), Candidate(f"{text} It was", " good")), k % 2) for k, text in enumerate(texts)
    ]


def test_no_example_is_shown_with_its_own_text() -> None:
    """Not in another row, nor with another label: it would tell the answer, or contradict it."""
    pool = examples("a", "b", "a", "c", "d")
    drawn = Demonstrations(pool, 3, 0)
    for index in range(40):
        assert sorted(drawn.drawn(index, pool[0])) == [1, 3, 4]
        assert len(set(drawn.drawn(index, examples("e")[0]))) == 3
    assert drawn.drawn(7, pool[0]) == Demonstrations(pool, 3, 0).drawn(7, pool[0])
    with pytest.raises(UserError, match=r"--shots 4: there are 3 training rows to draw from: give fewer"):
        Demonstrations(pool, 4, 0).around(0, pool[0])


def test_a_demonstration_is_the_prompt_with_its_right_answer() -> None:
    pool = examples("a", "b", "c", "d")
    made = Demonstrations(pool, 2, 5).around(3, pool[0])
    one, other = (demonstration(pool[k]) for k in Demonstrations(pool, 2, 5).drawn(3, pool[0]))
    assert {c.context for c in made.candidates} == {f"{one}\n\n{other}\n\na It was"}
    assert [c.answer for c in made.candidates] == [" bad", " good"] and made.label == 0
    assert [demonstration(e) for e in pool[:2]] == ["a It was bad", "b It was good"]
    assert demonstration(Example((Candidate("Answer:", " two\n"),), 0)) == "Answer: two"


# ---- which rows ------------------------------------------------------------------------------------------------------------------


def test_splits_by_name(command: Callable[..., list[str]], data_folder: Path, tmp_path: Path) -> None:
    sample = {"train": 13, "dev": 9}
    for split, count in sample.items():
        assert main(command("--split", split, "--train-examples", "13", "--dev-examples", "9", output=split)) == 0
        result, predictions = result_of(tmp_path / split)
        assert (result["split"], result["rows"], len(predictions)) == (split, count, count)
        assert result["data"] == str(data_folder / "train.jsonl")
    numbers = {split: {p["row"] for p in result_of(tmp_path / split)[1]} for split in sample}
    assert not numbers["train"] & numbers["dev"]
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "hard32.jsonl", make_rows(7, 5))
    assert main(command("--split", "hard32", "--eval-examples", "4", data=folder, output="named")) == 0
    assert result_of(tmp_path / "named")[0]["rows"] == 4
    assert main(command("--split", "all", data=folder / "hard32.jsonl", output="all")) == 0
    result, predictions = result_of(tmp_path / "all")
    assert [p["row"] for p in predictions] == [*range(1, 8)] and result["rows"] == 7 and result["majority"] == 4 / 7
    write_jsonl(folder / "train.jsonl", make_rows(20, 6))
    assert main(command("--split", "hard32", "--shots", "2", data=folder, output="shown")) == 0
    assert result_of(tmp_path / "shown")[0]["rows"] == 7


def test_a_split_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.Dataset.from_list(make_rows(6, 3))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": made, "extra": made})
    found = load_split("somebody/films", "extra", get_task("sst2"), "causal", seed=0)
    assert len(found.eval) == 6 and found.origin == {"eval": "somebody/films/extra"} and not found.train
    with pytest.raises(UserError, match=r"--split 'extr': --data somebody/films has train, extra; did you mean 'extra'\?"):
        load_split("somebody/films", "extr", get_task("sst2"), "causal", seed=0)


def test_a_small_file_keeps_most_rows_for_training(tmp_path: Path) -> None:
    """WSC's 554 rows with MeZO's 500 for dev left 54, and its score was the majority's: a fifth is the most that is held out."""
    texts = [{"text": f"{k} it stays.", "span1_text": f"{k}", "span2_text": "it", "label": k % 3 == 0} for k in range(658)]
    write_jsonl(tmp_path / "train.jsonl", texts[:554])
    write_jsonl(tmp_path / "validation.jsonl", texts[554:])
    found = load_splits(str(tmp_path), get_task("wsc"), "causal", seed=0)
    assert (len(found.train), len(found.dev), len(found.eval)) == (444, 110, 104)


# ---- the folder, and what is refused ---------------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(command("--eval-examples", "3")) == 0
    assert sorted(p.name for p in out.iterdir()) == ["predictions.jsonl", "result.json"]
    assert main(command("--eval-examples", "4")) == 2 and "is not empty" in capsys.readouterr().err
    assert main(command("--eval-examples", "4", "--overwrite")) == 0
    assert result_of(out)[0]["rows"] == 4
    (out / "notes.txt").write_text("mine")
    assert main(command("--overwrite")) == 2
    assert "holds notes.txt, which no baseline wrote: give another --output" in capsys.readouterr().err
    assert result_of(out)[0]["rows"] == 4


def test_an_interrupt_leaves_nothing(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(baseline, "measured", interrupted)
    assert main(command()) == 130
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err.endswith("zo-finetune: interrupted; give the same command again\n")


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        (["--split", "nope"], {}, "--split 'nope': --data "),
        (["--split", "valdation"], {}, "did you mean 'validation'?"),
        (["--split", "all"], {}, "--split 'all': --data "),
        (["--split", "all", "--eval-examples", "3"], {}, "--eval-examples 3 says nothing of --split all: leave it out"),
        (["--split", "test", "--dev-examples", "3"], {}, "--dev-examples 3 says nothing of --split test: leave it out"),
        (["--split", "dev", "--dev-examples", "0"], {}, "--split dev has no rows: give some with --dev-examples"),
        (["--shots", "90"], {}, "--shots 90: there are 48 training rows to draw from: give fewer, or more rows"),
        (["--shots", "-1"], {}, "--shots -1 must be at least 0"),
        (
            ["--shots", "2"],
            {"model": "roberta"},
            "demonstrations are text that a causal model goes on with, and this model is masked",
        ),
        (["--calibrated"], {"model": "roberta"}, "--calibrated: neutral prompts are of causal models, and this model is masked"),
        (["--data-config", "x"], {}, "--data-config 'x' is of data sets on the hub"),
        (["--max-length", "1", "--shots", "1"], {}, "--max-length 1 leaves no room for a prompt"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], options: dict[str, Any], said: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    assert main(command(*more, **options)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("zo-finetune: error: ") and said in last
    assert not (tmp_path / "out").exists()


def test_nothing_before_the_answer(
    command: Callable[..., list[str]], model_folder: ModelFolder, tmp_path: Path, capsys: Any
) -> None:
    """A tokenizer without a start token and a task whose neutral prompt is empty: GPT-2 on BoolQ."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder("gpt2"), folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**saved, "post_processor": None}))
    rows = [{"passage": "The sky is blue.", "question": f"is {k} blue", "answer": k % 2 == 0, "label": k % 2} for k in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = command("--calibrated", "--split", "all", data=data, task="boolq")
    words[words.index("--model") + 1] = str(folder)
    assert main(words) == 2
    assert (
        "--calibrated: the tokenizer adds no start token, and the neutral prompt of task boolq is empty" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "0 shots"),
        ({"shots": 1}, "1 shot"),
        ({"shots": 4, "calibrated": True}, "4 shots, calibrated"),
        ({"split": "dev"}, "0 shots, split dev"),
    ],
)
def test_a_score_says_how_it_came_about(more: dict[str, Any], words: str) -> None:
    assert baseline.way(Evaluation(model="m", task="sst2", data="d", output="o", **more)) == words
