"""What a run leaves behind: config.json, run.zoj (zo_kernels' journal), evaluations.jsonl, log.csv, result.json, curve.png.

Belongs here: the run directory, its files, the facts about the machine and the versions. Does not belong here: the training itself.

The folder may be somebody else's. Nothing outside it is written, waited for or read without end: what a run reads there are plain files of a
bounded size, and what it writes is a new file that takes the old one's place.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import platform
import resource
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from zo_finetune.errors import UserError, one_line, shortened

if TYPE_CHECKING:  # `--version` does not wait for it
    import torch

JOURNAL = "run.zoj"
FILES = ("result.json", "log.csv", "curve.png", "config.json", "evaluations.jsonl")  # what a run writes besides its journal
FOLDERS = ("model", "adapter")  # and its weights
PART = ".part"  # at the end of the name of what is being written, until it is whole
SAVING = "weights" + PART
JOURNAL_MAGIC = b"\x89ZOJ"
MOST_BYTES = 64 << 20  # of JSON; a run of a million evaluations has less
MOST_LOG_BYTES = 4 << 30
LOG_FIELDS = ("step", "loss", "projected_gradient", "lr", "seconds")


# ---- files of a folder that may be somebody else's --------------------------------------------------------------------------


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


def check_files(folder: Path) -> None:
    """Refuse a run directory in which what a run reads or writes is a link, a pipe, a device, a folder in place of a file."""
    for name in (*FILES, *(name + PART for name in FILES)):
        check_plain(folder / name)
    for name in (*FOLDERS, *(name + PART for name in FOLDERS), SAVING):
        check_plain(folder / name, folder=True)
    journal = folder / JOURNAL  # the one file that is written to where it stands
    if check_plain(journal) and journal.stat().st_nlink > 1:
        raise UserError(f"{journal} has a second name elsewhere (a hard link), which would be written too: put a copy in its place")


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


# ---- the run directory ------------------------------------------------------------------------------------------------------


def holds_run(folder: Path) -> bool:
    """Whether a run began in the folder, as its config.json or its journal tells, or what a killed one was writing."""
    if check_plain(folder / "config.json"):
        with contextlib.suppress(UserError):
            return set(read_json(folder / "config.json")) == {"directory", "config"}
    if check_plain(folder / JOURNAL):
        with open_plain(folder / JOURNAL, most=sys.maxsize) as file:
            head = file.read(len(JOURNAL_MAGIC))
            return head == JOURNAL_MAGIC[: len(head)]
    return all(name in {n + PART for n in FILES} for name in os.listdir(folder))


def strangers(folder: Path) -> list[str]:
    """What lies in a run's folders of weights and is not known to be of the run."""
    result: dict[str, Any] = {}
    if check_plain(folder / "result.json"):
        with contextlib.suppress(UserError):
            result = read_json(folder / "result.json")
    ours = result.get("saved_files")
    known = {name for name in ours if isinstance(name, str)} if isinstance(ours, list) else set()
    return [
        f"{name}/{entry}" for name in FOLDERS if (folder / name).is_dir() for entry in sorted({*os.listdir(folder / name)} - known)
    ]


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


def check_run_dir(folder: Path, overwrite: bool, sources: Mapping[str, str] | None = None, others: bool = False) -> None:
    """Refuse a run directory that holds something, before hours are spent.

    Args:
        overwrite: an earlier run may be in it, and goes.
        sources: option -> path of what is read (or a hub id); none may lie in what goes.
        others: something may be in it, and stays.
    """
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"--output {folder} is a file: give a folder")
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise UserError(f"--output {folder} cannot be made: {parent} is a file; give another folder")
        if not others and folder.is_dir() and any(folder.iterdir()):
            if not overwrite:
                raise UserError(
                    f"--output {folder} is not empty: give another folder, or --overwrite to replace an earlier run in it"
                )
            check_overwrite(folder, sources or {})
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output {folder} cannot be written: {parent} is read-only for this user; give another folder")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"--output {folder} cannot be used: {one_line(error)}; give another folder") from error


