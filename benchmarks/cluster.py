"""What would a step cost on 1 to 10,000 workers, and on a device that weights only visit? Simulated and computed from what was measured elsewhere.

    python benchmarks/cluster.py --out benchmarks/results/cluster.csv [--page docs/scaling.md] [--quick]

Belongs here: what follows from measured times, published rates and the library's own cut of a step (zo_kernels/optim/workers.py). Does not belong here:
anything that is measured (ranks.py, offload.py, gpu_step.py's rows), the model itself (cluster_model.py), figures (plot.py).

Each row is one number, and says what it is: `measured` (which row of which file), `counted` (from shapes, or from the library's code), `published`,
`assumed`, `computed` from the others, `simulated` with them. Nothing here knows more of a GPU than its rows in gpu_pass.csv and gpu_step.csv, and its data
sheet. A cell of the table of losses is a forward: 2 x weights x tokens operations at the measured rate, and one pass that writes perturbed weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import transformers
from cluster_model import EXCHANGES, Delays, exchange, forwards, frame, links, messages, rounds, run, slowest, visits
from zo_finetune import away, shapes

from zo_kernels.offload import SMALL, split
from zo_kernels.optim.workers import FRAME, GRACE, cut
from zo_kernels.views.memory import aligned, default_scratch_bytes

COLUMNS = ("question", "shape", "where", "workers", "parallel", "quantity", "value", "low", "high", "unit", "kind", "source")
SHAPES = ("llama-2-7b", "llama-2-70b", "opt-175b")
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1000, 10_000)
QUERIES, BATCHES, TOKENS = 8, 8, 16 * 400  # of a step; tokens of a micro-batch as they were measured
POINTS = 2 * QUERIES
STEPS = 20_000  # of a run
MOST = 5  # times a run without losses: one that takes longer does not end
BYTES = 2  # of a weight
SEED = 0
HOST = "from host memory"


# ---- what is known -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    value: float
    unit: str
    kind: str
    source: str


def inputs(results: Path) -> dict[str, Input]:
    """By name."""

    def of(file: str, **where: Any) -> tuple[dict[str, str], str]:
        row = [r for r in harness.read_csv(results / f"{file}.csv") if all(r[k] == str(v) for k, v in where.items())][-1]
        return row, f"{file}.csv, commit {row['commit']}: {', '.join(map(str, where.values()))}"

    forwards, of_forwards = of("gpu_step", model="opt-1.3b", sequence=400, mode="forwards")
    step, of_step = of("gpu_step", model="opt-1.3b", sequence=400, mode="scratch")
    tokens = int(forwards["batch"]) * int(forwards["sequence"])
    most = 1 << 27
    big = {"contender": "cuda", "dtype": "bfloat16", "weights": most}
    write, of_write = of("gpu_pass", **big, feature="out of place")
    plain, stochastic, several = (of("gpu_pass", **big, feature=f)[0] for f in ("K=1", "stochastic", "K=8"))
    update = float(several["median_s"]) + float(stochastic["median_s"]) - float(plain["median_s"])
    return {
        "operations of forwards": Input(
            2 * 2 * int(forwards["weights"]) * tokens / float(forwards["median_s"]), "1/s", "measured",
            f"{of_forwards}: 2 x 2 x weights x tokens / seconds of two",
        ),
        "weights written perturbed": Input(most / float(write["median_s"]), "1/s", "measured", of_write),
        "weights updated": Input(
            most / update, "1/s", "measured",
            f"gpu_pass.csv, commit {several['commit']}: eight terms, and what stochastic rounding adds to one",
        ),
        "a step of opt-1.3b": Input(float(step["median_s"]), "s", "measured", of_step),
        "two forwards of opt-1.3b": Input(float(forwards["median_s"]), "s", "measured", of_forwards),
        "weights of opt-1.3b": Input(float(forwards["weights"]), "", "counted", of_forwards),
        **of_exchanges(harness.read_csv(results / "ranks.csv")),
        "memory": Input(80e9, "bytes", "published", "NVIDIA H100 SXM, data sheet"),
        "peak of forwards": Input(989.4e12, "1/s", "published", "NVIDIA H100 SXM, data sheet: bf16, dense"),
        HOST: Input(64e9, "bytes/s", "published", "PCIe 5.0 x16, one direction: half of the data sheet's 128 GB/s"),
        "from an SSD": Input(6.5e9, "bytes/s", "published", "Samsung PM9A3, sequential reads, as announced"),
        "between the GPUs of a machine": Input(450e9, "bytes/s", "published", "NVLink of an H100, one direction: half of the data sheet's 900 GB/s"),
        "losses of a worker, a cluster": Input(
            419 / (54 * 24 * 16384) / 3600, "1/s", "published", "arXiv 2407.21783: 419 in 54 days of 16,384 GPUs"
        ),
        "losses of a worker, lent machines": Input(1 / (24 * 3600), "1/s", "assumed", "one a day"),
        "start": Input(30.0, "s", "assumed", "processes and imports; the weights are read from an SSD beside it"),
        "noticing": Input(GRACE / 5, "s", "counted", "zo_kernels/optim/workers.py: a connection that is closed"),
        "a near link": Input(20e-6, "s", "assumed", "one way, inside a machine room"),
        "a far link": Input(40e-3, "s", "assumed", "one way, across an ocean"),
        "jitter": Input(0.05, "", "assumed", "mean of X, exponential"),
        "pauses": Input(1e-4, "", "assumed", "of a worker and step"),
        "a pause": Input(5.0, "s", "assumed", ""),
    }  # fmt: skip


def of_exchanges(rows: Sequence[dict[str, str]]) -> dict[str, Input]:
    """What software adds to each kind of exchange: a line through the processor times of one process, which does not fall."""
    found = {}
    for kind in EXCHANGES:
        mine = [row for row in rows if (row["question"], row["contender"]) == ("round", kind)]
        counts = [int(row["ranks"]) for row in mine]
        times = [float(row["cpu_median_s"]) / count for row, count in zip(mine, counts, strict=True)]
        sends = [messages(kind, count) for count in counts]
        each = max(0.0, float(np.polyfit(sends, times, 1)[0]))
        once = max(0.0, statistics.mean(times) - each * statistics.mean(sends))
        source = (
            f"ranks.csv, commit {mine[0]['commit']}: round, {kind}, {', '.join(map(str, counts))} processes: processor time of one"
        )
        found[f"software of a message, {kind}"] = Input(each, "s", "measured", f"{source}, by messages")
        found[f"software of a round, {kind}"] = Input(once, "s", "measured", "the same, what does not grow with them")
    return found


def far_rounds(rows: Sequence[dict[str, str]]) -> list[tuple[str, int, float, float, str]]:
    """Kind, processes, seconds of a link, the least seconds measured and source of each round between processes that are far from each other."""
    mine = [row for row in rows if row["question"] == "far round"]
    return [
        (row["contender"], int(row["ranks"]), float(row["link_s"]), float(row["min_s"]), f"ranks.csv, commit {row['commit']}")
        for row in mine
    ]


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as the library splits it where it is away."""

    name: str
    weights: int
    blocks: tuple[int, ...]  # bytes
    resident: int  # bytes of what is in no block
    words: int

    @classmethod
    def of(cls, name: str, **more: Any) -> Shape:
        config = transformers.AutoConfig.for_model(**{**shapes.get(name), **more})
        model = away.empty(transformers.AutoModelForCausalLM, config, torch.bfloat16)
        blocks = split(model, None, SMALL)
        sizes = [sum(aligned(p.numel() * BYTES) for p in members.values()) for members in blocks.values()]
        weights = sum(p.numel() for p in model.parameters())
        inside = sum(p.numel() for members in blocks.values() for p in members.values())
        return cls(name, weights, tuple(sizes), (weights - inside) * BYTES, config.vocab_size)

    @property
    def bytes(self) -> int:
        return self.weights * BYTES


