"""BoolQ (Clark et al. 2019; SuperGLUE): a question about a passage, answered by yes or no. MeZO's prompt of version 3."""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import Row
from zo_finetune.tasks.yes_no import YesNo


class BoolQ(YesNo):
    name = "boolq"
    summary = "is a question about a passage answered by yes? 0 no, 1 yes"
    source = "google/boolq"
    fields = ("passage", "question", "label")
    aliases: ClassVar = {"label": ("answer",)}

    def prompt(self, row: Row) -> str:
        question = self.text(row, "question")
        mark = "" if question.endswith("?") else "?"
        return f"{self.text(row, 'passage')} {question[:1].upper()}{question[1:]}{mark}\n"
