"""What a step costs that begins with kept hidden states, beside one that runs the whole model.

    python benchmarks/frozen.py --model ../shared/models/stories15m --shape gpt2 --out benchmarks/results/frozen.csv

Belongs here: seconds of a step with and without, and how far their losses are apart. Does not belong here: what is learned (docs/learning.md), steps of whole
models (step.py).

For each model the last block, the last quarter of the blocks, and LoRA in the last half are trained, all other weights frozen; the rows of a batch have
random tokens, behind the last of which one word is set against another. The two contenders are steps of one optimizer at lr = 0 on one batch, with its
states and without, in turn, in the process's CPU time. `fill_s`: computing the states of that batch. `loss_difference`: of the two losses at the
weights as they are; `bound`: the most that rounding explains (`zo_finetune.cached.bound`).

"blocks in turn": all weights are trained, one block in a step. There the states that enter the step's block are kept for the step (cache: "step"); a time is
the mean of the steps of one turn, `blocks_not_run` the mean over them of how many blocks the second forward does not run, and `loss_difference` the most
between the losses of two such steps.
"""

from __future__ import annotations

import argparse
import statistics
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
from zo_finetune.frozen import Lower, States, cut_of, cuts_of
from zo_finetune.objectives.classification import Classification
from zo_finetune.scoring import Encoded, Scorer, Span

import zo_kernels as zk

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
TRAINED: dict[str, Callable[[int], tuple[str | None, str]]] = {  # of n blocks: --train-blocks and --peft
    "last block": lambda n: ("last:1", "none"),
    "last quarter": lambda n: (f"last:{max(1, n // 4)}", "none"),
    "lora in the last half": lambda n: (f"last:{max(1, n // 2)}", "lora"),
    "blocks in turn": lambda n: (None, "none"),
}
IN_TURN = "blocks in turn"


def language_model(request: dict[str, Any], trained: str) -> models.LanguageModel:
    base = measure.build(request)
    part, peft = TRAINED[trained](len(blocks.blocks_of(base.model)[1]))
    base = models.adapt(base, adapters.Adapter(peft), train_blocks=part)
    blocks.train_part(base.model, part, None)
    return base


def examples_of(vocabulary: int, rows: int, length: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, vocabulary, (rows, length), generator=draw).tolist()
    return [Encoded((tuple(row),), tuple(Span(0, (length - 1,), (word,)) for word in (1, 2)), 0) for row in tokens]


def in_turn(request: dict[str, Any], name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of steps that move one block each."""
    lm, objective, losses = language_model(request, IN_TURN), Classification(), dict[str, list[float]]()
    rows, length = request["batch_size"], request["length"]
    with Scorer(lm.model, lm.form, 0) as scorer, torch.no_grad():
        batch = scorer.collate(examples_of(lm.vocabulary, rows, length))
        cuts = cuts_of(lm.model, lambda: scorer.outputs(batch.input_ids, batch.attention_mask))
        below = cached.Below(lm.model, {n: cuts[p] for n, p in lm.model.named_parameters()}, 0)
        log_probs, total = scorer.token_log_probs(batch), len(blocks.blocks_of(lm.model)[1])
        recipe = methods.get("blockwise").recipe(lm.peft, {}, 0.0)
        optimizers = {cache: recipe.make(lm.model, seed=0) for cache in ("off", "step")}
        turn = len(zk.Blocks().split([n for n, _ in lm.model.named_parameters()]))
        seconds: dict[str, list[float]] = {cache: [] for cache in optimizers}
        not_run: list[int] = []

        def closure(batch: Any) -> Tensor:
            return objective.loss(scorer, batch)

        for number in range(rounds + 1):
            for cache in list(optimizers)[:: 1 if number % 2 == 0 else -1]:
                optimizer, found, start = optimizers[cache], list[Tensor](), time.process_time()
                for _ in range(turn):
                    lower = below.lower(optimizer.block()) if cache == "step" else None
                    with scorer.once(lower):
                        found.append(optimizer.step(closure, [batch]))
                    not_run += [0 if lower is None else lower.cut] if cache == "step" else []
                seconds[cache].append((time.process_time() - start) / turn)
                losses[cache] = [loss.item() for loss in found]
        timings = {cache: harness.Timing(tuple(values[1:])) for cache, values in seconds.items()}
        apart = max(abs(a - b) for a, b in zip(losses["off"], losses["step"], strict=True))
        trainable, weights = lm.counts()
        for cache, timing in timings.items():
            kept = cache == "step"
            yield {
                **{"model": name, "weights": weights, "trained": IN_TURN, "trained_weights": trainable, "blocks": total},
                **{"blocks_not_run": harness.significant(statistics.mean(not_run), 3) if kept else 0, "method": "blockwise"},
                **{"batch": rows, "sequence": length, "threads": torch.get_num_threads(), "cache": cache, **timing.columns()},
                "ratio": harness.significant(timings["off"].median / timing.median, 3),
                "fill_s": "",
                "state_bytes": batch.input_ids.numel() * lm.model.config.hidden_size * 4 if kept else "",
                "loss_difference": harness.significant(apart, 3) if kept else "",
                "bound": harness.significant(cached.bound(lm.model, log_probs), 3) if kept else "",
            }


def measured(request: dict[str, Any], name: str, trained: str, rounds: int) -> Iterator[dict[str, Any]]:
    lm, objective = language_model(request, trained), Classification()
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
        scorer.states.narrow = cached.narrowed(lm.model, scorer, kept)
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
    parser.add_argument("--trained", action="append", default=[], choices=tuple(TRAINED), help="repeatable; default: all")
    parser.add_argument("--append", action="store_true", help="to a file that is there")
    parser.add_argument("--method", default="mezo", help="but for blocks in turn (default: %(default)s)")
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
        for trained in given.trained or TRAINED:
            made = in_turn(request, name, given.rounds) if trained == IN_TURN else measured(request, name, trained, given.rounds)
            for row in made:
                rows.append(row)
                print(f"{name}, {trained}, {row['cache']}: {row['median_s']} s, {row['ratio']}x", flush=True)
    harness.write_csv(given.out, COLUMNS, rows, append=given.append)


if __name__ == "__main__":
    main()
