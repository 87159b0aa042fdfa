"""What rounding does to a run that learns: one run, same noise and same data, with weights of 32 and of 16 bits.

    python benchmarks/fidelity.py --out fidelity.csv              ../shared/models/stories15m on ../shared/data/sst2 if they are there,
                                                                  else a random Llama of 0.5 M weights on synthetic tokens
    python benchmarks/fidelity.py --out fidelity.csv --model DIRECTORY --model-name NAME --text DIRECTORY --text-name NAME

Belongs here: weights and losses of runs with lr > 0, by type, mode and rounding. Does not belong here: lr = 0 (drift.py), time (step.py).

Every run starts from the same weights, which all three types hold exactly (rounded to bf16, then to fp16), and draws the same z.
Modes: `scratch`, `inplace` and `lazy` are our MeZOStep; `public` is the expression of MeZO's public code, p = p + scaling z eps three
times and p = p - lr (g z), in the weight's type, but with our z cast to that type instead of torch's, so that the rounding alone
differs. Losses are fp32 and g is formed as ours is.

The yardstick is the run in fp32 with `scratch`. In the *closed* loop every run computes its own g, with forwards in its own type. In
the *open* loop every run is driven with the yardstick's losses and computes no forward: what differs is rounding alone. A trajectory
in fp32 is never stored but replayed from its coefficients: sequentially it has the bits of the run (the yardstick's own row says 0).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import drift
import harness
import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import parameters

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository, on development machines
MARKS = (1, 10, 25, *range(50, 100_001, 50))  # steps with a row
EVERY = 25  # updates are looked at in every so many steps, and at the marks
LOSSES = 50  # the validation loss of a closed loop is measured so often; every loss at the end
# (type, mode, rounding). fp32 is never rounded to 16 bits.
RUNS = (
    *(("float32", mode, "nearest") for mode in ("scratch", "inplace", "lazy", "public")),
    *(
        (dtype, mode, rounding)
        for dtype in ("float16", "bfloat16")
        for mode, rounding in (
            *(("scratch", "stochastic"), ("scratch", "nearest"), ("inplace", "nearest"), ("inplace", "stochastic")),
            *(("lazy", "nearest"), ("public", "nearest")),
        )
    ),
)
COLUMNS = (
    *("model", "text", "weights", "batch", "sequence", "lr", "eps", "loop", "dtype", "mode", "rounding", "step"),
    *("travelled", "distance", "own_distance", "replay_distance", "replay_rounded_distance"),
    *("update_rms", "vanished_fraction", "realised", "step_error"),
    *("validation_loss", "train_loss", "replay_validation_loss", "replay_rounded_validation_loss"),
)


# ---- the setting: weights, text, noise --------------------------------------------------------------------------------


@dataclass
class Setting:
    """What all runs have in common. `train`, `validation`: int64 [sequences, tokens]."""

    path: str | None
    model: str
    text: str
    train: Tensor
    validation: Tensor
    lr: float
    eps: float
    steps: int
    batch: int
    seed: int
    start: list[Tensor] = field(init=False)  # fp32
    streams: list[int] = field(init=False)
    judge: nn.Module = field(init=False)  # an fp32 model that losses are evaluated with

    def __post_init__(self) -> None:
        self.judge = drift.load(self.path, torch.float32)
        named = [(name, p) for name, p in self.judge.named_parameters() if p.requires_grad]
        # What is left of a bf16 number in fp16 has at most 8 bits too, so that this is exact in all three types.
        self.start = [p.detach().bfloat16().half().float() for _, p in named]
        table = parameters.streams_of([name for name, _ in self.judge.named_parameters()])
        self.streams = [table[name] for name, _ in named]

    def described(self) -> dict[str, Any]:
        """The columns that all rows share."""
        return {
            "model": self.model,
            "text": self.text,
            "weights": sum(s.numel() for s in self.start),
            "batch": self.batch,
            "sequence": self.train.shape[1],
            "lr": self.lr,
            "eps": self.eps,
        }

    def model_of(self, dtype: str) -> tuple[nn.Module, list[Tensor]]:
        """A model of that type at the start, and its weights in the order of `start`."""
        model = drift.load(self.path, harness.DTYPES[dtype])
        params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, s in zip(params, self.start, strict=True):
                p.copy_(s)
        return model, params

    def batch_of(self, step: int) -> Tensor:
        first = step * self.batch % len(self.train)
        return self.train[first : first + self.batch]

    def coefficient(self, difference: float) -> float:
        """That of z in the update, from L(theta + eps z) - L(theta - eps z); a step that is not finite is skipped."""
        return -self.lr * (difference / (2 * self.eps)) if math.isfinite(difference) else 0.0

    def add(self, weights: Sequence[Tensor], terms: Sequence[tuple[int, float]], rounding: str = "nearest") -> None:
        zk.perturb_(weights, terms, seed=self.seed, streams=self.streams, rounding=rounding)

    @torch.no_grad()
    def loss(self, weights: Sequence[Tensor], sequences: Tensor) -> float:
        """The loss of weights of any type, evaluated in fp32 over `sequences`, to six digits."""
        for p, w in zip((p for p in self.judge.parameters() if p.requires_grad), weights, strict=True):
            p.copy_(w)
        total = sum(float(loss_of(self.judge, part)) * len(part) for part in sequences.split(16))
        return harness.significant(total / len(sequences), 6)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The language-model loss, in fp32."""
    return nn.functional.cross_entropy(model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def tokens_of_text(path: str, folder: Path, split: str, sequences: int, length: int) -> Tensor:
    """The first sentences of a split, one after the other, cut into sequences of equal length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids: list[int] = []
    with (folder / f"{split}.jsonl").open() as file:
        for line in file:
            ids += [*([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [])]
            ids += tokenizer(json.loads(line)["sentence"].strip(), add_special_tokens=False).input_ids
            if len(ids) >= sequences * length:
                return torch.tensor(ids[: sequences * length]).view(sequences, length)
    raise SystemExit(f"{split} has {len(ids)} tokens: {sequences} sequences of {length} need more")


def synthetic_tokens(vocabulary: int, seed: int, sequences: int, length: int) -> Tensor:
    """Tokens by Zipf's law, independent of each other: their frequencies can be learnt."""
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, sequences * length, replacement=True, generator=generator).view(sequences, length)


