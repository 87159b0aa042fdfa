"""Reads of weights past their modules' attributes, noticed in whichever forward they come.

Belongs here: how such a read is noticed. Does not belong here: what is done about it (scratch.py).

For the time of a forward the class of every trained parameter is a subclass of its own class, whose `__torch_function__` asks before a function
takes the parameter. That costs a forward two assignments a parameter, and nothing where no parameter is read.

It is one look of three, since none sees what the others do. A mode of torch functions (`Watch` of held.py) sees tensors that shared a parameter's
memory before the forward, too, but costs microseconds for each operation: it looks at a first step. A mode of the dispatcher (`ClosureReads` of
optim/findings.py) sees scripted code, too, but makes operators take other kernels: it looks at forwards that no run's numbers come from, and
at steps that have changed nothing so far. All that the modes have in common, whose memory a tensor shares, is `Owners` of memory.py.

Not noticed here: code that takes a tensor without asking (scripted functions, `torch.func.grad`, `jvp` and `vmap` over the parameters themselves,
`torch.tensor(p)`, `p.as_subclass`, `torch.utils.dlpack.to_dlpack(p)`), and tensors that shared a parameter's memory before the forward.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_own: dict[type, type] = {}  # by the class that stands in for it
_under_way: list[Reads] = []  # in whichever threads


def walk(tree: Any) -> Iterator[Any]:
    """The leaves of nested arguments, in order."""
    if isinstance(tree, (tuple, list)):
        for node in tree:
            yield from walk(node)
    elif isinstance(tree, dict):
        for node in tree.values():
            yield from walk(node)
    else:
        yield tree


@functools.cache
def _watched(own: type) -> type | None:
    """The class that stands in for `own`; None where instances of such a class cannot be of another."""
    names = {"__module__": own.__module__, "__torch_function__": classmethod(_noticed), "__deepcopy__": _deepcopy}
    try:
        made = type(own)(own.__name__, (own,), names)
        instance: Any = torch.empty(0).as_subclass(own)
        instance.__class__ = made
        instance.__class__ = own
    except Exception:  # whatever a class has against being subclassed
        return None
    _own[made] = own
    return made


def untraced(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The function, called between the graphs of torch.compile, which does not follow us into passes and buffers once `begin()` found it loaded."""
    return func(*args, **kwargs)


