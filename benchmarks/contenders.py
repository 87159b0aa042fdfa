"""What is timed in a pass over weights, on any device: our features, and the expressions that users of PyTorch write today.

Belongs here: the work itself, one function each, shared by cpu_pass.py, gpu_pass.py and scaling.py. Does not belong here: measuring
(harness.py), sizes and rounds (the scripts), torch.compile, whose evidence of fusion differs from device to device (the scripts).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import zo_kernels as zk
from zo_kernels import _backends as registry
from zo_kernels.plan import Pass, Plan, make_plans

EPS = 1e-3
ROW = 4096  # row length of the scales per row
FEATURES = (
    *("K=1", "K=2", "K=8", "K=64", "device terms", "out of place", "decay", "stochastic", "bit mask", "random mask", "row scales"),
    "rademacher",
)

# ---- ours -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """One pass over one tensor. `bytes`: what it moves at least; `terms`: noises added to every weight."""

    plan: Plan
    record: Pass
    bytes: int
    terms: int


def ours(feature: str, p: Tensor, other: Tensor) -> Ours:
    """The pass of a name in `FEATURES` (or any K=...) over `p`, planned once, as an optimizer does. `other`: the target of out of place."""
    terms = int(feature[2:]) if feature.startswith("K=") else 1
    more: dict[str, Any] = {}
    n, device = p.numel(), p.device
    size = 2 * p.nbytes
    if feature == "bit mask":
        more["masks"] = [torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, device=device)]  # keeps about half
        size += (n + 7) // 8
    elif feature == "random mask":
        more["masks"] = [zk.RandomMask(0.5, tag=1)]
    elif feature == "row scales":
        more["scales"] = [(torch.rand(-(-n // ROW), device=device) + 0.5, ROW)]
    elif feature == "out of place":
        more["out"] = [other]
    (plan,) = make_plans([p], [1], **more)
    kind = "rademacher" if feature == "rademacher" else "gaussian"
    rounding = "stochastic" if feature == "stochastic" else "nearest"
    decay = 0.9999 if feature == "decay" else None
    return Ours(plan, Pass(0, *terms_of(feature, terms, device), decay, kind, rounding), size, terms)


def terms_of(feature: str, terms: int, device: torch.device) -> tuple[Any, Any]:
    """Tags and coefficients as numbers or, where a run would have them on the device, as tensors. Signs alternate, so that weights
    do not run away however often a pass is repeated."""
    tags, coefs = list(range(terms)), [EPS * (-1) ** k for k in range(terms)]
    if terms < 64 and feature != "device terms":
        return tags, coefs
    return torch.tensor(tags, device=device), torch.tensor(coefs, dtype=torch.float32, device=device)


def has(feature: str, dtype: torch.dtype) -> bool:
    """Whether a feature means anything for this type: fp32 results are not rounded to 16 bits."""
    return not (feature == "stochastic" and dtype == torch.float32)


def available(device: torch.device) -> dict[str, ModuleType]:
    """Our backends that can run on this device, the reference aside; says why the others cannot."""
    result = {}
    for name in registry.PREFERENCE[device.type]:
        module = registry.load(name)
        reason = module.status() or module.supports(device)
        if name == "reference":
            continue
        if reason:
            notice(f"{name} left out: {reason}")
        else:
            result[name] = module
    return result


def notice(text: str) -> None:
    """What a run leaves out, and why, for whoever watches it."""
    print(text, file=sys.stderr, flush=True)


# ---- others -----------------------------------------------------------------------------------------------------------


def normal_add(p: Tensor) -> Tensor:
    """A fresh tensor of noise, then one addition."""
    return p.add_(torch.normal(0.0, 1.0, size=p.shape, dtype=p.dtype, device=p.device), alpha=EPS)


def normal_reused(p: Tensor, z: Tensor) -> Tensor:
    """The same with noise in memory that is there already, as who keeps a buffer of the largest tensor's size writes it."""
    return p.add_(z.normal_(), alpha=EPS)


def randn_add(p: Tensor) -> Tensor:
    """The same with `randn_like`, for torch.compile, which can generate it inside the loop and `torch.normal` not."""
    return p.add_(torch.randn_like(p), alpha=EPS)


def mezo(p: Tensor) -> None:
    """The expression of MeZO's public code for one parameter."""
    z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
    p.data = p.data + 1 * z * EPS


def foreach_list(parts: list[Tensor]) -> None:
    """A list of parameters, and one fused addition for all of them."""
    torch._foreach_add_(parts, [torch.randn_like(part) for part in parts], alpha=EPS)


def foreach_add(p: Tensor) -> None:
    """A list of 64 parameters, as a model has them."""
    foreach_list(list(p.chunk(64)))


def foreach_reused(p: Tensor, z: Tensor) -> None:
    """The same, tensor by tensor through memory that is there already and stays in the caches."""
    parts = list(p.chunk(64))
    for part in parts:
        part.add_(z[: part.numel()].normal_(), alpha=EPS)


def stateless_add(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Any] | str:
    """`add_` of PyTorch's own stateless noise, `torch.func._random.normal`, or the reason why it is left out here."""
    try:
        random = importlib.import_module("torch.func._random")
    except ImportError:
        return f"torch {torch.__version__} has no torch.func._random"
    try:
        key = random.key(0, device=device)
        random.normal(key, 8, dtype=dtype)
    except (NotImplementedError, RuntimeError) as error:
        return f"torch.func._random does not serve {dtype} on {device.type}: {str(error).splitlines()[0][:80]}"

    def stateless(p: Tensor) -> Tensor:
        return p.add_(random.normal(key, p.shape, dtype=p.dtype), alpha=EPS)

    return stateless
