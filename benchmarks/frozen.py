"""What a step costs that begins with kept hidden states, beside one that runs the whole model.

    python benchmarks/frozen.py --model ../shared/models/stories15m --shape gpt2 --out benchmarks/results/frozen.csv

Belongs here: seconds of a step with and without, and how far their losses are apart. Does not belong here: what is learned (docs/learning.md), steps of whole
models (step.py).

For each model the last block, the last quarter of the blocks, and LoRA in the last half are trained, all other weights frozen; the rows of a batch have
random tokens, of whose last one the probability is asked. The two contenders are steps of one optimizer at lr = 0 on one batch, with its states and
without, in turn, in the process's CPU time. `fill_s`: computing the states of that batch. `loss_difference`: of the two losses at the weights as they are;
`bound`: the most that rounding explains (`zo_finetune.cached.bound`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from zo_finetune import adapters, blocks, cached, measure, methods, shapes
from zo_finetune import model as models
from zo_finetune.frozen import Lower, States, cut_of
from zo_finetune.objectives.language_model import LanguageModelling
from zo_finetune.scoring import Encoded, Scorer, Span

COLUMNS = (
    *(
        "model",
        "weights",
        "trained",
        "trained_weights",
        "blocks",
        "blocks_not_run",
        "method",
        "batch",
        "sequence",
        "threads",
        "cache",
    ),
    *(*harness.TIMING_COLUMNS, "ratio", "fill_s", "state_bytes", "loss_difference", "bound"),
)
TRAINED: dict[str, Callable[[int], tuple[str, str]]] = {  # of n blocks: --train-blocks and --peft
    "last block": lambda n: ("last:1", "none"),
    "last quarter": lambda n: (f"last:{max(1, n // 4)}", "none"),
    "lora in the last half": lambda n: (f"last:{max(1, n // 2)}", "lora"),
}


def language_model(request: dict[str, Any], trained: str) -> models.LanguageModel:
    base = measure.build(request)
    part, peft = TRAINED[trained](len(blocks.blocks_of(base.model)[1]))
    base = models.adapt(base, adapters.Adapter(peft), train_blocks=part)
    blocks.train_part(base.model, part, None)
    return base


def examples_of(vocabulary: int, rows: int, length: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, vocabulary, (rows, length), generator=draw).tolist()
    return [Encoded((tuple(row),), (Span(0, (length - 1,), (row[0],)),), 0) for row in tokens]


def measured(request: dict[str, Any], name: str, trained: str, rounds: int) -> Iterator[dict[str, Any]]:
    lm, objective = language_model(request, trained), LanguageModelling()
    rows, length = request["batch_size"], request["length"]
    recipe = methods.get(request["method"]).recipe(lm.peft, {}, 0.0)
    with Scorer(lm.model, lm.form, 0) as scorer, torch.no_grad():
        examples = examples_of(lm.vocabulary, rows, length)
        plain = scorer.collate(examples)
        lower = Lower(lm.model, cut_of(lm.model, lambda: scorer.outputs(plain.input_ids, plain.attention_mask)))
        with lower.recording(stop=False):
            log_probs = scorer.token_log_probs(plain)
        start = time.process_time()
        scorer.states = States(lower)
        cached.fill(scorer, scorer.states, examples, rows)
        fill = time.process_time() - start
        kept = scorer.collate(examples)
        without, with_ = (objective.loss(scorer, batch).item() for batch in (replace(kept, states=None), kept))
        optimizer = recipe.make(lm.model, seed=0)

        def closure(batch: Any) -> Tensor:
            return objective.loss(scorer, batch)

        seconds: dict[str, list[float]] = {"off": [], "memory": []}
        for number in range(rounds + 1):
            for cache in list(seconds)[:: 1 if number % 2 == 0 else -1]:
                start = time.process_time()
                optimizer.step(closure, [kept if cache == "memory" else plain])
                seconds[cache].append(time.process_time() - start)
        timings = {cache: harness.Timing(tuple(values[1:])) for cache, values in seconds.items()}  # the first prepare
        trainable, total = lm.counts()
        for cache, timing in timings.items():
            is_kept = cache == "memory"
            yield {
                **{"model": name, "weights": total, "trained": trained, "trained_weights": trainable, "blocks": lower.total},
                **{"blocks_not_run": lower.cut if is_kept else 0, "method": request["method"], "batch": rows, "sequence": length},
                **{"threads": torch.get_num_threads(), "cache": cache, **timing.columns()},
                "ratio": harness.significant(timings["off"].median / timing.median, 3),
                "fill_s": harness.significant(fill, 3) if is_kept else "",
                "state_bytes": scorer.states.bytes if is_kept else "",
                "loss_difference": harness.significant(abs(with_ - without), 3) if is_kept else "",
                "bound": harness.significant(cached.bound(lm.model, log_probs), 3) if is_kept else "",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a model's folder; repeatable")
    parser.add_argument("--shape", action="append", default=[], choices=tuple(shapes.SHAPES), help="random weights; repeatable")
    parser.add_argument("--method", default="mezo")
    parser.add_argument("--tokens", default="16x32", help="ROWSxLENGTH of a batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    batch, length = map(int, given.tokens.split("x"))
    common = {
        "dtype": "float32",
        "device": "cpu",
        "form": "auto",
        "peft": "none",
        "method": given.method,
        "batch_size": batch,
        "length": length,
    }
    requests = [(Path(path).name, {**common, "model": path, "shape": None}) for path in given.model]
    requests += [(shape, {**common, "model": None, "shape": shapes.get(shape)}) for shape in given.shape]
    if not requests:
        sys.exit("give a --model or a --shape")
    rows = []
    for name, request in requests:
        for trained in TRAINED:
            for row in measured(request, name, trained, given.rounds):
                rows.append(row)
                print(f"{name}, {trained}, {row['cache']}: {row['median_s']} s, {row['ratio']}x", flush=True)
    harness.write_csv(given.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
