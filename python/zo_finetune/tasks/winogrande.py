"""WinoGrande (Sakaguchi et al. 2020): which of two options fills a gap? ZO-LLM's form: the score is over an option and what follows it, after the text
that both have before them."""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import Candidate, Example, Form, Row, RowError, Task


class WinoGrande(Task):
    name = "winogrande"
    summary = "which option fills the gap, _ in the sentence? label 0 option1, 1 option2; or the hub's answer, 1 or 2"
    source, source_config = "allenai/winogrande", "winogrande_m"
    fields = ("sentence", "option1", "option2", "label")
    aliases: ClassVar = {"label": ("answer",)}
    objective = "language-model"

    def specimen(self) -> Row:
        return {**super().specimen(), "sentence": "{before} _ {after}", "label": 0}

    def example(self, row: Row, form: Form) -> Example:
        before, gap, after = self.text(row, "sentence").partition("_")
        if not gap or "_" in after:
            raise RowError("sentence", row["sentence"], "winogrande needs one gap there, written _: correct the row or remove it")
        context = before.rstrip(" ")
        options = (self.text(row, "option1"), self.text(row, "option2"))
        candidates = tuple(Candidate(context, f"{before[len(context) :]}{option}{after}") for option in options)
        if "answer" in row:
            number = str(row["answer"]).strip()
            if number not in ("1", "2"):
                raise RowError("answer", row["answer"], "winogrande needs 1 or 2 there: correct the row, or choose another split")
            return Example(candidates, int(number) - 1)
        return Example(candidates, self.index(row, "label", 2))
