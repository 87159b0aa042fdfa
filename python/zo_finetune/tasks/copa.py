"""COPA (Roemmele et al. 2011; SuperGLUE): which of two sentences is the cause, or the effect, of another? MeZO's prompt, as in GPT-3."""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import Candidate, Example, Form, Row, RowError, Task, decapitalized

JOINED: dict[str, str] = {"cause": "because", "effect": "so"}


class COPA(Task):
    name = "copa"
    summary = "which choice is the cause or the effect of a premise? 0 choice1, 1 choice2; question is cause or effect"
    source, source_config = "aps/super_glue", "copa"
    fields = ("premise", "choice1", "choice2", "question", "label")
    objective = "language-model"
    choices: ClassVar = ("choice1", "choice2")

    def specimen(self) -> Row:
        return {**super().specimen(), "question": "cause", "label": 0}

    def example(self, row: Row, form: Form) -> Example:
        joined = JOINED.get(str(row["question"]).strip().lower())
        if joined is None:
            raise RowError("question", row["question"], "copa needs cause or effect there: correct the row or remove it")
        premise = self.text(row, "premise").removesuffix(".")
        texts = [self.text(row, choice) for choice in self.choices]
        answers = [text if text.split()[0] == "I" else decapitalized(text) for text in texts]
        return Example(
            tuple(Candidate(f"{premise} {joined}", f" {answer}", neutral=joined) for answer in answers), self.index(row, "label", 2)
        )
