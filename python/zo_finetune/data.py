"""Rows as examples in splits, and the batch of every step.

Belongs here: which rows, splits, sampling, batching. Does not belong here: which files (sources.py), their formats (tables.py), prompts (tasks/),
tokens (scoring.py).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from zo_finetune.errors import UserError, did_you_mean, printable, shortened
from zo_finetune.sources import Source, read, read_split
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
    rows: dict[str, list[int]] = field(default_factory=dict)  # split -> the number of each example's row there, from 1
    notes: list[str] = field(default_factory=list)  # lines for the user: what was read, and what about it may be a mistake

    def sha256(self, names: Iterable[str]) -> dict[str, str]:
        """Of the examples of these splits, in their order: what a result says that it is of."""
        return {name: hashlib.sha256("\n".join(map(repr, getattr(self, name))).encode()).hexdigest() for name in names}


def possible(field: str, columns: Mapping[str, str], task: Task) -> tuple[str, ...]:
    """What the column of a task's field may be called: as `columns` (--column) says, or by its own name or an alias."""
    return (columns[field],) if field in columns else (field, *task.aliases.get(field, ()))


def columns_of(task: Task, columns: Mapping[str, str]) -> set[str]:
    """What the columns that a task reads may be called.

    Raises:
        UserError: `columns` has a field that is none of the task's.
    """
    if unknown := [name for name in columns if name not in task.fields]:
        raise UserError(
            f"--column {unknown[0]}=...: task {task.name} has the fields {', '.join(task.fields)}{did_you_mean(unknown[0], task.fields)}"
        )
    return {name for field in task.fields for name in possible(field, columns, task)}


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
    """The rows that have a label, where the task knows what stands for none; notes say how many are left out, and which columns could have been meant.

    Raises:
        UserError: a column is missing, or no row has a label.
    """
    wanted = find_columns(source, columns, task)
    for name, column in wanted.items():
        if others := [n for n in possible(name, columns, task) if n in source.rows.column_names and n not in wanted.values()]:
            source.rows.notes.append(
                f"{name} is read from column {column!r}, and not from {shortened(others)}, which is there, too"
            )
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


def class_labels(source: Source, column: str, task: Task) -> list[str] | None:
    """What the task calls the numbers of a column with class names: by the names, which may be in another order than the task's.

    None: the numbers count, since there are no names or they say no more than the numbers do ("LABEL_1")."""
    names = source.rows.class_names.get(column)
    if not names or not isinstance(task, ClassificationTask):
        return None
    numbers = [task.number(name) for name in names]
    if all(k is None for k in numbers):
        if all(re.fullmatch(rf".*?0*{k}", n) for k, n in enumerate(names)):
            return None
        raise UserError(
            f"{source.name}: the classes of column {column!r} are called {shortened(names)}, and those of {task.name} {', '.join(task.labels)}: "
            "give the rows those names, or plain numbers without names"
        )
    return [
        name if k is None else task.labels[k] for k, name in zip(numbers, names, strict=True)
    ]  # another is refused where a row has it


def examples_of(source: Source, indices: Iterable[int], task: Task, form: Form, columns: Mapping[str, str]) -> Iterator[Example]:
    """The examples of the chosen rows, made as they are asked for. `columns`: see `find_columns`.

    Raises:
        UserError: a row is none of the task's.
    """
    wanted = find_columns(source, columns, task)
    labels = {f: n for f, column in wanted.items() if (n := class_labels(source, column, task)) is not None}
    twice = {column: fields for column in wanted.values() if len(fields := [f for f, c in wanted.items() if c == column]) > 1}
    for index in indices:
        content = source.rows.row(index)
        where = f"{source.name}, {source.rows.place(index)}"
        for column, fields in twice.items():
            if not isinstance(content[column], Mapping):
                raise UserError(
                    f"{where}: column {column!r} stands for {' and '.join(fields)}, and holds no record of them: name another with --column FIELD=NAME"
                )
        # under the columns' names too, of those that are read: what a value means may hang on them (winogrande's answer is 1 or 2, its label 0 or 1)
        row = {column: content[column] for column in wanted.values()} | {name: content[column] for name, column in wanted.items()}
        for name, meaning in labels.items():
            if isinstance(row[name], int) and 0 <= row[name] < len(meaning):
                row[name] = meaning[row[name]]
        try:
            example = task.example(row, form)
        except RowError as error:
            raise UserError(f"{where}: {error}") from None
        if len({*example.candidates}) < len(example.candidates):
            raise UserError(
                f"{where}: two of its candidates are the same, which no score could tell apart: correct the row or remove it"
            )
        yield example


