"""What lies below all that is trained runs once: the hidden states that come out of a model's lower blocks, and forwards that begin with them.

Belongs here: where the cut is, the states as data, the blocks that step aside for the time of a forward. Does not belong here: whether a run keeps states
and what shows that they are right (cached.py), scores (scoring.py).

For the time of a forward each block below the cut has a `forward` of its own that gives back the kept states. Nothing else of the model is touched: the list
keeps its length and its modules, parameters keep their names, and what a model computes before its blocks, such as embeddings and the positions that OPT and
GPT-2 add to them, is computed and thrown away, which is cheap.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetune.blocks import blocks_of
from zo_finetune.narrow import Narrow
from zo_finetune.stand_ins import standing_in
from zo_kernels.quantized import is_trained

Tokens = tuple[int, ...]


class CannotKeep(Exception):
    """Why no states can be kept, in words that follow a colon."""


class _Enough(Exception):
    """The states are there; the rest of the forward is not needed."""


def cuts_of(model: nn.Module, forward: Callable[[], Any]) -> dict[nn.Parameter, int]:
    """Of each trained parameter, how many blocks come before what reads it: all of them, where that is behind them.

    Args:
        forward: makes one forward of the model. Modules with trained parameters are noted as it calls them, so that tied weights count where they are read
            first; one that it does not call counts by its name, or as the first of all.
    """
    name, blocks = blocks_of(model)
    owners = {n: m for n, m in model.named_modules() if any(map(is_trained, m.parameters(recurse=False)))}
    first = {n: next((k for k in range(len(blocks)) if n.startswith(f"{name}.{k}.") or n == f"{name}.{k}"), 0) for n in owners}
    ended: set[int] = set()
    called: dict[str, int] = {}

    def begins(owner: str) -> None:
        called.setdefault(owner, len(ended))

    handles = [b.register_forward_hook(lambda *_, k=k: ended.add(k)) for k, b in enumerate(blocks)]
    handles += [m.register_forward_pre_hook(lambda *_, n=n: begins(n)) for n, m in owners.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[nn.Parameter, int] = {}
    for n, module in owners.items():
        for p in module.parameters(recurse=False):
            if is_trained(p):
                found[p] = min(called.get(n, first[n]), found.get(p, len(blocks)))
    return found


def cut_of(model: nn.Module, forward: Callable[[], Any]) -> int:
    """How many blocks come before the first one that reads a trained parameter; arguments as `cuts_of`'s."""
    return min(cuts_of(model, forward).values(), default=len(blocks_of(model)[1]))


class Lower:
    """The first `cut` blocks of a model."""

    def __init__(self, model: nn.Module, cut: int) -> None:
        self.name, blocks = blocks_of(model)
        self.cut, self.total = cut, len(blocks)
        self.blocks = [blocks[k] for k in range(cut)]
        self.width, self.dtype = 0, torch.float32  # of states, once they were recorded
        self._wrapped: list[Callable[[Tensor], Any]] = []  # what each returns, made of states

    @contextlib.contextmanager
    def recording(self, stop: bool = True) -> Iterator[list[Tensor]]:
        """A forward inside puts the states that the last block returns into the list; with `stop` it ends there.

        Raises:
            CannotKeep: the blocks pass on more than one tensor, or are not called once each, in order.
        """
        found: list[Tensor] = []
        order: list[int] = []
        wrapped: list[Callable[[Tensor], Any]] = []

        def saw(k: int, output: Any) -> None:
            order.append(k)
            wrapped.append(_form(output))
            if k == self.cut - 1:
                found.append((output if isinstance(output, Tensor) else output[0]).detach())
                if stop:
                    raise _Enough

        handles = [block.register_forward_hook(lambda m, a, output, k=k: saw(k, output)) for k, block in enumerate(self.blocks)]
        try:
            with contextlib.suppress(_Enough):
                yield found
        finally:
            for handle in handles:
                handle.remove()
        if order != list(range(self.cut)):
            raise CannotKeep("its blocks are not called once each, one after the other")
        self._wrapped, self.width, self.dtype = wrapped, found[0].shape[-1], found[0].dtype

    def instead(self, states: Tensor) -> contextlib.AbstractContextManager[None]:
        """Forwards inside take `states` for what the last of these blocks returns, and run none of them."""
        return standing_in(
            {block: lambda *_, wrap=wrap, **__: wrap(states) for block, wrap in zip(self.blocks, self._wrapped, strict=True)}
        )


class Once:
    """Forwards of some batches that run the lower blocks once for each: what the last of these blocks returns is noted in a batch's first forward, and its
    later ones begin with it. For the time in which no weight of these blocks changes, as in a step that moves others."""

    def __init__(self, lower: Lower) -> None:
        self.lower = lower
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # by the ids of the batches' tokens, which are kept for their ids

    @contextlib.contextmanager
    def forward(self, input_ids: Tensor) -> Iterator[None]:
        """One forward inside, of the batch with these tokens."""
        if (seen := self._seen.get(id(input_ids))) is not None:
            with self.lower.instead(seen[1]):
                yield
            return
        with self.lower.recording(stop=False) as found:
            yield
        self._seen[id(input_ids)] = input_ids, found[0]


def _form(output: Any) -> Callable[[Tensor], Any]:
    """From states to what a block returns. Raises CannotKeep: it returns more than states."""
    if isinstance(output, Tensor):
        return lambda states: states
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and all(more is None for more in output[1:]):
        return lambda states: (states, *output[1:])
    raise CannotKeep("its blocks pass on more than the hidden states")


def room(tokens: int, lower: Lower, folder: Path | None) -> Tensor:
    """[tokens, H]: memory for states; with a folder, of a file on its disk that has no name: it is gone when nothing refers to it, however the process ends.

    Raises:
        OSError: the disk is full.
    """
    if folder is None:
        return torch.empty(tokens, lower.width, dtype=lower.dtype)
    size = tokens * lower.width * lower.dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=lower.dtype).view(tokens, lower.width)


class States:
    """The states of some inputs, unpadded, in host memory or on disk."""

    def __init__(self, lower: Lower) -> None:
        self.lower = lower
        self.stores: list[Tensor] = []  # [T, H] each, those of many inputs one after another
        self.places: dict[Tokens, tuple[Tensor, int]] = {}  # of each input, the store and its first row there
        self.narrow: Narrow | None = None  # what of forwards that begin with them runs at the scored positions alone

    @property
    def bytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    def bytes_of(self, inputs: Iterable[Tokens]) -> int:
        """What the states of more inputs take."""
        return sum(map(len, inputs)) * self.lower.width * self.lower.dtype.itemsize

    def of(self, inputs: Sequence[Tokens], width: int, device: torch.device) -> Tensor | None:
        """[R, width, H], 0 behind each input's end; None where one of them is not kept."""
        if not all(tokens in self.places for tokens in inputs):
            return None
        padded = torch.zeros(len(inputs), width, self.lower.width, dtype=self.lower.dtype)
        for row, tokens in zip(padded, inputs, strict=True):
            store, start = self.places[tokens]
            row[: len(tokens)] = store[start : start + len(tokens)]
        return padded.to(device)
