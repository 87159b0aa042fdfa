"""Which view serves the next step: made anew if a parameter was frozen, unfrozen, added, replaced, moved or converted, and one for each block.

Belongs here: from parameter groups to a view, and whether it is still true; who wrote to weights between two steps. Does not belong here: how a view works
(views/), what is done with it (schedule.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zo_kernels import checks, looks, parameters, shards, views
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


class Left:
    """The weights of a model, frozen ones too, as a step has left them. Writes through `.data` keep no count and are not seen, nor what is offloaded.

    Args:
        model: whose modules hold them; None: not known.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.view: View | None = None  # of the last step
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.groups: list[int] = []  # ids of what the groups had
        self.places: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        self.before: looks.Columns = ([], [])

    def look(self, groups: Groups, view: View) -> None:
        """A step of this view is done."""
        if view is not self.view:
            self.view = view
            self._find(groups)
        self.before = looks.WRITES.at(self._memories())

    def _find(self, groups: Groups) -> None:
        model = self.model
        self.groups = _ids(groups)
        pairs = [(n, p) for g in groups for n, p in zip(g["param_names"], g["params"], strict=False)]
        pairs += model.named_parameters() if model is not None else ()
        known = {id(p): (n, p) for n, p in reversed(pairs) if not p.is_meta and not p.is_inference() and views.place_of(p) is None}
        self.names, self.params = [n for n, _ in known.values()], [p for _, p in known.values()]
        places = [
            (module, attribute, p)
            for module in (model.modules() if model is not None and not shards.parted(model) else ())
            if isinstance(module._parameters, dict)
            for attribute, p in module._parameters.items()
            if p is not None and id(p) in known
        ]
        self.places = ([place[0] for place in places], [place[1] for place in places], [place[2] for place in places])

    def _memories(self) -> list[Tensor]:
        return [shards.memory_of(p) for p in self.params] if self.view is not None and self.view.parted else self.params

    def written(self, groups: Groups) -> str:
        """The name of a parameter that was written to, moved or replaced since, whose next look is at what is there then; "": none is known to be."""
        found = self._written(groups) if self.view is not None else ""
        if found:
            self.view = None
        return found

    @contextlib.contextmanager
    def untouched(self) -> Iterator[list[Tensor]]:
        """Of the weights that are put in the list, what is written within comes back to the bit, and counts as no write."""
        back: list[Tensor] = []
        view, first = self.view, looks.WRITES.at(self._memories())
        try:
            yield back
        finally:
            if view is not None and view is self.view:
                ids = set(map(id, back))
                for left, was, now in zip(self.before, first, looks.WRITES.at(self._memories()), strict=True):
                    left[:] = [n if id(p) in ids and w == k else k for p, k, w, n in zip(self.params, left, was, now, strict=True)]

    def _written(self, groups: Groups) -> str:
        if (k := looks.WRITES.first_change(self._memories(), self.before)) >= 0:
            return self.names[k]
        owners, attributes, held = self.places
        if (k := looks.first_replaced(owners, "_parameters", attributes, held)) >= 0:
            return next(name for name, p in zip(self.names, self.params, strict=True) if p is held[k])
        if (now := _ids(groups)) != self.groups:
            names = [n for g in groups for n in g["param_names"]]
            return next((n for n, i in zip(names, now, strict=False) if i not in self.groups), "one that left its group")
        return ""


def _ids(groups: Groups) -> list[int]:
    return [id(p) for g in groups for p in g["params"]]


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
