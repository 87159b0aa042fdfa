"""How noisy is the gradient of a batch, by objective: its variance over its squared mean.

    python benchmarks/noise.py --model ../shared/models/stories15m --sst2 ../shared/data/sst2 --squad ../shared/data/extras/squad_dev1000/all.jsonl \
        --out benchmarks/results/noise.csv

Belongs here: the noise that batches of training rows bring at the weights as they are. Does not belong here: the noise of directions (a method's), what a
run reaches (compare.py).

A projected gradient along z is z . g_b, for the gradient g_b of batch b. Averaged over all z, its variance over the batches is E |g_b - g|^2, and its
squared mean |g|^2: `ratio` is the first over the second, from gradients by backpropagation, which leaves the choice of directions out of it. |g|^2 is the
mean of g_b . g_c over different batches, which has no bias as long as no row comes twice; `ratio_stderr` is the jackknife's, over eighths of the batches.
All queries of a step see one batch: their mean has the noise of directions less often, and this noise as it is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from zo_finetune.blocks import blocks_of
from zo_finetune.config import Config
from zo_finetune.data import Batches
from zo_finetune.load import Loaded, load
from zo_finetune.losses import answer_loss
from zo_finetune.objectives.base import Objective
from zo_finetune.scoring import Batch, Scorer

COLUMNS = (
    *("model", "task", "objective", "balanced", "batch", "trained", "trained_weights", "batches", "seed"),
    *("ratio", "ratio_stderr", "gradient_norm"),
)
PARTS = 8  # of the batches, for the jackknife


class ByAnswer(Objective):
    """-log p, averaged over the tokens of each answer first."""

    gold_only = True

    def loss(self, scorer: Scorer, batch: Batch) -> Tensor:
        return answer_loss(scorer.token_log_probs(batch), batch.present)


@dataclass(frozen=True)
class Setting:
    """`by_answer`: the objective with the mean over each answer first, instead."""

    task: str
    objective: str
    balanced: bool = False
    by_answer: bool = False

    @property
    def title(self) -> str:
        return "language-model, mean of each answer first" if self.by_answer else self.objective


SETTINGS = (
    Setting("sst2", "classification"),
    Setting("sst2", "classification", balanced=True),
    Setting("sst2", "pairs", balanced=True),
    Setting("squad", "language-model"),
    Setting("squad", "language-model", by_answer=True),
)


class Gradients:
    """Of some of the weights: what of the batches' gradients the noise is made of."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums = [[torch.zeros_like(p) for p in parameters] for _ in range(PARTS)]
        self.squares = torch.zeros(PARTS, dtype=torch.float64)
        self.counts = torch.zeros(PARTS, dtype=torch.float64)

    def add(self, number: int) -> None:
        part = number % PARTS
        self.counts[part] += 1
        for total, p in zip(self.sums[part], self.parameters, strict=True):
            if p.grad is not None:
                total += p.grad
                self.squares[part] += p.grad.double().square().sum().item()

    def noise(self) -> tuple[float, float, float]:
        """(ratio, its standard error, |g|)."""
        products = torch.zeros(PARTS, PARTS, dtype=torch.float64)
        for tensors in zip(*self.sums, strict=True):
            flat = torch.stack([t.flatten() for t in tensors])
            products += (flat @ flat.T).double()

        def of(there: Tensor) -> tuple[float, float]:
            n, square = (self.counts * there).sum(), (self.squares * there).sum()
            mean = ((there @ products @ there) - square) / (n * (n - 1))
            return ((square / n - mean) / mean).item(), mean.item()

        ratio, mean = of(torch.ones(PARTS, dtype=torch.float64))
        without = torch.tensor([of(1 - row)[0] for row in torch.eye(PARTS, dtype=torch.float64)])
        error = ((PARTS - 1) / PARTS * (without - without.mean()).square().sum()).sqrt().item()
        return ratio, error, max(mean, 0.0) ** 0.5


def rows(found: Loaded, setting: Setting, batch_size: int, model_name: str) -> list[dict[str, Any]]:
    """A row for all weights and one for the last block."""
    lm = found.language_model
    every = [p for p in lm.model.parameters() if p.requires_grad]
    last = list(blocks_of(lm.model)[1][-1].parameters())
    measured = {"all weights": Gradients(every), "last block": Gradients(last)}
    batches = Batches(found.train_set, batch_size, found.config.seed, found.labels)
    counts = [len(found.train_set)] if found.labels is None else list(Counter(found.labels).values())
    number = min(counts) * len(counts) // batch_size  # so many, and no row twice
    objective = ByAnswer() if setting.by_answer else found.objective
    with found.scorer() as scorer:
        for k in range(number):
            lm.model.zero_grad()
            objective.loss(scorer, objective.batch(scorer, batches[k])).backward()
            for gradients in measured.values():
                gradients.add(k)
    lm.model.zero_grad()
    fixed = {"model": model_name, "task": setting.task, "objective": setting.title, "balanced": int(found.labels is not None)}
    made = []
    for trained, gradients in measured.items():
        ratio, error, norm = map(harness.significant, gradients.noise())
        size = sum(p.numel() for p in gradients.parameters)
        of_batches = {
            "batch": batch_size,
            "trained": trained,
            "trained_weights": size,
            "batches": number,
            "seed": found.config.seed,
        }
        made.append({**fixed, **of_batches, "ratio": ratio, "ratio_stderr": error, "gradient_norm": norm})
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-name", default="stories15m", help="what the CSV calls it (default: %(default)s)")
    parser.add_argument("--sst2", required=True, help="SST-2: a folder, or a file")
    parser.add_argument("--squad", help="a file of SQuAD; without it, SST-2 alone")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "noise.csv")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rows", type=int, default=3200, help="of SST-2; of SQuAD a quarter (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the rows and of the batches (default: 0)")
    options = parser.parse_args(arguments)
    first = True
    for setting, seed in itertools.product(SETTINGS, options.seeds):
        sst2 = setting.task == "sst2"
        if not sst2 and options.squad is None:
            continue
        config = Config(
            model=options.model,
            task=setting.task,
            data=options.sst2 if sst2 else options.squad,
            output="",
            objective=setting.objective,
            balanced=setting.balanced,
            train_examples=options.rows if sst2 else options.rows // 4,
            dev_examples=0,
            eval_examples=1,
            max_length=64 if sst2 else 128,
            seed=seed,
            device="cpu",
        )
        found = load(config)
        for batch_size in options.batches if sst2 else options.batches[:1]:
            harness.write_csv(options.out, COLUMNS, rows(found, setting, batch_size, options.model_name), append=not first)
            first = False
    return 0


if __name__ == "__main__":
    sys.exit(main())
