"""Where rows are: which files, or which data set of the hub, make up which split of what `--data` names.

Belongs here: names of files and folders. Does not belong here: what is in a file (tables.py), which rows are sampled (data.py). Files never touch the
network.

Read are a file; files that a pattern matches, as one table; a folder with a file for each split, or with shards of one, itself or in its `data`, as a
snapshot of the hub has them; a folder that `datasets` saved. Each may be packed.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_finetune.errors import UserError, did_you_mean, one_line, shortened
from zo_finetune.formats import SUFFIXES, Table, format_of, readable
from zo_finetune.tables import read_tables

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = (  # in order of preference; hub test splits often have no labels
    "validation",
    "validation_matched",
    "valid",
    "dev",
    "dev_matched",
    "eval",
    "test",
)
ALL_NAMES = (*TRAIN_NAMES, *EVAL_NAMES)
SHARD = re.compile(
    r"(?P<split>.+?)(?P<mark>[-_.]?)(?P<number>\d{1,6})(-of-(?P<all>\d{1,6})(-[0-9a-f]{16})?)?"
)  # of a name in lower case
MAX_FILES = 10_000
MAX_JSON = 1 << 20
SAVED, SAVED_DICT = "state.json", "dataset_dict.json"  # in a folder that `datasets` saved, of one split or of several


@dataclass(frozen=True)
class Source:
    """The rows of one split and the name that error messages give them."""

    rows: Table
    name: str


# ---- what a path may be --------------------------------------------------------------------------------------------------------


def is_pattern(spec: str) -> bool:
    """Whether `--data` names files by a pattern; what is there by that name is no pattern."""
    return glob.has_magic(spec) and not os.path.exists(Path(spec).expanduser())


def paths_of(spec: str) -> list[Path]:
    """What is here of `--data`: the path that it names, or those that it matches; nothing of a hub id."""
    path = Path(spec).expanduser()
    if is_pattern(spec):
        return [Path(one) for one in itertools.islice(glob.iglob(str(path), recursive=True), MAX_FILES + 1)]
    return [path] if os.path.exists(path) else []


def placed(spec: str, directory: str) -> str:
    """The absolute path or pattern of what is here, seen from `directory`; a hub id as it is."""
    pattern = is_pattern(str(Path(directory, Path(spec).expanduser())))
    path = Path(glob.escape(directory) if pattern else directory, Path(spec).expanduser()).absolute()
    return str(path) if paths_of(str(path)) else spec


# ---- files of one split --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A file as its name tells: of which split, and which of how many where there are several. `glued`: nothing stands between name and number, which may
    say how many rows there are (train32)."""

    path: Path
    split: str
    number: int | None = None
    all: int | None = None
    glued: bool = False

    @classmethod
    def of(cls, path: Path) -> Shard:
        stem = format_of(path)[0].lower()
        if (found := SHARD.fullmatch(stem)) is None:
            return cls(path, stem)
        count = int(found["all"]) if found["all"] else None
        return cls(path, found["split"], int(found["number"]), count, not found["mark"] and count is None)


