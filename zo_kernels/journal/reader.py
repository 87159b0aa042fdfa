"""A journal read: every record checked, nothing believed.

Sizes are compared with the file before memory is taken, every record carries a checksum chained with its place and its file, and nothing
read is executed.

Belongs here: the reader, and what it says of a damaged file. Does not belong here: changing a file (writer.py).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from zo_kernels.journal.header import Header
from zo_kernels.journal.layout import (
    CHUNK,
    CRC,
    FAILED,
    FLAGS,
    FORMAT,
    MAGIC,
    MAX_HEADER,
    MAX_ZEROS,
    PREAMBLE,
    DamagedError,
    TornError,
    UnbegunError,
    checksum,
    open_file,
)


@dataclass(frozen=True)
class Tail:
    """Bytes behind the last whole record, as an interrupted write or a crashed file system leaves them."""

    offset: int
    length: int
    reason: str


@dataclass(frozen=True)
class Journal:
    """A journal as read. `records` is a read-only structured array of `header.record` without changes: ``records["groups"]["coef"]`` has
    the shape [records, G, T]. `start` is the byte of record 0."""

    header: Header
    records: np.ndarray
    start: int
    crc: int
    tail: Tail | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def end(self) -> int:
        """The byte behind the last whole record."""
        return self.start + len(self) * self.header.record.itemsize

    def flag(self, name: str) -> np.ndarray:
        """bool [records]: one of `FLAGS`."""
        return (self.records["flags"] & FLAGS[name]) != 0

    @property
    def steps(self) -> np.ndarray:
        """The records of steps: all but those of steps that failed, which the run did not count."""
        return self.records[(self.records["flags"] & FAILED) == 0]

    @property
    def next_tag(self) -> int:
        """The first tag that no step has used."""
        return next_tag_of(self.header, self.records)


@dataclass(frozen=True)
class Source:
    """Random access to bytes of a known number; fewer bytes than asked for mean that there are no more."""

    name: str
    size: int
    at: Callable[[int, int], bytes]  # (offset, count)


def of_descriptor(fd: int, name: str) -> Source:
    def at(offset: int, count: int) -> bytes:
        parts = []
        while count and (part := os.pread(fd, min(count, CHUNK), offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    return Source(name, os.fstat(fd).st_size, at)


def _good(chunk: bytes, size: int, first: int, header_crc: int) -> int:
    """How many records at the start of `chunk` carry their checksum."""
    payload = size - CRC.size
    for k in range(len(chunk) // size):
        at = k * size
        if CRC.unpack_from(chunk, at + payload)[0] != checksum(chunk[at : at + payload], first + k, header_crc):
            return k
    return len(chunk) // size


def _read_header(source: Source) -> tuple[Header, int, int]:
    """(header, byte of record 0, the header's checksum)."""

    def refuse(offset: int, what: str, kind: type[DamagedError] = DamagedError) -> NoReturn:
        raise kind(f"{source.name}: {what}", offset)

    head = source.at(0, PREAMBLE.size)
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        refuse(0, "no journal: its first bytes are not a journal's")
    if len(head) < PREAMBLE.size:
        refuse(
            len(head),
            f"ends after {len(head)} bytes, inside its header: no step was recorded; delete it, or create with replace=True",
            UnbegunError,
        )
    _, version, length = PREAMBLE.unpack(head)
    if version != FORMAT:
        refuse(8, f"journal format {version}; this version of zo_kernels reads format {FORMAT}: use the version that wrote it")
    if length > MAX_HEADER:
        refuse(12, f"the header claims {length} bytes, at most {MAX_HEADER} are allowed: the file is damaged; take a copy")
    start = PREAMBLE.size + length + CRC.size
    if start > source.size:
        refuse(
            source.size,
            f"ends after {source.size} of its header's {start} bytes: no step was recorded; delete it, or create with replace=True",
            UnbegunError,
        )
    text, stored = source.at(PREAMBLE.size, length), source.at(PREAMBLE.size + length, CRC.size)
    if len(text) + len(stored) != length + CRC.size:
        refuse(PREAMBLE.size, "the file became shorter while it was read")
    crc = zlib.crc32(head + text)
    if CRC.unpack(stored)[0] != crc:
        refuse(PREAMBLE.size, "the header fails its checksum: without it no record can be trusted; take a copy of the file")
    try:
        return Header.parse(text), start, crc
    except (TypeError, ValueError, RecursionError) as error:
        refuse(PREAMBLE.size, f"the header is not one that zo_kernels writes: {error}")


def _impossible(header: Header, records: np.ndarray) -> tuple[int, str] | None:
    """The first record whose content no writer would have accepted, and why."""
    if not len(records):
        return None
    tags, flags, groups = records["tag"].astype(np.int64), records["flags"], records["groups"]
    skipped, failed = (flags & FLAGS["skipped"]) != 0, (flags & FAILED) != 0
    used = tags + np.where(failed, 0, header.terms)  # a failed step is tried again with the same directions
    numbers = [groups[name].reshape(len(records), header.groups, -1) for name in groups.dtype.names or ()]
    coef = groups["coef"].reshape(len(records), -1)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        checks = [
            ("flags that this version of zo_kernels does not know", (flags & ~np.uint32(sum(FLAGS.values()))) != 0),
            ("a coefficient, decay or eps that is not finite", ~np.all([np.isfinite(n).all((1, 2)) for n in numbers], axis=0)),
            ("an update although it was skipped", skipped & ((coef != 0).any(1) | (groups["decay"] != 1).any(1))),
            ("an update although it failed", failed & ((coef != 0).any(1) | (groups["decay"] != 1).any(1))),
            (
                "flags that exclude each other",
                failed & ((flags & FAILED == FAILED) | skipped | (header.perturbation == "scratch")),
            ),
            ("tags beyond 2^32", tags + header.terms > 1 << 32),
            ("a tag that was used before", tags < np.concatenate(([0], used[:-1]))),
        ]
        if "eps" in (groups.dtype.names or ()):
            checks.append(("an eps that is not positive", ~(groups["eps"] > 0).all(1)))
    found = [(int(wrong.argmax()), why) for why, wrong in checks if wrong.any()]
    return min(found) if found else None


def next_tag_of(header: Header, records: np.ndarray) -> int:
    """The first tag that no step among the records has used."""
    if not len(records):
        return 0
    return int(records["tag"][-1]) + (0 if records["flags"][-1] & FAILED else header.terms)


def read_source(source: Source, most: int | None = None) -> Journal:
    """All whole records, or the first `most`, whatever follows those."""
    header, start, crc = _read_header(source)
    dtype = header.record
    size, chunks, n, at = dtype.itemsize, [], 0, start
    per_chunk = max(1, CHUNK // size)
    while most is None or n < most:
        wanted = per_chunk if most is None else min(per_chunk, most - n)
        chunk = source.at(at, min(wanted * size, source.size - at))
        good = _good(chunk, size, n, crc)
        chunks.append(chunk[: good * size])
        n, at = n + good, at + good * size
        if good < wanted:
            break
    records = np.frombuffer(b"".join(chunks), dtype)  # of bytes, so read-only
    if found := _impossible(header, records):
        index, why = found
        raise DamagedError(
            f"{source.name}: record {index} at byte {start + index * size} has a good checksum and {why}; "
            f"take a copy of the file, or recover(path, keep={index}) to cut the record off with all that follow",
            start + index * size,
        )
    tail = None
    if most is None and at < source.size:
        tail = _tail(source, at, size, n)
    return Journal(header, records, start, crc, tail)


def _tail(source: Source, at: int, size: int, index: int) -> Tail:
    """What follows the last good record. One write makes one record, so an interrupted one leaves at most a record's bytes, perhaps with
    zeros behind it from the file system. Anything else was damaged after it had been written, and is not cut unasked."""
    length = source.size - at
    beyond, end = at + size, min(source.size, at + size + MAX_ZEROS)
    while beyond < end and (chunk := source.at(beyond, min(CHUNK, end - beyond))) and not any(chunk):
        beyond += len(chunk)
    if beyond < source.size:
        raise DamagedError(
            f"{source.name}: record {index} at byte {at} fails its checksum and {source.size - at - size} bytes follow it, "
            f"which no interrupted write leaves: something changed the file. Take a copy of it, or recover(path, keep={index}) to cut there",
            at,
        )
    if length < size:
        reason = f"{length} of the {size} bytes of record {index}"
    elif any(source.at(at, size)):
        reason = f"record {index} fails its checksum"
    else:
        reason = f"{length} zero bytes"
    return Tail(at, length, reason)


def _strict(journal: Journal, name: str) -> Journal:
    if (tail := journal.tail) is not None:
        raise TornError(
            f"{name}: torn behind its {len(journal)} whole records, at byte {tail.offset}: {tail.reason}; "
            "recover(path) cuts that off, read(path, strict=False) ignores it",
            tail.offset,
        )
    return journal


def loads(data: bytes, *, strict: bool = True, name: str = "journal") -> Journal:
    """`read` of bytes in memory."""
    source = Source(name, len(data), lambda offset, count: data[offset : offset + count])
    journal = read_source(source)
    return _strict(journal, name) if strict else journal


def read(path: str | os.PathLike[str], *, strict: bool = True) -> Journal:
    """The journal at `path`, every record checked. A run may be writing to it.

    Args:
        strict: refuse a torn tail; otherwise the result has the whole records and says in `tail` what follows them.

    Raises:
        TornError: the last record is incomplete or damaged and nothing follows it; `offset` says where.
        DamagedError: anything else is not as it was written; `offset` says where, the message what to do.
        OSError: the file cannot be read.
    """
    fd = open_file(path, os.O_RDONLY)
    try:
        journal = read_source(of_descriptor(fd, str(path)))
    finally:
        os.close(fd)
    return _strict(journal, str(path)) if strict else journal
