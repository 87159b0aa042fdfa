"""What batches without padding save a training in the application, beside padded ones.

    python benchmarks/batches.py --model ../shared/models/stories15m --data ../shared/data/sst2 --out benchmarks/results/batches.csv

Belongs here: steps of `zo_finetune.train` on a task's own rows, which have different lengths. Does not belong here: steps on rows of one length (step.py,
frozen.py), steps of earlier commits (against.py).

For each part that is trained a contender for each value of --batches, with its own model and optimizer, trains as a run does, with the hidden states that it
would keep, at lr = 0: all see the same weights, noise and rows. `padded` is what every run did before there was a choice. A round is some steps of each in
turn; times are of a step, `median_s` in the process's CPU time, `wall_` by the clock, and ratios those of padded rows over the contender's, round by round.
`tokens`: of a batch; `packed`: the share of batches that were one sequence. `loss_difference`: the most that a step's loss is from that with padded rows;
`bound`: the most that rounding explains (four times `zo_finetune.cached.bound`) at the weights as they are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from zo_finetune import cached, run, train
from zo_finetune.config import Config
from zo_finetune.load import load
from zo_finetune.packing import pack
from zo_finetune.scoring import Encoded, Scorer

COLUMNS = (
    *("model", "task", "trained", "method", "perturbation", "batch", "threads", "batches", "packed", "tokens", "padding_percent"),
    *("steps", *harness.TIMING_COLUMNS, "wall_median_s", "wall_min_s", "wall_max_s"),
    *("ratio", "ratio_min", "ratio_max", "wall_ratio", "loss_difference", "bound"),
)
TRAINED: dict[str, dict[str, Any]] = {
    "all": {},
    "last block": {"train_blocks": "last:1", "cache": "memory"},
    "lora": {"peft": "lora"},
}


class Rows:
    """The losses of a training."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def write(self, rows: Iterable[Sequence[float]]) -> None:
        self.losses += [row[1] for row in rows]

    def close(self) -> None: ...


class Counting(Scorer):
    """Counts batches, those that are one sequence, their tokens, and those that are no padding."""

    counts = 0, 0, 0, 0

    def packed(self, batch: Any, examples: Sequence[Encoded]) -> Any:
        made = super().packed(batch, examples)
        found = 1, made.line is not None, made.input_ids.numel(), sum(len(tokens) for e in examples for tokens in e.inputs)
        batches, lines, tokens, real = (a + b for a, b in zip(self.counts, found, strict=True))
        self.counts = batches, lines, tokens, real
        return made


class Contender:
    """A training that makes some steps whenever it is asked."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.loaded = load(Config(**options).settled())
        lm = self.loaded.language_model
        self.scorer = Counting(lm.model, lm.form, lm.pad_id)
        self.optimizer, _, _ = run.prepared(self.loaded, self.scorer, resumed=False)
        pack(self.loaded, self.scorer)
        self.rows, self.steps, self.times = Rows(), 0, list[tuple[float, float]]()
        with torch.no_grad():
            log_probs = self.scorer.token_log_probs(self.scorer.collate(self.loaded.train_set[: self.loaded.config.batch_size]))
        self.bound = 4 * cached.bound(lm.model, log_probs)

    def train(self, more: int) -> None:
        self.steps += more
        loaded = replace(self.loaded, config=replace(self.loaded.config, steps=self.steps))
        progress = train.Progress(self.rows, self.steps, self.optimizer, loaded.language_model.device)
        cpu, wall = time.process_time(), time.perf_counter()
        train.train(loaded, self.optimizer, self.scorer, progress, train.Stopwatch(), lambda step: None)
        self.times.append(((time.process_time() - cpu) / more, (time.perf_counter() - wall) / more))


def rows_of(args: argparse.Namespace, trained: str) -> Iterator[dict[str, Any]]:
    common: dict[str, Any] = {
        **{"model": str(args.model), "task": args.task, "data": str(args.data), "output": "none", "device": "cpu", "lr": 0.0},
        **{
            "batch_size": args.batch,
            "perturbation": args.perturbation,
            "method": args.method,
            "steps": args.steps * (args.rounds + 1),
        },
        **{"eval_every": 0, "dev_examples": 0, "eval_examples": 1, **TRAINED[trained]},
    }
    found = {batches: Contender({**common, "batches": batches}) for batches in ("padded", "auto")}
    for number in range(args.rounds + 1):
        for batches in list(found)[:: 1 if number % 2 else -1]:
            found[batches].train(args.steps)
    before = found["padded"]
    for batches, one in found.items():
        cpu, wall = (harness.Timing(tuple(times)) for times in zip(*one.times[1:], strict=True))  # the first round prepares
        ratios, walls = ([a[k] / b[k] for a, b in zip(before.times[1:], one.times[1:], strict=True)] for k in range(2))
        made, in_line, tokens, real = one.scorer.counts
        yield {
            **{"model": args.model.name, "task": args.task, "trained": trained, "method": args.method, "batch": args.batch},
            **{"perturbation": args.perturbation, "threads": torch.get_num_threads(), "batches": batches, "steps": args.steps},
            **{"packed": harness.significant(in_line / made, 3), "tokens": harness.significant(tokens / made, 4)},
            "padding_percent": harness.significant(100 * (1 - real / tokens), 3),
            **cpu.columns(),
            **{f"wall_{name}": value for name, value in wall.columns().items() if name != "rounds"},
            **{"ratio": harness.significant(statistics.median(ratios), 3), "ratio_min": harness.significant(min(ratios), 3)},
            **{"ratio_max": harness.significant(max(ratios), 3), "wall_ratio": harness.significant(statistics.median(walls), 3)},
            "loss_difference": harness.significant(
                max(abs(a - b) for a, b in zip(before.rows.losses, one.rows.losses, strict=True)), 3
            ),
            "bound": harness.significant(one.bound, 3),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trained", nargs="+", default=list(TRAINED)[:2], choices=tuple(TRAINED))
    parser.add_argument("--method", default="mezo")
    parser.add_argument("--perturbation", default="scratch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = harness.Table(args.out, COLUMNS)
    for trained in args.trained:
        for row in rows_of(args, trained):
            table.add(row)
            print(
                f"{trained}, {row['batches']}: {row['padding_percent']} % padding, {row['median_s']} s, {row['ratio']}x", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
