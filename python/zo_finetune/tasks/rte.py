"""RTE (Dagan et al. 2006 and later; SuperGLUE, GLUE): does a sentence follow from a text? MeZO's prompt, from PromptSource."""

from __future__ import annotations

from zo_finetune.tasks.base import Row
from zo_finetune.tasks.entailment import TwoWay


class RTE(TwoWay):
    name = "rte"
    summary = "does a sentence follow from a text? 0 entailment, 1 not"
    source, source_config = "aps/super_glue", "rte"

    def prompt(self, row: Row) -> str:
        premise, hypothesis = self.texts(row)
        return f'{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'
