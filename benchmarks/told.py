"""What it costs that a step tells its user of what it sees: the first steps of a run with and without it, and later ones.

    python benchmarks/told.py --out told.csv [--model-shape SHAPE] [--rounds N]

Belongs here: the cost of the step's own warnings (zo_kernels/optim/findings.py). Does not belong here: what a step costs (step.py); `zk.check`, which
evaluates the model itself.

A round makes two optimizers of one model at lr = 0, one that tells and one whose `Warner` does nothing, and times their steps in turn, the first one
first in every other round, in the process's CPU time. `told_us` is what the telling one spent in its `Warner`, by a clock around each of its calls: a
better measure than a difference of steps, which vary by milliseconds. `percent` is its median over that of the silent one's steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import step as steps
import torch
from torch import Tensor

from zo_kernels import MeZOStep
from zo_kernels.optim import findings

COLUMNS = (
    "model",
    "weights",
    "tensors",
    "dtype",
    "threads",
    "batch",
    "sequence",
    "mode",
    "step",
    "contender",
    *harness.TIMING_COLUMNS,
)
COLUMNS += ("told_us", "percent")
COUNT = 12  # steps of a run; the first findings.FIRST are looked at closely
NAMES = [*(str(k + 1) for k in range(findings.FIRST)), "later"]


class Silent(findings.Warner):
    """Looks at nothing."""

    def begin(self, step: Any) -> None: ...

    def hearing(self, as_loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        return as_loss

    def note(self, losses: Any, gradient: Any, finite: Any) -> None: ...

    def look(self, step: Any, view: Any) -> list[str]:
        return []


class Timed(findings.Warner):
    """Keeps the seconds that it took."""

    seconds = 0.0

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = function(*arguments)
        self.seconds += time.process_time() - start
        return result

    def begin(self, step: Any) -> None:
        self._timed(super().begin, step)

    def hearing(self, as_loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        heard = self._timed(super().hearing, as_loss)

        def timed(value: Any) -> Tensor:
            start = time.process_time()
            as_loss(value)  # not ours
            alone = time.process_time() - start
            loss: Tensor = self._timed(heard, value)
            self.seconds -= min(alone, self.seconds)
            return loss

        return as_loss if heard is as_loss else timed

    def note(self, losses: Any, gradient: Any, finite: Any) -> None:
        self._timed(super().note, losses, gradient, finite)

    def look(self, step: Any, view: Any) -> list[str]:
        words: list[str] = self._timed(super().look, step, view)
        return words


def run(model: Any, ids: Tensor, mode: str, kind: type[findings.Warner], eps: float) -> list[tuple[float, float]]:
    """(seconds, seconds of the warner) of each step of a run whose warner is of this kind."""
    optimizer = MeZOStep(model, lr=0.0, eps=eps, perturbation=mode)
    warner = optimizer._warner
    warner.__class__ = kind
    found = []
    for _ in range(COUNT):
        before = getattr(warner, "seconds", 0.0)
        start = time.process_time()
        optimizer.step(lambda: model(input_ids=ids, labels=ids).loss.float())
        found.append((time.process_time() - start, getattr(warner, "seconds", 0.0) - before))
    return found


def measure(model: Any, ids: Tensor, mode: str, rounds: int, eps: float) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For each contender, for each name of a step, what `run` says, over all rounds. One round before them is not counted."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {c: {n: [] for n in NAMES} for c in ("silent", "told")}
    for number in range(rounds + 1):
        for contender in ("silent", "told")[:: 1 if number % 2 else -1]:
            taken = run(model, ids, mode, Timed if contender == "told" else Silent, eps)
            if number:
                for k, pair in enumerate(taken):
                    found[contender][NAMES[min(k, findings.FIRST)]].append(pair)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--model-shape", choices=steps.SHAPES, metavar="SHAPE", default="llama-15m")
    parser.add_argument("--tokens", type=steps.read_tokens, default=(16, 32), metavar="BATCHxSEQUENCE")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    batch, sequence = args.tokens
    ids = torch.randint(0, 500, (batch, sequence), generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for dtype in args.dtype:
        model = steps.make_model(args.model_shape, torch.device("cpu"), harness.DTYPES[dtype])
        params = list(model.parameters())
        for mode in ("scratch", "inplace"):
            # An eps at which nothing is told: the words themselves are no part of a sound run.
            found = measure(model, ids, mode, args.rounds, 1e-3 if dtype == "float32" else 0.1)
            for name in NAMES:
                silent = statistics.median(s for s, _ in found["silent"][name])
                for contender, named in found.items():
                    timing = harness.Timing(tuple(s for s, _ in named[name]))
                    told = statistics.median(t for _, t in named[name])
                    rows.append({
                        "model": args.model_shape,
                        "weights": sum(p.numel() for p in params),
                        "tensors": len(params),
                        "dtype": dtype,
                        "threads": torch.get_num_threads(),
                        "batch": batch,
                        "sequence": sequence,
                        "mode": mode,
                        "step": name,
                        "contender": contender,
                        **timing.columns(),
                        "told_us": harness.significant(1e6 * told, 3) if contender == "told" else "",
                        "percent": harness.significant(100 * told / silent, 2) if contender == "told" else "",
                    })  # fmt: skip
                print(
                    f"{dtype} {mode} step {name}: {rows[-1]['told_us']} µs of {silent:.4g} s, {rows[-1]['percent']} %", flush=True
                )
    harness.write_csv(args.out, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
