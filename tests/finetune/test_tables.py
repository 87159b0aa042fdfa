"""Files as people write them: what is read as it stands, and what is refused with its line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zo_finetune import formats
from zo_finetune.data import load_splits
from zo_finetune.errors import UserError
from zo_finetune.sources import read
from zo_finetune.tables import read_table
from zo_finetune.tasks import get_task

from tests.finetune.conftest import make_rows, write_jsonl

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(name: str, content: str | bytes, encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return path

    return file


def rows_of(path: Path) -> list[dict[str, Any]]:
    table = read_table(path)
    return [table.row(k) for k in range(len(table))]


FINE = [{"sentence": "fine", "label": "1"}, {"sentence": "dull", "label": "0"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(write: Write, encoding: str, end: str) -> None:
    assert rows_of(write("a.csv", end.join(["sentence,label", "fine,1", "dull,0"]), encoding)) == FINE
    assert rows_of(write("a.tsv", end.join(["sentence\tlabel", "fine\t1", "dull\t0", ""]), encoding)) == FINE
    assert rows_of(write("a.jsonl", end.join([*map(json.dumps, FINE), ""]), encoding)) == FINE
    assert rows_of(write("a.json", json.dumps(FINE), encoding)) == FINE


def test_every_value_of_a_text_file_is_a_text(write: Write) -> None:
    """None is missing, and none becomes a number: pandas reads NA, None, null, nan and an empty label otherwise."""
    odd = ["NA", "None", "null", "nan", "N/A", "", "007", "1e5", "True", "-inf"]
    assert [r["sentence"] for r in rows_of(write("a.csv", "sentence,label\n" + "".join(f"{t},1\n" for t in odd)))] == odd
    assert [r["sentence"] for r in rows_of(write("a.tsv", "sentence\tlabel\n" + "".join(f"{t}\t1\n" for t in odd)))] == odd


def test_quotes_in_tsv_are_characters(write: Write) -> None:
    texts = ['" begins with one', 'has a "word', '"all of it"', 'ends with one"', '"', '""', "5' 3\" tall", "it's"]
    assert [r["sentence"] for r in rows_of(write("a.tsv", "sentence\tlabel\n" + "".join(f"{t}\t1\n" for t in texts)))] == texts


def test_tsv_by_a_writer_that_quotes(write: Write) -> None:
    """All fields, or those with a quote in them: their quotes are the writer's, and the user is told."""
    for content in ('"sentence"\t"label"\n"a ""word"""\t"1"\n', 'sentence\tlabel\n"a ""word"""\t1\n'):
        table = read_table(write("a.tsv", content))
        assert table.values == [('a "word"', "1")]
        assert any("quoted" in note for note in table.notes)


def test_csv_with_quotes_commas_and_line_breaks(write: Write) -> None:
    table = read_table(write("a.csv", 'sentence,label\n"one, ""two""\nthree",1\nfour,0\n'))
    assert table.values == [('one, "two"\nthree', "1"), ("four", "0")]
    assert [table.place(k) for k in range(2)] == ["row 1, line 2", "row 2, line 4"]


def test_blank_lines_are_no_rows_and_are_told(write: Write) -> None:
    for name, content in (
        ("a.csv", "sentence,label\nfine,1\n\n\ndull,0\n"),
        ("a.tsv", "sentence\tlabel\nfine\t1\n\n\ndull\t0\n\n"),
    ):
        table = read_table(write(name, content))
        assert table.notes == ["2 blank lines were passed over"]
        assert table.lines == [2, 5]
    table = read_table(write("a.jsonl", "\n" + json.dumps(FINE[0]) + "\n  \n" + json.dumps(FINE[1])))
    assert table.notes == ["2 blank lines were passed over"]
    assert table.lines == [2, 4]
    assert read_table(write("b.csv", "sentence,label\nfine,1\n\n")).notes == []


def test_lines_of_json_may_differ_in_their_keys(write: Write) -> None:
    path = write("a.jsonl", '{"label": 1, "sentence": "fine"}\n{"sentence": "dull", "label": 0, "idx": 7, "meta": {"a": [1]}}\n')
    table = read_table(path, keep={"sentence", "label"})
    assert table.column_names == ["label", "sentence", "idx", "meta"]
    assert table.values == [(1, "fine"), (0, "dull")]


