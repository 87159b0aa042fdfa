"""Rows as examples in splits, and the batch of every step.

Belongs here: which rows, splits, sampling, batching. Does not belong here: which files (sources.py), their formats (tables.py), prompts (tasks/),
tokens (scoring.py).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from zo_finetune.errors import UserError, did_you_mean, printable, shortened
from zo_finetune.sources import Source, read
from zo_finetune.tasks.base import ClassificationTask, Example, Form, RowError, Task

T = TypeVar("T")

USUAL_DEV, USUAL_EVAL, MOST_HELD_OUT = 500, 1000, 5  # rows held out where no number is given; of one file at most one in so many


@dataclass(frozen=True)
class Splits:
    """`train` to learn from, `dev` to watch during training (from the training rows, apart from `train`), `eval` for the result."""

    train: list[Example]
    dev: list[Example]
    eval: list[Example]
    origin: dict[str, str] = field(default_factory=dict)  # split -> where its rows came from
    notes: list[str] = field(default_factory=list)  # lines for the user: what was read, and what about it may be a mistake


def possible(field: str, columns: Mapping[str, str], task: Task) -> tuple[str, ...]:
    """What the column of a task's field may be called: as `columns` (--column) says, or by its own name or an alias."""
    return (columns[field],) if field in columns else (field, *task.aliases.get(field, ()))


def find_columns(source: Source, columns: Mapping[str, str], task: Task) -> dict[str, str]:
    """Field -> its column: the one that `columns` says, else that of the field's own name, else the first of its aliases that is there.

    Raises:
        UserError: there is none.
    """
    names = source.rows.column_names
    wanted = {field: next((n for n in possible(field, columns, task) if n in names), None) for field in task.fields}
    found = {field: column for field, column in wanted.items() if column is not None}
    missing = [columns.get(field, field) for field in wanted if field not in found]
    if not missing:
        return found
    hint = "".join(did_you_mean(column, names) for column in missing[:1])
    if len(names) == 1 and (other := next((c for c in "\t;|," if c in names[0]), None)):
        hint += f"; its columns seem to be separated by {other!r}, which is a .tsv file's tab or needs a change to commas"
    raise UserError(
        f"{source.name} has the columns {shortened(names)}; task {task.name} needs {', '.join(columns.get(f, f) for f in task.fields)}: "
        f"rename them, or map each with --column FIELD=NAME{hint}"
    )


def labelled(source: Source, columns: Mapping[str, str], task: Task) -> Source:
    """The rows that have a label, where the task knows what stands for none; a note says how many are left out.

    Raises:
        UserError: a column is missing, or no row has a label.
    """
    wanted = find_columns(source, columns, task)
    if not isinstance(task, ClassificationTask) or not task.unlabelled:
        return source
    rows, column = source.rows, wanted[task.label_field]
    place = rows.kept.index(column)
    kept = [k for k, values in enumerate(rows.values) if values[place] not in task.unlabelled]
    if len(kept) == len(rows):
        return source
    if not kept:
        raise UserError(
            f"{source.name}: no row has a label ({column} is {rows.values[0][place]!r} in row 1): choose another split or file"
        )
    note = f"{len(rows) - len(kept):,} rows have no label and are left out"
    return replace(source, rows=rows.chosen(kept, note))


def class_numbers(source: Source, column: str, task: Task) -> list[Any] | None:
    """What the numbers of a column with class names are for the task: by the names, which may be in another order than the task's.

    None: the numbers count, since there are no names or they say no more than the numbers do ("LABEL_1")."""
    names = source.rows.class_names.get(column)
    if not names or not isinstance(task, ClassificationTask) or all(re.fullmatch(rf".*?0*{k}", n) for k, n in enumerate(names)):
        return None
    numbers = [task.number(name) for name in names]
    if all(k is None for k in numbers):
        raise UserError(
            f"{source.name}: the classes of column {column!r} are called {shortened(names)}, and those of {task.name} {', '.join(task.labels)}: "
            "give the rows those names, or plain numbers without names"
        )
    return [name if k is None else k for k, name in zip(numbers, names, strict=True)]  # another name is refused where a row has it


