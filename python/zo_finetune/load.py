"""The first part of a run, or of a baseline: model, tokenizer, task and data, loaded, encoded and checked. Nothing is written, nothing is trained.

Belongs here: what of a configuration is loaded, and in which order its faults are found. Does not belong here: how a model (model.py) or data (data.py)
is read, the optimizer (train.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zo_finetune import console, methods
from zo_finetune import model as models
from zo_finetune.beside import Beside
from zo_finetune.common import Common
from zo_finetune.config import SPLITS, Config
from zo_finetune.data import Splits, load_splits
from zo_finetune.errors import UserError, shortened
from zo_finetune.frozen import States
from zo_finetune.objectives import Objective, get_objective
from zo_finetune.scoring import Encoded, Encoder, Scorer
from zo_finetune.tasks.base import Example, Form, Task


@dataclass
class Materials:
    """Model and rows, before anything is tokenized. `seconds`: what reading them took."""

    config: Config
    task: Task
    language_model: models.LanguageModel
    splits: Splits
    seconds: float

    @property
    def max_length(self) -> int:
        """Of an input, in tokens."""
        return min(self.language_model.max_length, self.config.max_length or self.language_model.max_length)

    def encoder(self, room: int = 0) -> Encoder:
        """`room`: tokens that are left free of an input's length."""
        lm = self.language_model
        return Encoder(lm.tokenizer, lm.form, self.max_length - room, lm.vocabulary, self.config.chat)

    def scorer(self) -> Scorer:
        """Of the model; a context manager."""
        lm = self.language_model
        return Scorer(lm.model, lm.form, lm.pad_id, lm.tokenizer, self.max_length)


@dataclass
class Loaded:
    """What a run is of. `objective`: what a step lowers; `beside`: what is measured beside the task; `origin`: split -> where its rows came from; `rows`:
    split -> the number of each example's row there, `rows_sha256` what they say (`Splits.sha256`); `notes`: lines for the user; `labels`: of the training
    examples, where batches hold each equally often; `states`: of inputs whose forwards need not run the lower blocks (cached.py); `common`: what other runs
    of the process have in common with it."""

    config: Config
    task: Task
    objective: Objective
    language_model: models.LanguageModel
    train_set: list[Encoded]
    dev_set: list[Encoded]
    eval_set: list[Encoded]
    max_length: int
    origin: dict[str, str]
    seconds: float
    beside: Beside
    notes: list[str] = field(default_factory=list)
    labels: list[int] | None = None
    rows: dict[str, list[int]] = field(default_factory=dict)
    rows_sha256: dict[str, str] = field(default_factory=dict)
    states: States | None = None
    common: Common = field(default_factory=Common)

    def scorer(self) -> Scorer:
        """Of the model; a context manager."""
        lm = self.language_model
        return Scorer(lm.model, lm.form, lm.pad_id, lm.tokenizer, self.max_length, self.states)

    @property
    def evaluated(self) -> list[Encoded]:
        """What is run before and after the training."""
        return [*self.eval_set, *self.beside.texts]

    def describe(self) -> str:
        lm, (trainable, total) = self.language_model, self.language_model.counts()
        kind = ", ".join(filter(None, ("" if lm.peft == "none" else lm.peft, part_of(self.config))))
        trained = "all" if trainable == total else f"{trainable:,} ({kind})" if kind else f"{trainable:,}"
        return (
            f"{self.config.model}: {total:,} weights, {trained} trained by {self.config.method}, {lm.model.dtype} on {lm.device}; "
            f"{len(self.train_set)} training, {len(self.dev_set)} dev, {len(self.eval_set)} evaluation examples"
        )


def part_of(config: Config) -> str:
    """Which part of the weights --train-blocks and --train-only choose, in words; "" where they are not given."""
    blocks = f"blocks {config.train_blocks}" if config.train_blocks else ""
    names = f"names with {shortened(config.train_only, 3)}" if config.train_only else ""
    return ", ".join(filter(None, (blocks, names)))


MODEL_OPTIONS = (
    "dtype",
    "device",
    "quantize",
    "offload",
    "peft",
    "form",
    "gguf_file",
    "targets",
    "lora_rank",
    "lora_alpha",
    "lora_init",
    "lora_freeze_a",
    "prefix_length",
    "adapter",
    "train_blocks",
    "train_only",
)


def model_options(config: Config) -> dict[str, Any]:
    """Those of `models.load`."""
    return {name: getattr(config, name) for name in MODEL_OPTIONS}


def load_model(config: Config) -> models.LanguageModel:
    """The weights that a run starts from: the base model, and an adapter that is a function of the seed, or that of a folder."""
    torch.manual_seed(config.seed)
    scales = methods.get(config.method).packed
    return models.load(
        config.model, **model_options(config), scales=scales, write_back=config.offload_every, room=Path(config.output)
    )


def objective_of(config: Config, task: Task) -> Objective:
    """What a step lowers.

    Raises:
        UserError: the task has none of that name, or the method can do nothing with it.
    """
    objective, recipe = get_objective(config.objective, task, config.centre), config.recipe()
    if not objective.differentiable and recipe.method.differentiates(recipe.options):
        raise UserError(
            f"--objective {config.objective} has no derivative, and --method {config.method} differentiates the loss: "
            "choose a method of forwards alone, or --objective loss"
        )
    if config.cuda_graph and not objective.captured:
        raise UserError(
            f"--objective {config.objective} writes answers, as many tokens as it takes, and a CUDA graph has a fixed number: leave --cuda-graph out"
        )
    names = task.class_names
    if config.balanced and names is None:
        raise UserError(f"--balanced takes as many rows of each label, and task {task.name} has none: leave it out")
    if (config.balanced or objective.balanced) and names is not None and config.batch_size < len(names):
        raise UserError(
            f"--batch-size {config.batch_size}: a balanced batch holds each of the {len(names)} labels of task {task.name}: give at least as much"
        )
    return objective


