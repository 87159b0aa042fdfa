"""How a model sees theta + c z: in place, or through a scratch buffer.

Belongs here: the two ways, and what keeps them exact when a forward fails. Does not belong here: which c and z (optim/), the
arithmetic (ops.py).

**In place** writes theta + c z over the weights, so that any black-box closure works. Each pass rounds, and in 16 bits the rounding
does not come back.

**Scratch** leaves the weights alone. For the time of a step every trainable parameter of a module is shadowed by a
`PerturbedWeight`, a tensor without storage that stands in the module's `__dict__`, where attribute access looks first. When a
torch function receives one (`F.linear(x, self.weight, self.bias)`), the clean weights are read, theta + c z is written into a
buffer, the function runs on the buffer, and the buffer is free again. An embedding perturbs only the rows it gathers. Forward
hooks on modules were the alternative: they miss a weight that a parent reads (a tied head), need one buffer per nesting level,
and cost two Python calls per module instead of one per use.
"""

from __future__ import annotations

import abc
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zo_kernels import _backends as backends
from zo_kernels import ops
from zo_kernels.parameters import Weights

MOST_GATHERS = 64  # plans of gathered rows that are kept: batches of every length come along in a run
ALIGNMENT = 256  # bytes: what torch's CUDA allocator gives, so that matrix kernels choose the same code path as for the weight


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT until the block is done, so that a KeyboardInterrupt never leaves half of the tensors written.

    Only the main thread receives signals in Python; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, Any]] = []
    try:
        before = signal.signal(signal.SIGINT, lambda *received: pending.append(received))
    except ValueError:  # a sub-interpreter's main thread
        yield
        return
    try:
        yield
    finally:
        # A handler that was not installed from Python reads as None and cannot be put back; the default is its nearest.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
        if pending and callable(before):
            before(*pending[0])


Coefficient = float | Tensor  # a tensor: 0-d float64, on any device; nothing is read back from it
Shift = Sequence[tuple[int, float]]  # theta + sum c z(tag), as (tag, c)


@dataclass(frozen=True)
class Update:
    """theta <- round(decay theta + sum c z(tag)) for the clean weights of one group."""

    terms: Sequence[tuple[int, Coefficient]]
    decay: Coefficient = 1.0
    rounding: str = "nearest"


class View(abc.ABC):
    """What both ways share: the parameter groups, and the update of the clean weights.

    `see(shifts)` makes the next forward run at theta + shift, one list of (tag, c) for each group; `update` is the step itself, after
    which the weights are clean. Between them, `step()` guards the forwards.
    """

    def __init__(self, groups: Sequence[Weights], *, seed: int, kind: str, backend: str | None) -> None:
        self.groups, self.seed, self.kind, self.backend = groups, seed, kind, backend

    @abc.abstractmethod
    def step(self) -> contextlib.AbstractContextManager[None]:
        """Around the forwards and the update of one step."""

    @abc.abstractmethod
    def see(self, shifts: Sequence[Shift]) -> None:
        """The next forward runs at theta + shift."""

    def run(self, group: int, terms: Sequence[tuple[int, Coefficient]], decay: Coefficient, rounding: str) -> None:
        """theta <- round(decay theta + sum c z) over one group; nothing to do is not done."""
        tags, coefs = [tag for tag, _ in terms], [c for _, c in terms]
        tensors = [c for c in (*coefs, decay) if isinstance(c, Tensor)]
        if tensors:
            # Tags are written by a fill kernel and coefficients stay where the losses are: no copy from the host, no wait.
            device = tensors[0].device
            consecutive = tags == list(range(tags[0], tags[0] + len(tags))) if tags else False
            on_device = (
                torch.arange(tags[0], tags[0] + len(tags), device=device) if consecutive else torch.tensor(tags, device=device)
            )
            values = torch.stack([torch.as_tensor(c, dtype=torch.float64, device=device) for c in coefs]).float()
            factor = decay.float() if isinstance(decay, Tensor) else (None if decay == 1.0 else decay)
            p = ops.Pass(self.seed, on_device, values, factor, self.kind, rounding)
        else:
            live = [(tag, float(c)) for tag, c in terms if c]
            if not live and decay == 1.0:
                return
            p = ops.Pass(
                self.seed, [t for t, _ in live], [c for _, c in live], None if decay == 1.0 else float(decay), self.kind, rounding
            )
        ops.run(self.groups[group].plans, p, self.backend)

    def update(self, updates: Sequence[Update]) -> None:
        """The step itself, one update for each group; an interrupt waits until all are done."""
        with uninterrupted():
            for k, u in enumerate(updates):
                self.run(k, u.terms, u.decay, u.rounding)