def to_examples(source: Source, indices: Sequence[int], task: Task, form: Form, columns: Mapping[str, str]) -> list[Example]:
    """The examples of the chosen rows. `columns`: see `find_columns`."""
    wanted = find_columns(source, columns, task)
    numbers = {f: n for f, column in wanted.items() if (n := class_numbers(source, column, task)) is not None}
    examples = []
    for index in indices:
        content = source.rows.row(index)
        # under the columns' names too: what a value means may hang on them (winogrande's answer is 1 or 2, its label 0 or 1)
        row = content | {name: content[column] for name, column in wanted.items()}
        for name, meaning in numbers.items():
            if isinstance(row[name], int) and 0 <= row[name] < len(meaning):
                row[name] = meaning[row[name]]
        try:
            examples.append(task.example(row, form))
        except RowError as error:
            raise UserError(f"{source.name}, {source.rows.place(index)}: {error}") from None
    return examples


def text_of(example: Example) -> tuple[str, ...]:
    return tuple(f"{c.context}\0{c.answer}\0{c.tail}" for c in example.candidates)


def notes_on(parts: Mapping[str, Sequence[Example]], sources: Sequence[Source], task: Task) -> list[str]:
    """What was read, in a line, and a line for each thing about it that may be a mistake.

    `parts`: "train", "dev" and "eval" -> examples."""
    counts = ", ".join(f"{s.name} {len(s.rows):,} rows" for s in sources)
    lines = [f"data: {counts}"]
    names = task.class_names
    if names is not None:
        shares = {part: Counter(e.label for e in examples) for part, examples in parts.items() if examples}
        lines[0] += "".join(
            f"; {part}: " + ", ".join(f"{count[k]:,} {name}" for k, name in enumerate(names)) for part, count in shares.items()
        )
        for part, count in shares.items():
            if len(count) == 1 and count.total() > 1:
                lines.append(
                    f"warning: all {count.total():,} {part} examples are {names[next(iter(count))]!r}: is the data sorted, or the column the wrong one?"
                )
    lines += [f"{s.name}: {note}" for s in sources for note in s.rows.notes]
    seen = {part: {text_of(e): e.label for e in examples} for part, examples in parts.items()}
    twins = {part: len(examples) - len(seen[part]) for part, examples in parts.items() if len(examples) > len(seen[part])}
    if twins:
        lines.append(
            "duplicates: "
            + ", ".join(f"{n:,} of {len(parts[part]):,} {part} examples" for part, n in twins.items())
            + " repeat another's text"
        )
    for part in ("dev", "eval"):
        if shared := len(seen["train"].keys() & seen[part].keys()):
            lines.append(
                f"warning: {shared:,} of {len(seen[part]):,} {part} texts are training examples too: the {part} accuracy is not that of new texts"
            )
    if names is not None:
        told: dict[tuple[str, ...], set[int]] = {}
        for examples in parts.values():
            for e in examples:
                told.setdefault(text_of(e), set()).add(e.label)
        if torn := sum(len(labels) > 1 for labels in told.values()):
            lines.append(f"warning: {torn:,} texts stand with different labels")
    return [printable(line) for line in lines]