def _noticed(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    kwargs = kwargs or {}
    if torch.compiler.is_dynamo_compiling():  # False where the compiler itself asks, as it does for shapes
        return untraced(func, *args, **kwargs)
    found = list({id(t): t for t in walk((args, kwargs)) if type(t) in _own}.values())
    others = tuple(t for t in types if t not in _own)
    for reads in reversed(_under_way):
        if mine := [t for t in found if id(t) in reads.of]:  # the others ask again when it calls the function
            return reads.call(func, args, kwargs, mine, others)
    with torch._C.DisableTorchFunctionSubclass():
        return _unwatched(func, args, kwargs, others)


def _unwatched(func: Any, args: Any, kwargs: Any, others: tuple[type, ...]) -> Any:
    """The function, where nobody notices it. `others`: classes of its arguments that are a user's, and are asked as they would be if we were none."""
    if not others:
        return func(*args, **kwargs)
    with torch._C._EnableTorchFunction():
        answers = (other.__torch_function__(func, others, args, kwargs) for other in others)  # type: ignore[attr-defined]
        return next((answer for answer in answers if answer is not NotImplemented), NotImplemented)


def _deepcopy(self: Any, memo: Any) -> Any:
    return _noticed(type(self), copied, (type(self),), (self, memo))


def copied(t: Tensor, memo: Any) -> Any:
    """A copy is of the parameter's own class, with the values that the forward sees."""
    result = _own.get(type(t), type(t)).__deepcopy__(t, memo)  # type: ignore[attr-defined]
    Reads.leave(result)
    return result


class _OfTheirOwn:
    """Tensors in their own classes for the time of a function. Other threads do not see them read."""

    def __init__(self, found: list[Tensor]) -> None:
        self.found = [(t, type(t)) for t in found]

    def __enter__(self) -> None:
        for t, watched in self.found:
            t.__class__ = _own[watched]  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        for t, watched in self.found:
            t.__class__ = watched  # type: ignore[assignment]


def _as_they_are(func: Any, found: list[Tensor]) -> Any:
    """What a function builds of the type of a tensor is of its own class. Most ask for no class, and need no more than not to be noticed again."""
    if func not in _BY_CLASS and all(_own[type(t)] in _PLAIN for t in found):
        return torch._C.DisableTorchFunctionSubclass()
    return _OfTheirOwn(found)


class Reads:
    """The reads of `params`, between `begin()` and `end()`.

    `read(p)` is called before a function takes the values of p, or of `p.data` or `p.detach()`; `written(p)` after one that wrote to them;
    `other(p)` before one in another thread: each may raise. Functions in `quiet` do not count.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        quiet: Collection[Any],
        read: Callable[[Tensor], None],
        written: Callable[[Tensor], None],
        other: Callable[[Tensor], None],
    ) -> None:
        self.params, self.quiet = list(params), quiet
        self.read, self.written, self.other = read, written, other
        self.of = {id(p): p for p in self.params}  # the parameter whose memory it is, for aliases too
        self.aliases: dict[int, weakref.ref[Tensor]] = {}
        self.thread: int | None = None  # while under way
        self.kinds: list[type] = []
        self.swaps: list[tuple[type, type, list[Tensor]]] = []

    def begin(self) -> None:
        global untraced
        self.end()
        if "torch._dynamo" in sys.modules and not hasattr(untraced, "_torchdynamo_disable"):  # its import takes a second
            untraced = torch.compiler.disable(untraced)
        kinds = [*map(type, self.params)]
        if kinds != self.kinds:
            self.kinds, by_class = kinds, dict[type, list[Tensor]]()
            for p, kind in zip(self.params, kinds, strict=True):
                by_class.setdefault(kind, []).append(p)
            self.swaps = [(own, w, members) for own, members in by_class.items() if (w := _watched(own)) is not None]
        self.thread = threading.get_ident()
        _under_way.append(self)
        for _, watched, members in self.swaps:
            for p in members:
                p.__class__ = watched  # type: ignore[assignment]
        for alias in self._living():
            self._follow(alias)

    def end(self) -> None:
        """Nothing where none is under way."""
        if self.thread is None:
            return
        for own, _, members in self.swaps:
            for p in members:
                p.__class__ = own  # type: ignore[assignment]
        for alias in self._living():
            self.leave(alias)
        _under_way.remove(self)
        self.thread = None

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, found: list[Tensor], others: tuple[type, ...]) -> Any:
        """The function on the parameters as they are, in the thread that began. `others`: the other classes that ask, in torch's order."""
        if threading.get_ident() == self.thread:
            return self.serve(func, args, kwargs, found, others)
        if func not in self.quiet:
            self.other(self.of[id(found[0])])
        with torch._C.DisableTorchFunctionSubclass():
            return _unwatched(func, args, kwargs, others)

    def serve(self, func: Callable[..., Any], args: Any, kwargs: Any, found: list[Tensor], others: tuple[type, ...]) -> Any:
        """The same, in whichever thread."""
        with _as_they_are(func, found):
            if func in self.quiet:
                result = _unwatched(func, args, kwargs, others)
                if func is Tensor.detach or func == _DATA:
                    self._alias(result, found[0])
                return result
            for t in found:
                self.read(self.of[id(t)])
            versions = [version(t) for t in found]
            result = _unwatched(func, args, kwargs, others)
            for t, before in zip(found, versions, strict=True):
                if version(t) != before:
                    self.written(self.of[id(t)])
            return result

    def _alias(self, alias: Tensor, of: Tensor) -> None:
        """`alias` shares the memory of `of`: its reads count, in later forwards too, as long as it is there."""
        key = id(alias)

        def gone(_: Any) -> None:
            self.aliases.pop(key, None)
            self.of.pop(key, None)

        self.aliases[key], self.of[key] = weakref.ref(alias, gone), self.of[id(of)]
        self._follow(alias)

    @staticmethod
    def _follow(alias: Tensor) -> None:
        if (watched := _watched(type(alias))) is not None:
            alias.__class__ = watched  # type: ignore[assignment]

    @staticmethod
    def leave(alias: Tensor) -> None:
        """Of its own class again."""
        if type(alias) in _own:
            alias.__class__ = _own[type(alias)]  # type: ignore[assignment]

    def _living(self) -> list[Tensor]:
        return [t for r in list(self.aliases.values()) if (t := r()) is not None]


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_PLAIN = (Tensor, torch.nn.Parameter)  # of which functions that know no classes give tensors
_BY_CLASS = {Tensor.__reduce_ex__, Tensor.__repr__}  # what they give has the name of the class


def version(t: Tensor) -> int:
    """How often a tensor's memory was written to; 0 where torch does not count."""
    return 0 if t.is_inference() else t._version
