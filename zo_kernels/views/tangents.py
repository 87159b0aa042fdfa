"""How a model sees theta and its direction at once: dual numbers theta + delta z, for forward-mode differentiation.

A `Tangents` is a scratch view whose weights carry z as their tangent. The tangent of a weight is generated when a function receives the weight and
is gone after the call: of the size of one layer, never of the model. The activations carry tangents as they carry values.

Belongs here: weights as dual numbers, and the tangent of a loss. Does not belong here: what is done with it (optim/estimators.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_kernels import interrupts, ops
from zo_kernels.plan import Plan
from zo_kernels.views.base import changed
from zo_kernels.views.scratch import Scratch
from zo_kernels.views.shadow import SETTERS, PerturbedWeight, swap_in
from zo_kernels.views.work import Shift


class Tangents(Scratch):
    """`see([[(tag, _)], ...])`: the next forward carries the tangents z(tag), with their masks and scales."""

    holds_values = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.limit = 0  # nothing is written into the buffer
        if held := self.forward.held:
            raise RuntimeError(
                f"parameter {self.names[next(iter(held))]} is no module's attribute in plain Python (a scripted module's? another model's?), and "
                "carries no tangent: forward gradients need a model that reads its weights as module.weight; or take a two-sided estimate"
            )
        # Torch compiles its decompositions for the first dual number of a process: not in a forward, where a signal would cut that short.
        with interrupts.uninterrupted(), forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))

    @property
    def together(self) -> bool:
        return False

    @contextlib.contextmanager
    def step(self, recorded: bool = False) -> Iterator[None]:
        # Fused attention has no forward-mode derivative; its plain form has.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), super().step(recorded):
            yield

    def see(self, shifts: Sequence[Shift]) -> None:
        self.forward.passes = [self._pass([(tag, 1.0) for tag, _ in shift], 1.0, "nearest") if shift else None for shift in shifts]
        torch.clear_autocast_cache()
        self.reads.begin()

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Sequence[PerturbedWeight]) -> Any:
        if getattr(func, "__name__", "") in SETTERS:
            raise changed(self.names[id(found[0].param)], "changed")
        self.forward.inside = True  # the primal of a dual number is the clean weight
        try:
            plain, named = swap_in(args, kwargs, [self._dual(shadow) for shadow in found])
            return func(*plain, **named)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{getattr(func, '__name__', func)} has no forward-mode derivative ({str(error).splitlines()[0]}): load the model with "
                "attn_implementation='eager', or take a two-sided estimate"
            ) from error
        finally:
            self.forward.inside = False

    def _dual(self, shadow: PerturbedWeight) -> Tensor:
        self.forward.serve([shadow])
        value, p = shadow.clean, self.forward.passes[shadow.group]
        if p is None:
            return value
        z = torch.zeros_like(value, memory_format=torch.contiguous_format)
        entry = replace(shadow.entry, src=z.view(-1), dst=z.view(-1))
        ops.run((Plan((entry,), z.device, z.dtype),), p, self.backend)
        return forward_ad.make_dual(value, z)

    def kept(self, found: Sequence[PerturbedWeight]) -> list[Tensor]:
        raise RuntimeError(
            f"parameter {self.names[id(found[0].param)]} is read by code that torch functions do not show (a scripted module?): forward gradients "
            "need a model in plain Python"
        )

    def hold(self, shadow: PerturbedWeight) -> None:
        raise RuntimeError(
            f"parameter {self.names[id(shadow.param)]} is read past its module's attributes, where it carries no tangent: forward gradients need a "
            "model that reads its weights as module.weight; or take a two-sided estimate"
        )


def as_loss(value: Any) -> Tensor:
    """A closure's dual result as float64 [2]: the loss and its tangent.

    Raises:
        TypeError: it is no differentiable loss.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise TypeError(
            f"closure returned {type(value).__name__}: a forward gradient needs the loss as a tensor with one element, computed by torch"
        )
    primal, tangent = forward_ad.unpack_dual(value)
    if tangent is None:
        raise TypeError(
            "the closure's loss carries no tangent: it does not depend on the trained weights, or was computed outside of torch (item(), numpy)"
        )
    return torch.stack((primal.reshape(()).double(), tangent.reshape(()).double()))
