"""SQuAD (Rajpurkar et al. 2016): a question about a paragraph of Wikipedia, answered by words of it. MeZO's prompt."""

from __future__ import annotations

from zo_finetune.tasks.base import Row
from zo_finetune.tasks.free_answers import FreeAnswers, spans_of


class SQuAD(FreeAnswers):
    name = "squad"
    summary = "a question about a paragraph; answers: a list of accepted texts, or the hub's record of them"
    source = "rajpurkar/squad"
    fields = ("title", "context", "question", "answers")

    def prompt(self, row: Row) -> str:
        title, context, question = (self.text(row, field) for field in self.fields[:3])
        return f"Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"

    def accepted(self, row: Row) -> tuple[tuple[str, ...], ...]:
        return spans_of(self, row, "answers")
