"""Data as people have it: packed, in shards, matched by a pattern, a snapshot of the hub, a folder that `datasets` saved."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc
from zo_finetune import formats, sources
from zo_finetune.config import Config
from zo_finetune.errors import UserError
from zo_finetune.sources import read
from zo_finetune.tables import read_table, read_tables

from tests.finetune.conftest import make_rows, write_jsonl

ROWS = make_rows(30, 5)
EXPECTED = [(row["sentence"], row["label"]) for row in ROWS]


def content(source: sources.Source | None) -> list[tuple[Any, ...]]:
    assert source is not None
    rows = (source.rows.row(k) for k in range(len(source.rows)))
    return [(row["sentence"], int(row["label"])) for row in rows]


def pack(path: Path, codec: str) -> Path:
    target = path.with_name(path.name + {"gzip": ".gz", "zstd": ".zst"}[codec])
    with pyarrow.output_stream(str(target), compression=codec) as out:
        out.write(path.read_bytes())
    path.unlink()
    return target


def table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(rows)


def write_arrow(path: Path, rows: list[dict[str, Any]], maker: Callable[..., Any] = ipc.new_stream, **options: Any) -> Path:
    with maker(str(path), table(rows).schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table(rows), max_chunksize=7)
    return path


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_packed_files(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"train{suffix}"
    match suffix:
        case ".jsonl":
            write_jsonl(path, ROWS)
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".parquet":
            import pyarrow.parquet as pq

            pq.write_table(table(ROWS), path)
        case _:
            mark = "," if suffix == ".csv" else "\t"
            path.write_text("\n".join(mark.join(map(str, row)) for row in (("sentence", "label"), *EXPECTED)), encoding="utf-16")
    plain = content(read(str(path))[0])
    assert plain == EXPECTED
    assert content(read(str(pack(path, codec)))[0]) == plain
    assert content(read(str(tmp_path))[0]) == plain  # as the train split of its folder, too


def test_members_one_after_another(tmp_path: Path) -> None:
    """As `cat a.gz b.gz`, and parallel packers, write them."""
    half = [write_jsonl(tmp_path / "x", ROWS[:9]).read_bytes(), write_jsonl(tmp_path / "x", ROWS[9:]).read_bytes()]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, half)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(pyarrow.compress(h, codec="zstd", asbytes=True) for h in half))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert content(read(str(tmp_path / name))[0]) == EXPECTED


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_damaged_packing(tmp_path: Path, codec: str) -> None:
    path = pack(write_jsonl(tmp_path / "a.jsonl", ROWS), codec)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-3], whole[:20] + bytes([whole[20] ^ 255]) + whole[21:], b"none of it"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.jsonl\.\w+ could not be read as jsonl"):
            read_table(path)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_the_bound_is_of_what_a_file_unpacks_to(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_bytes(bytes(8 << 20))
    path = pack(tmp_path / "a.csv", codec)
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(formats, "MAX_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"it has 2,097,152 bytes, and at most 1,048,576 are read"):  # a piece beyond, and no more
        read_table(path)


def test_the_bound_is_for_all_files_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    many = make_rows(300, 5)
    for suffix in (".jsonl", ".parquet", ".arrow"):
        paths = [tmp_path / f"{k}{suffix}" for k in range(3)]
        for path in paths:
            if suffix == ".jsonl":
                write_jsonl(path, many)
            elif suffix == ".parquet":
                pq.write_table(table(many), path)
            else:
                write_arrow(path, many)
        assert len(read_tables(paths)) == 900
        for bound, most in (("MAX_ROWS", 899), ("MAX_BYTES", 30_000)):
            with monkeypatch.context() as patch:
                patch.setattr(formats, bound, most)
                read_tables(paths[:1])
                with pytest.raises(UserError, match=rf"at most {most:,} are read"):
                    read_tables(paths)


def test_columns_that_unpack_to_more_than_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that many rows share, items without bytes: weighed before they are rows. Packed columns are refused."""
    import pyarrow.parquet as pq

    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), pyarrow.array(["x" * 1000]))
    empty = pyarrow.FixedSizeListArray.from_arrays(pyarrow.nulls(20_000_000), 1000)
    monkeypatch.setattr(formats, "MAX_BYTES", 1 << 20)
    for name, column in (("shared", shared), ("empty", empty)):
        made = pyarrow.table({"sentence": column})
        with ipc.new_stream(str(tmp_path / f"{name}.arrow"), made.schema) as writer:
            writer.write_table(made)
        assert (tmp_path / f"{name}.arrow").stat().st_size < 1 << 18
    pq.write_table(pyarrow.table({"sentence": shared}), tmp_path / "shared.parquet")
    for name in ("shared.arrow", "empty.arrow", "shared.parquet"):
        with pytest.raises(UserError, match=r"bytes, and at most 1,048,576 are read"):
            read_table(tmp_path / name)
    write_arrow(tmp_path / "packed.arrow", ROWS, compression="zstd")
    with pytest.raises(UserError, match=r"its columns are packed: save it without"):
        read_table(tmp_path / "packed.arrow")


