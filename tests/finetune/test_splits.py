"""Which rows a run trains on, watches and is measured on: few of each label, seeds, splits without a text in common."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zo_finetune import files, sources
from zo_finetune.cli import main
from zo_finetune.data import Splits, load_splits, shuffled
from zo_finetune.errors import UserError
from zo_finetune.formats import Table
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Example

from tests.finetune.conftest import make_rows, write_jsonl

TASK = get_task("sst2")
COLUMNS = ["sentence", "label"]


def splits(spec: Path | str, **changes: Any) -> Splits:
    return load_splits(str(spec), TASK, "causal", **{"seed": 0, **changes})


def sentence(example: Example) -> str:
    return example.candidates[0].context.removesuffix(" It was")


def sentences(examples: list[Example]) -> list[str]:
    return [sentence(e) for e in examples]


ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1)), min_size=2, max_size=60)
COUNTS = st.one_of(st.none(), st.integers(0, 12))


@settings(max_examples=150, deadline=None)
@given(train=ROWS, held=st.one_of(st.none(), ROWS), counts=st.tuples(COUNTS, COUNTS, st.integers(0, 12)), seed=st.integers(0, 99))
def test_no_text_is_in_two_splits(
    train: list[tuple[int, int]], held: list[tuple[int, int]] | None, counts: tuple[int | None, int | None, int], seed: int
) -> None:
    """Whatever repeats where. Rows whose text repeats nowhere are sampled as if there were no others."""

    def source(rows: list[tuple[int, int]], name: str) -> sources.Source:
        return sources.Source(Table(COLUMNS, COLUMNS, [(f"film {text}", label) for text, label in rows]), name)

    found = source(train, "t"), None if held is None else source(held, "v")
    dev, evaluation, most = counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zo_finetune.data.read", lambda *_: found)
        try:
            got = splits("x", dev_examples=dev, eval_examples=evaluation, train_examples=most, seed=seed)
        except UserError:
            return
    parts = [set(sentences(part)) for part in (got.train, got.dev, got.eval)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    if len({text for text, _ in train}) == len(train) and held is None:
        order = [f"film {train[k][0]}" for k in shuffled(len(train), seed)]
        assert sentences([*got.eval, *got.dev, *got.train]) == order[: len(got.eval) + len(got.dev) + len(got.train)]
    left = len(train) - len(got.train) - len(got.dev) - (len(got.eval) if held is None else 0)
    told = [note for note in got.notes if "left out of the sample" in note]
    assert left >= sum(int(note.split()[1]) for note in told)


def test_a_text_of_the_evaluation_is_not_trained_on_whatever_its_label(tmp_path: Path) -> None:
    rows = make_rows(20, 5)
    write_jsonl(tmp_path / "train.jsonl", [*rows, {**rows[3], "label": 1 - rows[3]["label"]}])
    write_jsonl(tmp_path / "validation.jsonl", rows[3:5])
    got = splits(tmp_path)
    assert {rows[3]["sentence"], rows[4]["sentence"]}.isdisjoint(sentences([*got.train, *got.dev]))
    assert len(got.train) + len(got.dev) == 18
    (note,) = (n for n in got.notes if "left out" in n)
    assert note == (
        f"{tmp_path}/train.jsonl: 3 rows were left out of the sample, whose texts are in another split already (row 4, row 5, row 21)"
    )


def test_few_of_each_label(tmp_path: Path) -> None:
    """Of three labels in unlike numbers: k for train, k others for dev, the first ones of the sample."""
    draw, texts = random.Random(1), [f"film {k}" for k in range(120)]
    rows = [{"sentence": text, "label": draw.choice((0, 0, 0, 1))} for text in texts]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    got = splits(path, k_shot=5, eval_examples=20, seed=3)
    assert [Counter(e.label for e in part) for part in (got.train, got.dev)] == [{0: 5, 1: 5}] * 2
    order = [rows[k] for k in shuffled(120, 3)]
    assert sentences(got.eval) == [row["sentence"] for row in order[:20]]
    for label in (0, 1):
        mine = [row["sentence"] for row in order[20:] if row["label"] == label]
        assert [sentence(e) for e in got.train if e.label == label] == mine[:5]
        assert [sentence(e) for e in got.dev if e.label == label] == mine[5:10]
    assert splits(path, k_shot=5, eval_examples=20, seed=3).train == got.train != splits(path, k_shot=5, seed=4).train


def test_a_label_with_too_few_rows_is_named(tmp_path: Path) -> None:
    rows = make_rows(20, 5)
    path = write_jsonl(tmp_path / "train.jsonl", [r for k, r in enumerate(rows) if r["label"] == 0 or k < 12])
    write_jsonl(tmp_path / "validation.jsonl", rows[-2:])
    assert len(splits(tmp_path, k_shot=3).train) == 6
    with pytest.raises(UserError, match=r"--k-shot 4 takes 4 rows of each label .*train\.jsonl has 6 positive: give a smaller"):
        splits(tmp_path, k_shot=4)
    with pytest.raises(UserError, match=r"has 9 negative, 6 positive: give"):  # one is a text of the evaluation
        splits(tmp_path, k_shot=50)
    assert path.exists()


def test_what_does_not_go_with_few_of_each_label(tmp_path: Path, train_command: Callable[..., list[str]], capsys: Any) -> None:
    for options, message in (
        ({"k_shot": 4, "dev_examples": 3}, "--dev-examples 3"),
        ({"k_shot": 4, "dev_examples": None, "train_examples": 9}, "--train-examples 9"),
        ({"k_shot": 0, "dev_examples": None}, "--k-shot 0 must be greater than 0"),
    ):
        assert main(train_command(tmp_path / "run", **options)) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--k-shot 2 takes rows of each label, and task copa has none"):
        load_splits("x", get_task("copa"), "causal", seed=0, k_shot=2)


def test_the_seed_of_the_data_is_its_own(tmp_path: Path, train_command: Callable[..., list[str]]) -> None:
    """Given alone it changes the sample; without it, --seed is both, as ever. The order of the batches is --seed's."""

    def result(name: str, **options: Any) -> dict[str, Any]:
        assert main(train_command(tmp_path / name, "--no-save", steps=2, eval_every=0, k_shot=3, dev_examples=None, **options)) == 0
        return files.read_json(tmp_path / name / "result.json")

    one, same, other, noise = (
        result(name, **seeds)
        for name, seeds in (
            ("a", {"seed": 1}),
            ("b", {"seed": 1, "data_seed": 1}),
            ("c", {"seed": 1, "data_seed": 2}),
            ("d", {"seed": 2, "data_seed": 1}),
        )
    )
    assert one["before"] == same["before"] == noise["before"] != other["before"]
    assert one["after"] == same["after"] != noise["after"]
    assert [one["data"][part]["rows"] for part in ("train", "dev", "eval")] == [6, 6, 12]
    assert one["data"]["train"]["from"] == one["data"]["dev"]["from"] != one["data"]["eval"]["from"]
    assert one["data"]["eval"]["from"].endswith("validation.jsonl")
