"""What an option is. One description of each has its name, type, default, bounds, help and place; the parser, the checks, the reading of a saved
configuration, the comparison with one, `--help` and docs/options.md are made from it.

Belongs here: that description and what is made of it. Does not belong here: any option (config.py), how a word is read (values.py). Nothing here
loads torch.

A set of options is a dataclass whose fields are made by `option`: the field's name is the option's, its annotation the type, its default the
default. A value that is None was not given.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from zo_finetune import values
from zo_finetune.errors import UserError, did_you_mean, once
from zo_finetune.files import path_of

C = TypeVar("C")
FP32_MAX, FP32_MIN = 3.4028235e38, 1.1754944e-38  # of normal numbers
READERS: Mapping[Any, Callable[[str], Any]] = {int: values.whole, float: values.real, str: str}
MODEL, DATA, OWN, METHOD, RUN = PARTS = ("model", "data", "a task of your own", "method", "run")  # of a run, and of `--help`
KINDS = {int: "whole number", float: "number", str: "text", bool: "yes or no"}


@dataclass(frozen=True)
class Option:
    """One option. What a field knows (name, type, default) is filled in by `of`.

    part: one of `PARTS`: what it decides, and its group in `--help`.
    flag: its spelling where that is not the name's; "" for a positional argument.
    usual: what `--help` calls the default where the value does not say it.
    read: text to value, where that is not the type's own; of an option with keys or several values, one of them.
    least, positive, below: bounds; fp32: a number that the kernels take as fp32.
    path: names a file, a folder, or a hub id.
    movable: may differ when a run goes on: checked by other means, or no part of it.
    place: says where a run's folder is and whether it may go, and nothing of the run.
    each: a comparison sets it for each of its runs.
    """

    part: str
    help: str
    flag: str | None = None
    metavar: str | None = None
    usual: str | None = None
    read: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    least: bool = False
    positive: bool = False
    below: int = 1 << 31
    fp32: bool = False
    path: bool = False
    negatable: bool = False
    movable: bool = False
    place: bool = False
    each: bool = False
    name: str = ""
    hint: Any = str
    required: bool = False
    default: Any = None

    @property
    def spelling(self) -> str:
        return f"--{self.name.replace('_', '-')}" if self.flag is None else self.flag

    @property
    def several(self) -> bool:
        """Whether it may be given more than once: a dict by its keys, a list of words."""
        return self.base is dict or (self.base is list and self.read is None)

    @property
    def base(self) -> Any:
        """The type of a value that was given."""
        hint = next((h for h in typing.get_args(self.hint) if h is not type(None)), self.hint) if self.optional else self.hint
        return typing.get_origin(hint) or hint

    @property
    def optional(self) -> bool:
        return isinstance(self.hint, types.UnionType)

    @property
    def bounds(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.base not in (int, float):
            return ""
        low = "greater than 0" if self.positive else "at least 0" if self.least else ""
        return ", ".join(filter(None, (low, f"below 2^{self.below.bit_length() - 1}" if self.base is int else "")))

    @property
    def default_in_words(self) -> str:
        if self.usual is not None:
            return self.usual
        if self.base is bool:
            return ("yes" if self.default else "no") if self.negatable else ""
        if self.default is None or self.default == {}:
            return ""
        return ",".join(map(str, self.default)) if isinstance(self.default, list) else values.written(self.default)

    def words(self) -> str:
        """The help, with default and repetition."""
        default = f"(default: {self.default_in_words})" if self.default_in_words else ""
        return " ".join(filter(None, (self.help, default))) + ("; repeatable" if self.several else "")

    def add_to(self, parser: Any) -> None:
        more: dict[str, Any] = {"help": self.words()}
        if self.flag == "":
            parser.add_argument(self.name, metavar=self.metavar, **more)
            return
        more |= {"dest": self.name, "required": self.required, "default": None}
        if self.base is bool:
            more["action"] = argparse.BooleanOptionalAction if self.negatable else "store_true"
        else:
            more |= {"type": self.read or READERS.get(self.base, str), "metavar": self.metavar, "choices": self.choices}
            more |= {"action": "append"} if self.several else {}
        parser.add_argument(self.spelling, **more)

    def check(self, value: Any) -> None:
        """Raises UserError where no part of a run could use the value; names option, value and remedy."""
        if value is None:
            return
        shown = f"{self.spelling} {value!s:.40}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{shown} must be finite")
        if self.fp32 and value and not FP32_MIN <= abs(value) <= FP32_MAX:
            raise UserError(f"{shown} must be {FP32_MIN:.3g} to {FP32_MAX:.3g}, the numbers of fp32")
        if self.base is int and value >= self.below:
            raise UserError(f"{shown} must be below 2^{self.below.bit_length() - 1}")
        if (self.positive and value <= 0) or (self.least and value < 0):
            raise UserError(f"{shown} must be {'greater than 0' if self.positive else 'at least 0'}")
        if self.choices and value not in self.choices:
            raise UserError(
                f"{self.spelling} {value!r:.80} must be one of {', '.join(self.choices)}{did_you_mean(str(value), self.choices)}"
            )
        if self.path:
            path_of(self.spelling, value)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{self.name} {value!r:.80} is not valid UTF-8: a run's record could not say it") from error


def option(part: str, help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of a set of options. `more`: of `Option`."""
    metadata = {"option": Option(part, help, **more)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def again(kind: Any, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """The field of another set, where it means the same."""
    known = next(f for f in fields(kind) if f.name == name)
    more = {"default": known.default, "default_factory": known.default_factory} if default is MISSING else {"default": default}
    return field(**more, metadata={"option": replace(known.metadata["option"], **changes)})


def options_of(kind: Any) -> tuple[Option, ...]:
    """The options of a set, part by part, in the order of its fields; positional ones first."""
    return _options_of(kind)


@functools.cache
def _options_of(kind: Any) -> tuple[Option, ...]:
    hints, found = typing.get_type_hints(kind), []
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        known = {"required": True} if default is MISSING else {"default": default}
        found.append(replace(f.metadata["option"], name=f.name, hint=hints[f.name], **known))
    return tuple(sorted(found, key=lambda one: (one.flag != "", PARTS.index(one.part))))


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """To a command, in a group for each part."""
    groups: dict[str, Any] = {}
    for one in options:
        if one.flag != "" and one.part not in groups:
            groups[one.part] = parser.add_argument_group(one.part)
        one.add_to(groups[one.part] if one.flag != "" else parser)


def given(kind: Any, namespace: argparse.Namespace) -> dict[str, Any]:
    """The values of a set's options that a command line has.

    Raises:
        UserError: a key is given twice.
    """
    found = {o.name: (o, value) for o in options_of(kind) if (value := getattr(namespace, o.name, None)) is not None}
    return {name: once(o.spelling, value) if o.base is dict else value for name, (o, value) in found.items()}


def check(config: Any) -> None:
    """Each value by itself. Raises UserError: names the option."""
    for one in options_of(type(config)):
        one.check(getattr(config, one.name))


def of_json(kind: type[C], content: Any, where: str) -> C:
    """A set out of a file: exactly its options, each of its type.

    Raises:
        UserError: names the first that is not so.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no options of a run")
    known = {o.name: o for o in options_of(kind)}
    for name in sorted({*content} ^ {*known}):
        raise UserError(f"{where}: {name!r} is {'no option of this version' if name in content else 'missing'}")
    for name, value in content.items():
        if not _fits(value, known[name].hint):
            raise UserError(f"{where}: {name}={value!r:.80} is not {known[name].hint}")
    return kind(**content)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of the type."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if (inside := typing.get_args(hint)) and isinstance(value, (list, dict)) and isinstance(value, typing.get_origin(hint)):
        items: list[Any] = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return all(_fits(item, inside[0]) for item in items)
    if hint is float:
        return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1023)  # what float() takes
    return type(value) is hint


def difference(config: Any, recorded: Mapping[str, Any], but: Callable[[Option], bool]) -> str | None:
    """The first option in which a set differs from one as JSON has it; those that `but` names are passed over."""
    now = asdict(config)
    names = (o.name for o in options_of(type(config)) if not but(o))
    return next((name for name in names if name not in recorded or recorded[name] != now[name]), None)


def table(kind: Any) -> str:
    """Markdown, a row for each option."""
    lines = ["| option | part | what it takes | default | what it is |", "|---|---|---|---|---|"]
    for o in options_of(kind):
        takes = o.bounds if o.choices else ", ".join(filter(None, (KINDS.get(o.base, o.metavar or "text"), o.bounds)))
        default = (
            "required" if o.required else o.default_in_words or ("yes" if o.default is True else "no" if o.default is False else "")
        )
        spelling = o.spelling or o.name
        lines.append(
            f"| `{spelling}` | {o.part} | {takes} | {default} | {o.help.replace('|', chr(92) + '|')}{'; repeatable' if o.several else ''} |"
        )
    return "\n".join(lines) + "\n"
