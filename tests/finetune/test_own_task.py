"""A task of one's own without Python: what comes of a description, that a file and options are the same, and what is refused, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from zo_finetune import catalog
from zo_finetune.chosen_task import KEYS, read_task_file
from zo_finetune.cli import main
from zo_finetune.config import Config, Evaluation
from zo_finetune.data import examples_of, load_splits
from zo_finetune.errors import UserError
from zo_finetune.formats import Table
from zo_finetune.metrics import METRICS
from zo_finetune.metrics.base import Mean
from zo_finetune.sources import Source
from zo_finetune.tasks import TASKS, own
from zo_finetune.tasks.base import RowError

from tests.finetune.conftest import write_jsonl
from zo_kernels import journal

ROOT = Path(__file__).parents[2]
MOOD = """
name = "mood"
prompt = "{review} ({stars} of 5)\\nHappy?\\n"
masked = "{review} The customer is {mask}."
words = ["No", "Yes"]
labels = ["unhappy", "happy"]
label = "mood"
neutral = "Happy?"
metrics = ["accuracy", "macro-f1"]
"""
ROW = {"review": "It {works}. ", "stars": 4, "mood": "happy"}


def config(**more: Any) -> Config:
    return Config(**{"model": "m", "output": "o", **more})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mood.toml"
    path.write_text(MOOD)
    return path


def test_a_description_with_words(file: Path) -> None:
    task = config(task_file=str(file)).the_task()
    assert (task.name, task.forms, task.class_names) == ("mood", ("causal", "masked"), ("unhappy", "happy"))
    assert (task.objective, task.decoding, task.metrics) == ("classification", "scores", ("accuracy", "macro-f1", "loss"))
    causal, masked = (task.example(ROW, form) for form in task.forms)
    assert [(c.context, c.answer, c.neutral) for c in causal.candidates] == [
        ("It {works}. (4 of 5)\nHappy?\n", word, "Happy? ") for word in ("No", "Yes")
    ]
    assert [(c.context, c.answer, c.tail) for c in masked.candidates] == [
        ("It {works}. The customer is", word, ".") for word in (" No", " Yes")
    ]
    assert causal.label == masked.label == 1 and task.example({**ROW, "mood": "0"}, "causal").label == 0
    with pytest.raises(RowError, match=r"the labels of mood are 0 \(unhappy\), 1 \(happy\)"):
        task.example({**ROW, "mood": "glad"}, "causal")


def test_a_description_with_answers() -> None:
    task = config(task="capitals", prompt="{country}: {{{area}}}\nCapital:", answer_column="capital").the_task()
    assert (task.objective, task.decoding, task.metrics, task.forms) == (
        "language-model",
        "generate",
        ("f1", "em", "loss"),
        ("causal",),
    )
    example = task.example({"country": "Spain", "area": 5.5, "capital": ["Madrid", "Madrid", "the city"]}, "causal")
    assert [(c.context, c.answer) for c in example.candidates] == [("Spain: {5.5}\nCapital:", " Madrid\n")]
    assert example.references == (("Madrid",), ("the city",))
    assert task.example({"country": "Spain", "area": 5, "capital": 3}, "causal").references == (("3",),)


@pytest.mark.parametrize(
    ("prompt", "word", "answer"),
    [("{x} It is", "low", " low"), ("{x} It is", " low", " low"), ("{x}?\n", "low", "low"), ("{x} (", "-", "-"), ("{x} ", "low", "low")],
)  # fmt: skip
def test_a_word_is_parted_from_the_prompt(prompt: str, word: str, answer: str) -> None:
    other = " other" if word.startswith(" ") else "other"  # all words with a blank, or none
    task = config(task="t", prompt=prompt, words=[word, other]).the_task()
    assert task.example({"x": "a", "label": 0}, "causal").candidates[0].answer == answer


def test_labels_that_are_numbers_are_names(tmp_path: Path) -> None:
    """In whatever type a file has them; nothing is counted from 0, and no name stands for another that it begins."""
    values: list[Any] = [1, "1", 1.0, "1.0", -1, "-1"]

    def labels(names: list[str], given: list[Any], classes: list[str] | None = None) -> list[int]:
        task = config(task="t", prompt="{x}", words=["yes", "no"], labels=names).the_task()
        table = Table(
            ["x", "label"], ["x", "label"], [("a", one) for one in given], class_names={"label": classes} if classes else {}
        )
        return [e.label for e in examples_of(Source(table, "rows"), range(len(given)), task, "causal", {})]

    assert labels(["1", "-1"], values) == [0, 0, 0, 0, 1, 1] and labels(["-1", "1"], values) == [1, 1, 1, 1, 0, 0]
    assert labels(["1", "0"], [0, 1], ["0", "1"]) == [1, 0] and labels(["1", "2"], [0, 1], ["1", "2"]) == [0, 1]
    assert labels(["good", "bad"], [0, 1], ["LABEL_0", "LABEL_1"]) == [0, 1]
    for names, value in ((["1", "2"], 0), (["1000", "2000"], "100")):
        with pytest.raises(
            UserError, match=f"row 1: field 'label' is {value!r}; the labels of t are {names[0]}, {names[1]}: correct"
        ):
            labels(names, [value])


def test_an_answer_is_trained_on_as_one_line() -> None:
    """As what is written: scorers read both as the same."""
    task = config(task="t", prompt="{x} It:", answer_column="y").the_task()
    assert task.example({"x": "a", "y": "low \r\n and high"}, "causal").candidates[0].answer == " low and high\n"


@pytest.mark.parametrize("row", [{"x": float("nan"), "y": "b"}, {"x": "a", "y": float("inf")}])
def test_no_number_is_no_text(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="needs a text or a finite number there"):
        config(task="t", prompt="{x}", answer_column="y").the_task().example(row, "causal")


def test_a_file_says_what_options_can(file: Path, tmp_path: Path) -> None:
    """And the options are what a run records."""
    by_file = config(task_file=str(file), data="d").settled()
    by_options = config(
        task="mood", prompt="{review} ({stars} of 5)\nHappy?\n", masked="{review} The customer is {mask}.", words=["No", "Yes"], data="d",
        labels=["unhappy", "happy"], label_column="mood", neutral="Happy?", task_metrics=["accuracy", "macro-f1"],
    ).settled()  # fmt: skip
    assert replace(by_file, task_file=None) == by_options
    assert by_file.settled() == by_file  # said twice, and the same
    file.write_text(MOOD + 'objective = "accuracy"\n')
    assert config(task_file=str(file), data="d").settled().objective == "accuracy" and by_file.objective == "loss"
    assert Evaluation(model="m", output="o", task_file=str(file), data="d").with_file().words == ["No", "Yes"]  # and trains nothing
    for other in ("f1", "loss"):  # the default's name, too, when it is said
        with pytest.raises(UserError, match=rf'mood\.toml: it has "accuracy", and --objective is "{other}"'):
            config(task_file=str(file), objective=other, data="d").settled()
    with pytest.raises(UserError, match=r'mood\.toml: it has "mood", and --label-column is "stars": leave one of them out'):
        config(task_file=str(file), label_column="stars", data="d").settled()
    with pytest.raises(UserError, match=r'mood\.toml: it has "mood", and --task is "sst2"'):
        config(task_file=str(file), task="sst2", data="d").settled()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give --task, one of boolq, cb, "),
        ({"task": "mod"}, "--task 'mod' is unknown"),
        ({"prompt": "{x}", "words": ["a", "b"]}, "a task of your own needs a name: --task NAME"),
        ({"task": "sst2", "prompt": "{x}", "words": ["a", "b"]}, "there is a task sst2 already: give yours another name"),
        ({"task": "a b", "prompt": "{x}", "words": ["a", "b"]}, "a task's name is of letters, digits, _, - and ., not 'a b'"),
        ({"task": "t", "words": ["a", "b"]}, "task t has no prompt: say what a model reads"),
        ({"task": "t", "prompt": "{x}"}, "task t needs words to choose from, or the column of free answers, and not both"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "answer_column": "y"}, "and not both"),
        ({"task": "t", "prompt": "no column", "words": ["a", "b"]}, "its prompt has no {column}: every row would read the same"),
        ({"task": "t", "prompt": "{x", "words": ["a", "b"]}, "task t, prompt: expected '}' before end of string: a brace that is none"),
        ({"task": "t", "prompt": "x}", "words": ["a", "b"]}, "task t, prompt: Single '}' encountered in format string"),
        ({"task": "t", "prompt": "{}", "words": ["a", "b"]}, "task t, prompt: {} names no column"),
        ({"task": "t", "prompt": "{x!r}", "words": ["a", "b"]}, "task t, prompt: {x} has more than a column's name"),
        ({"task": "t", "prompt": "{x} {mask}", "words": ["a", "b"]}, "{mask} belongs into masked"),
        ({"task": "t", "masked": "{x}", "words": ["a", "b"]}, "masked needs one {mask}, where the word belongs"),
        ({"task": "t", "masked": "{x} {mask} {mask}", "words": ["a", "b"]}, "masked needs one {mask}"),
        ({"task": "t", "prompt": "{x} {label}", "words": ["a", "b"]}, "its prompt has {label}, the column of the answer"),
        ({"task": "t", "prompt": "{x} {y}", "answer_column": "y"}, "its prompt has {y}, the column of the answer"),
        ({"task": "t", "masked": "{x} {mask}", "answer_column": "y"}, "its answers are free: leave masked out"),
        ({"task": "t", "prompt": "{x}", "answer_column": "y", "labels": ["a", "b"]}, "labels are of words, and its answers are free"),
        ({"task": "t", "prompt": "{x}", "words": ["a"]}, "task t needs two or more words"),
        ({"task": "t", "prompt": "{x}", "words": ["a", " "]}, "none of them empty"),
        ({"task": "t", "prompt": "{x}", "words": ["a", " a"]}, "the word 'a' stands twice"),
        ({"task": "t", "prompt": "{x}", "words": ["a", " b"]}, "of its words 'a', ' b' some begin with a blank and others do not"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "neutral": "{x}?"}, "its neutral has {x}, and is the same for every row"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "labels": ["1", "1.0"]}, "its labels must be texts that differ"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "labels": ["a"]}, "task t has 2 words and 1 labels"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "labels": ["a b", "A_B"]}, "its labels must be texts that differ"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "decoding": "generate"}, "decoding 'generate' is not that of words, scores: leave it out"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "task_metrics": ["acuracy"]}, "macro-f1, auc, loss, predicted; did you mean 'accuracy'?"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "task_metrics": ["loss"]}, "its first metric is what curves and tables show, accuracy, and"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b", "c"], "task_metrics": ["accuracy", "auc"]}, "'auc' must be one of accuracy, macro-f1, loss, pre"),
        ({"task": "t", "prompt": "{x}", "answer_column": "y", "task_metrics": ["f1", "f1"]}, "metrics are one or more of f1, em, loss, none twice"),
        ({"task": "t", "prompt": "{x}", "words": ["a", "b"], "data": None}, "task t has no data of its own: give --data"),
    ],
)  # fmt: skip
def test_what_is_no_task(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config(**{"data": "d", **given}).settled()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name = ", "is not TOML: Invalid value (at end of document)"),
        ("name = 1\n", "name is 1: give a text"),
        ('prompt = "{x}"\n', 'has no name: give one, as in name = "mood"'),
        ('name = "t"\nprmpt = "{x}"\n', "there is no key 'prmpt'; the keys are name, prompt, masked"),
        ('name = "t"\nwords = "a,b"\n', "words is 'a,b': give a list of texts"),
        ('name = "t"\nlabels = [1, 2]\n', "labels is [1, 2]: give a list of texts"),
        ('name = "t"\nprompt = 2026-01-01\n', "prompt is datetime.date(2026, 1, 1): give a text"),
        ('name = "t"\nname = "u"\n', "is not TOML: Cannot overwrite a value"),
        (b'name = "\xff"\n', "is not TOML: 'utf-8' codec can't decode"),
        ("#" * (1 << 21), "has more than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_files_that_are_no_description(content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_task_file(str(path))
    assert said in str(error.value) and "task.toml" in str(error.value) and "\n" not in str(error.value)
    if "prmpt" in str(content):
        assert "did you mean 'prompt'?" in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--task-file .*absent\.toml cannot be read: .*No such file"):
        read_task_file(str(tmp_path / "absent.toml"))
    with pytest.raises(UserError, match="is no file: give one"):
        read_task_file(str(tmp_path))


def test_a_column_that_is_not_there_is_named(file: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"revew": "a", "stars": 1, "mood": 0}] * 9)
    with pytest.raises(
        UserError, match=r"has the columns revew, stars, mood; task mood needs review, stars, mood: .*did you mean 'revew'"
    ):
        load_splits(str(rows), config(task_file=str(file)).the_task(), "causal", seed=0)


def test_metrics_are_those_that_there_are() -> None:
    """Said again in own.py, which loads no torch; `per-answer-accuracy` is MultiRC's."""
    assert {*own.METRICS_OF_WORDS, *own.METRICS_OF_ANSWERS} == {*METRICS} - {"per-answer-accuracy"}
    assert {*own.CURVES} == {name for name, m in METRICS.items() if isinstance(m, Mean)} - {"per-answer-accuracy"}
    assert {*KEYS.values()} <= {o for o in vars(config())}


