"""What training makes of a metric: F1 of free answers by their loss, and accuracy by itself as the objective (MeZO, section 3.3).

    python benchmarks/objectives.py --model ../shared/models/stories15m --winogrande ../shared/data/extras/winogrande_xl/train.jsonl \
        --reviews ../shared/data/extras/vader_movie_snippets/train.jsonl --out benchmarks/results/objectives.csv

Belongs here: a metric before and after, over seeds, by each objective, beside the best answer that never varies. Does not belong here: methods beside each
other (compare.py), time (step.py). The CSV leaves times out: the runs may share their machine.

The task of free answers is one that a model of 15 M weights which has read nothing but stories can learn and no constant answer wins: of two people in the
beginning of a WinoGrande sentence it writes down the name of the first. The learning rate of each setting is the one of `rates` that the dev rows
of the first seed prefer, rows that are neither trained on nor evaluated.

The task of accuracy is the sentiment of film reviews by words that this model knows; of its two answers it gives one too often, which training has to mend.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import harness
from zo_finetune.config import Config
from zo_finetune.load import read_splits
from zo_finetune.metrics.texts import COMPARISONS
from zo_finetune.run import run
from zo_finetune.tasks import TASKS
from zo_finetune.tasks.base import Candidate, Example, Form, Row, Task
from zo_finetune.tasks.sentiment import Sentiment

NAME, LONGEST = re.compile(r"[A-Z][a-z]+"), 60  # characters of a beginning
COLUMNS = (
    *("model", "task", "metric", "objective", "method", "peft", "batch", "steps", "lr", "eps", "seed", "chosen"),
    *(
        "constant",
        "before",
        "after",
        "after_stderr",
        "rows",
        "loss_before",
        "loss_after",
        "dev_before",
        "dev_after",
        "zero_gradient_steps",
    ),
)


class FirstName(Task):
    """A free answer that stands in the text, and is another one in most rows."""

    name, summary, fields = "first-name", "the first of two people", ("text", "first")
    objective, decoding = "language-model", "generate"
    metrics: ClassVar = ("f1", "em", "loss")

    def example(self, row: Row, form: Form) -> Example:
        name = self.text(row, "first")
        return Example((Candidate(f"{self.text(row, 'text')}...\nThe first name is", f" {name}.\n"),), 0, references=((name,),))


class FilmReview(Sentiment):
    """MeZO's prompt with the words of a child's story."""

    name, summary = "film-review", "sentiment of a sentence of a film review"
    words = (" bad", " good")


def names(path: Path) -> Iterator[dict[str, str]]:
    """Of WinoGrande's rows the beginning of the sentence, up to its gap, where that is short and has both options, which are names; each beginning once."""
    seen = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text, both = row["sentence"].partition("_")[0].strip(), (row["option1"], row["option2"])
        if len(text) <= LONGEST and text not in seen and all(NAME.fullmatch(one) and one in text for one in both):
            seen.add(text)
            yield {"text": text, "first": min(both, key=text.find)}


def best_constant(config: Config) -> float:
    """The most F1 on the evaluation rows that an answer has which is always the same: any one that is right somewhere."""
    references = [example.references for example in read_splits(config, config.the_task(), "causal").eval]
    known = {accepted for one in references for accepted in one}
    return max(
        sum(max(COMPARISONS["squad"](" ".join(said), accepted)[0] for accepted in one) for one in references) for said in known
    ) / len(references)


@dataclass(frozen=True)
class Setting:
    """Runs that differ in rate and seed. `by`: the dev rows' number that chooses the rate; the larger the better where `raised`."""

    task: str
    objective: str
    rates: tuple[float, ...]
    by: str
    raised: bool
    sizes: dict[str, Any]


SETTINGS = {
    "f1": Setting(
        "first-name",
        "loss",
        (3e-3, 1e-2),
        "loss",
        False,
        {"steps": 400, "batch_size": 8, "eps": 5e-3, "train_examples": 800, "dev_examples": 50, "eval_examples": 200},
    ),
    "accuracy": Setting(
        "film-review",
        "accuracy",
        (1e-2, 3e-2),
        "accuracy",
        True,
        {
            "steps": 50,
            "batch_size": 64,
            "eps": 2e-2,
            "train_examples": 1000,
            "dev_examples": 200,
            "eval_examples": 300,
            "max_length": 32,
        },
    ),
}
QUICK = {"steps": 2, "batch_size": 2, "eval_examples": 4, "dev_examples": 4, "train_examples": 20}


def results(setting: Setting, config: Config, seeds: list[int], model_name: str) -> Iterator[dict[str, Any]]:
    """A row for each run: the first seed's with every rate, the others' with the chosen one."""
    metric = TASKS[setting.task].metrics[0]
    constant: dict[int, float] = {}  # by seed, which draws the rows

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
        still, majority = result["zero_gradient_steps"], result["majority"]
        if seed not in constant:
            constant[seed] = best_constant(replace(config, seed=seed)) if majority is None else majority
        return {
            **fixed,
            **how,
            "lr": lr,
            "seed": seed,
            "chosen": int(chosen),
            "constant": harness.significant(constant[seed]),
            **rounded,
            "rows": after["examples"],
            "zero_gradient_steps": still,
        }

    with tempfile.TemporaryDirectory() as folder:
        tried = {lr: one(seeds[0], lr, f"{folder}/lr{lr:g}") for lr in setting.rates}
        sign = -1 if setting.raised else 1
        ends = {lr: result["history"][-1] for lr, result in tried.items()}
        best = min(tried, key=lambda lr: (sign * ends[lr][setting.by], ends[lr]["loss"]))  # shares of few rows are often the same
        yield from (row(seeds[0], lr, lr == best, result) for lr, result in tried.items())
        for seed in seeds[1:]:
            yield row(seed, best, True, one(seed, best, f"{folder}/seed{seed}"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-name", default="stories15m", help="what the CSV calls it (default: %(default)s)")
    parser.add_argument("--winogrande", type=Path, required=True, help="its train.jsonl: sentence, option1, option2")
    parser.add_argument("--reviews", required=True, help="film reviews: a folder or a file with sentence and label")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "objectives.csv")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--append", action="store_true", help="add rows to the file")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    TASKS.update({"first-name": FirstName(), "film-review": FilmReview()})
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "names.jsonl")
        texts.write_text("".join(json.dumps(row) + "\n" for row in names(options.winogrande)), encoding="utf-8")
        for k, name in enumerate(options.settings):
            setting = SETTINGS[name]
            sizes = {**setting.sizes, **(QUICK if options.quick else {})}
            config = Config(
                model=options.model,
                task=setting.task,
                data=str(texts) if name == "f1" else options.reviews,
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
