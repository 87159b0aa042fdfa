"""`zo-finetune profile`: peak memory and seconds a step of inference, first-order fine-tuning and each zeroth-order method, for a model or a bare shape
(MeZO figure 3, ZO-LLM table 3, DiZO table 6).

Belongs here: which rows there are, the processes they are measured in, table and figure. Does not belong here: the measuring (measure.py).

Each row has a process of its own, one after another: what one leaves behind is no part of the next, and one that runs out of memory ends its own row.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_finetune import console, figures, files, methods, run_folder, shapes
from zo_finetune.config import Profile
from zo_finetune.errors import UserError, one_line, plural
from zo_finetune.files import check_plain, path_of
from zo_finetune.methods import PEFTS
from zo_finetune.runs import Entry

OWN = ("result.json", "profile.csv", "table.md", "memory.png")
BYTES = ("model_bytes", "state_bytes", "gradient_bytes", "buffer_bytes", "peak_bytes", "peak_rss_bytes")
COLUMNS = (
    "method",
    "peft",
    "weights",
    "trained_weights",
    "dtype",
    "batch_size",
    "length",
    "forwards",
    *BYTES,
    "seconds_per_step",
    "reason",
)
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """What is measured. `entry`: None for inference."""

    label: str
    peft: str
    entry: Entry | None

    @classmethod
    def of(cls, label: str) -> Row:
        """From METHOD[@PEFT][:KEY=VALUE...]. Raises UserError: names the label."""
        head, colon, own = label.partition(":")
        name, at, peft = head.partition("@")
        if at and peft not in PEFTS:
            raise UserError(f"--methods {label}: {peft!r} must be one of {', '.join(PEFTS)}")
        entry = None
        if name != "inference":
            entry = Entry.of(name + colon + own)
            entry.method.options(entry.given, peft or "none")
        elif own:
            raise UserError(f"--methods {label}: inference has no options")
        return cls(label, peft or "none", entry)

    @property
    def kind(self) -> str:
        if self.entry is None:
            return "inference"
        return "first order" if self.entry.method.first_order else "zeroth order"


def usual() -> list[str]:
    """The rows where --methods says nothing."""
    return [
        "inference",
        "sgd",
        "adam",
        "adam@lora",
        "mezo@lora",
        *(m.name for m in methods.METHODS.values() if not (m.first_order or m.packed)),
    ]


def request_of(row: Row, given: Profile) -> dict[str, Any]:
    """What measure.py takes."""
    names = ("form", "dtype", "device", "batch_size", "length", "steps", "perturbation")
    return {
        **{name: getattr(given, name) for name in names},
        "shape": None if given.shape is None else shapes.get(given.shape),
        "model": given.model,
        "peft": row.peft,
        "method": "inference" if row.entry is None else row.entry.method.name,
        "options": {} if row.entry is None else dict(row.entry.given),
    }


class Measuring:
    """The process that measures rows, each in a child of its own; ended as a context manager."""

    def __enter__(self) -> Measuring:
        # NVML: a process that has asked CUDA for its devices has no children that may use them
        more = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zo_finetune.measure"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **more},
            start_new_session=True,  # ended with its children, below
        )
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def row(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A row's numbers, or its reason for none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError("the process that measures was ended: give the same command again")
        found: dict[str, Any] = json.loads(line)
        return found


def profile(given: Profile, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write; returns what result.json holds. Ctrl-C ends it and keeps the rows that are done.

    Raises:
        UserError: something the user can put right.
    """
    given.check()
    labels = usual() if given.methods is None else given.methods
    if len({*labels}) != len(labels):
        raise UserError("--methods: give none twice")
    rows = [Row.of(label) for label in labels]
    if given.shape is not None and (soft := next((r for r in rows if r.peft in ("prefix", "prompt")), None)):
        raise UserError(f"--methods {soft.label}: a soft prompt begins with a text, and --shape has no tokenizer: give a --model")
    output = path_of("--output", given.output)
    run_folder.check_run_dir(output, overwrite=False, others=True)
    if (output / "result.json").exists() and not (output / "profile.csv").exists():
        raise UserError(f"--output {output}: its result.json would be replaced, and no profile wrote that: give another folder")
    for name in OWN:
        check_plain(output / name)
        check_plain(output / (name + files.PART))
    console.say(
        f"{name_of(given)}: {plural(len(rows), 'row')}, each measured in a process of its own, the first of them {rows[0].label}"
    )
    found: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    interrupted = False
    try:
        with Measuring() as measuring, console.Counter("profile", len(rows), "row", every=1) as counter:
            for row in rows:
                numbers = measuring.row(request_of(row, given))
                about |= {name: numbers.pop(name) for name in ("machine", "versions") if name in numbers}
                found.append(
                    {
                        "method": row.label,
                        "peft": row.peft,
                        "kind": row.kind,
                        "batch_size": given.batch_size,
                        "length": given.length,
                        **numbers,
                    }
                )
                peak = numbers.get("peak_bytes")
                counter.advance(1, f"{row.label}: {numbers['reason'] if peak is None else f'{peak / MIB:,.0f} MiB'}")
    except KeyboardInterrupt:
        interrupted = True
    content = {"interrupted": interrupted, "options": asdict(given), **about, "rows": found, "command": list(command or sys.argv)}
    if found:
        try:
            write(output, given, content)
        except OSError as error:
            raise UserError(f"--output {output}: {one_line(error)}") from error
    return content


