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
from zo_finetune.scoring import Batch, Encoder, Scorer
from zo_finetune.tasks import get_task

# (lr, eps) where the user gives none. none, lora, prefix: MeZO's for OPT (appendix E). ln: found on SmolLM2-135M, see demo.py.
# prompt: as prefix, since both are five tokens' worth of activations.
DEFAULT_LR_EPS = {"none": (1e-6, 1e-3), "lora": (1e-4, 1e-2), "ln": (3e-4, 5e-3), "prefix": (1e-2, 1e-1), "prompt": (1e-2, 1e-1)}

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
            perturbation=config.perturbation,
            rounding=config.rounding,
            backend=config.backend,
            clip=config.clip,
        )
    except (TypeError, ValueError, RuntimeError) as error:  # its errors name argument, value and remedy
        raise UserError(one_line(error)) from error


def train(config: Config, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Run `config` and return what result.json holds.

    Ctrl-C during training ends it: weights, log and curve up to then are saved, `interrupted` is true and `after` is None.

    Raises:
        UserError: something the user can put right; nothing has been written yet.
    """
    config.check()
    output = Path(config.output).expanduser()
    report.check_run_dir(output, config.overwrite)
    task = get_task(config.task)
    default_lr, default_eps = DEFAULT_LR_EPS[config.peft]
    lr = default_lr if config.lr is None else config.lr
    eps = default_eps if config.eps is None else config.eps
    torch.manual_seed(config.seed)  # adapters are initialised at random

    started = time.perf_counter()
    language_model = models.load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        peft=config.peft,
        form=config.form,
        gguf_file=config.gguf_file,
        targets=config.targets,
    )
    if language_model.form not in task.forms:
        raise UserError(f"task {task.name} has no prompt for a {language_model.form} model, only for: {', '.join(task.forms)}")
    splits = load_splits(
        config.data,
        task,
        language_model.form,
        train_examples=config.train_examples,
        dev_examples=config.dev_examples,
        eval_examples=config.eval_examples,
        seed=config.seed,
        config=config.data_config,
        columns=config.columns,
    )
    limit = min(language_model.max_length, config.max_length or language_model.max_length)
    encoder = Encoder(language_model.tokenizer, language_model.form, limit)
    train_set = [encoder.encode(e, gold_only=task.objective == "language-model") for e in splits.train]
    dev_set, eval_set = ([encoder.encode(e) for e in part] for part in (splits.dev, splits.eval))
    batches = Batches(train_set, config.batch_size * config.accumulate, config.seed)
    stepper = make_stepper(language_model, config, lr, eps)
    factor = SCHEDULES[config.lr_schedule]
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: factor(step / config.steps))
    loading_seconds = time.perf_counter() - started

    trainable, total = language_model.counts()
    print(
        f"{config.model}: {total:,} weights, {trainable:,} trained ({config.peft}), {language_model.model.dtype} "
        f"on {language_model.device}; {len(train_set)} training, {len(dev_set)} dev, {len(eval_set)} evaluation examples",
        file=sys.stderr,
    )
    with Scorer(language_model.model, language_model.form, language_model.pad_id) as scorer:

        def measure(examples: list[Any]) -> dict[str, Any]:
            return evaluate(scorer, examples, config.eval_batch_size, task.class_names)

        clock = time.perf_counter()
        before = measure(eval_set)
        evaluation_seconds = time.perf_counter() - clock
        print(f"before: {describe(before)}", file=sys.stderr)
        report.open_run_dir(output)
        eval_every = max(1, config.steps // 5) if config.eval_every is None else config.eval_every
        history: list[dict[str, Any]] = []
        progress = Progress(report.Log(output / "log.csv"), config.steps, language_model.device)
        steps_done, seconds, interrupted = 0, 0.0, False

        def closure(batch: Batch) -> Tensor:
            return scorer.loss(batch, task.objective)

        try:
            for step in range(config.steps):
                if dev_set and eval_every and step % eval_every == 0:
                    clock = time.perf_counter()
                    history.append({"step": step, **measure(dev_set)})
                    evaluation_seconds += time.perf_counter() - clock
                    progress.flush()
                    progress.say(f"step {step}, dev: {describe(history[-1])}")
                clock = time.perf_counter()
                examples = batches[step]
                micro = [scorer.collate(examples[k :: config.accumulate]) for k in range(config.accumulate)]
                with torch.no_grad():
                    loss = stepper.step(closure, micro)
                used_lr = stepper.param_groups[0]["lr"]
                scheduler.step()
                seconds += time.perf_counter() - clock
                steps_done = step + 1
                progress.add(steps_done, loss, stepper.projected_gradient, used_lr, seconds)
            clock = time.perf_counter()
            if language_model.device.type == "cuda":
                torch.cuda.synchronize(language_model.device)  # the last steps may still be in the queue
            seconds += time.perf_counter() - clock
        except KeyboardInterrupt:
            interrupted = True
        finally:
            progress.close()

        after: dict[str, Any] | None = None
        if not interrupted:
            clock = time.perf_counter()
            if dev_set and eval_every:
                history.append({"step": steps_done, **measure(dev_set)})
            after = measure(eval_set)
            evaluation_seconds += time.perf_counter() - clock
            print(f"after:  {describe(after)}", file=sys.stderr)

    saved = str(language_model.save(output)) if config.save else None
    ends = [{"step": 0, **before}] + ([{"step": steps_done, **after}] if after else [])
    report.draw_curve(
        output / "curve.png",
        f"{config.task}, {Path(config.model).name}: MeZO, {'all weights' if config.peft == 'none' else config.peft}",
        progress.log.losses,
        {f"evaluation ({len(eval_set)} examples)": ends, f"dev ({len(dev_set)} examples)": history},
    )
    result = {
        "task": config.task,
        "before": before,
        "after": after,
        "history": history,
        "interrupted": interrupted,
        "steps": steps_done,
        "skipped_steps": int(stepper.skipped),
        "seconds_per_step": seconds / steps_done if steps_done else None,
        "training_seconds": seconds,
        "evaluation_seconds": evaluation_seconds,
        "loading_seconds": loading_seconds,
        "total_seconds": time.perf_counter() - started,
        "peak_memory_bytes": report.peak_memory_bytes(language_model.device),
        "weights": {"total": total, "trainable": trainable, "dtype": str(language_model.model.dtype)},
        "hyperparameters": {**asdict(config), "lr": lr, "eps": eps, "form": language_model.form, "max_length": limit},
        "data": splits.origin,
        "saved": saved,
        "versions": report.versions(),
        "machine": report.machine(language_model.device),
        "command": list(sys.argv if command is None else command),
    }
    report.write_json(output / "result.json", result)
    if interrupted:
        print(f"interrupted after {steps_done} of {config.steps} steps; what there is was saved in {output}", file=sys.stderr)
    return result
