"""What an optimizer writes to its journal, and when.

Belongs here: the queue between steps and the file, and the header of an optimizer. Does not belong here: the file (journal/), what a
step decides (step.py), how records become weights again (_replay.py).

On the host a step's numbers are known before the weights change, and the record is written first. On a GPU nobody waits for them: the
step's few numbers are copied to pinned host memory behind its kernels, and a later step, or `flush`, appends those that have arrived. What
a killed process had queued is lost with the weights that it had changed: the file is a prefix of the run.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_kernels import interrupts, journal
from zo_kernels.parameters import Weights, canonical_name


class Summary(NamedTuple):
    """What only the losses tell. On the host: numbers; on a device: 0-d tensors, queued as one."""

    loss: Any
    gradient: Any
    finite: Any
    clipped: Any
    coefs: Sequence[Sequence[Any]]  # [groups][terms]

    def values(self) -> list[Any]:
        return [self.loss, self.gradient, self.finite, self.clipped, *(c for group in self.coefs for c in group)]

    def queued(self) -> Tensor:
        """float64 [4 + groups * terms]."""
        device, values = self.gradient.device, self.values()
        return torch.stack([torch.as_tensor(v, device=device).double() for v in values])


class Recorder:
    """The queue in front of a `journal.Writer`."""

    def __init__(self, writer: journal.Writer) -> None:
        self.writer = writer
        self.broken = ""  # why the weights are no longer what the records say
        self._queue: deque[tuple[dict[str, Any], Tensor | None, Any]] = deque()
        self._pid = os.getpid()

    def check(self) -> None:
        """Before a step changes anything: append what has arrived, refuse if no record can follow.

        Raises:
            RuntimeError: the journal refuses, or the weights are not what it says. OSError: a record could not be written.
        """
        if self.broken or (refusal := self.writer.refusal):
            why = self.broken or f"the journal {refusal}"
            raise RuntimeError(
                f"{self.writer.path}: {why}: no step can be recorded. "
                + (
                    "Load the base weights and resume"
                    if self.broken
                    else "Mend the cause, then call reopen_journal(), or resume in a new process"
                )
            )
        self.drain()

    def put(self, entry: dict[str, Any], summary: Tensor | None = None) -> None:
        """Queue one record; `summary`: what `Summary.queued` gives, to be added to it once it has arrived."""
        event = None
        if summary is not None and summary.is_cuda:
            host = torch.empty(summary.shape, dtype=summary.dtype, pin_memory=True)
            host.copy_(summary, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(summary.device))
            summary = host
        self._queue.append((entry, summary, event))

    def append(self, entry: dict[str, Any]) -> None:
        """Write a record now, behind those that are queued. If it fails, it is not recorded and not queued."""
        self.drain(wait=True)
        self.writer.append(**entry)

    def drain(self, wait: bool = False) -> None:
        """Append the queued records whose numbers have arrived; `wait`: all of them."""
        while self._queue:
            entry, summary, event = self._queue[0]
            if event is not None:
                if not wait and not event.query():
                    return
                event.synchronize()
            with interrupts.uninterrupted():  # in the file or in the queue, not in both
                self.writer.append(**(entry if summary is None else complete(entry, summary.tolist())))
                self._queue.popleft()

    def reopen(self) -> None:
        """Go on with the file after an append has failed.

        Raises:
            RuntimeError: the file does not end where this run does.
        """
        records, old = self.writer.records, self.writer
        old.close()
        writer, past = journal.reopen(old.path, fsync_every=old.fsync_every)
        if past.header != old.header or len(past) != records:
            writer.close()
            raise RuntimeError(
                f"{old.path} has {len(past)} records of run {past.header.run}; this run wrote {records}, {old.header.run}"
            )
        self.writer = writer

    def close(self) -> None:
        """Everything that is queued, then the file. A fork's child leaves both to its parent."""
        if os.getpid() != self._pid:
            return
        try:
            if not self.writer.refusal and not self.broken:
                self.drain(wait=True)
        finally:
            self.writer.close()


