"""A journal written: one writer appends, and never seeks back.

One `write` call a record hands it to the operating system, so a killed process loses nothing that `append` returned from; `fsync` every N
records bounds what a power failure can take.

Belongs here: everything that changes a file: the writer, its lock, `create`, `reopen` and `recover`. Does not belong here: which record is
good (reader.py), when a step is recorded (optim/record.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import struct
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from zo_kernels import checks, interrupts
from zo_kernels.journal.factors import InputFactors, factors_path
from zo_kernels.journal.header import Header
from zo_kernels.journal.layout import CRC, FAILED, FLAGS, DamagedError, LockedError, checksum, open_file
from zo_kernels.journal.reader import Journal, Tail, of_descriptor, read_source
from zo_kernels.journal.start import encode, start_path


def _holder(fd: int) -> str:
    """' by process N' if the kernel tells who holds the lock."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = os.fstat(fd)
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5] == place and int(words[4]) > 0:
                return f" by process {words[4]}" + (", this one" if int(words[4]) == os.getpid() else "")
    return ""


def _lock(fd: int, path: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(
            f"{path} is in use{_holder(fd)}: one run writes to a journal; wait for it, stop it, or give another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        warnings.warn(f"{path}: its file system has no locks, so a second run in this folder goes unnoticed", stacklevel=4)


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _after_fork() -> None:
    """A child (a DataLoader's worker) lets go at once: it shares its parent's lock, and would keep it beyond the parent's death."""
    for writer in list(_writers):
        writer._abandon("was forked: the process that opened it writes, and this one is its child")


os.register_at_fork(after_in_child=_after_fork)


class Writer:
    """Appends records. Made by `create` and `reopen`; a context manager; never copied or pickled.

    After an append has failed, all others are refused until `reopen`: a record without its predecessors would be no record of the run.

    Attributes:
        header: as written. path: of the file. records: number of whole records in the file.
    """

    def __init__(
        self, fd: int, path: str, header: Header, crc: int, start: int, records: int, next_tag: int, fsync_every: int
    ) -> None:
        self.header, self.path, self.records, self._fd = header, path, records, fd
        self._crc, self._start, self._next_tag, self._unsynced = crc, start, next_tag, 0
        self._size, self._pid, self._refusal = header.record.itemsize, os.getpid(), ""
        self.fsync_every = fsync_every
        per_group = header.terms + (1 if header.perturbation == "scratch" else 2)
        self._pack = struct.Struct(f"<IIff{header.groups * per_group}f").pack
        _writers.add(self)

    def append(
        self,
        tag: int,
        coefs: Sequence[Sequence[float]],
        *,
        decay: Sequence[float] | None = None,
        eps: Sequence[float] | None = None,
        loss: float = math.nan,
        gradient: float = math.nan,
        skipped: bool = False,
        clipped: bool = False,
        stochastic: bool = False,
        flushed: bool = False,
        failed: str | None = None,
    ) -> None:
        """Record one update. When this returns, the record survives the end of the process.

        Args:
            tag: of the first direction; above all tags of the steps recorded before.
            coefs: the update's coefficients [G][T], rounded to fp32; all 0 in a skipped or failed step.
            decay: factor of the weights [G], default 1.
            eps: perturbation scale [G]; needed unless the run is in scratch mode, where it is left out.
            loss, gradient: for people and logs; any number, NaN included.
            skipped, clipped, stochastic, flushed: the flags of docs/journal.md.
            failed: "plus" or "minus": a step in place whose forward at theta + eps z, or theta - eps z, failed; it does not use up its tag.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was written and the writer goes on.
            OSError: the record could not be written, or not be made durable (disk full, file removed); the file was cut back to the
                last whole record where possible, and this writer refuses to go on.
            RuntimeError: this writer was closed, has failed before, or belongs to the parent process.
        """
        if self._refusal or os.getpid() != self._pid:
            raise RuntimeError(f"{self.path}: the journal {self._refusal or 'was forked'}; reopen it")
        tag = checks.check_word("tag", tag)
        flags = (skipped, clipped, stochastic, flushed, failed == "plus", failed == "minus")
        record = self._record(tag, coefs, decay, eps, loss, gradient, failed, flags)
        end = self._start + self.records * self._size
        # Until this append is known to be whole, an interrupt (Ctrl-C) between any two lines leaves the writer refusing.
        self._refusal = f"was interrupted while it wrote record {self.records}"
        mine = False  # bytes behind `end`
        try:
            status = os.fstat(self._fd)
            if status.st_nlink == 0:
                raise OSError(errno.ENOENT, "the file was removed")
            if status.st_size != end:
                raise OSError(errno.EIO, f"the file has {status.st_size} bytes: something else wrote to it, or cut it")
            mine = True
            written = os.write(self._fd, record)
            if written != len(record):
                raise OSError(errno.ENOSPC, f"only {written} of {len(record)} bytes were taken: no space left?")
            self._unsynced += 1
            if self.fsync_every and self._unsynced >= self.fsync_every:
                os.fsync(self._fd)
                self._unsynced = 0
        except OSError as error:
            self._fail(error, end, mine)
        self.records += 1
        self._next_tag = tag + (self.header.terms if failed is None else 0)
        self._refusal = ""

    def _record(
        self,
        tag: int,
        coefs: Sequence[Sequence[float]],
        decay: Sequence[float] | None,
        eps: Sequence[float] | None,
        loss: float,
        gradient: float,
        failed: str | None,
        flags: Sequence[bool],
    ) -> bytes:
        header, G = self.header, self.header.groups
        if tag < self._next_tag or tag + header.terms > 1 << 32:
            raise ValueError(f"tag={tag} must be at least {self._next_tag}, the first that no record has used, and below 2^32")
        decay = [1.0] * G if decay is None else decay
        if (eps is None) != (header.perturbation == "scratch"):
            raise ValueError(
                f"eps={eps!r}: a run in {header.perturbation} mode records {'no eps' if eps else 'the eps of each group'}"
            )
        if not len(coefs) == len(decay) == G or (eps is not None and len(eps) != G) or any(len(c) != header.terms for c in coefs):
            raise ValueError(f"coefs, decay and eps must have {G} entries, one a group, and each of coefs {header.terms}")
        numbers: list[float] = []
        for k in range(G):
            numbers += [decay[k], *([] if eps is None else [eps[k]]), *coefs[k]]
        if eps is not None and not all(e > 2.0**-150 for e in eps):
            raise ValueError(f"eps={list(eps)} must be positive in fp32")
        if (flags[0] or failed) and (any(c != 0 for group in coefs for c in group) or any(d != 1 for d in decay)):
            what = "skipped=True" if flags[0] else f"failed={failed!r}"
            raise ValueError(f"{what}, but a coefficient is not 0 or a decay is not 1: such a step updates nothing")
        if failed is not None and (failed not in ("plus", "minus") or flags[0] or eps is None):
            raise ValueError(f"failed={failed!r} must be None, or 'plus' or 'minus' in a run in place, and not with skipped=True")
        word = sum(bit for bit, flag in zip(FLAGS.values(), flags, strict=True) if flag)
        loss, gradient = (math.copysign(math.inf, x) if abs(x) > 3.4028235e38 else x for x in (loss, gradient))
        try:
            payload = self._pack(tag, word, loss, gradient, *numbers)
        except (OverflowError, struct.error):
            payload = b""
        if not payload or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"decay, eps and coefs {numbers!r:.200} must be finite in fp32: record a step whose g is not as skipped"
            )
        return payload + CRC.pack(checksum(payload, self.records, self._crc))

    def _fail(self, error: OSError, end: int, cut: bool) -> NoReturn:
        """Take the record back, so that the file agrees with the exception, and refuse to go on."""
        state = ""
        if cut:
            try:
                os.ftruncate(self._fd, end)
                state = f"the file was cut back to its {self.records} whole records; "
            except OSError:
                state = f"what was written of it stays behind the {self.records} whole records, and reopening looks at it; "
        self._refusal = f"failed at record {self.records} ({error.strerror})"
        raise OSError(
            error.errno,
            f"journal record {self.records} at byte {end} could not be written: {error.strerror}; {state}"
            "the step is not recorded. Mend the cause, then reopen the journal",
            self.path,
        ) from error

    def sync(self) -> None:
        """Make every record durable now: `fsync`."""
        if self._refusal or os.getpid() != self._pid:
            raise RuntimeError(f"{self.path}: the journal {self._refusal or 'was forked'}; reopen it")
        try:
            os.fsync(self._fd)
        except OSError as error:  # the kernel has dropped the pages' state: asking again would say yes without having written
            self._refusal = f"could not be made durable ({error.strerror})"
            raise OSError(
                error.errno, f"up to {self._unsynced} records may not be on the disk: {error.strerror}", self.path
            ) from error
        self._unsynced = 0

    def close(self) -> None:
        """Make every record durable and release the lock. Closing twice, or a writer that failed, only closes."""
        with interrupts.uninterrupted():
            try:
                if not self._refusal and os.getpid() == self._pid:
                    self.sync()
            finally:
                self._abandon("is closed")

    def _abandon(self, why: str) -> None:
        """Close the descriptor, which releases the lock unless a parent still has it, and nothing else."""
        fd, self._fd = self._fd, -1
        self._refusal = self._refusal or why
        if fd >= 0:
            os.close(fd)

    @property
    def closed(self) -> bool:
        return self._fd < 0

    @property
    def refusal(self) -> str:
        """Why the next append would be refused; '' if it would not."""
        if not self._refusal and os.getpid() != self._pid:
            return "was forked"
        return self._refusal

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound now: at the interpreter's end `os` is gone
        if (fd := getattr(self, "_fd", -1)) >= 0:
            self._fd = -1
            close(fd)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a journal's Writer cannot be copied or pickled: two of them would write the same record twice; "
            "close it, and reopen the journal where it is needed"
        )


