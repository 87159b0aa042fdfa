"""What training makes of a metric: F1 of free answers by their loss, and accuracy by itself as the objective (MeZO, section 3.3).

    python benchmarks/objectives.py --stories15m ../shared/models/stories15m --winogrande ../shared/data/extras/winogrande_xl/train.jsonl \
        --sst2 ../shared/data/sst2 --out benchmarks/results/objectives.csv

Belongs here: a metric before and after, over seeds, by each objective, with the interval of what was gained, beside answers that need no learning. Does not
belong here: methods beside each other (compare.py), time (step.py). The CSV leaves times out: the runs may share their machine.

The learning rate of each setting is the one of `rates` that the dev rows of the first seed prefer, rows that are neither trained on nor evaluated; steps, batch
and eps are fixed beforehand. The gain of the chosen runs together has an interval over rows and seeds, paired by both with the untrained model.

first-name: a task of free answers that a model of 15 M weights which has read nothing but stories can learn and no constant answer wins: of two people in the
beginning of a WinoGrande sentence it writes down the name of the first. Beside it stands what either of the two names, taken by chance, is worth on the same
rows, and what the answers are worth as the other name.

plain-sentiment: SST-2 with words of a child's story in MeZO's prompt. What is trained is the last norm alone, 288 weights: a batch of 256 rows is then cheap
enough that accuracy, a step function of each row, says something of a direction. Beside it stands the loss as the objective, with as many forwards.

sst2: film reviews by SmolLM2, the demo's model and rows, whose last block is trained. Here zero-shot is far below the best line on its own scores, so that
accuracy has something to find. The same two objectives with as many forwards.
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
import torch
from torch import Tensor
from zo_finetune import outcomes
from zo_finetune.config import Config
from zo_finetune.decoding import Answers
from zo_finetune.demo import MODEL, cache_dir
from zo_finetune.intervals import Interval, Resampling
from zo_finetune.load import read_splits
from zo_finetune.metrics import METRICS
from zo_finetune.metrics.base import Mean
from zo_finetune.metrics.texts import COMPARISONS
from zo_finetune.run import run
from zo_finetune.tasks import TASKS
from zo_finetune.tasks.base import Candidate, Example, Form, Row, Task
from zo_finetune.tasks.sentiment import Sentiment

NAME, LONGEST = re.compile(r"[A-Z][a-z]+"), 60  # characters of a beginning
SEEDS = {"first-name": [0, 1, 2], "plain-sentiment": [11, 12, 13, 14, 15], "sst2": [0, 1, 2, 3, 4]}
COLUMNS = (
    *("model", "task", "metric", "objective", "method", "peft", "batch", "steps", "forwards", "lr", "eps", "seed", "chosen"),
    *("constant", "chance", "threshold", "before", "after", "after_stderr", "gain", "gain_low", "gain_high", "rows", "other_after"),
    *("auc_before", "auc_after", "loss_before", "loss_after", "dev_before", "dev_after", "zero_gradient_steps"),
)  # fmt: skip


def worth(said: str, name: tuple[str, ...]) -> float:
    return COMPARISONS["squad"](said, name)[0]


class OfName(Mean):
    """F1 of a written answer and one of the two names, by its place among the references."""

    place: ClassVar[int]

    def each(self, answers: Answers) -> Tensor:
        pairs = zip(answers.texts, answers.references, strict=True)
        return torch.tensor([worth(text, both[self.place]) for text, both in pairs], dtype=torch.float64)


class OfFirst(OfName):
    name, title, place = "f1-first", "F1 as the first name", 0


class OfOther(OfName):
    name, title, place = "f1-other", "as the other name", 1


class FirstName(Task):
    """A free answer that stands in the text, and is another one in most rows. The first of its references is right, the second the other name."""

    name, summary, fields = "first-name", "the first of two people", ("text", "first", "other")
    objective, decoding = "language-model", "generate"
    metrics: ClassVar = ("f1-first", "f1-other", "loss")

    def example(self, row: Row, form: Form) -> Example:
        name, other = self.text(row, "first"), self.text(row, "other")
        candidate = Candidate(f"{self.text(row, 'text')}...\nThe first name is", f" {name}.\n")
        return Example((candidate,), 0, references=((name,), (other,)))


class PlainSentiment(Sentiment):
    """MeZO's prompt with the words of a child's story."""

    name, summary = "plain-sentiment", "sentiment of a sentence of a film review, in a child's words"
    words = (" bad", " good")


def names(path: Path) -> Iterator[dict[str, str]]:
    """Of WinoGrande's rows the beginning of the sentence, up to its gap, where that is short and has both options, which are names; each beginning once."""
    seen = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text, both = row["sentence"].partition("_")[0].strip(), (row["option1"], row["option2"])
        if len(text) <= LONGEST and text not in seen and all(NAME.fullmatch(one) and one in text for one in both):
            seen.add(text)
            first, other = sorted(both, key=text.find)
            yield {"text": text, "first": first, "other": other}


