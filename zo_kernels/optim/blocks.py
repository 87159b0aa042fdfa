"""Which parameters take part in a step: one block of them, and the order in which blocks come.

Belongs here: names to blocks, steps to blocks. Does not belong here: what is done to a block's weights.

Every parameter has a noise stream of its own, so two blocks of one shape never see the same z, whatever the tags.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from zo_kernels import checks
from zo_kernels.parameters import canonical_name
from zo_kernels.patterns import Patterns, check_patterns

ORDERS = ("cyclic", "random")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Blocks:
    """Block-wise zeroth-order steps: one block is perturbed and updated, the others are not touched or copied.

    Args:
        by: "layer": the parameters under one number in their names (``layers.7.``) are a block, all without a number are another; or a sequence of
            regular expressions, each of which names a block: a parameter belongs to the first that matches a part of its name, or, if none does,
            of its canonical name.
        order: "cyclic", or "random": drawn from the seed, each block with the same probability.
        every: steps until the next block.
    """

    by: str | Sequence[str] = "layer"
    order: str = "cyclic"
    every: int = 1
    name: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        checks.check_choice("order", self.order, ORDERS)
        if checks.check_word("every", self.every) < 1:
            raise ValueError("every=0: give a number of steps, at least 1")
        if isinstance(self.by, str):
            checks.check_choice("by", self.by, ("layer",))
            return
        object.__setattr__(self, "by", check_patterns("by", self.by))

    def split(self, names: Sequence[str]) -> list[list[str]]:
        """The blocks, in order.

        Raises:
            ValueError: a parameter belongs to no block, or a pattern names none.
        """
        found: dict[int, list[str]] = {}
        by = None if self.by == "layer" else Patterns("by", self.by)
        for name in names:
            if by is None:
                number = _LAYER.search(name)
                found.setdefault(int(number[1]) if number else -1, []).append(name)
                continue
            at = by.first(name)
            if at is None and (canonical := canonical_name(name)) != name:
                at = by.first(canonical)
            if at is None:
                raise ValueError(f"blocks: parameter {name!r} matches none of {list(self.by)}: add a pattern, or freeze it")
            found.setdefault(at, []).append(name)
        if self.by != "layer" and (empty := [p for k, p in enumerate(self.by) if k not in found]):
            raise ValueError(f"blocks: the pattern {empty[0]!r} matches no parameter: leave it out")
        return [found[k] for k in sorted(found)]

    def at(self, step: int, count: int, seed: int) -> int:
        """The block of a step."""
        turn = step // self.every
        if self.order == "cyclic":
            return turn % count
        return int.from_bytes(hashlib.sha256(f"block {seed} {turn}".encode()).digest()[:8], "little") % count
