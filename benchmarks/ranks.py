"""What does a step cost that processes share, beside one process that makes all of its forwards? What a round of losses, and what going on from a journal?

    python benchmarks/ranks.py --out ranks.csv [--rounds N] [--questions round "far round" step] [--append] [--quick]

Belongs here: real processes of this machine, with gloo. Does not belong here: steps of more of them than it has cores (cluster.py computes those), and whether
the bits are right (tests/test_distributed.py), but that the contenders' weights are the same is a column.

`step`: two processes that live all the while take the contenders in turn, each with a model of its own: one process without a process group, one with a
group of itself, two that share the points or the micro-batches, with a journal or without. The table of losses is the same for all. Wall time is the slower
one's of those that take part; `cpu` is the processor time of all of them, `busiest` that of the one with most: what the wall time would be where every process
has a core to itself, and waiting costs nothing. Ratios are medians over the rounds, each over the first contender of its round.
`round`: one exchange of losses, between so many processes, as the library makes it ("losses"), and as gloo's all-gather or a tree would: those that it might
make instead. Where there are more processes than cores, what counts is the processor time. `far round`: the same between networks that packets need `link_s`
seconds to cross (apart.py; left out where the machine makes none). `replay`: a step from a journal, onto the base weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apart
import harness
import step as steps
import torch
import torch._dynamo  # before the forks: torch loads it for its first optimizer
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

import zo_kernels as zk
from zo_kernels.optim.findings import FIRST

COLUMNS = (
    *(
        "question",
        "contender",
        "model",
        "weights",
        "dtype",
        "threads",
        "ranks",
        "parallel",
        "journal",
        "points",
        "batches",
        "batch",
        "sequence",
        "link_s",
    ),
    *(*harness.TIMING_COLUMNS, "cpu_median_s", "cpu_min_s", "cpu_max_s", "busiest_median_s", "ratio", "cpu_ratio", "busiest_ratio"),
    *("sent_bytes", "same_bits"),
)
QUERIES, BATCHES, LR = 2, 4, 1e-4
MANY = 100  # exchanges that make one timing
MANY_FAR = 5
LINK = 0.04  # seconds
QUESTIONS = ("round", "far round", "step")


@dataclass(frozen=True)
class Contender:
    name: str
    ranks: int
    parallel: str = ""  # of a process group; "": there is none
    journal: bool = False


CONTENDERS = (
    Contender("one process", 1),
    Contender("a group of one", 1, "auto"),
    Contender("two, directions", 2, "directions"),
    Contender("two, data", 2, "data"),
    Contender("two, directions, journal", 2, "directions", True),
)


def bits_of(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for p in model.parameters():
        found.update(p.detach().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def batches_of(vocabulary: int, batch: int, sequence: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (batch, sequence), generator=draw) for _ in range(BATCHES)]


def in_processes(count: int, link: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(rank, *arguments)` returns in the first of so many processes, forks of this one, of one process group, and so many seconds apart."""
    with tempfile.TemporaryDirectory() as folder, apart.Networks(count, link) if link else contextlib.nullcontext() as networks:
        told = processes.get_context("fork").SimpleQueue()
        begin = (count, folder, told, networks, function, arguments)
        running = processes.start_processes(_begin, begin, nprocs=count, join=False, start_method="fork")
        if networks is None:
            while not running.join():
                pass
        else:
            networks.carry(until=lambda: running.join(timeout=0))
        return told.get()


