"""Every figure in README and docs beside what it comes from: a row of a CSV file, a test that asserts it, a line of code, or a paper.

    python benchmarks/claims.py            print the list; exit with 1 if a figure has no source, or is not what its source says
    python benchmarks/claims.py --write    put the rows' figures into the pages first, after new measurements

Belongs here: the sentences that hold figures. Does not belong here: the tables that tables.py writes, which are rows themselves.

A figure is a number with a unit (percent, times, seconds, bytes, instructions, ...) or with a decimal point, outside code, links and written tables.
In a claim's text a slot `{...}` stands for a figure of its rows; spaces stand for any white space.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from scipy.special import stdtrit

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
UNITS = (
    r"%|× (?!\d)|times\b|µs\b|us\b|ms\b|s\b|seconds?\b|minutes?\b|GB/s|TB\b|GB\b|MB\b|GiB\b|MiB\b|bytes?\b|instructions?\b|weights/s|terms/s"
    r"|element-\w+/s|runs\b|inputs\b|mutants\b|passed\b|kills\b|deaths\b"
)
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:·10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+|e-?\d+)?"
FIGURE = re.compile(rf"(?<![\w.^/×§-])(?:{NUMBER}\s?(?:{UNITS})|\d+\.\d+(?:e-?\d+)?)(?![\w.]*\d)")
SLOT = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True)
class Claim:
    """`text` stands in `page`. Its figures are `rows`, one for each slot, or, if there are no slots, come from `source`."""

    page: str
    text: str
    source: str  # "results/FILE.csv: what", "tests/PATH::NAME", "PATH: LITERAL", "paper: ...", "definition: ..."
    rows: Callable[[], Sequence[float]] | None = None

    def pattern(self) -> re.Pattern[str]:
        """The text as it may stand in the page, a group for each slot."""
        parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in SLOT.split(self.text)]
        return re.compile(rf"({NUMBER})".join(parts))

    def shown(self) -> list[str]:
        """The figures as the page should have them."""
        values = list(self.rows()) if self.rows else []
        slots = SLOT.findall(self.text)
        if len(values) != len(slots):
            raise ValueError(f"{len(slots)} slots and {len(values)} values in {self.text!r}")
        return [slot.format(value) for slot, value in zip(slots, values, strict=True)]

    def fault(self) -> str | None:
        """What is wrong with the source, if anything."""
        kind, _, rest = self.source.partition(": ")
        if kind in ("paper", "definition"):
            return None if rest else "names nothing"
        path, _, test = kind.partition("::")
        if not (ROOT / path).is_file():
            return f"there is no {path}"
        text = (ROOT / path).read_text()
        if test and not re.search(rf"^\s*def {re.escape(test)}\(", text, re.MULTILINE):
            return f"{path} has no test {test}"
        if not path.endswith(".csv") and not test and (not rest or rest not in text):
            return f"{path} does not hold {rest!r}"
        return None


def prose(text: str) -> str:
    """The page with everything blanked that holds no figures of ours: code, written tables, addresses of links. Places stay."""
    for pattern in (
        r"<!-- table \w+ -->.*?<!-- end -->", r"^```.*?^```", r"^ {4}\S.*?$", r"`[^`\n]*`", r"\]\([^)\n]*\)", r"arXiv \d+\.\d+", r"\d{4}\.\d{5}",
        r"(?:torch|triton|Python|cuda|numpy|transformers|peft)[ >=]*\d[\d.+a-z]*",
    ):  # fmt: skip
        text = re.sub(pattern, lambda m: re.sub(r"\S", " ", m[0]), text, flags=re.MULTILINE | re.DOTALL)
    return text


# ---- rows --------------------------------------------------------------------------------------------------------------


def row(results: str, **where: Any) -> dict[str, str]:
    """The one row of a file with these values; the last where a run has several steps."""
    found = [r for r in harness.read_csv(harness.RESULTS / f"{results}.csv") if all(r[k] == str(v) for k, v in where.items())]
    if not found:
        raise LookupError(f"{results}.csv has no row with {where}")
    return found[-1]


def number(results: str, column: str, **where: Any) -> float:
    return float(row(results, **where)[column])


def rows_of(results: str, **where: Any) -> Iterator[dict[str, str]]:
    yield from (r for r in harness.read_csv(harness.RESULTS / f"{results}.csv") if all(r[k] == str(v) for k, v in where.items()))


def best_pass(column: str, dtype: str = "float32", threads: int = 1) -> float:
    """Of the plain pass by the best instruction set."""
    mine = [
        r for r in rows_of("cpu_pass", dtype=dtype, threads=threads) if r["contender"].removeprefix("zo_kernels ") == r["isa"] != ""
    ]
    return float(mine[-1][column])


def strongest(dtype: str = "float32", threads: int = 1) -> float:
    """10^9 weights a second of the fastest of torch's ways."""
    ours = ("zo_kernels", "copy", "rewrite")
    return max(
        float(r["gweights_per_s"]) for r in rows_of("cpu_pass", dtype=dtype, threads=threads) if not r["contender"].startswith(ours)
    )


def overhead(results: str, mode: str, **where: Any) -> float:
    return number(results, "overhead_percent", mode=mode, **where)


def fidelity(column: str, loop: str, dtype: str, mode: str, rounding: str = "nearest", lr: str = "1e-06") -> float:
    return number("fidelity", column, loop=loop, dtype=dtype, mode=mode, rounding=rounding, lr=lr)


def names(column: str) -> list[float]:
    """Of the runs that write names, with the rate that was chosen."""
    return [float(r[column]) for r in rows_of("objectives", task="first-name", chosen="1")]


def sst2(column: str, objective: str = "accuracy") -> list[float]:
    """Of the runs on SST-2 with a child's words, by seed."""
    return [float(r[column]) for r in rows_of("objectives", task="plain-sentiment", objective=objective, chosen="1")]


