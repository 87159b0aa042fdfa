"""One pass of an update rule over weights and state, with its noise, beside torch's fused optimizers fed with z as a gradient.

    python benchmarks/rule_pass.py --device cpu|cuda --out rule_pass.csv [--quick]

Belongs here: passes with state (`zo_kernels.update`). Does not belong here: passes that are lists of terms (cpu_pass.py, gpu_pass.py).

`torch`: `normal_` into a gradient buffer, times g, then torch.optim's SGD with momentum or Adam, `fused=True`: its fastest way, with 4 more
bytes a weight for the buffer. HiZOO and a recomputed Adam have no counterpart there: `torch` is their arithmetic, operation by operation. A
plain pass of one term, `perturb`, is what the noise and the weights alone cost; `rewrite`, the yardstick of the percentages, reads every byte of
the weights and writes it back. All are timed in the same rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from torch import Tensor

from zo_kernels import _backends as registry
from zo_kernels import update
from zo_kernels.plan import Pass, make_plans

G, LR, DECAY, BETA1, BETA2, EPS = 0.3, 1e-4, 1.0, 0.9, 0.999, 1e-8
HISTORY = 16
# name -> (rule, dtypes of its states)
VARIANTS: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "momentum": ("momentum", (torch.float32,)),
    "momentum, bf16 state": ("momentum", (torch.bfloat16,)),
    "adam": ("adam", (torch.float32, torch.float32)),
    "hizoo": ("hizoo", (torch.float32,)),
    f"adam, {HISTORY} records": ("adam_history", ()),
}
COLUMNS = ("backend", "device", "dtype", "rule", "threads", "weights", "contender", *harness.TIMING_COLUMNS)
COLUMNS += ("gweights_per_s", "bytes_per_weight", "gb_per_s", "percent_of_rewrite", "ratio_to_torch")


def rule_pass(rule: str) -> update.RulePass:
    numbers: dict[str, list[float]] = {
        "momentum": [1, DECAY, LR, BETA1],
        "adam": [1, DECAY, LR, BETA1, 1 - BETA1, BETA2, 1 - BETA2, 1.0, EPS],
        "hizoo": [1, DECAY, LR * G, 1e-6, 0.5, 1e-4, 1e4],
        "adam_history": [1, DECAY, LR, EPS],
    }
    if rule == "adam_history":
        tags, coefs = list(range(HISTORY)), [G / HISTORY] * HISTORY
        return update.RulePass(0, tags, coefs, "gaussian", "nearest", rule, numbers[rule], [G * G / HISTORY] * HISTORY)
    return update.RulePass(0, [7], [1.0 if rule == "hizoo" else G], "gaussian", "nearest", rule, numbers[rule])


def torch_step(rule: str, theta: Tensor, states: list[Tensor]) -> Callable[[], Any]:
    """What a user of torch writes, at its fastest."""
    z = torch.empty_like(theta)
    if rule in ("momentum", "adam"):
        p = torch.nn.Parameter(theta)
        p.grad = z
        groups = [p]
        fused: torch.optim.Optimizer = (
            torch.optim.SGD(groups, LR, momentum=BETA1, fused=True)
            if rule == "momentum"
            else torch.optim.Adam(groups, LR, (BETA1, BETA2), EPS, fused=True)
        )

        def optimizer() -> None:
            z.normal_().mul_(G)
            fused.step()

        return optimizer
    if rule == "hizoo":
        (h,) = states

        def hizoo() -> None:
            z.normal_()
            h.add_(h * (z.float().square_().mul_(0.5).sub_(1).mul_(1e-6))).clamp_(1e-4, 1e4)
            theta.addcdiv_(z, h.sqrt().to(theta.dtype), value=-LR * G)

        return hizoo

    def history() -> None:
        m, v = torch.zeros_like(theta, dtype=torch.float32), torch.zeros_like(theta, dtype=torch.float32)
        for _ in range(HISTORY):
            z.normal_()
            m.add_(z, alpha=G / HISTORY)
            v.addcmul_(z, z, value=G * G / HISTORY)
        theta.addcdiv_(m.to(theta.dtype), v.sqrt_().add_(EPS).to(theta.dtype), value=-LR)

    return history


@torch.no_grad()
def rows(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    gpu = device.type == "cuda"
    weights = (1 << 17 if quick else 1 << 28 if gpu else 1 << 24) + 18  # whole 32-bit words for the yardstick, no whole group of 16
    for backend in ("cuda", "triton") if gpu else ("cpu",):
        if reason := registry.load(backend).status():
            print(f"{backend} left out: {reason}", file=sys.stderr)
            continue
        module = registry.load(backend)
        for dtype in harness.DTYPES:
            for name, (rule, kinds) in VARIANTS.items():
                theta = torch.full((weights,), 0.02, dtype=harness.DTYPES[dtype], device=device)
                states = [torch.full((weights,), 1.0, dtype=kind, device=device) for kind in kinds]
                (plan,) = make_plans([theta], [1])
                p, one = rule_pass(rule).on(device), Pass(0, [7], [LR])
                baseline = torch_step(rule, theta.clone(), [s.clone() for s in states])
                contenders: dict[str, Callable[[], Any]] = {
                    "rule pass": lambda m=module, plan=plan, s=states, p=p: m.update(plan, [s], p),  # type: ignore[misc]
                    "perturb": lambda m=module, plan=plan, one=one: m.perturb(plan, one),  # type: ignore[misc]
                    "torch": baseline,
                    "rewrite": lambda theta=theta: harness.rewrite_(theta),  # type: ignore[misc]
                }
                timings = harness.interleaved(contenders, rounds=2 if quick else 7, device=device)
                moved = {
                    "rule pass": 2 * (theta.element_size() + sum(s.element_size() for s in states)),
                    "perturb": 2 * theta.element_size(),
                    "rewrite": 2 * theta.element_size(),
                }
                yardstick = weights * moved["rewrite"] / timings["rewrite"].median
                for contender, timing in timings.items():
                    size = moved.get(contender)
                    rate = weights * size / timing.median if size else None
                    yield {
                        "backend": backend,
                        "device": device.type,
                        "dtype": dtype,
                        "rule": name,
                        "threads": "" if gpu else torch.get_num_threads(),
                        "weights": weights,
                        "contender": contender,
                        **timing.columns(),
                        "gweights_per_s": harness.significant(weights / timing.median / 1e9, 4),
                        "bytes_per_weight": size or "",
                        "gb_per_s": harness.significant(rate / 1e9, 4) if rate else "",
                        "percent_of_rewrite": harness.significant(100 * rate / yardstick, 3) if rate else "",
                        "ratio_to_torch": harness.significant(timings["torch"].median / timing.median, 4),
                    }


def main(arguments: list[str] | None = None) -> int:
    return harness.device_script(__doc__ or "", COLUMNS, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
