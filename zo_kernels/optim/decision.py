"""What a step decides: a few fp32 numbers and flags for every group, from which weights and state follow.

Belongs here: the `Decision`, in the two forms that it has (numbers on the host, tensors on a device), and its journal record; each is the inverse of the
other. Does not belong here: how it is reached (decide.py), what it does to weights (rules.py, run.py), when it is written (record.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels import journal
from zo_kernels.views import Coefficient, Tag


@dataclass(frozen=True)
class Share:
    """One parameter group's share of a decision. Numbers are floats, or 0-d float64 tensors with fp32 values.

    `tags`: of the step's directions. `coefs`: the rule's numbers of the record. `go`: False (or a 0-d bool tensor): the step is skipped, and
    changes neither weights nor state.
    """

    group: int
    tags: Sequence[Tag]
    coefs: Sequence[Coefficient]
    decay: Coefficient
    rounding: str
    go: Any

    def live(self, c: Coefficient) -> Coefficient:
        """c, or on a device 0 in a step that is skipped; the host does not do its work."""
        return torch.where(self.go, c, 0.0) if isinstance(self.go, Tensor) else c

    def either(self, new: Tensor, old: Tensor) -> Tensor:
        """`new`, or on a device `old` in a step that is skipped."""
        return torch.where(self.go, new, old) if isinstance(self.go, Tensor) else new


@dataclass(frozen=True)
class Decision:
    """One step's numbers.

    Attributes:
        tag: of its first direction. decay [G] (1 - lr weight_decay), coefs [G][T]: fp32 numbers, the coefficients in the order of `Method`: the rule's,
            the projection's, the direction's.
        eps: [G], of a run in place, whose passes round; else None.
        rounding: of the update. flushed: the weights stood ahead and were brought back before the step.
        loss, gradient: what it tells people. clipped: |g| was. go: False: skipped.
        failed: "plus" or "minus": no step, but the passes of one whose forward at theta + eps z, or theta - eps z, failed; else "".
    """

    tag: Tag
    decay: Sequence[Coefficient]
    coefs: Sequence[Sequence[Coefficient]] = ()
    eps: Sequence[Coefficient] | None = None
    rounding: str = "nearest"
    flushed: bool = False
    loss: Any = float("nan")
    gradient: Any = float("nan")
    go: Any = True
    clipped: Any = False
    failed: str = ""

    @property
    def known(self) -> bool:
        """Whether the host knows the numbers; otherwise they are tensors on a device."""
        return not isinstance(self.go, Tensor)

    def share(self, group: int, tags: Sequence[Tag], own: int) -> Share:
        """`own`: how many numbers are the rule's."""
        return Share(group, tags, self.coefs[group][:own], self.decay[group], self.rounding, self.go)

    # -- what the losses told --

    def told(self, values: Sequence[float], behind: Sequence[float] = ()) -> Decision:
        """With what the losses told: loss, g, whether all is finite, whether it was clipped, and the coefficients [G * n], as numbers.

        Args:
            behind: numbers of the first group's record behind those; of a step that is skipped zeros.
        """
        loss, gradient, go, clipped, *flat = values
        groups = len(self.decay)
        n = len(flat) // groups
        rest = [list(behind) if go else [0.0] * len(behind), *([[0.0] * len(behind)] * (groups - 1))]
        flat = flat if go else [0.0] * len(flat)
        coefs = [[*flat[k * n : (k + 1) * n], *rest[k]] for k in range(groups)]
        decay = self.decay if go else [1.0] * groups
        # Not `replace`, which reads every field by its name: once a step.
        return Decision(
            self.tag, decay, coefs, self.eps, self.rounding, self.flushed, loss, gradient, bool(go), bool(clipped), self.failed
        )

    def unread(self, values: Tensor, decay: Sequence[Coefficient]) -> Decision:
        """`told` without reading: `values` float64 on a device, whose numbers become 0-d tensors."""
        go, coefs = values[2] != 0, values[4:].reshape(len(decay), -1)
        return replace(
            self,
            loss=values[0],
            gradient=values[1],
            go=go,
            clipped=values[3] != 0,
            coefs=[list(c.unbind()) for c in coefs],
            decay=decay,
        )

    def unknown(self) -> Tensor:
        """What `told` takes, float64, of a decision that was not read."""
        return torch.stack(
            [
                torch.as_tensor(x).double()
                for x in (self.loss, self.gradient, self.go, self.clipped, *(c for g in self.coefs for c in g))
            ]
        )

    # -- a journal record --

    def entry(self) -> dict[str, Any]:
        """The arguments of `journal.Writer.append`."""
        return {
            "tag": self.tag,
            "coefs": self.coefs,
            "decay": self.decay,
            "eps": self.eps,
            "loss": self.loss,
            "gradient": self.gradient,
            "skipped": not self.go,
            "clipped": self.clipped,
            "stochastic": self.rounding == "stochastic",
            "flushed": self.flushed,
            "failed": self.failed or None,
        }


def decisions(header: journal.Header, records: np.ndarray) -> Iterator[Decision]:
    """The decisions of a journal's records, in order."""
    groups = records["groups"]
    coefs = groups["coef"].reshape(len(records), header.groups, header.terms).tolist()
    decays, tags, flags = groups["decay"].tolist(), records["tag"].tolist(), records["flags"].tolist()
    losses, gradients = records["loss"].tolist(), records["gradient"].tolist()
    epses = [None] * len(records) if header.perturbation == "scratch" else groups["eps"].tolist()
    bits = journal.FLAGS
    for tag, word, decay, eps, coef, loss, gradient in zip(tags, flags, decays, epses, coefs, losses, gradients, strict=True):
        yield Decision(
            tag=tag,
            decay=decay,
            coefs=coef,
            eps=eps,
            rounding="stochastic" if word & bits["stochastic"] else "nearest",
            flushed=bool(word & bits["flushed"]),
            loss=loss,
            gradient=gradient,
            go=not word & bits["skipped"],
            clipped=bool(word & bits["clipped"]),
            failed="plus" if word & bits["failed_plus"] else "minus" if word & bits["failed_minus"] else "",
        )