def held_out() -> list[float]:
    """Mean gain of the seeds' own dev rows, which are different ones, and its 95 % interval by Student's t."""
    gains = [after - before for before, after in zip(sst2("dev_before"), sst2("dev_after"), strict=True)]
    mean, half = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains)) * float(stdtrit(len(gains) - 1, 0.975))
    return [mean, mean - half, mean + half]


# ---- the claims --------------------------------------------------------------------------------------------------------

CLAIMS: list[Claim] = []


def claim(page: str, text: str, source: str, rows: Callable[[], Sequence[float]] | None = None) -> None:
    CLAIMS.append(Claim(page, text, source, rows))


F = "benchmarks/results/fidelity.csv: the last step of each run"

# README


def ranked(column: str, **where: str) -> float:
    """Of the larger model's runs."""
    return number("ranking", column, model="smollm2", **where)


OUR_BEST, TASKS = {"method": "fzoo", "objective": "pairs"}, ("film_reviews", "sst2", "sst5")
claim("README.md", "SmolLM2-135M's last block, five seeds, 800 unseen rows", "benchmarks/ranking.py: LARGE")
claim(
    "README.md",
    "AUC of film reviews {:.3f}, SST-2 {:.3f}, SST-5 {:.3f} (MeZO with {:,.0f}, the best of three rates)",
    "benchmarks/results/ranking.csv: mezo",
    lambda: [*(ranked("auc", data=data, method="mezo") for data in TASKS), ranked("budget", data="sst2", method="mezo")],
)
claim(
    "README.md",
    "{:.3f}, {:.3f}, {:.3f} (`fzoo` with `--objective pairs`, {:.0f}; 95 % of the differences {:.3f} to {:.3f}, {:.3f} to {:.3f}, {:.3f} to {:.3f})",
    "benchmarks/results/ranking.csv: fzoo, pairs",
    lambda: [
        *(ranked("auc", data=data, **OUR_BEST) for data in TASKS),
        ranked("forwards", data="sst2", **OUR_BEST),
        *(ranked(f"auc_{end}", data=data, **OUR_BEST) for data in TASKS for end in ("low", "high")),
    ],
)
claim("README.md", "python3 (3.11 or newer)", 'pyproject.toml: requires-python = ">=3.11"')
claim("README.md", "A run is a journal of 28 bytes a step.", "tests/test_benchmarks.py::test_journal: record_bytes")
claim(
    "README.md",
    "moved by {:.1f} % of their norm in 100 steps (stories15m), by {:.0f} % in 2,000 (a random Llama of {:.1f} M weights)",
    "benchmarks/results/drift.csv: public, bfloat16",
    lambda: [
        100 * number("drift", "relative_drift", model="stories15m", dtype="bfloat16", mode="public", step=100),
        100 * number("drift", "relative_drift", model="random-llama-0.5m", dtype="bfloat16", mode="public", step=2000),
        number("drift", "weights", model="random-llama-0.5m", dtype="bfloat16", mode="public", step=2000) / 1e6,
    ],
)
H100 = {"weights": 1 << 27, "dtype": "float16", "feature": "K=1"}
claim(
    "README.md",
    "{:.2f} ms (`randn_like` + `add_`; MeZO's expression {:.2f}) | {:.2f} ms, {:.0f} % of a copy",
    "benchmarks/results/gpu_pass.csv: 2^27 weights, float16, K=1",
    lambda: [
        *(1e3 * number("gpu_pass", "median_s", contender=c, **H100) for c in ("randn_like + add_", "mezo", "cuda")),
        number("gpu_pass", "percent_of_copy", contender="cuda", **H100),
    ],
)
claim(
    "README.md",
    "{:.2f}·10⁹ weights/s (MeZO's expression {:.2f}) | {:.1f}·10⁹, {:.1f} times; {:.0f} % of a rewrite",
    "benchmarks/results/cpu_pass.csv: float32, 1 thread, the best instruction set beside the fastest of torch's ways",
    lambda: [
        strongest(),
        number("cpu_pass", "gweights_per_s", contender="mezo", dtype="float32", threads=1),
        best_pass("gweights_per_s"),
        best_pass("ratio_to_strongest"),
        best_pass("percent_of_rewrite"),
    ],
)


def overheads(sequence: int) -> list[float]:
    both = [{"model": "llama-110m", "dtype": dtype, "sequence": sequence} for dtype in ("float32", "bfloat16")]
    return [
        *(overhead("step", "mezo", **where) for where in both),
        *(overhead("step", mode, **where) for where in both for mode in ("lazy", "inplace", "scratch")),
        *(overhead("step", "rewrite", **where) for where in both),
    ]


for what, sequence in (("16×32 tokens, two CPU cores with AMX", 32), ("the same, 16×128 tokens", 128)):
    claim(
        "README.md",
        what + " | MeZO's loop: fp32 +{:.0f} %, bf16 +{:.0f} % | lazy, in place, scratch: fp32 +{:.1f}, +{:.1f}, +{:.1f} %, "
        "bf16 +{:.1f}, +{:.1f}, +{:.1f} % | one rewrite: fp32 +{:.1f} %, bf16 +{:.1f} %",
        f"benchmarks/results/step.csv: llama-110m, {sequence} tokens a row",
        lambda sequence=sequence: overheads(sequence),  # type: ignore[misc]
    )
