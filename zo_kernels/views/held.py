"""Parameters that shadows do not reach: a list of captured weights, a scripted module, a view that was taken before the step.

Belongs here: what perturbs them in their own memory and puts them back, and the look at a first step's functions that finds some of them.
Does not belong here: reads of the parameters themselves (reads.py), what stands before the modules' parameters (fronts.py).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from zo_kernels import ops
from zo_kernels.interrupts import uninterrupted
from zo_kernels.plan import Plan
from zo_kernels.views.buffer import Forward
from zo_kernels.views.memory import Owners
from zo_kernels.views.reads import version, walk
from zo_kernels.views.shadow import QUIET, PerturbedWeight


class Held:
    """Perturbs the parameters in `forward.held` around each forward and puts them back from copies: exact, for the copies' memory."""

    def __init__(self, names: Mapping[int, str], backend: str | None, forward: Forward) -> None:
        self.names, self.backend, self.forward = names, backend, forward
        self.copies: dict[int, Tensor] = {}  # of the clean values while a forward runs, by the parameter's id
        self.told = 0  # how many of them the user knows of

    def perturb(self, shadow: PerturbedWeight) -> bool:
        """Whether its memory was written to: not where its group stands at theta."""
        p = self.forward.passes[shadow.group]
        if p is None:
            return False
        self.forward.inside = True
        try:
            with uninterrupted():
                self.copies[id(shadow.param)] = shadow.clean.clone()
                ops.run((Plan((shadow.entry,), shadow.clean.device, shadow.clean.dtype),), p, self.backend)
        finally:
            self.forward.inside = False
        return True

    def put_back(self) -> None:
        if not self.copies:
            return
        self.forward.inside = True
        try:
            with uninterrupted(), torch.no_grad():
                for key, copy in self.copies.items():
                    shadow = self.forward.held[key]
                    # Those made in inference mode are written to there alone.
                    with torch.inference_mode() if shadow.clean.is_inference() else contextlib.nullcontext():
                        shadow.param.copy_(copy)
                self.copies.clear()
        finally:
            self.forward.inside = False

    def unrecordable(self) -> str | None:
        """Each forward has passes and copies of its own for them."""
        names = ", ".join(sorted(self.names[i] for i in self.forward.held))
        return f"{names}: read in ways that modules' attributes do not show, and held in copies for each forward" if names else None

    def news(self) -> str | None:
        """Which parameters are perturbed in place and the memory that this costs, in one line; None if nothing is new."""
        held = self.forward.held
        if len(held) == self.told:
            return None
        self.told = len(held)
        size = sum(s.clean.nbytes for s in held.values())
        names = ", ".join(sorted(self.names[i] for i in held))
        return (
            f"scratch mode: {len(held)} parameters are read in ways that their modules' attributes do not show ({names}); "
            f"they are perturbed in place around each forward and put back, bit for bit, from a copy of {size / 2**20:.1f} MiB"
        )


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled functions run as they were written: a mode that the compiler traces becomes a part of what it makes, values of one forward included.
    Importing the compiler takes seconds, and who has not imported it compiles nothing."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class Watch(TorchFunctionMode):
    """What `Reads` cannot see, during the first step: functions that read or write a clean weight through a tensor that shared its memory before
    the forward. Also which of the values that modules hold are used.

    `shown`: the shadows that those values stand for, by the values' ids; `read(p)` is called before a parameter is read, `written(p)` after one was
    written to: each may raise.
    """

    def __init__(
        self,
        forward: Forward,
        shadows: Iterable[PerturbedWeight],
        shown: Mapping[int, PerturbedWeight],
        read: Callable[[Tensor], None],
        written: Callable[[Tensor], None],
    ) -> None:
        super().__init__()
        self.forward, self.shown, self.read, self.written = forward, shown, read, written
        self.owners = Owners((s.clean, s.param) for s in shadows)
        self.over = False

    def __exit__(self, *raised: Any) -> None:
        """Torch takes a mode off while it serves a function. A signal there leaves it off, and on again when the function's frame is freed: whenever that
        is, the step is over."""
        self.over = True
        if any(mode is self for mode in _get_current_function_mode_stack()):
            super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.over or self.forward.inside or func in QUIET or func in (Tensor.untyped_storage, Tensor.data_ptr):
            return func(*args, **kwargs)
        leaves = list(walk((args, kwargs)))
        self.forward.serve(self.shown[id(t)] for t in leaves if id(t) in self.shown)
        shared = [(t, version(t), params[0]) for t in leaves if (params := self._found(t))]
        result = func(*args, **kwargs)
        for t, before, p in shared:
            if version(t) != before:
                self.written(p)
        return result

    def _found(self, t: Any) -> list[Tensor]:
        """The parameters whose memory this is, which are held from now on."""
        found = [] if type(t) is PerturbedWeight else self.owners.of(t)
        for p in found:
            self.read(p)
        return found