def labels_of(examples: Sequence[Example], task: Task) -> list[int]:
    """Of training examples whose batches hold each label equally often.

    Raises:
        UserError: no example has one of them.
    """
    labels = [example.label for example in examples]
    if missing := [name for k, name in enumerate(task.class_names or ()) if k not in labels]:
        raise UserError(
            f"a balanced batch holds each label, and none of the {len(labels):,} training rows is {' or '.join(map(repr, missing))}: add such rows, raise "
            "--train-examples, or train without --balanced and --objective pairs"
        )
    return labels


def sample_seed(config: Config) -> int:
    """Of the sample of rows."""
    return config.seed if config.data_seed is None else config.data_seed


def read_splits(config: Config, task: Task, form: Form) -> Splits:
    """The rows of a run."""
    data, data_config = config.rows()
    return load_splits(
        data,
        task,
        form,
        train_examples=config.train_examples,
        dev_examples=config.dev_examples,
        eval_examples=config.eval_examples,
        k_shot=config.k_shot,
        seed=sample_seed(config),
        config=data_config,
        columns=config.columns,
    )


def common_splits(common: Common, config: Config, task: Task, form: Form) -> Splits:
    """The rows of a run that has them in common with others."""
    return common.splits(config, sample_seed(config), lambda: read_splits(config, task, form))


def prepare(
    config: Config,
    language_model: models.LanguageModel | None = None,
    read: Callable[[Config, Task, Form], Splits] = read_splits,
) -> Materials:
    """Find and read what `config` names.

    Args:
        language_model: loaded already, with the same options.
        read: the rows.

    Raises:
        UserError: a part is not there, is damaged, or does not fit another.
    """
    started = time.perf_counter()
    task, (data, _) = config.the_task(), config.rows()
    if language_model is None:
        with console.Phase(f"looking for the model {config.model}"):
            form = models.find(config.model, device=config.device, form=config.form, gguf_file=config.gguf_file).form
    else:
        form = language_model.form
    if form not in task.forms:
        raise UserError(f"task {task.name} has no prompt for a {form} model, only for: {', '.join(task.forms)}")
    with console.Phase(f"reading the data {data}"):
        splits = read(config, task, form)
    if language_model is None:  # after the data, whose faults are found in less time
        with console.Phase(f"loading the model {config.model}"):
            language_model = load_model(config)
    return Materials(config, task, language_model, splits, time.perf_counter() - started)


def load(config: Config, language_model: models.LanguageModel | None = None, common: Common | None = None) -> Loaded:
    """Load and check everything that a run of `config` needs; arguments and errors as `prepare`'s. `common`: what it has in common with other runs."""
    started = time.perf_counter()
    objective = objective_of(config, config.the_task())
    if common is None:
        common, found = Common(), prepare(config, language_model)  # nothing is held, and nothing is copied
    else:
        read = functools.partial(common_splits, common)
        found = prepare(config, language_model or common.model(config), read)
        common.hold(config, found.language_model)
    task, splits, encoder = found.task, found.splits, found.encoder()
    if (packed := found.language_model.packed) and found.language_model.peft == "none" and not methods.get(config.method).packed:
        raise UserError(
            f"--model {config.model} is packed ({packed}), and --peft none would train what is left of it in numbers, embeddings and norms: "
            f"give --peft lora, ln, prefix or prompt, or --quantize {packed} --method qzo for its scales"
        )
    balanced = config.balanced or (objective.balanced and task.class_names is not None)
    labels = labels_of(splits.train, task) if balanced else None
    with console.Phase(f"tokenizing the rows of {task.name}"):
        train_set = encoder.encode_all(splits.train, gold_only=objective.gold_only)
        dev_set, eval_set = encoder.encode_all(splits.dev), encoder.encode_all(splits.eval)
    notes = [*splits.notes, *found.language_model.notes]
    notes += objective.check(train_set)
    if balanced and not config.balanced:
        notes.append(
            f"--objective {config.objective}: each batch holds {', '.join(task.class_names or ())} equally often, as by --balanced"
        )
    notes += notes_on_texts(encoder, len(train_set) + len(dev_set) + len(eval_set), found.max_length)
    return Loaded(
        config=config,
        task=task,
        objective=objective,
        language_model=found.language_model,
        train_set=train_set,
        dev_set=dev_set,
        eval_set=eval_set,
        max_length=found.max_length,
        origin=splits.origin,
        rows=splits.rows,
        rows_sha256=splits.sha256(SPLITS),
        seconds=time.perf_counter() - started,
        beside=Beside(found.encoder(), config.language_texts, config.continued or []),
        notes=notes,
        labels=labels,
        common=common,
    )


def notes_on_texts(encoder: Encoder, total: int, max_length: int) -> list[str]:
    """Lines about what `encoder` has met in `total` texts."""
    notes = []
    if encoder.cut:
        notes.append(f"{encoder.cut:,} of {total:,} texts are longer than {max_length:,} tokens: their beginnings are left out")
    if encoder.special:
        notes.append(
            f"warning: {encoder.special:,} of {total:,} texts hold special tokens of the tokenizer, which the model reads as such, as an end in the middle: "
            "take them out of the data"
        )
    return notes
