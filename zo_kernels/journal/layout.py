"""The bytes of a journal, as its reader and its writer both know them: docs/journal.md has every one.

Belongs here: magic and format, the flags, the limits, the checksum of a record, opening a file, the errors. Does not belong here: the
header's contents (header.py).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import zlib

if sys.byteorder != "little":  # records and digests are little-endian, and so are the kernels
    raise ImportError("zo_kernels.journal needs a little-endian machine")

FORMAT = 1
CONTRACT = 1  # of the noise: docs/numerics.md
MAGIC = b"\x89ZOJ\r\n\x1a\n"  # as PNG's: a transfer that changes line ends or the eighth bit breaks it at once
PERTURBATIONS = ("scratch", "inplace", "lazy")
FLAGS = {"skipped": 1, "clipped": 2, "stochastic": 4, "flushed": 8, "failed_plus": 16, "failed_minus": 32}
FAILED = FLAGS["failed_plus"] | FLAGS["failed_minus"]

# What a reader accepts; far above any run, far below what could exhaust a machine.
MAX_HEADER = 16 << 20  # bytes of JSON, some 60,000 parameters
MAX_GROUPS = 1 << 12
MAX_TERMS = 1 << 16
MAX_RECORD = 1 << 20  # bytes
MAX_NAME = 4096  # bytes of UTF-8
MAX_DIMENSIONS = 64
MAX_ZEROS = 64 << 20  # bytes of zeros behind the last record that count as a crash's

PREAMBLE = struct.Struct("<8sII")  # magic, format version, bytes of JSON
CRC = struct.Struct("<I")
INDEX = struct.Struct("<Q")
CHUNK = 1 << 20  # bytes read, or hashed, at a time


class DamagedError(ValueError):
    """The file is not a journal, or not as it was written; `offset` is the byte where that shows."""

    def __init__(self, message: str, offset: int = 0) -> None:  # the default serves unpickling, which then sets it
        super().__init__(message)
        self.offset = offset


class UnbegunError(DamagedError):
    """The file ends inside its header, as a process leaves it that died creating it: no step was recorded."""


class TornError(DamagedError):
    """Only the last record is damaged, as an interrupted write leaves it: `recover` cuts it off."""


class LockedError(RuntimeError):
    """Another process, or another writer of this one, has the journal open."""


def checksum(payload: bytes, index: int, header_crc: int) -> int:
    """Of a record: chained with its place and its file, so that none can be swapped, repeated or moved."""
    return zlib.crc32(payload, zlib.crc32(INDEX.pack(index), header_crc))


def open_file(path: str | os.PathLike[str], flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)  # NONBLOCK: a named pipe must not be waited for
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "a journal is a regular file, this is none", str(path))
    return fd