# ---- runs -------------------------------------------------------------------------------------------------------------

Closure = Callable[[], Tensor]


class Ours:
    """MeZOStep in one of its modes."""

    def __init__(self, setting: Setting, dtype: str, mode: str, rounding: str) -> None:
        self.setting, self.mode, self.rounding = setting, mode, rounding
        self.model, self.params = setting.model_of(dtype)
        self.optimizer = zk.MeZOStep(
            self.model,
            lr=setting.lr,
            eps=setting.eps,
            seed=setting.seed,
            perturbation="scratch" if mode == "scratch" else "inplace",
            lazy=mode == "lazy",
            rounding=rounding,
        )

    def step(self, tag: int, closure: Closure) -> None:
        self.optimizer.step(closure)

    def without_update(self, tag: int, before: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        """Where the step would have led at lr = 0, from clean weights `before`, and `second` in memory at the second forward."""
        if self.mode == "scratch":
            return before
        eps = self.setting.eps
        self.setting.add(second, [(tag, eps)] if self.mode == "inplace" else [(tag, eps), (tag + 1, eps)], self.rounding)
        return second

    def clean(self, done: int) -> list[Tensor]:
        """A copy of the weights after `done` steps; of a lazy run what a flush would give, without disturbing it by one."""
        copies = [p.detach().clone() for p in self.params]
        if self.mode == "lazy" and done:
            self.setting.add(copies, [(done, -self.setting.eps)])
        return copies


class Public:
    """MeZO's public code, with our noise."""

    def __init__(self, setting: Setting, dtype: str) -> None:
        self.setting = setting
        self.model, self.params = setting.model_of(dtype)

    def noise(self, tag: int, weights: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(weights, self.setting.streams, strict=True)
        return [zk.normal(p.shape, seed=self.setting.seed, stream=stream, tag=tag, dtype=p.dtype) for p, stream in pairs]

    @torch.no_grad()
    def step(self, tag: int, closure: Closure) -> None:
        eps, lr, noise = self.setting.eps, self.setting.lr, self.noise(tag, self.params)

        def shift(scaling: float) -> None:
            for p, z in zip(self.params, noise, strict=True):
                p.data = p.data + scaling * z * eps

        shift(1)
        plus = float(closure())
        shift(-2)
        minus = float(closure())
        shift(1)
        g = (plus - minus) / (2 * eps)
        for p, z in zip(self.params, noise, strict=True):
            p.data = p.data - lr * (g * z)

    def without_update(self, tag: int, before: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        eps = self.setting.eps
        return [p + 1 * z * eps for p, z in zip(second, self.noise(tag, second), strict=True)]

    def clean(self, done: int) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


# ---- measures ---------------------------------------------------------------------------------------------------------


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b> of one parameter: five digits and more in fp32."""
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def norm(weights: Sequence[Tensor]) -> float:
    return math.sqrt(sum(inner(w, w) for w in weights))


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """||a - b|| of weights of any type."""
    return norm([x.detach().float() - y.detach().float() for x, y in zip(a, b, strict=True)])


@dataclass
class Updates:
    """Sums over the updates of a few steps. u = -lr g z is what an update should add, delta what the whole step added."""

    elements: int = 0
    meant: int = 0
    vanished: int = 0
    along: float = 0.0
    size: float = 0.0
    error: float = 0.0

    def look(self, u: list[Tensor], before: list[Tensor], after: list[Tensor], live: list[Tensor], without: list[Tensor]) -> None:
        """`live`, `without`: the weights as they stand after the step, and as they would at lr = 0."""
        for wanted, b, a, x, y in zip(u, before, after, live, without, strict=True):
            self.elements += wanted.numel()
            self.meant += int((wanted != 0).sum())
            self.vanished += int(((x == y) & (wanted != 0)).sum())
            delta = a.float() - b.float()
            self.along += inner(delta, wanted)
            self.size += inner(wanted, wanted)
            delta -= wanted
            self.error += inner(delta, delta)

    def columns(self) -> dict[str, Any]:
        if not self.size:
            return {"update_rms": 0.0, "vanished_fraction": "", "realised": "", "step_error": ""}
        return {
            "update_rms": harness.significant(math.sqrt(self.size / self.elements)),
            "vanished_fraction": harness.significant(self.vanished / self.meant),
            "realised": harness.significant(self.along / self.size),
            "step_error": harness.significant(math.sqrt(self.error / self.size)),
        }


def measure(
    setting: Setting, dtype: str, mode: str, rounding: str, loop: str, reference: list[float] | None
) -> tuple[list[dict[str, Any]], list[float]]:
    """One run: its rows, and the differences of its losses, one a step. `reference`: those of the yardstick; None: this is it."""
    run = Public(setting, dtype) if mode == "public" else Ours(setting, dtype, mode, rounding)
    differences: list[float] = []
    rows: list[dict[str, Any]] = []
    own = [s.clone() for s in setting.start]  # the fp32 trajectory that this run's coefficients give
    yardstick = own if reference is None or loop == "open" else [s.clone() for s in setting.start]
    updates = Updates()
    described = {**setting.described(), "loop": loop, "dtype": dtype, "mode": mode, "rounding": rounding}
    for tag in range(setting.steps):
        done = tag + 1
        marked = done in MARKS or done == setting.steps
        looked_at = marked or done % EVERY == 0
        before = run.clean(tag) if looked_at else []
        keep = looked_at and mode != "scratch"
        second: list[Tensor] = []
        losses: list[float] = []

        def closure(tag: int = tag, losses: list[float] = losses, second: list[Tensor] = second, keep: bool = keep) -> Tensor:
            if losses and keep:  # not in scratch mode, which would take this for a forward's own way to read the weights
                second += [p.detach().clone() for p in run.params]
            if loop == "open":
                assert reference is not None
                # The difference of the two is the recorded one, exactly.
                loss = torch.tensor(reference[tag] / 2 * (1 if not losses else -1), dtype=torch.float64)
            else:
                loss = loss_of(run.model, setting.batch_of(tag))
            losses.append(float(loss))
            return loss

        run.step(tag, closure)
        differences.append(losses[0] - losses[1])
        coefficient = setting.coefficient(differences[-1])
        setting.add(own, [(tag, coefficient)])
        if yardstick is not own:
            assert reference is not None
            setting.add(yardstick, [(tag, setting.coefficient(reference[tag]))])
        if looked_at:
            u = [torch.zeros_like(s) for s in setting.start]
            setting.add(u, [(tag, coefficient)])
            weights = run.clean(done)
            updates.look(u, before, weights, run.params, run.without_update(tag, before, second))
        if not marked:
            continue
        travelled, own_travelled = distance(yardstick, setting.start), distance(own, setting.start)
        terms = [(k, setting.coefficient(d)) for k, d in enumerate(differences)]
        fused = [s.clone() for s in setting.start]
        rounded = [s.to(harness.DTYPES[dtype], copy=True) for s in setting.start]
        setting.add(fused, terms)
        setting.add(rounded, terms)
        # Along an open loop the losses decide nothing: the end is enough.
        evaluated = done == setting.steps or (loop == "closed" and done % LOSSES == 0)
        row = {
            **described,
            "step": done,
            "travelled": harness.significant(travelled / norm(setting.start)),
            "distance": relative(distance(weights, yardstick), travelled),
            "own_distance": relative(distance(weights, own), own_travelled),
            "replay_distance": relative(distance(fused, own), own_travelled),
            "replay_rounded_distance": relative(distance(rounded, own), own_travelled),
            **updates.columns(),
            **dict.fromkeys(COLUMNS[-4:], ""),
        }
        if evaluated:
            row["validation_loss"] = setting.loss(weights, setting.validation)
        if done == setting.steps:
            row["train_loss"] = setting.loss(weights, setting.train)
            row["replay_validation_loss"] = setting.loss(fused, setting.validation)
            row["replay_rounded_validation_loss"] = setting.loss(rounded, setting.validation)
        rows.append(row)
        updates = Updates()
    last = rows[-1]
    print(
        f"{setting.model} {loop} {dtype} {mode} {rounding}: distance {last['distance']}, vanished {last['vanished_fraction']}, "
        f"validation loss {last['validation_loss']}",
        flush=True,
    )
    return rows, differences


def relative(a: float, b: float) -> float | str:
    """a / b; empty where weights moved although the yardstick stayed."""
    return harness.significant(a / b) if b else "" if a else 0.0


def start_row(setting: Setting) -> dict[str, Any]:
    """Where every run starts."""
    return {
        **dict.fromkeys(COLUMNS, ""),
        **setting.described(),
        "loop": "start",
        "step": 0,
        "validation_loss": setting.loss(setting.start, setting.validation),
        "train_loss": setting.loss(setting.start, setting.train),
    }


def study(setting: Setting, dtypes: Sequence[str], loops: Sequence[str], half: bool) -> Iterator[list[dict[str, Any]]]:
    """The rows of run after run; the yardstick goes first, and its rows are kept if its type and loop are asked for.
    `half`: closed loops in fp16, too, whose forwards take many times as long on most CPUs."""
    rows, reference = measure(setting, *RUNS[0], loop="closed", reference=None)
    yield [start_row(setting), *(rows if RUNS[0][0] in dtypes and "closed" in loops else [])]
    for loop in loops:
        for dtype, mode, rounding in RUNS:
            yardstick = loop == "closed" and (dtype, mode, rounding) == RUNS[0]
            if dtype in dtypes and not yardstick and (loop == "open" or dtype != "float16" or half):
                yield measure(setting, dtype, mode, rounding, loop, reference)[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--append", action="store_true", help="add rows to the file")
    parser.add_argument(
        "--model", help="directory of a transformers model; default: ../shared/models/stories15m, else a random one"
    )
    parser.add_argument("--model-name", help="what the CSV calls it; required with --model, so that no path gets into the results")
    parser.add_argument(
        "--text", help="directory of train.jsonl and validation.jsonl with 'sentence'; default: ../shared/data/sst2"
    )
    parser.add_argument("--text-name", help="what the CSV calls it; required with --text")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=list(harness.DTYPES))
    parser.add_argument("--loops", nargs="+", choices=("closed", "open"), default=["closed", "open"])
    parser.add_argument("--half", action="store_true", help="closed loops in fp16, too: their forwards are slow on most CPUs")
    parser.add_argument("--lr", type=float, help="default: 1e-6; of the random model 2e-5")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=64, help="of training, and as many of validation; a multiple of the batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the random model and few steps, to see that it runs")
    args = parser.parse_args(arguments)
    if (args.model is None) != (args.model_name is None) or (args.text is None) != (args.text_name is None):
        parser.error("--model and --model-name go together, and so do --text and --text-name")
    if args.text and not args.model:
        parser.error("--text needs --model: its tokenizer reads the text")
    if args.steps < 1 or args.batch < 1 or args.sequences % args.batch:
        parser.error(f"--steps {args.steps}, --batch {args.batch}, --sequences {args.sequences}: at least 1, and whole batches")
    if args.quick:
        args.steps, args.sequences, args.sequence, args.half = 3, 2 * args.batch, 8, True
    path, name, text, text_name = args.model, args.model_name, args.text, args.text_name
    if path is None and not args.quick and (SHARED / "models" / "stories15m").is_dir():
        path, name = str(SHARED / "models" / "stories15m"), "stories15m"
    if text is None and path is not None and (SHARED / "data" / "sst2").is_dir():
        text, text_name = str(SHARED / "data" / "sst2"), "sst2"
    name, text_name = name or "random-llama-0.5m", text_name or "synthetic"
    shape = (args.sequences, args.sequence)
    if text is None or path is None:
        vocabulary = drift.load(path, torch.float32).config.vocab_size  # type: ignore[union-attr]
        train, validation = (synthetic_tokens(int(vocabulary), seed, *shape) for seed in (1, 2))  # type: ignore[arg-type]
    else:
        train, validation = (tokens_of_text(path, Path(text), split, *shape) for split in ("train", "validation"))
    print(f"model {name}, text {text_name}", flush=True)
    lr = args.lr if args.lr is not None else (1e-6 if path else 2e-5)
    setting = Setting(path, name, text_name, train, validation, lr, args.eps, args.steps, args.batch, args.seed)
    for number, rows in enumerate(study(setting, args.dtype, args.loops, args.half)):
        harness.write_csv(args.out, COLUMNS, rows, args.append or number > 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
