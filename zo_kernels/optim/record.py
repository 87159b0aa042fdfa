"""What an optimizer writes to its journal, and when.

Belongs here: the queue between steps and the file, the header of a run, and whether a journal is that of a run. Does not belong here: the file (journal), what
a record says (decision.py), how it becomes weights again (run.py).

On the host a step's numbers are known before the weights change, and the record is written first. On a GPU nobody waits for them: the
step's few numbers are copied to pinned host memory behind its kernels, and a later step, or `flush`, appends those that have arrived. What
a killed process had queued is lost with the weights that it had changed: the file is a prefix of the run.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import interrupts, journal, parameters, quantized
from zo_kernels.optim import method
from zo_kernels.optim.decide import Numbers
from zo_kernels.optim.decision import Decision
from zo_kernels.optim.findings import ZOWarning
from zo_kernels.optim.run import Run
from zo_kernels.optim.workers import Workers, together
from zo_kernels.parameters import Weights, canonical_name
from zo_kernels.views import View


class Recorder:
    """The queue in front of a `journal.Writer`."""

    def __init__(self, writer: journal.Writer) -> None:
        self.writer = writer
        self.broken = ""  # why the weights are no longer what the records say
        self._queue: deque[tuple[Decision, Tensor | None, Any]] = deque()
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

    def put(self, decision: Decision, summary: Tensor | None = None) -> None:
        """Queue one record; `summary`: what the decision is told (`Decision.told`) once it has arrived."""
        event = None
        if summary is not None and summary.is_cuda:
            host = torch.empty(summary.shape, dtype=summary.dtype, pin_memory=True)
            host.copy_(summary, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(summary.device))
            summary = host
        self._queue.append((decision, summary, event))

    def append(self, decision: Decision) -> None:
        """Write a record now, behind those that are queued. If it fails, it is not recorded and not queued."""
        self.drain(wait=True)
        self.writer.append(**decision.entry())

    def drain(self, wait: bool = False) -> None:
        """Append the queued records whose numbers have arrived; `wait`: all of them."""
        while self._queue:
            decision, summary, event = self._queue[0]
            if event is not None:
                if not wait and not event.query():
                    return
                event.synchronize()
            with interrupts.uninterrupted():  # in the file or in the queue, not in both
                self.writer.append(**(decision if summary is None else decision.told(summary.tolist())).entry())
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


class Recording:
    """Whether and where the steps of one optimizer are recorded.

    Attributes:
        mode: the journal's word for how its passes go: "scratch", "inplace", "lazy". recorder: None while no journal is open.
        flushed: weights that stood ahead were brought back since the last record.
        workers: share the steps, of which the first one records; None: there is this process alone. opened: a journal is, by the first one.
    """

    def __init__(self, mode: str, workers: Workers | None = None) -> None:
        self.mode, self.flushed, self.workers, self.opened = mode, False, workers, False
        self.recorder: Recorder | None = None
        self._closes: weakref.finalize[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not record."""
        return {**self.__dict__, "recorder": None, "_closes": None, "workers": None, "opened": False}

    @property
    def path(self) -> str:
        """Of the journal; empty without one."""
        return self.recorder.writer.path if self.recorder is not None else ""

    def begin(self, recorder: Recorder | None, owner: Any) -> None:
        """Record from now on, until `close`, or until `owner` goes away; None: another worker does."""
        self.opened = True
        if recorder is None:
            return
        with interrupts.uninterrupted():
            self.recorder = recorder
            self._closes = weakref.finalize(owner, recorder.close)

    def close(self) -> None:
        """Write what is queued, make it durable, release the lock."""
        with interrupts.uninterrupted():
            recorder, self.recorder, self.opened = self.recorder, None, False
            if recorder is not None and self._closes is not None:
                self._closes.detach()
                recorder.close()

    def check(self) -> None:
        """See `Recorder.check`."""
        if self.recorder is not None:
            self.recorder.check()

    def drain(self) -> None:
        """Append everything that is queued."""
        if self.recorder is not None:
            self.recorder.drain(wait=True)

    # -- the records of a step --

    def planned(self, tag: Any, numbers: Numbers, rounding: str) -> Decision:
        """The next record but for what the losses tell."""
        eps = None if self.mode == "scratch" else list(numbers.eps)
        return Decision(tag, numbers.decay, eps=eps, rounding=rounding, flushed=self.flushed)

    def before(self, decision: Decision) -> None:
        """Write the record of a step whose numbers the host knows, before it changes anything. Workers who share the step wait for it."""
        workers = self.workers
        if workers is not None:
            workers.decided(decision.entry())
        decided = {"the decision": workers.chain} if workers is not None else None
        with together(workers if self.opened else None, "the record of a step", decided):
            if self.recorder is not None and decision.known:
                self.recorder.append(decision)
        if self.opened and decision.known:
            self.flushed = False

    def behind(self, decision: Decision) -> None:
        """Queue the record of one whose numbers the host does not know, behind its kernels."""
        if self.recorder is not None and not decision.known:
            self.queue(decision, decision.unknown())

    def queue(self, decision: Decision, summary: Tensor | None = None) -> None:
        """See `Recorder.put`."""
        if self.recorder is not None:
            self.recorder.put(decision, summary)
            self.flushed = False

    def cut_short(self, why: str) -> None:
        """The weights are no longer what the records say."""
        if self.recorder is not None:
            self.recorder.broken = self.recorder.broken or why

    def failed(self, view: View, done: bool, ahead: bool, attempt: Callable[[], Decision]) -> None:
        """After a step that failed: one in place has rounded the weights without an update; scratch mode has nothing to tell.

        Args:
            done: the step was done when it failed. ahead: a lazy run's weights stood ahead when it began. attempt: the record of the attempt.
        """
        if self.recorder is None or self.mode == "scratch" or self.recorder.broken:
            return
        if not view.whole:
            self.cut_short("a pass over the weights was cut short")
        elif self.recorder.writer.header.method is not None and view.seen:
            self.cut_short("a step failed, and its passes in place rounded the weights")
        elif view.seen and not done:
            self.queue(attempt())
        else:  # it was done, or not begun; the weights may have been restored from ahead
            self.flushed |= self.mode == "lazy" and (ahead or done) and not any(view.standing())