def test_json_as_a_list_as_columns_and_as_lines(write: Write) -> None:
    columns = {"sentence": ["fine", "dull"], "label": ["1", "0"]}
    lines = "\n".join(map(json.dumps, FINE))
    for content in (json.dumps(FINE, indent=1), json.dumps(columns), lines):
        assert rows_of(write("a.json", content)) == FINE
    assert rows_of(write("a.json", json.dumps(FINE[0]))) == FINE[:1]


HEADER = "sentence,label\n"
DEEP = '{"sentence": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", HEADER + "fine,1\ndull\n", r"line 3 has 1 fields where the header has 2"),
        ("a.csv", HEADER + "fine,1\nso, so,0\n", r"line 3 has 3 fields where the header has 2"),
        ("a.tsv", 'sentence\tlabel\n"a\tb"\t1\n', r"line 2 has 3 fields .*not quoted"),
        ("a.csv", HEADER + 'fine,1\n"never closed,1\nmore,0\n', r"line 3: .*not closed"),
        ("a.csv", HEADER + '"a" b,1\n', r"line 2: .*quote"),
        ("a.csv", HEADER, r"has a header and no row"),
        ("a.csv", "\n\n", r"has no row"),
        ("a.csv", "sentence,label,label\nfine,1,0\n", r"two columns are called 'label'"),
        ("a.csv", ",".join(f"c{k}" for k in range(10_001)) + "\n", r"10,001 columns, and at most 10,000"),
        ("a.csv", (HEADER + "fine,1\n").encode("utf-16-le"), r"line 1 holds a zero byte.*UTF-16"),
        ("a.csv", b"sentence,label\nfine,1\ncaf\xe9,1\n", r"not UTF-8.*save it as UTF-8"),
        ("a.jsonl", '{"sentence": "fine", "label": 1}\n{"sentence"', r"line 2: "),
        ("a.jsonl", '{"sentence": "fine", "label": 1}\n[1, 2]\n', r"line 2 is \[1, 2\], and not an object"),
        ("a.jsonl", '{"label": 1, "label": 0}\n', r"line 1: the key 'label' stands twice"),
        ("a.jsonl", '{"label": ' + "9" * 5000 + "}\n", r"line 1: .*digits"),
        ("a.jsonl", DEEP, r"line 1 is nested too deeply"),
        ("a.jsonl", "\n \n", r"has no row"),
        ("a.json", DEEP, r"nested too deeply"),
        ("a.json", "3", r"not a list of objects"),
        ("a.json", '{"a": [1], "b": [1, 2]}', r"differ in length: a 1, b 2"),
        ("a.json", "[]", r"has no row"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", r"could not be read as parquet"),
        ("a.parquet", b"", r"is empty"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"pointer of Git LFS"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused_with_its_line(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_table(write(name, content))
    assert len(str(caught.value)) < 800 and "\n" not in str(caught.value)


def test_bounds(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame(FINE * 10).to_parquet(tmp_path / "a.parquet")
    paths = [write("a.csv", HEADER + "fine,1\n" * 20), write_jsonl(tmp_path / "a.jsonl", FINE * 10), tmp_path / "a.parquet"]
    for bound in ("MAX_BYTES", "MAX_ROWS"):
        for path in paths:
            with monkeypatch.context() as patch:
                patch.setattr(formats, bound, 19)
                with pytest.raises(UserError, match="at most 19 are read"):
                    read_table(path)


def test_a_parquet_file_cut_short_or_with_twins(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table({"sentence": ["fine"] * 100, "label": [1] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for cut in (len(whole) // 2, len(whole) - 3):
        (tmp_path / "b.parquet").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"b\.parquet could not be read"):
            read_table(tmp_path / "b.parquet")
    twins = pyarrow.table([pyarrow.array(["fine"]), pyarrow.array([1]), pyarrow.array([0])], names=["sentence", "label", "label"])
    pq.write_table(twins, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="two columns are called 'label'"):
        read_table(tmp_path / "c.parquet")


def test_terminal_escapes_are_written_out(write: Write) -> None:
    """A name, a column, a value or a library's error that quotes them moves no cursor and colours nothing."""
    evil = "\x1b[2J\x07\u202e"
    path = write(f"a{evil}.csv", f"sen{evil},label\nfine,1\n")
    for error in (lambda: read_table(path.with_suffix(".txt")), lambda: load_splits(str(path), get_task("sst2"), "causal", seed=0)):
        with pytest.raises(UserError) as caught:
            error()
        assert str(caught.value).isprintable()
        assert r"\x1b[2J" in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere")
    for name, message in (
        (tmp_path / "pipe.csv", "neither a regular file"),
        ("/dev/zero", "neither a regular file"),
        (tmp_path / "gone.csv", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read(str(name))


def test_names_nearly_right(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "reviews.jsonl", [{"sentense": "fine", "label": 1}] * 9)
    with pytest.raises(UserError, match=r"did you mean 'reviews\.jsonl'"):
        read(str(tmp_path / "review.jsonl"))
    with pytest.raises(UserError, match=r"did you mean 'sentense'"):
        load_splits(str(tmp_path / "reviews.jsonl"), get_task("sst2"), "causal", seed=0)
    with pytest.raises(UserError, match=r"did you mean 'sentence'"):
        load_splits(str(tmp_path / "reviews.jsonl"), get_task("sst2"), "causal", seed=0, columns={"sentance": "sentense"})
    with pytest.raises(UserError, match=r"did you mean 'sst2'"):
        get_task("sst-2")
    (tmp_path / "trian.jsonl").write_bytes((tmp_path / "reviews.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"a folder needs train.*did you mean 'train'"):
        read(str(tmp_path))


def test_two_files_for_one_split(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.csv"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds train\.csv and train\.jsonl: keep one"):
        read(str(tmp_path))


def test_many_columns_are_not_all_listed(write: Write) -> None:
    path = write("a.csv", ",".join("c" * 99 + str(k) for k in range(900)) + "\n" + "x," * 899 + "x\n")
    with pytest.raises(UserError, match=r"and 888 more; task sst2 needs sentence, label") as caught:
        load_splits(str(path), get_task("sst2"), "causal", seed=0)
    assert len(str(caught.value)) < 1000
    with pytest.raises(UserError, match="separated by ';'"):
        load_splits(str(write("b.csv", "sentence;label\nfine;1\n" * 9)), get_task("sst2"), "causal", seed=0)


def labels_read(path: Path) -> dict[str, int]:
    got = load_splits(str(path), get_task("sst2"), "causal", seed=0, train_examples=0)
    return {e.candidates[0].context.removesuffix(" It was"): e.label for part in (got.train, got.dev, got.eval) for e in part}


@pytest.mark.parametrize(
    ("zero", "one"), [("0", "1"), ("0.0", " 1.0 "), ("negative", "Positive"), ("neg", "POS"), ("0", "positive")]
)
def test_labels_of_text_files(write: Write, zero: str, one: str) -> None:
    rows = make_rows(20, 5)
    path = write("a.csv", HEADER + "".join(f"{r['sentence']},{(zero, one)[r['label']]}\n" for r in rows))
    assert labels_read(path) == {r["sentence"]: r["label"] for r in rows}


def test_whole_floats_are_labels(tmp_path: Path) -> None:
    import pandas

    rows = make_rows(20, 5)
    pandas.DataFrame([{**r, "label": float(r["label"])} for r in rows]).to_parquet(tmp_path / "a.parquet")
    assert labels_read(tmp_path / "a.parquet") == {r["sentence"]: r["label"] for r in rows}


@pytest.mark.parametrize("value", ["", None, float("nan")])
def test_a_missing_label_is_named_with_its_row(tmp_path: Path, value: Any) -> None:
    rows = make_rows(20, 5)
    rows[7]["label"] = value
    if value == "":
        path = tmp_path / "a.csv"
        path.write_text(HEADER + "".join(f"{r['sentence']},{r['label']}\n" for r in rows))
    else:
        path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"row 8.*the row has no label"):
        labels_read(path)
    if value is None:
        del rows[7]["label"]
        with pytest.raises(UserError, match=r"row 8.*the row has no label"):
            labels_read(write_jsonl(tmp_path / "b.jsonl", rows))


@pytest.mark.parametrize("value", [-1, "-1"])
def test_withheld_labels_are_called_that(value: Any) -> None:
    with pytest.raises(ValueError, match="kept secret"):
        get_task("sst2").example({"sentence": "fine", "label": value}, "causal")


def class_file(path: Path, names: list[str], rows: list[tuple[str, int]]) -> Path:
    import datasets

    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_list([{"sentence": s, "label": n} for s, n in rows], features=features).to_parquet(path)
    return path


def test_class_names_count_where_a_file_has_them(tmp_path: Path) -> None:
    rows = make_rows(20, 5)
    truth = {r["sentence"]: r["label"] for r in rows}
    for names in (["positive", "negative"], ["pos", "neg"], ["Positive ", "unsure", "NEGATIVE"]):
        numbers = {1: 0, 0: len(names) - 1}
        assert labels_read(class_file(tmp_path / "a.parquet", names, [(r["sentence"], numbers[r["label"]]) for r in rows])) == truth
    for names in (["0", "1"], ["LABEL_0", "LABEL_1"], ["negative", "positive"]):
        assert labels_read(class_file(tmp_path / "a.parquet", names, [(r["sentence"], r["label"]) for r in rows])) == truth


def test_class_names_of_another_task_are_refused(tmp_path: Path) -> None:
    rows = [(r["sentence"], r["label"]) for r in make_rows(20, 5)]
    with pytest.raises(UserError, match=r"called world, sports, and those of sst2 negative, positive"):
        labels_read(class_file(tmp_path / "a.parquet", ["world", "sports"], rows))
    with pytest.raises(UserError, match=r"row 1[^0-9].*'neutral'"):
        labels_read(class_file(tmp_path / "a.parquet", ["negative", "positive", "neutral"], [("meh", 2), *rows]))
    rows[4] = (rows[4][0], -1)
    with pytest.raises(UserError, match=r"row 5[^0-9].*kept secret"):
        labels_read(class_file(tmp_path / "a.parquet", ["positive", "negative"], rows))


@pytest.mark.parametrize(
    ("text", "why"),
    [("half \ud800 a pair", "surrogate"), ("x" * 1_000_001, "at most 1,000,000 characters"), ("\u3000\n", "needs a text")],
)
def test_texts_that_no_tokenizer_takes(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        get_task("sst2").example({"sentence": text, "label": 1}, "causal")
    assert len(str(caught.value)) < 300


def test_what_was_read_is_told(tmp_path: Path) -> None:
    rows = make_rows(40, 5)
    write_jsonl(tmp_path / "train.jsonl", [*rows[:30], rows[3], {**rows[4], "label": 1}])
    write_jsonl(tmp_path / "validation.jsonl", [*rows[30:], *rows[:3]])
    got = load_splits(str(tmp_path), get_task("sst2"), "causal", seed=0, dev_examples=0, train_examples=0)
    first, *others = got.notes
    assert "train.jsonl 32 rows" in first and "validation.jsonl 13 rows" in first
    assert "train: 13 negative, 16 positive; eval: 7 negative, 6 positive" in first
    assert others == [
        "duplicates: 2 of 29 train examples repeat another's text",
        f"{tmp_path}/train.jsonl: 3 rows were left out of the sample, whose texts are in another split already (row 1, row 2, row 3)",
        "warning: 1 texts stand with different labels",
    ]
    assert load_splits(str(write_jsonl(tmp_path / "a.jsonl", rows)), get_task("sst2"), "causal", seed=0).notes[1:] == []


def test_one_class_alone_is_told(tmp_path: Path) -> None:
    rows = [{**r, "label": 1} for r in make_rows(40, 5)]
    got = load_splits(str(write_jsonl(tmp_path / "a.jsonl", rows)), get_task("sst2"), "causal", seed=0)
    assert [note for note in got.notes if note.startswith("warning: all 26 train examples are 'positive'")]


def test_long_fields_of_csv(write: Write) -> None:
    """Longer than csv's own bound, and another column's."""
    path = write("train.csv", "sentence,label,page\n" + f"{'word ' * 30_000},1,{'x' * 2_000_000}\n")
    assert len(rows_of(path)[0]["sentence"]) == 150_000


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_what_stands_for_a_split_and_is_no_file_is_refused(kind: str, name: str, data_folder: Path, tmp_path: Path) -> None:
    """A link to nowhere must not mean that the evaluation rows are cut from the training rows."""
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    (folder / name).unlink()
    {"link": lambda p: p.symlink_to("nowhere"), "pipe": os.mkfifo, "folder": Path.mkdir}[kind](folder / name)
    with pytest.raises(UserError, match=rf"data: {name} is no file that is there"):
        load_splits(str(folder), get_task("sst2"), "causal", seed=0)


def test_what_is_not_read_beside_a_split_is_told(data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    assert not any("not read" in note for note in load_splits(str(folder), get_task("sst2"), "causal", seed=0).notes)
    (folder / "validation.jsonl").rename(folder / "validaton.jsonl")
    (folder / "validation.jsonl.bak").touch()
    (folder / "README.md").touch()
    notes = load_splits(str(folder), get_task("sst2"), "causal", seed=0).notes
    assert any(note.endswith("beside it, validation.jsonl.bak, validaton.jsonl were not read") for note in notes)