def _begin(
    rank: int, count: int, folder: str, told: Any, networks: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # one contender has no process group where there are processes
    if networks is not None:
        networks.enter(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    found = function(rank, *arguments)
    if rank == 0:
        told.put(found)
    dist.destroy_process_group()


# ---- steps ------------------------------------------------------------------------------------------------------------------


def shared(rank: int, base: Any, batch: int, sequence: int, rounds: int, warm: int, folder: str) -> dict[str, Any]:
    """All contenders, a step each a round: [seconds, processor seconds of each process] of each, bytes sent a step, weights' bits; and of a replay."""
    # One for each process: torch names the groups of optimizers by how many a process has.
    alone, *_ = [dist.new_group([k]) for k in range(dist.get_world_size())]
    batches = batches_of(base.get_input_embeddings().num_embeddings, batch, sequence)
    work: dict[str, tuple[Any, zk.ZOStep]] = {}
    path = Path(folder, f"{rank}.zoj")
    for one in CONTENDERS:
        if rank >= one.ranks:
            continue
        model = copy.deepcopy(base)
        group = {"process_group": alone if one.ranks == 1 else dist.group.WORLD, "parallel": one.parallel} if one.parallel else {}
        more: dict[str, Any] = {**group, **({"journal": path} if one.journal else {})}
        work[one.name] = model, zk.MeZOStep(model, lr=LR, queries=QUERIES, **more)

    def sent_by(one: Contender) -> int:
        workers = work[one.name][1].workers if rank < one.ranks else None
        return workers.sent if workers else 0

    def step(one: Contender) -> tuple[float, float]:
        model, optimizer = work[one.name]
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.step(lambda ids: model(input_ids=ids, labels=ids).loss.float(), batches)
        return time.perf_counter() - wall, time.process_time() - cpu

    times: dict[str, list[tuple[float, list[float]]]] = {one.name: [] for one in CONTENDERS}
    sent: dict[str, int] = {}
    for number in range(warm + rounds):
        for one in CONTENDERS[:: 1 if number % 2 == 0 else -1]:
            before = sent_by(one)
            dist.barrier()
            taken = step(one) if rank < one.ranks else None
            all_of: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(all_of, taken)
            ran = [pair for pair in all_of if pair]
            if number >= warm:  # those before are looked at closely, and build what a step keeps
                times[one.name].append((max(wall for wall, _ in ran), [cpu for _, cpu in ran]))
            if one.parallel and rank < one.ranks:
                sent[one.name] = sent_by(one) - before
    work[CONTENDERS[-1].name][1].close_journal()
    return {
        "times": times,
        "sent": sent,
        "bits": {name: bits_of(model) for name, (model, _) in work.items()},
        "replay": replayed(base, path, rounds) if rank == 0 else None,
    }


def replayed(base: Any, path: Path, rounds: int) -> tuple[list[tuple[float, float]], str]:
    """(seconds, processor seconds) of a step that is replayed, and the bits that a replay ends in."""
    clean = {name: value.clone() for name, value in base.state_dict().items()}
    count, found = len(zk.journal.read(path).steps), []
    for _ in range(1 + rounds):
        base.load_state_dict(clean)
        wall, cpu = time.perf_counter(), time.process_time()
        zk.replay(base, path)
        found.append(((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count))
    return found[1:], bits_of(base)


def of_steps(shape: str, dtype: str, batch: int, sequence: int, rounds: int, warm: int) -> Iterator[dict[str, Any]]:
    base = steps.make_model(shape, torch.device("cpu"), harness.DTYPES[dtype])
    weights = sum(p.numel() for p in base.parameters())
    with tempfile.TemporaryDirectory() as folder:
        found = in_processes(2, 0.0, shared, base, batch, sequence, rounds, warm, folder)
    common = {
        "model": shape, "weights": weights, "dtype": dtype, "points": 2 * QUERIES, "batches": BATCHES, "batch": batch, "sequence": sequence,
    }  # fmt: skip
    first = found["times"][CONTENDERS[0].name]
    for one in CONTENDERS:
        times = found["times"][one.name]
        yield row(
            "step", one.name, [wall for wall, _ in times], [sum(cpu) for _, cpu in times],
            **common, ranks=one.ranks, parallel=one.parallel, journal=int(one.journal), sent_bytes=found["sent"].get(one.name, ""),
            busiest_median_s=harness.significant(statistics.median(max(cpu) for _, cpu in times)),
            ratio=ratio((a / b for (a, _), (b, _) in zip(times, first, strict=True))),
            cpu_ratio=ratio(sum(a) / sum(b) for (_, a), (_, b) in zip(times, first, strict=True)),
            busiest_ratio=ratio(max(a) / max(b) for (_, a), (_, b) in zip(times, first, strict=True)),
            same_bits=int(found["bits"][one.name] == found["bits"][CONTENDERS[0].name]),
        )  # fmt: skip
    times, bits = found["replay"]
    walls, cpus = zip(*times, strict=True)
    wall, cpu = statistics.median(wall for wall, _ in first), statistics.median(max(cpu) for _, cpu in first)
    yield row(
        "replay", "a recorded step", walls, cpus, **common, ranks=1, journal=1, busiest_median_s=harness.significant(statistics.median(cpus)),
        ratio=harness.significant(statistics.median(walls) / wall, 4), cpu_ratio=harness.significant(statistics.median(cpus) / cpu, 4),
        same_bits=int(bits == found["bits"][CONTENDERS[0].name]),
    )  # fmt: skip


def ratio(values: Any) -> float:
    return harness.significant(statistics.median(values), 4)


# ---- rounds ------------------------------------------------------------------------------------------------------------------


class Ring(zk.Workers):
    """Each sends to the next one what came from the one before it: gloo's all-gather."""

    def _exchange(self, mine: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
        found = mine.new_empty(sum(lengths)).split([*lengths])
        dist.all_gather([*found], mine, group=self._group)
        return found


class Tree(zk.Workers):
    """Each sends all that it has, first to the one before it, then to the one two before it, then four, and so on (Bruck et al., 1997)."""

    def _exchange(self, mine: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
        found = torch.cat([mine, mine.new_empty(sum(lengths) - len(mine))]).view(self.size, -1)
        waits, has = [], 1
        while has < self.size:  # who says at once that it is ready is sent to at once
            more = min(has, self.size - has)
            waits.append(dist.irecv(found[has : has + more], group=self._group, group_src=(self.rank + has) % self.size, tag=has))
            has += more
        sent, has = [], 1
        for wait in waits:
            more = min(has, self.size - has)
            sent.append(dist.isend(found[:more], group=self._group, group_dst=(self.rank - has) % self.size, tag=has))
            wait.wait()
            has += more
        for one in sent:
            one.wait()
        return found.roll(self.rank, 0).unbind()


EXCHANGES: dict[str, type[zk.Workers]] = {"losses": zk.Workers, "a ring": Ring, "a tree": Tree}


def exchanged(rank: int, rounds: int, many: int) -> dict[str, tuple[list[tuple[float, float]], int]]:
    """(seconds, processor seconds of all processes) of one exchange of a few losses, so many times; and the bytes that each sent."""
    teams = {name: kind(dist.group.WORLD) for name, kind in EXCHANGES.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in teams}
    for number in range(1 + rounds):
        for name, team in teams.items():
            dist.barrier()
            team.sent, wall, cpu = 0, time.perf_counter(), time.process_time()
            for _ in range(many):
                losses, _ = team.round("a table", common={"lr": 1.0}, values=[1.0, float(rank)], counts=[2] * team.size)
            taken = (time.perf_counter() - wall) / many, (time.process_time() - cpu) / many
            assert losses == [[1.0, float(k)] for k in range(team.size)], (name, losses)
            all_of: list[Any] = [None] * team.size
            dist.all_gather_object(all_of, taken)
            if number:
                found[name].append((max(wall for wall, _ in all_of), sum(cpu for _, cpu in all_of)))
    return {name: (times, teams[name].sent // many) for name, times in found.items()}


def of_rounds(counts: tuple[int, ...], rounds: int, many: int, link: float = 0.0) -> Iterator[dict[str, Any]]:
    for count in counts:
        for name, (times, sent) in in_processes(count, link, exchanged, rounds, many).items():
            walls, cpus = zip(*times, strict=True)
            question = "far round" if link else "round"
            yield row(question, name, walls, cpus, ranks=count, link_s=link or "", sent_bytes=sent if name == "losses" else "")


def row(question: str, contender: str, walls: Any, cpus: Any, **more: Any) -> dict[str, Any]:
    cpu = harness.Timing(tuple(cpus)).columns()
    return {
        **dict.fromkeys(COLUMNS, ""), "question": question, "contender": contender, "threads": 1, **harness.Timing(tuple(walls)).columns(),
        **{f"cpu_{name}": value for name, value in cpu.items() if name != "rounds"}, **more,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--append", action="store_true", help="add rows to the file")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; the figures mean nothing")
    args = parser.parse_args(arguments)
    shape, sequence = ("llama-tiny", 8) if args.quick else ("llama-15m", 16)
    rounds = 1 if args.quick else args.rounds
    table = harness.Table(args.out, COLUMNS, args.append)
    made: list[Iterator[dict[str, Any]]] = []
    if "round" in args.questions:
        made.append(of_rounds((2, 3) if args.quick else (2, 4, 8, 16, 32), rounds, 3 if args.quick else MANY))
    if "far round" in args.questions:
        if why := apart.refused():
            print(f"far round: left out: {why}", flush=True)
        else:
            made.append(of_rounds((3,) if args.quick else (2, 4, 8), rounds, 1 if args.quick else MANY_FAR, LINK))
    if "step" in args.questions:
        made += [
            of_steps(shape, dtype, 4, sequence, rounds, 1 if args.quick else FIRST)
            for dtype in args.dtype[: 1 if args.quick else None]
        ]
    for rows in made:
        for one in rows:
            table.add(one)
            print(
                f"{one['question']:9} {one['contender']:26} {one['dtype']:9} {one['ranks']} {1e3 * one['median_s']:.4g} ms",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