def text_of(example: Example) -> bytes:
    """A digest of what makes two examples the same, whatever their labels; of a free answer that is the question."""
    parts = [(c.context, *(() if example.references else (c.answer, c.tail))) for c in example.candidates]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def notes_on(parts: Mapping[str, Sequence[Example]], sources: Sequence[Source], task: Task, twins: Sequence[str]) -> list[str]:
    """What was read, in a line, and a line for each thing about it that may be a mistake.

    `parts`: "train", "dev" and "eval" -> examples; `twins`: places of training rows that were left out."""
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
    repeats = {part: n for part, examples in parts.items() if (n := len(examples) - len({text_of(e) for e in examples}))}
    if repeats:
        lines.append(
            "duplicates: "
            + ", ".join(f"{n:,} of {len(parts[part]):,} {part} examples" for part, n in repeats.items())
            + " repeat another's text"
        )
    if twins:
        lines.append(
            f"{sources[0].name}: {len(twins):,} rows were left out of the sample, whose texts are in another split already ({shortened(twins, 3)})"
        )
    if names is not None:
        told: dict[bytes, set[int]] = {}
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


def counted(indices: Iterable[int]) -> list[int]:
    """As people count rows."""
    return [index + 1 for index in indices]


def held_out(rows: int, wanted: int | None, usual: int) -> int:
    """How many of so many rows: `wanted` ones, or by default `usual` ones, but then no more than a fifth of what there is."""
    return min(usual, rows // MOST_HELD_OUT) if wanted is None else wanted


class Pool:
    """Training rows in the order of the sample, each drawn once; a row whose text is in another split is passed over, so that splits share no
    text.

    Attributes:
        twins: the indices of rows that were passed over.
    """

    def __init__(self, order: Sequence[int], examples: Iterator[Example]) -> None:
        self._left = zip(order, examples, strict=True)
        self._taken: dict[bytes, str] = {}
        self.twins: list[int] = []

    def take(self, part: str, example: Example) -> bool:
        """Whether an example may be one of `part`, which then has its text."""
        return self._taken.setdefault(text_of(example), part) == part

    def draw(self, part: str, most: int | None) -> dict[int, Example]:
        """The next rows for `part`, index -> example; None: all that are left."""
        found: dict[int, Example] = {}
        while most is None or len(found) < most:
            if (one := next(self._left, None)) is None:
                break
            index, example = one
            if self.take(part, example):
                found[index] = example
            else:
                self.twins.append(index)
        return found

    def draw_shots(self, k: int, names: Sequence[str], name: str) -> tuple[dict[int, Example], dict[int, Example]]:
        """(train, dev): `k` rows of each label for each, the first ones for train, as MeZO's medium_models takes them.

        Raises:
            UserError: a label has fewer than 2 k; names them all.
        """
        train: dict[int, Example] = {}
        dev: dict[int, Example] = {}
        counts = [0] * len(names)
        while min(counts) < 2 * k and (one := next(self._left, None)) is not None:
            index, example = one
            part, found = ("train", train) if counts[example.label] < k else ("dev", dev)
            if counts[example.label] == 2 * k:
                continue
            if self.take(part, example):
                found[index] = example
                counts[example.label] += 1
            else:
                self.twins.append(index)
        if min(counts) < 2 * k:
            few = ", ".join(f"{n:,} {label}" for label, n in zip(names, counts, strict=True) if n < 2 * k)
            raise UserError(
                f"--k-shot {k} takes {k} rows of each label to train on and {k} others for dev, and {name} has {few}: give a smaller number, or more rows"
            )
        return train, dev


def load_splits(
    spec: str,
    task: Task,
    form: Form,
    *,
    train_examples: int = 0,
    dev_examples: int | None = None,
    eval_examples: int | None = None,
    k_shot: int | None = None,
    seed: int,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """Examples of `spec`, sampled as MeZO does: `train` and `dev` from the training rows, `eval` from the validation rows. No text is in two of
    them.

    Args:
        spec: a file, a pattern of files, a folder with train.* and perhaps validation.*, or a hub id.
        train_examples: at most so many; 0 means all.
        dev_examples, eval_examples: so many, 0 for eval meaning all; by default 500 and 1,000, or a fifth of the rows they are
            cut from if that is less. Without validation rows, `eval` is cut from the training rows, before anything else.
        k_shot: in place of `train_examples` and `dev_examples`, so many of each label for each of the two.
        seed: of the sample.

    Raises:
        UserError: see the readers above; or nothing is left to train on.
    """
    columns = columns or {}
    if k_shot is not None and task.class_names is None:
        raise UserError(f"--k-shot {k_shot} takes rows of each label, and task {task.name} has none: give --train-examples instead")
    found = read(spec, config, columns_of(task, columns))
    sources = [labelled(source, columns, task) for source in found if source is not None]
    train_source, eval_source = sources[0], sources[1] if len(sources) > 1 else None
    eval_from = eval_source or train_source
    order = shuffled(len(train_source.rows), seed)
    if eval_source is None:
        if eval_examples == 0:
            raise UserError(f"--eval-examples 0 means all validation rows; {spec} has none: give a number, or a validation file")
        count = held_out(len(order), eval_examples, USUAL_EVAL)
        eval_indices, order = order[:count], order[count:]
    else:
        eval_indices = shuffled(len(eval_source.rows), seed)[: USUAL_EVAL if eval_examples is None else eval_examples or None]
    pool = Pool(order, examples_of(train_source, order, task, form, columns))
    evaluation = list(examples_of(eval_from, eval_indices, task, form, columns))
    for example in evaluation:
        pool.take("eval", example)
    if k_shot is not None:
        train, dev = pool.draw_shots(k_shot, task.class_names or (), train_source.name)
    else:
        dev = pool.draw("dev", held_out(len(order), dev_examples, USUAL_DEV))
        train = pool.draw("train", train_examples or None)
    if not train or not evaluation:
        raise UserError(
            f"{train_source.name} has {len(train_source.rows)} rows: {len(train)} are left to train on, "
            f"{len(evaluation)} to evaluate on, {len(dev)} for dev; add rows, or lower --eval-examples and --dev-examples"
        )
    parts = {"train": list(train.values()), "dev": list(dev.values()), "eval": evaluation}
    twins = [train_source.rows.place(index) for index in sorted(pool.twins)]
    return Splits(
        **parts,
        origin={"train": train_source.name, "dev": train_source.name, "eval": eval_from.name},
        rows={"train": counted(train), "dev": counted(dev), "eval": counted(eval_indices)},
        notes=notes_on(parts, sources, task, twins),
    )


def load_split(
    spec: str,
    name: str,
    task: Task,
    form: Form,
    *,
    examples: int | None = None,
    seed: int,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """Examples of the split called `name`, as `eval` of splits without others: by default 1,000, and every one of "all", in their order.

    Args:
        examples: so many, 0 for all.

    Raises:
        UserError: see `sources.read_split`; or there is no row.
    """
    columns = columns or {}
    source = labelled(read_split(spec, name, config, columns_of(task, columns)), columns, task)
    indices = [*range(len(source.rows))]
    if name != "all":
        indices = shuffled(len(indices), seed)[: USUAL_EVAL if examples is None else examples or None]
    parts: dict[str, list[Example]] = {"train": [], "dev": [], "eval": list(examples_of(source, indices, task, form, columns))}
    return Splits(**parts, origin={"eval": source.name}, rows={"eval": counted(indices)}, notes=notes_on(parts, [source], task, ()))


class Walk:
    """Items without an end: all of them in a new order every epoch, without a break between epochs. The k-th is a function of (items, seed, lane, k)."""

    def __init__(self, items: Sequence[Any], seed: int, lane: int = 0) -> None:
        self.items, self.seed, self.lane = items, seed, lane
        self._epoch: tuple[int, list[int]] = (-1, [])

    def _order(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            # distinct for distinct (lane, seed, epoch) as long as there are fewer than 2^32 epochs
            self._epoch = (epoch, shuffled(len(self.items), (((self.lane << 64) + self.seed) << 32) + epoch))
        return self._epoch[1]

    def __getitem__(self, k: int) -> Any:
        epoch, place = divmod(k, len(self.items))
        return self.items[self._order(epoch)[place]]


class Batches:
    """The training batches: the batch of step s is a function of (items, batch size, seed, labels, s) and of nothing that happened before.

    The items are walked through in a new order every epoch, without a break between epochs, so that every batch is full.

    Args:
        labels: one for each item, whole numbers; each batch then holds each label equally often, or once more or less, in turn, where their number does
            not divide the batch. Each label's items have a walk of their own, so that a rarer one's come again sooner. Items of one label stand together,
            so that every n-th of a batch of n or more of each is a batch that holds each label, too.
    """

    def __init__(self, items: Sequence[Any], batch_size: int, seed: int, labels: Sequence[int] | None = None) -> None:
        if not items or batch_size < 1:
            raise ValueError(f"Batches: {len(items)} items in batches of {batch_size}; both must be at least 1")
        if labels is None:
            labels = [0] * len(items)
        self.batch_size = batch_size
        pairs = list(zip(items, labels, strict=True))
        self.walks = [Walk([item for item, one in pairs if one == label], seed, label) for label in sorted(set(labels))]

    def __getitem__(self, step: int) -> list[Any]:
        n, start = len(self.walks), step * self.batch_size
        places = sorted(range(start, start + self.batch_size), key=lambda k: k % n)
        return [self.walks[k % n][k // n] for k in places]


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `size` items."""
    return (items[k : k + size] for k in range(0, len(items), size))
