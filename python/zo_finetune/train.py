"""The training of a run: the optimizer, its steps from wherever it stands, and how far they are.

Belongs here: the loop. Does not belong here: how a step perturbs and updates (zo_kernels), what is loaded (load.py), what is evaluated and written
around the loop (run.py).

Dropout is off throughout (eval mode): SPSA's two losses must differ by the perturbation alone, and first-order methods, which are compared with it,
see the same loss.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zo_finetune import console, machine, team, values
from zo_finetune.cached import Below
from zo_finetune.config import SCHEDULES, Config
from zo_finetune.data import Batches
from zo_finetune.errors import UserError, one_line
from zo_finetune.load import Loaded
from zo_finetune.model import LanguageModel
from zo_finetune.pace import Pace
from zo_finetune.scoring import Scorer
from zo_finetune.start import start_of
from zo_kernels import Anchor, InputFactors
from zo_kernels.quantized import trained_weights

GRAPH_WIDTH = 32  # batches that a CUDA graph serves are padded to multiples of so many tokens: a graph for each width


class Optimizer(Protocol):
    """What a run needs of an optimizer; `zo_kernels.ZOStep` is one, and `first_order.FirstOrder`."""

    param_groups: list[dict[str, Any]]
    projected_gradient: Any

    @property
    def steps(self) -> int:
        """Steps done."""
        ...

    @property
    def skipped(self) -> int:
        """Those of them that changed nothing, since a loss was not finite."""
        ...

    def step(self, closure: Callable[..., Any], batches: Sequence[Any]) -> Tensor: ...

    def block(self) -> Sequence[str] | None:
        """The names of the parameters that the next step may change; None: all."""
        ...

    def movement(self) -> float:
        """How far the last step moved a weight, root mean square; NaN where nobody knows."""
        ...

    def state_bytes(self) -> int:
        """What it keeps between steps besides the weights."""
        ...

    def open_journal(self, path: Any, **more: Any) -> Any: ...

    def close_journal(self) -> None: ...


class Rows(Protocol):
    """Where the rows of a training go: step, loss, projected gradient, learning rate, seconds since its start."""

    losses: list[float]

    def write(self, rows: Iterable[Sequence[float]]) -> None: ...

    def close(self) -> None: ...


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

    def __init__(
        self, log: Rows, total: int, optimizer: Optimizer, device: torch.device, every: int = 10, pace: Pace | None = None
    ) -> None:
        self.log, self.optimizer, self.device, self.pace = log, optimizer, device, pace
        self.every = every if device.type == "cuda" else 1
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
        if self.optimizer.skipped and not self.skipped:
            console.say(
                f"step {self.pending[-1][0]} is the first that is skipped: a loss is not finite, or its gradient; the weights stay as they were"
            )
        self.skipped = self.optimizer.skipped
        loss, g = numbers[-1]
        moved = self.optimizer.movement()
        if self.pace is not None and (words := self.pace.saw(moved, self.pending[-1][3])):
            console.say(words)
        memory = machine.peak_memory_bytes(self.device) / 2**30
        skipped = f"{self.skipped} skipped, " if self.skipped else ""
        way = "" if math.isnan(moved) else f"a weight moved by {moved:.2g}, "
        steps = len(self.pending)
        self.pending.clear()
        self.counter.advance(steps, f"{skipped}loss {loss:.3f}, gradient {abs(g):.3g}, {way}peak memory {memory:.2f} GiB")

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.counter.close()
            self.log.close()


def view_options(perturbation: str) -> dict[str, Any]:
    """Of the library's optimizers, for a value of --perturbation."""
    lazy = perturbation == "lazy"
    return {"perturbation": "inplace" if lazy else perturbation, "lazy": lazy}


