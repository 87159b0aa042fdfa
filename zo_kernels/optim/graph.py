"""A whole step as a CUDA graph: two forwards, their passes, the projected gradient and the update in one launch.

Belongs here: when a step can be captured, what is held still for it, and its replay. Does not belong here: what a step computes
(schedule.py hands over a function), how weights are perturbed (views/).

A graph repeats the same kernels on the same addresses. So what changes from step to step lies in device memory: the tag, the numbers of
the parameter groups (`Inputs`), and the batch, which is copied over that of the captured step. What must not change is part of a
graph's key; another key is another graph. All graphs share one memory pool, since they never run at the same time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

MOST_GRAPHS = 32  # a graph is a few MiB of launches; batches of very many shapes are better padded


class Refused(Exception):
    """The step cannot be captured; says why."""


@dataclass(frozen=True)
class Place:
    """Where the graphs of one optimizer are recorded: the weights' device, a stream of it that serves nothing else, a memory pool."""

    device: torch.device
    stream: Any
    pool: Any


class Recording:
    """Kernels recorded once and launched again and again; a thin front of `torch.cuda.CUDAGraph` that tests replace.

    Not `torch.cuda.graph`: its stream is of the device that was current when the first graph of the process was made, and it stays on it where a
    capture that was broken cannot be ended.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.graph = place, torch.cuda.CUDAGraph()

    @staticmethod
    def place_on(device: torch.device) -> Place:
        index = torch.cuda.current_device() if device.index is None else device.index
        return Place(torch.device("cuda", index), torch.cuda.Stream(index), torch.cuda.graph_pool_handle())

    @staticmethod
    def refuses(device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"the weights are on {device.type}, and only CUDA has graphs"

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """What is launched inside is recorded. If that fails, stream, generator and allocator are as before."""
        device, stream, pool = self.place.device, self.place.stream, self.place.pool
        with torch.cuda.device(device), uncollected():
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            try:
                with torch.cuda.stream(stream):
                    # Other threads (a loader that pins memory) may go on using CUDA.
                    self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        yield
                    except BaseException:
                        with contextlib.suppress(RuntimeError):  # which says less than what broke the capture
                            self.graph.capture_end()
                        raise
                    self.graph.capture_end()
            except BaseException:
                self._discard()
                raise

    def _discard(self) -> None:
        """What a capture that torch could not end leaves behind: an allocator that goes on asking this graph which memory is its own, and a generator that
        counts for it and refuses to draw."""
        device, pool = self.place.device, self.place.pool
        try:
            torch._C._cuda_endAllocateToPool(device.index, pool)
        except RuntimeError:
            self.graph.reset()  # the capture was ended whole
        else:
            torch._C._cuda_releasePool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        state = generator.get_state()
        try:
            torch.rand((), device=device)
        except RuntimeError:
            generator.graphsafe_set_state(generator.clone_state())  # a state that counts for no graph
        generator.set_state(state)

    def replay(self) -> None:
        self.graph.replay()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which may find modules and events in its rubbish: no capture survives their end."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Inputs:
    """What every graph reads anew: the step's tag (0-d int64) and the numbers of each parameter group (float64 [groups, n])."""

    tag: Tensor
    numbers: Tensor

    @classmethod
    def on(cls, device: torch.device, groups: int, numbers: int) -> Inputs:
        return cls(
            torch.zeros((), dtype=torch.int64, device=device), torch.zeros(groups, numbers, dtype=torch.float64, device=device)
        )

    def set(self, tag: int, numbers: Sequence[Sequence[Any]]) -> None:
        """The next replay's values (floats), without waiting for the device."""
        self.tag.fill_(tag)
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.numbers.is_cuda:
            values = values.pin_memory()
        self.numbers.copy_(values, non_blocking=True)


@dataclass
class Captured:
    recording: Recording
    batch: list[Tensor]  # where the graph reads the batch's tensors
    results: tuple[Tensor, ...]  # where it writes
    kept: Any  # whatever else it reads and writes by address


@dataclass(frozen=True)
class Key:
    """What must be the same for a graph to be the same step: the closure's code and the objects it refers to, and everything about the
    batches but the numbers in their tensors. The objects are known by their ids, so they must be kept alive (`objects`)."""

    value: Any
    objects: tuple[Any, ...]