def mood_rows(n: int) -> list[dict[str, Any]]:
    return [
        {"review": f"{k} the film is {('dull', 'fine')[k % 2]}", "stars": k % 5, "mood": ("unhappy", "happy")[k % 2]}
        for k in range(n)
    ]


def test_a_run_records_the_whole_task(
    train_command: Callable[..., list[str]], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own options tell what it is of: a file that changes is refused by whoever goes on, one that is gone is not missed."""
    rows = write_jsonl(tmp_path / "rows.jsonl", mood_rows(40))
    output = tmp_path / "run"
    command = train_command(output, task=None, task_file=file, data=rows, steps=2, eval_examples=8)
    assert main(command) == 0
    assert "accuracy " in capsys.readouterr().out
    result, saved = (json.loads((output / name).read_text()) for name in ("result.json", "config.json"))
    assert (result["task"], result["metric"]) == ("mood", "accuracy") and "macro-f1" in result["after"]
    recorded = journal.read(output / "run.zoj").header.hyperparameters["config"]
    for found in (saved["config"], recorded, result["hyperparameters"]):
        assert found["task"] == "mood" and found["words"] == ["No", "Yes"] and found["prompt"].endswith("Happy?\n")
    again = train_command(output, "--overwrite", task=None, task_file=file, data=rows, steps=3, eval_examples=8, dev_examples=0)
    assert main([*again, "--no-save"]) == 0 and main(["resume", str(output)]) == 0
    measured = train_command(
        tmp_path / "measured", "--calibrated", command="evaluate", task=None, task_file=file, data=rows, steps=None, batch_size=None
    )
    assert main(measured) == 0 and json.loads((tmp_path / "measured" / "result.json").read_text())["task"] == "mood"
    file.write_text(MOOD.replace("Happy?\\n", "Glad?\\n"))
    capsys.readouterr()
    assert main(["resume", str(output)]) == 2
    assert 'mood.toml: prompt is "{review} ({stars} of 5)\\nGlad?\\n", and was' in capsys.readouterr().err
    file.unlink()
    assert main(["resume", str(output)]) == 0


def test_a_comparison_sees_another_task(
    train_command: Callable[..., list[str]], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", mood_rows(30))
    more = ("--methods", "mezo", "--forwards", "2", "--seeds", "0", "--points", "0")
    command = train_command(
        tmp_path / "compared",
        *more,
        command="compare",
        task=None,
        task_file=file,
        data=rows,
        steps=None,
        eval_examples=6,
        dev_examples=0,
    )
    assert main(command) == 0
    file.write_text(MOOD.replace("unhappy", "sad"))
    capsys.readouterr()
    assert main(command) == 2
    assert "has a run with another labels" in capsys.readouterr().err


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == catalog.table() and {line.split()[1] for line in printed.splitlines()[2:]} == {*TASKS}
    assert len({len(line) for line in printed.splitlines()}) == 1
    assert main(["tasks", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["boolq"]["columns"]["label"] == ["label", "answer"] and found["drop"]["decoding"] == "generate"
    assert (ROOT / "docs" / "tasks.md").read_text() == catalog.page(), "python -m zo_finetune.catalog > docs/tasks.md"


def test_the_data_of_a_task_are_the_hubs(
    train_command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where none are named; offline that is said."""
    assert main(train_command(tmp_path / "run", task="rte", data=None)) == 2
    assert (
        "--data 'aps/super_glue' is neither a local file or folder nor a data set that could be loaded" in capsys.readouterr().err
    )
    settled = config(task="rte").settled()
    assert (settled.data, settled.data_config) == ("aps/super_glue", "rte")
    assert (config(task="rte", data_config="cb").settled().data_config, config(task="rte", data="d").settled().data_config) == (
        "cb",
        None,
    )


def test_the_page_describes_tasks_that_work() -> None:
    """Its examples of TOML are read as they stand."""
    import tomllib

    blocks = [text.split("```")[0] for text in catalog.OWN.split("```toml\n")[1:]]
    made = [config(task_file=None, **{KEYS[k]: v for k, v in tomllib.loads(text).items()}).the_task() for text in blocks]
    assert [t.name for t in made] == ["mood", "capitals"] and made[0].forms == ("causal", "masked")
