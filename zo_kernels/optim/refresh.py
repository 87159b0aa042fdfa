"""Which view serves the next step: made anew if a parameter was frozen, unfrozen, added, replaced, moved or converted, and one for each block.

Belongs here: from parameter groups to a view, and whether it is still true. Does not belong here: how a view works (views/), what is done with it
(schedule.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zo_kernels import checks, parameters, shards, views
from zo_kernels.optim.run import Run
from zo_kernels.parameters import Weights
from zo_kernels.views import View

Groups = Sequence[Mapping[str, Any]]  # torch's parameter groups, with 'param_names'


def active(groups: Groups) -> list[tuple[int, str, Tensor]]:
    """(group, name, parameter) of all that are not frozen. A group whose list was edited is refused where its weights are made."""
    return [(k, n, p) for k, g in enumerate(groups) for n, p in zip(g["param_names"], g["params"], strict=False) if p.requires_grad]


def trained(groups: Groups) -> dict[str, Tensor]:
    """The parameters that are not frozen, by name."""
    return {n: p for _, n, p in active(groups)}


def view_over(groups: list[Weights], model: nn.Module | None, run: Run, mode: str, scratch_bytes: int | None) -> View:
    """The view of these weights in a run of this mode, the journal's word."""
    options: dict[str, Any] = {"seed": run.seed, "kind": run.method.kind, "backend": run.backend}
    if mode != "scratch" or model is None:
        return views.InPlace(groups, model, mode == "lazy", **options)
    if any(weights.parted for weights in groups):
        return views.GatheredCopies(groups, model, **options)
    if run.method.estimator.dual:
        return views.Tangents(groups, model, scratch_bytes, **options)
    away = any(views.place_of(p) is not None for weights in groups for p in weights.params)
    return (views.Visiting if away else views.Scratch)(groups, model, scratch_bytes, **options)


class Owner(Protocol):
    """Whose weights the views are of."""

    def view_of(self, groups: list[Weights]) -> View:
        """A view of these weights."""
        ...

    def flush(self) -> None:
        """Is called before the weights are looked at anew."""

    def found(self, view: View) -> None:
        """Is called with a new view, and may refuse it."""


class Views:
    """The views of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.now: View | None = None
        self.made: dict[int | None, View] = {}  # by block
        self.blocks: list[list[str]] = []  # their parameters

    def _block(self) -> int | None:
        """Of the next step."""
        blocks = self.run.method.blocks
        return blocks.at(self.run.steps, len(self.blocks), self.run.seed) if blocks is not None and self.blocks else None

    def _among(self, block: int | None) -> Collection[str] | None:
        """The parameters that a step may change; None: all."""
        moving = self.run.direction.moving(self.run.streams)
        return moving if block is None else set(self.blocks[block]).intersection(self.blocks[block] if moving is None else moving)

    def _current(self, view: View, groups: Groups, block: int | None) -> bool:
        among = self._among(block)
        return (
            len(view.groups) == len(groups)
            and all(w.current(g, among) for w, g in zip(view.groups, groups, strict=True))
            and not view.moved()
        )

    def refresh(self, groups: Groups, owner: Owner) -> View:
        """The view of the next step's weights. Nothing is kept of the owner: an optimizer that is let go is gone.

        Raises:
            ValueError: a step could not take the groups as they are; says why. Whatever `owner.found` raises.
        """
        block = self._block()
        view = self.made.get(block)
        if self.now is not None and view is not self.now:
            self.now.release()  # another block's: one buffer is enough
        if view is not None and self._current(view, groups, block):
            self.now = view
            return view
        with torch.inference_mode(False):
            return self._anew(groups, owner, view)

    def _anew(self, groups: Groups, owner: Owner, view: View | None) -> View:
        """In the place of this one."""
        run = self.run
        owner.flush()
        if view is not None:
            self.made.clear()
        present = active(groups)
        if run.method.blocks is not None:
            self.blocks = run.method.blocks.split([n for _, n, _ in present])
        block = self._block()
        among = self._among(block)
        mine = [(n, shards.memory_of(p), run.streams[n]) for _, n, p in present if among is None or n in among]
        run.direction.expect(mine)
        weights = [
            Weights.of_group(
                g, run.streams, among, lambda n, p: run.direction.limits(n, p, run.streams[n]), run.method.direction.update_differs
            )
            for g in groups
        ]
        together: dict[Any, list[tuple[str, Tensor]]] = {}
        for m in (m for w in weights for m in w.members):
            together.setdefault(parameters.block_of(m.tensor), []).append((f"parameter {m.name}", m.tensor))
        for named in together.values():  # blocks of an offloaded model take turns in the same memory
            checks.check_overlap(named, "a step updates each weight once")
        parameters.check_apart(weights, [(n, p) for _, n, p in present])
        view = owner.view_of(weights)
        view.mask_tag = run.direction.mask_tag
        owner.found(view)
        self.now = self.made[block] = view
        return view
