"""Weights that a lazy step left at theta + eps z: who makes them clean before anybody else reads them.

Belongs here: the hooks of a module that flush its optimizer, and what is done when the optimizer goes away. Does not belong here: how weights are brought back
(views/).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from zo_kernels.views import View


class Flushes(Protocol):
    def flush(self) -> None: ...


class _Flush:
    """A module's hook that makes a lazy optimizer's weights clean. A copy of it, in a copied or pickled module, does nothing."""

    def __init__(self, optimizer: Flushes | None = None) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else None

    def __call__(self, *_: Any, **__: Any) -> None:
        optimizer = self.optimizer() if self.optimizer is not None else None
        if optimizer is not None:
            optimizer.flush()

    def __reduce__(self) -> Any:
        return _Flush, ()


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def guard(optimizer: Flushes, model: nn.Module) -> None:
    """Flush before anybody else reads the weights through the module.

    Raises:
        ValueError: a scripted module takes no hook.
    """
    flush = _Flush(optimizer)
    handles: list[Any] = []
    for name, module in model.named_modules():
        # Who calls an inner module, or `model.forward` by its name, passes the model's own hook by. Guarding the rest of the modules would cost
        # each forward of a step, and they read what these have.
        if module is model or any(p.requires_grad for p in module.parameters(recurse=False)):
            try:
                handles.append(module.register_forward_pre_hook(flush))
            except RuntimeError as error:
                _remove(handles)
                raise ValueError(
                    f"lazy=True with the scripted module {name or type(model).__name__!r}: it takes no hook, so that a forward between two steps would "
                    "read theta + eps z; leave lazy out, or give the module before torch.jit.script"
                ) from error
        handles += [module.register_state_dict_pre_hook(flush), module.register_load_state_dict_pre_hook(flush)]
    weakref.finalize(optimizer, _remove, handles)


def restore_at_end(optimizer: Flushes, view: View) -> weakref.finalize[..., Any]:
    """Bring a view's weights back when the optimizer goes away, or the interpreter exits. A fork's child leaves the weights alone: in shared memory they are
    its parent's."""
    return weakref.finalize(optimizer, _restore, view, os.getpid())


def _restore(view: View, process: int) -> None:
    if os.getpid() == process:
        view.restore()