def without_learning(config: Config) -> tuple[float, float]:
    """What the evaluation rows give to the best answer that is always the same, of those that are right somewhere; and to one of a row's two names, by
    chance."""
    rows = [example.references for example in read_splits(config, config.the_task(), "causal").eval]
    known = {first for first, _ in rows}
    constant = max(sum(worth(" ".join(said), first) for first, _ in rows) for said in known) / len(rows)
    return constant, sum(worth(" ".join(said), both[0]) for both in rows for said in both) / (2 * len(rows))


@dataclass(frozen=True)
class Setting:
    """Runs that differ in rate and seed. `by`: the dev rows' number that chooses the rate; the larger the better where `raised`. `data`: an option of this
    script's, as `model` is."""

    model: str
    data: str
    task: str
    objective: str
    rates: tuple[float, ...]
    by: str
    raised: bool
    sizes: dict[str, Any]


NAMES = {"steps": 400, "batch_size": 8, "eps": 5e-3, "train_examples": 800, "dev_examples": 50, "eval_examples": 200, "peft": "ln"}
SST2 = {
    "steps": 300, "batch_size": 256, "eps": 2.0, "train_examples": 1500, "dev_examples": 300, "eval_examples": 0, "max_length": 64, "balanced": True,
    "peft": "ln", "targets": ["model.norm"],
}  # fmt: skip
REVIEWS = {
    "method": "fzoo", "steps": 50, "batch_size": 64, "eps": 3e-3, "train_examples": 1000, "dev_examples": 300, "eval_examples": 0, "balanced": True,
    "data_seed": 0, "train_blocks": "last:1",
}  # fmt: skip
STORIES, SMOL = "stories15m", "smollm2"
SETTINGS = {
    "f1": Setting(STORIES, "winogrande", "first-name", "loss", (3e-3, 1e-2), "loss", False, NAMES),
    "f1-longer": Setting(STORIES, "winogrande", "first-name", "loss", (3e-3,), "loss", False, NAMES | {"steps": 1600}),
    "accuracy": Setting(STORIES, "sst2", "plain-sentiment", "accuracy", (20.0, 40.0), "accuracy", True, SST2),
    "loss": Setting(STORIES, "sst2", "plain-sentiment", "loss", (10.0, 20.0), "accuracy", True, SST2),
    "reviews-accuracy": Setting(SMOL, "reviews", "sst2", "accuracy", (1.5e-5, 6e-5, 2.4e-4), "accuracy", True, REVIEWS),
    "reviews-loss": Setting(SMOL, "reviews", "sst2", "loss", (1.5e-5, 6e-5, 2.4e-4), "accuracy", True, REVIEWS),
}
QUICK = {"steps": 2, "batch_size": 2, "eval_examples": 4, "dev_examples": 4, "train_examples": 20}


def kept(folder: Path, name: str) -> outcomes.Outcomes:
    found = outcomes.read(folder / name)
    assert found is not None
    return found


