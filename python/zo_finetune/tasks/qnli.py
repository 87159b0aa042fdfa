"""QNLI (Rajpurkar et al. 2016; GLUE): does a sentence answer a question? MeZO has it for masked models alone."""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import Row
from zo_finetune.tasks.entailment import TwoWay


class QNLI(TwoWay):
    name = "qnli"
    summary = "does a sentence answer a question? 0 entailment (it does), 1 not (causal prompt: ours)"
    source, source_config = "nyu-mll/glue", "qnli"
    fields = ("question", "sentence", "label")
    pair = ("question", "sentence")
    aliases: ClassVar = {"question": ("sentence1",), "sentence": ("sentence2",)}

    def prompt(self, row: Row) -> str:
        question, sentence = self.texts(row)
        return f'{sentence}\nDoes this answer the question "{question}"? Yes or No?\n'