def natural(path: Path) -> tuple[Any, ...]:
    """Orders numbers in names by their value."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path)))


def complete(shards: Sequence[Shard], where: str) -> list[Path]:
    """The files of one split in their order.

    Raises:
        UserError: there are two for one place, one is missing, or one is no file.
    """
    by_number: dict[int | None, Shard] = {}
    for shard in shards:
        other = by_number.setdefault(shard.number, shard)
        if other is not shard or (shard.number is None) != (shards[0].number is None) or shard.all != shards[0].all:
            twin = (other if other is not shard else shards[0]).path.name
            raise UserError(f"--data {where} holds {twin} and {shard.path.name}: keep one, or give one file")
        if not shard.path.is_file():
            raise UserError(f"--data {where}: {shard.path.name} is no file that is there: put one in its place, or take it away")
    numbers, count = sorted(n for n in by_number if n is not None), shards[0].all
    if numbers and not (len(shards) == 1 and shards[0].glued):
        if missing := absent(numbers, count):
            raise UserError(
                f"--data {where}: of {shards[0].split}, the files number {shortened(map(str, missing))} are missing beside {shards[0].path.name}: "
                f"fetch them, give the others by a pattern, or rename what is no part of a set, as to {shards[0].split}"
            )
        if count is not None and len(numbers) > count:
            raise UserError(
                f"--data {where}: of {shards[0].split}, {len(numbers)} files call themselves {count:,}: keep those of one set"
            )
    return [by_number[n].path for n in numbers] or [shards[0].path]


def absent(numbers: Sequence[int], count: int | None) -> list[int]:
    """Which numbers of a set of files are missing; `count`: how many there should be, where their names say so. They count from 0 or from 1."""
    begin = 0 if count is not None and count not in numbers else min(*numbers, 1)
    return sorted({*range(begin, begin + min(max(numbers) - begin + 1 if count is None else count, MAX_FILES))} - {*numbers})


def read_files(paths: Sequence[Path], keep: Collection[str] | None, name: str) -> Source:
    rows = read_tables(paths, keep)
    return Source(rows, name if len(paths) == 1 else f"{name} ({len(paths)} files)")


def was(things: Sequence[Any]) -> str:
    return "was" if len(things) == 1 else "were"


def shown(paths: Sequence[Path]) -> str:
    """What a split's files are called."""
    return str(paths[0]) if len(paths) == 1 else str(paths[0].with_name(Shard.of(paths[0]).split + "*"))


# ---- folders and patterns ------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, keep: Collection[str] | None = None) -> tuple[Source, Source | None]:
    """`train.*` and, if there is one, `validation.*` (or dev, test) of a folder, each in one file or several."""
    if (folder / SAVED_DICT).exists() or (folder / SAVED).exists():
        return read_saved(folder, keep)
    listed = sorted(folder.iterdir())
    shards = [Shard.of(p) for p in listed if readable(p)]

    def find(names: Sequence[str]) -> list[Path]:
        of_one = next((found for name in names if (found := [s for s in shards if s.split == name])), None)
        return [] if of_one is None else complete(of_one, str(folder))

    def holds(place: Path, names: Sequence[str]) -> bool:
        """Whether a folder inside has such splits."""
        return (
            place.is_dir() and os.access(place, os.R_OK) and any(Shard.of(p).split in names for p in place.iterdir() if readable(p))
        )

    train = find(TRAIN_NAMES)
    if not train and holds(inner := folder / "data", TRAIN_NAMES):
        found = read_folder(inner, keep)
        if shards:
            found[0].rows.notes.append(f"{shortened(s.path.name for s in shards)} in {folder} {was(shards)} not read")
        return found
    if not train:
        meant = next((hint for s in shards if (hint := did_you_mean(s.split, TRAIN_NAMES))), "")
        configs = [p for p in listed if holds(p, TRAIN_NAMES)]
        meant = f"; or give one of its folders, as {configs[0]}" if configs else meant
        raise UserError(
            f"--data {folder} holds {shortened(s.path.name for s in shards) or 'no data file'}; a folder needs train{{{','.join(SUFFIXES)}}}: "
            f"rename a file, or give one file{meant}"
        )
    evaluation = find(EVAL_NAMES)
    source = read_files(train, keep, shown(train))
    begins = tuple(f"{name}{mark}" for name in ALL_NAMES for mark in ".-_")
    unread = [
        p.name
        for p in listed
        if p not in (*train, *evaluation) and (readable(p) or p.name.lower().startswith(begins) or holds(p, ALL_NAMES))
    ]
    if unread:
        source.rows.notes.append(f"beside it, {shortened(unread)} {was(unread)} not read")
    return source, read_files(evaluation, keep, shown(evaluation)) if evaluation else None


def read_saved(folder: Path, keep: Collection[str] | None = None) -> tuple[Source, Source | None]:
    """What `save_to_disk` of `datasets` wrote: one split, or a folder for each."""
    if not (folder / SAVED_DICT).exists():
        return read_saved_split(folder, keep), None
    splits = names_in(folder / SAVED_DICT, "splits")
    train, evaluation = (next((n for n in names if n in splits), None) for names in (TRAIN_NAMES, EVAL_NAMES))
    if train is None:
        raise UserError(f"--data {folder} has the splits {shortened(splits)}; one called 'train' is needed")
    return read_saved_split(folder / train, keep), read_saved_split(folder / evaluation, keep) if evaluation else None


