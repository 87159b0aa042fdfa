"""Regular expressions that choose parameters by a part of their name, in bounded time whoever wrote them.

Belongs here: which expressions are taken, and whether one occurs in a name. Does not belong here: what is done with the parameters chosen.

An expression may come from a journal that somebody sent, and Python's own search tries every way of matching: exponentially many for some
alternations, and none of it can be interrupted. So Python's parser reads the expression, and all ways are followed at once (Thompson's
construction, Communications of the ACM 11, 1968): a name costs its length times the size of the expression, and less where a set of places met that
character before. What cannot be followed so (back references, look-around) is refused, and so are expressions that are large when their counted repeats
are written out. The bound on all names together is WORK.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

MOST_CHARACTERS = 1 << 14  # of all expressions of a list: reading them takes a tenth of a second
MOST_PLACES = 1 << 10  # of one expression, written out
WORK = 20_000_000  # characters looked at, and 8 for each place visited anew: seconds

Place = tuple[str, Any, tuple[int, ...]]  # what it is, what it asks, where it leads


class Automaton:
    """The places of one expression. `charge` is told of the work done.

    Raises:
        ValueError: the expression is none, or one that is not taken; says why.
    """

    def __init__(self, pattern: str) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # of sets that will mean something else one day
                tree = re._parser.parse(pattern)  # type: ignore[attr-defined]
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is no regular expression: {error}") from None
        self._refuse_flags(tree.state.flags)
        self.places: list[Place] = [("end", None, ())]
        self._built = 0
        try:
            self.start = self._sequence(tree, 0, bool(tree.state.flags & re.IGNORECASE))
        except RecursionError:
            raise ValueError("is nested too deeply") from None
        self._moves: dict[tuple[frozenset[int], bool | None, str], frozenset[int] | None] = {}

    @staticmethod
    def _refuse_flags(flags: int) -> None:
        if more := re.RegexFlag(flags) & ~(re.IGNORECASE | re.UNICODE | re.VERBOSE):
            raise ValueError(f"has the flags {more!r}; taken are i and x")

    def _add(self, kind: str, asked: Any, *leads: int) -> int:
        if len(self.places) >= MOST_PLACES:
            raise ValueError(f"has more than {MOST_PLACES} places when its repeats are written out: simplify it")
        self.places.append((kind, asked, leads))
        return len(self.places) - 1

    def _sequence(self, tree: Any, then: int, fold: bool) -> int:
        for op, argument in reversed(list(tree)):
            then = self._node(str(op), argument, then, fold)
        return then

    def _node(self, op: str, argument: Any, then: int, fold: bool) -> int:
        self._built += 1
        if self._built > 4 * MOST_PLACES:  # repeats of what has no place at all
            raise ValueError("is too large when its repeats are written out: simplify it")
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._add("character", (op, argument, fold), then)
        if op == "AT":
            return self._add("at", str(argument), then)
        if op == "BRANCH":
            return self._add("split", None, *(self._sequence(part, then, fold) for part in argument[1]))
        if op == "SUBPATTERN":
            _, more, less, inner = argument
            self._refuse_flags(more)
            return self._sequence(inner, then, (fold or bool(more & re.IGNORECASE)) and not less & re.IGNORECASE)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            if str(most) == "MAXREPEAT":
                loop = self._add("split", None)
                self.places[loop] = ("split", None, (self._sequence(inner, loop, fold), then))
                then = loop
            else:
                end = then
                for _ in range(most - least):
                    then = self._add("split", None, self._sequence(inner, then, fold), end)
            for _ in range(least):
                then = self._sequence(inner, then, fold)
                if not len(inner):
                    break
            return then
        what = {"ASSERT": "looks around", "ASSERT_NOT": "looks around"}.get(op, f"has a {op.lower().replace('_', ' ')}")
        raise ValueError(f"{what}, which takes longer than a bound can be given for: write it without")

    def _closed(self, places: frozenset[int], before: bool | None, after: bool | None) -> set[int]:
        """With all that is reached from these places, and from the start, without a character. `before`, `after`: whether the characters there are a
        word's; None at the ends."""
        boundary = bool(before) != bool(after)
        holds = {"AT_BEGINNING": before is None, "AT_BEGINNING_STRING": before is None, "AT_END": after is None}
        holds |= {"AT_END_STRING": after is None, "AT_BOUNDARY": boundary, "AT_NON_BOUNDARY": not boundary}
        found: set[int] = set()
        waiting = [*places, self.start]
        while waiting:
            if (k := waiting.pop()) in found:
                continue
            found.add(k)
            kind, asked, leads = self.places[k]
            if kind == "split" or (kind == "at" and holds[asked]):
                waiting += leads
        return found

    def occurs_in(self, name: str, charge: Callable[[int], None]) -> bool:
        """Whether `re.search` finds the expression in the name; `charge(n)`: n units of `WORK` are done."""
        charge(len(name))
        places: frozenset[int] = frozenset()
        before: bool | None = None
        for c in name:
            key = places, before, c
            if key not in self._moves:
                closed = self._closed(places, before, _word(c))
                charge(8 * len(closed))
                to = (
                    leads[0]
                    for kind, asked, leads in map(self.places.__getitem__, closed)
                    if kind == "character" and _takes(asked, c)
                )
                self._moves[key] = None if 0 in closed else frozenset(to)
            if (moved := self._moves[key]) is None:
                return True
            places, before = moved, _word(c)
        closed = self._closed(places, before, None)
        charge(8 * len(closed))
        return 0 in closed


