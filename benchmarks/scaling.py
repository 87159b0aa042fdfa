"""What a pass costs against size: elements up to the memory of the machine, terms, many small tensors, and the host's own share.

    python benchmarks/scaling.py --out scaling.csv [--device cuda] [--only size terms list host] [--quick]

Belongs here: four questions about growth, the same script on every device. Does not belong here: all contenders at one size
(cpu_pass.py, gpu_pass.py), whole steps (step.py).

`size`: one pass over one tensor of 2^16 elements and up, as far as memory goes. Small sizes stay in the caches, for every contender
alike, and show what a launch or a thread costs. `terms`: K noises in one pass. `list`: hundreds of tensors as LoRA has them, as one call
against loops and torch._foreach. `host`: MeZOStep on 400 tensors of 16 elements with a closure that returns constants, so that
nothing but Python, launches and the check of storages is left.

`calls` of a contender are made back to back and last some milliseconds; the device is synchronised before and after them. In the rounds
of one size all contenders are interleaved. What does not fit into memory, or would take minutes, is left out with a notice.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contenders
import harness
import torch
from contenders import notice
from step import EPS, LR, OURS, MezoLoop
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels.plan import Pass, make_plans

COLUMNS = (
    *("question", "contender", "device", "dtype", "threads", "weights", "tensors", "terms", "calls", *harness.TIMING_COLUMNS),
    *("bytes", "gb_per_s", "percent_of_rewrite", "gterms_per_s", "us_per_tensor"),
)
LASTING = 5e-3  # seconds that a timing lasts at least
SHARE = 0.8  # of the free memory that a size may take
SLOW = 1 << 27  # elements beyond which expressions are not timed on a CPU: torch.normal takes minutes there
TERMS = tuple(1 << k for k in range(11))
LISTS = ((200, 1 << 12), (200, 1 << 16), (1000, 1 << 12), (1000, 1 << 16))  # tensors, elements of each
HOST = 400  # tensors of the model without forwards
Work = dict[str, Callable[[], Any]]


def rows(
    question: str,
    work: Work,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: int,
    tensors: int = 1,
    terms: int = 1,
    nbytes: int | str = "",
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """All contenders of one size. Those called "copy" and "rewrite" add no terms; the second is the yardstick: like a pass it reads and writes the
    same memory."""
    calls = {name: harness.calls_lasting(function, LASTING, device) for name, function in work.items()}
    timings = harness.interleaved(work, rounds=rounds, device=device, calls=calls)
    for name, timing in timings.items():
        added = 0 if name in ("copy", "rewrite") else terms
        moves = nbytes != ""
        yield {
            "question": question,
            "contender": name,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "weights": weights,
            "tensors": tensors,
            "terms": added,
            "calls": calls[name],
            **timing.columns(),
            "bytes": nbytes,
            "gb_per_s": harness.significant(int(nbytes) / timing.median / 1e9) if moves else "",
            "percent_of_rewrite": harness.significant(100 * timings["rewrite"].median / timing.median, 4)
            if "rewrite" in work
            else "",
            "gterms_per_s": harness.significant(added * weights / timing.median / 1e9) if moves else "",
            "us_per_tensor": harness.significant(1e6 * timing.median / tensors),
        }


def ours(feature: str, p: Tensor, target: Tensor) -> Work:
    """The pass by every backend of this device, planned once."""
    made = contenders.ours(feature, p, target)
    return {
        name: lambda perturb=module.perturb: perturb(made.plan, made.record)  # type: ignore[misc]
        for name, module in contenders.available(p.device).items()
    }


# ---- the questions ----------------------------------------------------------------------------------------------------


def sizes(largest: int) -> list[int]:
    """2^16, 2^18, ... and the largest power of two that is allowed."""
    top = int(math.log2(largest))
    return [1 << k for k in sorted({*range(16, top + 1, 2), top})]


def by_size(device: torch.device, dtype: torch.dtype, largest: int, rounds: int) -> Iterator[dict[str, Any]]:
    free = harness.free_bytes(device) * SHARE
    for n in sizes(min(largest, int(free // (2 * dtype.itemsize)))):
        p, target = torch.zeros(n, dtype=dtype, device=device), torch.zeros(n, dtype=dtype, device=device)
        work: Work = {
            "copy": lambda target=target, p=p: target.copy_(p),  # type: ignore[misc]
            "rewrite": lambda p=p: harness.rewrite_(p),  # type: ignore[misc]
            **ours("K=1", p, target),
        }
        for name, function, tensors in (("normal_add", contenders.normal_add, 3), ("mezo", contenders.mezo, 6)):
            if tensors * p.nbytes > free or (n > SLOW and device.type == "cpu"):
                notice(f"left out: {name} with {n} weights of {dtype}: {'memory' if tensors * p.nbytes > free else 'time'}")
            else:
                work[name] = lambda function=function, p=p: function(p)  # type: ignore[misc]
        few = rounds if n <= 1 << 26 or device.type != "cpu" else min(rounds, 3)
        yield from rows("size", work, device=device, dtype=dtype, weights=n, nbytes=2 * p.nbytes, rounds=few)
        del p, target
        work.clear()
        gc.collect()


def by_terms(device: torch.device, dtype: torch.dtype, n: int, rounds: int) -> Iterator[dict[str, Any]]:
    p, target = torch.zeros(n, dtype=dtype, device=device), torch.zeros(n, dtype=dtype, device=device)
    for terms in TERMS:
        work: Work = {"copy": lambda: target.copy_(p), **ours(f"K={terms}", p, target)}
        yield from rows("terms", work, device=device, dtype=dtype, weights=n, terms=terms, nbytes=2 * p.nbytes, rounds=rounds)


def by_list(device: torch.device, dtype: torch.dtype, count: int, n: int, rounds: int) -> Iterator[dict[str, Any]]:
    params, targets = ([torch.zeros(n, dtype=dtype, device=device) for _ in range(count)] for _ in range(2))
    moved = [p.clone() for p in params]  # MeZO's expression gives its tensors new memory
    streams = list(range(count))
    (plan,) = make_plans(params, streams)
    record = Pass(0, [0], [contenders.EPS])

    def loop(function: Callable[[Tensor], Any], tensors: list[Tensor]) -> Callable[[], None]:
        def run() -> None:
            for t in tensors:
                function(t)

        return run

    work: Work = {
        "copy": lambda: torch._foreach_copy_(targets, params),
        **{
            name: lambda perturb=module.perturb: perturb(plan, record)  # type: ignore[misc]
            for name, module in contenders.available(device).items()
        },
        "perturb_ (checked anew)": lambda: zk.perturb_(params, [(0, contenders.EPS)], seed=0, streams=streams),
        "foreach": lambda: contenders.foreach_list(params),
        "normal_add, loop": loop(contenders.normal_add, params),
        "mezo, loop": loop(contenders.mezo, moved),
    }
    nbytes = 2 * count * params[0].nbytes
    yield from rows("list", work, device=device, dtype=dtype, weights=count * n, tensors=count, nbytes=nbytes, rounds=rounds)


def by_host(device: torch.device, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Two losses, so that every step has a gradient and does all of its passes; they wait on the device, as a model's do."""
    losses = itertools.cycle([torch.tensor(1.0, device=device), torch.tensor(0.5, device=device)])

    def closure() -> Tensor:
        return next(losses)

    def model() -> nn.Module:
        return nn.ParameterList([torch.zeros(16, device=device) for _ in range(count)])

    work: Work = {}
    for mode, arguments in OURS.items():
        if "cuda_graph" in arguments:
            continue  # a graph would repeat the constants of one step
        optimizer = zk.MeZOStep(model(), lr=LR, eps=EPS, **arguments)
        work[f"step, {mode}"] = lambda optimizer=optimizer: optimizer.step(closure)  # type: ignore[misc]
        work.setdefault("check of storages", optimizer._refresh)
    loop = MezoLoop(model(), LR, EPS)
    work["step, mezo"] = lambda: loop.step(closure)
    yield from rows("host", work, device=device, dtype=torch.float32, weights=16 * count, tensors=count, rounds=rounds)