def make_optimizer(language_model: LanguageModel, config: Config, factors: InputFactors | None = None) -> Optimizer:
    """The step rule of this run, zo_kernels' or torch's; what it refuses is the user's to put right.

    Args:
        factors: of the inputs, for a method that looks at them (inputs.py); without them its steps are dense, which shows whether the rest fits.

    Raises:
        UserError: nothing is trainable, or the method does not fit the model.
    """
    if not trained_weights(language_model.model):
        raise UserError(f"--model {config.model} with --peft {config.peft} has no trainable weights: choose another --peft")
    recipe = config.recipe()
    options: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.clip is not None:
        options["clip"] = config.clip
    if not recipe.method.first_order:
        options |= {
            "seed": config.seed,
            **view_options(config.perturbation),
            "cuda_graph": config.cuda_graph,
            "rounding": config.rounding,
            "backend": config.backend,
            **team.options(config.parallel),
        }
    if recipe.method.looks:
        options["factors"] = factors
    if config.anchor is not None:
        lam, every = values.pull("--anchor", config.anchor)
        options["anchor"] = Anchor(lam, every, start_of(language_model.model, config.model))
    try:
        made: Optimizer = recipe.make(language_model.model, **options)
    except (TypeError, ValueError, RuntimeError) as error:  # its errors name argument, value and remedy
        raise UserError(f"--method {config.method}: {one_line(error)}") from error
    return made


def rate(config: Config, step: int) -> float:
    """What the schedule makes of the learning rate in a step (0: the first), as a factor."""
    return SCHEDULES[config.lr_schedule](step / config.steps)


def scheduled(optimizer: Any, config: Config) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's schedule, at the optimizer's next step."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(config, step))
    if optimizer.steps:
        scheduler.last_epoch = optimizer.steps - 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()
    return scheduler


def pace_of(loaded: Loaded) -> Pace:
    """Of this run, at the weights that it begins with."""
    config, model = loaded.config, loaded.language_model.model
    own = config.peft in ("none", "ln")  # those of an adapter are not the model's, and some begin at 0
    weights = trained_weights(model).values() if own else ()
    lr = config.recipe().lr
    return Pace(weights, (lr * rate(config, step) for step in range(config.steps)))


def eval_every(loaded: Loaded) -> int:
    """Steps between evaluations on the dev examples; 0: none."""
    config = loaded.config
    if not loaded.dev_set:
        return 0
    return max(1, config.steps // 5) if config.eval_every is None else config.eval_every


def train(
    loaded: Loaded, optimizer: Optimizer, scorer: Scorer, progress: Progress, clock: Stopwatch, watch: Callable[[int], None]
) -> None:
    """The steps from the optimizer's to the last.

    Args:
        progress: gets the numbers of each step.
        clock: runs while steps do.
        watch: called with the number of steps done before the first, every `eval_every` steps, and behind the last.

    Raises:
        Whatever ends a step, KeyboardInterrupt too: the optimizer then stands behind the last step that was whole.
    """
    config, every, objective = loaded.config, eval_every(loaded), loaded.objective
    scheduler = scheduled(optimizer, config)
    batches = Batches(loaded.train_set, config.batch_size * config.accumulate, config.seed, loaded.labels)
    width = GRAPH_WIDTH if config.cuda_graph else 1

    with clock:
        below = Below.of(loaded, scorer, optimizer.block())

    def closure(batch: Any) -> Tensor:
        return objective.loss(scorer, batch)

    def watched(step: int) -> None:
        with clock:  # steps that are still in a GPU's queue are waited for here, and are not the evaluation's time
            progress.flush()
        watch(step)

    for step in range(optimizer.steps, config.steps):
        if every and step % every == 0:
            watched(step)
        with clock:
            examples = batches[step]
            parts = [examples[k :: config.accumulate] for k in range(config.accumulate)]
            micro = [scorer.packed(objective.batch(scorer, part, width), part) for part in parts]
            with scorer.once(None if below is None else below.lower(optimizer.block())):
                loss, lr = optimizer.step(closure, micro), optimizer.param_groups[0]["lr"]
            scheduler.step()
            progress.add(step + 1, loss, optimizer.projected_gradient, lr, clock.seconds)
    if every:
        watched(config.steps)
    with clock:
        progress.flush()
