"""What a run leaves behind: result.json, log.csv, curve.png.

Belongs here: the run directory, its files, the facts about the machine and the versions. Does not belong here: the training itself.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from zo_finetune.errors import UserError

OUTPUTS = ("result.json", "log.csv", "curve.png", "model", "adapter")  # all that a run writes, and all that --overwrite removes
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


def open_run_dir(folder: Path) -> None:
    """Make the folder and remove an earlier run's files from it; files that are not a run's stay."""
    folder.mkdir(parents=True, exist_ok=True)
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


class Log:
    """log.csv, a line for each step, flushed so that a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(LOG_FIELDS)
        self.losses: list[float] = []

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