def check_overwrite(folder: Path, sources: Mapping[str, str]) -> None:
    if not holds_run(folder):
        raise UserError(
            f"--overwrite: {folder} never held a run of zo-finetune, and nothing in it is deleted: give another --output"
        )
    check_files(folder)
    for option, source in sources.items():
        path = Path(source).expanduser()
        if path.exists() and (inside := path.resolve()) is not None:
            goes = [folder.resolve() / name for name in (*FOLDERS, *FILES)]
            if inside == folder.resolve() or any(g == inside or g in inside.parents for g in goes):
                raise UserError(f"--overwrite: {option} {source} lies in what would be deleted of {folder}: give another --output")
    if more := strangers(folder):
        raise UserError(f"--overwrite: the run in {folder} did not write {shortened(more, 3)}: move that, or give another --output")


def clear_run_dir(folder: Path) -> None:
    """Remove an earlier run's files, as `check_overwrite` has looked at them; others stay, and so does the journal, whose lock this run holds."""
    for name in (*FILES, *(name + PART for name in FILES)):
        (folder / name).unlink(missing_ok=True)
    for name in (*FOLDERS, *(name + PART for name in FOLDERS), SAVING):
        remove_folder(folder / name)


def save_weights(folder: Path, save: Callable[[Path], Path]) -> tuple[Path, list[str]]:
    """Weights by `save(folder)`, which writes a folder of its own name into the one that it is given; whole or not at all. What is no part of
    them and lay in an earlier folder of that name stays there.

    Returns:
        the folder, and the names in it that are new.
    """
    part = folder / SAVING
    remove_folder(part)
    try:
        part.mkdir(parents=True)
        new = save(part)
        target, names = folder / new.name, sorted(os.listdir(new))
        if check_plain(target, folder=True):
            old = folder / (new.name + PART)
            remove_folder(old)
            target.rename(old)
            new.rename(target)
            for other in {*os.listdir(old)} - {*names}:
                (old / other).rename(target / other)
            shutil.rmtree(old)
        else:
            new.rename(target)
        return target, names
    finally:
        shutil.rmtree(part, ignore_errors=True)


def versions() -> dict[str, str | None]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            return None

    names = ("zo_kernels", "torch", "transformers", "peft", "datasets", "gguf")
    return {"python": platform.python_version(), **{name: of(name) for name in names}}


def machine(device: torch.device) -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "torch_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there and KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def remove_journal(path: Path) -> None:
    """Remove an earlier run's journal, unless that run is under way."""
    from zo_kernels import journal

    if not path.exists():
        return
    with contextlib.suppress(OSError, ValueError):  # a damaged one goes too
        try:
            journal.reopen(path)[0].close()
        except journal.LockedError as error:
            raise UserError(f"{path.parent}: {one_line(error)}") from error
    path.unlink()


def is_evaluation(value: Any) -> bool:
    """Whether a value out of JSON is what `evaluate` returns."""
    if not isinstance(value, dict) or type(value.get("examples")) is not int:
        return False
    shares = value.get("predicted", {})
    numbers = [value.get(name) for name in ("accuracy", "accuracy_stderr")]
    numbers += [
        *(shares.values() if isinstance(shares, dict) else [None]),
        *(value[name] for name in ("loss", "auc") if value.get(name) is not None),  # null where it is not finite
    ]
    return "loss" in value and all(type(number) is float for number in numbers)


def read_result(path: Path, saves: bool) -> dict[str, Any] | None:
    """result.json of a run that has come to its end; None if there is none, the run was interrupted, or its weights are to be saved (`saves`) and
    were not.

    Raises:
        UserError: it holds something else.
    """
    if not check_plain(path):
        return None
    result = read_json(path)
    if result.get("interrupted") is True:
        return None
    if not (
        result.get("interrupted") is False
        and type(result.get("steps")) is int
        and all(is_evaluation(result.get(name)) for name in ("before", "after"))
    ):
        raise UserError(f"{path} is not that of a run: remove it to go on with the run")
    return None if saves and result.get("saved") is None else result


