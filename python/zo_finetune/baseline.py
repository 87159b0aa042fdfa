"""`zo-finetune evaluate` and `zo-finetune probe`: what a model is worth at a task without any fine-tuning, for a run's numbers to stand beside.

Belongs here: from options to a result, and its folder (predictions.jsonl, then result.json, which says that both are whole). Does not belong here:
rows and models (load.py), demonstrations (incontext.py), scores (decoding/), the probe itself (probe.py).

From Python, as a suite calls them: `evaluate_model` and `probe_model` write nothing.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zo_finetune import console, files, machine, probe
from zo_finetune.config import SPLITS, Baseline, Config, Evaluation, Probing
from zo_finetune.data import Splits, in_batches, load_split
from zo_finetune.decoding import DECODINGS, Answers
from zo_finetune.decoding.scores import calibrated_table, choose
from zo_finetune.errors import UserError, shortened
from zo_finetune.evaluate import describe, measure
from zo_finetune.files import PART, check_plain, path_of, plain_json
from zo_finetune.incontext import Demonstrations, neutral
from zo_finetune.load import Materials, notes_on_texts, prepare, read_splits, sample_seed
from zo_finetune.model import LanguageModel
from zo_finetune.run import explained
from zo_finetune.run_folder import check_run_dir
from zo_finetune.scoring import Encoded, Encoder
from zo_finetune.tasks.base import Example, Form, Task

OWN = ("predictions.jsonl", "result.json")
PIECE = 64  # examples that are tokenized together: demonstrations make long texts


@dataclass
class Measured:
    """What came of a baseline: the content of result.json but for the command, and of each line of predictions.jsonl."""

    result: dict[str, Any]
    predictions: list[dict[str, Any]]
    line: str


# ---- a model as it is ------------------------------------------------------------------------------------------------------------


def evaluate_model(options: Evaluation, language_model: LanguageModel | None = None) -> Measured:
    """The model's answers to the rows of `options.split`, and what they are worth.

    Args:
        language_model: loaded already, with the same options.

    Raises:
        UserError: something the user can put right.
    """
    options.check()
    found = prepare(options.run(), language_model, functools.partial(read_rows, options))
    task = found.task
    examples, encoder = of_split(found.splits, options.split), found.encoder()
    if (
        options.calibrated
        and not encoder.before
        and encoder.turns is None
        and (bare := next((e for e in map(neutral, examples) if not e.candidates[0].context), None))
    ):
        raise UserError(
            f"--calibrated: the tokenizer adds no start token, and the neutral prompt of task {task.name} is empty: nothing stands before the answer "
            f"{bare.candidates[0].answer!r}; choose another --model, or leave it out"
        )
    drawn = Demonstrations(found.splits.train, options.shots, options.seed) if options.shots else None
    encoded: list[Encoded] = []
    with console.Phase("tokenizing"):
        for part in in_batches(list(enumerate(examples)), PIECE):
            encoded += encoder.encode_all([e if drawn is None else drawn.around(k, e) for k, e in part])
    notes = said(found, encoder, len(examples))
    started = time.perf_counter()
    with found.scorer() as scorer, console.Counter("evaluating", len(examples), "example") as progress:
        if options.calibrated:
            anyway = found.encoder().encode_all([neutral(e) for e in examples])
            table = calibrated_table(scorer, encoded, anyway, options.batch_size, progress.advance)
            answers = choose(table, encoded, task.class_names)
        else:
            answers = DECODINGS[task.decoding].answers(task, scorer, encoded, options.batch_size, progress.advance)
    more = {"shots": options.shots, "calibrated": options.calibrated, "cut": encoder.cut}
    return measured(options, found, answers, examples, more, time.perf_counter() - started, notes)


def read_rows(options: Evaluation, config: Config, task: Task, form: Form) -> Splits:
    """The rows of `options.split`, and those that demonstrations are drawn from.

    Raises:
        UserError: the task or the form of the model has no such way to be evaluated; or see `load_splits`.
    """
    if options.shots and form != "causal":
        raise UserError(
            f"--shots {options.shots}: demonstrations are text that a causal model goes on with, and this model is {form}: leave it out"
        )
    if options.calibrated and form != "causal":
        raise UserError(f"--calibrated: neutral prompts are of causal models, and this model is {form}: leave it out")
    if options.calibrated and task.decoding != "scores":
        raise UserError(f"--calibrated: task {task.name} has no candidates to score: leave it out")
    if options.split in SPLITS:
        return read_splits(config, task, form)
    data, data_config = config.rows()
    named = load_split(
        data,
        options.split,
        task,
        form,
        examples=config.eval_examples,
        seed=sample_seed(config),
        config=data_config,
        columns=config.columns,
    )
    if not options.shots:
        return named
    others = read_splits(replace(config, eval_examples=None), task, form)
    notes = [*named.notes, *(f"demonstrations: {note}" for note in others.notes)]
    return replace(named, train=others.train, origin={**named.origin, "train": others.origin["train"]}, notes=notes)


def of_split(splits: Splits, name: str) -> list[Example]:
    found: list[Example] = getattr(splits, "eval" if name not in ("train", "dev") else name)
    if not found:
        raise UserError(f"--split {name} has no rows: give some with --{name}-examples")
    return found


# ---- a linear probe --------------------------------------------------------------------------------------------------------------


def probe_model(options: Probing, language_model: LanguageModel | None = None) -> Measured:
    """A probe fitted on a run's training rows, chosen by its dev rows and measured on its evaluation rows; arguments and errors as `evaluate_model`'s."""
    options.check()
    found = prepare(options.run(), language_model)
    task, lm, splits = found.task, found.language_model, found.splits
    if task.decoding != "scores":
        raise UserError(
            f"task {task.name} has free answers, and a probe chooses among labels or candidates: fine-tune, or evaluate it"
        )
    encoder = found.encoder(room=task.class_names is None)  # a candidate's last token is read, too
    started = time.perf_counter()
    with console.Phase("tokenizing"):
        encoded = {name: encoder.encode_all(getattr(splits, name)) for name in SPLITS}
    notes = said(found, encoder, sum(map(len, encoded.values())))
    rows: dict[str, probe.Rows] = {}
    for name, examples in encoded.items():
        total = sum(len(probe.spots(task, e, lm.form)) for e in examples)
        if examples:
            with console.Counter(f"hidden states, {name}", total, "text") as progress:
                rows[name] = probe.rows_of(task, lm, examples, options.batch_size, progress.advance)
    with console.Phase("fitting the probe"):
        made = probe.probe(
            rows["train"], rows.get("dev"), rows["eval"], None if task.class_names is None else len(task.class_names)
        )
    answers = choose(made.table, encoded["eval"], task.class_names)
    about = {"penalty": made.penalty, "dev_losses": {f"{c:g}": loss for c, loss in made.dev_losses.items()}, "width": made.width}
    more = {"probe": {**about, "train_rows": len(splits.train), "dev_rows": len(splits.dev)}, "cut": encoder.cut}
    return measured(options, found, answers, splits.eval, more, time.perf_counter() - started, notes)


def said(found: Materials, encoder: Encoder, total: int) -> list[str]:
    """What the user is told before the work begins: about the rows, the model, and the `total` texts that `encoder` has met."""
    notes = [*found.splits.notes, *found.language_model.notes, *notes_on_texts(encoder, total, found.max_length)]
    for note in notes:
        console.say(note)
    return notes


# ---- what came of it -------------------------------------------------------------------------------------------------------------


def measured(
    options: Baseline,
    found: Materials,
    answers: Answers,
    examples: Sequence[Example],
    more: dict[str, Any],
    seconds: float,
    notes: list[str],
) -> Measured:
    task, lm = found.task, found.language_model
    split = getattr(options, "split", "eval")
    evaluation = measure(task, answers)
    about = {name: evaluation.pop(name) for name in ("examples", "majority")}
    origin = found.splits.origin["eval" if split not in found.splits.origin else split]
    result = {
        "task": task.name,
        "model": options.model,
        "metrics": evaluation,
        "rows": about["examples"],
        "majority": about["majority"],
        "split": split,
        **more,
        "seconds": seconds,
        "loading_seconds": found.seconds,
        "peak_memory_bytes": machine.peak_memory_bytes(lm.device),
        "weights": {"total": lm.counts()[1], "dtype": str(lm.model.dtype)},
        "given": asdict(options),
        "hyperparameters": {**asdict(options), "form": lm.form, "max_length": found.max_length},
        "data": origin,
        "rows_sha256": found.splits.sha256(options.reads),
        "notes": notes,
        "versions": machine.versions(),
        "machine": machine.machine(lm.device),
    }
    numbers = found.splits.rows["eval" if split not in found.splits.rows else split]
    predictions = [
        {"row": number, **predicted(task, e, answers, k)} for k, (number, e) in enumerate(zip(numbers, examples, strict=True))
    ]
    return Measured(result, predictions, describe(task, evaluation | about))


def predicted(task: Task, example: Example, answers: Answers, k: int) -> dict[str, Any]:
    """The right answers of example `k`, what the model answered (None: nothing), and the score of each candidate."""
    if answers.texts:
        right = [list(spans) if len(spans) != 1 else spans[0] for spans in answers.references[k]]
        return {"right": right, "answer": answers.texts[k], "scores": None}
    names = task.class_names or [c.answer.strip() for c in example.candidates]
    chosen = int(answers.chosen[k])
    right = [names[i] for i in sorted(example.right or {example.label})]
    return {"right": right, "answer": names[chosen] if chosen >= 0 else None, "scores": answers.scores[k, : len(names)].tolist()}


def in_folder(
    options: Evaluation | Probing, command: Sequence[str] | None = None, language_model: LanguageModel | None = None
) -> str:
    """Measure, and write what came of it; returns a line about it. `language_model`: loaded already, with the same options.

    Raises:
        UserError: something the user can put right; nothing has been written.
    """
    options.check()
    folder = path_of("--output", options.output)
    check_folder(folder, options.overwrite)
    with explained(lambda: "give the same command again"):
        found = evaluate_model(options, language_model) if isinstance(options, Evaluation) else probe_model(options, language_model)
        write(folder, found, sys.argv if command is None else command)
    return f"{way(options)}: {found.line}; see {folder}/result.json"


def way(options: Evaluation | Probing) -> str:
    """How the answers came about, and of which rows."""
    if isinstance(options, Probing):
        return "linear probe"
    shots = "1 shot" if options.shots == 1 else f"{options.shots} shots"
    return f"{shots}{', calibrated' if options.calibrated else ''}{'' if options.split == 'eval' else f', split {options.split}'}"


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, but an earlier baseline that is to be replaced."""
    check_run_dir(folder, overwrite=False, others=overwrite)
    for name in (*OWN, *(name + PART for name in OWN)) if folder.is_dir() else ():
        check_plain(folder / name)
    if folder.is_dir() and (others := sorted({*os.listdir(folder)} - {*OWN, *(name + PART for name in OWN)})):
        raise UserError(f"--overwrite: {folder} holds {shortened(others, 3)}, which no baseline wrote: give another --output")


def write(folder: Path, found: Measured, command: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    lines = (json.dumps(plain_json(line), ensure_ascii=False, allow_nan=False) + "\n" for line in found.predictions)
    files.write_text(folder / "predictions.jsonl", "".join(lines))
    files.write_json(folder / "result.json", {**found.result, "command": list(command)})
