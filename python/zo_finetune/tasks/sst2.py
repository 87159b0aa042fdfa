"""SST-2 (Socher et al. 2013; GLUE): is a sentence of a film review positive? Any file of sentences with two labels will do.

Prompt and label words are MeZO's: "{sentence} It was" + " terrible" / " great"; for a masked model "{sentence} It was<mask>."
"""

from __future__ import annotations

from zo_finetune.tasks.base import ClassificationTask, Row


class SST2(ClassificationTask):
    name = "sst2"
    summary = "sentiment of a sentence; columns sentence, label (0 negative, 1 positive)"
    fields = ("sentence", "label")
    forms = ("causal", "masked")
    labels = ("negative", "positive")
    words = (" terrible", " great")
    source, source_config = "nyu-mll/glue", "sst2"
    neutral = " It was"

    def prompt(self, row: Row) -> str:
        return f"{self.text(row, 'sentence')} It was"

    def masked_prompt(self, row: Row) -> tuple[str, str]:
        return self.prompt(row), "."
