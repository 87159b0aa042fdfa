"""What a run over sharded weights may do: each worker has a part of them, all evaluate the same losses, and what is kept or measured of whole tensors has no
parts yet.

Belongs here: what is refused, and why. Does not belong here: where a part lies (zo_kernels/shards.py), how workers meet (workers.py).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from zo_kernels import shards
from zo_kernels.optim import deferred, directions
from zo_kernels.optim.method import Method
from zo_kernels.optim.workers import Workers, workers_in
from zo_kernels.parameters import Named
from zo_kernels.views import View

WRONG = "the model's weights are sharded (DTensor), and "


def made_of(named: Named, mode: str, recorded: bool) -> dict[str, list[str]]:
    """What processes have in common that make an optimizer together: with sharded weights it is made by collectives."""
    pairs = [pair for group in named.groups for pair in group["params"]]
    mine = {id(p) for _, p in pairs}
    frozen = [(name, p) for name, p in (named.model.named_parameters() if named.model is not None else ()) if id(p) not in mine]
    own = [[f"{key}={group[key]!r}" for key in ("lr", "eps", "weight_decay", "maximize") if key in group] for group in named.groups]
    words = {"perturbation": [mode], "journal": ["one" if recorded else "none"]}
    words["parameter groups (a weight_decay makes one more)"] = [", ".join(one) or "one without numbers of its own" for one in own]
    return words | {
        what: [shards.said(*pair) for pair in some] for what, some in (("parameters", pairs), ("frozen parameters", frozen))
    }


def workers_of(
    named: Named, method: Method, mode: str, recorded: bool, first_order: Any, process_group: Any, parallel: str, timeout: float
) -> Workers | None:
    """Those of an optimizer of these parameters; None without a process group.

    Raises:
        TypeError, ValueError: the run could not be made; says why. WorkerError: see `Workers`. Nothing was changed.
    """
    visited = deferred.visited(named.model, mode == "scratch")
    found = workers_in(process_group, parallel, timeout, lambda: made_of(named, mode, recorded), visited)
    check(named, method, found, process_group, mode == "lazy", first_order)
    return found


def check(named: Named, method: Method, workers: Workers | None, process_group: Any, lazy: bool, first_order: Any) -> None:
    """Tell the workers of a model with sharded parameters that they have one between them.

    Raises:
        TypeError, ValueError: the run could not be made; says why. Nothing was changed.
    """
    params = [(n, p) for g in named.groups for n, p in g["params"]]
    parts = [(n, p) for n, p in params if shards.is_part(p)]
    if not parts and not shards.parted(named.model):
        return
    if named.model is None:
        raise TypeError(WRONG + "the optimizer has no module, whose forwards gather them: give the module, or model=...")
    if workers is None:
        raise ValueError(
            WRONG
            + "process_group=None: each process would step its part with losses of its own; give process_group=torch.distributed.group.WORLD, or the "
            "group of all processes that have a part"
        )
    if workers.parallel not in ("auto", "data"):
        raise ValueError(
            WRONG
            + f"parallel={workers.parallel!r} would have the processes at other points at a time, while they gather each other's parts: leave parallel out, "
            "or take 'data'"
        )
    ranks = set(dist.get_process_group_ranks(process_group))
    for name, p in ((n, p) for n, p in named.model.named_parameters() if shards.is_part(p)):
        if strangers := sorted(set(p.device_mesh.mesh.flatten().tolist()) - ranks):  # type: ignore[attr-defined]
            raise ValueError(
                WRONG
                + f"parts of {name!r} are on the ranks {strangers}, which are not in process_group: give the group of all that have a part"
            )
    lines = [p.device_mesh.mesh for p in named.model.parameters() if shards.is_part(p)]  # type: ignore[attr-defined]
    apart = shards.gathers(named.model) and all(mesh.ndim == 1 and mesh.numel() == len(ranks) for mesh in lines)
    if workers.parallel == "data" and not apart:
        raise ValueError(
            WRONG
            + "parallel='data' is for processes that each have whole layers in a forward: fully_shard alone, of the outermost module too, over all of "
            "process_group; or leave parallel out"
        )
    for name, p in parts:
        shards.place_of(name, p)
    if lazy:
        raise ValueError(
            WRONG + "lazy=True leaves them perturbed between steps, where a forward would gather them so: leave lazy out"
        )
    if first_order is not None:
        raise ValueError(WRONG + "first_order backpropagates through gathered ones: leave it out")
    if method.estimator.dual:
        raise ValueError(WRONG + "ForwardGradient() has no tangents of gathered ones: take TwoSided()")
    if not isinstance(method.direction, (directions.Dense, directions.RandomSparse)):
        raise ValueError(
            WRONG + f"direction={type(method.direction).__name__}() is made of whole tensors: take Dense() or RandomSparse()"
        )
    if method.projection is not None or method.anchor is not None:
        part = "projection" if method.projection is not None else "anchor"
        raise ValueError(WRONG + f"{part} needs whole tensors at the end of a step: leave it out")
    for group in named.groups:
        for what in ("mask", "scale"):
            if group.get(what) is not None:
                raise ValueError(WRONG + f"a parameter group has a {what} of its own, made for whole tensors: leave it out")
    workers.alike, workers.apart = True, apart


def found(view: View, workers: Workers | None) -> None:
    """Raises RuntimeError: the view has parts that were whole when the optimizer was made, or that are a copy's."""
    if view.parted and (workers is None or not workers.alike):
        raise RuntimeError(
            WRONG + "they were not when the optimizer was made, or this is a copy of it: make a new one of the sharded module"
        )


def refuse(what: str, workers: Workers | None) -> None:
    """Raises ValueError: `what` evaluates a model in one process, and this one is sharded."""
    if workers is not None and workers.alike:
        raise ValueError(
            WRONG + f"{what} evaluates in one process, which would wait for the others: call it on the model before it is sharded"
        )