def read_saved_split(folder: Path, keep: Collection[str] | None) -> Source:
    state = folder / SAVED
    if names_in(state, "_indices_data_files", "filename") or names_in(state, "_indices_files", "filename"):
        raise UserError(
            f"--data {folder} holds a choice of its rows: save it again with a present version of datasets, which writes these alone"
        )
    files = [folder / name for name in names_in(state, "_data_files", "filename")]
    if missing := [p.name for p in files if not p.is_file()]:
        raise UserError(f"--data {folder} lacks {shortened(missing)}, which its {SAVED} names: fetch it")
    if not files:
        raise UserError(f"--data {folder}: its {SAVED} names no file")
    return read_files(files, keep, str(folder))


def names_in(path: Path, key: str, inside: str | None = None) -> list[str]:
    """A list of names of files beside a JSON file, under `key` of it; `inside`: each is in an object, under that."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON:
            raise ValueError(f"it is no file of at most {MAX_JSON:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        listed = content.get(key) if isinstance(content, dict) else None
        found = [one.get(inside) if inside and isinstance(one, dict) else one for one in listed or ()]
        names = [n for n in found if isinstance(n, str) and n not in ("", ".", "..") and Path(n).name == n and "\0" not in n]
        if len(names) < len(found):
            raise ValueError(f"its {key!r} must be names of files beside it")
        return names
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--data: {path} could not be read: {one_line(error)}; save the data set again, or fetch it") from error


def read_pattern(spec: str, keep: Collection[str] | None = None) -> Source:
    """All files that match, as one table."""
    found = sorted(paths_of(spec), key=natural)
    if not found:
        raise UserError(f"--data {spec} matches nothing: give a pattern, a file, a folder or a hub id")
    if len(found) > MAX_FILES:
        raise UserError(f"--data {spec} matches more than {MAX_FILES:,} files, which is the most that are read: give fewer")
    if strange := [p for p in found if not p.is_file() or not readable(p)]:
        raise UserError(
            f"--data {spec} matches {shortened(map(str, strange), 3, 80)}: only files with {', '.join(SUFFIXES)} are read: make the pattern narrower"
        )
    source = read_files(found, keep, spec)
    splits = [*dict.fromkeys(s.split for s in map(Shard.of, found))]
    if any(split in TRAIN_NAMES for split in splits) and any(split in EVAL_NAMES for split in splits):
        source.rows.notes.append(
            f"warning: the files that match are of {shortened(splits)}, whose rows are mixed here: give a folder, which keeps them apart"
        )
    for split, count in dict.fromkeys((s.split, s.all) for s in map(Shard.of, found) if s.all is not None):
        numbers = [s.number for s in map(Shard.of, found) if (s.split, s.all) == (split, count)]
        if missing := absent([n for n in numbers if n is not None], count):
            source.rows.notes.append(f"warning: of the {count:,} files of {split}, {len(missing):,} are not among those that match")
    return source


# ---- the hub -------------------------------------------------------------------------------------------------------------------


def read_hub(name: str, config: str | None, keep: Collection[str] | None = None) -> tuple[Source, Source | None]:
    """The train split and the first labelled evaluation split of a hub data set."""
    splits = hub_splits(name, config)
    train = next((n for n in TRAIN_NAMES if n in splits), None)
    if train is None:
        raise UserError(f"--data {name!r} has the splits {shortened(splits)}; one called 'train' is needed")
    evaluation = next((n for n in EVAL_NAMES if n in splits), None)
    label = f"{name}:{config}" if config else name
    return hub_source(splits[train], f"{label}/{train}", keep), (
        hub_source(splits[evaluation], f"{label}/{evaluation}", keep) if evaluation else None
    )


def hub_splits(name: str, config: str | None) -> Any:
    """Name of a split -> its rows, as `datasets` has them."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, trust_remote_code=False)
    except Exception as error:  # network, unknown name, unknown config: the library's sentence says which
        raise UserError(
            f"--data {name!r} is neither a local file or folder nor a data set that could be loaded from the hub: {one_line(error)}"
        ) from error


