"""Rows from files or the hub, as examples in splits, and the batch of every step.

Belongs here: reading (through `datasets`), splits, sampling, batching. Does not belong here: prompts (tasks/), tokens (scoring.py).
Local files never touch the network.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zo_finetune.errors import UserError, one_line
from zo_finetune.tasks.base import Example, Form, RowError, Task

if TYPE_CHECKING:  # importing datasets takes seconds, and --help must not wait for it
    from datasets import Dataset

T = TypeVar("T")

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "dev", "eval", "test")  # in order of preference; hub test splits often have no labels


@dataclass(frozen=True)
class Source:
    """The rows of one split and the name that error messages give them."""

    rows: Dataset
    name: str


@dataclass(frozen=True)
class Splits:
    """`train` to learn from, `dev` to watch during training (from the training rows, apart from `train`), `eval` for the result."""

    train: list[Example]
    dev: list[Example]
    eval: list[Example]
    origin: dict[str, str] = field(default_factory=dict)  # split -> where its rows came from


def read_file(path: Path) -> Source:
    """One table, by its suffix. A file that cannot be parsed is a `UserError`."""
    import datasets

    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--data {path} has the suffix {path.suffix!r}; readable are {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"--data {path} is empty: give a file with at least one row")
    datasets.disable_progress_bars()
    try:
        if path.suffix.lower() in (".jsonl", ".json"):
            rows = datasets.Dataset.from_json(str(path))
        elif path.suffix.lower() == ".parquet":
            rows = datasets.Dataset.from_parquet(str(path))
        else:
            rows = datasets.Dataset.from_csv(str(path), sep="\t" if path.suffix.lower() == ".tsv" else ",")
    except (
        Exception
    ) as error:  # pyarrow, pandas, json and datasets each raise their own kinds; they all mean that the file is at fault
        cause = error.__cause__ or error
        raise UserError(f"--data {path} could not be read as {path.suffix[1:]}: {one_line(cause)}; check the file") from error
    return Source(rows, str(path))


def read_folder(folder: Path) -> tuple[Source, Source | None]:
    """`train.*` and, if there is one, `validation.*` (or dev, test) of a folder."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())

    def find(names: Sequence[str]) -> Path | None:
        return next((p for name in names for p in files if p.stem.lower() == name), None)

    train, evaluation = find(TRAIN_NAMES), find(EVAL_NAMES)
    if train is None:
        found = ", ".join(p.name for p in files) or "no data file"
        raise UserError(
            f"--data {folder} holds {found}; a folder needs train{{{','.join(SUFFIXES)}}}: rename a file, or give one file"
        )
    return read_file(train), read_file(evaluation) if evaluation else None


def read_hub(name: str, config: str | None) -> tuple[Source, Source | None]:
    """The train split and the first labelled evaluation split of a hub data set."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:  # network, unknown name, unknown config: the library's sentence says which
        raise UserError(
            f"--data {name!r} is neither a local file or folder nor a data set that could be loaded from the hub: {one_line(error)}"
        ) from error
    train = next((n for n in TRAIN_NAMES if n in splits), None)
    if train is None:
        raise UserError(f"--data {name!r} has the splits {', '.join(splits)}; one called 'train' is needed")
    evaluation = next((n for n in EVAL_NAMES if n in splits), None)
    label = f"{name}:{config}" if config else name
    return Source(splits[train], f"{label}/{train}"), Source(splits[evaluation], f"{label}/{evaluation}") if evaluation else None


def read(spec: str, config: str | None = None) -> tuple[Source, Source | None]:
    """(training rows, evaluation rows or None) of a file, a folder or a hub id."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_file(path), None
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise UserError(f"--data {spec} does not exist: give a file ({', '.join(SUFFIXES)}), a folder or a hub id")
    return read_hub(spec, config)


def to_examples(source: Source, indices: Sequence[int], task: Task, form: Form, columns: Mapping[str, str]) -> list[Example]:
    """The examples of the chosen rows. `columns` maps a task's field to the column that holds it, where their names differ."""
    wanted = {name: columns.get(name, name) for name in task.fields}
    missing = [column for column in wanted.values() if column not in source.rows.column_names]
    if missing:
        raise UserError(
            f"{source.name} has the columns {', '.join(source.rows.column_names)}; "
            f"task {task.name} needs {', '.join(wanted.values())}: rename them, or map each with --column FIELD=NAME"
        )
    examples = []
    for index, row in zip(indices, source.rows.select(indices), strict=True):
        try:
            examples.append(task.example({name: row[column] for name, column in wanted.items()}, form))
        except RowError as error:
            raise UserError(f"{source.name}, row {index + 1}: {error}") from None
    return examples


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
    n = min(usual, len(order) // 5) if wanted is None else wanted
    return order[:n], order[n:]


def load_splits(
    spec: str,
    task: Task,
    form: Form,
    *,
    train_examples: int = 1000,
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
        raise UserError(f"--column {unknown[0]}=...: task {task.name} has the fields {', '.join(task.fields)}")
    train_source, eval_source = read(spec, config)
    order = shuffled(len(train_source.rows), seed)
    if eval_source is None:
        if eval_examples == 0:
            raise UserError(f"--eval-examples 0 means all validation rows; {spec} has none: give a number, or a validation file")
        eval_indices, order = cut(order, eval_examples, 1000)
    else:
        eval_indices = shuffled(len(eval_source.rows), seed)[: 1000 if eval_examples is None else eval_examples or None]
    dev_indices, order = cut(order, dev_examples, 500)
    train_indices = order[: train_examples or None]
    held_out = eval_source or train_source
    if not train_indices or not eval_indices:
        raise UserError(
            f"{train_source.name} has {len(train_source.rows)} rows: {len(train_indices)} are left to train on, "
            f"{len(eval_indices)} to evaluate on, {len(dev_indices)} for dev; add rows, or lower --eval-examples and --dev-examples"
        )
    return Splits(
        train=to_examples(train_source, train_indices, task, form, columns),
        dev=to_examples(train_source, dev_indices, task, form, columns),
        eval=to_examples(held_out, eval_indices, task, form, columns),
        origin={"train": train_source.name, "dev": train_source.name, "eval": held_out.name},
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