claim(
    "README.md",
    "16×32 tokens +{:.0f} %, 16×400 +{:.0f} % (MeZO's loop) | 16×32 +{:.0f} % in place, +{:.0f} % scratch; "
    "16×400 +{:.0f} % in place, +{:.0f} % scratch",
    "benchmarks/results/gpu_step.csv: opt-1.3b, float16",
    lambda: [
        overhead("gpu_step", mode, model="opt-1.3b", sequence=s)
        for mode, s in (("mezo", 32), ("mezo", 400), ("inplace", 32), ("scratch", 32), ("inplace", 400), ("scratch", 400))
    ],
)
claim(
    "README.md",
    "one, at {:.1f}·10¹² element-directions/s",
    "benchmarks/results/gpu_pass.csv: cuda, K=64, float16",
    lambda: [number("gpu_pass", "gterms_per_s", contender="cuda", feature="K=64", dtype="float16", weights=1 << 27) / 1e3],
)
claim("README.md", "compute capability 8.0 and newer", 'setup.py: archs = ["80", ')

# docs/algorithms.md
A, L = "docs/algorithms.md", "docs/learning.md"
claim(
    A,
    "of momentum β^history is left out (at {:.1f} and 32 steps {:.0f} %)",
    "definition: beta^history",
    lambda: [0.9, 100 * 0.9**32],
)
claim(A, "β 0.9 | ZO-LLM's public sweep", "zo_kernels/optim/rules.py: beta: float = 0.9")
claim(A, "quantile 0.25 | sparsity 75 % of Sparse-MeZO", "paper: Sparse-MeZO, arXiv 2402.15751, sparsity 0.75")
claim(A, "keep 0.1 | ZO-LLM's public sweep (sparsity 0.1 to 0.9)", "paper: ZO-LLM benchmark, arXiv 2402.11592, its public sweep")
claim(A, "inner eps 0.1, τ 0.2", "zo_kernels/optim/projection.py: tau: float = 0.2")
claim(
    A,
    "at L = 0.7 and ε = 1e-3 g comes in steps of {:.2f} (fp16) or {:.2f} (bf16)",
    "tests/optim/test_defects.py::test_losses_are_not_quantised: spacing of 16-bit numbers at 0.7 over 2 eps",
    lambda: [2**-11 / 2e-3, 2**-8 / 2e-3],
)
claim(
    A,
    'a mask of "10 %" removes {:.0f} %',
    "definition: Phi(0.1), the share of normal draws below 0.1",
    lambda: [50 * (1 + math.erf(0.1 / math.sqrt(2)))],
)
claim(
    A,
    "An accuracy on 300 examples has a standard error of {:.3f}",
    "benchmarks/results/compare.csv: mezo, ln, seed 0",
    lambda: [number("compare", "accuracy_stderr", method="mezo", peft="ln", seed=0)],
)


def _losses(method: str) -> list[float]:
    return [number("compare", "loss", method=method, peft="ln", seed=seed) for seed in range(3)]


def _loss_before() -> float:
    found = [number("compare", "loss_before", method="mezo", peft="ln", seed=seed) for seed in range(3)]
    return statistics.stdev(found)


claim(
    A,
    "the loss before training has a deviation of {:.3f}",
    "benchmarks/results/compare.csv: loss_before, three seeds",
    lambda: [_loss_before()],
)
claim(
    A,
    "`sparse` ends below `mezo` in loss with all three seeds, by {:.3f} to {:.3f}",
    "benchmarks/results/compare.csv: loss, ln",
    lambda: [f(m - s for m, s in zip(_losses("mezo"), _losses("sparse"), strict=True)) for f in (min, max)],
)

# docs/options.md
claim("docs/options.md", "| number, at least 0 | 0.02 | of --objective pairs", "python/zo_finetune/losses.py: CENTRE = 0.02")

# docs/benchmarks.md
B = "docs/benchmarks.md"
claim(B, "that a step of 388 tensors takes at most 1,200 µs beside its", "definition: an aim, not a measurement")
claim(B, "one of the model of hidden 64 at most 18 % more than two bare forwards", "definition: an aim, not a measurement")
claim(
    B,
    "a randomly initialised Llama ({:.1f} M weights, standard deviation 0.02)",
    "benchmarks/results/drift.csv: weights",
    lambda: [number("drift", "weights", model="random-llama-0.5m", dtype="bfloat16", mode="public", step=1) / 1e6],
)
claim(
    B,
    "as the general kernel that reached {:.0f} % in the same run",
    "benchmarks/results/gpu_pass.csv: cuda, decay, float32",
    lambda: [number("gpu_pass", "percent_of_copy", contender="cuda", feature="decay", dtype="float32", weights=1 << 27)],
)
claim(B, "the bound to be shown is 64 MiB over inference", "tests/optim/test_gpu.py: 64")


def _kept(model: str, trained: str) -> float:
    return number("frozen", "ratio", model=model, trained=trained, cache="memory")


claim(
    "docs/learning.md",
    "a step took {:.1f} times less for stories15m's last block, {:.1f} times for its last quarter, and {:.1f} times for LoRA in its last\nhalf",
    "benchmarks/results/frozen.csv: ratio",
    lambda: [_kept("stories15m", trained) for trained in ("last block", "last quarter", "lora in the last half")],
)
claim(
    "docs/learning.md",
    "For GPT-2's shape it took {:.1f} times less for the last block, {:.1f} times for the last quarter, and {:.1f} times for LoRA in the last half",
    "benchmarks/results/frozen.csv: ratio",
    lambda: [_kept("gpt2", trained) for trained in ("last block", "last quarter", "lora in the last half")],
)
claim(
    "docs/learning.md",
    "of all of stories15m's weights, took {:.1f}\ntimes less",
    "benchmarks/results/frozen.csv: ratio",
    lambda: [number("frozen", "ratio", model="stories15m", trained="blocks in turn", cache="step")],
)


def _batches(trained: str, *columns: str, batches: str = "auto") -> list[float]:
    return [number("batches", column, trained=trained, batches=batches) for column in columns]


