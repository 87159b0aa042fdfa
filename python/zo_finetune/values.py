"""Values as text: how a word of a command line becomes a number, a pair or a list, and back.

Belongs here: reading of one word, whatever the option. Does not belong here: which options there are and what they may be (options.py, config.py,
methods.py).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from zo_finetune.errors import UserError

DOMINANT = "dominant"  # in the place of a block's number


def number(text: str) -> float:
    """`float`, of ASCII and without underscores: 1_0 is a slip, and no ten."""
    if "_" in text or not text.isascii():
        raise ValueError(f"{text!r:.80} is no number")
    return float(text)


# ---- options of a command: argparse says what is wrong, with the option's name before it --------------------------------------


def whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,400}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no whole number")
    return int(text)


def real(text: str) -> float:
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no number") from None


def pair(text: str, wanted: str = "KEY=VALUE, for example queries=4") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}")
    return name, value


def column(text: str) -> tuple[str, str]:
    return pair(text, "FIELD=NAME, for example sentence=text")


def text(word: str) -> str:
    """A text in which \\n is a new line: a shell's words rarely have one."""
    return word.replace("\\n", "\n")


def texts(word: str) -> list[str]:
    """Texts with commas between them, or a JSON list of them."""
    try:
        return [text(one) for one in parse("", word, Sequence[str])]
    except UserError as error:
        raise argparse.ArgumentTypeError(f"{word!r:.80}{error}") from None


def number_of(text: str) -> tuple[str, float]:
    """METHOD=VALUE; the method may have options, which have = signs too."""
    name, equals, value = text.rpartition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, number(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be METHOD=NUMBER, for example mezo=1e-6") from None


def whole_numbers(text: str) -> list[int]:
    try:
        return [whole(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them") from None


def numbers(text: str) -> list[float]:
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them") from None


def pull(option: str, text: str) -> tuple[float, int]:
    """LAM[:EVERY], as `zo_kernels.Anchor` has them.

    Raises:
        UserError: it is none.
    """
    share, colon, every = text.partition(":")
    try:
        lam, steps = number(share), whole(every) if colon else 1
    except (ValueError, argparse.ArgumentTypeError):
        lam, steps = 0.0, 0
    if not (2.0**-126 <= lam <= 1 and 1 <= steps < 1 << 32):
        raise UserError(
            f"{option} {text!r:.80}: give LAM[:EVERY], a share greater than 0 and at most 1 and a number of steps, for example 0.05:10"
        )
    return lam, steps


def blocks(where: str, text: str) -> slice:
    """Which of a model's blocks: from one number on (24-), from one to another (20-25), one alone (7), or the last so many (last:4). The word DOMINANT is read
    where the model is, which has the number.

    Raises:
        UserError: begins with `where`, and says what is wanted.
    """
    if (found := re.fullmatch(r"last:([0-9]{1,6})", text, re.ASCII)) and int(found[1]):
        return slice(-int(found[1]), None)
    if found := re.fullmatch(r"([0-9]{1,6})(-?)([0-9]{0,6})", text, re.ASCII):
        first, last = int(found[1]), int(found[3] or found[1])
        if (found[2] or not found[3]) and first <= last:
            return slice(first, last + 1 if found[3] or not found[2] else None)
    raise UserError(
        f"{where} {text!r:.80}: give numbers of blocks, counted from 0, as 24-, 20-25 or 7, last:4 for the last four, or {DOMINANT}"
    )


# ---- options of a method: by the type that its constructor has for it ----------------------------------------------------------


def written(value: Any) -> str:
    """A value as `parse` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value)) if any(isinstance(v, str) for v in value) else ",".join(map(written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(where: str, text: str, hint: Any) -> Any:
    """The value of an option, by its type: bool, int, float, str, a tuple of them, or a sequence of str (commas, or a JSON list).

    Raises:
        UserError: begins with `where`, and says what is wanted.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # str | Sequence[str]: one name is a name
        single = "," not in text and not text.startswith("[")
        return parse(where, text, str if single else Sequence[str])
    if typing.get_origin(hint) is tuple:
        kinds, parts = typing.get_args(hint), text.split(",")
        if len(parts) != len(kinds):
            raise UserError(f"{where}: give {len(kinds)} values with commas between them")
        return tuple(parse(where, part, kind) for part, kind in zip(parts, kinds, strict=True))
    if typing.get_origin(hint) is not None:
        if not text.startswith("["):
            return text.split(",")
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            items = None
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise UserError(f'{where}: give names with commas between them, or a JSON list of strings such as ["a", "b"]')
        return items
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where}: give true or false")
        return text.lower() == "true"
    if hint is int:
        if not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII):
            raise UserError(f"{where}: give a whole number, at least 0")
        return int(text)
    if hint is float:
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{where}: give a finite number")
        return value
    return text
