"""One run: load, evaluate, train with forward passes only, evaluate, save.

Belongs here: the run's configuration and its loop. Does not belong here: how a step perturbs and updates (zo_kernels), what the
files look like (report.py), the command line (cli.py).

Dropout is off throughout (eval mode): SPSA's two losses must differ by the perturbation alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shlex
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_finetune import console, methods, report
from zo_finetune import model as models
from zo_finetune.data import Batches, load_splits
from zo_finetune.errors import UserError, one_line
from zo_finetune.evaluate import evaluate
from zo_finetune.scoring import Batch, Encoded, Encoder, Scorer
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Task

FP32_MAX, FP32_MIN = 3.4028235e38, 1.1754944e-38  # of normal numbers
MOVABLE = (
    "model",
    "data",
    "output",
    "overwrite",
    "device",
    "backend",
    "save",
)  # may differ when a run goes on: checked by other means, or no part of it
GRAPH_WIDTH = 32  # batches that a CUDA graph serves are padded to multiples of so many tokens: a graph for each width

SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps done -> factor of the learning rate
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass
class Config:
    """Everything that determines a run. The command line's options are its fields; the demo fills it in itself."""

    model: str
    task: str
    data: str
    output: str
    method: str = "mezo"
    options: dict[str, str] = field(default_factory=dict)
    steps: int = 20_000
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    eps: float | None = None
    lr_schedule: str = "constant"
    weight_decay: float = 0.0
    clip: float | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    backend: str | None = None
    perturbation: str = "auto"
    cuda_graph: bool = False
    rounding: str = "auto"
    peft: str = "none"
    targets: list[str] | None = None
    gguf_file: str | None = None
    form: str = "auto"
    max_length: int | None = None
    data_config: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    train_examples: int = 1000
    dev_examples: int | None = None
    eval_examples: int | None = None
    eval_every: int | None = None
    eval_batch_size: int = 32
    save: bool = True
    overwrite: bool = False

    def check(self) -> None:
        """Values that no part of the run could use; each error names the option."""
        positive = ("steps", "batch_size", "accumulate", "eval_batch_size", "max_length", "eps", "clip")
        for name in (*positive, "lr", "weight_decay", "seed", "train_examples", "dev_examples", "eval_examples", "eval_every"):
            value = getattr(self, name)
            if value is None:
                continue
            option = f"--{name.replace('_', '-')} {value!s:.40}"
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option} must be finite")
            if name in ("lr", "eps", "clip", "weight_decay") and value and not FP32_MIN <= abs(value) <= FP32_MAX:
                raise UserError(f"{option} must be {FP32_MIN:.3g} to {FP32_MAX:.3g}, the numbers of fp32")
            if name != "seed" and isinstance(value, int) and value >= 1 << 31:
                raise UserError(f"{option} must be below 2^31")
            if value < 0 or (value == 0 and name in positive):
                raise UserError(f"{option} must be {'greater than 0' if name in positive else 'at least 0'}")
        if self.seed >= 1 << 64:
            raise UserError(f"--seed {self.seed} must be below 2^64")
        for name in ("model", "data", "output"):
            report.path_of(f"--{name}", getattr(self, name))
        for name, value in asdict(self).items():
            if any(0xD800 <= ord(c) < 0xE000 for c in str(value)):
                raise UserError(f"{name} {value!r:.80} is not valid UTF-8: a run's record could not say it")
        if self.lr_schedule not in SCHEDULES:
            raise UserError(f"--lr-schedule {self.lr_schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.peft not in methods.PEFTS:
            raise UserError(f"--peft {self.peft!r} must be one of {', '.join(methods.PEFTS)}")
        methods.get(self.method).options(self.options, self.peft)

    def check_use(self) -> None:
        """Options that nothing of a new run would read: whoever gave one means another run than would come of it."""
        model, data = Path(self.model).expanduser(), Path(self.data).expanduser()
        if self.targets and self.peft not in ("lora", "ln"):
            raise UserError(
                f"--peft-target {self.targets[0]!r:.80} names what --peft lora or ln adapts, and --peft is {self.peft}: give one of them, or "
                "leave the target out"
            )
        if self.gguf_file is not None and model.suffix.lower() == ".gguf" and model.name != self.gguf_file and model.is_file():
            raise UserError(
                f"--gguf-file {self.gguf_file!r:.80}: --model {model} is a GGUF file itself: give its folder, or leave one out"
            )
        if self.data_config is not None and data.exists():
            raise UserError(
                f"--data-config {self.data_config!r:.80} is of data sets on the hub, and --data {data} is here: leave it out"
            )
        if self.eval_every and self.dev_examples == 0:
            raise UserError(
                f"--eval-every {self.eval_every} evaluates on the dev examples, and --dev-examples is 0: give some, or leave it out"
            )

    @classmethod
    def of_json(cls, content: Any, where: str) -> Config:
        """Exactly these fields, each of its type.

        Raises:
            UserError: names the first that is not so.
        """
        hints = typing.get_type_hints(cls)
        if not isinstance(content, dict):
            raise UserError(f"{where} holds no options of a run")
        for name in sorted({*content} ^ {f.name for f in fields(cls)}):
            raise UserError(f"{where}: {name!r} is {'no option of this version' if name in content else 'missing'}")
        for name, value in content.items():
            if not _fits(value, hints[name]):
                raise UserError(f"{where}: {name}={value!r:.80} is not {hints[name]}")
        config = cls(**content)
        config.check()
        return config


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of the type."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if (inside := typing.get_args(hint)) and isinstance(value, (list, dict)) and isinstance(value, typing.get_origin(hint)):
        items: list[Any] = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return all(_fits(item, inside[0]) for item in items)
    if hint is float:
        return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1023)  # what float() takes
    return type(value) is hint