claim(
    "docs/learning.md",
    "{:.1f} % of the tokens were padding, and then none; behind kept hidden states, where a few batches are not worth it, {:.1f} %.",
    "benchmarks/results/batches.csv: padding_percent",
    lambda: [*_batches("all", "padding_percent", batches="padded"), *_batches("last block", "padding_percent")],
)
claim(
    "docs/learning.md",
    "a step of all weights took {:.2f} times less ({:.2f} to {:.2f} over the rounds), one of the last block behind kept states {:.2f} times "
    "({:.2f} to {:.2f}): there",
    "benchmarks/results/batches.csv: ratio",
    lambda: [value for trained in ("all", "last block") for value in _batches(trained, "ratio", "ratio_min", "ratio_max")],
)
claim(
    "docs/learning.md",
    "it was {:.2f} and {:.2f} times (",
    "benchmarks/results/batches.csv: wall_ratio",
    lambda: [value for trained in ("all", "last block") for value in _batches(trained, "wall_ratio")],
)
claim(
    "docs/learning.md",
    "were within {:.0f}e-7 of those with padded batches, where rounding explains {:.1f}e-3",
    "benchmarks/results/batches.csv: loss_difference, rounded up, and bound",
    lambda: [
        math.ceil(1e7 * max(_batches("all", "loss_difference") + _batches("last block", "loss_difference"))),
        1e3 * min(_batches("all", "bound")),
    ],
)
claim("docs/learning.md", "in memory up to 2 GiB", "python/zo_finetune/cached.py: 2 << 30")
claim(B, "with a buffer of 33 MiB", "zo_kernels/views/memory.py: 33 << 20")


def _slower() -> list[float]:
    mine = [r for r in rows_of("rule_pass", contender="rule pass") if r["rule"] in ("momentum", "momentum, bf16 state", "adam")]
    ratios = [float(r["ratio_to_torch"]) for r in mine]
    return [min(ratios), max(ratios)]


claim(B, "they are {:.1f} to {:.1f} times slower", "benchmarks/results/rule_pass.csv: ratio_to_torch of momentum and Adam", _slower)
claim(
    B,
    "fp32 Adam moves {:.0f} % of what a plain rewrite does",
    "benchmarks/results/rule_pass.csv: percent_of_rewrite",
    lambda: [number("rule_pass", "percent_of_rewrite", contender="rule pass", rule="adam", dtype="float32")],
)


def _recomputed(dtype: str) -> float:
    """A pass of Adam from 16 records in passes of the stored state."""
    stored, records = (
        number("rule_pass", "gweights_per_s", contender="rule pass", rule=rule, dtype=dtype)
        for rule in ("adam", "adam, 16 records")
    )
    return stored / records


claim(
    A,
    "a pass of Adam from 16 records takes {:.1f} times one of the stored state in fp32 and {:.1f} times in bf16",
    "benchmarks/results/rule_pass.csv: gweights_per_s, 2 threads",
    lambda: [_recomputed("float32"), _recomputed("bfloat16")],
)


def _counted_records() -> list[float]:
    """Instructions a weight of 16 records, and that in those for which 4 bytes of traffic leave room."""
    row = next(rows_of("sass", backend="cuda", kernel="adam_history", arch="sm_90", dtype="float16"))
    counted = float(row["instructions_per_element"]) + 16 * float(row["instructions_per_element_term"])
    return [counted, counted / 38]


claim(
    A,
    "{:.0f} for each weight of 16 records, counted, where the time that the weights' own traffic takes has room for 38, so that it is {:.0f} "
    "times off its bound",
    "benchmarks/results/sass.csv: cuda, adam_history, sm_90, float16",
    _counted_records,
)
claim(
    A,
    'Adam\'s stored state is 8 bytes a weight (6 with `dtype="bfloat16"`)',
    "tests/optim/test_memory.py::test_bytes_between_steps",
)


def _sequence(dtypes: Sequence[str]) -> float:
    return max(
        float(r["ratio_to_separate"]) for r in rows_of("replay", contender="sequence", kind="gaussian") if r["dtype"] in dtypes
    )


claim(
    B,
    "up to {:.2f} times in fp32, nothing to {:.0f} % in 16 bits",
    "benchmarks/results/replay.csv: sequence over separate, gaussian",
    lambda: [_sequence(["float32"]), 100 * (_sequence(["float16", "bfloat16"]) - 1)],
)

# docs/offload.md


def _from_file(column: str) -> float:
    return float([r[column] for r in rows_of("offload", source="file", shape="opt-1.3b")][-1]) / 1e9


def _over_resident() -> list[float]:
    ratios = {
        dtype: [float(r["ratio"]) for r in rows_of("offload", shape="fits", dtype=dtype) if r["source"] != "resident"]
        for dtype in ("float32", "bfloat16")
    }
    return [extreme(of) for of in ratios.values() for extreme in (min, max)]


claim(
    "docs/offload.md",
    "{:.2f} GB in its file, trains with {:.2f} GB of resident memory over what importing takes, and its third step reads {:.2f} GB",
    "benchmarks/results/offload.csv: weight_bytes, peak_bytes and read_bytes of the last step",
    lambda: [_from_file("weight_bytes"), _from_file("peak_bytes"), _from_file("read_bytes")],
)
claim(
    "docs/offload.md",
    "takes {:.2f} to {:.2f} times a resident step in fp32, and {:.2f} to {:.2f} times in bf16",
    "benchmarks/results/offload.csv: ratio of the shape that fits",
    _over_resident,
)

# docs/scaling.md

S, PLAN = "docs/scaling.md", "benchmarks/results/cluster.csv"


def plan(quantity: str, question: str, **where: Any) -> float:
    return number("cluster", "value", quantity=quantity, question=question, **where)


def shared(column: str, *contenders: str, dtype: str = "float32") -> list[float]:
    """Of steps that real processes share."""
    return [number("ranks", column, contender=c, dtype=dtype, question="step") for c in contenders]


def a_step(shape: str, where: str, workers: int) -> float:
    return plan("a step", "workers", shape=shape, where=where, workers=workers, parallel="auto")


