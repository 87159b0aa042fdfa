"""Whether hundreds of things are what they were: looks at each forward, at tensors and at what modules hold.

Belongs here: the looks, in the extension where it is built and in loops of Python's own C where it is not; both find the same. Does not belong here: what is
looked at, and what is said of a change (parameters.py, views/).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor

from zo_kernels._backends._extension import extension

_C = extension()

Columns = tuple[list[Any], ...]  # for each attribute that is asked for, of each tensor in order


class Look:
    """At these attributes of tensors: fields, and methods without arguments."""

    def __init__(self, *names: str) -> None:
        self.descriptors = tuple(getattr(Tensor, name) for name in names)
        self.getters = tuple(d if callable(d) else attrgetter(name) for d, name in zip(self.descriptors, names, strict=True))

    def at(self, tensors: Sequence[Tensor]) -> Columns:
        return tuple(list(map(get, tensors)) for get in self.getters)

    def first_change(self, tensors: list[Tensor], before: Columns) -> int:
        """The place of the first tensor that is not as it was; -1: there is none."""
        if not isinstance(_C, str):
            found: int = _C.first_change(tensors, self.descriptors, before)
            return found
        now = self.at(tensors)
        if now == before:
            return -1
        return min(k for a, b in zip(now, before, strict=True) for k in range(len(a)) if a[k] != b[k])


VERSIONS, ADDRESSES = Look("_version"), Look("data_ptr")
WRITES = Look(
    "_version", "data_ptr"
)  # both at once, where each tensor has a count: memory that a forward has pushed out is fetched for one look
MEMORY = Look("dtype", "data_ptr", "numel", "stride")  # a part of a tensor's memory, or its transpose, begins where the whole did
TRAINED = Look("requires_grad", "dtype", "data_ptr", "numel", "stride")


def first_replaced(owners: list[Any], table: str, names: list[Any], values: list[Any]) -> int:
    """The place of the first owner that has something else than this value under this name of its `table`, a dict; -1: there is none."""
    if not isinstance(_C, str):
        found: int = _C.first_replaced(owners, table, names, values)
        return found
    there = map(is_not, map(dict.get, map(attrgetter(table), owners), names), values)
    return next((k for k, other in enumerate(there) if other), -1)
