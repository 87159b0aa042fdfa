"""Reading, splits, sampling, batches, and the errors of bad data."""

from __future__ import annotations

import csv
import socket
from pathlib import Path
from typing import Any

import pytest
from zo_finetune.data import Batches, Splits, load_splits, shuffled
from zo_finetune.errors import UserError
from zo_finetune.sources import read
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Example

from tests.finetune.conftest import make_rows, write_jsonl

TASK = get_task("sst2")


def splits(spec: Path | str, **changes: Any) -> Splits:
    options = {"train_examples": 8, "dev_examples": 4, "eval_examples": 6, "seed": 0, **changes}
    return load_splits(str(spec), TASK, "causal", **options)


def texts(examples: list[Example]) -> list[str]:
    return [e.candidates[0].context for e in examples]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_every_format_gives_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of them opens a connection."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"a local file needs no network, yet something connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    rows = make_rows(20, 5)
    rows[3]["sentence"] = 'with "quotes", commas, and ümlauts'
    import json

    import pandas

    files = [
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_csv(tmp_path / "b.csv", rows),
        write_csv(tmp_path / "c.tsv", rows, "\t"),
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    pandas.DataFrame(rows).to_parquet(tmp_path / "e.parquet")
    expected = [TASK.example(row, "causal") for row in rows]
    for path in [*files, tmp_path / "d.json", tmp_path / "e.parquet"]:
        got = splits(path, train_examples=0, dev_examples=0)
        assert sorted(texts(got.train) + texts(got.eval)) == sorted(texts(expected)), path
        by_text = {e.candidates[0].context: e for e in expected}
        assert all(by_text[e.candidates[0].context] == e for e in got.train + got.eval), path


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(20, 5))
    before = texts(splits(path).eval)
    write_jsonl(path, make_rows(20, 6))
    assert set(texts(splits(path).eval)).isdisjoint(before)


def test_splits_of_one_file_do_not_overlap(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(30, 5))
    got = splits(path, train_examples=0)
    parts = [set(texts(part)) for part in (got.train, got.dev, got.eval)]
    assert [len(p) for p in parts] == [20, 4, 6]
    assert len(set.union(*parts)) == 30
    assert texts(splits(path, train_examples=3).eval) == texts(got.eval)  # the evaluation rows depend on seed and number alone
    assert texts(splits(path, seed=1).eval) != texts(got.eval)


def test_a_folder_has_its_own_evaluation_rows(data_folder: Path) -> None:
    got = splits(data_folder, eval_examples=0, train_examples=0, dev_examples=5)
    assert [len(p) for p in (got.train, got.dev, got.eval)] == [55, 5, 30]
    assert set(texts(got.eval)).isdisjoint(texts(got.train) + texts(got.dev))
    assert got.origin["eval"].endswith("validation.jsonl")
    assert got.origin["train"].endswith("train.jsonl")


def test_small_files_need_no_numbers(tmp_path: Path) -> None:
    got = load_splits(str(write_jsonl(tmp_path / "a.jsonl", make_rows(25, 5))), TASK, "causal", seed=0)
    assert [len(p) for p in (got.train, got.dev, got.eval)] == [16, 4, 5]


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    rows = [{"text": r["sentence"], "polarity": ["negative", "Positive"][r["label"]]} for r in make_rows(20, 5)]
    path = write_csv(tmp_path / "a.csv", rows)
    got = splits(path, columns={"sentence": "text", "label": "polarity"})
    assert {e.label for e in got.train} == {0, 1}
    with pytest.raises(UserError, match=r"has the columns text, polarity; task sst2 needs sentence, label.*--column"):
        splits(path)
    with pytest.raises(UserError, match=r"--column review=.*fields sentence, label"):
        splits(path, columns={"review": "text"})


@pytest.mark.parametrize("bad", [2, -1, "good", None, 0.5, True])
def test_a_label_outside_the_task_names_file_row_value_and_remedy(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(
        ValueError, match=r"field 'label' is .*; the labels of sst2 are 0 \(negative\), 1 \(positive\): correct the row"
    ):
        TASK.example({"sentence": "fine", "label": bad}, "causal")
    if isinstance(bad, int) and not isinstance(bad, bool):
        rows = make_rows(20, 5)
        rows[11]["label"] = bad
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(UserError, match=rf"a\.jsonl, row 12: field 'label' is {bad}; "):
            splits(path, train_examples=0, dev_examples=0)


def test_an_empty_sentence_is_refused() -> None:
    for bad in ("", "  ", None, 3):
        with pytest.raises(ValueError, match=r"field 'sentence' is .*needs a text"):
            TASK.example({"sentence": bad, "label": 1}, "causal")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"sentence": "fine", "label": 1}\n{"sentence": broken', r"a\.jsonl could not be read as jsonl"),
        ("a.parquet", "no parquet", r"a\.parquet could not be read as parquet"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.txt", "fine", r"suffix '\.txt'; readable are \.jsonl"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / name))


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl does not exist"):
        read(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=r"does not exist: give a file"):
        read("./absent")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(3, 0))
    with pytest.raises(UserError, match=r"holds rows\.jsonl; a folder needs train"):
        read(str(tmp_path))
    with pytest.raises(UserError, match=r"'nobody/nothing' is neither a local file or folder nor a data set"):
        read("nobody/nothing")


def test_too_few_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(6, 5))
    with pytest.raises(UserError, match=r"has 6 rows: 0 are left to train on, 6 to evaluate on, 0 for dev"):
        splits(path)
    with pytest.raises(UserError, match=r"--eval-examples 0 means all validation rows; .* has none"):
        splits(path, eval_examples=0)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    items = list(range(10))
    one, other = Batches(items, 4, seed=3), Batches(items, 4, seed=3)
    forwards = [one[s] for s in range(12)]
    assert [other[s] for s in reversed(range(12))] == forwards[::-1]
    assert [Batches(items, 4, seed=4)[s] for s in range(12)] != forwards
    walk = [item for batch in forwards[:10] for item in batch]
    for epoch in range(4):
        assert sorted(walk[10 * epoch : 10 * epoch + 10]) == items  # every item once an epoch, and every batch full
    assert walk[:10] != walk[10:20]
    assert sorted(Batches(items, 25, seed=0)[0])[:5] == [0, 0, 1, 1, 2]  # a batch may span epochs


def test_the_order_is_frozen() -> None:
    """Resuming with another Python or NumPy must see the same batches."""
    assert shuffled(8, 0) == [3, 7, 5, 2, 4, 1, 6, 0]
    assert shuffled(8, (5 << 32) + 1) == [1, 3, 7, 0, 4, 5, 2, 6]