def hub_source(rows: Any, name: str, keep: Collection[str] | None) -> Source:
    import datasets

    names = {column: list(f.names) for column, f in rows.features.items() if isinstance(f, datasets.ClassLabel)}
    kept = [column for column in rows.column_names if keep is None or column in keep]
    values = list(zip(*(rows[column] for column in kept), strict=True)) if kept else [()] * len(rows)
    return Source(Table(rows.column_names, kept, values, class_names=names), name)


def read(spec: str, config: str | None = None, keep: Collection[str] | None = None) -> tuple[Source, Source | None]:
    """(training rows, evaluation rows or None) of a file, a pattern, a folder or a hub id; `keep` names the columns that are wanted."""
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return read_folder(path, keep)
        if path.is_file():
            return read_files([path], keep, str(path)), None
        if is_pattern(spec):
            return read_pattern(spec, keep), None
        exists = path.exists()
    except OSError as error:  # not ours to read
        raise UserError(f"--data {spec}: {one_line(error)}") from error
    if exists:
        raise UserError(f"--data {spec} is neither a regular file nor a folder: give one of them, or a hub id")
    check_hub_id(spec)
    return read_hub(spec, config, keep)


def check_hub_id(spec: str) -> None:
    """Refuse what looks like a path, or nearly is one of something that is here."""
    path = Path(spec).expanduser()
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() and os.access(path.parent, os.R_OK) else []
    hint = did_you_mean(path.name, beside)
    if readable(path) or path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1 or hint:
        raise UserError(f"--data {spec} does not exist: give a file ({', '.join(SUFFIXES)}), a folder or a hub id{hint}")


# ---- one split by its name -----------------------------------------------------------------------------------------------------


def read_split(spec: str, name: str, config: str | None = None, keep: Collection[str] | None = None) -> Source:
    """The rows of one split: of a folder, the files with that stem; of what `datasets` saved or the hub has, the split. "all" is what has no splits: a
    file, files that a pattern matches, a saved split.

    Raises:
        UserError: there is none of that name.
    """
    folder = Path(spec).expanduser()
    try:
        if folder.is_dir() and not (name == "all" and (folder / SAVED).exists()):
            return read_split_of(folder, name, keep)
        if paths_of(spec):
            if name != "all":
                raise UserError(
                    f"--split {name:.80}: --data {spec} has no splits: give all, or train, dev or eval for a part of it"
                )
            return read(spec, config, keep)[0]
    except OSError as error:  # not ours to read
        raise UserError(f"--data {spec}: {one_line(error)}") from error
    check_hub_id(spec)
    splits = hub_splits(spec, config)
    return hub_source(splits[known(name, splits, spec)], f"{spec}:{config}/{name}" if config else f"{spec}/{name}", keep)


def read_split_of(folder: Path, name: str, keep: Collection[str] | None) -> Source:
    if (folder / SAVED_DICT).exists():
        return read_saved_split(folder / known(name, names_in(folder / SAVED_DICT, "splits"), str(folder)), keep)
    files = [p for at in (folder, folder / "data") if at.is_dir() for p in sorted(at.iterdir()) if readable(p)]
    found = [p for p in files if format_of(p)[0] == name]  # a name that ends in a number, as train32, is the whole of its split
    if not found and (shards := [s for s in map(Shard.of, files) if s.split == name.lower()]):
        found = complete(shards, str(folder))
    known(name, [name] if found else sorted({format_of(p)[0] for p in files}), str(folder))
    return read_files(found, keep, shown(found))


def known(name: str, splits: Collection[str], where: str) -> str:
    """`name`, which is one of `splits`."""
    if name not in splits:
        raise UserError(f"--split {name!r:.80}: --data {where} has {shortened(splits) or 'no split'}{did_you_mean(name, splits)}")
    return name
