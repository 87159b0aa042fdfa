"""The writer under what users and machines do to it: kills, full disks, forks, copies, second runs, bad arguments."""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import math
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.journal.samples import append, header, write
from zo_kernels import journal

ROOT = Path(__file__).parents[2]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `code` with the samples at hand."""
    prelude = (
        "import os, sys, time; from pathlib import Path; from zo_kernels import journal; from tests.journal.samples import *\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zoj"


# ---- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((-1, [[1.0]]), {}, "tag=-1"),
        ((True, [[1.0]]), {}, "tag=True"),
        ((1 << 32, [[1.0]]), {}, "tag=4294967296"),
        ((4, [[1.0]]), {}, "tag=4 must be at least 5"),
        ((5, [[1.0, 2.0]]), {}, "1 entries"),
        ((5, [[1.0], [1.0]]), {}, "1 entries"),
        ((5, [[1.0]]), {"decay": [1.0, 1.0]}, "1 entries"),
        ((5, [[math.nan]]), {}, "must be finite in fp32"),
        ((5, [[math.inf]]), {}, "must be finite in fp32"),
        ((5, [[1e39]]), {}, "must be finite in fp32"),
        ((5, [[1.0]]), {"decay": [math.inf]}, "must be finite in fp32"),
        ((5, [[1.0]]), {"eps": [1e-3]}, "scratch mode records no eps"),
        ((5, [[1.0]]), {"skipped": True}, "such a step updates nothing"),
        ((5, [[0.0]]), {"skipped": True, "decay": [0.5]}, "such a step updates nothing"),
        ((5, [[1.0]]), {"failed": "plus"}, "failed='plus', but a coefficient"),
        ((5, [[0.0]]), {"failed": "plus"}, "failed='plus' must be None, or"),
        ((5, [[0.0]]), {"failed": True}, "failed=True must be None, or"),
    ],
)
def test_bad_arguments_change_nothing(path: Path, arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with journal.create(path, header()) as writer:
        writer.append(4, [[0.5]])
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message):
            writer.append(*arguments, **options)
        assert path.read_bytes() == before
        writer.append(5, [[0.5]], loss=1e300)
        writer.append(np.uint32((1 << 32) - 1), [[np.float32(0.5)]], loss=-math.inf)
        with pytest.raises(ValueError, match="tag=4294967295 must be at least 4294967296"):
            writer.append(np.uint32((1 << 32) - 1), [[0.5]])
    assert journal.read(path).records["loss"].tolist()[1:] == [math.inf, -math.inf]


def test_eps_is_needed_in_place(path: Path) -> None:
    with journal.create(path, header("inplace")) as writer:
        for eps, message in [
            (None, "records the eps of each group"),
            ([0.0], "positive in fp32"),
            ([2.0**-150], "positive in fp32"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.append(0, [[1.0]], eps=eps)
        for eps in ([math.nan], [math.inf]):
            with pytest.raises(ValueError, match=r"positive|finite"):
                writer.append(0, [[1.0]], eps=eps)
        writer.append(0, [[1.0]], eps=[2.0**-149])
    assert journal.read(path).records["groups"]["eps"].item() == 2.0**-149


def test_a_failed_step_is_tried_again_with_its_tag(path: Path) -> None:
    """By the writer that recorded the failure, and by one that finds it."""
    eps: list[float] = [0.5]
    with journal.create(path, header("inplace")) as writer:
        for failed in ("plus", "minus"):
            writer.append(7, [[0.0]], eps=eps, failed=failed)
        writer.append(7, [[1.0]], eps=eps)
        writer.append(8, [[0.0]], eps=eps, failed="plus")
    past = journal.read(path)
    assert len(past) == 4 and len(past.steps) == 1 and past.next_tag == 8
    writer, _ = journal.reopen(path)
    with writer:
        writer.append(8, [[1.0]], eps=eps)
        with pytest.raises(ValueError, match="tag=8 must be at least 9"):
            writer.append(8, [[1.0]], eps=eps)
    assert journal.read(path).records["tag"].tolist() == [7, 7, 7, 8, 8]


@pytest.mark.parametrize("every", [-1, 1.5, True, None])
def test_a_bad_policy_is_refused_before_anything(path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match="fsync_every"):
        journal.create(path, header(), fsync_every=every)
    assert not path.exists()


# ---- files ------------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten_unasked(path: Path) -> None:
    data = write(path, 3)
    with pytest.raises(FileExistsError, match="reopen it to go on"):
        journal.create(path, header())
    assert path.read_bytes() == data
    with journal.create(path, header(groups=2), replace=True) as writer:
        append(writer, 0)
    assert journal.read(path).header.groups == 2
    assert len(journal.read(path)) == 1


def test_reopen_goes_on(path: Path, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.zoj", 9, header("lazy", 2, 2))
    write(path, 4, header("lazy", 2, 2))
    for torn in (0, 1, 17, 47):
        with path.open("ab") as file:
            file.write(b"x" * torn)
        writer, before = journal.reopen(path)
        with writer:
            assert (before.tail.length if before.tail else 0) == torn
            assert len(before) == writer.records
            with pytest.raises(ValueError, match="the first that no record has used"):
                writer.append(int(before.records["tag"][-1]) + 1, [[1.0, 1.0]] * 2, eps=[1.0, 1.0])
            append(writer, writer.records)
    assert path.read_bytes() == whole[: path.stat().st_size]
    assert len(journal.read(path)) == 8


def test_reopen_refuses_other_damage(path: Path) -> None:
    data = bytearray(write(path, 3))
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(journal.DamagedError, match="something changed the file"):
        journal.reopen(path)
    assert path.read_bytes() == data
    with pytest.raises(OSError, match="cannot be reopened"):
        journal.reopen(path.with_name("absent"))


def not_a_journal(tmp_path: Path) -> list[tuple[str, Path, type[Exception]]]:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"text")
    return [
        ("a folder", tmp_path / "folder", OSError),
        ("a named pipe", tmp_path / "pipe", OSError),
        ("a device", Path("/dev/zero"), OSError),
        ("below a file", tmp_path / "file" / "run.zoj", NotADirectoryError),
        ("in a missing folder", tmp_path / "absent" / "run.zoj", FileNotFoundError),
    ]


def test_paths_that_can_hold_no_journal(tmp_path: Path) -> None:
    for what, bad, error in not_a_journal(tmp_path):
        for attempt in (lambda p=bad: journal.create(p, header(), replace=True), lambda p=bad: journal.reopen(p)):
            with pytest.raises(error) as refused:
                attempt()
            assert str(bad) in str(refused.value), what
        for attempt in (lambda p=bad: journal.read(p), lambda p=bad: journal.recover(p)):
            with pytest.raises(OSError):  # noqa: PT011
                attempt()
    assert (tmp_path / "file").read_bytes() == b"text"
    with pytest.raises(journal.DamagedError, match="no journal"):
        journal.read(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_of_a_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="give a folder that can be written"):
        journal.create(tmp_path / "run.zoj", header())


def test_a_read_only_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="give a folder that can be written") as error:
        journal.create(path, header())
    assert error.value.errno == errno.EROFS


def test_a_folder_that_cannot_be_made_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse that; any other failure is one."""
    real = os.fsync
    for number in (errno.EINVAL, errno.EIO):

        def fsync(fd: int, number: int = number) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(number, os.strerror(number))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        if number == errno.EINVAL:
            journal.create(path, header()).close()
            path.unlink()
        else:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                journal.create(path, header())
    assert not path.exists()