def _add(*lists: Sequence[tuple[int, Coefficient]]) -> list[tuple[int, Coefficient]]:
    """The sum of lists of terms, one term a tag."""
    total: dict[int, Coefficient] = {}
    for terms in lists:
        for tag, c in terms:
            total[tag] = total[tag] + c if tag in total else c
    return list(total.items())


class InPlace(View):
    """theta + c z in the weights' own memory; `at` is where each group stands."""

    def __init__(self, groups: Sequence[Weights], **options: Any) -> None:
        super().__init__(groups, **options)
        self.at: list[Shift] = [()] * len(groups)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """If a forward fails, the weights go back, to within the rounding of the passes."""
        try:
            yield
        except BaseException:
            self.see([()] * len(self.groups))
            raise

    def see(self, shifts: Sequence[Shift]) -> None:
        for k, shift in enumerate(shifts):
            with uninterrupted():
                self.run(k, _add(shift, [(tag, -c) for tag, c in self.at[k]]), 1.0, "nearest")
                self.at[k] = shift
        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, not by its version

    def update(self, updates: Sequence[Update]) -> None:
        """Restore and update in one pass: decay (theta' - shift) + terms = decay theta' + (terms - decay shift)."""
        with uninterrupted():
            for k, u in enumerate(updates):
                self.run(k, _add(u.terms, [(tag, -c * u.decay) for tag, c in self.at[k]]), u.decay, u.rounding)
                self.at[k] = ()


# ---- scratch ----------------------------------------------------------------------------------------------------------

# What may be asked of a weight without its values.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "is_leaf", "grad_fn"),
        *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"),
    )
} | {
    getattr(Tensor, name)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device", "__len__", "__hash__"),
        *("is_floating_point", "is_complex", "is_contiguous"),
    )
}


def compiled(model: nn.Module) -> bool:
    """Whether part of the model runs as a graph of torch.compile, which has the weights built in and would not see a shadow."""
    return any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules())


class PerturbedWeight(Tensor):
    """A weight as the forwards of a scratch-mode step see it: shape, dtype and device of the parameter, and no storage.

    Any torch function that receives one gets theta + c z instead.
    """

    param: Tensor
    entry: ops.Entry
    group: int
    scratch: Scratch

    @staticmethod
    def __new__(cls, param: Tensor, entry: ops.Entry, group: int, scratch: Scratch) -> PerturbedWeight:
        self: PerturbedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device, requires_grad=param.requires_grad
        )
        self.param, self.entry, self.group, self.scratch = param, entry, group, scratch
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _find(args, kwargs)
        return found[0].scratch.call(func, args, kwargs, found)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """C++ code that did not ask `__torch_function__` (scripted functions): the values, in memory of their own."""
        kwargs = kwargs or {}
        found = _find(args, kwargs)
        args, kwargs = _replace(args, kwargs, found[0].scratch.values(found, keep=True))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PerturbedWeight(shape={tuple(self.param.shape)}, dtype={self.param.dtype}, device={self.param.device})"


def _walk(tree: Any) -> Iterator[Any]:
    """The leaves of nested arguments, in order."""
    if isinstance(tree, (tuple, list)):
        for node in tree:
            yield from _walk(node)
    elif isinstance(tree, dict):
        for node in tree.values():
            yield from _walk(node)
    else:
        yield tree


