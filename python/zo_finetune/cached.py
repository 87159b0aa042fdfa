"""Whether a run keeps the hidden states of its frozen lower blocks, and what shows that they are right.

Belongs here: when it pays, the checks on real batches before the first step, the filling. Does not belong here: how a forward begins with kept states
(frozen.py), and what of it needs the scored positions alone (narrow.py).

Three things have to hold, and each is looked at before the run's first step, at the weights that it starts from, so that a resumed run decides the same:

- nothing that is trained is read before the cut (`frozen.cut_of`, by one forward);
- the blocks behind the cut read nothing of the others but their states: one batch with the states of that very forward must give the same numbers to the bit;
- the states that were kept are those: on a batch of the first examples and one of the longest, log-probabilities within `bound` of those without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetune import console
from zo_finetune.blocks import blocks_of
from zo_finetune.data import in_batches
from zo_finetune.errors import UserError
from zo_finetune.frozen import CannotKeep, Lower, States, Tokens, cut_of, cuts_of, room
from zo_finetune.load import Loaded, part_of
from zo_finetune.model import LanguageModel
from zo_finetune.narrow import Narrow, narrow
from zo_finetune.scoring import Batch, Encoded, Scorer, padded

LEAST_USES, LEAST_SHARE = 2.0, 0.1  # of each kept example; of the weights that a forward reads, those below the cut
CHECKED = 2  # examples, on which it is seen that blocks read nothing of those below but their states
MOST_IN_MEMORY = 2 << 30  # bytes; more goes to the disk by itself


@dataclass(frozen=True)
class Cache:
    """What result.json says of the states that were kept. `blocks`: how many need not run; `examples`: forwards of these inputs filled it for the training,
    as many as `forwards` of a step's batch run; the `evaluation_` ones are those of what is evaluated before and after it, and `bytes` are of both."""

    blocks: int
    of_blocks: int
    examples: int
    forwards: float
    seconds: float
    evaluation_examples: int
    evaluation_seconds: float
    bytes: int
    where: str

    def __str__(self) -> str:
        where, rest = "in memory" if self.where == "memory" else "on disk", self.of_blocks - self.blocks
        more = f" and {self.evaluation_examples:,} for the evaluations" if self.evaluation_examples else ""
        return (
            f"hidden states of {self.examples:,} inputs{more} behind {self.blocks} of {self.of_blocks} blocks: {self.bytes:,} bytes {where}, "
            f"in {self.seconds + self.evaluation_seconds:.1f} s; a forward runs the other {rest} alone"
        )


def keep(loaded: Loaded, scorer: Scorer, evaluations: int) -> dict[str, Any] | None:
    """Give `scorer`, and those that `loaded` makes from now on, the states of what is run more than once, where --cache says so: the training examples, the
    dev examples if they are evaluated more than once, and what is evaluated before and after the training.

    Args:
        evaluations: on the dev examples in the whole run.

    Returns:
        what result.json says; None: nothing is kept.

    Raises:
        UserError: states were asked for, and there can be none.
    """
    config = loaded.config
    if config.cache == "off" or config.offload != "none":
        return None
    examples = loaded.train_set + (loaded.dev_set if evaluations > 1 else [])
    if config.cache == "auto" and not used_again(loaded, len(examples), evaluations):
        return None
    about = (inputs_of(examples), inputs_of(loaded.evaluated))
    try:
        if not isinstance(loaded.objective.batch(scorer, examples[:1]), Batch):
            raise CannotKeep(f"--objective {config.objective} writes answers, and each of their tokens is read by the whole model")
        found = loaded.common.kept(config, loaded.language_model, about, lambda: made(loaded, scorer, examples))
    except CannotKeep as reason:
        scorer.states = None
        if config.cache != "auto":
            raise UserError(f"--cache {config.cache}: {reason}; leave it out, or give --cache off") from reason
        if part_of(config):
            console.say(f"no hidden states are kept: {reason}; every forward runs the whole model")
        return None
    if found is None:
        return None
    scorer.states, cache = found
    loaded.states = scorer.states
    console.say(str(cache))
    return asdict(cache)


def made(loaded: Loaded, scorer: Scorer, examples: Sequence[Encoded]) -> tuple[States, Cache] | None:
    """The states, looked at; None: by themselves they do not pay. Raises CannotKeep: the model's shape does not allow it."""
    config = loaded.config
    lower = lower_blocks(loaded, scorer)
    if config.cache == "auto" and not large(loaded.language_model.model, lower):
        return None
    states, cache = filled(loaded, scorer, lower, examples)
    scorer.states = states
    states.narrow = narrowed(loaded.language_model.model, scorer, scorer.collate(examples[: config.batch_size]))
    if reason := wrong(loaded, scorer, examples):
        raise CannotKeep(reason)
    return states, cache