def shuffled(n: int, seed: int) -> list[int]:
    """A permutation of range(n) that is a function of its arguments alone.

    Sorted by `random.random()`, because Python promises that stream for an integer seed in every version, and promises neither
    `shuffle` nor NumPy's permutation.
    """
    draw = random.Random(seed).random
    keys = [draw() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


def cut(order: list[int], wanted: int | None, usual: int) -> tuple[list[int], list[int]]:
    """(held out, left): `wanted` rows, or by default `usual` ones, but then no more than a fifth of what there is."""
    n = min(usual, len(order) // MOST_HELD_OUT) if wanted is None else wanted
    return order[:n], order[n:]


def load_splits(
    spec: str,
    task: Task,
    form: Form,
    *,
    train_examples: int = 0,
    dev_examples: int | None = None,
    eval_examples: int | None = None,
    seed: int,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """Examples of `spec`, sampled as MeZO does: `train` and `dev` from the training rows, `eval` from the validation rows.

    Args:
        spec: a file, a folder with train.* and perhaps validation.*, or a hub id.
        train_examples: at most so many; 0 means all.
        dev_examples, eval_examples: so many, 0 for eval meaning all; by default 500 and 1,000, or a fifth of the rows they are
            cut from if that is less. Without validation rows, `eval` is cut from the training rows, before anything else.
        seed: of the sample.

    Raises:
        UserError: see the readers above; or nothing is left to train on.
    """
    columns = columns or {}
    unknown = [name for name in columns if name not in task.fields]
    if unknown:
        raise UserError(
            f"--column {unknown[0]}=...: task {task.name} has the fields {', '.join(task.fields)}{did_you_mean(unknown[0], task.fields)}"
        )
    found = read(spec, config, {name for f in task.fields for name in possible(f, columns, task)})
    sources = [labelled(source, columns, task) for source in found if source is not None]
    train_source, eval_source = sources[0], sources[1] if len(sources) > 1 else None
    order = shuffled(len(train_source.rows), seed)
    if eval_source is None:
        if eval_examples == 0:
            raise UserError(f"--eval-examples 0 means all validation rows; {spec} has none: give a number, or a validation file")
        eval_indices, order = cut(order, eval_examples, USUAL_EVAL)
    else:
        eval_indices = shuffled(len(eval_source.rows), seed)[: USUAL_EVAL if eval_examples is None else eval_examples or None]
    dev_indices, order = cut(order, dev_examples, USUAL_DEV)
    train_indices = order[: train_examples or None]
    held_out = eval_source or train_source
    if not train_indices or not eval_indices:
        raise UserError(
            f"{train_source.name} has {len(train_source.rows)} rows: {len(train_indices)} are left to train on, "
            f"{len(eval_indices)} to evaluate on, {len(dev_indices)} for dev; add rows, or lower --eval-examples and --dev-examples"
        )
    train = to_examples(train_source, train_indices, task, form, columns)
    dev = to_examples(train_source, dev_indices, task, form, columns)
    evaluation = to_examples(held_out, eval_indices, task, form, columns)
    return Splits(
        train=train,
        dev=dev,
        eval=evaluation,
        origin={"train": train_source.name, "dev": train_source.name, "eval": held_out.name},
        notes=notes_on({"train": train, "dev": dev, "eval": evaluation}, sources, task),
    )


class Batches:
    """The training batches: the batch of step s is a function of (items, batch size, seed, s) and of nothing that happened before.

    The items are walked through in a new order every epoch, without a break between epochs, so that every batch is full.
    """

    def __init__(self, items: Sequence[Any], batch_size: int, seed: int) -> None:
        if not items or batch_size < 1:
            raise ValueError(f"Batches: {len(items)} items in batches of {batch_size}; both must be at least 1")
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self._epoch: tuple[int, list[int]] = (-1, [])

    def _order(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            # distinct for distinct (seed, epoch) as long as there are fewer than 2^32 epochs
            self._epoch = (epoch, shuffled(len(self.items), (self.seed << 32) + epoch))
        return self._epoch[1]

    def __getitem__(self, step: int) -> list[Any]:
        n, start = len(self.items), step * self.batch_size
        return [self.items[self._order(k // n)[k % n]] for k in range(start, start + self.batch_size)]


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `size` items."""
    return (items[k : k + size] for k in range(0, len(items), size))