claim(
    S,
    "says, {:,.0f} from host memory and {:,.0f} from an SSD",
    f"{PLAN}: hidden",
    lambda: [
        plan("tokens x forwards of a visit", "hidden", shape="opt-175b", where=f"from {link}") for link in ("host memory", "an SSD")
    ],
)
claim(
    S,
    '`parallel` left at `"auto"`), a step takes {:.1f} s',
    f"{PLAN}: workers",
    lambda: [a_step("llama-2-70b", "one room", 16)],
)
claim(S, "in parentheses 5 to 95 % of the simulated steps", "benchmarks/cluster.py: [0.05, 0.95]")
claim(
    S,
    "A step of the 7B shape takes {:.1f} s with one worker, {:.2f} s with 128 in one room, and {:.2f} s with 128 that are far apart",
    f"{PLAN}: workers",
    lambda: [a_step("llama-2-7b", *way) for way in (("one room", 1), ("one room", 128), ("far apart", 128))],
)
claim(
    S,
    "would cross all links but one: {:.1f} s with those 128. A tree would cross one more than it has levels: {:.2f} s",
    f"{PLAN}: workers",
    lambda: [a_step("llama-2-7b", f"far apart, by a {kind}", 128) for kind in ("ring", "tree")],
)
claim(
    S,
    "Sending to each costs software for each: {:.1f} ms a round of 128, beside {:.0f} ms of one forward",
    f"{PLAN}: input, cell",
    lambda: [
        1e3 * (127 * plan("software of a message, losses", "input") + plan("software of a round, losses", "input")),
        1e3 * plan("a forward", "cell", shape="llama-2-7b"),
    ],
)
claim(S, "in a network of its own, with 40 ms from any one to any other", "benchmarks/ranks.py: LINK = 0.04")
claim(
    S,
    "comes out at {:.0f} % of what was measured, forwards run at {:.0f} % of the data sheet's peak",
    f"{PLAN}: check",
    lambda: [plan(name, "check") for name in ("of what was measured", "of the peak")],
)
claim(
    S,
    "spends {:.2f} of the processor time that one process spends on a step whose directions are shared, {:.2f} where micro-batches are",
    "benchmarks/results/ranks.csv: busiest_ratio, float32",
    lambda: shared("busiest_ratio", "two, directions", "two, data"),
)
claim(
    S,
    "both together {:.2f} and {:.2f}",
    "benchmarks/results/ranks.csv: cpu_ratio, float32",
    lambda: shared("cpu_ratio", "two, directions", "two, data"),
)
claim(
    S,
    "Wall times, on two cores without other work: {:.2f} and {:.2f} of one process's",
    "benchmarks/results/ranks.csv: ratio, float32",
    lambda: shared("ratio", "two, directions", "two, data"),
)
claim(
    S,
    "says {:.0f} bytes a step, {:.0f} with a journal",
    "benchmarks/results/ranks.csv: sent_bytes",
    lambda: shared("sent_bytes", "two, directions", "two, directions, journal"),
)
claim(
    S,
    "replayed in {:.1f} % of the processor time of a step",
    "benchmarks/results/ranks.csv: replay, float32",
    lambda: [100 * number("ranks", "cpu_ratio", question="replay", dtype="float32")],
)

# docs/journal.md: sizes of the format, and limits of its reader
J = "docs/journal.md"
claim(J, "60 of 60 runs end in the undisturbed bits, through 75 deaths", "tests/crash.py: 60 of 60 runs, 75 deaths")
claim(J, "28 or 32 bytes a step for plain MeZO", "tests/test_benchmarks.py::test_journal: record_bytes; 4 more for eps in place")
claim(
    J,
    "20,000 steps of a model with 400 parameter tensors take less than {:.0f} MB",
    "definition: 20,000 records of 32 bytes and a header of 400 entries of at most 900 bytes",
    lambda: [math.ceil((20_000 * 32 + 400 * 900) / 1e6)],
)
claim(J, "f32 and u32 are 4 bytes", "definition: the format")
claim(J, "bytes of the header, at most 16 MiB", "zo_kernels/journal/layout.py: 16 << 20")
claim(J, "a record has at most 1 MiB", "zo_kernels/journal/layout.py: 1 << 20")
claim(J, "`name` (at most 4096 bytes)", "zo_kernels/journal/layout.py: 4096")
claim(J, "only zeros (up to 64 MiB)", "zo_kernels/journal/layout.py: 64 << 20")