def test_a_header_that_does_not_fit_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(OSError, match="header could not be written") as error:
        journal.create(path, header())
    assert error.value.errno == errno.ENOSPC
    assert not path.exists()


def test_writing_through_a_link_and_a_bytes_path(path: Path) -> None:
    write(path, 2)
    link = path.with_name("link")
    link.symlink_to(path)
    writer, _ = journal.reopen(link)
    with writer, pytest.raises(journal.LockedError):
        journal.reopen(path)


# ---- failing writes ---------------------------------------------------------------------------------------------------


def failing(kind: str) -> dict[str, Callable[..., Any]]:
    """Replacements for functions of `os`, of a disk that fails in one way."""
    real_write, real_truncate = os.write, os.ftruncate

    def fail(number: int) -> Callable[..., Any]:
        def function(*_: Any) -> Any:
            raise OSError(number, os.strerror(number))

        return function

    def short(fd: int, data: bytes) -> int:
        return real_write(fd, data[:-5])

    return {
        "full": {"write": fail(errno.ENOSPC)},
        "broken": {"write": fail(errno.EIO)},
        "short": {"write": short},
        "none": {"write": lambda fd, data: 0},
        "fsync": {"fsync": fail(errno.EIO)},
        "short and no way back": {"write": short, "ftruncate": fail(errno.EIO)},
        "interrupted": {"write": lambda fd, data: (real_write(fd, data), (_ for _ in ()).throw(KeyboardInterrupt()))},
        "interrupted before": {"write": lambda fd, data: (_ for _ in ()).throw(KeyboardInterrupt())},
        "cut": {"write": lambda fd, data: (real_truncate(fd, 0), real_write(fd, data[:-1]))[1]},
    }[kind]