class Stopwatch:
    """Seconds spent inside its `with` blocks, the one that is open included, and before."""

    def __init__(self, before: float = 0.0) -> None:
        self._total = before
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._total, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._total + (time.perf_counter() - self._since if self._since is not None else 0.0)


class Progress:
    """How far the training is, and the log behind it. Numbers stay on the device until `every` steps are due, so that a step waits for no
    transfer."""

    def __init__(self, log: report.Log, total: int, stepper: Any, device: torch.device, every: int = 10) -> None:
        self.log, self.stepper, self.device, self.every = log, stepper, device, every if device.type == "cuda" else 1
        self.counter = console.Counter("training", total, "step", done=len(log.losses), every=max(1, total // 20))
        self.pending: list[tuple[int, Tensor, Tensor, float, float]] = []
        self.skipped = 0

    def add(self, step: int, loss: Tensor, gradient: Tensor, lr: float, seconds: float) -> None:
        self.pending.append((step, loss, gradient, lr, seconds))
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        # In fp32, as the journal has them: a resumed run's log is made from it.
        numbers = torch.stack([torch.stack((loss.float(), g.float())) for _, loss, g, _, _ in self.pending]).double().tolist()
        self.log.write(
            (step, loss, g, lr, round(seconds, 4))
            for (step, _, _, lr, seconds), (loss, g) in zip(self.pending, numbers, strict=True)
        )
        if self.stepper.skipped and not self.skipped:
            console.say(
                f"step {self.pending[-1][0]} is the first that is skipped: a loss is not finite; the weights stay as they were"
            )
        self.skipped = self.stepper.skipped
        loss, g = numbers[-1]
        memory = report.peak_memory_bytes(self.device) / 2**30
        skipped = f"{self.skipped} skipped, " if self.skipped else ""
        steps = len(self.pending)
        self.pending.clear()
        self.counter.advance(steps, f"{skipped}loss {loss:.3f}, |g| {abs(g):.3g}, {memory:.2f} GiB")

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.counter.close()
            self.log.close()


def describe(evaluation: dict[str, Any]) -> str:
    """One line about an evaluation."""
    line = f"accuracy {evaluation['accuracy']:.4f} ± {evaluation['accuracy_stderr']:.4f} on {evaluation['examples']} examples"
    line += f", loss {evaluation['loss']:.4f}" if evaluation["loss"] is not None else ", loss not finite"
    if evaluation.get("auc") is not None:
        line += f", AUC {evaluation['auc']:.3f}"
    if "predicted" in evaluation:
        line += ", answers " + ", ".join(f"{name} {share:.0%}" for name, share in evaluation["predicted"].items())
    if evaluation.get("without_score"):
        line += f"; {evaluation['without_score']} examples have no score: the model's numbers are not finite"
    return line


@dataclass
class Prepared:
    """A run up to its first forward pass: everything loaded, encoded and checked, nothing written."""

    config: Config
    task: Task
    language_model: models.LanguageModel
    origin: dict[str, str]
    train_set: list[Encoded]
    dev_set: list[Encoded]
    eval_set: list[Encoded]
    max_length: int
    lr: float
    eps: float
    method: methods.Method
    options: dict[str, Any]  # of the method, complete
    stepper: Any
    seconds: float
    notes: list[str] = field(default_factory=list)  # lines about the data

    def describe(self) -> str:
        lm, (trainable, total) = self.language_model, self.language_model.counts()
        return (
            f"{self.config.model}: {total:,} weights, {trainable:,} trained ({lm.peft}) by {self.method.name}, {lm.model.dtype} on {lm.device}; "
            f"{len(self.train_set)} training, {len(self.dev_set)} dev, {len(self.eval_set)} evaluation examples"
        )


@dataclass
class Outcome:
    """What a run came to."""

    before: dict[str, Any]
    after: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    still: int = 0  # steps whose projected gradient was 0
    steps: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    interrupted: bool = False


def make_stepper(language_model: models.LanguageModel, config: Config, lr: float, eps: float) -> Any:
    """zo_kernels' step rule for this run; what it refuses is the user's to put right."""
    if not any(p.requires_grad for p in language_model.model.parameters()):
        raise UserError(f"--model {config.model} with --peft {config.peft} has no trainable weights: choose another --peft")
    try:
        method = methods.get(config.method)
        return method.make(
            language_model.model,
            lr,
            eps,
            method.options(config.options, config.peft),
            seed=config.seed,
            weight_decay=config.weight_decay,
            perturbation="inplace" if config.perturbation == "lazy" else config.perturbation,
            lazy=config.perturbation == "lazy",
            cuda_graph=config.cuda_graph,
            rounding=config.rounding,
            backend=config.backend,
            clip=config.clip,
        )
    except (TypeError, ValueError, RuntimeError) as error:  # its errors name argument, value and remedy
        raise UserError(f"--method {config.method}: {one_line(error)}") from error


def load_model(config: Config) -> models.LanguageModel:
    """The weights that the run starts from: the base model, and an adapter that is a function of the seed."""
    torch.manual_seed(config.seed)
    return models.load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        peft=config.peft,
        form=config.form,
        gguf_file=config.gguf_file,
        targets=config.targets,
    )


def prepare(config: Config, language_model: models.LanguageModel | None = None) -> Prepared:
    """Load and check everything that `config` names; `language_model`: already loaded."""
    started = time.perf_counter()
    task = get_task(config.task)
    method = methods.get(config.method)
    preset = method.preset(config.peft)
    lr = preset.lr if config.lr is None else config.lr
    eps = preset.eps if config.eps is None else config.eps
    if language_model is None:
        with console.Phase(f"looking for the model {config.model}"):
            form = models.find(config.model, device=config.device, form=config.form, gguf_file=config.gguf_file).form
    else:
        form = language_model.form
    if form not in task.forms:
        raise UserError(f"task {task.name} has no prompt for a {form} model, only for: {', '.join(task.forms)}")
    with console.Phase(f"reading the data {config.data}"):
        splits = load_splits(
            config.data,
            task,
            form,
            train_examples=config.train_examples,
            dev_examples=config.dev_examples,
            eval_examples=config.eval_examples,
            seed=config.seed,
            config=config.data_config,
            columns=config.columns,
        )
    if language_model is None:  # after the data, whose faults are found in less time
        with console.Phase(f"loading the model {config.model}"):
            language_model = load_model(config)
    max_length = min(language_model.max_length, config.max_length or language_model.max_length)
    encoder = Encoder(language_model.tokenizer, form, max_length, language_model.vocabulary)
    with console.Phase("tokenizing"):
        train_set = encoder.encode_all(splits.train, gold_only=task.objective == "language-model")
        dev_set, eval_set = encoder.encode_all(splits.dev), encoder.encode_all(splits.eval)
    notes = [*splits.notes, *language_model.notes]
    if encoder.cut:
        total = len(train_set) + len(dev_set) + len(eval_set)
        notes.append(f"{encoder.cut:,} of {total:,} texts are longer than {max_length:,} tokens: their beginnings are left out")
    return Prepared(
        config=config,
        task=task,
        language_model=language_model,
        origin=splits.origin,
        train_set=train_set,
        dev_set=dev_set,
        eval_set=eval_set,
        max_length=max_length,
        lr=lr,
        eps=eps,
        method=method,
        options=method.options(config.options, config.peft),
        stepper=make_stepper(language_model, config, lr, eps),
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def open_journal(run: Prepared, output: Path, resumed: bool) -> Any:
    """Start or resume the run's journal; returns what was in it. Its lock keeps the folder for this process. A method without a journal has
    neither; one of an earlier run goes."""
    if run.method.no_journal:
        console.say(f"--method {run.method.name} writes no journal and cannot be resumed: {run.method.no_journal}")
        output.mkdir(parents=True, exist_ok=True)
        report.remove_journal(output / report.JOURNAL)
        return None
    digest = hashlib.sha256()
    for part in (run.train_set, run.dev_set, run.eval_set):
        for example in part:
            digest.update(repr(example).encode() + b"\n")
        digest.update(b"\n")
    about = {
        "model": run.config.model,
        "config": asdict(run.config),
        "dtype": str(run.language_model.model.dtype).removeprefix("torch."),
        "data": digest.hexdigest(),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        past = run.stepper.open_journal(
            output / report.JOURNAL, resume=resumed, replace=run.config.overwrite and not resumed, hyperparameters=about
        )
    except FileExistsError as error:
        raise UserError(f"{output} has a run in it: resume it, or give another folder") from error
    except (OSError, ValueError, RuntimeError) as error:  # locked, damaged, another base model
        raise UserError(f"{output}: {one_line(error)}") from error
    if past is not None and past.header.hyperparameters.get("data") != about["data"]:
        run.stepper.close_journal()
        raise UserError(f"--data {run.config.data} gives other examples than when the run began: restore it, or begin a new run")
    return past


def fit(run: Prepared, output: Path, resumed: bool = False) -> Outcome:
    """Evaluate, train, evaluate. Ctrl-C during training ends it and keeps what there is; before that it ends the run."""
    config, lm, stepper = run.config, run.language_model, run.stepper
    factor = SCHEDULES[config.lr_schedule]
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: factor(step / config.steps))
    batches = Batches(run.train_set, config.batch_size * config.accumulate, config.seed)
    eval_every = max(1, config.steps // 5) if config.eval_every is None else config.eval_every
    if not run.dev_set:
        eval_every = 0

    width = GRAPH_WIDTH if config.cuda_graph else 1
    seconds = report.Log.seconds(output / "log.csv") if resumed else {}
    training, evaluating = Stopwatch(), Stopwatch()
    evaluations = report.Evaluations(output / "evaluations.jsonl")

    with Scorer(lm.model, lm.form, lm.pad_id) as scorer:

        def closure(batch: Batch) -> Tensor:
            return scorer.loss(batch, run.task.objective)

        def measure(what: str, examples: list[Encoded]) -> dict[str, Any]:
            with evaluating, console.Counter(what, len(examples), "example") as counter:
                return evaluate(scorer, examples, config.eval_batch_size, run.task.class_names, counter.advance)

        def watch(step: int) -> None:
            with training:  # steps that are still in a GPU's queue are waited for here, and are not the evaluation's time
                progress.flush()
            outcome.history.append({"step": step, **measure(f"step {step}, dev", run.dev_set)})
            evaluations.add("dev", outcome.history[-1])
            console.say(f"step {step}, dev: {describe(outcome.history[-1])}")

        before = evaluations.read()[0] if resumed else None
        measured = measure("before", run.eval_set) if before is None else before
        console.say(f"before: {describe(measured)}")
        with console.Phase("opening the journal"):  # which reads all weights, for their fingerprint
            past = open_journal(run, output, resumed)
        outcome, rows = Outcome(before=measured), []
        if past is None:
            report.clear_run_dir(output)
            report.write_json(output / "config.json", {"directory": os.getcwd(), "config": asdict(config)})
        else:
            outcome.history = evaluations.recover(stepper.steps)[1]
            wanted = list(range(0, stepper.steps, eval_every)) if eval_every else []
            if [e["step"] for e in outcome.history] != wanted:
                raise UserError(
                    f"{evaluations.path} lacks evaluations of the first {stepper.steps} steps: it was changed or is of another run"
                )
            last = 0.0
            for k, r in enumerate(past.steps):
                last = seconds.get(k + 1, last)
                rows.append((k + 1, float(r["loss"]), float(r["gradient"]), run.lr * factor(k / config.steps), last))
            training = Stopwatch(last)
            if stepper.steps:
                scheduler.last_epoch = stepper.steps - 1
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    scheduler.step()
            torn = f"; cut off: {past.tail.reason}" if past.tail else ""
            console.say(f"resumed after {stepper.steps} of {config.steps} steps{torn}")
        if before is None:
            evaluations.add("before", measured)
        progress = Progress(report.Log(output / "log.csv", rows), config.steps, stepper, lm.device)
        try:
            for step in range(stepper.steps, config.steps):
                if eval_every and step % eval_every == 0:
                    watch(step)
                with training:
                    examples = batches[step]
                    micro = [scorer.collate(examples[k :: config.accumulate], width) for k in range(config.accumulate)]
                    loss, lr = stepper.step(closure, micro), stepper.param_groups[0]["lr"]
                    scheduler.step()
                    progress.add(step + 1, loss, stepper.projected_gradient, lr, training.seconds)
            if eval_every:
                watch(config.steps)
            with training:
                progress.flush()
            outcome.after = measure("after", run.eval_set)
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            try:
                progress.close()
            finally:
                stepper.close_journal()
        outcome.steps = stepper.steps
        outcome.losses, outcome.still = progress.log.losses, progress.log.still
        outcome.training_seconds, outcome.evaluation_seconds = training.seconds, evaluating.seconds
        if outcome.after:
            console.say(f"after:  {describe(outcome.after)}")
    return outcome


def draw(run: Prepared, outcome: Outcome, path: Path) -> None:
    ends = [{"step": 0, **outcome.before}]
    if outcome.after:
        ends.append({"step": outcome.steps, **outcome.after})
    what = "all weights" if run.config.peft == "none" else run.config.peft
    report.draw_curve(
        path,
        f"{run.task.name}, {Path(run.config.model).name}: {run.method.name}, {what}",
        outcome.losses,
        {f"evaluation ({len(run.eval_set)} examples)": ends, f"dev ({len(run.dev_set)} examples)": outcome.history},
    )


def record(run: Prepared, outcome: Outcome, command: Sequence[str]) -> dict[str, Any]:
    """The content of result.json before the weights are saved."""
    lm = run.language_model
    trainable, total = lm.counts()
    effective = {"lr": run.lr, "eps": run.eps, "form": lm.form, "max_length": run.max_length, "options": run.options}
    return {
        "task": run.task.name,
        "before": outcome.before,
        "after": outcome.after,
        "history": outcome.history,
        "interrupted": outcome.interrupted,
        "steps": outcome.steps,
        "forwards": run.method.forwards(run.options, outcome.steps),
        "skipped_steps": run.stepper.skipped,
        "zero_gradient_steps": outcome.still,
        "seconds_per_step": outcome.training_seconds / outcome.steps if outcome.steps else None,
        "training_seconds": outcome.training_seconds,
        "evaluation_seconds": outcome.evaluation_seconds,
        "loading_seconds": run.seconds,
        "peak_memory_bytes": report.peak_memory_bytes(lm.device),
        "state_bytes": run.stepper.state_bytes(),
        "weights": {"total": total, "trainable": trainable, "dtype": str(lm.model.dtype)},
        "hyperparameters": {**asdict(run.config), **effective},
        "data": run.origin,
        "saved": None,
        "saved_files": [],
        "versions": report.versions(),
        "machine": report.machine(lm.device),
        "command": list(command),
    }


def train(config: Config, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Run `config` and return what result.json holds.

    Ctrl-C during training ends it: weights, log and curve up to then are saved, `interrupted` is true and `after` is None.

    Raises:
        UserError: something the user can put right; nothing has been written yet.
    """
    config.check()
    config = resolved(config, os.getcwd())
    config.check_use()
    output = Path(config.output)
    report.check_run_dir(output, config.overwrite, {"--model": config.model, "--data": config.data})
    with explained(config, output):
        run = prepare(config)
    if (batch := config.batch_size * config.accumulate) > len(run.train_set):
        times = f" with --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise UserError(
            f"--batch-size {config.batch_size}{times}: a step would take {batch} examples, and there are {len(run.train_set)} to train on: give less"
        )
    return complete(run, output, command)


def resolved(config: Config, directory: str) -> Config:
    """The configuration with the absolute paths of what is there in `directory`, so that the run can go on from anywhere; hub ids stay."""

    def place(name: str) -> Path:
        return Path(directory, report.path_of(f"--{name}", getattr(config, name))).absolute()

    def found(name: str) -> str:
        path = place(name)
        with contextlib.suppress(OSError):
            return str(path) if path.exists() else getattr(config, name)
        return str(getattr(config, name))  # longer than a path may be

    return replace(config, model=found("model"), data=found("data"), output=str(place("output")))


def way_on(config: Config, output: Path) -> str:
    """What to do after a run has ended before its end."""
    with contextlib.suppress(UserError):
        if report.read_result(output / "result.json", config.save) is not None:
            return f"see {output / 'result.json'} (the run is finished)"
        if (output / "config.json").is_file() and not methods.get(config.method).no_journal and (output / report.JOURNAL).is_file():
            return f"go on with: zo-finetune resume {shlex.quote(str(output))}"
    again = "with --overwrite " if not config.overwrite and output.is_dir() and any(output.iterdir()) else ""
    why = (
        f"a run of --method {config.method} has no journal to go on from"
        if methods.get(config.method).no_journal
        else "nothing was recorded yet"
    )
    return f"give the same command again {again}({why})"


@contextlib.contextmanager
def explained(config: Config, output: Path) -> Iterator[None]:
    """What ends a run from outside (Ctrl-C, a full disk, too little memory) ends with what to do."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {way_on(config, output)}") from None
    except OSError as error:
        raise UserError(f"{one_line(error)}; {remedy(error)}, then {way_on(config, output)}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory ({one_line(error, 160)}): free some, then {way_on(config, output)}; or begin anew with a smaller --batch-size, "
            "--eval-batch-size or --max-length, or with --dtype bfloat16"
        ) from error


def remedy(error: BaseException) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error)
    return "free space there" if full else "mend that"


def complete(run: Prepared, output: Path, command: Sequence[str] | None, resumed: bool = False) -> dict[str, Any]:
    """Train and write what there is to write: result.json first, since it is small and tells whether the weights were saved."""
    config = run.config
    for line in (*run.notes, run.describe()):
        console.say(line)
    with explained(config, output):
        outcome = fit(run, output, resumed)
        result = record(run, outcome, sys.argv if command is None else command)
        if outcome.interrupted:
            again = "saving the weights, unless Ctrl-C comes again" if config.save else way_on(config, output)
            console.say(f"interrupted after {outcome.steps} of {config.steps} steps; {again}")
        for line in misgivings(run, outcome):
            console.say(line)
        report.write_json(output / "result.json", result)
        try:
            with console.Phase("drawing curve.png"):
                draw(run, outcome, output / "curve.png")
        except Exception as error:  # the least of what a run leaves, made by a library that needs fonts, caches and space
            console.say(f"curve.png could not be drawn ({one_line(error)}); log.csv has what it shows")
        if config.save:
            save(run, output, result)
        if outcome.interrupted:
            console.say(f"interrupted after {outcome.steps} of {config.steps} steps; {way_on(config, output)}")
    return result


def save(run: Prepared, output: Path, result: dict[str, Any]) -> None:
    """The weights, and the word of them in result.json."""
    try:
        with console.Phase("saving the weights"):
            folder, names = report.save_weights(output, run.language_model.save)
    except Exception as error:  # safetensors and tokenizers, whose code is Rust's, have exceptions of their own for a full disk
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise UserError(
            f"the weights could not be saved in {output}: {one_line(error)}; {remedy(error)}, then {way_on(run.config, output)}"
        ) from error
    result |= {"saved": str(folder), "saved_files": names}
    report.write_json(output / "result.json", result)


def misgivings(run: Prepared, outcome: Outcome) -> list[str]:
    """What makes a run's numbers worth less than they look."""
    lines, skipped, steps = [], run.stepper.skipped, outcome.steps
    if skipped:
        lines.append(
            f"{skipped} of {steps} steps were skipped, since a loss was not finite: try a smaller --lr or --eps, or --dtype float32"
        )
    if outcome.still and 2 * outcome.still >= steps - skipped:
        lines.append(
            f"the projected gradient was 0 in {outcome.still} of {steps} steps: both losses of a step were the same to the bit, and nothing was "
            "learned from it; try a larger --eps, or --dtype float32"
        )
    return lines


def saved_config(output: Path) -> Config:
    """The options of the run in a folder, its paths as they were given then.

    Raises:
        UserError: there is none, or it is not as a run wrote it.
    """
    path = output / "config.json"
    saved = report.read_json(path)
    if set(saved) != {"directory", "config"} or not isinstance(saved["directory"], str):
        raise UserError(f"{path} must have the keys directory and config")
    config = Config.of_json(saved["config"], str(path))
    return resolved(config, saved["directory"] if "\0" not in saved["directory"] else "/")


def one_number(values: Any) -> float | None:
    """Of a journal's list of one for each group: an application's run has the same in all."""
    return values[0] if isinstance(values, list) and values and isinstance(values[0], float) else None


def recorded_config(output: Path, config: Config) -> Config:
    """`config`, with the learning rate and eps that the journal has where it leaves them to the method.

    Raises:
        UserError: the journal is damaged, or began with other options than `config`: names the first that differs.
    """
    from zo_kernels import journal

    try:
        about = journal.read(output / report.JOURNAL, strict=False).header.hyperparameters
    except journal.UnbegunError:
        return config  # the run died as it wrote the header: it begins anew
    except (OSError, ValueError) as error:
        raise UserError(f"{output}: {one_line(error)}") from error
    recorded, now = about.get("config"), json.loads(json.dumps(asdict(config)))
    if not isinstance(recorded, dict):
        raise UserError(f"{output / report.JOURNAL} holds no options: it is not of a run of zo-finetune")
    for name, value in now.items():
        if name not in MOVABLE and (name not in recorded or recorded[name] != value):
            raise UserError(
                f"{output / 'config.json'}: {name} is {json.dumps(value):.80}, and was {json.dumps(recorded.get(name)):.80} when the run began: "
                "put it back, or begin a new run"
            )
    lr, eps = (one_number(about.get(name)) for name in ("lr", "eps"))
    config = replace(config, lr=lr if config.lr is None else config.lr, eps=eps if config.eps is None else config.eps)
    config.check()
    return config


def resume(folder: str, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Go on with a killed or interrupted run; returns what result.json then holds: that of a run that was never killed, but for times.

    Raises:
        UserError: there is no run in the folder, it is running, or its options, base model or data have changed; nothing was changed.
    """
    output = report.path_of("RUN_DIR", folder).absolute()
    report.check_files(output)
    nothing = f"{folder} has no config.json and {report.JOURNAL}: no run began there that could be resumed"
    if not (output / "config.json").exists():
        raise UserError(nothing)
    config = saved_config(output)
    if reason := methods.get(config.method).no_journal:
        raise UserError(f"{folder}: a run of --method {config.method} cannot be resumed: {reason}; begin it anew with --overwrite")
    if not (output / report.JOURNAL).exists():
        raise UserError(nothing)
    if (result := report.read_result(output / "result.json", config.save)) is not None:
        console.say(f"{folder} is finished after {result['steps']} steps: there is nothing to resume")
        return result
    config = recorded_config(output, config)
    for name in ("model", "data"):
        if os.path.isabs(path := getattr(config, name)) and not os.path.exists(path):
            raise UserError(
                f"the {name} that the run began with, {path}, is gone: put it back, or write its new place into {output}/config.json"
            )
    with explained(config, output):
        run = prepare(config)
    return complete(run, output, command, resumed=True)


def replay(
    source: str,
    model: str,
    output: str,
    upto: int | None = None,
    mode: str = "sequential",
    device: str = "auto",
    backend: str | None = None,
) -> Path:
    """The weights of a recorded run, from its base model, as a model or adapter in the usual format; returns its folder.

    Raises:
        UserError: the base model is not the one that the run started from, or the journal is damaged.
    """
    import zo_kernels
    from zo_kernels import journal

    path, target = report.path_of("RUN_DIR_OR_JOURNAL", source), report.path_of("--output", output)
    report.check_run_dir(target, overwrite=False)
    if os.path.isdir(path):
        path = path / report.JOURNAL
        report.check_plain(path)
    try:
        past = journal.read(path, strict=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {one_line(error)}") from error
    about, weights = past.header.hyperparameters, past.header.parameters
    options = about.get("config")
    if isinstance(options, dict):
        config = Config.of_json(options, f"{source}, config")
    else:  # a run of the library: its weights are those of the bare model
        config = Config(model=model, task="", data="", output=output)
    dtype = about.get("dtype", weights[0].dtype)
    if dtype not in models.DTYPES:
        raise UserError(f"{source}: dtype {dtype!r:.40} must be one of {', '.join(models.DTYPES)}")
    config.model, config.dtype, config.device = model, dtype, device
    if past.tail is not None:
        console.say(f"{path} has {past.tail.reason} at its end, where the run was ended: that is left out")
    if upto is None and isinstance(options, dict) and len(past.steps) < config.steps:
        console.say(
            f"the run was recorded for {len(past.steps)} of its {config.steps} steps: these are the weights that it had then"
        )
    with console.Phase(f"loading the model {model}"):
        language_model = load_model(config)
    try:
        with console.Phase(f"replaying {len(past.steps) if upto is None else upto} steps"):
            zo_kernels.replay(language_model.model, past, upto, mode=mode, backend=backend)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{source}: {one_line(error)}") from error
    try:
        with console.Phase("saving the weights"):
            return report.save_weights(target, language_model.save)[0]
    except OSError as error:
        raise UserError(f"{target}: {one_line(error)}; {remedy(error)} and run it again") from error
