"""Is a sentence of a review good? What SST-2, SST-5, MR and CR have in common.

Prompt and label words are MeZO's: "{sentence} It was" + " terrible" / " great"; for a masked model "{sentence} It was<mask>."
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import ClassificationTask, Row


class Sentiment(ClassificationTask):
    fields = ("sentence", "label")
    aliases: ClassVar = {"sentence": ("text",)}
    forms = ("causal", "masked")
    labels: ClassVar[tuple[str, ...]] = ("negative", "positive")
    words: ClassVar[tuple[str, ...]] = (" terrible", " great")
    neutral = " It was"

    def prompt(self, row: Row) -> str:
        return f"{self.text(row, 'sentence')} It was"

    def masked_prompt(self, row: Row) -> tuple[str, str]:
        return self.prompt(row), "."