# docs/numerics.md: what rounding does to a run, and the law of the noise
N = "docs/numerics.md"
claim(
    N,
    "{:.1f} times the distance travelled at lr 10⁻⁶ (`lazy` {:.1f}, `public` {:.1f}), {:.0f} times at lr 10⁻⁷ ({:.0f}, {:.0f})",
    F,
    lambda: [
        fidelity("distance", "open", "bfloat16", mode, lr=lr) for lr in ("1e-06", "1e-07") for mode in ("inplace", "lazy", "public")
    ],
)
claim(
    N,
    "In fp16, with three more bits: {:.2f} and {:.1f}. `scratch`, which rounds the weights once a step, is at {:.2f} and {:.2f} in bf16 with `nearest` "
    "({:.2f} and {:.1f} with `stochastic`), at {:.2f} and {:.2f} in fp16 ({:.2f} and {:.2f})",
    F,
    lambda: [
        fidelity("distance", "open", dtype, mode, rounding, lr)
        for dtype, mode, rounding in (
            ("float16", "inplace", "nearest"),
            ("bfloat16", "scratch", "nearest"),
            ("bfloat16", "scratch", "stochastic"),
            ("float16", "scratch", "nearest"),
            ("float16", "scratch", "stochastic"),
        )
        for lr in ("1e-06", "1e-07")
    ],
)
claim(
    N,
    "at 10⁻⁷ {:.0f} % or more. What counts is what is left on average, `realised`. `nearest` in scratch mode and the public code lose part of the step: "
    "{:.0f} % at 10⁻⁶; at 10⁻⁷ both keep {:.0f} %. `stochastic` keeps {:.0f} %",
    F,
    lambda: [
        100
        * min(fidelity("vanished_fraction", "open", "bfloat16", m, lr="1e-07") for m in ("scratch", "inplace", "lazy", "public")),
        100 - 100 * fidelity("realised", "open", "bfloat16", "scratch"),
        100 * fidelity("realised", "open", "bfloat16", "scratch", lr="1e-07"),
        100 * fidelity("realised", "open", "bfloat16", "scratch", "stochastic", lr="1e-07"),
    ],
)
claim(
    N,
    "In place it changes little: {:.2f} against {:.2f}",
    F,
    lambda: [fidelity("distance", "open", "bfloat16", "inplace", r) for r in ("stochastic", "nearest")],
)
claim(
    N,
    "Validation fell from {:.3f} to {:.3f} in fp32, and to between {:.3f} (`scratch`, stochastic) and {:.3f} (`lazy`) in the closed loops in bf16; "
    "in fp16, forwards in fp16 too, to between {:.3f} and {:.3f}",
    F,
    lambda: [
        number("fidelity", "validation_loss", loop="start", lr="1e-06"),
        fidelity("validation_loss", "closed", "float32", "scratch"),
        fidelity("validation_loss", "closed", "bfloat16", "scratch", "stochastic"),
        fidelity("validation_loss", "closed", "bfloat16", "lazy"),
        fidelity("validation_loss", "closed", "float16", "scratch", "stochastic"),
        fidelity("validation_loss", "closed", "float16", "inplace"),
    ],
)
claim(
    N,
    "lie within {:.2f} of the fp32 trajectory that they define, where the run's own weights lie at {:.2f} to {:.1f}",
    F,
    lambda: [
        max(fidelity("replay_rounded_distance", "closed", "bfloat16", m) for m in ("scratch", "inplace", "lazy", "public")),
        fidelity("own_distance", "closed", "bfloat16", "scratch"),
        fidelity("own_distance", "closed", "bfloat16", "public"),
    ],
)
claim(
    N,
    "(open loop) rounded once is at {:.2f}, the runs in place at {:.0f} to {:.0f}",
    F,
    lambda: [
        fidelity("replay_rounded_distance", "open", "bfloat16", "inplace", lr="1e-07"),
        fidelity("distance", "open", "bfloat16", "lazy", lr="1e-07"),
        fidelity("distance", "open", "bfloat16", "public", lr="1e-07"),
    ],
)
claim("docs/parallel.md", "**only losses travel**: 8 bytes each", "tests/test_distributed.py::test_bytes_on_the_wire: float64")
claim("docs/parallel.md", "128 bytes", "zo_kernels/optim/workers.py: FRAME = 16")

LAW = "tests/kernels/test_statistics.py::test_the_law_of_the_gaussian"
claim(N, "variance 1 (to 1.5e-5), skew 0, excess kurtosis -0.0019, sup|F - Phi| 4.8e-5, lattice 1.4e-4, max|z| 8.23", LAW)
claim(N, "tail ratio to the normal 0.994 at 3 sigma, 0.945 at 4, 0.783 at 5", LAW)
claim(N, "(0 times an infinity is a NaN)", "definition: IEEE-754")
SUMS = "tests/kernels/test_statistics.py::test_a_call_has_one_parity_and_its_sums_take_32_values"
claim(N, "has the moments 2.970, 10.70 and 41.76 of order 4, 6 and 8", SUMS)
claim(N, "at most 2.06 standard deviations", SUMS)


def _sass(kernel: str, column: str = "instructions_per_element", arch: str = "sm_90", backend: str = "cuda") -> float:
    return number("sass", column, kernel=kernel, arch=arch, backend=backend, dtype="float16")


SASS = "benchmarks/results/sass.csv: fp16"
RANK = "instructions_per_element_term"
claim(
    N,
    "{:.0f} SASS instructions and {:.2f} for each rank",
    SASS,
    lambda: [
        _sass("gaussian-extended-low-rank") - _sass("gaussian-extended-low-rank", RANK),
        _sass("gaussian-extended-low-rank", RANK),
    ],
)
claim(
    N,
    "here: {:.1f} an element on sm_90 (CUDA), {:.1f} for each further noise",
    SASS,
    lambda: [_sass("gaussian"), _sass("gaussian", RANK)],
)
claim(
    B,
    "{:.1f} for each fp16 weight on sm_90 and {:.1f} on sm_80 ({:.1f} and {:.1f} with many rows)",
    SASS,
    lambda: [
        _sass(f"perturbed-linear{rows}", arch=arch, backend="triton") for rows in ("", "-many-rows") for arch in ("sm_90", "sm_80")
    ],
)
claim(N, "SPSA's second moment is d + 2 - 0.03", LAW)