def described(part: Any) -> dict[str, Any]:
    """A part of an optimizer (a frozen dataclass with a name) as JSON."""
    content: dict[str, Any] = json.loads(json.dumps({"name": part.name, **{f.name: getattr(part, f.name) for f in fields(part)}}))
    return content


def part_of(what: str, content: Any, known: Sequence[type[Any]]) -> Any:
    """The part that `described` wrote.

    Raises:
        ValueError: it is none that this version knows; says which.
    """
    wrong = f"the journal's method has {what}={content!r:.120}"
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise ValueError(f"{wrong}, which is no part of an optimizer")
    cls = next((k for k in known if k.name == content["name"]), None)
    if cls is None or set(content) != {"name", *(f.name for f in fields(cls))}:
        raise ValueError(f"{wrong}, which this version of zo_kernels does not know")
    try:
        return cls(**{name: value for name, value in content.items() if name != "name"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wrong}: {error}") from None


def complete(entry: dict[str, Any], numbers: Sequence[float]) -> dict[str, Any]:
    """The record with what the losses told: `numbers` as `Summary.values` has them."""
    loss, gradient, finite, clipped, *flat = numbers
    groups = len(entry["decay"])
    terms = len(flat) // groups
    coefs = [flat[k * terms : (k + 1) * terms] for k in range(groups)]
    entry = {**entry, "loss": loss, "gradient": gradient, "clipped": bool(clipped), "coefs": coefs}
    if not finite:
        entry |= {"skipped": True, "decay": [1.0] * groups}
    return entry


def table(groups: Sequence[Weights]) -> tuple[journal.Parameter, ...]:
    """The header's table of the weights as they are now."""
    return tuple(
        journal.Parameter.of(m.name, m.tensor, m.stream, number, m.mask, m.scale)
        for number, w in enumerate(groups)
        for m in w.members
    )


def check_header(header: journal.Header, mine: Mapping[str, Any], groups: Sequence[Weights]) -> None:
    """Refuse a journal of a run that this optimizer cannot go on with.

    Raises:
        ValueError: names the first thing that differs.
    """
    wrong = "the journal belongs to another run"
    for name, value in {**mine, "groups": len(groups)}.items():
        if (recorded := getattr(header, name)) != value:
            raise ValueError(f"{wrong}: its {name} is {recorded!r}, this optimizer's {value!r}; make the optimizer as that run's")
    recorded_table = {canonical_name(p.name): p for p in header.parameters}
    names = [n for w in groups for n in w.names]
    if different := set(recorded_table) ^ {canonical_name(n) for n in names}:
        raise ValueError(f"{wrong}: parameter {min(different)!r} is trained in only one of the two")
    for number, w in enumerate(groups):
        for m in w.members:
            entry = recorded_table[canonical_name(m.name)]
            mask, scale = journal.described(m.name, m.tensor, m.mask, m.scale)
            for what, a, b in (
                ("group", entry.group, number), ("stream", entry.stream, m.stream), ("mask", entry.mask, mask), ("scale", entry.scale, scale),
            ):  # fmt: skip
                if a != b:
                    raise ValueError(f"{wrong}: parameter {m.name!r} has the {what} {a!r:.120} there, {b!r:.120} here")


def differences(past: journal.Journal, mine: Mapping[str, Any], rounding: str) -> list[str]:
    """The numbers of this optimizer that are not those that the run began with, in words. What the header does not have as such is not compared:
    it holds whatever its user put there."""
    found = []
    for name, value in mine.items():
        recorded = past.header.hyperparameters.get(name, value)
        if isinstance(value, list):
            like = (
                isinstance(recorded, list)
                and len(recorded) == len(value)
                and all(isinstance(r, (bool, int, float)) for r in recorded)
            )
        else:
            like = recorded is None or isinstance(recorded, (bool, int, float))
        if like and recorded != value:
            one = isinstance(value, list) and len(value) == 1
            found.append(f"{name} was {recorded[0] if one else recorded}, is {value[0] if one else value}")
    if len(past.steps):
        before = "stochastic" if past.flag("stochastic")[-1] else "nearest"
        if before != rounding and any(p.dtype != "float32" for p in past.header.parameters):
            found.append(f"rounding was {before!r}, is {rounding!r}")
    return found
