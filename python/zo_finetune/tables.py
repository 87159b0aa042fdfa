"""Files to rows: jsonl, json, csv, tsv and parquet, read as they are written or refused with the line that is wrong.

Belongs here: formats, encodings, bounds. Does not belong here: splits and samples (data.py), what a value means (tasks/).

Read here and not through `datasets`, because pandas and Arrow guess: "NA" becomes a missing value, one empty label makes floats of all
others, an odd quote swallows the rows up to the next one, a short row is filled up. Here every value of a text file is a text, and every row
has the fields of its header.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo_finetune.errors import UserError, one_line, shortened

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MAX_BYTES = 1 << 30  # of a file, and of what a parquet file's wanted columns unpack to: rows are held in memory, several times that
MAX_ROWS = 10_000_000
MAX_COLUMNS = 10_000
csv.field_size_limit(
    max(csv.field_size_limit(), MAX_BYTES)
)  # a file's own bound; csv's 131,072 characters are fewer than a text may have
MARKS = (  # longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
QUOTED_BECAUSE_OF_A_QUOTE = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


class FormatError(ValueError):
    """A file that is not what its suffix says; the text says where and why."""


@dataclass(frozen=True)
class Table:
    """Rows of a file. `kept` names the columns whose values are held; `lines` has each row's line in the file, or is empty."""

    column_names: list[str]
    kept: list[str]
    values: list[tuple[Any, ...]]
    lines: list[int] = field(default_factory=list)
    class_names: dict[str, list[str]] = field(default_factory=dict)  # column -> what its numbers stand for, where the file says so
    notes: list[str] = field(default_factory=list)  # what a reader would not expect

    def __len__(self) -> int:
        return len(self.values)

    def row(self, index: int) -> dict[str, Any]:
        return dict(zip(self.kept, self.values[index], strict=True))

    def place(self, index: int) -> str:
        """ "row 8, line 9": where to look for a row in its file."""
        line = self.lines[index] if self.lines else index + 1
        return f"row {index + 1}" + (f", line {line}" if line != index + 1 else "")


class _Rows:
    """Collects rows of differing keys, of which some are kept."""

    def __init__(self, keep: Collection[str] | None) -> None:
        self.keep = keep
        self.names: dict[str, None] = {}
        self.rows: list[dict[str, Any]] = []
        self.lines: list[int] = []

    def add(self, row: Any, line: int, what: str) -> None:
        if not isinstance(row, dict):
            raise FormatError(f"{what} is {row!r:.60}, and not an object with the columns as keys")
        if not self.names.keys() >= row.keys():
            self.names.update(dict.fromkeys(row))
            check_size(columns=len(self.names))
        self.rows.append(row if self.keep is None else {name: row[name] for name in self.keep if name in row})
        self.lines.append(line)
        check_size(rows=len(self.rows))

    def table(self, notes: list[str]) -> Table:
        kept = [name for name in self.names if self.keep is None or name in self.keep]
        values = [tuple(row.get(name) for name in kept) for row in self.rows]
        return Table(list(self.names), kept, values, self.lines, notes=notes)


def check_size(bytes: int = 0, rows: int = 0, columns: int = 0) -> None:
    for count, most, unit in ((bytes, MAX_BYTES, "bytes"), (rows, MAX_ROWS, "rows"), (columns, MAX_COLUMNS, "columns")):
        if count > most:
            raise FormatError(f"it has {count:,} {unit}, and at most {most:,} are read: take a part of it")


def refuse_twins(names: list[str]) -> None:
    twin = next((name for name, count in Counter(names).items() if count > 1), None)
    if twin is not None:
        raise FormatError(f"two columns are called {twin!r:.60}: rename one")


def encoding_of(path: Path) -> str:
    """By the mark at the file's beginning, else UTF-8."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends, as far as they are text."""
    encoding = encoding_of(path)
    number = 0
    try:
        with path.open(encoding=encoding, newline="") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise FormatError(
                        f"line {number} holds a zero byte: it is a binary file, or UTF-16 without a byte order mark; save it as UTF-8"
                    )
                yield line
    except UnicodeError as error:
        raise FormatError(
            f"near line {number + 1}, it is not {encoding.upper()} ({one_line(error, 120)}): save it as UTF-8"
        ) from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; one key twice is refused, where `dict` would take the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for k, (name, _) in enumerate(pairs) if name in dict(pairs[:k]))
        raise FormatError(f"the key {twice!r:.60} stands twice in one object")
    return made


def read_jsonl(path: Path, keep: Collection[str] | None) -> Table:
    rows, blank = _Rows(keep), 0
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            blank += 1
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except RecursionError:
            raise FormatError(f"line {number} is nested too deeply") from None
        except ValueError as error:
            raise FormatError(f"line {number}: {one_line(error)}") from error
        rows.add(row, number, f"line {number}")
    return rows.table([f"{blank:,} blank lines were passed over"] if blank else [])


