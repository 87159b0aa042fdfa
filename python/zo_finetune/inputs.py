"""The space of the inputs that a model's matrices get from the training rows: what LoRA's first matrices begin with, and what directions can lie in.

Belongs here: which rows are run, which matrices are looked at, and where the factors go. Does not belong here: how factors come about (zo_kernels'
`input_factors`), what is done with them in a step (zo_kernels, methods.py).

The factors are a function of base model, training rows and seed. A run computes them once; from then on they lie in a file beside its journal, from which a
resumed run and a replay take them. (peft has EVA's components for LoRA, and not these: one look serves both, whitened and not, adapters and directions, and
counts no padding.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels
from zo_finetune import adapters, console
from zo_finetune.common import Common
from zo_finetune.config import INPUT_INITS, Config
from zo_finetune.data import in_batches
from zo_finetune.errors import UserError, one_line, shortened
from zo_finetune.frozen import States
from zo_finetune.model import LanguageModel
from zo_finetune.scoring import Encoded
from zo_kernels import InputFactors, journal
from zo_kernels.parameters import canonical_name
from zo_kernels.patterns import Patterns
from zo_kernels.quantized import trained_weights

MOST_INPUTS = 1024  # of the training rows, the first ones of the run's sample: some 20,000 tokens of short texts
RIDGE = 0.1  # of the mean eigenvalue, where inputs are whitened


@dataclass(frozen=True)
class Wanted:
    """What to look for. `matrices`: their names; or a regular expression, which chooses among the weights that are trained."""

    rank: int
    power: float
    ridge: float
    matrices: frozenset[str] | str = ""

    def names(self, model: nn.Module) -> frozenset[str]:
        """Of the parameters among which the matrices are. Raises ValueError: the expression is none, or chooses none."""
        if not isinstance(self.matrices, str):
            return self.matrices
        trained = set(map(canonical_name, trained_weights(model)))
        patterns = Patterns("matrices", [self.matrices]) if self.matrices else None
        found = frozenset(name for name in trained if patterns is None or patterns.first(name) is not None)
        if not found:
            raise ValueError(
                f"matrices={self.matrices}: no weight that is trained has such a name; they are {shortened(sorted(trained), 3)}"
            )
        return found


def wanted(config: Config, model: Any) -> Wanted | None:
    """The factors that a run of this configuration needs; None: none."""
    if config.adapter is None and config.lora_init in INPUT_INITS:
        names = {canonical_name(f"{name}.base_layer.weight") for name, _ in adapters.lora_layers(model)}
        rank = adapters.RANK if config.lora_rank is None else config.lora_rank
        power = INPUT_INITS[config.lora_init]
        return Wanted(rank, power, RIDGE if power < 0 else 0.0, frozenset(names))
    recipe = config.recipe()
    if not recipe.method.looks:
        return None
    own = recipe.options
    return Wanted(own["rank"], own["power"], own["ridge"], own["matrices"])


def token_batches(examples: Sequence[Encoded], device: torch.device, size: int) -> Iterator[Tensor]:
    """The distinct inputs of some examples, those of one length side by side: no padding, which would count as input."""
    found = list(dict.fromkeys(tokens for e in examples for tokens in e.inputs))[:MOST_INPUTS]
    for length in sorted({len(tokens) for tokens in found}):
        for part in in_batches([tokens for tokens in found if len(tokens) == length], size):
            yield torch.tensor(part, device=device)


def look(lm: LanguageModel, examples: Sequence[Encoded], what: Wanted, size: int, states: States | None = None) -> InputFactors:
    """The factors, by forwards over the first training rows, `size` at a time. Where none of the matrices lies in them, the blocks below `states` do not run,
    and the vocabulary head runs for one token of a row.

    Raises:
        UserError: what is wanted does not fit the model.
    """
    more = {"use_cache": False} if lm.form == "causal" else {}
    batches = token_batches(examples, lm.device, size)
    head: Any = lm.model.get_output_embeddings()

    def forward(ids: Tensor) -> None:
        kept = None if states is None else states.of([tuple(row) for row in ids.tolist()], ids.shape[1], ids.device)
        with contextlib.nullcontext() if states is None or kept is None else states.lower.instead(kept):
            lm.model(input_ids=ids, **more)

    with contextlib.ExitStack() as hooks:
        try:
            names = what.names(lm.model)
            chosen = {p for name, p in lm.model.named_parameters() if canonical_name(name) in names}

            def looked_at(part: nn.Module) -> bool:
                """Whether it may hold one of the matrices."""
                return not chosen.isdisjoint(part.parameters())

            if states is not None and any(map(looked_at, states.lower.blocks)):
                states = None
            if not looked_at(head):
                hooks.callback(head.register_forward_pre_hook(lambda m, args: (args[0][:, :1], *args[1:])).remove)
            with console.Phase("looking at the inputs of the matrices"):
                return zo_kernels.input_factors(
                    lm.model, forward, batches, rank=what.rank, only=names.__contains__, power=what.power, ridge=what.ridge
                )
        except (TypeError, ValueError) as error:
            option = "--option matrices" if isinstance(what.matrices, str) else "--peft-target"  # what `only` is made of
            raise UserError(f"the space of the inputs: {one_line(error).replace('only=', option)}") from error


def of_run(
    config: Config,
    lm: LanguageModel,
    examples: Sequence[Encoded],
    states: States | None = None,
    beside: Path | None = None,
    common: Common | None = None,
) -> InputFactors | None:
    """The factors that the run needs, and the adapter set to begin with them, if that is what they are for.

    Args:
        states: of the examples' inputs behind the lower blocks.
        beside: the journal of a run that goes on, beside which they lie.
        common: with other runs.
    """
    what = wanted(config, lm.model)
    if what is None:
        return None
    if beside is not None and journal.factors_path(beside).exists():
        found = read(beside)
    else:
        about = (config.method, config.options, None if states is None else states.lower.cut, [e.inputs for e in examples])
        common = Common() if common is None else common
        found = common.kept(config, lm, about, lambda: look(lm, examples, what, config.eval_batch_size, states))
    begin(config, lm, found)
    return found


def read(path: Path) -> InputFactors:
    """Those that lie beside a journal. Raises UserError: they do not."""
    try:
        return InputFactors.load(journal.factors_path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"the run began with factors of its inputs, which lie beside its journal: {one_line(error)}") from error


@torch.no_grad()
def begin(config: Config, lm: LanguageModel, factors: InputFactors) -> None:
    """LoRA's first matrices are these factors, if the configuration says so."""
    if config.adapter is not None or config.lora_init not in INPUT_INITS:
        return
    for name, layer in adapters.lora_layers(lm.model):
        held = factors.matrices.get(canonical_name(f"{name}.base_layer.weight"))
        first = layer.lora_A["default"].weight
        if held is None or held[1].t().shape != first.shape:
            raise UserError(f"the factors beside the journal do not fit {name}: they are of another model")
        first.copy_(held[1].t())


def begin_again(config: Config, lm: LanguageModel, path: Path) -> None:
    """The same for weights that are made again from the journal at this path."""
    if config.adapter is None and config.lora_init in INPUT_INITS:
        begin(config, lm, read(path))