def key_of(closure: Callable[..., Any], batches: Sequence[Any], *rest: Any) -> Key:
    """The key of a step; `rest` is whatever else a graph depends on.

    Raises:
        Refused: a batch holds something that cannot be compared.
    """
    described = _describe(list(batches))
    function = getattr(closure, "__func__", closure)
    objects = (
        getattr(function, "__code__", function),
        getattr(closure, "__self__", None),
        *(_content(cell) for cell in getattr(function, "__closure__", None) or ()),
        *(getattr(function, "__defaults__", None) or ()),
        *(getattr(function, "__kwdefaults__", None) or {}).values(),
    )
    return Key((tuple(map(id, objects)), described, *rest), objects)


def _members(node: Any) -> dict[Any, Any] | None:
    """What a container of a batch holds; None for a leaf."""
    if isinstance(node, Mapping):
        return dict(node)
    if isinstance(node, (list, tuple)):
        return dict(enumerate(node))
    if is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in fields(node) if f.init}
    return None


def _describe(node: Any) -> Any:
    """Everything about nested containers but the numbers in their tensors."""
    members = _members(node)
    if members is not None:
        return type(node), tuple((name, _describe(member)) for name, member in members.items())
    if isinstance(node, Tensor):
        return node.shape, node.dtype, node.device, node.stride()
    try:
        hash(node)
    except TypeError:
        raise Refused(
            f"a batch holds a {type(node).__name__}, which cannot be compared with the captured one: use tensors, numbers, strings, and "
            "lists, tuples, dicts or dataclasses of them"
        ) from None
    return type(node), node


def _tensors(node: Any) -> list[Tensor]:
    """The tensors in nested containers, in order."""
    members = _members(node)
    if members is not None:
        return [t for member in members.values() for t in _tensors(member)]
    return [node] if isinstance(node, Tensor) else []


def _copy(node: Any) -> Any:
    """The same containers with copies of their tensors."""
    members = _members(node)
    if members is None:
        return node.clone() if isinstance(node, Tensor) else node
    copies = {name: _copy(member) for name, member in members.items()}
    kind: Any = type(node)
    if isinstance(node, Mapping):
        return kind(copies)
    if isinstance(node, (list, tuple)):
        return kind(*copies.values()) if hasattr(node, "_fields") else kind(copies.values())
    return replace(node, **copies)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


class Graphs:
    """The captured steps of one optimizer. What a step needs (tables in device memory, compiled kernels) must have run once before it is
    captured."""

    def __init__(self, device: torch.device, groups: int, numbers: int) -> None:
        if (reason := Recording.refuses(device)) is not None:
            raise Refused(reason)
        self.device, self.inputs = device, Inputs.on(device, groups, numbers)
        self.captured: dict[Any, Captured] = {}
        self.seen: dict[Any, Key] = {}
        self.place = Recording.place_on(device)

    def check(self, batches: Sequence[Any]) -> None:
        """Refuse batches that lie elsewhere: a graph reads them from host memory when it runs, and by then the next step's are there.

        Raises:
            Refused: says where they are to be.
        """
        for t in _tensors(list(batches)):
            if t.device != self.device:
                raise Refused(f"a batch has a tensor on {t.device}: move it to {self.device} before the step")

    def known(self, key: Key) -> bool:
        """Whether a step with this key has run before; notes that one has now.

        Raises:
            Refused: too many keys.
        """
        if key.value in self.seen:
            return True
        if len(self.seen) >= MOST_GRAPHS:
            raise Refused(
                f"{MOST_GRAPHS} different steps have been seen: a graph serves one shape of batch and one closure object; pad the batches, "
                "and pass them as `batches` instead of capturing them in a new lambda"
            )
        self.seen[key.value] = key
        return False

    def capture(
        self, key: Key, batches: Sequence[Any], step: Callable[[list[Any]], tuple[Tensor, ...]], kept: Callable[[], Any]
    ) -> None:
        """Record `step(batches)`. Nothing is executed, so a failure leaves the weights as they are.

        Raises:
            Refused: something in it cannot be captured; says what.
        """
        static = _copy(list(batches))
        recording = Recording(self.place)
        try:
            with recording.record():
                results = step(static)
        except Refused:
            raise
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            raise Refused(f"the step cannot be captured ({type(error).__name__}: {text})") from error
        self.captured[key.value] = Captured(recording, _tensors(static), results, kept())

    def replay(self, key: Key, batches: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run the captured step on these batches with what `inputs` holds. Returns copies of its results."""
        captured = self.captured[key.value]
        for target, source in zip(captured.batch, _tensors(list(batches)), strict=True):
            target.copy_(source, non_blocking=True)
        captured.recording.replay()
        return tuple(t.clone() for t in captured.results)