@pytest.mark.parametrize("maker", [ipc.new_stream, ipc.new_file])
def test_arrow_files_and_damaged_ones(tmp_path: Path, maker: Callable[..., Any]) -> None:
    path = write_arrow(tmp_path / "a.arrow", [{"extra": [[k]], **row} for k, row in enumerate(ROWS)], maker)
    assert content(read(str(path))[0]) == EXPECTED
    found = read_table(path, {"label", "sentence"})
    assert found.kept == ["sentence", "label"] and found.column_names == ["extra", "sentence", "label"]
    whole = path.read_bytes()
    at = whole.index(b"the film") - 40  # the offsets of the texts, which would lead out of the file
    for damaged in (whole[:100], whole[: len(whole) // 2], whole[:at] + b"\xff" * 16 + whole[at + 16 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.arrow could not be read as arrow"):
            read_table(path)


def shards(folder: Path, names: list[str], rows: list[dict[str, Any]] = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // len(names))
    for k, name in enumerate(names):
        write_jsonl(folder / name, rows[k * size : (k + 1) * size])
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003.jsonl", "train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"],
        [f"train-0000{k}-of-00003-0123456789abcdef.jsonl" for k in range(3)],
        [f"train_{k}.jsonl" for k in range(15)],
        [f"Train{k}.jsonl" for k in (1, 2)],
        ["training.0.jsonl"],
        ["train30.jsonl"],
    ],
)
def test_shards(tmp_path: Path, names: list[str]) -> None:
    train, evaluation = read(str(shards(tmp_path, names)))
    assert content(train) == EXPECTED and evaluation is None
    assert train.name.endswith(f"({len(names)} files)") or len(names) == 1
    for k in range(len(names)) if len(names) > 2 else ():
        held = (tmp_path / names[k]).rename(tmp_path / "held")
        if 0 < k < len(names) - 1 or "-of-" in names[k]:  # others may be all that there ever were
            with pytest.raises(UserError, match=r"the files number \d+ are missing beside train"):
                read(str(tmp_path))
        held.rename(tmp_path / names[k])


def test_a_row_is_named_with_its_shard(tmp_path: Path) -> None:
    shards(tmp_path, ["train_0.jsonl", "train_1.jsonl"], [*ROWS[:20], {"sentence": "", "label": 1}, *ROWS[20:]])
    from zo_finetune.data import load_splits
    from zo_finetune.tasks import get_task

    with pytest.raises(UserError, match=r"train\* \(2 files\), train_1\.jsonl, row 5: field 'sentence'"):
        load_splits(str(tmp_path), get_task("sst2"), "causal", seed=0, train_examples=0)


def test_shards_that_are_not_of_one_table(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", ["train_0.jsonl"])
    write_jsonl(folder / "train_1.jsonl", [{"text": "fine", "label": 1}])
    with pytest.raises(UserError, match=r"train_1\.jsonl has the columns label, text, and .*train_0\.jsonl label, sentence"):
        read(str(folder), keep={"sentence", "label"})
    for names in (
        ["train.jsonl", "train_0.jsonl"],
        ["train_0.jsonl", "train-0.jsonl"],
        ["train-0-of-1.jsonl", "train-1-of-2.jsonl"],
    ):
        folder = shards(tmp_path / names[0] / names[1], names)
        with pytest.raises(UserError, match=r"holds train\S+ and train\S+: keep one"):
            read(str(folder))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "train_0.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"train_0\.jsonl is no file that is there"):
        read(str(tmp_path / "gone"))


def test_classes_of_other_names_in_another_shard(tmp_path: Path) -> None:
    import datasets

    for k, names in enumerate((["negative", "positive"], ["positive", "negative"])):
        features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / f"train-{k}.parquet")
    with pytest.raises(UserError, match=r"train-1\.parquet has other names of classes"):
        read(str(tmp_path))


def test_snapshots_of_the_hub(tmp_path: Path) -> None:
    """Files are links into a store; one set has several configurations, another a second evaluation split."""
    store = shards(tmp_path / "blobs", ["0", "1", "2"])
    data = tmp_path / "snapshot" / "data"
    data.mkdir(parents=True)
    names = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation_matched-00000-of-00001.jsonl"]
    for k, name in enumerate(names):
        (data / name).symlink_to(store / str(k))
    (data / "validation_mismatched-00000-of-00001.jsonl").symlink_to(store / "0")
    (tmp_path / "snapshot" / "README.md").touch()
    for folder in (data, data.parent):
        train, evaluation = read(str(folder))
        assert (content(train), content(evaluation)) == (EXPECTED[:20], EXPECTED[20:])
    assert any("beside it, validation_mismatched-00000" in note for note in train.rows.notes)
    data.rename(data.parent / "sst2")
    with pytest.raises(UserError, match=r"or give one of its folders, as \S+snapshot/sst2"):
        read(str(data.parent))
    assert content(read(str(data.parent / "sst2"))[0]) == EXPECTED[:20]


def test_rows_elsewhere_in_a_folder_are_told(tmp_path: Path) -> None:
    """Evaluation rows would be cut from the training rows, and nobody know that others are there."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "train.jsonl", ROWS[:20])
    validation = write_jsonl(tmp_path / "data" / "validation.jsonl", ROWS[20:])
    assert read(str(tmp_path))[0].rows.notes == ["beside it, data was not read"]
    (tmp_path / "train.jsonl").rename(validation.with_name("train.jsonl"))
    validation.rename(tmp_path / "validation.jsonl")
    assert read(str(tmp_path))[0].rows.notes == [f"validation.jsonl in {tmp_path} was not read"]


def test_a_pattern_that_mixes_splits_is_told(data_folder: Path) -> None:
    (told,) = read(str(data_folder / "*.jsonl"))[0].rows.notes
    assert told.startswith("warning: the files that match are of train, validation, whose rows are mixed here")
    assert read(str(data_folder / "train*"))[0].rows.notes == []


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    train, other = (datasets.Dataset.from_list(part, features=features) for part in (ROWS[:20], ROWS[20:]))
    datasets.DatasetDict({"train": train, "test": other, "validation": other.select([4, 1])}).save_to_disk(
        tmp_path / "both", num_shards={"train": 3, "test": 1, "validation": 1}
    )
    train.save_to_disk(tmp_path / "one")
    both = read(str(tmp_path / "both"), keep={"sentence", "label"})
    assert (content(both[0]), content(both[1])) == (EXPECTED[:20], [EXPECTED[24], EXPECTED[21]])
    assert both[0].rows.class_names == {"label": ["negative", "positive"]}
    assert content(read(str(tmp_path / "one"))[0]) == EXPECTED[:20]
    state = tmp_path / "one" / "state.json"
    good = json.loads(state.read_text())
    for changes, message in (
        ({"_data_files": [{"filename": "../both/train/data-00000-of-00003.arrow"}]}, r"must be names of files beside it"),
        ({"_data_files": [{"filename": "absent.arrow"}]}, r"lacks absent\.arrow"),
        ({"_data_files": [{"filename": 3}]}, r"must be names"),
        ({"_data_files": 3}, r"could not be read"),
        ({"_data_files": []}, r"names no file"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, r"holds a choice of its rows: save it again"),
    ):
        state.write_text(json.dumps({**good, **changes}))
        with pytest.raises(UserError, match=message):
            read(str(tmp_path / "one"))
    state.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"state\.json could not be read"):
        read(str(tmp_path / "one"))
    shutil.rmtree(tmp_path / "both" / "train")
    with pytest.raises(UserError, match=r"train/state\.json could not be read"):
        read(str(tmp_path / "both"))


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path / "rows [1]", [f"part{k}.jsonl" for k in range(15)])
    monkeypatch.chdir(tmp_path / "rows [1]")
    for spec in ("*.jsonl", "../*/part*.jsonl", "**/*.jsonl"):
        source, evaluation = read(spec)
        assert content(source) == EXPECTED and evaluation is None
        place = sources.placed(spec, str(Path.cwd()))
        assert Path(place).is_absolute()
        with monkeypatch.context() as patch:
            patch.chdir("/")
            assert content(read(place)[0]) == EXPECTED
    assert source.name == "**/*.jsonl (15 files)"
    (tmp_path / "rows [1]" / "a[b]*.jsonl").write_text(json.dumps(ROWS[0]))
    assert content(read("a[b]*.jsonl")[0]) == EXPECTED[:1]  # the file of that name
    for spec, message in (("*.csv", "matches nothing"), ("../*", r"matches ../rows \[1\]: only files with")):
        with pytest.raises(UserError, match=message):
            read(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MAX_FILES", 14)
        with pytest.raises(UserError, match="matches more than 14 files"):
            read("part*.jsonl")
    for k in (0, 2):
        write_jsonl(tmp_path / f"c4-train.0000{k}-of-00003.jsonl", ROWS)
    (note,) = read(str(tmp_path / "c4-train.*"))[0].rows.notes
    assert note == "warning: of the 3 files of c4-train, 1 are not among those that match"


def test_patterns_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on this machine is placed, and needs no configuration of the hub; a name of the hub stays one."""
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    config = Config(model="m/n", task="sst2", data="*.jsonl", output="out", data_config="sst2")
    assert config.placed(str(tmp_path)).data == str(tmp_path / "*.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--data \*\.jsonl is here: leave it out"):
        config.check_use()
    for spec in ("nyu-mll/glue", "x" * 5000, "absent.jsonl"):
        assert sources.placed(spec, str(tmp_path)) == spec


def test_chosen_rows_keep_their_places(tmp_path: Path) -> None:
    shards(tmp_path, ["a.jsonl", "b.jsonl", "c.jsonl"])
    table = read(str(tmp_path / "*.jsonl"))[0].rows.chosen([3, 7, 22, 29], "some")
    assert [table.place(k) for k in range(4)] == [
        "a.jsonl, row 1, line 4",
        "a.jsonl, row 2, line 8",
        "c.jsonl, row 1, line 3",
        "c.jsonl, row 2, line 10",
    ]
    assert table.notes == ["some"]
