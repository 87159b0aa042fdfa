"""DROP (Dua et al. 2019): a question about a passage whose answer is a number, a date, or one or more spans of text. MeZO's prompt.

The spans of one answer belong together: MeZO takes them for alternatives. The hub's ucinlp/drop runs the answers of a validation row's annotators together, so
that where one ends is a guess: numbers and dates are answers by themselves, and a span that the answer at hand has already begins the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from zo_finetune.tasks.base import Row, RowError
from zo_finetune.tasks.free_answers import FreeAnswers, digits


class DROP(FreeAnswers):
    name = "drop"
    summary = "a question about a passage; answers: a list of accepted ones, each a text or the list of its spans, or the hub's record of them"
    source = "ucinlp/drop"
    fields = ("context", "question", "answers")
    aliases: ClassVar = {"context": ("passage",), "answers": ("answers_spans", "answer")}
    comparison = "drop"

    def prompt(self, row: Row) -> str:
        context, question = (self.text(row, field) for field in self.fields[:2])
        return f"Passage: {context}\nQuestion: {question}\nAnswer:"

    def accepted(self, row: Row) -> tuple[tuple[str, ...], ...]:
        value: Any = row["answers"]
        found: Any = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, Mapping):
            found = of_hub(value) if "types" in value else [of_record(value)]
        listed = [one if isinstance(one, (list, tuple)) else [one] for one in found]
        if not listed or not all(listed):
            raise RowError("answers", value, "drop needs an answer there, or a list of them: correct the row or remove it")
        return tuple(dict.fromkeys(tuple(digits(self, span, "answers") for span in spans) for spans in listed))


def of_hub(value: Mapping[str, Any]) -> list[list[Any]]:
    """The answers in a record of ucinlp/drop: `spans`, and of each its type."""
    answers: list[list[Any]] = []
    last = ""
    for span, kind in zip(value.get("spans") or (), value.get("types") or (), strict=False):
        if not answers or kind != "span" or last != "span" or span in answers[-1]:
            answers.append([])
        answers[-1].append(span)
        last = kind
    return answers


def of_record(value: Mapping[str, Any]) -> list[Any]:
    """The spans of an answer as DROP's own files have it: a number, a date or spans, the others empty."""
    date: Any = value.get("date") or {}
    day = " ".join(filter(None, (str(date.get(part) or "") for part in ("day", "month", "year"))))
    number = value.get("number")
    return [number] if number not in (None, "") else [day] if day else list(value.get("spans") or ())
