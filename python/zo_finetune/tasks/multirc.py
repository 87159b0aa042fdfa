"""MultiRC (Khashabi et al. 2018; SuperGLUE): is this an answer to a question about a paragraph? MeZO's prompt, from PromptSource.

A question has several answers, of which each is a row. MeZO's figure is the share of rows that are judged right, and not SuperGLUE's F1 or exact match
over a question's answers: it is called per-answer accuracy.
"""

from __future__ import annotations

from zo_finetune.tasks.base import Row
from zo_finetune.tasks.yes_no import YesNo


class MultiRC(YesNo):
    name = "multirc"
    summary = "is an answer to a question about a paragraph correct? 0 no, 1 yes"
    source, source_config = "aps/super_glue", "multirc"
    metrics = ("per-answer-accuracy", "loss", "auc", "predicted", "best-threshold")
    fields = ("paragraph", "question", "answer", "label")

    def prompt(self, row: Row) -> str:
        paragraph, question, answer = (self.text(row, field) for field in self.fields[:3])
        return f'{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