# ---- the questions ---------------------------------------------------------------------------------------------------------------


class Plan:
    """The rows."""

    def __init__(
        self, known: dict[str, Input], far: Sequence[tuple[str, int, float, float, str]], models: Sequence[Shape], workers: Sequence[int], drawn: int,
        runs: int,
    ) -> None:  # fmt: skip
        self.known, self.far, self.models, self.workers, self.drawn, self.runs = known, far, models, workers, drawn, runs
        self.v = {name: one.value for name, one in known.items()}
        self.delays = Delays(self.v["jitter"], self.v["pauses"], self.v["a pause"])
        self.ways = {
            "one room": ("losses", "a near link"),
            "far apart": ("losses", "a far link"),
            "far apart, by a tree": ("a tree", "a far link"),
            "far apart, by a ring": ("a ring", "a far link"),
        }

    def row(
        self, question: str, quantity: str, value: float, unit: str, kind: str = "computed", shape: str = "", where: str = "", workers: int | str = "",
        parallel: str = "", low: float | str = "", high: float | str = "", source: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        numbers = {"value": value, "low": low, "high": high}
        rounded = {name: n if isinstance(n, str) else harness.significant(n) for name, n in numbers.items()}
        return {
            "question": question, "shape": shape, "where": where, "workers": workers, "parallel": parallel, "quantity": quantity, **rounded,
            "unit": unit, "kind": kind, "source": source,
        }  # fmt: skip

    # -- one forward --

    def forward(self, weights: float, tokens: int = TOKENS) -> float:
        return 2 * weights * tokens / self.v["operations of forwards"]

    def perturbing(self, weights: float) -> float:
        return weights / self.v["weights written perturbed"]

    def update(self, weights: float) -> float:
        return weights / self.v["weights updated"]

    def fits(self, shape: Shape) -> bool:
        return shape.bytes + default_scratch_bytes([torch.device("cuda")]) + self.activations(shape) < self.v["memory"]

    def activations(self, shape: Shape) -> int:
        """The largest one: logits, and their copy in fp32 for the loss."""
        return (BYTES + 4) * TOKENS * shape.words

    def visit(self, shape: Shape, link: str, forwards: int, updates: int = 0) -> float:
        """Seconds of so many forwards that share a visit of the blocks, which make up for so many updates."""
        whole = forwards * (self.forward(shape.weights) + self.perturbing(shape.weights)) + updates * self.update(shape.weights)
        shares = [size / sum(shape.blocks) for size in shape.blocks]
        return visits([size / self.v[link] for size in shape.blocks], [whole * share for share in shares])

    def cell(self, shape: Shape) -> float:
        return self.forward(shape.weights) + self.perturbing(shape.weights)

    def shares(self, shape: Shape, parallel: str, workers: int) -> list[list[int]]:
        return cut(parallel, POINTS, BATCHES, workers, visited=not self.fits(shape))

    def cells(self, shape: Shape, share: Sequence[int]) -> tuple[float, float]:
        """Seconds of a worker's cells, and what the update adds. Who does not hold the weights has them in host memory."""
        if self.fits(shape):
            return len(share) * self.cell(shape), self.update(shape.weights)
        served = forwards(share, BATCHES)
        seconds = {count: self.visit(shape, HOST, count) for count in set(served)}
        return sum(seconds[count] for count in served), self.visit(shape, HOST, served[0], 1) - seconds[served[0]]

    # -- the parts of the file --

    def rows(self) -> Iterator[dict[str, Any]]:
        for name, one in self.known.items():
            yield self.row("input", name, one.value, one.unit, one.kind, source=one.source)
        yield from self.checks()
        for shape in self.models:
            yield from self.device(shape)
        for shape in self.models:
            yield from self.shared(shape)
        yield from self.cuts(self.models[0])
        yield from self.wires()
        for shape in self.models:
            yield from self.restarts(shape)

    def checks(self) -> Iterator[dict[str, Any]]:
        weights = self.v["weights of opt-1.3b"]
        made = self.v["two forwards of opt-1.3b"] + 3 * self.perturbing(weights)
        yield self.row(
            "check",
            "a step of opt-1.3b, 16x400 tokens",
            made,
            "s",
            source="two forwards, and three passes at the rate of the first",
        )
        yield self.row("check", "of what was measured", 100 * made / self.v["a step of opt-1.3b"], "%")
        for kind, count, link, measured, source in self.far:
            made = self.exchange(kind, count, link)
            where = {"where": kind, "workers": count}
            yield self.row("check", "a far round", measured, "s", "measured", source=source, **where)
            yield self.row("check", "links of a far round", measured / link, "", source="seconds / seconds of a link", **where)
            yield self.row(
                "check", "a far round, by the model", made, "s", source=f"{links(kind, count)} links, and software", **where
            )
        yield self.row("check", "of the peak", 100 * self.v["operations of forwards"] / self.v["peak of forwards"], "%")

    def device(self, shape: Shape) -> Iterator[dict[str, Any]]:
        """One device."""
        memory = self.v["memory"]
        for quantity, size in (
            ("weights", shape.bytes),
            ("two blocks and what is small", 2 * max(shape.blocks) + shape.resident),
            ("logits", self.activations(shape)),
        ):
            yield self.row("memory", quantity, size, "bytes", "counted", shape.name)
        least = 1
        while shape.bytes / least + max(shape.blocks) + self.activations(shape) > memory:
            least *= 2
        yield self.row(
            "memory", "devices that hold shards", least, "", shape=shape.name, source="a power of two; one block gathered"
        )
        if least > 1:
            gathered = shape.bytes * (least - 1) / least / self.v["between the GPUs of a machine"]
            yield self.row("memory", "gathering the shards for a forward", gathered, "s", shape=shape.name, where="NVLink")
        yield self.row(
            "cell", "a forward", self.forward(shape.weights), "s", shape=shape.name, source="2 x weights x tokens / rate"
        )
        yield self.row("cell", "perturbed weights", self.perturbing(shape.weights), "s", shape=shape.name, source="weights / rate")
        yield self.row("cell", "the update", self.update(shape.weights), "s", shape=shape.name, source="weights / rate")
        if self.fits(shape):
            for points, batches in ((2, 1), (POINTS, BATCHES)):
                cells = points * batches
                value = cells * self.cell(shape) + self.update(shape.weights)
                yield self.row("device", f"{points} x {batches}", value, "s", shape=shape.name, where="resident")
        for link in (HOST, "from an SSD"):
            up = sum(shape.blocks) / self.v[link]
            yield self.row("device", "a visit's uploads", up, "s", shape=shape.name, where=link, source="bytes / rate")
            for points, batches in ((2, 1), (POINTS, BATCHES)):
                value = (batches - 1) * self.visit(shape, link, points) + self.visit(shape, link, points, 1)
                yield self.row(
                    "device",
                    f"{points} x {batches}",
                    value,
                    "s",
                    shape=shape.name,
                    where=link,
                    source="together: a visit a micro-batch",
                )
            hidden = self.v["operations of forwards"] * BYTES / (2 * self.v[link])
            yield self.row(
                "hidden",
                "tokens x forwards of a visit",
                hidden,
                "",
                shape=shape.name,
                where=link,
                source="rate of forwards / rate of the link",
            )

    def step(self, shape: Shape, workers: int, parallel: str, delays: Delays, way: str, journal: bool = True) -> Any:
        """Seconds of `drawn` steps."""
        shares = self.shares(shape, parallel, workers)
        most = max(map(len, shares))
        kind, link = self.ways[way]
        found = {share: self.cells(shape, share) for share in map(tuple, shares)}
        seed = [SEED, workers, ("auto", "directions", "data", "both").index(parallel)]
        made = slowest([found[tuple(share)][0] for share in shares], delays, self.drawn, np.random.default_rng(seed))
        return made + rounds(most, journal) * self.exchange(kind, workers, self.v[link]) + max(found.values())[1]

    def exchange(self, kind: str, workers: int, link: float) -> float:
        return exchange(kind, workers, link, self.v[f"software of a message, {kind}"], self.v[f"software of a round, {kind}"])

    def shared(self, shape: Shape) -> Iterator[dict[str, Any]]:
        """Workers, how far they are from each other, and what other exchanges would make of it."""
        for way in self.ways:
            for workers in self.workers:
                yield self.seconds(shape, way, workers, "auto", self.delays, way)

    def cuts(self, shape: Shape) -> Iterator[dict[str, Any]]:
        """How the table is cut, with and without delays."""
        for where, delays in (("no delays", Delays()), ("one room", self.delays)):
            for parallel in ("directions", "data", "both") if where == "one room" else ("auto", "directions", "data", "both"):
                for workers in self.workers:
                    yield self.seconds(shape, where, workers, parallel, delays, "one room")

    def seconds(self, shape: Shape, where: str, workers: int, parallel: str, delays: Delays, way: str) -> dict[str, Any]:
        found = self.step(shape, workers, parallel, delays, way)
        low, high = np.quantile(found, [0.05, 0.95])
        more: dict[str, Any] = {"low": float(low), "high": float(high)}
        return self.row("workers", "a step", float(np.mean(found)), "s", "simulated", shape.name, where, workers, parallel, **more)

    def wires(self) -> Iterator[dict[str, Any]]:
        for workers in self.workers:
            most = max(map(len, cut("auto", POINTS, BATCHES, workers)))
            said = (frame(most) + 8 * FRAME) if workers > 1 else 0
            yield self.row(
                "wire",
                "to each other one",
                said,
                "bytes",
                "counted",
                workers=workers,
                parallel="auto",
                source="its losses, and with a journal a record's round",
            )
            yield self.row(
                "wire",
                "to all",
                said * (workers - 1),
                "bytes",
                "counted",
                workers=workers,
                parallel="auto",
                source="what optimizer.workers.sent counts",
            )
        for shape in self.models:
            value = 2 * shape.bytes
            yield self.row(
                "wire",
                "gradients",
                value,
                "bytes",
                shape=shape.name,
                source="an all-reduce by ring of as many workers as one likes, nearly",
            )

    def restarts(self, shape: Shape) -> Iterator[dict[str, Any]]:
        restart = self.v["start"] + self.v["noticing"] + shape.bytes / self.v["from an SSD"]
        replay = self.update(shape.weights)
        yield self.row(
            "restart",
            "replay of a step",
            replay,
            "s",
            shape=shape.name,
            source="an update, pass by pass; as one sequence: not yet measured on a GPU",
        )
        for workers in [w for w in (8, 128) if w in self.workers]:
            step = statistics.mean(self.step(shape, workers, "auto", self.delays, "one room"))
            quiet = STEPS * step
            yield self.row("restart", "a run without losses", quiet / 3600, "h", "simulated", shape.name, "", workers, "auto")
            for kind in ("a cluster", "lent machines"):
                losses = workers * self.v[f"losses of a worker, {kind}"]
                for kept in (0, 1000):
                    draw = np.random.default_rng([SEED, workers, kept])
                    found = [run(STEPS, step, losses, restart, replay, draw, kept, MOST * quiet) for _ in range(self.runs)]
                    where = f"{kind}, {'saved every 1,000 steps' if kept else 'the journal alone'}"
                    over = [100 * (seconds / quiet - 1) for seconds, _ in found]
                    common: dict[str, Any] = {
                        "kind": "simulated",
                        "shape": shape.name,
                        "where": where,
                        "workers": workers,
                        "parallel": "auto",
                    }
                    yield self.row(
                        "restart",
                        "time over a run without losses",
                        statistics.mean(over),
                        "%",
                        low=min(over),
                        high=max(over),
                        **common,
                    )
                    deaths = [deaths for _, deaths in found]
                    yield self.row("restart", "restarts", statistics.mean(deaths), "", low=min(deaths), high=max(deaths), **common)


# ---- the page ----------------------------------------------------------------------------------------------------------------------

Row = dict[str, str]


def number(text: str) -> str:
    x = float(text)
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body])


