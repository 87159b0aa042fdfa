"""One run: load, evaluate, train with forward passes only, evaluate, save.

Belongs here: the run's configuration and its loop. Does not belong here: how a step perturbs and updates (zo_kernels), what the
files look like (report.py), the command line (cli.py).

Dropout is off throughout (eval mode): SPSA's two losses must differ by the perturbation alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zo_finetune import model as models
from zo_finetune import report
from zo_finetune.data import Batches, load_splits
from zo_finetune.errors import UserError, one_line
from zo_finetune.evaluate import evaluate
from zo_finetune.scoring import Batch, Encoded, Encoder, Scorer
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Task

# (lr, eps) where the user gives none. none, lora, prefix: MeZO's for OPT (appendix E). ln: found on SmolLM2-135M, see demo.py.
# prompt: as prefix, since both are five tokens' worth of activations.
DEFAULT_LR_EPS = {"none": (1e-6, 1e-3), "lora": (1e-4, 1e-2), "ln": (3e-4, 5e-3), "prefix": (1e-2, 1e-1), "prompt": (1e-2, 1e-1)}

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
            option = f"--{name.replace('_', '-')} {value}"
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option} must be finite")
            if value < 0 or (value == 0 and name in positive):
                raise UserError(f"{option} must be {'greater than 0' if name in positive else 'at least 0'}")
        if self.lr_schedule not in SCHEDULES:
            raise UserError(f"--lr-schedule {self.lr_schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.peft not in models.PEFTS:
            raise UserError(f"--peft {self.peft!r} must be one of {', '.join(models.PEFTS)}")


class Stopwatch:
    """Seconds spent inside its `with` blocks, the one that is open included."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._total, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._total + (time.perf_counter() - self._since if self._since is not None else 0.0)


class Progress:
    """The bar, and the log behind it. Numbers stay on the device until `every` steps are due, so that a step waits for no
    transfer."""

    def __init__(self, log: report.Log, total: int, device: torch.device, every: int = 10) -> None:
        self.log, self.device, self.every = log, device, every if device.type == "cuda" else 1
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, desc="training")
        self.pending: list[tuple[int, Tensor, Tensor, float, float]] = []

    def add(self, step: int, loss: Tensor, gradient: Tensor, lr: float, seconds: float) -> None:
        self.pending.append((step, loss, gradient, lr, seconds))
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        numbers = torch.stack([torch.stack((loss.double(), g.double())) for _, loss, g, _, _ in self.pending]).tolist()
        self.log.write(
            (step, loss, g, lr, round(seconds, 4))
            for (step, _, _, lr, seconds), (loss, g) in zip(self.pending, numbers, strict=True)
        )
        loss, g = numbers[-1]
        memory = report.peak_memory_bytes(self.device) / 2**30
        self.bar.set_postfix_str(f"loss {loss:.3f}, |g| {abs(g):.3g}, {memory:.2f} GiB", refresh=False)
        self.bar.update(len(self.pending))
        self.pending.clear()

    def say(self, line: str) -> None:
        self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self.flush()
        self.bar.close()
        self.log.close()


def describe(evaluation: dict[str, Any]) -> str:
    """One line about an evaluation."""
    line = f"accuracy {evaluation['accuracy']:.4f} ± {evaluation['accuracy_stderr']:.4f} on {evaluation['examples']} examples"
    line += f", loss {evaluation['loss']:.4f}"
    if evaluation.get("auc") is not None:
        line += f", AUC {evaluation['auc']:.3f}"
    if "predicted" in evaluation:
        line += ", answers " + ", ".join(f"{name} {share:.0%}" for name, share in evaluation["predicted"].items())
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
    stepper: Any
    seconds: float

    def describe(self) -> str:
        lm, (trainable, total) = self.language_model, self.language_model.counts()
        return (
            f"{self.config.model}: {total:,} weights, {trainable:,} trained ({lm.peft}), {lm.model.dtype} on {lm.device}; "
            f"{len(self.train_set)} training, {len(self.dev_set)} dev, {len(self.eval_set)} evaluation examples"
        )


@dataclass
class Outcome:
    """What a run came to."""

    before: dict[str, Any]
    after: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    interrupted: bool = False


def make_stepper(language_model: models.LanguageModel, config: Config, lr: float, eps: float) -> Any:
    """zo_kernels' step rule for this run; what it refuses is the user's to put right."""
    import zo_kernels

    if not any(p.requires_grad for p in language_model.model.parameters()):
        raise UserError(f"--model {config.model} with --peft {config.peft} has no trainable weights: choose another --peft")
    try:
        return zo_kernels.MeZOStep(
            language_model.model,
            lr=lr,
            eps=eps,
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
        raise UserError(one_line(error)) from error


def prepare(config: Config) -> Prepared:
    """Load and check everything that `config` names."""
    started = time.perf_counter()
    task = get_task(config.task)
    default_lr, default_eps = DEFAULT_LR_EPS[config.peft]
    lr = default_lr if config.lr is None else config.lr
    eps = default_eps if config.eps is None else config.eps
    torch.manual_seed(config.seed)  # adapters are initialised at random
    language_model = models.load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        peft=config.peft,
        form=config.form,
        gguf_file=config.gguf_file,
        targets=config.targets,
    )
    form = language_model.form
    if form not in task.forms:
        raise UserError(f"task {task.name} has no prompt for a {form} model, only for: {', '.join(task.forms)}")
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
    max_length = min(language_model.max_length, config.max_length or language_model.max_length)
    encoder = Encoder(language_model.tokenizer, form, max_length)
    return Prepared(
        config=config,
        task=task,
        language_model=language_model,
        origin=splits.origin,
        train_set=[encoder.encode(e, gold_only=task.objective == "language-model") for e in splits.train],
        dev_set=[encoder.encode(e) for e in splits.dev],
        eval_set=[encoder.encode(e) for e in splits.eval],
        max_length=max_length,
        lr=lr,
        eps=eps,
        stepper=make_stepper(language_model, config, lr, eps),
        seconds=time.perf_counter() - started,
    )