claim(A, "one look at up to 1,024 inputs", "python/zo_finetune/inputs.py: MOST_INPUTS = 1024")
claim(A, "power −1/2, ridge 0.1", "python/zo_finetune/methods.py: ridge: float = 0.1")
claim(
    A,
    "1.25e-8, 1e-4, rank 64, power −1/2, ridge 0.1 | ours: lr FZOO's times 2.5",
    "python/zo_finetune/methods.py: Preset(1.25e-8, 1e-4",
)
claim(L, "of the eigenvalue + 0.1 of their mean", "zo_kernels/optim/inputs.py: ridge: float = 0.1")
claim(L, "(−0.5 whitens)", "zo_kernels/optim/inputs.py: power: float = -0.5")
claim("docs/options.md", "| 0.02 | of --objective pairs", "python/zo_finetune/losses.py: CENTRE = 0.02")
claim(
    B,
    "F1 gains {:.3f} ({:.3f} to {:.3f}), from below {:.2f} to {:.1f}",
    "benchmarks/results/objectives.csv: first-name",
    lambda: [
        *(names(column)[0] for column in ("gain", "gain_low", "gain_high")),
        math.ceil(100 * max(names("before"))) / 100,
        statistics.mean(names("after")),
    ],
)
claim(
    B,
    "the same answers are worth {:.2f} to {:.2f} (`other_after`)",
    "benchmarks/results/objectives.csv: first-name, other_after",
    lambda: [min(names("other_after")), max(names("other_after"))],
)
claim(
    B,
    "the best answer that is always the same has less than {:.2f}",
    "benchmarks/results/objectives.csv: first-name, constant",
    lambda: [math.floor(100 * max(names("constant")) + 1) / 100],
)
claim(B, "with its 95 % interval over rows and seeds", "python/zo_finetune/intervals.py: LEVEL, NORMAL = 2000, 0.95")
claim(B, "taken by chance would be worth\n0.5 as either", "tests/test_benchmarks.py::test_either_name_by_chance")
claim(B, "Whether longer runs pass 0.5 was not measured", "tests/test_benchmarks.py::test_either_name_by_chance")
SST2 = "benchmarks/results/objectives.csv: plain-sentiment"
claim(
    B,
    "300 for each of five seeds, which had chosen nothing: their accuracy rose from {:.3f} to {:.3f}, by {:.3f} ({:.3f} to {:.3f})",
    SST2,
    lambda: [statistics.mean(sst2("dev_before")), statistics.mean(sst2("dev_after")), *held_out()],
)
claim(
    B,
    "{:.3f} before and {:.3f} after, a gain of {:.3f} ({:.3f} below nothing to {:.3f} above), where the best line on the zero-shot scores gives {:.3f}",
    SST2,
    lambda: [abs(statistics.mean(sst2(name))) for name in ("before", "after", "gain", "gain_low", "gain_high", "threshold")],
)
claim(
    B,
    "AUC goes from {:.3f} to {:.3f}",
    SST2,
    lambda: [statistics.mean(sst2(name)) for name in ("auc_before", "auc_after")],
)
claim(
    B,
    "raises the accuracy of the validation sentences by {:.3f} ({:.3f} to {:.3f})",
    SST2,
    lambda: [sst2(name, "loss")[0] for name in ("gain", "gain_low", "gain_high")],
)


def reviews(column: str, objective: str = "accuracy") -> float:
    """The mean of the larger model's runs on film reviews, with the rate that was chosen."""
    found = rows_of("objectives", model="smollm2", task="sst2", objective=objective, chosen="1")
    return statistics.mean(float(r[column]) for r in found)


claim(
    B,
    "raises accuracy from {:.3f} to {:.3f} over five seeds, by {:.3f} ({:.3f} to {:.3f})",
    "benchmarks/results/objectives.csv: smollm2, accuracy",
    lambda: [reviews(name) for name in ("before", "after", "gain", "gain_low", "gain_high")],
)
claim(
    B,
    "the best line on the zero-shot scores gives {:.3f}, and AUC goes from {:.3f} to {:.3f}",
    "benchmarks/results/objectives.csv: smollm2, accuracy",
    lambda: [reviews(name) for name in ("threshold", "auc_before", "auc_after")],
)
claim(
    B,
    "raises accuracy to {:.3f}, by {:.3f} ({:.3f} to {:.3f}), and AUC to {:.3f}",
    "benchmarks/results/objectives.csv: smollm2, loss",
    lambda: [reviews(name, "loss") for name in ("after", "gain", "gain_low", "gain_high", "auc_after")],
)
T3 = "paper: MeZO, arXiv 2305.17333, table 3"
claim("docs/suite.md", "has zero-shot 79.0, 35.5, 50.2, 32.0; MeZO with cross-entropy 93.3, 53.2, 83.0, 94.3;", T3)
claim("docs/suite.md", "as the objective 92.7, 48.9, 82.7, 68.6;", T3)
claim("docs/suite.md", "zero-shot 46.2, with cross-entropy 84.7, with F1 as the objective 78.5.", T3)

# docs/learning.md: the noise of a batch


def noise(column: str, **where: Any) -> float:
    return number("noise", column, model="stories15m", batch=32, seed=0, **where)


SST2_NOISE: dict[str, Any] = {"task": "sst2", "objective": "classification"}
MEANS = ("language-model, mean of each answer first", "language-model")
claim(
    "docs/learning.md",
    "with cross-entropy on SST-2 from {:.1f} to {:.1f} for all weights, from {:.1f} to {:.1f} for the last block",
    "benchmarks/results/noise.csv: sst2, classification",
    lambda: [noise("ratio", trained=part, balanced=b, **SST2_NOISE) for part in ("all weights", "last block") for b in (0, 1)],
)
claim(
    "docs/learning.md",
    "has {:.2f} on SQuAD where that of all\ntokens has {:.2f}: less, but with standard errors of {:.2f} and {:.2f}",
    "benchmarks/results/noise.csv: squad, all weights",
    lambda: [noise(column, trained="all weights", objective=o) for column in ("ratio", "ratio_stderr") for o in MEANS],
)

# docs/learning.md: what the options of methods rest on


def chosen(column: str, question: str, **where: Any) -> float:
    """The mean over the seeds."""
    return statistics.fmean(float(r[column]) for r in rows_of("choices", question=question, **where))


def lost(method: str = "fzoo", **where: Any) -> float:
    """Nats a token, of plain language modelling."""
    return chosen("language_after", "anchor", method=method, **where) - chosen("language_before", "anchor", method=method, **where)


