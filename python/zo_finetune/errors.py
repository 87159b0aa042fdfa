"""The one exception that stands for a user's mistake: the command line prints it as one line and exits with status 2.

Belongs here: that class and the words around it: what may be printed, what was perhaps meant. A bug must never be wrapped in it:
bugs keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def printable(text: str) -> str:
    """`text` on one line of a terminal: whatever moves a cursor, colours, reverses or breaks it is written as its escape.

    File names, column names, texts and the errors of libraries that quote them are other people's."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """Something the user can put right. The message names the argument or file, the value and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def one_line(error: BaseException, limit: int = 300) -> str:
    """The gist of a library's exception, to be quoted inside a `UserError`: its first non-empty line (and the next after a colon), at most `limit`
    characters; with the exception's name where it is not of a kind whose text is written for users."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if not text:
        text = type(error).__name__
    elif isinstance(error, (ArithmeticError, LookupError, TypeError, AttributeError, AssertionError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" if one of `known` is close to `word`, else nothing."""
    names = {name.lower().strip(): name for name in known}
    close = difflib.get_close_matches(word.lower().strip()[:100], [n for n in names if len(n) <= 100], n=1, cutoff=0.6)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def plural(n: int, what: str) -> str:
    """ "1 step", "2 steps", "1,000 steps"."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def once(what: str, pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """The dict of what a user gave as KEY=VALUE, `what` saying where; a key given twice is refused, where `dict` would take the last."""
    made: dict[str, T] = {}
    for key, value in pairs:
        if key in made:
            raise UserError(f"{what} {key} is given twice: keep one")
        made[key] = value
    return made


def shortened(items: Iterable[str], most: int = 12, width: int = 40) -> str:
    """A list for a message: at most so many items of at most so many characters each."""
    listed = list(items)
    words = [item if len(item) <= width else item[: width - 3] + "..." for item in listed[:most]]
    return ", ".join(words) + (f" and {len(listed) - most:,} more" if len(listed) > most else "")
