"""Parameters that are parts of larger tensors: torch's DTensors, as FSDP2 (`fully_shard`) and tensor parallelism (`parallelize_module`) make them.

Belongs here: what is such a part, its memory, where it lies in the whole tensor, the whole tensor, what a forward gathers of it, and giving that back. Does
not belong here: passes (plan.py), which runs parts can have (optim/sharded.py), how a forward sees a perturbation (views/gathered.py). Nothing is imported
of torch.distributed before a DTensor is there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_part(p: Any) -> bool:
    """Whether a parameter is a DTensor."""
    return hasattr(p, "placements") and hasattr(p, "device_mesh")


def memory_of(p: Tensor) -> Tensor:
    """The tensor that passes read and write: of a DTensor this process's part, and the parameter itself otherwise."""
    return p._local_tensor if is_part(p) else p  # type: ignore[attr-defined,no-any-return]


def forwards_on(p: Any) -> torch.device:
    """Where forwards have what is gathered of a DTensor: this process's part may lie in host memory (CPUOffloadPolicy)."""
    kind = p.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def whole(p: Tensor) -> Tensor:
    """The whole tensor. Of a DTensor every process of its mesh asks for it, in the same order."""
    return p.full_tensor() if is_part(p) else p  # type: ignore[attr-defined,no-any-return]


def as_part(p: Tensor, values: Tensor) -> Tensor:
    """Numbers of a parameter's elements, one for each that this process has, in the parameter's own form: of a DTensor the same part of one."""
    if not is_part(p):
        return values
    of: Any = p
    local = values.view(memory_of(p).shape)
    return type(of).from_local(local, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())  # type: ignore[no-any-return]


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are whole, or the same part of two DTensors."""
    if not (is_part(a) and is_part(b)):
        return is_part(a) == is_part(b)
    x, y = a, b  # type: Any, Any
    return x.placements == y.placements and x.device_mesh == y.device_mesh and memory_of(a).shape == memory_of(b).shape  # type: ignore[no-any-return]


def said(name: str, p: Any) -> str:
    """A parameter in words, the same on all processes that have a part of it."""
    return f"{name} {p.dtype} {tuple(p.shape)}" + (f" {p.placements}" if is_part(p) else "")


def place_of(name: str, p: Any) -> tuple[int, tuple[int, int] | None]:
    """Where this process's part of a DTensor lies: the index of its first element in the whole tensor, and (width, pitch) of a block of columns
    (`plan.Entry`), or None of elements one behind another.

    Raises:
        ValueError: the part is none of the two, or a term of a sum; says what to do.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # whoever has a DTensor has loaded it

    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"parameter {name!r} has the placements {p.placements}: a term of a sum is no part of a weight; redistribute it"
        )
    whole_shape, mine = tuple(p.shape), tuple(memory_of(p).shape)
    shape, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    if tuple(shape) != mine:
        raise ValueError(
            f"parameter {name!r} has a local tensor of shape {mine}, and its placements {p.placements} on the mesh say {tuple(shape)}: it was replaced; "
            "shard the whole tensor anew (distribute_tensor)"
        )
    if not math.prod(mine):
        return 0, None
    cut = [d for d, (own, full) in enumerate(zip(mine, whole_shape, strict=True)) if own != full]
    if not cut:
        return 0, None
    last = cut[-1]
    if any(0 < d < last for d in cut):
        raise ValueError(
            f"parameter {name!r} of shape {whole_shape} is sharded in its dimensions {cut}: parts of the first dimension and of one other are "
            "supported; shard it otherwise"
        )
    steps = [math.prod(whole_shape[d + 1 :]) for d in range(len(whole_shape))]
    first = sum(at * step for at, step in zip(start, steps, strict=True))
    return first, (mine[last] * steps[last], whole_shape[last] * steps[last]) if last else None


def parted(model: nn.Module | None) -> bool:
    """Whether some parameter of the model is a part."""
    return model is not None and any(map(is_part, model.parameters()))


def gathers(module: nn.Module) -> bool:
    """Whether it is one of FSDP2's, whose forward gathers whole parameters."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def gathering(model: nn.Module | None) -> list[Any]:
    """FSDP2's modules, those outside before those within."""
    return [module for module in model.modules() if gathers(module)] if model is not None else []


def settle(model: nn.Module | None) -> None:
    """FSDP's modules keep what they gathered for a forward, the outermost always: parts again, so that the next forward gathers what they are then."""
    for module in gathering(model):
        module.reshard()


def recover(model: nn.Module | None) -> None:
    """Behind a forward that failed: FSDP's modules that it was within take it for under way, and keep what they gathered."""
    within: set[int] = set()
    for module in gathering(model):
        if id(module) not in within and hasattr(module, "reset_iter_state"):  # of torch 2.13
            with contextlib.suppress(AttributeError):  # torch looks for what the first forward makes
                module.reset_iter_state()
        within.update(map(id, module.modules()))
    settle(model)


def ungathered(model: nn.Module) -> str:
    """Why forwards do not read every trained weight as one that FSDP2 has gathered whole, in its own dtype; "" where they do, as far as can be seen without
    gathering them."""
    inside = {id(p) for module in gathering(model) for p in module.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and not (is_part(p) and id(p) in inside):
            return f"{name!r} is in no module of fully_shard, which would gather it"
    for module in gathering(model):
        dtype = getattr(getattr(module._get_fsdp_state(), "_mp_policy", None), "param_dtype", None)
        if other := [name for name, p in module.named_parameters() if p.requires_grad and dtype not in (None, p.dtype)]:
            return f"MixedPrecisionPolicy gathers {other[0]!r} as {dtype}, in which c z would be rounded once more than in an unsharded model"
    return ""


def wholes(model: nn.Module, params: Iterable[Tensor]) -> dict[int, Tensor]:
    """What FSDP2 gathers of these parameters, by their ids. The tensors stay the same, their memory comes and goes: each unit is gathered once for it, by
    all processes."""
    wanted, found = {id(p) for p in params}, dict[int, Tensor]()
    for unit in gathering(model):
        places = [
            (m._parameters, name, p) for m in unit.modules() for name, p in m._parameters.items() if id(p) in wanted - found.keys()
        ]
        if places:
            unit.unshard()
            found |= {id(p): whole for there, name, p in places if (whole := there[name]) is not None and whole is not p}
            unit.reshard()
    return found