def lower_blocks(loaded: Loaded, scorer: Scorer) -> Lower:
    """The blocks that need not run again. Raises CannotKeep: there are none, or the model's shape does not allow it."""
    lm, config = loaded.language_model, loaded.config
    if lm.virtual_tokens:
        raise CannotKeep(f"--peft {lm.peft} puts something before what every block sees")
    if any(p.requires_grad for p in lm.model.get_input_embeddings().parameters()):
        raise CannotKeep("the input embedding is trained, perhaps as a part of the output's")
    try:
        name, _ = blocks_of(lm.model)
    except UserError as error:
        raise CannotKeep(f"{type(lm.model).__name__} has no list of blocks") from error
    first = loaded.train_set[: config.batch_size]
    with torch.no_grad():
        batch = scorer.collate(first)
        cut = cut_of(lm.model, lambda: scorer.outputs(batch.input_ids, batch.attention_mask))
        if cut == 0:
            raise CannotKeep(f"the first of {name}, or what is before it, reads weights that are trained")
        lower = Lower(lm.model, cut)
        with lower.recording(stop=False) as found:
            plain = scorer.token_log_probs(batch)
        (states,) = found
        if states.ndim != 3 or states.shape[:2] != batch.input_ids.shape:
            raise CannotKeep(f"the states of {name} have the shape {tuple(states.shape)}, and not rows, tokens, width")
        scorer.states = States(lower)
        fill(scorer, scorer.states, first, config.eval_batch_size)
        again = scorer.token_log_probs(replace(batch, states=states))
        if not torch.equal(plain, again) and torch.equal(plain, scorer.token_log_probs(batch)):
            raise CannotKeep(f"later blocks of {type(lm.model).__name__} read more of the earlier ones than their hidden states")
        scorer.states = None
    return lower


class Below:
    """Of a method that moves one block of parameters in a step: the model's blocks below that, which see the same at all points of the step.

    Args:
        cuts: of each parameter that is trained, by its name, how many of the model's blocks come before what reads it.
        least: so many need not run anyway.
    """

    def __init__(self, model: nn.Module, cuts: Mapping[str, int], least: int) -> None:
        self.model, self.cuts, self.least = model, cuts, least
        self._made: dict[int, Lower] = {}

    @classmethod
    def of(cls, loaded: Loaded, scorer: Scorer, block: Sequence[str] | None) -> Below | None:
        """None: a step may move all parameters (`block` is None), --cache is off, or the model's shape does not allow it, which is said."""
        lm = loaded.language_model
        if block is None or loaded.config.cache == "off" or loaded.config.offload != "none":
            return None
        try:
            found = cls._of(lm, scorer, loaded.train_set[:CHECKED])
        except (CannotKeep, UserError) as reason:
            console.say(f"in each forward of a step all blocks run: {reason}")
            return None
        return found

    @classmethod
    @torch.no_grad()
    def _of(cls, lm: LanguageModel, scorer: Scorer, examples: Sequence[Encoded]) -> Below:
        """Raises CannotKeep: with the states that come out of a block a forward of these examples is another."""
        if lm.virtual_tokens:
            raise CannotKeep(f"--peft {lm.peft} puts something before what every block sees")
        batch = replace(scorer.collate(examples), states=None)
        cuts = cuts_of(lm.model, lambda: scorer.outputs(batch.input_ids, batch.attention_mask))
        least = 0 if scorer.states is None else scorer.states.lower.cut
        found = cls(lm.model, {name: cuts[p] for name, p in lm.model.named_parameters() if p in cuts}, least)
        for cut in sorted({cut for cut in found.cuts.values() if cut > least}):
            with scorer.once(found._at(cut)):
                if not torch.equal(scorer.token_log_probs(batch), scorer.token_log_probs(batch)):
                    raise CannotKeep(
                        f"later blocks of {type(lm.model).__name__} read more of the earlier ones than their hidden states"
                    )
        return found

    def _at(self, cut: int) -> Lower:
        if cut not in self._made:
            self._made[cut] = Lower(self.model, cut)
        return self._made[cut]

    def lower(self, block: Sequence[str] | None) -> Lower | None:
        """What runs once in a step that moves these parameters; None: nothing that would not be kept anyway."""
        cut = 0 if block is None else min(self.cuts.get(name, 0) for name in block)
        return self._at(cut) if cut > self.least else None


def used_again(loaded: Loaded, examples: int, evaluations: int) -> bool:
    """Whether examples come back often enough in the whole run."""
    config = loaded.config
    uses = config.recipe().forwards(config.steps) * config.batch_size * config.accumulate + evaluations * len(loaded.dev_set)
    return uses >= LEAST_USES * examples


def large(model: Any, lower: Lower) -> bool:
    """Whether the blocks that need not run are enough of a forward, by their weights."""
    _, blocks = blocks_of(model)
    below, rest = (sum(map(weights, part)) for part in (lower.blocks, [*blocks[lower.cut :], model.get_output_embeddings()]))
    return below >= LEAST_SHARE * (below + rest)


def weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def filled(loaded: Loaded, scorer: Scorer, lower: Lower, examples: Sequence[Encoded]) -> tuple[States, Cache]:
    """The states of these examples, and of what is evaluated before and after: by itself in memory alone, since a forward of it is all that this saves."""
    config, states = loaded.config, States(lower)
    size = states.bytes_of(inputs_of(examples))
    disk = config.cache == "disk" or (config.cache == "auto" and size > MOST_IN_MEMORY)
    folder = Path(config.output) if disk else None
    seconds = fill(scorer, states, examples, config.eval_batch_size, folder)
    trained, more = len(states.places), 0.0
    if config.cache != "auto" or size + states.bytes_of(inputs_of(loaded.evaluated)) <= MOST_IN_MEMORY:
        more = fill(scorer, states, loaded.evaluated, config.eval_batch_size, folder)
    evaluated_too = len(states.places) - trained
    of_batch = config.batch_size * config.accumulate * sum(len(e.inputs) for e in loaded.train_set) / len(loaded.train_set)
    where = "disk" if disk else "memory"
    cache = Cache(lower.cut, lower.total, trained, trained / of_batch, seconds, evaluated_too, more, states.bytes, where)
    return states, cache


def inputs_of(examples: Sequence[Encoded]) -> list[Tokens]:
    """Each distinct input, short ones first: states are computed in batches of these, the same in every run of a configuration."""
    return sorted(dict.fromkeys(tokens for example in examples for tokens in example.inputs), key=len)


@torch.no_grad()
def fill(scorer: Scorer, states: States, examples: Sequence[Encoded], rows: int, folder: Path | None = None) -> float:
    """Keep the states of the inputs of some examples too, `rows` of them computed at once; returns the seconds. Raises OSError: no space in `folder`."""
    started = time.perf_counter()
    inputs = [tokens for tokens in inputs_of(examples) if tokens not in states.places]
    if not inputs:
        return 0.0
    store, end = room(sum(map(len, inputs)), states.lower, folder), 0
    states.stores.append(store)
    with console.Counter("computing hidden states", len(inputs), "input") as counter:
        for part in in_batches(inputs, rows):
            with states.lower.recording() as found:
                input_ids, mask = padded(part, scorer.form, scorer.pad_id)
                scorer.outputs(input_ids.to(scorer.device), None if mask is None else mask.to(scorer.device))
            for tokens, rows_of in zip(part, found[0].cpu(), strict=True):
                states.places[tokens], start, end = (store, end), end, end + len(tokens)
                store[start:end] = rows_of[: len(tokens)]
            counter.advance(len(part))
    return time.perf_counter() - started


def narrowed(model: nn.Module, scorer: Scorer, batch: Batch) -> Narrow:
    """What of a forward that begins with kept states may run at the scored positions alone, by a batch that has them."""
    _, blocks = blocks_of(model)
    where, shape = (batch.point_rows, batch.point_columns), (batch.input_ids.shape[0], batch.input_ids.shape[1])
    return narrow(model, blocks[-1], lambda: scorer.token_log_probs(batch), where, shape, lambda plain: bound(model, plain))


@torch.no_grad()
def wrong(loaded: Loaded, scorer: Scorer, examples: Sequence[Encoded]) -> str | None:
    """Whether log-probabilities with kept states are further from those without than `bound` says, in words."""
    rows = loaded.config.batch_size
    for part in (examples[:rows], sorted(examples, key=lambda e: -e.length)[:rows]):
        batch = scorer.collate(part)
        plain, kept = scorer.token_log_probs(replace(batch, states=None)), scorer.token_log_probs(batch)
        most = bound(loaded.language_model.model, plain)
        if not (off := (kept - plain).abs().max().item()) <= most:
            return f"with them log-probabilities are up to {off:.2g} from those without, and rounding explains {most:.2g}"
    return None


def bound(model: nn.Module, log_probs: Tensor) -> float:
    """How far apart log-probabilities of one model may be that differ in the shapes of their products alone, and so in the order of their sums.

    A sum of k products in fp32, added up in another order, moves by about sqrt(k) u of its size, u = 2^-24 (Higham and Mary 2019, with high probability),
    and by one rounding to the type of the weights where that is coarser. The two sums that each of n blocks adds to the residual stream move on their own,
    so that the states move by sqrt(2 n) of that; what is behind the blocks is a norm and a product, so logits move by that share of their spread, for which
    the largest |log p| stands, and a log-probability by twice that. Four times this is allowed.
    """
    _, blocks = blocks_of(model)
    k = max(max(p.shape) for p in blocks.parameters())
    dtype = next(blocks.parameters()).dtype
    one = max(math.sqrt(k) * 2.0**-24, torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0)
    return 4 * 2 * math.sqrt(2 * len(blocks)) * one * max(1.0, log_probs.abs().max().item())