class Evaluations:
    """evaluations.jsonl: the evaluation before the first step, then those of the dev examples, each on the disk before the next step is
    recorded, so that a resumed run need not repeat them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, evaluation: Mapping[str, Any]) -> None:
        with open_plain(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            write_all(file, (json.dumps(plain_json({name: evaluation}), allow_nan=False) + "\n").encode())
            os.fsync(file.fileno())

    def recover(self, steps: int) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(before, those of fewer than `steps` steps); the rest are cut off, and so is what follows a line that is torn or no evaluation."""
        before, history = self.read()
        history = [e for e in history if e["step"] < steps]
        kept = [("before", before)] * (before is not None) + [("dev", e) for e in history]
        write_text(self.path, "".join(json.dumps({name: e}) + "\n" for name, e in kept))
        return before, history

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(before, the others), up to a line that is torn or no evaluation. Changes nothing: the run may be another process's."""
        before: dict[str, Any] | None = None
        history: list[dict[str, Any]] = []
        text = b""
        with contextlib.suppress(FileNotFoundError), open_plain(self.path) as file:
            text = file.read()
        for line in text.decode(errors="replace").splitlines():
            try:
                (name, evaluation), *_ = json.loads(line, parse_constant=lambda _: None).items()
            except (ValueError, AttributeError, RecursionError):
                break
            if not is_evaluation(evaluation) or (name != "before" and type(evaluation.get("step")) is not int):
                break
            if name == "before":
                before = evaluation
            else:
                history.append(evaluation)
        return before, history


class Log:
    """log.csv, a line for each step, written at once so that a killed run keeps what it had. What it had lost, the journal has.

    Attributes:
        losses: of the steps. still: steps whose projected gradient was 0: both losses were the same to the bit.
    """

    def __init__(self, path: Path, past: Iterable[Sequence[float]] = ()) -> None:
        path.unlink(missing_ok=True)
        self._file = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self.losses: list[float] = []
        self.still = 0
        self._write([LOG_FIELDS])
        self.write(past)

    @staticmethod
    def seconds(path: Path) -> dict[int, float]:
        """The seconds after each step, as far as an earlier log has them."""
        found = {}
        with contextlib.suppress(FileNotFoundError), open_plain(path, most=MOST_LOG_BYTES) as file:
            while line := file.readline(1000):
                try:
                    step, _, _, _, text = line.split(b",")
                    number, seconds = int(step), float(text)
                except ValueError:
                    continue
                if 0 <= seconds < math.inf:
                    found[number] = seconds
        return found

    def _write(self, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        write_all(self._file, text.getvalue().encode())

    def write(self, rows: Iterable[Sequence[float]]) -> None:
        rows = list(rows)
        self._write(rows)
        self.losses += (float(row[1]) for row in rows)
        self.still += sum(row[2] == 0 for row in rows)

    def close(self) -> None:
        self._file.close()


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over `window` values."""
    return [sum(values[max(0, k - window + 1) : k + 1]) / (k + 1 - max(0, k - window + 1)) for k in range(len(values))]


def draw_curve(path: Path, title: str, losses: Sequence[float], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Accuracy over steps, with a band of one standard error, above the training loss.

    Args:
        losses: of steps 1, 2, ...
        curves: name -> evaluations with `step`, `accuracy`, `accuracy_stderr`.
    """
    with plain_figure(path, 130, figsize=(7, 6)) as figure:
        _draw_curve(figure, title, losses, curves)


@contextlib.contextmanager
def plain_figure(path: Path, dpi: int, **more: Any) -> Iterator[Any]:
    """A figure that is written to `path` when the block ends well. Names in it are other people's: no text is read as a formula."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would pick a backend for the whole process
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(layout="constrained", **more)
        FigureCanvasAgg(figure)
        yield figure
        with replaced(path) as file:
            figure.savefig(file, dpi=dpi, format="png")


def _draw_curve(figure: Any, title: str, losses: Sequence[float], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, points in curves.items():
        if not points:
            continue
        steps = [p["step"] for p in points]
        values = [p["accuracy"] for p in points]
        errors = [p["accuracy_stderr"] for p in points]
        # two points are a before and an after: what lies between was not measured
        (line,) = top.plot(steps, values, marker="o", linestyle=":" if len(points) == 2 else "-", label=name)
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        top.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    top.set(ylabel="accuracy", title=title)
    if top.lines:
        top.legend(loc="best")
    window = max(1, len(losses) // 20)
    steps = list(range(1, len(losses) + 1))
    bottom.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    bottom.plot(steps, smoothed(losses, window), color="C3", label=f"mean of {window}")
    bottom.set(ylabel="training loss", xlabel="step")
    if losses:
        bottom.legend(loc="best")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