def read_json(path: Path, keep: Collection[str] | None) -> Table:
    """A list of objects, an object of lists of one length, or JSON lines under another name."""
    text = "".join(text_lines(path))
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise FormatError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second object after the first
            return read_jsonl(path, keep)
        raise
    if isinstance(content, dict):
        if not content or not all(isinstance(column, list) for column in content.values()):
            content = [content]  # the one row of JSON lines
        elif len({len(column) for column in content.values()}) > 1:
            raise FormatError("its columns differ in length: " + shortened(f"{k} {len(v):,}" for k, v in content.items()))
        else:
            content = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    if not isinstance(content, list):
        raise FormatError(f"it is {content!r:.60}, and not a list of objects")
    rows = _Rows(keep)
    for number, row in enumerate(content, 1):
        rows.add(row, number, f"item {number}")
    return rows.table([])


def is_quoted(path: Path) -> bool:
    """Whether a .tsv file was written by something that quotes fields.

    GLUE's files do not, and their texts have quotes at any place. One that quotes would quote the header too, or have quoted every
    field with a quote in it and doubled that quote."""
    found = False
    for number, line in enumerate(text_lines(path)):
        fields = line.rstrip("\r\n").split("\t")
        if number == 0 and all(len(f) > 1 and f[0] == f[-1] == '"' for f in fields):
            return True
        for one in fields:
            if '"' in one:
                if not QUOTED_BECAUSE_OF_A_QUOTE.fullmatch(one):
                    return False
                found = True
    return found


def read_delimited(path: Path, keep: Collection[str] | None) -> Table:
    """A header and rows with as many fields, all texts."""
    tabs = path.suffix.lower() == ".tsv"
    quoted = not tabs or is_quoted(path)
    reader = csv.reader(
        text_lines(path),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    names: list[str] | None = None
    picked: list[int] = []
    values: list[tuple[Any, ...]] = []
    lines: list[int] = []
    begun, blank, skipped = 1, 0, 0
    try:
        for fields in reader:
            first, begun = begun, reader.line_num + 1
            if not fields:
                blank += 1
            elif names is None:
                names = fields
                check_size(columns=len(names))
                picked = [k for k, name in enumerate(names) if keep is None or name in keep]
                refuse_twins([names[k] for k in picked])
            elif len(fields) != len(names):
                rule = "" if quoted else "; fields of .tsv files are not quoted"
                raise FormatError(f"line {first} has {len(fields)} fields where the header has {len(names)}{rule}")
            else:
                skipped, blank = skipped + blank, 0  # blank lines at the end are none
                values.append(tuple(fields[k] for k in picked))
                lines.append(first)
                check_size(rows=len(values))
    except csv.Error as error:
        hint = "a quote that is not closed, or not doubled inside a quoted field" if quoted else "check it"
        raise FormatError(f"line {begun}: {one_line(error)} ({hint})") from error
    notes = [f"{skipped:,} blank lines were passed over"] if skipped else []
    if tabs and quoted:
        notes.append("its fields are quoted, and were read without their quotes")
    names = names or []
    return Table(names, [names[k] for k in picked], values, lines, notes=notes)


def read_parquet(path: Path, keep: Collection[str] | None) -> Table:
    import pyarrow

    try:
        return _read_parquet(path, keep)
    except (pyarrow.ArrowException, OverflowError) as error:  # damage; a date that Python has not
        raise FormatError(one_line(error)) from error


def _read_parquet(path: Path, keep: Collection[str] | None) -> Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        facts, schema = file.metadata, file.schema_arrow
        check_size(rows=facts.num_rows, columns=len(schema.names))
        kept = [name for name in schema.names if keep is None or name in keep]
        refuse_twins(kept)
        unpacked = 0
        for g in range(facts.num_row_groups):
            group = facts.row_group(g)
            columns = (group.column(c) for c in range(group.num_columns))
            unpacked += sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in kept)
        check_size(bytes=unpacked)
        content = file.read(columns=kept)
    values = list(zip(*(content.column(name).to_pylist() for name in kept), strict=True)) if kept else [()] * content.num_rows
    return Table(schema.names, kept, values, class_names=class_names(schema.metadata or {}))


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """What the numbers of a parquet file's columns stand for, by the schema that `datasets` puts into it."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: [str(one) for one in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


READERS: dict[str, Callable[[Path, Collection[str] | None], Table]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": read_parquet,
}


def read_table(path: Path, keep: Collection[str] | None = None) -> Table:
    """One table, by its suffix.

    Args:
        path: a regular file.
        keep: the columns whose values are wanted, where not all are.

    Raises:
        UserError: the suffix is none of `SUFFIXES`; the file is empty, damaged or beyond a bound above. Line or row is named.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"--data {path} has the suffix {path.suffix!r}; readable are {', '.join(SUFFIXES)}")
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"--data {path} is empty: give a file with at least one row")
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise FormatError("it is a pointer of Git LFS, and not the file itself: fetch it with git lfs pull")
        check_size(bytes=size)
        table = READERS[suffix](path, keep)
    except (OSError, ValueError, MemoryError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise UserError(f"--data {path} could not be read as {suffix[1:]}: {one_line(error)}; check the file") from error
    if not len(table):
        raise UserError(
            f"--data {path} has a header and no row: give a file with at least one row"
            if table.column_names
            else f"--data {path} has no row"
        )
    return table