@pytest.mark.parametrize("kind", ["full", "broken", "short", "none", "fsync", "short and no way back"])
def test_a_failed_append_is_not_recorded_and_the_last(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = write(path, 3)
    writer, _ = journal.reopen(path, fsync_every=1)
    with monkeypatch.context() as patched:
        for name, function in failing(kind).items():
            patched.setattr(os, name, function)
        with pytest.raises(
            OSError, match=f"record 3 at byte {len(data)} could not be written: .*the step is not recorded"
        ) as error:
            append(writer, 3)
    assert error.value.filename == str(path)
    assert error.value.errno == (errno.EIO if kind in ("broken", "fsync") else errno.ENOSPC)
    if kind == "short and no way back":
        assert "reopening looks at it" in str(error.value)
        assert len(path.read_bytes()) == len(data) + 23
    else:
        assert path.read_bytes() == data
    for refused in (lambda: append(writer, 3), writer.sync):
        with pytest.raises(RuntimeError, match=r"failed at record 3 .*reopen it"):
            refused()
    writer.close()
    again, before = journal.reopen(path)
    with again:
        assert (before.tail is not None) == (kind == "short and no way back")
        append(again, 3)
    assert path.read_bytes()[: len(data)] == data
    assert len(journal.read(path)) == 4


@pytest.mark.parametrize(("kind", "kept"), [("interrupted", 4), ("interrupted before", 3)])
def test_an_interrupt_inside_an_append(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kept: int) -> None:
    """The file is whole either way, and the writer, which cannot know which way it was, refuses to go on."""
    write(path, 3)
    writer, _ = journal.reopen(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", failing(kind)["write"])
        with pytest.raises(KeyboardInterrupt):
            append(writer, 3)
    with pytest.raises(RuntimeError, match="interrupted while it wrote record 3"):
        append(writer, 3)
    writer.close()
    assert len(journal.read(path)) == kept


def test_sync_that_fails_is_not_asked_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = journal.create(path, header(), fsync_every=0)
    append(writer, 0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing("fsync")["fsync"])
        with pytest.raises(OSError, match="up to 1 records may not be on the disk"):
            writer.close()
    assert writer.closed
    with journal.reopen(path)[0]:  # the lock was released all the same
        pass


def test_the_policy_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync every third record and on close, and one write a record."""
    calls: list[str] = []
    writer = journal.create(path, header(), fsync_every=3)
    write_, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: (calls.append("write"), write_(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("fsync"), fsync(*a))[1])
    for k in range(7):
        append(writer, k)
    writer.close()
    assert calls == ["write"] * 3 + ["fsync"] + ["write"] * 3 + ["fsync"] + ["write", "fsync"]


def test_a_file_that_changes_behind_the_writer(path: Path) -> None:
    for change, message in [
        (path.unlink, "the file was removed"),
        (lambda: os.truncate(path, 100), "the file has 100 bytes"),
        (lambda: path.open("ab").write(b"x" * 24), "something else wrote to it"),
    ]:
        with journal.create(path, header(), replace=True) as writer:
            append(writer, 0)
            change()
            left = path.read_bytes() if path.exists() else None
            with pytest.raises(OSError, match=message):
                append(writer, 1)
            assert (path.read_bytes() if path.exists() else None) == left  # nothing of others is cut


def test_a_full_disk(path: Path) -> None:
    """The kernel's own refusal: a limit on the file's size, so that a write is first cut short and then refused."""
    child = start(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = journal.create(sys.argv[1], header())
        size = os.path.getsize(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
        for k in range(10):
            try:
                append(writer, k)
            except OSError as error:
                print(k, error.errno, os.path.getsize(sys.argv[1]) - size)
                break
        """,
        path,
    )
    out, err = child.communicate(timeout=120)
    assert out.split() == ["3", str(errno.ENOSPC), "84"], err
    assert len(journal.read(path)) == 3


def test_a_full_device(path: Path) -> None:
    """/dev/full is no regular file, so it is refused at once instead of failing at the first record."""
    with pytest.raises(OSError, match="regular file"):
        journal.create("/dev/full", header(), replace=True)


# ---- processes --------------------------------------------------------------------------------------------------------


def test_two_processes(path: Path) -> None:
    write(path, 2)
    child = start("writer, _ = journal.reopen(sys.argv[1]); os.write(1, b'open\\n'); time.sleep(600)", path)
    try:
        assert child.stdout is not None and child.stdout.readline() == "open\n"
        attempts: list[Callable[[], Any]] = [
            lambda: journal.reopen(path),
            lambda: journal.create(path, header(), replace=True),
            lambda: journal.recover(path),
            lambda: journal.recover(path, keep=0),
        ]
        data = path.read_bytes()
        for attempt in attempts:
            with pytest.raises(journal.LockedError, match="is in use") as refused:
                attempt()
            if Path("/proc/locks").exists() and str(child.pid) in Path("/proc/locks").read_text():
                assert f"by process {child.pid}:" in str(refused.value)
        assert path.read_bytes() == data
        assert len(journal.read(path)) == 2
        child.send_signal(signal.SIGKILL)
        child.wait(60)
        journal.reopen(path)[0].close()  # the lock died with its process
    finally:
        child.kill()
        child.communicate()


def test_fork(path: Path) -> None:
    """A child can neither append nor keep the lock, and its death changes nothing."""
    child = start(
        """
        import signal
        writer = journal.create(sys.argv[1], header())
        append(writer, 0)
        pid = os.fork()
        if pid == 0:
            try:
                append(writer, 1)
            except RuntimeError as error:
                os.write(1, f"{error}\\n".encode())
            writer.close()
            time.sleep(600)
        append(writer, 1)
        os.write(1, f"{pid}\\n".encode())
        time.sleep(600)
        """,
        path,
    )
    try:
        assert child.stdout is not None
        lines = [child.stdout.readline(), child.stdout.readline()]
        worker = int(next(line for line in lines if line.strip().isdigit()))
        assert any("was forked" in line and "reopen it" in line for line in lines)
        with pytest.raises(journal.LockedError):
            journal.reopen(path)
        child.kill()
        child.wait(60)
        os.kill(worker, 0)  # still there
        writer, before = journal.reopen(path)
        with writer:
            assert len(before) == 2
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # the worker too
        child.communicate()


def test_a_writer_is_not_copied(path: Path) -> None:
    with journal.create(path, header()) as writer:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="two of them would write the same record twice"):
                attempt(writer)
        append(writer, 0)
        with pytest.raises(journal.LockedError, match="this one"):
            journal.reopen(path)
    writer.close()
    with pytest.raises(RuntimeError, match="is closed; reopen it"):
        append(writer, 1)
    with pytest.raises(RuntimeError, match="is closed; reopen it"):
        writer.sync()


