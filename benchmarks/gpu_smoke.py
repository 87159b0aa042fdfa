"""A line for each part of the library that must run on a GPU, and its result: the first minute on a new machine.

    python benchmarks/gpu_smoke.py --out smoke.csv [--device cpu]

Belongs here: one small run of each part, compared with the reference or with a replay. Does not belong here: every case (tests -m gpu), time as a
figure. On the CPU steps run with the tests' emulated graph: that proves this script.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
import rule_pass
import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import _backends as registry
from zo_kernels import update as rules
from zo_kernels.plan import make_plans

COLUMNS = ("part", "backend", "device", "seconds", "result")


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def on_both(work: Callable[[list[Tensor], str], None], device: torch.device, backend: str, n: int = 3) -> bool:
    """Whether work on these tensors writes on the device what the reference writes."""
    there = [torch.full((4097,), 0.02, device=device) for _ in range(n)]
    here = [torch.full((4097,), 0.02) for _ in range(n)]
    work(there, backend)
    work(here, "reference")
    return all(same(a, b) for a, b in zip(there, here, strict=True))


def of_kernels(device: torch.device, backend: str) -> Iterator[tuple[str, Callable[[], bool]]]:
    def sequence(t: list[Tensor], name: str) -> None:
        passes = [{"terms": [(k, 1e-3)], "decay": 0.999} for k in range(3)]
        zk.perturb_sequence_(t, passes, seed=1, streams=range(len(t)), backend=name)

    def low_rank(t: list[Tensor], name: str) -> None:
        left = (torch.arange(64 * 2) % 7 - 3.0).reshape(64, 2).to(t[0].device)
        right = (torch.arange(64 * 2) % 5 - 2.0).reshape(2, 64).to(t[0].device).t()
        zk.perturb_([t[0][:4096].view(64, 64)], [(1, 1e-3)], seed=1, streams=[1], factors=[(left, right)], backend=name)

    def inverse_root(t: list[Tensor], name: str) -> None:
        scale = torch.full((1,), 4.0, device=t[0].device)
        zk.perturb_(t[:1], [(1, 1e-3)], seed=1, streams=[1], scales=[(scale, 4097, "rsqrt")], backend=name)

    yield (
        "perturb_",
        lambda: on_both(lambda t, b: zk.perturb_(t, [(1, 1e-3)], seed=1, streams=[1, 2, 3], backend=b), device, backend),
    )
    yield "sequence", lambda: on_both(sequence, device, backend)
    yield "low rank", lambda: on_both(low_rank, device, backend)
    yield "inverse root", lambda: on_both(inverse_root, device, backend)
    for name in rules.RULES:

        def rule(t: list[Tensor], b: str, name: str = name) -> None:
            (plan,) = make_plans(t[:1], [1])
            states = [[s for s, _ in zip(t[1:], rules.RULES[name].states, strict=False)]]
            registry.load(b).update(plan, states, rule_pass.rule_pass(name).on(t[0].device))

        yield f"rule {name}", lambda rule=rule: on_both(rule, device, backend)


def of_steps(device: torch.device, backend: str, folder: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Graphed and plain steps with a journal, whose replay must have their bits."""

    def step(mode: str, graph: bool) -> bool:
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(9, 13), nn.Linear(13, 5)).half().to(device) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        path = folder / f"{backend}-{mode}-{graph}.zoj"
        made = zk.MeZOStep(models[0], lr=1e-2, seed=1, perturbation=mode, cuda_graph=graph, backend=backend, journal=path)

        def closure(x: Tensor) -> Tensor:
            loss: Tensor = models[0](x).float().square().mean()
            return loss

        for k in range(4):
            made.step(closure, [torch.full((4, 9), 0.1 * k, device=device).half()])
        captured = made._schedule.graphs.captured if made._schedule.graphs else {}
        made.close_journal()
        zk.replay(models[1], path)
        replayed = all(same(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
        return replayed and bool(captured) == graph

    for mode in ("scratch", "inplace"):
        for graph in (False, True):
            yield f"{'graphed ' * graph}{mode} step, journal, replay", lambda mode=mode, graph=graph: step(mode, graph)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args(arguments)
    device, table, worst = torch.device(args.device), harness.Table(args.out, COLUMNS), 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            from tests.optim import emulated_graph

            emulated_graph.install(patch)
        for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
            if (reason := registry.load(backend).status()) is not None:
                table.add(dict(zip(COLUMNS, ("all", backend, device.type, "", reason), strict=True)))
                worst = 1
                continue
            for part, work in (*of_kernels(device, backend), *of_steps(device, backend, Path(folder))):
                start = time.perf_counter()
                try:
                    result = "same bits" if work() else "OTHER BITS"
                except Exception as error:
                    result = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                seconds = harness.significant(time.perf_counter() - start, 3)
                table.add(dict(zip(COLUMNS, (part, backend, device.type, seconds, result), strict=True)))
                print(f"{backend:6} {part:34} {seconds:8.2f} s  {result}", flush=True)
                worst |= result != "same bits"
    return worst


if __name__ == "__main__":
    sys.exit(main())
