"""What stands before a module's parameters for the time of a step.

Belongs here: the tensors without storage that functions are given instead of weights, their place in the modules, and what torch functions ask
of a weight. Does not belong here: the values that stand for them (scratch.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zo_kernels.plan import Entry
from zo_kernels.views import reads
from zo_kernels.views.memory import aligned
from zo_kernels.views.reads import walk

# What may be asked of a weight without its values.
METADATA = {
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


# What changes a tensor without writing to its memory: `p.data = x`, `p.requires_grad = False`.
SETTERS = {"__set__", "requires_grad_"}

# What may be asked of a parameter itself without reading or writing its values; an alias of it is noticed when it is used. Pickled, it is
# what a checkpoint is to have: the clean values.
QUIET = (
    METADATA
    | {getattr(Tensor, name).__get__ for name in ("grad", "data", "_version", "_base", "output_nr", "is_nested", "retains_grad")}
    | {getattr(Tensor, name).__set__ for name in ("grad", "data", "requires_grad")}
    | {getattr(Tensor, name).__delete__ for name in ("grad",)}
    | {Tensor.requires_grad_, Tensor.is_inference, Tensor.detach, Tensor.__reduce_ex__}
    | {Tensor.storage_offset, Tensor.is_conj, Tensor.is_neg, Tensor._is_view}
)

# Functions whose result is never a view of a weight, and which write to none.
FRESH = {
    *(nn.functional.linear, nn.functional.layer_norm, nn.functional.rms_norm, nn.functional.group_norm, nn.functional.embedding),
    *(nn.functional.conv1d, nn.functional.conv2d, nn.functional.bilinear, torch.addmm, torch.mm, torch.matmul, torch.bmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.add, Tensor.__add__, Tensor.__radd__),
}


class Placed(dict[str, Any]):
    """A module's `_parameters` while other values stand before it, in the module's `__dict__`.

    Who puts another tensor there (`torch.func.functional_call`) has it read. Who copies or pickles the module is refused: the copy would
    keep the values that stand before its parameters.
    """

    __slots__ = ("module", "parameters", "touched", "values_shown")

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.values_shown = module, values
        self.parameters: dict[str, Any] = {}  # the module's own
        self.touched = False

    def place(self) -> None:
        attributes = self.module.__dict__
        self.parameters = parameters = attributes["_parameters"]
        self.touched = False
        self.clear()
        self.update(parameters)
        attributes["_parameters"] = self
        attributes.update(self.values_shown)

    def __setitem__(self, name: str, p: Any) -> None:
        super().__setitem__(name, p)
        self.touched = True
        if name in self.values_shown and p is self.parameters.get(name):
            self.module.__dict__[name] = self.values_shown[name]
        elif name in self.values_shown:
            self.module.__dict__.pop(name, None)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.touched = True
        if name in self.values_shown:
            self.module.__dict__.pop(name, None)

    def keep(self) -> None:
        """The step is done: parameters that the closure added stay."""
        self.parameters.clear()
        self.parameters.update(self)

    def remove(self) -> None:
        attributes = self.module.__dict__
        if attributes["_parameters"] is self:
            attributes["_parameters"] = self.parameters
            for name in self.values_shown:
                attributes.pop(name, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "a module is copied or pickled inside a scratch step, while perturbed values stand before its parameters: do it between two "
            "steps; its state_dict() has the clean weights at any time"
        )


class Server(Protocol):
    """What a shadow asks for values: the view that put it there."""

    thread: int | None  # that runs a step now

    def refuse_thread(self, shadow: PerturbedWeight) -> None: ...

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Sequence[PerturbedWeight]) -> Any: ...

    def kept(self, found: Sequence[PerturbedWeight]) -> list[Tensor]: ...


class PerturbedWeight(Tensor):
    """A weight as the forwards of a scratch-mode step see it: shape, dtype and device of the parameter, and no storage.

    Any torch function that receives one gets theta + c z instead.
    """

    param: Tensor
    clean: Tensor  # the parameter's values for our own reads, which nobody watches
    entry: Entry
    group: int
    scratch: Server
    room: int  # in the buffer

    @staticmethod
    def __new__(cls, param: Tensor, entry: Entry, group: int, scratch: Server) -> PerturbedWeight:
        self: PerturbedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device, requires_grad=param.requires_grad
        )
        self.param, self.entry, self.group, self.scratch = param, entry, group, scratch
        self.clean = param.detach()
        self.room = aligned(param.nbytes)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return reads.untraced(func, *args, **kwargs)
        found = find(args, kwargs)
        scratch = found[0].scratch
        if threading.get_ident() != scratch.thread:
            scratch.refuse_thread(found[0])
        return scratch.call(func, args, kwargs, found)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """C++ code that did not ask `__torch_function__` (scripted functions): the values, in memory of their own."""
        kwargs = kwargs or {}
        found = find(args, kwargs)
        if threading.get_ident() != found[0].scratch.thread:
            found[0].scratch.refuse_thread(found[0])
        args, kwargs = swap_in(args, kwargs, found[0].scratch.kept(found))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PerturbedWeight(shape={tuple(self.clean.shape)}, dtype={self.clean.dtype}, device={self.clean.device})"


def find(args: Any, kwargs: Any) -> list[PerturbedWeight]:
    """The perturbed weights among nested arguments, in order. Hundreds of calls a forward: the usual flat case goes first."""
    if kwargs or any(type(a) in (tuple, list, dict) for a in args):
        return [a for a in walk((args, kwargs)) if type(a) is PerturbedWeight]
    return [a for a in args if type(a) is PerturbedWeight]


def swap_in(args: Any, kwargs: Any, values: Sequence[Tensor]) -> tuple[Any, Any]:
    """The arguments with `values` in place of what `find` found, in its order."""
    supply = iter(values)
    if kwargs or any(type(a) in (tuple, list, dict) for a in args):
        return [_swap(a, supply) for a in args], {key: _swap(a, supply) for key, a in kwargs.items()}
    return [next(supply) if type(a) is PerturbedWeight else a for a in args], kwargs


def _swap(node: Any, supply: Iterator[Tensor]) -> Any:
    # No function inside `swap_in`: one that calls itself is a reference cycle, which holds the values until the collector runs.
    if type(node) is PerturbedWeight:
        return next(supply)
    if isinstance(node, (tuple, list)):
        items = [_swap(inner, supply) for inner in node]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    if isinstance(node, dict):
        return {key: _swap(inner, supply) for key, inner in node.items()}
    return node
