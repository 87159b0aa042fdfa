"""theta + c z in the weights' own memory.

Belongs here: the order of passes over the weights, where they stand between them, and the way back. Does not belong here: as base.py says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import looks
from zo_kernels.interrupts import uninterrupted
from zo_kernels.parameters import Weights
from zo_kernels.views.base import View
from zo_kernels.views.work import Coefficient, Shift, Tag, Terms, Work


def _add(*lists: Sequence[tuple[Tag, Coefficient]]) -> list[tuple[Tag, Coefficient]]:
    """The sum of lists of terms, one term a tag (a tensor is the same tag as itself only)."""
    total: dict[int, tuple[Tag, Coefficient]] = {}
    for terms in lists:
        for tag, c in terms:
            key = -1 - id(tag) if isinstance(tag, Tensor) else tag
            total[key] = tag, (total[key][1] + c if key in total else c)
    return list(total.values())


class InPlace(View):
    """theta + c z in the weights' own memory; `at` is where each group stands, which between two steps is (), or the next step's
    first perturbation if `execute` was told to go ahead to it."""

    def __init__(self, groups: Sequence[Weights], model: nn.Module | None, lazy: bool = False, **options: Any) -> None:
        super().__init__(groups, model, **options)
        self.lazy, self.mode = lazy, "lazy" if lazy else "inplace"
        self.at: list[Shift] = [()] * len(groups)  # true while `whole`

    def _anew(self, **options: Any) -> InPlace:
        return InPlace(self.groups, self.model, **options)

    @contextlib.contextmanager
    def step(self, recorded: bool = False) -> Iterator[None]:
        """If a forward fails, the weights go back, to within the rounding of the passes; `seen` then tells which passes there were."""
        self.seen = 0
        try:
            yield
        except BaseException:
            self._undo()
            if recorded:
                self.at = [()] * len(self.groups)
            else:
                seen = self.seen
                self.restore()
                self.seen = seen
            raise

    def see(self, shifts: Sequence[Shift]) -> None:
        self.settle()
        with uninterrupted():
            self.whole = False
            for k, shift in enumerate(shifts):
                self.run(Terms(k, _add(shift, [(tag, -c) for tag, c in self.at[k]])), update=False)
                self.at[k] = shift
            self.whole, self.seen = True, self.seen + 1
        self.expect()
        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, not by its version

    def restore(self) -> bool:
        if not any(self.at):
            return False
        if looks.ADDRESSES.first_change(self.trained, self.lie_at) >= 0:
            # Moved or converted between two lazy steps: the new memory stands at theta + shift as the old one did.
            self.groups = [replace(w) for w in self.groups]
            self._found_at(self.groups)
        with torch.no_grad():
            self.see([()] * len(self.groups))
        return True

    def standing(self) -> list[Shift]:
        return list(self.at)

    def stand(self, at: Sequence[Shift]) -> None:
        self.at = list(at)

    def execute(self, works: Iterable[Work], *, from_clean: bool = False, ahead: Sequence[Shift] | None = None) -> None:
        """Terms over whole groups are one pass with the way back and the way ahead: with theta' = theta + shift the weights as they are,
        decay (theta' - shift) + terms + ahead = decay theta' + (terms - decay shift + ahead)."""
        if from_clean or any(w.update_plans is not w.plans for w in self.groups):
            self.restore()  # with the scales of the perturbation
        works = list(works)
        terms = [work.whole for work in works if work.whole is not None]
        merged = len(terms) == len(works) and [one.group for one in terms] == list(range(len(self.groups)))
        if not merged:
            self.restore()
        with uninterrupted():
            torch.clear_autocast_cache()
            self.whole = False
            if merged:
                for k, one in enumerate(terms):
                    target = ahead[k] if ahead else ()
                    back = [(tag, -c * one.decay) for tag, c in self.at[k]]
                    self.run(Terms(k, _add(one.terms, back, target), one.decay, one.rounding), update=True)
                    self.at[k] = target
            else:
                for work in works:
                    work.do(self)
            self.whole = True

    def snapshot(self, from_clean: bool) -> Callable[[], None]:
        if from_clean:
            self.restore()
        at, copied = list(self.at), super().snapshot(from_clean)

        def back() -> None:
            copied()
            self.at = at
            self.restore()

        return back

    def ahead(self, tag: Tag, eps: Sequence[Coefficient]) -> list[Shift] | None:
        if not self.lazy or not isinstance(tag, int) or tag + 1 >= 1 << 32:
            return None
        return [[(tag + 1, e)] for e in eps]
