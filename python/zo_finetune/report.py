"""What a run says of itself: result.json, the curve, and the lines about what makes its numbers worth less.

Belongs here: from what a run came to, to its words. Does not belong here: the run (run.py), its files (run_folder.py), drawing (figures.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zo_finetune import beside, figures, machine
from zo_finetune.load import Loaded, part_of

# what the figure says of a run in words: keys of evaluations
TOLD = {
    "accuracy": "accuracy",
    "accuracy_at_best_threshold": "at the best threshold",
    "auc": "AUC",
    beside.LOSS: "loss of other texts",
}


@dataclass
class Outcome:
    """What a run came to."""

    before: dict[str, Any]
    after: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # evaluations on the dev examples, with their `step`
    losses: list[float] = field(default_factory=list)
    still: int = 0  # steps whose projected gradient was 0
    steps: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    interrupted: bool = False
    skipped: int = 0
    state_bytes: int = 0
    movement: float = math.nan  # of the last step: how far it moved a weight, root mean square
    kept: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] | None = None  # what is said of hidden states that were kept
    batches: str = "padded"  # or packed


def result_of(loaded: Loaded, outcome: Outcome, command: Sequence[str]) -> dict[str, Any]:
    """The content of result.json before the weights are saved."""
    config, lm, recipe = loaded.config, loaded.language_model, loaded.config.recipe()
    trainable, total = lm.counts()
    effective = {
        "lr": recipe.lr,
        "eps": recipe.eps,
        "objective": loaded.task.objective if config.objective in (None, "loss") else config.objective,
        "form": lm.form,
        "max_length": loaded.max_length,
        "batches": outcome.batches,
        "options": recipe.options,
    }
    return {
        "task": loaded.task.name,
        "metric": loaded.task.metrics[0],
        "before": outcome.before,
        "after": outcome.after,
        "majority": outcome.before.get("majority"),
        "history": outcome.history,
        "kept": outcome.kept,
        "interrupted": outcome.interrupted,
        "steps": outcome.steps,
        "forwards": recipe.forwards(outcome.steps),
        "cache": outcome.cache,
        "skipped_steps": outcome.skipped,
        "zero_gradient_steps": outcome.still,
        "seconds_per_step": outcome.training_seconds / outcome.steps if outcome.steps else None,
        "training_seconds": outcome.training_seconds,
        "evaluation_seconds": outcome.evaluation_seconds,
        "loading_seconds": loaded.seconds,
        "peak_memory_bytes": machine.peak_memory_bytes(lm.device),
        "state_bytes": outcome.state_bytes,
        "last_movement": outcome.movement if math.isfinite(outcome.movement) else None,
        "gradient_bytes": lm.trained_bytes() if recipe.method.first_order else 0,
        "weights": {"total": total, "trainable": trainable, "dtype": str(lm.model.dtype)},
        "dominant_block": None if lm.dominant is None else asdict(lm.dominant),
        "hyperparameters": {**asdict(config), **effective},
        "data": {
            split: {"from": loaded.origin[split], "rows": len(rows)}
            for split, rows in (("train", loaded.train_set), ("dev", loaded.dev_set), ("eval", loaded.eval_set))
        },
        "rows_sha256": loaded.rows_sha256,
        "saved": None,
        "saved_files": [],
        "versions": machine.versions(),
        "machine": machine.machine(lm.device),
        "command": list(command),
    }


def draw(loaded: Loaded, outcome: Outcome, path: Path) -> None:
    """curve.png: the task's first metric and the training loss."""
    ends = [{"step": 0, **outcome.before}]
    if outcome.after:
        ends.append({"step": outcome.kept["step"], **outcome.after})
    what = ", ".join(filter(None, ("" if loaded.config.peft == "none" else loaded.config.peft, part_of(loaded.config))))
    figures.draw_curve(
        path,
        f"{loaded.task.name}, {Path(loaded.config.model).name}: {loaded.config.method}, {what or 'all weights'}",
        loaded.task.metrics[0],
        outcome.losses,
        {f"evaluation ({len(loaded.eval_set)} examples)": ends, f"dev ({len(loaded.dev_set)} examples)": outcome.history},
        told(outcome),
    )


def told(outcome: Outcome) -> str:
    """Before and after in a line."""
    before, after = outcome.before, outcome.after or {}
    pairs = ((name, before.get(key), after.get(key)) for key, name in TOLD.items())
    return ", ".join(f"{name} {a:.3f} → {b:.3f}" for name, a, b in pairs if isinstance(a, float) and isinstance(b, float))


def misgivings(outcome: Outcome, first_order: bool = False) -> list[str]:
    """What makes a run's numbers worth less than they look."""
    lines, steps, skipped = [], outcome.steps, outcome.skipped
    if skipped:
        what, try_ = ("a loss or its gradient", "--lr") if first_order else ("a loss", "--lr or --eps")
        lines.append(
            f"{skipped} of {steps} steps were skipped, since {what} was not finite: try a smaller {try_}, or --dtype float32"
        )
    if first_order and outcome.still:
        lines.append(f"the gradient was 0 in {outcome.still} of {steps} steps, and nothing was learned from them")
    elif outcome.still and 2 * outcome.still >= steps - skipped:
        lines.append(
            f"the projected gradient was 0 in {outcome.still} of {steps} steps: both losses of a step were the same to the bit, and nothing was "
            "learned from it; try a larger --eps, --dtype float32, or, where --objective is a metric, a larger --batch-size"
            + ("; if it was so from some step on, a smaller --lr" if outcome.still + skipped < steps else "")
        )
    return lines