def _table(groups: Sequence[Weights]) -> tuple[journal.Parameter, ...]:
    """The header's table of the weights as they are now."""
    return tuple(
        journal.Parameter.of(m.name, m.param, m.stream, number, m.mask, m.scale)
        for number, w in enumerate(groups)
        for m in w.members
    )


def _check_header(header: journal.Header, mine: Mapping[str, Any], groups: Sequence[Weights]) -> None:
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
            mask, scale = journal.described(m.name, m.param, m.mask, m.scale)
            for what, a, b in (
                ("group", entry.group, number), ("stream", entry.stream, m.stream), ("mask", entry.mask, mask), ("scale", entry.scale, scale),
            ):  # fmt: skip
                if a != b:
                    raise ValueError(f"{wrong}: parameter {m.name!r} has the {what} {a!r:.120} there, {b!r:.120} here")


def _differences(past: journal.Journal, mine: Mapping[str, Any], rounding: str) -> list[str]:
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


def about(run: Run, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of a header that no record depends on, of torch's parameter groups; lr before any scheduler."""
    signs = [g["maximize"] for g in groups]
    return {
        "lr": [float(g.get("initial_lr", g["lr"])) for g in groups],
        "weight_decay": [float(g["weight_decay"]) for g in groups],
        "eps": [float(g["eps"]) for g in groups],
        "clip": run.method.clip.number,
        "maximize": signs[0] if len(set(signs)) == 1 else signs,
    }


@dataclass(frozen=True)
class Start:
    """What a journal says of a run before its first record, and what workers who share the run must have in common.

    Attributes:
        fixed: seed, kind, perturbation, terms and method: a run with others cannot go on. about: numbers that no record depends on.
        groups: the weights, with the masks and scales that stay. model: whose other parameters and buffers are to be the same; None: none.
        factors: that lie beside the journal; None: none.
    """

    run: Run
    fixed: Mapping[str, Any]
    about: Mapping[str, Any]
    groups: Sequence[Weights]
    model: nn.Module | None
    rounding: str
    factors: journal.InputFactors | None = None

    def _frozen(self) -> list[tuple[str, Tensor]]:
        ids = {id(p) for w in self.groups for p in w.held}
        frozen = [(n, p) for n, p in (self.model.named_parameters() if self.model is not None else ()) if id(p) not in ids]
        return list(quantized.spread(frozen, self.model, ids))

    def header(self, hyperparameters: Mapping[str, Any] | None, notes: Any) -> journal.Header:
        """Of the run that begins now. Every weight is read, for its digest.

        Raises:
            RuntimeError: the run has begun, and its records would tell too little.
        """
        if self.run.steps and self.fixed["method"] is not None:
            raise RuntimeError(
                f"open_journal() after {self.run.steps} steps: what this method's records mean depends on the number of a step and on the steps before "
                "it; open the journal before the first step"
            )
        return self._header(hyperparameters, notes)

    def common(self) -> dict[str, Any]:
        """The same in words, of where the run is now. Every weight is read, for its digest."""
        header = self._header(None, "")
        tables = {"parameter": header.parameters, "frozen parameter": header.frozen, "buffer": header.buffers}
        named = {
            f"{what} {canonical_name(p.name)}": {k: v for k, v in asdict(p).items() if k not in ("name", "extra")}
            for what, table in tables.items()
            for p in table
        }
        where = {"steps": self.run.steps, "tag": self.run.tag, "skipped steps": int(self.run.skipped)}
        parts = {what: part and method.describe(part) for what, part in self.run.method.configured().items()}
        own = {"clip": repr(self.run.method.clip), "rounding": self.rounding}
        return {**header.versions, **where, **parts, **self.fixed, **self.about, **own, **named}

    def _header(self, hyperparameters: Mapping[str, Any] | None, notes: Any) -> journal.Header:
        buffers = parameters.persistent_buffers(self.model) if self.model is not None else ()
        return journal.Header(
            parameters=_table(self.groups),
            groups=len(self.groups),
            frozen=tuple(journal.Frozen.of(n, p) for n, p in self._frozen()),
            buffers=tuple(journal.Frozen.of(n, b) for n, b in buffers),
            hyperparameters={**self.about, **(hyperparameters or {})},
            notes=notes,
            **self.fixed,
        )

    def check(self, past: journal.Journal) -> list[str]:
        """That the run of a journal can go on here. Returns the numbers that are others than it began with, in words.

        Raises:
            ValueError: it is another run, or its weights were others; says what differs.
        """
        method.parts_of(past.header)  # what this version cannot go on with is named as such
        _check_header(past.header, self.fixed, self.groups)
        buffers = self.model.named_buffers(remove_duplicate=False) if self.model is not None else None
        trained = [(m.name, m.param) for w in self.groups for m in w.members]
        journal.verify_base(past.header, [*trained, *self._frozen()], buffers)
        return _differences(past, self.about, self.rounding)


def start_of(
    run: Run,
    param_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Weights],
    model: nn.Module | None,
    mode: str,
    rounding: str,
) -> Start:
    """Of a run as it is now, of torch's parameter groups and the weights in them."""
    fixed: dict[str, Any] = {"seed": run.seed, "kind": run.method.kind, "perturbation": mode, "terms": run.method.terms}
    fixed["method"] = run.method.described(mode == "scratch", run.rule.together)
    return Start(run, fixed, about(run, param_groups), groups, model, rounding, run.direction.given)


