"""What training makes of a metric: F1 of free answers by their loss, and accuracy by itself as the objective (MeZO, section 3.3).

    python benchmarks/objectives.py --model ../shared/models/stories15m --squad ../shared/data/extras/squad_dev1000/all.jsonl \
        --sst2 ../shared/data/sst2 --out benchmarks/results/objectives.csv

Belongs here: a metric before and after, over seeds, by each objective. Does not belong here: methods beside each other (compare.py), time (step.py). The CSV
leaves times out: the runs may share their machine.

The task of free answers is one that a model of 15 M weights which has read nothing but stories can learn: from a question of SQuAD the word that asks. The
learning rate of each setting is the one of `rates` with the lowest objective on the dev rows of the first seed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import harness
from zo_finetune.config import Config
from zo_finetune.run import run
from zo_finetune.tasks import TASKS
from zo_finetune.tasks.base import Candidate, Example, Form, Row, Task

ASKING = re.compile(r"\b(?:what|who|how|when|where|which|why|whose|whom)\b", re.IGNORECASE)
COLUMNS = (
    *("model", "task", "metric", "objective", "method", "peft", "batch", "steps", "lr", "eps", "seed", "chosen"),
    *("before", "after", "after_stderr", "rows", "loss_before", "loss_after", "dev_before", "dev_after", "zero_gradient_steps"),
)


class QuestionWord(Task):
    """A free answer that stands in the text."""

    name, summary, fields = "question-word", "the word of a question that asks", ("question",)
    objective, decoding = "language-model", "generate"
    metrics: ClassVar = ("f1", "em", "loss")

    def example(self, row: Row, form: Form) -> Example:
        question = self.text(row, "question")
        found = ASKING.search(question)
        answer = found[0] if found else question.split()[0]
        return Example((Candidate(f"{question}\nIt asks:", f" {answer}\n"),), 0, references=((answer,),))


@dataclass(frozen=True)
class Setting:
    """Runs that differ in rate and seed. `by`: the dev rows' number that chooses the rate; the larger the better where `raised`."""

    task: str
    objective: str
    rates: tuple[float, ...]
    by: str
    raised: bool
    sizes: dict[str, Any]


LONG, SHORT = {"eval_examples": 100, "max_length": 100}, {"eval_examples": 300, "max_length": 32}
SETTINGS = {
    "f1": Setting("question-word", "loss", (3e-3, 1e-2), "loss", False, {"steps": 200, "batch_size": 8, "eps": 5e-3, **LONG}),
    "accuracy": Setting("sst2", "accuracy", (3e-3, 1e-2), "accuracy", True, {"steps": 60, "batch_size": 16, "eps": 2e-2, **SHORT}),
}
QUICK = {"steps": 2, "batch_size": 2, "eval_examples": 4, "dev_examples": 4, "train_examples": 20}


def results(setting: Setting, config: Config, seeds: list[int], model_name: str) -> Iterator[dict[str, Any]]:
    """A row for each run: the first seed's with every rate, the others' with the chosen one."""
    metric = TASKS[setting.task].metrics[0]

    def one(seed: int, lr: float, folder: str) -> dict[str, Any]:
        return run(replace(config, seed=seed, lr=lr, output=folder))

    def row(seed: int, lr: float, chosen: bool, result: dict[str, Any]) -> dict[str, Any]:
        before, after, (first, *_, last) = result["before"], result["after"], result["history"]
        numbers = {"before": before[metric], "after": after[metric], "after_stderr": after[f"{metric}_stderr"]}
        losses = {"loss_before": before["loss"], "loss_after": after["loss"]}
        dev = {"dev_before": first[setting.by], "dev_after": last[setting.by]}
        fixed = {"model": model_name, "task": setting.task, "metric": metric, "objective": setting.objective}
        how = {"method": config.method, "peft": config.peft, "batch": config.batch_size, "steps": config.steps, "eps": config.eps}
        rounded = {name: harness.significant(value) for name, value in {**numbers, **losses, **dev}.items()}
        still = result["zero_gradient_steps"]
        return {
            **fixed,
            **how,
            "lr": lr,
            "seed": seed,
            "chosen": int(chosen),
            **rounded,
            "rows": after["examples"],
            "zero_gradient_steps": still,
        }

    with tempfile.TemporaryDirectory() as folder:
        tried = {lr: one(seeds[0], lr, f"{folder}/lr{lr:g}") for lr in setting.rates}
        sign = -1 if setting.raised else 1
        best = min(tried, key=lambda lr: sign * tried[lr]["history"][-1][setting.by])
        yield from (row(seeds[0], lr, lr == best, result) for lr, result in tried.items())
        for seed in seeds[1:]:
            yield row(seed, best, True, one(seed, best, f"{folder}/seed{seed}"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-name", default="stories15m", help="what the CSV calls it (default: %(default)s)")
    parser.add_argument("--squad", required=True, help="a file with the column question")
    parser.add_argument("--sst2", required=True, help="SST-2: a folder, or a file")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "objectives.csv")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--append", action="store_true", help="add rows to the file")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    TASKS["question-word"] = QuestionWord()
    for k, name in enumerate(options.settings):
        setting = SETTINGS[name]
        sizes = {"train_examples": 800, "dev_examples": 50, **setting.sizes, **(QUICK if options.quick else {})}
        config = Config(
            model=options.model,
            task=setting.task,
            data=options.squad if name == "f1" else options.sst2,
            output="",
            peft="ln",
            objective=setting.objective,
            device="cpu",
            save=False,
            eval_every=sizes["steps"],
            **sizes,
        )
        rows = list(results(setting, config, options.seeds, options.model_name))
        harness.write_csv(options.out, COLUMNS, rows, append=options.append or k > 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