def fit(run: Prepared, output: Path) -> Outcome:
    """Evaluate, train, evaluate. Ctrl-C during training ends it and keeps what there is; before that it ends the run."""
    config, lm, stepper = run.config, run.language_model, run.stepper
    factor = SCHEDULES[config.lr_schedule]
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: factor(step / config.steps))
    batches = Batches(run.train_set, config.batch_size * config.accumulate, config.seed)
    eval_every = max(1, config.steps // 5) if config.eval_every is None else config.eval_every
    if not run.dev_set:
        eval_every = 0

    width = GRAPH_WIDTH if config.cuda_graph else 1
    training, evaluating = Stopwatch(), Stopwatch()

    with Scorer(lm.model, lm.form, lm.pad_id) as scorer:

        def closure(batch: Batch) -> Tensor:
            return scorer.loss(batch, run.task.objective)

        def measure(examples: list[Encoded]) -> dict[str, Any]:
            with evaluating:
                return evaluate(scorer, examples, config.eval_batch_size, run.task.class_names)

        def watch(step: int) -> None:
            with training:  # steps that are still in a GPU's queue are waited for here, and are not the evaluation's time
                progress.flush()
            outcome.history.append({"step": step, **measure(run.dev_set)})
            progress.say(f"step {step}, dev: {describe(outcome.history[-1])}")

        outcome = Outcome(before=measure(run.eval_set))
        print(f"before: {describe(outcome.before)}", file=sys.stderr)
        report.open_run_dir(output)
        progress = Progress(report.Log(output / "log.csv"), config.steps, lm.device)
        try:
            for step in range(config.steps):
                if eval_every and step % eval_every == 0:
                    watch(step)
                with training:
                    examples = batches[step]
                    micro = [scorer.collate(examples[k :: config.accumulate], width) for k in range(config.accumulate)]
                    loss, lr = stepper.step(closure, micro), stepper.param_groups[0]["lr"]
                    scheduler.step()
                    outcome.steps = step + 1
                    progress.add(outcome.steps, loss, stepper.projected_gradient, lr, training.seconds)
            if eval_every:
                watch(config.steps)
            with training:
                progress.flush()
            outcome.after = measure(run.eval_set)
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            progress.close()
        outcome.losses = progress.log.losses
        outcome.training_seconds, outcome.evaluation_seconds = training.seconds, evaluating.seconds
        if outcome.after:
            print(f"after:  {describe(outcome.after)}", file=sys.stderr)
    return outcome


def draw(run: Prepared, outcome: Outcome, path: Path) -> None:
    ends = [{"step": 0, **outcome.before}]
    if outcome.after:
        ends.append({"step": outcome.steps, **outcome.after})
    what = "all weights" if run.config.peft == "none" else run.config.peft
    report.draw_curve(
        path,
        f"{run.task.name}, {Path(run.config.model).name}: MeZO, {what}",
        outcome.losses,
        {f"evaluation ({len(run.eval_set)} examples)": ends, f"dev ({len(run.dev_set)} examples)": outcome.history},
    )


def record(run: Prepared, outcome: Outcome, saved: Path | None, command: Sequence[str]) -> dict[str, Any]:
    """The content of result.json."""
    lm = run.language_model
    trainable, total = lm.counts()
    effective = {"lr": run.lr, "eps": run.eps, "form": lm.form, "max_length": run.max_length}
    return {
        "task": run.task.name,
        "before": outcome.before,
        "after": outcome.after,
        "history": outcome.history,
        "interrupted": outcome.interrupted,
        "steps": outcome.steps,
        "skipped_steps": run.stepper.skipped,
        "seconds_per_step": outcome.training_seconds / outcome.steps if outcome.steps else None,
        "training_seconds": outcome.training_seconds,
        "evaluation_seconds": outcome.evaluation_seconds,
        "loading_seconds": run.seconds,
        "peak_memory_bytes": report.peak_memory_bytes(lm.device),
        "weights": {"total": total, "trainable": trainable, "dtype": str(lm.model.dtype)},
        "hyperparameters": {**asdict(run.config), **effective},
        "data": run.origin,
        "saved": str(saved) if saved else None,
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
    output = Path(config.output).expanduser()
    report.check_run_dir(output, config.overwrite)
    run = prepare(config)
    print(run.describe(), file=sys.stderr)
    outcome = fit(run, output)
    saved = run.language_model.save(output) if config.save else None
    draw(run, outcome, output / "curve.png")
    result = record(run, outcome, saved, sys.argv if command is None else command)
    report.write_json(output / "result.json", result)
    if outcome.interrupted:
        print(f"interrupted after {outcome.steps} of {config.steps} steps; what there is was saved in {output}", file=sys.stderr)
    return result
