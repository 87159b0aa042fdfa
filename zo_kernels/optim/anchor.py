"""A pull back toward the weights that a run began with.

Belongs here: when it is due, and which weights those are. Does not belong here: the arithmetic (views/work.py), where a step has it (run.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks, journal
from zo_kernels.parameters import canonical_name

LEAST = 2.0**-126  # below it numbers are 0 where fp32 flushes them


@dataclass(frozen=True)
class Anchor:
    """theta <- theta + lam (theta_0 - theta) at the end of every `every`-th step that is not skipped, behind its update: decay toward the weights that the run
    began with, where weight decay goes toward 0. Of an adapter whose B begins at 0 it is that.

    In fp32, each of the three operations rounded, and to nearest in 16 bits: what is less than half a unit in the last place there is lost, so that 16-bit
    weights want a larger `lam` more rarely.

    Args:
        lam: in (0, 1], an fp32 number.
        every: steps between two pulls.
        base: theta_0 by parameter name, such as a state dict: it is read tensor by tensor, each brought to its weight's device for as long as it is needed.
            ``safetensors.torch.load_file(path)`` and ``torch.load(path, mmap=True)`` leave the bytes in the file. A replay has them by definition, and copies
            them to host memory before it begins; a journal's header has `lam` and `every`.
    """

    lam: float
    every: int = 1
    base: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    digests: dict[str, str] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )  # of the base's tensors, once they were asked for
    name: ClassVar[str] = "anchor"

    def __post_init__(self) -> None:
        if not LEAST <= checks.check_fp32("lam", self.lam) <= 1:
            raise ValueError(f"lam={self.lam!r} must be in (0, 1], and not 0 in fp32: the share of the way back to the start")
        if checks.check_word("every", self.every) < 1:
            raise ValueError("every=0: give a number of steps, at least 1")
        if self.base is not None and not isinstance(self.base, Mapping):
            raise TypeError(
                f"base is a {type(self.base).__name__}: give a mapping from parameter names to tensors, such as a state dict"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchor:
        return self  # nobody writes to it, and copies of an optimizer began with the same weights

    def due(self, step: int) -> bool:
        """Whether the step of this number (0: the first) ends with a pull."""
        return (step + 1) % self.every == 0

    def of(self, name: str) -> Tensor:
        """theta_0 of a parameter.

        Raises:
            ValueError: there is none.
        """
        try:
            return journal.find(self.base or {}, name)
        except KeyError as error:
            raise ValueError(
                f"anchor: the base has no {name!r} ({error.args[0]}): give the weights that the run begins with of all that is trained"
            ) from error

    def fingerprint(self, names: Collection[str]) -> str:
        """One SHA-256 over the base of these parameters, whatever their order, wrappers and devices: what a saved state knows it by."""
        for name in names:
            if (bare := canonical_name(name)) not in self.digests:
                self.digests[bare] = journal.digest(self.of(name))
        return hashlib.sha256(
            "\n".join(sorted(f"{bare} {self.digests[bare]}" for bare in map(canonical_name, names))).encode()
        ).hexdigest()

    def check(self, params: Mapping[str, Tensor], begins: Collection[str] = ()) -> None:
        """That the base is of these parameters; of those with which the run `begins`, that it is where they stand, to the bit.

        Raises:
            ValueError: it is not; names the first parameter.
        """
        for name, p in params.items():
            theta = self.of(name)
            if theta.shape != p.shape:
                raise ValueError(
                    f"anchor: the base's {name!r} has the shape {tuple(theta.shape)}, the weight {tuple(p.shape)}: it is of another model"
                )
            if theta.untyped_storage().data_ptr() == p.untyped_storage().data_ptr():
                raise ValueError(
                    f"anchor: the base's {name!r} is the weight itself, which steps move: give a copy, or a file's tensors"
                )
            if name in begins and not torch.equal(theta.to(p.device, p.dtype), p.detach()):
                raise ValueError(
                    f"anchor: {name!r} is not what the base has: a run is pulled toward the weights that it begins with; give those, or load the state "
                    "of a run that goes on"
                )
