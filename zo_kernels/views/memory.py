"""Memory of views: how it is laid out, how much of it, and which tensors share it.

Belongs here: addresses and bytes. Does not belong here: what is written there (buffer.py, pieces.py, held.py).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from zo_kernels.views.reads import walk

T = TypeVar("T")

ALIGNMENT = 256  # bytes: what torch's CUDA allocator gives, so that matrix kernels choose the same code path as for the weight


def default_scratch_bytes(devices: Iterable[torch.device]) -> int:
    """The size of the buffer: what lies in the cache that the matrix products read it from.

    On a GPU half of the L2 cache of an H100 and most of an A100's, and room for a bias beside the matrix of 32 MiB that models of 1.3 billion weights
    have (2048 x 8192 in 16 bits): without it OPT-1.3B takes four fills a layer instead of three. On a CPU a share of the last level.
    """
    return 33 << 20 if any(d.type == "cuda" for d in devices) else 1 << 22


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that may be written to at any time, whatever mode the closure is in."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operation says it writes to."""
    for k, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for t in walk(args[k] if k < len(args) else kwargs.get(argument.name)):
                if isinstance(t, Tensor) and not t.is_meta:
                    yield t


def span(t: Tensor) -> tuple[int, int]:
    """Where a tensor's memory begins and ends: a view's counts from its first to its last element."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    start = t.data_ptr()
    return start, start + (last + 1) * t.element_size()


class _Spans(Generic[T]):
    """The owners of one storage, which may be a whole model's: found by where they begin, in the order in which they were given."""

    def __init__(self, known: Sequence[tuple[Tensor, T]]) -> None:
        found = sorted(((*span(t), place, owner) for place, (t, owner) in enumerate(known)), key=itemgetter(0))
        self.starts, self.ends, self.places, self.owners = (list(column) for column in zip(*found, strict=True))
        self.reach = list(itertools.accumulate(self.ends, max))  # of this one and those that begin before it

    def meeting(self, start: int, end: int) -> list[T]:
        """Those whose memory meets these addresses."""
        found, k = [], bisect.bisect_left(self.starts, end) - 1
        while k >= 0 and self.reach[k] > start:
            if self.ends[k] > start:
                found.append((self.places[k], self.owners[k]))
            k -= 1
        return [owner for _, owner in sorted(found, key=itemgetter(0))]


class Owners(Generic[T]):
    """Whose memory a tensor shares. `known`: tensors, each with what stands for it in an answer; those without elements are nobody's."""

    def __init__(self, known: Iterable[tuple[Tensor, T]]) -> None:
        by_storage: dict[int, list[tuple[Tensor, T]]] = {}
        for t, owner in known:
            if t.numel() and not t.is_meta and t.layout == torch.strided:
                by_storage.setdefault(t.untyped_storage().data_ptr(), []).append((t, owner))
        self.by_storage = {storage: _Spans(found) for storage, found in by_storage.items()}

    def of(self, t: Any) -> list[T]:
        if not isinstance(t, Tensor):
            return []
        with torch._C.DisableTorchFunctionSubclass():
            if t.is_meta:
                return []
            try:
                storage = t.untyped_storage().data_ptr()
            except (NotImplementedError, RuntimeError):  # sparse, or a subclass without memory of its own
                return []
            return spans.meeting(*span(t)) if (spans := self.by_storage.get(storage)) is not None else []