def _find(args: Any, kwargs: Any) -> list[PerturbedWeight]:
    """The perturbed weights among nested arguments, in order. Hundreds of calls a forward: the usual flat case goes first."""
    found = [a for a in args if type(a) is PerturbedWeight]
    if kwargs or any(type(a) in (tuple, list, dict) for a in args):
        found = [a for a in _walk((args, kwargs)) if type(a) is PerturbedWeight]
    return found


def _replace(args: Any, kwargs: Any, values: Sequence[Tensor]) -> tuple[Any, Any]:
    """The arguments with `values` in place of what `_find` found, in its order."""
    supply = iter(values)

    def swap(node: Any) -> Any:
        if type(node) is PerturbedWeight:
            return next(supply)
        if isinstance(node, (tuple, list)):
            items = [swap(inner) for inner in node]
            return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
        if isinstance(node, dict):
            return {key: swap(inner) for key, inner in node.items()}
        return node

    return [swap(a) for a in args], {key: swap(a) for key, a in kwargs.items()}


# The passes that fill the values of one call (group, plan, backend), and those values.
Layout = tuple[list[tuple[int, ops.Plan, ModuleType]], list[Tensor]]


class Scratch(View):
    """theta + c z in one reusable buffer a device; the weights themselves change in `update` alone."""

    def __init__(self, groups: Sequence[Weights], model: nn.Module, **options: Any) -> None:
        super().__init__(groups, **options)
        self.model = model
        shadows: dict[int, PerturbedWeight] = {}
        for k, weights in enumerate(groups):
            entries = weights.entries()
            for p in weights.params:
                shadows[id(p)] = PerturbedWeight(p, entries[id(p)], k, self)
        self.names = {id(p): name for weights in groups for name, p in zip(weights.names, weights.params, strict=True)}
        # Every attribute that reads a trainable parameter: a tied one has several.
        self.sites: list[tuple[nn.Module, str, PerturbedWeight]] = [
            (module, attribute, shadows[id(p)])
            for module in model.modules()
            for attribute, p in module._parameters.items()
            if p is not None and id(p) in shadows
        ]
        self.passes: list[ops.Pass | None] = []
        self.buffers: dict[torch.device, Tensor] = {}
        self.storages: set[int] = set()  # the buffers', by address
        self.layouts: dict[tuple[int, ...], Layout] = {}  # where in the buffer the weights of a call lie, by the weights' ids
        # An embedding's row numbers, its rows in the buffer, plan and backend, by the table's id and the number of tokens.
        self.gathers: dict[tuple[int, int], tuple[Tensor, Tensor, ops.Plan, ModuleType]] = {}
        self.inside = False  # our own reads of clean weights are under way
        # Parameters that code reaches past its module's attributes (a list of captured weights, a scripted module), and a copy of
        # their clean values while a forward runs. `missing` are those that no module owns at all.
        reached = {id(shadow) for _, _, shadow in self.sites}
        self.held: dict[int, PerturbedWeight] = {i: s for i, s in shadows.items() if id(s) not in reached}
        self.copies: dict[int, Tensor] = {}
        self.told = 0  # how many held parameters the user knows of
        self.watched_mode: bool | None = None  # model.training of the step that was watched
        self.shadows = shadows

    # -- a step --

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        try:
            for module, attribute, shadow in self.sites:
                if module._parameters.get(attribute) is shadow.param:
                    module.__dict__[attribute] = shadow
            # One step shows which parameters are read in ways that attributes do not show; watching costs microseconds an operation.
            if self.model.training is self.watched_mode:
                yield
            else:
                with Watch(self, self.shadows.values()):
                    yield
                self.watched_mode = self.model.training
        finally:
            for module, attribute, shadow in self.sites:
                if module.__dict__.get(attribute) is shadow:
                    del module.__dict__[attribute]
            self._put_back()

    def see(self, shifts: Sequence[Shift]) -> None:
        self._put_back()
        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, and the buffer's tensors are used again
        self.passes = [
            ops.Pass(self.seed, [t for t, _ in shift], [c for _, c in shift], None, self.kind, "nearest") if shift else None
            for shift in shifts
        ]
        for shadow in self.held.values():
            self._perturb_held(shadow)

    def update(self, updates: Sequence[Update]) -> None:
        self._put_back()
        self.inside = True
        try:
            super().update(updates)
        finally:
            self.inside = False

    # -- a function that receives weights --

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Sequence[PerturbedWeight]) -> Any:
        if func is nn.functional.embedding:
            rows = self._embedding(*args, **kwargs)
            if rows is not None:
                return rows
        plain, named = _replace(args, kwargs, self.values(found))
        result = func(*plain, **named)
        for t in (result,) if type(result) is Tensor else _walk(result):
            if isinstance(t, Tensor) and type(t) is not PerturbedWeight and t.untyped_storage().data_ptr() in self.storages:
                # A view of the weight outlives the call (`weight.t()`): it needs values that the next call does not overwrite.
                plain, named = _replace(args, kwargs, self.values(found, keep=True))
                return func(*plain, **named)
        return result

    def values(self, found: Sequence[PerturbedWeight], keep: bool = False) -> list[Tensor]:
        """theta + c z of each weight, in the buffer (valid until the next call) or, to keep, in memory of their own."""
        key = tuple(map(id, found))
        if keep:
            layout = self._layout(found, [torch.empty(s.param.shape, dtype=s.param.dtype, device=s.param.device) for s in found])
        else:
            known = self.layouts.get(key)
            if known is None:
                room = self._room([(s.param.device, s.param.dtype, s.param.shape) for s in found])
                known = self.layouts[key] = self._layout(found, room)
            layout = known
        plans, values = layout
        self.inside = True
        try:
            for group, plan, backend in plans:
                if (p := self.passes[group]) is not None:
                    backend.perturb(plan, p)
                else:
                    for e in plan.entries:
                        e.dst.copy_(e.src)
        finally:
            self.inside = False
        torch.autograd.graph.increment_version(values)  # a graph that saved the buffer must not use what is in it now
        if self.held:
            return [s.param if id(s.param) in self.held else v for s, v in zip(found, values, strict=True)]
        return values

    def _layout(self, found: Sequence[PerturbedWeight], values: list[Tensor]) -> Layout:
        groups: dict[tuple[int, torch.device, torch.dtype], list[ops.Entry]] = {}
        for shadow, value in zip(found, values, strict=True):
            key = (shadow.group, value.device, value.dtype)
            groups.setdefault(key, []).append(replace(shadow.entry, dst=value))
        plans = [
            (k, ops.Plan(tuple(e), device, dtype), backends.pick(device, self.backend)) for (k, device, dtype), e in groups.items()
        ]
        # Leaves that require a gradient, like the parameters they stand for: at::matmul folds a batch into one matrix product only then,
        # even under no_grad. Otherwise a head over the last position is computed, and its weight copied, once for each row.
        return plans, [v.detach().requires_grad_(s.param.requires_grad) for s, v in zip(found, values, strict=True)]

    def _room(self, wanted: Sequence[tuple[torch.device, torch.dtype, torch.Size]]) -> list[Tensor]:
        """Tensors of the buffer that are in use together; a buffer grows to the largest call it has seen."""
        starts, ends = [], dict.fromkeys((device for device, _, _ in wanted), 0)
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in wanted]
        for (device, _, _), size in zip(wanted, sizes, strict=True):
            starts.append(ends[device])
            ends[device] += -(-size // ALIGNMENT) * ALIGNMENT
        for device, size in ends.items():
            if device not in self.buffers or self.buffers[device].numel() < size:
                self.buffers.pop(device, None)
                self.layouts.clear()  # they point into the old buffer
                self.gathers.clear()
                whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
                start = -whole.data_ptr() % ALIGNMENT
                self.buffers[device] = whole[start : start + size]
        self.storages = {b.untyped_storage().data_ptr() for b in self.buffers.values()}
        return [
            self.buffers[device][start : start + size].view(dtype).view(shape)
            for (device, dtype, shape), start, size in zip(wanted, starts, sizes, strict=True)
        ]

    def _embedding(
        self, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **more: Any
    ) -> Tensor | None:
        """theta + c z in the gathered rows only; None where the whole table is the better or the only way."""
        if type(weight) is not PerturbedWeight or not isinstance(input, Tensor) or max_norm is not None:
            return None
        entry, p, n = weight.entry, self.passes[weight.group], input.numel()
        table = weight.param.detach()
        if p is None or id(weight.param) in self.held or entry.mask is not None or n >= table.shape[0]:
            return None
        if (gather := self.gathers.get((id(weight), n))) is None:
            rows = torch.empty(n, dtype=torch.int64, device=table.device)
            (gathered,) = self._room([(table.device, table.dtype, torch.Size((n, table.shape[1])))])
            local = replace(entry, src=gathered, dst=gathered, rows=rows, row_len=table.shape[1])
            plan = ops.Plan((local,), table.device, table.dtype)
            if len(self.gathers) >= MOST_GATHERS:
                self.gathers.clear()
            gather = self.gathers[id(weight), n] = rows, gathered, plan, backends.pick(table.device, self.backend)
        rows, gathered, plan, backend = gather
        self.inside = True
        try:
            rows.copy_(input.reshape(-1))
            torch.index_select(table, 0, rows, out=gathered)
            backend.perturb(plan, p)
            return gathered.clone().view(*input.shape, table.shape[1])
        finally:
            self.inside = False

    # -- parameters that shadows do not reach --

    def hold(self, shadow: PerturbedWeight) -> None:
        """From now on this parameter is perturbed in place around each forward and put back from a copy: exact, for the copy's memory."""
        self.held[id(shadow.param)] = shadow
        self.layouts.clear()
        self._perturb_held(shadow)

    def _perturb_held(self, shadow: PerturbedWeight) -> None:
        p = self.passes[shadow.group]
        if p is None:
            return
        self.inside = True
        try:
            with uninterrupted():
                self.copies[id(shadow.param)] = shadow.param.detach().clone()
                ops.run((ops.Plan((shadow.entry,), shadow.param.device, shadow.param.dtype),), p, self.backend)
        finally:
            self.inside = False

    def _put_back(self) -> None:
        self.inside = True
        try:
            with uninterrupted(), torch.no_grad():
                for key, copy in self.copies.items():
                    self.held[key].param.copy_(copy)
                self.copies.clear()
        finally:
            self.inside = False

    def news(self) -> str | None:
        """Which parameters are perturbed in place and the memory that this costs, in one line; None if nothing is new."""
        if len(self.held) == self.told:
            return None
        self.told = len(self.held)
        size = sum(s.param.nbytes for s in self.held.values())
        names = ", ".join(sorted(self.names[i] for i in self.held))
        return (
            f"scratch mode: {len(self.held)} parameters are read in ways that their modules' attributes do not show ({names}); "
            f"they are perturbed in place around each forward and put back, bit for bit, from a copy of {size / 2**20:.1f} MiB"
        )


class Watch(TorchDispatchMode):
    """During the first step, catches operations that read a clean weight past its shadow, at the moment before they run.

    At that moment every earlier use went through the shadow, so perturbing the parameter in place there and then gives the forward
    the same values as if it had been held from the start.
    """

    def __init__(self, scratch: Scratch, shadows: Any) -> None:
        super().__init__()
        self.scratch = scratch
        self.storages: dict[int, list[PerturbedWeight]] = {}
        for shadow in shadows:
            self.storages.setdefault(shadow.param.untyped_storage().data_ptr(), []).append(shadow)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.scratch.inside and not func.is_view:
            for t in _walk((args, kwargs)):
                if not isinstance(t, Tensor) or type(t) is PerturbedWeight or t.is_meta:
                    continue
                for shadow in self.storages.get(t.untyped_storage().data_ptr(), ()):
                    if id(shadow.param) not in self.scratch.held and _overlap(t, shadow.param):
                        self.scratch.hold(shadow)
        return func(*args, **kwargs)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory spans of two tensors of one storage meet. A view's span counts from its first to its last element."""
    last = sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True)) if a.numel() else -1
    start, end = a.data_ptr(), a.data_ptr() + (last + 1) * a.element_size()
    return start < b.data_ptr() + b.nbytes and b.data_ptr() < end