def _check_policy(fsync_every: Any) -> None:
    if isinstance(fsync_every, bool) or not isinstance(fsync_every, int) or fsync_every < 0:
        raise ValueError(f"fsync_every={fsync_every!r} must be a number of records, 0 for 'only on close'")


def _sync_folder(folder: str) -> None:
    """Make a new file's name durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that keeps names durable by itself, or not at all
            raise
    finally:
        os.close(fd)


def write_factors(journal: str | os.PathLike[str], factors: InputFactors) -> None:
    """The file beside a journal that holds the factors of its run: whole and durable, or as it was."""
    _write_beside(factors_path(journal), factors.encode())


def write_start(journal: str | os.PathLike[str], values: Mapping[str, Tensor]) -> None:
    """The file beside a journal that holds what its run's new weights began with (`start_path`): whole and durable, or as it was. For weights that no base
    model has, an adapter's or a new head's: `zk.replay` begins with them.

    Args:
        journal: its path. values: by parameter name, as they were when it was opened.

    Raises:
        ValueError: see `start.encode`. OSError: the file cannot be written.
    """
    _write_beside(start_path(journal), encode(values))


def _write_beside(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part)
    fd = open_file(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    _sync_folder(os.path.dirname(path) or ".")


def create(
    path: str | os.PathLike[str],
    header: Header,
    *,
    fsync_every: int = 100,
    replace: bool = False,
    factors: InputFactors | None = None,
) -> Writer:
    """Start a journal; when this returns, file, header and directory entry are durable.

    Args:
        fsync_every: records between two `fsync`; 1: each, 0: only on close. A killed process loses no record in any case; a power failure
            up to so many.
        replace: overwrite what is there (unless it is locked); otherwise an existing file is refused.
        factors: of the run, written beside it (`factors_path`).

    Raises:
        FileExistsError: there is something at `path`.
        LockedError: `replace`, and a run is writing to it.
        OSError: the folder is missing, read-only or full; nothing is left behind.
        ValueError: the header cannot be written.
    """
    _check_policy(fsync_every)
    head = header.encode()
    path = os.fspath(path)
    existing = os.path.lexists(path)
    if existing and not replace:
        raise FileExistsError(errno.EEXIST, "a journal is there: reopen it to go on, or give another folder, or replace=True", path)
    with interrupts.uninterrupted():  # a descriptor has one owner, and a handler's OSError is not the file's
        try:
            fd = open_file(path, os.O_RDWR | os.O_APPEND | (0 if existing else os.O_CREAT | os.O_EXCL))
        except OSError as error:
            raise OSError(
                error.errno, f"the journal cannot be created: {error.strerror}; give a folder that can be written", path
            ) from error
        try:
            _lock(fd, path)
            os.ftruncate(fd, 0)
            for beside in (factors_path(path), start_path(path)) if existing else ():  # another run's
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside)
            if factors is not None:  # before the header, which says that they are there
                write_factors(path, factors)
            if (written := os.write(fd, head)) != len(head):
                raise OSError(
                    errno.ENOSPC, f"the journal's header could not be written: {written} of {len(head)} bytes were taken", path
                )
            os.fsync(fd)
            _sync_folder(os.path.dirname(path) or ".")
            return Writer(fd, path, header, CRC.unpack(head[-4:])[0], len(head), 0, 0, fsync_every)
        except BaseException:
            if not existing:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(fd)
            raise


def reopen(path: str | os.PathLike[str], *, fsync_every: int = 100, after_steps: bool = False) -> tuple[Writer, Journal]:
    """Go on with a journal: lock it, read it, cut off a torn tail (which the result's `tail` tells), and append behind it.

    Args:
        fsync_every: as in `create`.
        after_steps: cut off failed attempts behind the last step too: the weights that they rounded are gone when a run is resumed from its
            base, and without them it ends with the bits of a run that was never interrupted.

    Raises:
        DamagedError: the damage is not a torn tail; nothing was changed.
        LockedError: another process is writing to it.
        OSError: it cannot be opened for writing.
    """
    _check_policy(fsync_every)
    path = os.fspath(path)
    with interrupts.uninterrupted():  # a descriptor has one owner, and a handler's OSError is not the file's
        try:
            fd = open_file(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise OSError(error.errno, f"the journal cannot be reopened: {error.strerror}", path) from error
        try:
            _lock(fd, path)
            journal = read_source(of_descriptor(fd, path))
            if after_steps and len(journal.steps) < len(journal):
                counted = np.flatnonzero((journal.records["flags"] & FAILED) == 0)
                journal = replace(journal, records=journal.records[: int(counted[-1]) + 1 if len(counted) else 0])
            if journal.end < os.fstat(fd).st_size:
                os.ftruncate(fd, journal.end)
                os.fsync(fd)
            return Writer(
                fd, path, journal.header, journal.crc, journal.start, len(journal), journal.next_tag, fsync_every
            ), journal
        except BaseException:
            os.close(fd)
            raise


def recover(path: str | os.PathLike[str], *, keep: int | None = None) -> Tail | None:
    """Cut off a torn tail and make that durable; returns what was cut, None if there was nothing.

    Args:
        keep: cut behind so many records, whatever follows them: the remedy for damage that is not a torn tail.

    Raises:
        DamagedError: the damage is not a torn tail, or not behind the first `keep` records; nothing was changed.
        LockedError: a run is writing to it.
    """
    fd = open_file(path, os.O_RDWR)
    try:
        _lock(fd, path)
        source = of_descriptor(fd, str(path))
        if keep is None:
            tail = read_source(source).tail
        else:
            journal = read_source(source, checks.check_word("keep", keep, 63))
            if len(journal) < keep:
                raise DamagedError(f"{path}: keep={keep}, but only its first {len(journal)} records are good", journal.end)
            length = source.size - journal.end
            tail = Tail(journal.end, length, f"all that follows {keep} records") if length else None
        if tail:
            os.ftruncate(fd, tail.offset)
            os.fsync(fd)
        return tail
    finally:
        os.close(fd)