def _word(c: str) -> bool:
    return c.isalnum() or c == "_"


CATEGORIES: dict[str, Callable[[str], bool]] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _word}


def _takes(asked: tuple[str, Any, bool], c: str) -> bool:
    op, argument, fold = asked
    return _one(op, argument, {c, c.lower(), c.upper()} if fold else {c})


def _one(op: str, argument: Any, cases: set[str]) -> bool:
    """Whether a character, given in the cases that count as the same, is one of those."""
    if op == "ANY":
        return "\n" not in cases
    if op == "CATEGORY":
        name = str(argument).removeprefix("CATEGORY_")
        return any(map(CATEGORIES[name.removeprefix("NOT_")], cases)) != name.startswith("NOT_")
    if op == "IN":
        negated = str(argument[0][0]) == "NEGATE"
        return any(_one(str(o), a, cases) for o, a in argument[negated:]) != negated
    low, high = argument if op == "RANGE" else (argument, argument)
    return any(low <= ord(x) <= high for x in cases if len(x) == 1) != (op == "NOT_LITERAL")


class Patterns:
    """A list of expressions, as `check_patterns` takes them.

    Raises:
        ValueError: names the one that is wrong, and what is wrong with it.
    """

    def __init__(self, what: str, patterns: Any) -> None:
        if isinstance(patterns, str) or not isinstance(patterns, Sequence):
            raise ValueError(f"{what}={patterns!r:.80} must be a list of regular expressions")
        total = 0
        for pattern in patterns:
            if not isinstance(pattern, str) or len(pattern) > 256:
                raise ValueError(f"{what}: {pattern!r:.80} must be a regular expression of at most 256 characters")
            total += 1 + len(pattern)
        if total > MOST_CHARACTERS:
            raise ValueError(
                f"{what} has {len(patterns)} regular expressions of {total} characters together, at most {MOST_CHARACTERS} are taken: join some with |"
            )
        self.what, self.work = what, 0
        self.automata: list[Automaton] = []
        for pattern in patterns:
            try:
                self.automata.append(Automaton(pattern))
            except ValueError as error:
                raise ValueError(f"{what}: {pattern!r:.80} {error}") from None

    def _charge(self, units: int) -> None:
        self.work += units
        if self.work > WORK:
            raise ValueError(f"{self.what}: the regular expressions take too long for so many names: simplify them")

    def first(self, name: str) -> int | None:
        """The place in the list of the first expression that occurs in the name; None: none does.

        Raises:
            ValueError: this and what was asked before takes more than `WORK`.
        """
        return next((k for k, a in enumerate(self.automata) if a.occurs_in(name, self._charge)), None)


def check_patterns(what: str, patterns: Any) -> tuple[str, ...]:
    """Refuse what is no list of regular expressions with a bound in time; returns them.

    Raises:
        ValueError: names the pattern and what is wrong with it.
    """
    Patterns(what, patterns)
    return tuple(patterns)
