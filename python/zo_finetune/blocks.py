"""Where a model's blocks are, and which part of its weights is trained.

Belongs here: the list of blocks, found in the model itself; --train-blocks and --train-only. Does not belong here: what a block's adapter is (adapters.py),
what is computed of blocks that are not trained (frozen.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from zo_finetune import values
from zo_finetune.errors import UserError, shortened
from zo_kernels.parameters import canonical_name
from zo_kernels.patterns import Patterns


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name, as `named_modules` has it, and the list of a model's blocks: of the lists of modules that lie in no other, that with most weights.

    Raises:
        UserError: the model has no list of modules.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(name, m) for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise UserError(
            f"{type(model).__name__} has no list of blocks: leave --train-blocks out, or name weights with --train-only"
        )
    return max(outer, key=lambda one: sum(p.numel() for p in one[1].parameters()))


def chosen_blocks(model: nn.Module, text: str) -> tuple[str, range]:
    """The name of the list of blocks, and the numbers of those that a --train-blocks chooses.

    Raises:
        UserError: it says nothing, or names a block that the model has not.
    """
    name, blocks = blocks_of(model)
    there, part = range(len(blocks)), values.blocks("--train-blocks", text)
    if max(-(part.start if part.start < 0 else 0), part.start + 1, part.stop or 0) > len(there):
        raise UserError(
            f"--train-blocks {text}: {type(model).__name__} has {len(there)} blocks, {name}.0 to {name}.{len(there) - 1}: choose among them"
        )
    return name, there[part]


def inside_blocks(model: nn.Module, text: str) -> str:
    """A regular expression that the names of the modules in the chosen blocks begin with. Raises as `chosen_blocks`."""
    name, numbers = chosen_blocks(model, text)
    return rf"{re.escape(name)}\.(?:{'|'.join(map(str, numbers))})\."


def train_part(model: nn.Module, train_blocks: str | None, train_only: Sequence[str] | None) -> None:
    """Of the parameters that are trained, leave those in some blocks, and of them those in whose name, or canonical name, one of some regular expressions
    occurs; the others are frozen.

    Raises:
        UserError: names the option, and says what there is.
    """
    if train_blocks is None and not train_only:
        return
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            names.setdefault(p, []).append(name)
    chosen = set(names)
    if train_blocks is not None:
        inside = inside_blocks(model, train_blocks)
        chosen = {p for p in chosen if any(re.match(inside, name) for name in names[p])}
    if train_only:
        chosen = matching({p: names[p] for p in names if p in chosen}, train_only)
    if not chosen:
        raise UserError(
            f"--train-blocks {train_blocks}: nothing that is trained lies there, only in {kinds(names.values())}: choose others"
        )
    for p in names:
        p.requires_grad_(p in chosen)


def matching(names: dict[nn.Parameter, list[str]], patterns: Sequence[str]) -> set[nn.Parameter]:
    """The parameters that a --train-only chooses. Raises UserError: an expression is none, or occurs in no name."""
    found, used = set(), set()
    try:
        places = [Patterns("--train-only", [pattern]) for pattern in patterns]
        for p, known in names.items():
            for k, pattern in enumerate(places):
                if any(pattern.first(name) is not None for name in {*known, *map(canonical_name, known)}):
                    found.add(p)
                    used.add(k)
    except ValueError as error:
        raise UserError(f"{error}: mend it") from error
    if unused := [pattern for k, pattern in enumerate(patterns) if k not in used]:
        raise UserError(f"--train-only {unused[0]!r:.80} occurs in no name of what could be trained: {kinds(names.values())}")
    return found


def kinds(names: Iterable[Sequence[str]]) -> str:
    """Names of parameters for a message, those alike but for their numbers once."""
    return shortened(dict.fromkeys(re.sub(r"\d+", "N", name) for known in names for name in known), width=60)