# ---- running ----------------------------------------------------------------------------------------------------------


def answers(question: str, device: torch.device, quick: bool, rounds: int, largest: int) -> Iterator[Iterator[dict[str, Any]]]:
    """The measurements of one question, in parts that may run out of memory one by one."""
    on_cpu = device.type == "cpu"
    dtypes = list(harness.DTYPES.values())
    if question == "size":
        yield from (by_size(device, dtype, 1 << 18 if quick else largest, rounds) for dtype in dtypes)
    elif question == "terms":
        n = 1 << 12 if quick else 1 << 22 if on_cpu else 1 << 26
        yield from (by_terms(device, dtype, n, rounds) for dtype in dtypes)
    elif question == "list":
        shapes = ((8, 64),) if quick else LISTS
        yield from (by_list(device, dtype, *shape, rounds) for dtype in (torch.float32, torch.bfloat16) for shape in shapes)
    else:
        yield by_host(device, 8 if quick else HOST, rounds)


QUESTIONS = ("size", "terms", "list", "host")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=1 << 40, help="weights of the largest size; default: what memory holds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    results: list[dict[str, Any]] = []
    for question in args.only:
        for part in answers(question, device, args.quick, args.rounds, args.largest):
            try:
                for row in part:
                    results.append(row)
                    print(
                        f"{question:6} {row['contender']:24} {row['dtype']:9} {row['weights']:11} x {row['tensors']:4} tensors "
                        f"K={row['terms']:<5}{1e3 * row['median_s']:11.4f} ms {row['gb_per_s'] or 0:8.1f} GB/s",
                        flush=True,
                    )
            except (RuntimeError, MemoryError) as error:
                if not harness.out_of_memory(error):
                    raise
                notice(f"left out: the rest of {question}: {str(error).splitlines()[0]}")
            harness.write_csv(args.out, COLUMNS, results)  # after every part: an interrupted run keeps what it has
    return 0


if __name__ == "__main__":
    sys.exit(main())
