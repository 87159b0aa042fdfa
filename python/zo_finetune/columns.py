"""Columns to rows: parquet and Arrow.

Belongs here: what pyarrow reads, within the bounds before it is made. Does not belong here: text formats (tables.py).

What a file claims of itself is not believed: columns become rows by the thousand, and each thousand is weighed first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from zo_finetune.errors import one_line
from zo_finetune.formats import File, FormatError, Room, Table, check_size, refuse_twins

ROWS_AT_ONCE = 1024  # of columns that become rows
ARROW_FILE = b"ARROW1\0\0"  # before the stream in Arrow's file format


def read_columns(file: File, keep: Collection[str] | None, room: Room) -> Table:
    """parquet, and Arrow's formats for files and streams."""
    import pyarrow

    try:
        return (_read_parquet if file.suffix == ".parquet" else _read_arrow)(file, keep, room)
    except (pyarrow.ArrowException, OverflowError) as error:  # damage; a date that Python has not
        raise FormatError(one_line(error)) from error


def _read_parquet(file: File, keep: Collection[str] | None, room: Room) -> Table:
    import pyarrow.parquet as pq

    with file.open() as content, pq.ParquetFile(content) as parquet:
        facts, schema = parquet.metadata, parquet.schema_arrow
        check_size(rows=facts.num_rows, columns=len(schema.names))
        kept = [name for name in schema.names if keep is None or name in keep]
        refuse_twins(kept)
        unpacked = 0
        for g in range(facts.num_row_groups):
            group = facts.row_group(g)
            columns = (group.column(c) for c in range(group.num_columns))
            unpacked += sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in kept)
        check_size(bytes=room.bytes + unpacked)
        values = values_of(parquet.iter_batches(ROWS_AT_ONCE, columns=kept), kept, room) if kept else [()] * facts.num_rows
    return Table(schema.names, kept, values, class_names=class_names(schema.metadata or {}))


def _read_arrow(file: File, keep: Collection[str] | None, room: Room) -> Table:
    """What `datasets` saves: a stream, or the file format, which is a stream between a mark and an index."""
    from pyarrow import ipc

    with file.open() as content:
        begin = len(ARROW_FILE) if content.read(len(ARROW_FILE)) == ARROW_FILE else 0
        content.seek(begin)
        for message in ipc.MessageReader.open_stream(content):
            if is_packed(message):
                raise FormatError("its columns are packed: save it without, or as parquet")
        content.seek(begin)
        schema = ipc.open_stream(content).schema
        check_size(columns=len(schema.names))
        kept = [name for name in schema.names if keep is None or name in keep]
        refuse_twins(kept)
        content.seek(begin)
        wanted = ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in kept])
        values = values_of(ipc.open_stream(content, options=wanted), kept, room)
    return Table(schema.names, kept, values, class_names=class_names(schema.metadata or {}))


def is_packed(message: Any) -> bool:
    """Whether a message of Arrow's has packed columns, which would unpack at once to whatever size: its RecordBatch has a field `compression`
    (Arrow's Message.fbs; a table of flatbuffers has its fields' places in its vtable)."""
    content = memoryview(message.metadata)

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", content, table)[0]
        (size,) = struct.unpack_from("<H", content, vtable)
        offset = struct.unpack_from("<H", content, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + int(struct.unpack_from("<I", content, place)[0])

    try:
        if message.type not in ("record batch", "dictionary"):
            return False
        batch = follow(field(follow(0), 2))
        return field(follow(field(batch, 1)) if message.type == "dictionary" else batch, 3) != 0
    except struct.error as error:
        raise FormatError("it is damaged") from error


def values_of(batches: Iterable[Any], kept: Sequence[str], room: Room) -> list[tuple[Any, ...]]:
    """Rows out of Arrow's batches, within the bounds before they are made."""
    values: list[tuple[Any, ...]] = []
    for whole in batches:
        room.take(rows=whole.num_rows)
        whole.validate(full=True)
        for start in range(0, whole.num_rows, ROWS_AT_ONCE):
            batch = whole.slice(start, ROWS_AT_ONCE)
            columns = [batch.column(name) for name in kept]
            room.take(bytes=sum(map(weight, columns)))
            values += zip(*(column.to_pylist() for column in columns), strict=True) if kept else [()] * len(batch)
    return values


def weight(array: Any) -> int:
    """Bytes that the values of an array take at least, each by itself: one that many rows share counts for each of them."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        widest = compute.max(compute.binary_length(array.dictionary)).as_py() if not types.is_primitive(kind.value_type) else 8
        return len(array) * (1 + (widest or 0))
    if types.is_struct(kind):
        return len(array) + sum(map(weight, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_map(kind):
        return len(array) + weight(array.flatten())
    if types.is_null(kind):
        return len(array)
    if types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind):
        return len(array) * -(-kind.bit_width // 8)
    return len(array) + (compute.sum(compute.binary_length(array)).as_py() or 0)


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