def grid(rows: Sequence[Row], label: str, column: str, first: str) -> str:
    """One line for each `label` of the rows, one column for each `column`; with its range where a row has one."""
    names = list(dict.fromkeys(row[column] for row in rows))
    found = {(row[label], row[column]): row for row in rows}

    def cell(row: Row | None) -> str:
        if row is None or math.isinf(float(row["value"])):
            return "" if row is None else "does not end"
        return number(row["value"]) + (f" ({number(row['low'])} to {number(row['high'])})" if row["low"] else "")

    labels = list(dict.fromkeys(row[label] for row in rows))
    return markdown([first, *names], [[one, *(cell(found.get((one, name))) for name in names)] for one in labels])


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """By the name of its place in the page."""

    def of(question: str, **where: str) -> list[Row]:
        return [row for row in rows if row["question"] == question and all(row[k] == v for k, v in where.items())]

    by_shape = list(dict.fromkeys(row["shape"] for row in of("memory")))
    body = []
    for shape in by_shape:
        mine = {row["quantity"]: row["value"] for row in of("memory", shape=shape)}
        mine |= {row["quantity"]: row["value"] for row in of("cell", shape=shape)}
        gigabytes = [f"{float(mine[name]) / 1e9:.1f}" for name in ("weights", "two blocks and what is small", "logits")]
        times = [f"{float(mine[name]):.3g}" for name in ("a forward", "perturbed weights", "the update")]
        body.append([shape, *gigabytes, mine["devices that hold shards"], *times])
    header = [
        "shape",
        "weights, GB",
        "two blocks, GB",
        "logits, GB",
        "devices with shards",
        "a forward, s",
        "perturbing, s",
        "the update, s",
    ]
    found = {"plan_device": markdown(header, body)}
    device = [{**row, "label": f"{row['shape']}, {row['where']}"} for row in of("device")]
    found["plan_offload"] = grid(device, "label", "quantity", "seconds")
    for shape in by_shape:
        there = [row for row in of("workers", shape=shape, parallel="auto") if row["where"] != "no delays"]
        found[f"plan_{shape.replace('-', '_').replace('.', '_')}"] = grid(there, "workers", "where", "workers")
    cut_rows = [row for row in of("workers", shape=by_shape[0], where="no delays")]
    cut_rows += [
        {**row, "parallel": f"{row['parallel']}, with delays"} for row in of("workers", shape=by_shape[0], where="one room")
    ]
    found["plan_cuts"] = grid([{**row, "low": ""} for row in cut_rows], "workers", "parallel", "workers")
    rounds_of = [{**row, "quantity": row["quantity"].removeprefix("a far round, ")} for row in of("check") if row["workers"]]
    lines = dict.fromkeys((row["where"], row["workers"]) for row in rounds_of)
    cells = {(row["where"], row["workers"], row["quantity"]): number(row["value"]) for row in rounds_of}
    quantities = ("a far round", "links of a far round", "by the model")
    found["plan_far"] = markdown(
        ["exchange", "processes", "least seconds", "links", "by the model"],
        [[*line, *(cells[(*line, name)] for name in quantities)] for line in lines],
    )
    found["plan_wire"] = grid([row for row in of("wire") if row["workers"]], "workers", "quantity", "workers")
    restarts = of("restart", quantity="a run without losses") + of("restart", quantity="time over a run without losses")
    named = [
        {**row, "label": f"{row['shape']}, {row['workers']} workers", "where": row["where"] or "hours without losses"}
        for row in restarts
    ]
    found["plan_restarts"] = grid(named, "label", "where", "more time, %")
    known = [
        [
            row["quantity"],
            number(row["value"]) if 1e-3 < float(row["value"]) < 1e7 else f"{float(row['value']):.3g}",
            row["unit"],
            row["kind"],
            row["source"],
        ]
        for row in of("input")
    ]
    found["plan_inputs"] = markdown(["what", "value", "unit", "is", "source"], known)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="what was measured")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--page", type=Path, help="a page with places for the tables, such as docs/scaling.md")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; the figures mean nothing")
    args = parser.parse_args(arguments)
    models = [Shape.of("llama-2-7b", num_hidden_layers=2)] if args.quick else [Shape.of(name) for name in SHAPES]
    made = Plan(
        inputs(args.results),
        far_rounds(harness.read_csv(args.results / "ranks.csv")),
        models,
        WORKERS[:3] if args.quick else WORKERS,
        *((20, 2) if args.quick else (1000, 20)),
    )
    harness.write_csv(args.out, COLUMNS, made.rows())
    if args.page:
        for name, table in tables(harness.read_csv(args.out)).items():
            harness.fill(args.page, name, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
