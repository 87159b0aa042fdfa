"""The answer is what the model writes: greedily, at most `MOST_NEW` tokens, up to a newline or an end token; without the blanks around it.

Transformers' `generate` does it, with a configuration of ours: the one in a model's folder would sample, penalise or force tokens. Prompts are padded
on the left, under a mask that is made of their lengths and not of the padding's token, which may be the end token; answers are cut where their row
ended. In front of a soft prompt or prefix padding would shift positions, so that with one of them a batch has prompts of one length.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from zo_finetune import team
from zo_finetune.data import in_batches
from zo_finetune.decoding.base import Answers, Decoding
from zo_finetune.decoding.scores import choose, score_table
from zo_finetune.errors import UserError
from zo_finetune.scoring import Encoded, Scorer, new_tokens
from zo_finetune.tasks.base import Task


@dataclass(frozen=True)
class Prompts:
    """What is to be answered, in parts that `generate` takes: places in `examples`, token numbers [R, L] and mask [R, L], padded on the left."""

    examples: tuple[Encoded, ...]
    parts: tuple[tuple[tuple[int, ...], Tensor, Tensor], ...]


class NewlineCriterion:
    """Ends a row at its first token with a newline in it, whatever the tokenizer makes of one. `ends`: of each row that is ended, its number of new
    tokens, that one included.

    A newline may be several tokens together, and a byte of an unfinished character in front of it would hide it: the text so far is looked at, and the
    last token alone.
    """

    def __init__(self, tokenizer: Any, width: int) -> None:
        self.tokenizer, self.width = tokenizer, width
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        for row, tokens in enumerate(input_ids[:, self.width :].tolist()):
            if row not in self.ends and any("\n" in text_of(self.tokenizer, t) for t in (tokens, tokens[-1:])):
                self.ends[row] = len(tokens)
        return torch.tensor([row in self.ends for row in range(len(input_ids))], device=input_ids.device)


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def is_soft(model: Any) -> bool:
    """Whether a peft model puts virtual tokens, or keys and values of some, in front of a text."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """By tokenizer, model and the folder's configuration of generation: of that, nothing else counts."""
    found = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        said = getattr(config, "eos_token_id", None)
        found |= set(said) if isinstance(said, list) else {said}
    return {token for token in found if isinstance(token, int) and token >= 0}


@contextlib.contextmanager
def neutral(model: Any) -> Iterator[None]:
    """`generate` fills what a call's configuration leaves open from the model's own: for the while, that is one that says nothing."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


class Generation(Decoding):
    """Free answers of a causal model."""

    name = "generate"
    captured = False  # how many tokens are written depends on them

    def answers(
        self,
        task: Task,
        scorer: Scorer,
        examples: Sequence[Encoded],
        batch_size: int,
        progress: Callable[[int], None] = lambda n: None,
    ) -> Answers:
        """Beside the texts, the scores of the answers that are trained on, whose mean is the loss."""
        parts = list(in_batches(sorted(range(len(examples)), key=lambda k: len(examples[k].prompt)), batch_size))
        texts = team.mapped(lambda part: write(scorer, self.batch(scorer, [examples[k] for k in part])), parts, progress, len)
        written = {k: text for part, own in zip(parts, texts, strict=True) for k, text in zip(part, own, strict=True)}
        answers = choose(score_table(scorer.scores, scorer, examples, batch_size), examples)
        tokens = torch.tensor([len(e.spans[0].targets) for e in examples])
        return replace(self._of(task, examples, [written[k] for k in range(len(examples))], answers), tokens=tokens)

    def batch(self, scorer: Scorer, examples: Sequence[Encoded], multiple: int = 1) -> Prompts:
        places = sorted(range(len(examples)), key=lambda k: len(examples[k].prompt))
        alike = groupby(places, key=lambda k: len(examples[k].prompt) if is_soft(scorer.model) else 0)
        groups = [tuple(group) for _, group in alike]
        return Prompts(tuple(examples), tuple((group, *pad([examples[k].prompt for k in group], scorer)) for group in groups))

    def respond(self, task: Task, scorer: Scorer, batch: Prompts) -> Answers:
        nothing = torch.zeros(len(batch.examples), 1, device=scorer.device)
        answers = Answers(nothing, nothing[:, 0].long(), nothing[:, 0].long())
        return self._of(task, batch.examples, write(scorer, batch), answers)

    @staticmethod
    def _of(task: Task, examples: Sequence[Encoded], texts: Sequence[str], answers: Answers) -> Answers:
        return replace(answers, texts=tuple(texts), references=tuple(e.references for e in examples), comparison=task.comparison)


def pad(prompts: Sequence[Sequence[int]], scorer: Scorer) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), scorer.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return ids.to(scorer.device), mask.to(scorer.device)


def write(scorer: Scorer, prompts: Prompts) -> list[str]:
    """What the model writes behind each prompt, in the order of the examples.

    Raises:
        UserError: the model has no `generate`.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    model: Any = scorer.model
    tokenizer = scorer.tokenizer
    if not hasattr(model, "generate"):
        raise UserError(f"{type(model).__name__} cannot generate: choose a causal language model")
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens(scorer.max_length),
        eos_token_id=sorted(ends) or None,
        pad_token_id=scorer.pad_id,
    )
    texts: dict[int, str] = {}
    for places, ids, mask in prompts.parts:
        criterion = NewlineCriterion(tokenizer, ids.shape[1])
        with neutral(model), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Position ids are not supported"
            )  # peft's, which has prompts of one length, see above
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([criterion]),
            )
        for row, (place, tokens) in enumerate(zip(places, out[:, ids.shape[1] :].tolist(), strict=True)):
            end = next((k for k, token in enumerate(tokens) if token in ends), len(tokens))
            text = text_of(tokenizer, tokens[: min(end, criterion.ends.get(row, end))])
            texts[place] = text.partition("\n")[0].strip()
    return [texts[place] for place in range(len(prompts.examples))]
