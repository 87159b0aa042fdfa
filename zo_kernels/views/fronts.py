"""What stands before the modules' parameters in a scratch step: shadows, or the values themselves.

Belongs here: which of both, and the check that a forward left them as they were. Does not belong here: how they are put there (shadow.py).

Where the values of all weights fit into the buffer's size at once (adapters, norms, a small model), the modules get these, in memory of their own,
and no Python of ours runs inside a forward. Never those alone that an earlier step happened to read: a module must see the same kind of tensor
in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from torch import nn

from zo_kernels import looks
from zo_kernels.views.base import changed
from zo_kernels.views.buffer import Buffer, Fill
from zo_kernels.views.memory import empty
from zo_kernels.views.shadow import PerturbedWeight, Placed

_OWN = attrgetter("__dict__")
_ASKS = looks.Look("requires_grad")
_VALUES = looks.Look("_version", "requires_grad", "data_ptr", "grad")  # all that a forward may have done to a value

Sites = Mapping[nn.Module, Sequence[tuple[str, PerturbedWeight]]]  # a module's attributes, with the shadows that stand for them


class Fronts:
    """`places`: one of each module. `fitting`: the shadows whose values modules get in their stead; none where they do not fit."""

    def __init__(self, sites: Sites, fitting: Sequence[PerturbedWeight], buffer: Buffer) -> None:
        self.sites, self.fitting, self.buffer = sites, fitting, buffer
        self.places: list[Placed] = []
        self.modules: list[nn.Module] = []  # of `places`, one for each attribute
        self.attributes: list[str] = []
        self.made_of: Fill | None = None  # `resident` when `places` were made
        self.resident: Fill | None = None  # the values of `fitting`
        self.beside = 0  # how many parameters were held when it was made
        self.shown: dict[int, PerturbedWeight] = {}  # by the ids of its values
        self.asks: looks.Columns = ([],)  # whether its values asked for a gradient when they were made
        self.lie_at: looks.Columns = ([],)  # the addresses of its values
        self.filled: looks.Columns = ([],)  # the versions of its values after the pass
        self.bare: list[None] = []  # no value has a gradient

    def prepare(self) -> None:
        """For a step."""
        held = self.buffer.forward.held
        if self.fitting and (self.resident is None or self.beside != len(held)):
            room = [empty(s.clean.shape, s.clean.dtype, s.clean.device) for s in self.fitting]
            self.resident, self.beside = self.buffer.fill_of([[s] for s in self.fitting], room), len(held)
            self.shown = {id(self.resident.values[(id(s),)][0]): s for s in self.fitting}
            values = self.resident.written
            self.asks, self.lie_at, self.bare = _ASKS.at(values), looks.ADDRESSES.at(values), [None] * len(values)
        there = self.resident.values if self.resident else {}
        if not self.places or self.made_of is not self.resident:
            self.made_of = self.resident
            self.places = [
                Placed(module, {a: there[(id(s),)][0] if (id(s),) in there else s for a, s in attributes})
                for module, attributes in self.sites.items()
            ]
            self.modules = [place.module for place in self.places for _ in place.values_shown]
            self.attributes = [attribute for place in self.places for attribute in place.values_shown]

    def place(self) -> None:
        for place in self.places:
            place.place()

    def remove(self) -> None:
        for place in self.places:
            place.remove()

    def keep(self) -> None:
        """The step is done: parameters that the closure added stay."""
        for place in self.places:
            if place.touched:
                place.keep()

    def write(self) -> None:
        """The values of the next forward, from clean weights: those that were held after `resident` was made are in it too."""
        if self.resident:
            self.buffer.write(self.resident)
            self.filled = looks.VERSIONS.at(self.resident.written)

    def check(self, names: Mapping[int, str]) -> bool:
        """After a forward. Whether a value has a gradient.

        Raises:
            RuntimeError: it changed a value, or put something else in its place.
        """
        values = self.resident.written if self.resident else []
        before = (*self.filled, *self.asks, *self.lie_at, self.bare)
        if touched := bool(values) and _VALUES.first_change(values, before) >= 0:
            for look, before, how in (
                (looks.VERSIONS, self.filled, "written to"),
                (_ASKS, self.asks, "changed"),
                (looks.ADDRESSES, self.lie_at, "moved or converted"),
            ):
                if (k := look.first_change(values, before)) >= 0:
                    raise changed(names[id(self.shown[id(values[k])].param)], how)
        if not all(map(dict.__contains__, map(_OWN, self.modules), self.attributes)):
            place, attribute = next(
                (place, a) for place in self.places for a in place.values_shown if a not in place.module.__dict__
            )
            raise changed(names[id(place.parameters[attribute])], "perturbed by another step")
        return touched

    def spoiled(self) -> None:
        """A step failed, whatever its closure set in the values."""
        self.resident = None

    def release(self) -> None:
        self.resident = self.made_of = None
        self.places, self.modules, self.attributes = [], [], []