WHITENED, SOURCE = "fzoo-inputs:rank=16:power=-0.5", "benchmarks/results/choices.csv: anchor"
RATE: dict[str, Any] = {"anchor": ""}
SIZE = "benchmarks/choices.py: 2e-5, 1.2e-4, 0.19"
claim("docs/learning.md", "zero-shot the AUC is {:.3f})", SOURCE, lambda: [chosen("auc_before", "anchor")])
claim(
    "docs/learning.md",
    "the AUC is {:.3f} for {:.2f} nats; along dense directions the rate that loses least of those tried has {:.3f} for {:.2f}",
    SOURCE,
    lambda: [
        chosen("auc", "anchor", method=WHITENED, lr="3e-05"),
        lost(WHITENED, lr="3e-05"),
        chosen("auc", "anchor", method="fzoo", lr="5e-06"),
        lost(lr="5e-06"),
    ],
)
claim(
    "docs/learning.md",
    "With {:.2f} a step at 2e-05 it is {:.3f} for {:.2f} nats, at half the rate and without a pull {:.3f} for {:.2f}",
    SOURCE,
    lambda: [
        0.03,
        chosen("auc", "anchor", anchor="0.03", lr="2e-05"),
        lost(anchor="0.03", lr="2e-05"),
        chosen("auc", "anchor", method="fzoo", lr="1e-05", **RATE),
        lost(lr="1e-05", **RATE),
    ],
)
claim(
    "docs/learning.md", "leaves {:.1f} nats of {:.1f}", SOURCE, lambda: [lost(anchor="0.03", lr="4e-05"), lost(lr="4e-05", **RATE)]
)
claim(
    "docs/learning.md",
    "The best rates of the two models are 16 times apart, without `scale_free` 64 times",
    "benchmarks/results/choices.csv: rates",
)
claim(
    "docs/learning.md",
    "have a root mean square\n  of 0.027 and 0.19. **In units of it** the best rates are 0.015, and 0.034 or more",
    SIZE,
)
claim("docs/learning.md", "`--lr` 0.015 of the root mean square", SIZE)

# docs/algorithms.md: the ten methods


def of_ten(objective: str, column: str = "auc") -> dict[str, str]:
    """By method; those of the ten, which are beside AdamW."""
    found = rows_of("ranking", model="stories15m", data="sst2", objective=objective, budget="1200")
    return {r["method"]: r[column] for r in found if r["method"] != "adamw"}


def by_pairs() -> list[float]:
    """What pairs add to the AUC of each of the ten."""
    return [float(auc) - float(of_ten("loss")[method]) for method, auc in of_ten("pairs").items()]


TEN = "benchmarks/results/ranking.csv: stories15m, sst2"
claim(
    A,
    "every one of the ten methods has a higher AUC on pairs than with cross-entropy, by {:.3f} to {:.3f}",
    TEN,
    lambda: [min(by_pairs()), max(by_pairs())],
)
claim(
    A,
    "AUC is {:.3f} before and {:.3f} for the best, where AdamW, which backpropagates, reaches {:.3f}",
    TEN,
    lambda: [
        number("ranking", "auc", model="stories15m", data="sst2", method="zero-shot"),
        max(map(float, of_ten("pairs").values())),
        number("ranking", "auc", model="stories15m", data="sst2", method="adamw"),
    ],
)

# docs/choosing.md, docs/memory.md

claim(
    "docs/choosing.md",
    "the held-out rows chose {:g} for MeZO on two tasks of three",
    "benchmarks/results/ranking.csv: mezo",
    lambda: [statistics.mode(ranked("lr", data=data, method="mezo") for data in TASKS)],
)
claim(
    "docs/memory.md",
    "(4 MiB on a CPU, 33 MiB on a GPU)",
    'zo_kernels/views/memory.py: return 33 << 20 if any(d.type == "cuda" for d in devices) else 1 << 22',
)
claim(
    "docs/memory.md",
    "the peak of MeZO's step is {:.2f} times inference's, Adam's {:.2f} times",
    "benchmarks/results/memory.csv: opt-125m",
    lambda: [
        number("memory", "peak_bytes", shape="opt-125m", method=method)
        / number("memory", "peak_bytes", shape="opt-125m", method="inference")
        for method in ("mezo", "adam")
    ],
)

# ---- checking ----------------------------------------------------------------------------------------------------------


def check(write: bool) -> list[str]:
    """What is wrong, a line each; prints every claim."""
    wrong: list[str] = []
    for page in PAGES:
        path = ROOT / page
        text, covered = path.read_text(), list[tuple[int, int]]()
        for c in (c for c in CLAIMS if c.page == page):
            found = c.pattern().search(text)
            if fault := c.fault():
                wrong.append(f"{page}: {c.text!r}: {fault}")
            if found is None:
                wrong.append(f"{page}: no longer says {c.text!r}")
                continue
            try:
                shown = c.shown()
            except (LookupError, ValueError) as error:
                wrong.append(f"{page}: {c.text!r}: {c.source}: {error!r}")
                continue
            if write and list(found.groups()) != shown:
                for k in range(len(shown), 0, -1):
                    text = text[: found.start(k)] + shown[k - 1] + text[found.end(k) :]
                path.write_text(text)
                found = c.pattern().search(text)
                assert found is not None
            if list(found.groups()) != shown:
                wrong.append(f"{page}: {found[0]!r}: its rows say {', '.join(shown)}")
            print(f"{page} | {' '.join(found[0].split())} | {c.source}")
        plain = prose(text)
        for c in (c for c in CLAIMS if c.page == page):
            covered += [m.span() for m in c.pattern().finditer(text)]
        for m in FIGURE.finditer(plain):
            if not any(a <= m.start() and m.end() <= b for a, b in covered):
                line = text.count("\n", 0, m.start()) + 1
                near = re.sub(r"\s+", " ", text[max(0, m.start() - 60) : m.end() + 20])
                wrong.append(f"{page}:{line}: {m[0]!r} has no source: ... {near} ...")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the figures of the rows into the pages")
    wrong = check(parser.parse_args(arguments).write)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(CLAIMS)} claims, {len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
