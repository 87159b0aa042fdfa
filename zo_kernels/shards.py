"""Parameters that are parts of larger tensors: torch's DTensors, as FSDP2 (`fully_shard`) and tensor parallelism (`parallelize_module`) make them.

Belongs here: what is such a part, its memory, where it lies in the whole tensor, the whole tensor, and giving back what a forward has gathered. Does not
belong here: passes (plan.py), which runs parts can have (optim/sharded.py). Nothing is imported of torch.distributed before a DTensor is there.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


def is_part(p: Any) -> bool:
    """Whether a parameter is a DTensor."""
    return hasattr(p, "placements") and hasattr(p, "device_mesh")


def memory_of(p: Tensor) -> Tensor:
    """The tensor that passes read and write: of a DTensor this process's part, and the parameter itself otherwise."""
    return p._local_tensor if is_part(p) else p  # type: ignore[attr-defined,no-any-return]


def whole(p: Tensor) -> Tensor:
    """The whole tensor. Of a DTensor every process of its mesh asks for it, in the same order."""
    return p.full_tensor() if is_part(p) else p  # type: ignore[attr-defined,no-any-return]


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


def settle(model: nn.Module | None) -> None:
    """FSDP's modules keep what they gathered for a forward, the outermost always: parts again, so that the next forward gathers what they are then."""
    for module in model.modules() if model is not None else ():
        if gathers(module):
            module.reshard()  # type: ignore[operator]