def results(setting: Setting, config: Config, seeds: list[int], work: Path) -> list[dict[str, Any]]:
    """A row for each run: the first seed's with every rate, the others' with the chosen one. A run that is finished in `work` is taken as it is."""
    metric, written = TASKS[setting.task].metrics[0], TASKS[setting.task].decoding == "generate"

    def folder(seed: int, lr: float) -> Path:
        return work / f"lr{lr:g}-seed{seed}"

    def one(seed: int, lr: float) -> dict[str, Any]:
        if (finished := folder(seed, lr) / "result.json").exists():
            found: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
            return found
        return run(replace(config, seed=seed, lr=lr, output=str(folder(seed, lr)), overwrite=True))

    def row(seed: int, lr: float, gain: Interval | None, result: dict[str, Any]) -> dict[str, Any]:
        before, after, (first, *_, last) = result["before"], result["after"], result["history"]
        constant, chance = without_learning(replace(config, seed=seed)) if written else (result["majority"], None)
        numbers = {
            "constant": constant,
            "chance": chance,
            "threshold": before.get("accuracy_at_best_threshold"),
            "before": before[metric],
            "after": after[metric],
            "after_stderr": after[f"{metric}_stderr"],
            "gain": None if gain is None else gain.difference,
            "gain_low": None if gain is None else gain.low,
            "gain_high": None if gain is None else gain.high,
            "other_after": after.get("f1-other"),
            **{f"{name}_{when}": of.get(name) for name in ("auc", "loss") for when, of in (("before", before), ("after", after))},
            "dev_before": first[setting.by],
            "dev_after": last[setting.by],
        }
        return {
            **{"model": setting.model, "task": setting.task, "metric": metric, "objective": setting.objective},
            **{"method": config.method, "peft": config.peft, "batch": config.batch_size, "steps": config.steps, "eps": config.eps},
            **{"forwards": result["forwards"], "lr": lr, "seed": seed, "chosen": int(gain is not None), "rows": after["examples"]},
            **{name: "" if value is None else harness.significant(value) for name, value in numbers.items()},
            "zero_gradient_steps": result["zero_gradient_steps"],
        }

    tried = {lr: one(seeds[0], lr) for lr in setting.rates}
    sign = -1 if setting.raised else 1
    ends = {lr: result["history"][-1] for lr, result in tried.items()}
    best = min(tried, key=lambda lr: (sign * ends[lr][setting.by], ends[lr]["loss"]))  # shares of few rows are often the same
    chosen = {seed: one(seed, best) for seed in seeds[1:]}
    runs = {name: [kept(folder(seed, best), name) for seed in seeds] for name in (outcomes.BEFORE, outcomes.AFTER)}
    resampling = Resampling(runs[outcomes.BEFORE])
    before, after = (resampling.sample(metric, runs[name]) for name in (outcomes.BEFORE, outcomes.AFTER))
    gain = resampling.interval(after, before)
    return [
        *(row(seeds[0], lr, gain if lr == best else None, result) for lr, result in tried.items()),
        *(row(seed, best, gain, result) for seed, result in chosen.items()),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{STORIES}", required=True, help="its folder")
    parser.add_argument(f"--{SMOL}", default=str(cache_dir() / MODEL.name), help="its file (default: the demo's)")
    parser.add_argument("--winogrande", type=Path, required=True, help="its train.jsonl: sentence, option1, option2")
    parser.add_argument("--sst2", required=True, help="SST-2: a folder")
    parser.add_argument("--reviews", default=str(cache_dir() / "film_reviews"), help="labelled sentences (default: the demo's)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "objectives.csv")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: three of first-name, five of the others)")
    parser.add_argument("--rates", type=float, nargs="+", help="(default: those of the settings, of which the dev rows choose)")
    parser.add_argument(
        "--work", type=Path, help="where the runs are; those of the same commit that are finished there are not made again"
    )
    parser.add_argument("--append", action="store_true", help="add rows to the file")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    TASKS.update({task.name: task for task in (FirstName(), PlainSentiment())})
    METRICS.update({metric.name: metric for metric in (OfFirst(), OfOther())})
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) if options.work is None else options.work / harness.commit()
        work.mkdir(parents=True, exist_ok=True)
        texts = work / "names.jsonl"
        texts.write_text("".join(json.dumps(row) + "\n" for row in names(options.winogrande)), encoding="utf-8")
        data = vars(options) | {"winogrande": str(texts)}
        for k, name in enumerate(options.settings):
            setting = SETTINGS[name] if options.rates is None else replace(SETTINGS[name], rates=tuple(options.rates))
            sizes = {**setting.sizes, **(QUICK if options.quick else {})}
            config = Config(
                model=vars(options)[setting.model],
                task=setting.task,
                data=data[setting.data],
                output="",
                objective=setting.objective,
                device="cpu",
                save=False,
                eval_every=sizes["steps"],
                **sizes,
            )
            rows = results(setting, config, options.seeds or SEEDS[setting.task], work / name)
            harness.write_csv(options.out, COLUMNS, rows, append=options.append or k > 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
