"""Files of a folder that may be somebody else's: read and written as plain files of a bounded size, and a new file takes an old one's place.

Belongs here: one file at a time, whatever is in it. Does not belong here: which files a run has (run_folder.py), formats of data (tables.py).

Nothing is written through a link, waited for, or read without end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from zo_finetune.errors import UserError, one_line

JOURNAL, FOLDERS = "run.zoj", ("model", "adapter")  # of a run's folder: what tells one from a model's
BEST = "best.safetensors"  # the best weights so far of a run without a journal
PART = ".part"  # at the end of the name of what is being written, until it is whole
MOST_BYTES = 64 << 20  # of JSON; a run of a million evaluations has less


def path_of(option: str, text: str) -> Path:
    """The path that a text names, `~` included.

    Raises:
        UserError: it can be none.
    """
    if not text or "\0" in text:
        raise UserError(f"{option} {text!r} is no path: give one")
    try:
        text.encode()
        return Path(text).expanduser()
    except UnicodeEncodeError as error:  # bytes of a file system in another encoding; JSON has no place for them
        raise UserError(f"{option} {text!r} is not valid UTF-8: rename it") from error
    except RuntimeError as error:
        raise UserError(f"{option} {text}: there is no such user's home") from error


def check_plain(path: Path, folder: bool = False) -> bool:
    """Whether there is something at `path`.

    Raises:
        UserError: it is no plain file (or no folder), but a link, a pipe, a device.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        kinds = {stat.S_IFLNK: "link", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder", stat.S_IFREG: "file"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise UserError(f"{path} is a {kind}; a run has a {'folder' if folder else 'plain file'} there: move it away")
    return True


def remove_folder(path: Path) -> None:
    if check_plain(path, folder=True):
        shutil.rmtree(path)


def open_plain(path: Path, flags: int = os.O_RDONLY, most: int = MOST_BYTES) -> IO[bytes]:
    """A plain file of at most `most` bytes: through no link, waiting for no pipe.

    Raises:
        FileNotFoundError: there is none. UserError: it is something else, or larger. OSError: it cannot be opened.
    """
    if check_plain(path) is False and not flags & os.O_CREAT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no plain file: move it away")
        if status.st_size > most:
            raise UserError(f"{path} has {status.st_size:,} bytes, a run's has at most {most:,}: move it away")
        if flags & os.O_ACCMODE == os.O_RDONLY:
            return os.fdopen(fd, "rb")
        return os.fdopen(fd, "ab" if flags & os.O_APPEND else "wb", buffering=0)  # what fails fails here, and not at the end
    except BaseException:
        os.close(fd)
        raise


def write_all(file: IO[bytes], content: bytes) -> None:
    """Every byte, or an `OSError`: a disk that fills up takes a part first."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of what is at `path` when the block ends well: whole or not at all, and through no link."""
    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)
    try:
        with open_plain(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
            yield file
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with replaced(path) as file:
        write_all(file, text.encode())


def shown(value: Any) -> str:
    """A value as JSON has it, shortened, for a message."""
    return f"{json.dumps(value):.80}"


def plain_json(value: Any) -> Any:
    """`value` as JSON has it: null for NaN and infinities, which are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    return [plain_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(plain_json(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        with open_plain(path) as file:
            content = json.loads(file.read().decode(), parse_constant=lambda _: None)  # as earlier versions wrote a NaN
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