def open_(
    path: str | os.PathLike[str], start: Start, *, resume: bool, replace: bool, fsync_every: int, hyperparameters: Mapping[str, Any] | None,
    notes: Any, go_on: Callable[[journal.Journal], None], workers: Workers | None,
) -> tuple[Recorder | None, journal.Journal | None]:  # fmt: skip
    """A journal to record a run in, and what was there if it is resumed. Of several workers the first one has it, and hands out what was there.

    Args:
        go_on: takes the records that are there into the run.

    Raises:
        What `journal.create`, `journal.reopen`, `Start.check` and `go_on` raise; WorkerError.
    """
    first = workers is None or workers.rank == 0
    writer: journal.Writer | None = None
    past: journal.Journal | None = None
    try:
        with together(workers, "opening the journal", {"resume": resume, "hyperparameters": hyperparameters}):
            if first and resume and os.path.lexists(path):
                if start.run.tag:
                    raise RuntimeError(
                        f"resume=True after {start.run.tag} steps: only an optimizer that has not stepped can resume a journal"
                    )
                try:
                    writer, past = journal.reopen(path, fsync_every=fsync_every, after_steps=True)
                except journal.UnbegunError:
                    replace = True
        if workers is not None:
            past = workers.hand_out(past)
        with together(workers, "beginning, or going on with, the journal's run"):
            if past is not None:
                _go_on(os.fspath(path), start, past, go_on)
                if first and start.factors is not None and not journal.factors_path(path).exists():  # a copy of the journal alone
                    journal.write_factors(path, start.factors)
            else:
                header = start.header(hyperparameters, notes)  # on all of them: whole tensors are gathered from everyone's parts
                if first:
                    writer = journal.create(path, header, fsync_every=fsync_every, replace=replace, factors=start.factors)
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    return Recorder(writer) if writer is not None else None, past


def _go_on(path: str, start: Start, past: journal.Journal, go_on: Callable[[journal.Journal], None]) -> None:
    if different := start.check(past):
        warnings.warn(
            f"the run in {path} goes on with other numbers than it began with: {'; '.join(different)}. What it has done stays as it was; make the "
            "optimizer with the recorded numbers to go on with the same run",
            ZOWarning,
            stacklevel=4,
        )
    go_on(past)


def check_recorded(recorder: Recorder, groups: Sequence[Weights]) -> None:
    """The journal's table of parameters is that of the whole run.

    Raises:
        RuntimeError: names what came, went or changed.
    """
    path, table = recorder.writer.path, recorder.writer.header.parameters
    recorded, now = {(p.name, p.group) for p in table}, {(n, k) for k, w in enumerate(groups) for n in w.names}
    if recorded != now:
        raise RuntimeError(
            f"parameter {min(recorded ^ now)[0]!r} was frozen, unfrozen, added or moved to another group, and the journal "
            f"{path} has one table for the run: close_journal(), and open_journal() another one"
        )
    known = {p.name: (p.mask, p.scale) for p in table}
    for w in groups:
        for m in w.members if w.own else ():
            if journal.described(m.name, m.param, m.mask, m.scale) != known[m.name]:
                raise RuntimeError(
                    f"parameter {m.name!r} has another mask or scale than when {path} was opened, and the journal has one for "
                    "the run: put it back, or close_journal(), and open_journal() another one"
                )
