"""Files to rows: jsonl, json, csv, tsv, and columns.py's parquet and Arrow, read as they are written or refused with the line that is wrong.

Belongs here: text formats, encodings, one table of one file or several. Does not belong here: which files there are (sources.py), splits and samples
(data.py), what a value means (tasks/).

Read here and not through `datasets`, because pandas and Arrow guess: "NA" becomes a missing value, one empty label makes floats of all
others, an odd quote swallows the rows up to the next one, a short row is filled up. Here every value of a text file is a text, and every row
has the fields of its header.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from zo_finetune.columns import read_columns
from zo_finetune.errors import UserError, one_line, shortened
from zo_finetune.formats import (
    MAX_BYTES,
    PACKED,
    SUFFIXES,
    File,
    FormatError,
    Room,
    Table,
    check_size,
    format_of,
    opened,
    refuse_twins,
)  # fmt: skip

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


class _Rows:
    """Collects rows of differing keys, of which some are kept."""

    def __init__(self, keep: Collection[str] | None, room: Room) -> None:
        self.keep, self.room = keep, room
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
        self.room.take(rows=1)

    def table(self, notes: list[str]) -> Table:
        kept = [name for name in self.names if self.keep is None or name in self.keep]
        values = [tuple(row.get(name) for name in kept) for row in self.rows]
        return Table(list(self.names), kept, values, self.lines, notes=notes)


def encoding_of(file: File) -> str:
    """By the mark at the file's beginning, else UTF-8."""
    with file.open() as content:
        start = content.read(4)
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")


def text_lines(file: File) -> Iterator[str]:
    """The lines of a text file, with their ends, as far as they are text."""
    encoding = encoding_of(file)
    number = 0
    try:
        with io.TextIOWrapper(file.open(), encoding=encoding, newline="") as text:
            for number, line in enumerate(text, 1):
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


def read_jsonl(file: File, keep: Collection[str] | None, room: Room) -> Table:
    rows, blank = _Rows(keep, room), 0
    for number, line in enumerate(text_lines(file), 1):
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


def read_json(file: File, keep: Collection[str] | None, room: Room) -> Table:
    """A list of objects, an object of lists of one length, or JSON lines under another name."""
    text = "".join(text_lines(file))
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise FormatError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second object after the first
            return read_jsonl(file, keep, room)
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
    rows = _Rows(keep, room)
    for number, row in enumerate(content, 1):
        rows.add(row, number, f"item {number}")
    return rows.table([])


def is_quoted(file: File) -> bool:
    """Whether a .tsv file was written by something that quotes fields.

    GLUE's files do not, and their texts have quotes at any place. One that quotes would quote the header too, or have quoted every
    field with a quote in it and doubled that quote."""
    found = False
    for number, line in enumerate(text_lines(file)):
        fields = line.rstrip("\r\n").split("\t")
        if number == 0 and all(len(f) > 1 and f[0] == f[-1] == '"' for f in fields):
            return True
        for one in fields:
            if '"' in one:
                if not QUOTED_BECAUSE_OF_A_QUOTE.fullmatch(one):
                    return False
                found = True
    return found


def read_delimited(file: File, keep: Collection[str] | None, room: Room) -> Table:
    """A header and rows with as many fields, all texts."""
    tabs = file.suffix == ".tsv"
    quoted = not tabs or is_quoted(file)
    reader = csv.reader(
        text_lines(file),
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
                room.take(rows=1)
    except csv.Error as error:
        hint = "a quote that is not closed, or not doubled inside a quoted field" if quoted else "check it"
        raise FormatError(f"line {begun}: {one_line(error)} ({hint})") from error
    notes = [f"{skipped:,} blank lines were passed over"] if skipped else []
    if tabs and quoted:
        notes.append("its fields are quoted, and were read without their quotes")
    names = names or []
    return Table(names, [names[k] for k in picked], values, lines, notes=notes)


READERS: dict[str, Callable[[File, Collection[str] | None, Room], Table]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": read_columns,
    ".arrow": read_columns,
}


def read_table(path: Path, keep: Collection[str] | None = None, room: Room | None = None) -> Table:
    """One file, by its suffix.

    Args:
        path: a regular file.
        keep: the columns whose values are wanted, where not all are.
        room: of the table that it is a part of.

    Raises:
        UserError: the suffix is none of `SUFFIXES`; the file is empty, damaged or beyond a bound above. Line or row is named.
    """
    suffix = format_of(path)[1]
    if suffix not in SUFFIXES:
        raise UserError(
            f"--data {path} has the suffix {path.suffix!r}; readable are {', '.join(SUFFIXES)}, or those with {' or '.join(PACKED)}"
        )
    room = Room() if room is None else room
    try:
        file = opened(path)
        if READERS[suffix] is not read_columns:
            room.take(bytes=file.size)
        table = READERS[suffix](file, keep, room)
    except (OSError, ValueError, MemoryError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise UserError(f"--data {path} could not be read as {suffix[1:]}: {one_line(error)}; check the file") from error
    if not len(table):
        raise UserError(
            f"--data {path} has a header and no row: give a file with at least one row"
            if table.column_names
            else f"--data {path} has no row"
        )
    return table


def read_tables(paths: Sequence[Path], keep: Collection[str] | None = None) -> Table:
    """Files with the same columns as one table, one after another; the bounds are for all of them.

    Raises:
        UserError: see `read_table`; or two have other columns, or classes of other names.
    """
    room = Room()
    tables = [read_table(path, keep, room) for path in paths]
    first, *others = tables
    if not others:
        return first
    values: list[tuple[Any, ...]] = []
    lines: list[int] = []
    notes: list[str] = []
    files: list[tuple[int, str]] = []
    for path, table in zip(paths, tables, strict=True):
        mine, theirs = (sorted(t.kept if keep is not None else t.column_names) for t in (table, first))
        if mine != theirs:
            mine, theirs = sorted(table.column_names), sorted(first.column_names)
            raise UserError(
                f"{path} has the columns {shortened(mine)}, and {paths[0]} {shortened(theirs)}: files of one table have the same; take "
                "that file away, or give one file"
            )
        if {k: table.class_names.get(k) for k in table.kept} != {k: first.class_names.get(k) for k in table.kept}:
            raise UserError(f"{path} has other names of classes than {paths[0]}: their numbers mean other things; give one file")
        order = [table.kept.index(name) for name in first.kept]
        files.append((len(values), path.name))
        values += [tuple(row[k] for k in order) for row in table.values] if order != sorted(order) else table.values
        lines += table.lines or range(1, len(table) + 1)
        notes += [f"{path.name}: {note}" for note in table.notes]
    return Table(first.column_names, first.kept, values, lines, first.class_names, notes, files)
