"""--train-blocks dominant: the block behind which a model's activations first stand out, found by one forward.

    r_k = max |h| / median |h|   over the hidden states h that leave block k (r_-1: that enter the first);   the block with the largest r_k - r_k-1

Belongs here: the criterion, the text of that forward. Does not belong here: which blocks there are, and what is trained in them (blocks.py).

Dominant-Layer ZO (2026, arXiv 2606.05516) trained each decoding layer of LLaMA2-7B and of Qwen3-8B alone, with MeZO: one did as well as all together,
whatever the task, and it was the first whose activations have outliers. Outliers of that kind, above 100 and about a thousand times the median, come up in
one block and stay (Massive Activations, Sun et al. 2024, arXiv 2402.17762). The criterion here is ours: the largest rise needs no threshold, so that models
whose outliers are milder have such a block, too. It is a function of the model alone. What training it is worth here: docs/learning.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_finetune.blocks import blocks_of
from zo_finetune.errors import UserError
from zo_finetune.values import DOMINANT

TOKENS = 48  # of the text, at most
TEXT = (
    "The old bridge was closed for three months while its stones were cleaned and its railings painted green. People who lived on the other side walked along "
    "the river to the mill, where a ferry took them over for a small coin. When it opened again, nobody could say whether they had missed it."
)


@dataclass(frozen=True)
class Dominant:
    """`before` and `behind`: the largest activation as a multiple of the median, where the hidden states enter the block and where they leave it."""

    block: int
    of_blocks: int
    before: float
    behind: float

    def __str__(self) -> str:
        return (
            f"block {self.block} of {self.of_blocks}, counted from 0, is the dominant one: its largest activation is {self.before:,.0f} times the median in "
            f"front of it and {self.behind:,.0f} times behind it, the largest rise of all blocks"
        )


@torch.no_grad()
def dominant(model: Any, tokenizer: Any) -> Dominant:
    """The block of a model in which activations rise most above their median.

    Raises:
        UserError: the model has no list of blocks, or its hidden states show nothing.
    """
    _, blocks = blocks_of(model)
    ratios: list[float] = []

    def note(value: Any) -> None:
        states = (value if isinstance(value, Tensor) else value[0]).detach().float().abs()
        ratios.append((states.max() / states.median()).item())

    first = blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: note(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    handles = [first, *(block.register_forward_hook(lambda block, args, output: note(output)) for block in blocks)]
    try:
        tokens = torch.tensor([tokenizer(TEXT).input_ids[:TOKENS]], device=model.device)
        model(input_ids=tokens.clamp(max=model.get_input_embeddings().weight.shape[0] - 1))
    finally:
        for handle in handles:
            handle.remove()
    rises = [behind - before for before, behind in zip(ratios, ratios[1:], strict=False)]
    if len(rises) != len(blocks) or not all(map(math.isfinite, rises)):
        raise UserError(
            f"--train-blocks {DOMINANT}: the hidden states of {type(model).__name__} show no such block: choose by number"
        )
    block = max(range(len(rises)), key=rises.__getitem__)
    return Dominant(block, len(blocks), ratios[block], ratios[block + 1])
