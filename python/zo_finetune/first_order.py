"""First-order fine-tuning: torch's SGD, Adam and AdamW behind the step that `train.py` calls, as the baseline of the zeroth-order methods.

Belongs here: gradients by backpropagation over the micro-batches of a step, their clip, when a step is skipped. Does not belong here: torch's update
rules, learning rates and their sources (methods.py), schedules (train.py).

The loss is the one that the zeroth-order methods see: eval mode, so without dropout, in the weights' own dtype, averaged over the micro-batches.
Gradients have the dtype of the weights and live within a step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from zo_finetune.errors import UserError
from zo_kernels.interrupts import outside, uninterrupted

KINDS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class FirstOrder(torch.optim.Optimizer):
    """An optimizer of torch over a model's trainable parameters, with the step of `train.Optimizer`.

    Args:
        model: its parameters that require a gradient are trained.
        kind: a key of `KINDS`.
        lr: learning rate.
        clip: the most that the norm of all gradients together may be, as `torch.nn.utils.clip_grad_norm_` has it; None: any.
        options: of torch's class. `weight_decay` is what that class makes of it: part of the gradient for SGD and Adam, decoupled for AdamW.

    Attributes:
        projected_gradient: the norm of the last step's gradient before the clip, fp32, 0-d: what a log has in its column of that name.
        steps, skipped: steps done; those of them whose loss or gradient was not finite, which changed nothing.

    Raises:
        UserError: a trained weight is fp16, whose gradients underflow.
    """

    def __init__(self, model: nn.Module, kind: str, lr: float, *, clip: float | None = None, **options: Any) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        dtypes = {p.dtype for p in model.parameters()}
        if torch.float16 in dtypes:
            raise UserError(
                "--dtype float16: gradients of fp16 weights and activations underflow (the papers train fp32 weights under autocast with a scaled loss): "
                "give --dtype bfloat16 or float32"
            )
        if any(p.dtype == torch.bfloat16 for p in self.trained):
            warnings.warn(
                "trained weights are bfloat16, and torch rounds each update to the nearest: what is less than about 1/512 of a weight is lost; "
                "--dtype float32 keeps it",
                stacklevel=2,
            )
        self.inner = KINDS[kind](self.trained, lr=lr, **options)
        super().__init__(self.inner.param_groups, {})  # the same groups: a schedule that sets lr here sets it there
        self.state = self.inner.state
        self.clip = clip
        self.steps = self.skipped = 0
        self.projected_gradient = torch.zeros(())

    def step(self, closure: Callable[..., Any], batches: Sequence[Any]) -> Tensor:  # type: ignore[override]
        """One step; returns the mean loss over the micro-batches, before it. An exception leaves weights and state as they were.

        Raises:
            UserError: the loss has no gradient. What the closure raises.
        """
        with uninterrupted():
            try:
                self._clear()
                losses = [outside(self._backward, closure, batch, len(batches)) for batch in batches]
                loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
                self.projected_gradient = norm.float()
                if torch.isfinite(norm) and torch.isfinite(loss):
                    if self.clip is not None:
                        torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip, norm)
                    self.inner.step()
                else:
                    self.skipped += 1
                self.steps += 1
            finally:
                self._clear()
        return loss

    def _backward(self, closure: Callable[..., Any], batch: Any, parts: int) -> Tensor:
        with torch.enable_grad():
            loss = closure(batch)
            if not loss.requires_grad:
                raise UserError(
                    "the objective has no gradient, which first-order methods follow: choose a zeroth-order --method, or another objective"
                )
            (loss / parts).backward()
        return loss.detach()

    def _clear(self) -> None:
        for p in self.trained:
            p.grad = None

    def forwards(self, step: int) -> int:
        """What a step costs in forward passes: its own, and a backward pass that counts as two."""
        return 3

    def movement(self) -> float:
        """What a step moves a weight by is no number of the step's here, and nobody reads the weights for it."""
        return math.nan

    def block(self) -> None:
        """All parameters take part in a step."""

    def state_bytes(self) -> int:
        """What torch's optimizer keeps between steps. Gradients are no part of it."""
        held = [v for state in self.inner.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in held)

    def open_journal(self, path: Any, **more: Any) -> NoReturn:
        raise NotImplementedError("a method that `methods.Method.no_journal` says has none")

    def close_journal(self) -> None:
        """There is none."""
