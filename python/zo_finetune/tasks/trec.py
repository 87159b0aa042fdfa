"""TREC (Li and Roth 2002): what does a question ask for? MeZO has it for masked models alone.

The labels are in the order of the hub's CogComp/trec. LM-BFF's files, which MeZO's medium models read, have 0 description, 1 entity, 2 abbreviation:
give those names to their rows.
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import OF_SEVERAL_LABELS, ClassificationTask, Row


class TREC(ClassificationTask):
    name = "trec"
    summary = (
        "what does a question ask for? 0 abbreviation, 1 entity, 2 description, 3 human, 4 location, 5 number (causal prompt: ours)"
    )
    source = "CogComp/trec"
    fields = ("text", "label")
    aliases: ClassVar = {"text": ("sentence", "question"), "label": ("coarse_label", "label-coarse", "label_coarse")}
    forms = ("causal", "masked")
    labels = ("abbreviation", "entity", "description", "human", "location", "number")
    synonyms: ClassVar = {"enty": "entity", "expression": "abbreviation", "numeric": "number"}
    words = ("Expression", "Entity", "Description", "Human", "Location", "Number")
    metrics = OF_SEVERAL_LABELS

    def prompt(self, row: Row) -> str:
        return f"{self.text(row, 'text')}\nWhat does this ask for? Description, Entity, Expression, Human, Location, or Number?\n"

    def masked_prompt(self, row: Row) -> tuple[str, str]:
        return "", f": {self.text(row, 'text')}"