def test_a_forgotten_writer_lets_go(path: Path) -> None:
    writer = journal.create(path, header())
    append(writer, 0)
    del writer
    with journal.reopen(path)[0] as again:
        assert again.records == 1


def test_a_file_system_without_locks_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        journal.create(path, header()).close()


def test_killed_while_writing(path: Path) -> None:
    """20 times SIGKILL at a random moment of a loop that does nothing but write; each run goes on where the last one ended, and the
    journal is always a prefix of the run, with every record that an append returned from. (One process forks the 20, since starting
    Python with torch takes longer than they live.)"""
    child = start(
        """
        import mmap, random, signal
        path, moments, before = sys.argv[1], random.Random(0), 0
        done = mmap.mmap(-1, 8)  # shared: records that an append returned from
        for attempt in range(20):
            pid = os.fork()
            if pid == 0:
                if attempt == 0:
                    writer = journal.create(path, header(), fsync_every=0)
                else:
                    writer, _ = journal.reopen(path, fsync_every=attempt % 2)
                while True:
                    append(writer, writer.records)
                    done[:] = writer.records.to_bytes(8, "little")
            while int.from_bytes(done[:], "little") <= before:
                time.sleep(0.001)
            time.sleep(moments.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
            tail = journal.recover(path)
            got = len(journal.read(path))
            returned = int.from_bytes(done[:], "little")
            assert returned <= got <= returned + 1, (returned, got)
            before = got
            done[:] = got.to_bytes(8, "little")
        os.write(1, b"%d" % before)
        """,
        path,
    )
    try:
        out, err = child.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, err
    whole = path.with_name("whole.zoj")
    write(whole, int(out))
    assert path.read_bytes() == whole.read_bytes()
