"""Weights that are away: blocks of a model's parameters lie in host memory or in files and visit the device one after another.

Belongs here: which block is there, how it comes and catches up with the steps that it missed, what notices that one is asked for. Does not belong here: where
its values lie (files.py), how a step perturbs it (visiting.py), which parameters are a block (offload.py).

A parameter of a block lies for good in one of two **slots**, which blocks share: its address stays, its values are there while the block visits. Any function
of torch that takes a parameter, or a tensor that shares its memory, asks first (`Reads`), and the block is brought in; so forwards, digests and copies of a
user's read what they would of a resident model, whichever module reads. What does not ask is listed in reads.py.

**Updates wait.** A step leaves what it does to weights as a line in `missed`. A block makes the lines behind its own place when it visits, in one read and
write where they are terms alone, with the bits of the steps one by one. After `every` steps it is written back where it came from, in host memory or in a
file without a name; or never, and then it is made again from its first values at each visit. No file that was given is written.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from zo_kernels import parameters
from zo_kernels.interrupts import uninterrupted
from zo_kernels.views.files import CHUNK, Kept, Working
from zo_kernels.views.memory import empty
from zo_kernels.views.reads import Reads, copied, walk
from zo_kernels.views.shadow import QUIET
from zo_kernels.views.work import Work

# What our own looks and torch's ask of a parameter without its values. A pickled one would be the slot's memory.
_QUIET = (QUIET | {Tensor.data_ptr, Tensor.untyped_storage}) - {Tensor.__reduce_ex__}


class Owner(Protocol):
    """Who makes up for steps."""

    def advance(self, block: Block, steps: Sequence[Missed]) -> None:
        """Make these, which are its own, for a block that is there."""
        ...


@dataclass(eq=False)
class Missed:
    """What a step did to weights, for blocks that were away. `mask_tag`: of its random masks, where it has any."""

    owner: Owner
    works: Sequence[Work]
    mask_tag: int | None


@dataclass(eq=False)
class Block:
    """Attributes:
    name: for people. members: its parameters by name, each with its first byte in the slot. kept: where each one's values lie, of the steps before `at`.
    """

    name: str
    members: dict[str, tuple[nn.Parameter, int]]
    kept: dict[str, Kept]
    size: int
    slot: int = 0
    at: int = 0
    start: int = 0  # in the working file
    away: weakref.ref[Away] | None = (
        None  # whose it is: a parameter knows its block, and what watches parameters for good must not hold the model
    )
    written: bool = False  # back, once at least: `kept` is not where it lies


@dataclass
class Traffic:
    """Since it was made. bytes: that came from where blocks lie. visits: how often one came. written: bytes that went back."""

    bytes: int = 0
    visits: int = 0
    written: int = 0


@dataclass
class Slot:
    memory: Tensor  # uint8, on the device
    holds: Block | None = None
    at: int = 0  # the step that its values are before
    asked: bool = False  # a function has asked for it since it came


@dataclass(eq=False)
class Away:
    """The blocks of one model.

    Args:
        blocks: in the order of a forward, as far as that is known. device: that they visit. every: steps after which a block is written back; None: never.
        host: they lie in host memory and go back there; else to a file without a name in `folder`. ahead: the next block is fetched while one is used.
        together: the forwards of a step go through a block one behind the other before the next one comes.
    """

    blocks: list[Block]
    device: torch.device
    every: int | None
    host: bool
    folder: str | os.PathLike[str] | None = None
    ahead: bool = True
    together: bool = False
    traffic: Traffic = field(default_factory=Traffic)
    steps: int = 0  # that were made so far
    broken: str = ""  # why the weights cannot be read any more

    def __post_init__(self) -> None:
        for k, block in enumerate(self.blocks):
            block.slot = k % 2
        sizes = [max((b.size for b in self.blocks if b.slot == k), default=0) for k in range(2)]
        self.slots = [Slot(_room(size, self.device)) for size in sizes]
        self.missed: list[Missed] = []  # the last of `steps`
        self.next_of: dict[Block, Block] = {}  # what came after it the last time
        self.last: Block | None = None  # that was brought in
        self.pending: tuple[Block, concurrent.futures.Future[None]] | None = None
        self.using: tuple[Block, ...] = ()  # by the function that is under way
        self.inside: set[int] = set()  # threads in which our own reads are under way
        self.gate: Callable[[tuple[Block, ...]], None] | None = None  # is asked before blocks are brought in (optim/lockstep.py)
        self.awaited: Callable[[], Iterable[Block]] = lambda: ()  # the blocks that are there for a forward whose turn is to come
        self.gated: set[int] = set()  # the threads that have turns of their own there
        self.refuses: Callable[[Tensor], None] = lambda p: None  # is asked before a parameter is read as it stands
        self.process = os.getpid()
        self.thread: concurrent.futures.ThreadPoolExecutor | None = None
        self.lock = threading.RLock()
        self.turn = threading.RLock()  # of the thread whose function reads: no other brings a block in its place
        self.working: Working | None = None
        if not self.host and self.every is not None:
            for block, start in zip(self.blocks, itertools.accumulate((b.size for b in self.blocks), initial=0), strict=False):
                block.start = start
            self.working = Working(sum(b.size for b in self.blocks), self.folder)

    def settle(self) -> None:
        """The parameters of the blocks lie in the slots from now on, and are watched."""
        for block in self.blocks:
            for p, start in block.members.values():
                p.data = self.slots[block.slot].memory[start : start + p.numel() * p.element_size()].view(p.dtype).view(p.shape)
                p.zo_block = block  # type: ignore[attr-defined]
            block.away = weakref.ref(self)
        self.reads = Watched(self)
        self.reads.begin()
        weakref.finalize(self, self.reads.end)

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model is resident."""

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Reads of this thread are ours: nothing is brought in for them."""
        me = threading.get_ident()
        first = me not in self.inside
        self.inside.add(me)
        try:
            yield
        finally:
            if first:
                self.inside.discard(me)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """While a function reads a parameter of this name: no other thread brings a block in its place.

        Raises:
            RuntimeError: forwards of a step take turns, and this is none of their threads.
        """
        if threading.get_ident() in self.gated:
            yield
            return
        with self.turn:
            if self.gate is not None:
                raise RuntimeError(
                    f"parameter {name} of an offloaded model is read in another thread while the forwards of a step take turns: run the model between "
                    "steps, or a resident copy of it, copy.deepcopy(model)"
                )
            yield

    # -- who is there --

    def need(self, blocks: Iterable[Block]) -> None:
        """These are there, with the values of the step that is next."""
        wanted = tuple(dict.fromkeys(blocks))
        if all(b in self.using for b in wanted) and self.present(wanted):
            return
        if len({b.slot for b in wanted}) < len(wanted):
            raise RuntimeError(
                f"one function reads weights of {len(wanted)} blocks, {', '.join(b.name for b in wanted)}, of which two are there at a time: "
                "give zk.offload blocks=[...] with a module that has both"
            )
        if self.gate is not None and not self.present(wanted):
            self.gate(wanted)
        self.using = wanted
        for block in wanted:
            self._bring(block)
        self._fetch_next()

    def present(self, blocks: Iterable[Block]) -> bool:
        """Whether they were asked for and came; what was fetched in advance counts when it is asked for, whenever the thread was done."""
        slots = [(self.slots[b.slot], b) for b in blocks]
        return all(slot.holds is b and slot.asked and slot.at == self.steps for slot, b in slots)

    def _bring(self, block: Block) -> None:
        if self.broken:
            raise RuntimeError(f"{self.broken}: begin again from the model and the journal")
        slot = self.slots[block.slot]
        with uninterrupted(), self.lock, _disable_current_modes():  # whoever looks at operations is to see the user's
            self.wait()
            if slot.holds is not block:
                self._load(block)
            elif slot.at != self.steps:
                self._catch_up(block, slot.at)
            slot.asked = True
        if self.last is not None and self.last is not block:
            self.next_of[self.last] = block
        self.last = block

    def _fetch_next(self) -> None:
        """In a thread of its own, the block that came after this one the last time, if its slot is free."""
        following = self.next_of.get(self.last) if self.last is not None else None
        if (
            not self.ahead
            or self.pending is not None
            or following is None
            or self.slots[following.slot].holds is following
            or any(b.slot == following.slot for b in (*self.using, *self.awaited()))
            or os.getpid() != self.process  # threads stay with a fork's parent
        ):
            return
        if self.thread is None:
            self.thread = concurrent.futures.ThreadPoolExecutor(1, "zo_kernels offload")
        self.pending = following, self.thread.submit(self._fetch, following)

    @torch.no_grad()
    def _fetch(self, block: Block) -> None:
        with torch.inference_mode(False), self.own():
            self._load(block)

    def wait(self) -> None:
        """What the thread does is done; what went wrong there comes again where it is needed."""
        if self.pending is not None:
            (_, future), self.pending = self.pending, None
            concurrent.futures.wait([future])

    # -- how a block comes --

    def _load(self, block: Block) -> None:
        slot, steps = self.slots[block.slot], self.steps
        slot.holds, slot.asked = None, False
        # A backward pass that kept weights which lay here is refused by torch.
        gone = [p for other in self.blocks if other.slot == block.slot for p, _ in other.members.values()]
        torch.autograd.graph.increment_version(gone)
        with self.own():
            if block.written and self.working is not None:
                self._read(self.working, slot.memory[: block.size], block.start)
            else:
                for name, (p, start) in block.members.items():
                    kept = block.kept[name]
                    self._fill(slot.memory[start : start + p.numel() * p.element_size()], p.dtype, kept)
        self.traffic.visits += 1
        self.traffic.bytes += block.size
        slot.holds, slot.at = block, block.at
        self._catch_up(block, block.at, steps)

    def _fill(self, target: Tensor, dtype: torch.dtype, kept: Kept) -> None:
        """A parameter's bytes in its slot, from whatever dtype it is kept in."""
        if kept.dtype == dtype:
            self._read(kept, target, 0)
            return
        room = empty((min(CHUNK, kept.nbytes),), torch.uint8, torch.device("cpu"))
        values = target.view(dtype)
        for start in range(0, kept.nbytes, CHUNK):
            part = room[: min(CHUNK, kept.nbytes - start)]
            kept.read(part, start)
            numbers = part.view(kept.dtype)
            values[start // kept.dtype.itemsize :][: len(numbers)].copy_(numbers)

    def _read(self, kept: Any, target: Tensor, at: int) -> None:
        if target.device.type == "cpu":
            kept.read(target, at)
            return
        room = torch.empty(min(CHUNK * 16, target.numel()), dtype=torch.uint8, pin_memory=True)
        for start in range(0, target.numel(), room.numel()):
            part = room[: min(room.numel(), target.numel() - start)]
            kept.read(part, at + start)
            target[start : start + part.numel()].copy_(part)

    def _catch_up(self, block: Block, since: int, steps: int | None = None) -> None:
        """From the step `since` on to the next one."""
        slot, steps = self.slots[block.slot], self.steps if steps is None else steps
        if since < steps:
            slot.holds = None  # half of the passes may be made when one fails
            first = self.steps - len(self.missed)
            lines = self.missed[since - first : steps - first]
            with self.own(), torch.no_grad():
                for _, own in itertools.groupby(lines, key=lambda line: id(line.owner)):
                    some = list(own)
                    some[0].owner.advance(block, some)
            slot.holds, slot.at = block, steps
        if self.every is not None and steps - block.at >= self.every:
            self._write_back(block, slot, steps)

    def _write_back(self, block: Block, slot: Slot, steps: int) -> None:
        values = slot.memory[: block.size]
        try:
            if self.working is not None:
                self.working.write(values if values.device.type == "cpu" else values.cpu(), block.start)
            else:
                for name, (p, start) in block.members.items():
                    kept: Any = block.kept[name]
                    kept.memory.copy_(values[start : start + p.numel() * p.element_size()])
        except BaseException as error:
            self.broken = f"{block.name} could not be written back ({error}), and lies there in part"
            raise
        block.at, block.written = steps, True
        self.traffic.written += block.size
        if (oldest := min(b.at for b in self.blocks)) > (first := self.steps - len(self.missed)):
            del self.missed[: oldest - first]

    # -- steps --

    def later(self, step: Missed) -> None:
        """What a step does, which each block makes up for when it comes."""
        with self.lock:
            self.wait()
            self.missed.append(step)
            self.steps += 1

    def check(self) -> None:
        """Raises RuntimeError: a parameter was moved, converted or replaced."""
        for block in self.blocks:
            memory = self.slots[block.slot].memory.data_ptr()
            for name, (p, start) in block.members.items():
                if p.data_ptr() != memory + start:
                    raise RuntimeError(
                        f"parameter {name} of an offloaded model was moved or converted: its values come and go with its block; load the model "
                        "again, and give zk.offload the dtype and the device"
                    )


def _room(size: int, device: torch.device) -> Tensor:
    """Aligned as torch aligns weights, so that kernels of products choose the same way."""
    whole = empty((size + 256,), torch.uint8, device)
    start = -whole.data_ptr() % 256
    return whole[start : start + size]


def place_of(p: Tensor) -> tuple[Away, Block] | None:
    """Whose values come and go, and with what; None: it is resident."""
    block = parameters.block_of(p)
    away = block.away() if block is not None else None
    return (away, block) if away is not None and block is not None else None


def away_of(model: nn.Module) -> Away | None:
    """The blocks of a model, or of one that is a part of it."""
    return next((module.__dict__["_zo_away"] for module in model.modules() if "_zo_away" in module.__dict__), None)


def there(p: Tensor) -> bool:
    """Whether a parameter's memory holds its own values now."""
    place = place_of(p)
    return place is None or place[0].slots[place[1].slot].holds is place[1]


class Watched(Reads):
    """Asks `Away` before a function takes a parameter, in whichever thread, for as long as the parameters are."""

    def __init__(self, away: Away) -> None:
        mine = {id(p): block for block in away.blocks for p, _ in block.members.values()}
        names = {id(p): name for block in away.blocks for name, (p, _) in block.members.items()}
        params = [p for block in away.blocks for p, _ in block.members.values()]
        super().__init__(params, _QUIET, lambda p: None, self._written, lambda p: None)
        self.away, self.blocks, self.names = weakref.ref(away), mine, names
        self.slots = {slot.memory.untyped_storage().data_ptr() for slot in away.slots}

    def blocks_of(self, tensors: Iterable[Any]) -> list[Block]:
        """Those that any of these is of."""
        return [self.blocks[id(self.of[id(t)])] for t in tensors if id(t) in self.of]

    def trust(self, alias: Tensor) -> None:
        """One of ours, which is read where its block is there: nobody is asked for it, which costs microseconds."""
        self.aliases.pop(id(alias), None)
        self.of.pop(id(alias), None)
        self.leave(alias)

    def _written(self, p: Tensor) -> None:
        away, block = self.away(), self.blocks[id(p)]
        if away is not None:
            away.slots[block.slot].holds = None  # it comes again as it was
        raise RuntimeError(
            f"parameter {self.names[id(p)]} of an offloaded model was written to: its values come and go with its block, and steps alone change them"
        )

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, found: list[Tensor], others: tuple[type, ...]) -> Any:
        away = self.away()
        if away is None or func in self.quiet or threading.get_ident() in away.inside:
            return self.serve(func, args, kwargs, found, others)
        if func is copied:
            found = [args[0]]  # and not those in its memo
        own = [self.of[id(t)] for t in found]
        if func is Tensor.__reduce_ex__:
            raise RuntimeError(
                f"parameter {self.names[id(own[0])]} of an offloaded model cannot be pickled, and its state_dict() not be saved: its values come and "
                "go with its block; copy.deepcopy(model) is a resident copy, and `Offloaded.parameters()` gives the values one after another"
            )
        for p in own:
            away.refuses(p)
        with away.reading(self.names[id(own[0])]):
            away.need(self.blocks[id(p)] for p in own)
            result = self.serve(func, args, kwargs, found, others)
            for one in walk(result):
                if type(one) is Tensor and one.layout == torch.strided and one.untyped_storage().data_ptr() in self.slots:
                    self._alias(one, found[0])  # a view, which may be read when another block is there
            return result.copy() if isinstance(result, np.ndarray) else result  # whose reads nobody sees
