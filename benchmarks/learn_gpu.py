"""What does a model learn with forwards alone, against forwards and seconds? SST-2, 40,000 forward passes, by MeZO and by our best.

    python benchmarks/learn_gpu.py --device cuda --limit 480 --out benchmarks/results/learn_gpu.csv      for whoever has a GPU for eight minutes
    python benchmarks/learn_gpu.py --device cpu --quick --out /tmp/learn_gpu.csv                             a few steps, to see that it runs

Belongs here: long runs of few ways, measured along the way. Does not belong here: which method is above which, with intervals (ranking.py).

MeZO takes 20,000 steps of two forwards; the other as many as the same number of forwards pays for. Both train the last block, from hidden states that are
computed once. Accuracy is of all evaluation rows at fixed steps: nothing is chosen by them. The rates are of shorter runs, rounded down, and were not chosen
for this length. A row is written as it is measured; a way whose share of the time is over ends where it is, and its last row says after how many steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from zo_finetune.cached import keep
from zo_finetune.config import Config
from zo_finetune.demo import MODEL, cache_dir
from zo_finetune.evaluate import evaluate
from zo_finetune.load import load
from zo_finetune.train import Progress, Stopwatch, make_optimizer, train

FORWARDS, POINTS = 40_000, 20
MEZO, BEST = "mezo", "fzoo, pairs"
WAYS: dict[str, dict[str, Any]] = {
    MEZO: {"method": "mezo", "objective": "loss"},
    BEST: {"method": "fzoo", "options": {"queries": "8"}, "objective": "pairs"},
}
RATES = {"stories15m": {MEZO: 5e-5, BEST: 4e-6}, "smollm2": {MEZO: 3e-4, BEST: 1e-5}}
FIXED: dict[str, Any] = {
    "task": "sst2", "train_blocks": "last:1", "batch_size": 32, "eps": 1e-3, "lr_schedule": "linear", "train_examples": 8000, "dev_examples": 200,
    "eval_examples": 0, "dtype": "float32", "save": False,
}  # fmt: skip
QUICK = {"batch_size": 4, "train_examples": 12, "dev_examples": 4, "eval_examples": 6}
COLUMNS = (
    *(
        "model",
        "way",
        "objective",
        "lr",
        "batch",
        "seed",
        "step",
        "steps",
        "forwards",
        "frozen_forwards",
        "seconds",
        "accuracy",
        "auc",
    ),
    *("accuracy_at_best_threshold", "loss", "dev_loss", "rows", "ended"),
)


class TimeUpError(Exception):
    """A way has used its share of the time."""


class Clock:
    """Where the rows of a training go: nowhere; each says what time it is."""

    def __init__(self, end: float) -> None:
        self.end, self.losses = end, list[float]()

    def write(self, rows: Iterable[Sequence[float]]) -> None:
        self.losses += (row[1] for row in rows)
        if time.monotonic() > self.end:
            raise TimeUpError

    def close(self) -> None:
        pass


def measure(config: Config, model: str, way: str, end: float, write: Callable[[dict[str, Any]], None]) -> None:
    """Train, and `write` a row at each point, and one where the time is up."""
    loaded = load(config)
    recipe, clock, names = config.recipe(), Stopwatch(), ("accuracy", "auc", "accuracy_at_best_threshold", "loss")
    optimizer = make_optimizer(loaded.language_model, config)
    with loaded.scorer() as scorer:
        cache = keep(loaded, scorer, POINTS + 1)

        def look(step: int, ended: str = "") -> None:
            found = evaluate(loaded.task, scorer, loaded.eval_set, config.eval_batch_size)
            dev = evaluate(loaded.task, scorer, loaded.dev_set, config.eval_batch_size)
            forwards, seconds = recipe.forwards(step), clock.seconds + (0.0 if cache is None else cache["seconds"])
            about = {
                "model": model,
                "way": way,
                "objective": config.objective,
                "lr": recipe.lr,
                "batch": config.batch_size,
                "seed": config.seed,
            }
            cost = {
                "step": step,
                "steps": config.steps,
                "forwards": forwards,
                "frozen_forwards": forwards if cache is None else round(cache["forwards"], 1),
                "seconds": harness.significant(seconds),
            }
            numbers = {**{name: found[name] for name in names}, "dev_loss": dev["loss"]}
            shown = {name: "" if value is None else harness.significant(value) for name, value in numbers.items()}
            write({**about, **cost, **shown, "rows": found["examples"], "ended": ended})

        progress = Progress(Clock(end), config.steps, optimizer, loaded.language_model.device)
        try:
            train(loaded, optimizer, scorer, progress, clock, look)
        except TimeUpError:
            look(optimizer.steps, "time")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stories", type=Path, default=Path("../shared/models/stories15m"), help="(default: %(default)s)")
    parser.add_argument(
        "--smollm2", type=Path, default=cache_dir() / MODEL.name, help="a GGUF file or folder (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"), help="SST-2 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=480.0, metavar="SECONDS", help="of all together (default: %(default)s)")
    parser.add_argument("--forwards", type=int, default=FORWARDS, metavar="N", help="of each way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "learn_gpu.csv")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    begun, folders = time.monotonic(), {"stories15m": options.stories, "smollm2": options.smollm2}
    there = {name: path for name, path in folders.items() if path.exists()}
    for name in folders.keys() - there.keys():
        print(f"{name} is not at {folders[name]}: left out", file=sys.stderr)
    if not there or not options.data.exists():
        print(f"there is no model, or no data at {options.data}", file=sys.stderr)
        return 1
    cells = [(name, way) for name in there for way in WAYS]
    forwards, fixed = (20, FIXED | QUICK) if options.quick else (options.forwards, FIXED)
    count = 0

    def write(row: dict[str, Any]) -> None:
        nonlocal count
        harness.write_csv(options.out, COLUMNS, [row], append=count > 0)
        count += 1

    for k, (name, way) in enumerate(cells):
        config = Config(
            model=str(there[name]),
            data=str(options.data),
            output="",
            device=options.device,
            seed=options.seed,
            lr=RATES[name][way],
            **WAYS[way],
            **fixed,
        )
        steps = config.recipe().steps(forwards)
        now = time.monotonic()
        end = now + (options.limit - (now - begun)) / (len(cells) - k)
        measure(replace(config, steps=steps, eval_every=max(1, steps // POINTS)), name, way, end, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
