"""Rows of different lengths one after another, as one sequence: none of its tokens is padding.

    row r of the batch is tokens s_r ... s_(r+1) - 1 of the sequence; its positions begin anew, and each row's attention is run by itself

Belongs here: how a forward of such a sequence is made, of which models, and by which lengths it saves time. Does not belong here: which rows are in a batch
(data.py) and what is read of it (scoring.py), whether a run does so (packing.py).

All that a transformer does but attention it does to each token by itself, so only attention has to know of the rows. For the time of a forward the model's
attention is another one of transformers' table of attentions, which takes the sequence apart and gives each row to the one that was there: the work is the sum
over the rows of their own, not the square of the sequence's length, and no token sees another row's. The mask is made by transformers too, for the longest row;
those of others are its corners. So windows, chunks and encoders, which see both sides, are as the model has them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "zo_finetune_rows"  # in transformers' tables

# Orders of magnitude that decide, not promises: of stories15m in fp32, in CPU time of one thread of a busy machine, where a batch of 480 tokens, 282
# of them padding, took 134 to 152 ms a forward, and its 198 tokens in one sequence 77 to 87 ms. In 16 bits a token costs a CPU more, and more would pay.
ROW_NS = 40_000.0  # what a row costs in each block beside its tokens: calls of attention
TOKEN_NS = 0.03  # a token, by the weight


class CannotPack(Exception):
    """Why rows cannot stand in one sequence, in words that follow a colon."""


@dataclass(frozen=True)
class Line:
    """A sequence of rows: the lengths of these, and where each token stands in its own. positions: [1, S]."""

    lengths: tuple[int, ...]
    positions: Tensor


class Packer:
    """Forwards of a model whose rows are one sequence.

    Args:
        blocks, weights: how many of its blocks run, and how many of their weights read every token: by these batches are chosen.
        always: batches are packed, whatever it saves.

    Raises:
        CannotPack: the model's attention is not one that can be exchanged.
    """

    def __init__(self, model: nn.Module, blocks: int, weights: int, always: bool = False) -> None:
        self.blocks, self.weights, self.always = blocks, weights, always
        found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        kind = getattr(found[0], "_attn_implementation", None)
        if kind != "sdpa":
            raise CannotPack(f"the attention of {type(model).__name__} is {kind or 'its own'}, and not sdpa")
        self.configs = {id(c): c for c in found if getattr(c, "_attn_implementation", None) == kind}.values()
        self._counts: Any = next((m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")), None)

    def pays(self, lengths: Sequence[int]) -> bool:
        """Whether a forward of rows of these lengths takes less time as one sequence."""
        padding = len(lengths) * max(lengths) - sum(lengths)
        return self.always or padding * self.weights * TOKEN_NS > len(lengths) * self.blocks * ROW_NS

    def of(self, input_ids: Tensor, lengths: Sequence[int]) -> tuple[Line, Tensor]:
        """The sequence of padded rows [R, L], and where each of its tokens stands among the R L."""
        width = input_ids.shape[1]
        places = torch.cat([torch.arange(n) + r * width for r, n in enumerate(lengths)]).to(input_ids.device)
        return Line(tuple(lengths), self._positions(input_ids).reshape(-1)[places][None]), places

    def _positions(self, input_ids: Tensor) -> Tensor:
        """[R, L]: from 0; in RoBERTa and those made after it from the padding's number on, counted by the model itself."""
        if self._counts is not None:
            own: Tensor = self._counts.create_position_ids_from_input_ids(input_ids, self._counts.padding_idx)
            return own
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

    @contextlib.contextmanager
    def apart(self, line: Line) -> Iterator[None]:
        """Forwards inside are of a sequence of these rows."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        lengths, most = line.lengths, max(line.lengths)
        start = next(end - most for end, n in zip(itertools.accumulate(lengths), lengths, strict=True) if n == most)

        def mask(**given: Any) -> Tensor | None:
            """Of the longest row; None: attention knows it without, since it is the usual one."""
            of_row = {"q_length": most, "kv_length": most, "q_offset": start, "kv_offset": start}
            made: Tensor | None = sdpa_mask(**{**given, **of_row})
            return None if made is None or torch.equal(made[0, 0], torch.ones_like(made[0, 0]).tril()) else made

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any) -> tuple[Tensor, None]:
            if given.get("position_bias") is not None or k.shape[2] != q.shape[2]:
                raise CannotPack("its attention has more than a mask")
            parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), lengths, strict=True)
            each = [
                sdpa_attention_forward(module, a, b, c, None if mask is None else mask[..., :n, :n], **given)[0]
                for a, b, c, n in parts
            ]
            return torch.cat(each, 1), None

        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
        for config in self.configs:
            config._attn_implementation = {"": NAME}
        try:
            yield
        finally:
            for config in self.configs:
                config._attn_implementation = {"": "sdpa"}
