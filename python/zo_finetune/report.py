"""What a run leaves behind: config.json, run.zoj (zo_kernels' journal), evaluations.jsonl, log.csv, result.json, curve.png.

Belongs here: the run directory, its files, the facts about the machine and the versions. Does not belong here: the training itself.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import resource
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from zo_finetune.errors import UserError, one_line

JOURNAL = "run.zoj"
OUTPUTS = (
    "result.json",
    "log.csv",
    "curve.png",
    "model",
    "adapter",
    "config.json",
    "evaluations.jsonl",
)  # what a run writes besides its journal
LOG_FIELDS = ("step", "loss", "projected_gradient", "lr", "seconds")


def check_run_dir(folder: Path, overwrite: bool) -> None:
    """Refuse a run directory that holds something, before hours are spent."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"--output {folder} is not empty: give another folder, or --overwrite to replace an earlier run in it")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {folder} cannot be written: {parent} is read-only for this user; give another folder")


def clear_run_dir(folder: Path) -> None:
    """Remove an earlier run's files; files that are not a run's stay, and so does the journal, whose lock this run holds."""
    for name in OUTPUTS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def versions() -> dict[str, str | None]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            return None

    names = ("zo_kernels", "torch", "transformers", "peft", "datasets", "gguf")
    return {"python": platform.python_version(), **{name: of(name) for name in names}}


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "torch_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there and KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def state_bytes(optimizer: Any) -> int:
    """What an optimizer keeps between steps besides the weights: moments, diagonals, masks, factors, anchors, a first-order optimizer's
    state. Buffers that only a step uses are not counted."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.ndim and not isinstance(value, torch.nn.Parameter):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            for part in value.values():
                visit(part)
        elif isinstance(value, (list, tuple, set, deque)):
            for part in value:
                visit(part)
        elif type(value).__module__.startswith("zo_kernels.") and hasattr(value, "__dict__"):
            visit(vars(value))

    first_order = getattr(optimizer, "_first_order", None)
    for name in ("_kept", "_held", "_projection", "_past"):
        visit(getattr(optimizer, name))
    if first_order is not None:
        visit(dict(first_order.state))
    return sum(found.values())


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_suffix(".json.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def is_evaluation(value: Any) -> bool:
    """Whether a value out of JSON is what `evaluate` returns."""
    if not isinstance(value, dict) or type(value.get("examples")) is not int:
        return False
    shares = value.get("predicted", {})
    numbers = [value.get(name) for name in ("accuracy", "accuracy_stderr", "loss")]
    numbers += [
        *(shares.values() if isinstance(shares, dict) else [None]),
        *([value["auc"]] if value.get("auc") is not None else []),
    ]
    return all(type(number) is float for number in numbers)


def read_result(path: Path) -> dict[str, Any] | None:
    """result.json of a run that has come to its end; None if there is none, or the run was interrupted.

    Raises:
        UserError: it holds something else.
    """
    if not path.is_file():
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
    return result


class Evaluations:
    """evaluations.jsonl: the evaluation before the first step, then those of the dev examples, each on the disk before the next step is
    recorded, so that a resumed run need not repeat them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, evaluation: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: evaluation}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def recover(self, steps: int) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(before, those of fewer than `steps` steps); the rest are cut off, and so is what follows a line that is torn or no evaluation."""
        before: dict[str, Any] | None = None
        history: list[dict[str, Any]] = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                (name, evaluation), *_ = json.loads(line).items()
            except (ValueError, AttributeError, RecursionError):
                break
            if not is_evaluation(evaluation) or (name != "before" and type(evaluation.get("step")) is not int):
                break
            if name == "before":
                before = evaluation
            elif evaluation["step"] < steps:
                history.append(evaluation)
        part = self.path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for name, e in [("before", before)] * (before is not None) + [("dev", e) for e in history]:
                file.write(json.dumps({name: e}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
        return before, history


class Log:
    """log.csv, a line for each step, flushed so that a killed run keeps what it had. What it had lost, the journal has."""

    def __init__(self, path: Path, past: Iterable[Sequence[float]] = ()) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(LOG_FIELDS)
        self.losses: list[float] = []
        self.write(past)

    @staticmethod
    def seconds(path: Path) -> dict[int, float]:
        """The seconds after each step, as far as an earlier log has them."""
        found = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = csv.reader(file)
                while True:
                    try:
                        row = next(rows, None)
                        if row is None:
                            break
                        step, seconds = int(row[0]), float(row[4])
                    except (ValueError, IndexError, csv.Error):
                        continue
                    if 0 <= seconds < math.inf:
                        found[step] = seconds
        return found

    def write(self, rows: Iterable[Sequence[float]]) -> None:
        for row in rows:
            self._writer.writerow(row)
            self.losses.append(float(row[1]))
        self._file.flush()

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would pick a backend for the whole process
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.savefig(path, dpi=130)
