"""Behind what attends to other tokens, a forward runs for the tokens alone that something is read at.

    out[r, l] = module(x[r, l])   at the scored positions (r, l), 0 elsewhere

Belongs here: which modules of a model that is so, found by forwards, and the time of a forward in which they do so. Does not belong here: which positions are
scored (scoring.py), hidden states that are kept (frozen.py).

Cost: of the last block's weights the keys' and values' are run for every token, the others' for one or a few a row. Of blocks below it every output is read by
the next, so nothing is to be had there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetune.stand_ins import standing_in

Where = tuple[Tensor, Tensor]  # [P] rows and [P] columns, these counted from the end of a row


class Narrow:
    """Modules whose output is read at the scored positions alone, and which make it at each position of the input there."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)

    def at(self, where: Where, width: int, trial: bool = False) -> AbstractContextManager[None]:
        """Forwards inside run these modules at the positions `where` of rows of `width` tokens; elsewhere their output is 0, in a trial NaN."""
        index = where[0] * width + (width + where[1])
        run = _tried if trial else _at
        return standing_in({module: functools.partial(run, module.forward, index) for module in self.modules})


def _at(forward: Callable[[Tensor], Tensor], index: Tensor, x: Tensor, fill: float = 0.0) -> Tensor:
    """What a module makes of the rows `index` of x [R, L, H] or [R L, H], among rows of `fill`."""
    rows = x.reshape(-1, x.shape[-1])[index]
    out = forward(rows[None] if x.ndim == 3 else rows).reshape(index.shape[0], -1)
    full = out.new_full((x.shape[:-1].numel(), out.shape[-1]), fill)
    full[index] = out
    return full.view(*x.shape[:-1], -1)


def _tried(forward: Callable[[Tensor], Tensor], index: Tensor, x: Tensor) -> Tensor:
    """NaN, too, where the module makes it of NaN in the other rows of x: it mixes tokens."""
    other = torch.full_like(x, torch.nan).view(-1, x.shape[-1])
    other[index] = x.reshape(-1, x.shape[-1])[index]
    mixed = forward(other.view(x.shape)).reshape(other.shape[0], -1)[index].sum()
    return _at(forward, index, x, fill=torch.nan) + 0 * mixed


@torch.no_grad()
def narrow(
    model: nn.Module,
    last: nn.Module,
    forward: Callable[[], Tensor],
    where: Where,
    shape: tuple[int, int],
    bound: Callable[[Tensor], float],
) -> Narrow:
    """The modules of `last` and behind it that may run at the scored positions alone.

    Each that is called once, with one tensor [R, L, H] or [R L, H], is tried from the outside to the inside: with NaN in the other rows of its input, and then
    in those of its output, the numbers at the scored positions have to be there, and as without. Where another position is read the NaN comes through, even
    with a weight of 0. A batch in which all before a scored position is scored, too, shows nothing, and then there are none.

    Args:
        model: whose forward it is.
        last: its last block.
        forward: makes one forward of a batch; what is read of it.
        where: the positions at which it is read.
        shape: (R, L) of the batch.
        bound: how far numbers may be from those without, which are its argument: products of another shape add up in another order.
    """
    scored = torch.zeros(shape, dtype=torch.bool)
    scored[where[0].cpu(), where[1].cpu()] = True
    if not (scored[:, 1:] & ~scored[:, :-1]).any():
        return Narrow([])
    called = _called(model, last, forward, shape)
    plain = forward()
    most, found, inside = bound(plain), list[nn.Module](), set[nn.Module]()
    for module in called:
        if module in inside:
            continue
        try:
            with Narrow([module]).at(where, shape[1], trial=True):
                off = (forward() - plain).abs().max().item()
        except (TypeError, ValueError, RuntimeError, IndexError):  # it takes no other number of tokens
            continue
        if off <= most:
            found.append(module)
            inside.update(module.modules())
    return Narrow(found)


def _called(model: nn.Module, last: nn.Module, forward: Callable[[], Any], shape: tuple[int, int]) -> list[nn.Module]:
    """The modules that are called from `last` on, once each, with one tensor that has a row for every token, and that return one as well; outer ones first."""
    order: list[nn.Module] = []
    fits: dict[nn.Module, bool] = {}
    leading = (shape, (shape[0] * shape[1],))

    def tokens(value: Any) -> bool:
        return isinstance(value, Tensor) and tuple(value.shape[:-1]) in leading

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if order or module is last:
            fits[module] = module not in fits and len(args) == 1 and not kwargs and tokens(args[0])
            order.append(module)

    def ends(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in fits:
            fits[module] = fits[module] and tokens(output)

    handles = [m.register_forward_pre_hook(begins, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(ends) for m in model.modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [module for module in dict.fromkeys(order) if fits[module]]
