"""What every format of rows shares: the table that comes of it, a file's name and packing, the bounds.

Belongs here: what is so whatever the format. Does not belong here: a format (tables.py, columns.py), which files there are (sources.py).
"""

from __future__ import annotations

import bisect
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from zo_finetune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = {".gz": "gzip", ".zst": "zstd"}  # behind one of those
MAX_BYTES = (
    1 << 30
)  # of a table's files unpacked, and of the columns of them that are wanted: rows are held in memory, several times that
MAX_ROWS = 10_000_000  # of a table
MAX_COLUMNS = 10_000


class FormatError(ValueError):
    """A file that is not what its suffix says; the text says where and why."""


@dataclass(frozen=True)
class Table:
    """Rows of a file, or of several one after another. `kept` names the columns whose values are held; `lines` has each row's line in its file,
    or is empty; `files`: each file's name and its first row, where there are several."""

    column_names: list[str]
    kept: list[str]
    values: list[tuple[Any, ...]]
    lines: list[int] = field(default_factory=list)
    class_names: dict[str, list[str]] = field(default_factory=dict)  # column -> what its numbers stand for, where the file says so
    notes: list[str] = field(default_factory=list)  # what a reader would not expect
    files: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def row(self, index: int) -> dict[str, Any]:
        return dict(zip(self.kept, self.values[index], strict=True))

    def place(self, index: int) -> str:
        """ "row 8, line 9": where to look for a row in its file, whose name stands before that if there are several."""
        first, name = self.files[bisect.bisect(self.files, index, key=lambda file: file[0]) - 1] if self.files else (0, "")
        line, row = self.lines[index] if self.lines else index - first + 1, index - first + 1
        return (f"{name}, " if name else "") + f"row {row}" + (f", line {line}" if line != row else "")

    def chosen(self, indices: Sequence[int], note: str) -> Table:
        """The rows of these indices, which ascend."""
        lines = [self.lines[k] if self.lines else k + 1 for k in indices]
        files = [(bisect.bisect_left(indices, first), name) for first, name in self.files]
        return replace(self, values=[self.values[k] for k in indices], lines=lines, notes=[*self.notes, note], files=files)


class Room:
    """What one table has taken of the bounds, however many files it is of."""

    def __init__(self) -> None:
        self.bytes = self.rows = 0

    def take(self, bytes: int = 0, rows: int = 0) -> None:
        """Raises FormatError where that is more than there is."""
        self.bytes += bytes
        self.rows += rows
        check_size(bytes=self.bytes, rows=self.rows)


@dataclass(frozen=True)
class File:
    """A file with its bytes as a reader of its format wants them: unpacked. `content`: those of a packed one."""

    path: Path
    suffix: str
    size: int
    content: bytes | None = None

    def open(self) -> IO[bytes]:
        return self.path.open("rb") if self.content is None else io.BytesIO(self.content)


def check_size(bytes: int = 0, rows: int = 0, columns: int = 0) -> None:
    for count, most, unit in ((bytes, MAX_BYTES, "bytes"), (rows, MAX_ROWS, "rows"), (columns, MAX_COLUMNS, "columns")):
        if count > most:
            raise FormatError(f"it has {count:,} {unit}, and at most {most:,} are read: take a part of it")


def refuse_twins(names: list[str]) -> None:
    twin = next((name for name, count in Counter(names).items() if count > 1), None)
    if twin is not None:
        raise FormatError(f"two columns are called {twin!r:.60}: rename one")


def format_of(path: Path) -> tuple[str, str, str]:
    """(name without its suffixes, suffix of the format, suffix of the packing or "") of a file's name, the suffixes in lower case."""
    packing = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    inner = Path(path.stem) if packing else Path(path.name)
    return inner.stem, inner.suffix.lower(), packing


def readable(path: Path) -> bool:
    """Whether its name says so."""
    return format_of(path)[1] in SUFFIXES


def opened(path: Path) -> File:
    """A file, unpacked if it is packed.

    Raises:
        UserError: it is empty. FormatError, OSError, ValueError: it is a pointer, larger than the bound, or damaged.
    """
    _, suffix, packing = format_of(path)
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"--data {path} is empty: give a file with at least one row")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise FormatError("it is a pointer of Git LFS, and not the file itself: fetch it with git lfs pull")
    check_size(bytes=size)
    if not packing:
        return File(path, suffix, size)
    import pyarrow

    if not pyarrow.Codec.is_available(PACKED[packing]):
        raise FormatError(f"this build of pyarrow cannot unpack {PACKED[packing]}: pip install pyarrow, or unpack the file")
    content = io.BytesIO()
    with pyarrow.input_stream(str(path), compression=PACKED[packing]) as stream:
        while piece := stream.read(1 << 20):
            content.write(piece)
            check_size(bytes=content.tell())
    return File(path, suffix, content.tell(), content.getvalue())