def write(output: Path, given: Profile, content: Mapping[str, Any]) -> None:
    """result.json, profile.csv, table.md, memory.png; the table is printed too."""
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(output / "result.json", content)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(content["rows"])
    files.write_text(output / "profile.csv", text.getvalue())
    page = table(given, content)
    files.write_text(output / "table.md", page)
    console.tell(page)
    try:
        draw(output / "memory.png", given, content["rows"])
    except Exception as error:  # as of a run's curve
        console.say(f"memory.png could not be drawn ({one_line(error)}); profile.csv has what it shows")


def name_of(given: Profile) -> str:
    return given.shape or Path(str(given.model)).name


def cells(row: Mapping[str, Any], inference: Mapping[str, Any] | None) -> list[str]:
    """Of the table: MiB; seconds and peak as multiples of inference's too."""

    def mib(name: str) -> str:
        return "" if row.get(name) is None else f"{row[name] / MIB:,.1f}"

    def times(name: str) -> str:
        return f"{row[name] / inference[name]:.2f}" if inference and row.get(name) and inference.get(name) else ""

    if row["reason"]:
        return [row["method"], *[""] * 9, row["reason"]]
    memory = [mib(name) for name in BYTES]
    return [
        row["method"],
        *memory,
        times("peak_bytes"),
        f"{row['seconds_per_step']:.3f}",
        times("seconds_per_step"),
        f"{row['forwards']:g}",
    ]


def table(given: Profile, content: Mapping[str, Any]) -> str:
    """Markdown, a row for each method."""
    rows = content["rows"]
    inference = next((r for r in rows if r["method"] == "inference" and not r["reason"]), None)
    head = [
        "method",
        "model",
        "state",
        "gradient",
        "buffer",
        "peak",
        "peak, resident",
        "of inference",
        "s a step",
        "of inference",
        "forwards",
    ]
    lines = [head, ["---"] * len(head), *(cells(row, inference) for row in rows)]
    some: Mapping[str, Any] = next((r for r in rows if not r["reason"]), {})
    where = content.get("machine", {})
    threads = plural(where["torch_threads"], "thread") if "torch_threads" in where else ""
    batch = f"{plural(given.batch_size, 'row')} of {plural(given.length, 'token')}"
    text = (
        f"{name_of(given)}, {some.get('weights', 0):,} weights, {some.get('dtype', given.dtype)}; {batch}; {where.get('device', '')}, {threads}. "
        f"MiB; seconds: the median of {plural(given.steps, 'step')}.\n\n"
    )
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(path: Path, given: Profile, rows: Sequence[Mapping[str, Any]]) -> None:
    """Peak memory of each method, beside that of inference."""
    shown = [row for row in rows if not row["reason"]]
    colors = {"inference": "0.4", "first order": "C3", "zeroth order": "C0"}
    with figures.plain_figure(path, 110, figsize=(8, 1.2 + 0.28 * len(shown))) as figure:
        axes = figure.subplots()
        for kind, color in colors.items():
            at = [k for k, row in enumerate(shown) if row["kind"] == kind]
            if at:
                axes.barh(at, [shown[k]["peak_bytes"] / MIB for k in at], color=color, label=kind)
        for row in shown:
            if row["method"] == "inference":
                axes.axvline(row["peak_bytes"] / MIB, color="0.4", linestyle=":")
        axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
        axes.invert_yaxis()
        axes.set(
            xlabel="peak memory, MiB",
            title=f"{name_of(given)}: {plural(given.batch_size, 'row')} of {plural(given.length, 'token')}",
        )
        axes.grid(alpha=0.3, axis="x")
        axes.legend(loc="best")
