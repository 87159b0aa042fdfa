"""Whether a run's training batches are one sequence each, and what shows that they are right.

Belongs here: when it may pay, the checks on the longest batch that there can be, before the first step. Does not belong here: the sequence itself (packed.py).

Two things have to hold. They are looked at before the run's first step, at the weights that it starts from, so that a resumed run decides the same; the journal
has what was decided:

- log-probabilities are within `cached.bound` of those of padded rows;
- other tokens in one row leave the numbers of the others as they are, to the bit: whatever the type of the weights, no row reads another.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from zo_finetune import console
from zo_finetune.blocks import blocks_of
from zo_finetune.cached import bound, weights
from zo_finetune.data import in_batches
from zo_finetune.errors import UserError
from zo_finetune.load import Loaded
from zo_finetune.packed import CannotPack, Packer
from zo_finetune.scoring import Batch, Scorer

SEEN = 64  # examples, by whose lengths it is judged whether a run's batches pay


def pack(loaded: Loaded, scorer: Scorer) -> str:
    """Give `scorer` a packer where --batches says so; its kept states are there already.

    Returns:
        "packed", or "padded", which every batch is then; with --batches auto, of a run that packs, those that it would not pay for are padded, too.

    Raises:
        UserError: --batches packed, and the model or the run has none.
    """
    config = loaded.config
    if config.batches == "padded" or config.offload != "none":
        return "padded"
    try:
        packer = packer_of(loaded, scorer)
        if packer is None:
            return "padded"
        if reason := wrong(loaded, scorer, packer):
            raise CannotPack(reason)
    except CannotPack as reason:
        scorer.packer = None
        if config.batches == "packed":
            raise UserError(f"--batches packed: {reason}; leave it out") from reason
        console.say(f"batches are padded: {reason}")
        return "padded"
    scorer.packer = packer
    console.say(
        "training batches are one sequence each, without padding, where that saves time"
        if config.batches == "auto"
        else "training batches are one sequence each"
    )
    return "packed"


def packer_of(loaded: Loaded, scorer: Scorer) -> Packer | None:
    """None: by itself it would not pay. Raises CannotPack: there is none."""
    config, lm = loaded.config, loaded.language_model
    always = config.batches == "packed"
    if not always and (config.cuda_graph or lm.device.type != "cpu"):  # the first has few shapes, the other has not been measured
        return None
    if not isinstance(loaded.objective.batch(scorer, loaded.train_set[:1]), Batch):
        raise CannotPack(f"--objective {config.objective} writes answers")
    try:
        _, blocks = blocks_of(lm.model)
    except UserError as error:
        raise CannotPack(f"{type(lm.model).__name__} has no list of blocks") from error
    states = scorer.states
    run = blocks if states is None else blocks[states.lower.cut :]
    few = 0 if states is None or states.narrow is None else sum(map(weights, states.narrow.modules))  # for scored tokens alone
    packer = Packer(lm.model, len(run), sum(map(weights, run)) - few, always)
    seen = in_batches(loaded.train_set[:SEEN], config.batch_size)
    if not any(packer.pays([len(tokens) for example in part for tokens in example.inputs]) for part in seen):
        return None
    if lm.virtual_tokens:
        raise CannotPack(f"--peft {lm.peft} puts something before every row")
    return packer


@torch.no_grad()
def wrong(loaded: Loaded, scorer: Scorer, packer: Packer) -> str | None:
    """What is wrong with the sequence of most tokens that a batch can be, in words."""
    model = loaded.language_model.model
    longest = sorted(loaded.train_set, key=lambda e: -sum(map(len, e.inputs)))[: loaded.config.batch_size]
    longest = longest if len(longest) > 1 else longest * 2
    scorer.packer = Packer(model, packer.blocks, packer.weights, always=True)
    batch = scorer.collate(longest)
    plain = scorer.token_log_probs(replace(batch, states=None))
    try:
        packed = scorer.packed(batch, longest)
        off, most = (scorer.token_log_probs(packed) - plain).abs().max().item(), bound(model, plain)
        whole = replace(packed, states=None)
        other = replace(whole, input_ids=one_changed(packed))
        others = [scorer.token_log_probs(one)[1:] for one in (whole, other)]
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        return f"{type(model).__name__} takes no rows in one sequence ({type(error).__name__})"
    if not torch.equal(*others):
        return f"in one sequence the rows of {type(model).__name__} are not by themselves"
    if not off <= most:
        return f"in one sequence log-probabilities are up to {off:.2g} from those of padded rows, and rounding explains {most:.2g}"
    return None


def one_changed(batch: Batch) -> torch.Tensor:
    """The tokens of a packed batch with others in its first row."""
    assert batch.line is not None
    ids, length = batch.input_ids.clone(), batch.line.lengths[0]
    ids[:, :length] = ids[:, length - 1 : length]
    return ids
